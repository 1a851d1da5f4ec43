"""A Hub on loopback, and ways to run the real clients against it in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub import forked
from tests.hub.server import UNKNOWN, Hub, Switches
from tests.hub.store import LARGE, Blob, Repo, Token

ROOT = Path(__file__).resolve().parents[2]

# Code that makes huggingface_hub try again at once.
IMPATIENT = """
import huggingface_hub.utils._http
huggingface_hub.utils._http.time.sleep = lambda seconds: None
"""

# Code that says how hf_merge refuses to merge some models into `out`.
REFUSED = (
    IMPATIENT
    + """
import hf_merge
def told(*models, **more):
    try:
        hf_merge.merge(list(models), out, method="linear", **more)
    except hf_merge.MergeError as error:
        return [type(error).__name__, str(error)]
"""
)


@dataclass
class Account:
    """A namespace on the Hub and who acts for it, with a home of its own.

    Attributes:
        name: the namespace.
        write, read: its tokens.
        stranger: the token of another account.
        home: HF_HOME of the processes.
        xet: whether the processes have Xet; without it they speak LFS.
    """

    hub: Hub
    name: str
    write: str
    read: str
    stranger: str
    home: Path
    xet: bool = False

    def put(self, name: str, folder: Path, **state: Any) -> Repo:
        """Put the files of a folder on the Hub, past the API: a state that a test starts from."""
        repo = self.hub.store.repos.setdefault(f"{self.name}/{name}", Repo.new(f"{self.name}/{name}", self.name))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {str(path.relative_to(folder)): Blob(path.read_bytes(), path.suffix in LARGE) for path in paths}
        repo.add("main", {**repo.commit("main").files, **files}, f"the files of {folder.name}", self.name)
        for key, value in state.items():
            setattr(repo, key, value)
        return repo

    def environment(self, token: str | None, *, xet: bool | None = None, **more: str) -> dict[str, str]:
        """Return what a process needs to take this Hub for the Hub; `xet` goes before that of the account."""
        lfs = "0" if (self.xet if xet is None else xet) else "1"
        hub = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": lfs}
        secret = {"HF_TOKEN": token} if token else {}
        return {**clean_environment(), **hub, **secret, **more}

    def run(
        self, *words: Any, token: str | None = None, xet: bool | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ...` as a process of a user with this token; a UserWarning is an error."""
        return forked.run([*map(str, words)], self.environment(token, xet=xet, **more), timeout=300)

    def cli(
        self, *words: Any, token: str | None = None, xet: bool | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `hf-merge ...` as a user does."""
        return self.run("-m", "hf_merge.cli", *words, token=token, xet=xet, **more)

    def python(
        self,
        code: str,
        *,
        token: str | None = None,
        xet: bool | None = None,
        environment: dict[str, str] | None = None,
        **values: Any,
    ) -> Any:
        """Run code that leaves its result in `result`, and return the result; `org` and the values are at hand."""
        named = json.dumps({"org": self.name, **values}, default=str)
        lines = [f"import json\nglobals().update(json.loads({named!r}))", textwrap.dedent(code)]
        whole = "\n".join([*lines, "print(json.dumps(result))"])
        done = self.run("-c", whole, token=token, xet=xet, **(environment or {}))
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    def seen(self, method: str, path: str = "") -> list[Any]:
        """Return the requests that concern this namespace."""
        return [
            each
            for each in self.hub.log
            if each.method == method and f"/{self.name}/" in each.path and path in each.path
        ]


def error_line(stderr: str) -> str:
    """Return what the command line said last, without colours."""
    assert "Traceback" not in stderr and stderr.count("Error: ") == 1, stderr
    return re.sub("\x1b\\[[0-9;]*m", "", stderr).strip().splitlines()[-1]


def clean_environment() -> dict[str, str]:
    """Return the environment of a process that knows nothing of a Hub, and asks no proxy for what is on loopback."""
    names = [name for name in os.environ if not name.startswith(("HF_", "HUGGING_FACE"))]
    kept = {name: os.environ[name] for name in names if not name.lower().endswith("_proxy")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    return {**kept, "NO_PROXY": "127.0.0.1,localhost", **quiet, **path}


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Hub]:
    """One server for all tests of a worker."""
    with Hub() as hub:
        yield hub


@contextmanager
def one_test(running: Hub) -> Iterator[None]:
    """Let no fault and no switch outlive a test.

    No client may ask the Hub what it does not know, and none may show its token to the CDN.
    """
    before = len(running.log)
    yield
    running.faults.clear()
    running.switches = Switches()
    seen = running.log[before:]
    assert not [each for each in seen if each.status == UNKNOWN]
    assert not [each for each in seen if each.path.startswith("/cdn/") and each.authorized]


@pytest.fixture
def hub(running_hub: Hub) -> Iterator[Hub]:
    """The server, for one test."""
    with one_test(running_hub):
        yield running_hub


# Runs a test twice, with clients that speak LFS and with clients that speak Xet.
both_ways = pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])


@pytest.fixture
def xet() -> bool:
    """Whether clients have Xet: no, unless the test is marked `both_ways`."""
    return False


@pytest.fixture
def account(hub: Hub, tmp_path: Path, xet: bool) -> Account:
    """A namespace of this test alone."""
    name = f"org-{uuid.uuid4().hex[:8]}"
    write, read, stranger = (f"hf_{kind}{uuid.uuid4().hex}" for kind in ("write", "read", "stranger"))
    hub.store.tokens[write] = Token(name, write=True)
    hub.store.tokens[read] = Token(name, write=False)
    hub.store.tokens[stranger] = Token(f"{name}-stranger", write=True)
    return Account(hub, name, write, read, stranger, tmp_path / "home", xet)
