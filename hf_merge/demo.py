"""Merging, seen to work in a minute: train a small ViT and three fine-tunes of it on drawn images, merge, compare.

The setting is that of task arithmetic on CLIP (https://arxiv.org/abs/2212.04089), small. A base is trained on images of
all tasks, but in a generic style; each task draws in a style of its own, which the base only half understands. One
classifier over the classes of all tasks is trained with the base and frozen afterwards, as CLIP's text head is, so that
fine-tunes and merges share it. The accuracy on a task is that of the most likely among the classes of that task.

The coefficients of the merges come from first principles, for every seed the same, and no run searches for them. With
T task vectors that are nearly orthogonal and equally long, lambda = 1/sqrt(T) leaves the merge as far from the base as
each fine-tune is; the density and lambda of `ties` are its paper's (0.2 and 1); half of the entries is dropped by DARE.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging, tqdm
from torch import Generator, Tensor

import hf_merge
from hf_merge.errors import OutputExistsError, RecipeError
from hf_merge.study import families
from hf_merge.study.drawing import SIZE, Style
from hf_merge.study.tasks import GENERIC, Task
from hf_merge.study.training import calm, minimise, save

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

logger = logging.get_logger(__name__)

PRETRAIN_STEPS, PRETRAIN_RATE, PRETRAIN_BATCH = 240, 3e-3, 36  # the batch is per task
FINETUNE_STEPS, FINETUNE_RATE, FINETUNE_BATCH = 160, 1.5e-3, 40
ANCHOR_POOL, ANCHOR_BATCH = 256, 24  # the pool is per task
TEST_IMAGES = 400  # per task: the standard error of an accuracy is about 2 points, of an average a little above 1
MARKER = ".hf_merge_demo.json"
MERGES: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {"lambda": 1 / math.sqrt(3)},
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.5, "lambda": 1 / math.sqrt(3)},
}


@dataclass(frozen=True)
class Row:
    """A model and its accuracies, between 0 and 1."""

    name: str
    accuracies: dict[str, float]
    average: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        rows: the base, the fine-tunes, the merges.
        best: folder of the merge with the best average.
        output: folder of everything; the models that were merged are in its `models`.
        seconds: how long it took.
    """

    rows: list[Row]
    best: Path
    output: Path
    seconds: float

    def table(self) -> str:
        """Render the accuracies in percent, a line for each model."""
        cells = [["model", *TASKS, "average"]]
        cells += [[row.name, *(f"{100 * each:.1f}" for each in (*row.accuracies.values(), row.average))]
                  for row in self.rows]  # fmt: skip
        first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(rest, others, strict=True))])
            for name, *rest in cells
        )


def run_demo(output: str | Path = "hf_merge_demo", *, seed: int = 0) -> DemoResult:
    """Train a small vision model and three fine-tunes, merge them by several methods, and compare.

    Needs no network, and a minute or so on the CPU. A second run takes the models of the first and redoes the merges.

    Args:
        output: the folder to make: `models/base`, `models/<task>`, `merges/<method>`.
        seed: of the images, the training and the merges; 0 or more.

    Returns:
        Accuracies of all models. All of it is decided by the seed, on one machine.

    Raises:
        OutputExistsError: the folder holds something that the demo did not make.
        RecipeError: the seed is negative.
    """
    if seed < 0:  # the merges would refuse it too, but after the training
        raise RecipeError(f"'seed' should be greater than or equal to 0; found {seed}.")
    start = time.perf_counter()
    output = Path(output).expanduser()
    _claim(output)
    with calm():
        models = _trained_models(output, seed)
        tests = {task: _images(task, TEST_IMAGES, _generator(seed, "test")) for task in TASKS}
        rows = [_row("base", _load(models / "base"), tests)]
        rows += [_row(f"{task} fine-tune", _load(models / task), tests) for task in TASKS]
        merges = {method: _merge(models, output / "merges" / method, method, seed) for method in MERGES}
        merged = {method: _row(f"{method} merge", merge.load(), tests) for method, merge in merges.items()}
    best = max(merged, key=lambda method: merged[method].average)
    return DemoResult([*rows, *merged.values()], output / "merges" / best, output, time.perf_counter() - start)


def _merge(models: Path, output: Path, method: str, seed: int) -> hf_merge.MergedModel:
    """Merge the fine-tunes; this is all that a user of the library writes."""
    parameters = MERGES[method] if method == "linear" else {"base_model": models / "base", **MERGES[method]}
    fine_tunes = [models / task for task in TASKS]
    return hf_merge.merge(fine_tunes, output, method=method, seed=seed, overwrite=True, device_map="cpu", **parameters)


# ---- images


def _images(task: str, count: int, generator: Generator, style: Style | None = None) -> tuple[Tensor, Tensor]:
    """Draw images (count, 3, SIZE, SIZE) in [-1, 1] of a task, and their labels among all classes."""
    images, labels = TASKS[task].images(count, generator, style)
    return images, labels + _span(task).start


