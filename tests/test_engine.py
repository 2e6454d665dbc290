"""The engine: what a run starts from, and what is kept of it."""

import concurrent.futures as futures
import hashlib
import json
import multiprocessing
import random
import re
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    DENSE,
    QUICK,
    STANDARD,
    child,
    equal,
    largest,
    message,
    seeds,
    theta_0,
    train,
)

from lottery import baselines, data, models, tickets, training
from lottery import grasp as grasp_algorithm
from lottery import lth as algorithm
from lottery import masks as M
from lottery.experiments import Run, Store, load, lth, store, work
from lottery.training import Recipe

# Engine: one small family of runs, trained once -----------------------------------------------------------------------


def family():
    """Every way to start a run, below one dense network on the digits."""
    rewind = {"init": "rewind", "rewind_to": 15}
    runs = {"dense": DENSE, "one": child(DENSE)}
    runs |= {"two": child(runs["one"])}
    runs |= {"three": child(runs["two"])}
    runs |= {"four": child(runs["three"])}
    runs |= {"reinit": child(runs["one"], init="reinit"), "reinit again": child(runs["one"], init="reinit", draw=1)}
    runs |= {"random": child(runs["one"], init="random"), "random again": child(runs["one"], init="random", draw=1)}
    runs |= {"continue": child(DENSE, init="continue"), "rewind": child(DENSE, **rewind)}
    runs |= {"restart": child(DENSE, **rewind, rewind_schedule="restart")}
    runs |= {"strategy 2": child(runs["continue"], init="reset"), "survivors": child(runs["one"], init="survivors")}
    runs |= {f"noise {c}": child(runs["one"], init="noise", noise=c) for c in (0.5, 3)}
    runs |= {"global": child(DENSE, scope="global", rate=0.6), "side": child(DENSE, rate=0.6, rate_output=0.3)}
    return runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    runs = family()
    order = train(list(runs.values())[::-1], folder)
    assert sorted(r.key for r in order) == sorted(r.key for r in runs.values())
    for r in order:
        assert r.parent is None or order.index(r.parent) < order.index(r), "a child was trained before its parent"
    return folder


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def start(trained, digits, name):
    """A run's network before its training, and the row of its training."""
    runs, opened = family(), Store(trained)
    model, _, hashes = work.initialise(runs[name], digits, opened)
    row = opened.get(runs[name])
    assert hashes.keys() == {"theta0", "parent_weights"}
    assert hashes.items() <= json.loads(row["certificate"]).items()
    return model, row


def end(trained, name):
    """Weights and masks at the end of a run's training, from its artifact."""
    from safetensors.torch import load_file

    tensors = load_file(Store(trained).artifact(family()[name].key))
    masks = {k.removeprefix("mask/"): t.bool() for k, t in tensors.items() if k.startswith("mask/")}
    return {k: t for k, t in tensors.items() if not k.startswith("mask/")}, masks


def stored_masks(trained, name):
    shapes = {"fc1": (300, 64), "fc2": (100, 300), "fc3": (10, 100)}
    masks = store.unpack_masks(Store(trained).get(family()[name]))
    return {layer: m.view(shapes[layer]) for layer, m in masks.items()}


def kept(masks):
    return [int(m.sum()) for m in masks.values()]


@pytest.mark.parametrize(
    ("parent", "name"),
    [
        *(("dense", "one"), ("one", "two"), ("two", "three"), ("one", "reinit"), ("continue", "strategy 2")),
        *(("one", "survivors"), ("one", "noise 3")),
    ],
)
def test_a_childs_mask_is_the_largest_of_the_parents_final_weights(trained, parent, name):
    weights, before = end(trained, parent)
    for layer, mask in stored_masks(trained, name).items():
        size = (weights[f"{layer}.weight"].abs() * before[layer]).flatten()
        assert torch.equal(mask.flatten(), largest(size, int(mask.sum())))
        assert not (mask & ~before[layer]).any(), "a pruned weight came back"


