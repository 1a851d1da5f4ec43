"""Pushes that fail at every one of their requests, in a process that has the Hub in it too.

Run by test_push.py as `python -m tests.hub.interrupted FOLDER SECOND_FOLDER`; prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.hub.server import Fault, Hub
from tests.hub.store import Blob, Repo, Token

TOKEN = "hf_interrupted"
OLD = {"config.json": Blob(b"{}"), "old.safetensors": Blob(b"old", large=True), ".eval_results/a.yaml": Blob(b"a: 1")}


def every_fault(k: int) -> dict[str, Fault]:
    """Name the ways in which the k-th request fails."""
    return {
        "down": Fault("error", "", first=k, status=500),
        "forbidden": Fault("error", "", first=k, status=403),
        "cut": Fault("cut", "", first=k, last=k, after=0),
    }


def files(hub: Hub, repo_id: str) -> dict[str, bytes] | None:
    """Return what a repository shows, without its hidden files; None if there is no such repository."""
    repo = hub.store.repos.get(repo_id)
    if repo is None:
        return None
    return {path: blob.content for path, blob in repo.commit("main").files.items() if not path.startswith(".")}


def pushes(folders: list[Path]) -> dict[str, Callable[[str, bool], Any]]:
    """Name the ways to push: each takes the repository, and whether it is the second attempt."""
    import hf_merge

    def merge(repo_id: str, again: bool) -> Any:
        return hf_merge.merge(folders, push_to_hub=repo_id, method="linear", max_shard_size="60KB", resume=again)

    def folder(repo_id: str, again: bool) -> Any:
        return hf_merge.push_to_hub(folders[0], repo_id)

    def over_old(repo_id: str, again: bool) -> Any:
        return hf_merge.push_to_hub(folders[0], repo_id, exist_ok=True)

    return {"merge": merge, "folder": folder, "over_old": over_old}


def attempt(hub: Hub, push: Callable[[], Any]) -> str | None:
    """Push; return the refusal, if it is one of ours."""
    import hf_merge

    try:
        push()
    except hf_merge.OutputError as error:
        assert "\n" not in str(error) and TOKEN not in str(error), error
        return str(error)
    finally:
        hub.faults.clear()
    return None


def begin(hub: Hub, repo_id: str, is_old: bool) -> None:
    """Forget all repositories, what was uploaded and what was begun, and put an old model there."""
    hub.store.large.clear()
    hub.store.repos.clear()
    for path in Path().glob(".*.hf_merge"):
        shutil.rmtree(path)
    if is_old:
        hub.store.repos[repo_id] = repo = Repo.new(repo_id, "me")
        repo.add("main", {**repo.commit("main").files, **OLD}, "an old model", "me")


def sweep(hub: Hub, name: str, push: Callable[[str, bool], Any]) -> Iterator[dict[str, Any]]:
    """Let each request of a push fail in each way, and repeat the push."""
    is_old = name == "over_old"
    begin(hub, f"me/{name}", is_old)
    push(f"me/{name}", False)  # once before it counts: some requests are made once a process
    begin(hub, f"me/{name}-clean", is_old)
    before = len(hub.log)
    push(f"me/{name}-clean", False)
    requests = len(hub.log) - before
    clean = files(hub, f"me/{name}-clean")
    for k in range(1, requests + 1):
        for kind, fault in every_fault(k).items():
            repo_id = f"me/{name}-{kind}-{k}"
            begin(hub, repo_id, is_old)
            old = files(hub, repo_id)
            hub.faults.append(fault)
            refused = attempt(hub, lambda repo_id=repo_id: push(repo_id, False))
            then = files(hub, repo_id)
            again = attempt(hub, lambda repo_id=repo_id: push(repo_id, True)) if refused else None
            after = files(hub, repo_id)
            expected = _renamed(clean, f"me/{name}-clean", repo_id)
            states = [old or {}, expected, *([None] if old is None else [])]
            commits = len(hub.store.repos[repo_id].commit("main").history()) - (2 if is_old else 1)
            yield {
                "where": f"{kind} at {k}", "refused": refused, "again": again, "commits": commits,
                "whole_or_nothing": then in states, "complete": after == expected,
            }  # fmt: skip


def _renamed(shown: dict[str, bytes] | None, old: str, new: str) -> dict[str, bytes]:
    """The card names the repository."""
    return {path: content.replace(old.encode(), new.encode()) for path, content in (shown or {}).items()}


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]]
    home = tempfile.mkdtemp()
    with Hub() as hub:
        hub.store.tokens[TOKEN] = Token("me", write=True)
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=home, HF_TOKEN=TOKEN, HF_HUB_DISABLE_PROGRESS_BARS="1")
        from huggingface_hub.utils import _http, logging

        logging.set_verbosity_error()
        _http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})  # nobody waits between retries
        os.chdir(home)
        found = {name: list(sweep(hub, name, push)) for name, push in pushes(folders).items()}
    shutil.rmtree(home)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
