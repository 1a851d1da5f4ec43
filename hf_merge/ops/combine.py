"""Weighted sums of models, with and without a vote on the sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_merge.ops import loops
from hf_merge.ops.sums import Magnitudes, magnitude_sum
from hf_merge.types import Tiles


def weighted_sum(tensors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Return the sum of weight_i * tensor_i as a new tensor."""
    if loops.take(*tensors):
        return loops.weighted_sum(tensors, weight)
    total = tensors[0] * weight[0]
    for tensor, w in zip(tensors[1:], weight[1:], strict=True):
        total.add_(tensor, alpha=w)
    return total


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return tensor * factor: the tensor itself where that is 1."""
    return tensor if factor == 1 else tensor * factor


def divide_(tensor: Tensor, divisor: float) -> Tensor:
    """Divide in place, with the same bits on every device: given a plain number, CUDA would multiply by its inverse."""
    if tensor.device.type == "cpu":
        return tensor.div_(divisor)
    return tensor.div_(torch.full((), divisor, dtype=tensor.dtype, device=tensor.device))


def exact_sum(tensors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Return the weighted sum, rounded once: for weights that are large and cancel one another."""
    total = tensors[0].to(torch.float64, copy=True).mul_(weight[0]) if len(tensors) > 1 else tensors[0] * weight[0]
    for tensor, w in zip(tensors[1:], weight[1:], strict=True):
        total.add_(tensor, alpha=w)
    return total.to(tensors[0].dtype)


def linear_sum(tensors: Sequence[Tensor], weight: Sequence[float], *, normalize: bool) -> Tensor:
    """Return the weighted sum; with `normalize` divided by the sum of the weights (by 1 where that is below 1e-8)."""
    total = weighted_sum(tensors, weight)
    divisor = sum(weight)
    return divide_(total, divisor) if normalize and abs(divisor) >= 1e-8 and divisor != 1 else total


def disjoint_sum(
    tensors: Sequence[Tensor], weight: Sequence[float], *, normalize: bool, undecided: float = 1.0
) -> Tensor:
    """Elect a sign for each entry, then sum only the weighted entries that have it.

    The elected sign is that of the weighted sum, a sum of zero having the sign `undecided`. With `normalize` each
    entry is divided by the weights that took part (by 1 where they sum to 0), which is TIES' disjoint mean.
    """
    if loops.take(*tensors):
        return loops.disjoint_sum(tensors, weight, normalize=normalize, undecided=undecided)
    weighted = [scaled(tensor, w) for tensor, w in zip(tensors, weight, strict=True)]
    elected = _elected_sign(weighted, undecided)
    ones, shares = [1.0] * len(weighted), weight if normalize else [0.0] * len(weighted)
    total, divisor = _sum_of_agreeing(weighted, elected, ones, shares)
    return total.div_(divisor.add_(torch.eq(divisor, 0, out=elected))) if normalize else total


def disjoint_mean(tensors: Sequence[Tensor], share: Sequence[float]) -> Tensor:
    """Elect a sign for each entry, each tensor having one vote, then average those that have it by their shares.

    Shares that sum to less than 1e-6 are divided by that.
    """
    total, divisor = _sum_of_agreeing(tensors, _elected_sign(tensors), share, share)
    return total.div_(divisor.clamp_(min=1e-6))


def agreeing(tensors: Sequence[Tensor], *, undecided: float = 1.0) -> list[Tensor]:
    """Elect a sign for each entry by the plain sum, and zero in each tensor the entries that do not have it."""
    elected = _elected_sign(tensors, undecided)
    return [tensor.mul(elected).clamp_(min=0).mul_(elected) for tensor in tensors]


def disjoint_max(tensors: Sequence[Tensor], weight: Sequence[float], *, undecided: float = 1.0) -> Tensor:
    """Elect a sign for each entry as `disjoint_sum` does, then keep the largest of the entries that have it."""
    weighted = [scaled(tensor, w) for tensor, w in zip(tensors, weight, strict=True)]
    elected = _elected_sign(weighted, undecided)
    most = torch.zeros_like(elected)
    for tensor in weighted:
        torch.maximum(most, tensor.mul(elected), out=most)
    return most.mul_(elected)


def majority_sign(tensors: Iterable[Sequence[Tensor]]) -> float:
    """Return the sign that most of the sums of tensors have, over all tiles; a draw is negative."""
    balance = 0
    for tile in tensors:
        balance += int(weighted_sum(tile, [1.0] * len(tile)).sign_().sum(dtype=torch.float64))
    return 1.0 if balance > 0 else -1.0


