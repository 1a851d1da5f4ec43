"""A folder with a backbone and task experts: what each task has, by the parameters of the backbone in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_merge.adapters.modules import Layout
from hf_merge.adapters.parts import PREFIX, Part
from hf_merge.errors import SourceError, did_you_mean
from hf_merge.experts.files import ADAPTER_FILE, CONFIG_FILE, FOLDER, INDEX_FILE, OWN_FILE
from hf_merge.experts.stored import PEFT_TYPE, check_parameters, key_of
from hf_merge.forms import MASK, WHOLE, Fields, Form, LowRank, Sparse
from hf_merge.planning import SHARED

_LORA_ENDS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class Kept:
    """What a task has of one parameter.

    Attributes:
        form: in which it is kept.
        fields: of the form.
    """

    form: Form
    fields: Fields

    def rebuild(self, backbone: Tensor, shared: Tensor | None = None) -> Tensor:
        """Return the task's weight; see `Form.rebuild`."""
        return self.form.rebuild(self.fields, backbone, shared)


@dataclass(frozen=True)
class Index:
    """experts.json.

    Attributes:
        method: that made the experts.
        tasks: what is said of each, by its name, in order.
        folder: where it lies.
        apart: tensors that were not merged, such as heads: each task has its own.
    """

    method: str
    tasks: Mapping[str, Mapping[str, Any]]
    folder: Path
    apart: tuple[str, ...] = ()

    def check(self, task: str) -> str:
        """Return the name of a task.

        Raises:
            SourceError: there is none of this name.
        """
        if task not in self.tasks:
            known = ", ".join(self.tasks)
            raise SourceError(f"There is no task '{task}'.{did_you_mean(str(task), self.tasks)} Tasks: {known}.")
        return task


def read_index(folder: Path) -> Index:
    """Read experts.json of a folder.

    Raises:
        SourceError: there is none, or it is none.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise SourceError(
            f"'{folder}' has no {INDEX_FILE}, so it is no backbone with task experts: merge one with a method such as "
            "emr, twin or free."
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        tasks = {task["name"]: task for task in told["tasks"]}
        return Index(told["method"], tasks, folder, tuple(told.get("apart", ())))
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"'{path}' cannot be read ({error!r}): merge the model again, or fetch it again.") from None


def read_shared(folder: Path) -> dict[str, Tensor]:
    """Return what all masks are over, by parameter; nothing where no expert is a mask."""
    place = folder / FOLDER / SHARED
    if not (place / CONFIG_FILE).is_file():
        return {}
    entries = _config(place)["parameters"]
    with _opened(place / ADAPTER_FILE) as file:
        return {name: file.get_tensor(key_of(name, SHARED)) for name in entries}


def read_expert(index: Index, task: str, layout: Layout) -> dict[str, Kept]:
    """Return what a task has, by the backbone's parameter.

    Args:
        index: of the folder.
        task: its name.
        layout: of the backbone's class.

    Raises:
        SourceError: a file is missing, or the expert belongs to another backbone.
    """
    place = index.folder / FOLDER / index.check(task)
    found: dict[str, Kept] = {}
    if (place / CONFIG_FILE).is_file():
        config = _config(place)
        if config.get("peft_type") == PEFT_TYPE:
            found |= _entries(place, config)
        else:
            found |= _lora(place, config, layout)
    found |= _own(place, layout)
    strange = [name for name in found if name not in layout.tables.shapes and not _is_head(name, index)]
    if strange:
        raise SourceError(
            f"The expert '{task}' changes {len(strange)} parameters that the backbone does not have, such as "
            f"'{strange[0]}': it belongs to another backbone."
        )
    return found


def _is_head(name: str, index: Index) -> bool:
    """Tell whether a parameter may be a head's that a backbone without one lacks."""
    return any(task.get("architectures") for task in index.tasks.values())


def _config(place: Path) -> dict[str, Any]:
    try:
        return json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"'{place / CONFIG_FILE}' cannot be read: {error}.") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors, and say of a damaged one which it is."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise SourceError(f"'{path}' cannot be read ({error}): merge the model again, or fetch it again.") from None


