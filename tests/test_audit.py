"""lottery.experiments.audit: what is drawn, that it is trained from nothing, what counts as having come out again."""

import concurrent.futures as futures
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_runs import DENSE, ROOT, fake, train
from typer.testing import CliRunner

from lottery import cli
from lottery.experiments import Run, Store, audit, compare, engine

RECORD = {"packages": {"torch": "2"}, "device": "CPU", "processor": "a", "threads": 1, "compile": False}
RECORD |= {"versions": {}}


def row(accuracy=0.9, losses=(2.0, 1.0), precision="float32", **record):
    """A stored row, as far as it is compared; losses at steps 1 and 500."""
    return {
        "spec": json.dumps({"recipe": {"precision": precision}}), "fingerprint": "f", "last_test_acc": accuracy,
        "train_loss": json.dumps(dict(zip(("1", "500"), losses, strict=True))), "values": None,
        "certificate": json.dumps(RECORD | record),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "parents", "outcome", "reason"),
    [
        (row(), (), "identical", ""),
        (row(threads=2), (), "identical", ""),  # bit by bit though it need not be
        (row(0.9001), (), "miss", "last_test_acc otherwise, under the same record"),
        (row(0.9001, threads=2), (), "within tolerance", "threads 1 and 2"),
        (row(0.9001, processor="b"), (), "within tolerance", "processor a and b"),
        (row(0.9001, processor=None), (), "miss", "under the same record"),  # as far as it is told
        (row(0.9001, group=["a"], weights="f", code={}), (), "miss", "under the same record"),
        (row(0.9001, group=["a"] * 64), (), "within tolerance", "group 1 and 64"),
        (row(0.9001, resumed=[{"threads": 2}]), (), "within tolerance", "resumed None and [{'threads': 2}]"),
        (row(0.9001, later=3), (), "within tolerance", "later None and 3"),  # what a certificate does not tell yet
        (row(0.9031, threads=2), (), "miss", "under another record"),
        (row(0.9031, threads=2), ("miss",), "explained miss", "parents"),
        (row(0.9031, threads=2), ("within tolerance",), "miss", "under another record"),
        (row(0.9, (2.001, 1.0), threads=2), (), "within tolerance", "threads"),
        (row(0.9, (2.003, 1.0), threads=2), (), "miss", "train_loss otherwise, under another record"),
        (
            row(0.9, (2.003, 1.0), threads=2),
            ("within tolerance",),
            "within tolerance",
            "threads",
        ),  # another mask's loss
        (row(0.9, (2.0, 1.2), threads=2), (), "within tolerance", "threads"),  # after 500 steps they have parted
        (row(0.9001) | {"fingerprint": "g"}, (), "explained miss", "on other data"),
    ],
)
def test_what_counts_as_having_come_out_again(other, parents, outcome, reason):
    found = audit.compare(row(), other, parents)
    assert found["outcome"] == outcome
    assert reason in found["reason"]


def test_an_older_version_explains_a_miss():
    assert audit.compare(row(versions={"training": 0}), row(0.8))["outcome"] == "explained miss"


@pytest.mark.parametrize(
    ("kept", "signal", "outcome"),
    [(1999, 5.0, "within tolerance"), (1997, 5.0, "miss"), (2000, 5.004, "within tolerance"), (2000, 5.01, "miss")],
)
def test_elsewhere_a_measurement_agrees_in_its_values_and_in_what_it_keeps_of_a_layer(kept, signal, outcome):
    def measured(kept, signal, **record):
        found = {"layers": json.dumps({"fc": [kept, 9000]}), "values": json.dumps({"signal": signal, "all": [signal]})}
        return row(accuracy=None, **record) | {"train_loss": None} | found

    assert audit.compare(measured(2000, 5.0), measured(kept, signal, threads=2))["outcome"] == outcome


def test_of_many_columns_that_differ_three_are_named():
    one, other = (row() | dict.fromkeys("abcdef", i) for i in (1, 2))
    assert audit.compare(one, other)["reason"] == "stored with a, b, c and 3 more otherwise, under the same record"


def test_what_is_no_number_agrees_with_itself():
    """Without validation images there is no validation loss; each reading of the store makes such values anew."""
    one, other = (row() | {"last_val_loss": float("nan"), "val_loss": [float("nan"), 1.0]} for _ in range(2))
    assert audit.compare(one, other)["outcome"] == "identical"
    assert audit.compare(one, other | {"val_loss": [float("nan"), 2.0]})["outcome"] == "miss"


