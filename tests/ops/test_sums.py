"""Sums of magnitudes: right, and the same however the tensor is cut."""

import math

import pytest
import torch

from hf_merge.ops.agreement import samples
from hf_merge.ops.sums import Magnitudes, magnitude_sum


def cut(tensor, size):
    sums = Magnitudes()
    for start in range(0, tensor.numel(), size):
        sums.add(tensor[start : start + size])
    return sums.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4097, 16_384, 16_385, 50_000])
def test_the_sum_does_not_depend_on_where_the_tiles_are_cut(dtype, size):
    for tensor in samples():
        tensor = tensor[: 40_000 if size > 1 else 17_000].to(dtype)
        assert cut(tensor, size) == magnitude_sum(tensor)


def test_the_order_within_a_block_does_not_matter():
    for tensor in samples():
        block = tensor[:16_384]
        shuffled = block[torch.randperm(len(block), generator=torch.Generator().manual_seed(1))]
        assert magnitude_sum(shuffled) == magnitude_sum(block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_that_of_exact_arithmetic_to_the_precision_of_a_float32(dtype):
    for tensor in samples():
        exact = math.fsum(tensor.abs().tolist())
        assert magnitude_sum(tensor.to(dtype)) == pytest.approx(exact, rel=2**-24)


def test_nothing_and_zeros_sum_to_0():
    assert magnitude_sum(torch.empty(0)) == magnitude_sum(torch.zeros(3, 4)) == 0.0
