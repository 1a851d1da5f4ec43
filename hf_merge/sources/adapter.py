"""A model with a PEFT adapter as a source: base + scale * B A, computed when a tensor is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_merge.architecture import disk_names
from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.quantized import CONV1D_MODELS
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
READ_FIELDS = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights",
    "peft_type", "lora_bias", "bias", "modules_to_save",
}  # fmt: skip
HARMLESS_FIELDS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
}  # fmt: skip
"""What only matters while an adapter is made or trained; every other field that is set is refused."""

_INITS = {True, False, None, "gaussian", "eva", "orthogonal"}  # the others change the base's weights too
_PIECE = 1 << 20  # elements that are computed at a time
_FIX = "merge it with PEFT (merge_and_unload) and save the result, then name that"
Rename = Callable[[str], str]
_FACTOR = re.compile(r"^(.+)\.(lora_A|lora_B)\.(weight|bias)$|^(.+)\.(lora_embedding_[AB])$")
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
        check_config(config, adapter.label)
        changes = _changes(base, adapter, config)
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


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Refuse adapters that do more than add scale * B A.

    Raises:
        SourceError: it names what is not supported.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"'{label}' is an adapter of type {shown(kind)}; only LoRA is read: {_FIX}.")
    init = config.get("init_lora_weights")
    if not isinstance(init, (bool, str, type(None))) or init not in _INITS:
        raise SourceError(f"'{label}' was made by {shown(init)}, which changes the base too: {_FIX}.")
    other = sorted(key for key, value in config.items() if value and key not in READ_FIELDS | HARMLESS_FIELDS)
    if other:
        raise SourceError(f"'{label}' uses {', '.join(other)}, which hf_merge does not read: {_FIX}.")
    numbers = [config.get("r", 8), config.get("lora_alpha", 8), *_pattern(config, "alpha_pattern", label).values()]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise SourceError(f"'{label}' should have numbers for r and alpha; found {shown(numbers)}.")


def _pattern(config: Mapping[str, Any], key: str, label: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise SourceError(f"'{key}' of '{label}' should map names to numbers; found {shown(found)}.")
    return found


def _changes(base: Source, adapter: Source, config: Mapping[str, Any]) -> dict[str, Change]:
    """Find the base's tensor for every tensor of the adapter."""
    modules, plain = _sorted_out(adapter)
    wanted = [(f"{module}.weight", key) for module, keys in modules.items() for key in keys.values()]
    rename = _renaming([name for name, _ in wanted] + list(plain), base)
    for name, key in [*wanted, *plain.items()]:
        if rename(name) not in base.specs:
            raise SourceError(f"'{key}' of '{adapter.label}' has no place in '{base.label}', which lacks '{name}'.")
    changes = {rename(name): Change(weight=key) for name, key in plain.items()}
    for name, key in plain.items():
        _same_shape(base.specs[rename(name)], adapter, key)
    for module, keys in modules.items():
        for name, change in _of_module(module, keys, rename, base, adapter, config):
            whole = changes.get(name)
            changes[name] = replace(change, weight=whole.weight) if whole else change
    return changes


def _sorted_out(adapter: Source) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the factors by module ({module: {"lora_A.weight": key}}), and whole tensors by name."""
    modules: dict[str, dict[str, str]] = {}
    plain: dict[str, str] = {}
    for key in adapter.specs:
        name = key.removeprefix("base_model.model.")
        found = _FACTOR.match(name)
        if found:
            module, part = (found[1], f"{found[2]}.{found[3]}") if found[1] else (found[4], found[5])
            modules.setdefault(module.removesuffix(".base_layer"), {})[part] = key
        elif "lora_" in name or key == name:
            raise SourceError(f"'{key}' of '{adapter.label}' is no tensor of a LoRA that hf_merge reads: {_FIX}.")
        else:
            plain[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key
    return modules, plain


def _renaming(names: list[str], base: Source) -> Rename:
    """Find what turns names of an adapter into the base's: another prefix before them all, or its names on disk.

    PEFT has the names of modules in memory, which transformers may save under others.
    """
    removed, added = _prefixes(names), _prefixes(base.specs)
    for less, more in ((less, more) for less in removed for more in added):
        if all(name.startswith(less) and more + name.removeprefix(less) in base.specs for name in names):
            return lambda name: more + name.removeprefix(less)
    saved = disk_names(base.config)
    if all(saved.get(name) in base.specs for name in names):
        return lambda name: saved.get(name, name)
    return lambda name: name


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the beginnings of names, of up to two words without numbers, the shortest first."""
    split = [name.split(".") for name in names]
    found = {"".join(f"{word}." for word in words[:n]) for words in split for n in (0, 1, 2) if len(words) > n}
    return sorted((prefix for prefix in found if not re.search(r"\d", prefix)), key=lambda p: (p.count("."), p))


def _of_module(
    module: str, keys: Mapping[str, str], rename: Rename, base: Source, adapter: Source, config: Mapping[str, Any]
) -> Iterator[tuple[str, Change]]:
    """Yield what the factors of one module change: its weight, and its bias where that has one."""
    pairs = [("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A")]
    pair = next((p for p in pairs if p[0] in keys and p[1] in keys), None)
    if pair is None or set(keys) - {*pair, "lora_B.bias"}:
        raise SourceError(f"'{adapter.label}' has {', '.join(keys.values())}, not a pair of factors: {_FIX}.")
    left, right = (keys[part] for part in pair)
    name, factors = rename(f"{module}.weight"), (adapter.specs[left], adapter.specs[right])
    turned = _is_turned(name, base, factors, config, embedding="embedding" in pair[0])
    if turned is None:
        raise SourceError(
            f"'{left}' {list(factors[0].shape)} and '{right}' {list(factors[1].shape)} of "
            f"'{adapter.label}' do not fit '{name}' {list(base.specs[name].shape)} of '{base.label}'."
        )
    scale = _scale(module, factors[1].shape[0], config, adapter.label)
    yield name, Change(left=left, right=right, scale=scale, transposed=turned)
    if "lora_B.bias" in keys:
        name = rename(f"{module}.bias")
        if name not in base.specs:
            raise SourceError(
                f"'{keys['lora_B.bias']}' of '{adapter.label}' has no place: '{base.label}' lacks '{name}'."
            )
        _same_shape(base.specs[name], adapter, keys["lora_B.bias"])
        yield name, Change(bias=keys["lora_B.bias"], scale=scale)


def _scale(module: str, rank: int, config: Mapping[str, Any], label: str) -> float:
    """Return alpha / r (rsLoRA: alpha / sqrt(r)) of a module; patterns are regular expressions for the name's end."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in _pattern(config, "alpha_pattern", label).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        except re.error as error:
            raise SourceError(f"'{pattern}' in alpha_pattern of '{label}' is no regular expression: {error}.") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


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
