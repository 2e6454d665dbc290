"""Sets that cannot be fetched: read from generated files in the layout of their owners."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import train

from lottery import data, models
from lottery.experiments import Store, soft_threshold
from lottery.training import Recipe, fit


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in data.ELSEWHERE:
        monkeypatch.setitem(data.SETS, name, data.SETS[name]._replace(n_train=12, n_test=6))
    monkeypatch.setitem(data.SETS, "imagenet", data.SETS["imagenet"]._replace(classes=3, n_train=12, n_test=6))
    return tmp_path


def images(root):
    """Three classes of single colours, of other sizes and formats."""
    for part, each in (("train", 4), ("val", 2)):
        for c, name in enumerate(("n01", "n02", "n03")):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(each):
                colour = tuple(40 * (c == k) + 10 * i for k in range(3))
                suffix = ("png", "bmp")[i % 2]
                Image.new("RGB", (300 + 50 * i, 260), colour).save(folder / f"{i}.{suffix}")


def tables(root, name, steps, features, classes):
    rng = np.random.default_rng(0)
    (root / name).mkdir()
    for part, n in (("train", 12), ("test", 6)):
        x = rng.normal(size=(n, steps, features)).astype(np.float32)
        x[:, :, 0] = np.arange(steps) / steps  # the first feature counts the steps
        np.save(root / name / f"{part}.npy", np.column_stack([np.arange(n) % classes, x.reshape(n, -1)]))


def test_images_are_resized_and_cut_to_the_middle(root):
    images(root)
    d = data.load("imagenet", root, valid=0)
    assert (tuple(d.train.x.shape), d.train.x.dtype) == ((12, 3, 224, 224), torch.uint8)
    assert sorted(d.train.y.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    for x, y in zip(d.test.x, d.test.y, strict=True):
        assert x[y].float().mean() - x.float().mean() == pytest.approx(40 * 2 / 3, abs=0.1)


def test_the_middle_is_the_middle(root):
    """A picture of 512x256 whose columns count is kept from column 144 to 367."""
    images(root)
    wide = np.broadcast_to((np.arange(512) // 2).astype(np.uint8)[None, :, None], (256, 512, 3))
    Image.fromarray(wide).save(root / "imagenet/val/n01/0.png")
    x = data.load("imagenet", root, valid=0).test.x[0]
    assert x[0, 0, [0, -1]].tolist() == [144 // 2, 367 // 2]


@pytest.mark.parametrize(("name", "steps", "features", "classes"), [("google12", 99, 32, 12), ("har2", 128, 9, 2)])
def test_tables_become_sequences_that_a_fastgrnn_reads_step_by_step(root, name, steps, features, classes):
    tables(root, name, steps, features, classes)
    d = data.load(name, root, valid=0)
    assert tuple(d.train.x.shape) == (12, features, steps, 1)
    first = d.test.x[0, 0, :, 0].float()
    assert (first.diff() >= 0).all()
    assert (first[0], first[-1]) == (0, 255)  # a feature's own range
    model = models.create("fastgrnn", seed=0, in_shape=tuple(d.train.x.shape[1:]), classes=classes, hidden=8)
    assert model.w.weight.shape == (8, features)
    recipe = Recipe(optimizer="sgd", lr=0.01, batch_size=4, iterations=3, eval_every=3, inputs="standard")
    assert fit(model, d, recipe).status == "finished"


def test_the_part_of_har_has_two_classes_of_six_activities(root):
    (root / "uci_har").mkdir()
    rng = np.random.default_rng(0)
    parts = {f"X_{p}": rng.normal(size=(n, 9, 128)).astype(np.float32) for p, n in (("train", 12), ("test", 6))}
    labels = {"y_train": np.arange(12) % 6 + 1, "y_test": np.arange(6) + 1}
    np.savez(root / "uci_har/inertial_subset.npz", **parts, **labels)
    d = data.load("har2_part", root, valid=0)
    # walking, upstairs, downstairs, sitting, standing, laying
    assert d.test.y.tolist() == [1, 0, 1, 0, 1, 0]
    x = parts["X_train"][:, 3]
    expected = np.round((parts["X_test"][0, 3] - x.min()) / (x.max() - x.min()) * 255).clip(0, 255)
    assert np.abs(d.test.x[0, 3, :, 0].numpy() - expected).max() <= 1


def test_a_network_of_the_paper_trains_on_images_in_that_layout(root, monkeypatch):
    """STR's MobileNetV1 by its own Run, but for the number of steps: thresholds decay, nothing is pruned yet."""
    images(root)
    monkeypatch.setenv("LOTTERY_DATA", str(root))
    [r] = soft_threshold.trial("mobilenetv1/str", soft_threshold.setting("paper"), 0, "89.01")
    short = {"batch_size": 4, "iterations": 3, "eval_every": 3, "lr_every": 1, "warmup": 1}
    r = replace(r, recipe=replace(r.recipe, **short))
    train([r], root / "ours")
    row = Store(root / "ours").get(r)
    assert (row["status"], row["model"], row["density"], row["n_test"]) == ("finished", "mobilenetv1", 1.0, 6)
    assert -12800 < soft_threshold.numbers(row)["s/model.0.0"][-1] < -12790  # it has begun to decay


@pytest.mark.parametrize("name", data.ELSEWHERE)
def test_what_is_not_there_is_one_line(root, name):
    said = re.escape(f"No {name}: ") + r"[^\n]* is missing, and it cannot be fetched: see lottery\.elsewhere\."
    with pytest.raises(FileNotFoundError, match=f"^{said}$"):
        data.load(name, root, valid=0)
