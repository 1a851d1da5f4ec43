"""What every view is: a source over another source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_merge.sources.base import Source
from hf_merge.types import TensorSpec


@dataclass(frozen=True)
class Made:
    """A tensor that a view makes: its spec, and how it is read."""

    spec: TensorSpec
    read: Callable[[], Tensor]


class View(Source):
    """Shows another source with some tensors made anew and some left out; everything else is the source's own.

    Args:
        source: what is shown.
        made: the tensors that the view makes, by name.
        hidden: names of the source's tensors that are not shown.
    """

    def __init__(self, source: Source, made: Mapping[str, Made], hidden: frozenset[str] = frozenset()):
        self.source = source
        self.label, self.public_id, self.revision = source.label, source.public_id, source.revision
        self._made = made
        kept = {name: spec for name, spec in source.specs.items() if name not in hidden}
        self.specs = {**kept, **{name: tensor.spec for name, tensor in made.items()}}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name].read()
        if name not in self.specs:
            raise KeyError(name)
        return self.source[name]

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.source.parts

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.source.config

    def fingerprint(self) -> str | None:
        return self.source.fingerprint()

    def write_companions(self, folder: Path) -> None:
        self.source.write_companions(folder)
