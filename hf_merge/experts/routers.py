"""Routers: of which task an example is, from what the backbone, or a small encoder, makes of it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_merge.errors import SourceError, shown

FOLDER = "router"
WEIGHTS_FILE = "router.safetensors"
CONFIG_FILE = "router.json"
ENCODER_FOLDER = "encoder"
KINDS = ("trained", "prototypes")
ARCHITECTURES = ("twin", "free")
_FORMAT = 1
_DO = "train one with hf_merge.train_router, or load the model with router=None"


@dataclass(frozen=True)
class RouterConfig:
    """router.json.

    Attributes:
        kind: `trained` or `prototypes`.
        tasks: in the order of the shares.
        width: of the features.
        soft: whether the shares mix the experts, as in Twin-Merging, or the largest alone counts.
        architecture: of a trained one: `twin` or `free`.
        prototypes: of the other kind, how many each task has.
        encoder: whose features it reads: a Hub id with its `revision`, or `encoder`, the folder in its own; None: the
            backbone's.
        accuracy: mean over tasks of the share of held-out examples that it knew.
        accuracies: of each task.
        held_out: how many examples of each task.
        seed: of its training.
        version: of hf_merge.
    """

    kind: str
    tasks: tuple[str, ...]
    width: int
    soft: bool = False
    architecture: str | None = None
    prototypes: tuple[int, ...] = ()
    encoder: Mapping[str, str] | None = None
    accuracy: float | None = None
    accuracies: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    version: str = ""


class Router(nn.Module):
    """Says how likely examples are of each task.

    Attributes:
        config: what it is.
        encoder: makes its features; None: the backbone does.
    """

    def __init__(self, config: RouterConfig, head: nn.Module, encoder: Any = None):
        super().__init__()
        self.config, self.head, self.encoder = config, head, encoder

    def forward(self, features: Tensor) -> Tensor:
        """Return shares (batch, tasks) that sum to 1, for features (batch, width).

        Raises:
            SourceError: the features are of another width.
        """
        if features.shape[-1] != self.config.width:
            raise SourceError(
                f"The router reads features of the width {self.config.width}, and the model's have "
                f"{features.shape[-1]}: it belongs to another backbone; {_DO}."
            )
        return self.head(features.float()).softmax(-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model; what is above the features stays in float32, whatever the model is cast to."""
        if self.encoder is not None:
            self.encoder._apply(fn)
        self.head._apply(lambda tensor: tensor.to(fn(tensor).device))
        return self


class Standardised(nn.Module):
    """An MLP on features with mean 0 and deviation 1."""

    mean: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Module, width: int):
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) * self.scale)


