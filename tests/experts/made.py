"""Tiny models and random experts of them, and what these experts are by formula."""

import json
import math

import torch
import transformers
from safetensors.torch import save_file

from hf_merge import packing
from hf_merge.experts import stored

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16}
MODELS = ("vit", "clip", "llama", "bert")


def tiny(kind, **changes):
    """Return a random model."""
    torch.manual_seed(0)
    made = {
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, **IMAGE, num_labels=3, **changes)
        ),
        "clip": lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=8, **changes)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=1, **changes)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **TEXT, **changes)),
    }[kind]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


def batch(kind):
    generator = torch.Generator().manual_seed(1)
    if kind in ("vit", "clip"):
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(0, 40, (3, 7), generator=generator)}


def entry(kind, shape, dtype="float32", density=0.1):
    if kind == "sparse":
        return stored.sparse_entry(shape, max(1, round(density * (shape[-1] if shape else 1))), dtype)
    if kind == "mask":
        return stored.mask_entry(shape)
    return {"whole": stored.whole_entry, "shared": stored.shared_entry}[kind](shape, dtype)


def values(one, seed):
    """Return random tensors for an entry, by part."""
    generator = torch.Generator().manual_seed(seed)
    shape = one["shape"]
    if one["kind"] == "mask":
        mask = torch.rand(shape, generator=generator) < 0.4
        return {"mask": packing.pack_mask(mask), "scale": torch.rand(1, generator=generator) + 0.5}
    if one["kind"] == "sparse":
        rows, k = one["rows"], one["k"]
        order = torch.rand(rows, stored.columns_of(one), generator=generator).argsort(1)[:, :k]
        dtypes = stored.stored_parts(one)
        indices = order.to(getattr(torch, dtypes["indices"].dtype))
        return {
            "indices": indices,
            "values": torch.randn(rows, k, generator=generator).to(getattr(torch, one["dtype"])),
        }
    scale = 0.1 if one["kind"] == "shared" else 1
    return {one["kind"]: (scale * torch.randn(shape, generator=generator)).to(getattr(torch, one["dtype"]))}


class Suite:
    """A base as a folder, and experts beside it.

    Args:
        root: an empty folder.
        kind: of the model.
        dtype: of the base, in memory and in its file.
        **changes: to its config.
    """

    def __init__(self, root, kind, dtype="float32", **changes):
        self.kind, self.dtype = kind, dtype
        self.base, self.experts = root / "base", root / "experts"
        self.model = tiny(kind, **changes).to(getattr(torch, dtype))
        self.model.save_pretrained(self.base)
        self.parameters = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self.config, self.stored = {}, {}
        self.write("shared", {n: entry("shared", s, dtype) for n, s in self.parameters.items()}, 7)

    def write(self, task, parameters, seed, **words):
        """Write a random expert, and return its folder."""
        kept = {name: values(one, seed + i) for i, (name, one) in enumerate(parameters.items())}
        self.config[task], self.stored[task] = parameters, kept
        tensors = {stored.key_of(name, part): t for name, parts in kept.items() for part, t in parts.items()}
        layout = stored.file_layout(parameters)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == {
            key: (getattr(torch, one.dtype), one.shape) for key, one in layout.items()
        }
        folder = self.experts / task
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = stored.adapter_config(parameters, str(self.base), **words)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    def add(self, task, kinds, seed=0):
        """Write an expert of all parameters, whose kinds take turns."""
        names = enumerate(self.parameters.items())
        return self.write(task, {n: entry(kinds[i % len(kinds)], s, self.dtype) for i, (n, s) in names}, seed)

    def weights(self, task):
        """Return what the parameters of a task are by formula."""
        found = dict(self.model.named_parameters())
        return {
            name: packing.apply(
                one["kind"], found[name].detach(), self.stored[task][name],
                self.stored["shared"].get(name, {}).get("shared"),
            )
            for name, one in self.config[task].items()
        }  # fmt: skip

    def expected(self, task):
        """Return the outputs of a model that has a task's weights as its own."""
        made = load(self)
        own = dict(made.named_parameters())
        with torch.no_grad():
            for name, tensor in self.weights(task).items():
                own[name].data = tensor
        return run(made, self.kind, self.dtype)


def load(suite):
    return type(suite.model).from_pretrained(suite.base).eval()


def run(model, kind, dtype="float32"):
    data = batch(kind)
    if "pixel_values" in data:
        data["pixel_values"] = data["pixel_values"].to(getattr(torch, dtype))
    with torch.no_grad():
        return model(**data)[0]


def entries(parameters):
    return sum(math.prod(one["shape"]) for one in parameters.values())
