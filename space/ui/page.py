"""What the steps of the page share: who is asking, the recipe on the page, and what its parts show of it.

The recipe is the only state. Whatever changes it says in whose hands it was changed (`origin`), so that this part is
not written to while someone works in it; all others follow.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import gradio as gr
import security
import yaml
from jobs import Jobs

HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""What events of the page are called with: programs have their own functions, and what takes long shows itself."""
KEPT = 3600.0
"""Seconds for which what a visitor's token has opened is kept after its last use."""


@dataclass(frozen=True)
class Place:
    """Where the page runs.

    Attributes:
        folder: of jobs and of what is read with a visitor's token.
        jobs: merges and pushes, which belong to the server.
        local: whether it serves only the person at this machine, whose folders and token it may use.
        oauth: whether visitors can sign in.
    """

    folder: Path
    jobs: Jobs
    local: bool
    oauth: bool

    def token(self, oauth: gr.OAuthToken | None) -> str | bool | None:
        """Return what to show the Hub: the visitor's token, or none; never that of the Space's owner."""
        if oauth is not None:
            return oauth.token
        return None if self.local else False

    def reading(self, owner: str, token: str | bool | None) -> dict[str, Any]:
        """Return how models are read: what a token has opened lies for an hour in a folder of its own."""
        apart = isinstance(token, str) and not self.local
        return {"token": token, "cache_dir": self._opened_by(f"{owner} {token}") if apart else None}

    def _opened_by(self, who: str) -> Path:
        own = self.folder / "reading" / sha256(who.encode()).hexdigest()[:16]
        own.mkdir(parents=True, exist_ok=True)
        os.utime(own)
        for other in own.parent.iterdir():
            if time.time() - other.stat().st_mtime > KEPT:
                shutil.rmtree(other, ignore_errors=True)
        return own


@dataclass
class Page:
    """The components of the page that more than one step knows.

    Attributes:
        place: where it runs.
        recipe: the recipe and who changed it, see `changed`.
        draft: the recipe as the browser keeps it, so that signing in and closing the page lose nothing.
        report: what `hf_merge.check` said last, as plain data, with `key`, what it was said of.
        owner: the secret by which a browser's jobs are known.
        run: `{"job": id or None, "shown": id or None}`: the job that is watched, and that whose result is shown.
    """

    place: Place
    recipe: gr.State = field(init=False)
    draft: gr.BrowserState = field(init=False)
    report: gr.State = field(init=False)
    owner: gr.BrowserState = field(init=False)
    run: gr.State = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = gr.State(changed({}, "start"))
        self.report = gr.State({})
        secret = _secret(self.place.folder)
        self.owner = gr.BrowserState("", storage_key="hf_merge_browser", secret=secret)
        self.draft = gr.BrowserState({}, storage_key="hf_merge_draft", secret=secret)
        self.run = gr.State({"job": None, "shown": None})


def changed(recipe: Mapping[str, Any], origin: str, seq: int | None = None, aside: Any = None) -> dict[str, Any]:
    """Return the state after a change in the hands of `origin`, which counts its changes by `seq`.

    `aside` is a base that the method has no use for, and that the next one may get back.
    """
    return {"recipe": dict(recipe), "origin": origin, "seq": seq, "aside": aside, "change": secrets.token_hex(4)}


def example() -> dict[str, Any]:
    """Return the recipe of the worked example, its models as folders here."""
    made = yaml.safe_load((security.EXAMPLE / "recipe.yaml").read_text(encoding="utf-8"))
    models = [str(security.EXAMPLE / name) for name in made["models"]]
    return {**made, "base_model": str(security.EXAMPLE / made["base_model"]), "models": models}


def _secret(folder: Path) -> str:
    """Return the key of what browsers store, the same after a restart."""
    file = folder / "browser.key"
    try:
        return file.read_text(encoding="ascii")
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        made = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(made, "w", encoding="ascii") as stream:
            stream.write(key := secrets.token_urlsafe(32))
        return key
