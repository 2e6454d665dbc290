"""A Run: one training of one network, named by everything that determines it and by nothing else."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lottery import data, masks, models
from lottery.methods import NOTHING, Method, need, own_numbers, shares, whole
from lottery.training import Recipe

SCHEMA = 1
BUDGETS = ("", "layers", "total", "erk")
INITS = ("reset", "rewind", "reinit", "random", "continue", "effective", "survivors", "noise")
BATCH = {"chunks": 2, "class_sorted": True, "per_class": 10, "reinit_linear": True}  # as GraSP's authors draw it
CRITERIA = {"magnitude": {}, "random": {}, "snip": BATCH, "grasp": {**BATCH, "temperature": 200.0}}
CRITERIA |= {"synflow": {"rounds": 100}}


@dataclass(frozen=True, repr=False)
class Run:
    """One training. Defaults are the lottery ticket paper's LeNet; a published default never changes.

    model, dataset, valid, split_seed, train_fraction: as in `models.create`, `data.load` and `batches.take`.
    options: further options of `models.create`, as pairs in order of their names, such as (("width", 32),).
    seed: the trial; it draws θ₀. The data order comes from the key, so no two trainings share one.
    parent: the training whose final weights are pruned to make this one's mask; None for a dense network.
    rate, rate_conv, rate_output: fraction of survivors removed from Linear, Conv and the last layer
        (None: as Linear). scope: "layer" | "global" (one rate for all).
    init: the survivors' values: "reset" θ₀ | "rewind" θ_k | "reinit" a fresh θ₀′ | "random" a fresh θ₀′ under the
        mask shuffled layer by layer | "continue" the parent's final weights | "effective" the weights that the
        parent computes with in evaluation mode (L0: z ⊙ w) | "survivors" drawn from the survivors' own θ₀,
        layer by layer | "noise" θ₀ + N(0, (noise · σ)²), σ of the layer's θ₀.
    rewind_to: k, for init="rewind". rewind_schedule: "continue" trains iterations k…J, "restart" the whole schedule.
    shuffled: the mask is shuffled layer by layer, under the values that `init` says.
    draw: tells repetitions of a fresh draw apart.
    criterion: what ranks the weights, "magnitude" | "random" | "snip" | "grasp" | "synflow".
    density: None removes `rate` of the parent's survivors; a fraction keeps that share of all Linear and Conv weights,
        ranked together in one shot: of the parent's final weights, or without parent of θ₀: pruned at initialisation.
        ((layer, fraction), …) ranks each layer by itself.
    score: what differs from the criterion's options CRITERIA, as pairs in order of their names. For "snip" and "grasp":
        per_class images of each class in `chunks` chunks, which come in pairs of half the classes each
        (class_sorted=True) or have all classes each; reinit_linear as in `grasp.prune`; temperature ("grasp"). For
        "synflow": rounds.
    balanced: as in `data.load`: the validation images are as many of each class.
    layers: names of the layers that can be pruned, the denominator of densities and rates; None: all.
    method: what is trained beside weights, a `lottery.methods.Method`; by default nothing. With init "continue" a run
        goes on from a parent of the same method as that method says, its learned masks and all (CS: the next round).
    budget: what a parent gives in place of weights and masks: the densities that it ended with, of each layer
        ("layers"), of all of them together in every layer ("total"), or that one shared out again by ERK ("erk"). They
        take the place of the method's own density where it has one (GMP, DNW), else of the run's (SET, RigL); a layer
        keeps a weight at least. With it the training starts from θ₀. (STR's budgets, and others at STR's density.)
    """

    model: str = "lenet_300_100"
    dataset: str = "mnist"
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0
    parent: "Run | None" = None
    rate: float = 0.2
    rate_conv: float | None = None
    rate_output: float | None = 0.1
    scope: str = "layer"
    init: str = "reset"
    rewind_to: int = 0
    rewind_schedule: str = "continue"
    draw: int = 0
    valid: int | None = None
    split_seed: int = 0
    train_fraction: float = 1.0
    options: tuple[tuple[str, object], ...] = ()
    criterion: str = "magnitude"
    density: float | tuple[tuple[str, float], ...] | None = None
    score: tuple[tuple[str, object], ...] = ()
    noise: float = 0.0
    balanced: bool = False
    layers: tuple[str, ...] | None = None
    method: Method = NOTHING
    budget: str = ""
    shuffled: bool = False

    def __post_init__(self):
        own_numbers(self)
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"Invalid recipe of type {type(self.recipe).__name__}: give a lottery.training.Recipe.")
        if not isinstance(self.parent, Run | None):
            raise ValueError(f"Invalid parent of type {type(self.parent).__name__}: give a Run, or None.")
        known_names = {"init": INITS, "model": models.MODELS, "dataset": data.SETS, "scope": ("layer", "global")}
        for name, known in (known_names | {"budget": BUDGETS, "criterion": CRITERIA}).items():
            if (value := getattr(self, name)) not in list(known):
                raise ValueError(f"Invalid {name} {value!r}: give one of {', '.join(known)}.")
        for name in ("seed", "draw", "rewind_to", "split_seed"):
            whole(name, value := getattr(self, name), 0)
            if value >= 2**63:
                raise ValueError(f"Invalid {name} {value}: give a whole number below 2**63.")
        if self.valid is not None:
            whole("valid", self.valid, 0)
        for name in ("options", "score"):
            pairs = getattr(self, name)
            if not (isinstance(pairs, tuple) and list(pairs) == sorted(dict(pairs).items())):
                raise ValueError(f"Invalid {name} {pairs!r}: give a tuple of (name, value), sorted by name.")
        self._check_criterion()
        need(self, "method", isinstance(self.method, Method), "give one, such as lottery.cs.CS(s0=0.0)")
        for name in ("balanced", "shuffled"):
            need(self, name, isinstance(getattr(self, name), bool), "give True or False")
        if self.shuffled and (self.parent is None or self.goes_on):
            raise ValueError("Invalid shuffled True: there is no mask yet, or one that is still learned.")
        if not (self.layers is None or (isinstance(self.layers, tuple) and self.layers)):
            raise ValueError(f"Invalid layers {self.layers!r}: give a tuple of layer names, or None for all.")
        if self.budget and (self.parent is None or self.init != "reset"):
            raise ValueError(f"Invalid budget {self.budget!r}: it is taken from a parent, with init 'reset'.")
        need(self, "rewind_schedule", self.rewind_schedule in ("continue", "restart"), "give 'continue' or 'restart'")
        if not 0 <= self.rewind_to < self.recipe.iterations:
            raise ValueError(f"Invalid rewind_to {self.rewind_to}: give 0 <= iteration < {self.recipe.iterations}.")
        for name in ("rate", "rate_conv", "rate_output"):
            rate = getattr(self, name)
            if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < 1):
                raise ValueError(f"Invalid {name} {rate!r}: give the fraction of survivors to remove, 0 <= {name} < 1.")
        if not (isinstance(share := self.train_fraction, int | float) and 0 < share <= 1):
            raise ValueError(f"Invalid train_fraction {share!r}: give a share of the training images, 0 < share <= 1.")
        if self.parent is None and self.init != "reset":
            raise ValueError(f"Invalid init {self.init!r} without a parent: a dense network starts from its own θ₀.")
        if not (isinstance(c := self.noise, int | float) and c >= 0 and (c > 0) == (self.init == "noise")):
            raise ValueError(
                f"Invalid noise {c!r} with init {self.init!r}: give one above 0 with init 'noise', else 0."
            )
        shared = ("model", "dataset", "seed", "split_seed", "valid", "balanced", "options", "layers")
        for name in shared if self.parent else ():
            mine, its = getattr(self, name), getattr(self.parent, name)
            if mine != its:
                raise ValueError(f"Invalid parent: its {name} is {its!r}, not {mine!r}.")

    def _check_criterion(self):
        if self.density is None and self.criterion != "magnitude" and not self.budget:
            raise ValueError(f"Invalid criterion {self.criterion!r} without density: give the fraction to keep.")
        if self.density is not None and not shares(self.density):
            raise ValueError(f"Invalid density {self.density!r}: give a fraction of weights to keep, 0 < density <= 1.")
        known, given = CRITERIA[self.criterion], self.score_options
        for name, value in self.score:
            if name not in known:
                raise ValueError(f"Unknown score {name!r} of {self.criterion}: it takes {', '.join(known) or 'none'}.")
            kind = type(known[name])
            if type(value) is not kind or (kind is not bool and not value > 0):
                number = "a whole number" if kind is int else "a number"
                rule = "True or False" if kind is bool else f"{number} above 0, such as {known[name]}"
                raise ValueError(f"Invalid {name} {value!r}: give {rule}.")
        if "per_class" not in known:
            return
        if self.recipe.inputs != "standard":
            raise ValueError(f"Invalid inputs {self.recipe.inputs!r} with {self.criterion}: give 'standard'.")
        if (given["chunks"] % 2 and given["class_sorted"]) or given["per_class"] % self.draws:
            what = "pair of chunks" if given["class_sorted"] else "chunk"
            each = f"each {what} needs as many of the {given['per_class']} images of a class"
            raise ValueError(f"Invalid chunks {given['chunks']}: {each}.")

    @property
    def score_options(self) -> dict[str, bool | int | float]:
        """All options of the criterion, with their values."""
        return {**CRITERIA[self.criterion], **dict(self.score)}

    @property
    def draws(self) -> int:
        """Class-balanced parts of the batch that is scored."""
        options = self.score_options
        return max(1, options["chunks"] // (2 if options["class_sorted"] else 1))

    @property
    def goes_on(self) -> bool:
        """Whether it takes over what its parent's method has learned: the next round of one search."""
        return self.init == "continue" and self.method != NOTHING and type(self.method) is type(self.parent.method)

    @property
    def kind(self) -> tuple[str, str, int, str]:
        """What its seconds per unit of `work` are shared with on one kind of device, see `pace`."""
        return self.model, self.dataset, self.recipe.batch_size, type(self.method).__name__

    @property
    def work(self) -> int:
        return self.recipe.iterations

    @property
    def level(self) -> int:
        """Rounds of pruning before this training."""
        return self.parent.level + 1 if self.parent else 0

    @property
    def root(self) -> "Run":
        """The dense training at the start of the chain."""
        return self.parent.root if self.parent else self

    @functools.cached_property
    def key(self) -> str:
        """Hash of canonical JSON of the schema, the fields that differ from their defaults, and the parent's key.

        Leaving defaults out lets a field be added without renaming every run.
        """
        return hashed(_fields(self, all=False), self.parent and self.parent.key)

    def spec(self) -> dict[str, Any]:
        """Every field as JSON types; the parent by its key."""
        return {**_fields(self, all=True), "parent": self.parent and self.parent.key}

    def __hash__(self):
        return hash(self.key)

    def __repr__(self):
        drawn = self.init not in ("reset", "rewind", "continue", "effective")
        what = f"level {self.level}" + (f" {self.init} {self.draw}" if drawn else "")
        what += " shuffled" if self.shuffled else ""
        what += f" {self.criterion} to {self.density}" if self.density else ""
        what += f" {self.method}" if self.method != NOTHING else ""
        what += f" budget {self.budget} of {self.parent.key}" if self.budget else ""
        return f"<Run {self.model}/{self.dataset} seed {self.seed} {what}, {self.recipe.iterations} iterations>"


