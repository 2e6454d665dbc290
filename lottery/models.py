"""The networks of the papers, initialised as the papers do.

Figure 2 of Frankle & Carbin (ICLR 2019, arXiv 1803.03635): LeNet-300-100 for MNIST and the VGG-like Conv-2, Conv-4 and
Conv-6 for CIFAR-10, all with ReLU, Gaussian Glorot initialisation and no batch norm. The paper does not say how biases
start; the authors' code uses zeros, and so do we. "Same" padding, also unsaid, is what its weight counts imply.
"""

from collections import OrderedDict
from itertools import pairwise
from math import prod

import torch
from torch import nn


def lenet_300_100(in_shape=(1, 28, 28), classes=10):
    """Fully connected 300, 100, classes (LeCun et al. 1998): 266,200 weights on MNIST."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), **_dense(prod(in_shape), 300, 100, classes)))


def conv2(in_shape=(3, 32, 32), classes=10):
    """64, 64, pool; 256, 256, classes: 4,300,992 weights on CIFAR-10."""
    return _conv([64], in_shape, classes)


def conv4(in_shape=(3, 32, 32), classes=10):
    """64, 64, pool; 128, 128, pool; 256, 256, classes: 2,425,024 weights on CIFAR-10."""
    return _conv([64, 128], in_shape, classes)


def conv6(in_shape=(3, 32, 32), classes=10):
    """64, 64, pool; 128, 128, pool; 256, 256, pool; 256, 256, classes: 2,261,184 weights (the paper prints 1.7M)."""
    return _conv([64, 128, 256], in_shape, classes)


MODELS = {f.__name__: f for f in (lenet_300_100, conv2, conv4, conv6)}


def create(name, seed=None, **options):
    """Build lenet_300_100, conv2, conv4 or conv6: float [B, C, H, W] -> logits [B, classes].

    seed: weights are drawn from a generator of their own, so the same seed gives the same weights bit for bit and
    torch's random state stays as it was; None draws from torch's random state.
    options: in_shape=(C, H, W), default (1, 28, 28) for LeNet and (3, 32, 32) for the others; classes=10.

    Weighted layers are called conv1, conv2, ..., fc1, fc2, fc3, in the order of the forward pass.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(MODELS)}.")
    if not _whole(*options.get("in_shape", (1, 1, 1)), n=3):
        raise ValueError(f"Invalid in_shape {options['in_shape']}: give (channels, height, width), all at least 1.")
    if not _whole(options.get("classes", 1), n=1):
        raise ValueError(f"Invalid classes {options['classes']}: give a whole number, at least 1.")
    with torch.random.fork_rng(devices=[]):  # no random numbers are spent on PyTorch's own initialisation
        model = MODELS[name](**options)
    glorot(model, None if seed is None else torch.Generator().manual_seed(seed))
    return model


def glorot(model, generator=None):
    """Draw every weight from N(0, 2 / (fan_in + fan_out)), in module order, and set every bias to 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)


def _whole(*numbers, n):
    return len(numbers) == n and all(isinstance(i, int) and i >= 1 for i in numbers)


def _dense(*sizes):
    """{fc1: Linear, relu_fc1: ReLU, ...} through the given sizes, no ReLU after the last."""
    layers = {}
    for i, (n_in, n_out) in enumerate(pairwise(sizes), start=1):
        layers |= {f"fc{i}": nn.Linear(n_in, n_out), f"relu_fc{i}": nn.ReLU()}
    layers.popitem()
    return layers


def _conv(widths, in_shape, classes):
    """For each width two 3x3 convolutions and a 2x2 max-pool; then fully connected 256, 256, classes."""
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
        layers[f"pool{i}"] = nn.MaxPool2d(2)
    features = channels * (height // shrink) * (width // shrink)
    return nn.Sequential(OrderedDict(**layers, flatten=nn.Flatten(), **_dense(features, 256, 256, classes)))
