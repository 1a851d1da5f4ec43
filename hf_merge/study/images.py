"""The images of a task: those to choose coefficients on, and those of the test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_merge.data import labelled_batches, read
from hf_merge.errors import DataError
from hf_merge.study.spec import Dataset, TaskEntry
from hf_merge.study.tasks import examples

Examples = Iterable[tuple[Mapping[str, Tensor], Tensor]]
BATCH = 128
DRAWN = {"validation": 200, "test": 500}
"""Images of a task; the standard error of an accuracy over 500 is about 2 points, of an average over 8 tasks 0.7."""


@dataclass(frozen=True)
class Images:
    """Examples as pairs of a model's arguments and labels.

    Attributes:
        validation: to choose coefficients on.
        test: what is reported.
    """

    validation: Examples
    test: Examples


def drawn(task: str, seed: int) -> Images:
    """Return the images of one of the study's own tasks."""
    return Images(*(_cut(*examples(task, split, count, seed)) for split, count in DRAWN.items()))


def given(rows: Any, model: Any, prepare: Any, name: str) -> Images:
    """Return every fifth of the rows to choose on, and the others as the test."""
    every = range(len(rows))
    parts = [[place for place in every if (place % 5 == 4) == chosen] for chosen in (True, False)]
    if not parts[0]:
        raise DataError(f"{name} has {len(rows)} examples: a study needs 5 or more.")
    return Images(*(_Prepared(_part(rows, places), model, prepare) for places in parts))


def rows_of(dataset: Dataset, hub: Mapping[str, Any], name: str) -> Any:
    """Read the rows of a file or folder, or of a dataset on the Hub.

    Raises:
        DataError: they cannot be read, or another package is needed.
    """
    assert dataset.path is not None
    rows = read(dataset.path, name) if Path(dataset.path).expanduser().exists() else _of_hub(dataset, hub, name)
    return rows if dataset.limit is None else _part(rows, range(min(dataset.limit, len(rows))))


def class_names(task: TaskEntry, rows: Any) -> list[str]:
    """Return the names of a task's labels: those that it says, or that the dataset has.

    Raises:
        DataError: neither has any.
    """
    assert task.head is not None
    if task.head.classes:
        return [*task.head.classes]
    kinds = getattr(rows, "features", None) or {}
    for column in ("label", "labels", "fine_label"):
        if names := getattr(kinds.get(column), "names", None):
            return [*names]
    raise DataError(f"Task {task.name} has a head of text, and its labels have no names: say `classes` under `head`.")


def _of_hub(dataset: Dataset, hub: Mapping[str, Any], name: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{name}: there is no file or folder '{dataset.path}', and datasets on the Hub need another package: "
            "pip install 'hf-merge[data]'."
        ) from None
    assert dataset.path is not None
    words: dict[str, Any] = {key: hub[key] for key in ("token", "cache_dir") if hub.get(key)}
    try:
        load: Any = load_dataset
        return load(dataset.path, dataset.name, split=dataset.split, **words)
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: '{dataset.path}' cannot be loaded: {told}") from None


def _part(rows: Any, places: Iterable[int]) -> Any:
    return rows.select(places) if hasattr(rows, "select") else [rows[place] for place in places]


def _cut(images: Tensor, labels: Tensor) -> Examples:
    return [({"pixel_values": some}, those)
            for some, those in zip(images.split(BATCH), labels.split(BATCH), strict=True)]  # fmt: skip


class _Prepared:
    """Rows that are prepared each time that they are gone through."""

    def __init__(self, rows: Any, model: Any, prepare: Any):
        self.data = labelled_batches(rows, model, batch_size=BATCH, prepare=prepare)

    def __iter__(self) -> Any:
        for batch in self.data:
            yield batch.inputs, batch.labels
