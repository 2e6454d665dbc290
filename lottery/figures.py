"""Figures: ours with error bars, the paper's printed points beside them, and the badge that says what they rest on.

Every function takes the frame of `chapter.Chapter.frame`; accuracies are drawn in %, densities in % on a
log axis that falls from left to right, as in the paper. A notebook stores figures as SVG: text stays text, black is
the page's own colour, and equal figures are equal bytes.
"""

import functools
import io
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from numpy.typing import ArrayLike

from lottery import claims, names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Look(NamedTuple):
    """How a method looks in every figure of the book."""

    label: str
    colour: str
    marker: str
    line: str


class _Looks(dict):
    """`{arm: Look}`; the label is the one of today, for an exploration may train something else under an arm's name."""

    def __getitem__(self, name):
        return super().__getitem__(name)._replace(label=names.arm(name))


def _look(name, colour, marker, line="-"):
    return Look(names.ARMS[name], colour, marker, line)


# One colour and marker for each method through the whole book. Okabe–Ito's colours and two of Tol's, told apart by the
# colour-blind and on light and dark pages; marker and line tell them apart where colours come close.
METHODS = _Looks(
    {
        "dense": _look("dense", "black", "x"),
        "imp": _look("imp", "#0072B2", "o"),
        "reinit": _look("reinit", "#D55E00", "s", "--"),
        "oneshot": _look("oneshot", "#009E73", "^", "-."),
        "oneshot-reinit": _look("oneshot-reinit", "#E69F00", "v", ":"),
        "random": _look("random", "#808080", "D", ":"),
        "continued": _look("continued", "#009E73", "<", "-."),
        "lt": _look("lt", "#0072B2", "o"),
        "lt-rewind": _look("lt-rewind", "#56B4E9", ">", "-."),
        "rewind": _look("rewind", "#56B4E9", ">", "-."),
        "grasp": _look("grasp", "#009E73", "p"),
        "snip": _look("snip", "#E69F00", "X", "--"),
        "synflow": _look("synflow", "black", "8", "-."),
        "magnitude": _look("magnitude", "#A6761D", "d", ":"),
        "cs": _look("cs", "#CC79A7", "P"),
        "str": _look("str", "#AA4499", "H"),
        "gmp": _look("gmp", "#A6761D", "v", "--"),
        "dnw": _look("dnw", "#E69F00", "d", ":"),
        "set": _look("set", "#56B4E9", "<", ":"),
        "rigl": _look("rigl", "#009E73", ">", "--"),
        "l0": _look("l0", "#D55E00", "*", "-."),
        "supermask": _look("supermask", "#E69F00", "h", ":"),
    }
)
OTHERS = [  # of any other arm
    *(("#009E73", "^", "-."), ("#56B4E9", "v", ":"), ("#E69F00", "X", "--")),
    *(("#CC79A7", "D", "-."), ("black", "P", ":")),
]
# Learning curves: a level has its colour in every panel, a control its arm's. FIRST: iterations on a linear axis.
FIRST = 1000
LEVELS = {0: "black", 3: "#56B4E9", 7: "#0072B2", 12: "#009E73", 15: "#E69F00", 18: "#D55E00"}
LABEL = {
    "step": "early stop, iterations",
    "test_acc": "test accuracy, %",
    "val_acc": "validation accuracy, %",
    "train_acc": "train accuracy, %",
    "val_loss": "validation loss",
}
DENSITY = "weights remaining (density), %"
DARK, LIGHT = "#111111", "#fefefe"  # of text on a coloured ground; black and white turn with the page
WIDTH = 6.9  # inches: the column of the book, so that a point in the figure is a point on the page


