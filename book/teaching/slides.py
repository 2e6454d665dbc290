"""Slides out of the chapters' figures: `python book/teaching/slides.py`, which `make labs` runs.

For every chapter of `notebooks/` that has figures a deck: its question, what one can do afterwards, and one slide for
each figure of the main text, with its badge and its caption, as committed. The decks open from
disk without a network; `?print-pdf` behind the address prints them.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = HERE.parent / "_build" / "teaching" / "slides"
CONFIGURATION = """
project, html_title = "Slides", "Slides"
extensions = ["myst_parser", "sphinx_revealjs", "sphinx-mathjax-offline"]
myst_enable_extensions = ["amsmath", "dollarmath"]
revealjs_style_theme = "white"
revealjs_script_conf = {"hash": True, "width": 1200, "height": 760}
revealjs_static_path, revealjs_css_files = ["."], ["slides.css"]
suppress_warnings = ["myst.header"]
"""
STYLE = """
:root { --r-main-font-size: 28px; --r-heading-text-transform: none; --r-heading1-size: 2em; --r-heading2-size: 1.4em; }
.reveal .slides { text-align: left; }
.reveal figure { margin: 0; text-align: center; }
.reveal figcaption { font-size: 0.65em; line-height: 1.3; }
"""
NOT_SHOWN = ("own", "performance", "scorecard")


def chapters() -> list[Path]:
    """The notebooks that a deck is made of."""
    return [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem not in NOT_SHOWN]


def pictures(nb):
    """(heading, name, caption, alt, svg) of the figures of the main text, in order."""
    heading = ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            if found := re.findall(r"^##? (.+)$", cell.source, flags=re.M):
                heading = found[-1]
            continue
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        svg = [o.data["image/svg+xml"] for o in cell.outputs if "image/svg+xml" in o.get("data", {})]
        if figure and svg and "in-fold" not in cell.metadata.get("tags", []):
            yield heading, figure["name"], figure["caption"], cell.metadata.mystnb.image.alt, "".join(svg[0])


def plain(text: str) -> str:
    """Markdown of a chapter without what only the book resolves: citations, and links to other pages."""
    text = re.sub(r" ?\{cite:p\}`[^`]*`", "", text)
    text = re.sub(r"\{cite:t\}`[^`]*`", "The authors", text)
    return re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)


def deck(nb, to: Path) -> str:
    """The deck in Markdown; the pictures are written beside it."""
    opening = plain(nb.cells[0].source)
    title, _, question = opening.partition("\n")
    goals = next((c.source for c in nb.cells if c.source.startswith("After this chapter you can")), "")
    out = [title, question.strip().replace("**Predict first.**", "## Predict first\n\n")]
    if goals:
        out += [
            "## After this chapter you can",
            plain(re.sub(r"\n\n(?!\d\.).*", "", goals, flags=re.S)).partition("\n")[2],
        ]
    for heading, name, caption, alt, svg in pictures(nb):
        (to / f"{name}.svg").write_text(svg, encoding="utf-8")
        out += [
            f"## {plain(heading)}",
            f"```{{figure}} {name}.svg\n:alt: {alt}\n:height: 520px\n\n{plain(caption)}\n```",
        ]
    return "\n\n".join(out) + "\n"


def build(to: Path = BUILD) -> list[Path]:
    """Write the decks and make them HTML. Raises SystemExit when Sphinx warns."""
    shutil.rmtree(to, ignore_errors=True)
    source = to / "source"
    source.mkdir(parents=True)
    names = []
    for path in chapters():
        nb = nbformat.read(path, as_version=4)
        if any(pictures(nb)):
            (source / f"{path.stem}.md").write_text(deck(nb, source), encoding="utf-8")
            names.append(path.stem)
    listed = "\n".join(names)
    (source / "index.md").write_text(f"# Slides\n\n```{{toctree}}\n{listed}\n```\n", encoding="utf-8")
    (source / "conf.py").write_text(CONFIGURATION, encoding="utf-8")
    (source / "slides.css").write_text(STYLE, encoding="utf-8")
    line = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "revealjs", str(source), str(to / "html")]
    if subprocess.run(line).returncode:
        sys.exit("The slides have warnings.")
    return [to / "html" / f"{name}.html" for name in names]


if __name__ == "__main__":
    for made in build():
        print(made)