def test_exact_counts_of_every_layer(trained):
    """20 % of the survivors of fc1 and fc2, 10 % of fc3: 19,200, 30,000 and 1,000 weights on the digits."""
    counts = {name: kept(stored_masks(trained, name)) for name in family()}
    assert counts["dense"] == [19_200, 30_000, 1_000]
    assert counts["one"] == counts["continue"] == counts["rewind"] == counts["restart"] == [15_360, 24_000, 900]
    assert counts["two"] == counts["reinit"] == counts["reinit again"] == [12_288, 19_200, 810]
    assert counts["random"] == counts["random again"] == counts["two"]
    assert counts["three"] == [12_288 - 2_458, 15_360, 729]
    assert counts["four"] == [9_830 - 1_966, 12_288, 656]
    assert counts["side"] == [7_680, 12_000, 700]
    assert sum(counts["global"]) == 20_080
    assert counts["global"] != [7_680, 12_000, 400]
    for name, run in family().items():
        row = Store(trained).get(run)
        assert row["density"] == pytest.approx(sum(counts[name]) / 50_200, abs=1e-12)
        assert [k for k, _ in json.loads(row["layers"]).values()] == counts[name]
        assert [n for _, n in json.loads(row["layers"]).values()] == [19_200, 30_000, 1_000]


def test_global_scope_ranks_all_layers_together(trained):
    weights, _ = end(trained, "dense")
    size = torch.cat([weights[f"{layer}.weight"].abs().flatten() for layer in ("fc1", "fc2", "fc3")])
    mask = torch.cat([m.flatten() for m in stored_masks(trained, "global").values()])
    assert torch.equal(mask, largest(size, 20_080))


def test_masks_are_nested_along_the_chain(trained):
    chain = [stored_masks(trained, name) for name in ("dense", "one", "two", "three")]
    for before, after in pairwise(chain):
        assert all(not (after[layer] & ~before[layer]).any() for layer in before)


@pytest.mark.parametrize("name", ["dense", "one", "two", "three", "side", "global", "strategy 2"])
def test_reset_is_theta_0_bit_for_bit(trained, digits, name):
    model, row = start(trained, digits, name)
    assert equal(M.state(model), theta_0())
    dense = Store(trained).get(DENSE)
    assert json.loads(row["certificate"])["theta0"] == json.loads(dense["certificate"])["theta0"]
    masks = stored_masks(trained, name)
    for layer, module in M.prunable(model).items():
        assert torch.equal(module.weight, theta_0()[f"{layer}.weight"] * masks[layer])


def test_reinit_draws_fresh_values_for_every_surviving_weight(trained, digits):
    ticket, _ = start(trained, digits, "two")
    drawn = [start(trained, digits, name)[0] for name in ("reinit", "reinit again")]
    for one, other in ((ticket, drawn[0]), (ticket, drawn[1]), (drawn[0], drawn[1])):
        for layer in ("fc1", "fc2", "fc3"):
            mask = M.read(one)[layer]
            assert torch.equal(mask, M.read(other)[layer])
            a, b = (M.prunable(model)[layer].weight.detach()[mask] for model in (one, other))
            assert (a != b).float().mean() > 0.9999
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2
            assert float(b.std() / theta_0()[f"{layer}.weight"].std()) == pytest.approx(1, abs=0.1)
    rows = [Store(trained).get(family()[name]) for name in ("two", "reinit", "reinit again")]
    assert len({json.loads(row["certificate"])["theta0"] for row in rows}) == 3


def test_random_masks_keep_the_counts_of_each_layer_and_nothing_else(trained, digits):
    ticket = stored_masks(trained, "two")
    first, second = stored_masks(trained, "random"), stored_masks(trained, "random again")
    assert kept(first) == kept(second) == kept(ticket)
    for a, b in ((ticket, first), (ticket, second), (first, second)):
        for layer in ticket:
            n, both = a[layer].numel(), int((a[layer] & b[layer]).sum())
            expected = int(a[layer].sum()) ** 2 / n  # of independent masks
            assert abs(both - expected) < 5 * (n / 4) ** 0.5
    model, _ = start(trained, digits, "random")
    assert not equal(M.state(model), theta_0())
    assert equal(M.read(model), first)


