"""RegMean++: RegMean on the inputs that layers of the merged model get (Nguyen et al.)."""

from hf_merge.method import merge_method
from hf_merge.ops.regression import pooled_regression
from hf_merge.types import Fraction, Gram, Merged, Models, Positive


@merge_method(paper="https://arxiv.org/abs/2508.03121", wide=True)
def regmean_plus_plus(models: Models, merged_gram: Gram, *, scaling: Fraction = 0.95, ridge: Positive = 1e-6) -> Merged:
    """Merge linear layers by regression on the inputs that the merged layers before them give.

    merged = (sum_t G_t)^-1 sum_t G_t W_t,  G_t = X_t^T X_t / n_t of inputs from merged layers, off-diagonals scaled

    Args:
        scaling: what the off-diagonal entries of the Gram matrices are multiplied by.
        ridge: added to the diagonals, as a share of their mean; it keeps singular Gram matrices solvable.

    Good for:
        As `regmean`, for deep models in which a merged layer changes the inputs of the next; needs statistics measured
        on all models together.

    In words:
        Goes through the layers and finds the weights whose outputs are nearest to those of {models} on inputs from the
        merged layers before (correlations between inputs count {scaling:.0%}), and averages all other tensors.

    Notes:
        Measure the statistics of all models together by hf_merge.measure(what="merged_gram") with the same scaling and
        ridge. Tensors without them (norms, biases, embeddings) are averaged, also those after the last layer, which
        the released code leaves as they are in the base.
    """
    return pooled_regression(models, merged_gram, scaling, ridge)
