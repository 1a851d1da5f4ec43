"""DARE with task arithmetic."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import linear_sum
from hf_merge.ops.sparsify import drop, random_factors
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, Seed, each


@merge_method(paper="https://arxiv.org/abs/2311.03099", elementwise=True, ignored=("int8_mask",))
def dare_linear(
    deltas: Deltas,
    factors: Annotated[list[float], Reduced(random_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: Seed = each(0),
) -> Merged:
    """Drop entries of task vectors at random, rescale the rest, and add them up.

        d_i = m_i * (model_i - base) * factor_i,  m_i ~ Bernoulli(density_i)
        merged = base + lambda * sum_i weight_i * d_i

    Args:
        weight: scale of each task vector.
        density: probability with which an entry is kept.
        normalize: divide by the sum of the weights.
        rescale: make up for dropped entries by the L1 norm (MergeKit), by 1/density (the paper), or not.

    Good for:
        Fine-tunes of one base whose many small changes are mostly redundant, as in large language models; set a
        density below 1 and try several seeds.

    In words:
        Keeps a random {density:.0%} of the changes of {model}{rescale:l1=, scaled up to their former total,|density=,
        divided by that share,|none=} and counts them {weight:g} times. {normalize:Averages|Adds up} what is left, and
        adds {lambda:g} times the result to {base}.

    Notes:
        With `l1` the factor is sum|d| / sum|m d|, per tensor and draw; the paper's is 1/density.
    """
    return linear_sum(drop(deltas, density, seed, factors), weight, normalize=normalize)
