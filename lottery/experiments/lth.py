"""What to run for the Lottery Ticket Hypothesis (arXiv 1803.03635v5), LeNet-300-100 on MNIST.

A `Setting` is the experiment at one scale; its defaults are the paper's (figure 2, sections 1 and 2, appendix G).
The settings that the paper does not state: input scaling (ours: pixels in [0, 1]), Adam's β and ε (PyTorch's),
the bias initialisation (zeros, as in the authors' code), the last incomplete minibatch (dropped).
"""

import dataclasses
import functools
from dataclasses import dataclass, field

from lottery import data, masks, models
from lottery.experiments.runs import INITS, Run, rates
from lottery.training import Recipe

NETWORKS = {"lenet": "lenet_300_100", "resnet18": "resnet20"}  # by the paper's names; its "Resnet-18" has 20 layers
PRUNING = ("rate", "rate_conv", "rate_output", "scope", "rewind_to")
GUESSED = ("input scaling", "Adam β, ε", "bias initialisation", "incomplete last minibatch")


@dataclass(frozen=True)
class Setting:
    """One experiment at one scale.

    base: the dense Run of the first trial. trials: seeds base.seed … base.seed + trials − 1. rounds: of IMP.
    control_rounds: rounds at which the controls run. draws: random reinitialisations per ticket; random_draws: random
    sparse networks per trial. one_shot: fractions p to remove in one step (None: the IMP density of round 10, or of the
    last one before).
    init: what the tickets of the "imp" arm start from; anything but "reset" is an exploration, not the paper.
    """

    base: Run = field(default_factory=lambda: Run(recipe=Recipe(test_readings="all")))
    trials: int = 5
    rounds: int = 20
    control_rounds: tuple[int, ...] = tuple(range(1, 21))
    draws: int = 3
    random_draws: int = 2
    one_shot: tuple[float | None, ...] = (0.05, 0.325, 0.5, 0.7, 0.825, None, 0.95, 0.98)
    init: str = "reset"

    def __post_init__(self):
        for name in ("trials", "rounds", "draws", "random_draws"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"Invalid {name} {value!r}: give a whole number from 1.")
        if any(p is not None and not 0 < p < 1 for p in self.one_shot):
            raise ValueError(f"Invalid one_shot {self.one_shot}: give fractions to remove, 0 < p < 1.")
        if self.init not in INITS:
            raise ValueError(f"Invalid init {self.init!r}: give one of {', '.join(INITS)}.")
        if (self.init == "rewind") != (self.base.rewind_to > 0):
            raise ValueError(f"Invalid rewind_to {self.base.rewind_to} with init {self.init!r}: they go together.")

    @property
    def seeds(self):
        return range(self.base.seed, self.base.seed + self.trials)

    # The arms: what is trained of one trial at one level, as a list of Runs.

    def dense(self, seed, level=0):
        """The whole network; how it would be pruned is no part of it."""
        unpruned = {name: getattr(Run, name) for name in PRUNING}
        return [dataclasses.replace(self.base, seed=seed, **unpruned)]

    def imp(self, seed, level):
        """The network after `level` rounds of iterative magnitude pruning."""
        [run] = self.dense(seed)
        pruning = {name: getattr(self.base, name) for name in PRUNING}
        chain = {"rewind": "rewind", "continue": "continue"}.get(self.init, "reset")
        for r in range(1, level + 1):
            init = chain if r < level else "reset" if self.init == "continue" else self.init
            run = dataclasses.replace(run, parent=run, init=init, **pruning)
        return [run]

    def reinit(self, seed, level):
        """The ticket's mask on fresh initialisations."""
        return self._control(self.imp(seed, level), "reinit", self.draws)

    def random(self, seed, level):
        """Random masks of the ticket's layer densities on fresh initialisations."""
        return self._control(self.imp(seed, level), "random", self.random_draws)

    def oneshot(self, seed, p):
        """The dense network pruned once: fraction p of the hidden weights, p/2 of the output layer (appendix G.4)."""
        [dense] = self.dense(seed)
        p = self.one_shot_rate(self.density(min(10, self.rounds))) if p is None else p
        return [dataclasses.replace(dense, recipe=self._off_trunk, parent=dense, rate=p, rate_output=p / 2)]

    def oneshot_reinit(self, seed, p):
        return self._control(self.oneshot(seed, p), "reinit", self.draws)

    def _control(self, tickets, init, draws):
        [ticket] = tickets
        recipe = ticket.recipe if ticket.level in CONTROL_CURVES else self._off_trunk
        return [dataclasses.replace(ticket, recipe=recipe, init=init, draw=i) for i in range(draws)]

    @property
    def _off_trunk(self):
        """The recipe where no figure draws curves: the test set is read at log-spaced iterations."""
        return dataclasses.replace(self.base.recipe, test_readings="log")

    # Densities, by counting.

    def density(self, level):
        """Fraction of all weights kept after `level` rounds, by the counts that `lth.prune` keeps."""
        return sum(_after(n, rate, level) for n, rate in self._sizes) / sum(n for n, _ in self._sizes)

    def one_shot_rate(self, density):
        """The p that leaves `density` when p of the hidden weights and p/2 of the output layer go."""
        *hidden, (out, _) = self._sizes
        n = sum(n for n, _ in hidden)
        return (1 - density) * (n + out) / (n + out / 2)

    @functools.cached_property
    def _sizes(self):
        """(weights, rate per round) of each layer."""
        model = models.create(self.base.model, seed=0, in_shape=data.SETS[self.base.dataset].shape)
        each = rates(model, self.base)
        return [(layer.weight.numel(), each[name]) for name, layer in masks.prunable(model).items()]


