"""Singular values and vectors of task vectors, matrix by matrix.

One policy holds for all spectral methods. A tensor of two dims is a matrix, embeddings among them. What is none
(biases, norms, tokens) is averaged, and so are kernels of convolutions, as in the authors' code; with `conv: flatten`
they are taken as matrices [out, in*kh*kw]. All is computed in float64. Directions whose singular value is below `NOISE`
times the largest are rounding errors of float32 and have no part, so that no result depends on them.

Models take turns: beside the inputs there is room for one model's matrix in float64 and its decomposition, and for what
is kept of the others, so that memory hardly grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from hf_merge.ops.combine import exact_sum

Conv = Literal["average", "flatten"]
"""What a spectral method does with kernels of convolutions."""

NOISE = 1e-7
CLEAR = 1e-4


class Svd(NamedTuple):
    """Left vectors as columns, singular values (falling), right vectors as rows; zeros where there is but noise."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def part(self, first: int, last: int) -> Svd:
        """Return a run of its components, in memory of its own, so that the rest can go."""
        return Svd(self.u[:, first:last].clone(), self.s[first:last].clone(), self.vh[first:last].clone())

    @property
    def matrix(self) -> Tensor:
        return (self.u * self.s) @ self.vh


class Matrices(Sequence[Tensor]):
    """Tensors as matrices [rows, all else] in float64, each of them made anew whenever it is asked for."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each."""
        first = self._tensors[0]
        return first.shape[0], first[0].numel()

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Matrices: ...
    def __getitem__(self, index: int | slice) -> Tensor | Matrices:
        if isinstance(index, slice):
            return Matrices(self._tensors[index])
        return self._tensors[index].to(torch.float64).flatten(1)


def per_matrix(
    tensors: Sequence[Tensor],
    merge: Callable[[Matrices], Tensor],
    *,
    conv: Conv = "average",
    others: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Merge matrices in float64 by `merge`, and tensors that are none by `others`: their average if not given."""
    first = tensors[0]
    is_matrix = first.dim() == 2 or (first.dim() > 2 and first.dim() != 3 and conv == "flatten")
    if not is_matrix or not first.numel():
        return others(tensors) if others else average(tensors)
    merged = merge(Matrices(tensors))
    return merged.reshape(first.shape).to(first.dtype)


def average(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean."""
    return exact_sum(tensors, [1 / len(tensors)] * len(tensors))


def total(matrices: Iterable[Tensor]) -> Tensor:
    """Return the sum of matrices, of which one at a time is there."""
    each = iter(matrices)
    summed = next(each).clone()
    for matrix in each:
        summed.add_(matrix)
    return summed


def svd(matrix: Tensor) -> Svd:
    """Decompose a matrix, without the directions that are noise."""
    if matrix.shape[0] < matrix.shape[1]:  # LAPACK is twice as quick on tall matrices
        u, s, vh = svd(matrix.T)
        return Svd(vh.T, s, u.T)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    real = (s > NOISE * s[:1]).to(s.dtype)
    return Svd(u * real, s * real, vh * real[:, None])


def leading(matrix: Tensor, rank: int) -> Svd:
    """Return the first components.

    A few of many are found from the Gram matrix, in half the time of an SVD, if its squares leave them enough digits:
    where the last is above `CLEAR` times the first, so that vectors are orthonormal to 1e-8 and better.
    """
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = leading(matrix.T, rank)
        return Svd(vh.T, s, u.T)
    if matrix.is_meta or not 0 < 4 * rank <= matrix.shape[1]:
        return svd(matrix).part(0, rank)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    s, v = values[-rank:].flip(0).clamp_(min=0).sqrt_(), vectors[:, -rank:].flip(1)
    if not s[-1] > CLEAR * s[0]:
        return svd(matrix).part(0, rank)
    return Svd(matrix @ v / s, s, v.T)


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
    return leading(matrix, rank).matrix


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
    targets = torch.zeros_like(tasks[0])
    grams = targets.new_zeros(targets.shape[1], targets.shape[1])
    for task in tasks:
        unit = task / torch.where(task.any(), torch.linalg.vector_norm(task), 1)
        gram = unit.T @ unit
        grams += gram
        targets += task @ gram
    return grams, targets


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
