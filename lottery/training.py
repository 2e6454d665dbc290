"""One training loop for every method: data resident as uint8, read at fixed iterations, early stop found afterwards."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lottery import masks as M
from lottery import perceptron, tensorfile
from lottery.batches import Batches, first_float
from lottery.data import Data, Split, check_seed
from lottery.methods import NOTHING, Method, check_loss, need, number, own_numbers

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md

LOSS_STEPS = (1, 2, 5, 10, 50, 100, 500)  # training losses kept so that an audit can check a long run in seconds


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Defaults: LeNet-300-100 on MNIST as in the lottery ticket paper (figure 2).

    optimizer: "adam" | "sgd". iterations: J, minibatch steps. eval_every: iterations between two readings of the
    validation set. test_readings: "all" reads the test set as often, "log" at about 20 log-spaced readings.
    milestones: iterations at which lr is multiplied by gamma. warmup: iterations of linear increase from 0.
    inputs: "unit" feeds pixels in [0, 1], "standard" subtracts the mean and divides by the deviation per channel.
    nesterov: Nesterov's momentum (SGD; CS). augment: "none" | "flip-crop", see `data.flip_crop` (CS, GraSP, STR).
    precision: "float32" computes in the model's own dtype, "bfloat16" under autocast, readings included.
    label_smoothing: of the training loss (STR: 0.1); smooth_readings: of the losses at readings as well.
    last_batch: "drop" | "keep" the smaller last minibatch of an epoch (CS: 352 iterations, STR's ImageNet: 5,005).
    schedule: "step" is lr · γ^(milestones ≤ t) · min(1, t / warmup). "cosine" (STR) has no milestones: lr is constant
        in blocks of `lr_every` iterations (there an epoch); it is lr · (e + 1) / W in block e of W of warm-up, then
        lr · ½ (1 + cos(π (e − W) / (E − W))), E blocks in all.
    """

    optimizer: str = "adam"
    lr: float = 1.2e-3
    batch_size: int = 60
    iterations: int = 50_000
    eval_every: int = 100
    test_readings: str = "log"
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    inputs: str = "unit"
    nesterov: bool = False
    augment: str = "none"
    precision: str = "float32"
    label_smoothing: float = 0.0
    schedule: str = "step"
    lr_every: int = 1
    last_batch: str = "drop"
    smooth_readings: bool = False

    def __post_init__(self):
        own_numbers(self)
        need(self, "optimizer", self.optimizer in ("adam", "sgd"), "give 'adam' or 'sgd'")
        need(self, "test_readings", self.test_readings in ("all", "log"), "give 'all' or 'log'")
        need(self, "inputs", self.inputs in ("unit", "standard"), "give 'unit' or 'standard'")
        need(self, "augment", self.augment in ("none", "flip-crop"), "give 'none' or 'flip-crop'")
        need(self, "precision", self.precision in ("float32", "bfloat16"), "give 'float32' or 'bfloat16'")
        need(self, "schedule", self.schedule in ("step", "cosine"), "give 'step' or 'cosine'")
        need(self, "last_batch", self.last_batch in ("drop", "keep"), "give 'drop' or 'keep'")
        need(self, "smooth_readings", isinstance(self.smooth_readings, bool), "give True or False")
        need(self, "lr", number(self.lr) and self.lr > 0, "give a learning rate above 0")
        need(self, "momentum", number(self.momentum) and 0 <= self.momentum < 1, "give 0 <= momentum < 1")
        need(self, "weight_decay", number(self.weight_decay) and self.weight_decay >= 0, "give a number from 0")
        need(self, "gamma", number(self.gamma) and self.gamma > 0, "give a factor above 0")
        smoothing = number(self.label_smoothing) and 0 <= self.label_smoothing < 1
        need(self, "label_smoothing", smoothing, "give 0 <= label_smoothing < 1")
        for name in ("batch_size", "iterations", "eval_every", "lr_every"):
            need(self, name, number(value := getattr(self, name), int) and value >= 1, "give a whole number from 1")
        need(self, "warmup", number(self.warmup, int) and self.warmup >= 0, "give a whole number of iterations from 0")
        rising = isinstance(self.milestones, tuple) and all(number(t, int) and t > 0 for t in self.milestones)
        rising = rising and list(self.milestones) == sorted(self.milestones)
        need(self, "milestones", rising, "give a tuple of iterations in increasing order")
        need(self, "nesterov", isinstance(self.nesterov, bool), "give True or False")
        with_momentum = self.optimizer == "sgd" and self.momentum
        need(self, "nesterov", not self.nesterov or with_momentum, "it needs SGD with momentum")
        if self.schedule == "cosine":
            need(self, "milestones", not self.milestones, "the cosine schedule has none")
            whole = self.warmup % self.lr_every == 0 and self.warmup < self.iterations
            need(self, "warmup", whole, f"give a multiple of lr_every = {self.lr_every} below iterations")

    @property
    def smoothing_at_readings(self) -> float:
        """Label smoothing of the losses that are read."""
        return self.label_smoothing if self.smooth_readings else 0.0

    def per_epoch(self, images: int) -> int:
        """Iterations in an epoch of so many training images."""
        return -(-images // self.batch_size) if self.last_batch == "keep" else images // self.batch_size

    def lr_at(self, t: int) -> float:
        """Learning rate of the step that follows `t` finished ones, by the schedule."""
        if self.schedule == "cosine":
            e, W, E = (math.ceil(i / self.lr_every) for i in (t - t % self.lr_every, self.warmup, self.iterations))
            return self.lr * ((e + 1) / W if e < W else (1 + math.cos(math.pi * (e - W) / (E - W))) / 2)
        ramp = min(1.0, t / self.warmup) if self.warmup else 1.0
        return self.lr * self.gamma ** bisect.bisect_right(self.milestones, t) * ramp

    def readings(self, start: int = 0, stop: int | None = None) -> tuple[list[int], set[int]]:
        """Iterations after which the validation set is read, and the subset of them that reads the test set."""
        stop = stop or self.iterations
        steps = [t for t in range(self.eval_every, stop + 1, self.eval_every) if t > start]
        if not steps or steps[-1] != stop:
            steps.append(stop)
        if self.test_readings == "all":
            return steps, set(steps)
        spaced = np.geomspace(1, len(steps), 20).round().astype(int) - 1
        return steps, {steps[i] for i in spaced}


@dataclass
class Reading:
    """What is known at one reading point: losses are means per image, accuracies fractions, `correct` bool [n_test]."""

    step: int
    val_loss: float
    val_acc: float
    test_acc: float
    train_loss: float
    train_acc: float
    correct: np.ndarray


@dataclass
class History:
    """What `fit` measured. The lists run over the readings, NaN where the test set was not read.

    batch_loss: the learning curve of the training set, the mean minibatch loss since the last reading of the test set.
    numbers: what the method keeps at each reading, by name.
    """

    step: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_acc: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_acc: list[float] = field(default_factory=list)
    batch_loss: list[float] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    train_loss: dict[int, float] = field(default_factory=dict)  # minibatch loss at iterations LOSS_STEPS
    status: str = "finished"  # or "diverged": a loss was not finite
    early_stop: Reading | None = None  # None without a validation set
    last: Reading | None = None
    wall_s: float = 0.0

    @property
    def censored(self) -> bool:
        """True when the minimum validation loss fell on the last reading: the training was too short to see it."""
        return self.early_stop is not None and self.early_stop.step == self.last.step


def optimizer(
    model: torch.nn.Module, recipe: Recipe, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser, of a method's parameter groups; default: one of all trainable parameters.

    It is fused, unless there are complex parameters.

    Raises ValueError when nothing is trainable, or a trainable parameter is in no group: it cannot move.
    """
    _check_trainable(model)
    groups = NOTHING.param_groups(model, recipe) if groups is None else groups
    groups = [{**group, "params": _parameters(group)} for group in groups]
    _check_covered(model, groups)
    return _build(groups, recipe)


def _parameters(group):
    """A group's parameters as a list: it may be one tensor, or what can be gone through once."""
    params = group["params"]
    return [params] if isinstance(params, torch.Tensor) else list(params)


def _build(groups, recipe):
    device = next(p.device for group in groups for p in group["params"])
    groups = [{**group, "lr": recipe.lr * group.get("rate", 1.0)} for group in groups]
    fused = not any(p.is_complex() for group in groups for p in group["params"])
    if _captures(device):
        groups = [{**group, "lr": torch.tensor(group["lr"], device=device)} for group in groups]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, fused=fused, capturable=_captures(device))
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused)


