"""lottery.own: the front door, `lottery.prune`, on one's own model and data."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import convnet, images, mlp
from torch import nn
from torch.nn.utils import parametrize, prune

import lottery
from lottery import (
    baselines,
    cs,
    dynamic,
    export,
    files,
    macs,
    own,
    soft_threshold,
    stochastic,
    tickets,
    training,
)
from lottery import masks as M
from lottery.batches import Batches, normaliser
from lottery.training import Recipe

RECIPE = Recipe(optimizer="sgd", lr=0.05, momentum=0.9, batch_size=10, iterations=8, eval_every=8, inputs="standard")
FEW = {"cs": {"trials": 3}, "str": {"trials": 3}, "synflow": {"rounds": 3}, "lth": {"rounds": 2}}
EXACT = [name for name in own.METHODS if name not in ("cs", "str")]


def message(text):
    return f"^{re.escape(text)}"


def pruned(method="snip", net=None, density=0.3, recipe=RECIPE, **options):
    net = convnet().float() if net is None else net
    return lottery.prune(
        net, images(), method, density, recipe=recipe, progress=False, **{**FEW.get(method, {}), **options}
    )


def loop(loss=F.cross_entropy):
    """A training loop of one's own, with the examples in the order in which `fit` takes them in each training."""
    calls = []

    def train(model, hook):
        calls.append(hook)
        optimizer = torch.optim.SGD(hook.groups(), lr=0.05, momentum=0.9)
        batches = Batches(images(), RECIPE, 1000 * (len(calls) - 1), next(model.parameters()))
        for t in range(hook.iterations):
            x, y = batches(t)
            hook.before_step(t, optimizer, x, y)
            optimizer.zero_grad()
            (loss(model(x), y) + hook.penalty()).backward()
            optimizer.step()

    train.calls = calls
    return train


def never(model, hook):
    raise AssertionError("a training began")


def masked(density, *layers, net=None):
    """A network with random masks of a density, on some layers or on all."""
    net = convnet().float() if net is None else net
    scores = baselines.random_scores(net, torch.Generator().manual_seed(0))
    return M.attach(net, M.top_k({n: s for n, s in scores.items() if n in (layers or scores)}, density))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("method", own.METHODS)
def test_every_method(method):
    """A plain model of the density, zeros where the masks say so; the given one is as it was."""
    net = convnet().float()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    rng = torch.get_rng_state()
    found = pruned(method, net)
    assert same(net.state_dict(), before)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in net.modules()] == [m.training for m in found.model.modules()]
    assert found.model.state_dict().keys() == before.keys()
    weights = {name: layer.weight for name, layer in M.prunable(found.model).items()}
    assert list(found.masks) == list(weights)
    assert not any(weights[name].detach()[~m].any() for name, m in found.masks.items())
    n = sum(w.numel() for w in weights.values())
    if method in EXACT:
        by_layer = method in ("gmp", "dnw", "set", "rigl", "random")
        assert abs(found.density - 0.3) * n <= (len(weights) if by_layer else 1) / 2 + 1e-9
    assert found.layers["kept"].sum() == sum(int(m.sum()) for m in found.masks.values())
    assert f"Sequential by {method}: density 0.3 asked, {found.density:.4f} got" in str(found)


def test_lth_by_hand():
    """Two rounds: train, keep √0.3 of all, back to the first values; then 0.3; then the ticket is trained."""
    net, data = convnet().float(), images()
    found = pruned("lth", net)
    by_hand = M.attach(copy.deepcopy(net))
    theta = M.state(by_hand)
    for r in range(3):
        M.restore(by_hand, theta)
        training.fit(by_hand, data, RECIPE, seed=1000 * r)
        if r < 2:
            scores = {name: layer.weight.detach().abs() for name, layer in M.prunable(by_hand).items()}
            M.attach(by_hand, M.top_k(scores, 0.3 ** ((r + 1) / 2), within=M.read(by_hand)))
    assert same(found.masks, M.read(by_hand))
    assert same(found.model.state_dict(), M.bake(by_hand).state_dict())
    assert same(found.theta, M.state(net))
    assert found.trainings == 3


def test_rewinding_starts_the_ticket_from_iteration_k():
    net = convnet().float()
    found = pruned("lth", net, rewind_to=2)
    dense = M.attach(copy.deepcopy(net))
    training.fit(dense, images(), RECIPE, seed=0, stop=2)
    assert same(found.theta, M.state(dense))


def test_magnitude_of_a_pretrained_model():
    found = pruned("magnitude", pretrained=True)
    net = convnet().float()
    assert same(found.masks, M.top_k(baselines.magnitude_scores(net), 0.3))
    assert found.trainings == 1
    assert list(found.measures) == ["as given", "pruned"]
    assert pruned("magnitude", rounds=2).trainings == 3


def test_layers_left_alone():
    net = convnet().float()
    net[4].weight.requires_grad_(False)
    found = pruned("gmp", net, skip=("0",))
    assert list(found.masks) == ["8"]
    assert found.left == {"0": "skipped", "4": "frozen"}
    assert "left alone: 4 (frozen)" in str(found)
    assert (found.model[0].weight != 0).all()
    assert torch.equal(found.model[4].weight, net[4].weight)
    for method in ("synflow", "dnw", "cs", "l0", "set", "str", "grasp", "lth", "random"):
        assert list(pruned(method, convnet().float(), skip="[04]").masks) == ["8"]


def test_masks_that_are_there_stay():
    net = masked(0.5)
    found = pruned("magnitude", net, pretrained=True)
    assert not any((m & ~M.read(net)[name]).any() for name, m in found.masks.items())
    with pytest.raises(
        ValueError, match=message("The model carries masks, cs learns its own: call lottery.masks.bake")
    ):
        pruned("cs", net)