def test_a_beginning_is_compared_in_what_it_has():
    begun = {name: row()[name] for name in ("fingerprint", "certificate")}
    assert audit.compare(row(), begun | {"train_loss": '{"1": 2.0}'})["outcome"] == "identical"
    found = audit.compare(row(), begun | {"train_loss": '{"1": 2.1}'})
    assert (found["outcome"], found["accuracy"]) == ("miss", None)
    assert found["loss"] == pytest.approx(0.05)
    other = begun | {"certificate": row(threads=2)["certificate"], "train_loss": '{"1": 2.1}'}
    assert (
        audit.compare(row(), other, ["within tolerance"])["outcome"] == "explained miss"
    )  # nothing is left to compare


def test_bfloat16_parts_earlier_and_further():
    mine, other = row(precision="bfloat16"), row(0.91, precision="bfloat16", threads=2)
    assert audit.compare(mine, other)["outcome"] == "within tolerance"


def test_what_is_drawn_takes_turns_and_follows_from_the_commit():
    runs = {f"a{i}": audit.Declared("lth", "fig4", "full", None) for i in range(20)}
    runs |= {f"b{i}": audit.Declared("grasp", "table2", "full", None) for i in range(3)}
    first = audit.draw(runs, 6, "1234")
    assert sorted(key[0] for key in first) == ["a", "a", "a", "b", "b", "b"]
    assert first == audit.draw(dict(reversed(runs.items())), 6, "1234")
    assert first != audit.draw(runs, 6, "5678")
    assert len(audit.draw(runs, 30, "1234")) == 23


def test_the_commit_is_that_of_the_code_wherever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(audit.work, "code", lambda: {"commit": "0123"})
        assert audit.commit() == "0123"
        patch.setattr(audit.work, "code", lambda: {"commit": None})
        with pytest.raises(ValueError, match=r"^No commit to draw by: lottery is not run from a git clone\. Give"):
            audit.commit()


def test_how_far_trials_lie_apart_is_told_of_those_that_differ_in_their_seeds_alone(tmp_path):
    store = Store(tmp_path)
    dense = [replace(DENSE, seed=seed) for seed in range(3)]
    children = [Run(parent=r, seed=r.seed, recipe=r.recipe, dataset="digits") for r in dense]
    other = replace(children[2], rate=0.5)
    for r, hits in [*zip(dense, (9, 12, 18), strict=True), *zip(children, (3, 6, 6), strict=True), (other, 21)]:
        bits = np.packbits(np.arange(21) < hits).tobytes()
        store.put(fake(r, last_test_acc=hits / 21, last_correct=bits))
    spread = audit.spreads({r.key: audit.Declared("lth", "fig4", "none", r) for r in (*children, other)}, store)
    assert spread(dense[0]) == pytest.approx(100 / 21 * 21**0.5, abs=1e-4)  # of 9, 12, 18: √(16 + 1 + 25) / √2
    assert spread(children[1]) == pytest.approx(100 / 21 * 3**0.5, abs=1e-4)
    assert spread(other) is None


