"""lottery.experiments: what names a run, what the store survives, what the engine trains, what is declared for LTH."""

import concurrent.futures as futures
import dataclasses
import hashlib
import json
import multiprocessing
import random
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lottery import baselines, data, experiments, models, scorecard, tickets, training
from lottery import grasp as grasp_algorithm
from lottery import lth as algorithm
from lottery import masks as M
from lottery.experiments import Run, Store, engine, load, lth, store
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


# Runs: keys -----------------------------------------------------------------------------------------------------------


def test_golden_keys():
    """Published keys never change: results that are stored under them would be lost."""
    assert Run().key == "80bf7434e629f8318232e9b1"
    assert child(child(Run()), init="reinit").key == "8cc02c332516a9ac25644590"
    assert lth.setting("laptop").dense(0)[0].key == "9585cfd6dd9bcbc87c9e0fc7"


def test_key_is_the_hash_of_what_the_docstring_says():
    text = '[1, {"recipe": {"iterations": 300, "milestones": [5, 9]}, "seed": 2}, null]'
    run = Run(seed=2, recipe=Recipe(iterations=300, milestones=(5, 9)))
    assert run.key == hashlib.sha256(text.encode()).hexdigest()[:24]
    text = f'[1, {{"rate": 0.5, "recipe": {{"iterations": 300, "milestones": [5, 9]}}, "seed": 2}}, "{run.key}"]'
    assert child(run, rate=0.5).key == hashlib.sha256(text.encode()).hexdigest()[:24]


@pytest.mark.parametrize(
    ("as_float", "as_int"),
    [
        (Run(recipe=Recipe(lr=1.0)), Run(recipe=Recipe(lr=1))),
        (Run(recipe=Recipe(weight_decay=2.0)), Run(recipe=Recipe(weight_decay=2))),
        (Run(rate=0.0), Run(rate=0)),
        (Run(rate_conv=0.0), Run(rate_conv=0)),
        (Run(rate_output=0.0), Run(rate_output=0)),
        (Run(train_fraction=1.0), Run(train_fraction=1)),
        (Run(rate=0.5), Run(rate=np.float64(0.5))),
    ],
)
def test_whole_numbers_in_float_fields_name_the_same_run(as_float, as_int):
    assert as_float.key == as_int.key
    assert as_float.spec() == as_int.spec()
    assert json.dumps(as_float.spec()) == json.dumps(as_int.spec())
    assert as_float == as_int
    assert hash(as_float) == hash(as_int)


CHANGES = {
    "model": "conv2",
    "dataset": "fashion_mnist",
    "seed": 1,
    "parent": Run(),
    "rate": 0.3,
    "rate_conv": 0.2,
    "rate_output": None,
    "scope": "global",
    "init": "reinit",
    "rewind_to": 5,
    "rewind_schedule": "restart",
    "draw": 1,
    "valid": 100,
    "split_seed": 1,
    "train_fraction": 0.5,
    "options": (("init", "pytorch"),),
    "criterion": "random",
    "density": 0.3,
    "score": (("per_class", 5),),
    "noise": 0.5,
}
RECIPE_CHANGES = {
    "optimizer": "sgd",
    "lr": 0.1,
    "batch_size": 64,
    "iterations": 7,
    "eval_every": 50,
    "test_readings": "all",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "milestones": (10,),
    "gamma": 0.2,
    "warmup": 3,
    "inputs": "standard",
    "nesterov": True,
    "augment": "flip-crop",
    "precision": "bfloat16",
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "lr_every": 10,
}


def test_every_field_enters_the_key():
    assert {f.name for f in dataclasses.fields(Run)} == CHANGES.keys() | {"recipe"}
    assert {f.name for f in dataclasses.fields(Recipe)} == RECIPE_CHANGES.keys()
    trunk = Run()
    alone = CHANGES.keys() - {"init", "parent", "criterion", "score", "noise"}
    runs = [trunk, *(Run(**{name: CHANGES[name]}) for name in alone)]
    pruned = Run(criterion="grasp", density=0.5, recipe=Recipe(inputs="standard"))
    runs += [pruned, *(replace(pruned, **{name: CHANGES[name]}) for name in ("criterion", "density", "score"))]
    sgd = Recipe(optimizer="sgd", momentum=0.5)  # Nesterov's needs it
    runs += [Run(recipe=dataclasses.replace(sgd, **{name: value})) for name, value in RECIPE_CHANGES.items()]
    runs += [child(trunk, init="noise", noise=c) for c in (0.5, 1)]
    runs += [
        Run(parent=trunk),
        Run(parent=trunk, init="reinit"),
        Run(parent=trunk, init="survivors"),
        Run(parent=Run(rate=0.3)),
        Run(parent=child(trunk)),
    ]
    assert len({r.key for r in runs}) == len(runs)
    assert len(set(runs)) == len(runs)


def test_a_field_added_later_changes_no_key():
    @dataclass(frozen=True)
    class LaterRecipe(Recipe):
        mixup: str = "none"

    @dataclass(frozen=True)
    class LaterRun(Run):
        tint: float = 0.0

    for seed in range(3):
        assert LaterRun(seed=seed, recipe=LaterRecipe()).key == Run(seed=seed).key
    assert LaterRun(tint=0.5).key != Run().key
    assert LaterRun(recipe=LaterRecipe(mixup="yes")).key != Run().key


def test_no_names_of_papers_figures_or_scales_in_a_spec():
    """One run serves many figures: the ones of figure 4 are those of figure 12 and more."""
    assert set(lth.runs("fig12", "laptop")) <= set(lth.runs("fig4", "laptop"))
    spec = json.dumps(lth.setting("laptop").reinit(0, 3)[0].spec())
    assert not re.search("lth|fig|laptop|paper|claim", spec)


def test_level_root_and_spec():
    dense = Run(seed=3)
    third = child(child(child(dense)), init="random", draw=2)
    assert [dense.level, third.level] == [0, 3]
    assert third.root is dense
    assert third.parent.root is dense
    spec = third.spec()
    assert spec["parent"] == third.parent.key
    assert spec["recipe"]["lr"] == 1.2e-3
    assert json.loads(json.dumps(spec)) == spec
    assert "level 3 random 2" in str(third)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"init": "rest"},
            "Invalid init 'rest': give one of reset, rewind, reinit, random, continue, survivors, noise.",
        ),
        ({"init": "reinit"}, "Invalid init 'reinit' without a parent: a dense network starts from its own θ₀."),
        ({"rewind_schedule": "again"}, "Invalid rewind_schedule 'again': give 'continue' or 'restart'."),
        ({"rewind_to": 50_000}, "Invalid rewind_to 50000: give 0 <= iteration < 50000."),
        ({"rewind_to": -1}, "Invalid rewind_to -1: give a whole number from 0."),
        ({"seed": 1.0}, "Invalid seed 1.0: give a whole number from 0."),
        ({"seed": True}, "Invalid seed True: give a whole number from 0."),
        ({"draw": "1"}, "Invalid draw '1': give a whole number from 0."),
        ({"split_seed": None}, "Invalid split_seed None: give a whole number from 0."),
        ({"rate": 1.0}, "Invalid rate 1.0: give the fraction of survivors to remove, 0 <= rate < 1."),
        ({"rate_conv": -0.1}, "Invalid rate_conv -0.1: give the fraction of survivors to remove, 0 <= rate_conv < 1."),
        ({"rate_output": 2}, "Invalid rate_output 2: give the fraction of survivors to remove, 0 <= rate_output < 1."),
        ({"noise": 0.5}, "Invalid noise 0.5 with init 'reset': give one above 0 with init 'noise', else 0."),
        (
            {"parent": Run(), "init": "noise"},
            "Invalid noise 0.0 with init 'noise': give one above 0 with init 'noise', else 0.",
        ),
        ({"parent": Run(seed=1)}, "Invalid parent: its seed is 1, not 0."),
        ({"parent": Run(model="conv2")}, "Invalid parent: its model is 'conv2', not 'lenet_300_100'."),
        ({"parent": Run(dataset="digits")}, "Invalid parent: its dataset is 'digits', not 'mnist'."),
        ({"parent": Run(valid=10)}, "Invalid parent: its valid is 10, not None."),
        ({"parent": Run(split_seed=1)}, "Invalid parent: its split_seed is 1, not 0."),
        ({"density": 0}, "Invalid density 0: give a fraction of weights to keep, 0 < density <= 1."),
        ({"density": "0.1"}, "Invalid density '0.1': give a fraction of weights to keep, 0 < density <= 1."),
        (
            {"criterion": "largest", "density": 0.1},
            "Invalid criterion 'largest': give one of magnitude, random, snip, grasp.",
        ),
        ({"criterion": "snip"}, "Invalid criterion 'snip' without density: give the fraction to keep."),
        (
            {"criterion": "grasp", "density": 0.1},
            "Invalid inputs 'unit' with grasp: give 'standard'.",
        ),
        ({"score": (("per_class", 5),)}, "Unknown score 'per_class' of magnitude: it takes none."),
        (
            {"criterion": "snip", "density": 0.1, "score": (("temperature", 1.0),)},
            "Unknown score 'temperature' of snip: it takes chunks, class_sorted, per_class, reinit_linear.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("temperature", 1),)},
            "Invalid temperature 1: give a number above 0, such as 200.0.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("per_class", 0),)},
            "Invalid per_class 0: give a number above 0, such as 10.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("class_sorted", 1),)},
            "Invalid class_sorted 1: give True or False.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "recipe": STANDARD, "score": (("chunks", 3),)},
            "Invalid chunks 3: each pair of chunks needs as many of the 10 images of a class.",
        ),
        (
            {
                "criterion": "snip",
                "density": 0.1,
                "recipe": STANDARD,
                "score": (("chunks", 4), ("class_sorted", False)),
            },
            "Invalid chunks 4: each chunk needs as many of the 10 images of a class.",
        ),
        ({"options": {"width": 4}}, "Invalid options {'width': 4}: give a tuple of (name, value), sorted by name."),
        (
            {"options": (("width", 4), ("init", "pytorch"))},
            "Invalid options (('width', 4), ('init', 'pytorch')): give a tuple of (name, value), sorted by name.",
        ),
    ],
)
def test_bad_runs_are_told_in_one_line(options, text):
    with pytest.raises(ValueError, match=f"{message(text)}$"):
        Run(**options)


# Store ----------------------------------------------------------------------------------------------------------------


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


