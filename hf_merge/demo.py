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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging, tqdm
from torch import Generator, Tensor

import hf_merge
from hf_merge.errors import OutputExistsError, RecipeError

if TYPE_CHECKING:
    from transformers import ViTForImageClassification

logger = logging.get_logger(__name__)

SIZE = 32  # pixels
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


class Style(NamedTuple):
    """How masks become pictures: probabilities, and ranges that a value is drawn from for each picture."""

    outlined: float = 0.0
    inverted: float = 0.0  # dark on light
    contrast: tuple[float, float] = (0.5, 1.0)
    light: tuple[float, float] = (0.0, 0.2)  # how much lighter one side is than the other
    noise: tuple[float, float] = (0.08, 0.18)


class Task(NamedTuple):
    """Classes, the function that draws them, and the style of the task's own images."""

    classes: tuple[str, ...]
    draw: Callable[[Tensor, Generator], Tensor]
    style: Style


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
    with _calm():
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


# ---- images: signed distances to an edge, then a style


def _images(task: str, count: int, generator: Generator, style: Style | None = None) -> tuple[Tensor, Tensor]:
    """Draw images (count, 3, SIZE, SIZE) in [-1, 1] of a task, and their labels among all classes."""
    labels = torch.randint(len(TASKS[task].classes), (count,), generator=generator)
    inside = TASKS[task].draw(labels, generator)
    return _paint(inside, style or TASKS[task].style, generator), labels + _span(task).start


def _paint(inside: Tensor, style: Style, generator: Generator) -> Tensor:
    """Colour (n, SIZE, SIZE) distances, positive inside, with a light from one side and noise."""
    n = len(inside)
    chance = torch.rand(n, 2, 1, 1, 1, generator=generator)
    back, fore = _uniform(-1.0, 0.0, (n, 3, 1, 1), generator), _uniform(0.1, 1.0, (n, 3, 1, 1), generator)
    contrast, light, noise = (_uniform(*each, (n, 1, 1, 1), generator)
                              for each in (style.contrast, style.light, style.noise))  # fmt: skip
    edges = inside[:, None] * 12
    mask = torch.where(chance[:, 0] < style.outlined, torch.exp(-edges.square()), torch.sigmoid(2 * edges))
    inverted = chance[:, 1] < style.inverted
    back, fore = torch.where(inverted, fore, back), torch.where(inverted, back, fore)
    slope, _ = _turned(*_axes(), _uniform(0, 2 * math.pi, (n, 1, 1), generator))
    grain = torch.randn(n, 3, SIZE, SIZE, generator=generator)
    return (back + contrast * (fore - back) * mask + light * slope[:, None] + noise * grain).clamp_(-1, 1)


