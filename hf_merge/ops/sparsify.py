"""Keep some entries of a task vector, drop the rest, and rescale what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_merge.ops.casts import integer_dtype
from hf_merge.ops.combine import divide_, scaled, weighted_sum
from hf_merge.ops.random import keep_random
from hf_merge.ops.selection import (
    KEEP_ALL,
    KEEP_NONE,
    TO_THE_END,
    Derived,
    Rank,
    Threshold,
    kth_largest,
)
from hf_merge.ops.sums import Magnitudes
from hf_merge.types import Stack, Tiles

_L1_FLOOR = 1e-7


def magnitude_thresholds(tiles: Tiles, *, density: Sequence[float]) -> list[Threshold]:
    """Find, for every model, the cut that keeps exactly max(1, int(density * N)) largest magnitudes.

    Entries of equal magnitude are kept in the order of their index.

    Args:
        tiles: one tensor of every model, float32 or float64.
        density: fraction to keep, one for each model; >= 1 keeps all, <= 0 none.
    """
    found = kth_largest(tiles, {i: Rank(i, partial(_share, d)) for i, d in enumerate(density) if 0 < d < 1})
    return [found.get(i, KEEP_ALL if d > 0 else KEEP_NONE) for i, d in enumerate(density)]


def _share(density: float, size: int) -> int:
    return max(1, int(density * size))


def magnitude_levels(tiles: Tiles, *, density: Sequence[float]) -> list[Threshold]:
    """Find, for every model, the magnitude of rank int(density * N) + 1: it is kept, with all that equal it.

    Args:
        tiles: all tensors of every model, as one.
        density: fraction to keep, one for each model; >= 1 keeps all, <= 0 none.
    """
    ranks = {i: Rank(i, partial(_one_more, d)) for i, d in enumerate(density) if 0 < d < 1}
    found = {i: Threshold(level.bits, TO_THE_END) for i, level in kth_largest(tiles, ranks).items()}
    return [found.get(i, KEEP_ALL if d > 0 else KEEP_NONE) for i, d in enumerate(density)]


def _one_more(density: float, size: int) -> int:
    return int(density * size) + 1


@dataclass(frozen=True)
class Band:
    """Which magnitudes of a tensor are kept: those above `lower` that are not above `upper`."""

    lower: Threshold
    upper: Threshold


def magnitude_bands(tiles: Tiles, *, density: Sequence[float], gamma: Sequence[float]) -> list[Band]:
    """Find, for every model, the band of int(density * N) magnitudes below the int(gamma * N) largest.

    Args:
        tiles: one tensor of every model.
        density: fraction to keep, one for each model; >= 1 keeps all.
        gamma: fraction of the largest to drop; less where they would leave too few.
    """
    cut = [i for i, d in enumerate(density) if d < 1]
    lower = {(i, "lower"): Rank(i, partial(_down_to, density[i], gamma[i])) for i in cut}
    upper = {(i, "upper"): Rank(i, partial(_dropped, density[i], gamma[i])) for i in cut}
    found = kth_largest(tiles, {**lower, **upper})
    return [Band(found.get((i, "lower"), KEEP_ALL), found.get((i, "upper"), KEEP_NONE)) for i in range(len(density))]


def _dropped(density: float, gamma: float, size: int) -> int:
    """How many of the largest magnitudes lie above the band."""
    return min(int(gamma * size), size - int(density * size))


def _down_to(density: float, gamma: float, size: int) -> int:
    return _dropped(density, gamma, size) + int(density * size)


def keep_band(delta: Tensor, band: Band, start: int = 0) -> Tensor:
    """Zero the entries of a task vector's tile whose magnitude lies outside of the band."""
    kept = keep_largest(delta, band.lower, start)
    return kept if band.upper == KEEP_NONE else kept - keep_largest(kept, band.upper, start)