def test_round_trip(tmp_path):
    row = fake()
    assert Store(tmp_path).put(row)
    kept = Store(tmp_path).get(DENSE)
    assert kept.keys() == set(store.schema().names)
    for name, value in row.items():
        assert kept[name] == (pytest.approx(value) if name in ("val_loss", "val_acc") else value) or name == "test_acc"
    assert kept["test_acc"] == [pytest.approx(0.1), None, pytest.approx(0.7)]
    assert Store(tmp_path).get(replace(DENSE, seed=9)) is None


def test_one_name_for_a_reading_that_was_not_taken(tmp_path):
    """Without a validation set there is no early stop; not-a-number is a value like any other."""
    none = {f"early_stop_{f}": None for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc", "correct")}
    Store(tmp_path).put(fake(**none, last_val_loss=float("nan"), val_loss=[float("nan"), float("inf"), 1.0]))
    row = Store(tmp_path).get(DENSE)
    assert row["early_stop_correct"] is None
    assert np.isnan(row["last_val_loss"])
    assert np.isinf(row["val_loss"][1])


def test_pandas_reads_the_folder(tmp_path):
    runs = seeds(4)
    mine = Store(tmp_path)
    for r in runs[:3]:
        mine.put(fake(r))
    mine.merge()
    mine.put(fake(runs[3]))
    mine.save_artifact("some", {"w": torch.zeros(2)})
    frame = pd.read_parquet(tmp_path)
    assert sorted(frame["key"]) == sorted(r.key for r in runs[:3])
    assert frame["last_step"].tolist() == [20, 20, 20]


def test_load_gives_one_row_a_stored_run_in_order(tmp_path):
    runs = seeds(5)
    mine = Store(tmp_path)
    for r in (runs[3], runs[0], runs[4]):
        mine.put(fake(r))
    frame = load(runs, mine)
    assert frame["key"].tolist() == [runs[0].key, runs[3].key, runs[4].key]
    assert set(load(None, mine)["key"]) == set(frame["key"])
    assert frame["stale"].tolist() == [False] * 3
    promised = "key model dataset fingerprint seed level init draw iterations density status started device"
    assert {*promised.split(), "n_valid", "n_test", "censored", "spec", "certificate"} <= set(frame.columns)
    for r in ("early_stop", "last"):
        assert {f"{r}_{f}" for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc", "correct")} <= set(frame)
    bits = np.unpackbits(np.frombuffer(frame["last_correct"][0], np.uint8))[:21]
    assert bits.mean() == frame["last_test_acc"][0]


def test_load_of_nothing(tmp_path):
    assert len(load(seeds(2), Store(tmp_path / "none"))) == 0
    assert not (tmp_path / "none").exists()


def test_a_result_of_an_older_version_is_stale(tmp_path):
    old = {**store.versions(), "training": training.VERSION - 1}
    Store(tmp_path).put(fake(certificate=json.dumps({"versions": old})))
    assert load([DENSE], Store(tmp_path))["stale"].tolist() == [True]


def test_a_second_finisher_discards_its_copy(tmp_path):
    assert Store(tmp_path).put(fake(wall_s=1.0))
    assert not Store(tmp_path).put(fake(wall_s=2.0))
    assert Store(tmp_path).get(DENSE)["wall_s"] == 1.0
    Store(tmp_path).merge()
    Store(tmp_path).put(fake(wall_s=3.0))
    assert Store(tmp_path).get(DENSE)["wall_s"] == 1.0
    assert Store(tmp_path).merge() == 0
    assert pd.read_parquet(tmp_path)["wall_s"].tolist() == [1.0]
    assert not spool(tmp_path)


def test_merge_packs_shards_of_limited_size(tmp_path, monkeypatch):
    assert store.SHARD == 300
    monkeypatch.setattr(store, "SHARD", 3)
    for r in seeds(7):
        Store(tmp_path).put(fake(r, started=f"2026-01-0{r.seed + 1}T00:00:00+00:00"))
    before = load(seeds(7), Store(tmp_path))
    assert Store(tmp_path).merge() == 7
    assert not spool(tmp_path)
    assert sorted(pq.read_metadata(p).num_rows for p in shards(tmp_path)) == [1, 3, 3]
    for p in shards(tmp_path):
        assert re.fullmatch(r"2026-01-0\d-[0-9a-f]{8}\.parquet", p.name)
        assert p.name[:10] == max(pd.read_parquet(p)["started"])[:10]
    pd.testing.assert_frame_equal(load(seeds(7), Store(tmp_path)), before)
    first = tree(tmp_path)
    assert Store(tmp_path).merge() == 0
    assert tree(tmp_path) == first

    Store(tmp_path).put(fake(replace(DENSE, seed=8)))
    assert Store(tmp_path).merge() == 1
    assert first.items() <= tree(tmp_path).items(), "shards are append-only"


def test_a_store_that_is_open_sees_what_others_do(tmp_path):
    mine, other = Store(tmp_path), Store(tmp_path)
    assert mine.get(DENSE) is None
    other.put(fake())
    assert mine.get(DENSE)
    other.merge()
    assert mine.get(DENSE)
    assert len(load(None, mine)) == 1


def test_merge_of_another_store(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    runs = seeds(5)
    for r in runs[:2]:
        Store(there).put(fake(r))
    Store(there).merge()
    for r in runs[2:4]:
        Store(there).put(fake(r))
    Store(here).put(fake(runs[0], wall_s=77.0))
    Store(here).put(fake(runs[4]))
    Store(here).merge()
    before = tree(there)
    assert Store(here).merge(there) == 3
    assert tree(there) == before
    assert len(load(runs, Store(here))) == len(pd.read_parquet(here)) == 5
    assert Store(here).get(runs[0])["wall_s"] == 77.0
    assert Store(here).merge(there) == 0


def test_a_read_only_store_beside_is_read_and_never_written(tmp_path):
    committed, mine = tmp_path / "committed", tmp_path / "mine"
    runs = seeds(3)
    for r in runs[:2]:
        Store(committed).put(fake(r))
    Store(committed).merge()
    Store(committed).put(fake(runs[2]))
    Store(committed).save_artifact(runs[0].key, {"w": torch.zeros(2)})
    before = tree(committed)
    both = Store(mine, also=[committed])
    assert len(load(runs, both)) == 3
    assert both.artifact(runs[0].key).parent.parent == committed
    both.put(fake(replace(DENSE, seed=4)))
    both.save_artifact("other", {"w": torch.zeros(2)})
    both.merge()
    assert tree(committed) == before
    assert len(pd.read_parquet(mine)) == 1
    assert len(load(None, Store(mine, also=[committed]))) == 4


def test_a_truncated_spool_file_is_named_kept_and_trained_again(tmp_path, capsys):
    runs = seeds(2)
    for r in runs:
        Store(tmp_path).put(fake(r))
    path = tmp_path / ".spool" / f"{runs[0].key}.parquet"
    broken = path.read_bytes()[:-100]
    path.write_bytes(broken)
    assert load(runs, Store(tmp_path))["key"].tolist() == [runs[1].key]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err
    assert engine.missing(runs, Store(tmp_path)) == [runs[0]]

    Store(tmp_path).merge()
    assert path.read_bytes() == broken, "merge must not touch what it cannot read"
    assert Store(tmp_path).put(fake(runs[0]))
    assert path.with_suffix(".damaged").read_bytes() == broken
    capsys.readouterr()
    assert len(load(runs, Store(tmp_path))) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 50])
def test_any_file_that_is_no_parquet_is_passed_over(tmp_path, capsys, content):
    Store(tmp_path).put(fake())
    Store(tmp_path).merge()
    (tmp_path / "2026-01-01-00000000.parquet").write_bytes(content)
    assert len(load(None, Store(tmp_path))) == 1
    assert "2026-01-01-00000000.parquet" in capsys.readouterr().err


def store_with_one_changed(folder, runs, column):
    """A shard of the runs, in which half a point was added to one column of the second."""
    for r in runs:
        Store(folder).put(fake(r))
    Store(folder).merge()
    [shard] = shards(folder)
    frame = pd.read_parquet(shard)
    frame.loc[frame["key"] == runs[1].key, column] += 0.005
    frame.to_parquet(shard, index=False)


@pytest.mark.parametrize("reading", ["early_stop", "last"])
def test_one_accuracy_half_a_point_higher_is_found_out(tmp_path, capsys, reading):
    runs = seeds(3)
    store_with_one_changed(tmp_path, runs, f"{reading}_test_acc")
    opened = Store(tmp_path)
    assert load(runs, opened)["key"].tolist() == [runs[0].key, runs[2].key]
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert runs[1].key in err
    assert f"{reading}_test_acc" in err
    assert engine.missing(runs, opened) == [runs[1]]
    Store(tmp_path).put(fake(runs[1]))
    assert len(load(runs, Store(tmp_path))) == 3


def test_only_runs_that_are_asked_for_are_checked(tmp_path, capsys):
    runs = seeds(3)
    store_with_one_changed(tmp_path, runs, "last_test_acc")
    mine = Store(tmp_path)
    assert mine.columns("status", "iterations") == {r.key: ("finished", QUICK.iterations) for r in runs}
    assert mine.paces() == {("lenet_300_100", "digits"): 1.5 / QUICK.iterations}
    shown = store.Rows(mine)
    assert shown[runs[0].key]["last_test_acc"] == mine.get(runs[0])["last_test_acc"]
    assert capsys.readouterr().err == ""
    assert runs[1].key not in shown
    assert runs[1].key in capsys.readouterr().err
    assert set(mine.rows()) == {runs[0].key, runs[2].key}
    assert capsys.readouterr().err == "", "what is damaged is named once"


@pytest.mark.parametrize(
    "change",
    [
        {"val_loss": [0.3, 0.1, 0.25]},
        {"test_acc": [0.1, None, 0.75]},
        {"step": [10, 20, 41]},
        {"density": 0.51},
        {"status": "diverged"},
        {"early_stop_step": 30},
        {"mask": b"\1\3"},
        {"started": "2025-01-01T00:00:00+00:00"},
        {"certificate": "{}"},
        {"payload_sha": "0" * 64},
        {"key": "0" * 24},
    ],
)
def test_any_other_change_breaks_the_hash(tmp_path, capsys, change):
    Store(tmp_path).put(fake())
    edit(spool(tmp_path)[0], **change)
    assert len(load(None, Store(tmp_path))) == 0
    assert "its content does not match its hash" in capsys.readouterr().err


def test_correct_bits_changed_with_their_accuracy_break_the_hash(tmp_path, capsys):
    Store(tmp_path).put(fake())
    all_right = np.packbits(np.ones(21, bool)).tobytes()
    edit(spool(tmp_path)[0], last_correct=all_right, last_test_acc=1.0)
    assert len(load(None, Store(tmp_path))) == 0
    assert "does not match its hash" in capsys.readouterr().err


def test_options_of_the_model_reach_it_and_are_found_again(tmp_path):
    recipe = replace(DENSE.recipe, iterations=1)
    narrow = Run(model="resnet8", dataset="digits", recipe=recipe, options=(("shortcut", "plain"), ("width", 2)))
    wide = replace(narrow, options=(("shortcut", "plain"), ("width", 3)))
    train([narrow, wide], tmp_path)
    for run, width in (narrow, 2), (wide, 3):
        assert json.loads(Store(tmp_path).get(run)["layers"])["conv1"] == [9 * width] * 2


def test_a_column_added_later_leaves_old_results_sound(tmp_path, monkeypatch):
    Store(tmp_path).put(fake())
    Store(tmp_path).merge()
    later = store.schema().append(pa.field("noise", pa.float64()))
    monkeypatch.setattr(store, "schema", lambda: later)
    Store(tmp_path).put(fake(replace(DENSE, seed=1), noise=0.5))
    frame = load(seeds(2), Store(tmp_path))
    assert frame["noise"].isna().tolist() == [True, False]


def test_another_spec_under_the_same_key_is_an_error_that_names_the_field(tmp_path):
    spec = json.dumps({**DENSE.spec(), "rate": 0.3}, sort_keys=True)
    Store(tmp_path).put(fake(spec=spec))
    with pytest.raises(ValueError, match=message(f"Run {DENSE.key} is stored with rate = 0.3, not 0.2: ")):
        Store(tmp_path).get(DENSE)
    with pytest.raises(ValueError, match="rate"):
        load([DENSE], Store(tmp_path))


@pytest.mark.parametrize("name", ["inputs", "gamma"])
def test_a_field_added_to_recipe_later_finds_stored_runs(tmp_path, name):
    """What a run was stored without is the default of the field that came later."""
    spec = DENSE.spec()
    del spec["recipe"][name]
    Store(tmp_path).put(fake(spec=json.dumps(spec, sort_keys=True)))
    assert Store(tmp_path).get(DENSE)
    assert len(load([DENSE], Store(tmp_path))) == 1


def test_another_recipe_under_the_same_key_is_an_error_that_names_its_field(tmp_path):
    spec = DENSE.spec()
    spec["recipe"]["lr"] = 9.0
    Store(tmp_path).put(fake(spec=json.dumps(spec, sort_keys=True)))
    with pytest.raises(ValueError, match=message(f"Run {DENSE.key} is stored with lr = 9.0, not 0.0012: ")):
        Store(tmp_path).get(DENSE)


def test_flipped_bytes_never_crash_and_never_change_a_value(tmp_path, capfd):
    """50 files of one run, each with one random byte turned around: sound, or named and passed over."""
    Store(tmp_path).put(fake(test_acc=[0.1, None, 0.7], mask=bytes(range(256)) * 3))
    sound = Store(tmp_path).get(DENSE)
    [path] = spool(tmp_path)
    content, rng = path.read_bytes(), random.Random(0)
    unnoticed = 0
    for _ in range(50):
        broken = bytearray(content)
        broken[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.write_bytes(broken)
        capfd.readouterr()
        frame = load([DENSE], Store(tmp_path))
        err = capfd.readouterr().err
        if len(frame):
            assert Store(tmp_path).get(DENSE) == sound
            unnoticed += 1
        else:
            assert err.count("\n") == 1
            assert DENSE.key in err
    assert unnoticed < 50


def test_a_field_added_to_run_later_finds_stored_runs(tmp_path):
    @dataclass(frozen=True)
    class LaterRun(Run):
        tint: float = 0.0

    Store(tmp_path).put(fake())
    assert Store(tmp_path).get(LaterRun(dataset="digits", recipe=QUICK))


def test_default_store_is_that_of_the_clone(tmp_path, monkeypatch):
    (tmp_path / "clone/results").mkdir(parents=True)
    (tmp_path / "clone/lottery/experiments").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone/lottery/experiments")
    assert Store().dir == (tmp_path / "clone/results/ours").resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^No results folder around .*--results-dir\.$"):
        Store()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_masks_survive_packing(shapes, seed):
    rng = np.random.default_rng(seed)
    masks = {f"fc{i}": torch.from_numpy(rng.random(shape) < 0.3) for i, shape in enumerate(shapes)}
    back = store.unpack_masks(store.pack_masks(masks), {name: m.shape for name, m in masks.items()})
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[name], masks[name]) for name in masks)


