"""A model with PEFT adapters as a source: what the adapters make of a tensor is computed when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hf_merge import _compat
from hf_merge.architecture import may_be_tied, skeleton
from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.changes import Add, AddVector, Change, Give, Put, PutRows, Rescale, Step, changed
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.lora import FIX, Factored, Lora, read_lora, read_tokens, token_rows
from hf_merge.sources.masks import EXPERT, SHARED, needs_shared, with_shared
from hf_merge.sources.places import ALL, Place, Places
from hf_merge.sources.quantized import CONV1D_MODELS
from hf_merge.sources.tuned import Tuned, is_peft_s, refuse
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
_CONV1D_LAYERS = {"c_attn", "q_attn", "c_proj", "c_fc"}
_Steps = dict[str, tuple[Step, ...]]


@dataclass(frozen=True)
class Adapter:
    """An adapter, and how much of what it changes is added to a base.

    Attributes:
        source: its tensors.
        config: its adapter_config.json.
        weight: of its change.
    """

    source: Source
    config: Mapping[str, Any]
    weight: float = 1.0

    @property
    def trained_on(self) -> str:
        """Return what it says that its base is, or nothing."""
        return str(self.config.get("base_model_name_or_path") or "")


class WithAdapter(View):
    """A base with adapters; names, shapes, dtypes, config and tokenizer are the base's.

    The result is base + sum of weight * (what the adapter makes of the base - base), rounded once. A head that is
    tied to the embeddings and that the adapters treat otherwise is shown apart, and the config says so.

    Args:
        base: the model.
        adapters: one or more.
        in_memory: whether all of it is one object, and no model or adapter with a name of its own.

    Raises:
        SourceError: an adapter cannot be read, or does not fit the base.
    """

    def __init__(self, base: Source, *adapters: Adapter, in_memory: bool = False):
        self.adapters, self._in_memory = adapters, in_memory
        found = [(_steps_of(base, adapter), adapter.weight) for adapter in adapters]
        tied, apart, separate = _untied(base, [steps for steps, _ in found])
        names = list(dict.fromkeys(name for steps, _ in found for name in steps))
        made: dict[str, Made] = {}
        for name in [*names, *apart]:
            origin = tied.get(name, name)
            changes = [Change(steps[name], weight) for steps, weight in found if name in steps]
            made[name] = _made(base, name, origin, changes)
        super().__init__(base, made)
        self._apart = bool(separate and base.config)
        self.shared = {name: other for name, other in base.shared.items() if name not in separate}
        self.label = base.label if in_memory else "+".join([base.label, *(_told(one) for one in adapters)])
        self.public_id = self.revision = None
        self.remarks = (*base.remarks, *(text for one in adapters if (text := _other_base(base, one))))
        if self._apart:
            self.remarks += (
                f"'{self.label}' changes embeddings and head in different ways, and its base ties them: the result has "
                "both, untied, as the adapter itself computes.",
            )

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self,) if self._in_memory else (*self.source.parts, *(one.source for one in self.adapters))

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        return untied(self.source.config) if self._apart else self.source.config

    def fingerprint(self) -> str | None:
        found = [self.source.fingerprint(), *(one.source.fingerprint() for one in self.adapters)]
        return None if None in found else json.dumps([found, [one.weight for one in self.adapters]])


def open_adapter(folder: Folder, label: str, **hub: Any) -> tuple[Source, Mapping[str, Any]]:
    """Open the files of an adapter; of a task expert that is a mask, those in the folder `shared` beside it too.

    Args:
        folder: where adapter_config.json and adapter_model.safetensors (or .bin) lie.
        label: how messages call it.
        **hub: `public_id` and `revision`, for one that comes from there.

    Raises:
        SourceError: there is no adapter, or it cannot be read.
    """
    weights = next((name for name in WEIGHTS if name in folder), None)
    if weights is None or CONFIG not in folder:
        raise SourceError(f"'{label}' is no PEFT adapter: it lacks {CONFIG} or {WEIGHTS[0]}.")
    found, config = Checkpoint(folder, label, file=weights, **hub), read_object(folder.paths([CONFIG])[0])
    beside = Folder(folder.path.parent / SHARED)
    if not needs_shared(config) or CONFIG not in beside or WEIGHTS[0] not in beside:
        return found, config
    shared = Checkpoint(beside, f"{label}/../{SHARED}", file=WEIGHTS[0])
    return with_shared(found, config, shared, read_object(beside.paths([CONFIG])[0]))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says that embeddings and head are apart."""
    nested = {key: untied(part) for key, part in config.items() if isinstance(part, Mapping) and "model_type" in part}
    inner = {key: part for key, part in nested.items() if "tie_word_embeddings" in config[key]}
    return {**config, **inner, "tie_word_embeddings": False}


