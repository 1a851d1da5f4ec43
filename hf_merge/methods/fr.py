"""FR-Merging."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum, magnitude_shares, to_the_largest
from hf_merge.ops.fourier import by_blocks, radial_high_pass, released_filter
from hf_merge.types import Count, Deltas, Fraction, Merged, NonNegative, Reduced, Tiles


def _shares(tiles: Tiles, *, variant: str) -> list[float]:
    return magnitude_shares(tiles) if variant == "paper" else []


@merge_method(paper="https://arxiv.org/abs/2411.16815")
def fr(
    deltas: Deltas,
    shares: Annotated[
        list[float], Reduced(_shares, over=lambda *, variant: "model" if variant == "paper" else "tensor")
    ],
    *,
    variant: Literal["reference", "paper"] = "reference",
    filter_ratio: Fraction = 0.7,
    with_align: bool = False,
    cut: NonNegative = 0.3,
    split: Count = 1,
) -> Merged:
    """Remove the low frequencies of every matrix of the task vectors, and add them up.

        v_i = real(F^-1(H * F(model_i - base)))
        merged = base + lambda * sum_i a_i v_i
        reference: H = 1 within filter_ratio * min(rows, columns) of the spectrum's middle, else 0;  a_i = 1
        paper: H = 1 where sqrt(f_row^2 + f_column^2) >= cut, else 0;  a_i = mean|d_i| / sum_j mean|d_j| over the model

    Args:
        variant: the released filter and coefficients, or the paper's.
        filter_ratio: radius of what the released filter keeps, as a part of the shorter side.
        with_align: in the released variant, scale every v_i to the largest mean|v_j| of the tensor.
        cut: radius of what the paper's filter removes; 1 is the Nyquist frequency.
        split: filter so many blocks of rows apart, 3 for a fused qkv; one where the rows cannot be split so.

    Notes:
        The published results are the released filter's, so it is the default. It removes next to nothing of a square
        matrix and two thirds of one of 4 to 1, doubles a few frequencies, and depends on whether q, k and v are stored
        in one tensor. It leaves what is no matrix at the base; the paper's variant adds that up unfiltered.
        Published values of lambda: 0.7 with align for 8 tasks, 0.15 for 30, 0.5 for language models.
    """
    first = deltas[0]
    if first.dim() != 2 or not first.numel():
        return exact_sum(deltas, shares) if shares else torch.zeros_like(first)

    def filtered(matrix: Tensor) -> Tensor:
        blocks = by_blocks(matrix, split)
        if variant == "paper":
            return torch.cat([radial_high_pass(block, cut) for block in blocks])
        return torch.cat([released_filter(block, filter_ratio) for block in blocks])

    factors = shares or (to_the_largest([filtered(d) for d in deltas]) if with_align else [1.0] * len(deltas))
    return filtered(exact_sum(deltas, factors))  # linear, so one filter does for all