@pytest.mark.parametrize("method", ["magnitude", "lth"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_rounds_start_from_the_density_that_is_there(method, rounds):
    """In steps of equal ratio from 0.3 to 0.1, and not from 1; also from 0.1 to 0.1."""
    seen = []
    trained = {"train": lambda model, hook: seen.append(M.density(M.read(model))), "score": lambda net: 0.0}
    pruned(method, masked(0.3), 0.1, rounds=rounds, **trained)
    assert seen == pytest.approx([0.3 * (1 / 3) ** (r / rounds) for r in range(rounds + 1)], abs=0.5 / 162)
    assert pruned(method, masked(0.1), 0.1, rounds=rounds, **trained).density == M.density(M.read(masked(0.1)))


@pytest.mark.parametrize("method", [m for m in own.METHODS if m not in ("dnw", "cs", "str", "l0")])
def test_what_masks_have_removed_is_not_asked_for(method):
    with pytest.raises(ValueError, match=message("Invalid density 0.5: the model's masks keep 49 of 162 weights alr")):
        pruned(method, masked(0.3), 0.5, train=never)


@pytest.mark.parametrize("method", ["gmp", "set", "rigl"])
def test_masks_that_move_are_on_no_layer_that_is_left_alone(method):
    text = f"Layer '4' is left alone but carries a mask, which {method} would move: call lottery.masks.bake(model)"
    with pytest.raises(ValueError, match=message(text)):
        pruned(method, masked(0.5, "4"), 0.2, skip=("4",), train=never)
    net = masked(1.0, "4")
    net[4].requires_grad_(False)
    with pytest.raises(ValueError, match=message(text)):
        pruned(method, net, 0.2, train=never)
    assert list(pruned(method, M.bake(net), 0.2, skip=("4",)).masks) == ["0", "8"]


@pytest.mark.parametrize("method", own.METHODS)
def test_a_training_loop_of_ones_own(method):
    """Three lines of a hook are enough for any method; it trains as `fit` does with the same order of examples."""
    found = pruned(method, train=(train := loop()))
    assert found.trainings == len(train.calls) > 0
    ours = pruned(method)
    if method not in ("set", "l0"):  # what these draw comes from another generator
        assert same(found.masks, ours.masks)
        for name, t in ours.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], t, rtol=1e-3, atol=1e-4)
    elif method == "set":
        assert found.density == ours.density


@pytest.mark.parametrize("own_loop", [False, True])
@pytest.mark.parametrize("method", ["l0", "dnw", "magnitude", "cs"])
def test_a_frozen_batch_norm_stays_frozen(method, own_loop):
    """A loop of one's own may end in evaluation mode; the next training begins as the first."""
    net, seen = convnet().float(), []
    net[1].eval()
    net[1].running_mean.fill_(0.3)

    def train(model, hook):
        seen.append([module.training for module in (model, model[0], model[1], model[8])])
        loop()(model, hook)
        model.eval()

    found = pruned(method, net, **({"train": train} if own_loop else {}))
    assert torch.equal(found.model[1].running_mean, net[1].running_mean)
    assert seen == [[True, True, False, True]] * (found.trainings if own_loop else 0)


def test_growth_follows_the_loss_in_a_loop_of_ones_own():
    def loss(logits, y):
        return F.mse_loss(logits, F.one_hot(y.flip(0), 5).to(logits))

    ours = pruned("rigl", loss=loss, every=2)
    assert same(pruned("rigl", loss=loss, every=2, train=loop(loss)).masks, ours.masks)
    smooth = dataclasses.replace(RECIPE, label_smoothing=0.9)
    train = loop(lambda logits, y: F.cross_entropy(logits, y, label_smoothing=0.9))
    assert same(pruned("rigl", every=2, recipe=smooth, train=train).masks, pruned("rigl", every=2, recipe=smooth).masks)


def test_temperature_by_the_epoch_in_a_loop_of_ones_own():
    options = {"schedule": "epoch", "trials": 1}
    assert same(pruned("cs", train=loop(), **options).masks, pruned("cs", **options).masks)


@pytest.mark.parametrize("method", ["cs", "str"])
@pytest.mark.parametrize("bad", [{1}, {2, 3}, {1, 2, 3, 4}])
def test_a_search_goes_on_after_a_training_that_diverged(method, bad, monkeypatch):
    fit, calls = training.fit, []

    def sometimes(*args, **options):
        calls.append(args)
        return training.History(status="diverged") if len(calls) in bad else fit(*args, **options)

    monkeypatch.setattr(training, "fit", sometimes)
    if len(bad) < 4:
        assert pruned(method, trials=4, tolerance=0.0).trainings == len(calls) == (4 if method == "str" else 5)
    else:
        with pytest.raises(own.Diverged, match=message("The training diverged: lower the learning rate, 0.05, of th")):
            pruned(method, trials=4, tolerance=0.0)
        assert len(calls) == 4


def shrunk(densities):
    """A loop of one's own that leaves a network of these densities, one after the other, to `str` or to `cs`."""
    left = iter(densities)

    def train(model, hook):
        k = round(next(left) * 162)
        for layer in M.prunable(model).values():
            on = layer.parametrizations.weight
            kept = (torch.arange(layer.weight.numel()) < k).view(layer.weight.shape)
            k = max(0, k - kept.numel())
            if hasattr(on[0], "beta"):
                hook.before_step(0, torch.optim.SGD(hook.groups(), lr=0.1))
                on[0].s.data = torch.where(kept, 1.0, -1.0)
            elif hasattr(on[0], "s"):
                on.original.data = torch.where(kept, 2.0, 0.0)

    return train


@pytest.mark.parametrize("method", ["cs", "str"])
def test_a_network_without_weights_is_near_no_density(method):
    options = {"trials": 3, "tolerance": 0.0, "train": None}
    found = pruned(method, density=0.1, **options | {"train": shrunk([0.9, 0.0, 0.9, 0.9])})
    assert found.density == pytest.approx(0.9, abs=0.01)
    found = pruned(method, density=0.1, **options | {"train": shrunk([0.0, 0.0, 0.9, 0.9])})
    assert found.density == pytest.approx(0.9, abs=0.01)
    with pytest.raises(
        ValueError, match=message("No weight is left after any of 3 trainings: allow more `trials`, or")
    ):
        pruned(method, density=0.1, **options | {"train": shrunk([0.0, 0.0, 0.0])})


