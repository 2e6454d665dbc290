"""lottery.experiments.compare: every method on the same network, data, recipe and steps; what is read of the runs."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import train

from lottery import comparison, data, masks, models
from lottery.baselines import erk, synflow
from lottery.chapter import Chapter
from lottery.experiments import Store, compare, grasp, papers, work

LAPTOP, SMOKE = compare.setting("laptop"), compare.setting("smoke")


def only(arm, point, seed=0, at=LAPTOP):
    [run] = compare.trial(arm, at, seed, point)
    return run


def test_golden_keys():
    """Published keys never change: results that are stored under them would be lost."""
    assert only("lenet@default/dense", 1.0).key == "e373c5506c52f57f3f839412"
    assert only("lenet/dense", 1.0).key == "6fbd8523d191c2469d62cf7b"  # as it was tuned


# What is declared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["lenet", "resnet8"])
def test_all_methods_have_the_dense_network_and_its_recipe(net):
    """What is finally used is trained as the dense network is, but for what was tuned and STR's weight decay."""
    dense = only(f"{net}@default/dense", 1.0)
    for arm, _, point in compare.cells(net, LAPTOP):
        run = only(arm.replace("/", "@default/"), point)
        same = (
            "iterations",
            "batch_size",
            "lr",
            "momentum",
            "milestones",
            "augment",
            "precision",
            "optimizer",
            "inputs",
        )
        assert [getattr(run.recipe, name) for name in same] == [getattr(dense.recipe, name) for name in same], arm
        assert (run.model, run.dataset, run.options, run.valid) == (
            dense.model,
            dense.dataset,
            dense.options,
            dense.valid,
        )
        assert run.layers is None
        assert run.recipe.weight_decay == dense.recipe.weight_decay or arm.endswith("/str")


def test_resnet8_shares_grasps_runs():
    """The same Run under the same key: nothing is trained twice."""
    theirs = {r.key for r in grasp.runs("table2", "laptop")}
    arms = [f"resnet8/{method}" for method in ("grasp", "snip", "oneshot")]
    assert {only(arm, d).key for arm in arms for d in (0.1, 0.05, 0.02)} <= theirs
    assert only("resnet8/dense", 1.0).key in theirs


def test_iterative_pruning_passes_through_every_density():
    run, found = only("lenet/imp", 0.01), []
    while run.parent:
        found.append(run.density)
        run = run.parent
    assert found[::-1] == list(LAPTOP.nets["lenet"].levels)
    assert run == only("lenet@default/dense", 1.0)
    assert only("lenet/imp", 0.01).parent.parent == only("lenet/imp", 0.02)
    assert only("lenet/rewind", 0.2).rewind_to == round(6600 / 32)


def test_every_method_has_as_many_configurations():
    assert {len(set(configs)) for configs in compare.CONFIGS.values()} == {3}
    assert compare.CONFIGS.keys() == compare.METHODS.keys()
    tuned = {}
    for arm, _, point in compare.cells("lenet-tuning", LAPTOP):
        method = arm.split("/")[1]
        tuned.setdefault(method, {}).setdefault(arm, set()).add(only(arm, point, 100).key)
    assert {method: len(arms) for method, arms in tuned.items()} == dict.fromkeys(compare.METHODS, 3)
    for method, arms in tuned.items():
        assert not set.intersection(*arms.values()), method
    assert set(compare.seeds("lenet-tuning", LAPTOP)).isdisjoint(compare.seeds("lenet", LAPTOP))


def test_what_is_chosen_is_a_configuration():
    for chosen in compare.CHOSEN.values():
        assert all(config in compare.CONFIGS[method] for method, config in chosen.items())


def test_a_share_of_each_layer_is_the_field_s():
    run = only("lenet@share=erk/snip", 0.05)
    net = models.create("lenet_300_100", seed=0)
    assert dict(run.density) == pytest.approx(erk(net, 0.05))
    assert only("lenet@share=uniform/random", 0.05).density == (("fc1", 0.05), ("fc2", 0.05), ("fc3", 0.05))


def test_masks_are_stored_at_one_density_of_lenet():
    kept = {d: only("lenet/gmp", d).recipe.test_readings for d in LAPTOP.nets["lenet"].densities}
    assert kept == {0.2: "log", 0.1: "log", 0.05: "all", 0.02: "log", 0.01: "log"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ["imp", "magic"]}, "Unknown method 'magic'"),
        ({"methods": ["gmp@begin"]}, "Invalid options 'begin'"),
        ({"methods": ["gmp@rounds=3"]}, "Unknown option of gmp in 'rounds=3'"),
        ({"methods": ["imp@share=equal"]}, "Invalid share 'equal'"),
        ({"iterations": 2}, "Invalid iterations 2"),
        ({"trials": 0}, "Invalid trials 0"),
        ({"densities": [1.5]}, "Invalid densities"),
        ({"densities": []}, "Invalid densities"),
        ({"methods": []}, "Invalid methods"),
        ({"methods": "imp"}, "Invalid methods 'imp': give a list of names"),
        ({"methods": 5}, "Invalid methods 5"),
        ({"methods": [3]}, "Unknown method '3'"),
    ],
)
def test_a_bad_parameter_is_one_line(given, said):
    with pytest.raises(ValueError, match=said):
        compare.override(SMOKE, **given)


