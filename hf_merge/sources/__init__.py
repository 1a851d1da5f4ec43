"""Where tensors come from: mappings of names to tensors that are read when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import PICKLES, Checkpoint
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.module import ModuleSource
from hf_merge.types import InMemory, ModelRef

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
    """Open one model; headers are read, values are not."""
    if isinstance(model, ModelRef):
        return _open_reference(model, **hub)
    if isinstance(model.value, nn.Module):
        return ModuleSource(model.value, model.label)
    if isinstance(model.value, Mapping):
        return MappingSource(model.value, model.label)
    raise SourceError(
        f"{model.label} is a {type(model.value).__name__}; "
        "a model is a Hub id, a folder, a module or a mapping of tensors."
    )


def _open_reference(model: ModelRef, **hub: Any) -> Source:
    path = Path(model.path).expanduser()
    if path.exists():
        return Checkpoint(path, str(model))
    if path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") > 1 or path.suffix in PICKLES:
        raise SourceError(f"There is no model at '{model.path}'.")
    folder = download(model, **hub)
    return Checkpoint(folder, str(model), public_id=model.path, revision=folder.name)


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

    skipped = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "original/*"]
    try:
        if only is not None:
            return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=list(only), **hub))
        folder = Path(
            snapshot_download(model.path, revision=model.revision, ignore_patterns=[*skipped, *PICKLES], **hub)
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model.path, revision=model.revision, ignore_patterns=skipped, **hub))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(
            f"There is no folder '{model.path}', and the Hub did not give a model of that name "
            f"({type(error).__name__}: {reason}). Check the name, the token and the network."
        ) from error
    return folder
