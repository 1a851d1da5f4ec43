"""DARE with TIES' sign election."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_sum
from hf_merge.ops.sparsify import drop, random_factors
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, Seed, each


@merge_method(paper="https://arxiv.org/abs/2311.03099", elementwise=True, ignored=("int8_mask",))
def dare_ties(
    deltas: Deltas,
    factors: Annotated[list[float], Reduced(random_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: Seed = each(0),
) -> Merged:
    """Drop entries of task vectors at random, rescale, elect a sign per entry, and sum those that agree.

        d_i = m_i * (model_i - base) * factor_i,  m_i ~ Bernoulli(density_i)
        s = sign(sum_i weight_i * d_i), zero counting as +
        merged = base + lambda * sum_{i: sign(weight_i d_i) = s} weight_i d_i

    Args:
        weight: share of each task vector, in the vote as well.
        density: probability with which an entry is kept.
        normalize: divide each entry by the weights that agreed.
        rescale: make up for dropped entries by the L1 norm (MergeKit), by 1/density (the paper), or not.

    Good for:
        Fine-tunes of one base whose many small changes are mostly redundant and pull in opposite directions; set a
        density below 1 and try several seeds.

    In words:
        Keeps a random {density:.0%} of the changes of {model}{rescale:l1=, scaled up to their former total,|density=,
        divided by that share,|none=} and counts them {weight:g} times. Lets the heavier side decide each sign,
        {normalize:averages|adds up} what agrees, and adds {lambda:g} times the result to {base}.

    Notes:
        With `l1` the factor is sum|d| / sum|m d|, per tensor and draw; the paper's is 1/density.
    """
    return disjoint_sum(drop(deltas, density, seed, factors), weight, normalize=normalize)
