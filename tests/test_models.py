"""lottery.models against the paper's table: weight counts, layer order, Glorot initialisation, seeds."""

import math
import re

import pytest
import torch
from torch import nn

from lottery import masks, models

CONV_WEIGHTS = {"lenet_300_100": 0, "conv2": 38_592, "conv4": 259_776, "conv6": 1_144_512}
WEIGHTS = {"lenet_300_100": 266_200, "conv2": 4_300_992, "conv4": 2_425_024, "conv6": 2_261_184}
SHAPES = {"lenet_300_100": (1, 28, 28), "conv2": (3, 32, 32), "conv4": (3, 32, 32), "conv6": (3, 32, 32)}


@pytest.mark.parametrize("name", models.MODELS)
def test_weight_counts_are_the_papers(name):
    weights = {n: p.numel() for n, p in models.create(name).named_parameters() if n.endswith("weight")}
    assert sum(weights.values()) == WEIGHTS[name]
    assert sum(n for layer, n in weights.items() if layer.startswith("conv")) == CONV_WEIGHTS[name]


def test_tensors_of_lenet_and_conv6_one_by_one():
    lenet = {n: tuple(p.shape) for n, p in models.create("lenet_300_100").named_parameters() if p.dim() > 1}
    assert lenet == {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
    conv6 = [tuple(p.shape[:2]) for p in models.create("conv6").parameters() if p.dim() > 1]
    convolutions, dense = conv6[:6], conv6[6:]
    assert convolutions == [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256)]
    assert dense == [(256, 4096), (256, 256), (10, 256)]


@pytest.mark.parametrize("name", models.MODELS)
def test_layer_names_are_in_forward_order(name):
    model, called = models.create(name), []
    for layer, module in masks.prunable(model).items():
        module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    logits = model(torch.zeros(2, *SHAPES[name]))
    convs = {"lenet_300_100": 0, "conv2": 2, "conv4": 4, "conv6": 6}[name]
    assert called == list(masks.prunable(model)) == [f"conv{i + 1}" for i in range(convs)] + ["fc1", "fc2", "fc3"]
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32


def test_lenet_is_two_relu_layers_and_a_linear_one():
    model, x = models.create("lenet_300_100", seed=0), torch.randn(3, 1, 28, 28)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p)
    w1, b1, w2, b2, w3, b3 = model.parameters()
    expected = torch.relu(torch.relu(x.flatten(1) @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(model(x), expected)


def test_conv4_is_pairs_of_convolutions_with_a_pool_after_each():
    model, x = models.create("conv4", seed=0), torch.randn(2, 3, 32, 32)
    w = dict(model.named_parameters())
    h = x
    for i in range(1, 5):
        h = torch.relu(nn.functional.conv2d(h, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1))
        h = nn.functional.max_pool2d(h, 2, stride=2) if i % 2 == 0 else h
    assert h.shape == (2, 128, 8, 8)
    h = h.flatten(1)
    for i in (1, 2):
        h = torch.relu(h @ w[f"fc{i}.weight"].T + w[f"fc{i}.bias"])
    torch.testing.assert_close(model(x), h @ w["fc3.weight"].T + w["fc3.bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_initialisation_is_gaussian_glorot_with_zero_biases(name):
    for n, p in models.create(name, seed=0).named_parameters():
        if n.endswith("bias"):
            assert not p.any()
            continue
        receptive = p[0, 0].numel()
        sigma = math.sqrt(2 / (receptive * (p.shape[0] + p.shape[1])))
        z, count = p.detach().flatten() / sigma, p.numel()
        # five standard errors of a normal sample's mean, standard deviation and fourth moment
        assert abs(z.mean()) < 5 / math.sqrt(count)
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * count)
        assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / count)  # truncated or uniform draws fail here
        if count > 10_000:
            assert z.abs().max() > 3.2


def test_same_seed_same_weights_and_the_global_generator_stays():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = models.create("conv2", seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = models.create("conv2", seed=7), models.create("conv2", seed=8)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() == 1 or not torch.equal(a, c)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(7)
    a, b = models.create("lenet_300_100"), models.create("lenet_300_100")
    torch.manual_seed(7)
    again = models.create("lenet_300_100")
    assert torch.equal(a.fc1.weight, again.fc1.weight)
    assert not torch.equal(a.fc1.weight, b.fc1.weight)
    seeded = models.create("lenet_300_100", seed=7)
    assert torch.equal(a.fc1.weight, seeded.fc1.weight)  # the same stream, so nothing else was drawn from it


@pytest.mark.parametrize("name", models.MODELS)
def test_digits_fit_and_classes_can_differ(name):
    model = models.create(name, in_shape=(1, 8, 8), classes=7)
    assert model(torch.zeros(4, 1, 8, 8)).shape == (4, 7)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_odd_sizes_are_pooled_as_torch_pools():
    assert models.create("conv4", in_shape=(2, 9, 14))(torch.zeros(1, 2, 9, 14)).shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "Unknown model 'lenet': choose one of lenet_300_100, conv2, conv4, conv6."),
        ("conv6", {"in_shape": (1, 7, 8)}, "Invalid in_shape (1, 7, 8): 3 poolings need at least 8x8 pixels."),
        ("conv2", {"in_shape": (32, 32)}, "Invalid in_shape (32, 32): give (channels, height, width), all at least 1."),
        ("lenet_300_100", {"in_shape": (1, 0, 8)},
         "Invalid in_shape (1, 0, 8): give (channels, height, width), all at least 1."),
        ("conv2", {"classes": 0}, "Invalid classes 0: give a whole number, at least 1."),
    ],
)  # fmt: skip
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.create(name, **options)
