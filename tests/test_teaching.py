"""The labs' sources, what is handed out, and the grader, on a lab of two tasks that needs no training.

`book/teaching/check.py` does the same with the labs themselves; `.ci/run` runs it.
"""

import csv
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("IPython")

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook  # noqa: E402

ODD = b"M\xfcller".decode(errors="surrogateescape")  # a file's name out of a zip in Latin-1
TEACHING = Path(__file__).resolve().parents[1] / "book" / "teaching"
sys.path.insert(0, str(TEACHING))

import build  # noqa: E402
import check  # noqa: E402
import grade  # noqa: E402
import jail  # noqa: E402
import slides  # noqa: E402
import sources  # noqa: E402


def cell(name, source, grade=False, solution=False, points=None, kind=new_code_cell, **metadata):
    made = kind(source, id=name)
    facts = {"grade_id": name, "grade": grade, "solution": solution, "locked": not solution, "schema_version": 3}
    made.metadata = nbformat.from_dict({"nbgrader": facts | ({"points": points} if grade else {})} | metadata)
    return made


def task(name, answer, check, points):
    return [
        cell(name, f"### BEGIN SOLUTION\n{answer}\n### END SOLUTION", solution=True),
        cell(f"{name}-check", check, grade=True, points=points),
    ]


def hidden(shown, asked):
    return f"{shown}\n### BEGIN HIDDEN TESTS\n{asked}\n### END HIDDEN TESTS"


@pytest.fixture
def lab():
    """Practice, a task whose answer depends on the seed, a function, an answer in words."""
    twice = "def twice(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
    asked = (
        "### BEGIN HIDDEN TESTS\nhand_in('double-check', [twice(student_seed), twice(0.5)], 1e-6)\n### END HIDDEN TESTS"
    )
    return new_notebook(cells=[
        new_markdown_cell("# A lab", id="title"),
        cell("student-seed", "student_seed = 0  # yours", tags=["parameters"]),
        cell("setup", "base = 10"),
        *task("warm-up", "four = 4", "assert four == 4", 0),
        *task("sum", "total = base + student_seed", hidden("assert total", "hand_in('sum-check', total)"), 2),
        cell("double", twice, solution=True),
        cell("double-check", asked, grade=True, points=3),
        cell("why", "### BEGIN SOLUTION\nBecause.\n### END SOLUTION", True, True, 4, new_markdown_cell),
    ])  # fmt: skip


# The sources and what is handed out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lab", sources.LABS)
def test_a_copy_that_is_handed_out_holds_no_answer_and_no_hidden_test(lab):
    nb = sources.source(lab)
    copy, text = sources.student(nb, 17), "\n".join(c.source for c in sources.student(nb, 17).cells)
    assert "student_seed = 17" in text
    assert not any(word in text for word in ("SOLUTION", "HIDDEN", "hand_in"))
    answers = [part for c in nb.cells for part in sources.region(c.source, "SOLUTION")]
    assert len(answers) >= 8
    assert not [part for part in answers if part in text]
    assert [c.id for c in copy.cells] == [c.id for c in nb.cells]
    assert all(sources.STUB.splitlines()[1] in c.source for c in copy.cells
               if sources.facts(c).get("solution") and c.cell_type == "code")  # fmt: skip


@pytest.mark.parametrize("lab", sources.LABS)
def test_a_lab_is_a_valid_notebook_without_outputs_worth_fifteen_points(lab):
    nb = sources.source(lab)
    nbformat.validate(nb)
    assert not any(c.get("outputs") for c in nb.cells)
    named = [sources.facts(c)["grade_id"] for c in nb.cells if sources.facts(c)]
    assert len(named) == len(set(named))
    assert all(sources.facts(c) for c in nb.cells if c.cell_type == "code")
    assert sum(sources.points(nb).values()) == 10
    assert sum(sources.by_hand(nb).values()) == 5
    asked = {c.metadata.nbgrader.grade_id for c in nb.cells if sources.region(c.source, "HIDDEN TESTS")}
    assert asked == set(sources.points(nb))


@pytest.mark.parametrize("lab", sources.LABS)
def test_the_page_has_the_solutions_of_practice_and_of_nothing_else(lab):
    nb = sources.source(lab)
    page = sources.page(nb, lab)
    for c in nb.cells:
        if sources.facts(c).get("solution"):
            parts = sources.region(c.source, "SOLUTION")
            published = c.cell_type == "code" and sources.is_practice(nb, c)
            assert all((part.strip("\n") in page) == published for part in parts), c.id


