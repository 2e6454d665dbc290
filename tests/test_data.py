"""lottery.data on small generated sets in every layout that it reads; on the real sets where LOTTERY_DATA has them."""

import concurrent.futures as futures
import gzip
import hashlib
import io
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets
from PIL import Image

from lottery import data

N_TRAIN, N_TEST = 60, 20
REAL = os.environ.get("LOTTERY_DATA")
FILE_SETS = [name for name, facts in data.SETS.items() if facts.torchvision]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """Sets of 60 + 20 images, an empty cache, no LOTTERY_DATA, no Debian package and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LOTTERY_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "nothing")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in FILE_SETS:
        classes = 4 if name == "cifar100" else 10
        facts = data.SETS[name]._replace(classes=classes, n_train=N_TRAIN, n_test=N_TEST)
        monkeypatch.setitem(data.SETS, name, facts)
    (tmp_path / "root").mkdir()


def no_network(*args, **kwargs):
    raise socket.gaierror(-2, "Name or service not known")


def generate(name, seed=0):
    """Random images [N, H, W, C] and labels of both parts; every class appears equally often."""
    rng, (c, h, w) = np.random.default_rng(seed), data.SETS[name].shape
    parts = []
    for n in (N_TRAIN, N_TEST):
        parts += [rng.integers(0, 256, (n, h, w, c), np.uint8), rng.permutation(np.arange(n) % data.SETS[name].classes)]
    return parts


def encode(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    return {"bytes": buffer.getvalue(), "path": "x"}


def write_parquet(folder, part, images, labels, shards=1, image="image", label="label", kind="PNG"):
    folder.mkdir(exist_ok=True, parents=True)
    for i, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
        table = {image: [encode(images[j], kind) for j in rows], label: labels[rows]}
        pq.write_table(pyarrow.table(table), folder / f"{part}-{i:05d}-of-{shards:05d}.parquet")


def write_hub(root, name, parts, shards=1):
    columns = {
        "cifar10": {"image": "img", "kind": "WEBP"},
        "cifar100": {"image": "img", "label": "fine_label", "kind": "WEBP"},
    }.get(name, {})
    write_parquet(root / name, "train", *parts[:2], shards=shards, **columns)
    write_parquet(root / name, "test", *parts[2:], **columns)


def write_idx(folder, parts, packed=False):
    folder.mkdir(parents=True)
    for name, array in zip(data.IDX, (parts[0], parts[1], parts[2], parts[3]), strict=True):
        array = array.squeeze().astype(np.uint8)
        raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)


def write_torchvision(root, name, parts, monkeypatch):
    """torchvision's format; for the CIFARs, torchvision is told the md5 sums of the generated files."""
    cls, folder = data.SETS[name].torchvision
    if name in ("mnist", "fashion_mnist"):
        return write_idx(root / folder, parts)
    (root / folder).mkdir(parents=True)
    key = "fine_labels" if name == "cifar100" else "labels"
    names = data.FILES[cls]
    batches = [(parts[0], parts[1])] if name == "cifar100" else [(parts[0][i::5], parts[1][i::5]) for i in range(5)]
    md5 = {}
    for file, (x, y) in zip(names, [*batches, (parts[2], parts[3])], strict=False):
        md5[file] = put(root / folder / file, {"data": x.transpose(0, 3, 1, 2).reshape(len(x), -1), key: y.tolist()})
    labels = [str(i) for i in range(data.SETS[name].classes)]
    md5[names[-1]] = put(root / folder / names[-1], {"label_names": labels, "fine_label_names": labels})
    dataset = getattr(torchvision.datasets, cls)
    monkeypatch.setattr(dataset, "train_list", [[file, md5[file]] for file in names[:-2]])
    monkeypatch.setattr(dataset, "test_list", [[names[-2], md5[names[-2]]]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5[names[-1]]})


def put(file, content):
    file.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(file.read_bytes()).hexdigest()


def load(name, root, **options):
    return data.load(name, root=root, **{"valid": 20, **options})


def rows(split):
    """The images with their labels as a list of bytes: what is in a split, whatever its order."""
    return sorted(bytes(x.numpy().tobytes()) + bytes([int(y)]) for x, y in zip(split.x, split.y, strict=True))


def error_of(kind, *args, **options):
    """The message of the error, which has to be one line without a chain of causes."""
    with pytest.raises(kind) as e:
        data.load(*args, **options)
    message = str(e.value)
    assert "\n" not in message
    assert e.value.__suppress_context__ or e.value.__context__ is None
    return message


