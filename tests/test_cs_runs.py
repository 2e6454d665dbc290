"""lottery.experiments.cs: what is declared for Continuous Sparsification, and what of it claims find."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from lottery import data, models, scorecard, training
from lottery import masks as M
from lottery.cs import CS, Ticket
from lottery.experiments import Store, cs

PAPER, LAPTOP = cs.setting("paper"), cs.setting("laptop")
CONVS = LAPTOP.nets["resnet20"].layers


def only(name, x, seed=0, scale="laptop"):
    [run] = cs.arm(name, x, seed, scale)
    return run


def test_golden_keys():
    """Published keys never change: results that are stored under them would be lost."""
    assert only("resnet20/dense", None).key == "200753fc34684e6236bd0697"
    assert only("resnet20/search", 1).key == "5bd9ea8b07e6cc2b9399cac3"
    assert only("resnet20@code/ticket", 3).key == "e263dc5697c1104b0333506e"
    assert only("resnet20/imp", 100 * 0.8**12).key == "fd5bb6b896525629a1b4cb20"


def test_a_small_training_set_is_scored_on_fewer_images():
    """A reader has no parameter for their number, and was refused after the other trainings."""
    assert cs.gradient(PAPER.nets["resnet20"]) is cs.GRADIENT
    assert all(cs.gradient(run) is cs.GRADIENT for at in cs.SETTINGS.values() for run in at.nets.values())
    at = cs.override(cs.setting("smoke"), train_fraction=0.3, batch_size=37, iterations=60)
    run = cs.trial("resnet20/gradient", at, 0, 0.2)[0]
    assert run.score_options["per_class"] == 15  # of 31 on average


def test_the_recipe_is_that_of_the_authors_code():
    """85 epochs of 352 batches, lr 0.1 divided by 10 after 56 and 71 epochs; a balanced 45,000/5,000 split."""
    run = PAPER.nets["resnet20"]
    recipe = run.recipe
    assert recipe.per_epoch(45_000) == recipe.eval_every == 352
    assert (recipe.iterations, recipe.milestones) == (85 * 352, (56 * 352, 71 * 352))
    assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, True, 1e-4)
    assert (recipe.batch_size, recipe.augment, recipe.inputs) == (128, "flip-crop", "standard")
    assert (run.balanced, run.valid, dict(run.options)) == (True, None, {"shortcut": "plain"})
    method = only("resnet20/search", 1, scale="paper").method
    assert method == CS(s0=0.0, lam=1e-8, final=200.0, layers=run.layers)
    assert PAPER.rewind_to == 2 * 352


def test_the_laptop_keeps_the_schedule_and_shrinks_net_and_images():
    run = LAPTOP.nets["resnet20"]
    assert (run.model, run.dataset, run.recipe.precision) == ("resnet8", "cifar10_16", "bfloat16")
    assert (run.recipe.iterations, run.recipe.milestones) == (30 * 352, (20 * 352, 25 * 352))
    assert only("resnet20/search", 1).method == CS(layers=CONVS)


@pytest.mark.parametrize(("net", "weights"), [("resnet20", 267_696), ("vgg16", 14_710_464)])
def test_the_code_masks_the_3x3_convolutions(net, weights):
    assert cs._masked(f"{net}/cs") == weights


def test_a_search_is_a_chain_and_its_ticket_sees_the_whole_schedule_after_k():
    ticket = only("resnet20/ticket", 3)
    third, second, first = ticket.parent, ticket.parent.parent, ticket.root
    assert second.parent == first
    assert third.goes_on
    assert second.goes_on
    assert first.parent is None
    assert [r.method for r in (first, second, third)] == [CS(layers=CONVS)] * 3
    assert (ticket.method, ticket.rate, ticket.init) == (Ticket(s0=0.0), 0.0, "rewind")
    assert (ticket.rewind_to, ticket.rewind_schedule) == (704, "restart")
    assert third.recipe.test_readings == "all"  # whose masks are kept
    assert ticket.recipe == LAPTOP.nets["resnet20"].recipe


def test_both_restart_rules_and_both_ways_of_momentum_share_the_first_round():
    for variant in ("", "code", "fresh-momentum"):
        assert LAPTOP.search("resnet20", 1, 3, variant).root == LAPTOP.search("resnet20", 1, 1)
    rules = [LAPTOP.search("resnet20", 0, 3, variant).method.rule for variant in ("", "code")]
    assert rules == ["as-described", "code"]
    assert LAPTOP.search("resnet20", 0, 2, "fresh-momentum").method.carry is False


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unscaled", {"scale": False}),
        ("per-iteration", {"schedule": "iteration"}),
        ("beta-fixed", {"final": 1.0}),
        ("lam1e-6", {"lam": 1e-6}),
        ("final1000", {"final": 1000.0}),
        ("s-0.2", {"s0": -0.2}),
    ],
)
def test_a_variant_differs_in_one_thing(name, change):
    ticket = LAPTOP.ticket("resnet20", 0, 1, name)
    assert ticket.parent.method == CS(layers=CONVS, **change)
    assert ticket.method == Ticket(s0=change.get("s0", 0.0), scale=change.get("scale", True))
    plain = LAPTOP.ticket("resnet20", 0, 1)
    assert dataclasses.replace(ticket, parent=plain.parent, method=plain.method) == plain


def test_rewinding_is_studied_at_0_and_at_5_epochs():
    tickets = [LAPTOP.ticket("resnet20", 0, 1, name) for name in ("rewind0", "rewind2.5")]
    assert [(r.init, r.rewind_to) for r in tickets] == [("reset", 0), ("rewind", 5 * 352)]
    assert {r.parent for r in tickets} == {LAPTOP.search("resnet20", 0, 1)}


def test_imp_removes_a_fifth_of_all_3x3_convolutions_and_rewinds_imp_c_goes_on():
    imp, imp_c = only("resnet20/imp", 40.96), only("resnet20/imp-c", 40.96)
    assert (imp.level, imp.rate, imp.scope, imp.layers) == (4, 0.2, "global", CONVS)
    assert (imp.init, imp.rewind_to, imp.rewind_schedule) == ("rewind", 704, "restart")
    assert [r.init for r in (imp_c, imp_c.parent, imp_c.parent.parent)] == ["rewind", "continue", "continue"]
    assert imp_c.root == imp.root
    assert imp_c.level == 4


def test_pruning_without_rewinding_finds_and_tunes_for_as_long_each():
    names = ("oneshot", "gradient", "gmp")
    oneshot, gradient, gmp = (only(f"resnet20/{name}", 16.8) for name in names)
    assert [(r.init, r.level) for r in (oneshot, gradient, gmp)] == [("continue", 1)] * 3
    assert oneshot.density == gradient.density == gmp.parent.method.density == 0.1678
    assert gradient.criterion == "snip"
    assert oneshot.parent == gradient.parent
    pruned = cs.arm("resnet20/pruned", 16.8, 0, "laptop")
    assert [r.method.s0 for r in pruned] == [-0.3, -0.2, -0.1, 0.0]
    assert {(r.init, r.rate) for r in pruned} == {("continue", 0.0)}
    l0 = cs.arm("resnet20/l0", 16.8, 0, "laptop")
    assert {(r.init, r.rate, r.level) for r in l0} == {("effective", 0.0, 1)}


def test_restart_has_ten_trials_of_which_three_come_first():
    runs = cs.runs("restart", "laptop")
    assert len(runs) == 90  # dense, three rounds and two more of the other rule, three tickets
    assert [r.seed for r in runs] == [seed for seed in range(10) for _ in range(9)]
    three = cs.runs("restart", cs.override(LAPTOP, trials=3))
    assert three == runs[:27]
    assert {r.seed for r in cs.runs("search", "laptop")} == set(range(5))
    assert {r.seed for r in cs.runs("switches", "laptop")} == {0, 1, 2}


@pytest.mark.parametrize("scale", cs.SETTINGS)
def test_arms_are_runs_that_the_scale_declares(scale):
    at = cs.setting(scale)
    for item in cs.ITEMS:
        cells, declared = (
            [(arm, point) for arm, _, point in cs.cells(item, at)],
            {r.key for r in cs.runs(item, dataclasses.replace(at, trials=1, own={}))},
        )
        assert cells
        assert len(cells) == len(set(cells))
        for name, point in cells[:40]:
            if name.split("/")[1] in ("dense", "search", "ticket"):
                assert {r.key for r in cs.arm(name, float(point), 0, scale)} <= declared


@pytest.mark.parametrize(
    ("name", "x", "scale"),
    [
        ("resnet20/ticket", 2, "laptop"),
        ("resnet20/imp", 5.0, "laptop"),  # beyond the last level
        ("vgg16/cs", 1.7, "laptop"),
        ("vgg16@code/cs", 1.7, "paper"),
        ("resnet20@s-0.7/cs", 12.3, "laptop"),
        ("resnet20@s-0.1/searched", 12.3, "laptop"),
        ("resnet20@code/imp", 12.3, "laptop"),
        ("resnet50/cs", 10.0, "paper"),
        ("resnet20/obd", 10.0, "paper"),
    ],
)
def test_arms_that_are_no_experiment_here(name, x, scale):
    assert not cs.arm(name, x, 0, scale)


# Families of networks at a density -----------------------------------------------------------------------------------


def test_imp_is_asked_for_the_levels_beside_a_density():
    assert [r.level for r in cs.arm("resnet20/imp", 12.3, 0, "laptop")] == [9, 10]  # 13.4 and 10.7 %
    assert [r.level for r in cs.arm("resnet20/imp", 21.0, 0, "laptop")] == [7]  # 20.97 %
    tickets = cs.arm("resnet20/cs", 12.3, 0, "laptop")
    assert [(r.level, r.method.s0) for r in tickets] == [(1, 0.0), (3, 0.0), (5, 0.0), (8, 0.0)]
    assert len(cs.arm("resnet20/cs", 12.3, 0, "paper")) == 7 * 5


def test_tickets_from_a_lower_s0_are_from_it_in_every_round():
    tickets = cs.arm("resnet20@s-0.1/cs", 12.3, 3, "laptop")
    assert [(r.level, r.method.s0, r.root.method.s0, r.seed) for r in tickets] == [
        (1, -0.1, -0.1, 3),
        (2, -0.1, -0.1, 3),
    ]
    assert {r.key for r in tickets} < {r.key for r in cs.runs("low-s0", "laptop")}
    assert len(cs.runs("low-s0", "laptop")) == 5 * 3
    assert len(cs.runs("low-s0", cs.override(LAPTOP, s0=0.1))) == 5  # dense networks: there is but one s0


@pytest.mark.parametrize("s0", [-0.1, 0.0, 0.1])
def test_masks_on_frozen_weights_are_asked_for_by_their_s0(s0):
    assert only("conv6/supermask", s0).method.s0 == only("conv6/frozen-cs", s0).method.s0 == s0


def test_gates_of_l0_learn_at_a_thousand_times_the_rate_of_weights():
    """At the weights' own rate the penalty alone moves them: all close together, or none."""
    for scale in ("laptop", "paper"):
        assert {r.parent.method.rate for r in cs.arm("resnet20/l0", 16.8, 0, scale)} == {1000.0}


