"""Where the parameters that an adapter names lie in the files of its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hf_merge import _compat
from hf_merge.sources.base import Source
from hf_merge.sources.lora import prefixes

Box = tuple[slice, slice, slice]
"""A part of a tensor as [experts, rows, columns]."""
ALL: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Place:
    """Which part of a parameter is which part of one of the base's tensors.

    Attributes:
        name: of the base's tensor.
        inside: the part of the parameter that lies there.
        at: the part of the tensor that it is.
        swapped: whether rows and columns of the one are columns and rows of the other.
        shape: of the parameter, if it is known.
    """

    name: str
    inside: Box = ALL
    at: Box = ALL
    swapped: bool = False
    shape: tuple[int, ...] | None = None


class Places:
    """Finds the base's tensors for names of parameters, as modules in memory call them.

    The base may have another prefix before them all, its names on disk, experts one by one for those that are one
    parameter in memory, or the reverse; an adapter may have the names of an earlier transformers.

    Args:
        base: the model.
        names: all that will be asked for.
    """

    def __init__(self, base: Source, names: Iterable[str]):
        self.base, self._names = base, [*names]
        self._prefixed = _prefixing(self._names, base.specs)

    def find(self, name: str) -> list[Place]:
        """Return the places of a parameter; none if the base lacks it or a part of it."""
        found = self._prefixed(name)
        if found in self.base.specs:
            return [Place(found, shape=self.base.specs[found].shape)]
        for live in dict.fromkeys((name, self._renamed.get(name, name))):
            parts = self._parts_of.get(live, {})
            places = [self._part(disk, live, view) for disk, view in parts.items()]
            if places and None not in places and all(p.name in self.base.specs for p in places if p):
                return [place for place in places if place]
        if name in self._on_disk:
            live, view = self._on_disk[name]
            place = self._part(name, live, view)
            if place and (other := self._prefixed(live)) in self.base.specs:
                return [Place(other, ALL, place.inside, place.swapped, tuple(view.shape))]
        return []

    def _part(self, disk: str, live: str, view: Tensor) -> Place | None:
        shape = tuple(self._shapes[live])
        if (box := _box(view, shape)) is None:
            return None
        return Place(disk, box[0], ALL, box[1], shape)

    @cached_property
    def _on_disk(self) -> dict[str, tuple[str, Tensor]]:
        return _compat.parts_on_disk(self.base.config) if self.base.config else {}

    @cached_property
    def _parts_of(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for disk, (live, view) in self._on_disk.items():
            found.setdefault(live, {})[disk] = view
        return found

    @cached_property
    def _tables(self) -> _compat.Conversion | None:
        module = _compat.empty_model(self.base.config) if self.base.config else None
        return None if module is None else _compat.Conversion(module)

    @cached_property
    def _shapes(self) -> Mapping[str, Any]:
        tables = self._tables
        return {} if tables is None else {name: tensor.shape for name, tensor in tables.shapes.items()}

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Names of earlier releases of transformers, and of files, as modules in memory are called now."""
        found = {} if self._tables is None else self._tables.places(self._names)
        return {name: place.live[0] for name, place in found.items() if place.pattern is None}


def _box(view: Tensor, shape: tuple[int, ...]) -> tuple[Box, bool] | None:
    """Return which part of a contiguous parameter a view shows, and whether with rows and columns swapped."""
    if tuple(view.shape) == shape and view.is_contiguous():
        return ALL, False
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    offset, starts = view.storage_offset(), []
    for stride in strides:
        starts.append(offset // stride)
        offset %= stride
    axes = [strides.index(step) for size, step in zip(view.shape, view.stride(), strict=True)
            if size > 1 and step in strides]  # fmt: skip
    if len(axes) != sum(size > 1 for size in view.shape) or len(set(axes)) < len(axes):
        return None
    if len(shape) > 3 or axes not in (
        sorted(axes),
        [*range(len(shape))[:-2], len(shape) - 1, len(shape) - 2][-len(axes) :],
    ):
        return (ALL, False) if tuple(view.shape) == shape else None
    sizes = dict(zip(axes, [size for size in view.shape if size > 1], strict=True))
    box = [slice(start, start + sizes.get(axis, 1)) for axis, start in enumerate(starts)]
    box = {1: [slice(0, 1), *box, slice(0, 1)], 2: [slice(0, 1), *box], 3: box}.get(len(shape), [*ALL])
    return (box[0], box[1], box[2]), axes != sorted(axes)


def _prefixing(names: list[str], specs: Mapping[str, Any]) -> Callable[[str], str]:
    """Find the prefix that the base has instead of that of the names: what fits most of them."""
    removed, added = prefixes(names), prefixes(specs)
    best, most = ("", ""), sum(name in specs for name in names)
    for less, more in ((less, more) for less in removed for more in added):
        if most == len(names):
            break
        rests = [name.removeprefix(less) for name in names if name.startswith(less)]
        fit = sum("." in rest and more + rest in specs for rest in rests)  # `weight` alone is no likeness
        if fit > most:
            best, most = (less, more), fit
    less, more = best
    return lambda name: more + name.removeprefix(less) if name.startswith(less) else name
