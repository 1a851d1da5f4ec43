"""Which tensors are read beforehand, for numbers over a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hf_merge.method import get_method
from hf_merge.planning import FirstPass, Step


def first_passes(
    steps: Sequence[Step],
    *,
    dtype: Callable[[Step], torch.dtype],
    bytes_read: Callable[[Step], int],
    tied: Mapping[str, str],
) -> tuple[FirstPass, ...]:
    """Gather the tensors of each method that needs numbers over the whole model.

    Tensors belong together if the same models are merged by the same method, with the same parameters as far as these
    numbers depend on them, and in the same precision.

    Args:
        steps: of a plan.
        dtype: in which a step is computed.
        bytes_read: of a step's inputs.
        tied: names whose values are those of another tensor; they count once.
    """
    groups: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: step.name):
        if step.method and get_method(step.method).over_model(step.settings):
            groups.setdefault(_key(step, dtype(step)), []).append(step)
    return tuple(_first_pass(group, bytes_read, tied) for group in groups.values())


def _key(step: Step, dtype: torch.dtype) -> str:
    models = [None if one is None else one.model for one in (*step.inputs, step.base)]
    return repr((step.method, get_method(str(step.method)).asked_over_model(step.settings), models, dtype))


def _first_pass(group: Sequence[Step], bytes_read: Callable[[Step], int], tied: Mapping[str, str]) -> FirstPass:
    names = {step.name for step in group}
    measured = tuple(step for step in group if tied.get(step.name) not in names)
    method = str(group[0].method)
    return FirstPass(
        method=method,
        numbers=tuple(get_method(method).over_model(group[0].settings)),
        steps=measured,
        tensors=tuple(sorted(names)),
        bytes_read=sum(map(bytes_read, measured)),
    )
