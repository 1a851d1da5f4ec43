"""How the page looks: warm paper and ink, one green, the system's own fonts; light and dark, all text with AA contrast.

Gradio's components take their look from the theme, our own from `.hm-` rules; both from the same few colours. The
styles go into the page's head, not through Gradio's `css`, which drops nested and conditional rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.assets import styles
from gradio.themes import Base
from gradio.themes.utils import colors, sizes

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONOSPACE = ("ui-monospace", "SF Mono", "Cascadia Code", "Menlo", "Consolas", "monospace")
GREEN = colors.Color(
    "#edf6f4", "#d5eae6", "#aed6cf", "#7fbdb3", "#4a9e92", "#1f8074",
    "#0c6a5f", "#0b584f", "#0a463f", "#083730", "#052420", name="green",
)  # fmt: skip
PAPER = colors.Color(
    "#fbfaf7", "#f4f2ec", "#e6e3da", "#cfcbbf", "#a8a497", "#7a7669",
    "#5c594f", "#46443c", "#2c2b27", "#1d1d1a", "#131311", name="paper",
)  # fmt: skip


def theme() -> Base:
    """Return the theme."""
    return Base(
        primary_hue=GREEN, secondary_hue=GREEN, neutral_hue=PAPER, spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_md, text_size=sizes.text_md, font=list(FONTS), font_mono=list(MONOSPACE),
    ).set(
        body_background_fill="#fbfaf7", body_background_fill_dark="#131517",
        body_text_color="#1d1d1a", body_text_color_dark="#e9e7e1",
        body_text_color_subdued="#5c594f", body_text_color_subdued_dark="#b3afa4",
        background_fill_primary="#ffffff", background_fill_primary_dark="#1b1e20",
        background_fill_secondary="#f4f2ec", background_fill_secondary_dark="#23272a",
        block_background_fill="#ffffff", block_background_fill_dark="#1b1e20",
        block_border_color="#e6e3da", block_border_color_dark="#33383c", block_border_width="1px",
        block_shadow="none", block_shadow_dark="none",
        block_label_text_color="#46443c", block_label_text_color_dark="#d5d1c6", block_label_text_weight="600",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_title_text_color="#1d1d1a", block_title_text_color_dark="#e9e7e1", block_title_text_weight="600",
        block_info_text_color="#5c594f", block_info_text_color_dark="#b3afa4",
        border_color_primary="#e6e3da", border_color_primary_dark="#33383c",
        border_color_accent="#0c6a5f", border_color_accent_dark="#7fd0c3",
        color_accent="#0c6a5f", color_accent_soft="#edf6f4", color_accent_soft_dark="#17322f",
        input_background_fill="#ffffff", input_background_fill_dark="#131517",
        input_border_color="#8d897c", input_border_color_dark="#7d8287", input_border_width="1px",
        input_border_color_focus="#0c6a5f", input_border_color_focus_dark="#7fd0c3",
        input_placeholder_color="#6b675b", input_placeholder_color_dark="#a19d92",
        slider_color="#0c6a5f", slider_color_dark="#7fd0c3",
        checkbox_background_color_selected="#0c6a5f", checkbox_background_color_selected_dark="#1f8074",
        checkbox_border_color="#7a7669", checkbox_border_color_dark="#8d9297",
        checkbox_border_color_selected="#0c6a5f", checkbox_border_color_selected_dark="#7fd0c3",
        checkbox_label_text_color="#1d1d1a", checkbox_label_text_color_dark="#e9e7e1",
        button_primary_background_fill="#0c6a5f", button_primary_background_fill_dark="#0f7568",
        button_primary_background_fill_hover="#0b584f", button_primary_background_fill_hover_dark="#138577",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#f4f2ec", button_secondary_background_fill_dark="#2a2f32",
        button_secondary_background_fill_hover="#e6e3da", button_secondary_background_fill_hover_dark="#353b3f",
        button_secondary_border_color="#cfcbbf", button_secondary_border_color_dark="#4a5156",
        button_secondary_text_color="#1d1d1a", button_secondary_text_color_dark="#e9e7e1",
        button_cancel_background_fill="#ffffff", button_cancel_background_fill_dark="#1b1e20",
        button_cancel_text_color="#a1261d", button_cancel_text_color_dark="#ff9d92",
        button_cancel_border_color="#a1261d", button_cancel_border_color_dark="#ff9d92",
        link_text_color="#0c6a5f", link_text_color_dark="#7fd0c3",
        link_text_color_hover="#083730", link_text_color_hover_dark="#aee5dc",
        link_text_color_visited="#0c6a5f", link_text_color_visited_dark="#7fd0c3",
        link_text_color_active="#083730", link_text_color_active_dark="#aee5dc",
        error_text_color="#a1261d", error_text_color_dark="#ff9d92",
        table_even_background_fill="#ffffff", table_even_background_fill_dark="#1b1e20",
        table_odd_background_fill="#fbfaf7", table_odd_background_fill_dark="#202427",
        table_border_color="#e6e3da", table_border_color_dark="#33383c",
    )  # fmt: skip


def head() -> str:
    """Return what the page's head holds: the styles of the page and of its components."""
    page = (Path(__file__).resolve().parent / "theme.css").read_text(encoding="utf-8")
    return f"<style>\n{page}\n{styles()}\n</style>"


def launch() -> dict[str, Any]:
    """Return the look as keywords of `Blocks.launch` and `gr.mount_gradio_app`."""
    return {"theme": theme(), "head": head(), "footer_links": ["api", "settings"]}
