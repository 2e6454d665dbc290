"""lottery.grasp: scores against brute force, their invariances, what scoring leaves alone, and the named errors."""

import copy
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from lottery import baselines, cs, data, dynamic, grasp, lth, models, stochastic
from lottery import masks as M


def message(text):
    return f"^{re.escape(text)}"


def mlp(seed=0, sizes=(5, 6, 4, 3), act=nn.Tanh):
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), act()]
    return nn.Sequential(*layers[:-1]).double()


def convnet(seed=0, eps=1e-12, dropout=0.0, widths=(3, 4)):
    a, b = widths
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, a, 3, bias=False),
        nn.BatchNorm2d(a, eps=eps),
        nn.Tanh(),
        nn.Conv2d(a, b, 2),
        nn.BatchNorm2d(b, eps=eps),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(4 * b, 3),
    ).double()


def batch(n=12, shape=(5,), classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


IMAGE = (1, 5, 5)


def chunks(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


def flat(tensors):
    return torch.cat([v.flatten() for v in tensors.values()])


def relative(ours, exact):
    ours, exact = ours.detach(), exact.detach()
    return float((ours - exact).abs().max() / exact.abs().max())


def loss_of(model, x, y, T):
    """The loss as a function of all scored weights in one vector."""
    net = copy.deepcopy(model)
    shapes = {f"{name}.weight": layer.weight.shape for name, layer in M.prunable(net).items()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: v.view(shapes[name]) for name, v in zip(shapes, parts, strict=True)}
        return F.cross_entropy(functional_call(net, weights, x) / T, y)

    torch.func.replace_all_batch_norm_modules_(net.requires_grad_(False))  # batch statistics only
    return loss, flat({name: layer.weight for name, layer in M.prunable(net).items()})


def brute_force(model, batches, T):
    """θ ⊙ (Σ_c H_c)(Σ_c g_c) with the whole Hessian, and g by central differences."""
    g = H = 0
    for x, y in batches:
        loss, w = loss_of(model, x, y, T)
        h = 1e-4
        steps = h * torch.eye(len(w), dtype=w.dtype)
        coarse, fine = (torch.stack([(loss(w + c * e) - loss(w - c * e)) / (2 * c * h) for e in steps]) for c in (2, 1))
        numeric = fine + (fine - coarse) / 3
        exact = torch.func.grad(loss)(w)
        assert relative(numeric, exact) < 1e-7
        g = g + exact
        H = H + torch.autograd.functional.hessian(loss, w)
    return w * (H @ g)


# scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1.0, 200.0])
@pytest.mark.parametrize("size", [12, 6, 5])
def test_scores_are_weight_times_hessian_times_gradient(T, size):
    model, batches = mlp(), chunks(*batch(), size)
    scores = grasp.scores(model, batches, T)
    assert [*scores] == [*M.prunable(model)]
    assert relative(flat(scores), brute_force(model, batches, T)) < 1e-10


@pytest.mark.parametrize("size", [12, 4])
def test_scores_of_convolutions_and_batch_norm(size):
    model, batches = convnet(eps=1e-5), chunks(*batch(shape=IMAGE), size)
    assert relative(flat(grasp.scores(model, batches, 3.0)), brute_force(model, batches, 3.0)) < 1e-10


def test_by_hand():
    """Logits (w, 0), label 0, x = 1: g = p − 1 and H = p(1 − p) for the weight of class 0, p = σ(w)."""
    model = nn.Linear(1, 2, bias=False).double()
    w = torch.tensor([[0.7], [0.0]], dtype=torch.float64)
    M.restore(model, {"weight": w})
    p = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    [score] = grasp.scores(model, [(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))], 1.0).values()
    # two logits: H = p(1 − p) [[1, −1], [−1, 1]] and g = (p − 1) (1, −1)
    torch.testing.assert_close(score[0, 0], 2 * 0.7 * p * (1 - p) * (p - 1), rtol=1e-12, atol=0)
    assert score[1, 0] == 0


def test_the_default_temperature_is_200():
    model, batches = mlp(), [batch()]
    assert torch.equal(flat(grasp.scores(model, batches)), flat(grasp.scores(model, batches, 200.0)))


def test_equal_chunks_scale_the_scores_by_their_number_squared():
    model, (x, y) = mlp(), batch()
    whole, quarters = grasp.scores(model, [(x, y)]), grasp.scores(model, chunks(x, y, 3))
    assert relative(flat(quarters), 16 * flat(whole)) < 1e-12


def test_at_high_temperature_the_classifier_balances_the_rest():
    """T → ∞, one linear layer at the end: its score sum is the squared gradient norm of the other layers."""
    model, batches = convnet(), [batch(shape=IMAGE)]
    T = 1e6
    scores = grasp.scores(model, batches, T)
    _, g = grasp.summed_gradient(model, batches, T)
    *others, classifier = scores
    flow = sum(g[name].square().sum() for name in others)
    torch.testing.assert_close(scores[classifier].sum(), flow, rtol=1e-3, atol=0)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([1.0, 20.0, 200.0]), st.sampled_from([4, 6, 12]))
