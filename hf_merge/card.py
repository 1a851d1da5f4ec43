"""Plan -> model card, from a template in model_card_templates/ through huggingface_hub.ModelCard."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_merge import _compat
from hf_merge.evaluation import EVALUATED, NOT_EVALUATED, Compared, evaluation_table
from hf_merge.licences import Verdict
from hf_merge.lineage import Part, base_models, inherited, licence_column, licence_in_words, licence_of, made_from
from hf_merge.method import get_method
from hf_merge.planning import Plan
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.sparklines import pictures
from hf_merge.tokenization.chat_templates import BUILT_IN
from hf_merge.types import InMemory, ModelRef, Ref

NO_MARKUP = str.maketrans({"`": "'", "|": "/", "\n": " "})
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
    eval_results: Sequence[EvalResult] = (),
    compared: Compared | None = None,
    how_to_load: str = "",
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> ModelCard:
    """Render the card of a merged model.

    Args:
        plan: what was merged.
        sources: the plan's models, in its order.
        name: title of the card.
        files: names of the files beside the weights; they tell what kind of model it is.
        template: path of a Jinja template to use instead of merged.md; it may extend or include ours by name.
        eval_results: how the merge did.
        compared: how other models did, by name; for the table.
        how_to_load: code, if it is not loaded as a folder with weights is.
        data: what the front matter says instead.
        **values: more for the template, or instead of what it would get.
    """
    by_model = dict(zip(plan.models, sources, strict=True))
    parts = _parts(by_model)
    verdict = licence_of(parts)
    config = plan.config
    is_sentence_transformer = "modules.json" in files
    front = _card_data(parts, verdict, config, is_sentence_transformer=is_sentence_transformer)
    if eval_results:
        front.eval_results, front.model_name = [*eval_results], name
    for key, value in (data or {}).items():
        setattr(front, key, value)
    recipe = public_recipe(plan.recipe, by_model).to_yaml()
    told = {
        "name": name,
        "method": get_method(plan.recipe.merge_method),
        "models": _rows(plan, by_model),
        "merged_count": len(plan.recipe.merged),
        "notes": [*_notes(plan), *_lineage(parts)],
        "licence": licence_in_words(parts, verdict),
        "limits": _limits(plan, parts, is_evaluated=bool(eval_results)),
        "recipe": recipe,
        "fence": "`" * max([3, *(len(run) + 1 for run in re.findall("`+", recipe))]),
        "schedules": pictures(plan, [_called(model, by_model[model]) for model in plan.models]),
        "evaluation": evaluation_table(eval_results, compared),
        "how_to_load": how_to_load or _how_to_load(config, name, is_sentence_transformer=is_sentence_transformer),
        "has_local_models": any(part.public_id is None for _, part in parts),
        "seed": plan.recipe.seed,
        "versions": ", ".join(f"{library} {importlib.metadata.version(library)}" for library in _LIBRARIES),
    }
    return rendered(Path(template or template_folder() / "merged.md"), front, **{**told, **values})


def rendered(template: Path, data: ModelCardData, **values: Any) -> ModelCard:
    """Render a card as `ModelCard.from_template` does, but that templates may extend and include one another."""
    from jinja2 import Environment, FileSystemLoader  # a plan needs no templates

    folders = [str(template.parent), str(template_folder())]
    # The result is Markdown, not HTML: what comes from outside is made harmless where it is put into a sentence.
    environment = Environment(loader=FileSystemLoader(folders), autoescape=False)
    text = environment.from_string(template.read_text(encoding="utf-8"))
    return ModelCard(text.render(card_data=data.to_yaml(), **{**data.to_dict(), **values}))


def pinned_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe with the commit of every model of the Hub."""
    return recipe.renamed({model: _named(model, source, hide=False) for model, source in original_models(sources)})


def public_recipe(recipe: Recipe, sources: Mapping[Ref, Source]) -> Recipe:
    """Return the recipe as others may see it: commits pinned, and of local paths only the last part."""
    hidden = {model: _named(model, source, hide=True) for model, source in original_models(sources)}
    tokenizer = None if recipe.vocabulary is None else recipe.vocabulary.source
    if isinstance(tokenizer, ModelRef) and tokenizer not in sources and Path(tokenizer.path).expanduser().exists():
        hidden[tokenizer] = ModelRef(path=_local_name(tokenizer))
    hidden |= {ref: _placeless(ref) for ref in recipe.measured if isinstance(ref, ModelRef)}
    return recipe.renamed(hidden)


def without_paths(recipe: Recipe) -> Recipe:
    """Return a recipe as others may see it, whatever its models are: of local paths only the last part."""
    models = [model for each in (recipe, *recipe.stages) for model in each.references]
    tokenizer = None if recipe.vocabulary is None else recipe.vocabulary.source
    return recipe.renamed(
        {model: _placeless(model) for model in [*models, *recipe.measured, tokenizer] if isinstance(model, ModelRef)}
    )


def _placeless(model: ModelRef) -> ModelRef:
    named = [ModelRef(path=_local_name(ref), weight=ref.weight) if _is_path(ref.path) else ref for ref in model.parts]
    return named[0].with_lora(*named[1:])


