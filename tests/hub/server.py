"""A Hub on loopback: the HTTP API that the clients of Hugging Face speak, over a `Store`.

It logs every request, and fails as told (`Fault`), so that tests see what a client does with a bad Hub.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.hub.store import DATE, LARGE, Blob, Commit, Discussion, HubError, Repo, Store, Token, card_data, config

LARGE_FROM = 10_000_000
UNKNOWN = 501  # the status of endpoints that this Hub lacks


@dataclass
class Seen:
    """One request, as the server saw it."""

    method: str
    path: str
    query: str
    range: str | None
    agent: str
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """How requests are to fail.

    Attributes:
        kind: `error` answers `status`; `hang` waits `seconds` first; `cut` closes the connection after `after` bytes
            of the body; `short` sends `after` bytes and says that this is all.
        path: a pattern that is searched in the path.
        first, last: which of the requests that match; the first is 1, and no last means all later ones.
    """

    kind: Literal["error", "hang", "cut", "short"]
    path: str
    method: str | None = None
    first: int = 1
    last: int | None = None
    status: int = 500
    seconds: float = 5
    after: int = 0
    matched: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Count the request if it matches, and say whether it fails."""
        if self.method not in (None, method) or not re.search(self.path, path):
            return False
        self.matched += 1
        return self.first <= self.matched <= (self.last or self.matched)


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
        query, agent = scope["query_string"].decode(), headers.get("user-agent", "")
        seen = Seen(scope["method"], unquote(path), query, headers.get("range"), agent)
        self.log.append(seen)
        struck = [fault for fault in self.faults if fault.strikes(seen.method, seen.path)]
        for fault in struck:
            if fault.kind == "hang":
                await asyncio.sleep(fault.seconds)
        refused = next((fault for fault in struck if fault.kind == "error"), None)
        app = PlainTextResponse("told to fail", refused.status) if refused else self.app
        try:
            await app(scope, receive, _counted(send, seen, struck))
        except Cut:
            return  # uvicorn closes a connection whose response is not whole


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


