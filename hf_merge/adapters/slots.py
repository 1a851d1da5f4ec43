"""What becomes of each merged tensor: its change against the base as two factors, whole, or left out and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge._compat import Conversion
from hf_merge.adapters.parts import FACTORED, PREFIX, Finished, Part, matrices, stored, stored_bias
from hf_merge.ops.lowrank import Rank, truncate_each


@dataclass(frozen=True, eq=False)
class Change:
    """The change of one part of the base: what was merged less what was there.

    Attributes:
        part: of the base.
        names: of its tensors in the plan, in the order in which they come.
        live: their names in memory.
        base: the base's tensors.
        tables: how tensors as they are stored become parameters; None where they are that.
        rank: of factors, or how much energy they keep; None for all of it.
        exact: whether the decomposition is that of the whole matrix.
        seed: of one that is not.
        dtype: that is written; the base's if not given.
        is_left_out: whether the adapter is not to carry the change.
    """

    part: Part
    names: tuple[str, ...]
    live: tuple[str, ...]
    base: Mapping[str, Tensor]
    tables: Conversion | None = None
    rank: Rank | None = None
    exact: bool = True
    seed: int = 0
    dtype: torch.dtype | None = None
    is_left_out: bool = False

    def finish(self, *merged: Tensor) -> Finished:
        """Turn merged tensors into the adapter's."""
        if self.part.kind == "whole" and not self.is_left_out:
            return self._whole(merged)
        change = self._change(merged)
        energy = sum(piece.double().square().sum().item() for piece in change.view(-1).split(1 << 22))
        if not energy:
            return Finished(energy=0.0)
        if self.is_left_out or self.part.kind not in (*FACTORED, "bias"):
            return Finished(energy=energy, left_out=_largest(change))
        if self.part.kind == "bias":
            return Finished(self._rounded(stored_bias(self.part, change, merged[0])), energy=energy)
        return self._factors(change, energy)

    def _change(self, merged: Sequence[Tensor]) -> Tensor:
        """Return the change in memory, in float32 or wider; all of it, flat, where it is of several parameters."""
        new = self._in_memory(dict(zip(self.names, merged, strict=True)))
        old = self._in_memory({name: self.base[name] for name in self.names})
        changes = [_difference(new[name], old[name]) for name in self.live if new[name].is_floating_point()]
        return changes[0] if len(changes) == 1 else torch.cat([change.view(-1) for change in changes])

    def _in_memory(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.tables is not None:
            return self.tables.to_memory(tensors)
        return dict(zip(self.live, tensors.values(), strict=True))

    def _whole(self, merged: Sequence[Tensor]) -> Finished:
        """Keep the module as it is after the merge."""
        new = self._in_memory(dict(zip(self.names, merged, strict=True)))
        change = self._change(merged)
        tensors = {PREFIX + name: tensor.clone() for name, tensor in new.items()}
        return Finished(self._rounded(tensors), energy=change.double().square().sum().item())

    def _factors(self, change: Tensor, energy: float) -> Finished:
        several = self.part.kind == "experts"
        changes = matrices(self.part, change) if several else matrices(self.part, change)[None]
        found = truncate_each(changes, self.rank, exact=self.exact, seed=self.seed)
        factors = (found.left, found.right) if several else (found.left[0], found.right[0])
        return Finished(self._rounded(stored(self.part, *factors)), found.rank, found.kept, found.error, energy)

    def _rounded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtypes = (self.base[name].dtype for name in self.names)
        dtype = self.dtype or next(dtype for dtype in dtypes if dtype.is_floating_point)
        return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """Subtract in the wider of float32 and the tensors' own dtypes."""
    if new.shape != old.shape:
        raise ValueError(f"it has the shape {list(new.shape)} in the merge, and {list(old.shape)} in the base")
    wide = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return torch.sub(new.to(wide), old.to(device=new.device, dtype=wide)).contiguous()


def _largest(change: Tensor) -> float:
    return change.abs().max().item() if change.numel() else 0.0
