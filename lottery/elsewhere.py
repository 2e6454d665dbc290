"""Data sets that nobody may pass on or that no library fetches, read from files that their owners lay out.

    name       files under the data root                                    an example
    imagenet   imagenet/train/<class>/*, imagenet/val/<class>/*: images     3x224x224
    google12   google12/train.npy and test.npy, as EdgeML's scripts write   32 features, 99 steps
    har2       har2/train.npy and test.npy, likewise                        9 features, 128 steps
    har2_part  uci_har/inertial_subset.npz, a part of UCI HAR               9 features, 128 steps

Images, of any size that Pillow reads, are resized to 256 pixels along the shorter side and cut to the middle 224. Of
the `.npy` tables a row is one example, its label first, then its steps one after the other. Sequences are stored as
images of one column, features as channels, at 256 grey levels from a feature's smallest to its largest training value:
the training loop keeps whole sets as bytes. What lies outside in the test set is clipped. HAR-2's classes are {sitting,
laying, walking upstairs} and {standing, walking, walking downstairs}, as FastGRNN's authors group them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDE = 224
SECOND = (1, 3, 5)  # of UCI HAR's activities, walking, walking downstairs and standing


def find(name: str, root: Path, facts: object) -> tuple[list[Path], Callable]:
    """The files of a set and a function that decodes them: train images or sequences, labels, then test.

    Raises FileNotFoundError when they are not there.
    """
    files, decode = {"imagenet": _folders, "har2_part": _subset}.get(name, _tables)(name, root, facts)
    if missing := [f for f in files if not f.exists()]:
        raise FileNotFoundError(f"No {name}: {missing[0]} is missing, and it cannot be fetched: see lottery.elsewhere.")
    return files, decode


def _folders(name, root, facts):
    parts = [root / name / part for part in ("train", "val")]
    images = [sorted(f for f in part.glob("*/*") if f.is_file()) for part in parts]

    def decode():
        classes = sorted(f.name for f in parts[0].iterdir() if f.is_dir())
        number = {c: i for i, c in enumerate(classes)}
        out = []
        for files in images:
            out += [np.stack([_middle(f) for f in files]), np.array([number[f.parent.name] for f in files])]
        return out

    return parts + [f for files in images for f in files], decode


def _middle(file):
    """uint8 [3, 224, 224]."""
    from PIL import Image

    with Image.open(file) as image:
        scale = 256 / min(image.size)
        size = [max(256, round(scale * side)) for side in image.size]
        image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    left, top = ((side - SIDE) // 2 for side in size)
    return np.asarray(image)[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1)


def _tables(name, root, facts):
    files = [root / name / f"{part}.npy" for part in ("train", "test")]

    def decode():
        features, steps, _ = facts.shape
        train, test = (np.load(f, allow_pickle=False) for f in files)
        x = [table[:, 1:].reshape(len(table), steps, features).transpose(0, 2, 1) for table in (train, test)]
        return _bytes(*x, *(table[:, 0].astype(np.int64) for table in (train, test)))

    return files, decode


def _subset(name, root, facts):
    file = root / "uci_har" / "inertial_subset.npz"

    def decode():
        with np.load(file, allow_pickle=False) as found:
            x = [found[f"X_{part}"] for part in ("train", "test")]
            y = [np.isin(found[f"y_{part}"], SECOND).astype(np.int64) for part in ("train", "test")]
        return _bytes(*x, *y)

    return [file], decode


def _bytes(train, test, train_y, test_y):
    """Sequences [N, features, steps] as uint8 [N, features, steps, 1], by the range of each feature in training."""
    low, high = (f(train, axis=(0, 2), keepdims=True) for f in (np.min, np.max))
    scale = 255 / np.maximum(high - low, 1e-12)
    train, test = (np.clip((x - low) * scale, 0, 255).round().astype(np.uint8)[..., None] for x in (train, test))
    return train, train_y, test, test_y
