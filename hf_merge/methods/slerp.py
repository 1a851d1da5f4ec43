"""Spherical interpolation between two models."""

from typing import Annotated

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import weighted_sum
from hf_merge.ops.geometry import Angle, angle_to_base, slerp_coefficients
from hf_merge.types import Fraction, Merged, Models, Reduced


@merge_method(paper="https://dl.acm.org/doi/10.1145/325334.325242", elementwise=True, models=1)
def slerp(
    models: Models, base: Tensor, angle: Annotated[Angle, Reduced(angle_to_base)], *, t: Fraction = 0.5
) -> Merged:
    """Interpolate on the great circle between the base and one other model.

        theta = angle between base and model, each tensor taken as one vector
        merged = (sin((1 - t) theta) * base + sin(t theta) * model) / sin(theta)

    Args:
        t: position between the base (0) and the model (1).

    Good for:
        Exactly two models, one of them named as the base, blended in any proportion with their strength kept.

    In words:
        Goes {t:.0%} of the way along the arc from {base} to {model}.

    Notes:
        Tensors whose cosine exceeds 0.9995 in magnitude are interpolated linearly, as in MergeKit. MergeKit asks
        for t; the default here is midway.
    """
    a, b = slerp_coefficients(angle.cosine, t, colinear=0.9995)
    return weighted_sum([base, models[0]], [float(a), float(b)])
