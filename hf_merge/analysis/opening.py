"""The models that are looked at, opened as a merge opens them: adapters, layouts, vocabularies and all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_merge.analysis.naming import LayerNames
from hf_merge.api import open_recipe
from hf_merge.errors import MergeError, RecipeError
from hf_merge.recipe import Recipe, in_memory
from hf_merge.results import MergedModel
from hf_merge.schema import ModelEntry
from hf_merge.sources import Source
from hf_merge.types import InMemory, ModelRef, Ref, as_model

_KEPT = ("remap", "tokenizer", "tokenizer_source", "seed", "stages")
"""What a recipe says of how its models are read; what it says of how they are merged does not matter here."""


@dataclass(frozen=True)
class Subject:
    """Models that are compared.

    Attributes:
        sources: of every model under one set of names: the parents, the result if there is one, and last the base;
            None if there is no base.
        labels: short names of the same, no two alike.
        refs: the same as they were named.
        parents: how many of them are parents.
        names: of the tensors that are looked at: floats, those that are stored twice once.
        layers: of these tensors.
    """

    sources: tuple[Source | None, ...]
    labels: tuple[str, ...]
    refs: tuple[str, ...]
    parents: int
    names: tuple[str, ...]
    layers: LayerNames

    @property
    def base(self) -> Source | None:
        return self.sources[-1]

    @property
    def models(self) -> tuple[Source, ...]:
        """The parents, and the result if there is one."""
        return tuple(source for source in self.sources[:-1] if source is not None)

    def holders(self, name: str) -> list[Source | None]:
        """Return all models; None in the place of one that lacks a tensor, or has it in another shape."""
        shape = next(s for s in (self.base, *self.models) if s is not None and name in s.specs).specs[name].shape
        return [s if s is not None and name in s.specs and s.specs[name].shape == shape else None
                for s in self.sources]  # fmt: skip

    def left_out(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the parents, and the result, that do not fit the others everywhere, with the tensors that are left out.

        Those are tensors that one lacks, has alone or has in another shape; without a base, than the first parent.
        """
        lead = next(source for source in (self.base, *self.models) if source is not None)
        for label, source in zip(self.labels, self.models, strict=False):
            names = dict.fromkeys([*lead.specs, *source.specs])
            unlike = [name for name in names
                      if lead.specs.get(name) is None or source.specs.get(name) is None
                      or lead.specs[name].shape != source.specs[name].shape]  # fmt: skip
            if unlike:
                yield label, unlike


def open_subject(
    recipe_or_models: Any, base_model: Any, merged: Any, hub: Mapping[str, Any], **changes: Any
) -> Subject:
    """Open what is compared; of weights, headers are read.

    Args:
        recipe_or_models: as `analyze` takes it.
        base_model: the base, if it is not the recipe's.
        merged: the result, if there is one.
        hub: token, cache_dir, local_files_only, stream.
        **changes: of the recipe.

    Raises:
        RecipeError: fewer than one model to look at.
        SourceError: a model cannot be read.
    """
    given = _labels(recipe_or_models)
    recipe = _read(recipe_or_models, base_model, **changes)
    result = None if merged is None else _as_result(merged)
    parents = [ref for ref in recipe.merged if ref not in (recipe.base_model, result)]
    if not parents:
        raise RecipeError("There is no model to analyse but the base: name those that were fine-tuned from it.")
    base = recipe.base_model or _common_base(parents, hub)
    everyone = [*parents, *([] if result is None else [result])]
    sources = _opened(recipe, everyone, base, hub)
    lead = sources[-1] or sources[0]
    assert lead is not None
    names = _floats([source for source in (lead, *sources) if source is not None], lead.shared)
    labels = _short([*everyone, *([] if base is None else [base])], given, result)
    return Subject(
        sources=tuple(sources), labels=tuple(labels if base is not None else [*labels, "mean of the models"]),
        refs=tuple(str(ref) for ref in (*everyone, base)), parents=len(parents), names=names,
        layers=LayerNames(names),
    )  # fmt: skip


