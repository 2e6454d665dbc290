"""The hook of every method: `training.fit` and the Runs call it alike, and what it learns survives."""

import dataclasses
import json
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import message
from torch import nn

from lottery import cs, data, dynamic, experiments, methods, models, soft_threshold, stochastic, training
from lottery import masks as M
from lottery.batches import Batches
from lottery.experiments import Run, Store, load, work
from lottery.methods import NOTHING, Method
from lottery.training import Recipe

CONVS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
SGD = Recipe(
    "sgd", lr=0.1, batch_size=400, iterations=12, eval_every=4, momentum=0.9, nesterov=True, weight_decay=1e-2,
    milestones=(8,), last_batch="keep",
)  # fmt: skip
FIRST = Run(
    model="resnet8", dataset="digits", options=(("width", 4),), recipe=SGD, method=cs.CS(0.02, lam=1e-3, layers=CONVS)
)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(run):
    return models.create(run.model, seed=run.seed, in_shape=(1, 8, 8), **dict(run.options))


def order(run):
    """The seed of a run's data order."""
    return int(run.key[:15], 16)


def train(run, folder):
    """Train one Run and keep its weights; (row, what it leaves to its children)."""
    work.execute([run], folder, keep_weights=[True])
    [row] = load([run], store := Store(folder)).to_dict("records")
    return row, store.load_artifact(run.key)[0]


def closest(a, b):
    assert a.keys() <= b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-12)


# Continuous Sparsification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "carry"), [("as-described", True), ("code", True), ("code", False)])
def test_the_chain_of_runs_is_the_search(tmp_path, double, rule, carry):
    """Two rounds and the ticket, rewound to iteration 2: the same masks, and the same weights after retraining."""
    method = cs.CS(0.02, lam=1e-3, rule=rule, carry=carry, layers=CONVS)
    one = replace(FIRST, method=method)
    two = replace(one, parent=one, init="continue")
    ticket = replace(two, parent=two, init="rewind", rewind_to=2, rewind_schedule="restart", rate=0.0)
    ticket = replace(ticket, method=cs.Ticket(0.02))
    left = [train(run, tmp_path)[1] for run in (one, two, ticket)]

    images, net = data.load("digits"), network(one)
    rounds = cs.Rounds(images, SGD, method, [order(one), order(two)])
    levels = list(cs.search(net, rounds, 0.02, rounds=2, rule=rule, rewind_to=2, layers=CONVS))
    for level, trained in zip(levels, left, strict=False):
        assert all(torch.equal(m, trained[f"learned/{name}"].bool()) for name, m in level.masks.items())
    assert 0 < levels[-1].density < 1
    closest(M.state(net), left[1])
    mine = cs.ticket(network(one), levels[-1])
    training.fit(mine, images, SGD, seed=order(ticket), method=cs.Ticket(0.02))
    closest(M.state(mine), left[2])
    assert all(torch.equal(m, left[2][f"mask/{name}"].bool()) for name, m in M.read(mine).items())


def test_a_search_is_stored_with_its_learned_masks(tmp_path):
    """Density over the gated layers, a number for each layer at each reading, and a momentum for the next round."""
    row, left = train(FIRST, tmp_path)
    assert set(json.loads(row["layers"])) == set(CONVS)
    numbers = json.loads(row["numbers"])
    assert numbers.keys() == {"density", *(f"density/{name}" for name in CONVS)}
    assert len(numbers["density"]) == len(row["step"]) == 3
    assert numbers["density"][-1] == pytest.approx(row["density"], rel=1e-5)
    assert json.loads(row["certificate"])["versions"].keys() == {"training", "lth", "cs"}
    assert "optimizer/momentum_buffer/conv1.weight.s" in left
    spec = json.loads(row["spec"])["method"]
    assert (spec["is"], spec["s0"], spec["lam"]) == ("CS", 0.02, 1e-3)


def test_a_ticket_keeps_the_factor_of_its_search(tmp_path):
    train(FIRST, tmp_path)
    ticket = replace(FIRST, parent=FIRST, init="reset", rate=0.0, method=cs.Ticket(0.02))
    net = work.initialise(ticket, data.load("digits"), Store(tmp_path)).model
    theta, c = network(FIRST), 1 + 2.718281828459045**-0.02
    for name, m in M.read(net).items():
        torch.testing.assert_close(
            net.get_submodule(name).weight, c * m * theta.get_submodule(name).weight, rtol=1e-6, atol=1e-7
        )
    assert not M.mask_of(net.fc)
    assert json.loads(json.dumps(ticket.spec()))["method"] == {"is": "Ticket", "s0": 0.02, "scale": True}


