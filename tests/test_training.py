"""lottery.training against a loop written out by hand, and what it promises about readings, order and errors."""

import copy
import dataclasses
import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from lottery import cs, data, grasp, lth, models, soft_threshold, training
from lottery import masks as M
from lottery.batches import Batches, normaliser, take
from lottery.methods import Method
from lottery.training import Recipe, fit

SHORT = Recipe(iterations=60, eval_every=10, test_readings="all")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def lenet(seed=0, density=1.0, dtype=torch.float32):
    model = M.attach(models.create("lenet_300_100", seed=seed, in_shape=(1, 8, 8)).to(dtype))
    return M.attach(model, lth.prune(model, 1 - density)) if density < 1 else model


def small(seed=0, masked=False):
    """A float64 network of two linear layers with a tanh, half of its weights pruned if `masked`."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 5)
    M.attach(model)
    return M.attach(model, lth.prune(model, 0.5)) if masked else model


def numbered(n_train, n_valid=0):
    """Images that carry their own number in two pixels, to see which ones a batch holds."""

    def split(n, first):
        i = torch.arange(first, first + n)
        x = torch.stack([i // 256, i % 256], 1).to(torch.uint8).view(n, 1, 1, 2)
        return data.Split(x, i % 10)

    return data.Data(
        "numbered", split(n_train, 0), split(n_valid, 5_000), split(5, 9_000), "f", 10, mean=(0.5,), std=(0.25,)
    )


def numbers(batch, t):
    x, y = batch(t)
    i = (x.flatten(1).double() * 255).round() @ torch.tensor([256.0, 1.0], dtype=torch.float64)
    assert torch.equal(i.long() % 10, y)
    return i.long().tolist()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def message(text):
    return f"^{re.escape(text)}"


# The loop, written out by hand in float64 -----------------------------------------------------------------------------


def by_hand(model, images, recipe, seed, start, stop):
    """The same training with nothing of `lottery.training` or `torch.optim` in it."""
    masks = M.read(model)
    w = {name: t.requires_grad_() for name, t in M.state(model).items()}
    m = {"1.weight": masks["1"].double(), "3.weight": masks["3"].double()}
    behind = M.state(model)
    first = {name: torch.zeros_like(t) for name, t in w.items()}
    second = {name: torch.zeros_like(t) for name, t in w.items()}
    n, size = len(images.train.y), recipe.batch_size
    for t in range(start, stop):
        epoch, i = t // (n // size), t % (n // size)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        index = order[i * size : i * size + size]
        x, y = images.train.x[index].double().flatten(1) / 255, images.train.y[index]

        hidden = torch.tanh(x @ (w["1.weight"] * m["1.weight"]).T + w["1.bias"])
        logits = hidden @ (w["3.weight"] * m["3.weight"]).T + w["3.bias"]
        target = (
            torch.nn.functional.one_hot(y, 10).double() * (1 - recipe.label_smoothing) + recipe.label_smoothing / 10
        )
        loss = -(torch.log_softmax(logits, 1) * target).sum(1).mean()
        gradient = dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))

        lr = recipe.lr * (min(1, t / recipe.warmup) if recipe.warmup else 1)
        for milestone in recipe.milestones:
            if t >= milestone:
                lr *= recipe.gamma
        for name in w:
            g, step = gradient[name] + recipe.weight_decay * w[name].detach(), t - start + 1
            with torch.no_grad():
                if recipe.optimizer == "sgd":
                    first[name] = recipe.momentum * first[name] + g
                    w[name] -= lr * (g + recipe.momentum * first[name] if recipe.nesterov else first[name])
                else:
                    first[name] = 0.9 * first[name] + 0.1 * g
                    second[name] = 0.999 * second[name] + 0.001 * g**2
                    unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
                    w[name] -= lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    return {name: t.detach().where(m[name].bool(), behind[name]) if name in m else t.detach() for name, t in w.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, 0),
        ({"weight_decay": 1e-2, "milestones": (30, 90), "gamma": 0.5}, 0),
        ({"optimizer": "sgd", "lr": 0.1}, 0),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}, 0),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "milestones": (40, 80), "warmup": 20}, 0),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "milestones": (40, 80), "warmup": 50}, 30),
        ({"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}, 0),
        ({"optimizer": "sgd", "lr": 0.1, "label_smoothing": 0.1}, 0),
    ],
)
def test_equals_a_loop_written_by_hand(digits, options, start, masked):
    recipe = Recipe(iterations=150, eval_every=75, batch_size=50, **options)
    model = small(masked=masked)
    expected = by_hand(copy.deepcopy(model), digits, recipe, seed=3, start=start, stop=150)
    fit(model, digits, recipe, seed=3, start=start)
    for name, value in M.state(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


def test_golden_trajectory(digits):
    """Goes red when a change of the loop, the data order or the initialisation calls for a new VERSION."""
    model = lenet(seed=0, density=0.5, dtype=torch.float64)
    history = fit(model, digits, Recipe(iterations=40, eval_every=20), seed=1)
    assert training.VERSION == 1
    assert history.train_loss == pytest.approx({1: 2.3198676, 2: 2.2827844, 5: 2.2327614, 10: 2.0743703}, abs=1e-6)
    assert history.val_loss == pytest.approx([1.8759943, 1.2787332], abs=1e-6)


# The step as one graph ------------------------------------------------------------------------------------------------


def conv(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    return M.attach(model.to(dtype))


GRAPHED = [
    {"optimizer": "sgd", "lr": 0.125, "momentum": 0.875, "nesterov": True, "milestones": (7, 13), "gamma": 0.5},
    {"lr": 2**-9, "milestones": (7, 13), "gamma": 0.5, "weight_decay": 2**-7},
]


@pytest.mark.parametrize("options", GRAPHED)
def test_what_is_captured_is_the_whole_step(digits, options, monkeypatch):
    """A CPU cannot capture, but trace: operators and the tensors that they work on, with every number baked in.

    The replayed trace is the plain loop bit by bit, beyond milestones, epochs and readings.
    """
    recipe = Recipe(iterations=45, eval_every=10, batch_size=64, augment="flip-crop", **options)
    plain, replayed, replays = conv(), conv(), []
    expected = fit(plain, digits, recipe, seed=1)

    def trace(function):
        traced = make_fx(function)()  # does the work of the first launch
        result = torch.zeros(())

        def replay():
            replays.append(1)
            if len(replays) > 1:
                result.copy_(traced())

        return replay, result

    monkeypatch.setattr(training, "_captures", lambda device: True)
    monkeypatch.setattr(training, "_aside", lambda function: function())
    monkeypatch.setattr(training, "_capture", trace)
    history = fit(replayed, digits, recipe, seed=1)
    assert len(replays) == 42
    assert same(M.state(plain), M.state(replayed))
    assert history.val_loss == expected.val_loss
    assert history.train_loss == expected.train_loss


def test_an_optimiser_with_its_learning_rate_as_a_number_is_not_captured(digits, monkeypatch):
    """It would train at that rate for ever."""
    monkeypatch.setattr(training, "_captures", lambda device: True)
    recipe = Recipe(iterations=20, eval_every=10, **GRAPHED[0])
    one, other = conv(), conv()
    fit(one, digits, recipe, graph=False)
    fit(other, digits, recipe, opt=torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.875, nesterov=True))
    for name, value in M.state(one).items():
        torch.testing.assert_close(value, M.state(other)[name], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", GRAPHED)
def test_a_captured_training_crosses_milestones(digits, options):
    recipe = Recipe(iterations=45, eval_every=10, batch_size=64, augment="flip-crop", **options)
    plain, graphed = (conv(torch.float64).cuda() for _ in range(2))
    expected = fit(plain, digits, recipe, seed=1, graph=False)
    history = fit(graphed, digits, recipe, seed=1)
    for name, value in M.state(plain).items():
        torch.testing.assert_close(value, M.state(graphed)[name], rtol=0, atol=1e-10)
    assert history.train_loss == pytest.approx(expected.train_loss, abs=1e-10)
    assert history.val_loss == pytest.approx(expected.val_loss, abs=1e-10)


# Learning rate --------------------------------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    recipe = Recipe(lr=0.8, warmup=4, milestones=(6, 8), gamma=0.5)
    lrs = [recipe.lr_at(t) for t in range(10)]
    assert lrs == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2], abs=1e-15)
    assert Recipe(lr=0.8).lr_at(0) == 0.8


def test_a_milestone_inside_the_warmup_counts():
    recipe = Recipe(lr=1.0, warmup=10, milestones=(5,), gamma=0.1)
    assert [recipe.lr_at(4), recipe.lr_at(5), recipe.lr_at(10)] == pytest.approx([0.4, 0.05, 0.1])


def test_cosine_schedule_is_the_one_of_strs_code():
    """lr 0.256, 100 epochs: 0.256 (e + 1) / 5 in epochs 0-4, then 0.256 · ½ (1 + cos(π (e − 5) / 95))."""
    recipe = Recipe(lr=0.256, iterations=99 * 7 + 3, warmup=35, schedule="cosine", lr_every=7)  # the last one is short
    by_epoch = [0.256 * (e + 1) / 5 if e < 5 else 0.128 * (1 + math.cos(math.pi * (e - 5) / 95)) for e in range(100)]
    lrs = [recipe.lr_at(t) for t in range(recipe.iterations)]
    assert lrs == pytest.approx([lr for lr in by_epoch for _ in range(7)][: recipe.iterations], abs=1e-15)
    assert lrs[35] == 0.256
    assert lrs[-1] == pytest.approx(7.0e-5, rel=1e-3)


def test_the_first_step_of_a_warmup_changes_nothing(digits):
    model = lenet()
    before = M.state(model)
    fit(model, digits, dataclasses.replace(SHORT, warmup=10), stop=1)
    assert same(M.state(model), before)
    fit(model, digits, dataclasses.replace(SHORT, warmup=10), start=1, stop=2)
    assert not same(M.state(model), before)


# Readings -------------------------------------------------------------------------------------------------------------


def test_grid_of_readings():
    recipe = Recipe(iterations=50, eval_every=20, test_readings="all")
    assert recipe.readings() == ([20, 40, 50], {20, 40, 50})
    assert recipe.readings(start=20) == ([40, 50], {40, 50})
    assert recipe.readings(start=25) == ([40, 50], {40, 50})
    assert recipe.readings(stop=40) == ([20, 40], {20, 40})
    assert recipe.readings(stop=19) == ([19], {19})
    assert recipe.readings(start=41, stop=45) == ([45], {45})


def test_log_readings_are_about_20_of_all_first_and_last_included():
    steps, test = Recipe().readings()
    assert steps == list(range(100, 50_001, 100))
    assert test <= set(steps)
    assert {100, 50_000} <= test
    assert 15 <= len(test) <= 20
    spread = sorted(test)
    assert all(b / a < 2.1 for a, b in pairwise(spread))
    assert Recipe(iterations=300).readings()[1] == {100, 200, 300}


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 35), (20, None), (25, 55)])
def test_history_follows_the_grid(digits, start, stop):
    recipe = dataclasses.replace(SHORT, test_readings="log", eval_every=1)
    history = fit(lenet(), digits, recipe, start=start, stop=stop)
    steps, test = recipe.readings(start, stop)
    assert history.step == steps
    assert steps[0] == start + 1
    assert steps[-1] == history.last.step == (stop or recipe.iterations)
    assert [not math.isnan(a) for a in history.test_acc] == [t in test for t in steps]
    assert len(history.val_loss) == len(history.val_acc) == len(steps)
    assert history.status == "finished"


def test_training_losses_are_kept_at_fixed_iterations(digits):
    history = fit(lenet(), digits, SHORT)
    assert list(history.train_loss) == [1, 2, 5, 10, 50]
    model = lenet()
    x, y = Batches(digits, SHORT, 0, next(model.parameters()))(0)
    with torch.no_grad():
        assert history.train_loss[1] == pytest.approx(float(nn.functional.cross_entropy(model(x), y)), abs=1e-6)


def test_last_reading_by_brute_force(digits):
    model = lenet(density=0.3)
    history = fit(model, digits, SHORT)
    plain = M.bake(copy.deepcopy(model)).eval()

    def one_by_one(split):
        right, loss = [], 0.0
        for x, y in zip(split.x, split.y, strict=True):
            logits = plain(x[None].float() / 255)[0].double()
            right.append(int(logits.argmax()) == int(y))
            loss += float(torch.logsumexp(logits, 0) - logits[y])
        return np.array(right), loss / len(right)

    with torch.no_grad():
        correct, test_loss = one_by_one(digits.test)
        val_correct, val_loss = one_by_one(digits.valid)
        train_correct, _ = one_by_one(digits.train)
    last = history.last
    assert last.correct.dtype == bool
    assert np.array_equal(last.correct, correct)
    assert last.test_acc == pytest.approx(correct.mean(), abs=1e-12)
    assert last.val_acc == pytest.approx(val_correct.mean(), abs=1e-12)
    assert last.train_acc == pytest.approx(train_correct.mean(), abs=1e-12)
    assert last.val_loss == pytest.approx(val_loss, abs=1e-5)
    assert (history.val_acc[-1], history.test_acc[-1]) == (last.val_acc, last.test_acc)
    assert history.test_loss[-1] == pytest.approx(test_loss, abs=1e-5)


def test_batch_loss_is_the_mean_since_the_test_set_was_last_read(digits):
    recipe = dataclasses.replace(SHORT, optimizer="sgd", lr=1e-30, iterations=50, eval_every=1, test_readings="log")
    history = fit(model := lenet(), digits, recipe, start=3)
    batch = Batches(digits, recipe, 0, next(model.parameters()))
    with torch.no_grad():
        each = {t + 1: float(nn.functional.cross_entropy(model(x), y)) for t in range(50) for x, y in [batch(t)]}
    read = sorted(recipe.readings(3)[1])
    for since, step in pairwise([3, *read]):
        assert history.batch_loss[step - 4] == pytest.approx(np.mean([each[t] for t in range(since + 1, step + 1)]))
    assert [t for t, loss in zip(history.step, history.batch_loss, strict=True) if not math.isnan(loss)] == read


def test_early_stop_is_the_first_minimum_and_its_reading_is_that_of_that_iteration(digits):
    recipe = Recipe(iterations=150, eval_every=10, lr=2e-2, test_readings="all")
    history = fit(model := lenet(density=0.5), digits, recipe)
    i = int(np.argmin(history.val_loss))  # numpy's argmin is the first one
    early = history.early_stop
    assert 0 < i < len(history.step) - 1, "no minimum in the middle: the test would be empty"
    assert (early.step, early.val_loss) == (history.step[i], history.val_loss[i])
    assert (early.val_acc, early.test_acc) == (history.val_acc[i], history.test_acc[i])
    assert not history.censored

    copy_of = lenet(density=0.5)
    again = fit(copy_of, digits, recipe, stop=early.step).last
    assert again.step == early.step
    for name in ("val_loss", "val_acc", "test_acc", "train_acc"):
        assert getattr(again, name) == getattr(early, name)
    assert np.array_equal(again.correct, early.correct)
    assert not same(M.state(model), M.state(copy_of)), "the model must end with its last weights, not its best"


def test_of_equal_minima_the_first_is_the_early_stop(digits):
    history = fit(lenet(), digits, dataclasses.replace(SHORT, optimizer="sgd", lr=1e-30))
    assert len(set(history.val_loss)) == 1
    assert history.early_stop.step == 10
    assert not history.censored


def test_a_minimum_on_the_last_reading_is_censored(digits):
    assert fit(lenet(), digits, dataclasses.replace(SHORT, lr=1e-5)).censored


def test_reading_does_not_disturb_the_training(digits):
    often, once = lenet(), lenet()
    fit(often, digits, dataclasses.replace(SHORT, eval_every=1))
    fit(once, digits, dataclasses.replace(SHORT, eval_every=60))
    assert same(M.state(often), M.state(once))


@pytest.mark.parametrize("mode", [True, False])
def test_evaluate_leaves_mode_and_gradients(digits, mode):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)).train(mode)
    before = copy.deepcopy(model.state_dict())
    normalise = normaliser(digits, SHORT, next(model.parameters()))
    loss, correct = training.evaluate(model, digits.valid, normalise)
    assert all(module.training is mode for module in model.modules())
    assert same(dict(model.state_dict()), dict(before))
    assert all(p.grad is None for p in model.parameters())
    assert correct.shape == (297,)
    assert correct.dtype == torch.bool
    in_parts = training.evaluate(model, digits.valid, normalise, batch_size=7)
    assert in_parts[0] == pytest.approx(loss, rel=1e-5)
    assert torch.equal(in_parts[1], correct)


def test_batch_norm_trains_in_training_mode_and_is_read_in_eval_mode(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    recipe = dataclasses.replace(SHORT, eval_every=30)
    history = fit(model, digits, recipe)
    assert model[2].num_batches_tracked == 60
    model.eval()
    normalise = normaliser(digits, recipe, next(model.parameters()))
    assert training.evaluate(model, digits.valid, normalise)[0] == history.last.val_loss


# Data order -----------------------------------------------------------------------------------------------------------


def test_every_epoch_is_another_permutation_and_its_incomplete_batch_is_dropped():
    batch = Batches(numbered(130), Recipe(batch_size=40), seed=5, like=torch.zeros(1))
    epochs = [[numbers(batch, 3 * e + i) for i in range(3)] for e in range(4)]
    assert batch.per_epoch == 3
    flat = [[i for one in epoch for i in one] for epoch in epochs]
    for epoch in flat:
        assert len(epoch) == len(set(epoch)) == 120
        assert set(epoch) <= set(range(130))
    assert len({tuple(epoch) for epoch in flat}) == 4
    assert len({frozenset(epoch) for epoch in flat}) > 1, "the same ten images are dropped in every epoch"


def test_augmentation_is_fresh_in_every_epoch_and_leaves_the_order():
    """Iteration t's images are those without augmentation, each moved by (seed, epoch), whatever is asked for first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 256, (90, 1, 16, 16), generator=generator).to(torch.uint8)
    split = data.Split(x, torch.arange(90) % 10)
    images = data.Data("noise", split, split, split, "f", 10, mean=(0.5,), std=(0.25,))
    recipe, like = Recipe(batch_size=30), torch.zeros(1, dtype=torch.float64)
    plain = Batches(images, recipe, 5, like)
    recipe = dataclasses.replace(recipe, augment="flip-crop", inputs="standard")
    moved = Batches(images, recipe, 5, like)
    batches = [moved(t) for t in range(6)]
    assert all(torch.equal(plain(t)[1], y) for t, (_, y) in enumerate(batches))
    for t in (5, 0, 3):
        assert torch.equal(Batches(images, recipe, 5, like)(t)[0], batches[t][0])
    assert not torch.equal(Batches(images, recipe, 6, like)(0)[0], batches[0][0])

    every = data.moves(1, 16, generator).new_tensor([[f, i, j] for f in (0, 1) for i in range(5) for j in range(5)])
    used = []
    for t, (batch, _) in enumerate(batches):
        grey = ((batch * 0.25 + 0.5) * 255).round().to(torch.uint8)  # black padding, not the mean
        for image, result in zip((plain(t)[0] * 255).round().to(torch.uint8), grey, strict=True):
            candidates = data.flip_crop(image.expand(50, 1, 16, 16), every)
            (i,) = (candidates == result).flatten(1).all(1).nonzero().flatten().tolist()
            used.append(i)
    assert used[:90] != used[90:]
    assert len(set(used)) > 40


