"""What to run for the Lottery Ticket Hypothesis (arXiv 1803.03635v5), LeNet-300-100 on MNIST.

A `Setting` is the experiment at one scale; its defaults are the paper's (figure 2, sections 1, 2, appendices B to G).
An arm is what is trained of one trial: "imp", or with another recipe or network, a key of VARIANTS, "sgd-0.8/imp".
The settings that the paper does not state: input scaling (ours: pixels in [0, 1]), Adam's β and ε (PyTorch's),
the bias initialisation (zeros, as in the authors' code), the last incomplete minibatch (dropped).
"""

import dataclasses
import functools
import itertools
from dataclasses import dataclass, field

from lottery import data, masks, models
from lottery.experiments.papers import Paper
from lottery.experiments.runs import INITS, Run, chosen, preset, rates
from lottery.training import Recipe

NETWORKS = {"lenet": "lenet_300_100", "resnet18": "resnet20"}  # by the paper's names; its "Resnet-18" has 20 layers
PRUNING = ("rate", "rate_conv", "rate_output", "scope", "rewind_to")
GUESSED = ("input scaling", "Adam β, ε", "bias initialisation", "incomplete last minibatch")


@dataclass(frozen=True)
class Setting:
    """One experiment at one scale.

    base: the dense Run of the first trial. trials: seeds base.seed … base.seed + trials − 1. rounds: of IMP.
    control_rounds: rounds at which the controls run. draws: random reinitialisations per ticket; random_draws: random
    sparse networks per trial. probe_rounds: rounds at which the appendix's controls run, once per ticket.
    sweep_rounds: of the appendix's sweeps; far_rounds: of the one that the paper follows below 1 %.
    one_shot: fractions p to remove in one step (None: the IMP density of round 10, or of the last one before).
    init: what the tickets of the "imp" arm start from; anything but "reset" is an exploration, not the paper.
    """

    base: Run = field(default_factory=lambda: Run(recipe=Recipe(test_readings="all")))
    trials: int = 5
    rounds: int = 20
    control_rounds: tuple[int, ...] = tuple(range(1, 21))
    draws: int = 3
    random_draws: int = 2
    probe_rounds: tuple[int, ...] = tuple(range(1, 21))
    sweep_rounds: int = 20
    far_rounds: int = 22
    one_shot: tuple[float | None, ...] = (0.05, 0.325, 0.5, 0.7, 0.825, None, 0.95, 0.98)
    init: str = "reset"

    def __post_init__(self):
        for name in ("trials", "rounds", "draws", "random_draws", "sweep_rounds", "far_rounds"):
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
        return self._pruned(seed, level, self.init, self.base.recipe)

    def continued(self, seed, level):
        """Strategy 2 of appendix B: training goes on between rounds, and only the ticket of the level is reset."""
        return self._pruned(seed, level, "continue", self._off_trunk)

    def _pruned(self, seed, level, last, recipe):
        """The network that starts from `last`, below the chain of rounds that goes with it."""
        chain = _chain(self, seed, level, last if last in ("rewind", "continue") else "reset", recipe)
        return [chain if not level else dataclasses.replace(chain, init="reset" if last == "continue" else last)]

    def reinit(self, seed, level):
        """The ticket's mask on fresh initialisations."""
        return self._control(self.imp(seed, level), "reinit", self.draws)

    def random(self, seed, level):
        """Random masks of the ticket's layer densities on fresh initialisations."""
        return self._control(self.imp(seed, level), "random", self.random_draws)

    def prune_at_init(self, seed, level):
        """As many weights of each layer as the ticket has, the largest of θ₀: pruned before any training."""
        share = {name: _after(n, rate, level) / n for name, (n, rate) in self._sizes.items()}
        [dense] = self.dense(seed)
        return [dataclasses.replace(dense, recipe=self._off_trunk, density=tuple(share.items()))]

    def dm_reinit(self, seed, level):
        """The ticket's mask on values drawn from its own initial values (appendix F)."""
        return self._control(self.imp(seed, level), "survivors", 1)

    def noise(self, seed, level, c):
        """The ticket with noise of c σ on its initial values (appendix F)."""
        return self._control(self.imp(seed, level), "noise", 1, noise=c)

    def oneshot(self, seed, p):
        """The dense network pruned once: fraction p of the hidden weights, p/2 of the output layer (appendix G.4)."""
        [dense] = self.dense(seed)
        p = self.one_shot_rate(self.density(min(10, self.rounds))) if p is None else p
        return [dataclasses.replace(dense, recipe=self._off_trunk, parent=dense, rate=p, rate_output=p / 2)]

    def oneshot_reinit(self, seed, p):
        return self._control(self.oneshot(seed, p), "reinit", self.draws)

    def _control(self, tickets, init, draws, **more):
        [ticket] = tickets
        drawn = ticket.level in CONTROL_CURVES and init in ("reinit", "random")
        recipe = ticket.recipe if drawn else self._off_trunk
        return [dataclasses.replace(ticket, recipe=recipe, init=init, draw=i, **more) for i in range(draws)]

    @property
    def _off_trunk(self):
        """The recipe where no figure draws curves: the test set is read at log-spaced iterations."""
        return dataclasses.replace(self.base.recipe, test_readings="log")

    # Other recipes and networks.

    def variant(self, name):
        """The Setting of a sweep's point: pruned until as few weights are left as here after the sweep's rounds."""
        change = dict(VARIANTS[name])
        left = self.weights(getattr(self, change.pop("until", "sweep_rounds")))
        recipe = {k: change.pop(k) for k in ("optimizer", "lr", "momentum", "batch_size") if k in change}
        readings = "all" if name in WITH_MASKS else "log"
        recipe = dataclasses.replace(self.base.recipe, **recipe, test_readings=readings)
        at = dataclasses.replace(self, base=dataclasses.replace(self.base, recipe=recipe, **change))
        rounds = next(r for r in itertools.count() if at.weights(r) <= left)
        probes = tuple(r for r in self.probe_rounds if r <= rounds)
        return dataclasses.replace(at, rounds=max(1, rounds), control_rounds=probes, probe_rounds=probes)

    # Densities, by counting.

    def weights(self, level):
        """How many weights are left after `level` rounds, by the counts that `lth.prune` keeps."""
        return sum(_after(n, rate, level) for n, rate in self._sizes.values())

    def density(self, level):
        """Fraction of all weights kept after `level` rounds."""
        return self.weights(level) / self.weights(0)

    def one_shot_rate(self, density):
        """The p that leaves `density` when p of the hidden weights and p/2 of the output layer go."""
        *hidden, (out, _) = self._sizes.values()
        n = sum(n for n, _ in hidden)
        return (1 - density) * (n + out) / (n + out / 2)

    @functools.cached_property
    def _sizes(self):
        """{layer: (weights, rate per round)}."""
        shape = data.SETS[self.base.dataset].shape
        model = models.create(self.base.model, seed=0, in_shape=shape, **dict(self.base.options))
        each = rates(model, self.base)
        return {name: (layer.weight.numel(), each[name]) for name, layer in masks.prunable(model).items()}


