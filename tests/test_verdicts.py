"""lottery.verdicts and lottery.overview: what the scorecard's rows become on a page."""

import re
from html.parser import HTMLParser

import pytest

from lottery import overview, verdicts


def row(claim="lth-fig4-a-3.6", verdict="reproduced", **changes):
    given = {
        "paper": "lth", "item": "Figure 4", "panel": "a", "claim": claim, "primary": True, "title": "Lenet: A > B.",
        "evidence": "full", "net": "lenet_300_100", "data": "mnist", "steps_fraction": 1, "trials": 10,
        "coverage": "1 of 1 cells", "device": "CPU", "quantity": "test accuracy at last, points, A − B",
        "paper_value": 0.5, "ours": 0.4, "interval": [0.2, 0.6], "interval_images": None, "stale": None,
        "was": None, "all_trials": None, "cell": None,
        "rule": "direction; Δ = 0.5; m = 0.2; n = 10", "verdict": verdict, "command": "lottery run lth x",
    }  # fmt: skip
    return given | changes


def untested(claim, **changes):
    nothing = dict.fromkeys(("ours", "interval", "trials", "net", "data", "device", "steps_fraction"))
    return row(claim, "not tested", evidence="none", **nothing | changes)


def card(*rows):
    by = {"full": {"claims": len(rows), "verdicts": {"reproduced": len(rows)}}}
    return {
        "rows": list(rows),
        "totals": {"by_evidence": by, "primary": {"by_paper": {}}, "chance": {"tested": 1, "expected": 0.025}},
    }


def test_failures_are_named_first_and_everything_is_a_link():
    rows = [
        row("a", title="Good."), row("b", "not reproduced (opposite)", title="Bad."),
        row("c", "inconclusive", title="Open."),
        row("d", "contradicts", evidence="stand-in", title="Small."), untested("e", title="Later."),
        row("f", "not reproduced", primary=False, title="Second."),
    ]  # fmt: skip
    said = verdicts.paragraph(rows)
    assert said.startswith("**Lottery tickets.** 1 of 3 primary claims that ran in full")
    order = ["**Not reproduced:** [Bad]", "**Contradicted** on a smaller network", "Reproduced: [Good]", "Open: [Open]"]
    order += ["Without a verdict yet: [Later]", "**Not reproduced** among the secondary claims: [Second]"]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    assert set(re.findall(r"scorecard\.ipynb#(\w)", said)) == set("abcdef")


def test_all_of_them_or_none_of_them_is_said_in_words():
    assert "All 3 primary claims that ran in full" in verdicts.paragraph([row(c) for c in "abc"])
    assert "Both primary claims" in verdicts.paragraph([row(c) for c in "ab"])
    assert "The one primary claim that ran in full" in verdicts.paragraph([row("a")])
    assert "None of its 2 primary claims has been run." in verdicts.paragraph([untested(c) for c in "ab"])
    assert "Without a verdict yet: [Figure 4](scorecard.ipynb#lth-figure-4) (4)." in verdicts.paragraph(
        [untested(c) for c in "abcd"]
    )


def test_an_open_verdict_says_what_keeps_it_open():
    said = verdicts.paragraph([
        row("a", "depends on the setting (x: supports; y: contradicts)", evidence="reduced", title="A."),
        row("b", "inconclusive (setting unknown)", title="B."), row("c", "inconclusive", title="C."),
    ])  # fmt: skip
    assert "**Depends on the setting** with fewer steps, images or trials than the paper's: [A]" in said
    assert "Open for an unknown setting, with runs against it: [B]" in said
    assert "Open: [C]" in said


def test_a_chapters_table_has_units_and_all_stored_trials():
    more = {"trials": 12, "ours": 0.3, "interval": [0.1, 0.5]}
    assert verdicts.summary(row(all_trials=more))["ours, 95 % interval"] == (
        "0.4 points [0.2, 0.6]; all 12 trials: 0.3 points [0.1, 0.5]"
    )
    ratio = row(quantity="iterations at early_stop, ratio A/B", ours=1.5, interval=[1.2, 1.9])
    assert verdicts.summary(ratio)["ours, 95 % interval"] == "1.5 × [1.2, 1.9]"
    assert verdicts.summary(row(quantity="MACs, M", ours=5.0, interval=None))["ours, 95 % interval"] == "5"


