"""lottery.own: the front door, `lottery.prune`, on one's own model and data."""

import copy
import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import convnet, images, mlp
from torch import nn

import lottery
from lottery import baselines, dynamic, export, own, tickets, training
from lottery import masks as M
from lottery.batches import Batches, normaliser
from lottery.training import Recipe

RECIPE = Recipe(optimizer="sgd", lr=0.05, momentum=0.9, batch_size=10, iterations=8, eval_every=8, inputs="standard")
FEW = {"cs": {"trials": 3}, "str": {"trials": 3}, "synflow": {"rounds": 3}, "lth": {"rounds": 2}}
EXACT = [name for name in own.METHODS if name not in ("cs", "str")]


def message(text):
    return f"^{re.escape(text)}"


def pruned(method="snip", net=None, density=0.3, recipe=RECIPE, **options):
    net = convnet().float() if net is None else net
    return lottery.prune(
        net, images(), method, density, recipe=recipe, progress=False, **{**FEW.get(method, {}), **options}
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("method", own.METHODS)
def test_every_method(method):
    """A plain model of the density, zeros where the masks say so; the given one is as it was."""
    net = convnet().float()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    rng = torch.get_rng_state()
    found = pruned(method, net)
    assert same(net.state_dict(), before)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in net.modules()] == [m.training for m in found.model.modules()]
    assert found.model.state_dict().keys() == before.keys()
    weights = {name: layer.weight for name, layer in M.prunable(found.model).items()}
    assert list(found.masks) == list(weights)
    assert not any(weights[name].detach()[~m].any() for name, m in found.masks.items())
    n = sum(w.numel() for w in weights.values())
    if method in EXACT:
        assert abs(found.density - 0.3) * n <= (
            len(weights) if method in ("gmp", "dnw", "set", "rigl", "random") else 0.5
        )
    assert found.layers["kept"].sum() == sum(int(m.sum()) for m in found.masks.values())
    assert f"Sequential by {method}: density 0.3 asked, {found.density:.4f} got" in str(found)


def test_lth_by_hand():
    """Two rounds: train, keep √0.3 of all, back to the first values; then 0.3; then the ticket is trained."""
    net, data = convnet().float(), images()
    found = pruned("lth", net)
    by_hand = M.attach(copy.deepcopy(net))
    theta = M.state(by_hand)
    for r in range(3):
        M.restore(by_hand, theta)
        training.fit(by_hand, data, RECIPE, seed=1000 * r)
        if r < 2:
            scores = {name: layer.weight.detach().abs() for name, layer in M.prunable(by_hand).items()}
            M.attach(by_hand, M.top_k(scores, 0.3 ** ((r + 1) / 2), within=M.read(by_hand)))
    assert same(found.masks, M.read(by_hand))
    assert same(found.model.state_dict(), M.bake(by_hand).state_dict())
    assert same(found.theta, M.state(net))
    assert found.trainings == 3


def test_rewinding_starts_the_ticket_from_iteration_k():
    net = convnet().float()
    found = pruned("lth", net, rewind_to=2)
    dense = M.attach(copy.deepcopy(net))
    training.fit(dense, images(), RECIPE, seed=0, stop=2)
    assert same(found.theta, M.state(dense))


def test_magnitude_of_a_pretrained_model():
    found = pruned("magnitude", pretrained=True)
    net = convnet().float()
    assert same(found.masks, M.top_k(baselines.magnitude_scores(net), 0.3))
    assert found.trainings == 1
    assert list(found.measures) == ["as given", "pruned"]
    assert pruned("magnitude", rounds=2).trainings == 3


def test_layers_left_alone():
    net = convnet().float()
    net[4].weight.requires_grad_(False)
    found = pruned("gmp", net, skip=("0",))
    assert list(found.masks) == ["8"]
    assert found.left == {"0": "skipped", "4": "frozen"}
    assert "left alone: 4 (frozen)" in str(found)
    assert (found.model[0].weight != 0).all()
    assert torch.equal(found.model[4].weight, net[4].weight)
    for method in ("synflow", "dnw", "cs", "l0", "set", "str", "grasp", "lth", "random"):
        assert list(pruned(method, convnet().float(), skip="[04]").masks) == ["8"]