@pytest.mark.parametrize("method", ["magnitude", "lth", "snip", "gmp"])
def test_a_layer_that_has_lost_all_weights_is_warned_of(method):
    net = mlp().float()
    with torch.no_grad():
        net[3].weight.mul_(1e-6)
    options = {"budget": "global"} if method == "gmp" else {}
    options["recipe"] = dataclasses.replace(RECIPE, lr=1e-6)
    with pytest.warns(UserWarning, match=r"Layer collapse: no weight is kept in .*; raise the density\.") as told:
        pruned(method, net, 0.02, **options)
    [warning] = [w for w in told if "collapse" in str(w.message)]
    assert warning.filename == __file__  # where `prune` was called, and once


@pytest.mark.parametrize("method", ["lth", "cs", "str"])
def test_a_loop_of_ones_own_that_diverged(method):
    """Before anything else is said of weights that are no numbers."""

    def train(model, hook):
        for p in model.parameters():
            p.data.fill_(float("nan"))

    with pytest.raises(own.Diverged, match=message("The training diverged: lower the learning rate of your loop.")):
        pruned(method, masked(0.5) if method == "lth" else None, train=train)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_class_without_an_example(method):
    """It is left out of the batch that is scored; the others keep their numbers."""
    data = images()
    part = data.train.y != 2
    data = dataclasses.replace(data, train=training.Split(data.train.x[part], data.train.y[part]))
    job = own._Job(convnet().float(), data, RECIPE, 0.3, ["0"])
    [(x, y)] = job.chunks(10)
    assert y.tolist() == [0] * 4 + [1] * 4 + [3] * 4 + [4] * 4
    fed = normaliser(data, RECIPE, x)(data.train.x)
    assert all(
        any(torch.equal(row, fed[i]) for i in (data.train.y == c).nonzero()[:, 0]) for row, c in zip(x, y, strict=True)
    )
    found = lottery.prune(convnet().float(), data, method, 0.3, recipe=RECIPE, progress=False)
    assert int(sum(m.sum() for m in found.masks.values())) == 49


def test_numbers_of_numpy(tmp_path):
    given = {"density": np.float32(0.25), "seed": np.int64(1), "rounds": np.int64(2)}
    found = pruned("synflow", **given)
    assert same(found.masks, pruned("synflow", density=0.25, seed=1, rounds=2).masks)
    report = json.loads((found.save(tmp_path) / "report.json").read_text())
    assert (report["asked"], report["seed"]) == (0.25, 1)
    assert pruned("magnitude", pretrained=np.bool_(True)).trainings == 1


def test_a_loss_and_a_score_of_ones_own():
    seen = []

    def loss(logits, y):
        seen.append(len(y))
        return F.multi_margin_loss(logits, y)

    found = pruned("gmp", loss=loss, score=lambda net: float(net[8].weight.numel()))
    assert seen == [10] * 8
    assert found.measures == {"as given": 30.0, "pruned": 30.0}


@pytest.mark.parametrize("method", ["gmp", "lth", "synflow"])
@pytest.mark.parametrize("outputs", [(1, nn.Identity()), (1, nn.Flatten(0)), (2, nn.Unflatten(1, (2, 1)))])
def test_a_loss_and_a_score_of_ones_own_take_what_the_model_gives(method, outputs):
    """One logit an example, such as of two classes, or an example's logits in a grid."""
    n, last = outputs
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, n), last)
    seen = []

    def loss(out, y):
        seen.append(out.shape)
        return F.binary_cross_entropy_with_logits(out.flatten(1).sum(1) if out.dim() > 1 else out, (y > 2).double())

    found = pruned(method, net.double(), loss=loss, score=lambda net: 0.5, density=0.5)
    assert found.density == 0.5
    assert {shape[1:] for shape in seen} == {net(torch.zeros(2, 16).double()).shape[1:]}


def test_a_loss_of_ones_own_of_several_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 5)

        def forward(self, x):
            h = self.body(x.flatten(1)).relu()
            return self.head(h), h

    given = {"loss": lambda out, y: F.cross_entropy(out[0], y) + out[1].mean(), "score": lambda net: 0.5}
    assert pruned("gmp", Two(), **given).measures == {"as given": 0.5, "pruned": 0.5}
    assert pruned("snip", Two(), **given).measures == {"as given": 0.5, "pruned": 0.5}
    assert pruned("grasp", Two(), **given).measures == {"as given": 0.5, "pruned": 0.5}
    with pytest.raises(ValueError, match=message("The model gives a tuple, which cannot be scored")):
        pruned("grasp", Two(), temperature=2.0, **given)  # which it would divide
    with pytest.raises(
        ValueError, match=message("The model gives a tuple, which cannot be scored: it has to give log")
    ):
        pruned("synflow", Two(), **given)


def test_a_model_that_does_not_take_the_examples_is_refused_but_with_a_loop_and_a_score_of_ones_own():
    """With these it may be fed anything."""
    net, given = nn.Sequential(nn.Linear(7, 5)), {"score": lambda net: 0.5}
    with pytest.raises(ValueError, match=message("The model does not take examples of shape (1, 4, 4), torch.float32")):
        pruned("random", net, loss=lambda out, y: out.sum(), **given)
    assert pruned("random", net, train=lambda model, hook: None, **given).measures["pruned"] == 0.5


def test_snip_scores_by_the_loss_of_ones_own():
    def loss(logits, y):
        return F.mse_loss(logits, F.one_hot(y.flip(0), 5).to(logits))

    found, net = pruned("snip", loss=loss), convnet().float()
    [batch] = own._Job(net, images(), RECIPE, 0.3, ["0"]).chunks(10)
    g = dynamic.dense_gradient(net, *batch, loss)
    by_hand = M.top_k({name: (layer.weight * g[name]).abs().detach() for name, layer in M.prunable(net).items()}, 0.3)
    assert same(found.masks, by_hand)
    assert not same(found.masks, pruned("snip").masks)
    assert same(found.masks, pruned("snip", loss=loss, train=loop(loss)).masks)


