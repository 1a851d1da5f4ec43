"""Between the dtype of files and that of the arithmetic, with a look at what is not finite on the way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_merge.ops import loops


def widen(
    values: Tensor,
    out: Tensor,
    minus: Tensor | None = None,
    *,
    load: Callable[[Tensor, Tensor], object] = Tensor.copy_,
    check: bool = True,
) -> bool:
    """Write flat values, less those of another tensor if given, into one of a wider dtype.

    Args:
        values: wherever they lie.
        out: where the arithmetic is.
        minus: float32s beside `out`.
        load: copies the second of two tensors into the first.
        check: look whether they are finite.

    Returns:
        Whether all values are finite, as far as was looked.
    """
    if loops.takes_bfloat16(values) and loops.take(out):
        return loops.widen(values, out, minus)
    load(out, values)
    finite = not check or is_finite(out)
    if minus is not None:
        out.sub_(minus)
    return finite


def narrowed(values: Tensor, dtype: torch.dtype, *, check: bool = True) -> tuple[Tensor, bool]:
    """Return values in another dtype, flat, and whether all are finite in it, as far as that was looked at."""
    if dtype == torch.bfloat16 and loops.take(values):
        return loops.narrow(values)
    rounded = values.detach().to(dtype).contiguous().view(-1)
    return rounded, not (check and rounded.is_floating_point()) or is_finite(rounded)


def integer_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype of integers that are as wide as a tensor's floats, float32 or float64."""
    return torch.int64 if values.dtype == torch.float64 else torch.int32


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite; a finite sum proves it at the price of one read."""
    return math.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item()) or bool(
        values.isfinite().all()
    )