def test_masks_that_are_there_stay():
    net = M.attach(convnet().float())
    M.attach(net, M.top_k(baselines.random_scores(net, torch.Generator().manual_seed(0)), 0.5))
    found = pruned("magnitude", net, pretrained=True)
    assert not any((m & ~M.read(net)[name]).any() for name, m in found.masks.items())
    with pytest.raises(
        ValueError, match=message("The model carries masks, cs learns its own: call lottery.masks.bake")
    ):
        pruned("cs", net)


@pytest.mark.parametrize("method", own.METHODS)
def test_a_training_loop_of_ones_own(method):
    """Three lines of a hook are enough for any method; it trains as `fit` does with the same order of examples."""
    data, calls = images(), []

    def train(model, hook):
        calls.append(hook)
        optimizer = torch.optim.SGD(hook.groups(), lr=0.05, momentum=0.9)
        batches = Batches(data, RECIPE, 1000 * (len(calls) - 1), next(model.parameters()))
        for t in range(hook.iterations):
            x, y = batches(t)
            hook.before_step(t, optimizer, x, y)
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + hook.penalty()).backward()
            optimizer.step()

    found = pruned(method, train=train)
    assert found.trainings == len(calls) > 0
    ours = pruned(method)
    if method not in ("set", "l0"):  # what these draw comes from another generator
        assert same(found.masks, ours.masks)
        for name, t in ours.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], t, rtol=1e-3, atol=1e-4)
    elif method == "set":
        assert found.density == ours.density


def test_a_loss_and_a_score_of_ones_own():
    seen = []

    def loss(logits, y):
        seen.append(len(y))
        return F.multi_margin_loss(logits, y)

    found = pruned("gmp", loss=loss, score=lambda net: float(net[8].weight.numel()))
    assert seen == [10] * 8
    assert found.measures == {"as given": 30.0, "pruned": 30.0}


def test_default_recipe():
    recipe = own.default_recipe(images())
    assert (recipe.batch_size, recipe.iterations, recipe.inputs) == (20, 10, "standard")
    assert pruned(recipe=None).trainings == 1


def test_same_seed_same_result():
    torch.manual_seed(1)
    first = pruned("set", seed=3)
    torch.manual_seed(2)
    assert same(first.model.state_dict(), pruned("set", seed=3).model.state_dict())
    assert not same(first.masks, pruned("set", seed=4).masks)


