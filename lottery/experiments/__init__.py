"""Experiments: what to run (one module per paper), the engine that runs it, the store that keeps it.

>>> from lottery import experiments
>>> runs = experiments.lth.runs("fig3", "laptop")
>>> experiments.run(runs)            # trains what the store does not have
>>> experiments.load(runs)           # one row per run, a pandas.DataFrame

Names load when they are first used: counting what is stored needs no PyTorch.
"""

import importlib

PAPERS = {
    "lth": "lth",
    "cs": "cs",
    "str": "soft_threshold",
    "grasp": "grasp",
    "compare": "compare",  # no paper of its own: all methods beside each other
}  # name → module here, in the order of the book
FOUND_IN = {"Run": "runs", "Store": "store", "load": "store", "run": "engine"}
__all__ = ["PAPERS", *FOUND_IN, *PAPERS.values()]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{FOUND_IN.get(name, name)}")
    return getattr(module, name) if name in FOUND_IN else module
