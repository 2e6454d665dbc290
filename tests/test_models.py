"""lottery.models against the papers: weight and parameter counts, layers in order, initialisations, seeds."""

import csv
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lottery import macs, masks, models

CONV_WEIGHTS = {"lenet_300_100": 0, "conv2": 38_592, "conv4": 259_776, "conv6": 1_144_512}
WEIGHTS = {"lenet_300_100": 266_200, "conv2": 4_300_992, "conv4": 2_425_024, "conv6": 2_261_184}
SHAPES = {"lenet_300_100": (1, 28, 28), "conv2": (3, 32, 32), "conv4": (3, 32, 32), "conv6": (3, 32, 32)}


@pytest.mark.parametrize("name", WEIGHTS)
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


@pytest.mark.parametrize("name", WEIGHTS)
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


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 2, 2), (3, 2, 7, 8), (3, 2, 6, 5), (3, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_pool_is_torchs_with_its_gradient_at_the_first_of_equals(dtype, shape, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 3, shape, generator=generator).to(dtype)  # most squares have equals
    x = x.to(memory_format=memory_format) if x.dim() == 4 else x
    gradient = torch.randn(*shape[:-2], shape[-2] // 2, shape[-1] // 2, generator=generator).to(dtype)
    found = []
    for pool in (models.Pool(), torch.compile(models.Pool(), backend="aot_eager"), nn.MaxPool2d(2)):
        leaf = x.clone().requires_grad_()
        pooled = pool(leaf)
        pooled.backward(gradient)
        found.append((pooled, leaf.grad))
        assert torch.equal(pool(x), pooled)
    for pooled, back in found[:2]:
        assert torch.equal(pooled, found[2][0])
        assert torch.equal(back, found[2][1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_network_with_pools_can_be_scripted_and_exported():
    net, x = models.create("conv2", seed=0, in_shape=(3, 8, 8), width=2), torch.randn(2, 3, 8, 8)
    for other in (torch.jit.script(net), torch.export.export(net, (x,)).module()):
        torch.testing.assert_close(other(x), net(x))


def test_a_compiled_pool_is_what_a_compiled_conv2_trains_with():
    """Else nothing would tell that it is slow again."""
    net, graphs = models.create("conv2", in_shape=(3, 8, 8), width=2), []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(net, backend=backend)(torch.randn(2, 3, 8, 8)).sum().backward()
    [graph] = graphs
    assert "maximum" in graph
    assert "max_pool2d" not in graph


@pytest.mark.parametrize("name", WEIGHTS)
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


@pytest.mark.parametrize("name", WEIGHTS)
def test_digits_fit_and_classes_can_differ(name):
    model = models.create(name, in_shape=(1, 8, 8), classes=7)
    assert model(torch.zeros(4, 1, 8, 8)).shape == (4, 7)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
DEEP = [  # name, options, weights, all parameters, prunable layers: from the papers and their code
    ("resnet20", {}, 270_896, 272_474, 22),  # LTH's "Resnet-18": 267,696 + 2,560 + 640, biases, batch norm
    ("resnet20", {"shortcut": "plain"}, 270_896, 272_282, 22),  # CS: 267,696 + 2,560 + 650 + 1,376
    ("resnet32", {"width": 32}, 1_855_584, None, 34),  # GraSP
    ("resnet32", {"width": 32, "classes": 100}, 1_867_104, None, 34),
    ("resnet32", {"width": 32, "classes": 200, "in_shape": (3, 64, 64)}, 1_879_904, None, 34),
    ("vgg16", {}, 14_710_464 + 5_120, 14_724_042, 14),  # CS
    ("vgg19", {}, 20_024_000, None, 17),  # LTH, GraSP
    ("vgg19", {"classes": 100}, 20_070_080, None, 17),
    ("vgg19", {"classes": 200, "in_shape": (3, 64, 64)}, 20_121_280, None, 17),
    ("resnet18", {}, 11_678_912, None, 21),
    ("resnet50", {}, 25_502_912, 25_556_032, 54),  # STR
    ("mobilenetv1", {}, 4_209_088, 4_209_088 + 21_888, 28),
    ("resnet18", {"in_shape": CIFAR, "classes": 10}, 11_164_352, None, 21),
    ("resnet50", {"in_shape": CIFAR, "classes": 10}, 23_467_712, None, 54),
    ("mobilenetv1", {"in_shape": CIFAR, "classes": 10}, 3_195_328, None, 28),
]


@pytest.mark.parametrize(("name", "options", "weights", "parameters", "layers"), DEEP)
def test_deep_networks_have_the_counts_of_the_papers(name, options, weights, parameters, layers):
    with torch.device("meta"):
        model = models.MODELS[name](**options)
    prunable = masks.prunable(model)
    assert sum(layer.weight.numel() for layer in prunable.values()) == weights
    assert len(prunable) == layers
    assert parameters in (None, sum(p.numel() for p in model.parameters()))
    assert list(prunable)[-1] == "fc"
    assert not any(layer.bias is not None for name, layer in prunable.items() if name != "fc")


def test_resnet20_by_kind_of_layer():
    model = models.create("resnet20")
    n = {name: layer.weight.numel() for name, layer in masks.prunable(model).items()}
    assert sum(v for name, v in n.items() if "downsample" in name) == 2_560
    assert n["fc"] == 640
    assert sum(n.values()) - 2_560 - 640 == 267_696
    saved = sum(t.numel() for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked"))
    assert saved - 10 == 274_032  # the 274K that LTH prints: with running statistics, without the classifier's biases


def test_vgg19_layer_by_layer():
    weights = [layer.weight.numel() for layer in masks.prunable(models.create("vgg19")).values()]
    assert weights[:2] == [1_728, 36_864]
    assert weights[-2:] == [2_359_296, 5_120]
    assert sum(weights[:-1]) == 20_018_880


def test_shortcuts_of_grasps_resnet32_are_layers_13_and_24():
    layers = list(masks.prunable(models.create("resnet32", width=32)))
    assert [i for i, name in enumerate(layers) if "downsample" in name] == [13, 24]
    assert layers[33] == "fc"


def test_resnet50_has_the_layers_of_strs_budgets():
    path = Path(__file__).parents[1] / "results/reported/str_budgets.csv"
    with path.open() as file:
        rows = [row["layer"] for row in csv.DictReader(file) if row["budget"] == "90.23"]
    assert list(masks.prunable(models.create("resnet50"))) == rows


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet8", {}, CIFAR),
        ("resnet20", {"shortcut": "plain"}, (1, 8, 8)),
        ("resnet32", {"width": 32}, CIFAR),
        ("vgg16", {}, CIFAR),
        ("vgg19", {}, (3, 64, 64)),
        ("resnet18", {}, CIFAR),
        ("resnet18", {}, (1, 64, 64)),
        ("resnet50", {}, (3, 64, 64)),
        ("mobilenetv1", {}, CIFAR),
        ("mobilenetv1", {}, (3, 64, 64)),
    ],
)
def test_deep_networks_run_their_layers_in_order(name, options, shape):
    model, called = models.create(name, seed=0, in_shape=shape, classes=7, **options), []
    for layer, module in masks.prunable(model).items():
        module.register_forward_hook(lambda *_, layer=layer: called.append(layer))
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    assert called == list(masks.prunable(model))
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_feature_maps_of_the_last_convolution():
    sizes = {}
    for name, shape in [("resnet50", IMAGENET), ("resnet50", CIFAR), ("mobilenetv1", IMAGENET), ("mobilenetv1", CIFAR)]:
        with torch.device("meta"):
            model = models.MODELS[name](in_shape=shape)
            *_, (_, last), _ = masks.prunable(model).items()
            last.register_forward_hook(lambda m, i, o, key=(name, shape): sizes.update({key: o.shape[-1]}))
            model.eval()(torch.empty(1, *shape))
    assert list(sizes.values()) == [7, 4, 7, 2]


def test_basic_block_from_its_definition():
    model, x = models.create("resnet8", seed=0).double().eval(), torch.randn(2, 16, 8, 8, dtype=torch.float64)
    block, F = model.layer2[0], nn.functional
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 2)
            nn.init.normal_(m.running_mean)
            nn.init.normal_(m.weight)

    def bn(h, m):
        a = m.weight / (m.running_var + m.eps).sqrt()
        return h * a[:, None, None] + (m.bias - m.running_mean * a)[:, None, None]

    h = torch.relu(bn(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1))
    h = bn(F.conv2d(h, block.conv2.weight, padding=1), block.bn2)
    shortcut = bn(F.conv2d(x, block.downsample[0].weight, stride=2), block.downsample[1])
    torch.testing.assert_close(block(x), torch.relu(h + shortcut))


SIGMA = {
    "glorot": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "kaiming fan_in": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "kaiming fan_out": lambda fan_in, fan_out: math.sqrt(2 / fan_out),
    "pytorch": lambda fan_in, fan_out: math.sqrt(1 / (3 * fan_in)),
}


@pytest.mark.parametrize(
    ("name", "init", "used"),
    [
        ("resnet20", None, "glorot"),
        ("resnet20", "kaiming fan_out", "kaiming fan_out"),
        ("conv2", "kaiming fan_in", "kaiming fan_in"),
        ("resnet18", None, "kaiming fan_in"),
        ("mobilenetv1", None, "pytorch"),
    ],
)
def test_initialisations(name, init, used):
    model = models.create(name, seed=0, init=init)
    for layer, module in masks.prunable(model).items():
        w = module.weight.detach()
        receptive = w[0, 0].numel()
        sigma = SIGMA[used](receptive * w.shape[1], receptive * w.shape[0])
        if layer == "fc" and used == "kaiming fan_out":
            sigma = 0.01
        if layer == "fc" and name == "mobilenetv1":
            sigma = math.sqrt(2 / 1024)
        elif used == "pytorch":
            assert w.abs().max() <= math.sqrt(3) * sigma
        assert abs(w.std() / sigma - 1) < 5 / math.sqrt(2 * w.numel()), layer
        assert abs(w.mean() / sigma) < 5 / math.sqrt(w.numel()), layer
        assert module.bias is None or not module.bias.any()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert not m.bias.any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_seed_means_one_normal_draw_per_layer_in_order(name):
    """Stored runs name θ₀ by its seed, so the stream of random numbers may not change."""
    generator = torch.Generator().manual_seed(3)
    for layer in masks.prunable(models.create(name, seed=3)).values():
        w, receptive = layer.weight, layer.weight[0, 0].numel()
        sigma = math.sqrt(2.0 / (w.shape[1] * receptive + w.shape[0] * receptive))
        assert torch.equal(w, torch.empty_like(w).normal_(0, sigma, generator=generator))


def test_deep_networks_leave_the_global_generator():
    before = torch.get_rng_state()
    a, b = models.create("resnet20", seed=1), models.create("resnet20", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.layer3[2].conv2.weight, b.layer3[2].conv2.weight)
    assert torch.equal(a.fc.weight, b.fc.weight)


def test_odd_sizes_are_pooled_as_torch_pools():
    assert models.create("conv4", in_shape=(2, 9, 14))(torch.zeros(1, 2, 9, 14)).shape == (1, 10)


def test_lenet_of_other_sizes_and_with_one_deviation_for_all_layers():
    model = models.create("lenet_300_100", seed=0, init="normal", sigma=0.1, hidden=(600, 200))
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    assert [tuple(w.shape) for w in weights] == [(600, 784), (200, 600), (10, 200)]
    for w in weights:
        assert float(w.detach().std()) == pytest.approx(0.1, rel=0.05)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "Unknown model 'lenet': choose one of lenet_300_100, conv2, conv4, conv6, resnet8, "
         "resnet20, resnet32, vgg16, vgg19, resnet18, resnet50, mobilenetv1, fastgrnn."),
        ("conv6", {"in_shape": (1, 7, 8)}, "Invalid in_shape (1, 7, 8): 3 poolings need at least 8x8 pixels."),
        ("conv2", {"in_shape": (32, 32)}, "Invalid in_shape (32, 32): give (channels, height, width), all at least 1."),
        ("lenet_300_100", {"in_shape": (1, 0, 8)},
         "Invalid in_shape (1, 0, 8): give (channels, height, width), all at least 1."),
        ("conv2", {"in_shape": 5}, "Invalid in_shape 5: give (channels, height, width), all at least 1."),
        ("conv2", {"in_shape": None}, "Invalid in_shape None: give (channels, height, width), all at least 1."),
        ("conv2", {"init": ["normal"]},
         "Invalid init ['normal']: choose one of glorot, normal, kaiming fan_in, kaiming fan_out, pytorch."),
        ("conv2", {"seed": "a"}, "Invalid seed 'a': give a whole number of at most 64 bits."),
        ("conv2", {"seed": 1.5}, "Invalid seed 1.5: give a whole number of at most 64 bits."),
        ("conv2", {"classes": 0}, "Invalid classes 0: give a whole number, at least 1."),
        ("vgg16", {"in_shape": (3, 15, 32)}, "Invalid in_shape (3, 15, 32): 4 poolings need at least 16x16 pixels."),
        ("resnet8", {"width": 1.5}, "Invalid width 1.5: give a whole number, at least 1."),
        ("resnet8", {"shortcut": "A"}, "Invalid shortcut 'A': give 'batch norm' or 'plain'."),
        ("conv2", {"init": "he"},
         "Invalid init 'he': choose one of glorot, normal, kaiming fan_in, kaiming fan_out, pytorch."),
        ("conv2", {"sigma": 0.2}, "Invalid sigma 0.2 with init 'glorot': it is the deviation of init 'normal'."),
        ("conv2", {"init": "normal", "sigma": 0}, "Invalid sigma 0: give a deviation above 0."),
        ("lenet_300_100", {"hidden": (300,)}, "Invalid hidden (300,): give two layer sizes, both at least 1."),
        ("lenet_300_100", {"width": 3}, "Unknown option 'width' of lenet_300_100: it takes in_shape, classes, hidden."),
        ("vgg16", {"dropout": 0.5}, "Unknown option 'dropout' of vgg16: it takes in_shape, classes."),
    ],
)  # fmt: skip
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        models.create(name, **options)


