"""Iso-CTS: isotropic merging in common and task-specific subspaces."""

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, Matrices, isotropic, joined, leading, orthogonalised, per_matrix, svd, total
from hf_merge.types import Deltas, Fraction, Merged


@merge_method(paper="https://arxiv.org/abs/2502.04959", wide=True)
def iso_cts(deltas: Deltas, *, common_space_fraction: Fraction = 0.8, conv: Conv = "average") -> Merged:
    """Make the common subspace of a sum and each task's own directions beside it equally strong.

        U_c, S_c, V_c = the first c components of sum_i d_i,  d_i = model_i - base
        U_i, S_i, V_i = the first (q - c) / T components of d_i - U_c U_c' d_i,  q = min(rows, columns)
        merged = base + lambda * mean(S) * polar([U_1 .. U_T U_c]) polar([V_1 .. V_T V_c])'

    Args:
        common_space_fraction: part of the rank that is common, c / q.
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Many fine-tunes of one base when what is special to each is lost in what they share; needs a base and no data
        but to choose lambda.

    In words:
        Gives {common_space_fraction:.0%} of the directions of a matrix to what {models} share and splits the others
        among them, makes all equally strong, and adds {lambda:g} times the result to {base}.

    Notes:
        The rank of the tasks is rounded to a multiple of their number, as in the released code. What is no matrix is
        averaged. Singular values of 0 count in the mean and stay 0.
    """

    def merge(matrices: Matrices) -> Tensor:
        rank, count = min(matrices.shape), len(matrices)
        own = min(round((rank - int(common_space_fraction * rank)) / count), rank // count)
        common = svd(total(matrices)).part(0, rank - own * count)
        rests = [leading(matrix - common.u @ (common.u.T @ matrix), own) for matrix in matrices]
        return isotropic(orthogonalised(joined([*rests, common])))

    return per_matrix(deltas, merge, conv=conv)
