"""Random damage to whatever is read, a thousandfold with a fixed seed: refused in one line, or read as it was."""

import damaged_inputs
import pytest
from damaged_inputs import BAD


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_damaged_inputs_are_refused_in_one_line_or_read_as_they_were():
    """`python tests/damaged_inputs.py --inputs 10000` tries more of them."""
    bad = []
    found = damaged_inputs.damage(1_000, seed=1, say=bad.append)
    assert not [line for line in bad if any(f": {what} " in line for what in BAD)]
    assert found.keys() == damaged_inputs.SHARES.keys()
    assert sum(sum(some.values()) for some in found.values()) == 1_000
    for kind in ("spool", "shard", "weights", "ticket", "numbers"):
        assert found[kind]["refused"] > sum(found[kind].values()) / 2, "the damage was not seen"
