"""The GraSP chapter without training: the paper's numbers and the rules, the measurements, the toy."""

from pathlib import Path

import pytest

from lottery import claims

REPORTED = Path(__file__).parents[1] / "results" / "reported"


@pytest.fixture(scope="module")
def printed():
    return claims.reported("grasp", REPORTED)


@pytest.fixture(scope="module")
def rules():
    return claims.claims("grasp", REPORTED)


# The paper's numbers and the rules ------------------------------------------------------------------------------------


def test_every_number_has_a_source_and_remembered_ones_are_no_targets(printed, rules):
    assert printed["value"].notna().all()
    assert (printed["source"] != "").all()
    assert not printed.duplicated(["item", "panel", "series", "x"]).any()
    memory = printed[printed["provenance"] == "memory"]
    assert set(memory["source"]) == {"remembered, not verified"}
    remembered = set(zip(memory["series"], memory["x"].astype(str), strict=True))
    for c in rules[rules["kind"] == "value"].to_dict("records"):
        assert (c["arm_a"], str(float(c["x"] or "nan"))) not in remembered


def test_values_and_differences_of_claims_are_those_printed(printed, rules):
    own = printed[(printed["provenance"] == "paper") & (printed["unit"] == "%")]
    value = {
        (i, s, x): v for i, s, x, v in zip(own["item"], own["series"], own["x"].fillna(-1), own["value"], strict=True)
    }
    for c in rules[rules["quantity"] == "test accuracy"].to_dict("records"):
        x = float(c["x"] or -1) if ";" not in c["x"] else None
        if c["kind"] == "value":
            assert c["paper_value"] == value[c["item"], c["arm_a"], x]
        elif c["item"] in ("Table 2", "Tiny-ImageNet table"):
            difference = value[c["item"], c["arm_a"], x] - value[c["item"], c["arm_b"], x]
            assert difference > 0
            assert c["delta"] == c["paper_value"] == pytest.approx(difference)


def test_primary_claims_are_those_of_the_rules(rules):
    primary = rules[rules["primary"] == 1]
    signs = primary[primary["id"].str.endswith("-ahead")]
    assert len(signs) == 18
    snip = {c.removeprefix("grasp-").removesuffix("-snip-ahead") for c in signs["id"] if c.endswith("snip-ahead")}
    assert snip == {
        *("table2-vgg19-c10-90", "table2-vgg19-c10-95", "table2-vgg19-c100-90", "table2-vgg19-c100-95"),
        *("table2-resnet32-c10-90", "tiny-imagenet-vgg19-tiny-90"),
    }
    rest = sorted({c["id"].split("-")[1] for c in primary.to_dict("records")} - {"table2", "tiny"})
    assert rest == ["fig2", "robust", "table1"]  # training loss and gradient norm; robust; ahead of random
    assert len(primary) == 18 + 4 + 2 + 8


def test_every_figure_and_table_has_a_row(rules):
    tables = {"Table 1", "Table 2", "Tiny-ImageNet table", "ImageNet table", "Initialisation and batch size"}
    assert set(rules["item"]) == {"Figure 1", "Figure 2", "Figure 3"} | tables
    assert rules["id"].is_unique
    assert rules["id"].str.startswith("grasp-").all()
    assert (rules["added"] == "2026-11-21").all()
