"""Data -> batches that a model takes: files, folders of images, rows, or batches as they are."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import MergeError, ParameterError

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
TEXTS = ("text", "sentence", "content", "prompt", "question", "sentence1", "premise")
PAIRS = {"sentence1": "sentence2", "premise": "hypothesis", "question": "sentence", "text": "text_pair"}
LABELS = ("label", "labels")
MOST_TOKENS = 512

Batch = dict[str, Any]


def batches(
    model: Any, data: Any, batch_size: int, seed: int | None, *, labels: bool = False, name: str = "the data"
) -> Iterator[Batch]:
    """Yield the data once, as batches that a model takes.

    Args:
        model: the model, or its folder or Hub id; its own processor prepares images and texts.
        data: a file (.json, .jsonl, .csv with a column of texts; .txt with a line each), a folder of images (of
            folders by label), rows (a `datasets.Dataset`, a list of mappings, of texts or of images), or an iterable of
            batches, which are taken as they are.
        batch_size: examples in a batch; the last one may have fewer.
        seed: of the order; None leaves it.
        labels: read a label for each example too, as `labels`: a number, or a name that the model's config knows.
        name: how messages call the data.

    Raises:
        ParameterError: it cannot be read, or is empty, or a label is out of range.
    """
    rows, ready = _rows(data, name)
    first = rows[0] if len(rows) else next(ready, None)
    if first is None:
        raise ParameterError(f"{name} is empty: nothing can be learnt from it.")
    if not len(rows):
        yield from (_as_batch(one, name) for one in chain([first], ready))
        return
    prepare = _Preparation(model, dict(first), name, labels=labels)
    order = range(len(rows)) if seed is None else torch.randperm(len(rows), generator=_generator(seed)).tolist()
    for start in range(0, len(rows), batch_size):
        yield prepare([dict(rows[i]) for i in order[start : start + batch_size]])


def endless(model: Any, data: Any, batch_size: int, seed: int, *, name: str = "the data") -> Iterator[Batch]:
    """Yield batches of the data for ever, in another order each time.

    Raises:
        ParameterError: as `batches`; an iterator, which can be had but once, ends.
    """
    if isinstance(data, Iterator):
        yield from batches(model, data, batch_size, seed, name=name)
        raise ParameterError(f"{name} ended before the last step: give a list, a loader or files, or ask fewer steps.")
    for epoch in count():
        yield from batches(model, data, batch_size, seed + epoch * 1_000_003, name=name)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


def _rows(data: Any, name: str) -> tuple[Sequence[Mapping[str, Any]], Iterator[Any]]:
    """Return examples as mappings, or else batches."""
    if isinstance(data, (str, os.PathLike)):
        return _of_path(Path(data).expanduser(), name), iter(())
    if hasattr(data, "column_names") and hasattr(data, "__getitem__"):  # a datasets.Dataset
        return data, iter(())
    if isinstance(data, Sequence) and not (len(data) and _is_batch(data[0])):
        return [_as_row(one, name) for one in data], iter(())
    if isinstance(data, Iterable) and not isinstance(data, (Mapping, Tensor)):
        return [], iter(data)
    raise ParameterError(
        f"{name} is a {type(data).__name__}: give a file, a folder of images, a Dataset, rows or batches."
    )


def _is_batch(one: Any) -> bool:
    return isinstance(one, Tensor) or (
        isinstance(one, Mapping) and bool(one) and all(isinstance(value, Tensor) for value in one.values())
    )


def _as_batch(one: Any, name: str) -> Batch:
    if not _is_batch(one):
        raise ParameterError(
            f"{name} yields a {type(one).__name__}: batches are tensors, or mappings of a model's arguments to tensors."
        )
    return {"": one} if isinstance(one, Tensor) else dict(one)


def _as_row(one: Any, name: str) -> Mapping[str, Any]:
    if isinstance(one, str):
        return {"text": one}
    if isinstance(one, Mapping):
        return one
    if hasattr(one, "convert"):  # an image of Pillow
        return {"image": one}
    raise ParameterError(f"{name} has a {type(one).__name__} as an example: give mappings, texts or images.")


def _of_path(path: Path, name: str) -> Sequence[Mapping[str, Any]]:
    if path.is_dir():
        found = sorted(one for one in path.rglob("*") if one.suffix.lower() in IMAGES)
        if not found:
            raise ParameterError(f"{name}: the folder '{path}' has no images ({', '.join(sorted(IMAGES))}).")
        return [{"image": one} | ({"label": one.parent.name} if one.parent != path else {}) for one in found]
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".txt": _lines}
    if path.suffix.lower() not in readers:
        raise ParameterError(f"{name}: '{path}' should be a {', '.join(readers)} file or a folder of images.")
    try:
        rows = readers[path.suffix.lower()](path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as error:
        raise ParameterError(f"{name}: cannot read '{path}': {getattr(error, 'strerror', None) or error}.") from None
    return [_as_row(one, name) for one in rows]


def _json(text: str) -> list[Any]:
    found = json.loads(text)
    found = found.get("data", found) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError("it should hold a list of examples")
    return found


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _csv(text: str) -> list[Any]:
    return list(csv.DictReader(text.splitlines(keepends=True)))


def _lines(text: str) -> list[Any]:
    return [line for line in text.splitlines() if line.strip()]


class _Preparation:
    """Turns examples into what a model takes, with the model's own processor."""

    def __init__(self, model: Any, first: Mapping[str, Any], name: str, *, labels: bool):
        self.name, self.config = name, _config_of(model)
        self.column, self.is_image = _column(first, name)
        self.pair = PAIRS.get(self.column, "")
        self.pair = self.pair if self.pair in first else ""
        self.label = next((one for one in LABELS if one in first), None) if labels else None
        if labels and self.label is None:
            raise ParameterError(f"{name} has no labels: add a column 'label', or a folder for each label.")
        self.processor = _processor(model, name, is_image=self.is_image)
        self.longest = _longest(self.processor, self.config)

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        values = [row.get(self.column) for row in rows]
        if any(value is None for value in values):
            raise ParameterError(f"{self.name} has examples without '{self.column}'.")
        batch = self._images(values) if self.is_image else self._texts(values, rows)
        if self.label is not None:
            batch["labels"] = torch.tensor([self._number(row.get(self.label)) for row in rows])
        return batch

    def _images(self, values: Sequence[Any]) -> Batch:
        images = [_opened(value, self.name) for value in values]
        try:
            return dict(self.processor(images=images, return_tensors="pt"))
        finally:
            for image in images:
                image.close()

    def _texts(self, values: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> Batch:
        pairs = {"text_pair": [str(row.get(self.pair)) for row in rows]} if self.pair else {}
        return dict(self.processor(
            [str(value) for value in values], return_tensors="pt", padding=True, truncation=True,
            max_length=self.longest, **pairs,
        ))  # fmt: skip

    def _number(self, label: Any) -> int:
        """Return a label as a number among the model's classes."""
        classes = {int(i): str(one) for i, one in (getattr(self.config, "id2label", None) or {}).items()}
        named = {one: i for i, one in classes.items()}
        text = str(label).strip()
        number = named.get(text, int(text) if text.lstrip("-").isdigit() else None)
        if number is None or (classes and number not in classes):
            known = ", ".join(list(named)[:6]) + (", ..." if len(named) > 6 else "")
            raise ParameterError(
                f"{self.name} has the label {label!r}, and the model has {len(classes)} classes, 0 to "
                f"{len(classes) - 1} ({known})."
            )
        return number


def _column(first: Mapping[str, Any], name: str) -> tuple[str, bool]:
    """Name the column that the model sees, and whether it holds images."""
    for key, value in first.items():
        if hasattr(value, "convert") or (isinstance(value, (str, os.PathLike)) and Path(value).suffix.lower() in IMAGES
                                         and key not in TEXTS):  # fmt: skip
            return key, True
    words = [key for key, value in first.items() if isinstance(value, str) and key not in LABELS]
    chosen = next((key for key in TEXTS if key in words), words[0] if len(words) == 1 else None)
    if chosen is None:
        raise ParameterError(f"{name} has the columns {', '.join(map(str, first)) or 'none'}: call one of them 'text'.")
    return chosen, False


def _opened(value: Any, name: str) -> Any:
    if hasattr(value, "convert"):
        return value.convert("RGB")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(value) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ParameterError(f"{name}: cannot read the image '{value}': {error}.") from None


def _config_of(model: Any) -> Any:
    if hasattr(model, "config"):
        return model.config
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(os.fspath(model))


def _processor(model: Any, name: str, *, is_image: bool) -> Any:
    """Load the processor that lies beside a model."""
    from transformers import AutoImageProcessor, AutoTokenizer

    place = str(getattr(model, "name_or_path", model))
    what = "image processor" if is_image else "tokenizer"
    try:
        found: Any = (AutoImageProcessor if is_image else AutoTokenizer).from_pretrained(place)
    except (OSError, ValueError, ImportError, KeyError) as error:
        told = " ".join(str(error).split())[:200]
        raise MergeError(
            f"{name} cannot be prepared: '{place}' has no {what} that loads ({told}). Save one beside the model, or "
            "give batches of tensors."
        ) from None
    if not is_image:
        found.pad_token = found.pad_token or found.eos_token or found.unk_token
        found.padding_side = "right"
    return found


def _longest(processor: Any, config: Any) -> int:
    told = getattr(processor, "model_max_length", MOST_TOKENS)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(min(told, getattr(text, "max_position_embeddings", None) or MOST_TOKENS, MOST_TOKENS))
