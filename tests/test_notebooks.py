"""The chapter as a reader runs it: papermill with other parameters, with bad ones, and on altered results.

Every notebook runs in a copy of the clone's layout, in the environment that `make book` gives it.
"""

import contextlib
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lottery.chapter import Chapter
from lottery.experiments import Store, cs, grasp, lth

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("rebuild", ROOT / "book/rebuild.py")
rebuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rebuild)

COMMITTED = nbformat.read(ROOT / "notebooks/lth.ipynb", as_version=4)
TRAINED = {"scale": "smoke", "recompute": "missing"}
EXPLORATION = TRAINED | {"model": "conv2", "init": "rewind", "rewind_to": 5, "iterations": 10, "rounds": 3}
EXPLORATION |= {"trials": 1, "seed": 5, "scope": "global", "rate": 0.5}
# One bad parameter of each notebook; tests/test_chapter.py has those of the class that refuses them.
BAD = {
    "lth": TRAINED | {"rate": 1.5},
    "grasp": TRAINED | {"temperature": -1.0},
    "compare": TRAINED | {"iterations": 2},
}
# One number of each figure that draws printed points, and one of the table of claims: the label of the figure or
# section; file, start of the line, what becomes of the number.
REPORTED = {
    "fig-lth-4-long": ("lth.csv", "Figure 4,a/early stop,lenet/imp vs dense,21.1,", ",-38,", ",-48,"),
    "fig-lth-12": ("lth.csv", 'Figure 4,b/train accuracy/last,"lenet, all curves",5,', ",100,", ",90,"),
    "fig-lth-14": ("lth.csv", 'Figure 14,"test accuracy, reading point not stated",lenet/imp,', ",98.3,", ",97.3,"),
    "lth-claims": ("lth_claims.csv", "lth-fig4-accuracy-13,", ",5,0.3,,paper", ",5,0.4,,paper"),
}
pytestmark = pytest.mark.slow


@dataclass(repr=False)
class Executed:
    """One run of papermill: the notebook without the cell of its parameters, the clone, and where new runs went."""

    notebook: nbformat.NotebookNode
    code: int
    seconds: float
    clone: Path
    results: Path

    def outputs(self, kind):
        return [output for cell in self.notebook.cells for output in cell.get("outputs", []) if kind(output)]

    def completed(self):
        """Itself, in normal form; fails with the error, or with what was written to stderr."""
        assert [f"{e.ename}: {e.evalue}" for e in self.outputs(is_error)] == []
        assert self.code == 0
        rebuild.normalise(self.notebook)
        return self

    @property
    def text(self):
        """All that its cells printed."""
        return "".join(output.text for output in self.outputs(lambda output: output.output_type == "stream"))


def is_picture(output):
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def is_error(output):
    return output.output_type == "error"


def clone(folder, ours=True):
    """The layout of a clone with copies of the results; `ours` as committed, or absent."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "lottery").symlink_to(ROOT / "lottery")
    shutil.copytree(ROOT / "results/reported", folder / "results/reported")
    if ours:
        (folder / "results/ours").mkdir()
        for path in (ROOT / "results/ours").glob("*.parquet"):
            shutil.copy(path, folder / "results/ours")
    return folder


def papermill(clone, results, notebook="lth.ipynb", **parameters):
    """Execute a chapter in a clone. With no parameters the notebook has the cells that are committed."""
    copy = results.parent / f"{results.name}.ipynb"
    options = ["--cwd", clone / "notebooks", "--kernel", "python3", "--no-progress-bar", "--log-level", "CRITICAL"]
    if parameters:
        options += ["--parameters_yaml", json.dumps(parameters | {"results_dir": str(results)})]
    environment = rebuild.private_environment() | {"LOTTERY_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    code = subprocess.run(
        [sys.executable, "-m", "papermill", ROOT / "notebooks" / notebook, copy, *options],
        env=environment, capture_output=True,
    ).returncode  # fmt: skip
    notebook = nbformat.read(copy, as_version=4)
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    return Executed(notebook, code, time.perf_counter() - started, clone, results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Also makes matplotlib's cache of fonts, whose message must not land in a notebook."""
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], env=rebuild.private_environment())
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def bare(folder):
    """A clone without stored runs."""
    return clone(folder / "bare", ours=False)


