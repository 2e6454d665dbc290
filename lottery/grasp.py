"""GraSP: pruning at initialisation by preserving gradient flow. Wang, Zhang & Grosse, ICLR 2020, arXiv 2002.07376.

The gradient flow of a network is ‖g‖² = gᵀg, g = ∇L(θ): the decrease of the loss along an infinitesimal gradient step.
Perturbing θ by δ changes it by S(δ) = 2 δᵀHg + O(‖δ‖²) (eq. 7), H the Hessian of L; removing one weight is
δ = −θ_q e_q, so, the factor 2 dropped, S(−θ) = −θ ⊙ Hg (eq. 8). What would lower ‖g‖² most if it were removed
is kept: the lowest S. A score here is −S = θ ⊙ Hg, higher = keep.

Algorithm 2, as the authors' code does it, for chunks c of a class-balanced batch:

1. g = Σ_c ∇CE(f(x_c)/T, y_c), the cross-entropy a mean over the chunk; g is a constant from here on.
2. Hg = Σ_c H_c g: the gradient of gᵀ∇CE(f(x_c)/T, y_c) by a second backward pass.
3. Scores θ ⊙ Hg of all convolution and linear weights, ranked together, once.

C equal chunks give C² times the score of their union if the network treats images independently; batch norm
does not, it normalises every chunk by itself. T = 200 is in the code only, and it is not neutral: at T → ∞ the
curvature of the loss drops out and that of the network remains. The weights before a train-mode batch norm are
scale-invariant: their H w is −g, so their scores sum to −‖g_layer‖², up to the norm's ε.

Differs from the authors' code in:
    the count: exactly k weights are kept, the earlier of ties; theirs keeps n − int(n·sparsity) + 1, and all ties;
    the scale: their scores are also divided by |Σ S| + 1e-10, which orders nothing and is about 0/0 at T = 200;
    the classifier: they score a copy whose linear layers are drawn anew (Xavier normal), `prune(reinit_linear=True)`;
    the batch: they halve it sorted by class and draw it from augmented images, `class_balanced(halves, augment)`.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lottery import masks as M
from lottery.data import Data, flip_crop, moves
from lottery.methods import check_loss, number, said

VERSION = 1  # raise when a result of this file changes beyond the tolerance in book/development.md

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]  # chunks (x, y); a generator is refused
Loss = Callable[[Any, torch.Tensor], torch.Tensor]  # of what the model gives and y, one number


def scores(
    model: nn.Module, batches: Batches, temperature: float = 200.0, loss: Loss = F.cross_entropy
) -> dict[str, torch.Tensor]:
    """GraSP scores θ ⊙ Hg, the negative of the authors' S: higher = keep.

    Two passes over the chunks, with memory for one chunk's double backward whatever their number. What is scored
    is a copy in training mode, of which a model in that mode keeps what it has frozen (`scored_copy`): the model's
    mode, buffers, gradients and torch's random state stay as they are. Of a model in half precision the copy is in
    float32, since T = 200 brings scores to 1e-9, which float16 has not.

    Args:
        model: maps x to logits [B, classes]. With masks on, the effective weights are scored as the authors' code
            sees them: zeros among the weights, g and H over all entries; a removed weight's score is 0.
        batches: chunks `[(x, y), ...]`, x float [B, ...], y int64 [B]. Used twice: what is no list, such as a
            DataLoader, is drawn once and kept; a generator is refused.
        temperature: T > 0, divides the logits.
        loss: `loss(logits / T, y)`, one number, in the place of the cross-entropy; y and, where T = 1, what the model
            gives are then as this loss takes them.

    Returns `{layer: tensor}` of the weights' shapes and device and the copy's dtype, summed over chunks (not averaged).

    Raises ValueError: nothing prunable, NaN in the batch or one that does not fit the model, all-zero or non-finite
    gradients or scores, a bad temperature or loss, an operation without a second derivative.
    """
    f, theta = scored_copy(model)
    w, batches, T, L = list(theta.values()), _drawn(batches), temperature, loss
    with same_rng(w[0]), _twice_differentiable():
        g = _sum(batches, w, lambda x, y: _gradient(f, w, x, y, T, L))
        _check_gradients(g)
        Hg = _sum(batches, w, lambda x, y: _times_hessian(g, f, w, x, y, T, L))
    theta_Hg = [v.detach() * h for v, h in zip(w, Hg, strict=True)]
    found = dict(zip(theta, theta_Hg, strict=True))
    if not all(v.isfinite().all() for v in found.values()):
        raise ValueError("NaN or infinity in the scores: check the model's weights and the temperature.")
    if not any(v.any() for v in found.values()):
        raise ValueError(
            "All GraSP scores are zero, so no weight ranks above another: are the weights zero, or is the temperature "
            "too high?"
        )
    return found


def prune(
    model: nn.Module, batches: Batches, density: float, temperature: float = 200.0, reinit_linear: bool = False
) -> dict[str, torch.Tensor]:
    """Masks that keep the fraction `density` of all weights, those with the highest scores, in one shot.

    Args:
        model: as in `scores`; weights that masks on the model have removed stay removed.
        batches, temperature: as in `scores`.
        density: fraction of all Linear and Conv weights to keep, 0 < density <= 1.
        reinit_linear: True scores a copy with fresh Xavier-normal linear layers, as the authors' driver does: the
            classifier's mask is then chosen for weights that are never trained. Draws from torch's random state.

    Returns `{layer: BoolTensor}`; the model is left as it was. Warns of layer collapse, naming the layers.

    Raises ValueError: as `scores`, and for a density out of range or one that keeps no weight.
    """
    score = scores(with_xavier_linear(model) if reinit_linear else model, batches, temperature)
    on = M.read(model)
    before = {name: on.get(name, torch.ones_like(s, dtype=torch.bool)) for name, s in score.items()}
    m = M.top_k(score, density, within=before)
    M.warn_of_collapse(m)
    return m


def with_xavier_linear(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """A copy whose linear layers have fresh Xavier-normal weights: the one that the authors' driver scores.

    Masks are baked into it. `generator`: a torch.Generator, or None to draw from torch's random state.
    """
    net, on = M.bake(M.unwrapped(model)), M.read(model)
    for name, layer in M.prunable(net).items():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            if name in on:
                layer.weight.data.mul_(on[name])
    return net


def class_balanced(
    data: Data,
    per_class: int,
    generator: torch.Generator | None = None,
    halves: bool = False,
    draws: int = 1,
    augment: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A class-balanced sample of the training images, as chunks for `scores`.

    Images are walked in random order, the first `per_class` of each class are taken and sorted by class. The paper
    takes 10 per class in all: CIFAR-10 one draw of 10, ResNet-32 on CIFAR-100 two draws of 5.

    Args:
        data: a `lottery.data.Data`; only its `.train` is used.
        per_class: images of each class, at least 1.
        generator: a torch.Generator for the order, or None for torch's random state.
        halves: True cuts the sorted sample in two, as the authors' code does, so that batch norm sees half of the
            classes at a time; False keeps one chunk.
        draws: parts with `per_class / draws` images of each class, every one sorted and cut by itself.
        augment: True flips and crops the images at random, `data.flip_crop`, as the authors' loader does.

    Returns `[(x, y), ...]`: x float32 [B, C, H, W], standardised with the data's mean and std per channel; y int64 [B].

    Raises ValueError: per_class below 1 or no multiple of draws, a class with fewer images, augment without images.
    """
    if not (number(per_class, Integral) and per_class >= 1):
        raise ValueError(f"Invalid per_class {per_class!r}: give a whole number of images of each class, from 1.")
    if augment and data.train.x.dim() != 4:
        raise ValueError(f"Invalid augment True: it is for images [N, C, H, W], not {tuple(data.train.x.shape)}.")
    if not (number(draws, Integral) and draws >= 1) or per_class % draws:
        raise ValueError(f"Invalid draws {draws!r}: give a number that divides the {per_class} images of each class.")
    order = torch.randperm(len(data.train.y), generator=generator)
    labels = data.train.y[order]
    found = [order[labels == c][:per_class] for c in range(data.classes)]
    if short := [str(c) for c, index in enumerate(found) if len(index) < per_class]:
        raise ValueError(f"Invalid per_class {per_class}: class {', '.join(short)} has fewer training images.")
    chunks = []
    for part in torch.stack(found).chunk(draws, 1):
        for index in part.flatten().tensor_split(2 if halves else 1):
            x = data.train.x[index]
            x = flip_crop(x, moves(len(x), min(x.shape[2:]), generator)) if augment else x
            chunks.append((data.standard(x), data.train.y[index]))
    return chunks


