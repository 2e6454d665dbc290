"""What to run so that all methods stand on equal terms: one network, data, recipe and number of steps for all of them.

The network that is finally used is trained for T steps, whatever was spent to find it: a ticket for k steps before the
weights are kept and T − k after, a mask that moves or is learnt during its one training of T. The last reading counts.
Densities are of all Linear and Conv weights. ResNet-8 is GraSP's stand-in, and shares its runs where they are the same.

A method is a line of METHODS, a function of (net, dense run, point, options) → Run. Its point is a density, or for CS,
STR and L0, which have none among their settings, one of the Net's `knobs`: `at_density` interpolates between the two
runs of a trial beside a density, over its logarithm, never beyond them and not over a gap wider than WIDEST. An arm is
"net/method", or with options "net@share=erk,lr=0.03/method".

LeNet's options are tuned: each method has as many CONFIGS, its default, a lower learning rate and another value of what
matters most to it, each tried once at TUNED_AT with a seed that is no trial; the best on the validation set is in
CHOSEN. On ResNet-8, which trains on all images, no method is tuned.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lottery import models
from lottery.claims import WIDEST
from lottery.cs import CS, Ticket
from lottery.dynamic import BUDGETS, DNW, GMP, SET, RigL
from lottery.experiments import grasp, soft_threshold
from lottery.experiments.papers import Paper, Trials, parts
from lottery.experiments.runs import Run, fractions
from lottery.methods import NOTHING, whole
from lottery.soft_threshold import STR
from lottery.stochastic import L0
from lottery.training import Recipe

if TYPE_CHECKING:
    import numpy as np

GUESSED = ()
BACK = 1 / 32  # of the training: where rewound weights come from
TUNED_AT, TUNING_SEED = 0.05, 100


# The methods ----------------------------------------------------------------------------------------------------------


def shared(run: Run, density: float, share: str) -> float | tuple[tuple[str, float], ...]:
    """A density as `Run` takes it: "global" ranks all layers together, "uniform" and "erk" each layer by itself."""
    if share == "global":
        return density
    return _shared(run.model, run.dataset, run.options, density, share)


@functools.cache
def _shared(model, dataset, options, density, share):
    if share not in BUDGETS:
        raise ValueError(f"Invalid share {share!r}: give 'global', 'uniform' or 'erk'.")
    return tuple(BUDGETS[share](models.on_set(model, dataset, options), density).items())


def at_initialisation(criterion: str) -> Callable[..., Run]:
    """θ₀ is ranked once, before any training."""

    def method(net, run, density, share="global", **score):
        score = tuple(sorted(score.items()))
        return dataclasses.replace(run, criterion=criterion, density=shared(run, density, share), score=score)

    return method


def oneshot(net: "Net", run: Run, density: float, share: str = "global") -> Run:
    """The dense network pruned once, its survivors back at θ₀."""
    return dataclasses.replace(run, parent=run, density=shared(run, density, share))


def imp(net: "Net", run: Run, density: float, share: str = "global", **start: Any) -> Run:
    """Pruned and reset in rounds, by the Net's `levels` down to a density."""
    found = run
    for level in (d for d in net.levels if d >= density):
        found = dataclasses.replace(net.read(run, level), parent=found, density=shared(run, level, share), **start)
    return found


def rewind(net: "Net", run: Run, density: float, share: str = "global", back: float = BACK) -> Run:
    """As `imp`, but survivors go back to where they were after a share of the training."""
    return imp(net, run, density, share, init="rewind", rewind_to=max(1, round(back * run.recipe.iterations)))


def moving(kind: type[GMP] | type[DNW]) -> Callable[..., Run]:
    """GMP and DNW, whose masks move to, or at, a density."""

    def method(net, run, density, **options):
        return dataclasses.replace(run, method=kind(density=density, **options))

    return method


def rewired(kind: type[SET]) -> Callable[..., Run]:
    """SET and RigL, from random masks at ERK densities."""

    def method(net, run, density, share="erk", **options):
        return dataclasses.replace(run, method=kind(**options), criterion="random", density=shared(run, density, share))

    return method


def cs(net: "Net", run: Run, s0: float, **options: Any) -> Run:
    """One round of search from s0 and the training of its ticket, rewound."""
    searched = dataclasses.replace(run, method=CS(s0=s0, **options), rate=0.0, rate_output=None)
    ticket = {"method": Ticket(s0=s0, scale=searched.method.scale), "init": "rewind"}
    return dataclasses.replace(searched, parent=searched, rewind_to=round(BACK * run.recipe.iterations), **ticket)


