"""Lengths and angles of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_merge.types import Tiles


@dataclass(frozen=True)
class Angle:
    """Norms of two tensors, each taken as one vector, and the cosine between them."""

    norm_a: float
    norm_b: float
    cosine: float


def angle_to_base(tiles: Tiles) -> Angle:
    """Measure the base (a) against the first model (b), in float64. A norm below 1e-8 counts as 1."""
    squares_a = squares_b = product = 0.0
    for tile in tiles:
        if tile.base is None:
            raise TypeError("an angle to the base needs a base")
        a, b = tile.base.to(torch.float64).flatten(), tile[0].to(torch.float64).flatten()
        squares_a, squares_b = squares_a + float(a @ a), squares_b + float(b @ b)
        product += float(a @ b)
    norm_a, norm_b = (norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(squares_a), math.sqrt(squares_b)))
    return Angle(norm_a, norm_b, max(-1.0, min(1.0, product / (norm_a * norm_b))))


def slerp_coefficients(cosine: float, t: float, *, colinear: float) -> tuple[float, float]:
    """Return what a and b are multiplied by; linear interpolation where |cosine| exceeds `colinear`."""
    if abs(cosine) > colinear:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