class Measurement:
    """What is computed once and kept like a run, but trains nothing: the base of frozen dataclasses.

    Their fields determine the result. They have `model`, `dataset` and `seed`, the `versions` that they depend on, and
    `measure(device, *artifacts)`, which returns columns of the store. trained: the Runs whose artifacts it is given.
    """

    parent = None
    trained = ()
    work = 1

    def __post_init__(self):
        own_numbers(self)

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """As a Run's; what takes in another number of images is another kind."""
        return "measured", self.model, self.dataset, getattr(self, "images", 0)

    @functools.cached_property
    def key(self) -> str:
        """As a Run's, of the class and the fields that differ from their defaults."""
        return self.key_of(self.spec())

    @classmethod
    def key_of(cls, spec: dict[str, Any]) -> str:
        """The key of what a `spec` says."""
        return hashed(cls.__name__, _changed(spec, cls))

    def spec(self) -> dict[str, Any]:
        """Every field as JSON types."""
        return {"measurement": type(self).__name__, **_fields(self, all=True)}


def key_of(spec: dict[str, Any]) -> str | None:
    """The key of what a `spec` says, of fields that came after it with their defaults.

    None where the method's or the measurement's class is not known here.
    """
    from lottery import cs, dynamic, soft_threshold, stochastic  # noqa: F401  a spec names their methods
    from lottery.experiments import grasp_init, instability  # noqa: F401

    try:
        if "measurement" in spec:
            return _class(Measurement, spec["measurement"]).key_of(spec)
        return hashed(_changed(spec, Run), spec.get("parent"))
    except (LookupError, RecursionError):
        return None


