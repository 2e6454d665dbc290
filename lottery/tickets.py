"""Winning tickets as things one can have: initialisation and mask, from the store or from a file.

>>> from lottery import tickets
>>> ticket = tickets.level(7, seed=0)             # round 7 of trial 0, from the committed results
>>> tickets.save(ticket, "ticket.safetensors")
>>> model = tickets.load("ticket.safetensors").model()
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from lottery import data, models
from lottery import masks as M


@dataclass(frozen=True)
class Ticket:
    """theta: `{name: tensor}` as `masks.state` gives it; masks: `{layer: BoolTensor}`; spec: of the Run, JSON types.

    bitwise: whether θ₀ is that of the stored training to the last bit. Drawn on another kind of CPU it differs there.
    """

    theta: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    spec: dict
    bitwise: bool = True

    @property
    def density(self):
        """Fraction of the masked layers' weights that is kept."""
        return M.density(self.masks)

    def model(self):
        """The network m ⊙ θ of the spec's architecture, with the masks attached, ready to train."""
        return M.restore(M.attach(_create(self.spec), self.masks), self.theta)


def level(level, seed=0, scale=None, store=None):
    """The ticket of one level of the lottery ticket chapter's IMP chain, from the store.

    The mask is stored with the run; θ₀ is drawn again from the seed and compared with the hash of the one trained.

    Args:
        scale: of `lth.SCALES`; default: the highest one that has this level and seed.

    Raises ValueError: no such run is stored.
    """
    from lottery.experiments import Store, lth
    from lottery.experiments.store import unpack_masks

    store = store or Store()
    scales = [scale] if scale else lth.SCALES
    for name in scales:
        at = lth.setting(name)
        if 0 <= level <= at.rounds and (row := store.get(run := at.imp(seed, level)[0])):
            break
    else:
        raise ValueError(
            f"No run of level {level}, seed {seed} is stored at {' or '.join(scales)}: see lottery status."
        )
    model = _create(run.spec(), seed)
    theta = M.state(model)
    shapes = {name: layer.weight.shape for name, layer in M.prunable(model).items()}
    bitwise = digest(theta) == json.loads(row["certificate"])["theta0"]
    return Ticket(theta, unpack_masks(row["mask"], shapes), run.spec(), bitwise)


def save(ticket, path):
    """Write a ticket as one safetensors file: `theta/…`, `mask/…`, and the spec as metadata."""
    from safetensors.torch import save_file

    tensors = {f"theta/{name}": t.contiguous() for name, t in ticket.theta.items()}
    tensors |= {f"mask/{name}": t.contiguous() for name, t in ticket.masks.items()}
    save_file(tensors, path, metadata={"spec": json.dumps(ticket.spec)})


def load(path):
    """Read what `save` wrote. Raises ValueError for a file that is no ticket, FileNotFoundError for none."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"No ticket at {path}.")
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            spec = json.loads((f.metadata() or {})["spec"])
        model = _create(spec)  # safetensors sorts names; the model knows their order
        theta = {name: tensors[f"theta/{name}"] for name in M.state(model)}
        masks = {name: tensors[f"mask/{name}"] for name in M.prunable(model)}
        M.restore(M.attach(model, masks), theta)
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no ticket: give a file that lottery.tickets.save wrote.") from None
    return Ticket(theta, masks, spec)


def digest(theta):
    """sha256 of a state's values, by name, since masks change the order of a model's parameters."""
    return hashlib.sha256(b"".join(theta[name].cpu().numpy().tobytes() for name in sorted(theta))).hexdigest()


def _create(spec, seed=0):
    facts = data.SETS[spec["dataset"]]
    options = dict(spec.get("options", ()))  # tickets that were saved before there were options have none
    return models.create(spec["model"], seed=seed, in_shape=facts.shape, classes=facts.classes, **options)
