"""Means and root mean squares of what layers give, feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.data import Batch
from hf_merge.measuring.subject import Layer, Subject
from hf_merge.types import TensorSpec


def outputs_of(layer: Layer) -> int:
    """Return how many features a layer gives."""
    weight: Tensor = layer.module.weight  # type: ignore[assignment]
    return weight.shape[1] if layer.inputs_first else weight.shape[0]


def spec_of(layer: Layer) -> TensorSpec:
    """Return the shape of its statistics: a row of means, a row of root mean squares."""
    return TensorSpec((2, outputs_of(layer)), torch.float32)


@torch.no_grad()
def activations(
    subject: Subject, layers: list[Layer], batches: Iterable[Batch], done: Callable[[int], None]
) -> list[Tensor]:
    """Return mean and root mean square of the outputs of each layer over the data; padding is left out."""
    sums = [torch.zeros(2, outputs_of(layer), dtype=torch.float64) for layer in layers]
    counts = [0] * len(layers)
    masks: list[Tensor | None] = [None]

    def add(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            rows = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
            if (mask := masks[0]) is not None and rows.shape[:-1] == mask.shape:
                rows = rows[mask.to(rows.device).bool()]
            rows = rows.reshape(-1, rows.shape[-1]).to("cpu", torch.float64)
            sums[place] += torch.stack([rows.sum(0), rows.square().sum(0)])
            counts[place] += len(rows)

        return hook

    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(layer.module.register_forward_hook(add(place)).remove)
        for batch in batches:
            masks[0] = batch.inputs.get("attention_mask")
            subject.module(**subject.inputs(batch.inputs))
            done(batch.size)
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    return [torch.stack([mean[0], mean[1].sqrt()]).float() for mean in means]
