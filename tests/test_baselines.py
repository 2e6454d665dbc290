"""lottery.baselines: SNIP, random, magnitude, uniform and ERK densities, SynFlow."""

import copy
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lottery import baselines, models
from lottery import masks as M


def message(text):
    return f"^{re.escape(text)}"


def mlp(seed=0, sizes=(5, 6, 4, 3), bias=True):
    torch.manual_seed(seed)
    linear = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    return nn.Sequential(*[m for layer in linear for m in (layer, nn.ReLU())][:-1]).double()


def convnet(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    for bn in (net[1], net[5]):
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return net


def batch(n=8, d=5, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def flat(tensors):
    return torch.cat([v.flatten() for v in tensors.values()])


def weights(model):
    return {name: layer.weight.detach().clone() for name, layer in M.prunable(model).items()}


def unchanged(model, run):
    """What `run(model)` gives, after checking that modes, buffers, gradients and random state are as before."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    result = run(model)
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())
    return result


# SNIP -----------------------------------------------------------------------------------------------------------------


def test_snip_by_hand():
    """Logits Wx with W = [[1, −2], [0, 3]], x = (1, 1), label 0: g = (p₀ − 1, p₁) xᵀ = p₁ (−1, 1) xᵀ."""
    model = nn.Linear(2, 2, bias=False).double()
    W = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    M.restore(model, {"weight": W})
    [score] = baselines.snip_scores(model, [(torch.ones(1, 2, dtype=torch.float64), torch.tensor([0]))]).values()
    torch.testing.assert_close(score, torch.tensor([[1, 2], [0, 3]], dtype=torch.float64) / 6, rtol=1e-14, atol=0)


def test_snip_is_the_slope_along_a_multiplicative_mask():
    model, (x, y) = mlp(), batch()
    w = weights(model)
    scores = unchanged(model, lambda m: baselines.snip_scores(m, [(x, y)]))

    def loss(c):
        state = {f"{name}.weight": w[name] * c[name] for name in w}
        return F.cross_entropy(torch.func.functional_call(model, state, x), y)

    slope = flat(torch.func.grad(loss)({name: torch.ones_like(v) for name, v in w.items()})).abs().detach()
    torch.testing.assert_close(flat(scores), slope / slope.sum(), rtol=1e-10, atol=1e-14)
    assert float(flat(scores).sum()) == pytest.approx(1, rel=1e-12)


def test_snip_of_equal_chunks_is_that_of_their_union():
    model, (x, y) = mlp(), batch()
    halves = baselines.snip_scores(model, [(x[:4], y[:4]), (x[4:], y[4:])])
    torch.testing.assert_close(halves, baselines.snip_scores(model, [(x, y)]), rtol=1e-10, atol=1e-14)


def test_snip_scores_the_given_weights_effective_and_not_drawn_anew():
    model, batches = mlp(), [batch()]
    masks = M.top_k(baselines.snip_scores(model, batches), 0.5)
    state = M.state(model)
    for name, m in masks.items():
        state[f"{name}.weight"] *= m
    baked = M.restore(copy.deepcopy(model), state)
    masked = baselines.snip_scores(M.attach(model, masks), batches)
    assert torch.equal(flat(masked), flat(baselines.snip_scores(baked, batches)))
    assert not flat(masked)[~flat(masks)].any()


def test_snip_named_errors():
    x, y = batch()
    with pytest.raises(ValueError, match=message("All gradients are zero, so no weight ranks above another")):
        baselines.snip_scores(mlp(bias=False), [(x * 0, y)])
    with pytest.raises(ValueError, match=message("NaN or infinity in the batch: chunk 1 of the inputs")):
        baselines.snip_scores(mlp(), [(x / 0, y)])
    zeros = nn.Linear(5, 3).double()
    nn.init.zeros_(zeros.weight)
    with pytest.raises(ValueError, match=message("All SNIP scores are zero, so no weight ranks above another")):
        baselines.snip_scores(zeros, [(x, y)])


# random and magnitude -------------------------------------------------------------------------------------------------


def test_random_scores_are_uniform_and_belong_to_their_seed():
    model = models.create("lenet_300_100", seed=0)
    draw = lambda seed: baselines.random_scores(model, torch.Generator().manual_seed(seed))  # noqa: E731
    a = unchanged(model, lambda m: draw(0))
    assert {name: s.shape for name, s in a.items()} == {name: w.shape for name, w in weights(model).items()}
    assert torch.equal(flat(a), flat(draw(0)))
    assert not torch.equal(flat(a), flat(draw(1)))
    masks = M.top_k(a, 0.1)
    assert [float(m.double().mean()) for m in masks.values()] == pytest.approx([0.1] * 3, abs=0.03)


def test_magnitude_scores_are_absolute_effective_weights():
    model = mlp()
    w = weights(model)
    masks = M.top_k(baselines.magnitude_scores(model), 0.5)
    assert flat(w).abs()[flat(masks)].min() >= flat(w).abs()[~flat(masks)].max()
    scores = baselines.magnitude_scores(M.attach(model, masks))
    assert torch.equal(flat(scores), (flat(w) * flat(masks)).abs())


# layer densities ------------------------------------------------------------------------------------------------------


def test_erk_by_hand():
    """Σ/Π of the dimensions: 30/200 and 12/20, on 200 and 20 weights; keep 0.1 of 220 = 22 = ε (30 + 12)."""
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 2))
    assert baselines.erk(model, 0.1) == pytest.approx({"0": 22 / 42 * 30 / 200, "1": 22 / 42 * 12 / 20})


def test_erk_counts_the_kernel():
    """Conv [8, 4, 3, 3]: (8 + 4 + 3 + 3) / 288. Linear [2, 72]: 74 / 144. Keep 43.2 of 432 = ε (18 + 74)."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 2))
    assert baselines.erk(model, 0.1) == pytest.approx({"0": 43.2 / 92 * 18 / 288, "2": 43.2 / 92 * 74 / 144})


def test_erk_caps_at_one_and_gives_the_rest_to_the_others():
    """Keep 110 of 220: ε = 110/42 would keep 1.57 of the small layer; it is whole, the other keeps 90 of 200."""
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 2))
    assert baselines.erk(model, 0.5) == pytest.approx({"0": 0.45, "1": 1.0})
    assert baselines.erk(model, 1.0) == pytest.approx({"0": 1.0, "1": 1.0})


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(0.01, 1.0))
def test_erk_keeps_the_density_of_the_whole(sizes, density):
    model = mlp(sizes=sizes)
    n = {name: w.numel() for name, w in weights(model).items()}
    if density * sum(n.values()) < 1:
        return
    layers = baselines.erk(model, density)
    assert sum(layers[name] * n[name] for name in n) == pytest.approx(density * sum(n.values()), rel=1e-9)
    assert all(0 < d <= 1 for d in layers.values())
    raw = {name: sum(w.shape) / w.numel() for name, w in weights(model).items()}
    free = [name for name in n if layers[name] < 1]
    assert len({round(layers[name] / raw[name], 9) for name in free}) <= 1


