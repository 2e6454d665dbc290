"""Continuous Sparsification. Savarese, Silva & Maire, NeurIPS 2020, arXiv 1912.04427v4.

(The body of the paper was out of reach: the steps follow its summaries and the authors' code.)

Find weights w and a binary mask m = H(s) of few ones, H(s) = 1 for s > 0, by annealing a soft mask, without sampling:

    min over w, s of  L(f(·; σ(βs) ⊙ w)) + λ ‖σ(βs)‖₁,   β from 1 to β_T = 200; β → ∞ gives H(s).

1. s ← s0 everywhere, β ← 1. s0 is the sparsity knob: lower s0, fewer weights.
2. Train w and s together for T steps while β rises exponentially (`temperature`).
3. Between rounds w stays, s ← min(β_T s, s0), β ← 1 (`restart`): what was removed keeps its mask value σ(β_T s)
   and stays removed, what was kept starts again from s0. Go to 2.
4. After the last round: the mask H(s), with w rewound to iteration k (ticket) or as it is (pruning), is trained alone.

Switches where paper and code disagree:

* restart rule: "as-described" is step 3; "code" is what the authors' driver runs, which sets β to 1 before that
  step, so that s ← min(s, s0) and removed weights come back almost fully.
* scale: the code multiplies every mask, soft, hard and in the penalty, by c = 1/σ(s0), so that training starts as the
  dense network; True by default and not in the paper's formulas.
* temperature: per epoch β_T^(e/(E−1)) (code) or per iteration β_T^(t/T) (the formula attributed to the paper).

Differs from the authors' code in:
    the layers: any Linear or Conv weight (`layers=`); theirs are the convolutions without the shortcuts;
    the density: always the mean of H(s); they count soft masks that underflow to exactly 0;
    one epoch: refused by the per-epoch schedule; they divide by zero.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from lottery import masks as M
from lottery import training
from lottery.data import Data
from lottery.methods import Method, densities, need, number, whole

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md


class Gate(M.Parametrization):
    """The parametrization w ↦ c·σ(βs) ⊙ w with c = 1/σ(s0), or c = 1 with `scale=False`.

    Parameter `s`: shape, dtype and device of `weight`, starts at s0. Buffer `beta`: scalar, the inverse temperature,
    starts at 1; written in place, so that a compiled model sees it change. s0 and c are in a state dict, but not in a
    `masks.state`, which therefore goes back on gates of the same s0 and scale only.
    """

    prunes, numbers = True, ("s0", "scale", "c")

    def __init__(self, weight: torch.Tensor, s0: float = 0.0, scale: bool = True):
        super().__init__()
        self.s = nn.Parameter(torch.empty_like(weight))
        self.register_buffer("beta", weight.new_ones(()))
        self.reset(s0, scale)

    @torch.no_grad()
    def reset(self, s0: float, scale: bool = True) -> None:
        """s ← s0 and β ← 1, in place."""
        _check_s0(s0)
        self.s0, self.scale, self.c = float(s0), scale, _factor(s0) if scale else 1.0
        self.s.fill_(s0)
        self.beta.fill_(1.0)

    def mask(self) -> torch.Tensor:
        """The soft mask c·σ(βs), entries in (0, c), of the weight's shape; carries the gradient to s."""
        return torch.sigmoid(self.beta * self.s) * self.c

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask()

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Scale(M.Parametrization):
    """The parametrization w ↦ c·w that stays on a ticket: its retraining sees the c of the search."""

    prunes, numbers = False, ("c",)

    def __init__(self, c: float):
        super().__init__()
        self.c = c

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.c

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Level(NamedTuple):
    """What one round found; tensors and numbers only, so that a process can send it. `ticket` makes a network of it."""

    s0: float
    round: int  # from 1
    masks: dict[str, torch.Tensor]
    density: float  # of the masks, over the gated layers; 0.0 when nothing is kept
    theta: dict[str, torch.Tensor]  # `masks.state` of the network to start from: of iteration k, or as trained
    scale: bool


def attach(model: nn.Module, s0: float = 0.0, layers: Iterable[str] | None = None, scale: bool = True) -> nn.Module:
    """Put a gate on the model's weights, in place; on a layer that has one, s ← s0 and β ← 1.

    Args:
        s0: where every s starts, |s0| <= 80.
        layers: names of the layers to gate, the denominator of all densities; default: all of `masks.prunable(model)`.
        scale: multiply the masks by 1/σ(s0).

    Attach before the optimiser is built, and build it from `param_groups`: an older one never moves s.

    Raises ValueError: s0 out of range, a name that is no prunable layer, a weight that is complex or under another
    parametrization.
    """
    found = M.chosen(model, layers)
    for name, layer in found.items():
        if M.chain_of(layer) is not None and not _gate(layer):
            raise ValueError(f"Layer {name!r} has another parametrization: call lottery.masks.bake(model) first.")
    M.check_free(found, Gate)
    M.check_real(found)
    for layer in found.values():
        if gate := _gate(layer):
            gate.reset(s0, scale)
        else:
            M.put(model, layer, Gate(M.original(layer), s0, scale))
    return model