def test_order_depends_on_the_seed_alone():
    images, recipe = numbered(130), Recipe(batch_size=40)
    one = Batches(images, recipe, 5, torch.zeros(1))
    forward = [numbers(one, t) for t in range(9)]
    torch.manual_seed(1)
    other = Batches(images, dataclasses.replace(recipe, lr=0.5, iterations=7), 5, torch.zeros(1, dtype=torch.float64))
    assert [numbers(other, t) for t in reversed(range(9))] == forward[::-1]
    assert [numbers(Batches(images, recipe, 6, torch.zeros(1)), t) for t in range(9)] != forward


def test_a_long_seed_is_fine():
    assert numbers(Batches(numbered(50), Recipe(batch_size=40), 2**60 - 1, torch.zeros(1)), 10_000)


def test_start_continues_at_schedule_and_data_position(digits):
    recipe = dataclasses.replace(SHORT, optimizer="sgd", lr=0.1, milestones=(40,), warmup=30)  # no optimiser state
    whole, parts = lenet(), lenet()
    fit(whole, digits, recipe, seed=2)
    fit(parts, digits, recipe, seed=2, stop=25)
    history = fit(parts, digits, recipe, seed=2, start=25)
    assert same(M.state(whole), M.state(parts))
    assert history.step == [30, 40, 50, 60]


