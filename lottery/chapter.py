"""What a paper's notebook shows: for every figure the best complete evidence, with its badge, or how to get it."""

import dataclasses
import functools
import inspect
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lottery import claims, experiments, files, names, scorecard, verdicts
from lottery.experiments import check, engine, pace, papers
from lottery.experiments.store import Store, load, now, root

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import Markdown

RECOMPUTE = ("never", "missing", "all")


class Refused(ValueError):
    """A parameter that makes no sense, or runs that are not there; a notebook shows its one line and no traceback."""

    def _render_traceback_(self):
        return [str(self)]


class Chapter:
    """A paper's experiments, seen through a notebook's parameters.

    Args:
        paper: module name in `lottery.experiments`.
        scale: the preset to show alone, or "best": for each item the highest scale whose runs are all stored, passing
            over one that lacks cells (arms, points) which a lower one has.
        recompute: "never" shows what is stored, "missing" trains what is not, "all" trains everything anew.
        results_dir: of `open_store`: where new runs go. The clone's own results are read as well and never written.
        device, threads, budget_minutes: of new runs.
        parameters: of the paper's `override`; None keeps the preset's value. Any other value makes the chapter an
            exploration, which gets no verdicts and trains the items of the module's MAIN only, where it has one.

    Raises Refused with one line for a bad value.
    """

    def __init__(
        self,
        paper,
        scale="best",
        recompute="never",
        results_dir=None,
        device="cpu",
        threads=1,
        budget_minutes=None,
        **parameters,
    ):
        self.paper, self.module, self._declared = paper, papers.paper(paper), {}
        self.changed = {name: value for name, value in parameters.items() if value is not None}
        self.exploration = bool(self.changed)
        self.scales = self.module.scales if scale == "best" else (scale,)
        if scale not in (known := ["best", *self.module.scales]):
            raise Refused(f"Invalid scale {scale!r}: give one of {', '.join(known)}.")
        if recompute not in RECOMPUTE:
            raise Refused(f"Invalid recompute {recompute!r}: give one of {', '.join(RECOMPUTE)}.")
        if scale == "best" and recompute != "never":
            raise Refused(f"recompute={recompute!r} needs a scale: give one of {', '.join(self.module.scales)}.")
        if budget_minutes is not None and not (isinstance(budget_minutes, int | float) and budget_minutes > 0):
            raise Refused(f"Invalid budget_minutes {budget_minutes!r}: give minutes above 0, or None.")
        try:
            engine.check(device, threads)
            self.settings = {
                name: self.module.override(self.module.setting(name), **parameters) for name in self.scales
            }
            items = self.module.main if self.exploration else None
            names.called = self.module.called(self.changed)
            if self.exploration:
                for at in self.settings.values():
                    check.refuse(self.module.runs(items, at))
            self.store = open_store(results_dir, anew=recompute == "all", make=recompute != "never")
            if recompute != "never":
                runs = self.module.runs(items, self.settings[scale])
                if self.exploration:
                    check.refuse(runs, self.store)
                budget = budget_minutes and 60 * budget_minutes
                experiments.run(runs, store=self.store, device=device, threads=threads, budget=budget, progress=False)
        except (ValueError, TypeError, OSError) as error:
            raise Refused(error) from None

    def scale(self, item: str) -> str:
        """The scale at which the item is shown. Raises Refused, with the command to run, where none is complete."""
        if not (here := [name for name in self.scales if self._runs(item, name)]):
            raise Refused(f"{item} is no part of this: its network is not trained at scale {', '.join(self.scales)}.")
        complete = [name for name in here if self.stored(item, name)[0] == len(self._runs(item, name))]
        for i, name in enumerate(complete):
            if all(self._cells(item, name) >= self._cells(item, lower) for lower in complete[i + 1 :]):
                return name
        if self.exploration and item not in self.module.main:
            raise Refused(f"{item} is no part of an exploration: it varies the paper's own setting.")
        name = here[-1] if self.exploration else here[-2:][0]  # the last is the digits', for a quick look
        done, runs = self.stored(item, name)[0], self._runs(item, name)
        minutes = self._minutes(runs)
        scales = "" if len(self.scales) == 1 else f" with one scale, such as {self.scales[-1]!r},"
        how = f"recompute='missing'{scales}" if self.exploration else f"lottery run {self.paper} {item} --scale {name}"
        raise Refused(
            f"{item} needs {len(runs) - done} of {len(runs)} runs that are not stored ({minutes}): {how} trains them."
        )

    def stored(self, item: str, scale: str) -> tuple[int, int]:
        """(stored, declared) runs of an item at a scale."""
        runs, keys = self._runs(item, scale), self.store.keys()
        return sum(r.key in keys and self.store.get(r) is not None for r in runs), len(runs)

    def partial(self, item: str) -> dict[str, tuple[int, int]]:
        """Higher scales that are under way: `{scale: (stored, declared)}`."""
        above = self.scales[: self.scales.index(self.scale(item))]
        return {name: n for name in above if (n := self.stored(item, name))[0]}

    def trials(self, item: str, scale: str) -> "pd.DataFrame | None":
        """`frame` at a scale, of the trials of which every run is stored (None: there is none)."""
        at, runs = self.settings[scale], self._runs(item, scale)
        part = {r.seed for r in runs if not self.store.get(r)}
        if part.issuperset(self.module.seeds(item, at)):
            return None
        frame = self.frame(item, scale)
        return frame[~frame["seed"].isin(part)]

    def points(self, item: str, scale: str) -> "pd.DataFrame | None":
        """`frame` at a scale, of the points (an arm and a density) of which every trial is stored; None without any."""
        frame = self.frame(item, scale)
        trials = frame.groupby(["arm", "point"], dropna=False)["seed"].transform("nunique")
        found = frame[trials == len(self.module.seeds(item, self.settings[scale]))]
        return found if len(found) else None

    def shown(self, item: str, points: bool = False) -> "tuple[pd.DataFrame | None, str]":
        """(frame, badge) of an item, or of those trials of which every run is stored; else (None, how to get them).

        points: or those points of which every trial is stored, whichever shows more runs.
        """
        try:
            self.scale(item)
            return self.frame(item), self.badge(item)
        except Refused as how:
            for name in self.scales:
                if name != "smoke" and self._runs(item, name):
                    frames = [part(item, name) for part in (self.trials, self.points)[: 1 + points]]
                    if frames := [frame for frame in frames if frame is not None]:
                        return (frame := max(frames, key=len)), self.badge(item, name, frame)
            return None, str(how)

    def frame(self, item: str, scale: str | None = None) -> "pd.DataFrame":
        """One row for each stored run of the item, with `arm` and `point`, as `experiments.load` gives them.

        Of an item that is measured without training: with its labels, and its values as columns.
        """
        import pandas as pd

        scale = scale or self.scale(item)
        at = self.settings[scale]
        if self.is_measured(item):
            cells = [(labels, m) for labels, m in at.measured.cells(item) if self.store.get(m)]
            frame = load([m for _, m in cells], self.store)
            values = pd.DataFrame([json.loads(v) for v in frame["values"]])
            labels = pd.DataFrame([labels for labels, _ in cells])
            if self.exploration:  # the paper's names of networks are not what was pruned
                labels["net"] = frame["model"] + "-" + frame["dataset"]
            found = pd.concat([labels, frame.drop(columns=labels.columns, errors="ignore"), values], axis=1)
            return found.drop_duplicates(list(labels.columns), ignore_index=True)
        labels = [
            (arm, point, r)
            for arm, _, point in self.module.cells(item, at)
            for seed in self.module.seeds(item, at)
            for r in self.module.trial(arm, at, seed, point)
            if self.store.get(r)
        ]
        frame = load([r for _, _, r in labels], self.store)
        arms = [self.module.short(arm) for arm, _, _ in labels]
        names = pd.DataFrame({"arm": arms, "point": [point for _, point, _ in labels]})
        return pd.concat([names, frame], axis=1)

    def badge(self, item: str, scale: str | None = None, frame: "pd.DataFrame | None" = None) -> str:
        """What the item's numbers rest on, in one line: at its scale, or a frame of it at another, or its `trials`."""
        if self.is_measured(item):
            return self._measured_badge(item, self.scale(item))
        others = {} if scale else self.partial(item)
        if frame is None:
            frame = self.trials(item, scale) if scale else self.frame(item)
        scale = scale or self.scale(item)
        paper = self.module.setting("paper")
        same, run, papers = self.stands_beside_paper(item, scale), self._runs(item, scale)[0], self._papers(item)[0]
        share, n = run.recipe.iterations / papers.recipe.iterations, frame["seed"].nunique()
        steps, papers_n = f"{100 * share:.3g} % of the paper's steps", len(self.module.seeds(item, paper))
        cells = f"{len(frame[['arm', 'point']].drop_duplicates())} of {len(self.module.cells(item, paper))}"
        parts = [
            "the paper's network and data" if same else f"stand-in: {names.net(run.model, run.dataset)}",
            steps if same else f"{run.recipe.iterations:,} iterations",
            f"{n} of {names.trials(papers_n)}" if n <= papers_n else f"{names.trials(n)}, the paper {papers_n}",
            *([] if same else [steps]),
            ", ".join(sorted(frame["device"].unique())),
            f"{len(self.module.guessed)} settings guessed",
            f"{cells} points of the experiment in full",
        ]
        parts[2:2] = [run.recipe.precision] * (run.recipe.precision != papers.recipe.precision)
        parts += [f"{n} of {m} trainings stored of {names.SCALES.get(name, name)}" for name, (n, m) in others.items()]
        if diverged := sum(frame["status"] == "diverged"):
            parts.append(f"{diverged} of {len(frame)} trainings diverged")
        return " · ".join(parts + self._changes())

    def _changes(self):
        """What an exploration has changed."""
        changed = [f"{name} {value}" for name, value in self.changed.items() if name not in ("trials", "seed")]
        return [f"changed here: {', '.join(changed)}"] if changed else []

    def _measured_badge(self, item, scale):
        plans, frame = (self.settings[scale].measured, self.module.setting("paper").measured), self.frame(item)
        ours, papers = (plan.prunings(item) for plan in plans)
        same = self.stands_beside_paper(item)
        trials, paper_trials = (plan.trials[item] for plan in plans)
        parts = [
            "the paper's network and data" if same else f"stand-in: {names.net(ours[0].model, ours[0].dataset)}",
            "nothing is trained",
            "trials: "
            + ", ".join(
                f"{n} of {paper_trials.get(net, n)}" + f" ({names.net(net)})" * (not self.exploration)
                for net, n in trials.items()
            ),
            ", ".join(sorted(frame["device"].unique())),
            f"{len(ours)} of {len(papers)} prunings",
        ]
        if images := ours[0].images:
            parts.insert(2, f"gradient of {images:,} random training images")
        parts += [f"{n} of {m} stored of {names.SCALES.get(name, name)}" for name, (n, m) in self.partial(item).items()]
        return " · ".join(parts + self._changes())

    def is_measured(self, item: str) -> bool:
        """True for an item that needs no training."""
        return item in self.module.measured_items

    def stands_beside_paper(self, item: str, scale: str | None = None) -> bool:
        """True when the item shows the paper's own network and data, so that its printed points may be drawn."""
        ours, papers = (
            {(r.model, r.dataset, r.options) for r in runs}
            for runs in (self._runs(item, scale or self.scale(item)), self._papers(item))
        )
        return ours <= papers

    @functools.cached_property
    def card(self) -> dict | None:
        """The paper's claims as `scorecard.scorecard` gives them, or None in an exploration."""
        return None if self.exploration else scorecard.scorecard(self.paper, self.store)

    def show_result(self) -> None:
        """Display what came out of the paper's claims: primary ones and failures by name."""
        from IPython.display import display

        if self.card is None:
            print("exploration: no verdict")
        else:
            display(say(verdicts.paragraph(self.card["rows"])))

    def show_claims(self) -> None:
        """Display the claims that were tested, each a link to its row of the scorecard; exact ones are folded."""
        from IPython.display import Markdown, display

        if not (rows := self.card and scorecard.tested(self.card)):
            print("exploration: no verdict" if self.exploration else "No claim was tested: no run is stored.")
            return
        exact = [row for row in rows if row["evidence"] == "exact"]
        if runs := [row for row in rows if row["evidence"] != "exact"]:
            display(table(map(verdicts.summary, runs), "Claims that were tested; ★: primary, chosen before the runs."))
            display(say(OURS))
        if exact:
            folded = table(map(verdicts.summary, exact), "Numbers that need no training.").data
            display(Markdown(f"<details><summary>{len(exact)} exact statements</summary>\n\n{folded}\n\n</details>"))

    def show_commands(self) -> None:
        """Print, in the order of `show_claims`, the commands that test the claims again."""
        for command in dict.fromkeys(row["command"] for row in scorecard.tested(self.card or {"rows": []})):
            print(command)

    def _cells(self, item, scale):
        """What a measured item has is the module's to say: there a higher scale has it all."""
        if self.is_measured(item):
            return set()
        return {(arm, point) for arm, _, point in self.module.cells(item, self.settings[scale])}

    def _runs(self, item, scale):
        if (item, scale) not in self._declared:
            self._declared[item, scale] = self.module.runs(item, self.settings[scale])
        return self._declared[item, scale]

    def _papers(self, item):
        """What one trial of the item trains in the paper."""
        return self.module.runs(item, dataclasses.replace(self.module.setting("paper"), trials=1))

    def _minutes(self, runs):
        """Estimated time of the runs that are missing and of what they start from, from the pace of those like them."""
        paces = pace.paces(self.store)
        left = [pace.expected(paces, r.kind, r.work) for r in engine.missing(runs, self.store)]
        if None in left:
            return "time unknown: none like them was timed"
        return f"about {max(1, round(sum(left) / 60))} core minutes"