def rates(model: nn.Module, r: Run) -> dict[str, float]:
    """`{layer: rate}` of a layer-wise run: Linear, Conv, and the last layer by its own."""
    layers = masks.prunable(model)
    conv = r.rate if r.rate_conv is None else r.rate_conv
    each = {name: r.rate if isinstance(layer, nn.Linear) else conv for name, layer in layers.items()}
    if r.rate_output is not None:
        each[list(layers)[-1]] = r.rate_output
    return each


def fractions(densities: list[float] | tuple[float, ...]) -> tuple[float, ...]:
    """Fractions of weights to keep, as a tuple. Raises ValueError for what is no list of such."""
    listed = isinstance(densities, list | tuple) and len(densities) > 0
    if not listed or not all(isinstance(d, float) and 0 < d < 1 for d in densities):
        raise ValueError(f"Invalid densities {densities!r}: give a list of fractions of weights to keep, 0 < kept < 1.")
    return tuple(densities)


@contextlib.contextmanager
def fields_as(**names: str) -> Iterator[None]:
    """What a ValueError of its body says of a field is said of the parameter that was given: `{field: parameter}`."""
    try:
        yield
    except ValueError as error:
        said = re.sub(r"^Invalid (\w+)", lambda found: f"Invalid {names.get(found[1], found[1])}", str(error))
        raise ValueError(said) from None


