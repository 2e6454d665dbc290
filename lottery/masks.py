"""The vocabulary that every pruning method shares: prunable layers, top-k, and masks on a model.

A mask is a boolean tensor of the weight's shape, True where the weight is kept; masks travel as
`{layer name: BoolTensor}` in module order. On the model a mask is a parametrization w ↦ m ⊙ w
(`torch.nn.utils.parametrize`): `module.weight` is the effective weight, the trainable tensor behind it
keeps its value where the mask is zero and receives no gradient there.
"""

import copy
import re

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Mask(nn.Module):
    """The parametrization w ↦ m ⊙ w. The mask is a buffer in the weight's dtype: no cast in the training step."""

    def __init__(self, mask, like):
        super().__init__()
        self.register_buffer("mask", mask.to(like))

    def forward(self, weight):
        return weight * self.mask

    def right_inverse(self, weight):
        return weight


def prunable(model):
    """Weights that can be pruned: `{layer name: module}` of Linear and Conv layers, in module order.

    A module or weight tensor that several names share is listed once, under its first name.
    """
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and (weight := original(module)) is not None and id(weight) not in seen:
            seen.add(id(weight))
            found[name] = module
    return found


def unprunable(model):
    """Names of the matrix-shaped parameters that `prunable` does not reach (for example `in_proj_weight`)."""
    reached = {id(original(module)) for module in prunable(model).values()}
    return [name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in reached]


def top_k(scores, density, scope="global", within=None):
    """Masks that keep the highest scores: exactly k = n − round_half_even((1 − density)·n) weights.

    Args:
        scores: `{layer: tensor}`, any float dtype, higher = keep. ±inf are ordinary scores.
        density: fraction of all n weights in `scores` to keep, 0 < density <= 1; with `scope="layer"` n is
            the layer's own count, and `{layer: float}` gives each layer its own density.
        scope: "global" ranks all layers together, "layer" each layer by itself.
        within: masks; only their kept weights are candidates, so that nothing pruned comes back.

    Returns masks of the scores' shapes. Among equal scores the earlier weight (module order, then row-major)
    is kept.

    Raises ValueError: NaN scores, a density out of range, k = 0, or fewer than k candidates.
    """
    if not scores:
        raise ValueError("Nothing to prune: no scores were given; see lottery.masks.prunable(model).")
    density = per_layer(density, scores, scope, "density")
    n = {name: score.numel() for name, score in scores.items()}
    if not isinstance(density, dict):
        return keep(scores, kept(sum(n.values()), density), within)
    return keep(scores, {name: kept(n[name], density[name], f"layer {name!r}") for name in scores}, within)


def kept(n, density, where="the model"):
    """k = n − round_half_even((1 − density)·n), the number of weights that `density` keeps of n."""
    if not 0 < density <= 1:
        raise ValueError(f"Invalid density {density}: give a fraction of weights to keep, 0 < density <= 1.")
    k = n - round((1 - density) * n)
    if k < 1:
        raise ValueError(f"Density {density} keeps none of the {n} weights of {where}: use at least {1 / n:.2g}.")
    return k


def keep(scores, k, within=None):
    """Masks of the k highest scores over all layers, or of the k[layer] highest of each; see `top_k`."""
    for name, score in scores.items():
        if torch.isnan(score).any():
            raise ValueError(f"NaN scores in layer {name!r}: check the weights and the batch that were scored.")
    if within is not None:
        check_names(within, scores, "within", "scores")
    if isinstance(k, dict):
        return {name: _largest([score], k[name], within and [within[name]])[0] for name, score in scores.items()}
    return dict(zip(scores, _largest(scores.values(), k, within and [within[n] for n in scores]), strict=True))


def _largest(scores, k, within):
    """Boolean masks of the k largest of all `scores`; a stable sort, so that ties go to the earlier entry."""
    flat = torch.cat([score.detach().flatten() for score in scores])
    order = torch.sort(flat, descending=True, stable=True).indices
    if within:
        allowed = torch.cat([mask.flatten() for mask in within]).to(flat.device, torch.bool)
        order = order[allowed[order]]
        if len(order) < k:
            raise ValueError(f"Cannot keep {k} weights: only {len(order)} are not pruned yet; lower the density.")
    chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, order[:k], True)
    parts = chosen.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def per_layer(value, layers, scope, what):
    """A density or rate as one number for all layers ("global") or as `{layer: number}` ("layer")."""
    if scope not in ("global", "layer"):
        raise ValueError(f"Invalid scope {scope!r}: give 'global' or 'layer'.")
    if isinstance(value, dict):
        check_names(value, layers, what, "model")
        return value
    return value if scope == "global" else dict.fromkeys(layers, value)


def attach(model, masks=None):
    """Put masks on the model, in place; the first call adds the parametrization, later ones copy into it.

    An optimiser built before stays valid. `masks=None` attaches all-ones masks to every prunable layer that
    has none; a layer that `masks` does not name is left as it is.

    Raises ValueError: a name that is no prunable layer, a mask that is not boolean or not of the weight's shape.
    """
    layers = prunable(model)
    if not layers:
        raise ValueError("Nothing prunable: the model has no Linear or Conv layer.")
    if masks is None:
        masks = {
            name: torch.ones_like(original(module), dtype=torch.bool)
            for name, module in layers.items()
            if not mask_of(module)
        }
    check_names(masks, layers, "masks", "model", complete=False)
    for name, mask in masks.items():
        shape = layers[name].weight.shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"Invalid mask for layer {name!r}: {mask.dtype} of shape {tuple(mask.shape)}, "
                f"needs torch.bool of shape {tuple(shape)}."
            )
    for name, mask in masks.items():
        if carried := on(layers[name], Mask):
            carried.mask.copy_(mask)
        else:
            put(model, layers[name], Mask(mask, like=layers[name].weight))
    return model


