"""The networks of the papers, initialised as the papers do.

Figure 2 of Frankle & Carbin (ICLR 2019, arXiv 1803.03635): LeNet-300-100 for MNIST and the VGG-like Conv-2, Conv-4 and
Conv-6 for CIFAR-10, all with ReLU, Gaussian Glorot initialisation and no batch norm. The paper does not say how biases
start; the authors' code uses zeros, and so do we. "Same" padding, also unsaid, is what its weight counts imply.

Networks with batch norm, whose convolutions have no bias:

* ResNet-8, -20 and -32 for CIFAR (He et al. 2016, 6n + 2 layers), VGG-16 and -19 with one fully connected layer: LTH,
  CS, GraSP. What LTH and CS call "Resnet-18" is ResNet-20. GraSP's ResNet-32 has doubled widths, `width=32`.
* ResNet-18, ResNet-50 and MobileNetV1 for ImageNet as STR counts them (Kusupati et al., ICML 2020, arXiv 2002.03231):
  the classifier is a 1x1 convolution without bias, and ResNet-50 strides in its 3x3 convolutions. Layers have the names
  in STR's published budgets. For images below 64 pixels the first convolution does not stride (in the ResNets it is 3x3
  then) and there is no max-pool.

FastGRNN (Kusupati et al., NeurIPS 2018, arXiv 1901.02358), a recurrent network whose rank STR learns (section 4.3): the
rows of an image are the time steps of a sequence.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import nn

from lottery.data import SETS, check_seed

Shape = tuple[int, int, int]  # of an image: channels, height, width


def lenet_300_100(in_shape: Shape = (1, 28, 28), classes: int = 10, hidden: tuple[int, int] = (300, 100)) -> nn.Module:
    """Fully connected 300, 100, classes (LeCun et al. 1998): 266,200 weights on MNIST."""
    if not _whole(hidden, n=2):
        raise ValueError(f"Invalid hidden {hidden!r}: give two layer sizes, both at least 1.")
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **_dense(prod(in_shape), *hidden, classes)))


def conv2(in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """64, 64, pool; 256, 256, classes: 4,300,992 weights on CIFAR-10."""
    return _conv([width], in_shape, classes, dropout)


def conv4(in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """64, 64, pool; 128, 128, pool; 256, 256, classes: 2,425,024 weights on CIFAR-10."""
    return _conv([width, 2 * width], in_shape, classes, dropout)


def conv6(in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """64, 64, pool; 128, 128, pool; 256, 256, pool; 256, 256, classes: 2,261,184 weights (the paper prints 1.7M)."""
    return _conv([width, 2 * width, 4 * width], in_shape, classes, dropout)


def resnet8(
    in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 16, shortcut: str = "batch norm"
) -> nn.Module:
    """One block of two 3x3 convolutions per stage, widths 16, 32, 64."""
    return _cifar_resnet(1, in_shape, classes, width, shortcut)


def resnet20(
    in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 16, shortcut: str = "batch norm"
) -> nn.Module:
    """Three blocks per stage: 267,696 weights in 3x3 convolutions, 2,560 in shortcuts, 640 in the classifier."""
    return _cifar_resnet(3, in_shape, classes, width, shortcut)


def resnet32(
    in_shape: Shape = (3, 32, 32), classes: int = 10, width: int = 16, shortcut: str = "batch norm"
) -> nn.Module:
    """Five blocks per stage; at GraSP's `width=32` 1,855,584 weights on CIFAR-10."""
    return _cifar_resnet(5, in_shape, classes, width, shortcut)


