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
    in all cells      every cell passes at 5 %       half, none opposite     else

What fits none of them is inconclusive. `scorecard` applies the rules to what the store holds.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

KINDS = ("direction", "value", "same", "at least matches", "down to", "up to")
ALL = "in all cells: "  # a prefix of direction, value, same, at least matches
LOG = ("iterations", "epochs", "MACs", "gradient norm", "gradient norm of the copy")  # compared as ratios
MARGINS = {"mnist": 0.2, "fashion_mnist": 0.5, "cifar10": 0.5, "cifar100": 1.0}  # points
FACTOR = 1.15  # the margin of iterations and epochs
MOST_CENSORED = 0.2
ENOUGH = 5  # trials, for a negative result
SOFTER = {"reproduced": "supports", "partly": "mixed", "not reproduced": "contradicts"}


@dataclass(frozen=True)
class Verdict:
    """A word, what it rests on (mean difference d, 95 % interval, number of trials n), and a remark."""

    word: str
    d: float = math.nan
    interval: tuple[float, float] = (-math.inf, math.inf)
    n: int = 0
    note: str = ""

    def __str__(self):
        return f"{self.word} ({self.note})" if self.note else self.word


# The rules ------------------------------------------------------------------------------------------------------------


def t_interval(d, level=0.95):
    """(low, high) of the mean of d, one number a trial; unbounded for fewer than two trials."""
    d = np.asarray(d, dtype=float)
    if len(d) < 2:
        return -math.inf, math.inf
    half = stats.t.ppf((1 + level) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean() - half), float(d.mean() + half)


def direction(d, delta):
    """A > B by about `delta`."""
    mean, (low, high) = np.mean(d), t_interval(d)
    if low > 0:
        return _verdict("reproduced" if mean >= delta / 2 else "partly", d)
    if high < delta / 2:
        return _negative(d, "opposite" if high < 0 else "")
    return _undecided(d, "direction", delta)


def same(d, margin):
    """No difference beyond ±margin; a large p-value is never evidence of it."""
    (low, high), (l90, h90) = t_interval(d), t_interval(d, 0.9)
    if -margin < l90 and h90 < margin:
        return _verdict("reproduced", d)
    return _negative(d) if low > margin or high < -margin else _undecided(d, "same", margin)


def value(d, margin):
    """Ours − paper is zero within ±margin; a single exact number has no interval."""
    return same(d, margin)


def exact(d, margin):
    """Arithmetic: one number, no trials."""
    return Verdict("reproduced" if abs(d) <= margin else "not reproduced", float(d), (float(d), float(d)), 1)


def at_least_matches(d, margin):
    """A is not worse than B by more than `margin`."""
    if t_interval(d, 0.9)[0] > -margin:
        return _verdict("reproduced", d)
    return _negative(d) if t_interval(d)[1] < -margin else _undecided(d, "at least matches", margin)


def down_to(d, denser, margin):
    """At least matches at the paper's density; `denser`: differences at the next denser level."""
    here, there = at_least_matches(d, margin), at_least_matches(denser, margin)
    if here.word != "reproduced" and there.word == "reproduced":
        return replace(here, word="partly", note="only at the next denser level")
    if here.word == "not reproduced" != there.word:
        return replace(here, word="inconclusive", note="the next denser level is undecided")
    return here


def leave_one_out(levels):
    """Differences [levels, trials] → held-out differences [trials] and the level chosen for each on the others."""
    levels = np.asarray(levels, dtype=float)
    others = levels.sum(axis=1, keepdims=True) - levels
    chosen = others.argmax(axis=0)
    return levels[chosen, np.arange(levels.shape[1])], chosen


def up_to(levels, delta):
    """The best of several levels, differences [levels, trials]: a maximum is never tested against dense."""
    if np.shape(levels)[1] < 2:
        return _undecided(np.ravel(levels)[:1], "direction", delta)
    return direction(leave_one_out(levels)[0], delta)