def style() -> None:
    """The book's look; call it once in a notebook, where it also makes figures SVG."""
    rc = {"axes.grid": True, "grid.alpha": 0.35, "legend.frameon": False, "text.color": "black", "axes.linewidth": 0.8}
    rc |= dict.fromkeys(("xtick.major.width", "ytick.major.width", "grid.linewidth"), 0.8)
    rc |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "black")
    rc |= {"font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "figure.titlesize": 10}
    rc |= dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), 9)
    sns.set_theme(style="ticks", rc=rc)
    plt.rcParams |= {"savefig.bbox": "tight", "figure.facecolor": "none", "axes.facecolor": "none"}
    try:
        from IPython import get_ipython
    except ImportError:
        return
    if shell := get_ipython():
        from matplotlib.figure import Figure
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")
        shell.display_formatter.formatters["image/svg+xml"].for_type(Figure, svg)


def svg(fig: "Figure") -> str:
    """A figure as SVG: text as text, black as the page's own colour, no date, one decimal, the badge below.

    The badge stands in a group of its own, below the height that `data-height` gives; the book cuts it off there and
    sets it as a line of text.
    """
    text = _saved(fig)
    over = float(re.search(r'width="([\d.]+)pt"', text)[1]) / 72 - WIDTH
    if over > 0:  # labels stand out: what is drawn gives way, so that text keeps its size on the page
        fig.set_figwidth(fig.get_figwidth() - over)
        text = _saved(fig)
    root = ElementTree.fromstring(text)
    used = set(re.findall(r"#([\w-]+)", text))
    for node in root.iter():
        _slim(node, used)
    width, height = map(float, root.get("viewBox").split()[2:])
    lines = textwrap.wrap(getattr(fig, "badge", ""), int(width / 4.9))
    whole = height + (12 * len(lines) + 6 if lines else 0)
    root.attrib = {
        "width": f"{width:g}pt", "height": f"{whole:g}pt", "viewBox": f"0 0 {width:g} {whole:g}",
        "data-height": f"{height:g}", "fill": "currentColor", "font-family": "sans-serif", "stroke-linejoin": "round",
        "style": "color: black",
    }  # fmt: skip
    if lines:
        below = ElementTree.SubElement(root, f"{SVG}g", {"class": "badge", "style": "font-size: 9px; fill: #737373"})
        for i, line in enumerate(lines):
            ElementTree.SubElement(below, f"{SVG}text", x="2", y=f"{height + 14 + 12 * i:g}").text = line
    ElementTree.register_namespace("", SVG.strip("{}"))
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _saved(fig):
    """The figure as matplotlib's SVG."""
    out = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lottery"}):
        fig.savefig(out, format="svg", metadata=none, transparent=True, bbox_inches="tight", pad_inches=0.03)
    return out.getvalue()


SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def _slim(node, used):
    """A node of matplotlib's SVG without what a page can do without, black and white as the page has them."""
    children = []
    for child in node:  # a group that only groups is its children
        while (
            child.tag == f"{SVG}g"
            and len(child) == 1
            and not set(child.attrib) - {"id"}
            and child.get("id") not in used
        ):
            child = child[0]
        if child.tag in (f"{SVG}metadata", f"{SVG}style") or (child.tag == f"{SVG}defs" and not len(child)):
            continue
        if child.get("style") == "fill: none":  # no line, no filling
            continue
        children.append(child)
    node[:] = children
    node.tail = None
    node.text = node.text.strip() or None if node.text else None
    given = {name.replace(XLINK, ""): value for name, value in node.attrib.items()}
    if given.get("id") not in used:
        given.pop("id", None)
    if node.tag == f"{SVG}use" and "style" in given:  # what it uses has the same style but for its filling
        given["style"] = "; ".join(part for part in given["style"].split("; ") if part.startswith("fill"))
    for name, value in given.items():
        if name not in ("id", "href", "clip-path"):
            value = re.sub(
                r"-?\d+\.\d+", lambda m: f"{round(float(m[0]), 1) + 0.0:g}", re.sub(r"\s+", " ", value).strip()
            )
        value = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", value)
        value = re.sub(r"(fill|stroke): #ffffff", r"\1: var(--pst-color-background, #fff)", value)
        given[name] = re.sub(r"font-family: .*?sans-serif; ?", "", value)
    if given.get("transform", "").startswith("rotate(-0 ") or given.get("transform", "").startswith("rotate(0 "):
        del given["transform"]
    node.attrib = given


