"""One training on several devices, for networks that take days on one: ImageNet's.

    torchrun --nproc-per-node 8 -m lottery.parallel str curve --images /data/imagenet

trains what `lottery run str curve --scale paper` names, one run after the other, each on all devices, and keeps it in
the same store. `--images` is a folder with `train/<class>/*` and `val/<class>/*`, images of any size, or with parquet
shards `train*.parquet` and `val*.parquet` (columns `image`, the encoded file, and `label`). Images are decoded by
worker processes when their minibatch comes, with torchvision's transforms: a crop of random size and a flip in
training, the middle 224 of 256 pixels in tests. The items "imagenet" of the papers `cs` and `grasp` are their ResNet-50
and VGG-16.

A minibatch is cut into one part for each device and each step of `--accumulate`; batch norm sees one part, and
gradients are averaged over the whole minibatch. So 8 devices, or 2 with `--accumulate 4`, train the same weights up to
rounding; batch norm's running averages are those of the first device. Order and crops follow from the seed, the epoch
and the image alone: a training that was killed goes on in the middle of an epoch with the minibatch that would have
come.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, default_collate

from lottery import cli, data, training
from lottery.experiments import Store, papers, work
from lottery.experiments.engine import missing, needs
from lottery.experiments.leases import Leases
from lottery.experiments.runs import Run
from lottery.experiments.store import now

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, as torchvision gives them


# Images ---------------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """A part, "train" or "val", of a folder: `[i]` is (float32 [3, side, side], class), the middle of image i.

    `[seed, epoch, i]` is a random crop and flip of it that depends on these three alone.

    Raises FileNotFoundError where there are no images.
    """

    def __init__(self, folder: Path | str, part: str, side: int = 224):
        from torchvision.transforms import v2

        self.folder, self.part = Path(folder), part
        shards = sorted(self.folder.glob(f"{part}*.parquet"))
        self.files = _Parquet(shards) if shards else _Folder(self.folder / part, self.folder / "train")
        self.y = torch.tensor(self.files.labels)
        ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.middle = v2.Compose([v2.Resize(side * 256 // 224), v2.CenterCrop(side), *ends])
        self.random = v2.Compose([v2.RandomResizedCrop(side), v2.RandomHorizontalFlip(), *ends])

    def __len__(self):
        return len(self.y)

    def __getitem__(self, which):
        *drawn, i = which if isinstance(which, tuple) else (which,)
        image = self.files.open(i).convert("RGB")
        if not drawn:
            return self.middle(image), int(self.y[i])
        seed, epoch = drawn
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((seed * 1_000_003 + epoch) * 2_000_003 + i) % 2**63)
            return self.random(image), int(self.y[i])


class _Folder:
    def __init__(self, folder, train):
        classes = data.class_numbers(folder, train if train.is_dir() else None) if folder.is_dir() else {}
        found = [(f, c) for name, c in classes.items() for f in sorted((folder / name).iterdir()) if f.is_file()]
        if not found:
            raise FileNotFoundError(f"No images in {folder}: give a folder with train/<class>/* and val/<class>/*.")
        self.files, self.labels = map(list, zip(*found, strict=True))

    def open(self, i):
        from PIL import Image

        return Image.open(self.files[i])


class _Parquet:
    """A row group is read for one image, so shards should have small ones: some dozen images each."""

    def __init__(self, shards):
        import pyarrow.parquet as pq

        self.shards, self.labels, self.places = shards, [], []
        for n, path in enumerate(shards):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                labels = file.read_row_group(group, ["label"])["label"].to_pylist()
                self.places += [(n, group, row) for row in range(len(labels))]
                self.labels += labels

    def open(self, i):
        from PIL import Image

        n, group, row = self.places[i]
        image = _row_group(self.shards[n], group)[row].as_py()
        return Image.open(io.BytesIO(image["bytes"] if isinstance(image, dict) else image))


@functools.lru_cache(maxsize=8)
def _row_group(path, group):
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(group, ["image"])["image"]


class Feed:
    """What `training.Batches` is, for images that are decoded when their turn comes.

    `choose(t)` goes to iteration t, `gather()` is a tuple of one: that iteration's parts on this device, [(x, y, share
    of the minibatch)]. parts: of a minibatch, over all devices.
    """

    def __init__(self, images, recipe, seed, like, accumulate=1, workers=4):
        self.images, self.recipe, self.seeds, self.like = images, recipe, [seed], like
        self.rank, self.parts, self.accumulate = dist.get_rank(), accumulate * dist.get_world_size(), accumulate
        self.per_epoch, self.workers, self.length, self.t = recipe.per_epoch(len(images)), workers, 0, None
        smallest = len(images) % recipe.batch_size if recipe.last_batch == "keep" else recipe.batch_size
        if len(images) < recipe.batch_size or 0 < smallest < self.parts:
            raise ValueError(
                f"Devices times accumulate is {self.parts}: give at most {smallest}, the images of the smallest "
                "minibatch."
            )

    normalise = staticmethod(lambda x: x)  # the transforms have done it

    def choose(self, t: int) -> None:
        if self.t != t:
            sampler = itertools.chain.from_iterable(map(self.mine, range(t, self.recipe.iterations)))
            loader = DataLoader(
                self.images, batch_sampler=sampler, num_workers=self.workers, pin_memory=self.like.is_cuda,
                # A fork of this process, which has threads, can hang before it begins.
                multiprocessing_context="spawn" if self.workers else None,
            )  # fmt: skip
            self.loader = iter(loader)
        self.t = t + 1
        n = sum(map(len, self.chosen(t)))
        self.now = [(x, y, len(y) / n) for x, y in itertools.islice(self.loader, self.accumulate)]

    def gather(self) -> tuple[list[tuple[torch.Tensor, torch.Tensor, float]]]:
        to = functools.partial(torch.Tensor.to, device=self.like.device, non_blocking=True)
        return ([(to(x).to(self.like.dtype), to(y), share) for x, y, share in self.now],)

    def chosen(self, t: int) -> list[list[tuple[int, int, int] | int]]:
        """The images of iteration t as they are cut into parts, [[(seed, epoch, image), …], …]."""
        epoch, i = divmod(t, self.per_epoch)
        B, [seed] = self.recipe.batch_size, self.seeds
        part = _order(len(self.images), seed, epoch)[i * B : (i + 1) * B].tensor_split(self.parts)
        return [[(seed, epoch, i) if self.recipe.augment != "none" else i for i in p.tolist()] for p in part]

    def mine(self, t: int) -> list[list[tuple[int, int, int] | int]]:
        return self.chosen(t)[self.rank :: self.parts // self.accumulate]


@functools.lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


# Training -------------------------------------------------------------------------------------------------------------


class Step(training.Step):
    """One iteration on the parts of a minibatch; returns the loss of all of it, on every device."""

    def __init__(self, model, recipe, opt, method, feed):
        super().__init__(model, recipe, opt, method, feed)
        ids = [feed.like.device.index] if feed.like.is_cuda else None
        self.forward = DistributedDataParallel(model, device_ids=ids)

    @property
    def batch(self) -> NoReturn:
        raise ValueError(f"{type(self.method).__name__} looks at the whole minibatch: train it on one device.")

    def __call__(self, parts):
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=self.dtype, device=parts[0][0].device)
        for i, (x, y, share) in enumerate(parts):
            last = i == len(parts) - 1
            with self.forward.no_sync() if not last else contextlib.nullcontext():
                with training.autocast(self.recipe, x):
                    logits = self.forward(x)
                loss = share * self.loss(logits.to(self.dtype), y)
                total += loss.detach()
                if last and (penalty := self.method.penalty(self.model)) is not None:
                    total += penalty.detach() / dist.get_world_size()
                    loss = loss + penalty / dist.get_world_size()
                (dist.get_world_size() * loss).backward()  # the devices' gradients are averaged
        self.optimizer.step()
        dist.all_reduce(total)
        return total


class Loop(training._Loop):
    """`training.fit`'s loop, on all devices; one of them keeps the checkpoint, at any iteration."""

    def run(self, checkpoint: training.Checkpoint) -> None:
        checkpoint.load(self)
        dist.barrier()
        while self.t < self.stop and self.under_way:
            self.iterate()
            if self.t in self.steps:
                self.read()
            if self.under_way and dist.get_rank() == 0:
                checkpoint.offer(self)

    @staticmethod
    @torch.no_grad()
    def evaluate(
        model: torch.nn.Module,
        split: data.Split,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int = 100,
        smoothing: float = 0.0,
    ) -> tuple[float, torch.Tensor]:
        """`training.evaluate` of a split whose `x` is a Dataset, a share of it on each device."""
        n, like = len(split), next(model.parameters())
        if not n:
            return math.nan, torch.zeros(0, dtype=torch.bool)
        for tensor in model.buffers():  # batch norm's averages are those of the first device
            dist.broadcast(tensor, 0)
        mine = list(range(n))[dist.get_rank() :: dist.get_world_size()]
        found = torch.zeros(n + 1, dtype=torch.float64, device=like.device)  # whether each is right, and the loss
        with training.modes_kept(model), futures.ThreadPoolExecutor(4) as threads:
            model.eval()
            for which in (mine[i : i + batch_size] for i in range(0, len(mine), batch_size)):
                x, y = default_collate(list(threads.map(split.x.__getitem__, which)))
                logits = model(x.to(like)).to(torch.promote_types(like.dtype, torch.float32))
                y = y.to(like.device)
                found[which] = (logits.argmax(1) == y).double()
                found[n] += F.cross_entropy(logits, y, reduction="sum", label_smoothing=smoothing)
        dist.all_reduce(found)
        return found[n].item() / n, found[:n].bool().cpu()


