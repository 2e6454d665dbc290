"""The store: round trips, shards, damage, and fields that are added later."""

import concurrent.futures as futures
import fcntl
import json
import os
import random
import re
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import DENSE, QUICK, edit, fake, message, seeds, shards, spool, train, tree

from lottery import files, training
from lottery.experiments import Run, Store, engine, load, pace, store


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


def test_runs_are_taken_out_of_shards_and_spool_and_can_be_stored_anew(tmp_path, capsys):
    runs = seeds(4)
    for r in runs[:3]:
        Store(tmp_path).put(fake(r, wall_s=1.0))
    Store(tmp_path).merge()
    Store(tmp_path).put(fake(runs[3], wall_s=1.0))
    before = load([runs[0]], Store(tmp_path))
    gone = {runs[1].key, runs[2].key, runs[3].key, "of no run"}
    opened = Store(tmp_path)
    assert opened.get(runs[1])["wall_s"] == 1.0
    assert opened.remove(gone) == 3
    assert opened.get(runs[1]) is None
    assert opened.keys() == Store(tmp_path).keys() == {runs[0].key}
    pd.testing.assert_frame_equal(load([runs[0]], Store(tmp_path)), before)
    assert not spool(tmp_path)
    left = tree(tmp_path)
    assert Store(tmp_path).remove(gone) == 0
    assert tree(tmp_path) == left
    assert Store(tmp_path).put(fake(runs[1], wall_s=2.0))
    assert Store(tmp_path).get(runs[1])["wall_s"] == 2.0
    assert not capsys.readouterr().err


def test_no_run_is_taken_out_together_with_a_damaged_one(tmp_path, capsys):
    one, other = seeds(2)
    for r in (one, other):
        Store(tmp_path).put(fake(r))
    Store(tmp_path).merge()
    [path] = shards(tmp_path)
    table = pq.read_table(path).to_pylist()
    table[0]["density"] = 0.4
    pq.write_table(pa.Table.from_pylist(table, schema=store.schema()), path)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message(f"Damaged runs in {path}")):
        Store(tmp_path).remove({one.key, other.key})
    assert tree(tmp_path) == before
    assert "damaged" in capsys.readouterr().err.lower()


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


