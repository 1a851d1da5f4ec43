"""Plan -> model card, from a template in model_card_templates/ through huggingface_hub.ModelCard."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_merge import _compat
from hf_merge.licences import Verdict
from hf_merge.lineage import Part, base_models, inherited, licence_column, licence_in_words, licence_of, made_from
from hf_merge.method import get_method
from hf_merge.planning import Plan
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.tokenization.chat_templates import BUILT_IN
from hf_merge.types import InMemory, ModelRef, Ref

_NO_MARKUP = str.maketrans({"`": "'", "|": "/", "\n": " "})
_LIBRARIES = ("hf_merge", "torch", "transformers", "safetensors")


def template_folder() -> Path:
    """Where the templates are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "model_card_templates"
    return inside if inside.is_dir() else package.parent / "model_card_templates"


def merged_card(
    plan: Plan,
    sources: Sequence[Source],
    name: str,
    *,
    files: Sequence[str] = (),
    template: str | Path | None = None,
    how_to_load: str = "",
) -> ModelCard:
    """Render the card of a merged model.

    Args:
        plan: what was merged.
        sources: the plan's models, in its order.
        name: title of the card.
        files: names of the files beside the weights; they tell what kind of model it is.
        template: path of a Jinja template to use instead of merged.md.
        how_to_load: code, if it is not loaded as a folder with weights is.
    """
    by_model = dict(zip(plan.models, sources, strict=True))
    parts = _parts(by_model)
    verdict = licence_of(parts)
    config = plan.config
    is_sentence_transformer = "modules.json" in files
    return ModelCard.from_template(
        _card_data(parts, verdict, config, is_sentence_transformer=is_sentence_transformer),
        template_path=str(template or template_folder() / "merged.md"),
        name=name,
        method=get_method(plan.recipe.merge_method),
        models=_rows(plan, by_model),
        merged_count=len(plan.recipe.merged),
        notes=[*_notes(plan), *_lineage(parts)],
        licence=licence_in_words(parts, verdict),
        limits=_limits(plan.recipe, parts),
        recipe=public_recipe(plan.recipe, by_model).to_yaml(),
        how_to_load=how_to_load or _how_to_load(config, name, is_sentence_transformer=is_sentence_transformer),
        has_local_models=any(part.public_id is None for _, part in parts),
        seed=plan.recipe.seed,
        versions=", ".join(f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES),
    )


def pinned_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe with the commit of every model of the Hub."""
    return recipe.renamed({model: _named(model, source, hide=False) for model, source in original_models(sources)})


def public_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe as others may see it: commits pinned, and of local paths only the last part."""
    hidden = {model: _named(model, source, hide=True) for model, source in original_models(sources)}
    tokenizer = None if recipe.vocabulary is None else recipe.vocabulary.source
    if isinstance(tokenizer, ModelRef) and tokenizer not in sources and Path(tokenizer.path).expanduser().exists():
        hidden[tokenizer] = ModelRef(path=_local_name(tokenizer))
    return recipe.renamed(hidden)


def original_models(sources: Mapping[Ref, Source]) -> list[tuple[Ref, Source]]:
    """List the models that everything is made of: those of a stage instead of the stage."""
    found: dict[Ref, Source] = {}
    for model, source in sources.items():
        found |= dict(original_models(source.parents) if source.parents else [(model, source)])
    return [*found.items()]


def _named(model: Ref, source: Source, *, hide: bool) -> Any:
    """Pin the commits of a model and its adapter; hide whose machine a local path was on."""
    if isinstance(model, InMemory):
        return ModelRef(path=model.label) if hide else model
    named = [_named_part(ref, part, hide=hide) for ref, part in zip(model.parts, source.parts, strict=True)]
    return named[0].with_lora(named[1] if len(named) > 1 else None)


def _named_part(ref: ModelRef, part: Source, *, hide: bool) -> ModelRef:
    if part.public_id:
        return ModelRef(path=part.public_id, revision=part.revision)
    return ModelRef(path=_local_name(ref)) if hide else ref


def _single_refs(model: Ref) -> list[Any]:
    return [model] if isinstance(model, InMemory) else model.parts


