"""Who trains what: one lease a run, a file beside the store, so that no two processes train the same run at once.

A lease is a file `.leases/<key>` that names its owner. The owner touches it every `BEAT` seconds for as long as it
lives; one that was not touched for `EXPIRES` seconds, or whose owner was a process of this machine that is gone, may be
taken over. Files are looked at and written under one lock of the folder, so that two takers never both succeed; ages
are measured against the file system's own clock, so that machines need not agree on the time. A lease from the future,
where that clock was set back, starts to age when it is first seen. What needs it: a file system that all of them see,
with `flock` (local ones, NFS 4). A process that was asleep for longer than `EXPIRES`, or whose clock went forward by
more, may come back to find its run trained elsewhere too; the store keeps the first result.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path

from lottery import files

BEAT, EXPIRES = 15.0, 90.0  # seconds


class Leases:
    """The leases that this process holds in a folder; a thread keeps them alive until they are released."""

    def __init__(self, folder: Path | str):
        self.folder, self.held, self.thread, self.stop = Path(folder), set(), None, threading.Event()

    def take(self, keys: Iterable[str]) -> set[str]:
        """Take what is free of some keys, or was left by the dead; returns those that are this process's now.

        Raises `files.CannotWrite`; `release` and `close` give back those that were written before.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            now = files.clock(self.folder)
            mine = {key for key in keys if key in self.held or not self._lives(self.folder / key, now)}
            for key in mine - self.held:
                _write(self.folder / key)
                self.held.add(key)
        if self.held and self.thread is None:
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()
        return mine

    def release(self, keys: Iterable[str]) -> None:
        """Give back; a lease that another process has taken over meanwhile stays its own."""
        for key in set(keys) & self.held:
            self.held.discard(key)
            owner = _owner(self.folder / key) or {}
            if {name: owner.get(name) for name in _me()} == _me():
                (self.folder / key).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove the leases of the dead."""
        if self.folder.is_dir():
            with self._locked():
                now = files.clock(self.folder)
                for path in (path for path in self.folder.iterdir() if not path.name.startswith(".")):
                    if path.is_file() and not self._lives(path, now):
                        path.unlink()

    def close(self) -> None:
        """Give back everything."""
        self.stop.set()
        self.release(set(self.held))

    def _beat(self):
        while not self.stop.wait(BEAT):
            for key in list(self.held):
                with contextlib.suppress(OSError):
                    os.utime(self.folder / key)

    def _locked(self):
        return files.locked(self.folder / ".lock")

    def _lives(self, path, now):
        """Whether somebody holds this lease."""
        try:
            age = now - path.stat().st_mtime
        except FileNotFoundError:
            return False
        owner = _owner(path)
        if owner is None or _is_dead(owner):
            return False
        if age < -EXPIRES:  # the clock was set back since it was touched: it ages from now on, or would live for ever
            with contextlib.suppress(OSError):
                os.utime(path)
        return age < EXPIRES


def running(folder: Path | str) -> dict[str, dict]:
    """`{key: {"host", "pid", "since"}}` of what is being trained; leases of the dead are left out."""
    leases = Leases(folder)
    if not leases.folder.is_dir():
        return {}
    now, found = files.clock(leases.folder), {}
    for path in sorted(path for path in leases.folder.iterdir() if not path.name.startswith(".")):
        if leases._lives(path, now) and (owner := _owner(path)):
            found[path.name] = {name: owner[name] for name in ("host", "pid", "since")}
    return found


def _me():
    """This process, as no other names itself: the pid is that of one machine, since one start, in one container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "pid": os.getpid(), "in": f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"}
    return {"host": socket.gethostname(), "pid": os.getpid(), "in": ""}


def _is_dead(owner):
    """True for a process of this machine that is gone; of another machine nobody can know."""
    me = _me()
    if (owner["host"], owner["in"]) != (me["host"], me["in"]):
        return False
    try:
        os.kill(owner["pid"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _write(path):
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files.write(path, json.dumps({**_me(), "since": since}).encode())


def _owner(path):
    """What a lease says of its owner, or None where nobody can be read out of it."""
    try:
        owner = json.loads(files.read(path))
        sound = all(isinstance(owner[name], str) for name in ("host", "in", "since"))
        return owner if sound and type(owner["pid"]) is int and 0 < owner["pid"] < 2**31 else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