NUMBERS = ("one", "two", "three", "four", "five", "six")
TASKS = {
    "shapes": Task(("disk", "square", "triangle", "plus", "ring", "star"), families.shapes, Style(outlined=1.0)),
    "textures": Task(("stripes", "checker", "rings", "spokes", "zigzag", "blotches"), families.textures,
                     Style(inverted=0.5, contrast=(0.3, 0.8), light=(0.4, 0.8))),
    "counts": Task(NUMBERS, families.counts, Style(inverted=1.0)),
}  # fmt: skip
LABELS = [f"{name}/{each}" for name, task in TASKS.items() for each in task.classes]


def _span(task: str) -> slice:
    """The logits of a task."""
    first = LABELS.index(f"{task}/{TASKS[task].classes[0]}")
    return slice(first, first + len(TASKS[task].classes))


def _generic(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` images of each task in the style that the base is trained on."""
    images, labels = zip(*(_images(task, count, generator, GENERIC) for task in TASKS), strict=True)
    return torch.cat(images), torch.cat(labels)


# ---- training


def _trained_models(output: Path, seed: int) -> Path:
    """Return the folder of base and fine-tunes; train them if they are not there.

    The folder gets its name when its last file is there, so that an interrupted run leaves none.
    """
    models, partial = output / "models", output / ".models.partial"
    made_by = json.dumps({"seed": seed, "version": hf_merge.__version__})
    if (models / MARKER).is_file() and (models / MARKER).read_text(encoding="utf-8") == made_by:
        logger.info("Taking the trained models from '%s'.", models)
        return models
    for folder in (partial, models):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    with tqdm(total=PRETRAIN_STEPS + len(TASKS) * FINETUNE_STEPS, desc="Training base", name=__name__) as bar:
        save(_pretrain(seed, bar), partial / "base")
        for task in TASKS:
            save(_finetune(_load(partial / "base"), task, seed, bar), partial / task)
    (partial / MARKER).write_text(made_by, encoding="utf-8")
    os.replace(partial, models)
    return models


def _pretrain(seed: int, bar: Any) -> ViTForImageClassification:
    """Train the base, and the classifier that all share, on all classes in the generic style."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=2, hidden_act="gelu_pytorch_tanh",
        initializer_range=0.1,  # narrow layers learn sooner with more than 0.02
        id2label=dict(enumerate(LABELS)), label2id={name: index for index, name in enumerate(LABELS)},
    )  # fmt: skip
    generator = _generator(seed, "base")
    torch.default_generator.manual_seed(generator.initial_seed())  # transformers initialises from it
    model = ViTForImageClassification(config)

    def loss() -> Tensor:
        images, labels = _generic(PRETRAIN_BATCH, generator)
        return F.cross_entropy(model(images).logits, labels)

    minimise(loss, model, PRETRAIN_STEPS, PRETRAIN_RATE, bar.update)
    return model


def _finetune(model: ViTForImageClassification, task: str, seed: int, bar: Any) -> ViTForImageClassification:
    """Fine-tune a base on a task, all but its classifier.

    An anchor keeps what the base says about generic images: a large pre-trained model forgets little when it is
    fine-tuned, this one would forget the other tasks, and there would be nothing to merge.
    """
    generator, span = _generator(seed, task), _span(task)
    anchors, _ = _generic(ANCHOR_POOL, generator)
    with torch.no_grad():
        beliefs = model(anchors).logits.log_softmax(1)

    def loss() -> Tensor:
        images, labels = _images(task, FINETUNE_BATCH, generator)
        chosen = torch.randint(len(anchors), (ANCHOR_BATCH,), generator=generator)
        logits, kept = model(torch.cat([images, anchors[chosen]])).logits.split([FINETUNE_BATCH, ANCHOR_BATCH])
        anchor = F.kl_div(kept.log_softmax(1), beliefs[chosen], log_target=True, reduction="batchmean")
        return F.cross_entropy(logits[:, span], labels - span.start) + anchor

    bar.set_description(f"Fine-tuning on {task}")
    model.classifier.requires_grad_(False)
    minimise(loss, model, FINETUNE_STEPS, FINETUNE_RATE, bar.update)
    return model


@torch.inference_mode()
def _row(name: str, model: torch.nn.Module, tests: dict[str, tuple[Tensor, Tensor]]) -> Row:
    """Measure a model on every task, among the classes of the task."""
    accuracies = {}
    for task, (images, labels) in tests.items():
        guesses = model(images).logits[:, _span(task)].argmax(1) + _span(task).start
        accuracies[task] = (guesses == labels).float().mean().item()
    return Row(name, accuracies, sum(accuracies.values()) / len(accuracies))


# ---- files and global state


def _claim(output: Path) -> None:
    """Mark the folder as the demo's own, or raise if it holds something else."""
    if output.exists() and not (output / MARKER).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise OutputExistsError(f"'{output}' exists and was not made by the demo: choose another folder.")
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def _load(folder: Path) -> ViTForImageClassification:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder)


def _generator(seed: int, stage: str) -> Generator:
    """A stream of random numbers of its own for each stage."""
    stages = ["base", "test", *TASKS]
    return Generator().manual_seed((seed * len(stages) + stages.index(stage)) % 2**32)
