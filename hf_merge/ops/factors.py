"""Low-rank changes as their factors: a change of rank r is r units, each the outer product of two vectors.

Adapters of one module are packed into tensors of one shape, [rank, 2, max(out, in)], every adapter in rows of its own:
unit j adds outer(units[j, 0, :out], units[j, 1, :in]). So a sum of them has all units of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_merge.types import Stack

_STEPS = 25  # of k-means; the assignment of a few dozen units rests long before


def packed(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Pack factors (left [out, r_i], right [r_i, in]) of adapters into tensors of one shape, padded with zeros."""
    rows = sum(right.shape[0] for _, right in pairs)
    width = max(pairs[0][0].shape[0], pairs[0][1].shape[1])
    found, first = [], 0
    for left, right in pairs:
        units = left.new_zeros(rows, 2, width)
        own = units[first : first + right.shape[0]]
        own[:, 0, : left.shape[0]] = left.T
        own[:, 1, : right.shape[1]] = right
        found.append(units)
        first += right.shape[0]
    return found


def unpacked(units: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return left [rows, r] and right [r, columns] of packed units."""
    return units[:, 0, :rows].T, units[:, 1, :columns]


def weighted_units(factors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Put the units of all adapters side by side, each product scaled by its adapter's weight."""
    units = torch.stack([one[:, 0] * share for one, share in zip(factors, weight, strict=True)]).sum(0)
    return torch.stack([units, torch.stack([one[:, 1] for one in factors]).sum(0)], dim=1)


def singular_units(units: Tensor, count: int) -> Tensor:
    """Return the `count` units of largest product, orthogonal to each other, that come nearest to the sum of all.

    By QR of both sides and the SVD of the small matrix between them; the large product is never made.
    """
    left, rest_left = torch.linalg.qr(units[:, 0].T)
    right, rest_right = torch.linalg.qr(units[:, 1].T)
    u, s, vh = torch.linalg.svd(rest_left @ rest_right.T, full_matrices=False)
    root = s[:count].sqrt()
    return padded(left @ u[:, :count] * root, root[:, None] * (vh[:count] @ right.T), len(units))


def padded(left: Tensor, right: Tensor, rows: int) -> Tensor:
    """Pack one pair [width, r], [r, width] into so many rows."""
    units = left.new_zeros(rows, 2, left.shape[0])
    units[: right.shape[0], 0], units[: right.shape[0], 1] = left.T, right
    return units


def columns_in_use(tiles: Iterable[Stack]) -> int:
    """Count the columns up to the last one that any right factor fills; the others are padding."""
    width = 1
    for tile in tiles:
        used = torch.stack([one.abs().reshape(-1, one.shape[-1]).amax(0) for one in _right_sides(tile)]).amax(0)
        width = max(width, int(used.nonzero().amax()) + 1 if used.any() else 0)
    return width


def _right_sides(factors: Stack) -> list[Tensor]:
    return [one[:, 1] if one.dim() == 3 else one for one in factors if one.numel()]


def aligned(factors: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Decompose all changes side by side, [D_1 | D_2 | ..] = U S [V_1 | V_2 | ..].

    Returns:
        U [out, k], S [k] and every V_i [k, width], k at most the sum of the ranks.
    """
    left, rest = torch.linalg.qr(torch.stack([one[:, 0] for one in factors]).sum(0).T)
    side_by_side = rest @ torch.cat([one[:, 1, :width] for one in factors], dim=1)
    u, s, vh = torch.linalg.svd(side_by_side, full_matrices=False)
    return left @ u, s, [*vh.split(width, dim=1)]


def largest(part: Tensor, density: float) -> Tensor:
    """Keep this fraction of entries, the largest; of equal ones at the cut all."""
    count = max(1, int(density * part.numel()))
    cut = part.abs().flatten().kthvalue(part.numel() - count + 1).values
    return torch.where(part.abs() >= cut, part, 0)


def clustered(units: Tensor, count: int) -> Tensor:
    """Put every unit into one of `count` clusters by k-means, and return their centroids, as long as their members.

    The first centroids are the longest unit and then, one by one, the unit that is farthest from all of them, so that
    nothing is random. Units of zeros are padding and belong to no cluster.

    Returns:
        [rank, 2, width]: the centroids, then zeros.
    """
    points = units.flatten(1)
    length = points.norm(dim=1)
    real = (length > 0).to(points.dtype)
    centroids = _far_apart(points, length, count)
    for _ in range(_STEPS):
        members = _members(points, centroids, real)
        centroids = torch.where(members.sum(0)[:, None] > 0, _means(members, points), centroids)
    members = _members(points, centroids, real)
    mean = _means(members, points)
    scale = _means(members, length[:, None]) / mean.norm(dim=1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
    found = torch.zeros_like(points)
    found[:count] = torch.where(mean.norm(dim=1, keepdim=True) > 0, mean * scale, 0)
    return found.view(units.shape)


def _far_apart(points: Tensor, length: Tensor, count: int) -> Tensor:
    chosen = [points.index_select(0, length.argmax()[None])]
    distance = _distances(points, chosen[0])[:, 0]
    for _ in range(count - 1):
        farthest = torch.where(length > 0, distance, -1.0).argmax()
        chosen.append(points.index_select(0, farthest[None]))
        distance = torch.minimum(distance, _distances(points, chosen[-1])[:, 0])
    return torch.cat(chosen)


def _distances(points: Tensor, centroids: Tensor) -> Tensor:
    """Squared distances, [points, centroids]."""
    return (points[:, None] - centroids).square().sum(-1)


def _members(points: Tensor, centroids: Tensor, real: Tensor) -> Tensor:
    """Tell which point belongs to which centroid, as ones and zeros [points, centroids]."""
    nearest = _distances(points, centroids).argmin(1)
    return torch.nn.functional.one_hot(nearest, len(centroids)).to(points.dtype) * real[:, None]


def _means(members: Tensor, values: Tensor) -> Tensor:
    return members.T @ values / members.sum(0).clamp_min(1.0)[:, None]


def mean_rank(factors: Sequence[Tensor]) -> int:
    """How many units an adapter has, on the average: rows are those of all adapters."""
    return max(1, math.ceil(len(factors[0]) / len(factors)))
