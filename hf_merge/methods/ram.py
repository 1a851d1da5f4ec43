"""RAM: merge what models share apart from what each has alone."""

from hf_merge.method import merge_method
from hf_merge.ops.combine import active, overlap_sum
from hf_merge.types import Deltas, Merged, Positive


@merge_method(paper="https://arxiv.org/abs/2601.13572", elementwise=True)
def ram(deltas: Deltas, *, epsilon: Positive = 1e-5) -> Merged:
    """Average the entries that several models changed, and keep those that one model changed.

        a_i = |model_i - base| > epsilon,  c = sum_i a_i
        merged = base + lambda * sum_i a_i (model_i - base) / c

    Args:
        epsilon: change below which an entry counts as unchanged.

    Good for:
        Fine-tunes of one base that left most weights untouched, as reinforcement learning does; needs a base.

    In words:
        Ignores changes up to {epsilon:g}, averages what several of {models} changed, keeps what one alone changed, and
        adds {lambda:g} times the result to {base}.
    """
    return overlap_sum(deltas, active(deltas, epsilon), alone=[1.0] * len(deltas))
