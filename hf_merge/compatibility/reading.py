"""Models opened one by one, so that one which cannot be read leaves the others to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub.errors import GatedRepoError

from hf_merge.adapters.merging import adapters_of
from hf_merge.api import open_plan
from hf_merge.errors import MergeError, SourceError
from hf_merge.planning import Plan, Problem
from hf_merge.recipe import Recipe
from hf_merge.sources import Located, Source, locate, open_sources, with_bases
from hf_merge.sources.lora import Lora
from hf_merge.types import InMemory, ModelRef, Ref

_AT_A_TIME = 8


class Readings:
    """The models of a recipe, as far as they can be read. Opening one again costs nothing.

    Args:
        recipe: whose models are opened.
        hub: token, cache_dir, local_files_only.

    Attributes:
        models: every model of the recipe, its stages' too.
        sources: those that were opened; of adapters alone, their own tensors.
        errors: why others cannot be read.
        gated: those of them that wait for consent on the Hub.
        adapters: the models, if all of them are adapters that are merged without a base.
    """

    def __init__(self, recipe: Recipe, hub: Mapping[str, Any]):
        stages = {str(stage.name) for stage in recipe.stages}
        named = [model for each in (*recipe.stages, recipe) for model in each.references]
        self.models = [model for model in dict.fromkeys(named) if str(model) not in stages]
        self.sources: dict[Ref, Source] = {}
        self.errors: dict[Ref, str] = {}
        self.gated: set[Ref] = set()
        self.adapters: Mapping[Ref, Lora] = {}
        self._hub, self._found, self._names = hub, dict[ModelRef, Located](), dict[Ref, ModelRef]()
        self._each(self._locate, self.models)
        self.recipe = without(recipe, self.errors)
        self.adapters = self._alone()
        if self.adapters:
            self.sources = {model: lora.source for model, lora in self.adapters.items()}
            return
        self._each(self._open, [model for model in self.models if model not in self.errors])
        self.recipe = without(recipe, self.errors)

    def name_of(self, model: Ref) -> Ref:
        """Return what plans call a model: an adapter alone has its base named."""
        return self._names.get(model, model)

    def plan(self, recipe: Recipe, **where: Any) -> tuple[Plan, list[Source]]:
        """Plan a recipe of these models, and of others that are opened first.

        Raises:
            MergeError: there can be no plan.
        """
        opened = {} if self.adapters else {self.name_of(model): source for model, source in self.sources.items()}
        return open_plan(recipe, self._hub, found=dict(self._found), opened=opened, **where)

    def try_plan(self, recipe: Recipe, **where: Any) -> tuple[Plan | None, list[Source], tuple[Problem, ...]]:
        """Plan a recipe; what stands against any plan is a problem."""
        try:
            made, sources = self.plan(recipe, **where)
        except MergeError as error:
            return None, [], (Problem("error", str(error)),)
        return made, sources, made.problems

    def _each(self, read: Callable[[Ref], None], models: Iterable[Ref]) -> None:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            for model, coming in [(model, pool.submit(read, model)) for model in models]:
                try:
                    coming.result()
                except SourceError as error:
                    self.errors[model] = str(error)
                    if isinstance(error.__cause__, GatedRepoError):
                        self.gated.add(model)
        self.sources = {model: self.sources[model] for model in self.models if model in self.sources}
        self.errors = {model: self.errors[model] for model in self.models if model in self.errors}

    def _locate(self, model: Ref) -> None:
        self._found |= locate([model], **self._hub)

    def _open(self, model: Ref) -> None:
        found = dict(self._found)
        names = {} if isinstance(model, InMemory) else with_bases([model], found, **self._hub)
        whole = names.get(model, model)
        (self.sources[model],) = open_sources([whole], found, **self._hub).values()
        self._names |= names
        self._found |= found

    def _alone(self) -> Mapping[Ref, Lora]:
        try:
            return adapters_of(self.recipe, self._found, **self._hub) if self.recipe else {}
        except SourceError:
            return {}


def without(recipe: Recipe, dropped: Iterable[Ref]) -> Recipe | None:
    """Return a recipe without some of its models; None if it would have none, or does not list them under models."""
    gone = set(dropped)
    if not gone:
        return recipe
    data = {name: getattr(recipe, name) for name in recipe.model_fields_set}
    entries = [entry for entry in recipe.models if entry.model not in gone]
    data |= {"models": entries, "base_model": None if recipe.base_model in gone else recipe.base_model}
    if not entries or recipe.stages:
        return None
    try:
        return Recipe.load({name: value for name, value in data.items() if value is not None})
    except MergeError:  # a rule or a token names the model
        return None
