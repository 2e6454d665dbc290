"""Grade a folder of submissions: `python book/teaching/grade.py LAB FOLDER [--roster ROSTER.csv] [--out RESULTS]`.

FOLDER holds one notebook a student, `<student>.ipynb` or `<student>/<anything>.ipynb`. The student's seed is in the
roster (columns student, seed); without one it is the digits of the name. RESULTS, by default `FOLDER-marks`, gets

    marks.csv                 a line a student, as they are marked: points of every task, their sum, how the run ended;
                              points that somebody typed into the columns "(by hand)" stay when it is graded again
    feedback/<student>.md     for the student: what was right, which cells failed and why
    words.md                  all answers in words, task by task, with the rubric's points, to be marked by hand

A submission's own cells run in a jail (`jail.py`): another user, no network, limits of time and memory, no file of this
machine but Python, the package `lottery` and its stored results. Cells that are not the student's are replaced by the
source's. What the code gives is compared with what the solution gives for the student's seed, which another process
computes. No expected value ever enters the jail. (nbgrader and otter-grader put theirs into the student's process.)
"""

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jail
import nbformat
import sources

PACKAGE = Path("lottery", "__init__.py")
ABOVE = (sources.HERE, *sources.HERE.parents)  # this file lies in a clone: in book/teaching, or where it was unpacked
AROUND = next((folder for folder in ABOVE if (folder / PACKAGE).exists()), sources.HERE)
ROOT = Path(os.environ.get("LOTTERY_CLONE") or AROUND).resolve()
LIMIT = 16 * 2**20  # bytes that a submission may have, print, or hand in
TEXT = {"encoding": "utf-8", "errors": "replace"}  # a name, or what a student wrote, may hold half a character
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "LOTTERY_CLONE": str(ROOT)}


@dataclass
class Run:
    """What one run of a notebook handed in: {task: (value, tolerance)}, the errors of its cells, how it ended."""

    values: dict = field(default_factory=dict)
    errors: list = field(default_factory=list)
    end: str = "finished"
    log: str = ""


def cells(nb, submission=None) -> list[dict]:
    """The cells for the runner: the source's, with the student's own and those that the student has added.

    Cells keep the submission's order; those of the source that it lacks come at its end.
    """
    known = {f["grade_id"]: cell for cell in nb.cells if (f := sources.facts(cell))}
    job, used = [], set()
    for cell in (submission or nb).cells:
        name = sources.facts(cell).get("grade_id")
        if name in used or cell.cell_type != "code":
            continue
        if (trusted := known.get(name)) is None:
            job.append({"name": "a cell of your own", "code": cell.source, "hidden": ""})
            continue
        used.add(name)
        mine = submission is not None and sources.facts(trusted)["solution"]
        job.append(_cell(name, trusted, cell.source if mine else None))
    left = [name for name, cell in known.items() if name not in used and cell.cell_type == "code"]
    return job + [_cell(name, known[name]) for name in left if not sources.facts(known[name])["solution"]]


def _cell(name, trusted, code=None) -> dict:
    hidden = "\n".join(sources.region(trusted.source, sources.HIDDEN))
    shown = sources.replaced(sources.unmarked(trusted.source, sources.SOLUTION), sources.HIDDEN, "")
    return {"name": name, "code": shown if code is None else code, "hidden": hidden}


