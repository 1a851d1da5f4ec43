"""Arcee Fusion."""

import torch
from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.geometry import divergence
from hf_merge.ops.sparsify import quantiles
from hf_merge.types import Merged, Models


@merge_method(
    paper="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    models=1,
)
def arcee_fusion(models: Models, base: Tensor) -> Merged:
    """Take the entries of a model that stand out in importance, and the base's for the rest.

        I = |model - base| * KL(softmax(model) || softmax(base)) of the entry's row
        merged = model where I >= median(I) + 1.5 * (third quartile - first quartile), base elsewhere

    Good for:
        Taking over from one model only the few changes that stand out, with nothing to tune; needs exactly one model
        beside the base.

    In words:
        Takes from {model} the weights that stand out in importance, and all others from {base}.

    Notes:
        Quartiles are exact: the entries at places trunc(q * (N - 1)) of all sorted values; above a million entries
        MergeKit estimates them from a random sample. The result has the dtype asked for, where MergeKit leaves
        float32 for 16-bit inputs.
    """
    (model,) = models
    if not model.numel():
        return model.clone()
    importance = (model - base).abs_().mul_(divergence(base, model))
    first, median, third = quantiles(importance, [0.25, 0.5, 0.75])
    return torch.where(importance >= median + 1.5 * (third - first), model, base)
