"""What a training does beside gradient steps: one hook for every pruning method.

`training.fit` calls a `Method` at fixed places and knows nothing else of it. A method is a frozen dataclass of
hyper-parameters, so that a Run can name it; what it learns or moves lives on the model, as parameters and buffers of
parametrizations, so that `masks.state` copies it, early stop remembers it and a file keeps it. The base class is the
method of masks that were chosen before the training and stay: LTH, GraSP, SNIP, random pruning, or none at all.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lottery import masks as M

if TYPE_CHECKING:
    from lottery.training import Recipe, Step


def own_numbers(fields: Any) -> None:
    """Turn numpy's numbers in a dataclass's fields into Python's, in place: they are equal, but JSON and repr differ.

    Also those in tuples. Called at the head of `__post_init__`, of frozen dataclasses as well.
    """
    for name, value in list(vars(fields).items()):
        if (own := _own(value)) is not value:
            object.__setattr__(fields, name, own)


def _own(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        own = tuple(map(_own, value))
        return value if all(map(operator.is_, own, value)) else own
    return value


@dataclass(frozen=True)
class Method:
    """Masks that stay. A further method overrides what it does differently, in the file of its paper."""

    carries = False  # whether a training that goes on from a parent of this method takes over its optimiser's state

    def __post_init__(self):
        own_numbers(self)

    def attach(self, model: torch.nn.Module) -> torch.nn.Module:
        """Parametrise the model, in place, before the optimiser is built. Here: masks of ones, if it has no masks."""
        return model if M.read(model) else M.attach(model)

    def resume(self, model: torch.nn.Module) -> None:
        """Called once where a training goes on from a parent of the same method, whose final state is on the model."""

    def param_groups(self, model: torch.nn.Module, recipe: "Recipe") -> list[dict[str, Any]]:
        """The optimiser's groups. Here: all trainable parameters, all with the recipe's weight decay.

        A group may have a "rate", which its learning rate is multiplied by in every step.
        """
        return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": recipe.weight_decay}]

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        """A term of the loss, a scalar with gradient, or None."""

    def before_step(self, t: int, step: "Step") -> None:
        """Called before the step that follows `t` finished ones, to write in place what changes.

        step: the `training.Step`: its model, recipe, optimizer, batch (x, y), per_epoch, start (the iteration that this
        training began at), and generator, from which everything random is drawn, so that trials differ and a resumed
        training draws alike.
        """

    def masks(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The hard masks as they stand, `{layer: BoolTensor}`; the layers named are the denominator of densities."""
        return M.read(model)

    def reading(self, model: torch.nn.Module) -> dict[str, float]:
        """Numbers kept at each reading, by name."""
        return {}

    def check(self, model: torch.nn.Module, before: dict[str, torch.Tensor], finished: bool) -> None:
        """Raise AssertionError when the training broke the method's promise. Here: what was pruned stayed pruned.

        before: `masks` when the training began. finished: the recipe's last iteration was reached.
        """
        layers = M.prunable(model) if before else {}
        for name, m in before.items():
            if layers[name].weight.detach()[~m].any():
                raise AssertionError(f"Pruned weights of layer {name!r} came back during training.")


NOTHING = Method()


def densities(masks: dict[str, torch.Tensor]) -> dict[str, float]:
    """A `reading` of masks: `density` of all of them, and `density/<layer>` of each.

    Raises ValueError: there is no mask.
    """
    if not masks:
        raise ValueError("No density: no layer is pruned; call the method's attach(model) before the training.")
    kept = {name: int(m.count_nonzero()) for name, m in masks.items()}
    each = {f"density/{name}": kept[name] / m.numel() for name, m in masks.items()}
    return {"density": sum(kept.values()) / sum(m.numel() for m in masks.values()), **each}


def said(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def need(fields: Any, name: str, ok: Any, rule: str) -> None:
    """Raise ValueError with the rule of a dataclass's field, unless it is kept."""
    if not ok:
        raise ValueError(f"Invalid {name} {getattr(fields, name)!r}: {rule}.")


def shares(density: Any) -> bool:
    """Whether a field holds a density, 0 < density <= 1, or one for each of some layers, ((layer, density), ...)."""
    given = density if isinstance(density, tuple) else ((None, density),)
    pairs = given and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in given)
    return bool(pairs and len({name for name, _ in given}) == len(given)) and all(
        number(d) and 0 < d <= 1 for _, d in given
    )


def check_loss(loss: Any) -> torch.Tensor:
    """The loss, if it is one number that can be minimised. Raises ValueError."""
    if not (isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise ValueError("Invalid loss: it has to be one number, a tensor with a gradient to what is trained.")
    return loss


def forget(memory: Mapping, parameter: torch.Tensor, gone: torch.Tensor) -> None:
    """Momentum, and Adam's moments, of some entries of a parameter become 0; memory: the optimiser's `state`."""
    for moment in memory.get(parameter, {}).values():
        if isinstance(moment, torch.Tensor) and moment.shape == parameter.shape:
            moment.masked_fill_(gone, 0)


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless an argument of this name is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"Invalid {name} {value!r}: give a whole number from {least}.")


def number(value: Any, kind: type | tuple[type, ...] = (int, float, np.integer, np.floating)) -> bool:
    """Whether a value is a finite number of this kind, and no boolean; `and` then says in which range."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf
