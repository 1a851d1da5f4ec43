"""A backbone with task experts, in memory: one model that runs with the weights of the task that its input is of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge import _compat
from hf_merge.adapters.modules import Layout
from hf_merge.errors import MergeError, ParameterError, SourceError, shown
from hf_merge.experts.features import mean_features
from hf_merge.experts.mixing import Group, RoutedOutput, Task, batch_size, grouped, lead, refuse_caches, rows
from hf_merge.experts.reading import Index, Kept, mixed, read_expert, read_shared
from hf_merge.experts.routers import Router
from hf_merge.experts.weights import Lent
from hf_merge.types import TensorSpec

_DEFAULT_LABELS = {0: "LABEL_0", 1: "LABEL_1"}
"""What a config.json that names no classes means."""


class RoutedModel(nn.Module):
    """A backbone that runs with a task's own weights and head; see `load_experts`.

    Attributes:
        model: the backbone, with the weights of `task`.
        router: says of which task an input is; None: the caller does.
        soft: whether the router's shares mix the experts, as in Twin-Merging, or the largest alone counts.
        folder: where it was loaded from; None if that was the Hub.
        index: what experts.json says.
        saved_router: the one that lies in the folder, as far as it was loaded or trained.
    """

    def __init__(
        self,
        model: Any,
        index: Index,
        layout: Layout,
        *,
        router: Router | None = None,
        folder: Path | None = None,
        missing: Sequence[str] = (),
    ):
        super().__init__()
        self.model, self.index, self.folder = model, index, folder
        self.router: Router | None = None
        self.soft = index.method == "twin"
        self.saved_router = router
        self.use_router(router)
        self._weights = Lent(model)
        self._names = _compat.Conversion(model).live(layout.tables.shapes)  # a head may be on top of the backbone
        self._layout = layout
        self._apart = {self._name(live[0]) for live in self._places(index.apart).values()}
        self._headless = {*missing}
        self._experts: dict[str, dict[str, Kept]] = {}
        self._shared: Mapping[str, Tensor] | None = None
        self._config = {key: getattr(model.config, key, None) for key in ("id2label", "label2id", "problem_type")}
        self._current: Task | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return [*self.index.tasks]

    @property
    def task(self) -> Task | None:
        """Which task's weights are in the model; None: the backbone's own."""
        return self._current

    @property
    def config(self) -> Any:
        """The model's config, with the classes of the task."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    def use_router(self, router: Router | None) -> RoutedModel:
        """Let a router say of which task an input is; it says too whether that is soft.

        Raises:
            SourceError: it knows other tasks.
        """
        if router is not None:
            if router.config.tasks != tuple(self.tasks):
                raise SourceError(
                    f"The router knows the tasks {', '.join(router.config.tasks)}, and the model has "
                    f"{', '.join(self.tasks)}: train one with hf_merge.train_router."
                )
            self.soft = router.config.soft
            router = router.to(self.device)
        self.router = router
        return self

    # ---- the weights of a task

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_task(self, task: Task | None) -> RoutedModel:
        """Put a task's weights and head into the model, or the backbone's own back; made anew, so that nothing drifts.

        Args:
            task: its name; a mapping of tasks to their shares in a mixture, backbone + sum_t share_t (weight of t -
                backbone), under the head of the largest share; None for the backbone.

        Raises:
            SourceError: there is no such task, or its expert does not belong to the backbone. The model is as it was,
                or where a weight could not be made the backbone's own.
            ParameterError: shares that cannot be meant.
        """
        if task == self._current:
            return self
        shares = self._shares(task)
        kept = {name: self._expert(name) for name in shares}
        first = lead(shares) if shares else None
        self._current = None  # as it is if anything goes wrong from here
        self._describe(None)
        names = {name for own in kept.values() for name in own}
        self._weights.put(names, lambda name, own: self._weight(name, own, kept, shares, str(first)))
        self._describe(first)
        self._current = task
        return self

    def _shares(self, task: Any) -> dict[str, float]:
        """Return the share of each task that has one."""
        if task is None or isinstance(task, str):
            return {} if task is None else {self.index.check(task): 1.0}
        if not isinstance(task, Mapping) or not task:
            raise ParameterError(f"A task is a name, or a mapping of names to shares; found {shown(task)}.")
        for name, share in task.items():
            self.index.check(name)
            if not isinstance(share, (int, float)) or not math.isfinite(share) or share < 0:
                raise ParameterError(f"The share of '{name}' should be a number, 0 or more; found {shown(share)}.")
        if not any(task.values()):
            raise ParameterError("All shares are 0: give one task a share, or set_task(None) for the backbone.")
        return {name: float(share) for name, share in task.items() if share}

    def _weight(
        self, name: str, own: Tensor, kept: Mapping[str, Mapping[str, Kept]], shares: Mapping[str, float], first: str
    ) -> Tensor:
        """Return a weight of a task, or of a mixture; heads and what else is not merged are those of its first task."""
        shared = self._shared_vector(name, own)
        held = {task: (kept[task][name], share) for task, share in shares.items() if name in kept[task]}
        if name in self._apart or shares == {first: 1.0}:
            return held[first][0].rebuild(own, shared) if first in held else own
        return mixed(held, own, shared)

    def _shared_vector(self, name: str, own: Tensor) -> Tensor | None:
        if self._shared is None:
            read = read_shared(self.index.folder)
            self._shared = {self._name(key): tensor for key, tensor in read.items()}
        found = self._shared.get(name)
        return None if found is None else found.to(own.device)

    def _describe(self, task: str | None) -> None:
        """Let config and model say what the classes of a task are."""
        told = self._config if task is None else self._classes(self.index.tasks[task])
        config = self.model.config
        for key, value in told.items():
            setattr(config, key, {int(k): v for k, v in value.items()} if key == "id2label" and value else value)
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = config.num_labels

    def _classes(self, told: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a task's own config says of its classes; a config that is silent means two."""
        if not any("ForImageClass" in one or "ForSequenceClass" in one or "ForTokenClass" in one
                   for one in told.get("architectures") or ()):  # fmt: skip
            return {**self._config, **{key: told[key] for key in self._config if key in told}}
        labels = told.get("id2label") or _DEFAULT_LABELS
        named = told.get("label2id") or {label: int(number) for number, label in labels.items()}
        return {"id2label": labels, "label2id": named, "problem_type": told.get("problem_type")}

    def _places(self, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Return the parameter of each tensor of the checkpoints; one that the backbone lacks is called as it is."""
        found = self._layout.live(names)
        return {name: found.get(name, (name,)) for name in names}

    def _name(self, name: str) -> str:
        """Return what a parameter of the backbone's class is called in the model."""
        named = self._names.get(name, name)
        return self._weights.name(named) or named

    def _expert(self, task: str) -> dict[str, Kept]:
        """Return what a task has, by the model's parameters; read once."""
        if task not in self._experts:
            read = read_expert(self.index, task, self._layout)
            named = {self._name(name): kept for name, kept in read.items()}
            self._check_expert(task, named)
            self._experts[task] = named
        return self._experts[task]

    def _check_expert(self, task: str, kept: Mapping[str, Kept]) -> None:
        """Refuse an expert of another backbone, and one without a head."""
        own = self._weights.tensors()
        for name, one in kept.items():
            if name not in own:
                raise SourceError(
                    f"The expert '{task}' changes '{name}', which {type(self.model).__name__} does not have: it "
                    "belongs to another backbone."
                )
            wanted = one.form.fields(TensorSpec(tuple(own[name].shape), own[name].dtype))
            held = {part: tuple(one.fields[part].shape) for part in wanted if part in one.fields and part != "whole"}
            wrong = [part for part, shape in held.items() if shape != wanted[part].shape]
            if wrong:
                raise SourceError(
                    f"The expert '{task}' has a {wrong[0]} of the shape {[*one.fields[wrong[0]].shape]} for '{name}', "
                    f"and the backbone's {[*own[name].shape]} takes {[*wanted[wrong[0]].shape]}: it belongs to another "
                    "backbone."
                )
        if lacking := sorted(self._headless - kept.keys()):
            raise SourceError(
                f"The task '{task}' has no '{lacking[0]}', and neither has the backbone: it has no head. Merge a model "
                "of the task that has one."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutedModel:
        """Move or cast the backbone, by `.to(..)`, `.half()` and others; the task's weights are made anew from it."""
        current = self._current
        self.set_task(None)
        super()._apply(fn, recurse)
        return self.set_task(current)

    # ---- running

    def forward(
        self,
        *args: Any,
        task: Task | Sequence[Task] | None = None,
        router_inputs: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> Any:
        """Run a batch.

        Args:
            *args: of the model.
            task: of the batch, which stays set; or one for each example. If None it is the one that was set; if none
                was, the router says it; without one the backbone runs.
            router_inputs: what the router's own encoder takes, if that is not what the model takes.
            **inputs: of the model.

        Returns:
            What the model returns; for several tasks in one batch a `RoutedOutput`, without gradients.

        Raises:
            SourceError: there is no such task.
            ParameterError: not as many tasks as examples; a cache of one task's weights for several tasks; no task,
                where the backbone has no head.
        """
        named = self._by_name(args, inputs)
        if task is None and self._current is None and self.router is not None:
            refuse_caches(named)
            task = self.route(router_inputs=router_inputs, **named)
        if task is None or isinstance(task, (str, Mapping)):
            if task is not None:
                self.set_task(task)
            self._check_head()
            return self.model(**named)
        return self._several(named, [*task])

    def _check_head(self) -> None:
        if self._current is None and self._headless:
            raise ParameterError(
                f"No task is set, and the backbone has no '{min(self._headless)}' of its own: say task= "
                f"({', '.join(self.tasks)}), or train a router with hf_merge.train_router."
            )

    def _by_name(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs of the model's forward by name."""
        if not args:
            return {**inputs}
        names = [*inspect.signature(self.model.forward).parameters]
        return {**dict(zip(names, args, strict=False)), **inputs}

    @torch.no_grad()
    def _several(self, inputs: Mapping[str, Any], tasks: list[Task]) -> Any:
        """Run the examples of each task together; the task that was set is set again.

        Without gradients: they would be computed later, when the weights are others.
        """
        count = batch_size(inputs, getattr(self.model, "main_input_name", None))
        if len(tasks) != count:
            raise ParameterError(f"task= has {len(tasks)} entries for {count} examples: one for each.")
        for task in tasks:
            self._shares(task)
        groups, before = grouped(tasks), self._current
        if len(groups) > 1:
            refuse_caches(inputs)
        outputs: list[Group] = []
        try:
            for task, places in groups:
                self.set_task(task)
                outputs.append((places, self.model(**rows(inputs, places, count))))
        finally:
            self.set_task(before)
        return outputs[0][1] if len(groups) == 1 else RoutedOutput([lead(task) for task in tasks], outputs)

    # ---- routing

    def route(self, *args: Any, router_inputs: Mapping[str, Any] | None = None, **inputs: Any) -> list[Task]:
        """Say of which task each example is: its name, or with `soft` the share of each task.

        Args:
            *args, router_inputs, **inputs: as of `forward`.

        Raises:
            MergeError: there is no router.
        """
        shares = self.probabilities(*args, router_inputs=router_inputs, **inputs)
        if not self.soft:
            return [self.tasks[place] for place in shares.argmax(1).tolist()]
        return [dict(zip(self.tasks, row, strict=True)) for row in shares.tolist()]

    @torch.no_grad()
    def probabilities(self, *args: Any, router_inputs: Mapping[str, Any] | None = None, **inputs: Any) -> Tensor:
        """Return how likely each example is of each task: (batch, tasks), in the order of `tasks`.

        Args:
            *args, router_inputs, **inputs: as of `forward`.

        Raises:
            MergeError: there is no router.
        """
        if self.router is None:
            raise MergeError("This model has no router: say task=, or train one with hf_merge.train_router.")
        if router_inputs is not None and self.router.encoder is None:
            raise ParameterError(
                "router_inputs= are for a router with an encoder of its own; this one reads the backbone."
            )
        named = self._by_name(args, inputs) if router_inputs is None else router_inputs
        return self.router(self.features_by(self.router.encoder, named))

    def features(self, *args: Any, **inputs: Any) -> Tensor:
        """Return the mean of the backbone's last hidden states for each example: (batch, width) in float32."""
        return self.features_by(None, self._by_name(args, inputs))

    @torch.no_grad()
    def features_by(self, encoder: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the features that an encoder, or if None the backbone, makes of inputs.

        Raises:
            ParameterError: the encoder does not take them.
        """
        if encoder is not None:
            try:
                return mean_features(encoder, inputs)
            except (ValueError, IndexError, TypeError, RuntimeError) as error:
                told = " ".join(str(error).split())[:200]
                raise ParameterError(
                    f"The router's encoder, a {type(encoder).__name__}, does not take these inputs ({told}): pass what "
                    "its own processor makes as router_inputs=, or say task=."
                ) from None
        current = self._current
        self.set_task(None)
        was_training = self.model.training
        try:
            return mean_features(self.model.eval(), inputs)
        finally:
            self.model.train(was_training)
            self.set_task(current)

    # ---- saving

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the backbone, the experts and the router into a folder that `load_experts` loads.

        Args:
            folder: to make. The files are those that the model was loaded from, beside them the router that it has now.
            overwrite: replace what is there.

        Returns:
            The folder.

        Raises:
            OutputExistsError: there is something already.
        """
        from hf_merge.experts.saving import save

        return save(self, Path(folder), overwrite=overwrite)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Publish it as one repository, which `load_experts` loads; see `hf_merge.push_to_hub`.

        Args:
            repo_id: `namespace/name`.
            **options: private, create_pr, revision, commit_message, exist_ok, token.

        Raises:
            OutputExistsError: there is a model already.
            PublishError: the Hub does not take it.
        """
        from hf_merge.experts.saving import publish

        return publish(self, repo_id, **options)
