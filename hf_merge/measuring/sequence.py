"""Gram matrices on the inputs that merged layers give: layers are measured and merged one after the other (RegMean++).

A unit is a layer of a stack, or a module outside of stacks. Each is measured in its place in the merged model, with
the weights of one model after the other and the data of each; then it is merged. Units that are merged already run
again for each unit after them, instead of keeping activations: with L layers about L/2 forward passes, in no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.data import Batch, Data
from hf_merge.errors import PlanError
from hf_merge.measuring.gram import Shared, Sum, _adding, sharing, watched
from hf_merge.measuring.subject import Layer, Subject
from hf_merge.method import get_method

METHOD = "regmean_plus_plus"


class _Enough(Exception):
    """A unit has run: the rest of the forward pass is not needed."""


@dataclass(frozen=True, eq=False)
class _Unit:
    """A part of the merged model, and the layers in it by groups of the same inputs."""

    name: str
    module: nn.Module
    groups: list[Shared]
    once: bool


@torch.no_grad()
def merged_gram_matrices(
    subjects: Sequence[Subject],
    data: Sequence[Data],
    layers: Sequence[Layer],
    *,
    scaling: float,
    ridge: float,
    begin: Callable[[list[Shared], int], None],
    done: Callable[[int], None],
) -> Iterator[tuple[int, Shared, Tensor]]:
    """Yield (model, group, Gram matrix), unit by unit.

    Args:
        subjects: the models, all in memory.
        data: of each.
        layers: of the first.
        scaling, ridge: of the merges on the way.
        begin: called with all groups and the number of units, before the first matrix.
        done: called with the number of examples that are done.
    """
    states = [dict(subject.module.named_parameters()) for subject in subjects]
    _refuse_different(states, subjects)
    whole = Subject(subjects[0].ref, subjects[0].source, copy.deepcopy(subjects[0].module))
    merged = dict(whole.module.named_parameters())
    for name, weight in merged.items():
        weight.copy_(torch.stack([state[name].to(weight.device) for state in states]).mean(0))
    own = [Layer(one.live, whole.module.get_submodule(one.live.rpartition(".")[0]), one.saved) for one in layers]
    units = _units(whole, own, next(iter(data[0])))
    begin([group for unit in units for group in unit.groups], len(units))
    for unit in units:
        found: dict[str, list[Tensor]] = {}
        inside = [name for name in merged if name == unit.name or name.startswith(f"{unit.name}.")]
        for place, (state, batches) in enumerate(zip(states, data, strict=True)):
            for name in inside:
                merged[name].copy_(state[name])
            for group, gram in _grams(whole, unit, batches, done):
                for layer in group.layers:
                    found.setdefault(layer.live, []).append(gram)
                yield place, group, gram
        for name in inside:
            weights = [state[name].to(merged[name].device) for state in states]
            parameters = {"merged_gram": found[name], "scaling": scaling, "ridge": ridge} if name in found else {}
            method = get_method(METHOD if name in found else "linear")
            merged[name].copy_(method(weights, **parameters))


def _grams(whole: Subject, unit: _Unit, batches: Data, done: Callable[[int], None]) -> Iterator[tuple[Shared, Tensor]]:
    sums = [Sum(group.first) for group in unit.groups]
    masks: list[Tensor | None] = [None]
    with watched((one.layer.module, _adding(one, masks)) for one in sums), ExitStack() as stack:
        if unit.once:
            stack.callback(unit.module.register_forward_hook(_stop).remove)
        for batch in batches:
            masks[0] = batch.inputs.get("attention_mask")
            with suppress(_Enough):
                whole.module(**whole.inputs(batch.inputs))
            done(batch.size)
    for group, total in zip(unit.groups, sums, strict=True):
        yield group, total.mean()


def _stop(*_: Any) -> None:
    raise _Enough


def _units(whole: Subject, layers: Sequence[Layer], batch: Batch) -> list[_Unit]:
    """Find the units with layers, in the order in which they run."""
    stacks = _stacks(whole.module)
    inside: dict[str, list[Layer]] = {}
    for layer in layers:
        name = layer.live.rpartition(".")[0]
        home = next(
            (f"{s}.{name.removeprefix(f'{s}.').partition('.')[0]}" for s in stacks if name.startswith(f"{s}.")), name
        )
        inside.setdefault(home, []).append(layer)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    modules = {name: whole.module.get_submodule(name) for name in inside}
    with watched((module, note(name)) for name, module in modules.items()):
        groups = sharing(whole, layers, batch)
    homes = {id(layer): name for name, own in inside.items() for layer in own}
    units = []
    for name in dict.fromkeys(calls):
        own = [Shared(tuple(x for x in group.layers if homes[id(x)] == name)) for group in groups]
        units.append(_Unit(name, modules[name], [one for one in own if one.layers], calls.count(name) == 1))
    return units


def _stacks(module: nn.Module) -> list[str]:
    """Name the outermost lists of layers."""
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found


def _refuse_different(states: Sequence[Mapping[str, Tensor]], subjects: Sequence[Subject]) -> None:
    shapes = [{name: tuple(p.shape) for name, p in state.items()} for state in states]
    for other, subject in zip(shapes[1:], subjects[1:], strict=True):
        if other != shapes[0]:
            named = next(iter(dict(other.items() ^ shapes[0].items())))
            raise PlanError(
                f"'{subject.source.label}' and '{subjects[0].source.label}' differ in '{named}': models that are "
                "measured together are of one architecture."
            )
