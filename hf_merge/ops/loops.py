"""Compiled loops in place of verbs in torch, where numba is installed and they are switched on; the bits are the same.

Whoever has much to merge switches them on (`switched_on`); a verb asks `take` whether they are meant for its tensors.
Before they are used for the first time they are compared with torch on this machine, and stay off if a bit differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

_users = 0  # calls that go on and want them: all threads of a merge, and merges beside it
_guard = Lock()


@contextmanager
def switched_on(wanted: bool = True) -> Iterator[bool]:
    """Use the loops inside, if they are wanted and can be had; yield whether they are."""
    global _users
    on = wanted and is_available()
    with _guard:
        _users += on
    try:
        yield on
    finally:
        with _guard:
            _users -= on


def is_available() -> bool:
    """Tell whether numba is installed, and gives the bits that torch gives on this machine."""
    with _guard:
        return find_spec("numba") is not None and _agree()


@cache
def _agree() -> bool:
    """Compare every loop with its verb in torch, bit by bit, on values of all sizes and both signs."""
    from hf_merge.ops.agreement import results  # which asks this module

    global _users
    try:
        expected = results()
        _users += 1
        try:
            found = results()
        finally:
            _users -= 1
    except Exception as error:  # whatever the compiler has against it, no merge fails for that
        warnings.warn(f"Compiled loops are not used: {error}", stacklevel=2)
        return False
    if found != expected:
        warnings.warn("Compiled loops are not used: on this machine they differ from torch in a bit.", stacklevel=2)
    return found == expected


def take(*tensors: Tensor) -> bool:
    """Tell whether the loops are switched on and are meant for these: flat or not, float32, on the CPU, contiguous."""
    return _users > 0 and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def takes_bfloat16(*tensors: Tensor) -> bool:
    """Tell the same of bfloat16s."""
    return _users > 0 and all(
        t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


def widen(values: Tensor, out: Tensor, minus: Tensor | None = None) -> bool:
    """Write bfloat16s, minus a float32 each if given, as float32s; tell whether the bfloat16s are all finite."""
    if minus is None:
        return bool(_compiled().widen(_words(values), _words(out)))
    return bool(_compiled().widen_minus(_words(values), minus.view(-1).numpy(), out.view(-1).numpy()))


def narrow(values: Tensor) -> tuple[Tensor, bool]:
    """Return float32s as bfloat16s, flat, and whether all are finite."""
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    return out, bool(_compiled().narrow(_words(values), _words(out)))


def count_digits(values: Tensor, prefix: int, shift: int, counts: Tensor) -> None:
    """Add to `counts` (int64) how often each digit at `shift` occurs in the magnitudes that begin with `prefix`."""
    above = shift + len(counts).bit_length() - 1
    _compiled().count_digits(_words(values), prefix, shift, above, counts.numpy())


def beginning_with(values: Tensor, prefix: int, shift: int) -> tuple[Tensor, Tensor]:
    """Return the bits of those magnitudes whose bits above `shift` are `prefix`, and their indices."""
    bits, places = (torch.empty(values.numel(), dtype=dtype) for dtype in (torch.int32, torch.int64))
    found = _compiled().beginning_with(_words(values), prefix, shift, bits.numpy(), places.numpy())
    return bits[:found].clone(), places[:found].clone()


def place_of_equal(values: Tensor, bits: int, number: int) -> tuple[int, int]:
    """Return the index of the number-th magnitude of these bits (or -1), and how many were seen up to there."""
    return _compiled().place_of_equal(_words(values), bits, number)


def keep_random(values: Tensor, counter: int, key: int, level: int) -> Tensor:
    """Return the values with those cleared whose bits, drawn as `ops.random` does, are not below a level."""
    out = torch.empty_like(values)
    _compiled().keep_random(_words(values), counter, key, level, _words(out))
    return out


def keep_by_rank(values: Tensor, level: Tensor, counter: int, key: int) -> Tensor:
    """Return rows with those values cleared whose bits, drawn as above, are not below the level of their rank."""
    out = torch.empty_like(values)
    _compiled().keep_by_rank(_words(values), level.numpy(), counter, key, _words(out))
    return out


def magnitude_sums(values: Tensor, block: int) -> list[float]:
    """Return the sum of magnitudes of each block of so many; see `ops.sums`."""
    flat = values.view(-1)
    sums = np.empty(-(-flat.numel() // block))
    _compiled().magnitude_sums(flat.numpy(), flat.view(torch.int32).numpy(), block, sums)
    return sums.tolist()


def weighted_sum(tensors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """Return the sum of weight_i * tensor_i."""
    out = torch.empty_like(tensors[0])
    _compiled().weighted_sum(_addresses(tensors), _floats(weight), out.view(-1).numpy())
    return out


def disjoint_sum(tensors: Sequence[Tensor], weight: Sequence[float], *, normalize: bool, undecided: float) -> Tensor:
    """Return the sum of those weighted entries that have the elected sign; see `ops.combine`."""
    out = torch.empty_like(tensors[0])
    _compiled().disjoint_sum(_addresses(tensors), _floats(weight), undecided > 0, normalize, out.view(-1).numpy())
    return out


def _compiled() -> Any:
    from hf_merge.ops import compiled  # numba is optional, and takes longer to import than a small merge takes

    return compiled


def _words(values: Tensor) -> Any:
    """Show a contiguous tensor as an array of unsigned integers as wide as its entries."""
    unsigned = torch.uint16 if values.element_size() == 2 else torch.uint32
    return values.detach().view(-1).view(unsigned).numpy()


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


def _floats(values: Sequence[float]) -> Any:
    return np.array(values, dtype=np.float32)
