"""The rules of the verdicts by hand-computed examples, and the scorecard on invented runs.

The examples rest on two samples of five: UP = 1, 2, 3, 4, 5 and LEVEL = UP − 3. Both have s = √2.5 = 1.58114, so a
standard error of √0.5 = 0.70711. With t(0.975; 4) = 2.77645 and t(0.95; 4) = 2.13185 the half widths are 1.96324 (95 %)
and 1.50744 (90 %), hence

    UP     95 % [1.03676, 4.96324]   90 % [1.49256, 4.50744]
    LEVEL  95 % [−1.96324, 1.96324]  90 % [−1.50744, 1.50744]
"""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lottery import claims, data, scorecard, verdicts
from lottery.experiments import lth

REPORTED = Path(__file__).parents[1] / "results" / "reported"
UP = np.array([1.0, 2, 3, 4, 5])
LEVEL = UP - 3
DOWN = -UP

# The table, row by row ------------------------------------------------------------------------------------------------

TABLE = [
    # direction: L = 1.037 > 0
    ("direction", [UP], {"delta": 6.0}, "reproduced"),  # d = 3 ≥ 3
    ("direction", [UP], {"delta": 6.1}, "partly"),  # d = 3 < 3.05
    ("direction", [LEVEL], {"delta": 3.93}, "not reproduced"),  # U = 1.96324 < 1.965, L < 0
    ("direction", [LEVEL], {"delta": 3.92}, "inconclusive"),  # U = 1.96324 > 1.96; 4 trials would have done
    ("direction", [LEVEL], {"delta": 2.0}, "inconclusive (80 % power needs 8 trials)"),
    ("direction", [DOWN], {"delta": 3.0}, "not reproduced (opposite)"),  # U = −1.037 < 0
    ("direction", [DOWN[:4]], {"delta": 3.0}, "inconclusive (a negative result needs 5 trials)"),
    # without a stated effect Δ = 2m, so half of it is m
    ("direction", [UP], {"margin": 3.0}, "reproduced"),
    ("direction", [UP], {"margin": 3.1}, "partly"),
    # a value: differences from the paper's number
    ("value", [LEVEL], {"margin": 1.508}, "reproduced"),  # 90 %: 1.50744
    ("value", [LEVEL], {"margin": 1.507}, "inconclusive"),
    ("value", [UP], {"margin": 1.036}, "not reproduced"),  # L = 1.03676 > m
    ("value", [UP], {"margin": 1.037}, "inconclusive"),
    ("value", [DOWN], {"margin": 1.036}, "not reproduced"),
    ("value", [UP[:4] + 9], {"margin": 1.0}, "inconclusive (a negative result needs 5 trials)"),
    # same: the same arithmetic on A − B
    ("same", [LEVEL], {"margin": 1.508}, "reproduced"),
    ("same", [LEVEL], {"margin": 1.507}, "inconclusive"),  # not significant, and yet no evidence of sameness
    ("same", [UP], {"margin": 1.036}, "not reproduced"),
    ("same", [DOWN], {"margin": 1.037}, "inconclusive"),
    # at least matches: one side only
    ("at least matches", [LEVEL], {"margin": 1.508}, "reproduced"),  # 90 % lower bound −1.50744 > −m
    ("at least matches", [LEVEL], {"margin": 1.507}, "inconclusive"),
    ("at least matches", [UP], {"margin": 0.1}, "reproduced"),  # much better is fine
    ("at least matches", [DOWN], {"margin": 1.036}, "not reproduced"),  # U = −1.03676 < −m
    ("at least matches", [DOWN], {"margin": 1.037}, "inconclusive"),
    ("at least matches", [DOWN[:4]], {"margin": 0.1}, "inconclusive (a negative result needs 5 trials)"),
    # down to x %: at the paper's density, then at the next denser level
    ("down to", [LEVEL, DOWN], {"margin": 1.508}, "reproduced"),
    ("down to", [DOWN, UP], {"margin": 1.0}, "partly (only at the next denser level)"),
    ("down to", [LEVEL, UP], {"margin": 1.0}, "partly (only at the next denser level)"),
    ("down to", [DOWN, DOWN], {"margin": 1.0}, "not reproduced"),
    ("down to", [DOWN, LEVEL], {"margin": 1.0}, "inconclusive (the next denser level is undecided)"),
    ("down to", [LEVEL, DOWN], {"margin": 1.0}, "inconclusive"),
    # up to: one level alone is that level's direction
    ("up to", [UP], {"delta": 6.0}, "reproduced"),
    ("up to", [UP], {"delta": 6.1}, "partly"),
    ("up to", [DOWN], {"delta": 3.0}, "not reproduced (opposite)"),
    ("up to", [LEVEL], {"delta": 3.92}, "inconclusive"),
    # best value: one level alone is that level's value
    ("best value", [LEVEL], {"margin": 1.508}, "reproduced"),
    ("best value", [LEVEL], {"margin": 1.0}, "inconclusive"),
    ("best value", [DOWN], {"margin": 0.52}, "not reproduced"),
    # in all cells: UP passes, LEVEL is open, DOWN is negative. A cell is negative at 1 − 0.05/k: t(0.9875; 4) = 3.49541
    # for two cells, t(0.99167; 4) = 3.96079 for three, so half widths of 2.47163 and 2.80070
    ("in all cells: direction", [UP, UP], {"margin": 1.0}, "reproduced (2 of 2 pass)"),
    ("in all cells: direction", [UP, LEVEL], {"margin": 1.0}, "partly (1 of 2 pass, 1 open)"),
    ("in all cells: direction", [UP, DOWN], {"margin": 1.0}, "not reproduced (1 of 2 pass, 1 negative)"),
    ("in all cells: direction", [UP, LEVEL, LEVEL], {"margin": 2.80}, "inconclusive (1 of 3 pass, 2 open)"),
    ("in all cells: direction", [UP, LEVEL, LEVEL], {"margin": 2.81}, "not reproduced (1 of 3 pass, 2 negative)"),
    (
        "in all cells: direction",
        [LEVEL, LEVEL],
        {"margin": 1.97},
        "inconclusive (0 of 2 pass, 2 open)",
    ),  # alone: 1.96324
    ("in all cells: direction", [UP] * 2 + [LEVEL] * 2, {"margin": 1.0}, "partly (2 of 4 pass, 2 open)"),
    (
        "in all cells: direction",
        [UP[:4], DOWN[:4]],
        {"margin": 1.0},
        "inconclusive (1 of 2 pass, 1 negative; a negative result needs 5 trials)",
    ),
    ("in all cells: direction", [UP / 10], {"margin": 1.0}, "reproduced (1 of 1 pass)"),  # U < m, and yet it passes
    # cells that the claim names and no run could test count: none of them passes, none is negative
    ("in all cells: direction", [UP, UP], {"margin": 1.0, "named": 3}, "partly (2 of 3 pass, 1 not tested)"),
    ("in all cells: direction", [UP], {"margin": 1.0, "named": 3}, "inconclusive (1 of 3 pass, 2 not tested)"),
    (
        "in all cells: direction",
        [LEVEL],
        {"margin": 2.80, "named": 3},
        "inconclusive (0 of 3 pass, 1 open, 2 not tested)",
    ),
    ("in all cells: same", [LEVEL, LEVEL], {"margin": 1.508}, "reproduced"),
    ("in all cells: same", [LEVEL, DOWN - 0.9], {"margin": 1.508}, "partly"),  # U = −3.9 + 2.47163 = −1.428
    ("in all cells: same", [LEVEL, DOWN - 1], {"margin": 1.508}, "not reproduced"),  # U = −1.528 < −m
    ("in all cells: same", [LEVEL, UP + 1], {"margin": 1.508}, "not reproduced"),
    ("in all cells: same", [UP / 9, UP / 9, UP], {"margin": 0.5}, "inconclusive"),  # 3 − 2.80 < 0.5
    ("in all cells: value", [LEVEL, LEVEL], {"margin": 1.508}, "reproduced"),
    ("in all cells: at least matches", [LEVEL, UP], {"margin": 1.508}, "reproduced"),
    ("in all cells: at least matches", [UP, DOWN], {"margin": 0.52}, "not reproduced"),  # U = −0.52837
    ("in all cells: at least matches", [UP, DOWN], {"margin": 0.53}, "partly"),
    ("in all cells: at least matches", [UP, LEVEL], {"margin": 1.0}, "partly"),
]


@pytest.mark.parametrize(("kind", "cells", "given_", "expected"), TABLE)
def test_every_row_of_the_table(kind, cells, given_, expected):
    verdict = claims.judge(kind, np.array(cells), **given_)
    assert (str(verdict) if "(" in expected else verdict.word) == expected


def test_the_table_reaches_every_word_of_every_kind():
    words = {"reproduced", "partly", "not reproduced", "inconclusive"}
    reached = {}
    for kind, _, _, expected in TABLE:
        reached.setdefault(kind.split(":")[0], set()).add(expected.split(" (")[0])
    two = words - {"partly"}
    assert reached == {
        **dict.fromkeys(("direction", "down to", "up to", "in all cells"), words),
        **dict.fromkeys(("value", "same", "at least matches", "best value"), two),
    }


def test_a_verdict_carries_mean_interval_and_trials():
    v = claims.direction(UP, 6.0)
    assert (v.d, v.n) == (3.0, 5)
    assert v.interval == pytest.approx((1.03676, 4.96324), abs=1e-5)


def test_one_trial_decides_nothing():
    for kind in claims.KINDS:
        cells = np.array([[9.0]] * (2 if kind == "down to" else 1))
        assert claims.judge(kind, cells, margin=0.1).word == "inconclusive", kind
    assert claims.t_interval([1.0]) == (-math.inf, math.inf)


