"""The scorecard: every claim of `results/reported/<paper>_claims.csv`, judged on the runs that the store holds.

Nothing here is typed: evidence is what the runs' specs and data fingerprints say beside the same arm at scale "paper".
"""

import datetime
import functools
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lottery import claims as C
from lottery import names
from lottery.experiments.store import Rows, Store, root, unpack

if TYPE_CHECKING:
    import pandas as pd

    from lottery.experiments.runs import Run

FIELDS = (
    *("paper", "item", "panel", "claim", "primary", "item_source", "title", "evidence", "net", "data"),
    *("steps_fraction", "trials", "trials_paper", "coverage", "device", "quantity", "paper_value", "value_source"),
    *("ours", "interval", "cell", "interval_images", "p", "all_trials", "rule", "verdict", "was", "stale", "command"),
)
EVIDENCE = ("exact", "full", "reduced", "stand-in", "none")
PASSED = ("reproduced", "supports")
EXACT = ("weights", "conv weights", "fc share")  # quantities that need no training
ACCURACIES = {"test accuracy": "test_acc", "validation accuracy": "val_acc", "train accuracy": "train_acc"}
LOSSES = {"train loss": "batch_loss", "test loss": "test_loss"}  # of the last epoch's minibatches, of the test set
READ = ("iterations", "instability", *ACCURACIES, *LOSSES)  # what a stored training, or a pair, can be asked for
NORMS = {"gradient norm": "gradient_norm", "gradient norm of the copy": "copy_gradient_norm"}  # and a measurement,
DENSITY = "density of "  # which also has the density of each layer
FINGERPRINTS = {  # `data.load(...).fingerprint` of the papers' data
    "mnist": "dd29bf4170bdf2db69525817f063e2f8d2dc8d2848f855acdf866788d14c6a64",
    "cifar10": "38ddfeb83ff729933dbb1bf2d683078e77209dc4e08ff3828538f61cecf8e677",
    "cifar100": "b7e2c14682dafdf339c75951010255288bc28828fd9e48d958556c7a993f3884",
}
# What may differ from the paper's Run: never mind · makes the evidence "reduced" · anything else is a stand-in.
ALIKE = {"parent", "seed", "draw", "test_readings"}
FEWER = {"images", "train_fraction", "rewind_to", "iterations", "milestones", "warmup", "eval_every", "precision"}


def claims(paper: str, reported_dir: Path | str | None = None) -> "pd.DataFrame":
    """The rules of a paper's claims, `<paper>_claims.csv`, as a pandas.DataFrame.

    A row without `kind` only names an item that claims nothing testable. arm_a is the larger one: A > B.
    arm: "net/control", variants of a net as "net@variant/control". x: densities in % as the paper prints them (GraSP:
    sparsities), cells separated by ";", "a|b" where A and B differ; for "down to" the paper's density, then the next
    denser level.
    delta, margin, paper_value: points, a factor for iterations. error: of a paper_value that was read off a picture.
    n: trials that a verdict needs; trials_paper: the paper's. unknown: a decisive setting that is stated nowhere.
    added, since: ISO times of the claim, of its rule's last change. The last three columns may be missing:
    alternative: the id of the same claim under another reading of its unknown setting; was: the verdict that the rule
    before `since` gave.
    """
    return read(paper, "_claims", reported_dir)


def reported(paper: str, reported_dir: Path | str | None = None) -> "pd.DataFrame":
    """The numbers that a paper printed, `<paper>.csv`, as a pandas.DataFrame.

    provenance: "paper" (drawn as the paper's), "secondary", "computed" or "memory" (never drawn as the paper's), each
    with its `source`. series: an arm, "A vs B" for a difference or ratio, or what a threshold says.
    """
    return read(paper, "", reported_dir)


def read(paper: str, kind: str = "", reported_dir: Path | str | None = None) -> "pd.DataFrame":
    """`<paper>.csv`, or with kind "_claims" the rules, as a pandas.DataFrame; what is empty is "" in text, else NaN."""
    import pandas as pd

    folder = Path(reported_dir or _reported())
    if not (known := papers(folder)):
        raise FileNotFoundError(f"No claims in {folder}: restore it with git checkout.")
    if paper not in known:
        raise ValueError(f"Unknown paper {paper!r}: choose one of {', '.join(known)} ({folder}).")
    if not (path := folder / f"{paper}{kind}.csv").exists():
        raise FileNotFoundError(f"Missing {path}: restore it with git checkout.")
    numbers = "delta margin n trials_paper paper_value primary value error" + ("" if kind else " x")
    try:
        frame = pd.read_csv(io.BytesIO(_undamaged(path)), dtype=str, keep_default_na=False)
        if kind == "_claims":
            frame = frame.assign(**{name: "" for name in ("error", "alternative", "was") if name not in frame})
        found = [name for name in numbers.split() if name in frame]
        return frame.assign(**{name: pd.to_numeric(frame[name]) for name in found})
    except ValueError as error:
        raise ValueError(f"Damaged {path}: {str(error).splitlines()[0]} `git checkout` restores it.") from None


