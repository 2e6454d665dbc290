"""lottery.prune on kinds of models that people prune: pruned to the density and what is left named, or refused."""

import contextlib
import re
from functools import partial

import pytest
import torch
import torchvision.models as zoo
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig

import lottery
from lottery import data
from lottery import masks as M
from lottery.training import Recipe

ONE_STEP = Recipe(optimizer="sgd", lr=0.01, batch_size=4, iterations=1, eval_every=1, inputs="standard")


def images(side=16, dtype=torch.float32):
    x = torch.rand(12, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    return data.from_tensors(x, torch.arange(12) % 4, valid=0, test=4)


def words():
    x = torch.randint(0, 11, (12, 5), generator=torch.Generator().manual_seed(0))
    return data.from_tensors(x, torch.arange(12) % 4, tokens=True, valid=0, test=4)


def head(n, *before):
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 4))


def on_pixels(layer, hidden=8):
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(hidden, 4))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(11, 8), kind(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class Encoder(nn.Module):
    """A language model's encoder: the output layer has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        return self.out(self.encoder(self.embed(x)).mean(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(3, 1, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        x = x.flatten(2).mT
        return self.head(self.attend(x, x, x)[0].mean(1))


def mobilenet():
    blocks = [
        InvertedResidualConfig(*row, 1.0) for row in ((8, 3, 16, 8, True, "RE", 2, 1), (8, 5, 24, 16, True, "HS", 1, 1))
    ]
    return zoo.MobileNetV3(blocks, 32, num_classes=4)


def efficientnet():
    blocks = [MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), MBConvConfig(4, 3, 2, 8, 16, 2, 1.0, 1.0)]
    return zoo.EfficientNet(blocks, 0.1, num_classes=4)


def torch_pruned():
    net = on_pixels(nn.Linear(768, 8))
    prune.l1_unstructured(net[1], "weight", 0.5)
    return net


NOT = "no Linear or Conv weight"
PRUNED = {  # a model, its data, how many layers are pruned, what is left alone
    "torchvision ResNet": (partial(zoo.ResNet, zoo.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4), images, 13, {}),
    "torchvision MobileNet": (mobilenet, images, 14, {}),
    "torchvision EfficientNet": (efficientnet, images, 17, {}),
    "torchvision ViT": (partial(zoo.VisionTransformer, 16, 4, 2, 2, 8, 16, num_classes=4), images, 8, {
        f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight": f"MultiheadAttention: {NOT}" for i in (0, 1)
    } | {"class_token": f"VisionTransformer: {NOT}", "encoder.pos_embedding": f"Encoder: {NOT}"}),
    "grouped and depthwise": (
        lambda: head(6, nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 3, groups=6)), images, 3, {}
    ),
    "transposed": (
        lambda: head(5, nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 5, 3)), images, 2,
        {"1.weight": f"ConvTranspose2d: {NOT}"},
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), words, 1, {
        "embed.weight": f"Embedding: {NOT}", "rnn.weight_ih_l0": f"LSTM: {NOT}", "rnn.weight_hh_l0": f"LSTM: {NOT}"
    }),
    "GRU": (lambda: Recurrent(nn.GRU), words, 1, {
        "embed.weight": f"Embedding: {NOT}", "rnn.weight_ih_l0": f"GRU: {NOT}", "rnn.weight_hh_l0": f"GRU: {NOT}"
    }),
    "Transformer, tied embedding": (Encoder, words, 7, {
        f"encoder.layers.{i}.self_attn.in_proj_weight": f"MultiheadAttention: {NOT}" for i in (0, 1)
    }),
    "MultiheadAttention": (Attention, images, 2, {"attend.in_proj_weight": f"MultiheadAttention: {NOT}"}),
    "weight_norm": (
        lambda: on_pixels(parametrizations.weight_norm(nn.Linear(768, 8))), images, 1,
        {f"1.parametrizations.weight.original{i}": "its weight is made of other tensors" for i in (0, 1)},
    ),
    "spectral_norm": (lambda: on_pixels(parametrizations.spectral_norm(nn.Linear(768, 8))), images, 2, {}),
    "spectral_norm as a hook": (
        lambda: on_pixels(spectral_norm(nn.Linear(768, 8))), images, 1,
        {"1.weight_orig": "its weight is made of other tensors"},
    ),
    "frozen layer": (lambda: on_pixels(nn.Linear(768, 8).requires_grad_(False)), images, 1, {"1": "frozen"}),
    "DataParallel": (lambda: nn.DataParallel(on_pixels(nn.Linear(768, 8))), images, 2, {}),
    "bfloat16": (lambda: on_pixels(nn.Linear(768, 8)).bfloat16(), images, 2, {}),
    "float16": (lambda: on_pixels(nn.Linear(768, 8)).half(), images, 2, {}),
}  # fmt: skip
REFUSED = {
    "lazy": (
        lambda: on_pixels(nn.LazyLinear(8)),
        "Invalid model: '1.weight' is lazy, without a shape; run one batch through",
    ),
    "meta": (
        lambda: on_pixels(nn.Linear(768, 8)).to("meta"),
        "Invalid model: '1.weight' is on the meta device, without values",
    ),
    "torch.nn.utils.prune": (
        torch_pruned,
        "Layer '1' is pruned by torch.nn.utils.prune: call torch.nn.utils.prune.remove",
    ),
    "nothing to prune": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "Nothing prunable in Sequential (0.weight: ConvTranspose2d: no Linear or Conv weight).",
    ),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned(name):
    """By magnitude, at half the density; a second method that learns its mask, and SNIP where there are gradients."""
    make, examples, layers, left = PRUNED[name]
    torch.manual_seed(0)
    net = make()
    zeros = name == "torchvision ViT"  # its head begins as zeros, and is all that collapses
    with pytest.warns(UserWarning, match="no weight is kept in heads.head;") if zeros else contextlib.nullcontext():
        found = lottery.prune(net, examples(), "magnitude", 0.5, recipe=ONE_STEP, progress=False, pretrained=True)
    assert len(found.masks) == layers
    assert found.left == left
    n = sum(m.numel() for m in found.masks.values())
    assert found.density == (n - round(0.5 * n)) / n
    weights = {layer: module.weight.detach() for layer, module in M.prunable(found.model).items()}
    assert not any(weights[layer][~m].any() for layer, m in found.masks.items())
    assert found.layers["MACs"].min() > 0
    if name == "spectral_norm":  # which a method that learns its mask cannot keep
        with pytest.raises(ValueError, match=r"^Layer '[^']+' carries a _SpectralNorm, which dnw cannot keep: "):
            lottery.prune(net, examples(), "dnw", 0.5, recipe=ONE_STEP, progress=False)
        return
    moved = lottery.prune(net, examples(), "dnw", 0.5, recipe=ONE_STEP, progress=False)
    assert moved.density == pytest.approx(0.5, abs=layers / n)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, line = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        lottery.prune(make(), images(), "magnitude", 0.5, recipe=ONE_STEP, progress=False)
