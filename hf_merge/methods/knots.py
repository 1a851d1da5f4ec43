"""KnOTS: LoRA adapters in one coordinate system."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_sum
from hf_merge.ops.factors import aligned, columns_in_use, largest, padded
from hf_merge.types import Factors, Fraction, Merged, Number, PerModel, Reduced, each


@merge_method(paper="https://arxiv.org/abs/2410.19735")
def knots(
    factors: Factors,
    width: Annotated[int, Reduced(columns_in_use)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    normalize: bool = True,
) -> Merged:
    """Align LoRA adapters by one SVD of their changes side by side, then merge the aligned parts by TIES.

        U S [V_1 | V_2 | ..]^T = [B_1 A_1 | B_2 A_2 | ..]
        merged = U S ties(V_1, V_2, ..)^T

    Args:
        weight: share of each adapter, in the vote as well.
        density: fraction of entries of each V_i that are kept.
        normalize: divide each entry by the weights that agreed.

    Good for:
        LoRA adapters that were trained apart and should be merged by `ties`, which works better once they are aligned;
        needs adapters.

    In words:
        Turns the adapters into a common basis. Keeps the {density:.0%} largest parts of {model}, and counts them
        {weight:g} times. Lets the heavier side decide each sign, and {normalize:averages|adds up} what agrees.

    Notes:
        KnOTS-TIES of the paper, entries trimmed per module. The changes are never made as matrices: U, S and V_i
        come from the factors, and the rank of the result is at most the sum of the adapters' ranks.
    """
    u, s, parts = aligned(factors, width)
    trimmed = [largest(part, share) for part, share in zip(parts, density, strict=True)]
    merged = disjoint_sum(trimmed, weight, normalize=normalize)
    right = factors[0].new_zeros(len(s), factors[0].shape[-1])
    right[:, :width] = s.sqrt()[:, None] * merged
    return padded(u * s.sqrt(), right, len(factors[0]))
