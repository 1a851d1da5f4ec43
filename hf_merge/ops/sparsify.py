"""Keep some entries of a task vector, drop the rest, and rescale what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_merge.ops.combine import divide_, weighted_sum
from hf_merge.ops.random import bernoulli
from hf_merge.types import Stack, Tiles

_DIGIT = 16  # bits of a magnitude that one histogram sorts out
_FEW = 1 << 16  # up to here kthvalue is quicker than two histograms
_L1_FLOOR = 1e-7


@dataclass(frozen=True)
class Threshold:
    """Where a tensor is cut: kept are magnitudes above `bits`, and equal ones up to index `last`.

    Attributes:
        bits: a magnitude as the integer of its bit pattern, which has the order of the magnitudes.
        last: index of the last entry kept among those of exactly this magnitude.
    """

    bits: int
    last: int


KEEP_ALL = Threshold(bits=-1, last=-1)
KEEP_NONE = Threshold(bits=(1 << 63) - 1, last=-1)
_TO_THE_END = (1 << 63) - 1


def magnitude_bits(tensor: Tensor) -> Tensor:
    """Return |tensor| as integers of the same order (int32 for float32, int64 for float64)."""
    return tensor.abs().view(_words(tensor))


def _words(tensor: Tensor) -> torch.dtype:
    """The integers that are as wide as a tensor's floats."""
    return torch.int64 if tensor.dtype == torch.float64 else torch.int32


def magnitude_thresholds(tiles: Tiles, *, density: Sequence[float]) -> list[Threshold]:
    """Find, for every model, the cut that keeps exactly max(1, int(density * N)) largest magnitudes.

    Selection is exact and sorts nothing: histograms of 16 bits of the magnitude at a time find the k-th
    largest. Entries of equal magnitude are kept in the order of their index.

    Args:
        tiles: one tensor of every model, float32 or float64.
        density: fraction to keep, one for each model; >= 1 keeps all, <= 0 none.
    """
    found = _kth_largest(tiles, {i: partial(_share, d) for i, d in enumerate(density) if 0 < d < 1})
    return [found.get(i, KEEP_ALL if d > 0 else KEEP_NONE) for i, d in enumerate(density)]


def magnitude_levels(tiles: Tiles, *, density: Sequence[float]) -> list[Threshold]:
    """Find, for every model, the magnitude of rank int(density * N) + 1: it is kept, with all that equal it.

    Args:
        tiles: all tensors of every model, as one.
        density: fraction to keep, one for each model; >= 1 keeps all, <= 0 none.
    """
    ranks: Ranks = {i: partial(_one_more, d) for i, d in enumerate(density) if 0 < d < 1}
    levels, _, _ = _selected(tiles, ranks)
    found = {i: Threshold(bits, _TO_THE_END) for i, bits in levels.items()}
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
    cut = {i for i, d in enumerate(density) if d < 1}
    lower = _kth_largest(tiles, {i: partial(_down_to, density[i], gamma[i]) for i in cut})
    upper = _kth_largest(tiles, {i: partial(_dropped, density[i], gamma[i]) for i in cut})
    return [Band(lower.get(i, KEEP_ALL), upper.get(i, KEEP_NONE)) for i in range(len(density))]


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
    level = torch.tensor(bits, dtype=_words(delta)).view(delta.dtype).item()
    return torch.nn.functional.hardshrink(delta, level)


def keep_random(delta: Tensor, density: float, seed: int, start: int = 0) -> Tensor:
    """Keep each entry of a task vector's tile with probability `density`."""
    if density >= 1:
        return delta
    return delta.view(_words(delta)).bitwise_and(bernoulli(seed, density, delta, start)).view(delta.dtype)


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
    before, after = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    for tile in tiles if models else ():
        for i in models:
            before[i] += float(tile[i].abs().sum(dtype=torch.float64))
            after[i] += float(sparsify(tile, i).abs().sum(dtype=torch.float64))
    return [_l1_factor(before[i], after[i]) if i in before else 1.0 for i in range(len(density))]


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
    return [_scaled(keep_largest(d, c, deltas.start), f) for d, c, f in zip(deltas, cut, factors, strict=True)]


def trimmed(
    tiles: Tiles, cut: Sequence[Threshold], factors: Sequence[float], weight: Sequence[float]
) -> Iterator[list[Tensor]]:
    """Yield the trimmed, rescaled and weighted tiles of all task vectors."""
    for tile in tiles:
        yield [kept * w for kept, w in zip(trim(tile, cut, factors), weight, strict=True)]


def trim_both(deltas: Stack, bands: Sequence[Band], factors: Sequence[float]) -> list[Tensor]:
    """Keep a band of every task vector's entries and rescale them."""
    return [_scaled(keep_band(d, b, deltas.start), f) for d, b, f in zip(deltas, bands, factors, strict=True)]


def drop(deltas: Stack, density: Sequence[float], seed: Sequence[int], factors: Sequence[float]) -> list[Tensor]:
    """Drop entries of every task vector at random and rescale the rest."""
    drawn = zip(deltas, density, seed, factors, strict=True)
    return [_scaled(keep_random(d, p, s, deltas.start), f) for d, p, s, f in drawn]


