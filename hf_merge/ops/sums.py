"""Sums that come out the same whatever the order, the tiles, the threads and the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_merge.ops import loops

_BLOCK = 1 << 14


class Magnitudes:
    """The sum of all magnitudes of a tensor that comes in tiles, in float64: the same however it is cut.

    Within a block of 16,384 entries, counted from the first, float32s are rounded to a grid of 2^-38 of the power of
    two above the largest, after which every sum of them is exact in float64 (Rump, Ogita and Oishi,
    https://doi.org/10.1137/050645671): together they are wrong by less than 2^-24 of the sum, and their order does not
    matter. Float64s of a block are added as torch does. The blocks are added up exactly.
    """

    def __init__(self) -> None:
        self._sums: list[float] = []
        self._rest: Tensor | None = None  # of a tile that ended within a block

    def add(self, tile: Tensor) -> None:
        """Go on with the next tile."""
        if tile.is_meta:
            return
        flat = tile.reshape(-1)
        if self._rest is not None:
            room = _BLOCK - len(self._rest)
            self._rest, flat = torch.cat([self._rest, flat[:room]]), flat[room:]
            if len(self._rest) < _BLOCK:
                return
            self._sums += magnitude_sums(self._rest)
        whole = flat.numel() // _BLOCK * _BLOCK
        self._sums += magnitude_sums(flat[:whole])
        self._rest = flat[whole:].clone() if whole < flat.numel() else None

    def total(self) -> float:
        """Return the sum."""
        return math.fsum([*self._sums, *(() if self._rest is None else magnitude_sums(self._rest))])


def magnitude_sum(tensor: Tensor) -> float:
    """Return the sum of all magnitudes, in float64; see `Magnitudes`."""
    sums = Magnitudes()
    sums.add(tensor)
    return sums.total()


def magnitude_sums(flat: Tensor) -> list[float]:
    """Return the sum of the magnitudes of each block of a vector, the last of which may be short; see `Magnitudes`."""
    if not flat.numel():
        return []
    if loops.take(flat):
        return loops.magnitude_sums(flat, _BLOCK)
    whole = flat.numel() // _BLOCK * _BLOCK
    sums = _sums_of_rows(flat[:whole].view(-1, _BLOCK)) if whole else []
    return sums + (_sums_of_rows(flat[whole:].view(1, -1)) if whole < flat.numel() else [])


def _sums_of_rows(rows: Tensor) -> list[float]:
    if rows.dtype == torch.float64:
        return rows.abs().sum(1).tolist()
    magnitudes = rows.to(torch.float32).abs()
    exponents = (magnitudes.amax(1).view(torch.int32) >> 23) - 126  # a power of two above the largest
    shift = torch.ldexp(torch.full_like(exponents, 3, dtype=torch.float64), exponents + 13)[:, None]
    return magnitudes.to(torch.float64).add_(shift).sub_(shift).sum(1).tolist()