def rows(*densities):
    return [{"density": d, "level": level} for level, d in enumerate(densities)]


def test_between_two_networks_the_logarithm_of_the_density_decides():
    """From 40 to 10 %, 20 % is half of the way; 11 % from 40 to 10 % is 0.0688 from the end."""
    found = rows(0.4, 0.1, 0.02)
    assert cs.shares("resnet20/cs", 20.0, found, "test accuracy") == pytest.approx([0.5, 0.5, 0])
    share = math.log(0.4 / 0.11) / math.log(4)
    assert cs.shares("resnet20/cs", 11.0, found, "test accuracy") == pytest.approx([1 - share, share, 0])
    assert cs.shares("resnet20/cs", 10.1, found, "test accuracy") == [0, 1, 0]  # as printed
    assert cs.shares("resnet20/cs", 50.0, found, "test accuracy") is None
    assert cs.shares("resnet20/cs", 1.0, found, "test accuracy") is None
    assert cs.shares("resnet20/dense", None, found[:1], "test accuracy") == [1]


def test_a_network_that_lost_every_weight_has_no_place_among_densities():
    assert cs.shares("resnet20/cs", 12.3, rows(0.2, 0.123, 0), "test accuracy") == [0, 1, 0]
    assert cs.shares("resnet20/cs", 12.3, rows(0.2, 0.1, 0), "test accuracy")[2] == 0
    assert cs.shares("resnet20/cs", 12.3, rows(0.2, 0), "test accuracy") is None
    assert cs.shares("resnet20/cs", 12.3, rows(0), "test accuracy") is None
    assert cs.shares("resnet20/cs", 12.3, rows(0.2, 0), "search iterations ratio") is None


