"""Which module each tensor of a model belongs to, and how PEFT can keep a change of it. Read from config.json alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from hf_merge import _compat
from hf_merge.adapters.parts import Kind, Part
from hf_merge.architecture import backbone_of

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_EXPERTS = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layout:
    """A model's modules as PEFT sees them.

    Attributes:
        parts: of every parameter and buffer, by its name in memory. Tensors of a module that is kept whole share one.
        tables: names in checkpoints and in memory, and the ways between them.
        heads: names in memory of what the class has on top of its backbone.
        tied: names in memory that share their values with another.
    """

    parts: Mapping[str, Part]
    tables: _compat.Conversion
    heads: frozenset[str] = frozenset()

    @property
    def tied(self) -> Mapping[str, str]:
        return self.tables.tied

    def live(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the parameters that each tensor of a checkpoint becomes, or becomes part of."""
        return {name: place.live for name, place in self.tables.places(names).items()}


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """Build the model of a config.json without weights and look at its modules; None if transformers cannot."""
    return _layout(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _layout(config: str) -> Layout | None:
    model = _compat.empty_model(json.loads(config))
    if model is None:
        return None
    parts: dict[str, Part] = {}
    for path, module in model.named_modules():
        parts |= _of_module(path, module, unadapted=_reader(model, path))
    if any(part.kind == "experts" for part in parts.values()):
        parts = {name: _beside_experts(part) for name, part in parts.items()}
    tables = _compat.Conversion(model)
    inside = backbone_of(model, json.loads(config))
    heads = frozenset(name for name in tables.shapes if not inside(name))
    return Layout(_with_twins(model, parts, tables.tied), tables, heads)


def _with_twins(model: nn.Module, parts: Mapping[str, Part], tied: Mapping[str, str]) -> dict[str, Part]:
    """Let tied matrices name the other modules that read them; a tied bias is that of the module that reads it."""
    found = dict(parts)
    twins: dict[str, list[tuple[str, Kind]]] = {}
    for alias, name in tied.items():
        own, other = parts.get(alias), parts.get(name)
        if own is None or other is None:
            continue
        if other.kind == "none" and own.kind == "bias":
            found[name] = own
        if {own.kind, other.kind} <= {"linear", "embedding"} and not _is_one(model, own, other):
            twins.setdefault(name, []).append((own.module, own.kind))
    return {name: replace(part, twins=tuple(twins.get(name, ()))) for name, part in found.items()}


def _is_one(model: nn.Module, part: Part, other: Part) -> bool:
    """Tell whether two names are those of one module."""
    return model.get_submodule(part.module) is model.get_submodule(other.module)


def _reader(model: nn.Module, path: str) -> Kind | None:
    """Say how a module must be kept that is not only called: `none` where others read its weights past it.

    torch's attention reads the weights of its output layer. A parametrisation makes weights of its own. Layers that
    are asked for what PEFT's do not say, as Whisper's, and those whose weights Mamba's kernels read, are saved whole.
    """
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    if isinstance(parent, nn.MultiheadAttention) or "parametrizations" in path.split("."):
        return "none"
    asked = any(f"self.{name}.{word}" in _source(type(parent)) for word in ("stride", "num_embeddings"))
    mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBA and name in ("out_proj", "conv1d")
    return "whole" if asked or mamba else None


@lru_cache(maxsize=256)
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _beside_experts(part: Part) -> Part:
    """Let PEFT take layers for parameters that are called as single experts once were: it would fuse them as those."""
    if part.kind != "linear" or part.module.rpartition(".")[2] not in _EXPERTS:
        return part
    return replace(part, module=f"{part.module}.weight", kind="experts")


def _of_module(path: str, module: nn.Module, *, unadapted: Kind | None) -> Iterator[tuple[str, Part]]:
    """Yield (name in memory, part) for all that a module itself holds.

    Args:
        path: of the module.
        module: the module.
        unadapted: how it is kept, if not as others of its class.
    """
    shapes = {
        name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name
    }
    before = f"{path}." if path else ""
    for name, shape in shapes.items():
        kind: Kind = (unadapted or _kind(module, name, shapes)) if path else "none"
        owner = path if kind not in ("experts", "none") else before + name
        yield (
            before + name,
            Part(
                module=owner,
                kind=kind,
                shape=() if kind == "whole" else shapes["weight"] if kind == "bias" else shape,
                turned=_is_turned(module, kind, shape),
                place=[*shapes].index(name) if kind == "experts" else 0,
                biased="bias" in shapes and kind in ("linear", "conv", "bias"),
            ),
        )


def _kind(module: nn.Module, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    """Say how PEFT keeps a change of a module's tensor."""
    factored = _factored(module)
    if factored and name in ("weight", "bias"):
        return factored if name == "weight" else "bias" if factored != "embedding" else "none"
    stacked = any(len(shape) == 3 for shape in shapes.values()) and not isinstance(
        module, (*_CONVOLUTIONS, *_TRANSPOSED)
    )
    if stacked and not _holds_modules(module):
        return "experts" if len(shapes[name]) in (2, 3) else "none"
    return "none" if _holds_modules(module) else "whole"


def _factored(module: nn.Module) -> Kind | None:
    """Say by which layer PEFT adapts a module; None if by none, or by one that would not do what the module does."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward:
        return "linear"
    if isinstance(module, _CONVOLUTIONS):
        return "conv" if module.groups == 1 and not module.transposed and module.padding_mode == "zeros" else None
    if isinstance(module, nn.Embedding):
        known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return "embedding" if known and module.max_norm is None else None
    return None


def _is_turned(module: nn.Module, kind: str, shape: tuple[int, ...]) -> bool:
    from transformers.pytorch_utils import Conv1D

    if kind == "experts":
        return len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    return isinstance(module, Conv1D) and kind in ("linear", "bias")


def _holds_modules(module: nn.Module) -> bool:
    """Tell whether modules with parameters lie in a module (activations have none)."""
    return any(next(child.parameters(), None) is not None for child in module.children())


def task_type(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's word for what a model does, where that asks for nothing more than the adapter."""
    words = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM"}
    architecture = next(iter(config.get("architectures") or ()), "")
    return words.get(_compat.auto_class_name(architecture))


def auto_mapping(config: Mapping[str, Any]) -> dict[str, str] | None:
    """Say which class PEFT loads the base with, where no task type does."""
    import transformers

    found = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    return None if found is None else {"base_model_class": found.__name__, "parent_library": found.__module__}


def numbers(part: Part, rank: int) -> int:
    """Return how many numbers the factors of a part have."""
    rows, columns = part.sides
    return part.experts * rank * (rows + columns) * len(part.modules)


def largest_rank(part: Part) -> int:
    """Return the rank that holds every change of a part."""
    return max(1, min(part.sides))
