"""How the scorecard is shown: what came out in a paragraph, a picture of the primary claims, a square for every claim,
and the page with all of them. Everything is made from the rows of `scorecard.scorecard`; no verdict is decided here.
"""

import itertools
import math
import re
from collections import Counter
from html import escape

from lottery import names, scorecard
from lottery.scorecard import interval, number, word

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
SHORT = {  # a primary claim in a few words; any other is its own sentence
    "lth-fig4-early-stop-21": "a ticket of 21.1 % learns faster than the dense network",
    "lth-fig4-accuracy-13": "one of 13.5 % is more accurate",
    "lth-fig4-reinit-accuracy-21": "fresh weights lose the accuracy",
    "lth-fig4-reinit-speed-21": "and the speed",
    "lth-fig4-matches-dense-3.6": "tickets match the dense network down to 3.6 %",
    "lth-fig4-iterative-beats-oneshot-10": "pruning in rounds beats pruning at once",
    "lth-fig5-conv2-accuracy-4.6": "Conv-2's ticket of 4.6 % is 3.4 points better",
    "lth-fig8-lr0.1-imp-like-reinit": "at learning rate 0.1 ResNet-18's tickets are no better than fresh weights",
    "lth-fig8-rewind-500": "rewinding mends that",
    "cs-table1-sparsest-resnet20": "CS's tickets match the dense network down to 12.3 %",
    "cs-table1-sparser-than-imp-resnet20": "there they are more accurate than IMP's",
    "cs-table1-best-resnet20": "the best one of ResNet-20 reaches 91.54 %",
    "cs-table1-sparsest-vgg16": "VGG-16's match the dense network down to 1.7 %",
    "cs-table1-sparser-than-imp-vgg16": "there VGG-16's are more accurate than IMP's",
    "cs-table1-best-vgg16": "the best one of VGG-16 reaches 93.45 %",
    "cs-cost-rounds": "IMP's search is six times as long, one round after the other",
    "cs-pruning-above-oneshot-resnet20": "without rewinding CS keeps the accuracy where magnitude pruning loses it",
    "cs-pruning-above-oneshot-vgg16": "and on VGG-16",
    "cs-pruning-l0-below-oneshot-resnet20": "stochastic L0 is the worst",
    "cs-pruning-l0-below-oneshot-vgg16": "and on VGG-16 as well",
}


def kind(row):
    """ "good", "part", "bad", "open", or "none" for what was not tested."""
    return next((k for k, words in KINDS.items() if (word(row) or "").startswith(words)), "none")


def anchor(row):
    """The permalink of a claim on the scorecard's page, without the dots that a selector cannot have."""
    return row["claim"].replace(".", "-") if row["claim"] else item_anchor(row)


def item_anchor(row):
    """The permalink of a figure or table: lth-figure-4."""
    return re.sub(r"[^a-z0-9]+", "-", f"{row['paper']} {row['item']}".lower()).strip("-")


def figure_name(row):
    """The label that the chapter's figure of an item has where there is one: fig-lth-4, fig-grasp-table-2."""
    match = re.fullmatch(r"(Figure|Table) (\d+)", row["item"])
    return match and f"fig-{row['paper']}-{'table-' * (match[1] == 'Table')}{match[2]}"


def in_order(rows):
    """The rows, the papers in the order of the book."""
    order = {paper: i for i, paper in enumerate(names.PAPERS)}
    return sorted(rows, key=lambda row: order.get(row["paper"], len(order)))


def by_paper(card):
    """{paper: its rows}, in the order of the book."""
    return {
        paper: list(rows) for paper, rows in itertools.groupby(in_order(card["rows"]), key=lambda row: row["paper"])
    }


# What came out, in words ----------------------------------------------------------------------------------------------


