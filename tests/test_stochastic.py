"""lottery.stochastic: L0 with a hard concrete gate for each weight, supermasks on frozen weights."""

import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_training import ADAM, SGD, convnet, mlp, trained
from torch import nn

from lottery import cs, stochastic, training
from lottery import masks as M
from lottery.stochastic import L0, Bernoulli, FrozenCS, HardConcrete, Supermask


def message(text):
    return f"^{re.escape(text)}"


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def step(model, seed=0):
    return SimpleNamespace(model=model, generator=torch.Generator().manual_seed(seed))


def line(method, n=4, weight=1.0):
    net = nn.Sequential(nn.Linear(n, 1)).double()
    net[0].weight.data.fill_(weight)
    return method.attach(net)


def gate_of(net):
    return next(iter(stochastic.gates(net).values()))


# L0 -------------------------------------------------------------------------------------------------------------------


def test_hard_concrete_by_hand():
    """s̄ = σ((log u − log(1 − u) + log α) / β)·1.2 − 0.1, cut to [0, 1], at u = 0.05, 0.5, 0.8, 0.99 and log α = −1."""
    net = line(L0())
    gate, u = gate_of(net), [0.05, 0.5, 0.8, 0.99]
    gate.log_alpha.data.fill_(-1)
    gate.noise = torch.tensor([u], dtype=torch.float64)
    stretched = [1.2 * sigmoid((math.log(v) - math.log(1 - v) - 1) / (2 / 3)) - 0.1 for v in u]
    assert stretched[0] < 0
    assert stretched[3] > 1
    z = [min(1, max(0, v)) for v in stretched]
    assert net[0].weight.tolist()[0] == pytest.approx(z, rel=1e-12)
    net.eval()
    assert net[0].weight.tolist()[0] == pytest.approx([1.2 * sigmoid(-1) - 0.1] * 4)
    gate.log_alpha.data.copy_(torch.tensor([[-2.5, -2.3, 0.0, 3.0]]))  # a test's z is 0 up to log(1 / 11) = −2.398
    assert [v > 0 for v in net[0].weight.tolist()[0]] == L0().masks(net)["0"].tolist()[0] == [False, True, True, True]
    assert net[0].weight[0, 3] == 1


def test_expected_number_by_hand():
    """P(z ≠ 0) = σ(log α + (2/3) log 11): 0.8318 at log α = 0."""
    net = line(L0(lam=0.25))
    assert gate_of(net).active().tolist()[0] == pytest.approx([sigmoid(2 / 3 * math.log(11))] * 4)
    assert gate_of(net).active()[0, 0].item() == pytest.approx(0.83182, abs=1e-5)
    p = [sigmoid(a + 2 / 3 * math.log(11)) for a in (-1, 0, 1, 2)]
    gate_of(net).log_alpha.data.copy_(torch.tensor([[-1.0, 0, 1, 2]]))
    penalty = L0(lam=0.25).penalty(net)
    assert penalty.item() == pytest.approx(0.25 * sum(p), rel=1e-12)
    penalty.backward()
    assert gate_of(net).log_alpha.grad.tolist()[0] == pytest.approx([0.25 * q * (1 - q) for q in p], rel=1e-12)
    assert L0().reading(net) == pytest.approx({"density": 1, "density/0": 1, "expected": sum(p) / 4})


def test_the_expected_number_is_not_summed_in_half_precision():
    net = L0(lam=1.0).attach(nn.Linear(784, 300).half())
    assert L0(lam=1.0).penalty(net).item() == pytest.approx(235_200 * 0.83182, rel=1e-3)


def test_expected_number_is_that_of_the_draws():
    n = 40_000
    for log_alpha in (-2.0, 0.0, 1.5):
        gate = HardConcrete(torch.zeros(n))
        gate.log_alpha.data.fill_(log_alpha)
        gate.draw(torch.Generator().manual_seed(0))
        p = gate.active()[0].item()
        assert (gate.drawn() > 0).float().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_gradient_of_the_gates_by_differences():
    net = line(L0(), weight=1.5)
    gate = gate_of(net)
    gate.log_alpha.data.copy_(torch.tensor([[-0.5, 0.1, 0.4, 1.0]]))
    gate.noise = torch.tensor([[0.4, 0.5, 0.6, 0.3]], dtype=torch.float64)
    net[0].weight.square().sum().backward()
    for i in range(4):
        at = []
        for h in (1e-6, -1e-6):
            gate.log_alpha.data[0, i] += h
            at.append(net[0].weight.square().sum().item())
            gate.log_alpha.data[0, i] -= h
        assert gate.log_alpha.grad[0, i].item() == pytest.approx((at[0] - at[1]) / 2e-6, rel=1e-6)


def test_log_alpha_is_clipped_before_a_step():
    net = line(L0())
    gate_of(net).log_alpha.data.copy_(torch.tensor([[-9.0, -1, 1, 9]]))
    L0().before_step(0, step(net))
    assert gate_of(net).log_alpha.tolist()[0] == pytest.approx([math.log(0.01), -1, 1, math.log(100)])


def test_drop_rate_at_the_start():
    assert gate_of(line(L0(drop=0.2))).log_alpha.tolist()[0] == pytest.approx([math.log(4)] * 4)


def test_a_strong_penalty_prunes():
    net = L0(lam=0.05).attach(mlp())
    history = trained(net, training.Recipe(lr=0.5, batch_size=10, iterations=14, eval_every=2), L0(lam=0.05))
    assert history.numbers["density"][-1] == M.density(L0().masks(net)) < 0.5
    assert history.numbers["expected"][0] > history.numbers["expected"][-1]


# Supermask ------------------------------------------------------------------------------------------------------------


def test_supermask_by_hand():
    """m = 1 where u < σ(s), and dL/ds = dL/dm · σ(s)(1 − σ(s)), wherever m is."""
    net = line(Supermask(), weight=3.0)
    gate = gate_of(net)
    gate.s.data.copy_(torch.tensor([[-1.0, -1, 2, 2]]))
    gate.noise = torch.tensor([[0.2, 0.3, 0.9, 0.85]], dtype=torch.float64)  # σ(−1) = 0.269, σ(2) = 0.881
    assert net[0].weight.tolist() == [[3, 0, 0, 3]]
    x = torch.tensor([[1.0, 10, 100, 1000]], dtype=torch.float64)
    net(x).sum().backward()
    slopes = [sigmoid(s) * (1 - sigmoid(s)) for s in (-1, -1, 2, 2)]
    assert gate.s.grad.tolist()[0] == pytest.approx([3 * v * d for v, d in zip(x[0].tolist(), slopes, strict=True)])
    assert M.original(net[0]).grad is None
    net.eval()
    assert net[0].weight.tolist() == [[0, 0, 3, 3]]
    assert Supermask().masks(net)["0"].tolist() == [[False, False, True, True]]


def test_dynamic_rescaling_by_hand():
    net = line(Supermask(rescale=True), weight=3.0)
    gate_of(net).s.data.copy_(torch.tensor([[-1.0, -1, -1, 2]]))
    assert net[0].weight.tolist() == [[0, 0, 0, 12]]
    gate_of(net).s.data.fill_(-1)
    assert net[0].weight.tolist() == [[0, 0, 0, 0]]


def test_draws_are_bernoulli():
    gate = Bernoulli(torch.zeros(40_000), s0=-1)
    gate.draw(torch.Generator().manual_seed(0))
    p = sigmoid(-1)
    assert gate.drawn().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 40_000))


@pytest.mark.parametrize("method", [Supermask(), FrozenCS(schedule="iteration")], ids=["drawn", "annealed"])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_only_the_mask_is_trained(method, make):
    net = method.attach(make())
    before = {name: p.clone() for name, p in net.named_parameters()}
    trained(net, training.Recipe(optimizer="sgd", lr=20, batch_size=10, iterations=14, eval_every=2), method)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".s")}
    assert 0 < M.density(method.masks(net)) < 1


def test_annealed_counterpart_is_cs_on_frozen_weights():
    method = FrozenCS(s0=-0.1, scale=False)
    net = method.attach(mlp())
    soft = M.original(net[1]) * sigmoid(-0.1)
    torch.testing.assert_close(net[1].weight, soft)
    assert isinstance(M.on(net[1], cs.Gate), cs.Gate)
    [group] = method.param_groups(net, SGD)
    assert group["weight_decay"] == 0
    assert len(group["params"]) == 3


# Both -----------------------------------------------------------------------------------------------------------------

