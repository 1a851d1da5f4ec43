"""A router for task experts: learnt from examples of each task, or made of their prototypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.utils import logging
from torch import Tensor, nn

from hf_merge.data import Data, Preparation
from hf_merge.errors import DataError, ParameterError, did_you_mean
from hf_merge.experts.card import note_router
from hf_merge.experts.loading import load_experts
from hf_merge.experts.prototypes import fit_prototypes
from hf_merge.experts.routed import RoutedModel
from hf_merge.experts.routers import (
    ARCHITECTURES,
    ENCODER_FOLDER,
    KINDS,
    Router,
    RouterConfig,
    head_of,
    open_encoder,
    save_router,
)

logger = logging.get_logger(__name__)

FEWEST = 5
"""Examples of a task: fewer leave nothing to train on and to hold out."""


def train_router(
    model: str | Path | RoutedModel,
    data: Mapping[str, Any],
    *,
    kind: Literal["trained", "prototypes"] = "trained",
    architecture: Literal["twin", "free"] | None = None,
    encoder: str | Path | None = None,
    epochs: int = 50,
    lr: float = 5e-4,
    batch_size: int = 64,
    max_examples: int = 5500,
    held_out: float = 0.2,
    seed: int = 0,
    soft: bool | None = None,
    save: bool = True,
    **options: Any,
) -> Router:
    """Let a model with task experts tell by itself of which task an example is.

        router = hf_merge.train_router("merged", {"cars": "images/cars", "dtd": "images/dtd"})
        router.config.accuracy  # on examples that were held out
        hf_merge.load_experts("merged")(pixel_values=images)  # goes by the router

    Args:
        model: the folder of the experts, or what `load_experts` returned.
        data: examples of each task, by its name; labels are not needed. A file, a folder of images, a
            `datasets.Dataset`, rows, or batches of what the model (or the encoder) takes.
        kind: `trained`: an MLP on the features, by AdamW on the cross-entropy of tasks. `prototypes`: no training; the
            task whose prototypes are nearest.
        architecture: of the MLP: Twin-Merging's or FREE-Merging's; by default the one of the experts' method.
        encoder: a transformers model whose features are read, instead of the backbone's: a folder, which is saved with
            the router, or an id on the Hub, which is not.
        epochs, lr, batch_size: of the training. The rate falls linearly to 0. Twin-Merging takes batches of 1024.
        max_examples: of each task at most so many, drawn by the seed.
        held_out: the share of each task's examples that the accuracy is measured on.
        seed: of the split, the order, the weights and the dropout; the same seed gives the same router.
        soft: whether its shares mix the experts; by default as the method of the experts has it: `twin` does.
        save: write it to the folder's `router/`, and a word of it on the card.
        **options: of `load_experts`, if the model is not loaded yet; of it token, cache_dir and local_files_only count
            for the encoder too.

    Returns:
        The router, which the model has now.

    Raises:
        ParameterError: options that cannot be meant, or data of other tasks.
        DataError: data that cannot be read, or too few examples.
        SourceError: the model or the encoder cannot be loaded.
    """
    _check(kind, architecture, epochs, lr, batch_size, held_out, seed)
    routed = model if isinstance(model, RoutedModel) else load_experts(model, router=None, **options)
    if save and routed.folder is None:
        raise ParameterError(
            "The model was loaded from the Hub, and its router cannot be saved there: pass save=False, and publish the "
            "model with its router by model.push_to_hub(..)."
        )
    _check_tasks(routed.tasks, data)
    hub = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if name in options}
    reader, named = _reader(encoder, hub)
    features = _all_features(routed, reader, data, batch_size=batch_size, most=max_examples, seed=seed)
    parts = [_split(each, held_out, seed + place) for place, each in enumerate(features)]
    train, test = [[part[i] for part in parts] for i in (0, 1)]
    method = "twin" if routed.index.method == "twin" else "free"
    config = RouterConfig(
        kind, tuple(routed.tasks), features[0].shape[1], encoder=named, seed=seed, version=version("hf_merge"),
        soft=routed.index.method == "twin" if soft is None else soft,
        architecture=(architecture or method) if kind == "trained" else None,
    )  # fmt: skip
    head, config = (
        fit_prototypes(config, train) if kind == "prototypes" else _fit(config, train, epochs, lr, batch_size)
    )
    router = _measured(Router(config, head, reader).eval(), test)
    routed.use_router(router)
    if save:
        assert routed.folder is not None
        save_router(router, routed.folder)
        routed.saved_router = router
        note_router(routed.folder, router.config)
    return router


def _check(
    kind: str, architecture: str | None, epochs: int, lr: float, batch_size: int, held_out: float, seed: int
) -> None:
    """Refuse options that cannot be meant."""
    for name, value, known in (("kind", kind, KINDS), ("architecture", architecture, (None, *ARCHITECTURES))):
        if value not in known:
            words = [str(one) for one in known if one]
            raise ParameterError(
                f"'{name}' should be {' or '.join(words)}; found {value!r}.{did_you_mean(str(value), words)}"
            )
    if kind == "prototypes" and architecture is not None:
        raise ParameterError("'architecture' is of a trained router; prototypes have none: leave it out.")
    ranges = {
        "epochs": (epochs, epochs >= 1, "1 or more"),
        "lr": (lr, 0 < lr < float("inf"), "greater than 0"),
        "batch_size": (batch_size, batch_size >= 2, "2 or more"),
        "held_out": (held_out, 0 < held_out < 1, "between 0 and 1"),
        "seed": (seed, seed >= 0, "0 or more"),
    }
    for name, (value, is_right, words) in ranges.items():
        if not is_right:
            raise ParameterError(f"'{name}' should be {words}; found {value}.")


def _check_tasks(tasks: Sequence[str], data: Any) -> None:
    """Refuse data of other tasks than the model's."""
    if not isinstance(data, Mapping):
        raise ParameterError(
            f"'data' should give the examples of each task by its name; found a {type(data).__name__}."
        )
    if strange := [str(name) for name in data if name not in tasks]:
        raise ParameterError(
            f"'data' has the task '{strange[0]}', which the model has not.{did_you_mean(strange[0], tasks)} "
            f"Tasks: {', '.join(tasks)}."
        )
    if missing := [name for name in tasks if name not in data]:
        raise ParameterError(f"'data' has no examples of {', '.join(missing)}: a router needs some of every task.")
    if len(tasks) < 2:
        raise ParameterError(f"The model has one task, '{tasks[0]}': there is nothing to route.")


