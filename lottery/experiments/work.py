"""What a worker does: the network of a run before its training, the training, the row that is kept of it."""

import copy
import functools
import hashlib
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from lottery import baselines, data, grasp, lth, models, tickets, training
from lottery import masks as M
from lottery.batches import take
from lottery.experiments.runs import Measurement, rates
from lottery.experiments.store import Store, now, pack_masks, versions


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
        images = take(_images(r.dataset, r.valid, r.split_seed), r.train_fraction)
        nets = [initialise(r, images, store, device) for r in runs]
        orders = [int(r.key[:15], 16) for r in runs]
        if len(runs) == 1:
            histories = [training.fit(nets[0][0], images, r.recipe, seed=orders[0], start=start(r))]
        else:
            histories = training.fit([net for net, _ in nets], images, r.recipe, seed=orders, start=start(r))
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


def start(r):
    return r.rewind_to if r.init == "rewind" and r.rewind_schedule == "continue" else 0


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
