"""The audit: stored results are trained again, from nothing, and compared with what the store says.

Which ones is drawn by the hash of a commit, so that nobody chooses, and by turns from each paper and evidence. All that
a result stands on is trained again as well, in fresh processes and a store of its own: no mask and no weight comes from
the store, and what is trained on the way is compared, too. With a prefix the drawn run itself stops after 500 steps.

Under the same execution record (torch, processor, threads, how many side by side, …) a result has to come out bit by
bit. Elsewhere trajectories part, and of a training that was resumed they may: of two LeNets whose arithmetic differs in
the last bit the losses are within 1e-6 of each other after 100 steps and a per cent apart after 500, of ResNet-8 in
bfloat16 a per cent apart after 50. So the first losses have to agree within LOSS, for as many steps as ALIKE says, and
the last accuracy within ACCURACY points. What does not is a miss; it is explained where something else is known to be
different.
"""

import functools
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lottery import files, training
from lottery.batches import take
from lottery.experiments import PAPERS, engine, pace, papers, work
from lottery.experiments.runs import Measurement, Run
from lottery.experiments.store import Store, now, stale

PREFIX = 500  # steps
LOSS = 1e-3  # relative
ALIKE = {"float32": 100, "bfloat16": 10}  # steps
ACCURACY = {"float32": 0.3, "bfloat16": 1.5}  # points
# What two certificates under one execution record may differ in: what was trained, when, and its hashes.
NO_RECORD = {"versions", "started", "wall_s", "code", "weights", "theta0", "parent_weights"}
TIMES = ("wall_s", "started", "device", "certificate", "payload_sha", "parent", "spec")  # no results
SAME, CLOSE, EXPLAINED, MISS = "identical", "within tolerance", "explained miss", "miss"
UNTRAINED = "not trained"
BAD = (MISS, UNTRAINED)  # for the exit status


# What is drawn --------------------------------------------------------------------------------------------------------


class Declared(NamedTuple):
    """A run and what it is for: of several papers, or items of one, the first."""

    paper: str
    item: str
    evidence: str
    run: Run | Measurement


def declared(store: Store) -> dict[str, Declared]:
    """All that is declared and stored, by its key."""
    found, stored = {}, set(store.keys())
    for paper in PAPERS:
        module = papers.paper(paper)
        for scale in module.scales:
            evidence = {"paper": "full", "primary": "full", "smoke": "none"}.get(scale, "reduced or stand-in")
            for item in module.items:
                for r in module.runs(item, scale):
                    if r.key in stored:
                        found.setdefault(r.key, Declared(paper, item, evidence, r))
    return found


def draw(runs: dict[str, Declared], n: int, commit: str) -> list[str]:
    """n keys of `declared` runs, by turns from each paper and evidence, within them in the order of a hash."""
    strata = {}
    for key, known in runs.items():
        strata.setdefault((known.paper, known.evidence), []).append(key)
    turns = {
        key: (turn, stratum)
        for stratum, keys in strata.items()
        for turn, key in enumerate(sorted(keys, key=lambda key: hashlib.sha256((commit + key).encode()).digest()))
    }
    return sorted(turns, key=turns.get)[:n]


def commit() -> str:
    """The hash of the commit of this code. Raises ValueError where there is none."""
    if found := work.code()["commit"]:
        return found
    raise ValueError("No commit to draw by: lottery is not run from a git clone. Give --commit.")


def needed(runs: Iterable[Run | Measurement]) -> dict[Run | Measurement, None]:
    """`{run: None}` of some runs and all that they are trained from, parents first."""
    found = {}

    def need(r):
        for p in engine.needs(r):
            need(p)
        found[r] = None

    for r in runs:
        need(r)
    return found


def seconds(runs: Iterable[Run | Measurement], store: Store, prefix: bool = False) -> float:
    """What some runs and all they need took as they are stored; of what is not stored, what as many steps take."""
    paces, todo = pace.paces(store), needed(runs)
    parents = {p for r in todo for p in engine.needs(r)}

    def took(r):
        row = store.row(r.key)
        whole = row["wall_s"] if row else pace.expected(paces, r.kind, r.work) or 0
        return whole if r in parents or not prefix else whole * min(1, PREFIX / r.work)

    return sum(map(took, todo))


# What comes out -------------------------------------------------------------------------------------------------------


