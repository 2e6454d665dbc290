"""Baselines: what every chapter compares against. Scores and densities go to `lottery.masks.top_k`.

* Random and magnitude scores; "layer" or "global" scope is top_k's.
* Layer densities: uniform, and ERK (Erdős–Rényi kernel; Mocanu et al. 2018 with the kernel's size added by Evci et
  al., ICML 2020, arXiv 1911.11134): density ∝ Σ(dims) / Π(dims) of the weight tensor, at most 1.
* SNIP (Lee, Ajanthan & Torr, ICLR 2019, arXiv 1810.02340): s_j = |∂L(c ⊙ w)/∂c_j| / Σ_k |∂L/∂c_k| at c = 1, which is
  |w_j g_j| over its sum; the largest are kept. One batch, no temperature.
* SynFlow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467): R = 1ᵀ(Π_l |θ_l|)1, score |θ| ⊙ ∂R/∂|θ|, whose sum is the
  same in every layer; n rounds of scoring the masked network, density ρ^(k/n) after round k (algorithm 1). No data.

Differs from the authors' code in:

* SNIP: the weights given are the weights scored. Their code scores one draw and trains another, counts biases and has
  batch norm in inference mode; another widely used port scores a re-initialised copy. To score GraSP's copy, give
  `grasp.with_xavier_linear(model)`. Only Linear and Conv weights are ranked; the network is in training mode.
* SynFlow: biases, batch norm's shifts and its running means carry no flow (`biases="none"`), as in R; their code takes
  the absolute values of all of them (`biases="absolute"`), which breaks conservation when they are not zero. Exactly
  k weights are kept even if fewer lie on a live path; scores are float64.
"""

from collections.abc import Iterable
from numbers import Integral

import torch
from torch import nn
from torch.nn import functional as F

from lottery import grasp
from lottery import masks as M
from lottery.methods import number, whole

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md


