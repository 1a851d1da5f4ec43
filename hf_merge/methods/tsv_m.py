"""TSV-M: task singular vectors."""

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, Matrices, joined, leading, orthogonalised, per_matrix
from hf_merge.types import Deltas, Merged


@merge_method(paper="https://arxiv.org/abs/2412.00081", wide=True)
def tsv_m(deltas: Deltas, *, conv: Conv = "average") -> Merged:
    """Give each task its part of the rank of every matrix, and make their singular vectors orthogonal.

        U_i, S_i, V_i = the first q/T components of the SVD of d_i = model_i - base,  q = min(rows, columns)
        U = polar([U_1 .. U_T]),  V = polar([V_1 .. V_T]),  polar(X) = P Q' for X = P D Q'
        merged = base + lambda * U diag([S_1 .. S_T]) V'

    Args:
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Several fine-tunes of one base whose changes get in each other's way; needs a base, no data, and nothing but
        lambda is to be set.

    In words:
        Keeps an equal number of the strongest directions of each of {models} in every matrix, makes them independent
        of each other, and adds {lambda:g} times the result to {base}.

    Notes:
        As in the released code, what is no matrix is averaged; it also averages `text_projection`, for which a
        recipe has a rule. A task keeps one component at least where there are more tasks than q, and directions of
        a singular value of 0 have no part in the orthogonalisation; there the released code takes arbitrary ones.
    """

    def merge(matrices: Matrices) -> Tensor:
        rank = max(1, min(matrices.shape) // len(matrices))
        return orthogonalised(joined([leading(matrix, rank) for matrix in matrices])).matrix

    return per_matrix(deltas, merge, conv=conv)
