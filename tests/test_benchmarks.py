"""The benchmarks run, count what they claim to count, and compare equals; nothing here is timed.

Arithmetic of floors by hand; the plain references compute the same losses, masks and scores as the package.
"""

import json

import pytest
import torch
from benchmarks import measure, plain, sparse, workloads
from typer.testing import CliRunner

from lottery import cs, grasp, macs, masks, models, perceptron, training
from lottery.baselines import snip_scores
from lottery.batches import normaliser
from lottery.cli import app
from lottery.experiments import Store, lth

SMALL = workloads.Options(small=True, repeats=1)


def test_flops_of_lenet_by_hand():
    """784·300 + 300·100 + 100·10 = 266,200 MACs; the input layer needs no input gradient, so 6.8e7 FLOP a step."""
    count = macs.count(models.create("lenet_300_100", seed=0), (1, 28, 28))
    assert measure.train_flops(count, 60) == 2 * 60 * (3 * 266_200 - 235_200) == 67_608_000
    assert measure.eval_flops(count, 15_000) == 2 * 266_200 * 15_000 == 7_986_000_000
    assert measure.adam_bytes(266_610) == 10_664_400


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    assert measure.floor(6e9, 2e9, 1e9, 4e9)["s"] == 3
    assert measure.floor(6e9, 2e9, 1e9, 1e8)["s"] == 10


def test_spread_and_ratios_compare_alike_with_alike():
    assert measure.spread([3, 1, 2, 9]) == {"median": 2.5, "low": 1, "high": 9, "n": 4}
    medians = {"ours": 2, "public practice": 20, "ours, one a core": 1, "public practice, one a core": 18}
    found = workloads.ratios({name: {"median": t} for name, t in medians.items()}, {"ours": {"s": 0.5}})
    assert found == {
        "public practice / ours": 10, "ours / floor": 4,
        "public practice, one a core / ours, one a core": 18, "ours, one a core / floor": 2,
    }  # fmt: skip


def test_variants_take_turns():
    turns = []
    variants = {name: lambda n, name=name: turns.append((name, n)) or 6.0 for name in "ab"}
    assert measure.interleaved(variants, 3, 2)["a"] == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 2}
    assert turns == [("a", 1), ("b", 1), *[("a", 3), ("b", 3)] * 2]


@pytest.mark.parametrize("form", [sparse.BAKED, sparse.FAST, sparse.CSR, sparse.SCIPY])
def test_every_form_of_a_pruned_network_gives_its_logits(form):
    net, x = sparse.lenet(0.1), torch.rand(7, 784)
    with torch.no_grad():
        torch.testing.assert_close(sparse.forms(net)[form][0](x), net(x))


def test_bytes_of_a_tenth_of_the_weights():
    bytes_ = {form: size for form, (_, size) in sparse.forms(sparse.lenet(0.1)).items()}
    assert bytes_[sparse.BAKED] == 4 * 266_200
    assert bytes_[sparse.CSR] == 8 * 26_620 + 4 * (410 + 3)


def test_crossover_is_the_highest_density_below_which_sparse_always_wins():
    def points(times):
        return [
            {"form": f, "density": d, "median": t}
            for d, t in times.items()
            for f, t in zip(("CSR, PyTorch", "baked dense"), t, strict=True)
        ]

    assert sparse.crossover(points({0.5: (9, 5), 0.1: (4, 5), 0.01: (1, 5)})) == 0.1
    assert sparse.crossover(points({0.5: (4, 5), 0.1: (6, 5), 0.01: (1, 5)})) == 0.01
    assert sparse.crossover(points({0.1: (6, 5)})) is None


def test_a_step_with_sparse_products_is_the_same_step():
    x, y = torch.rand(60, 1, 28, 28), torch.randint(10, (60,), generator=torch.Generator().manual_seed(0))
    nets = [sparse.lenet(0.1) for _ in range(2)]
    steps = [
        kind(net, training.Recipe(), training._build)
        for kind, net in zip((perceptron.Step, sparse.SparseStep), nets, strict=True)
    ]
    for _ in range(3):
        dense, products = (step(x, y) for step in steps)
        torch.testing.assert_close(dense, products)
    torch.testing.assert_close(steps[0].theta, steps[1].theta, atol=2e-5, rtol=1e-4)


def test_the_references_train_the_same_networks():
    net, x = models.create("resnet8", seed=0, in_shape=(3, 16, 16)), torch.rand(4, 3, 16, 16)
    m = masks.top_k({n: torch.rand_like(layer.weight) for n, layer in masks.prunable(net).items()}, 0.3)
    torch.testing.assert_close(
        plain.masked(net, m)(x), masks.attach(models.create("resnet8", seed=0, in_shape=(3, 16, 16)), m)(x)
    )
    gated = plain.gated(net)
    assert float(plain.l1(gated).detach()) == pytest.approx(
        sum(layer.weight.numel() for layer in net.modules() if isinstance(layer, torch.nn.Conv2d))
    )
    torch.testing.assert_close(gated(x), cs.attach(net, layers=workloads.convolutions(net))(x))


