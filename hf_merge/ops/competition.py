"""How much each task's entry counts where tasks compete for it (PCB-Merging)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from hf_merge.ops.combine import weighted_sum
from hf_merge.ops.sparsify import Derived, sorted_at
from hf_merge.types import Tiles

_CLIPPED = 0.01
"""Part of the magnitudes that is clipped at either end."""


@dataclass(frozen=True)
class Limits:
    """A range that is mapped to 0 to 1; all to 0 if it is empty."""

    low: float
    high: float

    def clip(self, tensor: Tensor) -> Tensor:
        return tensor.clamp(self.low, self.high)

    def normalised(self, tensor: Tensor) -> Tensor:
        width = self.high - self.low
        return self.clip(tensor).sub_(self.low).mul_(1 / width if width and math.isfinite(1 / width) else 0.0)


def clipping_limits(tiles: Tiles) -> list[Limits]:
    """Find for every model the magnitudes between which all others are clipped."""
    magnitudes = Derived(tiles, lambda tile: [delta.abs() for delta in tile])
    count = len(next(iter(tiles), ()))
    found = sorted_at(magnitudes, [(i, place) for place in (_lowest, _highest) for i in range(count)])
    return [Limits(low, max(low, high)) for low, high in zip(found[:count], found[count:], strict=True)]


def _lowest(size: int) -> int:
    return int(size * _CLIPPED)


def _highest(size: int) -> int:
    return max(int(size * (1 - _CLIPPED) - 1), 0)


def score_limits(tiles: Tiles, *, clips: Sequence[Limits], ratio: float) -> list[Limits]:
    """Find for every model the score that wins nothing, and the one that wins most."""
    scored = Derived(tiles, lambda tile: scores(tile, clips))
    low = sorted_at(scored, [(i, partial(_place, 1 - ratio)) for i in range(len(clips))])
    high = [-math.inf] * len(clips)
    for tile in scored:
        high = [
            max(most, float(score.max()) if score.numel() else most) for most, score in zip(high, tile, strict=True)
        ]
    return [Limits(q, max(q, most)) for q, most in zip(low, high, strict=True)]


def _place(fraction: float, size: int) -> int:
    return min(int(size * fraction), size - 1)


def scores(deltas: Sequence[Tensor], clips: Sequence[Limits]) -> list[Tensor]:
    """Return exp(T n^2 - T) * tanh(d * sum_j sign(d_j) n_j); the constant factor keeps them within -1 to 1."""
    shares = [clip.normalised(delta.abs()) for delta, clip in zip(deltas, clips, strict=True)]
    signed = [share * delta.sign() for share, delta in zip(shares, deltas, strict=True)]
    agreed, count = weighted_sum(signed, [1.0] * len(signed)), len(deltas)
    own = [share.square_().sub_(1).mul_(count).exp_() for share in shares]
    return [mine.mul_((delta * agreed).tanh_()) for mine, delta in zip(own, deltas, strict=True)]


def balanced(
    deltas: Sequence[Tensor], clips: Sequence[Limits], limits: Sequence[Limits], coefficient: Sequence[float]
) -> Tensor:
    """Average the clipped task vectors by what their scores win; 0 where none wins."""
    wins = [limit.normalised(score) for limit, score in zip(limits, scores(deltas, clips), strict=True)]
    clipped = [clip.clip(delta.abs()).mul_(delta.sign()) for clip, delta in zip(clips, deltas, strict=True)]
    won = [mine * part for mine, part in zip(clipped, wins, strict=True)]
    return weighted_sum(won, coefficient) / weighted_sum(wins, [1.0] * len(wins)).clamp_(min=1e-12)
