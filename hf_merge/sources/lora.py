"""A LoRA adapter without its base: which factors it has, of what rank and scale, and what else it brings.

Everything here is known from adapter_config.json and from headers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source

READ_FIELDS = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights",
    "peft_type", "lora_bias", "bias", "modules_to_save", "use_dora", "target_parameters", "trainable_token_indices",
    "ensure_weight_tying", "base_model_name_or_path", "revision",
}  # fmt: skip
HARMLESS_FIELDS = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules",
    "lora_dropout", "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
"""What only matters while an adapter is made or trained; every other field that is set is refused."""

PREFIX = "base_model.model."
FIX = "merge it with PEFT (merge_and_unload) and save the result, then name that"
_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}  # the others change the base's weights too
_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?$"
)
_TOKENS = re.compile(r"^(.+?)(?:\.token_adapter)?\.trainable_tokens_delta$")
_PAIRS = (("lora_B.weight", "lora_A.weight"), ("lora_embedding_B", "lora_embedding_A"))
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")
"""The order in which transformers' experts register their parameters: PEFT wraps the first of them innermost."""

_Parts = Mapping[str, str]


@dataclass(frozen=True)
class Factored:
    """A low-rank change of one weight: scale * left @ right.

    Attributes:
        module: PEFT's path of the module, or of the parameter for `target_parameters`, without `base_model.model.`.
        kind: linear, conv, embedding or experts.
        left: key of [out, r]; conv [out, r, 1, ..], embedding [dim, r], experts [out, r * E], E fastest.
        right: key of [r, in]; conv [r, in, ..], embedding [r, vocab], experts [E * r, in], r fastest.
        rank: r; of each expert.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns of the config.
        bias: key of what is added to the module's bias, times scale.
        magnitude: key of DoRA's norms of the rows of the weight.
    """

    module: str
    kind: str
    left: str
    right: str
    rank: int
    scale: float
    bias: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter.

    Attributes:
        source: its tensors.
        config: its adapter_config.json.
        factored: the low-rank changes, by `module`.
        whole: keys of tensors that take the place of the base's, by the base's name: `modules_to_save`, biases.
        tokens: keys of rows that take the place of an embedding's, by module; the config says which rows.
    """

    source: Source
    config: Mapping[str, Any]
    factored: Mapping[str, Factored]
    whole: Mapping[str, str]
    tokens: Mapping[str, str]


def read_lora(adapter: Source, config: Mapping[str, Any]) -> Lora:
    """Read a LoRA adapter; no values are read.

    Args:
        adapter: its tensors.
        config: the content of adapter_config.json.

    Raises:
        SourceError: it is no LoRA, does more than this module knows, or lacks half of a pair.
    """
    check_config(config, adapter.label)
    modules, whole, tokens = sort_out(adapter)
    named = _named(modules, config, adapter.label)
    factored = {name: _factored(name, kind, parts, config, adapter) for name, (kind, parts) in named.items()}
    return Lora(adapter, config, factored, whole, tokens)


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Refuse adapters that do more than `Lora` says.

    Raises:
        SourceError: it names what is not supported.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"'{label}' is an adapter of type {shown(kind)}, not a LoRA: {FIX}.")
    init = config.get("init_lora_weights")
    if not isinstance(init, (bool, str, type(None))) or init not in _INITS:
        raise SourceError(
            f"'{label}' was made by {shown(init)}, which changes the base too: save it as a plain LoRA "
            f"(save_pretrained with path_initial_model_for_weight_conversion), or {FIX}."
        )
    if other := unread_fields(config):
        raise SourceError(f"'{label}' uses {', '.join(other)}, which hf_merge does not read: {FIX}.")
    patterns = [_pattern(config, key, label) for key in ("rank_pattern", "alpha_pattern")]
    numbers = [config.get("r", 8), config.get("lora_alpha", 8), *(v for found in patterns for v in found.values())]
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise SourceError(f"'{label}' should have numbers for r and alpha; found {shown(numbers)}.")


def unread_fields(config: Mapping[str, Any]) -> list[str]:
    """Name the fields of a LoRA's config that are set and change what it does in ways unknown here."""
    return sorted(key for key, value in config.items() if value and key not in READ_FIELDS | HARMLESS_FIELDS)


def sort_out(adapter: Source) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """Return keys of factors by module and part, of whole tensors by the base's names, and of rows by module."""
    modules: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for key in adapter.specs:
        name = key.removeprefix(PREFIX)
        if found := _FACTOR.match(name):
            modules.setdefault(found["module"], {})[found["part"]] = key
        elif found := _TOKENS.match(name):
            tokens[found[1]] = key
        elif "lora_" in name or key == name:
            raise SourceError(f"'{key}' of '{adapter.label}' is no tensor of a LoRA that hf_merge reads: {FIX}.")
        else:
            whole[plain_name(name)] = key
    return modules, whole, tokens


def plain_name(name: str) -> str:
    """Take PEFT's wrappers out of a name."""
    return re.sub(r"\.(base_layer|modules_to_save|original_module)(?=\.)", "", name)


