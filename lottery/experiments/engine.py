"""The engine: trains the runs that the store does not have, parents first, on any `concurrent.futures.Executor`."""

import concurrent.futures as futures
import contextlib
import copy
import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from lottery import baselines, data, grasp, lth, models, tickets, training
from lottery import masks as M
from lottery.experiments.runs import Measurement, rates
from lottery.experiments.store import Store, now, pack_masks, versions

TOGETHER = 64  # runs side by side on a GPU


def run(runs, executor=None, budget=None, store=None, device="cpu", threads=1, progress=True):
    """Train what is missing of `runs` and of the parents they need; returns the runs left undone.

    Args:
        runs: Runs, most decisive first; long chains are kept busy before their side branches.
        executor: any `concurrent.futures.Executor` whose workers see the store's folder; default: one process per
            `threads` cores on the CPU, this process on a GPU or for a single run.
        budget: seconds; no run starts that is expected to end after it.
        device, threads: of one training.

    On a GPU up to `TOGETHER` runs of one fully connected network and one recipe train side by side.
    A run is kept the moment it ends. An interrupt waits for the trainings of other processes that are under way and is
    then raised; a second one abandons them. A run that raises stops its own descendants only; the first such error is
    raised at the end.
    """
    check(device, threads)
    runs, store = list(runs), store or Store()
    store.dir.mkdir(parents=True, exist_ok=True)
    todo = missing(runs, store)
    parents = {p for r in (*todo, *runs) for p in needs(r)}
    slots = getattr(executor, "_max_workers", None) or max(1, (os.cpu_count() or 1) // threads)
    slots = 1 if device != "cpu" and executor is None else min(slots, len(todo) or 1)
    clock, under_way, given_up, errors = _Clock(budget, store), {}, set(), []
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar(len(todo), progress))
        if own := executor is None:
            executor = stack.enter_context(_pool(slots))
        try:
            while todo or under_way:
                for r in todo:  # parents stand before their children
                    if given_up.intersection(needs(r)):
                        given_up.add(r)
                todo = _without(given_up, todo)
                waiting = {*todo, *(r for group in under_way.values() for r in group)}
                ready = [r for r in todo if not waiting.intersection(needs(r))]
                while ready and len(under_way) < slots:
                    group = [r for r in ready if _alike(r, device) == _alike(ready[0], device)][:TOGETHER]
                    todo, ready = _without(group, todo), _without(group, ready)
                    if clock.allows(group):
                        keep = [r in parents for r in group]
                        job = executor.submit(execute, group, store.dir, store.also, keep, device, threads)
                        under_way[job] = group
                    else:
                        given_up.update(group)
                if not under_way:
                    if not todo:
                        break
                    continue
                done, _ = futures.wait(under_way, return_when=futures.FIRST_COMPLETED)
                for job in done:
                    group = under_way.pop(job)
                    if error := job.exception():
                        errors.append(error)
                        given_up.update(group)
                    else:
                        clock.finished(group, job.result())
                    bar.update(len(group))
        except KeyboardInterrupt:
            if under_way:
                n = sum(map(len, under_way.values()))
                bar.write(f"Stopping: {n} trainings will be kept when they end; interrupt again to abandon.")
            try:
                futures.wait(under_way)
            except KeyboardInterrupt:
                if own:
                    executor.shutdown(wait=False, kill_workers=True)
            raise
    if errors:
        raise errors[0]
    return missing(runs, store)


def check(device, threads):
    """Raises ValueError for a device that is not here or a number of threads that is none."""
    here = device == "cpu" or (str(device).startswith("cuda") and torch.cuda.is_available())
    if not here:
        raise ValueError(f"Invalid device {device!r}: give cpu, or cuda where a GPU is present.")
    if type(threads) is not int or threads < 1:
        raise ValueError(f"Invalid threads {threads!r}: give a whole number from 1.")


def needs(r):
    """The runs whose final weights this one starts from or is measured against."""
    needed = {r.parent, r.root} if getattr(r, "init", None) == "survivors" else {r.parent}
    return needed - {None}


def missing(runs, store):
    """Runs to train so that all of `runs` are stored, longest chain first: a missing run needs its parent's weights."""
    todo = {}

    def need(r, weights=False):
        if r in todo or (store.get(r) and not (weights and not store.artifact(r.key).exists())):
            return
        for p in needs(r):
            need(p, weights=True)
        todo[r] = None

    for r in runs:
        need(r)
    depth = dict.fromkeys(todo, 0)
    for r in reversed(list(todo)):
        if r.parent in depth:
            depth[r.parent] = max(depth[r.parent], depth[r] + 1)
    return sorted(todo, key=lambda r: -depth[r])


