"""Runs of a few iterations on the digits, and rows as the engine makes them, for the tests of all experiments."""

import concurrent.futures as futures
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lottery import experiments, models
from lottery import masks as M
from lottery.experiments import Run, Store, store
from lottery.training import Recipe

ROOT = Path(store.__file__).parents[2]
REPORTED = ROOT / "results/reported"
QUICK = Recipe(iterations=40, eval_every=10, test_readings="all")
DENSE = Run(dataset="digits", recipe=QUICK)
STANDARD = replace(QUICK, inputs="standard")


class Inline(futures.Executor):
    """The least that a `concurrent.futures.Executor` can be; it notes what was run."""

    def __init__(self):
        self.ran = []

    def submit(self, fn, runs, *args):
        self.ran += runs
        future = futures.Future()
        future.set_result(fn(runs, *args))
        return future


def train(runs, into, executor=None, **options):
    """Train in this process; returns what was trained, in order."""
    executor = executor or Inline()
    left = experiments.run(runs, executor, store=Store(into), progress=False, **options)
    assert left == []
    return getattr(executor, "ran", None)


def child(parent, **changes):
    return replace(parent, parent=parent, **changes)


def message(text):
    return f"^{re.escape(text)}"


def fake(run=DENSE, n_test=21, **changes):
    """A row as the engine makes it, without any training."""
    rng = np.random.default_rng(int(run.key[:8], 16))
    row = {
        "key": run.key, "parent": run.parent and run.parent.key, "model": run.model, "dataset": run.dataset,
        "fingerprint": "f" * 64, "init": run.init, "status": "finished", "started": "2026-01-02T03:04:05+00:00",
        "device": "CPU", "seed": run.seed, "level": run.level, "draw": run.draw,
        "iterations": run.recipe.iterations, "n_valid": 9, "n_test": n_test, "density": 0.5, "wall_s": 1.5,
        "censored": False, "step": [10, 20, 40], "val_loss": [0.3, 0.1, 0.2], "val_acc": [0.5, 0.9, 0.8],
        "test_acc": [0.1, None, 0.7], "mask": b"\1\2", "spec": json.dumps(run.spec(), sort_keys=True),
        "layers": "{}", "train_loss": "{}", "certificate": json.dumps({"versions": store.versions()}),
    }  # fmt: skip
    for r in ("early_stop", "last"):
        correct = rng.random(n_test) < 0.8
        row |= {f"{r}_step": 20, f"{r}_val_loss": 0.1, f"{r}_val_acc": 0.9, f"{r}_train_acc": 1.0}
        row |= {f"{r}_test_acc": correct.sum() / n_test, f"{r}_correct": np.packbits(correct).tobytes()}
    return row | changes


def seeds(n):
    return [replace(DENSE, seed=i) for i in range(n)]


def tree(folder):
    """Every file below a folder with its content and time; the lock has neither."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def shards(folder):
    return sorted(folder.glob("*.parquet"))


def spool(folder):
    return sorted((folder / ".spool").glob("*.parquet"))


def edit(path, **columns):
    """Rewrite a file of one run with other values, as somebody with pandas might."""
    [row] = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([row | columns], schema=store.schema()), path)


def theta_0(seed=0):
    return M.state(models.create("lenet_300_100", seed=seed, in_shape=(1, 8, 8)))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest(scores, k):
    """The k largest of a flat tensor, by sorting, as a boolean tensor."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.argsort(scores, descending=True)[:k]] = True
    return mask
