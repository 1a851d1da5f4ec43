"""Karcher mean of models."""

from typing import Annotated

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum
from hf_merge.ops.geometry import inner_products, karcher_mean
from hf_merge.types import Count, Merged, Models, Positive, Reduced


@merge_method(paper="https://arxiv.org/abs/2603.04972", elementwise=True)
def karcher(
    models: Models,
    products: Annotated[Tensor, Reduced(inner_products)],
    *,
    max_iter: Count = 10,
    tol: Positive = 1e-5,
) -> Merged:
    """Average the models' directions by their mean on the sphere, and their lengths by themselves.

        u_i = model_i / |model_i|, each tensor taken as one vector
        m = the point of the unit sphere with the least sum of squared angles to all u_i
        merged = m * mean_i |model_i|

    Args:
        max_iter: at most so many steps along the gradient.
        tol: smaller gradients, angles and norms count as 0.

    Good for:
        Two or more variants of one model when a plain average would make their weights smaller; needs no base and
        nothing to tune.

    In words:
        Averages the directions of {models} on the sphere (in at most {max_iter} steps), and gives the result their
        mean length.

    Notes:
        Models of a norm up to tol have no direction and count in the mean norm only. Where directions cancel (their
        mean is shorter than tol or 1e-4) or no model has one, the result is the average of the models; MergeKit
        starts from the first model's direction, so that the order decides, or gives zeros. A direction opposite
        to m does not move it, as no way there is shortest.
    """
    return exact_sum(models, karcher_mean(products, max_iter=max_iter, tol=tol))