def test_continue_goes_on_from_the_parents_final_weights(trained, digits):
    model, _ = start(trained, digits, "continue")
    assert equal(M.state(model), end(trained, "dense")[0])
    assert equal(M.read(model), stored_masks(trained, "one"))


def test_values_from_survivors_are_those_of_the_same_layers_ticket(trained, digits):
    model, _ = start(trained, digits, "survivors")
    assert equal(M.read(model), stored_masks(trained, "two"))
    for layer, mask in M.read(model).items():
        of_ticket = theta_0()[f"{layer}.weight"][mask]
        drawn = M.prunable(model)[layer].weight.detach()[mask]
        assert set(drawn.tolist()) <= set(of_ticket.tolist())
        assert (drawn != of_ticket).float().mean() > 0.99
        assert len(drawn.unique()) < len(of_ticket.unique())  # with replacement
        assert float(drawn.std()) == pytest.approx(float(of_ticket.std()), rel=0.1)
        assert abs(float(torch.corrcoef(torch.stack([drawn, of_ticket]))[0, 1])) < 0.2


@pytest.mark.parametrize("c", [0.5, 3])
def test_noise_has_its_size_in_every_layer_and_spares_the_biases(trained, digits, c):
    model, _ = start(trained, digits, f"noise {c}")
    before, after = theta_0(), M.state(model)
    assert equal(M.read(model), stored_masks(trained, "two"))
    for name, weight in before.items():
        if name.endswith("bias"):
            assert torch.equal(after[name], weight)
        else:
            noise = after[name] - weight
            assert float(noise.std() / weight.std()) == pytest.approx(c, rel=0.1)
            assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), weight.flatten()]))[0, 1])) < 0.15


def test_a_run_from_survivors_holds_how_its_dense_network_moved(trained):
    """Counted weight by weight, from the dense network's two ends and the mask of the ticket."""
    before, (after, _), masks = theta_0(), end(trained, "dense"), stored_masks(trained, "two")
    row = Store(trained).get(family()["survivors"])
    for quantity, layers in json.loads(row["moves"]).items():
        low, high, bins = tickets.MOVES[quantity]
        for layer, sides in layers.items():
            expected = {"in": [0] * bins, "out": [0] * bins}
            weights = zip(*(t[f"{layer}.weight"].flatten().double().tolist() for t in (before, after)), strict=True)
            for (a, b), kept in zip(weights, masks[layer].flatten().tolist(), strict=True):
                value = abs(b - a) if quantity == "distance" else abs(b) - abs(a)
                place = int((value - low) / (high - low) * bins)
                expected["in" if kept else "out"][min(max(place, 0), bins - 1)] += 1
            assert sides == expected
    assert all(Store(trained).get(r)["moves"] is None for r in family().values() if r.init != "survivors")


def test_the_dense_network_of_a_run_from_survivors_is_trained_again_when_its_weights_are_gone(tmp_path):
    one = child(DENSE)
    train([one, child(one)], tmp_path)
    Store(tmp_path).artifact(DENSE.key).unlink()
    assert train([child(one, init="survivors")], tmp_path) == [DENSE, child(one, init="survivors")]


def test_damaged_weights_of_the_dense_network_are_found_before_a_run_from_survivors_is_trained(tmp_path, monkeypatch):
    one = child(DENSE)
    train([child(one)], tmp_path)
    path = Store(tmp_path).artifact(DENSE.key)
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(training, "fit", None)
    with pytest.raises(store.DamagedWeights, match=message(f"Damaged weights {path}: ")):
        work.execute([child(one, init="survivors")], tmp_path)