def test_exact_numbers_have_no_interval():
    assert claims.exact(-592, 1000).word == "reproduced"  # 38,592 printed as 38K
    assert claims.exact(561_184, 100_000).word == "not reproduced"  # 2,261,184 printed as 1.7M


def test_unknown_kind_is_one_line():
    with pytest.raises(ValueError, match=r"Unknown kind of claim 'better'.*one of direction, value"):
        claims.judge("better", [UP], margin=1.0)


def test_iterations_are_compared_as_logarithms_of_ratios():
    # twice as fast in every trial, whatever the level: d = log 2, no spread; 38 % earlier is a factor 1/0.62 = 1.613
    d = np.log([8000, 6000, 4000, 7000, 5000]) - np.log([4000, 3000, 2000, 3500, 2500])
    v = claims.judge("direction", [d], delta=math.log(1.613), margin=math.log(1.15))
    assert v.word == "reproduced"
    assert math.exp(v.d) == pytest.approx(2)


def test_leave_one_trial_out():
    # trial 0: the others say A (2 + 3 against 2 + 0), which gives 1; trial 1: A (1 + 3 against 3 + 0), 2;
    # trial 2: B (3 + 2 against 1 + 2), 0. Mean 1, where the better level's own mean, picked afterwards, is 2.
    scores, chosen = claims.leave_one_out([[1, 2, 3], [3, 2, 0]])
    assert scores.tolist() == [1, 2, 0]
    assert chosen.tolist() == [0, 0, 1]
    assert claims.up_to(np.array([[1, 2, 3], [3, 2, 0.0]]), 1.0).d == 1.0


def test_the_best_of_noisy_levels_does_not_beat_dense():
    # the trap: each level shines in one trial. The best of 5 picked in each trial would be +1 five times out of five.
    levels = np.eye(5) * 1.25 - 0.25
    assert claims.up_to(levels, 1.0).word == "not reproduced"


def test_the_best_of_levels_is_not_refuted_while_some_are_not_tested():
    levels = np.eye(5) * 1.25 - 0.25
    for kind, some in (("up to", levels), ("best value", levels - 9)):
        assert claims.judge(kind, some, 1.0, 0.5, named=5).word == "not reproduced"
        few = claims.judge(kind, some, 1.0, 0.5, named=6)
        assert (few.word, few.note) == ("inconclusive", "5 of 6 levels" + "; opposite" * (kind == "up to"))
    best = claims.judge("up to", [UP], 2.0, 0.5, named=3)
    assert (best.word, best.note) == ("reproduced", "1 of 3 levels")


def test_holm_steps_down():
    assert claims.holm([0.01, 0.04, 0.03]) == [True, False, False]  # 0.01 ≤ 0.05/3; 0.03 > 0.05/2
    assert claims.holm([0.04, 0.01, 0.02]) == [True, True, True]  # 0.01 ≤ 0.05/3; 0.02 ≤ 0.05/2; 0.04 ≤ 0.05
    assert claims.holm([0.03, 0.02]) == [True, True]
    assert claims.holm([0.026, 0.026]) == [False, False]  # both > 0.05/2


def test_p_values():
    # UP: t = 3/0.70711 = 4.24264, two-sided p = 0.01324; against −m = −1: t = 4/0.70711 = 5.65685, p = 0.00240
    assert claims.p_value("direction", UP, 1.0) == pytest.approx(0.01324, abs=1e-5)
    assert claims.p_value("direction", DOWN, 1.0) == 1.0
    assert claims.p_value("at least matches", UP, 1.0) == pytest.approx(0.00240, abs=1e-5)
    # LEVEL within ±2: t = 2/0.70711 = 2.82843, p = 0.02372 on either side
    assert claims.p_value("same", LEVEL, 2.0) == pytest.approx(0.02372, abs=1e-5)
    assert claims.p_value("direction", np.ones(5), 1.0) == 0.0


def test_trials_for_80_percent_power_are_the_textbook_ones():
    # one-sample t-test, two-sided 5 %: effects of 0.5, 0.8 and 1 standard deviation need 34, 15 and 10
    assert [claims.trials_for_power("direction", 1.0, e) for e in (0.5, 0.8, 1.0)] == [34, 15, 10]
    # one-sided 5 %: 27, 12 and 8
    assert [claims.trials_for_power("at least matches", 1.0, e) for e in (0.5, 0.8, 1.0)] == [27, 12, 8]
    # sameness at a true difference 0: about (1.645 + 1.282)² = 8.56 for a margin of 1 standard deviation, t adds two
    assert claims.trials_for_power("same", 1.0, 1.0) in (10, 11)
    assert claims.trials_for_power("direction", 1.0, 0.01) is None
    assert claims.trials_for_power("direction", 0.0, 1.0) == 2


# What decides the words -----------------------------------------------------------------------------------------------


def test_words_by_evidence():
    def say(word, kind, evidence, unknown=""):
        return str(claims.wording(claims.Verdict(word), kind, evidence, unknown))

    for evidence in ("exact", "full"):
        for word in ("reproduced", "partly", "not reproduced", "inconclusive"):
            assert say(word, "value", evidence) == word
    for evidence in ("reduced", "stand-in"):
        assert say("reproduced", "same", evidence) == "supports"
        assert say("partly", "direction", evidence) == "mixed"
        assert say("not reproduced", "direction", evidence) == "contradicts"
        assert say("inconclusive", "direction", evidence) == "inconclusive"
        assert (
            say("reproduced", "value", evidence) == say("reproduced", "in all cells: value", evidence) == "not tested"
        )
        assert say("reproduced, size differs", "direction", evidence) == "supports, size differs"
        assert say("not reproduced", "direction", evidence, "batch size") == "inconclusive (setting unknown)"
        assert say("partly", "direction", evidence, "batch size") == "mixed (setting unknown)"
    assert say("reproduced", "direction", "none", "batch size") == "not tested"
    assert say("not reproduced", "direction", "full", "batch size") == "inconclusive (setting unknown)"
    assert say("reproduced", "direction", "full", "batch size") == "reproduced (setting unknown)"
    assert say("reproduced, size differs", "direction", "full", "x") == "reproduced, size differs (setting unknown)"
    assert say("inconclusive", "direction", "full", "batch size") == "inconclusive"
    noted = claims.wording(claims.Verdict("reproduced", note="2 of 2 pass"), "direction", "full", "batch size")
    assert str(noted) == "reproduced (2 of 2 pass; setting unknown)"


def test_the_size_differs_where_the_interval_excludes_the_papers():
    up = claims.direction(UP, 2.0)  # [1.03676, 4.96324]

    def say(kind, *size):
        return claims.sized(up, kind, *size).word

    assert say("direction", 1.03) == say("direction", 4.97) == "reproduced, size differs"
    assert say("direction", 1.04) == say("direction", 4.96) == "reproduced"
    assert say("direction", 5.2, 0.2) == "reproduced, size differs"  # read off as 5.2 ± 0.2: from 5.0
    assert say("direction", 5.2, 0.3) == "reproduced"
    assert say("in all cells: value", 0) == say("value", 0) == "reproduced, size differs"
    assert say("up to", 9) == say("same", 9) == "reproduced"  # neither gives a size
    assert claims.sized(claims.direction(UP, 6.1), "direction", 6.1).word == "partly"
    assert str(claims.sized(up, "direction", 1.9, 2.83)) == "reproduced (paper's size unknown)"
    # a value within ±m, and yet not the paper's: LEVEL/10 + 0.3 has 95 % [0.104, 0.496], 90 % [0.149, 0.451]
    assert claims.sized(claims.value(LEVEL / 10 + 0.3, 0.5), "value", 0).word == "reproduced, size differs"


def test_two_readings_of_a_setting_disagree_when_they_decide_in_opposite_ways():
    yes, partly, no, open_ = map(
        claims.Verdict, ("reproduced, size differs", "partly", "not reproduced", "inconclusive")
    )
    assert claims.disagree(yes, no)
    assert claims.disagree(no, partly)
    assert not any(claims.disagree(a, b) for a, b in [(yes, yes), (yes, open_), (no, open_), (no, no), (yes, partly)])


def test_margins():
    assert [claims.default_margin("test accuracy", d) for d in claims.MARGINS] == [0.2, 0.5, 0.5, 1.0]
    assert claims.default_margin("iterations", "mnist") == 1.15
    assert claims.default_margin("train accuracy", "mnist") == claims.default_margin("train accuracy", "digits") == 0.05
    with pytest.raises(ValueError, match="No default margin of MACs"):
        claims.default_margin("MACs", "mnist")
    with pytest.raises(ValueError, match="No default margin of test accuracy on digits"):
        claims.default_margin("test accuracy", "digits")


def test_a_minimum_in_the_last_tenth_is_censored():
    assert claims.censored(45_001, 50_000)
    assert not claims.censored(45_000, 50_000)


def test_censoring_beyond_a_fifth_of_an_arm():
    assert not claims.too_censored([[True] + [False] * 4, [False] * 5])  # 1 of 5 is 20 %, not more
    assert claims.too_censored([[False] * 5, [True, True] + [False] * 3])
    assert not claims.too_censored([[], [False]])


def test_baseline_gate():
    # 93.4, 93.5, 93.6 against 90.5: 3.0 ± 4.30265 · 0.1/√3 = 0.24842, so it starts at 2.75158
    ours = [93.4, 93.5, 93.6]
    assert claims.baseline_off(ours, 90.5, 1.37)  # ±2.74
    assert not claims.baseline_off(ours, 90.5, 1.38)  # ±2.76
    assert claims.baseline_off([2 * 90.5 - a for a in ours], 90.5, 1.37)
    assert not claims.baseline_off([99.0], 90.5, 0.5)


