"""Image sets as whole uint8 tensors in memory, split the way the papers split them; one's own data beside them.

A set is looked for under a data root (the `root` argument, else $LOTTERY_DATA, else a folder in the user's cache) as

1. Hugging Face parquet, `<root>/<name>/train-00000-of-00003.parquet` ...,
2. torchvision's own files, `<root>/MNIST/raw`, `<root>/cifar-10-batches-py` ...,
3. the files of Debian's package dataset-fashion-mnist (Fashion-MNIST only),
4. a download by torchvision into the root.

Whatever the source, the tensors and hence the fingerprint are the same. Decoded images are kept in the user's cache.

cifar10_16, a variant of ours for trainings of minutes on a CPU, is CIFAR-10 at 16x16: the mean of each 2x2 pixels,
rounded to a whole grey level, halves up. It is made from cifar10 in any of these forms, with a fingerprint of its own.

One's own data: `from_tensors`, `from_dataset`, `from_folder` (images in a folder for each class), `from_parquet`, or
`of`, which takes any of these.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import os
import re
import socket
import tempfile
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lottery import elsewhere
from lottery.files import of_user, path_of, publish, temporary


class Facts(NamedTuple):
    classes: int
    shape: tuple[int, int, int]  # C, H, W
    n_train: int
    n_test: int
    torchvision: tuple[str, str] | None = None  # class name, folder below the root


SETS = {
    "mnist": Facts(10, (1, 28, 28), 60_000, 10_000, ("MNIST", "MNIST/raw")),
    "cifar10": Facts(10, (3, 32, 32), 50_000, 10_000, ("CIFAR10", "cifar-10-batches-py")),
    "cifar100": Facts(100, (3, 32, 32), 50_000, 10_000, ("CIFAR100", "cifar-100-python")),
    "fashion_mnist": Facts(10, (1, 28, 28), 60_000, 10_000, ("FashionMNIST", "FashionMNIST/raw")),
    "digits": Facts(10, (1, 8, 8), 1_347, 450),
    "cifar10_16": Facts(10, (3, 16, 16), 50_000, 10_000),
    "imagenet": Facts(1000, (3, 224, 224), 1_281_167, 50_000),
    "google12": Facts(12, (32, 99, 1), 22_246, 3_081),
    "har2": Facts(2, (9, 128, 1), 7_352, 2_947),
    "har2_part": Facts(2, (9, 128, 1), 2_400, 950),
}
ELSEWHERE = ("imagenet", "google12", "har2", "har2_part")  # see lottery.elsewhere
IDX = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
FILES = {"MNIST": IDX, "FashionMNIST": IDX, "CIFAR10": CIFAR10_FILES, "CIFAR100": ["train", "test", "meta"]}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT = 10  # seconds without an answer after which a download counts as impossible
CACHE_FORMAT = 2  # raise it when decoding changes
EIGHT_BIT = ("1", "L", "P", "RGB", "YCbCr")  # Pillow's modes that are converted without loss


@dataclass(frozen=True)
class Split:
    """Images `x`, uint8 [N, C, H, W], and their class numbers `y`, int64 [N].

    One's own data may be float32 of any shape [N, …] and range, or int64 token numbers, which stay as they are.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """One set, split. `mean` and `std` are per channel, of all training images (validation included), for pixels / 255.

    `scale`: 255 for uint8; one's own float data are taken in their own units, with a scale of 1.
    `fingerprint` is the sha256 of the decoded pixels and labels before splitting, so it tells the set, not the split.
    `channels_last`: how images lie in memory when they are fed; False for a network that flattens them by `.view`.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    fingerprint: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    channels_last: bool = True

    def standard(self, x: Tensor) -> Tensor:
        """Examples [B, C, …] with each channel's mean subtracted and divided by its deviation; tokens as they are."""
        if x.dtype == torch.int64:
            return x
        mean, std = (torch.tensor(v).view(-1, *[1] * (x.dim() - 2)) for v in (self.mean, self.std))
        return (x / self.scale - mean) / std


def held_out(name: str, valid: int | None = None) -> int:
    """The number of validation images of `load`: None = 5,000 (digits 297)."""
    return valid if valid is not None else 297 if name == "digits" else 5_000


