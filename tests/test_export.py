"""lottery.export: what skips zeros; ONNX is tested with `lottery.prune`, in test_own.py."""

import copy

import pytest
import torch
from torch import nn

from lottery import baselines, cs, export, models
from lottery import masks as M


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))


@pytest.mark.parametrize("gates", [False, True])
def test_a_sparse_copy_of_a_model_with_masks(gates):
    model = net()
    if gates:
        cs.attach(model)
        for layer in (model[0], model[2]):
            layer.parametrizations.weight[0].s.data.copy_(torch.randn(layer.weight.shape) - 1)
        cs.harden(model)
    else:
        M.attach(model, {"0": torch.rand(30, 20) < 0.1, "2": torch.rand(4, 30) < 0.3})
    fast, x = export.sparse(model), torch.randn(5, 20)
    assert [type(module).__name__ for module in fast] == ["SparseLinear", "ReLU", "SparseLinear"]
    torch.testing.assert_close(fast(x), model(x))
    assert list(M.read(model)) == ["0", "2"]  # the model itself stays as it was


def test_a_sparse_copy_runs_where_the_weight_is_read():
    """PyTorch's transformer, on its fast path, and FastGRNN use a layer's weight without calling the layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    for model, x in (
        (nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16)),
        (models.create("fastgrnn", seed=0, in_shape=(1, 8, 8)), torch.randn(2, 1, 8, 8)),
    ):
        M.attach(model.eval(), M.top_k(baselines.magnitude_scores(model), 0.2))
        fast = export.sparse(model)
        assert any(isinstance(module, export.SparseLinear) for module in fast.modules())
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))


def test_a_sparse_copy_is_copied_and_kept_like_any_model():
    model = M.attach(net(), {"0": torch.rand(30, 20) < 0.1, "2": torch.rand(4, 30) < 0.3})
    fast, x = export.sparse(model), torch.randn(5, 20)
    again = export.sparse(copy.deepcopy(fast))
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_dense(dtype):
    model = M.attach(net().to(dtype), {"0": torch.rand(30, 20) < 0.1, "2": torch.rand(4, 30) < 0.3})
    fast, x = export.sparse(model), torch.randn(5, 20, dtype=dtype)
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("shape", [(0, 20), (0, 7, 20), (3, 0, 20), (20,)])
def test_a_sparse_layer_takes_what_a_dense_one_takes(shape):
    model = M.attach(nn.Linear(20, 30), {"": torch.rand(30, 20) < 0.1})
    fast, x = export.sparse(model), torch.randn(shape)
    assert type(fast) is export.SparseLinear
    torch.testing.assert_close(fast(x), model(x))


def test_a_layer_of_several_names_is_sparse_under_each():
    layer = nn.Linear(20, 20)
    model = M.attach(nn.Sequential(layer, nn.ReLU(), layer), {"0": torch.rand(20, 20) < 0.1})
    fast, x = export.sparse(model), torch.randn(5, 20)
    assert fast[0] is fast[2]
    assert type(fast[0]) is export.SparseLinear
    torch.testing.assert_close(fast(x), model(x))


def test_what_is_done_beside_a_layers_forward_is_not_lost():
    calls = []
    model = M.attach(net(), {"0": torch.rand(30, 20) < 0.1, "2": torch.rand(4, 30) < 0.3})
    model[0].register_forward_hook(lambda *given: calls.append(given))
    model[2].forward = lambda x: torch.ones(len(x), 4)
    fast, x = export.sparse(model), torch.randn(5, 20)
    assert torch.equal(fast(x), torch.ones(5, 4))
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_weights_stays_dense():
    fast = export.sparse(nn.Sequential(nn.Linear(0, 4), nn.ReLU()))
    assert fast(torch.zeros(2, 0)).shape == (2, 4)


def test_seconds_need_a_repeat():
    with pytest.raises(ValueError, match=r"^Invalid repeats 0: give a whole number from 1\.$"):
        export.seconds({"net": net()}, torch.randn(1, 20), 0)
