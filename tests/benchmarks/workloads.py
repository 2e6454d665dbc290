"""The benchmarks: what is timed, and against what. Each takes `Options` and returns rows of the JSON."""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure, plain
from lottery import baselines, cs, grasp, lth, macs, masks, models, training
from lottery.data import Data, Split
from lottery.training import Recipe

OURS, ALL_CORES, BFLOAT16, PRACTICE, EAGER = (
    "ours",
    "ours, all cores",
    "ours, bfloat16",
    "public practice",
    "eager, tensors ready",
)
SIDE_BY_SIDE = ", one a core"


@dataclass(frozen=True)
class Options:
    """small: minutes in all, to see that everything runs."""

    device: str = "cpu"
    repeats: int = 3
    small: bool = False


@dataclass(frozen=True)
class Training:
    """Steps of one network. images: training, validation, test. method: "mask" or "gate" (CS)."""

    title: str
    model: str
    shape: tuple[int, int, int]
    recipe: Recipe
    images: tuple[int, int, int]
    steps: int
    options: tuple = ()
    method: str = "mask"
    gpu_steps: int | None = None  # an epoch, where 20 steps say little
    threads: int = measure.CORES  # of ours; the references have all cores

    def size(self, o):
        if o.small:
            return max(2, self.recipe.eval_every if self.images[1] else 0)
        return self.gpu_steps if self.gpu_steps and measure.cuda(o.device) else self.steps


NEVER = 10**9
SGD = Recipe(
    optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True, batch_size=128, augment="flip-crop",
    inputs="standard", eval_every=NEVER, iterations=NEVER,
)  # fmt: skip
CIFAR, POOLED = (3, 32, 32), (3, 16, 16)
LENET = Recipe(test_readings="all", iterations=NEVER)
TRAININGS = {
    "lenet_step": Training(
        "LeNet-300-100, batch 60, 15,000 images evaluated every 100 steps",
        "lenet_300_100", (1, 28, 28), LENET, (55_000, 5_000, 10_000), 600, threads=1,
    ),
    "conv4_step": Training(
        "Conv-4, batch 60", "conv4", CIFAR, dataclasses.replace(LENET, lr=3e-4, eval_every=NEVER), (600, 0, 60), 6
    ),
    "resnet20_cs_step": Training(
        "ResNet-20 with Continuous Sparsification's gates, batch 128",
        "resnet20", CIFAR, SGD, (1_280, 0, 128), 5, method="gate",
    ),
    "resnet8_step": Training("ResNet-8 on 16×16 images, batch 128", "resnet8", POOLED, SGD, (1_280, 0, 128), 20),
    "resnet20": Training("ResNet-20, batch 128", "resnet20", CIFAR, SGD, (1_280, 0, 128), 20, gpu_steps=390),
    "vgg19": Training(
        "VGG-19, batch 64",
        "vgg19", CIFAR, dataclasses.replace(SGD, batch_size=64), (640, 0, 64), 20, gpu_steps=781,
    ),
}  # fmt: skip


# Trainings ------------------------------------------------------------------------------------------------------------


@functools.cache
def images(shape, counts, small=False):
    """Random pictures and labels, as `lottery.data.Data`."""
    rng = torch.Generator().manual_seed(0)

    def split(n):
        n = min(n, 16) if small else n
        return Split(torch.randint(256, (n, *shape), generator=rng).byte(), torch.randint(10, (n,), generator=rng))

    return Data("random", *map(split, counts), "random", 10, (0.5,) * shape[0], (0.25,) * shape[0])


def create(w, device="cpu"):
    return models.create(w.model, seed=0, in_shape=w.shape, **dict(w.options)).to(device)


def convolutions(net):
    return [name for name, layer in masks.prunable(net).items() if isinstance(layer, torch.nn.Conv2d)]


def prepare(w, variant, o, threads, k=None):
    """f(n) → seconds of n steps of one network in this process, or of k together, by name of the variant."""
    torch.set_num_threads(threads)
    data = images(w.shape, w.images, o.small)
    recipe = _recipe(w, data)
    net = create(w, o.device)
    if variant.startswith(OURS):
        recipe = dataclasses.replace(recipe, precision="bfloat16" if variant.startswith(BFLOAT16) else "float32")
        net = net if k is None else [create(w, o.device) for _ in range(k)]
        return functools.partial(_fit, w, net, data, recipe, o.device, threads)
    kind, gates = "DataLoader" if variant.startswith(PRACTICE) else "tensors", w.method == "gate"
    regulariser = (lambda net: 1e-8 * plain.l1(net)) if gates else None
    net = plain.gated(net) if gates else plain.masked(net)
    steps = plain.training(net, data, recipe, kind, o.device, regulariser)

    def f(n):
        torch.set_num_threads(threads)
        return measure.seconds(lambda: steps(n), o.device)

    return f