def train(
    r: Run, folder: Path | str, store: Store, accumulate: int = 1, workers: int = 4, every: float = 600.0
) -> training.History:
    """Train a run of a data set of images on all processes of the group, and keep it; returns its `History`.

    Call it in every process of an initialised `torch.distributed` group that sees the store's folder. every: seconds
    between two checkpoints. Raises ValueError for a run that cannot be trained so, FileNotFoundError without images.
    """
    if r.init == "rewind" and r.rewind_to:
        raise ValueError(f"{r} starts from the middle of another training, which is not kept: not on several devices.")
    if r.valid != 0 or r.train_fraction != 1:
        raise ValueError(f"{r} keeps images back: all of train/ are trained on. Give valid=0 and train_fraction=1.")
    work.code()  # as it is now, before somebody edits it during the training
    started, device, side = now(), _device(), data.SETS[r.dataset].shape[-1]
    images = {part: Images(folder, part, side) for part in ("train", "val")}
    shown = _read(r, images)
    work.check_data(r, shown.fingerprint, store)
    given, net = work.prepare(r, _scored(r, images["train"], side), store, device)
    method = given.method
    opt = net.optimizer or training.optimizer(net.model, r.recipe, method.param_groups(net.model, r.recipe))
    like = next(net.model.parameters())
    feed = Feed(images["train"], r.recipe, int(r.key[:15], 16), like, accumulate, workers)
    step = Step(net.model, r.recipe, opt, method, feed)
    loop = Loop([net.model], shown, r.recipe, method, step, feed, 0, r.recipe.iterations, graph=False)
    conditions = work.conditions(device, torch.get_num_threads()) | {"flush_denormal": False}
    conditions |= {"devices": dist.get_world_size(), "accumulate": accumulate}
    loop.run(kept := work.Kept(r, shown.fingerprint, store, conditions, every))
    [history] = loop.histories(time.perf_counter() - loop.began)
    if dist.get_rank() == 0:
        certificate = work.certify(work.algorithms_of(given), started, history.wall_s, conditions)
        certificate |= {"group": [r.key], **net.hashes, **kept.said()}
        certificate["weights"] = store.save_artifact(r.key, work.artifact_of(r, net))
        work.keep_row(r, {**work.row_of(r, shown, net.model, history, certificate), "moves": None}, store)
        store.checkpoint(r.key).unlink(missing_ok=True)
    dist.barrier()
    return history


