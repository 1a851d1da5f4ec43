"""The loops behind some verbs, compiled by numba: imported by `ops.loops` alone, where they are switched on.

Each does in one pass over a tile what the verb in torch does in many, with every rounding in the same place, so that
both give the same bits. Products and sums are fused only where torch fuses them (`_FUSED`). All arrays are flat and
contiguous; floats come as their bit patterns where bits are what is meant. Without the GIL: threads run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import carray, njit  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray[Any, Any]
Loop = Callable[[Callable[..., Any]], Callable[..., Any]]

_STEP = 1 << 10  # entries that go through several short loops at a time: they stay in the nearest cache
_RUN = 1 << 6
_COMMON = {"nogil": True, "cache": True, "error_model": "numpy"}
_loop = cast("Loop", njit(**_COMMON))
_FUSED = cast("Loop", njit(**_COMMON, fastmath={"contract"}))
_ANY_ORDER = cast("Loop", njit(**_COMMON, fastmath={"reassoc"}))

_u32 = np.uint32
_u64 = np.uint64
_f32 = np.float32
_ZERO, _ONE = np.float32(0), np.float32(1)
_MAGNITUDE, _EXPONENT = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """Read an integer as an address: a list of arrays would be compiled anew for each length."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@_loop
def _array_at(address: int, size: int) -> Any:
    """Return the float32s that begin at an address."""
    return carray(_pointer(address), size, _f32)  # pyright: ignore[reportCallIssue]


@_loop
def widen(values: Array, out: Array) -> bool:
    """Write bfloat16s (as uint16) as float32s (as uint32); tell whether all are finite."""
    strange = _u32(0)
    for i in range(out.size):
        bits = _u32(_u32(values[i]) << _u32(16))
        strange |= _u32(_u32(bits & _EXPONENT) == _EXPONENT)
        out[i] = bits
    return strange == 0


@_loop
def widen_minus(values: Array, base: Array, out: Array) -> bool:
    """Write bfloat16s (as uint16) minus float32s; tell whether all bfloat16s are finite."""
    strange = _u32(0)
    for i in range(out.size):
        bits = _u32(_u32(values[i]) << _u32(16))
        strange |= _u32(_u32(bits & _EXPONENT) == _EXPONENT)
        out[i] = bits.view(_f32) - base[i]
    return strange == 0


@_loop
def narrow(values: Array, out: Array) -> bool:
    """Round float32s (as uint32) to bfloat16s (as uint16), to even; tell whether all are finite, also when rounded."""
    strange = _u32(0)
    for i in range(out.size):
        bits = values[i]
        rounded = _u32(_u32(bits + _u32(0x7FFF)) + _u32(_u32(bits >> _u32(16)) & _u32(1)))
        strange |= _u32(_u32(rounded & _EXPONENT) == _EXPONENT) | _u32(_u32(bits & _EXPONENT) == _EXPONENT)
        out[i] = np.uint16(rounded >> _u32(16))
    return strange == 0


@_loop
def count_digits(values: Array, prefix: int, shift: int, above: int, counts: Array) -> None:
    """Count the digits in bits `shift` to `above` of magnitudes (of float32s, as uint32) that begin with `prefix`."""
    few = np.zeros(counts.size, dtype=np.int32)  # half as much memory to go through
    mask, low, high = _u32(counts.size - 1), _u32(shift), _u32(above)
    if above >= 31:
        for i in range(values.size):
            few[_u32(values[i] & _MAGNITUDE) >> low] += 1
    else:
        for i in range(values.size):
            bits = _u32(values[i] & _MAGNITUDE)
            if _u32(bits >> high) == _u32(prefix):
                few[_u32(bits >> low) & mask] += 1
    for i in range(counts.size):
        counts[i] += few[i]


@_loop
def _how_many_begin(values: Array, wanted: Any, low: Any) -> Any:
    found = _u32(0)
    for i in range(values.size):
        found += _u32(_u32(_u32(values[i] & _MAGNITUDE) >> low) == wanted)
    return found


@_loop
def beginning_with(values: Array, prefix: int, shift: int, bits: Array, places: Array) -> int:
    """Write the magnitudes (of float32s, as uint32) whose bits above `shift` are `prefix`, and where; tell how many."""
    wanted, low, found = _u32(prefix), _u32(shift), 0
    for start in range(0, values.size, _RUN):
        run = values[start : start + _RUN]
        if _how_many_begin(run, wanted, low) == _u32(0):  # as most runs have none
            continue
        for i in range(run.size):
            magnitude = _u32(run[i] & _MAGNITUDE)
            if _u32(magnitude >> low) == wanted:
                bits[found] = magnitude
                places[found] = start + i
                found += 1
    return found


