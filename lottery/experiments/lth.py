"""What to run for the Lottery Ticket Hypothesis (arXiv 1803.03635v5), LeNet-300-100 on MNIST.

A `Setting` is the experiment at one scale; its defaults are the paper's (figure 2, sections 1 and 2, appendix G).
The settings that the paper does not state: input scaling (ours: pixels in [0, 1]), Adam's β and ε (PyTorch's),
the bias initialisation (zeros, as in the authors' code), the last incomplete minibatch (dropped).
"""

import dataclasses
import re
from dataclasses import dataclass, field

from lottery.experiments.runs import Run
from lottery.training import Recipe

GUESSED = ("input scaling", "Adam β, ε", "bias initialisation", "incomplete last minibatch")


@dataclass(frozen=True)
class Setting:
    """One experiment at one scale.

    base: the dense Run of trial 0. trials: seeds base.seed … base.seed + trials − 1. rounds: of IMP.
    control_rounds: rounds at which the controls run. draws: random reinitialisations per ticket; random_draws: random
    sparse networks per trial. one_shot: fractions p to remove in one step (None: the IMP density of round 10).
    """

    base: Run = field(default_factory=lambda: Run(recipe=Recipe(test_readings="all")))
    trials: int = 5
    rounds: int = 20
    control_rounds: tuple[int, ...] = tuple(range(1, 21))
    draws: int = 3
    random_draws: int = 2
    one_shot: tuple[float | None, ...] = (0.05, 0.325, 0.5, 0.7, 0.825, None, 0.95, 0.98)

    def __post_init__(self):
        for name in ("trials", "rounds", "draws", "random_draws"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"Invalid {name} {value!r}: give a whole number from 1.")
        if any(p is not None and not 0 < p < 1 for p in self.one_shot):
            raise ValueError(f"Invalid one_shot {self.one_shot}: give fractions to remove, 0 < p < 1.")

    @property
    def seeds(self):
        return range(self.base.seed, self.base.seed + self.trials)

    def imp(self, seed, level, strategy="reset"):
        """The network after `level` rounds. With "continue" every level but the last of the chain goes on training."""
        run = dataclasses.replace(self.base, seed=seed, rewind_to=0)
        for r in range(1, level + 1):
            if strategy == "continue" and r < level:
                run = dataclasses.replace(run, parent=run, init="continue")
            else:
                rewind_to = self.base.rewind_to
                init = "rewind" if rewind_to else "reset"
                run = dataclasses.replace(run, parent=run, init=init, rewind_to=rewind_to)
        return run

    def reinit(self, seed, level):
        """The ticket's mask on fresh initialisations."""
        return self._controls(self.imp(seed, level), "reinit", self.draws)

    def random(self, seed, level):
        """Random masks of the ticket's layer densities on fresh initialisations."""
        return self._controls(self.imp(seed, level), "random", self.random_draws)

    def oneshot(self, seed, p):
        """The dense network pruned once: fraction p of the hidden weights, p/2 of the output layer (appendix G.4)."""
        p = self.one_shot_rate(10) if p is None else p
        dense = self.imp(seed, 0)
        return dataclasses.replace(dense, recipe=self._side, parent=dense, rate=p, rate_output=p / 2)

    def oneshot_reinit(self, seed, p):
        return self._controls(self.oneshot(seed, p), "reinit", self.draws)

    def _controls(self, ticket, init, draws):
        recipe = ticket.recipe if ticket.level in CURVES else self._side
        return [dataclasses.replace(ticket, recipe=recipe, init=init, draw=i) for i in range(draws)]

    @property
    def _side(self):
        """The recipe off the trunk, where no figure draws curves: the test set is read at log-spaced iterations."""
        return dataclasses.replace(self.base.recipe, test_readings="log")

    def density(self, level):
        """Fraction of the paper's LeNet weights kept after `level` rounds, by the counts that `lth.prune` keeps."""
        return sum(_after(n, rate, level) for n, rate in self._layers()) / sum(n for n, _ in self._layers())

    def one_shot_rate(self, level):
        """p of the one-shot ticket with the density of IMP's `level`."""
        *hidden, (out, _) = self._layers()
        n = sum(n for n, _ in hidden)
        return (1 - self.density(level)) * (n + out) / (n + out / 2)

    def _layers(self):
        output = self.base.rate if self.base.rate_output is None else self.base.rate_output
        return (784 * 300, self.base.rate), (300 * 100, self.base.rate), (100 * 10, output)