@pytest.mark.parametrize("name", ["rewind", "restart"])
def test_rewind_is_theta_k(trained, digits, name):
    model, row = start(trained, digits, name)
    dense = M.attach(models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)))
    training.fit(dense, digits, QUICK, seed=int(DENSE.key[:15], 16), stop=15)
    assert equal(M.state(model), M.state(dense))
    assert not equal(M.state(model), theta_0())
    assert equal(M.read(model), stored_masks(trained, "one"))
    assert row["step"] == ([20, 30, 40] if name == "rewind" else [10, 20, 30, 40])


@pytest.mark.parametrize("name", ["rewind", "restart"])
def test_a_rewound_training_goes_on_at_iteration_k(trained, digits, name):
    """To the last bit: one step of the schedule or of the data order more or less gives other weights."""
    model, row = start(trained, digits, name)
    run = family()[name]
    history = training.fit(model, digits, QUICK, seed=int(run.key[:15], 16), start=15 if name == "rewind" else 0)
    assert row["val_loss"] == history.val_loss
    assert row["last_correct"] == np.packbits(history.last.correct).tobytes()
    assert json.loads(row["train_loss"]) == {str(t): loss for t, loss in history.train_loss.items()}
    assert next(iter(history.train_loss)) == (16 if name == "rewind" else 1)


def test_a_parents_weights_are_there_before_its_row_and_are_not_written_again(tmp_path, monkeypatch):
    """A row without weights would have its training done twice; other weights than those that a child has named."""
    done = []
    for name in ("save_artifact", "put"):
        method = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda *a, m=method, n=name, **k: (done.append(n), m(*a, **k))[1])
    train([child(DENSE)], tmp_path)
    assert done == ["save_artifact", "put", "put"]


def test_theta_k_lies_on_the_parents_own_way(trained, digits):
    """The dense network at iteration k is the one whose final weights were pruned, k iterations into its training."""
    dense = M.attach(models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8)))
    training.fit(dense, digits, QUICK, seed=int(DENSE.key[:15], 16))
    assert equal(M.state(dense), end(trained, "dense")[0])


def test_one_shot_has_the_density_of_round_10_within_one_weight(tmp_path, digits):
    at = lth.Net(base=DENSE)
    [dense], [pruned] = at.dense(0), at.oneshot(0, None)
    assert pruned.parent == dense
    assert (pruned.level, pruned.init) == (1, "reset")
    assert pruned.rate_output == pruned.rate / 2
    train([dense, replace(pruned, recipe=QUICK)], tmp_path)
    masks = M.read(work.initialise(pruned, digits, Store(tmp_path)).model)
    n = [19_200, 30_000, 1_000]
    for _ in range(10):
        n = [n[0] - round(n[0] * 0.2), n[1] - round(n[1] * 0.2), n[2] - round(n[2] * 0.1)]
    assert at.density(10) == sum(n) / 50_200
    assert abs(sum(kept(masks)) - sum(n)) <= 1


def test_the_engine_does_what_lth_imp_does(trained, digits):
    """The chain of runs and the paper's loop in one process: the same masks when they train in the same order."""
    chain = [family()[name] for name in ("dense", "one", "two", "three")]
    model = models.create("lenet_300_100", seed=0, in_shape=(1, 8, 8))
    orders = iter(chain)

    def fit(model, start, stop):
        training.fit(model, digits, QUICK, seed=int(next(orders).key[:15], 16), start=start, stop=stop)

    rates = {"fc1": 0.2, "fc2": 0.2, "fc3": 0.1}
    for level in algorithm.imp(model, fit, rounds=3, rate=rates):
        name = ("dense", "one", "two", "three")[level.round]
        assert equal(level.masks, stored_masks(trained, name))
        assert equal(M.state(model), end(trained, name)[0])


# Pruned by a criterion ------------------------------------------------------------------------------------------------

AT_INIT = replace(DENSE, valid=0, recipe=STANDARD, density=0.1, criterion="grasp")


def start_of(run, digits, tmp_path):
    """(the network of a run before its training, the same one without masks)."""
    model = work.initialise(run, digits, Store(tmp_path)).model
    return model, models.create(run.model, seed=run.seed, in_shape=(1, 8, 8))


