"""Which method to take, by what headers tell: whether there is a base, how many models, of what size."""

from __future__ import annotations

from hf_merge.compatibility.report import Advice

_LARGE = 500_000_000
"""Parameters of a model beyond which the decomposition of every matrix takes hours on a CPU."""


def recommended(models: int, *, has_base: bool, adapters: bool, parameters: int) -> Advice:
    """Return the method to begin with.

    Args:
        models: how many are merged, the base not counted.
        has_base: whether there is a base.
        adapters: whether they are adapters alone, merged with each other.
        parameters: of the largest model.
    """
    if models < 2 and has_base and not adapters:
        return Advice("task_arithmetic", "which adds the change of one model to its base, as strongly as lambda says")
    if models < 2:
        return Advice("linear", "as there is one model alone, and nothing to weigh against it")
    if adapters:
        return Advice("tsv_m", "which keeps each adapter's main directions apart; adapters are small enough for it")
    if has_base and parameters <= _LARGE:
        return Advice(
            "tsv_m",
            "which gives the best single model in the study (docs/studies.md); these models are small enough for it",
        )
    if has_base:
        return Advice(
            "ties", "which needs the base, keeps large changes that agree in sign, and is fast on large models"
        )
    if models == 2:
        return Advice("nuslerp", "as no base is known: it goes half of the way between two models, and keeps lengths")
    return Advice("linear", "as no base is known: the average of the models")
