"""LoRA files of any style as PEFT adapters that name the same module the same, and the way back.

The names of every file are taken apart (lora_names) into a part of the pipeline and a module, whose dots may be
unknown. Files in which they are known tell them for the others; beside that, the words of diffusers' UNets and
transformers and of text encoders are known.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.lora_names import (
    DENOISER,
    ENDINGS,
    PEFT_PREFIX,
    Key,
    Place,
    Spelling,
    Style,
    canonical,
    foreign_kind,
    style_of,
    taken_apart,
    word_of,
    wrapped,
)
from hf_merge.sources.unet_names import dotted
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the configs of a file's parts in its metadata."""

_ALIKE = ("down_blocks_", "mid_block_", "up_blocks_", "encoder_layers_")
"""How modules begin that have the same name in all styles, once numbered blocks are translated."""

_PAIRS = ({"down", "up"}, {"embedding_down", "embedding_up"})
_Roles = dict[str, str]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its names taken apart.

    Attributes:
        source: its tensors.
        style: how it names them.
        keys: its names, taken apart.
        modules: name of each tensor of a module by its role, by module.
        plain: names of other tensors, which only a PEFT adapter may have.
        config: its adapter_config.json, or None.
    """

    source: Source
    style: Style
    keys: Mapping[str, Key]
    modules: Mapping[Place, _Roles]
    plain: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None

    def key(self, place: Place) -> Key:
        """Return one of the names of a module, taken apart: one that says its family."""
        return max((self.keys[name] for name in self.modules[place].values()), key=lambda key: bool(key.family))


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
    modules: dict[Place, _Roles] = defaultdict(dict)
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
    """Refuse files of different styles whose names for a part have too little in common to be of one model."""
    if first.style is second.style:
        return
    for part in dict.fromkeys(part for part, _ in first.modules):
        mine, others = (_of_part(file, part) for file in (first, second))
        known = all(any(place[1].startswith(_ALIKE) for place in found) for found in (mine, others))
        if not others or known or 2 * len(mine & others) >= min(len(mine), len(others)):
            continue
        one, two = (next(iter(file.modules[min(found)].values())) for file, found in ((first, mine), (second, others)))
        raise SourceError(
            f"'{first.source.label}' ({first.style}) and '{second.source.label}' ({second.style}) name the modules of "
            f"their {part} differently ('{one}', '{two}'), so that the same module cannot be found in both: convert "
            "one to the other's names, as diffusers does with load_lora_weights and save_lora_weights."
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
    return View(file.source, made, hidden), _config(file, paths)


def _peft_name(path: str, role: str) -> str:
    return f"{PEFT_PREFIX}{path}{ENDINGS['peft'].get(role, f'.{role}')}"


def _made(file: LoraFile, roles: _Roles) -> dict[str, Made]:
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


def _composed(source: Source, roles: _Roles) -> Made:
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


def _magnitude(source: Source, roles: _Roles) -> Made:
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


def _config(file: LoraFile, paths: Mapping[Place, str]) -> dict[str, Any]:
    """Make the adapter_config.json that says what the file says of its scales."""
    ranks = {paths[place]: _rank(file, roles) for place, roles in file.modules.items()}
    alphas = {path: _alpha(file, place, path, ranks[path]) for place, path in ((p, paths[p]) for p in file.modules)}
    rank, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(alphas)
    roles = {key.role for key in file.keys.values()}
    made = {"peft_type": "LORA", "lora_bias": "bias" in roles, "use_dora": "magnitude" in roles}
    scales = {"r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern}
    return {**made, **(file.config or {}), **scales, "use_rslora": False}


def _rank(file: LoraFile, roles: _Roles) -> int:
    name = roles.get("down") or roles["embedding_down"]
    shape = file.source.specs[name].shape
    if not shape or not shape[0]:
        raise SourceError(f"'{name}' of '{file.source.label}' has the shape {list(shape)}, no factor's: save it again.")
    return shape[0]


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Return the commonest value, and one regular expression for all modules of each other."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[float, list[str]] = defaultdict(list)
    for path, value in values.items():
        if value != usual:
            others[value].append(re.escape(path))
    return usual, {f"^(?:{'|'.join(paths)})": value for value, paths in others.items()}


def _alpha(file: LoraFile, place: Place, path: str, rank: int) -> float:
    """Return the number that, divided by the rank, is a module's scale."""
    name = file.modules[place].get("alpha")
    if name is not None:
        return _number(file.source, name)
    key = file.key(place)
    told = file.config if file.config is not None else _metadata(file.source, key.prefix)
    alpha = told.get("lora_alpha", 8 if file.config else rank)
    patterns = told.get("alpha_pattern") or {}
    module = path if key.path is None else wrapped(key.path) if key.wrapped else key.path
    try:
        found = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)]
        alpha = float(found[0] if found else alpha) * (math.sqrt(rank) if told.get("use_rslora") else 1)
    except (AttributeError, TypeError, ValueError, re.error):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise SourceError(
            f"'{file.source.label}' should have a number for lora_alpha of '{module}'; found {shown(told)}."
        )
    return int(alpha) if alpha == int(alpha) else alpha


def _number(source: Source, name: str) -> float:
    if source.specs[name].numel != 1:
        raise SourceError(f"'{name}' of '{source.label}' should be one number; found {list(source.specs[name].shape)}.")
    value = float(source[name].flatten()[0])
    if not math.isfinite(value):
        raise SourceError(f"'{name}' of '{source.label}' is {value}, no alpha: train or save it again.")
    return int(value) if value == int(value) else value


