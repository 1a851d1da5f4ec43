"""Models that are merged row by row although their tokenizers differ: found in tokenizer.json, without loading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from hf_merge.planning import Problem
from hf_merge.sources import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.tokenization.union import vocabulary_of

_TOKENIZER = "tokenizer.json"


def differences(sources: Mapping[Any, Source], donor: Any) -> Iterator[Problem]:
    """Yield a warning for each model with other tokens at the same ids than the donor.

    Models whose files are equal, or whose tokenizer is not in a folder, are taken for alike.
    """
    others = {ref: source for ref, source in sources.items() if not _same_file(source, sources[donor])}
    mine = _content(sources[donor]) if others else None
    for ref, source in others.items():
        theirs = _content(source) if ref != donor and mine is not None else None
        if mine is None or theirs is None or mine == theirs:
            continue
        left, right = _vocabularies(mine, theirs)
        if left != right:
            yield from _compare(sources[donor].label, left, source.label, right)


def _folder(source: Source) -> Folder | None:
    """Return the folder of a model that has a tokenizer.json in it."""
    own = source.parts[0]
    return own.folder if isinstance(own, Checkpoint) and not own.path.is_file() and _TOKENIZER in own.folder else None


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
