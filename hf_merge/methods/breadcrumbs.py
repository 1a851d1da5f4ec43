"""Model Breadcrumbs."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import linear_sum
from hf_merge.ops.sparsify import Band, band_factors, magnitude_bands, trim_both
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, each


@merge_method(paper="https://arxiv.org/abs/2312.06795", elementwise=True, ignored=("int8_mask",))
def breadcrumbs(
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
    """Drop the largest and the smallest entries of each task vector, and add them up.

        d_i = model_i - base without its gamma_i * N largest entries, and of the rest the density_i * N largest
        merged = base + lambda * sum_i weight_i * d_i

    Args:
        weight: scale of each task vector.
        density: fraction of entries kept, of each task vector and tensor.
        gamma: fraction of the largest entries dropped.
        normalize: divide by the sum of the weights.
        rescale: make up for dropped entries by the L1 norm, by 1/density, or not.

    Good for:
        Several fine-tunes of one base when the smallest changes and a few extreme ones are thought to be noise; needs
        a base and a density below 1.

    In words:
        Keeps {density:.0%} of the changes of {model} (without the smallest and up to {gamma:.1%} at the top), and
        counts them {weight:g} times. {normalize:Averages|Adds up} what is left, and adds {lambda:g} times the result
        to {base}.

    Notes:
        As in MergeKit, exactly int(density * N) entries are kept: where gamma exceeds 1 - density, fewer of the
        largest are dropped, and at density 1 none is.
    """
    return linear_sum(trim_both(deltas, bands, factors), weight, normalize=normalize)