# Sources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILE_SETS)
def test_parquet_gives_every_pixel_and_label(name, tmp_path):
    parts = generate(name)
    write_hub(tmp_path / "root", name, parts, shards=3)
    d = load(name, tmp_path / "root")
    c, h, w = data.SETS[name].shape
    assert d.train.x.shape == (40, c, h, w)
    assert d.valid.x.shape == (20, c, h, w)
    assert d.test.x.shape == (20, c, h, w)
    for split in (d.train, d.valid, d.test):
        assert split.x.dtype == torch.uint8
        assert split.y.dtype == torch.int64
        assert split.x.is_contiguous()
        assert len(split) == len(split.x) == len(split.y)
    everything = data.Split(torch.tensor(parts[0].transpose(0, 3, 1, 2)), torch.tensor(parts[1]))
    assert sorted(rows(d.train) + rows(d.valid)) == rows(everything)
    assert d.name == name
    assert d.classes == data.SETS[name].classes


@pytest.mark.parametrize("name", ["mnist", "cifar10", "fashion_mnist"])
def test_original_order_survives(name, tmp_path):
    parts = generate(name)
    write_hub(tmp_path / "root", name, parts, shards=2)
    d = load(name, tmp_path / "root", valid=0)
    assert torch.equal(d.test.x, torch.tensor(parts[2].transpose(0, 3, 1, 2)))
    order = np.random.RandomState(0).permutation(N_TRAIN)
    assert torch.equal(d.train.x, torch.tensor(parts[0][order].transpose(0, 3, 1, 2)))
    assert d.train.y.tolist() == parts[1][order].tolist()


@pytest.mark.parametrize("name", FILE_SETS)
def test_torchvision_files_and_parquet_of_the_same_images_are_the_same(name, tmp_path, monkeypatch):
    parts = generate(name)
    if name == "cifar10":  # torchvision concatenates five batches
        parts[0], parts[1] = (np.concatenate([a[i::5] for i in range(5)]) for a in parts[:2])
        batched = [np.concatenate([a.reshape(5, 12, *a.shape[1:])[:, i] for i in range(12)]) for a in parts[:2]]
        write_torchvision(tmp_path / "root", name, [*batched, *parts[2:]], monkeypatch)
    else:
        write_torchvision(tmp_path / "root", name, parts, monkeypatch)
    write_hub(tmp_path / "other", name, parts)
    ours, hub = load(name, tmp_path / "root"), load(name, tmp_path / "other")
    assert ours.fingerprint == hub.fingerprint
    assert ours.mean == hub.mean
    assert ours.std == hub.std
    for part in ("train", "valid", "test"):
        a, b = getattr(ours, part), getattr(hub, part)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)


def test_parquet_comes_before_torchvision_files(tmp_path, monkeypatch):
    write_torchvision(tmp_path / "root", "mnist", generate("mnist", seed=1), monkeypatch)
    alone = load("mnist", tmp_path / "root").fingerprint
    write_hub(tmp_path / "root", "mnist", generate("mnist", seed=2))
    assert load("mnist", tmp_path / "root").fingerprint != alone


def test_fashion_mnist_from_the_debian_package_but_not_mnist(tmp_path, monkeypatch):
    parts = generate("fashion_mnist")
    write_idx(tmp_path / "debian", parts, packed=True)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    write_hub(tmp_path / "other", "fashion_mnist", parts)
    found = load("fashion_mnist", tmp_path / "root").fingerprint
    assert found == load("fashion_mnist", tmp_path / "other").fingerprint
    assert "No mnist under" in error_of(FileNotFoundError, "mnist", root=tmp_path / "root", valid=0)


def test_the_root_is_the_argument_then_lottery_data_then_the_user_cache(tmp_path, monkeypatch):
    prints = {}
    for seed, place in enumerate(("cache/lottery/data", "root", "argument")):
        write_hub(tmp_path / place, "mnist", generate("mnist", seed))
        prints[place] = load("mnist", tmp_path / place).fingerprint
    assert data.load("mnist", valid=0).fingerprint == prints["cache/lottery/data"]
    monkeypatch.setenv("LOTTERY_DATA", str(tmp_path / "root"))
    assert data.load("mnist", valid=0).fingerprint == prints["root"]
    assert data.load("mnist", root=str(tmp_path / "argument"), valid=0).fingerprint == prints["argument"]


def test_download_lands_in_the_root_whole(tmp_path, monkeypatch):
    parts = generate("mnist")
    roots = []

    class FakeMNIST:
        def __init__(self, root, download):
            assert download
            assert socket.getdefaulttimeout() == data.TIMEOUT
            roots.append(Path(root))
            write_idx(Path(root) / "MNIST" / "raw", parts)

    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    write_hub(tmp_path / "other", "mnist", parts)
    assert load("mnist", tmp_path / "root").fingerprint == load("mnist", tmp_path / "other").fingerprint
    assert socket.getdefaulttimeout() is None
    assert [p.name for p in (tmp_path / "root").iterdir()] == ["MNIST"]  # nothing half-way is left
    load("mnist", tmp_path / "root")
    assert len(roots) == 1
    assert not roots[0].exists()