def audit(
    keys: Collection[str],
    known: dict[str, Declared],
    store: Store,
    prefix: bool = False,
    jobs: int = 1,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], object] = print,
    keep: Callable[[list[dict[str, Any]]], object] = lambda found: None,
) -> list[dict[str, Any]]:
    """Train some stored runs again, `jobs` chains side by side; returns what came out of each, as JSON types.

    keys: of `known`, the `declared` runs. A chain is what has one dense training in common; what is trained on the way
    has drawn False, and is left out where it is not stored. An outcome is that of `compare`, with key, paper, item,
    evidence, run, drawn and the `spread` of its trials. A chain that raises, or whose process dies, is not trained and
    takes no other one with it.
    keep: called with all outcomes so far after each chain.
    """
    chains, found, under_way, spread = {}, [], {}, spreads(known, store)

    def tell(r, outcome):
        paper, item, evidence, _ = known.get(r.key, (None, None, None, r))
        about = {"key": r.key, "paper": paper, "item": item, "evidence": evidence, "run": repr(r)}
        found.append(about | {"drawn": r.key in keys, "spread": spread(r)} | outcome)
        report(found[-1])

    for r in (known[key].run for key in keys):
        if store.row(r.key):
            chains.setdefault(r.key if isinstance(r, Measurement) else r.root.key, []).append(r)
        else:
            tell(r, _outcome(MISS, "its stored row is damaged"))
    left = sorted(chains.values(), key=lambda some: seconds(some, store, prefix))
    # Theirs lie in this one, as a worker that is killed removes nothing.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    try:
        while left or under_way:
            while left and len(under_way) < jobs:
                # The longest first: none is waited for. Each in a process of its own, never this one, whose caches may
                # know what is to be found out.
                pool, some = engine.processes(1), left.pop()
                how = _settings(some, store, device)
                with engine._uninterrupted():  # or nobody ends the pool, and its chain is trained to the last
                    under_way[pool.submit(_again, some, how, prefix, folder.name)] = pool, some
            for task in wait(under_way, return_when=FIRST_COMPLETED).done:
                pool, some = under_way.pop(task)
                pool.shutdown()
                if error := task.exception():
                    said = str(error).splitlines() or [""]
                    for r in some:
                        tell(r, _outcome(UNTRAINED, f"{type(error).__name__}: {said[0]}"))
                    continue
                outcomes = {}  # a chain's runs come parents first
                for r, row in task.result():
                    if stored := store.row(r.key):
                        outcome = compare(stored, row, [outcomes.get(p.key, SAME) for p in engine.needs(r)])
                        outcomes[r.key] = outcome["outcome"]
                        tell(r, outcome)
            keep(found)
    finally:
        for pool, _ in under_way.values():  # interrupted: what is under way would not be kept
            pool.shutdown(wait=False, kill_workers=True)
        folder.cleanup()
    return found


def _settings(runs, store, device):
    """`{key: (device, threads, compiled)}` of some runs and all they need, as they are stored."""
    found = {}
    for r in needed(runs):
        row = store.row(r.key)
        how = {"threads": 1, "compile": False} | json.loads(row["certificate"] if row else "{}")
        found[r.key] = device, how["threads"], how["compile"] and training.can_compile(device)
    return found


def _again(runs, settings, prefix, within=None):
    """[(run, its new row)] of some runs and all they need, parents first. Nothing is read but the data."""
    found = []
    with tempfile.TemporaryDirectory(dir=within) as folder:
        store, todo = Store(folder), needed(runs)
        parents = {p for r in todo for p in engine.needs(r)}
        for r in todo:
            device, threads, compiled = settings[r.key]
            if prefix and r not in parents and not isinstance(r, Measurement):
                found.append((r, _beginning(r, store, *settings[r.key])))
            else:
                work.execute([r], folder, (), [r in parents], device, threads, compiled)
                found.append((r, store.row(r.key)))
    return found


def _beginning(r, store, device, threads, compiled):
    """What the row of a run has after its first PREFIX steps."""
    with work.settings_for(threads):
        images = take(work.images_of(r.dataset, r.valid, r.balanced, r.split_seed), r.train_fraction)
        (given, net), begin = work.prepare(r, images, store, device), work.start(r)
        how = {"start": begin, "stop": min(begin + PREFIX, r.recipe.iterations), "method": given.method}
        how |= {"opt": net.optimizer, "compiled": compiled}
        history = work.fit_alike(net.model, images, r.recipe, seed=int(r.key[:15], 16), **how)
    conditions = work.conditions(device, threads, compiled)
    certificate = work.certify(work.algorithms_of(given), now(), history.wall_s, conditions)
    certificate = json.dumps(certificate | {"group": [r.key]})
    losses = {str(t): loss for t, loss in history.train_loss.items()}
    return {"train_loss": json.dumps(losses), "fingerprint": images.fingerprint, "certificate": certificate}


