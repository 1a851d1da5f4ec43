"""A live module as a source, read where its weights lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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

    Args:
        module: the model.
        label: how messages call it.
        tensors: its tensors by the names that they have without an adapter, if it carries one.
    """

    def __init__(self, module: nn.Module, label: str, tensors: Mapping[str, Tensor] | None = None):
        self.label = label
        self._module = module
        if tensors is None and any(".lora_" in name for name in module.state_dict()):
            raise SourceError(f"{label} carries an adapter: call merge_and_unload() first and pass the result.")
        self._live = _compat.on_disk_layout(module, tensors)
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, (_, t) in self._live.items()}
        self.config = config_of(module)

    def __getitem__(self, name: str) -> Tensor:
        live_name, tensor = self._live[name]
        if tensor.device.type != "meta":
            return tensor.detach()
        if live_name is None:
            raise SourceError(f"'{name}' of {self.label} is offloaded in another layout: save the model first.")
        return self._read_offloaded(live_name)

    def _read_offloaded(self, name: str) -> Tensor:
        """Let accelerate bring one parameter back from where it was offloaded to."""
        from accelerate.utils import align_module_device, has_offloaded_params

        owner, _, leaf = name.rpartition(".")
        module = self._module.get_submodule(owner)
        if not has_offloaded_params(module):
            raise SourceError(f"'{name}' of {self.label} has no values: the model is on the meta device.")
        with align_module_device(module, torch.device("cpu")):
            return getattr(module, leaf).detach()

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        generation: Any = getattr(self._module, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(folder)


def config_of(module: nn.Module) -> dict[str, Any]:
    """Return what save_pretrained would write into config.json; nothing for a module of another library."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    return {**json.loads(config.to_json_string()), "architectures": [type(module).__name__]}