def test_digits_need_nothing(monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.setenv("LOTTERY_DATA", "/nowhere/at/all")
    d, original = data.load("digits"), load_digits()
    assert (len(d.train), len(d.valid), len(d.test)) == (1050, 297, 450)
    assert d.train.x.shape[1:] == (1, 8, 8)
    assert d.classes == 10
    assert torch.equal(d.test.x[:, 0], torch.tensor(original.images[-450:] * 15, dtype=torch.uint8))
    assert d.test.y.tolist() == original.target[-450:].tolist()
    assert int(d.train.x.max()) == 240
    assert d.fingerprint == data.load("digits", valid=0, split_seed=3).fingerprint


def test_mean_and_std_are_those_of_all_training_images(tmp_path):
    parts = generate("cifar10")
    write_hub(tmp_path / "root", "cifar10", parts)
    d = load("cifar10", tmp_path / "root")
    pixels = parts[0].reshape(-1, 3) / 255
    assert d.mean == pytest.approx(tuple(pixels.mean(0)), abs=1e-12)
    assert d.std == pytest.approx(tuple(pixels.std(0)), abs=1e-12)
    assert d.mean == load("cifar10", tmp_path / "root", valid=0).mean


def test_fingerprint_sees_every_pixel_and_label_but_not_the_split(tmp_path):
    parts = generate("mnist")
    write_hub(tmp_path / "root", "mnist", parts)
    reference = load("mnist", tmp_path / "root").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", reference)
    assert load("mnist", tmp_path / "root", valid=10, balanced=True, split_seed=5).fingerprint == reference
    for i, place in enumerate(((59, 27, 27, 0), (0,), (0, 0, 0, 0), (19,))):
        changed = [p.copy() for p in parts]
        changed[i][place] = (changed[i][place] + 1) % 10
        write_hub(tmp_path / f"changed{i}", "mnist", changed)
        assert load("mnist", tmp_path / f"changed{i}").fingerprint != reference


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return generate("mnist"), tmp_path_factory.mktemp("hub")


@pytest.fixture
def hub(whole):
    parts, root = whole
    if not (root / "mnist").exists():
        write_hub(root, "mnist", parts)
    return root


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("valid", [0, 10, 50])
def test_splits_are_disjoint_and_complete(hub, valid, balanced):
    d = load("mnist", hub, valid=valid, balanced=balanced)
    assert (len(d.valid), len(d.train)) == (valid, N_TRAIN - valid)
    assert d.valid.x.shape[1:] == (1, 28, 28)
    whole = load("mnist", hub, valid=0)
    assert len(set(rows(whole.train))) == N_TRAIN  # so that the next line also says: disjoint
    assert sorted(rows(d.train) + rows(d.valid)) == rows(whole.train)
    assert torch.equal(d.test.x, whole.test.x)


def test_random_split_is_the_permutation_cut_in_two(hub):
    permuted = load("mnist", hub, valid=0).train
    for valid in (7, 20, 59):
        d = load("mnist", hub, valid=valid)
        assert torch.equal(torch.cat([d.valid.x, d.train.x]), permuted.x)
        assert torch.equal(torch.cat([d.valid.y, d.train.y]), permuted.y)


def test_balanced_split_has_the_same_number_of_every_class(hub):
    d = load("mnist", hub, valid=30, balanced=True)
    assert d.valid.y.bincount().tolist() == [3] * 10
    assert load("mnist", hub, valid=30).valid.y.bincount(minlength=10).tolist() != [3] * 10
    # the order is the random one too, so that a prefix of the training set is a random subset
    assert d.train.y.tolist() != sorted(d.train.y.tolist())


def test_split_depends_on_the_split_seed_and_on_nothing_else(hub):
    torch.manual_seed(1)
    first = load("mnist", hub, split_seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = load("mnist", hub, split_seed=4), load("mnist", hub, split_seed=5)
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.valid.y, again.valid.y)
    assert not torch.equal(first.train.x, other.train.x)
    assert torch.equal(state, torch.get_rng_state())


def test_split_is_the_same_for_ever():
    """Written down, so that a new release of numpy or torch cannot move it."""
    order = data._split(torch.zeros(10), 3, None, seed=0)
    assert [o.tolist() for o in order] == [[2, 8, 4], [9, 1, 6, 7, 3, 0, 5]]


def test_default_validation_sizes():
    assert {n: data.SETS[n].n_test for n in ("digits",)} == {"digits": 450}
    assert len(data.load("digits").valid) == 297


# CIFAR-100's order ----------------------------------------------------------------------------------------------------


def test_cifar100_has_one_order_whatever_the_order_of_the_source(tmp_path):
    parts = generate("cifar100")
    parts[0][7] = parts[0][3]  # duplicates, as in the original, also with two labels
    parts[0][9] = parts[0][3]
    parts[1][[3, 7, 9]] = [2, 1, 2]
    write_hub(tmp_path / "a", "cifar100", parts)
    order = np.random.default_rng(1).permutation(N_TRAIN)
    write_hub(tmp_path / "b", "cifar100", [parts[0][order], parts[1][order], parts[2][::-1], parts[3][::-1]])
    a, b = (load("cifar100", tmp_path / root) for root in "ab")
    assert a.fingerprint == b.fingerprint
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.train.y, b.train.y)
    assert torch.equal(a.test.y, b.test.y)


