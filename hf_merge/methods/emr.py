"""EMR-Merging: elect, mask and rescale."""

from typing import Annotated, Literal

from hf_merge.forms import MASK, Experts
from hf_merge.method import merge_method
from hf_merge.ops.experts import elected, rescalers
from hf_merge.types import Models, Reduced, Tensor


@merge_method(paper="https://arxiv.org/abs/2405.17461", elementwise=True, experts=lambda shape, count: MASK)
def emr(
    models: Models,
    base: Tensor,
    rescale: Annotated[list[float], Reduced(rescalers, over="model")],
    *,
    variant: Literal["paper", "reference"] = "paper",
) -> Experts:
    """Keep one vector for all tasks, and for each a bit for every entry and one number.

        d_i = model_i - base,  sign = +1 where sum_i d_i > 0, else -1
        m_i = [d_i * sign > 0],  shared = sign * max_i |d_i| m_i
        r_i = sum |d_i| / sum |shared * m_i|  over the model
        task i: base + r_i * m_i * shared

    Args:
        variant: rescale by sums over all entries (paper), or by sums of each tensor's mean (reference).

    Good for:
        Fine-tunes of one base that must each keep their skill, when the task of every input is known; each task costs
        one bit for every weight.

    In words:
        Keeps {base}, one vector of the largest changes that {models} agree on, and for each of them one bit for every
        weight and one scale.

    Notes:
        The backbone is the base. The released code rescales by means of tensors for 8 tasks and language models, so
        that a bias of 64 entries counts as much as a matrix, and by sums over all entries for 30 tasks, as the paper
        does. It takes the sign of 0 as negative, which changes nothing that is kept.
    """
    shared, masks = elected([model - base for model in models])
    return Experts(
        [{"mask": m, "scale": m.new_tensor([r])} for m, r in zip(masks, rescale, strict=True)], shared=shared
    )
