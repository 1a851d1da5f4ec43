"""What adapters do to one tensor of a base, a few rows at a time: each is a list of steps.

A tensor is looked at as [experts, rows, columns]; a matrix has one expert, a vector one column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.lora import Factored
from hf_merge.sources.places import Box, Place

_PIECE = 1 << 18  # elements that are computed at a time

Rows = Callable[[Tensor, int, int], Tensor]
"""Takes some rows of one expert, which expert it is and the first row's number; gives the rows as they become."""


class Step(Protocol):
    """A part of what an adapter does to a tensor."""

    @property
    def source(self) -> Source: ...

    @property
    def keys(self) -> tuple[str, ...]: ...

    def open(self, weight: Tensor, before: Rows) -> Rows:
        """Read what is needed.

        Args:
            weight: the whole tensor of the base.
            before: what the steps before this one make of rows.
        """
        ...


@dataclass(frozen=True, eq=False)
class Put:
    """Puts a tensor of the adapter in the place of the base's: `modules_to_save`, trained biases."""

    source: Source
    key: str
    place: Place

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def open(self, weight: Tensor, before: Rows) -> Rows:
        return partial(_put, cube(finite(self.source, self.key), self.place)[self.place.inside], self.place)


@dataclass(frozen=True, eq=False)
class Add:
    """Adds scale * left @ right."""

    source: Source
    one: Factored
    place: Place
    turned: bool
    experts: int
    stacked: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.one.left, self.one.right)

    def open(self, weight: Tensor, before: Rows) -> Rows:
        left, right = finite(self.source, self.one.left).float(), finite(self.source, self.one.right).float()
        left = left.flatten(1).reshape(left.shape[0], -1, self.experts).permute(2, 0, 1)  # [E, out, r]
        right = right.flatten(1).reshape(self.experts, left.shape[2], -1)  # [E, r, in]
        if self.turned:
            left, right = right.mT, left.mT
        experts, rows, columns = self.place.inside
        left, right = left[experts, rows], right[experts, :, columns]
        if self.place.swapped:
            left, right = right.mT, left.mT
        return partial(_add, left, right, self.one.scale, self.place.at)


@dataclass(frozen=True, eq=False)
class AddVector:
    """Adds scale * a vector: `lora_bias`."""

    source: Source
    key: str
    scale: float

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def open(self, weight: Tensor, before: Rows) -> Rows:
        vector = finite(self.source, self.key).float()[:, None]
        return lambda rows, _, start: rows + self.scale * vector[start : start + len(rows)]


@dataclass(frozen=True, eq=False)
class Rescale:
    """Gives every row (or column, where the weight is stored as [in, out]) the norm that DoRA learned."""

    source: Source
    key: str
    place: Place
    turned: bool

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def open(self, weight: Tensor, before: Rows) -> Rows:
        learned = finite(self.source, self.key).float().flatten()
        if not self.turned:
            learned = learned[self.place.inside[1]]
            return lambda rows, _, start: (
                rows * (learned[start : start + len(rows)] / torch.linalg.norm(rows, dim=1))[:, None]
            )
        squares = torch.zeros(weight.shape[2], dtype=torch.float32)
        for start, rows in pieces(weight[0]):
            squares += before(rows, 0, start).square().sum(0)
        factor = learned / squares.sqrt()
        return lambda rows, _, start: rows * factor


@dataclass(frozen=True, eq=False)
class PutRows:
    """Puts rows of the adapter in the place of some tokens' rows."""

    source: Source
    key: str
    tokens: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    def open(self, weight: Tensor, before: Rows) -> Rows:
        return partial(_put_rows, finite(self.source, self.key).float(), self.tokens)


