"""Models that are merged row by row although their tokenizers differ: found in tokenizer.json, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from hf_merge.planning import Problem
from hf_merge.sources import Source
from hf_merge.tokenization.union import vocabulary_of


def differences(sources: Mapping[Any, Source], donor: Any) -> Iterator[Problem]:
    """Yield a warning for each model with other tokens at the same ids than the donor.

    Models whose files are equal, or whose tokenizer is not in a folder, are taken for alike.
    """
    first = _content(sources[donor])
    mine = None if first is None else _vocabulary(first)
    for ref, source in sources.items():
        theirs = _content(source) if ref != donor and mine is not None else None
        if theirs is None or theirs == first or mine is None:
            continue
        found = _vocabulary(theirs)
        if found is not None and found != mine:
            yield from _compare(sources[donor].label, mine, source.label, found)


def _content(source: Source) -> bytes | None:
    path = source.path / "tokenizer.json" if source.path is not None and source.path.is_dir() else None
    return path.read_bytes() if path is not None and path.is_file() else None


def _vocabulary(content: bytes) -> dict[str, int] | None:
    try:
        return vocabulary_of(from_json(content))
    except (ValueError, KeyError, TypeError, AttributeError):  # not ours to report: it is copied as it is
        return None


def _compare(mine_label: str, mine: Mapping[str, int], label: str, theirs: Mapping[str, int]) -> Iterator[Problem]:
    fix = "set tokenizer_source: union, base or a model, so that rows are matched by token"
    by_id = {i: token for token, i in mine.items()}
    other = [(i, token) for token, i in theirs.items() if i in by_id and mine.get(token) != i]
    if other:
        i, token = min(other)
        told = f"'{label}' has other tokens than '{mine_label}' at {len(other)} ids, such as '{token}' instead of"
        yield Problem("warning", f"{told} '{by_id[i]}' at {i}: {fix}.")
    elif new := sorted(theirs.keys() - mine.keys(), key=lambda token: theirs[token]):
        told = f"'{label}' has {len(new)} tokens that '{mine_label}' lacks, such as '{new[0]}'"
        yield Problem("warning", f"{told}; the result has no tokens for them: {fix}.")
