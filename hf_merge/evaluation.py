"""Results of evaluations on a card: in its front matter, as the Hub reads them, and as a table."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from hf_merge.errors import MergeError

NOT_EVALUATED = (
    "The merge was not run and not evaluated: results of its models do not hold for it, and neither do tests of their "
    "safety."
)
EVALUATED = (
    "The merge was evaluated as far as the table above says, by whoever put the results there; nothing else was "
    "tested. Results of its models do not hold for it, and neither do tests of their safety."
)
_BEGIN, _END = "<!-- hf_merge: evaluation -->", "<!-- /hf_merge: evaluation -->"
_SECTION = re.compile(rf"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
_PLACE = re.compile(r"^## (Licence|Limits)\b", re.MULTILINE)
_MARKUP = re.compile(r"([\\`*_\[\]|~])")

Compared = Mapping[str, Sequence[EvalResult]]


def evaluation_table(results: Sequence[EvalResult], compared: Compared | None = None) -> str:
    """Write results as a table, with those of other models beside them; nothing if there are none.

    Args:
        results: of the merge.
        compared: results of other models, by the name that heads their column.
    """
    if not results:
        return ""
    others = {name: {_identity(one): one for one in theirs} for name, theirs in (compared or {}).items()}
    head = ["dataset", "metric", "this model", *map(_cell, others)]
    rows = [
        [_dataset(one), _metric(one), _value(one), *(_value(theirs.get(_identity(one))) for theirs in others.values())]
        for one in results
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([_BEGIN, *(f"| {' | '.join(line)} |" for line in lines), _END])


def with_results(
    card: ModelCard, name: str, results: Sequence[EvalResult], compared: Compared | None = None
) -> ModelCard:
    """Add results to a card; those of the same dataset and metric take the place of earlier ones.

    All else that the card says stays: a table that is there already is replaced where it stands.

    Args:
        card: what is there; it is changed.
        name: of the model, if the card names none.
        results: what is added.
        compared: results of other models, for the table only.

    Raises:
        MergeError: these are no results.
    """
    if wrong := [one for one in results if not isinstance(one, EvalResult)]:
        raise MergeError(f"Results are huggingface_hub.EvalResult; found {type(wrong[0]).__name__}.")
    data: Any = card.data
    merged = {_identity(one): one for one in [*(data.eval_results or ()), *results]}
    if not merged:
        return card
    data.eval_results, data.model_name = [*merged.values()], data.get("model_name") or name
    table = evaluation_table(data.eval_results, compared)
    card.text = _placed(card.text.replace(NOT_EVALUATED, EVALUATED), table)
    return card


def _placed(text: str, table: str) -> str:
    """Put the table in the place of an earlier one, or before the licence, or at the end."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: table, text, count=1)
    section, found = f"## Evaluation\n\n{table}\n", _PLACE.search(text)
    if found:
        return f"{text[: found.start()]}{section}\n{text[found.start() :]}"
    return f"{text.rstrip()}\n\n{section}"


def _identity(one: EvalResult) -> tuple[str, ...]:
    """Say what a result is of, so that a new one replaces an old one."""
    told = (one.task_type, one.dataset_type, one.dataset_config, one.dataset_split, one.dataset_revision,
            one.dataset_args, one.metric_type, one.metric_config, one.metric_args)  # fmt: skip
    return tuple(map(repr, told))


def _dataset(one: EvalResult) -> str:
    told = ", ".join(_cell(word) for word in (one.dataset_config, one.dataset_split) if word)
    return _cell(one.dataset_name) + (f" ({told})" if told else "")


def _metric(one: EvalResult) -> str:
    name = _cell(one.metric_name or one.metric_type)
    source = one.source_url or ""
    linked = re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", source)
    return f"{name} ([source]({source}))" if linked else name


def _value(one: EvalResult | None) -> str:
    if one is None:
        return "-"
    return f"{one.metric_value:.4g}" if isinstance(one.metric_value, float) else _cell(one.metric_value)


def _cell(text: object) -> str:
    """Write text so that it is nothing but text in a table."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