@dataclass(frozen=True, eq=False)
class Give:
    """Takes what PEFT makes of the tensor.

    Attributes:
        reads: tensors of the base that it is made of.
        tied: whether what is tied to the tensor follows it.
    """

    source: Source
    read: Callable[[], Tensor]
    reads: tuple[str, ...]
    keys: tuple[str, ...]
    tied: bool = False

    def open(self, weight: Tensor, before: Rows) -> Rows:
        made = self.read().float().reshape(weight.shape)
        return lambda rows, expert, start: made[expert, start : start + len(rows)]


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter does to a tensor.

    Attributes:
        steps: one after the other.
        weight: how much of the change is added to the base.
    """

    steps: tuple[Step, ...]
    weight: float = 1.0

    def open(self, weight: Tensor) -> Rows:
        made: Rows = _as_it_is
        for step in self.steps:
            made = partial(_after, step.open(weight, made), made)
        return made


def changed(weight: Tensor, changes: Sequence[Change], *, stacked: bool) -> Tensor:
    """Return a tensor with the changes of all adapters, each of them made to the base, summed and rounded once.

    Args:
        weight: of the base.
        changes: of the adapters. Of one with the weight 1 the result is what that adapter makes.
        stacked: whether the first dimension counts experts.
    """
    values = as_cube(weight, stacked=stacked)
    made = torch.empty(weight.shape, dtype=weight.dtype)
    out = as_cube(made, stacked=stacked)
    ways = [(change.open(values), change.weight) for change in changes]
    for expert, matrix in enumerate(values):
        for start, rows in pieces(matrix):
            out[expert, start : start + len(rows)] = _sum(rows, expert, start, ways)
    return made


def _sum(rows: Tensor, expert: int, start: int, ways: Sequence[tuple[Rows, float]]) -> Tensor:
    if len(ways) == 1 and ways[0][1] == 1:
        return ways[0][0](rows, expert, start)
    return rows + sum(share * (way(rows, expert, start) - rows) for way, share in ways)


def pieces(matrix: Tensor) -> list[tuple[int, Tensor]]:
    """Cut a matrix into runs of rows, in float32 or wider; the values are read when a run is."""
    return _Pieces(matrix)  # type: ignore[return-value]


class _Pieces:
    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def __iter__(self):
        height = max(1, _PIECE // max(self.matrix.shape[1], 1))
        wide = torch.promote_types(self.matrix.dtype, torch.float32)
        for start in range(0, len(self.matrix), height):
            yield start, self.matrix[start : start + height].to(wide)


def as_cube(tensor: Tensor, *, stacked: bool) -> Tensor:
    """Look at a tensor as [experts, rows, columns]."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1, 1)
    return tensor if stacked and tensor.ndim == 3 else tensor.flatten(1)[None]


def cube(tensor: Tensor, place: Place) -> Tensor:
    """Look at a parameter as its place does."""
    return as_cube(tensor, stacked=place.shape is not None and len(place.shape) == 3 and place.inside[0] != slice(None))


def finite(source: Source, key: str) -> Tensor:
    """Read a tensor of an adapter.

    Raises:
        SourceError: it holds NaN or Inf.
    """
    tensor = source[key]
    if not torch.isfinite(tensor).all():
        raise SourceError(f"'{key}' of the adapter '{source.label}' holds NaN or Inf: take it from another checkpoint.")
    return tensor


def _as_it_is(rows: Tensor, expert: int, start: int) -> Tensor:
    return rows


def _after(step: Rows, before: Rows, rows: Tensor, expert: int, start: int) -> Tensor:
    return step(before(rows, expert, start), expert, start)


def _add(left: Tensor, right: Tensor, scale: float, at: Box, rows: Tensor, expert: int, start: int) -> Tensor:
    """Add the part of a product that lies in these rows."""
    first, last = at[0].start or 0, at[0].stop
    if expert < first or (last is not None and expert >= last):
        return rows
    top = at[1].start or 0
    begin, end = max(start, top), min(start + len(rows), top + left.shape[1])
    if begin >= end:
        return rows
    one = expert - first
    if end - begin == len(rows) and right.shape[2] == rows.shape[1]:
        return torch.add(rows, left[one, begin - top : end - top] @ right[one], alpha=scale)
    rows = rows.clone()
    rows[begin - start : end - start, at[2]] += scale * (left[one, begin - top : end - top] @ right[one])
    return rows


def _put(values: Tensor, place: Place, rows: Tensor, expert: int, start: int) -> Tensor:
    whole = values.mT if place.swapped else values
    return whole[expert, start : start + len(rows)].to(rows.dtype)


def _put_rows(values: Tensor, tokens: Sequence[int], rows: Tensor, expert: int, start: int) -> Tensor:
    inside = [(i, token - start) for i, token in enumerate(tokens) if start <= token < start + len(rows)]
    if not inside:
        return rows
    rows = rows.clone()
    rows[[place for _, place in inside]] = values[[i for i, _ in inside]].to(rows.dtype)
    return rows
