"""lottery.lth: magnitude pruning, the whole loop (reset, rewind, continue, one-shot) and the controls."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery import lth, models
from lottery import masks as M

settings.register_profile("patient", deadline=None, max_examples=60)
settings.load_profile("patient")


def b(*values):
    return torch.tensor(values, dtype=torch.bool)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def effective(model):
    return {name: layer.weight.detach().clone() for name, layer in M.prunable(model).items()}


def message(text):
    return f"^{re.escape(text)}$"


def weights(model, *values):
    """Write rows of numbers into the model's layers, whether or not there are masks on them."""
    theta = M.state(model)
    for name, v in zip(M.prunable(model), values, strict=True):
        theta[f"{name}.weight"] = torch.tensor(v, dtype=torch.float32).view_as(theta[f"{name}.weight"])
    return M.restore(model, theta)


def two_layers(first=(0.5, -0.1, 0.3, -0.9), second=(2.0, -4.0, 0.2, 1.0)):
    return weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), first, second)


def flat(masks):
    return {name: m.flatten() for name, m in masks.items()}


# One pruning step -----------------------------------------------------------------------------------------------------


def test_the_smallest_magnitudes_of_each_layer_go():
    assert same(flat(lth.prune(two_layers(), 0.5, "layer")), {"0": b(1, 0, 0, 1), "1": b(1, 1, 0, 0)})


def test_the_smallest_magnitudes_of_all_layers_go():
    assert same(flat(lth.prune(two_layers(), 0.5, "global")), {"0": b(0, 0, 0, 1), "1": b(1, 1, 0, 1)})


def test_each_layer_has_its_own_rate():
    pruned = flat(lth.prune(two_layers(), {"0": 0.75, "1": 0.25}, "layer"))
    assert same(pruned, {"0": b(0, 0, 0, 1), "1": b(1, 1, 0, 1)})


def test_layers_that_rates_do_not_name_are_not_ranked():
    assert same(flat(lth.prune(two_layers(), {"1": 0.5}, "layer")), {"1": b(1, 1, 0, 0)})


def test_the_rate_is_of_survivors():
    model = two_layers(first=(4, 3, 2, 1))
    first = lth.prune(model, 0.5, "layer")
    second = lth.prune(model, 0.5, "layer", masks=first)
    assert second["0"].flatten().tolist() == [True, False, False, False]
    assert int(second["1"].sum()) == 1


def test_pruned_weights_do_not_come_back_with_the_highest_magnitude():
    model = two_layers(first=(100, 1, 2, 3))
    masks = {"0": b(0, 1, 1, 1).view(2, 2), "1": b(1, 1, 1, 1).view(2, 2)}
    for scope in ("layer", "global"):
        assert not lth.prune(model, 0.3, scope, masks)["0"][0, 0]
        M.attach(model, masks)
        assert not lth.prune(model, 0.3, scope)["0"][0, 0]
        M.bake(model)
        model = two_layers(first=(100, 1, 2, 3))


def test_the_effective_weight_is_scored_not_the_one_behind_the_mask():
    """Under weight decay or momentum the tensor behind a mask moves on; that must not change the ranking."""
    model = M.attach(two_layers(first=(1, 2, 3, 4)), {"0": b(0, 1, 1, 1).view(2, 2)})
    weights(model, (99, 2, 3, 4), (2, 4, 0.2, 1))
    assert lth.prune(model, {"0": 1 / 3})["0"].flatten().tolist() == [False, False, True, True]


def test_a_layer_without_a_mask_counts_as_all_ones():
    model = M.attach(two_layers(), {"0": b(1, 0, 0, 1).view(2, 2)})
    assert same(flat(lth.prune(model, 0.5)), {"0": b(0, 0, 0, 1), "1": b(1, 1, 0, 0)})


def test_given_masks_replace_those_on_the_model():
    model = M.attach(two_layers(), {"0": b(0, 0, 0, 1).view(2, 2)})
    ones = {"0": b(1, 1, 1, 1).view(2, 2), "1": b(1, 1, 1, 1).view(2, 2)}
    assert int(lth.prune(two_layers(), 0.25, masks=ones)["0"].sum()) == 3
    assert int(lth.prune(model, 0.25, masks=ones)["0"].sum()) == 3