def str_(net: "Net", run: Run, decay: float, **options: Any) -> Run:
    """λ is `decay` · 10⁻⁵ of the paper's training, scaled to this recipe; s starts at −3200."""
    decay = soft_threshold.weight_decay(decay * 1e-5, run.recipe)
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, weight_decay=decay), method=STR(**options))


def l0(net: "Net", run: Run, lam: float, rate: float = 1000.0, **options: Any) -> Run:
    """Gates at a thousand times the weights' learning rate, which is near that of supermasks' authors, 100."""
    return dataclasses.replace(run, method=L0(lam=lam, rate=rate, **options))


METHODS = {
    "dense": lambda net, run, density: run,
    "imp": imp,
    "rewind": rewind,
    "oneshot": oneshot,
    "cs": cs,
    "str": str_,
    **{name: at_initialisation(name) for name in ("grasp", "snip", "synflow", "magnitude", "random")},
    "gmp": moving(GMP),
    "dnw": moving(DNW),
    "l0": l0,
    "set": rewired(SET),
    "rigl": rewired(RigL),
}
KNOBS = ("cs", "str", "l0")  # methods without a density among their settings
OTHER = {  # the third configuration of a method
    "dense": "weight_decay=0.0005",
    "imp": "share=erk",
    "rewind": "back=0.125",
    "oneshot": "share=erk",
    "cs": "final=50",
    "str": "granularity=global",
    "grasp": "reinit_linear=false",
    "snip": "reinit_linear=false",
    "synflow": "rounds=10",
    "magnitude": "share=erk",
    "random": "share=erk",
    "gmp": "budget=global",
    "dnw": "budget=erk",
    "l0": "drop=0.2",
    "set": "fraction=0.1",
    "rigl": "fraction=0.1",
}
CONFIGS = {name: ("default", "lr=0.03", other) for name, other in OTHER.items()}
CHOSEN = {  # {net: {method: the one of its CONFIGS with the highest validation accuracy}}; else the default
    "lenet": {
        "dense": "lr=0.03",
        "cs": "lr=0.03",
        "snip": "reinit_linear=false",
        "magnitude": "share=erk",
        "random": "share=erk",
        "gmp": "budget=global",
        "dnw": "lr=0.03",
        "rigl": "fraction=0.1",
    }
}


# The settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """A network with the points at which every method is trained.

    base: its dense Run of trial 0. densities: compared at. levels: all densities of iterative pruning, falling.
    knobs: {method of KNOBS: values}. kept: points at which masks are stored (() where the base stores all).
    """

    base: Run
    densities: tuple[float, ...]
    levels: tuple[float, ...]
    knobs: dict[str, tuple] = field(default_factory=dict)
    kept: tuple = ()

    def points(self, method: str) -> tuple[float, ...]:
        return (1.0,) if method == "dense" else self.knobs[method] if method in KNOBS else self.densities

    def read(self, run: Run, point: float) -> Run:
        """The run, with its masks stored where they are kept."""
        if point not in self.kept:
            return run
        return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, test_readings="all"))


@dataclass(frozen=True)
class Setting(Trials):
    """All networks at one scale.

    methods: those that are compared, each as "method" or "method@options". asked: what of the recipe a reader has set
    for all of them, also for a method that tuning gave another.
    """

    nets: dict[str, Net]
    trials: int = 5
    seed: int = 0
    methods: tuple[str, ...] = tuple(METHODS)
    asked: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        for text in self.methods:
            if text.partition("@")[0] not in METHODS:
                raise ValueError(
                    f"Unknown method {text!r}: choose from {', '.join(METHODS)}, with @options or without."
                )


def recipe(epochs: int, per_epoch: int, **changes: Any) -> Recipe:
    """GraSP's schedule: SGD with momentum 0.9, lr 0.1, a tenth of it after a half and again after three quarters."""
    return dataclasses.replace(grasp.recipe(epochs, per_epoch, augment="none"), test_readings="log", **changes)