def vgg16(in_shape: Shape = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Thirteen 3x3 convolutions and a classifier: 14,715,584 weights on CIFAR-10."""
    return _vgg([2, 2, 3, 3, 3], in_shape, classes)


def vgg19(in_shape: Shape = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Sixteen 3x3 convolutions and a classifier: 20,024,000 weights on CIFAR-10."""
    return _vgg([2, 2, 4, 4, 4], in_shape, classes)


def resnet18(in_shape: Shape = (3, 224, 224), classes: int = 1000) -> nn.Module:
    """Two blocks of two 3x3 convolutions in each of four stages: 11,678,912 weights on ImageNet."""
    return _imagenet_resnet("resnet18", in_shape, classes)


def resnet50(in_shape: Shape = (3, 224, 224), classes: int = 1000) -> nn.Module:
    """Sixteen bottlenecks in four stages: 25,502,912 weights on ImageNet."""
    return _imagenet_resnet("resnet50", in_shape, classes)


def mobilenetv1(in_shape: Shape = (3, 224, 224), classes: int = 1000) -> nn.Module:
    """A convolution, thirteen depthwise-separable ones (Howard et al. 2017), a classifier: 4,209,088 weights."""
    widths = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    stages, c_in = [_conv_bn(in_shape[0], 32, 3, stride=1 if _small(in_shape) else 2)], 32
    for c_out, stride in widths:
        stages.append(nn.Sequential(*_conv_bn(c_in, c_in, 3, stride, groups=c_in), *_conv_bn(c_in, c_out, 1)))
        c_in = c_out
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": Classifier(c_in, classes)}
    return nn.Sequential(OrderedDict(model=nn.Sequential(*stages), **head))


def fastgrnn(
    in_shape: Shape = (1, 28, 28), classes: int = 10, hidden: int = 100, factorised: bool = False
) -> nn.Module:
    """FastGRNN over H steps of C·W features: 13,800 weights on MNIST row by row, 24,712 when factorised."""
    if not _whole([hidden], n=1):
        raise ValueError(f"Invalid hidden {hidden!r}: give the size of the hidden state, at least 1.")
    return FastGRNN(in_shape[0] * in_shape[2], hidden, classes, factorised)


class LowRank(nn.Module):
    """The matrix W = W₁ diag(m) W₂, whose inner dimension is full, min(n_in, n_out), and m = 1 at first.

    Its rank is the number of m that are not zero: what is pruned of `m`, a layer of one weight for each, is rank.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        rank = min(n_in, n_out)
        self.second = nn.Linear(n_in, rank, bias=False)
        self.m = nn.Conv1d(rank, rank, 1, groups=rank, bias=False)  # a diagonal matrix that `masks.prunable` lists
        nn.init.ones_(self.m.weight)
        self.first = nn.Linear(rank, n_out, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        """W, [n_out, n_in]."""
        return self.first.weight @ (self.m.weight.view(-1, 1) * self.second.weight)


class FastGRNN(nn.Module):
    """The gated cell of FastGRNN and a linear classifier of its last state. [B, C, H, W] -> [B, classes].

    For the row x_t of C·W features, t = 1 … H, with one W and one U for gate and candidate, and h_0 = 0:
    z = σ(W x_t + U h + b_z), c = tanh(W x_t + U h + b_h), h ← z ⊙ h + (σ(ζ)(1 − z) + σ(ν)) ⊙ c.

    factorised: W and U as `LowRank`. What `lottery.macs` counts is every step's product with W and U, and the
    classifier; of factorised ones the product that makes W or U, once and under `first`, and none of the steps.
    """

    def __init__(self, features: int, hidden: int, classes: int, factorised: bool = False):
        super().__init__()
        matrix = LowRank if factorised else partial(nn.Linear, bias=False)
        self.w, self.u = matrix(features, hidden), matrix(hidden, hidden)
        self.b_z, self.b_h = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.zeta, self.nu = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-4.0))
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.permute(2, 0, 1, 3).flatten(2)  # [H, B, C·W]
        wx, u = rows @ self.w.weight.T, self.u.weight.T
        zeta, nu, h = self.zeta.sigmoid(), self.nu.sigmoid(), wx.new_zeros(wx.shape[1:])
        for row in wx:
            both = row + h @ u
            z, c = torch.sigmoid(both + self.b_z), torch.tanh(both + self.b_h)
            h = z * h + (zeta * (1 - z) + nu) * c
        return self.fc(h)


class Classifier(nn.Conv2d):
    """STR's output layer: fully connected, written as a 1x1 convolution without bias. [B, C] -> [B, classes]."""

    def __init__(self, features: int, classes: int):
        super().__init__(features, classes, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[..., None, None]).flatten(1)


MODELS = {
    f.__name__: f
    for f in (
        lenet_300_100, conv2, conv4, conv6, resnet8, resnet20, resnet32, vgg16, vgg19, resnet18, resnet50, mobilenetv1,
        fastgrnn,
    )
}  # fmt: skip
OWN_INITS = {
    **dict.fromkeys(("resnet18", "resnet50"), "kaiming fan_in"),
    **{"mobilenetv1": "pytorch", "fastgrnn": "normal"},
}


def create(
    name: str, seed: int | None = None, init: str | None = None, sigma: float | None = None, **options: Any
) -> nn.Module:
    """Build a network: float [B, C, H, W] -> logits [B, classes].

    Args:
        name: lenet_300_100, conv2, conv4, conv6, resnet8, resnet20, resnet32, vgg16, vgg19, resnet18, resnet50,
            mobilenetv1 or fastgrnn.
        seed: weights are drawn from a generator of their own, so the same seed gives the same weights bit for bit and
            torch's random state stays as it was; None draws from torch's random state.
        init: the distribution of the weights; biases start at 0, batch norm at scale 1 and shift 0.
            "glorot": N(0, 2 / (fan_in + fan_out)); LTH and the code of CS. The default but for STR's networks.
            "kaiming fan_in": N(0, 2 / fan_in); STR's ResNets, and their default.
            "kaiming fan_out": N(0, 2 / fan_out) for convolutions, N(0, 0.01²) for Linear layers; GraSP.
            "normal": N(0, sigma²); LTH's figure 30; at 0.1 one of the initialisations of GraSP's robustness study, as
            it is remembered, and the default of FastGRNN, as its authors' code draws W and U.
            "pytorch": uniform in ±1 / √fan_in, what a new PyTorch layer has, and N(0, 2 / fan_in) for STR's classifier;
            STR's MobileNetV1, and its default.
        sigma: of init="normal"; default 0.1.
        in_shape: (C, H, W); default (1, 28, 28) for LeNet and FastGRNN, (3, 224, 224) for STR's, else (3, 32, 32).
        classes: default 1000 for STR's networks, else 10.
        hidden: the two hidden layers of lenet_300_100, default (300, 100); the state of fastgrnn, default 100.
        factorised: of fastgrnn, see `LowRank`; default False.
        width: filters of the first stage of resnet8, resnet20 and resnet32, default 16, or of conv2, conv4 and conv6,
            default 64.
        dropout: of conv2, conv4 and conv6: the share of the outputs of each hidden fully connected layer that is set
            to 0 in a training step, 0 <= dropout < 1; which layers LTH drops from is not stated. Default 0.
        shortcut: where widths change in resnet8, resnet20 and resnet32 there is a 1x1 convolution, followed by batch
            norm ("batch norm", the default: LTH, GraSP) or alone ("plain": the code of CS).

    Modules are in the order of the forward pass. The weighted layers of LeNet, Conv and VGG are called conv1, conv2,
    ..., fc1, fc2, fc3 (VGG: fc), those of the ResNets as in torchvision.

    Raises ValueError: an unknown name or init, an in_shape that is too small, a number below 1, a seed that is none.
    """
    if name not in list(MODELS):
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(MODELS)}.")
    known = list(inspect.signature(MODELS[name]).parameters)
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"Unknown option {unknown[0]!r} of {name}: it takes {', '.join(known)}.")
    if not _whole(options.get("in_shape", (1, 1, 1)), n=3):
        raise ValueError(f"Invalid in_shape {options['in_shape']}: give (channels, height, width), all at least 1.")
    for option in {"classes", "width"} & options.keys():
        if not _whole([options[option]], n=1):
            raise ValueError(f"Invalid {option} {options[option]}: give a whole number, at least 1.")
    init = init or OWN_INITS.get(name, "glorot")
    if init not in list(INITS):  # before a large network is built
        raise ValueError(f"Invalid init {init!r}: choose one of {', '.join(INITS)}.")
    if sigma is not None and init != "normal":
        raise ValueError(f"Invalid sigma {sigma!r} with init {init!r}: it is the deviation of init 'normal'.")
    if sigma is not None and not (isinstance(sigma, int | float) and sigma > 0):
        raise ValueError(f"Invalid sigma {sigma!r}: give a deviation above 0.")
    seed = None if seed is None else check_seed(seed)
    draw = INITS[init] if sigma is None else partial(_normal, sigma=sigma)
    with torch.random.fork_rng(devices=[]):  # no random numbers are spent on PyTorch's own initialisation
        model = MODELS[name](**options)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not module.weight.is_meta:  # there only sizes are asked
            draw(module, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def on_set(name: str, dataset: str, options: Iterable[tuple[str, Any]] = (), seed: int = 0) -> nn.Module:
    """`create` for the images and classes of a set that `data.load` knows; options: pairs, as of a Run."""
    return create(name, seed, in_shape=SETS[dataset].shape, classes=SETS[dataset].classes, **dict(options))


@lru_cache(maxsize=100)
def sizes_only(name: str, dataset: str, options: tuple[tuple[str, Any], ...] = ()) -> nn.Module:
    """`on_set` on the meta device: names and sizes, without drawing millions of weights. To be read, not changed."""
    with torch.device("meta"):
        return on_set(name, dataset, options)


def _glorot(layer, generator):
    nn.init.xavier_normal_(layer.weight, generator=generator)


def _kaiming(layer, generator, mode):
    nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu", generator=generator)


def _grasp(layer, generator):
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01, generator=generator)
    else:
        _kaiming(layer, generator, "fan_out")


