"""Task arithmetic."""

from hf_merge.method import merge_method
from hf_merge.ops.combine import linear_sum
from hf_merge.types import Deltas, Merged, Number, PerModel, each


@merge_method(paper="https://arxiv.org/abs/2212.04089", elementwise=True, ignored=("density", "rescale", "int8_mask"))
def task_arithmetic(deltas: Deltas, *, weight: PerModel[Number] = each(1.0), normalize: bool = False) -> Merged:
    """Add the models' weighted task vectors to the base.

        merged = base + lambda * sum_i weight_i * (model_i - base)

    Args:
        weight: scale of each task vector; a negative one makes the model forget its task.
        normalize: divide by the sum of the weights.

    Good for:
        Fine-tunes of one base that learnt different things; the simplest way to add skills, or to take one away by a
        negative weight.

    In words:
        Counts the change of {model} {weight:g} times. {normalize:Averages|Adds up} these changes, and adds {lambda:g}
        times the result to {base}.
    """
    return linear_sum(deltas, weight, normalize=normalize)
