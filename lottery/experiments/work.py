"""What a worker does: the network of a run before its training, the training, the row that is kept of it."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import platform
import re
import threading
import time
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lottery import baselines, data, files, grasp, lth, models, tensorfile, tickets, training
from lottery import masks as M
from lottery.batches import take
from lottery.experiments.runs import Measurement, Run, rates
from lottery.experiments.store import Store, now, pack_masks, versions
from lottery.methods import Method


def execute(
    runs: Sequence[Run | Measurement],
    results_dir: Path | str,
    also: Iterable[Path | str] = (),
    keep_weights: Sequence[bool] = (),
    device: str = "cpu",
    threads: int = 1,
    compiled: bool = False,
) -> float:
    """Train some runs, side by side when there are several, or take a measurement; keep them in the store.

    Returns the wall time in seconds. `keep_weights` says for each whether its final weights are kept; none are by
    default. compiled: as of `training.fit`. The process's own settings, numbers of threads and what this thread does
    with denormal numbers, and its warning filters are left as they were; of torch's other threads see `settings_for`.
    """
    store, started, r = Store(results_dir, also), now(), runs[0]
    code()  # as it is now, before somebody edits it during a training
    with _beside(alone=bool(dict(getattr(r, "options", ())).get("dropout"))), settings_for(threads):
        if isinstance(r, Measurement):
            return _measure(r, store, started, device, threads)
        images = take(images_of(r.dataset, r.valid, r.balanced, r.split_seed), r.train_fraction)
        for r in runs:
            check_data(r, images.fingerprint, store)
        ends = [_ends(r, images, store) if r.init == "survivors" else None for r in runs]
        given, nets = zip(*(prepare(r, images, store, device) for r in runs), strict=True)
        orders = [int(r.key[:15], 16) for r in runs]
        how = {"start": start(r), "method": given[0].method, "compiled": compiled}
        kept = Kept(r, images.fingerprint, store, conditions(device, threads, compiled))
        if len(runs) == 1:
            [net], [order] = nets, orders
            histories = [fit_alike(net.model, images, r.recipe, seed=order, opt=net.optimizer, checkpoint=kept, **how)]
        else:
            histories = training.fit([net.model for net in nets], images, r.recipe, seed=orders, **how)
        if compiled:  # every network counts as a recompilation; at the eighth torch.compile gives up for good
            torch.compiler.reset()
    keep_weights = keep_weights or [False] * len(runs)
    for r, spent, net, history, keep, dense in zip(runs, given, nets, histories, keep_weights, ends, strict=True):
        weights = store.save_artifact(r.key, artifact_of(r, net)) if keep else None
        certificate = certify(algorithms_of(spent), started, history.wall_s, kept.conditions)
        certificate |= {"group": [r.key for r in runs], "weights": weights, **net.hashes, **kept.said()}
        moves = json.dumps(tickets.moves(*dense, M.read(net.model))) if dense else None
        keep_row(r, {**row_of(r, images, net.model, history, certificate), "moves": moves}, store)
        store.checkpoint(r.key).unlink(missing_ok=True)
    return sum(history.wall_s for history in histories)


def keep_row(r: Run, row: dict[str, Any], store: Store) -> None:
    """Store a run's row, or leave the one that is stored already.

    Warns (UserWarning) where that one is of other weights than were trained now: its children start from these.
    """
    if store.put(row):
        return
    mine, stored = (json.loads(one["certificate"]) for one in (row, next(store.find(r.key))))
    if None in (mine["weights"], stored.get("weights")) or mine["weights"] == stored["weights"]:
        return
    names = ("threads", "compile", "device", "processor", "packages", "versions")
    differ = [
        f"{name} {mine.get(name)} and not {stored.get(name)}" for name in names if mine.get(name) != stored.get(name)
    ]
    warnings.warn(
        f"Other weights than the stored run's: {r!r}, trained again for what starts from it"
        + f", with {', '.join(differ)}" * bool(differ)
        + ". Its children then go on from another training than the one that is shown.",
        stacklevel=2,
    )


class _Beside:
    """Trainings of one process, in its threads: side by side, but one with dropout alone.

    Dropout draws from torch's own generator, of which a process has one, and every other training puts it back on its
    way to where it was. Side by side they put it back to where another one was: so the last one does it for all.
    """

    def __init__(self):
        self.changed, self.inside = threading.Condition(), 0

    @contextlib.contextmanager
    def __call__(self, alone):
        with self.changed:
            self.changed.wait_for(lambda: self.inside == 0 if alone else self.inside >= 0)
            if not self.inside:
                self.state = torch.get_rng_state()
            self.inside += -1 if alone else 1
        try:
            yield
        finally:
            with self.changed:
                self.inside -= -1 if alone else 1
                if not self.inside:
                    torch.set_rng_state(self.state)
                self.changed.notify_all()


_beside = _Beside()


class Kept(training.Checkpoint):
    """The checkpoint of a run on some data; one of other data is not used, one of other `conditions` is, and told of.

    conditions: this process's. every: as of `training.Checkpoint`.
    """

    def __init__(self, r: Run, fingerprint: str, store: Store, conditions: dict[str, Any], every: float = 60.0):
        about = {"run": r.key, "versions": versions(), "fingerprint": fingerprint, "conditions": [conditions]}
        super().__init__(store.checkpoint(r.key), about, every)
        self.conditions = conditions

    def load(self, loop: training._Loop) -> None:
        """As of `training.Checkpoint`."""
        began, mine = loop.t, self.about["conditions"]
        with contextlib.suppress(OSError, ValueError, KeyError):
            self.about["conditions"] = tensorfile.read(self.path)[1]["is"]["conditions"]
        super().load(loop)
        self.about["conditions"] = mine if loop.t == began else self.about["conditions"] + mine

    def said(self) -> dict[str, list[dict[str, Any]]]:
        """For the certificate: what was otherwise in each process that trained a part before this one."""
        *earlier, last = self.about["conditions"]
        others = [{n: one.get(n) for n in one | last if one.get(n) != last.get(n)} for one in earlier]
        return {"resumed": others} if others else {}


def check_data(r: Run | Measurement, fingerprint: str, store: Store) -> None:
    """Raise ValueError where what a run needs, or itself when only its weights are trained again, had other data.

    And where a newer version has stored it.
    """
    for one in (r.parent, *getattr(r, "trained", ()), r):
        row = one and next(store.find(one.key), None)
        if row and row["fingerprint"] != fingerprint:
            raise ValueError(
                f"Other data than before: {r.dataset} has fingerprint {fingerprint[:12]} here, but {one!r} is stored "
                f"with {row['fingerprint'][:12]}; set LOTTERY_DATA to those images, or name another --results-dir."
            )


def fit_alike(
    model: torch.nn.Module, images: data.Data, recipe: training.Recipe, seed: int, **how: Any
) -> training.History:
    """`training.fit`; dropout draws from torch's own generator, so that is given the seed for as long."""
    with grasp.same_rng(next(model.parameters())):
        torch.manual_seed(seed % 2**63)
        return training.fit(model, images, recipe, seed=seed, **how)