def test_masks_of_large_networks_are_not_stored():
    limit = store.MASK_LIMIT
    assert limit == 500_000
    assert store.pack_masks({"a": torch.ones(limit, dtype=torch.bool)})
    assert store.pack_masks({"a": torch.ones(limit, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)}) is None


# Store: kills and races, in forked processes --------------------------------------------------------------------------

KILLS = """
    import contextlib, io, itertools, json, os, random, signal, sys, time
    from pathlib import Path
    import pyarrow.parquet as pq
    from lottery.experiments import store
    from lottery.experiments.store import Store

    base, template = Path(sys.argv[1]), store.read(Path(sys.argv[2]))[0]
    rng, result = random.Random(0), {}

    def row(i):
        return {**template, "key": f"{i:024x}"}

    def fork(work):
        pid = os.fork()
        if not pid:
            try:
                work()
            finally:
                os._exit(0)
        return pid

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(n, function):
        calls = itertools.count()
        def patched(*args, **kwargs):
            if next(calls) == n:
                die()
            return function(*args, **kwargs)
        return patched

    def half(table, where, **kwargs):
        with io.BytesIO() as buffer:
            true_write(table, buffer, **kwargs)
            Path(where).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        die()

    true_write = pq.write_table

    def state(folder):
        # keys that a fresh reader sees, how often pandas sees each, what it complains about
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            keys = sorted(Store(folder).rows())
        packed = sorted(key for p in folder.glob("*.parquet") for key in pq.read_table(p)["key"].to_pylist())
        return {"keys": keys, "packed": packed, "err": err.getvalue()}

    # 1. killed at random moments while it puts one run after the other
    folder, acknowledged, reports = base / "random", [], []
    for trial in range(12):
        r, w = os.pipe()
        def victim():
            opened = Store(folder)
            for i in itertools.count(1000 * trial):
                opened.put(row(i))
                os.write(w, i.to_bytes(4, "big"))
        pid = fork(victim)
        os.close(w)
        for _ in range(rng.randrange(1, 5)):
            acknowledged.append(int.from_bytes(os.read(r, 4), "big"))
        moment = time.perf_counter() + rng.random() * 0.01
        while time.perf_counter() < moment:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(r, 4):
            acknowledged.append(int.from_bytes(more, "big"))
        os.close(r)
    result["random"] = {**state(folder), "acknowledged": [row(i)["key"] for i in acknowledged]}

    # 2. killed at each step of a put
    for name, patch in {
        "half written": lambda: setattr(pq, "write_table", half),
        "before fsync": lambda: setattr(os, "fsync", die),
        "before link": lambda: setattr(os, "link", die),
        "after link": lambda: setattr(Path, "unlink", die),
    }.items():
        folder = base / name
        Store(folder).put(row(0))
        os.waitpid(fork(lambda: (patch(), Store(folder).put(row(1)))), 0)
        found = state(folder)
        again = Store(folder).put(row(1))
        result[name] = {"found": found, "again": again, "after": state(folder)}

    # 3. killed at each step of a merge
    store.SHARD = 2
    for name, patch in {
        "merge half written": lambda: setattr(pq, "write_table", half),
        "merge before its first shard": lambda: setattr(os, "replace", die),
        "merge between its shards": lambda: setattr(os, "replace", after(1, os.replace)),
        "merge before removing": lambda: setattr(Path, "unlink", after(3, Path.unlink)),
        "merge while removing": lambda: setattr(Path, "unlink", after(5, Path.unlink)),
    }.items():
        folder = base / name
        for i in range(5):
            Store(folder).put(row(i))
        os.waitpid(fork(lambda: (patch(), Store(folder).merge())), 0)
        found = state(folder)
        n = Store(folder).merge()
        left = len(list((folder / ".spool").glob("*.parquet")))
        result[name] = {"found": found, "again": n, "after": state(folder), "left": left}

    # 4. races, started together by closing a pipe
    def together(*works):
        r, w = os.pipe()
        def wait(work):
            os.close(w)
            os.read(r, 1)
            work()
        pids = [fork(lambda work=work: wait(work)) for work in works]
        os.close(r), os.close(w)
        for pid in pids:
            os.waitpid(pid, 0)

    folder, wins = base / "same run", base / "wins"
    wins.mkdir()
    def put(who):
        for i in range(10):
            if Store(folder).put({**row(i), "wall_s": float(who)}):
                (wins / f"{i}-{who}").touch()
    together(*(lambda who=who: put(who) for who in range(3)))
    result["same run"] = {**state(folder), "wins": sorted(p.name for p in wins.iterdir()),
                          "kept": [Store(folder).rows()[row(i)["key"]]["wall_s"] for i in range(10)]}

    folder = base / "two merges"
    for i in range(9):
        Store(folder).put(row(i))
    together(*[lambda: Store(folder).merge()] * 3)
    result["two merges"] = {**state(folder), "left": len(list((folder / ".spool").glob("*.parquet")))}

    folder = base / "put and merge"
    def puts():
        for i in range(12):
            Store(folder).put(row(i))
    def merges():
        for _ in range(6):
            Store(folder).merge()
    def reads():
        seen = 0
        opened = Store(folder)
        for _ in range(12):
            now = len(Store(folder).rows())
            assert now >= seen, "a finished run was out of sight"
            assert len(opened.rows()) >= now, "an open store lost a run"
            seen = now
        (base / "reader done").touch()
    together(puts, merges, reads)
    Store(folder).merge()
    result["put and merge"] = {**state(folder), "reader": (base / "reader done").exists()}
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    Store(folder / "template").put(fake())
    [template] = spool(folder / "template")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLS), str(folder), str(template)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def keys(*numbers):
    return [f"{i:024x}" for i in numbers]


def test_sigkill_at_random_moments_loses_no_finished_run(kills):
    found = kills["random"]
    assert found["err"] == ""
    assert len(found["acknowledged"]) >= 12
    assert set(found["acknowledged"]) <= set(found["keys"])


@pytest.mark.parametrize("step", ["half written", "before fsync", "before link", "after link"])
def test_sigkill_at_each_step_of_a_put(kills, step):
    case = kills[step]
    assert case["found"]["err"] == ""
    assert case["found"]["keys"] == keys(0, 1) if step == "after link" else keys(0)
    assert case["again"] is (step != "after link")
    assert case["after"]["keys"] == keys(0, 1)


@pytest.mark.parametrize(
    "step", ["half written", "before its first shard", "between its shards", "before removing", "while removing"]
)
def test_sigkill_at_each_step_of_a_merge(kills, step):
    case = kills[f"merge {step}"]
    assert case["found"]["err"] == ""
    assert case["found"]["keys"] == keys(*range(5)), "a run was lost"
    assert len(set(case["found"]["packed"])) == len(case["found"]["packed"]), "a key is in two shards"
    assert case["after"]["packed"] == case["after"]["keys"] == keys(*range(5))
    assert case["left"] == 0
    packed = {"between its shards": 2, "before removing": 5, "while removing": 5}.get(step, 0)
    assert len(case["found"]["packed"]) == packed
    assert case["again"] == 5 - packed


def test_of_processes_that_put_the_same_run_one_is_kept(kills):
    race = kills["same run"]
    assert race["keys"] == keys(*range(10))
    assert race["err"] == ""
    assert [int(win.split("-")[0]) for win in race["wins"]] == list(range(10)), "exactly one winner each"
    assert [float(win.split("-")[1]) for win in race["wins"]] == race["kept"]


def test_merges_at_once_pack_every_run_once(kills):
    race = kills["two merges"]
    assert race["packed"] == race["keys"] == keys(*range(9))
    assert (race["err"], race["left"]) == ("", 0)


def test_merging_while_others_put_and_read(kills):
    race = kills["put and merge"]
    assert race["packed"] == race["keys"] == keys(*range(12))
    assert race["err"] == ""
    assert race["reader"]


# Engine: one small family of runs, trained once -----------------------------------------------------------------------


def family():
    """Every way to start a run, below one dense network on the digits."""
    rewind = {"init": "rewind", "rewind_to": 15}
    runs = {"dense": DENSE, "one": child(DENSE)}
    runs |= {"two": child(runs["one"])}
    runs |= {"three": child(runs["two"])}
    runs |= {"four": child(runs["three"])}
    runs |= {"reinit": child(runs["one"], init="reinit"), "reinit again": child(runs["one"], init="reinit", draw=1)}
    runs |= {"random": child(runs["one"], init="random"), "random again": child(runs["one"], init="random", draw=1)}
    runs |= {"continue": child(DENSE, init="continue"), "rewind": child(DENSE, **rewind)}
    runs |= {"restart": child(DENSE, **rewind, rewind_schedule="restart")}
    runs |= {"strategy 2": child(runs["continue"], init="reset"), "survivors": child(runs["one"], init="survivors")}
    runs |= {f"noise {c}": child(runs["one"], init="noise", noise=c) for c in (0.5, 3)}
    runs |= {"global": child(DENSE, scope="global", rate=0.6), "side": child(DENSE, rate=0.6, rate_output=0.3)}
    return runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    runs = family()
    order = train(list(runs.values())[::-1], folder)
    assert sorted(r.key for r in order) == sorted(r.key for r in runs.values())
    for r in order:
        assert r.parent is None or order.index(r.parent) < order.index(r), "a child was trained before its parent"
    return folder


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def start(trained, digits, name):
    """A run's network before its training, and the row of its training."""
    runs, opened = family(), Store(trained)
    model, hashes = engine.initialise(runs[name], digits, opened)
    row = opened.get(runs[name])
    assert hashes.keys() == {"theta0", "parent_weights"}
    assert hashes.items() <= json.loads(row["certificate"]).items()
    return model, row


