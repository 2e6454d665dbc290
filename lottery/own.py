"""Your own model, your own data: one call for every method of the book.

>>> import lottery
>>> found = lottery.prune(net, (images, labels), method="gmp", density=0.1)  # net stays as it was
>>> print(found)                                                             # densities, accuracy, what was left alone
>>> found.model                                                              # plain PyTorch, the zeros in its weights
>>> found.save("pruned"), found.export("pruned.onnx")

`METHODS` names the methods. Magnitude, LTH, SNIP, GraSP and SynFlow end with exactly as many weights as were asked for,
and so does L0, which keeps the likeliest; random, GMP, DNW, SET and RigL, which count layer by layer, to within half a
weight a layer. CS and STR have no density among their numbers, only s0, and λ with s_init: these are searched for, with
a training for each value that is tried, and the closest is kept.
"""

import contextlib
import copy
import dataclasses
import fnmatch
import functools
import inspect
import json
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lottery import baselines, cs, data, dynamic, export, grasp, macs, soft_threshold, stochastic, tickets, training
from lottery import masks as M
from lottery.batches import first_float, normaliser
from lottery.files import path_of, publish, temporary
from lottery.grasp import Loss
from lottery.methods import NOTHING, Method, said, whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Masks = dict[str, torch.Tensor]


class Diverged(ValueError):
    """A training that ended with a loss or a weight that is not finite."""