def _undamaged(path):
    """The bytes of a file, which are those that SHA256SUMS beside it names, where there is one."""
    content, sums = path.read_bytes(), path.with_name("SHA256SUMS")
    known = dict(line.split()[::-1] for line in sums.read_text("utf-8").splitlines()) if sums.exists() else None
    if known is not None and known.get(path.name) != hashlib.sha256(content).hexdigest():
        raise ValueError("it is not what SHA256SUMS says (`sha256sum *.csv > SHA256SUMS` there keeps a change).")
    return content


def papers(folder: Path) -> list[str]:
    """The papers that have claims."""
    return sorted(path.name.removesuffix("_claims.csv") for path in folder.glob("*_claims.csv"))


def scorecard(
    paper: str | None = None, store: "Store | Path | str | None" = None, reported_dir: Path | str | None = None
) -> dict:
    """{"schema": 1, "rows": [...], "totals": {...}}, ready for strict JSON. store: a `Store`, or its folder."""
    folder = Path(reported_dir or _reported())
    chosen = [paper] if paper else papers(folder)
    rules = {name: claims(name, folder) for name in chosen}
    store = store if isinstance(store, Store) else Store(store)
    stored = Rows(store)
    rows = []
    for name, frame in rules.items():
        judge = Judge(name, _module(name), stored, reported(name, folder), frame)
        rows += [judge.row(claim) for claim in frame.to_dict("records")]
    return {"schema": 1, "rows": rows, "totals": totals(rows)}


def runs(
    paper: str, ids: Iterable[str], scale: str, trials: int | None = None, reported_dir: Path | str | None = None
) -> "list[Run]":
    """The Runs that some claims rest on at one scale, those of the baseline gate with them.

    trials: default the claim's, below scale "paper" no more than the scale has. Raises ValueError for a claim that the
    paper does not have, or that is no experiment at the scale.
    """
    module, found = _module(paper), {}
    judge = Judge(paper, module, {}, reported(paper, reported_dir))
    rules = claims(paper, reported_dir).set_index("id", drop=False)
    for name in ids:
        if name not in rules.index:
            raise ValueError(f"Unknown claim {name!r}: `lottery scorecard --paper {paper} --json` lists them.")
        claim = _blank_is_none(rules.loc[name].to_dict())
        trained = _trained(claim) or claim["quantity"] in module.reads
        tried = [_At(judge, claim, at, trials) for at in module.scales] if trained else []
        if not (possible := {at.scale: at for at in tried if at.cells}):
            raise ValueError(f"Nothing to train for {name}: see `lottery scorecard --paper {paper}`.")
        if scale not in possible:
            raise ValueError(f"Invalid scale {scale!r} for {name}: choose one of {', '.join(possible)}.")
        at = possible[scale]
        found |= at.keys
        if scale == "paper" and not _measured(claim):
            dense = [judge.arm(arm, None, t, scale) for arm in judge.dense(claim)[1] for t in range(at.trials)]
            found |= {r.key: r for runs in dense for r in runs or ()}
    return list(found.values())


def totals(rows: list[dict]) -> dict:
    """Verdicts by evidence, so that exact items are never added to experiments, of all and of the primary claims."""
    rows = [row for row in rows if row["claim"]]
    tested = [row["rule"].split(";")[0] for row in rows if row["evidence"] != "exact" and word(row) != "not tested"]

    def count(rows):
        by = {e: [row for row in rows if row["evidence"] == e] for e in EVIDENCE}
        return {e: {"claims": len(some), "verdicts": dict(Counter(map(word, some)))} for e, some in by.items()}

    primary = [row for row in rows if row["primary"]]
    papers = {row["paper"]: None for row in primary}
    return {
        "claims": len(rows),
        "by_evidence": count(rows),
        "primary": {
            "claims": len(primary),
            "by_evidence": count(primary),
            "by_paper": {name: _after_holm([row for row in primary if row["paper"] == name]) for name in papers},
        },
        "chance": {"tested": len(tested), "expected": round(C.chance(tested), 3)},
    }


def _after_holm(rows):
    """How many primary claims of one paper were tested, pass, still pass after Holm over them, are partly true."""
    tested = [row for row in rows if row["evidence"] != "exact" and word(row) != "not tested"]
    stay = C.holm([1.0 if row["p"] is None else row["p"] for row in tested])
    words = list(map(word, tested))
    mixed = sum(said in ("partly", "mixed") for said in words)
    after = sum(said in PASSED and still for said, still in zip(words, stay, strict=True))
    return {"tested": len(tested), "pass": sum(said in PASSED for said in words), "after_holm": after, "mixed": mixed}


def word(row: dict) -> str | None:
    """The verdict without its remarks."""
    return row["verdict"] and row["verdict"].split(" (")[0].removesuffix(C.SIZE)


def note(row: dict) -> str:
    """The remarks of the verdict: "size differs; setting unknown", or nothing."""
    size, _, remark = (row["verdict"] or "").removeprefix(word(row) or "").partition(" (")
    return "; ".join(filter(None, [size.removeprefix(", "), remark.removesuffix(")")]))