def test_cifar100_order_is_by_pixel_bytes_then_label(tmp_path):
    parts = generate("cifar100")
    parts[0][1:4] = parts[0][0]
    parts[1][:4] = [3, 0, 2, 1]
    parts[2][0, 0, 0, 0] = 0  # zero bytes at either end count as bytes
    parts[2][1] = 0
    write_hub(tmp_path / "root", "cifar100", parts)
    d = load("cifar100", tmp_path / "root", valid=0)
    images = [x.tobytes() for x in parts[2].transpose(0, 3, 1, 2)]
    expected = sorted(range(N_TEST), key=lambda i: (images[i], parts[3][i]))
    assert d.test.y.tolist() == parts[3][expected].tolist()
    assert [x.numpy().tobytes() for x in d.test.x] == [images[i] for i in expected]
    canonical_y = d.train.y[torch.from_numpy(np.argsort(np.random.RandomState(0).permutation(N_TRAIN)))]
    images = [x.tobytes() for x in parts[0].transpose(0, 3, 1, 2)]
    expected = sorted(range(N_TRAIN), key=lambda i: (images[i], parts[1][i]))
    assert canonical_y.tolist() == parts[1][expected].tolist()


# CIFAR-10 at 16x16 ----------------------------------------------------------------------------------------------------


def test_cifar10_16_is_the_rounded_mean_of_each_2x2_pixels(tmp_path):
    parts = generate("cifar10")
    parts[2][0, :2, :2, 0] = [[0, 1], [1, 0]]  # a mean of 0.5 becomes 1
    parts[2][0, :2, 2:4, 0] = [[255, 255], [255, 254]]  # 254.75 becomes 255, without overflow
    write_hub(tmp_path / "root", "cifar10", parts)
    d, full = load("cifar10_16", tmp_path / "root"), load("cifar10", tmp_path / "root")
    for split in ("train", "valid", "test"):
        small, large = (getattr(which, split) for which in (d, full))
        mean = np.mean([large.x[:, :, i::2, j::2].numpy() for i in (0, 1) for j in (0, 1)], axis=0)
        assert np.array_equal(small.x.numpy(), np.floor(mean + 0.5))
        assert small.x.dtype == torch.uint8
        assert torch.equal(small.y, large.y)
    assert d.test.x[0, 0, 0, :2].tolist() == [1, 255]
    assert (d.name, d.classes, len(d.fingerprint)) == ("cifar10_16", 10, 64)
    assert d.fingerprint != full.fingerprint
    both = torch.cat([d.train.x, d.valid.x]).double() / 255
    assert d.mean == pytest.approx(both.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert d.std == pytest.approx(both.std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    again = load("cifar10_16", tmp_path / "root", valid=0)
    assert again.fingerprint == d.fingerprint


# Augmentation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "padding"), [(32, 32, 4), (16, 16, 2), (8, 8, 1), (64, 64, 4), (48, 32, 4), (16, 40, 2)]
)
def test_flip_crop_by_brute_force(height, width, padding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 3, height, width), generator=generator).to(torch.uint8)
    moves = data.moves(40, min(height, width), generator)
    out = data.flip_crop(x, moves)
    assert out.dtype == torch.uint8
    for image, result, (flip, top, left) in zip(x.numpy(), out.numpy(), moves.tolist(), strict=True):
        padded = np.zeros((3, height + 2 * padding, width + 2 * padding), np.uint8)
        padded[:, padding : padding + height, padding : padding + width] = image
        crop = padded[:, top : top + height, left : left + width]
        assert np.array_equal(result, crop[:, :, ::-1] if flip else crop)


