"""One training loop for every method: data resident as uint8, read at fixed iterations, early stop found afterwards."""

import bisect
import dataclasses
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from lottery import masks as M
from lottery import perceptron
from lottery.data import flip_crop, moves

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
    label_smoothing: of the training loss only (STR: 0.1).
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

    def __post_init__(self):
        def need(ok, name, rule):
            if not ok:
                raise ValueError(f"Invalid {name} {getattr(self, name)!r}: {rule}.")

        def number(value, kind=(int, float)):
            return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)

        need(self.optimizer in ("adam", "sgd"), "optimizer", "give 'adam' or 'sgd'")
        need(self.test_readings in ("all", "log"), "test_readings", "give 'all' or 'log'")
        need(self.inputs in ("unit", "standard"), "inputs", "give 'unit' or 'standard'")
        need(self.augment in ("none", "flip-crop"), "augment", "give 'none' or 'flip-crop'")
        need(self.precision in ("float32", "bfloat16"), "precision", "give 'float32' or 'bfloat16'")
        need(self.schedule in ("step", "cosine"), "schedule", "give 'step' or 'cosine'")
        need(number(self.lr) and self.lr > 0, "lr", "give a learning rate above 0")
        need(number(self.momentum) and 0 <= self.momentum < 1, "momentum", "give 0 <= momentum < 1")
        need(number(self.weight_decay) and self.weight_decay >= 0, "weight_decay", "give a number from 0")
        need(number(self.gamma) and self.gamma > 0, "gamma", "give a factor above 0")
        smoothing = number(self.label_smoothing) and 0 <= self.label_smoothing < 1
        need(smoothing, "label_smoothing", "give 0 <= label_smoothing < 1")
        for name in ("batch_size", "iterations", "eval_every", "lr_every"):
            need(number(value := getattr(self, name), int) and value >= 1, name, "give a whole number from 1")
        need(number(self.warmup, int) and self.warmup >= 0, "warmup", "give a whole number of iterations from 0")
        rising = isinstance(self.milestones, tuple) and all(number(t, int) and t > 0 for t in self.milestones)
        rising = rising and list(self.milestones) == sorted(self.milestones)
        need(rising, "milestones", "give a tuple of iterations in increasing order")
        need(isinstance(self.nesterov, bool), "nesterov", "give True or False")
        need(not self.nesterov or (self.optimizer == "sgd" and self.momentum), "nesterov", "it needs SGD with momentum")
        if self.schedule == "cosine":
            need(not self.milestones, "milestones", "the cosine schedule has none")
            whole = self.warmup % self.lr_every == 0 and self.warmup < self.iterations
            need(whole, "warmup", f"give a multiple of lr_every = {self.lr_every} below iterations")

    def lr_at(self, t):
        """Learning rate of the step that follows `t` finished ones, by the schedule."""
        if self.schedule == "cosine":
            e, W, E = (math.ceil(i / self.lr_every) for i in (t - t % self.lr_every, self.warmup, self.iterations))
            return self.lr * ((e + 1) / W if e < W else (1 + math.cos(math.pi * (e - W) / (E - W))) / 2)
        ramp = min(1.0, t / self.warmup) if self.warmup else 1.0
        return self.lr * self.gamma ** bisect.bisect_right(self.milestones, t) * ramp

    def readings(self, start=0, stop=None):
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
    """

    step: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    val_acc: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_acc: list[float] = field(default_factory=list)
    batch_loss: list[float] = field(default_factory=list)
    train_loss: dict[int, float] = field(default_factory=dict)  # minibatch loss at iterations LOSS_STEPS
    status: str = "finished"  # or "diverged": a loss was not finite
    early_stop: Reading | None = None  # None without a validation set
    last: Reading | None = None
    wall_s: float = 0.0

    @property
    def censored(self):
        """True when the minimum validation loss fell on the last reading: the training was too short to see it."""
        return self.early_stop is not None and self.early_stop.step == self.last.step


def param_groups(model, recipe):
    """One group of all trainable parameters, all with the recipe's weight decay."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": recipe.weight_decay}]


def optimizer(model, recipe, groups=None):
    """The recipe's optimiser, fused. Raises ValueError when a trainable parameter is in no group: it cannot move."""
    groups = param_groups(model, recipe) if groups is None else groups
    _check_covered(model, groups)
    return _build(groups, recipe)


def _build(groups, recipe):
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr, fused=True)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)


def _check_covered(model, groups):
    covered = {id(p) for group in groups for p in group["params"]}
    if left := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in covered]:
        raise ValueError(f"No parameter group holds {', '.join(left)}: build the groups after attaching the method.")


