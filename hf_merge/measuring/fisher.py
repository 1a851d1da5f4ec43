"""The diagonal Fisher information: mean over examples of squared gradients of the log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_merge.data import Batch
from hf_merge.errors import DataError
from hf_merge.measuring.subject import Subject

Targets = Literal["sampled", "data", "expected"]
MAX_EXPECTED = 1000
"""Classes; each costs a backward pass for every example."""


def diagonal_fisher(
    subject: Subject, batches: Iterable[Batch], targets: Targets, seed: int, done: Callable[[int], None]
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of every parameter, by its name in memory.

    Args:
        subject: the model.
        batches: the data. Each example has a forward pass and a backward pass of its own.
        targets: whose log-likelihood: that of the data's labels (the empirical Fisher), of labels drawn from what the
            model says, or of all labels, by what the model says of them.
        seed: labels are drawn by it.
        done: called with the number of examples that are done.
    """
    weights = {name: p for name, p in subject.module.named_parameters() if p.is_floating_point()}
    frozen = [p for p in weights.values() if not p.requires_grad]
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    generator, count = torch.Generator().manual_seed(seed), 0
    for p in frozen:
        p.requires_grad_(True)
    try:
        for example in (one for batch in batches for one in batch.examples()):
            terms = _terms(subject, example, targets, generator)
            for place, (share, likelihood) in enumerate(terms):
                last = place + 1 == len(terms)
                gradients = torch.autograd.grad(
                    likelihood, [*weights.values()], retain_graph=not last, allow_unused=True
                )
                for total, gradient in zip(found.values(), gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float(), value=share)
            count += 1
            done(1)
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return {name: total.div_(count) for name, total in found.items()}


def _terms(subject: Subject, example: Batch, targets: Targets, generator: Generator) -> list[tuple[float, Tensor]]:
    """Return log-likelihoods of one example, each with the share by which its squared gradient counts."""
    outputs = subject.module(**subject.inputs(example.inputs))
    logits = getattr(outputs, "logits", outputs if isinstance(outputs, Tensor) else None)
    if not isinstance(logits, Tensor):
        raise DataError(
            f"{type(subject.module).__name__} gives no logits, so that nothing has a likelihood: measure the Fisher "
            "information of a model with a head."
        )
    if not bool(logits.isfinite().all()):
        raise DataError("The model gives NaN or Inf for an example: nothing can be measured.")
    labels = None if example.labels is None else example.labels.to(logits.device)
    kind = _kind(subject, logits)
    if kind == "tokens":
        return _of_tokens(subject, example, logits.float(), labels, targets, generator)
    if kind == "numbers":
        return _of_numbers(logits.float().reshape(-1), labels, targets, generator)
    if kind == "several":
        return _of_several(logits.float().reshape(-1), labels, targets, generator)
    return _of_classes(logits.float().reshape(-1), labels, targets, generator)


def _kind(subject: Subject, logits: Tensor) -> str:
    if logits.dim() == 3:
        return "tokens"
    if logits.dim() != 2:
        raise DataError(f"Logits of the shape {list(logits.shape)} have no likelihood that is known here.")
    said = getattr(getattr(subject.module, "config", None), "problem_type", None)
    by_type = {"regression": "numbers", "multi_label_classification": "several"}
    return by_type.get(said or "", "numbers" if logits.shape[1] == 1 else "classes")


def _of_classes(logits: Tensor, labels: Tensor | None, targets: Targets, generator: Generator) -> list:
    """One class is true: log p of it."""
    logs = logits.log_softmax(0)
    chances = logs.detach().exp()
    if targets == "expected":
        if len(logs) > MAX_EXPECTED:
            raise DataError(f"There are {len(logs)} classes, and each would cost a backward pass: sample the labels.")
        return [(float(chance), log) for chance, log in zip(chances, logs, strict=True)]
    if targets == "sampled":
        return [(1.0, logs[int(torch.multinomial(chances.cpu(), 1, generator=generator))])]
    label = int(labels.reshape(-1)[0])  # type: ignore[union-attr]
    if not 0 <= label < len(logs):
        raise DataError(f"The data has the label {label}, and the model has the classes 0 to {len(logs) - 1}.")
    return [(1.0, logs[label])]


def _of_several(logits: Tensor, labels: Tensor | None, targets: Targets, generator: Generator) -> list:
    """Each class is true or not: the sum of the logs of the probabilities."""
    chances = logits.detach().sigmoid()
    if targets == "expected":  # E (sum_k (y_k - p_k) dz_k)^2 with independent y_k
        return [(float(p * (1 - p)), z) for p, z in zip(chances, logits, strict=True)]
    drawn = torch.bernoulli(chances.cpu(), generator=generator).to(logits)
    truth = drawn if targets == "sampled" else labels.reshape(-1).to(logits)  # type: ignore[union-attr]
    if truth.shape != logits.shape:
        raise DataError(f"An example has {truth.numel()} labels for {logits.numel()} classes.")
    return [(1.0, -F.binary_cross_entropy_with_logits(logits, truth, reduction="sum"))]


def _of_numbers(logits: Tensor, labels: Tensor | None, targets: Targets, generator: Generator) -> list:
    """Numbers with normal errors of variance 1: minus half of the squared error."""
    if targets == "expected":
        return [(1.0, number) for number in logits]
    drawn = logits.detach() + torch.randn(logits.shape, generator=generator).to(logits)
    truth = drawn if targets == "sampled" else labels.reshape(-1).to(logits)  # type: ignore[union-attr]
    if truth.shape != logits.shape:
        raise DataError(f"An example has {truth.numel()} numbers for {logits.numel()} outputs.")
    return [(1.0, -0.5 * (truth - logits).square().sum())]


def _of_tokens(
    subject: Subject, example: Batch, logits: Tensor, labels: Tensor | None, targets: Targets, generator: Generator
) -> list:
    """A class at every token that is no padding: the sum of log p over the tokens."""
    if targets == "expected":
        raise DataError("Expectations over all labels are for classifiers: a text has a label at each token.")
    ids = example.inputs.get("input_ids")
    mask = example.inputs.get("attention_mask")
    logs = logits[0].log_softmax(-1)
    counted = torch.ones(len(logs), dtype=torch.bool, device=logs.device)
    if mask is not None and mask.shape[1] == len(logs):
        counted = mask[0].to(logs.device).bool()
    truth = None if labels is None or labels.dim() != 2 else labels[0].to(logs.device)
    if subject.is_causal:
        if truth is None and ids is not None:
            truth = ids[0].to(logs.device)
        logs, counted = logs[:-1], counted[1:]
        truth = None if truth is None else truth[1:]
    if targets == "sampled":
        truth = (
            torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)[:, 0].to(logs.device)
            if len(logs)
            else logs.new_zeros(0).long()
        )
    if truth is None or truth.shape != counted.shape:
        raise DataError("The data has no label for every token: pass batches with labels, or sample them.")
    counted = counted & (truth != -100)
    if bool(((truth < 0) | (truth >= logs.shape[-1]))[counted].any()):
        raise DataError(f"The data has a label out of range; the model has the classes 0 to {logs.shape[-1] - 1}.")
    return [(1.0, logs[counted].gather(1, truth[counted][:, None]).sum())]
