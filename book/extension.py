"""Sphinx extension of this book: plain docstrings, and figures borrowed from a notebook.

Docstrings are plain text with lists, sections and `code`: |w|, m*θ, x_ and net@0.1 mean what they look like, where
reStructuredText would see a substitution, emphasis and links. Lines that begin with an argument's name and a colon
describe that argument, below "Args:" or not. An indented block with columns is a table to be kept as it is.

```{notebook-figure} notebooks/lth.ipynb fig-name
Caption.
```

shows the picture that the cell named `fig-name` (`mystnb.figure.name`) left in the notebook, with the alt text it has
there, on another page.
"""

import inspect
import itertools
import re
from base64 import b64decode
from pathlib import Path

import nbformat
from sphinx.directives.patches import Figure


def escape(line: str) -> str:
    """The line with a backslash before each mark outside backticks that reStructuredText would act on."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = [re.sub(r"[|@]|\*(?!\s)|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def listed(lines: list[str], arguments: set[str]) -> list[str]:
    """The lines with each unindented run of "name: description" made an "Args:" section."""
    found, inside = [], False
    for line in lines:
        head = re.match(r"(\w+(?:, \w+)*): ", line)
        if head and arguments.issuperset(head[1].split(", ")):
            found += [f"    {line}"] if inside else ["", "Args:", f"    {line}"]
            inside = True
        elif inside and line.strip():
            found.append(f"        {line.strip()}")
        else:
            found.append(line)
            inside = False
    return found


def columns(lines: list[str]) -> list[str]:
    """The lines with `::` before each indented block, after a blank line, whose first line has columns."""
    found = []
    for before, line in itertools.pairwise(["", *lines]):
        if not before.strip() and re.match(r" {4}.*\S {2,}\S", line):
            found += ["::", ""]
        found.append(line)
    return found


def plain(app, what, name, obj, options, lines):
    lines[:] = columns(lines)
    literal = False
    for i, line in enumerate(lines):
        literal = line == "::" or (literal and line[:1] in ("", " "))
        if not literal and not line.lstrip().startswith((">>>", "...")):
            lines[i] = escape(line)
    if what == "property":  # a first colon would end the name of a type
        lines[0] = lines[0].replace(": ", " – ")
    if what in ("class", "function", "method"):
        lines[:] = listed(lines, set(inspect.signature(obj).parameters))


class NotebookFigure(Figure):
    """The picture of a notebook's cell, found by its figure name; options and caption as in `figure`."""

    required_arguments = 2

    def run(self):
        path, name = self.arguments
        env = self.state.document.settings.env
        source = Path(env.srcdir)
        env.note_dependency(str(source / path))
        cells = nbformat.read(source / path, as_version=4).cells
        named = [c for c in cells if c.metadata.get("mystnb", {}).get("figure", {}).get("name") == name]
        pictures = [o.data["image/png"] for c in named for o in c.outputs if "image/png" in o.get("data", {})]
        if len(pictures) != 1:
            raise self.error(f"{path} holds {len(pictures)} pictures named {name}, not one")
        copy = Path(env.app.outdir).parent / "figures" / f"{name}.png"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(b64decode(pictures[0]))
        self.arguments = ["/" + copy.relative_to(source).as_posix()]
        self.options["alt"] = named[0].metadata.mystnb.image.alt
        return super().run()


def setup(app):
    app.add_directive("notebook-figure", NotebookFigure)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon writes fields
    return {"parallel_read_safe": True}
