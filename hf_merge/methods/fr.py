"""FR-Merging."""

from functools import partial
from typing import Annotated, Literal

import torch

from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum, magnitude_shares, to_the_largest
from hf_merge.ops.fourier import in_blocks, radial_high_pass, released_filter
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
    variant: Literal["paper", "reference"] = "paper",
    cut: NonNegative = 0.05,
    filter_ratio: Fraction = 0.7,
    with_align: bool = False,
    split: Count = 1,
) -> Merged:
    """Remove the low frequencies of every matrix of the task vectors, and add them up.

        v_i = real(F^-1(H * F(model_i - base)))
        merged = base + lambda * sum_i a_i v_i
        paper: H = 1 where sqrt(f_row^2 + f_column^2) >= cut, else 0;  a_i = mean|d_i| / sum_j mean|d_j| over the model
        reference: H = 1 within filter_ratio * min(rows, columns) of the spectrum's middle, else 0;  a_i = 1

    Args:
        variant: filter and coefficients of the paper, or those of the released code (reference).
        cut: radius of what the paper's filter removes; 1 is the Nyquist frequency.
        filter_ratio: radius of what the released filter keeps, as a part of the shorter side.
        with_align: in the released variant, scale every v_i to the largest mean|v_j| of the tensor.
        split: filter so many blocks of rows apart, 3 for a fused qkv; one where the rows cannot be split so.

    Good for:
        Fine-tunes of one base whose sum loses skills, as an experiment: its cut is worth choosing on validation data;
        needs a base.

    In words:
        Removes the low frequencies from the changes of {models} ({variant:paper=as in the paper|reference=as in the
        released code}), adds up the rest, and adds {lambda:g} times the result to {base}.

    Notes:
        The released filter removes next to nothing of a square matrix and two thirds of one of 4 to 1, doubles a few
        frequencies, and depends on whether q, k and v are stored in one tensor; its sum needs a lambda for each number
        of tasks: 0.7 with align for 8, 0.15 for 30, 0.5 for language models. The code leaves what is no matrix at the
        base; the paper's variant adds it up unfiltered. Its coefficients sum to 1, and no published cut is known.
        With a split of 3 a fused qkv gives what q, k and v that are stored apart do. The way back is not offered, as a
        method sees one tensor at a time: to filter separate q, k and v as the fused matrix of open_clip's checkpoints,
        concatenate their rows before, merge by merge_state_dicts, and cut the result.
    """
    first = deltas[0]
    if first.dim() != 2 or not first.numel():
        return exact_sum(deltas, shares) if shares else torch.zeros_like(first)
    by = partial(radial_high_pass, cut=cut) if variant == "paper" else partial(released_filter, ratio=filter_ratio)
    aligned = to_the_largest(in_blocks(d, split, by) for d in deltas) if with_align and not shares else None
    return in_blocks(exact_sum(deltas, shares or aligned or [1.0] * len(deltas)), split, by)  # filters are linear
