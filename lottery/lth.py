"""The Lottery Ticket Hypothesis. Frankle & Carbin, ICLR 2019, arXiv 1803.03635v5; late rewinding from 1903.01611.

Iterative magnitude pruning (section 2, "Strategy 1" of appendix B): draw θ₀; train m ⊙ θ for J iterations;
remove the fraction s of the surviving weights with the smallest |θ_J|; reset the survivors to θ₀; repeat.
After r rounds the mask m_r keeps P_m ≈ (1 − s)^r of the weights and m_r ⊙ θ₀ is the ticket of level r.

* One-shot pruning is one round with s = p (section 1).
* Continued training ("Strategy 2") goes on from m ⊙ θ_J between rounds; only the ticket of a level is reset.
* Rewinding to k resets survivors to θ_k and trains the remaining J − k iterations (1903.01611, algorithm 1).

Differs from the authors' code in:
    the count: round_half_even(s·n) of n survivors go, exactly; their code takes one more in every layer;
    the biases: restored with the weights; their code zero-initialises them afresh, which is the same θ₀.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from lottery import masks as M
from lottery.methods import whole

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md


class Level(NamedTuple):
    """One level: the trained network is on the model while the level is being looked at."""

    round: int
    masks: dict[str, torch.Tensor]
    density: float


def prune(
    model: torch.nn.Module,
    rate: float | dict[str, float],
    scope: str = "layer",
    masks: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Magnitude pruning of the survivors: the masks of the next level.

    Args:
        model: scored by |effective weight|, in its current state; left as it is.
        rate: fraction of the surviving weights to remove, 0 <= rate < 1; `{layer: rate}` for layer-wise rates,
            and then only these layers are ranked and counted.
        scope: "layer" ranks every weight tensor by itself (LeNet, Conv), "global" pools them (ResNet, VGG).
        masks: the current masks, of all of the ranked layers or some; default: those on the model. All ones for a
            layer that has none.

    Returns `{layer: BoolTensor}`: of n survivors exactly round_half_even(rate · n) are gone, none has come back. Warns
    of layer collapse, naming the layers.

    Raises ValueError: nothing prunable, a rate out of range or so high that nothing is kept, NaN weights, masks of
    unknown layers or other shapes.
    """
    weights, m = _ranked(model, rate, masks)
    survivors = {name: int(m[name].sum()) for name in m}
    k = kept(survivors, _rates(rate, weights, scope))
    found = M.keep({name: w.abs() for name, w in weights.items()}, k, within=m)
    M.warn_of_collapse({name: m for name, m in found.items() if survivors[name]})  # not of what was empty
    return found


def _ranked(model, rate, masks=None):
    """The weights that are ranked, `{layer: tensor}`, and their masks now."""
    layers = M.chosen(model)
    M.check_values(layers)
    weights = {name: M.effective(layer) for name, layer in layers.items()}
    if masks is not None:
        M.check_masks(masks, weights, "masks", "model", complete=False)
    if isinstance(rate, dict):
        M.check_names(rate, weights, "rate", "model", complete=False)
        weights = {name: w for name, w in weights.items() if name in rate} or weights
    on = M.read(model) if masks is None else masks
    return weights, {name: on.get(name, torch.ones_like(w, dtype=torch.bool)) for name, w in weights.items()}


def _rates(rate, weights, scope):
    """One rate, or one for each layer."""
    rate = M.per_layer(rate, weights, scope, "rate")
    if scope == "global" and isinstance(rate, dict):
        if len(set(rate.values())) > 1:
            raise ValueError(f"Invalid rate {rate} with scope 'global': one ranking removes one share of all layers.")
        return next(iter(rate.values()))
    return rate


def kept(survivors: dict[str, int], rate: float | dict[str, float]) -> int | dict[str, int]:
    """What a round at `rate` leaves of `{layer: survivors}`: of each by its own rate, or of all together."""
    if isinstance(rate, dict):
        return {name: _keep(n, rate[name], f"layer {name!r}") for name, n in survivors.items()}
    return _keep(sum(survivors.values()), rate, "the model")


def _keep(survivors, rate, where):
    if not (M.is_number(rate) and 0 <= rate < 1):
        raise ValueError(f"Invalid rate {rate!r}: give the fraction of surviving weights to remove, 0 <= rate < 1.")
    k = survivors - round(float(rate) * survivors)
    if k < 1 and rate > 0:  # a searched mask may be empty in a layer, and 0 removes nothing of it
        raise ValueError(f"Rate {rate} leaves none of the {survivors} weights of {where}: lower the rate.")
    return k


