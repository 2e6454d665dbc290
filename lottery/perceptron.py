"""Fully connected ReLU networks: the arithmetic of `training.fit`, with less of everything around it.

LeNet-300-100 has 266,610 parameters: they fit in a core's cache, and autograd, the mask's two products, the optimiser's
bookkeeping and the choice of matrix library cost as much as the arithmetic. Here the backward pass is written out, the
parameters are one vector, and on the CPU float32 products go to oneDNN, whose kernels use the whole vector width on
every x86 processor. A GPU would idle under one such network; there many of them train side by side. Every network that
is not of this form takes the general way.
"""

import copy
import math
import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize as P

from lottery import masks as M

X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
SMALL = 2**18  # multiplications below which calling oneDNN takes longer than the product
CLASSES = (nn.Sequential, nn.Flatten, nn.Linear, nn.ReLU, M.Mask, P.ParametrizationList, nn.ModuleDict)
FORWARDS = {cls: cls.forward for cls in CLASSES}
FEW = 1 / 3  # below this density it is faster to gather the survivors for the optimiser than to mask all gradients


def layers(model: nn.Module) -> list[nn.Linear] | None:
    """The Linear layers of `Flatten, Linear, ReLU, Linear, …, Linear`, with masks or without; else None.

    Else is whatever could make a call of the model, or autograd behind it, do anything but the plain arithmetic:
    another class, a forward of an instance's own, a hook of any kind on a module, on all modules or on a tensor,
    another parametrization, a tensor that is shared, frozen, not of its layer's size, or of another dtype or device.
    """
    modules = list(model) if type(model) is nn.Sequential else [None]
    linear, between = modules[1::2], modules[2::2]
    chain = (
        type(modules[0]) is nn.Flatten
        and (modules[0].start_dim, modules[0].end_dim) == (1, -1)
        and len(linear) == len(between) + 1 > 1
        and all(type(module) is nn.ReLU for module in between)
        and all(P.type_before_parametrizations(layer) is nn.Linear and _only_masked(layer) for layer in linear)
        and all(plain_call(module) for module in model.modules())
        and not (_has_any_global_hook() or torch.is_anomaly_enabled())
    )
    return linear if chain and _plain_tensors(model, linear) else None


def _linear(model):
    """The `layers` of a model that is known to be of that form."""
    return list(model)[1::2]


def _only_masked(layer):
    """Whether the weight is a parameter, or one under a Mask and nothing else, and the bias a parameter."""
    if not P.is_parametrized(layer):
        return True
    chains = layer.parametrizations
    if list(chains) != ["weight"] or [type(p) for p in chains.weight] != [M.Mask]:
        return False
    return chains.weight[0].mask.shape == chains.weight.original.shape