def can_compile(device: str) -> bool:
    """Whether `torch.compile` has what it needs: on a CPU a C++ compiler, which is looked for by its usual names."""
    return device != "cpu" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def _captures(device):
    """Whether training steps are captured as a CUDA graph, which needs lr as a tensor: a number would be baked in."""
    return device.type == "cuda"


def _check_covered(model, groups):
    covered = {id(p) for group in groups for p in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]:
        raise ValueError(f"No parameter group holds {', '.join(left)}: build the groups after attaching the method.")


def _check_trainable(model):
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing to train: no parameter of the model requires a gradient.")


def _check_outputs(outputs, classes):
    """On a GPU a label without an output would be an assertion of the device."""
    if outputs < classes:
        raise ValueError(f"The model gives {outputs} outputs, labels reach {classes - 1}: it needs {classes}.")


def _check_logits(out, n):
    """Refuse what the cross-entropy of n examples cannot be taken of."""
    found = type(out).__name__
    if isinstance(out, torch.Tensor):
        if out.dim() == 2 and len(out) == n and out.is_floating_point():
            return
        found = f"{out.dtype} of shape {tuple(out.shape)}"
    raise ValueError(
        f"The model gives {found} for {n} examples: it has to give logits [{n}, classes], or give a loss of your own."
    )


