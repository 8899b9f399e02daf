"""The page in a real browser: nothing runs that is not its own, sliders count as ``--where`` does, it fits a phone."""

import re
import shlex

import pytest

from manifests.errors import DataError
from manifests.reader import Manifest
from pipeline.report import make_report
from tests.pipeline.report.browser import CHROMIUM, Browser
from tests.pipeline.report.drawn import ATTACKS, write_hostile

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_hostile(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_bytes(make_report(folder).html)
    return file


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1280, 900)
        browser.open(page)
        yield browser


def set_input(browser, selector, value):
    """As a user would: a slider or list gets a value, a box is checked or not."""
    name = "checked" if isinstance(value, bool) else "value"
    text = str(value).lower() if isinstance(value, bool) else f"'{value}'"
    kind = "change" if isinstance(value, bool) else "input"
    change = f"e.{name} = {text}; e.dispatchEvent(new Event('{kind}'))"
    browser.run(f"(e => {{ {change} }})(document.querySelector('{selector}'))")


def test_text_of_a_dataset_stays_text(browser):
    assert browser.run("window.attacked") is None
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img[onerror], [onmouseover]').length") == 0
    names = browser.run("[...document.querySelectorAll('#classes tbody th')].map(cell => cell.textContent)")
    assert names == [*ATTACKS[:5], "right\\u202eleft\\x00\\x1b[31m"]
    browser.run("document.querySelectorAll('.shot')[1].click()")
    assert any(attack in browser.run("document.querySelector('#card').textContent") for attack in ATTACKS)
    browser.run("document.querySelectorAll('.shot')[1].click()")


def test_a_script_that_got_in_would_not_run(browser):
    run = "s.textContent = 'window.attacked = 2'; document.body.append(s)"
    browser.run(f"(s => {{ {run} }})(document.createElement('script'))")
    browser.run("document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.attacked = 3\" id=bait>')")
    browser.run("document.querySelector('#bait').click()")
    assert browser.run("window.attacked") is None
    refused = [text for text in browser.problems if "Content Security Policy" in text]
    assert len(refused) >= 2
    browser.problems.clear()


SELECTIONS = [
    {"confidence": 0.7},
    {"confidence": 0.005},
    {"confidence": 1.0},
    {"entropy": 0.9},
    {"entropy": 0.0},
    {"cosine": 0.5},
    {"confidence": 0.3, "entropy": 1.2, "cosine": 0.1},
    {"confidence": 0.3, "#agrees": True},
    {"cosine": 0.2, "#final": True, "#agrees": True},
    {"confidence": 0.4, "#rejected": True},
    {"#final": True},
    {},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_counts_are_those_of_where(browser, page, folder, selection):
    browser.open(page)
    names = browser.run("data.columns.sliders.map(slider => slider.name)")
    for name, value in selection.items():
        if name.startswith("#"):
            set_input(browser, name, value)
        else:
            stops = browser.run(f"data.columns.sliders[{names.index(name)}].stops")
            place = min(range(len(stops)), key=lambda i: abs(stops[i] - value))
            set_input(browser, f"#slider-{names.index(name)}", place)
    words = shlex.split(browser.run("document.querySelector('#where').value"))
    where = words[words.index("--where") + 1] if "--where" in words else None
    assert len(selection) - ("#rejected" in selection) == (where.count(" and ") + 1 if where else 0)
    rejected = "include_rejected=true" in words
    try:
        chosen = Manifest.open(folder).where(where, include_rejected=rejected).labels.tolist()
    except DataError:  # nothing is left
        chosen = []
    assert browser.run("document.querySelector('#stays').textContent") == str(len(chosen))
    shown = browser.run("[...document.querySelectorAll('[data-stays]')].map(cell => Number(cell.textContent))")
    assert shown == [chosen.count(label) for label in range(6)]


def test_pictures_fade_that_would_go(browser, page):
    browser.open(page)
    assert browser.run("document.querySelectorAll('.shot.gone').length") == 0
    set_input(browser, "#slider-0", 200)  # confidence >= 1
    gone = browser.run("[...document.querySelectorAll('#images .shot:not(.gone) img')].map(image => image.alt)")
    assert gone and all("confidence 1.00" in alt for alt in gone)


@pytest.mark.parametrize("width", [320, 390, 820, 1280])
def test_it_fits_without_scrolling_sideways(browser, page, width):
    browser.resize(width, 844, phone=width < 800)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.resize(1280, 900)


def test_light_and_dark(browser, page):
    for scheme in ("light", "dark"):
        browser.scheme(scheme)
        browser.open(page)
        assert contrast(browser) >= 4.5
    browser.run("document.querySelector('#theme').click()")
    assert browser.run("document.documentElement.style.colorScheme") == "light"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 246)"
    browser.scheme("light")


def contrast(browser) -> float:
    """The lowest contrast of text with the nearest background behind it (WCAG 2.2), of elements that hold text."""
    colors = browser.run(
        """[...document.querySelectorAll('body *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.checkVisibility())
        .filter(e => !e.closest('script, :disabled, option, .skip, .hidden, .top'))
        .map(e => {
          const clear = e => /, 0\\)|transparent/.test(getComputedStyle(e).backgroundColor);
          let behind = e;
          while (behind !== document.body && clear(behind)) behind = behind.parentElement;
          return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor];
        })"""
    )
    assert len(colors) > 50

    def luminance(color: str) -> float:
        parts = [float(part) for part in re.findall(r"[\d.]+", color)][:3]
        parts = [part / 255 if color.startswith("rgb") else part for part in parts]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for pair in {tuple(pair) for pair in colors}:
        dark, light = sorted(map(luminance, pair))
        ratios.append((light + 0.05) / (dark + 0.05))
    return min(ratios)


def test_the_keyboard_reaches_pictures(browser, page):
    browser.open(page)
    assert browser.run("document.querySelectorAll('#images .shot[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('#images .shot').focus({focusVisible: true})")
    first = browser.run("document.querySelector('#card-key').textContent")
    assert re.fullmatch(r"\d{6}-\d{6}", first)
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('#card-key').textContent") != first
    browser.press("Enter")
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    browser.press("Escape")
    assert browser.run("document.querySelector('#card').hidden")
    assert browser.run("[...document.images].every(image => image.hasAttribute('alt'))")


def test_no_request_and_no_error(browser, page):
    browser.problems.clear()
    browser.open(page)
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.problems == []
