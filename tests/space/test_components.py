"""The components of the Space in a real browser: what people do with mouse and keyboard, and what comes of it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")
pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import expect

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "space" / "components" / "gallery.py"
HOSTILE = "<img src=x onerror=window.hacked=1>"
START = 90
"""Seconds that a start may take on a machine that is busy."""


@pytest.fixture(scope="module")
def gallery():
    """The address of the gallery, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1,localhost"}
    process = subprocess.Popen([sys.executable, str(GALLERY), str(port)], env={**os.environ, **words}, cwd=ROOT)
    address, patience = f"http://127.0.0.1:{port}/", time.monotonic() + START
    try:
        while True:
            assert process.poll() is None and time.monotonic() < patience, "the gallery did not start"
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def contexts(browser):
    """Windows of the browser by what they are: made once, so that Gradio's scripts are fetched once."""
    made: dict = {}

    def context(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = browser.new_context(**options)
            made[key].set_default_timeout(15_000)
        return made[key]

    yield context
    for one in made.values():
        one.close()


@pytest.fixture
def visit(contexts, gallery):
    """Open the gallery: `visit(width=390, scheme="dark")`. Nothing may leave this machine, fail or be complained of."""
    pages, seen, complaints = [], [], []

    def visit(*, width: int = 1280, scheme: str = "light", **options):
        page = contexts(viewport={"width": width, "height": 900}, color_scheme=scheme, **options).new_page()
        pages.append(page)
        page.on("request", lambda request: seen.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"{gallery}?__theme={scheme}")
        expect(page.locator("#answers .hm-trial")).to_have_count(3, timeout=15_000)
        return page

    yield visit
    for page in pages:
        page.close()
    assert not complaints
    assert not [url for url in seen if not url.startswith((gallery, "data:", "blob:"))]


@pytest.fixture
def page(visit):
    return visit()


def tells(page, *texts: str) -> None:
    """Wait until the server has been told something."""
    for text in texts:
        expect(page.locator("#said textarea")).to_have_value(re.compile(re.escape(text)))


def number(page, name: str):
    return page.get_by_role("spinbutton", name=f"{name}, exact number", exact=True)


def slider(page, name: str):
    return page.get_by_role("slider", name=name, exact=True)


# names are text, whatever is in them


def test_hostile_names_are_text_everywhere(page):
    for part in ("models", "report", "similarity", "answers", "parameters", "summary", "failed", "verdict"):
        expect(page.locator(f"#{part}")).to_contain_text(HOSTILE)
        assert page.locator(f"#{part} img").count() == 0
    expect(page.locator("#models")).to_contain_text("${window.hacked=2}{{value}}`")
    page.get_by_role("button", name=f"Move {HOSTILE} up").click()  # drawn again, and sent to and fro
    tells(page, "tiny-math")
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_everybody_can_use_it(visit, axe, width, scheme):
    page = visit(width=width, scheme=scheme)
    page.get_by_text("All methods (").click()
    axe(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = page.evaluate(
        """[...document.querySelectorAll('.hm :is(button, input, select, summary, [role=slider])')]
        .map((one) => [one.outerHTML.slice(0, 90), one.closest('.hm-check, .hm-method') || one])
        .map(([told, box]) => [told, box.getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.width < 24 || box.height < 24)).map(([told]) => told)"""
    )
    assert not small


def test_motion_stops_for_those_who_ask(visit):
    moving = "getComputedStyle(document.querySelector('.hm-pulse')).animationName"
    assert visit().evaluate(moving) == "hm-pulse"
    assert visit(reduced_motion="reduce").evaluate(moving) == "none"


# the field for models


def test_enter_takes_what_was_typed_and_the_arrow_keys_a_proposal(page):
    field, proposals = page.get_by_role("combobox", name="Add a model"), page.locator("#search").get_by_role("option")
    field.fill("tiny-b")
    expect(proposals).to_have_text(["org/tiny-base", "org/tiny-b"])
    field.press("Enter")
    tells(page, '"wanted": "tiny-b"')
    expect(field).to_have_value("")
    field.fill("ORG tiny")
    for _ in range(2):
        field.press("ArrowDown")
    expect(page.get_by_role("option", name="org/tiny-b", exact=True)).to_have_attribute("aria-selected", "true")
    field.press("Enter")
    tells(page, '"wanted": "org/tiny-b"')
    expect(proposals).to_have_count(0)


def test_proposals_are_text_are_chosen_by_mouse_and_go_away(page):
    field = page.get_by_role("combobox", name="Add a model")
    field.fill("img")
    expect(field).to_have_attribute("aria-expanded", "true")
    field.press("Escape")
    expect(field).to_have_attribute("aria-expanded", "false")
    field.press("ArrowDown")
    page.get_by_role("option", name=f"org/{HOSTILE}").click()
    tells(page, '"wanted": "org/<img')
    field.fill("org/")
    field.press("Tab")
    expect(page.locator("#search").get_by_role("option")).to_have_count(0)
    expect(field).to_have_value("org/")  # leaving the field adds nothing
    page.get_by_role("button", name="Add", exact=True).click()
    tells(page, '"wanted": "org/"')
    assert page.evaluate("window.hacked") is None


# models


def test_models_are_moved_by_keyboard_and_the_focus_stays(page):
    down = page.get_by_role("button", name="Move tiny-code down")
    down.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#models .hm-model-row .hm-name")).to_have_text(["tiny-math", "tiny-code", HOSTILE])
    expect(page.locator("#models [role=status]")).to_have_text("tiny-code is now number 2 of 3")
    expect(down).to_be_focused()
    page.keyboard.press("Enter")  # at the end, where it can go down no further
    expect(page.get_by_role("button", name="Move tiny-code up")).to_be_focused()


def test_models_are_dragged(page):
    rows = page.locator("#models .hm-model-row")
    grip, last = page.locator("#models .hm-handle").first.bounding_box(), rows.last.bounding_box()
    page.mouse.move(grip["x"] + 8, grip["y"] + 8)
    page.mouse.down()
    page.mouse.move(grip["x"] + 8, last["y"] + last["height"], steps=6)
    page.mouse.up()
    expect(page.locator("#models .hm-model-row .hm-name")).to_have_text(["tiny-math", HOSTILE, "tiny-code"])


def test_a_base_is_proposed_taken_and_given_up_and_models_are_removed(page):
    page.get_by_role("button", name="Use it as the base").click()
    tells(page, "org/tiny-base")
    expect(page.locator("#models .hm-message")).to_have_count(0)
    page.get_by_role("button", name="Use tiny-math as the base").click()
    expect(page.locator("#models ol .hm-name")).to_have_text(["tiny-code", HOSTILE])  # the base is not merged itself
    expect(page.locator("#models .hm-is-base")).to_contain_text("org/tiny-math")
    page.get_by_role("button", name="Do without the base tiny-math").click()
    expect(page.locator("#models ol .hm-name")).to_have_text(["tiny-code", HOSTILE, "tiny-math"])
    page.get_by_role("button", name="Remove tiny-math").click()
    expect(page.locator("#models .hm-model-row")).to_have_count(2)
    expect(page.locator("#models .hm-message")).to_contain_text("org/tiny-base")  # proposed again: the base is gone


# methods


def test_methods_are_found_and_chosen_and_those_that_do_not_work_say_why(page):
    assert page.locator("#methods .hm-method:visible").count() < 12
    expect(page.locator("#methods .hm-method").first).to_contain_text("recommended")
    page.get_by_label("Find a method").fill("spherical nothing")
    expect(page.locator("#methods [role=status]")).to_contain_text("None of")
    page.get_by_label("Find a method").fill("slerp")
    expect(page.locator("#methods .hm-method")).not_to_have_count(0)
    refused = page.get_by_role("radio", name="slerp", exact=True)
    expect(refused).to_be_disabled()
    expect(page.locator("#methods .hm-method", has=refused)).to_contain_text("It merges 1 model")
    page.get_by_role("radio", name="multislerp", exact=True).check()
    tells(page, "multislerp")
    expect(slider(page, "weight, tiny-code")).to_be_visible()
    expect(page.locator("#parameters legend", has_text="density")).to_have_count(0)


# numbers


def test_a_slider_by_keyboard_changes_the_sentence_and_keeps_the_focus(page):
    one = slider(page, "density, tiny-code")
    one.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    expect(number(page, "density, tiny-code")).to_have_value("0.7")
    tells(page, "0.7")
    expect(page.locator("#parameters .hm-sentence")).to_contain_text(re.compile(r"0\.7|70\s?%"))
    expect(one).to_be_focused()
    expect(one).to_have_value("0.7")  # no answer that came late has put it back
    expect(page.locator(f"#{one.get_attribute('aria-describedby')}")).to_contain_text("keep all changes of tiny-code")


def test_a_number_may_exceed_the_slider_and_is_reset(page):
    field = number(page, "weight, tiny-math")
    field.fill("3.5")
    field.press("Enter")
    expect(slider(page, "weight, tiny-math")).to_have_attribute("max", "3.5")
    tells(page, "3.5")
    page.get_by_role("button", name="Reset weight, tiny-math to 1").click()
    expect(field).to_have_value("1")
    bounded = number(page, "density, tiny-code")
    bounded.fill("7")
    bounded.press("Enter")
    expect(bounded).to_have_value("1")


def test_all_models_at_once(page):
    weights = [number(page, f"weight, {name}") for name in ("tiny-code", "tiny-math", HOSTILE)]
    expect(page.locator("#parameters .hm-ratio")).to_contain_text("Only the ratio of these numbers counts")
    page.get_by_role("button", name="Scale so that they sum to 1: weight of all models").click()
    for one in weights:
        expect(one).to_have_value("0.333333")
    page.get_by_role("group", name="weight of all models at once").get_by_label("move together").check()
    weights[0].fill("0.433333")
    weights[0].press("Enter")
    expect(weights[2]).to_have_value("0.433333")
    page.get_by_role("button", name="Reset: weight of all models").click()
    weights[0].fill("2")
    weights[0].press("Enter")
    expect(page.locator("#parameters .hm-share").first).to_have_text("33 % of the whole")  # all moved
    page.get_by_role("checkbox", name="normalize", exact=True).uncheck()
    expect(page.locator("#parameters .hm-ratio")).to_be_hidden()


def test_a_curve_by_keyboard_by_shapes_and_by_hand(page):
    curve = page.get_by_role("group", name="Curve of density, tiny-math over the layers")
    first = curve.get_by_role("slider", name="density, tiny-math, first layer")
    first.focus()
    page.keyboard.press("PageUp")
    expect(first).to_have_attribute("aria-valuetext", "0.3 at first layer")
    expect(curve.locator("output")).to_have_text("first layer: 0.3")
    expect(first).to_be_focused()
    curve.get_by_role("button", name="Bell").click()
    curve.get_by_text("Value in each layer").click()
    values = curve.locator("tbody td")
    expect(values).to_have_count(12)
    expect(values.first).to_have_text("0")
    expect(values.nth(5)).to_have_text("0.909")
    curve.get_by_role("button", name="One point more").click()
    expect(curve.get_by_role("slider")).to_have_count(4)
    frame, last = curve.locator(".hm-plot").bounding_box(), curve.get_by_role("slider").last
    spot = last.bounding_box()
    page.mouse.move(spot["x"] + 14, spot["y"] + 14)
    page.mouse.down()
    page.mouse.move(spot["x"] + 14, frame["y"] + frame["height"] / 4, steps=5)
    page.mouse.up()
    expect(last).to_have_attribute("aria-valuenow", "0.75")
    page.mouse.move(frame["x"] + 1, frame["y"] + 20)
    expect(curve.locator("output")).to_have_text("layer 0: 0")
    tells(page, "0.75")


def test_any_number_becomes_a_curve_or_differs_by_part(page):
    mode = page.get_by_role("combobox", name="density, tiny-code: how it varies")
    mode.focus()
    mode.select_option("curve over depth")
    expect(mode).to_be_focused()
    expect(page.get_by_role("slider", name="density, tiny-code, first layer")).to_have_attribute("aria-valuenow", "0.5")
    mode.select_option("attention, MLP, rest apart")
    expect(slider(page, "density, tiny-code, MLP, last layer")).to_have_attribute("aria-valuenow", "0.5")
    for part in ("Attention", "MLP", "All else"):
        page.get_by_role("combobox", name=f"density, tiny-code, {part}: how it varies").select_option(
            "same in all layers"
        )
    slider(page, "density, tiny-code, Attention").press("Home")
    expect(page.locator("#parameters .hm-sentence")).to_contain_text(
        re.compile(r"0%? in attention, (0\.5|50%) in MLPs")
    )
    page.get_by_role("combobox", name="lambda: how it varies").select_option("curve over depth")
    expect(page.get_by_role("group", name="Curve of lambda over the layers")).to_be_visible()


# what only shows


def test_the_end_of_a_run_is_announced_and_its_seconds_are_not(page):
    live = page.locator("#run [role=status]")
    expect(live).to_have_text("Merging, 40 percent")
    expect(page.get_by_role("progressbar", name="Progress of the merge")).to_have_attribute(
        "value", re.compile("0.427")
    )
    expect(page.locator("#run")).to_contain_text("530 MB of 1.2 GB")
    page.get_by_role("button", name="Let it end").click()
    expect(live).to_have_text("Done in 1 min 1 s")
    expect(page.locator("#run progress")).to_have_count(0)


def test_tables_have_headers_and_captions(page):
    heat = page.get_by_role("table", name="How alike the changes are")
    expect(heat.get_by_role("rowheader")).to_have_count(3)
    expect(heat.get_by_role("columnheader")).to_have_count(4)
    expect(heat.get_by_role("cell", name="-0.62")).to_have_count(2)
    expect(page.locator("#strip li")).to_have_count(16)
    expect(page.locator("#strip li").nth(8)).to_contain_text("Layer 8: 50 % merged, change 0.04")
    expect(page.locator("#report")).to_contain_text("288 of 290 match")
    expect(page.locator("#verdict [role=status]")).to_contain_text("They fit, with warnings")


def test_answers_are_texts_scores_or_a_table_of_cosines(page):
    answers = page.locator("#answers .hm-trial")
    expect(answers.nth(0)).to_contain_text("def add(a, b)")
    expect(answers.nth(1).get_by_role("listitem").first).to_contain_text("93.0 %")
    expect(answers.nth(2)).to_contain_text("It has code of its own, which is not run here.")
    table = page.locator("#cosines").get_by_role("table", name="Cosines of the texts").first
    expect(table.get_by_role("row")).to_have_text(["text12", "11.000.15", "20.151.00"])
