"""Consensus task arithmetic (TALL masks)."""

from hf_merge.method import merge_method
from hf_merge.ops.combine import localised, weighted_sum
from hf_merge.types import Count, Deltas, Merged, NonNegative, PerModel, each


@merge_method(paper="https://arxiv.org/abs/2405.07813", elementwise=True)
def consensus_ta(deltas: Deltas, *, tall_mask_lambda: PerModel[NonNegative] = each(0.4), k: Count = 2) -> Merged:
    """Add up the task vectors where at least k tasks need the sum, and nothing where it serves fewer.

        d_i = model_i - base,  s = sum_i d_i
        m_i = |d_i| > tall_mask_lambda_i * |s - d_i|
        merged = base + lambda * s * [sum_i m_i >= k]

    Args:
        tall_mask_lambda: how much a task's own change must outweigh the others' for the entry to be the task's.
        k: how many tasks must need an entry; 1 removes the entries that none needs, 2 those of one alone as well.

    Good for:
        Three or more fine-tunes of one base when what only one of them needs disturbs the others; needs a base and at
        least k models.

    In words:
        Says that {model} needs a change that outweighs {tall_mask_lambda:g} times that of all others together. Adds up
        the changes wherever at least {k} models need theirs, and adds {lambda:g} times the result to {base}.

    Notes:
        The paper chooses tall_mask_lambda for each task from 0.2 to 0.6 and lambda up to 1, on validation data. With
        fewer models than k nothing is added.
    """
    total = weighted_sum(deltas, [1.0] * len(deltas))
    return total * weighted_sum(localised(deltas, total, tall_mask_lambda), [1.0] * len(deltas)).ge_(k)