LENET = Net(
    Run(recipe=recipe(12, 550, batch_size=100)),
    densities=(0.2, 0.1, 0.05, 0.02, 0.01),
    levels=(0.67, 0.45, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05, 0.032, 0.02, 0.014, 0.01),
    knobs={
        "cs": (-0.05, -0.03, -0.01, -0.005, -0.002, 0.0),
        "str": (1.25, 1.6, 2.0, 2.5, 4.0, 8.0),
        "l0": (3e-6, 4e-6, 1e-5, 1.5e-5, 2.5e-5, 5e-5, 1e-4),  # pilots: 64 % at 3e-6, 11 % at 5e-6, 1.1 % at 5e-5
    },
    kept=(0.05, -0.03, -0.005, 2.5, 1e-5),
)
# L0's λ: one pilot, seed 100, whose weights had eight λ by lot: 13 % at 1e-5, 6 % at 2e-5, 2 % at 4e-5, 0.6 % at 8e-5.
# STR's λ of 9, of a first grid, left nothing in trial 0, and 2.5 and 4 leave 4.5 and 0.7 %, further apart than WIDEST:
# 3.1 took the place of 9 once that was known. So did CS's s0 of −0.3 come in: −0.2 and −0.4 leave 6.4 and 1.6 %.
# Both by these densities alone.
RESNET8 = Net(
    grasp.LAPTOP["resnet32-c10"],
    densities=(0.1, 0.05, 0.02),
    levels=(0.46, 0.22, 0.1, 0.05, 0.02),
    knobs={"cs": (-0.4, -0.3, -0.2, -0.08), "str": (1.9, 2.5, 3.1, 4.0), "l0": (8e-6, 1.8e-5, 4e-5, 9e-5)},
)
FEW = {"densities": (0.2, 0.1), "levels": (0.45, 0.2, 0.1)}
FEW["knobs"] = {"cs": (-0.02, 0.0), "str": (1.2, 2.0), "l0": (1e-5, 1e-4)}
QUICK = recipe(3, 13, batch_size=100)
SETTINGS = {
    "laptop": Setting({"lenet": LENET, "resnet8": RESNET8}),
    "smoke": Setting(
        {
            "lenet": Net(Run(dataset="digits", recipe=QUICK), kept=(0.2,), **FEW),
            "resnet8": Net(grasp.dense("resnet8", "digits", QUICK, width=4), kept=(0.2,), **FEW),
        },
        trials=2,
    ),
}

ONCE = ("oneshot", "grasp", "snip", "synflow", "magnitude", "random")
ITEMS = {  # item → net, methods
    "lenet-tuning": ("lenet", tuple(METHODS)),
    "lenet-sparse": ("lenet", ("dense", "imp", "rewind", *ONCE, "gmp")),
    "lenet-moving": ("lenet", ("cs", "str", "dnw", "set", "rigl")),
    "lenet": ("lenet", tuple(METHODS)),
    "resnet8-sparse": ("resnet8", ("dense", "rewind", *ONCE, "gmp")),
    "resnet8-moving": ("resnet8", ("dnw", "set", "rigl", "str")),
    "resnet8": ("resnet8", tuple(METHODS)),
}
MAIN = ("lenet", "resnet8")


def cells(item: str, at: Setting) -> list[tuple[str, float | None, float]]:
    """(arm, density, point); the density is None where only the training decides it."""
    net, methods = ITEMS[item]
    found = []
    for text in at.methods if net in at.nets else ():
        method, _, options = text.partition("@")
        tried = [options]
        if item.endswith("-tuning"):
            tried = CONFIGS[method] if not options else []
        for variant in tried if method in methods else ():
            arm = f"{net}@{variant}/{method}" if variant else f"{net}/{method}"
            points = at.nets[net].points(method)
            if item.endswith("-tuning") and method not in ("dense", *KNOBS):
                points = (tuned_at(at.nets[net]),)
            found += [(arm, None if method in KNOBS else point, point) for point in points]
    return found


def tuned_at(net: Net) -> float:
    """The density at which a network's methods are tuned: the one nearest to TUNED_AT."""
    return min(net.densities, key=lambda d: abs(d - TUNED_AT))


def seeds(item: str, at: Setting) -> range:
    """The seeds of an item's trials; tuning has one that is no trial."""
    return range(TUNING_SEED, TUNING_SEED + 1) if item.endswith("-tuning") else at.seeds


def configuration(net: str, method: str, asked: tuple[str, ...] = ()) -> str:
    """The one of CONFIGS that a method has on a network: what tuning chose, unless a reader has set just that."""
    chosen = CHOSEN.get(net, {}).get(method, "default")
    return "default" if chosen.partition("=")[0] in asked else chosen


