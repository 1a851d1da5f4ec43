"""Spherical interpolation of two models or of their task vectors."""

from typing import Annotated

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.geometry import cosine, inner_products, offsets, slerp_coefficients
from hf_merge.types import Merged, Models, Number, PerModel, Reduced, Tiles, each


def _products(tiles: Tiles, *, nuslerp_flatten: bool) -> Tensor | None:
    return inner_products(tiles, offsets) if nuslerp_flatten else None


@merge_method(
    paper="https://github.com/arcee-ai/mergekit",
    elementwise=lambda *, nuslerp_flatten: nuslerp_flatten,
    rowwise=lambda *, nuslerp_flatten, nuslerp_row_wise: not (nuslerp_flatten or nuslerp_row_wise),
    models=2,
)
def nuslerp(
    models: Models,
    base: Tensor | None,
    products: Annotated[Tensor | None, Reduced(_products)],
    *,
    weight: PerModel[Number] = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Merged:
    """Interpolate on the great circle between two models, or between their task vectors.

        t = weight_2 / (weight_1 + weight_2), or 1/2 where these sum to 0
        x_i = model_i - base, or model_i without a base;  theta = angle between x_1 and x_2
        merged = base + (sin((1 - t) theta) * x_1 + sin(t theta) * x_2) / sin(theta)

    Args:
        weight: share of each model; t is the second one's.
        nuslerp_flatten: take each tensor as one vector; if not, every row of it.
        nuslerp_row_wise: without nuslerp_flatten, take as vectors the runs along the first dim, not the last.

    Good for:
        Exactly two models in any proportion, their strength kept better than by an average; with a base only their
        changes are mixed.

    In words:
        Counts {model} {weight:g} times. Goes along the arc between {models}, to where these shares lead.

    Notes:
        As in MergeKit, `nuslerp_row_wise` does what its name denies: true gives columns, false gives the rows of
        torch's matrices. Vectors on one line (sin(theta) below 1e-6) are interpolated linearly; so they are in
        MergeKit, whose float32 cosines tell none closer than about 3e-4 from a line.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    products = inner_products([models], offsets, 0 if nuslerp_row_wise else -1) if products is None else products
    parts = slerp_coefficients(cosine(products, 0, 1, floor=1e-7), t, colinear=1 - 5e-13)
    a, b = (x * part.to(x.device) for x, part in zip(offsets(models), parts, strict=True))
    merged = a.add_(b).to(models[0].dtype)
    return merged if base is None else merged.add_(base)
