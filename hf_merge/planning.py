"""Recipe + headers -> Plan: every output tensor, its inputs, its method and plain numbers; sizes; problems.

Nothing here reads a value of a tensor. A plan can be printed, saved and tested without weights.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from typing import Any, Literal

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from hf_merge.architecture import vocabulary_names
from hf_merge.errors import OutputError, PlanError
from hf_merge.method import MergeMethod, get_method
from hf_merge.recipe import Recipe, Rule
from hf_merge.schedule import UNSET, Layers, tensor_seeds
from hf_merge.types import InMemory, ModelRef, SourceLike, TensorSpec

MAX_SHARD_SIZE = "5GB"
TILE = 1 << 18
"""Elements that an elementwise method sees at a time: small enough for the caches, large enough for torch."""

MAX_WORKERS = 8
"""More would wait for the disk, and each has tensors in memory."""

Ref = ModelRef | InMemory


@dataclass(frozen=True)
class Problem:
    """Something found before anything was read.

    Attributes:
        severity: an `error` stops the merge, a `warning` does not.
        message: what was found, and what to do.
        tensors: which tensors it is about.
    """

    severity: Literal["error", "warning"]
    message: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.tensors[:4]) + (f" and {len(self.tensors) - 4} more" if len(self.tensors) > 4 else "")
        return f"{self.severity}: {self.message}" + (f" Tensors: {shown}." if shown else "")


@dataclass(frozen=True)
class Step:
    """How one output tensor comes about.

    Attributes:
        name: of the tensor, in the output and in every input.
        method: name of the method, or None for a tensor that is not a float: all inputs must agree.
        inputs: which of the plan's models are merged.
        base: which of the plan's models is the base, if the method uses one.
        settings: the method's parameters as plain numbers for this tensor.
        spec: shape and dtype that are written.
        device: where it is computed.
    """

    name: str
    method: str | None
    inputs: tuple[int, ...]
    base: int | None
    settings: Mapping[str, Any]
    spec: TensorSpec
    device: str = "cpu"


@dataclass(frozen=True)
class Plan:
    """What a merge will do, decided from headers alone.

    Attributes:
        recipe: what was asked.
        models: every model; steps refer to them by place.
        donor: the place of the model that gives config, tokenizer and the set of tensors.
        steps: one for each output tensor, in the donor's order.
        shards: names of the output files, each with its tensors in the order of the file.
        problems: what was found.
        bytes_read: of all inputs, each read once.
        peak_memory: bytes of working memory, an upper estimate.
    """

    recipe: Recipe
    models: tuple[Ref, ...]
    donor: int
    steps: tuple[Step, ...]
    shards: Mapping[str, tuple[str, ...]]
    problems: tuple[Problem, ...]
    bytes_read: int
    peak_memory: int

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every output tensor."""
        return {step.name: step.spec for step in self.steps}

    @property
    def bytes_written(self) -> int:
        return sum(step.spec.nbytes for step in self.steps)

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the written bytes, as config.json states it."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.specs.values():
            if spec.dtype.is_floating_point:
                sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype], default=None)

    def check(self) -> Plan:
        """Return the plan if it can be executed.

        Raises:
            PlanError: it lists every error, each with its fix.
        """
        if self.errors:
            raise PlanError("\n".join(str(problem) for problem in self.errors), self.problems)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "recipe": json.loads(json.dumps(self.recipe.to_dict(), default=str)),
            "models": [str(model) for model in self.models],
            "config_and_tokenizer_from": str(self.models[self.donor]),
            "tensors": [_step_to_dict(step) for step in self.steps],
            "shards": {name: list(tensors) for name, tensors in self.shards.items()},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "problems": [vars(problem) for problem in self.problems],
        }

    def fingerprint(self) -> str:
        """Identify what will be written: two plans of the same fingerprint lay out the same files."""
        content = {key: value for key, value in self.to_dict().items() if key in ("recipe", "tensors", "shards")}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def make_plan(
    recipe: Recipe,
    sources: Mapping[Ref, SourceLike],
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    workers: int | None = None,
    problems: Sequence[Problem] = (),
) -> Plan:
    """Decide how every output tensor comes about.

    Args:
        recipe: what is merged, and how.
        sources: the recipe's models, with the shapes and dtypes of their tensors.
        max_shard_size: bytes, or `"5GB"`.
        workers: how many tensors are worked on at a time, for the estimate of memory; see `default_workers`.
        problems: what was found before.
    """
    planner = _Planner(recipe, sources)
    steps = tuple(planner.step(name, spec) for name, spec in planner.donor.specs.items())
    return Plan(
        recipe=recipe,
        models=tuple(sources),
        donor=planner.donor_place,
        steps=steps,
        shards=_lay_out({step.name: step.spec for step in steps}, max_shard_size),
        problems=(*problems, *planner.problems()),
        bytes_read=sum(planner.bytes_read(step) for step in steps),
        peak_memory=(workers or default_workers()) * max((planner.memory(step) for step in steps), default=0),
    )


