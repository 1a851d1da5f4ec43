"""Texts and images -> inputs of a model, by its own tokenizer and image processor."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import DataError, shown
from hf_merge.types import ModelRef, Ref

READY = ("input_ids", "pixel_values", "input_values", "input_features", "inputs_embeds")
"""Columns that are a model's inputs already."""
_OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl")
"""Models whose positions begin after that of padding."""


class Preparation:
    """A model's own tokenizer and image processor, opened when they are needed.

    Args:
        model: that runs.
        ref: how it was named, which says where its processor lies and of which revision it is; without it, or for a
            model in memory, it lies where the model was loaded from.
        max_length: of texts, in tokens; a model that takes fewer gets fewer.
        **hub: token, cache_dir, local_files_only.
    """

    def __init__(self, model: Any, ref: Ref | None = None, *, max_length: int = 512, **hub: Any):
        named = isinstance(ref, ModelRef)
        self._place = ref.path if named else getattr(model, "name_or_path", None)
        self._hub = {**hub, **({"revision": ref.revision} if named and ref.revision else {})}
        self._length = _room(getattr(model, "config", None), max_length)
        self._opened: dict[str, Any] = {}

    def texts(self, texts: Sequence[Any], pairs: Sequence[Any] | None) -> dict[str, Tensor]:
        """Tokenize texts, or pairs of them."""
        if strange := [one for one in (*texts, *(pairs or ())) if not isinstance(one, str)]:
            raise DataError(f"Texts should be strings; found {shown(strange[0])}.")
        tokenizer = self._open("AutoTokenizer")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.get_vocab()))
        tokenizer.padding_side = "right"
        length = min(self._length, tokenizer.model_max_length)
        both = [list(texts)] if pairs is None else [list(texts), list(pairs)]
        found = dict(tokenizer(*both, padding=True, truncation=True, max_length=length, return_tensors="pt"))
        if not found["input_ids"].shape[1]:
            raise DataError("The data has texts without a token.")
        return found

    def images(self, images: Sequence[Any]) -> dict[str, Tensor]:
        """Turn images, or the paths of their files, into pixels."""
        return dict(self._open("AutoImageProcessor")([_picture(image) for image in images], return_tensors="pt"))

    def _open(self, kind: str) -> Any:
        """Open what lies beside the model."""
        import transformers

        if not self._place:
            raise DataError("A model in memory has no processor: pass batches of its inputs.")
        if kind not in self._opened:
            try:
                self._opened[kind] = getattr(transformers, kind).from_pretrained(self._place, **self._hub)
            except (OSError, ValueError, ImportError, KeyError) as error:
                told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(
                    f"'{self._place}' has no {kind} for this data ({told}): save one beside the model, or pass batches."
                ) from None
        return self._opened[kind]


def stacked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack columns that are a model's inputs already, short rows of tokens filled up and masked."""
    names = [name for name in rows[0] if name in READY or name.endswith(("_mask", "_ids"))]
    found = {name: [torch.as_tensor(row[name]) for row in rows] for name in names}
    if "input_ids" in found and "attention_mask" not in found:
        found["attention_mask"] = [torch.ones_like(one) for one in found["input_ids"]]
    return {name: _filled(values) for name, values in found.items()}


def _filled(values: list[Tensor]) -> Tensor:
    if len({tuple(one.shape) for one in values}) == 1:
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def _room(config: Any, asked: int) -> int:
    """Return how many tokens a text may have."""
    words = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(words, "max_position_embeddings", None) or getattr(words, "n_positions", None) or asked
    padding = getattr(words, "pad_token_id", None) if getattr(words, "model_type", "") in _OFFSET else None
    return min(asked, own - (0 if padding is None else padding + 1))


def _picture(image: Any) -> Any:
    """Open an image that is named or held as a file; return one that is there."""
    if isinstance(image, Mapping):
        image = image.get("path") or image.get("bytes")
    if hasattr(image, "convert"):
        return image.convert("RGB")
    if not isinstance(image, (str, Path, bytes)):
        return image
    if importlib.util.find_spec("PIL") is None:
        raise DataError("To read images, install pillow: pip install 'hf-merge[data]'.")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise DataError(f"An image cannot be read: {error}.") from None