def penalty(model: nn.Module) -> torch.Tensor:
    """‖mask‖₁ = Σ c·σ(βs) over all gates, a scalar with gradient to s: the penalty without λ (the code's 1e-8)."""
    return total(gate.mask() for gate in _gates(model))


def total(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of all entries, not in half precision: 65,504 is the largest float16, and bfloat16 has 8 bits."""
    return sum(mask.sum(dtype=torch.promote_types(mask.dtype, torch.float32)) for mask in masks)


def set_beta(model: nn.Module, beta: float) -> None:
    """Write the inverse temperature 0 < β < ∞ into every gate, in place; at most the largest number of its dtype."""
    if not (M.is_number(beta) and 0 < beta < math.inf):
        raise ValueError(f"Invalid beta {beta!r}: give a finite inverse temperature above 0.")
    for gate in _gates(model):
        gate.beta.fill_(min(beta, torch.finfo(gate.beta.dtype).max))


def temperature(t: int, iterations: int, epoch: int | None = None, final: float = 200.0) -> float:
    """β of the step that follows `t` finished ones of a round of `iterations`, from 1 to `final`.

    Args:
        epoch: iterations per epoch: β is constant within an epoch, final^(e/(E−1)) in epoch e of E (the authors' code;
            an incomplete last epoch counts). None: final^(t/T) per iteration, which reaches `final` at t = T.

    Raises ValueError: t outside the round, fewer than two epochs, final below 1.
    """
    if not 0 <= t <= iterations or iterations < 1:
        raise ValueError(f"Invalid t {t}: give finished iterations of the round, 0 <= t <= {iterations}.")
    if not (number(final) and final >= 1):
        raise ValueError(f"Invalid final {final!r}: give the last inverse temperature, at least 1.")
    if epoch is None:
        return final ** (t / iterations)
    if not 1 <= epoch < iterations:
        raise ValueError(
            f"Invalid epoch {epoch}: beta needs two epochs to rise in, of {iterations} iterations together."
        )
    last = math.ceil(iterations / epoch) - 1
    return final ** (min(t // epoch, last) / last)


@dataclass(frozen=True)
class CS(Method):
    """One round of the search as a `Method`: the soft network is trained while β rises, its masks are H(s).

    s0, scale, layers: as of `attach`. lam: λ, of the plain sum of all mask entries. final: β_T; 1 keeps β fixed.
    schedule: β rises per "epoch" (the authors' code) or per "iteration", see `temperature`.
    rule: of the `restart` from the round before. carry: the optimiser's momentum goes on from that round, as in the
        authors' code, or starts anew.
    """

    s0: float = 0.0
    lam: float = 1e-8
    final: float = 200.0
    schedule: str = "epoch"
    rule: str = "as-described"
    scale: bool = True
    layers: tuple[str, ...] | None = None
    carry: bool = True

    def __post_init__(self):
        super().__post_init__()
        need(self, "lam", number(self.lam) and self.lam >= 0, "give the weight of the penalty, a number from 0")
        need(self, "schedule", self.schedule in ("epoch", "iteration"), "give 'epoch' or 'iteration'")
        for name in ("scale", "carry"):
            need(self, name, isinstance(getattr(self, name), bool), "give True or False")
        temperature(0, 1, None, self.final)
        _check_rule(self.rule)
        _check_s0(self.s0)

    @property
    def carries(self) -> bool:
        return self.carry

    def attach(self, model: nn.Module) -> nn.Module:
        return attach(model, self.s0, self.layers, self.scale)

    def resume(self, model: nn.Module) -> None:
        restart(model, self.rule)

    def param_groups(self, model: nn.Module, recipe: training.Recipe) -> list[dict[str, Any]]:
        return param_groups(model, recipe)

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        return self.lam * penalty(model) if self.lam else None

    def before_step(self, t: int, step: training.Step) -> None:
        epoch = step.per_epoch if self.schedule == "epoch" and self.final > 1 else None
        set_beta(step.model, temperature(t, step.recipe.iterations, epoch, self.final))

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return read(model)

    def reading(self, model: nn.Module) -> dict[str, float]:
        return densities(self.masks(model))

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """Masks are there to move."""


@dataclass(frozen=True)
class Ticket(Method):
    """The training of a ticket that a search from `s0` found: masks that stay, and the search's factor c = 1/σ(s0)."""

    s0: float = 0.0
    scale: bool = True

    def __post_init__(self):
        super().__post_init__()
        need(self, "scale", isinstance(self.scale, bool), "give True or False")
        _check_s0(self.s0)

    def attach(self, model: nn.Module) -> nn.Module:
        """c on every layer that carries a mask, in the place of another; masks first."""
        if not (layers := M.masked(model)):
            raise ValueError("No mask on the model: a ticket is a mask, call lottery.masks.attach(model, masks) first.")
        for layer in layers.values():
            if scale := M.on(layer, Scale):
                scale.c = self.c
            elif self.scale:
                M.put(model, layer, Scale(self.c))
        return model

    @property
    def c(self) -> float:
        """1/σ(s0), or 1 with `scale=False`."""
        return _factor(self.s0) if self.scale else 1.0

    def param_groups(self, model: nn.Module, recipe: training.Recipe) -> list[dict[str, Any]]:
        """One group; raises ValueError where c is not on the masked layers, before it is trained without."""
        on = [M.on(layer, Scale) for layer in M.masked(model).values()]
        if not on or any((scale.c if scale else 1.0) != self.c for scale in on):
            raise ValueError(f"The model is no ticket of s0 = {self.s0}: call this method's attach(model) first.")
        return super().param_groups(model, recipe)


def param_groups(model: nn.Module, recipe: training.Recipe) -> list[dict[str, Any]]:
    """Two groups for the optimiser: s without weight decay, all other trainable parameters with the recipe's.

    Both have the recipe's learning rate and momentum, as in the authors' code. (Decay would pull s to the threshold 0.)
    """
    s = {id(gate.s) for gate in _gates(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in s], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trainable if id(p) in s], "weight_decay": 0.0},
    ]


