"""Winning tickets as things one can have: initialisation and mask, from the store or from a file.

>>> from lottery import tickets
>>> ticket = tickets.level(7, seed=0)             # round 7 of trial 0, from the committed results
>>> tickets.save(ticket, "ticket.safetensors")
>>> model = tickets.load("ticket.safetensors").model()
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lottery import masks as M
from lottery import models, tensorfile
from lottery.files import in_folder, path_of

if TYPE_CHECKING:
    from lottery.experiments import Store


@dataclass(frozen=True)
class Ticket:
    """theta: `{name: tensor}` as `masks.state` gives it; masks: `{layer: BoolTensor}`; spec: of the Run, JSON types.

    Of a model of one's own (`lottery.prune`) the spec says what found the ticket, but cannot make the network.

    bitwise: whether θ₀ is that of the stored training to the last bit. Drawn on another kind of CPU it differs there.
    """

    theta: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    spec: dict
    bitwise: bool = True

    @property
    def density(self) -> float:
        """Fraction of the masked layers' weights that is kept."""
        return M.density(self.masks)

    def model(self, net: torch.nn.Module | None = None) -> torch.nn.Module:
        """The network m ⊙ θ, with the masks attached, ready to train: the spec's architecture, or a copy of `net`.

        Raises ValueError: of a model of one's own without `net`, or one that does not fit.
        """
        if net is None and (own := self.spec.get("own")):
            raise ValueError(f"The ticket is that of a {own} of one's own: give model(net) such a network.")
        net = copy.deepcopy(net) if net is not None else _create(self.spec)
        return M.restore(M.attach(net, self.masks), self.theta)


def level(level: int, seed: int = 0, scale: str | None = None, store: "Store | None" = None) -> Ticket:
    """The ticket of one level of the lottery ticket chapter's IMP chain, from the store.

    The mask is stored with the run; θ₀ is drawn again from the seed and compared with the hash of the one trained.

    Args:
        scale: of `lth.SCALES`; default: the highest one that has this level and seed.

    Raises ValueError: no such run is stored.
    """
    from lottery.experiments import Store, lth

    if not isinstance(level, Integral):
        raise ValueError(f"Invalid level {level!r}: give a whole number from 0.")
    store = store or Store()
    scales = [scale] if scale else lth.SCALES
    for name in scales:
        at = lth.setting(name).nets["lenet"]
        if 0 <= level <= at.rounds and (row := store.get(at.imp(seed, level)[0])):
            break
    else:
        raise ValueError(
            f"No run of level {level}, seed {seed} is stored at {' or '.join(scales)}: see lottery status."
        )
    return stored(row)


def stored(row: Mapping[str, Any]) -> Ticket:
    """The ticket of a stored run that started from θ₀, a row of `experiments.load`.

    Raises ValueError: its mask is not kept; those of controls, sweeps and large networks are not.
    """
    from lottery.experiments.store import unpack_masks

    if not (masks := unpack_masks(row)):
        raise ValueError(
            f"No mask is kept of run {row['key']}: take a ticket's whose test accuracy is read at every reading."
        )
    spec = json.loads(row["spec"])
    model = _create(spec, spec["seed"])
    theta = M.state(model)
    masks = {name: m.view(model.get_submodule(name).weight.shape) for name, m in masks.items()}
    bitwise = digest(theta) == json.loads(row["certificate"])["theta0"]
    return Ticket(theta, masks, spec, bitwise)


def save(ticket: Ticket, path: Path | str) -> None:
    """Write a ticket as one safetensors file: `theta/…`, `mask/…`, and with a hash over all of it spec and `bitwise`.

    Raises FileNotFoundError: no such folder; `files.CannotWrite`.
    """
    path = in_folder(path)
    named = {f"theta/{name}": t for name, t in ticket.theta.items()}
    named |= {f"mask/{name}": t for name, t in ticket.masks.items()}
    tensors = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in named.items()}
    tensorfile.write(path, tensors, {"spec": ticket.spec, "bitwise": ticket.bitwise})