EVERY = {"l0": L0(lam=1e-3), "supermask": Supermask(), "frozen cs": FrozenCS(s0=-0.01, schedule="iteration")}


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_trains(name, dtype, make, recipe):
    net, method = make().to(dtype), EVERY[name]
    method.attach(net)
    history = trained(net, recipe, method)
    assert history.status == "finished"
    effective = {layer: module.weight.detach() for layer, module in M.prunable(net.eval()).items()}
    for layer, mask in method.masks(net).items():
        if name != "frozen cs":  # σ(200 s) near s = 0 is soft
            assert not effective[layer][~mask].any()
            assert torch.equal(effective[layer] != 0, mask & (M.original(M.prunable(net)[layer]) != 0))


@pytest.mark.parametrize("name", EVERY)
def test_resumed_equals_undisturbed(name):
    method = EVERY[name]
    whole = method.attach(mlp())
    trained(whole, SGD, method, opt=training.optimizer(whole, SGD, method.param_groups(whole, SGD)))
    first = method.attach(mlp())
    opt = training.optimizer(first, SGD, method.param_groups(first, SGD))
    trained(first, SGD, method, stop=7, opt=opt)
    second = M.restore(method.attach(mlp(seed=1)), M.state(first))
    again = training.optimizer(second, SGD, method.param_groups(second, SGD))
    again.load_state_dict(opt.state_dict())
    torch.manual_seed(99)  # the global state plays no part
    trained(second, SGD, method, start=7, opt=again)
    assert sum(int(m.sum()) for m in method.masks(second).values()) > 0
    for key, tensor in M.state(whole).items():
        torch.testing.assert_close(M.state(second)[key], tensor, rtol=1e-12, atol=1e-14)