def _pytorch(layer, generator):
    if isinstance(layer, Classifier):
        _kaiming(layer, generator, "fan_in")
    else:
        bound = prod(layer.weight.shape[1:]) ** -0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)


def _normal(layer, generator, sigma=0.1):
    nn.init.normal_(layer.weight, std=sigma, generator=generator)


INITS = {
    "glorot": _glorot,
    "normal": _normal,
    "kaiming fan_in": partial(_kaiming, mode="fan_in"),
    "kaiming fan_out": _grasp,
    "pytorch": _pytorch,
}


def _whole(numbers, n):
    listed = isinstance(numbers, tuple | list) and len(numbers) == n
    return listed and all(isinstance(i, int) and not isinstance(i, bool) and i >= 1 for i in numbers)


def _dense(*sizes):
    """{fc1: Linear, relu_fc1: ReLU, ...} through the given sizes, no ReLU after the last."""
    layers = {}
    for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
        layers |= {f"fc{i}": nn.Linear(n_in, n_out), f"relu_fc{i}": nn.ReLU()}
    layers.popitem()
    return layers


class Pool(nn.MaxPool2d):
    """2x2 max-pooling of a batch: what `torch.compile` makes of torch's own takes a third of Conv-2's step on a CPU.

    Its gather by index is not vectorised there; comparisons are, and find the same entry of finite numbers, the first
    of those that are largest. Outside of a compiled training, and for an odd number of pixels, it is torch's.

    Two things only torch's does when compiled: `torch.func.vmap` of a gradient, which fails here, and the gradient of a
    square with NaN in it, which is 0 here. For these put `nn.MaxPool2d(2)` in its place, which has no weights either.
    """

    def __init__(self):
        super().__init__(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            fast = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            fast = fast and x.device.type == "cpu" and x.requires_grad and x.dim() == 4
            if fast and x.shape[2] % 2 == x.shape[3] % 2 == 0:
                return _Largest.apply(x)
        return nn.functional.max_pool2d(x, 2)


class _Largest(torch.autograd.Function):
    """The largest of each 2x2 square, [B, C, 2H, 2W] → [B, C, H, W]; its gradient goes to the first of equals."""

    @staticmethod
    def forward(ctx, x):
        (a, b), (c, d) = ([x[:, :, i::2, j::2] for j in (0, 1)] for i in (0, 1))
        largest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        ctx.save_for_backward(x, largest)
        return largest

    @staticmethod
    def backward(ctx, gradient):
        x, largest = ctx.saved_tensors
        rows, free = [], torch.ones_like(largest, dtype=torch.bool)
        for i in (0, 1):
            row = []
            for j in (0, 1):
                here = free & (x[:, :, i::2, j::2] == largest)
                free = free & ~here
                row.append(torch.where(here, gradient, 0))
            rows.append(torch.stack(row, 4))
        return torch.stack(rows, 3).reshape(x.shape)


def _conv(widths, in_shape, classes, dropout):
    """For each width two 3x3 convolutions and a 2x2 max-pool; then fully connected 256, 256, classes."""
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ValueError(f"Invalid dropout {dropout!r}: give a share of the outputs, 0 <= dropout < 1.")
    channels, height, width = in_shape
    shrink = 2 ** len(widths)
    if min(height, width) < shrink:
        raise ValueError(f"Invalid in_shape {in_shape}: {len(widths)} poolings need at least {shrink}x{shrink} pixels.")
    layers, i = {}, 0
    for n in widths:
        for _ in range(2):
            i += 1
            layers |= {f"conv{i}": nn.Conv2d(channels, n, 3, padding="same"), f"relu_conv{i}": nn.ReLU()}
            channels = n
        layers[f"pool{i}"] = Pool()
    dense = _dense(channels * (height // shrink) * (width // shrink), 256, 256, classes)
    if dropout:
        dense = {n: nn.Sequential(m, nn.Dropout(dropout)) if isinstance(m, nn.ReLU) else m for n, m in dense.items()}
    return nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), **dense))


