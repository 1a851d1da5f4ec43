"""A model with another config, and with other files beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_merge.sources.base import Source
from hf_merge.sources.view import View


class WithCompanions(View):
    """A view of a model that gives another config.json, and changes the files that are written beside the weights.

    Args:
        source: the model; its tensors are seen as they are.
        config: the content of config.json.
        change: called with the folder once the model's own files are in it.
    """

    def __init__(self, source: Source, config: Mapping[str, Any], change: Callable[[Path], None]):
        super().__init__(source, {})
        self.config, self._change = config, change

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.source.write_companions(folder, wanted)
        self._change(folder)
