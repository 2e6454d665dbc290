"""What is declared for the lottery ticket paper: figures, arms, densities, and runs that figures share."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import QUICK, REPORTED, child, equal, largest, message, theta_0, train

from lottery import data, models, scorecard
from lottery import masks as M
from lottery.experiments import Run, Store, engine, lth, work


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def lenet(at):
    """LeNet of a Setting, or of a scale."""
    return (lth.setting(at) if isinstance(at, str) else at).nets["lenet"]


# What is declared for the lottery ticket paper ------------------------------------------------------------------------


def test_laptop_is_155_runs_and_2_3_million_iterations():
    """The figures of the main text and 14."""
    runs = lth.runs(lth.MAIN, "laptop")
    assert len(runs) == len(set(runs)) == len({r.key for r in runs}) == 155 == 5 * (16 + 6 + 6 + 3)
    assert sum(r.recipe.iterations for r in runs) == 2_325_000
    for seed in range(5):
        mine = [r for r in runs if r.seed == seed]
        kinds = [sum(r.init == init for r in mine) for init in ("reset", "reinit", "random")]
        assert kinds == [16 + 3, 6, 6]
        assert sorted(r.level for r in mine if r.init == "reinit") == [3, 7, 9, 10, 12, 15]
        assert sorted(r.level for r in mine if r.init == "random") == [3, 7, 9, 10, 12, 15]
        assert sorted(r.rate for r in mine if r.rate != 0.2) == pytest.approx([0.825, 0.8934, 0.95], abs=1e-4)
    for r in runs:
        assert (r.model, r.dataset, r.recipe.iterations, r.recipe.batch_size) == ("lenet_300_100", "mnist", 15_000, 60)
        assert (r.recipe.optimizer, r.recipe.lr, r.scope) == ("adam", 1.2e-3, "layer")
        assert r.rate_output == r.rate / 2
        assert r.parent is None or r.parent in runs


def test_trial_by_trial_and_the_trunk_of_each_first():
    runs = lth.runs(lth.MAIN, "laptop")
    assert all(r.init == "reset" and r.seed == 0 for r in runs[:16])
    seeds = [r.seed for r in lth.runs("fig1", "laptop")]
    assert seeds == sorted(seeds)
    assert lth.runs(None, "laptop")[: len(runs)] == runs
    assert all(runs.index(r.parent) < runs.index(r) for r in runs if r.parent)


@pytest.mark.parametrize("scale", lth.SCALES)
def test_every_items_runs_are_among_all(scale):
    every, twelve = set(lth.runs(None, scale)), set(lth.runs("fig12", scale))
    for item in lth.ITEMS:
        runs = lth.runs(item, scale)
        nets = {arm.split("@")[0].split("/")[0] for arm in lth.ITEMS[item]}
        assert bool(runs) == (nets <= lth.setting(scale).nets.keys())
        assert len(runs) == len(set(runs))
        assert set(runs) <= every
        assert set(lth.runs([item, "fig12"], scale)) == set(runs) | twelve


def test_items_need_their_own_arms():
    inits = {item: {r.init for r in lth.runs(item, "laptop")} for item in lth.MAIN}
    assert inits["fig1"] == {"reset", "random"}
    assert inits["fig3"] == inits["fig11"] == inits["fig12"] == {"reset", "reinit"}
    assert inits["fig14"] == {"reset", "reinit", "random"}
    assert len(lth.runs("fig4", "laptop")) == 5 * (16 + 6 + 3)


def test_curves_are_read_closely_only_where_figure_3_draws_them():
    for r in lth.runs(lth.MAIN, "laptop"):
        trunk = r.init == "reset" and r.rate == 0.2
        drawn = r.init in ("reinit", "random") and r.level in (3, 7)
        assert r.recipe.test_readings == ("all" if trunk or drawn else "log")


def test_paper_scale_is_the_papers():
    """Figure 2 and section 1: 50,000 iterations, five tickets, three reinitialisations of each, ten random networks."""
    trials, at = lth.setting("paper").trials, lenet("paper")
    assert (at.base.recipe.iterations, trials, at.draws, trials * at.random_draws) == (50_000, 5, 3, 10)
    assert [r.draw for r in at.reinit(2, 4)] == [0, 1, 2]
    assert len({r.key for r in at.reinit(2, 4)}) == 3
    assert [r.seed for r in at.reinit(2, 4)] == [2, 2, 2]


def test_primary_is_180_runs_of_the_papers_and_9_million_iterations(tmp_path):
    """10 chains to round 15, each with a reinitialisation at round 7 and a one-shot ticket at 10.83 %."""
    runs, paper = lth.runs("fig4", "primary"), set(lth.runs("fig4", replace(lth.setting("paper"), trials=10)))
    one_shot = lenet("paper").one_shot_rate(lenet("paper").density(10))
    assert (len(set(runs)), sum(r.recipe.iterations for r in runs)) == (180, 9_000_000)
    assert {r.key for r in runs} <= {r.key for r in paper}
    for seed in range(10):
        mine = [r for r in runs if r.seed == seed]
        assert sorted(r.level for r in mine if r.rate == 0.2 and r.init == "reset") == list(range(16))
        assert [(r.level, r.draw) for r in mine if r.init == "reinit"] == [(7, 0)]
        assert [r.rate for r in mine if r.rate != 0.2] == [one_shot]
    assert len(engine.missing(runs, Store(tmp_path))) == 180
    assert set(lth.runs("fig4", replace(lth.setting("primary"), trials=2))) == {r for r in runs if r.seed < 2}


def test_primary_claims_find_the_primary_runs():
    """At their number of trials, and nothing else than what is trained for them."""
    runs, rules = set(lth.runs("fig4", "primary")), scorecard.claims("lth", REPORTED)
    rules = rules[(rules["primary"] == 1) & rules["arm_a"].str.startswith("lenet")]
    assert set(rules["n"]) == {lth.setting("primary").trials}
    for claim in rules.to_dict("records"):
        for cell in scorecard._cells(claim):
            for arm, x in scorecard._arms(claim, cell):
                for trial in range(10):
                    assert set(lth.arm(arm, x, trial, "primary")) <= runs


def test_densities_are_those_that_the_paper_prints():
    printed = [100, 80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8, 8.7, 7.0, 5.6, 4.5, 3.6, 2.9, 2.3, 1.9]
    at = lenet("paper")
    assert [round(100 * at.density(level), 1) for level in range(19)] == pytest.approx(printed, abs=0.051)


@pytest.mark.parametrize(
    ("arm", "x", "levels"),
    [
        ("lenet/dense", None, [0]),
        ("lenet/imp", 100, [0]),
        ("lenet/imp", 51.3, [3]),
        ("lenet/imp", 51, [3]),
        ("lenet/imp", 21.1, [7]),
        ("lenet/imp", 13.5, [9]),
        ("lenet/imp", 3.6, [15]),
        ("lenet/reinit", 21.1, [7]),
        ("lenet/random", 10.8, [10]),
        ("lenet/oneshot", 17.6, [1]),
    ],
)
def test_arms_at_printed_densities(arm, x, levels):
    runs = lth.arm(arm, x, 2, "laptop")
    assert [r.level for r in runs] == levels
    assert all(r.seed == 2 and r.recipe.iterations == 15_000 for r in runs)
    init = {"imp": "reset", "dense": "reset", "oneshot": "reset"}.get(arm.split("/")[1])
    assert {r.init for r in runs} == {init or arm.split("/")[1].removeprefix("oneshot-")}


def test_one_shot_arms_are_found_by_the_density_left():
    rates = [lth.arm("lenet/oneshot", x, 0, "laptop")[0].rate for x in (17.6, 10.83, 5.17)]
    assert rates == pytest.approx([0.825, 0.8934, 0.95], abs=1e-4)


@pytest.mark.parametrize(
    ("arm", "x"),
    [
        ("lenet/imp", 45),
        ("lenet/imp", 1.2),
        ("lenet/reinit", 100),
        ("lenet/reinit", 41.1),
        ("lenet/random", 80),
        ("lenet/oneshot", 50),
        ("conv2/imp", 2.39),
        ("resnet18@0.2/imp", 41.7),
        ("lenet/noise", 21.1),
        ("vgg19/dense", None),
    ],
)
def test_arms_that_are_no_experiment_here(arm, x):
    assert lth.arm(arm, x, 0, "laptop") is None


def test_arms_of_the_paper_scale_have_all_draws():
    assert [r.draw for r in lth.arm("lenet/reinit", 21.1, 0, "paper")] == [0, 1, 2]
    assert [r.draw for r in lth.arm("lenet/random", 21.1, 0, "paper")] == [0, 1]


@pytest.mark.parametrize("scale", lth.SCALES)
@pytest.mark.parametrize("control", ["dense", "imp", "reinit", "random", "oneshot"])
def test_arms_are_runs_that_the_scale_declares(control, scale):
    declared = set(lth.runs(None, scale))
    for x in (51.3, 21.1, 17.6, 10.8):
        for r in lth.arm(f"lenet/{control}", x, 1, scale) or []:
            assert r in declared


def test_unknown_names_and_bad_settings():
    with pytest.raises(ValueError, match=message("Unknown scale 'huge': choose one of paper, primary, laptop, smoke.")):
        lth.runs(None, "huge")
    with pytest.raises(ValueError, match=message("Unknown item 'fig99' of lth: choose from fig1, ")):
        lth.runs(["fig3", "fig99"], "laptop")
    with pytest.raises(ValueError, match=message("Invalid trials 0: give a whole number from 1.")):
        replace(lth.setting("smoke"), trials=0)
    with pytest.raises(ValueError, match=message("Invalid one_shot (0.5, 1.0): give fractions to remove, 0 < p < 1.")):
        replace(lenet("smoke"), one_shot=(0.5, 1.0))
    with pytest.raises(ValueError, match=message("Invalid init 'rest': give one of reset, ")):
        replace(lenet("smoke"), init="rest")


def test_continued_training_resets_only_the_network_that_is_looked_at():
    at = replace(lenet("smoke"), init="continue")
    [third] = at.imp(0, 3)
    assert [third.init, third.parent.init, third.parent.parent.init] == ["reset", "continue", "continue"]
    assert third.root == at.dense(0)[0]
    assert at.imp(0, 2)[0] not in (third.parent, third.parent.parent)


def test_declaring_runs_leaves_torchs_random_state():
    before = torch.get_rng_state()
    for scale in lth.SCALES:
        lth.runs(None, replace(lth.setting(scale)))  # a new one: counts are kept with a setting
    lth.override(lth.setting("smoke"), rate=0.3, one_shot_densities=[0.1]).nets["lenet"].density(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dense_network_is_the_same_however_it_would_be_pruned():
    dense = lenet("smoke").dense(0)
    others = [{"rate": 0.5}, {"rate_output": 0.3}, {"scope": "global"}, {"init": "rewind", "rewind_to": 20}]
    for options in others:
        at = lenet(lth.override(lth.setting("smoke"), **options))
        assert at.dense(0) == dense
        assert at.imp(0, 0) == dense
        assert at.imp(0, 1) != lenet("smoke").imp(0, 1)


def test_one_shot_densities_are_counted_on_the_network_that_is_pruned():
    at = lenet(lth.override(lth.setting("smoke"), model="conv2", rate_output=0.1, one_shot_densities=[0.2, 0.1]))
    weights = [layer.weight.numel() for layer in M.prunable(models.create("conv2", in_shape=(1, 8, 8))).values()]
    for p, density in zip(at.one_shot, (0.2, 0.1), strict=True):
        kept = (1 - p) * sum(weights[:-1]) + (1 - p / 2) * weights[-1]
        assert kept / sum(weights) == pytest.approx(density, abs=1e-6)


def test_rewinding_chains():
    at = lenet(lth.override(lth.setting("smoke"), init="rewind", rewind_to=20))
    [second] = at.imp(1, 2)
    assert [(r.init, r.rewind_to) for r in (second, second.parent, second.root)] == [
        ("rewind", 20),
        ("rewind", 20),
        ("reset", 0),
    ]
    assert second.root.key == lenet("smoke").dense(1)[0].key


# The appendix ---------------------------------------------------------------------------------------------------------


def test_strategy_2_trains_on_between_rounds_and_resets_the_ticket_that_is_scored():
    at = lenet("laptop")
    [ticket] = lth.trial("lenet/continued", lth.setting("laptop"), 1, 7)
    chain = [ticket]
    while chain[-1].parent:
        chain.append(chain[-1].parent)
    assert [r.init for r in chain] == ["reset", *["continue"] * 6, "reset"]
    assert chain[-1] == at.dense(1)[0]
    assert at.continued(1, 9)[0].parent.parent == replace(ticket, init="continue")
    [theirs] = at.imp(1, 7)
    assert (theirs.level, theirs.rate) == (ticket.level, ticket.rate)
    assert theirs.key != ticket.key


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lr2.5e-5", {"optimizer": "adam", "lr": 2.5e-5}),
        ("lr6.4e-3", {"optimizer": "adam", "lr": 0.0064}),
        ("sgd-0.8", {"optimizer": "sgd", "lr": 0.8, "momentum": 0.0}),
        ("momentum-0.025", {"optimizer": "sgd", "lr": 0.025, "momentum": 0.9}),
        ("rate0.4", {"rate": 0.4, "rate_output": 0.2, "lr": 1.2e-3}),
        ("sigma0.1", {"options": (("init", "normal"), ("sigma", 0.1))}),
        ("hidden75-25", {"options": (("hidden", (75, 25)),)}),
        ("kaiming", {"options": (("init", "kaiming fan_in"),)}),
    ],
)
def test_a_sweeps_point_differs_in_what_it_is_called(name, fields):
    [ticket] = lth.trial(f"lenet@{name}/imp", lth.setting("laptop"), 3, 2)
    [base] = lenet("laptop").imp(3, 2)
    flat, plain = ({**vars(r), **vars(r.recipe)} for r in (ticket, base))
    changed = {k: flat[k] for k in plain if flat[k] != plain[k] and k not in ("key", "parent", "recipe")}
    assert changed.items() <= {**fields, "test_readings": "all" if name == "sgd-0.8" else "log"}.items()
    assert all(flat[k] == v for k, v in fields.items())


def test_sweeps_end_where_as_few_weights_are_left():
    """P_m by hand: round(s n) of n survivors go; output layers at half the rate."""

    def series(sizes, s, rounds):
        for _ in range(rounds):
            sizes = [n - round(rate * n) for n, rate in zip(sizes, (s, s, s / 2), strict=True)]
        return sum(sizes)

    sizes, at = [784 * 300, 300 * 100, 1000], lth.setting("laptop")
    seventh, fifteenth = series(sizes, 0.2, 7), series(sizes, 0.2, 15)
    assert (lenet(at).weights(7), lenet(at).weights(15)) == (seventh, fifteenth)
    for name, own, s, target in (
        ("lr2e-4", sizes, 0.2, seventh),
        ("rate0.1", sizes, 0.1, seventh),
        ("rate0.4", sizes, 0.4, fifteenth),
        ("hidden75-25", [784 * 75, 75 * 25, 250], 0.2, fifteenth),
        ("sgd-0.8", sizes, 0.2, series(sizes, 0.2, 21)),
    ):
        variant = at.net(f"lenet@{name}")
        assert [variant.weights(r) for r in range(9)] == [series(own, s, r) for r in range(9)]
        assert series(own, s, variant.rounds) <= target < series(own, s, variant.rounds - 1)


def test_pruned_before_training_is_as_sparse_as_the_ticket_layer_by_layer(digits):
    at = lth.setting("smoke")
    [run] = lth.trial("lenet/prune-at-init", at, 0, 7)
    assert (run.parent, run.criterion) == (None, "magnitude")
    model = work.initialise(run, digits, None).model
    assert equal(M.state(model), theta_0())
    for layer, (n, rate) in {"fc1": (19_200, 0.2), "fc2": (30_000, 0.2), "fc3": (1_000, 0.1)}.items():
        for _ in range(7):
            n -= round(rate * n)
        assert torch.equal(M.read(model)[layer].flatten(), largest(theta_0()[f"{layer}.weight"].abs().flatten(), n))


def test_grid_points_are_named_by_the_paper_or_marked_as_guessed():
    reported = scorecard.reported("lth", REPORTED)
    for item, unit in (("fig26", "learning rate"), ("fig27", "learning rate"), ("fig28", "learning rate")):
        rows = reported[(reported["item"] == item.replace("fig", "Figure ")) & (reported["provenance"] == "paper")]
        named = set(rows[rows["unit"] == unit]["value"])
        variants = [lth.setting("paper").net(arm.split("/")[0]) for arm in lth.ITEMS[item] if "@" in arm]
        assert {at.base.recipe.lr for at in variants} <= named
    assert {"sigma0.03", "sigma0.3", "hidden75-25", "hidden150-50"} <= set(lth.GUESSED_POINTS)


def test_claims_on_lenet_are_all_experiments_of_the_paper_scale():
    rules = scorecard.claims("lth", REPORTED)
    rules = rules[rules["arm_a"].str.startswith("lenet") & (rules["kind"] != "") & (rules["quantity"] != "weights")]
    for claim in rules.to_dict("records"):
        for cell in scorecard._cells(claim):
            for arm, x in scorecard._arms(claim, cell):
                assert lth.arm(arm, x, 0, "paper"), (claim["id"], arm, x)


def test_another_network_has_no_hidden_layers_to_size():
    at = lth.override(lth.setting("smoke"), model="conv2", dataset="cifar10")
    assert {r.model for r in lth.runs("fig31", at)} == {"conv2"}


def test_smoke_is_small_enough_for_every_figure():
    runs = lth.runs(None, "smoke")
    assert {r.dataset for r in runs} == {"digits"}
    assert sum(r.recipe.iterations for r in runs) < 30_000
    assert {dict(r.options).get("width", 8) for r in runs if r.model != "lenet_300_100"} == {4}


def test_runs_side_by_side_are_what_they_are_alone(tmp_path, monkeypatch):
    """On a GPU the engine trains alike runs as one group; grouping is switched on here for the CPU."""
    recipe = replace(QUICK, iterations=40, eval_every=10, test_readings="all")
    dense = [Run(dataset="digits", recipe=recipe, seed=seed) for seed in range(3)]
    other = Run(dataset="digits", recipe=replace(recipe, lr=0.01))
    runs = [*dense, other, *map(child, dense), replace(child(dense[0]), init="reinit")]
    train(runs, tmp_path / "alone")
    whole = engine._alike
    monkeypatch.setattr(engine, "_alike", lambda r, device: whole(r, "cuda"))
    train(runs, tmp_path / "together")
    groups = []
    for r in runs:
        a, b = (Store(tmp_path / name).get(r) for name in ("alone", "together"))
        certificate = json.loads(b["certificate"])
        groups.append(len(certificate["group"]))
        assert r.key in certificate["group"]
        assert json.loads(a["certificate"])["theta0"] == certificate["theta0"]
        np.testing.assert_allclose(a["val_loss"], b["val_loss"], atol=1e-4)
        assert a["layers"] == b["layers"]
    assert sorted(groups) == [1, 3, 3, 3, 4, 4, 4, 4]