def _reader(encoder: str | Path | None, hub: Mapping[str, Any]) -> tuple[Any, Mapping[str, str] | None]:
    """Return the encoder of a router, and what its config says of it."""
    if encoder is None:
        return None, None
    opened = open_encoder(str(encoder), **hub)
    if Path(encoder).is_dir():
        return opened, {"folder": ENCODER_FOLDER}
    revision = getattr(opened.config, "_commit_hash", None)
    return opened, {"model": str(encoder), **({"revision": revision} if revision else {})}


def _all_features(
    routed: RoutedModel, encoder: Any, data: Mapping[str, Any], *, batch_size: int, most: int, seed: int
) -> list[Tensor]:
    """Return the features of each task's examples, (examples, width) in float32 on the CPU."""
    reader = routed.model if encoder is None else encoder.to(routed.device)
    prepare = Preparation(reader)
    found = []
    for task in routed.tasks:
        batches = Data(
            data[task], reader, prepare, batch_size=batch_size, max_examples=most, seed=seed,
            name=f"The data of '{task}'",
        )  # fmt: skip
        seen = [routed.features_by(encoder, _fitting(batch.inputs, reader)).cpu() for batch in batches]
        features = torch.cat(seen)
        if len(features) < FEWEST:
            raise DataError(
                f"The data of '{task}' has {len(features)} examples: a router needs {FEWEST} or more of each."
            )
        if not bool(features.isfinite().all()):
            raise DataError(f"The features of '{task}' have NaN or Inf: look at its data, and at the model's weights.")
        found.append(features)
    return found


def _fitting(inputs: Mapping[str, Tensor], reader: Any) -> dict[str, Tensor]:
    """Bring inputs to a model's device, and those that are no ids to its dtype."""
    return {
        name: value.to(reader.device, reader.dtype) if value.is_floating_point() else value.to(reader.device)
        for name, value in inputs.items()
    }


def _split(features: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return what is trained on, and what is held out: at least one example, and at most all but two."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed % 2**63))
    count = min(max(1, round(share * len(features))), len(features) - 2)
    return features[order[count:]], features[order[:count]]


def _fit(
    config: RouterConfig, train: Sequence[Tensor], epochs: int, lr: float, batch_size: int
) -> tuple[nn.Module, RouterConfig]:
    """Train an MLP; every task counts the same, however many examples it has."""
    features = torch.cat([*train])
    labels = torch.cat([torch.full((len(each),), place) for place, each in enumerate(train)])
    balance = torch.tensor([len(labels) / (len(train) * len(each)) for each in train])
    with _seeded(config.seed):
        head: Any = head_of(config).train()
        head.mean.copy_(features.mean(0))
        head.scale.copy_(1 / features.std(0).clamp(min=1e-6))
        optimizer = torch.optim.AdamW(head.parameters(), lr)
        steps = epochs * len([*_batches(len(labels), batch_size)])
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, _falling(steps))
        for _ in range(epochs):
            order = torch.randperm(len(labels))
            for part in _batches(len(labels), batch_size):
                chosen = order[part]
                loss = F.cross_entropy(head(features[chosen]), labels[chosen], weight=balance)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                falling.step()
    return head.eval().requires_grad_(False), config


def _falling(steps: int) -> Callable[[int], float]:
    return lambda step: max(0.0, 1 - step / steps)


def _batches(count: int, size: int) -> Iterator[slice]:
    """Cut so many examples into batches; a last one of a single example, which has no deviation, joins none."""
    yield from (slice(start, start + size) for start in range(0, count, size) if count - start > 1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside, with gradients, and leave the random state as it was."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed % 2**63)
        yield


@torch.no_grad()
def _measured(router: Router, test: Sequence[Tensor]) -> Router:
    """Note how often a router is right on what was held out."""
    tasks = router.config.tasks
    right = {
        task: (router(each).argmax(1) == place).float().mean().item()
        for place, (task, each) in enumerate(zip(tasks, test, strict=True))
    }
    held = {task: len(each) for task, each in zip(tasks, test, strict=True)}
    mean = sum(right.values()) / len(right)
    rounded = {task: round(value, 6) for task, value in right.items()}
    router.config = replace(router.config, accuracy=round(mean, 6), accuracies=rounded, held_out=held)
    told = ", ".join(f"{task} {100 * value:.1f} %" for task, value in right.items())
    logger.info("The router knew the task of %.1f %% of the examples that were held out (%s).", 100 * mean, told)
    return router
