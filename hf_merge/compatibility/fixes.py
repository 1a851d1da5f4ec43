"""What would help: changes of a recipe, each planned before it is offered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from hf_merge.compatibility.reading import Readings
from hf_merge.compatibility.report import Advice, Fix, listed, plain_entry
from hf_merge.compatibility.rows import Comparison, in_words
from hf_merge.errors import MergeError
from hf_merge.method import get_method
from hf_merge.planning import Problem
from hf_merge.recipe import Recipe
from hf_merge.schedule import Layers
from hf_merge.types import InMemory, Ref

_MAX_RULES = 8
_MAX_PAIRS = 12
_COMMON = 0.5
"""The share of tensors that has to match before the others are worth setting apart."""


@dataclass(frozen=True)
class Situation:
    """What is known of a recipe when fixes are sought.

    Attributes:
        recipe: as it was asked.
        readings: its models.
        compared: those that can be read beside the donor, but for that one.
        donor: the model that they are compared with, and how messages call it.
        problems: of its plan.
        base: the base that cards name.
        method: to take instead.
    """

    recipe: Recipe
    readings: Readings
    compared: Mapping[Ref, Comparison]
    donor: tuple[Ref, str] | None
    problems: Sequence[Problem]
    base: Advice | None
    method: Advice

    @property
    def errors(self) -> bool:
        return bool(self.readings.errors) or any(one.severity == "error" for one in self.problems)


def fixes_for(situation: Situation) -> tuple[Fix, ...]:
    """Return the changes after which nothing is in the way; or of which a warning is gone, where there was no error.

    Where no change does it alone, two together are tried.
    """
    known = list(dict.fromkeys(map(_Hashed, _candidates(situation))))
    alone = [one.fix for one in known if _helps(situation, one.fix)]
    if alone or not situation.errors:
        return tuple(alone)
    pairs = [
        _joined(one.fix, two.fix)
        for one, two in combinations(known, 2)
        if not one.fix.changes.keys() & two.fix.changes.keys()
    ]
    return tuple(pair for pair in pairs[:_MAX_PAIRS] if _helps(situation, pair))[:3]


class _Hashed:
    """A fix that is equal to others with the same changes."""

    def __init__(self, fix: Fix):
        self.fix, self._key = fix, json.dumps(fix.plain, sort_keys=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _helps(situation: Situation, fix: Fix) -> bool:
    """Plan the recipe with a fix."""
    try:
        changed = fix.apply(situation.recipe)
        if set(changed.references) & situation.readings.errors.keys():
            return False
        made, _ = situation.readings.plan(changed, where=("cpu", None))
    except MergeError:
        return False
    left = {problem.message for problem in made.problems}
    return not made.errors and not all(problem.message in left for problem in _mended(situation))


def _mended(situation: Situation) -> Iterator[Problem]:
    """Yield the problems of which one has to go: the errors, or else the warnings."""
    if situation.readings.errors:
        yield Problem("error", "a model cannot be read")
    worst = "error" if situation.errors else "warning"
    yield from (problem for problem in situation.problems if problem.severity == worst)


def _joined(one: Fix, two: Fix) -> Fix:
    label = f"{one.label}, and {two.label[0].lower()}{two.label[1:]}"
    return Fix(label, f"{one.why} {two.why}", {**one.changes, **two.changes})


def _candidates(situation: Situation) -> Iterator[Fix]:
    yield from _of_vocabulary(situation)
    if not situation.errors:
        return
    yield from _of_base(situation)
    yield from _of_tensors(situation)
    yield from _of_method(situation)
    yield from _of_models(situation)


def _of_vocabulary(situation: Situation) -> Iterator[Fix]:
    asked = any("tokenizer_source" in problem.message for problem in situation.problems)
    if situation.recipe.vocabulary is not None or situation.donor is None or not asked:
        return
    label = situation.donor[1]
    why = f"Rows of embeddings and heads are matched by token; tokens that '{label}' lacks are left out."
    yield Fix(f"Use the tokenizer of '{label}'", why, {"tokenizer_source": "base"})
    if any("other tokens than" in problem.message for problem in situation.problems):
        return  # such tokenizers seldom have a union, and to prove that takes seconds
    why = "The result has the tokens of all models; rows are matched by token."
    yield Fix("Unite the tokenizers", why, {"tokenizer_source": "union"})


def _of_base(situation: Situation) -> Iterator[Fix]:
    lost = situation.recipe.base_model in situation.readings.errors
    if situation.base and (lost or situation.recipe.base_model is None):
        found = situation.base
        yield Fix(f"Take '{found.name}' as the base", f"It is the model {found.why}.", {"base_model": found.name})
    if lost:
        why = f"Without a base, '{situation.method.name}' merges the models themselves."
        yield Fix("Merge without a base", why, {"base_model": None, "merge_method": situation.method.name})


def _of_tensors(situation: Situation) -> Iterator[Fix]:
    """Yield what to do about tensors that do not fit, where most of them do."""
    if situation.donor is None or not all(_are_kin(one) for one in situation.compared.values()):
        return
    ref, label = situation.donor
    apart = {name: None for one in situation.compared.values() for name in one.differing if name not in one.tables}
    if 0 < len(apart) <= _MAX_RULES:
        names = {name for one in situation.compared.values() for name in (*one.matching, *one.differing, *one.missing)}
        kept: Any = ref if isinstance(ref, InMemory) else str(ref)
        rules = [{"pattern": _pattern(name, names), "merge_method": "passthrough", "models": [kept]} for name in apart]
        shown = ", ".join(map(in_words, apart))
        why = f"The shapes differ there: these are those of '{label}', and all others are merged."
        yield Fix(f"Keep {shown} of '{label}'", why, {"rules": [*rules, *situation.recipe.rules]})
    if any(one.missing for one in situation.compared.values()):
        why = f"What some model lacks is then that of '{label}'."
        yield Fix(f"Keep tensors of '{label}' that others lack", why, {"missing": "base"})
        why = "What some model lacks is merged of the others."
        yield Fix("Merge each tensor of the models that have it", why, {"missing": "skip-model"})
        why = "What some model lacks is left out of the result."
        yield Fix("Merge only the tensors that all models have", why, {"keys": "intersection"})


def _are_kin(one: Comparison) -> bool:
    """Tell whether two models share most tensors, and all layers."""
    mine, theirs = (
        Layers(names).count
        for names in ((*one.matching, *one.differing, *one.extra), (*one.matching, *one.differing, *one.missing))
    )
    total = len(one.matching) + len(one.differing) + len(one.missing)
    same_depth = all(mine[stack] == theirs[stack] for stack in mine.keys() & theirs.keys())
    return same_depth and len(one.matching) >= _COMMON * total


def _pattern(name: str, names: set[str]) -> str:
    """Return a rule's pattern for one tensor alone: its name, where no other has it as a part."""
    return f"[{name[0]}]{name[1:]}" if any(name in other and name != other for other in names) else name


