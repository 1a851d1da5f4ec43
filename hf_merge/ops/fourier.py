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
    rows = 2 * torch.fft.fftfreq(matrix.shape[0], dtype=torch.float64)
    columns = 2 * torch.fft.rfftfreq(matrix.shape[1], dtype=torch.float64)
    return _filtered(matrix, (rows[:, None].square() + columns.square()).sqrt_() >= cut)


def released_filter(matrix: Tensor, ratio: float) -> Tensor:
    """Filter as FR-Merging's code does: by the distance of indices from the middle of a spectrum that is not shifted.

    What lies within `ratio` times the shorter side of the middle is kept, and doubled at a distance of exactly a tenth
    of that side. In an unshifted spectrum the middle is the highest frequency, so that low ones are removed; in a
    matrix that is not square, these are all that lie far from the middle along the longer side.
    """
    side = min(matrix.shape)
    inner, outer = side // 10, torch.tensor(side * ratio, dtype=torch.float32)
    places = torch.arange(matrix.shape[0])[:, None], torch.arange(matrix.shape[1] // 2 + 1)

    def gain(*at: Tensor) -> Tensor:
        squares = [(i.float() - n // 2).square() for i, n in zip(at, matrix.shape, strict=True)]
        distance = (squares[0] + squares[1]).sqrt_()
        return (distance <= inner).float() + ((distance >= inner) & (distance <= outer))

    mirrored = (-i % n for i, n in zip(places, matrix.shape, strict=True))  # the negative frequencies
    return _filtered(matrix, (gain(*places) + gain(*mirrored)) / 2)


def _filtered(matrix: Tensor, gain: Tensor) -> Tensor:
    """Multiply the spectrum of a real matrix by a real gain, given as `rfft2` has the frequencies.

    A gain that differs between a frequency and its negative is that of the real part of the result; it is given as the
    mean of the two.
    """
    spectrum = torch.fft.rfft2(matrix)
    torch.view_as_real(spectrum).mul_(gain.to(matrix)[..., None])
    return torch.fft.irfft2(spectrum, s=matrix.shape)


def in_blocks(matrix: Tensor, count: int, by: Callable[[Tensor], Tensor]) -> Tensor:
    """Filter so many equal blocks of rows apart, such as a fused q, k and v; all as one if they are not equal."""
    return torch.cat([by(block) for block in matrix.chunk(count)]) if matrix.shape[0] % count == 0 else by(matrix)