def test_densities_go_to_top_k():
    model = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))
    for layers in (baselines.uniform(model, 0.2), baselines.erk(model, 0.2)):
        masks = M.top_k(baselines.magnitude_scores(model), layers)
        assert M.density(masks) == pytest.approx(0.2, abs=1e-4)
        assert {name: M.density({name: m}) for name, m in masks.items()} == pytest.approx(layers, abs=1e-2)
    assert set(baselines.uniform(model, 0.2).values()) == {0.2}


@pytest.mark.parametrize("densities", [baselines.uniform, baselines.erk])
def test_densities_refuse_what_cannot_be(densities):
    with pytest.raises(ValueError, match=message("Invalid density 1.2: give a fraction of weights to keep")):
        densities(mlp(), 1.2)
    with pytest.raises(ValueError, match=message("Density 0.001 keeps none of the 66 weights of the model")):
        densities(mlp(), 0.001)
    with pytest.raises(ValueError, match=message("Nothing prunable: the model has no Linear or Conv layer.")):
        densities(nn.ReLU(), 0.5)
    for layers in ([], ()):
        with pytest.raises(ValueError, match=message("Nothing prunable: `layers` is empty; name some, or give None")):
            densities(mlp(), 0.5, layers=layers)
    with pytest.raises(ValueError, match=message("Invalid layers '0': give a list of names, or None for all layers.")):
        densities(mlp(), 0.5, layers="0")