def per_trial(frame: "pd.DataFrame", quantity: str, reading: str = "early_stop", x: str = "density") -> "pd.DataFrame":
    """One value for each arm, point and trial (repeated draws averaged), and the density in % or the weights left.

    quantity: "step", "val_loss", or an accuracy ("test_acc", "train_acc", "val_acc"), returned in %.
    x: "density", or "weights" for their number. late: the share of readings at early stop that are `claims.censored`.
    """
    factor = 100 if quantity.endswith("acc") else 1
    left = (sum(k for k, _ in json.loads(layers).values()) for layers in frame.get("layers", ()))
    at = 100 * frame["density"] if x == "density" else list(left)
    late = False
    if reading == "early_stop":
        late = claims.censored(frame["early_stop_step"].astype(float), frame.get("iterations", np.inf))
    values = frame.assign(value=factor * frame[f"{reading}_{quantity}"].astype(float), late=late).assign(**{x: at})
    keys = ["arm", "level", "point", "seed"]
    return values.groupby(keys, sort=False, dropna=False)[[x, "value", "late"]].mean().reset_index()


def summary(frame: "pd.DataFrame", quantity: str, reading: str = "early_stop", x: str = "density") -> "pd.DataFrame":
    """Mean, minimum and maximum over the trials, for each arm and density: what `by_density` draws. late: its mean."""
    trials = per_trial(frame, quantity, reading, x)
    groups = trials.groupby(["arm", "level", "point"], sort=False, dropna=False)
    out = groups.agg(
        **{x: (x, "mean")}, mean=("value", "mean"), min=("value", "min"), max=("value", "max"),
        trials=("seed", "nunique"), late=("late", "mean"),
    )  # fmt: skip
    return out.reset_index().drop(columns="point")


def steps(table: "pd.DataFrame") -> "pd.Series":
    """Means of a `summary` of early stops as a table shows them: "≥ 14,700" where too many came too late to count."""
    import pandas as pd

    shown = [
        f"≥ {mean:,.0f}" if late > claims.MOST_CENSORED else round(mean)
        for mean, late in zip(table["mean"], table["late"], strict=True)
    ]
    return pd.Series(shown, index=table.index, dtype=object)


def value(table: "pd.DataFrame", arm: str, level: int, column: str = "mean") -> float:
    """What a `summary` has for an arm at a level."""
    return table[(table["arm"] == arm) & (table["level"] == level)][column].iloc[0]


def near(levels: Collection[int], wanted: Iterable[int]) -> list[int]:
    """Those of the wanted levels that there are; where that is none but 0, the dense network, the last one as well."""
    found = [level for level in wanted if level in set(levels)]
    return found if any(found) or max(levels) in found else [*found, max(levels)]


def compared(
    frame: "pd.DataFrame",
    arms: Collection[str],
    levels: Collection[int],
    quantities: Iterable[tuple[str, str]] = (("step", "early_stop"), ("test_acc", "early_stop")),
) -> "pd.DataFrame":
    """What a figure draws, as rows of a table: density, then each quantity of each arm, mean over trials.

    levels: besides the dense network, 0. quantities: [(quantity, reading)].
    """
    import pandas as pd

    words = {"step": "early stop", "test_acc": "test, %", "train_acc": "train, %", "val_acc": "validation, %"}
    columns = {}
    for quantity, reading in quantities:
        found = summary(frame, quantity, reading)
        for arm in arms:
            part = found[(found["arm"] == arm) & found["level"].isin([0, *levels])].set_index("level")
            columns.setdefault("weights left, %", part["density"])
            mean = steps(part) if quantity == "step" else part["mean"]
            columns[f"{words[quantity]}: {names.arm(arm)}"] = mean
    return pd.DataFrame(columns).sort_index()


