"""Where tensors come from: mappings of names to tensors that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_merge.errors import SourceError
from hf_merge.sources.adapter import WithAdapter, open_adapter
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import PICKLES, Checkpoint
from hf_merge.sources.hub import download
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.module import ModuleSource
from hf_merge.sources.quantized import dequantized
from hf_merge.types import InMemory, ModelRef, Ref

__all__ = ["Source", "download", "open_source", "open_sources"]


def open_sources(models: Iterable[Ref], **hub: Any) -> dict[Ref, Source]:
    """Open every model of a recipe.

    Args:
        models: what to open.
        **hub: token, cache_dir, local_files_only, for models on the Hub.

    Raises:
        SourceError: a model cannot be read.
    """
    return {model: open_source(model, **hub) for model in models}


def open_source(model: Ref, **hub: Any) -> Source:
    """Open one model, dequantised if it is quantised; headers are read, values are not."""
    return dequantized(_open_reference(model, **hub) if isinstance(model, ModelRef) else _open_object(model))


def _open_object(model: InMemory) -> Source:
    if isinstance(model.value, nn.Module):
        return ModuleSource(model.value, model.label)
    if isinstance(model.value, Mapping):
        return MappingSource(model.value, model.label)
    raise SourceError(
        f"{model.label} is a {type(model.value).__name__}; "
        "a model is a Hub id, a folder, a module or a mapping of tensors."
    )


def _open_reference(model: ModelRef, **hub: Any) -> Source:
    if model.lora is not None:
        base, (folder, origin) = open_source(model.with_lora(None), **hub), _located(model.lora, **hub)
        return WithAdapter(base, *open_adapter(folder, str(model.lora), **origin))
    folder, origin = _located(model, **hub)
    return Checkpoint(folder, str(model), **origin)


def _located(model: ModelRef, **hub: Any) -> tuple[Path, dict[str, str]]:
    """Return where a model lies, and its id and commit if it is from the Hub."""
    path = Path(model.path).expanduser()
    if os.path.exists(path):
        return path, {}
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.suffix in PICKLES:
        raise SourceError(f"There is no model at '{model.path}'.")
    folder = download(model, **hub)
    return folder, {"public_id": model.path, "revision": folder.name}