def test_scores_before_batch_norm_sum_to_minus_the_squared_gradient_norm(seed, T, size):
    """Scale invariance: g(αw) = g(w)/α, hence H w = −g in the layer's block and 0 elsewhere; wᵀHg = −‖g_layer‖²."""
    model, batches = convnet(seed), chunks(*batch(shape=IMAGE, seed=seed), size)
    scores = grasp.scores(model, batches, T)
    _, g = grasp.summed_gradient(model, batches, T)
    for name in ("0", "3"):
        torch.testing.assert_close(scores[name].sum(), -g[name].square().sum(), rtol=1e-6, atol=0)


def with_masks(model, masks):
    return M.attach(copy.deepcopy(model), masks)


def with_zeros(model, masks):
    """The model without masks, with zeros where they would remove a weight."""
    state = M.state(model)
    for name, m in masks.items():
        state[f"{name}.weight"] *= m
    return M.restore(copy.deepcopy(model), state)


@pytest.mark.parametrize("T", [1.0, 200.0])
@pytest.mark.parametrize("density", [0.5, 0.1])
@pytest.mark.parametrize(("net", "shape"), [(mlp, (20,)), (convnet, IMAGE)])
def test_reversing_the_order_collapses_the_gradient_norm(net, shape, density, T):
    ours, reverse = [], []
    for seed in range(3):
        model = net(seed, (20, 16, 8, 4)) if net is mlp else net(seed, widths=(8, 16))
        batches = [batch(60, shape, seed=seed)]
        scores, dense = grasp.scores(model, batches, T), grasp.gradient_norm(model, batches)
        for sign, norms in ((1, ours), (-1, reverse)):
            masks = M.top_k({name: sign * s for name, s in scores.items()}, density)
            norms.append((grasp.gradient_norm(with_masks(model, masks), batches) / dense) ** 2)
    assert sum(reverse) < 0.25 * sum(ours)


@settings(max_examples=15)
@given(st.integers(0, 1000), st.randoms(use_true_random=False))
def test_permuting_units_permutes_scores_and_masks(seed, random):
    model, batches = mlp(seed), [batch(seed=seed)]
    p = torch.tensor(random.sample(range(6), 6))
    permuted = copy.deepcopy(model)
    state = M.state(model)
    state |= {"0.weight": state["0.weight"][p], "0.bias": state["0.bias"][p], "2.weight": state["2.weight"][:, p]}
    M.restore(permuted, state)
    a, b = grasp.scores(model, batches), grasp.scores(permuted, batches)
    assert relative(flat({0: a["0"][p], 1: a["2"][:, p], 2: a["4"]}), flat(b)) < 1e-10
    a, b = grasp.prune(model, batches, 0.3), grasp.prune(permuted, batches, 0.3)
    assert torch.equal(a["0"][p], b["0"])
    assert torch.equal(a["2"][:, p], b["2"])
    assert torch.equal(a["4"], b["4"])


def test_float32_gives_the_masks_of_float64():
    model, (x, y) = mlp(), batch()
    exact = grasp.prune(model, [(x, y)], 0.3)
    single = grasp.prune(copy.deepcopy(model).float(), [(x.float(), y)], 0.3)
    assert all(torch.equal(exact[name], single[name]) for name in exact)


def test_effective_weights_are_scored_not_those_behind_a_mask():
    model, batches = mlp(), [batch()]
    masks = grasp.prune(model, batches, 0.4)
    scores = grasp.scores(with_masks(model, masks), batches)
    assert torch.equal(flat(scores), flat(grasp.scores(with_zeros(model, masks), batches)))
    assert not flat(scores)[~flat(masks)].any()


