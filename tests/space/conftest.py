"""The Space in a real process, seen through a real browser, beside the Hub on loopback.

| fixture | what it is |
|---|---|
| `hub` | the Hub for one test, as in tests/hub; `alice` and `bob` can sign in, `owner` owns the Space |
| `app` | the Space beside that Hub, whose visitors can sign in; one process for all tests |
| `local_app` | the Space as `hf-merge space` starts it on a machine without a network; one for all tests |
| `start` | starts another one with a folder of its own, for tests that end or restart it |
| `page` | a visitor's page that nothing was opened in; errors in its console fail the test |
| `visitors` | makes more of them: `visitors(viewport=.., color_scheme="dark")` |
| `login` | `login(page, "alice")` signs in at an app that is open in the page, and comes back to it |
| `axe` | `axe(page)`: no violation of WCAG 2 A and AA |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub.conftest import one_test
from tests.hub.server import Hub
from tests.hub.store import Token
from tests.space.serving import OWNER, App, app_of

USERS = ("alice", "bob")
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


@pytest.fixture(scope="package")
def space_hub() -> Iterator[Hub]:
    """The Hub that stays while the apps do."""
    with Hub() as running:
        running.openid.users += USERS
        running.store.tokens |= {f"hf_{user}": Token(user, write=True) for user in USERS}
        running.store.tokens[OWNER] = Token("owner", write=True)
        yield running


@pytest.fixture
def hub(space_hub: Hub) -> Iterator[Hub]:
    """The Hub for one test; repositories of earlier tests are gone."""
    before = dict(space_hub.store.repos)
    with one_test(space_hub):
        yield space_hub
    space_hub.store.repos = before


@pytest.fixture(scope="package")
def app(space_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The Space beside the Hub."""
    made = app_of(space_hub, tmp_path_factory.mktemp("space")).start()
    yield made
    made.stop()


@pytest.fixture(scope="package")
def local_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The Space on a machine without a network."""
    work = tmp_path_factory.mktemp("local")
    command = (sys.executable, "-m", "hf_merge.cli", "space", "--folder", str(work / "jobs"))
    made = app_of(None, work, command).start()
    yield made
    made.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., App]]:
    """Start an app for this test alone: `start(hub or None, command=(..), NAME="of the environment")`."""
    started: list[App] = []

    def one(hub: Hub | None = None, command: tuple[str, ...] = (), **environment: str) -> App:
        started.append(app_of(hub, tmp_path / f"app{len(started)}", command, **environment))
        return started[-1].start()

    yield one
    for each in started:
        each.stop()


@pytest.fixture(scope="package")
def browser():
    """One Chromium for all tests; skipped without one, unless this is CI."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import expect, sync_playwright

    from tests.space.browsing import FLAGS, PATIENCE, executable

    path = executable()
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Remember for the fixtures whether the test failed."""
    report = yield
    item.stash[failed] = item.stash.get(failed, False) or report.failed
    return report


@pytest.fixture
def visitors(browser, request: pytest.FixtureRequest):
    """Visitors of this test; what they saw is kept if it fails."""
    from tests.space.browsing import Visitors

    made = Visitors(browser)
    yield made
    complaints = made.complaints
    is_bad = request.node.stash.get(failed, False) or bool(complaints)
    made.close(keep=request.node.nodeid if is_bad else None)
    assert not complaints


@pytest.fixture
def page(visitors):
    """One visitor's page."""
    return visitors()


@pytest.fixture
def login() -> Callable[..., None]:
    """Sign in by the app's own button, on the Hub's own page."""

    def login(page, user: str) -> None:
        from playwright.sync_api import expect

        page.get_by_role("button", name="Sign in with Hugging Face").first.click()
        page.get_by_role("button", name=f"Continue as {user}").click()
        expect(page.get_by_role("button", name=f"Logout ({user})").first).to_be_visible()

    return login


@pytest.fixture
def axe() -> Callable[..., None]:
    """Check a page, or what a selector finds in it, against WCAG 2 A and AA."""

    def axe(page, context: str | None = None) -> None:
        from axe_playwright_python.sync_playwright import Axe

        rules = {"resultTypes": ["violations"], "runOnly": {"type": "tag", "values": WCAG}}
        found = Axe().run(page, context=context, options=rules)
        told = [
            f"{each['id']}: {each['help']}\n"
            + "\n".join(f"  {node['target']} {node['failureSummary']}\n  {node['html']}" for node in each["nodes"])
            for each in found.response["violations"]
        ]
        assert not told, re.sub(r"\n\s*\n", "\n", "\n".join(told))

    return axe
