"""Chromium, driven as a visitor would, and watched while it is: no error is missed, and no request leaves loopback.

Events that come before Gradio is mounted are lost: wait for something that only the page's load event fills.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOPBACK = ("127.0.0.1", "localhost")

PATIENCE = 30_000  # milliseconds that the page may take to show something, on a machine with much to do

FLAGS = [
    "--no-sandbox",  # which root cannot have
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]

# In a Space that is not framed by huggingface.co, Gradio's page itself asks there for the header with the Space's name.
HEADER = re.compile(
    r"https://(huggingface\.co/api/spaces/owner/space|fonts\.googleapis\.com/css2\?family="
    r"(Source\+Sans\+Pro:ital,wght@[\d,;]+|IBM\+Plex\+Mono:wght@400;600;700)&display=swap)\b|^Space not found "
)

# Gradio's page says both when a visitor leaves it while answers are on their way: one, then the other for each answer.
LEFT, LOST = "AbortError: signal is aborted without reason", "Unexpected error Connection errored out."


def executable() -> str:
    """Return the path of a browser; without one tests are skipped, but CI fails, which is to install it."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        said = f"no browser: none of {', '.join(NAMES)} is installed"
        if os.environ.get("HF_MERGE_TEST_BROWSER") == "required" or os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)
    return found


def results() -> Path:
    """Return the folder where the traces and pictures of failed tests are kept."""
    return Path(os.environ.get("HF_MERGE_TEST_RESULTS", ROOT / "test-results"))


@dataclass
class Visit:
    """What happened in one browser context, which is one visitor with cookies of his own.

    Attributes:
        requests: the addresses of all requests.
        errors: what the page reported.
        left: whether the visitor left, and all that the page has said since is what it lost.
    """

    context: BrowserContext
    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    left: bool = False

    def __post_init__(self) -> None:
        self.context.on("request", self._requested)
        self.context.on("console", self._said)
        self.context.on("weberror", lambda error: self.errors.append(f"uncaught: {error.error}"))

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def _said(self, message: ConsoleMessage) -> None:
        self.left = message.text.startswith(LEFT) or (self.left and message.text.startswith(LOST))
        place = message.location.get("url", "")
        is_asked_elsewhere = HEADER.match(place) or HEADER.match(message.text + " ")
        if message.type == "error" and not self.left and not is_asked_elsewhere:
            self.errors.append(f"{message.text} ({place}:{message.location.get('lineNumber', '')})")

    @property
    def outside(self) -> list[str]:
        """The requests that went elsewhere than to this machine, and are not those of the header."""
        parsed = [(url, urlparse(url)) for url in self.requests]
        return [
            url
            for url, at in parsed
            if at.scheme not in ("data", "blob") and at.hostname not in LOOPBACK and not HEADER.match(url)
        ]


@dataclass
class Visitors:
    """Makes visitors: each is a page in a context of its own. Call it with what `Browser.new_context` takes.

    Attributes:
        excused: patterns of errors in the console that a test causes on purpose.
    """

    browser: Browser
    visits: list[Visit] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)

    def __call__(self, **options: Any) -> Page:
        defaults = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", "locale": "en-GB"}
        context = self.browser.new_context(**{**defaults, **options})
        context.tracing.start(screenshots=True, snapshots=True)
        context.set_default_timeout(PATIENCE)
        visit = Visit(context, context.new_page())
        self.visits.append(visit)
        return visit.page

    def excuse(self, pattern: str) -> None:
        """Expect an error in the console, as of a request that is refused."""
        self.excused.append(pattern)

    def requests(self, page: Page) -> list[str]:
        """Return the addresses of all requests of a visitor so far."""
        return next(visit.requests for visit in self.visits if visit.context == page.context)

    @property
    def complaints(self) -> list[str]:
        """What went wrong and was not excused."""
        errors = [error for visit in self.visits for error in visit.errors]
        said = [error for error in errors if not any(re.search(pattern, error) for pattern in self.excused)]
        return said + [f"left this machine: {url}" for visit in self.visits for url in visit.outside]

    def close(self, keep: str | None) -> None:
        """End all visits; `keep` names the folder that their traces and pictures go to."""
        for number, visit in enumerate(self.visits):
            if keep is not None:
                folder = results() / re.sub(r"[^\w.-]+", "_", keep)
                for index, page in enumerate(visit.context.pages):
                    page.screenshot(path=folder / f"visitor{number}-page{index}.png", full_page=True)
                visit.context.tracing.stop(path=folder / f"visitor{number}-trace.zip")
            visit.context.close()
