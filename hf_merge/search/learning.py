"""AdaMerging: coefficients of task vectors, learnt on data without labels (https://arxiv.org/abs/2310.02575).

    merged[l] = base[l] + sum_k coefficient[l, k] * task vector_k[l]
    loss = sum over tasks of the mean entropy of what the merged model says of the task's data

Adam changes the coefficients, which stay in [0, 1]; with `filtered` the task vectors are those of AdaMerging++. What is
left is a recipe, by which `hf_merge.merge` writes the weights that were run last, bit for bit.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging, tqdm
from torch import Tensor, nn

from hf_merge.api import load_recipe, open_recipe
from hf_merge.data import Preparation, endless
from hf_merge.errors import ComputeError, MergeError, ParameterError, did_you_mean
from hf_merge.execute import with_first_pass
from hf_merge.method import get_method
from hf_merge.planning import Plan
from hf_merge.recipe import Recipe
from hf_merge.search.backbone import Backbone, Piece
from hf_merge.search.found import device_of, save_found
from hf_merge.search.heads import find_heads
from hf_merge.search.objectives import OBJECTIVES, finite, loss, run
from hf_merge.search.tasks import data_of, naming, tasks_of
from hf_merge.search.written import keeping_heads, named, with_weights
from hf_merge.sources import Source
from hf_merge.types import InMemory, Ref, Stack

logger = logging.get_logger(__name__)

DIGITS = 6
"""Of the coefficients in a recipe; what is run last is what the recipe says."""


@dataclass(frozen=True)
class Learnt:
    """Coefficients that were learnt.

    Attributes:
        recipe: with the coefficients in it: `hf_merge.merge(learnt.recipe, "merged")`.
        coefficients: of every task: a number, or one for each tensor by its name.
        log: the loss at each step, all of it and of each task.
        heads: the tensors that were not merged.
        models: of every task, the merged weights under the task's own head. All share one set of weights.
    """

    recipe: Recipe
    coefficients: Mapping[str, float | Mapping[str, float]]
    log: Sequence[Mapping[str, Any]] = field(repr=False)
    heads: tuple[str, ...]
    models: Mapping[str, Any] = field(repr=False)

    def save(self, output: str | os.PathLike[str]) -> Path:
        """Write the recipe to a YAML file, and the log beside it as `.jsonl`; return the path of the recipe."""
        return save_found(self.recipe, self.log, output)


def adamerging(
    models: Any,
    base_model: Any = None,
    data: Mapping[str, Any] | None = None,
    *,
    level: Literal["layer", "task"] = "layer",
    objective: Literal["entropy", "kl-to-experts", "features"] = "entropy",
    filtered: bool = False,
    density: float = 0.2,
    initial: float = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    batch_size: int = 16,
    batches_per_step: int = 1,
    seed: int = 0,
    heads: Sequence[str] | None = None,
    classes: Mapping[str, Sequence[int]] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str | torch.device | None = None,
    output: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **changes: Any,
) -> Learnt:
    """Learn how much of each model's task vector to add to the base, on data without labels.

        learnt = hf_merge.search.adamerging(
            {"pets": "org/pets", "cars": "org/cars"}, "org/base", {"pets": "images/pets", "cars": "images/cars"}
        )
        hf_merge.merge(learnt.recipe, "merged")

    Args:
        models: the fine-tunes: a mapping of tasks to models, a list (a task is called as its model, or as the last part
            of its path), or a recipe that names them and the base.
        base_model: the model that they were fine-tuned from.
        data: for each task examples; labels are not read. A file, a folder of images, a `datasets.Dataset`, or an
            iterable of rows or batches; see `hf_merge.data.read`.
        level: a coefficient for each tensor and task (`layer`), or for each task.
        objective: `entropy` of the predictions; `kl-to-experts`: be near to what the task's own model predicts, for
            language models and others without classes; `features`: be near to its last hidden states.
        filtered: AdaMerging++: of each task vector what TIES keeps.
        density: with `filtered`, the fraction of its entries.
        initial: all coefficients, at first.
        steps: of Adam.
        learning_rate: of Adam.
        batch_size: examples of a task in a batch.
        batches_per_step: of every task, whose losses are added up; the authors' code takes 2.
        seed: of the order of the data.
        heads: tensors that are not merged, by parts of their names or patterns; each task keeps its own. Found if not
            given, as those that differ in shape.
        classes: of a head that all tasks share, the classes of each task.
        dtype: in which task vectors are held.
        device: where the models run; an accelerator if there is one.
        output: a file for the recipe, with the log beside it.
        token, cache_dir, local_files_only: for models on the Hub.
        **changes: of the recipe: `missing=`, `keys=`, `out_dtype=`, ...

    Returns:
        The recipe, the coefficients, the losses, and the merged model under every task's head.

    Raises:
        ParameterError: coefficients, classes or heads that cannot be meant.
        DataError: data that cannot be read, is empty, or ends.
        MergeError: as `merge`.
    """
    _check(level, objective, initial, steps, learning_rate, batch_size, batches_per_step, density, dtype)
    tasks, base = tasks_of(models, base_model)
    given = data_of(tasks, data)
    if strangers := [task for task in classes or () if task not in tasks]:
        raise ParameterError(f"classes= names '{strangers[0]}', and the tasks are {', '.join(tasks)}.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    where = device_of(device)
    draft = _draft(tasks, base, filtered=filtered, density=density, seed=seed, **changes)
    refs = dict(zip(tasks, draft.merged, strict=True))
    loaders = {task: partial(_module, ref, hub, where) for task, ref in refs.items()}
    ready = _prepare(draft, loaders, hub, heads, judge=objective == "entropy", dtype=dtype, where=where)
    backbone = Backbone(ready.pieces, ready.shapes, level)
    modules, teachers = _run_on(backbone, loaders, ready.own_names, taught=objective != "entropy")
    streams = {
        task: endless(
            given[task], modules[task], Preparation(modules[task], ref, **hub), batch_size=batch_size, seed=seed + i,
            name=naming(task),
        )
        for i, (task, ref) in enumerate(refs.items())
    }  # fmt: skip
    learner = _Learner(backbone, modules, teachers, streams, objective, classes or {}, where)
    coefficients, log = learner.learn(initial, steps, learning_rate, batches_per_step)
    found = named(coefficients, backbone, tasks, ready.copies)
    learnt = Learnt(with_weights(ready.recipe, [*found.values()]), found, log, tuple(ready.heads), modules)
    if output is not None:
        learnt.save(output)
    return learnt


def _check(level: str, objective: str, initial: float, steps: int, rate: float, size: int, several: int,
           density: float, dtype: str) -> None:  # fmt: skip
    words = {"level": (level, ("layer", "task")), "objective": (objective, OBJECTIVES),
             "dtype": (dtype, ("float32", "bfloat16"))}  # fmt: skip
    for name, (value, known) in words.items():
        if value not in known:
            raise ParameterError(
                f"'{name}' should be {' or '.join(known)}; found {value!r}.{did_you_mean(str(value), known)}"
            )
    numbers = {"initial": (initial, 0 <= initial <= 1, "in [0, 1]"), "learning_rate": (rate, 0 < rate < math.inf,
               "above 0"), "density": (density, 0 < density <= 1, "in (0, 1]")}  # fmt: skip
    counts = {"steps": (steps, steps >= 1, "at least 1"), "batch_size": (size, size >= 1, "at least 1"),
              "batches_per_step": (several, several >= 1, "at least 1")}  # fmt: skip
    for name, (value, fits, words_of_range) in {**numbers, **counts}.items():
        if not fits:
            raise ParameterError(f"'{name}' should be {words_of_range}; found {value!r}.")


def _draft(tasks: Mapping[str, Any], base: Any, *, filtered: bool, density: float, seed: int, **changes: Any) -> Recipe:
    """The recipe without its coefficients."""
    method = "adamerging_pp" if filtered else "task_arithmetic"
    said = {"density": density} if filtered else {}
    return Recipe.load([*tasks.values()], method=method, base_model=base, seed=seed, **said, **changes)


@dataclass
class _Ready:
    """All that learning needs.

    Attributes:
        recipe: it keeps heads and what some models lack as they are.
        pieces: the tensors that are merged.
        shapes: of them.
        copies: names that are stored twice, with the other.
        own_names: of every task, what its checkpoint calls the tensors, where that is something else.
        heads: names.
    """

    recipe: Recipe
    pieces: list[Piece]
    shapes: dict[str, tuple[int, ...]]
    copies: Mapping[str, str]
    own_names: dict[str, dict[str, str]]
    heads: list[str]


def _prepare(
    draft: Recipe,
    loaders: Mapping[str, Callable[[], Any]],
    hub: Mapping[str, Any],
    heads: Sequence[str] | None,
    *,
    judge: bool,
    dtype: str,
    where: torch.device,
) -> _Ready:
    """Tell heads from the rest, and take the task vectors from the models."""
    tasks = list(loaders)
    plan, sources = open_recipe(draft, hub)
    by_model = dict(zip(plan.models, sources, strict=True))
    base = by_model[plan.models[plan.donor]]
    names = [step.name for step in plan.steps if step.spec.dtype.is_floating_point]
    experts = [by_model[ref] for ref in draft.merged]
    first = loaders[tasks[0]] if judge and heads is None else lambda: None
    found = find_heads(names, experts, base, heads, module=first())
    recipe = keeping_heads(draft, found, [*plan.specs], experts)
    plan, sources = open_recipe(recipe, hub)
    plan.check()
    pieces = _pieces(plan, sources, len(tasks), getattr(torch, dtype), where)
    moved = {task: any(bool(piece.deltas[i].any()) for piece in pieces) for i, task in enumerate(tasks)}
    if still := [task for task, has in moved.items() if not has]:
        raise ParameterError(f"The model of '{still[0]}' has no task vector: its weights are those of the base.")
    shapes = {name: tuple(spec.shape) for name, spec in plan.specs.items()}
    own = {task: _own_names(by_model[ref], shapes) for task, ref in zip(tasks, draft.merged, strict=True)}
    return _Ready(recipe, pieces, shapes, sources[plan.donor].shared, own, found)


def _own_names(source: Source, names: Iterable[str]) -> dict[str, str]:
    """Return what a model's own checkpoint calls tensors that are one there too, and called otherwise."""
    origins = {name: [inside for _, inside in source.origins(name)] for name in names if name in source.specs}
    return {name: found[0] for name, found in origins.items() if len(found) == 1 and found[0] != name}