def test_moves_are_uniform_and_independent():
    moves = data.moves(81_000 * 2, 32, torch.Generator().manual_seed(0))
    counts = torch.bincount((moves[:, 0] * 9 + moves[:, 1]) * 9 + moves[:, 2], minlength=162)
    assert counts.sum() == 162_000
    assert ((counts - 1000).square() / 1000).sum() < 230  # chi-square, 161 degrees of freedom: p = 3e-4


# The cache ------------------------------------------------------------------------------------------------------------


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "lottery" / "decoded").glob("*"))


def never(*args):
    raise AssertionError("decoded again")


def test_second_load_does_not_decode(tmp_path, monkeypatch):
    write_hub(tmp_path / "root", "cifar10", generate("cifar10"))
    first = load("cifar10", tmp_path / "root")
    assert len(cached(tmp_path)) == 1  # and no temporary file
    monkeypatch.setattr(data, "_decode", never)
    second = load("cifar10", tmp_path / "root")
    assert second.fingerprint == first.fingerprint
    assert second.mean == first.mean
    assert second.std == first.std
    assert torch.equal(first.train.x, second.train.x)
    assert torch.equal(first.test.y, second.test.y)
    second.test.x.zero_()  # in memory only
    assert torch.equal(load("cifar10", tmp_path / "root").test.x, first.test.x)


def test_changed_source_is_decoded_again(tmp_path):
    write_hub(tmp_path / "root", "mnist", generate("mnist", seed=1))
    first = load("mnist", tmp_path / "root").fingerprint
    write_hub(tmp_path / "root", "mnist", generate("mnist", seed=2))
    assert load("mnist", tmp_path / "root").fingerprint != first


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "no safetensors", "folder"])
def test_corrupt_cache_is_rebuilt(damage, tmp_path, capfd):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    first = load("mnist", tmp_path / "root")
    [file] = cached(tmp_path)
    good = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        file.write_bytes({"empty": b"", "truncated": good[:-100], "one bit": flipped}.get(damage, b"{}" * 99))
    again = load("mnist", tmp_path / "root")
    assert torch.equal(first.train.x, again.train.x)
    assert first.fingerprint == again.fingerprint
    assert capfd.readouterr() == ("", "")
    if damage != "folder":
        assert [f.read_bytes() for f in cached(tmp_path)] == [good]


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch, capfd):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    first = load("mnist", tmp_path / "root")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write anywhere but not below a file
    again = load("mnist", tmp_path / "root")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    monkeypatch.chdir(tmp_path)
    third = load("mnist", tmp_path / "root")
    assert first.fingerprint == again.fingerprint == third.fingerprint
    assert not (tmp_path / "~").exists()
    assert capfd.readouterr() == ("", "")


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    first = load("mnist", tmp_path / "root")
    folder = cached(tmp_path)[0].parent
    folder.chmod(0o500)
    monkeypatch.setattr(data.tempfile, "TemporaryDirectory", lambda **_: (_ for _ in ()).throw(PermissionError()))
    try:
        monkeypatch.setattr(data, "_decode", never)
        assert load("mnist", tmp_path / "root").fingerprint == first.fingerprint
        monkeypatch.undo()
    finally:
        folder.chmod(0o700)


RACE = """
import sys
from pathlib import Path
from lottery import data
root, cache = sys.argv[1:]
data.SETS["mnist"] = data.SETS["mnist"]._replace(n_train=60, n_test=20)
for _ in range(20):
    for file in Path(cache).glob("lottery/decoded/*.safetensors"):
        file.unlink(missing_ok=True)
    print(data.load("mnist", root=root, valid=0).fingerprint)
"""


def test_two_processes_may_load_at_once(tmp_path):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    command = [sys.executable, "-c", RACE, tmp_path / "root", tmp_path / "cache"]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = "".join(racer.communicate()[0] for racer in racers).split()
    assert len(prints) == 40
    assert set(prints) == {load("mnist", tmp_path / "root").fingerprint}
    assert len(cached(tmp_path)) == 1


def test_two_downloads_may_end_at_once(tmp_path, monkeypatch):
    parts = generate("mnist")

    class FakeMNIST:
        def __init__(self, root, download):
            write_idx(Path(root) / "MNIST" / "raw", parts)
            write_idx(tmp_path / "root" / "MNIST" / "raw", parts)  # another process is a moment faster

    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    assert len(load("mnist", tmp_path / "root").train) == 40


