"""lottery.data: one's own examples as Data, and what trainings and scores are fed of them."""

import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lottery import batches, data, grasp, training
from lottery.batches import Batches

UNIT = training.Recipe(batch_size=4, iterations=2)
STANDARD = training.Recipe(batch_size=4, iterations=2, inputs="standard")


def message(text):
    return f"^{re.escape(text)}"


def images(n=20, channels=3, side=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def labels(n=20, classes=4):
    return torch.arange(n) % classes


def rows(own, part="train"):
    return {tuple(row) for row in getattr(own, part).x.flatten(1).tolist()}


def test_split():
    own = data.from_tensors(images(), labels(), valid=0.1, test=5)
    assert [len(part) for part in (own.train, own.valid, own.test)] == [13, 2, 5]
    assert rows(own) | rows(own, "valid") | rows(own, "test") == {tuple(r) for r in images().flatten(1).tolist()}
    torch.manual_seed(5)
    again = data.from_tensors(images(), labels(), valid=0.1, test=5)
    assert torch.equal(own.train.x, again.train.x)
    assert own.fingerprint == again.fingerprint
    other = data.from_tensors(images(), labels(), valid=0.1, test=5, seed=1)
    assert not torch.equal(own.train.x, other.train.x)
    assert own.classes == 4


def test_splits_of_their_own():
    own = data.from_tensors(images(), labels(), valid=(images(6), labels(6)), test=(images(3), labels(3)))
    assert torch.equal(own.valid.x, images(6))
    assert [len(part) for part in (own.train, own.valid, own.test)] == [20, 6, 3]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_floats_are_fed_in_their_own_units(scale):
    """Not divided by 255; standardised by their own moments; and the data stay as they were given."""
    x = (torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 2) * scale
    own = data.from_tensors(x.double(), labels(40), test=0, valid=0)
    before = own.train.x.clone()
    like = torch.zeros(1, dtype=torch.float64)
    fed = Batches(own, UNIT, 0, like)(0)[0]
    assert {round(v, 3) for v in fed.flatten().tolist()} <= {round(v, 3) for v in x.flatten().tolist()}
    normal = batches.normaliser(own, STANDARD, like)(own.train.x)
    assert normal.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert normal.std((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-6)
    torch.testing.assert_close(own.standard(own.train.x), normal.float())
    assert torch.equal(own.train.x, before)


def test_bytes_are_divided_by_255():
    own = data.from_tensors(images(), labels(), test=0, valid=0)
    fed = batches.normaliser(own, UNIT, torch.zeros(1))(own.train.x)
    torch.testing.assert_close(fed, own.train.x / 255)
    [(x, _)] = grasp.class_balanced(own, 2)
    assert x.std() < 2


def test_table_of_features():
    """Rows of numbers: no channels, no images; a constant column is not divided by 0."""
    x = np.random.RandomState(0).randn(60, 5) * 100
    x[:, 3] = 7
    own = data.from_tensors(x, (x[:, 0] > 0).astype(np.int32))
    assert own.std[3] == 1
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    for inputs in ("unit", "standard"):
        history = training.fit(net, own, training.Recipe(batch_size=10, iterations=30, lr=0.01, inputs=inputs))
        assert history.status == "finished"
    assert history.last.train_acc > 0.8
    with pytest.raises(ValueError, match=message("Invalid augment 'flip-crop': it is for images [N, C, H, W]")):
        training.fit(net, own, training.Recipe(batch_size=10, iterations=30, augment="flip-crop"))


def test_tokens_are_fed_as_they_are():
    words = torch.randint(0, 9, (40, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    own = data.from_tensors(words, words[:, 0] % 2, tokens=True)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 2))
    history = training.fit(net, own, training.Recipe(batch_size=8, iterations=60, lr=0.05, inputs="standard"))
    assert history.last.train_acc == 1
    [(x, _)] = grasp.class_balanced(own, 2)
    assert x.dtype == torch.int64


@pytest.mark.parametrize(
    ("x", "kept"),
    [
        (images()[:, 0], torch.uint8),
        (images().numpy(), torch.uint8),
        (images().short(), torch.float32),
        (images() > 100, torch.float32),
        (images().half(), torch.float32),
        (np.zeros((20, 7)), torch.float32),
        ([[0.0, 1.0]] * 20, torch.float32),
    ],
)
def test_kinds_of_examples(x, kept):
    own = data.from_tensors(x, labels().tolist())
    assert own.train.x.dtype == kept
    assert own.train.x.dim() == (4 if len(np.shape(x)) in (3, 4) else 2)


class Squares(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i >= 12:
            raise IndexError(i)
        return Image.new("RGB", (5, 5), (i * 20, 0, 0)), i % 3


def test_datasets():
    own = data.of(Squares(), valid=0, test=3)
    assert own.train.x.dtype == torch.uint8
    assert own.name == "Squares"
    assert {int(x[0, 0, 0]) // 20 % 3 == y for x, y in zip(own.train.x, own.train.y.tolist(), strict=True)} == {True}
    pairs = TensorDataset(images().float(), labels())
    for given in (pairs, DataLoader(pairs, batch_size=3), list(pairs), iter(pairs)):
        own = data.of(given, valid=pairs, test=0)
        assert rows(own) == rows(own, "valid") == {tuple(r) for r in images().flatten(1).tolist()}


@pytest.mark.parametrize(
    ("mode", "colour", "channels"),
    [
        ("L", 7, [7]),
        ("1", 1, [255]),
        ("P", (1, 2, 3), [1, 2, 3]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), [1, 2, 3]),
        ("I;16", 60_000, "an image has more than 8 bits a channel"),
        ("RGBA", (1, 2, 3, 0), "an image is partly transparent (mode RGBA)"),
    ],
)
def test_images_of_a_dataset_are_decoded_as_those_of_a_folder(mode, colour, channels):
    image = Image.new("RGB" if mode == "P" else mode, (5, 5), colour)
    image = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image
    pairs = [(image, 0), (image, 1), (image, 0)]
    if isinstance(channels, str):
        with pytest.raises(ValueError, match=message(f"Unreadable image 0 of the dataset: {channels}")):
            data.of(pairs, valid=0, test=1)
    else:
        own = data.of(pairs, valid=0, test=1)
        assert own.train.x.dtype == torch.uint8
        assert own.train.x[0, :, 0, 0].tolist() == channels


def test_two_pairs_are_a_dataset():
    pairs = [(torch.zeros(3), 0), (torch.ones(3), 1)]
    own = data.of(pairs, valid=pairs, test=0)
    assert rows(own) == rows(own, "valid") == {(0, 0, 0), (1, 1, 1)}
    for x in ([torch.zeros(3), torch.ones(3)], [[0.0] * 3, [1.0] * 3]):
        assert rows(data.of((x, [0, 1]), valid=0, test=0)) == rows(own)


def test_kinds_of_splits_and_loaders():
    pairs = TensorDataset(images(), labels())
    for given in (np.int64(5), np.float32(0.25), list(pairs)[:5], (images(5), labels(5)), Subset(pairs, range(5))):
        for own in (data.of(pairs, valid=given, test=0), data.from_tensors(images(), labels(), valid=given, test=0)):
            assert len(own.valid) == 5
    one_by_one = data.of(DataLoader(pairs, batch_size=None), valid=0, test=0)
    assert rows(one_by_one) == {tuple(r) for r in images().flatten(1).tolist()}


def test_tables_of_pandas():
    table = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5]}, index=[7, 8, 9])
    own = data.of((table, pd.Series([0, 1, 0], index=[7, 8, 9])), valid=0, test=0)
    assert rows(own) == {(1, 0.5), (2, 1.5), (3, 2.5)}
    assert own.train.x.dtype == torch.float32


