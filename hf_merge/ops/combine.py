"""Weighted sums of models, with and without a vote on the sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(tensors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Return the sum of weight_i * tensor_i as a new tensor."""
    total = tensors[0] * weight[0]
    for tensor, w in zip(tensors[1:], weight[1:], strict=True):
        total.add_(tensor, alpha=w)
    return total


def linear_sum(tensors: Sequence[Tensor], weight: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the weighted sum; with `normalize` divided by the sum of the weights (by 1 where that is below 1e-8)."""
    total = weighted_sum(tensors, weight)
    divisor = sum(weight)
    return total.div_(divisor) if normalize and abs(divisor) >= 1e-8 and divisor != 1 else total


def disjoint_sum(tensors: Sequence[Tensor], weight: Sequence[float], *, normalize: bool) -> Tensor:
    """Elect a sign for each entry, then sum only the weighted entries that have it.

    The elected sign is that of the weighted sum, a sum of zero counting as positive. With `normalize` each
    entry is divided by the weights that took part (by 1 where they sum to 0), which is TIES' disjoint mean.
    """
    weighted = [tensor * w for tensor, w in zip(tensors, weight, strict=True)]
    # Masks are floats, 0 or 1: torch's boolean masks cost ten to fifty times as much.
    elected = weighted_sum(weighted, [1.0] * len(weighted)).ge_(0).mul_(2).sub_(1)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for entries, w in zip(weighted, weight, strict=True):
        total.add_(entries.mul_(elected).clamp_(min=0))  # the magnitudes of those that agree
        if normalize:
            divisor.add_(entries.gt_(0), alpha=w)
    total.mul_(elected)
    return total.div_(divisor.add_(torch.eq(divisor, 0, out=elected))) if normalize else total
