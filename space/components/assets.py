"""Scripts and styles that lie beside the components, and the one way in which a component gets its script."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

FOLDER = Path(__file__).resolve().parent
COMMON = "common.js"


@cache
def script(*names: str) -> str:
    """Return scripts as one, after the helpers that all of them use."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in (COMMON, *names))


@cache
def styles() -> str:
    """Return the styles of all components."""
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.css")))


def scripted(value: dict[str, Any] | None, *scripts: str, elem_id: str | None, **options: Any) -> gr.HTML:
    """Return a component that a script draws.

    The template is constant and holds nothing of the value: Gradio evaluates what a template makes as JavaScript, so
    that a model called `${..}` would run, escaped or not.
    """
    return gr.HTML(
        value=value or {}, html_template='<div class="hm"></div>', js_on_load=script(*scripts), apply_default_css=False,
        elem_id=elem_id, elem_classes=["hm-component"], **options,
    )  # fmt: skip