def _check_lone(model, recipe, batch, start, stop):
    """Raise ValueError where a minibatch has one example, as an epoch's last may, and batch norm cannot take it."""
    n, size, epoch = len(batch.y), recipe.batch_size, batch.per_epoch
    lone = size == 1 or (recipe.last_batch == "keep" and n % size == 1 and start // epoch < stop // epoch)
    if not lone or not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    x, net = batch.normalise(batch.x[:1]), M.unwrapped(model)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), autocast(recipe, x), torch.random.fork_rng(devices=devices):
        try:
            net(x) if net.training else net.train()(x)
        except ValueError as error:
            raise ValueError(
                f"Invalid batch_size {size}: of {n} examples it leaves one alone, on which batch norm cannot be "
                f"trained ({error}); give another one, or last_batch='drop'."
            ) from None


def check_tensors(model: torch.nn.Module) -> None:
    """Raise ValueError for what is no module, or for a parameter or buffer without shape, values or gradients."""
    M.check_module(model)
    M.check_gradients(model)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(p):
            raise ValueError(
                f"Invalid model: {name!r} is lazy, without a shape; run one batch through the model first."
            )
        if p.is_meta:
            raise ValueError(f"Invalid model: {name!r} is on the meta device, without values; materialise it first.")


def own_memory(model: torch.nn.Module) -> None:
    """Give every parameter and buffer that is an expanded view a memory of its own, in place.

    Nothing can be copied into such a view, and a fused optimiser writes beyond it.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _is_expanded(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    for p in filter(_is_expanded, model.parameters()):
        p.data = p.data.clone(memory_format=torch.contiguous_format)


def _is_expanded(tensor):
    if tensor.layout is not torch.strided:
        return False
    return any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))


class Step:
    """One training iteration of any model. A callable (x, y) → the minibatch's mean loss, before the update.

    It is also what a method sees before each step: model, recipe, optimizer, loss, per_epoch, batch, generator, and
    `start`, the iteration that this training began at.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        opt: torch.optim.Optimizer,
        method: Method = NOTHING,
        batches: Batches | None = None,
        compiled: bool = False,
        start: int = 0,
        loss: Callable[..., torch.Tensor] | None = None,
        classes: int = 0,
    ):
        self.model, self.recipe, self.optimizer, self.method = model, recipe, opt, method
        self.batches, self.start, self.t, self.dtype = batches, start, start, first_float(model).dtype
        self.classes = classes
        self.loss = loss or functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing)
        self.forward = torch.compile(model, dynamic=False) if compiled else model

    @property
    def per_epoch(self) -> int:
        """Iterations in an epoch."""
        return self.batches.per_epoch

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The minibatch (x, y) that the step is about to train on."""
        return self.batches.gather()

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator, on the CPU, of the data order's seed and the iteration.

        Apart from that of the order for seeds as large as those of Runs; of seed 0 it begins as some epochs' orders do.
        """
        [seed] = self.batches.seeds
        return torch.Generator().manual_seed((seed * 1_000_003 + self.t) * 2 + 1 & 0x7FFF_FFFF_FFFF_FFFF)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with autocast(self.recipe, x):
            logits = self.forward(x)
        if self.classes:  # else what a loss of one's own takes
            _check_logits(logits, len(y))
            _check_outputs(logits.shape[1], self.classes)
        if isinstance(logits, torch.Tensor):
            logits = logits.to(self.dtype)
        loss = self.loss(logits, y)
        if (penalty := self.method.penalty(self.model)) is not None:
            loss = loss + penalty
        check_loss(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def sync(self, k: int = 0) -> None:
        """The model has its new weights already."""


class Graph:
    """A function that works on tensors which stay where they are, launched as one CUDA graph from its fourth call on.

    Until then it runs as it is, and does its work, on a side stream, as capturing asks for. What it returns is
    overwritten by the next call.
    """

    def __init__(self, function: Callable[[], torch.Tensor]):
        self.function, self.calls, self.replay, self.result = function, 0, None, None

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        if self.calls < 4:
            return _aside(self.function)
        if self.replay is None:
            self.replay, self.result = _capture(self.function)
        self.replay()
        return self.result


def _aside(function):
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = function()
    here.wait_stream(side)
    return result


def _capture(function):
    """What launches the function's work again, and its result; nothing has been computed yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def autocast(recipe: Recipe, like: torch.Tensor) -> torch.autocast:
    """A context that computes in the recipe's precision on the device of `like`."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


@contextlib.contextmanager
def modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Every module leaves in the mode in which it came, training or evaluation: some may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    split: Split,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int | None = None,
    smoothing: float = 0.0,
    loss: Callable[..., torch.Tensor] | None = None,
) -> tuple[float, torch.Tensor]:
    """Mean loss per image and correctness (bool [n], on the CPU) of a split; all modes are left as they were.

    smoothing: label smoothing of that loss. loss: in its place where the model gives no logits [B, classes]; what is
    correct is then unknown, and empty.
    batch_size: default 2,500; on a CPU 250, of 32x32 pixels and more 60, for fully connected networks 1,000:
    activations should fit in the cache (Conv-2: 0.52 ms an image in batches of 60, 0.70 in 250).
    """
    like = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    with modes_kept(model):
        model.eval()
        plain = not torch.is_autocast_enabled(like.device.type)
        forward = (plain and perceptron.forward(model)) or model
        in_cache = 1000 if forward is not model else 250 if math.prod(split.x.shape[2:]) < 32 * 32 else 60
        batch_size = batch_size or (in_cache if like.device.type == "cpu" else 2500)
        if loss and len(split) and not _are_logits(model(normalise(split.x[:2].to(like.device))), split.y):
            batches = zip(split.x.split(batch_size), split.y.split(batch_size), strict=True)
            losses = [len(y) * loss(model(normalise(x.to(like.device))), y.to(like.device)) for x, y in batches]
            return float(sum(losses)) / len(split), torch.zeros(0, dtype=torch.bool)
        [loss], [correct] = _evaluate(forward, like, split, normalise, batch_size, smoothing)
    return loss, correct