def _module(ref: Ref, hub: Mapping[str, Any], where: torch.device) -> Any:
    """Load a model to run, in float32."""
    if isinstance(ref, InMemory):
        if not isinstance(ref.value, nn.Module):
            raise ParameterError(f"{ref} cannot be run: pass a module, or a folder or Hub id.")
        return copy.deepcopy(ref.value).float().to(where).eval()
    return load_recipe([ref], hub, name=ref.path, method="passthrough", dtype="float32").to(where).eval()


def _pieces(plan: Plan, sources: Sequence[Source], count: int, dtype: torch.dtype, where: torch.device) -> list[Piece]:
    """Read base and task vectors of every tensor that all models are merged into."""
    copies = sources[plan.donor].shared
    wanted = {step.name for step in plan.steps
              if step.method == plan.recipe.merge_method and len(step.inputs) == count
              and step.base is not None and step.name not in copies}  # fmt: skip
    method, pieces = get_method(plan.recipe.merge_method), []
    for step in with_first_pass(plan, sources, wanted.__contains__).steps:
        if step.name not in wanted or step.base is None:
            continue
        wide = torch.float64 if any(sources[one.model].specs[one.name].dtype == torch.float64 for one in step.reads) \
            else torch.float32  # fmt: skip
        base = sources[step.base.model][step.base.name].reshape(-1).to(wide)
        deltas = Stack([sources[one.model][one.name].reshape(-1).to(wide) - base for one in step.inputs])
        _refuse_nonfinite(step.name, [base, *deltas])
        if method.reductions:  # what is kept of each: the merge with all other weights 0
            units = [[float(i == k) for i in range(count)] for k in range(count)]
            deltas = [method.run(deltas, step.known or {}, {**step.settings, "weight": unit}) for unit in units]
        held = [delta.to(dtype if wide != torch.float64 else wide).to(where) for delta in deltas]
        pieces.append(Piece(step.name, base.clone().to(where), held, step.spec.dtype))
    return pieces


