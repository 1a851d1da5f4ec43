"""A Hub on loopback: the HTTP API that the clients of Hugging Face speak, over a `Store`.

It logs every request, and fails as told (`Fault`), so that tests see what a client does with a bad Hub. Large files
arrive by LFS or by Xet, and leave by a CDN or by Xet, as the client likes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tests.hub.jobs import Endpoint, Jobs
from tests.hub.listing import brief, matching, visible_models
from tests.hub.openid import OpenID
from tests.hub.store import (
    DATE,
    LARGE,
    Blob,
    Commit,
    Discussion,
    HubError,
    Repo,
    Store,
    Token,
    card_data,
    config,
    kind_and_id,
)
from tests.hub.watch import Fault, Seen, Watch, refusal
from tests.hub.xet import Xet, expiry

LARGE_FROM = 10_000_000
UNKNOWN = 501  # the status of endpoints that this Hub lacks


@dataclass
class Switches:
    """What tests may change of a running Hub; every test starts with these.

    Attributes:
        xet: whether large files are said to be in Xet storage, as the Hub says of all; a client without Xet then
            follows `resolve/` to the CDN, and one that is told of no Xet takes the address of the CDN at once.
        xet_keeps: whether Xet storage still has what is asked of it; without, downloads by Xet break off.
        page_size: entries of a page of a tree, of commits and of jobs.
        empty_commits: whether a commit that changes nothing is a new one. huggingface_hub's `_send_commit` says that
            the Hub makes such commits; by default this one does not.
        job_stages: where a new job is each time that it is looked at.
        job_logs: what it says.
    """

    xet: bool = True
    xet_keeps: bool = True
    page_size: int = 1000
    empty_commits: bool = False
    job_stages: tuple[str, ...] = ("SCHEDULING", "RUNNING", "COMPLETED")
    job_logs: tuple[str, ...] = ("merged",)


@dataclass
class Hub:
    """The running server.

    Attributes:
        url: what HF_ENDPOINT is to be.
        cdn: where large files are sent to and come from: the same server under another name, to which no client may
            send a token of the Hub.
        store: what it holds; tests may look at it and change it.
        xet: the Xet storage.
        openid: where users sign in to apps.
        log: every request.
        faults: how requests are to fail.
        switches: what tests may change.
    """

    store: Store = field(default_factory=Store)
    xet: Xet = field(default_factory=Xet)
    log: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    switches: Switches = field(default_factory=Switches)
    openid: OpenID = field(init=False)
    url: str = ""
    cdn: str = ""
    secret: bytes = b"0"

    def __post_init__(self) -> None:
        self.openid = OpenID(self)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
        port = self._socket.getsockname()[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        watched = Watch(application(self), self.log, self.faults)
        settings = uvicorn.Config(
            watched, http="h11", ws="none", lifespan="off", log_level="critical", access_log=False
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def token(self, request: Request) -> Token | None:
        """Return what a request may do."""
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        token = self.store.token(bearer or None)
        request.scope["seen"].user = token.user if token else None
        return token

    def xet_token(self, address: str) -> Response:
        """Answer with the right to use a storage, in headers."""
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry())}
        told = {"casUrl": address, "accessToken": "xet", "exp": int(headers["X-Xet-Token-Expiration"])}
        return JSONResponse(told, headers=headers)

    def page(self, request: Request, entries: list[Any]) -> Response:
        """Answer with some of the entries, and say where there are more."""
        start, size = int(request.query_params.get("cursor", 0)), self.switches.page_size
        more = request.url.include_query_params(cursor=start + size)
        headers = {"Link": f'<{more}>; rel="next"'} if start + size < len(entries) else {}
        return JSONResponse(entries[start : start + size], headers=headers)

    def link(self, repo_id: str, oid: str, file: str | None = None) -> str:
        """Return an address at the CDN that opens an object for an hour, as a file if it is to be read."""
        expires, path = str(expiry()), f"{repo_id}/{oid}" + (f"/{file}" if file else "")
        signed = {"X-Amz-Signature": self._signature(repo_id, oid, expires), "Expires": expires}
        return f"{self.cdn}/cdn/{quote(path)}?{urlencode(signed)}"

    def opens(self, repo_id: str, oid: str, query: Mapping[str, str]) -> bool:
        """Say whether the query of an address at the CDN opens an object, still."""
        expires = query.get("Expires", "0")
        expected = self._signature(repo_id, oid, expires)
        return query.get("X-Amz-Signature") == expected and int(expires) > time.time()

    def expire_links(self) -> None:
        """Let all addresses at the CDN that were given so far answer 403; the Hub gives new ones to who asks again."""
        self.secret += b"0"

    def _signature(self, *signed: str) -> str:
        return hmac.new(self.secret, " ".join(signed).encode(), "sha256").hexdigest()

    def __enter__(self) -> Hub:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        self.xet.close()


def application(hub: Hub) -> ASGIApp:
    """Return all endpoints of a Hub."""
    api, jobs = Api(hub), Jobs(hub)
    routes = [
        ("GET", "/api/whoami-v2", api.whoami),
        ("GET", "/api/agent-harnesses", api.harnesses),
        ("POST", "/api/validate-yaml", api.validate_yaml),
        ("POST", "/api/repos/create", api.create),
        ("DELETE", "/api/repos/delete", api.delete),
        ("GET", "/api/models", api.models),
        ("GET", "/api/models/{name}", api.info),
        ("GET", "/api/models/{name}/revision/{rev}", api.info),
        *(route for kind in ("models", "datasets", "spaces") for route in _repo_routes(api, kind)),
        ("GET", "/cdn/{ns}/{name}/{oid}/{path:path}", api.cdn),
        ("PUT", "/cdn/{ns}/{name}/{oid}", api.large_put),
        *jobs.routes(),
        *hub.openid.routes(),
    ]
    made = [Route(path, answer, methods=[method]) for method, path, answer in routes]
    everything = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    return Starlette(
        routes=[*made, Route("/{path:path}", api.unknown, methods=everything)],
        exception_handlers={HubError: _refused},
    )


def _repo_routes(api: Api, kind: str) -> list[tuple[str, str, Endpoint]]:
    """Return the endpoints of models, of datasets or of Spaces."""
    repo, page = f"/api/{kind}/{{ns}}/{{name}}", "/{ns}/{name}" if kind == "models" else f"/{kind}/{{ns}}/{{name}}"
    return [
        ("GET", repo, api.info),
        ("GET", f"{repo}/revision/{{rev}}", api.info),
        ("GET", f"{repo}/tree/{{rev}}", api.tree),
        ("GET", f"{repo}/tree/{{rev}}/{{path:path}}", api.tree),
        ("POST", f"{repo}/paths-info/{{rev}}", api.paths_info),
        ("GET", f"{repo}/refs", api.refs),
        ("GET", f"{repo}/commits/{{rev}}", api.commits),
        ("POST", f"{repo}/preupload/{{rev}}", api.preupload),
        ("POST", f"{repo}/commit/{{rev}}", api.commit),
        ("POST", f"{repo}/branch/{{branch}}", api.create_branch),
        ("DELETE", f"{repo}/branch/{{branch}}", api.delete_branch),
        ("POST", f"{repo}/tag/{{rev}}", api.create_tag),
        ("GET", f"{repo}/discussions", api.discussions),
        ("POST", f"{repo}/discussions", api.discuss),
        ("GET", f"{repo}/discussions/{{num:int}}", api.discussion),
        ("POST", f"{repo}/lfs-files/duplicate", api.duplicate),
        ("GET", f"{repo}/xet-write-token/{{rev}}", api.xet_write),
        ("GET", f"{repo}/xet-read-token/{{rev}}", api.xet_read),
        ("POST", f"{page}.git/info/lfs/objects/batch", api.large_batch),
        ("POST", f"{page}.git/info/lfs/objects/verify", api.large_verify),
        ("GET", f"{page}/resolve/{{rev}}/{{path:path}}", api.resolve),
    ]


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    return refusal(error)


@dataclass(frozen=True)
class Api:
    """The endpoints."""

    hub: Hub

    @property
    def store(self) -> Store:
        return self.hub.store

    @property
    def url(self) -> str:
        return self.hub.url

    def readable(self, request: Request) -> tuple[Repo, Commit]:
        """Return the repository and the commit that a path names, to show what is in it."""
        repo = self.store.repo(_id(request), self.hub.token(request))
        return repo, repo.commit(_revision(request))

    def writable(self, request: Request) -> tuple[Repo, Token]:
        token = self.hub.token(request)
        repo = self.store.writable(_id(request), token)
        assert token is not None
        return repo, token

    async def unknown(self, _: Request) -> Response:
        return PlainTextResponse("this Hub has no such endpoint", UNKNOWN)

    async def whoami(self, request: Request) -> Response:
        token = self.hub.token(request)
        if token is None:
            raise HubError(401, "", "Invalid username or password.")
        access = {"displayName": "test", "role": "write" if token.write else "read"}
        user = {"type": "user", "id": token.user, "name": token.user, "fullname": token.user, "orgs": []}
        auth = {"type": "oauth"} if token.app else {"type": "access_token", "accessToken": access}
        return JSONResponse({**user, "avatarUrl": f"{self.url}/avatars/{token.user}.svg", "auth": auth})

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
        body, token = await request.json(), self.hub.token(request)
        repo_id = _wanted(body, token)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        status = 200
        try:
            self.store.create(repo_id, token, private).sdk = body.get("sdk")
        except HubError as error:
            if error.status != 409:
                raise
            status = 409
        return JSONResponse({"url": f"{self.url}/{repo_id}", "name": repo_id, "id": kind_and_id(repo_id)[1]}, status)

    async def delete(self, request: Request) -> Response:
        token = self.hub.token(request)
        self.store.delete(_wanted(await request.json(), token), token)
        return JSONResponse({})

    async def models(self, request: Request) -> Response:
        seen = visible_models(self.store, self.hub.token(request))
        found = matching((_info(repo, repo.commit("main"), blobs=False) for repo in seen), request.query_params)
        told = [brief(each, request.query_params) for each in found[: int(request.query_params.get("limit", 1000))]]
        return self.hub.page(request, told)

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
        entries = [entry for entry in self._entries(commit) if entry["path"].startswith(below)]
        return self.hub.page(request, [each for each in entries if deep or "/" not in each["path"][len(below) :]])

    def _entries(self, commit: Commit) -> list[dict[str, Any]]:
        """Return every folder and file of a commit as the Hub lists them."""
        parts = [path.split("/") for path in commit.files]
        folders = sorted({"/".join(names[:depth]) for names in parts for depth in range(1, len(names))})
        listed = [
            {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
            for path in folders
        ]
        for path, blob in sorted(commit.files.items()):
            listed.append({"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **self._large(blob)})
        return listed

    def _large(self, blob: Blob) -> dict[str, Any]:
        """Say how a file is kept that is large."""
        if not blob.large:
            return {}
        xet = {"xetHash": self.hub.xet.hash(blob)} if self.hub.switches.xet else {}
        return {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}, **xet}

    async def paths_info(self, request: Request) -> Response:
        _, commit = self.readable(request)
        wanted = parse_qs((await request.body()).decode())["paths"]
        return JSONResponse([entry for entry in self._entries(commit) if entry["path"] in wanted])

    async def refs(self, request: Request) -> Response:
        repo = self.store.repo(_id(request), self.hub.token(request))

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
        return self.hub.page(request, [
            {"id": each.sha, "title": each.title, "message": each.message, "date": DATE,
             "authors": [{"user": each.author}]}
            for each in head.history()
        ])  # fmt: skip

    async def preupload(self, request: Request) -> Response:
        repo, _ = self._committable(request)
        files = repo.commit(_revision(request)).files
        return JSONResponse({"files": [_mode(asked, files) for asked in (await request.json())["files"]]})

    def _committable(self, request: Request) -> tuple[Repo, Token]:
        """Return what a commit goes to: all may open a pull request and add to it, else it needs the right to write."""
        token = self.hub.token(request)
        if token is None or not token.write:
            return self.writable(request)
        if token.app is not None:  # to open pull requests is a right of its own
            return self.writable(request)
        repo, revision = self.store.readable(_id(request), token), _revision(request)
        own = [each.ref for each in repo.discussions if each.pull_request and each.author == token.user]
        if request.query_params.get("create_pr") == "1" or revision in own:
            return repo, token
        return self.writable(request)

    async def commit(self, request: Request) -> Response:
        repo, token = self._committable(request)
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        revision = _revision(request)
        head = repo.commit(revision)
        if header.get("parentCommit") not in (None, head.sha):
            raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        self._take(line["value"]["oid"] for line in lines if line["key"] == "lfsFile")
        for line in lines:
            self._change(files, line["key"], line["value"])
        pull = None
        if request.query_params.get("create_pr") == "1":
            pull = repo.discuss(header["summary"], token.user, pull_request=True, base=revision)
            revision = pull.ref
        empty = self.hub.switches.empty_commits
        made = repo.add(revision, files, header["summary"], token.user, header.get("description", ""), empty)
        page = f"{self.url}/{_id(request)}"
        told = {"success": True, "commitOid": made.sha, "commitUrl": f"{page}/commit/{made.sha}"}
        return JSONResponse({**told, "pullRequestUrl": f"{page}/discussions/{pull.num}" if pull else None})

    def _take(self, wanted: Iterable[str]) -> None:
        """Keep what has arrived by Xet of these files, as if by LFS."""
        self.store.large |= self.hub.xet.sent(oid for oid in wanted if self.store.object(oid) is None)

    def _change(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """Apply one line of a commit."""
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            content = self.store.object(value["oid"])
            if content is None:
                raise HubError(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = Blob(content, large=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", f"A file with the name {value['path']} does not exist")
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
        repo = self.store.repo(_id(request), self.hub.token(request))
        told = [_discussion(repo, each) for each in repo.discussions]
        return JSONResponse({"discussions": told, "count": len(told), "start": 0})

    async def discuss(self, request: Request) -> Response:
        token = self.hub.token(request)
        repo = self.store.readable(_id(request), token)
        if token is None or not token.write or token.app is not None:
            raise HubError(403, "", "A token with the right to write is needed")
        body = await request.json()
        return JSONResponse({"num": repo.discuss(body["title"], token.user, bool(body.get("pullRequest"))).num})

    async def discussion(self, request: Request) -> Response:
        repo, num = self.store.repo(_id(request), self.hub.token(request)), request.path_params["num"]
        if not 1 <= num <= len(repo.discussions):
            raise HubError(404, "", "no such discussion")
        found = repo.discussions[num - 1]
        more = {"changes": {"base": found.base}, "filesWithConflicts": []} if found.pull_request else {}
        return JSONResponse({**_discussion(repo, found), "events": [], **more})

    async def duplicate(self, request: Request) -> Response:
        """Give large files of one repository to another, before a commit there names them."""
        repo, body = self.store.readable(_id(request), self.hub.token(request)), await request.json()
        self.store.writable(_key(body["target"]["type"], body["target"]["name"]), self.hub.token(request))
        commits = [commit for head in repo.refs.values() for commit in head.history()]
        there = {blob.sha256 for commit in commits for blob in commit.files.values() if blob.large}
        failed = [{**file, "error": "no such file"} for file in body["files"] if file["sha256"] not in there]
        return JSONResponse({"failed": failed})

    def _sender(self, request: Request) -> None:
        """Refuse who may not send large files: all may who may open a pull request."""
        token = self.hub.token(request)
        if token is None or not token.write:
            raise HubError(403, "", "A token with the right to write is needed")
        (self.store.readable if token.app is None else self.store.writable)(_id(request), token)

    async def large_batch(self, request: Request) -> Response:
        self._sender(request)
        told = []
        for wanted in (await request.json())["objects"]:
            upload = {"href": self.hub.link(_plain_id(request), wanted["oid"]), "header": {}}
            verify = {"href": f"{self.url}/{_id(request)}.git/info/lfs/objects/verify", "header": {}}
            missing = self.store.object(wanted["oid"]) is None
            told.append({**wanted, **({"actions": {"upload": upload, "verify": verify}} if missing else {})})
        return JSONResponse({"transfer": "basic", "objects": told})

    async def large_put(self, request: Request) -> Response:
        self._opened(request)
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            raise HubError(400, "", "the content is not what its sha256 says")
        self.store.large[request.path_params["oid"]] = content
        return Response()

    async def large_verify(self, request: Request) -> Response:
        self._sender(request)
        body = await request.json()
        kept = self.store.object(body["oid"])
        if kept is None or len(kept) != body["size"]:
            raise HubError(404, "", "no such object")
        return JSONResponse({})

    def _opened(self, request: Request) -> None:
        """Refuse an address at the CDN that is not signed, too old, or asked with a token of the Hub besides."""
        if request.url.hostname != "localhost" or "authorization" in request.headers:
            raise HubError(400, "", "Only one auth mechanism allowed")
        if not self.hub.opens(_plain_id(request), request.path_params["oid"], request.query_params):
            raise HubError(403, "", "Request has expired")

    async def cdn(self, request: Request) -> Response:
        self._opened(request)
        content = self.store.object(request.path_params["oid"])
        assert content is not None  # the address was signed
        headers = {"ETag": f'"{request.path_params["oid"]}"', "Accept-Ranges": "bytes"}
        return _ranged(content, request.headers.get("range"), headers)

    async def xet_write(self, request: Request) -> Response:
        self._committable(request)
        return self.hub.xet_token(self.hub.xet.writable())

    async def xet_read(self, request: Request) -> Response:
        repo = self.store.readable(_id(request), self.hub.token(request))
        files = repo.commit(_revision(request)).files.values() if self.hub.switches.xet_keeps else ()
        return self.hub.xet_token(self.hub.xet.readable({blob.sha256: blob for blob in files if blob.large}.values()))

    async def resolve(self, request: Request) -> Response:
        """Answer with a small file, and with the address of a large one."""
        repo = self.store.readable(_id(request), self.hub.token(request))
        commit, path = repo.commit(_revision(request)), request.path_params["path"]
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", commit.sha)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            return _ranged(blob.content, request.headers.get("range"), headers)
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if self.hub.switches.xet:
            token = f"{self.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": self.hub.xet.hash(blob), "Link": f'<{token}>; rel="xet-auth"'}
        return RedirectResponse(self.hub.link(repo.id, blob.sha256, path), 302, headers)


def _id(request: Request) -> str:
    """Return the id by which the store knows the repository that a path names."""
    kind = re.match(r"(?:/api)?/(datasets|spaces)/", request.url.path)
    return f"{kind[1]}/{_plain_id(request)}" if kind else _plain_id(request)


def _plain_id(request: Request) -> str:
    """Return the id that a path names; the oldest models have no namespace."""
    return "/".join(request.path_params[part] for part in ("ns", "name") if part in request.path_params)


def _revision(request: Request) -> str:
    return unquote(request.path_params.get("rev", "main"))


def _wanted(body: dict[str, Any], token: Token | None) -> str:
    """Return the id of the repository that a request to make or delete one names."""
    namespace = body.get("organization") or (token.user if token else "")
    return _key(body.get("type") or "model", f"{namespace}/{body['name']}")


def _key(kind: str, repo_id: str) -> str:
    """Return the id by which the store knows a `model`, `dataset` or `space`."""
    return repo_id if kind == "model" else f"{kind}s/{repo_id}"


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    card = card_data(commit)
    bases = card.get("base_model", [])
    tags = [*card.get("tags", []), *(f"base_model:{base}" for base in ([bases] if isinstance(bases, str) else bases))]
    space = {"sdk": repo.sdk, "runtime": {"stage": "RUNNING", "hardware": {"current": "cpu-basic"}}}
    return {
        **(space if repo.kind == "spaces" else {}),
        "id": repo.id, "modelId": repo.id, "author": repo.namespace, "sha": commit.sha, "private": repo.private,
        "gated": "auto" if repo.gated else False, "disabled": False, "downloads": repo.downloads, "likes": 0,
        "createdAt": DATE, "lastModified": DATE, "tags": tags, "cardData": card, "config": config(commit),
        "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "spaces": [],
        "siblings": [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
    }  # fmt: skip


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"lfs": {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}} if blob.large else {}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid, **lfs}


def _mode(asked: dict[str, Any], files: dict[str, Blob]) -> dict[str, Any]:
    """Say how a file is to be sent, and the id of what is there."""
    path = asked["path"]
    large = path.endswith(LARGE) or asked["size"] > LARGE_FROM
    there = {"oid": files[path].etag} if path in files else {}
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **there}


def _discussion(repo: Repo, found: Discussion) -> dict[str, Any]:
    return {
        "title": found.title, "num": found.num, "author": {"name": found.author}, "createdAt": DATE,
        "status": "open", "repo": {"name": repo.id, "type": repo.kind[:-1]}, "isPullRequest": found.pull_request,
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