def test_a_reader_adds_a_method_and_a_network():
    at = compare.override(SMOKE, methods=["imp", "gmp@begin=0.1"], model="conv2")
    assert {arm for arm, _, _ in compare.cells("lenet", at)} == {"lenet/imp", "lenet@begin=0.1/gmp"}
    run = only("lenet@begin=0.1/gmp", 0.1, at=at)
    assert (run.model, run.method.begin, run.method.density) == ("conv2", 0.1, 0.1)
    at = compare.override(SMOKE, densities=[0.3])
    assert only("lenet/imp", 0.3, at=at).parent.density == 0.45


def test_a_reader_s_learning_rate_is_every_method_s():
    """Tuning chose another for some, which are not on equal terms then."""
    at = compare.override(SMOKE, lr=0.05, methods=["dense", "cs", "gmp@lr=0.01", "gmp", "gmp"])
    assert at.methods == ("dense", "cs", "gmp@lr=0.01", "gmp")
    rates = {arm: only(arm, point, at=at).recipe.lr for arm, _, point in compare.cells("lenet", at)}
    assert rates == {"lenet/dense": 0.05, "lenet/cs": 0.05, "lenet@lr=0.01/gmp": 0.01, "lenet/gmp": 0.05}
    assert comparison.configuration("lenet", "dense", at.asked) == "default"
    assert comparison.configuration("lenet", "dense", SMOKE.asked) == "learning rate 0.03"


def test_synflow_prunes_the_network_that_is_trained(tmp_path):
    run = only("lenet/synflow", 0.1, at=SMOKE)
    images = data.load("digits")
    found = masks.read(work.initialise(run, images, Store(tmp_path)).model)
    net = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))
    wanted = synflow(net, (1, 8, 8), 0.1, rounds=100)
    assert all((found[name] == wanted[name]).all() for name in wanted)
    other = dataclasses.replace(run, score=(("rounds", 10),))
    assert other.key != run.key
    with pytest.raises(ValueError, match="Unknown score 'per_class' of synflow: it takes rounds"):
        dataclasses.replace(run, score=(("per_class", 10),))


# What is read of the runs ---------------------------------------------------------------------------------------------


def test_between_two_runs_by_hand():
    """Half of the way from 1 % to 4 % on a log axis is 2 %."""
    assert compare.at_density(0.02, [0.04, 0.01], [90.0, 80.0]) == pytest.approx(85)
    assert compare.at_density(0.02, [0.04, 0.021, 0.01], [90.0, 88.0, 80.0]) > 87
    assert compare.at_density(0.02, [0.02, 0.01], [90.0, 80.0]) == 90
    assert compare.at_density(0.02, [0.05, 0.01], [90.0, 80.0]) is None  # too far apart
    assert list(compare.at_density(0.02, [0.04, 0.01], np.array([[2.0, 4.0], [0.0, 0.0]]))) == pytest.approx([1, 2])


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6), st.floats(1e-4, 1.0))
def test_never_beyond_the_runs(found, density):
    values = list(map(np.log, found))
    value = compare.at_density(density, [0.0, *found], [0.0, *values])
    outside = not min(found) <= density <= max(found)
    if outside and min(abs(np.log(np.array(found) / density))) > 2e-3:
        assert value is None
    if value is not None:  # what is linear in the logarithm is met
        assert value == pytest.approx(np.log(density), abs=2e-3)


@pytest.mark.parametrize(
    ("arm", "point", "cost"),
    [
        ("lenet/dense", 1.0, (1, 1)),
        ("lenet/snip", 0.05, (1, 1)),
        ("lenet/oneshot", 0.05, (2, 1)),
        ("lenet/imp", 0.2, (5, 1)),
        ("lenet/rewind", 0.2, (1 + 4 * (1 - 206 / 6600), 1 - 206 / 6600)),
        ("lenet/cs", 0.0, (2 - 206 / 6600, 1 - 206 / 6600)),
        ("lenet/gmp", 0.05, (1, 0.2)),
        ("lenet/rigl", 0.05, (1, 0.25)),
        ("lenet/set", 0.05, (1, 0)),
        ("lenet/str", 2.0, (1, 0)),
    ],
)
def test_costs_in_trainings(arm, point, cost):
    assert compare.cost(only(arm, point)) == pytest.approx(cost)


