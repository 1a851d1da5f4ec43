"""The page can be read by everybody: contrast, names and order by WCAG 2 A and AA, light and dark, on a phone too."""

import pytest

pytestmark = pytest.mark.e2e

PHONE = {"width": 390, "height": 844}


def opened(page, app):
    from playwright.sync_api import expect

    page.goto(app.url)
    expect(page.locator("#verdict")).to_contain_text("fit")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_on_the_page_is_hard_to_read_before_and_after_a_merge(local_app, visitors, axe, scheme):
    from playwright.sync_api import expect

    page = opened(visitors(color_scheme=scheme), local_app)
    axe(page)
    page.locator("#merge").click()
    expect(page.locator("#result")).to_be_visible()
    expect(page.locator("#card")).to_contain_text("How it was merged")
    axe(page)


def test_a_phone_shows_it_without_scrolling_sideways_and_the_summary_before_the_result(local_app, visitors, axe):
    page = opened(visitors(viewport=PHONE, has_touch=True, is_mobile=True), local_app)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    places = [page.locator(f"#step-{step}").first.bounding_box()["y"] for step in ("recipe", "merge", "result")]
    assert places == sorted(places)
    axe(page)