def prune(
    model: nn.Module,
    examples: Any,
    method: str = "lth",
    density: float = 0.1,
    *,
    recipe: training.Recipe | None = None,
    skip: tuple[str, ...] = (),
    train: "Callable[[nn.Module, Hook], Any] | None" = None,
    loss: Loss | None = None,
    score: Callable[[nn.Module], float] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> "Pruned":
    """A model pruned to a density and trained, with a report; the given one stays as it was.

    Args:
        model: any module of a batch of examples → logits [B, classes], on its device and in its dtype.
        examples: a `data.Data`, or whatever `data.of` takes: (x, y), a dataset or loader, a folder of images, a parquet
            file, the name of a set. The test split is what accuracies are of, the validation split if that is empty,
            the training split if both are; `Pruned.measured` says which.
        method: one of `METHODS`. density: fraction of the weights of the layers that are pruned to keep.
        recipe: of one training; default: SGD with momentum on a cosine, ten epochs.
        skip: names of layers to leave alone, or patterns such as "head*". Frozen layers are left alone anyway.
        train: a training loop of one's own, `train(model, hook)`, which trains the model in place; see `Hook`.
        loss: `loss(logits, y)` → a scalar, in the place of the cross-entropy; beside `train`, what RigL grows by, and
            SNIP and GraSP score by.
        score: `score(model)` → a number, in the place of the accuracy; it gets the model in evaluation mode.
        seed: of the order of examples, of all that a method draws, and of torch's random state for as long, from which
            dropout draws; afterwards that is as it was.
        options: of the method: see its function in this module, such as `rounds` of `lth`.

    Raises ValueError, before any training: an unknown method, option or layer, a density out of range or above that of
    masks on the model, NaN in the model, a model or data that cannot be trained. After one, `Diverged`, a ValueError,
    or a ValueError where no value that a search tried has left a weight. Warns (UserWarning) of layers that have lost
    all weights.
    """
    options, seed = check_options(method, options), data.check_seed(seed)
    training.check_tensors(model)
    if method in LEARNED and M.read(model):
        raise ValueError(f"The model carries masks, {method} learns its own: call lottery.masks.bake(model) first.")
    for name, function in (("train", train), ("loss", loss), ("score", score)):
        if not (function is None or callable(function)):
            raise ValueError(f"Invalid {name} {function!r}: give a function, or None.")
    for name, p in model.named_parameters():
        if p.isnan().any():
            raise ValueError(f"Invalid model: NaN in {name!r}; give one that has not diverged.")
    examples = data.of(examples)
    if not len(examples.train):
        raise ValueError("Invalid data: there is nothing to train on.")
    recipe = default_recipe(examples) if recipe is None else recipe
    if not isinstance(recipe, training.Recipe):
        raise ValueError(f"Invalid recipe of type {type(recipe).__name__}: give a lottery.training.Recipe, or None.")
    if not train and recipe.batch_size > len(examples.train):
        raise ValueError(f"Invalid batch_size {recipe.batch_size}: the training set has {len(examples.train)} images.")
    net, layers, left = _checked(model, skip)
    examples, output = _fed(net, examples, recipe, optional=bool(train and score))
    if not (score and (train or loss)):
        _check_output(output, examples.classes)
    if method in ("gmp", "set", "rigl") and (fixed := [name for name in M.masked(net) if name in left]):
        raise ValueError(
            f"Layer {fixed[0]!r} is left alone but carries a mask, which {method} would move: call "
            "lottery.masks.bake(model) first."
        )
    for name, layer in layers.items():
        if method in LEARNED and (chain := M.chain_of(layer)):
            raise ValueError(
                f"Layer {name!r} carries a {type(chain[0]).__name__}, which {method} cannot keep: leave it alone by "
                "`skip`, or call lottery.masks.bake(model) first, after which its weight is a plain one."
            )
    n = sum(M.original(layer).numel() for layer in layers.values())
    k, density = M.kept(n, density), float(density)
    if k == n and method in ("set", "rigl", "str"):
        raise ValueError(f"Invalid density {density}: {method} prunes while it trains; give a fraction below 1.")
    job = _Job(net, examples, recipe, density, list(layers), train, loss, score, seed)
    if method not in LEARNED:
        M.attach(net, job.masks_now() | M.read(net))
    if k > (now := sum(int(mask.sum()) for mask in job.masks_now().values())):
        raise ValueError(
            f"Invalid density {density}: the model's masks keep {now} of {n} weights already; lower it, or "
            "call lottery.masks.bake(model) first."
        )
    began = time.perf_counter()
    bar = tqdm(desc=method, unit="training", disable=None if progress else True, leave=False)
    with bar as job.bar, torch.enable_grad(), grasp.same_rng(first_float(net)):
        torch.manual_seed(seed % 2**63)
        given = job.measure(net)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layer collapse")  # of what a search tries on its way; the end is told
            masks = METHODS[method](job, **options)
        M.warn_of_collapse(masks)
        net = M.bake(job.net.eval(), foreign=False)
        measures = {"as given": given, **job.measures, "pruned": job.measure(net)}
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in net.named_modules():
        module.training = modes.get(name, model.training)
    seconds = time.perf_counter() - began
    spec = {"own": type(model).__name__, "method": method, "asked": density, "seed": seed, "data": examples.name}
    found = net, masks, job.theta, spec, measures, job.measured[0], left, examples, recipe
    return Pruned(*found, job.trainings, seconds, job.notes)


def check_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method, numpy's numbers as Python's own.

    Raises ValueError: an unknown method, an option it does not take, one of another kind than its default.
    """
    if method not in list(METHODS):
        raise ValueError(f"Unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    known = _options(method)
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"Unknown option {unknown[0]!r} of {method}: it takes {', '.join(known) or 'none'}.")
    return {name: _value(name, value, known[name]) for name, value in options.items()}


def default_recipe(examples: data.Data) -> training.Recipe:
    """SGD with momentum, a cosine without warm-up, ten epochs of batches of at most 64."""
    size = min(64, len(examples.train))
    epoch = len(examples.train) // size
    cosine = {"schedule": "cosine", "lr_every": epoch, "inputs": "standard"}
    sgd = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    return training.Recipe(batch_size=size, iterations=10 * epoch, eval_every=epoch, **sgd, **cosine)


class Hook:
    """What a training loop of one's own has to call, so that masks move, temperatures rise and thresholds learn:

    >>> def train(model, hook):
    ...     optimizer = torch.optim.SGD(hook.groups(), lr=0.1)
    ...     for t, (x, y) in zip(range(hook.iterations), batches):
    ...         hook.before_step(t, optimizer, x, y)
    ...         loss = F.cross_entropy(model(x), y) + hook.penalty()
    ...         ...

    A method whose mask stays (magnitude, LTH, GraSP, …) needs none of these. iterations: as many steps as the method
    plans for, those of the recipe.
    """

    def __init__(
        self, model: nn.Module, method: Method, recipe: training.Recipe, seed: int, loss: Loss | None, examples: int
    ):
        self.iterations, self._model, self._method, self._seed = recipe.iterations, model, method, seed
        loss = loss or functools.partial(nn.functional.cross_entropy, label_smoothing=recipe.label_smoothing)
        about = {"loss": loss, "per_epoch": recipe.per_epoch(examples), "start": 0, "optimizer": None}
        self._step = SimpleNamespace(model=model, recipe=recipe, **about)  # what `training.Step` shows to a method

    def groups(self) -> list[dict[str, Any]]:
        """The method's parameter groups, with weight decay as it needs it, for any optimiser of `torch.optim`.

        Where a group has a "rate", as L0's gates may, its learning rate is to be multiplied by it.
        """
        return self._method.param_groups(self._model, self._step.recipe)

    def before_step(
        self, t: int, optimizer: torch.optim.Optimizer, x: torch.Tensor | None = None, y: torch.Tensor | None = None
    ) -> None:
        """To be called before the step that follows t finished ones; (x, y): its minibatch, as the model is fed."""
        self._step.optimizer, self._step.batch = optimizer, (x, y)
        self._step.generator = torch.Generator().manual_seed((self._seed * 1_000_003 + t) % 2**63)
        self._method.before_step(t, self._step)

    def check(self, before: Masks) -> None:
        """Raise ValueError where the loop has not done what the method needs. before: its masks when it began."""
        try:
            told = self._step.optimizer or type(self._method).before_step is Method.before_step
            if not told and getattr(self._method, "freeze", 1) is not None:  # STR that freezes nothing needs no steps
                raise AssertionError(f"Nothing told {type(self._method).__name__} of a step.")
            self._method.check(self._model, before, True)
        except AssertionError as error:
            raise ValueError(
                f"{error} Your loop has to call hook.before_step before each of its {self.iterations} steps."
            ) from None

    def penalty(self) -> torch.Tensor | float:
        """The method's term of the loss, 0 if it has none."""
        found = self._method.penalty(self._model)
        return 0.0 if found is None else found


@dataclass
class _Job:
    """One pruning under way: what the methods below read and write."""

    net: nn.Module
    data: data.Data
    recipe: training.Recipe
    density: float
    layers: list[str]
    own_train: Any = None
    own_loss: Any = None
    own_score: Any = None
    seed: int = 0
    trainings: int = 0
    measures: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bar: Any = None

    def __post_init__(self):
        self.theta = M.state(self.net)

    def masks_now(self):
        """Masks of ones on the layers to prune; those that are on the model stay."""
        found, on = M.prunable(self.net), M.read(self.net)
        ones = {name: torch.ones_like(found[name].weight, dtype=torch.bool) for name in self.layers}
        return {name: on.get(name, mask) for name, mask in ones.items()}

    def shares(self, rounds):
        """The density after each of `rounds` steps of equal ratio, from that of the masks that are on now."""
        start = M.density(self.masks_now())
        return [*(start * (self.density / start) ** (r / rounds) for r in range(1, rounds)), self.density]

    def far(self, density):
        """How far a density is from the one asked for, as searches have it: on the logarithm, 0 infinitely."""
        return abs(math.log(density / self.density)) if density else math.inf

    def train(self, net, method=NOTHING, recipe=None, start=0):
        """Train a network in place, by the user's loop or by `training.fit`. Raises Diverged."""
        recipe, seed, lr = recipe or self.recipe, self.seed + 1000 * self.trainings, " of your loop"
        if self.own_train:
            before, hook = method.masks(net), Hook(net, method, recipe, seed, self.own_loss, len(self.data.train))
            with training.modes_kept(net):
                if not net.training:  # of one in training mode some modules may be frozen, as `fit` has it
                    net.train()
                self.own_train(net, hook)
            if finite := all(p.isfinite().all() for p in net.parameters() if p.requires_grad):
                hook.check(before)
        else:
            fitted = {"method": method, "loss": self.own_loss, "graph": False}  # any model: not all can be captured
            finite = training.fit(net, self.data, recipe, seed, start, **fitted).status != "diverged"
            lr = f", {recipe.lr}, of the recipe"
        self.trainings += 1
        self.bar.update()
        if not finite:
            raise Diverged(f"The training diverged: lower the learning rate{lr}.")
        return net

    @property
    def loss(self):
        """What SNIP and GraSP score by."""
        return self.own_loss or nn.functional.cross_entropy

    @property
    def measured(self):
        """What `measure` gives, in words, and the examples that it is of."""
        if self.own_score:
            return "score", None
        parts = {"test": self.data.test, "validation": self.data.valid, "training": self.data.train}
        return next((f"{name} accuracy", part) for name, part in parts.items() if len(part))

    def measure(self, net):
        """The score of a network: its accuracy on the test split, or on what there is in its place."""
        if self.own_score:
            try:
                with training.modes_kept(net):
                    return float(self.own_score(net.eval()))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Invalid score: it has to give a number ({said(error)}).") from error
        normalise = normaliser(self.data, self.recipe, first_float(net))
        correct = training.evaluate(net, self.measured[1], normalise)[1]
        return correct.float().mean().item()

    def magnitudes(self, net):
        found = M.prunable(net)
        return {name: found[name].weight.detach().abs() for name in self.layers}

    def chunks(self, per_class):
        """A batch balanced over the classes that have examples, for a score, on the network's device, in its dtype."""
        classes, y = self.data.train.y.unique(return_inverse=True)
        per_class = min(per_class, int(y.bincount().min()))
        device, generator = first_float(self.net).device, torch.Generator().manual_seed(self.seed)
        feed = normaliser(self.data, self.recipe, first_float(self.net))
        raw = replace(self.data, train=replace(self.data.train, y=y), classes=len(classes))
        raw = replace(raw, mean=(0.0,), std=(1.0,), scale=1.0)  # standardised by nothing, to be fed as in training
        pairs = grasp.class_balanced(raw, per_class, generator)
        return [(feed(x.to(self.data.train.x.dtype).to(device)), classes[y].to(device)) for x, y in pairs]

    def pruned_at_once(self, scores):
        """Masks of the highest scores on the network as it was given, then one training."""
        masks = M.top_k({name: scores[name] for name in self.layers}, self.density, within=self.masks_now())
        self.train(M.attach(self.net, masks))
        return masks


def magnitude(job: _Job, rounds: int = 1, pretrained: bool = False) -> Masks:
    """Train, remove the smallest weights of all layers, go on training; in `rounds` steps of equal ratio.

    pretrained: the model has been trained already: the first training is left out.
    """
    whole("rounds", rounds)
    if not pretrained:
        job.train(job.net)
        job.measures["dense, trained"] = job.measure(job.net)
    for share in job.shares(rounds):
        masks = M.top_k(job.magnitudes(job.net), share, within=job.masks_now())
        job.train(M.attach(job.net, masks))
    return masks


def lth(job: _Job, rounds: int = 5, rewind_to: int = 0) -> Masks:
    """Iterative magnitude pruning: train, remove, put the survivors back to their first values, `rounds` times; train.

    rounds: 1 is one-shot. rewind_to: k, the values after k iterations in the place of the first ones (`lottery.lth`).
    """
    whole("rounds", rounds)
    if not 0 <= rewind_to < job.recipe.iterations or (rewind_to and job.own_train):
        raise ValueError(
            f"Invalid rewind_to {rewind_to}: give 0 <= iteration < {job.recipe.iterations}, 0 with a loop of one's own."
        )
    if rewind_to:
        training.fit(job.net, job.data, job.recipe, job.seed, stop=rewind_to, loss=job.own_loss, graph=False)
        job.theta = M.state(job.net)
    shares = job.shares(rounds)
    for r in range(rounds + 1):
        M.restore(job.net, job.theta)
        job.train(job.net, start=rewind_to)
        if r == 0:
            job.measures["dense, trained"] = job.measure(job.net)
        if r < rounds:
            M.attach(job.net, M.top_k(job.magnitudes(job.net), shares[r], within=job.masks_now()))
    return job.masks_now()


def random(job: _Job) -> Masks:
    """Weights at random, at initialisation, in each layer as many as ERK says."""
    masks = _sparse(job).masks_now()
    job.train(job.net)
    return masks


def snip(job: _Job, per_class: int = 10) -> Masks:
    """SNIP at initialisation, on a batch with so many examples of each class (`baselines.snip_scores`)."""
    return job.pruned_at_once(baselines.snip_scores(job.net, job.chunks(per_class), job.loss))


def grasp_(job: _Job, per_class: int = 10, temperature: float | None = None) -> Masks:
    """GraSP at initialisation, on a batch with so many examples of each class (`grasp.scores`).

    temperature: divides the logits; None: 200, but 1 with a loss of one's own, which may not be of logits.
    """
    if temperature is None:
        temperature = 1.0 if job.own_loss else 200.0
    return job.pruned_at_once(grasp.scores(job.net, job.chunks(per_class), temperature, job.loss))


def synflow(job: _Job, rounds: int = 100) -> Masks:
    """SynFlow at initialisation: no data (`baselines.synflow`)."""
    shape = tuple(job.data.train.x.shape[1:])
    if job.data.train.x.dtype == torch.int64:
        raise ValueError("SynFlow feeds ones in the place of data, which tokens cannot be: choose another method.")
    masks = baselines.synflow(job.net, shape, job.density, rounds, layers=job.layers)
    job.train(M.attach(job.net, masks))
    return masks


def gmp(job: _Job, **fields: Any) -> Masks:
    """Gradual magnitude pruning while training; options are the fields of `dynamic.GMP`."""
    return _moved(job, dynamic.GMP(job.density, **{"every": _often(job), **fields}))


def dnw(job: _Job, budget: str = "uniform") -> Masks:
    """Discovering neural wirings (`dynamic.DNW`)."""
    dynamic.DNW(job.density, budget)  # refuses an unknown budget
    budgets = dynamic.budgets(job.net, job.density, budget, job.layers)
    method = dynamic.DNW(tuple(budgets.items()))
    job.train(method.attach(job.net), method)
    masks = {name: mask for name, mask in method.masks(job.net).items() if name in job.layers}
    _settled(job, masks)
    return masks


def set_(job: _Job, **fields: Any) -> Masks:
    """Sparse evolutionary training from random masks at ERK densities, once an epoch; options: of `dynamic.SET`."""
    epoch = max(1, job.recipe.per_epoch(len(job.data.train)))  # a loop of one's own has batches of another size
    return _moved(_sparse(job), dynamic.SET(**{"every": epoch, **fields}))


def rigl(job: _Job, **fields: Any) -> Masks:
    """RigL from random masks at ERK densities; options are the fields of `dynamic.RigL`."""
    return _moved(_sparse(job), dynamic.RigL(**{"every": _often(job), **fields}))


def cs_(job: _Job, s0: float = 0.0, trials: int = 10, tolerance: float = 0.1, **fields: Any) -> Masks:
    """One round of Continuous Sparsification, then the masked weights are trained on; s0 is searched for.

    trials: trainings at most; tolerance: the relative difference in density that is close enough. fields: of `cs.CS`.
    """
    _check_search(trials, tolerance)
    make = lambda x: cs.CS(x, layers=tuple(job.layers), **{"schedule": "iteration", **fields})  # noqa: E731
    masks = _search(job, make, "s0", s0, 0.01, trials, tolerance)
    cs.harden(job.net)
    job.train(job.net)
    return masks


def l0(job: _Job, lam: float | None = None, **fields: Any) -> Masks:
    """Stochastic L0 with a gate for each weight (`stochastic.L0`); the likeliest weights are kept and trained on.

    Which gates end open is all or nothing within a few per cent of λ, so the weights with the highest log α are kept,
    as many as asked for, rather than those with z > 0. lam: λ; None: half of what takes a gate that no data need to 0
    at the end of a training by SGD. fields: of `stochastic.L0`.
    """
    if lam is None:
        lr, momentum = (job.recipe.lr_at(t) for t in range(job.recipe.iterations)), job.recipe.momentum
        # log α from 0 to log(−γ/ζ) = −2.4, at a slope of 0.14 to 0.2
        lam = 0.5 * 2.4 / (0.15 * sum(lr) / (1 - momentum))
    method = stochastic.L0(tuple(job.layers), lam, **fields)
    job.train(method.attach(job.net), method)
    open_ = M.density(method.masks(job.net))
    job.notes.append(f"λ = {lam:.4g}, at which {open_:.3g} of the gates ended open")
    masks = M.top_k({name: gate.log_alpha.detach() for name, gate in stochastic.gates(job.net).items()}, job.density)
    job.train(_settled(job, masks))
    return masks


def str_(job: _Job, s_init: float = -100.0, trials: int = 10, tolerance: float = 0.1, **fields: Any) -> Masks:
    """Soft Threshold Reparameterization; λ, then s_init, are searched for (`soft_threshold.reach`).

    trials, tolerance: as of CS. fields: of `soft_threshold.STR`. It needs SGD.
    """
    _check_search(trials, tolerance)
    if job.recipe.optimizer != "sgd":
        raise ValueError(
            f"Invalid optimizer {job.recipe.optimizer!r} with str: its thresholds need weight decay by 'sgd'."
        )
    found, failed = {}, []

    def train(weight_decay, s_init):
        method = soft_threshold.STR(s_init, layers=tuple(job.layers), **fields)
        net = method.attach(copy.deepcopy(job.net))
        try:
            job.train(net, method, replace(job.recipe, weight_decay=weight_decay))
        except Diverged as error:
            failed.append(error)
            return math.nan
        masks = {name: layer.weight.detach() != 0 for name, layer in M.prunable(net).items() if name in job.layers}
        got = M.density(masks)
        if not found or job.far(got) < job.far(found["density"]):
            found.update(density=got, net=net, masks=masks, values=(weight_decay, s_init))
        return got

    first = soft_threshold.decay_for(s_init, job.recipe)
    soft_threshold.reach(job.density, train, first, s_init, tolerance * job.density, trials)
    if not found:
        raise failed[-1]
    _check_left(found, job, "s_init or a lower learning rate")
    job.net = found["net"]
    job.notes.append("λ = {:.4g}, s_init = {:.4g}".format(*found["values"]))
    return found["masks"]


METHODS = {
    "magnitude": magnitude,
    "lth": lth,
    "random": random,
    "snip": snip,
    "grasp": grasp_,
    "synflow": synflow,
    "gmp": gmp,
    "dnw": dnw,
    "set": set_,
    "rigl": rigl,
    "cs": cs_,
    "str": str_,
    "l0": l0,
}


LEARNED = ("dnw", "cs", "str", "l0")  # which go on plain weights, where the others have masks


FIELDS = {
    "gmp": dynamic.GMP,
    "set": dynamic.SET,
    "rigl": dynamic.RigL,
    "cs": cs.CS,
    "str": soft_threshold.STR,
    "l0": stochastic.L0,
}


KINDS = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a word"),
    type(None): (Real | None, "a number"),  # which the method finds itself where it is not given
}