def trial(arm: str, at: Setting, seed: int, point: float) -> list[Run]:
    """The Run of one arm and trial at a point, a list of one."""
    name, variant, method = parts(arm)
    net, run = at.nets[name], dataclasses.replace(at.nets[name].base, seed=seed)
    given = options(variant or configuration(name, method, at.asked))
    changes = {key: given.pop(key) for key in ("lr", "weight_decay") if key in given}
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes))
    try:
        found = METHODS[method](net, run, point, **given)
    except TypeError as error:
        raise ValueError(
            f"Unknown option of {method} in {variant!r}, see lottery.experiments.compare: {error}."
        ) from error
    return [net.read(found, point)]


def options(text: str) -> dict[str, Any]:
    """ "lr=0.03,share=erk" → {"lr": 0.03, "share": "erk"}; "default" → {}."""
    found = {}
    for part in text.split(",") if text != "default" else ():
        name, equals, value = part.partition("=")
        if not (name and equals):
            raise ValueError(f"Invalid options {text!r}: give name=value,name=value, such as lr=0.03,share=erk.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def override(at: Setting, **given: Any) -> Setting:
    """A Setting with a notebook's parameters in place of its own; those that are None change nothing.

    methods: as of `Setting`. model, dataset, train_fraction, iterations, batch_size, lr: of every network, which keeps
    its name; densities: compared at.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "methods" in given:
        if not (isinstance(given["methods"], list | tuple) and given["methods"]):
            raise ValueError(f"Invalid methods {given['methods']!r}: give a list of names, such as ['imp', 'gmp'].")
        given["methods"] = tuple(dict.fromkeys(map(str, given["methods"])))
    base = {name: given.pop(name) for name in ("model", "dataset", "train_fraction") if name in given}
    changes = {name: given.pop(name) for name in ("batch_size", "lr") if name in given}
    if (n := given.pop("iterations", None)) is not None:
        whole("iterations", n, 4)
        changes |= {"iterations": n, "milestones": (n // 2, n * 3 // 4)}
    if changes:
        given["asked"] = tuple(changes)
    densities = fractions(given.pop("densities")) if "densities" in given else None
    changed = functools.partial(_changed, base=base, changes=changes, densities=densities)
    nets = {name: changed(net) for name, net in at.nets.items()} if base or changes or densities else at.nets
    at = dataclasses.replace(at, nets=nets, **given)
    for item in MAIN:  # what is wrong with a method's options is told here
        for arm, _, point in cells(item, at):
            trial(arm, at, at.seed, point)
    return at


def _changed(net, base, changes, densities):
    if densities:
        levels = tuple(sorted({*net.levels, *densities}, reverse=True))
        net = dataclasses.replace(net, densities=densities, levels=levels, kept=(tuned_at(net),) if net.kept else ())
    return dataclasses.replace(net, base=grasp.changed(net.base, base, changes))


# What is read of the runs ---------------------------------------------------------------------------------------------


def at_density(
    density: float, found: Sequence[float], values: "Sequence[float | np.ndarray] | np.ndarray"
) -> "float | np.ndarray | None":
    """A trial's value at a density by interpolation over its logarithm, or None where no two runs are close around it.

    found: densities of its runs, 0 ones among them; values: as many numbers, or arrays.
    """
    pairs = sorted((d, i) for i, d in enumerate(found) if d > 0)
    if exact := [i for d, i in pairs if math.isclose(d, density, rel_tol=1e-3)]:
        return values[exact[0]]
    below, above = [pair for pair in pairs if pair[0] < density], [pair for pair in pairs if pair[0] > density]
    if not below or not above:
        return None
    (low, i), (high, j) = below[-1], above[0]
    if high > WIDEST * low * (1 + 1e-9):
        return None
    share = math.log(density / low) / math.log(high / low)
    return (1 - share) * values[i] + share * values[j]


def cost(run: Run) -> tuple[float, float]:
    """(all that is trained for a network, its part after the masks are what they stay), in units of one training."""
    chain = [run]
    while parent := chain[-1].parent:
        chain.append(parent)
    steps = [r.recipe.iterations - r.rewind_to for r in chain]
    fixed = 1.0 if isinstance(run.method, Ticket) or run.method == NOTHING else 1 - getattr(run.method, "end", 1.0)
    return sum(steps) / run.recipe.iterations, fixed * steps[0] / run.recipe.iterations


PAPER = Paper(__name__)
setting, runs, arm = PAPER.setting, PAPER.runs, PAPER.arm
