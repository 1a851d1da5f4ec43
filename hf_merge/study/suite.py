"""The study's own models and images, for machines without a network: built once, cached, the same for a seed.

A model's folder gets its name when it is whole, so that an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import logging, tqdm

from hf_merge.errors import ParameterError
from hf_merge.study import training
from hf_merge.study.spec import spread
from hf_merge.study.tasks import EIGHT, THIRTY, Task, stream
from hf_merge.study.training import Effort

if TYPE_CHECKING:
    from transformers import ViTForImageClassification, ViTModel

logger = logging.get_logger(__name__)

SUITES = {"vision8": EIGHT, "vision30": THIRTY}
EFFORTS = {"vision8": Effort(), "vision30": Effort(pretrain_steps=2400, pretrain_batch=5)}
QUICK = Effort(width=96, pretrain_steps=300, pretrain_rate=3e-3, finetune_steps=150, finetune_rate=1.5e-3)
"""For tests: smaller, and trained for a minute or two."""


@dataclass(frozen=True)
class Suite:
    """A base and its fine-tunes on drawn images.

    Attributes:
        tasks: what is drawn, by name.
        effort: how large the models are, and how long they are trained.
        seed: of weights and images.
        folder: of the models: `base`, and one called as each task.
    """

    tasks: dict[str, Task]
    effort: Effort
    seed: int
    folder: Path

    @classmethod
    def of(cls, name: str, *, count: int | None = None, quick: bool = False, seed: int = 0,
           cache_dir: str | Path | None = None) -> Suite:  # fmt: skip
        """Say which suite it is; nothing is built.

        Args:
            name: `vision8` or `vision30`.
            count: only so many of its tasks, from all over the list; the base knows no others.
            quick: smaller models, trained for a shorter time.
            seed: of weights and images; 0 or more.
            cache_dir: the folder that suites lie in; beside the Hub's cache if not given.

        Raises:
            ParameterError: there is no such suite, or it has fewer tasks.
        """
        if name not in SUITES:
            raise ParameterError(f"There is no suite '{name}': it should be one of {', '.join(SUITES)}.")
        tasks = SUITES[name]
        if count is not None and not 2 <= count <= len(tasks):
            raise ParameterError(f"tasks should be between 2 and {len(tasks)} for {name}; found {count}.")
        if seed < 0:
            raise ParameterError(f"seed should be 0 or more; found {seed}.")
        tasks = dict(spread([*tasks.items()], count))
        effort = QUICK if quick else EFFORTS[name]
        root = Path(cache_dir).expanduser() if cache_dir else Path(constants.HF_HOME) / "hf_merge" / "study"
        told = json.dumps([[*tasks], asdict(effort), seed, FORMAT])
        return cls(tasks, effort, seed, root / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}")

    def build(self, *, workers: int | None = None) -> None:
        """Train what is not there yet.

        Args:
            workers: processes for the fine-tunes, each with one thread; as many as there are processors if not given.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            for left in self.folder.glob(".*.partial"):
                shutil.rmtree(left)
            if not (self.folder / "base").is_dir():
                self._train_base()
            missing = [name for name in self.tasks if not (self.folder / name).is_dir()]
            if missing:
                self._train_missing(missing, min(workers or _processors(), len(missing)))

    def _train_base(self) -> None:
        with training.calm(), tqdm(total=self.effort.pretrain_steps, desc="Training base", name=__name__) as bar:
            backbone = training.pretrain(self.tasks, self.effort, stream(self.seed, "base"), bar.update)
            self._save(
                _with_all_heads(backbone, [self._classifier(backbone, name) for name in self.tasks], [*self.tasks]),
                "base",
            )

    def _train_missing(self, names: list[str], workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        with tqdm(total=len(names), desc="Fine-tuning", name=__name__) as bar, \
                ProcessPoolExecutor(workers, mp_context=context) as pool:  # fmt: skip
            found = [pool.submit(_train_task, self._plain(), name) for name in names]
            try:
                for one in as_completed(found):
                    one.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def train_task(self, name: str) -> None:
        """Fine-tune the base on a task, in this process."""
        with training.calm():
            model = self._classifier(self._backbone(), name)
            training.finetune(model, self.tasks[name], self.tasks, self.effort, stream(self.seed, name), lambda: None)
            self._save(model, name)

    def _backbone(self) -> ViTModel:
        from transformers import ViTModel

        return ViTModel.from_pretrained(self.folder / "base", add_pooling_layer=False).eval()

    def _classifier(self, backbone: ViTModel, name: str) -> ViTForImageClassification:
        return training.with_prototypes(backbone, self.tasks[name], stream(self.seed, f"head {name}"))

    def _save(self, model: ViTForImageClassification, name: str) -> None:
        partial = self.folder / f".{name}.partial"
        training.save(model, partial)
        os.replace(partial, self.folder / name)

    def _plain(self) -> dict[str, Any]:
        """What another process makes the same suite of."""
        return {"tasks": [*self.tasks], "effort": asdict(self.effort), "seed": self.seed, "folder": str(self.folder)}


FORMAT = 1
"""Counted up when the same settings give other models."""


def _train_task(suite: dict[str, Any], name: str) -> None:
    tasks = {each: THIRTY[each] for each in suite["tasks"]}
    Suite(tasks, Effort(**suite["effort"]), suite["seed"], Path(suite["folder"])).train_task(name)


def _with_all_heads(
    backbone: ViTModel, heads: list[ViTForImageClassification], names: list[str]
) -> ViTForImageClassification:
    """Put the heads of all tasks on the base, one below the other: its classes are called task/class."""
    from transformers import ViTConfig, ViTForImageClassification

    labels = [f"{name}/{label}" for name, head in zip(names, heads, strict=True) for label in _classes(head)]
    config = ViTConfig(**{**backbone.config.to_dict(), "id2label": dict(enumerate(labels)),
                          "label2id": {label: number for number, label in enumerate(labels)}})  # fmt: skip
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(backbone.state_dict())
    model.classifier.load_state_dict(
        {part: torch.cat([head.classifier.state_dict()[part] for head in heads]) for part in ("weight", "bias")}
    )
    return model.eval()


def _classes(model: ViTForImageClassification) -> list[str]:
    return [*(model.config.id2label or {}).values()]


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