def test_two_way_interval_by_hand():
    # rows 1, 2, 3 and columns 1, 3 without rest: MS_trials = 2 · 1 = 2, MS_images = 3 · 2 = 6, Var = 8/6 = 1.3333,
    # more than 1/3 over trials; t(0.975; 2) = 4.30265
    low, high = claims.two_way_interval([[0, 2], [1, 3], [2, 4]])
    assert (low, high) == pytest.approx((2 - 4.30265 * math.sqrt(4 / 3), 2 + 4.30265 * math.sqrt(4 / 3)), rel=1e-5)
    # MS_trials = 1/6, MS_images = 0, MS_rest = 1/2: no image variance, the interval over trials remains
    assert claims.two_way_interval([[1, 0], [0, 1], [1, 1]]) == pytest.approx(claims.t_interval([0.5, 0.5, 1]))
    assert claims.two_way_interval([[1, 0]]) == (-math.inf, math.inf)


def test_chance():
    # two claims of a direction at 2.5 % each, one of sameness and one of a chosen level at 5 %
    assert claims.chance(["direction", "up to", "in all cells: direction", "same"]) == pytest.approx(0.15)


# Properties -----------------------------------------------------------------------------------------------------------

samples = st.lists(st.integers(-1000, 1000).map(lambda i: i / 100), min_size=5, max_size=12).map(np.array)
positive = st.integers(1, 500).map(lambda i: i / 100)
RANK = {"not reproduced": 0, "inconclusive": 1, "partly": 2, "reproduced": 3}


@given(samples, st.sampled_from([0.9, 0.95]))
def test_t_interval_is_scipys(d, level):
    if d.std() > 0:
        expected = stats.ttest_1samp(d, 0).confidence_interval(level)
        assert claims.t_interval(d, level) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(samples, positive)
def test_antisymmetry(d, effect):
    if claims.direction(d, effect).word in ("reproduced", "partly"):
        assert str(claims.direction(-d, effect)) == "not reproduced (opposite)"
    assert claims.same(d, effect).word == claims.same(-d, effect).word


@given(samples, positive, positive)
def test_more_of_a_is_never_worse_for_a(d, effect, more):
    for rule in (claims.direction, claims.at_least_matches):
        before, after = RANK[rule(d, effect).word], RANK[rule(d + more, effect).word]
        assert after >= before


@given(samples, positive, positive)
def test_a_wider_margin_never_hurts(d, margin, more):
    for rule in (claims.same, claims.at_least_matches):
        assert RANK[rule(d, margin + more).word] >= RANK[rule(d, margin).word]


@given(samples, positive)
def test_units_do_not_matter(d, effect):
    scaled = claims.direction(8 * d, 8 * effect)
    assert (scaled.word, scaled.note) == (claims.direction(d, effect).word, claims.direction(d, effect).note)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_bonferroni_and_none(p):
    for value, passed in zip(p, claims.holm(p), strict=True):
        assert passed or value > 0.05 / len(p)
        assert not passed or value <= 0.05


@given(st.lists(samples.map(lambda d: d[:5]), min_size=2, max_size=4))
def test_a_held_out_score_is_one_of_the_trials_own(levels):
    levels = np.array(levels)
    scores, chosen = claims.leave_one_out(levels)
    for trial, (score, level) in enumerate(zip(scores, chosen, strict=True)):
        assert score == levels[level, trial]
        others = np.delete(levels, trial, axis=1).sum(axis=1)
        assert others[level] == pytest.approx(others.max())


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_second_interval_contains_the_first(n, seed):
    d = np.random.default_rng(seed).integers(-1, 2, size=(n, 40))
    low, high = claims.two_way_interval(d)
    inner = claims.t_interval(d.mean(axis=1))
    assert low <= inner[0] + 1e-12
    assert inner[1] <= high + 1e-12


# The files ------------------------------------------------------------------------------------------------------------

PRIMARY = {  # verdicts.md, LTH
    "lth-fig4-early-stop-21",
    "lth-fig4-accuracy-13",
    "lth-fig4-reinit-accuracy-21",
    "lth-fig4-reinit-speed-21",
    "lth-fig4-matches-dense-3.6",
    "lth-fig4-iterative-beats-oneshot-10",
    "lth-fig5-conv2-accuracy-4.6",
    "lth-fig8-lr0.1-imp-like-reinit",
    "lth-fig8-rewind-500",
}
NETS = ("lenet", "conv2", "conv4", "conv6", "resnet18", "vgg19")
CONTROLS = (
    *("dense", "imp", "reinit", "random", "oneshot", "oneshot-reinit", "continued", "dm-reinit", "prune-at-init"),
    *("noise-0.5", "noise-3", "rewind-100", "rewind-500", "rewind-2000"),
    *("instability-0", "instability-500", "instability-2000"),
)
ITEMS = {f"Figure {i}" for i in range(1, 46)}
ITEMS |= {f"Rewinding (arXiv 1903.01611), Figure {i}" for i in (3, 4, 5)}
ITEMS |= {f"Instability (arXiv 1912.05671), Figure {i}" for i in (3, 5)}
ARM = re.compile(rf"({'|'.join(NETS)})(@[a-z0-9.-]+)?/({'|'.join(map(re.escape, CONTROLS))})")


@pytest.fixture(scope="module")
def rules():
    return scorecard.claims("lth", REPORTED)


def test_claims_of_lth_are_well_formed(rules):
    assert rules["id"].is_unique
    tested = rules[rules["kind"] != ""]
    assert set(tested["kind"].str.removeprefix(claims.ALL)) <= set(claims.KINDS)
    assert set(tested["value_source"]) <= {"paper", "authors' code", "secondary", "computed", "memory"}
    for c in tested.to_dict("records"):
        assert ARM.fullmatch(c["arm_a"]), c["id"]
        assert c["arm_b"] == "" or ARM.fullmatch(c["arm_b"]), c["id"]
        assert c["quantity"] in (*scorecard.EXACT, *scorecard.ACCURACIES, "iterations", "instability"), c["id"]
        assert c["reading"] in (("",) if c["quantity"] in scorecard.EXACT else ("early_stop", "last")), c["id"]
        assert (c["arm_b"] == "") == c["kind"].endswith("value"), c["id"]
        assert not c["kind"].endswith("value") or c["paper_value"] >= 0, c["id"]
        cells = scorecard._cells(c)
        assert len(cells) == 2 if c["kind"] == "down to" else len(cells) > 1 or not c["kind"].startswith("in all"), c[
            "id"
        ]
        assert cells[0][0] is None or all(0 < x <= 100 for cell in cells for x in cell), c["id"]
        assert c["kind"] != "down to" or cells[0] < cells[1], c["id"]


@pytest.mark.parametrize("paper", scorecard.papers(REPORTED))
def test_claims_of_every_paper_are_well_formed(paper):
    rules = scorecard.claims(paper, REPORTED)
    assert rules["id"].is_unique
    assert rules["id"].str.startswith(f"{paper}-").all()
    tested = rules[rules["kind"] != ""]
    assert set(tested["kind"].str.removeprefix(claims.ALL)) <= set(claims.KINDS)
    assert set(rules["alternative"]) <= {"", *tested["id"]}
    alike = r"as (fast|good|well|accurate) as|no (better|worse|more)|little better"
    for c in tested.to_dict("records"):
        assert not (c["kind"].endswith("same") and re.search(alike, c["text"])), f"{c['id']}: at least matches"
        assert c["arm_b"] == "" or not c["kind"].endswith("value"), c["id"]
        assert not c["kind"].endswith("value") or not math.isnan(c["paper_value"]), c["id"]
        assert not c["kind"].startswith(claims.ALL) or ";" in c["x"], f"{c['id']}: one cell alone is no range"
        assert not c["alternative"] or c["unknown"], f"{c['id']}: which setting has two readings?"


def test_margins_effects_and_trials_follow_the_rules(rules):
    for c in rules[rules["kind"] != ""].to_dict("records"):
        if c["quantity"] in scorecard.EXACT:
            continue
        mnist = c["arm_a"].startswith("lenet")
        default = claims.default_margin(c["quantity"], "mnist" if mnist else "cifar10")
        if c["id"] != "lth-fig7-lr0.01-within-1":  # the paper itself says "within 1 point"
            assert c["margin"] == default, c["id"]
        if c["kind"] in ("direction", "up to"):
            none_stated = math.isnan(c["paper_value"])
            twice = default**2 if c["quantity"] == "iterations" else 2 * default
            if none_stated and "33-" not in c["id"]:
                assert c["delta"] == pytest.approx(twice), c["id"]
            least = 0 if math.isnan(c["error"]) else c["error"]  # "2 to 3 points" is 2.5 ± 0.5, of which 2 are promised
            if c["id"] == "lth-fig14-lenet-imp-above-random":  # printed means: their ± are the error, all is promised
                least = 0
            assert none_stated or c["delta"] == c["paper_value"] - least, c["id"]
        else:
            assert math.isnan(c["delta"]), c["id"]
        paper = 0 if math.isnan(c["trials_paper"]) else c["trials_paper"]
        assert c["n"] == (10 if c["primary"] and mnist else max(5, paper)), c["id"]


def test_primary_claims_are_those_of_the_rules(rules):
    assert set(rules[rules["primary"] == 1]["id"]) == PRIMARY


def test_every_figure_has_a_row_and_ids_are_anchors(rules):
    assert set(rules["item"]) == ITEMS
    for c in rules.to_dict("records"):
        short = re.sub(r" \(.*\), figure |figure ", lambda m: "-fig" if ")" in m[0] else "fig", c["item"].lower())
        assert c["id"].startswith(f"lth-{short}") or c["id"].startswith("lth-instability-"), c["id"]