def keep_largest(delta: Tensor, threshold: Threshold, start: int = 0) -> Tensor:
    """Zero the entries of a task vector's tile (first index `start`) that its threshold cuts."""
    if threshold == KEEP_ALL:
        return delta
    if threshold == KEEP_NONE:
        return torch.zeros_like(delta)
    kept = _above(delta, threshold.bits if threshold.last < start else threshold.bits - 1)
    if start <= threshold.last < start + delta.numel():
        beyond = slice(threshold.last + 1 - start, None)
        kept.view(-1)[beyond] = _above(delta.view(-1)[beyond], threshold.bits)
    return kept


def _above(delta: Tensor, bits: int) -> Tensor:
    """Zero the magnitudes up to the one with these bits. (A boolean mask would cost thirty times as much.)"""
    if bits < 0:
        return delta.clone()
    level = torch.tensor(bits, dtype=integer_dtype(delta)).view(delta.dtype).item()
    return torch.nn.functional.hardshrink(delta, level)


def rescale_factors(
    tiles: Tiles, sparsify: Callable[[Stack, int], Tensor], *, rescale: str, density: Sequence[float]
) -> list[float]:
    """Say by what to multiply each model's kept entries.

    `l1` matches the L1 norm of the tensor before (MergeKit); `density` divides by the density (DARE's
    paper, PEFT); `none` leaves them.

    Args:
        tiles: one tensor of every model.
        sparsify: gives the kept entries of model i in a tile.
        rescale: l1, density or none.
        density: one for each model.
    """
    if rescale == "density":
        return [1 / d if 0 < d < 1 else 1.0 for d in density]
    models = [i for i, d in enumerate(density) if 0 < d < 1] if rescale == "l1" else []
    before, after = ({i: Magnitudes() for i in models} for _ in range(2))
    for tile in tiles if models else ():
        for i in models:
            before[i].add(tile[i])
            after[i].add(sparsify(tile, i))
    return [_l1_factor(before[i].total(), after[i].total()) if i in before else 1.0 for i in range(len(density))]


def _l1_factor(before: float, after: float) -> float:
    return before / after if min(before, after) >= _L1_FLOOR else 1.0


def magnitude_factors(tiles: Tiles, *, cut: Sequence[Threshold], rescale: str, density: Sequence[float]) -> list[float]:
    """Rescale factors of task vectors trimmed by magnitude."""
    return rescale_factors(
        tiles, lambda tile, i: keep_largest(tile[i], cut[i], tile.start), rescale=rescale, density=density
    )


def band_factors(tiles: Tiles, *, bands: Sequence[Band], rescale: str, density: Sequence[float]) -> list[float]:
    """Rescale factors of task vectors trimmed at both ends."""
    return rescale_factors(
        tiles, lambda tile, i: keep_band(tile[i], bands[i], tile.start), rescale=rescale, density=density
    )


def random_factors(tiles: Tiles, *, rescale: str, density: Sequence[float], seed: Sequence[int]) -> list[float]:
    """Rescale factors of task vectors whose entries are dropped at random."""
    return rescale_factors(
        tiles, lambda tile, i: keep_random(tile[i], density[i], seed[i], tile.start), rescale=rescale, density=density
    )


def trim(deltas: Stack, cut: Sequence[Threshold], factors: Sequence[float]) -> list[Tensor]:
    """Keep the largest entries of every task vector and rescale them."""
    return [scaled(keep_largest(d, c, deltas.start), f) for d, c, f in zip(deltas, cut, factors, strict=True)]


def trimmed(
    tiles: Tiles, cut: Sequence[Threshold], factors: Sequence[float], weight: Sequence[float]
) -> Iterator[list[Tensor]]:
    """Yield the trimmed, rescaled and weighted tiles of all task vectors."""
    for tile in tiles:
        yield [scaled(kept, w) for kept, w in zip(trim(tile, cut, factors), weight, strict=True)]


def trim_both(deltas: Stack, bands: Sequence[Band], factors: Sequence[float]) -> list[Tensor]:
    """Keep a band of every task vector's entries and rescale them."""
    return [scaled(keep_band(d, b, deltas.start), f) for d, b, f in zip(deltas, bands, factors, strict=True)]