def compare(stored: dict[str, Any], row: dict[str, Any], parents: Collection[str] = ()) -> dict[str, Any]:
    """{outcome, reason, accuracy, loss} of a stored row beside a new one, or the beginning of one.

    parents: the outcomes of what it was trained from. accuracy: points by which the last test accuracies differ; loss:
    relative, the largest of ALIKE's early losses, or of what was measured; None where they cannot be compared.
    """
    precision = json.loads(stored["spec"]).get("recipe", {}).get("precision", "float32")
    parted, missed = set(parents) - {SAME}, {MISS, EXPLAINED}.intersection(parents)
    accuracy, loss = _accuracy(stored, row), None if parted else _loss(stored, row, ALIKE[precision])
    found = _outcome(SAME, "", accuracy, loss)
    differ = [name for name in row if name not in TIMES and _value(row, name) != _value(stored, name, like=row)]
    if not differ:
        return found
    other = _other_record(stored, row)
    near = (accuracy is None or accuracy <= ACCURACY[precision]) and (loss is None or loss <= LOSS)
    if other and near and not accuracy is loss is None:
        return found | {"outcome": CLOSE, "reason": f"another execution record: {', '.join(other)}"}
    named = ", ".join(differ) if len(differ) < 5 else f"{', '.join(differ[:3])} and {len(differ) - 3} more"
    why = f"stored with {named} otherwise"
    for explained, because in (
        (stored["fingerprint"] != row["fingerprint"], "on other data"),
        (stale(stored), "by an older version of an algorithm"),
        (missed or (parted and accuracy is None), "its parents came out otherwise"),
    ):
        if explained:
            return found | {"outcome": EXPLAINED, "reason": f"{why}: {because}"}
    return found | {"outcome": MISS, "reason": f"{why}, {'under another' if other else 'under the same'} record"}


def spreads(known: dict[str, Declared], store: Store) -> Callable[[Run | Measurement], float | None]:
    """What gives a run's standard deviation of the last test accuracy over its stored trials, in points.

    Trials differ in nothing but their seeds. None for a measurement, and for fewer than three of them: beside this
    number a reader sees what it means that a training came out otherwise.
    """
    kinds = {}
    for r in needed(known.run for known in known.values()):
        if not isinstance(r, Measurement):
            kinds.setdefault(_kind(r), []).append(r.key)

    def spread(r):
        rows = [] if isinstance(r, Measurement) else [store.row(key) for key in kinds.get(_kind(r), ())]
        found = [100 * row["last_test_acc"] for row in rows if row and row["last_test_acc"] is not None]
        return round(float(np.std(found, ddof=1)), 4) if len(found) > 2 else None

    return spread


@functools.cache
def _kind(r):
    """What the trials of one run have in common, of all that it was trained from."""
    fields = {name: value for name, value in r.spec().items() if name not in ("seed", "parent")}
    return json.dumps([fields, r.parent and _kind(r.parent)], sort_keys=True)


def _outcome(outcome, reason, accuracy=None, loss=None):
    return {"outcome": outcome, "reason": reason, "accuracy": accuracy, "loss": loss}


def _value(row, name, like=None):
    """What is compared of a column, as text, in which NaN is like itself; of a beginning's losses those that it has."""
    if name != "train_loss" or row[name] is None:
        return repr(row[name])
    steps = json.loads((like or row)[name])
    return {t: loss for t, loss in json.loads(row[name]).items() if t in steps}


