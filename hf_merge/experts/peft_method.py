"""Task experts as a PEFT method: `peft_type: "HF_MERGE"`, which PEFT and transformers load once hf_merge is imported.

    import hf_merge
    model = PeftModel.from_pretrained(base, "merged/experts/shared", adapter_name="shared")
    model.load_adapter("merged/experts/cars", adapter_name="cars")
    model.set_adapter("cars")

Experts are not trained: what they store are buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn
from transformers import PreTrainedModel

from hf_merge import _compat
from hf_merge.errors import SourceError, did_you_mean
from hf_merge.experts.layers import ExpertLayer, LentParameters, WrappedModule, one_expert
from hf_merge.experts.stored import HOLDER, KEY_PREFIX, PEFT_TYPE, check_parameters

_WITHOUT_FORWARD = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict)


@dataclass
class ExpertConfig(PeftConfig):
    """adapter_config.json of a task expert.

    Attributes:
        parameters: an entry of `stored` for each parameter of the base that the expert changes.
        id2label: what the task's classes are called, if it has its own; a model that the expert is merged into says so.

    Raises:
        SourceError: the parameters say something that cannot be meant.
    """

    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    id2label: dict[str, str] | None = None

    target_modules = None  # PEFT asks every config for it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _compat.peft_type(PEFT_TYPE)
        check_parameters(self.parameters)


class ExpertModel(BaseTuner):
    """A model with task experts, one of which is active."""

    prefix = KEY_PREFIX
    tuner_layer_cls = ExpertLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT declares it so)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Make room for an expert in a model.

        Args:
            model: the backbone, which may have other experts already.
            adapter_name: what the expert is called.
            autocast_adapter_dtype: has no effect: experts keep the checkpoint's dtype.
            low_cpu_mem_usage: has no effect: no memory is taken before values are loaded.
            state_dict: has no effect: the config says it all.

        Raises:
            SourceError: the expert belongs to another model. Nothing was changed.
        """
        config: Any = self.peft_config[adapter_name]
        named = _own_parameters(model)
        _check_fits(config, adapter_name, model, named)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in config.parameters):
            parent, _, own = path.rpartition(".")
            self._create_and_replace(
                config, adapter_name, model.get_submodule(path), own, model.get_submodule(parent), current_key=path
            )
            if path not in self.targeted_module_names:
                self.targeted_module_names.append(path)
        _tie(model, config.parameters, named)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._mark_only_adapters_as_trainable(model)

    def _create_and_replace(
        self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        """Make room for what an expert stores for the own parameters of one module."""
        layer = _layer(self.model, current_key)
        for name, entry in peft_config.parameters.items():  # type: ignore[attr-defined]
            path, _, leaf = name.rpartition(".")
            if path == current_key:
                layer.add(adapter_name, leaf, entry)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leave what is stored in its dtype: nothing of it is trained."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse mixed batches."""
        if kwargs.get("adapter_names") is not None:
            raise SourceError(
                "Task experts hold whole weights, so that a batch runs with one of them: group it by task, "
                "set_adapter(task), and run each group; adapter_names is not possible."
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.set_adapter(self.active_adapter)  # the same one in all layers, whichever experts these have

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put an expert's parameters into the model, so that it runs as fast as the backbone; see `unmerge_adapter`.

        Args:
            adapter_names: one; the active one by default.
            safe_merge: refuse values that are not finite.

        Raises:
            SourceError: values are missing, or several adapters are named. Nothing was changed.
        """
        name = one_expert(adapter_names or self.active_adapters)
        layers = [layer for _, layer in _layers(self.model)]
        for layer in layers:
            layer.check_merge(name)
        if any({*layer.merged_adapters} - {name} for layer in layers):
            self.unmerge_adapter()
        for layer in layers:
            if name not in layer.merged_adapters:
                layer.merge(safe_merge, [name])

    def _unload_and_optionally_merge(  # type: ignore[override]  (PEFT's own returns the model too)
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Take the experts out of the model, and put one into its weights before if so wished."""
        if merge:
            name = one_expert(adapter_names or self.active_adapters)
            self.merge_adapter([name], safe_merge)
            _say_labels(self.model, self.peft_config[name])
        else:
            self.unmerge_adapter()
        for parent, own, layer in _places(self.model):
            if isinstance(layer, WrappedModule):
                setattr(parent, own, layer.base_layer)
            elif isinstance(layer, LentParameters):
                layer.leave()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        _say_ties(self.model)
        return self.model


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the base by its own names, tied ones under each of their names."""
    found = model.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): parameter for name, parameter in found}


def _check_fits(config: Any, adapter: str, model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    """Refuse an expert of another model."""
    what = f"Expert '{adapter}' of '{config.base_model_name_or_path}'"
    missing = [name for name in config.parameters if name not in named]
    if missing:
        near = did_you_mean(missing[0], named)
        raise SourceError(
            f"{what} changes {len(missing)} parameters that {type(model).__name__} has not, such as "
            f"'{missing[0]}'.{near} Load it onto its own base, as the class that it was made of."
        )
    for name, entry in config.parameters.items():
        parameter, module = named[name], model.get_submodule(name.rpartition(".")[0])
        shape = tuple(parameter.shape)
        if entry["kind"] != "whole" and tuple(entry["shape"]) != shape:
            raise SourceError(
                f"{what} has a {entry['kind']} of the shape {entry['shape']} for '{name}', which is {list(shape)} in "
                f"{type(model).__name__}: load it onto its own base."
            )
        if not parameter.is_floating_point():
            raise SourceError(f"{what} changes '{name}', which is {parameter.dtype}: load the base unquantised.")
        if isinstance(module, _WITHOUT_FORWARD):
            raise SourceError(f"{what} changes '{name}', which lies in a {type(module).__name__}: no expert can.")
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ExpertLayer):
            raise SourceError(f"{what} changes '{name}', and so does another adapter: merge_and_unload() that first.")


def _layer(model: nn.Module, path: str) -> ExpertLayer:
    """Return what experts have in a module; it is put there if this is the first."""
    module = model.get_submodule(path)
    held = module if isinstance(module, ExpertLayer) else module._modules.get(HOLDER)
    if isinstance(held, ExpertLayer):
        return held
    if not path or any(True for _ in module.children()):
        return LentParameters(module, path)
    layer = WrappedModule(module, path).train(module.training)
    for parent, own, child in _places(model, module):
        if child is module:
            setattr(parent, own, layer)
    return layer


def _tie(model: nn.Module, parameters: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> None:
    """Let the other names of tied parameters follow those that an expert changes."""
    owners = {id(named[name]): name for name in reversed([*parameters])}
    for alias, parameter in named.items():
        name = owners.get(id(parameter))
        if name is None or alias in parameters:
            continue
        (path, _, leaf), (own_path, _, own) = alias.rpartition("."), name.rpartition(".")
        _layer(model, path).ties[leaf] = (_layer(model, own_path), own)


def _layers(model: nn.Module) -> list[tuple[str, ExpertLayer]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, ExpertLayer)]


def _places(model: nn.Module, wanted: nn.Module | None = None) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return where a module lies, or all layers of experts: (parent, name there, module), once for each place."""
    return [
        (parent, own, child)
        for parent in list(model.modules())
        for own, child in list(parent._modules.items())
        if child is not None and (child is wanted if wanted is not None else isinstance(child, ExpertLayer))
    ]


def _say_ties(model: Any) -> None:
    """Say in the config that embeddings and head are apart, where an expert has one for each."""
    words = getattr(model, "config", None)
    if getattr(words, "tie_word_embeddings", False) and isinstance(model, PreTrainedModel):
        ends = [getattr(part, "weight", None) for part in (model.get_input_embeddings(), model.get_output_embeddings())]
        if None not in ends and ends[0] is not ends[1]:
            model.config.tie_word_embeddings = False


def _say_labels(model: nn.Module, config: Any) -> None:
    """Write the names of a task's classes into the config of the model that has become that task's."""
    words: Any = getattr(model, "config", None)
    if config.id2label and words is not None:
        words.id2label = {int(number): label for number, label in config.id2label.items()}
        words.label2id = {label: number for number, label in words.id2label.items()}


if not _compat.peft_knows(PEFT_TYPE):
    _compat.peft_type(PEFT_TYPE)
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=ExpertConfig, model_cls=ExpertModel)
