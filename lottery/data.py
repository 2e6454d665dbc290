"""Image sets as whole uint8 tensors in memory, split the way the papers split them.

A set is looked for under a data root (the `root` argument, else $LOTTERY_DATA, else a folder in the user's cache) as

1. Hugging Face parquet, `<root>/<name>/train-00000-of-00003.parquet` ...,
2. torchvision's own files, `<root>/MNIST/raw`, `<root>/cifar-10-batches-py` ...,
3. the files of Debian's package dataset-fashion-mnist (Fashion-MNIST only),
4. a download by torchvision into the root.

Whatever the source, the tensors and hence the fingerprint are the same. Decoded images are kept in the user's cache.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import re
import socket
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
}
IDX = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
FILES = {"MNIST": IDX, "FashionMNIST": IDX, "CIFAR10": CIFAR10_FILES, "CIFAR100": ["train", "test", "meta"]}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT = 10  # seconds without an answer after which a download counts as impossible
CACHE_FORMAT = 1  # raise it when decoding changes


@dataclass(frozen=True)
class Split:
    """Images `x`, uint8 [N, C, H, W], and their class numbers `y`, int64 [N]."""

    x: Tensor
    y: Tensor

    def __len__(self):
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """One set, split. `mean` and `std` are per channel, of all training images (validation included), for pixels / 255.

    `fingerprint` is the sha256 of the decoded pixels and labels before splitting, so it tells the set, not the split.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    fingerprint: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name, root=None, valid=None, balanced=False, split_seed=0) -> Data:
    """Load mnist, cifar10, cifar100, fashion_mnist or digits.

    valid: number of validation images taken from the training set; None = 5,000 (digits 297), 0 = none.
    balanced: the same number of validation images from every class.
    split_seed: seed of the one permutation that orders the training set; its first `valid` images are `.valid` and the
    rest, in that order, `.train`, so every prefix of either is a random subset. torch's random state plays no part.

    CIFAR-100 comes in one order (by pixel bytes, then label), because its published copies differ in theirs; the other
    sets keep their original order before the permutation. digits (scikit-learn, 8x8) has grey levels 0..16, stored
    times 15; its last 450 images are the test set.

    Raises ValueError for a bad argument or damaged data and FileNotFoundError when the data cannot be had.
    """
    if name not in SETS:
        raise ValueError(f"Unknown data set {name!r}: choose one of {', '.join(SETS)}.")
    facts = SETS[name]
    if valid is None:
        valid = 297 if name == "digits" else 5_000
    if isinstance(valid, bool) or not isinstance(valid, int) or not 0 <= valid < facts.n_train:
        raise ValueError(f"Invalid valid {valid!r}: give a number of images, 0 <= valid < {facts.n_train}.")
    if balanced and valid % facts.classes:
        raise ValueError(f"Invalid valid {valid} with balanced=True: give a multiple of the {facts.classes} classes.")
    if isinstance(split_seed, bool) or not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
        raise ValueError(f"Invalid split_seed {split_seed!r}: give a whole number, 0 <= split_seed < 2**32.")

    arrays, fingerprint = _digits() if name == "digits" else _images(name, _root(root))
    x, y = arrays["train_x"], arrays["train_y"]
    first, rest = _split(y, valid, facts.classes if balanced else None, split_seed)
    return Data(
        name, Split(x[rest], y[rest]), Split(x[first], y[first]), Split(arrays["test_x"], arrays["test_y"]),
        fingerprint, facts.classes, tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist()),
    )  # fmt: skip


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


# Where things are -----------------------------------------------------------------------------------------------------


def _user_cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    # A user without a home gets a place that can never be created, so that nothing is cached.
    return (folder if folder.is_absolute() else Path(os.devnull)) / "lottery"


def _root(root) -> Path:
    origin = "root" if root is not None else "LOTTERY_DATA"
    given = root if root is not None else os.environ.get("LOTTERY_DATA")
    if not given:
        return _user_cache() / "data"
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(f"Invalid {origin} {str(given)!r}: no such folder; give the folder that holds the data sets.")
    return folder


def _find(name, root):
    """The files of the first source that is there, and a function that decodes them; None if there is none."""
    cls, folder = SETS[name].torchvision
    if any((root / name).glob("*.parquet")):
        shards = [_shards(root / name, part) for part in ("train", "test")]
        return [f for files in shards for f in files], lambda: _read_parquet(name, root / name, shards)
    if files := _complete(root / folder, FILES[cls]):
        if FILES[cls] is IDX:
            return files, lambda: [_read_idx(f) for f in files]
        return files, lambda: _read_cifar(cls, root)
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


def _images(name, root):
    """The unsplit set as {train_x, train_y, test_x, test_y, mean, std} and its fingerprint, from cache if possible."""
    source = _find(name, root)
    if source is None:
        _download(name, root)
        source = _find(name, root)
    files, decode = source
    stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((CACHE_FORMAT, stats)).encode()).hexdigest()[:16]
    cache = _user_cache() / "decoded" / f"{name}-{key}.safetensors"
    return _read_cache(cache) or _write_cache(cache, *_check(name, files[0].parent, decode()))


