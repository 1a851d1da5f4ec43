"""Random bits from a counter: a function of (seed, element index), whatever the order, tiling, threads or device."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 1 << 32


def _signed(word: int) -> int:
    """Read the low 32 bits of `word` as a two's complement int32."""
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


def random_bits(seed: int, start: int, numel: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw 32 uniform bits for each of the elements start .. start + numel - 1 of a tensor.

    The counter goes through the two multiplications of Wellons' `lowbias32` hash
    (https://nullprogram.com/blog/2018/07/31/); the second half of the key enters between them, so that
    streams of different seeds are not shifted copies of one another.

    Args:
        seed: 64 bits.
        start: index of the first element.
        numel: how many elements.
        device: where to draw.

    Returns:
        int32, shape (numel,).
    """
    key = seed ^ ((start >> 32) * 0x9E3779B97F4A7C15)
    x = torch.arange(numel, dtype=torch.int32, device=device).add_(_signed(start + key))
    half = torch.empty_like(x)
    for shift, kept, factor in ((16, 0xFFFF, 0x7FEB352D), (15, 0x1FFFF, 0x846CA68B)):
        x.bitwise_xor_(torch.bitwise_right_shift(x, shift, out=half).bitwise_and_(kept))
        x.mul_(_signed(factor)).bitwise_xor_(_signed(key >> 32))
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=half).bitwise_and_(0xFFFF))


def bernoulli(seed: int, probability: float, like: Tensor, start: int = 0) -> Tensor:
    """Draw a boolean mask that is true with `probability`, one bit for each element of `like`."""
    if probability >= 1 or probability <= 0:
        return torch.full(like.shape, probability >= 1, dtype=torch.bool, device=like.device)
    bits = random_bits(seed, start, like.numel(), like.device)
    return (bits < round(probability * _WORD) - (_WORD >> 1)).view(like.shape)