def put(model: nn.Module, layer: nn.Module, parametrization: nn.Module) -> None:
    """Put a parametrization on a layer's weight, in place: on every module that shares it, so that they stay tied.

    It acts after those that are there already; an optimiser holds what it trains only if it is built afterwards.
    """
    weight = original(layer)
    for module in list(model.modules()):
        if original(module) is weight:
            parametrize.register_parametrization(module, "weight", parametrization)


def on(layer: nn.Module, kind: type) -> nn.Module | None:
    """The parametrization of a class on a layer's weight, the first if there are several; None where there is none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    return next((p for p in layer.parametrizations.weight if isinstance(p, kind)), None)


def read(model):
    """The masks on the model, as boolean copies: `{layer: BoolTensor}` for the layers that carry one."""
    return {name: p.mask.bool() for name, module in prunable(model).items() if (p := mask_of(module))}


def bake(model):
    """Turn the effective weights into plain parameters, in place: a model without masks, with the zeros in it."""
    layers = [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]
    effective = [module.weight.detach().clone() for module in layers]
    for module, weight in zip(layers, effective, strict=True):
        # PyTorch takes the property off a class that a deep copy of the module shares: give this one its own.
        cls = type(module)
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        with torch.no_grad():
            module.weight.copy_(weight)
    return model


def density(masks_or_model):
    """Fraction of weights kept, in (0, 1]: of all entries of the masks, or of all prunable weights of the model.

    In a model, a layer counts its mask where it carries one and its non-zero weights where it does not.
    """
    if isinstance(masks_or_model, nn.Module):
        layers = prunable(masks_or_model).values()
        masks = [p.mask if (p := mask_of(module)) else module.weight.detach() for module in layers]
    else:
        masks = list(masks_or_model.values())
    total = sum(mask.numel() for mask in masks)
    if not total:
        raise ValueError("No density: there is no prunable weight.")
    return sum(int(mask.count_nonzero()) for mask in masks) / total


def state(model):
    """Copies of all parameters and buffers under canonical names: `fc1.weight`, with or without masks on.

    The weight is the tensor behind the mask, so that θ₀ read once serves every mask. Masks are not part of it:
    see `read`.
    """
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


@torch.no_grad()
def restore(model, state):
    """Copy a `state` back into the model, in place: reset, rewind, random reinitialisation, checkpoint.

    (`init.xavier_normal_(m.weight)` or `m.weight.copy_()` would write to a temporary and change nothing.)

    Raises ValueError: a name or shape that differs.
    """
    own = tensors(model)
    check_names(state, own, "state", "model")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"Cannot restore {name!r}: shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}."
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return model


def tensors(model):
    """Live parameters and buffers by canonical name, without the masks.

    `fc1.parametrizations.weight.original` is `fc1.weight`; a parametrization's own tensor, `….weight.0.s`, is
    `fc1.weight.s` wherever in the chain it stands.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    owned = {id(b) for m in model.modules() if isinstance(m, Mask) for b in m.buffers()}
    canonical = {re.sub(r"parametrizations\.(\w+)\.(?:original$|\d+(\.))", r"\1\2", name): t for name, t in named}
    return {name: tensor for name, tensor in canonical.items() if id(tensor) not in owned}


def original(module):
    """The trainable tensor behind a module's `weight`, or None (weight_norm, for one, has several)."""
    if parametrize.is_parametrized(module, "weight"):
        return getattr(module.parametrizations.weight, "original", None)
    return getattr(module, "weight", None)


def unwrapped(model: nn.Module, memo: dict | None = None) -> nn.Module:
    """A deep copy under the same names in which nothing is compiled or distributed: those cannot go backward twice.

    memo: of `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    for module in reversed(list(model.modules())):  # the inner ones first
        name = "module" if isinstance(module, DataParallel | DistributedDataParallel) else "_orig_mod"  # compile's
        if name in module._modules:
            memo[id(module)] = _Inside(name, copy.deepcopy(module._modules[name], memo))
    return copy.deepcopy(model, memo)


class _Inside(nn.Module):
    """What a wrapper wraps, under the wrapper's name for it."""

    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)

    def forward(self, *args, **kwargs):
        [module] = self.children()
        return module(*args, **kwargs)


def mask_of(module):
    """The Mask on a layer's weight, or None."""
    return on(module, Mask)


def check_names(given, known, what, whole, complete=True):
    """Raise ValueError when `given` (called `what`) names something that `known` (of the `whole`) has not.

    With `complete` also when it leaves something out.
    """
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"Unknown names in {what}: {', '.join(unknown)}; the {whole} has {', '.join(known)}.")
    if complete and (missing := [name for name in known if name not in given]):
        raise ValueError(f"Names missing in {what}: {', '.join(missing)}, which the {whole} has.")
