"""Masks that move while the network trains: GMP, DNW, SET and RigL, each a `Method` of `training.fit`.

GMP, gradual magnitude pruning (Zhu & Gupta 2017, arXiv 1710.01878): dense at first, then the density falls along a
    cubic ramp (their eq. 1); every update ranks all weights anew by magnitude, those that are masked now as well.
DNW, discovering neural wirings (Wortsman, Farhadi & Rastegari, NeurIPS 2019, arXiv 1906.00586): the forward pass uses
    the k largest weights of each layer, the backward pass gives all weights the gradient that they would have had
    (section 3.2, algorithm 1).
SET, sparse evolutionary training (Mocanu et al., Nature Communications 9:2383, 2018, arXiv 1707.04780): a sparse
    network drops the weights closest to zero every so often and grows as many at random (algorithm 1).
RigL (Evci, Gale, Menick, Castro & Elsen, ICML 2020, arXiv 1911.11134): SET, but it grows where the gradient of the
    dense network is largest, and drops a fraction that decays along a cosine (section 3, eq. 1, algorithm 1).

GMP and DNW start dense and take a density: one number in all layers ("uniform"), one shared out by ERK, or a budget,
one number for each layer. SET and RigL keep the density of the masks that they find on the model, such as random ones
at ERK densities (`baselines.random_scores`, `baselines.erk`).

Differs from the authors' code in:

* all: k weights exactly, k = n − round_half_even((1 − density)·n), ties to the earlier weight;
* GMP: the ramp's end is reached; the code that the STR paper ran raises the sparsity once an epoch in epochs 20 to 79
  of 100 and stops at 0.99999537 of what was asked. `rank="step"` ranks before every step as that code does, else
  masks stay between two updates as in Zhu & Gupta's;
* SET: the smallest |w| go, whatever their signs; Mocanu's code takes ζ of the negative and ζ of the positive weights,
  each by themselves. A new weight starts at 0, as in RigL's comparison; theirs draws it. Every layer that carries a
  mask moves; their output layer is dense;
* RigL: the iteration that moves the mask takes its gradient step as well; there is no update at iteration 0; no noise
  on the magnitudes that are compared. As in theirs a weight that is dropped and grown in the same update keeps its
  value.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lottery import baselines, grasp
from lottery import masks as M
from lottery.methods import Method, check_loss, densities, forget, need, number, shares

if TYPE_CHECKING:
    from lottery.training import Recipe, Step

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md

BUDGETS = {"uniform": baselines.uniform, "erk": baselines.erk}


@dataclass(frozen=True)
class GMP(Method):
    """Gradual magnitude pruning: density falls from `initial` to `density` while the network trains.

    With u the share of the ramp that is over, d = d_f + (d_i − d_f)(1 − u)³, for every layer with its own d_f, or over
    all weights together.

    density: fraction of weights at the end, of all prunable layers, or where some carry masks already of these, or a
        budget ((layer, fraction), …); layers without a mask, and those that a budget leaves out, stay dense.
    budget: how one number is shared out, "uniform" (the default of the STR paper's runs) | "erk" | "global", which
        ranks all layers together.
    initial: the density that the ramp starts from.
    begin, end: the ramp, as shares of the training's iterations; epochs 20 to 80 of 100 in the STR paper's runs.
    every: iterations between two updates; an epoch in the STR paper's runs, 100 to 1,000 in Zhu & Gupta.
    rank: "update": masks move when the density does | "step": all weights are ranked before every step from `begin` on.

    Raises ValueError: a value out of its range; at `attach` a density that keeps no weight of a layer.
    """

    density: float | tuple[tuple[str, float], ...] = 0.1
    budget: str = "uniform"
    initial: float = 1.0
    begin: float = 0.2
    end: float = 0.8
    every: int = 100
    rank: str = "update"

    def __post_init__(self):
        super().__post_init__()
        _check_density(self, (*BUDGETS, "global"))
        share = number(self.initial) and 0 < self.initial <= 1
        need(self, "initial", share, "give a fraction of weights, 0 < initial <= 1")
        need(self, "begin", number(self.begin) and 0 <= self.begin < 1, "give a share of the training, 0 <= begin < 1")
        later = number(self.end) and self.begin < self.end <= 1
        need(self, "end", later, f"give a share of the training, {self.begin} < end <= 1")
        _check_every(self)
        need(self, "rank", self.rank in ("update", "step"), "give 'update' or 'step'")

    def attach(self, model: nn.Module) -> nn.Module:
        """Masks of ones, if there are none; checks the budget's names and counts against the model."""
        self.kept(super().attach(model), 1.0)
        return model

    def ramp(self, t: int, iterations: int) -> float | None:
        """u of the masks that iteration t trains with, in [0, 1]; None before the ramp."""
        t0, t1 = round(self.begin * iterations), min(round(self.end * iterations), iterations - 1)
        if t < t0 or t1 <= t0:
            return 1.0 if t >= t1 else None
        return 1.0 if t >= t1 else (t - t0) // self.every * self.every / (t1 - t0)

    def kept(self, model: nn.Module, u: float) -> dict[str, int] | int:
        """Numbers of weights to keep at u, `{layer: k}`, or one number for all layers together."""
        n = {name: M.original(layer).numel() for name, layer in M.masked(model).items()}
        if self.budget == "global" and not isinstance(self.density, tuple):
            return M.kept(sum(n.values()), self._at(self.density, u))
        final = budgets(model, self.density, self.budget, n)
        return {name: M.kept(n[name], self._at(d, u), f"layer {name!r}") for name, d in final.items()}

    def _at(self, final, u):
        initial = max(self.initial, final)  # a layer of a budget may be denser than the ramp's start
        return final + (initial - final) * (1 - u) ** 3

    def before_step(self, t: int, step: "Step") -> None:
        """Rank all weights by magnitude, those that are masked now as well, and keep as many as the ramp says.

        Raises ValueError: no mask is on the model.
        """
        if t == step.start:
            _attached(self, M.masked(step.model))
        u, iterations = self.ramp(t, step.recipe.iterations), step.recipe.iterations
        moves = t == step.start or self.rank == "step" or u != self.ramp(t - 1, iterations)
        if u is None or not moves:
            return
        layers, k = M.masked(step.model), self.kept(step.model, u)
        size = {name: M.original(layer).detach().abs() for name, layer in layers.items()}
        if isinstance(k, int):
            flat = largest(torch.cat([v.flatten() for v in size.values()]), k).split([v.numel() for v in size.values()])
            chosen = {name: part.view_as(v) for (name, v), part in zip(size.items(), flat, strict=True)}
        else:
            chosen = {name: largest(size[name], k[name]) for name in k}
        for name, mask in chosen.items():
            M.mask_of(layers[name]).mask.copy_(mask)

    def reading(self, model: nn.Module) -> dict[str, float]:
        """Density of all layers and of each: it moves."""
        return densities(self.masks(model))

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """At the end exactly as many weights as asked for are left, and what is masked is 0; warns of collapse."""
        super().check(model, self.masks(model), finished)
        if finished:
            _check_counts(self.masks(model), self.kept(model, 1.0))
            M.warn_of_collapse(self.masks(model))


class TopK(M.Parametrization):
    """The parametrization w ↦ w on the k largest |w|, 0 elsewhere; backward the identity: straight through."""

    prunes, numbers = True, ("k",)

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def mask(self, weight: torch.Tensor) -> torch.Tensor:
        """Where the k largest magnitudes are, bool of the weight's shape."""
        return largest(weight.detach().abs(), self.k)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight - torch.where(self.mask(weight), 0, weight).detach()

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


@dataclass(frozen=True)
class DNW(Method):
    """Discovering neural wirings: forward the largest weights of each layer, backward all of them.

    density, budget: as of `GMP`, without "global"; the same from the first step to the last.

    Costs one selection of the k-th largest weight in every forward pass.
    """

    density: float | tuple[tuple[str, float], ...] = 0.1
    budget: str = "uniform"

    def __post_init__(self):
        super().__post_init__()
        _check_density(self, BUDGETS)

    def attach(self, model: nn.Module) -> nn.Module:
        """Put a `TopK` on every layer that has a density. Raises ValueError: one that keeps nothing of a layer."""
        layers, kept = M.prunable(model), self.kept(model)
        M.check_free({name: layers[name] for name in kept}, TopK)
        for name, k in kept.items():
            if top := M.on(layers[name], TopK):
                top.k = k
            else:
                M.put(model, layers[name], TopK(k))
        return model

    def kept(self, model: nn.Module) -> dict[str, int]:
        """Numbers of weights that the forward pass uses, `{layer: k}`."""
        n = {name: M.original(layer).numel() for name, layer in M.prunable(model).items()}
        return {
            name: M.kept(n[name], d, f"layer {name!r}") for name, d in budgets(model, self.density, self.budget).items()
        }

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The largest weights as they stand; all of a layer that has no density. Raises ValueError: none has one."""
        layers = M.prunable(model)
        tops = _attached(self, {name: top for name, layer in layers.items() if (top := M.on(layer, TopK))})
        weights = {name: M.original(layer) for name, layer in layers.items()}
        return {
            name: tops[name].mask(w) if name in tops else torch.ones_like(w, dtype=torch.bool)
            for name, w in weights.items()
        }

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """At the end exactly as many weights as asked for are left, and the others are 0."""
        super().check(model, self.masks(model), finished)
        _check_counts(self.masks(model), self.kept(model))


@dataclass(frozen=True)
class SET(Method):
    """Sparse evolutionary training: every so often a layer's smallest weights go and as many come at random.

    fraction: ζ, the share of a layer's weights that is replaced; 0.3 in the paper.
    decay: of ζ over the iterations t up to the end T, "constant" (the paper) | "cosine", ζ/2 (1 + cos(πt / T)).
    every: iterations between two updates; an epoch in the paper. If `end` comes before the first, no mask moves.
    end: the share of the training after which the masks stay.

    Start it from masks on the model, such as random ones at ERK densities: every layer keeps its number of weights.
    New weights start at 0, without momentum; what is grown is drawn from the training's own key.
    """

    fraction: float = 0.3
    decay: str = "constant"
    every: int = 100
    end: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        share = number(self.fraction) and 0 < self.fraction <= 1
        need(self, "fraction", share, "give the share of weights to replace, 0 < fraction <= 1")
        need(self, "decay", self.decay in ("constant", "cosine"), "give 'constant' or 'cosine'")
        _check_every(self)
        need(self, "end", number(self.end) and 0 < self.end <= 1, "give a share of the training, 0 < end <= 1")

    def param_groups(self, model: nn.Module, recipe: "Recipe") -> list[dict[str, Any]]:
        """One group; raises ValueError when there is nothing to move, since every layer is dense."""
        if all(mask.all() for mask in self.masks(model).values()):
            raise ValueError(
                f"{type(self).__name__} moves the masks that it finds, and all layers are dense: attach random masks "
                "first, such as masks.top_k(baselines.random_scores(model), baselines.erk(model, 0.1))."
            )
        return super().param_groups(model, recipe)

    def replaced(self, t: int, iterations: int) -> float:
        """The share of weights that is replaced before iteration t; 0 when the masks stay."""
        last = self.end * iterations
        if not t or t % self.every or t >= last:
            return 0.0
        return self.fraction * (1 if self.decay == "constant" else (1 + math.cos(math.pi * t / last)) / 2)

    def growth(self, step: "Step", layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """What ranks the weights that may be grown, `{layer: tensor}` from 0: drawn at random."""
        weights, generator = {name: M.original(layer) for name, layer in layers.items()}, step.generator
        draw = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
        return {name: draw(w.shape).to(w.device) for name, w in weights.items()}

    def before_step(self, t: int, step: "Step") -> None:
        """Drop and grow, layer by layer."""
        if share := self.replaced(t, step.recipe.iterations):
            layers = M.masked(step.model)
            score = self.growth(step, layers)
            for name, layer in layers.items():
                rewire(layer, score[name], share, step.optimizer)

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """Every layer has as many weights as at first, and what is masked is 0."""
        super().check(model, self.masks(model), finished)
        _check_counts(self.masks(model), {name: int(m.sum()) for name, m in before.items()})


@dataclass(frozen=True)
class RigL(SET):
    """RigL: SET that grows the weights whose gradient is largest, were they there (eq. 1 and algorithm 1).

    fraction: α, 0.3. decay: "cosine". every: ΔT, 100. end: T_end as a share of the training, 0.75. As of `SET`.

    The gradient is that of the loss of the iteration's minibatch to all weights of the network as it is masked; under
    a recipe in bfloat16 it is in float32 (the copy is not under autocast), and it is never compiled.
    """

    decay: str = "cosine"
    end: float = 0.75

    def growth(self, step: "Step", layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """|∂L/∂w| of all weights."""
        if step.batch[0] is None:
            raise ValueError("RigL grows by the gradient of a minibatch: call hook.before_step(t, optimizer, x, y).")
        g = dense_gradient(step.model, *step.batch, step.loss)
        return {name: g[name].abs() for name in layers}


def rewire(layer: nn.Module, score: torch.Tensor, share: float, optimizer: torch.optim.Optimizer) -> None:
    """Replace a share of a layer's weights, in place: the smallest go, those with the highest score come, at 0.

    The candidates are all weights that are not kept, those that just went among them; one that comes back at once
    keeps its value and momentum.

    score: tensor of the weight's shape, from 0. Momentum and Adam's moments of what is new become 0.
    """
    mask, weight = M.mask_of(layer).mask, M.original(layer)
    active = mask.bool()
    moved = int(share * int(active.sum()))
    kept = largest(weight.detach().abs().masked_fill(~active, -1), int(active.sum()) - moved)
    grown = largest(score.masked_fill(kept, -1), moved)
    new = grown & ~active
    with torch.no_grad():
        weight.masked_fill_(new, 0)
    forget(optimizer.state, weight, new)
    mask.copy_(kept | grown)


def dense_gradient(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss: Callable[..., torch.Tensor] = F.cross_entropy
) -> dict[str, torch.Tensor]:
    """∂L/∂w of the network as it is masked, to all its weights, the masked ones too: `{layer: tensor}`.

    Of a copy in training mode (`grasp.scored_copy`), in float32 where the model is in half precision: the model's
    modes, buffers and gradients and the random state stay as they are.
    """
    net, theta = grasp.scored_copy(model)
    w = list(theta.values())
    with grasp.same_rng(x), torch.enable_grad():
        error = check_loss(loss(net(grasp.fed(x, w[0])), y))
        return dict(zip(theta, torch.autograd.grad(error, w, materialize_grads=True), strict=True))


def largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Where the k largest entries are, bool of the shape; of equal ones the earlier. NaN counts as 0.

    `masks.top_k` without its checks and its sort: for every step of a training.
    """
    if not k:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten().nan_to_num(0.0)
    threshold = flat.kthvalue(len(flat) - k + 1).values
    above, equal = flat > threshold, flat == threshold
    return (above | equal & (equal.cumsum(0) <= k - above.sum())).view_as(score)


def budgets(
    model: nn.Module,
    density: float | tuple[tuple[str, float], ...],
    budget: str = "uniform",
    layers: Iterable[str] | None = None,
) -> dict[str, float]:
    """`{layer: density}` from one number, shared out as `budget` says, or from ((layer, density), …).

    layers: names of those that share it; default: all prunable ones.
    """
    if isinstance(density, tuple):
        M.check_names(dict(density), layers or M.prunable(model), "density", "model", complete=False)
        return dict(density)
    return BUDGETS[budget](model, density, layers)


def _attached(method, found):
    """What a method has put on the model. Raises ValueError where that is nothing, before work that would be lost."""
    if not found:
        name = type(method).__name__
        raise ValueError(
            f"{name} has nothing to prune on this model: call {name}(…).attach(model) before the training."
        )
    return found


def _check_counts(masks, k):
    """Raise AssertionError unless the masks keep k[layer] weights of each layer, or k over all layers."""
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    found, asked = (sum(counts.values()), k) if isinstance(k, int) else ({name: counts[name] for name in k}, k)
    if found != asked:
        raise AssertionError(f"The training ended with {found} weights, not with the {asked} that were asked for.")


def _check_every(method):
    ok = number(method.every, int) and method.every >= 1
    need(method, "every", ok, "give a whole number of iterations from 1")


def _check_density(method, known):
    need(method, "budget", method.budget in list(known), f"give one of {', '.join(known)}")
    rule = "give a fraction of weights to keep, 0 < density <= 1, or ((layer, fraction), ...)"
    need(method, "density", shares(method.density), rule)
