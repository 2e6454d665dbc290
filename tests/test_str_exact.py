"""What STR's published budgets and settings say, against the printed numbers and by hand."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lottery import scorecard
from lottery.experiments import str_exact as X

REPORTED = Path(__file__).parents[1] / "results/reported"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The exact rows of the scorecard, from an empty store."""
    card = scorecard.scorecard("str", tmp_path_factory.mktemp("ours"), REPORTED)
    return {row["claim"]: row for row in card["rows"] if row["evidence"] == "exact"}


def test_layers_are_those_of_the_authors_count():
    """conv1: 7·7·3 weights for each of 64 filters, at 112·112 places; its first depthwise layer: 9 for each of 32."""
    assert X.layers("resnet50")["conv1"] == (9_408, 9_408 * 112 * 112)
    assert X.layers("mobilenetv1")["model.1.0"] == (288, 288 * 112 * 112)
    assert sum(layer.macs for layer in X.layers("mobilenetv1").values()) == 568_740_352


def test_every_budget_names_every_layer():
    assert len(X.budgets("resnet50")) == 1 + 16 + 5
    assert set(X.budgets("mobilenetv1")) == {"dense", "89.01", "gmp"}
    for net in ("resnet50", "mobilenetv1"):
        assert all(list(kept) == list(X.layers(net)) for kept in X.budgets(net).values())
    with pytest.raises(ValueError, match=r"^Unknown budget '90' of resnet50: choose one of dense, 79\.55, .*gs\.$"):
        X.macs_left("resnet50", "90")


def test_the_uniform_budget_is_a_tenth_of_everything():
    assert X.macs_left("resnet50", "uniform") == pytest.approx(408.9184256)
    assert X.sparsity("resnet50", "uniform") == pytest.approx(90)
    assert X.backbone_sparsity("resnet50", "uniform") == pytest.approx(90)
    assert X.EXACT["MACs of a uniform budget, M"]("resnet50@90/gmp") == pytest.approx(408.9184256)


def test_columns_agree_but_for_one_slip():
    """4.47 million weights are printed at 81.27 %, where 4.776 are left."""
    wrong = {}
    for item, quantity in (
        ("Table 1", "MACs, M"),
        ("Table 1", "weights, M"),
        ("Table 6", "sparsity, %"),
        ("Table 6", "backbone sparsity, %"),
        ("Figure 5", "MACs, M"),
    ):
        found = X.column(item, quantity)
        assert len(found) == (13 if item == "Figure 5" else 16)
        wrong |= {(item, quantity, b): (p, round(ours, 3)) for b, p, ours, agrees in found if not agrees}
    assert wrong == {("Table 1", "weights, M", "81.27"): (4.47, 4.776)}


def test_a_changed_printed_number_is_seen(monkeypatch):
    read = X.scorecard.read

    def other(paper, kind=""):
        frame = read(paper, kind)
        if not kind:
            at = (frame["item"] == "Table 1") & (frame["panel"] == "MACs, M") & (frame["value"] == 343)
            frame.loc[at, "value"] = 345.0
        return frame

    monkeypatch.setattr(X.scorecard, "read", other)
    assert [budget for budget, *_, agrees in X.column("Table 1", "MACs, M") if not agrees] == ["90.23"]


def test_the_decay_law_is_a_sum_over_epochs():
    """λ · 5005 · Σ lr · 8: warm-up to 0.256 in five epochs, then a cosine over 95."""
    lr = [0.256 * (e + 1) / 5 for e in range(5)]
    lr += [0.256 * (1 + math.cos(math.pi * e / 95)) / 2 for e in range(95)]
    expected = [-3200 * math.exp(-2.251757813e-5 * 5005 * sum(lr[:e]) * 8) for e in range(101)]
    assert X.path("resnet50", "90.23") == pytest.approx(expected, rel=1e-12)
    assert sum(lr) == pytest.approx(13.056)


def test_figure_1_is_decay_alone_until_the_onset():
    s, drawn = X.path("resnet50", "90.23")[1:], X.figure1()
    assert np.isneginf(drawn[:24]).all()
    assert np.abs(s - drawn)[24:29].max() < 0.05  # epochs 25 to 29
    assert abs(s - drawn)[39] > 1  # by epoch 40 the data have their say


def test_crossings_are_interpolated_between_epochs():
    assert X.crossing([-40, -20, -10, -5]) == 2
    assert X.crossing([-40, -20, -5]) == pytest.approx(1.5)  # half way from 20 to 5 in the logarithm is 10
    assert math.isnan(X.crossing([-40, -20]))
    assert math.isnan(X.crossing([-5, -1]))


def test_all_21_settings_have_an_onset_and_their_order_is_that_of_the_sparsities():
    onsets = {net: [X.onset(net, budget) for budget in X.settings(net)] for net in ("resnet50", "mobilenetv1")}
    assert [len(found) for found in onsets.values()] == [16, 5]
    assert all(0 < t < 40 for found in onsets.values() for t in found)
    assert (X.in_order("resnet50"), X.in_order("mobilenetv1")) == ((42, 42), (3, 3))


def test_disagreements_are_these_and_no_others(rows):
    """Each is the paper's own arithmetic: see the chapter."""
    assert len(rows) >= 25
    assert len({row["item"] for row in rows.values()}) >= 10
    wrong = {name: (row["paper_value"], round(row["ours"], 2)) for name, row in rows.items() if "not" in row["verdict"]}
    assert wrong == {
        "str-fig5-saved-80": (60, 51.3),  # 818 − 766
        "str-fig5-erk-factor": (2.35, 2.42),
        "str-table1-weights": (16, 15),
        "str-table1-weights-81.27": (4.47, 4.78),
        "str-table1-rigl-80": (920, 912.25),
        "str-table1-erk": (960, 990.48),
        "str-table4-erk": (960, 990.48),
        "str-table9-weights": (2.42, 2.67),
    }


def test_soft_and_hard_thresholds():
    """Figure 10, α = 2."""
    found = {
        arm: X.EXACT["thresholded weight"](arm) for arm in ("toy@3/soft", "toy@3/hard", "toy@2/soft", "toy@-5/soft")
    }
    assert found == pytest.approx({"toy@3/soft": 1, "toy@3/hard": 3, "toy@2/soft": 0, "toy@-5/soft": -3}, abs=1e-6)


def test_points_and_claims_have_a_source_and_a_time():
    points, rules = scorecard.reported("str", REPORTED), scorecard.claims("str", REPORTED)
    assert (points["provenance"] == "paper").all()
    assert points["source"].str.len().gt(0).all()
    assert not points.duplicated(["item", "panel", "series", "x", "value"]).any()
    assert rules["id"].is_unique
    assert rules["id"].map(lambda name: bool(re.fullmatch(r"str-[a-z0-9.-]+", name))).all()
    for column in ("added", "since"):
        assert all(pd.Timestamp(t).tz is not None for t in rules[column])
    items = {f"Figure {i}" for i in range(1, 11)} | {f"Table {i}" for i in range(1, 13)}
    assert set(rules["item"]) == items