@dataclass(frozen=True)
class _Cast:
    """Who takes part in a method: the places of the models it merges, and of its base."""

    method: MergeMethod
    inputs: tuple[int, ...]
    base: int | None


class _Planner:
    """What holds for all tensors of a merge, and what is found on the way through them."""

    def __init__(self, recipe: Recipe, sources: Mapping[Ref, SourceLike]):
        self.recipe = recipe
        self.refs = list(sources)
        self.sources = list(sources.values())
        self.merged = tuple(self.refs.index(entry.model) for entry in recipe.models)
        self.own = dict(zip(self.merged, (entry.parameters for entry in recipe.models), strict=True))
        self.base = None if recipe.base_model is None else self.refs.index(recipe.base_model)
        self.donor_place = self.merged[0] if self.base is None else self.base
        self.donor = self.sources[self.donor_place]
        self.layers = Layers(self.donor.specs)
        self.dtype = getattr(torch, recipe.out_dtype or recipe.dtype or "", None)
        self.casts = {id(rule): self._cast(rule) for rule in (None, *recipe.rules)}
        self.matched: set[int] = set()
        self.lacking: dict[int, list[str]] = {}
        self.shapes: dict[int, list[str]] = {}
        self.dtypes: dict[int, list[str]] = {}

    def _cast(self, rule: Rule | None) -> _Cast:
        method = get_method((rule and rule.merge_method) or self.recipe.merge_method)
        chosen = tuple(self.refs.index(model) for model in rule.models) if rule and rule.models else self.merged
        if method.base != "ignored":
            return _Cast(method, tuple(i for i in chosen if i != self.base), self.base)
        # As in MergeKit, a base that is not listed is one more model to a method that has no base.
        unlisted = rule is None and method.count is None and self.base is not None and self.base not in chosen
        return _Cast(method, (*chosen, self.donor_place) if unlisted else chosen, None)

    def step(self, name: str, spec: TensorSpec) -> Step:
        """Plan one tensor of the donor."""
        rule = self.recipe.rule_for(name)
        self.matched.add(id(rule))
        cast = self.casts[id(rule)]
        if not spec.dtype.is_floating_point:
            return self._copy(name, spec, cast, rule)
        holders = tuple(i for i in cast.inputs if name in self.sources[i].specs)
        for i in set(cast.inputs) - set(holders):
            self.lacking.setdefault(i, []).append(name)
        if not holders or (len(holders) < len(cast.inputs) and self.recipe.missing == "base"):
            holders, cast = (self.donor_place,), _Cast(get_method("passthrough"), (self.donor_place,), None)
        specs = [self.sources[i].specs[name] for i in holders]
        self._compare(name, spec, dict(zip(holders, specs, strict=True)))
        everyone = specs if cast.base is None else [*specs, spec]
        written = TensorSpec(spec.shape, self.dtype or _common_dtype(everyone))
        return Step(
            name, cast.method.name, holders, cast.base, self._settings(cast.method, name, holders, rule), written
        )

    def _copy(self, name: str, spec: TensorSpec, cast: _Cast, rule: Rule | None) -> Step:
        """Plan a tensor of integers: the donor's, if all models that have it agree (old buffers come and go).

        A rule that names models asks these only.
        """
        asked = cast.inputs if rule and rule.models else (self.donor_place, *cast.inputs)
        holders = tuple(dict.fromkeys(i for i in asked if name in self.sources[i].specs)) or (self.donor_place,)
        self._compare(name, spec, {i: self.sources[i].specs[name] for i in holders})
        return Step(name, None, holders, None, {}, spec)

    def _compare(self, name: str, spec: TensorSpec, found: Mapping[int, TensorSpec]) -> None:
        for i, other in found.items():
            if other.shape != spec.shape:
                self.shapes.setdefault(i, []).append(f"{name} {list(other.shape)} instead of {list(spec.shape)}")
            if other.dtype.is_floating_point != spec.dtype.is_floating_point:
                self.dtypes.setdefault(i, []).append(f"{name} {other.dtype} instead of {spec.dtype}")

    def _settings(self, method: MergeMethod, name: str, models: Sequence[int], rule: Rule | None) -> dict[str, Any]:
        """Resolve every parameter of a method for one tensor."""
        depth = self.layers.depth(name)
        settings: dict[str, Any] = {}
        for parameter in method.parameters.values():
            whose = [self.own.get(i, {}) for i in models] if parameter.per_model else [{}]
            values = [self.recipe.setting(parameter.name, name, depth, own, rule) for own in whose]
            values = [parameter.default if v is UNSET else parameter.check(v, method.name) for v in values]
            settings[parameter.name] = values if parameter.per_model else values[0]
        if method.seeded:
            settings[method.seeded] = tensor_seeds(self.recipe.seed, name, models)
        return settings

    def bytes_read(self, step: Step) -> int:
        """Bytes of a step's inputs, its base among them."""
        places = {*step.inputs, *(() if step.base is None else (step.base,))}
        return sum(self.sources[i].specs[step.name].nbytes for i in places)

    def memory(self, step: Step) -> int:
        """Bytes that a step takes: to compute, and for inputs that are made in memory when they are read."""
        places = {*step.inputs, *(() if step.base is None else (step.base,))}
        made = [self.sources[i] for i in places if step.name in getattr(self.sources[i], "gathered", ())]
        return working_memory(step) + sum(source.specs[step.name].nbytes for source in made)

    def problems(self) -> Iterator[Problem]:
        """Yield all that was found, errors first."""
        for cast in self.casts.values():
            yield from self._problems_of_cast(cast)
        for i, source in enumerate(self.sources):
            yield from self._problems_of_model(i, source)
        for rule in self.recipe.rules:
            if id(rule) not in self.matched:
                yield Problem("warning", f"The rule '{rule.pattern}' matches no tensor.")

    def _problems_of_cast(self, cast: _Cast) -> Iterator[Problem]:
        method, found = cast.method, len(cast.inputs)
        if method.base == "required" and self.base is None:
            what = "merges task vectors" if method.space == "deltas" else "merges a model into a base"
            yield Problem(
                "error", f"'{method.name}' {what}: pass base_model=, the model the others were fine-tuned from."
            )
        if method.count is not None and found != method.count:
            beside = " beside the base" if method.base != "ignored" else ""
            yield Problem("error", f"'{method.name}' takes {method.count} model{beside}; found {found}.")
        if not found:
            yield Problem("error", f"'{method.name}' has no models to merge: all of them are the base.")
        unlisted = set(cast.inputs) - set(self.merged) - {self.base if self.recipe.rules else None}
        if unlisted and "weight" in method.parameters and "weight" not in self.recipe.parameters:
            yield Problem(
                "error",
                f"'{method.name}' has no base: '{self.donor.label}' would be one more model, and it has no weight. "
                "List it under models: with its weight, or drop base_model.",
            )

    def _problems_of_model(self, i: int, source: SourceLike) -> Iterator[Problem]:
        donor = self.donor.label
        if names := self.shapes.get(i):
            yield from self._problems_of_shapes(i, source, names)
        if names := self.dtypes.get(i):
            yield Problem(
                "error", f"'{source.label}' has floats where '{donor}' has none, or the reverse:", tuple(names)
            )
        if names := self.lacking.get(i):
            yield self._problem_of_lacking(source, tuple(names))
        if extra := tuple(name for name in source.specs if name not in self.donor.specs):
            yield Problem("warning", f"'{source.label}' has tensors that '{donor}' lacks; they are left out.", extra)
        small = tuple(
            name for name, spec in source.specs.items() if spec.dtype.itemsize == 1 and spec.dtype.is_floating_point
        )
        if small or "quantization_config" in source.config:
            yield Problem("error", f"'{source.label}' is quantised: dequantise it first (model.dequantize()).", small)
        kinds = [model.config.get("model_type") for model in (source, self.donor)]
        if None not in kinds and kinds[0] != kinds[1]:
            yield Problem("warning", f"'{source.label}' is a '{kinds[0]}' model, '{donor}' a '{kinds[1]}' model.")

    def _problems_of_shapes(self, i: int, source: SourceLike, names: Sequence[str]) -> Iterator[Problem]:
        """Yield other numbers of rows in embeddings and heads, which a tokenizer mends, apart from other shapes."""
        tables = set(vocabulary_names(self.donor.config, self.donor.specs))
        wide = {name for name in tables & source.specs.keys()
                if source.specs[name].shape[1:] == self.donor.specs[name].shape[1:]}  # fmt: skip
        vocabulary = tuple(text for text in names if text.split(" ")[0] in wide)
        others = tuple(text for text in names if text not in vocabulary)
        if vocabulary:
            fix = "set tokenizer_source: union, base or the model whose tokenizer the result should have."
            told = f"'{source.label}' has another vocabulary than '{self.donor.label}': {fix}"
            yield Problem("error", told, vocabulary)
        if others:
            fix = "merge models of one architecture and vocabulary, or set them apart by rules:"
            yield Problem("error", f"'{source.label}' has other shapes than '{self.donor.label}': {fix}", others)

    def _problem_of_lacking(self, source: SourceLike, names: tuple[str, ...]) -> Problem:
        found = f"'{source.label}' lacks tensors of '{self.donor.label}'"
        if self.recipe.missing == "error":
            fix = "set missing: base to keep the base's, or missing: skip-model to merge them without it."
            return Problem("error", f"{found}: {fix}", names)
        done = "kept as they are" if self.recipe.missing == "base" else "merged without it"
        return Problem("warning", f"{found}; they are {done}.", names)


