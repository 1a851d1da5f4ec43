"""What there is to know of a plan beside what will be done: its models, what is downloaded, how long it may take."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_merge.errors import MergeError
from hf_merge.fetch import download_sizes, remote_reads
from hf_merge.lineage import licence_column
from hf_merge.method import MergeMethod, get_method
from hf_merge.planning import RATES, TILE, ModelFacts, Plan, Step, default_workers, most_common_dtype
from hf_merge.sources import Source
from hf_merge.sources.quantized import quantised_by
from hf_merge.types import Stack

_SIDE = 256
"""Rows and columns of the matrix on which a method is timed that sees whole matrices."""


def surveyed(plan: Plan, sources: Sequence[Source]) -> Plan:
    """Return a plan with facts about its models and estimates of time.

    Args:
        plan: the plan.
        sources: its models, in its order.
    """
    sizes = download_sizes(remote_reads(plan, sources))
    parts = {id(part): part for source in sources if not source.is_reference for part in source.parts}
    facts = tuple(facts_of(part, sizes.get(part.public_id or "", 0)) for part in parts.values())
    made = replace(plan, facts=facts)
    if plan.errors:
        return made
    seconds = {
        "network": made.bytes_downloaded / RATES["network"],
        "disk": (made.bytes_read + made.bytes_written) / RATES["disk"],
        "arithmetic": _arithmetic(plan),
    }
    return replace(made, seconds={what: round(count, 3) for what, count in seconds.items()})


def facts_of(part: Source, download: int = 0) -> ModelFacts:
    """Say what is known of a model from headers, config and card.

    Args:
        part: the model; of one with adapters, what is told of is the whole.
        download: bytes that a merge fetches of it.
    """
    dtype = most_common_dtype(part.specs.values())
    return ModelFacts(
        name=part.label,
        architecture=next(iter(part.config.get("architectures") or ()), None),
        tensors=len(part.specs),
        size=sum(spec.nbytes for spec in part.specs.values()),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        vocabulary=_said(part.config, "vocab_size"),
        tied=_said(part.config, "tie_word_embeddings"),
        quantised=quantised_by(part.config),
        licence=licence_column(part).replace("`", ""),
        gated=part.gated,
        custom_code="auto_map" in part.config,
        revision=part.revision,
        download=download,
    )


def _said(config: Mapping[str, Any], key: str) -> Any:
    """Return what a config says, or the config in it of the part that reads and writes text."""
    text = next((config[name] for name in ("text_config", "decoder") if isinstance(config.get(name), Mapping)), {})
    return config.get(key, text.get(key))


def _arithmetic(plan: Plan) -> float:
    """Estimate the seconds of arithmetic from how long each method takes for a small tensor here."""
    elements: dict[tuple[str, int], int] = {}
    examples: dict[tuple[str, int], Step] = {}
    for step in plan.steps:
        if step.method is not None:
            key = (step.method, len(step.inputs))
            elements[key] = elements.get(key, 0) + step.spec.numel
            examples.setdefault(key, step)
    total = sum(count * _seconds_per_element(examples[key]) for key, count in elements.items())
    return total / default_workers()


def _seconds_per_element(step: Step) -> float:
    """Time a method on random numbers, twice: what is made once is not what is to be timed."""
    method = get_method(str(step.method))
    shape = (TILE,) if method.tiled(step.settings) else (_SIDE, _SIDE)
    try:
        _timed(method, step, shape)
        return _timed(method, step, shape) / torch.Size(shape).numel()
    except (MergeError, ArithmeticError, ValueError, RuntimeError):
        return 0.0


def _timed(method: MergeMethod, step: Step, shape: tuple[int, ...]) -> float:
    numbers = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=numbers) for _ in step.reads]
    models, base = (tensors, None) if step.base is None else (tensors[:-1], tensors[-1])
    start = time.perf_counter()
    measured = {
        name: Stack(one.abs() if kind.of == "entries" else torch.eye(_SIDE) for one in models)
        for name, kind in method.statistics.items()
    }
    tile = Stack(models, start=0, base=base, measured=measured)
    method.run(tile, method.reduce([tile], step.settings), step.settings)
    return time.perf_counter() - start
