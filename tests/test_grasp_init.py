"""The GraSP chapter without training: the paper's numbers and the rules, the measurements, the toy."""

import functools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from lottery import baselines, experiments, grasp, scorecard
from lottery import masks as M
from lottery.experiments import Store
from lottery.experiments import grasp_init as G

REPORTED = Path(__file__).parents[1] / "results" / "reported"


@pytest.fixture(scope="module")
def printed():
    return scorecard.reported("grasp", REPORTED)


@pytest.fixture(scope="module")
def rules():
    return scorecard.claims("grasp", REPORTED)


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


# The toy of figure 1 --------------------------------------------------------------------------------------------------


def test_the_toy_by_hand():
    """L = softplus(−z), z = v·h, δ = L′(z); ‖g‖² = δ²N with N = 2(v₁² + v₂²) + h₁² + h₂², all inputs 1."""
    (v1, v2), (h1, h2), (a1, a2, b) = (1, 1), (0, 1), (1, -1, 0.5)
    p = 1 / (1 + math.exp(-(v1 * h1 + v2 * h2)))
    d, d2, N = p - 1, p * (1 - p), 2 * (v1**2 + v2**2) + h1**2 + h2**2
    behind = [v1 * (d * d2 * h1 * N + 2 * d**2 * v1), v2 * (d * d2 * h2 * N + 2 * d**2 * v2)]
    front = [[a * (d * d2 * v1 * N + d**2 * h1) for a in (a1, a2)], [b * (d * d2 * v2 * N + d**2 * h2)] * 2]
    score, kept, flow = G.toy("grasp")
    assert score["incoming"].numpy() == pytest.approx(np.array(front))
    assert score["outgoing"].numpy() == pytest.approx(np.array([behind]))
    assert not kept["incoming"][0, 0]
    assert flow == [0, pytest.approx(-0.5)]  # without a₁ it is h₁ = −1, so z = 0 and δ·v₁ = −1/2


def test_snip_blocks_the_flow_of_the_toy():
    score, kept, flow = G.toy("snip")
    assert score["outgoing"][0, 0] == 0
    assert [int((~m).sum()) for m in kept.values()] == [0, 1]
    assert flow == [0, 0]


# Prunings -------------------------------------------------------------------------------------------------------------

TINY = G.Pruning("lenet_300_100", "digits", (), per_class=4, augment=False)


def labels(chunks):
    return [y.tolist() for _, y in chunks]


def test_whatever_the_chunks_the_images_are_the_same():
    def pixels(p):
        return torch.cat([x for x, _ in p.batches()]).flatten(1).sort(0)[0]

    halves, shuffled, one = TINY, replace(TINY, class_sorted=False), replace(TINY, chunks=1)
    first, second = labels(halves.batches())
    assert first == [c for c in range(5) for _ in range(4)]
    assert labels(one.batches()) == [first + second]
    a, b = labels(shuffled.batches())
    assert sorted(a + b) == first + second
    assert len(set(a)) > 5
    assert [len(y) for y in labels(replace(TINY, chunks=4).batches())] == [10] * 4
    for other in (shuffled, one):
        assert torch.equal(pixels(halves), pixels(other))
    assert not torch.equal(pixels(halves), pixels(replace(TINY, batch=1)))


def test_criteria_score_the_same_copy_and_only_its_classifier_is_another():
    conv = replace(TINY, model="conv2")
    net, copy, other = conv.network(), conv.copy(conv.network()), replace(conv, criterion="snip").copy(conv.network())
    assert [torch.equal(net.get_submodule(n).weight, copy.get_submodule(n).weight) for n in ("conv1", "conv2")] == [
        True
    ] * 2
    assert not torch.equal(net.fc1.weight, copy.fc1.weight)
    assert torch.equal(other.fc1.weight, copy.fc1.weight)


@pytest.mark.parametrize("criterion", ["grasp", "snip", "random"])
def test_a_measured_mask_is_the_one_of_top_k(criterion):
    p = replace(TINY, criterion=criterion, density=0.1)
    expected = M.top_k(p.scores(), 0.1)
    row = p.measure()
    assert json.loads(row["layers"]) == {name: [int(m.sum()), m.numel()] for name, m in expected.items()}
    assert row["sketch"] == G.sketch(expected)
    assert row["density"] == pytest.approx(0.1, abs=1e-5)