def test_zero_weights_that_are_kept_are_not_pruned_weights():
    model = two_layers(first=(0, 0, 0, 5))
    assert lth.prune(model, 0.5)["0"].flatten().tolist() == [True, False, False, True]  # ties: the earlier is kept


def test_rate_zero_keeps_everything():
    assert all(m.all() for m in lth.prune(two_layers(), 0.0).values())
    masks = {"0": b(1, 0, 0, 1).view(2, 2), "1": b(0, 1, 1, 1).view(2, 2)}
    assert same(lth.prune(two_layers(), 0.0, masks=masks), masks)


@pytest.mark.parametrize(
    ("rate", "n", "removed"),
    [
        # exactly round_half_even(rate n), where published code takes one more: 25 weights lose 2 and 5
        (0.1, 25, 2), (0.2, 25, 5), (0.15, 100, 15), (0.15, 10, 2), (0.25, 10, 2), (0.35, 10, 4),
        (0.5, 1, 0), (0.5, 3, 2), (0.5, 5, 2), (0.1, 5, 0), (0.1, 15, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exactly_round_half_even_of_the_survivors_go(rate, n, removed, scope):
    model = nn.Linear(n, 1)
    assert int(lth.prune(nn.Sequential(model), rate, scope)["0"].sum()) == n - removed


def test_scoring_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(18, 3))
    model(torch.randn(4, 1, 4, 4)).sum().backward()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    masks = {"0": torch.rand(2, 1, 2, 2) < 0.8}
    M.attach(model, masks)
    modes = [m.training for m in model.modules()]
    theta, state = M.state(model), torch.get_rng_state()
    gradients = [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    lth.prune(model, 0.2)
    lth.prune(model, 0.2, "global")
    assert [m.training for m in model.modules()] == modes
    assert same(M.state(model), theta)
    assert same(M.read(model), masks)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_rate_out_of_range(rate):
    text = f"Invalid rate {rate}: give the fraction of surviving weights to remove, 0 <= rate < 1."
    for scope in ("layer", "global"):
        with pytest.raises(ValueError, match=message(text)):
            lth.prune(two_layers(), rate, scope)
    with pytest.raises(ValueError, match=message(text)):
        lth.prune(two_layers(), {"0": rate, "1": 0.5})


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=r"^Rate 0.9 leaves none of the 4 weights of layer '0'"):
        lth.prune(two_layers(), 0.9)
    nothing = {"0": torch.zeros(2, 2, dtype=torch.bool), "1": torch.zeros(2, 2, dtype=torch.bool)}
    with pytest.raises(ValueError, match="leaves none of the 0 weights"):
        lth.prune(two_layers(), 0.5, "global", masks=nothing)
    assert not any(m.any() for m in lth.prune(two_layers(), 0.0, masks=nothing).values())
    with pytest.raises(ValueError, match=r"^Invalid scope 'all'"):
        lth.prune(two_layers(), 0.5, "all")
    with pytest.raises(ValueError, match=r"^Nothing prunable: the model has no Linear or Conv layer\.$"):
        lth.prune(nn.ReLU(), 0.2)
    with pytest.raises(ValueError, match=r"^Unknown names in rate: typo; the model has 0, 1\.$"):
        lth.prune(two_layers(), {"0": 0.2, "typo": 0.2})
    with pytest.raises(ValueError, match=r"^Unknown names in rate: fc9;"):
        lth.prune(two_layers(), {"0": 0.5, "fc9": 0.5})
    with pytest.raises(ValueError, match=r"^NaN scores in layer '1'"):
        lth.prune(two_layers(second=(1, 2, math.nan, 4)), 0.5)


@pytest.mark.filterwarnings("ignore:Layer collapse")
@given(
    st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8),
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5]), min_size=1, max_size=6),
    st.sampled_from(["layer", "global"]),
)
def test_rounds_are_nested_and_hold_exactly_the_count(values, rates, scope):
    model = M.attach(two_layers(values[:4], values[4:]))
    for rate in rates:
        before = M.read(model)
        after = lth.prune(model, rate, scope)
        groups = [[n] for n in before] if scope == "layer" else [list(before)]
        for names in groups:
            survivors = torch.cat([before[n].flatten() for n in names])
            kept = torch.cat([after[n].flatten() for n in names])
            size = torch.cat([effective(model)[n].flatten().abs() for n in names])
            assert not (kept & ~survivors).any()
            n = int(survivors.sum())
            assert int(kept.sum()) == n - round(rate * n)
            gone = survivors & ~kept
            if gone.any():
                assert size[gone].max() <= size[kept].min()
        M.attach(model, after)
        weights(model, [-v * 3 for v in values[:4]], [v + 1 for v in values[4:]])  # training in between