def _local_name(model: Ref) -> str:
    """The last part of a path says what it is; the rest says whose machine it was on."""
    if isinstance(model, InMemory):
        return model.label
    return "+".join(Path(ref.path).resolve().name for ref in model.parts)


def _parts(sources: Mapping[Ref, Source]) -> list[Part]:
    """List the models and adapters that everything is made of, each once, as links."""
    found: dict[int, Part] = {}
    for model, source in original_models(sources):
        for ref, part in zip(_single_refs(model), source.parts, strict=True):
            found.setdefault(id(part), (_link(ref, part), part))
    return [*found.values()]


def _card_data(
    parts: Sequence[Part], verdict: Verdict, config: Mapping[str, Any], *, is_sentence_transformer: bool
) -> ModelCardData:
    architecture = next(iter(config.get("architectures") or ()), None)
    tag = "sentence-similarity" if is_sentence_transformer else architecture and _compat.pipeline_tag(architecture)
    library = "sentence-transformers" if is_sentence_transformer else "transformers" if config else None
    return ModelCardData(
        license=verdict.licence,
        license_name=verdict.name,
        license_link=verdict.link,
        language=inherited(parts, "language"),
        datasets=inherited(parts, "datasets"),
        base_model=base_models(parts),
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
            rows.append(_row(model, source, role))
            continue
        stage = next(stage for stage in plan.recipe.stages if stage.name == str(model))
        told = f"{role}; itself a merge by {stage.merge_method} of"
        rows.append({"link": f"stage `{model}`", "role": told, "revision": "", "licence": ""})
        rows += [
            _row(parent, origin, f"in `{model}`", indent="&nbsp;&nbsp;") for parent, origin in source.parents.items()
        ]
    return rows


def _row(model: Ref, source: Source, role: str, *, indent: str = "") -> dict[str, Any]:
    """Link a model, and its adapter if it has one."""
    if source.parents:
        return {"link": f"{indent}`{model}`", "role": role, "revision": "", "licence": ""}
    links = [_link(ref, part) for ref, part in zip(_single_refs(model), source.parts, strict=True)]
    revision = ", ".join(part.revision for part in source.parts if part.revision)
    licence = " + ".join(licence_column(part) for part in source.parts)
    return {"link": indent + " + ".join(links), "role": role, "revision": revision, "licence": licence}


def _link(model: Ref, part: Source) -> str:
    return _hub_link(part.public_id) if part.public_id else f"`{_local_name(model).translate(_NO_MARKUP)}`"


def _hub_link(public_id: str) -> str:
    return f"[{public_id}](https://huggingface.co/{public_id})"


def _lineage(parts: Sequence[Part]) -> list[str]:
    """Say which models are merges themselves, and of what."""
    merges = [(name, [_hub_link(one) for one in made_from(part)]) for name, part in parts]
    return [f"{name} is itself a merge, by its card made from {', '.join(links)}." for name, links in merges if links]


def _limits(recipe: Recipe, parts: Sequence[Part]) -> list[str]:
    """Say what was not checked."""
    told = [
        "The merge was not run and not evaluated: results of its models do not hold for it, and neither do tests of "
        "their safety.",
        "Licences, languages, datasets and what the models were made from are what the front matter of their cards "
        "says. Whether that is so, and what the licences of data and tokenizers ask, was not checked.",
    ]
    if any(part.revision is None for _, part in parts):
        told.append("Models without a revision were read where they lay: nothing here pins what was in them.")
    if recipe.allow_nonfinite:
        told.append("NaN and Inf were let pass, so that the weights may hold some.")
    return told


def _notes(plan: Plan) -> list[str]:
    """What a reader should know beside the recipe."""
    donor = _local_name(plan.models[plan.donor])
    notes = [
        _provenance(plan.recipe, donor),
        f"Arithmetic in float32 or wider, rounded once to {str(plan.dtype).removeprefix('torch.')}.",
    ]
    notes += [f"Layers of {told}." for told in plan.layers(lambda model: f"`{_local_name(model)}`")]
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
