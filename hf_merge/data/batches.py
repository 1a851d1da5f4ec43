"""Examples -> batches: in their order, in that of a seed, or for ever."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_merge.data.columns import LABELS, as_row, check_labels, label_numbers, roles
from hf_merge.data.preparing import READY, Preparation, stacked
from hf_merge.data.reading import has_places, read
from hf_merge.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Inputs of a model's forward, and the labels of its examples if there are some."""

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        return len(next(iter(self.inputs.values())))

    def first(self, count: int) -> Batch:
        """Return the first examples."""
        return self._part(slice(count))

    def examples(self) -> Iterator[Batch]:
        """Yield the examples one by one."""
        for i in range(self.size):
            yield self._part(slice(i, i + 1))

    def to(self, device: torch.device) -> Batch:
        """Bring it to a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch({name: value.to(device) for name, value in self.inputs.items()}, labels)

    def _part(self, part: slice) -> Batch:
        labels = None if self.labels is None else self.labels[part]
        return Batch({name: value[part] for name, value in self.inputs.items()}, labels)


class Data:
    """Some examples, as batches that may be gone through as often as one likes.

    A list, a `datasets.Dataset` and the like are read row by row when they are needed; iterators are held in memory.

    Args:
        given: see `read`.
        model: whose inputs they are.
        prepare: turns rows into inputs; by default the processor that lies where the model was loaded from.
        columns: what columns are for, where their names do not say it: `{"text": "review"}`.
        batch_size: rows at a time; batches that are ready stay as they are.
        max_examples: at most so many; rows whose number is known are drawn by the seed, else the first are taken.
        seed: they are drawn by it.
        labelled: whether labels are needed.
        name: how messages call it.

    Raises:
        DataError: it cannot be read, or is empty; later on, that a row or a label cannot be used.
    """

    def __init__(
        self, given: Any, model: Any, prepare: Preparation | None = None, *, columns: Mapping[str, str] | None = None,
        batch_size: int = 8, max_examples: int | None = None, seed: int = 0, labelled: bool = False,
        name: str = "The data",
    ):  # fmt: skip
        self._cut = _Cutter(model, prepare or Preparation(model), columns or {}, batch_size, labelled, name)
        found = read(given, name)
        held = found if has_places(found) else list(itertools.islice(found, max_examples))
        if not len(held):
            raise DataError(f"{name} is empty: it has no examples.")
        ready = _is_batch(held[0])
        self.examples: Sequence[Any] = (
            _first([_as_batch(one, model, name) for one in held], max_examples)
            if ready
            else _drawn(held, max_examples, seed)
        )
        self._order = None if ready else len(self.examples)

    def __len__(self) -> int:
        return self._order or sum(batch.size for batch in self.examples)

    def __iter__(self) -> Iterator[Batch]:
        return self._cut(self.examples)

    def shuffled(self, seed: int) -> Iterator[Batch]:
        """Yield batches in another order of the rows; batches that are ready come as they are."""
        if self._order is None:
            return iter(self)
        order = torch.randperm(self._order, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        return self._cut(self.examples[i] for i in order)


def endless(
    given: Any, model: Any, prepare: Preparation | None = None, *, batch_size: int, seed: int, name: str = "The data"
) -> Iterator[Batch]:
    """Yield batches for ever, in another order each time; a loader is gone through again, and nothing of it is held.

    Raises:
        DataError: as `Data`; an iterator, which can be had but once, ends.
    """
    found = read(given, name)
    if has_places(found):
        data = Data(found, model, prepare, batch_size=batch_size, name=name)
        for epoch in itertools.count():
            yield from data.shuffled(seed + epoch * 1_000_003)
    cut = _Cutter(model, prepare or Preparation(model), {}, batch_size, False, name)
    for epoch in itertools.count():
        count = 0
        for count, batch in enumerate(cut(found), 1):  # noqa: B007
            yield batch
        if not count and not epoch:
            raise DataError(f"{name} is empty: it has no examples.")
        if not count or isinstance(found, Iterator):
            raise DataError(f"{name} ended before the last step: give a list, a loader or files, or ask fewer steps.")


@dataclass(frozen=True)
class _Cutter:
    """Cuts examples into batches; see `Data`."""

    model: Any
    prepare: Preparation
    columns: Mapping[str, str]
    size: int
    labelled: bool
    name: str

    def __call__(self, examples: Iterable[Any]) -> Iterator[Batch]:
        coming = iter(examples)
        while few := list(itertools.islice(coming, 1)):
            if _is_batch(few[0]):
                batch = _as_batch(few[0], self.model, self.name)
            else:
                batch = self._batch(
                    [as_row(one, self.name) for one in (*few, *itertools.islice(coming, self.size - 1))]
                )
            if self.labelled:
                check_labels(batch.labels, getattr(self.model, "config", None), self.name)
            yield batch

    def _batch(self, rows: list[Mapping[str, Any]]) -> Batch:
        columns = roles(rows[0], self.columns, self.name)
        values = {role: [self._value(row, column) for row in rows] for role, column in columns.items()
                  if role != "label" or self.labelled}  # fmt: skip
        if any(name in rows[0] for name in READY):
            inputs = stacked(rows)
        elif "image" in values:
            inputs = self.prepare.images(values["image"])
        elif "text" in values:
            inputs = self.prepare.texts(values["text"], values.get("text_pair"))
        else:
            raise DataError(
                f"{self.name} has the columns {', '.join(map(str, rows[0])) or 'of nothing'}: call the input 'text' or "
                "'image', or say columns={'text': ..}."
            )
        config = getattr(self.model, "config", None)
        return Batch(inputs, label_numbers(values["label"], config, self.name) if "label" in values else None)

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        if row.get(column) is None:
            raise DataError(f"{self.name} has examples without '{column}'.")
        return row[column]


def _is_batch(one: Any) -> bool:
    if isinstance(one, Mapping):
        return bool(one) and all(isinstance(value, Tensor) and value.dim() for value in one.values())
    return isinstance(one, (Batch, tuple, list, Tensor))


def _as_batch(found: Any, model: Any, name: str) -> Batch:
    """Read a batch: a mapping with or without labels, or (inputs, labels), or inputs alone."""
    if isinstance(found, Batch):
        return found
    inputs, labels = (found, None) if isinstance(found, (Mapping, Tensor)) else (*found, None, None)[:2]
    if isinstance(inputs, Mapping):
        labels = next((inputs[key] for key in LABELS if key in inputs), labels)
        inputs = {key: value for key, value in inputs.items() if key not in LABELS}
    elif isinstance(inputs, Tensor):
        inputs = {_main_input(model): inputs}
    if not isinstance(inputs, Mapping) or not inputs or not all(
        isinstance(value, Tensor) and value.dim() for value in inputs.values()
    ):  # fmt: skip
        raise DataError(f"{name} has a batch that is no tensor, no dict of tensors and not (inputs, labels).")
    return Batch(inputs, labels)


def _main_input(model: Any) -> str:
    """Name the argument that a tensor alone is."""
    return getattr(model, "main_input_name", None) or next(iter(inspect.signature(model.forward).parameters))


def _drawn(rows: Any, count: int | None, seed: int) -> Sequence[Any]:
    """Take some of the rows, in their order."""
    if count is None or len(rows) <= count:
        return rows
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(rows), generator=generator)[:count].sort().values.tolist()
    return [rows[i] for i in places]


def _first(batches: list[Batch], count: int | None) -> list[Batch]:
    """Take no more than so many examples of some batches."""
    left: float = math.inf if count is None else count
    found: list[Batch] = []
    for batch in batches:
        if left <= 0:
            break
        found.append(batch.first(int(min(left, batch.size))))
        left -= batch.size
    return found
