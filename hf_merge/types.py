"""The words of signatures: what a merge method may take and give, and what a source says of a tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, field_validator
from torch import Tensor

T = TypeVar("T")


class Stack(tuple[Tensor, ...]):
    """The same elements of every model, one tensor each.

    A whole tensor (`start` 0) or a tile of it: a run of its elements in row-major order.

    Attributes:
        start: index of the first element in its tensor, or in the whole model if a reduction went over that.
        whole: how many elements its tensor has, also where a reduction goes over the whole model.
        base: the base model's weight for these elements, if the recipe has a base.
        measured: by name, what was measured of every model: for these elements, or for the whole tensor.
    """

    start: int
    whole: int
    base: Tensor | None
    measured: Mapping[str, Stack]

    def __new__(
        cls,
        tensors: Iterable[Tensor],
        *,
        start: int = 0,
        whole: int | None = None,
        base: Tensor | None = None,
        measured: Mapping[str, Stack] | None = None,
    ) -> Stack:
        stack = super().__new__(cls, tensors)
        stack.start, stack.base, stack.measured = start, base, measured or {}
        stack.whole = whole if whole is not None else stack[0].numel() if stack else 0
        return stack


Models: TypeAlias = Stack
"""The weights of every model, base excluded where the method has a `base` argument."""
Deltas: TypeAlias = Stack
"""Task vectors: every model's weight minus the base model's."""
Factors: TypeAlias = Stack
"""Low-rank changes: the factors of every LoRA adapter, packed as `ops.factors` says."""
Merged: TypeAlias = Tensor
"""The merged weight, the merged task vector, or merged factors."""


class Tiles(Protocol):
    """All tiles of one tensor, in order; may be iterated as often as a reduction needs."""

    def __iter__(self) -> Iterator[Stack]: ...


class PerModelMark:
    """Marks a parameter that has one value for each model."""


class SeedMark:
    """Marks the parameter through which a random method gets one 64-bit seed for each model."""


@dataclass(frozen=True)
class Reduced:
    """Marks an argument that is computed beforehand, over a whole tensor or over the whole model.

    `by(tiles, *, ...)` gets the tiles and, by name, the method's parameters and its earlier reductions. Over the model,
    the tiles are those of all tensors that the method merges with the same parameters, in the order of their names, as
    if they were one long vector: this is the first pass of a merge.

    Attributes:
        by: the function.
        over: `tensor` or `model`; where that depends on parameters, a function of them.
    """

    by: Any
    over: Literal["tensor", "model"] | Callable[..., Any] = "tensor"


@dataclass(frozen=True)
class Measured:
    """Marks an argument that was measured on data beforehand: one tensor of every model, keyed like its weights.

    Attributes:
        of: `entries`: a number for each entry of the weight, so that it has the weight's shape and is tiled with it;
            `inputs`: a square matrix over the inputs of the weight, see `inputs_of`; `outputs`: two rows over its
            outputs.
    """

    of: Literal["entries", "inputs", "outputs"]

    def fits(self, weight: tuple[int, ...], found: tuple[int, ...]) -> bool:
        """Tell whether a statistic of this shape may belong to a weight of that shape."""
        if self.of == "entries":
            return weight == found
        if self.of == "outputs":
            return len(found) == 2 and found[0] == 2 and found[1] in (weight[:1] + weight[-1:])
        return len(weight) > 1 and math.prod(found) == found[-1] ** 2 and inputs_of(weight, found) == found[-1]


def inputs_of(weight: tuple[int, ...], gram: tuple[int, ...]) -> int:
    """Return how many inputs a weight has to which a matrix over inputs of this shape belongs.

    The matrix is (in, in) for a weight (out, in, ...) whose further axes are flattened, as torch's Linear and
    convolutions have it, and (in, 1, in) for a weight (in, out), as the Conv1D of transformers has it.
    """
    return weight[0] if len(gram) == 3 else math.prod(weight[1:])


@dataclass(frozen=True)
class Each:
    """A default that holds for each model."""

    value: Any


Fisher: TypeAlias = Annotated[Stack, Measured("entries")]
"""The diagonal Fisher information of every model, entry by entry."""
Gram: TypeAlias = Annotated[Stack, Measured("inputs")]
"""X^T X / n of the inputs of a weight, for every model."""

Activations: TypeAlias = Annotated[Stack, Measured("outputs")]
"""Mean and root mean square of the outputs of a weight, for every model: (2, out)."""


def each(value: Any) -> Any:
    """Give every model the same default: `density: PerModel[Fraction] = each(1.0)`."""
    return Each(value)


Number = Annotated[float, AllowInfNan(False)]
Fraction = Annotated[float, Ge(0), Le(1)]
Margin = Annotated[float, Ge(0), Le(0.5)]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, AllowInfNan(False), Gt(0)]
NonNegative = Annotated[float, AllowInfNan(False), Ge(0)]
PerModel = Annotated[Sequence[T], PerModelMark()]
Seed = Annotated[Sequence[int], SeedMark()]

_RESCALE_WORDS = {True: "l1", False: "none", None: "none"}
Rescale = Annotated[
    Literal["l1", "density", "none"],
    BeforeValidator(lambda value: _RESCALE_WORDS[value] if value in (True, False, None) else value),
]
"""How the kept entries make up for the dropped ones; `true` and `false` are MergeKit's words for l1 and none."""


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64,
    "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""The dtypes of safetensors files that torch has."""
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
"""How safetensors files write torch's dtypes."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, known from a header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class SourceLike(Protocol):
    """What a plan may know of a source: everything but the values."""

    label: str
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    folders: tuple[str, ...]
    shared: Mapping[str, str]
    is_reference: bool
    packed: bool

    @property
    def statistics_specs(self) -> Mapping[str, Mapping[str, TensorSpec]]: ...

    @property
    def doubts(self) -> tuple[str, ...]: ...

    def bytes_read(self, name: str) -> int: ...

    def bytes_held(self, name: str) -> int: ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """A module or a mapping of names to tensors, handed over as an object. The same object is the same model."""

    value: Any
    label: str

    def __str__(self) -> str:
        return f"<{self.label}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemory) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class ModelRef(BaseModel):
    """A model on the Hub (`org/name`, `org/name@revision`) or in a local folder or file.

    Attributes:
        path: its id, folder or file.
        revision: branch, tag or commit, on the Hub.
        lora: PEFT adapters that are added to it.
        weight: of an adapter: how much of its change is added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    revision: str | None = None
    lora: tuple[ModelRef, ...] = ()
    weight: Number = 1.0

    @field_validator("lora", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else () if value is None else (value,)

    def __str__(self) -> str:
        own = f"{self.path}@{self.revision}" if self.revision else self.path
        own = own if self.weight == 1 else f"{self.weight:g}*{own}"
        return "+".join([own, *map(str, self.lora)])

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read `path`, `path@revision` or `base@revision+adapter@revision`, with any number of adapters.

        What exists on disk is a path, whatever it contains.

        Raises:
            ValueError: it is none of these.
        """
        if os.path.exists(text) or "+" not in text:
            return cls.parse_one(text)
        names: list[str] = []
        for word in text.split("+"):
            whole = f"{names[-1]}+{word}" if names else ""
            is_path = whole and not os.path.exists(names[-1]) and os.path.exists(whole)
            names[-1:] = [whole] if is_path else [*names[-1:], word]
        base, *adapters = [cls.parse_one(name) for name in names]
        return base.with_lora(*adapters)

    @classmethod
    def parse_one(cls, text: str) -> ModelRef:
        """Read `path` or `path@revision`; a `+` belongs to the path."""
        if os.path.exists(text):
            return cls(path=text)
        path, at, revision = text.partition("@")
        if not path or (at and not revision):
            raise ValueError(f"'{text}' is not a model: write a folder, 'org/name' or 'org/name@revision'")
        return cls(path=path, revision=revision or None)

    @property
    def parts(self) -> list[ModelRef]:
        """The model without its adapters, and the adapters."""
        return [self.with_lora(), *self.lora]

    def with_lora(self, *lora: ModelRef) -> ModelRef:
        """Return the same model with other adapters, or with none."""
        return self.model_copy(update={"lora": lora})


Ref: TypeAlias = ModelRef | InMemory
"""A model as a recipe names it."""


def as_model(value: Any) -> Ref:
    """Read a model as recipes name it: text, a path, `{path: .., revision: ..}` or `{model: .., lora: ..}`.

    `lora` is an adapter or a list of them; `{path: .., weight: ..}` adds that much of what one changes.
    """
    if isinstance(value, (str, os.PathLike)):
        return ModelRef.parse(os.fspath(value))
    if isinstance(value, Mapping) and "model" in value and set(value) <= {"model", "lora"}:
        return _with_lora(as_model(value["model"]), value.get("lora"))
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        named = ModelRef.parse_one(value["path"])
        return ModelRef(path=named.path, revision=value.get("revision") or named.revision)
    if isinstance(value, (ModelRef, InMemory)):
        return value
    raise ValueError("should be a folder, a Hub id, {path: .., revision: ..} or {model: .., lora: ..}")


def _with_lora(base: Any, lora: Any) -> Any:
    """Add MergeKit's `lora:` to a model, or a list of them."""
    if lora is None:
        return base
    adapters = [_as_adapter(one) for one in (lora if isinstance(lora, (list, tuple)) else [lora])]
    if not isinstance(base, ModelRef) or base.lora or None in adapters:
        raise ValueError("takes adapters under lora:, and they and their base should be folders or Hub ids")
    return base.with_lora(*(one for one in adapters if one))


def _as_adapter(value: Any) -> ModelRef | None:
    """Read an adapter: a model, or `{path: .., revision: .., weight: ..}`."""
    weight = 1.0
    if isinstance(value, Mapping) and "weight" in value:
        weight = value["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError("has an adapter whose weight is not a number")
        value = {key: part for key, part in value.items() if key != "weight"}
    adapter = as_model(value)
    if not isinstance(adapter, ModelRef) or adapter.lora:
        return None
    return adapter if weight == 1 else adapter.model_copy(update={"weight": float(weight)})


def _plain_model(model: ModelRef | InMemory) -> Any:
    """Write a model as text, or as a mapping where the text would be read as another model."""
    if isinstance(model, InMemory):
        return str(model)
    if str(model).count("+") == len(model.lora) and all(one.weight == 1 for one in model.lora):
        return str(model)
    base, *adapters = [part.model_dump(exclude_defaults=True) for part in model.parts]
    return {"model": base, "lora": adapters if len(adapters) > 1 else adapters[0]} if adapters else base


Model = Annotated[ModelRef | InMemory, BeforeValidator(as_model), PlainSerializer(_plain_model)]
"""A model in a recipe."""