def gradient_norm(model: nn.Module, batches: Batches, temperature: float = 1.0) -> float:
    """‖g‖₂ of the mean loss over all images of all chunks, over the kept weights; its square is the gradient flow.

    Arguments as in `scores`; one pass. With masks on the model only the weights that they keep count. Zero is an
    answer here, not an error. In training mode, on a copy; batch norm sees one chunk at a time.
    """
    net, theta = scored_copy(model)
    w, on, batches = list(theta.values()), M.read(model), _drawn(batches)
    with same_rng(w[0]):
        g = _sum(batches, w, lambda x, y: [len(y) * v for v in _gradient(net, w, x, y, temperature)])
    kept = [v * on[name] if name in on else v for name, v in zip(theta, g, strict=True)]
    return math.hypot(*(float(torch.linalg.vector_norm(v)) for v in kept)) / sum(len(y) for _, y in batches)


def ntk(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The tangent kernel Θ = (∂Z/∂θ)(∂Z/∂θ)ᵀ of the outputs Z = f(x), over the kept weights (section 4).

    x: float [B, ...], one batch, which the network sees in training mode.

    Returns float [B·K, B·K] for outputs [B, K]; rows in the order of `Z.flatten()`. Memory for one row's
    backward pass, time for B·K of them.
    """
    net, theta = scored_copy(model)
    w, on = list(theta.values()), M.read(model)
    with same_rng(w[0]), _twice_differentiable(), torch.enable_grad():
        Z = outputs(net, fed(x, w[0])).flatten()
        u = torch.zeros_like(Z, requires_grad=True)
        Ju = torch.autograd.grad(Z, w, u, create_graph=True, materialize_grads=True)  # Jᵀu is linear in u, hence:
        rows = []
        for e in torch.eye(len(Z)).to(Z):
            row = torch.autograd.grad(Z, w, e, retain_graph=True, materialize_grads=True)  # Jᵀe
            row = [v * on[name] if name in on else v for name, v in zip(theta, row, strict=True)]
            rows += torch.autograd.grad(Ju, u, row, retain_graph=True)  # JJᵀe
    return torch.stack(rows)


def summed_gradient(
    model: nn.Module, batches: Batches, temperature: float = 1.0, loss: Loss = F.cross_entropy
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(θ, g): the effective weights and Σ_c ∇L(f(x_c)/T, y_c), L the loss, as `{layer: tensor}`; see `scores`."""
    net, theta = scored_copy(model)
    w, batches = list(theta.values()), _drawn(batches)
    with same_rng(w[0]):
        g = _sum(batches, w, lambda x, y: _gradient(net, w, x, y, temperature, loss))
    _check_gradients(g)
    return {name: v.detach() for name, v in theta.items()}, dict(zip(theta, g, strict=True))


def scored_copy(model: nn.Module) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """(net, θ): a plain copy in training mode with masks baked in, and `{layer: weight}`, all that has gradients.

    Of a model that comes in training mode the modules that were put into evaluation mode stay in it, such as a frozen
    batch norm: what is scored is what `training.fit` trains. What is in half precision is in float32 there.
    """
    M.check_gradients(model)
    M.check_values(layers := M.chosen(model))
    M.check_real(layers)
    net = M.bake(M.unwrapped(model)).requires_grad_(False)._apply(_wide)
    if not model.training:
        net.train()
    layers = M.prunable(net)
    return net, {name: layer.weight.requires_grad_() for name, layer in layers.items()}


def _gradient(f, w, x, y, T, L=F.cross_entropy, create_graph=False):
    if not (M.is_number(T) and 0 < T < math.inf):
        raise ValueError(f"Invalid temperature {T!r}: give a number above 0.")
    with torch.enable_grad():
        z = outputs(f, x, alone=T != 1 or L is F.cross_entropy)
        if L is F.cross_entropy:
            _check_labels(y, z)
        error = check_loss(L(z if T == 1 else z / T, y))
        return torch.autograd.grad(error, w, create_graph=create_graph, materialize_grads=True)


def _check_labels(y, z):
    classes = z.shape[1] if z.dim() > 1 and z.shape[2:] == y.shape[1:] else 0
    if y.dtype != torch.int64 or y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"Invalid batches: labels are {y.dtype} from {y.min()} to {y.max()}, the model's classes {classes}; "
            "give int64 labels from 0, and a model of logits [B, classes]."
        )


