"""Task experts as they are stored, and back: masks of one bit an entry, a few replaced entries, whole tensors.

A weight of a task is made of a weight of the backbone and what its expert stores. Nothing is computed in less than
float32, and the result is rounded once, to the dtype of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Pack booleans of any shape, eight to a byte: entry i is bit i % 8 of byte i // 8.

    That is `numpy.packbits(mask, axis=None, bitorder="little")`; the last byte is filled up with zeros.

    Returns:
        uint8 [ceil(numel / 8)].
    """
    flat = mask.reshape(-1).to(torch.uint8)
    rows = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (rows << _places(rows)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, numel: int) -> Tensor:
    """Return the first `numel` booleans of a packed mask, as a vector."""
    return (packed[:, None] >> _places(packed)).bitwise_and_(1).view(-1)[:numel].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def apply(kind: str, weight: Tensor, stored: Mapping[str, Tensor], shared: Tensor | None = None) -> Tensor:
    """Return the weight of a task.

    Args:
        kind: `mask`, `sparse`, `whole` or `shared`.
        weight: of the backbone; it is left as it is.
        stored: what the expert stores: `mask` and `scale`, `indices` and `values`, `whole`, or `shared`.
        shared: the vector that masks choose from, in the shape of the weight; for a `mask` that does not store it.

    Returns:
        A tensor in the dtype of the weight, and in its shape but for `whole`.

    Raises:
        ValueError: the kind is none of these, or a mask comes without the shared vector.
    """
    if kind == "mask":
        shared = stored.get("shared", shared)
        if shared is None:
            raise ValueError("a mask needs the shared vector that it chooses from; found None")
        return masked(weight, stored["mask"], stored["scale"], shared)
    if kind == "sparse":
        return replaced(weight, stored["indices"], stored["values"])
    if kind == "whole":
        return stored["whole"].to(weight.dtype, copy=True)
    if kind == "shared":
        return _added(weight, stored["shared"])
    raise ValueError(f"an expert's parameter is mask, sparse, whole or shared; found {kind!r}")


def masked(weight: Tensor, packed: Tensor, scale: Tensor, shared: Tensor) -> Tensor:
    """Return weight + scale * mask * shared: the task experts of EMR-Merging and TALL-masks.

    Args:
        weight: of the backbone, of any shape.
        packed: the mask, as `pack_mask` gives it.
        scale: one number.
        shared: in the shape of the weight.

    Sources: https://arxiv.org/abs/2405.17461, https://arxiv.org/abs/2405.07813
    """
    mask = unpack_mask(packed, weight.numel()).view(weight.shape)
    return torch.where(mask, _added(weight, shared, scale), weight)


def _added(weight: Tensor, shared: Tensor, scale: Tensor | None = None) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = shared.to(wide) if scale is None else shared.to(wide) * scale.to(wide).reshape(())
    return (weight.to(wide) + change).to(weight.dtype)


def replaced(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Return a copy of a weight, seen as [rows, columns], with k entries of each row replaced.

    Args:
        weight: its number of entries is a multiple of the rows.
        indices: [rows, k], columns of any integer dtype, each once in a row.
        values: [rows, k].
    """
    made = weight.clone(memory_format=torch.contiguous_format)
    if indices.numel():
        made.view(len(indices), -1).scatter_(1, indices.long(), values.to(weight.dtype))
    return made
