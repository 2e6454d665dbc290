"""lottery.chapter and lottery.figures: what a notebook shows, refuses and never writes."""

import ast
import concurrent.futures as futures
import contextlib
import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import typer

import lottery
from lottery import cli, data, experiments, figures, models, names, training
from lottery.chapter import Chapter, Refused, difference, open_store, say, table
from lottery.experiments import Store, lth, papers
from lottery.experiments.runs import CRITERIA, INITS

NOTEBOOK = Path(lottery.__file__).parents[1] / "notebooks/lth.ipynb"
TINY = {"iterations": 20, "rounds": 1, "trials": 1}


ITEMS = ("fig1", "fig3", "fig4", "fig11", "fig12", "fig14", "fig16", "fig19", "fig26")  # and one of each other kind


def changed(at, **lenet):
    return replace(at, nets={"lenet": replace(at.nets["lenet"], **lenet)})


def presets():
    """The scales on the digits, with three rounds, one control round and seconds of training in all."""
    at = lth.override(lth.setting("smoke"), rounds=3, trials=1)
    at = changed(at, control_rounds=(3,), one_shot=(0.825,))
    recipes = {"paper": 40, "primary": 35, "laptop": 30, "smoke": 20}
    return {scale: lth.override(at, iterations=n) for scale, n in recipes.items()}


@pytest.fixture(autouse=True)
def clone(tmp_path, monkeypatch):
    """A clone with nothing stored, around the working directory; the reader's own folder is a temporary one, too."""
    for folder in ("results/ours", "lottery", "notebooks"):
        (tmp_path / "clone" / folder).mkdir(parents=True)
    (tmp_path / "clone/results/reported").symlink_to(NOTEBOOK.parents[1] / "results/reported")
    monkeypatch.chdir(tmp_path / "clone/notebooks")
    monkeypatch.setenv("LOTTERY_RESULTS", str(tmp_path / "mine"))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(lth, "ITEMS", {item: lth.ITEMS[item] for item in ITEMS})
    for scale, at in presets().items():
        monkeypatch.setitem(lth.SETTINGS, scale, at)
    return tmp_path / "clone"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every run of every scale, as spool files."""
    folder = tmp_path_factory.mktemp("everything")
    runs = [r for at in presets().values() for r in lth.runs(list(ITEMS), at)]
    with futures.ThreadPoolExecutor(1) as pool:
        assert experiments.run(runs, pool, store=Store(folder), progress=False) == []
    return Store(folder)


@pytest.fixture
def commit(clone, everything):
    """Puts runs into the clone's results, as `lottery merge` does."""

    def put(runs):
        committed = Store(clone / "results/ours")
        for r in runs:
            committed.put(everything.get(r))
        committed.merge()
        return tree(clone / "results")

    return put