@pytest.mark.parametrize(("given", "T"), [({}, 1.0), ({"temperature": 3.0}, 3.0)])
def test_grasp_scores_by_the_loss_of_ones_own(given, T):
    def loss(out, y):
        return F.mse_loss(out, F.one_hot(y.flip(0), 5).to(out))

    found, net = pruned("grasp", loss=loss, **given), convnet().float()
    [(x, y)] = own._Job(net, images(), RECIPE, 0.3, ["0"]).chunks(10)
    layers = M.prunable(net)
    w = [layer.weight for layer in layers.values()]
    g = torch.autograd.grad(loss(net.train()(x) / T, y), w, create_graph=True)
    Hg = torch.autograd.grad(sum((v * v.detach()).sum() for v in g), w)
    by_hand = M.top_k({name: (v * h).detach() for name, v, h in zip(layers, w, Hg, strict=True)}, 0.3)
    assert same(found.masks, by_hand)
    assert not same(found.masks, pruned("grasp", temperature=T).masks)
    assert same(found.masks, pruned("grasp", loss=loss, train=loop(loss), **given).masks)


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("value", [lambda out, y: (out.argmax(1) == y).sum(), lambda out, y: out.sum(1)])
def test_a_loss_that_cannot_be_minimised_is_refused_before_anything_is_scored(method, value):
    with pytest.raises(ValueError, match=message("Invalid loss: it has to be one number, a tensor with a gradient")):
        pruned(method, loss=value, train=never)


def test_a_score_is_taken_in_evaluation_mode_and_changes_no_mode():
    """Whatever modes it sets itself: a batch norm that was frozen stays so in every training."""
    net, seen = convnet().float(), []
    net[1].eval()

    def score(net):
        seen.append([module.training for module in net.modules()])
        net.train()
        return 0.5

    modes = [module.training for module in net.modules()]
    found = pruned("lth", net, score=score)
    assert not any(map(any, seen))
    assert [module.training for module in found.model.modules()] == modes
    assert torch.equal(found.model[1].running_mean, net[1].running_mean)


@pytest.mark.parametrize("parts", ["train valid test", "train valid", "train"])
def test_what_is_measured_is_said(parts, tmp_path):
    """The accuracy is of what there is of test, validation and training set, in that order."""
    data, parts = images(), parts.split()
    none = training.Split(data.test.x[:0], data.test.y[:0])
    data = dataclasses.replace(data, **{part: none for part in ("valid", "test") if part not in parts})
    found = lottery.prune(convnet().float(), data, "random", 0.3, recipe=RECIPE, progress=False)
    what = {"test": "test", "valid": "validation", "train": "training"}[parts[-1]] + " accuracy"
    split = getattr(data, parts[-1])
    correct = training.evaluate(found.model, split, normaliser(data, RECIPE, found.model[0].weight))[1]
    assert found.measures["pruned"] == correct.float().mean().item()
    assert found.measured == json.loads((found.save(tmp_path) / "report.json").read_text())["measured"] == what
    assert f"\n{what}: " in str(found)
    scored = pruned("random", score=lambda net: 3.0)
    assert scored.measured == "score"
    assert "\nscore: 3.0000 as given, 3.0000 pruned" in str(scored)


class Viewing(nn.Module):
    """A convolutional network as it is written in many a tutorial."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().view(len(x), -1))


@pytest.mark.parametrize("augment", ["none", "flip-crop"])
@pytest.mark.parametrize("method", ["snip", "lth"])
def test_a_network_that_flattens_by_view(method, augment, tmp_path):
    x = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(RECIPE, augment=augment)
    own_loss = {"loss": lambda out, y: F.cross_entropy(out, y), "score": lambda net: 0.5}
    for more in ({}, own_loss):
        net = Viewing()
        found = lottery.prune(net, (x, torch.arange(20) % 4), method, 0.5, recipe=recipe, progress=False, **more)
        assert found.density == 0.5
        assert found.layers["MACs"].min() > 0
        assert found.model(found.example).shape == (1, 4)


@pytest.mark.parametrize("method", own.METHODS)
def test_what_is_parametrised_and_left_alone_keeps_its_parametrization(method):
    net = convnet().float()
    nn.utils.parametrizations.spectral_norm(net[4])
    keys, options = net.state_dict().keys(), {"tolerance": 0.9} if method in ("cs", "str") else {}
    found = pruned(method, net, skip=("4",), **options)
    assert found.model.state_dict().keys() == keys
    assert type(found.model[4].parametrizations.weight[0]) is type(net[4].parametrizations.weight[0])
    assert list(found.masks) == ["0", "8"]


@pytest.mark.parametrize("method", own.LEARNED)
def test_what_is_parametrised_is_refused_where_it_could_not_be_kept(method):
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 5))
    text = f"Layer '1' carries a _SpectralNorm, which {method} cannot keep: leave it alone by `skip`, or call lottery."
    with pytest.raises(ValueError, match=message(text)):
        pruned(method, nn.Sequential(nn.Flatten(), net), train=never)


class Counted(nn.Linear):
    """What quantisers do: numbers that are no tensors, in the state dict."""

    def get_extra_state(self):
        return {"bits": 8}

    def set_extra_state(self, state):
        self.given = state


def test_extra_state_that_is_no_tensor_is_told_in_the_report(tmp_path):
    net = nn.Sequential(nn.Flatten(), Counted(16, 5))
    found = pruned("random", net)
    folder = found.save(tmp_path)
    assert json.loads((folder / "report.json").read_text())["extra state"] == {"1._extra_state": "{'bits': 8}"}
    assert torch.equal(own.load(net, folder / "model.safetensors")[1].weight, found.model[1].weight)
    torch.save(found.model.state_dict(), tmp_path / "c.pt")
    assert own.load(net, tmp_path / "c.pt")[1].given == {"bits": 8}


def test_extra_state_that_is_a_tensor_is_loaded_again(tmp_path):
    class Scaled(Counted):
        def get_extra_state(self):
            return torch.tensor([8])

    net = nn.Sequential(nn.Flatten(), Scaled(16, 5))
    pruned("random", net).save(tmp_path)
    assert "extra state" not in json.loads((tmp_path / "report.json").read_text())
    assert own.load(net, tmp_path / "model.safetensors")[1].given == torch.tensor([8])


class Beside(nn.Module):
    """A network beside which there are other parameters, the first of the model."""

    def __init__(self, *others):
        super().__init__()
        self.others = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in others)
        self.net = convnet().float()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", ["lth", "snip", "rigl"])
def test_a_first_parameter_of_integers_or_complex_numbers_says_nothing_of_the_examples(method, tmp_path):
    net = Beside(torch.arange(3), torch.zeros(2, dtype=torch.complex64))
    found = pruned(method, net)
    assert same(found.model.net.state_dict(), pruned(method).model.state_dict())
    found.save(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_complex_parameters_are_trained(optimizer):
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase, self.fc = nn.Parameter(torch.ones(16, dtype=torch.complex64)), nn.Linear(16, 5)

        def forward(self, x):
            return self.fc((x.flatten(1) * self.phase).real)

    net = Wave()
    recipe = dataclasses.replace(RECIPE, optimizer=optimizer, momentum=0.0)
    found = pruned("gmp", net, recipe=recipe)
    assert found.density == pytest.approx(0.3)
    assert not torch.equal(found.model.phase, net.phase)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_weights_is_not_pruned():
    class Wide(nn.Module):
        def __init__(self, extra=0):
            super().__init__()
            self.extra, self.body, self.head = nn.Linear(extra, 8), nn.Linear(16, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.body(x).relu() + self.extra(x[:, :0]))

    for method in own.METHODS:
        options = {"tolerance": 0.9} if method in ("cs", "str") else {}
        if method != "synflow":
            found = pruned(method, Wide(), **options)
            assert list(found.masks) == ["body", "head"]
            assert "left alone" not in str(found)
    with pytest.raises(ValueError, match=message("Nothing prunable: the weights of 0 are empty.")):
        M.attach(nn.Sequential(nn.Linear(0, 5)))


def test_a_loop_of_ones_own_that_ends_early():
    def train(model, hook):
        optimizer = torch.optim.SGD(hook.groups(), lr=0.01)
        for t in range(hook.iterations // 2):
            hook.before_step(t, optimizer)

    with pytest.raises(
        ValueError, match=r"were asked for\. Your loop has to call hook\.before_step before each of its 8"
    ):
        pruned("gmp", train=train)


@pytest.mark.parametrize("method", ["gmp", "set", "rigl", "cs", "l0"])
def test_a_loop_of_ones_own_that_leaves_the_hook_alone(method):
    """What would have moved has not: random masks would come as RigL's. (`shrunk`: thresholds need no hook.)"""
    with pytest.raises(
        ValueError, match=r"of a step\. Your loop has to call hook\.before_step before each of its 8 steps"
    ):
        pruned(method, train=lambda model, hook: None)


