"""MetaGPT: task arithmetic with coefficients in closed form."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import energy_of_all, weighted_sum
from hf_merge.types import Deltas, Merged, Reduced


@merge_method(paper="https://arxiv.org/abs/2406.11385", elementwise=True)
def metagpt(deltas: Deltas, coefficients: Annotated[list[float], Reduced(energy_of_all, over="model")]) -> Merged:
    """Add up the task vectors, each by its share of the squared norms over the whole model.

        a_i = |model_i - base|^2 / sum_j |model_j - base|^2, the norms over all tensors
        merged = base + lambda * sum_i a_i * (model_i - base)

    Good for:
        Fine-tunes of one base that learnt different things, when you have no data and want nothing to tune; who
        changed more counts more.

    In words:
        Weighs the changes of {models} by the squares of their sizes, so that the shares sum to 1, and adds {lambda:g}
        times the result to {base}.

    Notes:
        These coefficients minimise the mean loss of all tasks where losses are locally quadratic and the task vectors
        orthogonal. They sum to 1.
    """
    return weighted_sum(deltas, coefficients)
