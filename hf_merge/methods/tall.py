"""TALL masks."""

from hf_merge.forms import MASK, Experts
from hf_merge.method import merge_method
from hf_merge.ops.combine import localised, weighted_sum
from hf_merge.types import Models, NonNegative, Number, PerModel, Tensor, each


@merge_method(paper="https://arxiv.org/abs/2405.07813", elementwise=True, experts=lambda shape, count: MASK)
def tall(
    models: Models, base: Tensor, *, tall_mask_lambda: PerModel[NonNegative] = each(0.4), lambda_: Number = 1.0
) -> Experts:
    """Keep the sum of the task vectors, and for each task a bit for each entry that serves it.

        d_i = model_i - base,  s = sum_i d_i
        m_i = |d_i| > tall_mask_lambda_i * |s - d_i|
        task i: base + lambda * m_i * s

    Args:
        tall_mask_lambda: how much a task's own change must outweigh the others' for the entry to be the task's.
        lambda_: scale of what is added to the base.

    Good for:
        Fine-tunes of one base that must each keep their skill, when the task of every input is known; each task costs
        one bit for every weight.

    In words:
        Marks for {model} where its own change outweighs {tall_mask_lambda:g} times that of all others together. Keeps
        {base} and the sum of all changes, and gives each task {lambda:g} times what is marked for it.

    Notes:
        The backbone is the base. The paper chooses tall_mask_lambda for each task from 0.2 to 0.6, on validation data.
    """
    deltas = [model - base for model in models]
    total = weighted_sum(deltas, [1.0] * len(deltas))
    masks = localised(deltas, total, tall_mask_lambda)
    return Experts([{"mask": mask, "scale": mask.new_tensor([lambda_])} for mask in masks], shared=total)
