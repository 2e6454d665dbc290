"""Sphinx extension of this book: what makes a page out of a notebook.

Done here for every chapter, so that none does it by itself:

* Cells tagged `hide-input` or `hide-cell` show no code until the page's switch is on, and their code is not searched.
  A cell tagged `hide-cell` is a fold titled by its `code_prompt_show`; cells after it tagged `in-fold` belong to it.
* A figure is set into the page as SVG, in the page's colours, with its badge, its claims and a link to full size.
* A bold line above a table is its caption. Names of the glossary are links where a chapter uses them first.
* `scorecard.ipynb#claim` in Markdown that code made leads to the claim.

```{notebook-output} notebooks/scorecard.ipynb name
```

shows what the cell named `name` (its metadata's `lottery.name`) left in a notebook on another page.
"""

import csv
import html
import json
import os
import re
from pathlib import Path

import nbformat
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import relative_uri

from lottery import __version__, files

HIDDEN = {"hide-input", "hide-cell"}
CLAIM = re.compile(r"\]\((?:[\w./]*/)?scorecard\.ipynb#([\w-]+)\)")
SCORECARD = "notebooks/scorecard"


class Html(nodes.General, nodes.Element):
    """HTML that search does not read."""


# Notebooks, before they are parsed ------------------------------------------------------------------------------------


def prepare(app, docname, source):
    """Tags of hidden code, and links to claims, in a notebook's JSON."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if found := HIDDEN.intersection(tags):
            fold = ["fold"] if "hide-cell" in found else []
            cell["metadata"]["tags"] = [tag for tag in tags if tag not in HIDDEN] + ["code-hidden", *fold]
        for output in cell.get("outputs", ()):
            if text := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = CLAIM.sub(r"](claim:\1)", "".join(text))
    source[0] = json.dumps(notebook)


# The tree, when it is known where it is shown -------------------------------------------------------------------------


class Page(SphinxPostTransform):
    """What the module's text says, but the links."""

    default_priority = 230
    formats = ("html",)

    def run(self, **kwargs):
        self.figures = 0
        for number, table in enumerate(list(self.document.findall(nodes.table)), start=1):
            caption(table)
            table["ids"] = table["ids"] or [f"table-{number}"]  # Sphinx wants one where there is a caption
        for figure in list(self.document.findall(nodes.figure)):
            self.figure(figure)
        cells = [c for c in self.document.findall(nodes.container) if c.get("nb_element") == "cell_code"]
        for cell in cells:
            if "tag_code-hidden" in cell["classes"]:
                self.hide(cell)
        for cell in cells:
            if "tag_fold" in cell["classes"]:
                fold(cell)
        if self.env.docname.startswith("notebooks/"):
            self.link_terms()

    def hide(self, cell):
        """The cell's code as HTML that waits for the switch."""
        for source in [c for c in cell.children if c.get("nb_element") == "cell_code_source"]:
            text = source.astext()
            block = self.app.builder.highlighter.highlight_block(text, "python")
            code = f'<div class="cell_input code"><div class="highlight-python notranslate">{block}</div></div>'
            source.replace_self(Html(html=code))

    def figure(self, figure):
        """SVG into the page, and the lines below the caption."""
        name = (figure["names"] or figure["ids"] or ["figure"])[0]
        lines, full = [], ""
        for image in list(figure.findall(nodes.image)):
            if not image["uri"].endswith(".svg"):
                continue
            path = Path(self.env.srcdir) / image["uri"]
            text = path.read_text(encoding="utf-8")
            file = Path(self.app.outdir) / "_images" / f"{name}.svg"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            picture, badge = inline(text, image.get("alt", ""), f"{name}-{self.figures}")
            self.figures += 1
            image.replace_self(Html(html=picture))
            target = self.app.builder.get_target_uri(self.env.docname)
            uri = relative_uri(target, f"_images/{name}.svg")
            lines += [badge] if badge else []
            full = f'<a class="full-size" href="{uri}">full size</a>'
        if link := self.claims(name):
            lines.append(link)
        if lines or full:
            more = f'<span class="on-screen">{" · " if lines else ""}{full}</span>' if full else ""
            figure.append(Html(html=f'<p class="badge">{" · ".join(lines)}{more}</p>'))

    def claims(self, name):
        """A link to the scorecard's rows of the item that a figure shows."""
        match = re.fullmatch(r"fig-(\w+?)-(table-)?(\d+)(?:-.*)?", name)
        if not match:
            return None
        paper, item = match[1], f"{'Table' if match[2] else 'Figure'} {match[3]}"
        n = counted(Path(self.env.srcdir)).get((paper, item), 0)
        if not n or SCORECARD not in self.env.found_docs:
            return None
        here, there = (self.app.builder.get_target_uri(d) for d in (self.env.docname, SCORECARD))
        anchor = f"{paper}-{item}".lower().replace(" ", "-")
        return f'<a href="{relative_uri(here, there)}#{anchor}">{n} claim{"s" * (n > 1)} about {item}</a>'

    def link_terms(self):
        """Each name of the glossary is a link where the page's text uses it first, an abbreviation in capitals."""
        objects = self.env.domaindata["std"]["objects"]
        terms = {term: at for (kind, term), at in objects.items() if kind == "term"}
        if not terms:
            return
        here = self.app.builder.get_target_uri(self.env.docname)
        names = sorted(terms, key=len, reverse=True)
        pattern = re.compile(r"(?<![\w-])(" + "|".join(map(re.escape, names)) + r")(s?)(?![\w-])", re.IGNORECASE)
        lower, seen = {term.lower(): term for term in names}, set()
        closed = (nodes.reference, nodes.title, nodes.literal, nodes.caption, nodes.literal_block, nodes.math)
        closed += (nodes.table, nodes.term)
        for text in list(self.document.findall(nodes.Text)):
            if any(isinstance(parent, closed) for parent in parents(text)):
                continue
            if not any(isinstance(parent, nodes.paragraph | nodes.list_item) for parent in parents(text)):
                continue
            parts, at = [], 0
            for match in pattern.finditer(text.astext()):
                term = lower[match[1].lower()]
                docname, anchor = terms[term]
                if anchor in seen or (term.isupper() and match[1] != term):  # the test set is no SET
                    continue
                seen.add(anchor)
                uri = f"{relative_uri(here, self.app.builder.get_target_uri(docname))}#{anchor}"
                parts += [nodes.Text(text[at : match.start()])]
                parts += [nodes.reference("", match[0], refuri=uri, internal=True, classes=["term"])]
                at = match.end()
            if parts:
                text.parent.replace(text, [*parts, nodes.Text(text[at:])])


