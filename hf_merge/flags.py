"""Flags that several commands share."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

from hf_merge import _compat

_, Option, _ = _compat.cli_words()

Token = Annotated[str | None, Option("--token", help="For private and gated models on the Hub.")]
CacheDir = Annotated[str | None, Option("--cache-dir", help="Where models of the Hub are kept.")]
LocalOnly = Annotated[bool, Option("--local-files-only", help="Do not ask the Hub.")]


def shared(flags: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command more flags, those in the signature of a function; it takes them as `**words`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]

        @wraps(command)
        def run(*args: Any, **words: Any) -> None:
            command(*args, **words)

        run.__signature__ = inspect.Signature([*own, *inspect.signature(flags).parameters.values()])  # type: ignore[attr-defined]
        return run

    return decorate
