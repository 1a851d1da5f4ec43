"""Recipe + headers -> Plan: every output tensor, its inputs, its method and plain numbers; problems.

Nothing here reads a value of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from hf_merge.aliases import told_alias
from hf_merge.checking import idle_parameters
from hf_merge.configuration import restacked, with_dtype
from hf_merge.errors import OutputError
from hf_merge.findings import Findings
from hf_merge.forms import NOTHING, Form
from hf_merge.measured import MeasuredInputs
from hf_merge.method import LAMBDA, MergeMethod, get_method
from hf_merge.outline import Cut, Outline, Participant, Target
from hf_merge.passes import first_passes
from hf_merge.planning import (
    MAX_SHARD_SIZE,
    SHARED,
    SINGLE_FILE,
    Input,
    Plan,
    Problem,
    Step,
    Tasks,
    compute_dtype,
    default_workers,
    kept_as,
    most_common_dtype,
    working_memory,
)
from hf_merge.recipe import Recipe
from hf_merge.schedule import UNSET, resolve_first, tensor_seeds
from hf_merge.schema import Rule
from hf_merge.types import Ref, SourceLike, TensorSpec


def make_plan(
    recipe: Recipe,
    sources: Mapping[Ref, SourceLike],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    workers: int | None = None,
    problems: Sequence[Problem] = (),
    tasks: Tasks | None = None,
) -> Plan:
    """Decide how every output tensor comes about.

    Args:
        recipe: what is merged, and how.
        sources: the recipe's models, with the shapes and dtypes of their tensors.
        max_shard_size: bytes, or `"5GB"`.
        workers: how many tensors are worked on at a time, for the estimate of memory; see `default_workers`.
        problems: what was found before.
        tasks: of a merge with task experts.
    """
    planner = _Planner(recipe, sources, tasks)
    steps = tuple(planner.step(target) for target in planner.outline.targets())
    specs = {step.name: step.spec for step in steps}
    config, doubts = planner.config(specs)
    passes = first_passes(steps, dtype=planner.precision, bytes_read=planner.bytes_read, tied=planner.donor.shared)
    return Plan(
        recipe=recipe,
        models=tuple(sources),
        donor=planner.donor_place,
        config=config,
        steps=steps,
        shards=_lay_out(specs, max_shard_size, planner.donor.folders),
        problems=tuple(sorted((*problems, *planner.problems(), *doubts), key=lambda one: one.severity != "error")),
        stacks=planner.outline.stacks,
        bytes_read=sum(planner.bytes_read(step) for step in steps) + sum(one.bytes_read for one in passes),
        peak_memory=(workers or default_workers()) * max((planner.memory(step) for step in steps), default=0),
        passes=passes,
        tasks=tasks,
    )


@dataclass(frozen=True)
class _Cast:
    """Who takes part in a method: the models it merges, and its base."""

    method: MergeMethod
    inputs: tuple[Participant, ...]
    base: Participant | None


class _Planner:
    """What holds for all tensors of a merge, and what is found on the way through them."""

    def __init__(self, recipe: Recipe, models: Mapping[Ref, SourceLike], tasks: Tasks | None = None):
        self.recipe, self.tasks = recipe, tasks
        self.refs, self.sources = list(models), list(models.values())
        self.donor_place = self.refs.index(recipe.donor)
        self.donor = self.sources[self.donor_place]
        self.outline = Outline(recipe, models, self.donor_place)
        self.dtype = getattr(torch, recipe.out_dtype or recipe.dtype or "", None)
        self.casts: dict[tuple[int, int], _Cast] = {}
        self.matched: set[int] = set()
        self.planned: set[str] = set()
        self.findings = Findings(recipe, self.sources, self.donor)
        self.measured = MeasuredInputs(self.sources)
        for cut in (cut for cuts in self.outline.cuts.values() for cut in cuts):
            self.cast(cut, None)

    def cast(self, cut: Cut, rule: Rule | None) -> _Cast:
        """Say who takes part in a slice, or in the tensors of a slice that a rule matches."""
        key = (id(cut), id(rule))
        if key not in self.casts:
            self.casts[key] = self._cast(cut, rule)
        return self.casts[key]

    def _cast(self, cut: Cut, rule: Rule | None) -> _Cast:
        method = get_method((rule and rule.merge_method) or cut.method)
        chosen = tuple(self._participant(cut, model) for model in rule.models) if rule and rule.models else cut.sources
        if method.base != "ignored":
            return _Cast(method, tuple(one for one in chosen if one is not cut.base), cut.base)
        # As in MergeKit, a base that is not listed is one more model to a method that has no base.
        counts = cut.base is not None and cut.base not in chosen and not self.sources[cut.base.place].is_reference
        unlisted = rule is None and method.count is None and counts and not method.statistics
        return _Cast(method, (*chosen, cut.base) if unlisted and cut.base else chosen, None)

    def _participant(self, cut: Cut, model: Ref) -> Participant:
        """Find a model in a slice, or let it take part with the layers of the first one."""
        place = self.refs.index(model)
        present = (one for one in (*cut.sources, cut.base) if one and one.place == place)
        return next(present, Participant(place, first_layer=cut.sources[0].first_layer))

    def step(self, target: Target) -> Step:
        """Plan one tensor of the output."""
        self.planned.add(target.name)
        rule = self.recipe.rule_for(target.name)
        self.matched.add(id(rule))
        cast = self.cast(target.cut, rule)
        if not target.spec.dtype.is_floating_point:
            return self._copy(target, cast, rule)
        holders = tuple(one for one in cast.inputs if self._has(one, target))
        apart = self.tasks is not None and target.name in self.tasks.apart
        if len(holders) < len(cast.inputs) and self.recipe.keys != "union" and not apart:
            for one in set(range(len(cast.inputs))) - {cast.inputs.index(holder) for holder in holders}:
                self.findings.lacks(cast.inputs[one].place, target.name)
        few = len(holders) < cast.method.least
        if apart or few or (len(holders) < len(cast.inputs) and self.recipe.missing == "base"):
            holders = (self._lead(target),)
            cast = _Cast(get_method("passthrough"), holders, None)
        if cast.base and not self._has(cast.base, target):
            self.findings.lacks_base(target.name)
            cast = _Cast(get_method("linear"), holders, None)
        measured = self.measured.of(cast.method, target, holders) if cast.method.statistics else {}
        if measured is None:
            cast, measured = _Cast(get_method("linear"), cast.inputs, None), {}
        everyone = [*holders, *([cast.base] if cast.base else [])]
        specs = [self._compare(one, target) for one in everyone]
        written = TensorSpec(target.spec.shape, self.dtype or _common_dtype(specs))
        settings = self._settings(cast.method, target, holders, rule)
        inputs, base = self._inputs(target, holders, cast.base)
        step = Step(target.name, cast.method.name, inputs, base, settings, written, measured=measured)
        form = cast.method.form(written.shape, len(holders), settings)
        return step if form is None else self._with_experts(step, form if written.numel else NOTHING)

    def _with_experts(self, step: Step, form: Form) -> Step:
        """Say as what is written that a task has of its own."""
        assert self.tasks is not None
        tasks = {self.refs.index(model): name for name, model in zip(self.tasks.names, self.tasks.models, strict=True)}
        fields = form.fields(step.spec)
        experts = tuple({f: kept_as(tasks[one.model], step.name, f) for f in fields} for one in step.inputs)
        shared = kept_as(SHARED, step.name, SHARED) if form.needs_shared else None
        return replace(step, form=form, experts=experts, shared=shared)

    def _inputs(
        self, target: Target, holders: Sequence[Participant], base: Participant | None
    ) -> tuple[tuple[Input, ...], Input | None]:
        inputs = tuple(Input(one.place, target.name_in(one)) for one in holders)
        return inputs, None if base is None else Input(base.place, target.name_in(base))

    def _has(self, model: Participant, target: Target) -> bool:
        return target.name_in(model) in self.sources[model.place].specs

    def _lead(self, target: Target) -> Participant:
        """The model whose tensor stands where the others lack it."""
        cut = target.cut
        choice = (*([cut.base] if cut.base else []), *cut.sources, Participant(self.donor_place))
        return next(one for one in choice if self._has(one, target))

    def _copy(self, target: Target, cast: _Cast, rule: Rule | None) -> Step:
        """Plan a tensor of integers: the base's, if all models that have it agree (old buffers come and go).

        A rule that names models asks these only.
        """
        lead = self._lead(target)
        asked = cast.inputs if rule and rule.models else (lead, *cast.inputs)
        holders = {target.name_in(one) + str(one.place): one for one in asked if self._has(one, target)}
        for one in holders.values():
            self._compare(one, target)
        return Step(target.name, None, *self._inputs(target, [*holders.values()] or [lead], None), {}, target.spec)

    def _compare(self, model: Participant, target: Target) -> TensorSpec:
        """Note where a model's tensor is not what the output needs; return what it is."""
        found = self.sources[model.place].specs[target.name_in(model)]
        self.findings.compare(model.place, target.name, found, target.spec)
        return found

    def _settings(
        self, method: MergeMethod, target: Target, models: Sequence[Participant], rule: Rule | None
    ) -> dict[str, Any]:
        """Resolve every parameter of a method for one tensor."""
        shared = (target.cut.piece.parameters, target.cut.part.parameters, self.recipe.parameters)
        above = (rule.parameters,) if rule else ()
        names = [target.name_in(one) for one in models]
        scopes = [(*above, one.parameters, *shared) for one in models]
        settings: dict[str, Any] = {}
        for parameter in method.parameters.values():
            each = zip(scopes, names, strict=True) if parameter.per_model else [((*above, *shared), target.name)]
            values = [resolve_first(scope, parameter.name, name, target.depth) for scope, name in each]
            values = [parameter.default if v is UNSET else parameter.check(v, method.name) for v in values]
            settings[parameter.name] = values if parameter.per_model else values[0]
        if self.recipe.lines and LAMBDA.name in settings:
            settings[LAMBDA.name] *= self.recipe.lines.at(target.depth)
        if method.seeded:
            settings[method.seeded] = self._seeds(target, models, names)
        return method.checked(settings)

    def _seeds(self, target: Target, models: Sequence[Participant], names: Sequence[str]) -> list[int]:
        """One seed for each model; a layer of the same model in two places has two."""
        keys = [
            one.place if name == target.name else f"{one.place} {name}" for one, name in zip(models, names, strict=True)
        ]
        name = self.donor.shared.get(target.name, target.name)  # weights that are stored twice are one
        name = f"{self.recipe.name}\0{name}" if self.recipe.name else name
        return tensor_seeds(self.recipe.seed, name, keys)

    def config(self, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Any], list[Problem]]:
        """Write the output's config.json, and say what it cannot express."""
        config = dict(self.donor.config)
        doubts: list[Problem] = []
        configs = [source.config for source in self.sources]
        for stack, origins in self.outline.stacks.items():
            depth = self.outline.layers[self.donor_place].count.get(stack, 0)
            if config:
                config, doubt = restacked(config, stack, depth, [(configs[place], i) for place, i in origins], specs)
                doubts += [Problem("error", doubt)] if doubt else []
        return with_dtype(config, most_common_dtype(specs.values())), doubts

    def bytes_read(self, step: Step) -> int:
        """Bytes of a step's inputs, its base among them."""
        own = sum(self.sources[one.model].bytes_read(one.name) for one in set(step.reads))
        return own + self.measured.bytes_of(step)

    def precision(self, step: Step) -> torch.dtype:
        """The dtype of a step's arithmetic."""
        return compute_dtype([self.sources[one.model].specs[one.name].dtype for one in step.reads] + [step.spec.dtype])

    def memory(self, step: Step) -> int:
        """Estimate the bytes that a step takes beside mapped files and its output."""
        held = sum(self.sources[one.model].bytes_held(one.name) for one in set(step.reads))
        return working_memory(step) + held + self.measured.memory(step)

    def problems(self) -> Iterator[Problem]:
        """Yield all that was found."""
        yield from (Problem("error", text) for text in self.outline.errors)
        seen: set[str] = set()
        for (_, rule), cast in self.casts.items():
            found = [
                problem
                for problem in self._problems_of_cast(cast, is_rule=rule != id(None))
                if str(problem) not in seen
            ]
            seen.update(map(str, found))
            yield from found
        if self.recipe.keys == "intersection":
            yield from self.findings.dropped([name for name in self.donor.specs if name not in self.planned])
        yield from self.measured.problems()
        yield from self.findings.problems(rearranged=bool(self.outline.stacks))
        yield from (Problem("warning", text) for text in self.outline.warnings)
        if self.recipe.lines and not any(LAMBDA.name in cast.method.parameters for cast in self.casts.values()):
            yield Problem("error", f"lines: scales task vectors, and '{self.recipe.merge_method}' has none: drop it.")
        for name, method in idle_parameters(self.recipe):
            hint = told_alias(name, get_method(method).parameters)
            yield Problem("warning", f"'{name}' has no effect: '{method}' has no such parameter.{hint}")
        for rule in self.recipe.rules:
            if id(rule) not in self.matched:
                yield Problem("warning", f"The rule '{rule.pattern}' matches no tensor.")

    def _problems_of_cast(self, cast: _Cast, *, is_rule: bool) -> Iterator[Problem]:
        method, found = cast.method, len(cast.inputs)
        if method.space == "factors" and not all(self.sources[one.place].packed for one in cast.inputs):
            told = "merges LoRA adapters with each other, not models: name adapters alone, or choose another method."
            yield Problem("error", f"'{method.name}' {told}")
        if method.base == "required" and cast.base is None:
            what = "merges task vectors" if method.space == "deltas" else "merges a model into a base"
            yield Problem(
                "error", f"'{method.name}' {what}: pass base_model=, the model the others were fine-tuned from."
            )
        if not found:
            yield Problem("error", f"'{method.name}' has no models to merge: all of them are the base.")
        elif not method.takes(found):
            beside = "" if method.base == "ignored" else " beside the base"
            yield Problem("error", f"'{method.name}' takes {method.number_of_models}{beside}; found {found}.")
        merged = {self.refs.index(model) for model in self.recipe.merged}
        unlisted = [one for one in cast.inputs if one.place not in merged]
        if unlisted and not is_rule and "weight" in method.parameters and "weight" not in self.recipe.parameters:
            label = self.sources[unlisted[0].place].label
            yield Problem(
                "error",
                f"'{method.name}' has no base: '{label}' would be one more model, and it has no weight. "
                "List it under models: with its weight, or drop base_model.",
            )