def _device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    return device


def _read(r, images):
    """The sets as they are read: all test images, and as many of the training images, by their middles."""
    train, test = images["train"], images["val"]
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(test)].sort().values
    part = data.Split(torch.utils.data.Subset(train, some.tolist()), train.y[some])
    none = data.Split(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    said = "labels " + hashlib.sha256(str([images[p].y.tolist() for p in images]).encode()).hexdigest()
    return data.Data(r.dataset, part, none, data.Split(test, test.y), said, data.SETS[r.dataset].classes, MEAN, STD)


def _scored(r, train, side):
    """What weights are scored on, in memory: middles of as many images of each class as the criterion takes."""
    each = r.score_options.get("per_class", 0) if r.density or r.budget else 0
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(r.seed))
    chosen = [i for c in range(data.SETS[r.dataset].classes) for i in order[train.y[order] == c][:each].tolist()]
    x = torch.stack([train[i][0] for i in chosen]) if chosen else torch.zeros(1, 3, side, side)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    x = ((x * std + mean) * 255).round().to(torch.uint8)
    part = data.Split(x, train.y[chosen] if chosen else torch.zeros(1, dtype=torch.int64))
    return data.Data(r.dataset, part, part, part, "", data.SETS[r.dataset].classes, MEAN, STD)


