"""What to run for STR (Kusupati et al., ICML 2020): thresholds that are learnt, beside masks that follow a schedule.

A `Setting` is the experiment at one scale. At scale "paper" it is that of the authors' code (RAIVNLab/STR@cc74d38):
ResNet-50 and MobileNetV1 on ImageNet, SGD with momentum 0.875, 100 epochs, labels smoothed. λ and s_init are those of
Tables 10 and 11. On another recipe λ is scaled so that decay alone does to s, over the whole training, what it does in
the paper's, λ · Σ lr / (1 − momentum) (see `weight_decay`): pruning starts after the same share of the training.

A network of STR is named by the sparsity in % that the paper prints for its λ and s_init. What a stand-in ends with is
another density, and every other method is trained at just that: its Run names STR's as parent and takes the budget,
layer by layer or in total. All of this is declared before anything is trained. What nothing states: see GUESSED.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lottery import data, macs, models
from lottery.dynamic import DNW, GMP, SET, RigL
from lottery.experiments import str_exact
from lottery.experiments.papers import Paper, Trials, parts
from lottery.experiments.runs import Run, fields_as
from lottery.methods import whole
from lottery.soft_threshold import STR
from lottery.training import Recipe

if TYPE_CHECKING:
    import pandas as pd

GUESSED = (
    "last or best epoch",
    "RigL's settings, which are its paper's, and SET's, which are Mocanu's: a constant share once an epoch to the end",
    "the optimiser of FastGRNN with STR, and what else decays there",
    "λ of HAR-2, and of two rows of Google-12 that share one",
)
PULL = str_exact.pull()  # Σ lr / (1 − momentum) of the paper's training
DENSE = 2.0**-15  # λ of everything but STR, scaled as STR's is


def recipe(
    epochs: int, images: int, batch_size: int = 256, lr: float = 0.256, warmup: int = 5, **changes: Any
) -> Recipe:
    """The authors' schedule: warm-up in steps of an epoch, then a cosine; read after every epoch."""
    per_epoch = -(-images // batch_size)
    given = {"precision": "float32", "augment": "flip-crop"} | changes
    return Recipe(
        optimizer="sgd", lr=lr, momentum=0.875, batch_size=batch_size, iterations=epochs * per_epoch, schedule="cosine",
        lr_every=per_epoch, warmup=warmup * per_epoch, label_smoothing=0.1, last_batch="keep", inputs="standard",
        eval_every=per_epoch, **given,
    )  # fmt: skip


def weight_decay(published: float, recipe: Recipe) -> float:
    """The paper's λ for another recipe, so that λ · Σ lr / (1 − momentum) is the same; five digits are kept."""
    return float(f"{published * PULL * (1 - recipe.momentum) / _sum_of_rates(recipe):.5g}")


@functools.cache
def _sum_of_rates(recipe):
    """Σ lr of a training; cached, since every claim asks for every run."""
    return sum(recipe.lr_at(t) for t in range(0, recipe.iterations, recipe.lr_every)) * recipe.lr_every


def convolutional(model: str, dataset: str, recipe: Recipe, **options: Any) -> Run:
    """The dense Run of the first trial."""
    recipe = dataclasses.replace(recipe, weight_decay=weight_decay(DENSE, recipe))
    return Run(model=model, dataset=dataset, recipe=recipe, valid=0, options=tuple(sorted(options.items())))


def recurrent(dataset: str, epochs: int, per_epoch: int, hidden: int) -> Run:
    """FastGRNN at full rank: lr 0.01, a tenth of it for the last third, batches of 100, as FastGRNN is trained."""
    n = epochs * per_epoch  # per_epoch counts an epoch's last, smaller batch, which is left out: so it is more passes
    given = {"milestones": (round(2 / 3 * n),), "eval_every": max(per_epoch, n // 30)}
    recipe = Recipe(optimizer="sgd", lr=0.01, momentum=0.9, batch_size=100, iterations=n, inputs="standard", **given)
    return Run(model="fastgrnn", dataset=dataset, recipe=recipe, valid=0, options=(("hidden", hidden),))


@dataclass(frozen=True)
class Setting(Trials):
    """One experiment at one scale.

    nets: the dense Run of each network that the paper's arms name. trials: seeds seed … seed + trials − 1.
    levels: networks of STR that are trained here, by the sparsities in % that the paper prints; None: all.
    others: those at whose densities the other methods are trained.
    weight_decay, s_init, g, granularity, target_density: in place of the paper's; the last one freezes the budget at
    half of the training. With any of these it is an exploration, not the paper.
    """

    nets: dict[str, Run]
    trials: int = 5
    seed: int = 0
    levels: tuple[str, ...] | None = None
    others: tuple[str, ...] = ("90.23", "94.80", "98.05", "98.98")
    weight_decay: float | None = None
    s_init: float | None = None
    g: str | None = None
    granularity: str | None = None
    target_density: float | None = None


IMAGENET, CIFAR, DIGITS = 1_281_167, 50_000, 1_347
RECURRENT = {"fastgrnn-google12": recurrent("google12", 300, 223, 100), "fastgrnn-har2": recurrent("har2", 300, 74, 80)}
SETTINGS = {  # highest scale first
    "paper": Setting(
        {
            "resnet50": convolutional("resnet50", "imagenet", recipe(100, IMAGENET)),
            "mobilenetv1": convolutional("mobilenetv1", "imagenet", recipe(100, IMAGENET)),
            **RECURRENT,
        }
    ),
    "laptop": Setting(
        {
            "resnet50": convolutional(
                "resnet8",
                "cifar10_16",
                recipe(30, CIFAR, batch_size=128, lr=0.128, warmup=2, precision="bfloat16"),
                init="kaiming fan_in",
            ),
            "fastgrnn-google12": recurrent("mnist", 10, 600, 100),
            "fastgrnn-har2": recurrent("har2_part", 120, 24, 80),
        },
        levels=("79.55", "90.23", "94.80", "96.53", "97.78", "98.05", "98.98"),
    ),
    "smoke": Setting(
        {
            "resnet50": convolutional(
                "resnet8",
                "digits",
                recipe(6, DIGITS, batch_size=32, lr=0.128, warmup=1, augment="none"),
                init="kaiming fan_in",
                width=4,
            ),
            "fastgrnn-google12": recurrent("digits", 4, 13, 20),
        },
        trials=2,
        levels=("90.23",),
        others=("90.23",),
        weight_decay=0.02,  # a few hundred steps are too few for the paper's
        s_init=-20.0,
    ),
}

LAYERS = ("w.m", "u.m")  # of a FastGRNN: the diagonals whose zeros are the rank
# λ by the printed ranks of W and U together. Google-12: Table 12; two rows have one λ, here λ/2 and λ. HAR-2: its
# rows all have 0.001, with which decay alone takes m and the threshold nowhere near each other; these decay as much as
# Google-12.
RANKS = {
    "fastgrnn-google12": {"52": 0.0005, "46": 0.001, "41": 0.002, "33": 0.005},
    "fastgrnn-har2": {"17": 0.0015, "16": 0.003, "15": 0.006},
}
FINER = {"str-global": "global", "str-filter": "filter", "str-weight": "weight"}
TAKERS = {  # control → method, what of STR's budget it takes, what ranks the weights at the start
    "gmp": (GMP, "total", "magnitude"),
    "gmp-budget": (GMP, "layers", "magnitude"),
    "dnw": (DNW, "total", "magnitude"),
    "dnw-budget": (DNW, "layers", "magnitude"),
    "dnw-erk": (DNW, "erk", "magnitude"),
    "rigl-erk": (RigL, "erk", "random"),
    "set-erk": (SET, "erk", "random"),
}

# What each figure and table shows: network → control → levels; "all" and "others" are the Setting's.
STR_90 = {"resnet50": {"str": ("90.23",)}}
AT_90 = {"resnet50": dict.fromkeys(("str", "str-global", "gmp", "rigl-erk"), ("90.23",))}
ROWS = {"dense": ("dense",), "str": "all", "gmp": "others", "dnw": "others"}
ROWS |= dict.fromkeys(("rigl-erk", "set-erk"), ("90.23", "94.80"))
MOBILE = {"mobilenetv1": dict.fromkeys(("str", "gmp"), ("89.01",))}
ITEMS = {
    "curve": {"resnet50": {"dense": ("dense",), "str": "all"}},  # slices of Table 1, to be trained first
    "baseline": {"resnet50": {"str": "others", "gmp": "others"}},
    "fig1": STR_90,
    "fig2": STR_90,
    "fig3": STR_90,
    "fig4": {"resnet50": ROWS},
    "fig5": {"resnet50": ROWS},
    "fig6": AT_90,
    "fig7": AT_90,
    "fig8": MOBILE,
    "fig9": MOBILE,
    "table1": {"resnet50": ROWS},
    "table2": {"mobilenetv1": {"dense": ("dense",), "str": "all", "gmp": ("75.28", "89.01")}},
    "table3": {net: {"dense": ("dense",), "str": "all", "lowrank": "all"} for net in RANKS},
    "table4": {"resnet50": {"dnw": "others", "dnw-budget": "others", "dnw-erk": ("90.23",)}},
    "table5": {"resnet50": {"gmp": "others", "gmp-budget": "others"}},
    "table9": {"resnet50": dict.fromkeys(("str", "str-global"), ("90.23", "94.80", "98.05"))},
    # not in the paper, or without numbers there
    "granularity": {"resnet50": dict.fromkeys(("str-filter", "str-weight"), ("90.23", "98.05"))},
    "switched-off": {f"resnet50@{why}": {"str": ("90.23",)} for why in ("adam", "s-not-decayed")},
    "frozen": {"resnet50@frozen": {"str": ("90.23", "98.05")}},
    "calibration": {f"resnet50@{s}": {"str": ("79.55", "90.23", "98.05")} for s in ("-100", "-800", "-12800")},
}
MAIN = ("curve",)
PRINTS = "sparsity"
EXACT = str_exact.EXACT


def cells(item: str, at: Setting) -> list[tuple[str, float, str]]:
    """(arm, density, level): the networks of which one trial of an item consists. The density is the paper's."""
    return [
        (f"{net}/{control}", 1.0 if level == "dense" else round(1 - float(level) / 100, 6), level)
        for net, controls in ITEMS[item].items()
        if net.partition("@")[0] in at.nets
        for control, levels in controls.items()
        for level in _levels(net.partition("@")[0], levels, at)
    ]


def _levels(net, levels, at):
    if levels == ("dense",):
        return levels
    here = published(net) if at.levels is None or net != "resnet50" else [x for x in published(net) if x in at.levels]
    chosen = {"all": here, "others": at.others}.get(levels, levels) if isinstance(levels, str) else levels
    return [level for level in chosen if level in here]


@functools.cache
def published(net: str) -> dict[str, tuple[float, float]]:
    """{level: (λ, s_init)} of the paper's networks that STR trained."""
    return {x: (v, -10.0) for x, v in RANKS[net].items()} if net in RANKS else str_exact.settings(net)


def place(name: str, x: float) -> str | None:
    """What a claim's x is for an arm: the printed ranks of W and U together, or None where it is a sparsity."""
    return f"rank {x:g}" if name.split("/")[0] in RANKS else None


def trial(arm: str, at: Setting, seed: int, point: str) -> list[Run]:
    """The Runs of one arm and trial, a list of one (none where a variant is tried once, at the first seed)."""
    net, variant, control = parts(arm)
    run = dataclasses.replace(at.nets[net], seed=seed)
    if control == "dense":
        return [run]
    if variant.startswith("-") and seed != at.seed:
        return []
    learnt = _learnt(net, run, point, at, FINER.get(control), variant)
    if control.startswith("str"):
        return [learnt]
    if control == "lowrank":
        recipe = at.nets[net].recipe
        none = dataclasses.replace(learnt, parent=learnt, method=Run().method, recipe=recipe)
        return [dataclasses.replace(none, budget="layers", criterion="random")]
    method, takes, criterion = TAKERS[control]
    every = {"every": run.recipe.lr_every, "rank": "step"} if method is GMP else {}
    every = {"every": run.recipe.lr_every} if method is SET else every
    return [dataclasses.replace(run, parent=learnt, budget=takes, method=method(**every), criterion=criterion)]


def _learnt(net, run, level, at, granularity=None, variant=""):
    """The Run of STR at a published λ and s_init, scaled to the run's recipe."""
    published_decay, s_init = published(net)[level]
    if variant.startswith("-"):
        s_init = float(variant)
    recurrent = net in RANKS
    decay = rank_decay(published_decay, net, run.recipe) if recurrent else weight_decay(published_decay, run.recipe)
    decay = decay if at.weight_decay is None else at.weight_decay
    given = {"s_init": s_init if at.s_init is None else at.s_init, "g": at.g or ("exp" if recurrent else "sigmoid")}
    given["granularity"] = granularity or at.granularity or "layer"
    if recurrent:
        given |= {"layers": LAYERS, "decay": "thresholded"}
        run = dataclasses.replace(run, options=tuple(sorted({**dict(run.options), "factorised": True}.items())))
        run = dataclasses.replace(run, layers=LAYERS)
    if variant == "s-not-decayed":
        given["decay"] = "weights"
    if variant == "frozen":
        given |= {"freeze": 0.5, "density": round(1 - float(level) / 100, 6)}
    if at.target_density is not None:
        given |= {"freeze": 0.5, "density": at.target_density}
    changes = {"weight_decay": decay}
    if variant == "adam":
        changes |= {"optimizer": "adam", "lr": 1e-3, "momentum": 0.0}
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes), method=STR(**given))


def rank_decay(published: float, net: str, recipe: Recipe) -> float:
    """As `weight_decay`, beside the paper's training of a FastGRNN."""
    theirs, ours = map(_sum_of_rates, (RECURRENT[net].recipe, recipe))
    return float(f"{published * theirs / ours:.5g}")


def override(at: Setting, **given: Any) -> Setting:
    """A Setting with a notebook's parameters in place of its own; those that are None change nothing.

    trials, seed, model, dataset, train_fraction, iterations, batch_size, lr; weight_decay (not scaled), s_init, g,
    granularity, target_density. iterations, batch_size and lr scale the paper's λ anew.
    """
    given = {name: value for name, value in given.items() if value is not None}
    base = {name: given.pop(name) for name in ("model", "dataset", "train_fraction") if name in given}
    changes = {name: given.pop(name) for name in ("batch_size", "lr", "iterations") if name in given}
    unknown = given.keys() - {f.name for f in dataclasses.fields(Setting)}
    if unknown:
        raise ValueError(f"Unknown parameter {min(unknown)!r} of str: see lottery.experiments.soft_threshold.override.")
    whole("iterations", changes.get("iterations", 30), 30)
    at = dataclasses.replace(at, nets={net: _changed(net, run, base, changes) for net, run in at.nets.items()}, **given)
    with fields_as(density="target_density"):
        for item in MAIN:  # what is wrong with a method's parameters is told here
            for arm, _, point in cells(item, at):
                trial(arm, at, at.seed, point)
    return at


def _changed(net, run, base, changes):
    if net in RANKS or not (base or changes):
        return run
    if n := changes.get("iterations"):  # a thirtieth of the training is an epoch
        changes = {"lr_every": n // 30, "eval_every": n // 30, "warmup": n // 30 * 2, **changes}
    if "model" in base:
        base = base | {"options": tuple(pair for pair in run.options if pair[0] == "init")}
    recipe = dataclasses.replace(run.recipe, **changes)
    return dataclasses.replace(
        run, **base, recipe=dataclasses.replace(recipe, weight_decay=weight_decay(DENSE, recipe))
    )


# What is read of a stored run -----------------------------------------------------------------------------------------


@functools.cache
def macs_of(model: str, dataset: str, options: tuple[tuple[str, object], ...] = ()) -> dict[str, int]:
    """`{layer: MACs}` of a run's network for one image."""
    return macs.count(models.on_set(model, dataset, options), data.SETS[dataset].shape)


def macs_left(row: "dict | pd.Series") -> tuple[float, int]:
    """(MACs for one image that are left, all of them)."""
    options = json.loads(row["spec"])["options"]
    full = macs_of(row["model"], row["dataset"], tuple(map(tuple, options)))
    kept = json.loads(row["layers"])
    return sum(full[name] * k / n for name, (k, n) in kept.items()), sum(full.values())


def numbers(row: "dict | pd.Series") -> dict[str, np.ndarray]:
    """`{name: float64 [readings]}` of what STR kept at each reading: densities, s and thresholds."""
    return {name: np.array(values) for name, values in json.loads(row["numbers"]).items()}


def thresholds(row: "dict | pd.Series") -> dict[str, np.ndarray]:
    """`{layer: float64 [readings]}`."""
    found = numbers(row)
    return {name.partition("/")[2]: v for name, v in found.items() if name.startswith("threshold/")}


def _rise(row):
    each = list(thresholds(row).values())
    alpha = each[len(each) // 2]
    return math.log(alpha[-1] / alpha[len(alpha) * 2 // 3 - 1])


def _half(row):
    sparsity = 100 * (1 - numbers(row)["density"])
    return sparsity[len(sparsity) // 2 - 1] - sparsity[-1] / 2


def _classifier(row):
    *others, fc = (alpha[-1] for alpha in thresholds(row).values())
    return math.log(min(others) / fc)


def _log(x):
    """Not a number for a network that has no weight left."""
    return math.log(x) if x else math.nan


READS = {
    "MACs": lambda row: _log(macs_left(row)[0]),
    "MACs per weight": lambda row: _log(np.divide(*macs_left(row)) / (row["density"] or math.inf)),
    "threshold in the last third ratio": _rise,
    "sparsity at half time beside half of the last, points": _half,
    "other threshold to the classifier’s ratio": _classifier,
}

PAPER = Paper(__name__)
setting, runs, arm = PAPER.setting, PAPER.runs, PAPER.arm
