"""Where a model is that is tried out, what it is for, and why it may not be run; its weights are not read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import metadata_load
from yaml import YAMLError

from hf_merge import _compat
from hf_merge.errors import MergeError, SourceError
from hf_merge.experts.files import INDEX_FILE
from hf_merge.recipe import Recipe
from hf_merge.registration import MODEL_TYPE
from hf_merge.results import MergedModel
from hf_merge.sources import Located, is_adapter, with_bases
from hf_merge.sources.folder import Folder, read_object
from hf_merge.types import ModelRef
from hf_merge.yaml_lines import MAX_BYTES

TASKS = (
    "text-generation", "text-classification", "image-classification", "fill-mask", "feature-extraction",
    "sentence-similarity",
)  # fmt: skip
"""What models can be tried on, as the Hub calls it."""

_ADAPTERS_FOR = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "FEATURE_EXTRACTION": TASKS[4]}
_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Found:
    """A model that can be loaded.

    Attributes:
        name: folder, or id on the Hub.
        adapters: PEFT adapters over it, each the same.
        config: its config.json.
        task: what it is for, as its card or its class says; None if neither does.
        modules: the files of a sentence-transformers model; None if it is none.
    """

    name: tuple[str, str | None]
    adapters: tuple[tuple[str, str | None], ...]
    config: Mapping[str, Any]
    task: str | None
    modules: Folder | None


@contextmanager
def found(model: Any, **hub: Any) -> Iterator[Found]:
    """Find a model, for as long as the context lasts.

    Args:
        model: a folder, an id on the Hub, `base+adapter`, what `merge` returned, or a recipe, merged when it is loaded.
        **hub: token, cache_dir, local_files_only.

    Raises:
        MergeError: it is not there, or may not or cannot be run; the message says why.
    """
    recipe = _as_recipe(model)
    if recipe is None:
        yield _at(_reference(model), **hub)
        return
    with TemporaryDirectory() as folder:
        with _compat.muted("hf_merge.recipe_repo"):  # which says that such a folder works on this machine only
            written = recipe.save_pretrained(Path(folder) / "merged", **hub)
        yield _at(ModelRef(path=str(written)), **hub)


def _as_recipe(model: Any) -> Recipe | None:
    """Read a recipe; None if it is none."""
    if isinstance(model, Recipe):
        return model
    named = isinstance(model, (str, os.PathLike)) and str(model).endswith(_RECIPES)
    return Recipe.load(model) if named or isinstance(model, Mapping) else None


def _reference(model: Any) -> ModelRef:
    if isinstance(model, MergedModel):
        path = str(model.path or model.repo_id)
        return ModelRef(path=path, revision=None if model.path else model.commit)
    if isinstance(model, ModelRef):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise SourceError(
            f"A model to try is a folder, a Hub id, what merge returned or a recipe; found {type(model).__name__}."
        )
    try:
        return ModelRef.parse(os.fspath(model))
    except ValueError as error:
        raise SourceError(f"{error}.") from None


def _at(ref: ModelRef, **hub: Any) -> Found:
    """Look at a model's files, and refuse what may not or cannot be run."""
    places: dict[ModelRef, Located] = {}
    whole = with_bases([ref], places, **hub).get(ref, ref)
    base, *adapters = whole.parts
    place = places[base]
    if place.file or "config.json" not in place.folder:
        raise SourceError(f"'{base}' has no config.json, so that no class is known that runs it.")
    config = read_object(place.folder.paths(["config.json"])[0])
    _refuse(str(base), config, place)
    for adapter in adapters:
        _refuse_adapter(adapter, places[adapter])
    told = [_said_by_card(places[one]) for one in (*adapters, base)]
    told += [_said_by_adapter(places[one]) for one in adapters]
    named = [_compat.pipeline_tag(name) for name in config.get("architectures") or ()]
    task = next((tag for tag in [*told, *named] if tag in TASKS), None)
    is_st = "modules.json" in place.folder
    return Found(
        name=_name(base, place),
        adapters=tuple(_name(one, places[one]) for one in adapters),
        config=config,
        task=task or (None if any(named) else "sentence-similarity" if is_st else "feature-extraction"),
        modules=place.folder if is_st else None,
    )


def _name(ref: ModelRef, place: Located) -> tuple[str, str | None]:
    """Return what `from_pretrained` is given: a folder, or an id with its commit."""
    if "public_id" in place.origin:
        return place.origin["public_id"], place.origin["revision"]
    return str(place.folder.path), None


def _refuse(label: str, config: Mapping[str, Any], place: Located) -> None:
    """Raise if a model may not be run, or cannot be."""
    names = place.folder.all_names()
    if INDEX_FILE in names:
        raise MergeError(f"'{label}' has task experts, which run by a router: load it with hf_merge.load_experts.")
    if config.get("model_type") == MODEL_TYPE:
        return
    if config.get("auto_map") and not _is_known(config):
        raise MergeError(f"'{label}' needs code of its own to run, and code that comes with a model is never run here.")
    if not any(name.endswith(".safetensors") for name in names):
        raise MergeError(f"'{label}' has no weights in safetensors, and no others are loaded here: convert them first.")


def _is_known(config: Mapping[str, Any]) -> bool:
    """Tell whether transformers itself has the model's class."""
    import transformers

    return any(hasattr(transformers, name) for name in config.get("architectures") or ())


def _refuse_adapter(ref: ModelRef, place: Located) -> None:
    if ref.weight != 1:
        raise MergeError(f"'{ref}' is a part of an adapter: merge it into its base, and try that out.")
    if not is_adapter(place):
        raise SourceError(f"'{ref}' is no PEFT adapter: it has no adapter_config.json.")
    if "adapter_model.safetensors" not in place.folder:
        raise MergeError(f"'{ref}' has no adapter_model.safetensors, and no other weights are loaded here.")


def _said_by_card(place: Located) -> str | None:
    """Return the pipeline_tag of a model's card; nothing of one that cannot be read."""
    if "README.md" not in place.folder:
        return None
    path = place.folder.paths(["README.md"])[0]
    try:
        told = metadata_load(path) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, YAMLError, RecursionError):
        return None
    return str(told.get("pipeline_tag")) if isinstance(told, dict) else None


def _said_by_adapter(place: Located) -> str | None:
    config = read_object(place.folder.paths(["adapter_config.json"])[0])
    return _ADAPTERS_FOR.get(str(config.get("task_type")))
