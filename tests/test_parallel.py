"""One training on several processes: the images, their order, and that it ends where one process ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import typer
from PIL import Image
from small_runs import fake

from lottery import data, parallel, tensorfile
from lottery.dynamic import GMP
from lottery.experiments import Store, leases, work
from lottery.experiments.runs import Run
from lottery.methods import NOTHING
from lottery.soft_threshold import STR
from lottery.training import Recipe

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not available")
FACTS = data.Facts(3, (3, 32, 32), 20, 6)
RECIPE = Recipe(
    optimizer="sgd", lr=0.02, momentum=0.9, weight_decay=1e-3, batch_size=8, iterations=7, eval_every=3,
    last_batch="keep", augment="flip-crop", inputs="standard",
)  # fmt: skip


def runs():
    """STR, whose threshold moves, and a network that is pruned by SNIP before it is trained."""
    plain = Run(model="resnet8", dataset="imagenet", recipe=RECIPE, valid=0, options=(("width", 4),))
    score = (("chunks", 2), ("per_class", 2))
    return [
        Run(**{**vars_of(plain), "method": STR(s_init=-4.0)}),
        Run(**{**vars_of(plain), "criterion": "snip", "density": 0.3, "score": score}),
    ]


def vars_of(run):
    return {name: getattr(run, name) for name in ("model", "dataset", "recipe", "valid", "options")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 training and 6 test images of three classes, noise of other sizes and modes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, n in (("train", 20), ("val", 6)):
        for i in range(n):
            path = root / part / f"n0{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels if i % 4 else pixels[:, :, 0]).save(path)
    return root


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of this process."""
    monkeypatch.setitem(data.SETS, "imagenet", FACTS)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Images


def test_a_crop_depends_on_seed_epoch_and_image_alone(folder):
    images = parallel.Images(folder, "train", 32)
    state = torch.get_rng_state()
    first = [images[0, epoch, i][0] for epoch in (0, 1) for i in (3, 4)]
    torch.manual_seed(5)
    again = [images[0, epoch, i][0] for epoch in (0, 1) for i in (3, 4)]
    torch.set_rng_state(state)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[2])  # another epoch
    assert not torch.equal(first[0], images[1, 0, 3][0])  # another seed
    assert first[0].shape == images[3][0].shape == (3, 32, 32)
    assert torch.equal(images[3][0], images[3][0])


