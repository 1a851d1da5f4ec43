"""The browser, the Hub and the process that the tests of the Space stand on: they work, and notice what goes wrong."""

import sys

import pytest

from tests.space.browsing import LOST
from tests.space.serving import ROOT, app_of

pytestmark = pytest.mark.e2e
STAND_IN = (sys.executable, str(ROOT / "tests" / "space" / "stand_in.py"))


@pytest.fixture(scope="module")
def stand_in(space_hub, tmp_path_factory):
    made = app_of(space_hub, tmp_path_factory.mktemp("stand_in"), STAND_IN).start()
    yield made
    made.stop()


def test_two_users_sign_in_at_once_by_gradios_own_code(stand_in, hub, visitors, login):
    from playwright.sync_api import expect

    stranger, *both = visitors(), visitors(), visitors()
    for page in (stranger, *both):
        page.goto(stand_in.url)
        expect(page.get_by_label("Who")).to_have_value("nobody")
    for page, user in zip(both, ("alice", "bob"), strict=True):
        login(page, user)
        expect(page.get_by_label("Who")).to_have_value(f"{user} is {user}")
    for page, who in zip((stranger, *both), ("nobody", "alice is alice", "bob is bob"), strict=True):
        page.reload()
        expect(page.get_by_label("Who")).to_have_value(who)
    assert {each.user for each in hub.log if each.path == "/api/whoami-v2"} >= {"alice", "bob"}


def test_what_goes_wrong_in_the_page_is_noticed(stand_in, hub, visitors):
    from playwright.sync_api import expect

    page = visitors()
    page.goto(stand_in.url)
    expect(page.get_by_label("Who")).to_have_value("nobody")
    assert visitors.complaints == []
    with page.expect_request("http://example.org/x"):
        page.get_by_role("button", name="Break").click()
    page.wait_for_timeout(100)
    assert any("broken" in said for said in visitors.complaints)
    assert "left this machine: http://example.org/x" in visitors.complaints
    visitors.visits[0].requests.clear()
    visitors.excuse("broken|ERR_NAME_NOT_RESOLVED")


def test_who_leaves_with_answers_on_their_way_complains_of_nothing(stand_in, hub, visitors):
    from playwright.sync_api import expect

    page = visitors()
    page.goto(stand_in.url)
    expect(page.get_by_label("Who")).to_have_value("nobody")
    said = []
    page.on("console", lambda message: said.append(message.text))
    for number in range(3):
        with page.expect_response("**/queue/join*"):
            page.get_by_role("button", name=f"Wait {number}").click()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.get_by_label("Who")).to_have_value("nobody")
    assert sum(text.startswith(LOST) for text in said) == 3
    assert visitors.complaints == []
    page.evaluate("text => console.error(text)", LOST)
    assert [LOST in complaint for complaint in visitors.complaints] == [True]
    visitors.excuse(LOST)


def test_a_page_that_some_cannot_read_is_noticed(page, axe):
    page.set_content("<html lang=en><title>t</title><main><p>black on white</p></main>")
    axe(page)
    page.set_content("<html lang=en><title>t</title><main><p style='color:#ddd'>grey on white</p></main>")
    with pytest.raises(AssertionError, match="color-contrast"):
        axe(page)


def test_an_app_that_ends_at_once_is_told(start):
    with pytest.raises(AssertionError, match="no such thing"):
        start(None, (sys.executable, "-c", "raise SystemExit('no such thing')"))