def parents(node):
    while node.parent is not None:
        node = node.parent
        yield node


def caption(table):
    """A paragraph of nothing but bold text before a table becomes its caption."""
    before = table.parent.index(table) - 1
    if before < 0 or isinstance(table[0], nodes.title):
        return
    line = table.parent[before]
    parts = [part for part in line.children if part.astext()]
    if isinstance(line, nodes.paragraph) and len(parts) == 1 and isinstance(parts[0], nodes.strong):
        table.insert(0, nodes.title("", "", *parts[0].children))
        table.parent.remove(line)


def fold(cell):
    """A cell and those after it that are tagged `in-fold`, folded below a title: outputs first, code last."""
    parent, at = cell.parent, cell.parent.index(cell)
    inside = [cell]
    for node in parent[at + 1 :]:
        if "tag_in-fold" not in node.get("classes", ()):
            break
        inside.append(node)
    settings = cell["cell_metadata"].get("mystnb", {})
    title = html.escape(settings.get("code_prompt_show", "Show"))
    for node in inside:
        parent.remove(node)
        hidden = [child for child in node.children if isinstance(child, Html)]
        for child in hidden:
            node.remove(child)
            node.append(child)
    box = nodes.container(classes=["fold-body"])
    box.extend(inside)
    parent.insert(at, [Html(html=f"<details class='fold'><summary>{title}</summary>"), box, Html(html="</details>")])