RULE = ("kind", "arm_a", "arm_b", "quantity", "reading", "x", "delta", "margin", "n", "paper_value", "primary")


def _git(*arguments):
    try:
        done = subprocess.run(["git", "-C", REPORTED, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git here: the history of the rules cannot be read")
    if done.returncode:
        pytest.skip(f"no history of the rules here: {done.stderr.strip()}")
    return done.stdout


def _history(name):
    """{id: (when it was committed, when its rule last changed)} of a file of rules, by its commits' authors' clocks."""
    since, added, rule = {}, {}, {}
    for line in _git("log", "--reverse", "--format=%H %P %aI", "--", name).splitlines():
        commit, *parents, when = line.split()
        for row in csv.DictReader(io.StringIO(_git("show", f"{commit}:./{name}"))):
            now = [_number(row[field] or "") for field in RULE]
            added.setdefault(row["id"], parents and when)
            if rule.get(row["id"]) != now:
                rule[row["id"]], since[row["id"]] = now, parents and when
    return {i: (added[i], since[i]) for i in rule}, rule


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("path", sorted(REPORTED.glob("*_claims.csv")), ids=lambda path: path.stem)
def test_times_of_claims_are_those_of_their_commits(path):
    """`added` and `since` cannot be earlier than what git says, but for the two hours that a commit may take."""
    if _git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("a shallow clone: the history of the rules is not here")
    history, committed = _history(path.name)
    hours = timedelta(hours=2)
    now = datetime.now(UTC)
    with open(path) as f:
        for row in csv.DictReader(f):
            added, since = (datetime.fromisoformat(row[k]) for k in ("added", "since"))
            assert None not in (added.tzinfo, since.tzinfo), f"{row['id']}: name a time zone, 2026-11-28T08:00:00+00:00"
            assert added <= since <= now, row["id"]
            first, last = history.get(row["id"], ((), ()))
            if first:  # else not committed yet, or with the first commit of a history that was cut
                assert added >= datetime.fromisoformat(first) - hours, row["id"]
            if last and row["kind"] and [_number(row[k]) for k in RULE] == committed[row["id"]]:
                assert since >= datetime.fromisoformat(last) - hours, row["id"]


def test_reported_numbers_have_a_source():
    frame = scorecard.reported("lth", REPORTED)
    assert set(frame["provenance"]) == {"paper", "secondary", "computed", "memory"}
    assert frame["value"].notna().all()
    assert (frame["source"] != "").all()
    assert (frame[frame["provenance"] == "paper"]["source"] == "arXiv 1803.03635v5").all()
    assert ((frame["x"].notna()) == (frame["x_unit"] != "")).all()
    point = frame[(frame["item"] == "Figure 4") & (frame["panel"] == "a/early stop") & (frame["x"] == 21.1)]
    assert sorted(point["value"]) == [-38, 2.51]


def test_claims_and_points_agree(rules):
    """Every effect that a claim takes from the paper is a printed point of the same item."""
    frame = scorecard.reported("lth", REPORTED)
    for c in rules[(rules["value_source"] == "paper") & rules["paper_value"].notna()].to_dict("records"):
        if c["id"] in (
            "lth-fig4-early-stop-21",
            "lth-fig4-early-stop-3.6",
            "lth-fig12-train-ticket-5",
            "lth-fig12-train-reinit-5",
        ):
            continue  # printed as "38 % earlier", as "back to"; beside Figure 4
        values = set(frame[frame["item"] == c["item"]]["value"])
        error = 0 if math.isnan(c["error"]) else c["error"]
        assert {c["paper_value"] - error, c["paper_value"] + error} <= values, c["id"]


# The scorecard on invented runs ---------------------------------------------------------------------------------------

N_TEST = 1000
ITERATIONS = {"paper": 1000, "laptop": 300, "smoke": 100}


class Invented:
    """An experiments module of a few arms. Accuracies: `accuracy(name, x, trial)` in %, iterations likewise."""

    scales, exact, networks, reads = ("paper", "laptop", "smoke"), {}, {}, {}
    nets = ("lenet",)
    draws = 1
    missing = ()
    prints, place, density = "density", staticmethod(lambda name, x: None), staticmethod(lambda x: x / 100)

    def setting(self, scale):
        return SimpleNamespace(trials=5)

    def measured(self, item, name, x, trial, scale):
        return None

    def arm(self, name, x, trial, scale):
        if name.split("/")[0] not in self.nets or (scale, x) in self.missing:
            return None
        draws = self.draws if name.endswith("reinit") else 1
        x = None if name.endswith("dense") else x
        return [self.run(name, x, trial, scale, draw) for draw in range(draws)]

    def run(self, name, x, trial, scale, draw):
        recipe = {"iterations": ITERATIONS[scale], "lr": 0.1}
        dataset = "digits" if scale == "smoke" else "cifar10" if "resnet" in name else "mnist"
        spec = {"model": name.split("/")[0], "dataset": dataset, "recipe": recipe, "seed": trial, "draw": draw}
        key = f"{scale} {name} {x} {trial} {draw}"
        return SimpleNamespace(
            key=key, dataset=dataset, recipe=SimpleNamespace(**recipe), spec=lambda: spec, at=(name, x, trial, draw)
        )

    def store(self, scale, accuracy, step=lambda *at: 100, trials=5, xs=(), **changed):
        """Rows of all arms at one scale. accuracy and step are functions of (arm, x, trial, draw)."""
        rows = {}
        controls = ("dense", "imp", "reinit", "random", "oneshot")
        for name in [f"{net}/{control}" for net in self.nets for control in controls]:
            for x in xs:
                for trial in range(trials):
                    for r in self.arm(name, x, trial, scale) or ():
                        rows[r.key] = self.row(r, accuracy(*r.at), step(*r.at)) | changed
        return rows

    def row(self, r, accuracy, step):
        hits = round(N_TEST * accuracy / 100)
        reading = {"step": step, "val_acc": accuracy / 100, "test_acc": hits / N_TEST, "train_acc": 1.0}
        reading["correct"] = np.packbits(np.arange(N_TEST) < hits).tobytes()
        row = {"key": r.key, "model": r.spec()["model"], "dataset": r.dataset, "status": "finished", "stale": False}
        row |= {"density": 1.0 if r.at[1] is None else r.at[1] / 100}
        row |= {"fingerprint": scorecard.FINGERPRINTS.get(r.dataset, "digits"), "device": "CPU", "censored": False}
        row |= {"started": "2026-11-21T00:00:01Z", "iterations": r.recipe.iterations, "n_test": N_TEST}
        return row | {f"{at}_{k}": v for at in ("early_stop", "last") for k, v in reading.items()}


def claim(**changed):
    c = dict.fromkeys(
        ["panel", "arm_b", "delta", "paper_value", "error", "unknown", "alternative", "was", "trials_paper"], ""
    )
    c |= {"id": "lth-fig4-x", "item": "Figure 4", "text": "A beats B.", "kind": "direction", "arm_a": "lenet/imp"}
    c |= {"arm_b": "lenet/dense", "quantity": "test accuracy", "reading": "early_stop", "x": "21.1", "margin": 0.2}
    c |= {"n": 5, "value_source": "paper", "primary": 0, "item_source": "paper"}
    return c | {"added": "2026-11-21", "since": "2026-11-21"} | changed


def judged(experiment, stored, c, reported=None):
    reported = scorecard.reported("lth", REPORTED) if reported is None else reported
    return scorecard.Judge("lth", experiment, stored, reported).row(c)


def better(name, x, trial, draw):
    """Tickets gain 1.0 to 1.4 points on their dense network, 1.2 on average."""
    return 90 + trial + (1 + 0.1 * trial if name.endswith("imp") else 0)


def test_a_row_has_exactly_the_fields_and_the_right_words():
    lab = Invented()
    row = judged(lab, lab.store("paper", better, xs=[21.1]), claim(delta=1.1, paper_value=1.1, trials_paper=5.0))
    assert tuple(row) == scorecard.FIELDS
    # differences 1.0, 1.1, 1.2, 1.3, 1.4: 1.2 ± 2.77645 · 0.158114/√5 = 0.196324
    assert row["ours"] == pytest.approx(1.2)
    assert row["interval"] == pytest.approx([1.003676, 1.396324], abs=1e-5)
    assert row["interval_images"][0] <= row["interval"][0]
    assert (row["evidence"], row["verdict"], row["steps_fraction"]) == ("full", "reproduced", 1)
    assert (row["trials"], row["trials_paper"], row["coverage"]) == (5, 5, "1 of 1 cells")
    assert row["command"] == "lottery run lth lth-fig4-x --scale paper"
    assert row["rule"] == "direction; Δ = 1.1; m = 0.2; n = 5"
    assert (row["stale"], row["was"], row["all_trials"]) == (None, None, None)
    assert row["p"] == pytest.approx(7.1e-5, abs=1e-6)  # t₄ = 1.2/0.0707107 = 16.97


def test_the_best_complete_scale_is_used_and_partial_ones_are_mentioned():
    lab = Invented()
    stored = lab.store("laptop", better, xs=[21.1]) | lab.store("paper", better, xs=[21.1], trials=2)
    row = judged(lab, stored, claim(delta=1.0))
    assert (row["evidence"], row["verdict"], row["steps_fraction"]) == ("reduced", "supports", 0.3)
    assert row["coverage"] == "1 of 1 cells; paper 4 of 10 runs"
    assert row["command"] == "lottery run lth lth-fig4-x --scale laptop"


def test_full_evidence_at_a_lower_scale_goes_before_too_few_trials_at_a_higher_one(monkeypatch):
    """The paper's five trials are complete, and ten of the paper's trainings are declared at a scale of their own."""
    lab = Invented()
    monkeypatch.setitem(ITERATIONS, "laptop", ITERATIONS["paper"])
    stored = lab.store("paper", better, xs=[21.1]) | lab.store("laptop", better, xs=[21.1], trials=10)
    row = judged(lab, stored, claim(delta=1.0, n=10))
    assert (row["evidence"], row["trials"], row["steps_fraction"]) == ("full", 10, 1)
    assert row["command"] == "lottery run lth lth-fig4-x --scale laptop --trials 10"


def test_of_two_reduced_scales_the_one_with_more_cells_is_used(monkeypatch):
    lab = Invented()
    lab.scales, lab.missing = ("paper", "laptop", "short"), {("laptop", 2.9)}
    monkeypatch.setitem(ITERATIONS, "short", 200)
    stored = lab.store("laptop", better, xs=[21.1]) | lab.store("short", better, xs=[21.1, 2.9])
    row = judged(lab, stored, claim(kind="in all cells: direction", x="21.1;2.9"))
    assert (row["evidence"], row["steps_fraction"]) == ("reduced", 0.2)
    assert row["coverage"] == "2 of 2 cells; laptop 10 of 10 runs"


def test_nothing_stored_is_no_evidence_and_names_the_command():
    lab = Invented()
    row = judged(lab, {}, claim())
    assert (row["evidence"], row["verdict"], row["ours"], row["coverage"]) == (
        "none",
        "not tested",
        None,
        "0 of 1 cells",
    )
    assert row["command"] == "lottery run lth lth-fig4-x --scale paper"
    assert judged(lab, {}, claim(n=10))["command"] == "lottery run lth lth-fig4-x --scale paper"
    nowhere = judged(lab, {}, claim(arm_a="vgg19@0.1/imp"))
    assert (nowhere["evidence"], nowhere["command"], nowhere["coverage"]) == ("none", None, None)
    assert judged(None, {}, claim())["evidence"] == "none"


def test_fewer_trials_than_the_claim_asks_for_are_reduced_evidence():
    lab = Invented()
    row = judged(lab, lab.store("paper", better, xs=[21.1]), claim(n=10, delta=1.0))
    assert (row["evidence"], row["verdict"], row["trials"]) == ("reduced", "supports", 5)
    row = judged(lab, lab.store("paper", better, xs=[21.1], trials=10), claim(n=10, delta=1.0))
    assert (row["evidence"], row["trials"]) == ("full", 10)


def test_other_data_are_a_stand_in_and_digits_get_no_verdict():
    lab = Invented()
    row = judged(lab, lab.store("paper", better, xs=[21.1], fingerprint="other"), claim(delta=1.0))
    assert (row["evidence"], row["verdict"]) == ("stand-in", "supports")
    row = judged(lab, lab.store("smoke", better, xs=[21.1]), claim(delta=1.0))
    assert (row["evidence"], row["verdict"]) == ("stand-in", "not tested (the embedded digits never get one)")
    assert row["ours"] == pytest.approx(1.2)


def test_compare_specs():
    spec = {"model": "a", "seed": 0, "recipe": {"lr": 0.1, "iterations": 10, "test_readings": "log"}}

    def change(**changes):
        return spec | {"recipe": spec["recipe"] | changes}

    assert scorecard.compare({**spec, "seed": 3}, spec) == "full"
    assert scorecard.compare(change(test_readings="all"), spec) == "full"
    assert scorecard.compare(change(iterations=5), spec) == "reduced"
    assert scorecard.compare(change(lr=0.2), spec) == "stand-in"
    assert scorecard.compare({**spec, "model": "b"}, spec) == "stand-in"


def test_value_claims_need_the_full_recipe():
    lab = Invented()
    c = claim(kind="value", arm_a="lenet/dense", arm_b="", x="", paper_value=92.0)
    row = judged(lab, lab.store("laptop", better, xs=[21.1]), c)
    assert row["verdict"] == "not tested"
    # 90, 91, 92, 93, 94: 92 ± 1.96324
    row = judged(lab, lab.store("paper", better, xs=[21.1]), c | {"margin": 1.6})
    assert row["verdict"] == "reproduced"
    assert row["interval"] == pytest.approx([90.03676, 93.96324], abs=1e-4)
    assert row["quantity"] == "test accuracy at early_stop, %"


def test_a_number_of_iterations_is_compared_as_a_ratio_with_the_papers():
    """Ours 1,000 in every trial; the paper's is 900, and then 950 read off to within 60."""
    lab = Invented()
    stored = lab.store("paper", better, lambda *at: 1000, xs=[21.1])
    c = claim(kind="value", arm_a="lenet/dense", arm_b="", x="", quantity="iterations", reading="last", margin=1.15)
    row = judged(lab, stored, c | {"paper_value": 900.0})
    assert (row["ours"], row["interval"], row["verdict"]) == (1000, [1000, 1000], "reproduced, size differs")
    assert judged(lab, stored, c | {"paper_value": 950.0, "error": 60.0})["verdict"] == "reproduced"
    assert judged(lab, stored, c | {"paper_value": 800.0})["verdict"] == "not reproduced"  # 1.25 > 1.15


def test_repeats_inside_a_trial_are_averaged_first():
    lab = Invented()
    lab.draws = 3

    def accuracy(name, x, trial, draw):
        return 90 + trial if name.endswith("imp") else 90 + trial - (0.3, 0.6, 0.9)[draw] - 0.1 * trial

    row = judged(lab, lab.store("paper", accuracy, xs=[21.1]), claim(arm_b="lenet/reinit", delta=0.5))
    # per trial 0.6 + 0.1 · trial, five numbers and not fifteen: 0.8 ± 0.196324
    assert row["trials"] == 5
    assert row["interval"] == pytest.approx([0.603676, 0.996324], abs=1e-5)


def test_early_stop_as_a_ratio_with_censored_minima():
    lab = Invented()

    def step(name, x, trial, draw):
        return 100 * (trial + 1) * (2 if name.endswith("dense") else 1)

    stored = lab.store("paper", better, step, xs=[21.1])
    c = claim(quantity="iterations", arm_a="lenet/dense", arm_b="lenet/imp", delta=2, margin=1.15, paper_value=2)
    row = judged(lab, stored, c)
    assert (row["verdict"], row["ours"], row["interval"], row["interval_images"]) == ("reproduced", 2, [2, 2], None)
    for trial in range(2):  # one of five is allowed, two are not
        assert judged(lab, stored, c)["verdict"] == "reproduced"
        stored[f"paper lenet/imp 21.1 {trial} 0"]["iterations"] = 100 * (trial + 1)  # the minimum is the last reading
    said = "not tested (40 % of an arm's minima lie in the last tenth of its training)"
    assert judged(lab, stored, c)["verdict"] == said
    assert judged(lab, stored, c | {"reading": "last", "quantity": "test accuracy"})["verdict"] != row["verdict"]


def test_networks_that_only_guess_are_not_alike():
    """At 3.6 % every network of both arms answers 10 % right, the share of one class: no evidence of "no worse"."""
    lab, xs = Invented(), [51.3, 21.1, 3.6]
    c = claim(kind="in all cells: at least matches", arm_b="lenet/random", x="51.3;21.1;3.6")
    dead = lab.store("paper", lambda name, x, *at: 10 if x == 3.6 else 90, xs=xs)
    assert judged(lab, dead, c)["verdict"] == "partly (2 of 3 pass, 1 not tested)"
    alone = c | {"kind": "direction", "x": "3.6"}
    assert judged(lab, dead, alone)["verdict"] == "not tested (at 3.6 % most networks of both arms guess)"
    value = alone | {"kind": "value", "arm_b": "", "paper_value": 10}  # a collapse that a paper prints can be tested
    assert judged(lab, dead, value)["verdict"] == "reproduced"
    for trial in range(3):
        assert judged(lab, dead, c)["verdict"] == "partly (2 of 3 pass, 1 not tested)"
        dead[f"paper lenet/imp 3.6 {trial} 0"]["early_stop_test_acc"] = 0.105
    assert judged(lab, dead, c)["verdict"] == "reproduced (3 of 3 pass)"  # three of five have learnt something


def test_a_row_says_at_which_densities_it_was_read():
    """With those of the cell that decides, of what was there if that is something else, and who guesses."""
    lab, xs = Invented(), [51.3, 21.1, 3.6]
    stored = lab.store("paper", lambda name, x, *at: 10 if (name[-6:], x) == ("random", 3.6) else 90, xs=xs)
    assert judged(lab, stored, claim(arm_b="lenet/random"))["cell"] == "21.1 % left"
    row = judged(lab, stored, claim(kind="in all cells: at least matches", arm_b="lenet/random", x="51.3;21.1;3.6"))
    assert row["cell"] == "51.3 % left"  # zero there and at 21.1, at 3.6 80 points
    assert scorecard.ours(row) == "0 points [0, 0] at 51.3 % left"
    row = judged(lab, stored, claim(arm_b="lenet/random", x="3.6"))
    assert row["cell"] == "3.6 % left, where most networks of random mask guess"
    assert judged(lab, stored, claim(arm_b="lenet/random", x="51.3|3.6"))["cell"].startswith("51.3 % and 3.6 % left")
    assert judged(lab, stored, claim(kind="up to", arm_b="lenet/random", x="51.3;21.1"))["cell"] is None
    for found in stored.values():
        found["density"] *= 0.9
    assert judged(lab, stored, claim(arm_b="lenet/random"))["cell"] == "21.1 % left (here 18.99)"
    lab.prints, lab.density = "sparsity", lambda x: 1 - x / 100
    assert judged(lab, stored, claim(arm_b="lenet/random"))["cell"] == "21.1 % removed (here 81.01)"
    lab.place = lambda name, x: f"round {x:g}"
    assert judged(lab, stored, claim(arm_b="lenet/random"))["cell"] == "round 21.1"


def test_a_difference_of_differences_needs_living_networks_in_both():
    lab = Invented()
    dead = lab.store("paper", lambda name, x, *at: 10 if x == 3.6 else 90, xs=[51.3, 3.6])
    c = claim(arm_a="lenet/imp - lenet/random", arm_b="lenet/imp - lenet/random", x="3.6|51.3")
    assert judged(lab, dead, c)["verdict"] == "not tested (at 3.6 % most networks of both arms guess)"
    said = "not reproduced (its effect, of which the paper prints no size, is below the margin)"
    assert judged(lab, dead, c | {"x": "51.3|51.3"})["verdict"] == said


def test_censoring_is_counted_in_each_cell():
    """Of three levels one has two late minima of five: it is not tested, and counts among the claim's three."""
    lab = Invented()
    xs = [51.3, 21.1, 3.6]
    stored = lab.store("paper", better, lambda name, x, trial, draw: 950 if x == 3.6 and trial < 2 else 100, xs=xs)
    c = claim(kind="in all cells: direction", x="51.3;21.1;3.6")
    assert judged(lab, stored, c)["verdict"] == "partly (2 of 3 pass, 1 not tested)"
    assert judged(lab, stored, c | {"reading": "last"})["verdict"] == "reproduced (3 of 3 pass)"
    everywhere = lab.store("paper", better, lambda *at: 950, xs=xs)
    assert judged(lab, everywhere, c)["verdict"].startswith("not tested (100 % of an arm's minima")
    for kind, verdict in (
        ("down to", "not tested"),
        ("up to", "reproduced"),
    ):  # the held-out level is one of the others
        row = judged(lab, stored, c | {"kind": kind, "x": "3.6;21.1", "delta": 1.0 if kind == "up to" else ""})
        assert scorecard.word(row) == verdict


def test_all_stored_trials_are_a_second_line_without_a_verdict():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1], trials=7)
    row = judged(lab, stored, claim(delta=1.1))
    assert (row["trials"], row["verdict"]) == (5, "reproduced")
    # 1.0, 1.1, …, 1.6: 1.3 ± 2.44691 · 0.216025/√7 = 0.199787
    assert row["all_trials"]["trials"] == 7
    assert row["all_trials"]["ours"] == pytest.approx(1.3)
    assert row["all_trials"]["interval"] == pytest.approx([1.100213, 1.499787], abs=1e-5)
    card = {"rows": [row], "totals": scorecard.totals([row])}
    assert "1.3 [1.1, 1.5]             all 7 stored trials, no verdict" in scorecard.text(card)


