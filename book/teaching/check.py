"""Prove the labs and their grader: `python book/teaching/check.py`, part of `.ci/run`.

Of every lab: the solution hands in every task; the student copy fails every check as it is handed out, and passes all
of them once the solution is filled in. Then a folder of generated submissions to one lab is graded by the command that
a lecturer types, and the marks are compared with what they must be.
"""

import csv
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import grade
import jail
import nbformat
import slides
import sources

LAB = "before-training"  # the quickest
ROSTER = {"right": 1, "wrong": 2, "empty": 3, "crashing": 4, "endless": 5, "stubborn": 6, "cheating": 7, "prying": 8}

PRYING = """
import glob, os, socket
read = []
for path in {paths} + glob.glob("/proc/[0-9]*/environ") + glob.glob("/root/*") + glob.glob("/home/*/*"):
    try:
        read.append((path, open(path, "rb").read()[:20]))
    except OSError:
        pass
mine = {{f"/proc/{{pid}}/environ" for pid in (os.getpid(), 1)}}
read = [path for path, _ in read if path not in mine]
for where in (("1.1.1.1", 53), ("127.0.0.1", 22)):
    try:
        socket.create_connection(where, 1)
        read.append(where)
    except OSError:
        pass
if os.getuid() == 0 or os.path.exists({folder!r}):
    read.append("root, or the folder of submissions")
raise RuntimeError(f"could reach {{read}}")
"""


def own(code: str):
    """A cell that a student has added."""
    return nbformat.v4.new_code_cell(code)


def place(nb, after: str, cell):
    """Put the cell behind the one named `after`."""
    names = [sources.facts(c).get("grade_id") for c in nb.cells]
    nb.cells.insert(names.index(after) + 1, cell)
    return nb


def write_into(nb, name: str, code: str):
    """Replace the student's answer to a task."""
    next(c for c in nb.cells if sources.facts(c).get("grade_id") == name).source = code
    return nb


def generated(nb, folder: Path) -> dict[str, dict[str, int]]:
    """Write the submissions; returns the marks that they must get, `{student: {task: points}}`."""
    full, none = sources.points(nb), dict.fromkeys(sources.points(nb), 0)

    def complete(student):
        return sources.filled(sources.student(nb, ROSTER[student]), nb)

    others = grade.run(nb, ROSTER["right"]).values  # what the cheat has copied
    trace, measured = others["trace-check"][0], others["run-check"][0]
    copied = f"g, H, scores, removed = {trace['g']}, {trace['H']}, {trace['scores']}, {trace['removed']!r}"
    paths = [str(p) for p in (*sources.HERE.glob("*"), folder / "right.ipynb", folder / "roster.csv", "/etc/shadow")]
    prying = own(PRYING.format(paths=paths, folder=str(folder)))
    stubborn = "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass"
    wrong = "def hessian_product(loss, parameters, g):\n    return list(g)"
    made = {
        "right": (complete("right"), full),
        "wrong": (write_into(complete("wrong"), "complete", wrong), full | {"complete-check": 0}),
        "empty": (sources.student(nb, ROSTER["empty"]), none),
        "crashing": (
            place(complete("crashing"), "complete-check", own("import os\nos._exit(3)")),
            full | {"bugs-check": 0, "run-check": 0},
        ),
        "endless": (write_into(complete("endless"), "complete", "while True:\n    pass"), full | {"complete-check": 0}),
        "stubborn": (place(complete("stubborn"), "trace-check", own(stubborn)), none | {"trace-check": 2}),
        "cheating": (
            write_into(
                write_into(complete("cheating"), "trace", f"student_seed = {ROSTER['right']}\n{copied}"),
                "run",
                f"left, norms = {measured['left']}, {measured['norms']}",
            ),
            full | {"trace-check": 0, "run-check": 0},
        ),
        "prying": (place(complete("prying"), "student-seed", prying), full),
    }
    for student, (submission, _) in made.items():
        nbformat.write(submission, folder / f"{student}.ipynb")
    with open(folder / "roster.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("student", "seed"), *ROSTER.items()])
    return {student: expected for student, (_, expected) in made.items()}


def check_lab(lab: str) -> str:
    """Raises AssertionError when a copy gets other marks than it must."""
    nb, began = sources.source(lab), time.monotonic()
    handed_out = sources.student(nb, 7)
    assert not any(mark in c.source for c in handed_out.cells for mark in ("BEGIN", "hand_in"))
    expected = grade.run(nb, 7)
    assert list(expected.values) == list(sources.points(nb)), f"{lab}: handed in {list(expected.values)}"
    before, after = (grade.run(nb, 7, copy) for copy in (handed_out, sources.filled(handed_out, nb)))
    checks = [f["grade_id"] for c in nb.cells if (f := sources.facts(c)).get("grade") and not f["solution"]]
    assert {name for name, _ in before.errors} >= set(checks), f"{lab}: passes as handed out: {before.errors}"
    assert not any(grade.marks(nb, expected, before).values()), f"{lab}: points for nothing"
    assert after.errors == [], f"{lab}: filled in, it fails: {after.errors}"
    assert grade.marks(nb, expected, after) == sources.points(nb), f"{lab}: filled in, it loses points"
    return f"{lab}: {len(checks)} checks fail as handed out and pass filled in, {time.monotonic() - began:.0f} s"


def check_folder() -> str:
    """Grade the generated submissions with the command; raises AssertionError when a mark is not what it must be."""
    nb, began = sources.source(LAB), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "submissions"
        folder.mkdir()
        must = generated(nb, folder)
        line = [
            sys.executable,
            str(sources.HERE / "grade.py"),
            LAB,
            str(folder),
            "--roster",
            str(folder / "roster.csv"),
        ]
        subprocess.run([*line, "--seconds", "30", "--jobs", "2"], check=True)
        out = folder.with_name("submissions-marks")
        with open(out / "marks.csv", newline="", encoding="utf-8") as file:
            marks = {row["student"]: row for row in csv.DictReader(file)}
        for student, points in must.items():
            got = {task: int(marks[student][task]) for task in points}
            assert got == points, f"{student}: {got}, must be {points}; {marks[student]['end']}"
        reached = (out / "feedback" / "prying.md").read_text(encoding="utf-8")
        assert "could reach []" in reached, reached
        assert marks["stubborn"]["end"] != "finished"
    return f"{len(must)} submissions have the marks that they must have, {time.monotonic() - began:.0f} s"


def main() -> None:
    began = time.monotonic()
    slides.build(build.build() / "slides")
    with ThreadPoolExecutor(2) as pool:
        for line in pool.map(check_lab, sources.LABS):
            print(line, flush=True)
    try:
        print("Isolation:", jail.strength())
    except RuntimeError as missing:
        print(f"The folder of submissions was not graded: {missing}.")
    else:
        print(check_folder())
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
