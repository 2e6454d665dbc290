"""What to run for GraSP (arXiv 2002.07376): networks pruned at initialisation, trained, beside dense ones and tickets.

A `Setting` is the experiment at one scale; at scale "paper" it is that of the authors' code (f17d87a): ResNet-32 of
double width and VGG-19, CIFAR-10 and -100, no validation set. Sparsities are % removed of all Linear and Conv weights,
as the paper prints them. The laptop's stand-in, ResNet-8 on CIFAR-10 at 16x16, takes the place of one network only,
resnet32-c10. What nothing printed or published states: see GUESSED.

Differs from the authors' code, not only where weights are scored (`lottery.grasp`), in:
    the last minibatch of an epoch: incomplete, it is dropped, 390 iterations an epoch and 62,400 in all; theirs keeps
        it, 391 and 62,560;
    the inputs: on CIFAR-10 they are divided by the pixels' own deviations, (0.2470, 0.2435, 0.2616); theirs by
        (0.2023, 0.1994, 0.2010).
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

from lottery import data, names
from lottery.experiments import grasp_init
from lottery.experiments.papers import Paper, Trials, parts
from lottery.experiments.runs import CRITERIA, Run, fractions
from lottery.methods import need, whole
from lottery.training import Recipe

GUESSED = (
    "tickets in one shot",
    "rewound tickets keep the schedule's position",
    "SNIP scores GraSP's batch and copy",
    "random pruning takes all layers alike",
    "larger scored batches as more draws of 10 images per class",
)
REWIND = 5 / 160  # "reset to epoch 5", as a share of the training


def recipe(epochs: int, per_epoch: int = 390, **changes: Any) -> Recipe:
    """The authors' schedule: lr 0.1, divided by 10 after half and three quarters of the training; read every epoch."""
    n = epochs * per_epoch
    given = {"batch_size": 128, "weight_decay": 1e-4, "augment": "flip-crop"} | changes
    return Recipe(
        optimizer="sgd", lr=0.1, momentum=0.9, iterations=n, milestones=(n // 2, n * 3 // 4), eval_every=per_epoch,
        test_readings="all", inputs="standard", **given,
    )  # fmt: skip


def dense(model: str, dataset: str, recipe: Recipe, **options: Any) -> Run:
    """The dense Run of the first trial, initialised as the authors do."""
    options = {"init": "kaiming fan_out"} | options
    return Run(model=model, dataset=dataset, recipe=recipe, valid=0, options=tuple(sorted(options.items())))


@dataclass(frozen=True)
class Setting(Trials):
    """One experiment at one scale.

    nets: the dense Run of each network that the paper's arms name. trials: seeds seed … seed + trials − 1.
    only: sparsities in % that are run here, of those of an item (None: all); variants: of the robustness study.
    sparsities: in place of every item's own. score: options of the criteria, see `Run`. criterion: what the arm "grasp"
    ranks weights by. With any of these three it is an exploration, not the paper. measured: what is measured without
    training.
    """

    nets: dict[str, Run]
    trials: int = 5
    seed: int = 0
    only: tuple[float, ...] | None = None
    variants: tuple[str, ...] | None = None
    sparsities: tuple[float, ...] | None = None
    score: dict = field(default_factory=dict)
    criterion: str = "grasp"
    measured: grasp_init.Plan = field(default_factory=lambda: grasp_init.PLANS["paper"])

    def __post_init__(self):
        super().__post_init__()
        need(self, "criterion", self.criterion in CRITERIA, f"give one of {', '.join(CRITERIA)}")


NETS = {
    "resnet32-c10": dense("resnet32", "cifar10", recipe(160), width=32),
    "vgg19-c100": dense("vgg19", "cifar100", recipe(160, weight_decay=5e-4)),
    "vgg19-c10": dense("vgg19", "cifar10", recipe(160, weight_decay=5e-4)),
    "resnet32-c100": dense("resnet32", "cifar100", recipe(160), width=32),
}
CHUNKS = {"resnet32-c100": 4}  # two draws of 5 images per class, halved; the others one draw of 10
LAPTOP = {"resnet32-c10": dense("resnet8", "cifar10_16", recipe(30, precision="bfloat16"))}
SMOKE = {"resnet32-c10": dense("resnet8", "digits", recipe(3, 14, batch_size=96, augment="none"), width=8)}
SETTINGS = {  # highest scale first
    "paper": Setting(NETS),
    "laptop": Setting(
        LAPTOP,
        only=(90, 95, 98),
        variants=("batch-400", "init-normal", "init-xavier"),
        measured=grasp_init.PLANS["laptop"],
    ),
    "smoke": Setting(
        SMOKE, trials=2, only=(90, 98), variants=("batch-400", "init-xavier"), measured=grasp_init.PLANS["smoke"]
    ),
}


def imagenet(seed: int = 0) -> list[Run]:
    """ResNet-50 and VGG-16 on ImageNet, for `lottery.parallel`: dense, SNIP and GraSP with 60, 80 and 90 % removed.

    90 epochs, divided by 10 after each third, as in the authors' script. The rest is guessed: ten images a class are
    scored, 500 at a time (theirs takes 37,500 as they come, 20 at a time), and VGG-16 has one fully connected layer.
    """
    n = 90 * 5_005
    at = recipe(90, 5_005, batch_size=256, last_batch="keep")
    at = dataclasses.replace(at, milestones=(n // 3, n * 2 // 3), test_readings="log")
    found = []
    for net in ("resnet50", "vgg16"):
        run = dataclasses.replace(dense(net, "imagenet", at), seed=seed)
        score = (("chunks", 20), ("per_class", 10))
        pruned = [(c, round(1 - s, 2)) for c in ("snip", "grasp") for s in (0.6, 0.8, 0.9)]
        found += [run, *(dataclasses.replace(run, criterion=c, density=d, score=score) for c, d in pruned)]
    return found


INITS = {"init-normal": "normal", "init-xavier": "glorot"}

# What each figure and table shows: networks → control → sparsities in %. Within an item, all trials of a network come
# before the next network, and all networks of a trial before the next trial.
TABLE = dict.fromkeys(("snip", "grasp", "lt", "lt-rewind"), (90, 95, 98))
ROBUST = {"grasp": (60, 80, 90)}
TRAINED = {
    # slices of the tables, to be trained first
    "grid": {("resnet32-c10",): {"dense": (0,), **dict.fromkeys(("random", "snip", "grasp"), (90, 95))}},
    "sparsest": {("resnet32-c10", "vgg19-c100"): {"dense": (0,), "snip": (98,), "grasp": (98,)}},
    # the paper's
    "table1": {tuple(NETS): dict.fromkeys(("random", "grasp"), (95, 98, 99, 99.5))},
    "table2": {tuple(NETS): {"dense": (0,), **TABLE}},
    "fig2": {("resnet32-c100", "resnet32-c10"): {"snip": (98,), "grasp": (98,)}},
    "initialisation": {
        ("resnet32-c10", *(f"resnet32-c10@{v}" for v in ("batch-400", "batch-4000", *INITS))): ROBUST,
        ("resnet32-c100", *(f"resnet32-c100@{v}" for v in ("batch-4000", "batch-32000", *INITS))): ROBUST,
    },
}
MEASURED = tuple(grasp_init.ITEMS)
ITEMS = (*TRAINED, *MEASURED)
PRINTS = "sparsity"


def cells(item: str, at: Setting) -> list[tuple[str, float, float]]:
    """(arm "net/control", density, sparsity in %): the networks of which one trial of an item consists."""
    return [
        (f"{net}/{control}", PAPER.density(point), point)
        for nets, controls in TRAINED[item].items()
        for net in nets
        if _is_here(*net.partition("@")[::2], at)
        for control, points in controls.items()
        for point in (points if control == "dense" else _points(points, at))
    ]


def _is_here(net, variant, at):
    return net in at.nets and (not variant or at.variants is None or variant in at.variants)


def _points(points, at):
    return at.sparsities or [p for p in points if at.only is None or p in at.only]


def trial(arm: str, at: Setting, seed: int, point: float) -> list[Run]:
    """The Runs of one arm and trial, a list of one: `point` % of the weights removed."""
    net, variant, control = parts(arm)
    run = dataclasses.replace(at.nets[net], seed=seed)
    chunks = CHUNKS.get(net, CRITERIA["grasp"]["chunks"])
    score = {"chunks": chunks} | at.score
    if variant in INITS:
        run = dataclasses.replace(run, options=tuple(sorted({**dict(run.options), "init": INITS[variant]}.items())))
    elif variant:
        images = max(1, int(variant.removeprefix("batch-")) // data.SETS[run.dataset].classes)
        score |= {"per_class": images, "chunks": chunks * images // CRITERIA["grasp"]["per_class"] or min(chunks, 2)}
    if control == "dense":
        return [run]
    density = PAPER.density(point)
    if control.startswith("lt"):
        where = {"init": "rewind", "rewind_to": round(REWIND * run.recipe.iterations)} if control != "lt" else {}
        return [dataclasses.replace(run, parent=run, density=density, **where)]
    criterion = at.criterion if control == "grasp" else control
    own = CRITERIA[criterion]
    score = tuple(sorted((name, value) for name, value in score.items() if name in own and value != own[name]))
    return [dataclasses.replace(run, criterion=criterion, density=density, score=score)]


def measured(item: str, name: str, x: float | None, seed: int, scale: str) -> list[grasp_init.Pruning] | None:
    """A list of the Pruning of "net/criterion" for one trial at `x` % removed, as `item` measures it, or None.

    "net@own/criterion": scored with the network's own classifier, where the authors' script draws one anew.
    """
    net, variant, criterion = parts(name)
    found = _measured(item, scale, {"": "driver", "own": "own classifier"}.get(variant))
    return found.get((net, criterion, 0 if criterion == "dense" else x, seed))


@functools.cache
def _measured(item, scale, variant):
    cells = SETTINGS[scale].measured.cells(item)
    keys = ("net", "criterion", "sparsity", "seed")
    return {tuple(map(labels.get, keys)): [p] for labels, p in cells if labels["variant"] == variant}


def _toy(name):
    """Weights behind the dead unit of figure 1 that the criterion of an arm "toy/criterion" removes."""
    return int((~grasp_init.toy(name.split("/")[1])[1]["outgoing"][0, 0]).sum())


EXACT = {"outgoing weights removed": _toy}


def override(at: Setting, **given: Any) -> Setting:
    """A Setting with a notebook's parameters in place of its own; those that are None change nothing."""
    given = {name: value for name, value in given.items() if value is not None}
    asked = dict(given)
    changes = {name: given.pop(name) for name in ("batch_size", "lr") if name in given}
    if (n := given.pop("iterations", None)) is not None:
        whole("iterations", n, 4)
        changes |= {"iterations": n, "milestones": (n // 2, n * 3 // 4)}
    base = {name: given.pop(name) for name in ("model", "dataset", "seed", "train_fraction") if name in given}
    score = {name: given.pop(name) for name in CRITERIA["grasp"] if name in given}
    if type(T := score.get("temperature")) is int:
        score["temperature"] = float(T)
    if (densities := given.pop("densities", None)) is not None:
        given["sparsities"] = tuple(round(100 * (1 - d), 6) for d in fractions(densities))
    nets = {net: changed(run, base, changes) for net, run in at.nets.items()}
    at = dataclasses.replace(at, nets=nets, score={**at.score, **score}, **given)
    if "seed" in base:
        at = dataclasses.replace(at, seed=base["seed"])
    for item in TRAINED:  # what is wrong with the criterion or its options is told here
        for arm, _, point in cells(item, at):
            trial(arm, at, at.seed, point)
    return dataclasses.replace(at, measured=at.measured.changed(asked))


def called(changed: dict[str, Any]) -> dict[str, str]:
    """What arms are called where their experiment is another: the arm "grasp" ranks by any criterion."""
    criterion = changed.get("criterion", "grasp")
    return {} if criterion == "grasp" else {"grasp": f"{names.arm(criterion).partition(' at ')[0]}, scored as GraSP is"}


def changed(run: Run, base: dict[str, Any], changes: dict[str, Any]) -> Run:
    """A dense Run with other fields and changes of its recipe, read at least once."""
    if "iterations" in changes:
        changes = changes | {"eval_every": min(run.recipe.eval_every, changes["iterations"])}
    if "model" in base:  # the width is an option of the ResNets
        base = base | {"options": tuple(pair for pair in run.options if pair[0] == "init")}
    return dataclasses.replace(run, **base, recipe=dataclasses.replace(run.recipe, **changes))


PAPER = Paper(__name__)
setting, runs, arm = PAPER.setting, PAPER.runs, PAPER.arm