# Files ----------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys, json, numpy as np, onnxruntime
from safetensors.numpy import load_file
folder, zeros = sys.argv[1], 0
weights = load_file(folder + "/model.safetensors")
x = np.load(folder + "/x.npy")
[logits] = onnxruntime.InferenceSession(folder + "/model.onnx").run(None, {"x": x})
assert not {"lottery", "torch"} & set(sys.modules)
print(json.dumps([sum(int((w != 0).sum()) for n, w in weights.items() if w.ndim > 1), logits.tolist()]))
"""


@pytest.mark.slow
def test_saved_and_exported_files_need_neither_lottery_nor_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = pruned("gmp")
    found.save(tmp_path)
    found.export(tmp_path / "model.onnx")
    x = images().test.x[:7]  # a batch of another size, pixels as they are
    np.save(tmp_path / "x.npy", x.numpy())
    out = subprocess.run([sys.executable, "-c", ELSEWHERE, tmp_path], capture_output=True, text=True, check=True).stdout
    kept, logits = json.loads(out)
    assert kept == sum(int(m.sum()) for m in found.masks.values())
    net = found.model.eval()
    ours = net(normaliser(found.data, RECIPE, net[0].weight)(x))
    torch.testing.assert_close(torch.tensor(logits), ours.detach(), rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == "gmp"
    assert report["density"] == found.density
    assert {name: row["kept"] for name, row in report["layers"].items()} == {
        n: int(m.sum()) for n, m in found.masks.items()
    }


def test_ticket_of_ones_own_model(tmp_path):
    net = convnet().float()
    found = pruned("lth", net)
    found.save(tmp_path)
    path = tmp_path / "ticket.safetensors"
    ticket = tickets.load(path, model=net)
    assert same(ticket.masks, found.masks)
    assert same(ticket.theta, M.state(net))
    again = ticket.model(net)
    assert same(M.read(again), found.masks)
    with pytest.raises(
        ValueError, match=message(f"{path} is the ticket of a Sequential of one's own: give load(path, mo")
    ):
        tickets.load(path)
    with pytest.raises(
        ValueError, match=message(f"{path} is no ticket, or none that fits Sequential: give a file that")
    ):
        tickets.load(path, model=mlp().float())


def test_export_is_refused_when_onnxruntime_disagrees(tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Other:
        def __init__(self, *_, **__):
            self.run = lambda _, inputs: [np.zeros((4, 2), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Other)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=message("onnxruntime computes logits that differ by up to ")):
        export.onnx(nn.Linear(3, 2), torch.randn(4, 3), tmp_path / "m.onnx")


@pytest.mark.parametrize("inputs", ["unit", "standard"])
def test_the_exported_normalisation_is_the_recipes(inputs):
    recipe = dataclasses.replace(RECIPE, inputs=inputs)
    found = pruned("snip", recipe=recipe)
    like, x = found.model[0].weight, images().test.x
    fed = normaliser(images(), recipe, like)(x)
    torch.testing.assert_close(export.Inputs(found.data, found.model, inputs)(x), fed)
    torch.testing.assert_close(found.example, normaliser(images(), recipe, like)(images().train.x[:1]))
    job = own._Job(convnet().float(), images(), recipe, 0.3, ["0"])
    [(scored, y)] = job.chunks(2)
    assert len(y) == 10
    assert (scored.max() <= 1) == (inputs == "unit")
    every = normaliser(images(), recipe, like)(images().train.x)
    assert all(any(torch.allclose(row, other) for other in every) for row in scored)


def test_sparse_copy_computes_the_same():
    found = pruned("gmp", mlp().float())
    fast = export.sparse(found.model)
    assert [type(module).__name__ for module in fast[1::2]] == ["SparseLinear"] * 3
    x = torch.randn(3, 16)
    torch.testing.assert_close(fast(x), found.model.eval()(x))
    assert type(export.sparse(found.model, below=0.2)[1]) is nn.Linear
    times = export.seconds({"dense": found.model, "CSR": fast}, x, repeats=3)
    assert all(t > 0 for t in times.values())


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_checkpoint_of_torch_prune(tmp_path):
    from torch.nn.utils import prune

    source = convnet(seed=1).float()
    prune.l1_unstructured(source[4], "weight", 0.5)
    prune.l1_unstructured(source[8], "bias", 2)
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "c.pt")
    net = own.load(convnet().float(), tmp_path / "c.pt")
    assert same(M.read(net), {"4": source[4].weight_mask.bool()})
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(net.eval()(x), source.eval()(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_checkpoint_of_a_wrapped_model(prefix):
    """As DataParallel, DistributedDataParallel and torch.compile name what they wrap."""
    source = convnet(seed=1).float()
    net = own.load(convnet().float(), {prefix + name: t for name, t in source.state_dict().items()})
    assert same(net.state_dict(), source.state_dict())
    assert next(iter(nn.DataParallel(source).state_dict())) == "module.0.weight"


def test_checkpoint_of_a_masked_model_and_of_safetensors(tmp_path):
    from safetensors.torch import save_file

    source = M.attach(convnet(seed=1).float())
    M.attach(source, M.top_k(baselines.magnitude_scores(source), 0.3))
    net = own.load(convnet().float(), source.state_dict())
    assert same(M.state(net), M.state(source))
    assert same(M.read(net), M.read(source))
    save_file(M.state(source), tmp_path / "c.safetensors")
    assert same(M.state(own.load(convnet().float(), tmp_path / "c.safetensors")), M.state(source))


def test_checkpoint_of_tied_weights():
    def tied(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        net[1].weight = net[0].weight
        return net

    net = own.load(tied(0), tied(1).state_dict())
    assert same(net.state_dict(), tied(1).state_dict())
    assert net[0].weight is net[1].weight


def test_bad_checkpoints(tmp_path):
    net = mlp()
    with pytest.raises(ValueError, match=message("Names missing in state: 1.bias")):
        own.load(net, {"1.weight": torch.zeros(12, 16)})
    with pytest.raises(ValueError, match=message("Invalid checkpoint: give a state dict, names and tensors")):
        own.load(net, {"epoch": 3})
    torch.save(net, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=message(f"{tmp_path / 'whole.pt'} is no checkpoint of tensors alone")):
        own.load(net, tmp_path / "whole.pt")
    with pytest.raises(FileNotFoundError, match=message(f"No checkpoint at {tmp_path / 'none.pt'}.")):
        own.load(net, tmp_path / "none.pt")


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pruned("magic"), "Unknown method 'magic': choose one of magnitude, lth, random, snip, grasp, synflow"),
        (lambda: pruned("snip", rounds=3), "Unknown option 'rounds' of snip: it takes per_class."),
        (lambda: pruned("random", rounds=3), "Unknown option 'rounds' of random: it takes none."),
        (lambda: pruned("gmp", density=0), "Invalid density 0: give a fraction of weights to keep"),
        (lambda: pruned(density=1e-6), "Density 1e-06 keeps none of the 162 weights of the model"),
        (lambda: pruned(skip=("9",)), "Unknown layer '9' in skip: the model has 0, 4, 8."),
        (lambda: pruned(skip="*"), "Nothing prunable in Sequential (0: skipped; 4: skipped; 8: skipped)."),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten())),
            "Nothing prunable in Sequential (it has no Linear or Conv layer).",
        ),
        (lambda: pruned("lth", rounds=0), "Invalid rounds 0: give a whole number from 1."),
        (lambda: pruned("lth", rewind_to=8), "Invalid rewind_to 8: give 0 <= iteration < 8"),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(16, 3))),
            "The model gives shape (2, 3) for two examples, the data have 5 classes: it has to give [2, 5]",
        ),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.Linear(9, 5))),
            "The model does not take examples of shape (1, 4, 4), torch.float32: ",
        ),
        (
            lambda: pruned("str", recipe=dataclasses.replace(RECIPE, optimizer="adam", momentum=0.0)),
            "Invalid optimizer 'adam' with str: its thresholds need weight decay by 'sgd'.",
        ),
        (
            lambda: pruned(net=mlp().float(), recipe=dataclasses.replace(RECIPE, lr=1e30)),
            "The training diverged: lower the learning rate, 1e+30, of the recipe.",
        ),
        (
            lambda: pruned(net=nn.Sequential(nn.Flatten(), nn.LazyLinear(5))),
            "Invalid model: '1.weight' is lazy, without a",
        ),
        (lambda: pruned(net=mlp().to("meta")), "Invalid model: '1.weight' is on the meta device, without values"),
    ],
)
def test_refused_in_one_line(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


def test_options_of_a_method():
    found = pruned("gmp", budget="erk", every=2)
    assert {n: int(m.sum()) for n, m in found.masks.items()} == dynamic.GMP(0.3, "erk").kept(M.attach(convnet()), 1.0)


def test_plot():
    figure = pruned().plot()
    assert [bar.get_width() for bar in figure.axes[0].patches] == list(pruned().layers["density"][::-1])