def paragraph(rows, failures="all"):
    """Markdown: what came out of one paper's claims, primary ones and failures by name, each a link to its row.

    failures: "all" names every secondary claim that failed; "full" only those that failed in full, and the figures
    and tables with numbers that arithmetic does not give.
    """
    claims = [row for row in rows if row["claim"]]
    primary = [row for row in claims if row["primary"]]
    tested = [row for row in primary if kind(row) != "none"]
    said = [f"**{names.PAPERS.get(rows[0]['paper'], rows[0]['paper'])}.**", _lead(primary, tested)]
    for k, full, shorter in (
        ("bad", "**Not reproduced:**", "**Contradicted**"),
        ("good", "Reproduced:", "Supported"),
        ("part", "Partly:", "Mixed"),
        ("open", "Open:", "Open"),
    ):
        of = [row for row in tested if kind(row) == k]
        said += _named(full, [row for row in of if row["evidence"] in FULL])
        for evidence in ("reduced", "stand-in"):
            said += _named(f"{shorter} {BASIS[evidence]}:", [row for row in of if row["evidence"] == evidence])
    if left := [row for row in primary if kind(row) == "none"]:
        said.append(f"Not run yet: {_items(left) if len(left) > 3 else '; '.join(map(_link, left))}.")
    bad = [row for row in claims if kind(row) == "bad" and not row["primary"]]
    exact = [row for row in bad if row["evidence"] == "exact"]
    said += _named("**Not reproduced** among the secondary claims:", [r for r in bad if r["evidence"] == "full"])
    if failures == "all":
        shorter = [row for row in bad if row["evidence"] not in FULL]
        said += _named("**Contradicted** among them by shorter trainings or stand-ins:", shorter)
        said += _named("**Printed numbers** that arithmetic does not give:", exact)
    elif exact:
        said.append(f"**Printed numbers** that arithmetic does not give: {_items(exact)}.")
    return " ".join(said)


def _items(rows):
    """The figures and tables of some claims, each a link, with the number of claims."""
    counts = Counter((row["item"], item_anchor(row)) for row in rows)
    return ", ".join(f"[{item}](scorecard.ipynb#{at})" + f" ({n})" * (n > 1) for (item, at), n in counts.items())


