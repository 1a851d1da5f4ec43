"""How PEFT keeps a change: names and shapes of the tensors of an adapter, by the kind of module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

PREFIX = "base_model.model."
"""Before every name in adapter_model.safetensors."""

Kind = Literal["linear", "conv", "embedding", "experts", "bias", "whole", "none"]
FACTORED: tuple[Kind, ...] = ("linear", "conv", "embedding", "experts")


@dataclass(frozen=True)
class Part:
    """Which module or parameter of the base changes, and how PEFT keeps the change.

    Attributes:
        module: the module's path as PEFT names it (`model.layers.0.self_attn.q_proj`), that is, in memory; of experts
            and for `none` the parameter's path (`model.layers.0.mlp.experts.gate_up_proj`).
        kind: `linear`, `conv`, `embedding` and `experts` are kept as two factors (`experts` by target_parameters),
            `bias` in lora_B.bias, `whole` by modules_to_save; `none` cannot be kept.
        shape: of the parameter in memory; of a bias that of its module's weight.
        turned: whether a weight is stored as [in, out], as in transformers' Conv1D, or as [experts, in, out].
        place: of experts: which parameter of its module it is, in the order of their registration.
        biased: whether the module has a bias.
        twins: modules that share the parameter, and their kinds: PEFT adapts each of them apart.
    """

    module: str
    kind: Kind
    shape: tuple[int, ...] = ()
    turned: bool = False
    place: int = 0
    biased: bool = False
    twins: tuple[tuple[str, Kind], ...] = ()

    @property
    def modules(self) -> list[str]:
        """The module, and those that share its parameter."""
        return [self.module, *(module for module, _ in self.twins)]

    @property
    def owner(self) -> str:
        """The module, for experts too."""
        return self.module.rpartition(".")[0] if self.kind == "experts" else self.module

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the change as a matrix: (out, in)."""
        *first, last = self.shape
        if self.kind == "conv":
            return first[0], torch.Size(self.shape[1:]).numel()
        rows = first[-1]
        return (last, rows) if self.turned or self.kind == "embedding" else (rows, last)

    @property
    def experts(self) -> int:
        """How many matrices it is."""
        return self.shape[0] if self.kind == "experts" and len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Finished:
    """What an adapter says of one part.

    Attributes:
        tensors: by PEFT's key, as `stored` names them; none if nothing changed, or nothing can be kept.
        rank: of the factors; 0 if there are none.
        kept: share of the squared Frobenius norm of the change that they keep; None where it is kept whole.
        error: largest absolute difference between the change and what is kept of it; None where it is kept whole.
        energy: squared Frobenius norm of the change; None if nobody knows.
        left_out: largest absolute change that the adapter does not carry at all.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rank: int = 0
    kept: float | None = None
    error: float | None = None
    energy: float | None = None
    left_out: float = 0.0


class Slot(Protocol):
    """What becomes of one merged tensor in the adapter.

    Several names may have one slot, as experts that are stored one by one: it gets their tensors together, in the
    order of the mapping of slots. It is called from several threads, and must not change what it gets.
    """

    @property
    def part(self) -> Part: ...

    def finish(self, *merged: Tensor) -> Finished:
        """Turn merged tensors (float32, or float64) into the adapter's."""
        ...


def matrices(part: Part, change: Tensor) -> Tensor:
    """Return the change of a parameter as [out, in], that of experts as [experts, out, in]."""
    if part.kind == "experts":
        stacked = change if change.dim() == 3 else change[None]
        return stacked.transpose(1, 2) if part.turned else stacked
    if part.kind == "conv":
        return change.flatten(1)
    return change.T if part.turned or part.kind == "embedding" else change


def stored(part: Part, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Return the tensors by which PEFT keeps left @ right, at a scaling of 1.

    Args:
        part: what changes by it.
        left: [out, r]; of experts [experts, out, r].
        right: [r, in]; of experts [experts, r, in].
    """
    name = PREFIX + part.owner
    if part.twins:
        turned = [stored(replace(part, module=module, kind=kind, twins=()), left, right)
                  if kind == part.kind else stored(replace(part, module=module, kind=kind, twins=()), right.T, left.T)
                  for module, kind in part.twins]  # fmt: skip
        own = stored(replace(part, twins=()), left, right)
        return {key: tensor for made in (own, *turned) for key, tensor in made.items()}
    if part.kind == "embedding":
        return {f"{name}.lora_embedding_A": right, f"{name}.lora_embedding_B": left}
    if part.kind == "experts":  # PEFT reads A as [experts, r, in] and B as [out, r, experts]
        right, left = right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)
    if part.kind == "conv":
        ones = [1] * (len(part.shape) - 2)
        right, left = right.reshape(len(right), *part.shape[1:]), left.reshape(*left.shape, *ones)
    return {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left}


def stored_bias(part: Part, change: Tensor, value: Tensor | None = None) -> dict[str, Tensor]:
    """Return the tensors by which PEFT can keep the change of a bias; the writer takes one of them.

    Args:
        part: what changes.
        change: what is added to the base's bias, beside the factors of the module.
        value: what takes its place where PEFT allows no such thing.
    """
    plain = {} if value is None else {f"{PREFIX}{part.module}.bias": value}
    return {f"{PREFIX}{part.module}.lora_B.bias": change, **plain}


def widened(part: Part, key: str, tensor: Tensor, rank: int) -> Tensor:
    """Return a factor with zeros up to a rank; the product stays as it is."""
    is_right = key.endswith((".lora_A.weight", ".lora_embedding_A"))
    if not (is_right or key.endswith((".lora_B.weight", ".lora_embedding_B"))):
        return tensor
    count = part.experts
    if is_right:
        split = tensor.reshape(count, -1, *tensor.shape[1:])
        zeros = split.new_zeros(count, rank - split.shape[1], *tensor.shape[1:])
        return torch.cat([split, zeros], 1).flatten(0, 1)
    split = tensor.reshape(len(tensor), -1, count, *tensor.shape[2:])
    zeros = split.new_zeros(len(tensor), rank - split.shape[1], *split.shape[2:])
    return torch.cat([split, zeros], 1).flatten(1, 2)