def test_inputs_unit_and_standard(digits):
    like = torch.zeros(1, dtype=torch.float64)
    unit = normaliser(digits, Recipe(), like)(digits.train.x)
    torch.testing.assert_close(unit, digits.train.x.double() / 255)
    assert unit.dtype == torch.float64
    both = torch.cat([digits.train.x, digits.valid.x])
    standard = normaliser(digits, Recipe(inputs="standard"), like)(both)
    assert float(standard.mean()) == pytest.approx(0, abs=1e-9)
    assert float(standard.std(correction=0)) == pytest.approx(1, abs=1e-9)


def test_normalising_leaves_the_stored_images(digits):
    before = digits.train.x.clone()
    fit(lenet(), digits, dataclasses.replace(SHORT, inputs="standard"), stop=5)
    assert torch.equal(digits.train.x, before)


# Precision ------------------------------------------------------------------------------------------------------------


def test_bfloat16_computes_under_autocast_and_keeps_float32_weights(digits):
    recipe = dataclasses.replace(SHORT, optimizer="sgd", lr=0.1, precision="bfloat16")
    model, by_hand, exact = lenet(), lenet(), lenet()
    history = fit(model, digits, recipe)
    batch, opt = Batches(digits, recipe, 0, torch.zeros(1)), torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for t in range(60):
        x, y = batch(t)
        with torch.autocast("cpu", torch.bfloat16):
            logits = by_hand(x)
        opt.zero_grad()
        nn.functional.cross_entropy(logits.float(), y).backward()
        opt.step()
    assert same(M.state(model), M.state(by_hand))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert training.evaluate(by_hand, digits.valid, batch.normalise)[0] == history.last.val_loss
    fit(exact, digits, dataclasses.replace(recipe, precision="float32"))
    assert not same(M.state(model), M.state(exact))
    assert history.last.test_acc > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_summed_in_float32(dtype):
    """In their own precision a sum stands still where it is 256 or 2,048 times what is added, or overflows."""
    x = torch.randn(6_000, 8, generator=torch.Generator().manual_seed(0))
    own = data.from_tensors(x, torch.arange(6_000) % 3, valid=3_000, test=0)
    net = nn.Sequential(nn.Linear(8, 3)).to(dtype)
    recipe = Recipe("sgd", lr=1e-6, batch_size=10, iterations=600, eval_every=600)
    history = fit(net, own, recipe)
    exact = training.evaluate(net.float(), own.valid, normaliser(own, recipe, torch.zeros(1)))[0]
    assert history.val_loss == pytest.approx([exact], rel=1e-2)
    train = training.evaluate(net, own.train, normaliser(own, recipe, torch.zeros(1)))[0]
    assert history.batch_loss == pytest.approx([train], rel=5e-2)