def text(card: dict) -> str:
    """Lines for a terminal: one a claim that has evidence, then the totals."""
    lines = []
    for row in card["rows"]:
        if row["claim"] and row["evidence"] != "none":
            ours = "–" if row["ours"] is None else f"{row['ours']:.4g}"
            ours += " [{:.4g}, {:.4g}]".format(*row["interval"]) if row["interval"] else ""
            paper = "–" if row["paper_value"] is None else f"{row['paper_value']:.6g}"
            begin = f"{'* '[not row['primary']]} {row['claim']:42} {paper:>8} {ours:26} {row['evidence']:9}"
            lines.append(f"{begin} {said(row)}")
            if more := row["all_trials"]:
                every = "{:.4g} [{:.4g}, {:.4g}]".format(more["ours"], *more["interval"])
                lines.append(f"{'':53} {every:26} all {more['trials']} stored trials, no verdict")
    total, chance = card["totals"], card["totals"]["chance"]
    by = ", ".join(f"{some['claims']} {e}" for e, some in total["by_evidence"].items())
    lines += [f"{total['claims']} claims (* primary; paper's value, ours with 95 % interval, evidence, verdict): {by}."]
    lines += [f"{chance['tested']} are tested on runs; expected to pass by chance: {chance['expected']:g}."]
    for paper, n in total["primary"]["by_paper"].items():
        counts = f"{n['tested']} tested, {n['pass']} pass, {n['after_holm']} after Holm over them, {n['mixed']} mixed"
        lines += [f"{paper}, primary: {counts}."]
    return "\n".join(lines)


def tested(card: dict) -> list[dict]:
    """Rows of the claims that got a verdict: primary ones first, exact statements last."""
    rows = [row for row in card["rows"] if row["claim"] and row["evidence"] != "none" and word(row) != "not tested"]
    return sorted(rows, key=lambda row: (not row["primary"], row["evidence"] == "exact"))


def summary(card: dict) -> str:
    """Lines for a chapter: how many claims were tested, and how they came out."""
    rows, chance = tested(card), card["totals"]["chance"]
    runs, exact = ([row for row in rows if (row["evidence"] == "exact") == kind] for kind in (False, True))
    lines = [f"{len(runs)} claims were tested here, {sum(row['primary'] for row in runs)} of them primary."]
    lines += [f"{verdict}: {n}" for verdict, n in sorted(Counter(map(word, runs)).items())]
    lines += [f"Expected to pass by chance, were none of them true: {chance['expected']:g}."]
    if exact:
        said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(Counter(map(word, exact)).items()))
        lines += [f"{len(exact)} more are exact and need no runs: {said}."]
    lines += [f"The other {card['totals']['claims'] - len(rows)} claims are in the scorecard."]
    return "\n".join(lines)


def said(row: dict) -> str:
    """The verdict with what happened to its rule after the runs, and the word before that."""
    changed = ", before that: ".join(filter(None, [row["stale"], row["was"]]))
    return "; ".join(filter(None, [row["verdict"], changed]))


def number(v: float | None, digits: int = 4) -> str:
    """A value for reading."""
    if v is None:
        return "–"
    return ("−" if v < 0 else "") + (f"{abs(v):,.0f}" if abs(v) >= 10_000 else f"{abs(v):.{digits}g}")


def interval(v: Sequence[float] | None) -> str:
    """An interval for reading."""
    return "" if v is None else f"[{number(v[0], 3)}, {number(v[1], 3)}]"


def measured(row: dict, ours: float | None, bounds: Sequence[float] | None) -> str:
    """What came out, with its unit and interval, for reading: "1.48 × [1.07, 2.04]", "0.398 points [0.239, 0.557]"."""
    _, _, unit = (row["quantity"] or "").partition(", ")
    unit = {"ratio A/B": "×", "%": "%"}.get(unit, unit.partition(",")[0]) if bounds else ""
    return " ".join(filter(None, [number(ours), unit, interval(bounds)]))


def ours(row: dict) -> str:
    """What came out of a claim, for reading; of one in several cells, in the one that decides, which is named."""
    return measured(row, row["ours"], row["interval"]) + f" at {row['cell']}" * bool(row["cell"])


def table(rows: list[dict]) -> "pd.DataFrame":
    """Rows as a table for reading: a DataFrame of strings."""
    import pandas as pd

    return pd.DataFrame(
        {
            "claim": "★ " * row["primary"] + row["title"],
            "item": row["item"],
            "paper": number(row["paper_value"]),
            "ours": ours(row),
            "verdict": said(row),
            "evidence": row["evidence"],
        }
        for row in rows
    )


