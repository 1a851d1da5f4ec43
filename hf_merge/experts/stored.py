"""What the folder of a task expert holds: adapter_config.json, and the keys, dtypes and shapes that follow from it.

The config names every parameter of the base that the expert changes, as `named_parameters()` does, with its kind:

| kind | the task's weight | stored |
|---|---|---|
| mask | W + scale * mask * shared | `mask` uint8 [ceil(numel / 8)], `scale` float32 [1] |
| sparse | W with k entries of each row replaced | `indices` int16 or int32 [rows, k], `values` [rows, k] |
| whole | another tensor, maybe of another shape | `whole` |
| shared | W + shared; what masks choose from, stored once for all tasks | `shared` |

A mask that says a dtype has its own `shared` beside it, and needs no other file. `packing.apply` computes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import SourceError, did_you_mean, shown

PEFT_TYPE = "HF_MERGE"
"""What adapter_config.json of an expert says."""
SHARED = "shared"
"""The folder of the vector that masks choose from, and what it is called when it is loaded."""
HOLDER = "merged_expert"
"""The child of a module of the base that holds what experts store for its own parameters."""
KEY_PREFIX = "hf_merge_"
FLOATS = ("float16", "bfloat16", "float32", "float64")
KINDS = ("mask", "sparse", "whole", "shared")

Entry = dict[str, Any]
"""What the config says of one parameter: plain words and numbers."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an expert's file.

    Attributes:
        dtype: its name in torch.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


_BYTES = {"uint8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def mask_entry(shape: Sequence[int], dtype: str | None = None) -> Entry:
    """Describe a parameter of this shape that is the backbone's plus scale * mask * shared.

    Args:
        shape: of the parameter.
        dtype: of the shared vector where it is stored with the mask, and not once for all tasks.
    """
    return {"kind": "mask", "shape": [*shape], **({"dtype": dtype} if dtype else {})}


def sparse_entry(shape: Sequence[int], k: int, dtype: str, rows: int | None = None) -> Entry:
    """Describe a parameter of this shape of which k entries in each row are replaced.

    Args:
        shape: of the parameter.
        k: how many entries of each row.
        dtype: of the values: the checkpoint's.
        rows: into how many rows of equal length the entries are cut, in row-major order; by default a row is as long as
            the last dimension.
    """
    rows = math.prod(shape[:-1]) if rows is None else rows
    return {"kind": "sparse", "shape": [*shape], "rows": rows, "k": k, "dtype": dtype}


def whole_entry(shape: Sequence[int], dtype: str) -> Entry:
    """Describe a tensor of this shape that takes the place of the backbone's, whose shape may be another."""
    return {"kind": "whole", "shape": [*shape], "dtype": dtype}


def shared_entry(shape: Sequence[int], dtype: str) -> Entry:
    """Describe a tensor that masks choose from."""
    return {"kind": "shared", "shape": [*shape], "dtype": dtype}


def stored_parts(entry: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Return the tensors that are stored for a parameter, by the names that `packing.apply` has for them."""
    kind, shape = entry["kind"], tuple(entry["shape"])
    if kind == "mask":
        own = {"shared": StoredTensor(entry["dtype"], shape)} if "dtype" in entry else {}
        return {
            "mask": StoredTensor("uint8", (-(-math.prod(shape) // 8),)),
            "scale": StoredTensor("float32", (1,)),
            **own,
        }
    if kind == "sparse":
        rows, k = entry["rows"], entry["k"]
        return {
            "indices": StoredTensor(index_dtype(columns_of(entry)), (rows, k)),
            "values": StoredTensor(entry["dtype"], (rows, k)),
        }
    return {kind: StoredTensor(entry["dtype"], shape)}


def columns_of(entry: Mapping[str, Any]) -> int:
    """Return how many entries a row of a sparse parameter has."""
    return math.prod(entry["shape"]) // entry["rows"] if entry["rows"] else 0


def index_dtype(columns: int) -> str:
    """Return the dtype of the indices of columns."""
    return "int16" if columns <= 32767 else "int32"


def key_of(name: str, part: str) -> str:
    """Return the key in adapter_model.safetensors of what is stored for a parameter."""
    module, _, leaf = name.rpartition(".")
    return f"base_model.model.{f'{module}.' if module else ''}{HOLDER}.{KEY_PREFIX}{part}_{leaf}"


def file_layout(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, StoredTensor]:
    """Return what adapter_model.safetensors holds, by key, in the order of the parameters."""
    return {
        key_of(name, part): tensor for name, entry in parameters.items() for part, tensor in stored_parts(entry).items()
    }


def adapter_config(
    parameters: Mapping[str, Mapping[str, Any]],
    base: str,
    *,
    revision: str | None = None,
    id2label: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        parameters: an entry for each parameter that the expert changes.
        base: where the backbone is: `base_model_name_or_path`.
        revision: of the base, on the Hub.
        id2label: what the task's classes are called.

    Raises:
        SourceError: an entry says something that cannot be meant.
    """
    check_parameters(parameters)
    return {
        "peft_type": PEFT_TYPE, "base_model_name_or_path": base, "revision": revision, "inference_mode": True,
        "parameters": {name: dict(entry) for name, entry in parameters.items()},
        "id2label": {str(number): label for number, label in id2label.items()} if id2label else None,
    }  # fmt: skip


def check_parameters(parameters: Any) -> None:
    """Refuse what no expert's config can say of its parameters.

    Raises:
        SourceError: it names the parameter, what was found, and what belongs there.
    """
    if not isinstance(parameters, Mapping) or not parameters:
        raise SourceError(
            "The config of a task expert should have `parameters`: a kind for each parameter of the base that it "
            f"changes; found {shown(parameters)}."
        )
    for name, entry in parameters.items():
        if wrong := _wrong(entry):
            raise SourceError(f"'{name}' in the config of a task expert {wrong}; found {shown(entry)}.")


def _wrong(entry: Any) -> str:
    """Say what is wrong with an entry; nothing if it is right."""
    if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
        found = entry.get("kind") if isinstance(entry, Mapping) else ""
        return f"should have a kind: {', '.join(KINDS)}.{did_you_mean(str(found), KINDS)}"
    if not isinstance(entry.get("shape"), Sequence) or not _counts(entry["shape"]):
        return "should have the parameter's shape: a list of whole numbers"
    if (entry["kind"] != "mask" or "dtype" in entry) and entry.get("dtype") not in FLOATS:
        return f"should have a dtype: {', '.join(FLOATS)}"
    return _wrong_rows(entry) if entry["kind"] == "sparse" else ""


def _wrong_rows(entry: Mapping[str, Any]) -> str:
    rows, k, numel = entry.get("rows"), entry.get("k"), math.prod(entry["shape"])
    if not _counts((rows, k)):
        return "should have rows and k, both whole numbers"
    if numel and (not rows or numel % rows or k > numel // rows):
        return "should be cut into rows of equal length, with at most so many replaced entries (k) in each"
    return ""


def _counts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