def run(nb, seed, submission=None, slot=0, seconds=600, memory=8 * 2**30, jailed=True) -> Run:
    """Run the source's solution, or a submission, for a seed; the latter in the jail, unless it is trusted.

    seconds: of CPU time for a process, a quarter of it for a cell; both four times as long on the clock. memory: bytes
    of address space for a process.
    """
    job = json.dumps({"seed": seed, "seconds": seconds / 4, "cells": cells(sources.seeded(nb, seed), submission)})
    runner = [sys.executable, "-c", (sources.HERE / "runner.py").read_text(encoding="utf-8")]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as got, tempfile.TemporaryFile() as log:
        given.write(job.encode())
        given.seek(0)
        streams = {"stdin": given, "stdout": got, "stderr": log, "start_new_session": True}
        if submission is None or not jailed:
            with tempfile.TemporaryDirectory() as home:
                end = _wait(runner, 4 * seconds, cwd=home, env=os.environ | ENVIRONMENT, **streams)
        else:
            with jail.Folder() as root:
                paths = [sys.base_prefix, sys.prefix]
                paths += [path for name in ("lottery", "results", "pyproject.toml") if (path := ROOT / name).exists()]
                limits = [f"--as={memory}", f"--fsize={LIMIT}", "--nproc=256", f"--cpu={math.ceil(seconds)}"]
                end = _wait(jail.command(root, runner, paths, slot, limits, ENVIRONMENT), 4 * seconds, **streams)
        got.seek(0)
        found = Run(end=end)
        for line in got.read(LIMIT).splitlines():
            _note(found, line)
        log.seek(0)
        found.log = log.read(4000).decode(errors="replace")
        if submission is None and (found.errors or end != "finished"):
            why = f"{end}, {found.errors[:2]} {found.log[-300:]}"
            raise RuntimeError(f"the solution itself fails for seed {seed}: {why}")
    return found


def brief(error: Exception) -> str:
    """In one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _wait(command, seconds, **options) -> str:
    """How the command ended. Killing `unshare` kills everything inside."""
    with subprocess.Popen(command, **options) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"stopped: too long, {seconds:g} s"
    return "finished" if code == 0 else f"ended early (status {code}: a crash, or out of time)"


def _note(found: Run, line: bytes) -> None:
    """Add a line of the runner's; anything else that a submission wrote there is dropped, as is a second answer."""
    try:
        said = json.loads(line)
        if "task" in said:
            found.values.setdefault(str(said["task"]), (said["value"], float(said["tolerance"])))
        else:
            found.errors.append((str(said["cell"])[:80], str(said["error"])[:500]))
    except Exception:  # whatever it does to be read
        pass


def same(expected, got, tolerance: float) -> bool:
    """Equal in type and value, numbers within the tolerance; no number is NaN. What cannot be compared is not."""
    try:
        return _same(expected, got, tolerance)
    except Exception:  # of a whole number of 400 digits, say, which is no float
        return False


