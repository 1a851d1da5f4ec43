"""Model Stock."""

from typing import Annotated

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum
from hf_merge.ops.geometry import inner_products, stock_ratio
from hf_merge.types import Deltas, Merged, Reduced, Tiles


def _ratio(tiles: Tiles, *, filter_wise: bool) -> Tensor | None:
    return None if filter_wise else stock_ratio(inner_products(tiles))


@merge_method(
    paper="https://arxiv.org/abs/2403.19522",
    elementwise=lambda *, filter_wise: not filter_wise,
    rowwise=lambda *, filter_wise: filter_wise,
    min_models=2,
)
def model_stock(
    deltas: Deltas, ratio: Annotated[Tensor | None, Reduced(_ratio)], *, filter_wise: bool = False
) -> Merged:
    """Go from the base towards the average of the models, as far as the angles between them suggest.

        c = mean cosine between task vectors, over all pairs of the k models
        t = k * c / (1 + (k - 1) * c)
        merged = base + lambda * t * mean_i (model_i - base)

    Args:
        filter_wise: take every row (run along the last dim) as one vector; if not, the whole tensor.

    Good for:
        Two or more fine-tunes of one base on the same task, such as runs with other seeds; nothing to tune.

    In words:
        Goes from {base} towards the average of {models}, the farther the more they agree, and scales that step by
        {lambda:g}.

    Notes:
        As in MergeKit, products of two norms below 1e-6 count as 1e-6, so that for very small task vectors c and t
        tend to 0 and the base is kept; t is 0 where |1 + (k - 1) c| is below 1e-6. Where c is negative, t is too.
    """
    ratio = stock_ratio(inner_products([deltas], dim=-1)) if ratio is None else ratio
    mean = exact_sum(deltas, [1 / len(deltas)] * len(deltas))
    return (mean * ratio.to(mean.device)).to(mean.dtype)