# The paper's densities ------------------------------------------------------------------------------------------------

ROUNDS = (1, 3, 4, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 21, 24, 27, 30)
P_M = {  # percent of weights that remain after each of these rounds
    "lenet_300_100": (80.04, 51.28, 41.05, 26.32, 21.07, 13.52, 10.83, 8.68, 6.95, 5.57, 4.47, 3.58, 2.87, 1.85, 1.49,
                      0.96, 0.50, 0.26, 0.14),
    "conv2": (80.10, 51.41, 41.20, 26.47, 21.23, 13.66, 10.97, 8.81, 7.08, 5.69, 4.57, 3.68, 2.97, 1.93, 1.56, 1.02,
              0.54, 0.30, 0.16),
    "conv4": (81.08, 53.55, 43.63, 29.13, 23.88, 16.16, 13.35, 11.06, 9.18, 7.65, 6.40, 5.37, 4.51, 3.23, 2.75, 2.01,
              1.28, 0.84, 0.57),
    "conv6": (82.54, 56.39, 46.68, 32.07, 26.61, 18.38, 15.29, 12.74, 10.62, 8.86, 7.39, 6.18, 5.17, 3.62, 3.03, 2.13,
              1.27, 0.75, 0.45),
}  # fmt: skip


def paper_rates(model, conv):
    """20 % of the fully connected weights, `conv` of the convolutions, half as much of the output layer."""
    rates = {name: conv if name.startswith("conv") else 0.2 for name in M.prunable(model)}
    return rates | {"fc3": 0.1}


def test_lenet_has_the_papers_density_after_every_round():
    model = M.attach(models.create("lenet_300_100", seed=0))
    rates, series = paper_rates(model, None), {}
    for r in range(1, 31):
        M.attach(model, lth.prune(model, rates))
        series[r] = 100 * M.density(model)
    assert [round(series[r], 2) for r in ROUNDS] == list(P_M["lenet_300_100"])
    # what the figures print
    printed = {3: 51.3, 7: 21.1, 9: 13.5, 12: 7.0, 15: 3.6, 16: 2.9, 18: 1.9}
    assert {r: round(series[r], 1) for r in printed} == printed


@pytest.mark.parametrize(("name", "conv"), [("conv2", 0.10), ("conv4", 0.10), ("conv6", 0.15)])
def test_conv_nets_have_the_papers_density_after_every_round(name, conv):
    model = models.create(name, seed=0)
    rates = paper_rates(model, conv)
    total = {layer: module.weight.numel() for layer, module in M.prunable(model).items()}
    survivors, series = dict(total), {}
    for r in range(1, 31):
        survivors = {layer: n - round(rates[layer] * n) for layer, n in survivors.items()}
        series[r] = 100 * sum(survivors.values()) / sum(total.values())
        if r == 1:  # the arithmetic is that of the code
            pruned = lth.prune(model, rates)
            assert {layer: int(m.sum()) for layer, m in pruned.items()} == survivors
    assert [round(series[r], 2) for r in ROUNDS] == list(P_M[name])


def test_one_shot_densities_are_the_papers():
    """p from every layer and p / 2 from the output layer: the printed 67.5, 17.6, 5.17 % and 95.0 %."""
    model = models.create("lenet_300_100", seed=0)
    for p, printed in ((0.825, "17.6"), (0.95, "5.17"), (0.05, "95.0"), (0.325, "67.5")):
        density = 100 * M.density(lth.prune(model, {"fc1": p, "fc2": p, "fc3": p / 2}))
        assert str(density).startswith(printed)  # the paper cuts digits off


