"""Minibatches: which images an iteration trains on, moved and normalised on the device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from lottery.data import Data, flip_crop, moves

if TYPE_CHECKING:
    from lottery.training import Recipe


class Batches:
    """Minibatches of the training set on the model's device: batch(t) is the one that iteration t trains on.

    Every epoch is a fresh permutation, and fresh augmentation, from (seed, epoch), so any iteration can be asked for:
    rewinding continues where the schedule stands. An incomplete last batch is dropped, or kept smaller, as the recipe
    says. Several seeds give as many batches, x [K, B, C, H, W] and y [K, B].
    """

    def __init__(self, data: Data, recipe: "Recipe", seed: int | Sequence[int], like: torch.Tensor):
        self.x, self.y = data.train.x.to(like.device), data.train.y.to(like.device)
        self.seeds, self.shape = ([int(seed)], ()) if isinstance(seed, Integral) else (seed, (len(seed),))
        self.size, self.epoch, self.augment = recipe.batch_size, None, recipe.augment != "none"
        self.per_epoch = recipe.per_epoch(len(self.y))
        if len(self.y) < self.size:
            raise ValueError(f"Invalid batch_size {self.size}: the training set has {len(self.y)} images.")
        if self.augment and self.x.dim() != 4:
            raise ValueError(
                f"Invalid augment {recipe.augment!r}: it is for images [N, C, H, W], not {tuple(self.x.shape)}."
            )
        self.normalise = normaliser(data, recipe, like)
        self.length, images = self.size, len(self.seeds) * self.size
        self.index = torch.zeros(images, dtype=torch.int64, device=like.device)
        self.move = torch.zeros(images, 3, dtype=torch.int64, device=like.device)

    def __call__(self, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.choose(t)
        return self.gather()

    def choose(self, t: int) -> None:
        """Write which images iteration t trains on, and how they are moved, where `gather` reads it."""
        epoch, i = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            self._shuffle(epoch)
            self.epoch = epoch
        part = slice(i * self.size, (i + 1) * self.size)
        chosen = self.order[:, part].flatten()
        self.length = len(chosen) // len(self.seeds)
        self.index[: len(chosen)].copy_(chosen)
        if self.augment:
            self.move[: len(chosen)].copy_(self.moves[:, part].flatten(0, 1))

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch that was chosen, made on the device from tensors that stay where they are."""
        images = len(self.seeds) * self.length
        index, move = self.index[:images], self.move[:images]
        x, y = self.x.index_select(0, index), self.y.index_select(0, index)
        x = self.normalise(flip_crop(x, move) if self.augment else x)
        return x.view(*self.shape, self.length, *x.shape[1:]), y.view(*self.shape, self.length)

    def _shuffle(self, epoch):
        n, orders, all_moves = len(self.y), [], []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            orders.append(torch.randperm(n, generator=generator))
            if self.augment:
                all_moves.append(moves(n, min(self.x.shape[2:]), generator))
        self.order = torch.stack(orders).to(self.y.device)
        self.moves = torch.stack(all_moves).to(self.y.device) if self.augment else None


def first_float(model: torch.nn.Module) -> torch.Tensor:
    """The parameter in whose dtype and on whose device a model is fed: the first of floating-point numbers.

    Raises ValueError: there is none, but of integers, such as quantised weights, or complex ones.
    """
    for p in model.parameters():
        if p.is_floating_point():
            return p
    kinds = ", ".join(sorted({str(p.dtype) for p in model.parameters()})) or "none at all"
    raise ValueError(
        f"Invalid model: it has no parameter of floating-point numbers ({kinds}), in whose dtype it would be fed."
    )


def normaliser(data: Data, recipe: "Recipe", like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 [B, C, H, W] → the recipe's inputs, in the dtype and on the device of the tensor `like`.

    They lie in memory with channels last, which is what convolutions are fastest with, unless the data say otherwise.
    Of one's own data, floats in their own units are divided by nothing, and token numbers are fed as they are.
    """
    if data.train.x.dtype == torch.int64:
        return lambda x: x
    layout = torch.channels_last if data.channels_last else torch.contiguous_format
    layout = layout if data.train.x.dim() == 4 else torch.preserve_format
    to_float = functools.partial(torch.Tensor.to, dtype=like.dtype, memory_format=layout, copy=True)
    if recipe.inputs == "unit":
        return lambda x: to_float(x).mul_(1 / data.scale)
    shape = (-1, *[1] * (data.train.x.dim() - 2))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(shape) * data.scale for v in (data.mean, data.std))
    mean, scale = mean.to(like), (1 / std).to(like)
    return lambda x: to_float(x).sub_(mean).mul_(scale)


def take(data: Data, fraction: float) -> Data:
    """The data with a random share of its training images, 0 < fraction <= 1 (the split is already shuffled)."""
    if not 0 < fraction <= 1:
        raise ValueError(f"Invalid train_fraction {fraction}: give a share of the training images, 0 < share <= 1.")
    k = max(1, round(fraction * len(data.train.y)))
    train = dataclasses.replace(data.train, x=data.train.x[:k], y=data.train.y[:k])
    return dataclasses.replace(data, train=train)
