"""The papers of this book, and what the module of a paper offers. A further paper is one module and a line in `PAPERS`.

A module of `lottery.experiments` must have

    SETTINGS    {scale: Setting}, the highest first: "paper" is what the paper did, the last one a look in seconds
    ITEMS       the names of its figures and tables, "fig3", "table1"
    GUESSED     the settings that nothing printed or published states, in a few words each
    cells(item, at) -> [(arm, x, point)]     the networks of which one trial of an item consists at a Setting:
                arm "net@variant/control", x its density in (0, 1], 1 for a dense one, point what `trial` is given
    trial(arm, at, seed, point) -> [Run]     the Runs of one arm and trial there: one, or one for each repeated draw
    override(at, **parameters) -> Setting    a Setting with a notebook's parameters in place of its own

and may have

    MAIN        the items that an exploration trains; default: all
    MEASURED    items that are computed without training: `Setting.measured` has their `cells(item)` and
                `prunings(item)`, the module `measured(item, arm, x, seed, scale) -> [Measurement]`
    EXACT       {quantity: function of an arm -> number} for claims that need arithmetic only
    READS       {quantity: function of a stored row -> number} for claims about what only this paper reads of its runs;
                a quantity named "… ratio" returns a logarithm; NaN where a network has no such number
    shares(arm, x, rows, quantity) -> [share], or None     how much each stored row of a trial counts for an arm at what
                the paper prints as x %; None where x is out of reach. Default: all alike
    place(arm, x) -> words, or None    what x is for an arm whose x is no density, as "round 3"; default: none
    seeds(item, at) -> range    of the trials of an item; default: the Setting's
    NETWORKS    {net: name in `lottery.models`} for claims about the networks themselves
    PLAIN       the network that the chapter's figures show where they name none, and whose name their arms leave out
    called(changed) -> {arm: words}    arms that are something else under a notebook's parameters; default: none
    PRINTS      "density" (default) or "sparsity": the percentage by which the paper names a network's size

A Setting is one of `Trials`, with fields `trials` and `seed`. What the command line, the scorecard and the chapters ask
beyond that follows from these and is here; the module ends with

    PAPER = Paper(__name__)
    setting, runs, arm = PAPER.setting, PAPER.runs, PAPER.arm
"""

import copy
import importlib
import sys
from collections.abc import Iterable
from typing import Any

from lottery import data, models
from lottery.experiments import PAPERS
from lottery.experiments.runs import Measurement, Run, chosen
from lottery.methods import own_numbers, whole

COUNTS = {"trials": 1_000, "rounds": 1_000, "draws": 1_000}  # more would take hours to list, before any training
NEAR = 0.06  # printed densities are rounded: how far off the x of a claim may be, as a ratio


def paper(name: str) -> "Paper":
    """A paper by its name. Raises ValueError for an unknown one."""
    if name not in PAPERS:
        raise ValueError(f"Unknown paper {name!r}: choose one of {', '.join(PAPERS)}.")
    return importlib.import_module(f"lottery.experiments.{PAPERS[name]}").PAPER


def parts(arm: str) -> tuple[str, str, str]:
    """(net, variant, control) of "net@variant/control"; a variant may be empty."""
    net, control = arm.split("/")
    net, _, variant = net.partition("@")
    return net, variant, control


class Trials:
    """The base of every Setting: `seeds` are those of its trials, seed … seed + trials − 1."""

    def __post_init__(self):
        own_numbers(self)
        whole("trials", self.trials)
        whole("seed", self.seed, 0)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.trials)