def inline(text, alt, prefix):
    """(SVG for the page, the badge that was below the picture): ids that no other figure has, no XML namespaces."""
    badge = re.search(r'<g class="badge".*?</g>', text, re.S)
    said = " ".join(re.findall(r"<text[^>]*>(.*?)</text>", badge[0])) if badge else ""
    text = text.replace(badge[0], "") if badge else text
    if height := re.search(r'data-height="([\d.]+)"', text):
        head, rest = text.split(">", 1)
        head = re.sub(r' height="[\d.]+pt"', f' height="{height[1]}pt"', head)
        head = re.sub(r'viewBox="0 0 ([\d.]+) [\d.]+"', rf'viewBox="0 0 \1 {height[1]}"', head)
        text = f"{head}>{rest}"
    text = text.replace("xlink:href=", "href=")
    for old in sorted(set(re.findall(r' id="([^"]+)"', text)), key=len, reverse=True):
        text = re.sub(rf'( id="|href="#|url\(#){re.escape(old)}(["\)])', rf"\g<1>{prefix}-{old}\2", text)
    head, rest = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (xmlns(:xlink)?|data-height|style)="[^"]*"', "", head)
    return f'{head} class="plot" role="img" aria-label="{html.escape(alt)}">{rest}', said


def counted(root, found={}):  # noqa: B006, one build, one answer
    """{(paper, item): number of claims}."""
    for path in () if found else (root / "results/reported").glob("*_claims.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = (path.name.removesuffix("_claims.csv"), row["item"])
                found[key] = found.get(key, 0) + bool(row["kind"])
    return found


def to_claims(app, doctree, docname):
    """`claim:id` becomes a link to the scorecard's row."""
    builder = app.builder
    for node in list(doctree.findall(nodes.reference)):
        if (uri := node.get("refuri", "")).startswith("claim:"):
            there = relative_uri(builder.get_target_uri(docname), builder.get_target_uri(SCORECARD))
            node["refuri"], node["internal"] = f"{there}#{uri.removeprefix('claim:')}", True


class NotebookOutput(SphinxDirective):
    """The output of a notebook's cell, found by its name."""

    required_arguments = 2

    def run(self):
        path, name = self.arguments
        source = Path(self.env.srcdir) / path
        self.env.note_dependency(str(source))
        cells = nbformat.read(source, as_version=4).cells
        found = [c for c in cells if c.metadata.get("lottery", {}).get("name") == name]
        if len(found) != 1:
            raise self.error(f"{path} holds {len(found)} cells named {name}, not one")
        here = self.env.app.builder.get_target_uri(self.env.docname)
        there = self.env.app.builder.get_target_uri(path.removesuffix(".ipynb"))
        result = []
        for output in found[0].outputs:
            data = output.get("data", {})
            if "text/markdown" in data:
                text = CLAIM.sub(r"](claim:\1)", data["text/markdown"])
                box = nodes.container(classes=["borrowed"])
                self.state.nested_parse(StringList(text.splitlines(), source=path), self.content_offset, box)
                result.append(box)
            elif "text/html" in data:
                result.append(Html(html=data["text/html"].replace('href="#', f'href="{relative_uri(here, there)}#')))
        return result


# Around the page ------------------------------------------------------------------------------------------------------


def settle(app, config):
    """Buttons that need the repository's address, where one is given; version and date in the footer."""
    options = config.html_theme_options
    address = os.environ.get("BOOK_REPOSITORY") or config.lottery_repository
    if address:
        options |= {"repository_url": address.rstrip("/"), "repository_branch": "main", "path_to_docs": ""}
        options |= {"use_repository_button": True, "use_issues_button": True}
        options["launch_buttons"] = {
            "notebook_interface": "classic",
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
        }
    date = files.git(app.srcdir, "log", "-1", "--format=%cs")  # None in a zip in a container
    options["extra_footer"] = f"<p>Version {__version__}" + (f", {date}" if date else "") + "</p>"
    config.lottery_base = (os.environ.get("BOOK_ADDRESS") or config.html_baseurl).rstrip("/")


EARLY = """document.documentElement.classList.add("js");
if (localStorage.getItem("show-code:" + location.pathname)) document.documentElement.classList.add("show-code");"""


def around(app, pagename, templatename, context, doctree):
    """No scripts that a page has no use for; the lines that search engines and social networks read."""
    files = context.get("script_files", [])
    files[:] = [f for f in files if "thebe" not in f"{f.filename} {f.attributes}".lower()]
    if doctree is not None and 'class="widget"' in "".join(node["html"] for node in doctree.findall(Html)) + "".join(
        node.astext() for node in doctree.findall(nodes.raw)
    ):
        app.add_js_file("widgets.js", defer="defer")
    title = html.escape(re.sub(r"<.*?>", "", context.get("title", "")))
    base = app.config.lottery_base
    tags = f'<meta property="og:title" content="{title}" /><meta property="og:type" content="article" />'
    if doctree is not None and (first := next(iter(doctree.findall(nodes.paragraph)), None)):
        said = html.escape(" ".join(first.astext().split())[:200])
        tags += f'<meta name="description" content="{said}" /><meta property="og:description" content="{said}" />'
    if base:
        page = app.builder.get_target_uri(pagename)
        tags += f'<link rel="canonical" href="{base}/{page}" /><meta property="og:url" content="{base}/{page}" />'
        tags += f'<meta property="og:image" content="{base}/_static/card.png" />'
        tags += '<meta name="twitter:card" content="summary_large_image" />'
    context["metatags"] = context.get("metatags", "") + tags


UNUSED = re.compile(
    r'<link href="[^"]*fontawesome[^"]*" rel="stylesheet" />|<link rel="preload" as="font"[^>]*fontawesome[^>]*>|'
    r'<script src="[^"]*fontawesome[^"]*"></script>|<script type="text/x-thebe-config">.*?</script>|'
    r"<script>kernelName = .*?</script>",
    re.S,
)


MENDED = (  # what the theme leaves unnamed or named otherwise than it reads, and what would be told twice
    (r"<summary>(\s*<span class=\"toctree-toggle)", r'<summary aria-label="pages below">\1'),
    (r'(<button[^>]*search-button-field[^>]*) aria-label="Search"', r"\1"),
    (r'localStorage.getItem\("(mode|theme)"\) \|\| ""', r'localStorage.getItem("\1") || "auto"'),
    (r'data-default-mode=""', 'data-default-mode="auto"'),
    (r'<div class="pst-scrollable-table-container">', '<div class="pst-scrollable-table-container" tabindex="0">'),
    (r' id="(exercise|solution)-content"', ""),
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
)


def card(path, title):
    """The picture that social networks show: the book's name and what it does."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    fig = Figure(figsize=(12, 6.3), facecolor="white")
    fig.text(0.06, 0.62, title, fontsize=46, weight="bold")
    fig.text(0.06, 0.44, "Four papers on sparse networks, repeated figure by figure:", fontsize=24)
    fig.text(0.06, 0.34, "what was claimed, what came out, how sure we are.", fontsize=24)
    for i, colour in enumerate(("#0072B2", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")):
        fig.add_artist(Rectangle((0.06 + 0.06 * i, 0.14), 0.04, 0.076, color=colour))
    fig.savefig(path, dpi=100, metadata={"Software": None})


def finish(app, error):
    """Pages without what they do not use, and the site's map where its address is known."""
    if error or app.builder.format != "html":
        return
    out, pages = Path(app.outdir), []
    for path in sorted(out.rglob("*.html")):
        if "_static" in path.parts:
            continue
        text = UNUSED.sub("", path.read_text(encoding="utf-8"))
        for old, new in MENDED:
            text = re.sub(old, new, text)
        path.write_text(text, encoding="utf-8")
        pages.append(path.relative_to(out).as_posix())
    vendor = out / "_static/vendor/fontawesome"
    for path in sorted(vendor.rglob("*"), reverse=True) if vendor.exists() else ():
        path.unlink() if path.is_file() else path.rmdir()
    if base := app.config.lottery_base:
        card(out / "_static/card.png", app.config.project)
        listed = "".join(f"<url><loc>{base}/{page}</loc></url>" for page in pages)
        head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
        (out / "sitemap.xml").write_text(f"{head}{listed}</urlset>\n", encoding="utf-8")


def setup(app):
    def skip(translator, node):
        raise nodes.SkipNode

    app.add_node(Html, html=(lambda self, node: self.body.append(node["html"]), lambda self, node: None),
                 latex=(skip, None), text=(skip, None), man=(skip, None), texinfo=(skip, None))  # fmt: skip
    app.add_config_value("lottery_repository", "", "html")
    app.add_config_value("lottery_base", "", "html")
    app.add_directive("notebook-output", NotebookOutput)
    app.add_post_transform(Page)
    app.connect("config-inited", settle, priority=900)
    app.connect("source-read", prepare)
    app.connect("doctree-resolved", to_claims)
    app.connect("html-page-context", around, priority=900)
    app.connect("build-finished", finish)
    app.add_js_file(None, body=EARLY, priority=1)
    app.add_js_file("book.js", priority=600, defer="defer")
    return {"parallel_read_safe": True}
