"""What every source of weights is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_merge.types import TensorSpec


class Source(Mapping[str, Tensor]):
    """A model's tensors by name; values are read when asked for, shapes and dtypes are known before.

    Attributes:
        label: how messages call it.
        specs: shape and dtype of every tensor, in the order of the files.
        config: the model's config.json, or nothing.
        public_id: `org/name` on the Hub, or None for what exists on this machine only.
        revision: the commit that was read, for a model on the Hub.
        path: the folder or file it is read from, if there is one.
        gathered: names of tensors that are made in memory when they are read, instead of being mapped.
    """

    label: str
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = {}
    public_id: str | None = None
    revision: str | None = None
    path: Path | None = None
    gathered: frozenset[str] = frozenset()

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; a mapped one where that is possible, so that nothing is read but what is used."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def fingerprint(self) -> str | None:
        """Identify the contents across processes without reading them; None if that cannot be done."""
        return None

    def write_companions(self, folder: Path) -> None:
        """Write all that belongs to the model but weights, card and config.json: tokenizer, processor, code."""
