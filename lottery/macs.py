"""Multiply-accumulates (MACs) of one forward pass, layer by layer.

One MAC is one multiplication with its addition; one MAC is two FLOPs. Counted are the Linear and Conv layers that
`masks.prunable` lists, whose weights a ticket saves; biases, batch norm, activations and pooling are not. STR (Kusupati
et al., ICML 2020, arXiv 2002.03231) calls the same quantity "FLOPs". ResNet-50 has 4,089,184,256 here and 4,089,284,608
there: their budget file adds the 100,352 inputs of the average pooling, pruned in each of its budgets.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lottery import masks as M
from lottery.methods import said

aten = torch.ops.aten
VECTORS = (aten.mv, aten.addmv, aten.dot, aten.vdot)  # products that PyTorch's table of FLOPs leaves out
PRODUCTS = flop_registry | dict.fromkeys(VECTORS, lambda *t, out_val, **_: 2 * max(v.numel() for v in tree_leaves(t)))


def count(model: nn.Module, input_shape: tuple[int, ...] | torch.Tensor | Sequence[torch.Tensor]) -> dict[str, int]:
    """MACs of every layer for one example, as if no weight were pruned: `{layer: int}` in module order.

    Counted is every product with a layer's weight or with what a parametrization makes of it, whether the layer is
    called or its weight used on its own (as attention does). One that is used several times counts every time and one
    that is not used counts 0; layers that share a weight count under the first one's name.

    The forward pass runs in evaluation mode on a copy of the model, without wrappers (DistributedDataParallel, …),
    that has shapes but no values (PyTorch's meta device): it takes no memory, and model and random state stay as they
    are. A model that needs values (it calls `.item()`, or holds tensors that are no buffers) runs on a copy with them.

    Args:
        input_shape: shape of one example, without the batch: (3, 224, 224); the input is of the weights' dtype, or
            int64 zeros where the model takes token numbers. Or, for other models, one example as the model takes it: a
            tensor with a batch of one, or several of them.

    Raises ValueError: nothing prunable, or an input_shape that the model does not take.
    """
    if not (found := M.prunable(model)):
        raise ValueError("Nothing prunable: the model has no Linear or Conv layer.")
    like, errors = next(iter(found.values())).weight, []
    for meta in (True,) if like.is_meta else (True, False):
        for example in _examples(input_shape, like.dtype, "meta" if meta else like.device):
            try:
                return _count(model, example, meta)
            except Exception as error:  # whatever a model raises
                errors.append(error)
    why = said(errors[0] if like.is_meta else errors[len(errors) // 2]).rstrip(".")
    given = "an example" if any(isinstance(t, torch.Tensor) for t in tree_leaves(input_shape)) else input_shape
    raise ValueError(
        f"Invalid input_shape {given}: give the shape of one example, without the batch, that fits, or one example, a "
        f"tensor with a batch of one ({why})."
    ) from errors[0]


def _examples(given, dtype, device):
    """Inputs to try, each a tuple of tensors with a batch of one."""
    leaves = tree_leaves(given)
    if leaves and all(isinstance(t, torch.Tensor) for t in leaves):
        if any(len(t) != 1 if t.dim() else True for t in leaves):
            raise ValueError("Invalid input_shape: give one example, a tensor with a batch of one.")
        return [tuple(t.to(device) for t in leaves)]
    try:
        shape = (1, *given)
        return [
            (torch.ones(shape, dtype=dtype, device=device),),
            (torch.zeros(shape, dtype=torch.int64, device=device),),
        ]
    except (RuntimeError, TypeError) as error:
        why = said(error).rstrip(".")
        raise ValueError(
            f"Invalid input_shape {given!r:.60}: give the shape of one example, without the batch, that fits ({why})."
        ) from error


def _count(model, example, meta):
    memo = _without_values(model) if meta else {}
    net = M.unwrapped(model, memo).eval()
    counter, fast = _Counter(net), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whole layers in one operation
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            net(*example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.macs


class _Counter(TorchDispatchMode):
    """Sums the MACs of every product that has a layer's weight as a factor.

    Weights are followed by their storage through what is made of them alone, with constants or with each other: views,
    copies, casts, masks. What an example enters is an activation from then on.
    """

    def __init__(self, net):
        super().__init__()
        layers = M.prunable(net)
        self.macs, self.kept, self.inside = dict.fromkeys(layers, 0), [], 0
        names = {id(M.original(layer)): name for name, layer in layers.items()}
        self.owner = {}  # of a storage: the layer's name, or None for an activation
        for layer in net.modules():
            if (weight := M.original(layer)) is not None and (name := names.get(id(weight))) is not None:
                self._note(weight, name)
                if (chain := M.chain_of(layer)) is not None:
                    chain.register_forward_pre_hook(self._enter)
                    chain.register_forward_hook(lambda *hook, name=name: self._leave(hook[2], name))

    def _enter(self, *_):
        self.inside += 1

    def _leave(self, weight, name):
        self.inside -= 1
        self._note(weight, name)

    def _note(self, tensor, owner):
        self.kept.append(storage := tensor.untyped_storage())  # alive, so that its address stays its own
        self.owner[storage._cdata] = owner

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.overloadpacket not in PRODUCTS:
            with self:
                if (out := op.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        out = op(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self.owner[key] for t in tensors if (key := t.untyped_storage()._cdata) in self.owner]
        if self.inside or not known:
            return out
        owner = None if None in known else known[0]
        if op.overloadpacket in PRODUCTS and (names := [name for name in known if name is not None]):
            self.macs[names[0]] += PRODUCTS[op.overloadpacket](*args, **kwargs, out_val=out) // 2
            owner = None
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, owner)
        return out


def effective(
    model: nn.Module, input_shape: tuple[int, ...] | torch.Tensor | Sequence[torch.Tensor]
) -> dict[str, float]:
    """MACs that are left when pruned weights are skipped: `{layer: float}`, each layer's MACs × its density.

    The weights that count are those that `masks.remaining` names, so that it reads masks, soft thresholds, hardened
    gates and baked models alike.

    Args and errors: those of `count` and `masks.remaining`.
    """
    macs, left = count(model, input_shape), M.remaining(model)
    return {name: macs[name] * M.density({name: left[name]}) for name in macs}


def _without_values(model):
    """What makes a deep copy one on the meta device, `{id: tensor}`; nothing is copied but shapes and dtypes."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return memo | {id(b): b.detach().to("meta") for b in model.buffers()}
