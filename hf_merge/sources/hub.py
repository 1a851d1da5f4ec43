"""Models of the Hub, fetched into its cache; what the Hub refuses is told in one sentence with its fix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx2

from hf_merge.answers import PASS_A_TOKEN as _PASS_A_TOKEN
from hf_merge.answers import endpoint as _endpoint
from hf_merge.answers import is_unreachable
from hf_merge.answers import reason as _reason
from hf_merge.errors import SourceError
from hf_merge.sources.checkpoint import PICKLES, module_folders
from hf_merge.types import ModelRef

_OTHER_FORMATS = ["*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "onnx/*", "openvino/*", "original/*"]


def download(model: ModelRef, *, only: Sequence[str] | None = None, **hub: Any) -> Path:
    """Fetch a model of the Hub into its cache: everything but weights in other formats.

    Args:
        model: which one.
        only: patterns of the files that are wanted; nothing else is fetched then.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: no such model or revision, no access, or no network.
    """
    try:
        return _fetched(model, only, **hub)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise SourceError(_refusal(model, error, **hub)) from error


def _fetched(model: ModelRef, only: Sequence[str] | None, **hub: Any) -> Path:
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, model.path, revision=model.revision, **hub)
    if only is not None:
        return Path(fetch(allow_patterns=list(only)))
    folder = Path(fetch(ignore_patterns=[*_OTHER_FORMATS, *(f"*{suffix}" for suffix in PICKLES)]))
    modules = module_folders(folder)
    without = [name for name in modules if not any((folder / name).glob("*.safetensors"))]
    if not any(folder.glob("*.safetensors")) and without == modules:
        return Path(fetch(ignore_patterns=_OTHER_FORMATS))
    if without:  # a Dense layer may be a pickle beside safetensors
        return Path(fetch(ignore_patterns=_OTHER_FORMATS, allow_patterns=[f"{name}/*" for name in without]))
    return folder


def _refusal(model: ModelRef, error: Exception, **hub: Any) -> str:
    """Return what went wrong and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cause = error
    if isinstance(error, LocalEntryNotFoundError):  # nothing in the cache, and this is why the Hub gave nothing
        cause = error.__cause__ or error
        if hub.get("local_files_only") or isinstance(cause, OfflineModeIsEnabled):
            return _not_cached(model, "HF_HUB_OFFLINE" if cause is not error else "local_files_only")
    if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
        return _answered(model, cause)
    if is_unreachable(cause):
        return (
            f"The Hub at {_endpoint()} cannot be reached for '{model.path}' ({_reason(cause)}): "
            "check the network and HF_ENDPOINT, and run it again."
        )
    if isinstance(cause, HFValidationError):
        return f"There is no folder '{model.path}', and it cannot be the id of a model on the Hub: check the path."
    if isinstance(cause, OSError) and cause.errno is not None:
        return (
            f"'{model.path}' cannot be kept in the cache ({cause.strerror or _reason(cause)}): "
            "make room there, or name another folder with cache_dir (--cache-dir)."
        )
    return f"The download of '{model.path}' broke off ({_reason(cause)}): run it again; whole files are kept."


def _answered(model: ModelRef, error: Any) -> str:
    """Say what the Hub's answer means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{_endpoint()}/{model.path}", error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"'{model.path}' is gated: accept its conditions at {page}, "
            f"and pass a token of the account that did {_PASS_A_TOKEN}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no folder '{model.path}', and on the Hub no such model that you may see: "
            f"check the name, or if it is private pass a token that may read it {_PASS_A_TOKEN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"'{model.path}' has no revision '{model.revision}' on the Hub: "
            f"name a branch, a tag or a commit that {page}/commits lists."
        )
    if status == 401:
        return f"The Hub does not accept the token that was sent for '{model.path}': pass a valid one {_PASS_A_TOKEN}."
    if status == 403:
        return f"The token that was sent may not read '{model.path}': pass one that may {_PASS_A_TOKEN}."
    return (
        f"The Hub did not give '{model.path}' ({status} {error.response.reason_phrase}): "
        "run it again later; whole files are kept."
    )


def _not_cached(model: ModelRef, because: str) -> str:
    """Say that the cache lacks a model, and how to fetch it."""
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"There is no folder '{model.path}', and no whole model of that name in the cache, "
        f"and {because} forbids to ask the Hub: run `hf download {model.path}{revision}` or allow it."
    )
