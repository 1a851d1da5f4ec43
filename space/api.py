"""What programs call: typed functions, as REST, by gradio_client, and as MCP tools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import gradio as gr
import security
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from jobs import JobRefused
from ui.fit import READY, examine
from ui.models import search_models
from ui.page import Page
from ui.recipe import read_recipe
from ui.run import estimate as estimated
from ui.run import merge_job

import hf_merge

POLL = 0.5
WAIT = 3600.0
"""Seconds that a call of `merge_and_push` waits for its merge; the merge itself goes on."""


WAITING = ("merge_and_push",)
"""Functions that mostly wait, of which any number may go on at once."""


def endpoints(page: Page) -> dict[str, Callable[..., Any]]:
    """Return the functions by name; recipes are YAML, answers are plain data."""
    local = page.place.local

    def check(recipe: str) -> dict[str, Any]:
        """Say from headers alone whether models can be merged, and what would mend it.

        Args:
            recipe: the recipe in YAML, MergeKit's or ours.

        Returns:
            verdict, sentence, rows (a model each), fixes, licence, proposed_base.
        """
        return _answered(lambda: _examined(page, recipe, page.place.token(None)))

    def validate_recipe(recipe: str) -> dict[str, Any]:
        """Say what is wrong with the text of a recipe; its models are not looked at.

        Args:
            recipe: the recipe in YAML.

        Returns:
            valid, and error where it is not.
        """
        answer = _answered(lambda: read_recipe(recipe, local=local))
        return {"valid": "error" not in answer, "error": answer.get("error", "")}

    def estimate(recipe: str) -> dict[str, Any]:
        """Say what a merge would download and write, how much memory it takes, and how long.

        Args:
            recipe: the recipe in YAML.

        Returns:
            download, write and memory in bytes; seconds.
        """
        return _answered(lambda: dict(estimated(_fitting(_examined(page, recipe, page.place.token(None))))))

    async def merge_and_push(
        recipe: str,
        repo_id: str,
        private: bool = True,
        authorization: gr.Header | None = None,
        oauth: gr.OAuthToken | None = None,
        request: gr.Request | None = None,
    ) -> dict[str, Any]:
        """Merge models straight into a new repository on the Hub, as the account whose token is given.

        Args:
            recipe: the recipe in YAML.
            repo_id: NAMESPACE/NAME of a repository that does not exist yet.
            private: whether only you see it.

        Returns:
            repo_id and url; or error.
        """

        def start() -> dict[str, Any]:
            security.guard(request)
            name = security.repo_id(repo_id, local=False)
            read = read_recipe(recipe, local=local)
            token, owner = _account(oauth, authorization)
            costs = estimated(_fitting(_examined(page, recipe, token)))
            return {"owner": owner, "job": merge_job(page, owner, read, costs, token, name, private=private).id}

        started = await asyncio.to_thread(_answered, start)
        return await _waited(page, started["owner"], started["job"]) if "job" in started else started

    return {
        "search_models": search_models,
        "check": check,
        "validate_recipe": validate_recipe,
        "estimate": estimate,
        "merge_and_push": merge_and_push,
    }


def _account(oauth: gr.OAuthToken | None, authorization: str | None) -> tuple[str, str]:
    """Return the token of who calls, and by what the jobs of that account are known.

    Raises:
        Refused: there is none, or the Hub does not know it.
    """
    token = oauth.token if oauth is not None else str(authorization or "").removeprefix("Bearer ").strip()
    if not token:
        raise security.Refused("Send a token that may write: as the header Authorization, or sign in.")
    try:
        return token, f"api:{HfApi(token=token).whoami()['name']}"
    except HfHubHTTPError as error:
        known = error.response is not None and error.response.status_code not in (401, 403)
        told = "The Hub does not answer: try again later." if known else "The Hub does not know this token."
        raise security.Refused(told) from None


def _examined(page: Page, recipe: str, token: str | bool | None) -> dict[str, Any]:
    local = page.place.local
    return examine(read_recipe(recipe, local=local), local=local, **page.place.reading("api", token))


def _fitting(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report of what can be merged.

    Raises:
        Refused: it cannot.
    """
    if report["verdict"] not in READY:
        raise security.Refused(f"The models do not fit: {report['sentence']}")
    return report


async def _waited(page: Page, owner: str, job_id: str) -> dict[str, Any]:
    """Wait for a job and return its result; no thread waits with it, so that many may."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        job = page.place.jobs.get(owner, job_id)
        if job is None:
            return {"error": "The merge is not here any more."}
        if job.state == "done":
            return {"repo_id": job.result["repo_id"], "url": job.result["url"]}
        if job.state not in ("queued", "running"):
            return {"error": job.message or f"The merge was {job.state}."}
        await asyncio.sleep(POLL)
    return {"error": "The merge goes on, but this call waits no longer; look at the repository later."}


def _answered(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return an answer, or what went wrong as `error`."""
    try:
        return run()
    except (ValueError, hf_merge.MergeError, JobRefused, RuntimeError) as error:
        return {"error": security.redact(str(error))}
