"""Stacks of layers with the same names and shapes in two models: a language model, alone and within another."""

from __future__ import annotations

from collections.abc import Mapping

from hf_merge.schedule import layer_of
from hf_merge.types import TensorSpec


def same_stacks(specs: Mapping[str, TensorSpec], donor: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Map the donor's names to a model's where both have the same stack of layers under different prefixes.

    Tensors beside the layers (embeddings, norm, head) are mapped by the same prefix.

    Args:
        specs: of the model.
        donor: of the model that gives the names.
    """
    found: dict[str, str] = {}
    theirs = _stacks(donor)
    for stack, layers in _stacks(specs).items():
        twins = [other for other, its in theirs.items() if its == layers]
        twins.sort(key=lambda other: _shared_ending(stack, other), reverse=True)
        if not twins or stack in twins or _is_a_draw(stack, twins):
            continue
        prefix, other = _without_shared_ending(stack, twins[0])
        if not (
            other.startswith(prefix) or other.endswith(prefix) or prefix.startswith(other) or prefix.endswith(other)
        ):
            continue  # `text_model.` and `vision_model.` are two towers, whatever their shapes
        renamed = {other + name.removeprefix(prefix): name for name in specs if name.startswith(prefix)}
        found = {**{name: mine for name, mine in renamed.items() if name in donor}, **found}
    return found


def _stacks(specs: Mapping[str, TensorSpec]) -> dict[str, frozenset[tuple[str, tuple[int, ...]]]]:
    """Return the layers of each stack: the rest of every name after the stack's prefix, with its shape."""
    found: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, spec in specs.items():
        stack, layer, rest = layer_of(name)
        if layer is not None:
            found.setdefault(stack, set()).add((f"{layer}{rest}", spec.shape))
    return {stack: frozenset(layers) for stack, layers in found.items()}


def _is_a_draw(stack: str, twins: list[str]) -> bool:
    """Tell whether two stacks are equally good: then nobody can say which is meant."""
    return len(twins) > 1 and _shared_ending(stack, twins[0]) == _shared_ending(stack, twins[1])


def _shared_ending(left: str, right: str) -> int:
    """Count the words that two prefixes end with alike."""
    count = 0
    for one, other in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count


def _without_shared_ending(left: str, right: str) -> tuple[str, str]:
    """Cut what two prefixes end with alike: `model.layers.` and `model.text.layers.` give `model.`, `model.text.`."""
    count = _shared_ending(left, right)
    cut = [".".join(prefix.split(".")[:-count]) for prefix in (left, right)]
    return tuple(f"{prefix}." if prefix else "" for prefix in cut)  # type: ignore[return-value]
