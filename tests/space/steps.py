"""The page as its visitor uses it: by what is written on it, never by how it is made."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from tests.hub.server import Hub
from tests.hub.store import LARGE, Blob, Repo
from tests.hub.watch import Fault


def put(hub: Hub, repo_id: str, folder: Path, **state: Any) -> str:
    """Put the files of a folder on the Hub, past the API; return the name."""
    owner = repo_id.partition("/")[0]
    repo = hub.store.repos.setdefault(repo_id, Repo.new(repo_id, owner))
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {str(path.relative_to(folder)): Blob(path.read_bytes(), path.suffix in LARGE) for path in paths}
    repo.add("main", {**repo.commit("main").files, **files}, "the files", owner)
    for key, value in state.items():
        setattr(repo, key, value)
    return repo_id


def put_file(hub: Hub, repo_id: str, name: str, content: bytes) -> None:
    """Put one file more, or another one, into a repository that is there."""
    repo = hub.store.repos[repo_id]
    repo.add("main", {**repo.commit("main").files, name: Blob(content, False)}, "a file", repo_id.partition("/")[0])


@contextmanager
def held(hub: Hub, repo_id: str) -> Iterator[threading.Event]:
    """Let the weights of a model on the Hub come only when the event is set: a merge lasts as long as a test wants."""
    fault = Fault("hang", rf"/{repo_id}/.*\.safetensors", "GET", seconds=120, over=threading.Event())
    hub.faults.append(fault)
    assert fault.over is not None
    try:
        yield fault.over
    finally:
        fault.over.set()
        hub.faults.remove(fault)


def open_page(page: Page, url: str) -> None:
    """Open the page and wait until it shows its report: what is done earlier is lost."""
    page.goto(url)
    expect(report(page)).to_be_visible()


def signed_in(page: Page, user: str) -> None:
    """Wait until the page, which signing in loads again, is there for its user."""
    expect(page.get_by_text(f"Signed in as {user}")).to_be_visible()
    expect(report(page)).to_be_visible()


def report(page: Page) -> Locator:
    """The table of what the models' files say."""
    return page.get_by_role("table", name="What the models' files say")


def says(page: Page, text: str | re.Pattern[str]) -> None:
    """Wait for a verdict: `These models fit`, `They fit, with warnings`, `They do not fit`."""
    expect(page.get_by_role("status").get_by_text(text)).to_be_visible()


def empty(page: Page) -> None:
    """Begin without models."""
    page.get_by_role("button", name="Start empty").click()
    expect(page.get_by_text("No models yet. Add two or more above.")).to_be_visible()


def search(page: Page) -> Locator:
    """The field by which models are added."""
    return page.get_by_role("combobox", name="Add a model or an adapter")


def listed(page: Page) -> Locator:
    """The models that are merged."""
    return page.get_by_role("list", name="Models").get_by_role("listitem")


def add(page: Page, *models: Any) -> None:
    """Add models by their ids, addresses or folders."""
    for model in models:
        before = listed(page).count()
        search(page).fill(str(model))
        search(page).press("Enter")
        expect(listed(page)).to_have_count(before + 1)


def recipe(page: Page) -> Locator:
    """The recipe's text, in its editor."""
    return page.locator("#yaml .cm-content")


def reads(page: Page, *lines: str) -> None:
    """Wait until the recipe's text has these lines; each is a pattern."""
    for line in lines:
        expect(recipe(page)).to_contain_text(re.compile(line))


def write(page: Page, text: str) -> None:
    """Replace the recipe's text, as who pastes it."""
    recipe(page).click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text(text)


def recipe_of(models: Iterable[Any], base: Any = None, **more: Any) -> str:
    """Return a recipe's text."""
    first = {"merge_method": "linear", **({"base_model": base} if base else {}), **more}
    lines = [f"{key}: {value}" for key, value in first.items()]
    return "\n".join([*lines, "models:", *(f"- {model}" for model in models), ""])


def method(page: Page, name: str) -> Locator:
    """The card of a method, wherever it is."""
    return page.get_by_role("radio", name=re.compile(rf"^{name}\b"))


def start(page: Page) -> Locator:
    """The main button."""
    return page.get_by_role("button", name="Merge", exact=True)


def run(page: Page) -> Locator:
    """What the rail tells of a job."""
    return page.locator("#run")


def merge(page: Page) -> None:
    """Merge, and wait for what comes out."""
    start(page).click()
    expect(run(page).get_by_text(re.compile(r"^Done in")).first).to_be_visible()


def focused(page: Page, wanted: Locator) -> None:
    """Go on with Tab until something has the focus, as who has no mouse does; it must be on the way.

    In the recipe's text Tab indents, and Esc comes first, as is said above it.
    """
    for _ in range(250):
        if wanted.evaluate_all("all => all.includes(document.activeElement)"):
            return
        if page.evaluate("!!document.activeElement.closest('.cm-content')"):
            page.keyboard.press("Escape")
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not come to {wanted}")


def press(page: Page, name: str) -> None:
    """Come to a button by Tab, and press it."""
    button = page.get_by_role("button", name=name)
    expect(button.first).to_be_enabled()
    focused(page, button)
    page.keyboard.press("Enter")
