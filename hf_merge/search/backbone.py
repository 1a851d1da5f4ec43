"""The part of the models that is merged: base + sum of coefficient * task vector, and gradients by coefficients.

No graph runs through the merge. A loss is differentiated down to the merged weights, and as soon as the gradient of a
weight is there, its inner products with the task vectors are the gradients of the coefficients:

    d loss / d coefficient[tensor, task] = <d loss / d weight[tensor], task vector[tensor, task]>

and the gradient is let go. So base, task vectors and one set of weights are in memory, whatever the number of tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge import _compat
from hf_merge.ops.combine import weighted_sum
from hf_merge.sources.module import config_of

Cut = tuple[tuple[int, ...], tuple[int, ...], int] | None
"""Shape, strides and offset of a checkpoint's tensor within a parameter; None if it is all of it."""


@dataclass
class Piece:
    """A tensor of the checkpoint that is merged.

    Attributes:
        name: in the checkpoint.
        base: the base's, flat, in the dtype of the arithmetic.
        deltas: the task vectors, flat.
        dtype: that the merge is written in.
        homes: where it lies in the models that run, one for each parameter.
    """

    name: str
    base: Tensor
    deltas: list[Tensor]
    dtype: torch.dtype
    homes: list[tuple[Tensor, Cut]] = field(default_factory=list)

    def merged(self, weight: Sequence[float]) -> Tensor:
        """Merge as `hf_merge.merge` does, operation by operation, so that the bits are the same."""
        deltas = [delta.to(self.base.dtype) for delta in self.deltas]
        return torch.add(self.base, weighted_sum(deltas, weight), alpha=1.0).to(self.dtype)


def place(
    module: nn.Module,
    names: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    own_names: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, Cut]]:
    """Find where tensors of a checkpoint lie in a model: its parameter or buffer, and which part of that.

    Args:
        module: the model.
        names: of the checkpoint's tensors; those that the model has no place for are left out.
        shapes: of the checkpoint's tensors.
        own_names: what the model's own checkpoint calls them, where that is something else.
    """
    own, config = dict(_named(module)), config_of(module)
    parts = _compat.parts_on_disk(config) if config else {}
    built = _compat.empty_model(config) if config else None
    called = {name: (name, (own_names or {}).get(name, name)) for name in names}
    live = {} if built is None else _compat.Conversion(built).live({one for both in called.values() for one in both})
    found: dict[str, tuple[str, Cut]] = {}
    for name, either in called.items():
        for one in either:
            inside, cut = live.get(one, one), None
            if one in parts and parts[one][0] in own:
                inside, view = parts[one]
                cut = tuple(view.shape), tuple(view.stride()), int(view.storage_offset())
            if inside in own and (tuple(own[inside].shape) if cut is None else cut[0]) == shapes[name]:
                found[name] = inside, cut
                break
    return found


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class Backbone:
    """Merged weights that several models share, each under its own head.

    Args:
        pieces: the tensors that are merged.
        shapes: of the pieces.
        level: `layer` for a coefficient of each tensor, or `task`.
    """

    def __init__(self, pieces: Sequence[Piece], shapes: Mapping[str, tuple[int, ...]], level: str):
        self.pieces, self.level, self.tasks = list(pieces), level, len(pieces[0].deltas)
        self._shapes = shapes
        self._shared: dict[Any, Tensor] = {}
        self._held: dict[int, list[tuple[int, Cut]]] = {}
        self._hooks: list[Any] = []
        rows = len(self.pieces) if level == "layer" else 1
        self.gradient = torch.zeros(rows, self.tasks, dtype=torch.float64)

    def add(self, module: nn.Module, own_names: Mapping[str, str]) -> None:
        """Let a model have the weights that those before it have, where they have the same tensors of the checkpoint.

        Args:
            module: the model; what it had there is let go.
            own_names: what its own checkpoint calls the pieces, where that is something else.
        """
        module.requires_grad_(False)
        own, inside = dict(_named(module)), dict[str, list[tuple[str, Cut]]]()
        for name, (live, cut) in place(module, [p.name for p in self.pieces], self._shapes, own_names).items():
            inside.setdefault(live, []).append((name, cut))
        for live, held in inside.items():
            key = tuple(sorted(held, key=lambda one: one[0])), tuple(own[live].shape)
            if key in self._shared:
                _replace(module, own[live], self._shared[key])
            else:
                self._shared[key] = own[live]
                self._adopt(own[live], held)

    def _adopt(self, tensor: Tensor, held: Sequence[tuple[str, Cut]]) -> None:
        index = {piece.name: i for i, piece in enumerate(self.pieces)}
        for name, cut in held:
            self.pieces[index[name]].homes.append((tensor, cut))
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(True)
            self._held[id(tensor)] = [(index[name], cut) for name, cut in held]
            self._hooks.append(tensor.register_post_accumulate_grad_hook(self._take))

    def _take(self, weight: Tensor) -> None:
        """Turn the gradient of a weight into those of its coefficients, and let it go."""
        gradient = weight.grad
        assert gradient is not None
        gradient = gradient.contiguous()
        for i, cut in self._held[id(weight)]:
            part = _part(gradient, cut).reshape(-1)
            products = [(part * delta).sum(dtype=torch.float64) for delta in self.pieces[i].deltas]
            self.gradient[i if self.level == "layer" else 0] += torch.stack(products).cpu()
        weight.grad = None

    @torch.no_grad()
    def write(self, coefficients: Tensor) -> None:
        """Put the merge by these coefficients, (tensors or 1, tasks), into the models."""
        for i, piece in enumerate(self.pieces):
            weight = coefficients[i if self.level == "layer" else 0].tolist()
            values = piece.merged(weight)
            for tensor, cut in piece.homes:
                into = _part(tensor, cut)
                into.copy_(values.view(into.shape))

    def take_gradient(self) -> Tensor:
        """Return the gradients by the coefficients since the last call."""
        found, self.gradient = self.gradient, torch.zeros_like(self.gradient)
        return found

    def close(self) -> None:
        """Let the models' weights be plain weights again."""
        for hook in self._hooks:
            hook.remove()
        for piece in self.pieces:
            for tensor, _ in piece.homes:
                tensor.requires_grad_(False)


def _part(tensor: Tensor, cut: Cut) -> Tensor:
    """Look at a part of a contiguous tensor."""
    if cut is None:
        return tensor
    shape, strides, offset = cut
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def _replace(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put another tensor wherever a model has one."""
    for part in module.modules():
        for owned in (part._parameters, part._buffers):
            for leaf, tensor in owned.items():
                if tensor is old:
                    owned[leaf] = new  # type: ignore[assignment]
