"""Runs: what a key is made of, what a bad field is told."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from small_runs import STANDARD, child, message

from lottery.experiments import Run, lth
from lottery.soft_threshold import STR
from lottery.training import Recipe

# Runs: keys -----------------------------------------------------------------------------------------------------------


def test_golden_keys():
    """Published keys never change: results that are stored under them would be lost."""
    assert Run().key == "80bf7434e629f8318232e9b1"
    assert child(child(Run()), init="reinit").key == "8cc02c332516a9ac25644590"
    assert lth.setting("laptop").nets["lenet"].dense(0)[0].key == "9585cfd6dd9bcbc87c9e0fc7"


def test_key_is_the_hash_of_what_the_docstring_says():
    text = '[1, {"recipe": {"iterations": 300, "milestones": [5, 9]}, "seed": 2}, null]'
    run = Run(seed=2, recipe=Recipe(iterations=300, milestones=(5, 9)))
    assert run.key == hashlib.sha256(text.encode()).hexdigest()[:24]
    text = f'[1, {{"rate": 0.5, "recipe": {{"iterations": 300, "milestones": [5, 9]}}, "seed": 2}}, "{run.key}"]'
    assert child(run, rate=0.5).key == hashlib.sha256(text.encode()).hexdigest()[:24]


@pytest.mark.parametrize(
    ("as_float", "as_int"),
    [
        (Run(recipe=Recipe(lr=1.0)), Run(recipe=Recipe(lr=1))),
        (Run(recipe=Recipe(weight_decay=2.0)), Run(recipe=Recipe(weight_decay=2))),
        (Run(rate=0.0), Run(rate=0)),
        (Run(rate_conv=0.0), Run(rate_conv=0)),
        (Run(rate_output=0.0), Run(rate_output=0)),
        (Run(train_fraction=1.0), Run(train_fraction=1)),
        (Run(rate=0.5), Run(rate=np.float64(0.5))),
    ],
)
def test_whole_numbers_in_float_fields_name_the_same_run(as_float, as_int):
    assert as_float.key == as_int.key
    assert as_float.spec() == as_int.spec()
    assert json.dumps(as_float.spec()) == json.dumps(as_int.spec())
    assert as_float == as_int
    assert hash(as_float) == hash(as_int)


CHANGES = {
    "model": "conv2",
    "dataset": "fashion_mnist",
    "seed": 1,
    "parent": Run(),
    "rate": 0.3,
    "rate_conv": 0.2,
    "rate_output": None,
    "scope": "global",
    "init": "reinit",
    "rewind_to": 5,
    "rewind_schedule": "restart",
    "draw": 1,
    "valid": 100,
    "split_seed": 1,
    "train_fraction": 0.5,
    "options": (("init", "pytorch"),),
    "criterion": "random",
    "density": 0.3,
    "score": (("per_class", 5),),
    "noise": 0.5,
    "balanced": True,
    "layers": ("fc1", "fc2"),
    "budget": "total",
    "shuffled": True,
    "method": STR(),
}
RECIPE_CHANGES = {
    "optimizer": "sgd",
    "lr": 0.1,
    "batch_size": 64,
    "iterations": 7,
    "eval_every": 50,
    "test_readings": "all",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "milestones": (10,),
    "gamma": 0.2,
    "warmup": 3,
    "inputs": "standard",
    "nesterov": True,
    "augment": "flip-crop",
    "precision": "bfloat16",
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "lr_every": 10,
    "last_batch": "keep",
    "smooth_readings": True,
}


def test_every_field_enters_the_key():
    assert {f.name for f in dataclasses.fields(Run)} == CHANGES.keys() | {"recipe"}
    assert {f.name for f in dataclasses.fields(Recipe)} == RECIPE_CHANGES.keys()
    trunk = Run()
    alone = CHANGES.keys() - {"init", "parent", "criterion", "score", "noise", "budget", "shuffled"}
    runs = [trunk, *(Run(**{name: CHANGES[name]}) for name in alone)]
    pruned = Run(criterion="grasp", density=0.5, recipe=Recipe(inputs="standard"))
    runs += [pruned, *(replace(pruned, **{name: CHANGES[name]}) for name in ("criterion", "density", "score"))]
    sgd = Recipe(optimizer="sgd", momentum=0.5)  # Nesterov's needs it
    runs += [Run(recipe=dataclasses.replace(sgd, **{name: value})) for name, value in RECIPE_CHANGES.items()]
    runs += [child(trunk, init="noise", noise=c) for c in (0.5, 1)]
    runs += [
        Run(parent=trunk),
        Run(parent=trunk, init="reinit"),
        Run(parent=trunk, init="survivors"),
        Run(parent=trunk, shuffled=True),
        *(Run(parent=trunk, budget=budget) for budget in ("layers", "total", "erk")),
        Run(parent=Run(rate=0.3)),
        Run(parent=child(trunk)),
    ]
    assert len({r.key for r in runs}) == len(runs)
    assert len(set(runs)) == len(runs)


def test_a_field_added_later_changes_no_key():
    @dataclass(frozen=True)
    class LaterRecipe(Recipe):
        mixup: str = "none"

    @dataclass(frozen=True)
    class LaterRun(Run):
        tint: float = 0.0

    for seed in range(3):
        assert LaterRun(seed=seed, recipe=LaterRecipe()).key == Run(seed=seed).key
    assert LaterRun(tint=0.5).key != Run().key
    assert LaterRun(recipe=LaterRecipe(mixup="yes")).key != Run().key


def test_no_names_of_papers_figures_or_scales_in_a_spec():
    """One run serves many figures: the ones of figure 4 are those of figure 12 and more."""
    assert set(lth.runs("fig12", "laptop")) <= set(lth.runs("fig4", "laptop"))
    spec = json.dumps(lth.setting("laptop").nets["lenet"].reinit(0, 3)[0].spec())
    assert not re.search("lth|fig|laptop|paper|claim", spec)


def test_level_root_and_spec():
    dense = Run(seed=3)
    third = child(child(child(dense)), init="random", draw=2)
    assert [dense.level, third.level] == [0, 3]
    assert third.root is dense
    assert third.parent.root is dense
    spec = third.spec()
    assert spec["parent"] == third.parent.key
    assert spec["recipe"]["lr"] == 1.2e-3
    assert json.loads(json.dumps(spec)) == spec
    assert "level 3 random 2" in str(third)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"init": "rest"},
            "Invalid init 'rest': give one of reset, rewind, reinit, random, continue, effective, survivors, noise.",
        ),
        ({"init": "reinit"}, "Invalid init 'reinit' without a parent: a dense network starts from its own θ₀."),
        ({"rewind_schedule": "again"}, "Invalid rewind_schedule 'again': give 'continue' or 'restart'."),
        ({"rewind_to": 50_000}, "Invalid rewind_to 50000: give 0 <= iteration < 50000."),
        ({"rewind_to": -1}, "Invalid rewind_to -1: give a whole number from 0."),
        ({"seed": 1.0}, "Invalid seed 1.0: give a whole number from 0."),
        ({"seed": True}, "Invalid seed True: give a whole number from 0."),
        ({"draw": "1"}, "Invalid draw '1': give a whole number from 0."),
        ({"split_seed": None}, "Invalid split_seed None: give a whole number from 0."),
        ({"rate": 1.0}, "Invalid rate 1.0: give the fraction of survivors to remove, 0 <= rate < 1."),
        ({"rate_conv": -0.1}, "Invalid rate_conv -0.1: give the fraction of survivors to remove, 0 <= rate_conv < 1."),
        ({"rate_output": 2}, "Invalid rate_output 2: give the fraction of survivors to remove, 0 <= rate_output < 1."),
        ({"noise": 0.5}, "Invalid noise 0.5 with init 'reset': give one above 0 with init 'noise', else 0."),
        (
            {"parent": Run(), "init": "noise"},
            "Invalid noise 0.0 with init 'noise': give one above 0 with init 'noise', else 0.",
        ),
        ({"parent": Run(seed=1)}, "Invalid parent: its seed is 1, not 0."),
        ({"parent": Run(model="conv2")}, "Invalid parent: its model is 'conv2', not 'lenet_300_100'."),
        ({"parent": Run(dataset="digits")}, "Invalid parent: its dataset is 'digits', not 'mnist'."),
        ({"parent": Run(valid=10)}, "Invalid parent: its valid is 10, not None."),
        ({"parent": Run(split_seed=1)}, "Invalid parent: its split_seed is 1, not 0."),
        ({"density": 0}, "Invalid density 0: give a fraction of weights to keep, 0 < density <= 1."),
        ({"density": "0.1"}, "Invalid density '0.1': give a fraction of weights to keep, 0 < density <= 1."),
        (
            {"criterion": "largest", "density": 0.1},
            "Invalid criterion 'largest': give one of magnitude, random, snip, grasp, synflow.",
        ),
        ({"criterion": "snip"}, "Invalid criterion 'snip' without density: give the fraction to keep."),
        (
            {"criterion": "grasp", "density": 0.1},
            "Invalid inputs 'unit' with grasp: give 'standard'.",
        ),
        ({"score": (("per_class", 5),)}, "Unknown score 'per_class' of magnitude: it takes none."),
        (
            {"criterion": "snip", "density": 0.1, "score": (("temperature", 1.0),)},
            "Unknown score 'temperature' of snip: it takes chunks, class_sorted, per_class, reinit_linear.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("temperature", 1),)},
            "Invalid temperature 1: give a number above 0, such as 200.0.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("per_class", 0),)},
            "Invalid per_class 0: give a whole number above 0, such as 10.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "score": (("class_sorted", 1),)},
            "Invalid class_sorted 1: give True or False.",
        ),
        (
            {"criterion": "grasp", "density": 0.1, "recipe": STANDARD, "score": (("chunks", 3),)},
            "Invalid chunks 3: each pair of chunks needs as many of the 10 images of a class.",
        ),
        (
            {
                "criterion": "snip",
                "density": 0.1,
                "recipe": STANDARD,
                "score": (("chunks", 4), ("class_sorted", False)),
            },
            "Invalid chunks 4: each chunk needs as many of the 10 images of a class.",
        ),
        ({"options": {"width": 4}}, "Invalid options {'width': 4}: give a tuple of (name, value), sorted by name."),
        (
            {"options": (("width", 4), ("init", "pytorch"))},
            "Invalid options (('width', 4), ('init', 'pytorch')): give a tuple of (name, value), sorted by name.",
        ),
    ],
)
def test_bad_runs_are_told_in_one_line(options, text):
    with pytest.raises(ValueError, match=f"{message(text)}$"):
        Run(**options)


def test_numbers_of_numpy_name_the_same_run():
    """They become Python's own: equal, and of the same words."""
    ours = Run(
        model="conv2", seed=3, valid=100, rate=0.5, options=(("width", 3),), train_fraction=0.5,
        density=(("fc3", 0.25),),
        recipe=Recipe("sgd", lr=0.5, iterations=300, milestones=(5, 9), momentum=0.5, nesterov=True),
        method=STR(-5.0, layers=("fc3",)),
    )  # fmt: skip
    numpys = Run(
        model=np.str_("conv2"), seed=np.int64(3), valid=np.int32(100), rate=np.float32(0.5),
        options=(("width", np.int64(3)),), train_fraction=np.float16(0.5), density=(("fc3", np.float32(0.25)),),
        recipe=Recipe("sgd", lr=np.float32(0.5), iterations=np.int64(300), milestones=(np.int64(5), 9),
                      momentum=np.float64(0.5), nesterov=np.bool_(True)),
        method=STR(np.float32(-5.0), layers=("fc3",)),
    )  # fmt: skip
    assert numpys == ours
    assert hash(numpys) == hash(ours)
    assert numpys.key == ours.key
    assert json.dumps(numpys.spec()) == json.dumps(ours.spec())
    assert repr(numpys) == repr(ours)
    assert repr(numpys.recipe) == repr(ours.recipe)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"recipe": {}}, "Invalid recipe of type dict: give a lottery.training.Recipe."),
        ({"parent": "a1b2"}, "Invalid parent of type str: give a Run, or None."),
        ({"valid": -3}, "Invalid valid -3: give a whole number from 0."),
        ({"valid": 5.0}, "Invalid valid 5.0: give a whole number from 0."),
        ({"density": True}, "Invalid density True: give a fraction of weights to keep, 0 < density <= 1."),
        ({"density": (0.5,)}, "Invalid density (0.5,): give a fraction of weights to keep, 0 < density <= 1."),
        ({"density": (("fc1", 0.5), ("fc1", 0.2))}, "Invalid density (('fc1', 0.5), ('fc1', 0.2)): give a fraction"),
    ],
)
def test_fields_of_another_kind_are_refused(bad, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        Run(**bad)
