"""Adapters merged with each other into an adapter: no weights of their base are read.

The recipe's method runs on the adapters' changes as a space shows them (sources.core); what comes out becomes factors
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch

from hf_merge.adapters.parts import PREFIX, Part, Slot
from hf_merge.adapters.products import BiasSlot, CoreSlot, KeptSlot, ProductSlot, from_factors, from_matrix, from_units
from hf_merge.adapters.settings import refuse_for_vllm
from hf_merge.adapters.spelled import LORA_FILE
from hf_merge.errors import RecipeError, SourceError
from hf_merge.method import get_method
from hf_merge.planner import make_plan
from hf_merge.planning import Plan, Problem, format_bytes
from hf_merge.recipe import Recipe
from hf_merge.schema import Rule
from hf_merge.sources import Located, Source, has_weights, is_adapter, locate
from hf_merge.sources.adapter import CONFIG, WEIGHTS, open_adapter
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.core import SPACES, AdapterSource, Apart, Change, Core, Full, Space, Unchanged, Units, carried
from hf_merge.sources.folder import read_object
from hf_merge.sources.lora import Lora, read_lora
from hf_merge.sources.lora_names import Style, style_of
from hf_merge.sources.lora_styles import unify
from hf_merge.sources.view import View
from hf_merge.types import ModelRef, Ref

SUM = "sum"
"""The word for the rank that keeps all: at most the sum of the adapters' ranks."""


@dataclass(frozen=True)
class AdapterMerge:
    """A merge into an adapter, ready to be executed.

    Attributes:
        plan: what is computed.
        sources: the plan's models, in its order.
        slots: what becomes of each tensor of the plan.
        base_model: where PEFT finds the base: a Hub id or a path.
        revision: of the base.
        task_type: PEFT's word for what the model does.
        dtype: of what is written; each slot's own if not given.
        extra_config: further fields of adapter_config.json.
        notes: for the card: how the factors came about.
        spelling: names of the first input, if that is a LoRA file of another style than PEFT's.
    """

    plan: Plan
    sources: list[Source]
    slots: Mapping[str, Any]
    base_model: str | None
    revision: str | None
    task_type: str | None
    dtype: torch.dtype | None = None
    extra_config: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] | None = None
    spelling: Sequence[str] = ()


def adapters_of(recipe: Recipe, found: dict[ModelRef, Located], **hub: Any) -> dict[Ref, Lora]:
    """Open a recipe's models if an adapter is to be made of them alone: all are adapters without their base.

    Args:
        recipe: with output_format: adapter its base_model may also name the model that the adapters belong to.
        found: where models are; those that are looked for are added.
        **hub: token, cache_dir, local_files_only, stream.

    Raises:
        SourceError: one of them is no LoRA.
    """
    models = [model for model in recipe.references if isinstance(model, ModelRef) and not model.lora]
    if recipe.output_format == "model" or recipe.stages or len(models) < len(recipe.references):
        return {}
    named = recipe.output_format == "adapter" and recipe.base_model not in recipe.merged
    found |= locate([model for model in models if not named or model != recipe.base_model], **hub)
    if named and recipe.base_model is not None:
        with suppress(SourceError):
            found |= locate([recipe.base_model], **hub)
    weights = {model: _weights_of(found[model]) for model in models if model in found}
    alone = [model for model, file in weights.items() if file]
    if not set(recipe.merged) <= set(alone) or not (named or len(alone) == len(models)):
        return {}
    opened = [_opened(model, found[model], weights[model]) for model in alone]
    if any(config is None for _, config in opened):
        opened = unify([source for source, _ in opened], [config for _, config in opened])
    return {model: read_lora(source, config or {}) for model, (source, config) in zip(alone, opened, strict=True)}