def plain_call(module: nn.Module) -> bool:
    """Whether `module(x)` runs the forward that its class came with, and nothing before or after."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    plain = getattr(module.forward, "__func__", None) is FORWARDS.get(P.type_before_parametrizations(module), ())
    return plain and not any(hooks) and module._compiled_call_impl is None


def _plain_tensors(model, linear):
    """Whether the parameters are one weight and one bias a layer, of sizes that fit, each a leaf of its own."""
    own, weights, biases = list(model.parameters()), [M.original(layer) for layer in linear], [n.bias for n in linear]
    if {id(p) for p in own} != {id(p) for p in (*weights, *biases)} or len(own) != 2 * len(linear):
        return False
    sizes = [(layer.out_features, layer.in_features) for layer in linear]
    return (
        [tuple(w.shape) for w in weights] == sizes
        and [tuple(b.shape) for b in biases] == [(m,) for m, _ in sizes]
        and [n for _, n in sizes[1:]] == [m for m, _ in sizes[:-1]]
        and len({p.untyped_storage().data_ptr() for p in own}) == len(own)
        and len({(p.dtype, p.device) for p in own}) == 1
        and own[0].dtype in (torch.float32, torch.float64)
        and all(type(p) is nn.Parameter and p.requires_grad and p.is_contiguous() for p in own)
        and not any(p._backward_hooks or p._post_accumulate_grad_hooks or _is_watched(p) for p in own)
    )


def _is_watched(p):
    """Whether somebody holds the node in which p's gradients are summed, as `register_multi_grad_hook` does.

    Its hooks cannot be listed; but a node that nobody holds is made anew each time it is asked for. It must not be a
    local variable here: a profiler, such as that of Dask's workers, keeps frames for a moment after they have ended.
    """
    with torch.enable_grad():
        p.view_as(p).grad_fn.next_functions[0][0].metadata["seen"] = True
        return p.view_as(p).grad_fn.next_functions[0][0].metadata.pop("seen", False)


def trainable(models: Sequence[nn.Module], shape: Sequence[int] | None = None) -> bool:
    """Whether `Step`, or `Population` for several, trains these models on images of this shape (C, H, W).

    They have `layers` of the same sizes and dtypes, on one device, no tensor of one is another's, and every mask is of
    ones and zeros.
    """
    nets = [layers(model) or [] for model in models]
    kinds = {tuple((n.in_features, n.out_features, n.bias.dtype, n.bias.device) for n in net) for net in nets}
    if len(kinds) != 1 or () in kinds or (shape is not None and math.prod(shape) != nets[0][0].in_features):
        return False
    own = [p.untyped_storage().data_ptr() for model in models for p in model.parameters()]
    masks = [m.mask for net in nets for layer in net if (m := M.mask_of(layer))]
    return len(set(own)) == len(own) and all(torch.equal(mask, mask * mask) for mask in masks)


@torch.no_grad()
def forward(model: nn.Module) -> Callable | None:
    """On the CPU, float [B, …] → logits [B, classes] of the weights as they are now, without gradients; else None.

    None also for a network with weights that are not finite.
    """
    if not (linear := layers(model)) or linear[0].bias.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    parameters = [(layer.weight.detach(), layer.bias.detach()) for layer in linear]
    if not all(t.sum().isfinite() for pair in parameters for t in pair):
        return None  # oneDNN's ReLU takes NaN for 0
    dtype, size = parameters[0][0].dtype, linear[0].in_features

    def logits(x):
        if x.dim() < 2 or x.dtype != dtype or math.prod(x.shape[1:]) != size:
            return model(x)  # it says what does not fit
        return _activations(parameters, x)[-1]

    return logits


def _activations(parameters, x):
    """x₀ … x_L: the flat input, the hidden layers after ReLU, the logits."""
    xs = [x.flatten(1)]
    for i, (weight, bias) in enumerate(parameters, start=1):
        xs.append(_product(xs[-1], weight, bias, relu=i < len(parameters)))
    return xs


def _product(x, weight, bias=None, relu=False):
    """[B, n] × [m, n] → x weightᵀ + bias, [B, m]."""
    if X86 and x.dtype == torch.float32 and len(x) * weight.numel() > SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


@torch.no_grad()
def narrow(model: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """A copy of a model with `layers` that reads only these inputs, int64 [n]."""
    model = copy.deepcopy(model)
    first = _linear(model)[0]
    weight = nn.Parameter(M.original(first)[:, inputs])
    first.in_features = len(inputs)
    if (mask := M.mask_of(first)) is None:
        first.weight = weight
    else:
        first.parametrizations.weight.original = weight
        mask.mask = mask.mask[:, inputs]
    return model


@torch.no_grad()
def widen(model: nn.Module, narrow: nn.Module, inputs: torch.Tensor) -> None:
    """Copy the parameters of a `narrow` copy back into the model; what reads the other inputs stays as it is."""
    for layer, trained in zip(_linear(model), _linear(narrow), strict=True):
        weight = M.original(layer)
        if weight.shape == M.original(trained).shape:
            weight.copy_(M.original(trained))
        else:
            weight[:, inputs] = M.original(trained)
        layer.bias.copy_(trained.bias)


class Step:
    """`training.Step` by hand, for a model with `layers` on the CPU.

    θ is one vector: of each layer the weights, then the biases. Where few weights survive it holds the survivors only,
    and the optimiser has less to update. The model sees θ after `sync`; what is pruned there stays as it is.

    build: (parameter groups, recipe) → optimiser.
    """

    @torch.no_grad()
    def __init__(self, model, recipe, build):
        self.layers = _linear(model)
        masks = [_mask(layer) for layer in self.layers]
        few = sum(mask.sum() for mask in masks) < FEW * sum(mask.numel() for mask in masks)
        self.masks = None if few else masks
        self.survivors = [mask.flatten().nonzero()[:, 0] for mask in masks] if few else None
        weights = [layer.weight.detach().clone() for layer in self.layers]
        kept = [w.flatten()[s] for w, s in zip(weights, self.survivors, strict=True)] if few else weights
        parts = [t for w, layer in zip(kept, self.layers, strict=True) for t in (w, layer.bias.detach())]
        self.theta = torch.cat([t.flatten() for t in parts])
        self.theta.grad = torch.zeros_like(self.theta)
        self.kept, self.biases = _views(self.theta, parts)
        self.weights = weights if few else self.kept
        self.weight_grads, self.bias_grads = _views(self.theta.grad, parts)
        self.optimizer = build([{"params": [self.theta], "weight_decay": recipe.weight_decay}], recipe)

    @torch.no_grad()
    def __call__(self, x, y):
        """float [B, …], int64 [B] → the minibatch's mean cross-entropy, before the update."""
        xs = _activations(list(zip(self.weights, self.biases, strict=True)), x)
        log_p = F.log_softmax(xs[-1], 1)
        loss = F.nll_loss(log_p, y)
        g = log_p.exp_().scatter_add_(1, y[:, None], log_p.new_full((len(y), 1), -1)).div_(len(y))  # (p − y) / B
        for i in reversed(range(len(self.layers))):
            weight_grad = _product(g.T, xs[i].T)
            if self.survivors is None:
                torch.mul(weight_grad, self.masks[i], out=self.weight_grads[i])
            else:
                torch.index_select(weight_grad.view(-1), 0, self.survivors[i], out=self.weight_grads[i])
            torch.sum(g, 0, out=self.bias_grads[i])
            if i:
                g = torch.ops.aten.threshold_backward(_product(g, self.weights[i].T), xs[i], 0)  # ReLU's
        self.optimizer.step()
        for i, survivors in enumerate(self.survivors or []):
            self.weights[i].view(-1).scatter_(0, survivors, self.kept[i])
        return loss

    @torch.no_grad()
    def sync(self, k: int = 0) -> None:
        """Copy θ into the model."""
        for layer, weight, bias in zip(self.layers, self.weights, self.biases, strict=True):
            _copy(layer, weight, bias)


