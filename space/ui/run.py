"""The summary beside the steps: what the merge costs here, its start, its progress; the job belongs to the server."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import form
import gradio as gr
import security
from components import layer_strip, run_status, summary
from huggingface_hub import ModelCard, hf_hub_download
from jobs import Job, JobRefused
from ui.fit import is_ready
from ui.page import HIDDEN, Page
from ui.recipe import read_recipe

import hf_merge

SHARDS = 2 * 10**9
"""Bytes of a shard of what is merged here: two of them fit beside all else while they go to the Hub."""
BESIDE = 1 << 28
"""Bytes of disk that a job may need beside weights: tokenizers, cards, pictures."""
LENGTH = 2000
"""Characters of text that a try-out takes."""
SAMPLE = 1 << 16
"""Entries of each tensor that the pictures are made of."""
JOB_HARDWARE = "cpu-upgrade"
RUNNING = ("queued", "running")
NO_ACCOUNT = "Sign in first: a push needs your account."
ONWARD = "[See what came out](#result) · [Publish it](#publish)"


def build(page: Page) -> dict[str, Any]:
    """Lay the rail out; return its components."""
    with gr.Group(elem_classes="rail", elem_id="step-merge"):
        gr.Markdown("## Your merge")
        costs = summary(elem_id="summary")
        direct = gr.Checkbox(
            label="Straight to the Hub",
            info="Merges, uploads and deletes shard by shard: for models larger than the disk here.",
            value=False,
            visible=page.place.oauth or page.place.local,
            elem_id="direct",
        )
        goal = gr.Textbox(label="Into repository", placeholder="you/merged", visible=False, elem_id="direct-repo")
        start = gr.Button("Merge", variant="primary", size="lg", elem_id="merge")
        problem = gr.Markdown("", elem_id="run-problem", elem_classes="problem", visible=False)
        status = run_status(elem_id="run")
        strip = layer_strip(elem_id="strip")
        onward = gr.Markdown("", elem_id="onward", visible=False)
        cancel = gr.Button("Cancel", size="sm", variant="stop", visible=False, elem_id="cancel")
        earlier = gr.Dropdown(
            label="Your merges here",
            info="Kept for some hours; this browser alone sees them.",
            choices=[],
            visible=False,
            interactive=True,
            elem_id="earlier",
        )
    direct.input(lambda on: gr.Textbox(visible=on), direct, goal, **HIDDEN)
    return {
        "summary": costs,
        "direct": direct,
        "goal": goal,
        "start": start,
        "run_problem": problem,
        "status": status,
        "strip": strip,
        "onward": onward,
        "cancel": cancel,
        "earlier": earlier,
    }


def estimate(report: dict[str, Any]) -> dict[str, int]:
    """Return what a merge of a report takes: bytes downloaded and written, working memory, seconds."""
    plan = report.get("plan") or {}
    return {
        "download": int(plan.get("bytes_downloaded", 0)),
        "write": int(plan.get("bytes_written", 0)),
        "memory": int(plan.get("peak_memory", 0)),
        "seconds": round(sum(plan.get("seconds", {}).values())),
    }


def disk(costs: dict[str, int], *, direct: bool) -> int:
    """Return the bytes of disk that a merge takes here."""
    if direct:
        return min(costs["write"], 2 * SHARDS) + BESIDE
    return costs["download"] + costs["write"] + BESIDE


def shown(state: dict[str, Any], report: dict[str, Any], page: Page) -> dict[str, Any]:
    """Return what the summary shows."""
    costs = estimate(report)
    free = page.place.jobs.free()
    needed = disk(costs, direct=False)
    fits = needed <= free
    ready = is_ready(state["recipe"], report)
    command = "" if fits or not ready else form.as_command(state["recipe"], job=JOB_HARDWARE)
    told = {
        **costs,
        "disk": needed,
        "free": free,
        "fits": fits,
        "command": command,
        "ready": ready,
        "models": form.labels(form.names(state["recipe"])),
        "method": state["recipe"].get("merge_method"),
        "verdict": report.get("verdict"),
        "sentence": report.get("sentence", ""),
    }
    return {"summary": told, "start": gr.Button(interactive=ready)}


def idle(page: Page, owner: str) -> dict[str, Any]:
    """Return what the rail shows when no job is watched."""
    return {
        "status": {"state": ""},
        "strip": {"cells": []},
        "onward": gr.Markdown(visible=False),
        "cancel": gr.Button(visible=False),
        "earlier": _earlier(page, owner, None),
        "timer": gr.Timer(active=False),
        "start": gr.Button("Merge"),
    }


def watched(page: Page, owner: str, job: Job, *, ready: bool) -> dict[str, Any]:
    """Return what the rail shows of a job; `ready` says whether another merge may start after it."""
    goes_on = job.state in RUNNING
    start = gr.Button("Merge", interactive=True) if ready else gr.Button("Merge")  # or the report to come will tell
    return {
        "status": job.to_dict(),
        "strip": {"cells": job.cells()},
        "onward": gr.Markdown(ONWARD, visible=job.state == "done" and "folder" in (job.result or {})),
        "cancel": gr.Button(visible=goes_on, interactive=not job.stopping),
        "timer": gr.Timer(active=goes_on),
        "earlier": gr.skip() if goes_on else _earlier(page, owner, job.id),
        "start": gr.Button("Merging…", interactive=False) if goes_on else start,
    }


def _earlier(page: Page, owner: str, chosen: str | None) -> Any:
    """Return the list of a browser's finished merges."""
    done = [job for job in page.place.jobs.of(owner) if job.state == "done" and "of" not in (job.result or {})]
    named = [
        (
            f"{job.recipe.get('merge_method')} of {', '.join(form.labels(form.names(job.recipe)))}, {_ago(job.ended)}",
            job.id,
        )
        for job in done
    ]
    known = [job.id for job in done]
    return gr.Dropdown(choices=named, value=chosen if chosen in known else None, visible=len(done) > 1)


