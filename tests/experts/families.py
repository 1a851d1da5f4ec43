"""Tiny bases with fine-tunes of them, as complete folders, for merges with task experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import hf_merge
from tests.conftest import small_config

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT = {**SMALL, "image_size": 16, "patch_size": 8}
TASKS = ("pets", "cars", "dtd")
CLASSES = (3, 5, 5)


@dataclass(frozen=True)
class Family:
    """A base, fine-tunes of it by task, and a batch that all of them take.

    Attributes:
        base: its folder.
        models: folders.
        inputs: (count) -> what the models' forward takes.
    """

    base: Path
    models: dict[str, Path]
    inputs: Callable[[int], dict[str, torch.Tensor]]

    def merge(self, output: Path, method: str = "emr", **parameters: Any) -> Path:
        """Merge it into a folder with task experts."""
        models = [*self.models.values()]
        hf_merge.merge(models, output, method=method, base_model=self.base, tasks=[*self.models], **parameters)
        return output

    def in_memory(self, method: str = "emr", **parameters: Any) -> hf_merge.MergedExperts:
        models = [*self.models.values()]
        return hf_merge.merge_state_dicts(models, method=method, base_model=self.base, **parameters)


def labels(task: str, count: int) -> dict[str, Any]:
    names = [f"{task}_{i}" for i in range(count)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def tuned(base: PreTrainedModel, model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give a model the base's weights, moved a little; what the base has not stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    own = model.state_dict()
    prefix = next(
        (one for one in ("", "vit.", "bert.") if next(iter(base.state_dict())) in {k.removeprefix(one) for k in own}),
        "",
    )
    for name, tensor in base.state_dict().items():
        target = own.get(name, own.get(prefix + name))
        if target is not None and target.shape == tensor.shape and tensor.is_floating_point():
            target.copy_(tensor + 0.03 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model


def save(root: Path, base: PreTrainedModel, models: Mapping[str, PreTrainedModel], inputs: Any) -> Family:
    base.save_pretrained(root / "base")
    for seed, (task, model) in enumerate(models.items()):
        tuned(base, model, seed + 1).save_pretrained(root / task)
    return Family(root / "base", {task: root / task for task in models}, inputs)


def images(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))}


def tokens(count: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (count, 7), generator=torch.Generator().manual_seed(count))
    mask = torch.ones_like(ids)
    mask[1:, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def vit(root: Path, dtype: torch.dtype = torch.float32) -> Family:
    """A base with a head of its own, and tasks with heads of other sizes."""
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**VIT, num_labels=7)).to(dtype)
    named = zip(TASKS, CLASSES, strict=True)
    models = {t: ViTForImageClassification(ViTConfig(**VIT, **labels(t, n))).to(dtype) for t, n in named}
    return save(root, base, models, lambda n: {k: v.to(dtype) for k, v in images(n).items()})


def vit_bf16(root: Path) -> Family:
    return vit(root, torch.bfloat16)


def headless_vit(root: Path) -> Family:
    """A base without a head, and tasks with heads of one size."""
    torch.manual_seed(0)
    models = {t: ViTForImageClassification(ViTConfig(**VIT, **labels(t, 4))) for t in TASKS}
    return save(root, ViTModel(ViTConfig(**VIT), add_pooling_layer=False), models, images)


def bert(root: Path) -> Family:
    """Classifiers of texts; the second has two classes, which its config.json does not say."""
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16}
    kinds = {"pets": {"num_labels": 3}, "cars": {}, "dtd": {"num_labels": 1, "problem_type": "regression"}}
    models = {t: BertForSequenceClassification(BertConfig(**config, **more)) for t, more in kinds.items()}
    return save(root, BertModel(BertConfig(**config)), models, tokens)


def clip_tower(root: Path) -> Family:
    """Towers without heads."""
    torch.manual_seed(0)
    make = lambda: CLIPVisionModel(CLIPVisionConfig(**VIT))  # noqa: E731
    return save(root, make(), {t: make() for t in TASKS[:2]}, images)


def tied_llama(root: Path) -> Family:
    """Language models whose head reads the embedding."""
    torch.manual_seed(0)
    make = lambda: LlamaForCausalLM(small_config(tie_word_embeddings=True))  # noqa: E731
    return save(root, make(), {t: make() for t in TASKS[:2]}, tokens)


def resnet(root: Path) -> Family:
    """A network with running means, which are buffers."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    base = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4))
    models = {
        t: ResNetForImageClassification(ResNetConfig(**sizes, **labels(t, n)))
        for t, n in zip(TASKS, CLASSES, strict=True)
    }
    return save(root, base, models, images)


FAMILIES = (vit, vit_bf16, headless_vit, bert, clip_tower, tied_llama, resnet)
METHODS = {"emr": {}, "tall": {}, "tsv_c": {}, "free": {"density": 0.1}, "twin": {"mask_rate": 0.5}}
