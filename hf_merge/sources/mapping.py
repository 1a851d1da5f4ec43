"""A mapping of names to tensors as a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source, stored_once
from hf_merge.types import TensorSpec


class MappingSource(Source):
    """Any mapping of names to tensors (or arrays): a state dict, a BEiT-3 checkpoint, another source."""

    def __init__(self, tensors: Mapping[str, Any], label: str):
        self.label = label
        self._tensors = {name: _tensor(value, name, label) for name, value in tensors.items()}
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}
        self.shared = stored_once(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


def _tensor(value: Any, name: str, label: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise SourceError(
            f"'{name}' of {label} is a {type(value).__name__}, not a tensor: pass the state dict itself."
        ) from None