def _ago(moment: float) -> str:
    """Say how long something is over: `just now`, `5 min ago`, `2 h ago`."""
    minutes = int(time.time() - moment) // 60
    return "just now" if not minutes else f"{minutes} min ago" if minutes < 90 else f"{round(minutes / 60)} h ago"


def wire(page: Page, parts: dict[str, Any], poll: Any) -> None:
    """Connect start and cancel; `poll` shows the state of the job that is watched."""

    def begin(
        state: dict[str, Any],
        report: dict[str, Any],
        owner: str,
        direct: bool,
        repo: str,
        run: dict[str, Any],
        oauth: gr.OAuthToken | None,
        request: gr.Request,
    ) -> tuple[Any, Any, Any]:
        def start() -> Job:
            security.guard(request)
            recipe = read_recipe(form.to_yaml(state["recipe"]), local=page.place.local)
            if direct and not repo.strip():
                raise ValueError("Name the new repository: you/merged.")
            repo_id = security.repo_id(repo, local=False) if direct else None
            token, costs = page.place.token(oauth), estimate(report)
            if repo_id and token is False:
                raise ValueError(NO_ACCOUNT)
            return merge_job(page, owner, recipe, costs, token, repo_id, layers=report.get("layers") or 0)

        return begun(run, start)

    def stop(owner: str, run: dict[str, Any], request: gr.Request) -> None:
        security.guard(request)
        page.place.jobs.cancel(owner, run["job"])

    inputs = [page.recipe, page.report, page.owner, parts["direct"], parts["goal"], page.run]
    outputs = [page.run, parts["run_problem"], parts["timer"]]
    parts["start"].click(begin, inputs, outputs, trigger_mode="once", **HIDDEN).then(**poll)
    parts["cancel"].click(stop, [page.owner, page.run], None, **HIDDEN).then(**poll)


def begun(run: dict[str, Any], start: Callable[[], Job]) -> tuple[dict[str, Any], Any, Any]:
    """Start a job; return what is watched then, why there is no job if it was refused, and the clock."""
    try:
        job = start()
    except (ValueError, hf_merge.MergeError, JobRefused) as error:
        return run, gr.Markdown(security.escape_markdown(security.redact(str(error))), visible=True), gr.skip()
    return {**run, "job": job.id}, gr.Markdown("", visible=False), gr.Timer(active=True)


def merge_job(
    page: Page,
    owner: str,
    recipe: dict[str, Any],
    costs: dict[str, int],
    token: Any,
    repo_id: str | None,
    *,
    private: bool = True,
    layers: int = 0,
) -> Job:
    """Queue a merge: into the job's folder, with its pictures, or straight into the Hub."""

    def work(job: Job) -> dict[str, Any]:
        read = {"token": token, "cache_dir": None if page.place.local else job.cache}
        if repo_id is not None:
            merged = hf_merge.merge(
                dict(recipe),
                job.work / "merged",
                keep_local=False,
                push_to_hub=repo_id,
                private=private,
                stream=True,
                max_shard_size=SHARDS,
                on_progress=job.report,
                **read,
            )
            return {"repo_id": merged.repo_id, "url": merged.url, "recipe": recipe}
        merged = hf_merge.merge(
            dict(recipe), job.work / "merged", max_shard_size=SHARDS, on_progress=job.report, **read
        )
        return {
            "task": merged.card.data.get("pipeline_tag"),
            "prompt": _prompt(form.names(recipe), read),
            "folder": str(merged.path),
            "recipe": recipe,
            "seconds": job.seconds,
            "analysis": _analysed(job, recipe, merged, read),
        }

    return page.place.jobs.submit(owner, recipe, disk(costs, direct=repo_id is not None), work, layers=layers)


def _prompt(models: list[str], read: dict[str, Any]) -> str:
    """Return what to try a merge on: the first example that a card of its models has for the Hub's widget."""
    for name in models:
        with suppress(Exception):  # cards are anybody's text, and this is a courtesy
            place = Path(name) / "README.md" if Path(name).is_dir() else hf_hub_download(name, "README.md", **read)
            widget = ModelCard.load(place).data.get("widget") or []
            return str(next(one["text"] for one in widget if one.get("text")))[:LENGTH]
    return ""


def _analysed(job: Job, recipe: dict[str, Any], merged: hf_merge.MergedModel, read: dict[str, Any]) -> dict[str, Any]:
    """Return what the pictures show; a merge whose pictures cannot be made is still a merge."""
    job.enter("analysing")
    whole = None if isinstance(merged, (hf_merge.MergedAdapter, hf_merge.MergedModelWithExperts)) else merged
    try:
        found = hf_merge.analyze(dict(recipe), merged=whole, sample=SAMPLE, on_progress=job.report, **read)
        return found.to_dict()
    except hf_merge.Cancelled:
        raise
    except hf_merge.MergeError as error:
        return {"error": security.redact(str(error))}


def new_owner(owner: str) -> str:
    """Return the secret of a browser, a new one for one that has none."""
    return owner if isinstance(owner, str) and len(owner) >= 32 else secrets.token_urlsafe(32)
