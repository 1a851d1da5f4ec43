"""What can go wrong, as one tree.

    MergeError
    ├── RecipeError          the recipe says something that cannot be meant
    │   ├── ParameterError   a method's parameter is unknown, misspelt or out of range
    │   └── UnknownMethodError
    ├── SourceError          a model cannot be read
    ├── PlanError            the models do not fit together (`.problems` lists all of it)
    ├── DataError            data that a model cannot be run on
    ├── ComputeError         a tensor cannot be merged (a NaN, buffers that differ)
    ├── OutputError          the result cannot be written
    │   ├── OutputExistsError
    │   └── PublishError     the Hub does not take it
    └── Cancelled            the caller wants no more of it (raised in `on_progress`)

Every message says what was wrong, what was found and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class MergeError(Exception):
    """Anything hf_merge refuses to do."""


class RecipeError(MergeError, ValueError):
    """A recipe that cannot be meant."""


class ParameterError(RecipeError):
    """A method's parameter that is unknown, misspelt or out of range."""


class UnknownMethodError(RecipeError, KeyError):
    """A merge method that nobody registered."""

    __str__ = Exception.__str__  # KeyError would print the repr of the message


class SourceError(MergeError):
    """A model that cannot be read."""


class DataError(MergeError):
    """Data that a model cannot be run on."""


class PlanError(MergeError):
    """Models that do not fit together.

    Attributes:
        problems: every problem found, each with its fix.
    """

    def __init__(self, message: str, problems: Sequence[Any] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


class ComputeError(MergeError):
    """A tensor that cannot be merged."""


class OutputError(MergeError):
    """A result that cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """The output folder, or the repository on the Hub, holds something already."""


class PublishError(OutputError):
    """A result that the Hub does not take."""


class Cancelled(MergeError):
    """A merge or an upload that its caller has ended: what to raise in `on_progress`."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as an error shows it: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else text[:limit] + "..."
