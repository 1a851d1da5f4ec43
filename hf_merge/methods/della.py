"""DELLA with TIES' sign election."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_sum
from hf_merge.ops.dropping import drop_by_rank, possible_by_rank, rank_factors
from hf_merge.types import Deltas, Fraction, Margin, Merged, Number, PerModel, Reduced, Rescale, Seed, each


@merge_method(paper="https://arxiv.org/abs/2406.11617", rowwise=True, check=possible_by_rank, ignored=("int8_mask",))
def della(
    deltas: Deltas,
    factors: Annotated[list[float], Reduced(rank_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    epsilon: PerModel[Margin] = each(0.15),
    normalize: bool = True,
    rescale: Rescale = "l1",
    seed: Seed = each(0),
) -> Merged:
    """Drop small entries of task vectors more often than large ones, rescale, elect a sign, and merge.

        d_i = m_i * (model_i - base) * factor_i,  m_i ~ Bernoulli(p_i)
        p_i = density_i - epsilon_i for the smallest entry of a row, rising with the rank to density_i + epsilon_i
        s = sign(sum_i weight_i * d_i), zero counting as +
        merged = base + lambda * sum_{i: sign(weight_i d_i) = s} weight_i d_i / sum_{same i} weight_i

    Args:
        weight: share of each task vector, in the vote as well.
        density: mean probability with which an entry is kept.
        epsilon: how far probabilities reach to both sides of the density, which must lie farther from 0 and 1.
        normalize: divide each entry by the weights that agreed.
        rescale: make up for dropped entries by the L1 norm (MergeKit), by 1/p of each entry (the paper), or not.

    Good for:
        As `dare_ties`, but large changes are dropped less often than small ones; needs a base and a density that
        leaves room for epsilon.

    In words:
        Keeps a random {density:.0%} of the changes of {model} (the chance is up to {epsilon:g} higher for large ones
        and lower for small ones), and counts them {weight:g} times. Lets the heavier side decide each sign,
        {normalize:averages|adds up} what agrees, and adds {lambda:g} times the result to {base}.

    Notes:
        As in MergeKit, a row is a run along dim 1, for stacks of matrices too; a vector is one row. A row of one is
        kept with probability density, where MergeKit fails. Entries of equal magnitude are ranked by their index.
    """
    return disjoint_sum(drop_by_rank(deltas, density, epsilon, seed, rescale, factors), weight, normalize=normalize)