@contextlib.contextmanager
def settings_for(threads: int) -> Iterator[None]:
    """So many threads, and denormal numbers flushed to 0; the caller's settings afterwards.

    Adam's moments of weights on rarely lit pixels decay into denormal numbers, on which some CPUs are slow. Each thread
    flushes or not: this one does, and those of torch's that begin inside do for good; those that began before do not.
    """
    before, flushes = torch.get_num_threads(), bool(torch.tensor(1e-40) * 1 == 0)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushes)


def spending(r: Run, images: data.Data, store: Store) -> Run:
    """The run with the densities of its `budget` filled in, as one without a parent; every layer keeps a weight."""
    if not r.budget:
        return r
    kept = {name: (max(k, 1), n) for name, (k, n) in json.loads(store.get(r.parent)["layers"]).items()}
    total = sum(k for k, _ in kept.values()) / sum(n for _, n in kept.values())
    if r.budget == "layers":
        density = {name: k / n for name, (k, n) in kept.items()}
    elif r.budget == "total":
        density = dict.fromkeys(kept, total)
    else:
        density = baselines.erk(_create(r, images, r.seed), total)
    density = tuple((name, max(density[name], 1 / n)) for name, (_, n) in kept.items())
    if hasattr(r.method, "density"):
        r = dataclasses.replace(r, method=dataclasses.replace(r.method, density=density))
    else:
        r = dataclasses.replace(r, density=density)
    return dataclasses.replace(r, parent=None, budget="")


