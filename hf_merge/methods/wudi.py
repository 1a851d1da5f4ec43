"""WUDI-Merging."""

from typing import Literal

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.spectral import Conv, Matrices, least_interference, per_matrix, undisturbed
from hf_merge.types import Count, Deltas, Merged, Positive


@merge_method(paper="https://arxiv.org/abs/2503.08099", wide=True)
def wudi(
    deltas: Deltas,
    *,
    solution: Literal["iterative", "closed_form"] = "iterative",
    iterations: Count = 300,
    learning_rate: Positive = 1e-5,
    conv: Conv = "average",
) -> Merged:
    """Find the task vector that interferes least with the inputs that each task's own vector stands for.

        x = argmin sum_i |(x - d_i) d_i'|^2 / |d_i|^2,  d_i = model_i - base,  from x = sum_i d_i
        iterative: Adam;  closed_form: x = x_0 + (sum_i d_i C_i - x_0 C) C^+,  C = sum_i C_i,  C_i = d_i' d_i / |d_i|^2
        merged = base + lambda * x

    Args:
        solution: some steps of Adam as in the paper, or their limit at once.
        iterations: steps of Adam.
        learning_rate: of Adam.
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or average it.

    Good for:
        Several fine-tunes of one base, without data but with time to compute: every matrix is optimised by itself;
        needs a base.

    In words:
        Looks for the change that disturbs those of {models} least ({solution:iterative=by steps of
        optimisation|closed_form=solved at once}), and adds {lambda:g} times the result to {base}.

    Notes:
        The steps of the paper end far before the limit, which amplifies noise; its results are theirs, so they are the
        default. The authors' code merges the weights of linear layers only and leaves all else at the base; here every
        matrix is merged and the rest averaged: a recipe keeps tensors by rules.
    """

    def merge(matrices: Matrices) -> Tensor:
        if solution == "closed_form":
            return undisturbed(matrices)
        return least_interference(matrices, iterations, learning_rate)

    return per_matrix(deltas, merge, conv=conv)
