"""One number for one tensor: scalars, gradients over layers and filters, as MergeKit resolves them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")
UNSET: Any = object()
"""What a setting says of a tensor that none of its filters match."""


class Layers:
    """Where a tensor lies in its stack of layers.

    A stack is the part of a name before its first number; its depth is that of the checkpoint's names, so that
    encoders, decoders and towers each have their own.

    Attributes:
        count: number of layers of every stack.
    """

    def __init__(self, names: Iterable[str]):
        self.count: dict[str, int] = {}
        for name in names:
            stack, index, _ = layer_of(name)
            if index is not None:
                self.count[stack] = max(self.count.get(stack, 0), index + 1)

    def depth(self, name: str) -> float:
        """Return 0 for the first layer to 1 for the last; 0 for tensors outside of layers, as in MergeKit."""
        stack, index, _ = layer_of(name)
        if index is None:
            return 0.0
        count = self.count.get(stack, index + 1)
        return index / (count - 1) if count > 1 else 1.0


def resolve(setting: Any, name: str, depth: float) -> Any:
    """Return what a recipe's setting says of one tensor, or UNSET.

    Args:
        setting: a value; a list of numbers, read as a gradient over the layers; `{filter, value}`, or a list
            of them, where the first whose filter occurs in the tensor's name holds.
        name: the tensor's name.
        depth: the tensor's place in its stack of layers, 0 to 1.
    """
    if is_filter(setting):
        return resolve(setting["value"], name, depth) if _matches(setting.get("filter"), name) else UNSET
    if not isinstance(setting, (list, tuple)):
        return setting
    if not setting:
        return UNSET
    if not is_filter(setting[0]):
        return _interpolate(setting, depth)
    found = (resolve(part, name, depth) for part in setting)
    return next((value for value in found if value is not UNSET), UNSET)


def resolve_first(scopes: Iterable[Mapping[str, Any]], parameter: str, name: str, depth: float) -> Any:
    """Return what the first of some scopes that says something of a parameter says of one tensor, or UNSET."""
    for scope in scopes:
        value = resolve(scope[parameter], name, depth) if parameter in scope else UNSET
        if value is not UNSET:
            return value
    return UNSET


def is_filter(setting: Any) -> bool:
    """Tell whether a setting is `{filter, value}`."""
    return isinstance(setting, Mapping) and "value" in setting


def leaves(setting: Any) -> Iterable[Any]:
    """Return every plain value in a setting."""
    if is_filter(setting):
        return leaves(setting["value"])
    if isinstance(setting, (list, tuple)):
        return [leaf for part in setting for leaf in leaves(part)]
    return [setting]


def tensor_seeds(seed: int, name: str, models: Sequence[object]) -> list[int]:
    """Derive a 64-bit seed for each model (by its place in the recipe) from the recipe's seed and the tensor's name."""
    keys = (f"{seed}\0{name}\0{model}".encode() for model in models)
    return [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys]


class LayerName(NamedTuple):
    """A tensor's name in parts: `model.layers.` 3 `.mlp.up_proj.weight`; a name without a layer is its own stack."""

    stack: str
    layer: int | None
    rest: str


def layer_of(name: str) -> LayerName:
    """Take the number of its layer out of a tensor's name."""
    found = _LAYER.search(name)
    return LayerName(name[: found.start()], int(found[1]), name[found.end() :]) if found else LayerName(name, None, "")


def _matches(wanted: str | None, name: str) -> bool:
    return wanted is None or wanted == "*" or wanted in name


def _interpolate(values: Sequence[Any], depth: float) -> Any:
    """Read a gradient at `depth`: linear between numbers, the nearest one below for words and booleans."""
    if any(isinstance(v, (bool, str)) or v is None for v in values):
        return values[int(depth * (len(values) - 1))]
    place = depth * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    share = place - low
    return values[low] + share * (values[high] - values[low]) if share else values[low]
