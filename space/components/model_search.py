"""The field by which models are added: what is typed is searched for, and only what is chosen is taken."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .assets import scripted


def model_search(value: dict[str, Any] | None = None, *, elem_id: str | None = "search") -> gr.HTML:
    """Return a field with proposals; `.input` fires while someone types, `.submit` when a model is to be added.

    The value is `{"label", "info", "query": what is typed, "found": [ids], "wanted": what is to be added, "taken": what
    was added last}`. Answer `.input` with `found`, and `.submit` with `taken`, which empties the field.

    Enter takes what was typed, unless a proposal was chosen by the arrow keys: an id may be the beginning of another.
    Gradio's own list takes the first proposal, and fails where proposals become fewer while they are shown.

    Use `show_progress="hidden"` and `trigger_mode="always_last"` for `.input`.
    """
    return scripted(value, "model_search.js", elem_id=elem_id)