def _recipe(w, data, **changes):
    return dataclasses.replace(w.recipe, batch_size=min(w.recipe.batch_size, len(data.train)), **changes)


def _fit(w, net, data, recipe, device, threads, n):
    """Seconds that `training.fit` takes for n steps more than a few: what it does once, at its end, cancels out."""
    torch.set_num_threads(threads)
    more, few = (
        {},
        recipe.eval_every if len(data.valid) else 8 if measure.cuda(device) else 2,
    )  # a graph is captured at 4
    if w.method == "gate":
        net = cs.attach(net, layers=convolutions(net))
        more = {"method": cs.CS(final=1.0)}
    elif isinstance(net, list):
        net, more = [masks.attach(one) for one in net], {"seed": list(range(len(net)))}
    else:
        net = masks.attach(net)
    times = []
    for steps in (few, few + n):
        run = functools.partial(training.fit, net, data, dataclasses.replace(recipe, iterations=steps), **more)
        times.append(measure.seconds(run, device))
    return max(times[1] - times[0], 1e-9)


def _worker(name, variant, o, n):
    """One of several processes: one network on one thread."""
    f = prepare(TRAININGS[name], variant, o, 1)
    f(1)
    return f(n)


def side_by_side(name, variant, o, pool):
    """f(n) → seconds per network of as many networks as there are cores, one process and thread each."""
    k = measure.CORES
    return lambda n: max(pool.map(_worker, [name] * k, [variant] * k, [o] * k, [n] * k)) / k


def training_steps(name, o):
    """Ours and the two references, one network with all cores and one network a core; floors, ratios, peak memory."""
    w, gpu = TRAININGS[name], measure.cuda(o.device)
    net = create(w)
    kinds = [OURS, *([] if w.model.startswith("lenet") else [BFLOAT16]), PRACTICE, EAGER]
    variants = {kind: prepare(w, kind, o, w.threads if kind == OURS else measure.CORES) for kind in kinds}
    if w.threads != measure.CORES:
        variants[ALL_CORES] = prepare(w, ALL_CORES, o, measure.CORES)
    pool = None
    if not gpu:
        from joblib.externals.loky import ProcessPoolExecutor

        pool = ProcessPoolExecutor(measure.CORES)
        variants |= {kind + SIDE_BY_SIDE: side_by_side(name, kind, o, pool) for kind in kinds}
    try:
        times = measure.interleaved(variants, w.size(o), o.repeats, warm_up=2)
    finally:
        if pool:
            pool.shutdown(kill_workers=True)
    count = macs.count(net, w.shape)
    moved = measure.adam_bytes(sum(p.numel() for p in net.parameters()))
    flops = measure.train_flops(count, w.recipe.batch_size)
    if w.images[1]:
        flops += measure.eval_flops(count, sum(w.images[1:])) / w.recipe.eval_every
    top = ceilings(o)
    way = "gemm" if w.model.startswith("lenet") else "3×3 convolution"
    width = top["bandwidth, 4 MiB" if w.model.startswith("lenet") else "bandwidth, 256 MiB"]  # LeNet stays in the cache
    types = {OURS: "float32"} | ({BFLOAT16: "bfloat16"} if BFLOAT16 in times else {})
    floors = {kind: measure.floor(flops, top[f"{way}, {t}"], moved, width) for kind, t in types.items()}
    row = {
        "name": name, "title": w.title, "unit": "ms", "per": "step and network", "n": w.size(o),
        "parameters": sum(p.numel() for p in net.parameters()), "macs": sum(count.values()),
        "times": times, "floors": floors, "ratios": ratios(times, floors),
        "memory": {kind: measure.peak(name, kind, o.device, o.small) for kind in kinds},
        "not_measured": [] if gpu else [f"{w.title}: on a GPU"],
    }  # fmt: skip
    return in_ms(row)