def test_growth_by_gradients_needs_the_minibatch():
    def train(model, hook):
        hook.before_step(1, torch.optim.SGD(hook.groups(), lr=0.01))

    with pytest.raises(
        ValueError, match=message("RigL grows by the gradient of a minibatch: call hook.before_step(t, ")
    ):
        pruned("rigl", train=train)


def test_default_recipe():
    recipe = own.default_recipe(images())
    assert (recipe.batch_size, recipe.iterations, recipe.inputs) == (20, 10, "standard")
    assert pruned(recipe=None).trainings == 1


def test_same_seed_same_result():
    torch.manual_seed(1)
    first = pruned("set", seed=3)
    torch.manual_seed(2)
    assert same(first.model.state_dict(), pruned("set", seed=3).model.state_dict())
    assert not same(first.masks, pruned("set", seed=4).masks)


@pytest.mark.parametrize("method", ["magnitude", "grasp"])
def test_the_seed_decides_where_there_is_dropout(method):
    net, found = convnet(dropout=0.5).float(), []
    for state, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(state)
        found.append(pruned(method, net, seed=seed).model.state_dict())
        assert torch.initial_seed() == state
    assert same(found[0], found[1])
    assert not same(found[1], found[2])


def test_pruning_within_no_grad():
    with torch.no_grad():
        found = pruned("grasp")
    assert same(found.model.state_dict(), pruned("grasp").model.state_dict())


@pytest.mark.parametrize("method", ["magnitude", "lth", "snip"])
def test_a_buffer_that_is_an_expanded_view(method):
    """Nothing can be copied into one, as going back to the early stop does."""
    net, plain = convnet().float(), convnet().float()
    net.register_buffer("scale", torch.ones(1, 1).expand(4, 8))
    assert same(M.state(pruned(method, net).model), {"scale": torch.ones(4, 8)} | M.state(pruned(method, plain).model))
    assert net.scale.stride() == (0, 0)
    own.load(net, net.state_dict())


