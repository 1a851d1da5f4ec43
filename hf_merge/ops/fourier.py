"""Filters in the frequency domain, for matrices taken as images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def radial_high_pass(matrix: Tensor, cut: float) -> Tensor:
    """Remove the frequencies nearer to 0 than `cut`.

    Args:
        matrix: rows and columns are the two directions.
        cut: radius of the removed disc, where 1 is the Nyquist frequency of either direction.
    """
    rows, columns = (2 * torch.fft.fftfreq(n, dtype=torch.float64) for n in matrix.shape)
    return _filtered(matrix, (rows[:, None].square() + columns.square()).sqrt() >= cut)


def released_filter(matrix: Tensor, ratio: float) -> Tensor:
    """Filter as FR-Merging's code does: by the distance of indices from the middle of a spectrum that is not shifted.

    What lies within `ratio` times the shorter side of the middle is kept, and doubled at a distance of exactly a tenth
    of that side. In an unshifted spectrum the middle is the highest frequency, so that low ones are removed; in a
    matrix that is not square, these are all that lie far from the middle along the longer side.
    """
    side = min(matrix.shape)
    rows, columns = (torch.arange(n, dtype=torch.float32) - n // 2 for n in matrix.shape)
    distance, inner = (rows[:, None].square() + columns.square()).sqrt(), side // 10
    outer = torch.tensor(side * ratio, dtype=torch.float32)
    return _filtered(matrix, (distance <= inner).float() + ((distance >= inner) & (distance <= outer)))


def _filtered(matrix: Tensor, gain: Tensor) -> Tensor:
    """Multiply the spectrum of a real matrix by a real gain; return the real part of what has that spectrum."""
    mirrored = gain.flip(0, 1).roll((1, 1), (0, 1))  # what the gain is at the negative frequency
    half = ((gain.to(matrix.dtype) + mirrored) / 2)[:, : matrix.shape[1] // 2 + 1].to(matrix.device)
    return torch.fft.irfft2(torch.fft.rfft2(matrix) * half, s=matrix.shape)


def in_blocks(matrix: Tensor, count: int, by: Callable[[Tensor], Tensor]) -> Tensor:
    """Filter so many equal blocks of rows apart, such as a fused q, k and v; all as one if they are not equal."""
    return torch.cat([by(block) for block in matrix.chunk(count)]) if matrix.shape[0] % count == 0 else by(matrix)