def ratios(times, floors):
    """Times of the references over ours, alike with alike, and ours over its floor."""
    found = {}
    for name, time_ in times.items():
        if name.startswith(OURS):
            end = SIDE_BY_SIDE if name.endswith(SIDE_BY_SIDE) else ""
            for reference in (PRACTICE, EAGER):
                if reference + end in times:
                    found[f"{reference + end} / {name}"] = times[reference + end]["median"] / time_["median"]
            if low := floors.get(name.removesuffix(SIDE_BY_SIDE)):
                found[f"{name} / floor"] = time_["median"] / low["s"]
    return {name: round(value, 3) for name, value in found.items()}


def in_ms(row):
    row["times"] = {
        name: {k: v if k == "n" else round(1000 * v, 4) for k, v in t.items()} for name, t in row["times"].items()
    }
    return row


# Growth ---------------------------------------------------------------------------------------------------------------


def growth(o):
    """Time per step and network against the number of networks (processes of one thread) and against width."""
    from joblib.externals.loky import ProcessPoolExecutor

    rows, w = [], TRAININGS["lenet_step"]
    n = w.size(o)
    for k in [1, 2] if o.small else sorted({1, 2, measure.CORES, 2 * measure.CORES}):
        if not measure.cuda(o.device):
            with ProcessPoolExecutor(k) as pool:
                each = [["lenet_step"] * k, [OURS] * k, [o] * k, [n] * k]
                times = measure.interleaved({OURS: lambda n, pool=pool, each=each: max(pool.map(_worker, *each))}, n, 3)
            rows.append({"what": "networks, a process each", "x": k, **_shared(times[OURS], k)})
    for k in (1, 2) if o.small else (1, 10, 100) if measure.cuda(o.device) else (1, 2, 4):
        times = measure.interleaved({OURS: prepare(w, OURS, o, 1, k)}, n, 3, warm_up=2)
        rows.append({"what": "networks, one process", "x": k, **_shared(times[OURS], k)})
    for width in (8, 16) if o.small else (8, 16, 32):
        w = dataclasses.replace(TRAININGS["resnet8_step"], options=(("width", width),), steps=5)
        kinds = {kind: prepare(w, kind, o, measure.CORES) for kind in (OURS, EAGER)}
        times = measure.interleaved(kinds, w.size(o), min(o.repeats, 3))
        rows += [{"what": f"width, {kind}", "x": width, **t} for kind, t in times.items()]
    for row in rows:
        row |= {k: round(1000 * row[k], 4) for k in ("median", "low", "high")}
    title = "Growth with the number of networks (LeNet-300-100) and with width (ResNet-8 on 16×16 images)"
    return {"name": "growth", "title": title, "unit": "ms", "per": "step and network", "points": rows}


def _shared(times, k):
    """Seconds of k networks → of each."""
    return {name: v if name == "n" else v / k for name, v in times.items()}


# Iterative pruning ----------------------------------------------------------------------------------------------------


def imp(o):
    """Three levels of LeNet-300-100, 500 steps each, everything included: ours also reports on 70,000 images twice."""
    w, iterations = TRAININGS["lenet_step"], 20 if o.small else 500
    data = images(w.shape, w.images, o.small)
    recipe = _recipe(w, data, iterations=iterations)

    def ours(_):
        torch.set_num_threads(1)
        train = lambda net, start, stop: training.fit(net, data, recipe, start=start, stop=stop)  # noqa: E731
        return measure.seconds(lambda: [None for _ in lth.imp(create(w, o.device), train, rounds=2)], o.device)

    def reference(kind, _):
        def whole():
            torch.set_num_threads(measure.CORES)
            net, m = create(w, o.device), None
            for _ in range(3):
                trained = plain.masked(net, m)
                plain.training(trained, data, recipe, kind, o.device)(iterations)
                m = plain.prune(trained, 0.2)

        return measure.seconds(whole, o.device)

    variants = {OURS: ours, PRACTICE: functools.partial(reference, "DataLoader")}
    variants[EAGER] = functools.partial(reference, "tensors")
    times = measure.interleaved(variants, 1, min(o.repeats, 2))
    row = {
        "name": "imp",
        "title": imp.__doc__.split(",")[0] + f", {iterations} steps each",
        "unit": "ms",
        "per": "whole",
    }
    return in_ms(row | {"times": times, "ratios": ratios(times, {})})


# Scores before training -----------------------------------------------------------------------------------------------

SCORED = {"vgg19": ("VGG-19", CIFAR, 10, 25), "resnet50": ("ResNet-50", (3, 224, 224), 1000, 4)}


def _scored(name, chunks, small):
    """The network and its chunks of random images."""
    _, shape, classes, size = SCORED[name]
    shape, size = ((3, 32, 32), 2) if small else (shape, size)
    rng = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(size, *shape, generator=rng), torch.randint(classes, (size,), generator=rng))
        for _ in range(chunks)
    ]
    return models.create(name, seed=0, in_shape=shape, classes=classes), batches


