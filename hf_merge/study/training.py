"""Train small vision transformers on drawn images: a base, heads that stay as they are, fine-tunes that forget little.

The setting is that of CLIP's vision tower with a text head for each task: a task's head consists of the means of the
base's features over plain images of each class, and is frozen. A fine-tune is held to the base's features on plain
images of all tasks, since a small model forgets what a large one keeps, and then there would be nothing to merge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_merge.study.drawing import SIZE
from hf_merge.study.tasks import GENERIC, Task

if TYPE_CHECKING:
    from transformers import ViTForImageClassification, ViTModel

Tasks = Mapping[str, Task]
PROTOTYPE_IMAGES = 60  # for each class, on average
TEMPERATURES = [2.0**power for power in range(-9, 3)]


@dataclass(frozen=True)
class Effort:
    """How large the models are, and how long they are trained.

    Attributes:
        width: of the hidden states.
        layers: of the transformer.
        pretrain_steps: of the base.
        pretrain_rate: the highest learning rate of the base.
        pretrain_batch: images of each task in a step.
        finetune_steps: of each fine-tune.
        finetune_rate: the highest learning rate of a fine-tune.
        finetune_batch: images of the task in a step.
        anchor_batch: plain images in a step.
        anchor_pool: plain images of each task that those are taken from.
        anchor: weight of the distance to the base's features.
    """

    width: int = 192
    layers: int = 4
    pretrain_steps: int = 1000
    pretrain_rate: float = 2e-3
    pretrain_batch: int = 16
    finetune_steps: int = 200
    finetune_rate: float = 1e-3
    finetune_batch: int = 48
    anchor_batch: int = 32
    anchor_pool: int = 256
    anchor: float = 1.0


def pretrain(tasks: Tasks, effort: Effort, generator: Generator, tick: Callable[[], object]) -> ViTModel:
    """Train a backbone to tell the classes of all tasks apart on plain images.

    Args:
        tasks: what is drawn.
        effort: how large and how long.
        generator: of weights and images.
        tick: called after each step.
    """
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=effort.width, intermediate_size=2 * effort.width,
        num_hidden_layers=effort.layers, num_attention_heads=4, hidden_act="gelu_pytorch_tanh",
        initializer_range=0.1,  # narrow layers learn sooner with more than 0.02
    )  # fmt: skip
    torch.default_generator.manual_seed(generator.initial_seed())  # transformers initialises from it
    model = ViTModel(config, add_pooling_layer=False)
    head = torch.nn.Linear(effort.width, sum(len(task.classes) for task in tasks.values()))
    both = torch.nn.ModuleList([model, head])

    def loss() -> Tensor:
        images, labels = plain(tasks, effort.pretrain_batch, generator)
        return F.cross_entropy(head(features(model, images)), labels)

    minimise(loss, both, effort.pretrain_steps, effort.pretrain_rate, tick)
    return model.eval()


def plain(tasks: Tasks, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` plain images of each task, with labels among the classes of all."""
    drawn, labels, first = [], [], 0
    for task in tasks.values():
        images, numbers = task.images(count, generator, GENERIC)
        drawn.append(images)
        labels.append(numbers + first)
        first += len(task.classes)
    return torch.cat(drawn), torch.cat(labels)


def features(model: Any, images: Tensor) -> Tensor:
    """Return what heads see, (images, width)."""
    return model(images).last_hidden_state[:, 0]


def with_prototypes(backbone: ViTModel, task: Task, generator: Generator) -> ViTForImageClassification:
    """Put the head of a task on a backbone: the nearest mean of a class, on the backbone's own features.

    The logit of class c is (m_c x - |m_c|^2 / 2) / t for features x and their mean m_c, at the temperature t at which
    plain images are told apart best.
    """
    from transformers import ViTConfig, ViTForImageClassification

    with torch.no_grad():
        images, labels = task.images(PROTOTYPE_IMAGES * len(task.classes), generator, GENERIC)
        found = torch.cat([features(backbone, part) for part in images.split(256)])
        means = torch.stack([found[labels == number].mean(0) for number in range(len(task.classes))])
        centre = means.mean(0)
        weight, bias = means - centre, -(means.square().sum(1) - centre.square().sum()) / 2
        logits = found @ weight.T + bias
        scale = min(TEMPERATURES, key=lambda each: F.cross_entropy(logits * each, labels).item())
    config = ViTConfig(**{**backbone.config.to_dict(), "id2label": dict(enumerate(task.classes)),
                          "label2id": {name: number for number, name in enumerate(task.classes)}})  # fmt: skip
    model = ViTForImageClassification(config)
    model.vit.load_state_dict(backbone.state_dict())
    model.classifier.load_state_dict({"weight": scale * weight, "bias": scale * bias})
    return model.eval()


def finetune(
    model: ViTForImageClassification,
    task: Task,
    tasks: Tasks,
    effort: Effort,
    generator: Generator,
    tick: Callable[[], object],
) -> None:
    """Train the layers of a classifier on a task, held to its own features on plain images of all tasks.

    Embeddings, norms and the head stay as they are.
    """  # fmt: skip
    model.requires_grad_(False)
    for layer in model.vit.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.requires_grad_(True)
    with torch.no_grad():
        anchors, _ = plain(tasks, effort.anchor_pool, generator)
        kept = torch.cat([features(model.vit, part) for part in anchors.split(256)])
        spread = (kept - kept.mean(0)).square().mean()
    count = effort.finetune_batch

    def loss() -> Tensor:
        images, labels = task.images(count, generator)
        chosen = torch.randint(len(anchors), (effort.anchor_batch,), generator=generator)
        found = features(model.vit, torch.cat([images, anchors[chosen]]))
        away = (found[count:] - kept[chosen]).square().mean() / spread
        return F.cross_entropy(model.classifier(found[:count]), labels) + effort.anchor * away

    minimise(loss, model, effort.finetune_steps, effort.finetune_rate, tick)
    model.requires_grad_(True)


def minimise(
    loss: Callable[[], Tensor], model: torch.nn.Module, steps: int, rate: float, tick: Callable[[], object]
) -> None:
    """Make a loss small by AdamW, with a rate that rises over a fifth of the steps and then falls."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
        tick()


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Save a model with its image processor, by hand: making a ViTImageProcessor needs Pillow or torchvision."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": SIZE, "width": SIZE},
        "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


@contextmanager
def calm(threads: int | None = 1) -> Iterator[None]:
    """Use a copy of the random state and so many threads, and keep transformers quiet; put all back at the end.

    One thread is best for small models: their layers gain nothing from a second, and wait for it on a busy machine.
    """
    from transformers.utils import logging as transformers_logging

    before, verbosity = torch.get_num_threads(), transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(lambda _, args, kwargs: transformers_logging.EmptyTqdm(*args, **kwargs))
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)
