"""Peak memory of one variant of one benchmark, in a process of its own: `python -m benchmarks.peak NAME VARIANT …`."""

import json
import sys

import torch

from benchmarks import measure, workloads


def work(name, variant, o):
    """What the variant does, prepared."""
    if name.startswith("scores_"):
        torch.set_num_threads(measure.CORES)
        return workloads._score_variants(name.removeprefix("scores_"), o)[variant]
    f = workloads.prepare(workloads.TRAININGS[name], variant, o, measure.CORES)
    return lambda: f(3)


def main(name, variant, device, small):
    f = work(name, variant, workloads.Options(device=device, small=small == "1"))
    before = measure.resident()
    if measure.cuda(device):
        before = torch.cuda.memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
    f()
    after = torch.cuda.max_memory_allocated(device) / 2**20 if measure.cuda(device) else measure.resident()
    print(json.dumps({"MiB": round(after, 1), "before": round(before, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
