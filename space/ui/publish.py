"""Step 6: the card as it will stand, a name that is free, and the push; nothing on the Hub is replaced or deleted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import form
import gradio as gr
import security
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from jobs import Job
from ui.page import HIDDEN, Page
from ui.run import BESIDE, NO_ACCOUNT, begun

import hf_merge

WEIGHTS, RECIPE = "The weights", "The recipe alone"
NAME_LENGTH = 96
RECIPE_COMMANDS = """import hf_merge
from transformers import AutoModel

model = AutoModel.from_pretrained("{repo}")  # merged when it is loaded"""


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    with gr.Group(elem_classes="step", elem_id="step-publish"):
        gr.Markdown("## 6 · Publish")
        before = gr.Markdown(
            "When a merge is done, its card is shown here and it can be pushed to the Hub.", elem_id="no-publish"
        )
        with gr.Column(visible=False, elem_id="publish") as whole:
            with gr.Tabs():
                with gr.Tab("Card"):
                    card = gr.Markdown("", elem_id="card", header_links=False)
                with gr.Tab("Metadata"):
                    metadata = gr.Code(
                        buttons=["copy"],
                        language="yaml",
                        label="What the Hub reads of the card",
                        interactive=False,
                        elem_id="metadata",
                    )
            signed = gr.Markdown("", elem_id="who-pushes")
            with gr.Row():
                name = gr.Textbox(
                    label="Repository",
                    info="Your name or an organisation's, and the model's.",
                    min_width=260,
                    elem_id="repo",
                )
                what = gr.Radio(
                    [WEIGHTS, RECIPE],
                    value=WEIGHTS,
                    label="What is published",
                    info="A recipe is a few kilobytes; the Auto classes merge it when they load it.",
                    min_width=260,
                    elem_id="what",
                )
                private = gr.Checkbox(label="Private", info="You can open it later.", value=True, elem_id="private")
            free = gr.Markdown("", elem_id="name-free")
            push = gr.Button("Push to the Hub", variant="primary", elem_id="push")
            problem = gr.Markdown("", elem_id="push-problem", elem_classes="problem", visible=False)
        done = gr.Markdown("", elem_id="published", visible=False)
    return {
        "before": before,
        "publish": whole,
        "card": card,
        "metadata": metadata,
        "signed": signed,
        "repo": name,
        "what": what,
        "private": private,
        "free": free,
        "push": push,
        "push_problem": problem,
        "published": done,
    }


def shown(page: Page, job: Job | None, user: str | None) -> dict[str, Any]:
    """Return what the step shows of a finished merge."""
    if job is None or job.state != "done" or "folder" not in job.result:
        return {"before": gr.Markdown(visible=True), "publish": gr.Column(visible=False)}
    card = ModelCard.load(Path(job.result["folder"]) / "README.md")
    who = (
        f"Signed in as **{security.escape_markdown(user)}**."
        if user
        else (
            "Sign in at the top of the page to push."
            if page.place.oauth
            else "Pushed with the token of `hf auth login`."
        )
    )
    return {
        "before": gr.Markdown(visible=False),
        "publish": gr.Column(visible=True),
        "card": card.text,
        "metadata": card.data.to_yaml(),
        "signed": who,
        "repo": f"{user or 'you'}/{suggestion(job.result['recipe'])}",
        "free": "",
        "published": gr.Markdown(visible=False),
    }


def published(job: Job) -> dict[str, Any]:
    """Return what the step shows of a finished push."""
    result = job.result
    repo, url = result["repo_id"], result["url"]
    told = f"### Published: [{security.escape_markdown(repo)}]({url})\n"
    return {"published": gr.Markdown(f"{told}\n```text\n{result['commands']}\n```", visible=True)}


def suggestion(recipe: dict[str, Any]) -> str:
    """Return a name for a merge: of its models, and how they were merged."""
    parts = [*form.labels(form.names(recipe))[:3], str(recipe["merge_method"])]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.")[:NAME_LENGTH]


def is_free(repo_id: str, token: Any) -> bool | None:
    """Tell whether nobody has such a repository; None if the Hub does not say."""
    try:
        return not HfApi(token=token).repo_exists(repo_id)
    except (HfHubHTTPError, OSError):
        return None


def push_job(
    page: Page, owner: str, finished: Job, repo_id: str, *, token: Any, private: bool, recipe_only: bool
) -> Job:
    """Queue a push of a finished merge, or of its recipe.

    Raises:
        JobRefused: the queue is full, or the owner has jobs enough.
    """
    recipe, folder = finished.result["recipe"], finished.result["folder"]

    def work(job: Job) -> dict[str, Any]:
        job.enter("uploading")
        if recipe_only:
            info = hf_merge.Recipe.from_yaml(form.to_yaml(recipe)).push_to_hub(
                repo_id, token=token, private=private, cache_dir=job.cache
            )
        else:
            info = hf_merge.push_to_hub(folder, repo_id, private=private, token=token, on_progress=job.report)
        commands = RECIPE_COMMANDS.format(repo=repo_id) if recipe_only else str(hf_merge.deploy(repo_id, token=token))
        return {"repo_id": repo_id, "url": str(info.repo_url), "commands": commands, "of": finished.id}

    return page.place.jobs.submit(owner, recipe, BESIDE, work)


def wire(page: Page, parts: dict[str, Any], poll: Any) -> None:
    """Connect the name and the push; `poll` shows the state of the job that is watched."""

    def look(repo: str, oauth: gr.OAuthToken | None, request: gr.Request) -> str:
        try:
            security.guard(request)
            name = security.repo_id(repo, local=False)
        except ValueError as error:
            return security.escape_markdown(str(error))
        free = is_free(name, page.place.token(oauth))
        return {
            True: f"`{name}` is free.",
            False: f"`{name}` is taken: choose another name.",
            None: "The Hub did not answer.",
        }[free]

    def begin(
        repo: str,
        what: str,
        private: bool,
        owner: str,
        run: dict[str, Any],
        oauth: gr.OAuthToken | None,
        request: gr.Request,
    ) -> tuple[Any, Any, Any]:
        def start() -> Job:
            security.guard(request)
            token, name = page.place.token(oauth), security.repo_id(repo, local=False)
            if token is False:
                raise ValueError(NO_ACCOUNT)
            finished = page.place.jobs.get(owner, run.get("shown") or "")
            if finished is None or "folder" not in (finished.result or {}):
                raise ValueError("This merge is not here any more: merge again.")
            if is_free(name, token) is False:
                raise ValueError(
                    f"'{name}' is taken, and nothing on the Hub is replaced from here: choose another name."
                )
            return push_job(page, owner, finished, name, token=token, private=private, recipe_only=what == RECIPE)

        return begun(run, start)

    parts["repo"].blur(look, parts["repo"], parts["free"], **HIDDEN)
    inputs = [parts["repo"], parts["what"], parts["private"], page.owner, page.run]
    outputs = [page.run, parts["push_problem"], parts["timer"]]
    parts["push"].click(begin, inputs, outputs, trigger_mode="once", **HIDDEN).then(**poll)
