"""Random bits from a counter: a function of (seed, element index), whatever the order, tiling, threads or device."""

from __future__ import annotations

import torch
from torch import Tensor

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
    key = _mixed(_mixed(seed) + (start >> 32))
    # The counter start + key, start + key + 1, ... as rows of a grid: one long torch.arange is slow.
    rows = torch.arange(-(-numel // _ROW), dtype=torch.int32, device=device).mul_(_ROW).add_(_signed(start + key))
    x = (rows[:, None] + torch.arange(_ROW, dtype=torch.int32, device=device)).view(-1)[:numel]
    half = torch.empty_like(x)
    x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=half).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_(_signed(key >> 32))
    x.bitwise_xor_(torch.bitwise_right_shift(x, 15, out=half).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=half).bitwise_and_(0xFFFF))


def bernoulli(seed: int, probability: float | Tensor, like: Tensor, start: int = 0) -> Tensor:
    """Draw an integer mask for each element of `like`: all bits set with `probability`, none otherwise.

    Applied to the bits of a float it keeps or clears it, at a tenth of the price of a boolean mask in torch.

    Args:
        seed: 64 bits.
        probability: one for all elements, or a tensor with one for each.
        like: gives shape and device.
        start: index of the first element.
    """
    if isinstance(probability, Tensor):
        level = probability.clamp(0, 1 - 2**-24).mul_(_WORD).sub_(_WORD >> 1).to(torch.int32)
        below = random_bits(seed, start, like.numel(), like.device).view(like.shape).lt_(level)
        return below.bitwise_or_(probability >= 1).neg_()
    threshold = round(probability * _WORD)
    if not 0 < threshold < _WORD:
        return torch.full(like.shape, -1 if threshold > 0 else 0, dtype=torch.int32, device=like.device)
    bits = random_bits(seed, start, like.numel(), like.device)
    return bits.lt_(threshold - (_WORD >> 1)).neg_().view(like.shape)


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
