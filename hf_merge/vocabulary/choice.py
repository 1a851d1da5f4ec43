"""Which tokenizer the result has: that of a model, or the union of all, if there is one that keeps every text whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_merge.errors import SourceError
from hf_merge.planning import Problem
from hf_merge.tokenization import union
from hf_merge.tokenization.loading import LoadedTokenizer, load_reference, rebuilt
from hf_merge.tokenization.options import TokenizerOptions
from hf_merge.types import Ref

_FIX = "set tokenizer_source: base, or name the model whose tokenizer the result should have"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


@dataclass(frozen=True)
class Choice:
    """The tokenizer of the result.

    Attributes:
        tokenizer: what it is.
        model: the model whose ids it has, if it is one of those that are merged.
        problems: what was found on the way.
    """

    tokenizer: LoadedTokenizer
    model: Ref | None
    problems: tuple[Problem, ...]


def choose(options: TokenizerOptions, loaded: Mapping[Ref, LoadedTokenizer], donor: Ref, **hub: Any) -> Choice:
    """Find the tokenizer that is asked for, with all tokens that the recipe speaks of.

    Args:
        options: what is asked for.
        loaded: the tokenizers of the models.
        donor: the model that is meant by `base`.
        **hub: for a tokenizer that is none of the models'.

    Raises:
        SourceError: there is no such tokenizer, or tokens cannot be added to it.
    """
    if isinstance(options.source, str):
        chosen, model = loaded[donor], donor
    else:
        model = options.source if options.source in loaded else None
        chosen = loaded[model] if model is not None else load_reference(options.source, **hub)
    problems: list[Problem] = []
    states = [chosen]
    if options.source == "union":
        others = [tokenizer for ref, tokenizer in loaded.items() if ref != donor]
        problems = list(_obstacles(chosen, others))
        states = [chosen] if problems else [chosen, *others]
    made = _with(states, [token for token in options.tokens if token not in chosen.vocab], [*loaded.values()])
    if len(states) > 1:
        problems = [*_changes(made, states), *_conflicts(states)]
    return Choice(made, model, (*problems, *_ends(made, [*loaded.values()])))


def _obstacles(first: LoadedTokenizer, others: Sequence[LoadedTokenizer]) -> Iterator[Problem]:
    """Yield why there is no union."""
    for one in (first, *others):
        if one.backend is None:
            found = f"The tokenizer of '{one.label}' is written in Python and has no tokenizer.json"
            yield Problem("error", f"{found}: it cannot be united with others; {_FIX}.")
            return
    for other in others:
        if reason := union.cannot_be_united(first.state, other.state):
            found = f"The tokenizers of '{first.label}' and '{other.label}' have no union ({reason})"
            yield Problem("error", f"{found}: {_FIX}.")


def _with(parts: Sequence[LoadedTokenizer], tokens: Sequence[str], everyone: Sequence[LoadedTokenizer]) -> Any:
    """Return the union of tokenizers, with further tokens; the first itself if it has them all."""
    first = parts[0]
    extra = [_definition(token, everyone) for token in tokens]
    if first.backend is None:
        if extra:
            raise SourceError(f"The tokenizer of '{first.label}' is written in Python: no tokens can be added to it.")
        return first
    if not extra and all(part.files == first.files for part in parts):
        return first
    state = union.unite([part.state for part in parts], extra)
    return first if state == first.state else rebuilt(first, state)


def _definition(token: str, everyone: Sequence[LoadedTokenizer]) -> dict[str, Any]:
    """Return an added token as some model has it, or a plain one."""
    known = (t for one in everyone if one.backend is not None for t in one.state["added_tokens"])
    return next((t for t in known if t["content"] == token), {"content": token, **_PLAIN})


def _changes(made: LoadedTokenizer, parts: Sequence[LoadedTokenizer]) -> Iterator[Problem]:
    """Yield for each model a text of its own that the union cuts otherwise."""
    for part in parts:
        if part.files == made.files or union.must_agree(part.state, made.state):
            continue
        whole = any(
            union.is_like(made.state, other.state) and union.is_begun_by(other.state, part.state)
            for other in parts if other is not part
        )  # fmt: skip
        found = union.changes(part.state, made.state, (part.backend, made.backend))
        broken = [] if whole else [c for c in found if not union.is_added(c, part.state, made.state)]
        if broken:
            told = f"The union breaks the tokenizer of '{part.label}': {broken[0]}"
            yield Problem("error", f"{told}. Their merges or pieces cannot stand side by side: {_FIX}.")
        elif found:
            told = f"Tokens of other models occur in texts of '{part.label}': {found[0]}"
            yield Problem("warning", f"{told}. If that is not meant, {_FIX}.")


def _conflicts(parts: Sequence[LoadedTokenizer]) -> Iterator[Problem]:
    first = parts[0]
    for other in parts[1:]:
        if tokens := union.conflicts(first.state, other.state):
            told = f"'{other.label}' defines added tokens otherwise than '{first.label}', whose definition holds"
            yield Problem("warning", f"{told}: {_few(tokens)}.")


def _ends(made: LoadedTokenizer, everyone: Sequence[LoadedTokenizer]) -> Iterator[Problem]:
    """Yield the models that end their texts with another token than the result."""
    mine = getattr(made.tokenizer, "eos_token", None)
    for other in everyone:
        theirs = getattr(other.tokenizer, "eos_token", None)
        if theirs and theirs != mine:
            told = f"'{other.label}' ends its texts with '{theirs}', the result with '{mine}'"
            yield Problem("warning", f"{told}: if it does not stop, name the eos_token_id in generation_config.json.")


def _few(tokens: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(f"'{token}'" for token in tokens[:limit])
    return shown + (f" and {len(tokens) - limit} more" if len(tokens) > limit else "")
