"""Two processes that train on half of each batch end where one ends: masks, gates and thresholds under DDP.

All cases run in one pair of processes: to start these takes longer than all that they do.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lottery import cs, grasp, soft_threshold, training
from lottery import masks as M
from lottery.training import Recipe

SGD = Recipe("sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
STEPS = 3
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not available"),
]


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()  # fmt: skip


def masked(model):
    scores = {name: torch.rand(layer.weight.shape) for name, layer in M.prunable(model).items()}
    return M.attach(model, M.top_k(scores, 0.5))


def gated(model):
    """Gates of both signs, so that a soft mask differs from weight to weight."""
    with torch.no_grad():
        for name, p in cs.attach(model, 0.1).named_parameters():
            if name.endswith(".s"):
                p.copy_(torch.randn_like(p))
    return model


def thresholded(granularity):
    return lambda model: soft_threshold.attach(model, -2.0, granularity=granularity)


def everything(model, recipe):
    return [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}]


# how a network is prepared, the optimiser's groups, λ of a penalty (then β rises)
CASES = {
    "masks": (masked, everything, 0.0),
    "gates": (gated, cs.param_groups, 0.01),
    "a threshold for each layer": (thresholded("layer"), soft_threshold.param_groups, 0.0),
    "one threshold": (thresholded("global"), soft_threshold.param_groups, 0.0),
}


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def trained(name, part=slice(None), wrap=lambda model: model):
    """The state of a case's network after a few steps on some examples of the batch."""
    prepare, groups, lam = CASES[name]
    model = wrap(prepare(network()))
    optimizer, (x, y) = training.optimizer(model, SGD, groups(model, SGD)), batch()
    for t in range(STEPS):
        if lam:
            cs.set_beta(model, cs.temperature(t, STEPS))
        optimizer.zero_grad()
        (F.cross_entropy(model(x[part]), y[part]) + (lam * cs.penalty(model) if lam else 0)).backward()
        optimizer.step()
    return M.state(getattr(model, "module", model))


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: trained(name, slice(rank, None, 2), DistributedDataParallel) for name in CASES}
    model, chunks = network(), [(x, y) for x, y in zip(*(t.split(4) for t in batch()), strict=True)]
    found["scores"] = grasp.scores(DistributedDataParallel(model), chunks)
    found["scores alone"] = grasp.scores(model, chunks)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(both, name):
    one, two, alone = both[0][name], both[1][name], trained(name)
    before = M.state(CASES[name][0](network()))
    assert one.keys() == two.keys() == alone.keys()
    for key, tensor in alone.items():
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], tensor, rtol=1e-9, atol=1e-12)
        if not key.endswith("beta"):
            assert not torch.equal(tensor, before[key]), "nothing was trained"


def test_scores_of_a_distributed_model_are_those_of_the_model(both):
    for found in both:
        assert [*found["scores"]] == [f"module.{name}" for name in found["scores alone"]]
        for name, score in found["scores alone"].items():
            assert torch.equal(found["scores"][f"module.{name}"], score)
