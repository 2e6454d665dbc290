"""The vocabulary that every pruning method shares: prunable layers, top-k, and masks on a model.

A mask is a boolean tensor of the weight's shape, True where the weight is kept; masks travel as
`{layer name: BoolTensor}` in module order. On the model a mask is a parametrization w ↦ m ⊙ w
(`torch.nn.utils.parametrize`): `module.weight` is the effective weight, the trainable tensor behind it
keeps its value where the mask is zero and receives no gradient there.
"""

import copy
import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Parametrization(nn.Module):
    """What is put on a weight and computes with `numbers` that are no tensors: a state dict carries these as well.

    There they are one tensor `_extra_state`, the bytes of JSON, so that every file format of tensors takes it; loading
    sets them, so that a model has the forward of the one that was saved, whatever it was attached with.
    """

    numbers: tuple[str, ...] = ()

    def get_extra_state(self) -> torch.Tensor:
        """The numbers as a uint8 tensor."""
        said = json.dumps({name: getattr(self, name) for name in self.numbers})
        return torch.tensor(list(said.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over the numbers of another one, and nothing else that a file may name."""
        given = json.loads(bytes(state.tolist()))
        self.__dict__.update({name: given[name] for name in self.numbers if name in given})


class Mask(nn.Module):
    """The parametrization w ↦ m ⊙ w. The mask is a buffer in the weight's dtype: no cast in the training step."""

    prunes = True  # what a parametrization says that decides which weights are zero; a weight carries one such

    def __init__(self, mask: torch.Tensor, like: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask.to(like))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Weights that can be pruned: `{layer name: module}` of Linear and Conv layers, in module order.

    A module or weight tensor that several names share is listed once, under its first name. Not listed are a weight
    that is made of other tensors before each forward pass (`weight_norm`; `spectral_norm`, as a hook) and one without
    entries, such as that of `nn.Linear(0, 5)`.

    Raises ValueError: what is no module, a layer that is pruned by `torch.nn.utils.prune`, a lazy one that has no
    weight yet, or one whose weight is another parameter as well, which a mask would not reach.
    """
    check_module(model)
    for name, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        if any(isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight" for hook in hooks):
            raise ValueError(
                f"Layer {name!r} is pruned by torch.nn.utils.prune: call torch.nn.utils.prune.remove(layer, 'weight') "
                "first, which leaves its zeros."
            )
        if isinstance(module, PRUNABLE) and is_lazy(original(module)):
            raise ValueError(f"Layer {name!r} is lazy and has no weight yet: run the model on a batch first.")
    found = _layers(model)
    weights = {id(original(layer)): name for name, layer in found.items()}
    for where, module in model.named_modules():
        for name, p in module._parameters.items():
            if id(p) in weights and name != "weight" and not isinstance(module, parametrize.ParametrizationList):
                raise ValueError(
                    f"Layer {weights[id(p)]!r} shares its weight with the parameter {f'{where}.{name}'.lstrip('.')!r}, "
                    "which a mask would not reach: use the layer's own `weight` in its place."
                )
    return found


def chosen(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The layers of `prunable` that a method works on: those that are named, in that order; None: all.

    Raises ValueError: there is none, an unknown name.
    """
    if not (found := prunable(model)):
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
        made = [name for name, layer in layers.items() if original(layer) is None]
        why = f"the weights of {', '.join(layers)} are empty" if layers else "the model has no Linear or Conv layer"
        if made:
            why = f"the weight of {', '.join(made)} is made of other tensors"
        elif any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            why = "the layers of the model are scripted; prune it before"
        raise ValueError(f"Nothing prunable: {why}.")
    if layers is None:
        return found
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"Invalid layers {layers!r}: give a list of names, or None for all layers.")
    if not (names := list(layers)):
        raise ValueError("Nothing prunable: `layers` is empty; name some, or give None for all layers.")
    check_names(names, found, "layers", "model", complete=False)
    return {name: found[name] for name in names}


def _layers(model):
    check_module(model)
    found, seen = {}, set()
    for name, module in model.named_modules():
        weight = original(module) if isinstance(module, PRUNABLE) else None
        if weight is not None and id(weight) not in seen and (is_lazy(weight) or weight.numel()):
            seen.add(id(weight))
            found[name] = module
    return found


def masked(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that carry a mask: `{layer name: module}`, named and in order as in `prunable`."""
    return {name: module for name, module in _layers(model).items() if mask_of(module)}


def unprunable(model: nn.Module) -> list[str]:
    """Names of the matrix-shaped parameters that `prunable` does not reach (for example `in_proj_weight`)."""
    reached = {id(original(module)) for module in prunable(model).values()}
    return [name for name, p in model.named_parameters() if p.dim() > 1 and p.numel() and id(p) not in reached]


def top_k(
    scores: dict[str, torch.Tensor],
    density: float | dict[str, float],
    scope: str = "global",
    within: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Masks that keep the highest scores: exactly k = n − round_half_even((1 − density)·n) weights.

    Args:
        scores: `{layer: tensor}`, any float dtype, higher = keep. ±inf are ordinary scores.
        density: fraction of all n weights in `scores` to keep, 0 < density <= 1; with `scope="layer"` n is
            the layer's own count, and `{layer: float}` gives each layer its own density.
        scope: "global" ranks all layers together, "layer" each layer by itself.
        within: masks; only their kept weights are candidates, so that nothing pruned comes back.

    Returns masks of the scores' shapes. Among equal scores the earlier weight (module order, then row-major)
    is kept.

    Raises ValueError: scores that are no real numbers or NaN, a density out of range, k = 0, or fewer than k
    candidates.
    """
    if not isinstance(scores, Mapping):
        raise ValueError(f"Invalid scores, a {type(scores).__name__}: give {{layer name: tensor}}.")
    for name, score in scores.items():
        if not _is_dense(score) or score.is_complex():
            raise ValueError(f"Invalid scores of layer {name!r}: give a dense tensor of real numbers.")
    if not scores:
        raise ValueError("Nothing to prune: no scores were given; see lottery.masks.prunable(model).")
    density = per_layer(density, scores, scope, "density")
    n = {name: score.numel() for name, score in scores.items()}
    if not isinstance(density, dict):
        return keep(scores, kept(sum(n.values()), density), within)
    return keep(scores, {name: kept(n[name], density[name], f"layer {name!r}") for name in scores}, within)


def kept(n: int, density: float, where: str = "the model") -> int:
    """k = n − round_half_even((1 − density)·n), the number of weights that `density` keeps of n.

    Raises ValueError: a density out of range, k = 0.
    """
    if not (is_number(density) and 0 < density <= 1):
        raise ValueError(f"Invalid density {density!r}: give a fraction of weights to keep, 0 < density <= 1.")
    if not n:
        raise ValueError(f"Nothing to prune: {where} has no weights.")
    density = float(density)
    k = n - round((1 - density) * n)
    if k < 1:
        raise ValueError(f"Density {density} keeps none of the {n} weights of {where}: use at least {1 / n:.2g}.")
    return k


def keep(
    scores: dict[str, torch.Tensor], k: int | dict[str, int], within: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Masks of the k highest scores over all layers, or of the k[layer] highest of each; see `top_k`."""
    for name, score in scores.items():
        if score.is_meta:
            raise ValueError(f"Scores of layer {name!r} are on the meta device and have no values.")
        if torch.isnan(score).any():
            raise ValueError(f"NaN scores in layer {name!r}: check the weights and the batch that were scored.")
    if within is not None:
        check_masks(within, scores, "within", "scores")
    if isinstance(k, dict):
        return {name: _largest([score], k[name], within and [within[name]])[0] for name, score in scores.items()}
    return dict(zip(scores, _largest(scores.values(), k, within and [within[n] for n in scores]), strict=True))


def _is_dense(value):
    """Whether a value is a tensor whose entries can be read and written one by one."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized


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


def per_layer(
    value: float | dict[str, float], layers: Collection[str], scope: str, what: str
) -> float | dict[str, float]:
    """A density or rate as one number for all layers ("global") or as `{layer: number}` ("layer")."""
    if scope not in ("global", "layer"):
        raise ValueError(f"Invalid scope {scope!r}: give 'global' or 'layer'.")
    if isinstance(value, dict):
        check_names(value, layers, what, "model")
        return value
    return value if scope == "global" else dict.fromkeys(layers, value)


@torch.no_grad()
def attach(model: nn.Module, masks: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """Put masks on the model, in place; the first call adds the parametrization, later ones copy into it.

    An optimiser built before stays valid. `masks=None` attaches all-ones masks to every prunable layer that
    has none; a layer that `masks` does not name is left as it is.

    Raises ValueError: a name that is no prunable layer, a mask that is not boolean or not of the weight's shape, a
    layer that another method prunes already, a model on the meta device.
    """
    layers = chosen(model)
    if masks is None:
        masks = {
            name: torch.ones_like(original(module), dtype=torch.bool)
            for name, module in layers.items()
            if not mask_of(module)
        }
    check_masks(masks, {name: original(layer) for name, layer in layers.items()}, "masks", "model", complete=False)
    check_free({name: layers[name] for name in masks if not mask_of(layers[name])}, Mask)
    for name, mask in masks.items():
        if carried := on(layers[name], Mask):
            carried.mask.copy_(mask)
        else:
            put(model, layers[name], Mask(mask, like=layers[name].weight))
    return model


@torch.no_grad()  # a profiler's thread holds a frame, with all in it, for a moment: PyTorch's keeps the new weight
def put(model: nn.Module, layer: nn.Module, parametrization: nn.Module) -> None:
    """Put a parametrization on a layer's weight, in place: on every module that shares it, so that they stay tied.

    It acts after those that are there already; an optimiser holds what it trains only if it is built afterwards.

    Raises ValueError: a layer on the meta device, inference mode.
    """
    check_values({"weight": layer})
    check_gradients(layer)
    weight = original(layer)
    for module in list(model.modules()):
        if original(module) is weight:
            if parametrize.is_parametrized(module) and chain_of(module) is None:
                _own_class(module)
            parametrize.register_parametrization(module, "weight", parametrization)


def _own_class(module):
    """Give a parametrised module a class of its own.

    PyTorch puts the weight's property on the class, and takes it off there; a deep copy of the module shares it.
    """
    cls = type(module)
    module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))


def on(layer: nn.Module, kind: type) -> nn.Module | None:
    """The parametrization of a class on a layer's weight, the first if there are several; None where there is none."""
    return next((p for p in chain_of(layer) or () if isinstance(p, kind)), None)


def chain_of(module: nn.Module) -> nn.ModuleList | None:
    """What is on a module's own weight, in its order, or None: a wrapper may hand on what it has not itself."""
    if "parametrizations" not in module._modules or "weight" not in module._modules["parametrizations"]:
        return None
    return module._modules["parametrizations"]["weight"]


def check_free(layers: dict[str, nn.Module], kind: type, above: tuple[type, ...] = ()) -> None:
    """Raise ValueError unless a parametrization of this class can go on each layer's weight, or is there already.

    Two that prune would each see its own zeros only, but for those that it may stand above. A weight on the meta device
    loses what is put on it.
    """
    check_values(layers)
    for name, layer in layers.items():
        chain = chain_of(layer) or ()
        others = [type(p).__name__ for p in chain if getattr(p, "prunes", False) and type(p) not in (kind, *above)]
        if others:
            raise ValueError(
                f"Layer {name!r} is pruned by a {others[0]} already: call lottery.masks.bake(model) first."
            )


def check_module(model: Any) -> None:
    """Raise ValueError for what is no module, such as its class or its state."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"Invalid model of type {type(model).__name__}: give a torch.nn.Module, not its class or state."
        )


def check_values(layers: dict[str, nn.Module]) -> None:
    """Raise ValueError for a layer on the meta device: what is computed or kept of it would be lost."""
    for name, layer in layers.items():
        if original(layer).is_meta:
            raise ValueError(f"Layer {name!r} is on the meta device and has no values: materialise the model first.")


def check_gradients(model: nn.Module) -> None:
    """Raise ValueError where autograd sees nothing: within `torch.inference_mode`, or of parameters made there."""
    if torch.is_inference_mode_enabled():
        raise ValueError("Nothing is trained, scored or attached within torch.inference_mode: call this outside of it.")
    if made := [name for name, p in model.named_parameters() if not is_lazy(p) and p.is_inference()]:
        raise ValueError(
            f"Invalid model: {made[0]!r} was made within torch.inference_mode; make the model outside of it."
        )


def check_real(layers: dict[str, nn.Module]) -> None:
    """Raise ValueError for a layer of complex weights: they have magnitudes, and no order or gate of their own."""
    for name, layer in layers.items():
        if original(layer).is_complex():
            raise ValueError(f"Layer {name!r} has complex weights, which only magnitudes can rank: leave it out.")


def read(model: nn.Module) -> dict[str, torch.Tensor]:
    """The masks on the model, as boolean copies: `{layer: BoolTensor}` for the layers that carry one."""
    return {name: mask_of(module).mask.bool() for name, module in masked(model).items()}


def remaining(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are left, `{layer: BoolTensor}` of every prunable layer.

    The ones of its mask where nothing but masks prunes a layer (a kept weight counts, also one that happens to be
    zero), else its effective weights that are not zero: thresholds, hard gates, baked models.

    Raises ValueError: NaN or infinity among effective weights that are to be counted; a model on the meta device.
    """
    layers = prunable(model)
    check_values(layers)
    return {name: _left(name, layer) for name, layer in layers.items()}


def _left(name, module):
    chain = chain_of(module) or ()
    masks = [p.mask != 0 for p in chain if isinstance(p, Mask)]
    if masks and not any(getattr(p, "prunes", True) for p in chain if not isinstance(p, Mask)):
        return torch.stack(masks).all(0)
    weight = effective(module)
    if not weight.isfinite().all():
        raise ValueError(f"NaN or infinity in the weights of layer {name!r}: the training diverged.")
    return torch.stack([weight != 0, *masks]).all(0)


def bake(model: nn.Module, foreign: bool = True) -> nn.Module:
    """Turn the effective weights into plain parameters, in place: a model without masks, with the zeros in it.

    foreign: False leaves weights as they are on which there is nothing of this package, such as a `spectral_norm`. A
    weight that is made of several tensors (weight_norm) stays as it is: it has no mask.
    """

    def bakes(module):
        chain = chain_of(module)
        return chain is not None and (foreign or any(hasattr(p, "prunes") for p in chain))

    layers = [module for module in model.modules() if bakes(module) and original(module) is not None]
    effective = [module.weight.detach().clone() for module in layers]
    for module, weight in zip(layers, effective, strict=True):
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        with torch.no_grad():
            module.weight.copy_(weight)
    return model


def density(masks_or_model: dict[str, torch.Tensor] | nn.Module) -> float:
    """Fraction of weights kept, in [0, 1]: of all entries of the masks, or of all prunable weights of the model.

    In a model these are the weights that `remaining` names. Raises ValueError: no weight at all, masks that are none,
    and as there.
    """
    masks = remaining(masks_or_model) if isinstance(masks_or_model, nn.Module) else masks_or_model
    check_masks(masks, masks, "masks", "model")
    masks = list(masks.values())
    total = sum(mask.numel() for mask in masks)
    if not total:
        raise ValueError("No density: there is no prunable weight.")
    return sum(int(mask.count_nonzero()) for mask in masks) / total


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers under canonical names: `fc1.weight`, with or without masks on.

    The weight is the tensor behind the mask, so that θ₀ read once serves every mask. Masks are not part of it: see
    `read`. Nor are a parametrization's numbers that are no tensors, such as Continuous Sparsification's factor c; they
    are in a state dict.
    """
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """Copy a `state` back into the model, in place: reset, rewind, random reinitialisation, checkpoint.

    (`init.xavier_normal_(m.weight)` or `m.weight.copy_()` would write to a temporary and change nothing.)

    Raises ValueError, before anything changes: a name or shape that differs; what is no dense tensor, or of numbers
    that the model's cannot hold, such as complex ones; a model or state on the meta device, which has no values.
    """
    own = tensors(model)
    check_names(state, own, "state", "model")
    for name, tensor in own.items():
        if not _is_dense(state[name]):
            raise ValueError(f"Cannot restore {name!r}: the state holds no dense tensor, as `state` gives it.")
        if not torch.can_cast(state[name].dtype, tensor.dtype):
            raise ValueError(f"Cannot restore {name!r}: {state[name].dtype}, the model's is {tensor.dtype}.")
        if tensor.is_meta or state[name].is_meta:
            raise ValueError(f"Cannot restore {name!r} on the meta device: materialise the model first.")
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"Cannot restore {name!r}: shape {tuple(state[name].shape)}, the model's is {tuple(tensor.shape)}."
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Live parameters and buffers by canonical name, without the masks.

    `fc1.parametrizations.weight.original` is `fc1.weight`; a parametrization's own tensor, `….weight.0.s`, is
    `fc1.weight.s` wherever in the chain it stands, and `fc1.weight.0.s` where several have an s. A weight that is
    shared with other modules is called after the layer that `prunable` lists, as its mask is.
    """
    names = {id(original(layer)): weight_name(name) for name, layer in _layers(model).items()}
    owned = {id(b) for m in model.modules() if isinstance(m, Mask) for b in m.buffers()}
    named = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if id(t) not in owned}
    short = {name: names.get(id(t)) or canonical(name) for name, t in named.items()}
    times = Counter(short.values())
    once = {name: s if times[s] == 1 else name.replace("parametrizations.", "") for name, s in short.items()}
    return {once[name]: t for name, t in named.items()}


def canonical(name: str) -> str:
    """The name of a parameter or buffer without parametrizations, as in `tensors`."""
    return re.sub(r"parametrizations\.(\w+)\.(?:original$|\d+(\.))", r"\1\2", name)


def weight_name(layer: str) -> str:
    """What `state` calls the weight of a layer; the layer of a model that is one itself is called ''."""
    return f"{layer}.weight" if layer else "weight"


def weights_of(theta: dict[str, torch.Tensor], layers: Collection[str]) -> dict[str, torch.Tensor]:
    """The weights of some layers in a state: `{layer: tensor}`. Raises ValueError for a layer that it has not."""
    known = {name.removesuffix("weight").removesuffix("."): t for name, t in theta.items() if name.endswith("weight")}
    check_names(layers, known, "layers", "state", complete=False)
    return {name: known[name] for name in layers}


def original(module: nn.Module) -> torch.Tensor | None:
    """The trainable tensor behind a module's `weight`, or None.

    weight_norm has several, some hooks make it anew, and a scripted module's cannot be parametrised.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if (chain := chain_of(module)) is not None:
        return getattr(chain, "original", None)
    return module._parameters.get("weight", module._buffers.get("weight"))


def effective(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer computes with in evaluation, detached. (Read in training mode a spectral norm moves.)"""
    chain = chain_of(layer) or []
    modes = [p.training for p in chain]
    try:
        for p in chain:
            p.training = False
        return layer.weight.detach()
    finally:
        for p, mode in zip(chain, modes, strict=True):
            p.training = mode


def unwrapped(model: nn.Module, memo: dict | None = None) -> nn.Module:
    """A deep copy under the same names in which nothing is compiled or distributed: those cannot go backward twice.

    memo: of `copy.deepcopy`.
    """
    memo = {} if memo is None else memo
    for module in model.modules():  # what a hook makes of parameters it makes again
        made = [t for t in vars(module).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
        memo.update({id(t): t.detach().clone() for t in made})
    for module in reversed(list(model.modules())):  # the inner ones first
        name = "module" if isinstance(module, DataParallel | DistributedDataParallel) else "_orig_mod"  # compile's
        if name in module._modules:
            memo[id(module)] = _Inside(name, copy.deepcopy(module._modules[name], memo))
        elif hasattr(module, "__deepcopy__") and not hasattr(type(module), "__deepcopy__"):
            # A wrapper hands this on to a parametrised layer, whose class has it, and a copy would be of that alone.
            memo[id(module)] = new = type(module).__new__(type(module))
            new.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copy.deepcopy(model, memo)


class _Inside(nn.Module):
    """What a wrapper wraps, under the wrapper's name for it and in its mode."""

    def __init__(self, name, module):
        super().__init__()
        self.training = module.training
        self.add_module(name, module)

    def forward(self, *args, **kwargs):
        [module] = self.children()
        return module(*args, **kwargs)


def mask_of(module: nn.Module) -> Mask | None:
    """The Mask on a layer's weight, or None."""
    return on(module, Mask)


def check_names(given: Iterable[str], known: Iterable[str], what: str, whole: str, complete: bool = True) -> None:
    """Raise ValueError when `given` (called `what`) names something that `known` (of the `whole`) has not.

    With `complete` also when it leaves something out.
    """
    if unknown := [name for name in given if name not in known]:
        names = ", ".join(map(str, unknown))
        raise ValueError(f"Unknown names in {what}: {names}; the {whole} has {', '.join(known)}.")
    if complete and (missing := [name for name in known if name not in given]):
        raise ValueError(f"Names missing in {what}: {', '.join(missing)}, which the {whole} has.")


def check_masks(
    masks: Mapping[str, Any], like: dict[str, torch.Tensor], what: str, whole: str, complete: bool = True
) -> None:
    """`check_names`, and a ValueError for a mask that is not boolean or not of the shape of the tensor `like[name]`."""
    if not isinstance(masks, Mapping):
        raise ValueError(f"Invalid {what}, a {type(masks).__name__}: give {{layer name: mask}}.")
    check_names(masks, like, what, whole, complete)
    for name, mask in masks.items():
        dtype, shape, needed = getattr(mask, "dtype", type(mask)), tuple(getattr(mask, "shape", ())), like[name].shape
        if dtype != torch.bool or shape != needed:
            raise ValueError(
                f"Invalid mask for layer {name!r}: {dtype} of shape {shape}, needs torch.bool of shape {tuple(needed)}."
            )


def is_number(value: Any) -> bool:
    """Whether a value is one real number, also as a tensor, and no boolean."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype not in (torch.bool, torch.complex64, torch.complex128)
    return isinstance(value, Real) and not isinstance(value, bool)


def warn_of_collapse(masks: dict[str, torch.Tensor]) -> None:
    """Warn (UserWarning) of layer collapse: layers of which no weight is kept, by name."""
    if dead := [name for name, m in masks.items() if not m.any()]:
        warnings.warn(f"Layer collapse: no weight is kept in {', '.join(dead)}; raise the density.", stacklevel=3)
