"""Random damage to all that is read: shards, spool files, weights, tickets, the papers' numbers, words, parameters.

    python tests/damaged_inputs.py --inputs 10000 --seed 0

Each input must be refused in one line, or be taken for what it was before the damage. What must not happen: an
exception or a death that says nothing, a message of many lines, a hang, a changed value that is taken in silence.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from small_runs import DENSE, REPORTED, fake
from typer.testing import CliRunner

from lottery import cli, experiments, models, scorecard, tickets
from lottery import masks as M
from lottery.chapter import Chapter, Refused
from lottery.experiments import Store, pace, store

BAD = ("crash", "silent", "many lines", "hang", "death")
HANG = 20.0  # seconds of CPU
BATCH = 200  # inputs of one process, so that even a death is counted
# Of how many inputs in a thousand.
SHARES = {"spool": 300, "shard": 200, "weights": 200, "ticket": 150, "numbers": 80, "words": 60, "parameters": 10}


class Hang(BaseException):
    """No input takes so long."""


def damaged(content, rng):
    """Some bytes of a file: turned around, cut off, taken out, doubled, zeroed, or put in."""
    how, n = rng.randrange(7), len(content)
    a = rng.randrange(n)
    b = min(n, a + rng.randrange(1, 65))
    if how in (0, 1):
        changed = bytearray(content)
        for _ in range(1 if how else rng.randrange(1, 9)):
            changed[rng.randrange(n)] ^= rng.randrange(1, 256)
        return bytes(changed)
    middle = {2: b"", 3: content[a:b] * 2, 4: bytes(b - a), 5: rng.randbytes(b - a) + content[a:b]}
    return content[:a] if how == 6 else content[:a] + middle[how] + content[b:]


# What is damaged ------------------------------------------------------------------------------------------------------
# Each makes its file once and returns `try_one(rng)`, which damages a copy and says what came of it.


def parquet(folder, runs, packed):
    """A spool file of one run or a shard of three: rows that come back are as they were, others are named."""
    mine = Store(folder)
    for r in runs:
        mine.put(fake(r, test_acc=[0.1, None, 0.7], mask=bytes(range(256)), numbers=json.dumps({"x": [0.5, 0.25]})))
    if packed:
        mine.merge()
    [path] = (folder if packed else folder / ".spool").glob("*.parquet")
    content, sound = path.read_bytes(), {row["key"]: row for row in store.read(path)}

    def try_one(rng):
        path.write_bytes(damaged(content, rng))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            opened = Store(folder)
            pace.paces(opened)  # reads without a check
            found = opened.rows()
        if any(row != sound.get(key) for key, row in found.items()):
            return "silent"
        return "same" if len(found) == len(sound) else "refused" if said.getvalue().strip() else "silent"

    return try_one


def weights(folder):
    """Weights that come back are those that were saved."""
    mine, tensors = Store(folder), {"w": torch.arange(12.0).view(3, 4), "mask/w": torch.arange(12).view(3, 4) % 2 == 0}
    mine.save_artifact("key", tensors)
    path = mine.artifact("key")
    content = path.read_bytes()

    def try_one(rng):
        path.write_bytes(damaged(content, rng))
        found, _ = mine.load_artifact("key")
        return "same" if _equal(found, tensors) else "silent"

    return try_one


def ticket(folder):
    """A ticket that loads is the one that was saved: values, masks, what it is of, and whether it is bitwise."""
    run = replace(DENSE, options=(("hidden", (5, 4)),))
    net = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8), hidden=(5, 4))
    masks = {name: torch.rand(layer.weight.shape) < 0.5 for name, layer in M.prunable(net).items()}
    spec = json.loads(json.dumps(run.spec()))
    tickets.save(tickets.Ticket(M.state(net), masks, spec, False), path := folder / "t.safetensors")
    content = path.read_bytes()

    def try_one(rng):
        path.write_bytes(damaged(content, rng))
        found = tickets.load(path)
        same = _equal(found.theta, M.state(net)) and _equal(found.masks, masks)
        return "same" if same and found.spec == spec and found.bitwise is False else "silent"

    return try_one


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], t) and a[k].dtype == t.dtype for k, t in b.items())


def numbers(folder):
    """The papers' numbers and rules, or the checksums beside them: read as committed or refused."""
    shutil.copytree(REPORTED, folder, dirs_exist_ok=True)
    files = {path: path.read_bytes() for path in sorted(folder.glob("*.csv")) if path.stat().st_size < 60_000}
    files |= {folder / "SHA256SUMS": (folder / "SHA256SUMS").read_bytes()}
    frames = {path: _read(path) for path in files if path.suffix == ".csv"}

    def try_one(rng):
        changed = rng.choice(list(files))
        path = changed if changed in frames else rng.choice(list(frames))
        summed = rng.random() < 0.8 or path is not changed
        changed.write_bytes(damaged(files[changed], rng))
        sums = folder / "SHA256SUMS"
        try:
            if not summed:  # as when somebody has a file from elsewhere: read with care, but nobody can know
                sums.rename(folder / "elsewhere")
            found = _read(path)
            return "same" if not summed or found.equals(frames[path]) else "silent"
        finally:
            if not summed:
                (folder / "elsewhere").rename(sums)
            changed.write_bytes(files[changed])

    return try_one


