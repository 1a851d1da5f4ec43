"""What transformers knows of a model class from its config.json alone: no weights, no list of architectures here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hf_merge import _compat
from hf_merge.types import TensorSpec


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, under the names of its checkpoint.

    Attributes:
        specs: shape and dtype of every tensor that `save_pretrained` writes.
        order: the same names in the order in which the model's modules are registered, embeddings first.
        tied: names that share their values with another: `lm_head.weight` -> `model.embed_tokens.weight`. Only the
            other is in `specs`.
        live: the names that the model's parameters have in memory; several parts may be one there.
        vocabulary: tensors with a row for each token: input embeddings, and the output head with its bias.
    """

    specs: Mapping[str, TensorSpec]
    order: tuple[str, ...]
    tied: Mapping[str, str]
    live: Mapping[str, str]
    vocabulary: tuple[str, ...]


def skeleton(config: Mapping[str, Any]) -> Skeleton | None:
    """Build the model of a config.json without weights; None if transformers has no such class.

    Args:
        config: the content of config.json. Its `architectures` names the class.
    """
    return _skeleton(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _skeleton(config: str) -> Skeleton | None:
    module = _compat.empty_model(json.loads(config))
    if module is None:
        return None
    saved = _compat.on_disk_layout(module)
    tables = _compat.Conversion(module)
    live = tables.live(saved)
    saved_as: dict[str, list[str]] = {}
    for name, inside in live.items():
        saved_as.setdefault(inside, []).append(name)
    order = [name for inside in _in_order(module) for name in saved_as.get(inside, ())]
    embeddings = _compat.vocabulary_tensors(module)
    return Skeleton(
        specs={name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, (_, tensor) in saved.items()},
        order=tuple(dict.fromkeys([*order, *saved])),
        tied={tables.saved_name(alias): tables.saved_name(other) for alias, other in tables.tied.items()},
        live=live,
        vocabulary=tuple(name for inside in embeddings for name in saved_as.get(inside, ())),
    )


def may_be_tied(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Tell whether the class of a config may tie one of these tensors to another; False only where that is certain.

    It is for tensors of numbered layers with other words in their paths than those that the class declares to tie.

    Args:
        config: the content of config.json.
        names: tensors of a checkpoint.
    """
    kinds = dict.fromkeys(_kinds(config))
    tied = _compat.declared_ties(kinds, next(iter(config.get("architectures") or ()), "")) if kinds else None
    if tied is None or config.get("auto_map"):
        return True
    words = {word for name in tied for word in re.findall(r"[A-Za-z_]\w*", name)[-2:]} - {"weight", "bias"}
    return any(words & (parts := set(name.split("."))) or not any(map(str.isdigit, parts)) for name in names)


def _kinds(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the `model_type` of a config and of all configs in it."""
    if "model_type" in config:
        yield str(config["model_type"])
    for part in config.values():
        if isinstance(part, Mapping):
            yield from _kinds(part)


_TOKEN_TABLES = {
    "embed_tokens.weight", "lm_head.weight", "lm_head.bias", "wte.weight", "word_embeddings.weight", "shared.weight",
    "embed_in.weight", "embed_out.weight", "tok_embeddings.weight", "tok_embeddings.embedding.weight",
}  # fmt: skip
"""How embeddings and heads are mostly called, for models that transformers does not know."""


def vocabulary_names(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Name the tensors of a checkpoint that have a row for each token, under the checkpoint's own names.

    Args:
        config: the content of config.json. Where transformers does not know its class, the usual names count.
        specs: the checkpoint's tensors. Their names may lack the prefix of the class, or have one more.
    """
    known = skeleton(config) if config else None
    if known is None:
        return tuple(name for name in specs if ".".join(name.split(".")[-2:]) in _TOKEN_TABLES)
    tables = {*known.vocabulary, *(name for name, other in known.tied.items() if other in known.vocabulary)}
    ends = tuple(f".{table}" for table in tables)
    return tuple(
        name for name in specs
        if name in tables or (name not in known.specs and (name.endswith(ends) or _ends_any(tables, name)))
    )  # fmt: skip


def _ends_any(tables: set[str], name: str) -> bool:
    return "." in name and any(table.endswith(f".{name}") for table in tables)


def _in_order(module: Any) -> list[str]:
    """Names of all parameters and buffers by the registration of their modules."""
    names: list[str] = []
    for prefix, part in module.named_modules():
        own = [*part._parameters, *part._buffers]
        names += [f"{prefix}.{name}" if prefix else name for name in own]
    return names


def live_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Map names of a checkpoint to the parameters that they become, or become parts of; the unknown are left out."""
    module = _compat.empty_model(config) if config else None
    return {} if module is None else _compat.Conversion(module).live(names)


def loaded_devices(
    config: Mapping[str, Any], names: Iterable[str], device_map: str, max_memory: Mapping[int | str, int] | None
) -> dict[str, int | str] | None:
    """Return where `from_pretrained` would put each tensor of a checkpoint, in accelerate's words.

    Args:
        config: the content of config.json.
        names: the checkpoint's tensors; those that the model has no place for are left out.
        device_map: auto, balanced, balanced_low_0 or sequential.
        max_memory: bytes by device; of devices that need not be here.

    Returns:
        None if transformers has no such class.
    """
    module = _compat.empty_model(config) if config else None
    if module is None:
        return None
    devices = _compat.module_devices(module, device_map, max_memory)
    live = _compat.Conversion(module).live(names)
    found = _compat.expanded(devices, live.values())
    return {name: found[inside] for name, inside in live.items()}


DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
"""What config.json files call a number of layers."""


def depths(config: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    """Return every number of layers in a config, nested ones too, by its path."""
    found = {(key,): config[key] for key in DEPTHS if isinstance(config.get(key), int)}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {(key, *path): depth for path, depth in depths(value).items()}
    return found


def backbone_of(module: Any, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return what tells whether a tensor of a model in memory is of its backbone, and not of its head.

    The backbone is the part under the class's prefix, or else, as in classifiers over the tower of a CLIP, what
    transformers' model without a head has too; a model without heads is all backbone.

    Args:
        module: the model, with or without values.
        config: of it, as in config.json.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    prefix = getattr(module, "base_model_prefix", "")
    if prefix and getattr(module, prefix, None) not in (None, module):
        return lambda live: live.startswith(f"{prefix}.")
    plain = MODEL_MAPPING_NAMES.get(config.get("model_type", ""))
    name = plain if isinstance(plain, str) else next(iter(plain or ()), "")
    empty = _compat.empty_model({**config, "architectures": [name]})
    if empty is None:
        return lambda live: True
    names = {live for live, _ in (*empty.named_parameters(), *empty.named_buffers())}
    return names.__contains__ if any(live in names for live, _ in module.named_parameters()) else lambda live: True