# The whole loop -------------------------------------------------------------------------------------------------------


class Trainer:
    """Stands for training: moves every parameter, differently in every call, and writes down what it was given."""

    def __init__(self, decay=True):
        self.calls, self.seen, self.trained, self.decay = [], [], [], decay

    def __call__(self, model, start, stop):
        self.calls.append((start, stop))
        self.seen.append((M.state(model), M.read(model), effective(model)))
        generator = torch.Generator().manual_seed(len(self.calls))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.add_(1)
                    module.num_batches_tracked.add_(7)
        self.trained.append(effective(model))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))


def magnitude(weight, mask, rate):
    """The next mask by the slow way."""
    n = int(mask.sum())
    alive = [i for i in range(mask.numel()) if mask.flatten()[i]]
    ranked = sorted(alive, key=lambda i: (-abs(float(weight.flatten()[i])), i))
    kept = torch.zeros(mask.numel(), dtype=torch.bool)
    kept[ranked[: n - round(rate * n)]] = True
    return kept.view(mask.shape)


def test_iterative_pruning_resets_everything_each_round():
    model, train = net(), Trainer()
    theta = M.state(model)
    levels = []
    for level in lth.imp(model, train, rounds=4, rate=0.2):
        assert same(effective(model), train.trained[-1])  # the trained ticket is on the model
        assert M.density(model) == level.density  # and as sparse at the end as at the start
        levels.append(level)
    assert [level.round for level in levels] == [0, 1, 2, 3, 4]
    assert train.calls == [(0, None)] * 5
    assert levels[0].density == 1.0
    for r, (state, masks, weight) in enumerate(train.seen):
        assert same(state, theta)  # weights, biases, batch norm and its running statistics
        assert same(masks, levels[r].masks)
        assert same(weight, {n: theta[f"{n}.weight"] * masks[n] for n in masks})
    for r in range(4):
        trained = train.trained[r]
        expected = {n: magnitude(trained[n], m, 0.2) for n, m in levels[r].masks.items()}
        assert same(levels[r + 1].masks, expected)  # by the weights at the end of the training
    assert [int(level.masks["4"].sum()) for level in levels] == [160, 128, 102, 82, 66]
    assert [int(level.masks["0"].sum()) for level in levels] == [36, 29, 23, 18, 14]


def test_levels_keep_their_masks_when_the_loop_goes_on():
    levels = list(lth.imp(net(), Trainer(), rounds=3, rate=0.5))
    assert [level.density for level in levels] == [M.density(level.masks) for level in levels]
    assert len({level.density for level in levels}) == 4


def test_global_scope_and_rates_by_layer():
    levels = list(lth.imp(net(), Trainer(), rounds=2, rate=0.2, scope="global"))
    assert [round(level.density * 196) for level in levels] == [196, 157, 126]
    only = list(lth.imp(net(), Trainer(), rounds=2, rate={"4": 0.5}))
    assert [int(level.masks["4"].sum()) for level in only] == [160, 80, 40]
    assert all(level.masks["0"].all() for level in only)  # a layer without a rate stays dense


def test_one_shot_is_one_round():
    model, train = net(), Trainer()
    theta = M.state(model)
    dense, ticket = lth.imp(model, train, rounds=1, rate={"0": 0.9, "4": 0.8})
    assert same(ticket.masks, {"0": magnitude(train.trained[0]["0"], dense.masks["0"], 0.9),
                               "4": magnitude(train.trained[0]["4"], dense.masks["4"], 0.8)})  # fmt: skip
    assert same(train.seen[1][0], theta)


