"""Twin-Merging."""

import torch

from hf_merge.forms import WHOLE, Experts, Form, LowRank, is_matrix
from hf_merge.method import merge_method
from hf_merge.ops.combine import weighted_sum
from hf_merge.ops.experts import Changes, factors, part_of_rank
from hf_merge.types import Fraction, Models, Number, Tensor


def _form(shape: tuple[int, ...], count: int, *, mask_rate: float) -> Form:
    return LowRank(part_of_rank(shape, 1 - mask_rate)) if is_matrix(shape) and mask_rate else WHOLE


@merge_method(paper="https://arxiv.org/abs/2406.15479", wide=True, experts=_form)
def twin(models: Models, base: Tensor, *, mask_rate: Fraction = 0.9, lambda_: Number = 0.3) -> Experts:
    """Merge by task arithmetic, and keep for each task in few dimensions what that misses of it.

        merged = base + lambda * sum_i (model_i - base)
        model_i - merged = U_i S_i V_i',  k = int((1 - mask_rate) * min(rows, columns))
        task i: merged + U_i[:, :k] S_i[:k] V_i[:, :k]'

    Args:
        mask_rate: how much of the rank of every matrix an expert does without.
        lambda_: scale of the sum of the task vectors in the backbone.

    Good for:
        Fine-tunes of one base that share much but must each keep their skill, when the task of every input is known or
        a router tells it.

    In words:
        Adds {lambda:g} times the changes of {models} to {base}, and keeps for each the strongest directions of what
        that misses of it (all but {mask_rate:.0%}).

    Notes:
        The backbone is the merged model. What is no matrix (biases, norms, tokens) is kept whole for each task, as in
        the released code, which takes biases from the task's own model; kernels of convolutions are matrices
        [out, in*kh*kw]. The experts of several tasks can be added in the shares that a router gives (soft routing).
    """
    total = weighted_sum(Changes(models, base), [1.0] * len(models))
    merged = torch.add(base, total, alpha=lambda_)
    form = _form(tuple(base.shape), len(models), mask_rate=mask_rate)
    if not isinstance(form, LowRank):
        return Experts([{"whole": model} for model in models], backbone=merged)
    return Experts([factors(model - merged, form.rank) for model in models], backbone=merged)