def totals(card):
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
    for paper, n in card["totals"]["primary"]["by_paper"].items():
        if n["tested"]:
            end += (
                f"{names.PAPERS.get(paper, paper)}: of {n['tested']} primary claims that were tested {n['pass']} pass, "
                f"{n['after_holm']} also after Holm's correction for their number. "
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
        return f"None of its {len(primary)} primary claims has been run in full; {len(tested)} have a first answer."
    how = f"the paper's own network, data and length of training, {_trials(full)}"
    if good == len(full):
        every = "The one" if good == 1 else "Both" if good == 2 else f"All {good}"
        return f"{every} primary claim{'s' * (good > 1)} that ran in full ({how}) reproduce{'s' * (good == 1)}."
    return f"{good} of {len(full)} primary claims that ran in full ({how}) reproduce."


def _trials(rows):
    n = sorted({row["trials"] for row in rows if row["trials"]})
    return f"{n[0]} trials" if len(n) == 1 else f"{n[0]} to {n[-1]} trials" if n else "no trials"


def _named(begin, rows):
    return [f"{begin} {'; '.join(map(_link, rows))}."] if rows else []


def _link(row):
    return f"[{short(row)}](scorecard.ipynb#{anchor(row)})"


def short(row):
    """The claim in a few words."""
    return SHORT.get(row["claim"]) or _plain(row["title"].removeprefix("Lenet: ").rstrip("."))


def _plain(title):
    """A title that can stand inside of a link."""
    return title.replace("[", "(").replace("]", ")")


def summary(row):
    """A tested claim as the row of a chapter's table, in Markdown."""
    said = f"{SIGNS[kind(row)]} {scorecard.said(row)}"
    return {
        "claim": f"{'★ ' * row['primary']}[{_plain(row['title'])}](scorecard.ipynb#{anchor(row)})",
        "item": row["item"],
        "paper": number(row["paper_value"]),
        "ours, 95 % interval": f"{number(row['ours'])} {interval(row['interval'])}".strip(),
        "verdict": said,
        "evidence": row["evidence"],
    }


# The picture of the primary claims ------------------------------------------------------------------------------------

LOW, HIGH, SCALE = -1.2, 2.6, 100  # what the axis shows, in units of the paper's effect, and pixels of a unit


def in_effects(row):
    """((ours, low, high), (low, high) of what counts as reproduced), in units of the paper's effect; None without any.

    0 is no effect and 1 the paper's effect Δ, or where it states none twice the margin m. A claimed value is at 1, and
    a difference of 2m from it is one unit.
    """
    kind = row["rule"].split(";")[0]
    given = dict(re.findall(r"(Δ|m) = ([\d.e-]+)", row["rule"]))
    if row["ours"] is None or not row["interval"] or "m" not in given:
        return None
    unit = math.log if "ratio" in row["quantity"] else float
    if unit is math.log and min(row["ours"], *row["interval"]) <= 0:
        return None
    m = unit(float(given["m"]))
    values = [unit(v) for v in (row["ours"], *row["interval"])]
    if kind.endswith("value"):
        paper = unit(row["paper_value"])
        return [1 + (v - paper) / (2 * m) for v in values], (0.5, 1.5)
    effect = unit(float(given["Δ"])) if "Δ" in given else 2 * m
    if not effect:
        return None
    zone = {"same": (-0.5, 0.5), "at least matches": (-0.5, math.inf), "down to": (-0.5, math.inf)}
    begin = 0 if kind.startswith("in all cells") else 0.5
    return [v / effect for v in values], zone.get(kind.removeprefix("in all cells: "), (begin, math.inf))


def forest(card):
    """HTML: one line for each primary claim that was tested, ours with its interval in units of the paper's effect."""
    rows = [row for row in in_order(card["rows"]) if row["claim"] and row["primary"] and kind(row) != "none"]
    out = [
        '<table class="forest"><caption>Primary claims: ours with its 95 % interval over trials, in units of the '
        "paper's effect. Shaded: where it counts as reproduced. Filled: the paper's own setting; hollow: shorter or "
        "smaller.</caption>",
        '<thead><tr><th scope="col">claim</th><th scope="col" class="axis">'
        f'<svg viewBox="0 0 {(HIGH - LOW) * SCALE:.0f} 16" role="img" aria-label="axis from no effect to the paper\'s '
        f'effect"><text x="{_x(0)}" y="12">no effect</text><text x="{_x(1)}" y="12">the paper\'s</text></svg></th>'
        '<th scope="col">verdict</th></tr></thead>',
    ]
    for paper, some in itertools.groupby(rows, key=lambda row: row["paper"]):
        out.append(f'<tbody><tr><th colspan="3" scope="rowgroup">{escape(names.PAPERS.get(paper, paper))}</th></tr>')
        out += map(_forest_line, some)
        out.append("</tbody>")
    return "\n".join([*out, "</table>"])


def _forest_line(row):
    basis = f"{row['evidence']}, {row['trials']} trials" if row["trials"] else row["evidence"]
    said = short(row)
    return (
        f'<tr><th scope="row"><a href="#{anchor(row)}">{escape(said[:1].upper() + said[1:])}</a></th>'
        f'<td class="axis">{_bar(row)}</td><td><span class="verdict {kind(row)}">{SIGNS[kind(row)]} {word(row)}</span> '
        f"<small>{basis}</small></td></tr>"
    )


def _bar(row):
    """One line of the forest as SVG."""
    found = in_effects(row)
    width = f"{(HIGH - LOW) * SCALE:.0f}"
    axis = f'<path class="zero" d="M{_x(0)} 0V20"/><path class="one" d="M{_x(1)} 0V20"/>'
    if not found:
        return f'<svg viewBox="0 0 {width} 20" role="img" aria-label="no interval">{axis}</svg>'
    (ours, low, high), zone = found
    filled = "filled" if row["evidence"] in FULL else "hollow"
    name = f"{number(row['ours'])} {interval(row['interval'])}, the paper's {number(row['paper_value'])}"
    arrows = "".join(
        f'<path class="arrow" d="M{x} 10l{dx} -4v8z"/>'
        for x, dx, on in ((_x(LOW), 6, low < LOW), (_x(HIGH), -6, high > HIGH))
        if on
    )
    return (
        f'<svg viewBox="0 0 {width} 20" role="img" aria-label="{escape(name)}"><title>{escape(name)}</title>'
        f'<rect class="zone" x="{_x(zone[0])}" y="2" width="{_x(zone[1]) - _x(zone[0]):g}" height="16"/>{axis}'
        f'<g class="{kind(row)} {filled}"><path d="M{_x(low)} 10H{_x(high)}"/>{arrows}'
        f'<circle cx="{_x(ours)}" cy="10" r="5"/></g></svg>'
    )


def _x(u):
    """Pixels of a number of effects, clipped to the axis."""
    return round((min(max(u, LOW), HIGH) - LOW) * SCALE, 1)


# A square for every claim ---------------------------------------------------------------------------------------------

SIDE = 16  # pixels
_SHAPES = {  # outline and sign, in a box of 12
    "good": ("M0 0H12V12H0z", "M2.5 6.5l2.5 2.5 4.5-5.5"),
    "part": ("M0 3Q0 0 3 0H9Q12 0 12 3V9Q12 12 9 12H3Q0 12 0 9z", "M6 1.8v5M3.5 4.3h5M3.5 9.3h5"),
    "bad": ("M6-1.4L13.4 6 6 13.4-1.4 6z", "M3.5 3.5l5 5M8.500 3.5l-5 5"),
    "open": (
        "M6-.4A6.4 6.4 0 1 1 5.990-.4z",
        "M4.200 4.300Q4.400 2.600 6 2.600T7.800 4.300Q7.800 5.400 6 6.200V7.400M6 8.900v.7",
    ),
    "none": ("M1.500 1.500H10.500V10.500H1.500z", ""),
}


def squares(card):
    """HTML: a linked sign for each claim, figure by figure; shape and colour are the verdict, filling the evidence."""
    rows = [row for row in in_order(card["rows"]) if row["claim"]]
    out = [_legend()]
    for paper, some in itertools.groupby(rows, key=lambda row: row["paper"]):
        out.append(f'<p class="squares-paper">{escape(names.PAPERS.get(paper, paper))}</p><div class="squares">')
        for item, claims in _by_item(some):
            out.append(_block(item, claims))
        out.append("</div>")
    return "\n".join(out)


def _by_item(rows):
    """[(item, rows)], in the order in which items appear."""
    found = {}
    for row in rows:
        found.setdefault(row["item"], []).append(row)
    return found.items()


def _block(item, claims):
    claims = sorted(claims, key=lambda row: (not row["primary"], kind(row) == "none"))
    columns = max(2, min(12, math.ceil(math.sqrt(len(claims) * 1.6))))
    width, height = columns * SIDE, math.ceil(len(claims) / columns) * SIDE
    marks = []
    for i, row in enumerate(claims):
        said = f"{row['title']} {word(row)}" + ("" if row["evidence"] == "none" else f", {row['evidence']}")
        star = '<circle class="star" cx="6" cy="6" r="7.600"/>' if row["primary"] else ""
        marks.append(
            f'<a href="#{anchor(row)}" aria-label="{escape(said)}"><title>{escape(said)}</title>'
            f'<g transform="translate({2 + i % columns * SIDE} {2 + i // columns * SIDE})">{star}{_mark(row)}</g></a>'
        )
    label = item.replace("Figure", "Fig.").replace(" table", "")
    return (
        f'<div><span>{escape(label)}</span><svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"{''.join(marks)}</svg></div>"
    )


def _mark(row):
    filling = {"exact": "full", "full": "full", "reduced": "reduced"}.get(row["evidence"], "standin")
    outline, sign = _SHAPES[kind(row)]
    return (
        f'<g class="{kind(row)} {filling}"><path d="{outline}"/>'
        + (f'<path class="sign" d="{sign}"/>' if sign else "")
        + "</g>"
    )


def _legend():
    """What shapes and fillings mean."""
    shown = [("good", "reproduced, supports"), ("part", "partly, mixed"), ("bad", "not reproduced, contradicts")]
    shown += [("open", "inconclusive"), ("none", "not tested")]
    fillings = [("full", "the paper's setting"), ("reduced", "shorter"), ("stand-in", "smaller network or data")]

    def entry(row, said):
        box = 'width="16" height="16" viewBox="-2 -2 16 16" aria-hidden="true"'
        return f"<span><svg {box}>{_mark(row)}</svg> {said}</span>"

    word_of = {k: words[0] for k, words in KINDS.items()} | {"none": "not tested"}
    kinds = [entry({"verdict": word_of[k], "evidence": "full"}, said) for k, said in shown]
    parts = [entry({"verdict": "reproduced", "evidence": e}, said) for e, said in fillings]
    ring = (
        '<span><svg width="18" height="18" viewBox="-3 -3 18 18" aria-hidden="true"><circle class="star" cx="6" cy="6" '
        'r="7.600"/></svg> primary</span>'
    )
    return f'<p class="squares-legend">{"".join([*kinds, *parts, ring])}</p>'


# The page -------------------------------------------------------------------------------------------------------------


def page(card, figures=()):
    """HTML: the scorecard's claims, paper by paper and figure by figure, with the form that filters them.

    figures: labels of the chapters' figures (`fig-lth-4`), which their items link to.
    """
    rows = in_order(card["rows"])
    out = [_form(rows)]
    for paper, some in itertools.groupby(rows, key=lambda row: row["paper"]):
        name = names.PAPERS.get(paper, paper)
        out.append(f'<section class="paper" data-paper="{paper}"><h2 id="{paper}">{escape(name)}</h2>')
        for item, claims in _by_item(some):
            out += _item(item, claims, figures)
        out.append("</section>")
    return "\n".join(out)


def _form(rows):
    papers = {paper: names.PAPERS.get(paper, paper) for paper in dict.fromkeys(row["paper"] for row in rows)}
    verdicts = sorted({word(row) for row in rows if row["claim"]})
    evidence = [
        e for e in ("exact", "full", "reduced", "stand-in", "none") if any(row["evidence"] == e for row in rows)
    ]

    def select(name, options):
        said = "".join(f'<option value="{escape(v)}">{escape(text)}</option>' for v, text in options)
        return f'<label>{name} <select name="{name}"><option value="">all</option>{said}</select></label>'

    return (
        '<form class="claims-filter" hidden role="search" aria-label="Filter the claims">'
        + select("paper", papers.items())
        + select("verdict", [(v, v) for v in verdicts])
        + select("evidence", [(e, e) for e in evidence])
        + '<label><input type="checkbox" name="primary" value="1"> primary only</label>'
        '<label>words <input type="search" name="q" autocomplete="off"></label>'
        '<button type="reset">show all</button><output aria-live="polite"></output></form>'
    )


def _item(item, claims, figures):
    """The lines of one figure or table: tested claims in a table, the others folded below."""
    here = claims[0]
    name = figure_name(here)
    link = (
        f' <a class="in-chapter" href="{here["paper"]}.html#{name}">in the chapter</a>'
        if name and name in figures
        else ""
    )
    tested = [row for row in claims if row["claim"] and kind(row) != "none"]
    others = [row for row in claims if row["claim"] and kind(row) == "none"]
    yield f'<section class="item" id="{item_anchor(here)}"><h3>{escape(item)}{link}</h3>'
    if tested:
        head = "".join(f'<th scope="col">{name}</th>' for name in ("claim", "paper", "ours", "verdict", "evidence"))
        yield f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>'
        yield from map(_line, sorted(tested, key=lambda row: not row["primary"]))
        yield "</tbody></table>"
    if others:
        primary = sum(row["primary"] for row in others)
        count = f"{len(others)} not tested" + (f", {primary} of them primary" if primary else "")
        yield f'<details class="untested"><summary>{count}</summary><ul>'
        yield from map(_untested, others)
        yield "</ul></details>"
    for row in claims:
        if not row["claim"]:
            yield f"<p>{escape(row['title'])} Nothing here is claimed in a form that runs can test.</p>"
    yield "</section>"


def _data(row):
    """What the form filters by."""
    said = {"paper": row["paper"], "verdict": word(row), "evidence": row["evidence"], "primary": int(row["primary"])}
    return f'id="{anchor(row)}" ' + " ".join(f'data-{k}="{escape(str(v))}"' for k, v in said.items())


def _line(row):
    """One tested claim."""
    basis = [row["evidence"]]
    if row["trials"]:
        share = "" if row["steps_fraction"] is None else f", {100 * row['steps_fraction']:.3g} % of the steps"
        nets, sets = (row[k].split(", ") for k in ("net", "data"))
        where = " and ".join(names.net(n, d) for n, d in itertools.product(nets, sets))
        basis.append(f"{row['trials']} trials{share}; {where}")
    changed = ", before that: ".join(filter(None, [row["stale"], row["was"]]))
    notes = [n for n in (scorecard.note(row), changed) if n]
    more = [f"Rule: {row['rule']}.", f"Read: {row['quantity']}."]
    if every := row["all_trials"]:
        more.append(f"All {every['trials']} stored trials: {number(every['ours'])} {interval(every['interval'])}.")
    more += [f"With test images as a sample, too: {interval(row['interval_images'])}."] * bool(row["interval_images"])
    more += [f"Cells: {row['coverage']}."] * bool(row["coverage"]) + [f"On {row['device']}."] * bool(row["device"])
    k = kind(row)
    small = "".join(f" <small>{escape(n)}</small>" for n in notes)
    basis = escape(basis[0]) + "".join(f" <small>{escape(b)}</small>" for b in basis[1:])
    return (
        f'<tr {_data(row)}><th scope="row">{_star(row)}{escape(row["title"])} '
        f'<a class="permalink" href="#{anchor(row)}" aria-label="Link to this claim">#</a>'
        f"<details><summary>rule and command</summary><p>{escape(' '.join(more))}</p>"
        f"<p><code>{escape(row['command'] or '')}</code></p></details></th>"
        f'<td data-label="paper">{number(row["paper_value"])}</td>'
        f'<td data-label="ours">{number(row["ours"])} <small>{interval(row["interval"])}</small></td>'
        f'<td data-label="verdict"><span class="verdict {k}">{SIGNS[k]} {word(row)}</span>{small}</td>'
        f'<td data-label="evidence">{basis}</td></tr>'
    )


def _untested(row):
    paper = "" if row["paper_value"] is None else f" <small>paper: {number(row['paper_value'])}</small>"
    why = f" <small>{escape(note)}</small>" if (note := scorecard.note(row)) else ""
    command = f" <code>{escape(row['command'])}</code>" if row["command"] else ""
    return f"<li {_data(row)}>{_star(row)}{escape(row['title'])}{paper}{why}{command}</li>"


def _star(row):
    return '<abbr title="primary claim">★</abbr> ' if row["primary"] else ""
