"""Gram matrices X^T X / n of the inputs of layers, in passes over the data that keep to a bound on memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.data import Batch
from hf_merge.errors import DataError, ParameterError
from hf_merge.measuring.subject import Layer, Subject, given_to
from hf_merge.types import TensorSpec

SMALL = 1024
"""Up to so many inputs, sums are kept in float64."""


@dataclass(frozen=True, eq=False)
class Shared:
    """Layers that get the same inputs, such as the projections of an attention.

    Attributes:
        layers: they; the first is the one that is watched.
    """

    layers: tuple[Layer, ...]

    @property
    def first(self) -> Layer:
        return self.layers[0]

    @property
    def names(self) -> list[str]:
        """The tensors of the checkpoint that the matrix belongs to."""
        return [name for layer in self.layers for name in layer.saved]

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.first.shape, torch.float32)

    @property
    def nbytes(self) -> int:
        """Of the sum."""
        return self.first.inputs**2 * _dtype_of_sum(self.first.inputs).itemsize


def _dtype_of_sum(size: int) -> torch.dtype:
    return torch.float64 if size <= SMALL else torch.float32


class Sum:
    """X^T X and the number of rows."""

    def __init__(self, layer: Layer):
        self.layer, self.rows = layer, 0
        self.total: Tensor | None = None

    def add(self, given: Tensor, mask: Tensor | None) -> None:
        """Add the inputs of one call."""
        size = self.layer.inputs
        rows = self.layer.rows(given.detach(), mask)
        rows = rows.to(_dtype_of_sum(size) if rows.device.type != "mps" else torch.float32)
        if self.total is None:
            self.total = torch.zeros(size, size, dtype=rows.dtype, device=rows.device)
        self.total.addmm_(rows.mT, rows)
        self.rows += len(rows)

    def mean(self) -> Tensor:
        """Return X^T X / n in float32; zeros for a layer that was never called."""
        if self.total is None:
            return torch.zeros(self.layer.shape)
        found = (self.total / max(self.rows, 1)).float().reshape(self.layer.shape)
        if not bool(found.isfinite().all()):
            raise DataError(f"'{self.layer.live}' gets NaN or Inf for inputs: nothing can be measured.")
        return found


@torch.no_grad()
def sharing(subject: Subject, layers: Sequence[Layer], batch: Batch) -> list[Shared]:
    """Find by one example which layers get the same inputs; those that are not called stay alone."""
    calls: dict[int, list[int]] = {id(layer): [] for layer in layers}
    kept: list[Tensor] = []  # so that no two have one address

    def note(layer: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept.append(given_to(args, kwargs))
            calls[id(layer)].append(id(kept[-1]))

        return hook

    with watched((layer.module, note(layer)) for layer in layers):
        subject.module(**subject.inputs(next(batch.examples()).inputs))
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        own = calls[id(layer)]
        key = (tuple(own), layer.shape, not isinstance(layer.module, nn.Conv2d) or id(layer)) if own else id(layer)
        groups.setdefault(key, []).append(layer)
    return [Shared(tuple(group)) for group in groups.values()]


@torch.no_grad()
def gram_matrices(
    subject: Subject, groups: Sequence[Shared], batches: Iterable[Batch], max_memory: int, done: Callable[[int], None]
) -> Iterator[tuple[Shared, Tensor]]:
    """Yield the Gram matrix of each group, as soon as a pass over the data has found it.

    Args:
        subject: the model.
        groups: whose inputs are measured.
        batches: the data; gone through once for each pass.
        max_memory: bytes that the sums of one pass may take; one that takes more has a pass of its own.
        done: called with the number of examples that are done.
    """
    for part in in_passes(groups, max_memory):
        sums = {id(group): Sum(group.first) for group in part}
        masks: list[Tensor | None] = [None]
        with watched((group.first.module, _adding(sums[id(group)], masks)) for group in part):
            for batch in batches:
                masks[0] = batch.inputs.get("attention_mask")
                subject.module(**subject.inputs(batch.inputs))
                done(batch.size)
        for group in part:
            yield group, sums.pop(id(group)).mean()


def _adding(total: Sum, masks: list[Tensor | None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
        total.add(given_to(args, kwargs), masks[0])

    return hook


@contextmanager
def watched(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Call functions before modules, and no longer."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def in_passes(groups: Sequence[Shared], max_memory: int) -> list[list[Shared]]:
    """Distribute groups over passes, in order."""
    passes: list[list[Shared]] = []
    room = 0
    for group in groups:
        if not passes or group.nbytes > room:
            passes.append([])
            room = max_memory
        passes[-1].append(group)
        room -= group.nbytes
    return passes


def bytes_in(size: int | str) -> int:
    """Read a number of bytes, or `4GB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if isinstance(size, bool) or found is None or float(found[1]) <= 0:
        raise ParameterError(f"max_memory= should be bytes or a size such as '4GB'; found {size!r}.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))