class Paper:
    """What follows from a paper's module, made at the end of it."""

    def __init__(self, module):
        self.module = sys.modules[module]
        self.name = next((name for name, at in PAPERS.items() if module.endswith(f".{at}")), module)
        self.settings, self.scales = self.module.SETTINGS, tuple(self.module.SETTINGS)
        self.guessed = self.module.GUESSED
        self.cells, self.trial = self.module.cells, self.module.trial
        self.measured_items = getattr(self.module, "MEASURED", ())
        self.exact = getattr(self.module, "EXACT", {})
        self.reads = getattr(self.module, "READS", {})
        self.networks = getattr(self.module, "NETWORKS", {})
        self.shares = getattr(self.module, "shares", None)
        self.place = getattr(self.module, "place", lambda name, x: None)
        self.seeds = getattr(self.module, "seeds", lambda item, at: at.seeds)
        self.called = getattr(self.module, "called", lambda changed: {})
        self.prints = getattr(self.module, "PRINTS", "density")
        self._found = {}

    @property
    def items(self) -> tuple[str, ...]:
        return tuple(self.module.ITEMS)

    @property
    def main(self) -> tuple[str, ...]:
        return getattr(self.module, "MAIN", self.items)

    def setting(self, scale: str) -> Any:
        """The preset of a scale. Raises ValueError for an unknown one."""
        if scale not in list(self.settings):  # whatever was given, hashable or not
            raise ValueError(f"Unknown scale {scale!r}: choose one of {', '.join(self.settings)}.")
        return self.settings[scale]

    def override(self, at: Any, **parameters: Any) -> Any:
        """A Setting with other parameters. Raises ValueError for a number or name that no experiment can have."""
        for name, known in (("model", models.MODELS), ("dataset", data.SETS)):
            if (value := parameters.get(name)) is not None and value not in list(known):
                raise ValueError(f"Invalid {name} {value!r}: give one of {', '.join(known)}.")
        for name, value in parameters.items():
            if name in COUNTS and isinstance(value, int) and value > COUNTS[name]:
                raise ValueError(f"Invalid {name} {value}: give {COUNTS[name]:,} at most.")
        return self.module.override(at, **parameters)

    def runs(self, items: str | Iterable[str] | None, at: Any) -> list[Run | Measurement]:
        """All Runs, or Measurements, of some items (None: all) at a Setting or scale: net by net, trial by trial."""
        at, found = self.setting(at) if isinstance(at, str) else at, {}
        for item in chosen(items, self.items, self.name):
            if item in self.measured_items:
                found |= dict.fromkeys(at.measured.prunings(item))
                continue
            nets = {}
            for arm, _, point in self.cells(item, at):
                nets.setdefault(self.net(arm), {})[arm, point] = None
            for cells in nets.values():
                tried = [(arm, seed, p) for seed in self.seeds(item, at) for arm, p in cells]
                found |= dict.fromkeys(r for arm, seed, p in tried for r in self.trial(arm, at, seed, p))
        return list(found)

    def net(self, arm: str) -> str:
        """The part of an arm of which all trials come before those of the next."""
        return arm.split("/")[0]

    def short(self, arm: str) -> str:
        """An arm as the chapter's figures call it: "imp" and "variant/imp" of the PLAIN network, else as it is."""
        plain = getattr(self.module, "PLAIN", "/")
        return arm.removeprefix(f"{plain}/").removeprefix(f"{plain}@")

    def density(self, x: float) -> float:
        """The density of what the paper prints as `x` %; inside, nothing else is used."""
        return round((100 - x if self.prints == "sparsity" else x) / 100, 6)

    def arm(self, name: str, x: float | None, seed: int, scale: str) -> list[Run | Measurement] | None:
        """The Runs of an arm for one trial, at its cell nearest to what the paper prints as `x` %.

        None: the arm is no experiment here, or has no cell near enough.
        """
        points = self._points(scale)
        if name.endswith("/dense"):  # an arm of its own, or where another arm of the network starts
            name = next((arm for arm in points if arm.split("/")[0] == name.split("/")[0] and 1.0 in points[arm]), name)
            x = 100 if self.prints == "density" else 0
        cells = points.get(name, {})
        if not cells or x is None:
            return None
        at = self.density(x)
        near, point = min((abs(d / at - 1), i, point) for i, (d, point) in enumerate(cells.items()))[::2]
        return self.trial(name, self.setting(scale), seed, point) if near < NEAR else None

    def measured(self, item: str, name: str, x: float | None, seed: int, scale: str) -> list[Measurement] | None:
        """The Measurements of an arm for a trial at what the paper prints as `x` %, as `item` measures it, or None."""
        return self.module.measured(item, name, x, seed, scale) if item in self.measured_items else None

    def _points(self, scale):
        """{arm: {density: point}} of all that is trained at a scale; kept until its Setting or the items are others."""
        at, items = self.setting(scale), copy.copy(self.module.ITEMS)
        kept_for, found = self._found.get(scale, ((None, None), {}))
        if kept_for[0] is not at or kept_for[1] != items:
            found = {}
            for item in self.items:
                for arm, x, point in self.cells(item, at) if item not in self.measured_items else ():
                    found.setdefault(arm, {})[x] = point
            self._found[scale] = (at, items), found
        return found
