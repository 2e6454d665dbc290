"""lottery.export: what skips zeros; ONNX is tested with `lottery.prune`, in test_own.py."""

import pytest
import torch
from torch import nn

from lottery import cs, export
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
