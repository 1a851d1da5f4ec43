"""What task experts make of the parameters of one module, while the model runs or merged into it: layers for PEFT.

A module without children is wrapped, so that whoever asks it for its weight gets the expert's. Any other module, and
the model itself, keeps its place and gets a child, whose hooks lend it the expert's parameters for as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from hf_merge import packing
from hf_merge.errors import SourceError
from hf_merge.experts.stored import HOLDER, KEY_PREFIX, SHARED, columns_of, key_of, stored_parts


class Stored(nn.Module):
    """One stored tensor of one parameter by the adapter's name: on the meta device until it is loaded."""

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        for adapter, waiting in self._buffers.items():
            found = state_dict.get(f"{prefix}{adapter}")
            if found is None:
                missing_keys.append(f"{prefix}{adapter}")
            elif waiting is not None and found.shape != waiting.shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{adapter}: its config asks for {list(waiting.shape)}, and the file has "
                    f"{list(found.shape)}"
                )
            elif waiting is not None:
                self._buffers[adapter] = found.to(waiting.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        """Go with the model to its device, but not to its dtype: the result is rounded to that, once."""
        for adapter, tensor in self._buffers.items():
            if tensor is not None and not tensor.is_meta:
                moved = fn(tensor)
                self._buffers[adapter] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self


class ExpertLayer(nn.Module, BaseTunerLayer):
    """What experts make of the own parameters of one module.

    Args:
        path: of the module in the model, for messages.

    Attributes:
        entries: what each adapter's config says of the module's parameters, by the adapter and by the parameter's name
            in the module.
        ties: parameters that are also another module's: that one's layer, and its name there. An expert that changes
            the one changes the other.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.entries: dict[str, dict[str, Mapping[str, Any]]] = {}
        self.ties: dict[str, tuple[ExpertLayer, str]] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter = []
        self._seen: set[tuple[str, str]] = set()
        self._kept: dict[str, nn.Parameter] = {}

    @property
    def host(self) -> nn.Module:
        """The module that has the parameters."""
        raise NotImplementedError

    @property
    def store(self) -> nn.Module:
        """The module named `stored.HOLDER` that has what is stored."""
        raise NotImplementedError

    def get_base_layer(self) -> nn.Module:
        return self.host

    def add(self, adapter: str, leaf: str, entry: Mapping[str, Any]) -> None:
        """Make room for what an adapter stores for a parameter."""
        self.entries.setdefault(adapter, {})[leaf] = entry
        for part, tensor in stored_parts(entry).items():
            name = f"{KEY_PREFIX}{part}_{leaf}"
            if name not in self.store._modules:
                self.store.add_module(name, Stored())
            empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            self.store.get_submodule(name).register_buffer(adapter, empty)

    def delete_adapter(self, adapter_name: str) -> None:
        for leaf, entry in self.entries.pop(adapter_name, {}).items():
            for part in stored_parts(entry):
                delattr(self.store.get_submodule(f"{KEY_PREFIX}{part}_{leaf}"), adapter_name)
        self._seen = {(adapter, leaf) for adapter, leaf in self._seen if adapter != adapter_name}
        super().delete_adapter(adapter_name)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.entries)

    def _get_available_adapters(self) -> set[str]:
        return {*self.entries}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Leave tensors where they are: they follow the weights when they are first used, in their own dtype."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if {*self.merged_adapters} - {*names}:
            self.unmerge()
        super().set_adapter(names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def leaves(self, adapter: str) -> list[str]:
        """Name the module's own parameters that an adapter changes."""
        own = self.entries.get(adapter, {})
        return [*own, *(n for n, (layer, there) in self.ties.items() if n not in own and layer.changes(there, adapter))]

    def changes(self, leaf: str, adapter: str) -> bool:
        """Tell whether an adapter changes a parameter."""
        return leaf in self.entries.get(adapter, {})

    def changed(self) -> dict[str, Tensor]:
        """Return the parameters that the active adapter changes, as it has them."""
        own = [leaf for entries in self.entries.values() for leaf in entries]
        found = {leaf: self.current(leaf) for leaf in dict.fromkeys([*own, *self.ties])}
        return {leaf: made for leaf, made in found.items() if made is not None}

    def current(self, leaf: str) -> Tensor | None:
        """Return a parameter as the active adapter has it; None if it is as it stands in the module."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or not active:
            return None
        adapter = one_expert(active)
        return self.made(leaf, adapter) if leaf in self.leaves(adapter) else None

    def base(self, leaf: str) -> nn.Parameter:
        """Return a parameter as it is without experts."""
        return self._kept[leaf] if leaf in self._kept else getattr(self.host, leaf)

    def made(self, leaf: str, adapter: str) -> Tensor:
        """Return a parameter as an adapter has it.

        Raises:
            SourceError: values are missing, or do not belong there.
        """
        if not self.changes(leaf, adapter):
            layer, there = self.ties[leaf]
            return layer.made(there, adapter)
        kind, weight = self.entries[adapter][leaf]["kind"], self.base(leaf)
        stored = self.stored(leaf, adapter)
        shared = self._shared(leaf, adapter) if kind == "mask" and "shared" not in stored else None
        if weight.is_meta:
            raise SourceError(
                f"'{self._name(leaf)}' of the base is not in memory: load the base without offloading, then the expert."
            )
        with torch.no_grad():
            return packing.apply(kind, weight.detach(), stored, shared)

    def stored(self, leaf: str, adapter: str) -> dict[str, Tensor]:
        """Return what an adapter stores for a parameter, beside the parameter.

        Raises:
            SourceError: its file did not have it, or it points out of the parameter.
        """
        device, found = self.base(leaf).device, dict[str, Tensor]()
        for part in stored_parts(self.entries[adapter][leaf]):
            box = self.store.get_submodule(f"{KEY_PREFIX}{part}_{leaf}")
            tensor = box.get_buffer(adapter)
            if tensor.is_meta:
                raise SourceError(
                    f"Expert '{adapter}' has no values for '{self._name(leaf)}': its file lacks "
                    f"'{key_of(self._name(leaf), part)}', or was never loaded. Load it again from a whole copy."
                )
            if tensor.device != device and device.type != "meta":
                tensor = tensor.to(device)
                box.register_buffer(adapter, tensor)
            found[part] = tensor
        self._check_indices(leaf, adapter, found)
        return found

    def _check_indices(self, leaf: str, adapter: str, found: Mapping[str, Tensor]) -> None:
        if (adapter, leaf) in self._seen:
            return
        indices = found.get("indices")
        if indices is not None and indices.numel():
            low, high, columns = int(indices.min()), int(indices.max()), columns_of(self.entries[adapter][leaf])
            if low < 0 or high >= columns:
                raise SourceError(
                    f"Expert '{adapter}' replaces entries {low} to {high} in rows of '{self._name(leaf)}', which have "
                    f"{columns}: its file is damaged; load it again from a whole copy."
                )
        self._seen.add((adapter, leaf))

    def _shared(self, leaf: str, adapter: str) -> Tensor:
        """Return what masks of a parameter choose from: the adapter `shared`, or the only one that can be it."""
        having = [name for name, own in self.entries.items() if own.get(leaf, {}).get("kind") == "shared"]
        if SHARED not in having and len(having) != 1:
            found = f"several adapters have one ({', '.join(having)})" if having else "no loaded adapter has it"
            raise SourceError(
                f"Expert '{adapter}' is a mask of the vector that all experts of its backbone share, and {found}. It "
                f"is the folder '{SHARED}' beside the expert's: load_adapter('.../experts/{SHARED}', "
                f"adapter_name='{SHARED}'), then set_adapter('{adapter}')."
            )
        return self.stored(leaf, SHARED if SHARED in having else having[0])["shared"]

    def _name(self, leaf: str) -> str:
        return f"{self.path}.{leaf}" if self.path else leaf

    def check_merge(self, adapter: str) -> None:
        """Refuse to merge an adapter whose values are not there.

        Raises:
            SourceError: it says what is missing.
        """
        for leaf, entry in self.entries.get(adapter, {}).items():
            if "shared" not in self.stored(leaf, adapter) and entry["kind"] == "mask":
                self._shared(leaf, adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the parameters of an adapter into the module; the module's own are kept for `unmerge`.

        Args:
            safe_merge: refuse values that are not finite.
            adapter_names: one; the active one by default.

        Raises:
            SourceError: values are missing, or several adapters are named.
            ValueError: values are not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        leaves = self.leaves(one_expert(names)) if names else []
        if not leaves:
            return
        self.unmerge()
        merged = {leaf: self._to_put(leaf, names[0], safe_merge) for leaf in leaves}
        for leaf, parameter in merged.items():
            self._kept[leaf] = getattr(self.host, leaf)
            put(self.host, leaf, parameter)
        self.merged_adapters.append(names[0])

    def _to_put(self, leaf: str, adapter: str, safe: bool) -> nn.Parameter:
        """Return what becomes of a parameter; one that is tied to another stays the same object."""
        if not self.changes(leaf, adapter):
            layer, there = self.ties[leaf]
            if adapter not in layer.merged_adapters:
                layer.merge(safe, [adapter])
            return getattr(layer.host, there)
        made = self.made(leaf, adapter)
        if safe and not torch.isfinite(made).all():
            raise ValueError(f"NaNs detected in the merged weights: '{self._name(leaf)}' of the adapter {adapter}")
        return nn.Parameter(made, requires_grad=False)

    def unmerge(self) -> None:
        """Give the module its own parameters back, which nothing has changed."""
        for leaf, parameter in self._kept.items():
            put(self.host, leaf, parameter)
        self._kept.clear()
        self.merged_adapters.clear()


class WrappedModule(ExpertLayer):
    """A module without children in which experts change parameters, such as a linear layer, a norm or an embedding.

    Args:
        base_layer: the module.
        path: in the model.
    """

    def __init__(self, base_layer: nn.Module, path: str):
        super().__init__(path)
        self.base_layer = base_layer
        self.add_module(HOLDER, nn.Module())

    @property
    def host(self) -> nn.Module:
        return self.base_layer

    @property
    def store(self) -> nn.Module:
        return self.get_submodule(HOLDER)

    @property
    def weight(self) -> Tensor:
        """The weight, as the active expert has it: some models read it without calling the module."""
        return self._read("weight")

    @property
    def bias(self) -> Tensor:
        return self._read("bias")

    def _read(self, name: str) -> Any:
        made = self.current(name)
        return getattr(self.base_layer, name) if made is None else made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # what others keep in a module is about that module
                raise
        return self._read(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.changed()
        if not made:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, made, args, kwargs)


class LentParameters(ExpertLayer):
    """The child of a module with children, or of the whole model, in which experts change the own parameters.

    Args:
        module: whose child it becomes.
        path: of that in the model.
    """

    def __init__(self, module: nn.Module, path: str):
        super().__init__(path)
        self._host = (module,)  # no child of its child
        self._lent: dict[str, nn.Parameter] = {}
        self._hooks = (
            module.register_forward_pre_hook(self._lend),
            module.register_forward_hook(self._take_back, always_call=True),
        )
        module.add_module(HOLDER, self)

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    @property
    def store(self) -> nn.Module:
        return self

    def base(self, leaf: str) -> nn.Parameter:
        return self._lent[leaf] if leaf in self._lent else super().base(leaf)

    def _lend(self, module: nn.Module, args: Any) -> None:
        for leaf, made in self.changed().items() if not self._lent else ():
            self._lent[leaf] = getattr(module, leaf)
            setattr(module, leaf, nn.Parameter(made, requires_grad=False))

    def _take_back(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf, parameter in self._lent.items():
            setattr(module, leaf, parameter)
        self._lent.clear()

    def leave(self) -> None:
        """Take it out of its module."""
        for hook in self._hooks:
            hook.remove()
        delattr(self.host, HOLDER)


def one_expert(adapters: list[str]) -> str:
    """Return the only adapter of a list.

    Raises:
        SourceError: there are several.
    """
    if len(adapters) != 1:
        raise SourceError(
            f"Task experts do not add up: {', '.join(adapters)} are active at a time. Name one, as in "
            f"set_adapter('{adapters[-1]}'); a vector that masks share need only be loaded."
        )
    return adapters[0]


def put(module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """Give a module another parameter, and say its sizes again where its class has them as attributes."""
    setattr(module, leaf, parameter)
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = parameter.shape
    if leaf == "weight" and isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = parameter.shape
