"""The model that is measured: alive, and under the names of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge import _compat
from hf_merge.api import from_pretrained
from hf_merge.errors import ParameterError
from hf_merge.recipe import in_memory
from hf_merge.sources import Source, open_sources
from hf_merge.sources.layout import align_layouts
from hf_merge.sources.mapping import MappingSource
from hf_merge.types import InMemory, Ref, as_model


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that runs, and the model as its checkpoint has it.

    Attributes:
        ref: how it was named.
        source: its checkpoint; names and shapes.
        module: it runs.
    """

    ref: Ref
    source: Source
    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return next(self.module.parameters()).device

    def names(self) -> dict[str, list[str]]:
        """Map every parameter to the tensors of the checkpoint that it is made of, or is a part of."""
        empty = _compat.empty_model(self.source.config) if self.source.config else None
        found: dict[str, list[str]] = {}
        if empty is None:
            return {name: [name] for name in self.source.specs}
        for name, place in _compat.Conversion(empty).places(self.source.specs).items():
            for live in place.live:
                found.setdefault(live, []).append(name)
        return found

    def saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name tensors that are shaped like parameters as the checkpoint names these, cut or joined as there."""
        shown: Source = MappingSource(
            {n: t for n, (_, t) in _compat.on_disk_layout(self.module, tensors).items()}, "it"
        )
        specs = self.source.specs
        if any(name not in specs or specs[name].shape != spec.shape for name, spec in shown.specs.items()):
            shown.config = self.source.config
            ref = InMemory(shown, "statistics")
            both = zip((self.ref, ref), (self.source, shown), strict=True)
            shown = align_layouts(dict(both), self.ref)[ref]
        return {
            name: shown[name] for name in shown.specs if name in specs and specs[name].shape == shown.specs[name].shape
        }

    @property
    def is_causal(self) -> bool:
        """Whether its outputs are about the next token."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        known = {one for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
                 for one in (each if isinstance(each, (tuple, list)) else [each])}  # fmt: skip
        return type(self.module).__name__ in known and not getattr(self.module.config, "is_encoder_decoder", False)

    def inputs(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring inputs to the model's device."""
        return {name: value.to(self.device) for name, value in found.items()}


def open_subject(model: Any, *, device_map: Any, dtype: str | torch.dtype, hub: Mapping[str, Any]) -> Subject:
    """Open a model to be measured: an id, a folder, an adapter with its base, or a `PreTrainedModel`.

    Raises:
        MergeError: it cannot be read, or transformers has no class for it.
    """
    try:
        ref = as_model(in_memory(model, "model"))
    except ValueError as error:
        raise ParameterError(f"The model {error}.") from None
    if isinstance(ref, InMemory) and not isinstance(ref.value, nn.Module):
        raise ParameterError(f"Only a model that runs can be measured; found a {type(ref.value).__name__}.")
    source = open_sources([ref], **hub)[ref]
    if isinstance(ref, InMemory):
        return Subject(ref, source, ref.value)
    words = {"dtype": dtype, "device_map": device_map, **hub}
    return Subject(ref, source, from_pretrained([ref], method="passthrough", **words).eval())


def has_accelerator() -> bool:
    """Tell whether there is something better than the CPU."""
    return torch.accelerator.is_available()


@dataclass(frozen=True, eq=False)
class Layer:
    """A module with a weight whose inputs are measured.

    Attributes:
        live: the name of its weight in memory.
        module: it.
        saved: the tensors of the checkpoint that its weight is, or is made of.
    """

    live: str
    module: nn.Module
    saved: tuple[str, ...]

    @property
    def inputs(self) -> int:
        """How many inputs an output depends on."""
        weight = _weight(self.module)
        return weight.shape[0] if self.inputs_first else weight[0].numel()

    @property
    def inputs_first(self) -> bool:
        """Whether its weight is (in, out)."""
        return _is_conv1d(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its Gram matrix in a file; see `types.inputs_of`."""
        return (self.inputs, 1, self.inputs) if self.inputs_first else (self.inputs, self.inputs)

    def rows(self, given: Tensor, mask: Tensor | None) -> Tensor:
        """Return the inputs of a call as rows, those of padding left out."""
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            unfolded = nn.functional.unfold(
                given if given.dim() == 4 else given[None],
                conv.kernel_size,
                conv.dilation,
                conv.padding,  # type: ignore[arg-type]
                conv.stride,
            )
            return unfolded.mT.reshape(-1, self.inputs)
        if mask is not None and given.shape[:-1] == mask.shape:
            given = given[mask.to(given.device).bool()]
        return given.reshape(-1, self.inputs)


def linear_layers(subject: Subject) -> list[Layer]:
    """Find every layer that multiplies its inputs with a matrix of the checkpoint."""
    names, found, seen = subject.names(), [], set()
    for name, module in subject.module.named_modules():
        live = f"{name}.weight" if name else "weight"
        is_matrix = isinstance(module, nn.Linear) or _is_conv1d(module) or _is_plain_convolution(module)
        if is_matrix and live in names and id(_weight(module)) not in seen:
            seen.add(id(_weight(module)))
            found.append(Layer(live, module, tuple(names[live])))
    return found


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _is_plain_convolution(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d) and module.groups == 1
        and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )  # fmt: skip


def given_to(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the first tensor of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
