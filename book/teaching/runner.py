"""Inside the jail: run a submission's cells and pass on what they hand in.

Reads from stdin one JSON object, {"seed", "seconds", "cells": [{"name", "code", "hidden"}]}. Writes to stdout a line of
JSON for each value handed in, {"task", "value", "tolerance"}, and for each cell that failed, {"cell", "error"}. What
the submission prints goes to stderr. A cell that raises, or computes for longer than `seconds` (of CPU time, so that a
busy machine does not decide), or sleeps four times as long on the clock, fails by itself; the next one still runs.
"""

import json
import os
import signal
import sys

out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(**line):
    out.write(json.dumps(line) + "\n")
    out.flush()


def plain(value):
    """Tensors, arrays and NumPy's numbers as lists and numbers."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def hand_in(task, value, tolerance=0.0):
    say(task=task, value=plain(value), tolerance=tolerance)


def too_long(*_):
    raise TimeoutError("the cell took too long")


def main():
    job = json.load(sys.stdin)
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.showtraceback = lambda *_, **__: None
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)

    def limit(seconds):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 4 * seconds)

    def run(name, code, **names):
        shell.push(names)
        limit(job["seconds"])
        result = shell.run_cell(code, store_history=False, silent=True)
        limit(0)
        if error := result.error_before_exec or result.error_in_exec:
            say(cell=name, error=f"{type(error).__name__}: {error}"[:500])

    for cell in job["cells"]:
        run(cell["name"], cell["code"])
        if cell["hidden"]:
            run(cell["name"], cell["hidden"], hand_in=hand_in, student_seed=job["seed"])


if __name__ == "__main__":
    main()
