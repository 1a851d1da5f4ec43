"""The Space: merge models without writing code. `hf-merge space` starts it; on the Hub it is a repository's app."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if os.environ.get("SPACE_ID"):
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # a visitor without an account is nobody, not the Space's owner

import api
import form
import gate
import gradio as gr
import security
import theme
from gradio.events import api as endpoint
from jobs import Jobs
from ui import fit, how, models, publish, recipe, result, run
from ui.page import HIDDEN, Page, Place, changed, example

import hf_merge

TITLE = "hf_merge"
FOLDER, DISK = "HF_MERGE_SPACE_FOLDER", "HF_MERGE_SPACE_DISK"
SECOND = 1.0
LARGEST = "10mb"
"""Of what is uploaded: pictures to try a model on."""
INTRODUCTION = """
# Merge models
See whether they fit before a byte of weights is downloaded, merge them, look at what came out, and publish it.
Below is a worked example: two tiny models that learnt one thing each. Press **Merge**, or put your own models in.
"""


def place() -> Place:
    """Find out where the page runs."""
    local = security.allowed_local()
    folder = Path(os.environ.get(FOLDER) or Path(tempfile.gettempdir()) / "hf_merge_space").expanduser()
    return Place(
        folder, Jobs(folder / "jobs", max_disk=most_disk()), local=local, oauth=bool(os.environ.get("OAUTH_CLIENT_ID"))
    )


def most_disk() -> int | None:
    """Return how many bytes jobs may take of the disk; None if nobody said.

    Raises:
        hf_merge.MergeError: what was said is no size.
    """
    said = os.environ.get(DISK)
    if not said:
        return None
    from accelerate.utils import convert_file_size_to_int

    try:
        return convert_file_size_to_int(said)
    except ValueError:
        raise hf_merge.MergeError(f"{DISK} should be a size such as 20GB; found {said!r}.") from None


def build_demo(where: Place | None = None) -> gr.Blocks:
    """Lay the page out and connect its parts."""
    where = where or place()
    security.redact_logs()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        page = Page(where)
        with gr.Row(elem_classes="top"):
            gr.Markdown(INTRODUCTION, elem_id="introduction")
            with gr.Column(scale=0, min_width=220, visible=where.oauth):
                who = gr.Markdown("", elem_id="who")
                if where.oauth:
                    gr.LoginButton(elem_id="login")
        with gr.Row(elem_classes="page"):
            with gr.Column(elem_classes="steps"):
                parts: dict[str, Any] = models.build(page)
                for step in (fit, how, recipe):
                    parts |= step.build(page)
            with gr.Column(elem_classes="aside"):
                parts |= run.build(page)
            with gr.Column(elem_classes="outcome"):
                for step in (result, publish):
                    parts |= step.build(page)
        parts["timer"] = gr.Timer(SECOND, active=False)
        parts["address"] = gr.State("")
        _wire(demo, page, parts, who)
        for name, function in api.endpoints(page).items():
            endpoint(function, api_name=name, concurrency_limit=None if name in api.WAITING else "default")
    return demo.queue(max_size=64, default_concurrency_limit=8)


FOLLOWS = (
    "models",
    "cards",
    "panel",
    "dtype",
    "tokenizer",
    "keys",
    "missing",
    "format",
    "seed",
    "text",
    "yaml_problem",
    "told",
    "python",
    "command",
    "link",
    "verdict",
    "start",
)
"""What follows every change of the recipe."""
JUDGED = (
    "verdict",
    "report_table",
    *(f"fix_{i}" for i in range(fit.FIXES)),
    "models",
    "cards",
    "panel",
    "summary",
    "start",
)
"""What follows a new report."""
WATCHED = ("status", "strip", "onward", "cancel", "earlier", "timer", "start")
"""What follows a job while it goes on."""
FINISHED = (
    "waiting",
    "result",
    "result_told",
    "similarity",
    "change",
    "norms",
    "readings",
    "conflicts",
    "try_text",
    "try_image",
    "answers",
    "before",
    "publish",
    "card",
    "metadata",
    "signed",
    "repo",
    "free",
    "published",
)
"""What follows its end."""


def _wire(demo: gr.Blocks, page: Page, parts: dict[str, Any], who: gr.Markdown) -> None:
    """Let the parts follow the recipe, and the rail follow its job."""
    poll = _watching(page, parts)
    run.wire(page, parts, poll)
    publish.wire(page, parts, poll)
    parts["timer"].tick(**poll)
    _choosing(page, parts, poll)

    def show(state: dict[str, Any], report: dict[str, Any], address: str) -> list[Any]:
        made = {**how.shown(state, report), **recipe.shown(state, address), **fit.waiting(state["recipe"], report)}
        made |= {"models": models.shown(state, report)}
        return [state["recipe"], *(made[name] for name in FOLLOWS)]

    def judge(
        state: dict[str, Any], report: dict[str, Any], owner: str, oauth: gr.OAuthToken | None, request: gr.Request
    ) -> list[Any]:
        if report.get("key") == fit.key_of(state["recipe"]):
            return [gr.skip(), *_values(JUDGED, fit.known(report))]
        security.guard(request)
        found = fit.examine(
            state["recipe"], local=page.place.local, **page.place.reading(owner, page.place.token(oauth))
        )
        again = how.shown({**state, "origin": "check"}, found)
        made = {**again, **fit.shown(found), "models": models.shown(state, found), **run.shown(state, found, page)}
        return [found, *(made[name] for name in JUDGED)]

    page.recipe.change(
        show,
        [page.recipe, page.report, parts["address"]],
        [page.draft, *(parts[name] for name in FOLLOWS)],
        trigger_mode="always_last",
        **HIDDEN,
    ).then(
        judge,
        [page.recipe, page.report, page.owner],
        [page.report, *(parts[name] for name in JUDGED)],
        trigger_mode="always_last",
        **HIDDEN,
    )

    def arrive(
        owner: str, draft: dict[str, Any], profile: gr.OAuthProfile | None, request: gr.Request
    ) -> tuple[str, dict[str, Any], dict[str, Any], str, str, Any]:
        owner = run.new_owner(owner)
        mine = page.place.jobs.of(owner)
        job = next((one.id for one in mine if one.state in run.RUNNING), mine[0].id if mine else None)
        said = _asked(page, request, draft)
        name = f"Signed in as **{security.escape_markdown(profile.username)}**" if profile else ""
        address = str(request.headers.get("referer") or "").split("?")[0]
        return (
            owner,
            changed(said, "start"),
            {"job": job, "shown": None},
            name,
            address,
            gr.Timer(active=job is not None),
        )

    demo.load(
        arrive,
        [page.owner, page.draft],
        [page.owner, page.recipe, page.run, who, parts["address"], parts["timer"]],
        **HIDDEN,
    ).then(**poll)


def _asked(page: Page, request: gr.Request, draft: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of the address (`?recipe=`, `?from=`), the one that this browser had last, or the example."""
    said = dict(request.query_params)
    try:
        if "recipe" in said:
            return recipe.read_recipe(form.unpacked(said["recipe"]), local=page.place.local)
        if "from" in said:
            return recipe.recipe_from(security.repo_id(said["from"], local=False), local=page.place.local)
    except (ValueError, hf_merge.MergeError) as error:
        gr.Warning(security.escape(error), title="The address names no recipe")
    with suppress(AttributeError, TypeError, ValueError, hf_merge.MergeError):  # the browser may have kept anything
        return recipe.read_recipe(form.to_yaml(draft), local=page.place.local)
    return example()


