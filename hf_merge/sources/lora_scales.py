"""A LoRA file whose names were taken apart, and the scales of its modules, as PEFT's adapter_config.json says them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.lora_names import Key, Place, Style, wrapped

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the configs of a file's parts in its metadata."""

Roles = dict[str, str]
"""Names of a module's tensors by what they are."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its names taken apart.

    Attributes:
        source: its tensors.
        style: how it names them.
        keys: its names, taken apart.
        modules: name of each tensor of a module by its role, by module.
        plain: names of other tensors, which only a PEFT adapter may have.
        config: its adapter_config.json, or None.
    """

    source: Source
    style: Style
    keys: Mapping[str, Key]
    modules: Mapping[Place, Roles]
    plain: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    def key(self, place: Place) -> Key:
        """Return one of the names of a module, taken apart: one that says its family."""
        return max((self.keys[name] for name in self.modules[place].values()), key=lambda key: bool(key.family))


def made_config(file: LoraFile, paths: Mapping[Place, str]) -> dict[str, Any]:
    """Make the adapter_config.json that says what a file says of its scales.

    Args:
        file: the file.
        paths: what each of its modules is called, with dots.

    Raises:
        SourceError: a rank or an alpha is no number.
    """
    ranks = {paths[place]: _rank(file, roles) for place, roles in file.modules.items()}
    alphas = {path: _alpha(file, place, path, ranks[path]) for place, path in ((p, paths[p]) for p in file.modules)}
    rank, rank_pattern = pattern_of(ranks)
    alpha, alpha_pattern = pattern_of(alphas)
    roles = {key.role for key in file.keys.values()}
    made = {"peft_type": "LORA", "lora_bias": "bias" in roles, "use_dora": "magnitude" in roles}
    scales = {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    return {**made, **(file.config or {}), **scales, "use_rslora": False}


def _rank(file: LoraFile, roles: Roles) -> int:
    name = roles.get("down") or roles["embedding_down"]
    shape = file.source.specs[name].shape
    if not shape or not shape[0]:
        raise SourceError(f"'{name}' of '{file.source.label}' has the shape {list(shape)}, no factor's: save it again.")
    return shape[0]


def pattern_of(values: Mapping[str, float], start: str = "^") -> tuple[float, dict[str, float]]:
    """Return the commonest value, and one regular expression for all modules of each other.

    Args:
        values: by module.
        start: what each expression begins with; PEFT looks for it at the end of names that it does not begin.
    """
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[float, list[str]] = defaultdict(list)
    for path, value in values.items():
        if value != usual:
            others[value].append(re.escape(path))
    return usual, {f"{start}(?:{'|'.join(paths)})": value for value, paths in others.items()}


def _alpha(file: LoraFile, place: Place, path: str, rank: int) -> float:
    """Return the number that, divided by the rank, is a module's scale."""
    name = file.modules[place].get("alpha")
    if name is not None:
        return _number(file.source, name)
    key = file.key(place)
    told = file.config if file.config is not None else _metadata(file.source, key.prefix)
    alpha = told.get("lora_alpha", 8 if file.config else rank)
    patterns = told.get("alpha_pattern") or {}
    module = path if key.path is None else wrapped(key.path) if key.wrapped else key.path
    try:
        found = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        alpha = float(found[0] if found else alpha) * (math.sqrt(rank) if told.get("use_rslora") else 1)
    except (AttributeError, TypeError, ValueError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise SourceError(
            f"'{file.source.label}' should have a number for lora_alpha of '{module}'; found {shown(told)}."
        )
    return int(alpha) if alpha == int(alpha) else alpha


def _number(source: Source, name: str) -> float:
    if source.specs[name].numel != 1:
        raise SourceError(f"'{name}' of '{source.label}' should be one number; found {list(source.specs[name].shape)}.")
    value = float(source[name].flatten()[0])
    if not math.isfinite(value):
        raise SourceError(f"'{name}' of '{source.label}' is {value}, no alpha: train or save it again.")
    return int(value) if value == int(value) else value


def _metadata(source: Source, prefix: str) -> Mapping[str, Any]:
    """Return what diffusers wrote into the file of the config of one part."""
    try:
        told = json.loads(source.metadata.get(METADATA, "{}"))
    except (ValueError, TypeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise SourceError(f"'{source.label}' should have an object of JSON as its {METADATA}: save it again.")
    return {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
