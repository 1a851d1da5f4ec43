"""A merge with task experts in memory: a backbone, and what makes each task's weights of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_merge.errors import ParameterError, did_you_mean
from hf_merge.forms import Fields, Form
from hf_merge.planning import EXPERTS, Plan, kept_for


@dataclass(frozen=True)
class Expert:
    """One task's own part.

    Attributes:
        task: its name.
        forms: in which form each merged tensor is kept.
        fields: what is kept of it, by the names of that form.
        own: tensors that are the task's alone, such as its head, as they are.
    """

    task: str
    forms: Mapping[str, Form] = field(repr=False)
    fields: Mapping[str, Fields] = field(repr=False)
    own: Mapping[str, Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside the backbone."""
        kept = [tensor for fields in self.fields.values() for tensor in fields.values()]
        return sum(tensor.nbytes for tensor in (*kept, *self.own.values()))


@dataclass(frozen=True)
class MergedExperts:
    """Models merged into a backbone and one light expert for each task.

    Attributes:
        backbone: the state dict of the backbone.
        experts: one for each model, in their order.
        shared: what the masks of all tasks are over, by tensor.
        names: which tensors each model had.
    """

    backbone: Mapping[str, Tensor] = field(repr=False)
    experts: tuple[Expert, ...]
    shared: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    names: tuple[frozenset[str], ...] = field(default=(), repr=False)

    @property
    def tasks(self) -> list[str]:
        return [expert.task for expert in self.experts]

    def reconstruct(self, task: int | str) -> dict[str, Tensor]:
        """Return the state dict of a task: all tensors of the model that it was merged from, as the base calls them.

        What the task changes is made anew; other tensors are the backbone's and the expert's own, not copies.

        Args:
            task: its name, or its place among the models beside the base.

        Raises:
            ParameterError: there is no such task.
        """
        place = self._place(task)
        expert = self.experts[place]
        weights = {**{name: self._weight(expert, name) for name in self.backbone}, **expert.own}
        return {name: tensor for name, tensor in weights.items() if not self.names or name in self.names[place]}

    def _weight(self, expert: Expert, name: str) -> Tensor:
        backbone = self.backbone[name]
        if name not in expert.forms:
            return backbone
        return expert.forms[name].rebuild(expert.fields[name], backbone, self.shared.get(name))

    def _place(self, task: int | str) -> int:
        if isinstance(task, int) and not isinstance(task, bool) and -len(self.experts) <= task < len(self.experts):
            return task % len(self.experts)
        if task in self.tasks:
            return self.tasks.index(str(task))
        known = ", ".join(self.tasks)
        raise ParameterError(f"There is no task {task!r}.{did_you_mean(str(task), self.tasks)} Tasks: {known}.")


def from_tensors(plan: Plan, tensors: Mapping[str, Tensor], names: tuple[frozenset[str], ...]) -> MergedExperts:
    """Put together what a plan with task experts gave.

    Args:
        plan: as it was executed.
        tensors: all of its outputs.
        names: which tensors each task's model had.
    """
    assert plan.tasks is not None
    backbone = {step.name: tensors[step.name] for step in plan.steps if not step.name.startswith(EXPERTS)}
    shared = {step.name: tensors[step.shared] for step in plan.steps if step.shared}
    experts = tuple(_expert(plan, tensors, task, place) for task, place in _places(plan))
    return MergedExperts(backbone, experts, shared, names)


def _places(plan: Plan) -> Iterator[tuple[str, int]]:
    assert plan.tasks is not None
    for task, model in zip(plan.tasks.names, plan.tasks.models, strict=True):
        yield task, plan.models.index(model)


def _expert(plan: Plan, tensors: Mapping[str, Tensor], task: str, place: int) -> Expert:
    forms: dict[str, Any] = {}
    fields: dict[str, Fields] = {}
    for step in plan.steps:
        for one, names in zip(step.inputs, step.experts, strict=False):
            if one.model == place and step.form is not None:
                forms[step.name] = step.form
                fields[step.name] = {key: tensors[name] for key, name in names.items()}
    before = kept_for(task)
    own = {
        step.name.removeprefix(before).removesuffix(":whole"): tensors[step.name]
        for step in plan.steps
        if step.name.startswith(before)
    }
    return Expert(task, forms, fields, own)
