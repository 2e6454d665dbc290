"""What came out, in words: a paper's paragraph, a claim in a few words, the row of a chapter's table.

Everything is made from the rows of `scorecard.scorecard`; no verdict is decided here. `overview` draws the same rows.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from html import escape

from lottery import names, scorecard
from lottery.scorecard import number, word

# Verdicts in four kinds, each with its sign; the words themselves are `claims`'.
KINDS = {
    "good": ("reproduced", "supports"),
    "part": ("partly", "mixed"),
    "bad": ("not reproduced", "contradicts"),
    "open": ("inconclusive", "depends on the setting"),
}
SIGNS = {"good": "✓", "part": "±", "bad": "✗", "open": "?", "none": ""}
FULL = ("exact", "full")
BASIS = {
    "exact": "by arithmetic",
    "full": "with the paper's network, data and all of its steps",
    "reduced": "with fewer steps, images or trials than the paper's",
    "stand-in": "on a smaller network or smaller images",
}
SHORT = {  # a primary claim in a few words, understood in any order; any other is its own sentence
    "lth-fig4-early-stop-21": "a ticket of 21.1 % learns faster than the dense network",
    "lth-fig4-accuracy-13": "a ticket of 13.5 % is more accurate than the dense network",
    "lth-fig4-reinit-accuracy-21": "fresh weights lose the accuracy",
    "lth-fig4-reinit-speed-21": "fresh weights lose the speed",
    "lth-fig4-matches-dense-3.6": "tickets match the dense network down to 3.6 %",
    "lth-fig4-iterative-beats-oneshot-10": "pruning in rounds beats pruning at once",
    "lth-fig5-conv2-accuracy-4.6": "Conv-2's ticket of 4.6 % is 3.4 points better",
    "lth-fig8-lr0.1-imp-like-reinit": "the residual network's tickets at rate 0.1 are no better than fresh weights",
    "lth-fig8-rewind-500": "rewound to iteration 500, the residual network's tickets match the dense network",
    "cs-table1-sparsest-resnet20": "CS's tickets match the dense network down to 12.3 %",
    "cs-table1-sparser-than-imp-resnet20": "at 12.3 % CS's tickets are more accurate than IMP's",
    "cs-table1-best-resnet20": "the best of ResNet-20's tickets reaches 91.54 %",
    "cs-table1-sparsest-vgg16": "VGG-16's tickets match the dense network down to 1.7 %",
    "cs-table1-sparser-than-imp-vgg16": "at 1.7 % VGG-16's tickets are more accurate than IMP's",
    "cs-table1-best-vgg16": "the best of VGG-16's tickets reaches 93.45 %",
    "cs-cost-rounds": "IMP's search is six times as long, one round after the other",
    "cs-pruning-above-oneshot-resnet20": "without rewinding, CS prunes ResNet-20 to 6.9 % better than magnitude does",
    "cs-pruning-above-oneshot-vgg16": "without rewinding, CS prunes VGG-16 to 2.8 % better than magnitude does",
    "cs-pruning-l0-below-oneshot-resnet20": "stochastic L0 is the worst on ResNet-20",
    "cs-pruning-l0-below-oneshot-vgg16": "stochastic L0 is the worst on VGG-16",
    "str-table1-above-gmp": "STR is more accurate than gradual magnitude pruning at all four densities",
    "str-table1-gap-grows": "STR is further ahead at 99 % removed than at 90",
    "str-fig5-fewer-macs": "STR's budget takes fewer MACs than the uniform one",
    "str-table4-dnw-budget-94.8": "DNW gains from STR's budget",
    "str-table5-gmp-budget-98.05": "gradual magnitude pruning gains from STR's budget",
    "str-table3-no-loss-google12": "FastGRNN loses nothing at the rank that STR learnt",
    "str-table3-above-lowrank-google12": "a rank that STR learnt is up to 1.66 points better than one set before",
    "grasp-fig2-train-loss": "GraSP's network ends with a lower training loss than SNIP's",
    "grasp-fig2-norm-c10-grasp-above-snip": "GraSP leaves a larger gradient than SNIP",
    "grasp-table1-vgg19-c10": "GraSP beats random pruning on VGG-19, CIFAR-10",
    "grasp-table1-vgg19-c100": "GraSP beats random pruning on VGG-19, CIFAR-100",
    "grasp-table1-resnet32-c10": "GraSP beats random pruning on ResNet-32, CIFAR-10",
    "grasp-table1-resnet32-c100": "GraSP beats random pruning on ResNet-32, CIFAR-100",
}


def kind(row: dict) -> str:
    """ "good", "part", "bad", "open", or "none" for what was not tested."""
    return next((k for k, words in KINDS.items() if (word(row) or "").startswith(words)), "none")


def anchor(row: dict) -> str:
    """The permalink of a claim on the scorecard's page, without what a selector or an attribute cannot have."""
    return re.sub(r"[^\w-]", "-", row["claim"]) if row["claim"] else item_anchor(row)


