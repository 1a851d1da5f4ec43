"""Linear layers that answer as others do: regression onto the outputs of several models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pooled_regression(weights: Sequence[Tensor], grams: Sequence[Tensor], scaling: float, ridge: float) -> Tensor:
    """Return the weight that is nearest to every model's outputs on that model's inputs, in the least squares.

    W = (sum_t G_t)^-1 sum_t G_t W_t, with inputs in rows and outputs in columns, and G_t with its off-diagonal entries
    scaled. It is solved for what W differs from the mean of the weights, to which it falls back where no model has
    inputs.

    Args:
        weights: one for each model, (out, in, ...), or (in, out) if its Gram matrix says so.
        grams: X^T X of the inputs of each, (in, in), or (in, 1, in); see `types.inputs_of`.
        scaling: what entries off the diagonal are multiplied by.
        ridge: a share of the mean of the diagonal that is added to it.
    """
    inputs_first = grams[0].dim() == 3
    size = grams[0].shape[-1]
    columns = [w if inputs_first else w.reshape(len(w), -1).mT for w in (weight.double() for weight in weights)]
    mean = columns[0] + sum(one - columns[0] for one in columns) / len(columns)  # exact if all are equal
    kept = [_shrunk(gram.double().reshape(size, size), scaling) for gram in grams]
    level = torch.stack([gram.diagonal().sum() for gram in kept]).sum() / max(size * len(kept), 1)
    level = torch.where(level > 0, level, torch.ones_like(level))
    total = sum(kept) / level  # of order 1, whatever the scale of the activations
    total.diagonal().add_(ridge * len(kept))
    moved = sum(gram @ (one - mean) for gram, one in zip(kept, columns, strict=True)) / level
    moved += ridge * sum(one - mean for one in columns)
    solved = mean + torch.linalg.solve(total, moved)
    return (solved if inputs_first else solved.mT.reshape(weights[0].shape)).to(weights[0].dtype)


def _shrunk(gram: Tensor, scaling: float) -> Tensor:
    """Scale the entries off the diagonal."""
    return scaling * gram + (1 - scaling) * torch.diag(gram.diagonal())