def end(trained, name):
    """Weights and masks at the end of a run's training, from its artifact."""
    from safetensors.torch import load_file

    tensors = load_file(Store(trained).artifact(family()[name].key))
    masks = {k.removeprefix("mask/"): t.bool() for k, t in tensors.items() if k.startswith("mask/")}
    return {k: t for k, t in tensors.items() if not k.startswith("mask/")}, masks


def stored_masks(trained, name):
    row = Store(trained).get(family()[name])
    shapes = {"fc1": (300, 64), "fc2": (100, 300), "fc3": (10, 100)}
    return store.unpack_masks(row["mask"], shapes)


def kept(masks):
    return [int(m.sum()) for m in masks.values()]


def theta_0(seed=0):
    return M.state(models.create("lenet_300_100", seed=seed, in_shape=(1, 8, 8)))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest(scores, k):
    """The k largest of a flat tensor, by sorting, as a boolean tensor."""
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.argsort(scores, descending=True)[:k]] = True
    return mask


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        *(("dense", "one"), ("one", "two"), ("two", "three"), ("one", "reinit"), ("continue", "strategy 2")),
        *(("one", "survivors"), ("one", "noise 3")),
    ],
)
def test_a_childs_mask_is_the_largest_of_the_parents_final_weights(trained, parent, name):
    weights, before = end(trained, parent)
    for layer, mask in stored_masks(trained, name).items():
        size = (weights[f"{layer}.weight"].abs() * before[layer]).flatten()
        assert torch.equal(mask.flatten(), largest(size, int(mask.sum())))
        assert not (mask & ~before[layer]).any(), "a pruned weight came back"


def test_exact_counts_of_every_layer(trained):
    """20 % of the survivors of fc1 and fc2, 10 % of fc3: 19,200, 30,000 and 1,000 weights on the digits."""
    counts = {name: kept(stored_masks(trained, name)) for name in family()}
    assert counts["dense"] == [19_200, 30_000, 1_000]
    assert counts["one"] == counts["continue"] == counts["rewind"] == counts["restart"] == [15_360, 24_000, 900]
    assert counts["two"] == counts["reinit"] == counts["reinit again"] == [12_288, 19_200, 810]
    assert counts["random"] == counts["random again"] == counts["two"]
    assert counts["three"] == [12_288 - 2_458, 15_360, 729]
    assert counts["four"] == [9_830 - 1_966, 12_288, 656]
    assert counts["side"] == [7_680, 12_000, 700]
    assert sum(counts["global"]) == 20_080
    assert counts["global"] != [7_680, 12_000, 400]
    for name, run in family().items():
        row = Store(trained).get(run)
        assert row["density"] == pytest.approx(sum(counts[name]) / 50_200, abs=1e-12)
        assert [k for k, _ in json.loads(row["layers"]).values()] == counts[name]
        assert [n for _, n in json.loads(row["layers"]).values()] == [19_200, 30_000, 1_000]


def test_global_scope_ranks_all_layers_together(trained):
    weights, _ = end(trained, "dense")
    size = torch.cat([weights[f"{layer}.weight"].abs().flatten() for layer in ("fc1", "fc2", "fc3")])
    mask = torch.cat([m.flatten() for m in stored_masks(trained, "global").values()])
    assert torch.equal(mask, largest(size, 20_080))


def test_masks_are_nested_along_the_chain(trained):
    chain = [stored_masks(trained, name) for name in ("dense", "one", "two", "three")]
    for before, after in pairwise(chain):
        assert all(not (after[layer] & ~before[layer]).any() for layer in before)


@pytest.mark.parametrize("name", ["dense", "one", "two", "three", "side", "global", "strategy 2"])
def test_reset_is_theta_0_bit_for_bit(trained, digits, name):
    model, row = start(trained, digits, name)
    assert equal(M.state(model), theta_0())
    dense = Store(trained).get(DENSE)
    assert json.loads(row["certificate"])["theta0"] == json.loads(dense["certificate"])["theta0"]
    masks = stored_masks(trained, name)
    for layer, module in M.prunable(model).items():
        assert torch.equal(module.weight, theta_0()[f"{layer}.weight"] * masks[layer])


def test_reinit_draws_fresh_values_for_every_surviving_weight(trained, digits):
    ticket, _ = start(trained, digits, "two")
    drawn = [start(trained, digits, name)[0] for name in ("reinit", "reinit again")]
    for one, other in ((ticket, drawn[0]), (ticket, drawn[1]), (drawn[0], drawn[1])):
        for layer in ("fc1", "fc2", "fc3"):
            mask = M.read(one)[layer]
            assert torch.equal(mask, M.read(other)[layer])
            a, b = (M.prunable(model)[layer].weight.detach()[mask] for model in (one, other))
            assert (a != b).float().mean() > 0.9999
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2
            assert float(b.std() / theta_0()[f"{layer}.weight"].std()) == pytest.approx(1, abs=0.1)
    rows = [Store(trained).get(family()[name]) for name in ("two", "reinit", "reinit again")]
    assert len({json.loads(row["certificate"])["theta0"] for row in rows}) == 3


def test_random_masks_keep_the_counts_of_each_layer_and_nothing_else(trained, digits):
    ticket = stored_masks(trained, "two")
    first, second = stored_masks(trained, "random"), stored_masks(trained, "random again")
    assert kept(first) == kept(second) == kept(ticket)
    for a, b in ((ticket, first), (ticket, second), (first, second)):
        for layer in ticket:
            n, both = a[layer].numel(), int((a[layer] & b[layer]).sum())
            expected = int(a[layer].sum()) ** 2 / n  # of independent masks
            assert abs(both - expected) < 5 * (n / 4) ** 0.5
    model, _ = start(trained, digits, "random")
    assert not equal(M.state(model), theta_0())
    assert equal(M.read(model), first)


def test_continue_goes_on_from_the_parents_final_weights(trained, digits):
    model, _ = start(trained, digits, "continue")
    assert equal(M.state(model), end(trained, "dense")[0])
    assert equal(M.read(model), stored_masks(trained, "one"))


def test_values_from_survivors_are_those_of_the_same_layers_ticket(trained, digits):
    model, _ = start(trained, digits, "survivors")
    assert equal(M.read(model), stored_masks(trained, "two"))
    for layer, mask in M.read(model).items():
        of_ticket = theta_0()[f"{layer}.weight"][mask]
        drawn = M.prunable(model)[layer].weight.detach()[mask]
        assert set(drawn.tolist()) <= set(of_ticket.tolist())
        assert (drawn != of_ticket).float().mean() > 0.99
        assert len(drawn.unique()) < len(of_ticket.unique())  # with replacement
        assert float(drawn.std()) == pytest.approx(float(of_ticket.std()), rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack([drawn, of_ticket]))[0, 1])) < 0.2


