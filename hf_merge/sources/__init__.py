"""Where tensors come from: mappings of names to tensors that are read when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from hf_merge.errors import SourceError
from hf_merge.sources.adapter import WithAdapter, open_adapter
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import PICKLES, Checkpoint, module_folders
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.module import ModuleSource
from hf_merge.sources.quantized import dequantized
from hf_merge.types import InMemory, ModelRef

_OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "original/*"]

__all__ = ["Source", "open_source", "open_sources"]


def open_sources(models: Iterable[ModelRef | InMemory], **hub: Any) -> dict[ModelRef | InMemory, Source]:
    """Open every model of a recipe.

    Args:
        models: what to open.
        **hub: token, cache_dir, local_files_only, for models on the Hub.

    Raises:
        SourceError: a model cannot be read.
    """
    return {model: open_source(model, **hub) for model in models}


def open_source(model: ModelRef | InMemory, **hub: Any) -> Source:
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


def download(model: ModelRef, *, only: Sequence[str] | None = None, **hub: Any) -> Path:
    """Fetch a model of the Hub into its cache: everything but weights in other formats.

    Args:
        model: which one.
        only: patterns of the files that are wanted; nothing else is fetched then.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: no such model or revision, no access, or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    fetch = partial(snapshot_download, model.path, revision=model.revision, **hub)
    try:
        if only is not None:
            return Path(fetch(allow_patterns=list(only)))
        folder = Path(fetch(ignore_patterns=[*_OTHER_FORMATS, *(f"*{suffix}" for suffix in PICKLES)]))
        modules = module_folders(folder)
        without = [name for name in modules if not any((folder / name).glob("*.safetensors"))]
        if not any(folder.glob("*.safetensors")) and without == modules:
            folder = Path(fetch(ignore_patterns=_OTHER_FORMATS))
        elif without:  # a Dense layer may be a pickle beside safetensors
            folder = Path(fetch(ignore_patterns=_OTHER_FORMATS, allow_patterns=[f"{name}/*" for name in without]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"There is no folder '{model.path}', and the Hub did not give a model of that name "
            f"({type(error).__name__}: {reason}). Check the name, the token and the network."
        ) from error
    return folder