def say(*sentences: str) -> "Markdown":
    """Sentences of a result, in Markdown, to be displayed: what a chapter says in words about numbers.

    Negative numbers have the minus of the tables.
    """
    from IPython.display import Markdown

    return Markdown(_minus(" ".join(sentences)))


def _minus(text):
    return re.sub(r"(?<![^ (\[])-(?=\d)", "−", text)


OURS = (
    "*Ours* is the mean over trials with its 95 % interval of the difference, or the factor (×), between what the "
    "claim says is larger or at least as good and the other, so that of “no better than” it is the control minus the "
    "ticket; of a claim about several densities at the one with the largest p-value, whose difference need not be the "
    "smallest, of “up to” at the level that the other trials choose."
)


def table(
    rows: "pd.DataFrame | Iterable[dict]", caption: str, digits: int | dict[str, int] = 2, index: bool = True
) -> "Markdown":
    """A captioned table in Markdown, to be displayed; the checks of the book compare it as text.

    rows: a DataFrame, or a list of dicts. digits: decimals of floats, or `{column: decimals}`; whole numbers get commas
    between thousands, what is missing a dash. index: whether the DataFrame's index is shown; a list has none.
    """
    import pandas as pd
    from IPython.display import Markdown

    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
    if index and isinstance(rows, pd.DataFrame):
        frame = frame.rename_axis([name or "" for name in frame.index.names]).reset_index()
    places = digits if isinstance(digits, dict) else dict.fromkeys(frame.columns, digits)
    columns = [[cell(v, places.get(name, 2)) for v in frame[name]] for name in frame.columns]
    numeric = [all(re.fullmatch(r"[-−+–]?(≥ )?[\d,.]*( ?%)?( ±.*)?", v) for v in column) for column in columns]
    lines = [
        [cell(str(name)) for name in frame.columns],
        ["--:" if n else "---" for n in numeric],
        *zip(*columns, strict=True),
    ]
    return Markdown(f"**{caption}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))


def cell(value: object, digits: int = 2) -> str:
    """A value as the text of a table's cell: 1234 → "1,234", 0.5 → "0.50", None and NaN → "–"."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float | np.floating):
        return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")
    return _minus(str(value).replace("|", "\\|"))


def difference(pairs: "pd.Series") -> str:
    """Paired differences as the text of a table's cell: their mean, and half of its 95 % interval if there are two."""
    low, high = claims.t_interval(pairs)
    return _minus(f"{np.mean(pairs):+.2f}" + (f" ± {(high - low) / 2:.2f}" if len(pairs) > 1 else ""))


LISTED = 75  # columns, so that a listing needs no sideways scrolling in the book


def listing(function: Callable, first: str, last: str, title: str = "") -> "Markdown":
    """Some lines of a function as they run here, in Markdown, to be displayed.

    first, last: how the first and the last of the lines begin, without their indentation. title: which step or equation
    they are. Raises ValueError for lines that are not there, or too long for the book's column.
    """
    from IPython.display import Markdown

    lines = inspect.getsource(function).splitlines()
    found = [i for i, line in enumerate(lines) if line.strip().startswith(first)]
    ends = [i for i, line in enumerate(lines) if line.strip().startswith(last) and found and i >= found[0]]
    if not ends:
        raise ValueError(f"{function.__name__} has no lines from {first!r} to {last!r}.")
    text = textwrap.dedent("\n".join(lines[found[0] : ends[0] + 1]))
    if long := [line for line in text.splitlines() if len(line) > LISTED]:
        raise ValueError(f"Longer than {LISTED} columns, in {function.__name__}: {long[0]}")
    head = f"*{title}*, `{function.__module__}.{function.__name__}`:"
    return Markdown(f"{head}\n\n```python\n{text}\n```")


def open_store(results_dir: Path | str | None = None, anew: bool = False, make: bool = False) -> Store:
    """The reader's own store, with the clone's committed results to read; with `anew` an empty one inside it.

    results_dir: default $LOTTERY_RESULTS, else a folder of the user's data; with `make` it need not be there yet.

    Raises FileNotFoundError: outside of a clone, where there are no committed results, no folder of one's own.
    """
    if not (results_dir is None or isinstance(results_dir, str | os.PathLike)):
        raise ValueError(f"Invalid results_dir {results_dir!r}: give the path of a folder, or None.")
    mine = Path(results_dir or os.environ.get("LOTTERY_RESULTS") or files.of_user("data") / "results").expanduser()
    if anew:
        return Store(mine / f"recomputed-{now().replace(':', '')}")
    try:
        return Store(mine, also=[root() / "ours"])
    except FileNotFoundError as error:  # an installed package, outside of a clone
        if not (make or results_dir or mine.is_dir()):
            raise FileNotFoundError(str(error).replace("--results-dir", "results_dir")) from None
        return Store(mine)