def start(r: Run) -> int:
    return r.rewind_to if r.init == "rewind" and r.rewind_schedule == "continue" else 0


def _measure(r, store, started, device, threads):
    began = time.perf_counter()
    columns = r.measure(device, *(store.load_artifact(p.key)[0] for p in r.trained))
    check_data(r, columns["fingerprint"], store)
    certificate = certify(r.versions, started, time.perf_counter() - began, conditions(device, threads))
    row = {name: getattr(r, name) for name in ("key", "model", "dataset", "seed")} | {"status": "finished"}
    row |= {name: certificate[name] for name in ("started", "device", "wall_s")}
    row |= {"spec": json.dumps(r.spec(), sort_keys=True), "certificate": json.dumps(certificate, sort_keys=True)}
    store.put(row | columns)
    return certificate["wall_s"]


def conditions(device: torch.device | str, threads: int, compiled: bool = False) -> dict[str, Any]:
    """The execution record: what a result may depend on beside its run, its data and the algorithms."""
    return {
        "packages": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": device_name(device),
        "processor": processor(),
        "threads": threads,
        "compile": compiled,
        "flush_denormal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def certify(algorithms: Container[str], started: str, wall_s: float, conditions: dict[str, Any]) -> dict[str, Any]:
    """How a result came about; `algorithms`: the modules whose VERSION it depends on."""
    used = {name: v for name, v in versions().items() if name in algorithms}
    return {"versions": used, **conditions, "started": started, "wall_s": round(wall_s, 3), "code": code()}


class Net(NamedTuple):
    """A run's network before its training, its optimiser where that goes on too, and the hashes of the certificate."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    hashes: dict[str, str | None]


def prepare(r: Run, images: data.Data, store: Store, device: torch.device | str = "cpu") -> tuple[Run, Net]:
    """What every trainer begins with: the run with its budget filled in, by whose method it is trained, and its `Net`.

    What is kept is said to be of the run as it was given.
    """
    given = spending(r, images, store)
    return given, initialise(given, images, store, device)


def initialise(r: Run, images: data.Data, store: Store, device: torch.device | str = "cpu") -> Net:
    """The `Net` of a run: m ⊙ θ, or the parent's network where its method goes on."""
    create, fresh = functools.partial(_create, r, images), int(r.key[15:], 16) % 2**31
    source, m, memory, parent_sha = _source(r, create, store)
    if r.goes_on:
        r.method.resume(source)
        model = source
    else:
        if r.parent or r.density:
            m = pruned(r, source, m, images, torch.Generator().manual_seed(fresh), device)
        if r.init == "random" or r.shuffled:
            m = lth.random_masks(m, torch.Generator().manual_seed(fresh))
        model = create(seed=r.seed)
        learns_masks = type(r.method).masks is not Method.masks  # which then stand in the masks' place
        if r.parent or r.density or (r.layers and not learns_masks):
            M.attach(model, m)
        r.method.attach(model)
        if r.layers and set(pruning := r.method.masks(model)) != set(r.layers):
            raise ValueError(f"{type(r.method).__name__} prunes {', '.join(pruning)}, and not the layers of the Run.")
        theta = _values(r, m, create, source, images, device, torch.Generator().manual_seed(fresh))
        own = M.state(model)  # under its own method's parametrizations, which may be others than θ's
        M.restore(model, {name: theta.get(name, t) for name, t in own.items()})
    hashes = {"theta0": tickets.digest(M.state(model)), "parent_weights": parent_sha}
    model, opt = model.to(device), None
    if r.method.carries:
        opt = training.optimizer(model, r.recipe, r.method.param_groups(model, r.recipe))
        if r.goes_on:
            if not memory:
                raise ValueError(
                    "No momentum is stored with the parent: its method carries none. Set carry=False here."
                )
            training.remember(opt, model, memory)
    return Net(model, opt, hashes)


def _source(r, create, store):
    """The network whose weights are ranked, the parent's as trained or θ₀; its masks, optimiser's state, file's sha."""
    net = create(seed=r.seed)
    if not r.parent:
        names = M.prunable(net) if r.layers is None else r.layers
        M.check_names(names, M.prunable(net), "layers", "model", complete=False)
        ones = {name: torch.ones_like(net.get_submodule(name).weight, dtype=torch.bool) for name in names}
        return M.attach(net, ones), ones, {}, None
    trained, sha = store.load_artifact(r.parent.key)
    masks = _part(trained, "mask/")
    if masks:
        M.attach(net, masks)
    theta = {name: t for name, t in trained.items() if name.partition("/")[0] not in APART}
    M.restore(r.parent.method.attach(net), theta)
    return net, masks or _part(trained, "learned/"), _part(trained, "optimizer/"), sha


def _values(r, m, create, source, images, device, generator):
    """The run's θ: the values that its weights, those under the mask included, start from."""
    theta_0 = M.state(create(seed=r.seed))
    if r.init in ("reinit", "random"):
        return M.state(create(seed=int(r.key[15:], 16) % 2**31))
    if r.init == "continue":
        return M.state(source)
    if r.init == "effective":
        return M.state(M.bake(source.eval()))
    if r.init == "survivors":
        return lth.from_survivors(theta_0, m, generator)
    if r.init == "noise":
        return lth.add_noise(theta_0, m, r.noise, generator)
    if r.init == "rewind" and r.rewind_to:  # θ_k of the training at the root, with what that one learns beside weights
        # Without torch.compile, as in all runs that are stored: of a compiled root this is a point near its way, since
        # the two round differently.
        root = r.root.method.attach(create(seed=r.seed)).to(device)
        order = int(r.root.key[:15], 16)
        fit_alike(root, images, r.root.recipe, seed=order, stop=r.rewind_to, method=r.root.method)
        return M.state(root)
    return theta_0


APART = ("mask", "learned", "optimizer")  # what an artifact holds beside `masks.state`, by prefix


def artifact_of(r: Run, net: Net) -> dict[str, torch.Tensor]:
    """All that a child may need: θ, the masks that are on the model or else those it has learned, the momentum."""
    masks = M.read(net.model)
    learned = {} if masks else r.method.masks(net.model)
    memory = training.memory(net.optimizer, net.model) if net.optimizer else {}
    apart = {"mask/": masks, "learned/": learned, "optimizer/": memory}
    return M.state(net.model) | {prefix + name: t for prefix, part in apart.items() for name, t in part.items()}


def _create(r, images, seed):
    shape = tuple(images.train.x.shape[1:])
    return models.create(r.model, seed=seed, in_shape=shape, classes=images.classes, **dict(r.options))


def _ends(r, images, store):
    """θ₀ and θ_J of the dense training that this run's mask comes from, for `tickets.moves`.

    One run for each ticket holds it, that with new values from the survivors: nothing else needs dense weights as well.
    """
    return M.state(_create(r, images, r.seed)), store.load_artifact(r.root.key)[0]


def pruned(
    r: Run,
    model: torch.nn.Module,
    within: dict[str, torch.Tensor],
    images: data.Data,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> dict[str, torch.Tensor]:
    """The masks of a run from those before, `within`, whose layers alone are ranked; `generator` is the criterion's."""
    if r.density is None:
        each = dict.fromkeys(within, r.rate) if r.scope == "global" else rates(model, r)
        return lth.prune(model, {name: each[name] for name in within}, r.scope, within)
    density = dict(r.density) if isinstance(r.density, tuple) else r.density
    if r.criterion == "synflow":
        shape = tuple(images.train.x.shape[1:])
        return baselines.synflow(model, shape, density, r.score_options["rounds"], layers=list(within))
    ranked = scores(r, model, images, generator, device)
    return M.top_k({name: ranked[name] for name in within}, density, within=within)


def scores(
    r: Run, model: torch.nn.Module, images: data.Data, generator: torch.Generator, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """`{layer: tensor}` on the CPU by the run's criterion. SNIP scores the copy and the batch that GraSP scores."""
    if r.criterion == "magnitude":
        return baselines.magnitude_scores(model)
    if r.criterion == "random":
        return baselines.random_scores(model, generator)
    o = r.score_options
    halves, augment = o["class_sorted"] and o["chunks"] > 1, r.recipe.augment != "none"
    batch = grasp.class_balanced(images, o["per_class"], generator, halves, r.draws, augment)
    net = grasp.with_xavier_linear(model, generator) if o["reinit_linear"] else copy.deepcopy(model)
    if r.criterion == "snip":
        ranked = baselines.snip_scores(net.to(device), batch)
    else:
        ranked = grasp.scores(net.to(device), batch, o["temperature"])
    return {name: v.cpu() for name, v in ranked.items()}


def row_of(
    r: Run, images: data.Data, model: torch.nn.Module, history: training.History, certificate: dict[str, Any]
) -> dict[str, Any]:
    """The row of the store of a finished training: every column of `store.schema`."""
    m = r.method.masks(model)
    row = {
        "key": r.key,
        "parent": r.parent and r.parent.key,
        "model": r.model,
        "dataset": r.dataset,
        "fingerprint": images.fingerprint,
        "init": r.init,
        "status": history.status,
        "started": certificate["started"],
        "device": certificate["device"],
        "seed": r.seed,
        "level": r.level,
        "draw": r.draw,
        "iterations": r.recipe.iterations,
        "n_valid": len(images.valid.y),
        "n_test": len(images.test.y),
        "density": M.density(m),
        "wall_s": certificate["wall_s"],
        "censored": history.censored,
        "step": history.step,
        "val_loss": history.val_loss,
        "val_acc": history.val_acc,
        **{name: _nulls(getattr(history, name)) for name in ("test_acc", "test_loss", "batch_loss")},
        # Tickets whose curves are drawn keep their masks; a control has its ticket's, and a sweep's serves no figure.
        "mask": pack_masks(m) if r.recipe.test_readings == "all" else None,
        "spec": json.dumps(r.spec(), sort_keys=True),
        "layers": json.dumps({name: [int(t.sum()), t.numel()] for name, t in m.items()}),
        "train_loss": json.dumps(history.train_loss),
        "certificate": json.dumps(certificate, sort_keys=True),
        "numbers": _numbers(history.numbers),
    }
    for name, at in (("early_stop", history.early_stop), ("last", history.last)):
        if at:
            row |= {f"{name}_{f}": getattr(at, f) for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc")}
            row[f"{name}_correct"] = np.packbits(at.correct).tobytes()
    return row


def _numbers(numbers):
    """`{name: one value a reading}` as JSON, six digits each, or None for a method that keeps none."""
    rounded = {name: [float(f"{x:.6g}") for x in values] for name, values in numbers.items()}
    return json.dumps(rounded) if rounded else None


def _nulls(values):
    return [None if np.isnan(v) else v for v in values]


def algorithms_of(r: Run) -> tuple[str, ...]:
    """The modules with a VERSION that the result of a run with its budget filled in depends on."""
    ranked = {"snip": ("grasp", "baselines"), "grasp": ("grasp",)}.get(r.criterion, ("baselines",))
    ranked = ranked if r.density else ("lth",)
    method = (kind.__module__.split(".")[-1] for kind in type(r.method).__mro__)
    return ("training", *ranked, *method)


@functools.lru_cache(maxsize=2)
def images_of(name: str, valid: int | None, balanced: bool, split_seed: int) -> data.Data:
    """The data set of a Run; the last ones stay loaded."""
    return data.load(name, valid=valid, balanced=balanced, split_seed=split_seed)


def _part(tensors, prefix):
    """A part of an artifact, see `artifact_of`."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def device_name(device: torch.device | str) -> str:
    """What a row says a run was trained on: the GPU's name, or the CPU's kind and vector instructions."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def processor() -> str | None:
    """Maker, family, model and stepping of the processor as Linux tells them, "GenuineIntel 6 143 8"; None elsewhere.

    Two with the same vector instructions need not agree in the last bit of a product.
    """
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = dict(re.findall(r"^(vendor_id|cpu family|model|stepping)\s*: (.+)$", told, re.MULTILINE))
    return " ".join(found.values()) or None


@functools.cache
def code() -> dict[str, str | None]:
    """Commit and hash of the package's source: information only, neither makes a run stale."""
    folder = Path(__file__).parents[1]
    source = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return {"commit": files.git(folder, "rev-parse", "HEAD"), "source": hashlib.sha256(source).hexdigest()[:16]}
