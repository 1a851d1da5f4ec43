"""Task experts in a recipe: what the tasks are called, and which tensors are each task's own and not merged.

A head belongs to its task, and so does whatever not all models have in one shape: position tables of another size, a
pooler that one of them has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from hf_merge.adapters.modules import layout_of
from hf_merge.errors import RecipeError
from hf_merge.method import get_method
from hf_merge.planning import EXPERTS, SHARED, Input, Problem, Step, Tasks, kept_as
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.sources.view import View
from hf_merge.types import InMemory, Ref, TensorSpec

_HEADED = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|\w*Segmentation|\w*Detection)$")
"""Classes of transformers whose head is of one task; one over a vocabulary is of a language, and is merged."""
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


def has_experts(recipe: Recipe) -> bool:
    """Tell whether a recipe makes a backbone with task experts.

    Raises:
        RecipeError: only a part of it would.
    """
    parts = [part.merge_method for part in (*recipe.modules.values(), *recipe.rules)]
    inside = next((name for name in parts if name and get_method(name).experts), None)
    whole = get_method(recipe.merge_method).experts is not None
    if inside and not whole:
        raise RecipeError(
            f"'{inside}' makes task experts of whole models, not of parts: write merge_method: {inside} above all."
        )
    if whole and (recipe.slices or recipe.modules):
        raise RecipeError(f"'{recipe.merge_method}' makes task experts of whole models: list them under models:.")
    said = [name for name in ("tasks", "heads") if getattr(recipe, name) is not None]
    if said and not whole:
        raise RecipeError(
            f"The recipe says '{said[0]}', which is of task experts; '{recipe.merge_method}' has none: leave it out."
        )
    if whole and recipe.output_format == "adapter":
        raise RecipeError(f"'{recipe.merge_method}' makes a backbone with task experts: leave output_format out.")
    return whole


def task_names(recipe: Recipe) -> tuple[str, ...]:
    """Name the tasks of a recipe: as it says, or after its models; a folder can have each of these names.

    Raises:
        RecipeError: names that are not one for each model, not unlike, or no names of folders.
    """
    models = _models(recipe)
    if recipe.tasks is None:
        return _distinct([_NOT_IN_NAMES.sub("_", _last_name(model)).strip("_.") or "task" for model in models])
    folders = [name.casefold() for name in recipe.tasks]
    if len(recipe.tasks) != len(models):
        raise RecipeError(f"'tasks' has {len(recipe.tasks)} names for {len(models)} models: give one for each.")
    for name in recipe.tasks:
        if not name or _NOT_IN_NAMES.search(name) or name.startswith("."):
            raise RecipeError(
                f"'tasks' has '{name}', which no folder is called: take letters, digits, '_', '-' and '.'."
            )
        if name.casefold() == SHARED:
            raise RecipeError(f"'tasks' has '{name}', which stands for what all tasks share: take another name.")
    if twice := next(
        (name for name, folder in zip(recipe.tasks, folders, strict=True) if folders.count(folder) > 1), ""
    ):
        raise RecipeError(f"'tasks' has '{twice}' twice, upper and lower case being the same: give each its own name.")
    return recipe.tasks


def _last_name(model: Ref) -> str:
    path = model.label if isinstance(model, InMemory) else (model.lora[-1] if model.lora else model).path
    return path.rstrip("/").rpartition("/")[2]


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Number names that stand for several tasks, and those that are then taken."""
    folders = [name.casefold() for name in names]
    again = {folder for folder in folders if folders.count(folder) > 1} | {SHARED}
    numbered = [f"{name}_{i}" if name.casefold() in again else name for i, name in enumerate(names)]
    return tuple(names) if numbered == [*names] else _distinct(numbered)


def tasks_of(recipe: Recipe, sources: Mapping[Ref, Source]) -> Tasks:
    """Name the tasks of a recipe with task experts, and what is not merged; see `task_names` and `set_apart`."""
    return Tasks(task_names(recipe), tuple(_models(recipe)), set_apart(recipe, sources))


def _models(recipe: Recipe) -> list[Ref]:
    return [model for model in recipe.merged if model != recipe.base_model]


