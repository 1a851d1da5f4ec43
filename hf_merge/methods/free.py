"""FREE-Merging: FR-Merging with a few entries for each task."""

from functools import partial
from typing import Annotated, Literal

import torch

from hf_merge.forms import Experts, Form, Sparse
from hf_merge.method import merge_method
from hf_merge.ops.combine import exact_sum
from hf_merge.ops.experts import Balance, Budget, Changes, balance, in_rows, kept_entries, outstanding
from hf_merge.ops.fourier import in_blocks, radial_high_pass, released_filter
from hf_merge.types import Count, Fraction, Models, NonNegative, Number, Reduced, Tensor, Tiles


def _filtered(change: Tensor, variant: str, cut: float, filter_ratio: float, split: int) -> Tensor:
    if change.dim() != 2 or not change.numel():
        return change
    by = partial(radial_high_pass, cut=cut) if variant == "paper" else partial(released_filter, ratio=filter_ratio)
    return in_blocks(change, split, by)


def _balance(
    tiles: Tiles, *, variant: str, cut: float, filter_ratio: float, split: int, density: float, remove: float,
    budget: Budget,
) -> list[Balance]:  # fmt: skip
    by = partial(_filtered, variant=variant, cut=cut, filter_ratio=filter_ratio, split=split)
    return balance(tiles, variant=variant, by=by, density=density, remove=remove, budget=budget)


def _form(shape: tuple[int, ...], count: int, *, density: float, remove: float, budget: Budget) -> Form:
    rows, kept = kept_entries(shape, density, budget)
    left = 1 if not shape else (shape[-1] if budget == "row" else torch.Size(shape).numel())
    return Sparse(min(kept, left - int(left * remove)), rows)


@merge_method(paper="https://arxiv.org/abs/2411.16815", experts=_form)
def free(
    models: Models,
    base: Tensor,
    balances: Annotated[list[Balance], Reduced(_balance, over="model")],
    *,
    variant: Literal["paper", "reference"] = "paper",
    density: Fraction = 0.01,
    remove: Fraction = 0.0,
    budget: Budget = "row",
    expert_weight: Number | None = None,
    shared_weight: Number = 1.0,
    overlap: Literal["replace", "add"] = "replace",
    cut: NonNegative = 0.05,
    filter_ratio: Fraction = 0.7,
    split: Count = 1,
    lambda_: Number = 1.0,
) -> Experts:
    """Merge filtered task vectors as FR-Merging does, and keep for each task its largest entries.

        d_i = model_i - base,  v_i = the high frequencies of d_i,  e_i = the largest entries of d_i
        merged = base + lambda * shared_weight * sum_i a_i v_i
        task i: merged, but base + lambda * w_i e_i at the entries of e_i
        paper: a_i = E(d_i) / sum_j E(d_j),  w_i = -log10(density) E(e_i) / (a_i E(v_i));  E = mean magnitude
        reference: a_i = 1,  w_i = -log10(density) (E(e_i) / density) / E(v_i)

    Args:
        variant: filter and coefficients of the paper, or those of the released code (reference).
        density: how many entries a task keeps.
        remove: of the largest ones, how many are left out before.
        budget: whether every row keeps that share of its entries, or a tensor as a whole.
        expert_weight: what e_i is multiplied by, instead of w_i.
        shared_weight: what the sum is multiplied by.
        overlap: whether an entry takes the place of the backbone's change, or is added to it.
        cut: radius of what the paper's filter removes; 1 is the Nyquist frequency.
        filter_ratio: radius of what the released filter keeps, as a part of the shorter side.
        split: filter so many blocks of rows apart, 3 for a fused qkv.
        lambda_: scale of all that is added to the base.

    Good for:
        Fine-tunes of one base that must each keep their skill in little space, when the task of every input is known.

    In words:
        Adds {shared_weight:g} times the filtered changes of {models} to {base}, keeps the {density:.1%} largest
        changes of each for its own task, and scales all that is added by {lambda:g}.

    Notes:
        The released scripts have other constants for each setting: 8 tasks lambda 0.5, shared_weight 0.5; 30 tasks
        density 0.02, shared_weight 0.1, expert_weight 7; RoBERTa density 0.1, remove 0.02, shared_weight 0.2,
        expert_weight 10, overlap add. They leave some tensors at the base, for which a recipe has rules. At a density
        below 1 / columns a row keeps nothing: budget: tensor does not depend on the width.
    """
    deltas = Changes(models, base)
    total = exact_sum(deltas, [one.share for one in balances])
    change = _filtered(total, variant, cut, filter_ratio, split) * shared_weight  # filters are linear
    parts = []
    for delta, one in zip(deltas, balances, strict=True):
        places, values = outstanding(delta, density, remove, budget)
        own = values * (one.weight if expert_weight is None else expert_weight)
        below = in_rows(change, len(places)).gather(1, places)
        new = own + below if overlap == "add" else torch.where(own != 0, own, below)
        weights = torch.add(in_rows(base, len(places)).gather(1, places), new, alpha=lambda_)
        parts.append({"indices": places, "values": weights})
    return Experts(parts, backbone=torch.add(base, change, alpha=lambda_))