def test_downloads_in_threads_leave_the_process_as_it_was(tmp_path, monkeypatch):
    """What is printed is caught and the default timeout set for all threads: one download at a time."""
    out, first, second, jobs = sys.stdout, threading.Event(), threading.Event(), []

    def mnist(root, download):
        first.set()
        second.wait(0.5)  # the other one does not come; if it did it would end last
        raise RuntimeError("no network")

    def fashion_mnist(root, download):
        second.set()
        jobs[0].exception(30)
        raise RuntimeError("no network")

    monkeypatch.setattr(sys, "stdout", out)  # put back for the tests that follow, whatever comes of this one
    monkeypatch.setattr(torchvision.datasets, "MNIST", mnist)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fashion_mnist)
    with futures.ThreadPoolExecutor(2) as pool:
        for name in ("mnist", "fashion_mnist"):
            jobs.append(pool.submit(load, name, tmp_path / "root"))
            assert first.wait(30)
    assert [type(job.exception()) for job in jobs] == [FileNotFoundError] * 2
    assert sys.stdout is out
    assert socket.getdefaulttimeout() is None


def test_a_set_that_two_threads_need_is_downloaded_once(tmp_path, monkeypatch):
    parts, jobs = generate("mnist"), []

    class FakeMNIST:
        def __init__(self, root, download):
            jobs.append(pool.submit(load, "mnist", tmp_path / "root"))
            futures.wait(jobs, 0.3)  # it looks for the set, finds none, and waits
            write_idx(Path(root) / "MNIST" / "raw", parts)

    monkeypatch.setattr(torchvision.datasets, "MNIST", FakeMNIST)
    with futures.ThreadPoolExecutor(2) as pool:
        mine = load("mnist", tmp_path / "root")
        assert len(jobs) == 1
        assert jobs[0].result(30).fingerprint == mine.fingerprint


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnits"},
         "Unknown data set 'mnits': choose one of mnist, cifar10, cifar100, fashion_mnist, digits, cifar10_16, "
         "imagenet, google12, har2, har2_part."),
        ({"valid": -1}, "Invalid valid -1: give a number of images, 0 <= valid < 1347."),
        ({"valid": 1347}, "Invalid valid 1347: give a number of images, 0 <= valid < 1347."),
        ({"valid": 0.1}, "Invalid valid 0.1: give a number of images, 0 <= valid < 1347."),
        ({"valid": True}, "Invalid valid True: give a number of images, 0 <= valid < 1347."),
        ({"balanced": True}, "Invalid valid 297 with balanced=True: give a multiple of the 10 classes."),
        ({"split_seed": -1}, "Invalid split_seed -1: give a whole number, 0 <= split_seed < 2**32."),
        ({"split_seed": None}, "Invalid split_seed None: give a whole number, 0 <= split_seed < 2**32."),
        ({"name": "mnist", "root": "/no/where"},
         "Invalid root '/no/where': no such folder; give the folder that holds the data sets."),
    ],
)  # fmt: skip
def test_bad_arguments(options, message, monkeypatch):
    monkeypatch.setitem(data.SETS, "mnist", data.SETS["mnist"]._replace(n_train=60_000))
    assert error_of(ValueError, **{"name": "digits", **options}) == message


def test_lottery_data_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(data.SETS, "mnist", data.SETS["mnist"]._replace(n_train=60_000))
    monkeypatch.setenv("LOTTERY_DATA", "/no/where")
    assert error_of(ValueError, "mnist").startswith("Invalid LOTTERY_DATA '/no/where': no such folder")


def test_balanced_needs_enough_of_every_class():
    message = error_of(ValueError, "digits", valid=1340, balanced=True)
    assert re.fullmatch(r"Invalid valid 1340 with balanced=True: class \d has only 1[0-3]\d images\.", message)


def test_missing_shard_is_named(tmp_path):
    write_hub(tmp_path / "root", "cifar10", generate("cifar10"), shards=3)
    (tmp_path / "root" / "cifar10" / "train-00001-of-00003.parquet").unlink()
    message = error_of(ValueError, "cifar10", root=tmp_path / "root", valid=0)
    assert "no train-00001-of-00003.parquet" in message
    assert str(tmp_path / "root" / "cifar10") in message


def test_missing_test_part_is_named(tmp_path):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    (tmp_path / "root" / "mnist" / "test-00000-of-00001.parquet").unlink()
    assert "no test-00000-of-00001.parquet" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)


def test_shards_of_two_editions_are_not_mixed(tmp_path):
    write_hub(tmp_path / "root", "mnist", generate("mnist"))
    write_hub(tmp_path / "root", "mnist", generate("mnist"), shards=2)
    message = error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    assert "3 train shards where 2 belong together" in message


def test_wrong_counts(tmp_path, monkeypatch):
    write_hub(tmp_path / "root", "mnist", [part[:-1] for part in generate("mnist")])
    message = error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    assert message.endswith("59 train images, 59 labels; mnist has 60.")
    write_torchvision(tmp_path / "root", "fashion_mnist", [p[:15] for p in generate("fashion_mnist")], monkeypatch)
    assert "15 train images" in error_of(ValueError, "fashion_mnist", root=tmp_path / "root", valid=0)
    assert not cached(tmp_path)