GOLDEN = {  # weights kept by layer; validation loss at the first and last reading, training loss at the end; Σ|state|
    "l0": ([36, 96, 30], [1.646395144231, 1.619976824428, 1.619246740588], 45.308834129),
    "supermask": ([18, 48, 18], [1.647412506325, 1.626617751556, 1.633740286027], 45.789828913),
    "frozen cs": ([20, 33, 15], [1.642466259996, 1.67714173006, 1.444757021614], 464.539536286),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trajectory(name):
    """A change beyond these digits means raising `VERSION` in lottery/stochastic.py."""
    net = convnet()
    method = EVERY[name]
    method.attach(net)
    history = trained(net, SGD, method)
    kept, losses, total = GOLDEN[name]
    assert stochastic.VERSION == 1
    assert [int(m.sum()) for m in method.masks(net).values()] == kept
    assert [history.val_loss[0], history.val_loss[-1], history.last.train_loss] == pytest.approx(losses, rel=1e-9)
    assert sum(t.abs().sum().item() for t in M.state(net).values()) == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("name", ["l0", "supermask"])
def test_noise_is_the_steps_and_no_part_of_the_state(name):
    method = EVERY[name]
    net = method.attach(mlp())
    names = set(M.state(net))
    seen = []
    for seed in (1, 1, 2):
        method.before_step(0, step(net, seed))
        seen.append(net[1].weight.detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert set(M.state(net)) == names == set(M.state(copy.deepcopy(net)))
    noise = stochastic.gates(net)["1"].noise
    method.before_step(1, step(net, 5))
    assert stochastic.gates(net)["1"].noise is noise  # in place, as a captured step needs it
    method.check(net, method.masks(net), finished=True)
    drawn, fixed = net.train()[1].weight, net.eval()[1].weight
    assert torch.equal(drawn, fixed)


@pytest.mark.parametrize("method", [L0(layers=("3",)), Supermask(layers=("3",)), FrozenCS(layers=("3",))])
def test_some_layers(method):
    net = method.attach(mlp())
    assert list(method.masks(net)) == ["3"]
    assert not hasattr(net[1], "parametrizations")


@pytest.mark.parametrize("method", [L0(drop=0.2), Supermask(s0=1.0, rescale=True)])
def test_attached_twice_is_as_new(method):
    net = type(method)().attach(mlp())
    for gate in stochastic.gates(net).values():
        gate.logits.data.fill_(7)
    method.attach(net)
    new = method.attach(mlp())
    assert len(net[1].parametrizations.weight) == 1
    assert all(torch.equal(t, M.state(new)[name]) for name, t in M.state(net).items())
    assert torch.equal(net.eval()[1].weight, new.eval()[1].weight)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in new.parameters()]


def test_tied_layers_share_a_gate():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    L0().attach(net)
    L0().before_step(0, step(net))
    assert torch.equal(net[0].weight, net[1].weight)
    assert len(stochastic.gates(net)) == 1


def test_gates_do_not_decay():
    net = L0().attach(mlp())
    weights, gates = L0().param_groups(net, SGD)
    assert (weights["weight_decay"], gates["weight_decay"]) == (1e-3, 0)
    assert [p.shape for p in gates["params"]] == [layer.weight.shape for layer in M.prunable(net).values()]
    [only] = Supermask().param_groups(Supermask().attach(mlp()), SGD)
    assert only["weight_decay"] == 0


def test_gates_have_their_own_rate():
    """Two steps without momentum, the second at a tenth of the rate: a gate moves by rate · lr · its gradient."""
    recipe = replace(SGD, momentum=0.0, weight_decay=0.0, iterations=2, eval_every=1, milestones=(1,), gamma=0.1)

    def moved(method, n):
        net = method.attach(mlp())
        start = {name: gate.log_alpha.detach().clone() for name, gate in stochastic.gates(net).items()}
        trained(net, replace(recipe, iterations=n, milestones=(1,) if n > 1 else ()), method)
        return {name: gate.log_alpha.detach() - start[name] for name, gate in stochastic.gates(net).items()}, net

    (one, plain), (three, fast) = moved(L0(lam=0.01), 1), moved(L0(lam=0.01, rate=3.0), 1)
    for name, change in one.items():
        torch.testing.assert_close(three[name], 3 * change, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(M.original(M.prunable(fast)[name]), M.original(M.prunable(plain)[name]))
    slow, _ = moved(L0(lam=1e3, rate=1e-6), 2)  # the penalty alone counts, and hardly changes: 1 + 0.1 of a step
    first, _ = moved(L0(lam=1e3, rate=1e-6), 1)
    for name, change in first.items():
        torch.testing.assert_close(slow[name], 1.1 * change, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: L0(lam=-1), "Invalid lam -1: give the weight of the penalty, a number from 0."),
        (lambda: L0(drop=1), "Invalid drop 1: give a drop rate, 0 < drop < 1."),
        (lambda: L0(beta=0), "Invalid beta 0: give a temperature, 0 < beta <= 1."),
        (lambda: L0(gamma=0), "Invalid gamma 0: give a number below 0."),
        (lambda: L0(zeta=1), "Invalid zeta 1: give a number above 1."),
        (lambda: L0(rate=0), "Invalid rate 0: give a number above 0."),
        (lambda: Supermask(rate=math.inf), "Invalid rate inf: give a number above 0."),
        (lambda: Supermask(s0=math.nan), "Invalid s0 nan: give a number near 0, at most 80 in size."),
        (lambda: Supermask(rescale=1), "Invalid rescale 1: give True or False."),
        (lambda: L0(lam=None), "Invalid lam None: give the weight of the penalty, a number from 0."),
        (lambda: L0(drop="0.5"), "Invalid drop '0.5': give a drop rate, 0 < drop < 1."),
        (lambda: L0(beta=True), "Invalid beta True: give a temperature, 0 < beta <= 1."),
        (lambda: Supermask(s0="1"), "Invalid s0 '1': give a number near 0, at most 80 in size."),
        (lambda: L0(layers=3).attach(mlp()), "Invalid layers 3: give a list of names, or None for all layers."),
        (lambda: L0(layers=("9",)).attach(mlp()), "Unknown names in layers: 9; the model has 1, 3, 5."),
        (
            lambda: L0(layers=()).attach(mlp()),
            "Nothing prunable: `layers` is empty; name some, or give None for all layers.",
        ),
        (lambda: L0().penalty(mlp()), "No gates on the model: call the method's attach(model) first."),
    ],
)
def test_bad_values(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


def test_attached_again_the_mode_stays_and_the_old_noise_goes():
    net = Supermask().attach(mlp()).eval()
    gate_of(net).draw(torch.Generator().manual_seed(0))
    Supermask().attach(net)
    gate = gate_of(net)
    assert not gate.training
    assert gate.noise is None
    assert torch.equal(net[1].weight, net.train()[1].weight)  # of a test, as in a network that is new
