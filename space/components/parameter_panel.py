"""The numbers of a merge: a widget for each parameter, for each model, and over depth where one wants."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .assets import scripted


def parameter_panel(value: dict[str, Any] | None = None, *, elem_id: str | None = "parameters") -> gr.HTML:
    """Return widgets for a method's parameters; `.input` fires while one is changed.

    The value is `{"method", "models": [labels], "base": label or None, "controls": [Control.to_dict()], "values":
    {name: setting, or a list with one for each model}, "layers": int, "sentence": str}`. A setting is a plain value,
    `{"curve": [2 to 9 numbers over depth]}` or `{"parts": {"attention": setting, "mlp": setting, "rest": setting}}`.
    Only `values` is changed by a person. The sentence is announced politely when it changes: answer an `input` with the
    same value and a new sentence (`hf_merge.controls.in_words`).

    A `seq` counts changes; give it back as it came. Of an answer that is late, only the sentence is taken, so that
    nothing jumps under the finger. A value without `seq` is taken whole.

    Use `show_progress="hidden"` and `trigger_mode="always_last"` for its events.
    """
    return scripted(value, "curve.js", "parameter_panel.js", elem_id=elem_id)