def test_a_shuffled_ticket_keeps_as_many_weights_of_each_layer_at_their_own_values(tmp_path):
    train(FIRST, tmp_path)
    images, store = data.load("digits"), Store(tmp_path)
    ticket = replace(FIRST, parent=FIRST, init="rewind", rewind_to=2, rate=0.0, method=cs.Ticket(0.02))
    one, other, third = (
        work.initialise(r, images, store).model
        for r in (ticket, replace(ticket, shuffled=True), replace(ticket, shuffled=True, draw=1))
    )
    for name, m in M.read(one).items():
        shuffled = M.read(other)[name]
        assert shuffled.sum() == m.sum()
        assert not shuffled.equal(m)
        assert not shuffled.equal(M.read(third)[name])
        both = shuffled & m
        assert both.any()
        assert other.get_submodule(name).weight[both].equal(one.get_submodule(name).weight[both])
    assert M.state(one).keys() == M.state(other).keys()
    assert all(t.equal(M.state(other)[name]) for name, t in M.state(one).items())


def test_a_round_that_should_carry_momentum_needs_one(tmp_path):
    alone = replace(FIRST, method=replace(FIRST.method, carry=False))
    train(alone, tmp_path)
    with pytest.raises(ValueError, match=message("No momentum is stored with the parent")):
        work.execute([replace(FIRST, parent=alone, init="continue")], tmp_path)


# STR ------------------------------------------------------------------------------------------------------------------


def test_str_by_run_is_str_by_hand(tmp_path, double):
    run = Run(dataset="digits", recipe=dataclasses.replace(SGD, weight_decay=2e-2), method=soft_threshold.STR(-4.0))
    row, left = train(run, tmp_path)
    net = soft_threshold.attach(network(run), -4.0)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=2e-2)
    batch = Batches(data.load("digits"), SGD, order(run), torch.zeros(1))
    for t in range(12):
        opt.param_groups[0]["lr"] = 0.1 if t < 8 else 0.01
        opt.zero_grad()
        nn.functional.cross_entropy(net(batch(t)[0]), batch(t)[1]).backward()
        opt.step()
    closest(M.state(net), left)
    numbers = json.loads(row["numbers"])
    s, alpha = numbers["s/fc1"][-1], numbers["threshold/fc1"][-1]
    assert s == pytest.approx(M.tensors(net)["fc1.weight.s"].item(), rel=1e-5)
    assert alpha == pytest.approx(1 / (1 + 2.718281828459045**-s), rel=1e-4)
    assert row["density"] == pytest.approx(M.density(net))
    assert 0 < row["density"] < 1


# The loop -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blink(Method):
    """Removes other weights at every step: the first tenth, the second tenth, …; `seen` collects what it was given."""

    seen: tuple = ()

    def before_step(self, t, step):
        m = torch.ones(300 * 64, dtype=torch.bool)
        m[t * 100 : (t + 1) * 100] = False
        M.attach(step.model, {"fc1": m.view(300, 64)})
        x, y = step.batch
        self.seen[0].append((t, x.clone(), y.clone(), torch.rand((), generator=step.generator).item()))

    def reading(self, model):
        return {"first": float((~M.read(model)["fc1"]).flatten().nonzero()[0])}

    def check(self, model, before, finished):
        assert finished


def lenet(seed=0):
    return M.attach(models.create("lenet_300_100", seed=seed, in_shape=(1, 8, 8)))


