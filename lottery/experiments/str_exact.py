"""What STR's published budgets and settings say without any training (Kusupati et al., ICML 2020, PMLR 119).

The sparsity of every layer is printed: of 16 ResNet-50s trained with STR (Table 6), of six ways to remove 90 % of it
(Table 7) and of two MobileNetV1s (Table 8). With the weights and MACs of the layers, as `lottery.macs` counts them,
they give the columns of the other tables again. λ and s_init are printed, too (Tables 10 and 11): with the recipe they
say when pruning starts.

Budgets by name: of ResNet-50 a sparsity in % as printed, such as "90.23", "uniform", "erk", "snfs", "vd" (variational
dropout) and "gs" (one threshold for all layers); of MobileNetV1 "89.01" and "gmp"; "dense" removes nothing.
"""

import functools
import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch

from lottery import macs, models, scorecard
from lottery import masks as M
from lottery.soft_threshold import ONSET, SoftThreshold, decay_path
from lottery.training import Recipe

IMAGENET = (3, 224, 224)
STEPS = 5005  # minibatches of 256 in an epoch of 1,281,167 images, the last one smaller
METHODS = ("90.23", "uniform", "erk", "snfs", "vd", "gs")  # the six budgets of Table 7


class Layer(NamedTuple):
    """Weights of a layer, and MACs for one image."""

    weights: int
    macs: int


@functools.cache
def layers(net: str) -> dict[str, Layer]:
    """`{layer: Layer}` of resnet50 or mobilenetv1 at 224x224, counted on shapes alone."""
    with torch.device("meta"):
        model = models.MODELS[net]()
    counted = macs.count(model, IMAGENET)
    return {name: Layer(layer.weight.numel(), counted[name]) for name, layer in M.prunable(model).items()}


@functools.cache
def budgets(net: str) -> dict[str, dict[str, float]]:
    """`{budget: {layer: fraction kept}}` as published, and "dense"."""
    table = scorecard.read("str", "_budgets")
    table = table[table["model"] == net]
    found = {"dense": dict.fromkeys(layers(net), 1.0)}
    for budget, rows in table.groupby("budget", sort=False):
        found[budget] = dict(zip(rows["layer"], 1 - rows["sparsity"].astype(float) / 100, strict=True))
    return found


def left(net: str, budget: str) -> dict[str, Layer]:
    """`{layer: Layer}` of what a budget leaves. Raises ValueError for one that is not published."""
    if budget not in (known := budgets(net)):
        raise ValueError(f"Unknown budget {budget!r} of {net}: choose one of {', '.join(known)}.")
    kept = known[budget]
    return {name: Layer(kept[name] * w, kept[name] * n) for name, (w, n) in layers(net).items()}


def macs_left(net: str, budget: str) -> float:
    """Millions of MACs for one image."""
    return sum(layer.macs for layer in left(net, budget).values()) / 1e6


def weights_left(net: str, budget: str) -> float:
    """Millions of weights."""
    return sum(layer.weights for layer in left(net, budget).values()) / 1e6


def sparsity(net: str, budget: str, backbone: bool = False) -> float:
    """% of the weights removed: of all layers, or with `backbone` of all but the classifier."""
    here, all_ = (list(some.values())[: -1 if backbone else None] for some in (left(net, budget), layers(net)))
    return 100 * (1 - sum(layer.weights for layer in here) / sum(layer.weights for layer in all_))


def backbone_sparsity(net: str, budget: str) -> float:
    """`sparsity` of all layers but the classifier."""
    return sparsity(net, budget, backbone=True)


def parameters(net: str, budget: str = "dense") -> float:
    """Millions of parameters, those of batch norm with them."""
    with torch.device("meta"):
        total = sum(p.numel() for p in models.MODELS[net]().parameters()) / 1e6
    return total - weights_left(net, "dense") + weights_left(net, budget)


COLUMNS = {
    "MACs, M": macs_left,
    "weights, M": weights_left,
    "sparsity, %": sparsity,
    "backbone sparsity, %": backbone_sparsity,
}


def column(item: str, quantity: str) -> list[tuple[str, float, float, bool]]:
    """[(budget, printed, ours, agrees)]: what an item prints of STR's ResNet-50s, beside what their budgets give.

    They agree when ours rounds to the printed digit for some budget that rounds to the published one, which is known to
    ±0.005 % of every layer.
    """
    table = scorecard.read("str")
    table = table[(table["item"] == item) & (table["panel"] == quantity) & (table["series"] == "resnet50/str")]
    dense = COLUMNS[quantity]("resnet50", "dense") if quantity.endswith("M") else 100
    rows = []
    for _, row in table.iterrows():
        budget = f"{float(row['x']):.2f}"
        if budget in budgets("resnet50"):
            ours = COLUMNS[quantity]("resnet50", budget)
            agrees = abs(ours - row["value"]) <= row["error"] + 0.00005 * dense + 1e-9
            rows.append((budget, row["value"], ours, bool(agrees)))
    return rows


# When pruning starts --------------------------------------------------------------------------------------------------


def recipe(weight_decay: float, epochs: int = 100) -> Recipe:
    """The paper's ImageNet schedule with an epoch as one step, as far as decay is concerned: λ · 5,005 for λ."""
    return Recipe(
        optimizer="sgd", lr=0.256, momentum=0.875, batch_size=256, iterations=epochs, eval_every=1, warmup=5,
        schedule="cosine", weight_decay=STEPS * weight_decay,
    )  # fmt: skip


def pull() -> float:
    """Σ lr / (1 − momentum) over the paper's 500,500 iterations: times λ it is by how much decay shrinks log |s|."""
    r = recipe(0.0)
    return STEPS * sum(r.lr_at(t) for t in range(r.iterations)) / (1 - r.momentum)