# what scoring leaves alone --------------------------------------------------------------------------------------------


def test_modes_buffers_gradients_and_random_state_stay():
    model = convnet(dropout=0.5)
    model[1].eval()
    M.attach(model)
    model(batch(shape=IMAGE)[0]).sum().backward()
    model[3].bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    frozen = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()

    grasp.prune(model, [batch(shape=IMAGE)], 0.5)
    grasp.gradient_norm(model, [batch(shape=IMAGE)])
    grasp.ntk(model, batch(2, IMAGE)[0])

    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    now = [p.grad for p in model.parameters()]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(now, grads, strict=True))
    assert frozen == [p.requires_grad for p in model.parameters()]
    assert torch.equal(rng, torch.get_rng_state())
    model(batch(shape=IMAGE)[0]).sum().backward()  # a masked model still works after its copy was taken apart


def test_the_mode_of_the_model_does_not_matter():
    model, batches = convnet(), [batch(shape=IMAGE)]
    assert torch.equal(flat(grasp.scores(model, batches)), flat(grasp.scores(copy.deepcopy(model).eval(), batches)))


def test_scores_under_no_grad_and_of_frozen_layers():
    model, batches = mlp(), [batch()]
    expected = flat(grasp.scores(model, batches))
    with torch.no_grad():
        assert torch.equal(flat(grasp.scores(model.requires_grad_(False), batches)), expected)