def test_nothing_is_interpolated_over_more_than_a_factor_of_four():
    assert cs.shares("resnet20/l0", 6.9, rows(0.16, 0.04), "test accuracy")
    assert cs.shares("resnet20/l0", 6.9, rows(0.17, 0.04), "test accuracy") is None
    assert cs.shares("resnet20/l0", 6.9, rows(0.17, 0.08, 0.04), "test accuracy")


def test_the_shortest_search_that_reaches_a_density():
    found = rows(1.0, 0.4, 0.1, 0.02)
    assert cs.shares("resnet20/cs", 12.3, found, "search iterations ratio") == [0, 0, 1, 0]
    assert cs.shares("resnet20/cs", 1.0, found, "search iterations ratio") is None


class Lab:
    """An experiments module in which CS has tickets at 40 and 10 % and IMP at 20 %, accuracies as given."""

    scales, exact, reads, networks = ("paper",), cs.EXACT, cs.READS, {}
    shares, place, prints = staticmethod(cs.shares), staticmethod(cs.place), "density"

    @staticmethod
    def density(x):
        return x / 100

    def __init__(self, cs_, imp, sparsest=0.1, trials=5):
        self.trials = trials
        self.at = {"cs": list(zip((0.4, sparsest), cs_, (1, 2), strict=True)), "imp": [(0.2, imp, 7)]}
        self.stored = {}

    def setting(self, scale):
        return SimpleNamespace(trials=5)

    def arm(self, name, x, trial, scale):
        control = name.split("/")[1]
        found = []
        for density, accuracy, level in self.at[control]:
            key, jitter = f"{control} {density} {trial}", (trial - 2) / 10
            recipe = {"iterations": 10}
            spec = {"model": "resnet20", "dataset": "cifar10", "recipe": recipe, "method": {}}
            row = {"key": key, "density": density, "level": level, "iterations": 10, "stale": False}
            row |= {
                "spec": json.dumps(spec),
                "status": "finished",
                "started": "2027-01-01T00:00:00Z",
                "device": "CPU",
                "model": "resnet20",
            }
            row |= {"dataset": "cifar10", "fingerprint": scorecard.FINGERPRINTS["cifar10"], "n_test": 8}
            mine = accuracy + (jitter if control == "cs" else 0)
            self.stored |= (
                {} if trial >= self.trials else {key: row | {"last_test_acc": mine / 100, "last_correct": b"\xf0"}}
            )
            run = {"key": key, "dataset": "cifar10", "recipe": SimpleNamespace(**recipe), "spec": lambda s=spec: s}
            found.append(SimpleNamespace(**run))
        return found

    def judged(self, **changed):
        frame = scorecard.claims("cs")
        claim = frame.set_index("id", drop=False).loc["cs-table1-sparser-than-imp-resnet20"].to_dict()
        claim |= {"alternative": "", "unknown": "", "x": "20"} | changed
        for trial in range(self.trials):
            for name in ("cs", "imp"):
                self.arm(f"resnet20/{name}", 20.0, trial, "paper")
        return scorecard.Judge("cs", self, self.stored, scorecard.reported("cs")).row(claim)