@pytest.mark.parametrize("criterion", ["magnitude", "random", "snip", "grasp"])
def test_pruned_at_initialisation_from_theta_0(tmp_path, criterion):
    """64 · 300 + 300 · 100 + 100 · 10 = 50,200 weights: 5,020 are kept of all layers together, the rest is θ₀."""
    images = data.load("digits", valid=0)
    run = replace(AT_INIT, criterion=criterion)
    model, dense = start_of(run, images, tmp_path)
    masks = M.read(model)
    assert sum(int(m.sum()) for m in masks.values()) == 5_020
    assert all(torch.equal(v, M.state(dense)[name]) for name, v in M.state(model).items())
    again = M.read(start_of(run, images, tmp_path)[0])
    other = M.read(start_of(replace(run, seed=1), images, tmp_path)[0])
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert not all(torch.equal(masks[name], other[name]) for name in masks)


def test_the_stored_counts_are_those_of_the_highest_scores(tmp_path):
    run = replace(AT_INIT, score=(("reinit_linear", False), ("temperature", 1.0)))
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    generator = torch.Generator().manual_seed(int(run.key[15:], 16) % 2**31)
    images = data.load("digits", valid=0)
    halves = grasp_algorithm.class_balanced(images, 10, generator, halves=True)
    model = models.create(run.model, seed=0, in_shape=(1, 8, 8))
    score = grasp_algorithm.scores(model, halves, temperature=1.0)
    threshold = torch.cat([v.flatten() for v in score.values()]).sort(descending=True).values[5_019]
    expected = {name: [int((v >= threshold).sum()), v.numel()] for name, v in score.items()}
    assert json.loads(row["layers"]) == expected
    assert row["density"] == 0.1
    stored = store.unpack_masks(row)
    assert all(torch.equal(m, score[name].flatten() >= threshold) for name, m in stored.items())
    versions = json.loads(row["certificate"])["versions"]
    assert versions == {"training": training.VERSION, "grasp": grasp_algorithm.VERSION}


@pytest.mark.parametrize(
    ("score", "chunks"),
    [
        ({}, [(50, {0, 1, 2, 3, 4}, 10), (50, {5, 6, 7, 8, 9}, 10)]),
        ({"chunks": 4}, [(25, {0, 1, 2, 3, 4}, 5), (25, {5, 6, 7, 8, 9}, 5)] * 2),
        ({"chunks": 1, "class_sorted": False}, [(100, set(range(10)), 10)]),
        ({"chunks": 2, "class_sorted": False}, [(50, set(range(10)), 5)] * 2),
        ({"per_class": 6}, [(30, {0, 1, 2, 3, 4}, 6), (30, {5, 6, 7, 8, 9}, 6)]),
    ],
)
def test_the_batch_that_is_scored(monkeypatch, score, chunks):
    seen = []
    monkeypatch.setattr(grasp_algorithm, "scores", lambda model, batches, T: seen.append((batches, T)) or {})
    run = replace(AT_INIT, score=tuple(sorted(score.items())))
    images = data.load("digits", valid=0)
    work.scores(run, models.create(run.model, seed=0, in_shape=(1, 8, 8)), images, torch.Generator().manual_seed(0))
    [(batches, T)] = seen
    assert [(len(y), set(y.tolist()), int((y == y[0]).sum())) for _, y in batches] == chunks
    assert T == 200.0
    every = torch.cat([x for x, _ in batches]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)  # no image twice
    mean, std = images.mean[0], images.std[0]
    assert every.min() >= -mean / std - 1e-5


def test_augmented_trainings_score_augmented_images(monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "snip_scores", lambda model, batches: seen.append(batches) or {})
    for augment in ("none", "flip-crop"):
        run = replace(AT_INIT, criterion="snip", recipe=replace(STANDARD, augment=augment))
        model = models.create(run.model, seed=0, in_shape=(1, 8, 8))
        work.scores(run, model, data.load("digits", valid=0), torch.Generator().manual_seed(0))
    one, two = (torch.cat([x for x, _ in batches]) for batches in seen)
    assert one.shape == two.shape
    assert not torch.equal(one, two)


