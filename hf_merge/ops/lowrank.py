"""A matrix as the product of two thin ones: the best of a rank, or the smallest rank that keeps enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Rank: TypeAlias = int | float
"""An integer: at most that many. A float in (0, 1]: as few as keep that share of the squared Frobenius norm."""

_PIECE = 1 << 22  # elements of the matrix that are compared with the product at a time
_OVERSAMPLING = 16  # columns beside those asked for; half the rank where that is more
_ROUNDS = 20  # power iterations at most
_SETTLED = 1e-7  # they end when a round adds no more than this share of the squared norm


@dataclass(frozen=True)
class LowRank:
    """Two factors of a matrix [m, n].

    Attributes:
        left: [m, r], U sqrt(S).
        right: [r, n], sqrt(S) V^T.
        kept: share of the matrix' squared Frobenius norm that the product keeps; 1 for a matrix of zeros.
        error: largest absolute entry of matrix - left @ right.
    """

    left: Tensor
    right: Tensor
    kept: float
    error: float

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def truncate(matrix: Tensor, rank: Rank | None, *, exact: bool = True, seed: int = 0) -> LowRank:
    """Return the best approximation of a rank by the singular value decomposition, balanced: U sqrt(S), sqrt(S) V^T.

    Signs are those that make the largest entry of each row of `right` positive. A matrix of zeros has rank 0.

    Args:
        matrix: [m, n].
        rank: how much to keep; None for all that is not numerically zero.
        exact: decompose the whole matrix. Otherwise, where an integer rank is much smaller than the matrix, only what
            a random sketch of it spans (Halko, Martinsson & Tropp, arXiv 0909.4061), with power iterations until that
            keeps no more.
        seed: of the sketch.

    Raises:
        ValueError: the rank is neither a positive integer nor a float in (0, 1], or the matrix has NaN or Inf.
    """
    check_rank(rank)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    total = matrix.double().square().sum().item() if matrix.numel() < _PIECE else _squared_norm(matrix)
    if not total < float("inf"):
        raise ValueError("the matrix has NaN or Inf")
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    if total == 0:
        values, right = matrix.new_zeros(0), matrix.new_zeros(0, tall.shape[1])
    elif not exact and isinstance(rank, int) and _pays(tall, rank):
        values, right = _sketched(tall, rank, seed)
    else:
        values, right = _decomposed(tall)
    count = _count(values, rank, total, max(matrix.shape), matrix.dtype)
    left, right = _balanced(tall, values[:count], right[:count])
    return _measured(matrix, *((right.T, left.T) if wide else (left, right)), total)


def truncate_each(matrices: Tensor, rank: Rank | None, *, exact: bool = True, seed: int = 0) -> LowRank:
    """Approximate every matrix of a stack [k, m, n] by itself; see `truncate`.

    Returns:
        left [k, m, r] and right [k, r, n], with zeros up to the largest of their ranks; what is kept of all together.

    Raises:
        ValueError: as `truncate`.
    """
    found = [truncate(matrix, rank, exact=exact, seed=seed) for matrix in matrices]
    widest = max(one.rank for one in found)
    pad = torch.nn.functional.pad
    left = torch.stack([pad(one.left, (0, widest - one.rank)) for one in found])
    right = torch.stack([pad(one.right, (0, 0, 0, widest - one.rank)) for one in found])
    energy = [_squared_norm(matrix) for matrix in matrices] if len(found) > 1 else [1.0]
    kept = sum(one.kept * share for one, share in zip(found, energy, strict=True)) / (sum(energy) or 1.0)
    return LowRank(left, right, kept if sum(energy) else 1.0, max(one.error for one in found))


def check_rank(rank: Rank | None) -> None:
    """Raise ValueError for what is no rank."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or not (
        rank >= 1 if isinstance(rank, int) else 0 < rank <= 1
    ):  # fmt: skip
        raise ValueError(f"a rank is a positive integer, or a share of the energy in (0, 1]; found {rank!r}")


def _squared_norm(matrix: Tensor) -> float:
    return sum(piece.double().square().sum().item() for piece in matrix.split(_rows(matrix)))


