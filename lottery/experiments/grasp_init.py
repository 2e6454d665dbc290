"""What GraSP does before any training: figures 1, 2 right and 3 of Wang, Zhang & Grosse (arXiv 2002.07376), measured.

A `Pruning` is one network pruned at initialisation and what is left of it; nothing is trained. The engine computes it
once and the store keeps it like a run. Its defaults are the paper's ResNet-32 (widths doubled) on CIFAR-10, scored as
the authors' driver does: temperature 200, ten augmented images of each class sorted by class and cut in half, the
classifier of the scored copy drawn anew. SNIP scores the same copy on the same images.

What the paper does not state of figure 2: the data set; whether the norm or its square is drawn; and whether the
gradient is that of the network that will be trained or of the copy that was scored, whose classifier is larger. Both
are measured, on a random subset of the training images in minibatches of 128, the same for all criteria of a trial.
"""

import dataclasses
import functools
import itertools
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lottery import baselines, data, grasp, models
from lottery import masks as M
from lottery.experiments.runs import Measurement
from lottery.methods import need, whole

if TYPE_CHECKING:
    import pandas as pd

CRITERIA = ("grasp", "snip", "random", "magnitude", "dense")
SKETCH = 32_768  # places at which the mask is kept, for overlaps


@dataclass(frozen=True)
class Pruning(Measurement):
    """A network pruned at initialisation: weights left per layer and, of so many training images, the gradient norm.

    model, dataset, options: as of a Run. seed: the trial; draws θ₀, the images and the copy's classifier.
    criterion, density: what is kept; "dense" keeps all.
    temperature, per_class, chunks, class_sorted, reinit_linear, augment: how the copy is scored, as of a Run but that
        halves which are not sorted by class are drawn by lot, where a Run's chunks have as many images of each class.
        Whatever the chunks, the images are the same. `batch` tells draws of other images apart.
    images: training images that the gradient norm is measured on, not augmented; 0 measures none.
    kernel: images, one a class in turn, that the tangent kernel is computed on; 0 for none.
    """

    model: str = "resnet32"
    dataset: str = "cifar10"
    options: tuple[tuple[str, object], ...] = (("init", "kaiming fan_out"), ("width", 32))
    seed: int = 0
    criterion: str = "grasp"
    density: float = 0.05
    temperature: float = 200.0
    per_class: int = 10
    chunks: int = 2
    class_sorted: bool = True
    reinit_linear: bool = True
    augment: bool = True
    batch: int = 0
    images: int = 0
    kernel: int = 0

    versions = ("grasp", "baselines")

    def __post_init__(self):
        super().__post_init__()
        need(self, "criterion", self.criterion in CRITERIA, f"give one of {', '.join(CRITERIA)}")
        for name, least in (("seed", 0), ("batch", 0), ("images", 0), ("kernel", 0), ("chunks", 1)):
            whole(name, getattr(self, name), least)
        need(self, "chunks", self.chunks == 1 or self.chunks % 2 == 0, "give 1 or an even number")

    def network(self) -> nn.Module:
        return models.on_set(self.model, self.dataset, self.options, self.seed)

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The chunks that are scored: every pair of them is one draw of the same number of images of each class."""
        generator, draws = _generator("scored", self.seed, self.batch), (self.chunks + 1) // 2
        chunks = []
        for x, y in grasp.class_balanced(
            _images(self.dataset), self.per_class, generator, draws=draws, augment=self.augment
        ):
            order = torch.arange(len(y)) if self.class_sorted else torch.randperm(len(y), generator=generator)
            chunks += [(x[part], y[part]) for part in order.tensor_split(self.chunks // draws)]
        return chunks

    def scores(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """{layer: scores}, higher = keep."""
        net = self.network()
        if self.criterion == "random":
            return baselines.random_scores(net, _generator("random", self.seed))
        if self.criterion == "magnitude":
            return baselines.magnitude_scores(net)
        net = self.copy(net).to(device) if self.reinit_linear else net.to(device)
        if self.criterion == "snip":
            return baselines.snip_scores(net, self.batches())
        return grasp.scores(net, self.batches(), self.temperature)

    def copy(self, net: nn.Module) -> nn.Module:
        """The network with the classifier that the authors' driver draws for the copy that it scores."""
        return grasp.with_xavier_linear(net, _generator("classifier", self.seed))

    def measure(self, device: str = "cpu") -> dict[str, str | float | bytes]:
        """The columns of the store's row."""
        images, net = _images(self.dataset), self.network()
        m = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in M.prunable(net).items()}
        if self.criterion != "dense":
            scored = dataclasses.replace(self, density=1.0, images=0, kernel=0)
            m = M.top_k(_scores(scored, device), self.density)
        net = M.attach(net, m).to(device)
        values = {}
        if self.images:
            order = torch.randperm(len(images.train.y), generator=_generator("gradient", self.seed))[: self.images]
            batches = [_standardised(images, part) for part in order.split(128)]
            copy = M.attach(self.copy(self.network()), m).to(device)
            for name, of in (("gradient_norm", net), ("copy_gradient_norm", copy)):
                values[name] = norm = grasp.gradient_norm(of.to(memory_format=torch.channels_last), batches)
                values[f"{name}_squared"] = norm**2
        if self.kernel:
            order = torch.cat([(images.train.y == c).nonzero()[: self.kernel] for c in range(images.classes)])
            order = order.view(images.classes, -1).T.flatten()[: self.kernel]
            values |= kernel(net, self.network(), *_standardised(images, order))
        return {
            "fingerprint": images.fingerprint,
            "density": M.density(m),
            "layers": json.dumps({name: [int(t.sum()), t.numel()] for name, t in m.items()}),
            "values": json.dumps(values),
            "sketch": sketch(m),
        }


