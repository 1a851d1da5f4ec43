"""What every view is: a source over another source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor

from hf_merge.sources.base import Source
from hf_merge.types import TensorSpec


@dataclass(frozen=True)
class Made:
    """A tensor that a view makes.

    Attributes:
        spec: its shape and dtype.
        read: how it is had.
        reads: the source's tensors that it is made of.
        elsewhere: bytes that are read beside those.
        borrowed: tensors of other sources that it is made of too.
        mapped: whether it lies in the source's memory, as one under another name does.
    """

    spec: TensorSpec
    read: Callable[[], Tensor]
    reads: tuple[str, ...] = ()
    elsewhere: int = 0
    borrowed: tuple[tuple[Source, str], ...] = ()
    mapped: bool = False


class View(Source):
    """Shows another source with some tensors made anew and some left out; everything else is the source's own.

    Args:
        source: what is shown.
        made: the tensors that the view makes, by name.
        hidden: names of the source's tensors that are not shown.
    """

    def __init__(self, source: Source, made: Mapping[str, Made], hidden: frozenset[str] = frozenset()):
        self.source = source
        self.label, self.parents = source.label, source.parents
        self.public_id, self.revision = source.public_id, source.revision
        self.folders, self.shared, self.remarks = source.folders, source.shared, source.remarks
        self.metadata = source.metadata
        self._made = made
        kept = {name: spec for name, spec in source.specs.items() if name not in hidden}
        self.specs = {**kept, **{name: tensor.spec for name, tensor in made.items()}}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name].read()
        if name not in self.specs:
            raise KeyError(name)
        return self.source[name]

    def pieces(self, name: str, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
        made = self._made.get(name)
        if made is None and name in self.specs:
            return self.source.pieces(name, runs)
        if made is not None and made.mapped and made.reads and not made.borrowed:  # the same values, renamed
            return self.source.pieces(made.reads[0], runs)
        return super().pieces(name, runs)

    def bytes_read(self, name: str) -> int:
        made = self._made.get(name)
        if made is None:
            return self.source.bytes_read(name)
        return made.elsewhere + sum(self.source.bytes_read(part) for part in made.reads)

    def bytes_held(self, name: str) -> int:
        made = self._made.get(name)
        if made is None:
            return self.source.bytes_held(name)
        return (0 if made.mapped else made.spec.nbytes) + sum(self.source.bytes_held(part) for part in made.reads)

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.source.parts

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        return self.source.config

    @cached_property
    def card_data(self) -> ModelCardData | None:  # type: ignore[override]
        return self.source.card_data

    def fingerprint(self) -> str | None:
        return self.source.fingerprint()

    def origins(self, name: str) -> Iterator[tuple[Source, str]]:
        made = self._made.get(name)
        for part in (name,) if made is None else made.reads:
            yield from self.source.origins(part)
        for source, part in () if made is None else made.borrowed:
            yield from source.origins(part)

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.source.write_companions(folder, wanted)
