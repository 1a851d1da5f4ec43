"""Weights of a model that are a task's for a while: its own are kept, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Lent:
    """A model whose parameters and buffers take other values for a while.

    Values are swapped and never computed in place, so that nothing drifts. A tensor that several names share is known
    by the first of them.

    Attributes:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._own: dict[str, Tensor] = {}
        first: dict[int, str] = {}
        self._canonical = {name: first.setdefault(id(t), name) for name, t in self._tensors().items()}

    def _tensors(self) -> dict[str, Any]:
        return self.model.state_dict(keep_vars=True)

    def name(self, name: str) -> str | None:
        """Return the first name of a tensor; None if the model has it not."""
        return self._canonical.get(name)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the model's own values, by all names, whatever stands in their places now."""
        now, first = self._tensors(), self._canonical
        return {name: self._own[first[name]] if first[name] in self._own else now[name] for name in now}

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, names: Iterable[str], value: Callable[[str, Tensor], Tensor]) -> None:
        """Replace some values, by what a function makes of the model's own; all others are its own again.

        If the function raises, the model has its own values again.

        Args:
            names: of the tensors, by their first names.
            value: (name, the model's own value) -> what takes its place, of its dtype and device, and maybe of another
                shape.
        """
        wanted = sorted({*names})
        now = self._tensors()
        try:
            for name in self._own.keys() - {*wanted}:
                now[name].data = self._own.pop(name)
            for name in wanted:
                own: Tensor = self._own[name] if name in self._own else now[name].data
                made = value(name, own)
                self._own[name] = own
                now[name].data = made
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put all of the model's own values back."""
        now = self._tensors()
        while self._own:
            name, own = self._own.popitem()
            now[name].data = own
