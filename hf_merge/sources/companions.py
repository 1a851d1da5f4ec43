"""A model with another config, and with other files beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_merge.sources.base import Source


class WithCompanions(Source):
    """A view of a model that gives another config.json, and changes the files that are written beside the weights.

    Args:
        source: the model; its tensors are seen as they are.
        config: the content of config.json.
        change: called with the folder once the model's own files are in it.
    """

    def __init__(self, source: Source, config: Mapping[str, Any], change: Callable[[Path], None]):
        self.label, self.specs, self.config = source.label, source.specs, config
        self.public_id, self.revision, self.path = source.public_id, source.revision, source.path
        self.gathered = source.gathered
        self._source, self._change = source, change

    def __getitem__(self, name: str) -> Tensor:
        return self._source[name]

    def fingerprint(self) -> str | None:
        return self._source.fingerprint()

    def write_companions(self, folder: Path) -> None:
        self._source.write_companions(folder)
        self._change(folder)