def test_a_claim_reads_a_family_at_the_density_that_it_names():
    row = Lab((92, 90), 89).judged()  # 91 at 20 %
    assert (row["evidence"], row["verdict"]) == ("full", "reproduced")
    assert row["ours"] == pytest.approx(2)
    assert row["cell"] == "20 % left"
    assert row["interval_images"] is not None


def test_a_density_out_of_reach_is_not_tested_and_says_so():
    for trials in (5, 7):
        row = Lab((92, 90), 89, sparsest=0.3, trials=trials).judged()
        assert row["verdict"] == "not tested (20 % is out of reach in 5 of 5 trials)"
        assert row["ours"] is row["all_trials"] is None
    assert Lab((92, 90), 89, trials=7).judged()["all_trials"]["trials"] == 7


def test_lengths_of_search_are_compared_as_ratios():
    lab = {
        "quantity": "search iterations ratio",
        "reading": "",
        "x": "20",
        "delta": 6.0,
        "margin": 1.15,
        "paper_value": 6.0,
    }
    row = Lab((92, 90), 89).judged(arm_a="resnet20/imp", arm_b="resnet20/cs", **lab)
    assert row["ours"] == pytest.approx(3.5)  # level 7 against round 2
    assert row["verdict"] == "reproduced, size differs"