def in_all_cells(kind, cells, margin):
    """`kind` in every cell; cells: differences [cells, trials]. d and interval are those of the worst cell.

    A negative word without an opposite cell means that most cells are open: its note says so.
    """
    each = [_cell(kind, d, margin) for d in cells]
    passed, opposite = sum(p for p, _ in each), any(o for _, o in each)
    at = cells[worst(kind, cells)]
    alone = sum(holm([p_value(kind, d, margin) for d in cells]))
    count, alone = f"{passed} of {len(each)} cells", f"; alone after Holm {alone}"
    if passed == len(each):
        return _verdict("reproduced", at, count + alone)
    if 2 * passed >= len(each) and not opposite:
        return _verdict("partly", at, count + alone)
    return _negative(at, count + ("" if opposite else ", none opposite") + alone)


def worst(kind, cells):
    """Index of the cell that speaks most against the claim: the smallest mean, or the farthest from zero."""
    means = np.mean(cells, axis=1)
    return int(np.argmin(means) if kind in ("direction", "at least matches") else np.argmax(np.abs(means)))


def judge(kind, cells, delta=None, margin=None):
    """The verdict of a claim. cells: differences [cells, trials]; delta and margin in the unit of the differences."""
    delta = 2 * margin if delta is None else delta
    if kind.startswith(ALL):
        return in_all_cells(kind.removeprefix(ALL), cells, margin)
    if kind == "up to":
        return up_to(cells, delta)
    if kind == "down to":
        return down_to(*cells, margin)
    rules = {"direction": direction, "value": value, "same": same, "at least matches": at_least_matches}
    if kind not in rules:
        raise ValueError(f"Unknown kind of claim {kind!r}: give one of {', '.join(KINDS)}, or {ALL}and one of them.")
    return rules[kind](cells[0], delta if kind == "direction" else margin)


def _cell(kind, d, margin):
    """(passes at 5 %, opposite) of one cell."""
    if kind == "direction":
        low, high = t_interval(d)
        return low > 0, high < 0
    word = (at_least_matches if kind == "at least matches" else same)(d, margin).word
    low, high = t_interval(d)
    return word == "reproduced", high < -margin or (kind != "at least matches" and low > margin)


def p_value(kind, d, margin):
    """Of one cell: two-sided for direction (1 when A < B), the larger of two one-sided tests for sameness."""
    n, mean = len(d), np.mean(d)
    error = np.std(d, ddof=1) / math.sqrt(n) if n > 1 else math.inf

    def above(bound, x):  # one-sided p of "the true mean of x exceeds bound"
        return float(x <= bound) if error == 0 else stats.t.sf((x - bound) / error, max(n - 1, 1))

    if kind == "direction":
        return min(1.0, 2 * above(0, mean))
    lower = above(-margin, mean)
    return lower if kind == "at least matches" else max(lower, above(-margin, -mean))


def holm(p, level=0.05):
    """Which single cells of a claim pass alone: step down from the smallest p, level / (cells not yet passed)."""
    passed = [False] * len(p)
    for k, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] > level / (len(p) - k):
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
    return _verdict("inconclusive", d, f"80 % power needs {n} trials" if n else "")


def trials_for_power(kind, sd, effect, power=0.8):
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


def wording(verdict, kind, evidence, unknown=""):
    """The verdict in the words that the evidence allows. unknown: a decisive setting that nothing printed states."""
    if evidence == "none" or (evidence in ("reduced", "stand-in") and kind.endswith("value")):
        return replace(verdict, word="not tested", note="")
    if unknown and verdict.word == "not reproduced":
        return replace(verdict, word="inconclusive", note="setting unknown")
    return verdict if evidence in ("exact", "full") else replace(verdict, word=SOFTER.get(verdict.word, verdict.word))


