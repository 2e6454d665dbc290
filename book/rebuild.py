"""Re-run the book: `rebuild.py` is `make book`, `rebuild.py notebooks` refreshes the committed copies (or those of the
notebooks named after it), and `rebuild.py nbval` runs them under nbval.

Papermill executes every notebook with its committed parameters into book/_build/notebooks; the copy is brought into a
normal form and compared with the committed outputs. Beside that Jupyter Book builds the committed notebooks, which it
never executes. Nothing outside book/_build is written, except by `notebooks`.
"""

import difflib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
BUILD = ROOT / "book" / "_build"
CHECKED = "nbval-check-output"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def normalise(nb):
    """One form for equal runs: no papermill metadata, no times, no Python version, adjacent pieces of a stream joined.

    Changes `nb` in place and returns it. Raises RuntimeError naming the first cell that wrote to stderr: a warning must
    not become part of the book.
    """
    nb.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(nb.cells, start=1):
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    raise RuntimeError(f"cell {number} wrote to stderr: {output.text.strip()}")
    return nb


def joined(outputs: list) -> list:
    """The outputs with adjacent pieces of the same stream as one; how a kernel cuts its output is chance."""
    result = []
    for output in outputs:
        if result and output.output_type == "stream" and result[-1].get("name") == output.name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def texts(cell) -> list[str]:
    """What a cell printed or displayed as text of any kind, output by output; pictures are left out."""
    found = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            found.append(output.text)
        elif not any(kind.startswith("image/") for kind in output.data):
            found += [f"{kind}\n{text}\n" for kind, text in sorted(output.data.items()) if kind.startswith("text/")]
    return found


def compare(committed, executed) -> tuple[int, dict[int, str]]:
    """Number of checked cells, and for each that differs its number and a short diff of the texts."""
    old, new = committed.cells, executed.cells
    if [cell.source for cell in old] != [cell.source for cell in new]:
        raise RuntimeError("the executed copy has other cells")
    checked = [i for i, cell in enumerate(old) if CHECKED in cell.metadata.get("tags", [])]
    return len(checked), {i + 1: diff(texts(old[i]), texts(new[i])) for i in checked if texts(old[i]) != texts(new[i])}


def diff(old: list[str], new: list[str], lines: int = 12) -> str:
    """The first lines of a unified diff, indented."""
    pair = ["".join(old).splitlines(), "".join(new).splitlines()]
    found = list(difflib.unified_diff(*pair, "committed", "this run", lineterm="", n=0))
    return "\n".join(f"    {line}" for line in [*found[:lines], *["..."][: len(found) > lines]])


def private_environment() -> dict[str, str]:
    """The environment of every kernel: nothing of the user's Jupyter, Python or matplotlib settings.

    A kernel named python3 can then only be this Python's own. The user's data and own results go too: the book shows
    what is committed.
    """
    dropped = ("JUPYTER", "IPYTHON", "PAPERMILL", "PYTEST", "PYTHON", "MPL", "LOTTERY")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    folders = {"JUPYTER_CONFIG_DIR": "jupyter", "JUPYTER_DATA_DIR": "jupyter", "JUPYTER_RUNTIME_DIR": "runtime"}
    folders |= {"IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib", "LOTTERY_RESULTS": "results"}
    private = {key: str(BUILD / "home" / folder) for key, folder in folders.items()}
    return kept | private | {"JUPYTER_NO_CONFIG": "1", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(ROOT)}


def call(*arguments: str) -> int:
    """Exit status of this Python with other arguments, from the repository root."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode


def execute(path: Path) -> tuple[Path, str]:
    """Run a notebook into the build folder. Returns the normalised copy's path and, if the run failed, why."""
    import papermill

    copy = BUILD / "notebooks" / path.name
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=CRITICAL"]}  # kernels log their own shutdown
    try:
        papermill.execute_notebook(path, copy, cwd=NOTEBOOKS, kernel_name=KERNEL["name"], **quiet)
        nbformat.write(normalise(nbformat.read(copy, as_version=4)), copy)
    except (papermill.PapermillExecutionError, RuntimeError) as error:
        return copy, str(error).strip()
    return copy, ""


def executed(*names: str) -> Iterator[tuple[Path, Path]]:
    """Pairs (committed notebook, its executed copy) of all or some, large ones first; two at a time, of one thread.

    Raises SystemExit when one fails, or is unknown.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"Unknown notebook {unknown[0]!r}: choose from {', '.join(known)}.")
    shutil.rmtree(BUILD / "notebooks", ignore_errors=True)
    (BUILD / "notebooks").mkdir(parents=True)
    paths = [known[name] for name in set(names) or known]
    paths.sort(key=lambda path: (-path.stat().st_size, path.name))
    with ProcessPoolExecutor(2) as pool:
        for path, (copy, failure) in zip(paths, pool.map(execute, paths), strict=True):
            if failure:
                sys.exit(f"{path.relative_to(ROOT)} failed: {failure}")
            print(f"ran {path.relative_to(ROOT)}", flush=True)
            yield path, copy


def check() -> None:
    """Execute and compare all notebooks; print the count. Raises SystemExit when a checked cell differs."""
    total = differ = 0
    for path, copy in executed():
        count, found = compare(nbformat.read(path, as_version=4), nbformat.read(copy, as_version=4))
        total, differ = total + count, differ + len(found)
        for number, text in found.items():
            print(f"{path.relative_to(ROOT)}, cell {number} differs:\n{text}")
    print(f"{total} checked cells, {differ} differ", flush=True)
    if differ:
        sys.exit("The outputs above are not those committed: `make notebooks` keeps the new ones.")


def build() -> None:
    """Jupyter Book from the repository root; from nothing, since Sphinx does not see that a docstring changed."""
    shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
    if call("-c", "import sys; sys.path.insert(0, 'book/teaching'); import build; build.build()"):
        sys.exit("The labs' pages were not made.")
    start = "from jupyter_book.cli.main import main; main()"
    where = ("--config", "book/_config.yml", "--toc", "book/_toc.yml", "--path-output", "book")
    if call("-c", start, "build", ".", *where, "-W", "-n", "--keep-going", "--quiet"):
        sys.exit("The book has warnings.")


def book() -> None:
    """Check all notebooks and, beside that, build the book: it takes the committed ones."""
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(build)
        check()
    built.result()
    print(f"The book is built. Open {BUILD / 'html' / 'index.html'}")


def refresh(*names: str) -> None:
    """Replace the committed notebooks, or those named, by their executed copies, all or none."""
    for path, copy in list(executed(*names)):
        os.replace(copy, path)
        print(f"refreshed {path.relative_to(ROOT)}")


def nbval() -> None:
    """Run the notebooks again, as tests: every cell runs, the checked ones print what is committed."""
    if code := call("-m", "pytest", "--nbval-lax", "--nbval-current-env", "notebooks"):
        sys.exit(code)


def main(mode: str = "book", *names: str) -> None:
    modes = {"book": book, "notebooks": refresh, "nbval": nbval}
    if mode not in modes:
        sys.exit(f"Unknown mode {mode!r}: choose one of {', '.join(modes)}.")
    if names and mode != "notebooks":
        sys.exit(f"Unknown {names[0]!r}: only `notebooks` is followed by names.")
    os.environ |= (environment := private_environment())
    for key in os.environ.keys() - environment:
        del os.environ[key]
    call("-c", "import matplotlib.font_manager")  # makes its cache now, not with a message in the middle of a notebook
    modes[mode](*names)


if __name__ == "__main__":
    main(*sys.argv[1:])
