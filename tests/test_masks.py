"""lottery.masks: the choice of weights (top_k), and masks on a model (attach, read, bake, state, restore)."""

import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize, prune

from lottery import baselines, cs, dynamic, grasp, lth, macs, models, soft_threshold, stochastic
from lottery import masks as M

settings.register_profile("patient", deadline=None, max_examples=60)
settings.load_profile("patient")


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def b(*values):
    return torch.tensor(values, dtype=torch.bool)


def small(seed=0):
    """Conv, batch norm, two linear layers: every kind of tensor that a reset has to bring back."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 2)
    )


def some_masks(model, density=0.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.weight.shape, generator=generator) < density for n, m in M.prunable(model).items()}


def step(model, optimiser, n=1, seed=0):
    torch.manual_seed(seed)
    for _ in range(n):
        optimiser.zero_grad()
        model(torch.randn(8, 1, 4, 4)).pow(2).sum().backward()
        optimiser.step()


def effective(model):
    return {name: layer.weight.detach().clone() for name, layer in M.prunable(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def message(text):
    return f"^{re.escape(text)}$"


# top_k: hand-computed -------------------------------------------------------------------------------------------------


def test_keeps_the_highest_scores_of_all_layers_together():
    scores = {"a": t(0.1, 0.9, 0.4), "b": t(0.8, 0.2)}
    assert same(M.top_k(scores, 0.4), {"a": b(0, 1, 0), "b": b(1, 0)})
    assert same(M.top_k(scores, 0.6), {"a": b(0, 1, 1), "b": b(1, 0)})
    assert same(M.top_k(scores, 1.0), {"a": b(1, 1, 1), "b": b(1, 1)})


def test_scope_layer_ranks_each_layer_by_itself():
    scores = {"a": t(10, 9, 8, 7), "b": t(0.1, 0.3, 0.2, 0.0)}
    assert same(M.top_k(scores, 0.5, scope="layer"), {"a": b(1, 1, 0, 0), "b": b(0, 1, 1, 0)})
    assert same(M.top_k(scores, 0.5), {"a": b(1, 1, 1, 1), "b": b(0, 0, 0, 0)})


def test_density_of_each_layer():
    scores = {"a": t(1, 2, 3, 4), "b": t(1, 2, 3, 4)}
    assert same(M.top_k(scores, {"a": 0.25, "b": 0.75}, scope="layer"), {"a": b(0, 0, 0, 1), "b": b(0, 1, 1, 1)})


def test_masks_have_the_shapes_of_the_scores_and_their_order():
    scores = {"z": torch.rand(2, 3, 1), "a": torch.rand(4)}
    masks = M.top_k(scores, 0.5)
    assert list(masks) == ["z", "a"]
    assert [m.shape for m in masks.values()] == [(2, 3, 1), (4,)]
    assert all(m.dtype == torch.bool for m in masks.values())


def test_ties_keep_the_earlier_weight():
    scores = {"a": torch.ones(2, 2), "b": torch.ones(3)}
    assert same(M.top_k(scores, 5 / 7), {"a": torch.ones(2, 2, dtype=torch.bool), "b": b(1, 0, 0)})
    assert same(M.top_k({"a": t(1, 2, 1, 2, 1)}, 0.6), {"a": b(1, 1, 0, 1, 0)})
    many = M.top_k({"a": torch.zeros(10_000)}, 0.3)["a"]  # long enough for the sorts that are not stable
    assert many[:3_000].all()
    assert not many[3_000:].any()


def test_signed_zeros_are_a_tie():
    assert same(M.top_k({"a": t(-0.0, 0.0, -0.0)}, 1 / 3), {"a": b(1, 0, 0)})


def test_infinite_scores_are_ordinary():
    scores = {"a": t(math.inf, -math.inf, 0, 5), "b": t(-math.inf, math.inf)}
    assert same(M.top_k(scores, 1 / 3), {"a": b(1, 0, 0, 0), "b": b(0, 1)})
    assert same(M.top_k(scores, 5 / 6), {"a": b(1, 1, 1, 1), "b": b(0, 1)})
    # what is allowed is kept even at -inf, what is not is left out even at +inf
    only = M.top_k(scores, 1 / 3, within={"a": b(0, 1, 0, 0), "b": b(1, 0)})
    assert same(only, {"a": b(0, 1, 0, 0), "b": b(1, 0)})


def test_nan_scores_are_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match=r"^NaN scores in layer 'b'"):
        M.top_k({"a": t(1, 2), "b": t(1, math.nan)}, 0.5)


def test_pruned_weights_do_not_come_back_with_the_highest_score():
    scores = {"a": t(100, 1, 2), "b": t(50, 3)}
    kept = M.top_k(scores, 0.4, within={"a": b(0, 1, 1), "b": b(0, 1)})
    assert same(kept, {"a": b(0, 0, 1), "b": b(0, 1)})


def test_within_restricts_candidates_but_not_the_denominator():
    scores, within = {"a": torch.arange(10.0)}, {"a": torch.arange(10) < 6}
    assert int(M.top_k(scores, 0.5, within=within)["a"].sum()) == 5  # half of ten, not of six
    assert same(M.top_k(scores, 0.6, within=within), within)
    with pytest.raises(ValueError, match=r"^Cannot keep 7 weights: only 6 are not pruned yet"):
        M.top_k(scores, 0.7, within=within)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_all_pruned_is_an_error(scope):
    nothing = {"a": b(0, 0, 0, 0)}
    with pytest.raises(ValueError, match="only 0 are not pruned yet"):
        M.top_k({"a": t(1, 2, 3, 4)}, 0.5, scope, within=nothing)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_density_out_of_range(density):
    text = f"Invalid density {density}: give a fraction of weights to keep, 0 < density <= 1."
    with pytest.raises(ValueError, match=message(text)):
        M.top_k({"a": t(1, 2)}, density)


def test_k_of_zero_is_an_error():
    with pytest.raises(ValueError, match=r"^Density 0.1 keeps none of the 4 weights"):
        M.top_k({"a": t(1, 2, 3, 4)}, 0.1)
    scores = {"a": torch.rand(1000), "b": torch.rand(3)}
    assert M.density(M.top_k(scores, 0.1)) == pytest.approx(100 / 1003)
    with pytest.raises(ValueError, match="layer 'b'"):
        M.top_k(scores, 0.1, scope="layer")


def test_other_bad_arguments():
    with pytest.raises(ValueError, match=message("Invalid scope 'local': give 'global' or 'layer'.")):
        M.top_k({"a": t(1, 2)}, 0.5, scope="local")
    with pytest.raises(ValueError, match=r"^Nothing to prune"):
        M.top_k({}, 0.5)
    with pytest.raises(ValueError, match=r"^Unknown names in density: c;"):
        M.top_k({"a": t(1, 2)}, {"a": 0.5, "c": 0.5}, scope="layer")
    with pytest.raises(ValueError, match=r"^Names missing in density: b,"):
        M.top_k({"a": t(1, 2), "b": t(1, 2)}, {"a": 0.5}, scope="layer")
    with pytest.raises(ValueError, match=r"^Names missing in within: b,"):
        M.top_k({"a": t(1, 2), "b": t(1, 2)}, 0.5, within={"a": b(1, 1)})


@pytest.mark.parametrize(
    ("density", "n", "k"),
    [
        # removed = (1 - density) n, a half goes to the even side: 2.5 -> 2, 7.5 -> 8, 0.5 -> 0, 1.5 -> 2
        (0.75, 10, 8), (0.25, 10, 2), (0.5, 5, 3), (0.5, 7, 3), (0.5, 1, 1), (0.5, 3, 1),
        # decimal densities whose float product is a hair off: 15.000000000000002, 80.00000000000001
        (0.85, 100, 85), (0.2, 100, 20), (0.9, 10, 9), (0.7, 10, 7), (0.15, 100, 15),
    ],
)  # fmt: skip
def test_rounding_is_half_to_even(density, n, k):
    assert int(M.top_k({"a": torch.rand(n)}, density)["a"].sum()) == k


# top_k: properties against brute force --------------------------------------------------------------------------------

values = st.one_of(st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False))  # small integers make ties
layers = st.dictionaries(st.sampled_from("abcd"), st.lists(values, min_size=1, max_size=12), min_size=1)


def removed(density, n):
    """round_half_even((1 - density) n), in floating point as it is written."""
    return round((1 - density) * n)


def brute_force(scores, k, allowed):
    """Indices of the k best of all scores in a row: highest first, then earliest."""
    flat = [value for layer in scores.values() for value in layer]
    ranked = sorted((i for i in range(len(flat)) if allowed[i]), key=lambda i: (-flat[i], i))
    return set(ranked[:k])


@given(layers, st.floats(0.01, 1), st.data())
def test_global_top_k_is_the_brute_force_choice(scores, density, data):
    n = sum(map(len, scores.values()))
    k = n - removed(density, n)
    allowed = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    tensors, within, start = {}, {}, 0
    for name, layer in scores.items():
        tensors[name], within[name] = t(*layer), b(*allowed[start : start + len(layer)])
        start += len(layer)
    if not 1 <= k <= sum(allowed):
        with pytest.raises(ValueError, match="keep"):
            M.top_k(tensors, density, within=within)
        return
    found = torch.cat(list(M.top_k(tensors, density, within=within).values()))
    assert set(found.nonzero().flatten().tolist()) == brute_force(scores, k, allowed)


@given(layers, st.floats(0.01, 1))
def test_layer_scope_is_one_global_choice_per_layer(scores, density):
    tensors = {name: t(*layer) for name, layer in scores.items()}
    if any(len(layer) == removed(density, len(layer)) for layer in scores.values()):
        with pytest.raises(ValueError, match="keeps none"):
            M.top_k(tensors, density, scope="layer")
        return
    alone = {name: M.top_k({name: s}, density)[name] for name, s in tensors.items()}
    assert same(M.top_k(tensors, density, scope="layer"), alone)
    assert same(M.top_k(tensors, dict.fromkeys(tensors, density), scope="layer"), alone)


@pytest.mark.parametrize("n", [1, 3, 10, 25, 50, 150])
def test_percentages_are_rounded_as_the_decimals_they_are(n):
    for percent in range(1, 101):
        k = n - removed(percent / 100, n)
        if k == 0:
            with pytest.raises(ValueError, match="keeps none"):
                M.top_k({"a": torch.zeros(n)}, percent / 100)
        else:
            assert int(M.top_k({"a": torch.zeros(n)}, percent / 100)["a"].sum()) == k, percent


@given(st.lists(values, min_size=2, max_size=30, unique=True), st.floats(0.1, 1), st.floats(0.1, 1))
def test_smaller_densities_are_nested(scores, one, other):
    tensors, (low, high) = {"a": t(*scores)}, sorted((one, other))
    if removed(low, len(scores)) < len(scores):
        assert not (M.top_k(tensors, low)["a"] & ~M.top_k(tensors, high)["a"]).any()


def test_scores_are_left_alone_and_may_have_any_float_type():
    scores = {"a": torch.rand(50, requires_grad=True), "b": torch.rand(50, dtype=torch.float64)}
    before = {name: s.detach().clone() for name, s in scores.items()}
    M.top_k(scores, 0.3)
    assert same({n: s.detach() for n, s in scores.items()}, before)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert int(M.top_k({"a": torch.arange(8).to(dtype)}, 0.25)["a"].sum()) == 2


# Which weights --------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Shared tensors, a shared module, attention, an embedding, a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.again = self.first
        self.embedding = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.up = nn.ConvTranspose2d(1, 1, 2)
        self.norm = nn.LayerNorm(4)
        self.line = nn.Conv1d(4, 2, 3)
        self.block = nn.Conv3d(1, 1, 2)

    def forward(self, x):
        return self.tied(torch.relu(self.again(x))) + self.first(x)


def test_prunable_lists_linear_and_conv_in_module_order():
    assert list(M.prunable(small())) == ["0", "4", "6"]
    assert list(M.prunable(models.create("conv2"))) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert list(M.prunable(M.attach(models.create("conv2")))) == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_shared_tensors_and_modules_are_listed_once():
    assert list(M.prunable(Odd())) == ["first", "attention.out_proj", "line", "block"]


def test_parameters_that_cannot_be_pruned_are_reported_by_name():
    expected = ["embedding.weight", "attention.in_proj_weight", "up.weight"]
    assert M.unprunable(Odd()) == expected
    assert M.unprunable(M.attach(Odd())) == expected
    assert M.unprunable(small()) == []


def test_a_mask_on_a_shared_tensor_acts_wherever_it_is_used():
    model = Odd()
    mask = torch.rand(4, 4) < 0.5
    M.attach(model, {"first": mask})
    for layer in (model.first, model.tied, model.again):
        assert torch.equal(layer.weight != 0, mask)
    shared = {id(p) for n, p in model.named_parameters() if n.endswith("original")}
    assert len(shared) == 1  # still one tensor
    assert list(M.read(model)) == ["first"]
    M.attach(model, {"first": ~mask})
    assert torch.equal(model.tied.weight != 0, ~mask)
    model(torch.randn(2, 4)).sum().backward()
    assert M.density(M.read(model)) == (~mask).float().mean().item()


def test_a_shared_tensor_stays_shared_when_baked_and_restored():
    model = Odd()
    theta = M.state(model)
    assert theta.keys() == M.state(M.attach(model, {"first": torch.rand(4, 4) < 0.5})).keys()
    M.restore(model, theta)
    M.bake(model)
    assert model.tied.weight is model.first.weight
    assert M.state(model).keys() == theta.keys()


# attach, read, density ------------------------------------------------------------------------------------------------


def test_attached_weights_are_the_product():
    model = small()
    before, masks = effective(model), some_masks(model)
    assert M.attach(model, masks) is model
    assert same(effective(model), {name: before[name] * masks[name] for name in masks})
    assert same(M.read(model), masks)
    assert all(m.dtype == torch.bool for m in M.read(model).values())


def test_attaching_nothing_gives_all_ones_and_the_same_outputs():
    model, x = small().eval(), torch.randn(3, 1, 4, 4)
    before = model(x)
    M.attach(model)
    assert torch.equal(model(x), before)
    assert all(m.all() for m in M.read(model).values())
    assert M.density(model) == 1.0


def test_attaching_again_copies_in_place_and_never_stacks():
    model = M.attach(small())
    buffers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    parameters = [id(p) for p in model.parameters()]
    for seed in range(3):
        masks = some_masks(model, seed=seed)
        M.attach(model, masks)
        assert same(M.read(model), masks)
    M.attach(model)  # nothing to add, nothing to reset
    assert same(M.read(model), masks)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == buffers
    assert [id(p) for p in model.parameters()] == parameters
    for layer in M.prunable(model).values():
        assert len(layer.parametrizations.weight) == 1


def test_a_pruned_weight_can_be_attached_again():
    """A mask hides the weight and does not destroy it: what decides is the last mask."""
    model = small()
    before, masks = effective(model), some_masks(model)
    M.attach(model, masks)
    M.attach(model, {name: torch.ones_like(m) for name, m in masks.items()})
    assert same(effective(model), before)


def test_an_optimiser_built_before_the_masks_stays_valid():
    model = small()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimiser, 2)
    moments = {id(p): optimiser.state[p]["exp_avg"].clone() for p in model.parameters()}
    masks = some_masks(model)
    M.attach(model, masks)
    assert {id(p) for p in model.parameters()} == moments.keys()
    assert all(torch.equal(optimiser.state[p]["exp_avg"], moments[id(p)]) for p in model.parameters())
    before = effective(model)
    step(model, optimiser, 2)
    for name, weight in effective(model).items():
        assert (weight[masks[name]] != before[name][masks[name]]).all()


def test_partial_masks_leave_the_other_layers_alone():
    model = small()
    before, mask = effective(model), torch.rand(5, 12) < 0.5
    M.attach(model, {"4": mask})
    assert same(M.read(model), {"4": mask})
    assert torch.equal(effective(model)["0"], before["0"])
    assert not parametrize.is_parametrized(model[6])
    assert M.density(model) == (27 + int(mask.sum()) + 10) / (27 + 60 + 10)
    other = torch.rand(2, 5) < 0.5
    M.attach(model, {"6": other})
    assert same(M.read(model), {"4": mask, "6": other})
    M.attach(model)
    assert torch.equal(M.read(model)["4"], mask)
    assert M.read(model)["0"].all()


def test_read_gives_copies_and_attach_takes_copies():
    model = small()
    masks = some_masks(model)
    given_masks = {name: m.clone() for name, m in masks.items()}
    M.attach(model, given_masks)
    for m in (*given_masks.values(), *M.read(model).values()):
        m.fill_(True)
    assert same(M.read(model), masks)


def test_bad_masks_are_refused_before_anything_changes():
    model = small()
    good = some_masks(model)
    for bad, text in (
        ({**good, "9": good["4"]}, "Unknown names in masks: 9;"),
        ({**good, "6": good["6"].float()}, "Invalid mask for layer '6': torch.float32 of shape (2, 5)"),
        ({**good, "6": good["6"].T}, "Invalid mask for layer '6': torch.bool of shape (5, 2)"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            M.attach(model, bad)
        assert M.read(model) == {}
    with pytest.raises(ValueError, match=r"^Invalid masks, a list: give {layer name: mask}\.$"):
        M.attach(model, [good["4"]])
    with pytest.raises(ValueError, match=r"^Unknown names in layers: 1; the model has 0, 4, 6\.$"):
        cs.attach(model, layers=[1])
    with pytest.raises(ValueError, match=r"^Nothing prunable"):
        M.attach(nn.ReLU())
    made = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"^Nothing prunable: the weight of 0 is made of other tensors\.$"):
        M.attach(made)


def test_density_counts_masks_or_weights():
    assert M.density({"a": b(1, 0, 0), "b": b(1)}) == 0.5
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    assert M.density(model) == 7 / 8
    with torch.no_grad():
        M.attach(model).get_parameter("0.parametrizations.weight.original").zero_()
    assert M.density(model) == 1.0  # a kept weight counts, also one that happens to be zero
    with pytest.raises(ValueError, match=r"^No density"):
        M.density(nn.ReLU())


# Training with masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_pruned_weights_stay_zero_and_survivors_of_both_signs_move(optimiser):
    model = small()
    masks = some_masks(model)
    kind = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=0.1),
    }[optimiser](model.parameters())
    step(model, kind, 3)  # momentum from before the masks
    M.attach(model, masks)
    before = effective(model)
    step(model, kind, 3)
    for name, weight in effective(model).items():
        assert not weight[~masks[name]].any()
        for sign in (1, -1):
            moved = masks[name] & (before[name].sign() == sign)
            assert moved.any()
            assert (weight[moved] != before[name][moved]).all()
    assert M.density(model) == M.density(masks)


def test_pruned_weights_get_exactly_zero_gradient():
    model = small()
    masks = some_masks(model)
    M.attach(model, masks)
    model(torch.randn(8, 1, 4, 4)).pow(2).sum().backward()
    for name, layer in M.prunable(model).items():
        gradient = layer.parametrizations.weight.original.grad
        assert not gradient[~masks[name]].any()
        assert gradient[masks[name]].any()


def test_deepcopy_is_independent():
    model = M.attach(small(), some_masks(small()))
    model(torch.randn(2, 1, 4, 4))
    twin = copy.deepcopy(model)
    masks, weights = M.read(model), effective(model)
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    M.attach(twin, {name: ~m for name, m in masks.items()})
    assert same(M.read(model), masks)
    assert same(effective(model), weights)
    assert same(M.read(twin), {name: ~m for name, m in masks.items()})


def test_functional_call_and_gradients():
    model = M.attach(small(), some_masks(small())).eval()
    x, tensors = torch.randn(4, 1, 4, 4), dict(model.named_parameters())
    gradients = grad(lambda p: functional_call(model, p, (x,)).pow(2).sum())(tensors)
    model(x).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_a_population_with_its_own_masks_each_under_vmap():
    nets = [M.attach(models.create("lenet_300_100", seed=i, in_shape=(1, 4, 4))) for i in range(3)]
    for i, net in enumerate(nets):
        M.attach(net, some_masks(net, seed=i))
    parameters, buffers = stack_module_state(nets)
    x = torch.randn(3, 5, 1, 4, 4)
    together = vmap(lambda p, b, x: functional_call(nets[0], (p, b), (x,)))(parameters, buffers, x)
    torch.testing.assert_close(together, torch.stack([net(x[i]) for i, net in enumerate(nets)]))


def test_moves_between_types_keep_the_masks():
    model = small()
    masks = some_masks(model)
    M.attach(model, masks)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert same(M.read(model), masks)
        assert all(layer.weight.dtype == dtype for layer in M.prunable(model).values())
    assert M.attach(small().double(), masks).double()(torch.randn(2, 1, 4, 4).double()).dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_between_devices_keep_the_masks():
    model = small()
    masks = some_masks(model)
    M.attach(model, masks).cuda()
    assert same({name: m.cpu() for name, m in M.read(model).items()}, masks)
    M.attach(model, masks)  # masks from the CPU
    assert all(m.is_cuda for m in M.read(model).values())
    kept = M.top_k({n: layer.weight.detach().abs() for n, layer in M.prunable(model).items()}, 0.2, within=masks)
    assert all(m.is_cuda for m in kept.values())
    assert M.density(model.cpu()) == M.density(masks)


# bake -----------------------------------------------------------------------------------------------------------------


def test_baked_model_is_a_plain_one_with_the_same_outputs():
    model = small().eval()
    masks = some_masks(model)
    plain_keys = model.state_dict().keys()
    M.attach(model, masks)
    x = torch.randn(6, 1, 4, 4)
    expected, weights = model(x), effective(model)
    assert M.bake(model) is model
    assert torch.equal(model(x), expected)
    assert same(effective(model), weights)
    assert model.state_dict().keys() == plain_keys
    assert M.read(model) == {}
    assert M.density(model) == M.density(masks)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert M.bake(model) is model  # once more changes nothing


# state and restore ----------------------------------------------------------------------------------------------------


def test_state_has_the_canonical_names_with_or_without_masks():
    model = small()
    names = set(model.state_dict())
    plain = M.state(model)
    assert plain.keys() == names
    M.attach(model, some_masks(model))
    assert same(M.state(model), plain)  # the tensor behind the mask, and the mask is no part of it
    M.bake(model)
    assert M.state(model).keys() == names


def test_state_is_a_copy():
    model = M.attach(small())
    theta = M.state(model)
    kept = copy.deepcopy(theta)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert same(theta, kept)
    assert not any(tensor.requires_grad for tensor in theta.values())


def test_restore_brings_back_everything_and_keeps_the_masks():
    model = small()
    theta, masks = M.state(model), some_masks(model)
    M.attach(model, masks)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    trained = M.state(model)
    for name in (
        "0.weight",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ):
        assert not torch.equal(trained[name], theta[name]), name
    identities = [id(p) for p in model.parameters()]
    assert M.restore(model, theta) is model
    assert same(M.state(model), theta)
    assert same(M.read(model), masks)
    assert same(effective(model), {name: theta[f"{name}.weight"] * masks[name] for name in masks})
    assert [id(p) for p in model.parameters()] == identities  # in place: an optimiser stays valid
    M.restore(model, trained)
    assert same(M.state(model), trained)


def test_restore_crosses_from_masked_to_plain_models():
    model = M.attach(small(), some_masks(small()))
    twin = small(seed=5)
    M.restore(twin, M.state(model))
    assert same(M.state(twin), M.state(model))


def test_restore_refuses_what_does_not_fit_and_changes_nothing():
    model = M.attach(small())
    theta = M.state(model)
    short = {name: tensor for name, tensor in theta.items() if name != "1.running_var"}
    for bad, text in (
        (short, "Names missing in state: 1.running_var"),
        ({**theta, "extra": t(1)}, "Unknown names in state: extra"),
        ({**{n: v + 1 for n, v in theta.items()}, "6.bias": t(1, 2, 3)}, "Cannot restore '6.bias': shape (3,)"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(text)):
            M.restore(model, bad)
        assert same(M.state(model), theta)


def test_writes_to_the_effective_weight_are_lost_and_restore_is_not():
    """Why state and restore exist: a reinitialisation by any of these would train the winning ticket again."""
    model = M.attach(models.create("lenet_300_100", seed=0), some_masks(models.create("lenet_300_100", seed=0)))
    before = effective(model)
    for layer in M.prunable(model).values():
        nn.init.xavier_normal_(layer.weight)
        layer.reset_parameters()
        with torch.no_grad():
            layer.weight.copy_(torch.ones_like(layer.weight))
            layer.weight.data.zero_()
    assert same(effective(model), before)
    M.restore(model, M.state(models.create("lenet_300_100", seed=1)))
    for name, weight in effective(model).items():
        kept = M.read(model)[name]
        assert (weight[kept] != before[name][kept]).all()
        assert not weight[~kept].any()


def test_baking_a_deep_copy_leaves_the_original_alone():
    model = M.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    M.attach(model, {"0": torch.zeros(3, 4, dtype=torch.bool)})
    x = torch.randn(5, 4)
    expected = model(x)
    baked = M.bake(copy.deepcopy(model))
    assert torch.equal(model(x), expected)
    assert torch.equal(baked(x), expected)
    assert type(baked[0]) is nn.Linear
    assert M.read(model)["0"].sum() == 0


# Under PyTorch's own transformations ----------------------------------------------------------------------------------


def trained(model, x, y, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def masked_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return M.attach(model, {name: torch.rand(layer.weight.shape) < 0.5 for name, layer in M.prunable(model).items()})


def examples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def test_a_compiled_model_trains_alike_and_sees_new_masks():
    (x, y), plain, model = examples(), masked_net(), masked_net()
    compiled = torch.compile(model, backend="aot_eager")
    trained(plain, x, y)
    trained(compiled, x, y)
    for a, b in zip(M.state(plain).values(), M.state(model).values(), strict=True):
        torch.testing.assert_close(a, b)
    M.attach(model, {"0": torch.zeros(5, 6, dtype=torch.bool)})
    torch.testing.assert_close(compiled(x), model[2](torch.relu(model[0].bias)).expand(8, 3))


def test_autocast_keeps_what_is_pruned_at_zero():
    (x, y), model = examples(), masked_net().float()
    kept = M.read(model)
    with torch.autocast("cpu", torch.bfloat16):
        trained(model, x.float(), y)
    assert all(not layer.weight[~kept[name]].any() for name, layer in M.prunable(model).items())
    assert model[0].weight.dtype == torch.float32


# Layers of other kinds ------------------------------------------------------------------------------------------------


def batch(n=10, size=8):
    return [(torch.randn(n, size), torch.arange(n) % 3)]


def three(first=None):
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def used(model):
    model(torch.randn(2, 8))
    return model


@pytest.mark.parametrize(
    "hooked", [nn.utils.spectral_norm, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("use", [lambda model: model, used], ids=["new", "used"])
def test_weights_that_are_made_of_other_tensors_are_not_prunable(hooked, use):
    model = use(three(hooked(nn.Linear(8, 6))))
    assert list(M.prunable(model)) == ["2"]
    assert M.unprunable(model)
    for scores in (baselines.snip_scores(model, batch()), grasp.scores(model, batch())):
        assert list(scores) == ["2"]
        assert scores["2"].any()
    assert macs.count(model, (8,)) == {"2": 18}
    before = model(torch.ones(1, 8))
    M.attach(model.eval(), {"2": torch.ones(3, 6, dtype=torch.bool)})
    assert model(torch.ones(1, 8)).shape == before.shape


def test_reading_moves_no_spectral_norm():
    model = three(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6))).train()
    before = copy.deepcopy(model.state_dict())
    lth.prune(model, 0.2)
    baselines.magnitude_scores(model)
    assert M.density(model) == 1
    assert same(model.state_dict(), before)
    assert model[0].parametrizations.weight[0].training
    M.attach(model)
    before = copy.deepcopy(model.state_dict())
    dynamic.GMP(0.5).kept(model, 1.0)
    dynamic.DNW(0.5).kept(model)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    "by_torch",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
        lambda layer: prune.custom_from_mask(layer, "weight", torch.ones(3, 6)),
        lambda layer: [prune.random_unstructured(layer, "weight", 2) for _ in range(2)],
    ],
)
def test_a_layer_that_torch_has_pruned_is_refused_before_anything_changes(by_torch):
    model = three()
    by_torch(model[2])
    text = message(
        "Layer '2' is pruned by torch.nn.utils.prune: call torch.nn.utils.prune.remove(layer, 'weight') first, which "
        "leaves its zeros."
    )
    for f in (
        M.prunable, M.density, M.attach, cs.attach, lambda m: lth.prune(m, 0.2), lambda m: macs.count(m, (8,)),
        lambda m: grasp.scores(m, batch()), lambda m: baselines.erk(m, 0.5), lambda m: soft_threshold.attach(m, -5.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            f(model)
    assert not parametrize.is_parametrized(model[0])
    left = int(model[2].weight.count_nonzero())
    prune.remove(model[2], "weight")
    assert M.density(model) == pytest.approx((48 + left) / 66)


class Tied(nn.Module):
    """An autoencoder whose second half has the first one's weight, under a name of its own."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(6, 6)
        self.dec_w = self.enc.weight

    def forward(self, x):
        return nn.functional.linear(torch.relu(self.enc(x)), self.dec_w)


