"""Model Breadcrumbs with TIES' sign election."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_sum
from hf_merge.ops.sparsify import Band, band_factors, magnitude_bands, trim_both
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, each


@merge_method(paper="https://arxiv.org/abs/2312.06795", elementwise=True, ignored=("int8_mask",))
def breadcrumbs_ties(
    deltas: Deltas,
    bands: Annotated[list[Band], Reduced(magnitude_bands)],
    factors: Annotated[list[float], Reduced(band_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    gamma: PerModel[Fraction] = each(0.01),
    normalize: bool = False,
    rescale: Rescale = "none",
) -> Merged:
    """Drop the largest and smallest entries of each task vector, elect a sign, and sum those that agree.

        d_i = model_i - base without its gamma_i * N largest entries, and of the rest the density_i * N largest
        s = sign(sum_i weight_i * d_i), zero counting as +
        merged = base + lambda * sum_{i: sign(weight_i d_i) = s} weight_i d_i

    Args:
        weight: share of each task vector, in the vote as well.
        density: fraction of entries kept, of each task vector and tensor.
        gamma: fraction of the largest entries dropped.
        normalize: divide each entry by the weights that agreed.
        rescale: make up for dropped entries by the L1 norm, by 1/density, or not.

    Good for:
        Several fine-tunes of one base that pull in opposite directions, when extreme changes are thought to be noise;
        needs a base and a density below 1.

    In words:
        Keeps {density:.0%} of the changes of {model} (without the smallest and up to {gamma:.1%} at the top), and
        counts them {weight:g} times. Lets the heavier side decide each sign, {normalize:averages|adds up} what agrees,
        and adds {lambda:g} times the result to {base}.

    Notes:
        As in MergeKit, exactly int(density * N) entries are kept: where gamma exceeds 1 - density, fewer of the
        largest are dropped, and at density 1 none is.
    """
    return disjoint_sum(trim_both(deltas, bands, factors), weight, normalize=normalize)