# Masks, determinism, failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("options", [{}, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}])
def test_pruned_weights_are_exactly_zero_at_the_end(digits, options, by_hand):
    model, recipe = lenet(density=0.2), dataclasses.replace(SHORT, weight_decay=0.05, **options)
    masks, behind = M.read(model), M.state(model)
    fit(model, digits, recipe, opt=None if by_hand else training.optimizer(model, recipe))
    for name, layer in M.prunable(model).items():
        assert not layer.weight[~masks[name]].any()
        assert layer.weight[masks[name]].all()
        moved = M.state(model)[f"{name}.weight"] != behind[f"{name}.weight"]
        assert not moved[~masks[name]].any()
        assert moved[masks[name]].all()
    assert M.density(model) == pytest.approx(0.2, abs=1e-4)
    assert all(torch.equal(m, masks[name]) for name, m in M.read(model).items())


def test_momentum_of_earlier_training_cannot_bring_weights_back(digits):
    model = lenet()
    recipe = dataclasses.replace(SHORT, optimizer="sgd", lr=0.1, momentum=0.9)
    fit(model, digits, recipe)
    masks = lth.prune(model, 0.9)
    fit(M.attach(model, masks), digits, recipe)
    assert all(not layer.weight[~masks[name]].any() for name, layer in M.prunable(model).items())


