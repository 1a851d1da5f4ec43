"""Task experts that are masks, with the vector that they choose from put beside them: as if each had its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.view import Made, View

EXPERT = "HF_MERGE"
"""The `peft_type` of task experts."""
SHARED = "shared"
"""The folder of that vector, beside those of the experts."""


def needs_shared(config: Mapping[str, Any]) -> list[str]:
    """Name the parameters of a task expert that are masks of a vector in another file."""
    return [
        name for name, entry in _entries(config).items()
        if isinstance(entry, Mapping) and entry.get("kind") == "mask" and "dtype" not in entry
    ]  # fmt: skip


def with_shared(
    adapter: Source, config: Mapping[str, Any], shared: Source, shared_config: Mapping[str, Any]
) -> tuple[Source, Mapping[str, Any]]:
    """Show a task expert with the shared vector as part of it, and a config that says so.

    Args:
        adapter: the expert's tensors.
        config: its adapter_config.json.
        shared: the shared vector's tensors.
        shared_config: its adapter_config.json.

    Raises:
        SourceError: it lacks a parameter of which the expert is a mask.
    """
    names, having = needs_shared(config), _entries(shared_config)
    lacking = [name for name in names if not _is_shared(having.get(name))]
    if lacking:
        raise SourceError(
            f"'{adapter.label}' is a mask of '{lacking[0]}', which '{shared.label}' does not have: "
            "they are parts of two merges. Name an expert that lies beside its own shared vector."
        )
    entries = {**_entries(config), **{n: {**config["parameters"][n], "dtype": having[n]["dtype"]} for n in names}}
    masks = {key.replace("hf_merge_mask_", "hf_merge_shared_") for key in adapter.specs if "hf_merge_mask_" in key}
    return _WithShared(adapter, shared, masks & shared.specs.keys()), {**config, "parameters": entries}


def refuse_masks(config: Mapping[str, Any], label: str) -> None:
    """Refuse a task expert that is a mask of what is not there.

    Raises:
        SourceError: it says which parameter, and where the vector should be.
    """
    if names := needs_shared(config):
        raise SourceError(
            f"'{label}' is a mask of a vector that all experts of its backbone share ('{names[0]}'), and that vector "
            f"is not there: it is the folder '{SHARED}' beside the expert's. Put it there, or merge the expert with "
            "PEFT (load both, merge_and_unload) and name the result."
        )


class _WithShared(View):
    def __init__(self, adapter: Source, shared: Source, keys: set[str]):
        made = {
            key: Made(
                shared.specs[key], partial(shared.__getitem__, key), elsewhere=shared.bytes_read(key),
                borrowed=((shared, key),), mapped=True,
            )
            for key in sorted(keys)
        }  # fmt: skip
        super().__init__(adapter, made)
        self._beside = shared

    def fingerprint(self) -> str | None:
        found = [self.source.fingerprint(), self._beside.fingerprint()]
        return None if None in found else json.dumps(found)


def _entries(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the config of a task expert says of its parameters; nothing for other adapters."""
    if config.get("peft_type") != EXPERT:
        return {}
    entries = config.get("parameters")
    if not isinstance(entries, Mapping):
        raise SourceError(f"The config of a task expert should have `parameters`; found {shown(entries)}.")
    return entries


def _is_shared(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("kind") == "shared" and isinstance(entry.get("dtype"), str)
