"""What parameters are called in the code of papers and in other tools; told where a name is unknown, never taken."""

from __future__ import annotations

from collections.abc import Collection

_CALLED = (
    ("lambda", "", "lam lamb lamda lambd scale scaling scaling_coef scaling_coeff scaling_coefficient scaling_factor"),
    ("lambda", "", "task_vector_scaling_coefficient alpha merge_weight"),
    ("weight", "", "lambdas task_weight task_weights weights coef coefs coefficient coefficients scaling_coefficients"),
    ("coefficient", "", "weight weights scaling_coef scaling_coeffs"),
    ("density", "as a fraction: 20 percent are 0.2", "K k topk top_k topK threshold thresh keep keep_ratio top_k_keep"),
    ("density", "which is what is kept: 1 - {name}", "mask_rate drop_rate drop_prob p sparsity prune_rate dropout"),
    ("consensus", "one of mean, sum and max", "merge_func merging_func merging_type merge_type agg disjoint_merge"),
    ("filter_ratio", "with variant: reference", "high_ratio high_scale_ratio high_freq_ratio"),
    ("cut", "", "cutoff cut_off d0 D0 high_pass"),
    ("with_align", "", "align"),
    ("k", "", "prun_thre_k prune_threshold consensus_threshold"),
    ("ratio", "", "pcb_ratio top_ratio keep_ratio topk"),
    ("rank_fraction", "", "rank rank_ratio svd_ratio keep_ratio prune_ratio"),
    ("iterations", "", "iter_num iters num_iterations num_steps steps max_steps epochs"),
    ("learning_rate", "", "lr"),
    ("floor", "", "minimal_fisher_weight min_fisher fisher_floor"),
    ("normalize", "", "normalize_fisher_weight"),
    ("scaling", "", "reduce_non_diagonal_ratio reduce_off_diagonal off_diagonal a"),
    ("gamma", "", "top_frac top_k_remove outliers"),
)
"""By parameter: what to know of its values, and other names of it. The first that a method has is told."""


def told_alias(name: str, parameters: Collection[str]) -> str:
    """Return a sentence that says what a name of other code is called here, or nothing.

    Args:
        name: as it was written.
        parameters: that the method has.
    """
    for own, note, others in _CALLED:
        if own in parameters and name in others.split():
            said = f" ({note.format(name=name)})" if note else ""
            return f" What other code calls '{name}' is '{own}' here{said}."
    return ""