@_loop
def place_of_equal(values: Array, bits: int, number: int) -> tuple[int, int]:
    """Return (index of the number-th magnitude of these bits, or -1; how many were seen up to there)."""
    seen = 0
    for i in range(values.size):
        if _u32(values[i] & _MAGNITUDE) == _u32(bits):
            seen += 1
            if seen == number:
                return i, seen
    return -1, seen


@_loop
def _drawn(counter: Any, key: Any) -> Any:
    """Hash a counter to 32 bits, as `ops.random` says."""
    bits = _u32(_u32(counter ^ _u32(counter >> _u32(16))) * _u32(0x7FEB352D))
    bits = _u32(bits ^ key)
    bits = _u32(_u32(bits ^ _u32(bits >> _u32(15))) * _u32(0x846CA68B))
    return np.int32(_u32(bits ^ _u32(bits >> _u32(16))))


@_loop
def keep_random(values: Array, counter: int, key: int, level: int, out: Array) -> None:
    """Copy the entries (any 32 bits, as uint32) whose drawn bits are below `level`, and clear the others."""
    first, second, below = _u32(counter), _u32(key), np.int32(level)
    for i in range(out.size):
        out[i] = values[i] if _drawn(_u32(_u32(i) + first), second) < below else _u32(0)


@_loop
def keep_by_rank(values: Array, level: Array, counter: int, key: int, out: Array) -> None:
    """Copy the entries whose drawn bits are below the level of their magnitude's rank in their row; clear the others.

    A row is as long as `level`. Its entries (float32s, as uint32), each with its index behind it, are sorted by the 11
    low bits, the next 10 and the 10 above; after the last digit they need not be moved, as their place is their rank.
    """
    first, second, length = _u32(counter), _u32(key), level.size
    low, middle, high = np.empty(1 << 11, _u32), np.empty(1 << 10, _u32), np.empty(1 << 10, _u32)
    once, twice = np.empty(length, _u64), np.empty(length, _u64)
    for start in range(0, values.size, length):
        row, kept = values[start : start + length], out[start : start + length]
        _count_three_digits(row, low, middle, high)
        for i in range(length):
            entry = row[i]
            once[_next_place(low, entry & _u32(0x7FF))] = _u64(_u64(entry) << _u64(32)) | _u64(i)
        for j in range(length):
            both = once[j]
            twice[_next_place(middle, _u64(both >> _u64(43)) & _u64(0x3FF))] = both
        for j in range(length):
            both = twice[j]
            rank = _next_place(high, _u64(both >> _u64(53)) & _u64(0x3FF))
            i = _u32(both & _u64(0xFFFFFFFF))
            is_kept = _drawn(_u32(_u32(_u32(start) + i) + first), second) < level[rank]
            kept[i] = _u32(both >> _u64(32)) if is_kept else _u32(0)


@_loop
def _count_three_digits(row: Array, low: Array, middle: Array, high: Array) -> None:
    """Count each digit of a row's magnitudes, then write where the first entry with it belongs."""
    low[:], middle[:], high[:] = 0, 0, 0
    for i in range(row.size):
        bits = row[i]
        low[bits & _u32(0x7FF)] += _u32(1)
        middle[_u32(bits >> _u32(11)) & _u32(0x3FF)] += _u32(1)
        high[_u32(bits >> _u32(21)) & _u32(0x3FF)] += _u32(1)
    for counts in (low, middle, high):
        place = _u32(0)
        for i in range(counts.size):
            count = counts[i]
            counts[i] = place
            place = _u32(place + count)


@_loop
def _next_place(places: Array, digit: Any) -> Any:
    """Return the place of the next entry with this digit, and go on by one."""
    place = places[digit]
    places[digit] = _u32(place + _u32(1))
    return place


@_loop
def _largest(values: Array) -> Any:
    """Return the largest magnitude of float32s (as int32), as bits."""
    most = np.int32(0)
    for i in range(values.size):
        bits = np.int32(values[i] & np.int32(0x7FFFFFFF))
        most = bits if bits > most else most
    return most