def test_same_seed_same_training_whatever_torchs_random_state(digits):
    first, second, third = lenet(), lenet(), lenet()
    torch.manual_seed(0)
    one = fit(first, digits, SHORT, seed=4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    two = fit(second, digits, SHORT, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(M.state(first), M.state(second))
    assert one.val_loss == two.val_loss
    assert np.array_equal(one.last.correct, two.last.correct)
    fit(third, digits, SHORT, seed=5)
    assert not same(M.state(first), M.state(third))


def test_a_diverged_training_ends_with_its_status(digits):
    history = fit(lenet(), digits, dataclasses.replace(SHORT, optimizer="sgd", lr=1e30))
    assert history.status == "diverged"
    assert history.early_stop is None
    assert history.last.step == 10
    assert history.last.test_acc < 0.2
    assert not history.censored


def test_a_training_that_diverges_late_keeps_its_early_stop(digits):
    recipe = dataclasses.replace(SHORT, optimizer="sgd", lr=0.1, milestones=(35,), gamma=1e35)
    history = fit(lenet(), digits, recipe)
    assert history.status == "diverged"
    assert history.step == [10, 20, 30]
    assert history.early_stop.step in history.step
    assert math.isfinite(history.early_stop.val_loss)
    assert history.early_stop.test_acc > 0.3


def test_a_gate_that_is_no_number_at_a_reading_is_divergence(digits):
    """The loss of the first minibatch is finite, its gradient is not."""
    method, model = cs.CS(schedule="iteration"), models.create("lenet_300_100", in_shape=(1, 8, 8))
    method.attach(model)
    history = fit(
        model, digits, dataclasses.replace(SHORT, eval_every=1), method=method,
        loss=lambda logits, y: F.cross_entropy(logits, y) + (0 * logits.sum()).sqrt(),
    )  # fmt: skip
    assert history.status == "diverged"
    assert history.step == [1]


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("valid", [None, 0])
def test_divergence_on_the_last_step_is_divergence(valid, density):
    """The loss of the last minibatch is finite; the weights after its step are not."""
    recipe = Recipe(optimizer="sgd", lr=0.1, iterations=10, eval_every=10, milestones=(9,), gamma=1e35)
    history = fit(lenet(density=density), data.load("digits", valid=valid), recipe)
    assert history.status == "diverged"
    assert math.isfinite(history.train_loss[10])
    assert history.early_stop is None
    assert history.last.test_acc < 0.2


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_without_validation_set_there_is_no_early_stop(density):
    history = fit(lenet(density=density), data.load("digits", valid=0), SHORT)
    assert (history.status, history.early_stop, history.censored) == ("finished", None, False)
    assert all(math.isnan(loss) for loss in history.val_loss)
    assert history.last.test_acc > 0.5


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("lr", [0.1, 1e30])
def test_fit_leaves_the_models_mode(digits, mode, lr):
    model = lenet().train(mode)
    fit(model, digits, Recipe(optimizer="sgd", lr=lr, iterations=20, eval_every=10))
    assert all(module.training is mode for module in model.modules())


def test_a_parameter_in_no_group_raises(digits):
    model = lenet()
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    text = "No parameter group holds fc1.bias, fc2.bias, fc3.bias: build the groups after attaching the method."
    with pytest.raises(ValueError, match=message(text)):
        training.optimizer(model, SHORT, [{"params": weights}])


def test_frozen_parameters_need_no_group_and_stay(digits):
    model = lenet()
    model.fc1.bias.requires_grad_(False)
    before = M.state(model)
    fit(model, digits, SHORT)
    after = M.state(model)
    assert torch.equal(before["fc1.bias"], after["fc1.bias"])
    assert not torch.equal(before["fc2.bias"], after["fc2.bias"])


def test_groups_may_differ_in_weight_decay(digits):
    """Two groups with the recipe's decay do what one does; no decay does not."""
    recipe = dataclasses.replace(SHORT, weight_decay=0.1)

    def trained(decay):
        model = lenet()
        p = list(model.parameters())
        groups = [{"params": p[:2], "weight_decay": decay}, {"params": p[2:], "weight_decay": 0.1}]
        fit(model, digits, recipe, opt=training.optimizer(model, recipe, groups))
        return M.state(model)

    one = lenet()
    fit(one, digits, recipe, opt=training.optimizer(one, recipe))
    assert same(trained(0.1), M.state(one))
    assert not same(trained(0.0), M.state(one))


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (60, None), (10, 10), (20, 10), (0, 61)])
def test_start_and_stop_out_of_order(digits, start, stop):
    with pytest.raises(ValueError, match=r"^Invalid start -?\d+, stop \d+: need 0 <= start < stop <= 60\.$"):
        fit(lenet(), digits, SHORT, start=start, stop=stop)


def test_a_batch_larger_than_the_training_set(digits):
    with pytest.raises(ValueError, match=message("Invalid batch_size 1051: the training set has 1050 images.")):
        fit(lenet(), digits, dataclasses.replace(SHORT, batch_size=1051))


@pytest.mark.parametrize(
    ("field", "values", "rule"),
    [
        ("optimizer", ["sdg", None], "give 'adam' or 'sgd'"),
        ("lr", [0, -0.1, math.nan, math.inf, "0.1"], "give a learning rate above 0"),
        ("test_readings", ["some"], "give 'all' or 'log'"),
        ("inputs", ["raw"], "give 'unit' or 'standard'"),
        ("augment", ["flip", True], "give 'none' or 'flip-crop'"),
        ("precision", ["bf16", torch.bfloat16], "give 'float32' or 'bfloat16'"),
        ("schedule", ["linear"], "give 'step' or 'cosine'"),
        ("label_smoothing", [1.0, -0.1, math.nan], "give 0 <= label_smoothing < 1"),
        ("lr_every", [0, 1.5], "give a whole number from 1"),
        ("nesterov", [1, None], "give True or False"),
        ("nesterov", [True], "it needs SGD with momentum"),
        ("batch_size", [0, -60, 60.0, None], "give a whole number from 1"),
        ("iterations", [0, 1e3, True], "give a whole number from 1"),
        ("eval_every", [0, 0.5], "give a whole number from 1"),
        ("momentum", [-0.1, 1.0, math.nan], "give 0 <= momentum < 1"),
        ("weight_decay", [-1e-4, math.nan], "give a number from 0"),
        ("gamma", [0.0, -0.1, math.nan], "give a factor above 0"),
        ("warmup", [-1, 2.5, "a"], "give a whole number of iterations from 0"),
        ("milestones", [(20, 10), [10], (10.0,), 5], "give a tuple of iterations in increasing order"),
    ],
)
def test_bad_recipes_are_told_in_one_line(field, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"^{re.escape(f'Invalid {field} {value!r}: {rule}.')}$"):
            Recipe(**{field: value})


