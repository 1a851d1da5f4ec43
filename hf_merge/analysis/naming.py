"""Where a tensor lies in its model, from its name alone: its layer, and which kind of module it belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_merge.schedule import Layers, layer_of

PARTS = ("embeddings", "attention", "mlp", "norm", "head", "other")
"""Kinds of modules, in the order in which tables show them."""

OUTSIDE = "outside"
"""The layer of tensors that are in none: embeddings, the final norm, the head."""

_NORM = re.compile(r"norm|layrnorm|^(?:ln|bn|gn)(?:_|\d|$)")
_ATTENTION = re.compile(r"attn|attention")
_ATTENTION_WORDS = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv", "qkv_proj", "query", "key", "value", "query_key_value", "wqkv",
    "wq", "wk", "wv", "wo", "to_q", "to_k", "to_v", "to_out",
}  # fmt: skip
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|densereludense|intermediate|^ff$")
_MLP_WORDS = {
    "fc", "fc1", "fc2", "fc3", "c_fc", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h",
    "dense_4h_to_h", "wi", "wi_0", "wi_1", "w1", "w2", "w3", "lin1", "lin2", "linear1", "linear2", "output",
}  # fmt: skip
_EMBEDDING = re.compile(r"embed|embd|^emb$|^(?:wte|wpe|shared)$|(?:cls|class|pos|dist|distillation|mask)_(?:token|emb)")
_HEAD = re.compile(r"head|classifier|^(?:cls|score|logits|qa_outputs|embed_out|fc|output)$")


def part_of(name: str) -> str:
    """Tell which kind of module a tensor belongs to.

    The words of its name decide, whatever the architecture: a norm is a norm wherever it stands; in a layer, what is
    not of the attention is of the MLP if it is called like one; out of all layers there are embeddings and heads.

    Args:
        name: `model.layers.3.self_attn.q_proj.weight`.

    Returns:
        One of `PARTS`.
    """
    words = [word for word in re.split(r"[./]", name.lower()) if word]
    if any(_NORM.search(word) for word in words[-2:]):
        return "norm"
    place = layer_of(name)
    if place.layer is not None:
        inner = [word for word in re.split(r"[./]", place.rest.lower()) if word]
        if found := _in_layer(inner):
            return found
    if "embed_out" not in words and any(_EMBEDDING.search(word) for word in words):
        return "embeddings"
    if any(_HEAD.search(word) for word in words):
        return "head"
    return _in_layer(words) or "other"


def _in_layer(words: list[str]) -> str | None:
    """Tell attention and MLP by the words of a name; the last that says one of them decides."""
    for word in reversed(words):
        if _ATTENTION.search(word) or _MLP.search(word):
            return "attention" if _ATTENTION.search(word) else "mlp"
    if _ATTENTION_WORDS.intersection(words):
        return "attention"
    return "mlp" if _MLP_WORDS.intersection(words[:-1]) else None


class LayerNames:
    """Short names of layers: `0` to `11`, or where a model has several stacks of layers `encoder 0`, `decoder 0`.

    Args:
        names: of all tensors, in their order.

    Attributes:
        order: the layers from the first to the last, stack by stack; `OUTSIDE` stands at the end if it is needed.
    """

    def __init__(self, names: Iterable[str]):
        listed = list(names)
        count = Layers(listed).count
        stacks = [stack for stack in count if count[stack] > 1] or [*count]
        self._short = _short(stacks)
        found = dict.fromkeys(self.of(name) for name in listed)
        places = {self.of(name): (stacks.index(place.stack), place.layer or 0)
                  for name in listed if (place := layer_of(name)).stack in self._short}  # fmt: skip
        self.order = tuple(sorted(found, key=lambda name: places.get(name, (len(stacks), 0))))

    def of(self, name: str) -> str:
        """Name the layer of a tensor; a stack of one layer is none beside others."""
        stack, layer, _ = layer_of(name)
        if layer is None or stack not in self._short:
            return OUTSIDE
        return f"{self._short[stack]} {layer}".strip()


def _short(stacks: list[str]) -> dict[str, str]:
    """Leave of the names of stacks the words by which they differ; nothing of a single one."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    words = {stack: stack.strip(".").split(".") for stack in stacks}
    least = min(map(len, words.values()))
    first = next((i for i in range(least - 1) if len({tuple(w[: i + 1]) for w in words.values()}) > 1), least - 1)
    last = next((i for i in range(least - first - 1)
                 if len({tuple(w[len(w) - i - 1 :]) for w in words.values()}) > 1), least - first - 1)  # fmt: skip
    return {stack: ".".join(w[first : len(w) - last]) for stack, w in words.items()}
