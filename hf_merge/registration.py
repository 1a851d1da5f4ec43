"""Lets transformers' Auto classes know recipe repos as soon as both libraries are imported, in whichever order.

Nothing is imported for it: where transformers comes later, its modules are seen to when they are done.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "hf_merge"
"""What config.json of a recipe repo says; `auto` and `recipe_repo` read it."""

_AUTO = "transformers.models.auto"
_AWAITED = {f"{_AUTO}.configuration_auto": "register_config", f"{_AUTO}.modeling_auto": "register_models"}
"""Modules of transformers, each with the function of `hf_merge.auto` that it is good for."""


def register_when_imported() -> None:
    """Register now what transformers has imported already, and the rest when it is."""
    for name in _AWAITED:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(name: str) -> None:
    try:
        getattr(importlib.import_module("hf_merge.auto"), _AWAITED[name])()
    except Exception as error:  # this is inside somebody's `import transformers`
        logging.getLogger(__name__).warning("transformers' Auto classes will not know recipe repos: %s", error)


class _Finder:
    """Finds the awaited modules where they always are, and registers when they have been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(fullname, path, target) if fullname in _AWAITED else None
        if found is None or found.loader is None:
            return None
        loader: Any = found.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(fullname)

        loader.exec_module = exec_module
        return found