def test_a_weight_that_is_another_parameter_as_well_is_refused_before_anything_changes():
    model = nn.Sequential(Tied(), nn.Linear(6, 3))
    text = message(
        "Layer '0.enc' shares its weight with the parameter '0.dec_w', which a mask would not reach: use the layer's "
        "own `weight` in its place."
    )
    for f in (M.attach, cs.attach, soft_threshold.STR().attach, dynamic.DNW(0.5).attach, lambda m: lth.prune(m, 0.2)):
        with pytest.raises(ValueError, match=text):
            f(model)
    assert not parametrize.is_parametrized(model[1])
    model[1].weight = model[0].enc.weight  # tied under the name of a layer's weight is reached
    del model[0].dec_w
    assert list(M.prunable(M.attach(model))) == ["0.enc"]
    assert parametrize.is_parametrized(model[1])


def test_pruning_a_bias_with_torch_is_no_matter():
    model = three()
    prune.l1_unstructured(model[0], "bias", 0.5)
    assert list(M.prunable(M.attach(model))) == ["0", "2"]


def test_lazy_layers_are_refused():
    with pytest.raises(
        ValueError, match=r"^Layer '0' is lazy and has no weight yet: run the model on a batch first\.$"
    ):
        M.attach(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("part", ["all", "one layer"])
def test_a_model_without_values_is_refused(part):
    model = three()
    theta = M.state(model)
    (model if part == "all" else model[2]).to("meta")
    for f in (
        lambda: M.attach(model), lambda: M.restore(model, theta), lambda: M.density(model), lambda: cs.attach(model),
        lambda: soft_threshold.attach(model, -5.0), lambda: lth.prune(model, 0.5),
        lambda: baselines.synflow(model, (8,), 0.5), lambda: M.top_k(effective(model), 0.5),
        lambda: baselines.magnitude_scores(model),
        lambda: macs.effective(model, (8,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"meta device"):
            f()
    assert not any(parametrize.is_parametrized(layer) for layer in model)
    with pytest.raises(ValueError, match=r"^Cannot restore '0.weight' on the meta device"):
        M.restore(three(), {name: t.to("meta") for name, t in theta.items()})
    assert sum(macs.count(model.to("meta"), (8,)).values()) == 66


# One thing that prunes ------------------------------------------------------------------------------------------------


PRUNERS = {
    "Mask": M.attach,
    "Gate": lambda model: cs.attach(model, 0.1),
    "SoftThreshold": lambda model: soft_threshold.attach(model, -2.0),
    "TopK": dynamic.DNW(0.5).attach,
    "HardConcrete": stochastic.L0().attach,
}


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in itertools.permutations(PRUNERS, 2) if pair != ("Mask", "SoftThreshold")]
)
def test_a_weight_carries_one_thing_that_prunes(first, second):
    model = PRUNERS[first](three())
    before = [type(p).__name__ for p in model[0].parametrizations.weight]
    with pytest.raises(
        ValueError, match=r"^Layer '\w+' (is pruned by a \w+ already|has another parametrization): call"
    ):
        PRUNERS[second](model)
    assert [type(p).__name__ for p in model[0].parametrizations.weight] == before
    M.bake(model)
    PRUNERS[second](model)


def test_thresholds_above_a_mask_leave_what_both_leave():
    masks = {"0": torch.rand(6, 8) < 0.5, "2": torch.rand(3, 6) < 0.5}
    model = PRUNERS["SoftThreshold"](M.attach(three(), masks))
    alpha = torch.sigmoid(torch.tensor(-2.0))
    left = {name: masks[name] & (M.original(layer).abs() > alpha) for name, layer in M.prunable(model).items()}
    assert same(M.remaining(model), left)
    assert M.density(model) == sum(int(m.sum()) for m in left.values()) / 66 < M.density(masks)
    assert same(M.read(model), masks)


def test_what_remains_is_what_is_not_zero_when_a_mask_is_not_alone():
    class Threshold(nn.Module):
        def forward(self, w):
            return w * (w.abs() > 0.15)

    masks = {"0": torch.rand(6, 8) < 0.5, "2": torch.ones(3, 6, dtype=torch.bool)}
    first, last = three(), M.attach(three(), masks)
    parametrize.register_parametrization(first[0], "weight", Threshold())
    M.attach(first, masks)  # a mask after it
    parametrize.register_parametrization(last[0], "weight", Threshold())
    for model in (first, last):
        left = (M.original(model[0]).abs() > 0.15) & masks["0"]
        assert 0 < int(left.sum()) < int(masks["0"].sum())
        assert same(M.remaining(model), {"0": left, "2": masks["2"]})
        assert M.density(model) == (int(left.sum()) + 18) / 66
        assert macs.effective(model, (8,)) == {"0": pytest.approx(int(left.sum())), "2": 18.0}


def test_a_hardened_gate_counts_its_mask():
    model = cs.attach(three(), 0.1)
    with torch.no_grad():
        model[0].parametrizations.weight[0].s[:3] = -1.0
    cs.harden(model)
    with torch.no_grad():
        M.original(model[0])[5, 5] = 0.0  # kept, and zero by chance
    assert M.density(model) == (24 + 18) / 66
    assert macs.effective(model, (8,)) == {"0": 24.0, "2": 18.0}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("prepare", [lambda model: model, PRUNERS["SoftThreshold"], PRUNERS["Gate"]])
def test_the_density_of_a_diverged_network_is_an_error(value, prepare):
    model = prepare(three())
    with torch.no_grad():
        M.original(model[2])[1, 1] = value
    for f in (M.density, M.remaining, soft_threshold.budgets, lambda m: macs.effective(m, (8,))):
        with pytest.raises(
            ValueError, match=message("NaN or infinity in the weights of layer '2': the training diverged.")
        ):
            f(model)


@pytest.mark.parametrize("density", [None, "0.5", True, [0.5], math.nan, torch.tensor([0.5])])
def test_a_density_is_a_number(density):
    text = message(f"Invalid density {density!r}: give a fraction of weights to keep, 0 < density <= 1.")
    for f in (
        lambda: M.top_k({"a": t(1, 2)}, density), lambda: baselines.uniform(three(), density),
        lambda: baselines.synflow(three(), (8,), density, rounds=1), lambda: baselines.erk(three(), density),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            f()
    kept = M.top_k({"a": t(1, 2, 4, 3)}, torch.tensor(0.5))
    assert same(kept, M.top_k({"a": t(1, 2, 4, 3)}, 0.5))
    assert same(kept, M.top_k({"a": t(1, 2, 4, 3)}, {"a": np.float32(0.5)}))


def test_a_mask_below_a_threshold_can_be_written():
    """Early stop goes back to the masks of its iteration, whatever stands above them."""
    net = M.attach(nn.Sequential(nn.Linear(4, 3)))
    soft_threshold.attach(net, -5.0)
    half = {"0": torch.arange(12).view(3, 4) % 2 == 0}
    M.attach(net, half)
    assert torch.equal(M.read(net)["0"], half["0"])
    assert len(net[0].parametrizations.weight) == 2


def test_no_weights_keep_nothing():
    with pytest.raises(ValueError, match=r"^Nothing to prune: the model has no weights\.$"):
        M.top_k({"a": torch.empty(0)}, 0.5)


def test_layers_by_name_come_in_the_order_of_the_names():
    model = small()
    assert list(M.chosen(model)) == ["0", "4", "6"]
    assert list(M.chosen(model, iter(["6", "0"]))) == ["6", "0"]
    with pytest.raises(ValueError, match=r"^Unknown names in layers: 9; the model has 0, 4, 6\.$"):
        M.chosen(model, ["9"])


class Times(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.register_buffer("mask", torch.tensor(a))

    def forward(self, weight):
        return weight * self.a * self.mask


def test_two_parametrizations_of_one_weight_whose_tensors_have_one_name():
    model = M.attach(nn.Sequential(nn.Linear(2, 2)))
    parametrize.register_parametrization(model[0], "weight", Times(2.0))
    assert list(M.tensors(model)) == ["0.bias", "0.weight", "0.weight.a", "0.weight.mask"]  # that of a Mask is no state
    parametrize.register_parametrization(model[0], "weight", Times(3.0))
    assert set(M.tensors(model)) == {
        "0.bias", "0.weight", "0.weight.1.a", "0.weight.2.a", "0.weight.1.mask", "0.weight.2.mask"
    }  # fmt: skip
    theta = M.state(model)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(9)
    M.restore(model, theta)
    assert [p.a.item() for p in model[0].parametrizations.weight if isinstance(p, Times)] == [2, 3]


class Tanh(nn.Module):
    """A parametrization of a user's own."""

    def forward(self, tensor):
        return tensor.tanh()

    def right_inverse(self, tensor):
        return tensor.atanh()


@pytest.mark.parametrize("put", [M.attach, cs.attach, lambda net: soft_threshold.attach(net, -5.0)])
def test_pruning_a_copy_leaves_an_original_with_a_parametrised_bias_alone(put):
    net = three()
    parametrize.register_parametrization(net[0], "bias", Tanh())
    x = torch.randn(5, 8)
    expected = net(x)
    copied = put(copy.deepcopy(net))
    assert torch.equal(net(x), expected)
    baked = M.bake(copy.deepcopy(copied))
    assert torch.allclose(baked(x), copied(x))
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("given", [nn.Linear, None, three().state_dict(), [three()]])
def test_what_is_no_module_is_refused(given):
    text = message(f"Invalid model of type {type(given).__name__}: give a torch.nn.Module, not its class or state.")
    for f in (M.prunable, M.attach, M.read, M.state, lambda m: lth.prune(m, 0.5)):
        with pytest.raises(ValueError, match=text):
            f(given)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_module_is_refused():
    with pytest.raises(
        ValueError, match=message("Nothing prunable: the layers of the model are scripted; prune it before.")
    ):
        M.attach(torch.jit.script(three()))
    assert list(M.prunable(nn.Sequential(torch.jit.script(three()), nn.Linear(3, 2)))) == ["1"]


@pytest.mark.parametrize(
    "scores", [torch.randn(4, dtype=torch.complex64), np.arange(4.0), torch.eye(2).to_sparse(), [1.0, 2.0]]
)
def test_scores_are_dense_tensors_of_real_numbers(scores):
    with pytest.raises(ValueError, match=message("Invalid scores of layer 'a': give a dense tensor of real numbers.")):
        M.top_k({"b": t(1, 2), "a": scores}, 0.5)
    with pytest.raises(ValueError, match=message("Invalid scores, a list: give {layer name: tensor}.")):
        M.top_k([t(1, 2)], 0.5)


def test_a_density_is_that_of_masks():
    with pytest.raises(
        ValueError,
        match=message(
            "Invalid mask for layer '0.weight': torch.float32 of shape (6, 8), needs torch.bool of shape (6, 8)."
        ),
    ):
        M.density(three().state_dict())
    with pytest.raises(ValueError, match=message("Invalid masks, a NoneType: give {layer name: mask}.")):
        M.density(None)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (lambda v: v * 1j, "Cannot restore '2.weight': torch.complex64, the model's is torch.float32."),
        (lambda v: v.to_sparse(), "Cannot restore '2.weight': the state holds no dense tensor, as `state` gives it."),
        (lambda v: v.numpy(), "Cannot restore '2.weight': the state holds no dense tensor, as `state` gives it."),
    ],
)
def test_a_state_that_the_model_cannot_hold_is_refused_before_anything_changes(bad, text):
    net = three()
    theta = M.state(net)
    with pytest.raises(ValueError, match=message(text)):
        M.restore(net, {name: v + 1 for name, v in theta.items()} | {"2.weight": bad(theta["2.weight"])})
    assert same(M.state(net), theta)


class Handing(nn.Module):
    """A wrapper that hands on whatever it has not itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x):
        return self.model(x)


def test_a_wrapper_that_hands_on_what_it_has_not():
    torch.manual_seed(0)
    wrapped, plain = Handing(nn.Linear(8, 3)), nn.Sequential()
    plain.model, batch = copy.deepcopy(wrapped.model), [(torch.randn(6, 8), torch.arange(6) % 3)]
    for net in (wrapped, plain):
        M.attach(net, lth.prune(net, 0.5))
        soft_threshold.attach(net, -3.0)
    assert same(M.state(wrapped), M.state(plain))
    assert same(M.remaining(wrapped), M.remaining(plain))
    assert len(wrapped.model.parametrizations.weight) == 2
    assert macs.effective(wrapped, (8,)) == macs.effective(plain, (8,))
    assert same(grasp.scores(wrapped, batch), grasp.scores(plain, batch))
    M.bake(wrapped)
    assert torch.equal(wrapped(batch[0][0]), plain(batch[0][0]))
    assert type(wrapped) is Handing
