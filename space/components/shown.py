"""Components that only show: what was found, what a merge costs, how far it is, and what came out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .assets import scripted


def verdict(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return a verdict, announced when it changes: `{"verdict": "fits" | "warns" | "does not fit", "sentence"}`.

    More of a report may be there: `licence` and `problems` (texts, or `{"message", "fix"}`) are shown as well.
    """
    return scripted(value, "verdict.js", elem_id=elem_id)


def report_table(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return a table of what was found of each model: the `rows` of `hf_merge.check(..).to_dict()`."""
    return scripted(value, "report_table.js", elem_id=elem_id)


def heatmap(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return a table of numbers with a colour behind each, which scrolls in its own frame.

    The value is `{"rows": [labels], "columns": [labels], "values": [[number or None]], "caption", "reading", "corner",
    "low", "high", "digits"}`; all from `caption` on may be left out. The colours go from `low` to `high`, by default
    those of the values; with two hues where these lie on both sides of 0.
    """
    return scripted(value, "heatmap.js", elem_id=elem_id)


def layer_strip(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return a cell for each layer, which fills as it is merged.

    The value is `{"cells": [{"label", "done": 0 to 1, "change": number or None}], "caption"}`; no caption is needed.
    """
    return scripted(value, "layer_strip.js", elem_id=elem_id)


def run_status(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return how far a merge is; nothing while `state` is empty or `idle`.

    The value is `{"state", "stage", "place", "tensor", "tensors", "all_tensors", "bytes", "all_bytes", "rate", "eta",
    "message", "seconds"}`: a state is `queued`, `running`, `cancelling`, `done`, `failed`, `cancelled` or `lost`; place
    is that in the queue, from 1; sizes are in bytes, the rate in bytes a second, times in seconds. What is unknown is
    left out or None. What changes each second is not announced; states, stages, places and each tenth of the way are.
    """
    return scripted(value, "run_status.js", elem_id=elem_id)


def summary(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return cards of what a merge is and costs.

    The value is `{"verdict", "sentence", "models": [labels], "method", "download", "write", "memory", "disk", "free",
    "seconds", "fits", "ready", "licence", "command"}`: sizes are in bytes; the command is shown where it does not fit.
    """
    return scripted(value, "summary.js", elem_id=elem_id)


def trials(value: dict[str, Any] | None = None, *, elem_id: str | None = None) -> gr.HTML:
    """Return answers of models beside each other, announced when they come.

    The value is `{"trials": [Trial.to_dict()], "error"}`; an error stands above all of them.
    """
    return scripted(value, "trials.js", elem_id=elem_id)
