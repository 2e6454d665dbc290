"""What is committed below results/: every row of every shard is sound, and what is damaged is named."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lottery import scorecard
from lottery.data import SETS
from lottery.experiments import Store

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
    """Its columns repeat its specification, it comes from the papers' own data or the digits, and from the past."""
    now = datetime.now(UTC)
    for key, row in rows.items():
        spec = json.loads(row["spec"])
        assert row["dataset"] in SETS, key
        assert spec.get("dataset", row["dataset"]) == row["dataset"], key
        assert row["fingerprint"] == scorecard.FINGERPRINTS.get(row["dataset"], row["fingerprint"]), key
        assert datetime.fromisoformat(row["started"]) < now, key
        assert row["status"] in ("finished", "diverged"), key
        for kept, n in json.loads(row["layers"]).values():
            assert 0 <= kept <= n, key
