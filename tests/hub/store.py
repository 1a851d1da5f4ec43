"""What a Hub holds: accounts with tokens, and repositories with commits, branches and pull requests, in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

DATE = "2026-01-02T03:04:05.000Z"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".parquet")


class HubError(Exception):
    """A request that the Hub refuses: a status, a code as the clients know it, and words."""

    def __init__(self, status: int, code: str, message: str, commit: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


@dataclass(frozen=True)
class Token:
    """What a request may do.

    Attributes:
        user: whose it is.
        write: whether it may write.
        app: to which app the user has given it, by signing in there; None: to nobody.
        scopes: what such an app may do for the user.
    """

    user: str
    write: bool
    app: str | None = None
    scopes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether it is kept by LFS."""

    content: bytes
    large: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git keeps instead of a large file."""
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """The id that git gives it."""
        kept = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    files: dict[str, Blob]
    title: str
    author: str
    parent: Commit | None = None
    message: str = ""

    @cached_property
    def sha(self) -> str:
        told = [self.parent.sha if self.parent else "", self.title, self.message, self.author]
        told += [f"{path} {blob.oid}" for path, blob in sorted(self.files.items())]
        return hashlib.sha1("\n".join(told).encode()).hexdigest()

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        found: list[Commit] = []
        commit: Commit | None = self
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found


@dataclass
class Discussion:
    """A discussion, or a pull request."""

    num: int
    title: str
    author: str
    pull_request: bool
    base: str = "refs/heads/main"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """A model, a dataset or a Space on the Hub.

    Attributes:
        kind: `models`, `datasets` or `spaces`.
        sdk: what a Space is made with.
        app: the app that has made it for a user, if one has.
        downloads: how often it was; the order of a search.
        gated: only users of `granted` may read its files.
        refs: full name of a branch, tag or pull request -> its commit.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    kind: str = "models"
    sdk: str | None = None
    app: str | None = None
    downloads: int = 0

    @classmethod
    def new(cls, repo_id: str, author: str, private: bool = False, kind: str = "models") -> Repo:
        """Return a repository as the Hub makes it: with a .gitattributes and nothing else."""
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        first = Commit({".gitattributes": Blob(attributes.encode())}, f"initial commit of {repo_id}", author)
        return cls(repo_id, private, refs={"refs/heads/main": first}, kind=kind)

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    def ref_name(self, revision: str) -> str | None:
        """Return the full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit:
        """Return the commit of a branch, tag, pull request or (short) sha."""
        name = self.ref_name(revision)
        if name is not None:
            return self.refs[name]
        known = [commit for head in self.refs.values() for commit in head.history()]
        found = next((each for each in known if len(revision) >= 7 and each.sha.startswith(revision)), None)
        if found is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def add(
        self, revision: str, files: dict[str, Blob], title: str, author: str, message: str = "", empty: bool = False
    ) -> Commit:
        """Put a state on a branch or pull request; the same state is no new commit unless `empty` ones are made."""
        name = self.ref_name(revision)
        if name is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head = self.refs[name]
        if empty or files != head.files:
            self.refs[name] = Commit(files, title, author, head, message)
        return self.refs[name]

    def discuss(self, title: str, author: str, pull_request: bool, base: str = "main") -> Discussion:
        """Open a discussion or a pull request from a branch."""
        made = Discussion(len(self.discussions) + 1, title, author, pull_request, f"refs/heads/{base}")
        self.discussions.append(made)
        if pull_request:
            self.refs[made.ref] = self.commit(base)
        return made


@dataclass
class Job:
    """A job: what was asked for, and what has become of it.

    Attributes:
        spec: the request, as the client sent it.
        stages: where it is, and where it will be each time that it is looked at.
        logs: its lines.
    """

    id: str
    namespace: str
    spec: dict[str, Any]
    stages: list[str]
    logs: list[str]


@dataclass
class Store:
    """All that the Hub holds.

    Attributes:
        repos: `ns/name` of a model, `datasets/ns/name` or `spaces/ns/name` -> what it is.
        large: sha256 -> content of every large file that has arrived, by LFS or Xet.
        buckets: `ns/name` of a bucket -> its files.
    """

    tokens: dict[str, Token] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    buckets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)

    def token(self, text: str | None) -> Token | None:
        """Return what a token may do; None where there is none."""
        if text is None:
            return None
        if text not in self.tokens:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return self.tokens[text]

    def object(self, sha256: str) -> bytes | None:
        """Return a large file that has arrived, or that a test has put into a repository itself."""
        if sha256 not in self.large:
            commits = [
                commit for repo in self.repos.values() for head in repo.refs.values() for commit in head.history()
            ]
            put = {blob.sha256: blob.content for commit in commits for blob in commit.files.values() if blob.large}
            self.large |= put
        return self.large.get(sha256)

    def repo(self, repo_id: str, token: Token | None) -> Repo:
        """Return a repository that the token may see; a hidden one looks like a missing one."""
        repo = self.repos.get(repo_id)
        if repo is None or not self.sees(repo, token):
            raise HubError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def sees(self, repo: Repo, token: Token | None) -> bool:
        """Say whether a repository is there for a token; for an app, the private ones that it has made."""
        if not repo.private:
            return True
        if token is None or token.user != repo.namespace:
            return False
        return token.app in (None, repo.app) or "read-repos" in token.scopes

    def readable(self, repo_id: str, token: Token | None) -> Repo:
        """Return a repository whose files the token may read."""
        repo = self.repo(repo_id, token)
        user = token.user if token else None
        if token and token.app and "gated-repos" not in token.scopes:
            user = None
        if repo.gated and user != repo.namespace and user not in repo.granted:
            page = f"Access to model {repo_id} is restricted. You must have access to it and be authenticated."
            raise HubError(401 if token is None else 403, "GatedRepo", page)
        return repo

    def writable(self, repo_id: str, token: Token | None) -> Repo:
        """Return a repository that the token may change."""
        repo = self.repo(repo_id, token)
        writer = require_write(repo.namespace, token)
        if writer.app not in (None, repo.app):
            raise HubError(403, "", f"The app has not made '{repo_id}', and may not change it")
        return repo

    def create(self, repo_id: str, token: Token | None, private: bool = False) -> Repo:
        """Make an empty repository."""
        kind, plain = kind_and_id(repo_id)
        writer = require_write(plain.partition("/")[0], token)
        if repo_id in self.repos:
            raise HubError(409, "", f"You already created this {kind[:-1]} repo")
        self.repos[repo_id] = Repo.new(plain, writer.user, private, kind)
        self.repos[repo_id].app = writer.app
        return self.repos[repo_id]

    def delete(self, repo_id: str, token: Token | None) -> None:
        """Forget a repository."""
        self.writable(repo_id, token)
        del self.repos[repo_id]


def kind_and_id(repo_id: str) -> tuple[str, str]:
    """Take the id that the store knows a repository by apart."""
    kind, _, plain = repo_id.partition("/")
    return (kind, plain) if kind in ("datasets", "spaces") else ("models", repo_id)


def require_write(namespace: str, token: Token | None) -> Token:
    """Return the token if it may write there."""
    if token is None:
        raise HubError(401, "", "Invalid username or password.")
    if not token.write or token.user != namespace:
        raise HubError(403, "", f"You don't have the rights to write under the namespace '{namespace}'")
    return token


def card_data(commit: Commit) -> dict:
    """Return the metadata of a card."""
    card = commit.files.get("README.md", Blob(b"")).content.decode()
    if not card.startswith("---\n"):
        return {}
    return yaml.safe_load(card[4:].partition("\n---")[0]) or {}


def config(commit: Commit) -> dict:
    """Return what the Hub shows of config.json."""
    whole = json.loads(commit.files.get("config.json", Blob(b"{}")).content)
    return {key: whole[key] for key in ("architectures", "model_type") if key in whole}