def test_early_stop_is_read_under_the_masks_of_its_time():
    """lr grows until the loss does, so that the best reading is not the last, and its masks are others."""
    images, seen = data.load("digits"), ([],)
    recipe = Recipe("sgd", lr=0.5, iterations=30, eval_every=3, momentum=0.95)
    net = lenet()
    history = training.fit(net, images, recipe, method=Blink(seen))
    best = history.early_stop.step
    assert best < 30
    assert history.numbers["first"] == [100 * (t - 1) for t in history.step]
    again = lenet()
    stopped = training.fit(again, images, recipe, method=Unchecked(([],)), stop=best)
    assert stopped.last.val_loss == history.early_stop.val_loss == history.val_loss[best // 3 - 1]
    assert stopped.last.train_acc == history.early_stop.train_acc
    assert torch.equal(M.read(net)["fc1"].flatten().logical_not().nonzero()[:, 0], torch.arange(2900, 3000))


@dataclass(frozen=True)
class Unchecked(Blink):
    def check(self, model, before, finished):
        assert not finished


def test_a_step_shows_its_batch_and_draws_from_the_seed_and_the_iteration():
    images, drawn = data.load("digits"), {}
    recipe = Recipe("sgd", iterations=6, eval_every=6)
    for seed, start in ((3, 0), (3, 4), (4, 0)):
        torch.manual_seed(start)
        drawn[seed, start] = ([],)
        training.fit(lenet(), images, recipe, seed=seed, start=start, method=Blink(drawn[seed, start]))
    batch = Batches(images, recipe, 3, torch.zeros(1))
    for t, x, y, _ in drawn[3, 0][0]:
        assert torch.equal(x, batch(t)[0])
        assert torch.equal(y, batch(t)[1])
    numbers = [number for *_, number in drawn[3, 0][0]]
    assert len(set(numbers)) == 6
    assert numbers[4:] == [number for *_, number in drawn[3, 4][0]]
    assert not set(numbers) & {number for *_, number in drawn[4, 0][0]}


def test_what_was_pruned_must_stay_pruned():
    """The guard of masks that stay: it names the layer whose pruned weights came back."""
    net = lenet()
    m = {"fc2": torch.rand(100, 300) < 0.5}
    M.attach(net, m)

    class Leaks(Method):
        def before_step(self, t, step):
            M.mask_of(step.model.fc2).mask.fill_(1)

    with pytest.raises(AssertionError, match="Pruned weights of layer 'fc2' came back during training"):
        training.fit(net, data.load("digits"), Recipe(iterations=2, eval_every=2), method=Leaks())


def test_a_kept_last_batch_holds_the_rest_of_the_epoch():
    images = data.load("digits")
    n = len(images.train)
    keep = Recipe(batch_size=400, last_batch="keep")
    assert (keep.per_epoch(n), Recipe(batch_size=400).per_epoch(n)) == (3, 2)
    assert (keep.per_epoch(800), keep.per_epoch(801)) == (2, 3)
    kept, dropped = (Batches(images, r, 5, torch.zeros(1)) for r in (keep, Recipe(batch_size=400)))
    assert [len(kept(t)[1]) for t in range(6)] == [400, 400, n - 800] * 2
    everything = torch.cat([kept(t)[1] for t in range(3)])
    assert torch.equal(everything.sort()[0], images.train.y.sort()[0])
    assert torch.equal(kept(0)[0], dropped(0)[0])
    assert torch.equal(kept(3)[0], dropped(2)[0])
    two = Batches(images, keep, [5, 6], torch.zeros(1))
    assert two(2)[0].shape == (2, n - 800, 1, 8, 8)
    assert torch.equal(two(2)[1][0], kept(2)[1])


def test_readings_are_smoothed_on_request_only():
    images, losses = data.load("digits"), {}
    for smooth in (False, True):
        recipe = Recipe("sgd", lr=0.5, iterations=40, eval_every=40, label_smoothing=0.3, smooth_readings=smooth)
        net = lenet()
        history = training.fit(net, images, recipe)
        x = images.valid.x.float() / 255
        expected = nn.functional.cross_entropy(net(x), images.valid.y, label_smoothing=0.3 * smooth).item()
        assert history.val_loss[-1] == history.last.val_loss == pytest.approx(expected, rel=1e-5)
        losses[smooth] = expected
    assert losses[True] != pytest.approx(losses[False], rel=1e-2)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        stochastic.L0(lam=1e-3, layers=CONVS, rate=1000.0),
        soft_threshold.STR(-5.0, layers=CONVS),
        dynamic.GMP(density=0.3, budget="global"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_effective_weights_are_the_network_that_the_method_trained(tmp_path, method):
    """In evaluation mode a child starts as what its parent is, although its weights are plain and under a mask."""
    parent = replace(FIRST, method=method, layers=CONVS)
    store, images = Store(tmp_path), data.load("digits")
    row, left = train(parent, tmp_path)
    child = work.initialise(replace(parent, parent=parent, method=NOTHING, init="effective", rate=0.0), images, store)
    masks = {name.removeprefix("mask/"): t for name, t in left.items() if name.startswith("mask/")}
    trained = method.attach(M.attach(network(parent), masks))
    M.restore(trained, {name: t for name, t in left.items() if name.partition("/")[0] not in work.APART})
    x = images.test.x.float()
    with torch.no_grad():
        assert child.model.eval()(x).equal(trained.eval()(x))
    assert M.read(child.model).keys() == set(CONVS)
    assert M.density(M.read(child.model)) == pytest.approx(row["density"], rel=1e-5)
    assert row["density"] < 1


def test_methods_at_their_defaults_have_keys_of_their_own():
    runs = [Run(), Run(method=cs.CS()), Run(method=cs.Ticket()), Run(method=soft_threshold.STR())]
    runs += [Run(method=cs.CS(layers=("fc1",))), Run(method=cs.CS(rule="code")), Run(method=cs.CS(carry=False))]
    assert len({run.key for run in runs}) == len(runs)
    assert Run(method=NOTHING).key == Run().key
    assert json.loads(json.dumps(Run().spec()))["method"] == {}


def test_layers_are_all_that_is_pruned_and_counted(tmp_path):
    """Globally over some layers: the rate is of these, and others keep every weight and carry no mask."""
    dense = Run(
        model="resnet8", dataset="digits", options=(("width", 4),), recipe=SGD, scope="global", layers=CONVS, rate=0.25
    )
    pruned = replace(dense, parent=dense)
    row, _ = train(dense, tmp_path)
    assert row["density"] == 1
    row, left = train(pruned, tmp_path)
    counts = json.loads(row["layers"])
    total = sum(n for _, n in counts.values())
    assert tuple(counts) == CONVS
    assert sum(k for k, _ in counts.values()) == total - round(0.25 * total)
    assert len({k / n for k, n in counts.values()}) > 1
    assert {name.removeprefix("mask/") for name in left if name.startswith("mask/")} == set(CONVS)


@pytest.mark.parametrize(
    "method",
    [dynamic.GMP(0.5), dynamic.GMP(0.5, budget="global"), cs.CS(layers=CONVS), soft_threshold.STR(layers=CONVS),
     stochastic.L0(layers=CONVS)],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_a_method_prunes_the_layers_that_its_run_names(method, tmp_path):
    run = Run(model="resnet8", dataset="digits", options=(("width", 4),), recipe=SGD, layers=CONVS, method=method)
    images = work.images_of(run.dataset, run.valid, run.balanced, run.split_seed)
    given, net = work.prepare(run, images, Store(tmp_path))
    assert set(given.method.masks(net.model)) == set(CONVS)


def test_a_method_that_would_prune_other_layers_than_its_run_names_is_refused(tmp_path):
    run = Run(model="resnet8", dataset="digits", options=(("width", 4),), recipe=SGD, layers=CONVS)
    images = work.images_of(run.dataset, run.valid, run.balanced, run.split_seed)
    for method in (dynamic.DNW(0.5), cs.CS(), cs.CS(layers=CONVS[:2])):
        with pytest.raises(ValueError, match=r"^(DNW|CS) prunes conv1, .*, and not the layers of the Run"):
            work.prepare(replace(run, method=method), images, Store(tmp_path))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"method": "cs"}, "Invalid method 'cs': give one, such as lottery.cs.CS(s0=0.0)."),
        ({"balanced": 1}, "Invalid balanced 1: give True or False."),
        ({"shuffled": 1}, "Invalid shuffled 1: give True or False."),
        ({"shuffled": True}, "Invalid shuffled True: there is no mask yet, or one that is still learned."),
        ({"layers": ()}, "Invalid layers (): give a tuple of layer names, or None for all."),
    ],
)
def test_run_refuses(change, text):
    with pytest.raises(ValueError, match=message(text)):
        Run(**change)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: cs.CS(lam=-1), "Invalid lam -1: give the weight of the penalty, a number from 0."),
        (lambda: cs.CS(lam=True), "Invalid lam True: give the weight of the penalty, a number from 0."),
        (lambda: cs.CS(final="200"), "Invalid final '200': give the last inverse temperature, at least 1."),
        (lambda: cs.CS(s0=None), "Invalid s0 None: give a number near 0, at most 80 in size; lower keeps fewer"),
        (lambda: cs.CS(carry=1), "Invalid carry 1: give True or False."),
        (lambda: cs.Ticket(scale="c"), "Invalid scale 'c': give True or False."),
        (lambda: methods.densities({}), "No density: no layer is pruned; call the method's attach(model) before"),
        (lambda: cs.CS(schedule="step"), "Invalid schedule 'step': give 'epoch' or 'iteration'."),
        (lambda: cs.CS(rule="other"), "Invalid rule 'other': give 'as-described' or 'code'."),
        (lambda: cs.Ticket(99), "Invalid s0 99: give a number near 0, at most 80 in size; lower keeps fewer weights."),
        (lambda: soft_threshold.STR(g="relu"), "Invalid g 'relu': give 'sigmoid' or 'exp'."),
        (lambda: cs.Ticket().attach(lenet_without_masks()), "No mask on the model: a ticket is a mask, "
         "call lottery.masks.attach(model, masks) first."),
    ],
)  # fmt: skip
def test_methods_refuse(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


def lenet_without_masks():
    return models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))


