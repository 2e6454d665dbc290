"""Make .venv what requirements.lock says: `python3 .ci/venv.py`, called by every make target, in a moment once it is done.

Standard library only. The venv's own file `.lottery` holds a fingerprint of what it was made from: the same fingerprint
means nothing to do (and no network), an empty file an interrupted set-up, which starts again from nothing.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / ".lottery"
LOCK = ROOT / "requirements.lock"
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # outside any activated venv


def fingerprint() -> str:
    """Hash of the lock, the package's metadata and the clone's path (scripts in a venv name it)."""
    parts = [LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), os.fsencode(ROOT)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def call(*command: object, **options) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)


def find_uv(scratch: Path) -> str:
    """The user's uv, else the lock's, fetched by pip into a scratch folder."""
    if uv := shutil.which("uv"):
        return uv
    pin = re.search(r"^uv==.*?(?=^\S|\Z)", LOCK.read_text(), re.MULTILINE | re.DOTALL)[0]
    (scratch / "uv.lock").write_text(pin)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--target", scratch / "uv"]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        call(sys.executable, "-m", "venv", scratch / "pip")  # a Python whose pip lives only in its venvs
        install[0] = scratch / "pip" / "bin" / "python"
    call(*install, "--requirement", scratch / "uv.lock")
    return str(scratch / "uv" / "bin" / "uv")


def install(uv: str) -> None:
    """The pinned packages, then this clone itself, editable; its build tool is one of the pins, so nothing is fetched."""
    python = VENV / "bin" / "python"
    if not python.exists():
        call(uv, "venv", "--quiet", "--allow-existing", "--no-project", "--seed", "--python", BASE_PYTHON, VENV)
    try:
        call(uv, "pip", "install", "--python", python, "--require-hashes", "--requirement", LOCK)
    except subprocess.CalledProcessError:
        print("uv could not install the packages; trying pip, which may know another index or certificate.", flush=True)
        call(python, "-m", "pip", "install", "--require-hashes", "--requirement", LOCK)
    call(uv, "pip", "install", "--quiet", "--python", python, "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main() -> str | None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return f"Python {sys.version.split()[0]} at {sys.executable}: this project needs Python 3.11 or 3.12 (make PYTHON=...)."
    want = fingerprint()
    if STAMP.exists():
        if STAMP.read_text() == want and (VENV / "bin" / "python").exists():
            return None
        if not STAMP.read_text():
            shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("")
    print("Setting up .venv (several GB with PyTorch; the next call re-uses it)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        install(find_uv(Path(scratch)))
    STAMP.write_text(want)
    return None


if __name__ == "__main__":
    sys.exit(main())
