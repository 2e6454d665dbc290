"""The command line as its users meet it: what it prints, what it refuses, and what an interrupt leaves behind."""

import concurrent.futures as futures
import errno
import importlib.metadata
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import lottery
from lottery import cli, experiments, export, names, scorecard, training
from lottery.cli import app
from lottery.experiments import PAPERS, Store, engine, lth, pace, papers

ROOT = Path(lottery.__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def command(*words, **options):
    """The command line as a process of its own."""
    words = [sys.executable, "-m", "lottery", *map(str, words)]
    return subprocess.Popen(words, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.fixture
def one_core(monkeypatch):
    """Trainings run in this process, where no second Python has to start."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture
def tiny(monkeypatch):
    """Smoke runs of 10 iterations and two levels."""
    at = lth.override(lth.setting("smoke"), iterations=10, rounds=3, trials=1)
    monkeypatch.setitem(lth.SETTINGS, "smoke", at)


def finished(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / ".spool").glob("*.parquet")}


# The package ----------------------------------------------------------------------------------------------------------


def python(code):
    return subprocess.run([sys.executable, "-c", code], env=ENV, text=True, capture_output=True, check=True).stdout


def test_importing_lottery_imports_nothing_heavy():
    heavy = python(
        "import sys, lottery; dir(lottery)\n"
        "print([m for m in ('torch', 'numpy', 'pandas', 'pyarrow', 'typer', 'sklearn') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_submodules_resolve_after_a_bare_import():
    code = """
import lottery
for name in lottery.__all__:
    assert getattr(lottery, name).__name__ == f"lottery.{name}", name
    assert name in dir(lottery)
lottery.experiments.lth, lottery.experiments.grasp, lottery.experiments.Run, lottery.experiments.run
lottery.experiments.load
print(*lottery.__all__)
"""
    names = python(code).split()
    assert {"masks", "lth", "training", "models", "data", "experiments", "cli"} <= set(names)
    assert not [name for name in names if name.startswith("_")]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'lottery' has no attribute 'nothing'"):
        _ = lottery.nothing


# run ------------------------------------------------------------------------------------------------------------------


def test_run_trains_once_then_status_and_merge(tmp_path, one_core, tiny):
    n = len(lth.runs("fig12", "smoke"))
    told = call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    assert told.exit_code == 0, told.output
    assert f"{n} runs: 0 were stored, {n} trained now, 0 left." in told.stdout
    before = finished(tmp_path)
    assert len(before) == n

    again = call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    assert f"{n} runs: {n} were stored, 0 trained now, 0 left." in again.stdout
    assert finished(tmp_path) == before

    told = json.loads(call("status", "--json", "--results-dir", tmp_path).stdout)
    [line] = [line for line in told["items"] if (line["item"], line["scale"]) == ("fig12", "smoke")]
    assert (line["paper"], line["stored"], line["runs"], line["diverged"]) == ("lth", n, n, 0)
    assert told["stored"] == n

    assert f"{n} runs packed" in call("merge", tmp_path, "--results-dir", tmp_path).stdout  # its own spool, too
    assert not finished(tmp_path)
    assert "0 runs packed" in call("merge", "--results-dir", tmp_path).stdout
    assert f"{n} runs are stored in {tmp_path}" in call("status", "--results-dir", tmp_path).stdout
    other = tmp_path / "other"
    assert f"{n} runs packed into {other}" in call("merge", tmp_path, "--results-dir", other).stdout

    weights = tmp_path / ".artifacts" / "0123456789abcdef01234567.safetensors"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"")
    assert re.search(r"\d+ files of weights removed", call("merge", "--drop-weights", "--results-dir", tmp_path).stdout)
    assert not weights.exists()


def test_a_budget_of_nothing_trains_nothing(tmp_path, one_core, tiny):
    told = call("run", "lth", "fig12", "--scale", "smoke", "--budget", "0s", "--results-dir", tmp_path / "new")
    assert told.exit_code == cli.LEFT
    n = len(lth.runs("fig12", "smoke"))
    assert f"{n} runs: 0 were stored, 0 trained now, {n} left." in told.stdout
    assert not finished(tmp_path / "new")


@pytest.mark.parametrize("budget", ["0s", "1h"])
def test_parents_that_an_item_does_not_show_are_counted_apart(tmp_path, one_core, tiny, budget):
    """Figure 3 shows levels 0 and 3; levels 1 and 2 are trained for them: no count is negative."""
    n, stored = len(lth.runs("fig3", "smoke")), 4 if budget == "1h" else 0
    words = ["run", "lth", "fig3", "--scale", "smoke", "--results-dir", tmp_path]
    told = call(*words, "--budget", budget)
    assert told.exit_code == (0 if budget == "1h" else cli.LEFT), told.output
    counts = [int(count) for count in re.findall(r"-?\d+", told.stdout)]
    assert min(counts) >= 0
    assert counts[0] == n
    assert len(finished(tmp_path)) == (stored and n + 2)
    assert (" 0 left" in told.stdout) is (budget == "1h")
    again = call(*words, "--budget", "0s").stdout
    assert min(int(count) for count in re.findall(r"-?\d+", again)) >= 0


@pytest.mark.parametrize("words", [["run", "lth", "fig3", "--scale", "smoke"], ["status"], ["merge"]])
def test_a_results_dir_that_is_a_file_is_told_before_any_training(tmp_path, monkeypatch, words):
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    (tmp_path / "file").write_text("mine")
    told = call(*words, "--results-dir", tmp_path / "file")
    assert told.exit_code == 2
    assert told.stdout == ""
    assert told.stderr.startswith("lottery: ")
    assert str(tmp_path / "file") in told.stderr
    assert told.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def queue_lines():
    """Every line of lottery/experiments/queue/*.txt without its comment."""
    files = sorted((Path(lottery.__file__).parent / "experiments/queue").glob("*.txt"))
    lines = [(file.name, line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [(name, words) for name, line in lines if (words := shlex.split(line, comments=True))]


def test_there_is_a_queue_of_each_paper():
    assert {f"{paper}.txt" for paper in PAPERS} == {name for name, _ in queue_lines()}


@pytest.mark.parametrize(("file", "words"), queue_lines())
def test_a_line_of_the_queue_is_the_arguments_of_run(file, words):
    given = typer.main.get_command(app).commands["run"].make_context("run", words).params
    assert file == f"{given['paper']}.txt"
    assert cli._asked(given["paper"], given["items"], given["scale"], given["trials"])
    if given["budget"]:
        assert cli._seconds(given["budget"]) > 0


def test_trials_are_seeds_from_0(tmp_path, one_core, tiny):
    call("run", "lth", "fig12", "--scale", "smoke", "--trials", "2", "--budget", "0s", "--results-dir", tmp_path)
    told = call("run", "lth", "fig12", "--scale", "smoke", "--trials", "2", "--results-dir", tmp_path)
    assert told.exit_code == 0, told.output
    assert {row["seed"] for row in Store(tmp_path).rows().values()} == {0, 1}


def test_status_tells_what_is_under_way_failed_and_left(tmp_path, one_core, tiny):
    """A lease of another machine, a failure and the time of the rest; a failed run is retried alone and forgotten."""
    runs = lth.runs("fig12", "smoke")
    call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    mine = Store(tmp_path)
    first, second = (tmp_path / ".spool" / f"{r.key}.parquet" for r in runs[-2:])
    first.unlink()
    second.unlink()
    mine.artifact(runs[-1].parent.key).unlink()
    mine.note_failure(runs[-1].key, MemoryError("out of memory\nat line 3"))
    mine.leases.mkdir(exist_ok=True)
    since = "2026-11-28T08:00:00+00:00"
    lease = {"host": "elsewhere", "pid": 7, "in": "x", "since": since}
    (mine.leases / runs[-2].key).write_text(json.dumps(lease))
    told = json.loads(call("status", "--json", "--results-dir", tmp_path).stdout)
    [line] = [
        line for line in told["items"] if (line["paper"], line["item"], line["scale"]) == ("lth", "fig12", "smoke")
    ]
    n = len(runs)
    assert (line["stored"], line["runs"], line["running"], line["failed"]) == (n - 2, n, 1, 1)
    paces, left = pace.paces(mine), engine.missing(runs, mine)
    assert len(left) == 3  # whose weights are gone counts as well
    assert line["core_seconds_left"] == round(sum(pace.expected(paces, r.kind, r.work) for r in left))
    assert told["running"] == [{"key": runs[-2].key, "host": "elsewhere", "pid": 7, "since": since}]
    assert [(f["key"], f["reason"]) for f in told["failed"]] == [(runs[-1].key, "MemoryError: out of memory")]
    words = call("status", "--results-dir", tmp_path).stdout
    assert re.search(rf"{n - 2:4} of {n:4} runs, 1 running, 1 failed, \d+ minutes of one core left", words)
    assert f"failed {runs[-1].key} at " in words

    told = call("run", "lth", "fig12", "--scale", "smoke", "--retry", "failed", "--results-dir", tmp_path)
    assert "1 runs: 0 were stored, 1 trained now, 0 left." in told.stdout
    assert not Store(tmp_path).failures()
    assert not first.exists()


def test_retry_looks_once_for_what_failed_and_finds_parents_that_no_figure_shows(tmp_path, one_core, tiny, monkeypatch):
    """Figure 3 shows level 3; what failed is level 1, on the way there."""
    shown = lth.runs("fig3", "smoke")
    parent = next(r for r in shown if r.level == 3).parent.parent
    assert parent not in shown
    mine = Store(tmp_path)
    mine.note_failure(parent.key, MemoryError())
    failures, looks = Store.failures, []
    monkeypatch.setattr(Store, "failures", lambda self: looks.append(self) or failures(self))
    told = call("run", "lth", "fig3", "--scale", "smoke", "--retry", "failed", "--results-dir", tmp_path)
    assert "1 runs: 0 were stored, 1 trained now, 0 left." in told.stdout, told.output
    assert len(looks) == 1
    assert not mine.failures()


class Counting(futures.Executor):
    """Runs at once and counts what it was given."""

    given = 0

    def submit(self, fn, /, *args, **kwargs):
        Counting.given += 1
        future = futures.Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_any_executor_by_its_name(tmp_path, tiny, monkeypatch):
    n = len(lth.runs("fig12", "smoke"))
    told = call("run", "lth", "fig12", "--scale", "smoke", "--executor", "test_cli:Counting", "--results-dir", tmp_path)
    assert f"{n} trained now, 0 left." in told.stdout, told.output
    assert Counting.given == n


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["run", "ttt"], "Unknown paper 'ttt': choose one of lth, cs, str, grasp, compare."),
        (["run", "lth", "fig99"], "Unknown item 'fig99' of lth: choose from fig1, "),
        (["run", "lth", "fig3", "table1"], "Unknown item 'table1' of lth: "),
        (["run", "lth", "fig3", "lth-fig3"], "Unknown claim 'lth-fig3': "),
        (["run", "grasp", "fig1"], "Unknown item 'fig1' of grasp: choose from grid, "),
        (["run", "grasp", "--scale", "primary"], "Unknown scale 'primary': choose one of paper, laptop, smoke."),
        (["run", "grasp", "--trials", "0"], "Invalid trials 0: give a whole number from 1."),
        (["run", "lth", "--scale", "huge"], "Unknown scale 'huge': choose one of paper, primary, laptop, smoke."),
        (["run", "lth", "--budget", "20"], "Invalid budget '20': give a number and s, m or h, such as 20m."),
        (["run", "lth", "--budget", "soon"], "Invalid budget 'soon': "),
        (["run", "lth", "--device", "tpu"], "Invalid device 'tpu': give cpu, or cuda where a GPU is present."),
        (["run", "lth", "--threads", "0"], "Invalid threads 0: give a whole number from 1."),
        (["run", "lth", "--trials", "0"], "Invalid trials 0: give a whole number from 1."),
        (["run", "lth", "--retry", "all"], "Invalid retry 'all': give 'failed', or leave it out to train all that is "),
        (["run", "lth", "--executor", "local:0"], "Invalid executor 'local:0': give local: and a number of processes"),
        (["run", "lth", "--executor", "local:4", "--device", "cuda"], "Invalid slots 4 with device cuda: here a GPU "),
        (["run", "lth", "--executor", "four"], "Invalid executor 'four': give local:4, dask://host:port or module:"),
        (["run", "lth", "--executor", "nowhere:x"], "Invalid executor 'nowhere:x': ModuleNotFoundError: No module "),
        (["run", "lth", "--executor", "json:JSONDecoder"], "Invalid executor 'json:JSONDecoder': a JSONDecoder is no "),
        (["merge", "/no/such/folder"], "No folder /no/such/folder: name the results folder to take runs from."),
        (["merge"], "No folder "),
        (["status"], "No folder "),
        (["status", "--json"], "No folder "),
        (["scorecard"], "No folder "),
        (["audit", "--list"], "No folder "),
        (["audit", "0123", "--runs", "5"], "Invalid runs 5 with a key: that run alone is trained, nothing is drawn; "),
    ],
)
def test_bad_input_is_one_line_on_stderr(tmp_path, words, text):
    told = call(*words, "--results-dir", tmp_path / "new")
    assert told.exit_code == 2
    assert told.stdout == ""
    assert told.stderr.startswith(f"lottery: {text}")
    assert told.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            RuntimeError("CUDA out of memory.\nTried to"),
            2,
            "RuntimeError: CUDA out of memory. (LOTTERY_TRACEBACK=1 shows ",
        ),
        (MemoryError(), 2, "MemoryError (LOTTERY_TRACEBACK=1 shows where)"),
        (ValueError("of torch\nin two lines"), 2, "of torch\n"),
        (ValueError(), 2, "ValueError (LOTTERY_TRACEBACK=1 shows where)"),
        (
            BrokenProcessPool("A process ended.\n\nIt"),
            cli.LEFT,
            "BrokenProcessPool: A process ended. (start it again for",
        ),
        (futures.CancelledError(), cli.LEFT, "CancelledError (start it again for what is left)"),
    ],
)
def test_an_error_of_a_training_is_one_line(tmp_path, monkeypatch, error, code, text):
    """Exit status 3, after which a loop goes on, only where the workers are gone."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(experiments, "run", fail)
    words = ["run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path]
    told = call(*words)
    assert told.exit_code == code
    assert told.stdout.endswith("left.\n")
    assert told.stderr.startswith(f"lottery: {text}")
    assert told.stderr.count("\n") == 1
    monkeypatch.setenv("LOTTERY_TRACEBACK", "1")
    assert call(*words).exception is error


def test_a_run_that_ends_any_worker_ends_a_loop_too(tmp_path, monkeypatch):
    """Else it would be started again for ever."""
    one = lth.runs("fig12", "smoke")[0]

    def fail(*args, **options):
        Store(tmp_path).note_failure(one.key, error)
        raise error

    error = BrokenProcessPool("The process that trained it died: give it more memory.")
    monkeypatch.setattr(experiments, "run", fail)
    told = call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    assert (told.exit_code, told.stderr) == (2, f"lottery: {error}\n")


SCRIPT = """
import argparse
import concurrent.futures

number = 3
mine = lambda: concurrent.futures.ThreadPoolExecutor(1)


def one_more(x):
    return x


def script():
    argparse.ArgumentParser().parse_args(["x"])
"""
CALLED = ("run", "lth", "fig12", "--scale", "smoke", "--budget", "0s", "--results-dir", "mine", "--executor")


@pytest.mark.parametrize("words", [CALLED, ("prune", "--data", "digits", "--epochs", "1")])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own_things:number", "TypeError: 'int' object is not callable"),
        ("own_things:one_more", r"TypeError: one_more\(\) missing 1 required positional argument: 'x'"),
        ("own_things:script", "SystemExit: 2"),
        ("own_things:none", "AttributeError: module 'own_things' has no attribute 'none'"),
        ("own_wrong:x", r"SyntaxError: .* \(own_wrong.py, line 1\)"),
    ],
)
def test_what_a_module_of_ones_own_raises_is_one_line(tmp_path, monkeypatch, words, name, text):
    (tmp_path / "own_things.py").write_text(SCRIPT)
    (tmp_path / "own_wrong.py").write_text("x = = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own_things", raising=False)
    told = call(*words, name)
    assert told.exit_code == 2
    what = "model" if "prune" in words else "executor"
    assert re.fullmatch(rf"lottery: Invalid {what} '{name}': {text}\.", told.stderr.splitlines()[-1])
    assert told.stderr.count("\n") == 1 or name == "own_things:script"  # argparse has its own say
    assert not (tmp_path / "mine").exists()


def test_an_executor_in_the_working_directory(tmp_path, monkeypatch, tiny):
    (tmp_path / "own_executor.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    told = call(*CALLED, "own_executor:mine")
    assert told.exit_code == cli.LEFT, told.output
    assert told.stderr == ""


@pytest.mark.parametrize(
    "words", [["run", "lth", "fig3", "--scale", "smoke"], ["status"], ["status", "--json"], ["merge"]]
)
def test_outside_of_a_clone_one_line_says_what_to_do(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    told = call(*words)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert re.fullmatch(r"lottery: No results folder around .*: .*--results-dir\.\n", told.stderr)
    assert not list(tmp_path.iterdir())


def test_a_damaged_result_is_named_on_stderr_and_the_json_stays_json(tmp_path):
    (tmp_path / "2026-01-01-00000000.parquet").write_bytes(b"PAR1 and nothing else")
    told = call("status", "--json", "--results-dir", tmp_path)
    assert told.exit_code == 0
    assert json.loads(told.stdout)["stored"] == 0
    assert "2026-01-01-00000000.parquet" in told.stderr


def test_one_run_is_audited_outside_of_a_clone(tmp_path, monkeypatch, one_core, tiny):
    """Nothing is drawn, so no commit is needed."""
    call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    monkeypatch.chdir(tmp_path)
    key = next(iter(Store(tmp_path).keys()))
    told = call("audit", key, "--list", "--results-dir", tmp_path)
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith(f"{key} lth fig")


def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", str)
    monkeypatch.setattr(cli, "sys", types.SimpleNamespace(modules={}))
    monkeypatch.setattr(cli, "_declare", lambda: ([], {}))
    assert cli._declared() == ([], {})
    assert not list(tmp_path.iterdir())


def test_status_names_every_item_of_every_scale(tmp_path):
    told = json.loads(call("status", "--json", "--results-dir", tmp_path).stdout)
    assert told["schema"] == 1
    assert {(line["paper"], line["item"], line["scale"]) for line in told["items"]} == {
        (name, i, s) for name in PAPERS for i in papers.paper(name).items for s in papers.paper(name).scales
    }
    [line] = [line for line in told["items"] if (line["item"], line["scale"]) == ("fig14", "laptop")]
    assert (line["runs"], line["iterations"], line["stored"]) == (140, 2_100_000, 0)
    lines = call("status", "--results-dir", tmp_path).stdout.splitlines()
    assert len(lines) == 1 + len(told["items"])
    assert re.fullmatch(r"lth fig14 +laptop +0 of +140 runs", next(x for x in lines if re.search("fig14 +laptop", x)))
    assert not list(tmp_path.iterdir())


def test_status_of_a_paper_and_a_scale_names_their_items_alone(tmp_path):
    told = json.loads(call("status", "--json", "--paper", "str", "--scale", "smoke", "--results-dir", tmp_path).stdout)
    found = [(line["paper"], line["item"], line["scale"]) for line in told["items"]]
    assert found == [("str", item, "smoke") for item in papers.paper("str").items]
    for what, wrong, known in (("--paper", "srt", "lth, cs, str, grasp"), ("--scale", "small", "paper")):
        refused = call("status", what, wrong, "--results-dir", tmp_path)
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"lottery: Unknown {what[2:]} {wrong!r}: choose from {known}")
    primary = call("status", "--paper", "str", "--scale", "primary", "--results-dir", tmp_path)  # a scale of LTH's
    assert primary.stderr == "lottery: Unknown scale 'primary': choose from paper, laptop, smoke.\n"


def test_a_watch_looks_again_until_it_is_interrupted(tmp_path, monkeypatch):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(cli, "_declared", lambda: ([], {}))
    told = call("status", "--watch", "--results-dir", tmp_path)
    assert (told.exit_code, told.stderr) == (130, "")
    assert told.stdout == f"0 runs are stored in {tmp_path}.\n" * 2


def test_without_a_command_there_is_help():
    told = call("--help")
    assert told.exit_code == 0
    for name in ("run", "status", "merge", "scorecard"):
        assert name in told.stdout


def test_scorecard_is_one_json_object(tmp_path):
    told = call("scorecard", "--json", "--results-dir", tmp_path)
    assert told.exit_code == 0, told.output
    card = json.loads(told.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(card) == ["schema", "rows", "totals"]
    assert {f"Figure {i}" for i in range(1, 46)} <= {row["item"] for row in card["rows"]}
    assert {row["evidence"] for row in card["rows"] if row["claim"] is None} <= {"none", "exact"}
    for words in (["--paper", "lth"], []):
        assert call("scorecard", *words, "--results-dir", tmp_path).exit_code == 0


# As a process ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_another_folder_with_a_relative_results_dir(tmp_path):
    (tmp_path / "mine").mkdir()
    process = command("status", "--json", "--results-dir", "mine", cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["stored"] == 0
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.slow
def test_status_needs_no_pytorch_when_the_code_is_that_of_the_last_time(tmp_path):
    code = "import sys\nfrom lottery.cli import app\ntry:\n    app()\nfinally:\n    print('torch' in sys.modules)\n"
    words = [sys.executable, "-c", code, "status", "--json", "--results-dir", tmp_path]
    env = ENV | {"XDG_CACHE_HOME": str(tmp_path)}
    first, second = (subprocess.run(words, env=env, text=True, capture_output=True, check=True) for _ in range(2))
    assert first.stderr == second.stderr == ""
    (told, with_torch), (again, without) = (out.stdout.splitlines() for out in (first, second))
    assert (with_torch, without) == ("True", "False")
    assert told == again == call("status", "--json", "--results-dir", tmp_path).stdout.strip()


INTERRUPTED = """
import os
import signal
from lottery.cli import app
from lottery.experiments import lth
os.cpu_count = lambda: 2  # two workers on any machine
signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a background job of a shell's script inherits
lth.SETTINGS["smoke"] = lth.override(lth.setting("smoke"), iterations=300, rounds=3, trials=2)
app()
"""


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_under_way_and_goes_on_where_it_stopped(tmp_path, one_core, monkeypatch):
    """Ctrl-C reaches every process of the group; what two workers were training at that moment is kept."""
    words = ["run", "lth", "fig3", "--scale", "smoke", "--results-dir", str(tmp_path)]
    everything = 20 * (4 + 1)  # of each trial four levels of a chain and a reinitialised network
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words, "--trials", "20"],
        env=ENV, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    seen, under_way = set(), set()
    while process.poll() is None and not (under_way and len(finished(tmp_path)) >= 2):
        time.sleep(0.3)  # there is no event to wait for: what is under way is leased for a while and not finished
        leased = {path.name for path in (tmp_path / ".leases").glob("[!.]*")}
        under_way, seen = (seen & leased) - {path.stem for path in finished(tmp_path)}, leased
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert re.search("Stopping when the (training under way has|2 trainings under way have) ended", err)
    assert re.search(r"Stopped: (\d) of \1 kept\.", err)
    assert "Traceback" not in out + err

    before = finished(tmp_path)
    assert under_way <= {path.stem for path in before}
    assert 2 < len(before) < everything
    assert set(Store(tmp_path).rows()) == {path.stem for path in before}

    two = lth.override(lth.setting("smoke"), iterations=300, rounds=3, trials=2)
    monkeypatch.setitem(lth.SETTINGS, "smoke", two)
    told = call(*words)
    assert told.exit_code == 0, told.output
    assert told.stdout.endswith(" 0 left.\n")
    after = finished(tmp_path)
    assert before.items() <= after.items(), "a finished run was trained again"
    # figure 12 draws every level, so its runs are those of figure 3 and their parents
    wanted = {path.stem for path in before} | {r.key for r in lth.runs("fig12", two)}
    assert set(Store(tmp_path).rows()) == {path.stem for path in after} == wanted


NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
"""


def test_prune(tmp_path, monkeypatch):
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    words = ["prune", "own_net:net", "--data", "digits", "--method", "gmp", "--density", "0.2", "--epochs", "1"]
    result = call(*words, "--option", "budget=erk", "--skip", "3", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "Sequential by gmp: density 0.2 asked, 0.2000 got, 256 of 1,280 weights" in result.output
    assert "left alone: 3 (skipped)" in result.output
    assert "written: model.safetensors, report.json, ticket.safetensors in out" in result.output
    assert json.loads((tmp_path / "out/report.json").read_text())["layers"]["1"]["kept"] == 256
    again = call("prune", "own_net:net", "--data", "digits", "--epochs", "1", "--option", "rounds=1", "--checkpoint",
                   "out/model.safetensors")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert (tmp_path / "pruned/model.safetensors").is_file()


def meta():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to("meta")


def locked():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.lock = threading.Lock()
    return net


def test_prune_lists_what_it_has_written_and_nothing_of_an_earlier_network(tmp_path, monkeypatch):
    """`~` in `--out=~/x`, which no shell expands, is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.onnx", "notes.txt"):
        (out / name).write_text("mine")
    words = ["prune", "lenet_300_100", "--data", "digits", "--method", "random", "--epochs", "1", "--out=~/out"]
    told = call(*words)
    assert told.exit_code == 0, told.output
    assert told.stdout.endswith(f"written: model.safetensors, report.json, ticket.safetensors in {out}\n")
    there = {"model.safetensors", "report.json", "ticket.safetensors", "notes.txt"}
    assert {path.name for path in out.iterdir()} == there
    assert not (tmp_path / "~").exists()

    (out / "model.onnx").write_text("of an earlier network")
    monkeypatch.setattr(export, "runtime", lambda: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None.no_such_thing)
    told = call(*words, "--onnx")
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith(f"lottery: No {out / 'model.onnx'} (AttributeError: ")
    assert told.stderr.endswith("); model.safetensors, report.json, ticket.safetensors are there.\n")
    assert {path.name for path in out.iterdir()} == there


@pytest.mark.parametrize("command", ["audit", "bench"])
def test_a_json_that_cannot_be_written_is_refused_before_any_work(command, tmp_path, monkeypatch):
    from lottery.experiments import audit

    monkeypatch.setattr(audit, "declared", lambda store: pytest.fail("looked"))
    monkeypatch.setenv("HOME", str(tmp_path))
    store = ["--results-dir", tmp_path] if command == "audit" else []
    (tmp_path / "file").touch()
    for given, text in (
        (tmp_path, f"Invalid json {tmp_path}: it is a folder; name a file."),
        ("~", f"Invalid json {tmp_path}: it is a folder; name a file."),
        (tmp_path / "none" / "x.json", f"No folder {tmp_path / 'none'}: make it first, or name another file."),
        (tmp_path / "file" / "x.json", f"No folder {tmp_path / 'file'}: make it first, or name another file."),
    ):
        told = call(command, f"--json={given}", *store)
        assert (told.exit_code, told.stdout, told.stderr) == (2, "", f"lottery: {text}\n")
    monkeypatch.setattr(tempfile, "mkstemp", unwritable)
    told = call(command, "--json", tmp_path / "x.json", *store)
    assert told.stderr.startswith(f"lottery: Cannot write {tmp_path / 'x.json'}: Permission denied. Name ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def unwritable(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_only_papers_with_claims_are_offered_a_scorecard():
    [line] = [p for p in app.registered_commands if p.callback.__name__ == "scorecard"]
    offered = inspect.get_annotations(line.callback)["paper"].__metadata__[0].help
    assert re.findall(r"\w+", offered.removeprefix("One of ").partition(";")[0]) == list(names.PAPERS)
    assert set(names.PAPERS) == set(scorecard.papers(ROOT / "results" / "reported"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["lenet", "--data", "digits"], "Invalid model 'lenet': give module:factory, such as mynet:Net, or one of"),
        (["json:JSONDecoder", "--data", "digits"], "Invalid model 'json:JSONDecoder': a JSONDecoder is no torch.nn."),
        (["lenet_300_100", "--data", "digits", "--method", "x"], "Unknown method 'x': choose one of magnitude, lth"),
        (["lenet_300_100", "--data", "/none"], "No folder /none: give the folder that holds one folder of images"),
        (["lenet_300_100", "--data", "digits", "--option", "rounds"], "Invalid option 'rounds': give name=value"),
        (
            ["lenet_300_100", "--data", "digits", "--option", "round=3"],
            "Unknown option 'round' of lth: it takes rounds",
        ),
        (["lenet_300_100", "--data", "digits", "--option", "density=0.3"], "Unknown option 'density' of lth: it takes"),
        (
            ["lenet_300_100", "--data", "digits", "--option", "rounds=many"],
            "Invalid rounds 'many': give a whole number.",
        ),
        (["lenet_300_100", "--data", "digits", "--epochs", "-5"], "Invalid epochs -5: give a whole number from 1."),
        (["lenet_300_100", "--data", "digits", "--size", "0"], "Invalid size 0: give a whole number from 1."),
        (["lenet_300_100", "--data", "digits", "--grey"], "Invalid grey: the pictures of digits stay as they are; "),
        (["lenet_300_100", "--data", "digits", "--out", __file__], f"Cannot write {__file__}/model.safetensors: "),
        (["lenet_300_100", "--data", "digits", "--out", f"{__file__}/new"], f"Cannot write {__file__}/model."),
        (["small_cli:meta", "--data", "digits"], "Invalid model: '1.weight' is on the meta device, without values"),
        (["small_cli:locked", "--data", "digits"], "The model cannot be copied (cannot pickle"),
        (
            ["lenet_300_100", "--data", "digits", "--onnx"],
            "ONNX needs onnxruntime: pip install onnxscript onnxruntime.",
        ),
    ],
)
def test_prune_refuses_in_one_line_before_any_training(tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "small_cli", types.SimpleNamespace(meta=meta, locked=locked))
    result = call("prune", *arguments)
    assert not list(tmp_path.iterdir())
    assert result.exit_code == 2
    assert result.stderr.startswith(f"lottery: {line}")
    assert result.stderr.count("\n") == 1


def test_prune_leaves_nothing_of_a_training_that_fails(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of memory\nat line 3")

    monkeypatch.setattr(training, "fit", fail)
    out = tmp_path / "a" / "b"
    result = call("prune", "lenet_300_100", "--data", "digits", "--epochs", "1", "--out", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "lottery: RuntimeError: out of memory (LOTTERY_TRACEBACK=1 shows where)\n"
    assert not list(tmp_path.iterdir())


def test_a_terminated_run_is_an_interrupted_one(tmp_path, monkeypatch):
    """SIGTERM is what a batch system or a container sends."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(experiments, "run", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    try:
        assert call("run", "lth", "fig3", "--scale", "smoke", "--results-dir", str(tmp_path)).exit_code == 130
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


WORKERS = """
import os, signal, time
from lottery.experiments import engine
pool = engine._pool(2)
pool.submit(os.getpid).result()
for pid in pool._processes:  # the first has begun, the other one may be starting
    for stop in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, stop)
[pool.submit(time.sleep, 0.1) for _ in range(4)][-1].result()
print(*pool._processes, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed_and_of_no_signal_to_the_whole_group():
    """As a terminal sends SIGINT and a batch system SIGTERM: what the workers train is the parent's to end."""
    psutil = pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", WORKERS], env=ENV, text=True, stdout=subprocess.PIPE) as parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        survived = [worker for worker in workers if worker.status() != psutil.STATUS_ZOMBIE]
        parent.kill()
    assert len(survived) == 2
    _, left = psutil.wait_procs(workers, timeout=30)
    alive = [worker for worker in left if worker.status() != psutil.STATUS_ZOMBIE]
    for worker in alive:
        worker.kill()
    assert not alive


def test_version_also_where_the_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution("no such"))
    told = call("--version")
    assert told.exit_code == 0
    assert told.stdout == f"lottery {lottery.__version__}\n"


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    words = [sys.executable, "-m", "lottery", "status", "--results-dir", str(tmp_path)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, env=ENV, cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_another_process_trains_meanwhile_is_not_counted_as_trained_now(tmp_path, one_core, tiny, monkeypatch):
    runs, train = lth.runs("fig12", "smoke"), engine.execute
    last = runs[-2:]
    assert last[0].parent == last[1].parent

    def and_another(group, *how):
        if group[0] in last:  # while one is trained here, another process trains the other
            train([r for r in last if r not in group], *how)
            last.clear()
        return train(group, *how)

    monkeypatch.setattr(engine, "execute", and_another)
    told = call("run", "lth", "fig12", "--scale", "smoke", "--results-dir", tmp_path)
    counts = f"0 were stored, {len(runs) - 1} trained now, 1 trained by others meanwhile, 0 left"
    assert f"{len(runs)} runs: {counts}." in told.stdout