def kernel(net: nn.Module, dense: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """How much of the tangent kernel Θ is left, on average and along the output gradient v = ∂L/∂Z (section 4).

    ‖g‖² = vᵀΘv = Σ λ_i (u_iᵀv)². "trace": Σ λ_i. "along_gradient": vᵀΘv of the network's own v, "gradient": ‖v‖²;
    "along_dense": the same for the v of the network before pruning.
    """
    theta = grasp.ntk(net, x)
    v, v_dense = output_gradient(net, x, y), output_gradient(dense, x, y)
    energy = {"trace": theta.trace(), "along_gradient": v @ theta @ v, "gradient": v @ v}
    energy |= {"along_dense": v_dense @ theta @ v_dense, "gradient_dense": v_dense @ v_dense}
    return {f"kernel_{name}": float(value) for name, value in energy.items()}


def output_gradient(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """∂L/∂Z of the mean cross-entropy, flat [B·K]: (softmax(Z) − one-hot) / B, in training mode."""
    with torch.no_grad():
        Z = grasp.scored_copy(net)[0](x)
        return ((F.softmax(Z, 1) - F.one_hot(y, Z.shape[1])) / len(y)).flatten()


def sketch(masks: dict[str, torch.Tensor]) -> bytes:
    """Packed bits of the masks at SKETCH places, the same for masks of the same shapes, deflated."""
    bits = torch.cat([m.flatten() for m in masks.values()])
    places = torch.randint(len(bits), (SKETCH,), generator=torch.Generator().manual_seed(0))
    return zlib.compress(np.packbits(bits[places].numpy()).tobytes(), 9)


def overlap(a: bytes, b: bytes) -> float:
    """Share of the weights of one sketched mask that the other keeps, for masks of one density; ± about 1 point."""
    a, b = (np.unpackbits(np.frombuffer(zlib.decompress(s), dtype=np.uint8)).astype(bool) for s in (a, b))
    return float((a & b).sum() / max(a.sum(), b.sum()))


def _generator(*what):
    """A stream of its own for every purpose and trial."""
    return torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))


def _standardised(images, index):
    return images.standard(images.train.x[index]), images.train.y[index]


@functools.lru_cache(maxsize=2)
def _images(name):
    return data.load(name, valid=0)


@functools.lru_cache(maxsize=2)
def _scores(scored, device):
    """One scoring serves all densities of a trial."""
    return {name: s.cpu() for name, s in scored.scores(device).items()}