def execute(runs, results_dir, also=(), keep_weights=(), device="cpu", threads=1):
    """Train some runs, side by side when there are several, or take a measurement; keep them in the store.

    Returns the wall time in seconds. `keep_weights` says for each whether its final weights are kept; none are by
    default. The process's own numbers of threads and warning filters are left as they were.
    """
    store, started, before = Store(results_dir, also), now(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        r = runs[0]
        if isinstance(r, Measurement):
            return _measure(r, store, started, device, threads)
        images = training.take(_images(r.dataset, r.valid, r.split_seed), r.train_fraction)
        nets = [initialise(r, images, store, device) for r in runs]
        orders = [int(r.key[:15], 16) for r in runs]
        if len(runs) == 1:
            histories = [training.fit(nets[0][0], images, r.recipe, seed=orders[0], start=_start(r))]
        else:
            histories = training.fit([net for net, _ in nets], images, r.recipe, seed=orders, start=_start(r))
    finally:
        torch.set_num_threads(before)
    keep_weights = keep_weights or [False] * len(runs)
    for r, (model, hashes), history, keep in zip(runs, nets, histories, keep_weights, strict=True):
        weights = store.save_artifact(r.key, {**M.state(model), **_prefixed(M.read(model))}) if keep else None
        certificate = _certificate(_algorithms(r), started, history.wall_s, device, threads)
        certificate |= {"group": [r.key for r in runs], "weights": weights, **hashes}
        moves = _moves(r, images, model, store) if r.init == "survivors" else None
        store.put({**_row(r, images, model, history, certificate), "moves": moves})
    return sum(history.wall_s for history in histories)


def _start(r):
    return r.rewind_to if r.init == "rewind" and r.rewind_schedule == "continue" else 0


def _alike(r, device):
    """What runs have in common that may train side by side; on a CPU processes are faster, so nothing."""
    if device == "cpu" or isinstance(r, Measurement) or not _fully_connected(r.model, r.dataset, r.options, r.recipe):
        return r.key
    return r.model, r.dataset, r.options, r.valid, r.split_seed, r.train_fraction, r.recipe, _start(r)


@functools.cache
def _fully_connected(model, dataset, options, recipe):
    facts = data.SETS[dataset]
    net = models.create(model, seed=0, in_shape=facts.shape, classes=facts.classes, **dict(options))
    return training.populations([net], recipe)


def _without(some, runs):
    return [r for r in runs if r not in some]


def _measure(r, store, started, device, threads):
    began = time.perf_counter()
    columns = r.measure(device)
    certificate = _certificate(r.versions, started, time.perf_counter() - began, device, threads)
    row = {name: getattr(r, name) for name in ("key", "model", "dataset", "seed")} | {"status": "finished"}
    row |= {name: certificate[name] for name in ("started", "device", "wall_s")}
    row |= {"spec": json.dumps(r.spec(), sort_keys=True), "certificate": json.dumps(certificate, sort_keys=True)}
    store.put(row | columns)
    return certificate["wall_s"]


def _certificate(algorithms, started, wall_s, device, threads):
    """How a result came about; `algorithms`: the modules whose VERSION it depends on."""
    return {
        "versions": {name: v for name, v in versions().items() if name in algorithms},
        "packages": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "device": _device_name(device),
        "threads": threads,
        "compile": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "started": started,
        "wall_s": round(wall_s, 3),
        "code": _code(),
    }


def initialise(r, images, store, device="cpu"):
    """The network of a run before its training: m ⊙ θ on the model; sha256 of θ and of its parent's weights."""
    create = functools.partial(_create, r, images)
    model, parent_sha, fresh = M.attach(create(seed=r.seed)), None, int(r.key[15:], 16) % 2**31
    theta_0, generator = M.state(model), torch.Generator().manual_seed(fresh)
    if r.parent:
        trained, parent_sha = _load_artifact(store, r.parent)
        m = {name.removeprefix("mask/"): t.bool() for name, t in trained.items() if name.startswith("mask/")}
        trained = {name: t for name, t in trained.items() if not name.startswith("mask/")}
        M.attach(M.restore(model, trained), m)
    if r.parent or r.density:
        m = pruned(r, model, images, torch.Generator().manual_seed(fresh), device)  # a generator of its own
        if r.init == "random":
            m = lth.random_masks(m, generator)
        M.attach(model, m)
        if r.init in ("reinit", "random"):
            M.restore(model, M.state(create(seed=fresh)))
        elif r.init == "survivors":
            M.restore(model, lth.from_survivors(theta_0, m, generator))
        elif r.init == "noise":
            M.restore(model, lth.add_noise(theta_0, m, r.noise, generator))
        elif r.init in ("reset", "rewind"):
            M.restore(model, theta_0)
    if r.init == "rewind" and r.rewind_to:
        dense = M.attach(create(seed=r.seed)).to(device)
        training.fit(dense, images, r.root.recipe, seed=int(r.root.key[:15], 16), stop=r.rewind_to)
        M.restore(model, M.state(dense))
    theta = tickets.digest(M.state(model))
    return model.to(device), {"theta0": theta, "parent_weights": parent_sha}


def _create(r, images, seed):
    shape = tuple(images.train.x.shape[1:])
    return models.create(r.model, seed=seed, in_shape=shape, classes=images.classes, **dict(r.options))


def _moves(r, images, model, store):
    """`tickets.moves` of the dense training that this run's mask comes from, as JSON.

    One run for each ticket holds it, that with new values from the survivors: nothing else needs dense weights as well.
    """
    theta_J, _ = _load_artifact(store, r.root)
    return json.dumps(tickets.moves(M.state(_create(r, images, r.seed)), theta_J, M.read(model)))


def pruned(r, model, images, generator, device="cpu"):
    """The masks of a run, of the network as it is before them; `generator` draws what the criterion draws."""
    if r.density is None:
        return lth.prune(model, r.rate if r.scope == "global" else rates(model, r), r.scope)
    density = dict(r.density) if isinstance(r.density, tuple) else r.density
    return M.top_k(scores(r, model, images, generator, device), density, within=M.read(model))


def scores(r, model, images, generator, device="cpu"):
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


def _row(r, images, model, history, certificate):
    m = M.read(model)
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
    }
    for name, at in (("early_stop", history.early_stop), ("last", history.last)):
        if at:
            row |= {f"{name}_{f}": getattr(at, f) for f in ("step", "val_loss", "val_acc", "test_acc", "train_acc")}
            row[f"{name}_correct"] = np.packbits(at.correct).tobytes()
    return row


