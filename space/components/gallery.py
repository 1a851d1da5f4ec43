"""Every component with sample data on one page: `python space/components/gallery.py [PORT]`.

The names of models are hostile on purpose; the tests in tests/space/test_components.py drive this page.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradio as gr
import theme

import components
import hf_merge
from hf_merge.controls import controls, in_words, needs

HOSTILE = "<img src=x onerror=window.hacked=1>"
TEMPLATE = "${window.hacked=2}{{value}}`"
NAMES = ["tiny-code", "tiny-math", HOSTILE]
MODELS = [
    {"id": "org/tiny-code", "label": "tiny-code", "kind": "model", "note": "Llama · bfloat16", "problem": ""},
    {"id": "org/tiny-math", "label": "tiny-math", "kind": "adapter", "note": "LoRA, rank 8", "problem": ""},
    {"id": f"evil/{HOSTILE}", "label": HOSTILE, "kind": "folder", "note": TEMPLATE,
     "problem": "embed_tokens has 128,256 rows, the base 128,320: the tokenizers differ."},
]  # fmt: skip
FOUND = ["org/tiny-base", "org/tiny-b", f"org/{HOSTILE}"]
COSINES = {
    "trials": [
        {"label": name, "outputs": [{"similarity": [1.0, 0.147]}, {"similarity": [0.147, 1.0]}], "seconds": 0.2}
        for name in ("merged", HOSTILE)
    ]
}


def models_value(*, ordered: bool = True) -> dict[str, Any]:
    """Return a list of models."""
    return {"models": MODELS, "base": None, "proposed_base": "org/tiny-base", "ordered": ordered}


def methods_value() -> dict[str, Any]:
    """Return all methods as cards; those on adapters do not work here."""
    listed = []
    for name in hf_merge.list_methods():
        method = hf_merge.get_method(name)
        works = method.space != "factors" and method.takes(len(NAMES)) and not method.statistics
        group = {"factors": "LoRA adapters", "deltas": "Changes of a base", "models": "Weights"}[method.space]
        why = "" if works else f"It merges {method.number_of_models} ({', '.join(needs(method)) or 'plain weights'})."
        listed.append({
            "name": name, "summary": method.summary, "good_for": method.good_for, "needs": needs(method),
            "group": group, "works": works, "why_not": why, "recommended": name == "ties",
        })  # fmt: skip
    return {"methods": listed, "chosen": "ties"}


def panel_value(name: str = "ties") -> dict[str, Any]:
    """Return a panel of a method's parameters with its defaults, a curve and parts."""
    made = controls(name)
    values: dict[str, Any] = {one.name: [one.default] * len(NAMES) if one.per_model else one.default for one in made}
    if name == "ties":
        values["density"] = [0.5, {"curve": [0.2, 0.8, 0.3]}, {"parts": {"attention": 0.3, "mlp": 0.7, "rest": 1.0}}]
    return {
        "method": name, "models": NAMES, "base": "tiny-base", "controls": [one.to_dict() for one in made],
        "values": values, "layers": 12, "sentence": in_words(name, values, NAMES, "tiny-base"),
    }  # fmt: skip


REPORT = {
    "verdict": "warns", "sentence": f"3 models of one architecture; {HOSTILE} has another vocabulary.",
    "problems": ["The chat templates differ: the base's is taken."],
    "licence": "The result is non-commercial: tiny-math is CC BY-NC 4.0.",
    "rows": [
        {"name": "tiny-base", "role": "base", "architecture": "LlamaForCausalLM", "tensors": 290, "matching": 290,
         "missing": [], "extra": [], "differing": [], "example": "", "dtype": "bfloat16", "size": 1_240_000_000,
         "vocabulary": 128256, "chat_template": True, "quantised": None, "gated": False, "custom_code": False,
         "licence": "apache-2.0", "revision": "a1b2c3d4e5f6", "error": ""},
        {"name": HOSTILE, "role": "model", "architecture": "LlamaForCausalLM", "tensors": 290, "matching": 288,
         "missing": [], "extra": [], "differing": ["a", "b"], "dtype": "float16", "size": 1_240_000_000,
         "example": "embed_tokens has 128,320 rows, the base 128,256: the tokenizers differ.", "vocabulary": 128320,
         "chat_template": None, "quantised": "bnb 4 bit", "gated": True, "custom_code": True, "licence": TEMPLATE,
         "revision": "", "error": ""},
        {"name": "gone", "role": "model", "error": "There is no model 'org/gone' on the Hub, or it is private."},
    ],
}  # fmt: skip
HEAT = {
    "rows": ["tiny-code", HOSTILE, TEMPLATE], "columns": ["tiny-code", HOSTILE, TEMPLATE],
    "values": [[1.0, 0.1, -0.62], [0.1, 1.0, 0.43], [-0.62, 0.43, None]], "low": -1, "high": 1, "corner": "model",
    "caption": "How alike the changes are",
    "reading": "tiny-code and the second barely overlap (0.10): adding both is safe.",
}  # fmt: skip
CONFLICTS = {
    "rows": [f"layer {i}" for i in range(6)], "columns": ["attention", "mlp", "norm", "embedding"],
    "values": [[round((i * 7 + j * 13) % 50 / 50, 2) for j in range(4)] for i in range(6)], "low": 0, "high": 1,
    "caption": "Where signs disagree", "reading": "Half of the entries disagree in layer 3.",
}  # fmt: skip
STRIP = {
    "cells": [
        {"label": str(i), "done": min(1, max(0, 8.5 - i)), "change": 0.01 * (1 + i % 5) if i < 9 else None}
        for i in range(16)
    ]
}
RUNNING = {
    "state": "running", "stage": "merging", "place": None, "tensor": "model.layers.11.self_attn.q_proj.weight",
    "tensors": 124, "all_tensors": 290, "bytes": 530_000_000, "all_bytes": 1_240_000_000, "rate": 84_000_000,
    "eta": 8.4, "message": "",
}  # fmt: skip
FAILED = {"state": "failed", "message": f"{HOSTILE} cannot be read: the file ends early."}
SUMMARY = {
    "verdict": "warns", "sentence": "", "models": NAMES, "method": "ties", "download": 3_700_000_000,
    "write": 1_240_000_000, "memory": 900_000_000, "disk": 5_200_000_000, "free": 4_000_000_000, "seconds": 200,
    "fits": False, "ready": True, "licence": "CC BY-NC 4.0",
    "command": "hf-merge merge recipe.yaml --push-to-hub me/merged --job cpu-upgrade",
}  # fmt: skip
LABELS = [{"label": "positive", "score": 0.93}, {"label": TEMPLATE, "score": 0.07}]
TRIALS = {
    "trials": [
        {"label": "merged", "outputs": [{"text": f"def add(a, b):\n    return a  # {HOSTILE}"}],
         "seconds": 1.2, "error": None},
        {"label": "tiny-code", "outputs": [{"labels": LABELS}], "seconds": 0.4, "error": None},
        {"label": HOSTILE, "outputs": [], "seconds": 0, "error": "It has code of its own, which is not run here."},
    ]
}  # fmt: skip