def load(
    name: str, root: Path | str | None = None, valid: int | None = None, balanced: bool = False, split_seed: int = 0
) -> Data:
    """Load mnist, cifar10, cifar100, fashion_mnist, digits, cifar10_16, or one of `lottery.elsewhere`.

    valid: number of validation images taken from the training set; None = 5,000 (digits 297), 0 = none.
    balanced: the same number of validation images from every class.
    split_seed: seed of the one permutation that orders the training set; its first `valid` images are `.valid` and the
    rest, in that order, `.train`, so every prefix of either is a random subset. torch's random state plays no part.

    CIFAR-100 comes in one order (by pixel bytes, then label), because its published copies differ in theirs; the other
    sets keep their original order before the permutation. digits (scikit-learn, 8x8) has grey levels 0..16, stored
    times 15; its last 450 images are the test set.

    Raises ValueError for a bad argument or damaged data and FileNotFoundError when the data cannot be had.
    """
    if name not in list(SETS):
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(SETS)}.")
    facts = SETS[name]
    valid = held_out(name, valid)
    if isinstance(valid, bool) or not isinstance(valid, Integral) or not 0 <= valid < facts.n_train:
        raise ValueError(f"Invalid valid {valid!r}: give a number of images, 0 <= valid < {facts.n_train}.")
    if balanced and valid % facts.classes:
        raise ValueError(f"Invalid valid {valid} with balanced=True: give a multiple of the {facts.classes} classes.")
    split_seed = check_seed(split_seed, "split_seed", numpy=True)

    arrays, fingerprint = _arrays(name, root)
    x, y = arrays["train_x"], arrays["train_y"]
    first, rest = _split(y, int(valid), facts.classes if balanced else None, split_seed)
    return Data(
        name, Split(x[rest], y[rest]), Split(x[first], y[first]), Split(arrays["test_x"], arrays["test_y"]),
        fingerprint, facts.classes, tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist()),
    )  # fmt: skip


def check_seed(seed: Any, name: str = "seed", numpy: bool = False) -> int:
    """A seed as Python's own number. Raises ValueError unless it is one for torch's generators, or for numpy's."""
    low, high, rule = (0, 2**32, f", 0 <= {name} < 2**32") if numpy else (-(2**63), 2**63, " of at most 64 bits")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not low <= seed < high:
        raise ValueError(f"Invalid {name} {seed!r}: give a whole number{rule}.")
    return int(seed)


def of(data: Any, **options: Any) -> Data:
    """Whatever holds data, as `Data`.

    data: a `Data`; a pair (x, y), see `from_tensors`; a dataset or a DataLoader, see `from_dataset`; the name of a set
    that `load` knows; a folder of images or a parquet file or folder, see `from_folder` and `from_parquet`. options: of
    that function.
    """
    if isinstance(data, Data):
        if options:
            raise ValueError(f"Data is split already: leave {', '.join(options)} out.")
        return data
    if _is_xy(data):
        return from_tensors(*data, **options)
    if isinstance(data, str | Path):
        if data in SETS:
            return load(data, **options)
        path = path_of(data)
        parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
        return (from_parquet if parquet else from_folder)(path, **options)
    if _is_many(data):
        return from_dataset(data, **options)
    raise ValueError(
        f"Invalid data of type {type(data).__name__}: give (x, y), a dataset, a folder, a name like 'mnist', or Data."
    )


def from_tensors(
    x: Any,
    y: Any,
    valid: Any = 0.1,
    test: Any = 0.2,
    seed: int = 0,
    classes: int | None = None,
    tokens: bool = False,
    name: str = "own",
) -> Data:
    """One's own examples in memory, split at random.

    Args:
        x: tensor or array [N, …]. uint8 images [N, C, H, W] or [N, H, W] are kept and divided by 255 when they are fed;
            floats of any range are taken as they are, in float32, and so are other integers and bool.
        y: class numbers 0 … classes − 1, [N], integers of any kind.
        valid, test: the share of the examples that is split off, or their number, or a pair (x, y) of its own, or a
            dataset as of `from_dataset`.
        seed: of the permutation that splits. classes: default, the largest label + 1.
        tokens: x are the numbers of tokens, [N, L], for an embedding: left as they are, int64.

    Raises ValueError: shapes that do not fit, NaN or infinity, labels that are no class numbers, a split that leaves
    nothing to train on.
    """
    seed, x, y = check_seed(seed, numpy=True), _examples(x, tokens), _labels(y)
    if not (classes is None or (isinstance(classes, Integral) and classes >= 1)):
        raise ValueError(f"Invalid classes {classes!r}: give their number, at least 1, or None.")
    _check_pairs(x, y, "y")
    apart = {"valid": valid, "test": test}
    given = {part: _pairs(value, part) for part, value in apart.items() if not isinstance(value, Real | None)}
    number = {part: _number(value, len(y), part) for part, value in apart.items() if part not in given}
    if sum(number.values()) >= len(y):
        raise ValueError(
            f"Invalid valid {valid!r}, test {test!r}: they leave none of the {len(y)} examples to train on."
        )
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(y)))
    splits = {}
    for part, n in number.items():
        splits[part], order = Split(x[order[:n]], y[order[:n]]), order[n:]
    for part, (own_x, own_y) in given.items():
        splits[part] = Split(_examples(own_x, tokens), _labels(own_y))
        _check_pairs(splits[part].x, splits[part].y, part)
        if splits[part].x.shape[1:] != x.shape[1:] or splits[part].x.dtype != x.dtype:
            raise ValueError(
                f"Invalid {part}: {splits[part].x.dtype} examples of shape {tuple(splits[part].x.shape[1:])}, those of "
                f"training are {x.dtype} {tuple(x.shape[1:])}."
            )
    return _own(name, Split(x[order], y[order]), splits["valid"], splits["test"], classes)


