"""Make .venv what requirements.lock says. Every make target calls this; once it is done, it takes a moment.

Standard library only. The file `.venv/.lottery` holds a fingerprint of what the venv was made from: the same one
means nothing to do and no network, an empty file that a set-up was interrupted and has to start from nothing.
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
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".lottery"
LOCK = ROOT / "requirements.lock"
BASE = getattr(sys, "_base_executable", sys.executable)  # the Python below an activated venv


def fingerprint() -> str:
    """Hash of the lock, the package's metadata and the clone's path, which the scripts in a venv name."""
    parts = [LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), os.fsencode(ROOT)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def call(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True)


def find_pip(scratch: Path) -> list[object]:
    """The command that runs pip; a Python without it gets one in a scratch venv."""
    python = BASE
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        call(python, "-m", "venv", scratch / "pip")
        python = scratch / "pip" / "bin" / "python"
    return [python, "-m", "pip"]


def find_uv(scratch: Path, pip: list[object]) -> str:
    """The user's uv, else the one that the lock pins: in .venv already, or new in the scratch folder."""
    if uv := shutil.which("uv") or shutil.which("uv", path=VENV / "bin"):
        return uv
    pin = re.search(r"^uv==.*?(?=^\S)", LOCK.read_text(), re.MULTILINE | re.DOTALL)[0]
    (scratch / "uv.lock").write_text(pin)
    call(*pip, "install", "--quiet", "--require-hashes", "--target", scratch / "uv", "-r", scratch / "uv.lock")
    return str(scratch / "uv" / "bin" / "uv")


def install(scratch: Path) -> None:
    """The pinned packages, then this clone, editable: its build tool is one of the pins, so nothing is fetched."""
    pip = find_pip(scratch)
    try:
        call(find_uv(scratch, pip), "pip", "install", "--python", PYTHON, "--require-hashes", "-r", LOCK)
    except subprocess.CalledProcessError:  # uv does not read pip's settings: another index, a certificate, a proxy
        print("uv could not install the packages, pip tries.", flush=True)
        call(*pip, "--python", PYTHON, "install", "--require-hashes", "-r", LOCK)
    call(*pip, "--python", PYTHON, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)


def other_python() -> bool:
    """Whether .venv is of another Python than this one, 3.11 and 3.12 say."""
    found = re.search(r"^version(?:_info)? = (\d+\.\d+)", (VENV / "pyvenv.cfg").read_text(), re.MULTILINE)
    return not found or found[1] != f"{sys.version_info[0]}.{sys.version_info[1]}"


def main(of_this: bool = False) -> None:
    """of_this: a Python was named, so that a .venv of another one is made anew."""
    os.environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    want = fingerprint()
    if of_this and PYTHON.exists() and other_python():
        print("The Python that was named is another one than that of .venv, which is made anew.", flush=True)
        shutil.rmtree(VENV)
    made = STAMP.read_text() if STAMP.exists() else None
    if made == want and PYTHON.exists():
        return
    if made == "":
        shutil.rmtree(VENV)
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("")
    print("Setting up .venv: several GB with PyTorch. The next call re-uses it.", flush=True)
    if not PYTHON.exists():
        call(BASE, "-m", "venv", "--without-pip", VENV)
    with tempfile.TemporaryDirectory() as scratch:
        install(Path(scratch))
    STAMP.write_text(want)


if __name__ == "__main__":
    try:
        main("--of-this" in sys.argv)
    except subprocess.CalledProcessError as error:
        sys.exit(f"The set-up of .venv failed at: {error.cmd[0]} ... (exit {error.returncode}). Try again.")