def drop(deltas: Stack, density: Sequence[float], seed: Sequence[int], factors: Sequence[float]) -> list[Tensor]:
    """Drop entries of every task vector at random and rescale the rest."""
    drawn = zip(deltas, density, seed, factors, strict=True)
    return [scaled(keep_random(d, p, s, deltas.start), f) for d, p, s, f in drawn]


def variance_threshold(tiles: Tiles, *, select_topk: float) -> Threshold:
    """Find the cut that keeps the fraction `select_topk` of those entries that vary between the models at all."""
    if select_topk >= 1:
        return KEEP_ALL
    spread = Derived(tiles, lambda tile: [variance(tile)])
    varying = sum(int(tile[0].count_nonzero()) for tile in spread)
    return kth_largest(spread, {0: Rank(0, lambda size: int(varying * select_topk))}).get(0, KEEP_NONE)


def variance(tensors: Sequence[Tensor]) -> Tensor:
    """Return the population variance of each entry over the models."""
    ones = [1.0] * len(tensors)
    mean = divide_(weighted_sum(tensors, ones), len(tensors))
    return divide_(weighted_sum([(tensor - mean).square_() for tensor in tensors], ones), len(tensors))


def keep_varying(deltas: Stack, cut: Threshold) -> Sequence[Tensor]:
    """Zero, in all task vectors, the entries whose variance over the models the threshold cuts."""
    if cut == KEEP_ALL:
        return deltas
    mask = keep_largest(variance(deltas), cut, deltas.start).gt_(0)
    return [delta * mask for delta in deltas]


def energy_shares(tiles: Tiles, *, cut: Threshold) -> list[float]:
    """Return each model's share of the mean square of the kept entries; equal ones where that is below 1e-6."""
    found, numel = [], 0
    for tile in tiles:
        found.append([float(kept.to(torch.float64).square().sum()) for kept in keep_varying(tile, cut)])
        numel += tile[0].numel()
    energy = [sum(parts) for parts in zip(*found, strict=True)]
    total = sum(energy)
    return [e / total if total and total >= 1e-6 * numel else 1 / len(energy) for e in energy]


def quantiles(values: Tensor, fractions: Sequence[float]) -> Tensor:
    """Return for each fraction q the entry at place trunc(q * (N - 1)) of all the sorted values."""
    if values.is_meta:
        return values.new_zeros(len(fractions))
    found = sorted_at([Stack([values])], [(0, partial(_at_share, q)) for q in fractions])
    return torch.tensor(found, dtype=values.dtype)


def _at_share(fraction: float, size: int) -> int:
    return int(fraction * (size - 1))


def sorted_at(tiles: Tiles, wanted: Sequence[tuple[int, Callable[[int], int]]]) -> list[float]:
    """Return sorted values by their places, exactly; 0 if there are no entries.

    Args:
        tiles: tensors of several models.
        wanted: of which model, and at which place of its N sorted values, as a function of N.
    """
    negative, size = [0] * len(next(iter(tiles), ())), 0
    for tile in tiles:
        size += tile[0].numel()
        negative = [count + int((t < 0).sum()) for count, t in zip(negative, tile, strict=True)]
    if not size:
        return [0.0] * len(wanted)
    signs = [1.0 if place(size) >= negative[model] else -1.0 for model, place in wanted]
    keys = [(model, sign) for (model, _), sign in zip(wanted, signs, strict=True)]
    sides = list(dict.fromkeys(keys))
    ranks = {
        i: Rank(sides.index(key), partial(_from_the_top, place(size), key[1]))
        for i, ((_, place), key) in enumerate(zip(wanted, keys, strict=True))
    }
    # The values of the other sign are at the bottom, as zeros.
    found = kth_largest(Derived(tiles, lambda tile: [(tile[m] * s).clamp_(min=0) for m, s in sides]), ranks)
    integers = integer_dtype(next(iter(tiles))[0])
    floats = torch.float64 if integers == torch.int64 else torch.float32
    bits = [torch.tensor(cut.bits, dtype=integers) for cut in found.values()]
    return [float(one.view(floats)) * sign for one, sign in zip(bits, signs, strict=True)]


def _from_the_top(place: int, sign: float, size: int) -> int:
    return size - place if sign > 0 else place + 1
