"""Synthetic checkpoints: a base and fine-tunes of it, seeded, written tensor by tensor in bounded memory."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

SIZES = {"100M": (768, 12), "300M": (1024, 24), "1.1B": (2048, 22), "3B": (3072, 28), "7B": (4096, 38)}
"""Hidden width and number of layers."""

_SHARDS = 3
_CHUNK = 1 << 22  # elements
_SPREAD, _DELTA = 0.02, 0.001  # standard deviations of the base's weights and of what fine-tuning changed

Shapes = Mapping[str, tuple[int, ...]]


def llama_shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a Llama with a quarter of its heads for keys and values, as its checkpoint does."""
    mlp, heads, vocabulary = hidden * 11 // 4, hidden // 8, min(32000, 16 * hidden)
    attention = {"q": (hidden, hidden), "k": (heads, hidden), "v": (heads, hidden), "o": (hidden, hidden)}
    feed = {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": shape for name, shape in feed.items()}
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama_config(hidden: int, layers: int) -> dict[str, int]:
    """Return what config.json says of these shapes."""
    shapes = llama_shapes(hidden, layers)
    head = math.gcd(64, hidden // 8)
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "head_dim": head,
        "num_attention_heads": hidden // head, "num_key_value_heads": hidden // 8 // head,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "vocab_size": shapes["lm_head.weight"][0],
    }  # fmt: skip


def tiny_shapes(count: int) -> dict[str, tuple[int, ...]]:
    """Name `count` tensors of 256 elements, as a mixture of many small experts has them."""
    return {f"model.layers.{i // 100}.mlp.experts.{i % 100}.weight": (16, 16) for i in range(count)}


def moe_shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Name the experts of a Qwen3-MoE as its checkpoint does, with tensors of 256 elements."""
    places = [f"model.layers.{i}.mlp.experts.{j}" for i in range(layers) for j in range(experts)]
    return {f"{place}.{part}_proj.weight": (16, 16) for place in places for part in ("gate", "up", "down")}


def checkpoints(folder: Path, shapes: Shapes, models: int, sizes: Mapping[str, int] | None = None) -> list[Path]:
    """Return the folders of a base and of `models` fine-tunes in `folder`; those that an earlier call made are kept.

    `sizes` goes into config.json.
    """
    paths = [folder / ("base" if i == 0 else f"model-{i}") for i in range(models + 1)]
    for i, path in enumerate(paths):
        if not (path / "config.json").is_file():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            _write(path, shapes, fine_tune=i)
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **(sizes or {})}
        (path / "config.json").write_text(json.dumps(config))
    return paths


def _write(path: Path, shapes: Shapes, fine_tune: int) -> None:
    """Write shards and their index."""
    names = list(shapes)
    size = math.ceil(len(names) / _SHARDS)
    files = [names[i : i + size] for i in range(0, len(names), size)]
    weight_map = {}
    for number, held in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(held, file)
        with (path / file).open("wb") as out:
            _write_shard(out, {name: shapes[name] for name in held}, fine_tune)
    index = {"metadata": {"total_size": 2 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(out: BinaryIO, shapes: Shapes, fine_tune: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        for chunk in _values(name, math.prod(shape), fine_tune):
            out.write(chunk)


def _values(name: str, numel: int, fine_tune: int) -> Iterator[memoryview]:
    """Draw a tensor of the base, and add what a fine-tune (1, 2, ...) changed."""
    import torch  # not needed by --help

    drawn, changed = torch.Generator(), torch.Generator()
    drawn.manual_seed(zlib.crc32(name.encode()))
    changed.manual_seed(zlib.crc32(f"{name} {fine_tune}".encode()))
    for start in range(0, numel, _CHUNK):
        size = min(_CHUNK, numel - start)
        values = torch.randn(size, generator=drawn).mul_(_SPREAD)
        if fine_tune:
            values.add_(torch.randn(size, generator=changed), alpha=_DELTA)
        yield values.bfloat16().view(torch.uint8).numpy().data
