"""A store of invented runs with the sizes of real ones: 150 readings, 10,000 test images, LeNet's masks."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from lottery import experiments
from lottery.experiments import store

WEIGHTS = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


def fill(folder, n, masks=True):
    """Write n runs into shards below `folder`: those that the lottery ticket paper's items declare, and others."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    template = [_row(rng, level) for level in range(min(n, store.SHARD))]
    template = template if masks else [row | {"mask": None} for row in template]
    declared = [r for scale in ("laptop", "paper") for r in experiments.lth.runs(None, scale)]
    declared = [r for r in declared if isinstance(r, experiments.Run)]
    declared = [experiments.Run(seed=1_000 + i) for i in range(n - len(declared))] + declared[:n]
    for start in range(0, n, store.SHARD):
        rows = [_named(template[i % len(template)], declared[i]) for i in range(start, min(start + store.SHARD, n))]
        table = pa.Table.from_pylist(rows, schema=store.schema()).to_pylist()  # float32 columns are rounded
        table = [{**row, "payload_sha": store._digest(row)} for row in table]
        path = folder / f"2026-01-01-{start:08d}.parquet"
        pq.write_table(pa.Table.from_pylist(table, schema=store.schema()), path, compression="zstd")


def _named(row, run):
    """The row under the name of a run."""
    return row | {"key": run.key, "seed": run.seed, "level": run.level, "draw": run.draw, "init": run.init,
                  "parent": run.parent and run.parent.key, "spec": json.dumps(run.spec(), sort_keys=True),
                  "iterations": run.recipe.iterations}  # fmt: skip


def _row(rng, i):
    density, steps = 0.8 ** (i % 20), list(range(100, 15_001, 100))
    row = {
        "model": "lenet_300_100", "dataset": "mnist", "fingerprint": "0" * 64, "init": "reset", "status": "finished",
        "started": "2026-01-01T00:00:00+00:00", "device": "CPU", "level": i % 20, "draw": 0, "iterations": 15_000,
        "n_valid": 5_000, "n_test": 10_000, "density": density, "wall_s": 20.0, "censored": False, "step": steps,
        "mask": store.pack_masks({k: torch.from_numpy(rng.random(s) < density) for k, s in WEIGHTS.items()}),
        "spec": json.dumps(experiments.Run(seed=i).spec(), sort_keys=True),
        "layers": json.dumps({k: [int(density * np.prod(s)), int(np.prod(s))] for k, s in WEIGHTS.items()}),
        "train_loss": json.dumps({str(t): rng.random() for t in (1, 2, 5, 10, 50, 100, 500)}),
        "certificate": json.dumps({"versions": store.versions(), "packages": {"torch": torch.__version__}}),
    }  # fmt: skip
    row |= {name: rng.random(len(steps)).tolist() for name in ("val_loss", "val_acc", "test_acc")}
    for r in ("early_stop", "last"):
        correct = rng.random(10_000) < 0.98
        row |= {f"{r}_step": 15_000, f"{r}_val_loss": rng.random(), f"{r}_val_acc": 0.98, f"{r}_train_acc": 1.0}
        row |= {f"{r}_test_acc": correct.sum() / 10_000, f"{r}_correct": np.packbits(correct).tobytes()}
    return row