def test_rewinding_trains_the_rest_of_the_schedule_from_the_weights_at_k():
    model, train = net(), Trainer()
    theta = M.state(model)
    levels = list(lth.imp(model, train, rounds=3, rate=0.2, rewind_to=500))
    assert train.calls == [(0, 500)] + [(500, None)] * 4
    assert same(train.seen[0][0], theta)
    theta_k = train.seen[1][0]
    assert same({n: theta_k[f"{n}.weight"] for n in ("0", "4")}, train.trained[0])
    assert int(theta_k["1.num_batches_tracked"]) == 7
    for state, masks, weight in train.seen[1:]:
        assert same(state, theta_k)
        assert same(weight, {n: theta_k[f"{n}.weight"] * masks[n] for n in masks})
    expected = {n: magnitude(train.trained[1][n], m, 0.2) for n, m in levels[0].masks.items()}
    assert same(levels[1].masks, expected)


def test_continued_training_prunes_the_weights_that_went_on_and_looks_at_the_ticket():
    model, train = net(), Trainer()
    theta = M.state(model)
    levels = list(lth.imp(model, train, rounds=3, rate=0.2, strategy="continue"))
    # trainings: dense; ticket 1, trunk on from dense; ticket 2, trunk on; ticket 3
    tickets, trunk = [0, 1, 3, 5], [0, 2, 4]
    assert train.calls == [(0, None)] * 6
    for r, i in enumerate(tickets):
        assert same(train.seen[i][0], theta)
        assert same(train.seen[i][1], levels[r].masks)
    for r in (1, 2):  # goes on from the trunk's weights under the new mask
        _, masks, weight = train.seen[trunk[r]]
        assert same(masks, levels[r].masks)
        assert same(weight, {n: train.trained[trunk[r - 1]][n] * m for n, m in masks.items()})
    for r in range(3):
        trained = train.trained[trunk[r]]
        expected = {n: magnitude(trained[n], m, 0.2) for n, m in levels[r].masks.items()}
        assert same(levels[r + 1].masks, expected)


