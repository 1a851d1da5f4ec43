"""SCE: select, calculate, erase."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_mean
from hf_merge.ops.sparsify import Threshold, energy_shares, keep_varying, variance_threshold
from hf_merge.types import Deltas, Fraction, Merged, Reduced


@merge_method(paper="https://arxiv.org/abs/2408.07990", elementwise=True, ignored=("int8_mask",))
def sce(
    deltas: Deltas,
    cut: Annotated[Threshold, Reduced(variance_threshold)],
    shares: Annotated[list[float], Reduced(energy_shares)],
    *,
    select_topk: Fraction = 1.0,
) -> Merged:
    """Keep the entries that vary most, weigh models by their energy, and merge what agrees in sign.

        d_i = model_i - base at the select_topk of varying entries with the largest variance over the models, else 0
        a_i = mean(d_i^2) / sum_j mean(d_j^2)
        s = sign(sum_i d_i), zero counting as +
        merged = base + lambda * sum_{i: sign(d_i) = s} a_i d_i / sum_{same i} a_i

    Args:
        select_topk: fraction kept of the entries that vary at all; 1 keeps all entries.

    Good for:
        Two or more fine-tunes of one base of unlike strength, with one number to set: models that changed more count
        more; needs a base.

    In words:
        Keeps the {select_topk:.0%} of changes that vary most among {models}, and weighs each model by the energy of
        its changes. Lets the heavier side decide each sign, averages what agrees, and adds {lambda:g} times the result
        to {base}.

    Notes:
        As in MergeKit, the models weigh the same where the mean squares sum to less than 1e-6, as they do for
        changes of less than about 1e-3 in each entry; a limit relative to the weights would be right. Shares
        that sum to less than 1e-6 are divided by 1e-6.
    """
    return disjoint_mean(keep_varying(deltas, cut), shares)