def test_a_shard_holds_no_more_bytes_than_are_read(tmp_path, monkeypatch, capsys):
    """Twelve rows of some 50 kB with a limit of 1 MB; and a row that alone has more than its share."""
    rng = np.random.default_rng(0)
    sizes = dict(zip(seeds(12), [350_000, *[50_000] * 11], strict=True))
    for r, n in sizes.items():
        Store(tmp_path).put(fake(r, numbers=json.dumps({"s": rng.bytes(n // 2).hex()})))
    monkeypatch.setattr(store, "MOST", 10**6)
    assert Store(tmp_path).merge() == 12
    assert not spool(tmp_path)
    assert Store(tmp_path).rows().keys() == {r.key for r in sizes}
    assert len(shards(tmp_path)) == 5
    assert not capsys.readouterr().err


def test_what_a_shard_does_not_give_back_stays_in_the_spool(tmp_path, monkeypatch, capsys):
    runs, write = seeds(3), pq.write_table
    for r in runs:
        Store(tmp_path).put(fake(r))

    def lying(table, where, **options):
        write(table.set_column(0, "key", pa.array(["0" * 24] * len(table))), where, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", lying)
        said = r"^Cannot write .*\.parquet: what is read again is not what was written\. Name another folder; "
        with pytest.raises(files.CannotWrite, match=said):
            Store(tmp_path).merge()
    assert (len(spool(tmp_path)), shards(tmp_path)) == (3, [])
    assert Store(tmp_path).merge() == 3


def test_a_store_that_is_open_sees_what_others_do(tmp_path):
    mine, other = Store(tmp_path), Store(tmp_path)
    assert mine.get(DENSE) is None
    other.put(fake())
    assert mine.get(DENSE)
    other.merge()
    assert mine.get(DENSE)
    assert len(load(None, mine)) == 1


def test_a_relative_folder_is_that_of_the_process_that_named_it(tmp_path, monkeypatch):
    """Workers are told of it, and need not be where this process is, or stays."""
    monkeypatch.chdir(tmp_path)
    mine = Store("mine", also=["its"])
    assert (mine.dir, mine.also) == (tmp_path / "mine", [tmp_path / "its"])


def test_a_result_that_no_listing_shows_yet_is_found_by_its_name(tmp_path):
    """Added within one tick of the folder's clock, or while a network's file system keeps an older time of it."""
    mine, other = Store(tmp_path), replace(DENSE, seed=1)
    mine.put(fake())
    assert mine.get(other) is None
    before = (tmp_path / ".spool").stat()
    Store(tmp_path).put(fake(other))
    os.utime(tmp_path / ".spool", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert mine.get(other)


def test_a_process_reads_once_which_runs_a_shard_holds(tmp_path, monkeypatch):
    """A worker opens the store anew for each of its runs, and asks for it by name."""
    pack(tmp_path, seeds(3))
    [shard], table, asked = shards(tmp_path), store._table, []
    monkeypatch.setattr(store, "_table", lambda *args: (asked.append(args[0]), table(*args))[1])
    absent = replace(DENSE, seed=9).key
    for _ in range(2):
        assert list(Store(tmp_path).find(absent)) == []
        assert len(Store(tmp_path).keys()) == 3
    assert asked.count(shard) == 1
    assert [row["key"] for row in Store(tmp_path).find(DENSE.key)] == [DENSE.key]


def test_a_shard_that_goes_while_the_store_is_open_stops_nothing(tmp_path):
    """As a checkout of another commit takes it: what it held lies elsewhere by then, or nowhere."""
    one, other = seeds(2)
    pack(tmp_path, [one, other])
    mine = Store(tmp_path)
    mine.keys()
    [shard] = shards(tmp_path)
    shard.unlink()
    assert mine.get(one) is None
    assert mine.columns("status") == {}
    pack(tmp_path, [other])
    assert mine.get(other)
    assert mine.columns("status") == {other.key: ("finished",)}


def pack(folder, runs):
    """Runs in one shard of a store."""
    for r in runs:
        Store(folder).put(fake(r))
    Store(folder).merge()


def test_merge_of_another_store(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    runs = seeds(5)
    pack(there, runs[:2])
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
    pack(committed, runs[:2])
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


@pytest.mark.parametrize("spooled", [False, True])
def test_a_table_of_something_else_is_no_result(tmp_path, capsys, spooled):
    Store(tmp_path).put(fake())
    other = (tmp_path / ".spool" if spooled else tmp_path) / "pictures.parquet"
    pq.write_table(pa.table({"image": [b"x"] * 7, "label": [1] * 7}), other)
    before = other.read_bytes()
    assert list(Store(tmp_path).keys()) == [fake()["key"]]
    assert capsys.readouterr().err == f"{other} is no result: it has no column 'key'; it is passed over.\n"
    assert Store(tmp_path).columns("status") == {fake()["key"]: ("finished",)}
    assert Store(tmp_path).merge() == 1
    assert other.read_bytes() == before
    assert str(other) in capsys.readouterr().err


def test_merges_wait_for_each_other(tmp_path):
    Store(tmp_path).put(fake())
    with open(tmp_path / ".lock", "w") as lock, futures.ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        merging = pool.submit(Store(tmp_path).merge)
        assert not futures.wait([merging], timeout=1).done, "a merge does not wait for the lock"
        assert len(spool(tmp_path)) == 1
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert merging.result(timeout=60) == 1
    assert len(spool(tmp_path)) == 0


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


def test_one_run_on_a_busy_machine_does_not_change_the_pace(tmp_path):
    for run, wall_s in zip(seeds(3), (1.5, 1.6, 40.0), strict=True):
        Store(tmp_path).put(fake(run) | {"wall_s": wall_s})
    found = pace.paces(Store(tmp_path))
    assert found[run.kind] == found[run.kind[:2]] == 1.6 / QUICK.iterations


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
    assert pace.paces(mine)[runs[0].kind] == 1.5 / QUICK.iterations
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


def changed(**fields):
    return json.dumps({**DENSE.spec(), **fields}, sort_keys=True)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (changed(rate=0.3), f"what it says it is has the key {replace(DENSE, rate=0.3).key}."),
        (changed(recipe=DENSE.spec()["recipe"] | {"lr": 9.0}), "what it says it is has the key "),
        (changed(method={"is": "CS", "s0": 0.5}), "what it says it is has the key "),
        (changed(parent="0" * 24), "what it says it is has the key "),
        (changed(measurement="Pruning"), "what it says it is has the key "),
        (changed(measurement="Instability", parent=["0" * 24] * 2, points=11), "what it says it is has the key "),
        ("{}", "it does not say what it is of."),
        (json.dumps({"model": "lenet_300_100", "measurement": "Pruning"}), "it does not say what it is of."),
    ],
)
def test_another_runs_row_is_named_with_its_file_passed_over_and_trained_again(tmp_path, capsys, spec, said, merged):
    """Whoever signed it; in the spool or in a shard, whose other row stays readable."""
    good = replace(DENSE, seed=1)
    path = tmp_path / ("2026-01-01-00000000.parquet" if merged else f".spool/{DENSE.key}.parquet")
    path.parent.mkdir(exist_ok=True)
    rows = [store._signed(pa.Table.from_pylist([row], store.schema())) for row in (fake(spec=spec), fake(good))]
    pq.write_table(pa.concat_tables(rows if merged else rows[:1]), path)
    Store(tmp_path).put(fake(good))
    assert load([DENSE, good], Store(tmp_path))["key"].tolist() == [good.key]
    assert f"Damaged run {DENSE.key} in {path}: {said}" in capsys.readouterr().err
    assert engine.missing([DENSE, good], Store(tmp_path)) == [DENSE]
    assert Store(tmp_path).put(fake())
    assert Store(tmp_path).merge() == (1 if merged else 2)
    assert Store(tmp_path).get(DENSE)["spec"] == fake()["spec"]
    elsewhere = Store(tmp_path / "elsewhere")
    elsewhere.merge(tmp_path)
    assert set(elsewhere.rows()) == {DENSE.key, good.key}


def test_a_row_of_a_method_that_is_not_known_here_is_compared_with_the_run_that_is_asked_for(tmp_path, capsys):
    Store(tmp_path).put(fake(spec=changed(method={"is": "Nobodys", "x": 1.0})))
    assert set(Store(tmp_path).rows()) == {DENSE.key}
    assert DENSE.key not in store.Rows(Store(tmp_path)), "no claim rests on it"
    capsys.readouterr()
    assert Store(tmp_path).get(DENSE) is None
    [path] = spool(tmp_path)
    said = f"Damaged run {DENSE.key} in {path}: it is stored with is = 'Nobodys', not None. It is passed over; run it"
    assert capsys.readouterr().err.startswith(said)
    assert Store(tmp_path).put(fake())
    assert store.unlike(json.loads(Store(tmp_path).get(DENSE)["spec"]), DENSE.spec()) == ""
    assert path.with_suffix(".damaged").exists()
    assert store.unlike(json.loads(fake()["spec"]), replace(DENSE, seed=1).spec()) == "seed = 0, not 1"


@pytest.mark.parametrize("name", ["inputs", "gamma"])
def test_a_field_added_to_recipe_later_finds_stored_runs(tmp_path, name):
    """What a run was stored without is the default of the field that came later."""
    spec = DENSE.spec()
    del spec["recipe"][name]
    Store(tmp_path).put(fake(spec=json.dumps(spec, sort_keys=True)))
    assert Store(tmp_path).get(DENSE)
    assert len(load([DENSE], Store(tmp_path))) == 1


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
    layers = json.dumps({name: [int(m.sum()), m.numel()] for name, m in masks.items()})
    back = store.unpack_masks({"mask": store.pack_masks(masks), "layers": layers})
    assert list(back) == list(masks)
    assert all(torch.equal(back[name], masks[name].flatten()) for name in masks)
    assert store.unpack_masks({"mask": None, "layers": layers}) is None


def test_masks_of_large_networks_are_not_stored():
    limit = store.MASK_LIMIT
    assert limit == 500_000
    assert store.pack_masks({"a": torch.ones(limit, dtype=torch.bool)})
    assert store.pack_masks({"a": torch.ones(limit, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)}) is None


# Two results of one run -----------------------------------------------------------------------------------------------


def other_result(run):
    """The row of a run, with other images right than `fake` has."""
    row = fake(run)
    row["last_correct"] = bytes(255 - b for b in row["last_correct"])
    row["last_test_acc"] = store.unpack(row["last_correct"], row["n_test"]).mean()
    return row


def test_a_merge_from_elsewhere_leaves_the_readers_own_result(tmp_path, capsys):
    """In the spool or packed: the first stays, the other is named and stays where it is."""
    here, there = tmp_path / "here", tmp_path / "there"
    spooled, packed = seeds(2)
    pack(here, [packed])
    Store(here).put(fake(spooled))
    for run in (spooled, packed):
        Store(there).put(other_result(run))
    before = tree(there)
    assert Store(here).merge(there) == 0
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(":")[0] for line in said) == sorted(
        f"Two results of run {r.key}" for r in (spooled, packed)
    )
    assert all("; the first stays." in line and str(there) in line for line in said)
    assert Store(here).merge() == 1
    assert tree(there) == before
    for run in (spooled, packed):
        assert Store(here).get(run)["last_test_acc"] == fake(run)["last_test_acc"]


def test_an_own_result_that_differs_from_a_packed_one_is_kept_aside(tmp_path, capsys):
    there = tmp_path / "there"
    pack(there, [DENSE])
    Store(tmp_path).put(other_result(DENSE))
    shard = next(there.glob("*.parquet"))
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    assert Store(tmp_path).merge() == 0
    assert "Two results of run" in capsys.readouterr().err
    assert (tmp_path / ".spool" / f"{DENSE.key}.conflict").exists()
    assert Store(tmp_path).merge() == 0
    assert not capsys.readouterr().err
    assert Store(tmp_path).get(DENSE)["last_test_acc"] == fake()["last_test_acc"]

    first = (tmp_path / ".spool" / f"{DENSE.key}.conflict").read_bytes()
    (tmp_path / shard.name).rename(tmp_path / "away")
    Store(tmp_path).put({**other_result(DENSE), "early_stop_step": 30})
    (tmp_path / "away").rename(tmp_path / shard.name)
    Store(tmp_path).merge()
    assert (tmp_path / ".spool" / f"{DENSE.key}.conflict").read_bytes() == first
    assert (tmp_path / ".spool" / f"{DENSE.key}.2.conflict").exists()


def test_a_shard_is_named_by_a_date_and_by_nothing_else_of_a_row(tmp_path):
    mine = tmp_path / "mine"
    Store(mine).put(fake(started="../../../x"))
    assert Store(mine).merge() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    [path] = mine.glob("*.parquet")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[0-9a-f]{8}\.parquet", path.name)


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_come_back_as_they_were_saved(tmp_path):
    tensors = {
        "b": torch.randn(3, 2),
        "mask/a": torch.tensor([True, False]),
        "n": torch.tensor(3),
        "h": torch.ones(2).half(),
    }
    sha = Store(tmp_path).save_artifact("key", tensors)
    loaded, again = Store(tmp_path).load_artifact("key")
    assert (again, loaded.keys()) == (sha, tensors.keys())
    assert all(torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype for name, t in tensors.items())


def test_weights_of_another_run_are_refused(tmp_path):
    mine = Store(tmp_path)
    for key in ("one", "two"):
        mine.save_artifact(key, {"w": torch.randn(2)})
    one, two = mine.artifact("one"), mine.artifact("two")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    for key in ("one", "two"):
        with pytest.raises(ValueError, match=r"^Damaged weights .*: set aside; run again, "):
            mine.load_artifact(key)


def test_weights_that_are_gone_are_not_said_to_be_set_aside(tmp_path):
    with pytest.raises(store.DamagedWeights, match=r"^No weights .*key\.safetensors: run again, "):
        Store(tmp_path).load_artifact("key")
    assert not list(tmp_path.rglob("*.damaged"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_every_damaged_byte_of_weights_is_seen(tmp_path_factory, data):
    """Any byte anywhere, header included: what loads is what was saved."""
    mine = Store(tmp_path_factory.mktemp("weights"))
    tensors = {"w": torch.arange(6.0).view(2, 3), "mask/w": torch.ones(2, 3, dtype=torch.bool)}
    mine.save_artifact("key", tensors)
    content = bytearray((path := mine.artifact("key")).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded, _ = mine.load_artifact("key")
    except ValueError:
        return
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], t) and loaded[name].shape == t.shape for name, t in tensors.items())


def test_a_table_of_something_else_with_keys_is_told_of_once(tmp_path, capsys):
    pq.write_table(pa.table({"key": [1, 2, 3], "value": [4, 5, 6]}), other := tmp_path / "other.parquet")
    store = Store(tmp_path)
    assert store.rows() == {}
    assert store.merge() == 0
    assert set(capsys.readouterr().err.splitlines()) == {
        f"{other} is no result: no key in it is that of a run; it is passed over."
    }


@pytest.mark.parametrize("where", ["", ".spool", ".checkpoints"])
def test_a_file_in_the_place_of_a_folder_is_told_before_any_training(tmp_path, where):
    (tmp_path / where).parent.mkdir(exist_ok=True)
    name = tmp_path / (where or "file")
    name.write_text("mine")
    text = f"^{re.escape(f'Invalid results folder {name}: it is a file; name a folder.')}$"
    with pytest.raises(NotADirectoryError, match=text):
        Store(tmp_path if where else name / "below")


def test_one_more_store_to_read_may_be_given_alone(tmp_path):
    assert Store(tmp_path, tmp_path / "a").also == Store(tmp_path, str(tmp_path / "a")).also == [tmp_path / "a"]


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_half_written_files_of_another_clock_are_swept(tmp_path, seconds):
    (left := tmp_path / ".left.tmp").write_bytes(b"")
    os.utime(left, (time.time() + seconds,) * 2)
    Store(tmp_path).sweep()
    assert not left.exists()


def test_the_checkpoint_of_a_stored_run_is_kept_for_a_week(tmp_path):
    """Its weights may be what is trained again, as in a clone, where they are missing."""
    (store := Store(tmp_path)).put(fake())
    (path := store.checkpoint(DENSE.key)).parent.mkdir()
    path.write_bytes(b"")
    for days, kept in ((6, True), (8, False)):
        os.utime(path, (time.time() - days * 86_400,) * 2)
        Store(tmp_path).sweep()
        assert path.exists() == kept
