"""Where tensors come from: mappings of names to tensors that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_merge.errors import SourceError
from hf_merge.sources.adapter import Adapter, WithAdapter, open_adapter
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.sources.hub import download, open_folder
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.module import ModuleSource
from hf_merge.sources.quantized import dequantized
from hf_merge.sources.weights import PICKLES
from hf_merge.types import InMemory, ModelRef, Ref

__all__ = ["Source", "download", "open_source", "open_sources"]

_AT_A_TIME = 8
_Found = tuple[Folder, str, dict[str, str]]


def open_sources(models: Iterable[Ref], **hub: Any) -> dict[Ref, Source]:
    """Open every model of a recipe.

    Args:
        models: what to open.
        **hub: token, cache_dir, local_files_only, stream, for models on the Hub.

    Raises:
        SourceError: a model cannot be read.
    """
    asked = list(models)
    parts = dict.fromkeys(part for model in asked if isinstance(model, ModelRef) for part in model.parts)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = dict(zip(parts, pool.map(partial(_located, **hub), parts), strict=True))
    return {model: _open_reference(model, found) if isinstance(model, ModelRef) else _open_object(model)
            for model in asked}  # fmt: skip


def open_source(model: Ref, **hub: Any) -> Source:
    """Open one model, dequantised if it is quantised; headers are read, values are not."""
    return open_sources([model], **hub)[model]


def _open_object(model: InMemory) -> Source:
    if isinstance(model.value, nn.Module):
        return dequantized(ModuleSource(model.value, model.label))
    if isinstance(model.value, Mapping):
        return dequantized(MappingSource(model.value, model.label))
    raise SourceError(
        f"{model.label} is a {type(model.value).__name__}; "
        "a model is a Hub id, a folder, a module or a mapping of tensors."
    )


def _open_reference(model: ModelRef, found: Mapping[ModelRef, _Found]) -> Source:
    own, *adapters = model.parts
    folder, file, origin = found[own]
    source = dequantized(Checkpoint(folder, str(own), file=file, **origin))
    opened = [Adapter(*open_adapter(found[one][0], str(one), **found[one][2])) for one in adapters]
    return WithAdapter(source, *opened) if opened else source


def _located(model: ModelRef, **hub: Any) -> _Found:
    """Return the folder of a model, the file in it that is meant, and its id and commit if it is from the Hub."""
    path = Path(model.path).expanduser()
    if path.is_file():
        return Folder(path.parent), path.name, {}
    if os.path.exists(path):
        return Folder(path), "", {}
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.suffix in PICKLES:
        raise SourceError(f"There is no model at '{model.path}'.")
    folder = open_folder(model, **hub)
    return folder, "", {"public_id": model.path, "revision": folder.path.name}
