"""Figures: ours with error bars, the paper's printed points beside them, and the badge that says what they rest on.

Every function takes the frame of `chapter.Chapter.frame`; accuracies are drawn in %, densities in % on a
log axis that falls from left to right, as in the paper.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

# Okabe–Ito colours, each with its own marker and line, so that colour never carries the meaning alone.
ARMS = {
    "imp": ("winning ticket (IMP)", "#0072B2", "o", "-"),
    "reinit": ("random reinit", "#D55E00", "s", "--"),
    "oneshot": ("one-shot ticket", "#009E73", "^", "-."),
    "oneshot-reinit": ("one-shot, reinit", "#E69F00", "v", ":"),
    "random": ("random sparse network", "#CC79A7", "D", "--"),
}
# GraSP's arms, pruned at initialisation or as tickets.
PRUNED = {
    "dense": ("dense", "0.45", "x", "-"),
    "grasp": ("GraSP", "#D55E00", "o", "-"),
    "snip": ("SNIP", "#0072B2", "s", "--"),
    "random": ("random", "#CC79A7", "D", ":"),
    "lt": ("ticket, original values", "#009E73", "^", "-."),
    "lt-rewind": ("ticket, rewound", "#E69F00", "v", "-."),
}
OTHERS = [  # of any other arm
    *(("#009E73", "^", "-."), ("#56B4E9", "v", ":"), ("#E69F00", "X", "--")),
    *(("#CC79A7", "D", "-."), ("black", "P", ":")),
]
# Learning curves: a level has its colour in every panel, a control its level's colour and its arm's line.
LEVELS = {0: "black", 3: "#56B4E9", 7: "#0072B2", 12: "#009E73", 15: "#E69F00", 18: "#D55E00"}
LABEL = {
    "step": "early-stop iteration",
    "test_acc": "test accuracy, %",
    "val_acc": "validation accuracy, %",
    "train_acc": "train accuracy, %",
    "val_loss": "validation loss",
}
DENSITY = "weights remaining (density), %"


def style():
    """The book's look; call it once in a notebook."""
    sns.set_theme(style="ticks", font_scale=0.9, rc={"axes.grid": True, "grid.alpha": 0.35, "legend.frameon": False})
    plt.rcParams |= {"figure.dpi": 110, "savefig.bbox": "tight", "figure.facecolor": "white"}


def per_trial(frame, quantity, reading="early_stop", x="density"):
    """One value for each arm, point and trial (repeated draws averaged), and the density in % or the weights left.

    quantity: "step", "val_loss", or an accuracy ("test_acc", "train_acc", "val_acc"), returned in %.
    x: "density", or "weights" for their number.
    """
    factor = 100 if quantity.endswith("acc") else 1
    left = (sum(k for k, _ in json.loads(layers).values()) for layers in frame.get("layers", ()))
    at = 100 * frame["density"] if x == "density" else list(left)
    values = frame.assign(value=factor * frame[f"{reading}_{quantity}"].astype(float)).assign(**{x: at})
    keys = ["arm", "level", "point", "seed"]
    return values.groupby(keys, sort=False, dropna=False)[[x, "value"]].mean().reset_index()


def summary(frame, quantity, reading="early_stop", x="density"):
    """Mean, minimum and maximum over the trials, for each arm and density: what `by_density` draws."""
    trials = per_trial(frame, quantity, reading, x)
    groups = trials.groupby(["arm", "level", "point"], sort=False, dropna=False)
    out = groups.agg(
        **{x: (x, "mean")}, mean=("value", "mean"), min=("value", "min"), max=("value", "max"),
        trials=("seed", "nunique"),
    )  # fmt: skip
    return out.reset_index().drop(columns="point")


def by_density(ax, frame, quantity, reading="early_stop", arms=None, labels=None, x="density"):
    """Mean over trials against density, bars from minimum to maximum, the dense network as a grey line.

    arms: default all; labels: of those that ARMS does not have; x: "density", or "weights" for their number.
    """
    table = summary(frame, quantity, reading, x)
    given = set(table["arm"])
    others = [name for name in dict.fromkeys(table["arm"]) if name not in ARMS]
    style = ARMS | {name: ((labels or {}).get(name, name), *OTHERS[i % len(OTHERS)]) for i, name in enumerate(others)}
    for arm in arms or [name for name in style if name in given]:
        label, colour, marker, line = style[arm]
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
        density_axis(ax, table["density"])
    else:
        ax.set(xscale="log", xlabel="weights left")
        ax.set_xticks([t for t in (200_000, 50_000, 20_000, 10_000, 5_000) if t >= 0.9 * min(table[x])])
        ax.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
        ax.minorticks_off()
        ax.invert_xaxis()
    ax.set_ylabel(LABEL[quantity])
    return table


