"""What a plan is: every output tensor, its inputs, its method and plain numbers; sizes; problems.

It can be printed, saved and tested without weights. `planner` makes it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch

from hf_merge.errors import PlanError
from hf_merge.forms import Form
from hf_merge.method import get_method
from hf_merge.recipe import Recipe
from hf_merge.types import Ref, TensorSpec

MAX_SHARD_SIZE = "5GB"
SINGLE_FILE = "model.safetensors"
TILE = 1 << 18
"""Elements that an elementwise method sees at a time: small enough for the caches, large enough for torch."""

DEVICE_TILE = 1 << 24
"""The same on an accelerator: large enough that starting its kernels costs nothing beside their arithmetic."""

_SHARING = 8
"""How many tensors have tiles of full size at a time; more share their room, so that many models take no more of it."""

RATES = {"network": 100e6, "disk": 1e9}
"""Bytes a second that estimates of time take for granted."""

MAX_WORKERS = 8
"""More would wait for the disk, and each has tensors in memory."""


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

    @property
    def text(self) -> str:
        """The message with the names of some tensors."""
        shown = ", ".join(self.tensors[:4]) + (f" and {len(self.tensors) - 4} more" if len(self.tensors) > 4 else "")
        return self.message + (f" Tensors: {shown}." if shown else "")

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


EXPERTS = "experts/"
"""How the names of all begin that is kept for task experts."""
SHARED = "shared"
"""What stands in the place of a task for what all of them share."""


def kept_for(task: str) -> str:
    """Return how the names of all begin that is kept for a task."""
    return f"{EXPERTS}{task}/"


def kept_as(task: str, tensor: str, field: str) -> str:
    """Name what is kept of a tensor for a task, beside the tensors of the backbone."""
    return f"{kept_for(task)}{tensor}:{field}"


@dataclass(frozen=True)
class Tasks:
    """The tasks of a merge with task experts.

    Attributes:
        names: of the tasks.
        models: of which model each is.
        apart: tensors that are not merged: of one task each, or of the base alone.
    """

    names: tuple[str, ...]
    models: tuple[Ref, ...]
    apart: frozenset[str]


class Input(NamedTuple):
    """A tensor of a model.

    Attributes:
        model: which of the plan's models.
        name: of the tensor there.
    """

    model: int
    name: str


@dataclass(frozen=True)
class Step:
    """How one output tensor comes about.

    Attributes:
        name: of the tensor in the output.
        method: name of the method, or None for a tensor that is not a float: all inputs must agree.
        inputs: what is merged.
        base: the base's tensor, if the method uses one.
        settings: the method's parameters as plain numbers for this tensor.
        spec: shape and dtype that are written.
        device: where it is computed.
        measured: by the name of a statistic, where each model has it: the model's place, and the name there.
        known: what the first pass found, once that was made: the method's numbers over the whole model.
        form: in which task experts are kept, of a method that has these.
        experts: for each task by the name of a field of that form, as what it is written.
        shared: as what the vector is written that all task experts share, if the form needs one.
    """

    name: str
    method: str | None
    inputs: tuple[Input, ...]
    base: Input | None
    settings: Mapping[str, Any]
    spec: TensorSpec
    device: str = "cpu"
    known: Mapping[str, Any] | None = None
    measured: Mapping[str, tuple[Input, ...]] = field(default_factory=dict)
    form: Form | None = None
    experts: tuple[Mapping[str, str], ...] = ()
    shared: str | None = None

    @cached_property
    def outputs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of all that it gives: its tensor, and what is kept for task experts."""
        if self.form is None:
            return {self.name: self.spec}
        kept = self.form.fields(self.spec)
        shared = {} if self.shared is None else {self.shared: self.spec}
        experts = {name: kept[key] for names in self.experts for key, name in names.items()}
        return {self.name: self.spec, **shared, **experts}

    @property
    def reads(self) -> tuple[Input, ...]:
        """All that is read, the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


@dataclass(frozen=True)
class FirstPass:
    """Tensors that are read beforehand, as a method needs numbers over all of them.

    Attributes:
        method: whose numbers they are.
        numbers: their names.
        steps: of the tensors that are read, in order.
        tensors: names of those that the numbers are for.
        bytes_read: of the inputs, each read once; to find a threshold they are read two or three times.
    """

    method: str
    numbers: tuple[str, ...]
    steps: tuple[Step, ...]
    tensors: tuple[str, ...]
    bytes_read: int

    def __str__(self) -> str:
        what = f"{' and '.join(self.numbers)} of {self.method}"
        return f"{what} over {len(self.steps)} tensors, {format_bytes(self.bytes_read)}"


@dataclass(frozen=True)
class ModelFacts:
    """What headers, config and card say of a model or an adapter.

    Attributes:
        name: how messages call it.
        architecture: its class in transformers, if config.json names one.
        tensors: how many it has.
        size: of its weights, in bytes, as they are stored.
        dtype: that most of these bytes have.
        vocabulary: how many tokens config.json says that it has.
        tied: whether its head is tied to its embeddings; None where that is not said.
        quantised: by what.
        licence: as its card says.
        gated: whether the Hub asks for consent first.
        custom_code: whether its config names code of its own, which hf_merge copies and does not run.
        revision: the commit on the Hub.
        download: bytes that a merge fetches of it, the rest being here or not needed.
    """

    name: str
    architecture: str | None
    tensors: int
    size: int
    dtype: str | None
    vocabulary: int | None
    tied: bool | None
    quantised: str | None
    licence: str
    gated: bool
    custom_code: bool
    revision: str | None
    download: int

    def __str__(self) -> str:
        told = [
            self.architecture,
            f"{self.tensors} tensors",
            self.dtype,
            format_bytes(self.size),
            None if self.vocabulary is None else f"{self.vocabulary} tokens",
            {True: "tied", False: "untied", None: None}[self.tied],
            self.quantised and f"quantised by {self.quantised}",
            f"licence {self.licence}",
            "gated" if self.gated else None,
            "custom code" if self.custom_code else None,
            self.revision and f"commit {self.revision[:12]}",
        ]
        return f"{self.name}: {', '.join(one for one in told if one)}"


@dataclass(frozen=True)
class Plan:
    """What a merge will do, decided from headers alone.

    Attributes:
        recipe: what was asked.
        models: every model; steps refer to them by place.
        donor: the place of the model that gives config, tokenizer and the set of tensors.
        config: the output's config.json.
        steps: one for each output tensor, in the donor's order.
        shards: names of the output files, each with its tensors in the order of the file.
        stacks: for each stack of layers that is rearranged the model and the layer there that each layer is of.
        problems: what was found.
        bytes_read: of all inputs, each read once, and once more by a first pass.
        peak_memory: bytes of working memory, an upper estimate.
        facts: what is known of every model, if `hf_merge.plan` was asked.
        seconds: estimates of what takes time, by what takes it: `network`, `disk`, `arithmetic`.
        budgets: bytes of working memory that all tensors together may take at a time, by device; no bound for others.
        adapter: what is written of it as an adapter, in words; nothing for a model.
        passes: what is read before the first tensor is merged.
        tasks: of a merge with task experts.
    """

    recipe: Recipe
    models: tuple[Ref, ...]
    donor: int
    config: Mapping[str, Any]
    steps: tuple[Step, ...]
    shards: Mapping[str, tuple[str, ...]]
    problems: tuple[Problem, ...]
    bytes_read: int
    peak_memory: int
    stacks: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    facts: tuple[ModelFacts, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    budgets: Mapping[str, int] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[FirstPass, ...] = ()
    tasks: Tasks | None = None

    def layers(self, name: Callable[[Ref], str] = str) -> list[str]:
        """Say where rearranged layers come from: `model.layers: 48, like 0-23 of org/a, 8-31 of org/b`."""
        return [f"{stack.rstrip('.')}: {len(origins)}, like {', '.join(self._runs(origins, name))}"
                for stack, origins in self.stacks.items()]  # fmt: skip

    def _runs(self, origins: Sequence[tuple[int, int]], name: Callable[[Ref], str]) -> Iterator[str]:
        for _, run in groupby(enumerate(origins), lambda item: (item[1][0], item[1][1] - item[0])):
            layers = [origin for _, origin in run]
            (model, first), (_, last) = layers[0], layers[-1]
            yield (
                f"{first}-{last} of {name(self.models[model])}"
                if first < last
                else f"{first} of {name(self.models[model])}"
            )

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every output tensor, those of task experts among them."""
        return {name: spec for step in self.steps for name, spec in step.outputs.items()}

    @cached_property
    def model_specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor of the model itself."""
        return {step.name: step.spec for step in self.steps}

    @cached_property
    def by_file(self) -> tuple[Step, ...]:
        """The steps in the order of the files, so that each file is whole before many others are begun."""
        place = {name: index for index, names in enumerate(self.shards.values()) for name in names}
        return tuple(sorted(self.steps, key=lambda step: place.get(step.name, len(place))))

    @cached_property
    def bytes_written(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def bytes_downloaded(self) -> int:
        """How much comes from the Hub, as far as the facts are known."""
        return sum(fact.download for fact in self.facts)

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype of most of the written bytes, as config.json states it."""
        return most_common_dtype(step.spec for step in self.steps)

    def check(self) -> Plan:
        """Return the plan if it can be executed.

        Raises:
            PlanError: it lists every error, each with its fix.
        """
        if self.errors:
            raise PlanError("\n".join(problem.text for problem in self.errors), self.problems)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "recipe": json.loads(json.dumps(self.recipe.to_dict(), default=str)),
            "models": [str(model) for model in self.models],
            "config_and_tokenizer_from": str(self.models[self.donor]),
            "tensors": [_step_to_dict(step) for step in self.steps],
            "first_passes": [
                {"method": one.method, "numbers": one.numbers, "tensors": one.tensors, "bytes_read": one.bytes_read}
                for one in self.passes
            ],
            "shards": {name: list(tensors) for name, tensors in self.shards.items()},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "budgets": dict(self.budgets),
            "bytes_downloaded": self.bytes_downloaded,
            "seconds": dict(self.seconds),
            "facts": [vars(fact) for fact in self.facts],
            "problems": [vars(problem) for problem in self.problems],
            **({"adapter": dict(self.adapter)} if self.adapter else {}),
        }

    def fingerprint(self) -> str:
        """Identify what will be written: two plans of the same fingerprint lay out the same files.

        The number of a device does not count, its kind does: a sum may differ in its last bit.
        """
        content = {key: value for key, value in self.to_dict().items() if key in ("recipe", "tensors", "shards")}
        content["tensors"] = [{**each, "device": each["device"].partition(":")[0]} for each in content["tensors"]]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def __str__(self) -> str:
        return "\n".join(_describe(self))


