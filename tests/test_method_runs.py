"""Runs of moving and drawn masks: through the engine and the store, on the digits."""

import json
from dataclasses import replace

import pytest
from small_runs import DENSE, train

from lottery import baselines, experiments, models
from lottery.dynamic import DNW, GMP, SET, RigL
from lottery.experiments import Run, Store
from lottery.stochastic import L0, FrozenCS, Supermask
from lottery.training import Recipe

SGD = Recipe(optimizer="sgd", lr=0.1, momentum=0.9, iterations=30, eval_every=10)
ERK = tuple(baselines.erk(models.create("lenet_300_100", in_shape=(1, 8, 8)), 0.1).items())
RANDOM = {"criterion": "random", "density": ERK}
CHANGES = {
    "gmp": {"method": GMP(0.1, every=5)},
    "gmp with a budget": {"method": GMP((("fc1", 0.05), ("fc2", 0.1)), every=5)},
    "dnw": {"method": DNW(0.1)},
    "set": {"method": SET(every=10), **RANDOM},
    "rigl": {"method": RigL(every=10), **RANDOM},
    "l0": {"method": L0()},
    "supermask": {"method": Supermask()},
    "frozen cs": {"method": FrozenCS(schedule="iteration")},
}
RUNS = {name: replace(DENSE, recipe=SGD, **changes) for name, changes in CHANGES.items()}


def test_keys_differ():
    at_defaults = [replace(DENSE, method=m) for m in (GMP(), DNW(), SET(), RigL(), L0(), Supermask(), FrozenCS())]
    assert len({run.key for run in [DENSE, *at_defaults, *RUNS.values()]}) == 1 + 7 + len(RUNS)
    assert RUNS["gmp"].spec()["method"]["is"] == "GMP"


def test_trains_goes_on_after_a_stop_and_loads(tmp_path):
    """What a killed process had finished is found; the rest is trained; a retraining finds each mask and weight."""
    runs = list(RUNS.values())
    assert set(train(runs[:3], tmp_path)) == set(runs[:3])
    assert set(train(runs, tmp_path)) == set(runs[3:])
    assert train(runs, tmp_path) == []
    frame = experiments.load(runs, Store(tmp_path)).set_index("key")
    assert set(frame["status"]) == {"finished"}
    for name, run in RUNS.items():
        row = frame.loc[run.key]
        layers = {layer: k / n for layer, (k, n) in json.loads(row["layers"]).items()}
        if name in ("gmp", "dnw", "set", "rigl"):
            assert row["density"] == pytest.approx(0.1, abs=1e-4)
        elif name == "gmp with a budget":
            assert list(layers.values()) == pytest.approx([0.05, 0.1, 1], abs=1e-4)
        else:
            assert 0 < row["density"] <= 1
    versions = [set(json.loads(c)["versions"]) for c in frame["certificate"]]
    assert sum("dynamic" in v for v in versions) == 5
    assert sum("stochastic" in v for v in versions) == 3


@pytest.mark.parametrize("name", ["gmp", "dnw", "rigl", "supermask"])
def test_what_was_found_can_be_retrained(tmp_path, name):
    found = RUNS[name]
    ticket = Run(**{f: getattr(DENSE, f) for f in ("dataset", "recipe")}, parent=found, rate=0.0, rate_output=0.0)
    train([found, ticket], tmp_path)
    frame = experiments.load([found, ticket], Store(tmp_path)).set_index("key")
    assert frame.loc[ticket.key]["layers"] == frame.loc[found.key]["layers"]