def from_dataset(dataset: Iterable[Any], valid: Any = 0.1, test: Any = 0.2, **options: Any) -> Data:
    """Every example of a `torch.utils.data.Dataset` or DataLoader, or of anything that gives pairs (x, y) in turn.

    x: tensor, array or PIL image, all of one shape; y: a class number. valid, test, options: as of `from_tensors`. A
    random transform is applied once, here: let `Recipe(augment=…)` do it.
    """
    return from_tensors(*_pairs(dataset), valid, test, **{"name": type(dataset).__name__, **options})


def from_folder(folder: Path | str, size: int | None = None, grey: bool = False, **options: Any) -> Data:
    """Images in a folder for each class, `<folder>/<class>/<image>`, or the same below `train`, `valid` and `test`.

    The parts may be in capitals, and the second `val` or `validation`.

    size: of the square that images are resized to (bilinear, the whole image); None: they are of one size already.
    grey: one channel instead of three. options: as of `from_tensors`; classes are numbered by their names in order,
        in every part as in `train`, whose classes need not all be in the others.

    Raises FileNotFoundError: no such folder; ValueError: no images, an unreadable one, sizes that differ, a class that
    `train` has not.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder {folder}: give the folder that holds one folder of images for each class.")
    named = {PARTS.get(path.name.lower()): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if "train" not in named or not any(path.is_dir() for path in named["train"].iterdir()):  # trains, beside buses
        return from_tensors(*_images(folder, size, grey), **{"name": folder.name, **options})
    parts = {part: _images(path, size, grey, named["train"]) for part, path in named.items() if part}
    return from_tensors(*parts.pop("train"), **{"name": folder.name, **parts, **options})


def from_parquet(path: Path | str, size: int | None = None, grey: bool = False, **options: Any) -> Data:
    """A parquet file, or a folder of `train-*.parquet`, `test-*.parquet`, …, as data hubs store image sets.

    Columns `image` (or `img`) with the encoded images and `label` (or `fine_label`); without an image column all other
    columns are numbers, the features. size, grey: as of `from_folder`. options: as of `from_tensors`.

    Raises FileNotFoundError: no such file; ValueError: a damaged one, a column that is missing, of another kind or with
    missing values, as `from_tensors`.
    """
    path = path_of(path)
    files = {part: sorted(path.glob(f"{part}*.parquet")) for part in PARTS} if path.is_dir() else {}
    if not path.exists() or (path.is_dir() and not files["train"]):
        raise FileNotFoundError(f"No parquet at {path}: give a file, or a folder that holds train-*.parquet.")
    read = functools.partial(_table, size=size, grey=grey, train=path if path.is_file() else files["train"][0])
    if path.is_file():
        return from_tensors(*read([path]), **{"name": path.stem, **options})
    files["valid"] = files["valid"] or files["val"]
    parts = {part: read(files[part]) for part in ("train", "valid", "test") if files[part]}
    return from_tensors(*parts.pop("train"), **{"name": path.name, **parts, **options})


PARTS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}  # what they hold
IMAGES, LABELS = ("image", "img"), ("label", "fine_label")  # what data hubs call the columns


def _own(name, train, valid, test, classes):
    """One's own splits as `Data`, with moments and fingerprint."""
    y = torch.cat([part.y for part in (train, valid, test)])
    found = int(y.max()) + 1
    if int(y.min()) < 0 or (classes is not None and found > classes):
        top = found - 1 if classes is None else classes - 1
        raise ValueError(f"Invalid labels {int(y.min())} … {found - 1}: give class numbers 0 … {top}.")
    both = torch.cat([train.x, valid.x])
    scale = 255.0 if both.dtype == torch.uint8 else 1.0
    if both.dtype == torch.uint8:
        mean, std = _moments(both)
    elif both.dtype == torch.int64:
        mean, std = torch.zeros(1), torch.ones(1)
    else:
        values = both.double().transpose(0, 1).flatten(1)
        mean, std = values.mean(1), values.std(1, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a channel that never changes
    arrays = {"train_x": both, "train_y": torch.cat([train.y, valid.y]), "test_x": test.x, "test_y": test.y}
    fingerprint = _fingerprint(arrays)
    moments = tuple(mean.tolist()), tuple(std.tolist())
    return Data(name, train, valid, test, fingerprint, int(classes or found), *moments, scale)


def _as_tensor(what, values, rule):
    """Values of any kind as a tensor; numpy knows tables, and lists of arrays."""
    try:
        values = values if isinstance(values, Tensor | np.ndarray) else np.array(values)
        if np.ma.is_masked(values):
            raise ValueError(f"{np.ma.count_masked(values)} values are missing")
        values = torch.as_tensor(values).detach().cpu()
        return values.dequantize() if values.is_quantized else values.to_dense()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Invalid {what}: give {rule} ({_last_line(error)}).") from None


def _examples(x, tokens):
    """One's own x as a tensor that trainings take."""
    x = _as_tensor("x", x, "numbers: a tensor or an array [N, …]")
    if tokens:
        if x.is_floating_point() or x.dim() < 2 or not x.numel():
            raise ValueError(f"Invalid x with tokens=True: {x.dtype} {tuple(x.shape)}; give integers [N, L].")
        return x.long().contiguous()
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"Invalid x of shape {tuple(x.shape)}: give examples [N, …], such as images [N, C, H, W].")
    if x.is_complex():
        raise ValueError(f"Invalid x of {x.dtype}: give real numbers.")
    if x.dim() == 4 and x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"Invalid x of shape {tuple(x.shape)}: images are [N, C, H, W] here; give x.permute(0, 3, 1, 2)."
        )
    if x.dtype == torch.uint8:
        return (x[:, None] if x.dim() == 3 else x).contiguous()
    x = x.float().contiguous()
    if not x.isfinite().all():
        raise ValueError(f"Invalid x: {int((~x.isfinite()).sum())} values are NaN or infinite; clean the data first.")
    return x