def _other_record(stored, row):
    """What differs between two execution records, in words; a processor only where both tell theirs.

    Of a group it is the number of networks that were trained side by side.
    """
    a, b = (json.loads(r["certificate"]) for r in (stored, row))
    a, b = (c | {"group": len(c.get("group", [0]))} for c in (a, b))
    names = [name for name in {**a, **b} if name not in NO_RECORD]
    names = [name for name in names if name != "processor" or None not in (a.get(name), b.get(name))]
    return [f"{name} {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def _accuracy(stored, row):
    a, b = (r.get("last_test_acc") for r in (stored, row))
    return None if a is None or b is None else round(100 * abs(a - b), 4)


def _loss(stored, row, steps):
    """The largest relative difference of the first losses, or of what was measured; None where there are none."""
    losses = bool(row.get("train_loss"))
    a, b = (json.loads(r.get("train_loss") or "{}") if losses else _measured(r) for r in (stored, row))
    pairs = [(a[t], b[t]) for t in a.keys() & b.keys() if not losses or int(t) <= steps]
    return max((abs(x - y) / max(abs(x), 1e-12) for x, y in pairs), default=None)


def _measured(row):
    """What a measurement says: its values, and the number of weights that it keeps of each layer."""
    values, layers = (json.loads(row.get(name) or "{}") for name in ("values", "layers"))
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
    return numbers | {f"kept of {name}": kept for name, (kept, _) in layers.items()}


# What is told ---------------------------------------------------------------------------------------------------------


def record(
    found: list[dict[str, Any]], store: Store, by: str, prefix: bool, wall_s: float, device: str = "cpu"
) -> dict[str, Any]:
    """What is kept of an audit: when, by which commit's hash, where, and what came out of each run."""
    torch, device = work.torch.__version__, work.device_name(device)
    head = {"schema": 1, "when": now(), "commit": by, "prefix": prefix, "torch": torch, "device": device}
    return head | {"wall_s": round(wall_s), "stored": len(store.keys()), "runs": found}


def write(kept: dict[str, Any], path: Path) -> None:
    """A `record` as a file, whole or not at all."""
    files.write(path, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())


def said(kept: dict[str, Any] | Path) -> str:
    """Markdown: what came out of an audit, `record` or its file; every miss by name."""
    if isinstance(kept, Path):
        if not kept.exists():
            return "No audit is kept: `lottery audit --json results/audit.json` makes one."
        kept = json.loads(kept.read_text(encoding="utf-8"))
    runs = kept["runs"]
    counts, drawn = Counter(r["outcome"] for r in runs), sum(r["drawn"] for r in runs)
    part = "its first 500 steps" if kept["prefix"] else "all of it"
    groups = len({(r["paper"], r["evidence"]) for r in runs if r["drawn"]})
    how = f"drawn by the hash of commit {kept['commit'][:8]} from {groups} groups of paper and evidence"
    how = how if kept["commit"] else "named, not drawn"
    lines = [
        f"**Audit of {kept['when'][:10]}:** {drawn} of {kept['stored']:,} stored results, {how}, "
        f"{'was' if drawn == 1 else 'were'} "
        f"trained again from nothing ({part}), {len(runs) - drawn} more on the way to them: "
        + ", ".join(
            f"{n} {name}{'es' * (name in (EXPLAINED, MISS) and n > 1)}"
            for name in (SAME, CLOSE, EXPLAINED, MISS, UNTRAINED)
            if (n := counts[name])
        )
        + f". On {kept['device']}, torch {kept['torch']}."
    ]
    lines += [
        f"* {_name(r)}: {r['outcome']}, {r['reason']}{_apart(r)} (`{r['key']}`)."
        for r in runs
        if r["outcome"] in (EXPLAINED, *BAD)
    ]
    if any("(trials spread" in line for line in lines):
        lines += [
            "",
            "Under another record two trainings part, and may end as far apart as two trials do: √2 times the s.d. of "
            "trials is ordinary, three times that is not.",
        ]
    if any(r["outcome"] == EXPLAINED for r in runs):
        lines += [
            "",
            "*Miss*: outside the tolerance. *Explained*: the data, the algorithm's version or the nets it was pruned "
            "from are known to differ. *Record*: PyTorch, processor, threads and what trained side by side.",
        ]
    return "\n".join(lines)


def _name(r):
    """A run in words: "lth fig4, lenet_300_100/mnist seed 0 level 2, 15000 iterations"."""
    where = " ".join(filter(None, [r["paper"], r["item"]])) or "on the way"
    return f"{where}, {r['run'].removeprefix('<Run ').removesuffix('>')}"


def _apart(r):
    """How far two results lie from each other, in words; nothing where that cannot be said."""
    words = {"accuracy": "last test accuracy {:.2f} points", "loss": "first losses or values {:.1g} of their size"}
    far = [text.format(r[name]) for name, text in words.items() if r[name] is not None]
    if far and r["accuracy"] is not None and r["spread"] is not None:
        far[0] += f" (trials spread by {r['spread']:.2f}, s.d.)"
    return f"; apart: {', '.join(far)}" * bool(far)
