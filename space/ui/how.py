"""Step 3: by which method, and with what numbers."""

from __future__ import annotations

from typing import Any

import form
import gradio as gr
from components import method_cards, parameter_panel
from ui.page import HIDDEN, Page, changed

import hf_merge
from hf_merge.controls import controls, in_words, needs

DTYPES = [("As the models", ""), "bfloat16", "float16", "float32"]
TOKENIZERS = [
    ("The base's, as it is", ""),
    ("United: all tokens of all models", "union"),
    ("The base's, rows by its tokens", "base"),
]
KEYS = [
    ("Those of the base", ""),
    ("The same in all models, or an error", "strict"),
    ("Those that all models have", "intersection"),
    ("Those that any model has", "union"),
]
MISSING = [("An error", ""), ("Keep the base's", "base"), ("Merge without that model", "skip-model")]
FORMATS = [("A model", ""), ("A LoRA adapter of the base", "adapter")]
OPTIONS = {
    "dtype": "dtype",
    "tokenizer": "tokenizer_source",
    "keys": "keys",
    "missing": "missing",
    "format": "output_format",
}


def build(page: Page) -> dict[str, Any]:
    """Lay the step out; return its components."""
    with gr.Group(elem_classes="step", elem_id="step-how"):
        gr.Markdown("## 3 · How")
        cards = method_cards(elem_id="methods")
        panel = parameter_panel(elem_id="parameters")
        with gr.Accordion(
            "More: dtype, tokenizer, tensors that differ, what is written", open=False, elem_id="options"
        ):
            with gr.Row():
                dtype = gr.Dropdown(
                    DTYPES, value="", label="Written as", info="The type of the weights.", interactive=True
                )
                tokenizer = gr.Dropdown(
                    TOKENIZERS, value="", label="Tokenizer", info="Of the result.", interactive=True
                )
                output = gr.Dropdown(FORMATS, value="", label="Result", info="What is written.", interactive=True)
            with gr.Row():
                keys = gr.Dropdown(
                    KEYS, value="", label="Tensors of the result", info="Where models differ.", interactive=True
                )
                missing = gr.Dropdown(
                    MISSING, value="", label="A tensor that some model lacks", info="Is", interactive=True
                )
                seed = gr.Number(
                    0, precision=0, minimum=0, label="Seed", info="Random methods draw from it.", interactive=True
                )

    def choose(value: dict[str, Any], state: dict[str, Any]) -> Any:
        if value["chosen"] not in hf_merge.list_methods():
            return gr.skip()
        recipe, aside = form.with_base(form.with_method(state["recipe"], value["chosen"]), state["aside"])
        return changed(recipe, "methods", aside=aside)

    def turn(value: dict[str, Any], state: dict[str, Any], report: dict[str, Any]) -> Any:
        recipe = state["recipe"]
        if value.get("method") != recipe.get("merge_method"):
            return gr.skip()  # an answer to a panel that is not there any more
        return changed(
            form.with_values(recipe, value["values"], report.get("words") or form.words(())),
            "parameters",
            value.get("seq"),
            state["aside"],
        )

    cards.input(choose, [cards, page.recipe], page.recipe, trigger_mode="always_last", **HIDDEN)
    panel.input(turn, [panel, page.recipe, page.report], page.recipe, trigger_mode="always_last", **HIDDEN)
    options = {"dtype": dtype, "tokenizer": tokenizer, "keys": keys, "missing": missing, "format": output, "seed": seed}
    for name, component in options.items():

        def opt(value: Any, state: dict[str, Any], name: str = name) -> dict[str, Any]:
            field = OPTIONS.get(name, name)
            recipe = {key: old for key, old in state["recipe"].items() if key != field}
            return changed(recipe | ({field: value} if value else {}), name, aside=state["aside"])

        component.input(opt, [component, page.recipe], page.recipe, trigger_mode="always_last", **HIDDEN)
    return {"cards": cards, "panel": panel, **options}


def shown(state: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what the step shows."""
    recipe, origin = state["recipe"], state["origin"]
    options: dict[str, Any] = {name: recipe.get(field) or "" for name, field in OPTIONS.items()}
    options["seed"] = recipe.get("seed") or 0
    counted = {"seq": state["seq"]} if origin == "parameters" and state.get("seq") is not None else {}
    panel = _panel(recipe, report) | counted
    made = {"cards": _cards(recipe, report, state["aside"]), "panel": panel, **options}
    return made | ({origin: gr.skip()} if origin in options else {})


def _cards(recipe: dict[str, Any], report: dict[str, Any], aside: Any) -> dict[str, Any]:
    count, base = len(form.names(recipe)), bool(recipe.get("base_model") or aside)
    adapters = bool(report.get("rows")) and all(row.get("role") == "adapter" for row in report["rows"])
    listed = []
    for name in hf_merge.list_methods():
        method = hf_merge.get_method(name)
        why = _why_not(method, count, base, adapters)
        listed.append(
            {
                "name": name,
                "summary": method.summary,
                "good_for": method.good_for,
                "needs": needs(method),
                "group": group_of(method),
                "works": not why,
                "why_not": why,
                "recommended": name == (report.get("method") or {}).get("name"),
            }
        )
    return {"methods": listed, "chosen": recipe.get("merge_method")}


def _why_not(method: hf_merge.MergeMethod, count: int, base: bool, adapters: bool) -> str:
    if method.space == "factors" and not adapters:
        return "It merges LoRA adapters with each other."
    if method.statistics:
        return "It merges by statistics that `hf-merge measure` makes of data: run it with the command or in Python."
    if not method.takes(count):
        return f"It takes {method.number_of_models}; there {'is' if count == 1 else 'are'} {count}."
    if (method.base == "required" or method.space == "deltas") and not base and not adapters:
        return "It needs a base model."
    return ""


def group_of(method: hf_merge.MergeMethod) -> str:
    """Return the heading under which the form shows a method."""
    if method.experts is not None:
        return "One light expert for each task"
    if method.space == "factors":
        return "LoRA adapters with each other"
    if method.statistics:
        return "By what data says"
    return "Changes of a base, added up" if method.space == "deltas" else "Weights, averaged or taken"


def _panel(recipe: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    name = recipe.get("merge_method")
    empty = {"method": "", "models": [], "base": None, "controls": [], "values": {}, "layers": 0, "sentence": ""}
    if name not in hf_merge.list_methods() or not form.names(recipe):
        return empty
    listed = [one.to_dict() for one in controls(str(name))]
    base = recipe.get("base_model")
    return {
        "method": name,
        "models": form.labels(form.names(recipe)),
        "base": form.label(form.name_of(base)) if base else None,
        "controls": listed,
        "values": form.values(recipe),
        "layers": report.get("layers") or 0,
        "sentence": _sentence(recipe),
    }


def _sentence(recipe: dict[str, Any]) -> str:
    name = recipe.get("merge_method")
    if name not in hf_merge.list_methods() or not form.names(recipe):
        return ""
    base = recipe.get("base_model")
    models = form.labels(form.names(recipe))
    return in_words(
        hf_merge.get_method(str(name)), form.values(recipe), models, form.label(form.name_of(base)) if base else None
    )