@pytest.mark.parametrize("page", sorted(TEACHING.glob("*.md")), ids=lambda path: path.stem)
def test_no_page_beside_the_labs_prints_an_answer_to_a_graded_task(page):
    """Nor a quoted one, as a student might write it."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert "\n> " not in page.read_text(encoding="utf-8")
    for nb in map(sources.source, sources.LABS):
        for c in nb.cells:
            if sources.facts(c).get("points") and sources.facts(c)["solution"]:
                answer = " ".join(sources.region(c.source, "SOLUTION")[0].split())
                assert not [part for part in answer.split(". ") if len(part) > 40 and part in text], c.id


def test_regions_are_replaced_at_their_indentation():
    text = "def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION\n\nx = 2"
    assert sources.replaced(text, "SOLUTION", "pass\nreturn") == "def f():\n    pass\n    return\n\nx = 2"
    assert sources.replaced(text, "SOLUTION", "") == "def f():\n\nx = 2"
    assert sources.unmarked(text, "SOLUTION") == "def f():\n    return 1\n\nx = 2"
    assert sources.region(text, "SOLUTION") == ["    return 1\n"]


def test_a_roster_names_the_line_that_is_none(tmp_path):
    file = tmp_path / "roster.csv"
    file.write_text("student,seed\nada,1\nbo,2\n")
    assert sources.roster(file) == {"ada": 1, "bo": 2}
    for text in ("student,seed\nada,x\n", "student,seed\n../ada,1\n", "name\nada\n", "student,seed\nada,1\nada,2\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="roster"):
            sources.roster(file)
    for raw in ("student,seed\nmüller,1\n".encode("latin-1"), "student,seed\nada,1\n".encode("utf-16")):
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=r"roster\.csv: it is no CSV in UTF-8; save it again"):
            sources.roster(file)


def test_making_the_pages_of_the_book_leaves_the_copies_of_a_roster_and_the_slides(tmp_path):
    build.build({"ada": 1}, tmp_path)
    deck = tmp_path / "slides" / "html" / "lth.html"
    deck.parent.mkdir(parents=True)
    deck.write_text("")
    (tmp_path / "pages" / "masks.md").write_text("old")
    build.build(to=tmp_path)
    assert deck.exists()
    assert all((tmp_path / "student" / lab / "ada.ipynb").exists() for lab in sources.LABS)
    assert (tmp_path / "pages" / "masks.md").read_text() != "old"


@pytest.fixture
def unpacked(tmp_path):
    """The autograder of a lab where its docstring says; returns what runs it."""
    clone = tmp_path / "clone"
    zipfile.ZipFile(build.build(to=tmp_path / "made") / "autograder" / "masks.zip").extractall(clone)
    environment = {key: value for key, value in os.environ.items() if key != "LOTTERY_CLONE"}

    def run(*arguments):
        line = [sys.executable, str(clone / "grade.py"), "masks", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, env=environment)

    return clone, run


def test_the_packed_grader_works_beside_the_package_of_a_clone(lab, unpacked, tmp_path):
    isolated()
    clone, run = unpacked
    tmp_path.chmod(0o755)  # pytest's folders are its own, and the jail's user is another
    tmp_path.parent.chmod(0o755)
    (clone / "lottery").mkdir()
    (clone / "lottery" / "__init__.py").write_text("base = 10")
    lab.cells[2].source = "from lottery import base"  # which the package of this clone does not have
    nbformat.write(lab, clone / "masks.ipynb")
    (tmp_path / "submissions").mkdir()
    nbformat.write(sources.filled(sources.student(lab), lab), tmp_path / "submissions" / f"{ODD}1.ipynb")
    done = run(tmp_path / "submissions")
    assert (done.returncode, done.stderr) == (0, "")
    assert "M?ller1: 5 of 5, finished" in done.stdout


def test_the_packed_grader_refuses_in_one_line_where_there_is_no_package(unpacked, tmp_path):
    _, run = unpacked
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Not graded: no folder `lottery` in")
    assert done.stderr.count("\n") == 1
    assert "--trusted" not in done.stdout + done.stderr


# Marks --------------------------------------------------------------------------------------------------------------


def test_equal_is_equal_in_type_and_within_the_tolerance():
    assert grade.same([1, 2.0, {"a": "x"}], [1.0, 2.001, {"a": "x"}], 0.01)
    assert not grade.same([1.0], [1.02], 0.01)
    assert not grade.same(1, True, 0.0)
    assert not grade.same(True, 1, 0.0)
    assert not grade.same([1], [1, 2], 0.0)
    assert not grade.same({"a": 1}, {"b": 1}, 0.0)
    assert not grade.same(1.0, float("nan"), 1e9)
    assert not grade.same("1", 1, 0.0)
    assert not grade.same(1.0, None, 1.0)


LEAVES = st.none() | st.booleans() | st.integers() | st.integers(10**308, 10**400) | st.floats() | st.text(max_size=3)
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from("ab"), x))


@hypothesis.given(ANYTHING, ANYTHING)
def test_whatever_is_handed_in_can_be_compared(expected, got):
    assert grade.same(expected, got, 0.1) in (True, False)
    for known in (1, 1.5, [1], {"a": 1.5}):
        assert not grade.same(known, 10**400, 0.1)


def test_only_answers_and_added_cells_of_a_submission_are_run(lab):
    submission = sources.student(lab)
    submission.cells[2].source = "base = 999"  # locked
    submission.cells[4].source = "four = 5"  # a check is put after it, from the source
    submission.cells.insert(3, new_code_cell("mine = 1"))
    del submission.cells[-2]  # the check of the last task
    job = grade.cells(lab, submission)
    by_name = {part["name"]: part for part in job}
    assert by_name["setup"]["code"] == "base = 10"
    assert by_name["a cell of your own"]["code"] == "mine = 1"
    assert by_name["warm-up"]["code"] == sources.student(lab).cells[3].source
    assert by_name["warm-up-check"]["code"] == "assert four == 4"
    assert job[-1]["name"] == "double-check"
    assert "hand_in" in job[-1]["hidden"]
    assert [part["name"] for part in job].index("setup") < [part["name"] for part in job].index("a cell of your own")


def test_students_without_a_seed_are_named():
    assert grade.seeds_of(["s12", "x7y8"], None) == {"s12": 12, "x7y8": 78}
    with pytest.raises(ValueError, match="ada have no digits"):
        grade.seeds_of(["ada", "s1"], None)
    with pytest.raises(ValueError, match="bo are not in the roster"):
        grade.seeds_of(["ada", "bo"], {"ada": 1})


def test_a_file_that_is_no_notebook_is_said_to_be_none(tmp_path, lab):
    for name, text in (("empty", ""), ("text", "hello"), ("list", "[]"), ("half", '{"cells": [')):
        (tmp_path / f"{name}.ipynb").write_text(text)
        submission, why = grade.read(tmp_path / f"{name}.ipynb")
        assert submission is None
        assert why.startswith("not a notebook")
    for source in ({}, {"source": 5}, {"source": "", "metadata": {"nbgrader": {"grade_id": []}}}):
        odd = new_notebook() | {"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}} | source]}
        (tmp_path / "odd.ipynb").write_text(json.dumps(odd))
        submission, why = grade.read(tmp_path / "odd.ipynb")
        assert submission is None
        assert why.startswith("not a notebook")
    nbformat.write(lab, tmp_path / "solution")
    (tmp_path / "link.ipynb").symlink_to(tmp_path / "solution")
    assert grade.read(tmp_path / "link.ipynb") == (None, "a link, not a file")


def isolated():
    try:
        return jail.strength()
    except RuntimeError as missing:
        pytest.skip(str(missing))


def test_a_folder_is_graded_and_nobody_sees_what_is_not_his(lab, tmp_path):
    isolated()
    folder = tmp_path / "submissions"
    folder.mkdir()
    secret = folder / "secret.txt"
    secret.write_text("42")
    made = {
        student: sources.filled(sources.student(lab), lab) for student in ("right1", "copied2", "prying3", "empty4")
    }
    made["copied2"].cells[5].source = "total = 11"  # the answer of seed 1
    look = f"raise RuntimeError([os.getuid(), *map(os.path.exists, {[str(secret), str(TEACHING)]})])"
    made["prying3"].cells.append(new_code_cell(f"import os\n{look}"))
    made["empty4"] = sources.student(lab)
    for student, nb in made.items():
        nbformat.write(nb, folder / f"{student}.ipynb")
    (folder / "broken5.ipynb").write_text("no notebook")
    out = tmp_path / "marks"
    lines = grade.grade_folder(lab, folder, out, jobs=2, report=lambda _: None)
    assert {line["student"]: line["sum"] for line in lines} == {
        "broken5": 0, "copied2": 3, "empty4": 0, "prying3": 5, "right1": 5
    }  # fmt: skip
    with open(out / "marks.csv", newline="", encoding="utf-8") as file:
        assert [row["student"] for row in csv.DictReader(file)] == sorted([*made, "broken5"])
    prying = (out / "feedback" / "prying3.md").read_text()
    assert ", False, False]" in prying
    assert os.geteuid() != 0 or f"[{jail.USER + sorted([*made, 'broken5']).index('prying3')}," in prying
    assert "Because." in (out / "words.md").read_text()
    assert "| sum-check | 0 | 2 |" in (out / "feedback" / "copied2.md").read_text()


def test_a_failure_costs_nobody_else_the_marks_and_the_roster_is_complete(lab, tmp_path):
    lab.cells[5].source = lab.cells[5].source.replace("total =", "assert student_seed < 103\ntotal =")
    folder, out = tmp_path / "submissions", tmp_path / "marks"
    folder.mkdir()
    copy = sources.filled(sources.student(lab), lab)
    for student in ("ada", "bo", ODD):
        nbformat.write(copy, folder / f"{student}.ipynb")
    huge = sources.filled(sources.student(lab), lab)
    huge.cells[5].source = "total = 10**400"
    nbformat.write(huge, folder / "al.ipynb")
    roster = {"ada": 103, "al": 100, "bo": 101, ODD: 102, "zoe": 104}
    lines = grade.grade_folder(lab, folder, out, roster, report=lambda _: None, jailed=False)
    assert {line["student"]: line["sum"] for line in lines} == {"ada": "", "al": 3, "bo": 5, ODD: 5, "zoe": 0}
    with open(out / "marks.csv", newline="", encoding="utf-8") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["M?ller", "ada", "al", "bo", "zoe"]
    assert rows["ada"]["end"].startswith("not marked: the solution itself fails for seed 103")
    assert rows["ada"]["sum-check"] == rows["ada"]["sum"] == ""
    assert rows["zoe"]["end"] == "nothing handed in"
    assert "not marked yet" in (out / "feedback" / "ada.md").read_text()
    assert (out / "words.md").read_text().count("Because.") == 4


def test_marks_are_written_as_they_come(lab, tmp_path, monkeypatch):
    for student in ("s1", "s2"):
        nbformat.write(sources.student(lab), tmp_path / f"{student}.ipynb")
    full, out, written = sources.points(lab), tmp_path / "marks", []
    monkeypatch.setattr(grade, "grade", lambda nb, path, *_, **__: (full, grade.Run(), None))

    def report(_):
        written.append((out / "marks.csv").read_text().count("\n"))

    grade.grade_folder(lab, tmp_path, out, report=report, jailed=False)
    assert written == [2, 3]


def test_points_that_were_typed_by_hand_stay_when_a_folder_is_graded_again(lab, tmp_path, monkeypatch):
    """Also of those who are not graded again, and when the second grading ends early; a file of others is refused."""
    students, out = ("s1", "s2", f"{ODD}3"), tmp_path / "marks"
    for student in students:
        nbformat.write(sources.student(lab), tmp_path / f"{student}.ipynb")
    got = {"now": sources.points(lab)}
    monkeypatch.setattr(grade, "grade", lambda nb, path, *_, **__: (got["now"], grade.Run(), None))
    again = lambda report=lambda _: None: grade.grade_folder(lab, tmp_path, out, report=report, jailed=False)  # noqa: E731
    again()
    [task] = [f"{task} (by hand)" for task in sources.by_hand(lab)]

    def marks():
        with open(out / "marks.csv", newline="", encoding="utf-8") as file:
            return {row["student"]: row for row in csv.DictReader(file)}

    text = (out / "marks.csv").read_text().replace("5,5,", "5,5,2")
    (out / "marks.csv").write_text("\ufeff" + text, encoding="utf-8")  # as a spreadsheet writes it
    got["now"] = dict.fromkeys(got["now"], 0)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(stop)
    assert [(row["sum"], row[task]) for row in marks().values()] == [("0", "2"), ("5", "2"), ("5", "2")]
    (tmp_path / "s1.ipynb").unlink()
    again()
    assert {name: (row["sum"], row[task]) for name, row in marks().items()} == {
        "M?ller3": ("0", "2"), "s2": ("0", "2"), "s1": ("5", "2")
    }  # fmt: skip
    (out / "marks.csv").write_text(text.replace("student,", "student,note,"))
    with pytest.raises(ValueError, match="has 'note': it is not this lab's, or was changed; rename it"):
        again()
    assert "note" in (out / "marks.csv").read_text()


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(10**6)"])
def test_a_cell_that_never_ends_costs_its_own_task(lab, code):
    endless = sources.filled(sources.student(lab), lab)
    endless.cells[5].source = code
    got = grade.run(lab, 3, endless, seconds=8, jailed=False)
    assert [name for name, error in got.errors if error.startswith("TimeoutError")] == ["sum"]
    assert set(got.values) == {"double-check"}


def test_the_jail_has_no_network_no_other_files_and_no_way_back():
    isolated()
    probe = (
        "ls / /root 2>&1; ls /sys/class/net 2>&1; cat /etc/passwd 2>&1; mount -t tmpfs x /tmp 2>&1; id -u; echo $HOME"
    )
    with jail.Folder() as root:
        done = subprocess.run(jail.command(root, ["sh", "-c", probe]), capture_output=True, text=True, timeout=30)
    assert "root" not in done.stdout.split("/root")[0].split()
    assert done.stdout.count("No such file") >= 3
    assert "permission denied" in done.stdout.lower() or "must be superuser" in done.stdout.lower()
    assert done.stdout.split()[-1] == "/submission"
    if os.geteuid() == 0:
        assert done.stdout.split()[-2] == str(jail.USER)


def test_the_listed_paths_are_there_to_read_wherever_they_lie(tmp_path):
    isolated()
    tmp_path.chmod(0o755)  # pytest's folders are its own, and below /tmp
    (tmp_path / "given.txt").write_text("as given")
    probe = "cat given.txt; touch given.txt new.txt 2>&1; cd /tmp; touch mine && ls"
    with jail.Folder() as root:
        line = jail.command(root, ["sh", "-c", f"cd {tmp_path}; {probe}"], [tmp_path])
        done = subprocess.run(line, capture_output=True, text=True, timeout=30)
    assert done.stdout.startswith("as given")
    assert done.stdout.count("cannot touch") == 2
    assert done.stdout.split()[-2:] == sorted(["mine", Path(tmp_path).parts[2]])


def test_nobody_is_marked_where_the_solution_itself_gets_no_marks(lab, tmp_path, monkeypatch):
    isolated()
    folder = tmp_path / "submissions"
    folder.mkdir()
    nbformat.write(sources.student(lab), folder / "s1.ipynb")
    monkeypatch.setattr(jail, "SYSTEM", ("/usr", "/lib", "/lib64", "/bin"))
    monkeypatch.setattr(grade.sys, "prefix", "/usr")  # the environment's packages are out of sight
    monkeypatch.setattr(grade.sys, "base_prefix", "/usr")
    with pytest.raises(RuntimeError, match="solution gets no full marks in the jail"):
        grade.grade_folder(lab, folder, tmp_path / "marks", report=lambda _: None)
    assert not (tmp_path / "marks").exists()


def test_a_solution_that_fails_is_no_lack_of_isolation(monkeypatch, tmp_path, capsys):
    def fail():
        raise RuntimeError("the solution itself fails for seed 1")

    def refuse():
        raise RuntimeError("no isolation here")

    monkeypatch.setattr(build, "build", lambda: tmp_path)
    monkeypatch.setattr(slides, "build", lambda to: [])
    monkeypatch.setattr(sources, "LABS", ())
    monkeypatch.setattr(jail, "strength", lambda: "all of it")
    monkeypatch.setattr(check, "check_folder", fail)
    with pytest.raises(RuntimeError, match="the solution itself fails"):
        check.main()
    monkeypatch.setattr(jail, "strength", refuse)
    check.main()
    assert "was not graded: no isolation here" in capsys.readouterr().out


def test_folders_inside_others_are_mounted_once():
    assert jail.outermost(["/a/b", "/a", "/c/d", "/usr/local/x"], ["/usr"]) == ["/a", "/c/d"]


# Tasks of the labs -------------------------------------------------------------------------------------------------


IS_EXACT = """
def is_exact(count):
    tried = [
        torch.nn.Conv2d(3, 4, (3, 1)),
        torch.nn.Conv2d(3, 4, 3, padding=1, dilation=2),
        torch.nn.Conv2d(4, 4, (1, 3), stride=(2, 1), padding=(0, 2), groups=2),
        torch.nn.Conv2d(3, 4, (3, 5), padding="same", bias=False).double(),
        torch.nn.Conv2d(4, 4, 5, stride=2, padding=2),
    ]
    for conv in tried:
        with torch.no_grad():
            conv.weight[0] = 0
        out = conv(conv.weight.new_zeros(1, conv.in_channels, 8, 8))
        if count(conv, 8) != int(conv.weight.count_nonzero()) * out.shape[2] * out.shape[3]:
            return False
    return True
