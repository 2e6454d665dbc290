"""lottery.dynamic: GMP, DNW, SET, RigL."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import ADAM, SGD, convnet, images, mlp, trained
from torch import nn
from torch.nn import functional as F

from lottery import baselines, dynamic, grasp, training
from lottery import masks as M
from lottery.dynamic import DNW, GMP, SET, RigL


def message(text):
    return f"^{re.escape(text)}"


def one(*weights):
    """A layer without bias that has these weights, float64 [1, n], under a mask of ones."""
    layer = nn.Linear(len(weights), 1, bias=False).double()
    layer.weight.data.copy_(torch.tensor([weights], dtype=torch.float64))
    return M.attach(nn.Sequential(layer))


def step(model, iterations=100, optimizer=None, batch=None, seed=0, start=0, **recipe):
    return SimpleNamespace(
        model=model,
        recipe=training.Recipe(iterations=iterations, **recipe),
        optimizer=optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        batch=batch,
        start=start,
        loss=F.cross_entropy,
        generator=torch.Generator().manual_seed(seed),
    )


def kept(model):
    return [int(i) for i in M.read(model)["0"][0].nonzero()[:, 0]]


def counts(masks):
    return {name: int(m.sum()) for name, m in masks.items()}


# GMP ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "sparsity"),  # of a target of 1, in epochs of 100: (1 − (1 − (e − 20) / 60)³)
    [(20, 0.0), (21, 0.04917130), (35, 0.578125), (50, 0.875), (79, 0.99999537), (80, 1.0), (99, 1.0)],
)
def test_cubic_ramp_by_hand(t, sparsity):
    u = GMP(every=1).ramp(t, 100)
    assert 1 - (1 - u) ** 3 == pytest.approx(sparsity, abs=1e-8)


def test_ramp_moves_every_so_often_and_ends_before_the_last_step():
    method = GMP(begin=0.2, end=1.0, every=30)
    assert method.ramp(19, 100) is None
    assert [method.ramp(t, 100) for t in (20, 49, 50, 79, 80, 98)] == [0, 0, 30 / 79, 30 / 79, 60 / 79, 60 / 79]
    assert method.ramp(99, 100) == 1


def test_kept_by_hand():
    """40 and 16 weights: halfway d = 0.25 + 0.75 / 8 = 0.34375, 13.75 and 5.5 weights, halves to even removals."""
    net = M.attach(nn.Sequential(nn.Linear(8, 5), nn.Linear(4, 4)))
    method = GMP(density=0.25)
    assert method.kept(net, 0) == {"0": 40, "1": 16}
    assert method.kept(net, 0.5) == {"0": 40 - round(26.25), "1": 16 - round(10.5)} == {"0": 14, "1": 6}
    assert method.kept(net, 1) == {"0": 10, "1": 4}
    assert GMP(density=0.25, budget="global").kept(net, 1) == 14
    assert GMP(density=(("1", 0.5),)).kept(net, 1) == {"1": 8}  # what a budget leaves out stays dense
    assert GMP(density=0.25, initial=0.5).kept(net, 0) == {"0": 20, "1": 8}
    assert sum(GMP(density=0.4, budget="erk").kept(net, 1).values()) == pytest.approx(0.4 * 56, abs=1)


def test_pruned_weight_returns_when_it_ranks_again():
    net = one(1.0, -4.0, 3.0, 2.0)
    method = GMP(density=0.5, begin=0, end=0.5, every=1)
    method.before_step(50, step(net))  # the ramp's last
    assert kept(net) == [1, 2]
    M.original(net[0]).data[0, 0] = -5.0  # momentum may do that to a weight under a mask
    method.before_step(51, step(net))
    assert kept(net) == [1, 2]  # the ramp is over: nothing moves
    GMP(density=0.5, begin=0, end=0.5, rank="step").before_step(51, step(net))
    assert kept(net) == [0, 1]


def test_gmp_moves_masks_with_the_ramp_only():
    net = one(*range(1, 9))
    method = GMP(density=0.25, begin=0.1, end=0.5, every=20)
    seen = []
    for t in range(60):
        method.before_step(t, step(net))
        seen.append(len(kept(net)))
    assert seen == [8] * 30 + [8 - round(0.75 * 8 * (1 - 1 / 8))] * 20 + [2] * 10


def test_gmp_ranks_all_layers_together():
    net = M.attach(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)))
    M.original(net[0]).data.copy_(torch.tensor([[1.0, -2], [3, 4]]))
    M.original(net[1]).data.copy_(torch.tensor([[-5.0, 6]]))
    GMP(density=0.5, budget="global", begin=0, end=0.1).before_step(99, step(net, start=99))
    assert [m.tolist() for m in M.read(net).values()] == [[[False, False], [False, True]], [[True, True]]]


def test_gmp_prunes_the_layers_that_carry_a_mask():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    M.attach(net, {"1": torch.ones(4, 4, dtype=torch.bool)})
    method = GMP(density=0.25, begin=0, end=0.1)
    method.attach(net)
    method.before_step(99, step(net, start=99))
    assert counts(method.masks(net)) == {"1": 4}


def test_masked_weights_have_no_gradient():
    net = one(1.0, 2, 3, 4)
    GMP(density=0.5, begin=0, end=0.1).before_step(99, step(net, start=99))
    net(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert M.original(net[0]).grad.tolist() == [[0, 0, 1, 1]]


# DNW ------------------------------------------------------------------------------------------------------------------


def test_straight_through_by_hand():
    """y = w x, dy/dw = x in all places, not only where w is used."""
    net = nn.Sequential(nn.Linear(4, 1, bias=False)).double()
    net[0].weight.data.copy_(torch.tensor([[0.5, -2.0, 0.25, 1.0]]))
    DNW(density=0.5).attach(net)
    x = torch.tensor([[1.0, 10, 100, 1000]], dtype=torch.float64)
    y = net(x)
    assert net[0].weight.tolist() == [[0, -2, 0, 1]]
    assert y.item() == 980
    y.backward()
    assert M.original(net[0]).grad.tolist() == x.tolist()


@pytest.mark.parametrize("make", [mlp, convnet])
def test_straight_through_is_the_gradient_to_the_effective_weights(make):
    net = make()
    DNW(density=0.3).attach(net)
    split = images().train
    x, y = split.x[:6].double() / 255, split.y[:6]
    F.cross_entropy(net(x), y).backward()
    for name, g in grasp.summed_gradient(net, [(x, y)])[1].items():
        torch.testing.assert_close(M.original(M.prunable(net)[name]).grad, g, rtol=1e-10, atol=1e-13)


def test_dnw_uses_a_weight_again_once_it_has_grown():
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    net[0].weight.data.copy_(torch.tensor([[3.0, 2.0, 1.0]]))
    method = DNW(density=1 / 3)
    method.attach(net)
    assert method.masks(net)["0"].tolist() == [[True, False, False]]
    opt = torch.optim.SGD(net.parameters(), 1.0)
    (-net(torch.tensor([[0.0, 0, 3]], dtype=torch.float64))).sum().backward()
    opt.step()
    assert M.original(net[0]).tolist() == [[3, 2, 4]]
    assert net[0].weight.tolist() == [[0, 0, 4]]


def test_dnw_by_a_budget():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    method = DNW(density=(("0", 0.25), ("2", 0.5)))
    method.attach(net)
    assert counts(method.masks(net)) == {"0": 4, "1": 16, "2": 8}
    DNW(density=(("0", 0.5), ("2", 0.5))).attach(net)  # in place, nothing stacks
    assert len(net[0].parametrizations.weight) == 1
    assert counts(method.masks(net)) == {"0": 8, "1": 16, "2": 8}


def test_dnw_of_tied_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    DNW(density=0.25).attach(net)
    assert torch.equal(net[0].weight, net[1].weight)
    assert int((net[1].weight != 0).sum()) == 4


# SET and RigL ---------------------------------------------------------------------------------------------------------


def test_cosine_by_hand():
    """T_end = 300: α/2 (1 + cos(πt/300)) at 100 and 200 is α·3/4 and α·1/4."""
    method = RigL(fraction=0.4)
    assert [method.replaced(t, 400) for t in (0, 50, 100, 200, 300, 399)] == pytest.approx([0, 0, 0.3, 0.1, 0, 0])
    assert [SET(fraction=0.4, every=50).replaced(t, 400) for t in (0, 50, 60, 350, 400)] == [0, 0.4, 0, 0.4, 0]


def test_rewire_by_hand():
    """Of 6 active weights ⌊0.35 · 6⌋ = 2 go, |0.1| and |−0.2|; of all others the two with the highest score come."""
    net = one(0.1, -0.2, 3, -4, 5, 6, 7, 8)
    M.attach(net, {"0": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]).bool()})
    opt = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    opt.state[M.original(net[0])]["momentum_buffer"] = torch.arange(1.0, 9, dtype=torch.float64)[None]
    dynamic.rewire(net[0], torch.tensor([[5.0, 0, 9, 9, 9, 9, 0.5, 6]]), 0.35, opt)
    assert kept(net) == [0, 2, 3, 4, 5, 7]
    assert M.original(net[0]).tolist() == [[0.1, -0.2, 3, -4, 5, 6, 7, 0]]  # what comes back at once keeps its value
    assert opt.state[M.original(net[0])]["momentum_buffer"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.Adam(p, 0.01)])
def test_what_grows_starts_at_zero_without_momentum(make):
    net, split = sparse(mlp()), images().train
    opt = make(net.parameters())
    batch = (split.x[:8].double() / 255, split.y[:8])
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        opt.step()
    for p in net.parameters():  # nothing is 0 by accident
        for moment in opt.state[p].values():
            if moment.dim():
                moment.add_(1)
    before, values = M.read(net), M.state(net)
    RigL(every=10).before_step(10, step(net, optimizer=opt, batch=batch))
    grown = {name: m & ~before[name] for name, m in M.read(net).items()}
    assert sum(counts(grown).values()) > 3
    for name, layer in M.prunable(net).items():
        assert torch.equal(M.original(layer) == 0, grown[name])
        rest = ~grown[name]
        assert torch.equal(M.original(layer)[rest], values[f"{name}.weight"][rest])
        for moment in opt.state[M.original(layer)].values():
            if moment.dim():
                assert torch.equal(moment == 0, grown[name])


def sparse(net, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return M.attach(net, M.top_k(baselines.random_scores(net, generator), baselines.erk(net, density)))


@pytest.mark.parametrize("make", [mlp, convnet])
def test_rigl_grows_the_largest_gradients_of_the_dense_network(make):
    net, split = sparse(make()), images().train
    batch = (split.x[:8].double() / 255, split.y[:8])
    before, w = M.read(net), {name: layer.weight.detach() for name, layer in M.prunable(net).items()}
    g = grasp.summed_gradient(net, [batch])[1]
    share = RigL(every=10).replaced(10, 100)
    RigL(every=10).before_step(10, step(net, batch=batch))
    for name, after in M.read(net).items():  # by sorting lists
        active = [i for i, m in enumerate(before[name].flatten()) if m]
        moved = int(share * len(active))
        stay = set(sorted(active, key=lambda i: -abs(w[name].flatten()[i]))[: len(active) - moved])
        others = [i for i in range(before[name].numel()) if i not in stay]
        stay |= set(sorted(others, key=lambda i: -abs(g[name].flatten()[i]))[:moved])
        assert {int(i) for i in after.flatten().nonzero()} == stay


def test_dense_gradient_leaves_the_model_alone():
    net, split = sparse(convnet(dropout=0.5)), images().train
    batch = (split.x[:8].double() / 255, split.y[:8])
    state, rng = {name: t.clone() for name, t in net.state_dict().items()}, torch.get_rng_state()
    torch.manual_seed(3)
    g = grasp.summed_gradient(net, [batch])[1]
    torch.manual_seed(3)
    mine = dynamic.dense_gradient(net, *batch)
    assert all(torch.equal(g[name], mine[name]) for name in g)
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    torch.set_rng_state(rng)
    smooth = dynamic.dense_gradient(
        net.eval(), *batch, lambda logits, y: F.cross_entropy(logits, y, label_smoothing=0.1)
    )
    assert torch.equal(rng, torch.get_rng_state())
    assert not torch.equal(smooth["0"], mine["0"])
    assert not net.training


def test_set_grows_at_random_from_the_steps_generator():
    def run(seed, torch_seed):
        torch.manual_seed(torch_seed)
        net = sparse(mlp(), seed=0)
        SET(every=10).before_step(10, step(net, seed=seed))
        return M.read(net)

    same, other = run(1, 5), run(2, 5)
    assert all(torch.equal(m, same[name]) for name, m in run(1, 6).items())
    assert any(not torch.equal(m, same[name]) for name, m in other.items())
    assert counts(same) == counts(other) == counts(M.read(sparse(mlp())))


def test_rigl_at_erk_densities_with_a_capped_layer():
    """200, 200 and 10 weights at 0.5: raw densities 0.15, 0.15, 1.1; the last is capped, 195 of 400 remain."""
    net = nn.Sequential(
        nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False), nn.Linear(10, 1, bias=False)
    )
    erk = baselines.erk(net, 0.5)
    assert list(erk.values()) == pytest.approx([195 / 400, 195 / 400, 1.0])
    M.attach(net, M.top_k(baselines.random_scores(net, torch.Generator().manual_seed(0)), erk))
    first = M.read(net)
    batch = (torch.rand(5, 10), torch.zeros(5, dtype=torch.int64))
    net.append(nn.Linear(1, 3))  # something to classify with
    RigL(every=10).before_step(10, step(net, batch=batch))
    assert counts(M.read(net)) == counts(first)
    assert not torch.equal(M.read(net)["0"], first["0"])


def test_nothing_to_move():
    what = "RigL moves the masks that it finds, and all layers are dense: attach random masks first, such as "
    with pytest.raises(ValueError, match=message(what)):
        RigL().param_groups(M.attach(mlp()), SGD)


# All ------------------------------------------------------------------------------------------------------------------

EVERY = {
    "gmp": GMP(density=0.2, every=2),
    "gmp by steps": GMP(density=0.2, every=2, rank="step"),
    "gmp global": GMP(density=0.2, budget="global", every=2, end=1.0),
    "gmp erk": GMP(density=0.2, budget="erk", every=3),
    "dnw": DNW(density=0.2),
    "dnw erk": DNW(density=0.2, budget="erk"),
    "set": SET(every=3),
    "rigl": RigL(every=3),
}


def ready(name, net):
    method = EVERY[name]
    method.attach(sparse(net, 0.2) if name in ("set", "rigl") else net)
    return method


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_density_at_the_end(name, dtype, make, recipe):
    net = make().to(dtype)
    method = ready(name, net)
    history = trained(net, recipe, method)
    assert history.status == "finished"
    n = sum(layer.weight.numel() for layer in M.prunable(net).values())
    assert M.density(method.masks(net)) == pytest.approx(0.2, abs=2 / n)
    effective = {name: layer.weight.detach() != 0 for name, layer in M.prunable(net).items()}
    assert all(not (effective[name] & ~m).any() for name, m in method.masks(net).items())
    if name.startswith("gmp"):
        assert history.numbers["density"][0] > history.numbers["density"][-1] == M.density(method.masks(net))


@pytest.mark.parametrize("name", EVERY)
def test_resumed_equals_undisturbed(name):
    """Stopped, written away and read into a fresh model: masks and weights go on, as does what is drawn."""
    whole = mlp()
    method = ready(name, whole)
    trained(whole, SGD, method, opt=training.optimizer(whole, SGD, method.param_groups(whole, SGD)))
    first = mlp()
    ready(name, first)
    opt = training.optimizer(first, SGD, method.param_groups(first, SGD))
    trained(first, SGD, method, stop=7, opt=opt)
    second = mlp(seed=1)
    ready(name, second)
    M.restore(second, M.state(first))
    if masks := M.read(first):
        M.attach(second, masks)
    again = training.optimizer(second, SGD, method.param_groups(second, SGD))
    again.load_state_dict(opt.state_dict())
    torch.manual_seed(99)
    trained(second, SGD, method, start=7, opt=again)
    assert all(torch.equal(m, method.masks(whole)[name]) for name, m in method.masks(second).items())
    for key, tensor in M.state(M.bake(whole)).items():
        torch.testing.assert_close(M.state(M.bake(second))[key], tensor, rtol=1e-12, atol=1e-14)


GOLDEN = {  # weights kept by layer; validation loss at the first and last reading, training loss at the end; Σ|state|
    "gmp": ([7, 19, 6], [1.64283958928, 1.615140045211, 1.608162458371], 46.40939224),
    "gmp by steps": ([7, 19, 6], [1.64283958928, 1.615128256882, 1.609047764199], 46.349531236),
    "gmp global": ([9, 9, 14], [1.64283958928, 1.617411041536, 1.598285210462], 46.730373415),
    "gmp erk": ([10, 13, 10], [1.64283958928, 1.617760927315, 1.592717673483], 47.003302691),
    "dnw": ([7, 19, 6], [1.649848939172, 1.618238695967, 1.600811735015], 47.153593833),
    "dnw erk": ([10, 13, 10], [1.645934527277, 1.608078761268, 1.59109864914], 46.830594243),
    "set": ([10, 13, 10], [1.64961635727, 1.616739031748, 1.616038902695], 39.375757223),
    "rigl": ([10, 13, 10], [1.64961635727, 1.616149586894, 1.615201906892], 43.637277714),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trajectory(name):
    """A change beyond these digits means raising `VERSION` in lottery/dynamic.py."""
    net = convnet()
    method = ready(name, net)
    history = trained(net, SGD, method)
    kept, losses, total = GOLDEN[name]
    assert dynamic.VERSION == 1
    assert [int(m.sum()) for m in method.masks(net).values()] == kept
    assert [history.val_loss[0], history.val_loss[-1], history.last.train_loss] == pytest.approx(losses, rel=1e-9)
    assert sum(t.abs().sum().item() for t in M.state(net).values()) == pytest.approx(total, rel=1e-9)


def test_a_layer_that_gmp_empties_is_named():
    net = mlp()
    with torch.no_grad():
        net[3].weight.mul_(1e-6)
    method = GMP(0.1, budget="global", every=2)
    with pytest.warns(UserWarning, match=r"^Layer collapse: no weight is kept in 3; "):
        trained(method.attach(net), dataclasses.replace(SGD, lr=1e-9), method)


def test_broken_promises():
    for name in EVERY:
        net = mlp()
        method = ready(name, net)
        before = method.masks(net)
        if name.startswith("dnw"):
            M.on(net[1], dynamic.TopK).k -= 1
        else:
            M.attach(net, {"1": torch.zeros_like(M.original(net[1]), dtype=torch.bool)})
        with pytest.raises(AssertionError, match="not with the"):
            method.check(net, before, finished=True)


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, math.inf, 1e-300]), min_size=1, max_size=12), st.integers(1, 12)
)
def test_largest_is_top_k(scores, k):
    scores, k = torch.tensor(scores, dtype=torch.float64), min(k, len(scores))
    assert torch.equal(dynamic.largest(scores, k), M.keep({"a": scores}, {"a": k})["a"])


def test_largest_of_nan():
    assert dynamic.largest(torch.tensor([1.0, math.nan, 2.0]), 2).tolist() == [True, False, True]
    assert not dynamic.largest(torch.ones(3), 0).any()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GMP(density=0), "Invalid density 0: give a fraction of weights to keep, 0 < density <= 1"),
        (lambda: GMP(density=1.2), "Invalid density 1.2: give a fraction of weights to keep, 0 < density <= 1"),
        (lambda: GMP(density=(("0", 2.0),)), "Invalid density (('0', 2.0),): give a fraction"),
        (lambda: GMP(density="0.1"), "Invalid density '0.1': give a fraction"),
        (lambda: GMP(density=(("0", True),)), "Invalid density (('0', True),): give a fraction"),
        (lambda: GMP(density=(1, 2)), "Invalid density (1, 2): give a fraction"),
        (lambda: GMP(density=()), "Invalid density (): give a fraction"),
        (lambda: DNW(budget=[]), "Invalid budget []: give one of uniform, erk."),
        (lambda: GMP(begin=None), "Invalid begin None: give a share of the training, 0 <= begin < 1."),
        (lambda: GMP(end="1"), "Invalid end '1': give a share of the training, 0.2 < end <= 1."),
        (lambda: GMP(initial=True), "Invalid initial True: give a fraction of weights, 0 < initial <= 1."),
        (lambda: SET("0.3"), "Invalid fraction '0.3': give the share of weights to replace, 0 < fraction <= 1."),
        (lambda: RigL(end=None), "Invalid end None: give a share of the training, 0 < end <= 1."),
        (lambda: GMP(budget="flat"), "Invalid budget 'flat': give one of uniform, erk, global."),
        (lambda: DNW(budget="global"), "Invalid budget 'global': give one of uniform, erk."),
        (lambda: GMP(initial=0), "Invalid initial 0: give a fraction of weights, 0 < initial <= 1."),
        (lambda: GMP(begin=1), "Invalid begin 1: give a share of the training, 0 <= begin < 1."),
        (lambda: GMP(end=0.2), "Invalid end 0.2: give a share of the training, 0.2 < end <= 1."),
        (lambda: GMP(every=0), "Invalid every 0: give a whole number of iterations from 1."),
        (lambda: RigL(every=1.5), "Invalid every 1.5: give a whole number of iterations from 1."),
        (lambda: GMP(rank="never"), "Invalid rank 'never': give 'update' or 'step'."),
        (lambda: SET(fraction=0), "Invalid fraction 0: give the share of weights to replace, 0 < fraction <= 1."),
        (lambda: SET(decay="linear"), "Invalid decay 'linear': give 'constant' or 'cosine'."),
        (lambda: RigL(end=0), "Invalid end 0: give a share of the training, 0 < end <= 1."),
        (lambda: GMP(density=(("9", 0.5),)).attach(mlp()), "Unknown names in density: 9; the model has 1, 3, 5."),
        (lambda: DNW(density=(("9", 0.5),)).attach(mlp()), "Unknown names in density: 9; the model has 1, 3, 5."),
        (lambda: GMP(density=0.01).attach(mlp()), "Density 0.01 keeps none of the 40 weights of layer '5'"),
        (lambda: DNW(density=0.01).attach(mlp()), "Density 0.01 keeps none of the 40 weights of layer '5'"),
    ],
)
def test_bad_values(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


@pytest.mark.parametrize("method", [GMP(0.1), GMP(0.1, budget="global"), DNW(0.1), SET(), RigL()])
def test_a_method_that_was_not_attached_is_told_before_the_training(method):
    net, steps = mlp(), []
    net[1].register_forward_pre_hook(lambda *call: steps.append(call))
    with pytest.raises(ValueError, match="attach"):
        trained(net, SGD, method)
    if isinstance(method, GMP | DNW):
        with pytest.raises(ValueError, match="has nothing to prune on this model: call"):
            trained(net, SGD, method, opt=training.optimizer(net, SGD))
    assert not steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_gradient_of_half_precision_is_that_of_its_float32_copy(dtype):
    net, x, y = mlp().to(dtype), torch.rand(6, 1, 4, 4).to(dtype), torch.arange(6) % 5
    g = dynamic.dense_gradient(net, x, y)
    for name, exact in dynamic.dense_gradient(mlp().to(dtype).float(), x.float(), y).items():
        assert torch.equal(g[name], exact)
    assert trained(sparse(net), SGD, RigL(every=3)).status == "finished"


def test_a_budget_names_a_layer_once():
    with pytest.raises(ValueError, match=message("Invalid density (('0', 0.1), ('0', 0.2)): give a fraction")):
        GMP((("0", 0.1), ("0", 0.2)))
