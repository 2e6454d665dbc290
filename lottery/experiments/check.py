"""What makes a run impossible and can be told before anything is trained: counts follow from sizes and rates."""

import functools
from collections.abc import Iterable

from lottery import data, lth, models
from lottery import masks as M
from lottery.batches import take
from lottery.experiments import work
from lottery.experiments.runs import Measurement, Run, rates
from lottery.experiments.store import Store
from lottery.methods import Method

LR = 10.0  # above it every network here diverges, and what is to be pruned of it is not there


def refuse(runs: Iterable[Run | Measurement], store: Store | None = None) -> None:
    """Raise ValueError for the first of `runs` that could not be trained, with all that it needs.

    store: with one, what scores at initialisation is also scored, once for each criterion and its options; for that
    the images have to be there.
    """
    scored = set()
    for r in (q for q in runs if isinstance(q, Run)):
        images = data.SETS[r.dataset].n_train - data.held_out(r.dataset, r.valid)
        images = max(1, round(r.train_fraction * images))
        if r.recipe.batch_size > images:
            raise ValueError(f"Invalid batch_size {r.recipe.batch_size}: the training set has {images} images.")
        if r.recipe.lr > LR:
            raise ValueError(f"Invalid lr {r.recipe.lr}: training diverges there, give at most {LR:g}.")
        _left(r)
        what = r.model, r.dataset, r.criterion, r.score, r.train_fraction
        if store and r.density and not r.parent and r.criterion in ("snip", "grasp") and what not in scored:
            scored.add(what)
            whole = work.images_of(r.dataset, r.valid, r.balanced, r.split_seed)
            work.initialise(r, take(whole, r.train_fraction), store)


@functools.lru_cache(maxsize=10_000)
def _left(r):
    """Weights that a run starts with, `{layer: n}`, or of all layers; None where its method or its parent's decides."""
    before = _left(r.parent) if r.parent else _sizes(r.model, r.dataset, r.options, r.layers)
    if before is None or type(r.method) is not Method or r.budget:
        return None
    try:
        if isinstance(r.density, tuple):
            sizes = _sizes(r.model, r.dataset, r.options, r.layers)
            return {name: M.kept(sizes[name], d, f"layer {name!r}") for name, d in r.density if name in sizes}
        if r.density:
            return M.kept(sum(_sizes(r.model, r.dataset, r.options, r.layers).values()), r.density)
        if not r.parent:
            return before
        if r.scope == "global":
            return lth.kept(before if isinstance(before, dict) else {"": before}, r.rate)
        each = rates(models.sizes_only(r.model, r.dataset, r.options), r)
        return lth.kept(before, each) if isinstance(before, dict) else None
    except ValueError as error:
        raise ValueError(f"After {r.level} rounds: {error}" if r.level > 1 else str(error)) from None


@functools.lru_cache(maxsize=100)
def _sizes(model, dataset, options, layers):
    net = models.sizes_only(model, dataset, options)
    found = {name: layer.weight.numel() for name, layer in M.prunable(net).items()}
    return {name: n for name, n in found.items() if layers is None or name in layers}
