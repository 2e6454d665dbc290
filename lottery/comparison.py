"""What the runs of `experiments.compare` say: every method at a density, who is above whom, whose masks agree.

Everything takes the frame of `networks`, one row for each stored network; what is not stored is left out and counted.
"""

import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lottery import claims, names
from lottery.experiments import compare
from lottery.experiments.papers import parts
from lottery.experiments.soft_threshold import macs_left
from lottery.experiments.store import unpack_masks

if TYPE_CHECKING:
    import pandas as pd

    from lottery.chapter import Chapter

COLUMNS = ["method", "seed", "point", "x", "density", "test", "validation", "macs", "layers", "row", "total", "after"]
COLUMNS += ["hours"]
GROUPS = {  # by when the mask is found
    "after a training": ("imp", "rewind", "oneshot", "cs"),
    "before the training": ("grasp", "snip", "synflow", "magnitude", "random"),
    "during the training": ("gmp", "str", "dnw", "l0", "set", "rigl"),
}
WORDS = {"dense": "dense network", "imp": "LTH iterative", "rewind": "LTH rewinding", "oneshot": "LTH one-shot"}
WORDS |= {name: names.ARMS[name] for name in ("grasp", "synflow", "rigl", "magnitude")} | {"random": "random"}
CONFIGURATIONS = {  # of `compare.CONFIGS`, in words
    "weight_decay=0.0005": "weight decay 0.0005",
    "lr=0.03": "learning rate 0.03",
    "share=erk": "ERK's layer densities",
    "budget=erk": "ERK's layer densities",
    "budget=global": "all layers ranked together",
    "back=0.125": "back to an eighth of the training",
    "final=50": "last β of 50",
    "granularity=global": "one threshold for all layers",
    "reinit_linear=false": "ranks the very weights that are trained",
    "rounds=10": "10 rounds of scoring",
    "drop=0.2": "gates start with a drop rate of 0.2",
    "fraction=0.1": "replaces a tenth of the weights at a time",
}
DEFAULTS = {  # of methods that have another configuration on another network
    "snip": "default: ranks a copy whose linear layers are drawn anew",
    "magnitude": "default: all layers ranked together",
    "random": "default: layers about equally dense",
}


def words(method: str) -> str:
    """A method in as few words as tell it from the others: "gmp@begin=0.1" → "GMP begin=0.1"."""
    name, _, options = method.partition("@")
    return f"{WORDS.get(name, name.upper())} {options}".strip()


def configuration(net: str, method: str, asked: tuple[str, ...] = ()) -> str:
    """In words how a method is set on a network, as it was chosen by tuning, a Setting `asked` or as its name says."""
    name, _, options = method.partition("@")
    config = options or compare.configuration(net, name, asked)
    return CONFIGURATIONS.get(config, DEFAULTS.get(name, config) if config == "default" else config)


def networks(chapter: "Chapter", item: str) -> "pd.DataFrame":
    """One row for each stored network of an item, at the highest scale of which anything is stored: a DataFrame.

    Columns: method (with "@options" where it has some), seed, point, x (the density asked for, NaN where none is),
    density, test and validation (accuracies, %), macs (left, for one image), layers ({layer: density}), row (the
    store's), total and after (costs, in trainings), hours (of a core, with all that it was trained from). In `attrs`:
    scale, stored, declared (networks), densities, trials (declared).
    """
    import pandas as pd

    scales = [name for name in chapter.scales if chapter.stored(item, name)[0]] or chapter.scales[:1]
    at, store, rows = chapter.settings[scales[0]], chapter.store, []
    for arm, x, point in compare.cells(item, at):
        for seed in compare.seeds(item, at):
            [run] = compare.trial(arm, at, seed, point)
            if row := store.get(run):
                total, after = compare.cost(run)
                rows.append({
                    "method": _method(arm), "seed": seed, "point": point, "x": x, "density": row["density"],
                    "test": _percent(row["last_test_acc"]), "validation": _percent(row["last_val_acc"]),
                    "macs": macs_left(row)[0], "layers": {n: k / m for n, (k, m) in json.loads(row["layers"]).items()},
                    "row": row, "total": total, "after": after, "hours": _seconds(run, store) / 3600,
                })  # fmt: skip
    frame = pd.DataFrame(rows, columns=COLUMNS)
    stored, declared = chapter.stored(item, scales[0])
    densities = at.nets[compare.ITEMS[item][0]].densities if compare.ITEMS[item][0] in at.nets else ()
    frame.attrs = {"scale": scales[0], "stored": stored, "declared": declared, "densities": densities}
    frame.attrs["trials"] = len(compare.seeds(item, at))
    methods = {_method(arm) for arm, *_ in compare.cells(item, at)}
    frame.attrs["pairs"] = math.comb(sum(not m.startswith("dense") for m in methods), 2)
    return frame


