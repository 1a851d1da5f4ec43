"""Files of statistics: laid out before the first is measured, written as they come, there when they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import OutputError, OutputExistsError
from hf_merge.sources.statistics import METADATA
from hf_merge.types import DTYPE_NAMES, TensorSpec


class StatisticsFile:
    """One safetensors file.

    Args:
        path: where it appears.
        specs: all that will be written.
        told: what is said of it: what was measured, of which model, on what.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], told: Mapping[str, Any]):
        self._path, self._partial = path, path.with_name(f".{path.name}.{os.getpid()}.partial")
        header: dict[str, Any] = {"__metadata__": {"format": "pt", METADATA: json.dumps(told, sort_keys=True)}}
        self._places: dict[str, int] = {}
        end = 0
        for name, spec in specs.items():
            self._places[name] = end
            end += spec.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [end - spec.nbytes, end],
            }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header, self._size, self._specs = len(text).to_bytes(8, "little") + text, end, specs

    def __enter__(self) -> StatisticsFile:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.write(self._header)
            self._file.truncate(len(self._header) + self._size)
        except OSError as error:
            raise OutputError(f"'{self._path}' cannot be written: {error.strerror}.") from None
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one statistic."""
        spec = self._specs[name]
        values = tensor.detach().to("cpu", spec.dtype).contiguous().reshape(-1)
        try:
            self._file.seek(len(self._header) + self._places[name])
            self._file.write(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError(f"'{self._path}' cannot be written: {error.strerror}.") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self._path)
        else:
            self._partial.unlink(missing_ok=True)


def refuse_existing_file(path: Path, *, overwrite: bool) -> None:
    """Raise if there is something at the place of a file, or if it may not be called so.

    Raises:
        OutputError: its name does not end in .safetensors, or there is a folder.
        OutputExistsError: there is a file.
    """
    if path.suffix != ".safetensors":
        raise OutputError(f"'{path.name}': statistics are written as one file; call it '{path.name}.safetensors'.")
    if path.is_dir():
        raise OutputError(f"'{path}' is a folder.")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"'{path}' exists: pass overwrite=True (--overwrite) to replace it.")