class Step:
    """One training iteration of any model. A callable (x, y) → the minibatch's mean loss, before the update."""

    def __init__(self, model, recipe, opt, regulariser=None):
        self.model, self.recipe, self.optimizer, self.regulariser = model, recipe, opt, regulariser

    def __call__(self, x, y):
        with autocast(self.recipe, x):
            logits = self.model(x)
        loss = F.cross_entropy(logits.to(x.dtype), y, label_smoothing=self.recipe.label_smoothing)
        if self.regulariser:
            loss = loss + self.regulariser(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def sync(self):
        """The model has its new weights already."""


class Batches:
    """Minibatches of the training set on the model's device: batch(t) is the one that iteration t trains on.

    Every epoch is a fresh permutation, and fresh augmentation, from (seed, epoch), so any iteration can be asked for:
    rewinding continues where the schedule stands. An incomplete last batch is dropped.
    """

    def __init__(self, data, recipe, seed, like):
        self.x, self.y = data.train.x.to(like.device), data.train.y.to(like.device)
        self.size, self.seed, self.epoch, self.augment = recipe.batch_size, seed, None, recipe.augment != "none"
        self.per_epoch = len(self.y) // self.size
        if not self.per_epoch:
            raise ValueError(f"Invalid batch_size {self.size}: the training set has {len(self.y)} images.")
        self.normalise = normaliser(data, recipe, like)

    def __call__(self, t):
        epoch, i = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self.order = torch.randperm(len(self.y), generator=generator).to(self.y.device)
            if self.augment:
                self.moves = moves(len(self.y), self.x.shape[-1], generator).to(self.y.device)
            self.epoch = epoch
        part = slice(i * self.size, (i + 1) * self.size)
        index = self.order[part]
        x = self.x.index_select(0, index)
        x = flip_crop(x, self.moves[part]) if self.augment else x
        return self.normalise(x), self.y.index_select(0, index)


def normaliser(data, recipe, like):
    """uint8 [B, C, H, W] → the recipe's inputs, in the dtype and on the device of the tensor `like`."""
    if recipe.inputs == "unit":
        return lambda x: x.to(like.dtype).mul_(1 / 255)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) * 255 for v in (data.mean, data.std))
    mean, scale = mean.to(like), (1 / std).to(like)
    return lambda x: x.to(like.dtype).sub_(mean).mul_(scale)