def _read(path):
    paper, _, kind = path.stem.partition("_")
    return scorecard.read(paper, kind and f"_{kind}", path.parent)


PLAIN = """
run status merge scorecard lth cs str grasp fig12 fig4 table1 lth-fig4-x --scale smoke --trials --budget
--threads --device --retry failed --executor --json --paper local:2 dask:// json:loads os:getcwd
nowhere:x : 0 -1 1 1e9 99999999999999999999 0s 20m 1h1 nan inf cuda:99 cpu meta
dask://127.0.0.1:1x ~nobody/x /dev/null /dev/null/x ../.. $(id) %s%n {} [] --help -- -
"""
WORDS = [*PLAIN.split(), "\x00", "é" * 300, "a" * 5000, "", " ", "\udc80", "\n"]


def words(folder):
    """Random command lines: an exit status of a refusal has a message, and nothing else but a message."""
    cli._declared = lambda: ([], {})
    experiments.run = lambda runs, *args, **options: runs  # nothing is trained here
    scorecard.scorecard = lambda paper, *args: {"rows": [], "totals": scorecard.totals([])}

    def try_one(rng):
        line = [rng.choice(WORDS[:4]), *rng.choices(WORDS, k=rng.randrange(6))]
        if rng.random() < 0.9:
            line += ["--results-dir", rng.choice([str(folder), *WORDS[-20:]])]
        os.chdir(folder)
        told = CliRunner().invoke(cli.app, line)
        if told.exception and not isinstance(told.exception, SystemExit):
            raise told.exception
        if "Traceback" in told.output or (told.exit_code not in (0, cli.LEFT) and not told.stderr.strip()):
            return "silent"
        return "same" if told.exit_code in (0, cli.LEFT) else "refused"

    return try_one


NAMED = "lenet_300_100 conv2 resnet8 digits mnist layer global reset rewind code exp snip"
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 3, 10**9, 2**63, 2**65, -(2**65)),
    *(0.0, 0.5, 1.0, -0.5, 1e-30, 1e300, float("nan"), float("inf"), 1j, *NAMED.split()),
    *("", "x" * 1000, b"x", [], [0.5], [0.0], ["a"], [[0.5]], {}, {"a": 1}, (), (0.5, 0.1)),
]
NAMES = {
    "lth": "trials seed model dataset train_fraction iterations batch_size lr rate rate_output rounds scope init "
    "rewind_to one_shot_densities",
    "cs": "trials seed model dataset train_fraction densities iterations batch_size lr s0 lam beta_final beta_step "
    "restart_rule mask_scale",
    "str": "trials seed model dataset train_fraction iterations batch_size lr weight_decay s_init g granularity "
    "target_density",
    "grasp": "trials seed model dataset train_fraction densities iterations batch_size lr temperature per_class chunks "
    "class_sorted criterion",
}
OPTIONS = "scale recompute results_dir device threads budget_minutes"