def _nulls(values):
    return [None if np.isnan(v) else v for v in values]


def _algorithms(r):
    """The modules with a VERSION that a result depends on."""
    ranked = {"snip": ("grasp", "baselines"), "grasp": ("grasp",)}.get(r.criterion, ("baselines",))
    return ("training", *(ranked if r.density else ("lth",)))


class _Clock:
    """Expected duration of a run: seconds per unit of work of the last like it, in this call or in the store."""

    def __init__(self, budget, store):
        self.end = None if budget is None else time.monotonic() + budget
        self.pace = {} if budget is None else store.paces()

    def allows(self, group):
        expected = sum(self.pace.get(r.like, 0) * r.work for r in group)
        return self.end is None or time.monotonic() + expected <= self.end

    def finished(self, group, wall_s):
        for r in group:
            self.pace[r.like] = wall_s / len(group) / r.work


class _Here(futures.Executor):
    """Runs at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):
        future = futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _pool(slots):
    """Worker processes; loky's do not import the caller's __main__, so an unguarded script or stdin works too."""
    if slots == 1:
        return _Here()
    from joblib.externals.loky import ProcessPoolExecutor

    return ProcessPoolExecutor(slots, initializer=_worker)


def _worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides


def _bar(total, progress):
    from tqdm import tqdm

    return tqdm(total=total, unit="run", disable=None if progress else True)


@functools.lru_cache(maxsize=2)
def _images(name, valid, split_seed):
    return data.load(name, valid=valid, split_seed=split_seed)


def _load_artifact(store, parent):
    """The final weights and masks of a parent, and the file's sha256; a damaged file is set aside by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = store.artifact(parent.key)
    content = path.read_bytes()
    try:
        return load(content), hashlib.sha256(content).hexdigest()
    except SafetensorError:
        path.rename(path.with_suffix(".damaged"))
        raise ValueError(f"Damaged weights {path}: set aside; run again, and they are trained again.") from None


def _prefixed(masks):
    return {f"mask/{name}": m for name, m in masks.items()}


def _device_name(device):
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _code():
    """Commit and hash of the package's source: information only, neither makes a run stale."""
    folder = Path(__file__).parents[1]
    source = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    git = ["git", "-C", folder, "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"commit": commit, "source": hashlib.sha256(source).hexdigest()[:16]}