def test_a_trial_has_every_repeat_that_any_scale_stores(monkeypatch):
    """Ten trials with one redrawn network each; a scale of the same trainings has three in the first five."""
    lab = Invented()
    once, thrice = Invented(), Invented()
    thrice.draws = 3
    lab.scales = ("paper", "laptop")
    monkeypatch.setitem(ITERATIONS, "laptop", ITERATIONS["paper"])
    lab.arm = lambda name, x, trial, scale: (thrice if scale == "paper" else once).arm(name, x, trial, "paper")

    def accuracy(name, x, trial, draw):
        return 90 + trial if name.endswith("imp") else 90 + trial - (0.3, 0.6, 0.9)[draw] - 0.1 * trial

    stored = thrice.store("paper", accuracy, xs=[21.1]) | once.store("paper", accuracy, xs=[21.1], trials=10)
    row = judged(lab, stored, claim(arm_b="lenet/reinit", delta=0.5, n=10))
    # trials 0 to 4: 0.6 + 0.1 · trial; 5 to 9: 0.3 + 0.1 · trial; mean (4.0 + 5.0) / 10
    assert (row["trials"], row["ours"], row["evidence"]) == (10, pytest.approx(0.9), "full")


def test_an_unknown_setting_that_decides_the_claim():
    """Two readings of a setting, as two claims that name each other: B in place of A turns the sign."""
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    one = claim(id="lth-fig4-one", delta=1.1, unknown="which arm is meant", alternative="lth-fig4-two")
    two = one | {"id": "lth-fig4-two", "arm_a": "lenet/dense", "arm_b": "lenet/imp", "alternative": "lth-fig4-one"}
    rules = pd.DataFrame([one, two])
    reported = scorecard.reported("lth", REPORTED)

    def say(c, experiment=lab, stored=stored, rules=rules):
        return scorecard.Judge("lth", experiment, stored, reported, rules).row(c)["verdict"]

    assert say(one) == "depends on the setting (lenet/imp: reproduced; lenet/dense: not reproduced)"
    assert say(two) == "depends on the setting (lenet/dense: not reproduced; lenet/imp: reproduced)"
    assert say(one, rules=rules[:1]) == "reproduced (setting unknown)"
    assert say(two, rules=rules[1:]) == "inconclusive (opposite; setting unknown)"
    short = lab.store("laptop", better, xs=[21.1])
    assert say(one, stored=short) == "depends on the setting (lenet/imp: supports; lenet/dense: contradicts)"


