"""How long a training takes: seconds per unit of its work, of those like it that are stored. Needs no PyTorch."""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from lottery.experiments.store import Store

T = TypeVar("T")


def paces(store: Store, device: str = "cpu") -> dict[tuple[str | int, ...], float]:
    """`{kind: seconds per unit of work}`, the median over what was trained on a CPU, or on a GPU: not all were idle.

    By the `kind` of a Run and, for where none of it was timed, by its first two entries, model and data set, alone.
    """
    found = {}
    for where, wall_s, n, spec in store.columns("device", "wall_s", "iterations", "spec").values():
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):  # unchecked
            if 0 < wall_s < math.inf and where.startswith("CPU") == (device == "cpu"):
                kind = kind_of(json.loads(spec))
                for name in {kind, kind[:2]} if n else {kind}:
                    found.setdefault(name, []).append(wall_s / (n or 1))  # a measurement has no iterations
    return {name: statistics.median(each) for name, each in found.items()}


def kind_of(spec: Mapping) -> tuple[str | int, ...]:
    """The `kind` of the Run or Measurement that a `spec` is of."""
    if "measurement" in spec:
        return "measured", spec["model"], spec["dataset"], spec.get("images", 0)
    # Runs from before there were methods name none, and the one without anything to train is not named by its class.
    return spec["model"], spec["dataset"], spec["recipe"]["batch_size"], spec.get("method", {}).get("is", "Method")


def missing(wanted: Iterable[T], needs: Callable[[T], Iterable[tuple[T, bool]]], lacks: Callable) -> list[T]:
    """What is to be trained so that all that is wanted is stored, what others need before them.

    needs: what one starts from, each with whether by its weights, or by its row alone. lacks: of one and whether its
    weights are needed, whether they, or it, are not there.
    """
    todo = {}

    def need(one, weights=False):
        if one not in todo and lacks(one, weights):
            for other, by_weights in needs(one):
                need(other, by_weights)
            todo[one] = None

    for one in wanted:
        need(one)
    return list(todo)


def expected(paces: Mapping[tuple[str | int, ...], float], kind: tuple[str | int, ...], work: int) -> float | None:
    """Seconds that some work of a kind takes, as `paces` says; None where nothing like it was timed."""
    pace = paces.get(kind, paces.get(kind[:2]))
    return None if pace is None else pace * work