def _after(n, rate, level):
    for _ in range(level):
        n -= round(rate * n)
    return n


CONTROL_CURVES = (3, 7)  # levels at which figure 3 draws reinitialised networks reading by reading

LAPTOP = {
    "rounds": 15,
    "control_rounds": (3, 7, 9, 10, 12, 15),
    "draws": 1,
    "random_draws": 1,
    "one_shot": (0.825, None, 0.95),
}
SCALES = ("paper", "primary", "laptop", "smoke")  # highest first
SETTINGS = {
    "paper": Setting(),
    # The paper's trainings that decide the primary claims, with twice its trials: figure 4 is 180 runs.
    "primary": Setting(trials=10, rounds=15, control_rounds=(7,), draws=1, one_shot=(None,)),
    "laptop": Setting(Run(recipe=Recipe(iterations=15_000, test_readings="all")), **LAPTOP),
    "smoke": Setting(
        Run(dataset="digits", recipe=Recipe(iterations=300, eval_every=20, test_readings="all")), trials=2, **LAPTOP
    ),
}

# What each figure draws: arm → levels (None: all that the setting has).
ITEMS = {
    "fig1": {"imp": None, "random": None},
    "fig3": {"imp": (0, 3, 7, 12, 15, 18), "reinit": (3, 7)},
    "fig4": {"imp": None, "reinit": None, "oneshot": None},
    "fig11": {"imp": (0, 3, 7, 12, 15, 18), "reinit": (3, 7)},
    "fig12": {"imp": None, "reinit": None},
    "fig14": {"imp": None, "reinit": None, "random": None},
}


def setting(scale):
    """The preset of a scale. Raises ValueError for an unknown one."""
    if scale not in SCALES:
        raise ValueError(f"Unknown scale {scale!r}: choose one of {', '.join(SCALES)}.")
    return SETTINGS[scale]