def _is_path(text: str) -> bool:
    """Tell whether a model's name is a place on a machine."""
    return text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text or Path(text).exists()


def original_models(sources: Mapping[Ref, Source]) -> list[tuple[Ref, Source]]:
    """List the models that everything is made of: those of a stage instead of the stage."""
    found: dict[Ref, Source] = {}
    for model, source in sources.items():
        found |= dict(original_models(source.parents) if source.parents else [(model, source)])
    return [*found.items()]


def with_checksums(text: str, sums: Mapping[str, str]) -> str:
    """Return the text of a card with the section `## Checksums`: put in, or in the place of the one it has.

    Args:
        text: of any card, with or without front matter.
        sums: SHA-256 of each file of weights, in hexadecimal digits; without one the section goes.
    """
    return with_section(text, "Checksums", _checksums(sums))


def with_section(text: str, title: str, content: str) -> str:
    """Return the text of a card with a section of the second level: put in, or in the place of the one it has.

    Args:
        text: of any card, with or without front matter.
        title: of the section.
        content: below its heading; without any the section goes.
    """
    lines = text.splitlines()
    places = _sections(lines)
    if title in places:
        start = places[title]
        end = min((place for place in places.values() if place > start), default=len(lines))
        lines[start:end] = []
        places = _sections(lines)
    at = min((places[title] for title in ("Licence", "Limits") if title in places), default=len(lines))
    head, tail = "\n".join(lines[:at]).rstrip(), "\n".join(lines[at:]).rstrip()
    made = f"## {title}\n\n{content}" if content else ""
    return "\n\n".join(part for part in (head, made, tail) if part) + "\n"


def _checksums(sums: Mapping[str, str]) -> str:
    """Write the section in the words that `sha256sum --check` reads."""
    if not sums:
        return ""
    rows = "\n".join(f"{digest}  {file}" for file, digest in sorted(sums.items()))
    return f"SHA-256 of the weights; `sha256sum --check` reads these lines.\n\n```text\n{rows}\n```"


def _sections(lines: Sequence[str]) -> dict[str, int]:
    """Find the headings of the second level, outside of code and front matter."""
    found: dict[str, int] = {}
    fence = "---" if lines and lines[0].rstrip() == "---" else ""
    for place, line in enumerate(lines):
        mark = line.strip()[:3]
        if fence:
            fence = "" if mark == fence and place else fence
        elif mark in ("```", "~~~"):
            fence = mark
        elif line.startswith("## "):
            found.setdefault(line[3:].strip(), place)
    return found


def with_name(text: str, name: str) -> str:
    """Return the text of a card of ours with another name in its title and where it says how to load the model.

    What else names the model is left as it is, and so is a card whose title is the id of a repository already.
    """
    title = re.search(r"^# (\S[^/\n]*)$", text, re.MULTILINE)
    if title is None or "- hf_merge\n" not in text.partition("\n---")[0] + "\n":
        return text
    old = title[1]
    text = text[: title.start()] + f"# {name}" + text[title.end() :]
    return text.replace(_load_file(old), _load_file(name)).replace(f'("{old}")', f'("{name}")')


def _named(model: Ref, source: Source, *, hide: bool) -> Any:
    """Pin the commits of a model and its adapter; hide whose machine a local path was on."""
    if isinstance(model, InMemory):
        return ModelRef(path=model.label) if hide else model
    named = [_named_part(ref, part, hide=hide) for ref, part in zip(model.parts, source.parts, strict=True)]
    return named[0].with_lora(*named[1:])


def _named_part(ref: ModelRef, part: Source, *, hide: bool) -> ModelRef:
    if part.public_id:
        return ModelRef(path=part.public_id, revision=part.revision, weight=ref.weight)
    return ModelRef(path=_local_name(ref), weight=ref.weight) if hide else ref


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
        rows.append({"link": f"stage {_cell(model)}", "role": told, "revision": "", "licence": ""})
        rows += [
            _row(parent, origin, f"in {_cell(model)}", indent="&nbsp;&nbsp;")
            for parent, origin in source.parents.items()
        ]
    return rows


def _row(model: Ref, source: Source, role: str, *, indent: str = "") -> dict[str, Any]:
    """Link a model, and its adapter if it has one."""
    if source.parents:
        return {"link": f"{indent}{_cell(model)}", "role": role, "revision": "", "licence": ""}
    links = [_link(ref, part) for ref, part in zip(_single_refs(model), source.parts, strict=True)]
    revision = ", ".join(part.revision for part in source.parts if part.revision)
    licence = " + ".join(licence_column(part) for part in source.parts)
    return {"link": indent + " + ".join(links), "role": role, "revision": revision, "licence": licence}


def _link(model: Ref, part: Source) -> str:
    return hub_link(part.public_id) if part.public_id else _cell(_local_name(model))


def _called(model: Ref, source: Source) -> str:
    """Name a model in plain text: its ids on the Hub, or the last part of its path."""
    named = zip(_single_refs(model), source.parts, strict=False)
    told = str(model) if source.parents else "+".join(part.public_id or _local_name(ref) for ref, part in named)
    return told.translate(NO_MARKUP)


