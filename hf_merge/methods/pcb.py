"""PCB-Merging: parameter competition balancing."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.competition import Limits, balanced, clipping_limits, score_limits
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, each


@merge_method(paper="https://arxiv.org/abs/2410.02396", elementwise=True)
def pcb(
    deltas: Deltas,
    clips: Annotated[list[Limits], Reduced(clipping_limits, over="model")],
    limits: Annotated[list[Limits], Reduced(score_limits, over="model")],
    *,
    ratio: Fraction = 0.05,
    coefficient: PerModel[Number] = each(1.2),
) -> Merged:
    """Let the tasks compete for every entry: what is large and agrees with the others counts more.

        c_i = |model_i - base| clipped to its 1 % and 99 % quantiles,  n_i = (c_i - min c_i) / (max c_i - min c_i)
        p_i = exp(T n_i^2) * tanh(d_i * sum_j sign(d_j) n_j),  d_i = model_i - base, all over the whole model
        a_i = (max(p_i, q_i) - q_i) / (max p_i - q_i),  q_i = the quantile 1 - ratio of p_i
        merged = base + lambda * sum_i coefficient_i * a_i * sign(d_i) * c_i / sum_i a_i

    Args:
        ratio: part of the entries of each task that win.
        coefficient: scale of each task vector.

    Good for:
        Fine-tunes of one base that compete for the same weights, when few changes of each should win; needs a base.

    In words:
        Counts the changes of {model} {coefficient:g} times. Lets all changes compete, keeps about the best {ratio:.0%}
        of each model, averages them by their scores, and adds {lambda:g} times the result to {base}.

    Notes:
        The released code has two versions that differ from the paper and from each other; this is the one of its
        vision experiments, 1.2 included. The paper normalises both factors of p by softmax over the model.
    """
    return balanced(deltas, clips, limits, coefficient)
