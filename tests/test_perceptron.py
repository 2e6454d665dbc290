"""The fast step of fully connected networks is the general one: same losses, same weights, same predictions."""

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lottery import cs, data, models, perceptron, training
from lottery import masks as M
from lottery.batches import Batches, normaliser
from lottery.training import Recipe, fit

SHORT = Recipe(iterations=100, eval_every=50, test_readings="all")
RECIPES = {
    "adam": {},
    "adam with decay": {"weight_decay": 0.01},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "momentum, milestone, warmup": {
        "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "milestones": (40, 70), "warmup": 10
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def lenet(density=1.0, dtype=torch.float64, masked=True):
    model = models.create("lenet_300_100", seed=1, in_shape=(1, 8, 8)).to(dtype)
    scores = {name: torch.rand(layer.weight.shape) for name, layer in M.prunable(model).items()}
    return M.attach(model, M.top_k(scores, density)) if masked else model


def both(model, digits, recipe, **options):
    """(history, model) of the fast way and of the general way."""
    results = []
    for opt in (lambda m: None, lambda m: training.optimizer(m, recipe)):
        mine = copy.deepcopy(model)
        assert perceptron.layers(mine)
        results.append((fit(mine, digits, recipe, seed=3, opt=opt(mine), **options), mine))
    return results


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_float64_trajectories_are_the_general_ones(digits, recipe, density):
    torch.manual_seed(0)
    model, recipe = lenet(density), dataclasses.replace(SHORT, **recipe)
    (fast, a), (general, b) = both(model, digits, recipe)
    for name, layer in M.prunable(a).items():
        torch.testing.assert_close(layer.weight, M.prunable(b)[name].weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.bias, M.prunable(b)[name].bias, rtol=0, atol=1e-10)
    assert fast.val_loss == pytest.approx(general.val_loss, abs=1e-10)
    assert fast.test_acc == general.test_acc
    assert fast.train_loss == pytest.approx(general.train_loss, abs=1e-10)
    assert fast.early_stop.step == general.early_stop.step


@pytest.mark.parametrize("density", [1.0, 0.05])
def test_float32_stays_close_for_a_hundred_steps(digits, density):
    torch.manual_seed(0)
    recipe = dataclasses.replace(SHORT, iterations=100)
    (fast, a), (general, b) = both(lenet(density, torch.float32), digits, recipe)
    for x, y in zip(M.state(a).values(), M.state(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-4)
    assert fast.val_loss == pytest.approx(general.val_loss, abs=1e-4)


def test_what_lies_behind_the_mask_stays(digits):
    model = lenet(0.1)
    before, masks = M.state(model), M.read(model)
    fit(model, digits, SHORT)
    for name, mask in masks.items():
        after = M.state(model)[f"{name}.weight"]
        assert torch.equal(after[~mask], before[f"{name}.weight"][~mask])
        assert (after[mask] != before[f"{name}.weight"][mask]).any()


def test_a_model_without_masks_and_one_with_a_mask_on_one_layer(digits):
    for model in (lenet(masked=False), M.attach(lenet(masked=False), {"fc2": torch.rand(100, 300) < 0.5})):
        (_, a), (_, b) = both(model, digits, dataclasses.replace(SHORT, iterations=20))
        for x, y in zip(M.state(a).values(), M.state(b).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_models(digits, dtype):
    model = lenet(0.3, dtype)
    x = normaliser(digits, SHORT, torch.zeros(1, dtype=dtype))(digits.test.x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(perceptron.forward(model)(x), model(x).detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_population_is_its_members_one_by_one(digits, recipe):
    torch.manual_seed(0)
    nets, recipe = [lenet(density) for density in (1.0, 0.5, 0.05)], dataclasses.replace(SHORT, **recipe)
    alone = [copy.deepcopy(net) for net in nets]
    behind = M.state(nets[2])
    many = perceptron.Population(nets, recipe, training._build)
    one_by_one = [perceptron.Step(net, recipe, training._build) for net in alone]
    batches = [Batches(digits, recipe, seed, many.theta) for seed in range(3)]
    for t in range(100):
        each = [batch(t) for batch in batches]
        losses = many(*(torch.stack(part) for part in zip(*each, strict=True)))
        for loss, step, (x, y) in zip(losses, one_by_one, each, strict=True):
            assert float(loss) == pytest.approx(float(step(x, y)), abs=1e-10)
    for k, (net, step) in enumerate(zip(nets, one_by_one, strict=True)):
        many.sync(k)
        step.sync()
        for a, b in zip(M.state(net).values(), M.state(alone[k]).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for name, mask in M.read(nets[2]).items():
        assert torch.equal(M.state(nets[2])[f"{name}.weight"][~mask], behind[f"{name}.weight"][~mask])


def test_fit_of_a_population_is_fit_of_each(digits):
    torch.manual_seed(0)
    nets = [lenet(density) for density in (1.0, 0.05)]
    broken = lenet()
    with torch.no_grad():
        broken.fc1.bias.fill_(float("inf"))  # no loss is finite
    alone = [copy.deepcopy(net) for net in (nets[0], broken, nets[1])]
    histories = fit([nets[0], broken, nets[1]], digits, dataclasses.replace(SHORT, eval_every=20), seed=[5, 6, 7])
    for k, (net, history) in enumerate(zip([nets[0], broken, nets[1]], histories, strict=True)):
        single = fit(alone[k], digits, dataclasses.replace(SHORT, eval_every=20), seed=5 + k)
        assert history.status == single.status == ("diverged" if net is broken else "finished")
        for name in ("step", "val_acc", "test_acc"):
            assert getattr(history, name) == getattr(single, name)
        for name in ("val_loss", "test_loss", "batch_loss", "train_loss"):
            assert getattr(history, name) == pytest.approx(getattr(single, name), abs=1e-9, nan_ok=True)
        if net is not broken:
            assert history.early_stop.step == single.early_stop.step
            assert history.last.train_loss == pytest.approx(single.last.train_loss, abs=1e-9)
            assert (history.last.correct == single.last.correct).all()
            for a, b in zip(M.state(net).values(), M.state(alone[k]).values(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_models_that_cannot_be_trained_together_are_refused(digits):
    wide = models.create("lenet_300_100", in_shape=(1, 8, 8)), models.create("lenet_300_100", in_shape=(1, 9, 9))
    for nets, seeds in ((wide, [0, 1]), ([nn.Linear(64, 10)], [0])):
        with pytest.raises(ValueError, match="cannot be trained together"):
            fit(list(nets), digits, SHORT, seed=seeds)


@pytest.mark.parametrize("masked", [True, False])
def test_pixels_that_are_black_everywhere_are_left_out_and_their_weights_stay(digits, masked, monkeypatch):
    torch.manual_seed(0)
    black = [0, 7, 8, 63]
    parts = {}
    for name in ("train", "valid", "test"):
        x = getattr(digits, name).x.clone()
        x.flatten(1)[:, black] = 0
        parts[name] = dataclasses.replace(getattr(digits, name), x=x)
    dark = dataclasses.replace(digits, **parts)
    model = lenet(0.5, masked=masked)
    before, sizes, step = M.state(model), [], perceptron.Step.__init__
    monkeypatch.setattr(
        perceptron.Step, "__init__", lambda *a: sizes.append(perceptron.layers(a[1])[0].in_features) or step(*a)
    )
    (fast, a), (general, b) = both(model, dark, SHORT)
    assert sizes[0] <= 60, "the fast way still reads black pixels"
    assert fast.val_loss == pytest.approx(general.val_loss, abs=1e-10)
    assert fast.test_acc == general.test_acc
    for x, y in zip(M.state(a).values(), M.state(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert torch.equal(M.state(a)["fc1.weight"][:, black], before["fc1.weight"][:, black])
    sizes.clear()
    fit(copy.deepcopy(model), dark, dataclasses.replace(SHORT, iterations=1, weight_decay=0.1))
    fit(copy.deepcopy(model), dark, dataclasses.replace(SHORT, iterations=1, inputs="standard"))
    assert sizes == [64, 64], "decay moves every weight, and standardised black is not 0"


def small(*modules):
    return nn.Sequential(nn.Flatten(), *(modules or (nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))


def changed(change, masked=True):
    """A small network of the plain form after a change to it."""
    model = M.attach(small()) if masked else small()
    assert perceptron.trainable([model], (1, 2, 2))
    change(model)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Half(M.Mask):
    def forward(self, weight):
        return weight * self.mask / 2


def other_networks():
    a, b = nn.Linear(4, 4), nn.Linear(4, 2)
    tied, overlapping = small(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), small()
    tied[3].weight = tied[1].weight
    overlapping[3].bias = nn.Parameter(overlapping[1].bias.detach()[:2])
    return {
        "convolutions": models.create("conv2"),
        "another activation": small(a, nn.Tanh(), b),
        "no bias": small(nn.Linear(4, 4, bias=False), nn.ReLU(), b),
        "dropout": small(a, nn.ReLU(), nn.Dropout(), b),
        "one layer": small(b),
        "ends with ReLU": small(a, nn.ReLU(), b, nn.ReLU()),
        "a layer used twice": small(a, nn.ReLU(), a),
        "a tensor used twice": tied,
        "tensors that overlap": overlapping,
        "sizes that do not follow on each other": small(nn.Linear(4, 3), nn.ReLU(), b),
        "gates of Continuous Sparsification": cs.attach(lenet(masked=False), 0.0),
        "half precision": lenet(dtype=torch.bfloat16),
        "two dtypes": small(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2).double()),
        "two devices": small(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2, device="meta")),
        "not a Sequential": nn.Linear(4, 4),
        "a subclass of Sequential": type("Net", (nn.Sequential,), {})(nn.Flatten(), a, nn.ReLU(), b),
        "a subclass of Linear": small(Doubled(4, 4), nn.ReLU(), b),
        "a masked subclass of Linear": M.attach(small(Doubled(4, 4), nn.ReLU(), nn.Linear(4, 2))),
        "a subclass of ReLU": small(a, type("Other", (nn.ReLU,), {})(), b),
        "nothing that flattens": nn.Sequential(a, nn.ReLU(), b),
        "flattened otherwise": nn.Sequential(nn.Flatten(2), a, nn.ReLU(), b),
    }


def halve(layer):
    layer.parametrizations.weight[0] = Half(torch.ones(4, 4), layer.bias)


def no(*_):
    return None


CHANGES = {
    "a forward of its own": lambda net: setattr(net, "forward", lambda x: 0 * nn.Sequential.forward(net, x)),
    "a layer's own forward": lambda net: setattr(net[1], "forward", lambda x: x),
    "a forward hook": lambda net: net[1].register_forward_hook(no),
    "a forward hook on the activation": lambda net: net[2].register_forward_hook(no),
    "a forward pre-hook": lambda net: net.register_forward_pre_hook(no),
    "a backward hook": lambda net: net[3].register_full_backward_hook(no),
    "a backward pre-hook": lambda net: net[2].register_full_backward_pre_hook(no),
    "a hook on a mask": lambda net: net[1].parametrizations.weight[0].register_forward_hook(no),
    "a tensor's hook": lambda net: M.original(net[1]).register_hook(no),
    "a bias' hook": lambda net: net[3].bias.register_hook(no),
    "a hook after accumulation": lambda net: net[3].bias.register_post_accumulate_grad_hook(no),
    "a frozen bias": lambda net: net[1].bias.requires_grad_(False),
    "something after the mask": lambda net: parametrize.register_parametrization(net[1], "weight", nn.Tanh()),
    "something on a bias": lambda net: parametrize.register_parametrization(net[3], "bias", nn.Tanh()),
    "a mask of another kind": lambda net: halve(net[1]),
    "one mask for all columns": lambda net: setattr(net[1].parametrizations.weight[0], "mask", torch.ones(4, 1)),
    "a parameter beside": lambda net: net.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "compiled in place": lambda net: net.compile(backend="eager"),
}  # fmt: skip


@pytest.mark.parametrize("what", other_networks())
def test_other_networks_take_the_general_way(what):
    model = other_networks()[what]
    assert perceptron.layers(model) is None
    assert perceptron.forward(model) is None
    assert not perceptron.trainable([model])


@pytest.mark.parametrize("what", CHANGES)
def test_a_network_that_was_changed_takes_the_general_way(what):
    model = changed(CHANGES[what])
    assert perceptron.layers(model) is None
    assert perceptron.forward(model) is None
    assert not perceptron.trainable([model])


def test_layers_cut_by_hand_take_the_general_way():
    model = changed(lambda net: setattr(net[1], "weight", nn.Parameter(net[1].weight.detach()[:, :3])), masked=False)
    assert perceptron.layers(model) is None
    x = torch.randn(5, 3)
    assert model(x).shape == (5, 2), "PyTorch does not read in_features"


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
    ],
)
def test_hooks_on_all_modules_are_seen_while_they_are_there(register):
    model, handle = small(), register(no)
    assert perceptron.layers(model) is None
    handle.remove()
    assert perceptron.layers(model)


def test_hooks_on_several_gradients_and_removed_ones():
    model = small()
    several = torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), no)
    assert perceptron.layers(model) is None
    several.remove()
    del several
    for handle in (model[1].register_forward_hook(no), model[1].weight.register_hook(no)):
        assert perceptron.layers(model) is None
        handle.remove()
    assert perceptron.layers(model), "a hook that was removed is none"
    with torch.autograd.set_detect_anomaly(True):
        assert perceptron.layers(model) is None


def test_a_profiler_that_keeps_frames_changes_nothing(digits):
    """Dask's workers sample the frames of the threads that train; what a kept frame holds on to is nobody's hook."""

    def trained():
        torch.manual_seed(0)
        model = lenet(0.5, torch.float32)
        history = fit(model, digits, Recipe(iterations=10, eval_every=5), seed=3)
        return history.val_loss, history.train_loss, M.state(model)

    model, frames, (val_loss, train_loss, state) = small(), [], trained()
    sys.setprofile(lambda frame, *_: frames.append(frame))
    try:
        seen = [perceptron.layers(model) is not None for _ in range(3)]
        found = trained()
    finally:
        sys.setprofile(None)
    assert seen == [True, True, True]
    with torch.no_grad():
        assert perceptron.layers(model)
    assert (val_loss, train_loss) == found[:2]
    assert all(torch.equal(t, found[2][name]) for name, t in state.items())


def test_a_patched_class_takes_the_general_way(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T)
    assert perceptron.layers(small()) is None


def test_soft_masks_are_evaluated_but_not_trained_by_hand():
    model = M.attach(small())
    model[1].parametrizations.weight[0].mask.fill_(0.5)
    x = torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(perceptron.forward(model)(x), model(x).detach())
    assert not perceptron.trainable([model])


def test_only_networks_alike_train_side_by_side():
    model = small()
    assert perceptron.trainable([model, small()], (1, 2, 2))
    assert not perceptron.trainable([model, small()], (1, 2, 3))
    assert not perceptron.trainable([model, model])
    assert not perceptron.trainable([model, small().double()])
    assert not perceptron.trainable([model, small(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))])
    assert not perceptron.trainable([])


def test_what_does_not_fit_is_the_models_to_refuse():
    forward = perceptron.forward(small())
    for x in (torch.randn(2, 1, 3, 3), torch.randn(4), torch.randn(2, 4, dtype=torch.float64)):
        with pytest.raises((RuntimeError, IndexError)):
            small()(x)
        with pytest.raises((RuntimeError, IndexError)):
            forward(x)