def _shapes(labels: Tensor, generator: Generator) -> Tensor:
    scale, across, down, turn = (_uniform(*each, (len(labels), 1, 1), generator)
                                 for each in ((0.55, 0.8), (-0.15, 0.15), (-0.15, 0.15), (-0.2, 0.2)))  # fmt: skip
    x, y = _axes()
    x, y = _turned((x - across) / scale, (y - down) / scale, turn)
    radius, angle = torch.hypot(x, y), torch.atan2(x, -y)
    sides = [x * math.sin(turn) + y * math.cos(turn) for turn in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    beam, pole = torch.minimum(1 - x.abs(), 0.3 - y.abs()), torch.minimum(1 - y.abs(), 0.3 - x.abs())
    disk, square, triangle = 1 - radius, 0.85 - torch.maximum(x.abs(), y.abs()), 0.5 - torch.stack(sides).amax(0)
    plus, ring, star = torch.maximum(beam, pole), 0.25 - (radius - 0.75).abs(), 0.65 + 0.35 * (5 * angle).cos() - radius
    return scale * _pick([disk, square, triangle, plus, ring, star], labels)


def _textures(labels: Tensor, generator: Generator) -> Tensor:
    n = len(labels)
    frequency, across, down, turn = (_uniform(*each, (n, 1, 1), generator)
                                     for each in ((9, 16), (-0.15, 0.15), (-0.15, 0.15), (0, math.pi)))  # fmt: skip
    x, y = _axes()
    x, y = _turned(x - across, y - down, turn)
    wave, radius, angle = (frequency * x).sin(), torch.hypot(x, y), torch.atan2(x, y)
    checker, rings, spokes = 2 * wave * (frequency * y).sin(), (frequency * radius).sin(), (6 * angle).sin()
    zigzag = (frequency * x + 2.2 * torch.asin(0.99 * (0.8 * frequency * y).sin())).sin()
    blotches = 2 * F.interpolate(torch.randn(n, 1, 9, 9, generator=generator), SIZE, mode="bicubic")[:, 0]
    return 0.12 * _pick([wave, checker, rings, spokes, zigzag, blotches], labels)


def _counts(labels: Tensor, generator: Generator) -> Tensor:
    n, dots = len(labels), 6
    x, y = (axis[:, None] for axis in _axes())
    cells = torch.rand(n, 9, generator=generator).argsort(1)[:, :dots, None, None]  # of a grid of 3 x 3
    jitter = _uniform(-0.08, 0.08, (2, n, dots, 1, 1), generator)
    across, down = 0.62 * (cells % 3 - 1) + jitter[0], 0.62 * (cells // 3 - 1) + jitter[1]
    inside = _uniform(0.18, 0.28, (n, dots, 1, 1), generator) - torch.hypot(x - across, y - down)
    shown = torch.arange(dots) <= labels[:, None]
    return torch.where(shown[:, :, None, None], inside, -1.0).amax(1)


def _axes() -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1, 1, SIZE)
    return line.view(1, 1, SIZE), line.view(1, SIZE, 1)


def _turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _pick(drawings: list[Tensor], labels: Tensor) -> Tensor:
    """Take drawings[labels[i]][i] for each i."""
    return torch.stack(torch.broadcast_tensors(*drawings))[labels, torch.arange(len(labels))]


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


NUMBERS = ("one", "two", "three", "four", "five", "six")
GENERIC = Style(outlined=0.06, inverted=0.2, noise=(0.03, 0.12))
TASKS = {
    "shapes": Task(("disk", "square", "triangle", "plus", "ring", "star"), _shapes, Style(outlined=1.0)),
    "textures": Task(("stripes", "checker", "rings", "spokes", "zigzag", "blotches"), _textures,
                     Style(inverted=0.5, contrast=(0.3, 0.8), light=(0.4, 0.8))),
    "counts": Task(NUMBERS, _counts, Style(inverted=1.0)),
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
        _save(_pretrain(seed, bar), partial / "base")
        for task in TASKS:
            _save(_finetune(_load(partial / "base"), task, seed, bar), partial / task)
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

    _minimise(loss, model, PRETRAIN_STEPS, PRETRAIN_RATE, bar)
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
    _minimise(loss, model, FINETUNE_STEPS, FINETUNE_RATE, bar)
    return model


def _minimise(loss: Callable[[], Tensor], model: torch.nn.Module, steps: int, rate: float, bar: Any) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        bar.update()


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


def _save(model: ViTForImageClassification, folder: Path) -> None:
    """Save a model with its image processor, by hand: making a ViTImageProcessor needs Pillow or torchvision."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def _load(folder: Path) -> ViTForImageClassification:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(folder)


def _generator(seed: int, stage: str) -> Generator:
    """A stream of random numbers of its own for each stage."""
    stages = ["base", "test", *TASKS]
    return Generator().manual_seed((seed * len(stages) + stages.index(stage)) % 2**32)


@contextmanager
def _calm() -> Iterator[None]:
    """Use one thread and a copy of the random state, and keep transformers quiet; put all back at the end."""
    from transformers.utils import logging as transformers_logging

    threads, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # layers this small gain nothing from a second, and wait for it on a busy machine
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)