def write(folder, names=("cat", "dog"), n=3, side=6):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (side, side), (100 * number + i, 9, 9)).save(folder / name / f"{i}.png")


def test_folder(tmp_path):
    write(tmp_path / "pets")
    own = data.of(tmp_path / "pets", valid=0, test=2)
    assert own.name == "pets"
    assert own.train.x.shape == (4, 3, 6, 6)
    assert [int(x[0, 0, 0]) >= 100 for x in own.train.x] == [bool(y) for y in own.train.y]
    small = data.from_folder(str(tmp_path / "pets"), size=4, grey=True)
    assert small.train.x.shape[1:] == (1, 4, 4)
    for part, n in (("train", 4), ("val", 2), ("test", 1)):
        write(tmp_path / "split" / part, n=n)
    own = data.of(tmp_path / "split")
    assert [len(part) for part in (own.train, own.valid, own.test)] == [8, 4, 2]


@pytest.mark.parametrize("names", [("Train", "Validation", "TEST"), ("train", "valid", "Test")])
def test_the_parts_of_a_folder_are_no_classes(names, tmp_path):
    for part, n in zip(names, (4, 2, 1), strict=True):
        write(tmp_path / part, n=n)
    own = data.of(tmp_path)
    assert [len(part) for part in (own.train, own.valid, own.test)] == [8, 4, 2]
    assert own.test.y.tolist() == [0, 1]


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, ("bus", "train"))
    assert data.of(tmp_path).classes == 2


