"""Runs that take a parent's densities in place of its weights."""

import json
from dataclasses import replace

import pytest
from small_runs import train

from lottery import baselines, models
from lottery.experiments import Store
from lottery.experiments.runs import Run
from lottery.soft_threshold import STR
from lottery.training import Recipe

RECIPE = Recipe(
    optimizer="sgd", lr=0.1, momentum=0.9, batch_size=64, iterations=60, eval_every=30, weight_decay=5e-3,
    inputs="standard",
)  # fmt: skip
LEARNT = Run(
    model="resnet8", dataset="digits", valid=0, options=(("width", 4),), recipe=RECIPE, method=STR(s_init=-8.0)
)
TAKES = replace(LEARNT, parent=LEARNT, method=Run().method)


def kept(store, run):
    return {name: tuple(pair) for name, pair in json.loads(store.get(run)["layers"]).items()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    takers = [replace(TAKES, budget="layers"), replace(TAKES, budget="total", criterion="random")]
    train([*takers, replace(TAKES, budget="erk")], folder)
    return Store(folder)


def test_a_budget_is_the_parents_layer_by_layer(store):
    learnt = kept(store, LEARNT)
    assert 0 < sum(k for k, _ in learnt.values()) < sum(n for _, n in learnt.values())
    assert kept(store, replace(TAKES, budget="layers")) == learnt


def test_the_total_is_kept_and_may_be_shared_out_by_erk(store):
    learnt = kept(store, LEARNT)
    total, n = (sum(pair[i] for pair in learnt.values()) for i in (0, 1))
    uniform = kept(store, replace(TAKES, budget="total", criterion="random"))
    assert {name: k for name, (k, _) in uniform.items()} == {
        name: max(1, round(total / n * size)) for name, (_, size) in learnt.items()
    }
    erk = kept(store, replace(TAKES, budget="erk"))
    wanted = baselines.erk(models.create("resnet8", width=4, in_shape=(1, 8, 8)), total / n)
    assert {name: k for name, (k, _) in erk.items()} == {
        name: pytest.approx(wanted[name] * size, abs=0.51) for name, (_, size) in erk.items()
    }


def test_the_parents_weights_are_not_kept_for_a_budget(store):
    assert not store.artifact(LEARNT.key).exists()
    assert store.get(replace(TAKES, budget="layers"))["parent"] == LEARNT.key


def test_a_budget_needs_a_parent_and_the_first_values():
    for wrong in ({"parent": None}, {"init": "continue"}):
        with pytest.raises(
            ValueError, match=r"^Invalid budget 'layers': it is taken from a parent, with init 'reset'\.$"
        ):
            replace(TAKES, budget="layers", **wrong)
    with pytest.raises(ValueError, match=r"^Invalid budget 'all': give one of , layers, total, erk\.$"):
        replace(TAKES, budget="all")