def test_a_cosine_schedule_has_no_milestones_and_warms_up_in_whole_blocks():
    with pytest.raises(ValueError, match=message("Invalid milestones (5,): the cosine schedule has none.")):
        Recipe(schedule="cosine", milestones=(5,))
    for warmup in (5, 50_000):
        text = f"Invalid warmup {warmup}: give a multiple of lr_every = 10 below iterations."
        with pytest.raises(ValueError, match=message(text)):
            Recipe(schedule="cosine", warmup=warmup, lr_every=10)


def test_the_papers_recipe_is_the_default():
    """Figure 2: Adam at 1.2e-3, minibatches of 60, 50,000 iterations; validated every 100 iterations."""
    recipe = Recipe()
    assert (recipe.optimizer, recipe.lr, recipe.batch_size, recipe.iterations) == ("adam", 1.2e-3, 60, 50_000)
    assert (recipe.eval_every, recipe.weight_decay, recipe.milestones, recipe.warmup) == (100, 0, (), 0)


# take -----------------------------------------------------------------------------------------------------------------


def test_take_is_a_prefix_of_the_shuffled_training_set(digits):
    tenth = take(digits, 0.1)
    assert torch.equal(tenth.train.x, digits.train.x[:105])
    assert torch.equal(tenth.train.y, digits.train.y[:105])
    assert tenth.valid is digits.valid
    assert tenth.test is digits.test
    assert tenth.fingerprint == digits.fingerprint
    assert len(take(digits, 1.0).train) == 1050
    assert len(take(digits, 1e-9).train) == 1


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, math.nan])
def test_take_refuses_what_is_no_share(digits, fraction):
    with pytest.raises(ValueError, match=message(f"Invalid train_fraction {fraction}: give a share")):
        take(digits, fraction)


# What is trained, and what is left as it was -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (1, 8, 9)])
def test_images_that_the_network_does_not_take_are_refused_as_it_refuses_them(digits, shape):
    for masked in (False, True):
        model = models.create("lenet_300_100", seed=0, in_shape=shape)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fit(M.attach(model) if masked else model, digits, SHORT)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), digits, SHORT)
    with pytest.raises(ValueError, match="cannot be trained together"):
        fit([models.create("lenet_300_100", seed=s, in_shape=shape) for s in (0, 1)], digits, SHORT, seed=[0, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_diverges_also_on_a_pixel_that_is_always_black(digits, value):
    model = lenet()
    assert not any(getattr(digits, part).x[:, 0, 0, 0].any() for part in ("train", "valid", "test"))
    with torch.no_grad():
        M.original(model.fc1)[5, 0] = value
    assert model(torch.zeros(1, 1, 8, 8)).isnan().any()
    assert fit(model, digits, SHORT).status == "diverged"


def with_norm(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 10)
    ).to(dtype)  # fmt: skip


@pytest.mark.parametrize("frozen", [(), (1,), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_modules_in_evaluation_mode_stay_in_it(digits, frozen):
    model = with_norm()
    for i in frozen:
        model[i].eval()
    modes, mean = [m.training for m in model.modules()], model[1].running_mean.clone()
    training.evaluate(model, digits.test, normaliser(digits, SHORT, torch.zeros(1)))
    assert [m.training for m in model.modules()] == modes
    fit(model, digits, dataclasses.replace(SHORT, iterations=3))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[1].running_mean, mean) == (1 in frozen)


def test_a_model_that_comes_in_evaluation_mode_is_trained_in_training_mode(digits):
    a, b = with_norm(), with_norm().eval()
    for model in (a, b):
        torch.manual_seed(1)
        fit(model, digits, dataclasses.replace(SHORT, iterations=3))
    assert same(M.state(a), M.state(b))
    assert not any(m.training for m in b.modules())


def test_a_failing_evaluation_leaves_the_modes(digits):
    model = with_norm()
    model[1].eval()
    with pytest.raises(RuntimeError):
        training.evaluate(model, dataclasses.replace(digits.test, x=digits.test.x[..., :3]), lambda x: x / 1.0)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True, True]


@pytest.mark.parametrize("method", [cs.CS(0.0), soft_threshold.STR(-5.0)])
def test_frozen_weights_under_a_method_leave_its_own_parameters_to_train(digits, method):
    model = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)).requires_grad_(False)
    method.attach(model)
    before = M.state(model)
    fit(model, digits, Recipe("sgd", lr=0.5, momentum=0.9, batch_size=60, iterations=30, eval_every=30), method=method)
    moved = {name for name, t in M.state(model).items() if not torch.equal(t, before[name])}
    assert {name.rsplit(".", 1)[1] for name in moved} <= {"s", "beta"}
    assert {f"fc{i}.weight.s" for i in (1, 2, 3)} <= moved


@pytest.mark.parametrize("model", [nn.Flatten(), nn.BatchNorm2d(1, affine=False), lenet().requires_grad_(False)])
def test_nothing_to_train(digits, model):
    with pytest.raises(ValueError, match=r"^Nothing to train: no parameter of the model requires a gradient\.$"):
        fit(model, digits, SHORT)
    with pytest.raises(ValueError, match=r"^Nothing to train"):
        training.optimizer(model, SHORT)


def test_a_model_without_parameters_can_be_read(digits):
    loss, correct = training.evaluate(nn.Flatten(), digits.test, lambda x: x / 255)
    assert loss == pytest.approx(F.cross_entropy(digits.test.x.flatten(1) / 255, digits.test.y).item(), rel=1e-5)
    assert len(correct) == 450


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, {"lr": 0.01}])
@pytest.mark.parametrize("general", [False, True])
def test_what_lies_behind_a_mask_stays_under_weight_decay(digits, optimizer, general):
    recipe = Recipe(iterations=20, eval_every=20, weight_decay=0.1, **optimizer)
    model = lenet(density=0.4)
    before, masks = M.state(model), M.read(model)
    fit(model, digits, recipe, opt=training.optimizer(model, recipe) if general else None)
    for name, mask in masks.items():
        after = M.state(model)[f"{name}.weight"]
        assert torch.equal(after[~mask], before[f"{name}.weight"][~mask])
        assert (after[mask] != before[f"{name}.weight"][mask]).all()