# Files ----------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, json, numpy as np, onnxruntime
from safetensors.numpy import load_file
folder, zeros = sys.argv[1], 0
weights = load_file(folder + "/model.safetensors")
x = np.load(folder + "/x.npy")
[logits] = onnxruntime.InferenceSession(folder + "/model.onnx").run(None, {"x": x})
assert not {"lottery", "torch"} & set(sys.modules)
print(json.dumps([sum(int((w != 0).sum()) for n, w in weights.items() if w.ndim > 1), logits.tolist()]))
"""


@pytest.mark.slow
def test_saved_and_exported_files_need_neither_lottery_nor_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = pruned("gmp")
    found.save(tmp_path)
    found.export(tmp_path / "model.onnx")
    x = images().test.x[:7]  # a batch of another size, pixels as they are
    np.save(tmp_path / "x.npy", x.numpy())
    out = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], capture_output=True, text=True, check=True).stdout
    kept, logits = json.loads(out)
    assert kept == sum(int(m.sum()) for m in found.masks.values())
    net = found.model.eval()
    ours = net(normaliser(found.data, RECIPE, net[0].weight)(x))
    torch.testing.assert_close(torch.tensor(logits), ours.detach(), rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "gmp"
    assert report["density"] == found.density
    assert {name: row["kept"] for name, row in report["layers"].items()} == {
        n: int(m.sum()) for n, m in found.masks.items()
    }


def test_ticket_of_ones_own_model(tmp_path):
    net = convnet().float()
    found = pruned("lth", net)
    found.save(tmp_path)
    path = tmp_path / "ticket.safetensors"
    ticket = tickets.load(path, model=net)
    assert same(ticket.masks, found.masks)
    assert same(ticket.theta, M.state(net))
    again = ticket.model(net)
    assert same(M.read(again), found.masks)
    with pytest.raises(
        ValueError, match=message(f"{path} is the ticket of a Sequential of one's own: give load(path, mo")
    ):
        tickets.load(path)
    with pytest.raises(
        ValueError, match=message(f"{path} is no ticket, or none that fits Sequential: give a file that")
    ):
        tickets.load(path, model=mlp().float())


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_into_is_told(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(files.CannotWrite, match=message(f"Cannot write {tmp_path / name / 'model.safetensors'}: ")):
        pruned().save(tmp_path / name)


def test_files_in_the_home_folder(tmp_path, monkeypatch):
    """`~` stands for it wherever a path is given; a folder that is called like a user who is not there is a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = pruned()
    for folder in ("~/made", "~nobody-of-that-name"):
        found.save(folder)
        own.load(convnet().float(), f"{folder}/model.safetensors")
        assert tickets.load(f"{folder}/ticket.safetensors", convnet().float()).density == found.density
        tickets.save(found.ticket(), f"{folder}/again.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"made", "~nobody-of-that-name"}


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError(""), KeyError("shape")])
def test_a_model_that_takes_no_single_example_is_saved_and_printed(error, tmp_path):
    """Its products cannot be counted; whatever it raises, what was trained is not lost."""

    class Pairs(nn.Sequential):
        def forward(self, x):
            if len(x) == 1:
                raise error
            return super().forward(x)

    found = pruned("gmp", Pairs(nn.Flatten(), nn.Linear(16, 5)))
    assert "MACs of these layers" not in str(found)
    assert json.loads((found.save(tmp_path) / "report.json").read_text())["layers"]["1"]["MACs"] is None
    with pytest.raises(
        ValueError, match=r"^Invalid input_shape \(1, 4, 4\): .*, a tensor with a batch of one \([^\n]+\)\.$"
    ):
        macs.count(found.model, (1, 4, 4))


