"""What the columns of a row are for, and labels as numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_merge.data.reading import PICTURES
from hf_merge.errors import DataError, shown

ROLES = ("image", "text", "text_pair", "label")
TEXTS = {
    "text": "text_pair", "sentence1": "sentence2", "premise": "hypothesis", "question1": "question2",
    "question": "sentence", "sentence": "", "content": "", "prompt": "",
}  # fmt: skip
"""What texts are mostly called, and the second of a pair."""
IMAGES, LABELS = ("image", "img"), ("label", "labels")


def as_row(one: Any, name: str) -> Mapping[str, Any]:
    """Return an example as a row: a text and an image are rows of one column."""
    if isinstance(one, Mapping):
        return one
    if isinstance(one, str) or hasattr(one, "convert"):
        return {"text" if isinstance(one, str) else "image": one}
    raise DataError(
        f"{name} has a {type(one).__name__} as an example: give rows, texts, images, or batches of tensors."
    )


def roles(row: Mapping[str, Any], said: Mapping[str, str], name: str) -> dict[str, str]:
    """Name the columns of a row by what they are for: what is said counts, else their names and what is in them.

    Raises:
        DataError: a column that is not there, or a use that no column has.
    """
    if strange := set(said) - set(ROLES):
        raise DataError(f"columns= says what {', '.join(ROLES)} are called; found {', '.join(sorted(strange))}.")
    if lacking := [column for column in said.values() if column not in row]:
        raise DataError(f"{name} has no column '{lacking[0]}'; it has {', '.join(map(str, row))}.")
    labels = [column for column in LABELS if column in row]
    found = {**({"label": labels[0]} if labels else {}), **said}
    if not {"image", "text"} & found.keys():
        found |= _input(row)
    pair = TEXTS.get(found.get("text", ""))
    return found if not pair or pair not in row else {"text_pair": pair, **found}


def _input(row: Mapping[str, Any]) -> dict[str, str]:
    image = next((column for column, value in row.items() if column in IMAGES or _is_picture(column, value)), None)
    if image is not None:
        return {"image": image}
    words = [column for column, value in row.items() if isinstance(value, str) and column not in LABELS]
    text = next((column for column in TEXTS if column in row), words[0] if len(words) == 1 else None)
    return {} if text is None else {"text": text}


def _is_picture(column: str, value: Any) -> bool:
    named = isinstance(value, Path) or (isinstance(value, str) and column not in TEXTS)
    return hasattr(value, "convert") or (named and Path(value).suffix.lower() in PICTURES)


def label_numbers(values: Sequence[Any], config: Any, name: str) -> Tensor:
    """Read labels: numbers, or names that a model's config knows."""
    known = {str(label): index for label, index in (getattr(config, "label2id", None) or {}).items()}
    numbers = []
    for value in values:
        try:
            own = known.get(value.strip()) if isinstance(value, str) else value
            numbers.append(json.loads(value) if own is None else own)
        except (TypeError, ValueError):
            names = ", ".join(itertools.islice(known, 8))
            raise DataError(f"{name} has the label {shown(value)}, which is none of the model's: {names}.") from None
    try:
        return torch.as_tensor(numbers)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name} has labels that are neither numbers nor names, such as {shown(values[0])}.") from None


def check_labels(labels: Tensor | None, config: Any, name: str) -> None:
    """Refuse labels that are not there, or that no class has."""
    if labels is None:
        raise DataError(f"{name} has no labels: add a column 'label', or name it by columns={{'label': ..}}.")
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        raise DataError(f"{name} has a label that is no number.")
    classes = getattr(config, "num_labels", 0)
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    if labels.dim() == 1 and single and classes > 1:
        bad = [one for one in labels.tolist() if not 0 <= one < classes or one != int(one)]
        if bad:
            raise DataError(f"{name} has the label {bad[0]}, and the model has the classes 0 to {classes - 1}.")
