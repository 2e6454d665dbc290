"""Network pruning, reproduced: the Lottery Ticket Hypothesis and the papers around it.

Submodules load when they are first used, so `import lottery` costs nothing beyond Python itself.
"""

import importlib
import pkgutil

__version__ = "0.1.0"
__all__ = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]


def __getattr__(name):
    if name == "prune":  # the front door
        return importlib.import_module("lottery.own").prune
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__, "prune"]
