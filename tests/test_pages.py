"""book/pages.py: what becomes of a notebook on its way to a page; and the pictures to move."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

import lottery
from lottery import widgets

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("sphinx")
spec = importlib.util.spec_from_file_location("pages", ROOT / "book/pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


def cell(tags, **data):
    return {"cell_type": "code", "metadata": {"tags": tags}, "outputs": [{"data": data}], "source": []}


def test_hidden_code_and_links_to_claims_are_prepared():
    notebook = {"cells": [cell(["hide-input", "x"]), cell(["hide-cell"]), cell([])]}
    markdown = ["see [a claim](scorecard.ipynb#lth-a-3-6), ", "[the page](scorecard.ipynb)"]
    notebook["cells"][2] = cell([], **{"text/markdown": markdown})
    source = [json.dumps(notebook)]
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda name: f"{name}.ipynb"))
    pages.prepare(app, "notebooks/lth", source)
    first, second, third = json.loads(source[0])["cells"]
    assert first["metadata"]["tags"] == ["x", "code-hidden"]
    assert second["metadata"]["tags"] == ["code-hidden", "fold"]
    said = "see [a claim](claim:lth-a-3-6), [the page](scorecard.ipynb)"
    assert third["outputs"][0]["data"]["text/markdown"] == said


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="10pt" height="30pt" viewBox="0 0 10 30" data-height="20" '
    'style="color: black"><defs><path id="a" d="M0 0"/><path id="ab" d="M0 0"/></defs><use href="#a"/><use href="#ab"/>'
    '<g clip-path="url(#a)"/><g class="badge"><text>5 trials</text><text>of 5</text></g></svg>'
)


def test_a_picture_in_the_page_has_ids_of_its_own_and_its_badge_below():
    text, badge = pages.inline(SVG, 'A "line".', "fig-1")
    assert badge == "5 trials of 5"
    root = ElementTree.fromstring(text)
    assert root.get("viewBox") == "0 0 10 20"
    assert root.get("height") == "20pt"
    assert root.get("aria-label") == 'A "line".'
    assert root.get("style") is None
    ids = {node.get("id") for node in root.iter()} - {None}
    assert ids == {"fig-1-a", "fig-1-ab"}
    used = set(re.findall(r"#([\w-]+)", text))
    assert used == ids


def test_claims_are_counted_for_each_figure(tmp_path):
    folder = tmp_path / "results/reported"
    folder.mkdir(parents=True)
    (folder / "x_claims.csv").write_text("item,kind\nFigure 1,direction\nFigure 1,\nTable 2,value\n")
    assert pages.counted(tmp_path, {}) == {("x", "Figure 1"): 1, ("x", "Table 2"): 1}


def test_the_book_has_its_version_and_without_git_no_date(monkeypatch, tmp_path):
    app, config = SimpleNamespace(srcdir=ROOT), SimpleNamespace(html_theme_options={}, html_baseurl="")
    config.lottery_repository = ""
    monkeypatch.setenv("PATH", str(tmp_path))
    pages.settle(app, config)
    assert config.html_theme_options["extra_footer"] == f"<p>Version {lottery.__version__}</p>"


def made():
    rng = np.random.default_rng(0)
    masks = [rng.random((300, 784)) < share for share in (1.1, 0.2)]
    levels = [{"mask": m, "density": m.mean(), "accuracy": 0.98} for m in masks]
    kept = {80.0: {"grasp": [50.0, 2.5], "snip": [90.0, 0.5]}}
    yield widgets.pixels(levels)
    yield widgets.layers(["conv1", "fc"], kept)
    yield widgets.gate()
    yield widgets.threshold()
    yield widgets.prune(rng.normal(size=30), rng.normal(size=30))


@pytest.mark.parametrize("text", list(made()), ids=("pixels", "layers", "gate", "threshold", "prune"))
def test_a_picture_to_move_has_data_a_question_and_stands_still_without_script(text):
    root = ElementTree.fromstring(text)
    assert root.get("data-widget") in (ROOT / "book/static/widgets.js").read_text(encoding="utf-8")
    still = root.find(".//svg")
    assert still.get("aria-label")
    assert len(still)
    assert "?" in root.find("p[@class='widget-question']")[0].tail
    json.loads(root.find("script").text)
    assert len(text) < 60_000 - (ROOT / "book/static/widgets.js").stat().st_size
