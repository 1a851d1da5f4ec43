"""Data of any kind -> batches that a model takes: files, folders of images, datasets, rows, or batches as they are."""

from __future__ import annotations

from typing import Any

from hf_merge.data.batches import Batch, Data, endless
from hf_merge.data.preparing import Preparation
from hf_merge.data.reading import read

__all__ = ["Batch", "Data", "Preparation", "endless", "labelled_batches", "read"]


def labelled_batches(data: Any, model: Any, *, batch_size: int = 16, prepare: Preparation | None = None) -> Data:
    """Return the examples of a classifier, in their order, as batches with labels.

        for batch in labelled_batches("images/cars", model):
            right = model(**batch.inputs).logits.argmax(-1) == batch.labels

    Args:
        data: a `datasets.Dataset`, a file, a folder with a folder of images for each class, or an iterable of rows or
            of batches; see `read`.
        model: the classifier; its config gives labels their numbers.
        batch_size: examples in a batch; the last one may have fewer.
        prepare: the processor; by default the one that lies where the model was loaded from.

    Returns:
        Batches whose inputs are (examples, channels, height, width) `pixel_values` for images, (examples, tokens)
        `input_ids` and `attention_mask` for texts, and whose labels are (examples,). They may be gone through again.

    Raises:
        DataError: it cannot be read, is empty, or has no labels or ones that the model does not have.
    """
    return Data(data, model, prepare, batch_size=batch_size, labelled=True)
