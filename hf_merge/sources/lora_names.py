"""Names of tensors in LoRA files, taken apart and put together: kohya's, diffusers' of three ages, PEFT's, others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from hf_merge.errors import SourceError
from hf_merge.sources.unet_names import dotted, to_diffusers, to_stability


class Style(StrEnum):
    """How a file names its tensors."""

    KOHYA = "kohya"  # lora_unet_down_blocks_0_...lora_down.weight
    DIFFUSERS = "diffusers"  # unet.down_blocks.0...lora_A.weight
    DIFFUSERS_OLD = "old diffusers"  # unet.down_blocks.0...lora.down.weight, ...processor.to_q_lora.down.weight
    PEFT = "PEFT"  # base_model.model.down_blocks.0...lora_A.weight
    ORIGINAL = "original"  # diffusion_model.double_blocks.0...lora_A.weight


PEFT_PREFIX = "base_model.model."
DENOISER, TEXT = "denoiser", "text_encoder"
_FLAT_PREFIXES = {
    "lora_unet_": DENOISER, "lora_transformer_": DENOISER, "lycoris_": DENOISER,
    "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3",
}  # fmt: skip
_DOTTED_PREFIXES = {
    "unet.": DENOISER, "transformer.": DENOISER, "diffusion_model.": DENOISER, "model.diffusion_model.": DENOISER,
    "transformer_2.": "denoiser_2", "text_encoder.": TEXT, "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}  # fmt: skip
ENDINGS: dict[str, dict[str, str]] = {
    "kohya": {
        "down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight", "magnitude": ".dora_scale",
    },
    "peft": {
        "down": ".lora_A.weight", "up": ".lora_B.weight", "bias": ".lora_B.bias", "magnitude": ".lora_magnitude_vector",
        "embedding_down": ".lora_embedding_A", "embedding_up": ".lora_embedding_B",
    },
    "adapter": {
        "down": ".lora_A.default.weight", "up": ".lora_B.default.weight", "bias": ".lora_B.default.bias",
        "magnitude": ".lora_magnitude_vector.default.weight",
    },
    "old": {
        "down": ".lora.down.weight", "up": ".lora.up.weight", "alpha": ".lora.alpha",
        "magnitude": ".lora_magnitude_vector.weight",
    },
    "text": {
        "down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight",
        "alpha": ".lora_linear_layer.alpha",
    },
    "processor": {"down": "_lora.down.weight", "up": "_lora.up.weight", "alpha": "_lora.alpha"},
}  # fmt: skip
"""By the family of a name: how the names of a module's tensors end, by what they are. `.alpha` ends one in all."""

_FAMILY_OF = {ending: (family, role) for family, endings in ENDINGS.items() for role, ending in endings.items()}
_ENDING = re.compile(
    f"(.+?)({'|'.join(re.escape(e) for e in sorted([*_FAMILY_OF, '.alpha'], key=len, reverse=True))})", re.DOTALL
)
_FOREIGN = {
    "LoHa": re.compile(r"(.+)\.hada_\w+", re.DOTALL),
    "LoKr": re.compile(r"(.+)\.lokr_\w+", re.DOTALL),
    "OFT": re.compile(r"(.+)\.(oft_|boft_)\w+(\.weight)?", re.DOTALL),
    "full difference": re.compile(r"(.+)\.(diff|diff_b|set_weight|w_norm|b_norm)", re.DOTALL),
}
_PROCESSED = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_WRAPPER = "text_model"
_IN_WRAPPER = re.compile(r"(?:encoder(?=[._]layers)|embeddings|final_layer_norm)([._]|$)")
Place = tuple[str, str]
"""Part of a pipeline, and module in it with underscores for dots."""


@dataclass(frozen=True)
class Key:
    """A name, taken apart.

    Attributes:
        part: of a pipeline: the denoiser (UNet or transformer), or a text encoder.
        flat: the module, with underscores for dots, as diffusers calls it.
        path: the module with its dots, where the name has them.
        role: what of the module: down (A), up (B), mid, alpha, magnitude, bias, ...
        family: which endings it has; none for an alpha that ends the same in all.
        prefix: what stands before the module.
        stability: whether the module is named as in Stability's UNet.
        wrapped: whether CLIP's `text_model.` stands before the module, which transformers 5 left out; `flat` and `path`
            are without it.
    """

    part: str
    flat: str
    path: str | None
    role: str
    family: str
    prefix: str
    stability: bool = False
    wrapped: bool = False

    @property
    def place(self) -> Place:
        return self.part, self.flat

    @property
    def style(self) -> Style:
        if self.prefix in _FLAT_PREFIXES:
            return Style.KOHYA
        if self.prefix == PEFT_PREFIX:
            return Style.PEFT
        if self.prefix.endswith("diffusion_model."):
            return Style.ORIGINAL
        if self.family in ("old", "text", "processor"):
            return Style.DIFFUSERS_OLD
        if not self.prefix:
            return Style.ORIGINAL if self.family == "kohya" else Style.PEFT
        return Style.DIFFUSERS

    @property
    def word(self) -> str:
        """What stands for the part in names with dots."""
        if self.prefix in _FLAT_PREFIXES:
            return "transformer." if self.prefix == "lora_transformer_" else word_of(self.part)
        return self.prefix.removeprefix(PEFT_PREFIX)


def word_of(part: str) -> str:
    """Return what diffusers calls a part of a pipeline, with a dot."""
    return {DENOISER: "unet.", "denoiser_2": "transformer_2."}.get(part, f"{part}.")