class Judge:
    """One paper's claims against the stored runs.

    experiment: the `papers.Paper`, or None where nothing is run for it. stored: `{key: row}`
    as of `store.Rows`. reported: the numbers that the paper printed, for the baseline gate. rules: of `claims`, to find
    the other reading of a claim's unknown setting.
    """

    def __init__(self, paper, experiment, stored, reported, rules=None):
        self.paper, self.experiment, self.stored = paper, experiment, stored
        self.rules = {} if rules is None else {c["id"]: _blank_is_none(c) for c in rules.to_dict("records")}
        self.printed = reported[(reported["provenance"] == "paper") & (reported["unit"] == "%")]
        self.arm = functools.cache(self._arm)  # one arm serves many claims

    def _arm(self, name, x, trial, scale, measured=None):
        if measured:
            return self.experiment and self.experiment.measured(measured, name, x, trial, scale)
        return self.experiment.arm(name, x, trial, scale) if self.experiment else None

    def row(self, claim: dict) -> dict:
        """One row of the scorecard, of a row of the rules."""
        claim = _blank_is_none(claim)
        row = dict.fromkeys(FIELDS) | {k: claim[k] for k in ("item", "panel", "item_source", "trials_paper")}
        row |= {"paper": self.paper, "title": claim["text"], "primary": claim["primary"] == 1, "evidence": "none"}
        if claim["kind"]:
            row |= {"claim": claim["id"], "quantity": _quantity(claim), "rule": _rule(claim), "verdict": "not tested"}
            row |= {k: claim[k] for k in ("paper_value", "value_source", "was")}
        exact = (*EXACT, *(self.experiment.exact if self.experiment else ()))
        row |= self._exact(claim) if claim["quantity"] in exact else self._experiment(claim)
        return {k: _plain(v) for k, v in row.items()}

    def _exact(self, claim):
        name = claim["arm_a"].split("/")[0]
        name = self.experiment.networks.get(name, name) if self.experiment else name
        if claim["quantity"] in EXACT:
            ours = count(claim["quantity"], name)
        else:
            ours = self.experiment.exact[claim["quantity"]](claim["arm_a"])
        if ours is None:
            return {}
        verdict = C.exact(ours - claim["paper_value"], claim["margin"])
        command = f"lottery scorecard --paper {self.paper}"
        return {"evidence": "exact", "net": name, "ours": ours, "verdict": str(verdict), "command": command}

    def _experiment(self, claim):
        tried = self._tried(claim)
        if not tried:
            return {}
        best = _best(tried)
        above = tried[: tried.index(best)] if best else tried
        cells = f"{len(best.cells) if best else 0} of {len(_cells(claim))} cells"
        partial = [f"{at.scale} {at.done} of {len(at.keys)} runs" for at in above if at.done]
        at = best or tried[0]
        command = f"lottery run {self.paper} {claim['id'] if claim['kind'] else _short(claim['item'])}"
        command += f" --scale {at.scale}" + (f" --trials {at.trials}" if at.trials != at.default else "")
        old = sum(self.stored[key]["stale"] for key in at.keys if key in self.stored)
        fields = {"coverage": "; ".join([cells, *partial]), "command": command}
        fields |= {"stale": f"{old} runs of an older algorithm version"} if old else {}
        return fields | (best.result() if best else {})

    def _tried(self, claim):
        """The claim at each scale at which it is an experiment, highest first."""
        trained = self.experiment and (_trained(claim) or claim["quantity"] in self.experiment.reads)
        scales = self.experiment.scales if trained else ()
        return [at for scale in scales if (at := _At(self, claim, scale)).cells]

    def other(self, claim: dict) -> "_At | None":
        """(the claim under another reading of its unknown setting, where its runs are all stored), or None."""
        other = self.rules.get(claim["alternative"])
        return other and _best(self._tried(other))

    def dense(self, claim: dict) -> tuple[str, dict[str, tuple[str, float]]]:
        """(quantity, {dense arm: (reading, %)}): what the paper prints for the claim's nets.

        At the claim's reading point, else the best over the epochs where only that is printed.
        """
        quantity = claim["quantity"] if claim["quantity"] in ACCURACIES else "test accuracy"
        arms = {arm.split("/")[0] + "/dense" for arm in (claim["arm_a"], claim["arm_b"]) if arm}
        arms -= {claim["arm_a"]} if claim["kind"] == "value" else set()  # the baseline's own claim is not gated by it
        found = {}
        for at in ("best", claim["reading"]):
            p = self.printed[self.printed["panel"].str.endswith(f"{quantity}/{at}")]
            found |= {arm: (at, v) for arm, v in zip(p["series"], p["value"], strict=True) if arm in arms}
        return quantity, found


def _best(tried):
    """The `_At` with the best complete evidence, of equals the one with more cells, or None."""
    complete = [at for at in tried if at.complete]
    return min(complete, key=lambda at: (EVIDENCE.index(at.evidence()[0]), -len(at.cells)), default=None)