def test_snip_and_grasp_score_a_fresh_classifier_and_train_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(baselines, "snip_scores", lambda model, batches: seen.append(model) or {})
    model = models.create("resnet8", seed=0, in_shape=(1, 8, 8), width=4)
    for reinit in (True, False):
        run = replace(AT_INIT, criterion="snip", score=(() if reinit else (("reinit_linear", False),)))
        work.scores(run, model, data.load("digits", valid=0), torch.Generator().manual_seed(0))
    fresh, own = seen
    assert torch.equal(fresh.conv1.weight, model.conv1.weight)
    assert not torch.equal(fresh.fc.weight, model.fc.weight)
    assert torch.equal(own.fc.weight, model.fc.weight)


@pytest.mark.parametrize("init", ["reset", "rewind"])
def test_one_shot_from_trained_weights_by_one_ranking(tmp_path, init):
    """The row "LT" of the table: the largest final weights of the parent, of all layers together."""
    dense = replace(DENSE, valid=0)
    ticket = child(dense, density=0.05, init=init, rewind_to=10 if init == "rewind" else 0)
    train([ticket], tmp_path)
    final = load_file(Store(tmp_path).artifact(dense.key))
    weights = {name: w.abs() for name, w in final.items() if name.startswith("fc") and name.endswith("weight")}
    threshold = torch.cat([w.flatten() for w in weights.values()]).sort(descending=True).values[2_509]
    counts = json.loads(Store(tmp_path).get(ticket)["layers"])
    assert sum(kept for kept, _ in counts.values()) == 2_510
    assert {f"{name}.weight": n for name, (n, _) in counts.items()} == {
        name: int((w >= threshold).sum()) for name, w in weights.items()
    }
    assert Store(tmp_path).get(ticket)["step"][0] == (20 if init == "rewind" else 10)


def test_collapsed_layers_train_and_show_in_the_counts(tmp_path, monkeypatch):
    def dead(model, generator):
        ranked = {name: torch.rand(layer.weight.shape) for name, layer in M.prunable(model).items()}
        return ranked | {"fc2": torch.full((100, 300), -1.0)}

    monkeypatch.setattr(baselines, "random_scores", dead)
    run = replace(AT_INIT, criterion="random")
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    assert json.loads(row["layers"])["fc2"] == [0, 30_000]
    assert row["status"] == "finished"


def test_rows_hold_what_fit_measured(trained, digits):
    run = family()["two"]
    row = Store(trained).get(run)
    model, _ = start(trained, digits, "two")
    history = training.fit(model, digits, run.recipe, seed=int(run.key[:15], 16))
    for name, reading in (("early_stop", history.early_stop), ("last", history.last)):
        for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc"):
            assert row[f"{name}_{f}"] == getattr(reading, f)
        assert np.array_equal(store.unpack(row[f"{name}_correct"], 450), reading.correct)
    assert row["step"] == history.step == [10, 20, 30, 40]
    assert row["val_loss"] == pytest.approx(history.val_loss)
    assert json.loads(row["train_loss"]) == {str(t): loss for t, loss in history.train_loss.items()}
    assert (row["model"], row["dataset"], row["seed"], row["level"]) == ("lenet_300_100", "digits", 0, 2)
    assert (row["n_valid"], row["n_test"], row["status"]) == (297, 450, "finished")
    assert row["fingerprint"] == digits.fingerprint
    assert row["parent"] == run.parent.key
    assert json.loads(row["spec"]) == run.spec()


