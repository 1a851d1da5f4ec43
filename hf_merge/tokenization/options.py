"""What a recipe may say of tokenizer, vocabulary and chat template, in MergeKit's words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, model_validator

from hf_merge.errors import did_you_mean
from hf_merge.tokenization.chat_templates import BUILT_IN, template_error
from hf_merge.types import ModelRef, Ref, as_model

Names = Mapping[Ref, ModelRef]


@dataclass(frozen=True)
class ZeroRow:
    """A row of zeros."""


@dataclass(frozen=True)
class ModelToken:
    """The row that a model has for some token of its own, by text or by id."""

    model: Ref
    token: str | None = None
    token_id: int | None = None


RowSource = Ref | ModelToken | ZeroRow
_KEYS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


def _as_source(value: Any) -> str | Ref:
    return value if isinstance(value, str) and value in ("union", "base") else as_model(value)


def _as_row_source(value: Any) -> RowSource:
    """Read where a row comes from: a model, zero, or the token of a model."""
    if isinstance(value, (ModelToken, ZeroRow)):
        return value
    if value == "zero":
        return ZeroRow()
    if not (isinstance(value, Mapping) and "kind" in value):
        return as_model(value)
    known = _KEYS.get(str(value["kind"]))
    if known is None:
        raise ValueError(f"has the kind '{value['kind']}'; the kinds are {', '.join(_KEYS)}")
    if unknown := set(map(str, value)) - set(known):
        raise ValueError(f"has an unknown key '{min(unknown)}' (known: {', '.join(known)})")
    return _as_model_token(value) if value["kind"] == "model_token" else ZeroRow()


def _as_model_token(value: Mapping[str, Any]) -> ModelToken:
    token, token_id = value.get("token"), value.get("token_id")
    if value.get("model") is None or (token is None) == (token_id is None):
        raise ValueError("of kind model_token needs a model, and one of token and token_id")
    if not isinstance(token, str | None) or isinstance(token_id, bool) or not isinstance(token_id, int | None):
        raise ValueError("of kind model_token has a text as token, or a number as token_id")
    if token_id is not None and token_id < 0:
        raise ValueError(f"has the token_id {token_id}; ids begin at 0")
    return ModelToken(as_model(value["model"]), token, token_id)


def _plain_row_source(value: RowSource) -> Any:
    if isinstance(value, ModelToken):
        named = {"token": value.token} if value.token is not None else {"token_id": value.token_id}
        return {"kind": "model_token", "model": str(value.model), **named}
    return "zero" if isinstance(value, ZeroRow) else str(value)


TokenizerSource = Annotated[str | Ref, PlainValidator(_as_source), PlainSerializer(str)]


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, cls)):
            raise ValueError(f"should be a mapping with some of the keys {', '.join(cls.model_fields)}")
        return value


class TokenOptions(_Options):
    """Where the row of one token comes from.

    Attributes:
        source: the model, the token of a model, or zero; None leaves it to the rule for tokens that a model lacks.
        force: replace the row in every model, not only where it is lacking.
    """

    source: Annotated[RowSource, PlainValidator(_as_row_source), PlainSerializer(_plain_row_source)] | None = None
    force: bool = False

    @property
    def models(self) -> tuple[Ref, ...]:
        """The model that the row comes from, if it comes from one."""
        if isinstance(self.source, ModelToken):
            return (self.source.model,)
        return () if self.source is None or isinstance(self.source, ZeroRow) else (self.source,)

    def renamed(self, names: Names) -> TokenOptions:
        """Return the same with other names for models."""
        source = self.source
        if isinstance(source, ModelToken):
            source = ModelToken(names.get(source.model, source.model), source.token, source.token_id)
        elif source is not None and not isinstance(source, ZeroRow):
            source = names.get(source, source)
        return self.model_copy(update={"source": source} if source is not None else {})


class TokenizerOptions(_Options):
    """The tokenizer of the result, and the rows of its tokens.

    Attributes:
        source: `union` of all models' tokenizers, `base` (that of the base, or of the first model), or that of a model.
        tokens: tokens with rows of their own; those that the tokenizer lacks are added to it.
        pad_to_multiple_of: round the number of rows up to a multiple.
    """

    source: TokenizerSource = "union"
    tokens: dict[str, TokenOptions] = {}
    pad_to_multiple_of: Annotated[int, Ge(1)] | None = None

    def renamed(self, names: Names) -> TokenizerOptions:
        """Return the same with other names for models."""
        source = self.source if isinstance(self.source, str) else names.get(self.source, self.source)
        tokens = {token: options.renamed(names) for token, options in self.tokens.items()}
        return self.model_copy(update={"source": source, "tokens": tokens} if tokens else {"source": source})

    def strangers(self, models: Sequence[Ref]) -> Iterator[tuple[str, Ref]]:
        """Yield the tokens whose row comes from none of these models, with the model that they name."""
        for token, options in self.tokens.items():
            yield from ((token, model) for model in options.models if model not in models)


def keys_at(place: Sequence[Any]) -> tuple[str, ...]:
    """Return the keys that are known at a place under `tokenizer:` of a recipe, the last part being the unknown one."""
    if tuple(place[:1]) != ("tokenizer",) or len(place) < 2:
        return ()
    return tuple((TokenizerOptions if len(place) == 2 else TokenOptions).model_fields)


def _as_template(value: Any) -> str:
    """Read a chat template: a word, Jinja, or the file that it is in."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("should be auto, the name of a built-in template, Jinja, or the path of a file")
    if value == "auto" or value in BUILT_IN:
        return value
    is_text = "{" in value or "\n" in value
    text = value if is_text else _template_file(value)
    if error := template_error(text):
        raise ValueError(f"is no Jinja template: {error}")
    return text


def _template_file(value: str) -> str:
    path = Path(value).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        known = ("auto", *BUILT_IN)
        raise ValueError(
            f"is neither a built-in template ({', '.join(known)}), nor a text file, nor Jinja{_ask(value, known)}"
        ) from None


def _ask(word: str, known: Sequence[str]) -> str:
    suggestion = did_you_mean(word, known).strip()
    return f" ({suggestion})" if suggestion else ""


ChatTemplate = Annotated[str, PlainValidator(_as_template)]
