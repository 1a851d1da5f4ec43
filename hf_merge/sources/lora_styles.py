"""LoRA files of any style as PEFT adapters that name the same module the same, and the way back.

The names of every file are taken apart (lora_names) into a part of the pipeline and a module, whose dots may be
unknown. Files in which they are known tell them for the others; beside that, the words of diffusers' UNets and
transformers and of text encoders are known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.lora_names import (
    ENDINGS,
    PEFT_PREFIX,
    Key,
    Place,
    Style,
    foreign_kind,
    style_of,
    taken_apart,
    wrapped,
)
from hf_merge.sources.lora_scales import LoraFile, Roles, made_config
from hf_merge.sources.unet_names import dotted
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

_ALIKE = ("down_blocks_", "mid_block_", "up_blocks_", "encoder_layers_")
"""How modules begin that have the same name in all styles, once numbered blocks are translated."""

_APART = ((("double_blocks_", "single_blocks_"), ("transformer_blocks_", "single_transformer_blocks_")),)
"""How modules begin in names of one model by its authors, who fuse projections, and by diffusers, which splits them."""

_PAIRS = ({"down", "up"}, {"embedding_down", "embedding_up"})


def unify(
    sources: Sequence[Source], configs: Sequence[Mapping[str, Any] | None] = ()
) -> list[tuple[Source, dict[str, Any]]]:
    """Show LoRA files of any style as PEFT adapters, in which the same module has the same name.

    Tensors `alpha`, numbers of a few bytes each, are read here, as other styles' adapter_config.json says them; nothing
    else is. A file that says no alpha is taken to mean a scale of one, as diffusers and kohya take it.

    Args:
        sources: the files.
        configs: for each its adapter_config.json, or None.

    Returns:
        each file under PEFT's names, and what stands in its adapter_config.json.

    Raises:
        SourceError: a file is no LoRA, or more than that, or its modules cannot be told to be those of the others.
    """
    told = [*configs, *[None] * (len(sources) - len(configs))]
    files = [open_file(source, config) for source, config in zip(sources, told, strict=True)]
    paths = _paths(files)
    for number, file in enumerate(files):
        for other in files[:number]:
            _check_alike(other, file)
    return [as_peft(file, paths) for file in files]


def open_file(source: Source, config: Mapping[str, Any] | None = None) -> LoraFile:
    """Take the names of a file apart.

    Raises:
        SourceError: one is not of a LoRA, or a module lacks one of its factors.
    """
    style = style_of(source.specs)
    if style is None:
        raise SourceError(
            f"'{source.label}' holds no LoRA that hf_merge knows: its tensors should be named as those of PEFT, "
            f"diffusers or kohya; found {shown(next(iter(source.specs), None))}."
        )
    keys: dict[str, Key] = {}
    modules: dict[Place, Roles] = defaultdict(dict)
    plain: list[str] = []
    for name in source.specs:
        key = taken_apart(name)
        if key is None:
            if style is not Style.PEFT or not name.startswith(PEFT_PREFIX) or foreign_kind(name):
                raise _unknown(name, source.label)
            plain.append(name)
            continue
        keys[name] = key
        if other := modules[key.place].get(key.role):
            raise SourceError(f"'{other}' and '{name}' of '{source.label}' are of one module: save one of them only.")
        modules[key.place][key.role] = name
    for roles in modules.values():
        if not any(pair <= set(roles) for pair in _PAIRS):
            raise SourceError(
                f"'{source.label}' has {', '.join(roles.values())}, not a pair of factors: save it again."
            )
    return LoraFile(source, style, keys, modules, tuple(plain), config)


def _unknown(name: str, label: str) -> SourceError:
    kind = foreign_kind(name)
    if kind is None:
        return SourceError(f"'{name}' of '{label}' is no tensor of a LoRA that hf_merge reads: remove it first.")
    return SourceError(
        f"'{name}' of '{label}' is of a {kind}, which is no product of two low-rank factors: merge it into the model "
        "that it was trained on with the tool that made it, and merge the models."
    )


def _paths(files: Sequence[LoraFile]) -> dict[Place, str]:
    """Name every module with dots: as the first file that has them does, or by the words that are known."""
    words, within = _words(files), _wrapped_parts(files)
    paths: dict[Place, str] = {}
    for file in files:
        for key in file.keys.values():
            if key.path is not None:
                path = wrapped(key.path) if key.part in within else key.path
                paths.setdefault(key.place, words[key.part] + path)
    told = {part for part, _ in paths}
    for file in files:
        for place in file.modules:
            if place not in paths:
                path = _path(place, file, place[0] in told)
                paths[place] = words[place[0]] + (wrapped(path) if place[0] in within else path)
    if files and files[0].style is Style.PEFT:
        _check_one_model(files)
    return paths


def _path(place: Place, file: LoraFile, others: bool) -> str:
    path = dotted(place[1])
    if path is None and others:
        name = next(iter(file.modules[place].values()))
        raise SourceError(
            f"Which module of the other files '{name}' of '{file.source.label}' is cannot be told: it has underscores "
            "for dots, and no other file names it. Merge files of one style, or convert it to diffusers' names."
        )
    return place[1] if path is None else path


def _wrapped_parts(files: Sequence[LoraFile]) -> set[str]:
    return {key.part for file in files for key in file.keys.values() if key.wrapped}


def _words(files: Sequence[LoraFile]) -> dict[str, str]:
    """Say what stands for each part: what the first file with dots has, or else diffusers' word."""
    keys = [key for file in files for key in file.keys.values()]
    words: dict[str, str] = {}
    for key in sorted(keys, key=lambda key: key.path is None):
        words.setdefault(key.part, key.word)
    return words


