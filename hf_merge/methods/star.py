"""STAR: spectral truncation and rescale."""

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, per_matrix, total, truncated_and_rescaled
from hf_merge.types import Deltas, Fraction, Merged


@merge_method(paper="https://arxiv.org/abs/2502.10339", wide=True)
def star(deltas: Deltas, *, eta: Fraction = 0.4, conv: Conv = "average") -> Merged:
    """Cut the weak directions off each task vector, make up for them by the nuclear norm, and average.

        U diag(S) V' = model_i - base,  r = the least rank with S_1 + .. + S_r >= eta * sum(S)
        d_i = sum(S) / (S_1 + .. + S_r) * sum_{j <= r} S_j u_j v_j'
        merged = base + lambda * mean_i d_i

    Args:
        eta: part of the nuclear norm that is kept, and at least one direction; 1 keeps all.
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Several fine-tunes of one base when the weak directions of their changes are thought to be noise; needs a base.

    In words:
        Keeps the strongest directions of each matrix that hold {eta:.0%} of the change of {models}, scales them up for
        what was cut, averages them, and adds {lambda:g} times the result to {base}.

    Notes:
        What is no matrix is averaged.
    """
    return per_matrix(
        deltas, lambda parts: total(truncated_and_rescaled(one, eta) for one in parts) / len(parts), conv=conv
    )
