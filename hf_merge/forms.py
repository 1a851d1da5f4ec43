"""What a task expert is, tensor by tensor: in which form it is kept, and how a weight is rebuilt from it.

A method with task experts gives a backbone, and for each task what makes its own weight of the backbone's: a mask over
a vector that all tasks share, a few entries, two factors, or the whole weight. The form is known before anything is
computed, and so are the sizes of all that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hf_merge.packing import masked, replaced
from hf_merge.types import TensorSpec

Fields = Mapping[str, Tensor]
"""What is kept of one tensor for one task, by the names that its form gives."""


class Form(Protocol):
    """How one tensor is kept for a task.

    Attributes:
        needs_shared: whether it is rebuilt from a vector that all tasks share.
    """

    needs_shared: ClassVar[bool]

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """Say what is kept for a tensor of this shape and dtype."""
        ...

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        """Return the task's weight, in the backbone's dtype; arithmetic is in float32 or wider."""
        ...


@dataclass(frozen=True)
class Nothing:
    """The task has the backbone's weight."""

    needs_shared: ClassVar[bool] = False

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {}

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        return backbone


@dataclass(frozen=True)
class Mask:
    """backbone + scale * mask * shared, with a bit for each entry; the shared vector is kept once for all tasks."""

    needs_shared: ClassVar[bool] = True

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        packed = TensorSpec((math.ceil(spec.numel / 8),), torch.uint8)
        return {"mask": packed, "scale": TensorSpec((1,), _wide(spec.dtype))}

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        assert shared is not None
        own = {name: tensor.to(backbone.device) for name, tensor in fields.items()}
        return masked(backbone, own["mask"], own["scale"], shared.to(backbone.device))


@dataclass(frozen=True)
class Sparse:
    """A few entries of every row have other values.

    Attributes:
        kept: how many entries of each row.
        rows: how many rows the tensor is seen as; those of its last dimension if None.
    """

    kept: int
    rows: int | None = None
    needs_shared: ClassVar[bool] = False

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        rows = self.rows if self.rows is not None else rows_of(spec.shape)
        columns = spec.numel // rows if rows else 0
        shape = (rows, min(self.kept, columns))
        index = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
        return {"indices": TensorSpec(shape, index), "values": TensorSpec(shape, spec.dtype)}

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        indices, values = (fields[name].to(backbone.device) for name in ("indices", "values"))
        return replaced(backbone, indices, values)


@dataclass(frozen=True)
class LowRank:
    """backbone + left @ right.

    Attributes:
        rank: how many columns the left factor has.
    """

    rank: int
    needs_shared: ClassVar[bool] = False

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        *stack, rows, columns = matrix_shape(spec.shape)
        return {
            "left": TensorSpec((*stack, rows, self.rank), spec.dtype),
            "right": TensorSpec((*stack, self.rank, columns), spec.dtype),
        }

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        wide = _wide(backbone.dtype)
        change = fields["left"].to(backbone.device, wide) @ fields["right"].to(backbone.device, wide)
        return backbone.to(wide).add(change.view(backbone.shape)).to(backbone.dtype)


@dataclass(frozen=True)
class Whole:
    """The task's own weight."""

    needs_shared: ClassVar[bool] = False

    def fields(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        return {"whole": spec}

    def rebuild(self, fields: Fields, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        return fields["whole"].to(backbone)


NOTHING, MASK, WHOLE = Nothing(), Mask(), Whole()


@dataclass(frozen=True)
class Experts:
    """What a method with task experts returns for a tensor, or for a tile of it.

    Attributes:
        parts: what is kept for each task, by the names of the form's fields; a mask as it is, not packed.
        backbone: the weight of the backbone; None if that is the base's.
        shared: what all masks are over.
    """

    parts: Sequence[Fields]
    backbone: Tensor | None = None
    shared: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Experts:
        """Apply a function to every tensor that has the shape of the weight."""
        parts = [{k: change(t) if k in ("mask", "whole") else t for k, t in part.items()} for part in self.parts]
        own = (None if t is None else change(t) for t in (self.backbone, self.shared))
        return Experts(parts, *own)


def rows_of(shape: Sequence[int]) -> int:
    """Return how many rows a tensor has along its last dimension; a scalar is one row of one."""
    return math.prod(shape[:-1])


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a weight as a matrix, or as a stack of matrices.

    Of three dims it is a stack, as of fused experts, if its matrices are no flatter than the stack is high; else, as
    kernels of convolutions, it is a matrix [out, all the rest].
    """
    if len(shape) == 3 and min(shape[1:]) >= shape[0]:
        return tuple(shape)
    return (shape[0], math.prod(shape[1:]))


def is_matrix(shape: Sequence[int]) -> bool:
    """Tell whether a weight has two sides: a token of shape (1, 1, n) has not, an embedding of one row has."""
    return len(shape) == 2 or (len(shape) > 2 and min(matrix_shape(shape)[-2:]) > 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