def mlp(architecture: str, width: int, tasks: int) -> Standardised:
    """Return the router of a paper.

    `twin` (https://arxiv.org/abs/2406.15479): two layers of twice the width, each with batch norm, leaky ReLU
    and dropout of a half. `free` (https://arxiv.org/abs/2411.16815): one layer of 256 with ReLU.
    """
    if architecture == "free":
        return Standardised(nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, tasks)), width)
    hidden = 2 * width
    layers = [
        part
        for size in (width, hidden)
        for part in (nn.Linear(size, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(0.5))
    ]
    return Standardised(nn.Sequential(*layers, nn.Linear(hidden, tasks)), width)


class Prototypes(nn.Module):
    """Distances to prototypes, in the metric of what is alike within a task.

    A prototype p scores -1/2 (f - p)^T C^-1 (f - p), with one covariance C for all; but for a term that all have, that
    is linear in f, and kept as such. A task scores the log of the sum over its prototypes' exponentials.

    Args:
        width: of features.
        counts: how many prototypes each task has.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, counts: Sequence[int]):
        super().__init__()
        self.counts = [*counts]
        self.register_buffer("weight", torch.zeros(sum(counts), width))
        self.register_buffer("bias", torch.zeros(sum(counts)))

    def forward(self, features: Tensor) -> Tensor:
        scores = features @ self.weight.T + self.bias
        return torch.stack([own.logsumexp(-1) for own in scores.split(self.counts, -1)], -1)


def head_of(config: RouterConfig) -> nn.Module:
    """Return the part of a router that is above its features, not trained yet."""
    if config.kind == "prototypes":
        return Prototypes(config.width, config.prototypes)
    return mlp(str(config.architecture), config.width, len(config.tasks))


# ---- files


def save_router(router: Router, folder: Path) -> Path:
    """Write `router/` of a folder: the new one takes the place of the old one when it is whole.

    Args:
        router: what is written; an encoder that is not on the Hub goes with it.
        folder: of the model.

    Returns:
        The folder of the router.
    """
    new, old = (folder / f".{FOLDER}.{uuid.uuid4().hex}" for _ in range(2))
    new.mkdir()
    try:
        save_file(_plain(router.head.state_dict()), new / WEIGHTS_FILE)
        if router.encoder is not None and "folder" in (router.config.encoder or {}):
            router.encoder.save_pretrained(new / ENCODER_FOLDER)
        told = json.dumps({"format": _FORMAT, **asdict(router.config)}, indent=2, ensure_ascii=False)
        (new / CONFIG_FILE).write_text(told + "\n", encoding="utf-8")
        if (folder / FOLDER).exists():
            os.replace(folder / FOLDER, old)
        os.replace(new, folder / FOLDER)
    finally:
        for rest in (new, old):
            shutil.rmtree(rest, ignore_errors=True)
    return folder / FOLDER


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}


def read_config(folder: Path) -> RouterConfig | None:
    """Read what a model's router is; None if it has none.

    Raises:
        SourceError: the file is damaged, or of a later version.
    """
    path = folder / FOLDER / CONFIG_FILE
    if not (folder / FOLDER).is_dir():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        known = {one.name for one in fields(RouterConfig)}
        config = RouterConfig(**{key: value for key, value in told.items() if key in known})
        tasks, prototypes = tuple(map(str, config.tasks)), tuple(map(int, config.prototypes))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"The router '{path}' is damaged ({shown(error)}): {_DO}.") from None
    if told.get("format") != _FORMAT or config.kind not in KINDS:
        raise SourceError(
            f"The router '{path}' is of the kind {shown(config.kind)} and format {shown(told.get('format'))}; this "
            f"version reads {', '.join(KINDS)} of format {_FORMAT}: {_DO}."
        )
    is_told = config.architecture in ARCHITECTURES if config.kind == "trained" else len(prototypes) == len(tasks)
    if not is_told or not isinstance(config.width, int):
        raise SourceError(f"The router '{path}' is damaged: what it is made of is not said; {_DO}.")
    return RouterConfig(**{**_shallow(config), "tasks": tasks, "prototypes": prototypes})


def _shallow(config: RouterConfig) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in fields(config)}


def read_router(folder: Path, tasks: Sequence[str], **hub: Any) -> Router | None:
    """Read the router of a folder; None if it has none.

    Args:
        folder: of the model.
        tasks: of the model.
        **hub: token, cache_dir, local_files_only, for an encoder on the Hub.

    Raises:
        SourceError: it is damaged, or of other tasks.
    """
    config = read_config(folder)
    if config is None:
        return None
    if config.tasks != tuple(tasks):
        raise SourceError(
            f"The router in '{folder / FOLDER}' was trained on the tasks {', '.join(config.tasks)}, and the model has "
            f"{', '.join(tasks)}: {_DO}."
        )
    head, path = head_of(config), folder / FOLDER / WEIGHTS_FILE
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise SourceError(
            f"The router '{path}' is damaged, or not what its {CONFIG_FILE} says ({told}): {_DO}."
        ) from None
    encoder = None if config.encoder is None else _encoder(folder / FOLDER, config.encoder, hub)
    return Router(config, head.eval(), encoder).eval()


def _encoder(folder: Path, named: Mapping[str, str], hub: Mapping[str, Any]) -> Any:
    place = str(folder / named["folder"]) if "folder" in named else str(named.get("model"))
    return open_encoder(place, revision=named.get("revision"), **hub)


def open_encoder(place: str, *, revision: str | None = None, **hub: Any) -> Any:
    """Load the model whose features a router reads.

    Args:
        place: a folder, or an id on the Hub.
        revision: there.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: transformers does not load it.
    """
    from transformers import AutoModel

    revised = {} if revision is None else {"revision": revision}
    try:
        return AutoModel.from_pretrained(place, **revised, **hub).eval().requires_grad_(False)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        told = " ".join(str(error).split())[:200]
        raise SourceError(
            f"The router's encoder '{place}' cannot be loaded as a transformers model ({told})."
        ) from None
