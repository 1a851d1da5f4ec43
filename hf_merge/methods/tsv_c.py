"""TSV-Compress: task singular vectors, each task's its own."""

from hf_merge.forms import WHOLE, Experts, Form, LowRank, is_matrix
from hf_merge.method import merge_method
from hf_merge.ops.experts import factors, part_of_rank
from hf_merge.types import Fraction, Models, Tensor


def _form(shape: tuple[int, ...], count: int, *, rank_fraction: float | None) -> Form:
    fraction = 1 / count if rank_fraction is None else rank_fraction
    return LowRank(part_of_rank(shape, fraction)) if is_matrix(shape) else WHOLE


@merge_method(paper="https://arxiv.org/abs/2412.00081", wide=True, experts=_form)
def tsv_c(models: Models, base: Tensor, *, rank_fraction: Fraction | None = None) -> Experts:
    """Keep the base, and for each task the first singular components of every matrix of its task vector.

        d_i = model_i - base = U_i S_i V_i',  k = the rank's fraction of min(rows, columns)
        task i: base + U_i[:, :k] S_i[:k] V_i[:, :k]'

    Args:
        rank_fraction: how much of the full rank each task has; 1 / number of tasks if not given, as in the paper.

    Good for:
        Fine-tunes of one base that must each keep their skill, when the task of every input is known and thin matrices
        are cheap enough for each.

    In words:
        Keeps {base}, and for each of {models} the strongest directions of its change in every matrix (share of the
        rank: {rank_fraction}).

    Notes:
        The backbone is the base. What is no matrix (biases, norms, tokens) is kept whole for each task; kernels of
        convolutions are matrices [out, in*kh*kw].
    """
    form = _form(tuple(base.shape), len(models), rank_fraction=rank_fraction)
    if not isinstance(form, LowRank):
        return Experts([{"whole": model} for model in models])
    return Experts([factors(model - base, form.rank) for model in models])