def _common_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    """The smallest dtype that holds all inputs."""
    return reduce(torch.promote_types, {spec.dtype for spec in specs})


def _lay_out(
    specs: Mapping[str, TensorSpec], max_shard_size: int | str, folders: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Distribute the tensors over files; in each file the widest dtypes come first, so that all stay aligned.

    Tensors of further modules lie in a file in the module's folder.
    """
    further: dict[str, list[str]] = {}
    for name in specs:
        if holders := [folder for folder in folders if name.startswith(f"{folder}/")]:
            further.setdefault(f"{max(holders, key=len)}/{SINGLE_FILE}", []).append(name)
    apart = {name for names in further.values() for name in names}
    if isinstance(max_shard_size, int) and max_shard_size <= 0:
        raise OutputError(f"max_shard_size should be bytes or a size such as '5GB'; found {max_shard_size}.")
    try:
        split = split_state_dict_into_shards_factory(
            {name: spec for name, spec in specs.items() if name not in apart},
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError:
        raise OutputError(
            f"max_shard_size should be bytes or a size such as '5GB'; found {max_shard_size!r}."
        ) from None
    return {
        file: tuple(sorted(names, key=lambda name: -specs[name].dtype.itemsize))
        for file, names in {**split.filename_to_tensors, **further}.items()
        if names or not further
    }