def _watching(page: Page, parts: dict[str, Any]) -> dict[str, Any]:
    """Return an event that shows how the watched job stands, and what came out when it ends."""

    def poll(
        state: dict[str, Any],
        owner: str,
        chosen: dict[str, Any],
        report: dict[str, Any],
        profile: gr.OAuthProfile | None,
    ) -> list[Any]:
        job = page.place.jobs.get(owner, state["job"]) if state["job"] else None
        if job is None:
            return [{**state, "job": None}, *_values(WATCHED, run.idle(page, owner)), *[gr.skip()] * len(FINISHED)]
        ready = fit.is_ready(chosen["recipe"], report)
        seen, user = run.watched(page, owner, job, ready=ready), profile.username if profile else None
        if job.state in run.RUNNING or state["shown"] == job.id:
            return [state, *_values(WATCHED, seen), *[gr.skip()] * len(FINISHED)]
        if job.state == "done" and "of" in job.result:  # a push: the merge that it pushed stays in view
            made = publish.published(job)
        else:
            made = {**result.shown(job), **publish.shown(page, job, user)}
        shown = state["shown"] if job.state == "done" and "of" in job.result else job.id
        return [{**state, "shown": shown}, *_values(WATCHED, seen), *_values(FINISHED, made)]

    inputs = [page.run, page.owner, page.recipe, page.report]
    outputs = [page.run, *(parts[name] for name in (*WATCHED, *FINISHED))]
    return {"fn": poll, "inputs": inputs, "outputs": outputs, "queue": False, **HIDDEN}


def _values(names: tuple[str, ...], made: dict[str, Any]) -> list[Any]:
    return [made.get(name, gr.skip()) for name in names]


def _choosing(page: Page, parts: dict[str, Any], poll: dict[str, Any]) -> None:
    """Let an earlier merge be looked at again, with its recipe, to be adjusted and merged again."""

    def choose(job_id: str, owner: str, state: dict[str, Any]) -> tuple[Any, Any]:
        job = page.place.jobs.get(owner, job_id or "")
        return (gr.skip(), gr.skip()) if job is None else ({"job": job.id, "shown": None}, changed(job.recipe, "start"))

    inputs = [parts["earlier"], page.owner, page.recipe]
    parts["earlier"].input(choose, inputs, [page.run, page.recipe], **HIDDEN).then(**poll)


def server(where: Place) -> dict[str, Any]:
    """Return how the page is served, as keywords of `Blocks.launch`: nothing of it is kept, shown or lent out."""
    return {
        "max_file_size": LARGEST,
        "allowed_paths": None,
        "show_error": False,
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "mcp_server": True,
        "app_kwargs": gate.around(local=where.local),
    }


if __name__ == "__main__":
    here = place()
    build_demo(here).launch(**theme.launch(), **server(here))
