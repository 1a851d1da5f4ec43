"""Singular values and vectors of task vectors, matrix by matrix.

One policy holds for all spectral methods. A tensor of two dims is a matrix, embeddings among them. A convolution is
averaged like everything else, as in the authors' code, or with `conv: flatten` taken as the matrix [out, in*kh*kw]. What
is no matrix (biases, norms, tokens) is averaged. All of it is computed in float64; directions whose singular value is
below `NOISE` times the largest are rounding errors of float32 and have no part, so that no result depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hf_merge.ops.combine import exact_sum

Conv = Literal["average", "flatten"]
"""What a spectral method does with kernels of convolutions."""

NOISE = 1e-7


class Svd(NamedTuple):
    """Left vectors as columns, singular values (falling), right vectors as rows; zeros where there is but noise."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def part(self, first: int, last: int) -> Svd:
        """Return a run of its components."""
        return Svd(self.u[:, first:last], self.s[first:last], self.vh[first:last])

    @property
    def matrix(self) -> Tensor:
        return (self.u * self.s) @ self.vh


def per_matrix(
    tensors: Sequence[Tensor],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    conv: Conv = "average",
    others: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Merge matrices in float64 by `merge`, and tensors that are none by `others`: their average if not given."""
    first = tensors[0]
    is_matrix = first.dim() == 2 or (first.dim() > 2 and first.dim() != 3 and conv == "flatten")
    if not is_matrix or not first.numel():
        return others(tensors) if others else average(tensors)
    merged = merge([tensor.to(torch.float64).flatten(1) for tensor in tensors])
    return merged.reshape(first.shape).to(first.dtype)


def average(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean."""
    return exact_sum(tensors, [1 / len(tensors)] * len(tensors))


def total(matrices: Sequence[Tensor]) -> Tensor:
    """Return the sum of matrices."""
    return torch.stack([*matrices]).sum(0)


def svd(matrix: Tensor) -> Svd:
    """Decompose a matrix, without the directions that are noise."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = (s > NOISE * s[:1]).to(s.dtype)
    return Svd(u * real, s * real, vh * real[:, None])


def polar(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns (or rows), on the span of the matrix: U V' of its SVD."""
    u, _, vh = svd(matrix)
    return u @ vh


def joined(parts: Sequence[Svd]) -> Svd:
    """Put the components of several decompositions side by side."""
    return Svd(torch.cat([p.u for p in parts], 1), torch.cat([p.s for p in parts]), torch.cat([p.vh for p in parts]))


def orthogonalised(parts: Svd) -> Svd:
    """Make components of several tasks orthogonal to one another, moving each as little as possible (Procrustes)."""
    return Svd(polar(parts.u), parts.s, polar(parts.vh))


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of that rank."""
    return svd(matrix).part(0, rank).matrix


def isotropic(parts: Svd) -> Tensor:
    """Give all components the mean singular value."""
    return parts.u @ parts.vh * parts.s.mean()


def truncated_and_rescaled(matrix: Tensor, kept: float) -> Tensor:
    """Keep the fewest components that hold a share of the nuclear norm, and scale them up to all of it."""
    parts = svd(matrix)
    before = parts.s.cumsum(0) - parts.s  # of the nuclear norm, without the component itself
    norm = parts.s.sum()
    held = parts.s * (before < kept * norm)
    factor = torch.where(norm > 0, norm / held.sum().clamp(min=torch.finfo(held.dtype).tiny), 0)
    return Svd(parts.u, held * factor, parts.vh).matrix