def test_certificates_are_complete(trained):
    for name, run in family().items():
        row = Store(trained).get(run)
        certificate = json.loads(row["certificate"])
        assert certificate["versions"] == {"training": training.VERSION, "lth": algorithm.VERSION}
        assert certificate["packages"]["torch"] == torch.__version__
        assert {"numpy", "python"} <= certificate["packages"].keys()
        assert certificate["device"] == row["device"]
        assert certificate["processor"] is None or re.fullmatch(r"\S+( \d+){1,3}", certificate["processor"])
        assert certificate["threads"] == 1
        assert certificate["group"] == [run.key]
        assert (certificate["compile"], certificate["deterministic"]) == (False, False)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", certificate["started"])
        assert certificate["wall_s"] == row["wall_s"] > 0
        assert "commit" in certificate["code"]
        assert re.fullmatch("[0-9a-f]{64}", certificate["theta0"])
        if run.parent:
            assert re.fullmatch("[0-9a-f]{64}", certificate["parent_weights"]), name
        else:
            assert certificate["parent_weights"] is None


def test_a_certificate_names_the_code_from_before_the_training(tmp_path, monkeypatch):
    """Who edits or pulls meanwhile does not change what is loaded."""
    commits, fit = ["loaded"], training.fit
    monkeypatch.setattr(work.files, "git", lambda *_: commits[-1])
    monkeypatch.setattr(training, "fit", lambda *args, **how: commits.append("pulled") or fit(*args, **how))
    work.code.cache_clear()
    try:
        train(seeds(2), tmp_path)
    finally:
        work.code.cache_clear()
    certificates = [json.loads(row["certificate"]) for row in Store(tmp_path).rows().values()]
    assert [c["code"]["commit"] for c in certificates] == ["loaded"] * 2
    assert "pulled" in commits


def test_children_name_the_weights_they_used(tmp_path):
    train([child(DENSE)], tmp_path)
    opened = Store(tmp_path)
    sha = hashlib.sha256(opened.artifact(DENSE.key).read_bytes()).hexdigest()
    assert json.loads(opened.get(child(DENSE))["certificate"])["parent_weights"] == sha
    assert json.loads(opened.get(DENSE)["certificate"])["weights"] == sha
    assert not opened.artifact(child(DENSE).key).exists(), "weights that no child needs are not kept"


@pytest.mark.slow
def test_a_pool_of_spawned_processes_gives_the_same_results(trained, tmp_path):
    with futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        train([family()["one"]], tmp_path, pool)
    for name in ("dense", "one"):
        here, there = (Store(folder).get(family()[name]) for folder in (trained, tmp_path))
        for column in ("val_loss", "last_correct", "early_stop_correct", "mask", "train_loss", "density"):
            assert here[column] == there[column]


def test_execute_leaves_threads_and_random_states(tmp_path):
    threads = torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    run = child(DENSE, init="random")
    torch.set_num_threads(threads + 1)
    try:
        work.execute([DENSE], tmp_path, keep_weights=[True], threads=1)
        work.execute([run], tmp_path, threads=1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]


def test_nothing_is_trained_on_other_data_than_what_it_starts_from(tmp_path, monkeypatch):
    """Nor are a stored run's weights, which a child would take for those of the stored run."""
    train([child(DENSE)], tmp_path)
    images = work.images_of("digits", None, False, 0)
    other = replace(images, fingerprint="0" * 64)
    monkeypatch.setattr(work, "images_of", lambda *_: other)
    monkeypatch.setattr(training, "fit", None)
    begins = f"Other data than before: digits has fingerprint {'0' * 12} here, but {DENSE!r} is stored with "
    begins += f"{images.fingerprint[:12]}; set LOTTERY_DATA to those images, or name another --results-dir."
    for _ in range(2):
        with pytest.raises(ValueError, match=message(begins)):
            train([child(DENSE, rate=0.5)], tmp_path)
        Store(tmp_path).artifact(DENSE.key).unlink(missing_ok=True)
    assert set(Store(tmp_path).rows()) == {DENSE.key, child(DENSE).key}
    assert not list(tmp_path.glob(".artifacts/*"))


