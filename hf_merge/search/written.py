"""What was learnt, as a recipe: heads stay as they are, and coefficients are weights, of tensors by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_merge.recipe import Recipe
from hf_merge.search.backbone import Backbone
from hf_merge.sources import Source


def keeping_heads(draft: Recipe, heads: Sequence[str], names: Sequence[str], experts: Sequence[Source]) -> Recipe:
    """Say in the recipe that heads stay as they are: as all the models have them, or else as the base has them."""
    changes: dict[str, Any] = {}
    if any(name not in source.specs for source in experts for name in names) and draft.missing == "error":
        changes["missing"] = "base"
    rules = []
    for name in heads:
        alike = all(name in one.specs and torch.equal(one[name], experts[0][name]) for one in experts
                    if name in experts[0].specs and one.specs.get(name) == experts[0].specs[name])  # fmt: skip
        alike = alike and all(one.specs.get(name) == experts[0].specs.get(name) for one in experts)
        kept = draft.merged[0] if alike else draft.base_model
        rules.append({"pattern": _exactly(name, names), "merge_method": "passthrough", "models": [kept]})
    data = {key: getattr(draft, key) for key in draft.model_fields_set}
    return Recipe.load({**data, **changes, "rules": [*rules, *draft.rules]}) if rules or changes else draft


def _exactly(name: str, names: Sequence[str]) -> str:
    """Write a pattern that matches one name and no other."""
    special = any(letter in name for letter in "*?[")
    alone = not special and not any(name in other for other in names if other != name)
    return (
        name
        if alone
        else "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name[:-1]) + f"[{name[-1]}]"
    )


def named(final: Tensor, backbone: Backbone, tasks: Mapping[str, Any], copies: Mapping[str, str]) -> dict[str, Any]:
    """Name the coefficients of every task."""
    columns = dict(zip(tasks, final.T.tolist(), strict=True))
    if backbone.level == "task":
        return {task: column[0] for task, column in columns.items()}
    names = [piece.name for piece in backbone.pieces]
    found = {task: dict(zip(names, column, strict=True)) for task, column in columns.items()}
    for each in found.values():
        each.update({alias: each[other] for alias, other in copies.items() if other in each})
    return found


def with_weights(recipe: Recipe, weights: Sequence[float | Mapping[str, float]]) -> Recipe:
    """Put coefficients into a recipe: for tensors, as filters by their names."""
    settings = [_filters(one) if isinstance(one, Mapping) else one for one in weights]
    entries = [entry.model_copy(update={"parameters": {**entry.parameters, "weight": setting}})
               for entry, setting in zip(recipe.models, settings, strict=True)]  # fmt: skip
    return recipe.model_copy(update={"models": tuple(entries)})


def _filters(weights: Mapping[str, float]) -> list[dict[str, Any]]:
    """Write a filter for each tensor; longer names come first, as a filter holds for every name that it is part of."""
    names = sorted(weights, key=lambda name: (-len(name), name))
    return [{"filter": name, "value": weights[name]} for name in names]