def test_parquet(tmp_path):
    write(tmp_path / "pets")
    files = sorted((tmp_path / "pets").rglob("*.png"))
    table = {"img": [{"bytes": f.read_bytes(), "path": f.name} for f in files], "fine_label": [0, 0, 0, 1, 1, 1]}
    (tmp_path / "hub").mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / "hub" / f"{part}-00000-of-00001.parquet")
    own = data.of(tmp_path / "hub", valid=1)
    assert [len(part) for part in (own.train, own.valid, own.test)] == [5, 1, 6]
    assert own.test.x[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
    pq.write_table(pa.table({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "label": [0, 1, 0]}), tmp_path / "t.parquet")
    own = data.of(str(tmp_path / "t.parquet"), valid=0, test=0)
    assert rows(own) == {(1, 0.5), (2, 1.5), (3, 2.5)}


def test_names_and_data_pass():
    digits = data.load("digits")
    assert data.of(digits) is digits
    assert torch.equal(data.of("digits").train.x, digits.train.x)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: data.from_tensors(images(), labels(19)), "Invalid y: 19 labels for 20 examples."),
        (lambda: data.from_tensors(images(), labels() - 1), "Invalid labels -1 … 2: give class numbers 0 … 2."),
        (lambda: data.from_tensors(images(), labels(), classes=3), "Invalid labels 0 … 3: give class numbers 0 … 2."),
        (
            lambda: data.from_tensors(images(), torch.eye(20)),
            "Invalid y, torch.float32 of shape (20, 20): give class numbers [N]; for one-hot rows y.argmax(1).",
        ),
        (
            lambda: data.from_tensors(images(), labels() / 3),
            "Invalid y, torch.float32 of shape (20,): give class numbers",
        ),
        (
            lambda: data.from_tensors(images(side=6).permute(0, 2, 3, 1), labels()),
            "Invalid x of shape (20, 6, 6, 3): images are [N, C, H, W] here; give x.permute(0, 3, 1, 2).",
        ),
        (lambda: data.from_tensors(torch.zeros(5), labels(5)), "Invalid x of shape (5,): give examples [N, …]"),
        (
            lambda: data.from_tensors(torch.full((4, 2), torch.nan), labels(4)),
            "Invalid x: 8 values are NaN or infinite; clean the data first.",
        ),
        (lambda: data.from_tensors(images() + 0j, labels()), "Invalid x of torch.complex64: give real numbers."),
        (
            lambda: data.from_tensors(images().float(), labels(), tokens=True),
            "Invalid x with tokens=True: torch.float32 (20, 3, 4, 4); give integers [N, L].",
        ),
        (
            lambda: data.from_tensors(images(), labels(), valid=0.5, test=0.5),
            "Invalid valid 0.5, test 0.5: they leave none of the 20 examples to train on.",
        ),
        (
            lambda: data.from_tensors(images(), labels(), test=20),
            "Invalid test 20: give a share below 1, a number below 20",
        ),
        (
            lambda: data.from_tensors(images(), labels(), test=(images(3).float(), labels(3))),
            "Invalid test: torch.float32 examples of shape (3, 4, 4), those of training are torch.uint8 (3, 4, 4).",
        ),
        (lambda: data.from_dataset([(1, 2, 3)]), "Invalid dataset: give one whose examples are pairs (x, y)."),
        (lambda: data.from_tensors(images(), labels(), valid=None), "Invalid valid None: give a share below 1"),
        (lambda: data.of(list(zip(images(), labels(), strict=True)), test=None), "Invalid test None: give a share"),
        (lambda: data.from_tensors(images(), labels(), valid=[1, 2, 3]), "Invalid valid: give one whose examples are"),
        (lambda: data.from_tensors(images(), labels(), classes=0), "Invalid classes 0: give their number, at least 1"),
        (
            lambda: data.from_tensors(images(), labels(), seed=0.5),
            "Invalid seed 0.5: give a whole number, 0 <= seed < ",
        ),
        (lambda: data.from_tensors(images(), ["cat", "dog"] * 10), "Invalid y: give class numbers [N] (can't convert"),
        (lambda: data.from_tensors([[1], [1, 2]], [0, 1]), "Invalid x: give numbers: a tensor or an array [N, …] ("),
        (lambda: data.from_dataset([(torch.zeros(2), "cat")] * 3), "Invalid y: give class numbers (can't convert"),
        (lambda: data.from_dataset(7), "Invalid dataset 7: give (x, y), or a dataset of such pairs."),
        (
            lambda: data.from_tensors(images(), labels(), test={"x": 1}),
            "Invalid test {'x': 1}: give (x, y), or a datas",
        ),
        (lambda: data.from_dataset([]), "Invalid dataset: it has no examples."),
        (
            lambda: data.from_dataset([(torch.zeros(2), 0), (torch.zeros(3), 1)]),
            "Invalid dataset: examples of 2 shapes, such as [(2,), (3,)]; resize them.",
        ),
        (
            lambda: data.of(7),
            "Invalid data of type int: give (x, y), a dataset, a folder, a name like 'mnist', or Data.",
        ),
        (lambda: data.of(data.load("digits"), valid=3), "Data is split already: leave valid out."),
    ],
)
def test_bad_data(make, text):
    with pytest.raises(ValueError, match=message(text)):
        make()


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=message(f"No folder {tmp_path / 'x'}: give the folder that holds")):
        data.from_folder(tmp_path / "x")
    with pytest.raises(ValueError, match=message(f"No images in {tmp_path}: it has to hold one folder of images")):
        data.from_folder(tmp_path)
    write(tmp_path / "deep" / "training")
    with pytest.raises(
        ValueError, match=r"^No images in the folders of .*deep: .*training/.* is a folder too deep; parts a"
    ):
        data.from_folder(tmp_path / "deep")
    for size in (0, 8.0, "8", (8, 8)):
        with pytest.raises(
            ValueError, match=message(f"Invalid size {size!r}: give the side in pixels, a whole number")
        ):
            data.from_folder(tmp_path / "deep" / "training", size=size)
    (tmp_path / "deep" / "training" / "none").mkdir()
    with pytest.raises(
        ValueError, match=r"^No images in .*training: .* \(Found no valid file for the classes none\)\.$"
    ):
        data.from_folder(tmp_path / "deep" / "training")
    shutil.rmtree(tmp_path / "deep")
    with pytest.raises(FileNotFoundError, match=message(f"No parquet at {tmp_path}: give a file, or a folder")):
        data.from_parquet(tmp_path)
    write(tmp_path, ("a", "b"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "big.png")
    with pytest.raises(
        ValueError, match=message("Images of 2 sizes, such as [(6, 6), (9, 9)]: give size=32 to resize")
    ):
        data.from_folder(tmp_path)
    (tmp_path / "a" / "big.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=message(f"Unreadable image {tmp_path / 'a' / 'big.png'}: cannot identify")):
        data.from_folder(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=message(f"No column 'label' in {tmp_path / 't.parquet'}: it has a.")):
        data.from_parquet(tmp_path / "t.parquet")


@pytest.mark.filterwarnings("error")
def test_whatever_is_wrong_with_an_image_is_told_with_its_name(tmp_path, monkeypatch):
    """Pillow raises what is no OSError for a header that is cut, and for more pixels than it takes for sane."""
    write(tmp_path / "pets")
    [bad, *_] = sorted((tmp_path / "pets" / "cat").iterdir())
    whole = bad.read_bytes()

    def refused(bad, given=None, **options):
        with pytest.raises(ValueError, match=rf"^Unreadable image {re.escape(str(bad))}: [^\n]+\.$"):
            data.of(given or tmp_path / "pets", **options)

    for damaged in (whole[:20], whole[:40], whole[:16] + b"\0\0\0\0" + whole[20:], b""):
        bad.write_bytes(damaged)
        refused(bad)
    bad.write_bytes(whole)
    alpha = Image.new("RGBA", (6, 6), (1, 2, 3, 4))
    alpha.save(bad)
    refused(bad)
    with Image.open(bad) as image:
        refused(bad, [(image, 0), (image, 1)], valid=0, test=1)
    bad.write_bytes(whole)
    rows = [{"image": {"bytes": b, "path": "x"}, "label": i % 2} for i, b in enumerate((whole, whole[:40], whole))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    refused(f"1 of {tmp_path / 't.parquet'}", tmp_path / "t.parquet")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    refused(bad)


def test_every_part_of_a_folder_is_numbered_as_the_training_part(tmp_path):
    """Each image has the number of its class as its red value."""
    names = ("cat", "dog", "owl")
    write(tmp_path / "train", names)
    for part, i in (("val", 2), ("test", 1)):
        (tmp_path / part / names[i]).mkdir(parents=True)
        Image.new("RGB", (6, 6), (100 * i, 9, 9)).save(tmp_path / part / names[i] / "0.png")
    (tmp_path / "test" / ".cache").mkdir()
    own = data.from_folder(tmp_path)
    for part in (own.train, own.valid, own.test):
        assert (part.x[:, 0, 0, 0] // 100).tolist() == part.y.tolist()
    assert own.classes == 3
    write(tmp_path / "test", ("ant", "bee"))
    text = f"Unknown classes in {tmp_path / 'test'}: ant, bee; add them to {tmp_path / 'train'}, or remove them."
    with pytest.raises(ValueError, match=message(text)):
        data.from_folder(tmp_path)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_images_that_are_no_squares_are_augmented_at_their_size(shape):
    own = data.from_tensors(torch.full((20, 3, *shape), 7, dtype=torch.uint8), labels(), valid=0, test=0)
    batch = Batches(own, training.Recipe(batch_size=4, iterations=2, augment="flip-crop"), 0, torch.zeros(1))
    seen = torch.cat([batch(t)[0] for t in range(5)])
    assert seen.shape == (20, 3, *shape)
    assert 0.7 < (seen > 0).float().mean() < 1  # some is padding


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (
            {"a": [1.0, 2], "label": ["cat", "dog"]},
            "Invalid column 'label' in FILE: it holds string; give class numbers",
        ),
        ({"a": ["x", "y"], "label": [0, 1]}, "Invalid column 'a' in FILE: it holds string; give numbers, or leave"),
        (
            {"a": [1.0, 2], "label": [0, None]},
            "Invalid column 'label' in FILE: 1 of 2 values are missing; fill them in",
        ),
        ({"a": [1, None], "label": [0, 1]}, "Invalid column 'a' in FILE: 1 of 2 values are missing; fill them in"),
        ({"label": [0, 1]}, "No features in FILE: it has no column but 'label'."),
        (
            {"image": ["a.png", "b.png"], "label": [0, 1]},
            "Invalid column 'image' in FILE: it holds string; give encoded",
        ),
        (
            {"img": [{"bytes": b"x", "path": ""}, {"bytes": None, "path": ""}], "label": [0, 1]},
            "Invalid column 'img' in FILE: 1 of 2 values are missing",
        ),
    ],
)
def test_columns_of_a_parquet_file_that_cannot_be_read_are_named(tmp_path, columns, text):
    pq.write_table(pa.table(columns), file := tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=message(text.replace("FILE", str(file)))):
        data.from_parquet(file)


def test_parquet_files_that_do_not_belong_together(tmp_path):
    def write_part(name, **columns):
        pq.write_table(pa.table({**columns, "label": [0, 1, 0]}), tmp_path / f"{name}.parquet")

    write_part("train-0", a=[1, 2, 3], b=[0.5, 1.5, 2.5], __index_level_0__=[7, 8, 9])
    write_part("test-0", b=[5.5, 6.5, 7.5], a=[4, 5, 6], c=[0, 0, 0])
    own = data.from_parquet(tmp_path, valid=0)
    assert rows(own) == {(1, 0.5), (2, 1.5), (3, 2.5)}  # the names of pandas' rows are no feature
    assert rows(own, "test") == {(4, 5.5), (5, 6.5), (6, 7.5)}  # by their names, whatever their order
    write_part("test-0", a=[4, 5, 6])
    text = f"No column 'b' in {tmp_path / 'test-0.parquet'}: {tmp_path / 'train-0.parquet'} has it."
    with pytest.raises(ValueError, match=message(text)):
        data.from_parquet(tmp_path)
    write_part("train-1", a=[1, 2, 3])
    text = (
        f"Unreadable parquet {tmp_path / 'train-1.parquet'}: it has other columns than {tmp_path / 'train-0.parquet'}"
    )
    with pytest.raises(ValueError, match=message(text)):
        data.from_parquet(tmp_path)
    (tmp_path / "train-1.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=message(f"Unreadable parquet {tmp_path / 'train-1.parquet'}: ")) as told:
        data.from_parquet(tmp_path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"valid": (torch.rand(5, 4), torch.zeros(4))}, "Invalid valid: 4 labels for 5 examples."),
        ({"test": (torch.rand(3, 4), torch.zeros(4))}, "Invalid test: 4 labels for 3 examples."),
        ({"valid": 1.5}, "Invalid valid 1.5: give a share below 1, a number below 30, or a pair (x, y)."),
        ({"valid": 1.0}, "Invalid valid 1.0: give a share below 1, a number below 30, or a pair (x, y)."),
        ({"valid": torch.tensor(0.1)}, "Invalid valid tensor(0.1000): give (x, y), or a dataset of such pairs."),
        ({"y": torch.full((30,), torch.inf)}, "Invalid y, torch.float32 of shape (30,): give class numbers [N]"),
        ({"x": np.ma.masked_greater(np.arange(60.0).reshape(30, 2), 50)}, "Invalid x: give numbers: a tensor or an"),
        ({"x": torch.zeros(30, 0, dtype=torch.int64), "tokens": True}, "Invalid x with tokens=True: torch.int64 "),
    ],
)
def test_what_does_not_fit_together_is_told_in_one_line(given, text):
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        data.from_tensors(**{"x": torch.rand(30, 4), "y": torch.arange(30) % 3, **given})


def test_sparse_examples_are_what_they_stand_for():
    x, y = torch.rand(30, 4) * (torch.rand(30, 4) > 0.5), torch.arange(30) % 3
    sparse, dense = data.of((x.to_sparse(), y)), data.of((x, y))
    assert torch.equal(sparse.train.x, dense.train.x)
    assert sparse.fingerprint == dense.fingerprint


def test_a_number_of_validation_images_may_be_numpys():
    assert len(data.load("digits", valid=np.int64(3)).valid) == 3
