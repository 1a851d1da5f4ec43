"""The k-th largest magnitude of tensors that come in tiles: exactly, and without sorting them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hf_merge.ops import loops
from hf_merge.ops.casts import integer_dtype
from hf_merge.types import Stack, Tiles

_DIGIT = 16  # bits of a magnitude that one histogram sorts out
_FEW = 1 << 16  # up to here a tensor is looked at as a whole
_GATHERED = 1 << 20  # entries that may be held of a tensor: those that begin like the one that is looked for

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Threshold:
    """Where a tensor is cut: kept are magnitudes above `bits`, and equal ones up to index `last`.

    Attributes:
        bits: a magnitude as the integer of its bit pattern, which has the order of the magnitudes.
        last: index of the last entry kept among those of exactly this magnitude.
    """

    bits: int
    last: int


TO_THE_END = (1 << 63) - 1
KEEP_ALL = Threshold(bits=-1, last=-1)
KEEP_NONE = Threshold(bits=(1 << 63) - 1, last=-1)


class Rank(NamedTuple):
    """What is looked for: of model `model`, the magnitude of which `of(N)` out of N entries are at least as large."""

    model: int
    of: Callable[[int], int]


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


def magnitude_bits(tensor: Tensor) -> Tensor:
    """Return |tensor| as integers of the same order (int32 for float32, int64 for float64)."""
    return tensor.abs().view(integer_dtype(tensor))


def kth_largest(tiles: Tiles, ranks: Mapping[Key, Rank]) -> dict[Key, Threshold]:
    """Find the cuts that keep as many of the largest magnitudes as the ranks say; of equal ones the first.

    A histogram of the leading 16 bits, in one pass over the tiles, tells with which bits the one that is looked for
    begins; the few entries that begin like it are gathered in a second pass and settled among themselves. Where they
    are many, because magnitudes repeat, histograms of the next bits come in between.

    Args:
        tiles: float32 or float64; read as often as said.
        ranks: what is looked for. A rank of 0 keeps none.

    Returns:
        The cuts by the keys of `ranks`; nothing if there are no entries.
    """
    first = next(iter(tiles), None) if ranks else None
    if first is None or not first[0].numel():
        return {}
    width = first[0].dtype.itemsize * 8 - 1
    searches = {key: _Search(rank, width) for key, rank in ranks.items()}
    if getattr(tiles, "numel", first[0].numel()) > _FEW:
        _narrow(tiles, list(searches.values()), width)
    _gather(tiles, [one for one in searches.values() if one.is_open])
    return {key: one.threshold() for key, one in searches.items()}


class _Held:
    """Magnitudes and their indices, in memory that is taken once: pieces between the temporaries of tiles would keep
    the allocator from using these again."""

    def __init__(self, capacity: int):
        self._room = torch.empty(2, max(capacity, 1), dtype=torch.int64)
        self.count = 0

    def add(self, bits: Tensor, places: Tensor) -> None:
        end = self.count + len(bits)
        if end > self._room.shape[1]:
            self._room = torch.cat([self._room, torch.empty(2, 2 * end, dtype=torch.int64)], dim=1)
        self._room[0, self.count : end], self._room[1, self.count : end] = bits, places
        self.count = end

    @property
    def bits(self) -> Tensor:
        return self._room[0, : self.count]

    @property
    def places(self) -> Tensor:
        return self._room[1, : self.count]


@dataclass
class _Search:
    """What is known of a magnitude that is looked for: that its bits above `shift` are `prefix`.

    Attributes:
        left: how many entries begin like it; -1 if they were not counted.
        kept: how many of these are kept; as many as the rank says if none were counted.
        held: those entries, once they are looked at.
        last: index of the last one kept, where they are all equal and were too many to hold.
    """

    rank: Rank
    shift: int
    prefix: int = 0
    left: int = -1
    kept: int = -1
    held: _Held | None = None
    last: int = TO_THE_END

    @property
    def is_open(self) -> bool:
        """Whether the entries that are left must be looked at."""
        return self.kept != 0 and not (self.shift == 0 and self.kept == self.left)

    def descend(self, counts: Tensor, shift: int) -> None:
        """Go into the bin of the next digit in which the magnitude lies."""
        if self.left < 0:
            self.kept = self.rank.of(int(counts.sum()))
        reached = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, self.kept))
        digit = len(counts) - 1 - place
        self.left = int(counts[digit])
        self.kept -= int(reached[place]) - self.left
        self.prefix, self.shift = self.prefix * len(counts) + digit, shift

    def look(self, tile: Stack) -> None:
        """Hold the entries of a tile that begin like the one that is looked for, or go on counting equal ones."""
        tensor = tile[self.rank.model]
        if self.shift == 0 and self.left > _GATHERED:
            place, seen = _place_of_equal(tensor, self.prefix, self.kept) if self.last == TO_THE_END else (-1, 0)
            self.last = tile.start + place if place >= 0 else self.last
            self.kept -= seen if place < 0 else 0
            return
        self.held = self.held or _Held(self.left)
        bits, places = _beginning_with(tensor, self.prefix, self.shift)
        self.held.add(bits, places + tile.start)

    def threshold(self) -> Threshold:
        """Settle it among the entries that are held, if any are."""
        if self.kept == 0:
            return KEEP_NONE
        if self.held is None:
            return Threshold(self.prefix, self.last)
        bits, places = self.held.bits, self.held.places
        kept = self.rank.of(len(bits)) if self.left < 0 else self.kept
        if kept == 0:
            return KEEP_NONE
        level = int(bits.kthvalue(len(bits) - kept + 1).values)
        equal = bits == level
        kept -= int((bits > level).sum())
        last = TO_THE_END if kept == int(equal.sum()) else int(places[equal][kept - 1])
        return Threshold(level, last)


def _narrow(tiles: Tiles, searches: Sequence[_Search], width: int) -> None:
    """Learn the leading bits, digit by digit, until few entries begin with them."""
    for shift in reversed(range(0, width, _DIGIT)):
        going = [one for one in searches if one.left < 0 or (one.left > _GATHERED and one.kept)]
        if not going:
            return
        bins = 1 << min(_DIGIT, width - shift)
        counts = {(one.rank.model, one.prefix): torch.zeros(bins, dtype=torch.int64) for one in going}
        for tile in tiles:
            for (model, prefix), count in counts.items():
                _count_digits(tile[model], prefix, shift, width, count)
        for one in going:
            one.descend(counts[one.rank.model, one.prefix], shift)


def _gather(tiles: Tiles, searches: Sequence[_Search]) -> None:
    for tile in tiles if searches else ():
        for one in searches:
            one.look(tile)


def _count_digits(tensor: Tensor, prefix: int, shift: int, width: int, counts: Tensor) -> None:
    """Add the number of each digit at `shift` of the magnitudes that begin with `prefix` to `counts`."""
    if loops.take(tensor):
        loops.count_digits(tensor, prefix, shift, counts)
        return
    bins, digits = len(counts), magnitude_bits(tensor).flatten() >> shift
    if bins << shift < 1 << width:
        near = digits.bitwise_right_shift(bins.bit_length() - 1).eq_(prefix).nonzero().flatten()
        digits = digits[near].bitwise_and_(bins - 1)
    counts += torch.bincount(digits, minlength=bins).cpu()


def _beginning_with(tensor: Tensor, prefix: int, shift: int) -> tuple[Tensor, Tensor]:
    """Return the bits of those magnitudes whose bits above `shift` are `prefix`, and their indices, on the CPU."""
    if loops.take(tensor):
        return loops.beginning_with(tensor, prefix, shift)
    bits = magnitude_bits(tensor).flatten()
    places = (bits >> shift).eq_(prefix).nonzero().flatten()
    return bits[places].cpu(), places.cpu()


def _place_of_equal(tensor: Tensor, bits: int, number: int) -> tuple[int, int]:
    """Return the index of the number-th magnitude of these bits, or -1, and how many there are up to there."""
    if loops.take(tensor):
        return loops.place_of_equal(tensor, bits, number)
    places = magnitude_bits(tensor).flatten().eq_(bits).nonzero().flatten()
    return (int(places[number - 1]), number) if len(places) >= number else (-1, len(places))
