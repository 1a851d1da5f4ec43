"""Prototypes of tasks from features alone: where each task's examples lie, and in which metric they are near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_merge.experts.routers import Prototypes, RouterConfig

MOST = 8
"""Prototypes of a task."""
FEWEST_EXAMPLES = 25
"""Of a prototype, on average."""
_ROUNDS = 20


def fit_prototypes(config: RouterConfig, train: Sequence[Tensor]) -> tuple[Prototypes, RouterConfig]:
    """Put prototypes where the examples of each task lie.

    Each task gets one for every 25 examples, at most 8: the means of its clusters (k-means in the whitened space of all
    tasks, begun by k-means++ from the seed). The metric is the inverse of the covariance within clusters, shrunk
    towards a multiple of the identity as Chen et al. found best (OAS, https://arxiv.org/abs/0907.4698).

    Args:
        config: of the router.
        train: the features of each task, (examples, width).

    Returns:
        The prototypes, and the config with their number.
    """
    wide = [each.double() for each in train]
    white = _whitener(torch.cat([each - each.mean(0) for each in wide]))
    generator = torch.Generator().manual_seed(config.seed % 2**63)
    groups = [_clusters(each @ white, generator) for each in wide]
    centres = [_means(each, group) for each, group in zip(wide, groups, strict=True)]
    rest = torch.cat([each - own[group] for each, own, group in zip(wide, centres, groups, strict=True)])
    counts = tuple(len(own) for own in centres)
    precision = torch.linalg.inv(_shrunk(rest))
    means = torch.cat(centres)
    made = Prototypes(config.width, counts)
    made.weight.copy_(means @ precision)
    made.bias.copy_(-0.5 * (means @ precision * means).sum(1) - _log_counts(counts))
    return made, replace(config, prototypes=counts)


def _log_counts(counts: Sequence[int]) -> Tensor:
    """Let tasks with more prototypes not count for more."""
    return torch.cat([torch.full((count,), float(count)).log() for count in counts])


def _shrunk(rest: Tensor) -> Tensor:
    """Return the covariance of centred rows, shrunk by OAS."""
    n, p = rest.shape
    found = rest.T @ rest / n
    mean = found.diagonal().mean()
    squares, square = found.square().sum(), (p * mean).square()
    share = ((1 - 2 / p) * squares + square) / ((n + 1 - 2 / p) * (squares - square / p)).clamp(min=1e-300)
    share = share.clamp(max=1.0)
    ridge = mean.clamp(min=1e-12) * torch.eye(p, dtype=rest.dtype)
    return (1 - share) * found + (share + 1e-6) * ridge


def _whitener(rest: Tensor) -> Tensor:
    """Return the matrix that makes the shrunk covariance of centred rows the identity."""
    return torch.linalg.inv(torch.linalg.cholesky(_shrunk(rest))).T


def _clusters(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cluster of each point: (points,)."""
    count = max(1, min(MOST, len(points) // FEWEST_EXAMPLES))
    centres = points[_spread(points, count, generator)]
    group = torch.cdist(points, centres).argmin(1)
    for _ in range(_ROUNDS):
        centres = _means(points, group, len(centres), centres)
        again = torch.cdist(points, centres).argmin(1)
        if torch.equal(again, group):
            break
        group = again
    return torch.unique(group, return_inverse=True)[1]


def _spread(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Draw points far from one another (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    while len(chosen) < count:
        near = torch.cdist(points, points[chosen]).amin(1).square()
        if not bool(near.sum() > 0):
            break
        chosen.append(int(torch.multinomial(near, 1, generator=generator)))
    return chosen


def _means(points: Tensor, group: Tensor, count: int | None = None, empty: Tensor | None = None) -> Tensor:
    """Return the mean of each cluster; of an empty one what it was."""
    count = int(group.max()) + 1 if count is None else count
    sums = torch.zeros(count, points.shape[1], dtype=points.dtype).index_add_(0, group, points)
    sizes = torch.bincount(group, minlength=count)
    means = sums / sizes.clamp(min=1)[:, None]
    return means if empty is None else torch.where(sizes[:, None] > 0, means, empty)
