"""Random bits from a counter: a function of (seed, element index), whatever the order, tiling, threads or device."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_merge.ops import loops
from hf_merge.ops.casts import integer_dtype

_WORD = 1 << 32
_ROW = 1 << 10


def random_bits(seed: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw 32 uniform bits for each of the elements start .. start + numel - 1 of a tensor.

    The counter goes through the two multiplications of Wellons' `lowbias32` hash
    (https://nullprogram.com/blog/2018/07/31/). Half of the key is added before them and half enters between
    them, so that streams of different seeds are not shifted copies of one another.

    Args:
        seed: 64 bits.
        start: index of the first element.
        numel: how many elements.
        device: where to draw.

    Returns:
        int32, shape (numel,).
    """
    room = _WORD - start % _WORD
    if numel > room:  # the key changes where the low half of the index begins again
        parts = [random_bits(seed, start, room, device), random_bits(seed, start + room, numel - room, device)]
        return torch.cat(parts)
    key = _key(seed, start)
    # The counter start + key, start + key + 1, ... as rows of a grid: one long torch.arange is slow.
    rows = torch.arange(-(-numel // _ROW), dtype=torch.int32, device=device).mul_(_ROW).add_(_signed(start + key))
    x = (rows[:, None] + torch.arange(_ROW, dtype=torch.int32, device=device)).view(-1)[:numel]
    half = torch.empty_like(x)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=half).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_(_signed(key >> 32))
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=half).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=half).bitwise_and_(0xFFFF))


def levels(probability: Tensor) -> Tensor:
    """Return what drawn bits are below with these probabilities, each less than 1, as int32."""
    return probability.clamp(0, 1 - 2**-24).mul_(_WORD).sub_(_WORD >> 1).to(torch.int32)


def keep_below(values: Tensor, level: Tensor, seed: int, start: int = 0) -> Tensor:
    """Keep each entry (the first has the index `start`) whose drawn bits are below its level; clear the others."""
    below = random_bits(seed, start, values.numel(), values.device).view(values.shape).lt_(level)
    return _masked(values, below.neg_())


def bernoulli(seed: int, probability: float, like: Tensor, start: int = 0) -> Tensor:
    """Draw an integer mask for each element of `like`: all bits set with `probability`, none otherwise.

    Applied to the bits of a float it keeps or clears it, at a tenth of the price of a boolean mask in torch.

    Args:
        seed: 64 bits.
        probability: one for all elements.
        like: gives shape and device.
        start: index of the first element.
    """
    threshold = round(probability * _WORD)
    if not 0 < threshold < _WORD:
        return torch.full(like.shape, -1 if threshold > 0 else 0, dtype=torch.int32, device=like.device)
    bits = random_bits(seed, start, like.numel(), like.device)
    return bits.lt_(threshold - (_WORD >> 1)).neg_().view(like.shape)


def keep_random(values: Tensor, density: float, seed: int, start: int = 0) -> Tensor:
    """Keep each entry of a tile (first index `start`) with probability `density`, and clear the others.

    Args:
        values: float32 or float64.
        density: of what is kept; >= 1 keeps all.
        seed: 64 bits.
        start: index of the first element.
    """
    if density >= 1:
        return values
    threshold = round(density * _WORD)
    if loops.take(values) and 0 < threshold < _WORD and counts_on(start, values.numel()):
        return loops.keep_random(values, *counter_and_key(seed, start), threshold - (_WORD >> 1))
    return _masked(values, bernoulli(seed, density, values, start))


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Keep the floats whose bits in a mask are all set, and clear those whose are not."""
    return values.view(integer_dtype(values)).bitwise_and(mask).view(values.dtype)


def counts_on(start: int, numel: int) -> bool:
    """Tell whether one key holds for so many elements."""
    return start % _WORD + numel <= _WORD


def counter_and_key(seed: int, start: int) -> tuple[int, int]:
    """Return the two words with which element `start` enters the hash; the first counts on with the index."""
    key = _key(seed, start)
    return (start + key) % _WORD, key >> 32


def _key(seed: int, start: int) -> int:
    """Return the 64-bit key of a stream, which changes where the low half of the index begins again."""
    return _mixed(_mixed(seed) + (start >> 32))


def _mixed(key: int) -> int:
    """Spread a key over 64 bits, as Steele, Lea and Flood's SplitMix64 does (https://doi.org/10.1145/2660193.2660195)."""
    key = (key + 0x9E3779B97F4A7C15) % (1 << 64)
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return key ^ (key >> 31)


def _signed(word: int) -> int:
    """Read the low 32 bits of `word` as a two's complement int32."""
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word
