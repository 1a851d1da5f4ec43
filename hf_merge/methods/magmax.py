"""MagMax."""

from hf_merge.method import merge_method
from hf_merge.ops.combine import largest
from hf_merge.types import Deltas, Merged


@merge_method(paper="https://arxiv.org/abs/2407.06322", elementwise=True, ordered=True)
def magmax(deltas: Deltas) -> Merged:
    """Keep, for each entry, the change of the model that changed it most.

        merged = base + lambda * d_i,  d_i = model_i - base,  i = argmax_i |d_i| for each entry

    Good for:
        A model that was fine-tuned on one task after the other, merged from its stages in the order of training; needs
        a base, and the paper recommends lambda 0.5.

    In words:
        Takes for each weight the largest change among {models}, and adds {lambda:g} times the result to {base}.

    Notes:
        Of changes that are equal in magnitude the later model's counts, as in the released code: it takes the models
        in the order in which they were trained. The paper recommends lambda = 0.5.
    """
    return largest(deltas)