def test_denormals_are_flushed_in_a_training_and_left_alone_outside(tmp_path):
    tiny = torch.tensor(1e-40)
    torch.set_flush_denormal(False)
    seen = ([],)

    @dataclass(frozen=True)
    class Look(Method):
        def before_step(self, t, step):
            seen[0].append((tiny * 1).item())

    with work.settings_for(1):
        training.fit(lenet(), data.load("digits"), Recipe(iterations=2, eval_every=2), method=Look())
    assert seen[0] == [0.0, 0.0]
    assert (tiny * 1).item() > 0


@pytest.mark.slow
@pytest.mark.skipif(not training.can_compile("cpu"), reason="needs a C++ compiler")
def test_a_compiled_training_is_the_plain_one(double):
    """Gates change in place under a compiled step, and the last batch of an epoch is smaller: the same to rounding."""
    trained = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = cs.attach(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)), 0.02)
        training.fit(net, data.load("digits"), SGD, seed=1, method=cs.CS(0.02, lam=1e-3), compiled=compiled)
        trained.append(M.state(net))
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=1e-9, atol=1e-9)


def test_without_a_compiler_a_sweep_trains_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "can_compile", lambda device: False)
    run = Run(dataset="digits", recipe=Recipe(iterations=2, eval_every=2))
    with pytest.warns(UserWarning, match=message("No C++ compiler is here: trained without torch.compile.")):
        experiments.run([run], store=Store(tmp_path), compiled=True, progress=False)
    [row] = load([run], Store(tmp_path)).to_dict("records")
    assert json.loads(row["certificate"])["compile"] is False