# SynFlow --------------------------------------------------------------------------------------------------------------


def test_one_round_of_synflow_by_hand():
    """|W₁| = [[1, 2], [3, 4]], |w₂| = (1, 5): R = 1·3 + 5·7. Scores W₁: [[1, 2], [15, 20]], w₂: (3, 35)."""
    model = mlp(sizes=(2, 2, 1), bias=False)
    first = torch.tensor([[1.0, -2.0], [-3.0, 4.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -5.0]], dtype=torch.float64)
    M.restore(model, {"0.weight": first, "2.weight": second})
    masks = unchanged(model, lambda m: baselines.synflow(m, (2,), 0.5, rounds=1))
    assert masks["0"].tolist() == [[False, False], [True, True]]
    assert masks["2"].tolist() == [[False, True]]


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_synflow_is_conserved(seed):
    """Σ |θ| ∂R/∂|θ| is R itself in every layer, batch norm and biases or not."""
    for model, shape in ((convnet(seed), (2, 6, 6)), (mlp(seed), (5,))):
        R, w = baselines._flow(model, shape, "none")
        for name, v in w.items():
            [g] = torch.autograd.grad(R(), [v])
            torch.testing.assert_close((v * g).sum(), R(), rtol=1e-12, atol=0, msg=name)


def test_absolute_biases_break_conservation_as_in_the_authors_code():
    R, w = baselines._flow(mlp(), (5,), "absolute")
    sums = [
        float((v.detach() * g).sum())
        for v, g in zip(w.values(), torch.autograd.grad(R(), list(w.values())), strict=True)
    ]
    assert sums[0] < sums[1] < sums[2] < float(R().detach())


@pytest.mark.parametrize("rounds", [10, 100])
def test_synflow_round_by_round(rounds):
    """The definition, written out: matrix products, a kept count per round, nothing that was removed returns."""
    model, density, n = mlp(bias=False), 0.2, 66
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights(model).values()]
    for k in range(1, rounds + 1):
        A, B, C = (w.abs() * m for w, m in zip(weights(model).values(), masks, strict=True))
        one, out = torch.ones(5, 1, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
        scores = [A * ((out @ C @ B).T @ one.T), B * ((out @ C).T @ (A @ one).T), C * (out.T @ (B @ A @ one).T)]
        kept = n - round((1 - density ** (k / rounds)) * n)
        ranked = torch.cat([torch.where(m, s, -1).flatten() for s, m in zip(scores, masks, strict=True)])
        chosen = torch.zeros(n, dtype=torch.bool)
        chosen[ranked.argsort(descending=True)[:kept]] = True
        masks = [c.view(m.shape) for c, m in zip(chosen.split([30, 24, 12]), masks, strict=True)]
    ours = baselines.synflow(model, (5,), density, rounds=rounds)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), masks, strict=True))


def test_synflow_at_99_percent_keeps_every_layer_alive():
    model = models.create("lenet_300_100", seed=0)
    masks = unchanged(model, lambda m: baselines.synflow(m, (1, 28, 28), 0.01))
    assert sum(int(m.sum()) for m in masks.values()) == 2662
    assert all(m.any() for m in masks.values())


def test_synflow_of_a_convolutional_net_in_training_mode_leaves_it_exactly():
    model = convnet().train()
    masks = unchanged(model, lambda m: baselines.synflow(m, (2, 6, 6), 0.05))
    assert sum(int(m.sum()) for m in masks.values()) == round(0.05 * (72 + 216 + 30))
    assert all(m.any() for m in masks.values())


@settings(max_examples=10)
@given(st.integers(0, 1000), st.floats(0.05, 0.45))
def test_synflow_keeps_exactly_k_and_brings_nothing_back(seed, density):
    model = mlp(seed)
    first = baselines.synflow(model, (5,), 0.5, rounds=5)
    second = baselines.synflow(M.attach(model, first), (5,), density, rounds=5)
    assert int(flat(second).sum()) == 66 - round((1 - density) * 66)
    assert not (flat(second) & ~flat(first)).any()


def test_synflow_reports_layer_collapse():
    with pytest.warns(UserWarning, match=message("Layer collapse: no weight is kept in ")):
        baselines.synflow(mlp(), (5,), 2 / 66, rounds=1)
    with pytest.raises(ValueError, match=r"No finite flow from input to output in round \d+: a layer is cut off"):
        baselines.synflow(mlp(), (5,), 2 / 66)