def _told(adapter: Adapter) -> str:
    return adapter.source.label if adapter.weight == 1 else f"{adapter.weight:g}*{adapter.source.label}"


def _made(base: Source, name: str, origin: str, changes: Sequence[Change]) -> Made:
    steps = [step for change in changes for step in change.steps]
    borrowed = tuple({(id(step.source), key): (step.source, key) for step in steps for key in step.keys}.values())
    reads = tuple(dict.fromkeys([origin, *(n for step in steps if isinstance(step, Give) for n in step.reads)]))
    elsewhere = sum(source.specs[key].nbytes for source, key in borrowed)
    stacked = any(isinstance(step, Add) and step.stacked for step in steps)
    read = partial(_read, base, origin, tuple(changes), stacked=stacked)
    return Made(base.specs[origin], read, reads, elsewhere, borrowed)


def _read(base: Source, name: str, changes: Sequence[Change], *, stacked: bool) -> Tensor:
    return changed(base[name], changes, stacked=stacked) if changes else base[name]


def _other_base(base: Source, adapter: Adapter) -> str:
    """Say that an adapter was trained on another model of the Hub; paths are left alone, as they mean nothing here."""
    told = adapter.trained_on
    known = {part.public_id.lower() for part in base.parts if part.public_id}
    if not known or told.count("/") != 1 or told.startswith((".", "/", "~")) or told.lower() in known:
        return ""
    return (
        f"'{adapter.source.label}' was trained on '{told}', and is added to '{base.label}': "
        "that is right if the one is a fine-tune of the other."
    )


def _steps_of(base: Source, adapter: Adapter) -> _Steps:
    """Return what an adapter does to each tensor of a base.

    Raises:
        SourceError: it names both, if they do not fit.
    """
    refuse(adapter.config, adapter.source.label)
    if is_peft_s(adapter.config):
        return _tuned_steps(base, adapter)
    is_lora = adapter.config.get("peft_type") == "LORA"
    lora = (read_lora if is_lora else read_tokens)(adapter.source, adapter.config)
    return _Fitting(base, lora, adapter.trained_on).steps()


def _tuned_steps(base: Source, adapter: Adapter) -> _Steps:
    if not base.config or _compat.empty_model(base.config) is None:
        raise SourceError(
            f"'{adapter.source.label}' is an adapter of type {adapter.config.get('peft_type')}, which PEFT applies, "
            f"and '{base.label}' has no config.json that names a class of transformers: {FIX}."
        )
    tuned = Tuned(base, adapter.source, adapter.config)
    is_expert = adapter.config.get("peft_type") == EXPERT
    steps: _Steps = {
        name: (Give(adapter.source, partial(tuned.read, name), reads, tuple(tuned.keys(name)), tied=is_expert),)
        for name, reads in tuned.reads.items()
    }
    rest = Lora(adapter.source, adapter.config, {}, tuned.whole, {})
    return {**steps, **_Fitting(base, rest, adapter.trained_on).steps(beside=[*tuned.reads])}