def _weights_of(located: Located) -> str:
    """Return the file of an adapter that lies alone, or of a LoRA without a config; nothing for what is a model."""
    folder, file, _ = located
    if is_adapter(located):
        return "" if has_weights(located) else next((name for name in WEIGHTS if name in folder), WEIGHTS[0])
    if not file and LORA_FILE in folder:
        return LORA_FILE
    is_lora = file.endswith(".safetensors") and style_of(Checkpoint(folder, file, file=file).specs) is not None
    return file if is_lora else ""


def _opened(model: ModelRef, located: Located, file: str) -> tuple[Source, Mapping[str, Any] | None]:
    """Open an adapter; one that is a file alone has no config, unless it lies where PEFT puts it."""
    folder, asked, origin = located
    if not asked and is_adapter(located):
        return open_adapter(folder, str(model), **origin)
    config = read_object(folder.paths([CONFIG])[0]) if CONFIG in folder and file in WEIGHTS else None
    return Checkpoint(folder, str(model), file=file, **origin), config


def join(recipe: Recipe, adapters: Mapping[Ref, Lora], **hub: Any) -> AdapterMerge:
    """Plan a merge of adapters into an adapter.

    Args:
        recipe: all its models are adapters; its base_model is one of them, or names the model they belong to.
        adapters: the recipe's adapters.
        **hub: token, cache_dir, local_files_only, stream: of the base, config.json and card are read, if it is there.

    Raises:
        SourceError: they do not go together.
        RecipeError: the recipe asks for what cannot be done with adapters.
        OutputError: vLLM would not load it.
    """
    _refuse_words(recipe)
    if asking := [name for name in _methods(recipe) if get_method(name).statistics]:
        raise RecipeError(
            f"'{asking[0]}' merges by statistics of whole models, and adapters alone have none: name base+adapter."
        )
    if parted := [name for name in _methods(recipe) if get_method(name).experts]:
        raise RecipeError(
            f"'{parted[0]}' makes task experts of whole models, and adapters alone are none: pass base_model=, the "
            "model that they belong to."
        )
    loras = [*adapters.values()]
    _refuse_unmergeable(loras)
    space = _space(recipe)(loras)
    base, problems = _base(recipe, adapters)
    labels = zip(adapters, range(len(loras)), strict=True)
    sources: dict[Ref, Source] = {ref: AdapterSource(space, i, str(ref)) for ref, i in labels}
    named = ModelRef(path=base or "unknown base")
    unchanged = _unchanged(space, named, hub)
    planned = _planned(recipe, named, loras)
    if planned.base_model == named:
        sources[named] = unchanged
    made = make_plan(planned, sources, problems=[*problems, *_doubts(recipe, loras)])
    sources[named] = unchanged
    is_told = base is not None and recipe.base_model not in adapters
    again = {"output_format": "adapter", **({"base_model": named} if is_told else {})}
    made = replace(
        made, recipe=recipe.model_copy(update=again), models=tuple(sources), donor=[*sources].index(named),
        config=dict(unchanged.config), adapter=_words(recipe, space, loras),
    )  # fmt: skip
    slots = dict(_slots(space, loras, recipe))
    if recipe.vllm:
        refuse_for_vllm(slot.part for slot in slots.values())
    return AdapterMerge(
        plan=made,
        sources=[*sources.values()],
        slots=slots,
        base_model=base,
        revision=_first(loras, "revision"),
        task_type=_first(loras, "task_type"),
        dtype=_dtype(recipe, loras),
        extra_config=dict(_extra(loras)),
        notes=_notes(recipe, space),
        spelling=_spelling(loras[0].source),
    )


def _spelling(first: Source) -> Sequence[str]:
    """Return the names in a LoRA file, as they are stored; none for a PEFT adapter."""
    stored = first.source if isinstance(first, View) else first
    return () if style_of(stored.specs) is Style.PEFT else [*stored.specs]


_USELESS = (
    "slices",
    "remap",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "targets",
    "keep_rest",
    "tasks",
    "heads",
)


