"""What is committed below results/: every row of every shard is sound, and what is damaged is named."""

import itertools
import json
import os
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lottery import scorecard
from lottery.batches import take
from lottery.data import SETS
from lottery.dynamic import GMP
from lottery.experiments import PAPERS, Run, Store, engine, papers, work
from lottery.experiments.runs import key_of
from lottery.methods import Method

RESULTS = Path(__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def rows():
    """Every committed row; one that is damaged would be left out with a warning, which is an error here."""
    return Store(RESULTS / "ours").rows()


def test_every_committed_row_is_sound_and_is_stored_once(rows):
    keys = Counter(key for path in RESULTS.glob("ours/*.parquet") for key in pq.read_table(path)["key"].to_pylist())
    spooled = {path.stem for path in RESULTS.glob("ours/.spool/*.parquet")}
    assert set(rows) - spooled <= set(keys)
    assert set(keys) <= set(rows)
    assert max(keys.values()) == 1


def test_every_committed_row_says_what_it_is(rows):
    """Its columns repeat its specification, it comes from the papers' own data or the digits, and from the past.

    Its key follows from its specification and from what are the defaults of today.
    """
    now = datetime.now(UTC)
    for key, row in rows.items():
        spec = json.loads(row["spec"])
        assert row["dataset"] in SETS, key
        assert key_of(spec) == key
        assert {"model", "dataset", "seed"} <= spec.keys(), key
        for name in ("model", "dataset", "seed"):
            assert spec[name] == row[name], (key, name)
        measured = "measurement" in spec  # what is said of a training there is of those that it compares
        for name in ("init", "draw", "parent"):
            assert row[name] == (None if measured else spec.get(name, row[name])), (key, name)
        iterations = spec.get("recipe", {}).get("iterations", row["iterations"])
        assert row["iterations"] == (None if measured else iterations), key
        assert row["fingerprint"] == scorecard.FINGERPRINTS.get(row["dataset"], row["fingerprint"]), key
        assert datetime.fromisoformat(row["started"]) < now, key
        assert row["status"] in ("finished", "diverged"), key
        layers = json.loads(row["layers"])
        for kept, n in layers.values():
            assert 0 <= kept <= n, key
        assert set(spec.get("layers") or layers) == set(layers), key


@pytest.mark.slow
@pytest.mark.skipif("LOTTERY_DATA" not in os.environ, reason="needs real data: set LOTTERY_DATA")
def test_a_training_of_every_kind_begins_today_as_the_stored_one_did(rows):
    """From the same θ₀ with the same layers pruned: the cheapest part of an audit, on the newest of each kind."""
    kinds, store = {}, Store(RESULTS / "ours")
    for paper, scale in itertools.product(PAPERS, ("primary", "laptop")):
        module = papers.paper(paper)
        todo = module.runs(None, scale) if scale in module.scales else []
        while todo:
            r = todo.pop()
            todo += engine.needs(r)
            if isinstance(r, Run) and not r.parent and r.key in rows:
                how = [getattr(r.method, name, None) for name in ("granularity", "budget")]
                kind = (paper, type(r.method), r.model, r.dataset, r.options, bool(r.layers), r.density and r.criterion)
                kind = (*kind, isinstance(r.density, tuple), *how)
                kinds[kind] = max(kinds.get(kind, r), r, key=lambda r: rows[r.key]["started"])
    assert len(kinds) > 50
    for r in kinds.values():
        images = take(work.images_of(r.dataset, r.valid, r.balanced, r.split_seed), r.train_fraction)
        given, net = work.prepare(r, images, store)
        masks, layers = given.method.masks(net.model), json.loads(rows[r.key]["layers"])
        assert {name: m.numel() for name, m in masks.items()} == {name: n for name, (_, n) in layers.items()}, r
        if type(r.method).masks is Method.masks and not isinstance(r.method, GMP):  # else they move
            assert {name: int(m.sum()) for name, m in masks.items()} == {name: k for name, (k, _) in layers.items()}, r
        assert net.hashes["theta0"] == json.loads(rows[r.key]["certificate"])["theta0"], r


def cut(text):
    return text[: len(text) // 2]


def without_a_row(text):
    lines = text.splitlines(keepends=True)
    return "".join(lines[:1] + lines[2:])


def another_number(text):
    """The last figure of a file, one more."""
    at = max(i for i, letter in enumerate(text) if letter in "12345678")
    return text[:at] + str(int(text[at]) + 1) + text[at + 1 :]


@pytest.mark.parametrize("damage", [cut, without_a_row, another_number])
@pytest.mark.parametrize("path", sorted(RESULTS.glob("reported/*.csv")), ids=lambda path: path.stem)
def test_a_damaged_file_of_printed_numbers_or_rules_is_named(path, damage, tmp_path):
    shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
    paper, _, kind = path.stem.partition("_")
    kind = f"_{kind}" if kind else ""
    assert len(scorecard.read(paper, kind, tmp_path))
    (tmp_path / path.name).write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=rf"^Damaged [^\n]*{path.name}: it is not what SHA256SUMS says [^\n]*$"):
        scorecard.read(paper, kind, tmp_path)


def test_a_file_that_cannot_be_read_is_named_without_checksums_too(tmp_path):
    shutil.copy(RESULTS / "reported/lth_claims.csv", tmp_path)
    (tmp_path / "lth.csv").write_text('item,value\n"Figure 3,1\n')
    with pytest.raises(ValueError, match=r"^Damaged [^\n]*lth\.csv: [^\n]*$"):
        scorecard.reported("lth", tmp_path)
    (tmp_path / "lth.csv").write_text("item,value\nFigure 3,1x\n")
    with pytest.raises(ValueError, match=r"^Damaged [^\n]*lth\.csv: [^\n]*1x[^\n]*$"):
        scorecard.reported("lth", tmp_path)