# What the runs say ----------------------------------------------------------------------------------------------------


def frame(densities=(0.1, 0.05), declared=2, **accuracies):
    """A frame as `comparison.networks` makes it, of {method: {density: one accuracy a trial}}."""
    rows = [
        {"method": method, "seed": seed, "x": density, "density": density, "test": accuracy}
        for method, by in accuracies.items()
        for density, trials in by.items()
        for seed, accuracy in enumerate(trials)
    ]
    found = pd.DataFrame(rows)
    found.attrs |= {"densities": densities, "trials": declared, "pairs": math.comb(len(accuracies), 2)}
    return found


BEST, SECOND, OTHER = [98.0, 98.1, 98.2, 98.1, 98.0], [98.0, 98.05, 98.25, 98.1, 98.05], [80.0, 85.0, 90.0, 84.0, 81.0]


def test_the_best_is_named_with_what_it_cost():
    found = frame(imp={0.1: BEST}, snip={0.1: OTHER}, cs={0.1: SECOND})
    for totals, said in (({"imp": 9, "snip": 1, "cs": 1.97}, "1.97 trainings; the others 1 to 9"),
                         ({"imp": 2, "snip": 2, "cs": 1}, "1 training; the others 2")):  # fmt: skip
        costly = found.assign(total=found["method"].map(totals))
        costly.attrs = found.attrs
        assert f"has **CS** ({said}); it is above" in comparison.said(costly, 0.1, 0.2)
    same = found.assign(total=1.0)
    same.attrs = found.attrs
    assert "has **CS**; it is above" in comparison.said(same, 0.1, 0.2)


def test_who_is_above_whom():
    found = frame(imp={0.1: BEST}, snip={0.1: OTHER}, cs={0.1: SECOND})
    words = comparison.matrix(comparison.pairs(found, 0.1, 0.2), ("imp", "snip", "cs"))
    assert (words["imp", "snip"], words["snip", "imp"], words["imp", "cs"]) == ("above", "below", "alike")
    assert comparison.said(found, 0.1, 0.2) == (
        "**10 %** (3 methods, 5 trials): the highest mean, 98.09 %, has **CS**; it is above SNIP; within 0.2 points of "
        "LTH iterative. Pairs told apart: 2 of 3."
    )
    assert comparison.winners(found, 0.2) == [
        comparison.said(found, 0.1, 0.2),
        "At 5 % fewer than two methods have the 2 trials that decide.",
    ]


def test_nothing_is_said_before_all_declared_trials():
    """The rule is of five trials; the first four are no smaller study, whatever they would say."""
    found = frame(declared=5, imp={0.1: BEST}, snip={0.1: OTHER[:4]})
    assert comparison.pairs(found, 0.1, 0.2) == []
    assert comparison.winners(found, 0.2) == ["At 10 and 5 % fewer than two methods have the 5 trials that decide."]
    found = frame(declared=5, imp={0.1: BEST}, snip={0.1: OTHER}, cs={0.1: [99.0] * 4})
    assert comparison.said(found, 0.1, 0.2) == (
        "**10 %** (2 methods, 5 trials): the highest mean, 98.08 %, has **LTH iterative**; it is above SNIP. "
        "Pairs told apart: 1 of 1."
    )


def test_holm_asks_more_of_more_pairs():
    """The same two methods, told apart alone, are not among many that do not differ."""
    a, b = [1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 1.6, 2.4, 2.9, 4.4]
    rng = np.random.default_rng(0)
    others = {f"gmp@begin=0.{i}": {0.1: list(rng.normal(3, 2, 5))} for i in range(8)}
    alone = comparison.pairs(frame(imp={0.1: a}, snip={0.1: b}), 0.1, 0.1)
    among = comparison.pairs(frame(imp={0.1: a}, snip={0.1: b}, **others), 0.1, 0.1)
    assert [p.word for p in alone] == ["above"]
    assert [p.word for p in among if {p.a, p.b} == {"imp", "snip"}] == ["open"]
    assert len(among) == 45
    early = frame(imp={0.1: a}, snip={0.1: b})  # before any of the others is trained
    early.attrs["pairs"] = 45
    assert [p.word for p in comparison.pairs(early, 0.1, 0.1)] == ["open"]


def test_when_the_mask_is_found_is_said_by_ranges_and_pairs():
    found = frame(imp={0.1: BEST}, cs={0.1: SECOND}, snip={0.1: OTHER}, gmp={0.1: [84.1, 84.0, 84.2, 84.1, 84.0]})
    assert comparison.timing(found, 0.1, 0.2) == (
        "**10 %, by when the mask is found**: after a training 98.08 to 98.09, before the training 84.00 and during "
        "the training 84.08 %. Told apart: after a training is above before the training in 2 of 2 pairs, below in 0; "
        "after a training is above during the training in 2 of 2 pairs, below in 0; before the training is above "
        "during the training in 0 of 1 pair, below in 0."
    )
    assert comparison.timing(frame(imp={0.1: BEST}, cs={0.1: SECOND}), 0.1, 0.2) is None


