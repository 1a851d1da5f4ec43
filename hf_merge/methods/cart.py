"""CART: centred task vectors at low rank."""

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, Matrices, low_rank, per_matrix, total
from hf_merge.types import Fraction, Merged, Models, Number


@merge_method(paper="https://arxiv.org/abs/2412.12153", wide=True)
def cart(
    models: Models,
    base: Tensor | None,
    *,
    rank_fraction: Fraction = 0.08,
    scaling: Number = 1.0,
    conv: Conv = "average",
) -> Merged:
    """Average the models, and add the main directions in which each differs from the average.

        m = mean_i model_i
        merged = m + scaling * sum_i R_k(model_i - m),  R_k(X) = the nearest matrix of rank k to X

    Args:
        rank_fraction: k as a part of the full rank of each matrix; at least 1 unless it is 0.
        scaling: of what is added to the average.
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Several variants of one model when a plain average loses too much of each; needs no base, and scaling is worth
        choosing on validation data.

    In words:
        Averages {models}, and adds {scaling:g} times the main directions in which each differs from the average
        ({rank_fraction:.0%} of all directions of a matrix).

    Notes:
        The average takes the base's place, so that a base is not needed and, if there is one, has no part. The paper
        finds its best results near a rank_fraction of 0.08, with scaling chosen on validation data. What is no matrix
        is averaged.
    """

    def merge(matrices: Matrices) -> Tensor:
        full, mean = min(matrices.shape), total(matrices) / len(matrices)
        kept = max(1, int(rank_fraction * full)) if rank_fraction else 0
        return mean + scaling * total(low_rank(matrix - mean, kept) for matrix in matrices)

    return per_matrix(models, merge, conv=conv)