def _score_variants(name, o):
    """{variant: what it does}. The references see the chunks joined, in one graph; a step sees one chunk."""
    net, batches = _scored(name, 2, o.small)
    net = net.to(o.device)
    batches = [(x.to(o.device), y.to(o.device)) for x, y in batches]
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))

    def step():
        torch.nn.functional.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
        net.zero_grad()

    return {
        "GraSP, ours": lambda: grasp.scores(net, batches),
        "GraSP, one graph": lambda: plain.grasp(net, x, y),
        "SNIP, ours": lambda: baselines.snip_scores(net, batches),
        "SNIP, one batch": lambda: plain.snip(net, x, y),
        "training step of one chunk": step,
    }


def scores(name, o):
    """GraSP and SNIP over two chunks beside one graph over all images, and beside a training step of one chunk."""
    torch.set_num_threads(measure.CORES)
    title, _, _, size = SCORED[name]
    work = _score_variants(name, o)
    variants = {key: lambda n, f=f: sum(measure.seconds(f, o.device) for _ in range(n)) for key, f in work.items()}
    times = measure.interleaved(variants, 1, min(o.repeats, 3))
    step = times["training step of one chunk"]["median"]
    found = {f"{key} / training step of one chunk": round(t["median"] / step, 3) for key, t in times.items()}
    del found["training step of one chunk / training step of one chunk"]
    found["GraSP, one graph / GraSP, ours"] = times["GraSP, one graph"]["median"] / times["GraSP, ours"]["median"]
    row = {"name": f"scores_{name}", "title": f"Scores of {title}: 2 chunks of {size}", "unit": "ms", "per": "whole"}
    row |= {"times": times, "ratios": {key: round(v, 3) for key, v in found.items()}}
    row["memory"] = {key: measure.peak(f"scores_{name}", key, o.device, o.small) for key in work}
    return in_ms(row)


# The store and the import ---------------------------------------------------------------------------------------------


def store(o):
    """status, load and scorecard of a store with 100, 1,000 and 10,000 runs, and other ways to keep as many."""
    import json

    import pandas as pd

    from benchmarks.runs import fill
    from lottery import experiments, scorecard

    rows, laptop, sizes = [], experiments.lth.runs(None, "laptop"), (30,) if o.small else (100, 1_000, 10_000)
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            ours, texts = Path(folder) / "ours", Path(folder) / "json"
            fill(ours, n)
            texts.mkdir()
            plain_rows = pd.read_parquet(ours).drop(columns=["mask", "early_stop_correct", "last_correct"])
            for i, line in enumerate(plain_rows.to_json(orient="records", lines=True).splitlines()):
                (texts / f"{i}.json").write_text(line)
            ways = {
                "lottery status": lambda folder=folder: command(folder, folder, "status", "--results-dir", "ours"),
                "load of a figure's runs": lambda ours=ours: experiments.load(laptop, experiments.Store(ours)),
                "load of everything": lambda ours=ours: experiments.load(None, experiments.Store(ours)),
                "scorecard": lambda ours=ours: scorecard.scorecard("lth", experiments.Store(ours)),
                "public practice, a JSON file a run": lambda texts=texts: pd.DataFrame(
                    [json.loads(path.read_text()) for path in texts.iterdir()]
                ),
                "pandas.read_parquet, nothing checked": lambda ours=ours: pd.read_parquet(ours),
            }
            if n == sizes[-1]:
                ways["lottery status, the first after a change of the code"] = functools.partial(_first_status, folder)
            variants = {name: lambda _, f=f: measure.seconds(f) for name, f in ways.items()}
            times = measure.interleaved(variants, 1, min(o.repeats, 3))
            rows += [{"what": name, "x": n, **t} for name, t in times.items()]
    for row in rows:
        row |= {k: round(1000 * row[k], 4) for k in ("median", "low", "high")}
    title = "The store against the number of runs; `lottery status` is a process of its own"
    return {"name": "store", "title": title, "unit": "ms", "per": "whole", "points": rows}


def _first_status(folder):
    with tempfile.TemporaryDirectory() as cache:
        command(folder, cache, "status", "--results-dir", "ours")


def command(folder, cache, *words):
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT), "XDG_CACHE_HOME": cache}
    words = [sys.executable, "-m", "lottery", *words]
    return subprocess.run(words, env=environment, cwd=folder, check=True, capture_output=True)