def random_scores(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
    """Uniform random scores, float64 in [0, 1), of the weights' shapes; from torch's random state without generator."""
    return {
        name: torch.rand(w.shape, generator=generator, dtype=torch.float64).to(w.device)
        for name, w in _weights(model).items()
    }


def magnitude_scores(model: nn.Module) -> dict[str, torch.Tensor]:
    """|effective weight| of every Linear and Conv layer, `{layer: tensor}`."""
    return {name: w.abs() for name, w in _weights(model).items()}


def snip_scores(
    model: nn.Module, batches: grasp.Batches, loss: grasp.Loss = F.cross_entropy
) -> dict[str, torch.Tensor]:
    """SNIP's connection sensitivity |w ⊙ g| / Σ|w ⊙ g|: higher = keep, the sum over all layers is 1.

    Args:
        model: scored in training mode as `grasp.scores` does, no weight drawn anew; left as it was (mode, buffers,
            gradients, random state).
        batches: chunks `[(x, y), ...]`, x float [B, ...], y int64 [B]; g is summed over chunks.
        loss: L, `loss(logits, y)`, one number, in the place of the cross-entropy.

    Returns `{layer: tensor}` of the weights' shapes, dtype and device.

    Raises ValueError: nothing prunable, NaN in the batch or one that does not fit the model, a loss that is no number,
    all-zero or non-finite gradients.
    """
    w, g = grasp.summed_gradient(model, batches, loss=loss)
    s = {name: (w[name] * g[name]).abs() for name in w}
    total = sum(v.sum() for v in s.values())
    if not total > 0:
        raise ValueError("All SNIP scores are zero, so no weight ranks above another: are the weights zero?")
    return {name: v / total for name, v in s.items()}


def uniform(model: nn.Module, density: float, layers: Iterable[str] | None = None) -> dict[str, float]:
    """`{layer: density}` with the same density in every layer, for `top_k`; `layers`: names, default all."""
    w = _weights(model, layers)
    M.kept(sum(v.numel() for v in w.values()), density)
    return dict.fromkeys(w, density)


def erk(model: nn.Module, density: float, layers: Iterable[str] | None = None) -> dict[str, float]:
    """ERK densities `{layer: density}` for `top_k`: large layers are sparser, `density` is that of all weights.

    A layer [n_out, n_in, *kernel] gets a density proportional to (n_out + n_in + Σ kernel) / (n_out · n_in · Π kernel);
    one that would exceed 1 is kept whole and the others share the rest. `layers`: names of those that take part,
    default all.

    Raises ValueError: a density out of range, nothing prunable, an unknown layer.
    """
    w = _weights(model, layers)
    n = {name: v.numel() for name, v in w.items()}
    M.kept(sum(n.values()), density)
    density = float(density)
    raw = {name: sum(v.shape) / v.numel() for name, v in w.items()}
    whole = set()
    while rest := w.keys() - whole:
        left = density * sum(n.values()) - sum(n[name] for name in whole)
        eps = left / sum(raw[name] * n[name] for name in rest)
        over = {name for name in rest if eps * raw[name] > 1}
        if not over:
            break
        whole |= over
    return {name: 1.0 if name in whole else eps * raw[name] for name in w}


def synflow(
    model: nn.Module,
    input_shape: tuple[int, ...],
    density: float,
    rounds: int = 100,
    biases: str = "none",
    layers: Iterable[str] | None = None,
) -> dict[str, torch.Tensor]:
    """SynFlow's masks after `rounds` rounds of scoring and pruning, on an exponential schedule.

    Args:
        model: scored on a float64 copy with absolute weights and batch norm in inference mode; left as it was.
            Weights that masks on the model have removed stay removed.
        input_shape: (C, H, W), or the shape of whatever one input is; the input is all ones.
        density: fraction of all Linear and Conv weights to keep, 0 < density <= 1.
        rounds: n >= 1; after round k a fraction density^(k/n) is left.
        biases: "none" or "absolute", see above.
        layers: names of the layers that are ranked and counted; default all. The others let all flow through.

    Returns `{layer: BoolTensor}`, exactly k kept over all layers. Warns of layer collapse, naming the layers.

    Raises ValueError: nothing prunable, a bad density, rounds, biases or input_shape, no flow from input to output, a
    network that is not linear for positive inputs (ReLU6 and Hardtanh count as the ReLU that they clip).
    """
    if not (isinstance(input_shape, tuple | list) and all(number(n, Integral) and n > 0 for n in input_shape)):
        raise ValueError(f"Invalid input_shape {input_shape!r}: give that of one input, such as (1, 28, 28).")
    whole("rounds", rounds)
    if biases not in ("none", "absolute"):
        raise ValueError(f"Invalid biases {biases!r}: give 'none' or 'absolute'.")
    on, names = M.read(model), list(M.chosen(model, layers))
    R, every = _flow(model, input_shape, biases)
    w = {name: every[name] for name in names}
    masks = {name: on.get(name, torch.ones_like(v, dtype=torch.bool)) for name, v in w.items()}
    n = sum(v.numel() for v in w.values())
    M.kept(n, density)
    density, start = float(density), M.density(masks)
    for k in range(1, rounds + 1):
        g = torch.autograd.grad(R(), list(w.values()), materialize_grads=True)
        score = {name: v.detach() * d for (name, v), d in zip(w.items(), g, strict=True)}
        if not any(v.any() for v in score.values()) or not all(v.isfinite().all() for v in score.values()):
            raise ValueError(f"No finite flow from input to output in round {k}: a layer is cut off or overflows.")
        masks = M.top_k(score, density if k == rounds else start * (density / start) ** (k / rounds), within=masks)
        for name, v in w.items():
            v.data.mul_(masks[name])
    M.warn_of_collapse(masks)
    return masks


def _flow(model, input_shape, biases):
    """R as a function of nothing, and the absolute weights `{layer: tensor}` that it depends on."""
    net = grasp.scored_copy(model)[0].double().eval()
    state = M.state(net)
    for name, tensor in state.items():
        tensor.abs_()
        if biases == "none" and name.endswith(("bias", "bias_orig", "running_mean")):  # torch.nn.utils.prune's
            tensor.zero_()
    M.restore(net, state)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardtanh) and child.min_val <= 0:
                setattr(module, name, nn.ReLU())
    w = {name: layer.weight for name, layer in M.prunable(net).items()}
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=next(iter(w.values())).device)

    @torch.enable_grad()
    def R(scale=1):
        return grasp.outputs(net, scale * ones).sum()

    _check_linear(net, R, affine=biases == "absolute")
    return R, w


@torch.no_grad()
def _check_linear(net, R, affine):
    """Raise ValueError unless R(x) is proportional to positive x, with biases up to a constant."""
    one, two, three = R(1), R(2), R(3)
    differs = three - 2 * two + one if affine else two - 2 * one
    if differs.abs() > 1e-6 * two.abs():  # False where something overflows, which is another error
        names = {type(m).__name__ for m in net.modules() if type(m).__module__ == nn.ReLU.__module__}
        at = f"; look at {', '.join(sorted(names - {'ReLU'}))}" if names - {"ReLU"} else ""
        raise ValueError(f"SynFlow needs a network that is linear for positive inputs, with ReLU and the like{at}.")


def _weights(model, layers=None):
    found = M.chosen(model, layers)
    M.check_values(found)
    return {name: M.effective(layer) for name, layer in found.items()}