def load(path: Path | str, model: torch.nn.Module | None = None) -> Ticket:
    """Read what `save` wrote.

    model: for the ticket of a model of one's own, that model, which stays as it is: the file has no code in it.

    Raises ValueError for a file that is no ticket, does not fit or has changed, FileNotFoundError for none.
    """
    if not (path := path_of(path)).is_file():
        raise FileNotFoundError(f"No ticket at {path}.")
    try:
        tensors, about, _ = tensorfile.read(path)
        spec, bitwise = about["spec"], about["bitwise"]
        own = spec.get("own")
        if model is None and own:
            raise _NeedsModel(f"{path} is the ticket of a {own} of one's own: give load(path, model=…) that model.")
        net = _fitting(spec, tensors) if model is None else copy.deepcopy(model)
        ranked = [name for name in M.prunable(net) if not own or f"mask/{name}" in tensors]  # in the network's order
        theta = {name: tensors[f"theta/{name}"] for name in M.state(net)}
        masks = {name: tensors[f"mask/{name}"] for name in ranked}
        for name, mine in M.state(net).items():
            same = (mine.shape, mine.is_floating_point()) == (theta[name].shape, theta[name].is_floating_point())
            if not same or not theta[name][mine.isfinite()].isfinite().all():  # a causal mask is of -inf
                raise ValueError(f"{name} is not a tensor of finite numbers")
        M.restore(M.attach(net, masks), theta)
    except _NeedsModel:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        fits = "" if model is None else f", or none that fits {type(model).__name__}"
        raise ValueError(f"{path} is no ticket{fits}: give a file that lottery.tickets.save wrote.") from None
    return Ticket(theta, masks, spec, bitwise)


def _fitting(spec, tensors):
    """The network of a spec, which is not made before it is known to have no more numbers than are there."""
    if spec.get("options"):
        with torch.device("meta"):
            wanted = sum(t.numel() for t in M.state(_create(spec)).values())
        if wanted > (given := sum(t.numel() for t in tensors.values())):
            raise ValueError(f"its network has {wanted} numbers, the file {given}")
    return _create(spec)


class _NeedsModel(ValueError):
    """The network of a ticket cannot be made from its file."""


def survivors(ticket: Ticket) -> dict[str, torch.Tensor]:
    """`{layer: values}`: the initial weights that the mask keeps, as flat tensors (figures 15, 16)."""
    weights = M.weights_of(ticket.theta, ticket.masks)
    return {name: weights[name][m] for name, m in ticket.masks.items()}


def connections(masks: dict[str, torch.Tensor], direction: str) -> dict[str, torch.Tensor]:
    """`{layer: shares}`: the share of its connections that each unit has kept (figures 21 to 24).

    masks: of layers in order, [units, units before]; a convolution's units are its channels, whose connections are
    kernels. direction: "in" for a layer's own units, "out" for the units that it reads, so that the first layer's are
    the inputs.
    """
    if direction not in ("in", "out"):
        raise ValueError(f"Invalid direction {direction!r}: give 'in' or 'out'.")
    own = 0 if direction == "in" else 1
    return {name: m.double().mean([d for d in range(m.dim()) if d != own]) for name, m in masks.items()}


# (from, to, bins) of the histograms; growth has a bin around 0, where the weights of pixels that are never lit stay.
MOVES = {"distance": (0.0, 0.8, 80), "growth": (-0.405, 0.795, 120)}


def moves(
    theta_0: dict[str, torch.Tensor], theta_J: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]
) -> dict[str, dict[str, dict[str, list[int]]]]:
    """How training moved weights inside and outside of a ticket (figures 19, 20), as counts.

    distance: of |θ_J − θ₀|; growth: of |θ_J| − |θ₀|; beyond `MOVES` counts in the last bin of that side.
    Returns `{"distance" | "growth": {layer: {"in": [bins], "out": [bins]}}}`.
    """
    found, weights = {quantity: {} for quantity in MOVES}, [M.weights_of(theta, masks) for theta in (theta_0, theta_J)]
    for name, m in masks.items():
        before, after = (w[name].double().cpu() for w in weights)
        values = {"distance": (after - before).abs(), "growth": after.abs() - before.abs()}
        for quantity, (low, high, bins) in MOVES.items():
            sets = {"in": values[quantity][m.cpu()], "out": values[quantity][~m.cpu()]}
            counts = {side: torch.histc(v.clamp(low, high), bins, low, high) for side, v in sets.items()}
            found[quantity][name] = {side: c.int().tolist() for side, c in counts.items()}
    return found


def digest(theta: dict[str, torch.Tensor]) -> str:
    """sha256 of a state's values, by name, since masks change the order of a model's parameters."""
    values = (theta[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for name in sorted(theta))
    return hashlib.sha256(b"".join(values)).hexdigest()


def _create(spec, seed=0):
    return models.on_set(spec["model"], spec["dataset"], spec.get("options", ()), seed)  # the first runs have none
