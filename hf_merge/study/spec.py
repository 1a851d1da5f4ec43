"""What a study is of: a base, tasks with their models, heads and images, and methods. Read from YAML, checked.

base: org/base
tasks:
  - {name: cars, model: org/base-cars, dataset: {path: org/cars, split: test}}
methods:
  - {method: linear}
  - {name: task arithmetic, method: task_arithmetic, grid: {lambda: [0.2, 0.3, 0.4]}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from annotated_types import Ge, Len
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hf_merge.errors import ParameterError, RecipeError, did_you_mean
from hf_merge.method import get_method
from hf_merge.schema import Part
from hf_merge.study.tasks import THIRTY


class TextHead(Part):
    """A head made of the names of classes, by the text tower of a CLIP model.

    Attributes:
        model: the CLIP model: a folder or Hub id.
        templates: sentences with {} where a name goes; their features are averaged.
        classes: names in the order of the labels; those that the dataset's labels have if not given.
    """

    model: str
    templates: Annotated[tuple[str, ...], Len(1)] = ("a photo of a {}.",)
    classes: tuple[str, ...] = ()


class Dataset(Part):
    """Labelled images.

    Attributes:
        path: a file or folder, as `hf_merge.data` reads them, or a dataset on the Hub.
        name: of its configuration on the Hub.
        split: of a dataset on the Hub.
        limit: at most so many examples, the first ones.
        drawn: instead of a path, which of the study's own tasks; its images are drawn by the study's seed.
    """

    path: str | None = None
    name: str | None = None
    split: str = "test"
    limit: Annotated[int, Ge(10)] | None = None
    drawn: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Dataset:
        if (self.path is None) == (self.drawn is None):
            raise ValueError("should have one of path and drawn")
        if self.drawn is not None and self.drawn not in THIRTY:
            raise ValueError(f"names no drawn task: {self.drawn}.{did_you_mean(self.drawn, THIRTY)}")
        return self


class TaskEntry(Part):
    """A task.

    Attributes:
        name: of the task.
        model: its fine-tune: a folder or Hub id.
        dataset: its images; every fifth is for choosing coefficients, and the others are the test.
        head: made of text; the model's own head if not given.
    """

    name: Annotated[str, Len(1)]
    model: str
    dataset: Annotated[Dataset, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]
    head: TextHead | None = None


class MethodEntry(Part):
    """A method, and what is tried of it.

    Attributes:
        method: as `hf-merge methods` lists it.
        name: in the table; the method's if not given.
        parameters: of the method.
        grid: values of parameters: the best on the validation images of all tasks is taken.
    """

    method: str
    name: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, Annotated[tuple[Any, ...], Len(1)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _known(self) -> MethodEntry:
        get_method(self.method)
        if twice := set(self.parameters) & set(self.grid):
            raise ValueError(f"has {', '.join(sorted(twice))} in parameters and in grid: leave out one")
        return self

    @property
    def title(self) -> str:
        """What the table calls it."""
        return self.name or self.method

    def settings(self) -> list[dict[str, Any]]:
        """All parameters to try."""
        return [
            {**self.parameters, **dict(zip(self.grid, values, strict=True))} for values in product(*self.grid.values())
        ]


LAMBDAS = tuple(step / 20 for step in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20))
WIDE = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5)
OF_A_MEAN = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""For a method that averages the changes: what is best grows with the number of tasks."""


def _methods() -> tuple[MethodEntry, ...]:
    tried = [
        {"method": "linear", "name": "average"},
        {"method": "task_arithmetic", "grid": {"lambda": LAMBDAS}},
        {"method": "ties", "parameters": {"density": 0.2}, "grid": {"lambda": WIDE}},
        {"method": "dare_linear", "parameters": {"density": 0.1}, "grid": {"lambda": LAMBDAS}},
        {"method": "pcb", "grid": {"lambda": WIDE}},
        {"method": "fr", "grid": {"lambda": OF_A_MEAN}},
        {"method": "tsv_m", "grid": {"lambda": WIDE}},
        {"method": "iso_c", "grid": {"lambda": WIDE}},
        {"method": "wudi", "grid": {"lambda": WIDE}},
        {"method": "free", "parameters": {"density": 0.05, "budget": "tensor"}, "grid": {"lambda": WIDE}},
        {"method": "twin", "grid": {"lambda": (0.1, 0.2, 0.3, 0.4)}},
        {"method": "emr"},
        {"method": "tall", "grid": {"tall_mask_lambda": (0.2, 0.4, 0.6)}},
        {"method": "tsv_c"},
    ]
    return tuple(MethodEntry(**entry) for entry in tried)


class Study(Part):
    """A study; read one with `load`.

    Attributes:
        base: the model that the tasks' models were fine-tuned from.
        tasks: two or more.
        methods: what is compared; static methods and methods with task experts if not given.
        seed: of methods that draw.
    """

    base: str
    tasks: Annotated[tuple[TaskEntry, ...], Len(2)]
    methods: Annotated[tuple[MethodEntry, ...], Len(1)] = Field(default_factory=_methods)
    seed: Annotated[int, Ge(0)] = 0

    @model_validator(mode="after")
    def _names_differ(self) -> Study:
        for what, names in (
            ("task", [task.name for task in self.tasks]),
            ("method", [one.title for one in self.methods]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"has more than one {what} called {', '.join(twice)}: give each a name of its own")
        return self

    @classmethod
    def load(cls, given: str | Path | Mapping[str, Any]) -> Study:
        """Read a study.

        Raises:
            RecipeError: it cannot be read, or says what cannot be meant.
        """
        name = "The study" if isinstance(given, Mapping) else f"The study '{given}'"
        try:
            said = given if isinstance(given, Mapping) else yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        if not isinstance(said, Mapping):
            raise RecipeError(f"{name} should have base, tasks and methods; found a {type(said).__name__}.")
        try:
            return cls(**said)
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {each['msg']}" for each in error.errors())
            raise RecipeError(f"{name} cannot be meant: {told}.") from None

    def part(self, count: int) -> Study:
        """Return the same study of so many of its tasks, from all over the list.

        Raises:
            ParameterError: it has fewer.
        """
        if not 2 <= count <= len(self.tasks):
            raise ParameterError(f"tasks should be between 2 and {len(self.tasks)}; found {count}.")
        return self.model_copy(update={"tasks": tuple(spread(self.tasks, count))})


Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """Take so many of some items, from all over them; all if no number is given."""
    count = len(items) if count is None else count
    return [items[place * len(items) // count] for place in range(count)]