def _options(method):
    """A method's options, `{name: default}`: of its function, and the fields of its `Method` if it takes them."""
    defaults = {name: p.default for name, p in inspect.signature(METHODS[method]).parameters.items()}
    fields = {f.name: f.default for f in dataclasses.fields(FIELDS[method])} if method in FIELDS else {}
    return {n: d for n, d in (defaults | fields | defaults).items() if n not in ("job", "fields", "density", "layers")}


def _value(name, value, default):
    """A value, numpy's as Python's own. Raises ValueError for one of another kind than the default."""
    kind, words = KINDS[type(default)]
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"Invalid {name} {value!r}: give {words}.")
    return value


def _check_search(trials, tolerance):
    whole("trials", trials)
    if not 0 <= tolerance < 1:
        raise ValueError(f"Invalid tolerance {tolerance!r}: give a relative difference in density, 0 <= tolerance < 1.")


def _often(job):
    """Updates of a mask in a short training: fifty, and at least every iteration."""
    return max(1, min(100, job.recipe.iterations // 50))


def _moved(job, method):
    job.train(method.attach(job.net), method)
    return job.masks_now()


def _sparse(job):
    """The job with random masks at ERK densities on its network."""
    scores = baselines.random_scores(job.net, torch.Generator().manual_seed(job.seed))
    erk = baselines.erk(job.net, job.density, job.layers)
    M.attach(job.net, M.top_k({name: scores[name] for name in job.layers}, erk, within=job.masks_now()))
    return job


def _settled(job, masks):
    """The network with what a method has learned in its plain weights, under the masks."""
    with training.modes_kept(job.net):
        net = M.bake(job.net.eval(), foreign=False)
    return M.attach(net, masks)


def _search(job, make, name, x, step, trials, tolerance):
    """Train `make(x)` for values of x, on which density rises, until it is near; the closest is the job's network.

    Out in growing steps until two values enclose the density, then halfway between them; where the training diverges,
    halfway back to the closest. Raises Diverged: all of them did; ValueError: none left a weight.
    """
    found, low, high = {}, None, None
    for trial in range(1, trials + 1):
        method = make(x)
        try:
            net = job.train(method.attach(copy.deepcopy(job.net)), method)
        except Diverged:
            if trial == trials and not found:
                raise
            x, step = ((x + found["x"]) / 2, step) if found else (x + step, 2 * step)
            continue
        masks = method.masks(net)
        got = M.density(masks)
        if not found or job.far(got) < job.far(found["density"]):
            found.update(density=got, net=net, masks=masks, x=x)
        if abs(got - job.density) <= tolerance * job.density:
            break
        low, high = (x, high) if got < job.density else (low, x)
        if low is None or high is None:
            x, step = x + (step if high is None else -step), 2 * step
        else:
            x = (low + high) / 2
    _check_left(found, job, f"a higher {name}")
    job.net = found["net"]
    job.notes.append(f"{name} = {found['x']:.4g}")
    return found["masks"]


def _check_left(found, job, instead):
    if not found["density"]:
        raise ValueError(
            f"No weight is left after any of {job.trainings} trainings: allow more `trials`, or give {instead}."
        )


def _checked(model, skip):
    """A copy of the model, its layers to prune, and what is left alone, `{name: why}`, unless it is refused."""
    M.prunable(model)  # what cannot be pruned is said before it cannot be copied
    try:
        net = copy.deepcopy(model)
    except Exception as error:  # a weight that a hook has computed, a lock, whatever else a model holds
        raise ValueError(f"The model cannot be copied ({said(error)}).") from error
    training.own_memory(net)
    found = M.prunable(net)
    names = () if skip is None else [skip] if isinstance(skip, str | int) else skip
    patterns = [str(name) for name in names]
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise ValueError(f"Unknown layer {pattern!r} in skip: the model has {', '.join(found)}.")
    left = {name: "skipped" for name in found if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    left |= {n: "frozen" for n, layer in found.items() if n not in left and not M.original(layer).requires_grad}
    modules = dict(net.named_modules())
    for name in M.unprunable(net):
        owner = modules[name.rpartition(".")[0].split(".parametrizations")[0].removesuffix("parametrizations")]
        made = "its weight is made of other tensors"
        left[name] = made if isinstance(owner, M.PRUNABLE) else f"{type(owner).__name__}: no Linear or Conv weight"
    layers = {name: layer for name, layer in found.items() if name not in left}
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "it has no Linear or Conv layer"
        raise ValueError(f"Nothing prunable in {type(model).__name__} ({why}).")
    return net, layers, left


@torch.no_grad()
def _fed(net, examples, recipe, optional):
    """The examples as the model takes them, and its output on two: contiguous images where it has `.view` in it.

    optional: it need not take them, as a training loop and a score of one's own may feed something else.
    """
    given, first = first_float(net), examples.train.x[:2].to(first_float(net).device)
    for fed in (examples, replace(examples, channels_last=False)):
        try:
            with training.modes_kept(net), grasp.same_rng(given):
                return fed, net.eval()(normaliser(fed, recipe, given)(first))
        except Exception as error:  # whatever a model raises
            failed = error
    if optional:
        return examples, None
    kind = f"{tuple(first.shape[1:])}, {given.dtype}"
    raise ValueError(f"The model does not take examples of shape {kind}: {said(failed)}") from failed


def _check_output(out, classes):
    """Refuse a model whose output on two examples is not [2, classes]."""
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[1] < classes:
        found = f"shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(
            f"The model gives {found} for two examples, the data have {classes} classes: it has to give "
            f"[2, {classes}], or give a loss and a score of your own."
        )


@dataclass(frozen=True)
class Pruned:
    """What `prune` found.

    model: plain, trained, with the zeros in its weights. masks: of the layers that were pruned. theta: the values that
    the ticket starts from, `masks.state`. spec: method, density asked, seed. measures: the accuracies, or scores.
    measured: which, "test accuracy", or "validation accuracy" or "training accuracy" where the data have no other part,
    or "score". left: what was left alone and why; parametrizations of one's own stay on that, those of pruned layers
    are in their weights. notes: values that were searched for.
    """

    model: nn.Module
    masks: dict[str, torch.Tensor]
    theta: dict[str, torch.Tensor]
    spec: dict
    measures: dict[str, float]
    measured: str
    left: dict[str, str]
    data: data.Data
    recipe: training.Recipe
    trainings: int
    seconds: float
    notes: list[str]

    @property
    def density(self) -> float:
        """Fraction of the weights kept, of the layers that were pruned."""
        return M.density(self.masks)

    @property
    def example(self) -> torch.Tensor:
        """One example as the model is fed, with a batch of one."""
        first = self.data.train.x[:1].to(first_float(self.model).device)
        return normaliser(self.data, self.recipe, first_float(self.model))(first)

    @property
    def layers(self) -> "pd.DataFrame":
        """A table of the layers that were pruned: weights, kept, density, MACs for one example before and after."""
        import pandas as pd

        try:
            work = macs.count(self.model, self.example)
        except ValueError:
            work = {}
        rows = {
            name: {
                "weights": m.numel(),
                "kept": int(m.sum()),
                "density": int(m.sum()) / m.numel(),
                "MACs": work.get(name, math.nan),
                "MACs kept": work.get(name, math.nan) * int(m.sum()) / m.numel(),
            }
            for name, m in self.masks.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def ticket(self) -> tickets.Ticket:
        """The start values and the masks; its `model(net)` puts them on a copy of a network, such as the given one."""
        return tickets.Ticket(self.theta, self.masks, self.spec)

    def __str__(self) -> str:
        table, spec = self.layers, self.spec
        kept, weights = int(table["kept"].sum()), int(table["weights"].sum())
        found = f", {', '.join(self.notes)}" if self.notes else ""
        lines = [
            f"{spec['own']} by {spec['method']}: density {spec['asked']:g} asked, {self.density:.4f} got, "
            f"{kept:,} of {weights:,} weights{found}",
            f"{self.measured}: " + ", ".join(f"{value:.4f} {name}" for name, value in self.measures.items()),
            f"trainings: {self.trainings}, on {len(self.data.train):,} examples of {self.data.name}",
        ]
        if (work := table["MACs"].sum()) > 0:
            lines.append(f"MACs of these layers: {work:,.0f} dense, {table['MACs kept'].sum():,.0f} without the zeros")
        lines += [f"left alone: {name} ({why})" for name, why in self.left.items()]
        return "\n".join([*lines, table.round(4).to_string()])

    def plot(self) -> "Figure":
        """A bar for each layer: the density that is left of it. Returns the matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 0.5 + 0.3 * len(self.masks)), layout="constrained")
        axes, table = figure.subplots(), self.layers
        axes.barh(table.index[::-1], table["density"][::-1])
        axes.axvline(self.density, color="black", linestyle="--")
        axes.set(xlim=(0, 1), xlabel="fraction of weights kept (dashed: of all)")
        return figure

    def save(self, folder: Path | str) -> Path:
        """Write `model.safetensors` (plain weights), `ticket.safetensors` (start values and masks), `report.json`.

        Each is written whole or not at all; where the report lies, which comes last, the three belong together. Extra
        state of a module that is no tensor is in the report, as text. Raises `files.CannotWrite`.
        """
        from safetensors.torch import save

        folder, names = path_of(folder), ("model.safetensors", "ticket.safetensors", "report.json")
        report = self.spec | {"density": self.density, "measured": self.measured, "measures": self.measures}
        report |= {"left alone": self.left}
        report |= {"layers": json.loads(self.layers.to_json(orient="index"))}
        state = self.model.state_dict(keep_vars=True)
        if extra := {name: repr(value) for name, value in state.items() if not isinstance(value, torch.Tensor)}:
            report["extra state"] = extra
        once = {id(t): (name, t) for name, t in reversed(state.items()) if name not in extra}  # tied ones
        weights = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in once.values()}
        with contextlib.ExitStack() as stack:
            new = [stack.enter_context(temporary(folder / name)) for name in names]
            new[0].write_bytes(save(weights))
            tickets.save(self.ticket(), new[1])
            new[2].write_text(f"{json.dumps(report, indent=1, ensure_ascii=False)}\n", "utf-8")
            (folder / "report.json").unlink(missing_ok=True)
            for mine, name in zip(new, names, strict=True):
                publish(mine, folder / name)
        return folder

    def export(self, path: Path | str) -> Path:
        """Write the model as ONNX, for examples as they are in the data, and check it in onnxruntime.

        The data's normalisation is part of the file, so that it is fed uint8 pixels, floats or token numbers as
        `data.train.x` holds them. The batch may be of any size.

        Raises ImportError without onnxscript and onnxruntime; FileNotFoundError without the folder; RuntimeError when
        onnxruntime computes something else.
        """
        inputs = export.Inputs(self.data, self.model, self.recipe.inputs)
        return export.onnx(nn.Sequential(inputs, self.model), self.data.train.x[:4], path)


def load(model: nn.Module, checkpoint: dict[str, Any] | Path | str) -> nn.Module:
    """Put the weights and masks of a checkpoint on a model, in place.

    checkpoint: a state dict, or the path of one (PyTorch's, read without pickle's code, or safetensors), perhaps below
    a key "state_dict" or "model". Read are plain ones; those of `torch.nn.utils.prune` (`weight_orig`, `weight_mask`);
    of DataParallel, DistributedDataParallel and compiled models (`module.`, `_orig_mod.`); and of models with masks on.
    What the model has and no state dict holds, non-persistent buffers, may be left out, and so may extra state.

    Raises ValueError, before anything changes: a name or shape that does not fit, a mask of other numbers than zeros
    and ones, a file that holds no state dict, a model with gates or thresholds on, or with the factor of a CS ticket.
    """
    for name, layer in M.prunable(model).items():
        chain = M.chain_of(layer) or ()
        if soft := [type(p).__name__ for p in chain if hasattr(p, "prunes") and not isinstance(p, M.Mask)]:
            raise ValueError(
                f"Layer {name!r} carries a {soft[0]}, of which a state dict does not hold every number unless it was "
                "saved from such a model: use model.load_state_dict, which asks for them, or load into a plain model "
                "what lottery.masks.bake has made plain before it was saved."
            )
    training.own_memory(model)
    own, stored = M.tensors(model), model.state_dict(keep_vars=True)
    extra = {name: name for name in stored if _is_extra(name)}
    names = {id(t): name for name, t in own.items()}
    stored = {name: names[id(t)] for name, t in stored.items() if id(t) in names}  # those that are tied have one name
    known = {M.canonical(name): own_name for name, own_name in stored.items()} | stored | extra
    known |= {name: name for name in own}
    state = _unwrapped(_state_dict(checkpoint), known)
    values, masks = {name: own[name] for name in own.keys() - set(stored.values())}, {}
    for name, t in state.items():
        is_mask, found = _meaning(name, state, known)
        (masks if is_mask else values)[found] = t
    extra = {name: values.pop(name) for name in extra if name in values}
    weights = {name: M.original(layer) for name, layer in M.prunable(model).items()}
    layers = {M.weight_name(name): name for name in weights}
    for name, mask in masks.items():
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"Invalid mask of {name!r} in the checkpoint: it is not of zeros and ones.")
        if name in values and name not in layers:  # a bias that was pruned too
            values[name] = values[name] * mask
    attached = {layers[name]: mask.bool() for name, mask in masks.items() if name in layers}
    M.check_masks(attached, weights, "masks", "model", complete=False)
    M.restore(model, values)
    for name, value in extra.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(value)
    return M.attach(model, attached) if attached else model


def _is_extra(name):
    """Whether an entry of a state dict is what a module's `get_extra_state` gave: any value."""
    return str(name).rpartition(".")[2] == "_extra_state"


def _meaning(name, state, known):
    """Whether a checkpoint's name is that of a mask, and the model's name for the tensor; as it is where it has none.

    What the model itself has is no mask, whatever it is called. known: `{name: the model's name}`.
    """
    plain = M.canonical(name)
    base = re.sub(r"(_orig|_mask|\.mask)$", "", plain)
    if name in known or plain in known:
        return False, known.get(name) or known[plain]
    by_torch = plain.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state
    if by_torch or (plain.endswith(".mask") and plain != name):
        return True, known.get(base, base)
    return False, known.get(base, plain) if plain.endswith("_orig") else plain


def _unwrapped(state, known):
    """A state without what wrappers put before each name, as far as the model knows the names that are left best."""
    found = [state]
    while state and any(all(name.startswith(prefix) for name in state) for prefix in ("module.", "_orig_mod.")):
        state = {name.partition(".")[2]: t for name, t in state.items()}
        found.append(state)
    return max(found, key=lambda state: sum(_meaning(name, state, known)[1] in known for name in state))


def _state_dict(checkpoint):
    if isinstance(checkpoint, str | Path):
        from safetensors.torch import load_file

        path = path_of(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(f"No checkpoint at {path}.")
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle raises whatever it likes
            why = said(error).partition(". ")[0]  # what follows tells how to read code
            raise ValueError(f"{path} is no checkpoint of tensors alone: save model.state_dict() ({why}).") from None
    for key in ("state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    tensors = isinstance(checkpoint, dict) and (t for name, t in checkpoint.items() if not _is_extra(name))
    if not (tensors and all(isinstance(t, torch.Tensor) for t in tensors)):
        raise ValueError("Invalid checkpoint: give a state dict, names and tensors, or the path of one.")
    return checkpoint
