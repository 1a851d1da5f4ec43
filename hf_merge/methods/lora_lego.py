"""LoRA-LEGO: clusters of rank-1 units."""

from hf_merge.method import merge_method
from hf_merge.ops.factors import clustered, mean_rank, weighted_units
from hf_merge.types import Count, Factors, Merged, Number, PerModel, each


@merge_method(paper="https://arxiv.org/abs/2409.16167")
def lora_lego(factors: Factors, *, weight: PerModel[Number] = each(1.0), units: Count | None = None) -> Merged:
    """Cluster the rank-1 units of LoRA adapters by k-means, and build an adapter of the centroids.

        unit_j = (b_j, a_j), the j-th column of B and row of A, of all adapters
        c_1 .. c_k = the clusters' means, made as long as their members are on the average
        merged = sqrt(r / k) sum_j b(c_j) a(c_j)^T, r the mean of the adapters' ranks

    Args:
        weight: share of each adapter; scales its units' products.
        units: how many clusters: the rank of the result; the mean of the adapters' ranks if not given.

    Good for:
        LoRA adapters of one base that should become one adapter of ordinary rank in which similar parts are joined;
        needs adapters.

    In words:
        Counts {model} {weight:g} times. Cuts the adapters into their smallest units, groups similar ones (number of
        groups: {units}), and builds an adapter with one unit for each group.

    Notes:
        Both reweightings of the paper, of the centroids' length and of the sum. k-means begins with the longest unit
        and then those farthest from all before, and so is not random; the paper does not say how it begins.
    """
    rank = mean_rank(factors)
    count = min(units or rank, len(factors[0]))
    return clustered(weighted_units(factors, weight), count) * (rank / count) ** 0.25
