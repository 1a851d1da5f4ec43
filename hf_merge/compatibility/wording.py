"""A verdict in one sentence, with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_merge.compatibility.report import ModelRow, Verdict, listed
from hf_merge.planning import Problem
from hf_merge.recipe import Recipe


def sentence(verdict: Verdict, rows: Sequence[ModelRow], problems: Sequence[Problem], recipe: Recipe) -> str:
    """Say the verdict with its reason."""
    if lost := [row for row in rows if row.error]:
        what = "none of the models" if len(lost) == len(rows) > 1 else listed([row.name for row in lost])
        can = "can be read" if what.startswith("none") else "cannot be read"
        return f"{what[0].upper()}{what[1:]} {can}: {lost[0].error}"
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        told = [error.message for error in errors]
        unlike = [row for row in rows if row.example and any(f"{row.name}'" in message for message in told)]
        if unlike:
            return f"'{unlike[0].name}' does not fit: {unlike[0].example}."
        return f"The models fit each other, but not this merge: {errors[0].message}"
    if verdict == "does not fit":
        return "There is no plan for a merge of these models."
    if len(recipe.merged) == 1 and recipe.base_model is None:
        told = "There is one model alone, which can be copied"
    elif _unit(rows) == "modules" and any(row.missing or row.extra for row in rows):
        told = "The adapters can be merged, though they do not change the same modules"
    elif any(row.missing or row.extra or row.differing for row in rows):
        told = "The models can be merged, though not all of their tensors match"
    else:
        told = f"The models fit: they have the same {rows[0].tensors:,} {_unit(rows)} in the same shapes"
    return f"{told}, with something to know first: {problems[0].message}" if problems else f"{told}."


def _unit(rows: Iterable[ModelRow]) -> str:
    return "modules" if all(row.role == "adapter" and row.vocabulary is None for row in rows) else "tensors"
