"""What searches share: models that a recipe names, the device they run on, and the files of what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_merge.errors import OutputError
from hf_merge.recipe import Recipe
from hf_merge.types import InMemory


def is_recipe(models: Any) -> bool:
    """Tell a recipe, or the path of one, from models."""
    named = isinstance(models, (str, os.PathLike))
    return isinstance(models, Recipe) or (named and str(models).endswith((".yaml", ".yml", ".json")))


def device_of(device: str | torch.device | None) -> torch.device:
    """Return the device that was asked for, or else an accelerator if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def save_found(recipe: Recipe, log: Sequence[Mapping[str, Any]], output: str | os.PathLike[str]) -> Path:
    """Write a recipe to a YAML file, and a log beside it as `.jsonl`; return the path of the recipe.

    Raises:
        OutputError: the recipe names models in memory.
    """
    if any(isinstance(model, InMemory) for model in recipe.references):
        raise OutputError("The recipe names models in memory, which no file can: save them, and name their folders.")
    path = Path(output).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    return path