def _of_method(situation: Situation) -> Iterator[Fix]:
    recipe, found = situation.recipe, situation.method
    if found.name == recipe.merge_method:
        return
    needs = get_method(recipe.merge_method).base == "required" and recipe.base_model is None
    label = f"Merge by '{found.name}'" + (", which needs no base" if needs else f" instead of '{recipe.merge_method}'")
    yield Fix(label, f"It is the method to begin with here: {found.why}.", {"merge_method": found.name})


def _of_models(situation: Situation) -> Iterator[Fix]:
    """Yield the recipe without the models that cannot be read, or that do not fit."""
    lost = [model for model in situation.readings.errors if model in situation.recipe.merged]
    unlike = [model for model, one in situation.compared.items() if one.differing or one.missing or not _are_kin(one)]
    choices = [lost] if lost else [*([model] for model in unlike), unlike]
    for gone in choices:
        left = [entry for entry in situation.recipe.models if entry.model not in gone]
        least = 1 if situation.recipe.base_model or situation.base else 2
        if not gone or len(left) < least or len(left) == len(situation.recipe.models):
            continue
        names = listed(gone)
        do = "does" if len(gone) == 1 else "do"
        why = f"{names} cannot be read." if lost else f"{names} {do} not fit the others."
        plain = [entry if isinstance(entry.model, InMemory) else plain_entry(entry) for entry in left]
        yield Fix(f"Leave {names} out", why, {"models": plain})
