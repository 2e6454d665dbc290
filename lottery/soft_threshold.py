"""Soft Threshold weight Reparameterization (STR). Kusupati et al., ICML 2020, arXiv 2002.03231.

Every layer l trains its weights W_l and a threshold parameter s_l together, by plain SGD from scratch:

1. The layer computes with S_g(W, s) = sign(W) · relu(|W| − α), α = g(s), in the place of W. g = sigmoid for weights,
   exp for the inner dimension of a low-rank product. No mask, no straight-through estimator, no schedule, no target.
2. s starts far below 0 (−3200 for a ResNet-50), where α is zero: the network starts dense.
3. Weight decay λ acts on s as on W. It pulls s up towards 0 and so raises α; where the data need a weight, the
   gradient dL/ds = −g′(s) · Σ over |W| > α of dL/dS · sign(W) pushes s back.
4. Until s reaches about −10, the onset of pruning, that gradient is zero and all layers share one trajectory,
   s_t = s_init · exp(−λ · Σ lr / (1 − momentum)). s_init says when pruning starts, λ when and how hard.
5. The densities of the layers at the end, the budget, are learnt: a random outcome of (λ, s_init) and the training.

At the kinks autograd's conventions hold, as in the authors' code: |W| = α and W = 0 count as pruned and pass no
gradient, neither to W nor to s. A pruned weight moves by its decay and momentum only.

Differs from the authors' code in:

* g: theirs runs with sigmoid only, another choice fails at the first forward; exp is the paper's;
* granularity: theirs is one s per layer; the paper has one for all layers as well (Table 9) and one per weight
  (appendix A.5.3), and its remark on one per filter comes without a number;
* the shape of s: a scalar for one number; theirs is (1, 1);
* the classifier: any Linear or Conv layer; theirs is a 1x1 convolution without bias;
* `param_groups`: one decay for W, biases, batch norms and s; theirs can switch that of batch norms off;
* the density: an exact count; theirs rounds each layer's down.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lottery import masks as M
from lottery.methods import Method, densities, forget, need, number

if TYPE_CHECKING:
    from lottery.training import Recipe, Step

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md

G = {"sigmoid": torch.sigmoid, "exp": torch.exp}
GRANULARITIES = ("layer", "global", "filter", "weight")
DECAYS = ("all", "thresholded", "weights")
FROZEN = -1e30  # an s that no decay brings back: g is exactly 0
ONSET = -10.0  # sigmoid(−10) = exp(−10) = 4.5e-5: below, no weight is pruned to speak of


class SoftThreshold(M.Parametrization):
    """The parametrization w ↦ sign(w) · relu(|w| − g(s)), with trainable `s`.

    s_init: a number, or a tensor that broadcasts with the weight.
    g: "sigmoid" | "exp".

    s is left unclamped and g without an epsilon: that g is exactly 0 far left (float32: s below about −89), where
    the weights pass bit for bit, is relied upon.
    """

    prunes, numbers = True, ("g",)

    def __init__(self, s_init: float | torch.Tensor, g: str = "sigmoid"):
        super().__init__()
        if g not in G:
            raise ValueError(f"Invalid g {g!r}: give 'sigmoid' or 'exp'.")
        s = s_init.detach().clone() if isinstance(s_init, torch.Tensor) else torch.tensor(float(s_init))
        if not s.isfinite().all():
            bad = s[~s.isfinite()][0].item()
            raise ValueError(f"Invalid s_init {bad}: give a finite number, far below 0 for a dense start.")
        self.g, self.s = g, nn.Parameter(s)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        alpha = self.threshold()
        return torch.sign(weight) * torch.relu(torch.abs(weight) - alpha)

    def threshold(self) -> torch.Tensor:
        """α = g(s), of the shape of s."""
        return G[self.g](self.s)


def attach(
    model: nn.Module, s_init: float, g: str = "sigmoid", granularity: str = "layer", layers: Iterable[str] | None = None
) -> nn.Module:
    """Put soft thresholds on the model, in place. Build the optimiser afterwards: it has to hold s.

    Args:
        s_init: where every s starts; −3200 or −12800 in the paper's models. Near 0 (from −5 or so) it prunes at once.
        g: "sigmoid" | "exp".
        granularity: "layer" one s per weight tensor (the paper), "global" one for all, "filter" one per output unit,
            s of shape [C_out, 1, …], "weight" one per weight.
        layers: names of the layers to threshold; default: all prunable ones, as in the paper.

    Called again with the same kind it sets s back to `s_init` in place, and never stacks. Returns the model.

    Raises ValueError: an argument out of its range, an unknown layer, nothing prunable, half-precision weights, a
    layer that carries a threshold of another kind.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"Invalid granularity {granularity!r}: give {', '.join(map(repr, GRANULARITIES))}.")
    chosen = M.chosen(model, layers)
    M.check_free(chosen, SoftThreshold, above=(M.Mask,))  # `read` sees the zeros of both
    if not M.is_number(s_init):
        raise ValueError(f"Invalid s_init {s_init!r}: give a finite number, far below 0 for a dense start.")
    like = {name: M.original(layer) for name, layer in chosen.items()}
    for name, weight in like.items():
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Invalid dtype {weight.dtype} of layer {name!r}: thresholds need float32 or float64 weights; "
                "for bfloat16 use torch.autocast."
            )
        if math.isfinite(s_init) and abs(s_init) > torch.finfo(weight.dtype).max:
            raise ValueError(f"Invalid s_init {s_init}: give a number that {weight.dtype} can hold, such as -3200.")
    new = {n: SoftThreshold(w.new_full(_shape(w, granularity), float(s_init)), g) for n, w in like.items()}

    on = {name: p for name, layer in chosen.items() if (p := _threshold(layer))}
    uses = Counter(id(_threshold(layer)) for layer in _thresholded(model).values())
    shared = next(iter(on.values()), next(iter(new.values())))
    for name, p in on.items():
        sharing = p is shared if granularity == "global" else uses[id(p)] == 1
        if p.g != g or p.s.shape != new[name].s.shape or not sharing:
            raise ValueError(f"Layer {name!r} carries a soft threshold of another kind: lottery.masks.bake it first.")
    for name, layer in chosen.items():
        if name in on:
            nn.init.constant_(on[name].s, s_init)
        else:
            M.put(model, layer, shared if granularity == "global" else new[name])
    return model