def test_gradient_norms_are_of_the_kept_weights_of_both_networks():
    p = replace(TINY, density=0.1, images=200)
    values, m = json.loads(p.measure()["values"]), M.top_k(p.scores(), 0.1)
    order = torch.randperm(1347, generator=G._generator("gradient", 0))[:200]
    chunks = [G._standardised(G._images("digits"), part) for part in order.split(128)]
    for name, net in (("gradient_norm", p.network()), ("copy_gradient_norm", p.copy(p.network()))):
        assert values[name] == pytest.approx(grasp.gradient_norm(M.attach(net, m), chunks), rel=1e-5)
        assert values[f"{name}_squared"] == pytest.approx(values[name] ** 2)
    dense = json.loads(replace(p, criterion="dense").measure()["values"])
    assert dense["gradient_norm"] == pytest.approx(grasp.gradient_norm(p.network(), chunks), rel=1e-5)


def test_gradient_flow_is_the_kernel_along_the_output_gradient():
    net, (x, y) = TINY.network().double(), [t[:6] for t in TINY.batches()[0]]
    values = G.kernel(net, net, x.double(), y)
    assert values["kernel_along_gradient"] == pytest.approx(grasp.gradient_norm(net, [(x.double(), y)]) ** 2)
    assert values["kernel_along_dense"] == values["kernel_along_gradient"]
    assert values["kernel_trace"] == pytest.approx(float(grasp.ntk(net, x.double()).trace()))


def test_overlap_of_sketches():
    a = {"w": torch.zeros(400, 500, dtype=torch.bool)}
    b = {"w": torch.zeros(400, 500, dtype=torch.bool)}
    a["w"][:100], b["w"][50:150] = True, True
    assert G.overlap(G.sketch(a), G.sketch(a)) == 1
    assert G.overlap(G.sketch(a), G.sketch(b)) == pytest.approx(0.5, abs=0.02)
    b["w"] = ~a["w"]
    assert G.overlap(G.sketch(a), G.sketch(b)) == 0


def test_relative_is_paired_by_trial_and_network():
    frame = pd.DataFrame(
        {"net": ["a", "a", "a", "a", "b", "b"], "seed": [0, 0, 1, 1, 0, 0], "criterion": ["dense", "snip"] * 3,
         "gradient_norm": [2.0, 1.0, 4.0, 1.0, 8.0, 4.0]}
    )  # fmt: skip
    assert G.relative(frame)["ratio"].tolist() == [0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("field", "value"),
    [("criterion", "synflow"), ("images", -1), ("seed", 0.5), ("chunks", 0), ("chunks", 3), ("kernel", True)],
)
def test_a_bad_field_is_one_line(field, value):
    with pytest.raises(ValueError, match=rf"^Invalid {field} [^\n]*$"):
        replace(TINY, **{field: value})


# The store ------------------------------------------------------------------------------------------------------------


def test_a_measurement_is_computed_once_kept_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    store, runs = (
        Store(tmp_path),
        [replace(TINY, criterion=c, density=d) for c in ("snip", "grasp") for d in (0.1, 0.05)],
    )
    assert experiments.run(runs, store=store, progress=False) == []
    assert store.merge() == 4
    monkeypatch.setattr(G.Pruning, "measure", None)
    assert experiments.run(runs, store=Store(tmp_path), progress=False, budget=60) == []
    frame = experiments.load(runs, Store(tmp_path))
    assert frame["key"].tolist() == [p.key for p in runs]
    assert not frame["stale"].any()
    assert frame["wall_s"].gt(0).all()
    certificate = json.loads(frame["certificate"][0])
    assert certificate["versions"] == {"grasp": grasp.VERSION, "baselines": baselines.VERSION}
    [shard] = tmp_path.glob("*.parquet")
    table = pq.read_table(shard)
    changed = [text.replace(", ", ",", 1) for text in table["layers"].to_pylist()]
    pq.write_table(table.set_column(table.schema.get_field_index("layers"), "layers", pa.array(changed)), shard)
    assert len(experiments.load(runs, Store(tmp_path))) == 0


def test_one_scoring_serves_all_densities_of_a_trial(monkeypatch):
    calls = []
    monkeypatch.setattr(G.Pruning, "scores", lambda self, device="cpu": calls.append(self) or {"w": torch.rand(100)})
    monkeypatch.setattr(G, "_scores", functools.lru_cache(2)(G._scores.__wrapped__))
    for density in (0.5, 0.2, 0.1):
        G._scores(replace(TINY, density=1.0), "cpu")
        assert replace(TINY, density=density).key != TINY.key
    assert len(calls) == 1