def test_a_user_without_a_home_reads_what_is_committed(clone, monkeypatch):
    for name in ("LOTTERY_RESULTS", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", str)
    opened = open_store()
    assert opened.dir == Path(os.devnull, "lottery/results")
    assert opened.also == [clone / "results/ours"]


def tree(folder):
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def train(runs, clone):
    """Put runs into the clone's results that `everything` does not have."""
    with futures.ThreadPoolExecutor(1) as pool:
        assert experiments.run(runs, pool, store=Store(clone / "results/ours"), progress=False) == []


# What is shown --------------------------------------------------------------------------------------------------------


def test_best_is_the_highest_scale_that_is_complete(commit):
    commit([*lth.runs(None, "smoke"), *lth.runs("fig12", "laptop"), *lth.runs("fig12", "paper")[:-1]])
    chapter = Chapter("lth")
    assert {item: chapter.scale(item) for item in lth.ITEMS} == {
        item: "laptop" if set(lth.runs(item, "laptop")) <= set(lth.runs("fig12", "laptop")) else "smoke"
        for item in lth.ITEMS
    }
    assert chapter.scale("fig12") == "laptop"
    assert chapter.scale("fig14") == "smoke"
    n = len(lth.runs("fig12", "paper"))
    assert chapter.partial("fig12") == {"paper": (n - 1, n)}
    assert chapter.stored("fig12", "paper") == (n - 1, n)
    assert not chapter.exploration
    commit([lth.runs("fig12", "paper")[-1]])
    assert Chapter("lth").scale("fig12") == "paper"
    assert Chapter("lth", scale="smoke").scale("fig12") == "smoke"


def test_an_item_under_way_is_shown_with_the_trials_that_are_complete(clone, monkeypatch):
    nothing, how = Chapter("lth").shown("fig12")
    assert nothing is None
    assert how.startswith("fig12 needs ")
    monkeypatch.setitem(lth.SETTINGS, "primary", replace(presets()["primary"], trials=2))
    *first, last = sorted(lth.runs("fig12", "primary"), key=lambda r: r.seed)

    def shown():
        frame, badge = Chapter("lth").shown("fig12")
        return len(frame), set(frame["seed"]), re.search(r"(\d+)(?: of \d+)? trial", badge)[1]

    train(first, clone)
    n = sum(r.seed == 0 for r in first)
    assert shown() == (n, {0}, "1")
    train([last], clone)
    assert shown() == (2 * n, {0, 1}, "2")


def test_where_no_trial_is_complete_points_may_be_shown_of_which_every_trial_is(clone, monkeypatch):
    monkeypatch.setitem(lth.SETTINGS, "primary", replace(presets()["primary"], trials=2))
    runs = lth.runs("fig12", "primary")
    train([r for r in runs if r.init == "reset" and r.level < 3 and (r.level, r.seed) != (2, 1)], clone)
    assert Chapter("lth").shown("fig12")[0] is None
    frame, badge = Chapter("lth").shown("fig12", points=True)
    assert sorted(zip(frame["level"], frame["seed"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert re.search(r"· 2 of \d+ points of the experiment in full", badge)
    train([r for r in runs if r.seed == 0], clone)
    n = len(Chapter("lth").shown("fig12")[0])
    assert n > 4
    assert set(Chapter("lth").shown("fig12", points=True)[0]["seed"]) == {0}  # more runs than four at complete points
    train([r for r in runs if r.seed == 1 and r.init != "reinit"], clone)
    controls = sum(r.seed == 1 and r.init == "reinit" for r in runs)
    assert len(Chapter("lth").shown("fig12", points=True)[0]) == 2 * (n - controls) > n
    assert len(Chapter("lth").shown("fig12")[0]) == n


def test_a_network_with_fewer_trials_of_its_own_is_complete_with_those(clone, monkeypatch):
    at = presets()["primary"]
    nets = {name: replace(net, trials=1) for name, net in at.nets.items()}
    monkeypatch.setitem(lth.SETTINGS, "primary", replace(at, nets=nets, trials=2))
    dense = next(r for r in lth.runs("fig12", "primary") if not r.level)
    train([dense], clone)
    assert Chapter("lth").shown("fig12")[0] is None
    assert list(Chapter("lth").shown("fig12", points=True)[0]["level"]) == [0]


def test_a_badge_counts_what_diverged(clone, everything):
    runs, store = lth.runs("fig12", "smoke"), Store(clone / "results/ours")
    for r in runs:
        store.put(everything.get(r) | ({"status": "diverged"} if r == runs[-1] else {}))
    assert f" · 1 of {len(runs)} trainings diverged" in Chapter("lth").badge("fig12")


def test_a_scale_with_fewer_controls_takes_no_figure_from_a_lower_one(commit, clone, monkeypatch):
    primary = changed(replace(presets()["primary"], trials=2), rounds=3, control_rounds=(2,))  # laptop's is at 3
    monkeypatch.setitem(lth.SETTINGS, "primary", primary)
    runs = lth.runs("fig4", primary)
    last = [r for r in runs if r.seed == 1][-1]
    commit(lth.runs("fig4", "laptop"))
    train([r for r in runs if r != last], clone)
    chapter = Chapter("lth")
    assert chapter.scale("fig4") == "laptop"
    assert chapter.partial("fig4") == {"primary": (len(runs) - 1, len(runs))}
    assert set(chapter.trials("fig4", "primary")["seed"]) == {0}  # the other lacks a network
    assert "1 of 1 trial" in chapter.badge("fig4", "primary")
    train([last], clone)
    chapter = Chapter("lth")
    assert chapter.scale("fig4") == "laptop"
    assert set(chapter.trials("fig4", "primary")["seed"]) == {0, 1}
    assert chapter.trials("fig4", "paper") is None
    monkeypatch.setitem(lth.SETTINGS, "primary", changed(primary, control_rounds=(2, 3)))
    assert Chapter("lth").scale("fig4") == "laptop"  # one more network to train
    monkeypatch.setitem(lth.ITEMS, "fig4", {"lenet/imp": None})
    assert Chapter("lth").scale("fig4") == "primary"  # the tickets are all there, and more of them


def test_missing_runs_are_told_with_their_number_minutes_and_command(commit):
    runs = lth.runs("fig4", "smoke")
    assert len(lth.runs("fig4", "laptop")) == len(runs)
    commit([*runs[:-2], *lth.runs("fig4", "laptop")[:-2]])
    for scale, asked in (("best", "laptop"), ("smoke", "smoke")):  # the digits' runs are no evidence of anything
        with pytest.raises(Refused) as told:
            Chapter("lth", scale=scale).scale("fig4")
        text = str(told.value)
        assert "\n" not in text
        assert f"fig4 needs 2 of {len(runs)} runs that are not stored" in text
        assert "about 1 core minutes" in text
        command = re.search("lottery run .*?(?= trains)", text)[0]
        words = shlex.split(command)[2:]
        given = typer.main.get_command(cli.app).commands["run"].make_context("run", words).params
        assert (given["paper"], given["items"], given["scale"]) == ("lth", ["fig4"], asked)
    assert told.value._render_traceback_() == [text]


def test_without_any_run_the_time_is_unknown():
    with pytest.raises(Refused, match="time unknown"):
        Chapter("lth").frame("fig3")


def test_an_exploration_has_no_verdicts_and_other_words(commit):
    commit(lth.runs(None, "smoke"))
    chapter = Chapter("lth", scale="smoke", lr=0.01)
    assert chapter.exploration
    assert chapter.card is None
    with pytest.raises(Refused, match="recompute='missing'"):
        chapter.scale("fig3")
    assert not Chapter("lth", scale="smoke", lr=None, trials=None).exploration


def test_an_exploration_calls_things_what_they_are(tmp_path):
    given = {"model": "resnet8", "criterion": "snip", "iterations": 4, "densities": [0.2], "trials": 1}
    chapter = Chapter("grasp", "smoke", "missing", tmp_path, **given)
    measured = chapter.frame("fig3")
    assert set(measured["net"].map(names.net)) == {"ResNet-8, the 8×8 digits"}
    assert not measured.duplicated(["net", "seed", "criterion", "variant"]).any()
    for item in ("fig3", "grid"):
        assert chapter.badge(item).endswith(
            "changed here: model resnet8, criterion snip, iterations 4, densities [0.2]"
        )
        assert "ResNet-32" not in chapter.badge(item)
    assert figures.METHODS["grasp"].label == names.arm("resnet32-c10/grasp") == "SNIP, scored as GraSP is"
    assert names.printed("resnet32/grasp") == "GraSP"  # the paper's own numbers
    Chapter("grasp", "smoke")  # no exploration, so all is called as in the paper again
    assert figures.METHODS["grasp"].label == "GraSP"


def test_the_scorecard_is_that_of_the_store(commit):
    commit(lth.runs(None, "smoke"))
    card = Chapter("lth").card
    assert {"schema", "rows", "totals"} == card.keys()
    assert {row["paper"] for row in card["rows"]} == {"lth"}


def test_a_frame_has_one_row_for_each_network_of_the_item(commit):
    commit(lth.runs(None, "smoke"))
    chapter = Chapter("lth")
    frame = chapter.frame("fig4")
    assert list(frame.columns[:2]) == ["arm", "point"]
    assert {"key", "seed", "level", "density", "early_stop_test_acc", "last_test_acc", "stale"} <= set(frame.columns)
    assert sorted(frame["key"]) == sorted(r.key for r in lth.runs("fig4", "smoke"))
    cells = list(zip(frame["arm"], frame["point"], strict=True))
    assert cells == [("imp", 0), ("imp", 1), ("imp", 2), ("imp", 3), ("reinit", 3), ("oneshot", 0.825)]
    assert frame["level"].tolist() == [0, 1, 2, 3, 3, 1]
    commit(lth.runs("fig4", "laptop"))
    assert set(Chapter("lth").frame("fig4")["iterations"]) == {30}
    assert set(Chapter("lth").frame("fig4", "smoke")["iterations"]) == {20}


def test_a_badge_says_what_the_numbers_rest_on(commit, monkeypatch):
    commit([*lth.runs(None, "smoke"), *lth.runs("fig4", "paper")[:2]])
    device = Store("../results/ours").get(lth.runs("fig4", "smoke")[0])["device"]
    paper = lth.setting("paper")
    monkeypatch.setitem(lth.SETTINGS, "paper", changed(replace(paper, trials=5), one_shot=(0.825, 0.95)))
    assert Chapter("lth").badge("fig4").split(" · ") == [
        "the paper's network and data",  # as far as the presets of these tests go
        "50 % of the paper's steps",
        "1 of 5 trials",
        device,
        f"{len(lth.GUESSED)} settings guessed",
        "6 of 7 points of the experiment in full",
        f"2 of {len(lth.runs('fig4', 'paper'))} trainings stored of the paper's own setting",
    ]
    monkeypatch.setitem(lth.SETTINGS, "paper", changed(paper, base=replace(paper.nets["lenet"].base, dataset="mnist")))
    chapter = Chapter("lth")
    assert not chapter.stands_beside_paper("fig4")
    parts = chapter.badge("fig4").split(" · ")
    assert parts[:2] == ["stand-in: LeNet-300-100, the 8×8 digits", "20 iterations"]
    assert "50 % of the paper's steps" in parts
    base = paper.nets["lenet"].base
    half = replace(base, recipe=replace(base.recipe, precision="bfloat16"))
    monkeypatch.setitem(lth.SETTINGS, "paper", changed(paper, base=half))
    assert Chapter("lth").badge("fig4").split(" · ")[2] == "float32"  # said where it is not the paper's


# What is trained, and where it goes -----------------------------------------------------------------------------------


def test_missing_runs_are_trained_into_the_readers_own_folder(commit, clone, tmp_path):
    runs = lth.runs(None, "smoke")
    before = commit(runs[:3])
    chapter = Chapter("lth", scale="smoke", recompute="missing")
    assert chapter.scale("fig4") == "smoke"
    assert tree(clone / "results") == before
    assert set(Store(tmp_path / "mine").rows()) == {r.key for r in runs[3:]}
    assert len(chapter.frame("fig4")) == len(lth.runs("fig4", "smoke"))


def test_all_trains_everything_anew_in_a_folder_of_its_own(commit, clone, tmp_path):
    before = commit(lth.runs(None, "smoke"))
    chapter = Chapter("lth", scale="smoke", recompute="all", results_dir=tmp_path / "other", **TINY)
    assert tree(clone / "results") == before
    assert not (tmp_path / "mine").exists()
    [anew] = (tmp_path / "other").iterdir()
    assert chapter.store.dir == anew
    at = lth.override(lth.setting("smoke"), **TINY)
    assert set(Store(anew).rows()) == {r.key for r in lth.runs(lth.MAIN, at)}
    assert chapter.exploration
    for item in lth.MAIN:
        assert chapter.scale(item) == "smoke"
        assert len(chapter.frame(item)) == len(lth.runs(item, at)) > 0
        assert "20 iterations" in chapter.badge(item) or "of the paper's steps" in chapter.badge(item)
    with pytest.raises(Refused, match=r"^fig26 is no part of an exploration: "):
        chapter.frame("fig26")


def test_what_a_reader_trained_is_shown_beside_what_is_committed(commit, clone):
    commit(lth.runs(None, "smoke"))
    chapter = Chapter("lth", scale="smoke", recompute="missing", lr=0.01, **TINY)
    assert len(chapter.frame("fig3")) == 1  # the dense network: a single round has no level 3
    again = Chapter("lth", scale="smoke", lr=0.01, **TINY)
    assert again.frame("fig3")["key"].tolist() == chapter.frame("fig3")["key"].tolist()


def test_a_budget_leaves_the_rest_missing(commit):
    commit(lth.runs(None, "laptop"))  # from which the pace is known
    chapter = Chapter("lth", scale="smoke", recompute="missing", budget_minutes=1e-9, lr=0.5)
    with pytest.raises(Refused, match="runs that are not stored"):
        chapter.scale("fig4")


def test_never_trains_and_never_writes(commit, clone, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    before = commit(lth.runs(None, "smoke"))
    chapter = Chapter("lth")
    for item in lth.ITEMS:
        chapter.frame(item), chapter.badge(item)
    assert tree(clone / "results") == before
    assert not (tmp_path / "mine").exists()


def test_without_a_clone_a_reader_has_results_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chapter = Chapter("lth", scale="smoke", recompute="missing", **TINY)
    assert chapter.scale("fig12") == "smoke"
    assert chapter.store.dir == tmp_path / "mine"


def test_one_stored_accuracy_half_a_point_higher_turns_the_figure_red(commit, clone, capsys):
    commit(lth.runs(None, "smoke"))
    [shard] = (clone / "results/ours").glob("*.parquet")
    assert Chapter("lth").scale("fig4") == "smoke"
    frame = pd.read_parquet(shard)
    victim = lth.runs("fig4", "smoke")[1].key
    frame.loc[frame["key"] == victim, "early_stop_test_acc"] += 0.005
    frame.to_parquet(shard, index=False)
    capsys.readouterr()
    chapter = Chapter("lth", scale="smoke")
    with pytest.raises(Refused, match="fig4 needs 1 of"):
        chapter.frame("fig4")
    err = capsys.readouterr().err
    assert victim in err
    assert "early_stop_test_acc" in err


# Bad parameters -------------------------------------------------------------------------------------------------------

BAD = {
    "scale": ["huge", "Smoke", 5, None, ["smoke"]],
    "recompute": ["sometimes", True, None],
    "device": ["tpu", 0, None],
    "threads": [0, -1, "2", 1.5, None],
    "budget_minutes": [0, -1, "soon"],
    "trials": [0, -1, 2.5, "5", True],
    "seed": [-1, 1.5, "0", True],
    "model": ["lenet", 5],
    "dataset": ["digit", 3],
    "train_fraction": [0, -0.5, 1.5, "half"],
    "iterations": [0, -5, 2.5, "20", True],
    "batch_size": [0, 2.5, "60"],
    "lr": [0, -1, float("nan"), "fast"],
    "rate": [1, -0.1, float("nan"), "0.2"],
    "rate_output": [1, -0.1, "0.1"],
    "rounds": [0, -1, 2.5, "3", True],
    "scope": ["all", 1],
    "init": ["rest", 0],
    "rewind_to": [-1, 10**6, 1.5, "5"],
    "one_shot_densities": [0.5, [2], [0.0], [-0.1], ["0.1"], "0.1"],
}


def test_every_parameter_of_the_notebook_has_bad_values_here():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    [first] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    names = [node.target.id for node in ast.parse("".join(first["source"])).body]
    assert set(names) == BAD.keys() | {"results_dir"}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_one_line_before_any_training(tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    for recompute in ("never", "missing"):
        given = {"scale": "smoke", "recompute": recompute, name: value}
        with pytest.raises(Refused) as told:
            Chapter("lth", **given)
        text = str(told.value)
        assert "\n" not in text
        assert name in text
        assert str(value).strip("[]'") in text
        assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("given", [{"init": "rewind"}, {"rewind_to": 5}])
def test_rewinding_needs_both_of_its_parameters(given):
    with pytest.raises(Refused, match=r"rewind_to .* they go together"):
        Chapter("lth", scale="smoke", **given)


def test_recomputing_needs_a_scale():
    with pytest.raises(Refused, match="needs a scale: give one of paper, primary, laptop, smoke"):
        Chapter("lth", recompute="missing")


def test_a_results_dir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for recompute in ("never", "missing", "all"):
        with pytest.raises(Refused, match=re.escape(str(tmp_path / "file"))):
            Chapter("lth", scale="smoke", recompute=recompute, results_dir=tmp_path / "file")


def test_what_only_the_data_can_tell_is_one_line_too():
    """1,050 training images make no batch of 2,000: nothing is trained."""
    with pytest.raises(Refused, match=r"^Invalid batch_size 2000: the training set has 1050 images\.$"):
        Chapter("lth", scale="smoke", recompute="missing", batch_size=2000)


@pytest.mark.parametrize(
    ("paper", "given", "text"),
    [
        ("lth", {"train_fraction": 0.001}, "Invalid batch_size 60: the training set has 1 images."),
        ("lth", {"lr": 1e6}, "Invalid lr 1000000.0: training diverges there, give at most 10."),
        ("lth", {"rate": 0.9, "rounds": 20}, "Invalid rate 0.9 with 20 rounds: one-shot pruning cannot go down to"),
        ("lth", {"rate_output": 0.99, "rounds": 3}, "After 2 rounds: Rate 0.99 leaves none of the 10 weights of layer"),
        ("lth", {"rate": 0.95, "rounds": 6}, "rate 0.95"),
        ("lth", {"seed": 2**65}, f"Invalid seed {2**65}: give a whole number below 2**63."),
        ("lth", {"one_shot_densities": [1e-9]}, "Invalid one_shot_densities [1e-09]: give a list of fractions"),
        ("grasp", {"batch_size": 5000}, "Invalid batch_size 5000: the training set has 1347 images."),
        ("grasp", {"densities": [1e-5]}, "Density 1e-05 keeps none of the 19464 weights of the model: use at least"),
        ("grasp", {"model": "vgg16"}, "Invalid in_shape (1, 8, 8): 4 poolings need at least 16x16 pixels."),
        ("grasp", {"lr": 50.0}, "Invalid lr 50.0: training diverges there, give at most 10."),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_training(monkeypatch, paper, given, text):
    """Whether or not anything is trained at all: counts follow from sizes, shares and rates."""
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    for recompute in ("never", "missing"):
        with pytest.raises(Refused, match="(?i)" + re.escape(text)):
            Chapter(paper, scale="smoke", recompute=recompute, **given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"per_class": 150}, "Invalid per_class 150: class 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 has fewer training images."),
        ({"temperature": 1e-30}, "NaN or infinity in the scores: check the model's weights and the temperature."),
        ({"temperature": 1e30}, "All GraSP scores are zero, so no weight ranks above another"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_training(monkeypatch, given, text):
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(Refused, match="^" + re.escape(text)):
        Chapter("grasp", scale="smoke", recompute="missing", **given)


TAKEN = {
    "lth": {"conv2", "conv4", "mnist", "global"},
    "grasp": {"resnet20", "cifar10", "snip"},
    "cs": {"resnet20", "digits", "epoch", "iteration", "as-described", "code"},
    "str": {"resnet32", "resnet50", "mobilenetv1", "cifar100", "exp", "filter", "weight", "global"},
}


@pytest.mark.parametrize("paper", TAKEN)
def test_every_value_that_a_parameter_lists_can_be_declared_or_is_refused(paper):
    """The values named in the comments of a notebook's first cell, at the smallest scale."""
    cells = json.loads(NOTEBOOK.with_name(f"{paper}.ipynb").read_text(encoding="utf-8"))["cells"]
    [first] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    taken = []
    for line in "".join(first["source"]).splitlines():
        if match := re.match(r"(\w+): str = None  # (.+)", line):
            listed = re.findall(r"\b[a-z][a-z]+[0-9_]*[a-z0-9_]*\b", match[2])
            known = {"model": models.MODELS, "dataset": data.SETS, "scope": ("layer", "global"), "init": INITS}
            quoted = re.findall(r'"([a-z-]+)"', match[2])
            known = known.get(match[1], CRITERIA if match[1] == "criterion" else quoted)
            for value in dict.fromkeys(v for v in (*listed, *quoted) if v in known):
                more = {"rewind_to": 5} if value == "rewind" else {}
                with contextlib.suppress(Refused):
                    chapter = Chapter(paper, scale="smoke", **{match[1]: value}, **more)
                    taken.append(value)
                    assert chapter.module.runs(chapter.module.main, chapter.settings["smoke"])
    assert TAKEN[paper] <= set(taken), TAKEN[paper] - set(taken)


OTHER = {  # a value of each parameter that is not the digits' preset
    "trials": 3, "seed": 3, "train_fraction": 0.9, "iterations": 240, "batch_size": 30, "lr": 0.03, "densities": [0.25],
    "rate": 0.3, "rate_output": 0.3, "rounds": 2, "scope": "global", "init": "reinit", "one_shot_densities": [0.25],
    "s0": 0.02, "lam": 1e-5, "beta_final": 50.0, "beta_step": "iteration", "restart_rule": "code", "mask_scale": False,
    "weight_decay": 1e-3, "s_init": -5.0, "g": "exp", "granularity": "filter", "target_density": 0.25,
    "temperature": 3.0, "per_class": 4, "chunks": 4, "class_sorted": False, "criterion": "snip", "methods": ["gmp"],
}  # fmt: skip


@pytest.mark.parametrize("paper", [*TAKEN, "compare"])
def test_every_parameter_changes_what_an_exploration_trains(paper):
    """One that changed nothing there would only take the verdicts away."""
    cells = json.loads(NOTEBOOK.with_name(f"{paper}.ipynb").read_text(encoding="utf-8"))["cells"]
    [first] = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    listed = re.findall(r"^(\w+): ", "".join(first["source"]), re.M)
    module = papers.paper(paper)
    at = module.override(module.setting("smoke"), iterations=120)
    before = {r.key for r in module.runs(module.main, at)}
    for name in (name for name in listed if name in OTHER):
        given = {name: OTHER[name]} | ({"iterations": 120} if name == "batch_size" else {})
        assert {r.key for r in module.runs(module.main, module.override(at, **given))} != before, name


def test_an_exploration_at_all_scales_says_that_training_needs_one():
    with pytest.raises(Refused, match=r"recompute='missing' with one scale, such as 'smoke', trains them\.$"):
        Chapter("lth", rate=0.5).scale("fig4")


@pytest.mark.parametrize("scale", ["bset", None, ["smoke"]])
def test_a_scale_that_is_none_is_told_all_that_there_are(scale):
    text = f"Invalid scale {scale!r}: give one of best, paper, laptop, smoke."
    with pytest.raises(Refused, match=f"^{re.escape(text)}$"):
        Chapter("cs", scale=scale)


@pytest.mark.parametrize("folder", [5, 1.5, ["results"], True])
def test_a_results_dir_is_a_path(folder):
    with pytest.raises(Refused, match=rf"^Invalid results_dir {re.escape(repr(folder))}: give the path of a folder"):
        Chapter("lth", scale="smoke", results_dir=folder)


def test_outside_of_a_clone_nothing_is_shown_without_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"No results folder around {tmp_path}: work inside a clone, or name one with results_dir."
    with pytest.raises(Refused, match="^" + re.escape(text)):
        Chapter("lth")
    (tmp_path / "named").mkdir()
    Chapter("lth", results_dir=str(tmp_path / "named"))


# Figures --------------------------------------------------------------------------------------------------------------


def small_frame():
    """Two trials; a reinitialised network with two draws in the first trial and one in the second."""
    rows = [
        ("imp", 0, 0, 0, 1.0, 0.90, 100),
        ("imp", 0, 0, 1, 1.0, 0.94, 300),
        ("imp", 3, 3, 0, 0.5, 0.96, 80),
        ("imp", 3, 3, 1, 0.5, 0.92, 60),
        ("reinit", 3, 3, 0, 0.5, 0.80, 200),
        ("reinit", 3, 3, 0, 0.5, 0.84, 400),
        ("reinit", 3, 3, 1, 0.5, 0.90, 500),
        ("oneshot", 1, 0.825, 0, 0.176, 0.7, 10),
        ("oneshot", 1, None, 0, 0.108, 0.6, 20),
    ]
    columns = ["arm", "level", "point", "seed", "density", "early_stop_test_acc", "early_stop_step"]
    return pd.DataFrame(rows, columns=columns).assign(last_test_acc=0.5)


def test_an_axis_of_dense_networks_names_them():
    import matplotlib.pyplot as plt

    fig, [ax, other] = figures.panels(2)
    figures.density_axis(ax, [100, 64.14], figures.LTH_TICKS)
    figures.density_axis(other, [100, 21.1], figures.LTH_TICKS)
    assert [list(a.get_xticks()) for a in (ax, other)] == [[100, 64.1], [100, 51.3, 21.1]]
    plt.close(fig)


def test_learning_curves_are_compared_where_all_have_been_read():
    rows = [("imp", 0, 1.0, [10, 20, 30, 40], [0.1, 0.2, 0.3, 0.4]), ("imp", 3, 0.5, [30, 40], [0.5, 0.6])]
    frame = pd.DataFrame(rows, columns=["arm", "level", "density", "step", "test_acc"])
    found = figures.at_steps(frame, "test_acc", [("imp", 0), ("imp", 3)])
    assert list(found.columns) == ["network", "weights left, %", "iteration 30", "iteration 40"]
    assert found[["iteration 30", "iteration 40"]].to_numpy().tolist() == [[30, 40], [50, 60]]
    alone = figures.at_steps(frame, "test_acc", [("imp", 0)], shares=(0.25, 1.0))
    assert list(alone.columns)[2:] == ["iteration 10", "iteration 40"]


def test_a_ticket_that_starts_elsewhere_is_called_so():
    assert lth.called({"init": "rewind"}) == {"imp": "ticket, init rewind"}
    assert lth.called({"init": "reset", "lr": 0.1}) == {}


def test_repeated_draws_of_a_trial_are_averaged_first():
    table = figures.per_trial(small_frame(), "test_acc")
    reinit = table[table["arm"] == "reinit"]
    assert reinit["seed"].tolist() == [0, 1]
    assert reinit["value"].tolist() == pytest.approx([82, 90])
    assert reinit["density"].tolist() == [50, 50]
    assert len(table) == 8


def test_summary_by_hand():
    table = figures.summary(small_frame(), "test_acc")
    assert table[["arm", "level"]].to_numpy().tolist() == [
        ["imp", 0], ["imp", 3], ["reinit", 3], ["oneshot", 1], ["oneshot", 1],
    ]  # fmt: skip
    assert table["mean"].tolist() == pytest.approx([92, 94, 86, 70, 60])
    assert table["min"].tolist() == pytest.approx([90, 92, 82, 70, 60])
    assert table["max"].tolist() == pytest.approx([94, 96, 90, 70, 60])
    assert table["trials"].tolist() == [2, 2, 2, 1, 1]
    assert table["density"].tolist() == pytest.approx([100, 50, 50, 17.6, 10.8])


def test_iterations_and_other_readings_keep_their_unit():
    steps = figures.summary(small_frame(), "step")
    assert steps["mean"].tolist() == [200, 70, 400, 10, 20]
    assert set(figures.summary(small_frame(), "test_acc", "last")["mean"]) == {50}


def test_early_stops_that_come_too_late_are_bounds():
    """More than a fifth of the networks in the last tenth of 500 iterations; a trial's draws count as one."""
    frame = small_frame().assign(iterations=500)
    found = figures.summary(frame, "step")
    assert found["late"].tolist() == [0, 0, 0.5, 0, 0]
    assert figures.steps(found).tolist() == [200, 70, "≥ 400", 10, 20]
    assert figures.summary(frame, "test_acc")["late"].tolist() == [0, 0, 0.5, 0, 0]
    assert figures.summary(frame, "test_acc", "last")["late"].sum() == 0
    shown = figures.compared(frame[frame["point"].notna()], ["imp", "reinit"], [3])
    assert table(shown, "x").data.splitlines()[3:] == [
        "| --: | --: | --: | --: | --: | --: |",
        "| 0 | 100.00 | 200 | – | 92.00 | – |",
        "| 3 | 50.00 | 70 | ≥ 400 | 94.00 | 86.00 |",
    ]


def test_a_figure_calls_an_arm_what_an_exploration_makes_of_it(monkeypatch):
    _, [ax] = figures.panels(1)
    monkeypatch.setattr(names, "called", {"reinit": "what is trained today"})
    figures.by_density(ax, small_frame(), "test_acc", labels={"oneshot": "at once"})
    assert {c.get_label() for c in ax.containers} == {names.ARMS["imp"], "at once", "what is trained today"}


def test_a_figure_draws_the_summary(tmp_path):
    import matplotlib.pyplot as plt

    fig, [ax, other] = figures.panels(2)
    table = figures.by_density(ax, small_frame(), "test_acc")
    pd.testing.assert_frame_equal(table, figures.summary(small_frame(), "test_acc"))
    [line] = [c for c in ax.containers if c.get_label() == figures.METHODS["reinit"][0]]
    assert line.lines[0].get_xydata().tolist() == [[50, pytest.approx(86)]]
    assert ax.get_xscale() == "log"
    assert ax.get_xlim()[0] > ax.get_xlim()[1], "dense is on the left"
    assert "%" in ax.get_xlabel()
    assert "%" in ax.get_ylabel()
    figures.printed(other, [51.3], [98.2], "paper", 0.1)
    figures.badge(fig, "net, data: the paper’s · " * 9)
    fig.savefig(tmp_path / "figure.png")
    plt.close(fig)


def test_accuracies_are_as_far_apart_as_the_logarithms_of_their_errors():
    """97 and 98 % as 94 and 96 %; an error of 0 and an interval beyond 100 % are drawn at the smallest."""
    import matplotlib.pyplot as plt

    fig, [ax] = figures.panels(1)
    ax.errorbar([1, 2, 3], [90.0, 98.0, 100.0], [0.5, 0.1, 3.0])
    figures.error_scale(ax)
    height = lambda *at: ax.transData.transform([(1, y) for y in at])[:, 1]  # noqa: E731
    low, high = np.diff(height(94, 96, 97, 98))[[0, 2]]
    assert low == pytest.approx(high)
    assert np.isfinite(height(100.0, 103.0)).all()
    assert list(ax.get_yticks())[:4] == [90, 95, 97, 98]
    plt.close(fig)


def test_learning_curves_are_means_over_trials():
    import matplotlib.pyplot as plt

    frame = small_frame().assign(step=[np.array([10, 20])] * 9)
    frame["test_acc"] = [np.array([a - 0.1, a]) for a in frame["early_stop_test_acc"]]
    fig, [ax] = figures.panels(1)
    figures.over_training(ax, frame, "test_acc", [("imp", 0), ("reinit", 3)])
    first, second = ax.get_lines()
    assert first.get_xdata().tolist() == [10, 20]
    assert first.get_ydata().tolist() == pytest.approx([82, 92])
    assert second.get_ydata().tolist() == pytest.approx([100 * (0.7 + 0.74 + 0.8) / 3, 100 * (0.8 + 0.84 + 0.9) / 3])
    assert (first.get_label(), second.get_label()) == ("100.0 %", "50.0 %, same mask, fresh weights")
    plt.close(fig)


def drawn():
    fig, [ax] = figures.panels(1)
    figures.by_density(ax, small_frame(), "test_acc")
    figures.name_ends(ax)
    figures.badge(fig, "trials 2 of 5 · <paper's>")
    return fig


def test_a_figure_as_svg_is_the_same_from_run_to_run_and_takes_the_pages_colour():
    import matplotlib.pyplot as plt

    first, again = figures.svg(drawn()), figures.svg(drawn())
    assert first == again
    root = ElementTree.fromstring(first)
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"same mask, fresh weights", "test accuracy, %"} <= set(texts)
    assert texts[-1] == "trials 2 of 5 · <paper's>"
    assert float(root.get("data-height")) < float(root.get("viewBox").split()[3])  # the badge is below the picture
    assert "#000000" not in first
    assert "currentColor" in first
    assert max(len(n.split(".")[1]) for n in re.findall(r'[ "]-?\d+\.\d+', first)) <= 2  # 1, and 2 in widths
    plt.close("all")


def test_a_figure_is_no_wider_than_the_column_whatever_its_labels():
    import matplotlib.pyplot as plt

    fig, axes = figures.panels(2)
    axes[0].set_yticks([0, 1], ["a label that takes a third of the column"] * 2)
    width = float(re.search(r'width="([\d.]+)pt"', figures.svg(fig))[1])
    assert 400 < width < 72 * figures.WIDTH + 8
    plt.close("all")


def test_labels_at_the_ends_of_lines_keep_their_distance_and_their_order():
    assert figures._apart([0, 1, 2, 50], 10) == [-9, 1, 11, 50]
    assert figures._apart([0, 20], 10) == [0, 20]
    assert figures._apart([], 10) == []
    assert np.diff(figures._apart([5, 5, 14, 14.5, 33], 11)).min() >= 11 - 1e-9


def test_every_arm_has_one_look_and_no_two_share_it():
    same = {"lt": "imp", "rewind": "lt-rewind"}  # GraSP's names for what other papers have, too
    looks = [look[1:3] for name, look in figures.METHODS.items() if name not in same]
    assert len(set(looks)) == len(looks)
    assert all(figures.METHODS[a][1:] == figures.METHODS[b][1:] for a, b in same.items())


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_difference_has_its_interval_from_two_trials_on():
    assert difference([-1.0, -2.0, -3.0]) == "−2.00 ± 2.48"  # t(0.975, 2) / √3
    assert difference([0.5, 0.5]) == "+0.50 ± 0.00"
    assert difference([-1.0]) == "−1.00"


def test_a_negative_number_in_a_sentence_has_the_minus_of_the_tables():
    assert say("From -3.5 to 2", "[-1, 4] (-0.2); 2026-11, a-3.").data == "From −3.5 to 2 [−1, 4] (−0.2); 2026-11, a-3."


def test_a_table_is_markdown_with_its_caption():
    frame = pd.DataFrame(
        {"n": [1, 2000], "x": [1.005, None], "what": ["a|b", "−"]}, index=pd.Index(["p", "q"], name="arm")
    )
    assert table(frame, "What it is.", digits=1).data.splitlines() == [
        "**What it is.**",
        "",
        "| arm | n | x | what |",
        "| --- | --: | --: | --- |",
        "| p | 1 | 1.0 | a\\|b |",
        "| q | 2,000 | – | − |",
    ]
    assert table([{"x": -0.001, "y": -2.5}], "C", {"y": 2}).data.splitlines()[-1] == "| 0.00 | −2.50 |"
    words = table([{"x": "-2.9 [-4.2, 1]", "y": "2026-11 a-3"}], "C").data.splitlines()[-1]
    assert words == "| −2.9 [−4.2, 1] | 2026-11 a-3 |"


def test_names_are_words():
    assert names.arm("resnet32-c10/grasp") == "GraSP"
    assert names.arm("sgd-0.4/imp") == "ticket"
    assert names.net("vgg19-c10") == "VGG-19, CIFAR-10"
    assert names.net("resnet8", "cifar10_16") == "ResNet-8, CIFAR-10 at 16×16 pixels"
    assert names.net("new") == names.arm("new") == "new"
    conv = names.layers(["conv1", "conv2", "fc1", "fc2", "fc3"])
    assert list(conv.values())[1:4] == [
        "second convolution",
        "first fully connected layer",
        "second fully connected layer",
    ]
    assert list(names.layers(["fc1", "fc3"]).values()) == ["first layer", "output layer"]


def test_a_figure_of_few_rounds_shows_its_last_ticket():
    assert figures.near([0, 1, 2], [0, 3, 7]) == [0, 2]
    assert figures.near([0, 1, 2], [3, 7]) == [2]
    assert figures.near([0, 3, 4], [0, 3, 7]) == [0, 3]
    assert figures.near([0], [0, 3]) == figures.near([0], [3]) == [0]