def outputs(net: nn.Module, x: torch.Tensor, alone: bool = True) -> Any:
    """net(x). Raises ValueError where the model does not take x, or, `alone`, gives something else than a tensor."""
    try:
        z = net(x)
    except Exception as error:  # whatever a model raises
        shape = tuple(x.shape)
        raise ValueError(f"The model does not take inputs of shape {shape}, {x.dtype}: {said(error)}") from error
    if alone and not isinstance(z, torch.Tensor):
        raise ValueError(f"The model gives a {type(z).__name__}, which cannot be scored: it has to give logits alone.")
    return z


def _times_hessian(g, f, w, x, y, T, L):
    """H_c g = ∇(gᵀ g_c), g a constant. A function of its own: the chunk's graph is gone before the next is built."""
    with torch.enable_grad():
        g_c = _gradient(f, w, x, y, T, L, create_graph=True)
        z = sum(a.flatten() @ b.flatten() for a, b in zip(g, g_c, strict=True))
        if not z.requires_grad:  # linear in the weights: no curvature
            return [torch.zeros_like(v) for v in w]
        return torch.autograd.grad(z, w, materialize_grads=True)


def _sum(batches, w, f):
    """Σ_c f(x_c, y_c), tensors like w."""
    total = [torch.zeros_like(v) for v in w]
    for x, y in _chunks(batches, w[0]):
        for a, b in zip(total, f(x, y), strict=True):
            a.add_(b)
    return total


