"""Adapters that PEFT itself applies, a few modules at a time: every type but LoRA, and LoRA's own variants."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_merge import _compat
from hf_merge.errors import SourceError, shown
from hf_merge.schedule import layer_of
from hf_merge.sources.base import Source
from hf_merge.sources.changes import finite
from hf_merge.sources.lora import FIX, PREFIX, plain_name
from hf_merge.sources.masks import EXPERT, refuse_masks

PROMPTS = {"CARTRIDGE", "CPT", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
NOT_WEIGHTS = {
    **dict.fromkeys(PROMPTS, "it adds tokens or states to the input, and changes no weight"),
    "ADAPTION_PROMPT": "it adds attention to a prompt, and changes no weight",
    "POLY": "it mixes its parts anew for each task id",
    "XLORA": "it mixes its adapters anew for each input",
    "LILY": "it shares its parts between layers by a router",
    "SHADOW": "it runs a second network beside the model",
}
"""Types of adapters that no weight can hold, and why."""

VARIANTS = {"use_bdlora", "velora_config", "monteclora_config", "kasa_config"}
"""Fields of a LoRA's config for variants that PEFT merges."""
UNMERGED = {
    "use_qalora": "QALoRA is a part of a GPTQ model",
    "alora_invocation_tokens": "an activated LoRA works only after its invocation tokens",
    "arrow_config": "Arrow chooses adapters anew for each token",
    "layer_replication": "it has more layers than its base: stack them with slices:, and add the adapter to the result",
    "megatron_config": "it is part of a Megatron model",
}
"""Fields of a LoRA's config for variants that no weight of the base can hold, and why."""

_ALONE = {
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD", "SUPERTUNING", "WAVEFT",
    EXPERT,
}  # fmt: skip
"""Types whose layers share nothing: the others may have no values at all. Any other type wants a device for them."""
_BY_VALUES = {"ADAMSS"}
"""Types whose tensors' shapes depend on the values of the base."""

_AT_A_TIME = 1 << 28  # bytes of the base's weights that are merged at a time


