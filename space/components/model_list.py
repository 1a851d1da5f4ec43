"""The models that are merged: their order, and which of them is the base."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .assets import scripted


def model_list(value: dict[str, Any] | None = None, *, elem_id: str | None = "models") -> gr.HTML:
    """Return a list of models; `.input` fires when one is moved, removed or made the base.

    The value is `{"models": [{"id", "label", "kind", "note", "problem"}], "base": id or None, "proposed_base": id or
    None, "ordered": bool}`. Kind is `model`, `adapter` or `folder`; note and problem are shown as text. The base may be
    one of the models, or another id, which then has a row of its own; a model that a person makes the base leaves the
    list, and comes back to it when another takes its place. Handles for dragging, and places, are there only
    where the order matters. A `seq` counts changes; give it back as it came, so that an answer that is late is not
    taken.

    Use `show_progress="hidden"` and `trigger_mode="always_last"` for its events.
    """
    return scripted(value, "model_list.js", elem_id=elem_id)
