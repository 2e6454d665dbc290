"""A sweep of tiny runs, disturbed at random moments: killed, cut short, on a full disk, beside other writers.

    python tests/sweep_faults.py --moments 60 --seed 0

One process has everything imported; each writer is a fork of it that trains what the store does not have. After a
disturbance the store is looked at, one undisturbed writer finishes the sweep, and the results are compared with those
of a sweep that nobody disturbed. What a writer begins and ends stands in a log, in one order for all of them.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lottery import files, training
from lottery.experiments import Run, Store, engine, work
from lottery.training import Recipe

KINDS = ("killed at a file operation", "killed at a time", "a file cut short", "full disk", "two writers", "three")
BAD = ("lost", "done twice", "corrupt accepted", "failed to go on", "left behind", "full disk not told")
TIMES = ("started", "wall_s", "certificate", "payload_sha")  # what differs between two trainings of one run
SIZE = 8 * 2**20  # bytes of the small disk


def sweep():
    """Two chains of a dense network, two rounds and a control, and a network that is checkpointed on the way."""
    recipe = Recipe(iterations=8, eval_every=4)
    found = []
    for seed in range(2):
        dense = Run(dataset="digits", recipe=recipe, seed=seed)
        one = replace(dense, parent=dense)
        found += [dense, one, replace(one, parent=one), replace(one, parent=one, init="reinit")]
    sgd = Recipe("sgd", lr=0.1, iterations=8, eval_every=2, inputs="standard")
    return [*found, Run(model="resnet8", dataset="digits", options=(("width", 2),), recipe=sgd)]


class Log:
    """Events in the order in which they happen, whoever writes them: a line is appended in one piece."""

    def __init__(self, path):
        self.path = Path(path)

    def say(self, *words):
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())
        os.close(handle)

    def events(self):
        return [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def twice(self):
        """Trainings that began although their result was kept already, or somebody alive was at it."""
        kept, at, found = set(), {}, 0
        for what, who, key in self.events():
            if what == "begin":
                found += key in kept or key in at
                at[key] = who
            elif what == "end":
                kept.add(key)
                at.pop(key, None)
            elif what == "failed":  # the weights of its parent were damaged, say
                at.pop(key, None)
            elif what == "dead":
                at = {k: pid for k, pid in at.items() if pid != who}
            elif what == "damaged":
                kept.discard(key)
        return found


def prepare():
    """What every writer has from the start, so that a fork is all that one costs: the results, the file operations."""
    torch.set_num_threads(1)
    engine.LOOK = 0.02
    training.Checkpoint.__init__.__defaults__ = (0.0,)  # seconds between two: one at every reading
    work.code()
    with tempfile.TemporaryDirectory() as folder:
        sys.addaudithook(fuse := _Fuse(0))
        write(folder, Log(os.devnull))
        operations = -fuse.left
        return rows(folder)[0], operations


def write(folder, log):
    """One writer's sweep; returns what is left."""
    execute = work.execute

    def logged(runs, *args):
        for r in runs:
            log.say("begin", os.getpid(), r.key)
        how = "failed"
        try:
            seconds = execute(runs, *args)
            how = "end"
            return seconds
        finally:
            for r in runs:
                log.say(how, os.getpid(), r.key)

    engine.execute = logged
    try:
        return engine.run(sweep(), store=Store(folder), slots=1, progress=False)
    finally:
        engine.execute = execute