def _are_logits(out, y):
    return isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] > int(y.max())


def _evaluate(forward, like, split, normalise, batch_size=2500, smoothing=0.0):
    """`evaluate` of a function images → logits [B, classes] or [K, B, classes]: K losses, K tensors of correctness."""
    if not len(split.y):
        return [math.nan], [torch.zeros(0, dtype=torch.bool)]
    losses, correct = 0.0, []
    for x, y in zip(split.x.split(batch_size), split.y.split(batch_size), strict=True):
        logits = forward(normalise(x.to(like.device)))
        if isinstance(forward, torch.nn.Module):
            _check_logits(logits, len(y))
        logits = logits.to(_summed(like.dtype))
        logits = logits.view(-1, *logits.shape[-2:])
        y = y.to(like.device).expand(logits.shape[:2])
        losses += F.cross_entropy(logits.mT, y, reduction="none", label_smoothing=smoothing).sum(1)
        correct.append(logits.argmax(2) == y)
    return (losses / len(split.y)).tolist(), torch.cat(correct, 1).cpu().unbind()


def _summed(dtype):
    """What losses are summed in: the model's dtype, but no half precision, in which a long sum stands still."""
    return torch.promote_types(dtype, torch.float32)


def fit(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    data: Data,
    recipe: Recipe,
    seed: int | Sequence[int] = 0,
    start: int = 0,
    stop: int | None = None,
    method: Method = NOTHING,
    opt: torch.optim.Optimizer | None = None,
    graph: bool = True,
    compiled: bool = False,
    loss: Callable[..., torch.Tensor] | None = None,
    checkpoint: "Checkpoint | None" = None,
) -> History | list[History]:
    """Train the model in place and read it as the recipe says.

    Args:
        model: any module of image batches [B, C, H, W] → logits [B, classes]; its device and dtype are used. Or a list
            of models for which `populations` says yes, trained side by side, each as it would be alone.
        data: `lottery.data.Data`.
        seed: of the data order (the initialisation is the model's own); with several models a list of as many.
        start, stop: iterations; training goes on at schedule and data position `start` with a fresh optimiser and
            ends after iteration `stop` (default: the recipe's).
        method: what the training does beside gradient steps, a `Method`; it has been attached to the model.
        opt: an `optimizer` that an earlier call has used, to go on with its momentum.
        graph: on a GPU the whole step is captured as a CUDA graph, if `opt` has its learning rate as a tensor; False
            for a model that cannot be captured, since it waits for the device or changes its ways from step to step.
        compiled: train `torch.compile` of the model, see `can_compile`; what is trained by hand has no use for it.
        loss: `loss(logits, y)` → a scalar, in the place of the cross-entropy that is minimised; readings stay with it,
            but of a model that gives no logits [B, classes], of which they are this loss, without accuracies.
        checkpoint: a `Checkpoint` to go on from and to write now and then; small networks that are trained by hand have
            done before one would be worth it.

    Returns a `History`, with several models a list of them. A model ends with the weights of the last iteration; a loss
    that is not finite at a reading stops its training with status "diverged". It is trained in training mode, but of a
    model that comes in that mode the modules that were put into evaluation mode stay in it, such as a frozen batch
    norm; afterwards every module is in the mode it came in.

    Raises ValueError, before the first update: start and stop out of order, a batch larger than the training set,
    arguments of another kind, a model that gives no logits or a loss that is no number, labels beyond the model's
    outputs, nothing to train, a tensor that is lazy or on the meta device, a parameter in no group or not in `opt`, a
    seed that is none, models that cannot be trained together.
    """
    kinds = {"data": (data, Data), "recipe": (recipe, Recipe), "method": (method, Method)}
    for name, (value, kind) in kinds.items():
        if not isinstance(value, kind):
            what = f"{kind.__module__}.{kind.__name__}"
            raise ValueError(f"Invalid {name} of type {type(value).__name__}: give a {what}.")
    if not (loss is None or callable(loss)):
        raise ValueError(f"Invalid loss {loss!r}: give a function of logits and labels, or None.")
    stop = recipe.iterations if stop is None else stop
    if not (isinstance(start, Integral) and isinstance(stop, Integral) and 0 <= start < stop <= recipe.iterations):
        raise ValueError(f"Invalid start {start}, stop {stop}: need 0 <= start < stop <= {recipe.iterations}.")
    models = [model] if (alone := isinstance(model, torch.nn.Module)) else list(model)
    if not models:
        raise ValueError("Invalid model: the list is empty; give at least one.")
    seeds = list(seed) if not alone and isinstance(seed, Iterable) else [seed]
    if len(seeds) != len(models):
        raise ValueError(f"Invalid seed {seed!r}: give a list of {len(models)} seeds, one for each model.")
    seeds = [check_seed(each) for each in seeds]
    for each in models:
        check_tensors(each)
        own_memory(each)
        _check_trainable(each)
    began, like = time.perf_counter(), first_float(models[0])
    by_hand = opt is loss is None and type(method) is Method and populations(models, recipe, data.train.x.shape[1:])
    if not alone and not by_hand:
        raise ValueError(f"These {len(models)} models cannot be trained together: see lottery.training.populations.")
    if by_hand and alone and like.device.type == "cpu" and (inputs := _lit(model, data, recipe)) is not None:
        narrow = perceptron.narrow(model, inputs)
        history = fit(narrow, _pixels(data, inputs), recipe, seed, start, stop)
        perceptron.widen(model, narrow, inputs)
        history.wall_s = time.perf_counter() - began
        return history
    classes = 1 + max((int(part.y.max()) for part in (data.train, data.valid, data.test) if len(part)), default=-1)
    data = _on(like.device, data)
    batch = Batches(data, recipe, seeds[0] if alone else seeds, like)
    if by_hand:
        _check_outputs(models[0][-1].out_features, classes)
    if not alone:
        step = perceptron.Population(models, recipe, _build)
    elif by_hand and like.device.type == "cpu":
        step = perceptron.Step(model, recipe, _build)
    else:
        opt = opt or optimizer(model, recipe, method.param_groups(model, recipe))
        _check_covered(model, opt.param_groups)
        _check_lone(model, recipe, batch, start, stop)
        step = Step(model, recipe, opt, method, batch, compiled, start, loss, 0 if loss else classes)
    loop = _Loop(models, data, recipe, method, step, batch, start, stop, graph, loss)
    try:
        with torch.enable_grad():
            loop.run(checkpoint if type(step) is Step else None)
    finally:  # also of a training that is interrupted
        for member in loop.members:
            member.leave()
    histories = loop.histories((time.perf_counter() - began) / len(models))
    return histories[0] if alone else histories


