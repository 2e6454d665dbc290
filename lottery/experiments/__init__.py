"""Experiments: what to run (one module per paper), the engine that runs it, the store that keeps it.

>>> from lottery import experiments
>>> runs = experiments.lth.runs("fig3", "laptop")
>>> experiments.run(runs)            # trains what the store does not have
>>> experiments.load(runs)           # one row per run, a pandas.DataFrame
"""

from lottery.experiments import lth
from lottery.experiments.engine import run
from lottery.experiments.runs import Run
from lottery.experiments.store import Store, load

__all__ = ["Run", "Store", "load", "lth", "run"]