# Readings are of the plain loss on the plain images -------------------------------------------------------------------


@pytest.mark.parametrize("general", [False, True])
def test_losses_that_are_read_are_not_smoothed(digits, general):
    model = small() if general else lenet()
    recipe = dataclasses.replace(SHORT, label_smoothing=0.4)
    history = fit(model, digits, recipe)
    with torch.no_grad():
        for split, loss in ((digits.valid, history.val_loss[-1]), (digits.train, history.last.train_loss)):
            x = normaliser(digits, recipe, next(model.parameters()))(split.x)
            assert loss == pytest.approx(F.cross_entropy(model(x), split.y).item(), rel=1e-4)
            assert F.cross_entropy(model(x), split.y, label_smoothing=0.4).item() > 1.02 * loss


def test_images_that_are_read_are_not_moved(digits):
    recipe = dataclasses.replace(SHORT, augment="flip-crop", iterations=10)
    model = small()
    history = fit(model, digits, recipe, seed=5)
    with torch.no_grad():
        for split, accuracy in ((digits.valid, history.val_acc[-1]), (digits.train, history.last.train_acc)):
            logits = model(split.x.double() / 255)
            assert accuracy == (logits.argmax(1) == split.y).sum().item() / len(split)
            if split is digits.valid:
                assert history.val_loss[-1] == pytest.approx(F.cross_entropy(logits, split.y).item(), rel=1e-9)


def test_a_method_that_lets_pruned_weights_come_back_is_caught(digits):
    @dataclasses.dataclass(frozen=True)
    class Leaky(Method):
        def before_step(self, t, step):
            if t == 3:
                step.model[1].parametrizations.weight[0].mask.fill_(1)

    model = small(masked=True)
    with pytest.raises(AssertionError, match="Pruned weights of layer '1' came back"):
        fit(model, digits, SHORT, method=Leaky())


def test_a_loss_of_ones_own():
    """Twice the cross-entropy at half the rate is the same training, in the general way of a hand-written network."""
    digits = data.load("digits")
    recipe = Recipe(optimizer="sgd", lr=0.1, batch_size=30, iterations=20, eval_every=20)
    half = dataclasses.replace(recipe, lr=0.05)
    nets = [lenet().double() for _ in range(2)]
    fit(nets[0], digits, recipe)
    history = fit(nets[1], digits, half, loss=lambda logits, y: 2 * F.cross_entropy(logits, y))
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert history.train_loss[1] > 4  # what is minimised; readings are the cross-entropy
    assert history.last.train_loss < 3


@pytest.mark.parametrize("params", [lambda net: net.parameters(), lambda net: iter(list(net.parameters()))])
def test_the_parameters_of_a_group_may_be_a_generator(params):
    net = nn.Linear(4, 2)
    opt = training.optimizer(net, dataclasses.replace(SHORT, optimizer="sgd"), [{"params": params(net)}])
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    own = nn.Linear(4, 2, bias=False)
    opt = training.optimizer(own, dataclasses.replace(SHORT, optimizer="sgd"), [{"params": own.weight}])
    assert opt.param_groups[0]["params"][0] is own.weight


def test_a_seed_may_be_numpys(digits):
    def order(seed):
        return Batches(digits, SHORT, seed, torch.zeros(1))(20)[1]

    assert torch.equal(order(np.int64(2**40)), order(2**40))


# What is refused before the first update ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "seed", "text"),
    [
        ([], [], "Invalid model: the list is empty; give at least one."),
        ([0, 1], 0, "Invalid seed 0: give a list of 2 seeds, one for each model."),
        ([0, 1], [0], "Invalid seed [0]: give a list of 2 seeds, one for each model."),
        ([0, 1], 0.5, "Invalid seed 0.5: give a list of 2 seeds, one for each model."),
        ([0, 1], [0, "a"], "Invalid seed 'a': give a whole number of at most 64 bits."),
        (0, 0.5, "Invalid seed 0.5: give a whole number of at most 64 bits."),
        (0, [0], "Invalid seed [0]: give a whole number of at most 64 bits."),
        (0, True, "Invalid seed True: give a whole number of at most 64 bits."),
        (0, 2**63, f"Invalid seed {2**63}: give a whole number of at most 64 bits."),
    ],
)
def test_bad_seeds(digits, model, seed, text):
    model = [lenet(s) for s in model] if isinstance(model, list) else lenet()
    with pytest.raises(ValueError, match=message(text)):
        fit(model, digits, SHORT, seed=seed)


@pytest.mark.parametrize("general", [False, True])
def test_labels_beyond_the_outputs(digits, general):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh() if general else nn.ReLU(), nn.Linear(8, 9))
    before = M.state(model)
    with pytest.raises(ValueError, match=message("The model gives 9 outputs, labels reach 9: it needs 10.")):
        fit(model, digits, SHORT)
    assert same(before, M.state(model))


def test_tensors_without_shape_or_values(digits):
    with pytest.raises(ValueError, match=message("Invalid model: 'fc1.weight' is on the meta device, without values;")):
        fit(models.create("lenet_300_100", in_shape=(1, 8, 8)).to("meta"), digits, SHORT)
    with pytest.raises(ValueError, match=message("Invalid model: '1.weight' is lazy, without a shape; run one batch")):
        fit(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), digits, SHORT)


def test_training_within_no_grad(digits):
    a, b = small(), small()
    fit(a, digits, SHORT)
    with torch.no_grad():
        fit(b, digits, SHORT)
        assert not torch.is_grad_enabled()
    assert same(M.state(a), M.state(b))