def _read(recipe_or_models: Any, base_model: Any, **changes: Any) -> Recipe:
    """Read a recipe; a list of models needs no method to be looked at."""
    models = recipe_or_models
    if isinstance(models, (str, os.PathLike)) and Path(models).is_dir():
        models = [models]
    said = isinstance(models, Mapping) and ("merge_method" in models or isinstance(models.get("models"), list))
    if isinstance(models, Mapping) and not said:
        models = [in_memory(model, str(label)) for label, model in models.items()]
    plain = not said and not isinstance(models, (str, os.PathLike, Recipe))
    words = {"method": "linear"} if plain and "method" not in changes and "merge_method" not in changes else {}
    return Recipe.load(models, **words, base_model=base_model, **changes)


def _as_result(merged: Any) -> Ref:
    """Name what came out of a merge: a folder, an id, or what `merge` returned."""
    if isinstance(merged, MergedModel):
        merged = merged.path or f"{merged.repo_id}@{merged.commit}"
    named = in_memory(merged, "merged")
    try:
        return as_model(named)
    except ValueError as error:
        raise RecipeError(f"merged= {error}; found {type(merged).__name__}.") from None


def _common_base(parents: Sequence[Ref], hub: Mapping[str, Any]) -> Ref | None:
    """Return the base of adapters that all have the same one; else there is none that is known."""
    try:
        plan, _ = open_recipe(_neutral(None, parents, None), hub)
    except MergeError:
        return None  # whoever opens them for good tells what is wrong
    bases = [ref.with_lora() if isinstance(ref, ModelRef) and ref.lora else None for ref in plan.recipe.merged]
    return bases[0] if all(base == bases[0] for base in bases) else None


def _neutral(recipe: Recipe | None, models: Sequence[Ref], base: Ref | None) -> Recipe:
    """Write a recipe that reads models as another one does, and merges them in no special way."""
    kept = {name: getattr(recipe, name) for name in _KEPT} if recipe else {}
    return Recipe(merge_method="linear", models=tuple(ModelEntry(model=model) for model in models), base_model=base,
                  missing="skip-model", allow_nonfinite=True, **kept)  # fmt: skip


def _opened(recipe: Recipe, models: Sequence[Ref], base: Ref | None, hub: Mapping[str, Any]) -> list[Source | None]:
    """Open models, and the base as the last; what lies on the Hub is read as the plan of a merge would."""
    plan, sources = open_recipe(_neutral(recipe, models, base), hub)
    by_model = dict(zip(plan.recipe.references, sources, strict=True))
    lead = plan.recipe.base_model
    return [*(by_model[ref] for ref in plan.recipe.merged), None if lead is None else by_model[lead]]


def _floats(sources: Sequence[Source], shared: Mapping[str, str]) -> tuple[str, ...]:
    """Name the tensors of floats that any model has, in the order of the first that has them."""
    names = dict.fromkeys(name for source in sources for name, spec in source.specs.items()
                          if spec.dtype.is_floating_point and spec.numel)  # fmt: skip
    return tuple(name for name in names if name not in shared)


def _labels(recipe_or_models: Any) -> dict[Any, str]:
    """Return the names that a mapping of names to models gives them."""
    if not isinstance(recipe_or_models, Mapping) or "merge_method" in recipe_or_models:
        return {}
    return {str(m): str(label) for label, m in recipe_or_models.items() if isinstance(m, (str, os.PathLike))}


def _short(refs: Sequence[Ref], given: Mapping[Any, str], result: Ref | None) -> list[str]:
    """Shorten names to their last words, as long as no two are alike; the result is called `merged`."""
    own = [("merged" if ref == result else given.get(str(ref)) or _tail(ref, 1)) for ref in refs]
    longer = [_tail(ref, 2) if own.count(name) > 1 and ref != result else name
              for ref, name in zip(refs, own, strict=True)]  # fmt: skip
    return [name if longer.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(longer)]


def _tail(ref: Ref, words: int) -> str:
    """Return the last words of a model's path: of an adapter's rather than of its base's."""
    if isinstance(ref, InMemory):
        return ref.label
    named = ref.lora[-1] if ref.lora else ref
    return "/".join(Path(named.path).parts[-words:]) or str(ref)