def chosen(items: str | Iterable[str] | None, known: Collection[str], paper: str) -> list[str]:
    """A list of items: one by its name, some, or all for None. Raises ValueError for one that the paper has not.

    What several names begin with stands for all of them: "fig5" for "fig5-conv2", "fig5-conv4", …
    """
    found = []
    for item in list(known) if not items else [items] if isinstance(items, str) else list(items):
        parts = [item] if item in known else [name for name in known if name.startswith(f"{item}-")]
        if not parts:
            raise ValueError(f"Unknown item {item!r} of {paper}: choose from {', '.join(known)}.")
        found += parts
    return found


def _fields(spec, all):
    """Fields of a dataclass as JSON types, floats as floats whatever was given; without the defaults unless `all`."""
    fields = {}
    for name, default, is_float in _declared(type(spec)):
        value = getattr(spec, name)
        if name == "parent" or (value is default and not all):
            continue
        if dataclasses.is_dataclass(value):
            is_method = isinstance(value, Method) and value != NOTHING  # two of them at their defaults differ
            named = {"is": type(value).__name__} if is_method else {}
            value = named | _fields(value, all)
            if value or all:
                fields[name] = value
        elif all or value != default:
            fields[name] = float(value) if is_float and isinstance(value, int | float) else _lists(value)
    return fields


def _changed(spec, cls):
    """What `_fields` without the defaults gives, of what it gave with them. Raises LookupError for an unknown class."""
    fields = {}
    for name, default, _ in _declared(cls):
        value = spec.get(name)
        if name == "parent" or name not in spec:
            continue
        if isinstance(value, dict):
            known = Recipe if name == "recipe" else _class(Method, value.get("is", "Method"))
            value = {k: v for k, v in value.items() if k == "is"} | _changed(value, known)
            if value:
                fields[name] = value
        elif value != _lists(default):
            fields[name] = value
    return fields


def _class(base, name):
    """The class of this name at or below `base`. Raises LookupError where there is none."""
    if base.__name__ == name:
        return base
    for cls in base.__subclasses__():
        with contextlib.suppress(LookupError):
            return _class(cls, name)
    raise LookupError(name)


def hashed(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([SCHEMA, *parts], sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _declared(cls):
    """(name, default, whether it holds a float) of each field: a chapter asks for ten thousand keys."""
    return [(f.name, f.default, float in (f.type, *typing.get_args(f.type))) for f in dataclasses.fields(cls)]


def _lists(value):
    """Tuples as JSON's lists, at any depth."""
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
