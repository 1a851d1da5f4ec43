"""What becomes of the merged changes of adapters: factors again, or tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.adapters.parts import Finished, Part, stored, stored_bias
from hf_merge.ops.factors import unpacked
from hf_merge.ops.lowrank import Rank, truncate_each
from hf_merge.sources.core import Change, Core


@dataclass(frozen=True, eq=False)
class CoreSlot:
    """Turns a merged core into factors.

    Attributes:
        part: of the base.
        space: which knows the bases.
        change: of that part.
        rank: of the factors, the share of energy they keep, or None for all of it.
    """

    part: Part
    space: Core
    change: Change
    rank: Rank | None

    def finish(self, *merged: Tensor) -> Finished:
        """Truncate the core, and leave its coordinates."""
        (core,) = merged
        left, right = self.space.bases(self.change)
        self.space.release(self.change)
        return _finished(self.part, core, self.rank, left, right)


@dataclass(frozen=True, eq=False)
class ProductSlot:
    """Turns merged changes that are no cores into factors.

    Attributes:
        part: of the base.
        change: of that part.
        rank: as of `CoreSlot`.
        read: how (left, right) or the whole change lie in the merged tensors.
    """

    part: Part
    change: Change
    rank: Rank | None
    read: Callable[[Change, Sequence[Tensor]], tuple[Tensor, Tensor] | Tensor]

    def finish(self, *merged: Tensor) -> Finished:
        """Decompose the change, or take its factors as they are if nothing is asked of their rank."""
        found = self.read(self.change, merged)
        if isinstance(found, Tensor):
            return _finished(self.part, found, self.rank)
        left, right = found
        if self.rank is None and left.abs().max() > 0 and right.abs().max() > 0:
            return Finished(stored(self.part, left, right), left.shape[-1], kept=1.0)
        (left, small), (right, other) = torch.linalg.qr(left), torch.linalg.qr(right.mT)
        return _finished(self.part, small @ other.mT, self.rank, left, right)


def from_matrix(change: Change, merged: Sequence[Tensor]) -> Tensor:
    return merged[0].reshape(*change.stack, change.out, change.into)


def from_units(change: Change, merged: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    units = merged[0]
    used = units.abs().amax(-1).amin(-1) > 0  # of two vectors, neither is zero
    return unpacked(units[used], change.out, change.into)


def from_factors(change: Change, merged: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    right, left = merged
    return left, right


def _finished(
    part: Part, core: Tensor, rank: Rank | None, left: Tensor | None = None, right: Tensor | None = None
) -> Finished:
    """Factorise left core right^T; without bases, the core is the change itself."""
    several = core.dim() == 3
    energy = core.double().square().sum().item()
    if not energy:
        return Finished(energy=0.0)
    found = truncate_each(core if several else core[None], rank)
    lefts, rights = (found.left, found.right) if several else (found.left[0], found.right[0])
    if left is not None and right is not None:
        lefts, rights = left @ lefts, rights @ right.mT
    return Finished(stored(part, lefts, rights), found.rank, found.kept, energy=energy)


@dataclass(frozen=True, eq=False)
class BiasSlot:
    """Takes the change of a bias."""

    part: Part

    def finish(self, *merged: Tensor) -> Finished:
        """Return it under PEFT's name."""
        return Finished(stored_bias(self.part, merged[0]))


@dataclass(frozen=True, eq=False)
class KeptSlot:
    """Takes tensors that are written as they were merged.

    Attributes:
        part: what they belong to.
        keys: their names in the adapter.
    """

    part: Part
    keys: list[str]

    def finish(self, *merged: Tensor) -> Finished:
        """Return them under their names."""
        return Finished({key: tensor.clone() for key, tensor in zip(self.keys, merged, strict=True)})
