"""Rows of any kind as batches that a model takes: texts, images, or tensors that are ready."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import DataError, shown

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
ROLES = {
    "image": ("image", "img"),
    "text": ("text", "sentence", "sentence1", "premise", "question1", "content"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label", "labels"),
}
"""What columns are mostly called, by what they are for."""
READY = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
"""Columns that are a model's inputs already."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a model's forward, and the labels of its examples if there are some."""

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def size(self) -> int:
        return len(next(iter(self.inputs.values())))

    def examples(self) -> Iterator[Batch]:
        """Yield the examples one by one."""
        for i in range(self.size):
            labels = None if self.labels is None else self.labels[i : i + 1]
            yield Batch({name: value[i : i + 1] for name, value in self.inputs.items()}, labels)


class Data:
    """Some examples, as batches that may be gone through as often as one likes.

    Args:
        data: a `datasets.Dataset`, a local file, a folder of images by class, or an iterable of rows or batches.
        model: whose inputs they are.
        prepare: turns rows into inputs; see `Preparation`.
        columns: what its columns are for, where their names do not say it: `{"text": "review"}`.
        batch_size: rows at a time.
        max_examples: at most so many; drawn by the seed where their number is known, else the first.
        seed: they are drawn by it.
        labelled: whether labels are needed.
    """

    def __init__(
        self, data: Any, model: Any, prepare: Any, *, columns: Mapping[str, str] | None, batch_size: int,
        max_examples: int | None, seed: int, labelled: bool,
    ):  # fmt: skip
        self._prepare, self._size, self._labelled = prepare, batch_size, labelled
        self._config, self._columns = getattr(model, "config", None), dict(columns or {})
        if strange := set(self._columns) - set(ROLES):
            raise DataError(f"columns= says what {', '.join(ROLES)} are called; found {', '.join(sorted(strange))}.")
        rows = read(data)
        self.examples: Sequence[Any] = (
            _drawn(rows, max_examples, seed)
            if hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
            else list(itertools.islice(rows, max_examples))
        )
        self._ready = _are_batches(self.examples)
        if self._ready:
            self.examples = _first([_as_batch(one, model) for one in self.examples], max_examples)
        if not len(self):
            raise DataError("The data has no examples: nothing can be measured on it.")

    def __len__(self) -> int:
        return sum(batch.size for batch in self.examples) if self._ready else len(self.examples)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.examples), 1 if self._ready else self._size):
            if self._ready:
                batch = self.examples[start]
                self._check(batch.labels)
                yield batch
                continue
            end = min(start + self._size, len(self.examples))
            yield self._batch([self.examples[i] for i in range(start, end)])

    def _batch(self, rows: list[Mapping[str, Any]]) -> Batch:
        columns = {role: self._column(role, rows[0]) for role in ROLES}
        ready = [name for name in READY if name in rows[0]]
        if ready:
            inputs = self._prepare.ready(rows)
        elif columns["image"]:
            inputs = self._prepare.images([row[columns["image"]] for row in rows])
        elif columns["text"]:
            pairs = [row[columns["text_pair"]] for row in rows] if columns["text_pair"] else None
            inputs = self._prepare.texts([row[columns["text"]] for row in rows], pairs)
        else:
            raise DataError(
                f"Which column is the input? Found {', '.join(map(str, rows[0]))}: say columns={{'text': ..}} or "
                "{'image': ..}."
            )
        labels = None
        if self._labelled and columns["label"]:
            labels = self._labels([row[columns["label"]] for row in rows])
        self._check(labels)
        return Batch(inputs, labels)

    def _column(self, role: str, row: Mapping[str, Any]) -> str | None:
        """Find the column that is there for something."""
        if role in self._columns:
            if self._columns[role] not in row:
                raise DataError(f"The data has no column '{self._columns[role]}'; it has {', '.join(map(str, row))}.")
            return self._columns[role]
        return next((name for name in ROLES[role] if name in row), None)

    def _labels(self, values: list[Any]) -> Tensor:
        """Read labels: numbers, or names that the model's config knows."""
        known = {str(name): index for name, index in (getattr(self._config, "label2id", None) or {}).items()}
        numbers = []
        for value in values:
            if isinstance(value, str) and value in known:
                numbers.append(known[value])
                continue
            try:
                numbers.append(json.loads(value) if isinstance(value, str) else value)
            except ValueError:
                names = ", ".join(itertools.islice(known, 8))
                raise DataError(f"The label {shown(value)} is none of the model's: {names}.") from None
        try:
            return torch.as_tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"Labels should be numbers or names; found {shown(values[0])}.") from None

    def _check(self, labels: Tensor | None) -> None:
        """Refuse labels that no class has."""
        if not self._labelled:
            return
        if labels is None:
            raise DataError("The data has no labels: name their column by columns={'label': ..}, or sample them.")
        if labels.is_floating_point() and not bool(labels.isfinite().all()):
            raise DataError("The data has a label that is no number.")
        classes = getattr(self._config, "num_labels", 0)
        single = getattr(self._config, "problem_type", None) in (None, "single_label_classification")
        if labels.dim() == 1 and single and classes > 1:
            bad = [one for one in labels.tolist() if not 0 <= one < classes or one != int(one)]
            if bad:
                raise DataError(f"The data has the label {bad[0]}, and the model has the classes 0 to {classes - 1}.")


