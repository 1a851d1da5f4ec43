"""Drop entries of task vectors at random, small ones of a row more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_merge.ops import loops
from hf_merge.ops.combine import scaled
from hf_merge.ops.random import counter_and_key, counts_on, keep_below, levels
from hf_merge.ops.selection import magnitude_bits
from hf_merge.ops.sparsify import rescale_factors
from hf_merge.types import Stack, Tiles


def possible_by_rank(*, density: Sequence[float], epsilon: Sequence[float]) -> None:
    """Refuse densities to whose both sides there is no room for epsilon."""
    for d, e in zip(density, epsilon, strict=True):
        if 0 < d < 1 and not 0 < d - e <= d + e < 1:
            raise ValueError(
                f"density {d:g} with epsilon {e:g} gives probabilities outside of (0, 1): "
                f"set epsilon below {min(d, 1 - d):g}, or density to 0 or 1"
            )


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability with which DELLA keeps each entry of a task vector, or of some rows of it.

    It rises evenly from density - epsilon for the smallest to density + epsilon for the largest magnitude of a
    row, which is a run along dim 1 (a vector is one row); among equals, with the index. A row of one has `density`.
    """
    return _by_rank(delta, _ladder(delta, density, epsilon))


def drop_by_rank(
    deltas: Stack,
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: Sequence[int],
    rescale: str,
    factors: Sequence[float],
) -> list[Tensor]:
    """Drop entries of task vectors at random, small ones more often, and rescale the rest.

    Args:
        deltas: whole task vectors in their shape, or some rows of them.
        density: mean probability to keep an entry, one for each model; >= 1 keeps all, <= 0 none.
        epsilon: how far the probabilities of a row reach to both sides of it.
        seed: one for each model.
        rescale: `density` divides every entry by its probability.
        factors: what the kept entries are multiplied by, one for each model.
    """
    kept = [keep_by_rank(d, p, e, s, deltas.start) for d, p, e, s in zip(deltas, density, epsilon, seed, strict=True)]
    if rescale == "density":
        drawn = zip(kept, deltas, density, epsilon, strict=True)
        return [k.div_(rank_probabilities(d, p, e)) if 0 < p < 1 else k for k, d, p, e in drawn]
    return [scaled(one, factor) for one, factor in zip(kept, factors, strict=True)]


def keep_by_rank(delta: Tensor, density: float, epsilon: float, seed: int, start: int = 0) -> Tensor:
    """Keep each entry of whole rows (first index `start`) with the probability of its rank, and clear the others."""
    if not 0 < density < 1:
        return delta if density > 0 else torch.zeros_like(delta)
    ladder = levels(_ladder(delta, density, epsilon))
    if loops.take(delta) and 0 < delta.dim() < 3 and len(ladder) > 1 and counts_on(start, delta.numel()):
        return loops.keep_by_rank(delta, ladder, *counter_and_key(seed, start))
    return keep_below(delta, _by_rank(delta, ladder), seed, start)


def rank_factors(
    tiles: Tiles, *, density: Sequence[float], epsilon: Sequence[float], seed: Sequence[int], rescale: str
) -> list[float]:
    """Say by what to multiply each model's kept entries: to the L1 norm of before with `l1`, else by 1."""
    return rescale_factors(
        tiles,
        lambda tile, i: keep_by_rank(tile[i], density[i], epsilon[i], seed[i], tile.start),
        rescale="l1" if rescale == "l1" else "none",
        density=density,
    )


def _ladder(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probabilities of a row from its smallest entry to its largest."""
    dim = min(delta.dim() - 1, 1)
    if dim < 0 or delta.shape[dim] < 2:
        return torch.full((1,), density, dtype=delta.dtype)
    # On the CPU: devices round it apart.
    return torch.linspace(density - epsilon, density + epsilon, delta.shape[dim], dtype=delta.dtype)


def _by_rank(delta: Tensor, ladder: Tensor) -> Tensor:
    """Give each entry the step of a ladder on which its magnitude stands in its row."""
    dim, ladder = min(delta.dim() - 1, 1), ladder.to(delta.device)
    if len(ladder) == 1:
        return ladder.view(()).expand(delta.shape)
    steps = ladder.view(-1, *[1] * (delta.dim() - dim - 1)).expand(delta.shape)
    order = magnitude_bits(delta).argsort(dim=dim, stable=True)
    return torch.empty_like(delta, dtype=ladder.dtype).scatter_(dim, order, steps)
