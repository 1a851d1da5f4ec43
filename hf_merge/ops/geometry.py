"""Lengths and angles of weights, and means on the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.types import Stack, Tiles

_CANCELLED = 1e-4
"""Directions whose mean is shorter than this cancel: float32 weights do not say where their mean points."""
_RESOLVED = 1e-6
"""Angles below this, or as near to pi, are not told from 0 and pi by a cosine in float64."""
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Angle:
    """Norms of two tensors, each taken as one vector, and the cosine between them."""

    norm_a: float
    norm_b: float
    cosine: float


def angle_to_base(tiles: Tiles) -> Angle:
    """Measure the base (a) against the first model (b), in float64. A norm below 1e-8 counts as 1."""
    squares_a = squares_b = product = 0.0
    for tile in tiles:
        if tile.base is None:
            raise TypeError("an angle to the base needs a base")
        a, b = tile.base.to(torch.float64).flatten(), tile[0].to(torch.float64).flatten()
        squares_a, squares_b = squares_a + float(a @ a), squares_b + float(b @ b)
        product += float(a @ b)
    norm_a, norm_b = (norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(squares_a), math.sqrt(squares_b)))
    return Angle(norm_a, norm_b, max(-1.0, min(1.0, product / (norm_a * norm_b))))


def slerp_coefficients(cosine: Tensor | float, t: float, *, colinear: float) -> tuple[Tensor, Tensor]:
    """Return what a and b are multiplied by; linear interpolation where |cosine| exceeds `colinear`."""
    cosine = torch.as_tensor(cosine, dtype=torch.float64)
    theta, straight = cosine.acos(), cosine.abs() > colinear
    a, b = ((share * theta).sin() / theta.sin() for share in (1 - t, t))
    return a.masked_fill(straight, 1 - t), b.masked_fill(straight, t)


def offsets(models: Stack) -> Sequence[Tensor]:
    """Return the models as seen from the base, if there is one."""
    return models if models.base is None else [model - models.base for model in models]


def inner_products(
    tiles: Tiles, vectors: Callable[[Stack], Sequence[Tensor]] = tuple, dim: int | None = None
) -> Tensor:
    """Return the inner products of every two models, in float64.

    Args:
        tiles: one tensor of every model; for products along a dim, a single one in its shape.
        vectors: what is taken of a tile.
        dim: run of entries that is one vector; all of them if not given.

    Returns:
        On the CPU, shape (n, n), or (n, n, ...) where the tensor's shape follows with 1 in place of `dim`.
    """
    total, n = torch.zeros(0, dtype=torch.float64), 0
    for tile in tiles:
        wide, n = [vector.to(torch.float64) for vector in vectors(tile)], len(tile)
        pairs = {(i, j): _product(wide[i], wide[j], dim) for i in range(n) for j in range(i + 1)}
        found = torch.stack([pairs[max(i, j), min(i, j)] for i in range(n) for j in range(n)])
        total = total + found if len(total) else found
    return (total if total.is_meta else total.cpu()).view(n, n, *total.shape[1:])


def _product(a: Tensor, b: Tensor, dim: int | None) -> Tensor:
    return a.flatten().dot(b.flatten()) if dim is None else (a * b).sum(dim, keepdim=True)


def cosine(products: Tensor, i: int, j: int, *, floor: float) -> Tensor:
    """Return the cosine between models i and j from inner products; norms below `floor` count as that."""
    norm_i, norm_j = (products[k, k].sqrt().clamp(min=floor) for k in (i, j))
    return (products[i, j] / norm_i / norm_j).clamp(-1, 1)


def mean_direction(products: Tensor, weight: Sequence[float], *, eps: float) -> list[float]:
    """Return what the models are multiplied by for their weighted mean direction, at the weighted sum of their norms.

    Directions that cancel have no mean: there, the weights themselves.

    Args:
        products: inner products of the models, shape (n, n).
        weight: one for each model.
        eps: added to the norms; a mean of unit vectors that is shorter counts as cancelled.
    """
    norms, shares = products.diagonal().sqrt(), torch.tensor(weight, dtype=torch.float64, device=products.device)
    units = shares / (norms + eps)
    length = float((units @ products @ units).clamp(min=0).sqrt())
    if length < max(eps, _CANCELLED * float((units.abs() * norms).sum())):
        return list(weight)
    return (units * (shares @ norms) / length).tolist()


def karcher_mean(products: Tensor, *, max_iter: int, tol: float) -> list[float]:
    """Return what the models are multiplied by for the Karcher mean of their directions, at their mean norm.

    Directions that cancel have no mean: there, the average of the models.

    Args:
        products: inner products of the models, shape (n, n).
        max_iter: at most so many steps along the gradient.
        tol: models of smaller norm have no direction; smaller angles and gradients count as 0.
    """
    norms = products.diagonal().sqrt()
    counted = (norms > tol).to(norms.dtype)
    inverse = counted / norms.clamp(min=tol)
    cosines = products * inverse * inverse[:, None]
    share = counted / counted.sum().clamp(min=1)
    if _length(cosines, share) < max(tol, _CANCELLED):
        return [1 / len(norms)] * len(norms)
    mean = share / _length(cosines, share)  # a vector is known by its coordinates along the models' directions
    for _ in range(max_iter):
        gradient = _towards(cosines, share, mean, max(tol, _RESOLVED))
        size = _length(cosines, gradient)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * gradient
        mean = mean / _length(cosines, mean)
    return (mean * inverse * norms.mean()).tolist()


def _length(cosines: Tensor, coordinates: Tensor) -> float:
    return math.sqrt(max(0.0, float(coordinates @ cosines @ coordinates)))


def _towards(cosines: Tensor, share: Tensor, mean: Tensor, least: float) -> Tensor:
    """Sum the ways from the mean to all directions, along the sphere, in the plane that touches it there."""
    cosine = (cosines @ mean).clamp(-1, 1)
    angle = cosine.acos()
    clear = (angle >= least) & (math.pi - angle >= least)  # no way is shortest to the opposite point
    pull = torch.where(clear, share * angle / angle.sin(), 0.0)
    return pull - (pull @ cosine) * mean


def stock_ratio(products: Tensor) -> Tensor:
    """Return how far Model Stock goes from the base to the average: t = k c / (1 + (k - 1) c).

    k is the number of models, c the mean cosine of their task vectors; products of norms below 1e-6 count as that,
    and t is 0 where its divisor is nearly 0.
    """
    k = len(products)
    if not k:  # an empty tensor
        return products.new_zeros(())
    norms = [products[i, i].sqrt() for i in range(k)]
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosines = [(products[i, j] / (norms[i] * norms[j]).clamp(min=1e-6)).clamp(-1, 1) for i, j in pairs]
    mean = torch.stack(cosines).mean(0)
    divisor = 1 + (k - 1) * mean
    return (k * mean / divisor).masked_fill(divisor.abs() < 1e-6, 0.0)


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of each row of `b` from that of `a`, with 1 in place of the last dim.

    A row is read as a softmax over its entries, plus 1e-8.
    """
    columns = a.shape[-1] if a.dim() else 1
    rows = max(1, _BLOCK // columns)
    blocks = zip(a.reshape(-1, columns).split(rows), b.reshape(-1, columns).split(rows), strict=True)
    return torch.cat([_divergence(p, q) for q, p in blocks]).view([*a.shape[:-1], *[1] * min(a.dim(), 1)])


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.softmax(-1).add_(1e-8), q.softmax(-1).add_(1e-8)
    return (p / q).log_().mul_(p).sum(-1)
