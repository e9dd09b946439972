"""Reports in a real browser: on a phone and a desktop, light and dark, with pointer and keyboard.

The pictures stay in the folder that the environment variable AROMA_SCREENSHOTS names.
"""

import os
from pathlib import Path

import pytest

import charts
from aroma.files import write_text
from aroma.report.page import ASSETS
from aroma.report.run import run_page
from browser import SIZES, chromium
from made_up_facts import GROWN, made_up

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_text(folder / "run.html", run_page(made_up()))
    return folder


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    return Path(os.environ.get("AROMA_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def tip(browser):
    """The text of the tip; None where there is none."""
    return browser.run("const tip = document.getElementById('tip'); return tip.hidden ? null : tip.innerText;")


def colour(browser, selector, name):
    """The red, green and blue of a colour as it is drawn, 0 to 255."""
    script = """
        const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        context.fillStyle = getComputedStyle(document.querySelector(arguments[0]))[arguments[1]];
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);"""
    return browser.run(script, selector, name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_everything_is_drawn_and_nothing_overflows(browser, pages, shots, size, scheme):
    browser.open(pages / "run.html", size, scheme)
    assert browser.complaints() == []
    assert browser.overflowing() == []
    undrawn = (
        """return [...document.querySelectorAll(".plot")].filter((one) => !one.querySelector("svg path")).length"""
    )
    assert browser.run(undrawn) == 0
    assert browser.run("return performance.getEntriesByType('resource').length") == 0, "it loads nothing"
    paper, ink = colour(browser, "body", "backgroundColor"), colour(browser, "body", "color")
    assert (sum(paper) < sum(ink)) == (scheme == "dark")
    browser.screenshot(shots / f"run-{size}-{scheme}.png")


def test_pointing_tells(browser, pages):
    browser.open(pages / "run.html")
    assert tip(browser) is None
    browser.hover(browser.find(f'[data-matrix="{GROWN}"]'))
    told = tip(browser)
    assert told.startswith("attention.self.value, layer 1")
    assert "effective rank" in told
    assert "1.23%" in told
    browser.hover(browser.find('[data-chart="loss"] svg'), right=40)
    told = tip(browser)
    assert "step" in told
    assert "loss" in told
    browser.hover(browser.find("h1"))
    assert tip(browser) is None


def test_the_grid_is_walked_by_keys_and_chooses_a_matrix(browser, pages):
    browser.open(pages / "run.html")
    cell = browser.find(".ranks [tabindex='0']")
    assert cell.get_attribute("data-matrix") == GROWN, "one stop of the tab key"
    browser.run("arguments[0].focus()", cell)
    assert tip(browser).startswith("attention.self.value, layer 1")
    browser.press("ARROW_RIGHT", "ARROW_DOWN")
    assert browser.run("return document.activeElement.dataset.matrix") == "encoder.layer.2.output.dense"
    assert tip(browser).startswith("output.dense, layer 2")
    browser.press("ARROW_DOWN", "END")
    assert browser.run("return document.activeElement.dataset.matrix") == "encoder.layer.2.output.dense", "the edge"
    browser.press("HOME", "ENTER")
    assert browser.find("#choose").get_property("value") == "encoder.layer.0.output.dense"
    assert browser.find("#words").text == "Rank 0 at the end."
    assert browser.find("[aria-selected='true']").get_attribute("data-matrix") == "encoder.layer.0.output.dense"
    browser.press("ESCAPE")
    assert tip(browser) is None


def test_paper_holds_it(browser, pages, shots):
    browser.open(pages / "run.html")
    browser.print_media(width=760)
    assert browser.overflowing() == []
    browser.screenshot(shots / "run-print.png")


def test_the_committed_charts_are_those_of_the_source():
    assert (ASSETS / "charts.json").read_text(encoding="utf-8") == charts.assets()
