"""SVC: singular value calibration."""

from collections.abc import Sequence

from torch import Tensor

from hf_merge.method import merge_method
from hf_merge.ops.combine import weighted_sum
from hf_merge.ops.spectral import Conv, Matrices, calibrated, per_matrix
from hf_merge.types import Deltas, Merged, Number, PerModel, Positive, each


@merge_method(paper="https://arxiv.org/abs/2602.05536", wide=True)
def svc(
    deltas: Deltas,
    *,
    weight: PerModel[Number] = each(1.0),
    merged: PerModel[bool] = each(False),
    alpha: Positive | None = None,
    conv: Conv = "average",
) -> Merged:
    """Lower the singular values of a merge along directions that several tasks share.

        U diag(S) V' = M = sum_i weight_i * d_i, or the merge that is calibrated;  d_i = model_i - base
        s_ri = <u_r' M, u_r' d_i> / |u_r' d_i|^2
        merged = base + lambda * U diag(g * S) V',  g_r = T / sum_i max(alpha, s_ri)

    Args:
        weight: scale of each task vector in the sum.
        merged: this model is no task but the merge to calibrate, such as the result of an earlier stage.
        alpha: at 1 singular values are only lowered, below 1 raised too; 1/T if not given.
        conv: take the kernel of a convolution as a matrix [out, in*kh*kw], or leave it as it was merged.

    Good for:
        A sum of fine-tunes, or an earlier merge of them, in which what several share came out too strong; needs a
        base.

    In words:
        Counts the change of {model} {weight:g} times{merged:, as the merge to start from|}. Adds up the changes unless
        one is the merge to start from, evens out the directions that several models share, and adds {lambda:g} times
        the result to {base}.

    Notes:
        What is no matrix stays as it was merged. The paper takes alpha = 1/T, and 1 after TSV-M.
    """
    given = [delta for delta, chosen in zip(deltas, merged, strict=True) if chosen]
    tasks = [delta for delta, chosen in zip(deltas, merged, strict=True) if not chosen]
    shares = [w for w, chosen in zip(weight, merged, strict=True) if not chosen]

    def start(parts: Sequence[Tensor]) -> Tensor:
        return weighted_sum(parts[: len(given)] or parts, [1.0 / len(given)] * len(given) if given else shares)

    def merge(parts: Matrices) -> Tensor:
        return calibrated(start(parts), parts[len(given) :], alpha or 1 / max(1, len(tasks)))

    return per_matrix([*given, *tasks], merge, conv=conv, others=start)