@pytest.mark.parametrize("c", [0.5, 3])
def test_noise_has_its_size_in_every_layer_and_spares_the_biases(trained, digits, c):
    model, _ = start(trained, digits, f"noise {c}")
    before, after = theta_0(), M.state(model)
    assert equal(M.read(model), stored_masks(trained, "two"))
    for name, weight in before.items():
        if name.endswith("bias"):
            assert torch.equal(after[name], weight)
        else:
            noise = after[name] - weight
            assert float(noise.std() / weight.std()) == pytest.approx(c, rel=0.1)
            assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), weight.flatten()]))[0, 1])) < 0.15


def test_a_run_from_survivors_holds_how_its_dense_network_moved(trained):
    """Counted weight by weight, from the dense network's two ends and the mask of the ticket."""
    before, (after, _), masks = theta_0(), end(trained, "dense"), stored_masks(trained, "two")
    row = Store(trained).get(family()["survivors"])
    for quantity, layers in json.loads(row["moves"]).items():
        low, high, bins = tickets.MOVES[quantity]
        for layer, sides in layers.items():
            expected = {"in": [0] * bins, "out": [0] * bins}
            weights = zip(*(t[f"{layer}.weight"].flatten().double().tolist() for t in (before, after)), strict=True)
            for (a, b), kept in zip(weights, masks[layer].flatten().tolist(), strict=True):
                value = abs(b - a) if quantity == "distance" else abs(b) - abs(a)
                place = int((value - low) / (high - low) * bins)
                expected["in" if kept else "out"][min(max(place, 0), bins - 1)] += 1
            assert sides == expected
    assert all(Store(trained).get(r)["moves"] is None for r in family().values() if r.init != "survivors")


def test_the_dense_network_of_a_run_from_survivors_is_trained_again_when_its_weights_are_gone(tmp_path):
    one = child(DENSE)
    train([one, child(one)], tmp_path)
    Store(tmp_path).artifact(DENSE.key).unlink()
    assert train([child(one, init="survivors")], tmp_path) == [DENSE, child(one, init="survivors")]


@pytest.mark.parametrize("name", ["rewind", "restart"])
def test_rewind_is_theta_k(trained, digits, name):
    model, row = start(trained, digits, name)
    dense = M.attach(models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)))
    training.fit(dense, digits, QUICK, seed=int(DENSE.key[:15], 16), stop=15)
    assert equal(M.state(model), M.state(dense))
    assert not equal(M.state(model), theta_0())
    assert equal(M.read(model), stored_masks(trained, "one"))
    assert row["step"] == ([20, 30, 40] if name == "rewind" else [10, 20, 30, 40])


def test_theta_k_lies_on_the_parents_own_way(trained, digits):
    """The dense network at iteration k is the one whose final weights were pruned, k iterations into its training."""
    dense = M.attach(models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)))
    training.fit(dense, digits, QUICK, seed=int(DENSE.key[:15], 16))
    assert equal(M.state(dense), end(trained, "dense")[0])


def test_one_shot_has_the_density_of_round_10_within_one_weight(tmp_path, digits):
    at = lth.Setting(base=DENSE)
    [dense], [pruned] = at.dense(0), at.oneshot(0, None)
    assert pruned.parent == dense
    assert (pruned.level, pruned.init) == (1, "reset")
    assert pruned.rate_output == pruned.rate / 2
    train([dense, replace(pruned, recipe=QUICK)], tmp_path)
    masks = M.read(engine.initialise(pruned, digits, Store(tmp_path))[0])
    n = [19_200, 30_000, 1_000]
    for _ in range(10):
        n = [n[0] - round(n[0] * 0.2), n[1] - round(n[1] * 0.2), n[2] - round(n[2] * 0.1)]
    assert at.density(10) == sum(n) / 50_200
    assert abs(sum(kept(masks)) - sum(n)) <= 1


def test_the_engine_does_what_lth_imp_does(trained, digits):
    """The chain of runs and the paper's loop in one process: the same masks when they train in the same order."""
    chain = [family()[name] for name in ("dense", "one", "two", "three")]
    model = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))
    orders = iter(chain)

    def fit(model, start, stop):
        training.fit(model, digits, QUICK, seed=int(next(orders).key[:15], 16), start=start, stop=stop)

    rates = {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}
    for level in algorithm.imp(model, fit, rounds=3, rate=rates):
        name = ("dense", "one", "two", "three")[level.round]
        assert equal(level.masks, stored_masks(trained, name))
        assert equal(M.state(model), end(trained, name)[0])


# Pruned by a criterion ------------------------------------------------------------------------------------------------

AT_INIT = replace(DENSE, valid=0, recipe=STANDARD, density=0.1, criterion="grasp")


def start_of(run, digits, tmp_path):
    """(the network of a run before its training, the same one without masks)."""
    model, _ = engine.initialise(run, digits, Store(tmp_path))
    return model, models.create(run.model, seed=run.seed, in_shape=(1, 8, 8))


@pytest.mark.parametrize("criterion", ["magnitude", "random", "snip", "grasp"])
def test_pruned_at_initialisation_from_theta_0(tmp_path, criterion):
    """64 · 300 + 300 · 100 + 100 · 10 = 50,200 weights: 5,020 are kept of all layers together, the rest is θ₀."""
    images = data.load("digits", valid=0)
    run = replace(AT_INIT, criterion=criterion)
    model, dense = start_of(run, images, tmp_path)
    masks = M.read(model)
    assert sum(int(m.sum()) for m in masks.values()) == 5_020
    assert all(torch.equal(v, M.state(dense)[name]) for name, v in M.state(model).items())
    again = M.read(start_of(run, images, tmp_path)[0])
    other = M.read(start_of(replace(run, seed=1), images, tmp_path)[0])
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert not all(torch.equal(masks[name], other[name]) for name in masks)


def test_the_stored_counts_are_those_of_the_highest_scores(tmp_path):
    run = replace(AT_INIT, score=(("reinit_linear", False), ("temperature", 1.0)))
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    generator = torch.Generator().manual_seed(int(run.key[15:], 16) % 2**31)
    images = data.load("digits", valid=0)
    halves = grasp_algorithm.class_balanced(images, 10, generator, halves=True)
    model = models.create(run.model, seed=0, in_shape=(1, 8, 8))
    score = grasp_algorithm.scores(model, halves, temperature=1.0)
    threshold = torch.cat([v.flatten() for v in score.values()]).sort(descending=True).values[5_019]
    expected = {name: [int((v >= threshold).sum()), v.numel()] for name, v in score.items()}
    assert json.loads(row["layers"]) == expected
    assert row["density"] == 0.1
    stored = store.unpack_masks(row["mask"], {name: v.shape for name, v in score.items()})
    assert all(torch.equal(m, score[name] >= threshold) for name, m in stored.items())
    versions = json.loads(row["certificate"])["versions"]
    assert versions == {"training": training.VERSION, "grasp": grasp_algorithm.VERSION}


@pytest.mark.parametrize(
    ("score", "chunks"),
    [
        ({}, [(50, {0, 1, 2, 3, 4}, 10), (50, {5, 6, 7, 8, 9}, 10)]),
        ({"chunks": 4}, [(25, {0, 1, 2, 3, 4}, 5), (25, {5, 6, 7, 8, 9}, 5)] * 2),
        ({"chunks": 1, "class_sorted": False}, [(100, set(range(10)), 10)]),
        ({"chunks": 2, "class_sorted": False}, [(50, set(range(10)), 5)] * 2),
        ({"per_class": 6}, [(30, {0, 1, 2, 3, 4}, 6), (30, {5, 6, 7, 8, 9}, 6)]),
    ],
)
def test_the_batch_that_is_scored(monkeypatch, score, chunks):
    seen = []
    monkeypatch.setattr(grasp_algorithm, "scores", lambda model, batches, T: seen.append((batches, T)) or {})
    run = replace(AT_INIT, score=tuple(sorted(score.items())))
    images = data.load("digits", valid=0)
    engine.scores(run, models.create(run.model, seed=0, in_shape=(1, 8, 8)), images, torch.Generator().manual_seed(0))
    [(batches, T)] = seen
    assert [(len(y), set(y.tolist()), int((y == y[0]).sum())) for _, y in batches] == chunks
    assert T == 200.0
    every = torch.cat([x for x, _ in batches]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)  # no image twice
    mean, std = images.mean[0], images.std[0]
    assert every.min() >= -mean / std - 1e-5


def test_augmented_trainings_score_augmented_images(monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "snip_scores", lambda model, batches: seen.append(batches) or {})
    for augment in ("none", "flip-crop"):
        run = replace(AT_INIT, criterion="snip", recipe=replace(STANDARD, augment=augment))
        model = models.create(run.model, seed=0, in_shape=(1, 8, 8))
        engine.scores(run, model, data.load("digits", valid=0), torch.Generator().manual_seed(0))
    one, two = (torch.cat([x for x, _ in batches]) for batches in seen)
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_snip_and_grasp_score_a_fresh_classifier_and_train_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "snip_scores", lambda model, batches: seen.append(model) or {})
    model = models.create("resnet8", seed=0, in_shape=(1, 8, 8), width=4)
    for reinit in (True, False):
        run = replace(AT_INIT, criterion="snip", score=(() if reinit else (("reinit_linear", False),)))
        engine.scores(run, model, data.load("digits", valid=0), torch.Generator().manual_seed(0))
    fresh, own = seen
    assert torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert not torch.equal(fresh.fc.weight, model.fc.weight)
    assert torch.equal(own.fc.weight, model.fc.weight)


@pytest.mark.parametrize("init", ["reset", "rewind"])
def test_one_shot_from_trained_weights_by_one_ranking(tmp_path, init):
    """The row "LT" of the table: the largest final weights of the parent, of all layers together."""
    dense = replace(DENSE, valid=0)
    ticket = child(dense, density=0.05, init=init, rewind_to=10 if init == "rewind" else 0)
    train([ticket], tmp_path)
    final = load_file(Store(tmp_path).artifact(dense.key))
    weights = {name: w.abs() for name, w in final.items() if name.startswith("fc") and name.endswith("weight")}
    threshold = torch.cat([w.flatten() for w in weights.values()]).sort(descending=True).values[2_509]
    counts = json.loads(Store(tmp_path).get(ticket)["layers"])
    assert sum(kept for kept, _ in counts.values()) == 2_510
    assert {f"{name}.weight": n for name, (n, _) in counts.items()} == {
        name: int((w >= threshold).sum()) for name, w in weights.items()
    }
    assert Store(tmp_path).get(ticket)["step"][0] == (20 if init == "rewind" else 10)


