"""Where a merge with task experts lies: the backbone as a model, and beside it a folder for each task.

config.json, model.safetensors     the backbone
experts.json                       the tasks, in order, and what belongs to each
experts/shared/                    what all masks are over, once
experts/<task>/                    a PEFT adapter: LoRA where an expert is of low rank, else hf_merge's own method
experts/<task>/own.safetensors     what a LoRA adapter cannot hold: norms, biases, tokens, the task's head
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_merge.adapters.modules import Layout, auto_mapping, layout_of
from hf_merge.adapters.parts import Part
from hf_merge.adapters.parts import stored as lora_tensors
from hf_merge.adapters.settings import adapter_config as lora_config
from hf_merge.errors import PlanError
from hf_merge.experts.stored import (
    Entry,
    adapter_config,
    file_layout,
    key_of,
    mask_entry,
    shared_entry,
    sparse_entry,
    whole_entry,
)
from hf_merge.forms import LowRank, Sparse
from hf_merge.planning import SHARED, Plan, Problem, Step, kept_for
from hf_merge.types import TensorSpec
from hf_merge.writer import Writer

FOLDER = "experts"
ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OWN_FILE = "own.safetensors"
INDEX_FILE = "experts.json"
_FACTORED = ("linear", "conv", "embedding")


@dataclass(frozen=True)
class Placed:
    """Where a tensor of a plan goes.

    Attributes:
        file: of the output.
        key: its name there.
        spec: shape and dtype there.
        turn: what makes it of the plan's tensor; None if it is that.
    """

    file: str
    key: str
    spec: TensorSpec
    turn: Callable[[Tensor], Tensor] | None = None

    @property
    def name(self) -> str:
        """Its name for a writer: with the folder of its file."""
        return f"{self.file.rpartition('/')[0]}/{self.key}"


@dataclass
class _TaskFiles:
    """What the adapter of one task holds, or of all of them."""

    entries: dict[str, Entry] = field(default_factory=dict)
    ranks: dict[Part, int] = field(default_factory=dict)


class ExpertFiles:
    """Which tensor of a plan with task experts goes where.

    Args:
        plan: what is merged.

    Raises:
        PlanError: the backbone's class is not known, or keeps its weights in another way than its checkpoints.
    """

    def __init__(self, plan: Plan):
        assert plan.tasks is not None
        self.plan, self.tasks = plan, plan.tasks.names
        self.layout = _layout(plan)
        self.live = self.layout.live(step.name for step in plan.steps)
        self.found: dict[str, _TaskFiles] = {name: _TaskFiles() for name in (SHARED, *self.tasks)}
        self.is_lora = any(isinstance(step.form, LowRank) for step in plan.steps)
        self.places = dict(self._places())

    def _places(self) -> Iterator[tuple[str, Placed]]:
        for step in self.plan.steps:
            if step.shared:
                name = self._live(step)
                self.found[SHARED].entries[name] = shared_entry(step.spec.shape, _dtype(step.spec))
                yield step.shared, self._stored(SHARED, name, SHARED)
            for one, names in zip(step.inputs, step.experts, strict=False):
                yield from self._of_expert(step, self._task(one.model), names)
            for task in self.tasks:
                if step.name.startswith(before := kept_for(task)):
                    yield step.name, self._own(task, step.name.removeprefix(before).removesuffix(":whole"), step.spec)

    def _task(self, place: int) -> str:
        assert self.plan.tasks is not None
        return self.tasks[self.plan.tasks.models.index(self.plan.models[place])]

    def _live(self, step: Step) -> str:
        """Return the parameter that a tensor is in memory."""
        found = self.live.get(step.name, ())
        parameter = self.layout.parts.get(found[0]) if len(found) == 1 else None
        if parameter is None or tuple(self.layout.tables.shapes[found[0]].shape) != step.spec.shape:
            raise PlanError(
                f"'{step.name}' is not one parameter of the backbone's class in memory, as an expert has to name it: "
                "task experts of models whose checkpoints are laid out in another way are not written; "
                "merge_state_dicts makes them in memory."
            )
        return found[0]

    def _of_expert(self, step: Step, task: str, names: Mapping[str, str]) -> Iterator[tuple[str, Placed]]:
        """Say where the fields of one task's tensor go; factors of rank 0 go nowhere."""
        if not names:
            return
        if isinstance(step.form, LowRank):
            yield from self._of_factors(step, task, names, step.form.rank)
        elif self.is_lora:
            yield names["whole"], self._own(task, step.name, step.spec)
        else:
            name = self._live(step)
            self.found[task].entries[name] = _entry(step)
            yield from ((kept, self._stored(task, name, part)) for part, kept in names.items())

    def _of_factors(self, step: Step, task: str, names: Mapping[str, str], rank: int) -> Iterator[tuple[str, Placed]]:
        if not rank:
            return
        live = self.live.get(step.name, ())
        part = self.layout.parts.get(live[0]) if len(live) == 1 else None
        if part is None or part.kind not in _FACTORED or part.twins:
            yield from (
                (names[side], self._own(task, f"{step.name}.{side}", step.outputs[names[side]]))
                for side in ("left", "right")
            )
            return
        self.found[task].ranks[part] = rank
        for side in ("left", "right"):
            turn = _Turn(part, side, rank)
            key, spec = turn.written(step.outputs[names[side]])
            yield names[side], Placed(f"{FOLDER}/{task}/{ADAPTER_FILE}", key, spec, turn)

    def _stored(self, task: str, name: str, part: str) -> Placed:
        key = key_of(name, part)
        stored = file_layout({name: self.found[task].entries[name]})[key]
        spec = TensorSpec(stored.shape, getattr(torch, stored.dtype))
        return Placed(f"{FOLDER}/{task}/{ADAPTER_FILE}", key, spec)

    def _own(self, task: str, name: str, spec: TensorSpec) -> Placed:
        """Place a tensor that is a task's as it is: among the expert's where its class has it, else beside them."""
        if not self.is_lora:
            live = self.layout.live([name]).get(name, ())
            known = len(live) == 1 and self.layout.parts.get(live[0], None) is not None
            if known and spec.dtype.is_floating_point and spec.numel:
                self.found[task].entries[live[0]] = whole_entry(spec.shape, _dtype(spec))
                return self._stored(task, live[0], "whole")
        return Placed(f"{FOLDER}/{task}/{OWN_FILE}", name, spec)

    @cached_property
    def filed(self) -> Plan:
        """The plan as a writer sees it: every tensor with the name and the shape of its file."""
        backbone = [Step(step.name, None, (), None, {}, step.spec) for step in self.plan.steps
                    if not step.name.startswith(f"{FOLDER}/")]  # fmt: skip
        others = [Step(one.name, None, (), None, {}, one.spec) for one in self.places.values()]
        files: dict[str, list[Placed]] = {}
        for one in self.places.values():
            files.setdefault(one.file, []).append(one)
        shards = {
            file: tuple(one.name for one in sorted(held, key=lambda one: -one.spec.dtype.itemsize))
            for file, held in sorted(files.items())
        }
        return replace(self.plan, steps=(*backbone, *others), shards={**self.plan.shards, **shards})

    def bytes_of(self, task: str) -> int:
        """Return how many bytes of tensors a task has, or all of them share."""
        before = f"{FOLDER}/{task}/"
        return sum(one.spec.nbytes for one in self.places.values() if one.file.startswith(before))

    def config_of(self, task: str, base: str) -> dict[str, Any] | None:
        """Return adapter_config.json of a task, or of what all share; None if it has no adapter.

        Args:
            task: its name.
            base: where the backbone is.
        """
        found = self.found[task]
        if found.entries:
            return adapter_config(found.entries, base)
        if not found.ranks:
            return None
        extra = {"auto_mapping": auto_mapping(self.plan.config)}
        return lora_config(found.ranks, [], bias="none", base_model=base, extra=extra)


