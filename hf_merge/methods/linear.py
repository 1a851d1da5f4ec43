"""Weighted average of models (model soups)."""

from hf_merge.method import merge_method
from hf_merge.ops.combine import divide_, weighted_sum
from hf_merge.types import Merged, Models, Number, PerModel, each


@merge_method(paper="https://arxiv.org/abs/2203.05482", elementwise=True)
def linear(models: Models, *, weight: PerModel[Number] = each(1.0), normalize: bool = True) -> Merged:
    """Average the models' weights.

        merged = sum_i weight_i * model_i / sum_i weight_i

    Args:
        weight: share of each model.
        normalize: divide by the sum of the weights.

    Good for:
        Variants of one model that learnt similar things, such as runs with other seeds; the simplest choice, and it
        needs no base.

    In words:
        Counts {model} {weight:g} times. {normalize:Averages|Adds up} the weights of {models}.
    """
    divisor = sum(weight) if normalize else 1.0
    if abs(divisor) < 1e-8:
        raise ValueError("the weights sum to 0: change them, or set normalize: false")
    total = weighted_sum(models, weight)
    return total if divisor == 1 else divide_(total, divisor)
