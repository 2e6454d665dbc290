"""Time of a LeNet-300-100 training step on MNIST, batch 60, with 15,000 images evaluated every 100 steps.

    python tests/benchmarks/lenet_step.py [--steps 600] [--repeats 5]

Three loops in one run, in turn, so that a noisy machine is noisy for all: ours (`training.fit`, one thread); two of
ours side by side, one thread each, as `lottery run` trains; and what public code does, a DataLoader that turns one
image at a time into a tensor, on all cores. Every loop trains and evaluates the same network the same number of times.
Prints one JSON object: medians and ranges in milliseconds a step and a network, and the ratios.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from joblib.externals.loky import ProcessPoolExecutor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from lottery import data, masks, models, training


class Images(Dataset):
    """Images one by one, as PIL pictures through ToTensor: what torchvision's MNIST gives."""

    def __init__(self, split):
        from PIL import Image

        self.pictures = [Image.fromarray(image[0].numpy()) for image in split.x]
        self.labels = split.y.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return to_tensor(self.pictures[i]), self.labels[i]


def ours(steps, threads=1):
    """Seconds that `fit` takes for `steps` more steps: its closing report, which the reference lacks, cancels out."""
    torch.set_num_threads(threads)
    images, times = data.load("mnist"), []
    for n in (steps, 2 * steps):
        net = masks.attach(models.create("lenet_300_100", seed=0))
        began = time.perf_counter()
        training.fit(net, images, training.Recipe(iterations=n, test_readings="all"))
        times.append(time.perf_counter() - began)
    return times[1] - times[0]


def reference(steps, images):
    """Seconds of an eager loop over DataLoaders, masks multiplied in every forward pass."""
    net = masks.attach(models.create("lenet_300_100", seed=0))
    optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)
    train, *held_out = (DataLoader(part, 60, shuffle=i == 0, drop_last=i == 0) for i, part in enumerate(images))
    began, step = time.perf_counter(), 0
    while True:
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            step += 1
            if step % 100 == 0:
                with torch.no_grad():
                    for loader in held_out:
                        for x, y in loader:
                            (net(x).argmax(1) == y).sum().item()
            if step == steps:
                return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    mnist, cores = data.load("mnist"), torch.get_num_threads()
    pictures = [Images(split) for split in (mnist.train, mnist.valid, mnist.test)]
    times = {"ours": [], "ours, two side by side": [], "DataLoader": []}
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(ours, [100, 100]))  # workers import and load before the clock runs
        for _ in range(options.repeats):
            times["ours"].append(ours(options.steps))
            times["ours, two side by side"].append(max(pool.map(ours, [options.steps] * 2)) / 2)
            torch.set_num_threads(cores)
            times["DataLoader"].append(reference(options.steps, pictures))
    ms = {name: [1000 * t / options.steps for t in some] for name, some in times.items()}
    median = {name: statistics.median(some) for name, some in ms.items()}
    out = {name: {"median": median[name], "min": min(some), "max": max(some)} for name, some in ms.items()}
    ratio = {name: median["DataLoader"] / median[name] for name in median}
    print(json.dumps({"unit": "ms per step and network", "loops": out, "times faster": ratio}, indent=1))


if __name__ == "__main__":
    main()