def taken_apart(name: str) -> Key | None:
    """Take a name apart; None if it is none of a low-rank adapter."""
    found = _ENDING.fullmatch(name)
    if found is None:
        return None
    stem, (family, role) = found[1], _FAMILY_OF.get(found[2], ("", "alpha"))
    key = _flat_key(stem, role, family) if "." not in stem else _dotted_key(stem, role, family)
    return key if key is None or not key.part.startswith(TEXT) else _unwrapped(key)


def _unwrapped(key: Key) -> Key:
    flat, path = key.flat.removeprefix(f"{_WRAPPER}_"), key.path
    return replace(key, flat=flat, path=path and path.removeprefix(f"{_WRAPPER}."), wrapped=flat != key.flat)


def wrapped(module: str) -> str:
    """Put CLIP's `text_model.` before those modules, with dots or underscores, that it stands before."""
    found = _IN_WRAPPER.match(module)
    return f"{_WRAPPER}{found[1] or '.'}{module}" if found else module


def _flat_key(stem: str, role: str, family: str) -> Key | None:
    prefix = next((prefix for prefix in _FLAT_PREFIXES if stem.startswith(prefix)), None)
    if prefix is None:
        return Key(*_bare(stem), stem, role, family, "") if family else None
    written = stem.removeprefix(prefix)
    part = _FLAT_PREFIXES[prefix]
    flat = to_diffusers(written) if part == DENOISER else written
    return Key(part, flat, None, role, family, prefix, flat != written) if written else None


def _dotted_key(stem: str, role: str, family: str) -> Key:
    if stem.startswith(PEFT_PREFIX):
        path = stem.removeprefix(PEFT_PREFIX)
        return Key(*_bare(path), path, role, family, PEFT_PREFIX)
    prefix = next((prefix for prefix in _DOTTED_PREFIXES if stem.startswith(prefix)), "")
    path = stem.removeprefix(prefix)
    path = _unprocessed(path) if family == "processor" else path.replace(".processor.", ".")
    part, written = _bare(path)
    part = _DOTTED_PREFIXES.get(prefix, part)
    flat = to_diffusers(written) if part == DENOISER else written
    return Key(part, flat, path if flat == written else None, role, family, prefix, flat != written)


def _bare(path: str) -> Place:
    """Say where a module without a prefix is: only text encoders of CLIP's kind are told from a denoiser."""
    return TEXT if path.startswith("text_model.") else DENOISER, path.replace(".", "_")


def _unprocessed(path: str) -> str:
    """Return the projection that an attention processor of the first LoRAs of diffusers stood for."""
    above, _, last = path.removesuffix(".processor").rpartition(".")
    if above.endswith(".self_attn"):
        return f"{above}.{_PROCESSED.get(last, last)}"
    return f"{above.removesuffix('.processor')}.{'to_out.0' if last == 'to_out' else last}"


def foreign_kind(name: str) -> str | None:
    """Say of what other kind of adapter a tensor is, if that can be told from its name."""
    return next((kind for kind, pattern in _FOREIGN.items() if pattern.fullmatch(name)), None)


def style_of(names: Iterable[str]) -> Style | None:
    """Tell how a file names its tensors, by the first that is of a low-rank adapter; None if there is none."""
    found = (_styled(name) for name in names)
    return next((style for style in found if style), None)


def _styled(name: str) -> Style | None:
    key = taken_apart(name)
    if key is None and foreign_kind(name):
        key = taken_apart(f"{name.rpartition('.')[0]}.lora_down.weight")
    return key.style if key and key.family else None


def canonical(name: str) -> Key | None:
    """Take apart a PEFT name made of one of any style, in which the word for the part follows `base_model.model.`."""
    return taken_apart(name.removeprefix(PEFT_PREFIX))


@dataclass(frozen=True)
class Spelling:
    """How a file names the modules of one part.

    Attributes:
        prefix: what stands before a module.
        family: which endings its tensors have.
        stability: whether its modules are named as in Stability's UNet.
        wrapped: whether CLIP's `text_model.` stands before them.
    """

    prefix: str
    family: str
    stability: bool = False
    wrapped: bool = False

    def spell(self, flat: str, path: str | None, role: str) -> str:
        """Name a tensor.

        Args:
            flat: the module with underscores for dots.
            path: the module with dots, if they are known.
            role: what of the module.

        Raises:
            SourceError: there is no such name.
        """
        family, stem = self.family, self._stem(flat, path)
        if family == "processor":
            family, stem = _processor(stem) if role in ("down", "up") else ("peft", stem)
        ending = ".alpha" if role == "alpha" else ENDINGS[family].get(role) or ENDINGS["peft"].get(role)
        if ending is None or (self.prefix in _FLAT_PREFIXES and role not in ("alpha", *ENDINGS["kohya"])):
            raise SourceError(
                f"{role} of '{flat}' has no name in the style of the first file: name another file first."
            )
        return stem + ending

    def _stem(self, flat: str, path: str | None) -> str:
        written = to_stability(flat) if self.stability else flat
        if self.prefix in _FLAT_PREFIXES:
            return self.prefix + (wrapped(written) if self.wrapped else written)
        if path is None or written != flat:
            path = dotted(written)
        if path is None:
            raise SourceError(
                f"Where the dots are in '{flat}' is not known: name first a file whose names are of the same style."
            )
        return self.prefix + (wrapped(path) if self.wrapped else path)


def _processor(stem: str) -> tuple[str, str]:
    """Return family and stem for a module in a file with attention processors."""
    above, _, last = stem.removesuffix(".0").rpartition(".")
    word = next((old for old, new in _PROCESSED.items() if last in (old, new)), None)
    if word and above.endswith(".self_attn"):
        return "processor", f"{above}.{word}"
    if word and ".attn" in above:
        return "processor", f"{above}.processor.{word}"
    return ("text" if stem.startswith(TEXT) or ".encoder.layers." in stem else "old"), stem