def _entries(place: Path, config: Mapping[str, Any]) -> dict[str, Kept]:
    """Read an adapter of hf_merge's own method."""
    check_parameters(config["parameters"])
    found: dict[str, Kept] = {}
    with _opened(place / ADAPTER_FILE) as file:
        for name, entry in config["parameters"].items():
            read = {part: file.get_tensor(key_of(name, part)) for part in _PARTS[entry["kind"]]}
            form = Sparse(entry["k"], entry["rows"]) if entry["kind"] == "sparse" else _FORMS[entry["kind"]]
            found[name] = Kept(form, read)
    return found


_FORMS: Mapping[str, Form] = {"mask": MASK, "whole": WHOLE}
_PARTS = {"mask": ("mask", "scale"), "sparse": ("indices", "values"), "whole": ("whole",)}


def _lora(place: Path, config: Mapping[str, Any], layout: Layout) -> dict[str, Kept]:
    """Read a LoRA adapter as factors of weights."""
    scales = {"alpha": config.get("lora_alpha"), "rank": config.get("r")}
    if scales["alpha"] != scales["rank"] or config.get("alpha_pattern") != config.get("rank_pattern"):
        raise SourceError(f"'{place}' scales its factors, which hf_merge's experts do not: it is no expert of theirs.")
    found: dict[str, Kept] = {}
    with _opened(place / ADAPTER_FILE) as file:
        keys = [*file.keys()]
        for name, first, second in _pairs(keys):
            part = layout.parts.get(name)
            if part is None:
                found[name] = Kept(WHOLE, {})  # told by the caller
                continue
            left, right = _oriented(part, file.get_tensor(first), file.get_tensor(second))
            found[name] = Kept(LowRank(right.shape[-2]), {"left": left, "right": right})
    return found


def _pairs(keys: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (parameter, key of A, key of B)."""
    for key in keys:
        for first, second in _LORA_ENDS:
            if key.endswith(first):
                module = key.removesuffix(first)
                yield f"{module.removeprefix(PREFIX)}.weight", key, module + second


def _oriented(part: Part, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (left, right) of a weight as it is stored."""
    a, b = a.flatten(1), b.flatten(1)
    turned = part.turned or part.kind == "embedding"
    return (a.T, b.T) if turned else (b, a)


def _own(place: Path, layout: Layout) -> dict[str, Kept]:
    """Read what lies beside an adapter: tensors as they are, or factors of what PEFT has no layer for."""
    path = place / OWN_FILE
    if not path.is_file():
        return {}
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    stems = {key.removesuffix(".left") for key in tensors if key.endswith(".left")}
    stems = {stem for stem in stems if f"{stem}.right" in tensors}
    factors = {f"{stem}.{side}" for stem in stems for side in ("left", "right")}
    live = layout.live([*stems, *(key for key in tensors if key not in factors)])
    found = {live.get(key, (key,))[0]: Kept(WHOLE, {"whole": t}) for key, t in tensors.items() if key not in factors}
    for stem in stems:
        left, right = tensors[f"{stem}.left"], tensors[f"{stem}.right"]
        found[live.get(stem, (stem,))[0]] = Kept(LowRank(right.shape[-2]), {"left": left, "right": right})
    return found


def mixed(kept: Mapping[str, tuple[Kept, float]], backbone: Tensor, shared: Tensor | None) -> Tensor:
    """Return backbone + sum_t w_t (weight of t - backbone), in the backbone's dtype; see Twin-Merging.

    Args:
        kept: by task, what it has of the parameter, and its share.
        backbone: the backbone's weight.
        shared: what masks are over.
    """
    wide = torch.promote_types(backbone.dtype, torch.float32)
    total = backbone.to(wide)
    for one, share in kept.values():
        total = torch.add(total, one.rebuild(backbone, shared).to(wide) - backbone.to(wide), alpha=share)
    return total.to(backbone.dtype)
