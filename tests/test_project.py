"""The repository itself: pins, packaging, what committed notebooks must carry, and the comparison of `make book`."""

import ast
import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def module(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


rebuild = module("book/rebuild.py")


# Pins and packaging


def pins():
    return re.findall(r"^([a-z0-9][^ ;]*)==([^ ;]+)", LOCK, re.MULTILINE)


def test_every_pin_has_hashes_and_no_address():
    blocks = re.split(r"^(?=[a-z0-9])", LOCK, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pins()) > 100
    assert all("--hash=sha256:" in block for block in blocks)
    assert not re.search(r"://|--(extra-)?index|--find-links| @ |/(home|root|opt|work|tmp|Users)/", LOCK)


def test_lock_holds_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    locked = dict(pins())
    for requirement in map(Requirement, asked):
        if requirement.name != "lottery":
            assert locked[requirement.name] in requirement.specifier, requirement


def test_conda_environment_has_the_same_pins():
    made = subprocess.run([sys.executable, ROOT / ".ci/environment.py"], capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / "environment.yml").read_text()
    assert len(re.findall(r'^ +- "', made.stdout, re.MULTILINE)) == len(pins())


def test_setup_finds_the_pin_of_its_installer(tmp_path, monkeypatch):
    venv = module(".ci/venv.py")
    monkeypatch.setattr(venv.shutil, "which", lambda name, path=None: None)
    calls = []
    monkeypatch.setattr(venv, "call", lambda *command: calls.append(command))
    assert venv.find_uv(tmp_path, ["pip"]) == str(tmp_path / "uv/bin/uv")
    assert "--require-hashes" in calls[0]
    pin = (tmp_path / "uv.lock").read_text()
    assert pin.startswith("uv==")
    assert len(re.findall("==", pin)) == 1
    assert "--hash=sha256:" in pin


@pytest.mark.slow
def test_wheel_holds_the_package_alone(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lottery"}
    for path in (ROOT / "lottery").rglob("*"):
        if path.suffix in (".py", ".txt"):
            assert path.relative_to(ROOT).as_posix() in names


def test_text_files_have_an_encoding():
    """Elsewhere it would be the locale's: ASCII on some clusters. (ruff's PLW1514 does not see most paths.)"""
    for path in (path for folder in ("lottery", "book") for path in (ROOT / folder).rglob("*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)):
            if getattr(call.func, "attr", None) in ("read_text", "write_text"):
                said = ast.unparse(call)
                assert re.search("utf-8|TEXT", said) or "/proc/" in said, f"{path}: {said}"


# The committed notebooks


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [(i, cell) for i, cell in enumerate(notebook.cells, start=1) if cell.cell_type == "code"]


def test_pictures_have_alt_text_and_caption(notebook):
    for number, cell in code_cells(notebook):
        pictures = [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
        if pictures:
            shown = cell.metadata.get("mystnb", {})
            assert len(pictures) == 1, f"cell {number}: one picture a cell, or they share a caption"
            assert shown.get("image", {}).get("alt"), f"cell {number} has no alt text"
            assert shown.get("figure", {}).get("caption"), f"cell {number} has no caption"
            assert shown.get("figure", {}).get("name"), f"cell {number} has no name"


def test_text_outputs_are_checked_or_exempt(notebook):
    for number, cell in code_cells(notebook):
        if rebuild.texts(cell):
            checked = rebuild.CHECKED in cell.metadata.get("tags", [])
            exempt = cell.metadata.get("lottery", {}).get("exempt")
            assert checked != bool(exempt), f"cell {number}: tag it {rebuild.CHECKED} or give lottery.exempt a reason"


def test_outputs_are_clean_and_complete(notebook):
    text = nbformat.writes(notebook)
    assert text == nbformat.writes(rebuild.normalise(nbformat.reads(text, as_version=4))), "run `make notebooks`"
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|private|opt)/", text), "a path of one machine"
    counts = [cell.execution_count for _, cell in code_cells(notebook) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make notebooks`"
    assert not any(output.output_type == "error" for _, cell in code_cells(notebook) for output in cell.outputs)


def test_what_a_cell_says_is_displayed(notebook):
    """A sentence or table that is neither a cell's last expression nor handed to `display` is seen by nobody."""
    for number, cell in enumerate(notebook.cells, start=1):
        found = ast.parse(cell.source).body if cell.cell_type == "code" else []
        alone = [node for part in found for node in ast.walk(part) if isinstance(node, ast.Expr)]
        calls = [node.value for node in alone if node is not found[-1] and isinstance(node.value, ast.Call)]
        assert not {"say", "table", "listing"} & {getattr(call.func, "id", "") for call in calls}, number


def test_one_cell_of_parameters(notebook):
    tagged = [i for i, cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) <= 1
    lines = [line for i, cell in code_cells(notebook) if i in tagged for line in cell.source.splitlines()]
    assert [line for line in lines if line[:1] != "#" and line.count("=") != 1] == []  # papermill reads no other


# The comparison


def page(*outputs, tags=(rebuild.CHECKED,), source="x"):
    return new_notebook(cells=[new_code_cell(source, id="a", outputs=list(outputs), metadata={"tags": list(tags)})])


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def display(**data):
    return new_output("display_data", data={kind.replace("_", "/"): value for kind, value in data.items()})


def test_equal_outputs_agree():
    assert rebuild.compare(page(stream("1\n")), page(stream("1\n"))) == (1, {})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([stream("0.91\n")], [stream("0.92\n")]),
        ([display(text_plain="1")], [display(text_plain="2")]),
        ([display(text_markdown="a **1**")], [display(text_markdown="a **2**")]),
        ([display(text_html="<b>1</b>", text_plain="1")], [display(text_html="<b>2</b>", text_plain="1")]),
        ([stream("1\n")], []),
        ([], [stream("1\n")]),
    ],
)
def test_a_changed_output_is_found(old, new):
    count, found = rebuild.compare(page(*old), page(*new))
    assert (count, list(found)) == (1, [1])
    assert "this run" in found[1]


def test_pictures_and_untagged_cells_are_not_compared():
    assert rebuild.compare(page(display(image_png="a")), page(display(image_png="b"))) == (1, {})
    assert rebuild.compare(page(stream("1"), tags=()), page(stream("2"), tags=())) == (0, {})


def test_a_notebook_that_is_none_is_named_before_anything_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(rebuild, "BUILD", tmp_path)
    (tmp_path / "notebooks").mkdir()
    with pytest.raises(SystemExit, match=r"^Unknown notebook 'lht': choose from .*, lth, "):
        rebuild.refresh("lht", "lth")
    with pytest.raises(SystemExit, match=r"^Unknown 'lth': only `notebooks` is followed by names"):
        rebuild.main("book", "lth")
    assert (tmp_path / "notebooks").exists()


def test_other_cells_are_an_error():
    with pytest.raises(RuntimeError, match="other cells"):
        rebuild.compare(page(source="a"), page(source="b"))


def test_long_diffs_are_cut():
    _, found = rebuild.compare(page(stream("")), page(stream("\n".join(map(str, range(100))))))
    assert len(found[1].splitlines()) == 13


def test_normal_form():
    nb = page(stream("a"), stream("b"), display(text_plain="1"), stream("c"))
    nb.metadata = {"papermill": {}, "language_info": {"name": "python", "version": "3.11.7"}}
    nb.cells[0].metadata |= {"papermill": {"duration": 1.0}, "execution": {"iopub.status.busy": "2026-01-01"}}
    nb = rebuild.normalise(nb)
    assert [output.get("text") for output in nb.cells[0].outputs] == ["ab", None, "c"]
    assert set(nb.cells[0].metadata) == {"tags"}
    assert nb.metadata == {"kernelspec": rebuild.KERNEL, "language_info": {"name": "python"}}


def test_a_warning_is_not_committed():
    with pytest.raises(RuntimeError, match="cell 1 wrote to stderr: UserWarning"):
        rebuild.normalise(page(stream("UserWarning: x\n", name="stderr")))


def test_kernels_see_nothing_of_the_user(monkeypatch):
    for name in ("LOTTERY_DATA", "JUPYTER_PATH", "MPLBACKEND", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "/elsewhere")
    assert "/elsewhere" not in rebuild.private_environment().values()


# The book's reading of docstrings


def test_docstrings_are_plain_text():
    extension = module("book/extension.py")
    assert extension.escape("|w| of x_, m*θ, net@0.1, `a|b`") == r"\|w\| of x\_, m\*θ, net\@0.1, `a|b`"
    lines = ["Top.", "", "lr, gamma: rate", "and factor.", "seed: trial.", "", "Else: no argument."]
    assert extension.listed(lines, {"lr", "gamma", "seed"})[2:8] == [
        "",
        "Args:",
        "    lr, gamma: rate",
        "        and factor.",
        "    seed: trial.",
        "",
    ]
    assert extension.columns(["", "    kind  value", "    a     1"]) == ["", "::", "", "    kind  value", "    a     1"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_actions_are_pinned_by_hash_with_their_tag_beside_it(path):
    """A tag can be moved to other code; the hash cannot."""
    used = re.findall(r"uses: *(.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
