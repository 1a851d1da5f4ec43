"""Recipe -> a repo of a few kilobytes, without weights, that the Auto classes load by merging."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import logging

import hf_merge
from hf_merge import _compat
from hf_merge.api import open_recipe
from hf_merge.card import merged_card, original_models, pinned_recipe
from hf_merge.errors import OutputError, RecipeError
from hf_merge.planning import Plan
from hf_merge.recipe import Recipe
from hf_merge.registration import MODEL_TYPE
from hf_merge.sources import Source, download
from hf_merge.types import InMemory, ModelRef, Ref
from hf_merge.writer import RECIPE_FILE, refuse_existing

logger = logging.get_logger(__name__)

STUB = "modeling_hf_merge.py"
_STUB = '''"""Of a repo without weights: its models are merged when it is loaded, by hf_merge."""

try:
    from hf_merge.auto import MergeConfig  # noqa: F401
except ImportError as error:
    raise ImportError(
        "This repo holds no weights but a recipe, which the package hf_merge merges when it is loaded: "
        "run `pip install hf-merge`, and `import hf_merge` before you load it."
    ) from error
'''


def save_recipe(recipe: Recipe, folder: str | Path, **hub: Any) -> Path:
    """Write a recipe repo into a folder; see `Recipe.save_pretrained`."""
    target = Path(folder).expanduser()
    refuse_existing(target, overwrite=_is_recipe_repo(target))
    made, sources = open_recipe(recipe, hub)
    made.check()
    pinned, local = _pinned(made, sources, hub)
    if local:
        logger.warning("The recipe in '%s' works on this machine only: it names %s.", target, ", ".join(local))
    _write(target, made, sources, pinned)
    return target


def push_recipe(recipe: Recipe, repo_id: str, *, hub: Mapping[str, Any], **options: Any) -> Any:
    """Write a recipe repo to the Hub; see `Recipe.push_to_hub`."""
    made, sources = open_recipe(recipe, hub)
    made.check()
    pinned, local = _pinned(made, sources, hub)
    if local:
        raise RecipeError(
            f"The recipe names what only this machine has: {', '.join(local)}. Push these models first and name them "
            "by their ids, or merge here and push the result."
        )
    with TemporaryDirectory() as folder:
        _write(Path(folder), made, sources, pinned, name=repo_id)
        return hf_merge.push_to_hub(folder, repo_id, **options)


def _is_recipe_repo(folder: Path) -> bool:
    path = folder / "config.json"
    said = f'"model_type": "{MODEL_TYPE}"'
    return path.is_file() and said in path.read_text(encoding="utf-8", errors="replace")


def _pinned(made: Plan, sources: Sequence[Source], hub: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Return the recipe with the commits of its models, and what in it is on this machine only.

    Raises:
        RecipeError: a model is an object in memory.
    """
    by_model = dict(zip(made.models, sources, strict=True))
    originals = original_models(by_model)
    if objects := [str(model) for model, _ in originals if isinstance(model, InMemory)]:
        raise RecipeError(
            f"A recipe repo names its models, but {', '.join(objects)} is an object: save it to a folder."
        )
    here: dict[ModelRef, ModelRef] = {}
    for model, source in originals:
        parts = zip(_parts(model), source.parts, strict=True)
        here |= {ref: _absolute(ref) for ref, part in parts if not part.public_id}
    names: dict[Ref, ModelRef] = {model: _replaced(model, here) for model, _ in originals}
    tokenizer = made.recipe.vocabulary.source if made.recipe.vocabulary else None
    if isinstance(tokenizer, ModelRef) and tokenizer not in by_model:
        names[tokenizer] = pinned = _pinned_tokenizer(tokenizer, hub)
        if pinned.revision is None:
            here[tokenizer] = pinned
    for file in made.recipe.measured:
        if isinstance(file, InMemory):
            raise RecipeError("A recipe repo names its statistics, and these are objects: measure them into files.")
        names[file] = here[file] = _absolute(file)
    recipe = pinned_recipe(made.recipe.renamed(names), {names[model]: source for model, source in originals})
    return recipe, sorted({ref.path for ref in here.values()})


def _parts(model: Ref) -> list[ModelRef]:
    return model.parts if isinstance(model, ModelRef) else []


def _absolute(ref: ModelRef) -> ModelRef:
    return ModelRef(path=str(Path(ref.path).expanduser().resolve()), weight=ref.weight)


def _replaced(model: Ref, here: Mapping[ModelRef, ModelRef]) -> ModelRef:
    own, *adapters = [here.get(part, part) for part in _parts(model)]
    return own.with_lora(*adapters)


def _pinned_tokenizer(ref: ModelRef, hub: Mapping[str, Any]) -> ModelRef:
    """Pin the commit of a model that gives its tokenizer alone."""
    if Path(ref.path).expanduser().exists():
        return _absolute(ref)
    return ModelRef(path=ref.path, revision=download(ref, only=["config.json"], **hub).name)


def _write(folder: Path, made: Plan, sources: Sequence[Source], recipe: Recipe, name: str = "") -> None:
    """Write all files, config.json last, so that no half repo loads."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sources[made.donor].write_companions(folder)
        (folder / STUB).write_text(_STUB, encoding="utf-8")
        (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        card = merged_card(
            made, sources, name or folder.name, files=[path.name for path in folder.iterdir()],
            how_to_load=_how_to_load(made, name or folder.name),
        )  # fmt: skip
        card.save(folder / "README.md")
        config = json.dumps(_config(made, recipe, folder), indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written: {error.strerror or error}.") from error


def _config(made: Plan, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the config.json of the repo; `architectures` says what it gives."""
    tokenizer = _compat.tokenizer_class(made.config, folder)
    return {
        "model_type": MODEL_TYPE,
        "architectures": list(made.config.get("architectures") or ()),
        "auto_map": {"AutoConfig": f"{STUB.removesuffix('.py')}.MergeConfig"},
        **({"tokenizer_class": tokenizer} if tokenizer else {}),
        "hf_merge_version": hf_merge.__version__,
        "recipe": json.loads(json.dumps(recipe.to_dict(), default=str)),
    }


def _how_to_load(made: Plan, name: str) -> str:
    auto = _compat.auto_class_name(next(iter(made.config.get("architectures") or ()), ""))
    return (
        "import hf_merge  # pip install hf-merge; there are no weights here: the models are merged when you load it\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}", device_map="auto")'
    )
