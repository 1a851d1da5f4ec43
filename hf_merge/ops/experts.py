"""What a task keeps of its own beside what all tasks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from hf_merge.forms import is_matrix, matrix_shape, rows_of
from hf_merge.ops.spectral import svd
from hf_merge.ops.sums import magnitude_sum
from hf_merge.types import Tiles

Budget = Literal["row", "tensor"]
"""Whether every row keeps a share of its entries, or a tensor a share of all."""


class Changes(Sequence[Tensor]):
    """Task vectors that are made when they are asked for, so that one at a time takes memory."""

    def __init__(self, models: Sequence[Tensor], base: Tensor):
        self._models, self._base = models, base

    def __len__(self) -> int:
        return len(self._models)

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Changes: ...
    def __getitem__(self, place: int | slice) -> Tensor | Changes:
        if isinstance(place, slice):
            return Changes(self._models[place], self._base)
        return self._models[place] - self._base


def elected(deltas: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the vector that all tasks share, and for each a mask (1 or 0) of the entries that have its sign.

    The sign of an entry is that of the sum, its magnitude the largest among the tasks of that sign.
    """
    sign = torch.where(sum(deltas[1:], deltas[0]) > 0, 1.0, -1.0).to(deltas[0].dtype)
    masks = [(delta * sign).gt(0).to(delta.dtype) for delta in deltas]
    largest = torch.zeros_like(sign)
    for delta, mask in zip(deltas, masks, strict=True):
        largest = torch.maximum(largest, delta.abs() * mask)
    return sign * largest, masks


def rescalers(tiles: Tiles, *, variant: str) -> list[float]:
    """Return for each model what its mask is multiplied by, so that the mean magnitude of its change is kept.

    A model that is the base has nothing to keep: 0.

    Args:
        tiles: models and base, of all tensors.
        variant: `paper`: sums over all entries; `reference`: sums of the mean of each tensor.
    """
    found: list[tuple[list[float], list[float]]] = []
    for tile in tiles:
        assert tile.base is not None
        deltas = [model - tile.base for model in tile]
        shared, masks = elected(deltas)
        unit = max(tile.whole, 1) if variant == "reference" else 1
        own = [magnitude_sum(delta) / unit for delta in deltas]
        kept = [magnitude_sum(shared * mask) / unit for mask in masks]
        found.append((own, kept))
    own, kept = ([math.fsum(parts) for parts in zip(*each, strict=True)] for each in zip(*found, strict=True))
    return [a / b if b else 0.0 for a, b in zip(own, kept, strict=True)]


def part_of_rank(shape: Sequence[int], fraction: float) -> int:
    """Return how many singular components are a fraction of all, rounded down."""
    return int(fraction * min(matrix_shape(shape)[-2:])) if is_matrix(shape) else 0


def factors(change: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the nearest change of that rank as two factors of one scale: U sqrt(S) and sqrt(S) V'.

    A stack of matrices gives a stack of factors.
    """
    stacked = change.to(torch.float64).reshape(matrix_shape(change.shape))
    parts = [svd(matrix).part(0, rank) for matrix in (stacked if stacked.dim() == 3 else stacked[None])]
    left = torch.stack([part.u * part.s.sqrt() for part in parts])
    right = torch.stack([part.s.sqrt()[:, None] * part.vh for part in parts])
    return {"left": left, "right": right} if stacked.dim() == 3 else {"left": left[0], "right": right[0]}


def kept_entries(shape: Sequence[int], density: float, budget: Budget) -> tuple[int, int]:
    """Return (rows, entries of each) that a task keeps of a tensor; a scalar is kept."""
    rows = rows_of(shape) if budget == "row" else 1
    columns = math.prod(shape) // rows if rows else 0
    return rows, 1 if not shape else int(columns * density)


def outstanding(change: Tensor, density: float, remove: float, budget: Budget) -> tuple[Tensor, Tensor]:
    """Find the entries of largest magnitude in each row, after leaving out a share of the very largest.

    Returns:
        Their places in the row, rising, and their values: (rows, kept) each.
    """
    rows, kept = kept_entries(change.shape, density, budget)
    seen = in_rows(change, rows)
    columns = seen.shape[1]
    removed = min(int(columns * remove), columns)
    kept = min(kept, columns - removed)
    places = seen.abs().topk(removed + kept, dim=1).indices[:, removed:].sort(dim=1).values
    return places, seen.gather(1, places)


def in_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return a tensor as a matrix of so many rows, also if it has no entries."""
    return tensor.reshape(rows, tensor.numel() // max(rows, 1))


class Balance(NamedTuple):
    """How much of a task goes into the backbone, and by what its own entries are multiplied."""

    share: float
    weight: float


def balance(
    tiles: Tiles,
    *,
    variant: str,
    by: Callable[[Tensor], Tensor],
    density: float,
    remove: float,
    budget: Budget,
) -> list[Balance]:
    """Balance backbone and entries of each task as FREE-Merging does.

        paper:     share_i = E(d_i) / sum_j E(d_j),  weight_i = -log10(density) E(e_i) / (share_i E(v_i))
        reference: share_i = 1,                      weight_i = -log10(density) (E(e_i) / density) / E(v_i)

    d_i is a task vector, v_i the filtered one, e_i its entries alone; E is the mean magnitude over the model, in the
    released code the mean over tensors of theirs. A task without a change has weight 0.

    Args:
        tiles: models and base, whole tensors.
        by: the filter.
        variant, density, remove, budget: of the method.
    """
    found: list[list[tuple[float, float, float]]] = []
    for tile in tiles:
        assert tile.base is not None
        unit = max(tile.whole, 1) if variant == "reference" else 1
        parts = ((d, by(d), outstanding(d, density, remove, budget)[1]) for d in Changes(tile, tile.base))
        found.append([(magnitude_sum(d) / unit, magnitude_sum(v) / unit, magnitude_sum(e) / unit) for d, v, e in parts])
    sums = [[math.fsum(parts) for parts in zip(*each, strict=True)] for each in zip(*found, strict=True)]
    total, factor = math.fsum(own for own, _, _ in sums), -math.log10(density) if density else 0.0
    if variant == "reference":
        return [Balance(1.0, factor * kept / density / through if through else 0.0) for _, through, kept in sums]
    shares = [own / total if total else 1 / len(sums) for own, _, _ in sums]
    return [
        Balance(share, factor * kept / (share * through) if share * through else 0.0)
        for share, (_, through, kept) in zip(shares, sums, strict=True)
    ]
