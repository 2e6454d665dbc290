"""How far apart two copies of a network end: the error along the line between them (arXiv 1912.05671, section 2).

Both start from the same θ_k and differ in the order of the data and its augmentation alone. *Instability* is the
highest test error on the line between their final weights minus the mean of the two at its ends; the authors call a
network stable below 2 points. Batch norm's statistics are taken anew at every point of the line, from training images,
and once more as the mean of the two; which of them the authors did is not known to us.

By notes on their paper they read 30 evenly spaced places of the line and average over 3 initialisations with 3 orders
of the data each; ours reads 11 places, for one pair of copies a trial. Fewer places are more likely to miss the highest
error, and then the instability comes out lower.
"""

import copy
import json
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

from lottery import data, lth, models, training
from lottery import masks as M
from lottery.batches import normaliser
from lottery.experiments.runs import Measurement, Run, hashed

IMAGES = 2_000  # of the training set, for batch norm's statistics


@dataclass(frozen=True)
class Instability(Measurement):
    """The test error at `points` places, ends included, between the final weights of two trainings of one network."""

    one: Run
    other: Run
    points: int = 11

    versions = ("lth", "training")

    @property
    def trained(self) -> tuple[Run, Run]:
        return self.one, self.other

    model, dataset, seed, recipe, options, level = (  # what the two trainings share
        property(operator.attrgetter(f"one.{name}"))
        for name in ("model", "dataset", "seed", "recipe", "options", "level")
    )

    def spec(self) -> dict[str, Any]:
        """The trainings' common fields; which two they are stands in place of their parent."""
        pair = [r.key for r in self.trained]
        return {**self.one.spec(), "measurement": "Instability", "parent": pair, "points": self.points}

    @classmethod
    def key_of(cls, spec: dict[str, Any]) -> str:
        """The key of the pair, which the fields that the two share do not tell."""
        return hashed(cls.__name__, spec["parent"], spec["points"])

    def measure(self, device: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The columns of the store; one, other: artifacts, `{name: tensor}`."""
        images = data.load(self.dataset, valid=self.one.valid, split_seed=self.one.split_seed)
        ends = [{n: t for n, t in end.items() if "/" not in n} for end in (one, other)]
        kept = {n.removeprefix("mask/"): t.bool() for n, t in one.items() if n.startswith("mask/")}
        net = M.attach(models.on_set(self.model, self.dataset, self.options), kept).to(device)
        errors, mean_statistics = [], []
        for alpha in np.linspace(0, 1, self.points):
            M.restore(net, lth.between(*ends, float(alpha)))
            mean_statistics.append(self._error(net, images))
            errors.append(self._error(_recalibrated(net, images, self.recipe), images))
        values = {"instability": lth.instability(errors), "errors": errors}
        values |= {"with mean statistics": lth.instability(mean_statistics), "errors with them": mean_statistics}
        return {
            "values": json.dumps(values),
            "fingerprint": images.fingerprint,
            "level": self.level,
            "n_test": len(images.test.y),
            "density": M.density(kept),
            "layers": json.dumps({name: [int(m.sum()), m.numel()] for name, m in kept.items()}),
        }

    def _error(self, net, images):
        like = next(net.parameters())
        with training.autocast(self.recipe, like):
            _, correct = training.evaluate(net, images.test, normaliser(images, self.recipe, like))
        return 100 * (1 - correct.float().mean().item())


def _recalibrated(net, images, recipe):
    """A copy whose batch norm has the mean statistics of training images, not augmented, under its own weights."""
    net, like = copy.deepcopy(net), next(net.parameters())
    normalise = normaliser(images, recipe, like)
    update_bn((normalise(x.to(like.device)) for x in images.train.x[:IMAGES].split(250)), net)
    return net.eval()