def _labels(y):
    """One's own y as class numbers."""
    y = _as_tensor("y", y, "class numbers [N]")
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() != 1 or y.is_complex() or (y.is_floating_point() and not (y == y.long()).all()):
        raise ValueError(
            f"Invalid y, {y.dtype} of shape {tuple(y.shape)}: give class numbers [N]; for one-hot rows y.argmax(1)."
        )
    return y.long()


def _check_pairs(x, y, what):
    if len(x) != len(y):
        raise ValueError(f"Invalid {what}: {len(y)} labels for {len(x)} examples.")


def _number(value, n, what):
    """A number of examples from a share or a number."""
    share = isinstance(value, Real) and value < 1
    if isinstance(value, bool) or not (share or isinstance(value, Integral)) or not 0 <= value < n:
        raise ValueError(f"Invalid {what} {value!r}: give a share below 1, a number below {n}, or a pair (x, y).")
    return round(value * n) if share and not isinstance(value, Integral) else int(value)


def _is_xy(data):
    """Whether data are (x, y), and not two examples in a list, each of which ends with its class number."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return False
    twos = all(isinstance(one, tuple | list) and len(one) == 2 for one in data)
    return not (twos and all(isinstance(y, Real) or getattr(y, "ndim", None) == 0 for _, y in data))


def _is_many(data):
    """Whether data may be gone through one by one, as a mapping of splits or columns, or a single number, may not."""
    single = isinstance(data, Mapping) or getattr(data, "ndim", 1) == 0
    return not single and (hasattr(data, "__getitem__") or hasattr(data, "__iter__"))


def _pairs(dataset, what="dataset"):
    """All of a dataset as (x, y); of a DataLoader the batches end to end."""
    if _is_xy(dataset):
        return dataset
    if not _is_many(dataset):
        raise ValueError(f"Invalid {what} {dataset!r:.80}: give (x, y), or a dataset of such pairs.")
    batched, xs, ys = isinstance(dataset, torch.utils.data.DataLoader), [], []
    finite = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not batched
    for i, example in enumerate((dataset[i] for i in range(len(dataset))) if finite else dataset):
        if not (isinstance(example, tuple | list) and len(example) == 2):
            raise ValueError(f"Invalid {what}: give one whose examples are pairs (x, y).")
        x, y = _tensor(example[0], f"{i} of the {what}"), _as_tensor("y", example[1], "class numbers")
        whole = batched and y.dim()  # of a loader without batches the examples come one by one
        xs.append(x if whole else x[None])
        ys.append(y if whole else y[None])
    if not xs:
        raise ValueError(f"Invalid {what}: it has no examples.")
    if len(shapes := {tuple(x.shape[1:]) for x in xs}) > 1:
        raise ValueError(
            f"Invalid {what}: examples of {len(shapes)} shapes, such as {sorted(shapes)[:2]}; resize them."
        )
    return torch.cat(xs), torch.cat(ys)


def _tensor(x, name):
    """An example as a tensor; a PIL image as of `_pixels`, grey if it has no colours."""
    if hasattr(x, "getbands"):
        return _pixels(_opened(getattr(x, "filename", "") or name, lambda: x, x.mode in ("1", "L", "LA")))
    return _as_tensor("x", x, "tensors, arrays or PIL images")


def _pixels(image):
    """A PIL image, grey or RGB, as uint8 [C, H, W]."""
    pixels = torch.from_numpy(np.asarray(image).copy())
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def class_numbers(folder: Path, train: Path | None = None) -> dict[str, int]:
    """The classes of a folder with one folder of images for each, numbered by their names in order: `{name: number}`.

    train: the folder of the training part, whose numbers hold for every part, also for one that has not all classes.

    Raises ValueError: a class that the training part has not.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    known = {name: i for i, name in enumerate(names)} if train in (None, folder) else class_numbers(train)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"Unknown classes in {folder}: {', '.join(unknown)}; add them to {train}, or remove them.")
    return {name: known[name] for name in names}


