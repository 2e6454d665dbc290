"""A training that is killed goes on where it was, in float64 bit for bit, whatever its method."""

import dataclasses
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery import cs, data, soft_threshold, tensorfile, training
from lottery import masks as M
from lottery.dynamic import GMP, RigL
from lottery.experiments import Run, Store, work
from lottery.methods import NOTHING
from lottery.stochastic import L0
from lottery.training import Checkpoint, Recipe

RECIPE = Recipe(
    "sgd", lr=0.1, batch_size=100, iterations=40, eval_every=5, momentum=0.9, nesterov=True, weight_decay=1e-2,
    milestones=(20,), last_batch="keep", inputs="standard", augment="flip-crop",
)  # fmt: skip
METHODS = {
    "nothing": NOTHING,
    "cs": cs.CS(0.02, lam=1e-3),
    "str": soft_threshold.STR(-5.0),
    "gmp": GMP(density=0.3),
    "rigl": RigL(),
    "l0": L0(lam=1e-3),
}


class Killed(Exception):
    """What ends a training where a kill would."""


class Kill(Checkpoint):
    """Writes at every reading, and ends the process's training after `after` of them."""

    def __init__(self, path, after):
        super().__init__(path, {"run": "one"}, every=0)
        self.left = after

    def offer(self, loop):
        super().offer(loop)
        self.left -= 1
        if not self.left:
            raise Killed


def network(method, dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)]
    net = nn.Sequential(*layers).double()
    if isinstance(method, RigL):
        M.attach(net, {"0": torch.rand(4, 1, 3, 3) < 0.7, "5": torch.rand(10, 144) < 0.4})
    return method.attach(net)


def same(a, b):
    """Two histories but for their times, and two models."""
    (one, net), (other, net2) = a, b
    for f in dataclasses.fields(one):
        if f.name in ("early_stop", "last"):
            mine, its = dataclasses.asdict(getattr(one, f.name)), dataclasses.asdict(getattr(other, f.name))
            assert np.array_equal(mine.pop("correct"), its.pop("correct"))
            assert mine == its
        elif f.name != "wall_s":
            np.testing.assert_equal(getattr(one, f.name), getattr(other, f.name))
    for name, t in M.state(net).items():
        assert torch.equal(t, M.state(net2)[name]), name
    assert all(torch.equal(m, M.read(net2)[name]) for name, m in M.read(net).items())


@pytest.mark.parametrize("after", [1, 4, 7])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, name, after):
    """Killed after some readings, two of which precede the early stop, and once more on the way."""
    images, method = data.load("digits"), METHODS[name]
    net = network(method)
    whole = training.fit(net, images, RECIPE, seed=3, method=method), net
    for kills in (after, 1):
        checkpoint = Kill(tmp_path / "c.safetensors", kills)
        with pytest.raises(Killed):
            training.fit(network(method), images, RECIPE, seed=3, method=method, checkpoint=checkpoint)
        if after == 7:
            break
    net, checkpoint = network(method), Checkpoint(tmp_path / "c.safetensors", {"run": "one"})
    same(whole, (training.fit(net, images, RECIPE, seed=3, method=method, checkpoint=checkpoint), net))


def test_dropout_draws_on(tmp_path):
    images, results, path = data.load("digits"), [], tmp_path / "c.safetensors"
    net = network(NOTHING, 0.5)
    torch.manual_seed(5)
    results.append((training.fit(net, images, RECIPE), net))
    killed, net = network(NOTHING, 0.5), network(NOTHING, 0.5)
    torch.manual_seed(5)
    with pytest.raises(Killed):
        training.fit(killed, images, RECIPE, checkpoint=Kill(path, 3))
    results.append((training.fit(net, images, RECIPE, checkpoint=Checkpoint(path, {"run": "one"})), net))
    same(*results)


def test_a_checkpoint_of_another_training_is_not_used(tmp_path):
    images, path = data.load("digits"), tmp_path / "c.safetensors"
    with pytest.raises(Killed):
        training.fit(network(NOTHING), images, replace(RECIPE, lr=0.5), checkpoint=Kill(path, 3))
    net, other = network(NOTHING), network(NOTHING)
    history = training.fit(net, images, RECIPE, checkpoint=Checkpoint(path, {"run": "two"}))
    same((history, net), (training.fit(other, images, RECIPE), other))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_byte_of_a_tensor_file_counts(tmp_path_factory, draw):
    """Any byte of it changed: refused, or read as what was written."""
    path = tmp_path_factory.mktemp("file") / "t.safetensors"
    tensors, about = {"w": torch.arange(6.0).view(2, 3), "m": torch.ones(3, dtype=torch.bool)}, {"t": 3}
    tensorfile.write(path, tensors, about)
    content = bytearray(path.read_bytes())
    content[draw.draw(st.integers(0, len(content) - 1))] ^= draw.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found, said, _ = tensorfile.read(path)
    except ValueError:
        return
    assert said == about
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