def _same(expected, got, tolerance):
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and expected.keys() == got.keys()
            and all(_same(value, got[key], tolerance) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return (
            isinstance(got, list)
            and len(got) == len(expected)
            and all(_same(a, b, tolerance) for a, b in zip(expected, got, strict=True))
        )
    if isinstance(expected, bool | str | None) or isinstance(got, bool | str | None):
        return type(expected) is type(got) and expected == got
    if not isinstance(got, int | float):
        return False
    return math.isfinite(got) and abs(expected - got) <= tolerance + 1e-9 * abs(expected)


def marks(nb, expected: Run, got: Run) -> dict[str, int]:
    """Points of every task: all of them or none."""
    right = {
        task: same(value, got.values[task][0], tolerance)
        for task, (value, tolerance) in expected.values.items()
        if task in got.values
    }
    return {task: n if right.get(task) else 0 for task, n in sources.points(nb).items()}


def submissions(folder: Path) -> dict[str, Path]:
    """`{student: file}`, in order of names. Raises ValueError: nothing there, two notebooks of one student."""
    if not folder.is_dir():
        raise ValueError(f"Invalid folder {folder}: there is no such folder of submissions.")
    found = {}
    for path in sorted([*folder.glob("*.ipynb"), *folder.glob("*/*.ipynb")]):
        student = path.stem if path.parent == folder else path.parent.name
        if student in found:
            raise ValueError(f"Two notebooks of {student}: {found[student]} and {path}; leave one.")
        found[student] = path
    if not found:
        raise ValueError(f"No submission in {folder}: it needs <student>.ipynb or <student>/<anything>.ipynb.")
    return found


def seeds_of(students, roster: dict[str, int] | None) -> dict[str, int]:
    """The seed of every student. Raises ValueError naming those who have none."""
    seeds = {s: roster.get(s) if roster else int("".join(re.findall(r"\d", s)) or -1) for s in students}
    if without := [s for s, seed in seeds.items() if seed is None or seed < 0]:
        where = "are not in the roster" if roster else "have no digits in their name: give --roster"
        raise ValueError(f"No seed: {', '.join(without)} {where}.")
    return seeds


def read(path: Path | None):
    """A submission, or None and why it is none."""
    if path is None:
        return None, "nothing handed in"
    if path.is_symlink() or path.parent.is_symlink():
        return None, "a link, not a file"
    try:
        if path.stat().st_size > LIMIT:
            return None, "larger than 16 MB"
        nb = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        for cell in nb.cells:  # what is read of it later; nbformat does not insist
            hash((sources.facts(cell).get("grade_id"), cell.cell_type + cell.source))
    except Exception as error:  # whatever a file that is no notebook makes the parser do
        return None, f"not a notebook ({type(error).__name__})"
    return nb, ""


def grade(nb, path: Path | None, seed: int, slot=0, **options) -> tuple[dict[str, int], Run, object]:
    """Marks of one submission, its run, and the notebook if it is one. No marks: the run says why it has none."""
    submission, why = read(path)
    if submission is None:
        return dict.fromkeys(sources.points(nb), 0), Run(end=why), None
    try:
        expected = run(nb, seed)
        got = run(nb, seed, submission, slot, **options)
        return marks(nb, expected, got), got, submission
    except Exception as error:  # a seed that the solution cannot do, a full disk: no student's fault
        return {}, Run(end=f"not marked: {brief(error)}"), submission


def prove(nb, seed: int = 7, **options) -> None:  # the seed with which check.py proves every lab
    """Raises RuntimeError where the solution does not get full marks as a submission: then the machine is to blame."""
    expected = run(nb, seed)
    got = run(nb, seed, sources.solved(nb), **options)
    if marks(nb, expected, got) != sources.points(nb):
        why = f"{got.end} {got.errors[:2]} {got.log[-300:]}"
        raise RuntimeError(f"the solution gets no full marks in the jail (more --seconds or --memory?): {why}")


def feedback(student: str, nb, found: dict[str, int], got: Run) -> str:
    """What the student gets to read: no expected value is in it, so nor is why the solution fails."""
    end = got.end if found else "not marked yet"
    lines = [f"# {student}", "", f"The run: {end}.", "", "| task | points | of |", "|---|---|---|"]
    lines += [f"| {task} | {found.get(task, '')} | {n} |" for task, n in sources.points(nb).items()]
    lines += [f"| {task} | by hand | {n} |" for task, n in sources.by_hand(nb).items()]
    lines += ["", *(f"* `{name}`: {error}" for name, error in got.errors)]
    return "\n".join(lines) + "\n"


def words(nb, notebooks: dict) -> str:
    """All answers in words, task by task: whoever marks reads one task of everybody, then the next."""
    out = []
    for task, n in sources.by_hand(nb).items():
        out.append(f"# {task} ({n} points)")
        for student, submission in notebooks.items():
            answers = [c.source for c in submission.cells if sources.facts(c).get("grade_id") == task] or ["(none)"]
            out += [f"## {student}", *answers]
    return "\n\n".join(out) + "\n"


def grade_folder(nb, folder: Path, out: Path, roster=None, jobs=1, report=print, **options) -> list[dict]:
    """Grade everything in the folder and write the three kinds of results. Returns the lines of marks.csv.

    What one submission is, or does, costs nobody else the marks. Whoever is in the roster has a line.
    """
    handed_in = submissions(folder)
    found = {student: handed_in.get(student) for student in sorted({*handed_in, *(roster or ())})}
    seeds = seeds_of(found, roster)
    if options.get("jailed", True):
        prove(nb, **options)
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    total, lines, notebooks = sum(sources.points(nb).values()), [], {}
    hand = [f"{task} (by hand)" for task in sources.by_hand(nb)]
    columns, file = ["student", "seed", "end", *sources.points(nb), "sum", "of", *hand], out / "marks.csv"
    before = _lines(file, columns)

    def one(item):
        slot, (student, path) = item
        return student, grade(nb, path, seeds[student], slot % 1000, **options)

    with ThreadPoolExecutor(jobs) as pool:
        for student, (points, got, submission) in pool.map(one, enumerate(found.items())):
            sum_ = sum(points.values()) if points else ""
            line = {"student": student, "seed": seeds[student], "end": got.end, **points, "sum": sum_, "of": total}
            typed = before.pop(student.encode(errors="replace").decode(), {})
            lines.append(line | {task: typed.get(task, "") for task in hand})
            _write(file, columns, [*lines, *(old for old in before.values() if any(old[task] for task in hand))])
            (out / "feedback" / f"{student}.md").write_text(feedback(student, nb, points, got), **TEXT)
            if submission is not None:
                notebooks[student] = submission
            report(f"{student}: " + (f"{sum_} of {total}, " if points else "") + got.end)
    (out / "words.md").write_text(words(nb, notebooks), **TEXT)
    return lines


def _lines(path, columns):
    """{student: line} of the marks.csv that is there. Raises ValueError for one that could not be written again."""
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # spreadsheets begin it with a mark
        lines = csv.DictReader(file)
        if lines.fieldnames != columns:
            odd = next((c for c in (*(lines.fieldnames or ()), *columns) if c not in columns), "other columns")
            raise ValueError(f"{path} has {odd!r}: it is not this lab's, or was changed; rename it, or give --out.")
        return {line["student"]: {c: line[c] or "" for c in columns} for line in lines}


def _write(path, columns, lines):
    """A marks.csv, whole or not at all: it may hold what somebody typed."""
    with open(path.with_suffix(".new"), "w", newline="", **TEXT) as file:
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        rows.writerows(lines)
    path.with_suffix(".new").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Grade a folder of submissions.")
    parser.add_argument("lab", choices=sources.LABS)
    parser.add_argument("folder", type=Path, help="<student>.ipynb or <student>/<anything>.ipynb")
    parser.add_argument("--roster", help="CSV with the columns student and seed")
    parser.add_argument("--out", type=Path, help="where the marks go; default: FOLDER-marks")
    parser.add_argument(
        "--seconds", type=float, default=600, help="of CPU time for a submission; a cell gets a quarter"
    )
    parser.add_argument("--memory", type=float, default=8, help="GiB of address space for one process")
    parser.add_argument("--jobs", type=int, default=1, help="submissions side by side, one core each")
    parser.add_argument("--trusted", action="store_true", help="run submissions as yourself, without any isolation")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # names of files that are no text
    if not (ROOT / PACKAGE).exists():
        where = os.environ.get("LOTTERY_CLONE") or f"{sources.HERE} and above"
        sys.exit(f"Not graded: no folder `lottery` in {where}; unpack inside a clone, or set LOTTERY_CLONE to one.")
    try:
        print("Isolation:", "none, as asked" if given.trusted else jail.strength(), flush=True)
    except RuntimeError as error:
        sys.exit(f"Not graded: {error}. --trusted runs submissions as yourself, with all that you may do.")
    try:
        roster = sources.roster(given.roster) if given.roster else None
        folder = given.folder.resolve()
        out = given.out or folder.with_name(folder.name + "-marks")
        options = {"seconds": given.seconds, "memory": int(given.memory * 2**30), "jailed": not given.trusted}
        lines = grade_folder(sources.source(given.lab), folder, out, roster, given.jobs, **options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"Not graded: {brief(error)}")
    print(f"Marks, feedback and the answers in words are in {out}.")
    if left := [line["student"] for line in lines if line["sum"] == ""]:
        sys.exit(f"Not marked: {', '.join(left)}. The column `end` says why: grade again, or mark them by hand.")


if __name__ == "__main__":
    main()
