"""The merge methods as cards of which one is chosen."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .assets import scripted

COMMON = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties", "della", "model_stock", "breadcrumbs")
"""Methods that are shown before all others; those most often named in recipes."""


def method_cards(value: dict[str, Any] | None = None, *, elem_id: str | None = "methods") -> gr.HTML:
    """Return cards of methods; `.input` fires when one is chosen.

    The value is `{"methods": [{"name", "summary", "good_for", "needs": [str], "group", "works", "why_not",
    "recommended"}], "chosen": name}`. Recommended and common ones, and the one that is chosen, come first; the rest is
    behind `All methods`, by group. One that does not work with these models cannot be chosen, and says why. A field
    filters by all words.

    Use `show_progress="hidden"` for its events.
    """
    return scripted(value, "method_cards.js", elem_id=elem_id, common=list(COMMON))
