"""Step 4: the recipe as text, both ways, and as what can be taken elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import form
import gradio as gr
import security
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from ui.page import HIDDEN, Page, changed

import hf_merge

RECIPE_FILES = ("hf_merge_recipe.yaml", "mergekit_config.yml")


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    with gr.Group(elem_classes="step", elem_id="step-recipe"):
        gr.Markdown("## 4 · Recipe")
        gr.Markdown(
            "The form and this text are the same recipe: change either. It is what `hf-merge` and Python read, and "
            "what the model card carries. MergeKit's recipes can be pasted as they are. Tab indents in the text; to "
            "leave it by keyboard, press Esc, then Tab.",
            elem_classes="lead",
        )
        with gr.Tabs():
            with gr.Tab("YAML"):
                text = gr.Code(
                    buttons=["copy"],
                    language="yaml",
                    label="Recipe",
                    lines=8,
                    max_lines=24,
                    wrap_lines=True,
                    elem_id="yaml",
                )
                problem = gr.Markdown("", elem_id="yaml-problem", elem_classes="problem", visible=False)
                told = gr.Markdown("", elem_id="unshown", elem_classes="lead", visible=False)
            with gr.Tab("Python"):
                python = gr.Code(
                    buttons=["copy"], language="python", label="As Python", interactive=False, elem_id="as-python"
                )
            with gr.Tab("Command"):
                command = gr.Code(
                    buttons=["copy"], language="shell", label="As a command", interactive=False, elem_id="as-command"
                )
            with gr.Tab("Link"):
                gr.Markdown("Whoever opens it sees this recipe on this page.", elem_classes="lead")
                link = gr.Code(
                    buttons=["copy"],
                    language=None,
                    label="As a link",
                    interactive=False,
                    wrap_lines=True,
                    elem_id="as-link",
                )

    def read(typed: str, state: dict[str, Any]) -> tuple[Any, Any]:
        try:
            recipe = read_recipe(typed, local=page.place.local)
        except (ValueError, hf_merge.MergeError) as error:
            return gr.skip(), gr.Markdown(f"**Not read.** {security.escape_markdown(str(error))}", visible=True)
        return changed(recipe, "yaml"), gr.Markdown("", visible=False)

    text.input(read, [text, page.recipe], [page.recipe, problem], trigger_mode="always_last", **HIDDEN)
    return {"text": text, "yaml_problem": problem, "told": told, "python": python, "command": command, "link": link}


def read_recipe(text: str, *, local: bool) -> dict[str, Any]:
    """Read a recipe that someone typed; check all that can be known without its models.

    Raises:
        ValueError, hf_merge.MergeError: what is wrong with it, with the line.
    """
    security.recipe_of(text, local=local)
    *stages, last = yaml.safe_load_all(text)
    return {**last, **({"stages": stages} if stages else {})}


def shown(state: dict[str, Any], address: str) -> dict[str, Any]:
    """Return what the texts show: the recipe's own, as Python, as a command, as a link."""
    recipe = state["recipe"]
    whole = bool(recipe.get("merge_method")) and bool(
        form.names(recipe) or recipe.get("slices") or recipe.get("modules")
    )
    packed = form.packed(recipe) if whole else None
    told = form.unshown(recipe) if whole else []
    return {
        "text": gr.skip() if state["origin"] == "yaml" else form.to_yaml(recipe),
        "yaml_problem": gr.Markdown("", visible=False),
        "told": gr.Markdown(f"Only here, not in the form: {'; '.join(told)}.", visible=bool(told)),
        "python": form.as_python(recipe) if whole else "",
        "command": form.as_command(recipe) if whole else "",
        "link": f"{address}?recipe={packed}"
        if packed
        else "This recipe is too long for a link: share its text."
        if whole
        else "",
    }


def recipe_from(repo_id: str, *, local: bool) -> dict[str, Any]:
    """Return the recipe of a merge on the Hub: ours, or MergeKit's.

    Raises:
        ValueError: it has none, or cannot be read.
    """
    for name in RECIPE_FILES:
        try:
            path = hf_hub_download(repo_id, name, token=False)
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise ValueError(f"'{repo_id}' cannot be read: {security.redact(str(error).splitlines()[0])}") from None
        return read_recipe(Path(path).read_text(encoding="utf-8", errors="replace"), local=local)
    raise ValueError(f"'{repo_id}' has none of {', '.join(RECIPE_FILES)}: it was not merged by hf_merge or MergeKit.")