def test_a_run_killed_by_sigkill_goes_on_and_cleans_up(tmp_path, monkeypatch):
    """A process is killed after its second checkpoint; the next one trains the rest and no more, to the same row."""
    run = Run(model="resnet8", dataset="digits", options=(("width", 4),), recipe=replace(RECIPE, augment="none"))
    work.execute([run], tmp_path / "whole")
    if not (child := os.fork()):
        offer = Checkpoint.offer

        def offer_and_die(self, loop):
            self.every = 0
            offer(self, loop)
            if loop.t == 10:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoint.offer = offer_and_die
        work.execute([run], tmp_path / "killed")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    mine = Store(tmp_path / "killed")
    assert mine.checkpoint(run.key).exists()
    assert not mine.get(run)
    seen = []
    iterate = training._Loop.iterate
    monkeypatch.setattr(training._Loop, "iterate", lambda self: (seen.append(self.t), iterate(self)))
    work.execute([run], mine.dir)
    assert seen == list(range(10, 40))
    assert not mine.checkpoint(run.key).exists()
    row, whole = Store(mine.dir).get(run), Store(tmp_path / "whole").get(run)
    for name in ("step", "val_loss", "test_acc", "last_correct", "early_stop_step", "train_loss", "layers"):
        np.testing.assert_equal(row[name], whole[name])
    assert json.loads(row["certificate"])["resumed"] == [{}]
    assert "resumed" not in json.loads(whole["certificate"])


SMALL = Run(model="resnet8", dataset="digits", options=(("width", 2),), recipe=replace(RECIPE, iterations=15))


def killed(folder, monkeypatch, **options):
    """SMALL, whose training ends where a kill would end it, after two checkpoints."""
    offer = Checkpoint.offer

    def offer_and_die(self, loop):
        self.every = 0
        offer(self, loop)
        if loop.t == 10:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "offer", offer_and_die)
        with pytest.raises(Killed):
            work.execute([SMALL], folder, **options)


def test_a_training_does_not_go_on_over_other_data(tmp_path, monkeypatch):
    """What was trained on images that were put right meanwhile is trained anew."""
    images = work.images_of("digits", None, False, 0)
    wrong = replace(images, fingerprint="0" * 64, train=data.Split(images.train.x.flip(0), images.train.y))
    with monkeypatch.context() as patch:
        patch.setattr(work, "images_of", lambda *_: wrong)
        killed(tmp_path / "killed", monkeypatch)
    for folder in ("killed", "whole"):
        work.execute([SMALL], tmp_path / folder)
    row, whole = (Store(tmp_path / folder).get(SMALL) for folder in ("killed", "whole"))
    assert row["fingerprint"] == images.fingerprint
    assert (row["train_loss"], row["last_correct"]) == (whole["train_loss"], whole["last_correct"])
    assert "resumed" not in json.loads(row["certificate"])


def test_a_training_that_goes_on_elsewhere_says_where_it_was_before(tmp_path, monkeypatch):
    killed(tmp_path, monkeypatch, threads=2)
    work.execute([SMALL], tmp_path)
    told = json.loads(Store(tmp_path).get(SMALL)["certificate"])
    assert (told["threads"], told["resumed"]) == (1, [{"threads": 2}])


def test_what_a_training_is_may_be_said_with_tuples(tmp_path):
    images, path, about = data.load("digits"), tmp_path / "c.safetensors", {"recipe": dataclasses.asdict(RECIPE)}
    assert isinstance(about["recipe"]["milestones"], tuple)
    training.fit(network(NOTHING), images, RECIPE, checkpoint=Checkpoint(path, about, every=0))
    began = []

    class Look(Checkpoint):
        def load(self, loop):
            super().load(loop)
            began.append(loop.t)

    training.fit(network(NOTHING), images, RECIPE, checkpoint=Look(path, about))
    assert began == [35]