def _refuse_words(recipe: Recipe) -> None:
    """Refuse what a recipe may say of models, and what means nothing for adapters alone."""
    if said := [name for name in _USELESS if getattr(recipe, name) not in (None, (), {})]:
        raise RecipeError(
            f"'{said[0]}' says nothing about adapters that are merged with each other: leave it out, or write "
            "base+adapter for each model (with base_model= and output_format='adapter' for an adapter again)."
        )


def _words(recipe: Recipe, space: Space, loras: Sequence[Lora]) -> dict[str, Any]:
    """Say what will be written, as far as headers tell."""
    kept = len({name for lora in loras for name in carried(lora)})
    limit = recipe.rank if isinstance(recipe.rank, int) else None
    ranks = [min(limit or sum(c.ranks), sum(c.ranks), c.out, c.into) for c in space.changes.values()]
    width = _dtype(recipe, loras).itemsize
    size = sum(
        width * rank * max(c.experts, 1) * (c.out + c.into)
        for rank, c in zip(ranks, space.changes.values(), strict=True)
    )
    told = f", as few as keep {recipe.rank:.6g} of the energy" if isinstance(recipe.rank, float) else ""
    return {
        "adapter": f"{len(space.changes)} modules" + (f", {kept} further tensors" if kept else ""),
        "dtype": str(_dtype(recipe, loras)).removeprefix("torch."),
        "space": "factors, packed" if isinstance(space, Units) else recipe.space or "core",
        "rank": f"at most {'-'.join(map(str, sorted({min(ranks, default=0), max(ranks, default=0)})))}{told}",
        "at most": format_bytes(size),
        "bytes": size,
    }


def _notes(recipe: Recipe, space: Space) -> list[str]:
    """Say on the card how the factors came about."""
    ways = {
        Core: "in the joint row and column spaces of their factors (core space), where nothing is lost",
        Full: "as full matrices",
        Apart: "as A and B apart, scaled by the root of alpha / r: cross terms make this wrong but for adapters that "
        "share one of them",
        Units: "as rank-1 units",
    }
    rules = [f"Tensors matching `{rule.pattern}`: {rule.merge_method or recipe.merge_method}." for rule in recipe.rules]
    return [f"Changes were merged {ways[type(space)]}. None of the base's weights were read.", *rules]


def _space(recipe: Recipe) -> type[Space]:
    """Choose how changes are shown: methods on factors see these, whatever the recipe's space."""
    on_factors = {name: get_method(name).space == "factors" for name in _methods(recipe)}
    if not any(on_factors.values()):
        return SPACES[recipe.space or "core"]
    if not all(on_factors.values()):
        some, other = (next(name for name, is_so in on_factors.items() if is_so is one) for one in (True, False))
        raise RecipeError(f"'{some}' merges factors and '{other}' matrices: use one kind of method in a recipe.")
    return Units


def _methods(recipe: Recipe) -> list[str]:
    """Name the methods of a recipe."""
    further = [*(rule.merge_method for rule in recipe.rules), *(part.merge_method for part in recipe.parts.values())]
    return list(dict.fromkeys([recipe.merge_method, *(name for name in further if name)]))


def _base(recipe: Recipe, adapters: Mapping[Ref, Lora]) -> tuple[str | None, list[Problem]]:
    """Find the model that all adapters belong to; the recipe's own word for it wins."""
    named: dict[str, str] = {}
    for lora in adapters.values():
        if found := lora.config.get("base_model_name_or_path"):
            named.setdefault(str(found), lora.source.label)
    own = recipe.base_model if recipe.base_model not in adapters else None
    if own is None and len(named) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        raise SourceError(
            f"'{first}' belongs to '{one}', '{second}' to '{other}': merge adapters of one base. "
            "If both names mean the same model, say which to write: base_model= and output_format='adapter'."
        )
    others = [name for name in named if own is not None and name != str(own)]
    told = f"Adapters of {', '.join(map(repr, others))} are merged as adapters of '{own}', as base_model says."
    return str(own) if own else next(iter(named), None), [Problem("warning", told)] if others else []