def test_a_class_that_only_the_training_part_has_keeps_its_number(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val" / "n00")
    assert set(parallel.Images(tmp_path / "images", "val", 32).y.tolist()) == {1, 2}


def test_parquet_shards_hold_what_the_folder_holds(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in ("train", "val"):
        images = parallel.Images(folder, part, 32)
        files = zip(images.files.files, images.y.tolist(), strict=True)
        rows = [{"image": {"bytes": f.read_bytes()}, "label": y} for f, y in files]
        half = len(rows) // 2
        for n, some in enumerate((rows[:half], rows[half:])):
            pq.write_table(pa.Table.from_pylist(some), tmp_path / f"{part}-{n}.parquet", row_group_size=3)
        shards = parallel.Images(tmp_path, part, 32)
        assert shards.y.tolist() == images.y.tolist()
        for i in range(len(images)):
            assert torch.equal(shards[i][0], images[i][0])
        assert torch.equal(shards[0, 1, 2][0], images[0, 1, 2][0])


def test_no_images_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^No images in .*train: give a folder with train/<class>/\*"):
        parallel.Images(tmp_path, "train")


def test_what_needs_one_device_or_no_imagenet_is_one_line(alone, folder, tmp_path):
    images = parallel.Images(folder, "train", 32)
    with pytest.raises(ValueError, match=r"^Devices times accumulate is 5: give at most 4, the images of the smallest"):
        parallel.Feed(images, RECIPE, 0, torch.zeros(()), accumulate=5)
    with pytest.raises(ValueError, match=r"^Nothing of grasp fig2 is trained on ImageNet"):
        parallel.main("grasp", ["fig2"], folder, results_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^Unknown item 'imagenet' of str"):
        parallel.main("str", ["imagenet"], folder, results_dir=tmp_path)
    asked = parallel._asked("cs", ["imagenet"], 2) + parallel._asked("grasp", ["imagenet"], None)
    assert {r.dataset for r in asked} == {"imagenet"}
    assert [r.seed for r in asked[:12]] == [0] * 6 + [1] * 6
    assert {r.model for r in asked} == {"resnet50", "vgg16"}


def jobs(monkeypatch, tmp_path, asked, meanwhile):
    """(what one job trains of two runs that hang together and one apart, its exit status) beside another job.

    meanwhile: called with the store and the other job's leases when this one has listed what is missing.
    """
    mine, trained, begun, missing = Store(tmp_path), [], [], parallel.missing

    def train(r, folder, store, *_):
        trained.append(r)
        store.save_artifact(r.key, {"w": torch.zeros(2)})
        store.put(fake(r))

    def first(*asked):
        found = missing(*asked)
        if not begun:
            begun.append(meanwhile(Store(tmp_path), leases.Leases(mine.leases)))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(parallel, "missing", first)
        patch.setattr(parallel, "train", train)
        patch.setattr(parallel, "_asked", lambda *_: asked)
        for name in ("init_process_group", "destroy_process_group"):
            patch.setattr(dist, name, lambda *_: None)
        try:
            parallel.main("str", ["curve"], tmp_path, results_dir=mine.dir)
        except typer.Exit as left:
            return trained, left.exit_code
    return trained, 0


@pytest.mark.parametrize("done", [True, False])
def test_of_two_jobs_on_one_store_each_run_is_trained_by_one(alone, monkeypatch, tmp_path, done):
    """What another job has stored meanwhile is not trained again; what it is at, and what needs that, is left."""
    first, dense = runs()[0], replace(runs()[0], seed=1)
    ticket, last = replace(dense, parent=dense, method=NOTHING), replace(first, seed=2)

    def meanwhile(store, others):
        others.take([dense.key])
        if done:
            store.save_artifact(dense.key, {"w": torch.zeros(2)})
            store.put(fake(dense))
            others.close()

    trained, status = jobs(monkeypatch, tmp_path, [first, ticket, last], meanwhile)
    assert set(trained) == ({first, ticket, last} if done else {first, last})
    assert status == (0 if done else 3)
    assert not done or not list(Store(tmp_path).leases.glob("[!.]*"))


def test_a_budget_is_the_parents_layer_by_layer(alone, folder, tmp_path):
    """As when one process trains: the method ends where the parent's densities are, not at its own default."""
    learnt = replace(runs()[0], method=STR(s_init=-1.5))
    taker = replace(learnt, parent=learnt, budget="layers", method=GMP(every=1))
    for r in (learnt, taker):
        parallel.train(r, folder, Store(tmp_path / "ours"), accumulate=2, workers=0)
    rows = [Store(tmp_path / "ours").get(r) for r in (learnt, taker)]
    wanted, found = (json.loads(row["layers"]) for row in rows)
    assert len({kept / n for kept, n in wanted.values()}) > 1
    assert {name: kept for name, (kept, _) in found.items()} == {
        name: max(kept, 1) for name, (kept, _) in wanted.items()
    }
    told = json.loads(rows[1]["certificate"])
    assert (told["devices"], told["accumulate"], told["flush_denormal"]) == (1, 2, False)


def test_a_certificate_names_the_code_from_before_the_training(alone, folder, tmp_path, monkeypatch):
    commits, begin = ["loaded"], parallel.Loop.run
    monkeypatch.setattr(work.files, "git", lambda *_: commits[-1])
    monkeypatch.setattr(parallel.Loop, "run", lambda *args: commits.append("pulled") or begin(*args))
    work.code.cache_clear()
    try:
        parallel.train(runs()[0], folder, Store(tmp_path / "ours"), accumulate=2, workers=0)
    finally:
        work.code.cache_clear()
    assert json.loads(Store(tmp_path / "ours").get(runs()[0])["certificate"])["code"]["commit"] == "loaded"


@pytest.mark.parametrize("back", [{"valid": None}, {"valid": 2}, {"train_fraction": 0.5}])
def test_a_run_that_keeps_images_back_is_refused(folder, tmp_path, back):
    with pytest.raises(ValueError, match=r"^<Run .*> keeps images back: .* Give valid=0 and train_fraction=1\.$"):
        parallel.train(replace(runs()[0], **back), folder, Store(tmp_path))


# Order


def test_every_image_comes_once_an_epoch_and_parts_are_even(alone, folder):
    images = parallel.Images(folder, "train", 32)
    feed = parallel.Feed(images, RECIPE, 3, torch.zeros(()), accumulate=2, workers=0)
    epochs = [[key for t in range(3 * e, 3 * e + 3) for part in feed.chosen(t) for key in part] for e in (0, 1)]
    for e, seen in enumerate(epochs):
        assert {key[:2] for key in seen} == {(3, e)}
        assert sorted(i for *_, i in seen) == list(range(20))
    assert [[len(p) for p in feed.chosen(t)] for t in range(3)] == [[4, 4], [4, 4], [2, 2]]
    feed.choose(4)  # in the middle of the second epoch
    [parts] = feed.gather()
    assert [share for *_, share in parts] == [0.5, 0.5]
    for (x, y, _), chosen in zip(parts, feed.chosen(4), strict=True):
        assert torch.equal(x, torch.stack([images[key][0] for key in chosen]))
        assert y.tolist() == [int(images.y[i]) for *_, i in chosen]


# Two processes

DRIVER = """
    import os, pathlib, signal, sys, time
    sys.path[:0] = [{package!r}, {tests!r}]

    def main():
        import functools, torch, typer
        from lottery import cli, data, parallel
        import test_parallel as given
        torch.set_num_threads(1)
        data.SETS["imagenet"] = given.FACTS
        stop, step = int(sys.argv.pop()), parallel.Step.__call__
        saved = pathlib.Path(__file__).with_name("saved")  # the first process is here: it has written its checkpoint
        def dies(self, parts):
            if self.t == stop:
                if os.environ["RANK"] == "0":
                    saved.touch()
                while not saved.exists():  # or its end would end the first process before that
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, parts)
        parallel.Step.__call__ = dies
        parallel.train = functools.partial(parallel.train, every=0.0)
        parallel._asked = lambda paper, items, trials: given.runs()  # the paper's own take days
        typer.run(cli.kind_errors(parallel.main))

    if __name__ == "__main__":  # what decodes images reads this file too
        main()
"""


def two(store, folder, tmp_path, stop=-1):
    """Train the runs by the command with two processes; both are killed at iteration `stop` of the first run."""
    package, tests = str(Path(parallel.__file__).parents[1]), str(Path(__file__).parent)
    driver = tmp_path / "driver.py"
    driver.write_text(textwrap.dedent(DRIVER.format(package=package, tests=tests)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    asked = ["str", "curve", "--images", folder, "--workers", "1", "--results-dir", store, str(stop)]
    return subprocess.run([*torchrun, driver, *asked], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.endurance
def test_two_processes_killed_and_started_again_end_where_one_ends(alone, folder, tmp_path):
    one = Store(tmp_path / "one")
    for r in runs():
        history = parallel.train(r, folder, one, accumulate=2, workers=0)
        assert (history.status, history.step, len(history.last.correct)) == ("finished", [3, 6, 7], 6)
    killed = two(tmp_path / "two", folder, tmp_path, stop=4)
    assert killed.returncode
    assert f"exitcode: {-signal.SIGKILL}" in killed.stderr.replace(" :", ":")
    ends = Store(tmp_path / "two")
    _, about, _ = tensorfile.read(ends.checkpoint(runs()[0].key))
    assert about["t"] == 4  # in the middle of the second epoch
    again = two(tmp_path / "two", folder, tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr[:3000]
    assert again.stdout.splitlines()[-1] == "2 runs: 0 left."
    assert two(tmp_path / "two", folder, tmp_path).stdout.splitlines()[-1] == "2 runs: 0 left."
    for r in runs():
        mine, its = one.load_artifact(r.key)[0], ends.load_artifact(r.key)[0]
        assert mine.keys() == its.keys()
        for name, t in mine.items():
            if "running" not in name and "num_batches" not in name:  # batch norm's averages: those of one device
                torch.testing.assert_close(its[name], t, rtol=1e-4, atol=1e-5, msg=name)
        rows = one.get(r), ends.get(r)
        assert rows[0]["layers"] == rows[1]["layers"]
        assert rows[0]["n_test"] == rows[1]["n_test"] == 6
        losses = [np.array(row["batch_loss"], dtype=float) for row in rows]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    assert not list((tmp_path / "two/.checkpoints").glob("*.safetensors"))