def test_dropout_in_threads_is_dropout_in_order(tmp_path):
    """It draws from the generator of the whole process, on which every other training leaves its marks."""
    drops = Run(model="conv2", dataset="digits", recipe=QUICK, options=(("dropout", 0.5), ("width", 4)))
    runs = [drops, DENSE, replace(drops, seed=1), replace(DENSE, seed=1)]
    train(runs, tmp_path / "alone")
    with futures.ThreadPoolExecutor(2) as pool:
        train(runs, tmp_path / "together", pool, slots=2)
    alone, together = (Store(tmp_path / name) for name in ("alone", "together"))
    for r in runs:
        assert together.get(r)["val_loss"] == alone.get(r)["val_loss"]


def test_trainings_side_by_side_leave_the_random_state(tmp_path, monkeypatch):
    """The one that ends last found what the first one had set."""
    before, fit, begun, beside, jobs = torch.get_rng_state(), training.fit, threading.Event(), threading.Event(), []

    def held(*args, **how):
        if not begun.is_set():
            begun.set()
            assert beside.wait(30)
        elif not beside.is_set():
            beside.set()
            jobs[0].result(30)
        return fit(*args, **how)

    monkeypatch.setattr(training, "fit", held)
    with futures.ThreadPoolExecutor(2) as pool:
        for r in seeds(2):
            jobs.append(pool.submit(work.execute, [r], tmp_path))
            assert begun.wait(30)
    assert [job.exception() for job in jobs] == [None, None]
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_are_given_back_after_an_error(tmp_path):
    threads = torch.get_num_threads()
    with pytest.raises(store.DamagedWeights):
        work.execute([child(DENSE)], tmp_path, threads=threads + 1)
    assert torch.get_num_threads() == threads


def test_diverged_runs_are_stored_and_counted(tmp_path):
    run = replace(DENSE, recipe=replace(QUICK, optimizer="sgd", lr=1e30))
    assert train([run], tmp_path) == [run]
    [row] = load([run], Store(tmp_path)).to_dict("records")
    assert row["status"] == "diverged"
    assert row["last_test_acc"] < 0.2
    assert not row["censored"]
    assert train([run], tmp_path) == []


@pytest.mark.parametrize("steps", [40, 10])
def test_a_pruned_network_that_diverges_is_stored_as_diverged(tmp_path, steps):
    """Its pruned weights are NaN times 0, and that is no pruned weight that came back."""
    recipe = Recipe(optimizer="sgd", lr=1e30, iterations=steps, eval_every=10)
    run = child(DENSE, rate=0.5, rate_output=0.5, recipe=recipe)
    train([run], tmp_path)
    [row] = load([run], Store(tmp_path)).to_dict("records")
    assert (row["status"], row["density"]) == ("diverged", 0.5)
    assert train([run], tmp_path) == []


def test_without_validation_set_there_is_no_early_stop(tmp_path):
    run = replace(DENSE, valid=0)
    train([child(run)], tmp_path)
    for r in (run, child(run)):
        row = Store(tmp_path).get(r)
        assert (row["n_valid"], row["status"], row["censored"]) == (0, "finished", False)
        assert row["early_stop_step"] is row["early_stop_test_acc"] is row["early_stop_correct"] is None
        assert row["last_test_acc"] > 0.5
    assert len(load([run], Store(tmp_path))) == 1


def test_a_share_of_the_training_images(tmp_path, digits):
    run = replace(DENSE, train_fraction=0.1)
    train([run], tmp_path)
    row = Store(tmp_path).get(run)
    assert row["last_train_acc"] * 105 == pytest.approx(round(row["last_train_acc"] * 105))
    assert (row["n_valid"], row["fingerprint"]) == (297, digits.fingerprint)


def test_conv_layers_have_their_own_rate():
    model = models.create("conv2", seed=0, in_shape=(1, 8, 8))
    run = Run(model="conv2", dataset="digits", rate=0.2, rate_conv=0.1, rate_output=0.05)
    assert work.rates(model, run) == {"conv1": 0.1, "conv2": 0.1, "fc1": 0.2, "fc2": 0.2, "fc3": 0.05}
    assert set(work.rates(model, replace(run, rate_conv=None, rate_output=None)).values()) == {0.2}