def test_the_references_prune_and_score_alike():
    net = models.create("resnet8", seed=0, in_shape=(3, 16, 16))
    x, y = torch.rand(6, 3, 16, 16), torch.arange(6)
    for ours, theirs in (
        (grasp.scores(net, [(x, y)]), plain.grasp(net, x, y)),
        (snip_scores(net, [(x, y)]), plain.snip(net, x, y)),
    ):
        for a, b in zip(ours.values(), theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
    kept = plain.prune(plain.masked(net), 0.2)
    assert {n: int(m.sum()) for n, m in kept.items()} == {n: m.numel() - int(0.2 * m.numel()) for n, m in kept.items()}


@pytest.mark.parametrize("kind", ["DataLoader", "tensors"])
def test_the_references_see_every_image_as_ours_do(kind):
    """One epoch gives the same pixels, standardised, and every label once."""
    data = workloads.images((3, 16, 16), (16, 0, 16), True)
    recipe = workloads.SGD
    batches = (
        plain.loader(data.test, 5, recipe, data, False)
        if kind == "DataLoader"
        else plain.Tensors(data.test, 5, recipe, data, False, "cpu")
    )
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    torch.testing.assert_close(x, normaliser(data, recipe, torch.zeros(()))(data.test.x))
    assert torch.equal(y, data.test.y)


def test_a_store_of_invented_runs_is_sound(tmp_path):
    from benchmarks.runs import fill

    fill(tmp_path / "ours", 12)
    store = Store(tmp_path / "ours")
    assert len(store.rows()) == 12
    assert sum(store.get(r) is not None for r in lth.runs(None, "laptop")) == 12


# Smoke runs -----------------------------------------------------------------------------------------------------------

ROW = {"name": str, "title": str, "unit": str, "per": str, "load": float, "wall_s": float}


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.parametrize("name", ["lenet_step", "imp", "scores_vgg19", "sparse_inference", "sparse_training"])
def test_benchmarks_run(name, monkeypatch):
    monkeypatch.setattr(measure, "CORES", 1)
    monkeypatch.setattr(measure, "peak", lambda *args: {"MiB": 2.0, "before": 1.0})
    said = []
    [found] = workloads.run([name], SMALL, said.append)
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert (found["schema"], found["small"]) == (1, True)
    assert {"cpu", "cores", "device", "load", "torch", "python"} <= found["machine"].keys()
    assert all(value > 0 for value in found["ceilings"].values())
    [row] = found["rows"]
    assert {key: type(row[key]) for key in ROW} == ROW
    measured = [*row.get("times", {}).values(), *row.get("points", []), *row.get("sparse", [])]
    assert all(0 <= t["low"] <= t["median"] <= t["high"] and t["n"] == 1 for t in measured)
    assert measured
    assert said[0].startswith(f"{name}: ")
    if name == "lenet_step":
        kinds = [workloads.OURS, workloads.PRACTICE, workloads.EAGER]
        assert list(row["times"]) == [*kinds, *(kind + workloads.SIDE_BY_SIDE for kind in kinds)]
        assert row["floors"]["ours"]["flops"] == pytest.approx(67_608_000 + 79_860_000)
        assert row["not_measured"]


@pytest.mark.slow
@pytest.mark.endurance
@pytest.mark.parametrize("name", ["resnet20_cs_step", "conv4_step"])
def test_every_variant_of_a_conv_step_runs(name):
    for kind in workloads.OURS, workloads.BFLOAT16, workloads.PRACTICE, workloads.EAGER:
        assert workloads.prepare(workloads.TRAININGS[name], kind, SMALL, 1)(1) > 0


@pytest.mark.slow
@pytest.mark.endurance
def test_peak_memory_of_a_process_of_its_own():
    found = measure.peak("lenet_step", workloads.EAGER, small=True)
    assert 0 < found["before"] <= found["MiB"] < 10_000


def test_bad_input_is_one_line(tmp_path):
    for words, told in {
        ("lenet",): "Unknown benchmark 'lenet': choose from lenet_step, ",
        ("--repeats", "0"): "Invalid repeats 0: give a whole number from 1.",
        ("--json", str(tmp_path / "none" / "x.json")): f"No folder {tmp_path / 'none'}: ",
        ("--device", "tpu"): "Invalid device 'tpu': ",
    }.items():
        result = CliRunner().invoke(app, ["bench", *words])
        assert result.exit_code == 2
        assert result.stderr.startswith(f"lottery: {told}")
        assert result.stderr.count("\n") == 1