@functools.lru_cache(maxsize=10_000)
def _chain(at, seed, level, init, recipe):
    """The Run of a chain at a level; cached, because every level stands on the one before."""
    if not level:
        return at.dense(seed)[0]
    parent = _chain(at, seed, level - 1, init, recipe)
    pruning = {name: getattr(at.base, name) for name in PRUNING}
    return dataclasses.replace(parent, parent=parent, init=init, recipe=recipe, **pruning)


def _after(n, rate, level):
    for _ in range(level):
        n -= round(rate * n)
    return n


CONTROL_CURVES = (3, 7)  # levels at which figure 3 draws reinitialised networks reading by reading

# Points of the appendix's sweeps: what differs from the base Run and its recipe. until: which rounds of the base's say
# how few weights are left at the end.
VARIANTS = {
    **{f"lr{lr}": {"lr": float(lr)} for lr in ("2.5e-5", "2e-4", "2e-3", "6.4e-3")},
    **{f"sgd-{lr}": {"optimizer": "sgd", "lr": lr} for lr in (0.1, 0.4)},
    "sgd-0.8": {"optimizer": "sgd", "lr": 0.8, "until": "far_rounds"},
    **{f"momentum-{lr}": {"optimizer": "sgd", "momentum": 0.9, "lr": lr} for lr in (0.025, 0.1)},
    "rate0.1": {"rate": 0.1, "rate_output": 0.05},
    "rate0.4": {"rate": 0.4, "rate_output": 0.2, "until": "rounds"},
    **{f"sigma{s}": {"options": (("init", "normal"), ("sigma", s))} for s in (0.03, 0.1, 0.3)},
    **{f"hidden{n}-{n // 3}": {"options": (("hidden", (n, n // 3)),), "until": "rounds"} for n in (75, 150)},
    "kaiming": {"options": (("init", "kaiming fan_in"),)},
}
WITH_MASKS = ("sgd-0.8",)  # figures 16, 22 and 24 look at its masks
GUESSED_POINTS = ("sigma0.03", "sigma0.3", "hidden75-25", "hidden150-50")  # the paper's own are not stated in its text

LAPTOP = {
    "rounds": 15,
    "control_rounds": (3, 7, 9, 10, 12, 15),
    "draws": 1,
    "random_draws": 1,
    "probe_rounds": (7, 12, 15),
    "sweep_rounds": 7,
    "far_rounds": 21,
    "one_shot": (0.825, None, 0.95),
}
SMOKE = LAPTOP | {"rounds": 7, "control_rounds": (3, 7), "probe_rounds": (7,), "sweep_rounds": 1, "far_rounds": 7}
SETTINGS = {  # highest scale first
    "paper": Setting(),
    # The paper's trainings that decide the primary claims, with twice its trials: figure 4 is 180 runs.
    "primary": Setting(
        trials=10, rounds=15, control_rounds=(7,), draws=1, probe_rounds=(7,), sweep_rounds=7, one_shot=(None,)
    ),
    "laptop": Setting(Run(recipe=Recipe(iterations=15_000, test_readings="all")), **LAPTOP),
    "smoke": Setting(
        Run(dataset="digits", recipe=Recipe(iterations=100, eval_every=10, test_readings="all")), trials=2, **SMOKE
    ),
}
SCALES = tuple(SETTINGS)

# What each figure draws: arm → levels (None: all that the setting has). MAIN: of the main text, and 14.
MAIN = ("fig1", "fig3", "fig4", "fig11", "fig12", "fig14")
ITEMS = {
    "fig1": {"imp": None, "random": None},
    "fig3": {"imp": (0, 3, 7, 12, 15, 18), "reinit": (3, 7)},
    "fig4": {"imp": None, "reinit": None, "oneshot": None},
    "fig11": {"imp": (0, 3, 7, 12, 15, 18), "reinit": (3, 7)},
    "fig12": {"imp": None, "reinit": None},
    "fig14": {"imp": None, "reinit": None, "random": None},
    "fig9": {"imp": None, "continued": None},
    "fig15": {"imp": None},
    "fig16": {"sgd-0.8/imp": None},
    "fig17": {"imp": None, "reinit": None, "dm-reinit": None}
    | {f"sgd-0.8/{control}": None for control in ("imp", "reinit", "dm-reinit")},
    "fig18": {"imp": None, "reinit": None, "prune-at-init": None},
    "fig19": {"dm-reinit": None},  # whose rows hold what is drawn, see work._moves
    "fig20": {"dm-reinit": None},
    "fig21": {"imp": None},
    "fig22": {"sgd-0.8/imp": None},
    "fig23": {"imp": None},
    "fig24": {"sgd-0.8/imp": None},
    "fig25": {"imp": None, "reinit": None} | {f"noise-{c}": None for c in (0.5, 1, 2, 3)},
}
ITEMS |= {
    item: dict.fromkeys(["imp", *(f"{name}/imp" for name in names)])
    for item, names in {
        "fig26": ("lr2.5e-5", "lr2e-4", "lr2e-3", "lr6.4e-3"),
        "fig27": ("sgd-0.4", "sgd-0.8"),
        "fig28": ("momentum-0.025", "momentum-0.1"),
        "fig29": ("rate0.1", "rate0.4"),
        "fig30": ("sigma0.03", "sigma0.1", "sigma0.3"),
        "fig31": ("hidden75-25", "hidden150-50"),
        "code": ("sgd-0.1", "kaiming"),  # no figure: settings of released code, beside the paper's
    }.items()
}


CONTROLS = {arm.split("/")[-1] for arms in ITEMS.values() for arm in arms} | {"dense", "oneshot-reinit"}


def setting(scale):
    """The preset of a scale. Raises ValueError for an unknown one."""
    return preset(scale, SETTINGS)


def runs(items, at):
    """All Runs of some items (None: all) at a Setting or scale, most decisive first: the trunks, then the controls."""
    at = setting(at) if isinstance(at, str) else at
    items = chosen(items, ITEMS, "lth")
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
    if "hidden" in arm and at.base.model != "lenet_300_100":
        return ()
    at, control = _of(arm, at)
    if control.startswith("oneshot"):
        return at.one_shot
    every = {"dense": (0,), "imp": range(at.rounds + 1), "reinit": at.control_rounds, "random": at.control_rounds}
    return every.get(control, at.probe_rounds)


def trial(arm, at, seed, point):
    """The Runs of one arm and trial at one of its `points`."""
    at, control = _of(arm, at)
    if control.startswith("noise-"):
        return at.noise(seed, point, float(control.removeprefix("noise-")))
    return getattr(at, control.replace("-", "_"))(seed, point)


def _of(arm, at):
    """The Setting and the control of an arm, "control" or "variant/control"."""
    *variant, control = arm.split("/")
    return (_variant(at, *variant) if variant else at), control


@functools.lru_cache(maxsize=256)
def _variant(at, name):
    return at.variant(name)


def arm(name, x, seed, scale):
    """The Runs of an arm "net/control" for one trial at the density that the paper prints as `x` %, or None.

    None: the arm or that density is not an experiment here. net: lenet, or lenet@variant. `x` may be up to 6 % off,
    because printed densities are rounded.
    """
    net, control = name.split("/")
    net, _, variant = net.partition("@")
    if net != "lenet" or control not in CONTROLS or (variant and variant not in VARIANTS):
        return None
    at, paper = (_variant(s, variant) if variant else s for s in (setting(scale), SETTINGS["paper"]))
    if control == "dense":
        return at.dense(seed)
    if control.startswith("oneshot"):  # p = 0.825 is printed as 17.6 %: the output layer loses half as much
        density = {p: paper.density(10) if p is None else 1 - p / paper.one_shot_rate(0) for p in at.one_shot}
    else:
        density = {level: paper.density(level) for level in points(control, at)}
    if not density:
        return None
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
        for name in ("control_rounds", "probe_rounds"):
            given[name] = tuple(r for r in getattr(at, name) if r <= given["rounds"]) or (given["rounds"],)
        for name in ("sweep_rounds", "far_rounds"):
            given[name] = min(getattr(at, name), given["rounds"])
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


def cells(item, at):
    """(arm, density, point): the networks of which one trial of an item consists."""
    return [(arm, _x(arm, at, point), point) for arm, point in cells_of(item, at)]


def _x(arm, at, point):
    at, control = _of(arm, at)
    if control == "dense":
        return 1.0
    if control.startswith("oneshot"):
        return at.density(10) if point is None else 1 - point / at.one_shot_rate(0)
    return at.density(point)


PAPER = Paper(__name__)
PAPER.runs, PAPER.arm = runs, arm  # until its items name arms as claims do
