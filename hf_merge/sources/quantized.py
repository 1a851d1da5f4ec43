"""Quantised checkpoints as what they stand for: every tensor is dequantised when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from hf_merge import _compat
from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.view import Made, View
from hf_merge.types import TensorSpec

CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
"""Models with layers whose weights are [in, out]; bitsandbytes saves these as [out, in]."""

_CONFIGS = ("quantization_config", "compression_config")
_FIX = "name the unquantised model, or load it, call model.dequantize() and save the result"
_PIECE = 1 << 20  # elements that are dequantised at a time
_BNB_PARTS = (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_TELLTALE = ("_scale_inv", ".SCB", ".absmax", ".qweight", ".quant_map")
_FP8_SCALES = ("{}_scale_inv", "{}_scale", "{stem}.scale", "{stem}.qscale_weight")
_FP8_ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".qscale_act", "_activation_scale")


def dequantized(source: Source) -> Source:
    """Return a source as its unquantised model: itself, if it is not quantised.

    Args:
        source: a model; its config says how it is quantised.

    Raises:
        SourceError: it is quantised in a way that cannot be undone here.
    """
    config = quantization_of(source.config)
    if config is None:
        _refuse_unexplained(source)
        return source
    method = _method(config)
    form = _FORMATS.get(method) if isinstance(method, str) else None
    if form is None:
        raise SourceError(f"'{source.label}' is quantised by {shown(method)}, which hf_merge cannot undo: {_FIX}.")
    return Dequantized(source, config, form)


class Dequantized(View):
    """A quantised model as its unquantised one: names, shapes and dtypes of that; values in bounded memory."""

    def __init__(self, source: Source, config: Mapping[str, Any], form: _Format):
        made = dict(form(source, config, _dtype(source.config)))
        hidden = frozenset(name for name in source.specs if name not in made and _belongs(name, source.specs, made))
        super().__init__(source, made, hidden)
        left = [n for n, s in self.specs.items() if s.dtype.is_floating_point and s.dtype.itemsize == 1]
        if left:
            raise SourceError(
                f"'{source.label}' has {len(left)} float8 tensors without scales ('{left[0]}'), "
                f"and merging them would give garbage: {_FIX}."
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        return _without_quantization(self.source.config)


_Format = Callable[[Source, Mapping[str, Any], torch.dtype], Iterator[tuple[str, Made]]]


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return a config's quantisation, which may lie in a nested config, or None."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        found = next((part[key] for key in _CONFIGS if part.get(key)), None)
        if found is not None:
            return found if isinstance(found, Mapping) else {"quant_method": found}
    return None


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """Name what quantised a model, or nothing."""
    found = quantization_of(config)
    return None if found is None else str(_method(found) or "an unnamed method")


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its quantisation, nested ones too."""
    kept = {key: value for key, value in config.items() if key not in _CONFIGS}
    return {key: _without_quantization(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _method(config: Mapping[str, Any]) -> Any:
    """Return what quantised a model: configs of old bitsandbytes do not say it."""
    named = config.get("quant_method")
    if named is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        return "bitsandbytes"
    return named.lower() if isinstance(named, str) else named


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a config states, its own or that of a nested one, else bfloat16."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        word = part.get("dtype") or part.get("torch_dtype")
        dtype = getattr(torch, word.removeprefix("torch."), None) if isinstance(word, str) else None
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.bfloat16


def _refuse_unexplained(source: Source) -> None:
    """Refuse tensors that only a quantised model has where no config says what they mean."""
    for name, spec in source.specs.items():
        small = spec.dtype.is_floating_point and spec.dtype.itemsize == 1
        if small or name.endswith(_TELLTALE):
            raise SourceError(
                f"'{source.label}' is quantised ('{name}' is {str(spec.dtype).removeprefix('torch.')}), and no "
                f"quantization_config says how; merging fp8 without scales gives garbage: {_FIX}."
            )


def _belongs(name: str, specs: Mapping[str, TensorSpec], made: Mapping[str, Made]) -> bool:
    """Tell whether a tensor only serves to dequantise others."""
    if name.endswith((*_FP8_ACTIVATION_SCALES, *_BNB_PARTS)) or ".quant_state." in name:
        return True
    if name.endswith(("_blocks", "_scales")):
        return name.rpartition("_")[0] in made
    weights = [name.removesuffix("_scale_inv"), name.removesuffix("_scale")]
    weights += [
        f"{name.removesuffix(ending)}.weight" for ending in (".scale", ".qscale_weight") if name.endswith(ending)
    ]
    return any(weight != name and weight in made for weight in weights)


def _refused(source: Source, name: str, why: str) -> SourceError:
    return SourceError(f"'{name}' of '{source.label}' cannot be dequantised: {why}; {_FIX}.")


# fp8: weight = q * scale of its block, row or tensor


def _fp8(source: Source, config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Made]]:
    for name, spec in source.specs.items():
        stem = name.removesuffix(".weight") if name.endswith(".weight") else name
        scale = next((s for s in (c.format(name, stem=stem) for c in _FP8_SCALES) if s in source.specs), None)
        if scale is None or scale == name or spec.dtype.itemsize > 1:
            continue
        if not spec.dtype.is_floating_point:
            raise _refused(source, name, f"it holds {spec.dtype} where fp8 was expected (packed fp4)")
        block = _block(source, name, scale, config.get("weight_block_size"))
        yield (
            name,
            Made(TensorSpec(spec.shape, dtype), partial(_read_fp8, source, name, scale, block, dtype), (name, scale)),
        )


def _block(source: Source, name: str, scale: str, stated: Any) -> tuple[int, int]:
    """Return how many rows and columns of a weight share a scale."""
    shape, grid = source.specs[name].shape, source.specs[scale].shape
    if 0 in shape:
        return 1, 1
    if math.prod(grid) == 1:
        return (1, 1, *shape)[-2], (1, *shape)[-1]
    if len(shape) > 1 and grid == shape[:1]:
        grid = (shape[0], *(1 for _ in shape[1:]))
    if len(shape) > 1 and len(grid) == len(shape) and grid[:-2] == shape[:-2] and 0 not in grid:
        if isinstance(stated, (list, tuple)) and len(stated) == 2 and all(isinstance(b, int) and b > 0 for b in stated):
            rows, columns = stated
            if grid[-2:] == (-(-shape[-2] // rows), -(-shape[-1] // columns)):
                return rows, columns
        if shape[-2] % grid[-2] == 0 and shape[-1] % grid[-1] == 0:
            return shape[-2] // grid[-2], shape[-1] // grid[-1]
    raise _refused(
        source, name, f"its scales {list(grid)} do not fit its shape {list(shape)} (blocks of {shown(stated)})"
    )


def _read_fp8(source: Source, name: str, scale: str, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    shape = source.specs[name].shape
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    quantized = source[name].reshape(-1, *((1, 1, *shape)[-2:]))
    count, rows, columns = quantized.shape
    factors = _factors(source[scale])
    factors = factors.expand(count) if factors.numel() == 1 else factors
    factors = factors.reshape(count, -(-rows // block[0]), -(-columns // block[1]))
    made = torch.empty(quantized.shape, dtype=dtype)
    height = max(1, _PIECE // columns)
    by_column = torch.arange(columns) // block[1]
    for matrix, values, scales in zip(made, quantized, factors, strict=True):
        for start in range(0, rows, height):
            piece = slice(start, start + height)
            by_row = torch.arange(rows)[piece] // block[0]
            matrix[piece] = values[piece].float().mul_(scales[by_row][:, by_column])
    return made.view(shape)


def _factors(scales: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents (ue8m0)."""
    flat = scales.reshape(-1)
    return (flat.float() - 127).exp2() if flat.dtype == torch.uint8 else flat.float()


# mxfp4: blocks of 32 fp4 numbers, two in a byte, and an exponent for each


def _mxfp4(source: Source, config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Made]]:
    for name, spec in source.specs.items():
        if not name.endswith("_blocks") or spec.dtype != torch.uint8:
            continue
        scales, target = f"{name.removesuffix('_blocks')}_scales", name.removesuffix("_blocks")
        found = source.specs.get(scales)
        if len(spec.shape) != 4 or found is None or found.dtype != torch.uint8 or found.shape != spec.shape[:-1]:
            raise _refused(source, name, f"'{scales}' of shape {list(spec.shape[:-1])} and dtype uint8 is needed")
        experts, rows, groups, size = spec.shape
        shown_spec = TensorSpec((experts, groups * size * 2, rows), dtype)
        yield target, Made(shown_spec, partial(_read_mxfp4, source, name, scales, shown_spec), (name, scales))


def _read_mxfp4(source: Source, blocks: str, scales: str, spec: TensorSpec) -> Tensor:
    made = torch.empty(spec.shape, dtype=spec.dtype)
    unpack = _compat.mxfp4_dequantizer()
    for expert, (held, exponents) in enumerate(zip(source[blocks], source[scales], strict=True)):
        made[expert] = unpack(held[None], exponents[None], dtype=spec.dtype)[0]
    return made


# bitsandbytes: int8 with a scale for each row, or 4 bits that index a table, with a scale for each block


def _bitsandbytes(source: Source, config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Made]]:
    for name, spec in source.specs.items():
        rows = source.specs.get(f"{name.removesuffix('.weight')}.SCB") if name.endswith(".weight") else None
        state = next((f"{name}.quant_state.bitsandbytes__{t}" for t in ("nf4", "fp4")
                      if f"{name}.quant_state.bitsandbytes__{t}" in source.specs), None)  # fmt: skip
        if rows is None and state is None:
            continue
        if source.config.get("model_type") in CONV1D_MODELS:
            raise _refused(source, name, "bitsandbytes transposes the weights of such models")
        if state is not None:
            yield name, _four_bits(source, name, state, dtype)
        elif spec.dtype != torch.int8 or len(spec.shape) != 2 or rows is None or rows.numel != spec.shape[0]:
            raise _refused(source, name, "it should be int8 with one number of SCB for each row")
        else:
            yield (
                name,
                Made(
                    TensorSpec(spec.shape, dtype),
                    partial(_read_int8, source, name, dtype),
                    (name, f"{name.removesuffix('.weight')}.SCB"),
                ),
            )


def _read_int8(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    stem = name.removesuffix(".weight")
    layout = f"{stem}.weight_format"
    if layout in source.specs and source[layout].any():
        raise _refused(source, name, "its rows are shuffled for one GPU (weight_format)")
    values, scales = source[name], source[f"{stem}.SCB"].reshape(-1, 1).float() / 127
    made = torch.empty(values.shape, dtype=dtype)
    height = max(1, _PIECE // max(values.shape[1], 1))
    for start in range(0, len(values), height):
        made[start : start + height] = values[start : start + height].float().mul_(scales[start : start + height])
    return made


def _four_bits(source: Source, name: str, state: str, dtype: torch.dtype) -> Made:
    """Check one 4-bit weight; of values, only the few bytes that hold its shape are read."""
    try:
        words = json.loads(bytes(source[state].reshape(-1).view(torch.uint8).tolist()))
        shape, size = tuple(words["shape"]), words["blocksize"]
        nested = (words["nested_blocksize"], float(words["nested_offset"])) if "nested_offset" in words else None
        whole = [*shape, size, *(nested[:1] if nested else ())]
        if not all(type(number) is int and number > 0 for number in whole):
            raise ValueError(f"{whole} should be positive integers")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(source, name, f"'{state}' does not say its shape ({error})") from None
    lengths = {name: math.prod(shape) / 2, f"{name}.absmax": math.prod(shape) / size, f"{name}.quant_map": 16}
    if nested:
        lengths |= {f"{name}.nested_absmax": lengths[f"{name}.absmax"] / nested[0], f"{name}.nested_quant_map": 256}
    for part, length in lengths.items():
        bytes_held = (
            source.specs[part].nbytes if part == name else source.specs[part].numel if part in source.specs else 0
        )
        if bytes_held < math.ceil(length):
            raise _refused(source, name, f"'{part}' should have {math.ceil(length)} values and has {bytes_held}")
    return Made(
        TensorSpec(shape, dtype), partial(_read_four_bits, source, name, shape, size, nested, dtype), tuple(lengths)
    )


def _read_four_bits(
    source: Source, name: str, shape: tuple[int, ...], size: int, nested: tuple[int, float] | None, dtype: torch.dtype
) -> Tensor:
    """Look every half byte up in the table, the upper half first, and scale each block."""
    packed, table = source[name].reshape(-1).view(torch.uint8), source[f"{name}.quant_map"].float()
    largest = source[f"{name}.absmax"].reshape(-1)
    if nested:
        blocks = source[f"{name}.nested_absmax"].float()[torch.arange(len(largest)) // nested[0]]
        largest = source[f"{name}.nested_quant_map"].float()[largest.long()] * blocks + nested[1]
    made = torch.empty(math.prod(shape), dtype=dtype)
    for start in range(0, len(made), _PIECE):
        held = packed[start // 2 : (start + _PIECE) // 2]
        values = table[torch.stack([held >> 4, held & 15], dim=1).reshape(-1).long()]
        piece = made[start : start + _PIECE]
        piece[:] = values[: len(piece)] * largest[torch.arange(start, start + len(piece)) // size].float()
    return made.view(shape)


_FORMATS: dict[str, _Format] = {"fp8": _fp8, "mxfp4": _mxfp4, "bitsandbytes": _bitsandbytes}