def _named(modules: Mapping[str, _Parts], config: Mapping[str, Any], label: str) -> dict[str, tuple[str, _Parts]]:
    """Return kind and keys by the name of the module, or of the parameter where parameters are wrapped."""
    stacks: dict[str, dict[int, _Parts]] = {}
    found: dict[str, tuple[str, _Parts]] = {}
    for path, parts in modules.items():
        module = re.sub(r"(\.base_layer)+$", "", path)
        if _parameters(module, config):
            stacks.setdefault(module, {})[path.count(".base_layer")] = parts
        elif plain_name(f"{path}.")[:-1] in found:
            raise SourceError(f"'{label}' changes '{module}' twice, and its config names no target_parameters of it.")
        else:
            found[plain_name(f"{path}.")[:-1]] = ("embedding" if "lora_embedding_A" in parts else "linear", parts)
    for module, stack in stacks.items():
        names = _parameters(module, config)
        if len(names) != len(stack):
            raise SourceError(
                f"'{label}' has {len(stack)} pairs of factors for '{module}', and its config names "
                f"{', '.join(names)} there: which of them are meant cannot be told."
            )
        innermost_first = [stack[depth] for depth in sorted(stack, reverse=True)]
        for name, parts in zip(names, innermost_first, strict=True):
            plain = name == "weight"
            found[module if plain else f"{module}.{name}"] = ("linear" if plain else "experts", parts)
    return found


def _parameters(module: str, config: Mapping[str, Any]) -> list[str]:
    """Name the parameters of a module that `target_parameters` are meant to hit, innermost first."""
    split = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    anywhere = not _is_target(module, config)
    names = [leaf for parent, _, leaf in split if (f".{module}".endswith(f".{parent}") if parent else anywhere)]
    return sorted(dict.fromkeys(names), key=lambda n: _REGISTERED.index(n) if n in _REGISTERED else len(_REGISTERED))


def _is_target(module: str, config: Mapping[str, Any]) -> bool:
    """Tell whether `target_modules` name a module."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)


def _factored(module: str, kind: str, parts: _Parts, config: Mapping[str, Any], adapter: Source) -> Factored:
    """Put one module's keys together, and check what their headers tell."""
    pair = next((p for p in _PAIRS if p[0] in parts and p[1] in parts), None)
    if pair is None or set(parts) - {*pair, "lora_B.bias", "lora_magnitude_vector"}:
        raise SourceError(f"'{adapter.label}' has {', '.join(parts.values())}, not a pair of factors: {FIX}.")
    left, right = parts[pair[0]], parts[pair[1]]
    out: tuple[int, ...] = adapter.specs[left].shape
    into: tuple[int, ...] = adapter.specs[right].shape
    if min(len(out), len(into)) < 2 or 0 in (*out, *into) or math.prod(out[1:]) != into[0]:
        grouped = len(into) > 2 and len(out) > 2 and out[1] and into[0] % out[1] == 0
        why = "a grouped convolution, whose change no weight of its shape can hold" if grouped else "save it again"
        raise SourceError(f"'{left}' {list(out)} and '{right}' {list(into)} of '{adapter.label}' do not fit: {why}.")
    if len(into) > 2:
        kind = "conv"
    if bool(config.get("use_dora")) != ("lora_magnitude_vector" in parts):
        said = "says use_dora" if config.get("use_dora") else "does not say use_dora"
        found = "and has" if "lora_magnitude_vector" in parts else "and has no"
        raise SourceError(f"'{adapter.label}' {said}, {found} lora_magnitude_vector of '{module}': save it again.")
    rank = _rank(module, kind, math.prod(out[1:]), config, adapter.label)
    alpha = _matching(config, "alpha_pattern", module, adapter.label, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factored(
        module, kind, left, right, rank, scale, parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
    )


def _rank(module: str, kind: str, found: int, config: Mapping[str, Any], label: str) -> int:
    """Return the rank, or that of each expert: the config says it, and the factors of all experts are stacked."""
    said = int(_matching(config, "rank_pattern", module, label, config.get("r", found)))
    if said < 1 or (found % said if kind == "experts" else found != said):
        raise SourceError(
            f"The factors of '{module}' in '{label}' have rank {found}, and its config says {said}: "
            "correct r or rank_pattern there."
        )
    return said


def _matching(config: Mapping[str, Any], key: str, module: str, label: str, default: float) -> float:
    """Look a module up in a pattern of the config: regular expressions for the end of its name, first match wins."""
    for pattern, value in _pattern(config, key, label).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise SourceError(f"'{pattern}' in {key} of '{label}' is no regular expression: {error}.") from None
    return default


def _pattern(config: Mapping[str, Any], key: str, label: str) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise SourceError(f"'{key}' of '{label}' should map names to numbers; found {shown(found)}.")
    return found


def prefixes(names: Iterable[str]) -> list[str]:
    """Return the beginnings of names, of up to two words without numbers, the shortest first."""
    split = [name.split(".") for name in names]
    found = {"".join(f"{word}." for word in words[:n]) for words in split for n in (0, 1, 2) if len(words) > n}
    return sorted((prefix for prefix in found if not re.search(r"\d", prefix)), key=lambda p: (p.count("."), p))


def read_tokens(adapter: Source, config: Mapping[str, Any]) -> Lora:
    """Read an adapter of the type TRAINABLE_TOKENS, as a LoRA without factors.

    Raises:
        SourceError: it holds something else.
    """
    modules, whole, tokens = sort_out(adapter)
    if modules or not tokens:
        raise SourceError(f"'{adapter.label}' says that it trains tokens, and holds no rows of them: {FIX}.")
    return Lora(adapter, config, {}, whole, tokens)


def token_rows(lora: Lora) -> dict[str, tuple[int, ...]]:
    """Return which tokens the rows of each module are for.

    Raises:
        SourceError: the config does not say it.
    """
    said = lora.config.get("token_indices") or lora.config.get("trainable_token_indices") or ()
    found: dict[str, tuple[int, ...]] = {}
    for module in lora.tokens:
        named = said
        if isinstance(said, Mapping):
            named = next((rows for name, rows in said.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(named, (list, tuple)) or not all(isinstance(row, int) and row >= 0 for row in named):
            raise SourceError(f"'{lora.source.label}' has rows for '{module}', and its config does not say which.")
        found[module] = tuple(named)
    return found
