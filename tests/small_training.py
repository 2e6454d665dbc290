"""A training of a second at most: random images, a small network of either kind, recipes of 14 iterations."""

import torch
from torch import nn

from lottery import training
from lottery.data import Data, Split

SGD = training.Recipe(
    optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=10, iterations=14, eval_every=2, inputs="unit"
)
ADAM = training.Recipe(optimizer="adam", lr=0.01, batch_size=10, iterations=14, eval_every=2)


def mlp(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8), nn.ELU(), nn.Linear(8, 5)
    return nn.Sequential(nn.Flatten(), *layers).double()


def convnet(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    rest = nn.Conv2d(4, 6, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(6, 5)
    return nn.Sequential(*first, *rest).double()


def images(n=60):
    """Random images of five classes, uint8 [n, 1, 4, 4], a third of them for validation and as many for the test."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = torch.arange(n) % 5
    parts = [Split(x[a : a + n // 3], y[a : a + n // 3]) for a in range(0, n, n // 3)]
    return Data("random", *parts, "", 5, (0.5,), (0.25,))


def trained(model, recipe, method, **options):
    """The history of a training of these images; the model is trained in place."""
    return training.fit(model, images(), recipe, seed=3, method=method, **options)