def build() -> gr.Blocks:
    """Lay the gallery out."""
    with gr.Blocks(title="Components", analytics_enabled=False) as demo:
        gr.Markdown("# Components\nAll parts of the page, with sample data.")
        with gr.Row(elem_classes="page"):
            with gr.Column(scale=3, min_width=320, elem_classes="steps"):
                search, models, cards, panel = _inputs()
                with gr.Group(elem_classes="step"):
                    gr.Markdown("## 5 · Result")
                    components.heatmap(HEAT, elem_id="similarity")
                    components.heatmap(CONFLICTS, elem_id="conflicts")
                    components.layer_strip(STRIP, elem_id="strip")
                    components.trials(TRIALS, elem_id="answers")
                    components.trials(COSINES, elem_id="cosines")
            with gr.Column(scale=1, min_width=300, elem_classes="aside"), gr.Group(elem_classes="rail"):
                gr.Markdown("## Your merge")
                components.summary(SUMMARY, elem_id="summary")
                gr.Button("Merge", variant="primary", size="lg")
                status = components.run_status(RUNNING, elem_id="run")
                components.run_status(FAILED, elem_id="failed")
                fail = gr.Button("Let it end", size="sm", elem_id="end")
                said = gr.Textbox(label="Last change", lines=3, elem_id="said")
        _wire(search, models, cards, panel, said)
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        fail.click(lambda: {"state": "done", "seconds": 61}, None, status, **quiet)
    return demo


def _inputs() -> tuple[gr.HTML, gr.HTML, gr.HTML, gr.HTML]:
    """Lay out the steps that take input."""
    with gr.Group(elem_classes="step"):
        gr.Markdown("## 1 · Models")
        search = components.model_search({"label": "Add a model", "info": "Type to search the Hub.", "found": FOUND})
        models = components.model_list(models_value(), elem_id="models")
    with gr.Group(elem_classes="step"):
        gr.Markdown("## 2 · Will it work?")
        components.verdict(REPORT, elem_id="verdict")
        components.report_table(REPORT, elem_id="report")
    with gr.Group(elem_classes="step"):
        gr.Markdown("## 3 · How")
        cards = components.method_cards(methods_value(), elem_id="methods")
        panel = components.parameter_panel(panel_value(), elem_id="parameters")
        gr.Slider(0, 1, 0.5, label="A slider of Gradio's", info="What stands below a slider is read as well.")
    return search, models, cards, panel


def _wire(search: gr.HTML, models: gr.HTML, cards: gr.HTML, panel: gr.HTML, said: gr.Textbox) -> None:
    """Answer as the page does: the sentence follows the numbers, the panel the method."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}

    def talk(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
        words = in_words(value["method"], value["values"], value["models"], value["base"])
        return value | {"sentence": words}, json.dumps(value["values"])

    def add(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
        return value | {"taken": secrets.token_hex(4)}, json.dumps(value)

    def switch(value: dict[str, Any]) -> tuple[dict[str, Any], str]:
        return panel_value(value["chosen"]), value["chosen"]

    search.submit(add, search, [search, said], **quiet)
    panel.input(talk, panel, [panel, said], **quiet)
    cards.input(switch, cards, [panel, said], **quiet)
    models.input(
        lambda value: json.dumps([[one["id"] for one in value["models"]], value["base"]]), models, said, **quiet
    )


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else None
    build().launch(server_port=port, **theme.launch())
