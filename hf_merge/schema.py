"""The parts of a recipe: models, slices of layers, modules, rules. What each may say, and nothing about tensors."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from hf_merge.types import InMemory, Model, ModelRef, Number, Ref


def _as_entries(value: Any) -> Any:
    """Let a bare model stand for `{model: ...}`."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("should be a list of at least one model")
    bare = [isinstance(e, (str, ModelRef, InMemory)) or (isinstance(e, Mapping) and "path" in e) for e in value]
    return [{"model": entry} if plain else entry for entry, plain in zip(value, bare, strict=True)]


def _as_pattern(value: Any) -> str:
    try:
        re.compile(value)
    except (TypeError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"should be a regular expression ({error})") from None
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else () if value is None else (value,)


def one_of(part: Any, names: Sequence[str]) -> None:
    """Check that a part says its models in one way, and each of them once."""
    given = [name for name in names if getattr(part, name)]
    if not given:
        raise ValueError(f"names no models: it should have {' or '.join(names)}")
    if len(given) > 1:
        raise ValueError(f"has {' and '.join(given)}: write one of them")


Setting = Any
Pattern = Annotated[str, BeforeValidator(_as_pattern)]
DType = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda value: str(value).removeprefix("torch.")),
]


def _as_rank(value: Any) -> Any:
    if value == "sum":
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
        value >= 1 if isinstance(value, int) else 0 < value <= 1
    ):  # fmt: skip
        raise ValueError("should be a positive integer, a share of the energy in (0, 1], or 'sum'")
    return value


def _as_targets(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, (list, tuple)) or not listed or not all(isinstance(one, str) and one for one in listed):
        raise ValueError("should be a list of names of modules, such as q_proj")
    return tuple(listed)


RankOrSum = Annotated[Any, BeforeValidator(_as_rank)]
Names = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
"""A list of names, or one alone."""
Targets = Annotated[tuple[str, ...], BeforeValidator(_as_targets)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ModelEntry(Part):
    """A model and what is said of it alone.

    Attributes:
        model: which.
        layer_range: `[first, end)`, in slices only; all its layers if not given.
        parameters: they win over those of the recipe.
        statistics: files with what was measured of it on data, for methods that need it; see docs/measuring.md.
    """

    model: Model
    layer_range: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(1)]] | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    statistics: Annotated[tuple[Model, ...], BeforeValidator(_as_list)] = ()

    @field_validator("layer_range")
    @classmethod
    def _not_empty(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value and value[0] >= value[1]:
            raise ValueError("should be [first, end) with first < end")
        return value


class LayerScaling(Part):
    """LiNeS: task vectors grow with the depth of their layer (https://arxiv.org/abs/2410.17146).

    Attributes:
        alpha: what those of the first layer are multiplied by, and those of tensors outside of layers.
        beta: how much more it is at the last layer.
    """

    alpha: Number
    beta: Number

    def at(self, depth: float) -> float:
        """Return the factor at a depth of 0 (the first layer) to 1 (the last)."""
        return self.alpha + self.beta * depth


def _whole(entries: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
    seen: set[Ref] = set()
    for entry in entries:
        if entry.model in seen:
            raise ValueError(f"lists '{entry.model}' twice; give it a larger weight instead")
        seen.add(entry.model)
    if any(entry.layer_range for entry in entries):
        raise ValueError("takes whole models: write layer_range under slices: and sources:")
    return entries


def _distinct(entries: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
    layers = [(entry.model, entry.layer_range) for entry in entries]
    if twice := [model for i, (model, _) in enumerate(layers) if layers[i] in layers[:i]]:
        raise ValueError(f"lists the same layers of '{twice[0]}' twice; give it a larger weight instead")
    return entries


Sources = Annotated[tuple[ModelEntry, ...], BeforeValidator(_as_entries), AfterValidator(_distinct)]
Models = Annotated[tuple[ModelEntry, ...], BeforeValidator(_as_entries), AfterValidator(_whole)]


class Slice(Part):
    """Some layers of the output: as many as each of its sources gives.

    Attributes:
        sources: the models that are merged into these layers.
        base_model: if it is another than the recipe's.
        parameters: for these layers; those of a source win.
        residual_weight: MergeKit reads it and does nothing with it; so do we.
    """

    sources: Sources
    base_model: Model | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    residual_weight: Any = None


class Module(Part):
    """A part of the model, such as a tower, that is merged apart from the rest.

    Attributes:
        models: the models, all their layers.
        slices: or some of their layers.
        merge_method: the recipe's own if not given.
        parameters: for this part; those of a slice and of a model win.
        prefix: the names of its tensors begin so, or have it after a dot; the module's own name if not given.
    """

    models: Models = ()
    slices: tuple[Slice, ...] = ()
    merge_method: str | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    prefix: str | None = None

    @property
    def outline(self) -> tuple[Slice, ...]:
        """Its slices; models are one slice with all layers."""
        return self.slices or (Slice(sources=self.models),)

    @model_validator(mode="after")
    def _one_way(self) -> Module:
        one_of(self, ("models", "slices"))
        return self


class Rule(Part):
    """Another method for the tensors whose name matches.

    Attributes:
        pattern: a shell pattern for the whole name if it has `*`, `?` or `[`; otherwise a part of the name.
        merge_method: the recipe's own if not given.
        parameters: for these tensors; they win over those of the recipe and of its models.
        models: only these of the recipe's models (the base may be named too).
    """

    pattern: str
    merge_method: str | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    models: tuple[Model, ...] = ()

    def matches(self, name: str) -> bool:
        """Tell whether the rule is meant for the tensor of that name."""
        return fnmatch.fnmatchcase(name, self.pattern) if set("*?[") & set(self.pattern) else self.pattern in name