def test_collapsed_layers_train_and_show_in_the_counts(tmp_path, monkeypatch):
    def dead(model, generator):
        ranked = {name: torch.rand(layer.weight.shape) for name, layer in M.prunable(model).items()}
        return ranked | {"fc2": torch.full((100, 300), -1.0)}

    monkeypatch.setattr(baselines, "random_scores", dead)
    run = replace(AT_INIT, criterion="random")
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    assert json.loads(row["layers"])["fc2"] == [0, 30_000]
    assert row["status"] == "finished"


def test_rows_hold_what_fit_measured(trained, digits):
    run = family()["two"]
    row = Store(trained).get(run)
    model, _ = start(trained, digits, "two")
    history = training.fit(model, digits, run.recipe, seed=int(run.key[:15], 16))
    for name, reading in (("early_stop", history.early_stop), ("last", history.last)):
        for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc"):
            assert row[f"{name}_{f}"] == getattr(reading, f)
        assert np.array_equal(store.unpack(row[f"{name}_correct"], 450), reading.correct)
    assert row["step"] == history.step == [10, 20, 30, 40]
    assert row["val_loss"] == pytest.approx(history.val_loss)
    assert json.loads(row["train_loss"]) == {str(t): loss for t, loss in history.train_loss.items()}
    assert (row["model"], row["dataset"], row["seed"], row["level"]) == ("lenet_300_100", "digits", 0, 2)
    assert (row["n_valid"], row["n_test"], row["status"]) == (297, 450, "finished")
    assert row["fingerprint"] == digits.fingerprint
    assert row["parent"] == run.parent.key
    assert json.loads(row["spec"]) == run.spec()


def test_certificates_are_complete(trained):
    for name, run in family().items():
        row = Store(trained).get(run)
        certificate = json.loads(row["certificate"])
        assert certificate["versions"] == {"training": training.VERSION, "lth": algorithm.VERSION}
        assert certificate["packages"]["torch"] == torch.__version__
        assert {"numpy", "python"} <= certificate["packages"].keys()
        assert certificate["device"] == row["device"]
        assert certificate["threads"] == 1
        assert certificate["group"] == [run.key]
        assert (certificate["compile"], certificate["deterministic"]) == (False, False)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", certificate["started"])
        assert certificate["wall_s"] == row["wall_s"] > 0
        assert "commit" in certificate["code"]
        assert re.fullmatch("[0-9a-f]{64}", certificate["theta0"])
        if run.parent:
            assert re.fullmatch("[0-9a-f]{64}", certificate["parent_weights"]), name
        else:
            assert certificate["parent_weights"] is None


def test_children_name_the_weights_they_used(tmp_path):
    train([child(DENSE)], tmp_path)
    opened = Store(tmp_path)
    sha = hashlib.sha256(opened.artifact(DENSE.key).read_bytes()).hexdigest()
    assert json.loads(opened.get(child(DENSE))["certificate"])["parent_weights"] == sha
    assert json.loads(opened.get(DENSE)["certificate"])["weights"] == sha
    assert not opened.artifact(child(DENSE).key).exists(), "weights that no child needs are not kept"


def test_what_is_stored_is_not_trained_again(tmp_path):
    chain = [DENSE, child(DENSE), child(child(DENSE))]
    assert train(chain[2:], tmp_path) == chain
    before = tree(tmp_path)
    assert train(chain, tmp_path) == []
    Store(tmp_path).merge()
    assert train(chain, tmp_path) == []
    for path, (content, _) in before.items():
        assert path.suffix == ".parquet" or path.read_bytes() == content


def test_a_parent_without_its_weights_is_trained_again_and_keeps_its_row(tmp_path):
    train([child(DENSE)], tmp_path)
    Store(tmp_path).merge()
    row = Store(tmp_path).get(DENSE)
    opened = Store(tmp_path)
    opened.artifact(DENSE.key).unlink()
    new = child(DENSE, rate=0.5)
    assert engine.missing([DENSE, child(DENSE)], opened) == []
    assert train([new], tmp_path) == [DENSE, new]
    assert Store(tmp_path).get(DENSE) == row
    sha = hashlib.sha256(opened.artifact(DENSE.key).read_bytes()).hexdigest()
    assert json.loads(Store(tmp_path).get(new)["certificate"])["parent_weights"] == sha
    Store(tmp_path).merge()
    assert sorted(pd.read_parquet(tmp_path)["key"]) == sorted(r.key for r in (DENSE, child(DENSE), new))


def test_a_parent_of_the_committed_store_is_trained_again_beside_it_and_keeps_its_row(tmp_path):
    committed, mine = tmp_path / "committed", tmp_path / "mine"
    train([child(DENSE)], committed)
    Store(committed).merge()
    Store(committed).artifact(DENSE.key).unlink()
    before, row = tree(committed), Store(committed).get(DENSE)
    both = Store(mine, also=[committed])
    new = child(DENSE, rate=0.5)
    assert experiments.run([new], Inline(), store=both, progress=False) == []
    for opened in (both, Store(mine, also=[committed])):
        assert opened.get(DENSE) == row
    assert tree(committed) == before
    assert set(Store(mine).rows()) == {new.key}
    assert Store(mine).artifact(DENSE.key).exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"", lambda content: b"\xff" * 99])
def test_damaged_weights_are_set_aside_named_and_trained_again(tmp_path, damage):
    train([child(DENSE)], tmp_path)
    path = Store(tmp_path).artifact(DENSE.key)
    sound = path.read_bytes()
    path.write_bytes(broken := damage(sound))
    new = child(DENSE, rate=0.5)
    with pytest.raises(ValueError, match=message(f"Damaged weights {path}: set aside; run again, ")):
        train([new], tmp_path)
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == broken
    assert train([new], tmp_path) == [DENSE, new]
    assert path.read_bytes() == sound


class Failing(Inline):
    """Some runs fail, as an exception in a worker does."""

    def __init__(self, *failing, error=RuntimeError):
        super().__init__()
        self.failing, self.error = failing, error

    def submit(self, fn, runs, *args):
        [r] = runs
        if r not in self.failing:
            return super().submit(fn, runs, *args)
        future = futures.Future()
        future.set_exception(self.error(f"seed {r.seed} failed"))
        return future


def test_a_run_that_fails_stops_its_descendants_only(tmp_path):
    """The others are trained and kept, and the first error is raised at the end."""
    chains = [[r := replace(DENSE, seed=seed), child(r), child(child(r))] for seed in range(3)]
    executor = Failing(chains[0][1], chains[1][0])
    with pytest.raises(RuntimeError, match="seed 1 failed"):
        train([r for chain in chains for r in chain], tmp_path, executor)
    assert set(executor.ran) == {chains[0][0], *chains[2]}
    assert set(Store(tmp_path).rows()) == {r.key for r in executor.ran}


def test_an_interrupt_is_raised_when_the_trainings_under_way_are_kept(tmp_path):
    class Interrupted(futures.ThreadPoolExecutor):
        def submit(self, fn, runs, *args):
            if runs[0].seed == 2:
                raise KeyboardInterrupt
            return super().submit(fn, runs, *args)

    with Interrupted(3) as pool, pytest.raises(KeyboardInterrupt):
        experiments.run(seeds(5), pool, store=Store(tmp_path), progress=False)
    assert set(Store(tmp_path).rows()) == {r.key for r in seeds(2)}


def test_long_chains_go_before_side_branches(tmp_path):
    trunk = [DENSE, child(DENSE), child(child(DENSE))]
    side = [child(DENSE, init="reinit", draw=i) for i in range(3)]
    other = replace(DENSE, seed=1)
    assert engine.missing([*side, other, *trunk], Store(tmp_path)) == [*trunk[:2], *side, other, trunk[2]]


def test_a_thread_pool_will_do(tmp_path):
    with futures.ThreadPoolExecutor(1) as pool:
        train([child(DENSE)], tmp_path, pool)
    assert len(load(None, Store(tmp_path))) == 2


def test_two_threads_train_two_runs_as_one_after_the_other(tmp_path):
    chains = [child(r) for r in seeds(3)]
    train(chains, tmp_path / "alone")
    with futures.ThreadPoolExecutor(2) as pool:
        train(chains, tmp_path / "together", pool)
    alone, together = (Store(tmp_path / name).rows() for name in ("alone", "together"))
    assert alone.keys() == together.keys()
    for key, row in alone.items():
        for column in ("step", "val_loss", "train_loss", "mask", "early_stop_correct", "last_correct"):
            assert together[key][column] == row[column]


@pytest.mark.slow
def test_a_pool_of_spawned_processes_gives_the_same_results(trained, tmp_path):
    with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        train([family()["one"]], tmp_path, pool)
    for name in ("dense", "one"):
        here, there = (Store(folder).get(family()[name]) for folder in (trained, tmp_path))
        for column in ("val_loss", "last_correct", "early_stop_correct", "mask", "train_loss", "density"):
            assert here[column] == there[column]


def test_budget_0_starts_nothing(tmp_path, capsys):
    left = experiments.run([child(DENSE)], Inline(), budget=0, store=Store(tmp_path / "new"), progress=False)
    assert left == [DENSE, child(DENSE)]
    assert not tree(tmp_path)


def test_children_of_a_run_that_the_budget_refuses_are_not_started(tmp_path):
    opened, executor = Store(tmp_path), Inline()
    opened.put(fake(replace(DENSE, seed=5), wall_s=40.0))  # a second an iteration
    slow = replace(DENSE, recipe=Recipe(iterations=1000))
    quick = child(slow, recipe=Recipe(iterations=2, eval_every=1))
    left = experiments.run([quick, child(quick)], executor, budget=20, store=opened, progress=False)
    assert left == [slow, quick, child(quick)]
    assert executor.ran == []


def test_a_budget_stops_before_runs_that_would_end_after_it(tmp_path):
    opened = Store(tmp_path)
    opened.put(fake(replace(DENSE, seed=5), wall_s=40.0))  # a second an iteration
    executor = Inline()
    quick, slow = replace(DENSE, recipe=Recipe(iterations=10, eval_every=5)), replace(DENSE, seed=1)
    left = experiments.run([quick, slow], executor, budget=20, store=opened, progress=False)
    assert executor.ran[:1] == [quick]
    assert left == [r for r in (slow,) if r not in executor.ran]


