"""The references: loops as a reader would write them, every mask multiplied in every forward pass.

(a) public practice: a DataLoader in the main process that transforms one picture at a time, for training and for
    evaluation. (b) eager: the same network and steps, the images ready as normalised float tensors on the device.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

EVAL_BATCH = 1000


class MaskedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedConv(nn.Conv2d):
    def forward(self, x):
        if x.dim() == 2:  # a classifier written as a 1×1 convolution
            return F.linear(x, (self.weight * self.mask).flatten(1), self.bias)
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class GatedConv(nn.Conv2d):
    """Continuous Sparsification: soft mask σ(βs) / σ(s0), with s0 = 0."""

    beta = 1.0

    def forward(self, x):
        return self._conv_forward(x, self.weight * torch.sigmoid(self.beta * self.s) * 2, self.bias)


def masked(net, masks=None):
    """A copy whose Linear and Conv2d layers multiply their weight by a mask, of ones where none is given."""
    net = copy.deepcopy(net)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.__class__ = MaskedLinear if isinstance(layer, nn.Linear) else MaskedConv
            layer.register_buffer("mask", torch.ones_like(layer.weight) if masks is None else masks[name].float())
    return net


def gated(net):
    """A copy whose Conv2d layers have a gate."""
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = GatedConv
            layer.s = nn.Parameter(torch.zeros_like(layer.weight))
    return net


def l1(net):
    return sum(
        (torch.sigmoid(layer.beta * layer.s) * 2).sum() for layer in net.modules() if isinstance(layer, GatedConv)
    )


class Pictures(Dataset):
    """Pictures one by one through torchvision's transforms, as its own datasets give them."""

    def __init__(self, split, transform):
        self.pixels = split.x.movedim(1, -1).squeeze(-1).numpy()  # [N, H, W] or [N, H, W, 3]
        self.labels, self.transform = split.y.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def loader(split, batch_size, recipe, data, train):
    """(a): a DataLoader with num_workers=0, as most public code has it by default."""
    from torchvision import transforms as T

    steps = [T.ToTensor()]
    if recipe.augment == "flip-crop" and train:
        steps = [T.RandomCrop(split.x.shape[-1], padding=4), T.RandomHorizontalFlip(), *steps]
    if recipe.inputs == "standard":
        steps.append(T.Normalize(data.mean, data.std))
    return DataLoader(Pictures(split, T.Compose(steps)), batch_size, shuffle=train, drop_last=train)


class Tensors:
    """(b): minibatches of float tensors that lie on the device already."""

    def __init__(self, split, batch_size, recipe, data, train, device):
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
        x = split.x / 255
        self.x, self.y = (x if recipe.inputs == "unit" else (x - mean) / std).to(device), split.y.to(device)
        self.size, self.train = batch_size, train

    def __iter__(self):
        n = len(self.y)
        order = torch.randperm(n, device=self.y.device) if self.train else torch.arange(n, device=self.y.device)
        for i in range(0, n - self.size + 1 if self.train else n, self.size):
            yield self.x[order[i : i + self.size]], self.y[order[i : i + self.size]]


def training(net, data, recipe, kind, device="cpu", regulariser=None):
    """A function n → n further steps, with all held-out images evaluated as often as the recipe says."""

    def batches(split, size, train):
        if kind == "DataLoader":
            return loader(split, size, recipe, data, train)
        return Tensors(split, size, recipe, data, train, device)

    net = net.to(device).train()
    train = batches(data.train, recipe.batch_size, True)
    held_out = [batches(split, EVAL_BATCH, False) for split in (data.valid, data.test) if len(split)]
    if recipe.optimizer == "adam":
        opt = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    else:
        options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "nesterov": recipe.nesterov}
        opt = torch.optim.SGD(net.parameters(), lr=recipe.lr, **options)

    def endless():
        while True:
            yield from train

    stream = endless()

    def steps(n):
        for t in range(1, n + 1):
            x, y = next(stream)
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(net(x), y)
            if regulariser:
                loss = loss + regulariser(net)
            opt.zero_grad()
            loss.backward()
            opt.step()
            if t % recipe.eval_every == 0:
                net.eval()
                with torch.no_grad():
                    for part in held_out:
                        evaluate(net, part, device)
                net.train()

    return steps


def evaluate(net, batches, device):
    """(mean loss, accuracy)."""
    loss = right = n = 0
    for x, y in batches:
        x, y = x.to(device), y.to(device)
        logits = net(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
        n += len(y)
    return loss / n, right / n


def prune(net, rate):
    """Masks after removing the smallest `rate` of each layer's surviving weights."""
    masks = {}
    for name, layer in net.named_modules():
        if isinstance(layer, MaskedLinear | MaskedConv):
            alive = layer.mask.bool()
            size = layer.weight.detach().abs()
            threshold = size[alive].sort().values[int(rate * alive.sum())]
            masks[name] = alive & (size >= threshold)
    return masks


# Scores ---------------------------------------------------------------------------------------------------------------


def grasp(net, x, y, temperature=200.0):
    """θ ⊙ Hg from one graph that is kept: the textbook double backward."""
    net = copy.deepcopy(net).train()
    w = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    g = torch.autograd.grad(F.cross_entropy(net(x) / temperature, y), w, create_graph=True)
    Hg = torch.autograd.grad(sum((a.detach() * a).sum() for a in g), w)
    return [v.detach() * h for v, h in zip(w, Hg, strict=True)]


def snip(net, x, y):
    """|∂L/∂c| at c = 1, with c multiplied into every weight, over its sum."""
    net = masked(net).train()
    masks = [layer.mask.requires_grad_() for layer in net.modules() if isinstance(layer, MaskedLinear | MaskedConv)]
    g = [g.abs() for g in torch.autograd.grad(F.cross_entropy(net(x), y), masks)]
    return [v / sum(v.sum() for v in g) for v in g]
