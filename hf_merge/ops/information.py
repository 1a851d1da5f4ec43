"""Averages weighted by how much the data says of each entry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from hf_merge.ops.combine import weighted_sum
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
    """Average entry by entry with weights that are 0 or more; the plain mean where all of them are 0.

    No entry leaves the range of those that it is made of: where all are equal, it is that value exactly.
    """
    top = reduce(torch.maximum, importance)
    known, top = top > 0, torch.where(top > 0, top, 1.0)
    shares = [torch.where(known, one, 1.0).div_(top) for one in importance]  # of order 1: their sum does not vanish
    divisor = weighted_sum(shares, [1.0] * len(shares))
    total = torch.zeros_like(top)
    for share, tensor in zip(shares, tensors, strict=True):
        total.add_(share.div_(divisor).mul_(tensor))
    return total.clamp_(min=reduce(torch.minimum, tensors), max=reduce(torch.maximum, tensors))
