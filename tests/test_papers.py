"""What every paper's module promises the command line, the scorecard and the chapters."""

import pytest

from lottery.experiments import PAPERS, papers

EVERYWHERE = [(name, scale) for name in PAPERS for scale in papers.paper(name).scales]


@pytest.mark.parametrize(("name", "scale"), EVERYWHERE)
def test_no_parameter_given_changes_nothing(name, scale):
    paper = papers.paper(name)
    at = paper.setting(scale)
    given = dict.fromkeys(("trials", "seed", "iterations", "lr", "batch_size", "model", "dataset"))
    assert [r.key for r in paper.runs(None, paper.override(at, **given))] == [r.key for r in paper.runs(None, at)]


@pytest.mark.parametrize(("name", "scale"), EVERYWHERE)
def test_cells_are_arms_at_densities_and_each_has_its_runs(name, scale):
    """Arms are net@variant/control; a density is in (0, 1], or None where only the training decides it."""
    paper = papers.paper(name)
    at = paper.setting(scale)
    for item in paper.items:
        for arm, x, point in paper.cells(item, at) if item not in paper.measured_items else ():
            net, _, control = arm.partition("/")
            assert net, arm
            assert control, arm
            assert x is None or 0 < x <= 1, (item, arm, x)
            runs = paper.trial(arm, at, at.seeds[0], point)
            assert runs, (item, arm, point)
            assert {r.seed for r in runs} == {at.seeds[0]}


def test_an_unknown_paper_is_one_line():
    with pytest.raises(ValueError, match=r"^Unknown paper 'ttt': choose one of lth, cs, str, grasp, compare\.$"):
        papers.paper("ttt")
