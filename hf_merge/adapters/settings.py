"""adapter_config.json: ranks, targets and scalings of an adapter, such that every factor counts once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from hf_merge.adapters.parts import Part
from hf_merge.errors import OutputError

Biases = Literal["none", "lora", "all"]
"""Where changed biases are: nowhere, beside the factors of their modules, or in the place of the base's."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM's `max_lora_rank` takes."""


def ranks_to_write(ranks: Mapping[Part, int], *, vllm: bool = False) -> dict[Part, int]:
    """Say which rank each part is written with: experts have one for all of them, for vLLM all have the same.

    PEFT would warn of a rank of its own for a parameter, and use it.

    Args:
        ranks: of all parts with factors.
        vllm: whether vLLM is to load it.

    Raises:
        OutputError: vLLM has no such rank.
    """
    if vllm and ranks:
        rank = vllm_rank(max(ranks.values()))
        return dict.fromkeys(ranks, rank)
    shared = max((rank for part, rank in ranks.items() if part.kind == "experts"), default=0)
    return {part: shared if part.kind == "experts" else rank for part, rank in ranks.items()}


def vllm_rank(rank: int) -> int:
    """Return the least rank of vLLM's that holds a rank.

    Raises:
        OutputError: there is none.
    """
    found = next((each for each in VLLM_RANKS if each >= rank), None)
    if found is None:
        raise OutputError(
            f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}, and this one has {rank}: ask for a lower rank."
        )
    return found


def refuse_for_vllm(parts: Iterable[Part]) -> None:
    """Raise if vLLM could not load an adapter with these parts.

    Raises:
        OutputError: it says what is not allowed.
    """
    told = {"conv": "convolutions", "bias": "biases", "whole": "whole modules (modules_to_save)",
            "embedding": "embeddings", "experts": "experts that are one parameter (target_parameters)"}  # fmt: skip
    found = {told[part.kind]: part.module for part in parts if part.kind in told}
    if found:
        raise OutputError(
            f"vLLM loads no adapter with {', '.join(found)}, such as '{next(iter(found.values()))}': "
            "leave them out (of an adapter over a base by targets and keep_rest: false), or write it without vllm."
        )


def adapter_config(
    ranks: Mapping[Part, int],
    saved: Sequence[str],
    *,
    bias: Biases,
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write adapter_config.json as PEFT reads it, checked by PEFT.

    Args:
        ranks: of all parts with factors.
        saved: modules that are saved whole.
        bias: where changed biases are.
        base_model: where PEFT finds the base.
        revision: of it.
        task_type: PEFT's word for what the model does.
        extra: more fields.
    """
    parts = sorted(ranks, key=lambda part: part.module)
    modules = {name: ranks[part] for part in parts if part.kind != "experts" for name in part.modules}
    experts = {part.module: ranks[part] for part in parts if part.kind == "experts"}
    counts = Counter(modules.values())
    rank = next(iter(experts.values())) if experts else max(counts, key=lambda each: (counts[each], each))
    other = {"^" + re.escape(name): own for name, own in sorted(modules.items()) if own != rank}
    config = {
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(modules),
        "target_parameters": sorted(experts) or None,
        "modules_to_save": sorted(saved) or None,
        "lora_bias": bias == "lora",
        "bias": "all" if bias == "all" else "none",
        "fan_in_fan_out": any(part.turned for part in parts if part.kind == "linear"),
        **(extra or {}),
    }
    return _checked({key: value for key, value in config.items() if value is not None})


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Let PEFT read a config; return it as PEFT writes it."""
    import peft
    from peft import LoraConfig

    read = LoraConfig(**config).to_dict()
    plain = json.loads(json.dumps(read, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    return {**plain, "peft_version": peft.__version__}