@pytest.mark.parametrize("strategy", ["reset", "continue"])
def test_nothing_is_trained_after_the_last_level(strategy):
    model, train = net(), Trainer()
    for level in lth.imp(model, train, rounds=2, strategy=strategy):
        if level.round == 2:
            calls, ticket = len(train.calls), M.state(model)
    assert len(train.calls) == calls
    assert same(M.state(model), ticket)  # the last trained ticket stays on the model


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": "rewind"}, "Invalid strategy 'rewind': give 'reset' or 'continue'."),
        ({"rate": 1.2}, "Invalid rate 1.2: give the fraction of surviving weights to remove, 0 <= rate < 1."),
        ({"rate": {"fc1": 0.2}}, "Unknown names in rate: fc1;"),
        ({"scope": "all"}, "Invalid scope 'all': give 'global' or 'layer'."),
        ({"rounds": -1}, "Invalid rounds -1"),
        ({"rewind_to": -1}, "Invalid rewind_to -1"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(options, text):
    train = Trainer()
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        next(lth.imp(net(), train, **{"rounds": 2, **options}))
    assert train.calls == []


def test_a_model_with_masks_goes_on_from_them():
    model, train = net(), Trainer()
    half = {"4": torch.rand(10, 16) < 0.5}
    M.attach(model, half)
    dense, pruned = lth.imp(model, train, rounds=1, rate=0.5)
    assert torch.equal(dense.masks["4"], half["4"])
    assert not (pruned.masks["4"] & ~half["4"]).any()


# Controls -------------------------------------------------------------------------------------------------------------


def test_random_masks_keep_each_layers_count_and_nothing_else():
    model = models.create("lenet_300_100", seed=0)
    ticket = lth.prune(model, {"fc1": 0.9, "fc2": 0.8, "fc3": 0.5})
    before = {name: m.clone() for name, m in ticket.items()}
    control = lth.random_masks(ticket, torch.Generator().manual_seed(0))
    assert same(ticket, before)
    assert list(control) == list(ticket)
    for name, m in control.items():
        assert m.shape == ticket[name].shape
        assert m.dtype == torch.bool
        assert int(m.sum()) == int(ticket[name].sum())
        # it was really shuffled: two independent masks of density d overlap in d of their weights, not in all
        d, n = m.float().mean().item(), m.numel()
        overlap = (m & ticket[name]).sum().item() / n
        assert abs(overlap - d * d) < 5 * d * math.sqrt(1 / n)


def test_random_masks_follow_their_generator():
    ticket = lth.prune(models.create("lenet_300_100", seed=0), 0.8)
    state = torch.get_rng_state()
    one, again, other = (lth.random_masks(ticket, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, again)
    assert not any(torch.equal(one[name], other[name]) for name in ticket)


def test_random_reinitialisation_changes_every_survivor_and_no_mask():
    model = models.create("conv2", seed=0, in_shape=(1, 8, 8))
    masks = lth.prune(model, 0.5)
    M.attach(model, masks)
    ticket = effective(model)
    M.restore(model, M.state(models.create("conv2", seed=1, in_shape=(1, 8, 8))))
    for name, weight in effective(model).items():
        assert (weight[masks[name]] != ticket[name][masks[name]]).all()
        assert not weight[~masks[name]].any()
    assert same(M.read(model), masks)


# A golden trajectory --------------------------------------------------------------------------------------------------

GOLDEN_LOSSES = [2.480424820751013, 2.3550118321281697, 2.2408779408564197, 1.9662430896921401, 1.7299912752725561]
GOLDEN_LARGEST = {  # layer: (index, value) of its largest weight
    "fc1": (13345, 0.1505306109405575),
    "fc2": (14115, 0.1454605808901993),
    "fc3": (726, -0.2544607163196733),
}
GOLDEN_SUMS = [1186.0830301279793, 1778.8216210871406, 117.02222969996288]  # of |weight|, layer by layer


def test_golden_trajectory():
    """Pruning once and training what is left: a change beyond these digits means raising `VERSION` in lottery/lth.py.

    θ₀ is uniform and float64, because normal float32 draws differ in their last bit from one kind of CPU to another.
    """
    from lottery import data

    train = data.load("digits").train
    model = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)).double()
    generator = torch.Generator().manual_seed(0)
    theta = {name: torch.rand(t.shape, generator=generator, dtype=t.dtype) for name, t in M.state(model).items()}
    M.restore(model, {name: (t - 0.5) * math.sqrt(24 / sum((*t.shape, 1)[:2])) for name, t in theta.items()})
    M.attach(model, lth.prune(model, {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}))
    adam, losses = torch.optim.Adam(model.parameters(), lr=1.2e-3), []
    for x, y in zip(train.x[:1000].split(50), train.y[:1000].split(50), strict=True):
        loss = nn.functional.cross_entropy(model(x.double() / 255), y)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())

    assert lth.VERSION == 1
    assert [int(m.sum()) for m in M.read(model).values()] == [15_360, 24_000, 900]
    assert [losses[t] for t in (0, 1, 4, 9, 19)] == pytest.approx(GOLDEN_LOSSES, rel=1e-9)
    weights = {name: w.flatten() for name, w in effective(model).items()}
    largest = {name: int(w.abs().argmax()) for name, w in weights.items()}
    assert largest == {name: index for name, (index, _) in GOLDEN_LARGEST.items()}
    values = [float(weights[name][index]) for name, index in largest.items()]
    assert values == pytest.approx([value for _, value in GOLDEN_LARGEST.values()], rel=1e-9)
    assert [float(w.abs().sum()) for w in weights.values()] == pytest.approx(GOLDEN_SUMS, rel=1e-9)


def masks_like(model, change=lambda name, mask: (name, mask)):
    return dict(change(name, torch.ones_like(w, dtype=torch.bool)) for name, w in effective(model).items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda name, m: (f"module.{name}", m), "Unknown names in masks: module.0, module.2; the model has 0, 2."),
        (lambda name, m: (f"_orig_mod.{name}", m), "Unknown names in masks: _orig_mod.0, _orig_mod.2;"),
        (lambda name, m: (name, m.T), "Invalid mask for layer '0': torch.bool of shape (4, 3), needs torch.bool"),
        (lambda name, m: (name, m.flatten()), "Invalid mask for layer '0': torch.bool of shape (12,), needs"),
        (lambda name, m: (name, m.float()), "Invalid mask for layer '0': torch.float32 of shape (3, 4), needs"),
        (lambda name, m: (name, m.tolist()), "Invalid mask for layer '0': <class 'list'>"),
    ],
)
def test_masks_that_are_not_the_models_are_refused(change, text):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        lth.prune(model, 0.2, masks=masks_like(model, change))
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        M.attach(model, masks_like(model, change))
    scores = effective(model)
    with pytest.raises(ValueError, match=r"^(Unknown names in within|Invalid mask)"):
        M.top_k(scores, 0.5, within=masks_like(model, change))


