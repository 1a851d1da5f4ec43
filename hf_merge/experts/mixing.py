"""Batches of several tasks: cut into one for each task, and put together again in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import ParameterError

Task = str | Mapping[str, float]
"""A task, or the share of each in a mixture."""
Group = tuple[list[int], Any]
"""Places in a batch, and what the model gave for them."""

CACHES = ("past_key_values", "cache_params", "encoder_outputs")
"""Inputs that hold what a task's weights made."""
_NOT_BY_EXAMPLE = {"head_mask", "decoder_head_mask", "cross_attn_head_mask", "cache_position"}


class RoutedOutput:
    """What a batch of several tasks gives.

    Every tensor that the model returns is an attribute, with the examples in their order: `logits`,
    `last_hidden_state` and so on are a tensor (batch, ..) where all examples have one shape, else a list of one
    tensor for each, as logits are if tasks have classes in different numbers. `loss` is the mean over examples of that
    of their task.

    Attributes:
        tasks: of each example; of a mixture the one of the largest share, whose head was used.
        outputs: what the model gave for each group of examples, with their places in the batch.
    """

    def __init__(self, tasks: list[str], outputs: list[Group]):
        self.tasks, self.outputs = tasks, outputs

    def __getattr__(self, name: str) -> Any:
        outputs = self.__dict__.get("outputs") or []
        found = [(places, out.get(name) if isinstance(out, Mapping) else None) for places, out in outputs]
        tensors = [(places, value) for places, value in found if isinstance(value, Tensor)]
        if name.startswith("_") or not found or len(tensors) < len(found):
            raise AttributeError(f"A batch of several tasks has no '{name}': look into .outputs, one for each group.")
        return _together(tensors, len(self.tasks))

    def __repr__(self) -> str:
        return f"RoutedOutput(tasks={self.tasks})"


def _together(found: Sequence[tuple[list[int], Tensor]], count: int) -> Any:
    """Put rows back into the order of the batch; numbers without rows are averaged."""
    if all(not value.dim() for _, value in found):
        return sum((value * len(places) for places, value in found), torch.zeros(())) / count
    rows: list[Any] = [None] * count
    for places, value in found:
        for place, row in zip(places, value, strict=True):
            rows[place] = row
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def grouped(tasks: Sequence[Task]) -> list[tuple[Task, list[int]]]:
    """Group the places of a batch by task; mixtures with the same shares are one group."""
    groups: dict[Any, tuple[Task, list[int]]] = {}
    for place, task in enumerate(tasks):
        key = task if isinstance(task, str) else tuple(sorted(task.items()))
        groups.setdefault(key, (task, []))[1].append(place)
    return [*groups.values()]


def batch_size(inputs: Mapping[str, Any], main: str | None) -> int:
    """Return how many examples a batch has.

    Args:
        inputs: of the model's forward, by name.
        main: which of them is sure to have a row for each example.

    Raises:
        ParameterError: none has.
    """
    first = inputs.get(main or "")
    named = [first] if isinstance(first, Tensor) else [v for k, v in inputs.items() if k not in _NOT_BY_EXAMPLE]
    tensors = [value for value in named if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ParameterError("A task for each example needs inputs that are tensors with a row for each example.")
    return len(tensors[0])


def refuse_caches(inputs: Mapping[str, Any]) -> None:
    """Raise if a batch of several tasks comes with what one task's weights made.

    Raises:
        ParameterError: it names the input.
    """
    if held := next((name for name in CACHES if inputs.get(name) is not None), None):
        raise ParameterError(
            f"'{held}' holds what the weights of one task made: say the one task= that it is of, or set_task(..), and "
            "run each task's examples by themselves."
        )


def rows(inputs: Mapping[str, Any], places: Sequence[int], count: int) -> dict[str, Any]:
    """Return the inputs of some examples: rows of tensors and arrays and items of lists that have one for each."""
    return {name: value if name in _NOT_BY_EXAMPLE else _rows(value, places, count) for name, value in inputs.items()}


def _rows(value: Any, places: Sequence[int], count: int) -> Any:
    if isinstance(value, list) and len(value) == count:
        return [value[place] for place in places]
    shape = getattr(value, "shape", None)
    if not shape or shape[0] != count:
        return value
    chosen: Any = torch.tensor(places, device=value.device) if isinstance(value, Tensor) else [*places]
    return value[chosen]


def lead(task: Task) -> str:
    """Return the task of the largest share."""
    return task if isinstance(task, str) else max(task, key=lambda name: task[name])