def test_wrong_labels(tmp_path):
    parts = generate("mnist")
    parts[3][:] = -1  # how the hub marks a test set without labels
    write_hub(tmp_path / "root", "mnist", parts)
    assert "test labels -1..-1, not 0..9" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)


def test_damaged_parquet_files(tmp_path):
    parts = generate("mnist")
    write_hub(tmp_path / "root", "mnist", parts)
    folder, file = tmp_path / "root" / "mnist", tmp_path / "root" / "mnist" / "test-00000-of-00001.parquet"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert f"Unreadable data in {folder}" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"Unreadable data in {folder}" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    write_parquet(folder, "test", *parts[2:], label="etikett")
    assert "label" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    images = [{"bytes": b"\x89PNG\r\n\x1a\n" + bytes(50), "path": ""}] * N_TEST
    pq.write_table(pyarrow.table({"image": images, "label": parts[3]}), file)
    assert f"Unreadable data in {folder}" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)
    write_parquet(folder, "test", parts[2][:, :20], parts[3])
    assert f"Unreadable data in {folder}" in error_of(ValueError, "mnist", root=tmp_path / "root", valid=0)


def test_damaged_torchvision_files(tmp_path, monkeypatch):
    root = tmp_path / "root"
    write_torchvision(root, "mnist", generate("mnist"), monkeypatch)
    file = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    good = file.read_bytes()
    for bad in (good[:-1], b"", good[:4], b"\0\0\x0d" + good[3:]):
        file.write_bytes(bad)
        assert f"Unreadable data in {file.parent}: {file.name} is" in error_of(ValueError, "mnist", root=root, valid=0)
    file.unlink()
    for bad in (b"", b"<html>", gzip.compress(good)[:-9]):
        (gz := file.with_name(f"{file.name}.gz")).write_bytes(bad)
        assert f"Unreadable data in {file.parent}: {gz.name} is" in error_of(ValueError, "mnist", root=root, valid=0)
    gz.unlink()
    assert "no t10k-labels-idx1-ubyte; complete" in error_of(ValueError, "mnist", root=root, valid=0)
    write_torchvision(root, "cifar10", generate("cifar10"), monkeypatch)
    file = root / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(pickle.dumps(Path("never unpickled")))
    assert error_of(ValueError, "cifar10", root=root, valid=0).endswith("md5 sums differ from the published ones")
    file.unlink()
    assert "no data_batch_3; complete" in error_of(ValueError, "cifar10", root=root, valid=0)