def check_rounds(
    model: torch.nn.Module, rounds: int, rate: float | dict[str, float] = 0.2, scope: str = "layer"
) -> None:
    """Raise ValueError when some of `rounds` rounds would leave no weight: the counts do not depend on the training."""
    weights, m = _ranked(model, rate)
    rates, left = _rates(rate, weights, scope), {name: int(m[name].sum()) for name in m}
    for r in range(1, max(1, rounds) + 1):
        try:
            k = kept(left, rates)
        except ValueError as error:
            raise error if r == 1 else ValueError(f"Round {r} of {rounds}: {error}") from None
        left = k if isinstance(k, dict) else {"the model": k}


def imp(
    model: torch.nn.Module,
    train: Callable,
    rounds: int,
    rate: float | dict[str, float] = 0.2,
    scope: str = "layer",
    strategy: str = "reset",
    rewind_to: int = 0,
) -> Iterator[Level]:
    """Iterative magnitude pruning, level by level; `rounds=1` is one-shot pruning.

    Args:
        model: initialised to θ₀; trained and masked in place.
        train: `train(model, start, stop)` trains in place from iteration `start` to `stop` (None: to the end J).
        rounds: train–prune cycles; `rounds + 1` levels are yielded, from the dense one.
        rate, scope: as in `prune`.
        strategy: "reset" (Strategy 1) or "continue" (Strategy 2: every level is trained twice, once from θ₀ to be
            looked at and once from the weights before, to be pruned).
        rewind_to: k < J; survivors return to θ_k and train J − k iterations from schedule position k. J is `train`'s
            own: k = J is found out after the first J iterations.

    Yields a `Level` after each level's training, while the trained ticket is on the model.

    Raises ValueError: before any training, as `prune`, and for a number of rounds that would leave no weight.
    """
    if strategy not in ("reset", "continue"):
        raise ValueError(f"Invalid strategy {strategy!r}: give 'reset' or 'continue'.")
    for name, value in (("rounds", rounds), ("rewind_to", rewind_to)):
        whole(name, value, 0)
    check_rounds(model, rounds, rate, scope)  # before hours of training
    M.attach(model)
    if rewind_to:
        train(model, 0, rewind_to)
    theta_k = theta_J = M.state(model)
    for r in range(rounds + 1):
        M.restore(model, theta_k)
        train(model, rewind_to, None)
        m = M.read(model)
        yield Level(r, m, M.density(m))
        if r == rounds:
            return
        if strategy == "continue" and r > 0:
            M.restore(model, theta_J)
            train(model, rewind_to, None)
        theta_J = M.state(model)
        M.attach(model, prune(model, rate, scope))


def from_survivors(
    theta: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """θ with each layer's weights drawn anew, with replacement, from D_m = {θ₀⁽ⁱ⁾ : m⁽ⁱ⁾ = 1} of that layer.

    The control that keeps the distribution of the ticket's initial values and nothing else (figure 17).

    Raises ValueError: a layer that θ has not, or of which no weight is kept.
    """
    weights, drawn = M.weights_of(theta, masks), {}
    M.check_masks(masks, weights, "masks", "state")
    for name, m in masks.items():
        d_m = weights[name][m]
        if not len(d_m):
            raise ValueError(f"Layer collapse: no weight is kept in {name}, so there is nothing to draw from.")
        pick = torch.randint(len(d_m), (m.numel(),), generator=generator).to(d_m.device)
        drawn[M.weight_name(name)] = d_m[pick].view_as(weights[name])
    return {**theta, **drawn}


def add_noise(
    theta: dict[str, torch.Tensor], layers: Iterable[str], c: float, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """θ with N(0, (c σ)²) added to each layer's weights, σ their own standard deviation (figure 25).

    A single weight has no deviation: σ = 0. Raises ValueError: a layer that θ has not.
    """
    noisy = {}
    for name, weight in M.weights_of(theta, layers).items():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
        sigma = weight.std() if weight.numel() > 1 else 0
        noisy[M.weight_name(name)] = weight + c * sigma * noise
    return {**theta, **noisy}


def random_masks(masks: dict[str, torch.Tensor], generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """The random-sparsity control: each layer's mask shuffled, so that its density stays (1903.01611, figure 3)."""
    shuffled = {}
    for name, m in masks.items():
        order = torch.randperm(m.numel(), generator=generator)
        shuffled[name] = m.flatten().cpu()[order].view(m.shape).to(m.device)
    return shuffled


def between(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """(1 − α)·one + α·other of two states of `masks.state`, entry by entry; what holds no floats is one's.

    Raises ValueError: states of different names.
    """
    M.check_names(other, one, "other", "state")
    return {name: torch.lerp(t, other[name], alpha) if t.is_floating_point() else t for name, t in one.items()}


def instability(errors: Sequence[float]) -> float:
    """The highest error on the line between two trained networks minus the mean of its two ends, the first and last.

    Two copies that differ in the order of the data alone are *stable* below 2 points (1912.05671, section 2).

    Raises ValueError: no errors.
    """
    if not len(errors):
        raise ValueError("Invalid errors: give those along the line, its two ends among them.")
    return max(errors) - (errors[0] + errors[-1]) / 2
