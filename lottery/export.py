"""A pruned model outside of this package: ONNX, and inference that skips zeros.

ONNX files are compared in onnxruntime with what PyTorch computes as they are written. Both packages that this needs,
onnxscript and onnxruntime, come with `pip install ".[onnx]"`.
"""

import copy
import math
import statistics
import time
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from lottery import masks as M
from lottery import perceptron
from lottery.batches import first_float
from lottery.data import Data
from lottery.files import in_folder, publish, temporary
from lottery.methods import whole


class Inputs(nn.Module):
    """Examples as the data hold them → as a recipe with these `inputs` feeds them: the normalisation as a layer."""

    def __init__(self, examples: Data, model: nn.Module, inputs: str = "standard"):
        super().__init__()
        like, x = first_float(model), examples.train.x
        self.tokens, self.like = x.dtype == torch.int64, like.dtype
        mean, std = (examples.mean, examples.std) if inputs == "standard" else ([0.0], [1.0])
        shape = (-1, *[1] * (x.dim() - 2))
        self.register_buffer("mean", (torch.tensor(mean).double() * examples.scale).view(shape).to(like))
        self.register_buffer("std", (torch.tensor(std).double() * examples.scale).view(shape).to(like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.tokens else (x.to(self.like) - self.mean) / self.std


def runtime() -> ModuleType:
    """The package, where that which writes is here as well. Raises ImportError."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs {error.name}: pip install onnxscript onnxruntime.") from None
    return onnxruntime


def onnx(model: nn.Module, x: torch.Tensor, path: Path | str) -> Path:
    """Write a model as ONNX, the first dimension of its input x free, and compare it in onnxruntime with PyTorch.

    The file gets its name when it has been compared; one that is there before stays until then.

    Raises FileNotFoundError: no such folder; as `Pruned.export`.
    """
    ort, path = runtime(), in_folder(path)
    model = copy.deepcopy(model).cpu().eval()
    batch = torch.export.Dim("batch", min=1, max=2**16)
    with temporary(path) as mine:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own
            torch.onnx.export(
                model, (x,), mine, input_names=["x"], output_names=["logits"], dynamic_shapes=({0: batch},),
                dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
            ours = model(x)
        session = ort.InferenceSession(str(mine), providers=["CPUExecutionProvider"])
        [theirs] = session.run(None, {"x": x.numpy()})
        if not torch.allclose(torch.from_numpy(theirs).to(ours), ours, rtol=1e-3, atol=1e-4):
            worst = (torch.from_numpy(theirs).to(ours) - ours).abs().max().item()
            raise RuntimeError(f"onnxruntime computes logits that differ by up to {worst:.2g}: {path} is not written.")
        publish(mine, path)
    return path


class SparseLinear(nn.Module):
    """A Linear layer that multiplies its non-zero weights alone, in PyTorch's compressed sparse rows (CSR).

    Its buffers are the three dense tensors of that format, which can be copied. Who reads `weight`, as PyTorch's
    transformers do, gets it dense.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.shape, self.bias = layer.weight.shape, layer.bias
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            csr = layer.weight.detach().to_sparse_csr()
        self.register_buffer("rows", csr.crow_indices())
        self.register_buffer("columns", csr.col_indices())
        self.register_buffer("values", csr.values())

    @property
    def csr(self) -> torch.Tensor:
        """The weight as a sparse tensor of the buffers."""
        return torch.sparse_csr_tensor(self.rows, self.columns, self.values, self.shape, check_invariants=False)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as a dense tensor."""
        return self.csr.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = (self.csr @ flat.mT).mT.reshape(*x.shape[:-1], self.shape[0])
        return y if self.bias is None else y + self.bias


def sparse(model: nn.Module, below: float = 0.5) -> nn.Module:
    """A copy for inference whose Linear layers of a density up to `below` are `SparseLinear`; what prunes is baked in.

    A layer with hooks or a forward of its own stays, since these would be lost; half precision stays, and so do
    convolutions: PyTorch has no sparse products of these on the CPU. Its 2:4 sparsity, on some GPUs, asks for two zeros
    in each four weights of a row, which none of the book's methods makes.
    """
    net, made = M.bake(copy.deepcopy(model).eval()), {}
    for name, layer in list(net.named_modules(remove_duplicate=False)):
        plain = type(layer) is nn.Linear and layer.weight.numel() and perceptron.plain_call(layer)
        wide = plain and layer.weight.dtype in (torch.float32, torch.float64)
        if wide and M.density({name: layer.weight.detach() != 0}) <= below:
            made[layer] = made.get(layer) or SparseLinear(layer)  # one that has several names stays one
            parent, _, child = name.rpartition(".")
            if not name:
                return made[layer]
            setattr(net.get_submodule(parent), child, made[layer])
    return net


@torch.no_grad()
def seconds(models: dict[str, nn.Module], x: torch.Tensor, repeats: int = 21) -> dict[str, float]:
    """Median time of a forward pass of each model on x, measured in turn: whether zeros are worth anything here."""
    whole("repeats", repeats)
    times = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model(x)
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}