def test_only_trials_in_common_are_compared():
    found = comparison.pairs(frame(imp={0.1: [3.0, 4.0, 99.0]}, snip={0.1: [1.0, 2.5]}), 0.1, 0.1)
    assert [(p.n, p.d) for p in found] == [(2, 1.75)]


def test_a_method_without_a_density_is_read_between_its_own_runs():
    found = frame((0.02,), dense={1.0: [99.0]}, cs={0.04: [90.0], 0.01: [80.0]})
    found.loc[found["method"] == "cs", "x"] = np.nan
    assert comparison.at(found, "cs", 0.02) == {0: pytest.approx(85)}
    assert comparison.at(found, "cs", 0.05) == {}
    assert comparison.at(found, "dense", 0.02) == {0: 99.0}
    found["macs"] = [266_200.0, 0.04 * 266_200, 0.01 * 266_200]
    assert comparison.at(found, "cs", 0.02, "macs") == {
        0: pytest.approx(0.02 * 266_200)
    }  # dense layers: as many as weights


def test_layers_of_a_method_without_a_density_are_those_of_its_nearest_point():
    found = frame((0.02,), dense={1.0: [99.0]}, imp={0.1: [97.0], 0.02: [95.0]}, cs={0.03: [90.0, 91.0], 0.009: [80.0]})
    found["point"] = [1.0, 0.1, 0.02, 0.0, 0.0, -0.1]
    found["layers"] = [{"fc1": share} for share in (1.0, 0.1, 0.02, 0.02, 0.04, 0.009)]
    assert comparison.layers(found, 0.02) == {"imp": {"fc1": 0.02}, "cs": {"fc1": pytest.approx(0.03)}}
    assert comparison.layers(found, 0.3) == {}


def test_overlap_by_hand():
    """Of 4 and 4 weights kept in a layer of 8, 3 in common; by chance 2. A layer that both keep whole agrees anyway."""
    a = {"one": np.array([1, 1, 1, 1, 0, 0, 0, 0], bool), "two": np.ones(4, bool)}
    b = {"one": np.array([0, 1, 1, 1, 1, 0, 0, 0], bool), "two": np.ones(4, bool)}
    assert comparison.overlap(a, b) == (7 / 8, 6 / 8)


def test_what_is_tuned_is_chosen_by_validation():
    tried = {"gmp": {"default": 97.0, "lr=0.03": 98.0, "budget=global": None}, "l0": dict.fromkeys(("default", "x"))}
    assert comparison.chosen(tried) == {"gmp": "lr=0.03", "l0": "default"}
    assert comparison.chosen({"gmp": {"default": float("nan"), "lr=0.03": 10.0}}) == {"gmp": "lr=0.03"}


def test_what_is_written_down_as_chosen_is_what_the_stored_tuning_says(tmp_path):
    """Nothing is chosen of a method before all of its tuning is stored."""
    found = comparison.networks(Chapter("compare", "laptop", results_dir=tmp_path), "lenet-tuning")
    cells = compare.cells("lenet-tuning", compare.SETTINGS["laptop"])
    declared = Counter(arm.split("/")[1] for arm, _, _ in cells)
    stored = Counter(name.partition("@")[0] for name in found["method"])
    wanted = {m: c for m, c in comparison.chosen(comparison.tuned(found)).items() if stored[m] == declared[m]}
    assert wanted
    assert compare.CHOSEN["lenet"] == {method: config for method, config in wanted.items() if config != "default"}


def test_networks_are_read_with_their_costs(tmp_path):
    at = compare.override(SMOKE, trials=1, methods=("imp", "snip"))
    train(papers.paper("compare").runs("lenet", at), tmp_path)
    chapter = Chapter("compare", "smoke", results_dir=tmp_path, trials=1, methods=["imp", "snip"])
    found = comparison.networks(chapter, "lenet")
    assert (found.attrs["stored"], found.attrs["declared"], len(found)) == (4, 4, 4)
    cost = {(r["method"], r["density"]): r["mean"] for r in comparison.summary(found, "total")}
    assert cost == {("imp", 0.2): 3, ("imp", 0.1): 4, ("snip", 0.2): 1, ("snip", 0.1): 1}
    assert {len(list(layers)) for layers in found["layers"]} == {3}
    agree = comparison.overlaps(found, 0.2)
    assert set(agree) == {("imp", "snip")}
    assert all(0 < v < 1 for v in agree["imp", "snip"])