def test_two_forward_passes_of_each_chunk():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    model = nn.Sequential(Counted(5, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    grasp.scores(model, chunks(*batch(), 5))
    assert calls == [5, 5, 2, 5, 5, 2]


def test_memory_does_not_grow_with_the_number_of_chunks():
    """What autograd saves for the backward passes, counted live, has the same peak for 2 and for 8 chunks."""

    def peak(n):
        live = most = 0

        class Saved:
            def __init__(self, t):
                nonlocal live, most
                self.t, self.bytes = t, t.numel() * t.element_size()
                live += self.bytes
                most = max(most, live)

            def __del__(self):
                nonlocal live
                live -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.t):
            grasp.scores(mlp(), chunks(*batch(4 * n), 4))
        return most

    assert peak(2) == peak(8) > 0


def test_autocast_and_a_compiled_model():
    model, (x, y) = mlp().float(), batch()
    batches = [(x.float(), y)] * 2
    exact = grasp.scores(model, batches, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(flat(grasp.scores(model, batches, 1.0)), flat(exact)) < 0.1
    compiled = grasp.scores(torch.compile(model, backend="eager"), batches, 1.0)
    assert [*compiled] == [f"_orig_mod.{name}" for name in exact]
    assert torch.equal(flat(compiled), flat(exact))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    model, batches = mlp(), chunks(*batch(), 4)
    exact = flat(grasp.scores(model, batches))
    assert relative(flat(grasp.scores(model.cuda(), batches)).cpu(), exact) < 1e-10


# prune ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(0, 100), st.floats(0.02, 1.0))
@pytest.mark.filterwarnings("ignore:Layer collapse")
def test_exactly_k_are_kept_and_none_comes_back(seed, density):
    model, batches = mlp(seed), [batch()]
    n = 5 * 6 + 6 * 4 + 4 * 3
    first = grasp.prune(model, batches, 0.9)
    assert int(flat(first).sum()) == n - round(0.1 * n)
    if density < 0.9:
        second = grasp.prune(with_masks(model, first), batches, density)
        assert int(flat(second).sum()) == n - round((1 - density) * n)
        assert not (flat(second) & ~flat(first)).any()


def test_reinit_linear_scores_a_copy_with_xavier_classifiers():
    model, batches = convnet(), [batch(shape=IMAGE)]
    before = M.state(model)
    torch.manual_seed(5)
    masks = grasp.prune(model, batches, 0.4, reinit_linear=True)
    assert all(torch.equal(v, before[name]) for name, v in M.state(model).items())
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    nn.init.xavier_normal_(other[8].weight)
    expected = grasp.prune(other, batches, 0.4)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert not torch.equal(masks["8"], grasp.prune(model, batches, 0.4)["8"])


def test_the_xavier_copy_of_a_masked_model_keeps_the_mask():
    model = mlp()
    masks = grasp.prune(model, [batch()], 0.5)
    drawn = grasp.with_xavier_linear(M.attach(model, masks), torch.Generator().manual_seed(0))
    for name, layer in M.prunable(drawn).items():
        assert torch.equal(layer.weight != 0, masks[name])
        survivors = layer.weight[masks[name]]
        assert (survivors != M.prunable(model)[name].weight[masks[name]]).all()


# class-balanced batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", valid=0)


def test_class_balanced_is_one_chunk_or_the_two_class_sorted_halves(digits):
    [(x, y)] = grasp.class_balanced(digits, 4, torch.Generator().manual_seed(0))
    assert x.shape == (40, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.tolist() == [c for c in range(10) for _ in range(4)]
    assert len(x.flatten(1).unique(dim=0)) == 40
    (xa, ya), (xb, yb) = grasp.class_balanced(digits, 4, torch.Generator().manual_seed(0), halves=True)
    assert set(ya.tolist()) == set(range(5))
    assert set(yb.tolist()) == set(range(5, 10))
    assert torch.equal(torch.cat([xa, xb]), x)
    [(other, _)] = grasp.class_balanced(digits, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(x, other)


def test_class_balanced_images_are_standardised_training_images(digits):
    [(x, y)] = grasp.class_balanced(digits, 1, torch.Generator().manual_seed(0))
    pixels = ((x * digits.std[0] + digits.mean[0]) * 255).round().to(torch.uint8)
    for image, label in zip(pixels, y, strict=True):
        assert label in digits.train.y[(digits.train.x == image).flatten(1).all(1)]


def test_class_balanced_refuses_what_it_cannot_draw(digits):
    with pytest.raises(ValueError, match=message("Invalid per_class 0: give a whole number of images of each class")):
        grasp.class_balanced(digits, 0)
    with pytest.raises(ValueError, match=message("Invalid per_class 10000: class 0, 1, 2")):
        grasp.class_balanced(digits, 10_000)


def test_the_halves_matter_only_where_batch_norm_looks_at_them(digits):
    whole = grasp.class_balanced(digits, 3, torch.Generator().manual_seed(0))
    halves = grasp.class_balanced(digits, 3, torch.Generator().manual_seed(0), halves=True)
    plain = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))
    assert relative(flat(grasp.scores(plain, halves)), 4 * flat(grasp.scores(plain, whole))) < 1e-4
    normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    assert relative(flat(grasp.scores(normed, halves)), 4 * flat(grasp.scores(normed, whole))) > 0.05


# gradient norm and tangent kernel -------------------------------------------------------------------------------------


def test_gradient_norm_is_that_of_the_mean_loss_over_kept_weights():
    model, (x, y) = mlp(), batch()
    loss, w = loss_of(model, x, y, 1.0)
    g = torch.func.grad(loss)(w)
    assert grasp.gradient_norm(model, [(x, y)]) == pytest.approx(float(g.norm()), rel=1e-12)
    assert grasp.gradient_norm(model, chunks(x, y, 5)) == pytest.approx(float(g.norm()), rel=1e-12)
    masks = grasp.prune(model, [(x, y)], 0.5)
    loss, w = loss_of(with_zeros(model, masks), x, y, 1.0)
    expected = float((torch.func.grad(loss)(w) * flat(masks)).norm())
    assert grasp.gradient_norm(with_masks(model, masks), [(x, y)]) == pytest.approx(expected, rel=1e-12)


def test_scores_are_the_slope_of_the_gradient_flow():
    """Central difference of ‖g‖² along −θ_q is 2 S = −2 score, one weight at a time."""
    model, (x, y) = mlp(sizes=(3, 3, 2)), batch(shape=(3,), classes=2)
    scores = flat(grasp.scores(model, [(x, y)], 1.0))
    loss, w = loss_of(model, x, y, 1.0)
    h = 1e-5
    for q in range(len(w)):
        e = torch.zeros_like(w)
        e[q] = -w[q]
        up, down = (torch.func.grad(loss)(w + c * e).square().sum() for c in (h, -h))
        torch.testing.assert_close((up - down) / (2 * h), -2 * scores[q], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_tangent_kernel(masked):
    model, (x, y) = mlp(), batch(4)
    masks = grasp.prune(model, [(x, y)], 0.5) if masked else M.read(M.attach(copy.deepcopy(model)))
    model = M.attach(model, masks)
    net, theta = grasp.scored_copy(model)
    Z = net(x)
    J = torch.stack(
        [flat(dict(enumerate(torch.autograd.grad(z, theta.values(), retain_graph=True)))) for z in Z.flatten()]
    )
    J = J * flat(masks)
    kernel = grasp.ntk(model, x)
    torch.testing.assert_close(kernel, J @ J.T, rtol=1e-10, atol=1e-12)

    dZ = (Z.softmax(1) - F.one_hot(y, 3)).detach() / len(y)
    flow = grasp.gradient_norm(model, [(x, y)]) ** 2
    assert float(dZ.flatten() @ kernel @ dZ.flatten()) == pytest.approx(flow, rel=1e-9)


def with_frozen_norm():
    """A network in training mode whose batch norm has been put into evaluation mode, as `fit` would train it."""
    model = convnet(dropout=0.5).train()
    for module in (model[1], model[6]):
        module.eval()
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    return model


def test_what_is_frozen_is_scored_frozen():
    model, (x, y) = with_frozen_norm(), batch(shape=IMAGE)
    w, ours = grasp.summed_gradient(model, [(x, y)])
    by_hand = copy.deepcopy(model)
    F.cross_entropy(by_hand(x), y).backward()
    for name, layer in M.prunable(by_hand).items():
        torch.testing.assert_close(ours[name], layer.weight.grad)
    M.attach(model, {name: torch.ones_like(v, dtype=torch.bool) for name, v in w.items()})
    for name, g in dynamic.dense_gradient(model, x, y).items():
        torch.testing.assert_close(g, ours[name])
    model.eval()
    wrapped = nn.DataParallel(model).eval()
    for net in (model, wrapped, grasp.with_xavier_linear(wrapped)):
        assert all(module.training for module in grasp.scored_copy(net)[0].modules())


# named errors ---------------------------------------------------------------------------------------------------------


def test_nothing_prunable():
    with pytest.raises(ValueError, match=message("Nothing prunable: the model has no Linear or Conv layer.")):
        grasp.scores(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(5)), [batch()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_the_batch_is_named_by_its_chunk(bad):
    x, y = batch()
    x[7, 2] = bad
    with pytest.raises(ValueError, match=message("NaN or infinity in the batch: chunk 2 of the inputs")):
        grasp.scores(mlp(), chunks(x, y, 4))


def test_nan_weights():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=message("NaN or infinity in the gradients: check the model's weights")):
        grasp.scores(model, [batch()])


def test_all_zero_gradients():
    model = mlp(act=nn.ReLU)
    with torch.no_grad():
        for layer in M.prunable(model).values():
            layer.bias.fill_(-100)
    dead = nn.Sequential(*model, nn.ReLU())
    with pytest.raises(ValueError, match=message("All gradients are zero, so no weight ranks above another")):
        grasp.scores(dead, [batch()])
    assert grasp.gradient_norm(dead, [batch()]) == 0


def test_fewer_than_one_weight_kept_and_bad_densities():
    with pytest.raises(ValueError, match=message("Density 0.001 keeps none of the 66 weights of the model")):
        grasp.prune(mlp(), [batch()], 0.001)
    with pytest.raises(ValueError, match=message("Invalid density 1.2: give a fraction of weights to keep")):
        grasp.prune(mlp(), [batch()], 1.2)


def test_layer_collapse_is_reported_by_name():
    model = mlp(sizes=(20, 16, 8, 3))
    with pytest.warns(UserWarning, match=message("Layer collapse: no weight is kept in ")) as caught:
        masks = grasp.prune(model, [batch(shape=(20,))], 2 / (20 * 16 + 16 * 8 + 8 * 3))
    assert int(flat(masks).sum()) == 2
    empty = [name for name, m in masks.items() if not m.any()]
    assert str(caught[0].message) == f"Layer collapse: no weight is kept in {', '.join(empty)}; raise the density."


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (iter([batch()]), "Invalid batches: a generator can be read only once; give a list of chunks (x, y)."),
        (batch(), "Invalid batches: chunk 1 is no pair; give a list of chunks [(x, y), ...]."),
        ([], "Invalid batches: there is no chunk; give a list of chunks [(x, y), ...]."),
        ([[t.numpy() for t in batch()]], "Invalid batches: chunk 1 is no pair of tensors of the same length, from 1."),
        ([(batch()[0], None)], "Invalid batches: chunk 1 is no pair of tensors of the same length, from 1."),
        ([(batch()[0], batch(11)[1])], "Invalid batches: chunk 1 is no pair of tensors of the same length, from 1."),
        ([batch(), batch(0)], "Invalid batches: chunk 2 is no pair of tensors of the same length, from 1."),
        (
            [(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 7]))],
            "Invalid batches: labels are torch.int64 from 0 to 7, the model's classes 3; give int64 labels from 0, and "
            "a model of logits [B, classes].",
        ),
        (
            [(batch()[0], batch()[1].int())],
            "Invalid batches: labels are torch.int32 from 0 to 2, the model's classes 3;",
        ),
        (
            [(batch()[0], batch()[1] - 1)],
            "Invalid batches: labels are torch.int64 from -1 to 1, the model's classes 3;",
        ),
        ([batch(shape=(4,))], "The model does not take inputs of shape (12, 4), torch.float64: "),
    ],
)
def test_batches_that_do_not_fit(batches, text):
    for score in (grasp.scores, baselines.snip_scores, grasp.gradient_norm):
        with pytest.raises(ValueError, match=message(text)):
            score(mlp(), batches)