class _At:
    """One claim at one scale. `cells` are those of its x that exist there; `runs[cell][trial][arm]` lists of Runs.

    trials: default the claim's n, or as many as the scale has, where those are stored; else `default`, that of `runs`.
    """

    def __init__(self, judge, claim, scale, trials=None):
        self.judge, self.claim, self.scale = judge, claim, scale
        n, cells = int(claim["n"] or 1), _cells(claim)
        fewer = min(n, judge.experiment.setting(scale).trials)
        self.default = n if scale == "paper" else fewer
        self.cells = [x for x in cells if self._runs(x, 0)]
        self.log = C.is_ratio(claim["quantity"])
        self.unit = math.log if self.log else float
        ranged = not claim["kind"] or claim["kind"].startswith(C.RANGED)
        if len(self.cells) < len(cells) and not ranged:
            self.cells = []
        if self.cells:  # a network may have fewer trials than its scale, and what is measured has its own number
            n = next(t for t in range(n + 1) if t == n or not self._runs(self.cells[0], t))
            fewer, self.default = (n, n) if _measured(claim) else (min(n, fewer), min(n, self.default))
            trials = trials and (trials if self._runs(self.cells[0], trials - 1) else n)
        if trials or not any(self._declare(some) for some in (n, fewer)):
            self._declare(trials or self.default)

    def _declare(self, trials):
        """Take the runs of so many trials; True when all of them are stored."""
        self.trials = trials
        self.runs = [[self._runs(x, t) for t in range(trials)] for x in self.cells]
        self.keys = {r.key: r for cell in self.runs for trial in cell for arm in trial for r in arm}
        self.done = sum(self._stored(key) is not None for key in self.keys)
        self.complete = self.done == len(self.keys)
        return self.complete

    def _runs(self, x, trial):
        """[runs of A, runs of B] at one cell, or None where one of them is no experiment here."""
        arms = [self._arm(name, at, trial, self.scale) for name, at in _arms(self.claim, x)]
        return arms if arms and all(arms) else None

    def _arm(self, name, x, trial, scale):
        measured = _measured(self.claim)
        return self.judge.arm(name, x, trial, scale, measured) if measured else self.judge.arm(name, x, trial, scale)

    def _stored(self, key):
        row = self.judge.stored.get(key)
        return row if row and not row["stale"] and row["status"] in ("finished", "diverged") else None

    def rows(self, trials):
        """Stored rows that the verdict rests on, [cell][trial][arm], with every repeat of a trial that is stored."""
        return [[self._repeats(x, t) for t in range(trials)] for x in self.cells]

    def _repeats(self, x, trial):
        """[rows of A, rows of B]: those of this scale, and of a scale that trains the same networks more often."""
        found = []
        for mine, (name, at) in zip(self._runs(x, trial), _arms(self.claim, x), strict=True):
            scales = () if _measured(self.claim) else self.judge.experiment.scales
            keys = {r.key for r in mine}
            for theirs in (self._arm(name, at, trial, scale) for scale in scales):
                if theirs and keys <= (more := {r.key for r in theirs}):
                    keys = more
            rows = [row for key in sorted(keys) if (row := self._stored(key))]
            found.append(rows if _measured(self.claim) else self._shares(name, at, rows))
        return found

    def _shares(self, name, x, rows):
        """The rows that count for an arm at x, with their `share` of it; none where the paper's module says so."""
        if not (shares := getattr(self.judge.experiment, "shares", None)):
            return rows
        each = shares(name, x, rows, self.claim["quantity"]) or [0] * len(rows)
        return [row | {"share": share} for row, share in zip(rows, each, strict=True) if share]

    def all_trials(self, margin):
        """What all stored trials say, where there are more of them than the rule asks for, without a verdict."""
        n = self.trials
        while all((arms := self._runs(x, n)) and all(self._stored(r.key) for a in arms for r in a) for x in self.cells):
            n += 1
        if n == self.trials:
            return None
        verdict = self.verdict(self.rows(n), margin)[0]
        if math.isnan(verdict.d):  # out of reach
            return None
        ours = self._ours(verdict)
        return {"trials": n, "ours": ours[0], "interval": ours[1:]}

    def result(self):
        """The fields that come from runs."""
        rows = self.rows(self.trials)
        counted = {row["key"]: row for cell in rows for trial in cell for arm in trial for row in arm}
        stored = list(({key: self._stored(key) for key in self.keys} | counted).values())
        evidence, steps = self.evidence()
        columns = {"net": "model", "data": "dataset", "device": "device"}
        fields = {k: ", ".join(sorted({row[c] for row in stored})) for k, c in columns.items()}
        fields |= {"evidence": evidence, "steps_fraction": steps, "trials": self.trials}
        if first := _changed(self.claim, min(row["started"] for row in stored)):
            fields["stale"] = first
        if not self.claim["kind"]:
            return fields
        diverged = sum(row["status"] == "diverged" for row in stored)
        return fields | self._judged(rows, evidence, fields["data"], diverged)

    def evidence(self):
        """("full" | "reduced" | "stand-in", share of the paper's steps): ours beside the Runs at scale "paper"."""
        found, steps = {"full"}, 1.0
        for x, trials in zip(self.cells, self.runs, strict=True):
            for mine, others, (name, at) in zip(
                trials[0], zip(*trials, strict=True), _arms(self.claim, x), strict=True
            ):
                theirs = self._arm(name, at, 0, "paper")
                data = {self._stored(r.key)["fingerprint"] for runs in others for r in runs}
                if not theirs or data != {FINGERPRINTS.get(theirs[0].dataset)}:
                    found.add("stand-in")
                if theirs:
                    found.add(compare(mine[0].spec(), theirs[0].spec()))
                    if not _measured(self.claim):
                        steps = min(steps, mine[0].recipe.iterations / theirs[0].recipe.iterations)
        if self.trials < self.claim["n"] or len(self.cells) < len(_cells(self.claim)):
            found.add("reduced")
        return max(found, key=EVIDENCE.index), None if _measured(self.claim) else steps

    def margin(self, dataset):
        return self.unit(self.claim["margin"] or C.default_margin(self.claim["quantity"], dataset))

    def verdict(self, rows, margin):
        """(verdict by the arithmetic alone, differences [cells, trials], their rows); the cells are those tested."""
        claim, kind = self.claim, self.claim["kind"]
        reasons = [self._untested(x, cell) for x, cell in zip(self.cells, rows, strict=True)]
        tested = [cell for cell, reason in zip(rows, reasons, strict=True) if not reason]
        note = "" if tested and (kind.startswith(C.RANGED) or not any(reasons)) else max(reasons)
        if note and not all(arm for cell in rows for trial in cell for arm in trial):
            return C.Verdict("not tested", note=note), np.zeros((0, len(rows[0]))), []
        tested = rows if note else tested
        d = np.array([[contrast(arms, self.read) - self._paper for arms in cell] for cell in tested])
        verdict = C.judge(kind, d, self.unit(claim["delta"]) if claim["delta"] else None, margin, len(_cells(claim)))
        if note:
            return replace(verdict, word="not tested", note=note), d, tested
        if claim["paper_value"] is not None:
            size, error = claim["paper_value"], claim["error"] or 0
            error = self.unit(size + error) - self.unit(size)
            verdict = C.sized(verdict, kind, 0 if kind.endswith("value") else self.unit(size), error)
        elif kind == "direction" and verdict.word == "not reproduced" and not verdict.note:
            verdict = replace(verdict, note="its effect, of which the paper prints no size, is below the margin")
        return verdict, d, tested

    @property
    def _own(self):
        """What reads the quantity, if it is the paper's own, else None."""
        return self.judge.experiment.reads.get(self.claim["quantity"])

    def read(self, row):
        """What the claim reads of a stored run."""
        return self._own(row) if self._own else reading(row, self.claim["quantity"], self.claim["reading"])

    def _untested(self, x, cell):
        """Why one cell, [trial][arm], is not tested, or ""."""
        densities = _densities(x)
        if out := sum(not all(arms) for arms in cell):
            return f"{densities} is out of reach in {out} of {len(cell)} trials"
        keys = [[{row["key"] for row in rows} for rows in arms] for arms in cell]
        if same := sum(len(arms) == 2 and bool(set.intersection(*arms)) for arms in keys):
            return f"at {densities} both arms rest on one network in {same} of {len(cell)} trials"
        if self._own and (
            lost := sum(any(np.isnan(self.read(row)).any() for arm in arms for row in arm) for arms in cell)
        ):
            return f"at {densities} {lost} of {len(cell)} trials have no {self.claim['quantity']}"
        if self.claim["arm_b"] and self.claim["quantity"] in ACCURACIES and (pair := self._dead(x, cell)):
            return f"at {' and '.join(pair)} most networks of both arms guess"
        share = _censored(cell) if self.claim["reading"] == "early_stop" else 0
        return (share and f"{100 * share:.0f} % of an arm's minima lie in the last tenth of its training") or ""

    def _dead(self, x, cell):
        """Densities of arms A and B, or C and D, most networks of which are at most the margin better than a guess."""
        arms, dead = _arms(self.claim, x), self._guessing(x, cell)
        for pair in (arms[:2], arms[2:]):
            if pair and all(arm in dead for arm in pair):
                return dict.fromkeys("full density" if at is None else f"{at:g} %" for _, at in pair)
        return None

    @property
    def _paper(self):
        """What differences are taken from: the paper's number, of "a value"."""
        return self.unit(self.claim["paper_value"]) if self.claim["kind"].endswith("value") else 0

    def _ours(self, verdict):
        """[mean, low, high] in the unit of the claims' files."""
        values = [v + self._paper for v in (verdict.d, *verdict.interval)]
        return [math.exp(v) for v in values] if self.log else values

    def _judged(self, rows, evidence, dataset, diverged):
        claim, kind, margin = self.claim, self.claim["kind"], self.margin(dataset)
        plain, d, tested = self.verdict(rows, margin)
        verdict = C.wording(plain, kind, evidence, claim["unknown"])
        if other := self.judge.other(claim):
            verdict = self._either(plain, other, evidence, dataset) or verdict
        if reason := self._not_tested(evidence, dataset, margin):
            verdict = replace(plain, word="not tested", note=reason)
        seen = claim["quantity"] == "test accuracy" and claim["reading"] != "best"
        ours = self._ours(plain)
        return {
            "ours": ours[0],
            "interval": ours[1:],
            "cell": self._cell(kind, d, rows, tested, margin),
            "interval_images": images(kind, d, tested, claim["reading"], margin) if seen and tested else None,
            "p": plain.p,
            "all_trials": self.all_trials(margin),
            "rule": _rule(claim) + (f"; {diverged} diverged runs at chance" if diverged else ""),
            "verdict": str(verdict),
        }

    def _cell(self, kind, d, rows, tested, margin):
        """The densities that a claim is read at, of several cells in the one that decides, or None.

        With what was compared there where that is another density, and whose networks mostly guess.
        """
        if kind in C.CHOSEN or not tested:
            return None
        decides = tested[C.worst(kind.removeprefix(C.ALL), d, margin) if kind.startswith(C.ALL) else 0]
        x = next(x for x, cell in zip(self.cells, rows, strict=True) if cell is decides)
        arms = [
            (name, at, some) for (name, at), some in zip(_arms(self.claim, x), zip(*decides, strict=True), strict=True)
        ]
        arms = [arm for arm in arms if arm[1] is not None and not arm[0].endswith("/dense")]
        if not arms:
            return None
        if named := self.judge.experiment.place(*arms[0][:2]):
            return named
        left = self.judge.experiment.prints == "density"
        said = f"{_densities(x)} {'left' if left else 'removed'}"
        found = {}
        for name, at, some in arms if not _measured(self.claim) else ():
            found[name, at] = np.mean([_density(runs) for runs in some]), self.judge.experiment.density(at)
        if any(not 1 / C.CLOSE < here / there < C.CLOSE for here, there in found.values()):
            each = dict.fromkeys(f"{100 * (here if left else 1 - here):.4g}" for here, _ in found.values())
            said += f" (here {' and '.join(each)})"
        guess = dict.fromkeys(names.arm(name) for name, _ in self._guessing(x, decides))
        return said + (f", where most networks of {' and '.join(guess)} guess" if guess else "")

    def _guessing(self, x, cell):
        """(arm, density) of those most of whose networks are at most the margin better than a guess."""
        if self.claim["quantity"] not in ACCURACIES:
            return []
        return [
            arm
            for arm, runs in zip(_arms(self.claim, x), zip(*cell, strict=True), strict=True)
            if np.mean([self.read(r) <= 100 * _chance(r) + self.margin(r["dataset"]) for some in runs for r in some])
            > 0.5
        ]

    def _either(self, plain, other, evidence, dataset):
        """The verdict of a claim that two readings of an unknown setting decide in opposite ways, or None."""
        theirs = other.verdict(other.rows(other.trials), other.margin(dataset))[0]
        if not C.disagree(plain, theirs):
            return None
        differ = next(k for k in ("quantity", "arm_a", "arm_b", "id") if self.claim[k] != other.claim[k])
        said = [
            f"{at.claim[differ]}: {C.wording(v, at.claim['kind'], e).word}"
            for at, v, e in ((self, plain, evidence), (other, theirs, other.evidence()[0]))
        ]
        return replace(plain, word=C.DEPENDS, note="; ".join(said))

    def _not_tested(self, evidence, dataset, margin):
        """Why there is no verdict, or None."""
        claim = self.claim
        if dataset == "digits":
            return "the embedded digits never get one"
        if _measured(claim):
            return None
        quantity, dense = self.judge.dense(claim)
        for name, (at, printed) in dense.items() if evidence == "full" else ():
            runs = [self.judge.arm(name, None, t, self.scale) for t in range(self.trials)]
            found = [self._stored(r[0].key) for r in runs if r]
            m = margin if claim["quantity"] == quantity else C.default_margin(quantity, dataset)
            ours = [reading(row, quantity, at) for row in found if row]
            if len(ours) == self.trials and C.baseline_off(ours, printed, m):
                return "baseline off"
        return None


