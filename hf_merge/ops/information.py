"""Averages weighted by how much the data says of each entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_merge.types import Stack


def fisher_norms(tiles: Iterable[Stack], *, normalize: bool) -> list[float] | None:
    """Return the Euclidean norm of every model's Fisher information over the tiles, or None where none is needed."""
    if not normalize:
        return None
    squares: list[float] = []
    for tile in tiles:
        found = [float(one.double().square().sum()) for one in tile.measured["fisher"]]
        squares = [a + b for a, b in zip(squares, found, strict=True)] if squares else found
    return [square**0.5 for square in squares]


def weighted_by(importance: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Average entry by entry with weights that are 0 or more; the plain mean where all of them are 0."""
    stacked = torch.stack(list(importance))
    top = stacked.amax(0)
    stacked = torch.where(top > 0, stacked, 1.0) / torch.where(top > 0, top, 1.0)
    return (stacked / stacked.sum(0) * torch.stack(list(tensors))).sum(0)