@pytest.fixture(scope="module")
def anew(folder, bare):
    """All runs trained again in a clone without any; alone, since it is timed, so the tests of it come first."""
    return papermill(bare, folder / "anew", scale="smoke", recompute="all")


@pytest.fixture(scope="module")
def others(folder, bare, request):
    """Futures of all other executions that the selected tests look at, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        runs = {}
        if any(item.get_closest_marker("endurance") for item in request.session.items):
            anew_too = {"scale": "smoke", "recompute": "all"}
            runs |= {name: (bare, anew_too | {"notebook": f"{name}.ipynb"}) for name in ("grasp", "cs")}
            some = ["dense", "imp", "snip", "cs", "gmp", "gmp@begin=0.0"]
            runs["compare"] = bare, TRAINED | {"methods": some, "notebook": "compare.ipynb"}
        runs["exploration"] = bare, EXPLORATION
        runs |= {f"bad-{name}": (bare, given | {"notebook": f"{name}.ipynb"}) for name, given in BAD.items()}
        runs |= {"damaged": (damaged(folder), {}), "reported": (other_reported(folder), {})}
        yield {name: pool.submit(papermill, at, folder / name, **given) for name, (at, given) in runs.items()}
        pool.shutdown(cancel_futures=True)


def damaged(folder):
    """A clone in which one stored test accuracy, of a network that Figure 4 shows, is 0.5 points higher."""
    found = clone(folder / "damaged-clone")
    with contextlib.chdir(found):  # what is committed, whatever else this machine has stored
        scale = Chapter("lth", results_dir=str(folder / "damaged")).scale("fig4")
    shown = {r.key for r in lth.runs("fig4", scale)}
    for path in (found / "results/ours").glob("*.parquet"):
        table = pq.read_table(path)
        hit = [key == min(shown) for key in table["key"].to_pylist()]
        values = [v + 0.005 if h else v for v, h in zip(table["last_test_acc"].to_pylist(), hit, strict=True)]
        at = table.schema.get_field_index("last_test_acc")
        field = table.schema.field(at)
        pq.write_table(table.set_column(at, field, pa.array(values, field.type)), path)
    return found


def other_reported(folder):
    """A clone in which numbers that the paper printed are others, and no checksum tells."""
    found = clone(folder / "reported-clone")
    (found / "results/reported/SHA256SUMS").unlink()
    for name, start, old, new in REPORTED.values():
        path = found / "results/reported" / name
        lines = path.read_text().splitlines(keepends=True)
        [number] = [i for i, line in enumerate(lines) if line.startswith(start)]
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)
        path.write_text("".join(lines))
    return found


# From nothing


@pytest.mark.endurance
def test_smoke_from_nothing_fills_every_figure(anew, capsys):
    with capsys.disabled():
        print(f" [scale smoke from nothing: {anew.seconds:.0f} s] ", end="")
    cells = anew.completed().notebook.cells
    for number, (old, new) in enumerate(zip(COMMITTED.cells, cells, strict=True), start=1):
        drawn = any(map(is_picture, new.get("outputs", [])))
        assert drawn >= any(map(is_picture, old.get("outputs", []))), number
        if "figure" in new.metadata.get("mystnb", {}):  # only the paper's scale has VGG-19
            assert drawn != ("vgg19" in new.source), number


@pytest.mark.endurance
def test_smoke_from_nothing_shows_what_it_trained(anew):
    assert not (anew.clone / "results/ours").exists()
    [store] = anew.results.iterdir()
    runs, trained = lth.runs(None, "smoke"), set(Store(store).rows())
    declared = {r.key for r in runs}
    assert declared <= trained
    pairs = {one.key for r in runs for one in getattr(r, "trained", ())}
    others = [row for key, row in Store(store).rows().items() if key not in declared | pairs]
    assert {row["init"] for row in others} == {"continue"}  # the chains of training on between rounds


@pytest.mark.endurance
def test_grasp_from_nothing_fills_every_figure(others, capsys):
    run = others["grasp"].result().completed()
    with capsys.disabled():
        print(f" [GraSP, scale smoke from nothing, beside others: {run.seconds:.0f} s] ", end="")
    committed = nbformat.read(ROOT / "notebooks/grasp.ipynb", as_version=4).cells
    for number, (old, new) in enumerate(zip(committed, run.notebook.cells, strict=True), start=1):
        drawn = any(map(is_picture, new.get("outputs", [])))
        assert drawn == ("figure" in new.metadata.get("mystnb", {})), number
        assert drawn >= any(map(is_picture, old.get("outputs", []))), number
    assert " that are not stored" not in run.text
    [store] = run.results.iterdir()
    assert set(Store(store).rows()) == {r.key for r in grasp.runs(None, "smoke")}


@pytest.mark.endurance
def test_cs_from_nothing_fills_every_figure(others, capsys):
    run = others["cs"].result().completed()
    with capsys.disabled():
        print(f" [CS, scale smoke from nothing, beside others: {run.seconds:.0f} s] ", end="")
    for number, cell in enumerate(run.notebook.cells, start=1):
        assert any(map(is_picture, cell.get("outputs", []))) == ("figure" in cell.metadata.get("mystnb", {})), number
    assert " that are not stored" not in run.text
    [store] = run.results.iterdir()
    assert {r.key for r in cs.runs(None, "smoke")} <= set(Store(store).rows())


@pytest.mark.endurance
def test_the_comparison_of_a_reader_s_methods_fills_every_figure(others, capsys):
    """Two networks of the digits, with a variant of a method beside it."""
    run = others["compare"].result().completed()
    with capsys.disabled():
        print(f" [comparison, six methods trained, beside others: {run.seconds:.0f} s] ", end="")
    for number, cell in enumerate(run.notebook.cells, start=1):
        drawn = [o["data"]["image/svg+xml"] for o in cell.get("outputs", []) if is_picture(o)]
        assert bool(drawn) == ("figure" in cell.metadata.get("mystnb", {})), number
        assert not any("not enough runs yet" in text for text in drawn), number
    said = "".join(o["data"].get("text/markdown", "") for o in run.outputs(lambda output: "data" in output))
    assert "| GMP begin=0.0 | begin=0.0 | 2 |" in said
    assert "not stored (" not in said


# Other parameters


def test_an_exploration_completes_without_verdict(others):
    """Of a convolutional network, whose weights are rewound."""
    run, given = others["exploration"].result().completed(), EXPLORATION
    assert run.text.count("exploration: no verdict") == 2  # the summary and the table of claims
    drawn = [cell for cell in COMMITTED.cells if any(map(is_picture, cell.get("outputs", [])))]
    deep = [c for c in drawn if c["source"].startswith("recipes(") or 'instability("' in c["source"]]
    assert len(deep) > 1  # of the residual network, which is no part of an exploration
    assert len(run.outputs(is_picture)) == len(drawn) - len(deep)
    rows = Store(run.results).rows().values()
    assert {row["seed"] for row in rows} == {given["seed"]}
    assert {row["iterations"] for row in rows} == {given["iterations"]}
    assert max(row["level"] for row in rows) == given["rounds"]
    assert not (run.clone / "results/ours").exists()


# Bad parameters


@pytest.mark.parametrize("name", BAD)
def test_a_bad_parameter_is_one_line_and_trains_nothing(name, others):
    run = others[f"bad-{name}"].result()
    assert run.code != 0
    [error] = run.outputs(is_error)
    setup = next(cell for cell in run.notebook.cells if "Chapter(" in cell.source)
    assert error in setup.outputs
    [line] = "\n".join(error.traceback).splitlines()
    parameter, value = list(BAD[name].items())[-1]
    assert line.startswith(f"Invalid {parameter} {value}: give ")
    assert not run.results.exists()


# Altered results


def test_a_stored_accuracy_that_was_changed_stops_the_chapter(others):
    run = others["damaged"].result()
    assert run.code != 0
    assert run.outputs(is_error)
    assert "last_test_acc is" in run.text
    assert "its test images give" in run.text


@pytest.mark.parametrize("name", REPORTED)
def test_a_reported_number_that_was_changed_is_found(name, others):
    run = others["reported"].result().completed()
    _, found = rebuild.compare(COMMITTED, run.notebook)
    assert set(found) & set(belonging(name)), f"a number of {name} changed and no checked cell after it did"


def belonging(name):
    """Numbers of the code cells that follow a picture, or the label of a section, up to the next text."""
    cells = COMMITTED.cells
    [start] = [
        i
        for i, cell in enumerate(cells)
        if cell.source.startswith(f"({name})=") or cell.metadata.get("mystnb", {}).get("figure", {}).get("name") == name
    ]
    after = itertools.takewhile(lambda i: cells[i].cell_type == "code", range(start + 1, len(cells)))
    return [i + 1 for i in after]