def _chunks(batches, like):
    """The chunks on the device of `like`, checked one by one."""
    count = 0
    for count, chunk in enumerate(batches, start=1):
        if not (isinstance(chunk, tuple | list) and len(chunk) == 2):
            raise ValueError(f"Invalid batches: chunk {count} is no pair; give a list of chunks [(x, y), ...].")
        x, y = chunk
        if not all(isinstance(t, torch.Tensor) and t.dim() for t in chunk) or not len(x) == len(y) > 0:
            raise ValueError(f"Invalid batches: chunk {count} is no pair of tensors of the same length, from 1.")
        if not x.isfinite().all():
            raise ValueError(f"NaN or infinity in the batch: chunk {count} of the inputs; check the data.")
        yield fed(x, like), y.to(like.device)
    if not count:
        raise ValueError("Invalid batches: there is no chunk; give a list of chunks [(x, y), ...].")


def _drawn(batches):
    """The chunks as a list: a DataLoader may draw others each time it is asked, in another order, augmented anew."""
    if isinstance(batches, list | tuple):
        return batches
    if not isinstance(batches, Iterable):
        raise ValueError(f"Invalid batches of type {type(batches).__name__}: give a list of chunks [(x, y), ...].")
    if (drawing := iter(batches)) is batches:
        raise ValueError("Invalid batches: a generator can be read only once; give a list of chunks (x, y).")
    return list(drawing)


def fed(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What a `scored_copy` is fed, `like` being one of its weights: on their device, floats in their dtype."""
    return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)


def _wide(t):
    """Half precision as float32, everything else as it is."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


@contextlib.contextmanager
def _twice_differentiable():
    """Attention by plain products, since fused kernels have no second derivative; who else has none is named."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise ValueError(
            f"The model cannot be scored, it or its loss has an operation without second derivative: {error}."
        ) from None


def _check_gradients(g):
    if not all(v.isfinite().all() for v in g):
        raise ValueError("NaN or infinity in the gradients: check the model's weights and the labels.")
    if not any(v.any() for v in g):
        raise ValueError("All gradients are zero, so no weight ranks above another: is a layer cut off or dead?")


def same_rng(like: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Random state as before on leaving: dropout in the scored copy must not shift what is drawn afterwards."""
    return torch.random.fork_rng(devices=[like.device] if like.device.type == "cuda" else [])
