"""Step 1: which models are merged, and over which base."""

from __future__ import annotations

import functools
import time
from typing import Any

import form
import gradio as gr
import security
from components import model_list, model_search
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from ui.page import HIDDEN, Page, changed, example

import hf_merge

FOUND = 12
"""How many models a search shows."""


def search_models(query: str, limit: int = FOUND) -> list[str]:
    """Find public models on the Hub, the most downloaded first.

    Args:
        query: words of their names.
        limit: at most so many.

    Returns:
        Their ids.
    """
    return list(_search(query.strip()[:96], max(1, min(int(limit), 50)), int(time.time() // 60)))


@functools.lru_cache(maxsize=256)
def _search(query: str, limit: int, minute: int) -> tuple[str, ...]:
    if not query:
        return ()
    try:
        found = HfApi(token=False).list_models(search=query, sort="downloads", limit=limit)
        return tuple(model.id for model in found)
    except (HfHubHTTPError, OSError):
        return ()  # without the Hub an id or a folder can be typed all the same


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    where = "an id, an address on the Hub, or a folder here" if page.place.local else "an id or an address on the Hub"
    with gr.Group(elem_classes="step", elem_id="step-models"):
        gr.Markdown("## 1 · Models", elem_id="models-title")
        info = f"Type to search the Hub, or paste {where}."
        search = model_search({"label": "Add a model or an adapter", "info": info}, elem_id="search")
        problem = gr.Markdown("", elem_id="models-problem", elem_classes="problem", visible=False)
        chosen = model_list(elem_id="models")
        with gr.Row(elem_classes="quiet"):
            start = gr.Button("Worked example", size="sm", scale=0, min_width=150, elem_id="start-example")
            clear = gr.Button("Start empty", size="sm", scale=0, min_width=150, elem_id="start-empty")
    _wire(page, search, problem, chosen, start, clear)
    return {"models": chosen}


def shown(state: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what the list of models shows."""
    recipe = state["recipe"]
    listed, rows = form.names(recipe), {row["name"]: row for row in report.get("rows", ())}
    models = [
        {
            "id": name,
            "label": short,
            "kind": _kind(rows.get(name, {})),
            "note": _note(rows.get(name, {})),
            "problem": rows.get(name, {}).get("error") or "",
        }
        for name, short in zip(listed, form.labels(listed), strict=True)
    ]
    base = recipe.get("base_model")
    proposed = (report.get("proposed_base") or {}).get("name")
    counted = {"seq": state["seq"]} if state["origin"] == "models" and state.get("seq") is not None else {}
    return {
        "models": models,
        "base": form.name_of(base) if base else None,
        "proposed_base": proposed,
        "ordered": _ordered(recipe),
        **counted,
    }


def _ordered(recipe: dict[str, Any]) -> bool:
    name = recipe.get("merge_method")
    return bool(name in hf_merge.list_methods() and hf_merge.get_method(str(name)).ordered)


def _kind(row: dict[str, Any]) -> str:
    return "adapter" if row.get("role") == "adapter" else "model"


def _note(row: dict[str, Any]) -> str:
    return " · ".join(str(row[key]) for key in ("architecture", "dtype") if row.get(key))


def _wire(
    page: Page, search: gr.HTML, problem: gr.Markdown, chosen: gr.HTML, start: gr.Button, clear: gr.Button
) -> None:
    def find(value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "found": search_models(str(value.get("query") or ""))}

    def add(value: dict[str, Any], state: dict[str, Any]) -> tuple[Any, Any, Any]:
        try:
            name = security.repo_id(str(value.get("wanted") or ""), local=page.place.local)
        except ValueError as error:
            return gr.skip(), gr.skip(), gr.Markdown(security.escape_markdown(str(error)), visible=True)
        recipe = state["recipe"]
        if name in form.names(recipe):
            return gr.skip(), gr.skip(), gr.Markdown("That model is in the list already.", visible=True)
        base = recipe.get("base_model")
        recipe = form.with_models(recipe, [*form.names(recipe), name], form.name_of(base) if base else None)
        state = changed(recipe, "search", aside=state["aside"])
        return {**value, "taken": state["change"]}, state, gr.Markdown("", visible=False)

    def arrange(value: dict[str, Any], state: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
        wanted = [str(one["id"]) for one in value["models"]]
        known = [
            *form.names(state["recipe"]),
            (report.get("proposed_base") or {}).get("name"),
            form.name_of(state["recipe"].get("base_model")),
        ]
        wanted = [name for name in wanted if name in known]
        base = value.get("base") if value.get("base") in known else None
        recipe = form.with_models(state["recipe"], wanted, base)
        return changed(recipe, "models", value.get("seq"), state["aside"])

    search.input(find, search, search, trigger_mode="always_last", queue=False, **HIDDEN)
    search.submit(add, [search, page.recipe], [search, page.recipe, problem], **HIDDEN)
    chosen.input(arrange, [chosen, page.recipe, page.report], page.recipe, trigger_mode="always_last", **HIDDEN)
    start.click(lambda: changed(example(), "start"), None, page.recipe, **HIDDEN)
    clear.click(lambda: changed({"merge_method": "linear", "models": []}, "start"), None, page.recipe, **HIDDEN)