def test_execute_leaves_threads_and_random_states(tmp_path):
    threads = torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    run = child(DENSE, init="random")
    torch.set_num_threads(threads + 1)
    try:
        engine.execute([DENSE], tmp_path, keep_weights=[True], threads=1)
        engine.execute([run], tmp_path, threads=1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


def test_threads_are_given_back_after_an_error(tmp_path):
    threads = torch.get_num_threads()
    with pytest.raises(FileNotFoundError):
        engine.execute([child(DENSE)], tmp_path, threads=threads + 1)
    assert torch.get_num_threads() == threads


def test_diverged_runs_are_stored_and_counted(tmp_path):
    run = replace(DENSE, recipe=replace(QUICK, optimizer="sgd", lr=1e30))
    assert train([run], tmp_path) == [run]
    [row] = load([run], Store(tmp_path)).to_dict("records")
    assert row["status"] == "diverged"
    assert row["last_test_acc"] < 0.2
    assert not row["censored"]
    assert train([run], tmp_path) == []


@pytest.mark.parametrize("steps", [40, 10])
def test_a_pruned_network_that_diverges_is_stored_as_diverged(tmp_path, steps):
    """Its pruned weights are NaN times 0, and that is no pruned weight that came back."""
    recipe = Recipe(optimizer="sgd", lr=1e30, iterations=steps, eval_every=10)
    run = child(DENSE, rate=0.5, rate_output=0.5, recipe=recipe)
    train([run], tmp_path)
    [row] = load([run], Store(tmp_path)).to_dict("records")
    assert (row["status"], row["density"]) == ("diverged", 0.5)
    assert train([run], tmp_path) == []


def test_without_validation_set_there_is_no_early_stop(tmp_path):
    run = replace(DENSE, valid=0)
    train([child(run)], tmp_path)
    for r in (run, child(run)):
        row = Store(tmp_path).get(r)
        assert (row["n_valid"], row["status"], row["censored"]) == (0, "finished", False)
        assert row["early_stop_step"] is row["early_stop_test_acc"] is row["early_stop_correct"] is None
        assert row["last_test_acc"] > 0.5
    assert len(load([run], Store(tmp_path))) == 1


def test_a_share_of_the_training_images(tmp_path, digits):
    run = replace(DENSE, train_fraction=0.1)
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    assert row["last_train_acc"] * 105 == pytest.approx(round(row["last_train_acc"] * 105))
    assert (row["n_valid"], row["fingerprint"]) == (297, digits.fingerprint)


def test_conv_layers_have_their_own_rate():
    model = models.create("conv2", seed=0, in_shape=(1, 8, 8))
    run = Run(model="conv2", dataset="digits", rate=0.2, rate_conv=0.1, rate_output=0.05)
    assert engine.rates(model, run) == {"conv1": 0.1, "conv2": 0.1, "fc1": 0.2, "fc2": 0.2, "fc3": 0.05}
    assert set(engine.rates(model, replace(run, rate_conv=None, rate_output=None)).values()) == {0.2}


# What is declared for the lottery ticket paper ------------------------------------------------------------------------


def test_laptop_is_155_runs_and_2_3_million_iterations():
    """The figures of the main text and 14."""
    runs = lth.runs(lth.MAIN, "laptop")
    assert len(runs) == len(set(runs)) == len({r.key for r in runs}) == 155 == 5 * (16 + 6 + 6 + 3)
    assert sum(r.recipe.iterations for r in runs) == 2_325_000
    for seed in range(5):
        mine = [r for r in runs if r.seed == seed]
        kinds = [sum(r.init == init for r in mine) for init in ("reset", "reinit", "random")]
        assert kinds == [16 + 3, 6, 6]
        assert sorted(r.level for r in mine if r.init == "reinit") == [3, 7, 9, 10, 12, 15]
        assert sorted(r.level for r in mine if r.init == "random") == [3, 7, 9, 10, 12, 15]
        assert sorted(r.rate for r in mine if r.rate != 0.2) == pytest.approx([0.825, 0.8934, 0.95], abs=1e-4)
    for r in runs:
        assert (r.model, r.dataset, r.recipe.iterations, r.recipe.batch_size) == ("lenet_300_100", "mnist", 15_000, 60)
        assert (r.recipe.optimizer, r.recipe.lr, r.scope) == ("adam", 1.2e-3, "layer")
        assert r.rate_output == r.rate / 2
        assert r.parent is None or r.parent in runs


def test_the_trunks_come_first():
    runs = lth.runs(lth.MAIN, "laptop")
    assert all(r.init == "reset" for r in runs[:80])
    assert lth.runs(None, "laptop")[: len(runs)] == runs
    assert all(runs.index(r.parent) < runs.index(r) for r in runs if r.parent)


@pytest.mark.parametrize("scale", lth.SCALES)
def test_every_items_runs_are_among_all(scale):
    every, twelve = set(lth.runs(None, scale)), set(lth.runs("fig12", scale))
    for item in lth.ITEMS:
        runs = lth.runs(item, scale)
        assert runs
        assert len(runs) == len(set(runs))
        assert set(runs) <= every
        assert set(lth.runs([item, "fig12"], scale)) == set(runs) | twelve


def test_items_need_their_own_arms():
    inits = {item: {r.init for r in lth.runs(item, "laptop")} for item in lth.MAIN}
    assert inits["fig1"] == {"reset", "random"}
    assert inits["fig3"] == inits["fig11"] == inits["fig12"] == {"reset", "reinit"}
    assert inits["fig14"] == {"reset", "reinit", "random"}
    assert len(lth.runs("fig4", "laptop")) == 5 * (16 + 6 + 3)


def test_curves_are_read_closely_only_where_figure_3_draws_them():
    for r in lth.runs(lth.MAIN, "laptop"):
        trunk = r.init == "reset" and r.rate == 0.2
        drawn = r.init in ("reinit", "random") and r.level in (3, 7)
        assert r.recipe.test_readings == ("all" if trunk or drawn else "log")


def test_paper_scale_is_the_papers():
    """Figure 2 and section 1: 50,000 iterations, five tickets, three reinitialisations of each, ten random networks."""
    at = lth.setting("paper")
    assert (at.base.recipe.iterations, at.trials, at.draws, at.trials * at.random_draws) == (50_000, 5, 3, 10)
    assert [r.draw for r in at.reinit(2, 4)] == [0, 1, 2]
    assert len({r.key for r in at.reinit(2, 4)}) == 3
    assert [r.seed for r in at.reinit(2, 4)] == [2, 2, 2]


def test_primary_is_180_runs_of_the_papers_and_9_million_iterations(tmp_path):
    """10 chains to round 15, each with a reinitialisation at round 7 and a one-shot ticket at 10.83 %."""
    runs, paper = lth.runs("fig4", "primary"), set(lth.runs("fig4", replace(lth.setting("paper"), trials=10)))
    one_shot = lth.setting("paper").one_shot_rate(lth.setting("paper").density(10))
    assert (len(set(runs)), sum(r.recipe.iterations for r in runs)) == (180, 9_000_000)
    assert {r.key for r in runs} <= {r.key for r in paper}
    for seed in range(10):
        mine = [r for r in runs if r.seed == seed]
        assert sorted(r.level for r in mine if r.rate == 0.2 and r.init == "reset") == list(range(16))
        assert [(r.level, r.draw) for r in mine if r.init == "reinit"] == [(7, 0)]
        assert [r.rate for r in mine if r.rate != 0.2] == [one_shot]
    assert len(engine.missing(runs, Store(tmp_path))) == 180
    assert set(lth.runs("fig4", replace(lth.setting("primary"), trials=2))) == {r for r in runs if r.seed < 2}


def test_primary_claims_find_the_primary_runs():
    """At their number of trials, and nothing else than what is trained for them."""
    runs, rules = set(lth.runs("fig4", "primary")), scorecard.read("lth", "_claims", REPORTED)
    rules = rules[(rules["primary"] == 1) & rules["arm_a"].str.startswith("lenet")]
    assert set(rules["n"]) == {lth.setting("primary").trials}
    for claim in rules.to_dict("records"):
        for cell in scorecard._cells(claim):
            for arm, x in scorecard._arms(claim, cell):
                for trial in range(10):
                    assert set(lth.arm(arm, x, trial, "primary")) <= runs


def test_densities_are_those_that_the_paper_prints():
    printed = [100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6, 2.9, 2.3, 1.9]
    at = lth.setting("paper")
    assert [round(100 * at.density(level), 1) for level in range(19)] == pytest.approx(printed, abs=0.051)


@pytest.mark.parametrize(
    ("arm", "x", "levels"),
    [
        ("lenet/dense", None, [0]),
        ("lenet/imp", 100, [0]),
        ("lenet/imp", 51.3, [3]),
        ("lenet/imp", 51, [3]),
        ("lenet/imp", 21.1, [7]),
        ("lenet/imp", 13.5, [9]),
        ("lenet/imp", 3.6, [15]),
        ("lenet/reinit", 21.1, [7]),
        ("lenet/random", 10.8, [10]),
        ("lenet/oneshot", 17.6, [1]),
        ("lenet/oneshot-reinit", 5.17, [1]),
    ],
)
def test_arms_at_printed_densities(arm, x, levels):
    runs = lth.arm(arm, x, 2, "laptop")
    assert [r.level for r in runs] == levels
    assert all(r.seed == 2 and r.recipe.iterations == 15_000 for r in runs)
    init = {"imp": "reset", "dense": "reset", "oneshot": "reset"}.get(arm.split("/")[1])
    assert {r.init for r in runs} == {init or arm.split("/")[1].removeprefix("oneshot-")}


def test_one_shot_arms_are_found_by_the_density_left():
    rates = [lth.arm("lenet/oneshot", x, 0, "laptop")[0].rate for x in (17.6, 10.83, 5.17)]
    assert rates == pytest.approx([0.825, 0.8934, 0.95], abs=1e-4)


@pytest.mark.parametrize(
    ("arm", "x"),
    [
        ("lenet/imp", 45),
        ("lenet/imp", 1.2),
        ("lenet/reinit", 100),
        ("lenet/reinit", 41.1),
        ("lenet/random", 80),
        ("lenet/oneshot", 50),
        ("conv2/imp", 51.3),
        ("resnet18@0.1/imp", 41.7),
        ("lenet/noise", 21.1),
        ("vgg19/dense", None),
    ],
)
def test_arms_that_are_no_experiment_here(arm, x):
    assert lth.arm(arm, x, 0, "laptop") is None


def test_arms_of_the_paper_scale_have_all_draws():
    assert [r.draw for r in lth.arm("lenet/reinit", 21.1, 0, "paper")] == [0, 1, 2]
    assert [r.draw for r in lth.arm("lenet/random", 21.1, 0, "paper")] == [0, 1]
    assert len(lth.arm("lenet/oneshot-reinit", 17.6, 0, "paper")) == 3


@pytest.mark.parametrize("scale", lth.SCALES)
@pytest.mark.parametrize("control", ["dense", "imp", "reinit", "random", "oneshot"])
def test_arms_are_runs_that_the_scale_declares(control, scale):
    declared = set(lth.runs(None, scale))
    for x in (51.3, 21.1, 17.6, 10.8):
        for r in lth.arm(f"lenet/{control}", x, 1, scale) or []:
            assert r in declared


def test_unknown_names_and_bad_settings():
    with pytest.raises(ValueError, match=message("Unknown scale 'huge': choose one of paper, primary, laptop, smoke.")):
        lth.runs(None, "huge")
    with pytest.raises(ValueError, match=message("Unknown item 'fig99' of lth: choose from fig1, ")):
        lth.runs(["fig3", "fig99"], "laptop")
    with pytest.raises(ValueError, match=message("Invalid trials 0: give a whole number from 1.")):
        replace(lth.setting("smoke"), trials=0)
    with pytest.raises(ValueError, match=message("Invalid one_shot (0.5, 1.0): give fractions to remove, 0 < p < 1.")):
        replace(lth.setting("smoke"), one_shot=(0.5, 1.0))
    with pytest.raises(ValueError, match=message("Invalid init 'rest': give one of reset, ")):
        replace(lth.setting("smoke"), init="rest")


def test_continued_training_resets_only_the_network_that_is_looked_at():
    at = replace(lth.setting("smoke"), init="continue")
    [third] = at.imp(0, 3)
    assert [third.init, third.parent.init, third.parent.parent.init] == ["reset", "continue", "continue"]
    assert third.root == at.dense(0)[0]
    assert at.imp(0, 2)[0] not in (third.parent, third.parent.parent)


def test_declaring_runs_leaves_torchs_random_state():
    before = torch.get_rng_state()
    for scale in lth.SCALES:
        lth.runs(None, replace(lth.setting(scale)))  # a new one: counts are kept with a setting
    lth.override(lth.setting("smoke"), rate=0.3, one_shot_densities=[0.1]).density(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dense_network_is_the_same_however_it_would_be_pruned():
    dense = lth.setting("smoke").dense(0)
    others = [{"rate": 0.5}, {"rate_output": 0.3}, {"scope": "global"}, {"init": "rewind", "rewind_to": 20}]
    for options in others:
        at = lth.override(lth.setting("smoke"), **options)
        assert at.dense(0) == dense
        assert at.imp(0, 0) == dense
        assert at.imp(0, 1) != lth.setting("smoke").imp(0, 1)


def test_one_shot_densities_are_counted_on_the_network_that_is_pruned():
    at = lth.override(lth.setting("smoke"), model="conv2", rate_output=0.1, one_shot_densities=[0.2, 0.1])
    weights = [layer.weight.numel() for layer in M.prunable(models.create("conv2", in_shape=(1, 8, 8))).values()]
    for p, density in zip(at.one_shot, (0.2, 0.1), strict=True):
        kept = (1 - p) * sum(weights[:-1]) + (1 - p / 2) * weights[-1]
        assert kept / sum(weights) == pytest.approx(density, abs=1e-6)


def test_rewinding_chains():
    at = lth.override(lth.setting("smoke"), init="rewind", rewind_to=20)
    [second] = at.imp(1, 2)
    assert [(r.init, r.rewind_to) for r in (second, second.parent, second.root)] == [
        ("rewind", 20),
        ("rewind", 20),
        ("reset", 0),
    ]
    assert second.root.key == lth.setting("smoke").dense(1)[0].key


# The appendix ---------------------------------------------------------------------------------------------------------


def test_strategy_2_trains_on_between_rounds_and_resets_the_ticket_that_is_scored():
    at = lth.setting("laptop")
    [ticket] = lth.trial("continued", at, 1, 7)
    chain = [ticket]
    while chain[-1].parent:
        chain.append(chain[-1].parent)
    assert [r.init for r in chain] == ["reset", *["continue"] * 6, "reset"]
    assert chain[-1] == at.dense(1)[0]
    assert at.continued(1, 9)[0].parent.parent == replace(ticket, init="continue")
    [theirs] = at.imp(1, 7)
    assert (theirs.level, theirs.rate) == (ticket.level, ticket.rate)
    assert theirs.key != ticket.key


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lr2.5e-5", {"optimizer": "adam", "lr": 2.5e-5}),
        ("lr6.4e-3", {"optimizer": "adam", "lr": 0.0064}),
        ("sgd-0.8", {"optimizer": "sgd", "lr": 0.8, "momentum": 0.0}),
        ("momentum-0.025", {"optimizer": "sgd", "lr": 0.025, "momentum": 0.9}),
        ("rate0.4", {"rate": 0.4, "rate_output": 0.2, "lr": 1.2e-3}),
        ("sigma0.1", {"options": (("init", "normal"), ("sigma", 0.1))}),
        ("hidden75-25", {"options": (("hidden", (75, 25)),)}),
        ("kaiming", {"options": (("init", "kaiming fan_in"),)}),
    ],
)
def test_a_sweeps_point_differs_in_what_it_is_called(name, fields):
    [ticket] = lth.trial(f"{name}/imp", lth.setting("laptop"), 3, 2)
    [base] = lth.setting("laptop").imp(3, 2)
    flat, plain = ({**vars(r), **vars(r.recipe)} for r in (ticket, base))
    changed = {k: flat[k] for k in plain if flat[k] != plain[k] and k not in ("key", "parent", "recipe")}
    assert changed.items() <= {**fields, "test_readings": "all" if name == "sgd-0.8" else "log"}.items()
    assert all(flat[k] == v for k, v in fields.items())