CURVES = (3, 7)  # levels whose reinitialised networks figure 3 draws, reading by reading

SCALES = ("paper", "laptop", "smoke")  # highest first
SETTINGS = {
    "paper": Setting(),
    "laptop": Setting(
        base=Run(recipe=Recipe(iterations=15_000, test_readings="all")),
        rounds=15,
        control_rounds=(3, 7, 9, 10, 12, 15),
        draws=1,
        random_draws=1,
        one_shot=(0.825, None, 0.95),
    ),
    "smoke": Setting(
        base=Run(dataset="digits", recipe=Recipe(iterations=300, eval_every=20, test_readings="all")),
        trials=2,
        rounds=15,
        control_rounds=(3, 7, 10, 12, 15),
        draws=1,
        random_draws=1,
        one_shot=(0.825, None, 0.95),
    ),
}


def _after(n, rate, level):
    for _ in range(level):
        n -= round(rate * n)
    return n


# Items: the arms that each figure draws. An arm gives the runs of one trial at one level. ----------------------------

ITEMS = {
    "fig1": ("imp", "random"),
    "fig3": ("imp", "reinit"),
    "fig4": ("imp", "reinit", "oneshot"),
    "fig11": ("imp", "reinit"),
    "fig12": ("imp", "reinit"),
    "fig14": ("imp", "reinit", "random"),
}


def setting(scale):
    """The preset of a scale. Raises ValueError for an unknown one."""
    if scale not in SETTINGS:
        raise ValueError(f"Unknown scale {scale!r}: choose one of {', '.join(SCALES)}.")
    return SETTINGS[scale]


def runs(items, at):
    """All Runs of some items (None: all) at a Setting or scale, most decisive first: the trunks, then the controls."""
    at = setting(at) if isinstance(at, str) else at
    items = list(ITEMS) if not items else [items] if isinstance(items, str) else items
    if unknown := [item for item in items if item not in ITEMS]:
        raise ValueError(f"Unknown item {unknown[0]!r} of lth: choose from {', '.join(ITEMS)}.")
    arms = dict.fromkeys(arm for item in items for arm in ITEMS[item])
    found = (r for arm in arms for point in points(arm, at) for seed in at.seeds for r in trial(arm, at, seed, point))
    return list(dict.fromkeys(found))


def points(arm, at):
    """Where an arm has networks: levels, or fractions p for one-shot pruning."""
    if arm.startswith("oneshot"):
        return at.one_shot
    return (0,) if arm == "dense" else range(at.rounds + 1) if arm == "imp" else at.control_rounds


def trial(arm, at, seed, point):
    """The Runs of one arm and trial at one of its `points`."""
    found = getattr(at, arm.replace("-", "_"))(seed, point) if arm != "dense" else at.imp(seed, 0)
    return found if isinstance(found, list) else [found]


def arm(name, x, seed, scale):
    """The Runs of an arm "net/control" for one trial at the density that the paper prints as `x` %, or None.

    None: the arm or that density is not an experiment here. Controls: dense, imp, reinit, random, oneshot,
    oneshot-reinit. `x` may be up to 6 % off, because printed densities are rounded.
    """
    net, control = name.split("/")
    at = setting(scale)
    if net != "lenet" or not re.fullmatch("dense|imp|reinit|random|oneshot(-reinit)?", control):
        return None
    if control == "dense":
        return trial(control, at, seed, 0)
    if control.startswith("oneshot"):
        # the paper halves the output layer's rate, so p = 0.825 is printed as 17.6 %
        n, out = 265_200, 1_000
        density = {p: 1 - (at.one_shot_rate(10) if p is None else p) * (n + out / 2) / (n + out) for p in at.one_shot}
    else:
        density = {level: at.density(level) for level in points(control, at)}
    point = min(density, key=lambda p: abs(density[p] * 100 / x - 1))
    return trial(control, at, seed, point) if abs(density[point] * 100 / x - 1) < 0.06 else None