def item_anchor(row: dict) -> str:
    """The permalink of a figure or table: lth-figure-4."""
    return re.sub(r"[^a-z0-9]+", "-", f"{row['paper']} {row['item']}".lower()).strip("-")


def figure_name(row: dict) -> str | None:
    """The label that the chapter's figure of an item has where there is one: fig-lth-4, fig-grasp-table-2."""
    match = re.fullmatch(r"(Figure|Table) (\d+)", row["item"])
    return match and f"fig-{row['paper']}-{'table-' * (match[1] == 'Table')}{match[2]}"


def in_order(rows: Iterable[dict]) -> list[dict]:
    """The rows, the papers in the order of the book."""
    order = {paper: i for i, paper in enumerate(names.PAPERS)}
    return sorted(rows, key=lambda row: order.get(row["paper"], len(order)))


def by_paper(card: dict) -> dict[str, list[dict]]:
    """{paper: its rows}, in the order of the book."""
    return {
        paper: list(rows) for paper, rows in itertools.groupby(in_order(card["rows"]), key=lambda row: row["paper"])
    }


# What came out, in words ----------------------------------------------------------------------------------------------


def paragraph(rows: list[dict], failures: str = "all") -> str:
    """Markdown: what came out of one paper's claims, primary ones and failures by name, each a link to its row.

    failures: "all" names every secondary claim that failed; "full" only those that failed in full, and the figures
    and tables with numbers that arithmetic does not give.
    """
    claims = [row for row in rows if row["claim"]]
    primary = [row for row in claims if row["primary"]]
    tested = [row for row in primary if kind(row) != "none"]
    said = [f"**{names.PAPERS.get(rows[0]['paper'], escape(rows[0]['paper']))}.**", _lead(primary, tested)]
    for k, full, shorter in (
        ("bad", "**Not reproduced:**", "**Contradicted**"),
        ("good", "Reproduced:", "Supported"),
        ("far", "Reproduced in the cells that were tested:", "Supported in the cells that were tested,"),
        ("part", "Partly:", "Mixed"),
        ("setting", "**Depends on the setting:**", "**Depends on the setting**"),
        (
            "against",
            "Open for an unknown setting, with runs against it:",
            "Open for an unknown setting, with runs against it",
        ),
        ("open", "Open:", "Open"),
    ):
        of = [row for row in tested if _group(row) == k]
        said += _named(full, [row for row in of if row["evidence"] in FULL])
        for evidence in ("reduced", "stand-in"):
            said += _named(f"{shorter} {BASIS[evidence]}:", [row for row in of if row["evidence"] == evidence])
    if left := [row for row in primary if kind(row) == "none"]:
        said.append(f"Without a verdict yet: {_items(left) if len(left) > 3 else '; '.join(map(_link, left))}.")
    bad = [row for row in claims if kind(row) == "bad" and not row["primary"]]
    exact = [row for row in bad if row["evidence"] == "exact"]
    said += _named("**Not reproduced** among the secondary claims:", [r for r in bad if r["evidence"] == "full"])
    if failures == "all":
        shorter = [row for row in bad if row["evidence"] not in FULL]
        said += _named("**Contradicted** among the secondary claims by shorter trainings or stand-ins:", shorter)
        said += _named("**Printed numbers** that arithmetic does not give:", exact)
    elif exact:
        said.append(f"**Printed numbers** that arithmetic does not give: {_items(exact)}.")
    return " ".join(said)


def _group(row):
    """Its `kind`; "far" if some cells pass and the others were not tested; an open verdict by what keeps it open."""
    if kind(row) == "part" and re.fullmatch(r"\d+ of \d+ pass, \d+ not tested", scorecard.note(row).partition(";")[0]):
        return "far"
    if kind(row) != "open":
        return kind(row)
    if word(row) == "depends on the setting":
        return "setting"
    return "against" if "setting unknown" in scorecard.note(row) else "open"