class Population:
    """`Step` for K networks of one architecture: every layer of all of them in one batched product.

    θ is [K, P], of each network the same weights and biases in the same order; a mask's zeros are in the gradient.
    build: (parameter groups, recipe) → optimiser.
    """

    @torch.no_grad()
    def __init__(self, models, recipe, build):
        self.layers = [_linear(model) for model in models]
        alike = list(zip(*self.layers, strict=True))  # [layer][network]
        parts = [torch.stack([getattr(n, of).detach() for n in same]) for same in alike for of in ("weight", "bias")]
        masks = [torch.stack([_mask(layer) for layer in same]) for same in alike]
        masks = [t for mask, bias in zip(masks, parts[1::2], strict=True) for t in (mask, torch.ones_like(bias))]
        self.mask = torch.cat([t.flatten(1) for t in masks], 1)
        self.theta = torch.cat([t.flatten(1) for t in parts], 1)
        self.theta.grad = torch.zeros_like(self.theta)
        self.weights, self.biases = _views(self.theta, parts)
        self.weight_grads, self.bias_grads = _views(self.theta.grad, parts)
        self.optimizer = build([{"params": [self.theta], "weight_decay": recipe.weight_decay}], recipe)

    @torch.no_grad()
    def __call__(self, x, y):
        """float [K, B, …], int64 [K, B] → the minibatches' mean cross-entropies [K], before the update."""
        xs = self.activations(x)
        log_p = F.log_softmax(xs[-1], 2)
        loss = -log_p.gather(2, y[..., None]).mean((1, 2))
        g = (log_p.exp() - F.one_hot(y, log_p.shape[2])) / y.shape[1]
        for i in reversed(range(len(self.weights))):
            self.weight_grads[i].copy_(torch.bmm(g.mT, xs[i]))
            self.bias_grads[i].copy_(g.sum(1))
            if i:
                g = torch.ops.aten.threshold_backward(torch.bmm(g, self.weights[i]), xs[i], 0)
        self.theta.grad.mul_(self.mask)
        self.optimizer.step()
        return loss

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x₀ [K, B, n₀], the hidden layers after ReLU, the logits [K, B, classes]."""
        xs = [x.flatten(2)]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True), start=1):
            z = torch.baddbmm(bias[:, None], xs[-1], weight.mT)
            xs.append(z.relu_() if i < len(self.weights) else z)
        return xs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float [B, …] → the logits of all networks for the same images [K, B, classes]."""
        return self.activations(x.expand(len(self.layers), *x.shape))[-1]

    @torch.no_grad()
    def sync(self, k: int) -> None:
        """Copy θ of network k into its model."""
        for layer, weight, bias in zip(self.layers[k], self.weights, self.biases, strict=True):
            _copy(layer, weight[k], bias[k])


def _mask(layer):
    mask = M.mask_of(layer)
    return torch.ones_like(layer.weight) if mask is None else mask.mask.to(layer.weight.dtype)


def _copy(layer, weight, bias):
    """The layer's new effective weight and bias; what is pruned stays as it is behind the mask."""
    original = M.original(layer)
    original.copy_(torch.where(_mask(layer).bool(), weight, original))
    layer.bias.copy_(bias)


def _views(vector, like):
    """Views of the vector [P] or vectors [K, P], each in the shape of one of `like`: the weights, the biases."""
    sizes = [t.numel() // vector.shape[:-1].numel() for t in like]
    views = [part.view(t.shape) for part, t in zip(vector.split(sizes, -1), like, strict=True)]
    return views[::2], views[1::2]
