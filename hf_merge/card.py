"""Plan -> model card, from a template in model_card_templates/ through huggingface_hub.ModelCard."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_merge import _compat
from hf_merge.method import get_method
from hf_merge.planning import Plan
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.types import InMemory, ModelRef, Ref

_LIBRARIES = ("hf_merge", "torch", "transformers", "safetensors")


def template_folder() -> Path:
    """Where the templates are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "model_card_templates"
    return inside if inside.is_dir() else package.parent / "model_card_templates"


def merged_card(
    plan: Plan, sources: Sequence[Source], name: str, *, files: Sequence[str] = (), template: str | Path | None = None
) -> ModelCard:
    """Render the card of a merged model.

    Args:
        plan: what was merged.
        sources: the plan's models, in its order.
        name: title of the card.
        files: names of the files beside the weights; they tell what kind of model it is.
        template: path of a Jinja template to use instead of merged.md.
    """
    by_model = dict(zip(plan.models, sources, strict=True))
    originals = [source for _, source in original_models(by_model)]
    recipe = public_recipe(plan.recipe, by_model)
    config = plan.config
    is_sentence_transformer = "modules.json" in files
    return ModelCard.from_template(
        _card_data(originals, config, is_sentence_transformer=is_sentence_transformer),
        template_path=str(template or template_folder() / "merged.md"),
        name=name,
        method=get_method(plan.recipe.merge_method),
        models=_rows(plan, by_model),
        merged_count=len(plan.recipe.merged),
        notes=_notes(plan),
        recipe=recipe.to_yaml(),
        how_to_load=_how_to_load(config, name, is_sentence_transformer=is_sentence_transformer),
        has_local_models=any(source.public_id is None for source in originals),
        seed=plan.recipe.seed,
        versions=", ".join(f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES),
    )


def pinned_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe with the commit of every model of the Hub."""
    pinned = {model: _pinned(source) for model, source in original_models(sources) if source.public_id}
    return recipe.renamed(pinned)


def public_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe as others may see it: commits pinned, and of local paths only the last part."""
    local = {
        model: ModelRef(path=_local_name(model)) for model, source in original_models(sources) if not source.public_id
    }
    return pinned_recipe(recipe, sources).renamed(local)


def original_models(sources: Mapping[Ref, Source]) -> list[tuple[Ref, Source]]:
    """List the models that everything is made of: those of a stage instead of the stage."""
    found: dict[Ref, Source] = {}
    for model, source in sources.items():
        found |= dict(original_models(source.parents) if source.parents else [(model, source)])
    return [*found.items()]


def _pinned(source: Source) -> ModelRef:
    return ModelRef(path=str(source.public_id), revision=source.revision)


def _local_name(model: Ref) -> str:
    """The last part of a path says what it is; the rest says whose machine it was on."""
    return model.label if isinstance(model, InMemory) else Path(model.path).resolve().name


def _card_data(sources: Sequence[Source], config: Mapping[str, Any], *, is_sentence_transformer: bool) -> ModelCardData:
    public = [source.public_id for source in sources if source.public_id]
    architecture = next(iter(config.get("architectures") or ()), None)
    tag = "sentence-similarity" if is_sentence_transformer else architecture and _compat.pipeline_tag(architecture)
    library = "sentence-transformers" if is_sentence_transformer else "transformers" if config else None
    return ModelCardData(
        base_model=public or None,
        base_model_relation="merge",
        library_name=library,
        pipeline_tag=tag,
        tags=["merge", "hf_merge"],
    )


def _rows(plan: Plan, sources: Mapping[Ref, Source]) -> list[dict[str, Any]]:
    """List every model with its role; those that a stage merges follow it."""
    rows = []
    for model, source in sources.items():
        roles = {"base": model == plan.recipe.base_model, "merged": model in plan.recipe.merged}
        role = ", ".join(word for word, true in roles.items() if true)
        if not source.parents:
            rows.append({"link": _link(model, source), "role": role, "revision": source.revision})
            continue
        stage = next(stage for stage in plan.recipe.stages if stage.name == str(model))
        made_of = f"{role}; itself a merge by {stage.merge_method} of"
        rows.append({"link": f"stage `{model}`", "role": made_of, "revision": None})
        rows += [
            {"link": f"&nbsp;&nbsp;{_link(parent, origin)}", "role": f"in `{model}`", "revision": origin.revision}
            for parent, origin in source.parents.items()
        ]
    return rows


def _link(model: Ref, source: Source) -> str:
    if source.public_id:
        return f"[{source.public_id}](https://huggingface.co/{source.public_id})"
    return f"`{model if source.parents else _local_name(model)}`"


def _notes(plan: Plan) -> list[str]:
    """What a reader should know beside the recipe."""
    donor = _local_name(plan.models[plan.donor])
    notes = [
        f"Config, tokenizer and the set of tensors come from `{donor}`.",
        f"Arithmetic in float32 or wider, rounded once to {str(plan.dtype).removeprefix('torch.')}.",
    ]
    copied = sum(step.method is None for step in plan.steps)
    if copied:
        notes.append(f"{copied} tensors hold integers, equal in all models, and were copied.")
    rules = [(rule.pattern, rule.merge_method or plan.recipe.merge_method) for rule in plan.recipe.rules]
    return [*notes, *(f"Tensors matching `{pattern}`: {method}." for pattern, method in rules)]


def _how_to_load(config: Mapping[str, Any], name: str, *, is_sentence_transformer: bool) -> str:
    if is_sentence_transformer:
        return f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")'
    if not config:
        return f'from safetensors.torch import load_file\n\nstate_dict = load_file("{name}/model.safetensors")'
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{name}")'