# FastGRNN -------------------------------------------------------------------------------------------------------------


def test_fastgrnn_is_its_cell_and_a_classifier_of_the_last_state():
    """z = σ(Wx + Uh + b_z), c = tanh(Wx + Uh + b_h), h ← z h + (σ(ζ)(1 − z) + σ(ν)) c, one row after the other."""
    model = models.create("fastgrnn", seed=0, in_shape=(2, 3, 4), classes=5, hidden=6).double()
    with torch.no_grad():
        model.b_h.normal_()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    assert model.w.weight.shape == (6, 8)
    assert (model.b_z == 1).all()
    h = torch.zeros(2, 6, dtype=torch.float64)
    for t in range(3):
        both = x[:, :, t].flatten(1) @ model.w.weight.T + h @ model.u.weight.T
        z, c = torch.sigmoid(both + model.b_z), torch.tanh(both + model.b_h)
        h = z * h + (torch.sigmoid(model.zeta) * (1 - z) + torch.sigmoid(model.nu)) * c
    torch.testing.assert_close(model(x), h @ model.fc.weight.T + model.fc.bias)


def test_a_factorised_fastgrnn_is_the_plain_one_of_its_product():
    model = models.create("fastgrnn", seed=0, factorised=True, hidden=20).double()
    m = {name: layer.weight for name, layer in masks.prunable(model).items() if name.endswith(".m")}
    assert {name: tuple(w.shape) for name, w in m.items()} == {"w.m": (20, 1, 1), "u.m": (20, 1, 1)}
    assert all((w == 1).all() for w in m.values())
    masks.attach(model, {"u.m": torch.arange(20).view(20, 1, 1) < 3})
    assert torch.linalg.matrix_rank(model.u.weight) == 3
    plain = models.create("fastgrnn", hidden=20).double()
    with torch.no_grad():
        plain.w.weight.copy_(model.w.weight)
        plain.u.weight.copy_(model.u.weight)
        for name in ("weight", "bias"):
            getattr(plain.fc, name).copy_(getattr(model.fc, name))
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))


def test_fastgrnn_is_drawn_with_a_deviation_of_a_tenth():
    """13,800 weights on MNIST row by row: 28·100 + 100·100 + 1,000."""
    weights = torch.cat(
        [layer.weight.detach().flatten() for layer in masks.prunable(models.create("fastgrnn", seed=0)).values()]
    )
    assert len(weights) == 13_800
    assert weights.std().item() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match=r"^Invalid hidden \(3, 4\): give the size of the hidden state, at least 1\.$"):
        models.create("fastgrnn", hidden=(3, 4))


@pytest.mark.parametrize(("factorised", "counts"), [(False, (385, 847)), (True, (275, 1331))])
def test_what_macs_counts_of_a_fastgrnn(factorised, counts):
    """7 steps of 11·5 and 11·11 products; factorised once 11·5·5 and 11·11·11, which make the matrices."""
    options = {"in_shape": (1, 7, 5), "hidden": 11, "classes": 3, "factorised": factorised}
    found = macs.count(models.create("fastgrnn", **options), (1, 7, 5))
    assert [n for n in found.values() if n] == [*counts, 33]