def _images(folder, size, grey, train=None):
    """The images of a folder for each class, uint8 [N, C, H, W], and their class numbers, as of `class_numbers`."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    classes = class_numbers(folder, train)
    try:
        found = make_dataset(folder, classes, IMG_EXTENSIONS)
    except (FileNotFoundError, ValueError) as error:  # a class without images, no class
        why = f"it has to hold one folder of images for each class ({str(error).partition('. ')[0].rstrip('.')})"
        raise ValueError(f"No images in {folder}: {why}.") from None
    if all(Path(path).parents[1] != folder for path, _ in found):
        deep = f"{Path(found[0][0]).parent} is a folder too deep; parts are called train, valid and test"
        raise ValueError(f"No images in the folders of {folder}: {deep}.")
    paths, labels = zip(*found, strict=True)
    return _decoded({path: Path(path) for path in paths}, size, grey), torch.tensor(labels)


def _decoded(files, size, grey):
    """Images `{name: path, or encoded bytes}` as uint8 [N, C, H, W]."""
    from PIL import Image

    if not (size is None or (isinstance(size, Integral) and size >= 1)):
        raise ValueError(f"Invalid size {size!r}: give the side in pixels, a whole number from 1, or None.")

    def decode(name, file):
        raw = lambda: io.BytesIO(file.read_bytes() if isinstance(file, Path) else file)  # noqa: E731
        image = _opened(name, lambda: Image.open(raw()), grey)
        return _pixels(image if size is None else image.resize((size, size), Image.Resampling.BILINEAR))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        images = list(pool.map(decode, files, files.values()))
    if len(sizes := {tuple(image.shape[1:]) for image in images}) > 1:
        raise ValueError(f"Images of {len(sizes)} sizes, such as {sorted(sizes)[:2]}: give size=32 to resize them.")
    return torch.stack(images)


def _table(files, size, grey, train):
    """(x, y) of parquet files; features are the columns of the file `train`, in its order."""
    import pyarrow
    import pyarrow.parquet as pq
    from pyarrow import types

    tables, image, label = _parquet(files)
    numbers = (types.is_integer, types.is_floating, types.is_boolean)
    named = pq.read_schema(train).names if image is None else []
    features = [name for name in named if name not in LABELS and not name.startswith("__index_level_")]  # pandas' rows
    if image is None and not features:
        raise ValueError(f"No features in {train}: it has no column but {label!r}.")
    if missing := [name for name in features if name not in tables[0].column_names]:
        raise ValueError(f"No column {missing[0]!r} in {files[0]}: {train} has it.")
    for file, table in zip(files, tables, strict=True):
        _check_column(file, label, table[label], numbers, "class numbers, whole numbers from 0")
        for name in features:
            _check_column(file, name, table[name], (*numbers, types.is_decimal), "numbers, or leave the column out")
        if image:
            kinds = (types.is_binary, types.is_large_binary)
            _check_column(file, image, _encoded(table[image]), kinds, "encoded images, as bytes")
    table = pyarrow.concat_tables(tables)
    y = torch.tensor(table[label].to_pylist())
    if image:
        names = [f"{i} of {file}" for file, table in zip(files, tables, strict=True) for i in range(len(table))]
        return _decoded(dict(zip(names, _encoded(table[image]).to_pylist(), strict=True)), size, grey), y
    return torch.from_numpy(np.stack([table[name].to_numpy() for name in features], 1).astype(np.float32)), y


def _parquet(files):
    """The tables of parquet files that belong together, and what their images (None: none) and labels are called."""
    import pyarrow
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"Unreadable parquet {file}: {_last_line(error)}") from None
        if tables[-1].schema != tables[0].schema:
            raise ValueError(f"Unreadable parquet {file}: it has other columns than {files[0]}, or of other types.")
    names = tables[0].column_names
    image, label = (next(filter(names.__contains__, known), None) for known in (IMAGES, LABELS))
    if label is None:
        raise ValueError(f"No column 'label' in {files[0]}: it has {', '.join(names)}.")
    return tables, image, label


def _encoded(column):
    """Of images as data hubs store them, a struct of bytes and path, the bytes."""
    import pyarrow.compute
    from pyarrow import types

    held = types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    return pyarrow.compute.struct_field(column, "bytes") if held else column


def _check_column(file, name, column, kinds, rule):
    if not any(kind(column.type) for kind in kinds):
        raise ValueError(f"Invalid column {name!r} in {file}: it holds {column.type}; give {rule}.")
    if column.null_count:
        missing = f"{column.null_count} of {len(column)} values are missing"
        raise ValueError(f"Invalid column {name!r} in {file}: {missing}; fill them in, or leave the rows out.")


def _split(y, valid, classes, seed):
    # RandomState's stream is frozen for good; torch.randperm and numpy's newer Generator may change between releases.
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(y)))
    chosen = torch.zeros(len(y), dtype=torch.bool)
    if classes is None:
        chosen[:valid] = True
    else:
        for c in range(classes):
            members = (y[order] == c).nonzero().flatten()
            if len(members) < valid // classes:
                raise ValueError(f"Invalid valid {valid} with balanced=True: class {c} has only {len(members)} images.")
            chosen[members[: valid // classes]] = True
    return order[chosen], order[~chosen]


def moves(n: int, side: int, generator: torch.Generator | None) -> Tensor:
    """Random moves for `flip_crop`, int64 [n, 3] on the CPU: flip (0 or 1), first row and first column of the crop.

    side: of the images, the shorter one.
    """
    flip = torch.randint(2, (n, 1), generator=generator)
    return torch.cat([flip, torch.randint(2 * _padding(side) + 1, (n, 2), generator=generator)], 1)


def flip_crop(x: Tensor, moves: Tensor) -> Tensor:
    """Augmented images: each is flipped left to right or not, padded with black, and cropped back to its size.

    The padding is the field's 4 pixels, but at most an eighth of the shorter side: 2 at 16x16, as in proportion to
    32x32.

    Args:
        x: [B, C, H, W], of any dtype, before normalisation (black is 0).
        moves: as from the function of that name, on the device of x.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, [_padding(min(height, width))] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # every crop, a view
    crops = windows[torch.arange(len(x), device=x.device), :, moves[:, 1], moves[:, 2]]
    return torch.where(moves[:, 0].view(-1, 1, 1, 1) == 1, crops.flip(3), crops)