def test_a_searched_network_counts_its_own_round():
    """A ticket, like IMP's network at a level, costs the trainings before it; a search of three rounds costs three."""
    found = cs.arm("resnet20/searched", 12.3, 0, "laptop")
    assert [run.level for run in found] == list(range(8))
    assert found[0] == cs.arm("resnet20/search", 1, 0, "laptop")[0]
    row = {"level": 2, "iterations": 10, "spec": json.dumps(found[2].spec())}
    assert cs.READS["search iterations ratio"](row) == pytest.approx(math.log(30))
    ticket = cs.arm("resnet20/ticket", 3, 0, "laptop")[0]
    row = {"level": ticket.level, "iterations": 10, "spec": json.dumps(ticket.spec())}
    assert cs.READS["search iterations ratio"](row) == pytest.approx(math.log(30))
    assert len(cs.arm("resnet20@code/searched", 12.3, 0, "laptop")) == 3


# Claims --------------------------------------------------------------------------------------------------------------

PRIMARY = {  # verdicts.md, CS
    *(f"cs-table1-{what}-{net}" for what in ("sparsest", "sparser-than-imp", "best") for net in ("resnet20", "vgg16")),
    *(f"cs-pruning-{what}-oneshot-{net}" for what in ("above", "l0-below") for net in ("resnet20", "vgg16")),
    "cs-cost-rounds",
}


def test_primary_claims_are_those_of_the_rules():
    frame = scorecard.claims("cs")
    assert set(frame[frame["primary"] == 1]["id"]) == PRIMARY
    assert (frame[frame["primary"] == 1]["n"] == 5).all()
    assert frame["id"].is_unique


def test_every_claim_is_exact_or_an_experiment_at_paper_scale():
    frame = scorecard.claims("cs")
    for c in frame[frame["kind"] != ""].to_dict("records"):
        c = scorecard._blank_is_none(c)
        for x in scorecard._cells(c):
            for name, at in scorecard._arms(c, x):
                found = c["quantity"] in cs.EXACT or (cs.arm(name, at, 0, "paper") is not None)
                assert found or (name.startswith("vgg16@code") and c["alternative"]), (c["id"], name, at)
        assert c["alternative"] is None or c["alternative"] in set(frame["id"])