def _check_one_model(files: Sequence[LoraFile]) -> None:
    """A PEFT adapter is one model's, so that others' parts have no place in a result in its style."""
    parts = {part for part, _ in files[0].modules}
    for file in files[1:]:
        if more := {part for part, _ in file.modules} - parts:
            raise SourceError(
                f"'{file.source.label}' has a {min(more)}, for which there is no place in '{files[0].source.label}', "
                "a PEFT adapter of one model: name it first."
            )


def _check_alike(first: LoraFile, second: LoraFile) -> None:
    """Refuse files whose names for a part have too little in common to be of one model, as far as that can be told."""
    for part in dict.fromkeys(part for part, _ in first.modules):
        mine, others = (_of_part(file, part) for file in (first, second))
        if others and _differ(mine, others, first.style is second.style):
            raise _told_apart(part, (first, min(mine)), (second, min(others)))


def _differ(mine: set[Place], others: set[Place], same_style: bool) -> bool:
    if any(_begin(one, a) and _begin(two, b) for one, two in ((mine, others), (others, mine)) for a, b in _APART):
        return True
    if same_style or (_begin(mine, _ALIKE) and _begin(others, _ALIKE)):
        return False
    return 2 * len(mine & others) < min(len(mine), len(others))


def _begin(places: set[Place], words: tuple[str, ...]) -> bool:
    return any(flat.startswith(words) for _, flat in places)


def _told_apart(part: str, first: tuple[LoraFile, Place], second: tuple[LoraFile, Place]) -> SourceError:
    (one, other), (this, that) = (
        (f"'{file.source.label}' ({file.style})", next(iter(file.modules[place].values())))
        for file, place in (first, second)
    )
    return SourceError(
        f"{one} and {this} name the modules of their {part} differently ('{other}', '{that}'), so that the same module "
        "cannot be found in both: convert one to the other's names, as diffusers does with load_lora_weights and "
        "save_lora_weights."
    )


def _of_part(file: LoraFile, part: str) -> set[Place]:
    return {place for place in file.modules if place[0] == part}


def as_peft(file: LoraFile, paths: Mapping[Place, str]) -> tuple[Source, dict[str, Any]]:
    """Show one file under PEFT's names.

    Args:
        file: the file.
        paths: what each module is to be called, with dots.

    Raises:
        SourceError: its alphas, or tensors that are made anew, are not what they should be.
    """
    same = all(name == _peft_name(paths[key.place], key.role) for name, key in file.keys.items())
    if file.config is not None and same:
        return file.source, dict(file.config)
    made = {}
    for place, roles in file.modules.items():
        for role, tensor in _made(file, roles).items():
            made[_peft_name(paths[place], role)] = tensor
    hidden = frozenset(file.source.specs) - set(file.plain)
    return View(file.source, made, hidden), made_config(file, paths)


def _peft_name(path: str, role: str) -> str:
    return f"{PEFT_PREFIX}{path}{ENDINGS['peft'].get(role, f'.{role}')}"


def _made(file: LoraFile, roles: Roles) -> dict[str, Made]:
    """Make PEFT's tensors of one module, by their roles."""
    source = file.source
    made = {role: _same(source, name) for role, name in roles.items() if role not in ("alpha", "mid", "magnitude")}
    if "mid" in roles:
        made["down"] = _composed(source, roles)
    if "magnitude" in roles:
        made["magnitude"] = _magnitude(source, roles)
    return made


def _same(source: Source, name: str) -> Made:
    return Made(source.specs[name], partial(source.__getitem__, name), reads=(name,), mapped=True)


def _composed(source: Source, roles: Roles) -> Made:
    """Take the two inner convolutions of three for one, which they are, as the first has a kernel of one pixel."""
    down, mid = roles["down"], roles["mid"]
    before, after = source.specs[down], source.specs[mid]
    one, core = before.shape, after.shape
    if len(one) != len(core) or len(core) < 3 or math.prod(one[2:]) != 1 or core[:2] != (one[0], one[0]):
        raise SourceError(
            f"'{mid}' {list(core)} and '{down}' {list(one)} of '{source.label}' do not fit: save it again."
        )
    read: Callable[[], Tensor] = partial(_product, source, down, mid)
    return Made(TensorSpec((one[0], one[1], *core[2:]), before.dtype), read, reads=(down, mid))


def _product(source: Source, down: str, mid: str) -> Tensor:
    inner = source[down].flatten(1).float()
    return torch.einsum("pq...,qi->pi...", source[mid].float(), inner).to(source.specs[down].dtype)


def _magnitude(source: Source, roles: Roles) -> Made:
    """Give DoRA's norms PEFT's shape: one number for each output."""
    name = roles["magnitude"]
    spec, up, down = (source.specs[key] for key in (name, roles.get("up", name), roles.get("down", name)))
    outputs = up.shape[0] if up.shape else 1
    if spec.numel != outputs or (len(spec.shape) > 1 and outputs not in spec.shape[:2]):
        raise SourceError(
            f"'{name}' {list(spec.shape)} of '{source.label}' should have one number for each of {outputs} outputs; "
            "norms over inputs are not read: merge it into its model with the tool that made it, and merge the models."
        )
    shape = (1, outputs, *[1] * (len(down.shape) - 2)) if len(down.shape) > 2 else (outputs,)
    return Made(replace(spec, shape=shape), lambda: source[name].reshape(shape), reads=(name,), mapped=True)