@dataclass
class Hub:
    """The running server.

    Attributes:
        url: what HF_ENDPOINT is to be.
        store: what it holds; tests may look at it and change it.
        log: every request.
        faults: how requests are to fail.
    """

    store: Store = field(default_factory=Store)
    log: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        watched = Watch(application(self.store, self.url), self.log, self.faults)
        settings = uvicorn.Config(
            watched, http="h11", ws="none", lifespan="off", log_level="critical", access_log=False
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()


def application(store: Store, url: str) -> ASGIApp:
    """Return all endpoints over a store."""
    api = Api(store, url)
    model, rev = "/api/models/{ns}/{name}", "{rev}"
    routes = [
        ("GET", "/api/whoami-v2", api.whoami),
        ("GET", "/api/agent-harnesses", api.harnesses),
        ("POST", "/api/validate-yaml", api.validate_yaml),
        ("POST", "/api/repos/create", api.create),
        ("DELETE", "/api/repos/delete", api.delete),
        ("GET", "/api/models/{name}", api.info),
        ("GET", f"/api/models/{{name}}/revision/{rev}", api.info),
        ("GET", model, api.info),
        ("GET", f"{model}/revision/{rev}", api.info),
        ("GET", f"{model}/tree/{rev}", api.tree),
        ("GET", f"{model}/tree/{rev}/{{path:path}}", api.tree),
        ("POST", f"{model}/paths-info/{rev}", api.paths_info),
        ("GET", f"{model}/refs", api.refs),
        ("GET", f"{model}/commits/{rev}", api.commits),
        ("POST", f"{model}/preupload/{rev}", api.preupload),
        ("POST", f"{model}/commit/{rev}", api.commit),
        ("POST", f"{model}/branch/{{branch}}", api.create_branch),
        ("DELETE", f"{model}/branch/{{branch}}", api.delete_branch),
        ("POST", f"{model}/tag/{rev}", api.create_tag),
        ("GET", f"{model}/discussions", api.discussions),
        ("POST", f"{model}/discussions", api.discuss),
        ("GET", f"{model}/discussions/{{num:int}}", api.discussion),
        ("POST", "/{ns}/{name}.git/info/lfs/objects/batch", api.large_batch),
        ("PUT", "/lfs/{oid}", api.large_put),
        ("POST", "/lfs/{oid}/verify", api.large_verify),
        ("POST", f"{model}/lfs-files/duplicate", api.duplicate),
        ("GET", "/{ns}/{name}/resolve/{rev}/{path:path}", api.resolve),
    ]
    made = [Route(path, answer, methods=[method]) for method, path, answer in routes]
    everything = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    return Starlette(
        routes=[*made, Route("/{path:path}", api.unknown, methods=everything)],
        exception_handlers={HubError: _refused},
    )


async def _refused(_: Request, error: Exception) -> Response:
    """Say no as the Hub says it: in headers."""
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": error.message}
    if error.code:
        headers["X-Error-Code"] = error.code
    if error.commit:
        headers["X-Repo-Commit"] = error.commit
    return JSONResponse({"error": error.message}, error.status, headers)


@dataclass(frozen=True)
class Api:
    """The endpoints."""

    store: Store
    url: str

    def token(self, request: Request) -> Token | None:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        return self.store.token(bearer or None)

    def readable(self, request: Request) -> tuple[Repo, Commit]:
        """Return the repository and the commit that a path names, to show what is in it."""
        repo = self.store.repo(_id(request), self.token(request))
        return repo, repo.commit(_revision(request))

    def writable(self, request: Request) -> tuple[Repo, Token]:
        token = self.token(request)
        repo = self.store.writable(_id(request), token)
        assert token is not None
        return repo, token

    async def unknown(self, _: Request) -> Response:
        return PlainTextResponse("this Hub has no such endpoint", UNKNOWN)

    async def whoami(self, request: Request) -> Response:
        token = self.token(request)
        if token is None:
            raise HubError(401, "", "Invalid username or password.")
        access = {"displayName": "test", "role": "write" if token.write else "read"}
        user = {"type": "user", "id": token.user, "name": token.user, "fullname": token.user, "orgs": []}
        return JSONResponse({**user, "auth": {"type": "access_token", "accessToken": access}})

    async def harnesses(self, _: Request) -> Response:
        """Which programs may drive a command line; every one that huggingface_hub makes asks for it once a day."""
        return JSONResponse({"standardEnvVars": [], "harnesses": {}})

    async def validate_yaml(self, request: Request) -> Response:
        body = await request.json()
        match = re.match(r"---\n(.*?)\n---", body["content"], re.DOTALL)
        try:
            found = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return PlainTextResponse(f"- Error: {error}", 400)
        wrong = [] if isinstance(found, dict) else [{"message": "the metadata is no mapping"}]
        return JSONResponse({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    async def create(self, request: Request) -> Response:
        body, token = await request.json(), self.token(request)
        repo_id = _wanted(body, token)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        status = 200
        try:
            self.store.create(repo_id, token, private)
        except HubError as error:
            if error.status != 409:
                raise
            status = 409
        return JSONResponse({"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}, status)

    async def delete(self, request: Request) -> Response:
        token = self.token(request)
        self.store.delete(_wanted(await request.json(), token), token)
        return JSONResponse({})

    async def info(self, request: Request) -> Response:
        repo, commit = self.readable(request)
        told = _info(repo, commit, blobs=request.query_params.get("blobs", "").lower() in ("true", "1"))
        expand = request.query_params.getlist("expand") + request.query_params.getlist("expand[]")
        return JSONResponse({key: value for key, value in told.items() if not expand or key in ("id", *expand)})

    async def tree(self, request: Request) -> Response:
        _, commit = self.readable(request)
        folder = request.path_params.get("path", "").strip("/")
        below = f"{folder}/" if folder else ""
        if below and not any(path.startswith(below) for path in commit.files):
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on this revision", commit.sha)
        deep = request.query_params.get("recursive", "").lower() in ("true", "1")
        entries = [entry for entry in _entries(commit) if entry["path"].startswith(below)]
        return JSONResponse([each for each in entries if deep or "/" not in each["path"][len(below) :]])

    async def paths_info(self, request: Request) -> Response:
        _, commit = self.readable(request)
        wanted = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse([entry for entry in _entries(commit) if entry["path"] in wanted])

    async def refs(self, request: Request) -> Response:
        repo = self.store.repo(_id(request), self.token(request))

        def under(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit.sha}
                for ref, commit in repo.refs.items()
                if ref.startswith(prefix)
            ]

        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        return JSONResponse({"converts": [], **{kind: under(prefix) for kind, prefix in kinds.items()}})

    async def commits(self, request: Request) -> Response:
        _, head = self.readable(request)
        return JSONResponse([
            {"id": each.sha, "title": each.title, "message": each.message, "date": DATE,
             "authors": [{"user": each.author}]}
            for each in head.history()
        ])  # fmt: skip

    async def preupload(self, request: Request) -> Response:
        repo, _ = self._committable(request)
        files = repo.commit(_revision(request)).files
        return JSONResponse({"files": [_mode(asked, files) for asked in (await request.json())["files"]]})

    def _committable(self, request: Request) -> tuple[Repo, Token]:
        """Return what a commit goes to: anyone may open a pull request, others need the right to write."""
        token = self.token(request)
        if request.query_params.get("create_pr") != "1" or token is None or not token.write:
            return self.writable(request)
        return self.store.readable(_id(request), token), token

    async def commit(self, request: Request) -> Response:
        repo, token = self._committable(request)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        revision = _revision(request)
        head = repo.commit(revision)
        if header.get("parentCommit") not in (None, head.sha):
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            self._change(files, line["key"], line["value"])
        pull = None
        if request.query_params.get("create_pr") == "1":
            pull = repo.discuss(header["summary"], token.user, pull_request=True, base=revision)
            revision = pull.ref
        made = repo.add(revision, files, header["summary"], token.user, header.get("description", ""))
        page = f"{self.url}/{repo.id}"
        told = {"success": True, "commitOid": made.sha, "commitUrl": f"{page}/commit/{made.sha}"}
        return JSONResponse({**told, "pullRequestUrl": f"{page}/discussions/{pull.num}" if pull else None})

    def _change(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit."""
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.store.large:
                raise HubError(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = Blob(self.store.large[value["oid"]], large=True)
        elif key == "deletedFile":
            del files[value["path"]]
        elif key == "deletedFolder":
            below = value["path"].rstrip("/") + "/"
            for path in [path for path in files if path.startswith(below)]:
                del files[path]

    async def create_branch(self, request: Request) -> Response:
        repo, _ = self.writable(request)
        start = (await request.json()).get("startingPoint", "main") if await request.body() else "main"
        return self._new_ref(repo, f"refs/heads/{unquote(request.path_params['branch'])}", start)

    async def delete_branch(self, request: Request) -> Response:
        repo, _ = self.writable(request)
        if repo.refs.pop(f"refs/heads/{unquote(request.path_params['branch'])}", None) is None:
            raise HubError(404, "RevisionNotFound", "no such branch")
        return JSONResponse({})

    async def create_tag(self, request: Request) -> Response:
        repo, _ = self.writable(request)
        return self._new_ref(repo, f"refs/tags/{(await request.json())['tag']}", _revision(request))

    def _new_ref(self, repo: Repo, name: str, start: str) -> Response:
        if name in repo.refs:
            raise HubError(409, "", f"Reference already exists: {name}")
        repo.refs[name] = repo.commit(start)
        return JSONResponse({})

    async def discussions(self, request: Request) -> Response:
        repo = self.store.repo(_id(request), self.token(request))
        told = [_discussion(repo, each) for each in repo.discussions]
        return JSONResponse({"discussions": told, "count": len(told), "start": 0})

    async def discuss(self, request: Request) -> Response:
        token = self.token(request)
        repo = self.store.readable(_id(request), token)
        if token is None or not token.write:
            raise HubError(403, "", "A token with the right to write is needed")
        body = await request.json()
        return JSONResponse({"num": repo.discuss(body["title"], token.user, bool(body.get("pullRequest"))).num})

    async def discussion(self, request: Request) -> Response:
        repo, num = self.store.repo(_id(request), self.token(request)), request.path_params["num"]
        if not 1 <= num <= len(repo.discussions):
            raise HubError(404, "", "no such discussion")
        found = repo.discussions[num - 1]
        more = {"changes": {"base": found.base}, "filesWithConflicts": []} if found.pull_request else {}
        return JSONResponse({**_discussion(repo, found), "events": [], **more})

    async def large_batch(self, request: Request) -> Response:
        token = self.token(request)
        if token is None or not token.write:
            raise HubError(403, "", "A token with the right to write is needed")
        self.store.readable(_id(request), token)
        told = []
        for wanted in (await request.json())["objects"]:
            href = f"{self.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify", "header": {}}}
            known = wanted["oid"] in self.store.large
            told.append({**wanted, **({} if known else {"actions": actions})})
        return JSONResponse({"transfer": "basic", "objects": told})

    async def large_put(self, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            raise HubError(400, "", "the content is not what its sha256 says")
        self.store.large[request.path_params["oid"]] = content
        return Response()

    async def large_verify(self, request: Request) -> Response:
        kept = self.store.large.get(request.path_params["oid"])
        if kept is None or len(kept) != (await request.json())["size"]:
            raise HubError(404, "", "no such object")
        return JSONResponse({})

    async def duplicate(self, request: Request) -> Response:
        """Give large files of one repository to another, without sending them."""
        token, body = self.token(request), await request.json()
        source = self.store.readable(_id(request), token)
        self.store.writable(body["target"]["name"], token)
        commits = [commit for head in source.refs.values() for commit in head.history()]
        held = {blob.sha256: blob.content for commit in commits for blob in commit.files.values() if blob.large}
        wanted = [each["sha256"] for each in body["files"]]
        self.store.large |= {oid: held[oid] for oid in wanted if oid in held}
        return JSONResponse({"failed": [{"sha256": oid, "error": "not here"} for oid in wanted if oid not in held]})

    async def resolve(self, request: Request) -> Response:
        repo = self.store.readable(_id(request), self.token(request))
        commit, path = repo.commit(_revision(request)), request.path_params["path"]
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        return _ranged(blob.content, request.headers.get("range"), headers)


def _id(request: Request) -> str:
    """Return the id that a path names; the oldest models have no namespace."""
    return "/".join(request.path_params[part] for part in ("ns", "name") if part in request.path_params)


def _revision(request: Request) -> str:
    return unquote(request.path_params.get("rev", "main"))


def _wanted(body: dict[str, Any], token: Token | None) -> str:
    """Return the id of the repository that a request to make or delete one names."""
    namespace = body.get("organization") or (token.user if token else "")
    return f"{namespace}/{body['name']}"


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    card = card_data(commit)
    bases = card.get("base_model", [])
    tags = [*card.get("tags", []), *(f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases))]
    return {
        "id": repo.id, "modelId": repo.id, "author": repo.namespace, "sha": commit.sha, "private": repo.private,
        "gated": "auto" if repo.gated else False, "disabled": False, "downloads": 0, "likes": 0,
        "createdAt": DATE, "lastModified": DATE, "tags": tags, "cardData": card, "config": config(commit),
        "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "spaces": [],
        "siblings": [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
    }  # fmt: skip


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}} if blob.large else {}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid, **lfs}


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """Return every folder and file of a commit as the Hub lists them."""
    parts = [path.split("/") for path in commit.files]
    folders = sorted({"/".join(names[:depth]) for names in parts for depth in range(1, len(names))})
    listed = [{"type": "directory", "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0, "path": f} for f in folders]
    for path, blob in sorted(commit.files.items()):
        about = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        lfs = {"lfs": about, "xetHash": blob.sha256} if blob.large else {}
        listed.append({"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **lfs})
    return listed


def _mode(asked: dict[str, Any], files: dict[str, Blob]) -> dict[str, Any]:
    """Say how a file is to be sent, and the id of what is there."""
    path = asked["path"]
    large = path.endswith(LARGE) or asked["size"] > LARGE_FROM
    there = {"oid": files[path].etag} if path in files else {}
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **there}


def _discussion(repo: Repo, found: Discussion) -> dict[str, Any]:
    return {
        "title": found.title, "num": found.num, "author": {"name": found.author}, "createdAt": DATE,
        "status": "open", "repo": {"name": repo.id, "type": "model"}, "isPullRequest": found.pull_request,
    }  # fmt: skip


def _ranged(content: bytes, asked: str | None, headers: dict[str, str]) -> Response:
    """Answer with all of a file, or with the bytes that were asked for."""
    media, size = "application/octet-stream", len(content)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if match is None or not any(match.groups()):
        return Response(content, 200, headers, media)
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size or end < start:
        return Response(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
    return Response(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"}, media)