@pytest.mark.parametrize("T", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(T):
    with pytest.raises(ValueError, match=message(f"Invalid temperature {T}: give a number above 0.")):
        grasp.scores(mlp(), [batch()], T)


# What people bring to it ----------------------------------------------------------------------------------------------


def perceptron(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype)


def pictures(dtype=torch.float32, n=24):
    torch.manual_seed(1)
    return [(torch.rand(n, 1, 6, 6).to(dtype), torch.arange(n) % 4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_as_its_float32_copy(dtype):
    half = perceptron(dtype)
    wide, batch = copy.deepcopy(half).float(), pictures(dtype)
    exact = grasp.scores(wide, [(x.float(), y) for x, y in batch])
    for name, score in grasp.scores(half, batch).items():
        assert score.dtype == torch.float32
        assert torch.equal(score, exact[name])
    assert half[1].weight.dtype == dtype
    torch.testing.assert_close(grasp.ntk(half, batch[0][0][:3]), grasp.ntk(wide, batch[0][0][:3].float()))
    assert grasp.gradient_norm(half, batch) == grasp.gradient_norm(wide, [(x.float(), y) for x, y in batch])
    snip = baselines.snip_scores(half, batch)
    assert sum(float(s.sum()) for s in snip.values()) == pytest.approx(1)


class Noisy(torch.utils.data.Dataset):
    """An image is another one each time that it is asked for."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return pictures()[0][0][i] + torch.randn(1, 6, 6), i % 4


@pytest.mark.parametrize("f", [grasp.scores, grasp.gradient_norm, lambda *a: grasp.summed_gradient(*a)[1]])
def test_a_loader_is_drawn_once(f):
    torch.manual_seed(5)
    loader = torch.utils.data.DataLoader(Noisy(), 8, shuffle=True)
    drawn = []
    for batches in (loader, None):
        torch.manual_seed(7)
        torch.randint(2, (3,))
        drawn.append(f(perceptron(), batches if batches is not None else list(loader)))
    if isinstance(drawn[0], float):
        assert drawn[0] == drawn[1]
    else:
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[1])


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).double()
    x, y = torch.randn(4, 5, 8, dtype=torch.float64), torch.arange(4) % 3
    with sdpa_kernel(SDPBackend.MATH):
        inside = grasp.scores(net, [(x, y)])
    outside = grasp.scores(net, [(x, y)])
    assert all(torch.equal(outside[name], inside[name]) for name in inside)
    eigenvalues = torch.linalg.eigvalsh(grasp.ntk(net, x[:2]))
    assert eigenvalues.min() > -1e-9 * eigenvalues.max()


def test_an_operation_without_second_derivative_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Hardsigmoid(), nn.Linear(12, 4))
    text = r"^The model cannot be scored, it or its loss has an operation without second derivative: .*hardsigmoid.*\.$"
    with pytest.raises(ValueError, match=text):
        grasp.scores(net, pictures())


def test_scores_that_are_all_zero_rank_nothing():
    zeros = perceptron()
    M.restore(zeros, {name: torch.zeros_like(t) for name, t in M.state(zeros).items()})
    for net, temperature in ((zeros, 200.0), (perceptron(), 1e30)):
        with pytest.raises(
            ValueError, match=r"^All (GraSP scores|gradients) are zero, so no weight ranks above another"
        ):
            grasp.prune(net, pictures(), 0.5, temperature)


@pytest.mark.parametrize("temperature", [None, "200", 0, -1.0, float("nan"), True])
def test_a_temperature_is_a_number_above_0(temperature):
    text = f"^Invalid temperature {re.escape(repr(temperature))}: give a number above 0\\.$"
    with pytest.raises(ValueError, match=text):
        grasp.scores(perceptron(), pictures(), temperature)


@pytest.mark.parametrize("options", [{"per_class": 1.5}, {"per_class": True}, {"per_class": "2"}, {"per_class": 0}])
def test_per_class_is_a_whole_number(options):
    with pytest.raises(
        ValueError, match=rf"^Invalid per_class {options['per_class']!r}: give a whole number of images"
    ):
        grasp.class_balanced(data.load("digits"), **options)


def test_old_hooks_that_make_a_weight_leave_the_other_scores():
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(36, 12)), nn.ReLU(), nn.Linear(12, 4))
    batch = [(x.flatten(1), y) for x, y in pictures()]
    net(batch[0][0])
    assert list(grasp.scores(net, batch)) == ["2"]


def test_images_are_fed_in_the_dtype_of_the_model():
    own = data.from_tensors(torch.randint(256, (40, 1, 5, 5), dtype=torch.uint8), torch.arange(40) % 3, 0, 0)
    net, pairs = convnet(), grasp.class_balanced(own, 3, torch.Generator().manual_seed(0))
    wide = [(x.double(), y) for x, y in pairs]
    assert pairs[0][0].dtype == torch.float32
    assert same(grasp.scores(net, pairs), grasp.scores(net, wide))
    assert grasp.gradient_norm(net, pairs) == grasp.gradient_norm(net, wide)
    assert torch.equal(grasp.ntk(net, pairs[0][0]), grasp.ntk(net, wide[0][0]))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_augmented_batches_of_other_images_than_squares():
    own = data.from_tensors(torch.ones(8, 1, 9, 24, dtype=torch.uint8), torch.arange(8) % 2, 0, 0)
    [(x, _)] = grasp.class_balanced(own, 2, augment=True)
    assert x.shape == (4, 1, 9, 24)
    table = data.from_tensors(torch.ones(8, 5), torch.arange(8) % 2, 0, 0)
    with pytest.raises(ValueError, match=message("Invalid augment True: it is for images [N, C, H, W], not (8, 5).")):
        grasp.class_balanced(table, 2, augment=True)


def test_arguments_of_another_kind_are_told_in_one_line():
    with pytest.raises(ValueError, match=message("Invalid temperature inf: give a number above 0.")):
        grasp.scores(mlp(), [batch()], float("inf"))
    with pytest.raises(ValueError, match=message("Invalid batches of type NoneType: give a list of chunks")):
        grasp.scores(mlp(), None)
    digits = data.load("digits")
    one, other = (grasp.class_balanced(digits, n, torch.Generator().manual_seed(0)) for n in (3, np.int64(3)))
    assert torch.equal(one[0][0], other[0][0])


@pytest.mark.parametrize(
    "use",
    [
        lambda net: grasp.scores(net, [batch()]),
        lambda net: baselines.snip_scores(net, [batch()]),
        lambda net: baselines.synflow(net, (5,), 0.5),
        lambda net: cs.attach(net),
        lambda net: stochastic.L0().attach(net),
    ],
)
def test_complex_weights_have_magnitudes_alone(use):
    net = nn.Sequential(nn.Linear(5, 4, dtype=torch.complex64), nn.Linear(4, 3, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=message("Layer '0' has complex weights, which only magnitudes can rank: leave")
    ):
        use(net)
    assert not any(parametrize.is_parametrized(layer) for layer in net)
    kept = lth.prune(net, 0.5)["0"]
    assert net[0].weight[kept].abs().min() >= net[0].weight[~kept].abs().max()
    M.attach(net, {"0": kept})
    assert torch.equal(net[0].weight != 0, kept)