def _shape(weight, granularity):
    if granularity == "weight":
        return weight.shape
    return (len(weight), *[1] * (weight.dim() - 1)) if granularity == "filter" else ()


def _threshold(module):
    """The SoftThreshold on a layer's weight, or None."""
    return M.on(module, SoftThreshold)


def _thresholded(model):
    """`{layer: module}` of those that carry a threshold."""
    return {name: layer for name, layer in M.prunable(model).items() if _threshold(layer)}


@dataclass(frozen=True)
class STR(Method):
    """STR as a `Method`: thresholds are trained with the weights; the masks are where the effective weight is not 0.

    s_init, g, granularity, layers: as of `attach`. The density that comes out depends on these, the recipe's weight
    decay and learning rates: see `reach`.
    decay: as of `param_groups`.
    freeze: the share of the training after which the budget stays (page 9 suggests it, to land on a sparsity); None:
        never. density: that of the frozen budget, see `freeze`; None: as it is then.
    """

    s_init: float = -3200.0
    g: str = "sigmoid"
    granularity: str = "layer"
    layers: tuple[str, ...] | None = None
    decay: str = "all"
    freeze: float | None = None
    density: float | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("g", G), ("granularity", GRANULARITIES), ("decay", DECAYS)):
            need(self, name, getattr(self, name) in list(known), f"give {' or '.join(map(repr, known))}")
        need(self, "s_init", number(self.s_init), "give a finite number, far below 0 for a dense start")
        share = self.freeze is None or (number(self.freeze) and 0 < self.freeze < 1)
        need(self, "freeze", share, "give a share of the training, 0 < freeze < 1, or None")
        share = self.density is None or (self.freeze is not None and number(self.density) and 0 < self.density <= 1)
        need(self, "density", share, "give 0 < density <= 1, and freeze with it")

    def attach(self, model: nn.Module) -> nn.Module:
        return attach(model, self.s_init, self.g, self.granularity, self.layers)

    def param_groups(self, model: nn.Module, recipe: "Recipe") -> list[dict[str, Any]]:
        return param_groups(model, recipe, self.decay)

    def before_step(self, t: int, step: "Step") -> None:
        n = step.recipe.iterations
        if self.freeze is not None and t == min(round(self.freeze * n), n - 1):
            freeze(step.model, self.density, step.optimizer)

    def masks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Of the layers that carry a threshold."""
        return {name: M.effective(layer) != 0 for name, layer in _thresholded(model).items()}

    def reading(self, model: nn.Module) -> dict[str, float]:
        """The densities, and of each layer the mean s and the mean threshold (figures 1 to 3)."""
        on = {name: _threshold(layer) for name, layer in _thresholded(model).items()}
        s = {f"s/{name}": p.s.mean().item() for name, p in on.items()}
        return densities(self.masks(model)) | s | {f"threshold/{n}": p.threshold().mean().item() for n, p in on.items()}

    def check(self, model: nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """Masks are there to move, but for a frozen budget: no more is left in the end, but for a weight a layer."""
        masks = self.masks(model).values()
        if finished and self.density is not None:
            left, n = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
            if left > self.density * n + len(masks):
                raise AssertionError(f"The training ended with {left} of {n} weights, not with {self.density} of them.")


def thresholds(model: nn.Module) -> dict[str, torch.Tensor]:
    """α = g(s) of the layers that carry a threshold, detached: `{layer: tensor}`, a scalar or of the shape of s."""
    return {name: _threshold(layer).threshold().detach() for name, layer in _thresholded(model).items()}


def freeze(model: nn.Module, density: float | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
    """End the learning of thresholds: what is kept now stays, what is pruned stays 0, and training may go on.

    Every W becomes S_g(W, s), and s goes so far down that the threshold is 0 from here on; a weight of exactly 0 gets
    no gradient and no decay.

    density: of the layers with a threshold; the largest of what every layer has kept, the same share of each, so that
        it is reached exactly but for a weight or less a layer. Where no more than that is left, all of it stays.
    optimizer: its momentum of pruned weights and of s becomes 0.
    """
    layers = _thresholded(model)
    now = M.density({name: M.effective(layer) != 0 for name, layer in layers.items()})
    share = min(1.0, density / now) if density is not None and now else 1.0
    memory = {} if optimizer is None else optimizer.state
    for layer in layers.values():
        w, s = M.effective(layer), _threshold(layer).s
        k = round(share * int(w.count_nonzero()))
        keep = torch.zeros_like(w, dtype=torch.bool).flatten()
        keep[w.abs().flatten().topk(k).indices] = True
        keep = keep.view_as(w)
        with torch.no_grad():
            M.original(layer).copy_(w * keep)
            s.fill_(FROZEN)
        for parameter, gone in ((M.original(layer), ~keep), (s, torch.ones_like(s, dtype=torch.bool))):
            forget(memory, parameter, gone)


def param_groups(model: nn.Module, recipe: "Recipe", decay: str = "all") -> list[dict[str, Any]]:
    """Two groups for `training.fit`: everything else, and every s once; both with the recipe's weight decay.

    Decay on s is what prunes. Without it (1-d parameters left out of decay, as many scripts do) s stays where it
    starts; with Adam, s of size 3200 moves by lr a step and never arrives. The paper's optimiser is SGD.

    decay: "all" (the paper's convolutional networks) | "thresholded": of the layers that carry a threshold and of s,
        nothing else (its FastGRNNs, Table 12) | "weights": of all but s, which switches STR off.

    Raises ValueError: no threshold on the model.
    """
    s = {id(m.s) for m in model.modules() if isinstance(m, SoftThreshold)}
    if not s:
        raise ValueError("No soft threshold on the model: call lottery.soft_threshold.attach before building groups.")
    trainable = [p for p in model.parameters() if p.requires_grad]
    rest, s = [p for p in trainable if id(p) not in s], [p for p in trainable if id(p) in s]
    if decay == "thresholded":
        own = {id(M.original(layer)) for layer in _thresholded(model).values()}
        rest, s = [p for p in rest if id(p) not in own], [*s, *(p for p in rest if id(p) in own)]
    none = {"thresholded": rest, "weights": s}.get(decay)
    return [{"params": p, "weight_decay": 0.0 if p is none else recipe.weight_decay} for p in (rest, s)]


def read(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are left: `masks.remaining`, `{layer: BoolTensor}` of every prunable layer."""
    return M.remaining(model)


def budgets(model: nn.Module) -> dict[str, float]:
    """The learnt density of every prunable layer, `{layer: float}`: to be given to `masks.top_k` as it is.

    top_k then keeps exactly as many weights of every layer. Reads baked models as well.

    Raises ValueError: a layer of which nothing is left, or whose weights are not finite.
    """
    found = {name: mask.count_nonzero().item() / mask.numel() for name, mask in read(model).items()}
    if gone := [name for name, density in found.items() if not density]:
        raise ValueError(f"Layer collapse: no weight is left in {', '.join(gone)}; lower the weight decay or s_init.")
    return found


def decay_path(s_init: float, recipe: "Recipe") -> np.ndarray:
    """The closed form of s under decay alone, valid until the onset: float64 [iterations + 1], from s_0 = s_init.

    s_t = s_init · exp(−Λ_t), Λ_t = λ · Σ_{i<t} lr_i / (1 − momentum). Exact as λ · lr / (1 − momentum)² goes to 0.

    Args:
        recipe: anything with the `lr_at(t)`, `iterations`, `optimizer`, `momentum`, `weight_decay` of a `Recipe`.

    Raises ValueError: an optimiser other than SGD, s_init not below 0.
    """
    return s_init * np.exp(-recipe.weight_decay * _pull(s_init, recipe))


def onset(s_init: float, recipe: "Recipe", s: float = ONSET) -> int | None:
    """Number of iterations after which s first is at or above `s` by the closed form; None: not in this training."""
    (reached,) = np.nonzero(decay_path(s_init, recipe) >= s)
    return int(reached[0]) if len(reached) else None


def decay_for(s_init: float, recipe: "Recipe", share: float = 0.3, s: float = ONSET) -> float:
    """The λ with which s arrives at `s` after `share` of the recipe's iterations: where `reach` may start.

    The paper's 90 % ResNet-50 has its onset after 28 % of the training. A λ taken from another training length does
    nothing: what counts is λ · Σ lr / (1 − momentum).

    Raises ValueError: a share outside (0, 1], s_init not below `s`, learning rates that sum to zero, as `decay_path`.
    """
    if not 0 < share <= 1:
        raise ValueError(f"Invalid share {share}: give a share of the training, 0 < share <= 1.")
    if not s_init < s < 0:
        raise ValueError(f"Invalid s_init {s_init}: give a number below s = {s}, which is below 0.")
    pull = _pull(s_init, recipe)[max(1, round(share * recipe.iterations))]
    if not pull > 0:
        raise ValueError(f"Invalid share {share}: the learning rates until there sum to zero.")
    return float(math.log(s_init / s) / pull)


def _pull(s_init, recipe):
    """Λ_t / λ for t = 0 … iterations."""
    if recipe.optimizer != "sgd":
        raise ValueError(f"Invalid optimizer {recipe.optimizer!r}: the closed form is that of SGD, give 'sgd'.")
    if not -math.inf < s_init < 0:
        raise ValueError(f"Invalid s_init {s_init}: give a finite number below 0.")
    lr = [recipe.lr_at(t) for t in range(recipe.iterations)]
    return np.cumsum([0.0, *lr]) / (1 - recipe.momentum)


class Trial(NamedTuple):
    """One training of a search; density is NaN where a weight was not finite."""

    weight_decay: float
    s_init: float
    density: float


@dataclass
class Reach:
    """What `reach` tried, in order, and whether it arrived. `model` is what `train` returned in the best trial."""

    density: float
    tolerance: float
    trials: list[Trial] = field(default_factory=list)
    model: object = None

    @property
    def best(self) -> Trial | None:
        """The trial nearest to the target, by the ratio of densities as they are searched, or None.

        One within the tolerance comes first; one that left no weight is no trial to go on from.
        """
        usable = [trial for trial in self.trials if trial.density > 0]  # NaN is not
        return min(usable, key=lambda t: (not self._near(t), abs(math.log(t.density / self.density))), default=None)

    @property
    def found(self) -> bool:
        """Whether the best trial is within the tolerance."""
        return self.best is not None and self._near(self.best)

    def _near(self, trial):
        return abs(trial.density - self.density) <= self.tolerance

    def __str__(self):
        what = f"density {self.density:g} ± {self.tolerance:g} in {len(self.trials)} trials"
        if self.found:
            head = f"Reached {what}: weight_decay={self.best.weight_decay:.6g}, s_init={self.best.s_init:.6g}."
        elif self.best:
            head = f"Not reached: {what}; nearest {self.best.density:.4g}. Allow more trials, or go on there."
        else:
            why = "every training diverged or left no weight"
            head = f"Not reached: {what}; {why}. Lower weight_decay or the learning rate."
        rows = [f"{t.weight_decay:>14.6g} {t.s_init:>12.6g} {t.density:>10.5f}" for t in self.trials]
        return "\n".join([head, f"{'weight_decay':>14} {'s_init':>12} {'density':>10}", *rows])


def reach(
    density: float,
    train: Callable[[float, float], nn.Module | float],
    weight_decay: float,
    s_init: float = -3200.0,
    tolerance: float = 0.005,
    trials: int = 12,
    report: Callable[[Trial], Any] | None = None,
) -> Reach:
    """Search λ, then s_init, for a density: how to get to 90 %. There is no knob for it, so this trains.

    Density falls with λ and, at one λ, with a smaller |s_init|. λ is doubled or halved until two values enclose the
    target, then interpolated (log density over log λ); where two λ less than 5 % apart still enclose it, |s_init|,
    on whose logarithm the onset depends, is the fine knob at the lower one. Density also depends on seed and epochs:
    search with the training that is going to be used.

    Args:
        density: fraction of the prunable weights to keep, 0 < density < 1 (0.1 for 90 % sparsity).
        train: `train(weight_decay, s_init)` trains a fresh model with thresholds from the beginning and returns it, or
            its density as a number. It must apply the decay to s: see `param_groups`.
        weight_decay: of the first trial; `decay_for` proposes one.
        s_init: of the first trial, and of all until λ is as fine as it gets.
        tolerance: largest |density − target| to be satisfied with.
        trials: largest number of trainings.
        report: called with every `Trial` as it ends, e.g. `print`.

    Returns a `Reach`, also when the target was not reached; `print` shows it. An exception or interruption of `train`
    passes through, with what had been tried as a note.

    Raises ValueError: an argument out of its range, before any training; `train` returns something else.
    """
    for name, value, within, rule in (
        ("density", density, lambda v: 0 < v < 1, "a fraction of weights to keep, 0 < density < 1"),
        ("weight_decay", weight_decay, lambda v: 0 < v < math.inf, "a finite number above 0"),
        ("s_init", s_init, lambda v: -math.inf < v < 0, "a finite number below 0"),
        ("tolerance", tolerance, lambda v: 0 <= v < 1, "a difference in density, 0 <= tolerance < 1"),
        ("trials", trials, lambda v: number(v, Integral) and v >= 1, "a whole number from 1"),
    ):
        if not (M.is_number(value) and within(value)):
            raise ValueError(f"Invalid {name} {value}: give {rule}.")
    result, points, y = Reach(density, tolerance), _points(weight_decay, s_init), None
    while len(result.trials) < trials and not result.found:
        try:
            point = points.send(y)
        except StopIteration:  # both brackets have closed without such a density, or have left all sense
            break
        try:
            trained = train(*point)
        except BaseException as error:  # an interruption as well
            error.add_note(str(result))
            raise
        trial = Trial(*point, _density(trained))
        result.trials.append(trial)
        if result.best is trial:
            result.model = trained
        if report:
            report(trial)
        y = math.log(trial.density / density) if trial.density > 0 else -math.inf  # diverged: λ was too high
    return result


def _density(trained):
    if isinstance(trained, nn.Module):
        weights = [M.effective(layer) for layer in M.prunable(trained).values()]
        if not all(w.isfinite().all() for w in weights):
            return math.nan
        return sum(w.count_nonzero().item() for w in weights) / sum(w.numel() for w in weights)
    try:
        trained = float(trained)
    except (TypeError, ValueError):
        trained = math.inf
    if trained < 0 or trained > 1:
        raise ValueError("Invalid result of train: return the trained model, or its density as a number from 0 to 1.")
    return trained


def _points(weight_decay, s_init):
    """(λ, s_init) to try, one after the other, while they make sense; is sent log(density / target) of each."""
    limit = max(1e3 * weight_decay, 1e4)  # λ · lr beyond 1 has long since set every weight to zero

    def point(x, z=0.0):
        found = weight_decay * math.exp(min(x, 700.0)), s_init * math.exp(min(-z, 700.0))
        sensible = 1e-12 * weight_decay < found[0] <= limit and 1e-3 < -found[1] < math.inf
        return found if sensible or x == z == 0 else None

    try:
        x, y = yield from _line(point, 0.0, None, math.log(1.05))
        yield from _line(lambda z: point(x, z), math.log(2), (0.0, y), 1e-3)
    except _Senseless:
        return


class _Senseless(Exception):
    """A search has left the numbers that a training could use."""


def _line(point, x, low, width):
    """Enclose y = 0 of a falling y(x), then regula falsi (Illinois), until the bracket is narrow; gives its low end."""
    high, step, last = None, math.log(2), None
    while low is None or high is None or high[0] - low[0] > width:
        if (trial := point(x)) is None:
            raise _Senseless
        y = yield trial
        if y > 0:
            low, high = (x, y), high and (high[0], high[1] / 2 if last == "low" else high[1])
            last = "low"
        else:
            high, low = (x, y), low and (low[0], low[1] / 2 if last == "high" else low[1])
            last = "high"
        if low and high:  # the share of the bracket to go: a secant, kept off the ends; a half where nothing was left
            share = min(max(low[1] / (low[1] - high[1]), 0.1), 0.9) if high[1] > -math.inf else 0.5
            x = low[0] + share * (high[0] - low[0])
        else:
            x, step = x + (step if y > 0 else -step), 1.5 * step
    return low