def possible_by_rank(*, density: Sequence[float], epsilon: Sequence[float]) -> None:
    """Refuse densities to whose both sides there is no room for epsilon."""
    for d, e in zip(density, epsilon, strict=True):
        if 0 < d < 1 and not 0 < d - e <= d + e < 1:
            raise ValueError(
                f"density {d:g} with epsilon {e:g} gives probabilities outside of (0, 1): "
                f"set epsilon below {min(d, 1 - d):g}, or density to 0 or 1"
            )


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Return the probability with which DELLA keeps each entry of a whole task vector.

    It rises evenly from density - epsilon for the smallest to density + epsilon for the largest magnitude of a
    row, which is a run along dim 1 (a vector is one row); among equals, with the index. A row of one has `density`.
    """
    dim = min(delta.dim() - 1, 1)
    if dim < 0 or delta.shape[dim] < 2:
        return torch.full_like(delta, density)
    length = delta.shape[dim]
    ladder = torch.linspace(density - epsilon, density + epsilon, length, dtype=delta.dtype)  # devices round it apart
    ladder = ladder.to(delta.device).view(-1, *[1] * (delta.dim() - dim - 1)).expand(delta.shape)
    return torch.empty_like(delta).scatter_(dim, magnitude_bits(delta).argsort(dim=dim, stable=True), ladder)


def drop_by_rank(
    deltas: Stack, density: Sequence[float], epsilon: Sequence[float], seed: Sequence[int], rescale: str
) -> list[Tensor]:
    """Drop entries of whole task vectors at random, small ones more often, and rescale the rest.

    Args:
        deltas: whole task vectors in their shape.
        density: mean probability to keep an entry, one for each model; >= 1 keeps all, <= 0 none.
        epsilon: how far the probabilities of a row reach to both sides of it.
        seed: one for each model.
        rescale: `l1` matches the L1 norm of the tensor before, `density` divides every entry by its probability.
    """
    drawn = zip(deltas, density, epsilon, seed, strict=True)
    return [_drop_by_rank(d, p, e, s, rescale) if 0 < p < 1 else d * (p > 0) for d, p, e, s in drawn]


def _drop_by_rank(delta: Tensor, density: float, epsilon: float, seed: int, rescale: str) -> Tensor:
    probability = rank_probabilities(delta, density, epsilon)
    kept = delta.view(_words(delta)).bitwise_and(bernoulli(seed, probability, delta)).view(delta.dtype)
    if rescale == "density":
        return kept.div_(probability)
    if rescale == "none" or delta.device.type == "meta":
        return kept
    return _scaled(kept, _l1_factor(*(float(t.abs().sum(dtype=torch.float64)) for t in (delta, kept))))


def variance_threshold(tiles: Tiles, *, select_topk: float) -> Threshold:
    """Find the cut that keeps the fraction `select_topk` of those entries that vary between the models at all."""
    if select_topk >= 1:
        return KEEP_ALL
    spread = Derived(tiles, lambda tile: [variance(tile)])
    varying = sum(int(tile[0].count_nonzero()) for tile in spread)
    return _kth_largest(spread, {0: lambda size: int(varying * select_topk)}).get(0, KEEP_NONE)


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
    places = [int(q * (values.numel() - 1)) for q in fractions]
    negative = int((values < 0).sum())
    signs = [1.0 if place >= negative else -1.0 for place in places]
    sides = {sign: (values * sign).clamp_(min=0) for sign in set(signs)}  # the other sign is at the bottom, as zeros
    ranks = {i: partial(_from_the_top, place, sign) for i, (place, sign) in enumerate(zip(places, signs, strict=True))}
    found = _kth_largest([Stack([sides[sign] for sign in signs])], ranks)
    bits = torch.tensor([found[i].bits for i in ranks], dtype=_words(values))
    return bits.view(values.dtype) * torch.tensor(signs, dtype=values.dtype)


def _from_the_top(place: int, sign: float, size: int) -> int:
    return size - place if sign > 0 else place + 1


def sorted_at(tiles: Tiles, places: Sequence[Callable[[int], int]]) -> list[float]:
    """Return for each model the entry at places[i](N) of its N sorted values, exactly; 0 if there are no entries."""
    negative, size = [0] * len(places), 0
    for tile in tiles:
        size += tile[0].numel()
        negative = [count + int((t < 0).sum()) for count, t in zip(negative, tile, strict=True)]
    if not size:
        return [0.0] * len(places)
    at = [place(size) for place in places]
    signs = [1.0 if place >= count else -1.0 for place, count in zip(at, negative, strict=True)]
    sides = Derived(tiles, lambda tile: [(t * s).clamp_(min=0) for t, s in zip(tile, signs, strict=True)])
    ranks = {i: partial(_from_the_top, place, sign) for i, (place, sign) in enumerate(zip(at, signs, strict=True))}
    words = _words(next(iter(tiles))[0])
    found = [torch.tensor(bits, dtype=words) for bits in _selected(sides, ranks)[0].values()]
    floats = torch.float64 if words == torch.int64 else torch.float32
    return [float(bits.view(floats)) * sign for bits, sign in zip(found, signs, strict=True)]


@dataclass(frozen=True)
class Derived:
    """Tiles of tensors that are computed from the tiles of others."""

    tiles: Tiles
    by: Callable[[Stack], Sequence[Tensor]]

    def __iter__(self) -> Iterator[Stack]:
        for tile in self.tiles:
            yield Stack(self.by(tile), start=tile.start)

    @property
    def numel(self) -> int:
        return getattr(self.tiles, "numel", None) or next(iter(self.tiles))[0].numel()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _kth_largest(tiles: Tiles, ranks: Ranks) -> dict[int, Threshold]:
    """Select for each model i the magnitude of which ranks[i](N) out of N entries are at least as large."""
    prefix, wanted, equal = _selected(tiles, ranks)
    if not prefix:
        return {}
    last = dict.fromkeys(ranks, _TO_THE_END)
    split = {i: wanted[i] for i in ranks if 0 < wanted[i] < equal[i]}
    last |= _index_of_equal(tiles, prefix, split)
    return {i: Threshold(prefix[i], last[i]) if wanted[i] else KEEP_NONE for i in ranks}


def _selected(tiles: Tiles, ranks: Ranks) -> _Found:
    first = next(iter(tiles), None) if ranks else None
    if first is None or not first[0].numel():
        return {}, {}, {}
    select = _sort_out if getattr(tiles, "numel", first[0].numel()) <= _FEW else _radix_select
    return select(tiles, ranks)


Ranks = dict[int, Callable[[int], int]]
"""By model: how many of N entries are kept, as a function of N; 0 keeps none."""
_Found = tuple[dict[int, int], dict[int, int], dict[int, int]]
"""By model: a magnitude's bits, how many of the entries that equal it are kept, and how many there are."""


