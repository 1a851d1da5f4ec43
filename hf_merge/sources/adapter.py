"""A model with a PEFT adapter as a source: base + scale * B A, computed when a tensor is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_merge.architecture import disk_names
from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.lora import FIX, Factored, Lora, prefixes, read_lora
from hf_merge.sources.quantized import CONV1D_MODELS
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
_PIECE = 1 << 20  # elements that are computed at a time
Rename = Callable[[str], str]
_CONV1D_LAYERS = {"c_attn", "q_attn", "c_proj", "c_fc"}


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of the base.

    Attributes:
        weight: takes the base's place, for `modules_to_save` and trained biases.
        left: [out, r], with `right` added as scale * left @ right, to the weight as a matrix.
        right: [r, in].
        scale: of the product, or of `bias`.
        transposed: whether the weight is stored as [in, out].
        bias: is added, times scale.
    """

    weight: str | None = None
    left: str | None = None
    right: str | None = None
    scale: float = 1.0
    transposed: bool = False
    bias: str | None = None


class WithAdapter(View):
    """A base with a LoRA adapter added; names, shapes, dtypes, config and tokenizer are the base's.

    Args:
        base: the model.
        adapter: the adapter's tensors.
        config: its adapter_config.json.
    """

    def __init__(self, base: Source, adapter: Source, config: Mapping[str, Any]):
        self.adapter = adapter
        changes = _changes(base, read_lora(adapter, config))
        made = {name: self._made_of(name, change, base.specs[name]) for name, change in changes.items()}
        super().__init__(base, made)
        self.label, self.public_id, self.revision = f"{base.label}+{adapter.label}", None, None

    @property
    def parts(self) -> tuple[Source, ...]:
        return (*self.source.parts, self.adapter)

    def fingerprint(self) -> str | None:
        found = [self.source.fingerprint(), self.adapter.fingerprint()]
        return None if None in found else json.dumps(found)

    def _made_of(self, name: str, change: Change, spec: TensorSpec) -> Made:
        keys = [key for key in (change.weight, change.left, change.right, change.bias) if key is not None]
        reads = () if change.weight else (name,)
        elsewhere = sum(self.adapter.specs[key].nbytes for key in keys)
        borrowed = tuple((self.adapter, key) for key in keys)
        return Made(spec, partial(self._changed, name, change), reads, elsewhere, borrowed)

    def _changed(self, name: str, change: Change) -> Tensor:
        """Compute one tensor, a few rows at a time."""
        weight = self.source[name] if change.weight is None else self.adapter[change.weight]
        dtype = self.specs[name].dtype
        if change.bias is not None:
            return (weight.float() + change.scale * self.adapter[change.bias].float()).to(dtype)
        if change.left is None or change.right is None:
            return weight.to(dtype)
        left = self.adapter[change.left].float().flatten(1)
        right = self.adapter[change.right].float().flatten(1)
        if change.transposed:
            left, right = right.T, left.T
        made = torch.empty(weight.shape, dtype=dtype)
        rows, flat = made.flatten(1), weight.flatten(1)
        height = max(1, _PIECE // max(rows.shape[1], 1))
        for start in range(0, len(rows), height):
            piece = slice(start, start + height)
            wide = torch.promote_types(flat.dtype, torch.float32)
            rows[piece] = torch.add(flat[piece].to(wide), left[piece] @ right, alpha=change.scale)
        return made


def open_adapter(folder: Folder, label: str, **hub: Any) -> tuple[Checkpoint, Mapping[str, Any]]:
    """Open the files of an adapter.

    Args:
        folder: where adapter_config.json and adapter_model.safetensors (or .bin) lie.
        label: how messages call it.
        **hub: `public_id` and `revision`, for one that comes from there.

    Raises:
        SourceError: there is no adapter, or it cannot be read.
    """
    weights = next((name for name in WEIGHTS if name in folder), None)
    if weights is None or CONFIG not in folder:
        raise SourceError(f"'{label}' is no PEFT adapter: it lacks {CONFIG} or {WEIGHTS[0]}.")
    return Checkpoint(folder, label, file=weights, **hub), read_object(folder.paths([CONFIG])[0])


def _changes(base: Source, lora: Lora) -> dict[str, Change]:
    """Find the base's tensor for every tensor of the adapter."""
    adapter, plain = lora.source, lora.whole
    if lora.tokens:
        raise SourceError(f"'{next(iter(lora.tokens.values()))}' of '{adapter.label}' is not read yet: {FIX}.")
    wanted = [(f"{name}.weight", key) for name, one in lora.factored.items() for key in (one.left, one.right)]
    rename = _renaming([name for name, _ in wanted] + list(plain), base)
    for name, key in [*wanted, *plain.items()]:
        if rename(name) not in base.specs:
            raise SourceError(f"'{key}' of '{adapter.label}' has no place in '{base.label}', which lacks '{name}'.")
    changes = {rename(name): Change(weight=key) for name, key in plain.items()}
    for name, key in plain.items():
        _same_shape(base.specs[rename(name)], adapter, key)
    for one in lora.factored.values():
        for name, change in _of_module(one, rename, base, lora):
            whole = changes.get(name)
            changes[name] = replace(change, weight=whole.weight) if whole else change
    return changes


def _renaming(names: list[str], base: Source) -> Rename:
    """Find what turns names of an adapter into the base's: another prefix before them all, or its names on disk.

    PEFT has the names of modules in memory, which transformers may save under others.
    """
    removed, added = prefixes(names), prefixes(base.specs)
    for less, more in ((less, more) for less in removed for more in added):
        if all(name.startswith(less) and more + name.removeprefix(less) in base.specs for name in names):
            return lambda name: more + name.removeprefix(less)
    saved = disk_names(base.config)
    if all(saved.get(name) in base.specs for name in names):
        return lambda name: saved.get(name, name)
    return lambda name: name


def _of_module(one: Factored, rename: Rename, base: Source, lora: Lora) -> Iterator[tuple[str, Change]]:
    """Yield what the factors of one module change: its weight, and its bias where that has one."""
    label = lora.source.label
    if one.kind == "experts" or one.magnitude:
        raise SourceError(f"'{one.magnitude or one.left}' of '{label}' is not read yet: {FIX}.")
    name, factors = rename(f"{one.module}.weight"), (lora.source.specs[one.left], lora.source.specs[one.right])
    turned = _is_turned(name, base, factors, lora.config, embedding=one.kind == "embedding")
    if turned is None:
        raise SourceError(
            f"'{one.left}' {list(factors[0].shape)} and '{one.right}' {list(factors[1].shape)} of "
            f"'{label}' do not fit '{name}' {list(base.specs[name].shape)} of '{base.label}'."
        )
    yield name, Change(left=one.left, right=one.right, scale=one.scale, transposed=turned)
    if one.bias:
        name = rename(f"{one.module}.bias")
        if name not in base.specs:
            raise SourceError(f"'{one.bias}' of '{label}' has no place: '{base.label}' lacks '{name}'.")
        _same_shape(base.specs[name], lora.source, one.bias)
        yield name, Change(bias=one.bias, scale=one.scale)


def _is_turned(
    name: str, base: Source, factors: tuple[TensorSpec, TensorSpec], config: Mapping[str, Any], *, embedding: bool
) -> bool | None:
    """Tell whether a weight is stored as [in, out], as Conv1D and embeddings are; None if the factors do not fit it."""
    fits = _fits(base.specs[name].shape, *(factor.shape for factor in factors))
    if embedding:
        fits &= {True}
    if len(fits) < 2:
        return next(iter(fits), None)
    conv1d = base.config.get("model_type") in CONV1D_MODELS and name.split(".")[-2] in _CONV1D_LAYERS
    return conv1d or bool(config.get("fan_in_fan_out"))


def _fits(shape: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> set[bool]:
    """Return how the product of factors has the shape of a weight: as it is (False), or transposed (True)."""
    if min(len(shape), len(left), len(right)) < 2 or 0 in right or math.prod(left[1:]) != right[0]:
        return set()
    if len(shape) > 2:
        return {False} if (left[0], *right[1:]) == shape else set()
    product = (left[0], math.prod(right[1:]))
    return {turned for turned in (False, True) if shape == (product[::-1] if turned else product)}


def _same_shape(spec: TensorSpec, adapter: Source, key: str) -> None:
    if adapter.specs[key].shape != spec.shape:
        raise SourceError(
            f"'{key}' of '{adapter.label}' has the shape {list(adapter.specs[key].shape)}, "
            f"and the base's tensor {list(spec.shape)}: name the base that it was trained on."
        )