def _unchanged(space: Space, base: ModelRef, hub: Mapping[str, Any]) -> Unchanged:
    """Stand for the base; nobody needs its files but for what the card says."""
    with suppress(SourceError):
        folder, _, origin = locate([base], **hub)[base]
        return Unchanged(space, base.path, folder, **origin)
    is_id = base.path.count("/") == 1 and not base.path.startswith((".", "~", "/"))
    return Unchanged(space, base.path, None, public_id=base.path) if is_id else Unchanged(space, base.path)


def _planned(recipe: Recipe, base: ModelRef, loras: Sequence[Lora]) -> Recipe:
    """Return the recipe for the plan: task vectors have the unchanged base for a base, all modules take part.

    Methods on factors do not know what to do with tensors that are none: these are averaged.
    """
    needed = any(get_method(name).base == "required" for name in _methods(recipe))
    others = sorted({name for lora in loras for name in _unfactored(lora)})
    average = [Rule(pattern=f"[{name[0]}]{name[1:]}", merge_method="linear") for name in others]
    return recipe.model_copy(
        update={
            "base_model": recipe.base_model if _is_among_adapters(recipe, loras) else base if needed else None,
            "rules": (*recipe.rules, *(average if _space(recipe) is Units else ())),
            "keys": "union",
            "dtype": None,
            "out_dtype": None,
        }
    )


def _is_among_adapters(recipe: Recipe, loras: Sequence[Lora]) -> bool:
    """Tell whether the recipe's base is one of the adapters."""
    return recipe.base_model is not None and len(loras) == len(recipe.references)


def _unfactored(lora: Lora) -> set[str]:
    """Name the tensors of a plan that are no factors."""
    return {*carried(lora), *(f"{module}.bias" for module, own in lora.factored.items() if own.bias)}


def _refuse_unmergeable(loras: Sequence[Lora]) -> None:
    """Refuse what cannot be merged without the base's weights."""
    with_norms = {lora.source.label: any(own.magnitude for own in lora.factored.values()) for lora in loras}
    if any(with_norms.values()):
        plain = next((label for label, is_dora in with_norms.items() if not is_dora), None)
        modules = [set(lora.factored) for lora in loras]
        if plain is not None or any(found != modules[0] for found in modules):
            told = f"'{plain}' is none" if plain else "they change different modules"
            raise SourceError(
                f"DoRA adapters merge with DoRA adapters of the same modules, and {told}: write base+adapter for "
                "each, with base_model= and output_format='adapter', which merges what they make of the base's weights."
            )
    modules = {module for lora in loras for module in lora.factored}
    biased = {module for lora in loras for module, own in lora.factored.items() if own.bias}
    if biased and biased != modules:
        raise SourceError(
            f"'{min(biased)}' has a trained bias (lora_bias) and '{min(modules - biased)}' none in any adapter; PEFT "
            "keeps biases for all modules or none: write base+adapter for each, with base_model= and "
            "output_format='adapter'."
        )
    rows = {str(lora.config.get("trainable_token_indices")): lora.source.label for lora in loras if lora.tokens}
    if len(rows) > 1:
        one, other = [*rows.values()][:2]
        raise SourceError(
            f"'{one}' and '{other}' train different tokens (trainable_token_indices): merge them one by one."
        )


