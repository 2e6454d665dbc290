"""Files that a kill, a full disk or somebody else may have had in hand: written whole or not at all, read with care."""

import contextlib
import errno
import fcntl
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

STALE = 3600.0  # seconds after which a temporary file is what a killed process left
FULL = (errno.ENOSPC, errno.EDQUOT)


class CannotWrite(OSError):
    """A full disk, a read-only folder, a file system that lacks something: told with the file and what to do."""

    def __str__(self):
        why = os.strerror(self.errno) if self.errno else self.strerror
        do = "Make room, or name" if self.errno in FULL else "Name"
        return f"Cannot write {self.filename}: {why}. {do} another folder; what is finished is kept."


def path_of(path: Path | str) -> Path:
    """A path with `~` as the home folder that it stands for; as it is where there is no such user."""
    return Path(os.path.expanduser(path))


def in_folder(path: Path | str) -> Path:
    """`path_of` what is going to be written. Raises FileNotFoundError where its folder is not there."""
    if not (folder := (path := path_of(path)).absolute().parent).is_dir():
        raise FileNotFoundError(f"No folder {folder}: make it first, or name another file.")
    return path


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
    """Give a finished file its name in one step; without `replace`, False when the name is taken.

    Raises OSError, and without `replace` in words where the file system has no hard links.
    """
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.chmod(temporary, 0o644)
    try:
        os.replace(temporary, path) if replace else os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if replace or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise OSError(f"its file system makes no hard links ({error.strerror})") from error
    with _opened(path.parent, os.O_RDONLY) as f:  # that the name outlives a power cut as well as the content
        try:
            os.fsync(f)
        except OSError as error:  # some file systems, of a network or of FUSE, know no such thing of a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
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


def aside(path: Path, why: str) -> None:
    """Rename a file to the first free one of <stem>.<why>, <stem>.2.<why>, …"""
    names = (path.with_suffix(f".{n}.{why}" if n > 1 else f".{why}") for n in itertools.count(1))
    path.rename(next(name for name in names if not name.exists()))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing. Raises CannotWrite, in words without `flock`."""
    with contextlib.ExitStack() as stack:
        try:
            try:
                f = stack.enter_context(_opened(path, os.O_RDWR | os.O_CREAT))
            except PermissionError:  # another user's: reading is enough for a lock, but for one of NFS
                f = stack.enter_context(_opened(path, os.O_RDONLY))
        except OSError as error:
            raise CannotWrite(error.errno, error.strerror, str(path)) from error
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as error:
            why = f"its file system grants no lock, `flock` ({error.strerror})"
            raise CannotWrite(None, why, str(path)) from error
        yield


def clock(folder: Path) -> float:
    """The time by the clock that stamps a folder's files, as machines need not agree on it; ours where none is made."""
    with contextlib.suppress(OSError), temporary(folder / "now") as probe:
        return probe.stat().st_mtime
    return time.time()


def sweep(
    folder: Path, pattern: str = ".*.tmp", which: Callable[[Path], bool] = lambda path: True, times: int = 1
) -> None:
    """Remove what killed processes left in a folder: files that nobody has touched for STALE seconds, `times` over.

    Also those from a future as far away, where the clock was set back.
    """
    if left := [path for path in folder.glob(pattern) if path.is_file() and which(path)]:
        now = clock(folder)
        for path in left:
            with contextlib.suppress(OSError):
                if abs(now - path.stat().st_mtime) > times * STALE:
                    path.unlink()


def of_user(kind: str) -> Path:
    """lottery's folder in a user's "cache" or "data"; without a home one that can never be made, so nothing is kept."""
    home = {"cache": "~/.cache", "data": "~/.local/share"}[kind]
    folder = Path(os.environ.get(f"XDG_{kind.upper()}_HOME") or os.path.expanduser(home))
    return (folder if folder.is_absolute() else Path(os.devnull)) / "lottery"


def git(folder: Path, *words: str) -> str | None:
    """What a command of git prints in a clone; None where there is no git, or no clone."""
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def _opened(path, flags):
    f = os.open(path, flags, 0o666)
    try:
        yield f
    finally:
        os.close(f)


class Chunk(NamedTuple):
    """What the footer of a parquet file says of one column in one group of rows: number of values, unpacked bytes."""

    column: str
    values: int
    size: int


def chunks(path: Path) -> list[Chunk]:
    """The column chunks of a parquet file that pyarrow has opened. Raises ValueError for a footer that says no such.

    pyarrow's own `RowGroupMetaData.column` ends the process where a chunk's statistics are damaged.
    """
    with open(path, "rb") as f:
        f.seek(-8, os.SEEK_END)
        length = int.from_bytes(f.read(4), "little")
        f.seek(-8 - length, os.SEEK_END)
        footer = iter(f.read(length))
    try:  # FileMetaData.row_groups → RowGroup.columns → ColumnChunk.meta_data
        about = [chunk[3] for group in _thrift(12, footer)[4] for chunk in group[1]]
        found = [Chunk(m[3][0].decode(), m[5], m[6]) for m in about]
        if not all(type(n) is int and n >= 0 for chunk in found for n in chunk[1:]):
            raise ValueError("a size below 0")
        return found
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, StopIteration, RecursionError) as error:
        raise ValueError(f"its footer is damaged ({type(error).__name__}).") from None


def _thrift(kind, data):
    """The next value of Thrift's compact protocol; a struct is {number of the field: value}."""
    if kind in (1, 2):
        return kind == 1
    if kind == 3:
        return next(data)
    if kind in (4, 5, 6):
        n = _varint(data)
        return (n >> 1) ^ -(n & 1)
    if kind in (7, 8):
        n = 8 if kind == 7 else _varint(data)
        return bytes(itertools.islice(data, n))
    if kind in (9, 10):  # of booleans, each is a byte
        head = next(data)
        n = head >> 4 if head < 0xF0 else _varint(data)
        return [_thrift(3 if head & 15 < 3 else head & 15, data) for _ in range(n)]
    if kind != 12:
        raise ValueError(f"no kind {kind} in parquet")
    fields, number = {}, 0
    while head := next(data):
        number = number + (head >> 4) if head >> 4 else _thrift(5, data)
        fields[number] = _thrift(head & 15, data)
    return fields


def _varint(data):
    """Seven bits a byte, the lowest first, to the first byte below 128."""
    found = shift = 0
    while (byte := next(data)) > 127:
        found |= (byte & 127) << shift
        shift += 7
    return found | byte << shift