def test_synflow_named_errors():
    with pytest.raises(ValueError, match=message("Invalid rounds 0: give a whole number from 1.")):
        baselines.synflow(mlp(), (5,), 0.5, rounds=0)
    with pytest.raises(ValueError, match=message("Invalid biases 'zero': give 'none' or 'absolute'.")):
        baselines.synflow(mlp(), (5,), 0.5, biases="zero")
    with pytest.raises(ValueError, match=message("Invalid density 0: give a fraction of weights to keep")):
        baselines.synflow(mlp(), (5,), 0)
    for shape in (5, (5.0,), (0,)):
        with pytest.raises(ValueError, match=message(f"Invalid input_shape {shape}: give that of one input, such as ")):
            baselines.synflow(mlp(), shape, 0.5)
    with pytest.raises(ValueError, match=message("The model does not take inputs of shape (1, 4), torch.float64: ")):
        baselines.synflow(mlp(), (4,), 0.5)
    with pytest.raises(ValueError, match=message("Nothing prunable: the model has no Linear or Conv layer.")):
        baselines.synflow(nn.BatchNorm1d(5), (5,), 0.5)
    dead = mlp()
    nn.init.zeros_(dead[2].weight)
    with pytest.raises(ValueError, match=message("No finite flow from input to output in round 1: a layer is cut")):
        baselines.synflow(dead, (5,), 0.5)


def test_layer_densities_of_some_layers():
    """Layers of 30 and 24 weights with raw densities 11/30 and 10/24 share (11 + 10)·eps = 27 weights."""
    net = mlp()
    assert baselines.uniform(net, 0.5, ["0", "2"]) == {"0": 0.5, "2": 0.5}
    assert baselines.erk(net, 0.5, ["0", "2"]) == pytest.approx({"0": 11 / 30 * 27 / 21, "2": 10 / 24 * 27 / 21})
    with pytest.raises(ValueError, match=message("Unknown names in layers: 9; the model has 0, 2, 4.")):
        baselines.erk(net, 0.5, ["9"])


def clipped(act, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), act(), nn.Conv2d(16, 8, 3, padding=1), act(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardtanh, lambda: nn.Hardtanh(-0.5, 0.1), nn.LeakyReLU, nn.ELU])
@pytest.mark.parametrize("biases", ["none", "absolute"])
def test_synflow_sees_no_clipping(act, biases):
    expected = baselines.synflow(clipped(nn.ReLU), (3, 8, 8), 0.1, rounds=7, biases=biases)
    found = baselines.synflow(clipped(act), (3, 8, 8), 0.1, rounds=7, biases=biases)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Functional(nn.Linear):
    def forward(self, x):
        return nn.functional.hardtanh(super().forward(x), 0, 0.01)


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (clipped(nn.Sigmoid), "; look at Sigmoid."),
        (clipped(nn.Hardswish), "; look at Hardswish."),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.ReLU(), nn.Linear(4, 2)), "; look at GELU."),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "and the like."),
        (nn.Sequential(Functional(4, 4), nn.Linear(4, 2)), "and the like."),
    ],
)
def test_synflow_refuses_what_is_not_linear_before_the_first_round(net, named):
    shape = (3, 8, 8) if isinstance(net[0], nn.Conv2d) else (4,)
    text = "SynFlow needs a network that is linear for positive inputs, with ReLU and the like"
    with pytest.raises(ValueError, match=f"^{text}.*{re.escape(named.removeprefix('and the like'))}$"):
        baselines.synflow(net, shape, 0.5)


def test_synflow_of_a_bias_that_torch_has_pruned():
    net, plain = mlp(), mlp()
    prune.l1_unstructured(net[0], "bias", 0.5)
    found = baselines.synflow(net, (5,), 0.3), baselines.synflow(plain, (np.int64(5),), 0.3)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("0", "2", "4"))


def test_densities_of_numpy():
    assert baselines.erk(mlp(), np.float32(0.25)) == baselines.erk(mlp(), 0.25)
    assert all(type(d) is float for d in baselines.erk(mlp(), np.float32(0.25)).values())