class _Loop:
    """The iterations of one training, and all that goes on from one to the next. `t`: how many are finished."""

    evaluate = staticmethod(evaluate)

    def __init__(self, models, data, recipe, method, step, batch, start, stop, graph, loss=None):
        if loss:
            self.evaluate = functools.partial(self.evaluate, loss=loss)
        self.data, self.recipe, self.method, self.step, self.batch = data, recipe, method, step, batch
        self.start, self.stop, self.t, self.lr = start, stop, start, None
        self.loss, self.first_losses, self.batch_loss, self.since = None, {}, 0.0, start
        self.steps, self.test_steps = (set(steps) for steps in recipe.readings(start, stop))
        self.like, self.began = first_float(models[0]), time.perf_counter()
        self.members = [_Member(each, data, recipe, batch.normalise, method, self.evaluate) for each in models]
        self.under_way = dict(enumerate(self.members))
        tensors = all(isinstance(group["lr"], torch.Tensor) for group in step.optimizer.param_groups)
        captures = graph and tensors and _captures(self.like.device)

        def iteration():
            return step(*batch.gather())

        self.launch = collections.defaultdict(lambda: Graph(iteration) if captures else iteration)  # by its length

    def run(self, checkpoint=None):
        """All iterations that are left. checkpoint: a `Checkpoint` to go on from and to keep."""
        if checkpoint:
            checkpoint.load(self)
        while self.t < self.stop and self.under_way:
            self.iterate()
            if self.t in self.steps:
                self.read()
                if checkpoint and self.under_way:
                    checkpoint.offer(self)

    def iterate(self):
        """One step."""
        self._set_lr(self.recipe.lr_at(self.t))
        self.batch.choose(self.t)
        if isinstance(self.step, Step):
            self.step.t = self.t
            self.method.before_step(self.t, self.step)
        self.loss = self.launch[self.batch.length]()
        self.batch_loss = self.batch_loss + self.loss.to(_summed(self.loss.dtype))
        self.t += 1
        if self.t - self.start in LOSS_STEPS:
            self.first_losses[self.t] = self.loss.clone()

    def _set_lr(self, lr):
        if lr == self.lr:
            return
        self.lr = lr
        for group in self.step.optimizer.param_groups:
            its = lr * group.get("rate", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(its)
            else:
                group["lr"] = its

    def read(self):
        """One reading of every network that is under way, the last one of those that end here."""
        done, alone = self.t, len(self.members) == 1
        if alone:
            self.step.sync()
        with autocast(self.recipe, self.like):
            valid = self._evaluate(self.data.valid)
            test = self._evaluate(self.data.test) if done in self.test_steps else None
        losses = self.loss.view(-1).tolist()
        curve = (self.batch_loss / (done - self.since)).view(-1).tolist()
        self.batch_loss, self.since = (self.batch_loss, self.since) if test is None else (0.0, done)
        for k, member in list(self.under_way.items()):
            better, finite = member.read(done, losses[k], valid[k], test and test[k], curve[k])
            if better or not finite or done == self.stop:
                self.step.sync(k)
            if better:
                member.remember(done)
            if not finite or done == self.stop:
                self.under_way.pop(k).end(done, finite)

    def _evaluate(self, split):
        smoothing = self.recipe.smoothing_at_readings
        if isinstance(self.step, perceptron.Population):
            found = _evaluate(self.step.forward, self.like, split, self.batch.normalise, smoothing=smoothing)
            return list(zip(*found, strict=True))
        return [self.evaluate(self.members[0].model, split, self.batch.normalise, smoothing=smoothing)]

    def histories(self, wall_s):
        """What each network's `History` is in the end."""
        for k, member in enumerate(self.members):
            first = {t: loss.view(-1)[k].item() for t, loss in self.first_losses.items() if t <= member.done}
            member.history.train_loss, member.history.wall_s = first, member.history.wall_s + wall_s
        return [member.history for member in self.members]


class Checkpoint:
    """Where one training is kept while it is under way, so that it goes on after a kill as if nothing had happened.

    about: what the training is; a file of another one is not used. every: seconds between two writes, at readings.
    In float64 the rest of the training is the same bit for bit, but for dropout on a GPU: the random state that is kept
    is the CPU's.
    """

    def __init__(self, path: Path | str, about: dict[str, Any], every: float = 60.0):
        about = json.loads(json.dumps(about))  # as the file has it: without tuples
        self.path, self.about, self.every, self.last = Path(path), about, every, time.monotonic()

    def offer(self, loop: _Loop) -> None:
        """Write where the loop is, if the last write is long enough ago."""
        if time.monotonic() - self.last < self.every:
            return
        self.last, [member] = time.monotonic(), loop.members
        parts = dict(zip(("now", "masks"), member.snapshot(), strict=True))
        parts |= dict(zip(("best", "best masks"), member.best or ({}, {}), strict=True))
        parts["optimizer"] = memory(loop.step.optimizer, member.model)
        parts["losses"] = {str(t): loss for t, loss in loop.first_losses.items()}
        parts["sum"] = {"": torch.as_tensor(loop.batch_loss)}
        parts["random state"] = {"": torch.get_rng_state()}  # dropout's
        best = {"step": member.best_step, "loss": member.best_loss}
        history = dataclasses.asdict(member.history)
        history["wall_s"] += time.perf_counter() - loop.began
        about = {"is": self.about, "t": loop.t, "since": loop.since, "best": best, "history": history}
        tensors = {f"{part}/{name}": t.contiguous() for part, some in parts.items() for name, t in some.items()}
        try:
            tensorfile.write(self.path, tensors, about)
        except OSError as error:  # the training may still end, and find room for its result
            warnings.warn(f"No checkpoint: {error}", stacklevel=2)

    def load(self, loop: _Loop) -> None:
        """Put the loop where the file says; one that is missing, damaged or another training's changes nothing."""
        try:
            tensors, about, _ = tensorfile.read(self.path)
        except (OSError, ValueError):
            return
        if about["is"] != self.about:
            return
        parts, [member] = collections.defaultdict(dict), loop.members
        for name, t in tensors.items():
            part, _, name = name.partition("/")
            parts[part][name] = t
        member.put((parts["now"], parts["masks"]))
        member.best = (parts["best"], parts["best masks"]) if parts["best"] else None
        member.best_step, member.best_loss = about["best"]["step"], about["best"]["loss"]
        member.history = History(**about["history"])
        remember(loop.step.optimizer, member.model, parts["optimizer"])
        loop.first_losses = {t: parts["losses"][str(t)] for t in sorted(map(int, parts["losses"]))}
        loop.t, loop.since, loop.batch_loss = about["t"], about["since"], parts["sum"][""].to(loop.like.device)
        torch.set_rng_state(parts["random state"][""])

    def remove(self) -> None:
        """The training is kept elsewhere."""
        self.path.unlink(missing_ok=True)


def memory(opt: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What an optimiser remembers of each parameter: `{"<kind>/<parameter>": tensor}`."""
    names = {id(t): name for name, t in M.tensors(model).items()}
    return {f"{kind}/{names[id(p)]}": t.contiguous() for p, kept in opt.state.items() for kind, t in kept.items()}


def remember(opt: torch.optim.Optimizer, model: torch.nn.Module, memory: dict[str, torch.Tensor]) -> None:
    """Give an optimiser of the same model what another one remembered."""
    tensors = M.tensors(model)
    for name, t in memory.items():
        kind, parameter = name.split("/", 1)
        opt.state[tensors[parameter]][kind] = t.to(tensors[parameter].device)


class _Member:
    """One network of a training, what was read of it, and its state at the smallest validation loss so far."""

    def __init__(self, model, data, recipe, normalise, method, evaluate):
        self.model, self.data, self.recipe, self.normalise, self.method = model, data, recipe, normalise, method
        self.evaluate = evaluate
        self.masks, self.modes = method.masks(model), contextlib.ExitStack()
        self.modes.enter_context(modes_kept(model))
        layers, masks = M.masked(model), M.read(model)
        self.behind = {name: (m, M.original(layers[name]).detach()[~m]) for name, m in masks.items()}
        self.history, self.best, self.best_step, self.best_loss = History(), None, None, math.inf
        self.smoothing = recipe.smoothing_at_readings
        if not model.training:
            model.train()

    def read(self, done, loss, valid, test, curve):
        """Note one reading; returns whether it is the best so far, and whether all losses are finite."""
        if not math.isfinite(loss):
            return False, False
        h, (val_loss, val_correct), (test_loss, correct) = self.history, valid, test or (math.nan, ())
        h.step.append(done)
        h.val_loss.append(val_loss)
        h.val_acc.append(_accuracy(val_correct))
        h.test_loss.append(test_loss)
        h.test_acc.append(_accuracy(correct))
        h.batch_loss.append(curve if test else math.nan)
        if not all(p.isfinite().all() for p in self.model.parameters()):  # the next loss would show it
            return False, False
        for name, value in self.method.reading(self.model).items():
            h.numbers.setdefault(name, []).append(value)
        return val_loss < self.best_loss, math.isfinite(val_loss) or not len(self.data.valid.y)

    def remember(self, done):
        self.best, self.best_step, self.best_loss = self.snapshot(), done, self.history.val_loss[-1]

    def snapshot(self):
        """What early stop goes back to: masks move under some methods."""
        return M.state(self.model), M.read(self.model)

    def put(self, snapshot):
        """Go back to a `snapshot`."""
        theta, masks = snapshot
        M.restore(self.model, theta)
        if masks:
            M.attach(self.model, masks)

    def reading(self, step):
        """Everything at one reading point, of the network as it is now."""
        return reading(self.model, self.data, self.normalise, step, self.smoothing, self.evaluate)

    def end(self, done, finite):
        """Everything at the early stop and at the last iteration."""
        self.done, h, final = done, self.history, self.snapshot()
        with autocast(self.recipe, first_float(self.model)):
            if self.best is not None:
                self.put(self.best)
                h.early_stop = self.reading(self.best_step)
                self.put(final)
            h.last = self.reading(done)
        if not finite or not math.isfinite(h.last.train_loss):  # the last step may have been one too many
            h.status = "diverged"
        self.leave()
        if h.status == "finished":  # a weight that is not finite is not zero under any mask
            self.method.check(self.model, self.masks, done == self.recipe.iterations)

    @torch.no_grad()
    def leave(self):
        """Every module is in the mode it came in, and what lies behind masks that stay has its value again.

        Weight decay and old momentum move that as well.
        """
        self.modes.close()
        layers, masks = M.masked(self.model), M.read(self.model)
        for name, (mask, values) in self.behind.items():
            if type(self.method).before_step is Method.before_step and torch.equal(masks[name], mask):
                M.original(layers[name])[~mask] = values


@torch.no_grad()
def _lit(model, data, recipe):
    """The pixels that are not black in all images, int64 [n], if the others change nothing and are some; else None.

    Black is 0: no weight on it has a gradient, and what it adds to any sum is 0, if the weight is finite. (MNIST: 65 of
    784 pixels.)
    """
    if recipe.inputs != "unit" or recipe.weight_decay or recipe.augment != "none":
        return None
    if not model[1].weight.isfinite().all():
        return None
    lit = torch.stack([split.x.flatten(1).any(0) for split in (data.train, data.valid, data.test)]).any(0)
    return None if lit.all() or not lit.any() else lit.nonzero()[:, 0]


def _pixels(data, pixels):
    """The data with some pixels of each image, as an image of one pixel and so many channels: uint8 [N, n, 1, 1]."""
    parts = {name: getattr(data, name) for name in ("train", "valid", "test")}
    parts = {name: dataclasses.replace(p, x=p.x.flatten(1)[:, pixels, None, None]) for name, p in parts.items()}
    return dataclasses.replace(data, **parts)


def _on(device, data):
    """The data on a device, moved there once."""
    if device.type == "cpu":
        return data
    parts = {name: getattr(data, name) for name in ("train", "valid", "test")}
    parts = {name: dataclasses.replace(p, x=p.x.to(device), y=p.y.to(device)) for name, p in parts.items()}
    return dataclasses.replace(data, **parts)


def populations(models: Sequence[torch.nn.Module], recipe: Recipe, shape: tuple[int, ...] | None = None) -> bool:
    """Whether `fit` can train these models side by side: plain fully connected networks of the same sizes.

    shape: of the images, (C, H, W), which they must then take as well.
    """
    return (recipe.precision, recipe.label_smoothing) == ("float32", 0) and perceptron.trainable(models, shape)


def reading(
    model: torch.nn.Module,
    data: Data,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    step: int,
    smoothing: float = 0.0,
    evaluate: Callable[..., tuple[float, torch.Tensor]] = evaluate,
) -> Reading:
    """Everything at one reading point, of the model as it is now."""
    val_loss, val_correct = evaluate(model, data.valid, normalise, smoothing=smoothing)
    correct = evaluate(model, data.test, normalise)[1]
    train_loss, train_correct = evaluate(model, data.train, normalise, smoothing=smoothing)
    accuracies = [_accuracy(part) for part in (val_correct, correct, train_correct)]
    return Reading(step, val_loss, *accuracies[:2], train_loss, accuracies[2], correct.numpy())


def _accuracy(correct):
    return correct.sum().item() / len(correct) if len(correct) else math.nan
