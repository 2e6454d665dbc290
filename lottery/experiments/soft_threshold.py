"""STR's experiments."""

from lottery.experiments import str_exact

SETTINGS = {}
SCALES = ()
EXACT = str_exact.EXACT


def arm(name, x, seed, scale):
    return None
