"""lottery.experiments.grasp: what is declared for GraSP's tables and figures, and what of it the arms find."""

import os
from dataclasses import replace

import pytest

from lottery import masks, models
from lottery.chapter import Chapter
from lottery.experiments import Run, grasp

PAPER, LAPTOP = grasp.setting("paper"), grasp.setting("laptop")


def only(name, x, seed=0, scale="paper"):
    [run] = grasp.arm(name, x, seed, scale)
    return run


def test_golden_keys():
    """Published keys never change: results that are stored under them would be lost."""
    assert only("resnet32-c10/grasp", 90, scale="laptop").key == "0e6e4ce23c8e5ea6021436b0"
    assert only("resnet32-c10/dense", None, scale="laptop").key == "4ca0170d7c50d95fd7fa1db9"


def test_the_recipe_is_that_of_the_authors_code():
    """160 epochs of 390 batches of 128, lr 0.1 divided by 10 after 80 and 120 epochs, weight decay by network."""
    for net, run in PAPER.nets.items():
        recipe = run.recipe
        assert (recipe.iterations, recipe.milestones, recipe.eval_every) == (160 * 390, (80 * 390, 120 * 390), 390)
        assert [round(recipe.lr_at(t), 9) for t in (0, 31_199, 31_200, 46_800)] == [0.1, 0.1, 0.01, 0.001]
        assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.augment) == (128, 0.9, False, "flip-crop")
        assert recipe.weight_decay == (5e-4 if net.startswith("vgg19") else 1e-4)
        assert (recipe.test_readings, recipe.inputs, run.valid) == ("all", "standard", 0)
    model = models.create("resnet32", seed=0, **dict(PAPER.nets["resnet32-c10"].options))
    assert sum(layer.weight.numel() for layer in masks.prunable(model).values()) == 1_855_584


def test_the_scored_batches_are_those_of_the_configs():
    """CIFAR-10: 10 per class in 2 halves; CIFAR-100: VGG-19 the same, ResNet-32 2 draws of 5 per class, halved."""
    for net in PAPER.nets:
        options = only(f"{net}/grasp", 95).score_options
        chunks = 4 if net == "resnet32-c100" else 2
        assert options == {
            "chunks": chunks, "class_sorted": True, "per_class": 10, "reinit_linear": True, "temperature": 200.0
        }  # fmt: skip
        snip = only(f"{net}/snip", 95)
        assert {**snip.score_options, "temperature": 200.0} == options
        assert only(f"{net}/random", 95).score == ()


def test_the_rows_of_the_table():
    dense, lt, rewound, snip = (only(f"vgg19-c100/{row}", 98, seed=2) for row in ("dense", "lt", "lt-rewind", "snip"))
    assert dense == replace(PAPER.nets["vgg19-c100"], seed=2)
    assert lt == replace(dense, parent=dense, density=0.02)
    assert (lt.criterion, lt.init, rewound.init) == ("magnitude", "reset", "rewind")
    assert rewound == replace(lt, init="rewind", rewind_to=5 * 390)
    assert snip == replace(dense, criterion="snip", density=0.02)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet32-c10@batch-400/grasp", {"score": (("chunks", 8), ("per_class", 40))}),
        ("resnet32-c100@batch-32000/grasp", {"score": (("chunks", 128), ("per_class", 320))}),
        ("resnet32-c10@init-normal/grasp", {"options": (("init", "normal"), ("width", 32))}),
        ("resnet32-c10@init-xavier/grasp", {"options": (("init", "glorot"), ("width", 32))}),
    ],
)
def test_variants_of_the_robustness_study_differ_in_one_thing(name, changes):
    plain = only(name.split("@")[0] + "/grasp", 80)
    assert only(name, 80) == replace(plain, **changes)


def test_laptop_begins_with_35_runs_of_the_stand_in():
    runs = grasp.runs("grid", "laptop")
    assert len(runs) == len(set(runs)) == 35
    assert {(r.model, r.dataset, r.recipe.iterations, r.recipe.precision) for r in runs} == {
        ("resnet8", "cifar10_16", 11_700, "bfloat16")
    }
    assert [(r.criterion, r.density) for r in runs[:7]] == [
        ("magnitude", None), ("random", 0.1), ("random", 0.05), ("snip", 0.1), ("snip", 0.05), ("grasp", 0.1),
        ("grasp", 0.05),
    ]  # fmt: skip
    assert [r.seed for r in runs] == [seed for seed in range(5) for _ in range(7)]


def test_slices_come_network_by_network_and_seed_by_seed():
    runs = grasp.runs("sparsest", replace(PAPER, trials=3))
    assert [(r.model, r.seed) for r in runs] == [
        (model, seed) for model in ("resnet32", "vgg19") for seed in range(3) for _ in range(3)
    ]
    tables = set(grasp.runs(["table1", "table2"], "paper"))
    assert set(runs) <= tables
    assert set(grasp.runs("grid", "paper")) - tables == {
        r for r in grasp.runs("grid", "paper") if (r.criterion, r.density) == ("random", 0.1)
    }


def test_densities_are_decimal_fractions():
    densities = {r.density for r in grasp.runs(list(grasp.TRAINED), "paper")}
    assert densities == {None, 0.4, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005}


@pytest.mark.parametrize("scale", grasp.PAPER.scales)
def test_arms_are_runs_that_the_scale_declares(scale):
    at = grasp.setting(scale)
    for item in grasp.TRAINED:
        assert grasp.cells(item, at)
        declared = set(grasp.runs(item, scale))
        for name, _, x in grasp.cells(item, at):
            assert set(grasp.arm(name, float(x), at.seeds[-1], scale)) <= declared