@torch.no_grad()
def restart(model: nn.Module, rule: str = "as-described") -> None:
    """Between rounds: s ← min(βs, s0) ("as-described") or min(s, s0) ("code"), then β ← 1; w stays. In place.

    β is the one on the gates: the last of the round. With s0 = 0 every kept s is then exactly 0, so that H(s) means
    nothing until the next round has been trained.
    """
    _check_rule(rule)
    for gate in _gates(model):
        s = gate.beta * gate.s if rule == "as-described" else gate.s
        gate.s.copy_(s.clamp(max=gate.s0))
        gate.beta.fill_(1.0)


def read(model: nn.Module) -> dict[str, torch.Tensor]:
    """The hard masks H(s) as they stand, `{layer: BoolTensor}`, True where s > 0; the gates stay on the model."""
    s = {name: _gate(layer).s.detach() for name, layer in _gated(model).items()}
    for name in s:
        if torch.isnan(s[name]).any():
            raise ValueError(f"NaN in s of layer {name!r}: the search diverged; lower the learning rate.")
    return {name: s[name] > 0 for name in s}


def harden(model: nn.Module) -> dict[str, torch.Tensor]:
    """Replace the gates by their hard masks H(s), in place, and return these: `lottery.masks` masks from now on.

    The effective weight becomes c·H(s) ⊙ w; the parameters w are the same objects with the same values. c is in a state
    dict, but not in a `masks.state`: put it back with `Ticket(s0).attach(model)`, or call `lottery.masks.bake` first.

    Warns of layer collapse, naming the layers.
    """
    masks = read(model)
    _replace(model, masks)
    M.warn_of_collapse(masks)
    return masks


def search(
    model: nn.Module,
    train: Callable[[nn.Module, int, int | None], Any],
    s0: float = 0.0,
    rounds: int = 1,
    rule: str = "as-described",
    rewind_to: int | None = 0,
    layers: Iterable[str] | None = None,
    scale: bool = True,
) -> Iterator[Level]:
    """The ticket search, round by round; the authors' CIFAR-10 default is 3 rounds of 85 epochs, rewinding to epoch 2.

    Args:
        model: initialised; gated and trained in place.
        train: `train(model, start, stop)` trains w and s in place from iteration `start` of a round to `stop` (None:
            to its end), with `penalty` in the loss and `set_beta` along the way, up to β_T at the end: a `Rounds`, or
            a loop of one's own. Momentum carries over between the calls, as in the authors' code, if it keeps its
            optimiser.
        s0, layers, scale: as in `attach`.
        rule: as in `restart`.
        rewind_to: k, less than the iterations of the first round: tickets start from w_k. None: pruning, they start
            from the trained w.

    Yields a `Level` after each round, while the soft network is on the model.
    """
    whole("rounds", rounds)
    if rewind_to is not None and not (number(rewind_to, Integral) and rewind_to >= 0):
        raise ValueError(f"Invalid rewind_to {rewind_to}: give an iteration from 0, or None to keep the trained w.")
    _check_rule(rule)
    if isinstance(train, Rounds):
        train.check(rounds, rewind_to)
    attach(model, s0, layers, scale)
    if rewind_to:
        train(model, 0, rewind_to)
    theta_k = _weights(model)
    for r in range(1, rounds + 1):
        train(model, (rewind_to or 0) if r == 1 else 0, None)
        m = read(model)
        yield Level(s0, r, m, M.density(m), _weights(model) if rewind_to is None else theta_k, scale)
        if r < rounds:
            restart(model, rule)


