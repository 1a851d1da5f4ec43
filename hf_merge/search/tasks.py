"""Tasks: what each is called, its model and its data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_merge.data import read
from hf_merge.errors import ParameterError, RecipeError, did_you_mean
from hf_merge.recipe import Recipe
from hf_merge.search.found import is_recipe


def tasks_of(models: Any, base_model: Any) -> tuple[dict[str, Any], Any]:
    """Name the tasks, each with its model."""
    if is_recipe(models):
        recipe = Recipe.load(models)
        if not recipe.models:
            raise RecipeError("A search takes whole models: the recipe should name them under `models:`.")
        models, base_model = list(recipe.merged), base_model or recipe.base_model
    if base_model is None:
        raise ParameterError("Task vectors are differences to a base: pass base_model=, the model that was fine-tuned.")
    if isinstance(models, Mapping):
        return {str(task): model for task, model in models.items()}, base_model
    if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence):
        raise ParameterError("Models are a list, a mapping of tasks to models, or a recipe.")
    whole = [_called(model, i) for i, model in enumerate(models)]
    short = [name.rstrip("/").rpartition("/")[2] for name in whole]
    return dict(zip(short if len(set(short)) == len(short) else whole, models, strict=True)), base_model


def _called(model: Any, place: int) -> str:
    if isinstance(model, (str, os.PathLike)) or (hasattr(model, "path") and hasattr(model, "revision")):
        return str(model)
    return str(getattr(model, "label", f"model {place}"))


def data_of(tasks: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Find each task's data by its name, or by its model's, and open it."""
    if not isinstance(data, Mapping):
        raise ParameterError(f"Data is a mapping of tasks to data; the tasks are {', '.join(tasks)}.")
    whole = {str(model): task for task, model in tasks.items() if isinstance(model, (str, os.PathLike)) or
             hasattr(model, "path")}  # fmt: skip
    found: dict[str, Any] = {}
    for name, one in data.items():
        task = str(name) if str(name) in tasks else whole.get(str(name))
        if task is None:
            raise ParameterError(f"There is data of '{name}', and the tasks are {', '.join(tasks)}."
                                 f"{did_you_mean(str(name), tasks)}")  # fmt: skip
        found[task] = read(one, naming(task))
    if lacking := [task for task in tasks if task not in found]:
        raise ParameterError(f"There is no data of '{lacking[0]}': give each task some.")
    return found


def naming(task: str) -> str:
    return f"The data of '{task}'"