def runs(items, at):
    """All Runs of some items (None: all) at a Setting or scale, most decisive first: the trunks, then the controls."""
    at = setting(at) if isinstance(at, str) else at
    items = list(ITEMS) if not items else [items] if isinstance(items, str) else items
    if unknown := [item for item in items if item not in ITEMS]:
        raise ValueError(f"Unknown item {unknown[0]!r} of lth: choose from {', '.join(ITEMS)}.")
    cells = dict.fromkeys(cell for item in items for cell in cells_of(item, at))
    return list(dict.fromkeys(r for arm, point in cells for seed in at.seeds for r in trial(arm, at, seed, point)))


def cells_of(item, at):
    """The (arm, point) pairs of an item: the networks that one trial of it trains."""
    return [
        (arm, point)
        for arm, levels in ITEMS[item].items()
        for point in points(arm, at)
        if levels is None or point in levels
    ]


def points(arm, at):
    """Where an arm has networks: levels, or fractions p for one-shot pruning."""
    if arm.startswith("oneshot"):
        return at.one_shot
    return (0,) if arm == "dense" else range(at.rounds + 1) if arm == "imp" else at.control_rounds


def trial(arm, at, seed, point):
    """The Runs of one arm and trial at one of its `points`."""
    return getattr(at, arm.replace("-", "_"))(seed, point)


def arm(name, x, seed, scale):
    """The Runs of an arm "net/control" for one trial at the density that the paper prints as `x` %, or None.

    None: the arm or that density is not an experiment here. Controls: dense, imp, reinit, random, oneshot,
    oneshot-reinit. `x` may be up to 6 % off, because printed densities are rounded.
    """
    net, control = name.split("/")
    at, paper = setting(scale), SETTINGS["paper"]
    if net != "lenet" or control not in ("dense", "imp", "reinit", "random", "oneshot", "oneshot-reinit"):
        return None
    if control == "dense":
        return at.dense(seed)
    if control.startswith("oneshot"):  # p = 0.825 is printed as 17.6 %: the output layer loses half as much
        density = {p: paper.density(10) if p is None else 1 - p / paper.one_shot_rate(0) for p in at.one_shot}
    else:
        density = {level: paper.density(level) for level in points(control, at)}
    point = min(density, key=lambda p: abs(density[p] * 100 / x - 1))
    return trial(control, at, seed, point) if abs(density[point] * 100 / x - 1) < 0.06 else None


def override(at, **given):
    """A Setting with a notebook's parameters in place of its own; those that are None change nothing."""
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("iterations", "rounds"):
        if name in given and (type(given[name]) is not int or given[name] < 1):
            raise ValueError(f"Invalid {name} {given[name]!r}: give a whole number from 1.")
    recipe = {name: given.pop(name) for name in ("iterations", "batch_size", "lr") if name in given}
    in_base = ("model", "dataset", "seed", "train_fraction", "rate", "rate_output", "scope", "rewind_to")
    base = {name: given.pop(name) for name in in_base if name in given}
    if "iterations" in recipe:
        recipe["eval_every"] = min(at.base.recipe.eval_every, recipe["iterations"])
    run = dataclasses.replace(at.base, **base, recipe=dataclasses.replace(at.base.recipe, **recipe))
    if "rounds" in given:
        given["control_rounds"] = tuple(r for r in at.control_rounds if r <= given["rounds"]) or (given["rounds"],)
    densities = given.pop("one_shot_densities", None)
    at = dataclasses.replace(at, base=run, **given)
    return at if densities is None else dataclasses.replace(at, one_shot=_one_shot(at, densities))


def _one_shot(at, densities):
    """Fractions to remove in one step for a list of densities."""
    listed = isinstance(densities, list | tuple) and all(isinstance(d, float) for d in densities)
    rates = tuple(map(at.one_shot_rate, densities)) if listed else ()
    if not rates or not all(0 < p < 1 for p in rates):
        least = 1 - 1 / at.one_shot_rate(0)
        raise ValueError(f"Invalid one_shot_densities {densities!r}: give a list of fractions, {least:.2g} < kept < 1.")
    return rates
