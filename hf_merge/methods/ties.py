"""TIES-Merging."""

from typing import Annotated, Literal

from hf_merge.method import merge_method
from hf_merge.ops.combine import disjoint_max, disjoint_sum, majority_sign
from hf_merge.ops.sparsify import Threshold, magnitude_factors, magnitude_levels, magnitude_thresholds, trim, trimmed
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Rescale, Tiles, each


def _cut(tiles: Tiles, *, scope: str, density: list[float]) -> list[Threshold]:
    return (magnitude_levels if scope == "global" else magnitude_thresholds)(tiles, density=density)


def _undecided(tiles: Tiles, *, scope: str, cut: list[Threshold], factors: list[float], weight: list[float]) -> float:
    return majority_sign(trimmed(tiles, cut, factors, weight)) if scope == "global" else 1.0


def _over(*, scope: str) -> str:
    return "model" if scope == "global" else "tensor"


@merge_method(paper="https://arxiv.org/abs/2306.01708", elementwise=True, ignored=("int8_mask",))
def ties(
    deltas: Deltas,
    cut: Annotated[list[Threshold], Reduced(_cut, over=_over)],
    factors: Annotated[list[float], Reduced(magnitude_factors, over=_over)],
    undecided: Annotated[float, Reduced(_undecided, over=_over)],
    *,
    weight: PerModel[Number] = each(1.0),
    density: PerModel[Fraction] = each(1.0),
    normalize: bool = True,
    rescale: Rescale = "none",
    scope: Literal["tensor", "global"] = "tensor",
    consensus: Literal["mean", "sum", "max"] = "mean",
) -> Merged:
    """Trim each task vector to its largest entries, elect a sign per entry, and merge those that agree.

        d_i = the density_i * N largest entries of model_i - base, of each tensor or of the whole model
        s = sign(sum_i weight_i * d_i)
        merged = base + lambda * sum_{i: sign(weight_i d_i) = s} weight_i d_i / sum_{same i} weight_i

    Args:
        weight: share of each task vector, in the vote as well.
        density: fraction of entries kept, of each task vector.
        normalize: divide each entry by the weights that agreed; only with the consensus mean.
        rescale: make up for trimmed entries by the L1 norm, by 1/density, or not.
        scope: trim each tensor by itself as MergeKit does, or the whole model at once as the paper does.
        consensus: mean, sum or largest of the entries that agree.

    Good for:
        Two or more fine-tunes of one base that should all keep their skills; a safe first choice, best with a density
        below 1.

    In words:
        Keeps the {density:.0%} largest changes of {model}, and counts them {weight:g} times. Lets the heavier side
        decide each sign, {consensus:mean=averages|sum=adds up|max=takes the largest of} what agrees{normalize:|
        (undivided)}, and adds {lambda:g} times the result to {base}.

    Notes:
        Per tensor, exactly max(1, int(density * N)) entries are kept, the first of equal ones, and s = 0 counts as +.
        Globally, as in the authors' code, int(density * N) + 1 are and all that equal the last, and s = 0 takes the
        sign that most entries have; vision experiments use density 0.2, the sum and lambda 0.3.
    """
    kept = trim(deltas, cut, factors)
    if consensus == "max":
        return disjoint_max(kept, weight, undecided=undecided)
    return disjoint_sum(kept, weight, normalize=normalize and consensus == "mean", undecided=undecided)
