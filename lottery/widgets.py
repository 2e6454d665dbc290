"""Small pictures that a reader can move, without a server: HTML with data, a question and a still picture.

The book's script (`book/static/widgets.js`) draws them; where it does not run, the still picture stands. Each has one
question that moving it answers, and the answer, folded, computed from the same data.
"""

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")


def _widget(kind, title, question, answer, data, still):
    """The frame that all have. still: SVG."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    answer = escape(answer.replace("-", "−"))
    return (
        f'<div class="widget" id="widget-{kind}" data-widget="{kind}"><p class="widget-title">{escape(title)}</p>'
        f'<div class="widget-still">{still}</div><script type="application/json">{text}</script>'
        f'<p class="widget-question"><b>Question.</b> {escape(question)}</p>'
        f'<details class="widget-answer"><summary>Answer</summary><p>{answer}</p></details></div>'
    )


def _svg(width, height, title, *parts):
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def pixels(levels: Sequence[Mapping[str, np.ndarray | float]]) -> str:
    """Which pixels a ticket of LeNet-300-100 still looks at, round by round.

    levels: [{"mask": bool array [300, 784] of the first layer, "density": of all weights, "accuracy": test accuracy}].
    """
    rounds = []
    for at in levels:
        kept = np.asarray(at["mask"]).sum(axis=0)
        share = np.round(255 * kept / np.asarray(at["mask"]).shape[0]).astype(np.uint8)
        row = {"left": round(100 * at["density"], 2), "accuracy": round(100 * at["accuracy"], 2)}
        rounds.append(row | {"cut": int((kept == 0).sum()), "pixels": b64encode(share.tobytes()).decode()})
    last = np.asarray(levels[-1]["mask"]).mean(axis=0).reshape(28, 28)
    shades = np.digitize(last / max(last.max(), 1e-9), [0.02, 0.15, 0.35, 0.6, 0.85])
    parts = []
    for shade in range(1, 6):
        path = "".join(f"M{8 * j} {8 * i}h8v8h-8z" for i, j in zip(*np.nonzero(shades == shade), strict=True))
        parts.append(f'<path d="{path}" fill="#0072B2" fill-opacity="{shade / 5:g}"/>')
    title = (
        f"The pixels that the ticket of {rounds[-1]['left']} % still looks at, darker where more connections are left"
    )
    answer = "Not within these rounds."
    if (at := next((r for r, row in enumerate(rounds) if row["cut"] >= 50), None)) is not None:
        fallen = "" if rounds[at]["accuracy"] < rounds[0]["accuracy"] else "not "
        answer = (
            f"{at} rounds: at {rounds[at]['left']} % of the weights {rounds[at]['cut']} are cut off. The accuracy has "
            f"{fallen}fallen, {rounds[at]['accuracy']} % against {rounds[0]['accuracy']} % at the start."
        )
    return _widget(
        "pixels",
        "Which pixels does the ticket still look at?",
        "How many rounds does it take until fifty of the 784 pixels are cut off, and has the accuracy fallen by then?",
        answer,
        {"rounds": rounds},
        _svg(224, 224, title, *parts),
    )


def layers(names: Sequence[str], kept: Mapping[float, Mapping[str, Sequence[float]]]) -> str:
    """What two criteria keep of each layer, by density.

    names: of the layers. kept: {sparsity in %: {criterion: [share kept in each layer, %]}}.
    """
    data = {f"{s:g}": {c: [round(v, 2) for v in shares] for c, shares in by.items()} for s, by in sorted(kept.items())}
    at = data[next(iter(data))]
    bars = []
    for c, shares in enumerate(at.values()):
        for i, share in enumerate(shares):
            x, height = 10 + 620 * i / len(shares) + 8 * c, 1.4 * share
            bars.append(f'<path d="M{x:.1f} 150v-{height:.1f}h7v{height:.1f}z" fill="{COLOURS[2 - c]}"/>')

    def first(criterion):
        for s, by in data.items():
            if (least := min(by[criterion])) < 1:
                return f"at {s} % removed ({least} % of {names[by[criterion].index(least)]})"
        return "at none of these"

    return _widget(
        "layers",
        "Which layers does a criterion spare?",
        "At which sparsity does SNIP first leave a layer less than 1 % of its weights? Does GraSP ever?",
        f"SNIP first {first('snip')}, GraSP {first('grasp')}.",
        {"names": list(names), "kept": data},
        _svg(640, 160, "Share of the weights that two criteria keep in each layer", *bars),
    )


def gate() -> str:
    """σ(βs) from soft to hard."""
    s = np.linspace(-1, 1, 41)
    curves = []
    for beta, colour in ((1, COLOURS[0]), (5, COLOURS[2]), (50, COLOURS[1])):
        y = 150 - 130 / (1 + np.exp(-beta * s))
        points = " ".join(f"{160 + 140 * a:.0f},{b:.1f}" for a, b in zip(s, y, strict=True))
        curves.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
    s = [-0.6, -0.25, -0.05, 0.1, 0.4]
    last = min(s, key=abs)
    beta = math.log(99) / abs(last)
    return _widget(
        "gate",
        "A gate hardens: σ(βs)",
        "At which β are all five gates within 0.01 of open or shut? Which one is the last, and why?",
        f"From β = {beta:.0f} on. The last is s = {last}: only βs counts, and the smallest |s| needs the largest β.",
        {"s": s},
        _svg(320, 160, "The curve σ(βs) for β = 1, 5 and 50: flat, then steeper, then almost a step", *curves),
    )


def threshold() -> str:
    """Soft against hard threshold."""
    soft = "20,140 110,80 210,80 300,20"
    hard = "20,150 110,90 110,80 210,80 210,70 300,10"
    w = [-0.9, -0.55, -0.3, -0.12, 0.05, 0.2, 0.42, 0.7]
    alpha, largest = sorted(map(abs, w))[-2:]
    return _widget(
        "threshold",
        "Soft and hard threshold",
        "Raise α until one weight is left. By how much has the soft threshold shrunk it, and the hard one?",
        f"At α = {alpha:.2f}: the soft one by α, from {largest:.2f} to {largest - alpha:.2f}, the hard one not at all.",
        {"w": w},
        _svg(
            320, 160, "The soft threshold moves all weights towards zero, the hard one only cuts",
            f'<polyline points="{soft}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>',
            f'<polyline points="{hard}" fill="none" stroke="{COLOURS[1]}" stroke-width="2" stroke-dasharray="5 3"/>',
        ),
    )  # fmt: skip


def prune(weights: ArrayLike, trained_again: ArrayLike, rate: float = 0.2) -> str:
    """Rounds of magnitude pruning by clicking.

    weights: those of a small layer after the first training, trained_again: after the second, from the same start.
    """
    flat = [[round(float(v), 2) for v in row] for row in (np.ravel(weights), np.ravel(trained_again))]
    texts = []
    for i, v in enumerate(flat[0]):
        x, y = 30 + 60 * (i % 5), 25 + 34 * (i // 5)
        texts.append(f'<text x="{x}" y="{y}" text-anchor="middle" font-size="14">{v:+.2f}</text>')
    left = list(range(len(flat[0])))
    for row in flat:  # both rounds
        out = sorted(left, key=lambda i: abs(row[i]))[: int(rate * len(left) + 0.5)]
        left = [i for i in left if i not in out]
    gone = max(out, key=lambda i: abs(flat[0][i]))
    return _widget(
        "prune",
        "One round by hand",
        "Remove the smallest fifth twice. Which weight goes in the second round, though it was large after the first?",
        f"The one of {flat[0][gone]:.2f} after the first training, which is {flat[1][gone]:.2f} after the second.",
        {"trainings": flat, "rate": rate},
        _svg(310, 34 * (len(flat[0]) // 5) + 6, "The weights of a small layer", *texts),
    )
