"""RAM+ with a rescale for each tensor."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import active, overlap_counts, overlap_sum
from hf_merge.types import Deltas, Merged, Number, Positive, Reduced


@merge_method(paper="https://arxiv.org/abs/2601.13572", elementwise=True)
def ramplus_tl(
    deltas: Deltas,
    counts: Annotated[list[tuple[int, int]], Reduced(overlap_counts)],
    *,
    r: Number = 0.1,
    alpha: Positive = 0.2,
    epsilon: Positive = 1e-5,
) -> Merged:
    """Average the entries that several models changed, and raise those that one model changed.

        a_i = |model_i - base| > epsilon,  c = sum_i a_i
        l_i = 1 + r * min(shared_i / alone_i, alpha), from the numbers of entries with c > 1 and c = 1 in a_i
        merged = base + lambda * sum_i a_i (model_i - base) * (l_i where c = 1, 1/c elsewhere)

    Args:
        r: how much entries of one model alone are raised.
        alpha: largest ratio of shared to lone entries that counts.
        epsilon: change below which an entry counts as unchanged.

    Good for:
        As `ram`, when averaging what is shared weakens the models: what one alone changed is raised to make up for it;
        needs a base.

    In words:
        Ignores changes up to {epsilon:g}, averages what several of {models} changed, raises what one alone changed by
        {r:g} times its ratio of shared to lone changes (at most {alpha:g}), and adds {lambda:g} times the result to
        {base}.

    Notes:
        The result has the dtype asked for; MergeKit leaves float32 for 16-bit inputs.
    """
    raised = [1 + r * min(shared / max(alone, epsilon), alpha) for shared, alone in counts]
    return overlap_sum(deltas, active(deltas, epsilon), alone=raised)