def autocast(recipe, like):
    """A context that computes in the recipe's precision on the device of `like`."""
    return torch.autocast(like.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16")


@torch.no_grad()
def evaluate(model, split, normalise, batch_size=2500):
    """Mean loss per image and correctness (bool [n], on the CPU) of a split; the model's mode is left as it was."""
    if not len(split.y):
        return math.nan, torch.zeros(0, dtype=torch.bool)
    was_training, like = model.training, next(model.parameters())
    model.eval()
    plain = not torch.is_autocast_enabled(like.device.type)
    loss, correct, forward = 0.0, [], (plain and perceptron.forward(model)) or model
    for x, y in zip(split.x.split(batch_size), split.y.split(batch_size), strict=True):
        y = y.to(like.device)
        logits = forward(normalise(x.to(like.device))).to(like.dtype)
        loss += F.cross_entropy(logits, y, reduction="sum")
        correct.append(logits.argmax(1) == y)
    model.train(was_training)
    return float(loss) / len(split.y), torch.cat(correct).cpu()


def fit(model, data, recipe, seed=0, start=0, stop=None, groups=None, opt=None, regulariser=None, before_step=None):
    """Train the model in place and read it as the recipe says.

    Args:
        model: any module of image batches [B, C, H, W] → logits [B, classes]; its device and dtype are used.
        data: `lottery.data.Data`.
        seed: of the data order (the initialisation is the model's own).
        start, stop: iterations; training goes on at schedule and data position `start` with a fresh optimiser and
            ends after iteration `stop` (default: the recipe's).
        groups: the method's parameter groups; default `param_groups(model, recipe)`.
        opt: an `optimizer` that an earlier call has used, to go on with its momentum; then `groups` is not read.
        regulariser: a method's term in the loss, `regulariser(model)`, a scalar with gradient. (CS: λ · penalty.)
        before_step: `before_step(t)` is called before the step that follows t finished ones, to write what a method
            anneals, in place. (CS: `set_beta`.)

    Returns a `History`. The model ends with the weights of the last iteration, in the mode it came in; a loss that is
    not finite at a reading stops the training with status "diverged".

    Raises ValueError: start and stop out of order, a batch larger than the training set, a parameter in no group or
    not in `opt`.
    """
    stop = recipe.iterations if stop is None else stop
    if not 0 <= start < stop <= recipe.iterations:
        raise ValueError(f"Invalid start {start}, stop {stop}: need 0 <= start < stop <= {recipe.iterations}.")
    began, like = time.perf_counter(), next(model.parameters())
    usual = groups is opt is regulariser is before_step is None
    usual = usual and (like.device.type, recipe.precision, recipe.label_smoothing) == ("cpu", "float32", 0)
    if usual and perceptron.layers(model):
        step = perceptron.Step(model, recipe, _build)
    else:
        opt = opt or optimizer(model, recipe, groups)
        _check_covered(model, opt.param_groups)
        step = Step(model, recipe, opt, regulariser)
    batch = Batches(data, recipe, seed, like)
    steps, test_steps = recipe.readings(start, stop)
    steps = set(steps)
    history, best, best_step, best_loss = History(), None, None, math.inf
    masks, lr, was_training = M.read(model), None, model.training
    batch_loss, since = 0.0, start
    model.train()

    for t in range(start, stop):
        if recipe.lr_at(t) != lr:
            lr = recipe.lr_at(t)
            for group in step.optimizer.param_groups:
                group["lr"] = lr
        if before_step:
            before_step(t)
        loss = step(*batch(t))
        batch_loss += loss.detach()
        done = t + 1
        if done - start in LOSS_STEPS:
            history.train_loss[done] = loss.item()
        if done in steps:
            step.sync()
            finite = math.isfinite(loss.item())
            if finite:
                with autocast(recipe, like):
                    val_loss = _read(history, model, data, batch.normalise, done, done in test_steps)
                finite = math.isfinite(val_loss) or not len(data.valid.y)
                history.batch_loss.append(float(batch_loss) / (done - since) if done in test_steps else math.nan)
                batch_loss, since = (0.0, done) if done in test_steps else (batch_loss, since)
            if not finite:
                history.status = "diverged"
                break
            if val_loss < best_loss:
                best, best_step, best_loss = M.state(model), done, val_loss

    final = M.state(model)
    if best is not None:
        M.restore(model, best)
        with autocast(recipe, like):
            history.early_stop = reading(model, data, batch.normalise, best_step)
        M.restore(model, final)
    with autocast(recipe, like):
        history.last = reading(model, data, batch.normalise, done)
    if not math.isfinite(history.last.train_loss):  # the last step was one too many
        history.status = "diverged"
    model.train(was_training)
    if history.status == "finished":  # a weight that is not finite is not zero under any mask
        _assert_sparse(model, masks)
    history.wall_s = time.perf_counter() - began
    return history


def _read(history, model, data, normalise, step, with_test):
    val_loss, val_correct = evaluate(model, data.valid, normalise)
    history.step.append(step)
    history.val_loss.append(val_loss)
    history.val_acc.append(_accuracy(val_correct))
    test_loss, correct = evaluate(model, data.test, normalise) if with_test else (math.nan, ())
    history.test_loss.append(test_loss)
    history.test_acc.append(_accuracy(correct))
    return val_loss


def reading(model, data, normalise, step):
    """Everything at one reading point, of the model as it is now."""
    val_loss, val_correct = evaluate(model, data.valid, normalise)
    correct = evaluate(model, data.test, normalise)[1]
    train_loss, train_correct = evaluate(model, data.train, normalise)
    accuracies = [_accuracy(part) for part in (val_correct, correct, train_correct)]
    return Reading(step, val_loss, *accuracies[:2], train_loss, accuracies[2], correct.numpy())


def _accuracy(correct):
    return correct.sum().item() / len(correct) if len(correct) else math.nan


def _assert_sparse(model, masks):
    """What was pruned stayed pruned: the effective weights at the END of the training, against the masks before it."""
    layers = M.prunable(model)
    for name, m in masks.items():
        if layers[name].weight.detach()[~m].any():
            raise AssertionError(f"Pruned weights of layer {name!r} came back during training.")


def take(data, fraction):
    """The data with a random share of its training images, 0 < fraction <= 1 (the split is already shuffled)."""
    if not 0 < fraction <= 1:
        raise ValueError(f"Invalid train_fraction {fraction}: give a share of the training images, 0 < share <= 1.")
    k = max(1, round(fraction * len(data.train.y)))
    train = dataclasses.replace(data.train, x=data.train.x[:k], y=data.train.y[:k])
    return dataclasses.replace(data, train=train)
