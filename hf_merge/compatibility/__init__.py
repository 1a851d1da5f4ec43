"""Whether models can be merged, from headers, configs and cards alone: one sentence, a table, and what would help."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_merge.compatibility.advice import recommended
from hf_merge.compatibility.ancestry import Family
from hf_merge.compatibility.fixes import Situation, fixes_for
from hf_merge.compatibility.reading import Readings, without
from hf_merge.compatibility.report import Advice, Fix, ModelRow, Report, Verdict
from hf_merge.compatibility.rows import Comparison, Role, compared, layers_of, row_of, row_of_adapter, unreadable
from hf_merge.compatibility.wording import sentence
from hf_merge.lineage import licence_column, licence_in_a_sentence, parts_of
from hf_merge.method import get_method
from hf_merge.planning import Plan, Problem
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.sources.layout import align_layouts
from hf_merge.sources.renamed import remapped
from hf_merge.survey import surveyed
from hf_merge.types import InMemory, Ref

__all__ = ["Advice", "Fix", "ModelRow", "Report", "check"]


def check(
    recipe: Any,
    *,
    base_model: Any = None,
    method: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    **changes: Any,
) -> Report:
    """Say whether models can be merged; of weights, only headers are read, on the Hub too.

        report = hf_merge.check(["org/a", "org/b"])
        print(report)
        recipe = report.fixes[0].apply(report.recipe)

    A model that cannot be read (missing, gated, no weights, no network) is a row that says why, and no exception.

    Args:
        recipe: a YAML file, a mapping, a Recipe, or a list of models (Hub ids, folders, modules, state dicts).
        base_model: the model that the others were fine-tuned from, if it is known.
        method: to merge by; of a list of models, the one that is recommended if not given.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
        stream: check for a merge that streams: weights that are not safetensors do not fit, and are not fetched.
        **changes: fields of the recipe or parameters of the method, as in `merge`.

    Returns:
        The report; see `Report`, of which `to_dict()` is plain JSON.

    Raises:
        RecipeError: the recipe cannot be meant.
    """
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "stream": stream}
    is_list = not isinstance(recipe, (str, os.PathLike, Recipe)) and not (
        isinstance(recipe, Mapping) and _is_recipe(recipe)
    )
    chosen = method or (None if is_list else "")
    asked = Recipe.load(recipe, base_model=base_model, method="linear" if chosen is None else method, **changes)
    return _Check(asked, hub, chosen=chosen is not None).report()


def _is_recipe(recipe: Mapping[Any, Any]) -> bool:
    return "merge_method" in recipe or isinstance(recipe.get("models"), list)


class _Check:
    """One check: what is read, and what follows, in this order.

    Args:
        recipe: as it was asked.
        hub: token, cache_dir, local_files_only.
        chosen: whether the method was named.
    """

    def __init__(self, recipe: Recipe, hub: Mapping[str, Any], *, chosen: bool):
        self.readings = Readings(recipe, hub)
        self.base = self._base(recipe, hub)
        self.method = self._method(recipe)
        self.recipe = recipe if chosen else Recipe.load(recipe, method=self.method.name)
        self.plan, sources, self.problems = self._plan()
        self.donor, self.shown = self._shown(sources)

    def report(self) -> Report:
        """Put all of it together."""
        beside = {} if self.donor is None or self.readings.adapters else self._compared(self.donor)
        donor = None if self.donor is None else (self.donor, self._label(self.donor))
        situation = Situation(self.recipe, self.readings, beside, donor, self.problems, self.base, self.method)
        rows = tuple(self._rows())
        parts = parts_of([*self.readings.sources.values()])
        verdict = self._verdict()
        return Report(
            verdict=verdict,
            sentence=sentence(verdict, rows, self.problems, self.recipe),
            rows=rows,
            compared_with=donor and donor[1],
            proposed_base=self.base,
            licence=licence_in_a_sentence(parts),
            method=self.method,
            problems=self.problems,
            fixes=fixes_for(situation) if verdict != "fits" else (),
            layers=self._layers(),
            recipe=self.recipe,
            plan=self.plan,
        )

    def _base(self, recipe: Recipe, hub: Mapping[str, Any]) -> Advice | None:
        """Find the base that the models have in common, where none is given or another one."""
        models = {str(model): source for model, source in self.readings.sources.items() if model != recipe.base_model}
        families = {str(model): lora for model, lora in self.readings.adapters.items()} or models
        given = recipe.base_model
        if given is None or given in self.readings.errors:
            return Family(families, hub).base() if families and not self.readings.adapters else None
        own = self.readings.sources[given].public_id if given in self.readings.sources else None
        found = Family(families, None).base() if own and families else None
        return found if found and found.name != own else None

    def _method(self, recipe: Recipe) -> Advice:
        base = recipe.base_model if recipe.base_model not in self.readings.errors else None
        sources = self.readings.sources
        merged = [model for model in recipe.merged if model != base and model not in self.readings.errors]
        largest = max((sum(s.numel for s in source.specs.values()) for source in sources.values()), default=0)
        return recommended(
            len(merged), has_base=base is not None, adapters=bool(self.readings.adapters), parameters=largest
        )

    def _plan(self) -> tuple[Plan | None, list[Source], tuple[Problem, ...]]:
        """Plan what can be read."""
        readable = without(self.recipe, self.readings.errors)
        if readable is None:
            return None, [], ()
        if self.recipe.base_model in self.readings.errors and get_method(readable.merge_method).base == "required":
            readable = Recipe.load(readable, method="linear")
        plan, sources, problems = self.readings.try_plan(readable)
        if self.readings.errors:
            return None, sources if plan else [], problems
        return (plan and surveyed(plan, sources)), sources, problems

    def _shown(self, sources: Sequence[Source]) -> tuple[Ref | None, dict[Ref, Source]]:
        """Return the model that others are compared with, and all of them under its names."""
        opened = self.readings.sources
        known = [model for model in self.readings.models if model in opened]
        if not known:
            return None, {}
        donor = self.recipe.donor if self.recipe.donor in opened else known[0]
        if self.plan is not None and not self.recipe.stages:
            planned = dict(zip(self.plan.models, sources, strict=True))
            named = {model: planned.get(self.readings.name_of(model)) for model in known}
            if all(named.values()):
                return donor, {model: source for model, source in named.items() if source is not None}
        if self.readings.adapters:
            return donor, dict(opened)
        renamed = {model: remapped(source, self.recipe.remap) for model, source in opened.items()}
        return donor, align_layouts(renamed, donor)

    def _compared(self, donor: Ref) -> dict[Ref, Comparison]:
        other = self.shown[donor]
        return {model: compared(source, other) for model, source in self.shown.items() if model != donor}

    def _rows(self) -> Iterator[ModelRow]:
        readings = self.readings
        for model in readings.models:
            role = self._role(model)
            if model in readings.errors:
                yield unreadable(str(model), role, readings.errors[model], gated=model in readings.gated)
            elif readings.adapters:
                source, lora = readings.sources[model], readings.adapters[model]
                other = readings.adapters.get(self.donor, lora) if self.donor else lora
                yield row_of_adapter(lora, other, licence_column(source).replace("`", ""))
            elif self.donor is not None:
                shown, other = self.shown[model], self.shown[self.donor]
                opened, is_base = readings.sources[self.donor], self.donor == self.recipe.base_model
                row = row_of(role, readings.sources[model], shown, other, opened, is_base=is_base)
                yield replace(row, name=self._label(model))

    def _role(self, model: Ref) -> Role:
        if model == self.recipe.base_model:
            return "base"
        is_adapter = model in self.readings.adapters or self.readings.name_of(model) != model
        return "adapter" if is_adapter or (not isinstance(model, InMemory) and model.lora) else "model"

    def _label(self, model: Ref) -> str:
        return self.readings.sources[model].label if isinstance(model, InMemory) else str(model)

    def _layers(self) -> int:
        """Count the layers of the result, or else of the model that others are compared with."""
        if self.plan is not None and self.plan.steps:
            return layers_of(self.plan.model_specs)
        return layers_of(self.shown[self.donor].specs) if self.donor else 0

    def _verdict(self) -> Verdict:
        if self.readings.errors or self.plan is None or self.plan.errors:
            return "does not fit"
        return "warns" if self.problems else "fits"