def _code(text: object) -> str:
    """Write text as code in a sentence, where a bar is one, as in `<|im_start|>`."""
    return f"`{' '.join(str(text).splitlines()).replace('`', chr(39))}`"


def _cell(text: object) -> str:
    """Write text as code in a table."""
    return f"`{str(text).translate(NO_MARKUP)}`"


def hub_link(public_id: str) -> str:
    """Link a model on the Hub."""
    return f"[{public_id}](https://huggingface.co/{public_id})"


def _lineage(parts: Sequence[Part]) -> list[str]:
    """Say which models are merges themselves, and of what."""
    merges = [(name, [hub_link(one) for one in made_from(part)]) for name, part in parts]
    return [f"{name} is itself a merge, by its card made from {', '.join(links)}." for name, links in merges if links]


def _limits(plan: Plan, parts: Sequence[Part], *, is_evaluated: bool) -> list[str]:
    """Say what was not checked."""
    told = [
        EVALUATED if is_evaluated else NOT_EVALUATED,
        "Licences, languages, datasets and what the models were made from are what the front matter of their cards "
        "says. Whether that is so, and what the licences of data and tokenizers ask, was not checked.",
    ]
    if any(part.revision is None for _, part in parts):
        told.append("Models without a revision were read where they lay: nothing here pins what was in them.")
    if gated := [name for name, part in parts if part.gated]:
        told.append(
            f"Gated on the Hub: {', '.join(gated)}. Who reads them accepts their owners' conditions first; this merge "
            "does not ask for that, and the conditions hold for it all the same."
        )
    if plan.config.get("auto_map"):
        donor = _code(_local_name(plan.models[plan.donor]))
        told.append(
            f"The model runs code of its own, which was copied from {donor} as it was and not looked at: read it "
            "before you load the model with `trust_remote_code=True`."
        )
    if plan.recipe.allow_nonfinite:
        told.append("NaN and Inf were let pass, so that the weights may hold some.")
    return told


def _notes(plan: Plan) -> list[str]:
    """What a reader should know beside the recipe."""
    donor = _local_name(plan.models[plan.donor])
    notes = [
        _provenance(plan.recipe, donor),
        f"Arithmetic in float32 or wider, rounded once to {str(plan.dtype).removeprefix('torch.')}.",
    ]
    notes += [f"Layers of {told}." for told in plan.layers(lambda model: _code(_local_name(model)))]
    apart = plan.tasks.apart if plan.tasks is not None else frozenset[str]()
    copied = sum(
        step.method is None and step.name not in apart and not step.name.startswith("experts/") for step in plan.steps
    )
    if copied:
        hold, were = ("tensor holds", "was") if copied == 1 else ("tensors hold", "were")
        notes.append(f"{copied} {hold} integers, equal in all models, and {were} copied.")
    if apart:
        notes.append(f"{len(apart)} tensors, such as heads, were not merged: each task that had them keeps its own.")
    rules = [(rule.pattern, rule.merge_method or plan.recipe.merge_method) for rule in plan.recipe.rules]
    return [*notes, *(f"Tensors matching {_code(pattern)}: {method}." for pattern, method in rules)]


def _provenance(recipe: Recipe, donor: str) -> str:
    """Say where config, tokenizer and chat template come from."""
    options, template = recipe.vocabulary, recipe.chat_template
    if options is None or options.source == "base":
        told = [f"Config, tokenizer and the set of tensors come from {_code(donor)}"]
    else:
        told = [f"Config and the set of tensors come from {_code(donor)}"]
        united = "the tokenizer is the union of all models', with the ids of that model first"
        told += [
            united if isinstance(options.source, str) else f"the tokenizer from {_code(_local_name(options.source))}"
        ]
    if options is not None and options.tokens:
        told.append(f"the recipe says where the rows of {', '.join(map(_code, options.tokens))} come from")
    if template is not None:
        named = {"auto": "that of most models"}.get(
            template, f"`{template}`" if template in BUILT_IN else "the recipe's"
        )
        told.append(f"the chat template is {named}")
    return "; ".join(told) + "."


def _how_to_load(config: Mapping[str, Any], name: str, *, is_sentence_transformer: bool) -> str:
    named = json.dumps(name, ensure_ascii=False)
    if is_sentence_transformer:
        return f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({named})"
    if not config:
        return _load_file(name)
    architecture = next(iter(config.get("architectures") or ()), "AutoModel")
    own = [name for name in config.get("auto_map") or () if str(name).startswith("AutoModel")]
    loader, code = (own[0], ", trust_remote_code=True") if own else (architecture, "")
    return f"from transformers import {loader}\n\nmodel = {loader}.from_pretrained({named}{code})"


def _load_file(name: str) -> str:
    """Say how to load weights without a config from a folder, or from a repository `namespace/name`."""
    if "/" not in name:
        file = json.dumps(f"{name}/model.safetensors", ensure_ascii=False)
        return f"from safetensors.torch import load_file\n\nstate_dict = load_file({file})"
    return (
        "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n\n"
        f'state_dict = load_file(hf_hub_download("{name}", "model.safetensors"))'
    )
