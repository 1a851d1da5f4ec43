"""Fisher-weighted averaging (Matena and Raffel)."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.information import fisher_norms, weighted_by
from hf_merge.types import Fisher, Merged, Models, NonNegative, PerModel, Reduced, each


def _over(*, normalize: bool) -> str:
    return "model" if normalize else "tensor"


Norms = Annotated[list[float] | None, Reduced(fisher_norms, over=_over)]


@merge_method(paper="https://arxiv.org/abs/2111.09832", elementwise=True)
def fisher(
    models: Models,
    fisher: Fisher,
    norms: Norms,
    *,
    weight: PerModel[NonNegative] = each(1.0),
    normalize: bool = True,
    floor: NonNegative = 1e-6,
) -> Merged:
    """Average entries by how much each model knows of them: its diagonal Fisher information.

    merged = sum_t c_t (F_t + floor) theta_t / sum_t c_t (F_t + floor),  c_t = weight_t / (||F_t|| + 1e-6)

    Args:
        weight: how much each model counts.
        normalize: divide the Fisher information of each model by its norm over all merged tensors.
        floor: added to the Fisher information, so that entries of which no data says anything are averaged.

    Good for:
        Models of one architecture with data at hand for each, so that a model counts most where it knows most; needs
        measured statistics and no base.

    In words:
        Counts {model} {weight:g} times. Averages each weight by how much each model's data say about it.

    Notes:
        Measure the statistics by hf_merge.measure(what="fisher"). Tensors without them (buffers) are averaged. Without
        normalize, c_t is the weight alone, as in the paper; with it, as in the released code of MergeLM. Negative
        entries of the statistics count as 0; where all weights are 0 the result is the plain mean.
    """
    scales = [1.0] * len(models) if norms is None else [1 / (norm + 1e-6) for norm in norms]
    importance = [w * c * (f.clamp(min=0) + floor) for w, c, f in zip(weight, scales, fisher, strict=True)]
    return weighted_by(importance, models)