def test_a_minibatch_of_one_example_and_batch_norm(digits):
    """Batch norm over pixels can be trained on one image, so can one that is frozen; what never comes is no matter."""
    one = dataclasses.replace(digits, train=data.Split(digits.train.x[:31], digits.train.y[:31]))
    keep = Recipe(batch_size=10, iterations=4, eval_every=4, last_batch="keep")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    before, rng = M.state(flat), torch.get_rng_state()
    text = (
        "Invalid batch_size 10: of 31 examples it leaves one alone, on which batch norm cannot be trained (Expected mo"
    )
    with pytest.raises(ValueError, match=message(text)):
        fit(flat, one, keep)
    with pytest.raises(
        ValueError, match=message("Invalid batch_size 1: of 31 examples it leaves one alone, on which ")
    ):
        fit(flat, one, dataclasses.replace(keep, batch_size=1))
    assert same(before, M.state(flat))
    assert torch.equal(rng, torch.get_rng_state())
    fit(flat, one, keep, stop=3)
    fit(flat, one, dataclasses.replace(keep, last_batch="drop"))
    fit(with_norm(), one, keep)
    flat[2].eval()
    fit(flat, one, keep)


# What is left, whatever ends a training -------------------------------------------------------------------------------


def test_an_interrupted_training_leaves_modes_and_what_lies_behind_masks(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    M.attach(model, lth.prune(model, 0.5)).eval()
    before, steps = {name: M.original(layer).detach().clone() for name, layer in M.prunable(model).items()}, []

    def loss(logits, y):
        steps.append(y)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return torch.nn.functional.cross_entropy(logits, y)

    with pytest.raises(KeyboardInterrupt) as kept:  # and with it the frames of `fit`
        fit(model, digits, dataclasses.replace(SHORT, weight_decay=0.1), loss=loss)
    assert kept.value.__traceback__
    assert not any(module.training for module in model.modules())
    for name, mask in M.read(model).items():
        assert torch.equal(M.original(M.prunable(model)[name]).detach()[~mask], before[name][~mask])
        assert not torch.equal(M.original(M.prunable(model)[name]).detach(), before[name])


def test_a_buffer_that_is_an_expanded_view_can_be_put_back(digits):
    a, b = small(), small()
    a.register_buffer("scale", torch.ones(1, 1).expand(4, 8))
    history, plain = fit(a, digits, SHORT), fit(b, digits, SHORT)
    assert history.early_stop.val_loss == plain.early_stop.val_loss
    assert same(M.state(a), {**M.state(b), "scale": torch.ones(4, 8)})


@pytest.mark.parametrize("masked", [False, True])
def test_a_parameter_that_is_an_expanded_view_trains_as_one_of_its_own(digits, masked):
    a = M.bake(small())
    with torch.no_grad():
        a[1].weight.copy_(a[1].weight[:1].clone())
    b = copy.deepcopy(a)
    b[1].weight = nn.Parameter(a[1].weight[:1].detach().clone().expand(12, 64))
    for net in (a, b):
        if masked:
            M.attach(net, lth.prune(net, 0.5))
        fit(net, digits, dataclasses.replace(SHORT, optimizer="sgd", momentum=0.9))
    assert same(M.state(a), M.state(b))


class Giving(nn.Module):
    """A network that gives what a function makes of its logits."""

    def __init__(self, f):
        super().__init__()
        self.net, self.f = small(), f

    def forward(self, x):
        return self.f(self.net(x))


@pytest.mark.parametrize(
    ("f", "found"),
    [
        (lambda z: (z, z), "tuple"),
        (lambda z: {"logits": z}, "dict"),
        (lambda z: None, "NoneType"),
        (lambda z: z[:, 0], "torch.float64 of shape (60,)"),
        (lambda z: z[:-1], "torch.float64 of shape (59, 10)"),
        (lambda z: z[:, :, None], "torch.float64 of shape (60, 10, 1)"),
        (lambda z: z.argmax(1, keepdim=True), "torch.int64 of shape (60, 1)"),
    ],
)
def test_a_model_that_gives_no_logits_is_refused_before_the_first_update(digits, f, found):
    model = Giving(f)
    before = M.state(model)
    text = f"The model gives {found} for 60 examples: it has to give logits [60, classes], or give a loss of your own."
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        fit(model, digits, SHORT)
    assert same(M.state(model), before)
    with pytest.raises(ValueError, match=r"^The model gives .* for 60 examples"):
        training.evaluate(model, digits.test, normaliser(digits, SHORT, torch.zeros(1).double()), batch_size=60)


@pytest.mark.parametrize(
    "loss", [lambda z, y: F.cross_entropy(z, y, reduction="none"), lambda z, y: 1.0, lambda z, y: z.detach().sum()]
)
def test_a_loss_is_one_number_with_a_gradient(digits, loss):
    with pytest.raises(ValueError, match=r"^Invalid loss: it has to be one number, a tensor with a gradient"):
        fit(small(), digits, SHORT, loss=loss)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"data": (1, 2)}, "Invalid data of type tuple: give a lottery.data.Data."),
        ({"recipe": {}}, "Invalid recipe of type dict: give a lottery.training.Recipe."),
        ({"method": cs.CS}, "Invalid method of type type: give a lottery.methods.Method."),
        ({"method": "cs"}, "Invalid method of type str: give a lottery.methods.Method."),
        ({"loss": "mse"}, "Invalid loss 'mse': give a function of logits and labels, or None."),
        ({"start": 1.5}, "Invalid start 1.5, stop 60: need 0 <= start < stop <= 60."),
        ({"stop": "9"}, "Invalid start 0, stop 9: need 0 <= start < stop <= 60."),
    ],
)
def test_arguments_of_another_kind_are_refused(digits, bad, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        fit(**{"model": small(), "data": digits, "recipe": SHORT, **bad})


def test_inference_mode_is_told_in_one_line(digits):
    """Unlike `torch.no_grad` it cannot be undone for what was made within."""
    net = M.bake(small())
    before = M.state(net)
    with torch.inference_mode():
        theirs = copy.deepcopy(net)
        for f in (lambda: fit(net, digits, SHORT), lambda: M.attach(net), lambda: grasp.ntk(net, digits.train.x[:2])):
            with pytest.raises(
                ValueError, match=r"^Nothing is trained, scored or attached within torch.inference_mode"
            ):
                f()
    for f in (lambda: fit(theirs, digits, SHORT), lambda: M.attach(theirs), lambda: cs.attach(theirs)):
        with pytest.raises(ValueError, match=r"^Invalid model: '.*' was made within torch.inference_mode; make"):
            f()
    assert same(M.state(net), before)
    assert lth.prune(theirs, 0.5).keys() == {"1", "3"}
