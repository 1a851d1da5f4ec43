"""A server on loopback that keeps what it is sent, answers what it is told to, and passes the rest on to a Hub."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

UNTOUCHED = {"connection", "content-length", "date", "host", "server", "transfer-encoding"}


@dataclass
class Sent:
    """One request: its JSON as it came."""

    method: str
    path: str
    json: Any
    token: str | None


@dataclass
class Capture:
    """The running server.

    Attributes:
        behind: the address of a Hub that is asked for everything else; nothing else is there if not given.
        answers: by method and path, the JSON to answer with, or (status, JSON); a `code` in it is the Hub's for errors.
        sent: every request that was answered here.
        url: where it is.
    """

    behind: str | None = None
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Capture:
        capture = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                capture._handle(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        found = self.answers.get((request.command, path))
        if found is None and self.behind:
            self._pass_on(request, body)
            return
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.sent.append(Sent(request.command, path, _json(body), token))
        status, answer = found if isinstance(found, tuple) else (200, found) if found is not None else (501, {})
        headers = {"X-Error-Code": answer["code"]} if "code" in answer else {}
        _answer(request, status, {"Content-Type": "application/json", **headers}, json.dumps(answer).encode())

    def _pass_on(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in UNTOUCHED}
        asked = urllib.request.Request(f"{self.behind}{request.path}", body or None, headers, method=request.command)
        try:
            with _no_redirects.open(asked, timeout=60) as found:
                _answer(request, found.status, dict(found.headers), found.read())
        except urllib.error.HTTPError as found:
            _answer(request, found.code, dict(found.headers), found.read())

    def posted(self, path: str = "") -> list[Any]:
        """Return the JSON of every POST."""
        return [each.json for each in self.sent if each.method == "POST" and path in each.path]


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


_no_redirects = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}))


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return [json.loads(line) for line in body.splitlines() if line]


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
    request.send_response(status)
    for name, value in headers.items():
        if name.lower() not in UNTOUCHED:
            request.send_header(name, value)
    length = headers.get("content-length", headers.get("Content-Length")) if request.command == "HEAD" else len(body)
    request.send_header("Content-Length", str(length or 0))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