# Figure 1 -------------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Figure 1 in numbers: a linear network, two inputs, two hidden units, one output beside a logit of zero.

    On the input (1, 1) the first hidden unit is 1·1 − 1·1 = 0, so no gradient reaches the weight behind it.
    """

    def __init__(self):
        super().__init__()
        self.incoming, self.outgoing = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.incoming.weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.5]]))
            self.outgoing.weight.copy_(torch.tensor([[1.0, 1.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(self.outgoing(self.incoming(x)), (0, 1))


def toy(
    criterion: str, temperature: float = 1.0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """(scores, masks, gradient of each incoming weight of the unit): one of the toy's six weights is removed."""
    net, batches = Toy().double(), [(torch.ones(1, 2, dtype=torch.float64), torch.tensor([0]))]
    score = grasp.scores(net, batches, temperature) if criterion == "grasp" else baselines.snip_scores(net, batches)
    kept = M.top_k(score, 5 / 6)
    _, g = grasp.summed_gradient(M.attach(net, kept), batches)
    return score, kept, (g["incoming"][0] * kept["incoming"][0]).tolist()


# How strong the paper's own evidence is -------------------------------------------------------------------------------


def printed_tests(reported: "pd.DataFrame", a: str = "grasp", b: str = "snip", n: int = 3) -> "pd.DataFrame":
    """Welch's t-test of the printed mean ± deviation of two arms in each cell, and which pass alone after Holm.

    reported: of `scorecard.reported("grasp")`. n: trials behind each number (3 is remembered, the paper's text is not
    at hand). Printed deviations are taken as sample deviations.

    Returns a pandas.DataFrame: item, net, x, difference a − b in points, t, freedom, p, holm.
    """
    import pandas as pd
    from scipy import stats

    from lottery import claims

    p = reported[(reported["provenance"] == "paper") & reported["error"].notna() & (reported["unit"] == "%")]
    p = p.assign(net=p["series"].str.split("/").str[0], arm=p["series"].str.split("/").str[1])
    cells = p[p["arm"] == a].merge(p[p["arm"] == b], on=["item", "net", "x"], suffixes=("_a", "_b"))
    test = stats.ttest_ind_from_stats(
        cells["value_a"], cells["error_a"], n, cells["value_b"], cells["error_b"], n, equal_var=False
    )
    va, vb = cells["error_a"] ** 2 / n, cells["error_b"] ** 2 / n
    freedom = (va + vb) ** 2 / ((va**2 + vb**2) / (n - 1))
    found = cells[["item", "net", "x"]].assign(difference=cells["value_a"] - cells["value_b"])
    found = found.assign(t=test.statistic, freedom=freedom, p=test.pvalue)
    return pd.DataFrame(found.assign(holm=claims.holm(found["p"].to_numpy())))


# What is measured -----------------------------------------------------------------------------------------------------

DENSITIES = (0.2, 0.1, 0.05, 0.04, 0.03, 0.02)  # figure 2: 80, 90, 95, 96, 97, 98 % removed
PLAIN = (("init", "kaiming fan_out"),)
NETS = {
    "resnet32-c10": Pruning(),
    "resnet32-c100": Pruning(dataset="cifar100", chunks=4),
    "vgg19-c10": Pruning("vgg19", options=PLAIN),
    "vgg19-c100": Pruning("vgg19", "cifar100", PLAIN),
    "resnet8-c10": Pruning("resnet8", options=PLAIN),
}
VARIANTS = {  # what the authors' driver does, and one thing otherwise
    "driver": {},
    "T = 1": {"temperature": 1.0},
    "own classifier": {"reinit_linear": False},
    "shuffled halves": {"class_sorted": False},
    "one batch": {"chunks": 1},
    "not augmented": {"augment": False},
    "other images": {"batch": 1},
}

# What each item prunes: (criterion, density, variant).
GRADIENTS = [("dense", 1.0, "driver"), *itertools.product(("grasp", "snip", "random"), DENSITIES, ("driver",))]
ITEMS = {
    "fig2right": GRADIENTS,
    "fig3": list(itertools.product(("grasp", "snip"), (0.05,), ("driver", "own classifier"))),
    "variants": [("dense", 1.0, "driver"), *(("grasp", 0.05, v) for v in VARIANTS)],
    "images": [("dense", 1.0, "driver"), *((c, 0.05, "driver") for c in ("grasp", "snip", "random"))],
    "kernel": [("dense", 1.0, "driver"), *itertools.product(("grasp", "snip", "random"), (0.2, 0.05), ("driver",))],
}