def _check(name, folder, parts):
    facts = SETS[name]
    arrays = {}
    for part, n, x, y in (("train", facts.n_train, *parts[:2]), ("test", facts.n_test, *parts[2:])):
        if len(x) != n or len(y) != n:
            raise ValueError(f"Wrong data in {folder}: {len(x)} {part} images, {len(y)} labels; {name} has {n}.")
        x, y = np.ascontiguousarray(x).reshape(n, *facts.shape), np.asarray(y, dtype=np.int64)
        if y.min() < 0 or y.max() >= facts.classes:
            raise ValueError(f"Wrong data in {folder}: {part} labels {y.min()}..{y.max()}, not 0..{facts.classes - 1}.")
        if name == "cifar100":  # the one canonical order; a label fits in a byte
            rows = np.concatenate([x.reshape(n, -1), y[:, None].astype(np.uint8)], axis=1)
            order = np.argsort(rows.view(f"V{rows.shape[1]}").ravel(), kind="stable")
            x, y = x[order], y[order]
        arrays |= {f"{part}_x": torch.tensor(x), f"{part}_y": torch.tensor(y)}
    return _finish(arrays)


def _finish(arrays):
    x = arrays["train_x"]
    counts = torch.stack([torch.stack([c.bincount(minlength=256) for c in image]) for image in _chunks(x)]).sum(0)
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return arrays | {"mean": mean, "std": std}, _fingerprint(arrays)


def _chunks(x):
    """Pieces of the images as [C, n], small enough for bincount's 64-bit copies."""
    return (chunk.transpose(0, 1).flatten(1) for chunk in x.split(5_000))


def _fingerprint(arrays):
    digest = hashlib.sha256()
    for key in ("train_x", "train_y", "test_x", "test_y"):
        digest.update(repr((key, tuple(arrays[key].shape))).encode())
        digest.update(arrays[key].numpy())
    return digest.hexdigest()


def _digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images * 15, dtype=torch.uint8)[:, None]
    y = torch.tensor(digits.target, dtype=torch.int64)
    n = SETS["digits"].n_train
    return _finish({"train_x": x[:n], "train_y": y[:n], "test_x": x[n:], "test_y": y[n:]})


def _read_parquet(name, folder, shards):
    import pyarrow
    import pyarrow.parquet as pq

    parts = []
    for files in shards:
        try:
            table = pyarrow.concat_tables([pq.read_table(f) for f in files])
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"Unreadable data in {folder}: {str(e).splitlines()[0]}") from None
        image, label = (next((c for c in cs if c in table.column_names), None)
                        for cs in (("image", "img"), ("fine_label", "label")))  # fmt: skip
        if image is None or label is None:
            raise ValueError(f"Wrong data in {folder}: columns {table.column_names} have no image or no label.")
        parts += [_decode(name, folder, table[image].to_pylist()), table[label].to_numpy()]
    return parts


def _decode(name, folder, images):
    """Pixels, uint8 [N, C, H, W], of the encoded images (PNG, WebP: Pillow finds out); a thread per core."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = SETS[name].shape
    pixels = np.empty((len(images), height, width, channels), np.uint8)

    def decode(i):
        for j in range(i, min(i + 500, len(images))):
            image = Image.open(io.BytesIO(images[j]["bytes"]))
            if image.size != (width, height):
                raise ValueError(f"image {j} is {image.size[0]}x{image.size[1]}, not {width}x{height}")
            pixels[j] = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(pixels.shape[1:])

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        try:
            list(pool.map(decode, range(0, len(images), 500)))
        except (UnidentifiedImageError, OSError, ValueError, TypeError, KeyError) as e:
            raise ValueError(f"Unreadable data in {folder}: {e}") from None
    return pixels.transpose(0, 3, 1, 2)


def _read_idx(file):
    """The array in one file of the format of http://yann.lecun.com/exdb/mnist, gzipped or not."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"Unreadable data in {file}: {e}") from None
    sizes = np.frombuffer(raw[4 : 4 + 4 * raw[3]], ">u4").tolist() if raw[:3] == b"\0\0\x08" else []
    if not sizes or len(raw) != 4 + 4 * len(sizes) + math.prod(sizes):
        raise ValueError(f"Unreadable data in {file}: not a complete IDX file of bytes.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def _read_cifar(cls, root):
    import torchvision.datasets

    parts = []
    for train in (True, False):
        try:  # torchvision compares md5 sums before it unpickles
            part = getattr(torchvision.datasets, cls)(root, train=train)
        except RuntimeError as e:
            raise ValueError(f"Unreadable data in {root / SETS[cls.lower()].torchvision[1]}: {e}") from None
        parts += [part.data.transpose(0, 3, 1, 2), np.array(part.targets)]
    return parts


def _download(name, root):
    """Let torchvision fetch the set, then move it into the root in one step, so that parallel loads are safe."""
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
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise FileNotFoundError(
            f"No {name} under {root} and no download ({reason}): set LOTTERY_DATA to a folder with "
            f"{name}/train-*.parquet and {name}/test-*.parquet (Hugging Face layout), or put torchvision's files into "
            f"{root / folder}, or run once with network access."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


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
    with contextlib.suppress(OSError, SafetensorError):  # a full disk or a read-only home must not stop anyone
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as tmp:
            save_file(arrays, Path(tmp) / file.name, {"fingerprint": fingerprint})
            os.replace(Path(tmp) / file.name, file)
    return arrays, fingerprint
