"""Multi-SLERP: the weighted mean of directions."""

from typing import Annotated

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum
from hf_merge.ops.geometry import inner_products, mean_direction, offsets
from hf_merge.types import Merged, Models, Number, PerModel, Positive, Reduced, Tiles, each


def _products(tiles: Tiles) -> Tensor:
    return inner_products(tiles, offsets)


@merge_method(paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea", elementwise=True)
def multislerp(
    models: Models,
    base: Tensor | None,
    products: Annotated[Tensor, Reduced(_products)],
    *,
    weight: PerModel[Number] = each(1.0),
    normalize_weights: bool = True,
    eps: Positive = 1e-8,
) -> Merged:
    """Average the directions of models or task vectors, and their lengths by themselves.

        x_i = model_i - base, or model_i without a base;  n_i = |x_i|
        m = sum_i weight_i * x_i / (n_i + eps)
        merged = base + m / |m| * sum_i weight_i * n_i

    Args:
        weight: share of each model.
        normalize_weights: divide the weights by their sum.
        eps: added to the norms; where |m| is smaller, directions cancel.

    Good for:
        Two or more models when a plain average would make their weights smaller; with a base only their changes are
        averaged.

    In words:
        Counts {model} {weight:g} times. Averages directions and lengths of {models} apart.

    Notes:
        MergeKit goes on to move m by the weighted sum of the tangents at m, which is 0 whatever the models: all that
        it adds is a factor cos(eps). Where directions cancel (|m| below eps, or below 1e-4 of the weights, which
        float32 cannot tell from 0), the result is base + sum_i weight_i * x_i; MergeKit does that for two models
        and refuses more. A single model is copied.
    """
    if len(models) == 1:
        return models[0].clone()
    total = sum(weight) if normalize_weights else 1.0
    if abs(total) < 1e-8:
        raise ValueError("the weights sum to 0: change them, or set normalize_weights: false")
    merged = exact_sum(offsets(models), mean_direction(products, [w / total for w in weight], eps=eps))
    return merged if base is None else merged.add_(base)