def _items(rows):
    """The figures and tables of some claims, each a link, with the number of claims."""
    counts = Counter((row["item"], item_anchor(row)) for row in rows)
    return ", ".join(
        f"[{escape(item)}](scorecard.ipynb#{at})" + f" ({n})" * (n > 1) for (item, at), n in counts.items()
    )


def totals(card: dict) -> str:
    """Markdown: how many claims there are, by evidence and verdict, and how many would pass by chance."""
    rows = [row for row in card["rows"] if row["claim"]]
    lines = ["| evidence | claims | verdicts |", "| --- | --: | --- |"]
    for evidence, some in card["totals"]["by_evidence"].items():
        said = ", ".join(f"{n} {verdict}" for verdict, n in sorted(some["verdicts"].items()))
        lines.append(f"| {evidence} | {some['claims']} | {said} |")
    chance = card["totals"]["chance"]
    end = (
        f"{chance['tested']} claims were tested on runs. Expected to pass by chance, were none of them true: "
        f"{chance['expected']:.1f}. "
    )
    exact = [(row["net"], row["quantity"], row["paper_value"]) for row in rows if row["evidence"] == "exact"]
    if len(exact) > len(set(exact)):
        end += f"The {len(exact)} exact ones are {len(set(exact))} numbers, since papers print some twice. "
    primary = [
        f"{names.PAPERS.get(paper, escape(paper))} {n['pass']} of {n['tested']} ({n['after_holm']})"
        + f" and {n['mixed']} in part" * (n["mixed"] > 0)
        for paper, n in card["totals"]["primary"]["by_paper"].items()
        if n["tested"]
    ]
    if primary:
        end += (
            "Primary claims that pass, of those that were tested (in brackets also after Holm's correction for their "
            f"number): {', '.join(primary)}."
        )
    return "\n".join(
        [f"**{len(rows)} claims, {sum(row['primary'] for row in rows)} of them primary.**", "", *lines, "", end]
    )


def _lead(primary, tested):
    if not primary:
        return "No claim is marked as primary."
    if not tested:
        return f"None of its {len(primary)} primary claims has been run."
    full = [row for row in tested if row["evidence"] in FULL]
    good = sum(kind(row) == "good" for row in full)
    if not full:
        have = "has" if len(tested) == 1 else "have"
        return f"None of its {len(primary)} primary claims has been run in full; {len(tested)} {have} a first answer."
    how = f"the paper's own network, data and length of training, {_trials(full)}"
    if good == len(full):
        every = "The one" if good == 1 else "Both" if good == 2 else f"All {good}"
        return f"{every} primary claim{'s' * (good > 1)} that ran in full ({how}) reproduce{'s' * (good == 1)}."
    return f"{good} of {len(full)} primary claims that ran in full ({how}) reproduce."


def _trials(rows):
    n = sorted({row["trials"] for row in rows if row["trials"]})
    return names.trials(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]} trials" if n else "no trials"


def _named(begin, rows):
    return [f"{begin} {'; '.join(map(_link, rows))}."] if rows else []


def _link(row):
    return f"[{short(row)}](scorecard.ipynb#{anchor(row)})"


def short(row: dict) -> str:
    """The claim in a few words."""
    return SHORT.get(row["claim"]) or _plain(row["title"].removeprefix("Lenet: ").rstrip("."))


def _plain(title):
    """A title that can stand inside of a link."""
    return title.replace("[", "(").replace("]", ")")


def summary(row: dict) -> dict[str, str]:
    """A tested claim as the row of a chapter's table, in Markdown."""
    said = f"{SIGNS[kind(row)]} {scorecard.said(row)}"
    ours = scorecard.ours(row)
    if every := row["all_trials"]:
        ours += f"; all {every['trials']} trials: {scorecard.measured(row, every['ours'], every['interval'])}"
    return {
        "claim": f"{'★ ' * row['primary']}[{_plain(row['title'])}](scorecard.ipynb#{anchor(row)})",
        "item": row["item"],
        "paper": number(row["paper_value"]),
        "ours, 95 % interval": ours,
        "verdict": said,
        "evidence": row["evidence"],
    }