# Command line ---------------------------------------------------------------------------------------------------------


def main(
    paper: Annotated[str, typer.Argument(help=f"One of {', '.join(papers.PAPERS)}.")],
    items: Annotated[list[str] | None, typer.Argument(help="As of `lottery run`, or imagenet (cs, grasp).")] = None,
    images: Annotated[Path, typer.Option(help="Folder with train/ and val/, or parquet shards of both.")] = ...,
    trials: Annotated[int | None, typer.Option(help="Seeds 0 … trials − 1.")] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a minibatch that a device takes in turn.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes of each device that decode images.")] = 4,
    results_dir: cli.ResultsDir = None,
) -> None:
    """Train a paper's runs on ImageNet that are not stored, each on all devices; started by torchrun.

    Exit status 3 says that runs are left: those that another job trains, and what needs them. (torchrun's own is 1.)
    """
    store, leases = Store(results_dir), None
    store.dir.mkdir(parents=True, exist_ok=True)
    runs = [r for r in _asked(paper, items, trials) if r.dataset == "imagenet"]
    if not runs:
        raise ValueError(f"Nothing of {paper} {' '.join(items or ())} is trained on ImageNet: `lottery run` trains it.")
    _device()  # before the group talks: each process has its own GPU
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank() == 0:
            leases = stack.enter_context(contextlib.closing(Leases(store.leases)))
        for r in _agreed(missing(runs, store)):
            if _agreed(leases and _take(r, runs, store, leases)):
                train(r, images, store, accumulate, workers)
                if leases:
                    leases.release([r.key])
        left = _agreed(len(missing(runs, Store(results_dir))))
        if dist.get_rank() == 0:
            typer.echo(f"{len(runs)} runs: {left} left.")
    if left:
        raise typer.Exit(cli.LEFT)


def _take(r, runs, store, leases):
    """Take a run unless it is another job's, has been stored by one meanwhile, or needs one that is another's."""
    if not leases.take([r.key]):
        return False
    left = missing(runs, store)
    if r in left and not needs(r).intersection(left):
        return True
    leases.release([r.key])
    return False


def _agreed(value):
    """What the first process says."""
    said = [value]
    dist.broadcast_object_list(said, 0)
    return said[0]


def _asked(paper, items, trials):
    if items and "imagenet" in items:
        declared = getattr(papers.paper(paper).module, "imagenet", None)
        if not declared:
            raise ValueError(f"Unknown item 'imagenet' of {paper}: its own items are trained on ImageNet.")
        return [r for seed in range(trials or 1) for r in declared(seed)]
    return cli._asked(paper, items, "paper", trials)


if __name__ == "__main__":
    typer.run(cli.kind_errors(main))
