"""Who is let in at all, before any part of the page runs: one piece of middleware around the whole server.

On a public host Gradio lets pages of all sites call it, and the cookie of a sign-in goes along (`SameSite=None`).
"""

from __future__ import annotations

from typing import Any

import security
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class Gate:
    """Take another site's page for a stranger, whoever has signed in in its browser.

    A page that may use the folders and the token of this machine refuses it, and refuses to be called by another name
    than this machine's: a site can let its own name point here, and would then be the same site.

    Args:
        app: what is behind it.
        local: whether the page may use the folders and the token of this machine.
    """

    def __init__(self, app: ASGIApp, *, local: bool):
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, without the visitor's session if another site sent it."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            foreign = security.is_foreign(headers) and not _is_visit(scope["method"], headers)
            if self.local and (said := _refusal(headers, foreign=foreign)):
                await PlainTextResponse(said, 403)(scope, receive, send)
                return
            if foreign and "session" in scope:
                scope = {**scope, "session": type(scope["session"])()}
        await self.app(scope, receive, send)


def _is_visit(method: str, headers: Headers) -> bool:
    """Tell whether a person follows a link here, or comes back from signing in: only the address is another site's."""
    return method == "GET" and "origin" not in headers and headers.get("sec-fetch-mode") == "navigate"


def _refusal(headers: Headers, *, foreign: bool) -> str:
    if not security.is_loopback(headers.get("host", "")):
        return "This page is for who sits at this machine: open it as http://127.0.0.1 or http://localhost."
    return "This was asked from another site's page: open this page itself." if foreign else ""


def around(*, local: bool) -> dict[str, Any]:
    """Return the gate as `app_kwargs` of `Blocks.launch`."""
    return {"middleware": [Middleware(Gate, local=local)]}
