"""What routers see of an example: the mean of a model's last hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hf_merge.errors import SourceError

_NOT_FEATURES = {"labels", "past_key_values", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def mean_features(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the mean of a model's last hidden states over tokens or places that are not masked: (batch, width).

    Args:
        model: of transformers, with or without a head. Of an encoder and a decoder the encoder counts.
        inputs: of its forward, by name; those that have nothing to do with features are not looked at.

    Raises:
        SourceError: the model's class says no hidden states.
    """
    body = _body(model)
    known = inspect.signature(body.forward).parameters
    taken = {name: value for name, value in inputs.items() if name in known and name not in _NOT_FEATURES}
    out = body(**taken, **({"output_hidden_states": True} if body is model else {}))
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:
        hidden = (getattr(out, "hidden_states", None) or [None])[-1]
    if hidden is None:
        raise SourceError(
            f"{type(model).__name__} says no hidden states that a router could read: say task=, or train the router "
            "with encoder=."
        )
    if hidden.dim() == 4:  # maps of a convolutional network
        return hidden.flatten(2).mean(2).float()
    if hidden.dim() == 2:
        return hidden.float()
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.float().mean(1)
    weight = mask.float()[..., None]
    return (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def _body(model: Any) -> Any:
    """Return the part of a model that is below its head."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)