def _rows(matrix: Tensor) -> int:
    return max(1, _PIECE // max(matrix.shape[1], 1))


def _width(rank: int) -> int:
    """Columns of a sketch."""
    return rank + max(_OVERSAMPLING, rank // 2)


def _pays(tall: Tensor, rank: int) -> bool:
    """Tell whether a sketch costs less than the Gram matrix and its eigenvectors, by counts of multiplications."""
    rows, columns = tall.shape
    return 8 * _ROUNDS * _width(rank) * rows < 4 * rows * columns + 25 * columns**2


def _decomposed(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values and V^T of [m, n], m >= n.

    Of float32 by the eigenvectors of the Gram matrix in float64, whose digits suffice for those of float32.
    """
    if tall.dtype == torch.float64:
        thin = torch.linalg.qr(tall, mode="r")[1] if tall.shape[0] > tall.shape[1] else tall
        _, values, right = torch.linalg.svd(thin, full_matrices=False)
        return values, right
    gram = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for piece in tall.split(_rows(tall)):
        wide = piece.double()
        gram.addmm_(wide.T, wide)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp_(min=0).sqrt_().flip(0), vectors.flip(1).T


def _sketched(tall: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values of [m, n] and their rows of V^T, from its product with random columns."""
    numbers = torch.Generator().manual_seed(seed)
    columns = torch.randn(tall.shape[1], _width(rank), generator=numbers, dtype=tall.dtype).to(tall.device)
    total, kept = _squared_norm(tall), 0.0
    basis = torch.linalg.qr(tall @ columns)[0]
    for _ in range(_ROUNDS):
        projected = basis.T @ tall  # [width, n]
        found = torch.linalg.svdvals(projected.double() @ projected.double().T)[:rank].sum().item() / total
        if found - kept <= _SETTLED * found:
            break
        kept = found
        basis = torch.linalg.qr(tall @ torch.linalg.qr(projected.T)[0])[0]
    projected = basis.T @ tall
    squares, vectors = torch.linalg.eigh(projected.double() @ projected.double().T)
    values = squares.clamp_(min=0).sqrt_().flip(0)[:rank]
    rows = vectors.flip(1).T[:rank] @ projected.double()
    return values, rows / values.clamp(min=torch.finfo(torch.float64).tiny)[:, None]


def _count(values: Tensor, rank: Rank | None, total: float, size: int, dtype: torch.dtype) -> int:
    """How many singular values are kept: never those that are numerically zero."""
    if not len(values):
        return 0
    present = int((values > values[0] * size * torch.finfo(dtype).eps / 8).sum())
    if rank is None:
        return present
    if isinstance(rank, int):
        return min(rank, present)
    shares = values.double().square().cumsum(0) / max(total, values.double().square().sum().item())
    return min(int((shares < rank * (1 - 1e-12)).sum()) + 1, present)


def _balanced(tall: Tensor, values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return U sqrt(S) and sqrt(S) V^T: the matrix times V is U S, whatever the digits of S."""
    roots = values.double().sqrt()[:, None]
    right = right.double()
    largest = right.gather(1, right.abs().argmax(1, keepdim=True)) if right.numel() else right[:, :1]
    right = right * torch.where(largest < 0, -1.0, 1.0)
    turned = (right / roots).T.to(tall.dtype) if right.numel() else right.T.to(tall.dtype)
    return tall @ turned, (right * roots).to(tall.dtype)


def _measured(matrix: Tensor, left: Tensor, right: Tensor, total: float) -> LowRank:
    """Compare the product with the matrix, a few rows at a time."""
    error, lost = 0.0, 0.0
    for rows, part in zip(matrix.split(_rows(matrix)), left.split(_rows(matrix)), strict=True):
        rest = rows - part @ right
        error = max(error, rest.abs().max().item()) if rest.numel() else error
        lost += rest.double().square().sum().item()
    kept = 1.0 if total == 0 else max(0.0, 1.0 - lost / total)
    return LowRank(left.contiguous(), right.contiguous(), kept, error)