def at_steps(
    frame: "pd.DataFrame",
    quantity: str,
    arms: Iterable[tuple[str, int]],
    shares: Collection[float] = (0.1, 0.3, 1.0),
    factor: float = 100,
) -> "pd.DataFrame":
    """What learning curves draw, as rows of a table: their means over trials after some shares of the training.

    arms: [(arm, level)]. The readings are those that all have, a rewound network from where it starts: a column says
    its iteration.
    """
    import pandas as pd

    parts = {(arm, level): frame[(frame["arm"] == arm) & (frame["level"] == level)] for arm, level in arms}
    common = sorted(set.intersection(*(set(part["step"].iloc[0]) for part in parts.values())))
    picks = [common[max(0, round(share * len(common)) - 1)] for share in shares]
    rows = []
    for (arm, level), part in parts.items():
        curve, steps = factor * np.array(part[quantity].to_list(), dtype=float).mean(0), list(part["step"].iloc[0])
        row = {"network": names.arm(arm) if level else "dense network", "weights left, %": 100 * part["density"].mean()}
        rows.append(row | {f"iteration {step:,}": float(curve[steps.index(step)]) for step in picks})
    return pd.DataFrame(rows)


def by_density(
    ax: "Axes",
    frame: "pd.DataFrame",
    quantity: str,
    reading: str = "early_stop",
    arms: Collection[str] | None = None,
    labels: dict[str, str] | None = None,
    x: str = "density",
) -> "pd.DataFrame":
    """Mean over trials against density, bars from minimum to maximum, the dense network as a grey line.

    arms: default all; labels: {arm: another label than its own}; x: "density", or "weights" for their number.
    """
    table = summary(frame, quantity, reading, x)
    given = set(table["arm"])
    others = [name for name in dict.fromkeys(table["arm"]) if name not in METHODS]
    looks = {name: Look((labels or {}).get(name, name), *OTHERS[i % len(OTHERS)]) for i, name in enumerate(others)}
    style = _Looks(METHODS | looks)  # `|` alone gives a plain dict
    for arm in arms or [name for name in style if name in given]:
        label, colour, marker, line = style[arm]
        label = (labels or {}).get(arm, label)
        part = table[table["arm"] == arm].sort_values(x)
        bars = np.abs(part[["min", "max"]].to_numpy().T - part["mean"].to_numpy())
        ax.errorbar(
            part[x], part["mean"], bars, label=label, color=colour, marker=marker, linestyle=line,
            markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    dense = table[(table["arm"] == "imp") & (table["level"] == 0)]
    if len(dense):
        ax.axhline(dense["mean"].iloc[0], color="0.55", linewidth=1, zorder=0)
    if x == "density":
        density_axis(ax, table["density"], LTH_TICKS)
    else:
        ax.set(xscale="log", xlabel="weights left")
        ax.set_xticks([t for t in (200_000, 50_000, 20_000, 10_000, 5_000) if t >= 0.9 * min(table[x])])
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.minorticks_off()
        ax.invert_xaxis()
    ax.set_ylabel(LABEL[quantity])
    if quantity == "step":
        ax.yaxis.get_major_locator().set_params(integer=True)
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    return table


TICKS = (100, 50, 20, 10, 5, 2, 1)
LTH_TICKS = (100, 51.3, 21.1, 10.8, 7.0, 3.6, 1.9, 1.0)  # where that paper's figures have theirs: rounds of 20 %


def density_axis(ax: "Axes", density: Collection[float], ticks: Sequence[float] = TICKS) -> None:
    """Log axis of densities in %, dense on the left."""
    ax.set_xscale("log")
    ax.set_xlim(115, 0.87 * min(density))
    shown = [t for t in ticks if t >= 0.9 * min(density)]
    if len(shown) < 2:  # 100 alone says nothing of what else is drawn
        shown.append(float(f"{min(density):.3g}"))
    ax.set_xticks(shown, minor=False)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.minorticks_off()
    ax.set_xlabel(DENSITY)


ERROR_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 98.5, 99, 99.5, 99.9)