def parameters(folder):
    """A notebook's parameters: taken, or refused in one line by its second cell."""

    def try_one(rng):
        paper = rng.choice(list(NAMES))
        given = {name: rng.choice(VALUES) for name in rng.sample(NAMES[paper].split(), rng.randrange(1, 3))}
        about = {"scale": "smoke", "results_dir": str(folder)}
        if rng.random() < 0.2:
            about[rng.choice(OPTIONS.split())] = rng.choice([v for v in VALUES if v not in ("missing", "all")])
        Chapter(paper, **about | given)
        return "same"

    return try_one


MAKERS = {
    "spool": lambda folder: parquet(folder, [DENSE], packed=False),
    "shard": lambda folder: parquet(folder, [replace(DENSE, seed=i) for i in range(3)], packed=True),
    "weights": weights,
    "ticket": ticket,
    "numbers": numbers,
    "words": words,
    "parameters": parameters,
}


# Trying them ----------------------------------------------------------------------------------------------------------


def outcome(try_one, seed):
    """What came of one input: "same" or "refused", or one of BAD with the reason."""
    signal.setitimer(signal.ITIMER_PROF, HANG)
    try:
        return try_one(random.Random(seed)), ""
    except (ValueError, OSError, Refused) as error:
        return ("many lines" if "\n" in str(error).strip() else "refused" if str(error).strip() else "silent"), ""
    except Hang:
        return "hang", ""
    except Exception as error:
        return "crash", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def batch(kind, seeds):
    """The outcomes of some inputs, in a process of its own: {outcome: n}, and examples of what must not be."""

    def on_alarm(*args):
        raise Hang

    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            signal.signal(signal.SIGPROF, on_alarm)
            with tempfile.TemporaryDirectory() as folder, open(writer, "w") as out:
                try_one = MAKERS[kind](Path(folder))
                for seed in seeds:
                    print(json.dumps([seed, *outcome(try_one, seed)]), file=out, flush=True)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as lines:
        told = [json.loads(line) for line in lines]
    os.waitpid(pid, 0)
    if len(told) < len(seeds):  # it died of the next one
        rest = seeds[len(told) :]
        return [*told, [rest[0], "death", ""], *(batch(kind, rest[1:]) if rest[1:] else [])]
    return told


def damage(inputs, seed=0, kinds=SHARES, say=lambda line: None):
    """{kind: {outcome: n}} of so many inputs, shared out by SHARES; `say` is told what must not be."""
    found = {}
    for kind in kinds:
        n, found[kind] = (
            max(1, round(inputs * SHARES[kind] / sum(SHARES[kind] for kind in kinds))),
            collections.Counter(),
        )
        seeds = [f"{seed} {kind} {i}" for i in range(n)]
        for i in range(0, n, BATCH):
            for at, what, why in batch(kind, seeds[i : i + BATCH]):
                found[kind][what] += 1
                if what in BAD:
                    say(f"{at}: {what} {why}")
        found[kind] = dict(found[kind])
        say(f"{kind}: {found[kind]}")
    return found


def warm_up():
    """What each process would import for itself."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        models.create("lenet_300_100", seed=0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(SHARES), choices=list(SHARES))
    given = parser.parse_args()
    began = time.perf_counter()
    warm_up()
    found = damage(given.inputs, given.seed, given.kinds, lambda line: print(line, flush=True))
    print(json.dumps(found, indent=1))
    counts = sum((collections.Counter(some) for some in found.values()), collections.Counter())
    n, bad = counts.total(), sum(counts[what] for what in BAD)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    cpu, wall = sum(os.times()[:4]), time.perf_counter() - began
    print(f"{n} inputs, {bad} that must not be; {cpu:.0f} s of CPU, {wall:.0f} s, at most {peak} MiB")
    sys.exit(bad > 0)