def _padding(side):
    return min(4, side // 8)


# Where things are -----------------------------------------------------------------------------------------------------


def _root(root) -> Path:
    origin, given = ("root", root) if root is not None else ("LOTTERY_DATA", os.environ.get("LOTTERY_DATA"))
    if root is None and not given:
        return of_user("cache") / "data"
    with contextlib.suppress(RuntimeError):  # ~somebody who is not here
        given = Path(given).expanduser()
    if not (folder := Path(given)).is_dir():
        raise ValueError(f"Invalid {origin} {str(given)!r}: no such folder; give the folder that holds the data sets.")
    return folder


def _find(name, root):
    """The files of the first source that is there, and a function that decodes them; None if there is none."""
    cls, folder = SETS[name].torchvision
    if any((root / name).glob("*.parquet")):
        shards = [_shards(root / name, part) for part in ("train", "test")]
        return [f for files in shards for f in files], lambda: _read_parquet(name, shards)
    if files := _complete(root / folder, FILES[cls]):
        return files, lambda: [_read_idx(f) for f in files] if FILES[cls] is IDX else _read_cifar(cls, root)
    if name == "fashion_mnist" and (files := _complete(DEBIAN, IDX)):
        return files, lambda: [_read_idx(f) for f in files]
    return None


def _complete(folder, names):
    """The named files of a folder (or their .gz), none if it has none of them; an error if it has only some."""
    found = [next((f for f in (folder / n, folder / f"{n}.gz") if f.is_file()), None) for n in names]
    if any(found) and not all(found):
        missing = names[found.index(None)]
        raise ValueError(f"Incomplete data in {folder}: no {missing}; complete the folder or remove it.")
    return found if all(found) else []


def _shards(folder, part):
    pattern = re.compile(part + r"-(\d{5})-of-(\d{5})(-\w+)?\.parquet")
    found = {f: m.groups() for f in sorted(folder.iterdir()) if (m := pattern.fullmatch(f.name))}
    total = max((of for _, of, _ in found.values()), default="00001")
    for i in range(int(total)):
        if not any(numbers[:2] == (f"{i:05d}", total) for numbers in found.values()):
            raise ValueError(f"Incomplete data in {folder}: no {part}-{i:05d}-of-{total}.parquet; add it.")
    if len(found) != int(total):
        raise ValueError(f"Ambiguous data in {folder}: {len(found)} {part} shards where {int(total)} belong together.")
    return list(found)


# From files to tensors ------------------------------------------------------------------------------------------------


def _arrays(name, root):
    """The unsplit set as {train_x, train_y, test_x, test_y, mean, std} and its fingerprint, from cache if possible."""
    if name == "cifar10_16":
        return _halved(_arrays("cifar10", root)[0])
    if name == "digits":
        source, decode = version("scikit-learn"), _read_digits  # cached as well: importing scikit-learn takes seconds
    else:
        folder = _root(root)
        files, decode = (
            elsewhere.find(name, folder, SETS[name])
            if name in ELSEWHERE
            else _find(name, folder) or _download(name, folder)
        )
        source = [(str(f.resolve()), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((CACHE_FORMAT, source)).encode()).hexdigest()[:16]
    cache = of_user("cache") / "decoded" / f"{name}-{key}.safetensors"
    if cached := _read_cache(cache):
        return cached
    where = "scikit-learn" if name == "digits" else files[0].parent
    try:
        parts = decode()
    except Exception as e:  # on damaged bytes the decoders raise whatever they like
        raise ValueError(f"Unreadable data in {where}: {_last_line(e)}") from None
    arrays = _check(name, where, *parts)
    fingerprint = _fingerprint(arrays)
    _write_cache(cache, arrays, fingerprint)
    return arrays, fingerprint


def _halved(arrays):
    """The set at half the side: of each 2x2 pixels the mean, halves up."""
    for key in ("train_x", "test_x"):
        n, c, h, w = arrays[key].shape
        sums = arrays[key].view(n, c, h // 2, 2, w // 2, 2).sum((3, 5), dtype=torch.int16)
        arrays[key] = ((sums + 2) // 4).to(torch.uint8)
    arrays["mean"], arrays["std"] = _moments(arrays["train_x"])
    return arrays, _fingerprint(arrays)


def _check(name, where, *parts):
    """The decoded parts (train images and labels, then test) as tensors, if they are what the set must be."""
    facts, arrays = SETS[name], {}
    for part, n, x, y in (("train", facts.n_train, *parts[:2]), ("test", facts.n_test, *parts[2:])):
        if len(x) != n or len(y) != n:
            raise ValueError(f"Wrong data in {where}: {len(x)} {part} images, {len(y)} labels; {name} has {n}.")
        if x.size != n * prod(facts.shape):
            raise ValueError(f"Wrong data in {where}: {part} images of shape {x.shape[1:]}; {name} has {facts.shape}.")
        if y.min() < 0 or y.max() >= facts.classes:
            raise ValueError(f"Wrong data in {where}: {part} labels {y.min()}..{y.max()}, not 0..{facts.classes - 1}.")
        x, y = np.ascontiguousarray(x).reshape(n, *facts.shape), np.asarray(y, dtype=np.int64)
        if name == "cifar100":  # the one canonical order; a label fits in a byte
            rows = np.concatenate([x.reshape(n, -1), y[:, None].astype(np.uint8)], axis=1)
            order = np.argsort(rows.view(f"V{rows.shape[1]}").ravel(), kind="stable")
            x, y = x[order], y[order]
        arrays |= {f"{part}_x": torch.tensor(x), f"{part}_y": torch.tensor(y)}
    arrays["mean"], arrays["std"] = _moments(arrays["train_x"])
    return arrays


def _moments(x):
    """Mean and standard deviation of each channel, float64, exact because they come from counts of the 256 values."""
    counts = sum(torch.stack([c.flatten().bincount(minlength=256) for c in part.unbind(1)]) for part in x.split(5_000))
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    return mean, (share * (values - mean[:, None]) ** 2).sum(1).sqrt()


def _fingerprint(arrays):
    digest = hashlib.sha256()
    for key in ("train_x", "train_y", "test_x", "test_y"):
        digest.update(repr((key, tuple(arrays[key].shape))).encode())
        digest.update(arrays[key].numpy())
    return digest.hexdigest()


def _read_digits():
    from sklearn.datasets import load_digits

    digits, n = load_digits(), SETS["digits"].n_train
    x = (digits.images * 15).astype(np.uint8)
    return x[:n], digits.target[:n], x[n:], digits.target[n:]


def _read_parquet(name, shards):
    import pyarrow

    parts = []
    for files in shards:
        tables, image, label = _parquet(files)
        table = pyarrow.concat_tables(tables)
        parts += [_decode(SETS[name].shape, table[image].to_pylist()), table[label].to_numpy()]
    return parts


def _decode(shape, images):
    """Pixels, uint8 [N, C, H, W], of encoded images (PNG, WebP: Pillow finds out); Pillow works outside the GIL."""
    from PIL import Image

    channels, height, width = shape
    pixels = np.empty((len(images), height, width, channels), np.uint8)

    def decode(start):
        for i in range(start, min(start + 500, len(images))):
            image = _eight_bit(Image.open(io.BytesIO(images[i]["bytes"])), channels == 1)
            if image.size != (width, height):
                raise ValueError(f"image {i} has {image.size[0]} x {image.size[1]} pixels, not {width} x {height}")
            pixels[i] = np.asarray(image).reshape(pixels.shape[1:])

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(images), 500)))
    return pixels.transpose(0, 3, 1, 2)


def _opened(name, opens, grey):
    """A Pillow image as of `_eight_bit`; what is wrong with it is told with its name."""
    try:
        return _eight_bit(opens(), grey)
    except Exception as error:  # on damaged bytes Pillow raises whatever it likes
        why = _last_line(error).partition(" <_io")[0].rstrip(".")  # which is where its bytes are in memory
        do = "" if isinstance(error, ValueError) else "; remove it"
        raise ValueError(f"Unreadable image {name}: {why}{do}.") from None


def _eight_bit(image, grey):
    """A Pillow image as grey or colour. Raises ValueError where the conversion would clip, or drop what is transparent.

    Of 16 bits Pillow keeps some; alpha it leaves away, with all that is drawn in it.
    """
    alpha = image.getchannel("A").getextrema() if image.mode in ("LA", "RGBA") else (255, 255)
    if "transparency" in image.info or alpha != (255, 255):
        raise ValueError(f"an image is partly transparent (mode {image.mode}): save it on a background")
    if image.mode not in (*EIGHT_BIT, "LA", "RGBA") or ";16" in str(getattr(image, "tile", "")):
        raise ValueError(f"an image has more than 8 bits a channel, or other colours (mode {image.mode}): convert it")
    return image.convert("L" if grey else "RGB")


def _read_idx(file):
    """The array in one file of MNIST's own format: 0, 0, 8 (bytes), number of sizes, sizes (big-endian), values."""
    damaged = (gzip.BadGzipFile, EOFError, zlib.error, IndexError, ValueError)  # they do not say in which file
    with contextlib.suppress(*damaged):
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        start = 4 + 4 * raw[3]
        sizes = np.frombuffer(raw[4:start], ">u4").tolist()
        if raw[:3] == b"\0\0\x08" and len(raw) == start + prod(sizes):
            return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)
    raise ValueError(f"{file.name} is not a complete IDX file of bytes")


