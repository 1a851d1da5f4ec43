"""Run a study: every model on every task's images, methods with the coefficients that are best on validation images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.utils import logging, tqdm
from torch import Tensor

import hf_merge
from hf_merge.experts.merged import MergedExperts
from hf_merge.method import get_method
from hf_merge.study.images import Examples, Images, class_names, drawn, given, rows_of
from hf_merge.study.spec import MethodEntry, Study
from hf_merge.study.towers import Towers
from hf_merge.study.training import calm

logger = logging.get_logger(__name__)
LAMBDA = "lambda"


@dataclass(frozen=True)
class Outcome:
    """What one model, or one method, does on all tasks.

    Attributes:
        name: in the table.
        kind: `individual`, `experts` (one light expert for each task), `static` or `zero-shot`.
        right: for each task, whether each of its test images was told right, (n,) booleans.
        chosen: the parameters found on validation images.
        bytes_per_task: of all weights that are kept but heads, divided by the number of tasks.
        seconds: of merging, with the choice of parameters.
    """

    name: str
    kind: str
    right: Mapping[str, Tensor] = field(repr=False)
    chosen: Mapping[str, Any] = field(default_factory=dict)
    bytes_per_task: float = 0.0
    seconds: float = 0.0

    def accuracy(self, task: str) -> float:
        """Return the share of a task's test images that were told right."""
        return self.right[task].double().mean().item()

    @property
    def accuracies(self) -> list[float]:
        """All of them, in the order of the tasks."""
        return [self.accuracy(task) for task in self.right]

    @property
    def average(self) -> float:
        """Their mean."""
        return sum(self.accuracies) / len(self.right)


def run(study: Study, *, token: str | None = None, cache_dir: str | None = None,
        local_files_only: bool = False) -> list[Outcome]:  # fmt: skip
    """Measure a study's models and methods.

    Args:
        study: which.
        token, cache_dir, local_files_only: as from_pretrained takes them.

    Returns:
        The individual models first, then the methods in their order, and the base last.

    Raises:
        MergeError: models, images or methods that cannot be used.
    """
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    with calm(threads=1 if all(task.dataset.drawn for task in study.tasks) else None):
        return _Run(study, hub).outcomes()


class _Run:
    """The models and images of a study while it runs."""

    def __init__(self, study: Study, hub: Mapping[str, Any]):
        self.study = study
        names = {task.name: f"The dataset of task {task.name}" for task in study.tasks}
        rows = {task.name: rows_of(task.dataset, hub, names[task.name]) for task in study.tasks if task.dataset.path}
        classes = {task.name: class_names(task, rows.get(task.name)) for task in study.tasks if task.head}
        self.towers = Towers(study, hub, classes)
        self.images: dict[str, Images] = {}
        for task in study.tasks:
            if task.dataset.drawn:
                self.images[task.name] = drawn(task.dataset.drawn, study.seed)
            else:
                subject, prepare = self.towers.subjects[task.name], self.towers.preparations[task.name]
                self.images[task.name] = given(rows[task.name], subject, prepare, names[task.name])

    def outcomes(self) -> list[Outcome]:
        """Measure all of it."""
        towers, size = self.towers, _bytes(self.towers.base)
        individual = Outcome("individual", "individual", self._right(towers.tuned), bytes_per_task=size)
        zero_shot = Outcome("zero-shot", "zero-shot", self._right(towers.base), bytes_per_task=size / len(towers.tuned))
        with tqdm(self.study.methods, desc="Methods", name=__name__) as bar:
            merged = []
            for entry in bar:
                bar.set_description(entry.title)
                merged.append(self._measured(entry))
        return [individual, *merged, zero_shot]

    def _measured(self, entry: MethodEntry) -> Outcome:
        start = time.perf_counter()
        best, chosen = self._chosen(entry)
        seconds = time.perf_counter() - start
        count = len(self.towers.tuned)
        if isinstance(best, MergedExperts):
            weights = {task: best.reconstruct(task) for task in self.towers.tuned}
            kept = _bytes(best.backbone) + _bytes(best.shared) + sum(expert.nbytes for expert in best.experts)
            return Outcome(entry.title, "experts", self._right(weights), chosen, kept / count, seconds)
        return Outcome(entry.title, "static", self._right(best), chosen, _bytes(best) / count, seconds)

    def _chosen(self, entry: MethodEntry) -> tuple[Any, dict[str, Any]]:
        """Return what is best on the validation images, with its parameters; the first of equals."""
        if not entry.grid:
            return self._merge(entry, entry.parameters), {}
        found, score = None, -1.0
        for settings, merged in self._tried(entry):
            right = self._right(_by_task(merged, [*self.towers.tuned]), "validation")
            average = sum(each.double().mean().item() for each in right.values()) / len(right)
            logger.info("%s with %s: %.4f on validation images", entry.title, settings, average)
            if average > score:
                found, score = (merged, {name: settings[name] for name in entry.grid}), average
        assert found is not None
        return found

    def _tried(self, entry: MethodEntry) -> Iterator[tuple[dict[str, Any], Any]]:
        """Merge with each of the settings; a static method that differs in lambda only is merged once."""
        if [*entry.grid] == [LAMBDA] and not get_method(entry.method).experts:
            whole = self._merge(entry, {**entry.parameters, LAMBDA: 1.0})
            for settings in entry.settings():
                yield settings, {name: _between(base, whole[name], settings[LAMBDA])
                                 for name, base in self.towers.base.items()}  # fmt: skip
            return
        for settings in entry.settings():
            yield settings, self._merge(entry, settings)

    def _merge(self, entry: MethodEntry, parameters: Mapping[str, Any]) -> Any:
        """Merge by the library, as a user does."""
        base = {} if entry.method == "linear" else {"base_model": self.towers.base}
        return hf_merge.merge_state_dicts(
            self.towers.tuned, method=entry.method, seed=self.study.seed, **base, **parameters
        )

    def _right(self, weights: Any, split: str = "test") -> dict[str, Tensor]:
        """Tell which images of a split are told right, with the same weights for all tasks or each task's own."""
        own = next(iter(weights)) in self.towers.tuned
        if not own:
            self.towers.use(weights)
        right = {}
        for task, images in self.images.items():
            if own:
                self.towers.use(weights[task])
            examples: Examples = getattr(images, split)
            right[task] = torch.cat([self.towers.right(task, inputs, labels) for inputs, labels in examples])
        return right


def _by_task(merged: Any, tasks: list[str]) -> Any:
    return {task: merged.reconstruct(task) for task in tasks} if isinstance(merged, MergedExperts) else merged


def _between(base: Tensor, merged: Tensor, share: float) -> Tensor:
    return torch.lerp(base, merged, share) if base.is_floating_point() else base


def _bytes(weights: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
