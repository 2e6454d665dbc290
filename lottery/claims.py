"""When a claim counts as reproduced: the rules, as pure functions of per-trial differences.

A difference is ours: A − B of two arms paired by trial, or ours − the paper's number for "a value". Accuracies are in
points; iterations, epochs and MACs are natural logarithms of ratios. d is the mean difference, [L, U] its 95 %
t-interval over trials, Δ the paper's effect (2m when it states none), m the margin.

    kind              reproduced                     partly                  not reproduced (n ≥ 5)
    direction         L > 0 and d ≥ Δ/2              L > 0 and d < Δ/2       U < Δ/2, not L > 0; "opposite" if U < 0
    value, same       90 % interval within ±m        –                       95 % interval wholly outside ±m
    at least matches  90 % lower bound > −m          –                       U < −m
    down to           matches at the density         at the next denser one  fails at both
    up to             level chosen on the other trials, scored on the one held out; then as direction
    best value        the same; then as value; neither is negative while a level is not tested
    in all cells      every cell passes              half, none negative     a cell is negative by its own rule, with
                                                                             1 − 0.05/k in place of 95 %, k cells

What fits none of them is inconclusive. What passes while its interval excludes the size that the paper gives is
"reproduced, size differs". `scorecard` applies the rules to what the store holds.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CHOSEN = ("up to", "best value")  # one of several cells is chosen
KINDS = ("direction", "value", "same", "at least matches", "down to", *CHOSEN)
ALL = "in all cells: "  # a prefix of direction, value, same, at least matches
RANGED = (ALL, *CHOSEN)  # some of a claim's cells may be missing
LOG = ("iterations", "epochs", "MACs", "MACs per weight", "gradient norm", "gradient norm of the copy")
MARGINS = {"mnist": 0.2, "fashion_mnist": 0.5, "cifar10": 0.5, "cifar100": 1.0}  # points
RATIO = " ratio"  # a quantity so named, and those of LOG, are compared as logarithms
FACTOR = 1.15  # the margin of iterations and epochs
TRAIN = 0.05  # points, of train accuracy on any data
STABLE = 2.0  # points of error on the line between two copies, below which arXiv 1912.05671 calls a network stable
LATE = 0.9  # of the training: a minimum after it is censored
MOST_CENSORED = 0.2
SIZE = ", size differs"
DEPENDS = "depends on the setting"
CLOSE = 1.05  # a factor: densities closer than this go by one number
WIDEST = 4.0  # a factor: densities further apart are not interpolated between
ENOUGH = 5  # trials, for a negative result
SOFTER = {"reproduced": "supports", "partly": "mixed", "not reproduced": "contradicts"}


@dataclass(frozen=True)
class Verdict:
    """A word, what it rests on (mean difference d, 95 % interval, number of trials n, p-value), and a remark.

    p is that of the test behind a positive word, nan where there is none: see `p_value`. Of a claim in several cells,
    "up to" and "down to": of the cell with the largest p, of the held-out scores, at the paper's density.
    """

    word: str
    d: float = math.nan
    interval: tuple[float, float] = (-math.inf, math.inf)
    n: int = 0
    note: str = ""
    p: float = math.nan

    @property
    def somewhere(self) -> bool:
        """Whether it is true in some cell at least; what *passes* in the totals is `scorecard.PASSED`."""
        return self.word.startswith(("reproduced", "partly"))

    def __str__(self):
        return f"{self.word} ({self.note})" if self.note else self.word


def is_ratio(quantity: str | None) -> bool:
    """Whether differences of it are logarithms of ratios."""
    return bool(quantity) and (quantity in LOG or quantity.endswith(RATIO))


# The rules ------------------------------------------------------------------------------------------------------------


def t_interval(d: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the mean of d, one number a trial; unbounded for fewer than two trials."""
    d = np.asarray(d, dtype=float)
    if len(d) < 2:
        return -math.inf, math.inf
    half = _t((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean() - half), float(d.mean() + half)


@functools.cache
def _t(p, freedom):
    return stats.t.ppf(p, freedom)


def direction(d: ArrayLike, delta: float) -> Verdict:
    """A > B by about `delta`."""
    mean, (low, high) = np.mean(d), t_interval(d)
    if low > 0:
        return _verdict("reproduced" if mean >= delta / 2 else "partly", d)
    if high < delta / 2:
        return _negative(d, "opposite" if high < 0 else "")
    return _undecided(d, "direction", delta)


def same(d: ArrayLike, margin: float) -> Verdict:
    """No difference beyond ±margin; a large p-value is never evidence of it."""
    (low, high), (l90, h90) = t_interval(d), t_interval(d, 0.9)
    if -margin < l90 and h90 < margin:
        return _verdict("reproduced", d)
    return _negative(d) if low > margin or high < -margin else _undecided(d, "same", margin)


def value(d: ArrayLike, margin: float) -> Verdict:
    """Ours − paper is zero within ±margin; a single exact number has no interval."""
    return same(d, margin)


def exact(d: float, margin: float) -> Verdict:
    """Arithmetic: one number, no trials."""
    return Verdict("reproduced" if abs(d) <= margin else "not reproduced", float(d), (float(d), float(d)), 1)


def at_least_matches(d: ArrayLike, margin: float) -> Verdict:
    """A is not worse than B by more than `margin`."""
    if t_interval(d, 0.9)[0] > -margin:
        return _verdict("reproduced", d)
    return _negative(d) if t_interval(d)[1] < -margin else _undecided(d, "at least matches", margin)


def down_to(d: ArrayLike, denser: ArrayLike, margin: float) -> Verdict:
    """At least matches at the paper's density; `denser`: differences at the next denser level."""
    here, there = at_least_matches(d, margin), at_least_matches(denser, margin)
    if here.word != "reproduced" and there.word == "reproduced":
        return replace(here, word="partly", note="only at the next denser level")
    if here.word == "not reproduced" != there.word:
        return replace(here, word="inconclusive", note="the next denser level is undecided")
    return here


def leave_one_out(levels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Differences [levels, trials] → held-out differences [trials] and the level chosen for each on the others."""
    levels = np.asarray(levels, dtype=float)
    others = levels.sum(axis=1, keepdims=True) - levels
    chosen = others.argmax(axis=0)
    return levels[chosen, np.arange(levels.shape[1])], chosen


def up_to(levels: ArrayLike, delta: float) -> Verdict:
    """The best of several levels, differences [levels, trials]: a maximum is never tested against dense."""
    if np.shape(levels)[1] < 2:
        return _undecided(np.ravel(levels)[:1], "direction", delta)
    return direction(leave_one_out(levels)[0], delta)


def in_all_cells(kind: str, cells: ArrayLike, margin: float, named: int | None = None) -> Verdict:
    """`kind` in every cell that a claim names; cells: differences [cells, trials] of those that could be tested.

    named: how many there are, default len(cells). Cells that were not tested, and cells that are neither passed nor
    negative, leave the claim open. d and interval are those of the `worst` cell.
    """
    k = named or len(cells)
    passed = sum(_cell_passes(kind, d, margin) for d in cells)
    negative = sum(_cell_negative(kind, d, margin, 1 - 0.05 / k) for d in cells)
    counts = {"open": len(cells) - passed - negative, "negative": negative, "not tested": k - len(cells)}
    note = ", ".join([f"{passed} of {k} pass", *(f"{n} {name}" for name, n in counts.items() if n)])
    at = cells[worst(kind, cells, margin)]
    p = p_value(kind, at, margin)
    if negative:
        verdict = _negative(at)
        return replace(verdict, note="; ".join(filter(None, [note, verdict.note])), p=p)
    word = "reproduced" if passed == k else "partly" if 2 * passed >= k else "inconclusive"
    return replace(_verdict(word, at, note), p=p)


def worst(kind: str, cells: ArrayLike, margin: float) -> int:
    """Index of the cell with the largest p-value, of equals with the worst mean; its mean need not be the smallest."""
    means = np.mean(cells, axis=1)
    bad = -means if kind in ("direction", "at least matches") else np.abs(means)
    return max(range(len(cells)), key=lambda i: (_p(kind, cells[i], margin), bad[i]))


def judge(
    kind: str, cells: ArrayLike, delta: float | None = None, margin: float | None = None, named: int | None = None
) -> Verdict:
    """The verdict of a claim. cells: differences [cells, trials]; delta and margin in the unit of the differences.

    named: of `in_all_cells`. Raises ValueError for an unknown kind.
    """
    delta = 2 * margin if delta is None else delta
    if kind.startswith(ALL):
        return in_all_cells(kind.removeprefix(ALL), cells, margin, named)
    if kind in CHOSEN:
        held_out = leave_one_out(cells)[0] if np.shape(cells)[1] > 1 else np.ravel(cells)[:1]
        verdict = up_to(cells, delta) if kind == "up to" else value(held_out, margin)
        if named and len(cells) < named:  # the best may be among the others
            verdict = replace(verdict, note="; ".join(filter(None, [f"{len(cells)} of {named} levels", verdict.note])))
            if verdict.word == "not reproduced":
                verdict = replace(verdict, word="inconclusive")
        return replace(verdict, p=p_value("direction" if kind == "up to" else "value", held_out, margin))
    if kind == "down to":
        return replace(down_to(*cells, margin), p=p_value("at least matches", cells[0], margin))
    rules = {"direction": direction, "value": value, "same": same, "at least matches": at_least_matches}
    if kind not in rules:
        raise ValueError(f"Unknown kind of claim {kind!r}: give one of {', '.join(KINDS)}, or {ALL}and one of them.")
    verdict = rules[kind](cells[0], delta if kind == "direction" else margin)
    return replace(verdict, p=p_value(kind, cells[0], margin))


def sized(verdict: Verdict, kind: str, paper: float, error: float = 0.0) -> Verdict:
    """The verdict, with the remark that the size differs where the interval excludes the paper's, or is not known where
    the paper's picture does not even tell the sign.

    paper, error: the effect that the paper gives and how exactly it is known (of numbers read off a picture the root of
    their squared errors' sum), in the unit of the differences; 0 is the paper's number itself for "a value".
    """
    low, high = verdict.interval
    outside = low > paper + error or high < paper - error
    if verdict.word != "reproduced" or kind.removeprefix(ALL) not in ("direction", "value"):
        return verdict
    if outside:
        return replace(verdict, word=verdict.word + SIZE)
    unread = 0 < abs(paper) <= error
    return replace(verdict, note="; ".join(filter(None, [verdict.note, "paper's size unknown" * unread])))


def _cell_passes(kind, d, margin):
    """At 5 %."""
    if kind == "direction":
        return t_interval(d)[0] > 0
    low, high = t_interval(d, 0.9)
    return low > -margin and (kind == "at least matches" or high < margin)


def _cell_negative(kind, d, margin, level):
    """By the cell's own rule, at a level for which all cells of a claim together have 95 %."""
    low, high = t_interval(d, level)
    if kind == "direction":
        return high < margin and not _cell_passes(kind, d, margin)
    return high < -margin or (kind != "at least matches" and low > margin)


def p_value(kind: str, d: ArrayLike, margin: float) -> float:
    """Of one cell: two-sided for direction (1 when A < B), the larger of two one-sided tests for sameness."""
    return min(1.0, _p(kind, d, margin))


def _p(kind, d, margin):
    n, mean = len(d), np.mean(d)
    error = np.std(d, ddof=1) / math.sqrt(n) if n > 1 else math.inf

    def above(bound, x):  # one-sided p of "the true mean of x exceeds bound"
        return float(x <= bound) if error == 0 else stats.t.sf((x - bound) / error, max(n - 1, 1))

    if kind == "direction":
        return 2 * above(0, mean)
    lower = above(-margin, mean)
    return lower if kind == "at least matches" else max(lower, above(-margin, -mean))


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which single cells of a claim pass alone: step down from the smallest p, level / (cells not yet passed)."""
    passed = [False] * len(p)
    for k, i in enumerate(np.argsort(p, kind="stable")):
        if not p[i] <= level / (len(p) - k):
            break
        passed[i] = True
    return passed


def _verdict(word, d, note=""):
    return Verdict(word, float(np.mean(d)), t_interval(d), len(d), note)


def _negative(d, note=""):
    if len(d) >= ENOUGH:
        return _verdict("not reproduced", d, note)
    return _verdict("inconclusive", d, f"a negative result needs {ENOUGH} trials")


def _undecided(d, kind, effect):
    n = trials_for_power(kind, np.std(d, ddof=1), effect) if len(d) > 1 else None
    return _verdict("inconclusive", d, f"80 % power needs {n} trials" if n and n > len(d) else "")


def trials_for_power(kind: str, sd: float, effect: float, power: float = 0.8) -> int | None:
    """Smallest number of trials with that power, up to 1,000, else None. sd: of the per-trial differences.

    direction: to see L > 0 at a true difference `effect`; same, at least matches: to pass at a true difference 0.
    """
    n = np.arange(2, 1001)
    if not sd > 0:
        return 2
    shift = np.minimum(effect * np.sqrt(n) / sd, 30)  # the noncentral t of SciPy fails far out, where power is 1
    p = stats.nct.sf(stats.t.ppf(0.975 if kind == "direction" else 0.95, n - 1), n - 1, shift)
    p = 2 * p - 1 if kind == "same" else p
    return int(n[np.argmax(p >= power)]) if (p >= power).any() else None


# What decides the words ---------------------------------------------------------------------------------------------


def wording(verdict: Verdict, kind: str, evidence: str, unknown: str | None = "") -> Verdict:
    """The verdict in the words that the evidence allows. unknown: a decisive setting that nothing printed states."""
    if evidence == "none" or (evidence in ("reduced", "stand-in") and kind.endswith("value")):
        return replace(verdict, word="not tested", note="")
    if unknown and (verdict.somewhere or verdict.word == "not reproduced"):
        word = verdict.word if verdict.somewhere else "inconclusive"
        verdict = replace(verdict, word=word, note="; ".join(filter(None, [verdict.note, "setting unknown"])))
    if evidence in ("exact", "full"):
        return verdict
    plain, *size = verdict.word.partition(SIZE)
    return replace(verdict, word=SOFTER.get(plain, plain) + "".join(size))


def disagree(verdict: Verdict, other: Verdict) -> bool:
    """Whether two readings of an unknown setting decide a claim in opposite ways: then it depends on the setting."""
    return {verdict.somewhere, other.somewhere} == {True, False} and "not reproduced" in (verdict.word, other.word)


def default_margin(quantity: str, dataset: str) -> float:
    """m in the unit of the claims' files: a factor for iterations and epochs, points for accuracies."""
    if quantity in ("iterations", "epochs"):
        return FACTOR
    if quantity == "train accuracy":
        return TRAIN
    if quantity == "instability":
        return STABLE
    if not quantity.endswith("accuracy") or dataset not in MARGINS:
        raise ValueError(f"No default margin of {quantity} on {dataset}: give one in the claim's row.")
    return MARGINS[dataset]


def censored(step: int, iterations: int) -> bool:
    """The minimum at `step` lies in the last tenth of the training, where a longer one might have found a later one."""
    return step > LATE * iterations


def too_censored(arms: Iterable[Sequence[bool]]) -> bool:
    """arms: for each arm of a cell, which of its minima are `censored`. One arm beyond 20 % suffices."""
    return any(np.mean(arm) > MOST_CENSORED for arm in arms if len(arm))


def baseline_off(ours: ArrayLike, paper: float, margin: float) -> bool:
    """The 95 % interval of ours − paper, one number a trial, lies wholly outside ±2m."""
    low, high = t_interval(np.asarray(ours) - paper)
    return low > 2 * margin or high < -2 * margin


def two_way_interval(d: ArrayLike) -> tuple[float, float]:
    """95 % interval of the mean of d [trials, test images], both a random sample.

    Crossed random effects without replication: Var(mean) = (MS_trials + MS_images − MS_rest) / (trials · images). The
    larger of its root and the standard error over trials, times t with trials − 1 degrees of freedom: at least as wide
    as the interval over trials. Analytic, so no seed is needed.
    """
    d = np.asarray(d, dtype=float)
    n, k = d.shape
    if n < 2:
        return -math.inf, math.inf
    rows, columns, mean = d.mean(axis=1), d.mean(axis=0), d.mean()
    ms_rows = k * rows.var(ddof=1)
    ms_columns = n * columns.var(ddof=1)
    ms_rest = ((d - rows[:, None] - columns + mean) ** 2).sum() / ((n - 1) * (k - 1))
    variance = max((ms_rows + ms_columns - ms_rest) / (n * k), rows.var(ddof=1) / n)
    half = _t(0.975, n - 1) * math.sqrt(variance)
    return float(mean - half), float(mean + half)


def chance(kinds: Iterable[str]) -> float:
    """How many claims of these kinds are expected to pass by chance, were each on the edge of being false.

    Claims in several cells count as one cell, which is more than they are. "up to" counts as two-sided: where all
    trials choose one level, it is scored on what chose it.
    """
    return sum(0.025 if kind.removeprefix(ALL) == "direction" else 0.05 for kind in kinds)