class _Fitting:
    """Fits an adapter to a base.

    Args:
        base: the model.
        lora: the adapter.
        trained_on: what it says that its base is.
    """

    def __init__(self, base: Source, lora: Lora, trained_on: str):
        self.base, self.lora, self.adapter = base, lora, lora.source
        self._trained_on = trained_on
        self._found: dict[str, list[Step]] = {}
        self._rows = token_rows(lora)

    @cached_property
    def _tied(self) -> dict[str, str]:
        return _tied(self.base)

    def steps(self, beside: Sequence[str] = ()) -> _Steps:
        """Return the steps by the base's names; a tied head that the base lacks has its own name.

        Args:
            beside: further names that the adapter has for tensors of the base.
        """
        wanted = [self._name(one) for one in self.lora.factored.values()]
        names = [*wanted, *self.lora.whole, *(f"{module}.weight" for module in self.lora.tokens)]
        self._places = Places(self.base, [*names, *beside])
        for name, key in self.lora.whole.items():
            self._put(name, key)
        for module, key in self.lora.tokens.items():
            self._put_rows(module, key)
        for one in self.lora.factored.values():
            self._add(one)
        return {name: tuple(steps) for name, steps in self._found.items()}

    @staticmethod
    def _name(one: Factored) -> str:
        return one.module if one.kind == "experts" else f"{one.module}.weight"

    def _find(self, name: str, key: str) -> list[Place]:
        """Find a tensor; the head of a model that ties it lies where the embeddings do."""
        if places := self._places.find(name):
            return places
        for alias, origin in self._tied.items():
            if (origin in self.base.specs and f".{alias}".endswith(f".{name}")) or alias == name:
                return [Place(alias, shape=self.base.specs[origin].shape)]
        fused = self._places.find(f"{name.removesuffix('weight')}in_proj_weight")  # of nn.MultiheadAttention
        if fused and name.endswith(".weight"):
            return fused
        raise SourceError(
            f"'{key}' of '{self.adapter.label}' has no place in '{self.base.label}', which lacks '{name}'"
            f"{self._hint()}."
        )

    def _hint(self) -> str:
        return f": it was trained on '{self._trained_on}'; name that, or a fine-tune of it" if self._trained_on else ""

    def _spec(self, place: Place) -> TensorSpec:
        return self.base.specs.get(place.name) or self.base.specs[self._tied[place.name]]

    def _put(self, name: str, key: str) -> None:
        for place in self._find(name, key):
            shape = self._spec(place).shape if place.inside == ALL else place.shape
            if self.adapter.specs[key].shape != shape or place.at != ALL:
                raise SourceError(
                    f"'{key}' of '{self.adapter.label}' has the shape {list(self.adapter.specs[key].shape)}, "
                    f"and the base's tensor {list(shape or ())}: name the base that it was trained on"
                    f"{f' ({self._trained_on!r})' if self._trained_on else ''}."
                )
            self._found.setdefault(place.name, []).append(Put(self.adapter, key, place))

    def _put_rows(self, module: str, key: str) -> None:
        tokens, spec = self._rows[module], self.adapter.specs[key]
        (place, *others) = self._find(f"{module}.weight", key)
        shape = self._spec(place).shape
        if others or spec.shape != (len(tokens), *shape[1:]) or (tokens and max(tokens) >= shape[0]):
            raise SourceError(
                f"'{key}' {list(spec.shape)} of '{self.adapter.label}' has the rows of {len(tokens)} tokens up to "
                f"{max(tokens, default=0)}, and '{place.name}' of '{self.base.label}' is {list(shape)}{self._hint()}."
            )
        if module in self.lora.factored:
            raise SourceError(f"'{self.adapter.label}' has factors and rows of tokens for '{module}': {FIX}.")
        self._found.setdefault(place.name, []).append(PutRows(self.adapter, key, tokens))

    def _add(self, one: Factored) -> None:
        if ".base_layer.out_proj." in one.left:  # of nn.MultiheadAttention: PEFT adds it twice, in training as well
            one = replace(one, scale=2 * one.scale)
        for place in self._find(self._name(one), one.left):
            self._add_at(one, place)
        if one.bias:
            name = f"{one.module}.bias"
            found = self._places.find(name)
            if len(found) != 1 or found[0].inside != ALL or found[0].at != ALL:
                raise SourceError(
                    f"'{one.bias}' of '{self.adapter.label}' has no place: '{self.base.label}' lacks '{name}'."
                )
            if self.adapter.specs[one.bias].shape != self._spec(found[0]).shape:
                raise self._unfit(one, found[0], one.bias)
            self._found.setdefault(found[0].name, []).append(AddVector(self.adapter, one.bias, one.scale))

    def _add_at(self, one: Factored, place: Place) -> None:
        shape: tuple[int, ...] = place.shape or ()
        experts = shape[0] if one.kind == "experts" and len(shape) == 3 else 1
        turned = self._is_turned(one, place, shape, experts)
        if turned is None:
            raise self._unfit(one, place, one.left)
        steps = self._found.setdefault(place.name, [])
        stacked = (one.kind == "experts" and len(self._spec(place).shape) == 3) or place.at != ALL
        steps.append(Add(self.adapter, one, place, turned, experts, stacked))
        if one.magnitude:
            size, columns = math.prod(self.adapter.specs[one.magnitude].shape), place.inside[2]
            height, width = (*shape[:1], *shape[-1:])
            narrow = columns != slice(None) and (columns.start or 0, columns.stop) != (0, width)
            cut = place.at != ALL or place.swapped or narrow
            if cut or (turned and place.inside != ALL) or size != (width if turned else height):
                raise self._unfit(one, place, one.magnitude)
            steps.append(Rescale(self.adapter, one.magnitude, place, turned))

    def _unfit(self, one: Factored, place: Place, key: str) -> SourceError:
        shapes = [f"'{k}' {list(self.adapter.specs[k].shape)}" for k in dict.fromkeys((key, one.left, one.right))]
        return SourceError(
            f"{' and '.join(shapes)} of '{self.adapter.label}' do not fit '{place.name}' "
            f"{list(self._spec(place).shape)} of '{self.base.label}'{self._hint()}."
        )

    def _is_turned(self, one: Factored, place: Place, shape: tuple[int, ...], experts: int) -> bool | None:
        """Tell whether a weight is stored as [in, out]; None if the factors do not fit it."""
        left, right = (self.adapter.specs[key].shape for key in (one.left, one.right))
        if experts > 1 and right[0] != experts * one.rank:
            return None
        matrix = shape[1:] if len(shape) == 3 and one.kind == "experts" else shape
        fits = (
            _fits(matrix, (left[0], one.rank), (one.rank, *right[1:]))
            if one.kind == "experts"
            else _fits(matrix, left, right)
        )
        if one.kind == "embedding":
            fits &= {True}
        if len(fits) < 2:
            return next(iter(fits), None)
        if one.kind == "experts":
            return experts > 1 and _compat.is_transposed(self.base.config, one.module.rpartition(".")[0])
        conv1d = self.base.config.get("model_type") in CONV1D_MODELS and place.name.split(".")[-2] in _CONV1D_LAYERS
        return conv1d or bool(self.lora.config.get("fan_in_fan_out"))