def test_the_old_word_stays_readable():
    lab = Invented()
    row = judged(lab, lab.store("paper", better, xs=[21.1]), claim(delta=1.1, since="2026-11-28", was="contradicts"))
    assert (row["was"], row["stale"]) == ("contradicts", "rule changed after run")
    card = {"rows": [row], "totals": scorecard.totals([row])}
    assert "reproduced; rule changed after run, before that: contradicts" in scorecard.text(card)


def test_a_diverged_trial_counts_as_chance_and_is_shown():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    stored["paper lenet/imp 21.1 0 0"] |= {
        "status": "diverged",
        "early_stop_test_acc": None,
        "early_stop_correct": None,
    }
    row = judged(lab, stored, claim(delta=1.0))
    # 10 − 90 = −80 in trial 0, then 1.1, 1.2, 1.3, 1.4: mean −15
    assert row["ours"] == pytest.approx(-15.0)
    assert "1 diverged runs at chance" in row["rule"]


def test_runs_of_an_older_version_are_out():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    stored["paper lenet/imp 21.1 4 0"]["stale"] = True
    row = judged(lab, stored, claim())
    assert (row["evidence"], row["verdict"]) == ("none", "not tested")
    assert row["coverage"] == "0 of 1 cells; paper 9 of 10 runs"
    assert row["stale"] == "1 runs of an older algorithm version"


@pytest.mark.parametrize(
    ("added", "since", "expected"),
    [
        ("2026-11-21", "2026-11-21", None),  # a day alone is its first moment
        ("2026-11-21T00:00:01+00:00", "2026-11-21T01:00:01+01:00", None),  # the run started at 00:00:01Z
        ("2026-11-21T00:00:01Z", "2026-11-21T00:00:02+00:00", "rule changed after run"),
        ("2026-11-21T00:00:02Z", "2026-11-21T00:00:02Z", "claim added after run"),
        ("2026-11-20", "2026-11-22", "rule changed after run"),
        ("2026-11-22", "2026-11-22", "claim added after run"),
    ],
)
def test_rules_written_after_the_run_say_so(added, since, expected):
    lab = Invented()
    row = judged(lab, lab.store("paper", better, xs=[21.1]), claim(added=added, since=since))
    assert row["stale"] == expected


def test_a_range_of_levels_may_be_partly_covered_but_a_single_level_not():
    lab = Invented()
    lab.missing = {("laptop", 2.9)}
    stored = lab.store("laptop", better, xs=[21.1])
    row = judged(lab, stored, claim(kind="in all cells: direction", x="21.1;2.9"))
    assert (row["evidence"], row["coverage"]) == ("reduced", "1 of 2 cells")
    assert row["verdict"] == "mixed (1 of 2 pass, 1 not tested)"
    assert judged(lab, stored, claim(kind="down to", x="2.9;21.1"))["evidence"] == "none"


def test_a_cell_may_compare_two_densities():
    lab = Invented()
    stored = lab.store("paper", lambda name, x, trial, draw: 90 + 0.1 * (x or 0) + 0.1 * trial, xs=[21.1, 51.1])
    row = judged(lab, stored, claim(arm_b="lenet/imp", x="51.1|21.1", delta=3.0))
    assert row["ours"] == pytest.approx(3.0)
    assert scorecard._cells({"x": "51.3|21.1;7.0"}) == [(51.3, 21.1), (7.0, 7.0)]


def test_a_negative_word_on_an_effect_without_a_size_says_what_it_means():
    lab = Invented()
    equal = lab.store("paper", lambda name, x, trial, draw: 90 + 0.1 * trial, xs=[21.1])
    row = judged(lab, equal, claim(delta=0.4, margin=0.2))
    said = "not reproduced (its effect, of which the paper prints no size, is below the margin)"
    assert (row["verdict"], scorecard.word(row)) == (said, "not reproduced")
    assert judged(lab, equal, claim(delta=0.4, margin=0.2, paper_value=0.4))["verdict"] == "not reproduced"


def test_two_arms_that_rest_on_one_network_are_not_compared():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    own = judged(lab, stored, claim(arm_b="lenet/imp"))
    assert own["verdict"] == "not tested (at 21.1 % both arms rest on one network in 5 of 5 trials)"