@dataclass(frozen=True)
class _Turn:
    """Makes a factor of a weight, as it is stored, what PEFT calls A or B."""

    part: Part
    side: str
    rank: int

    def __call__(self, factor: Tensor) -> Tensor:
        return self._stored(factor)[1].contiguous()

    def written(self, spec: TensorSpec) -> tuple[str, TensorSpec]:
        """Return the key of a factor, and what it is there."""
        key, tensor = self._stored(torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
        return key, TensorSpec(tuple(tensor.shape), tensor.dtype)

    def _stored(self, factor: Tensor) -> tuple[str, Tensor]:
        rows, columns = self.part.sides
        turned = self.part.turned or self.part.kind == "embedding"
        is_left = (self.side == "left") != turned
        factor = factor.T if turned else factor
        left = factor if is_left else torch.empty(rows, self.rank, device="meta")
        right = torch.empty(self.rank, columns, device="meta") if is_left else factor
        made = lora_tensors(self.part, left, right)
        ends = (".lora_B.weight", ".lora_embedding_B") if is_left else (".lora_A.weight", ".lora_embedding_A")
        key = next(key for key in made if key.endswith(ends))
        return key, made[key]


class ExpertsWriter:
    """Hands tensors of a plan with task experts to the writer of their files; see `Writer`."""

    def __init__(self, files: ExpertFiles, writer: Writer):
        self.files, self.writer = files, writer
        self.carrier = writer.carrier

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor of the plan; those that have no place are dropped."""
        if not name.startswith(f"{FOLDER}/"):
            self.writer.write(name, start, values)
        elif name in self.files.places:
            placed = self.files.places[name]
            if placed.turn is not None:
                values = placed.turn(values.view(self.files.plan.specs[name].shape))
            self.writer.write(placed.name, start, values.reshape(-1).to(placed.spec.dtype))

    def is_finished(self, name: str) -> bool:
        """Tell whether an earlier run finished a tensor, or it has no place."""
        if name.startswith(f"{FOLDER}/"):
            return name not in self.files.places or self.writer.is_finished(self.files.places[name].name)
        return self.writer.is_finished(name)

    def sizes_before(self) -> list[int]:
        return self.writer.sizes_before()

    def stop(self) -> None:
        self.writer.stop()


def index_of(plan: Plan, files: ExpertFiles, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return experts.json: the tasks in order, what the class of each task's model is, and what was not merged.

    Args:
        plan: what was merged.
        files: where it lies.
        configs: config.json of each task's model.
    """
    words = ("architectures", "id2label", "label2id", "problem_type", "finetuning_task")
    tasks = [
        {
            "name": task,
            "kind": "lora" if files.is_lora else "hf_merge",
            "bytes": files.bytes_of(task),
            **{word: configs[task][word] for word in words if word in configs[task]},
        }
        for task in files.tasks
    ]
    assert plan.tasks is not None
    told = {
        "method": plan.recipe.merge_method,
        "shared_bytes": files.bytes_of(SHARED),
        "apart": sorted(plan.tasks.apart),
    }
    return json.dumps({"format": 1, **told, "tasks": tasks}, indent=2, ensure_ascii=False) + "\n"


def with_problems(plan: Plan) -> Plan:
    """Return a plan that also tells whether its task experts cannot be written, and why."""
    try:
        ExpertFiles(plan)
    except PlanError as error:
        return replace(plan, problems=(*plan.problems, Problem("error", str(error))))
    return plan


def _layout(plan: Plan) -> Layout:
    layout = layout_of(plan.config) if plan.config else None
    if layout is None:
        raise PlanError(
            "The backbone has no config.json with a class of transformers' own, and experts name its modules: "
            "merge_state_dicts merges plain tensors, in memory."
        )
    return layout


def _entry(step: Step) -> Entry:
    if isinstance(step.form, Sparse):
        shape = next(spec.shape for name, spec in step.outputs.items() if name.endswith(":values"))
        return sparse_entry(step.spec.shape, shape[1], _dtype(step.spec), rows=shape[0])
    return mask_entry(step.spec.shape)


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")
