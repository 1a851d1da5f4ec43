"""DELLA with task arithmetic."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import linear_sum
from hf_merge.ops.dropping import drop_by_rank, possible_by_rank, rank_factors
from hf_merge.types import Deltas, Fraction, Margin, Merged, Number, PerModel, Reduced, Rescale, Seed, each


@merge_method(paper="https://arxiv.org/abs/2406.11617", rowwise=True, check=possible_by_rank, ignored=("int8_mask",))
def della_linear(
    deltas: Deltas,
    factors: Annotated[list[float], Reduced(rank_factors)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    epsilon: PerModel[Margin] = each(0.15),
    normalize: bool = False,
    rescale: Rescale = "l1",
    seed: Seed = each(0),
) -> Merged:
    """Drop small entries of task vectors more often than large ones, rescale the rest, and add them up.

        d_i = m_i * (model_i - base) * factor_i,  m_i ~ Bernoulli(p_i)
        p_i = density_i - epsilon_i for the smallest entry of a row, rising with the rank to density_i + epsilon_i
        merged = base + lambda * sum_i weight_i * d_i

    Args:
        weight: scale of each task vector.
        density: mean probability with which an entry is kept.
        epsilon: how far probabilities reach to both sides of the density, which must lie farther from 0 and 1.
        normalize: divide by the sum of the weights.
        rescale: make up for dropped entries by the L1 norm (MergeKit), by 1/p of each entry (the paper), or not.

    Good for:
        As `dare_linear`, but large changes are dropped less often than small ones; needs a base and a density that
        leaves room for epsilon.

    In words:
        Keeps a random {density:.0%} of the changes of {model} (the chance is up to {epsilon:g} higher for large ones
        and lower for small ones), and counts them {weight:g} times. {normalize:Averages|Adds up} what is left, and
        adds {lambda:g} times the result to {base}.

    Notes:
        As in MergeKit, a row is a run along dim 1, for stacks of matrices too; a vector is one row. A row of one is
        kept with probability density, where MergeKit fails. Entries of equal magnitude are ranked by their index.
    """
    return linear_sum(drop_by_rank(deltas, density, epsilon, seed, rescale, factors), weight, normalize=normalize)