def _fits(shape: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> set[bool]:
    """Return how the product of factors has the shape of a weight: as it is (False), or transposed (True)."""
    if len(shape) > 2:
        return {False} if (left[0], *right[1:]) == shape else set()
    product = (left[0], math.prod(right[1:]))
    return {turned for turned in (False, True) if shape == (product[::-1] if turned else product)}


def _tied(base: Source, names: Sequence[str] | None = None) -> dict[str, str]:
    """Return the names that a base's class ties to others, which it has.

    Args:
        base: the model.
        names: those of its tensors that matter; if the class ties none of them, it need not be built.
    """
    if names is not None and not (base.config and may_be_tied(base.config, names)):
        return dict(base.shared)
    built = skeleton(base.config) if base.config else None
    found = {} if built is None else dict(built.tied)
    for alias, origin in list(found.items()):
        if origin not in base.specs:
            del found[alias]
    return {**found, **base.shared}


def _untied(base: Source, found: list[_Steps]) -> tuple[dict[str, str], list[str], list[str]]:
    """Decide for tied names whether the adapters leave them tied.

    Where they do, the steps of the one are those of the other. Returns all tied names with the tensor whose values
    they have in the base, those that the base's files lack and that are shown all the same, and all that are apart.
    """
    tied = _tied(base, [name for steps in found for name in steps])
    biases = {alias for alias, origin in tied.items() if len(base.specs[origin].shape) == 1}
    for alias in biases:  # of these PEFT puts a value into the one tensor that both names mean
        for steps in (steps for steps in found if alias in steps and tied[alias] not in steps):
            steps[tied[alias]] = steps.pop(alias)
    separate = [alias for alias, origin in tied.items()
                if not all(_stay_tied(steps, alias, origin) or (alias in biases and alias not in steps)
                           for steps in found)]  # fmt: skip
    apart = [alias for alias in tied if separate and alias not in base.specs]  # a config ties all or nothing
    for alias, origin in ((alias, origin) for alias, origin in tied.items() if alias not in separate):
        for steps in found:
            steps.pop(alias, None)
            if (alias in base.specs or alias in apart) and origin in steps:
                steps[alias] = steps[origin]
    return tied, apart, separate


def _stay_tied(steps: _Steps, alias: str, origin: str) -> bool:
    """Tell whether an adapter does the same to both of two tied tensors: rows of tokens and task experts tie them."""
    one, other = steps.get(origin, ()), steps.get(alias, ())
    if not other:
        return all(isinstance(step, PutRows) or (isinstance(step, Give) and step.tied) for step in one)
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Step, other: Step) -> bool:
    """Tell whether two steps do the same to a tensor."""
    if type(one) is not type(other) or isinstance(one, Give):
        return False
    if isinstance(one, Add) and isinstance(other, Add):
        if one.one.scale != other.one.scale or one.one.rank != other.one.rank:
            return False
        pairs = [(s.one.left, s.one.right) if s.turned else (s.one.right, s.one.left) for s in (one, other)]
        flip = one.turned != other.turned
        return all(
            torch.equal(one.source[a].T if flip else one.source[a], other.source[b])
            for a, b in zip(*pairs, strict=True)
        )
    if isinstance(one, PutRows) and isinstance(other, PutRows) and one.tokens != other.tokens:
        return False
    keys = zip(one.keys, other.keys, strict=True)
    source = one.source
    return all(source.specs[a] == source.specs[b] and torch.equal(source[a], source[b]) for a, b in keys)
