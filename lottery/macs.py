"""Multiply-accumulates (MACs) of one forward pass, layer by layer.

One MAC is one multiplication with its addition; one MAC is two FLOPs. Counted are the Linear and Conv layers that
`masks.prunable` lists, whose weights a ticket saves; biases, batch norm, activations and pooling are not. STR (Kusupati
et al., ICML 2020, arXiv 2002.03231) calls the same quantity "FLOPs". ResNet-50 has 4,089,184,256 here and 4,089,284,608
there: their budget file adds the 100,352 inputs of the average pooling, pruned in each of its budgets.
"""

import copy
from math import prod

import torch
from torch import nn

from lottery import masks as M


def count(model, input_shape):
    """MACs of every layer for one example, as if no weight were pruned: `{layer: int}` in module order.

    A layer that runs several times counts every time and one that does not run counts 0; layers that share a weight
    count under the first one's name. The forward pass runs in evaluation mode on a copy of the model that has shapes
    but no values (PyTorch's meta device): it takes no memory, and model and random state stay as they are.

    Args:
        input_shape: shape of one example, without the batch: (3, 224, 224).

    Raises ValueError: nothing prunable, or an input_shape that the model does not take.
    """
    if not M.prunable(model):
        raise ValueError("Nothing prunable: the model has no Linear or Conv layer.")
    ghost = _without_values(model).eval()
    layers = M.prunable(ghost)
    names = {id(M.original(layer)): name for name, layer in layers.items()}
    macs = dict.fromkeys(layers, 0)

    def add(layer, _, output):  # every output value takes one MAC for each weight of its filter or row
        macs[names[id(M.original(layer))]] += output.numel() * prod(layer.weight.shape[1:])

    for layer in ghost.modules():
        if id(M.original(layer)) in names:
            layer.register_forward_hook(add)
    dtype = next(iter(layers.values())).weight.dtype
    try:
        with torch.no_grad():
            ghost(torch.empty(1, *input_shape, dtype=dtype, device="meta"))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"Invalid input_shape {input_shape}: give the shape of one example, without the batch, that fits ({why})."
        ) from error
    return macs


def effective(model, input_shape):
    """MACs that are left when pruned weights are skipped: `{layer: float}`, each layer's MACs × its density.

    As in `masks.density`, a layer counts the ones of its mask where it carries one and its non-zero effective weights
    where it does not, so that it reads masks, soft thresholds, hardened gates and baked models alike.

    Args and errors: those of `count`.
    """
    macs, masks = count(model, input_shape), M.read(model)
    kept = {n: masks[n] if n in masks else layer.weight.detach() != 0 for n, layer in M.prunable(model).items()}
    return {name: macs[name] * M.density({name: kept[name]}) for name in macs}


def _without_values(model):
    """A deep copy whose parameters and buffers are on the meta device; nothing is copied but shapes and dtypes."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)