def _vgg(repeats, in_shape, classes):
    """Groups of 3x3 convolutions of 64, 128, 256, 512, 512 filters; max-pool between groups, average-pool after all."""
    channels, height, width = in_shape
    if min(height, width) < 16:
        raise ValueError(f"Invalid in_shape {in_shape}: 4 poolings need at least 16x16 pixels.")
    layers, i = {}, 0
    for n, repeat in zip([64, 128, 256, 512, 512], repeats, strict=True):
        if i:
            layers[f"pool{i}"] = Pool()
        for _ in range(repeat):
            i += 1
            conv, bn, relu = _conv_bn(channels, n, 3)
            layers |= {f"conv{i}": conv, f"bn{i}": bn, f"relu{i}": relu}
            channels = n
    return nn.Sequential(OrderedDict(**layers, **_linear_head(channels, classes)))


def _cifar_resnet(blocks, in_shape, classes, width, shortcut):
    """A 3x3 convolution, three stages of basic blocks of width, 2·width, 4·width filters, average-pool, classifier."""
    from torchvision.models.resnet import BasicBlock

    if shortcut not in ("batch norm", "plain"):
        raise ValueError(f"Invalid shortcut {shortcut!r}: give 'batch norm' or 'plain'.")
    conv, bn, relu = _conv_bn(in_shape[0], width, 3)
    layers = {"conv1": conv, "bn1": bn, "relu": relu}
    c_in = width
    for stage, c_out in enumerate([width, 2 * width, 4 * width], start=1):
        down = None
        if c_out != c_in:
            conv, bn, _ = _conv_bn(c_in, c_out, 1, stride=2)
            down = nn.Sequential(conv, bn) if shortcut == "batch norm" else nn.Sequential(conv)
        first = BasicBlock(c_in, c_out, stride=2 if down else 1, downsample=down)
        layers[f"layer{stage}"] = nn.Sequential(first, *(BasicBlock(c_out, c_out) for _ in range(blocks - 1)))
        c_in = c_out
    return nn.Sequential(OrderedDict(**layers, **_linear_head(c_in, classes)))


def _imagenet_resnet(name, in_shape, classes):
    """torchvision's network with STR's classifier; small images get 3x3 stride 1 instead of 7x7 stride 2 and pool."""
    from torchvision.models import resnet

    model = getattr(resnet, name)()
    if _small(in_shape):
        model.conv1 = nn.Conv2d(in_shape[0], 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif in_shape[0] != 3:
        model.conv1 = nn.Conv2d(in_shape[0], 64, 7, stride=2, padding=3, bias=False)
    model.fc = Classifier(model.fc.in_features, classes)
    return model


def _conv_bn(c_in, c_out, size, stride=1, groups=1):
    """Convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def _linear_head(features, classes):
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(features, classes)}


def _small(in_shape):
    return min(in_shape[1:]) < 64
