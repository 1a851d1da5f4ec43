"""What the verbs give that have a compiled loop, to compare both ways: by `ops.loops`, and by tests."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_merge.ops.casts import narrowed, widen
from hf_merge.ops.combine import disjoint_sum, weighted_sum
from hf_merge.ops.dropping import keep_by_rank
from hf_merge.ops.random import keep_random
from hf_merge.ops.sparsify import magnitude_thresholds
from hf_merge.ops.sums import magnitude_sums
from hf_merge.types import Stack

_SIZE = 70_001  # more than is sorted at once, and not a multiple of anything


def samples(seed: int = 0) -> list[Tensor]:
    """Return float32s of all sizes and both signs, with zeros and with many that are equal."""
    generator = torch.Generator().manual_seed(seed)
    exponents = [torch.randint(-140, 60, (_SIZE,), generator=generator) for _ in range(2)]
    wide = [torch.ldexp(torch.randn(_SIZE, generator=generator), exponent) for exponent in exponents]
    few = torch.randint(-3, 4, (_SIZE,), generator=generator).float()
    return [*wide, torch.randn(_SIZE, generator=generator), few]


def results() -> list[bytes]:
    """Return what each verb gives, as bytes."""
    tensors = samples()
    weight = [0.3, -1.7, 1.0, 0.0]
    cuts = magnitude_thresholds([Stack(tensors)], density=[0.2, 0.5, 0.9, 0.6])
    halves = [tensor.bfloat16() for tensor in tensors[2:]]
    made = [torch.empty(_SIZE) for _ in range(2)]
    finite = [widen(halves[0], made[0]), widen(halves[1], made[1], minus=tensors[0])]
    found = [
        weighted_sum(tensors, weight),
        disjoint_sum(tensors, weight, normalize=True),
        disjoint_sum(tensors, [1.0, 1.0, 1.0, 1.0], normalize=False, undecided=-1.0),
        keep_random(tensors[2], 0.4, seed=7, start=99),
        *(keep_by_rank(tensor[:70_000].view(70, 1000), 0.5, 0.2, seed=7) for tensor in tensors[2:]),
        torch.tensor([[cut.bits, cut.last] for cut in cuts]),
        torch.tensor([sums for tensor in tensors for sums in magnitude_sums(tensor)], dtype=torch.float64),
        *made,
        torch.tensor(finite),
        *(narrowed(tensor, torch.bfloat16)[0] for tensor in tensors),
    ]
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in found]
