"""A live module as a source, read where its weights lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge import _compat
from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.types import TensorSpec


class ModuleSource(Source):
    """An `nn.Module` or `PreTrainedModel`, also one that accelerate has dispatched or offloaded.

    A PreTrainedModel shows the names that its `save_pretrained` would write.
    """

    def __init__(self, module: nn.Module, label: str):
        self.label = label
        self._module = module
        if any(".lora_" in name for name in module.state_dict()):
            raise SourceError(f"{label} carries an adapter: call merge_and_unload() first and pass the result.")
        self._live = _compat.on_disk_layout(module)
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, (_, t) in self._live.items()}
        config: Any = getattr(module, "config", None)
        self.config = config.to_dict() if hasattr(config, "to_dict") else {}

    def __getitem__(self, name: str) -> Tensor:
        live_name, tensor = self._live[name]
        if tensor.device.type != "meta":
            return tensor.detach()
        if live_name is None:
            raise SourceError(f"'{name}' of {self.label} is offloaded in another layout: save the model first.")
        return self._read_offloaded(live_name)

    def _read_offloaded(self, name: str) -> Tensor:
        """Let accelerate bring one parameter back from where it was offloaded to."""
        from accelerate.utils import align_module_device

        owner, _, leaf = name.rpartition(".")
        module = self._module.get_submodule(owner)
        with align_module_device(module, torch.device("cpu")):
            tensor: Tensor = getattr(module, leaf).detach()
        if tensor.device.type == "meta":
            raise SourceError(f"'{name}' of {self.label} has no values: the model is on the meta device.")
        return tensor

    def write_companions(self, folder: Path) -> None:
        parts: list[Any] = [getattr(self._module, name, None) for name in ("config", "generation_config")]
        for part in parts:
            if hasattr(part, "save_pretrained"):
                named = copy.deepcopy(part)
                named.architectures = [type(self._module).__name__]
                named.save_pretrained(folder)
