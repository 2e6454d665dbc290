"""The convolutional networks of the lottery ticket chapter: densities by hand, stand-ins, rewinding, instability."""

import json
from dataclasses import replace

import pytest
import torch
from small_runs import REPORTED, train

from lottery import lth as algorithm
from lottery import scorecard
from lottery.experiments import Store, load, lth

PAPER, LAPTOP, SMOKE = map(lth.setting, ("paper", "laptop", "smoke"))
# {net: [(weights, share removed in a round)]}, from the layers of the paper's figure 2; pooled where it ranks globally.
LAYERS = {
    "conv2": [(1_728, 0.1), (36_864, 0.1), (16_384 * 256, 0.2), (256 * 256, 0.2), (2_560, 0.1)],
    "conv4": [
        *((n, 0.1) for n in (1_728, 36_864, 73_728, 147_456)),
        *((8_192 * 256, 0.2), (256 * 256, 0.2), (2_560, 0.1)),
    ],
    "conv6": [
        *((n, 0.15) for n in (1_728, 36_864, 73_728, 147_456, 294_912, 589_824)),
        *((4_096 * 256, 0.2), (256 * 256, 0.2), (2_560, 0.1)),
    ],
    "resnet18@0.1": [(267_696, 0.2), (2_560 + 640, 0)],
    "vgg19@0.1": [(20_018_880, 0.2), (5_120, 0)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_weights_left_by_hand(name):
    left, shares = map(list, zip(*LAYERS[name], strict=True))
    for level in range(16):
        assert PAPER.net(name).weights(level) == sum(left)
        left = [n - round(s * n) for n, s in zip(left, shares, strict=True)]


def test_weights_are_counted_with_the_classes_of_the_data():
    """CIFAR-100 has a hundred: Conv-2's last layer is 256 x 100."""
    net = PAPER.net("conv2")
    more = replace(net, base=replace(net.base, dataset="cifar100"))
    assert more.weights(0) - net.weights(0) == 256 * 90


def test_every_claim_about_training_is_an_experiment_of_the_paper_scale():
    rules = scorecard.read("lth", "_claims", REPORTED)
    for claim in rules[(rules["kind"] != "") & rules["quantity"].isin(scorecard.READ)].to_dict("records"):
        for cell in scorecard._cells(claim):
            for arm, x in scorecard._arms(claim, cell):
                assert lth.arm(arm, x, 0, "paper"), (claim["id"], arm, x)


@pytest.mark.parametrize("scale", ["paper", "laptop", "smoke"])
def test_every_item_has_cells_where_its_networks_are(scale):
    at = lth.setting(scale)
    for item, arms in lth.ITEMS.items():
        here = {arm.split("/")[0].split("@")[0] for arm in arms} <= at.nets.keys()
        assert bool(lth.cells(item, at)) == here, item
        assert here or "vgg19" in str(arms)


def test_fewer_iterations_keep_every_fraction():
    """A fifth of 30,000: milestones after two thirds and five sixths, k = 500 is 100, a warmup of 20,000 is 4,000."""
    run = LAPTOP.net("resnet18@warmup").base
    assert (run.recipe.iterations, run.recipe.milestones, run.recipe.warmup) == (6_000, (4_000, 5_000), 4_000)
    [ticket] = lth.trial("resnet18@0.1/rewind-500", LAPTOP, 2, 8)
    assert (ticket.level, ticket.rewind_to, ticket.parent.rewind_to, ticket.root.rewind_to) == (8, 100, 100, 0)
    assert [lth.trial(f"resnet18@0.1/rewind-{k}", PAPER, 0, 1)[0].rewind_to for k in (100, 500)] == [100, 500]


@pytest.mark.parametrize(("net", "at"), [("resnet18", PAPER), ("resnet18", LAPTOP)])
def test_the_test_set_is_read_at_each_third_of_the_training(net, at):
    recipe = at.nets[net].base.recipe
    assert {recipe.iterations * i // 3 for i in (1, 2, 3)} <= recipe.readings()[1]


def test_vgg_reads_the_test_set_where_figure_7_does():
    assert {30_000, 60_000, 112_480} <= PAPER.nets["vgg19"].base.recipe.readings()[1]


def test_a_network_has_its_own_number_of_trials_unless_others_are_asked_for():
    assert {r.seed for r in lth.runs("fig5-conv2", "laptop")} == {0, 1, 2}
    assert {r.seed for r in lth.runs("rewinding-resnet18", "laptop")} == set(range(5))
    assert {r.seed for r in lth.runs("fig5-conv2", lth.override(LAPTOP, trials=4))} == set(range(4))
    assert [*lth.seeds("fig5-conv2", LAPTOP)] == [0, 1, 2]
    assert [*lth.seeds("fig8", LAPTOP)] == [*lth.seeds("fig5-conv2", PAPER)] == [*range(5)]
    claim = scorecard.runs("lth", ["lth-fig5-conv2-accuracy-4.6"], "laptop")
    assert {r.seed for r in claim} == {0, 1, 2}


def test_what_several_items_begin_with_stands_for_them():
    both = {item: set(lth.runs(item, "smoke")) for item in ("fig6", "fig6-conv2", "fig6-conv4", "fig6-conv6")}
    assert both.pop("fig6") == set.union(*both.values())


def test_an_exploration_is_of_lenet_alone():
    assert set(lth.override(SMOKE, lr=0.01).nets) == {"lenet"}
    assert set(lth.override(SMOKE, trials=1).nets) == set(SMOKE.nets)


# Trained --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One trial of the stand-in's ticket at level 1, rewound, and of the pair of whole networks."""
    folder = tmp_path_factory.mktemp("nets")
    [ticket], [pair] = (
        lth.trial(f"resnet18@0.1/{c}", SMOKE, 0, p) for c, p in (("rewind-500", 1), ("instability-0", 0))
    )
    train([ticket, pair], folder)
    return Store(folder), ticket, pair


def test_convolutions_are_pooled_and_nothing_else_is_pruned(trained):
    store, ticket, _ = trained
    layers = json.loads(store.get(ticket)["layers"])
    assert tuple(layers) == lth.residual(1)  # neither shortcuts nor the classifier
    kept, n = (sum(pair[i] for pair in layers.values()) for i in (0, 1))
    assert kept == n - round(0.2 * n)
    assert len({round(k / m, 3) for k, m in layers.values()}) > 1  # a layer's share is its own


def test_instability_is_read_between_the_two_trained_copies(trained):
    store, _, pair = trained
    values = json.loads(store.get(pair)["values"])
    ends = [100 * (1 - store.get(r)["last_test_acc"]) for r in pair.trained]
    found = values["errors with them"]  # with the mean of the two's statistics, at the ends their own
    assert [found[0], found[-1]] == pytest.approx(ends, abs=1e-4)
    errors = values["errors"]
    assert values["instability"] == max(errors) - (errors[0] + errors[-1]) / 2
    assert pair.one.key != pair.other.key
    assert pair.key != replace(pair, other=pair.one).key
    assert len(load([pair], store)) == 1


def test_the_line_between_two_states():
    one = {"w": torch.tensor([0.0, 4.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)}
    assert algorithm.between(one, other, 0.25)["w"].tolist() == [0.25, 3.0]
    assert algorithm.between(one, other, 0.25)["n"] == 3
    assert algorithm.instability([10.0, 20.0, 14.0]) == 8.0
    assert algorithm.instability([10.0, 9.0, 14.0]) == 2.0  # the worse end is on the line, too


def test_dropout_draws_from_the_run_alone(tmp_path):
    """Two trainings under other states of torch's generator are one, and leave that as it was."""
    run = SMOKE.net("conv2@dropout").base
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train([run], tmp_path / str(seed))
        assert torch.equal(torch.get_rng_state(), before)
        rows.append(Store(tmp_path / str(seed)).get(run))
    assert rows[0]["val_loss"] == rows[1]["val_loss"]
    without = replace(run, options=(("width", 4),))
    train([without], tmp_path / "without")
    assert Store(tmp_path / "without").get(without)["val_loss"] != rows[0]["val_loss"]