def test_parents_come_first():
    child = Run(parent=DENSE, recipe=DENSE.recipe, dataset="digits")
    assert list(audit.needed([child])) == [DENSE, child]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A ticket of two rounds and SNIP, on the digits; the weights that the ticket stands on are gone."""
    folder = tmp_path_factory.mktemp("results")
    small = replace(DENSE, recipe=replace(DENSE.recipe, iterations=20, inputs="standard"))
    one = replace(small, parent=small)
    two, snip = replace(one, parent=one), replace(small, criterion="snip", density=0.1)
    train([two, snip], folder)
    shutil.rmtree(folder / ".artifacts")
    return Store(folder), {r.key: audit.Declared("lth", "fig4", "none", r) for r in (two, snip)}, one


def test_stored_runs_come_out_again_from_nothing(stored):
    """Three trainings of the ticket and one of SNIP, bit by bit; what is on the way is compared as well."""
    store, known, _ = stored
    found = audit.audit(list(known), known, store, report=lambda _: None)
    assert [r["outcome"] for r in found] == ["identical"] * 4
    assert sorted(r["drawn"] for r in found) == [False, False, True, True]
    assert list(store.dir.glob(".artifacts/*")) == []
    said = audit.said(audit.record(found, store, "0123456789", False, 3.2))
    assert "2 of 4 stored results, drawn by the hash of commit 01234567 from 1 groups" in said
    assert "2 more on the way to them: 4 identical." in said


def test_the_first_steps_come_out_again(stored, monkeypatch):
    monkeypatch.setattr(audit, "PREFIX", 5)
    store, known, one = stored
    runs = [each.run for each in known.values()]
    rows = dict(audit._again(runs, audit._settings(runs, store, "cpu"), prefix=True))
    assert [len(json.loads(rows[r]["train_loss"])) for r in runs] == [3, 3]  # of steps 1, 2 and 5
    for r in (*runs, one):
        assert audit.compare(store.row(r.key), rows[r])["outcome"] == "identical"
    assert rows[one]["last_test_acc"] == store.row(one.key)["last_test_acc"]  # a parent is trained to its end


def test_a_result_that_does_not_come_out_is_exit_status_1(stored, monkeypatch, tmp_path):
    store, known, _ = stored
    wrong, row = min(known), Store.row

    def altered(self, key):
        found = row(self, key)
        return found | {"val_loss": [0.0]} if key == wrong and self.dir == store.dir else found

    monkeypatch.setattr(audit, "declared", lambda _: known)
    monkeypatch.setattr(engine, "processes", lambda n: engine._Here())
    with monkeypatch.context() as patch:
        patch.setattr(Store, "row", altered)  # what the store says, not what is trained
        told = call(wrong, "--commit", "ab", "--json", tmp_path / "audit.json", "--results-dir", store.dir)
    assert told.exit_code == 1
    [miss] = [run for run in json.loads((tmp_path / "audit.json").read_text())["runs"] if run["key"] == wrong]
    assert (miss["outcome"], miss["reason"]) == ("miss", "stored with val_loss otherwise, under the same record")
    far = "; apart: last test accuracy 0.00 points, first losses or values 0 of their size"
    begins = f"* lth fig4, {repr(known[wrong].run)[5:-1]}: miss, {miss['reason']}"
    assert f"{begins}{far} (`{wrong}`)." in audit.said(tmp_path / "audit.json")
    spread = audit.record([miss | {"accuracy": 0.75, "loss": None, "spread": 0.253}], store, "ab", False, 1.0)
    far = "; apart: last test accuracy 0.75 points (trials spread by 0.25, s.d.)"
    assert f"{begins}{far} (`{wrong}`).\n\nUnder another record" in audit.said(spread)
    unknown = audit.record([miss | {"accuracy": None, "loss": None}], store, "ab", False, 1.0)
    assert audit.said(unknown).endswith(f"{begins} (`{wrong}`).")
    assert call("--runs", 1, "--commit", "ab", "--results-dir", store.dir).exit_code == 0


def test_a_drawn_run_whose_row_is_damaged_is_a_miss(stored, monkeypatch):
    store, known, one = stored
    damaged, row = {max(known), one.key}, Store.row
    monkeypatch.setattr(Store, "row", lambda *a: None if a[0] is store and a[1] in damaged else row(*a))
    monkeypatch.setattr(engine, "processes", lambda n: engine._Here())
    found = {r["key"]: r for r in audit.audit(list(known), known, store, report=lambda _: None)}
    assert one.key not in found  # on the way, and not drawn
    miss = found.pop(max(known))
    assert (miss["outcome"], miss["reason"], miss["drawn"]) == ("miss", "its stored row is damaged", True)
    assert {r["outcome"] for r in found.values()} == {"identical"}
    assert min(known) in found


def test_a_chain_that_fails_takes_no_other_one_with_it(stored, monkeypatch):
    """In any way: its runs are told as not trained, and what came out so far is handed over after each chain."""
    store, known, _ = stored
    again, kept = audit._again, []

    def failing(runs, *args):
        if runs[0].criterion == "snip":
            raise MemoryError("no room\nfor it")
        return again(runs, *args)

    monkeypatch.setattr(audit, "_again", failing)
    monkeypatch.setattr(engine, "processes", lambda n: engine._Here())
    found = audit.audit(list(known), known, store, report=lambda _: None, keep=lambda found: kept.append(len(found)))
    assert sorted(kept) in ([1, 4], [3, 4])
    [failed] = [r for r in found if r["outcome"] == "not trained"]
    assert (known[failed["key"]].run.criterion, failed["reason"]) == ("snip", "MemoryError: no room")
    said = audit.said(audit.record(found, store, "0123456789", False, 3.2))
    assert "3 identical, 1 not trained." in said
    assert said.endswith(f"iterations: not trained, MemoryError: no room (`{failed['key']}`).")
    assert failed["outcome"] in audit.BAD


def test_what_is_kept_says_where_and_is_written_whole(stored, monkeypatch, tmp_path):
    monkeypatch.setattr(audit.work, "device_name", lambda device: f"name of {device}")
    kept = audit.record([], stored[0], "0123456789", False, 3.2, "cuda")
    assert kept["device"] == "name of cuda"
    audit.write(kept, tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text()) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_an_interrupted_audit_ends_its_workers_and_leaves_no_folder(stored, monkeypatch, tmp_path):
    """Interrupted while a worker is given its chain; a worker that is killed removes nothing itself."""
    store, known, _ = stored
    ended, started, released = [], threading.Event(), threading.Event()

    class Interrupted(futures.ThreadPoolExecutor):
        def submit(self, *args):
            job = super().submit(*args)
            assert started.wait(30)
            signal.raise_signal(signal.SIGINT)
            return job

        def shutdown(self, wait=True, kill_workers=False):
            ended.append(kill_workers)

    def begun(runs, folder, *args):
        Path(folder, "weights").write_bytes(b"some")
        started.set()
        released.wait(30)
        raise RuntimeError("killed")

    monkeypatch.setattr(audit.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(audit.work, "execute", begun)
    monkeypatch.setattr(engine, "processes", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            audit.audit(list(known), known, store, report=lambda _: None)
        assert ended == [True]
        assert list(tmp_path.iterdir()) == []
    finally:
        signal.signal(signal.SIGINT, before)
        released.set()


AUDIT = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from small_runs import DENSE, fake
from lottery.experiments import Store, audit
store, here = Store(sys.argv[2]), pathlib.Path(sys.argv[2], "pid")
store.put(fake())
def again(*_):
    here.with_suffix(".new").write_text(str(os.getpid()))
    here.with_suffix(".new").rename(here)
    time.sleep(600)
audit._again = again
audit.audit([DENSE.key], {DENSE.key: audit.Declared("lth", "fig4", "none", DENSE)}, store)
"""


