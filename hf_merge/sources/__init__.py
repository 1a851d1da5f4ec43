"""Where tensors come from: mappings of names to tensors that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from hf_merge import _compat
from hf_merge.errors import SourceError, shown
from hf_merge.sources.adapter import CONFIG as ADAPTER_CONFIG
from hf_merge.sources.adapter import Adapter, WithAdapter, open_adapter
from hf_merge.sources.base import Source
from hf_merge.sources.cards import is_repo
from hf_merge.sources.checkpoint import SINGLES, Checkpoint
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.hub import download, open_folder
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.module import ModuleSource
from hf_merge.sources.quantized import dequantized
from hf_merge.sources.weights import PICKLES
from hf_merge.types import InMemory, ModelRef, Ref

__all__ = [
    "Located", "Source", "download", "has_weights", "is_adapter", "locate", "open_source", "open_sources", "with_bases",
]  # fmt: skip

_AT_A_TIME = 8


class Located(NamedTuple):
    """Where a model is.

    Attributes:
        folder: its folder.
        file: the file in it that is meant, if it is one alone.
        origin: `public_id` and `revision`, if it is from the Hub.
    """

    folder: Folder
    file: str
    origin: dict[str, str]


def open_sources(
    models: Iterable[Ref], found: Mapping[ModelRef, Located] | None = None, **hub: Any
) -> dict[Ref, Source]:
    """Open every model of a recipe.

    Args:
        models: what to open. A model that is an adapter alone is opened with its base, under its own name.
        found: folders that `locate` has found already.
        **hub: token, cache_dir, local_files_only, stream, for models on the Hub.

    Raises:
        SourceError: a model cannot be read.
    """
    asked = list(models)
    folders = dict(found or {})
    names = with_bases(asked, folders, **hub)
    return {
        model: _open_reference(names.get(model, model), folders) if isinstance(model, ModelRef) else _open_object(model)
        for model in asked
    }


def open_source(model: Ref, **hub: Any) -> Source:
    """Open one model, dequantised if it is quantised; headers are read, values are not."""
    return open_sources([model], **hub)[model]


def locate(models: Iterable[Ref], **hub: Any) -> dict[ModelRef, Located]:
    """Find the folders of models and adapters; of those on the Hub, the small files come into the cache.

    Args:
        models: each is found in parts: a base, its adapters.
        **hub: token, cache_dir, local_files_only, stream.

    Raises:
        SourceError: one is neither here nor on the Hub.
    """
    parts = dict.fromkeys(part for model in models if isinstance(model, ModelRef) for part in model.parts)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return dict(zip(parts, pool.map(partial(_located, **hub), parts), strict=True))


def is_adapter(found: Located) -> bool:
    """Tell whether a folder holds an adapter; with its base, or alone."""
    return not found.file and ADAPTER_CONFIG in found.folder


def with_bases(models: Iterable[Ref], found: dict[ModelRef, Located], **hub: Any) -> dict[Ref, ModelRef]:
    """Name the base of every model that is an adapter alone, and of every folder with an adapter in it.

    Args:
        models: as a recipe names them. Those with adapters of their own (`base+adapter`) are left as they are.
        found: their folders; those that lack here, and those of the bases, are added.
        **hub: token, cache_dir, local_files_only, stream.

    Returns:
        For each adapter, the base with it.

    Raises:
        SourceError: the base is not named, or cannot be found.
    """
    asked = list(models)
    parts = [part for model in asked if isinstance(model, ModelRef) for part in model.parts]
    found |= locate([part for part in parts if part not in found], **hub)
    bare = [m for m in asked if isinstance(m, ModelRef) and not m.lora and is_adapter(found[m])]
    names: dict[Ref, ModelRef] = {model: _base_of(model, found, asked).with_lora(model) for model in bare}
    for model, whole in names.items():
        base = whole.with_lora()
        if base not in found:
            try:
                found |= locate([base], **hub)
            except SourceError as error:
                raise SourceError(
                    f"'{model}' is an adapter of '{base}', and that cannot be read: {error} "
                    f"If it is elsewhere, write 'base+{model}'."
                ) from error
        if base != model and is_adapter(found[base]) and not has_weights(found[base]):
            raise SourceError(
                f"'{model}' is an adapter of '{base}', which is an adapter itself: write 'base+{base}+{model}'."
            )
    return names


def _base_of(model: ModelRef, found: Mapping[ModelRef, Located], asked: list[Ref]) -> ModelRef:
    """Return the base of an adapter, as the recipe names it if it does."""
    if has_weights(found[model]):
        return model
    folder = found[model].folder
    config = read_object(folder.paths([ADAPTER_CONFIG])[0])
    told, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(told, str) or not told:
        raise SourceError(
            f"'{model}' is an adapter, and its {ADAPTER_CONFIG} does not name its base "
            f"(base_model_name_or_path is {shown(told)}): write 'base+{model}'."
        )
    here = Path(told).expanduser()
    revision = revision if isinstance(revision, str) and revision and not here.exists() else None
    for other in (other for other in asked if isinstance(other, ModelRef)):
        own = other.with_lora()
        same = own.path == told or (here.exists() and Path(own.path).expanduser().resolve() == here.resolve())
        if same and own != model and (revision is None or own.revision in (None, revision)):
            return own
    if found[model].origin and not is_repo(told):
        raise SourceError(
            f"'{model}' is an adapter on the Hub of {shown(told)}, which is no id there but a folder, where it was "
            f"trained: write 'base+{model}'."
        )
    return ModelRef(path=told, revision=revision)


def has_weights(found: Located) -> bool:
    """Tell whether a folder holds a model, beside an adapter or without one."""
    return any(name in found.folder for name in SINGLES)


def _open_object(model: InMemory) -> Source:
    if isinstance(model.value, nn.Module):
        return _open_module(model.value, model.label)
    if isinstance(model.value, Mapping):
        return dequantized(MappingSource(model.value, model.label))
    raise SourceError(
        f"{model.label} is a {type(model.value).__name__}; "
        "a model is a Hub id, a folder, a module or a mapping of tensors."
    )


def _open_module(module: nn.Module, label: str) -> Source:
    """Open a live module; one with adapters is its base with those that are active."""
    try:
        live = _compat.peft_live(module)
    except ValueError as error:
        raise SourceError(
            f"{label} {error}: call unmerge_adapter(), or merge_and_unload() and pass the result."
        ) from None
    if not live:
        return dequantized(ModuleSource(module, label))
    own, tensors = _compat.peft_base(module)
    base = dequantized(ModuleSource(own, label, tensors))
    adapters = [Adapter(MappingSource(found, f"{label}:{name}"), config) for name, (config, found) in live.items()]
    return WithAdapter(base, *adapters, in_memory=True)


def _open_reference(model: ModelRef, found: Mapping[ModelRef, Located]) -> Source:
    own, *adapters = model.parts
    folder, file, origin = found[own]
    source = dequantized(Checkpoint(folder, str(own), file=file, **origin))
    opened = []
    for one in adapters:
        folder, _, origin = found[one]
        label = str(one.model_copy(update={"weight": 1.0}))
        opened.append(Adapter(*open_adapter(folder, label, **origin), one.weight))
    return WithAdapter(source, *opened) if opened else source


def _located(model: ModelRef, **hub: Any) -> Located:
    path = Path(model.path).expanduser()
    if path.is_file():
        return Located(Folder(path.parent), path.name, {})
    if os.path.exists(path):
        return Located(Folder(path), "", {})
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.suffix in PICKLES:
        raise SourceError(f"There is no model at '{model.path}'.")
    folder = open_folder(model, **hub)
    return Located(folder, "", {"public_id": model.path, "revision": folder.path.name})