def error_scale(ax: "Axes", smallest: float = 0.05) -> None:
    """Accuracies in % on the logarithm of the error, so that 97 and 98 % are as far apart as 10 and 40 %.

    To be called when all is drawn: the range stays. smallest: the error in points that smaller ones are drawn at.
    """
    low, high = ax.get_ylim()
    high = 100 - 0.9 * (100 - high + (high - low) / 22)  # a linear axis leaves too wide a margin up there
    near = functools.partial(np.maximum, smallest)
    ax.set_yscale("function", functions=(lambda y: -np.log10(near(100 - y)), lambda z: 100 - 10.0**-z))
    ax.set_ylim(low, min(high, 100 - smallest))
    ax.set_yticks([t for t in ERROR_TICKS if low <= t <= high], minor=False)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def printed(
    ax: "Axes",
    x: ArrayLike,
    y: ArrayLike,
    label: str,
    error: ArrayLike | None = None,
    color: str = "black",
    size: float = 11,
) -> None:
    """The paper's printed points: hollow stars, a read-off error as a bar; never a curve."""
    ax.errorbar(
        x, y, error, label=label, color=color, marker="*", markersize=size, markerfacecolor="white", linestyle="none",
        capsize=3, zorder=5,
    )  # fmt: skip


def by_sparsity(ax: "Axes", table: "pd.DataFrame") -> None:
    """Mean against % of the weights removed, bars from minimum to maximum, the dense network as a grey line.

    table: columns arm ("net/control", a control of METHODS), point (sparsity in %), mean, min, max.
    """
    for arm, part in table.groupby("arm", sort=False):
        label, colour, marker, line = METHODS[arm.split("/")[1]]
        if arm.endswith("/dense"):
            ax.axhline(part["mean"].iloc[0], color=colour, linewidth=1, zorder=0)
            continue
        bars = np.abs(part[["min", "max"]].to_numpy().T - part["mean"].to_numpy())
        ax.errorbar(
            part["point"], part["mean"], bars, label=label, color=colour, marker=marker, linestyle=line, markersize=4,
            linewidth=1.4, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    ax.set(xlabel="sparsity, %", ylabel="test accuracy, %")


def over_training(
    ax: "Axes", frame: "pd.DataFrame", quantity: str, arms: Collection[tuple[str, int]], scale: float = 100
) -> None:
    """Readings against iterations, mean over trials, with a band from minimum to maximum.

    Of many readings the first 60 are drawn, and 120 spread over the training. The axis is linear up to `FIRST`
    iterations and logarithmic from there on, where the training goes far beyond.

    arms: [(arm, level)]; a control has its arm's colour and a line for each level; scale: 100 for accuracies in %, 1
    for losses.
    """
    controls = [pair for pair in arms if pair[0] != "imp"]
    for arm, level in arms:
        part = frame[(frame["arm"] == arm) & (frame["level"] == level)]
        steps, curves = part["step"].iloc[0], scale * np.array(part[quantity].to_list(), dtype=float)
        some = np.unique(np.r_[: min(60, len(steps)), np.linspace(0, len(steps) - 1, 120).astype(int)])
        steps, curves = np.asarray(steps)[some], curves[:, some]
        colour, line = LEVELS.get(level, "#CC79A7"), "-"
        if arm != "imp":
            colour, line = METHODS[arm].colour, ("--", ":", "-.")[controls.index((arm, level)) % 3]
        label = f"{100 * part['density'].mean():.1f} %" + ("" if arm == "imp" else f", {METHODS[arm].label}")
        ax.plot(steps, curves.mean(0), color=colour, linestyle=line, linewidth=1.4, label=label)
        ax.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.13, linewidth=0)
    ax.set_xlabel("training iterations")
    if steps[-1] > 5 * FIRST:
        ax.set_xscale("symlog", linthresh=FIRST)
        ax.set_xticks([t for t in (0, FIRST, 5 * FIRST, 50 * FIRST) if t <= steps[-1]])
        ax.minorticks_off()
    else:
        ax.locator_params(axis="x", nbins=4)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")