def _metadata(source: Source, prefix: str) -> Mapping[str, Any]:
    """Return what diffusers wrote into the file of the config of one part."""
    try:
        told = json.loads(source.metadata.get(METADATA, "{}"))
    except (ValueError, TypeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise SourceError(f"'{source.label}' should have an object of JSON as its {METADATA}: save it again.")
    return {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}


def to_style(names_of_first: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a PEFT adapter of scale one as a file does that was made one by `unify`.

    Args:
        names_of_first: the file's names.
        tensors: the adapter's, under PEFT's names, as `unify` gave them.

    Returns:
        the tensors, and an `alpha` of a rank for each module where the file has any, or is kohya's.

    Raises:
        SourceError: a tensor has no name in this style, or is none of a LoRA.
    """
    names = list(names_of_first)
    if style_of(names) is Style.PEFT and any(name.startswith(PEFT_PREFIX) for name in names):
        return dict(tensors)
    keys = {name: key for name in names if (key := taken_apart(name)) is not None}
    known = {(key.place, key.role): name for name, key in keys.items()}
    found = {name: _taken(name) for name in tensors}
    spellings = _spellings(keys.values(), {key.part for key in found.values()})
    alphas = style_of(names) is Style.KOHYA or any(key.role == "alpha" for key in keys.values())
    result: dict[str, Tensor] = {}
    for name, key in found.items():
        spelling, tensor = spellings[key.part], tensors[name]
        new = known.get((key.place, key.role)) or spelling.spell(key.flat, key.path, key.role)
        result[new] = _kohya_norms(tensor) if key.role == "magnitude" and spelling.family == "kohya" else tensor
        if key.role == "down" and alphas:
            new = known.get((key.place, "alpha")) or spelling.spell(key.flat, key.path, "alpha")
            result[new] = torch.tensor(float(tensor.shape[0]))
    return result


def _taken(name: str) -> Key:
    key = canonical(name)
    if key is None:
        raise SourceError(f"'{name}' is no tensor of a LoRA, so that it has no name in the style of the first file.")
    return key


def _kohya_norms(tensor: Tensor) -> Tensor:
    """Return norms as a column: [out, 1], for convolutions [out, 1, 1, 1]."""
    return tensor.reshape(-1, *[1] * max(tensor.dim() - 1, 1))


def _spellings(keys: Iterable[Key], parts: set[str]) -> dict[str, Spelling]:
    """Say how the modules of each part are named: as in the first file; a part that it lacks, in its manner."""
    found: dict[str, Spelling] = {}
    for key in keys:
        if key.family:
            told = found.setdefault(key.part, Spelling(key.prefix, key.family))
            family = key.family if key.family == "processor" else told.family
            flags = (told.stability or key.stability, told.wrapped or key.wrapped)
            found[key.part] = Spelling(told.prefix, family, *flags)
    first = next(iter(found.values()), Spelling("unet.", "peft"))
    many = found.get(DENOISER, first).stability or "text_encoder_2" in parts
    return {part: found.get(part) or _other_part(part, first, many) for part in parts}


def _other_part(part: str, first: Spelling, many: bool) -> Spelling:
    if first.prefix.startswith("lora_"):
        text = {"text_encoder": "lora_te1_" if many else "lora_te_", DENOISER: "lora_unet_"}
        number = part.removeprefix("text_encoder_")
        return Spelling(text.get(part, f"lora_te{number}_"), first.family, wrapped=True)
    family = "peft" if first.family in ("peft", "kohya") else "text" if part.startswith("text") else "old"
    return Spelling(word_of(part), family, wrapped=True)


def metadata_of(names_of_first: Iterable[str], written: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file in the style of the first: what kohya's tools and diffusers look for in it.

    Args:
        names_of_first: the first file's names.
        written: what is written, under the names that `to_style` gave.
    """
    style = style_of(names_of_first)
    keys = {name: key for name in written if (key := taken_apart(name)) is not None and key.role == "down"}
    if not keys:
        return {"format": "pt"}
    if style is Style.KOHYA:
        rank = Counter(written[name].shape[0] for name in keys).most_common(1)[0][0]
        told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
        return {"format": "pt", **told}
    if style not in (Style.DIFFUSERS, Style.DIFFUSERS_OLD) or any(name.endswith(".alpha") for name in written):
        return {"format": "pt"}
    ranks: dict[str, dict[str, float]] = defaultdict(dict)
    for name, key in keys.items():
        path = key.path or key.flat
        ranks[key.prefix][wrapped(path) if key.wrapped else path] = written[name].shape[0]
    roles = {(key.prefix, key.role) for name in written if (key := taken_apart(name)) is not None}
    configs = {f"{prefix}{key}": value for prefix, found in ranks.items()
               for key, value in _diffusers_config(found, {r for p, r in roles if p == prefix}).items()}  # fmt: skip
    return {"format": "pt", METADATA: json.dumps(configs, indent=2, sort_keys=True)}


def _diffusers_config(ranks: Mapping[str, float], roles: set[str]) -> dict[str, Any]:
    rank, pattern = _pattern(ranks)
    scales = {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern}
    return {**scales, "target_modules": sorted(ranks), "use_dora": "magnitude" in roles, "lora_bias": "bias" in roles}