def test_sweeps_end_where_as_few_weights_are_left():
    """P_m by hand: round(s n) of n survivors go; output layers at half the rate."""

    def series(sizes, s, rounds):
        for _ in range(rounds):
            sizes = [n - round(rate * n) for n, rate in zip(sizes, (s, s, s / 2), strict=True)]
        return sum(sizes)

    lenet, at = [784 * 300, 300 * 100, 1000], lth.setting("laptop")
    seventh, fifteenth = series(lenet, 0.2, 7), series(lenet, 0.2, 15)
    assert (at.weights(7), at.weights(15)) == (seventh, fifteenth)
    for name, sizes, s, target in (
        ("lr2e-4", lenet, 0.2, seventh),
        ("rate0.1", lenet, 0.1, seventh),
        ("rate0.4", lenet, 0.4, fifteenth),
        ("hidden75-25", [784 * 75, 75 * 25, 250], 0.2, fifteenth),
        ("sgd-0.8", lenet, 0.2, series(lenet, 0.2, 21)),
    ):
        variant = at.variant(name)
        assert [variant.weights(r) for r in range(9)] == [series(sizes, s, r) for r in range(9)]
        assert series(sizes, s, variant.rounds) <= target < series(sizes, s, variant.rounds - 1)


def test_pruned_before_training_is_as_sparse_as_the_ticket_layer_by_layer(digits):
    at = lth.setting("smoke")
    [run] = lth.trial("prune-at-init", at, 0, 7)
    assert (run.parent, run.criterion) == (None, "magnitude")
    model, _ = engine.initialise(run, digits, None)
    assert equal(M.state(model), theta_0())
    for layer, (n, rate) in {"fc1": (19_200, 0.2), "fc2": (30_000, 0.2), "fc3": (1_000, 0.1)}.items():
        for _ in range(7):
            n -= round(rate * n)
        assert torch.equal(M.read(model)[layer].flatten(), largest(theta_0()[f"{layer}.weight"].abs().flatten(), n))


def test_grid_points_are_named_by_the_paper_or_marked_as_guessed():
    reported = scorecard.read("lth", "", REPORTED)
    for item, unit in (("fig26", "learning rate"), ("fig27", "learning rate"), ("fig28", "learning rate")):
        rows = reported[(reported["item"] == item.replace("fig", "Figure ")) & (reported["provenance"] == "paper")]
        named = set(rows[rows["unit"] == unit]["value"])
        variants = [lth.setting("paper").variant(arm.split("/")[0]) for arm in lth.ITEMS[item] if "/" in arm]
        assert {at.base.recipe.lr for at in variants} <= named
    assert {"sigma0.03", "sigma0.3", "hidden75-25", "hidden150-50"} == set(lth.GUESSED_POINTS)


def test_claims_on_lenet_are_all_experiments_of_the_paper_scale():
    rules = scorecard.read("lth", "_claims", REPORTED)
    rules = rules[rules["arm_a"].str.startswith("lenet") & (rules["kind"] != "") & (rules["quantity"] != "weights")]
    for claim in rules.to_dict("records"):
        for cell in scorecard._cells(claim):
            for arm, x in scorecard._arms(claim, cell):
                assert lth.arm(arm, x, 0, "paper"), (claim["id"], arm, x)


def test_another_network_has_no_hidden_layers_to_size():
    at = lth.override(lth.setting("smoke"), model="conv2", dataset="cifar10")
    assert {r.model for r in lth.runs("fig31", at)} == {"conv2"}


def test_smoke_is_small_enough_for_every_figure():
    runs = lth.runs(None, "smoke")
    assert {r.dataset for r in runs} == {"digits"}
    assert sum(r.recipe.iterations for r in runs) < 30_000


def test_runs_side_by_side_are_what_they_are_alone(tmp_path, monkeypatch):
    """On a GPU the engine trains alike runs as one group; grouping is switched on here for the CPU."""
    recipe = replace(QUICK, iterations=40, eval_every=10, test_readings="all")
    dense = [Run(dataset="digits", recipe=recipe, seed=seed) for seed in range(3)]
    other = Run(dataset="digits", recipe=replace(recipe, lr=0.01))
    runs = [*dense, other, *map(child, dense), replace(child(dense[0]), init="reinit")]
    train(runs, tmp_path / "alone")
    whole = engine._alike
    monkeypatch.setattr(engine, "_alike", lambda r, device: whole(r, "cuda"))
    train(runs, tmp_path / "together")
    groups = []
    for r in runs:
        a, b = (Store(tmp_path / name).get(r) for name in ("alone", "together"))
        certificate = json.loads(b["certificate"])
        groups.append(len(certificate["group"]))
        assert r.key in certificate["group"]
        assert json.loads(a["certificate"])["theta0"] == certificate["theta0"]
        np.testing.assert_allclose(a["val_loss"], b["val_loss"], atol=1e-4)
        assert a["layers"] == b["layers"]
    assert sorted(groups) == [1, 3, 3, 3, 4, 4, 4, 4]
