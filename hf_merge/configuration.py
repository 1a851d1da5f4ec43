"""config.json of the output: its dtype, and its layers where a recipe rearranges them.

Whatever is said layer by layer (types of attention, windows, experts) follows the layers. The result is checked by
building the model that it describes, without weights: it must have exactly the tensors that are written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_merge import _compat
from hf_merge.architecture import depths, skeleton
from hf_merge.schedule import layer_of
from hf_merge.types import TensorSpec

Config = Mapping[str, Any]
Path = tuple[str, ...]

_NOT_LAYERS = re.compile(r"architectures|.*_token_ids?|.*_token")
_INDICES = re.compile(r".*(layers?|idxs?|indices|indexes|ids)")


def with_dtype(config: Config, dtype: torch.dtype | None) -> dict[str, Any]:
    """Say the true dtype, in nested configs too, under the name that the config uses."""
    if dtype is None or not config:
        return dict(config)
    word = str(dtype).removeprefix("torch.")
    done = {key: with_dtype(value, dtype) if isinstance(value, dict) and "model_type" in value else value
            for key, value in config.items() if key != "_name_or_path"}  # fmt: skip
    for key in ("dtype", "torch_dtype"):
        if key in done:
            done[key] = word
    return done if "dtype" in done or "torch_dtype" in done else {**done, "dtype": word}


def restacked(
    config: Config, stack: str, depth: int, origins: Sequence[tuple[Config, int]], specs: Mapping[str, TensorSpec]
) -> tuple[dict[str, Any], str | None]:
    """Rewrite a config for other layers.

    Args:
        config: of the model that gives everything but the layers.
        stack: what the names of the layers' tensors begin with.
        depth: how many layers it has now.
        origins: for each layer of the output the config of the model that gives it, and its number there.
        specs: the tensors that the output will have.

    Returns:
        The new config, and why it does not describe the output, if it does not.
    """
    full = _compat.full_config(config)
    known = {id(source): _compat.full_config(source) for source, _ in origins}
    layers = [(known[id(source)], layer) for source, layer in origins]
    paths = [path for path, count in depths(full).items() if count == depth]
    rewritten = [_changed(config, full, path, depth, layers) for path in paths]
    if skeleton(config) is None:
        return (rewritten[0], None) if len(rewritten) == 1 else (dict(config), _unknown(config, depth))
    differences = []
    for candidate in rewritten:
        difference = _difference(candidate, stack, specs, in_memory=_in_memory(config, stack, specs))
        if difference is None:
            return candidate, None
        differences.append(difference)
    name = next(iter(config.get("architectures") or ()), "the model")
    why = differences[0] if differences else f"nothing in config.json says {depth}"
    return dict(config), f"The config of {name} cannot describe these {len(origins)} layers: {why}."


def _unknown(config: Config, depth: int) -> str:
    name = next(iter(config.get("architectures") or ()), "a model without a class name")
    return f"transformers does not know {name}, and config.json does not say in one place that it has {depth} layers."


def _changed(
    config: Config, full: Config, path: Path, depth: int, layers: Sequence[tuple[Config, int]]
) -> dict[str, Any]:
    """Return the config with its number of layers at `path`, and all that is said of each layer beside it."""
    *inner, key = path
    before = _at(full, inner)
    after = dict(_rewrite(before, depth, [(_at(source, inner), layer) for source, layer in layers]))
    after[key] = len(layers)
    done = copy.deepcopy(dict(config))
    place = done
    for word in inner:
        place = place.setdefault(word, {})
    place.update({word: value for word, value in after.items() if value != before.get(word)})
    return done


def _rewrite(part: Config, depth: int, layers: Sequence[tuple[Config, int]]) -> Iterator[tuple[str, Any]]:
    """Yield what is said of layers, for the new ones."""
    for key, value in part.items():
        if not isinstance(value, list) or _NOT_LAYERS.fullmatch(key):
            continue
        if len(value) == depth:
            yield key, [_of_layer(source.get(key), value, layer) for source, layer in layers]
        elif value and _INDICES.fullmatch(key) and all(type(v) is int and 0 <= v < depth for v in value):
            yield key, [i for i, (source, layer) in enumerate(layers) if layer in source.get(key, value)]
    if "attention_types" in part and "attention_layers" in part:  # GPT-Neo: runs of the other
        kinds = [_of_layer(source.get("attention_layers"), part["attention_layers"], layer) for source, layer in layers]
        yield "attention_types", [[kinds, 1]]
    if isinstance(part.get("first_k_dense_replace"), int):
        dense = [layer < source.get("first_k_dense_replace", 0) for source, layer in layers]
        yield "first_k_dense_replace", next((i for i, one in enumerate(dense) if not one), len(dense))


def _of_layer(said: Any, fallback: Sequence[Any], layer: int) -> Any:
    values = said if isinstance(said, list) and layer < len(said) else fallback
    return values[layer] if layer < len(values) else values[-1]


def _at(config: Config, path: Sequence[str]) -> Config:
    for word in path:
        config = config.get(word) or {}
    return config


def _in_memory(config: Config, stack: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Tell whether the checkpoint has the names of the model in memory rather than those of save_pretrained."""
    built = skeleton(config)
    saved = {layer_of(name).rest for name in (built.specs if built else ())}
    return any(layer_of(name).rest not in saved for name in specs if layer_of(name).stack == stack)


def _difference(config: Config, stack: str, specs: Mapping[str, TensorSpec], *, in_memory: bool) -> str | None:
    """Say how the model that a config describes differs from what is written; None if it does not."""
    built = skeleton(config)
    if built is None:
        return "transformers cannot build it"
    names = set(built.live.values()) if in_memory else built.specs.keys()
    lacking = sorted(name for name in names if name not in specs)
    extra = sorted(name for name in specs if name not in names and layer_of(name).stack == stack)
    if lacking or extra:
        return f"it would {'have' if lacking else 'lack'} {(lacking or extra)[0]}"
    other = [name for name, spec in specs.items() if name in built.specs and built.specs[name].shape != spec.shape]
    return f"{other[0]} would have another shape" if other and not in_memory else None
