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


def vit_shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a ViT for image classification, as transformers does; 768 and 12 are ViT-B."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**_vit_sizes(hidden, layers)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def vit_config(hidden: int, layers: int) -> dict[str, object]:
    """Return what config.json says of these shapes."""
    return {**_vit_sizes(hidden, layers), "model_type": "vit", "architectures": ["ViTForImageClassification"]}


def _vit_sizes(hidden: int, layers: int) -> dict[str, int]:
    """Return sizes with heads of 64 and a feed-forward four times as wide, as ViT-B has them."""
    heads = max(hidden // 64, 1)
    return {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * hidden}  # fmt: skip


def tiny_llama(tensors: int) -> tuple[int, int]:
    """Return width and layers of a Llama with as many tensors, or a few less; they have 16 to 4,096 elements."""
    outer, first = len(llama_shapes(16, 0)), len(llama_shapes(16, 1))
    return 16, (tensors - outer) // (first - outer)


def moe_shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Name the tensors of a Qwen3-MoE as its checkpoint does, each expert by itself, with matrices of 16 columns."""
    shapes = {"model.embed_tokens.weight": (256, 16)}
    for layer in (f"model.layers.{i}" for i in range(layers)):
        for j in range(experts):
            shapes |= {f"{layer}.mlp.experts.{j}.{part}_proj.weight": (16, 16) for part in ("gate", "up", "down")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (4 if name in "kv" else 16, 16) for name in "qkvo"}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (4,) for name in "qk"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
        shapes[f"{layer}.mlp.gate.weight"] = (experts, 16)
    return {**shapes, "model.norm.weight": (16,), "lm_head.weight": (256, 16)}


def moe_config(layers: int, experts: int) -> dict[str, object]:
    """Return what config.json says of these shapes."""
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 16, "vocab_size": 256,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 4,
        "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": experts, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def checkpoints(folder: Path, shapes: Shapes, models: int, sizes: Mapping[str, object] | None = None) -> list[Path]:
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