# Reading runs ---------------------------------------------------------------------------------------------------------


def reading(row: dict, quantity: str, at: str) -> float:
    """What a stored run reads at "early_stop", "last", or "best", the highest test accuracy over the readings.

    Points, the logarithm of iterations, or a loss of the last epoch; diverged is chance. What a measurement reads: the
    logarithm of a gradient norm, or a layer's density in %.
    """
    if quantity == "instability":
        return json.loads(row["values"])["instability"]
    if quantity in NORMS:  # zero where a layer is gone
        return math.log(max(json.loads(row["values"])[NORMS[quantity]], 1e-12))
    if quantity.startswith(DENSITY):
        kept, n = json.loads(row["layers"])[quantity.removeprefix(DENSITY)]
        return 100 * kept / n
    bad = row["status"] == "diverged"
    if quantity == "iterations":
        return math.log(row["iterations"] if bad else row[f"{at}_step"])
    if quantity in LOSSES:
        return -math.log(_chance(row)) if bad else row[LOSSES[quantity]][-1]
    if at == "best" and not bad:
        return 100 * max(a for a in row["test_acc"] if a is not None)
    return 100 * (_chance(row) if bad else row[f"{at}_{ACCURACIES[quantity]}"])


def correct(row: dict, at: str) -> np.ndarray:
    """Correctness of every test image, float [n_test], in points."""
    if row["status"] == "diverged":
        return np.full(row["n_test"], 100 * _chance(row))
    return 100.0 * unpack(row[f"{at}_correct"], row["n_test"])


