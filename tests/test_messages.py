"""The messages that book/messages.md lists: each is given when it says, and none is missing from the page."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lottery import baselines, cs, grasp, lth, masks, own, soft_threshold, training
from lottery.methods import NOTHING

PAGE = (Path(__file__).parents[1] / "book" / "messages.md").read_text()
LISTED = re.findall(r"^\| `(.+?)` \|", PAGE.partition("\nWhat the store says")[0], flags=re.MULTILINE)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batch(value=None):
    x = torch.randn(8, 6) if value is None else torch.full((8, 6), value)
    return [(x, torch.arange(8) % 3)]


def collapsed():
    model = soft_threshold.attach(net(), -5.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".s"):
                p.fill_(20.0)  # g(20) is almost 1, above every weight
    soft_threshold.budgets(model)


def idle(model, hook):
    """A training loop that calls nothing of its hook."""


def zeros():
    model = net()
    masks.restore(model, {name: torch.zeros_like(t) for name, t in masks.state(model).items()})
    return model


def late():
    model = net()
    groups = NOTHING.param_groups(model, training.Recipe())
    training.optimizer(cs.attach(model, 0.0), training.Recipe(), groups)


def no_scores():
    masks.top_k({"0": torch.tensor([1.0, float("nan")])}, 0.5)


def come_back():
    masks.top_k({"0": torch.arange(4.0)}, 0.75, within={"0": torch.tensor([True, True, False, False])})


def pruned(outputs=3, lr=0.1, method="random", wrapped=False, **options):
    recipe = training.Recipe(optimizer="sgd", lr=lr, batch_size=5, iterations=6, eval_every=6)
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    if wrapped:
        nn.utils.parametrizations.spectral_norm(model[0])
    own.prune(model, (x, torch.arange(20) % 3), method, 0.5, recipe=recipe, progress=False, **options)


def by_torch():
    model = net()
    nn.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    masks.density(model)


def diverged():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    masks.density(model)


def bent(act):
    return nn.Sequential(nn.Linear(6, 5), act(), nn.Linear(5, 3))


SITUATIONS = {
    "The model gives … for two examples": [lambda: pruned(outputs=2)],
    "Layer … carries a": [lambda: pruned(method="l0", wrapped=True)],
    "The training diverged": [lambda: pruned(lr=1e38)],
    "Nothing prunable": [
        lambda: masks.attach(nn.ReLU()),
        lambda: cs.attach(nn.ReLU(), 0.0),
        lambda: soft_threshold.attach(nn.ReLU(), -5.0),
        lambda: grasp.scores(nn.ReLU(), batch()),
        lambda: baselines.snip_scores(nn.ReLU(), batch()),
    ],
    "Density … keeps none of the … weights": [
        lambda: masks.top_k({"0": torch.rand(10)}, 0.01),
        lambda: grasp.prune(net(), batch(), 0.001),
    ],
    "Rate … leaves none of the … weights": [lambda: lth.prune(net(), 0.999)],
    "Cannot keep … weights": [come_back],
    "Layer collapse": [collapsed],
    "All gradients are zero": [
        lambda: grasp.scores(zeros(), batch(0.0)),
        lambda: baselines.snip_scores(zeros(), batch(0.0)),
    ],
    "NaN or infinity in the batch": [
        lambda: grasp.scores(net(), batch(float("nan"))),
        lambda: baselines.snip_scores(net(), batch(float("inf"))),
    ],
    "NaN scores in layer": [no_scores],
    "Layer … is pruned by": [lambda: masks.attach(cs.attach(net(), 0.0)), by_torch],
    "Layer … is on the meta device": [lambda: masks.attach(net().to("meta")), lambda: lth.prune(net().to("meta"), 0.2)],
    "Invalid mask for layer": [lambda: lth.prune(net(), 0.2, masks={"0": torch.ones(6, 5, dtype=torch.bool)})],
    "NaN or infinity in the weights": [diverged],
    "All GraSP scores are zero": [
        lambda: grasp.scores(net(), batch(), 1e30),
        lambda: grasp.scores(nn.Linear(6, 3), batch(), 1.0, lambda out, y: out.mean()),
    ],
    "SynFlow needs a network that is linear": [lambda: baselines.synflow(bent(nn.Sigmoid), (6,), 0.5)],
    "The model cannot be scored": [lambda: grasp.scores(bent(nn.Hardsigmoid), batch())],
    "Nothing told … of a step": [
        lambda: own.prune(net(), (torch.rand(20, 6), torch.arange(20) % 3), "rigl", train=idle)
    ],
    "Nothing to train": [lambda: training.optimizer(net().requires_grad_(False), training.Recipe())],
    "No parameter group holds": [late],
}


@pytest.mark.parametrize(("begins", "situation"), [(name, s) for name, some in SITUATIONS.items() for s in some])
def test_the_message_is_given_in_one_line(begins, situation):
    with pytest.raises(ValueError, match="^" + re.escape(begins).replace("…", ".+")) as error:
        situation()
    assert "\n" not in str(error.value)


def test_the_page_lists_these_messages():
    assert list(SITUATIONS) == LISTED
