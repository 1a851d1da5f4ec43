"""What is named or handed over as data -> examples: rows with named columns, or batches that are ready."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_merge.errors import DataError

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""How files of images end."""


def read(given: Any, name: str = "The data") -> Any:
    """Return the rows or batches of what is named or handed over.

    Args:
        given: a .json, .jsonl, .csv or .parquet file of rows, a .txt file with a text in each line; a folder of images,
            in folders by label if they have labels; a folder of `save_to_disk`; or rows or batches, which are returned
            as they are: a `datasets.Dataset`, a list, a loader, an iterator.
        name: how messages call it.

    Raises:
        DataError: it is none of these, cannot be read, or another package is needed.
    """
    if isinstance(given, (str, os.PathLike)):
        return _of_path(Path(given).expanduser(), name)
    if isinstance(given, (Mapping, Tensor, bytes)) or not (isinstance(given, Iterable) or has_places(given)):
        raise DataError(
            f"{name} is a {type(given).__name__}: give a datasets.Dataset, a file, a folder of images, or an iterable "
            "of rows or batches."
        )
    return given


def has_places(found: Any) -> bool:
    """Tell whether any of the examples can be had by its place, and their number is known."""
    return hasattr(found, "__getitem__") and hasattr(found, "__len__")


def _of_path(path: Path, name: str) -> Any:
    if path.is_dir():
        return _saved(path) if (path / "dataset_info.json").is_file() else _images(path, name)
    readers = {".csv": _csv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".txt": _lines}
    if not path.is_file():
        raise DataError(
            f"{name}: there is nothing at '{path}': name a {', '.join(readers)} file, or a folder of images."
        )
    if path.suffix.lower() not in readers:
        raise DataError(f"{name}: '{path}' should be a {', '.join(readers)} file, or a folder of images.")
    try:
        rows = readers[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{name}: '{path}' cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return [_beside(row, path.parent) for row in rows] if isinstance(rows, list) else rows


def _json(path: Path) -> list[Any]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    found = found.get("data", found) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError("it should be a list of rows, or have one under 'data'")
    return found


def _json_lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig") as file:
        return [json.loads(line) for line in file if line.strip()]


def _csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _lines(path: Path) -> list[Any]:
    return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _parquet(path: Path) -> Any:
    return _datasets().Dataset.from_parquet(str(path))


def _saved(path: Path) -> Any:
    return _datasets().load_from_disk(str(path))


def _datasets() -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise DataError("To read this data, install datasets: pip install 'hf-merge[data]'.")
    return importlib.import_module("datasets")


def _beside(row: Any, folder: Path) -> Any:
    """Let names of images be relative to the file that lists them."""
    if not isinstance(row, dict):
        return row
    named = {key: folder / value for key, value in row.items()
             if isinstance(value, str) and Path(value).suffix.lower() in PICTURES}  # fmt: skip
    return {**row, **{key: file for key, file in named.items() if file.is_file()}}


def _images(path: Path, name: str) -> list[dict[str, Any]]:
    """List the images of a folder, labelled by the folders in it."""
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise DataError(f"{name}: the folder '{path}' has no images ({', '.join(sorted(PICTURES))}).")
    parts = [(file, file.relative_to(path).parts) for file in found]
    return [{"image": file} | ({"label": inside[0]} if len(inside) > 1 else {}) for file, inside in parts]
