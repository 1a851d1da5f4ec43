"""Concatenation of LoRA adapters."""

from hf_merge.method import merge_method
from hf_merge.ops.factors import weighted_units
from hf_merge.types import Factors, Merged, Number, PerModel, each


@merge_method(paper="https://arxiv.org/abs/2410.13025")
def cat(factors: Factors, *, weight: PerModel[Number] = each(1.0)) -> Merged:
    """Put the factors of LoRA adapters side by side: their exact weighted sum, at the sum of their ranks.

        merged = [weight_1 B_1 | weight_2 B_2 | ..] [A_1 ; A_2 ; ..] = sum_i weight_i B_i A_i

    Args:
        weight: share of each adapter.

    Good for:
        LoRA adapters of one base that should be added exactly, at the price of a larger adapter: its rank is the sum
        of theirs.

    In words:
        Adds {weight:g} times the change of {model}. The sum is exact, at the sum of the adapters' ranks.

    Notes:
        The static form of LoRA Soups' CAT, whose paper learns the weights; PEFT's combination_type "cat". Nothing is
        computed on the factors but the weights, so that one adapter at weight 1 is left as it is.
    """
    return weighted_units(factors, weight)
