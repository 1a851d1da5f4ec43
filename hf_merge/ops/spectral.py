"""Singular values and vectors of task vectors, matrix by matrix.

One policy holds for all spectral methods. A tensor of two dims is a matrix, embeddings among them. What is none
(biases, norms, tokens) is averaged, and so are kernels of convolutions, as in the authors' code; with `conv: flatten`
they are taken as matrices [out, in*kh*kw]. All is computed in float64. Directions whose singular value is below `NOISE`
times the largest are rounding errors of float32 and have no part, so that no result depends on them.
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
    """Keep the fewest components, one at least, that hold a share of the nuclear norm; scale them up to all of it."""
    parts = svd(matrix)
    norm, before = parts.s.sum(), parts.s.cumsum(0) - parts.s  # before: what the components in front of each hold
    held = parts.s * (before < kept * norm)
    held[:1] = parts.s[:1]
    factor = norm / torch.where(norm > 0, held.sum(), 1)
    return Svd(parts.u, held * factor, parts.vh).matrix


def calibrated(merge: Tensor, tasks: Sequence[Tensor], alpha: float) -> Tensor:
    """Scale every singular value of a merge by how much the tasks' responses along its left vector were amplified.

    Args:
        merge: the merged matrix.
        tasks: the task vectors that it was merged from; what has no response along a vector counts as `alpha`.
        alpha: least amplification that counts.
    """
    parts = svd(merge)
    responses = parts.s[:, None] * parts.vh  # u_r' M, one row each
    amplified = torch.zeros_like(parts.s)
    for task in tasks:
        own = parts.u.T @ task
        energy = own.square().sum(1)
        found = (responses * own).sum(1) / torch.where(energy > 0, energy, 1)
        amplified += found.clamp(min=alpha)
    return Svd(parts.u, parts.s * (len(tasks) / amplified if tasks else 1), parts.vh).matrix


def _interference(tasks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return C = sum_i C_i and sum_i d_i C_i with C_i = d_i' d_i / |d_i|^2; tasks without a change have no part."""
    units = [task / torch.where(task.any(), torch.linalg.vector_norm(task), 1) for task in tasks]
    grams = [unit.T @ unit for unit in units]
    return total(grams), total([task @ gram for task, gram in zip(tasks, grams, strict=True)])


def undisturbed(tasks: Sequence[Tensor]) -> Tensor:
    """Return the point nearest to the sum of the tasks at which sum_i |(x - d_i) d_i'|^2 / |d_i|^2 is least."""
    start = total(tasks)
    gram, target = _interference(tasks)
    values, vectors = torch.linalg.eigh(gram)
    real = values > 1e-12 * values[-1:].clamp(min=torch.finfo(values.dtype).tiny)
    inverse = torch.where(real, 1 / torch.where(real, values, 1), 0)
    return start + ((target - start @ gram) @ vectors * inverse) @ vectors.T


def least_interference(tasks: Sequence[Tensor], steps: int, rate: float) -> Tensor:
    """Go from the sum of the tasks towards that point by Adam, with its usual constants."""
    x = total(tasks)
    gram, target = _interference(tasks)
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        slope = 2 * (x @ gram - target)
        mean.lerp_(slope, 1 - 0.9)
        square.mul_(0.999).addcmul_(slope, slope, value=1 - 0.999)
        x.addcdiv_(mean, (square / (1 - 0.999**step)).sqrt_().add_(1e-8), value=-rate / (1 - 0.9**step))
    return x
