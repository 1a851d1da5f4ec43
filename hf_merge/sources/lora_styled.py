"""Merged LoRAs named as the first file of the merge: the way back from `lora_styles`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.lora_names import (
    DENOISER,
    PEFT_PREFIX,
    TEXT,
    Key,
    Spelling,
    Style,
    canonical,
    style_of,
    taken_apart,
    word_of,
)
from hf_merge.sources.lora_scales import METADATA, pattern_of


def to_style(names_of_first: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a PEFT adapter of scale one as a file does that was made one by `unify`.

    Args:
        names_of_first: the file's names.
        tensors: the adapter's, under PEFT's names, as `unify` gave them.

    Returns:
        the tensors, and where the file has any `alpha`, or is kohya's, one for each module. It is the same for all, the
        rank that most have, and the factors of modules of other ranks are scaled to it: diffusers applies the alphas of
        single modules of kohya's files to none of the attention.

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
    alpha = None
    if style_of(names) is Style.KOHYA or any(key.role == "alpha" for key in keys.values()):
        alpha = _usual(
            [tensors[name].shape[0] for name, key in found.items() if key.role == "down" and tensors[name].dim()]
        )
    result: dict[str, Tensor] = {}
    for name, key in found.items():
        spelling, tensor = spellings[key.part], tensors[name]
        new = known.get((key.place, key.role)) or spelling.spell(key.flat, key.path, key.role)
        result[new] = _told(tensor, key.role, spelling.family, alpha)
        if key.role == "down" and alpha is not None:
            new = known.get((key.place, "alpha")) or spelling.spell(key.flat, key.path, "alpha")
            result[new] = torch.tensor(float(alpha))
    return result


def _usual(ranks: Iterable[int]) -> int:
    return max(Counter(ranks).items(), key=lambda item: item[1], default=(1, 0))[0]


def _told(tensor: Tensor, role: str, family: str, alpha: int | None) -> Tensor:
    """Return a tensor as a style has it, whose scale is alpha / r with one alpha for all, or one without an alpha."""
    if role == "magnitude" and family == "kohya":
        return tensor.reshape(-1, *[1] * max(tensor.dim() - 1, 1))  # a column: [out, 1], convolutions [out, 1, 1, 1]
    if role == "up" and alpha is not None and tensor.dim() > 1 and tensor.shape[1] != alpha:
        return (tensor.float() * (tensor.shape[1] / alpha)).to(tensor.dtype)
    return tensor


def _taken(name: str) -> Key:
    key = canonical(name)
    if key is None:
        raise SourceError(f"'{name}' is no tensor of a LoRA, so that it has no name in the style of the first file.")
    return key


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
    family = {"kohya": "peft", "text": "old"}.get(first.family, first.family)
    return Spelling(word_of(part), "text" if family == "old" and part.startswith(TEXT) else family, wrapped=True)


def metadata_of(names_of_first: Iterable[str], written: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata of a file in the style of the first: what kohya's tools and diffusers look for in it.

    Args:
        names_of_first: the first file's names.
        written: what is written, under the names that `to_style` gave.
    """
    style = style_of(names_of_first)
    keys = {name: key for name in written if (key := taken_apart(name)) is not None}
    ranks = {name: written[name].shape[0] for name, key in keys.items() if key.role == "down" and written[name].dim()}
    told: dict[str, str] = {}
    if style is Style.KOHYA and ranks:
        rank = _usual(ranks.values())
        told = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    alphas = any(key.role == "alpha" for key in keys.values())  # diffusers takes these or metadata
    if style in (Style.DIFFUSERS, Style.DIFFUSERS_OLD) and len(set(ranks.values())) > 1 and not alphas:
        told = {METADATA: json.dumps(_diffusers_configs(keys, ranks), indent=2, sort_keys=True)}
    return {"format": "pt", **told}


def _diffusers_configs(keys: Mapping[str, Key], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Say that the alpha of a module is its rank, which earlier versions of diffusers take from one module for all.

    Names of text encoders are given without CLIP's `text_model.`, which some versions have and others not; PEFT looks
    for them at the end of a module's name.
    """
    configs: dict[str, Any] = {}
    for prefix in dict.fromkeys(keys[name].prefix for name in ranks):
        own = {
            key.path or key.flat: ranks[name] for name, key in keys.items() if name in ranks and key.prefix == prefix
        }
        roles = {key.role for key in keys.values() if key.prefix == prefix}
        usual, pattern = pattern_of(own, start="" if prefix.startswith(TEXT) else "^")
        scales = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}
        found = {
            "target_modules": sorted(own),
            "use_dora": "magnitude" in roles,
            "lora_bias": "bias" in roles,
            **scales,
        }
        configs.update({prefix + key: value for key, value in found.items()})
    return configs