def outline(ax: "Axes", counts: ArrayLike, edges: ArrayLike, **style: Any) -> None:
    """A histogram as an outline whose area is 1."""
    ax.stairs(np.asarray(counts) / max(1, np.sum(counts)) / np.diff(edges), edges, linewidth=1.3, **style)


def missing(text: str) -> None:
    """In place of a figure: the line that says which runs are missing and how to get them."""
    _, ax = plt.subplots(figsize=(WIDTH, 0.8))
    ax.axis("off")
    ax.text(0, 0.5, "\n".join(textwrap.wrap(text, 90)), fontsize=9.5, color="#737373", va="center")


def legend(fig: "Figure", axes: Iterable["Axes"]) -> None:
    """One legend above the panels, each label once."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    split = {n: np.array_split([len(label) + 8 for label in entries], n) for n in range(min(4, len(entries)), 0, -1)}
    columns = next((n for n, parts in split.items() if sum(map(max, parts)) <= 100), 1)  # as wide as the figure
    fig.legend(entries.values(), entries, loc="outside upper center", ncols=columns)


def name_ends(ax: "Axes", gap: float = 11) -> None:
    """Each line's label at the right edge, at the height where the line ends and in its colour, in place of a legend.

    gap: points between two labels at least. Call it when limits and scales are set.
    """
    lines = []
    for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
        line = getattr(handle, "lines", [handle])[0]
        points = ax.transData.transform(line.get_xydata())
        _, y = points[np.nanargmax(points[:, 0])] * 72 / ax.figure.dpi
        lines.append((y, line, label))
    lines.sort(key=lambda entry: entry[0])
    for (y, line, label), height in zip(lines, _apart([y for y, *_ in lines], gap), strict=True):
        at = ax.transData.inverted().transform((0, y * ax.figure.dpi / 72))[1]
        ax.annotate(
            label, (1, at), (5, height - y), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
        )  # fmt: skip


def _apart(heights, gap):
    """Sorted heights, moved apart until neighbours are `gap` apart, each cluster about its own middle."""
    clusters = []
    for y in heights:
        clusters.append([y])
        while len(clusters) > 1 and _low(clusters[-1], gap) < _low(clusters[-2], gap) + gap * len(clusters[-2]):
            last = clusters.pop()
            clusters[-1] += last
    return [_low(cluster, gap) + gap * i for cluster in clusters for i in range(len(cluster))]


def _low(cluster, gap):
    """Height of the lowest of a cluster's labels, when they stand `gap` apart about their mean."""
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def badge(fig: "Figure", text: str) -> None:
    """What the figure's numbers rest on: one line, which stands below the caption in the book."""
    fig.badge = text


def panels(n: int, height: float = 2.9, width: float | None = None, columns: int = 2) -> tuple["Figure", np.ndarray]:
    """n axes as an array, `columns` in a row at most; where there are two, the figure is as wide as the book's column.

    height: of a row, in inches; width: of one panel, at most half of the column where there are two.
    """
    columns = min(n, columns)
    width = min(width or 5.4, WIDTH / columns)
    fig, axes = plt.subplots(
        -(-n // columns), columns, figsize=(width * columns, height * -(-n // columns)), constrained_layout=True
    )
    axes = np.atleast_1d(axes).flatten()
    for ax in axes[n:]:
        ax.set_axis_off()
    return fig, axes[:n]
