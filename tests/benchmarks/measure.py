"""Clocks, ceilings, floors, peak memory, and the machine they belong to."""

import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

CORES = torch.get_num_threads()  # as PyTorch counts them: physical ones, or what OMP_NUM_THREADS allows
ROOT = Path(__file__).parents[2]


def cuda(device):
    return torch.device(device).type == "cuda"


def clock(device="cpu"):
    """Seconds, when everything that was asked of the device is done."""
    if cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(f, device="cpu"):
    began = clock(device)
    f()
    return clock(device) - began


def interleaved(variants, n, repeats, warm_up=1):
    """`{name: spread}` of seconds per unit of work, where a variant f(n) gives the seconds of n units.

    Each warms up, then all run in turn, so that what else the machine does hits every one of them.
    """
    for f in variants.values():
        f(warm_up)
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, f in variants.items():
            times[name].append(f(n) / n)
    return {name: spread(some) for name, some in times.items()}


def spread(values):
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def best(f, device="cpu"):
    """Seconds of the fastest of repeated calls: a ceiling is what the machine can do at its quietest."""
    f()
    found, end = [], time.perf_counter() + 0.3
    while len(found) < 3 or time.perf_counter() < end:
        found.append(seconds(f, device))
    return min(found)


# Ceilings and floors --------------------------------------------------------------------------------------------------


@functools.cache
def gemm(device="cpu", threads=CORES, dtype=torch.float32, n=2048):
    """FLOP/s of a matrix product at a good shape, n × n each, by the faster of the libraries here."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ways = [lambda: a @ b]
    if not cuda(device) and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    with torch.no_grad():
        return 2 * n**3 / min(best(way, device) for way in ways)


@functools.cache
def conv(device="cpu", threads=CORES, dtype=torch.float32, batch=64):
    """FLOP/s of a forward 3×3 convolution at the best of a few shapes, in channels_last."""
    torch.set_num_threads(threads)
    found = []
    for channels, size in (64, 32), (128, 16), (256, 16):
        x = torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            time_ = best(functools.partial(F.conv2d, x, w, padding=1), device)
        found.append(2 * 9 * channels * channels * size * size * batch / time_)
    return max(found)


@functools.cache
def bandwidth(device="cpu", threads=CORES, size=2**28):
    """Bytes/s of c ← a + b over three arrays of `size` bytes together, which stay in the cache if they are small.

    The better of one thread and all: a small array is gone before a second thread has begun.
    """
    a, b, c = (torch.ones(size // 12, device=device) for _ in range(3))
    found = []
    for n in {1, threads}:
        torch.set_num_threads(n)
        found.append(12 * len(a) / best(lambda: torch.add(a, b, out=c), device))
    torch.set_num_threads(threads)
    return max(found)


def train_flops(macs, batch):
    """FLOPs of a training step: forward, and backward for weights and inputs; the first layer's input needs none.

    macs: `lottery.macs.count`, in the order of the forward pass.
    """
    first, *_ = macs.values()
    return 2 * batch * (3 * sum(macs.values()) - first)


def eval_flops(macs, images):
    return 2 * sum(macs.values()) * images


def adam_bytes(parameters):
    """The least that a step moves of its parameters, float32: θ read by forward and backward, ∇ written, Adam's own
    reading of θ, ∇, m, v and writing of θ, m, v. (SGD with momentum moves two less.)"""
    return 4 * 10 * parameters


def floor(flops, rate, moved, width):
    """Seconds below which it cannot go: the larger of arithmetic and memory traffic at the measured ceilings."""
    return {
        "flops": flops, "flops_per_s": rate, "bytes": moved, "bytes_per_s": width,
        "arithmetic_s": flops / rate, "memory_s": moved / width, "s": max(flops / rate, moved / width),
    }  # fmt: skip


# Peak memory ----------------------------------------------------------------------------------------------------------


def peak(name, variant, device="cpu", small=False):
    """{"MiB": peak memory of a process of its own that runs the variant, "before": its peak when all was prepared}."""
    words = ["-m", "benchmarks.peak", name, variant, device, str(int(small))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.run([sys.executable, *words], env=environment, text=True, capture_output=True)
    if process.returncode:
        raise RuntimeError(f"Peak memory of {name}, {variant}: {process.stderr.strip().splitlines()[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def resident():
    """Peak resident memory of this process so far, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss counts the parent that this process was forked from
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# The machine ----------------------------------------------------------------------------------------------------------


def machine(device="cpu"):
    """What is measured on. `load`: processes that wanted a core over the last minute; ask before the work begins."""
    return {
        "cpu": _cpu(),
        "cores": CORES,
        "device": torch.cuda.get_device_name(device) if cuda(device) else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu():
    """The processor's name, as the system tells it."""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return " ".join([*names[:1], platform.machine()])
    return platform.processor() or platform.machine()
