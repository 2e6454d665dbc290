"""How often the rules call a true claim false, and a false one true: simulated at the trials and spreads that we have.

The spreads of a trial's difference in the stored runs, in units of the margin m: accuracy 1.25 (0.25 points on MNIST,
0.6 on the stand-in of CIFAR-10), train accuracy 0.6 (0.03 points), early stop 3 (0.42, of the logarithm of a ratio).
`python tests/test_error_rates.py` prints the table of book/development.md.
"""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lottery import claims

GUIDE = Path(__file__).parents[1] / "book" / "development.md"
SPREADS = {"accuracy": 1.25, "train accuracy": 0.6, "early stop": 3.0}
# The claims that choose a level are about accuracies; at a spread of 3 one that is just true is called false in 6 %.
SMALL = dict.fromkeys(claims.CHOSEN, (1.25, 0.6))

# True differences in units of m, one a cell, where Δ = 2m: of a claim that is only just true, of one that is only just
# false, and of one that is true as the paper says. Of "up to" one level of 15 is better, or none; of "best value" one.
KINDS = {
    "direction": ([1], [0], [2]),
    "value": ([1], [1], [0]),
    "same": ([1], [1], [0]),
    "at least matches": ([-1], [-1], [0]),
    "down to": ([-1, -1], [-1, -1], [0, 0]),
    "up to": ([2] + [0] * 14, [0] * 15, [2] * 5 + [0] * 10),
    "best value": ([1] + [-3] * 14, [1] + [-3] * 14, [0] + [-3] * 14),
    "in all cells: direction": ([1] * 5, [2] * 4 + [0], [2] * 5),
    "in all cells: same": ([1] * 5, [0] * 4 + [1], [0] * 5),
    "in all cells: at least matches": ([-1] * 5, [0] * 4 + [-1], [0] * 5),
}


def share(word, kind, truth, spread, n, draws):
    """How many of the simulated claims get the word. The cells of a trial share an arm, the dense network."""
    rng = np.random.default_rng(2026)
    noise = rng.normal(size=(draws, len(truth), n)) + rng.normal(size=(draws, 1, n))
    d = np.array(truth)[:, None] + spread / math.sqrt(2) * noise
    with pytest.MonkeyPatch.context() as patch:  # of no effect on a word, and slow
        patch.setattr(claims, "trials_for_power", lambda *_: None)
        patch.setattr(claims, "p_value", lambda *_: math.nan)
        return sum(claims.judge(kind, cells, delta=2.0, margin=1.0).word == word for cells in d) / draws


def rates(kind, n, draws):
    """(a true claim called false, at the worst of the spreads; a false one called true; a true one called true)."""
    weak, false, plain = KINDS[kind]
    spreads = SMALL.get(kind, SPREADS.values())
    return (
        max(share("not reproduced", kind, weak, spread, n, draws) for spread in spreads),
        max(share("reproduced", kind, false, spread, n, draws) for spread in spreads),
        share("reproduced", kind, plain, SPREADS["accuracy"], n, draws),
    )


def printed():
    """{(kind, n): rates} of the guide."""
    number = r" ([\d.]+) "
    row = re.compile(r"^\| ([a-z: ]+) \|" + r"\|".join([number] * 6) + r"\|$", re.MULTILINE)
    table = {}
    for kind, *values in row.findall(GUIDE.read_text()):
        values = [float(v) / 100 for v in values]
        table |= {(kind, 5): tuple(values[:3]), (kind, 10): tuple(values[3:])}
    return table


def test_the_guide_has_every_kind_and_no_rate_of_error_above_five_percent():
    table = printed()
    assert set(table) == {(kind, n) for kind in KINDS for n in (5, 10)}
    assert {kind.removeprefix(claims.ALL) for kind in KINDS} == set(claims.KINDS)
    assert max(max(errors) for *errors, _ in table.values()) <= 0.055  # 5 %, and the error of 4,000 draws


@pytest.mark.parametrize(("kind", "n"), [(kind, n) for kind in KINDS for n in (5, 10)])
def test_the_rates_of_the_guide_are_those_of_the_rules(kind, n):
    draws = 80
    for here, there in zip(rates(kind, n, draws), printed()[kind, n], strict=True):
        assert abs(here - there) <= 0.02 + 4 * math.sqrt(max(there * (1 - there), 0.01) / draws)


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        both = [f"{100 * rate:.1f}" for n in (5, 10) for rate in rates(kind, n, 4000)]
        print(f"| {kind} | {' | '.join(both)} |")
