"""TIES-Merging."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_sum
from hf_merge.ops.sparsify import Threshold, magnitude_factors, magnitude_thresholds, trim
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, each


@merge_method(paper="https://arxiv.org/abs/2306.01708", elementwise=True, ignored=("int8_mask",))
def ties(
    deltas: Deltas,
    cut: Annotated[list[Threshold], Reduced(magnitude_thresholds)],
    factors: Annotated[list[float], Reduced(magnitude_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    normalize: bool = True,
    rescale: Rescale = "none",
) -> Merged:
    """Trim each task vector to its largest entries, elect a sign per entry, and merge those that agree.

        d_i = the density_i * N largest entries of model_i - base, per tensor
        s = sign(sum_i weight_i * d_i), zero counting as +
        merged = base + lambda * sum_{i: sign(weight_i d_i) = s} weight_i d_i / sum_{same i} weight_i

    Args:
        weight: share of each task vector, in the vote as well.
        density: fraction of entries kept, of each task vector and tensor.
        normalize: divide each entry by the weights that agreed.
        rescale: make up for trimmed entries by the L1 norm, by 1/density, or not.

    Notes:
        The trim is per tensor, as in MergeKit; the paper trims over the whole model. Among entries of equal
        magnitude at the cut the first ones are kept, so that exactly max(1, int(density * N)) are.
    """
    return disjoint_sum(trim(deltas, cut, factors), weight, normalize=normalize)