class Preparation:
    """A model's own tokenizer and image processor, opened when they are needed.

    Args:
        place: the model's folder or id; nothing for a model in memory.
        max_length: of texts, in tokens.
        **hub: token, cache_dir, local_files_only.
    """

    def __init__(self, place: str | None, max_length: int, **hub: Any):
        self._place, self._length, self._hub = place, max_length, hub
        self._opened: dict[str, Any] = {}

    def texts(self, texts: list[Any], pairs: list[Any] | None) -> dict[str, Tensor]:
        """Tokenize texts."""
        if strange := next((one for one in texts if not isinstance(one, str)), None):
            raise DataError(f"Texts should be strings; found {shown(strange)}.")
        tokenizer = self._open("AutoTokenizer")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.get_vocab()))
        tokenizer.padding_side = "right"
        length = min(self._length, tokenizer.model_max_length)
        both = [texts] if pairs is None else [texts, pairs]
        found = dict(tokenizer(*both, padding=True, truncation=True, max_length=length, return_tensors="pt"))
        if not found["input_ids"].shape[1]:
            raise DataError("The data has texts without a token.")
        return found

    def images(self, images: list[Any]) -> dict[str, Tensor]:
        """Turn pictures, or the paths of their files, into pixels."""
        processor = self._open("AutoImageProcessor")
        return dict(processor([_picture(image) for image in images], return_tensors="pt"))

    def ready(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack columns that are a model's inputs, short rows of tokens filled up."""
        names = [name for name in rows[0] if name in READY or name.endswith(("_mask", "_ids"))]
        found = {name: [torch.as_tensor(row[name]) for row in rows] for name in names}
        if "input_ids" in found and "attention_mask" not in found:
            found["attention_mask"] = [torch.ones_like(one) for one in found["input_ids"]]
        return {name: _stacked(values) for name, values in found.items()}

    def _open(self, kind: str) -> Any:
        """Open what the model's folder has."""
        import transformers

        if self._place is None:
            raise DataError("A model in memory has no processor: pass batches of its inputs.")
        if kind not in self._opened:
            try:
                self._opened[kind] = getattr(transformers, kind).from_pretrained(self._place, **self._hub)
            except (OSError, ValueError, ImportError, KeyError) as error:
                told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(
                    f"'{self._place}' has no {kind} for this data ({told}): pass batches instead."
                ) from None
        return self._opened[kind]


def read(data: Any) -> Any:
    """Return the rows or batches of what is named or handed over.

    Raises:
        DataError: there is nothing, it cannot be read, or another package is needed.
    """
    if not isinstance(data, (str, Path)):
        if isinstance(data, Mapping) or not isinstance(data, Iterable):
            raise DataError(
                "Data is a datasets.Dataset, a file, a folder of images by class, or an iterable of rows or batches; "
                f"found a {type(data).__name__}."
            )
        return data
    path = Path(data).expanduser()
    if path.is_dir():
        return _saved(path) if (path / "dataset_info.json").is_file() else _image_folder(path)
    if not path.is_file():
        raise DataError(f"There is no data at '{path}': name a .json, .jsonl, .csv or .parquet file, or a folder.")
    readers = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"'{path.name}' is no .json, .jsonl, .csv or .parquet file.")
    try:
        rows = readers[path.suffix](path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"'{path.name}' cannot be read: {error}.") from None
    if path.suffix != ".parquet" and not all(isinstance(row, dict) for row in rows):
        raise DataError(f"'{path.name}' should hold rows with named columns.")
    return _beside(rows, path.parent) if path.suffix != ".parquet" else rows