@pytest.mark.slow
def test_the_worker_of_an_audit_ends_with_its_parent(tmp_path):
    psutil = pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", AUDIT, Path(__file__).parent, tmp_path], cwd=ROOT) as parent:
        while parent.poll() is None and not (tmp_path / "pid").exists():
            time.sleep(0.1)
        worker = psutil.Process(int((tmp_path / "pid").read_text()))
        parent.kill()
    _, left = psutil.wait_procs([worker], timeout=30)
    alive = [worker for worker in left if worker.status() != psutil.STATUS_ZOMBIE]
    for worker in alive:
        worker.kill()
    assert not alive


def call(*words):
    return CliRunner().invoke(cli.app, ["audit", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--runs", 0], "Invalid runs 0: give a whole number from 1."),
        (["--jobs", 0], "Invalid jobs 0: give a whole number from 1."),
        (["--json", "nowhere/audit.json"], "No folder nowhere: make it first, or name another file."),
        (["0123", "--commit", "ab"], "No declared run is stored under '0123': `lottery audit --list` names some."),
    ],
)
def test_bad_input_is_one_line(words, said, stored, monkeypatch):
    monkeypatch.setattr(audit, "declared", lambda _: {})
    told = call(*words, "--results-dir", stored[0].dir)
    assert (told.exit_code, told.stderr) == (2, f"lottery: {said}\n")


def test_what_is_declared_is_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "PAPERS", {"compare": "compare"})
    run = compare.runs("lenet", "smoke")[0]
    store = Store(tmp_path)
    store.put(fake(run))
    assert audit.declared(store) == {run.key: ("compare", "lenet-sparse", "none", run)}
    assert audit.seconds([run], store) == 1.5
    assert audit.said(tmp_path / "none.json").startswith("No audit is kept")