def _doubts(recipe: Recipe, loras: Sequence[Lora]) -> Iterator[Problem]:
    """Yield what the user should know."""
    if recipe.space == "factors":
        yield Problem(
            "warning",
            "space: factors merges A and B apart, as PEFT's 'linear' does: the product of two averages is not the "
            "average of the products, but for adapters that share A or B. space: core merges the products.",
        )
    if any(own.magnitude for lora in loras for own in lora.factored.values()):
        yield Problem(
            "warning", "DoRA: directions (B A) and norms are merged apart, which is not a merge of the weights."
        )
    names = [set(carried(lora)) for lora in loras]
    if partial_names := sorted(set().union(*names) - set.intersection(*names)):
        yield Problem(
            "warning", "Not all adapters hold these tensors; they are merged from those that do.", tuple(partial_names)
        )
    tasks = {str(lora.config["task_type"]): lora.source.label for lora in loras if lora.config.get("task_type")}
    if len(tasks) > 1:
        told = ", ".join(f"'{label}' for {task}" for task, label in tasks.items())
        yield Problem("warning", f"The adapters are for different tasks ({told}); the result says {next(iter(tasks))}.")


def _first(loras: Sequence[Lora], field: str) -> Any:
    return next((lora.config[field] for lora in loras if lora.config.get(field)), None)


def _dtype(recipe: Recipe, loras: Sequence[Lora]) -> torch.dtype:
    """Return the dtype that is written: the recipe's, or one that holds all factors."""
    if said := recipe.out_dtype or recipe.dtype:
        return getattr(torch, said)
    return reduce(
        torch.promote_types, [lora.source.specs[own.left].dtype for lora in loras for own in lora.factored.values()]
    )


def _extra(loras: Sequence[Lora]) -> Iterator[tuple[str, Any]]:
    """Yield fields of adapter_config.json that say what plain LoRA does not."""
    if any(own.magnitude for lora in loras for own in lora.factored.values()):
        yield "use_dora", True
    for name in ("bias", "trainable_token_indices", "auto_mapping"):
        found = _first(loras, name)
        if found is not None and found != "none":
            yield name, found


def _slots(space: Space, loras: Sequence[Lora], recipe: Recipe) -> Iterator[tuple[str, Slot]]:
    """Yield (name in the plan, what becomes of it)."""
    rank = None if recipe.rank == SUM else recipe.rank
    places: dict[str, int] = {}
    for change in space.changes.values():
        part = _part(change, loras, places)
        if isinstance(space, Core):
            yield change.name, CoreSlot(part, space, change, rank)
        elif len(names := [*space.specs(change)]) == 1:
            yield names[0], ProductSlot(part, change, rank, from_units if isinstance(space, Units) else from_matrix)
        else:
            slot = ProductSlot(part, change, rank, from_factors)
            yield from ((name, slot) for name in names)
        if any(own and own.bias for own in change.own):
            yield f"{change.module}.bias", BiasSlot(replace(part, kind="bias"))
    yield from _carried_slots(loras)


def _part(change: Change, loras: Sequence[Lora], places: dict[str, int]) -> Part:
    """Describe a change as the writer knows it."""
    turned = change.kind == "linear" and any(
        lora.config.get("fan_in_fan_out") for lora, own in zip(loras, change.own, strict=True) if own
    )
    shape = (*change.stack, change.out, *change.columns)
    if turned or change.kind == "embedding":
        shape = shape[::-1]
    owner = change.module.rpartition(".")[0]
    places[owner] = places.get(owner, -1) + 1
    kind: Any = change.kind
    biased = any(own and own.bias for own in change.own)
    return Part(change.module, kind, shape, turned, places[owner] if change.experts else 0, biased)


def _carried_slots(loras: Sequence[Lora]) -> Iterator[tuple[str, Slot]]:
    """Yield slots of what is written as it is merged: a module that is saved whole has one for all its tensors."""
    shared: dict[str, KeptSlot] = {}
    for lora in loras:
        saved = tuple(lora.config.get("modules_to_save") or ())
        for name, key in carried(lora).items():
            module = name.rpartition(".")[0]
            is_saved = name in lora.whole and bool(saved) and module.endswith(saved)  # PEFT's rule
            place = module if is_saved else name
            written = PREFIX + name if is_saved else key
            slot = shared.setdefault(place, KeptSlot(Part(place, "whole" if is_saved else "none"), []))
            if written not in slot.keys:
                slot.keys.append(written)
                yield name, slot
