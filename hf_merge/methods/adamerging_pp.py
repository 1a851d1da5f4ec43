"""AdaMerging++: what TIES keeps of each task vector, with a coefficient for each."""

from typing import Annotated

from hf_merge.method import merge_method
from hf_merge.ops.combine import agreeing, majority_sign, weighted_sum
from hf_merge.ops.sparsify import Threshold, keep_largest, magnitude_levels, trimmed
from hf_merge.types import Deltas, Fraction, Merged, Number, PerModel, Reduced, Tiles, each


def _cut(tiles: Tiles, *, density: list[float]) -> list[Threshold]:
    return magnitude_levels(tiles, density=density)


def _undecided(tiles: Tiles, *, cut: list[Threshold]) -> float:
    ones = [1.0] * len(cut)
    return majority_sign(trimmed(tiles, cut, ones, ones))


@merge_method(paper="https://arxiv.org/abs/2310.02575", elementwise=True)
def adamerging_pp(
    deltas: Deltas,
    cut: Annotated[list[Threshold], Reduced(_cut, over="model")],
    undecided: Annotated[float, Reduced(_undecided, over="model")],
    *,
    weight: PerModel[Number] = each(0.3),
    density: PerModel[Fraction] = each(0.2),
) -> Merged:
    """Trim task vectors over the whole model, elect signs by equal votes, and sum what agrees by weights.

        d_i = the density_i * N largest entries of model_i - base, over the whole model
        s = sign(sum_i d_i)
        merged = base + lambda * sum_{i: sign(d_i) = s} weight_i * d_i

    Args:
        weight: coefficient of each task vector; it has no part in the vote.
        density: fraction of entries kept, of each task vector.

    Good for:
        Fine-tunes of one base when hf_merge.search.adamerging can learn the weight of each model from unlabelled
        inputs; without that, `ties` is simpler.

    In words:
        Keeps the {density:.0%} largest changes of {model}, and counts those that agree with the vote {weight:g} times.
        Lets the heavier side decide each sign by equal votes, adds up what agrees, and adds {lambda:g} times the
        result to {base}.

    Notes:
        With one weight for all it is `ties` with scope global and consensus sum. `hf_merge.search.adamerging` learns
        the weights; they may differ from tensor to tensor.
    """
    kept = [keep_largest(delta, threshold, deltas.start) for delta, threshold in zip(deltas, cut, strict=True)]
    return weighted_sum(agreeing(kept, undecided=undecided), weight)