@pytest.mark.parametrize(
    ("saved", "other"),
    [
        (lambda net: cs.attach(net, -1.0), lambda net: cs.attach(net, 0.5)),
        (lambda net: cs.attach(net, -1.0), lambda net: cs.attach(net, -1.0, scale=False)),
        (lambda net: cs.Ticket(-1.0).attach(M.attach(net)), lambda net: cs.Ticket(0.5).attach(M.attach(net))),
        (lambda net: soft_threshold.attach(net, -2.0, "exp"), lambda net: soft_threshold.attach(net, -5.0)),
        (lambda net: dynamic.DNW(0.5).attach(net), lambda net: dynamic.DNW(0.2).attach(net)),
        (lambda net: stochastic.L0(zeta=1.5).attach(net), lambda net: stochastic.L0().attach(net)),
        (
            lambda net: stochastic.Supermask(s0=1.0, rescale=True).attach(net),
            lambda net: stochastic.Supermask().attach(net),
        ),
    ],
)
def test_a_state_dict_has_all_that_a_forward_takes(saved, other, tmp_path):
    """Whatever its model was attached with, and in a file of tensors alone as well; nothing is dropped in silence."""
    x, net, again = torch.randn(3, 8), saved(mlp()), other(mlp())
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.rand_like(p))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    again.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(again(x), net(x))
    with pytest.raises(RuntimeError, match="_extra_state"):
        M.attach(mlp()).load_state_dict(net.state_dict())


def test_a_state_dict_sets_the_numbers_of_a_parametrization_and_nothing_else():
    gate = cs.attach(mlp(), -1.0)[0].parametrizations.weight[0]
    c = gate.c
    said = b'{"s0": 0.5, "training": false, "forward": 1, "_parameters": {}}'
    gate.set_extra_state(torch.tensor(list(said), dtype=torch.uint8))
    assert (gate.s0, gate.scale, gate.c, gate.training) == (0.5, True, c, True)
    assert "forward" not in vars(gate)
    assert gate.s.shape == (6, 8)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def test_a_hardened_search_keeps_its_factor_in_a_state_dict():
    net, x = cs.attach(mlp(), -1.0), torch.randn(3, 8)
    for layer in (net[0], net[2]):
        nn.init.uniform_(layer.parametrizations.weight[0].s, -1, 1)
    masks = cs.harden(net)
    again = cs.Ticket(0.5).attach(M.attach(mlp(), {name: torch.ones_like(m) for name, m in masks.items()}))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
    assert cs.Ticket(-1.0).param_groups(again, SGD)