MODULES = ["baselines", "cs", "data", "grasp", "lth", "macs", "masks", "models", "soft_threshold", "training"]
HELP = """
import sys
sys.argv = ["lottery", "--help"]
try:
    from lottery.cli import app
    app()
except SystemExit:
    pass
"""
IMPORTS = {
    "import torch": ("", "import torch"),
    "import lottery": ("", "import lottery"),
    "import lottery and all that trains, after torch": ("import torch", f"from lottery import {', '.join(MODULES)}"),
    "the command line's help": ("", HELP),
}


def imports(o):
    """Seconds inside a fresh process each."""

    def fresh(before, timed, _):
        code = f"import time\n{before}\nbegan = time.perf_counter()\n{timed}\nprint(time.perf_counter() - began)"
        environment = {**os.environ, "PYTHONPATH": str(measure.ROOT)}
        out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        return float(out.stdout.splitlines()[-1])

    times = measure.interleaved({name: functools.partial(fresh, *code) for name, code in IMPORTS.items()}, 1, o.repeats)
    return in_ms({"name": "imports", "title": "Import time", "unit": "ms", "per": "process", "times": times})


# All of them ----------------------------------------------------------------------------------------------------------


def benchmarks():
    """{name: function of Options}; the slow ones run only when they are named."""
    from benchmarks import sparse

    named = {name: functools.partial(training_steps, name) for name in TRAININGS}
    named |= {"imp": imp, "scores_vgg19": functools.partial(scores, "vgg19")}
    named |= {"scores_resnet50": functools.partial(scores, "resnet50"), "growth": growth}
    return named | {
        "sparse_inference": sparse.inference,
        "sparse_training": sparse.products,
        "store": store,
        "imports": imports,
    }


SLOW = ("growth", "conv4_step", "resnet20", "vgg19", "scores_resnet50")


def run(names, o, say=print):
    """Yields {"schema": 1, …}, the machine, the ceilings and a row a benchmark, after each of them.

    Raises ValueError for an unknown name, before anything is measured.
    """
    known = benchmarks()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown benchmark {unknown[0]!r}: choose from {', '.join(known)}.")
    began, machine, rows = time.time(), measure.machine(o.device), []
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))
    for name in names or [name for name in known if name not in SLOW]:
        load, start = os.getloadavg()[0], time.perf_counter()
        row = known[name](o)
        rows.append(row | {"load": round(load, 2), "wall_s": round(time.perf_counter() - start, 1)})
        say(text(rows[-1]))
        yield {"schema": 1, "started": started, "wall_s": round(time.time() - began, 1), "small": o.small,
               "machine": machine, "ceilings": ceilings(o), "rows": rows}  # fmt: skip


def ceilings(o):
    """FLOP/s and bytes/s that the floors stand on: all cores, the best shape of a few, measured once in this run."""
    on, found = (o.device, measure.CORES), {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        found[f"gemm, {name}"] = measure.gemm(*on, dtype, 64 if o.small else 2048)
        found[f"3×3 convolution, {name}"] = measure.conv(*on, dtype, 1 if o.small else 64)
    for name, size in {"4 MiB": 2**22, "256 MiB": 2**28}.items():
        found[f"bandwidth, {name}"] = measure.bandwidth(*on, size // 64 if o.small else size)
    return found


def text(row):
    """Lines for a terminal."""
    lines = [
        f"{row['name']}: {row['title']} ({row['unit']} per {row['per']}, {row['wall_s']:.0f} s, load {row['load']})"
    ]
    for name, t in row.get("times", {}).items():
        lines.append(f"    {name:42} {t['median']:10.4g}   {t['low']:.4g} … {t['high']:.4g}")
    for name, floor in row.get("floors", {}).items():
        lines.append(
            f"    {'floor of ' + name:42} {1000 * floor['s']:10.4g}   {floor['flops']:.3g} FLOP, {floor['bytes']:.3g} B"
        )
    lines += [f"    {name:62} × {value:.4g}" for name, value in row.get("ratios", {}).items()]
    for name, m in row.get("memory", {}).items():
        lines.append(
            f"    {'memory of ' + name:42} {m['MiB']:10.0f} MiB at its peak, {m['before']:.0f} before the work"
        )
    for point in row.get("points", []):
        lines.append(f"    {point['what']:42} {point['x']:>8} {point['median']:10.4g}")
    return "\n".join(lines + [f"    not measured: {what}" for what in row.get("not_measured", [])])
