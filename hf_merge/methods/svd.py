"""Sum of LoRA adapters at a lower rank."""

from hf_merge.method import merge_method
from hf_merge.ops.factors import mean_rank, singular_units, weighted_units
from hf_merge.types import Count, Factors, Merged, Number, PerModel, each


@merge_method(paper="https://huggingface.co/docs/peft/package_reference/lora")
def svd(factors: Factors, *, weight: PerModel[Number] = each(1.0), units: Count | None = None) -> Merged:
    """Sum LoRA adapters and keep the best approximation of a rank, by the singular values of the sum.

        U S V^T = sum_i weight_i B_i A_i
        merged = U[:, :units] S[:units] V[:, :units]^T

    Args:
        weight: share of each adapter.
        units: rank of the result; the mean of the adapters' ranks if not given.

    Good for:
        LoRA adapters of one base that should become one adapter of ordinary rank with as little loss as can be; needs
        adapters.

    In words:
        Adds {weight:g} times the change of {model}. Keeps the strongest directions of the sum (rank: {units}).

    Notes:
        PEFT's combination_type "svd", whose default is the largest rank; the same result, but the sum is never made
        as a matrix. The recipe's `rank` may lower the rank further, or choose it by the energy that is kept.
    """
    return singular_units(weighted_units(factors, weight), units or mean_rank(factors))