@dataclass(frozen=True)
class Plan:
    """What is measured at one scale.

    nets: the first trial's Pruning of each network. trials: {item: {network: number of trials}}. images: {item: images
    that the gradient is measured on}. kernel: images of the item "kernel". densities: in place of every item's own.
    ranked: what the arm "grasp" ranks by.
    """

    nets: dict[str, Pruning]
    trials: dict[str, dict[str, int]]
    images: dict[str, int]
    kernel: int = 10
    densities: tuple[float, ...] | None = None
    ranked: str = "grasp"

    def cells(self, item: str) -> list[tuple[dict[str, str | float], Pruning]]:
        """[(labels, Pruning)]; labels are net, seed, criterion, variant, and sparsity in %."""
        found = {}
        for net, trials in self.trials[item].items():
            first = dataclasses.replace(
                self.nets[net], images=self.images.get(item, 0), kernel=self.kernel if item == "kernel" else 0
            )
            for trial, (criterion, density, variant) in itertools.product(range(trials), ITEMS[item]):
                for d in (density,) if criterion == "dense" or not self.densities else self.densities:
                    changes = VARIANTS[variant] if criterion in ("grasp", "snip") else {}
                    ranked = self.ranked if criterion == "grasp" else criterion
                    p = dataclasses.replace(first, seed=first.seed + trial, criterion=ranked, density=d, **changes)
                    labels = {"net": net, "seed": p.seed, "criterion": criterion, "variant": variant}
                    found[tuple(labels.values()), d] = (labels | {"sparsity": round(100 * (1 - d), 6)}, p)
        return list(found.values())

    def prunings(self, item: str) -> list[Pruning]:
        return list(dict.fromkeys(p for _, p in self.cells(item)))

    def changed(self, given: dict[str, Any]) -> "Plan":
        """The plan with a notebook's parameters, those of them that it has."""
        fields = ("model", "dataset", "seed", "temperature", "per_class", "chunks", "class_sorted")
        changes = {name: given[name] for name in fields if name in given}
        if "model" in changes:  # the width is an option of the ResNets
            changes["options"] = PLAIN
        if changes.get("dataset") == "digits":
            changes["augment"] = False
        nets = {net: dataclasses.replace(p, **changes) for net, p in self.nets.items()}
        trials = self.trials
        if "trials" in given:
            trials = {item: dict.fromkeys(nets, given["trials"]) for item, nets in trials.items()}
        densities = tuple(given["densities"]) if "densities" in given else None
        return dataclasses.replace(
            self, nets=nets, trials=trials, densities=densities, ranked=given.get("criterion", self.ranked)
        )


ALL = ("resnet32-c10", "vgg19-c10", "resnet32-c100", "vgg19-c100")
PLANS = {
    "paper": Plan(
        NETS,
        trials={
            "fig2right": {"resnet32-c10": 10, "resnet32-c100": 10},
            "fig3": dict.fromkeys(ALL, 5),
            "variants": {"resnet32-c10": 5, "vgg19-c10": 5},
            "images": {"resnet32-c10": 5},
            "kernel": {"resnet8-c10": 5},
        },
        images=dict.fromkeys(("fig2right", "variants", "images"), 50_000),
    ),
    "laptop": Plan(
        NETS,
        trials={
            "fig2right": {"resnet32-c10": 10},
            "fig3": {"resnet32-c10": 5, "vgg19-c10": 5, "resnet32-c100": 1, "vgg19-c100": 1},
            "variants": {"resnet32-c10": 1, "vgg19-c10": 1},
            "images": {"resnet32-c10": 1},
            "kernel": {"resnet8-c10": 5},
        },
        images={"fig2right": 128, "variants": 128, "images": 1024},
    ),
    "smoke": Plan(
        {"resnet32-c10": Pruning("resnet8", "digits", (*PLAIN, ("width", 8)), augment=False)},
        trials={item: {"resnet32-c10": 2} for item in ITEMS},
        images={"fig2right": 128, "variants": 128, "images": 256},
        kernel=3,
    ),
}


def relative(frame: "pd.DataFrame", quantity: str = "gradient_norm") -> "pd.DataFrame":
    """A chapter's frame with `ratio`, the quantity over that of the dense network of the same trial."""
    dense = frame[frame["criterion"] == "dense"].set_index(["net", "seed"])[quantity].rename("whole")
    pruned = frame[frame["criterion"] != "dense"].join(dense, on=["net", "seed"])
    return pruned.assign(ratio=pruned[quantity] / pruned["whole"]).drop(columns="whole")
