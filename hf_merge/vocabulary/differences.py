"""Models that are merged row by row although their tokenizers differ: found in tokenizer.json, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from hf_merge.planning import Problem
from hf_merge.sources import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.tokenization.union import vocabulary_of


def differences(sources: Mapping[Any, Source], donor: Any) -> Iterator[Problem]:
    """Yield a warning for each model with other tokens at the same ids than the donor.

    Models whose files are equal, or whose tokenizer is not in a folder, are taken for alike.
    """
    mine = _content(sources[donor])
    for ref, source in sources.items():
        theirs = _content(source) if ref != donor and mine is not None else None
        if mine is None or theirs is None or mine == theirs:
            continue
        left, right = _vocabularies(mine, theirs)
        if left != right:
            yield from _compare(sources[donor].label, left, source.label, right)


def _content(source: Source) -> bytes | None:
    """Return tokenizer.json up to its merges, which are most of it and of no concern here."""
    own = source.parts[0]
    path = own.path / "tokenizer.json" if isinstance(own, Checkpoint) else None
    if path is None or not path.is_file():
        return None
    content = path.read_bytes()
    end = content.rfind(b'"merges"')
    return content if end < 0 else content[:end]


def _vocabularies(*contents: bytes) -> list[dict[str, int]]:
    """Return the tokens of files that end before their merges; only added tokens where all else is equal."""
    tails = {content[content.find(b'"model"') :] for content in contents}
    heads = [content[: content.find(b'"model"')] for content in contents] if len(tails) == 1 else contents
    try:
        states = [from_json(head, allow_partial=True) for head in heads]
        return [vocabulary_of({"model": {"vocab": {}}, **state}) for state in states]
    except (ValueError, KeyError, TypeError, AttributeError):  # not ours to report: it is copied as it is
        return [{} for _ in contents]


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
