"""Models that are merged row by row although their tokenizers differ: found in tokenizer.json, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from hf_merge.planning import Problem
from hf_merge.sources import Source
from hf_merge.sources.folder import Folder
from hf_merge.tokenization.peeking import folder_of
from hf_merge.tokenization.union import vocabulary_of

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Difference:
    """How a model's tokenizer differs from another's.

    Attributes:
        moved: at how many ids that both have it has other tokens.
        first: the first of these ids, its token there, and the other's; None if there is none.
        new: tokens that only it has, in the order of their ids.
    """

    moved: int
    first: tuple[int, str, str] | None
    new: tuple[str, ...]


def differences(sources: Mapping[Any, Source], donor: Any) -> Iterator[Problem]:
    """Yield a warning for each model with other tokens at the same ids than the donor.

    Models whose files are equal, or whose tokenizer is not in a folder, are taken for alike.
    """
    mine, fix = sources[donor], "set tokenizer_source: union, base or a model, so that rows are matched by token"
    for ref, source in sources.items():
        found = None if ref == donor else compare(source, mine)
        if found and found.first:
            i, token, own = found.first
            told = f"'{source.label}' has other tokens than '{mine.label}' at {found.moved} ids, such as '{token}'"
            yield Problem("warning", f"{told} instead of '{own}' at {i}: {fix}.")
        elif found:
            told = f"'{source.label}' has {len(found.new)} tokens that '{mine.label}' lacks, such as '{found.new[0]}'"
            yield Problem("warning", f"{told}; the result has no tokens for them: {fix}.")


def has_vocabulary(source: Source) -> bool:
    """Tell whether a model has a tokenizer.json, so that it can be compared."""
    return _folder(source) is not None


def compare(source: Source, other: Source) -> Difference | None:
    """Say how a model's tokenizer differs from another's; None if it does not, or if one has no tokenizer.json."""
    if _same_file(source, other):
        return None
    theirs, mine = _content(source), _content(other)
    if mine is None or theirs is None or mine == theirs:
        return None
    own, known = _vocabularies(theirs, mine)
    by_id = {i: token for token, i in known.items()}
    moved = [(i, token) for token, i in own.items() if i in by_id and known.get(token) != i]
    new = tuple(sorted(own.keys() - known.keys(), key=lambda token: own[token]))
    if not moved and not new:
        return None
    first = min(moved, default=None)
    return Difference(len(moved), None if first is None else (*first, by_id[first[0]]), new)


def _folder(source: Source) -> Folder | None:
    """Return the folder of a model that has a tokenizer.json in it."""
    folder = folder_of(source)
    return folder if folder is not None and _TOKENIZER in folder else None


def _same_file(first: Source, second: Source) -> bool:
    """Tell whether two models' tokenizers are the same file, without fetching it."""
    folders = [_folder(source) for source in (first, second)]
    known = {folder.identity(_TOKENIZER) if folder else None for folder in folders}
    return len(known) == 1 and None not in known


def _content(source: Source) -> bytes | None:
    """Return tokenizer.json up to its merges, which are most of it and of no concern here."""
    folder = _folder(source)
    if folder is None:
        return None
    content = folder.paths([_TOKENIZER])[0].read_bytes()
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
