"""A merged adapter as one LoRA file, named as the first file of the merge is: for diffusers, kohya's tools, ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save

from hf_merge.adapters.writer import CONFIG_FILE, WEIGHTS_FILE
from hf_merge.sources.lora_names import Style, style_of
from hf_merge.sources.lora_styled import metadata_of, to_style

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file of a LoRA in a folder."""


def file_name(names: Sequence[str], output: Path) -> str:
    """Return how the file is called: as the output, or as diffusers looks for it in a folder."""
    if output.suffix == ".safetensors":
        return output.name
    return f"{output.name}.safetensors" if style_of(names) is Style.KOHYA else LORA_FILE


def spell(folder: Path, names: Sequence[str], file: str) -> Path:
    """Put one file in the place of a PEFT adapter's two.

    Args:
        folder: with the adapter, scalings 1.
        names: of the tensors in the file whose style is meant.
        file: how to call it.

    Returns:
        The file.

    Raises:
        SourceError: a tensor has no name in this style.
    """
    stored = folder / WEIGHTS_FILE
    with safe_open(stored, "pt") as opened:
        metadata = opened.metadata() or {}
    written = to_style(names, load_file(stored))
    written = {name: tensor.contiguous() for name, tensor in written.items()}
    data = save(written, {**metadata, **metadata_of(names, written)})
    (folder / file).write_bytes(_with_sorted_header(data))
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (folder / name).unlink()
    return folder / file


def _with_sorted_header(data: bytes) -> bytes:
    """Bring a file's metadata into an order: safetensors writes them in another one each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
