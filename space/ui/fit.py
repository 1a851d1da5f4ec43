"""Step 2: whether these models go together, from their headers, and what would mend it."""

from __future__ import annotations

import json
from typing import Any

import form
import gradio as gr
import security
from components import report_table, verdict
from ui.page import HIDDEN, Page, changed

import hf_merge

FIXES = 4
"""How many fixes have a button; more than that are never offered."""

READY = ("fits", "warns")
"""Verdicts with which a merge may start."""

_HOW = ("parameters",)
"""What of a recipe says how much is merged, not whether it can be."""


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    with gr.Group(elem_classes="step", elem_id="step-fit"):
        gr.Markdown("## 2 · Will it work?")
        says = verdict(elem_id="verdict")
        with gr.Row(elem_classes="fixes"):
            fixes = [gr.Button(visible=False, size="sm", elem_id=f"fix-{i}") for i in range(FIXES)]
        table = report_table(elem_id="report")
    for place, button in enumerate(fixes):

        def mend(state: dict[str, Any], report: dict[str, Any], place: int = place) -> Any:
            offered = report.get("fixes", ())
            if place >= len(offered):
                return gr.skip()
            recipe = {**state["recipe"], **offered[place]["changes"]}
            recipe = {key: value for key, value in recipe.items() if value is not None}
            return changed(recipe, "fix", aside=state["aside"])

        button.click(mend, [page.recipe, page.report], page.recipe, **HIDDEN)
    return {"verdict": says, "report_table": table, **{f"fix_{i}": button for i, button in enumerate(fixes)}}


def key_of(recipe: dict[str, Any]) -> str:
    """Return what of a recipe a report depends on: all but the values of parameters."""
    whether = {name: value for name, value in recipe.items() if name not in _HOW}
    models = [{name: value for name, value in one.items() if name not in _HOW} for one in form.entries(recipe)]
    return json.dumps({**whether, "models": models}, sort_keys=True, default=str)


def examine(recipe: dict[str, Any], *, local: bool, **read: Any) -> dict[str, Any]:
    """Check a recipe from headers; what is wrong is in the report, never an exception."""
    key = key_of(recipe)
    if not form.names(recipe) and not recipe.get("slices") and not recipe.get("modules"):
        return {
            "key": key,
            "verdict": "empty",
            "sentence": "Add two models, or open the worked example.",
            "rows": [],
            "fixes": [],
        }
    try:
        security.allowed(recipe, local=local)
        report = hf_merge.check(dict(recipe), stream=not local, **read)  # strangers' pickles stay where they are
    except (security.Refused, hf_merge.MergeError) as error:
        return {"key": key, "verdict": "does not fit", "sentence": security.redact(str(error)), "rows": [], "fixes": []}
    tensors = report.plan.model_specs if report.plan else ()
    return {**report.to_dict(), "key": key, "words": form.words(tensors)}


def is_ready(recipe: dict[str, Any], report: dict[str, Any]) -> bool:
    """Tell whether a recipe may be merged: whether there is a report of it, and a good one."""
    return report.get("key") == key_of(recipe) and report.get("verdict") in READY


def waiting(recipe: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what the step shows until there is a report of this recipe: no verdict of another."""
    if report.get("key") == key_of(recipe):
        return {"verdict": gr.skip(), "start": gr.skip()}
    says = {"verdict": "checking", "sentence": "Headers, configurations and cards are read, no weights."}
    return {"verdict": says, "start": gr.Button(interactive=False)}


def known(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the step shows of a report that is that of the recipe again."""
    return {"verdict": report, "start": gr.Button(interactive=report.get("verdict") in READY)}


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the step shows of a report."""
    offered = list(report.get("fixes", ()))[:FIXES]
    buttons = {
        f"fix_{i}": gr.Button(offered[i]["label"], visible=True) if i < len(offered) else gr.Button(visible=False)
        for i in range(FIXES)
    }
    rows = list(report.get("rows", ()))
    named = [
        {**row, "name": short} for row, short in zip(rows, form.labels([row["name"] for row in rows]), strict=True)
    ]
    return {"verdict": report, "report_table": {**report, "rows": named}, **buttons}
