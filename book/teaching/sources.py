"""The labs' notebooks, in nbgrader's format, and what is made of them.

A source is one notebook a lab, `book/teaching/<lab>.ipynb`, whose cells carry nbgrader's metadata (schema 3):

* `solution`: the student's cell; what stands between `### BEGIN SOLUTION` and `### END SOLUTION` is the answer.
* `grade` with `points`: the check that follows it. What stands between `### BEGIN HIDDEN TESTS` and `### END HIDDEN
  TESTS` is not handed out: it calls `hand_in(name, value)` on what the student's code gives, and the same call on the
  solution, in another process, gives the expected value. No points: practice, whose solution is published.
* `solution` and `grade`: an answer in words, marked by hand.

nbgrader itself releases and validates these notebooks; see `grade.py` for why it does not grade them.
"""

import copy
import csv
import re
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
LABS = ("masks", "annealing", "thresholds", "before-training")
STUB = "# YOUR CODE HERE\nraise NotImplementedError"
WORDS = "*Your answer here.*"
SOLUTION, HIDDEN = "SOLUTION", "HIDDEN TESTS"


def source(lab: str) -> nbformat.NotebookNode:
    """The source notebook of a lab. Raises ValueError: no such lab."""
    if lab not in LABS:
        raise ValueError(f"Unknown lab {lab!r}: choose one of {', '.join(LABS)}.")
    return nbformat.read(HERE / f"{lab}.ipynb", as_version=4)


def facts(cell) -> dict:
    """nbgrader's metadata of a cell; empty for a cell that is text or the student's own."""
    return cell.metadata.get("nbgrader", {})


def points(nb) -> dict[str, int]:
    """The points of what a machine marks, `{grade_id: points}` in order; practice has none and is left out."""
    return {f["grade_id"]: f["points"] for c in nb.cells if (f := facts(c)).get("points") and not f["solution"]}


def by_hand(nb) -> dict[str, int]:
    """The points of the answers in words, `{grade_id: points}`."""
    return {f["grade_id"]: f["points"] for c in nb.cells if (f := facts(c)).get("points") and f["solution"]}


def is_practice(nb, cell) -> bool:
    """Whether the student's cell is followed by a check without points."""
    after = [facts(c) for c in nb.cells[nb.cells.index(cell) + 1 :]]
    return next((not f["points"] for f in after if f.get("grade")), False)


def region(text: str, what: str) -> list[str]:
    """What stands between the marks, once for each pair."""
    return re.findall(rf"^[ \t]*### BEGIN {what}\n(.*?)^[ \t]*### END {what}$", text, flags=re.S | re.M)


def replaced(text: str, what: str, by: str) -> str:
    """The text with each marked region replaced, at its indentation; `by` "" takes it out."""

    def put(found):
        return "\n".join(found[1] + line for line in by.splitlines()) + ("\n" if by else "")

    return re.sub(rf"^([ \t]*)### BEGIN {what}\n.*?### END {what}\n?", put, text + "\n", flags=re.S | re.M).strip("\n")


def unmarked(text: str, what: str) -> str:
    """The text without the marks."""
    return re.sub(rf"^[ \t]*### (BEGIN|END) {what}\n?", "", text + "\n", flags=re.M).strip("\n")


def student(nb, seed: int | None = None):
    """What is handed out: no solution, no hidden test; `seed` is written into the parameters' cell."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if facts(cell).get("solution"):
            stub = STUB if cell.cell_type == "code" else WORDS
            cell.source = replaced(cell.source, SOLUTION, stub)
        cell.source = replaced(cell.source, HIDDEN, "")
    return nb if seed is None else seeded(nb, seed)


def seeded(nb, seed: int):
    """A copy whose parameters' cell has this student's seed."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"^student_seed = \d+", f"student_seed = {seed}", cell.source)
    return nb


def solved(nb):
    """The solutions: the lecturer's copy, without the hidden tests."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        cell.source = replaced(unmarked(cell.source, SOLUTION), HIDDEN, "")
    return nb


def filled(copy_of_student, nb):
    """A student copy with every answer filled in from the source `nb`."""
    done = copy.deepcopy(copy_of_student)
    answers = {facts(c)["grade_id"]: c for c in solved(nb).cells if facts(c).get("solution")}
    for cell in done.cells:
        if (name := facts(cell).get("grade_id")) in answers:
            cell.source = answers[name].source
    return done


def page(nb, lab: str) -> str:
    """The lab as a page of the book, in Markdown: practice with its solution folded, graded tasks without."""
    out = []
    for cell in student(nb).cells:
        name = facts(cell).get("grade_id")
        original = next(c for c in nb.cells if c.id == cell.id)
        if cell.cell_type == "markdown":
            out.append(cell.source)
        else:
            out.append(f"```python\n{cell.source}\n```")
        if name and facts(cell)["solution"] and cell.cell_type == "code" and is_practice(nb, original):
            answer = unmarked(original.source, SOLUTION)
            out.append(f":::{{admonition}} Solution\n:class: dropdown\n\n```python\n{answer}\n```\n:::")
        if len(out) == 1:
            where = f"../_build/teaching/student/{lab}.ipynb"
            out.append(f"{{download}}`Download the lab <{where}>` as a notebook.")
    return "\n\n".join(out) + "\n"


def roster(path: str | Path) -> dict[str, int]:
    """`{student: seed}` of a roster. Raises ValueError naming the line that is none."""
    seeds = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"Invalid roster {path}: it is no CSV in UTF-8; save it again as 'CSV UTF-8'.") from None
    for row in rows:
        student, seed = (row.get("student") or "").strip(), (row.get("seed") or "").strip()
        if not student or not seed.isdecimal() or "/" in student or student.startswith("."):
            raise ValueError(f"Invalid line in {path}: {row}; needs a student's name, a comma, a seed: a whole number.")
        if student in seeds:
            raise ValueError(f"Invalid roster {path}: {student} is in it twice.")
        seeds[student] = int(seed)
    if not seeds:
        raise ValueError(f"Invalid roster {path}: it has no student; needs the columns student and seed.")
    return seeds
