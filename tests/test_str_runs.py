"""STR's experiments: what is declared, how λ is scaled, what is read of a stored run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import train

from lottery import scorecard
from lottery.experiments import Store, str_exact
from lottery.experiments import soft_threshold as E
from lottery.experiments.papers import paper
from lottery.methods import NOTHING
from lottery.soft_threshold import STR, decay_path

REPORTED = Path(__file__).parents[1] / "results/reported"
LAPTOP, PAPER = E.setting("laptop"), E.setting("paper")


def run(arm, level, at=LAPTOP, seed=0):
    [found] = E.trial(arm, at, seed, level)
    return found


def test_the_papers_recipe_is_the_authors_and_lambda_is_published():
    r = run("resnet50/str", "90.23", PAPER)
    assert (r.model, r.dataset, r.valid, r.recipe.iterations) == ("resnet50", "imagenet", 0, 500_500)
    assert r.recipe.weight_decay == pytest.approx(2.251757813e-5, rel=1e-4)
    assert r.method == STR(s_init=-3200.0)
    assert run("resnet50/dense", "dense", PAPER).recipe.weight_decay == pytest.approx(2**-15, rel=1e-4)
    assert len(E.runs("curve", replace(PAPER, trials=1))) == 1 + 16


@pytest.mark.parametrize("level", ["79.55", "94.80", "98.98"])
def test_a_stand_in_has_the_papers_onset_and_its_whole_decay(level):
    """λ · Σ lr / (1 − momentum) is the same, so s ends at the same value by decay alone."""
    r = run("resnet50/str", level)
    published, s_init = str_exact.settings("resnet50")[level]
    ours = decay_path(s_init, r.recipe)[-1]
    theirs = s_init * math.exp(-published * E.PULL)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert (r.recipe.iterations, r.recipe.lr_every, r.recipe.warmup) == (11_730, 391, 782)


def test_others_are_trained_at_what_strs_network_of_that_trial_ends_with():
    learnt = run("resnet50/str", "98.05", seed=3)
    for control, takes in [("gmp", "total"), ("dnw-budget", "layers"), ("rigl-erk", "erk")]:
        r = run(f"resnet50/{control}", "98.05", seed=3)
        assert (r.parent, r.budget, r.seed) == (learnt, takes, 3)
        assert r.recipe == run("resnet50/dense", "dense").recipe
    gmp = run("resnet50/gmp", "98.05").method
    assert (gmp.begin, gmp.end, gmp.every, gmp.rank) == (0.2, 0.8, 391, "step")


def test_low_rank_networks_take_the_ranks_and_nothing_else():
    learnt = run("fastgrnn-google12/str", "33")
    assert (learnt.layers, learnt.method.g, learnt.method.decay) == (("w.m", "u.m"), "exp", "thresholded")
    vanilla = run("fastgrnn-google12/lowrank", "33")
    assert (vanilla.parent, vanilla.budget, vanilla.method) == (learnt, "layers", NOTHING)
    assert vanilla.recipe.weight_decay == 0
    pull = sum(learnt.recipe.lr_at(t) for t in range(learnt.recipe.iterations))
    assert learnt.recipe.weight_decay * pull == pytest.approx(0.005 * 223 * (200 * 0.01 + 100 * 0.001), rel=1e-3)


def test_what_switches_str_off_is_one_setting_each():
    learnt = run("resnet50/str", "90.23")
    kept = run("resnet50@s-not-decayed/str", "90.23")
    assert kept == replace(learnt, method=replace(learnt.method, decay="weights"))
    assert run("resnet50@adam/str", "90.23").recipe.optimizer == "adam"
    assert run("resnet50@frozen/str", "98.05").method == STR(s_init=-12800.0, freeze=0.5, density=0.0195)
    assert E.trial("resnet50@-100/str", LAPTOP, 1, "90.23") == []  # tried at one seed


def test_every_claim_that_runs_decide_is_an_experiment():
    rules = scorecard.claims("str", REPORTED)
    judged = rules[rules["n"] > 0]
    assert len(judged) >= 25
    here = paper("str")
    for _, c in judged.iterrows():
        net = c["arm_a"].split("/")[0]
        for cell in c["x"].split(";"):
            for name, x in zip((c["arm_a"], c["arm_b"]), (cell.split("|")[0], cell.split("|")[-1]), strict=True):
                for arm in name.split(" - ") if name else ():
                    assert here.arm(arm, float(x), 0, "paper"), (c["id"], arm)
                    assert net == "mobilenetv1" or here.arm(arm, float(x), 0, "laptop"), (c["id"], arm)
        assert c["quantity"] in (*scorecard.READ, *E.READS), c["id"]


def test_overrides_scale_lambda_anew_and_refuse_what_is_not_there():
    longer = E.override(LAPTOP, iterations=60 * 391)
    assert run("resnet50/str", "90.23", longer).recipe.weight_decay < run("resnet50/str", "90.23").recipe.weight_decay
    assert run("resnet50/str", "90.23", E.override(LAPTOP, weight_decay=1e-3)).recipe.weight_decay == 1e-3
    assert run("resnet50/str", "90.23", E.override(LAPTOP, target_density=0.1)).method.density == 0.1
    assert E.override(LAPTOP) == LAPTOP
    for given, said in [
        ({"iterations": 10}, r"^Invalid iterations 10: give a whole number from 30\.$"),
        ({"g": "tanh"}, r"^Invalid g 'tanh'"),
        ({"densities": [0.1]}, r"^Unknown parameter 'densities' of str"),
        ({"trials": 0}, r"^Invalid trials 0"),
        ({"target_density": 2}, r"^Invalid target_density 2: give 0 < density <= 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            E.override(LAPTOP, **given)


# Reading runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """STR and GMP at its density, on the digits."""
    folder = tmp_path_factory.mktemp("ours")
    at = replace(E.setting("smoke"), trials=1)
    both = [run(f"resnet50/{c}", "90.23", at) for c in ("str", "gmp-budget")]
    train(both, folder)
    return [Store(folder).get(r) for r in both]


def test_a_budget_given_to_gmp_is_kept_to_the_weight(rows):
    assert rows[0]["density"] < 0.5
    learnt, given = (json.loads(row["layers"]) for row in rows)
    assert given == {name: [max(k, 1), n] for name, (k, n) in learnt.items()}
    full = E.macs_of("resnet8", "digits", (("init", "kaiming fan_in"), ("width", 4)))
    left = sum(full[name] * k / n for name, (k, n) in given.items())
    assert E.macs_left(rows[1]) == pytest.approx((left, sum(full.values())))


def test_what_the_claims_read_is_finite(rows):
    assert all(math.isfinite(read(rows[0])) for read in E.READS.values())


def test_readings_by_hand():
    """Two layers and a classifier over six readings."""
    numbers = {"density": [1, 1, 0.7, 0.4, 0.2, 0.1]}
    numbers |= {
        "threshold/a": [1e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3],
        "threshold/b": [1e-4, 1e-3, 1e-3, 2e-3, 2e-3, 4e-3],
    }
    numbers |= {"threshold/fc": [1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-3]}
    row = {"numbers": json.dumps(numbers)}
    read = {name.split()[0]: f(row) for name, f in E.READS.items() if "MACs" not in name}
    assert read["threshold"] == pytest.approx(math.log(4e-3 / 2e-3))  # of b, the middle layer
    assert read["sparsity"] == pytest.approx(30 - 45)
    assert read["other"] == pytest.approx(math.log(4))


def test_a_network_that_has_lost_every_weight_has_no_macs():
    """What is compared as a logarithm has no value there, and the claim's cell is not tested."""
    layers = {name: [0, 9] for name in E.macs_of("resnet8", "digits", ())}
    row = {"spec": json.dumps({"options": []}), "model": "resnet8", "dataset": "digits", "density": 0.0}
    row["layers"] = json.dumps(layers)
    assert math.isnan(E.READS["MACs"](row))
    assert math.isnan(E.READS["MACs per weight"](row))
    [name, *_] = layers
    row |= {"layers": json.dumps(layers | {name: [9, 9]}), "density": 0.01}
    assert E.READS["MACs"](row) > 0
