"""Files that a kill, a full disk or somebody else may have had in hand: written whole or not at all, read with care."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

STALE = 3600.0  # seconds after which a temporary file is what a killed process left


class CannotWrite(OSError):
    """A full disk, a read-only folder: told with the file and what to do."""

    def __str__(self):
        why = os.strerror(self.errno) if self.errno else self.strerror
        return f"Cannot write {self.filename}: {why}. Make room, or name another folder; what is finished is kept."


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A fresh name beside `path`, on the same file system, gone afterwards. Raises CannotWrite, from its body too."""
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        yield Path(name)
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if name:
            Path(name).unlink(missing_ok=True)


def publish(temporary: Path, path: Path, replace: bool = True) -> bool:
    """Give a finished file its name in one step; without `replace`, False when the name is taken."""
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.chmod(temporary, 0o644)
    try:
        os.replace(temporary, path) if replace else os.link(temporary, path)
    except FileExistsError:
        return False
    with _folder(path.parent) as f:  # that the name outlives a power cut as well as the content
        os.fsync(f)
    return True


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises CannotWrite."""
    with temporary(path) as mine:
        mine.write_bytes(content)
        publish(mine, path)


def read(path: Path) -> bytes:
    """The content of an ordinary file. Raises ValueError for another one, such as a pipe, which would never end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no ordinary file.")
    return path.read_bytes()


def sweep(folder: Path, pattern: str = ".*.tmp", which=lambda path: True) -> None:
    """Remove what killed processes left in a folder: files that nobody has touched for STALE seconds.

    Ages are by the clock that stamps the files, as machines need not agree on the time.
    """
    if left := [path for path in folder.glob(pattern) if path.is_file() and which(path)]:
        with temporary(folder / "now") as probe:
            now = probe.stat().st_mtime
        for path in left:
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > STALE:
                    path.unlink()


@contextlib.contextmanager
def _folder(path):
    f = os.open(path, os.O_RDONLY)
    try:
        yield f
    finally:
        os.close(f)