def _read_cifar(cls, root):
    import torchvision.datasets

    try:  # torchvision unpickles only files with the published md5 sums
        train, test = (getattr(torchvision.datasets, cls)(root, train=part) for part in (True, False))
    except RuntimeError:
        raise ValueError("md5 sums differ from the published ones") from None
    return [a for part in (train, test) for a in (part.data.transpose(0, 3, 1, 2), np.array(part.targets))]


_fetching = threading.Lock()  # it changes sys.stdout and the default timeout of all threads


def _download(name, root):
    """Let torchvision fetch the set unless another thread did while this one waited; what _find then finds."""
    with _fetching:
        return _find(name, root) or _fetch(name, root)


def _fetch(name, root):
    """Let torchvision fetch the set, then move it into the root in one step, so that parallel loads are safe.

    Returns what _find then finds.
    """
    import torchvision.datasets

    cls, folder = SETS[name].torchvision
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as tmp, contextlib.redirect_stdout(io.StringIO()):
            getattr(torchvision.datasets, cls)(tmp, download=True)
            (root / folder).parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # another process was first
                (Path(tmp) / folder).rename(root / folder)
    except Exception as e:  # each library below torchvision has its own way to say that there is no network
        raise FileNotFoundError(
            f"No {name} under {root} and no download ({_last_line(e)}): set LOTTERY_DATA to a folder with "
            f"{name}/train-*.parquet and {name}/test-*.parquet (Hugging Face layout), or put torchvision's files into "
            f"{root / folder}, or run once with network access."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return _find(name, root)


def _last_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


# The cache of decoded sets --------------------------------------------------------------------------------------------


def _read_cache(file):
    """What _write_cache wrote, memory-mapped; None if it is missing or does not match its own fingerprint."""
    try:
        with safe_open(file, "pt") as f:
            arrays = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
            fingerprint = f.metadata()["fingerprint"]
        return (arrays, fingerprint) if _fingerprint(arrays) == fingerprint else None
    except (OSError, SafetensorError, KeyError, TypeError):
        return None


def _write_cache(file, arrays, fingerprint):
    # A full disk or a read-only home must not stop anyone.
    with contextlib.suppress(OSError, SafetensorError), temporary(file) as mine:
        save_file(arrays, mine, {"fingerprint": fingerprint})
        publish(mine, file)
