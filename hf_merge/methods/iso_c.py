"""Iso-C: isotropic merging in the common subspace."""

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, isotropic, per_matrix, svd, total
from hf_merge.types import Deltas, Merged


@merge_method(paper="https://arxiv.org/abs/2502.04959", wide=True)
def iso_c(deltas: Deltas, *, conv: Conv = "average") -> Merged:
    """Add up the task vectors, and give all singular values of every matrix their mean.

        U diag(S) V' = sum_i (model_i - base)
        merged = base + lambda * mean(S) * U V'

    Args:
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Several fine-tunes of one base when strong tasks drown weak ones; needs a base and no data but to choose
        lambda.

    In words:
        Adds up the changes of {models}, makes all directions of a matrix equally strong, and adds {lambda:g} times the
        result to {base}.

    Notes:
        As in the released code, what is no matrix is averaged, not added up. Singular values of 0 count in the mean
        and stay 0; there the released code fills in arbitrary directions. The paper chooses lambda on validation data.
    """
    return per_matrix(deltas, lambda matrices: isotropic(svd(total(matrices))), conv=conv)