def test_given_masks_of_some_layers_are_respected():
    model = two_layers()
    first = {"0": b(1, 0, 1, 1).view(2, 2)}
    assert same(flat(lth.prune(model, 0.34, masks=first)), {"0": b(1, 0, 0, 1), "1": b(1, 1, 0, 1)})


def test_a_layer_that_loses_everything_is_named():
    model = weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (1, 2, 3, 4), (0.1, 0.2, 0.3, 0.4))
    with pytest.warns(UserWarning, match=r"^Layer collapse: no weight is kept in 1; raise the density\.$"):
        kept = lth.prune(model, 0.5, "global")
    with pytest.raises(ValueError, match=r"^Layer collapse: no weight is kept in 1, so there is nothing to draw from"):
        lth.from_survivors(M.state(model), kept)
    with pytest.warns(UserWarning, match="Layer collapse"):
        assert [level.density for level in lth.imp(model, lambda *_: None, 1, 0.5, "global")] == [1, 0.5]


@pytest.mark.parametrize(
    ("rounds", "options", "text"),
    [
        (8, {"rate": 0.8}, "Round 2 of 8: Rate 0.8 leaves none of the 1 weights of layer '0'"),  # of 4, and 6
        (3, {"rate": 0.8, "scope": "global"}, "Round 2 of 3: Rate 0.8 leaves none of the 2 weights of the model"),
        (3, {"rate": {"0": 0.1, "1": 0.6}}, "Round 3 of 3: Rate 0.6 leaves none of the 1 weights of layer '1'"),
        (2, {"rate": {"0": 0.7}, "scope": "global"}, "Round 2 of 2: Rate 0.7 leaves none of the 1 weights"),
    ],
)
def test_a_chain_that_must_fail_is_refused_before_any_training(rounds, options, text):
    torch.manual_seed(0)  # the two largest weights are not in one layer
    model, trained = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)), []
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        list(lth.imp(model, lambda *a: trained.append(a), rounds, **options))
    assert trained == []
    assert M.read(model) == {}
    fewer = lth.imp(model, lambda *a: trained.append(a), int(text[6]) - 1, **options)
    assert len(list(fewer)) == int(text[6]), "one round fewer is possible"


@pytest.mark.parametrize(("name", "value"), [("rounds", 1.5), ("rounds", True), ("rewind_to", 1.5), ("rounds", "2")])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(ValueError, match=rf"^Invalid {name} {value!r}: give a whole number from 0\.$"):
        next(lth.imp(two_layers(), lambda *_: None, **{"rounds": 1, name: value}))


@pytest.mark.parametrize("rate", [None, "0.5", True, float("nan"), [0.5]])
def test_a_rate_is_a_number(rate):
    with pytest.raises(ValueError, match=rf"^Invalid rate {re.escape(repr(rate))}: give the fraction"):
        lth.prune(two_layers(), rate)
    assert same(lth.prune(two_layers(), torch.tensor(0.5)), lth.prune(two_layers(), 0.5))


def test_a_single_weight_has_no_deviation():
    theta = {"a.weight": torch.full((1, 1), 3.0), "b.weight": torch.tensor([[1.0, 2.0]])}
    noisy = lth.add_noise(theta, ["a", "b"], 2.0)
    assert noisy["a.weight"].tolist() == [[3.0]]
    assert (noisy["b.weight"] != theta["b.weight"]).all()
    with pytest.raises(ValueError, match=r"^Unknown names in layers: c; the state has a, b\.$"):
        lth.add_noise(theta, ["c"], 1.0)


def test_what_has_no_line_between_it():
    with pytest.raises(ValueError, match=r"^Invalid errors: give those along the line"):
        lth.instability([])
    with pytest.raises(ValueError, match=r"^Names missing in other: a, which the state has\.$"):
        lth.between({"a": torch.ones(2)}, {}, 0.5)
