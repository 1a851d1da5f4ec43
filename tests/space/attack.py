"""What an attacker can send to the Space: any event of the page, as any site, with anybody's cookie."""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import BrowserContext, Page, Request

from tests.space.serving import App

SITE = "https://evil.example"
PATIENCE = 60


@dataclass
class Taped:
    """The events that a visitor's page sends, to be sent again by somebody else.

    Attributes:
        events: what was posted, by the name of the event's function; the last of each.
        cookie: the visitor's, as the browser sends it.
    """

    app: App
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    cookie: str = ""

    def __post_init__(self) -> None:
        self._names = {one["id"]: one["api_name"] for one in config(self.app)["dependencies"]}

    def watch(self, page: Page) -> None:
        """Keep what a page posts from now on."""
        page.on("request", self._seen)

    def steal(self, context: BrowserContext) -> None:
        """Keep the visitor's cookies."""
        self.cookie = "; ".join(f"{one.get('name')}={one.get('value')}" for one in context.cookies(self.app.url))

    def _seen(self, request: Request) -> None:
        if request.method == "POST" and request.url.endswith(("/queue/join", "/queue/join?")):
            body = request.post_data_json
            self.events[self._names[body["fn_index"]]] = body

    def send(
        self, name: str, *, site: str | None = None, session: str | None = None, data: list[Any] | None = None
    ) -> str:
        """Send an event again with the visitor's cookie; return all that the server answers.

        Args:
            name: of its function.
            site: the one that it comes from; by default the Space itself.
            session: of the page that it belongs to; by default the visitor's.
            data: instead of what was sent.
        """
        body = {**self.events[name], **({"session_hash": session} if session else {})}
        headers = {"Cookie": self.cookie, "Origin": site or self.app.url, "Content-Type": "application/json"}
        return event(self.app, {**body, "data": body["data"] if data is None else data}, headers)


def config(app: App) -> dict[str, Any]:
    """Return what the page is made of."""
    with urllib.request.urlopen(f"{app.url}/config", timeout=PATIENCE) as answer:
        return json.load(answer)


def event(app: App, body: dict[str, Any], headers: dict[str, str]) -> str:
    """Post an event of the page, and return the stream of its answers."""
    status, told = ask(app, "/gradio_api/queue/join", json.dumps(body).encode(), **headers)
    if status != 200:
        return told
    return ask(app, f"/gradio_api/queue/data?session_hash={body['session_hash']}", None, **headers)[1]


def call(app: App, name: str, arguments: dict[str, Any], **headers: str) -> str:
    """Call one of the functions for programs by REST, and return the stream of its answers."""
    path = f"/gradio_api/call/v2/{name}"
    headers = {"Content-Type": "application/json", **headers}
    status, told = ask(app, path, json.dumps(arguments).encode(), **headers)
    return told if status != 200 else ask(app, f"{path}/{json.loads(told)['event_id']}", None, **headers)[1]


def ask(app: App, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Send a request to the app as it stands; return status and text."""
    request = urllib.request.Request(f"{app.url}{path}", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with contextlib.closing(error):
            return error.code, error.read().decode(errors="replace")
