"""What is made small: the entropy of predictions, or the distance to what the experts say on their own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_merge.data import Batch
from hf_merge.errors import ComputeError, ParameterError

OBJECTIVES = ("entropy", "kl-to-experts", "features")


def run(model: nn.Module, batch: Batch, objective: str) -> Any:
    """Run a model on a batch.

    Raises:
        ComputeError: it cannot.
    """
    words = dict(batch.inputs)
    try:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            words = _with_decoder(model, words)
        return model(**words, output_hidden_states=True) if objective == "features" else model(**words)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        told = " ".join(str(error).split())[:300].rstrip(".")
        raise ComputeError(f"the model does not run on a batch of {', '.join(words)}: {told}") from error


def _with_decoder(model: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """Let a decoder that was given nothing read what the encoder reads, one token later."""
    ids = words.get("input_ids")
    start = getattr(model.config, "decoder_start_token_id", None)
    if ids is None or start is None or "decoder_input_ids" in words:
        return dict(words)
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    mask = {"decoder_attention_mask": words["attention_mask"]} if "attention_mask" in words else {}
    return {**words, "decoder_input_ids": shifted, **mask}


def loss(objective: str, said: Any, expert: Any, batch: Batch, classes: Sequence[int] | None) -> Tensor:
    """Return the objective on a batch, a mean over its examples or tokens.

    Args:
        objective: one of OBJECTIVES.
        said: what the merged model says.
        expert: what the task's own model says; not needed for the entropy.
        batch: what they were given; its `attention_mask` tells which tokens count.
        classes: those of the task, if the head has more.
    """
    if objective == "features":
        return _mean_square(_last_hidden(said), _last_hidden(expert), batch)
    chosen = _logits(said, classes)
    if objective == "entropy":
        logs = chosen.log_softmax(-1)
        return _mean(-(logs.exp() * logs).sum(-1), batch)
    logs, wanted = chosen.log_softmax(-1), _logits(expert, classes).log_softmax(-1)
    return _mean((wanted.exp() * (wanted - logs)).sum(-1), batch)


def _logits(said: Any, classes: Sequence[int] | None) -> Tensor:
    logits = said if isinstance(said, Tensor) else getattr(said, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ComputeError(
            f"a {type(said).__name__} has no logits: choose objective='features', or a model with a head of classes"
        )
    if classes is None:
        return logits
    if not classes or min(classes) < 0 or max(classes) >= logits.shape[-1]:
        raise ParameterError(
            f"classes= names {list(classes)[:8]}, and the head has {logits.shape[-1]}: 0 to {logits.shape[-1] - 1}."
        )
    return logits[..., list(classes)]


def _last_hidden(said: Any) -> Tensor:
    """Return the output of the last layer, (examples, tokens, width) or feature maps."""
    for words in ("hidden_states", "decoder_hidden_states"):
        if isinstance(states := getattr(said, words, None), (tuple, list)) and states:
            return states[-1]
    if isinstance(last := getattr(said, "last_hidden_state", None), Tensor):
        return last
    if isinstance(said, Tensor):
        return said
    raise ComputeError(f"a {type(said).__name__} shows no hidden states: choose another objective")


def _mean_square(found: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """The squared distance as a share of the expert's own variance, so that widths and scales do not matter."""
    spread = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
    return _mean((found - wanted).square().flatten(2).mean(-1) if found.dim() > 2 else
                 (found - wanted).square().mean(-1), batch) / spread  # fmt: skip


def _mean(each: Tensor, batch: Batch) -> Tensor:
    """Average over examples, or over those tokens that are no padding."""
    mask = batch.inputs.get("decoder_attention_mask", batch.inputs.get("attention_mask"))
    if isinstance(mask, Tensor) and each.shape == mask.shape:
        weight = mask.to(each.dtype)
        return (each * weight).sum() / weight.sum().clamp_min(1)
    return each.mean()


def finite(value: Tensor, what: str) -> float:
    """Return a loss as a number.

    Raises:
        ComputeError: it is none.
    """
    number = float(value.detach())
    if not torch.isfinite(value.detach()):
        raise ComputeError(f"the loss of {what} is {number}: lower learning_rate, or look for NaN in its data")
    return number
