"""What the page is made of beyond Gradio's own components: factories of `gr.HTML` whose value is plain data.

Four take input and trigger events when a person does something: `model_search`, `model_list`, `method_cards`,
`parameter_panel`. All others show. Each is drawn by the script of its name here, which writes whatever comes from other
people as text, never as HTML. Their look is in the `.css` files beside them, which `theme.launch` gives to the page.
"""

from .method_cards import method_cards
from .model_list import model_list
from .model_search import model_search
from .parameter_panel import parameter_panel
from .shown import heatmap, layer_strip, report_table, run_status, summary, trials, verdict

__all__ = [
    "heatmap",
    "layer_strip",
    "method_cards",
    "model_list",
    "model_search",
    "parameter_panel",
    "report_table",
    "run_status",
    "summary",
    "trials",
    "verdict",
]
