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
    from hf_merge.api import extract_adapter, from_pretrained, merge, merge_state_dicts, plan
    from hf_merge.deployment import deploy
    from hf_merge.errors import (
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
    from hf_merge.hub import push_to_hub
    from hf_merge.measuring import measure
    from hf_merge.method import MergeMethod, get_method, list_methods, merge_method
    from hf_merge.planning import Plan
    from hf_merge.recipe import Recipe
    from hf_merge.results import MergedAdapter, MergedModel

_HOME = {
    "api": ("extract_adapter", "from_pretrained", "merge", "merge_state_dicts", "plan"),
    "deployment": ("deploy",),
    "errors": (
        "ComputeError", "DataError", "MergeError", "OutputError", "OutputExistsError", "ParameterError", "PlanError",
        "PublishError", "RecipeError", "SourceError", "UnknownMethodError",
    ),
    "hub": ("push_to_hub",),
    "measuring": ("measure",),
    "method": ("MergeMethod", "get_method", "list_methods", "merge_method"),
    "planning": ("Plan",),
    "recipe": ("Recipe",),
    "results": ("MergedAdapter", "MergedModel"),
}  # fmt: skip
"""Where each public name lives; nothing is imported before it is used, so that `import hf_merge` is quick."""

__all__ = [
    "ComputeError",
    "DataError",
    "MergeError",
    "MergeMethod",
    "MergedAdapter",
    "MergedModel",
    "OutputError",
    "OutputExistsError",
    "ParameterError",
    "Plan",
    "PlanError",
    "PublishError",
    "Recipe",
    "RecipeError",
    "SourceError",
    "UnknownMethodError",
    "deploy",
    "extract_adapter",
    "from_pretrained",
    "get_method",
    "list_methods",
    "measure",
    "merge",
    "merge_method",
    "merge_state_dicts",
    "plan",
    "push_to_hub",
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