def _elected_sign(tensors: Sequence[Tensor], undecided: float = 1.0) -> Tensor:
    """Return the sign of the sum as 1 or -1, `undecided` where that is zero."""
    # Masks are floats, 0 or 1: torch's boolean masks cost ten to fifty times as much.
    total = weighted_sum(tensors, [1.0] * len(tensors))
    return (total.ge_(0) if undecided > 0 else total.gt_(0)).mul_(2).sub_(1)


def _sum_of_agreeing(
    tensors: Sequence[Tensor], elected: Tensor, scale: Sequence[float], share: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Sum the scaled entries of the elected sign, and the shares of the tensors that have it."""
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for tensor, factor, part in zip(tensors, scale, share, strict=True):
        agreeing = tensor.mul(elected).clamp_(min=0)
        total.add_(agreeing, alpha=factor)
        if part:
            divisor.add_(agreeing.gt_(0), alpha=part)
    return total.mul_(elected), divisor


def active(deltas: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Return for each task vector 1 where it exceeds `epsilon` in magnitude, else 0, as floats."""
    return [delta.abs().gt_(epsilon) for delta in deltas]


def overlap_counts(tiles: Tiles, *, epsilon: float) -> list[tuple[int, int]]:
    """Count for each model its active entries that another model shares, and those that are its alone."""
    counts: list[tuple[int, int]] = []
    for tile in tiles:
        masks = active(tile, epsilon)
        lone = [mask * (weighted_sum(masks, [1.0] * len(masks)) == 1) for mask in masks]
        found = [
            (int(m.sum(dtype=torch.float64)), int(one.sum(dtype=torch.float64)))
            for m, one in zip(masks, lone, strict=True)
        ]
        counts = counts or [(0, 0)] * len(tile)
        counts = [(s + total - one, a + one) for (s, a), (total, one) in zip(counts, found, strict=True)]
    return counts


def overlap_sum(deltas: Sequence[Tensor], masks: Sequence[Tensor], *, alone: Sequence[float]) -> Tensor:
    """Sum the active entries: divided by how many models share one, or times `alone[i]` where it is model i's only."""
    shared_by = weighted_sum(masks, [1.0] * len(masks))
    lone = (shared_by == 1).to(shared_by.dtype)
    average = shared_by.clamp(min=1).reciprocal_().sub_(lone)  # 1/c where c > 1; nothing is active where c = 0
    total = torch.zeros_like(shared_by)
    for delta, mask, factor in zip(deltas, masks, alone, strict=True):
        total.add_(delta * mask * (average + lone * factor))
    return total


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each entry the one of largest magnitude, the last among equals."""
    kept = tensors[0].clone()
    for tensor in tensors[1:]:
        kept = torch.where(tensor.abs() >= kept.abs(), tensor, kept)
    return kept


def localised(deltas: Sequence[Tensor], total: Tensor, share: Sequence[float]) -> list[Tensor]:
    """Mark (by 1, else 0) the entries of each task vector that outweigh a share of all the others together."""
    return [d.abs().gt((total - d).abs_().mul_(s)).to(d.dtype) for d, s in zip(deltas, share, strict=True)]


def magnitude_shares(tiles: Tiles) -> list[float]:
    """Return each model's share of the mean magnitudes of all; equal ones where nothing changed."""
    found: list[Magnitudes] = []
    for tile in tiles:
        found = found or [Magnitudes() for _ in tile]
        for sums, tensor in zip(found, tile, strict=True):
            sums.add(tensor)
    each = [sums.total() for sums in found]
    return [one / math.fsum(each) if any(each) else 1 / len(each) for one in each]


def to_the_largest(tensors: Iterable[Tensor]) -> list[float]:
    """Say by what to multiply each tensor so that all have the largest mean magnitude among them; zeros stay."""
    sums = [magnitude_sum(t) if not t.is_meta else 1.0 for t in tensors]
    return [max(sums) / one if one else 1.0 for one in sums]


def energy_of_all(tiles: Tiles) -> list[float]:
    """Return each model's share of the sum of all squares; equal ones where nothing changed."""
    squares = [[float(t.to(torch.float64).square().sum()) for t in tile] for tile in tiles]
    sums = [math.fsum(parts) for parts in zip(*squares, strict=True)]
    return [one / math.fsum(sums) if any(sums) else 1 / len(sums) for one in sums]