def working_memory(step: Step) -> int:
    """Estimate the bytes that computing a step takes beside its inputs and its output."""
    if step.method is None:
        return 0
    elements = min(step.spec.numel, TILE) if get_method(step.method).elementwise else step.spec.numel
    held = len(step.inputs) + (step.base is not None)
    temporaries = 2 * len(step.inputs) + 4
    return elements * (held + temporaries) * compute_dtype([step.spec.dtype]).itemsize


def default_workers() -> int:
    """How many tensors are worked on at a time: as many as torch would use threads, within reason."""
    return min(torch.get_num_threads(), MAX_WORKERS)


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of arithmetic: float32, or float64 where a float64 takes part."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _common_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    """The smallest dtype that holds all inputs."""
    dtypes = [spec.dtype for spec in specs]
    quantised = any(dtype.itemsize == 1 for dtype in dtypes)  # reported as a problem; torch does not promote float8
    return dtypes[0] if quantised else reduce(torch.promote_types, dtypes)


def _lay_out(specs: Mapping[str, TensorSpec], max_shard_size: int | str) -> dict[str, tuple[str, ...]]:
    """Distribute the tensors over files; in each file the widest dtypes come first, so that all stay aligned."""
    if isinstance(max_shard_size, int) and max_shard_size <= 0:
        raise OutputError(f"max_shard_size should be bytes or a size such as '5GB'; found {max_shard_size}.")
    try:
        split = split_state_dict_into_shards_factory(
            dict(specs),
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
        for file, names in split.filename_to_tensors.items()
    }


def _step_to_dict(step: Step) -> dict[str, Any]:
    spec = {"shape": list(step.spec.shape), "dtype": str(step.spec.dtype).removeprefix("torch.")}
    return {**{f.name: getattr(step, f.name) for f in fields(step)}, "spec": spec}


def _describe(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan for people."""
    methods = Counter(step.method or "copied, all models agree" for step in plan.steps)
    yield f"Merge of {len(plan.recipe.models)} models by {plan.recipe.merge_method}"
    rows = {
        "models": ", ".join(str(entry.model) for entry in plan.recipe.models),
        "base": str(plan.recipe.base_model or "none"),
        "config from": str(plan.models[plan.donor]),
        "tensors": f"{len(plan.steps)} ({', '.join(f'{count} {name}' for name, count in methods.items())})",
        "dtype": str(plan.dtype).removeprefix("torch."),
        "read": format_bytes(plan.bytes_read),
        "write": f"{format_bytes(plan.bytes_written)} in {len(plan.shards)} file{'s' * (len(plan.shards) != 1)}",
        "memory": f"about {format_bytes(plan.peak_memory)} of working memory",
        "devices": ", ".join(
            f"{device}: {count} tensors" for device, count in Counter(s.device for s in plan.steps).items()
        ),
        "problems": "none" if not plan.problems else str(len(plan.problems)),
    }
    yield from (f"  {name + ':':<13}{value}" for name, value in rows.items())
    yield from (f"    {problem}" for problem in plan.problems)


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: `2.20 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