def test_the_cell_shown_is_the_one_that_speaks_most_against_the_claim():
    """Of two cells the one that is open, though its mean is larger; of two negative ones the surer one."""
    wide, narrow = [3.0, -2.0, 5.0, -1.0, 3.5], [1.0, 1.1, 0.9, 1.0, 1.2]
    assert claims.worst("direction", [narrow, wide], 0.5) == 1
    assert claims.judge("in all cells: direction", np.array([narrow, wide]), margin=0.5).d == pytest.approx(
        np.mean(wide)
    )
    assert claims.worst("direction", [np.negative(narrow), np.negative(wide)], 0.5) == 0
    assert claims.worst("same", [[0.1, 0.2, 0.1], [-0.4, -0.5, -0.4]], 0.5) == 1
    assert claims.worst("direction", [[2.0], [1.0]], 0.5) == 1  # one trial says nothing of its spread


def test_up_to_and_worst_cell_have_both_intervals():
    lab = Invented()
    xs = [51.3, 21.1]

    def accuracy(name, x, trial, draw):
        return 90 + 0.1 * trial + ((1.0 if x == 21.1 else 0.5) + 0.1 * trial if name.endswith("imp") else 0)

    stored = lab.store("paper", accuracy, xs=xs)
    best = judged(lab, stored, claim(kind="up to", x="51.3;21.1", delta=1.0))
    assert (best["verdict"], best["ours"]) == ("reproduced", pytest.approx(1.2))
    worst = judged(lab, stored, claim(kind="in all cells: direction", x="51.3;21.1"))
    assert worst["ours"] == pytest.approx(0.7)
    for row in (best, worst):
        assert row["interval_images"][0] <= row["interval"][0] < row["interval"][1] <= row["interval_images"][1]


def test_baseline_gate_compares_with_the_papers_own_dense_number(tmp_path):
    lab = Invented()
    lab.nets = ("resnet18@0.1",)
    c = claim(
        item="Figure 8", arm_a="resnet18@0.1/imp", arm_b="resnet18@0.1/dense", reading="last", margin=0.5, delta=1.0
    )
    ours = {"good": 90.5, "bad": 93.0}
    stored = {
        k: lab.store("paper", lambda n, x, t, d, v=v: v + 0.1 * t + (n.endswith("imp") and 1 + 0.1 * t), xs=[21.1])
        for k, v in ours.items()
    }
    assert judged(lab, stored["good"], c)["verdict"] == "reproduced"
    assert judged(lab, stored["bad"], c)["verdict"] == "not tested (baseline off)"
    # the reduced recipe has no gate, and one changed number in the paper's file moves it
    laptop = {k.replace("paper", "laptop"): row | {"iterations": 300} for k, row in stored["bad"].items()}
    assert judged(lab, laptop, c)["verdict"] == "supports"
    changed = scorecard.reported("lth", REPORTED)
    changed.loc[changed["value"] == 90.5, "value"] = 93.0
    assert judged(lab, stored["bad"], c, changed)["verdict"] == "reproduced"
    assert judged(lab, stored["good"], c, changed)["verdict"] == "not tested (baseline off)"
    # a claim about that very number is judged, not gated
    value = c | {"kind": "value", "arm_a": "resnet18@0.1/dense", "arm_b": "", "x": "", "paper_value": 90.5, "delta": ""}
    assert judged(lab, stored["bad"], value)["verdict"] == "not reproduced"


def test_where_only_the_best_epoch_is_printed_the_gate_and_values_read_ours_so():
    """GraSP prints 94.80 % for the dense ResNet-32, the best test accuracy over the epochs; m = 0.5, so 2m = 1."""
    lab = Invented()
    lab.nets = ("resnet32-c10",)
    reported = scorecard.reported("grasp", REPORTED)
    pair = {"arm_a": "resnet32-c10/imp", "arm_b": "resnet32-c10/dense", "reading": "last", "margin": 0.5, "delta": 1.0}
    value = pair | {"kind": "value", "arm_a": "resnet32-c10/dense", "arm_b": "", "x": "", "reading": "best"}
    value |= {"delta": "", "paper_value": 94.8}
    stored = lab.store("paper", lambda name, x, trial, draw: 90 + (name.endswith("imp")), xs=[21.1])
    for best, expected in (
        (0.948, ["reproduced", "reproduced"]),  # best is as printed, the last epoch 4.8 points below
        (0.930, ["not tested (baseline off)", "not reproduced"]),
    ):
        rows = {key: row | {"test_acc": [0.5, None, best, 0.9]} for key, row in stored.items()}
        cards = [judged(lab, rows, claim(**c), reported) for c in (pair, value)]
        assert [card["verdict"] for card in cards] == expected
        assert cards[0]["ours"] == pytest.approx(1.0)  # read at the last epoch
        assert cards[1]["ours"] == pytest.approx(100 * best)
        assert cards[1]["interval_images"] is None  # the images of the best epoch are not kept


def test_losses_are_those_of_the_last_epoch_and_a_diverged_run_is_at_chance():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    for key, row in stored.items():
        row |= {"batch_loss": [2.0, 1.5 if "dense" in key else 1.25], "test_loss": [2.0, 1.5]}
    c = claim(arm_a="lenet/dense", arm_b="lenet/imp", quantity="train loss", reading="last", delta=0.23, margin=0.05)
    row = judged(lab, stored, c)
    assert (row["ours"], row["quantity"], row["verdict"]) == (0.25, "train loss at last, nats, A − B", "reproduced")
    assert judged(lab, stored, c | {"quantity": "test loss", "kind": "same"})["verdict"] == "reproduced"
    assert row["interval_images"] is None
    bad = {key: row | ({"status": "diverged"} if "dense" in key else {}) for key, row in stored.items()}
    assert judged(lab, bad, c)["ours"] == pytest.approx(math.log(10) - 1.25)


def test_what_no_training_can_tell_is_no_evidence():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    assert judged(lab, stored, claim(quantity="gradient norm", reading="", margin=1.15))["evidence"] == "none"


def test_items_on_the_command_line():
    items = {"Figure 2": "fig2", "Table 1": "table1", "Initialisation and batch size": "initialisation"}
    assert {item: scorecard._short(item) for item in items} == items


def test_the_runs_of_a_claim_are_those_that_its_verdict_rests_on():
    """13.5 % is level 9; the claim asks for ten trials, of which the laptop's scale has five."""

    def runs(scale, trials):
        at = lth.setting(scale).nets["lenet"]
        return {r for seed in range(trials) for level in (0, 9) for r in at.imp(seed, level)}

    name = "lth-fig4-accuracy-13"
    assert set(scorecard.runs("lth", [name], "paper")) == runs("paper", 10)
    assert set(scorecard.runs("lth", [name], "laptop")) == runs("laptop", 5)
    assert set(scorecard.runs("lth", [name], "laptop", trials=7)) == runs("laptop", 7)
    both = scorecard.runs("lth", [name, "lth-fig4-reinit-accuracy-21"], "paper", trials=1)
    assert {(r.level, r.init) for r in both} == {(0, "reset"), (7, "reset"), (9, "reset"), (7, "reinit")}
    assert len(both) == 1 + 1 + 1 + 3


def test_the_runs_of_a_claim_have_the_dense_ones_of_the_gate():
    """GraSP prints dense accuracies, and neither arm of the claim is dense."""
    snip, ours, dense = scorecard.runs("grasp", ["grasp-table2-vgg19-c10-90-snip-ahead"], "paper", trials=1)
    assert {snip.criterion, ours.criterion} == {"snip", "grasp"}
    assert (dense.density, dense.seed) == (None, 0)


def test_every_command_of_a_claim_trains_what_it_names():
    """Of the committed results: the seeds of the runs are the trials that the row rests on."""
    for paper in ("lth", "grasp"):
        rows = [row for row in scorecard.scorecard(paper, None, REPORTED)["rows"] if row["claim"] and row["trials"]]
        assert rows
        for row in rows:
            lottery, run, *names, flag, scale = row["command"].split(" --trials ")[0].split()
            assert (lottery, run, names, flag) == ("lottery", "run", [paper, row["claim"]], "--scale")
            given = re.search(r" --trials (\d+)$", row["command"])
            runs = scorecard.runs(paper, [row["claim"]], scale, trials=given and int(given[1]))
            assert {r.seed for r in runs} == set(range(row["trials"]))


def test_claims_that_cannot_be_run_are_refused_in_one_line():
    for name, scale, said in [
        ("lth-fig4-nothing", "paper", "Unknown claim 'lth-fig4-nothing': `lottery scorecard --paper lth --json` "),
        ("lth-fig2-lenet-weights", "paper", "Nothing to train for lth-fig2-lenet-weights: see `lottery scorecard "),
        (
            "lth-fig4-ticket-falls-2.9",
            "laptop",
            "Invalid scale 'laptop' for lth-fig4-ticket-falls-2.9: choose one of paper",
        ),
    ]:
        with pytest.raises(ValueError, match="^" + re.escape(said) + r"[^\n]*\.$"):
            scorecard.runs("lth", [name], scale)


def test_lenet_has_no_gate():
    judge = scorecard.Judge("lth", None, {}, scorecard.reported("lth", REPORTED))
    assert judge.dense(claim())[1] == {}
    assert judge.dense(claim(arm_a="conv2/imp", arm_b="conv2/dense"))[1] == {}


# The whole card -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The card of an empty store."""
    return scorecard.scorecard("lth", tmp_path_factory.mktemp("ours"), REPORTED)


