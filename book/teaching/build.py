"""Make the labs: `python book/teaching/build.py [--roster ROSTER.csv]`, which is `make labs`.

Everything is written below book/_build/teaching, from the sources beside this file:

    student/<lab>.ipynb       what is handed out; with a roster also student/<lab>/<student>.ipynb, each with its seed
    solutions/<lab>.ipynb     for the lecturer; not in the book
    autograder/<lab>.zip      the lab's source and the grader, for whoever marks: unpack in a clone, beside `lottery`
    pages/<lab>.md            the lab as a page of the book, practice with its solution
    slides/html/index.html    a deck for every chapter, see slides.py

ROSTER.csv has the columns student and seed; a student's submission carries the student's name. Nothing is removed:
`make book`, which needs the pages and the downloads only, leaves the copies of a roster and the slides as they are.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import nbformat
import slides
import sources

BUILD = sources.HERE.parent / "_build" / "teaching"
GRADER = ("grade.py", "jail.py", "runner.py", "sources.py")


def build(seeds: dict[str, int] | None = None, to: Path = BUILD) -> Path:
    """Write all of it over what is there."""
    for folder in ("student", "solutions", "autograder", "pages"):
        (to / folder).mkdir(parents=True, exist_ok=True)
    for lab in sources.LABS:
        nb = sources.source(lab)
        nbformat.write(sources.student(nb), to / "student" / f"{lab}.ipynb")
        nbformat.write(sources.solved(nb), to / "solutions" / f"{lab}.ipynb")
        (to / "pages" / f"{lab}.md").write_text(sources.page(nb, lab), encoding="utf-8")
        with zipfile.ZipFile(to / "autograder" / f"{lab}.zip", "w") as package:
            for name in (f"{lab}.ipynb", *GRADER):
                package.write(sources.HERE / name, name)
        for student, seed in (seeds or {}).items():
            (to / "student" / lab).mkdir(exist_ok=True)
            nbformat.write(sources.student(nb, seed), to / "student" / lab / f"{student}.ipynb")
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description="Make student copies, solutions, autograders and pages of the labs.")
    parser.add_argument("--roster", help="CSV with the columns student and seed: one copy a student as well")
    given = parser.parse_args()
    try:
        to = build(sources.roster(given.roster) if given.roster else None)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    slides.build(to / "slides")
    print(f"The labs are in {to}: student, solutions, autograder, pages; the slides in {to / 'slides' / 'html'}.")


if __name__ == "__main__":
    main()