@functools.cache
def settings(net: str) -> dict[str, tuple[float, float]]:
    """`{sparsity in %, as printed: (λ, s_init)}` of the paper's networks, by Tables 10 and 11."""
    table = scorecard.read("str")
    found = {}
    for name in ("weight decay", "s_init"):
        rows = table[(table["panel"] == name) & (table["series"] == f"{net}/str")]
        for x, v in zip(rows["x"], rows["value"], strict=True):
            found.setdefault(f"{float(x):.2f}", []).append(float(v))
    return {budget: tuple(pair) for budget, pair in found.items()}


def path(net: str, budget: str) -> np.ndarray:
    """s after 0 … 100 epochs by decay alone, float64 [101], for the λ and s_init of a published network."""
    weight_decay, s_init = settings(net)[budget]
    return decay_path(s_init, recipe(weight_decay))


def crossing(s: Sequence[float] | np.ndarray, level: float = ONSET) -> float:
    """Epochs after which s first reaches a level, between two ends of epochs by interpolation in log |s|; else NaN."""
    (above,) = np.nonzero(np.asarray(s) >= level)
    if not len(above) or not above[0]:
        return math.nan
    i = above[0]
    a, b = np.log(-np.asarray(s[i - 1 : i + 1]))
    return float(i - 1 + (a - math.log(-level)) / (a - b))


def onset(net: str, budget: str) -> float:
    """Epochs until pruning starts, s = −10, by decay alone."""
    return crossing(path(net, budget))


def in_order(net: str) -> tuple[int, int]:
    """(pairs that are in the order that the decay law says, all such pairs) of the published networks of a net.

    A pair has one λ or one s_init in common: the network that starts pruning earlier should end sparser.
    """
    found = settings(net)
    pairs = [
        (a, b) for a, b in combinations(found, 2) if sum(x == y for x, y in zip(found[a], found[b], strict=True)) == 1
    ]
    right = [(onset(net, a) < onset(net, b)) == (float(a) > float(b)) for a, b in pairs]
    return sum(right), len(right)


def figure1() -> np.ndarray:
    """s of layer 10 after each epoch as Figure 1 draws its α: logit α, float64 [100], −inf where α is 0."""
    table = scorecard.read("str")
    alpha = table[(table["item"] == "Figure 1") & (table["panel"] == "alpha")].sort_values("x")["value"].to_numpy()
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log1p(-alpha)


# What the claims ask for ----------------------------------------------------------------------------------------------


def _of(function):
    """A function of (net, budget) as one of an arm "net@budget/control"."""

    def compute(arm):
        net, _, budget = arm.split("/")[0].partition("@")
        return function(net, budget or "dense")

    return compute


def _agreeing(item, quantity):
    return lambda arm: sum(agrees for *_, agrees in column(item, quantity))


def _uniform(net, sparsity, first_dense=False):
    """Millions of MACs that one sparsity in all layers, or in all but the first, leaves."""
    total, first = macs_left(net, "dense"), next(iter(layers(net).values())).macs / 1e6
    kept = 1 - float(sparsity) / 100
    return kept * (total - first) + first if first_dense else kept * total


def _saved(net, pair, first_dense=False):
    """Millions of MACs that a published budget takes fewer than a uniform one: "80-79.55", both in % removed."""
    uniform, learnt = pair.split("-")
    return _uniform(net, uniform, first_dense) - macs_left(net, learnt)


def _fewer(net, pair):
    """Millions of MACs that the first of two published budgets takes fewer than the second: "89.01-gmp"."""
    first, second = pair.split("-")
    return macs_left(net, second) - macs_left(net, first)


def _soft(arm):
    """S(w, s) for α = 2: "toy@3/soft" is S at w = 3, "toy@3/hard" what a mask |w| > 2 lets through."""
    w = torch.tensor([float(arm.split("/")[0].split("@")[1])], dtype=torch.float64)
    if arm.endswith("hard"):
        return (w * (w.abs() > 2)).item()
    return SoftThreshold(math.log(2), g="exp").double()(w).item()


EXACT = {
    "MACs, M": _of(macs_left),
    "MACs of a uniform budget, M": _of(_uniform),
    "MACs of a uniform budget with the first layer dense, M": _of(functools.partial(_uniform, first_dense=True)),
    "MACs saved, M": _of(_saved),
    "MACs saved beside a dense first layer, M": _of(functools.partial(_saved, first_dense=True)),
    "MACs fewer, M": _of(_fewer),
    "MACs beside uniform": _of(lambda net, budget: macs_left(net, budget) / macs_left(net, "uniform")),
    "weights, M": _of(weights_left),
    "parameters, M": _of(parameters),
    "sparsity, %": _of(sparsity),
    "backbone sparsity, %": _of(backbone_sparsity),
    "layers left dense": _of(lambda net, budget: sum(d == 1 for d in budgets(net)[budget].values())),
    "methods with fewer MACs": _of(lambda net, b: sum(macs_left(net, m) < macs_left(net, b) for m in METHODS)),
    "printed MACs that agree": _agreeing("Table 1", "MACs, M"),
    "printed weights that agree": _agreeing("Table 1", "weights, M"),
    "printed sparsities that agree": _agreeing("Table 6", "sparsity, %"),
    "printed backbone sparsities that agree": _agreeing("Table 6", "backbone sparsity, %"),
    "plotted MACs that agree": _agreeing("Figure 5", "MACs, M"),
    "onset of pruning, epochs": _of(onset),
    **{f"s after epoch {e}": _of(lambda net, budget, e=e: path(net, budget)[e]) for e in (25, 26, 27, 28)},
    "pairs in the order of their onsets": _of(lambda net, _: in_order(net)[0]),
    "thresholded weight": _soft,
}
