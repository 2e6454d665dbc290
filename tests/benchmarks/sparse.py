"""What zeros are worth in time and memory, by density: inference in several forms, and sparse products in training."""

import copy
import functools
import warnings

import torch
import torch.nn.functional as F

from benchmarks import measure
from lottery import masks, models, perceptron, training

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
BATCHES = (1, 60, 2500)
MASKED, BAKED, CSR, SCIPY, TWO_FOUR = "dense with mask", "baked dense", "CSR, PyTorch", "CSR, SciPy", "2:4 on a GPU"
FAST, UNFOLD, FREE = "baked dense, oneDNN", "unfolded, CSR", "CSR alone, unfolding not counted"


def lenet(density):
    """LeNet-300-100 whose masks keep a random share of every layer."""
    net = masks.attach(models.create("lenet_300_100", seed=0))
    rng = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(m.shape, generator=rng) for name, m in masks.read(net).items()}
    return masks.attach(net, masks.top_k(scores, density, "layer")).eval()


def csr(weight):
    """Compressed sparse rows, with 32-bit indices: half the default's traffic."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")
        found = weight.detach().to_sparse_csr()
        crow, col = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(crow, col, found.values(), found.shape, check_invariants=True)


def csr_bytes(weight):
    nnz = int(torch.count_nonzero(weight))
    return (4 + 4) * nnz + 4 * (len(weight) + 1)


def layers(net):
    """[(weight, bias)] of a copy without masks."""
    baked = masks.bake(copy.deepcopy(net))
    return [(layer.weight.detach(), layer.bias.detach()) for layer in masks.prunable(baked).values()]


def transposed(weights, x):
    """Logits [B, classes] of images [B, 784]: each layer is weight @ x on x [n, B], which is what CSR multiplies."""
    x = x.T.contiguous()
    for i, (weight, bias) in enumerate(weights):
        x = torch.addmm(bias[:, None], weight, x) if isinstance(weight, torch.Tensor) else _scipy(weight, bias, x)
        x = x.relu_() if i < len(weights) - 1 else x
    return x.T


def _scipy(weight, bias, x):
    return torch.from_numpy(weight @ x.numpy()) + bias[:, None]


def forms(net):
    """{form: (images [B, 784] → logits, bytes of its weights)} on the CPU."""
    import scipy.sparse

    plain = layers(net)
    pytorch = [(csr(weight), bias) for weight, bias in plain]
    scipys = [(scipy.sparse.csr_matrix(weight.numpy()), bias) for weight, bias in plain]
    dense, packed = (sum(f(weight) for weight, _ in plain) for f in (lambda weight: 4 * weight.numel(), csr_bytes))
    baked = masks.bake(copy.deepcopy(net))
    return {
        MASKED: (net, 2 * dense),
        BAKED: (baked, dense),
        FAST: (perceptron.forward(baked), dense),
        CSR: (functools.partial(transposed, pytorch), packed),
        SCIPY: (functools.partial(transposed, scipys), packed),
    }


def inference(o):
    """Microseconds of a batch and bytes of the weights, by density: LeNet-300-100, and a convolution of Conv-4."""
    torch.set_num_threads(1)
    points = []
    with torch.no_grad():
        for density in (0.5, 0.02) if o.small else DENSITIES:
            found = forms(lenet(density))
            for batch in BATCHES[: 2 if o.small else 3]:
                x = torch.rand(batch, 784)
                n = 3 if o.small else max(3, 3000 // batch)
                times = _interleaved({form: functools.partial(f, x) for form, (f, _) in found.items()}, n, o)
                points += [
                    {
                        "net": "LeNet-300-100",
                        "form": form,
                        "density": density,
                        "batch": batch,
                        "bytes": found[form][1],
                        **t,
                    }
                    for form, t in times.items()
                ]
            points += _convolution(density, o)
    where = [] if measure.cuda(o.device) else [f"{TWO_FOUR}: LeNet-300-100"]
    points += _two_four(o) if not where else []
    crossing = {
        f"{p['net']}, batch {p['batch']}": crossover(
            [q for q in points if (q["net"], q["batch"]) == (p["net"], p["batch"])]
        )
        for p in points
        if "GPU" not in p["net"]
    }
    title = "Inference of pruned networks by density, one thread"
    row = {"name": "sparse_inference", "title": title, "unit": "µs", "per": "batch", "sparse": points}
    return row | {"crossover": crossing, "not_measured": where}


def crossover(points):
    """The highest density measured at which, and below which, a CSR form is faster than the dense ones; else None."""
    fast = None
    for density in sorted({p["density"] for p in points}):
        at = {p["form"]: p["median"] for p in points if p["density"] == density}
        sparse = [at[form] for form in (CSR, SCIPY, UNFOLD) if form in at]
        if not sparse or min(sparse) >= min(at[form] for form in (BAKED, FAST) if form in at):
            break
        fast = density
    return fast


def _interleaved(work, n, o):
    """Microseconds a call."""

    def repeat(f, n):
        return measure.seconds(lambda: [f() for _ in range(n)], o.device)

    times = measure.interleaved({name: functools.partial(repeat, f) for name, f in work.items()}, n, o.repeats)
    return {name: {k: v if k == "n" else round(1e6 * v, 2) for k, v in t.items()} for name, t in times.items()}


def _convolution(density, o):
    """conv2 of Conv-4 (64 → 64 filters of 3×3 on 32×32): PyTorch has no sparse convolution, so it must be unfolded."""
    weight = torch.randn(64, 64, 3, 3) * (torch.rand(64, 64, 3, 3) < density)
    sparse, found = csr(weight.flatten(1)), []
    for batch in (1,) if o.small else (1, 60):
        x = torch.randn(batch, 64, 32, 32)
        columns = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1).contiguous()

        def unfolded(x=x):
            return sparse @ F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)

        work = {
            BAKED: lambda x=x: F.conv2d(x, weight, padding=1),
            UNFOLD: unfolded,
            FREE: lambda columns=columns: sparse @ columns,
        }
        size = {BAKED: 4 * weight.numel()}
        found += [
            {"net": "conv2 of Conv-4", "form": form, "density": density, "batch": batch,
             "bytes": size.get(form, csr_bytes(weight.flatten(1))), **t}
            for form, t in _interleaved(work, 2 if o.small else max(2, 60 // batch), o).items()
        ]  # fmt: skip
    return found


def _two_four(o):
    """Two of every four weights of the hidden layers gone, float16 on tensor cores, which take multiples of 64: LeNet
    is padded. The output layer stays dense."""
    from torch import nn
    from torch.sparse import to_sparse_semi_structured

    sizes = nn.Linear(832, 320), nn.ReLU(), nn.Linear(320, 128), nn.ReLU(), nn.Linear(128, 10)
    net, found = nn.Sequential(*sizes).half().to(o.device).eval(), []
    pruned = copy.deepcopy(net)
    for layer in (pruned[0], pruned[2]):
        keep = (torch.arange(layer.in_features, device=o.device) % 4 < 2).half()
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach() * keep))
    for batch in BATCHES:
        x = torch.rand(batch, 832, device=o.device).half()
        times = _interleaved({f"{BAKED}, GPU": lambda x=x: net(x), TWO_FOUR: lambda x=x: pruned(x)}, 100, o)
        where = {"net": "LeNet padded to 832-320-128, GPU", "density": 0.5, "batch": batch, "bytes": None}
        found += [where | {"form": form, **t} for form, t in times.items()]
    return found


# Training -------------------------------------------------------------------------------------------------------------


class SparseStep(perceptron.Step):
    """Ours with the first layer, 88 % of the arithmetic, in sparse products: CSR forward, and its gradient at the
    survivors alone (a sampled product). It needs no gradient of its input, so W₁ᵀ is never used."""

    def __init__(self, model, recipe, build):
        super().__init__(model, recipe, build)
        assert self.survivors is not None, "dense: nothing to gain"
        found = csr(masks.read(model)[next(iter(masks.prunable(model)))].float())
        places = found.crow_indices(), found.col_indices()
        self.sparse = torch.sparse_csr_tensor(*places, self.kept[0], found.shape, check_invariants=True)

    @torch.no_grad()
    def __call__(self, x, y):
        xT = x.flatten(1).T.contiguous()
        h = torch.addmm(self.biases[0][:, None], self.sparse, xT).relu_().T.contiguous()
        xs = [x, h]
        for i, (weight, bias) in enumerate(zip(self.weights[1:], self.biases[1:], strict=True), start=2):
            xs.append(perceptron._product(xs[-1], weight, bias, relu=i < len(self.weights)))
        log_p = F.log_softmax(xs[-1], 1)
        loss = F.nll_loss(log_p, y)
        g = log_p.exp_().scatter_add_(1, y[:, None], log_p.new_full((len(y), 1), -1)).div_(len(y))
        for i in reversed(range(1, len(self.layers))):
            weight_grad = perceptron._product(g.T, xs[i].T)
            torch.index_select(weight_grad.view(-1), 0, self.survivors[i], out=self.weight_grads[i])
            torch.sum(g, 0, out=self.bias_grads[i])
            g = torch.ops.aten.threshold_backward(perceptron._product(g, self.weights[i].T), xs[i], 0)
        self.weight_grads[0].copy_(torch.sparse.sampled_addmm(self.sparse, g.T, x.flatten(1), beta=0).values())
        torch.sum(g, 0, out=self.bias_grads[0])
        self.optimizer.step()
        for i in range(1, len(self.layers)):
            self.weights[i].view(-1).scatter_(0, self.survivors[i], self.kept[i])
        return loss


def products(o):
    """LeNet-300-100 with one thread: a step of 60 and a reading of 15,000 images, dense and with sparse products."""
    torch.set_num_threads(1)
    x, y = torch.rand(60, 1, 28, 28), torch.randint(10, (60,))
    held_out = torch.rand(300 if o.small else 15_000, 1, 28, 28)
    points, recipe = [], training.Recipe()
    for density in (0.1, 0.02) if o.small else (0.3, 0.2, 0.1, 0.05, 0.02, 0.01):
        steps = {
            "step, dense products": perceptron.Step(lenet(density), recipe, training._build),
            "step, sparse products": SparseStep(lenet(density), recipe, training._build),
        }
        work = {name: functools.partial(f, x, y) for name, f in steps.items()}
        times = _interleaved(work, 3 if o.small else 200, o)
        net = lenet(density)
        dense, sparse = perceptron.forward(net), [(csr(weight), bias) for weight, bias in layers(net)]
        work = {
            "15,000 images, dense products": lambda f=dense: [f(part) for part in held_out.split(2500)],
            "15,000 images, sparse products": lambda ws=sparse: [
                transposed(ws, part.flatten(1)) for part in held_out.split(250)
            ],
        }
        with torch.no_grad():
            times |= _interleaved(work, 1, o)
        points += [{"what": name, "x": density, **t} for name, t in times.items()]
    title = "Training LeNet-300-100 with sparse products by density, one thread; batches of 250 for the sparse reading"
    return {"name": "sparse_training", "title": title, "unit": "µs", "per": "call", "points": points,
            "ratios": _gains(points)}  # fmt: skip


def _gains(points):
    at = {(p["what"], p["x"]): p["median"] for p in points}
    found = {}
    for what, density in at:
        if "dense" in what:
            name = f"{what} / sparse at density {density:g}"
            found[name] = round(at[what, density] / at[what.replace("dense", "sparse"), density], 3)
    return found
