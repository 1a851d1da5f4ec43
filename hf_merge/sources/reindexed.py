"""A model whose embeddings and heads have the rows of another vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.sources.base import Source
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

_CHUNK = 1 << 14
"""Rows that are averaged at a time."""


@dataclass(frozen=True)
class Borrowed:
    """Rows that come from another model.

    Attributes:
        source: the model.
        name: of its tensor.
        to: rows of the result.
        rows: rows of the model's tensor, as many.
    """

    source: Source
    name: str
    to: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Rows:
    """Where every row of a tensor comes from; those that nothing is said of are zero.

    Attributes:
        own: for every row of the result the model's own row, or -1.
        borrowed: rows of other models.
        shared: rows that are the mean of what several models have, one entry for each of these models.
        padding: rows of the result that are the mean of the rows `real`.
        real: the model's own rows that are those of tokens.
    """

    own: Tensor
    borrowed: tuple[Borrowed, ...] = ()
    shared: tuple[Borrowed, ...] = ()
    padding: Tensor | None = None
    real: Tensor | None = None

    def is_identity(self, count: int) -> bool:
        """Tell whether a tensor of `count` rows stays as it is."""
        return len(self.own) == count and bool(torch.equal(self.own, torch.arange(count)))

    def digest(self) -> str:
        """Identify what will be gathered."""
        parts = [
            self.own,
            *(t for b in (*self.borrowed, *self.shared) for t in (b.to, b.rows)),
            self.padding,
            self.real,
        ]
        content = hashlib.sha256(repr([b.source.label for b in (*self.borrowed, *self.shared)]).encode())
        for part in parts:
            content.update(b"-" if part is None else part.contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()


class Reindexed(View):
    """A view of a model in which some tensors have other rows.

    Rows are gathered when a tensor is asked for, by index_select; one tensor is in memory at a time, and one that
    stays as it is remains mapped.

    Args:
        source: the model.
        rows: for names of its tensors, where their rows come from.
    """

    def __init__(self, source: Source, rows: Mapping[str, Rows]):
        self._rows = {name: r for name, r in rows.items() if not r.is_identity(source.specs[name].shape[0])}
        super().__init__(source, {name: self._made_of(source, name, found) for name, found in self._rows.items()})

    def _made_of(self, source: Source, name: str, rows: Rows) -> Made:
        spec = TensorSpec((len(rows.own), *source.specs[name].shape[1:]), source.specs[name].dtype)
        row = spec.nbytes // max(len(rows.own), 1)
        elsewhere = sum(len(part.rows) * row for part in (*rows.borrowed, *rows.shared))
        borrowed = tuple((part.source, part.name) for part in (*rows.borrowed, *rows.shared))
        return Made(spec, lambda: gather(source[name], rows), (name,), elsewhere, borrowed)

    def fingerprint(self) -> str | None:
        """That of the model, and which rows are gathered."""
        inner = self.source.fingerprint()
        return inner and f"{inner} {[(name, rows.digest()) for name, rows in sorted(self._rows.items())]}"


def gather(tensor: Tensor, rows: Rows) -> Tensor:
    """Return the rows of a tensor, and of other models' tensors, in their new order."""
    lacking = (rows.own < 0).nonzero().flatten()
    merged = tensor.index_select(0, rows.own.clamp(min=0))
    if len(lacking):
        merged.index_fill_(0, lacking, 0)
    for part in rows.borrowed:
        merged.index_copy_(0, part.to, part.source[part.name].index_select(0, part.rows).to(tensor))
    if rows.shared:
        _fill_means(merged, rows.shared)
    if rows.padding is not None and rows.real is not None and len(rows.padding):
        merged[rows.padding] = _mean_row(tensor, rows.real)
    return merged


def _fill_means(merged: Tensor, shared: tuple[Borrowed, ...]) -> None:
    """Put the mean of what several models have into rows, some thousand rows at a time."""
    dtype = torch.float64 if merged.dtype == torch.float64 else torch.float32
    everywhere = torch.cat([part.to for part in shared]).unique()
    for chosen in everywhere.split(_CHUNK):
        total = torch.zeros(len(chosen), *merged.shape[1:], dtype=dtype)
        count = torch.zeros(len(chosen), *[1] * (merged.dim() - 1), dtype=dtype)
        for part in shared:
            here = torch.isin(part.to, chosen)
            at = torch.searchsorted(chosen, part.to[here])
            total.index_add_(0, at, part.source[part.name].index_select(0, part.rows[here]).to("cpu", dtype))
            count.index_add_(0, at, torch.ones(len(at), *count.shape[1:], dtype=dtype))
        merged[chosen] = (total / count).to(merged)


def _mean_row(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of some rows, in double precision, some thousand rows at a time."""
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for chosen in rows.split(_CHUNK):
        total += tensor.index_select(0, chosen).to("cpu", torch.float64).sum(0)
    return (total / max(len(rows), 1)).to(tensor)
