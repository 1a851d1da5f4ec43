"""Lets transformers' Auto classes know recipe repos, and PEFT task experts, in whichever order they are imported.

Nothing is imported for it: where the other library comes later, its modules are seen to when they are done.
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
_RECIPES, _EXPERTS = "transformers' Auto classes will not know recipe repos", "PEFT will not know task experts"
_AWAITED = {
    f"{_AUTO}.configuration_auto": ("hf_merge.auto", "register_config", _RECIPES),
    f"{_AUTO}.modeling_auto": ("hf_merge.auto", "register_models", _RECIPES),
    "peft": ("hf_merge.experts", "register", _EXPERTS),
}
"""Modules of others, each with the function of ours that it is good for, and what is lost where that fails."""


def register_when_imported() -> None:
    """Register now with what is imported already, and with the rest when it is."""
    for name in _AWAITED:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(name: str) -> None:
    module, function, loss = _AWAITED[name]
    try:
        getattr(importlib.import_module(module), function)()
    except Exception as error:  # this is inside somebody's `import transformers`
        logging.getLogger(__name__).warning("%s: %s", loss, error)


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
