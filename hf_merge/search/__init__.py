"""Coefficients found by running models on data: AdaMerging, greedy soups. What is left is a recipe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_merge.search.learning import Learnt, adamerging
    from hf_merge.search.soups import Soup, accuracy, greedy_soup

_HOME = {"learning": ("Learnt", "adamerging"), "soups": ("Soup", "accuracy", "greedy_soup")}

__all__ = ["Learnt", "Soup", "accuracy", "adamerging", "greedy_soup"]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"hf_merge.search.{module}"), name)
    raise AttributeError(f"module 'hf_merge.search' has no attribute '{name}'")