def contrast(arms: Sequence[list[dict]], read: Callable[[dict], float | np.ndarray]) -> float | np.ndarray:
    """A − B of one trial, (A − B) − (C − D), or A alone; repeats are averaged first, as much as each has a `share`."""
    a, *b = (
        np.average([read(row) for row in arm], axis=0, weights=[row.get("share", 1) for row in arm]) for arm in arms
    )
    return a - b[0] - (b[1] - b[2] if len(b) == 3 else 0) if b else a


def _censored(cell):
    """The share of an arm's minima that are censored in one cell [trial][arm], 0 where no arm has too many of them."""
    arms = zip(*cell, strict=True)
    late = [
        [
            row["status"] == "diverged" or C.censored(row["early_stop_step"], row["iterations"])
            for runs in arm
            for row in runs
        ]
        for arm in arms
    ]
    return max(map(np.mean, late)) if C.too_censored(late) else 0


def images(kind: str, d: np.ndarray, rows: list[list[list[list[dict]]]], at: str, margin: float) -> list[float] | None:
    """The interval over trials × test images of what a verdict rests on; d: differences [cells, trials]."""
    if d.shape[1] < 2:
        return None
    cells = C.leave_one_out(d)[1] if kind in C.CHOSEN else [0] * d.shape[1]
    if kind.startswith(C.ALL):
        cells = [C.worst(kind.removeprefix(C.ALL), d, margin)] * d.shape[1]
    each = [contrast(rows[cell][trial], lambda row: correct(row, at)) for trial, cell in enumerate(cells)]
    return list(C.two_way_interval(each))