class Rounds:
    """What `search` trains with: `training.fit` under a `CS`, one optimiser throughout, every round in another order.

    seeds: of the data order, one for each round.
    """

    def __init__(self, data: Data, recipe: training.Recipe, method: CS, seeds: Sequence[int]):
        self.data, self.recipe, self.method, self.seeds = data, recipe, method, list(seeds)
        self.optimizer, self.round, self.histories = None, -1, []

    def check(self, rounds: int, rewind_to: int | None) -> None:
        """Raise ValueError for what would end a `search` after trainings."""
        if rounds > len(self.seeds):
            raise ValueError(f"Invalid seeds: give one for each round, {len(self.seeds)} are too few.")
        if rewind_to and rewind_to >= self.recipe.iterations:
            raise ValueError(
                f"Invalid rewind_to {rewind_to}: give less than the {self.recipe.iterations} iterations of a round."
            )

    def __call__(self, model: nn.Module, start: int, stop: int | None) -> None:
        self.round += start == 0
        self.check(self.round + 1, None)
        if self.optimizer is None or (not self.method.carry and start == 0):
            self.optimizer = training.optimizer(model, self.recipe, param_groups(model, self.recipe))
        where = {"seed": self.seeds[self.round], "start": start, "stop": stop}
        self.histories.append(
            training.fit(model, self.data, self.recipe, **where, method=self.method, opt=self.optimizer)
        )


def sweep(
    model: nn.Module,
    train: Callable[[nn.Module, int, int | None], Any],
    s0s: Iterable[float],
    executor: Executor | None = None,
    **options: Any,
) -> Iterator[Level]:
    """One `search` from the same initial model for each s0, on copies; yields the levels in the order of `s0s`.

    train: as of `search`; every search has a copy, so that an optimiser that it keeps is its own.
    executor: any `concurrent.futures.Executor`; the searches run in parallel on it (with processes, `train` and the
    model must pickle, so attach nothing before). Default: one after the other, lazily. options: of `search`.
    """
    run = map if executor is None else executor.map
    for levels in run(functools.partial(_levels, model, train, options), s0s):
        yield from levels


def ticket(model: nn.Module, level: Level) -> nn.Module:
    """A copy of the model, gated or plain, as the level's ticket: weights `level.theta`, masks H(s) and the factor c.

    Train it as any masked model; the authors run the whole schedule of a round again, without penalty.

    Raises ValueError: the level keeps no weight.
    """
    if not level.density:
        raise ValueError(f"Round {level.round} of s0 = {level.s0} keeps no weight: raise s0.")
    net = attach(copy.deepcopy(model), level.s0, level.masks, level.scale)
    _replace(net, level.masks)
    return M.restore(net, level.theta)


def _levels(model, train, options, s0):
    return list(search(copy.deepcopy(model), copy.copy(train), s0, **options))


def _replace(model, masks):
    """Masks, and the factor c, where the gates were; swapped within, since a deepcopy shares the class that
    `remove_parametrizations` takes the weight's property from."""
    new = {id(_gate(layer)): M.Mask(masks[name], like=layer.weight) for name, layer in _gated(model).items()}
    for module in model.modules():
        if gate := _gate(module):
            chain = M.chain_of(module)
            chain[list(chain).index(gate)] = new[id(gate)]
            if gate.scale:
                chain.append(Scale(gate.c))


def _weights(model):
    """`masks.state` without s and β."""
    gates = {id(t) for gate in _gates(model) for t in (gate.s, gate.beta)}
    return {name: t.detach().clone() for name, t in M.tensors(model).items() if id(t) not in gates}


def _factor(s0):
    """c = 1/σ(s0)."""
    return 1 + math.exp(-s0)


def _check_s0(s0):
    if not (number(s0) and abs(s0) <= 80):
        raise ValueError(f"Invalid s0 {s0!r}: give a number near 0, at most 80 in size; lower keeps fewer weights.")


def _check_rule(rule):
    if rule not in ("as-described", "code"):
        raise ValueError(f"Invalid rule {rule!r}: give 'as-described' or 'code'.")


def _gates(model):
    """All gates of the model, each once."""
    if gates := [module for module in model.modules() if isinstance(module, Gate)]:
        return gates
    raise ValueError("No gates on the model: call lottery.cs.attach(model, s0) first.")


def _gated(model):
    """The prunable layers with a gate: `{layer: module}`."""
    _gates(model)
    return {name: layer for name, layer in M.prunable(model).items() if _gate(layer)}


def _gate(module):
    """The Gate on a layer's weight, or None."""
    return M.on(module, Gate)
