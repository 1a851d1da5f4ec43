"""The models of a study: one backbone that takes any weights, under the head of each task."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.data import Preparation
from hf_merge.errors import SourceError
from hf_merge.study.spec import Study, TaskEntry, TextHead
from hf_merge.types import ModelRef

Weights = dict[str, Tensor]


class Towers:
    """The weights of all backbones, and one live model that takes them in turn.

    Attributes:
        base: the base's weights, under the backbone's names.
        tuned: each task's weights.
        preparations: each task's image processor.
        subjects: each task's config, with the names of its classes, and what its input is called.
    """

    def __init__(self, study: Study, hub: Mapping[str, Any], classes: Mapping[str, list[str]]):
        """Load the models.

        Args:
            study: which.
            hub: `token`, `cache_dir`, `local_files_only`, as from_pretrained takes them.
            classes: names of each task's labels, of tasks whose head is made of text.

        Raises:
            SourceError: a model cannot be loaded, has another backbone than the base, or has no head.
        """
        self.tuned: dict[str, Weights] = {}
        self.preparations: dict[str, Preparation] = {}
        self.subjects: dict[str, Any] = {}
        self._heads: dict[str, Any] = {}
        self._live: Any = None
        for task in study.tasks:
            model, backbone = (_of_text if task.head else _of_images)(task.model, hub, whole=True)
            self.tuned[task.name] = _weights(backbone)
            self._live = self._live or backbone
            self._heads[task.name] = (
                _text_head(task.head, hub, classes[task.name]) if task.head else _OwnHead(model, self._live)
            )
            config = _labels(model.config, classes.get(task.name))
            self.subjects[task.name] = SimpleNamespace(config=config, main_input_name=model.main_input_name)
            place = ModelRef(path=task.head.model if task.head else task.model)
            self.preparations[task.name] = Preparation(self.subjects[task.name], place, **hub)
        _, base = (_of_text if study.tasks[-1].head else _of_images)(study.base, hub, whole=False)
        self.base = _weights(base)
        for task in study.tasks:
            _check_same(self.base, self.tuned[task.name], study.base, task)

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the backbone."""
        self._live.load_state_dict(weights)

    @torch.inference_mode()
    def right(self, task: str, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Tell for each example (n,) whether its label is the most likely one."""
        return self._heads[task](self._live, inputs).argmax(-1) == labels


class _OwnHead:
    """All of a classifier but its backbone."""

    def __init__(self, model: Any, live: nn.Module):
        setattr(model, model.base_model_prefix, live)  # one backbone for all tasks
        self.model = model

    def __call__(self, live: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.model(**inputs).logits


class _TextHead:
    """Features of sentences, which those of an image are compared with."""

    def __init__(self, projection: nn.Module, names: Tensor):
        self.projection, self.names = projection, names

    def __call__(self, live: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        found = self.projection(live(**inputs).pooler_output)
        return found @ self.names.T  # its length does not matter to which is the largest


def _text_head(head: TextHead, hub: Mapping[str, Any], names: list[str]) -> _TextHead:
    from transformers import AutoTokenizer, CLIPModel

    model: Any = _loaded(CLIPModel, head.model, hub)[0].eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(head.model, **hub)
    rows = []
    with torch.inference_mode():
        for name in names:
            words = tokenizer([one.format(name) for one in head.templates], return_tensors="pt", padding=True,
                              truncation=True)  # fmt: skip
            found = model.text_projection(model.text_model(**words).pooler_output)
            rows.append(nn.functional.normalize(nn.functional.normalize(found).mean(0), dim=0))
        return _TextHead(model.visual_projection, torch.stack(rows))


def _of_images(ref: str, hub: Mapping[str, Any], *, whole: bool) -> tuple[Any, nn.Module]:
    """Load an image classifier; return it and its backbone."""
    from transformers import AutoModelForImageClassification

    model, info = _loaded(AutoModelForImageClassification, ref, hub)
    prefix = model.base_model_prefix
    backbone = getattr(model, prefix)
    _check_whole(ref, [name for name in info["missing_keys"] if whole or name.startswith(f"{prefix}.")])
    return model, backbone


def _of_text(ref: str, hub: Mapping[str, Any], *, whole: bool) -> tuple[Any, nn.Module]:
    """Load the vision tower of a CLIP model, alone or of a whole one."""
    from transformers import CLIPVisionModel

    model, info = _loaded(CLIPVisionModel, ref, hub)
    _check_whole(ref, info["missing_keys"])
    return model, model


def _loaded(kind: Any, ref: str, hub: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = kind.from_pretrained(ref, output_loading_info=True, **hub)
    except (OSError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        raise SourceError(f"'{ref}' cannot be loaded as {kind.__name__}: {told}") from None
    return model.eval(), info


def _check_whole(ref: str, missing: Any) -> None:
    if missing := sorted(missing):
        raise SourceError(
            f"'{ref}' lacks {', '.join(missing[:3])}: name an image classifier with its head, or say `head` for a "
            "vision tower that goes with a text tower."
        )


def _check_same(base: Weights, tuned: Weights, ref: str, task: TaskEntry) -> None:
    differing = [name for name in {**base, **tuned}
                 if name not in base or name not in tuned or base[name].shape != tuned[name].shape]  # fmt: skip
    if differing:
        raise SourceError(
            f"'{task.model}' of task {task.name} has another backbone than '{ref}' "
            f"({', '.join(sorted(differing)[:3])}): all tasks of a study are fine-tunes of its base."
        )


def _labels(config: Any, classes: list[str] | None) -> Any:
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
    return config


def _weights(backbone: nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in backbone.state_dict().items()}