def compare(spec: dict, paper: dict) -> str:
    """Evidence of one run's spec beside the paper's."""
    spec, paper = ({**s, **s.get("recipe", {}), "recipe": None} for s in (spec, paper))
    differ = {name for name in spec if spec[name] != paper.get(name)} - ALIKE
    return "full" if not differ else "reduced" if differ <= FEWER else "stand-in"


@functools.cache
def count(quantity: str, name: str) -> float | None:
    """Weights without biases, of all layers or of convolutions, or fully connected layers' share of them in %.

    None when `models` does not have the network.
    """
    from torch import nn

    from lottery import masks, models

    try:
        layers = masks.prunable(models.create(name, seed=0)).values()
    except ValueError:
        return None
    total = sum(layer.weight.numel() for layer in layers)
    fc = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    return {"weights": total, "conv weights": total - fc, "fc share": 100 * fc / total}[quantity]


# Small things ---------------------------------------------------------------------------------------------------------


def _arms(claim, x):
    """[(arm, density in %)] of a cell; an arm may be the difference of two, "net/str - net/gmp"."""
    pairs = [(name, at) for name, at in zip((claim["arm_a"], claim["arm_b"]), x, strict=True) if name]
    return [(part, at) for name, at in pairs for part in name.split(" - ")]


def _cells(claim):
    """`51.3|21.1;7.0` → [(51.3, 21.1), (7.0, 7.0)]: A at one density against B at another, or both at the same."""
    pairs = [cell.split("|") for cell in (claim["x"] or "").split(";")]
    return [(float(p[0]), float(p[-1])) if p[0] else (None, None) for p in pairs]


def _densities(x):
    return " and ".join(f"{at:g} %" for at in dict.fromkeys(x) if at is not None)


def _density(runs):
    """The mean density of an arm's runs in one trial, as accuracies are interpolated: over its logarithm."""
    found, shares = [row["density"] for row in runs], [row.get("share", 1) for row in runs]
    return math.exp(np.average(np.log(found), weights=shares)) if all(found) else np.average(found, weights=shares)


def _changed(claim, started):
    """What happened after a run: "claim added after run", "rule changed after run", or None."""
    if _time(started) < _time(claim["added"]):
        return "claim added after run"
    return "rule changed after run" if _time(started) < _time(claim["since"]) else None


def _time(text):
    """ISO 8601; a date alone is its first moment, and what names no zone is UTC."""
    time = datetime.datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def _quantity(claim):
    kind = "nats" if claim["quantity"] in LOSSES else "points"
    unit = "%" if claim["kind"].endswith("value") else f"{kind}, A − B"
    unit = "ratio A/B" if C.is_ratio(claim["quantity"]) else unit
    at = f" at {claim['reading']}" if claim["reading"] else ""
    return (
        claim["quantity"]
        if claim["quantity"] in EXACT or (not claim["x"] and not at) or ", " in claim["quantity"]
        else f"{claim['quantity']}{at}, {unit}"
    )


def _measured(claim):
    """The item that measures the claim's quantity without training, or None."""
    quantity = claim["quantity"] or ""
    return "fig2right" if quantity in NORMS else "fig3" if quantity.startswith(DENSITY) else None


def _rule(claim):
    given = [("Δ", claim["delta"]), ("m", claim["margin"]), ("n", claim["n"])]
    return "; ".join([claim["kind"], *(f"{name} = {v:g}" for name, v in given if v is not None)])


def _short(item):
    """The item's name on the command line: "Figure 4" → fig4, "Table 1" → table1, else its first word."""
    if match := re.fullmatch(r"(fig|table)(?:ure)? (\d+)", item.lower()):
        return match[1] + match[2]
    return item.lower().split()[0]


def _trained(claim):
    """True where runs decide."""
    return claim["quantity"] in (None, *READ) or _measured(claim)


def _blank_is_none(row):
    return {k: None if v == "" or v != v else v for k, v in row.items()}


def _chance(row):
    from lottery.data import SETS

    return 1 / SETS[row["dataset"]].classes


def _module(paper):
    """What is run for a paper, or None where nothing is."""
    from lottery.experiments import PAPERS, papers

    return papers.paper(paper) if paper in PAPERS else None


def _reported():
    """results/reported of the clone around the working directory, else around this file."""
    try:
        return root() / "reported"
    except FileNotFoundError:
        return Path(__file__).parents[1] / "results" / "reported"


def _plain(value):
    """JSON's own types; what is not finite is unknown."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        plain = [_plain(v) for v in value]
        return None if None in plain else plain
    if isinstance(value, bool | str | None):
        return value
    value = float(value)
    return None if not math.isfinite(value) else int(value) if value.is_integer() else round(value, 6) + 0.0  # no −0
