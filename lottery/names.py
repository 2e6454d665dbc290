"""One table of names: what the code calls a paper, an arm, a network or a data set, and what a reader is told.

Chapters, tables and the scorecard take their words from here, so that one thing has one name through the book.
"""

import re
from collections.abc import Iterable

PAPERS = {  # in the order of the book
    "lth": "Lottery tickets",
    "cs": "Continuous sparsification",
    "str": "Soft threshold reparameterization",
    "grasp": "GraSP",
}
ARMS = {
    "dense": "dense network",
    "imp": "ticket",
    "reinit": "same mask, fresh weights",
    "random": "random mask",
    "oneshot": "ticket pruned in one shot",
    "oneshot-reinit": "one-shot mask, fresh weights",
    "continued": "ticket found by training on",
    "dm-reinit": "same mask, values drawn from the survivors'",
    "prune-at-init": "smallest initial weights removed",
    "lt": "ticket",
    "lt-rewind": "ticket, rewound",
    "rewind": "ticket, rewound",
    "grasp": "GraSP",
    "snip": "SNIP",
    "synflow": "SynFlow",
    "magnitude": "magnitude at initialisation",
    "cs": "continuous sparsification",
    "str": "STR",
    "str-global": "STR, one threshold for all layers",
    "str-filter": "STR, a threshold for each filter",
    "str-weight": "STR, a threshold for each weight",
    "lowrank": "rank set before the training",
    "gmp": "gradual magnitude pruning",
    "gmp-budget": "gradual magnitude pruning with STR's budget",
    "dnw-budget": "DNW with STR's budget",
    "dnw-erk": "DNW with ERK",
    "rigl-erk": "RigL with ERK",
    "set-erk": "SET with ERK",
    "dnw": "DNW",
    "set": "SET",
    "rigl": "RigL",
    "l0": "L0 regularisation",
    "supermask": "stochastic supermask",
}
NETS = {
    "lenet": "LeNet-300-100",
    "lenet_300_100": "LeNet-300-100",
    "conv2": "Conv-2",
    "conv4": "Conv-4",
    "conv6": "Conv-6",
    "resnet8": "ResNet-8",
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "vgg19": "VGG-19",
    "mobilenetv1": "MobileNetV1",
    "fastgrnn": "FastGRNN",
}
SETS = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cifar10_16": "CIFAR-10 at 16×16 pixels",
    "digits": "the 8×8 digits",
    "c10": "CIFAR-10",
    "c100": "CIFAR-100",
    "tiny": "Tiny-ImageNet",
    "imagenet": "ImageNet",
    "google12": "Google-12",
    "har2": "HAR-2",
    "har2_part": "a part of UCI HAR",
}
LAYERS = {  # of LeNet-300-100 and Conv-2 to Conv-6, and of residual networks what `layer` has no pattern for
    "fc1": "first layer",
    "fc2": "second layer",
    "fc3": "output layer",
    "conv1": "first convolution",
    "conv2": "second convolution",
    "conv3": "third convolution",
    "conv4": "fourth convolution",
    "conv5": "fifth convolution",
    "conv6": "sixth convolution",
    "fc": "output layer",
}
SCALES = {
    "paper": "the paper's own setting",
    "primary": "the paper's own setting, main claims only",
    "laptop": "shorter trainings or a smaller network",
    "smoke": "seconds on the 8×8 digits",
}


called = {}  # what an exploration trains under an arm's name, in words; a `Chapter` fills it


def arm(name: str) -> str:
    """The words for an arm: "resnet32-c10/grasp" → "GraSP"; an unknown one stays as it is."""
    last = name.split("/")[-1]
    return called.get(last) or ARMS.get(last, name)


def printed(name: str) -> str:
    """The words for an arm as the paper has it, whatever an exploration trains under its name."""
    return ARMS.get(name.split("/")[-1], name)


def layer(name: str) -> str:
    """The words for a layer: "fc1" → "first layer", "layer3.0.conv2" → "stage 3, convolution 2"."""
    if not (found := re.fullmatch(r"layer(\d+)\.(\d+)\.(?:conv(\d+)|downsample\.0)", name)):
        return LAYERS.get(name, name)
    stage, block, number = found.groups()
    block = f", block {int(block) + 1}" if int(block) else ""
    return f"stage {stage}{block}, " + (f"convolution {number}" if number else "shortcut")


def layers(some: Iterable[str]) -> dict[str, str]:
    """`{layer: its words}` of a whole network; behind convolutions "first layer" is "first fully connected layer"."""
    found = {name: layer(name) for name in some}
    if any(name.startswith("conv") for name in found):
        for name in found.keys() & {"fc1", "fc2"}:
            found[name] = found[name].replace("layer", "fully connected layer")
    return found


def trials(n: int) -> str:
    """ "1 trial", "5 trials"."""
    return f"{n} trial{'s' * (n != 1)}"


def net(model: str, dataset: str | None = None) -> str:
    """The words for a network, and the data it is trained on: "vgg19", "cifar10" → "VGG-19, CIFAR-10".

    model: of `models.create`, or a paper's net with its data, "vgg19-c10".
    """
    name, _, data = model.partition("-")
    data = dataset or data
    return NETS.get(name, name) + (f", {SETS.get(data, data)}" if data else "")