@pytest.mark.parametrize("name", FILE_SETS)
def test_no_data_and_no_network_names_the_three_ways(name, tmp_path, monkeypatch, capfd):
    dataset = getattr(torchvision.datasets, data.SETS[name].torchvision[0])
    module = "cifar" if name.startswith("cifar") else "mnist"

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    assert dataset  # the real class runs, only its downloader is replaced
    message = error_of(FileNotFoundError, name, valid=0)
    root = tmp_path / "cache" / "lottery" / "data"
    assert message.startswith(f"No {name} under {root} and no download (")
    assert "no route to host" in message
    assert f"set LOTTERY_DATA to a folder with {name}/train-*.parquet" in message
    assert f"put torchvision's files into {root / data.SETS[name].torchvision[1]}" in message
    assert message.endswith("or run once with network access.")
    assert capfd.readouterr().out == ""
    assert list(root.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_root_that_cannot_be_written_still_names_the_three_ways(tmp_path, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied", "root")

    monkeypatch.setattr(data.tempfile, "TemporaryDirectory", refuse)
    message = error_of(FileNotFoundError, "mnist", root=tmp_path / "root", valid=0)
    assert "Permission denied" in message
    assert "set LOTTERY_DATA" in message


# The real sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "labels", "mean", "std"),
    [
        ("mnist", (55_000, 5_000, 10_000), [7, 2, 1, 0, 4], (0.1307,), (0.3081,)),
        ("cifar10", (45_000, 5_000, 10_000), [3, 8, 8, 0, 6], (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar10_16", (45_000, 5_000, 10_000), [3, 8, 8, 0, 6], (0.4919, 0.4827, 0.4470), (0.2381, 0.2347, 0.2536)),
        ("cifar100", (45_000, 5_000, 10_000), None, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_real_sets(name, sizes, labels, mean, std, monkeypatch):
    if not REAL or not (Path(REAL) / name.removesuffix("_16")).is_dir():
        pytest.skip(f"needs LOTTERY_DATA with {name}/")
    monkeypatch.undo()
    d = data.load(name)
    assert (len(d.train), len(d.valid), len(d.test)) == sizes
    if labels:
        assert d.test.y[:5].tolist() == labels
    assert d.mean == pytest.approx(mean, abs=5e-5)
    assert d.std == pytest.approx(std, abs=5e-5)
    balanced = data.load(name, balanced=True)
    assert set(balanced.valid.y.bincount().tolist()) == {5_000 // d.classes}
    assert balanced.fingerprint == d.fingerprint


# Images of other kinds ------------------------------------------------------------------------------------------------


def with_image(root, image, name="mnist", kind="PNG", **options):
    """A set in the hub's layout of which one training image is this one."""
    parts = generate(name)
    write_hub(root, name, parts)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    [path] = (root / name).glob("train-*.parquet")
    rows = pq.read_table(path).to_pylist()
    column = next(c for c in rows[0] if c in ("image", "img"))
    rows[3][column] = {"bytes": buffer.getvalue(), "path": "x"}
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return parts


def ramp(side=28):
    return np.arange(side * side, dtype=np.uint16).reshape(side, side) % 251


def alpha(value):
    return Image.fromarray(np.dstack([ramp().astype(np.uint8)] * 3 + [value.astype(np.uint8)]))


@pytest.mark.parametrize(
    ("image", "options", "text"),
    [
        (Image.fromarray(ramp() * 257), {}, "more than 8 bits a channel, or other colours (mode I;16)"),
        (
            Image.fromarray(ramp().astype(np.int32)),
            {"kind": "TIFF"},
            "more than 8 bits a channel, or other colours (mode I",
        ),
        (Image.fromarray(ramp().astype(np.float32)), {"kind": "TIFF"}, "or other colours (mode F)"),
        (Image.fromarray(ramp().astype(np.uint8)).convert("CMYK"), {"kind": "TIFF"}, "or other colours (mode CMYK)"),
        (alpha(ramp()), {}, "an image is partly transparent (mode RGBA)"),
        (alpha(ramp()).convert("LA"), {}, "an image is partly transparent (mode LA)"),
        (Image.fromarray(ramp().astype(np.uint8)), {"transparency": 3}, "an image is partly transparent (mode L)"),
        (Image.fromarray(ramp().astype(np.uint8).reshape(14, 56)), {}, "image 3 has 56 x 14 pixels, not 28 x 28"),
        (Image.fromarray(ramp(29).astype(np.uint8)), {}, "image 3 has 29 x 29 pixels, not 28 x 28"),
    ],
)
def test_an_image_that_would_be_converted_with_a_loss_is_refused(tmp_path, image, options, text):
    with_image(tmp_path, image, **options)
    assert text in error_of(ValueError, "mnist", root=tmp_path, valid=20)


def test_sixteen_bits_of_colour_are_refused(tmp_path):
    """Pillow opens them as 8 bits a channel, of which it keeps the upper half."""
    write_hub(tmp_path, "mnist", generate("mnist"))
    raw = b"".join(b"\0" + bytes(28 * 6) for _ in range(28))
    header = struct.pack(">IIBBBBB", 28, 28, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    [path] = (tmp_path / "mnist").glob("train-*.parquet")
    rows = pq.read_table(path).to_pylist()
    rows[0]["image"] = {"bytes": b"\x89PNG\r\n\x1a\n" + png, "path": "x"}
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    assert "more than 8 bits a channel" in error_of(ValueError, "mnist", root=tmp_path, valid=20)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(ramp().astype(np.uint8)),
        Image.fromarray(ramp().astype(np.uint8)).convert("P"),
        alpha(np.full((28, 28), 255)),
        Image.fromarray((ramp() > 99).astype(bool)),
    ],
    ids=["grey", "palette", "opaque", "one bit"],
)
def test_images_of_8_bits_or_less_are_read_exactly(tmp_path, image):
    with_image(tmp_path, image)
    expected = torch.from_numpy(np.asarray(image.convert("L")).copy())
    loaded = data.load("mnist", root=tmp_path, valid=0)
    assert (loaded.train.x[:, 0] == expected).flatten(1).all(1).sum() == 1


@pytest.mark.parametrize("name", [["mnist"], None, 3, {}])
def test_a_name_is_text(name):
    assert error_of(ValueError, name).startswith(f"Unknown data set {name!r}: choose one of mnist, ")


def test_a_home_that_is_nobodys():
    text = "Invalid root '~nobody-of-this-name/x': no such folder; give the folder that holds the data sets."
    assert error_of(ValueError, "mnist", root="~nobody-of-this-name/x", valid=20) == text