def test_what_is_saved_is_whole(tmp_path, monkeypatch):
    """A second save that is stopped leaves the first, or no report; nothing else stays behind."""
    found, other = pruned("gmp"), pruned("gmp", density=0.5)
    found.save(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"model.safetensors", "report.json", "ticket.safetensors"}

    def full(ticket, path):
        raise files.CannotWrite(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(tickets, "save", full)
        with pytest.raises(files.CannotWrite):
            other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first

    def killed(mine, path, publish=files.publish):
        if path == tmp_path / "ticket.safetensors":
            raise KeyboardInterrupt
        return publish(mine, path)

    with monkeypatch.context() as patch:
        patch.setattr(own, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "ticket.safetensors"}
    other.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["density"] == other.density
    assert same(own.load(convnet().float(), tmp_path / "model.safetensors").state_dict(), other.model.state_dict())


def test_export_is_refused_when_onnxruntime_disagrees(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Other:
        def __init__(self, *_, **__):
            self.run = lambda _, inputs: [np.zeros((4, 2), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Other)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    (tmp_path / "m.onnx").write_bytes(b"an older one")
    with pytest.raises(RuntimeError, match=message("onnxruntime computes logits that differ by up to ")):
        export.onnx(nn.Linear(3, 2), torch.randn(4, 3), tmp_path / "m.onnx")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older one"]


@pytest.mark.parametrize("inputs", ["unit", "standard"])
def test_the_exported_normalisation_is_the_recipes(inputs):
    recipe = dataclasses.replace(RECIPE, inputs=inputs)
    found = pruned("snip", recipe=recipe)
    like, x = found.model[0].weight, images().test.x
    fed = normaliser(images(), recipe, like)(x)
    torch.testing.assert_close(export.Inputs(found.data, found.model, inputs)(x), fed)
    torch.testing.assert_close(found.example, normaliser(images(), recipe, like)(images().train.x[:1]))
    job = own._Job(convnet().float(), images(), recipe, 0.3, ["0"])
    [(scored, y)] = job.chunks(2)
    assert len(y) == 10
    assert (scored.max() <= 1) == (inputs == "unit")
    every = normaliser(images(), recipe, like)(images().train.x)
    assert all(any(torch.allclose(row, other) for other in every) for row in scored)


def test_sparse_copy_computes_the_same():
    found = pruned("gmp", mlp().float())
    fast = export.sparse(found.model)
    assert [type(module).__name__ for module in fast[1::2]] == ["SparseLinear"] * 3
    x = torch.randn(3, 16)
    torch.testing.assert_close(fast(x), found.model.eval()(x))
    assert type(export.sparse(found.model, below=0.2)[1]) is nn.Linear
    times = export.seconds({"dense": found.model, "CSR": fast}, x, repeats=3)
    assert all(t > 0 for t in times.values())


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_checkpoint_of_torch_prune(tmp_path):
    from torch.nn.utils import prune

    source = convnet(seed=1).float()
    prune.l1_unstructured(source[4], "weight", 0.5)
    prune.l1_unstructured(source[8], "bias", 2)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "c.pt")
    net = own.load(convnet().float(), tmp_path / "c.pt")
    assert same(M.read(net), {"4": source[4].weight_mask.bool()})
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(net.eval()(x), source.eval()(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_checkpoint_of_a_wrapped_model(prefix):
    """As DataParallel, DistributedDataParallel and torch.compile name what they wrap."""
    source = convnet(seed=1).float()
    net = own.load(convnet().float(), {prefix + name: t for name, t in source.state_dict().items()})
    assert same(net.state_dict(), source.state_dict())
    assert next(iter(nn.DataParallel(source).state_dict())) == "module.0.weight"


def test_checkpoint_of_a_masked_model_and_of_safetensors(tmp_path):
    from safetensors.torch import save_file

    source = M.attach(convnet(seed=1).float())
    M.attach(source, M.top_k(baselines.magnitude_scores(source), 0.3))
    net = own.load(convnet().float(), source.state_dict())
    assert same(M.state(net), M.state(source))
    assert same(M.read(net), M.read(source))
    save_file(M.state(source), tmp_path / "c.safetensors")
    assert same(M.state(own.load(convnet().float(), tmp_path / "c.safetensors")), M.state(source))


class Named(nn.Module):
    """What it has is called as masks and wrappers are, or is in no state dict; weights are tied."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.module, self.embed, self.norm = nn.Linear(4, 4), nn.Embedding(5, 4), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.hooked = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("attn_mask", torch.rand(4))
        self.register_buffer("pos", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.hooked(self.module(x.flatten(1)[:, :4] + self.pos * self.attn_mask))))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_checkpoint_of_a_model_with_any_names(prefix, tmp_path):
    from torch.nn.utils import prune

    source = Named(1)
    state = {prefix + name: t for name, t in source.state_dict().items()}
    net = own.load(Named(), state)
    assert same(net.state_dict(), source.state_dict())
    assert net.head.weight is net.embed.weight
    assert same(M.state(own.load(M.attach(Named()), state)), M.state(source))
    M.attach(source, M.top_k(baselines.magnitude_scores(source), 0.3))
    net = own.load(Named(), {prefix + name: t for name, t in source.state_dict().items()})
    assert same(M.read(net), M.read(source))
    assert same(M.state(net), M.state(source))
    source = Named(2)
    prune.l1_unstructured(source.module, "weight", 0.5)
    prune.l1_unstructured(source.norm, "weight", 2)
    net = own.load(Named(), {prefix + name: t for name, t in source.state_dict().items()})
    assert same(M.read(net), {"module": source.module.weight_mask.bool()})
    assert torch.equal(net.norm.weight, source.norm.weight)
    with pytest.raises(ValueError, match=message("Unknown names in state: padding_mask; the model has ")):
        own.load(Named(), state | {prefix + "padding_mask": torch.ones(4)})


@pytest.mark.parametrize(
    ("attach", "name"),
    [
        (cs.attach, "Gate"),
        (lambda net: cs.Ticket(0.3).attach(M.attach(net)), "Scale"),
        (lambda net: soft_threshold.attach(net, -5.0), "SoftThreshold"),
        (lambda net: stochastic.L0().attach(net), "HardConcrete"),
        (lambda net: dynamic.DNW(0.5).attach(net), "TopK"),
    ],
)
def test_numbers_that_no_state_dict_holds_are_not_lost_in_silence(attach, name):
    net = attach(convnet())
    with pytest.raises(ValueError, match=message(f"Layer '0' carries a {name}, of which a state dict does not hold")):
        own.load(net, net.state_dict())
    own.load(convnet(), M.bake(net).state_dict())


def test_checkpoint_of_one_layer():
    source = masked(0.5, net=nn.Linear(4, 3))
    net = own.load(nn.Linear(4, 3), source.state_dict())
    assert same(M.read(net), M.read(source))
    assert torch.equal(net.weight, source.weight)


def test_what_is_saved_is_loaded_again(tmp_path):
    found = pruned("random", Named(), recipe=dataclasses.replace(RECIPE, inputs="unit"))
    net = own.load(Named(1), found.save(tmp_path) / "model.safetensors")
    assert same(net.state_dict(), found.model.state_dict())
    assert "pos" not in found.model.state_dict()


def test_bad_checkpoints(tmp_path):
    net = mlp()
    with pytest.raises(ValueError, match=message("Names missing in state: 1.bias")):
        own.load(net, {"1.weight": torch.zeros(12, 16)})
    with pytest.raises(ValueError, match=message("Invalid checkpoint: give a state dict, names and tensors")):
        own.load(net, {"epoch": 3})
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=message(f"{tmp_path / 'whole.pt'} is no checkpoint of tensors alone")):
        own.load(net, tmp_path / "whole.pt")
    for content in (b"", b"text"):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{tmp_path / 'cut.pt'} is no checkpoint of tensors alone: [^\x1b\n]*\.$"
        ) as no:
            own.load(net, tmp_path / "cut.pt")
        assert "set to `False`" not in str(no.value)
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=message(f"{tmp_path / 'cut.safetensors'} is no checkpoint of tensors alone")):
        own.load(net, tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=message(f"No checkpoint at {tmp_path / 'none.pt'}.")):
        own.load(net, tmp_path / "none.pt")


# What is refused ------------------------------------------------------------------------------------------------------


class Locked(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pruned("magic"), "Unknown method 'magic': choose one of magnitude, lth, random, snip, grasp, synflow"),
        (lambda: pruned("snip", rounds=3), "Unknown option 'rounds' of snip: it takes per_class."),
        (lambda: pruned("random", rounds=3), "Unknown option 'rounds' of random: it takes none."),
        (lambda: pruned(seed=1.5), "Invalid seed 1.5: give a whole number of at most 64 bits."),
        (
            lambda: pruned("set", density=1.0),
            "Invalid density 1.0: set prunes while it trains; give a fraction below 1.",
        ),
        (lambda: pruned("str", density=1), "Invalid density 1.0: str prunes while it trains; give a fraction below 1."),
        (
            lambda: pruned("set", recipe=dataclasses.replace(RECIPE, batch_size=1000)),
            "Invalid batch_size 1000: the training set has 20 images.",
        ),
        (
            lambda: lottery.prune(convnet(), dataclasses.replace(images(), train=training.Split(*torch.ones(2, 0)))),
            "Invalid data: there is nothing to train on.",
        ),
        (
            lambda: lottery.prune(convnet(), images(), ["lth"]),
            "Unknown method ['lth']: choose one of magnitude, lth, random, snip, grasp, synflow",
        ),
        (lambda: pruned(recipe={"lr": 0.1}), "Invalid recipe of type dict: give a lottery.training.Recipe, or None."),
        (lambda: pruned(net=nn.Linear), "Invalid model of type type: give a torch.nn.Module, not its class or state."),
        (lambda: pruned("gmp", net={}), "Invalid model of type dict: give a torch.nn.Module, not its class or state."),
        (
            lambda: lottery.prune(convnet(), {"x": 1, "y": 2}),
            "Invalid data of type dict: give (x, y), a dataset, a fold",
        ),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), loss=F.mse_loss),
            "The model gives shape (2, 1) for two examples, the data have 5 classes: it has to give [2, 5], or give a ",
        ),
        (lambda: pruned(density="0.3"), "Invalid density '0.3': give a fraction of weights to keep"),
        (lambda: pruned("gmp", density=0), "Invalid density 0: give a fraction of weights to keep"),
        (lambda: pruned(density=1e-6), "Density 1e-06 keeps none of the 162 weights of the model"),
        (lambda: pruned(skip=("9",)), "Unknown layer '9' in skip: the model has 0, 4, 8."),
        (lambda: pruned(skip="*"), "Nothing prunable in Sequential (0: skipped; 4: skipped; 8: skipped)."),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten())),
            "Nothing prunable in Sequential (it has no Linear or Conv layer).",
        ),
        (lambda: pruned("lth", rounds=0), "Invalid rounds 0: give a whole number from 1."),
        (lambda: pruned("lth", rounds=True), "Invalid rounds True: give a whole number."),
        (lambda: pruned("lth", rewind_to=1.5), "Invalid rewind_to 1.5: give a whole number."),
        (lambda: pruned("magnitude", pretrained="maybe"), "Invalid pretrained 'maybe': give true or false."),
        (lambda: pruned("cs", trials=0), "Invalid trials 0: give a whole number from 1."),
        (lambda: pruned("str", trials=0), "Invalid trials 0: give a whole number from 1."),
        (lambda: pruned("cs", tolerance=-1), "Invalid tolerance -1: give a relative difference in density, 0 <= "),
        (lambda: pruned("str", tolerance=1), "Invalid tolerance 1: give a relative difference in density, 0 <= "),
        (lambda: pruned("cs", final="high"), "Invalid final 'high': give a number."),
        (lambda: pruned("str", freeze="late"), "Invalid freeze 'late': give a number."),
        (lambda: pruned("l0", lam="some"), "Invalid lam 'some': give a number."),
        (lambda: pruned("gmp", budget=3), "Invalid budget 3: give a word."),
        (lambda: pruned("dnw", budget="even"), "Invalid budget 'even': give one of uniform, erk."),
        (lambda: pruned("lth", rewind_to=8), "Invalid rewind_to 8: give 0 <= iteration < 8"),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(16, 3))),
            "The model gives shape (2, 3) for two examples, the data have 5 classes: it has to give [2, 5]",
        ),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(9, 5))),
            "The model does not take examples of shape (1, 4, 4), torch.float32: ",
        ),
        (
            lambda: pruned("str", recipe=dataclasses.replace(RECIPE, optimizer="adam", momentum=0.0)),
            "Invalid optimizer 'adam' with str: its thresholds need weight decay by 'sgd'.",
        ),
        (
            lambda: pruned(net=mlp().float(), recipe=dataclasses.replace(RECIPE, lr=1e30)),
            "The training diverged: lower the learning rate, 1e+30, of the recipe.",
        ),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.LazyLinear(5))),
            "Invalid model: '1.weight' is lazy, without a",
        ),
        (lambda: pruned(net=mlp().to("meta")), "Invalid model: '1.weight' is on the meta device, without values"),
        (lambda: pruned(net=Locked(nn.Flatten(), nn.Linear(16, 5))), "The model cannot be copied (cannot pickle"),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(16, 5, dtype=torch.complex64))),
            "Invalid model: it has no parameter of floating-point numbers (torch.complex64), in whose dtype it would",
        ),
    ],
)
def test_refused_in_one_line(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


def test_options_of_a_method():
    found = pruned("gmp", budget="erk", every=2)
    assert {n: int(m.sum()) for n, m in found.masks.items()} == dynamic.GMP(0.3, "erk").kept(M.attach(convnet()), 1.0)


def test_plot():
    figure = pruned().plot()
    assert [bar.get_width() for bar in figure.axes[0].patches] == list(pruned().layers["density"][::-1])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"train": 3}, "Invalid train 3: give a function, or None."),
        ({"loss": "mse"}, "Invalid loss 'mse': give a function, or None."),
        ({"score": "accuracy"}, "Invalid score 'accuracy': give a function, or None."),
        ({"score": lambda net: None}, "Invalid score: it has to give a number (float() argument must be"),
    ],
)
def test_functions_of_another_kind_are_refused_before_any_training(given, text):
    with pytest.raises(ValueError, match=message(text)):
        pruned("lth", **given)


def test_a_model_that_has_diverged_is_refused_before_any_training():
    net = mlp()
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=message("Invalid model: NaN in '1.weight'; give one that has not diverged.")):
        pruned("magnitude", net, train=never)


def test_a_layer_to_skip_may_be_a_number():
    net = mlp()
    assert pruned("random", net, skip=1).left == pruned("random", net, skip="1").left == {"1": "skipped"}
    assert pruned("random", net, skip=None).left == {}


def test_the_given_model_stays_whole_where_a_bias_is_parametrised():
    net = mlp()
    parametrize.register_parametrization(net[1], "bias", nn.Tanh())
    x = images().train.x.double()
    before = net(x)
    pruned("random", net)
    assert torch.equal(net(x), before)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_is_refused():
    with pytest.raises(ValueError, match=message("Nothing prunable in RecursiveScriptModule (1.weight: Recursive")):
        pruned("random", torch.jit.script(mlp()))


@pytest.mark.parametrize("spoil", [lambda mask: mask[:3], lambda mask: mask * 0.5, lambda mask: mask * torch.nan])
def test_a_bad_mask_in_a_checkpoint_is_refused_before_anything_changes(spoil):
    source, net = mlp(1), mlp(2)
    prune.l1_unstructured(source[1], "weight", 0.5)
    state, before = source.state_dict(), copy.deepcopy(net.state_dict())
    state["1.weight_mask"] = spoil(state["1.weight_mask"])
    with pytest.raises(ValueError, match=message("Invalid mask ")):
        own.load(net, state)
    assert same(net.state_dict(), before)


def test_a_model_is_exported_into_a_folder_that_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=message(f"No folder {tmp_path / 'none'}: make it first, or name ")):
        pruned("random").export(tmp_path / "none" / "model.onnx")
