"""NearSwap."""

import torch
from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.types import Merged, Models, Positive


@merge_method(paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", elementwise=True, models=1)
def nearswap(models: Models, base: Tensor, *, t: Positive = 1e-4) -> Merged:
    """Move the base towards another model where the two are near.

        w = clip(t / |base - model|, 0, 1)
        merged = (1 - w) * base + w * model

    Args:
        t: distance below which an entry is swapped whole.

    Good for:
        Giving a model a touch of another only where the two hardly differ; needs exactly one model beside the base.

    In words:
        Takes over the weights of {model} where they are within {t:g} of those of {base}, and elsewhere the less of
        them the farther apart the two are.

    Notes:
        MergeKit asks for t; the default here is the one of the model that introduced the method.
    """
    distance = (base - models[0]).abs_().clamp_(min=1e-6)
    share = distance.reciprocal_().mul_(t).clamp_(max=1)
    return torch.lerp(base, models[0], share)