"""

IS_SOUND = """
def is_sound(version):
    draw = torch.Generator().manual_seed(3)
    for shape in ((2, 3), (30,), (), (0,)):
        for share in (0.0, 0.7, 1.0):
            for rate in (0.0, 0.3, 0.7, 1.0):
                weight = torch.randint(-4, 5, shape, generator=draw) / 4
                left = torch.rand(shape, generator=draw) < share
                if not torch.equal(version(weight.clone(), left.clone(), rate), prune(weight, left, rate)):
                    return False
    return True
"""


def only(lab, *tasks):
    """The lab with its parameters, its setup and these tasks, so that nothing is trained."""
    nb = sources.source(lab)
    wanted = {"student-seed", "setup", *(f"{task}{end}" for task in tasks for end in ("-given", "", "-check"))}
    nb.cells = [c for c in nb.cells if sources.facts(c).get("grade_id") in wanted]
    return nb


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lab", "tasks", "answer"), [("thresholds", ["bugs"], IS_EXACT), ("masks", ["complete", "bugs"], IS_SOUND)]
)
def test_a_right_answer_to_find_the_bug_gets_its_points_whatever_layers_and_masks_it_tries(lab, tasks, answer):
    """Rectangular and dilated layers, three channels; masks of which nothing is left, a rate of 1, empty tensors."""
    nb = only(lab, *tasks)
    submission = check.write_into(sources.filled(sources.student(nb, 5), nb), "bugs", answer)
    got = grade.run(nb, 5, submission, jailed=False)
    assert got.errors == []
    assert grade.marks(nb, grade.run(nb, 5), got) == sources.points(nb)


def test_which_weight_grasp_removes_from_the_chain_depends_on_the_seed():
    code = {c.id: sources.unmarked(c.source, "SOLUTION") for c in only("before-training", "trace").cells}
    removed = []
    for seed in range(40):
        names = {"random": random, "student_seed": seed}
        exec(code["trace-given"] + "\n" + code["trace"], names)
        assert names["scores"][0] != names["scores"][1]
        removed.append(names["removed"])
    assert min(removed.count("w"), removed.count("v")) >= 10


# Slides -------------------------------------------------------------------------------------------------------------


def test_a_deck_has_the_question_the_goals_and_every_figure_of_the_main_text(tmp_path):
    def figure(name, **metadata):
        made = new_code_cell("draw()")
        made.outputs = [nbformat.v4.new_output("display_data", {"image/svg+xml": f"<svg>{name}</svg>"})]
        made.metadata = nbformat.from_dict({"mystnb": {"figure": {"name": name, "caption": f"See [{name}](a.md)."},
                                                       "image": {"alt": f"alt of {name}"}}} | metadata)  # fmt: skip
        return made

    text = "# A paper\n\nIs it so? {cite:t}`a2020` say yes {cite:p}`b2021`.\n\n**Predict first.** Guess."
    goals = "After this chapter you can\n\n1. do it;\n2. say why.\n\nYou need Python."
    nb = new_notebook(cells=[
        new_markdown_cell(text), new_markdown_cell(goals), new_markdown_cell("## Figure 1: a line"), figure("fig-1"),
        figure("fig-2", tags=["in-fold"]), new_code_cell("no_figure()"),
    ])  # fmt: skip
    deck = slides.deck(nb, tmp_path)
    assert deck.startswith("# A paper\n\nIs it so? The authors say yes.\n\n## Predict first\n\n Guess.")
    assert "2. say why." in deck
    assert "You need" not in deck
    assert "## Figure 1: a line\n\n```{figure} fig-1.svg\n:alt: alt of fig-1" in deck
    assert "See fig-1." in deck
    assert "fig-2" not in deck
    assert (tmp_path / "fig-1.svg").read_text() == "<svg>fig-1</svg>"


def test_every_chapter_with_figures_has_a_deck():
    decks = {path.stem for path in slides.chapters() if any(slides.pictures(nbformat.read(path, as_version=4)))}
    assert {"lth", "grasp"} <= decks