def _method(arm):
    _, options, method = parts(arm)
    return f"{method}@{options}" if options else method


def _percent(share):
    return np.nan if share is None else 100 * share


def _seconds(run, store):
    found = 0.0
    while run:
        row = store.row(run.key)
        found, run = found + (row["wall_s"] if row else 0.0), run.parent
    return found


def at(frame: "pd.DataFrame", method: str, density: float, quantity: str = "test") -> dict[int, float]:
    """{seed: value} of a method at a density: of its network there, or between the two around it; what is out of reach
    is left out. The dense network is at every density. MACs follow the density: between two networks their logarithm
    is interpolated."""
    found, of = {}, frame[frame["method"] == method]
    for seed, part in of.groupby("seed"):
        values = list(part[quantity])
        if method.startswith("dense"):
            found[seed] = values[0]
        elif part["x"].notna().all():
            found.update((seed, v) for x, v in zip(part["x"], values, strict=True) if x == density)
        else:
            values = np.log(np.maximum(values, 1)) if quantity == "macs" else values  # one may have lost all
            if (value := compare.at_density(density, list(part["density"]), list(values))) is not None:
                found[seed] = np.exp(value) if quantity == "macs" else value
    return found


def summary(frame: "pd.DataFrame", quantity: str = "test") -> list[dict[str, str | float]]:
    """[{method, density, mean, half, n}] over trials; half: of the 95 % interval, NaN for one trial."""
    rows = []
    for method, density in itertools.product(dict.fromkeys(frame["method"]), frame.attrs["densities"]):
        if values := list(at(frame, method, density, quantity).values()):
            low, high = claims.t_interval(values)
            half = (high - low) / 2 if len(values) > 1 else np.nan
            rows.append({"method": method, "density": density, "mean": np.mean(values), "half": half, "n": len(values)})
    return rows