@_ANY_ORDER
def _sum(values: Array) -> float:
    """Add numbers whose sums are all exact, so that their order does not matter."""
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@_loop
def magnitude_sums(values: Array, bits: Array, length: int, sums: Array) -> None:
    """Write the sum of magnitudes of each block of at most 16,384 float32s; `bits` are the same values as int32."""
    rounded = np.empty(_STEP)
    for block in range(sums.size):
        start = block * length
        stop = min(start + length, values.size)
        most = _largest(bits[start:stop])
        exponent = (np.int64(most) >> 23) - 126  # the largest is below 2 ** exponent, also if it is subnormal
        shift = 1.5 * 2.0 ** (exponent + 14)
        total = 0.0
        for at in range(start, stop, _STEP):
            part = values[at : min(at + _STEP, stop)]
            into = rounded[: part.size]
            for i in range(part.size):
                into[i] = (np.float64(abs(part[i])) + shift) - shift
            total += _sum(into)
        sums[block] = total


@_loop
def _multiplied(values: Array, factor: float, out: Array) -> None:
    for i in range(out.size):
        out[i] = values[i] * factor


@_FUSED
def _add_multiplied(values: Array, factor: float, out: Array) -> None:
    for i in range(out.size):
        out[i] = out[i] + values[i] * factor


@_loop
def weighted_sum(addresses: Array, weight: Array, out: Array) -> None:
    """Write the sum of weight[k] * the k-th array of float32s."""
    for start in range(0, out.size, _STEP):
        into = out[start : start + _STEP]
        for k in range(addresses.size):
            part = _array_at(addresses[k], out.size)[start : start + into.size]
            if k == 0:
                _multiplied(part, weight[k], into)
            else:
                _add_multiplied(part, weight[k], into)


@_loop
def disjoint_sum(addresses: Array, weight: Array, positive: bool, normalize: bool, out: Array) -> None:
    """Elect a sign for each entry and write the sum of the weighted entries that have it; see `ops.combine`."""
    votes, totals, divisors = np.empty(_STEP, _f32), np.empty(_STEP, _f32), np.empty(_STEP, _f32)
    for start in range(0, out.size, _STEP):
        into = out[start : start + _STEP]
        vote, total, divisor = votes[: into.size], totals[: into.size], divisors[: into.size]
        for k in range(addresses.size):
            part = _array_at(addresses[k], out.size)[start : start + into.size]
            if k == 0:
                _multiplied(part, weight[k], vote)
            else:
                _add_product(part, weight[k], vote)
        _elect(vote, positive)
        for i in range(into.size):
            total[i] = _ZERO
            divisor[i] = _ZERO
        for k in range(addresses.size):
            part = _array_at(addresses[k], out.size)[start : start + into.size]
            if normalize:
                _add_agreeing(part, weight[k], vote, total, divisor)
            else:
                _add_agreeing_alone(part, weight[k], vote, total)
        if normalize:
            _divided(total, vote, divisor, into)
        else:
            for i in range(into.size):
                into[i] = total[i] * vote[i]


@_loop
def _add_product(values: Array, factor: Any, total: Array) -> None:
    for i in range(total.size):
        total[i] = total[i] + values[i] * factor  # two roundings


@_loop
def _elect(vote: Array, positive: bool) -> None:
    if positive:
        for i in range(vote.size):
            vote[i] = _ONE if vote[i] >= _ZERO else -_ONE
    else:
        for i in range(vote.size):
            vote[i] = _ONE if vote[i] > _ZERO else -_ONE


@_loop
def _add_agreeing(values: Array, factor: Any, vote: Array, total: Array, divisor: Array) -> None:
    for i in range(vote.size):
        agreeing = values[i] * factor * vote[i]
        agreeing = _ZERO if agreeing <= _ZERO else agreeing  # NaN goes on
        total[i] = total[i] + agreeing
        divisor[i] = divisor[i] + (factor if agreeing > _ZERO else _ZERO)


@_loop
def _add_agreeing_alone(values: Array, factor: Any, vote: Array, total: Array) -> None:
    for i in range(vote.size):
        agreeing = values[i] * factor * vote[i]
        total[i] = total[i] + (_ZERO if agreeing <= _ZERO else agreeing)


@_loop
def _divided(total: Array, vote: Array, divisor: Array, out: Array) -> None:
    for i in range(out.size):
        by = divisor[i]
        out[i] = total[i] * vote[i] / (_ONE if by == _ZERO else by)
