"""RegMean: linear layers merged by regression (Jin et al.)."""

from hf_merge.method import merge_method
from hf_merge.ops.regression import pooled_regression
from hf_merge.types import Fraction, Gram, Merged, Models, Positive


@merge_method(paper="https://arxiv.org/abs/2212.09849", wide=True)
def regmean(models: Models, gram: Gram, *, scaling: Fraction = 0.9, ridge: Positive = 1e-6) -> Merged:
    """Solve for the linear layers whose outputs are nearest to those of all models on their inputs.

    merged = (sum_t G_t)^-1 sum_t G_t W_t,  G_t = X_t^T X_t / n_t with its off-diagonal entries scaled

    Args:
        scaling: what the off-diagonal entries of the Gram matrices are multiplied by.
        ridge: added to the diagonals, as a share of their mean; it keeps singular Gram matrices solvable.

    Good for:
        Models made of linear layers with some inputs at hand for each, when the result is worth measuring first; needs
        measured statistics and no base.

    In words:
        Finds for every linear layer the weights whose outputs are nearest to those of {models} on their own inputs
        (correlations between inputs count {scaling:.0%}), and averages all other tensors.

    Notes:
        Measure the statistics by hf_merge.measure(what="gram"). Tensors without them (norms, biases, embeddings) are
        averaged. The released code has no ridge; with it, directions in which no model has inputs are averaged.
    """
    return pooled_regression(models, gram, scaling, ridge)