def set_apart(recipe: Recipe, sources: Mapping[Ref, Source]) -> frozenset[str]:
    """Name the tensors that are not merged, as they belong to one task each, or to the base alone.

    Args:
        recipe: with task experts.
        sources: its models, under the base's names.

    Raises:
        RecipeError: `heads` matches nothing, the models have next to nothing in common, or a name is taken.
    """
    merged = [sources[model] for model in _models(recipe)]
    everyone = [*merged, *([sources[recipe.base_model]] if recipe.base_model else [])]
    names = dict.fromkeys(name for source in everyone for name in source.specs)
    if taken := next((name for name in names if name.startswith(EXPERTS)), None):
        raise RecipeError(f"The tensor '{taken}' is called as those of task experts are: rename it by remap.")
    shapes = {name: {one.specs[name].shape if name in one.specs else None for one in everyone} for name in names}
    common = [name for name, found in shapes.items() if len(found) == 1]
    if 2 * len(common) < min(len(source.specs) for source in everyone):
        raise RecipeError(
            f"The models and their base have {len(common)} of {len(names)} tensors in common, in name and shape: name "
            "fine-tunes of one model, and that as base_model."
        )
    heads = _heads(merged, common) if recipe.heads is None else _matched([*names], recipe.heads)
    if not {*common} - {*heads}:
        raise RecipeError("'heads' matches every tensor, so that there is nothing to merge: name those of the heads.")
    return frozenset({*(names.keys() - set(common)), *heads})


def _matched(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in wanted}
    if idle := [pattern for pattern, matches in found.items() if not matches]:
        raise RecipeError(
            f"'heads' has '{idle[0]}', and no tensor is called so; the last one is '{names[-1]}': mend the pattern, or "
            "drop it."
        )
    return [name for matches in found.values() for name in matches]


def _heads(merged: Sequence[Source], common: Sequence[str]) -> list[str]:
    """Name the tensors that a class for one task has on top of its backbone."""
    headed = next((source for source in merged if _HEADED.search(_architecture(source))), None)
    layout = layout_of(headed.config) if headed else None
    if layout is None:
        return []
    return [name for name, live in layout.live(common).items() if live[0] in layout.heads]


def without(source: Source, names: frozenset[str]) -> Source:
    """Show a model without tensors that are not merged."""
    hidden = names & source.specs.keys()
    return View(source, {}, hidden) if hidden else source


def own_steps(recipe: Recipe, tasks: Tasks, sources: Mapping[Ref, Source]) -> tuple[Step, ...]:
    """Return what copies the tensors that are each task's own, in the dtype that the recipe asks for."""
    places = {model: place for place, model in enumerate(sources)}
    copy, dtype = get_method("passthrough"), getattr(torch, recipe.out_dtype or recipe.dtype or "", None)

    def step(task: str, model: Ref, name: str, spec: TensorSpec) -> Step:
        kept, inputs = kept_as(task, name, "whole"), (Input(places[model], name),)
        if not spec.dtype.is_floating_point:
            return Step(kept, None, inputs, None, {}, spec)
        return Step(kept, copy.name, inputs, None, copy.settings(1, {}), TensorSpec(spec.shape, dtype or spec.dtype))

    return tuple(
        step(task, model, name, spec)
        for task, model in zip(tasks.names, tasks.models, strict=True)
        for name, spec in sources[model].specs.items()
        if name in tasks.apart
    )


def head_problems(tasks: Tasks, sources: Mapping[Ref, Source]) -> list[Problem]:
    """Say which task has no head where others have one, as far as config.json tells what is a head."""
    heads = {model: _head(tasks, sources[model]) for model in tasks.models}
    headed = next((model for model, head in heads.items() if head), None)
    if headed is None:
        return []
    told = f"which '{headed}' has ('{heads[headed]}'): every task needs its own, or none has one."
    return [Problem("error", f"'{model}' has no head, {told}") for model, head in heads.items() if not head]


def _head(tasks: Tasks, source: Source) -> str | None:
    """Name a tensor of a model's head, if its class has one for a task."""
    own = (name for name in source.specs if name in tasks.apart)
    return next(own, None) if _HEADED.search(_architecture(source)) else None


def _architecture(source: Source) -> str:
    return next(iter(source.config.get("architectures") or ()), "")