def default_margin(quantity, dataset):
    """m in the unit of the claims' files: a factor for iterations and epochs, points for accuracies."""
    if quantity in ("iterations", "epochs"):
        return FACTOR
    if not quantity.endswith("accuracy") or dataset not in MARGINS:
        raise ValueError(f"No default margin of {quantity} on {dataset}: give one in the claim's row.")
    return MARGINS[dataset]


def too_censored(arms):
    """arms: for each arm, which of its readings are a minimum on the last evaluation. One arm beyond 20 % suffices."""
    return any(np.mean(arm) > MOST_CENSORED for arm in arms if len(arm))


def baseline_off(ours, paper, margin):
    """The 95 % interval of ours − paper, one number a trial, lies wholly outside ±2m."""
    low, high = t_interval(np.asarray(ours) - paper)
    return low > 2 * margin or high < -2 * margin


def two_way_interval(d):
    """95 % interval of the mean of d [trials, test images], both a random sample.

    Crossed random effects without replication: Var(mean) = (MS_trials + MS_images − MS_rest) / (trials · images), with
    Satterthwaite's degrees of freedom; never narrower than the interval over trials. Analytic, so no seed is needed.
    """
    d = np.asarray(d, dtype=float)
    n, k = d.shape
    if n < 2:
        return -math.inf, math.inf
    rows, columns, mean = d.mean(axis=1), d.mean(axis=0), d.mean()
    ms_rows = k * rows.var(ddof=1)
    ms_columns = n * columns.var(ddof=1)
    ms_rest = ((d - rows[:, None] - columns + mean) ** 2).sum() / ((n - 1) * (k - 1))
    low, high = t_interval(rows)
    variance = (ms_rows + ms_columns - ms_rest) / (n * k)
    if variance <= 0:
        return low, high
    parts = np.array([ms_rows, ms_columns, ms_rest]) / (n * k)
    freedom = variance**2 / (parts**2 / [n - 1, k - 1, (n - 1) * (k - 1)]).sum()
    half = max(stats.t.ppf(0.975, freedom) * math.sqrt(variance), (high - low) / 2)
    return float(mean - half), float(mean + half)


def chance(kinds):
    """How many claims of these kinds would pass, at most, if none of them were true."""
    return sum(0.025 if kind.removeprefix(ALL) in ("direction", "up to") else 0.05 for kind in kinds)


# The reported numbers and the scorecard ------------------------------------------------------------------------------


def claims(paper, reported_dir=None):
    """The rules of a paper's claims, `<paper>_claims.csv`, as a pandas.DataFrame.

    A row without `kind` only names an item that claims nothing testable. arm_a is the larger one: A > B.
    arm: "net/control", variants of a net as "net@variant/control". x: densities in % as the paper prints them (GraSP:
    sparsities), cells separated by ";", "a|b" where A and B differ; for "down to" the paper's density, then the next
    denser level.
    delta, margin, paper_value: points, a factor for iterations. n: trials that a verdict needs; trials_paper: the
    paper's. unknown: a decisive setting that is stated nowhere. added, since: dates of the claim, of its last change.
    """
    from lottery import scorecard as card

    return card.read(paper, "_claims", reported_dir)


def reported(paper, reported_dir=None):
    """The numbers that a paper printed, `<paper>.csv`, as a pandas.DataFrame.

    provenance: "paper" (drawn as the paper's), "secondary", "computed" or "memory" (never drawn as the paper's), each
    with its `source`. series: an arm, "A vs B" for a difference or ratio, or what a threshold says.
    """
    from lottery import scorecard as card

    return card.read(paper, "", reported_dir)


def scorecard(paper=None, store=None, reported_dir=None):
    """{"schema": 1, "rows": [...], "totals": {...}}, ready for strict JSON. store: a `Store`, or its folder."""
    from lottery import scorecard as card

    return card.scorecard(paper, store, reported_dir)


def text(card):
    """The scorecard as lines for a terminal."""
    from lottery import scorecard

    return scorecard.text(card)