# Who is above whom ----------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two methods at one density: difference of their accuracies in points, 95 % interval, trials in common, p.

    word: "above" | "below" after Holm's correction over all declared pairs, "alike" where the 90 % interval lies within
    ±margin, else "open".
    """

    a: str
    b: str
    d: float
    interval: tuple[float, float]
    n: int
    p: float
    word: str


def pairs(frame: "pd.DataFrame", density: float, margin: float) -> list[Pair]:
    """All pairs of methods at a density that have all declared trials in common; the dense network stays out.

    The others count in Holm's correction with p = 1, or words would change with what is trained of other methods.
    """
    methods = (m for m in dict.fromkeys(frame["method"]) if not m.startswith("dense"))
    values, tests = {m: at(frame, m, density) for m in methods}, []
    for a, b in itertools.combinations(values, 2):
        d = np.array([values[a][seed] - values[b][seed] for seed in values[a].keys() & values[b].keys()])
        if len(d) >= enough(frame):
            tests.append((a, b, d, min(claims.p_value("direction", sign * d, margin) for sign in (1, -1))))
    found, rest = [], [1.0] * (frame.attrs["pairs"] - len(tests))
    for (a, b, d, p), passed in zip(tests, claims.holm([p for *_, p in tests] + rest)[: len(tests)], strict=True):
        word = ("above" if d.mean() > 0 else "below") if passed else "open"
        if not passed and claims.same(d, margin).word == "reproduced":
            word = "alike"
        found.append(Pair(a, b, float(d.mean()), claims.t_interval(d), len(d), p, word))
    return found


def enough(frame: "pd.DataFrame") -> int:
    """Trials from which on words are said: all that are declared, two at least."""
    return max(2, frame.attrs["trials"])


def matrix(found: Sequence[Pair], methods: Collection[str]) -> dict[tuple[str, str], str | None]:
    """{(a, b): word} of some `pairs`, both ways round."""
    turned = {"above": "below", "below": "above"}
    words = {(p.a, p.b): p.word for p in found} | {(p.b, p.a): turned.get(p.word, p.word) for p in found}
    return {(a, b): words.get((a, b)) for a in methods for b in methods}


def winners(frame: "pd.DataFrame", margin: float) -> list[str]:
    """`said` of each density, and of those that nothing can be said of one sentence."""
    lines = {d: said(frame, d, margin) for d in frame.attrs["densities"]}
    if silent := [f"{100 * d:g}" for d, line in lines.items() if line is None]:
        text = f"At {listed(silent)} % fewer than two methods have the {enough(frame)} trials that decide."
        return [*filter(None, lines.values()), text]
    return list(lines.values())


def said(frame: "pd.DataFrame", density: float, margin: float) -> str | None:
    """Who wins at a density, in a sentence or two: the highest mean, what it is above and not told apart from.

    None where fewer than two methods have all declared trials.
    """
    found = pairs(frame, density, margin)
    here = {row["method"]: row["mean"] for row in summary(frame) if row["density"] == density}
    here = {method: mean for method, mean in here.items() if any(method in (p.a, p.b) for p in found)}
    if not found:
        return None
    best = max(here, key=here.get)
    cells = matrix(found, here)
    by = {word: [words(m) for m in here if m != best and cells[best, m] == word] for word in ("above", "alike", "open")}
    n = sorted({p.n for p in found})
    trials = f"{n[0]}{f' to {n[-1]}' * (len(n) > 1)} trials"
    text = f"**{100 * density:g} %** ({len(here)} methods, {trials}): the highest mean, {here[best]:.2f} %, has "
    text += f"**{words(best)}**{_trainings(frame, density, best, here)}"
    said = [f"it is above {listed(by['above'])}" if by["above"] else "it is told apart from none of the others"]
    said += [f"within {margin:g} points of {listed(by['alike'])}"] if by["alike"] else []
    said += [f"not told apart from {listed(by['open'])}"] if by["open"] and by["above"] else []
    total = sum(p.word in ("above", "below") for p in found)
    return f"{text}; {'; '.join(said)}. Pairs told apart: {total} of {len(found)}."


def _trainings(frame, density, best, methods):
    """What one network of the best cost beside those of the others, in brackets; nothing where all cost as much."""
    if "total" not in frame:
        return ""
    costs = {row["method"]: row["mean"] for row in summary(frame, "total") if row["density"] == density}
    low, high = (f"{f(costs[m] for m in methods if m != best):.3g}" for f in (min, max))
    own = f"{costs[best]:.3g}"
    if own == low == high:
        return ""
    return f" ({own} training{'s' * (own != '1')}; the others {low}{f' to {high}' * (low != high)})"


def timing(frame: "pd.DataFrame", density: float, margin: float) -> str | None:
    """What finding the mask after, during and before the training give at a density, in two sentences: the range of the
    methods' means, and how many pairs of two groups are told apart. None where fewer than two groups have a pair.
    """
    found = pairs(frame, density, margin)
    decided = {m for p in found for m in (p.a, p.b)}
    mean = {r["method"]: r["mean"] for r in summary(frame) if r["density"] == density and r["method"] in decided}
    groups = {when: [m for m in mean if m.partition("@")[0] in some] for when, some in GROUPS.items()}
    groups = {when: methods for when, methods in groups.items() if methods}
    if len(groups) < 2:
        return None
    cells, spans, told = matrix(found, mean), [], []
    for when, methods in groups.items():
        low, high = (f(mean[m] for m in methods) for f in (min, max))
        spans.append(f"{when} {low:.2f}" + f" to {high:.2f}" * (len(methods) > 1))
    for one, other in itertools.combinations(groups, 2):
        words_ = [cells[a, b] for a in groups[one] for b in groups[other]]
        above, below, n = words_.count("above"), words_.count("below"), len(words_)
        told.append(f"{one} is above {other} in {above} of {n} pair{'s' * (n > 1)}, below in {below}")
    return f"**{100 * density:g} %, by when the mask is found**: {listed(spans)} %. Told apart: {'; '.join(told)}."


def listed(some: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} and {some[-1]}"


# What is kept, and whose masks agree ----------------------------------------------------------------------------------


def layers(frame: "pd.DataFrame", density: float) -> dict[str, dict[str, float]]:
    """{method: {layer: share of its weights that is kept}}, means over trials, of each method's networks at a density;
    of a method without one the point whose density is the nearest, within a factor of 2. The dense network stays out.
    """
    found = {}
    for method, part in frame.groupby("method", sort=False):
        near = part[(part["density"] / density).between(0.5, 2)]
        if len(near) and not method.startswith("dense"):
            off = np.abs(np.log(near["density"] / density))
            shares = near[near["point"] == near.loc[off.idxmin(), "point"]]["layers"]
            found[method] = {layer: float(np.mean([s[layer] for s in shares])) for layer in shares.iloc[0]}
    return found


def overlap(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(share of kept weights that both masks keep, what masks of the same layer densities give by chance)."""
    both = sum(int((a[name] & b[name]).sum()) for name in a)
    chance = sum(int(a[name].sum()) * int(b[name].sum()) / a[name].size for name in a)
    size = (sum(int(m.sum()) for m in a.values()) + sum(int(m.sum()) for m in b.values())) / 2
    return both / size, chance / size


