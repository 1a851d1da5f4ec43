"""Merge Hugging Face models: plan from headers, stream in bounded memory, reproduce bit for bit.

import hf_merge

merged = hf_merge.merge(["org/a", "org/b"], "merged", method="ties", base_model="org/base", density=0.5)
model = merged.load()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_merge.registration import register_when_imported

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_merge.analysis.analyzing import analyze
    from hf_merge.analysis.found import Analysis
    from hf_merge.api import extract_adapter, from_pretrained, merge, merge_state_dicts, plan
    from hf_merge.compatibility import Fix, Report, check
    from hf_merge.deployment import deploy
    from hf_merge.errors import (
        Cancelled,
        ComputeError,
        DataError,
        MergeError,
        OutputError,
        OutputExistsError,
        ParameterError,
        PlanError,
        PublishError,
        RecipeError,
        SourceError,
        UnknownMethodError,
    )
    from hf_merge.experts.loading import load_experts
    from hf_merge.experts.merged import MergedExperts
    from hf_merge.experts.mixing import RoutedOutput
    from hf_merge.experts.routed import RoutedModel
    from hf_merge.experts.routers import Router
    from hf_merge.experts.training import train_router
    from hf_merge.hub import push_to_hub
    from hf_merge.measuring import measure
    from hf_merge.method import MergeMethod, get_method, list_methods, merge_method
    from hf_merge.planning import Plan
    from hf_merge.progress import Progress
    from hf_merge.recipe import Recipe
    from hf_merge.results import MergedAdapter, MergedModel, MergedModelWithExperts
    from hf_merge.trial.trying import Trial, try_out

_HOME = {
    "analysis.analyzing": ("analyze",),
    "analysis.found": ("Analysis",),
    "api": ("extract_adapter", "from_pretrained", "merge", "merge_state_dicts", "plan"),
    "compatibility": ("Fix", "Report", "check"),
    "deployment": ("deploy",),
    "errors": (
        "Cancelled", "ComputeError", "DataError", "MergeError", "OutputError", "OutputExistsError", "ParameterError",
        "PlanError", "PublishError", "RecipeError", "SourceError", "UnknownMethodError",
    ),
    "experts.merged": ("MergedExperts",),
    "experts.loading": ("load_experts",),
    "experts.mixing": ("RoutedOutput",),
    "experts.routed": ("RoutedModel",),
    "experts.routers": ("Router",),
    "experts.training": ("train_router",),
    "hub": ("push_to_hub",),
    "measuring": ("measure",),
    "method": ("MergeMethod", "get_method", "list_methods", "merge_method"),
    "planning": ("Plan",),
    "progress": ("Progress",),
    "recipe": ("Recipe",),
    "results": ("MergedAdapter", "MergedModel", "MergedModelWithExperts"),
    "trial.trying": ("Trial", "try_out"),
}  # fmt: skip
"""Where each public name lives; nothing is imported before it is used, so that `import hf_merge` is quick."""

__all__ = [
    "Analysis",
    "Cancelled",
    "ComputeError",
    "DataError",
    "Fix",
    "MergeError",
    "MergeMethod",
    "MergedAdapter",
    "MergedExperts",
    "MergedModel",
    "MergedModelWithExperts",
    "OutputError",
    "OutputExistsError",
    "ParameterError",
    "Plan",
    "PlanError",
    "Progress",
    "PublishError",
    "Recipe",
    "RecipeError",
    "Report",
    "RoutedModel",
    "RoutedOutput",
    "Router",
    "SourceError",
    "Trial",
    "UnknownMethodError",
    "analyze",
    "check",
    "deploy",
    "extract_adapter",
    "from_pretrained",
    "get_method",
    "list_methods",
    "load_experts",
    "measure",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "plan",
    "push_to_hub",
    "train_router",
    "try_out",
]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "search":
        return importlib.import_module("hf_merge.search")
    for module, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(f"hf_merge.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'hf_merge' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