def fork(folder, log, die_at=None):
    """A writer as a process of its own; die_at: the number of its file operation before which it is killed."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if die_at is not None:
            sys.addaudithook(_Fuse(die_at))
        code = 0 if write(folder, log) == [] else 1
    except files.CannotWrite:
        code = 28
    finally:
        os._exit(code)


class _Fuse:
    """Kills this process before its n-th file operation; Python announces each of them."""

    FILES = ("open", "os.rename", "os.remove", "os.link", "os.mkdir", "os.chmod", "os.utime", "fcntl.flock", "tempfile")

    def __init__(self, n):
        self.left = n

    def __call__(self, event, args):
        if event.startswith(self.FILES):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def reap(pid, log):
    """Wait for a writer and note its death before anybody else can see it; returns its exit status, or −signal."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    log.say("dead", pid, "-")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rows(folder):
    """What a reader gets, by key, without what differs between two trainings; and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = Store(folder).rows()
    hashes = {key: json.loads(row["certificate"]) for key, row in found.items()}
    return {
        key: {name: value for name, value in row.items() if name not in TIMES}
        | {name: hashes[key][name] for name in ("theta0", "parent_weights")}
        for key, row in found.items()
    }, said.getvalue()


class Moment:
    """One disturbance of one sweep, and what came of it."""

    def __init__(self, kind, folder, rng, expected, operations):
        self.kind, self.folder, self.rng, self.expected, self.operations = kind, folder, rng, expected, operations
        self.log, self.found = Log(self.folder.with_suffix(".log")), collections.Counter()

    def run(self):
        """Disturb, look, go on to the end, compare. Returns counts of what must not be, all 0."""
        {KINDS[1]: self.at_a_time, KINDS[2]: self.cut, KINDS[3]: self.full}.get(self.kind, self.at_an_operation)()
        acknowledged = {key for what, _, key in self.log.events() if what == "end"} - self.damaged()
        seen, _ = rows(self.folder)
        self.found["lost"] += len(acknowledged - seen.keys())
        self.found["corrupt accepted"] += sum(row != self.expected[key] for key, row in seen.items())
        self.found["failed to go on"] += reap(fork(self.folder, self.log), self.log) != 0
        seen, _ = rows(self.folder)
        self.found["lost"] += len(self.expected.keys() - seen.keys())
        self.found["corrupt accepted"] += sum(row != self.expected[key] for key, row in seen.items())
        self.found["done twice"] += self.log.twice()
        self.found["left behind"] += self.left()
        return self.found

    def damaged(self):
        return {key for what, _, key in self.log.events() if what == "damaged"}

    def at_an_operation(self):
        """Killed before some file operation; with other writers beside it, which go on."""
        writers = {"two writers": 2, "three": 3}.get(self.kind, 1)
        moment = self.rng.randrange(1, self.operations // writers)
        victim, *others = [fork(self.folder, self.log, moment if i == 0 else None) for i in range(writers)]
        reap(victim, self.log)
        self.found["failed to go on"] += sum(reap(pid, self.log) != 0 for pid in others)

    def at_a_time(self):
        """Killed from outside, a random time after it began its first training."""
        pid = fork(self.folder, self.log)
        while not self.log.events():
            time.sleep(0.002)
        time.sleep(self.rng.random() * self.rng.choice((0.1, 1.0)))
        self.log.say("dead", pid, "-")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def cut(self):
        """Killed; then a file ends in the middle, as after a power cut that the disk did not take as promised."""
        self.at_an_operation()
        written = [p for p in sorted(self.folder.rglob("*")) if p.is_file() and p.stat().st_size]
        for path in self.rng.sample(written, min(2, len(written))):
            if len(key := path.name.split(".")[0]) == 24:
                self.log.say("damaged", 0, key)
            content = path.read_bytes()
            path.write_bytes(content[: self.rng.randrange(len(content))])

    def full(self):
        """Little room: the writer says so and stops; then there is room again."""
        room = self.rng.choice((0, 30_000, 70_000, *(self.rng.randrange(80_000, 1_500_000) for _ in range(5))))
        others = self.folder / "others"
        others.write_bytes(b"")
        free = os.statvfs(self.folder)
        others.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))
        status = reap(fork(self.folder, self.log), self.log)
        self.found["full disk not told"] += status not in (0, 28)
        others.unlink()

    def left(self):
        """Files that no finished sweep needs, after what is old enough has been swept."""
        before, files.STALE = files.STALE, -1.0
        Store(self.folder).sweep()
        files.STALE = before
        hidden = [p for p in self.folder.rglob(".*.tmp") if p.is_file()]
        return len([*hidden, *self.folder.glob(".leases/[!.]*"), *self.folder.glob(".checkpoints/*.safetensors")])


@contextlib.contextmanager
def disk(folder):
    """A file system of `SIZE` bytes on a folder, or None where none can be mounted."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disturb(moments, seed=0, kinds=KINDS, say=lambda line: None):
    """{"moments": {kind: n}, "not run": {kind: n}, and how often each thing happened that must not}."""
    undisturbed, rng = prepare(), random.Random(seed)
    done, skipped, found = collections.Counter(), collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as base:
        for i in range(moments):
            kind = kinds[i % len(kinds)]
            folder = Path(base) / str(i)
            with disk(folder) if kind == "full disk" else contextlib.nullcontext(folder) as here:
                if here is None:
                    skipped[kind] += 1
                    continue
                here.mkdir(exist_ok=True)
                moment = Moment(kind, here, random.Random(rng.random()), *undisturbed).run()
            done[kind] += 1
            found += moment
            bad = {what: n for what, n in moment.items() if n}
            say(f"{i + 1:4} {kind}: {bad or 'as undisturbed'}")
    return {"moments": dict(done), "not run": dict(skipped)} | {what: found[what] for what in BAD}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    result = disturb(given.moments, given.seed, say=lambda line: print(line, flush=True))
    result |= {"cpu_s": round(sum(os.times()[:4])), "wall_s": round(time.perf_counter() - began)}
    print(json.dumps(result, indent=1))
    sys.exit(any(result[what] for what in BAD))
