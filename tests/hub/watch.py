"""What stands before the endpoints of the Hub: it logs every request, and fails as told."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.hub.store import HubError


@dataclass
class Seen:
    """One request, as the server saw it.

    Attributes:
        authorized: whether there was an Authorization header; no header is kept.
        user: whose token it was.
        body: what a request of JSON said; of lines of JSON a list.
        status: what the client was told; of a request that was carried out `twice`, the failure.
        sent: bytes of the answer's body.
    """

    method: str
    path: str
    query: str
    range: str | None
    agent: str
    authorized: bool = False
    user: str | None = None
    body: Any = None
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """How requests are to fail.

    The n-th request of a push, whatever it asks for, is `Fault(kind, "", first=n, last=n)`: an empty pattern and no
    method match everything. Large files are sent by the CDN and come from it, under
    `/cdn/<namespace>/<name>/<sha256>/<file>`; what Xet transfers is no request, but its tokens are
    (`xet-write-token`, `xet-read-token`).

    Attributes:
        kind: `error` answers `status` and does nothing. `forbidden` refuses as the Hub refuses a token without the
            right to write (403). `hang` waits `seconds` first, or until `over` is set. `twice` carries the request
            out and answers `status`, so that a client that repeats it meets what it did. `cut` carries it out and
            closes the connection after `after` bytes of the answer's body, if it has one. `short` sends `after` bytes
            and says that this is all.
        path: a pattern that is searched in the path.
        method: only requests of this method; None means any.
        first, last: which of the requests that match; the first is 1, and no last means all later ones.
        matched: how many matched so far.
    """

    kind: Literal["error", "forbidden", "hang", "twice", "cut", "short"]
    path: str
    method: str | None = None
    first: int = 1
    last: int | None = None
    status: int = 500
    seconds: float = 5
    after: int = 0
    over: threading.Event | None = None
    matched: int = 0

    async def wait(self) -> None:
        """Let a request hang."""
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0 and not (self.over and self.over.is_set()):
            await asyncio.sleep(min(left, 0.02) if self.over else left)

    def strikes(self, method: str, path: str) -> bool:
        """Count the request if it matches, and say whether it fails."""
        if self.method not in (None, method) or not re.search(self.path, path):
            return False
        self.matched += 1
        return self.first <= self.matched <= (self.last or self.matched)

    @property
    def answer(self) -> Response:
        if self.kind == "forbidden":
            return refusal(HubError(403, "", "Forbidden: this token may not write here"))
        return PlainTextResponse("told to fail", self.status)


def refusal(error: HubError) -> Response:
    """Say no as the Hub says it: in headers."""
    headers = {"X-Error-Message": error.message}
    if error.code:
        headers["X-Error-Code"] = error.code
    if error.commit:
        headers["X-Repo-Commit"] = error.commit
    return JSONResponse({"error": error.message}, error.status, headers)


class Cut(Exception):
    """The connection ends here."""


@dataclass
class Watch:
    """The outermost layer: keeps quoted slashes in a path, logs, and fails as told."""

    app: ASGIApp
    log: list[Seen]
    faults: list[Fault]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["raw_path"].decode()
        scope = {**scope, "path": unquote(re.sub("%2f", "%252F", path, flags=re.IGNORECASE))}
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query, agent, known = scope["query_string"].decode(), headers.get("user-agent", ""), "authorization" in headers
        seen = Seen(scope["method"], unquote(path), query, headers.get("range"), agent, known)
        self.log.append(seen)
        scope["seen"] = seen
        if "json" in headers.get("content-type", ""):
            receive, seen.body = await _read(receive, lines="ndjson" in headers["content-type"])
        struck = [fault for fault in self.faults if fault.strikes(seen.method, seen.path)]
        for fault in struck:
            if fault.kind == "hang":
                await fault.wait()
        try:
            await self._answered(scope, receive, _counted(send, seen, struck), struck)
        except Cut:
            return  # uvicorn closes a connection whose response is not whole

    async def _answered(self, scope: Scope, receive: Receive, send: Send, struck: list[Fault]) -> None:
        """Carry a request out, or refuse it, or first the one and then the other."""
        refused = next((fault for fault in struck if fault.kind in ("error", "forbidden")), None)
        twice = next((fault for fault in struck if fault.kind == "twice"), None)
        if refused is None and twice is not None:
            await self.app(scope, receive, _nowhere)
        failure = refused or twice
        await (failure.answer if failure else self.app)(scope, receive, send)


async def _nowhere(_: Message) -> None:
    """Send nothing."""


async def _read(receive: Receive, lines: bool) -> tuple[Receive, Any]:
    """Read a body of JSON; return a way to read it again, and what it says."""
    content, more = b"", True
    while more:
        message = await receive()
        content += message.get("body", b"")
        more = message.get("more_body", False)

    async def again() -> Message:
        return {"type": "http.request", "body": content, "more_body": False}

    try:
        told = [json.loads(line) for line in content.splitlines()] if lines else json.loads(content or b"null")
    except ValueError:
        told = None
    return again, told


def _counted(send: Send, seen: Seen, faults: list[Fault]) -> Send:
    """Count what goes out, and end it early if a fault says so."""
    limit = min((fault.after for fault in faults if fault.kind in ("cut", "short")), default=None)
    short = any(fault.kind == "short" for fault in faults)

    async def counted(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen.status = message["status"]
            if short and limit is not None and seen.method == "GET":
                message = {**message, "headers": _with_length(message["headers"], limit)}
        elif message["type"] == "http.response.body":
            body = message.get("body", b"") if limit is None else message.get("body", b"")[:limit]
            seen.sent += len(body) if seen.method != "HEAD" else 0
            await send({**message, "body": body, "more_body": limit is not None and not short})
            if limit is not None and not short:
                raise Cut
            return
        await send(message)

    return counted


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    """Replace Content-Length where it is longer."""
    return [
        (name, str(min(length, int(value))).encode() if name == b"content-length" else value) for name, value in headers
    ]