def test_no_number_is_from_memory():
    assert set(scorecard.reported("cs")["provenance"]) == {"secondary", "computed"}
    remembered = scorecard.claims("cs").query("item_source == 'memory'")
    assert set(remembered["kind"]) == {""}
    assert remembered["paper_value"].isna().all()


def test_exact_statements(tmp_path):
    card = {row["claim"]: row for row in scorecard.scorecard("cs", Store(tmp_path))["rows"]}
    exact = [row for row in card.values() if row["evidence"] == "exact"]
    assert len(exact) == 3
    assert {row["verdict"] for row in exact} == {"reproduced"}
    assert [cs.search_epochs(f"resnet20/{name}") for name in ("cs", "imp")] == [425, 2550]


# ImageNet ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet50_is_searched_and_retrained_on_images_in_imagenets_layout():
    """1,000 classes of RGB images and the network's own stem; two images at 64x64 in place of 1.28 million."""
    assert (cs.IMAGENET.iterations, cs.IMAGENET.per_epoch(1_281_167)) == (90 * 5_005, 5_005)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    part = data.Split(x, torch.tensor([0, 999]))
    images = data.Data("imagenet", part, part, part, "generated", 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    recipe = dataclasses.replace(cs.IMAGENET, batch_size=2, iterations=2, milestones=())
    net = models.create("resnet50", seed=0, in_shape=(3, 64, 64))
    layers = tuple(name for name in M.prunable(net) if name != "fc")
    method = CS(s0=cs.IMAGENET_S0[-1], layers=layers, schedule="iteration")
    history = training.fit(method.attach(net), images, recipe, stop=1, method=method)
    assert history.status == "finished"
    kept = method.masks(net)
    assert sum(m.numel() for m in kept.values()) == 23_454_912
    assert {tuple(m.shape) for m in kept.values()} >= {(64, 3, 7, 7), (512, 512, 3, 3)}
    ones = {name: m | True for name, m in kept.items()}  # one step decides nothing yet
    ticket = Ticket(s0=method.s0)
    again = ticket.attach(M.attach(models.create("resnet50", seed=0, in_shape=(3, 64, 64)), ones))
    assert training.fit(again, images, recipe, stop=1, method=ticket).status == "finished"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"trials": 0}, "Invalid trials 0: give a whole number from 1."),
        ({"s0": 100.0}, "Invalid s0 100.0: "),
        ({"restart_rule": "both"}, "Invalid restart_rule 'both': give 'as-described' or 'code'."),
        ({"beta_final": 0.5}, "Invalid beta_final 0.5: "),
        ({"iterations": 2}, "Invalid iterations 2: give a whole number from 4."),
        (
            {"iterations": 352},
            "Invalid iterations 352: beta rises once an epoch, so a round needs more than the 352 of ",
        ),
        ({"densities": [2.0]}, r"Invalid densities \[2.0\]: "),
        ({"mask_scale": 1}, "Invalid mask_scale 1: give True or False."),
        ({"beta_step": "cosine"}, "Invalid beta_step 'cosine': "),
    ],
)
def test_bad_parameters_are_one_line(given, text):
    with pytest.raises(ValueError, match=f"^{text}[^\n]*$"):
        cs.override(LAPTOP, **given)


def test_overrides():
    at = cs.override(LAPTOP, trials=2, seed=7, s0=0.03, lam=1e-6, restart_rule="code", iterations=400, lr=0.05)
    runs = cs.runs("search", at)
    assert {r.seed for r in runs} == {7, 8}
    searched = {r.method for r in runs if isinstance(r.method, CS)}
    assert {(m.s0, m.lam) for m in searched} == {(0.03, 1e-6)}
    assert {m.rule for m in searched} == {"as-described", "code"}  # the first round restarts nothing
    assert {(r.recipe.iterations, r.recipe.milestones, r.recipe.lr) for r in runs} == {(400, (263, 334), 0.05)}
    assert at.rewind_to == 100
    assert dataclasses.astuple(cs.override(LAPTOP, trials=None, lr=None)) == dataclasses.astuple(LAPTOP)
