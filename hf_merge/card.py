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
from hf_merge.tokenization.chat_templates import BUILT_IN
from hf_merge.types import InMemory, ModelRef

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
    recipe = public_recipe(plan.recipe, dict(zip(plan.models, sources, strict=True)))
    config = sources[plan.donor].config
    is_sentence_transformer = "modules.json" in files
    return ModelCard.from_template(
        _card_data(sources, config, is_sentence_transformer=is_sentence_transformer),
        template_path=str(template or template_folder() / "merged.md"),
        name=name,
        method=get_method(plan.recipe.merge_method),
        models=[_row(plan, place, source) for place, source in enumerate(sources)],
        merged_count=len(plan.recipe.models),
        notes=_notes(plan),
        recipe=recipe.to_yaml(),
        how_to_load=_how_to_load(config, name, is_sentence_transformer=is_sentence_transformer),
        has_local_models=any(source.public_id is None for source in sources),
        seed=plan.recipe.seed,
        versions=", ".join(f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES),
    )


def pinned_recipe(recipe: Recipe, sources: Mapping[ModelRef | InMemory, Source]) -> Recipe:
    """Return the recipe with the commit of every model of the Hub."""
    pinned = {model: _pinned(source) for model, source in sources.items() if source.public_id}
    return recipe.renamed(pinned)


def public_recipe(recipe: Recipe, sources: Mapping[ModelRef | InMemory, Source]) -> Recipe:
    """Return the recipe as others may see it: commits pinned, and of local paths only the last part."""
    local = {model: ModelRef(path=_local_name(model)) for model, source in sources.items() if not source.public_id}
    tokenizer = None if recipe.vocabulary is None else recipe.vocabulary.source
    if isinstance(tokenizer, ModelRef) and tokenizer not in sources and Path(tokenizer.path).expanduser().exists():
        local[tokenizer] = ModelRef(path=_local_name(tokenizer))
    return pinned_recipe(recipe, sources).renamed(local)


def _pinned(source: Source) -> ModelRef:
    return ModelRef(path=str(source.public_id), revision=source.revision)


def _local_name(model: ModelRef | InMemory) -> str:
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


def _row(plan: Plan, place: int, source: Source) -> dict[str, Any]:
    model = plan.models[place]
    merged = any(entry.model == model for entry in plan.recipe.models)
    roles = [word for word, true in (("base", model == plan.recipe.base_model), ("merged", merged)) if true]
    link = (
        f"[{source.public_id}](https://huggingface.co/{source.public_id})"
        if source.public_id
        else f"`{_local_name(model)}`"
    )
    return {"link": link, "role": ", ".join(roles), "revision": source.revision}


def _notes(plan: Plan) -> list[str]:
    """What a reader should know beside the recipe."""
    donor = _local_name(plan.models[plan.donor])
    notes = [
        _provenance(plan.recipe, donor),
        f"Arithmetic in float32 or wider, rounded once to {str(plan.dtype).removeprefix('torch.')}.",
    ]
    copied = sum(step.method is None for step in plan.steps)
    if copied:
        notes.append(f"{copied} tensors hold integers, equal in all models, and were copied.")
    rules = [(rule.pattern, rule.merge_method or plan.recipe.merge_method) for rule in plan.recipe.rules]
    return [*notes, *(f"Tensors matching `{pattern}`: {method}." for pattern, method in rules)]


def _provenance(recipe: Recipe, donor: str) -> str:
    """Say where config, tokenizer and chat template come from."""
    options, template = recipe.vocabulary, recipe.chat_template
    if options is None or options.source == "base":
        told = [f"Config, tokenizer and the set of tensors come from `{donor}`"]
    else:
        told = [f"Config and the set of tensors come from `{donor}`"]
        united = "the tokenizer is the union of all models', with the ids of that model first"
        told += [united if isinstance(options.source, str) else f"the tokenizer from `{_local_name(options.source)}`"]
    if options is not None and options.tokens:
        told.append(
            f"the recipe says where the rows of {', '.join(f'`{token}`' for token in options.tokens)} come from"
        )
    if template is not None:
        named = {"auto": "that of most models"}.get(
            template, f"`{template}`" if template in BUILT_IN else "the recipe's"
        )
        told.append(f"the chat template is {named}")
    return "; ".join(told) + "."


def _how_to_load(config: Mapping[str, Any], name: str, *, is_sentence_transformer: bool) -> str:
    if is_sentence_transformer:
        return f'from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer("{name}")'
    if not config:
        return f'from safetensors.torch import load_file\n\nstate_dict = load_file("{name}/model.safetensors")'
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    return f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{name}")'