def density_axis(ax, density):
    """Log axis of densities in %, dense on the left."""
    ticks = [100, 51.3, 21.1, 10.8, 7.0, 3.6, 1.9, 1.0]
    ax.set_xscale("log")
    ax.set_xlim(115, 0.87 * min(density))
    ax.set_xticks([t for t in ticks if t >= 0.9 * min(density)], minor=False)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.minorticks_off()
    ax.set_xlabel(DENSITY)


def printed(ax, x, y, label, error=None, color="black", size=11):
    """The paper's printed points: hollow stars, a read-off error as a bar; never a curve."""
    ax.errorbar(
        x, y, error, label=label, color=color, marker="*", markersize=size, markerfacecolor="white", linestyle="none",
        capsize=3, zorder=5,
    )  # fmt: skip


def by_sparsity(ax, table):
    """Mean against % of the weights removed, bars from minimum to maximum, the dense network as a grey line.

    table: columns arm ("net/control" of PRUNED), point (sparsity in %), mean, min, max.
    """
    for arm, part in table.groupby("arm", sort=False):
        label, colour, marker, line = PRUNED[arm.split("/")[1]]
        if arm.endswith("/dense"):
            ax.axhline(part["mean"].iloc[0], color=colour, linewidth=1, zorder=0)
            continue
        bars = np.abs(part[["min", "max"]].to_numpy().T - part["mean"].to_numpy())
        ax.errorbar(
            part["point"], part["mean"], bars, label=label, color=colour, marker=marker, linestyle=line, markersize=4,
            linewidth=1.4, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    ax.set(xlabel="sparsity, %", ylabel="test accuracy, %")


def over_training(ax, frame, quantity, arms, scale=100):
    """Readings against iterations, mean over trials, with a band from minimum to maximum.

    arms: [(arm, level)]; scale: 100 for accuracies in %, 1 for losses.
    """
    for arm, level in arms:
        part = frame[(frame["arm"] == arm) & (frame["level"] == level)]
        curves = scale * np.array(part[quantity].to_list(), dtype=float)
        colour, line = LEVELS.get(level, "#CC79A7"), ARMS[arm][3]
        label = f"{100 * part['density'].mean():.1f}" + ("" if arm == "imp" else f" {ARMS[arm][0]}")
        ax.plot(part["step"].iloc[0], curves.mean(0), color=colour, linestyle=line, linewidth=1.4, label=label)
        ax.fill_between(part["step"].iloc[0], curves.min(0), curves.max(0), color=colour, alpha=0.13, linewidth=0)
    ax.set_xlabel("training iterations")
    ax.locator_params(axis="x", nbins=3)  # numbers of five digits
    ax.legend(title="density, %", fontsize=7.5, title_fontsize=8)


def outline(ax, counts, edges, **style):
    """A histogram as an outline whose area is 1."""
    ax.stairs(np.asarray(counts) / max(1, np.sum(counts)) / np.diff(edges), edges, linewidth=1.3, **style)


def missing(text):
    """In place of a figure: the line that says which runs are missing and how to get them."""
    import textwrap

    _, ax = plt.subplots(figsize=(7, 0.8))
    ax.axis("off")
    ax.text(0, 0.5, "\n".join(textwrap.wrap(text, 105)), fontsize=9, color="0.35", va="center")


def legend(fig, axes):
    """One legend above the panels, each label once."""
    entries = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries, loc="outside upper center", ncols=len(entries), fontsize=8)


def badge(fig, text):
    """The line below a figure that says what its numbers rest on, wrapped to the figure's width."""
    import textwrap

    width = int(fig.get_size_inches()[0] * 19)
    fig.text(0.01, -0.02, "\n".join(textwrap.wrap(text, width)), fontsize=7.5, color="0.35", va="top")


def panels(n, height=3.4, width=4.3):
    """A row of n axes."""
    fig, axes = plt.subplots(1, n, figsize=(width * n, height), constrained_layout=True)
    return fig, np.atleast_1d(axes)
