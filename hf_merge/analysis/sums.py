"""The numbers that tables are made of: sums over the entries of tensors, in float64, a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_merge.errors import ComputeError

TILE = 1 << 18
"""Entries of every model that are in memory as float64 at a time; more than eight models share the room of eight."""

PIECES = 8
"""Runs that a sample of a tensor is made of."""


@dataclass
class Sums:
    """Sums over entries i of tensors. Models are the rows: m of them whose changes are looked at, then their base.

    Without a base, the mean of the parents stands for it. The change of model a is d_a = w_a - w_base. A model that
    lacks a tensor has no part in the sums over it.

    Attributes:
        products: (m, m), the sum of d_a * d_b.
        squares: (m, m), the sum of d_a ** 2 over the tensors that b has too.
        weights: (m + 1,), the sum of w ** 2 of every model, and of the base.
        base: (m,), the sum of w_base ** 2 over the tensors that a has.
        disagreeing: pairs of parents that change an entry in opposite directions.
        pairs: pairs of parents that both change an entry.
    """

    products: np.ndarray
    squares: np.ndarray
    weights: np.ndarray
    base: np.ndarray
    disagreeing: float = 0.0
    pairs: float = 0.0

    @classmethod
    def of(cls, models: int) -> Sums:
        """Begin with nothing."""
        square = (models, models)
        return cls(np.zeros(square), np.zeros(square), np.zeros(models + 1), np.zeros(models))

    def add(self, other: Sums, times: float = 1.0) -> None:
        """Add other sums, as often as their sample stands for the whole."""
        self.products += times * other.products
        self.squares += times * other.squares
        self.weights += times * other.weights
        self.base += times * other.base
        self.disagreeing += times * other.disagreeing
        self.pairs += times * other.pairs


def sample_runs(numel: int, sample: int | None) -> list[tuple[int, int]]:
    """Say which runs of a tensor's entries are read: all, or evenly spaced ones of about `sample` entries together.

    Args:
        numel: entries of the tensor.
        sample: entries to read, at most; None reads all.
    """
    if sample is None or numel <= sample:
        return [(0, numel)]
    count = min(PIECES, sample)
    size = sample // count
    starts = [(numel - size) * n // max(count - 1, 1) for n in range(count)]
    return [(start, start + size) for start in starts]


def tensor_sums(
    models: Sequence[Sequence[Tensor] | None], base: Sequence[Tensor] | None, parents: int, labels: Sequence[str]
) -> Sums:
    """Sum over one tensor, or over runs of it.

    Args:
        models: of every model the runs, each flat and of the same length for all; None for one that lacks the tensor.
        base: those of the base; None where there is none, and the mean of the parents stands for it.
        parents: how many of the models, the first ones, are parents; the others are results of merges.
        labels: of the models and the base, for errors.

    Raises:
        ComputeError: a value is NaN or infinite.
    """
    sums = Sums.of(len(models))
    present = [place for place, runs in enumerate(models) if runs is not None]
    everyone = [*(runs for runs in models if runs is not None), *([] if base is None else [base])]
    told = [*(labels[place] for place in present), *([] if base is None else [labels[-1]])]
    within = sum(place < parents for place in present)
    for tile in _tiles(everyone):
        lengths = tile.square().sum(1)
        if not bool(lengths.isfinite().all()):
            bad = told[int((~lengths.isfinite()).nonzero()[0])]
            raise ComputeError(f"'{bad}' has NaN or Inf")
        reference = tile[-1] if base is not None else tile[:within].mean(0) if within else torch.zeros_like(tile[0])
        deltas = tile[: len(present)] - reference
        sums.products[np.ix_(present, present)] += (deltas @ deltas.T).numpy()
        sums.weights[present] += lengths[: len(present)].numpy()
        square = float(reference.square().sum())
        sums.weights[-1] += square
        sums.base[present] += square
        _add_signs(sums, deltas[:within])
    both = np.ix_(present, present)
    sums.squares[both] = np.diag(sums.products)[present][:, None]
    return sums


def _add_signs(sums: Sums, deltas: Tensor) -> None:
    """Count pairs by the numbers of models that raise and that lower each entry."""
    raising, lowering = (deltas > 0).sum(0), (deltas < 0).sum(0)
    changing = raising + lowering
    sums.disagreeing += float((raising * lowering).sum())
    sums.pairs += float((changing * (changing - 1)).sum()) / 2


def _tiles(everyone: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the same entries of all, as rows of float64."""
    size = TILE * 8 // max(len(everyone), 8)
    for runs in zip(*everyone, strict=True):
        for start in range(0, runs[0].numel(), size):
            yield torch.stack([run[start : start + size].detach().to("cpu", torch.float64) for run in runs])