def _json(path: Path) -> list[Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    found = found.get("data", found) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError("it should be a list of rows, or have one under 'data'")
    return found


def _json_lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _parquet(path: Path) -> Any:
    return _datasets().load_dataset("parquet", data_files=str(path), split="train")


def _saved(path: Path) -> Any:
    return _datasets().load_from_disk(str(path))


def _datasets() -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("To read this data, install datasets: pip install 'hf-merge[data]'.")
    return importlib.import_module("datasets")


def _beside(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Let names of images be relative to the file that lists them."""
    for row in rows:
        for name in ROLES["image"]:
            if isinstance(row.get(name), str):
                row[name] = folder / row[name]
    return rows


def _image_folder(path: Path) -> list[dict[str, Any]]:
    """List the pictures of a folder with a folder for each class."""
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir())
    rows = [
        {"image": file, "label": folder.name}
        for folder in classes for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGES
    ]  # fmt: skip
    if not rows:
        raise DataError(f"'{path}' has no folders with images: one for each class is meant.")
    return rows


def _picture(image: Any) -> Any:
    """Open a picture that is named; return one that is there."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("bytes")
    if not isinstance(image, (str, Path, bytes)):
        return image
    if importlib.util.find_spec("PIL") is None:
        raise DataError("To read images, install pillow: pip install 'hf-merge[data]'.")
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise DataError(f"An image cannot be read: {error}.") from None


def _drawn(rows: Any, count: int | None, seed: int) -> Sequence[Any]:
    """Take some of the rows, in their order."""
    if count is None or len(rows) <= count:
        return rows
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(rows), generator=generator)[:count].sort().values.tolist()
    return [rows[i] for i in places]


def _are_batches(examples: Sequence[Any]) -> bool:
    first = examples[0] if len(examples) else None
    if isinstance(first, Mapping):
        return bool(first) and all(isinstance(value, Tensor) and value.dim() for value in first.values())
    if isinstance(first, (tuple, list, Tensor)):
        return True
    if first is not None:
        raise DataError(f"Examples are rows or batches, as dicts; found a {type(first).__name__}.")
    return False


def _as_batch(found: Any, model: Any) -> Batch:
    """Read a batch: a mapping with or without labels, or (inputs, labels), or inputs alone."""
    if isinstance(found, Mapping):
        inputs = {name: value for name, value in found.items() if name not in ROLES["label"]}
        labels = next((found[name] for name in ROLES["label"] if name in found), None)
    else:
        inputs, labels = (found, None) if isinstance(found, Tensor) else (*found, None)[:2]
        inputs = inputs if isinstance(inputs, Mapping) else {getattr(model, "main_input_name", "input"): inputs}
    if not inputs or not all(isinstance(value, Tensor) and value.dim() for value in inputs.values()):
        raise DataError("A batch is a dict of tensors, or (inputs, labels).")
    return Batch(inputs, labels)


def _first(batches: list[Batch], count: int | None) -> list[Batch]:
    """Take no more than so many examples of some batches."""
    left: float = math.inf if count is None else count
    found: list[Batch] = []
    for batch in batches:
        if left <= 0:
            break
        keep = int(min(left, batch.size))
        labels = None if batch.labels is None else batch.labels[:keep]
        found.append(Batch({name: value[:keep] for name, value in batch.inputs.items()}, labels))
        left -= keep
    return found


def _stacked(values: list[Tensor]) -> Tensor:
    if len({tuple(one.shape) for one in values}) == 1:
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