def tile_of(step: Step, tile: int = TILE) -> int:
    """Return how many elements of a step its method sees at a time: some, whole rows, or all.

    Beyond `_SHARING` tensors, these share the room of so many. A tile of a mask with a bit for each element is whole
    bytes.
    """
    share = max(1, tile * _SHARING // max(len(step.reads), _SHARING))
    method = get_method(str(step.method))
    if method.tiled(step.settings):
        return share // 8 * 8 or share
    if method.by_rows(step.settings) and len(step.spec.shape) > 1 and step.spec.numel:
        row = step.spec.numel // step.spec.shape[0]
        return row * max(1, share // row)
    return max(step.spec.numel, 1)


def working_memory(step: Step, tile: int = TILE) -> int:
    """Estimate the bytes that computing a step in tiles of so many elements takes beside its inputs and its output."""
    if step.method is None:
        return 0
    method = get_method(step.method)
    elements = min(step.spec.numel, tile_of(step, tile))
    temporaries = (2 * len(step.inputs) + 4) * (2 if method.wide else 1)
    return elements * (len(step.reads) + temporaries) * compute_dtype([step.spec.dtype]).itemsize


def memory_on_device(step: Step) -> int:
    """Estimate the bytes that computing a step takes on its device: inputs and temporaries, in float32 or float64.

    An accelerator holds the inputs of a method that reads them several times, so that they cross the bus once.
    """
    if step.method is None or torch.device(step.device).type == "cpu":
        return working_memory(step)
    method, numel = get_method(step.method), step.spec.numel
    several = method.reductions and numel > tile_of(step, DEVICE_TILE)
    held = len(step.reads) * numel * compute_dtype([step.spec.dtype]).itemsize if several else 0
    return working_memory(step, DEVICE_TILE) + held


def default_workers() -> int:
    """How many tensors are worked on at a time: as many as torch would use threads, within reason."""
    return min(torch.get_num_threads(), MAX_WORKERS)


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of arithmetic: float32, or float64 where a float64 takes part."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def most_common_dtype(specs: Iterable[TensorSpec]) -> torch.dtype | None:
    """The float dtype that most bytes are written in."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs:
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] += spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


_ALWAYS_TOLD = ("name", "method", "inputs", "base", "settings", "spec", "device")


def _step_to_dict(step: Step) -> dict[str, Any]:
    spec = {"shape": list(step.spec.shape), "dtype": str(step.spec.dtype).removeprefix("torch.")}
    said = {name: getattr(step, name) for name in _ALWAYS_TOLD}
    kept = {"form": repr(step.form), "experts": step.experts, "shared": step.shared} if step.form else {}
    return {**said, "spec": spec, **({"measured": step.measured} if step.measured else {}), **kept}


def _describe(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan for people."""
    copied = "as they are" if plan.tasks else "copied, all models agree"
    methods = Counter(step.method or copied for step in plan.steps)
    count = len(plan.recipe.merged)
    yield f"Merge of {count} model{'s' * (count != 1)} by {plan.recipe.merge_method}"
    rows = {
        "models": ", ".join(map(str, plan.recipe.merged)),
        **(
            {"stages": ", ".join(f"{s.name} ({s.merge_method})" for s in plan.recipe.stages)}
            if plan.recipe.stages
            else {}
        ),
        "base": str(plan.recipe.base_model or "none"),
        "config from": str(plan.models[plan.donor]),
        "tensors": f"{len(plan.steps)} ({', '.join(f'{count} {name}' for name, count in methods.items())})",
        **({"layers": "; ".join(plan.layers())} if plan.stacks else {}),
        "dtype": str(plan.dtype).removeprefix("torch."),
        **({"download": format_bytes(plan.bytes_downloaded)} if plan.bytes_downloaded else {}),
        **({"first pass": "; ".join(map(str, plan.passes))} if plan.passes else {}),
        "read": format_bytes(plan.bytes_read),
        **_written_in_words(plan),
        "memory": f"about {format_bytes(plan.peak_memory)} of working memory",
        "devices": ", ".join(_devices_in_words(plan)),
        **({"time": _time_in_words(plan.seconds)} if plan.seconds else {}),
        "problems": "none" if not plan.problems else str(len(plan.problems)),
    }
    yield from (f"  {name + ':':<13}{value}" for name, value in rows.items())
    yield from (f"    {problem}" for problem in plan.problems)
    if plan.facts:
        yield "  sources:"
        yield from (f"    {fact}" for fact in plan.facts)


def _written_in_words(plan: Plan) -> dict[str, str]:
    """Say what is written: files of weights, or an adapter."""
    if plan.adapter:
        return {key: value for key, value in plan.adapter.items() if isinstance(value, str)}
    if plan.tasks:
        return _experts_in_words(plan, plan.tasks)
    return {"write": f"{format_bytes(plan.bytes_written)} in {len(plan.shards)} file{'s' * (len(plan.shards) != 1)}"}


def _experts_in_words(plan: Plan, tasks: Tasks) -> dict[str, str]:
    """Say how large backbone and experts are."""
    sizes = {name: sum(spec.nbytes for key, spec in plan.specs.items() if key.startswith(kept_for(name)))
             for name in (SHARED, *tasks.names)}  # fmt: skip
    shared, written = sizes.pop(SHARED), format_bytes(plan.bytes_written)
    told = {"tasks": ", ".join(f"{name} ({format_bytes(size)})" for name, size in sizes.items())}
    told |= {"shared": format_bytes(shared)} if shared else {}
    backbone = format_bytes(plan.bytes_written - shared - sum(sizes.values()))
    return {**told, "write": f"{written}, of which {backbone} are the backbone"}


def _devices_in_words(plan: Plan) -> Iterator[str]:
    """Yield for each device what it computes, and how much of it may be used: `cuda:0: 3 tensors, 2 GB within 9 GB`."""
    for device in dict.fromkeys(step.device for step in plan.steps):
        sizes = [step.spec.nbytes for step in plan.steps if step.device == device]
        budget = f" within {format_bytes(plan.budgets[device])}" if device in plan.budgets else ""
        yield f"{device}: {len(sizes)} tensors, {format_bytes(sum(sizes))}{budget}"


def _time_in_words(seconds: Mapping[str, float]) -> str:
    """Say how long it takes: arithmetic goes on while files come."""
    total = max(seconds.get("network", 0), seconds["disk"] + seconds["arithmetic"])
    told = "less than a minute" if total < 60 else f"about {math.ceil(total / 60)} minutes"
    rates = [f"{rate} at {format_bytes(RATES[rate])}/s" for rate in RATES if seconds.get(rate)]
    return f"{told} ({', '.join([*rates, 'arithmetic as measured here'])})"


def format_bytes(count: float) -> str:
    """Write a number of bytes for people: `2.20 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