def test_card_of_an_empty_store(whole):
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert (whole["schema"], set(whole)) == (1, {"schema", "rows", "totals"})
    assert {row["item"] for row in whole["rows"]} == ITEMS
    assert {tuple(row) for row in whole["rows"]} == {scorecard.FIELDS}
    assert {row["evidence"] for row in whole["rows"]} == {"exact", "none"}
    with open(REPORTED / "lth_claims.csv") as f:
        assert [row["claim"] for row in whole["rows"]] == [c["id"] if c["kind"] else None for c in csv.DictReader(f)]
    for row in whole["rows"]:
        assert (row["claim"] is None) == (row["verdict"] is None)
    totals = whole["totals"]
    assert totals["claims"] == sum(some["claims"] for some in totals["by_evidence"].values())
    assert totals["primary"]["claims"] == len(PRIMARY)
    assert totals["chance"] == {"tested": 0, "expected": 0}
    assert "claims (* primary" in scorecard.text(whole)


def test_exact_claims_need_no_run(whole):
    rows = {row["claim"]: row for row in whole["rows"]}
    assert (rows["lth-fig2-lenet-weights"]["ours"], rows["lth-fig2-lenet-weights"]["verdict"]) == (266200, "reproduced")
    conv6 = rows["lth-fig2-conv6-weights"]
    assert (conv6["ours"], conv6["paper_value"], conv6["verdict"]) == (2261184, 1700000, "not reproduced")
    assert rows["lth-fig37-conv6-fc-share"]["ours"] == pytest.approx(49.384, abs=1e-3)  # 1,116,672 of 2,261,184
    assert scorecard.count("weights", "no_such_net") is None


def test_one_reported_value_changed_changes_its_verdict(tmp_path):
    rules = (REPORTED / "lth_claims.csv").read_text()
    assert rules.count(",266000,") == 1
    for printed, verdict in ((266_000, "reproduced"), (268_000, "not reproduced")):  # ours: 266,200, m = 1,000
        (tmp_path / "lth_claims.csv").write_text(rules.replace(",266000,", f",{printed},"))
        c = scorecard.claims("lth", tmp_path).set_index("id", drop=False).loc["lth-fig2-lenet-weights"].to_dict()
        assert judged(lth.PAPER, {}, c)["verdict"] == verdict
    # 1.2 [1.004, 1.396]: from Δ = 2.4 on it is less than half of what was promised
    stored = Invented().store("paper", better, xs=[21.1])
    found = [judged(Invented(), stored, claim(delta=delta))["verdict"] for delta in (2.3, 2.5)]
    assert found == ["reproduced", "partly"]


def test_one_stored_accuracy_changed_changes_ours():
    lab = Invented()
    stored = lab.store("paper", better, xs=[21.1])
    before = judged(lab, stored, claim(delta=1.0))
    stored["paper lenet/imp 21.1 0 0"]["early_stop_test_acc"] += 0.005
    assert judged(lab, stored, claim(delta=1.0))["ours"] == pytest.approx(before["ours"] + 0.1)


def test_totals_count_chance_and_keep_exact_apart():
    def row(kind, evidence, verdict, primary=False):
        row = {"claim": "x", "paper": "lth", "rule": f"{kind}; n = 5", "evidence": evidence, "verdict": verdict}
        return row | {"primary": primary, "p": 0.01}

    totals = scorecard.totals(
        [
            row("direction", "full", "reproduced", True),
            row("same", "reduced", "inconclusive (80 % power needs 9 trials)"),
            row("value", "exact", "reproduced"),
            row("direction", "reduced", "not tested (baseline off)"),
            row("direction", "none", "not tested"),
        ]
    )
    assert totals["chance"] == {"tested": 2, "expected": 0.075}
    assert totals["by_evidence"]["reduced"] == {"claims": 2, "verdicts": {"inconclusive": 1, "not tested": 1}}
    assert totals["by_evidence"]["exact"] == {"claims": 1, "verdicts": {"reproduced": 1}}
    assert totals["primary"]["claims"] == 1
    assert totals["primary"]["by_paper"] == {"lth": {"tested": 1, "pass": 1, "after_holm": 1, "mixed": 0}}


def test_holm_is_over_the_tested_primary_claims_of_one_paper():
    def row(paper, p, verdict="reproduced", evidence="full", primary=True):
        row = {"claim": "x", "paper": paper, "rule": "direction; n = 5", "evidence": evidence, "verdict": verdict}
        return row | {"primary": primary, "p": p}

    rows = [
        *(row("lth", 0.01), row("lth", 0.04, "supports, size differs (setting unknown)"), row("lth", 0.03)),
        *(row("lth", 0.6, "contradicts"), row("lth", None, "not tested", "none"), row("lth", 0.001, primary=False)),
        *(row("grasp", 0.04, "mixed"), row("grasp", None, "not tested (baseline off)")),
    ]
    # 0.01 ≤ 0.05/4; 0.03 > 0.05/3
    assert scorecard.totals(rows)["primary"]["by_paper"] == {
        "lth": {"tested": 4, "pass": 3, "after_holm": 1, "mixed": 0},
        "grasp": {"tested": 1, "pass": 0, "after_holm": 0, "mixed": 1},
    }


def test_a_chapter_counts_runs_and_exact_statements_apart_and_shows_primary_claims_first():
    def row(title, evidence, verdict, primary=False, **values):
        keys = {"paper": "lth", "p": 0.01, "quantity": "test accuracy at last, points, A − B"}
        keys |= dict.fromkeys(("ours", "paper_value", "interval", "cell", "stale", "was"))
        row = {"claim": title, "title": title, "item": "Figure 4", "rule": "direction; n = 5", "primary": primary}
        return keys | row | {"evidence": evidence, "verdict": verdict} | values

    rows = [
        row("weights", "exact", "reproduced", ours=266_200, paper_value=266_000.0),
        row("faster", "reduced", "supports (1 of 2 cells)"),
        row("better", "full", "reproduced", True, ours=1.23456, interval=[0.5, 2], paper_value=1.0),
        row("late", "reduced", "not tested (baseline off)"),
        row("unrun", "none", "not tested"),
        row(None, "none", None),
    ]
    card = {"rows": rows, "totals": scorecard.totals(rows)}
    again = [rows[0] | {"net": "lenet", "quantity": "weights", "paper_value": v} for v in (1.0, 1.0, 2.0)]
    twice = verdicts.totals({"rows": again, "totals": scorecard.totals(again)})
    assert "The 3 exact ones are 2 numbers, since papers print some twice." in twice
    assert [r["title"] for r in scorecard.tested(card)] == ["better", "faster", "weights"]
    assert scorecard.summary(card).splitlines() == [
        "2 claims were tested here, 1 of them primary.",
        "reproduced: 1",
        "supports: 1",
        "Expected to pass by chance, were none of them true: 0.05.",
        "1 more are exact and need no runs: 1 reproduced.",
        "The other 2 claims are in the scorecard.",
    ]
    table = scorecard.table(scorecard.tested(card))
    assert table["claim"].tolist() == ["★ better", "faster", "weights"]
    assert table["ours"].tolist() == ["1.235 points [0.5, 2]", "–", "266,200"]
    assert table["paper"].tolist() == ["1", "–", "266,000"]
    remarks = {
        "reproduced": "",
        "supports, size differs": "size differs",
        "reproduced, size differs (setting unknown)": "size differs; setting unknown",
        "depends on the setting (norm (copy): supports)": "norm (copy): supports",
    }
    assert {verdict: scorecard.note({"verdict": verdict}) for verdict in remarks} == remarks
    assert scorecard.word({"verdict": "supports, size differs (setting unknown)"}) == "supports"
    young = rows[2] | {"stale": "rule changed after run", "was": "partly"}
    assert scorecard.table([young])["verdict"][0] == "reproduced; rule changed after run, before that: partly"


def test_bad_paper_and_missing_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^Unknown paper 'lht': choose one of cs, grasp, lth, str \([^\n]*\)\.$"):
        scorecard.claims("lht", REPORTED)
    with pytest.raises(FileNotFoundError, match=r"^No claims in [^\n]*$"):
        scorecard.claims("lth", tmp_path)
    shutil.copy(REPORTED / "lth_claims.csv", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^Missing [^\n]*lth\.csv[^\n]*$"):
        scorecard.reported("lth", tmp_path)


@pytest.mark.skipif("LOTTERY_DATA" not in os.environ, reason="needs real data: set LOTTERY_DATA")
@pytest.mark.parametrize("name", scorecard.FINGERPRINTS)
def test_fingerprints_are_those_of_the_real_data(name):
    assert data.load(name).fingerprint == scorecard.FINGERPRINTS[name]


def test_an_arm_may_be_the_difference_of_two():
    """The gap of A over B at 51.3 % beside the gap at 21.1 %."""
    lab = Invented()

    def accuracy(name, x, trial, draw):
        return 90 + trial + {("imp", 51.3): 5, ("imp", 21.1): 2}.get((name.split("/")[1], x), 0)

    stored = lab.store("paper", accuracy, xs=[51.3, 21.1])
    gap = "lenet/imp - lenet/reinit"
    row = judged(lab, stored, claim(arm_a=gap, arm_b=gap, x="51.3|21.1", delta=3.0, reading="last"))
    assert (row["ours"], row["verdict"]) == (3, "reproduced")


def test_a_paper_may_read_its_own_quantities_and_ratios_are_logarithms():
    lab = Invented()
    lab.reads = {"size ratio": lambda row: math.log(8), "time, epochs": lambda row: 0.5}
    stored = lab.store("paper", better, xs=[21.1])
    row = judged(lab, stored, claim(arm_b="", quantity="size ratio", delta=4.0, margin=1.1))
    assert (row["ours"], row["verdict"], row["quantity"]) == (
        pytest.approx(8),
        "reproduced",
        "size ratio at early_stop, ratio A/B",
    )
    same = claim(arm_b="", quantity="time, epochs", kind="same", margin=1.0)
    assert judged(lab, stored, same)["quantity"] == "time, epochs"
    assert judged(lab, stored, same)["verdict"] == "reproduced"