def test_published_keys_never_change():
    assert G.Pruning().key == "8df771463c99fa499992971f"
    assert G.NETS["vgg19-c100"].key == "a45cb0e58b5ff55c4f0c14b7"


def test_plans_name_every_pruning_once():
    for plan in G.PLANS.values():
        for item in G.ITEMS:
            labels = [tuple(cell.values()) for cell, _ in plan.cells(item)]
            assert len(set(labels)) == len(labels)
    assert {p.images for p in G.PLANS["paper"].prunings("fig2right")} == {50_000}


def test_parameters_of_the_notebook_change_what_is_measured():
    given = {"temperature": 1.0, "densities": [0.3], "trials": 1, "seed": 7, "criterion": "magnitude", "lr": 0.1}
    cells = G.PLANS["smoke"].changed(given).cells("fig2right")
    assert [(c["criterion"], c["sparsity"], c["seed"]) for c, _ in cells] == [
        *(("dense", 0, 7), ("grasp", 70, 7), ("snip", 70, 7), ("random", 70, 7)),
    ]
    assert [p.criterion for _, p in cells] == ["dense", "magnitude", "snip", "random"]
    assert {p.temperature for _, p in cells} == {1.0}


# The paper's own evidence ---------------------------------------------------------------------------------------------


def test_printed_tests_are_welch_and_holm(printed):
    found = G.printed_tests(printed).set_index(["net", "x"])
    assert len(found) == 18
    row = found.loc["vgg19-c100", 98.0]
    error = math.sqrt((0.47**2 + 1.10**2) / 3)
    assert row["t"] == pytest.approx((68.90 - 58.46) / error)
    freedom = error**4 / ((0.47**2 / 3) ** 2 / 2 + (1.10**2 / 3) ** 2 / 2)
    assert row["freedom"] == pytest.approx(freedom)
    assert row["p"] == pytest.approx(2 * stats.t.sf(row["t"], freedom))
    p = sorted(found["p"])
    passed = next(i for i, value in enumerate(p) if value > 0.05 / (18 - i))
    assert found["holm"].sum() == passed
    assert len(G.printed_tests(printed, b="random")) == 16


# The scorecard --------------------------------------------------------------------------------------------------------


def judged(store, id):
    return next(row for row in scorecard.scorecard("grasp", store, REPORTED)["rows"] if row["claim"] == id)


def test_the_toy_is_exact_and_needs_no_store(tmp_path):
    row = judged(Store(tmp_path), "grasp-fig1-snip-blocks")
    assert (row["evidence"], row["ours"], row["verdict"]) == ("exact", 1, "reproduced")


def test_measured_claims_read_the_measurements(tmp_path, monkeypatch):
    """Ten invented trials: GraSP keeps e times SNIP's gradient, on 128 images: reduced, so it supports."""
    monkeypatch.setattr(scorecard, "FINGERPRINTS", {"cifar10": "x"})
    store = Store(tmp_path)
    for i, p in enumerate(G.PLANS["laptop"].prunings("fig2right")):
        norm = {"grasp": math.e, "snip": 1.0, "random": 0.5, "dense": 0.8}[p.criterion] * (1 + 0.01 * (i % 3))
        values = json.dumps({"gradient_norm": norm, "copy_gradient_norm": norm})
        certificate = {"versions": {"grasp": grasp.VERSION, "baselines": baselines.VERSION}}
        store.put(
            {name: getattr(p, name) for name in ("key", "model", "dataset", "seed")}
            | {"status": "finished", "started": "2026-11-22T00:00:00+00:00", "device": "cpu", "fingerprint": "x"}
            | {"spec": json.dumps(p.spec()), "certificate": json.dumps(certificate), "values": values, "wall_s": 1.0}
        )
    row = judged(store, "grasp-fig2-norm-c10-grasp-above-snip")
    assert (row["evidence"], row["trials"], row["steps_fraction"]) == ("reduced", 10, None)
    assert row["ours"] == pytest.approx(math.e, rel=0.02)
    assert row["verdict"].startswith("supports")
    assert row["command"] == "lottery run grasp grasp-fig2-norm-c10-grasp-above-snip --scale laptop"
    assert judged(store, "grasp-fig2-norm-c100-grasp-above-snip")["evidence"] == "none"


def test_density_of_a_layer_is_read_in_percent():
    row = {"layers": json.dumps({"conv1": [3, 12]}), "values": "{}", "status": "finished"}
    assert scorecard.reading(row, "density of conv1", None) == 25
    assert scorecard.reading(row | {"values": '{"gradient_norm": 0.0}'}, "gradient norm", None) < -20