def test_effects_by_hand():
    (ours, low, high), zone = overview.in_effects(row())
    assert (ours, low, high) == pytest.approx((0.8, 0.4, 1.2))
    assert zone == (0.5, float("inf"))
    at_2 = {"quantity": "iterations at early_stop, ratio A/B", "ours": 2, "interval": [1, 4], "paper_value": 4}
    values, _ = overview.in_effects(row(**at_2, rule="direction; Δ = 4; m = 1.15; n = 10"))
    assert values == pytest.approx([0.5, 0, 1])
    values, zone = overview.in_effects(row(ours=91, interval=[90, 92], paper_value=90, rule="value; m = 0.5; n = 5"))
    assert (values, zone) == ([2, 1, 3], (0.5, 1.5))
    values, zone = overview.in_effects(row(ours=-0.1, interval=[-0.2, 0], rule="at least matches; m = 0.2; n = 5"))
    assert values == pytest.approx([-0.25, -0.5, 0])
    assert zone[0] == -0.5
    assert overview.in_effects(untested("a")) is None


class Page(HTMLParser):
    """Checks that tags close in order; collects ids, links and headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.levels = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.levels += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        if tag not in ("input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_its_links_lead_somewhere():
    rows = [row("lth-a-3.6"), untested("lth-b"), row("g", paper="grasp", item="Table 2", title="x < y & z.")]
    rows.append(row(None, verdict=None, item="Figure 10", rule=None, quantity=None, primary=False))
    page = Page(overview.page(card(*rows), {"fig-lth-4"}))
    assert len(page.ids) == len(set(page.ids))
    assert {"lth-a-3-6", "lth-b", "g", "lth-figure-4", "grasp-table-2", "lth-figure-10"} <= set(page.ids)
    assert not any("." in i for i in page.ids)
    assert all(b - a <= 1 for a, b in zip([1, *page.levels], page.levels, strict=False))
    assert [link for link in page.links if not link.startswith("#")] == ["lth.html#fig-lth-4"]
    for part in (overview.forest(card(*rows[:3])), overview.squares(card(*rows[:3]))):
        assert {link[1:] for link in Page(part).links} <= set(page.ids)
    assert len(Page(overview.squares(card(*rows))).links) == 3  # one a claim, none without one


def test_papers_come_in_the_order_of_the_book():
    rows = [row("g", paper="grasp"), row("s", paper="str"), row("l"), row("n", paper="new")]
    assert list(verdicts.by_paper(card(*rows))) == ["lth", "str", "grasp", "new"]


def test_names_that_come_from_a_file_are_text_on_a_page():
    """Whatever a paper, an item or a claim is called, it opens no tag and ends no attribute."""
    bad = '"><img src=x>'
    rows = [row(f"a{bad}", item=f"Figure 4{bad}", paper=f"lth{bad}"), untested(f"b{bad}", title=bad, panel=bad)]
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, [value for _, value in attributes]))

    for text in (overview.page(card(*rows)), overview.forest(card(*rows)), overview.squares(card(*rows))):
        Reader().feed(text)
        assert "<img" not in text
    assert not [tag for tag, _ in seen if tag == "img"]
    assert re.fullmatch(r"[\w-]+", verdicts.anchor(rows[0]))
    assert "<img" not in verdicts.paragraph(rows[:1] + [untested(c, item=bad) for c in "cdefg"])


def test_where_no_tested_cell_fails_a_claim_is_not_called_mixed():
    far = row("a", "mixed (3 of 4 pass, 1 not tested)", evidence="stand-in")
    some = row("b", "mixed (2 of 4 pass, 1 open, 1 not tested)", evidence="stand-in")
    said = verdicts.paragraph([far, some])
    assert "Supported in the cells that were tested, on a smaller network" in said
    assert said.count("Mixed") == 1
    full = row("c", "partly (3 of 4 pass, 1 not tested; setting unknown)")
    assert "Reproduced in the cells that were tested:" in verdicts.paragraph([full])