def overlaps(frame: "pd.DataFrame", density: float) -> dict[tuple[str, str], tuple[float, float]]:
    """{(a, b): (overlap, by chance)} of methods' masks nearest to a density, means over trials of the same seed.

    (a, a) is of two seeds of one method. Left out: methods whose masks are not stored, or not within a factor of 1.5.
    """
    kept = {}
    for (method, seed), part in frame.groupby(["method", "seed"], sort=False):
        part = part[[row["mask"] is not None for row in part["row"]]]
        part = part[(part["density"] / density).between(1 / 1.5, 1.5)]
        if len(part) and not method.startswith("dense"):
            nearest = min(part.index, key=lambda i: abs(np.log(part["density"][i] / density)))
            kept.setdefault(method, {})[seed] = {n: m.numpy() for n, m in unpack_masks(part["row"][nearest]).items()}
    found = {}
    for a, b in itertools.combinations_with_replacement(kept, 2):
        if a == b:
            some = [overlap(kept[a][s], kept[a][t]) for s, t in itertools.combinations(kept[a], 2)]
        else:
            some = [overlap(kept[a][s], kept[b][s]) for s in kept[a].keys() & kept[b].keys()]
        if some:
            found[a, b] = tuple(np.mean(some, axis=0))
    return found


# How the methods were tuned -------------------------------------------------------------------------------------------


def tuned(frame: "pd.DataFrame") -> dict[str, dict[str, float | None]]:
    """{method: {configuration: validation accuracy in %, or None}} at the density of tuning; see `compare.CONFIGS`."""
    density = min(frame.attrs["densities"], key=lambda d: abs(d - compare.TUNED_AT))
    found = {}
    for method, configs in compare.CONFIGS.items():
        values = {config: at(frame, f"{method}@{config}", density, "validation") for config in configs}
        found[method] = {config: next(iter(v.values()), None) for config, v in values.items()}
    return found


def chosen(tried: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    """{method: the configuration with the highest validation accuracy, of equals the first}; "default" without any."""
    import pandas as pd

    return {
        method: max(values, key=lambda config: -1 if pd.isna(values[config]) else values[config])
        for method, values in tried.items()
    }