@pytest.mark.parametrize(
    ("name", "x", "scale"),
    [
        ("resnet32-c10/grasp", 97, "paper"),
        ("resnet32-c10/obd", 90, "paper"),
        ("resnet32-tiny/grasp", 90, "paper"),
        ("resnet32-c10@batch-4000/grasp", 90, "laptop"),
        ("resnet32-c100/grasp", 98, "laptop"),  # a stand-in takes the place of one network only
        ("vgg19-c10/dense", None, "laptop"),
        ("vgg19-c10/lt", None, "paper"),
        ("toy/grasp", None, "paper"),
    ],
)
def test_arms_that_are_no_experiment_here(name, x, scale):
    assert grasp.arm(name, x, 0, scale) is None


# A notebook's parameters ----------------------------------------------------------------------------------------------


def test_overrides():
    at = grasp.override(
        LAPTOP, trials=2, seed=7, iterations=400, batch_size=64, lr=0.05, train_fraction=0.5, densities=[0.3, 0.001],
        temperature=1.0, per_class=20, chunks=4, class_sorted=False,
    )  # fmt: skip
    runs = grasp.runs("table2", at)
    assert {r.seed for r in runs} == {7, 8}
    assert {r.density for r in runs} == {None, 0.3, 0.001}
    recipe = runs[0].recipe
    assert (recipe.iterations, recipe.milestones, recipe.eval_every) == (400, (200, 300), 390)
    assert (recipe.batch_size, recipe.lr, runs[0].train_fraction) == (64, 0.05, 0.5)
    scored = {r.criterion: r.score_options for r in runs}
    assert scored["grasp"] == {
        "chunks": 4, "class_sorted": False, "per_class": 20, "reinit_linear": True, "temperature": 1.0
    }  # fmt: skip
    assert grasp.override(LAPTOP, trials=None, lr=None) == LAPTOP
    model = grasp.override(LAPTOP, model="lenet_300_100", criterion="magnitude")
    assert {(r.model, r.criterion) for r in grasp.runs("fig2", model)} == {
        ("lenet_300_100", "snip"), ("lenet_300_100", "magnitude")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"trials": 0}, "Invalid trials 0: give a whole number from 1."),
        ({"iterations": 2.5}, "Invalid iterations 2.5: give a whole number from 4."),
        ({"densities": 0.5}, "Invalid densities 0.5: give a list of fractions of weights to keep, 0 < kept < 1."),
        ({"densities": [5.0]}, "Invalid densities [5.0]: give a list of fractions of weights to keep, 0 < kept < 1."),
        ({"criterion": "best"}, "Invalid criterion 'best': give one of magnitude, random, snip, grasp, synflow."),
        ({"per_class": 1.5}, "Invalid per_class 1.5: give a whole number above 0, such as 10."),
        ({"temperature": -1.0}, "Invalid temperature -1.0: give a number above 0, such as 200.0."),
        (
            {"per_class": 5, "chunks": 4},
            "Invalid chunks 4: each pair of chunks needs as many of the 5 images of a class.",
        ),
        ({"model": "resnet"}, "Invalid model 'resnet': give one of "),
    ],
)
def test_bad_parameters_are_told_in_one_line(given, text):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        grasp.override(LAPTOP, **given)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", ["cifar100", "imagenet"])
def test_a_batch_of_the_study_has_an_image_of_each_class(dataset):
    at = grasp.override(grasp.setting("smoke"), dataset=dataset)
    [run] = grasp.trial("resnet32-c10@batch-400/grasp", at, 0, 90)
    assert run.score_options["per_class"] == {"cifar100": 4, "imagenet": 1}[dataset]


def test_a_temperature_without_a_point_is_the_same():
    assert grasp.override(LAPTOP, temperature=200) == grasp.override(LAPTOP, temperature=200.0)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^Unknown item 'fig9' of grasp: choose from grid, sparsest, table1, "):
        grasp.runs("fig9", "paper")
    with pytest.raises(ValueError, match=r"^Unknown scale 'huge': choose one of paper, laptop, smoke.$"):
        grasp.setting("huge")


def test_a_stand_in_has_the_papers_arms_and_nothing_else():
    assert set(LAPTOP.nets) == {"resnet32-c10"}
    assert all(isinstance(r, Run) and r.dataset == "cifar10_16" for r in grasp.runs(list(grasp.TRAINED), "laptop"))


# A chapter ------------------------------------------------------------------------------------------------------------


def test_a_chapter_trains_and_shows_every_item(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    chapter = Chapter("grasp", "smoke", "missing", tmp_path, iterations=8, trials=1, densities=[0.1])
    arms = {item: set(chapter.frame(item)["arm"]) for item in grasp.TRAINED}
    assert arms["table1"] == {"resnet32-c10/random", "resnet32-c10/grasp"}
    assert arms["table2"] == {f"resnet32-c10/{row}" for row in ("dense", "lt", "lt-rewind", "snip", "grasp")}
    assert arms["initialisation"] == {f"resnet32-c10{v}/grasp" for v in ("", "@batch-400", "@init-xavier")}
    for item in grasp.TRAINED:
        assert not chapter.stands_beside_paper(item)
    assert chapter.badge("fig2").split(" · ")[:2] == ["stand-in: ResNet-8, the 8×8 digits", "8 iterations"]
    frame = chapter.frame("fig2")
    assert frame["point"].tolist() == [90.0, 90.0]
    for curve in ("batch_loss", "test_loss", "test_acc"):
        assert all(len(values) == 1 and values[0] > 0 for values in frame[curve])
    assert not frame["stale"].any()