def refuse(config: Mapping[str, Any], label: str) -> None:
    """Refuse adapters that are not a change of weights.

    Raises:
        SourceError: it names the type, and why.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise SourceError(f"The config of '{label}' should name its peft_type; found {shown(kind)}.")
    if kind in NOT_WEIGHTS:
        raise SourceError(
            f"'{label}' is an adapter of type {kind}, which cannot be merged: {NOT_WEIGHTS[kind]}. "
            "Merge the model without it, and load it with PEFT onto the result."
        )
    if kind == "LORA":
        for field, why in UNMERGED.items():
            if config.get(field):
                raise SourceError(f"'{label}' uses {field}, and cannot be merged: {why}.")
    refuse_masks(config, label)


def is_peft_s(config: Mapping[str, Any]) -> bool:
    """Tell whether PEFT is to apply an adapter."""
    kind = config.get("peft_type")
    return kind not in ("LORA", "TRAINABLE_TOKENS") or any(config.get(field) for field in VARIANTS)


class Tuned:
    """An adapter in PEFT's own words, on a base of which modules are read when they are needed.

    Args:
        base: the model; its config.json names the class.
        adapter: the adapter's tensors.
        config: its adapter_config.json.

    Attributes:
        reads: which tensors of the base each one that the adapter changes is made from.
        whole: keys of tensors that take the place of the base's, by the base's names in memory.

    Raises:
        SourceError: PEFT cannot apply it, or headers tell that tensors are missing or do not fit.
    """

    def __init__(self, base: Source, adapter: Source, config: Mapping[str, Any]):
        self.base, self.adapter, self.config = base, adapter, config
        self._lock, self._ready = threading.Lock(), dict[str, Tensor]()
        model = self._built({})
        self.targets, expected = _compat.peft_targets(model), _compat.peft_tensors(model)
        self._tables = _compat.Conversion(model.unload())
        self._refuse_other_shapes()
        self.whole = self._checked(expected)
        self.live = self._tables.live(base.specs)
        saved: dict[str, list[str]] = {}
        for name, live in self.live.items():
            saved.setdefault(live, []).append(name)
        self._saved = {m: [n for live in self._parameters(m) for n in saved.get(live, ())] for m in self.targets}
        self.reads = {name: tuple(names) for names in self._saved.values() for name in names}
        self._groups = {name: group for group in self._grouped() for name in group}

    def _refuse_other_shapes(self) -> None:
        """Refuse a task expert with a head of its own size: the names, shapes and config of a sum are the base's."""
        entries = self.config["parameters"] if self.config.get("peft_type") == EXPERT else {}
        for name, entry in entries.items():
            if tuple(entry["shape"]) != tuple(self._tables.shapes[name].shape):
                raise SourceError(
                    f"'{name}' of '{self.adapter.label}' has the shape {entry['shape']}, and the base's tensor "
                    f"{list(self._tables.shapes[name].shape)}, so that they do not add up to one model: {FIX}."
                )

    def _parameters(self, module: str) -> list[str]:
        """Name the parameters of a module of the base, in memory."""
        return [name for name in self._tables.shapes if name.rpartition(".")[0] == module]

    def _built(self, values: Mapping[str, Tensor]) -> Any:
        rest = "meta" if self.config.get("peft_type") in _ALONE else "cpu"
        try:
            return _compat.peft_model(self.base.config, self.config, values, rest=rest)
        except ImportError as error:
            raise SourceError(f"'{self.adapter.label}' needs a package for its type: {error}.") from None
        except Exception as error:  # PEFT raises as it likes
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> SourceError:
        why = " ".join(str(error).split()).rstrip(".")[:300]
        return SourceError(
            f"PEFT cannot apply '{self.adapter.label}' ({self.config.get('peft_type')}, trained on "
            f"'{self.config.get('base_model_name_or_path')}') to '{self.base.label}': {why}."
        )

    def _checked(self, expected: Mapping[str, Tensor]) -> dict[str, str]:
        """Compare headers with what PEFT would save; return the tensors that are none of its own."""
        specs = self.adapter.specs
        by_values = self.config.get("peft_type") in _BY_VALUES
        for key, tensor in expected.items() if not by_values else ():
            if key not in specs:
                raise SourceError(f"'{self.adapter.label}' lacks '{key}', which its config asks for: {FIX}.")
            if specs[key].shape != tuple(tensor.shape):
                raise SourceError(
                    f"'{key}' of '{self.adapter.label}' has the shape {list(specs[key].shape)}, and on "
                    f"'{self.base.label}' it would have {list(tensor.shape)}: it was trained on "
                    f"'{self.config.get('base_model_name_or_path')}'; name that as its base."
                )
        others = {plain_name(key.removeprefix(PREFIX)): key for key in specs if key not in expected}
        layers = tuple(f"{module}." for module in self.targets)
        return {name: key for name, key in others.items() if name in self._tables.shapes or not name.startswith(layers)}

    def _grouped(self) -> list[list[str]]:
        """Put modules together that are merged at a time: of one layer, as far as memory allows.

        FRoD computes its bases from the modules of one name in all layers, so that these go together.
        """
        groups: dict[str, list[list[str]]] = {}
        for module in self.targets:
            stack, layer, rest = layer_of(f"{module}.")
            key = f"{stack}{rest}" if self.config.get("peft_type") == "FROD" else f"{stack}{layer}"  # joint bases
            found = groups.setdefault(key, [[]])
            alone = self.config.get("peft_type") != "FROD" and found[-1]
            if alone and self._bytes([*found[-1], module]) > _AT_A_TIME:
                found.append([])
            found[-1].append(module)
        return [group for found in groups.values() for group in found]

    def _bytes(self, modules: list[str]) -> int:
        return sum(4 * self._tables.shapes[name].numel() for module in modules for name in self._parameters(module))

    def keys(self, name: str) -> list[str]:
        """Name the adapter's tensors that are read for a tensor of the base, but for shared ones."""
        module = self.live[name].rpartition(".")[0]
        return [key for key in self.adapter.specs if key.startswith(f"{PREFIX}{module}.")]

    def read(self, name: str) -> Tensor:
        """Return a tensor of the base with the adapter merged into it, in float32."""
        with self._lock:
            if name not in self._ready:
                self._ready = self._merged(self._groups[self.live[name].rpartition(".")[0]])
            return self._ready[name]

    def _merged(self, modules: list[str]) -> dict[str, Tensor]:
        """Merge some modules; return their tensors by the base's own names."""
        names = [name for module in modules for name in self._saved[module]]
        values = {name: self.base[name].float() for name in names}
        live = {name: tensor.clone() for name, tensor in self._tables.to_memory(values).items()}
        model = self._built(live)
        try:
            merged = _compat.peft_merge(model, self._tensors(modules), modules)
        except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise self._refused(error) from None
        if all(self.live[name] == name for name in names):
            return {name: merged[name] for name in names}
        return {name: tensor for name, tensor in self._tables.to_disk(merged).items() if name in names} | {
            name: merged[self.live[name]] for name in names if self.live[name] == name
        }

    def _tensors(self, modules: list[str]) -> dict[str, Tensor]:
        """Read the adapter's tensors that belong to some modules, or to none."""
        wanted = tuple(f"{PREFIX}{module}." for module in modules)
        others = tuple(f"{PREFIX}{module}." for module in self.targets)
        own = [k for k in self.adapter.specs if k not in self.whole.values()]
        return {key: finite(self.adapter, key) for key in own if key.startswith(wanted) or not key.startswith(others)}