def _sort_out(tiles: Tiles, ranks: Ranks) -> _Found:
    """Find the magnitudes of a small tensor at once."""
    prefix, wanted, equal = {}, {}, {}
    for i, rank_of in ranks.items():
        bits = torch.cat([magnitude_bits(tile[i]).flatten() for tile in tiles])
        rank = rank_of(len(bits))
        prefix[i] = int(bits.kthvalue(len(bits) - max(rank, 1) + 1).values)
        wanted[i] = rank - int((bits > prefix[i]).sum())
        equal[i] = int((bits == prefix[i]).sum())
    return prefix, wanted, equal


def _radix_select(tiles: Tiles, ranks: Ranks) -> _Found:
    """Find the leading bits of the magnitudes digit by digit, each in one pass over the tiles."""
    width = next(iter(tiles))[0].dtype.itemsize * 8 - 1
    prefix, wanted = dict.fromkeys(ranks, 0), {}
    counts: dict[int, Tensor] = {}
    for shift in reversed(range(0, width, _DIGIT)):
        bins = 1 << min(_DIGIT, width - shift)
        counts = {i: torch.zeros(bins, dtype=torch.int64) for i in ranks}
        for tile in tiles:
            for i in ranks:
                counts[i] += _digit_counts(magnitude_bits(tile[i]), prefix[i], shift, bins, width)
        wanted = wanted or {i: rank_of(int(counts[i].sum())) for i, rank_of in ranks.items()}
        for i, count in counts.items():
            digit, above = _bin_of_rank(count, wanted[i])
            prefix[i], wanted[i] = prefix[i] * bins + digit, wanted[i] - above
    return prefix, wanted, {i: int(count[prefix[i] % len(count)]) for i, count in counts.items()}


def _share(density: float, size: int) -> int:
    return max(1, int(density * size))


def _digit_counts(bits: Tensor, prefix: int, shift: int, bins: int, width: int) -> Tensor:
    """Count the digits at `shift` of the magnitudes that begin with `prefix`."""
    digits = bits.flatten() >> shift
    if bins << shift < 1 << width:
        near = digits.bitwise_right_shift(bins.bit_length() - 1).eq_(prefix).nonzero().flatten()
        digits = digits[near].bitwise_and_(bins - 1)
    return torch.bincount(digits, minlength=bins).cpu()


def _bin_of_rank(count: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the rank-th largest entry, and how many entries lie in the bins above."""
    reached = count.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, rank))
    return len(count) - 1 - place, int(reached[place] - count[len(count) - 1 - place])


def _index_of_equal(tiles: Tiles, prefix: dict[int, int], split: dict[int, int]) -> dict[int, int]:
    """Return for each model in `split` the index of the split[i]-th entry whose magnitude equals prefix[i]."""
    seen, last = dict.fromkeys(split, 0), {}
    for tile in tiles if split else ():
        for i in split.keys() - last.keys():
            places = magnitude_bits(tile[i]).flatten().eq_(prefix[i]).nonzero().flatten()
            if seen[i] + len(places) >= split[i]:
                last[i] = tile.start + int(places[split[i] - seen[i] - 1])
            seen[i] += len(places)
        if len(last) == len(split):
            break
    return last
