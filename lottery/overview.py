"""The scorecard as a page: a picture of the primary claims, a square for every claim, and all of them with a filter.

Functions of a card, as `scorecard.scorecard` gives it, to HTML; what is said of a claim in words is `verdicts`'.
"""

import itertools
import math
import re
from collections.abc import Iterable
from html import escape

from lottery import names, scorecard
from lottery.scorecard import interval, number, word
from lottery.verdicts import FULL, KINDS, SIGNS, anchor, figure_name, in_order, item_anchor, kind, short

# The picture of the primary claims ------------------------------------------------------------------------------------

LOW, HIGH, SCALE = -1.2, 2.6, 100  # what the axis shows, in units of the paper's effect, and pixels of a unit


def in_effects(row: dict) -> tuple[list[float], tuple[float, float]] | None:
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


def forest(card: dict) -> str:
    """HTML: one line for each primary claim that was tested, ours with its interval in units of the paper's effect."""
    rows = [row for row in in_order(card["rows"]) if row["claim"] and row["primary"] and kind(row) != "none"]
    drawn = [row for row in rows if in_effects(row)]
    bare = sum("Δ" not in row["rule"] and not row["rule"].split(";")[0].endswith("value") for row in drawn)
    out = [
        '<table class="forest"><caption>Primary claims: ours with its 95 % interval over trials, in units of the '
        f"paper's effect, or of twice the margin where the paper prints none ({bare} of {len(drawn)}), for a claim in "
        "several cells of the one with the largest p-value. Shaded: where the mean has to lie; a difference must also "
        "leave no effect out of its interval. Filled: the paper's own setting; hollow: shorter or smaller.</caption>",
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
    basis = f"{row['evidence']}, {names.trials(row['trials'])}" if row["trials"] else row["evidence"]
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
    papers = "the paper prints none" if row["paper_value"] is None else f"the paper's {number(row['paper_value'])}"
    name = f"{scorecard.measured(row, row['ours'], row['interval'])}, {papers}"
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


def squares(card: dict) -> str:
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
    drawn = f'<path class="sign" d="{sign}"/>' if sign else ""
    return f'<g class="{kind(row)} {filling}"><path d="{outline}"/>{drawn}</g>'


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


def page(card: dict, figures: Iterable[str] = ()) -> str:
    """HTML: the scorecard's claims, paper by paper and figure by figure, with the form that filters them.

    figures: labels of the chapters' figures (`fig-lth-4`), which their items link to.
    """
    rows = in_order(card["rows"])
    out = [_form(rows)]
    for paper, some in itertools.groupby(rows, key=lambda row: row["paper"]):
        name = names.PAPERS.get(paper, paper)
        at = escape(paper)
        out.append(f'<section class="paper" data-paper="{at}"><h2 id="{at}">{escape(name)}</h2>')
        for item, claims in _by_item(some):
            out += _item(item, claims, figures)
        out.append("</section>")
    return "\n".join(out)


def _form(rows):
    papers = {paper: names.PAPERS.get(paper, paper) for paper in dict.fromkeys(row["paper"] for row in rows)}
    verdicts = sorted({word(row) for row in rows if row["claim"]})
    evidence = [e for e in scorecard.EVIDENCE if any(row["evidence"] == e for row in rows)]

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
        f' <a class="in-chapter" href="{escape(here["paper"])}.html#{name}">in the chapter</a>'
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
        basis.append(f"{names.trials(row['trials'])}{share}; {where}")
    changed = ", before that: ".join(filter(None, [row["stale"], row["was"]]))
    notes = [n for n in (scorecard.note(row), changed) if n]
    more = [f"Rule: {row['rule']}.", f"Read: {row['quantity']}."]
    if every := row["all_trials"]:
        ours = scorecard.measured(row, every["ours"], every["interval"])
        more.append(f"All {every['trials']} stored trials: {ours}.")
    more += [f"With test images as a sample, too: {interval(row['interval_images'])}."] * bool(row["interval_images"])
    more += [f"Cells: {row['coverage']}."] * bool(row["coverage"]) + [f"On {row['device']}."] * bool(row["device"])
    k = kind(row)
    ours = scorecard.measured(row, row["ours"], row["interval"]).partition(" [")[0]
    at = escape(f" at {row['cell']}" * bool(row["cell"]))
    small = "".join(f" <small>{escape(n)}</small>" for n in notes)
    basis = escape(basis[0]) + "".join(f" <small>{escape(b)}</small>" for b in basis[1:])
    return (
        f'<tr {_data(row)}><th scope="row">{_star(row)}{escape(row["title"])} '
        f'<a class="permalink" href="#{anchor(row)}" aria-label="Link to this claim">#</a>'
        f"<details><summary>rule and command</summary><p>{escape(' '.join(more))}</p>"
        f"<p><code>{escape(row['command'] or '')}</code></p></details></th>"
        f'<td data-label="paper">{number(row["paper_value"])}</td>'
        f'<td data-label="ours">{ours} <small>{interval(row["interval"])}{at}</small></td>'
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