def _refuse_nonfinite(name: str, tensors: Sequence[Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ComputeError(f"'{name}' has NaN or Inf in one of the models: nothing can be learnt from it.")


def _run_on(
    backbone: Backbone, loaders: Mapping[str, Callable[[], Any]], own_names: Mapping[str, Mapping[str, str]], *,
    taught: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Load every task's model onto the shared weights; if `taught`, keep it as it was too, as the teacher."""
    modules, teachers = {}, {}
    for task, load in loaders.items():  # one after the other, so that there are never two backbones more
        modules[task] = load()
        if taught:
            teachers[task] = copy.deepcopy(modules[task])
        backbone.add(modules[task], own_names[task])
    _refuse_unplaced(backbone)
    return modules, teachers


def _refuse_unplaced(backbone: Backbone) -> None:
    """Tell of tensors that are merged and are in none of the models that run."""
    if not any(tensor.requires_grad for piece in backbone.pieces for tensor, _ in piece.homes):
        raise MergeError("None of the merged tensors is a weight of the models that run: are they of the base's class?")
    if unplaced := [piece.name for piece in backbone.pieces if not piece.homes]:
        logger.warning(
            "%d of %d merged tensors are in none of the models that run, so that nothing is learnt of them, such as "
            "'%s'.", len(unplaced), len(backbone.pieces), unplaced[0],
        )  # fmt: skip


class _Learner:
    """The steps of Adam."""

    def __init__(self, backbone: Backbone, modules: Mapping[str, Any], teachers: Mapping[str, Any],
                 streams: Mapping[str, Iterator[Any]], objective: str, classes: Mapping[str, Sequence[int]],
                 where: torch.device):  # fmt: skip
        self.backbone, self.modules, self.teachers = backbone, modules, teachers
        self.streams, self.objective, self.classes, self.where = streams, objective, classes, where

    def learn(self, initial: float, steps: int, rate: float, several: int) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the coefficients, rounded, and the losses; the models have the merge by these coefficients."""
        raw = torch.full(self.backbone.gradient.shape, initial, dtype=torch.float32)
        optimizer = torch.optim.Adam([raw], rate, betas=(0.9, 0.999))
        log: list[dict[str, Any]] = []
        for step in tqdm(range(steps), desc="Learning coefficients", name="hf_merge.search"):
            self.backbone.write(raw.clamp(0, 1))
            losses = {task: math.fsum(self.loss(task) for _ in range(several)) for task in self.modules}
            log.append({"step": step, "loss": math.fsum(losses.values()), "tasks": losses})
            raw.grad = (self.backbone.take_gradient() * ((raw >= 0) & (raw <= 1))).to(raw.dtype)
            optimizer.step()
        final = torch.round(raw.double().clamp(0, 1), decimals=DIGITS)
        self.backbone.close()
        self.backbone.write(final)
        return final, log

    def loss(self, task: str) -> float:
        """Add the gradient of a task's loss on its next batch; return the loss."""
        batch = next(self.streams[task]).to(self.where)
        try:
            with torch.no_grad():
                wanted = run(self.teachers[task], batch, self.objective) if self.teachers else None
            said = run(self.modules[task], batch, self.objective)
            found = loss(self.objective, said, wanted, batch, self.classes.get(task))
        except ComputeError as error:
            raise ComputeError(f"'{task}': {error}.") from None
        number = finite(found, f"'{task}'")
        found.backward()
        return number
