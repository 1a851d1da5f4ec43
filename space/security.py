"""What visitors send, checked before anything is done with it; what they are shown and what is logged, cleaned.

Everything that comes from a visitor, a repository's card or its config is somebody else's text.
"""

from __future__ import annotations

import html
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import form
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_merge import Recipe, RecipeError
from hf_merge.types import InMemory, ModelRef, Ref

MAX_RECIPE = 64_000
"""Bytes of a recipe."""
MAX_DEPTH = 32
MAX_MODELS = 16
EXAMPLE = Path(__file__).resolve().parent / "example"
EXAMPLES = frozenset(str(file.parent) for file in EXAMPLE.glob("*/config.json"))
"""Models of the worked example, the only folders that everybody may name."""
LOOPBACK = ("", "127.0.0.1", "localhost", "::1")

_HUB_HOSTS = ("hf.co", "huggingface.co", "www.huggingface.co")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "docs", "api", "buckets", "settings", "join", "login")


class Refused(ValueError):
    """What a visitor asked for is not done; the message is for that visitor."""


def allowed_local() -> bool:
    """Tell whether the page serves only who sits at this machine, whose folders and token it then may use."""
    host, shared = os.environ.get("GRADIO_SERVER_NAME", ""), os.environ.get("GRADIO_SHARE", "")
    return not os.environ.get("SPACE_ID") and host in LOOPBACK and shared.lower() not in ("1", "true", "yes")


# --- who asks


def guard(request: Any) -> None:
    """Refuse a call that another site has made in the name of a signed-in visitor.

    Gradio answers every origin, and its cookie goes with calls from anywhere. Browsers name the origin of each call
    that changes something; programs, which have no cookie of somebody else's, name none.

    Args:
        request: `gr.Request`, or anything with `headers`. There is none inside of tests and of Gradio's own calls.

    Raises:
        Refused: the call comes from another site.
    """
    if is_foreign(getattr(request, "headers", None) or {}):
        raise Refused(
            "This call came from another site, and nothing was done: open this page itself and repeat it there."
        )


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Tell whether another site's page sent a request; programs name no site at all."""
    said = {str(key).lower(): str(value) for key, value in dict(headers).items()}
    origin, host = said.get("origin"), said.get("host", "")
    if origin is None:
        return said.get("sec-fetch-site", "none") not in ("none", "same-origin")
    return not _host(origin) == _host(f"//{host}") != ""


def is_loopback(host: str) -> bool:
    """Tell whether a request calls this machine by a name that no other site can have."""
    name = re.sub(r":\d+$", "", host.lower()).strip("[]")
    return name in LOOPBACK[1:] or name.endswith(".localhost")


def _host(address: str) -> str:
    """Return host and port of an address, without the port that every browser leaves out; empty if it has none."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return ""
    host = (parts.hostname or "").rstrip(".")
    return host if not host or port in (None, 80, 443) else f"{host}:{port}"


# --- what they ask for


def repo_id(text: str, *, local: bool | None = None) -> str:
    """Return the model that a visitor named: `namespace/name`, with `@revision` and `+adapter` where they were given.

    Args:
        text: an id, its address on the Hub, or a folder of this machine.
        local: whether folders are allowed; as `allowed_local` says if not given.

    Returns:
        The id, or the absolute path of the folder.

    Raises:
        Refused: it is none of these.
    """
    said = text.strip()
    if not said or len(said) > 1000:
        raise Refused("Name a model: NAMESPACE/NAME, or its address on the Hub.")
    folder = _folder(said)
    if folder is not None:
        if allowed_local() if local is None else local:
            return str(folder)
        raise Refused(f"{_shown(said)} is a folder, and a Space reads models of the Hub only: run hf-merge at home.")
    if "+" in said and "://" not in said:  # a base with adapters
        return "+".join(repo_id(part, local=local) for part in said.split("+"))
    path, at, revision = _of_address(said)
    _check_id(path, said)
    if at and not _REVISION.fullmatch(revision):
        raise Refused(f"{_shown(revision)} is no branch, tag or commit: leave out what follows the '@'.")
    return f"{path}@{revision}" if at else path


def _folder(said: str) -> Path | None:
    """Return the path that is meant, if it is one by its form or because it is there."""
    if "://" in said:
        return None
    by_form = said.startswith(("/", "\\", "~", ".")) or "\\" in said or re.match(r"[A-Za-z]:", said) is not None
    try:
        path = Path(said).expanduser()
        return path.absolute() if by_form or path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return Path(said) if by_form else None


def _of_address(said: str) -> tuple[str, str, str]:
    """Take an address of the Hub apart, or `id@revision`."""
    bare = re.sub(r"^(www\.)?(hf\.co|huggingface\.co)/", r"https://\2/", said)
    if "://" not in bare:
        return said.partition("@")
    try:
        parts = urlsplit(bare)
        is_hub = parts.scheme in ("http", "https") and parts.hostname in _HUB_HOSTS and parts.port in (None, 80, 443)
    except ValueError:
        is_hub, parts = False, urlsplit("")
    words = [unquote(word) for word in parts.path.split("/") if word]
    if not is_hub or parts.username or not words:
        raise Refused(f"{_shown(said)} is not the address of a model on huggingface.co.")
    if words[0] in _OTHER_KINDS:
        raise Refused(f"{_shown(said)} is under /{words[0]}, and what is merged are models.")
    if words[2:3] and words[2] in ("tree", "blob", "resolve", "commit") and words[3:]:
        return "/".join(words[:2]), "@", words[3] if words[3] != "refs" else "/".join(words[3:6])
    return "/".join(words[:2]), "", ""


def _check_id(path: str, said: str) -> None:
    try:
        validate_repo_id(path)
    except HFValidationError:
        path = ""
    if not _ID.fullmatch(path):
        raise Refused(
            f"{_shown(said)} is not the id of a model: NAMESPACE/NAME, of letters, digits, '-', '_' and '.', "
            "or its address on the Hub."
        )


def recipe_of(text: str, *, local: bool | None = None, known: Collection[str] = EXAMPLES) -> Recipe:
    """Read a visitor's recipe.

    YAML without anchors, aliases and tags; models that are ids of the Hub; nothing that names a file of the server, and
    no pattern that may take for ever.

    Args:
        text: the recipe.
        local: whether it may name files of this machine, and patterns; as `allowed_local` says if not given.
        known: models that may be named as they are: the worked example's.

    Raises:
        Refused: it is too large or too deep, or names what it may not.
        RecipeError: it cannot be meant; with the line.
    """
    if len(text.encode("utf-8", "replace")) > MAX_RECIPE:
        raise Refused(f"The recipe has more than {MAX_RECIPE // 1000} kB; one has a few thousand characters.")
    documents = _plain(text)
    is_far = not (allowed_local() if local is None else local)
    for document in documents if is_far else ():
        _refuse_files(document)  # before the recipe is read, since reading it reads a chat template's file
    try:
        recipe = Recipe.from_yaml(text)
    except RecursionError:
        raise RecipeError("The recipe is nested beyond reason.") from None
    models = list(dict.fromkeys(model for each in (recipe, *recipe.stages) for model in _models(each)))
    if len(models) > MAX_MODELS:
        raise Refused(f"The recipe names {len(models)} models; here it may be {MAX_MODELS}.")
    for part in (part for model in models for part in _parts(model) if is_far and part.path not in known):
        repo_id(f"{part.path}@{part.revision}" if part.revision else part.path, local=False)
    return recipe


def allowed(recipe: Mapping[str, Any], *, local: bool) -> None:
    """Refuse a recipe, as plain data, that names what is not the visitor's: as last check before its models are read.

    Raises:
        Refused, RecipeError: as `recipe_of`.
    """
    if not local:
        recipe_of(form.to_yaml(recipe), local=local)


def _plain(text: str) -> list[Mapping[str, Any]]:
    """Read YAML with no more than a recipe needs.

    Raises:
        RecipeError: it is none, or has anchors, aliases or tags, or is too deep; with the line.
    """
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError(f"line {line}: Anchors and aliases (& and *) are not read here: write it out.")
            if getattr(event, "tag", None):
                raise RecipeError(f"line {line}: Tags ({_shown(str(event.tag))}) are not read here: leave it out.")  # type: ignore[attr-defined]
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RecipeError(f"line {line}: The recipe is nested deeper than {MAX_DEPTH} times.")
        found = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(
            f"{place}This is not YAML: {getattr(error, 'problem', None) or 'it cannot be read'}."
        ) from None
    except (RecursionError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"The recipe cannot be read ({type(error).__name__}).") from None
    return [each for each in found if isinstance(each, Mapping)]


def _refuse_files(document: Mapping[str, Any]) -> None:
    """Refuse what would read a file of the server, or let a visitor's regular expression run on it."""
    for entry in _entries(document):
        if entry.get("statistics"):
            raise Refused("'statistics' names files, and a Space has none of yours: run hf-merge at home, or a job.")
    if document.get("remap"):
        raise Refused("'remap' runs regular expressions, which may take for ever: run hf-merge at home, or a job.")
    template = document.get("chat_template")
    if isinstance(template, str) and template != "auto" and template not in _built_in_templates():
        raise Refused(f"'chat_template' may be auto, {', '.join(_built_in_templates())} here: no file, and no Jinja.")


def _built_in_templates() -> list[str]:
    from hf_merge.tokenization.chat_templates import BUILT_IN

    return sorted(BUILT_IN)


def _entries(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every mapping in plain data."""
    if isinstance(value, Mapping):
        yield value
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        yield from _entries(each)


def _models(recipe: Recipe) -> Iterator[Ref]:
    """Yield every model that a recipe names, wherever it names it."""
    yield from recipe.references
    for rule in recipe.rules:
        yield from rule.models
    if recipe.vocabulary is not None:
        if not isinstance(recipe.vocabulary.source, str):
            yield recipe.vocabulary.source
        for options in recipe.vocabulary.tokens.values():
            yield from options.models


def _parts(model: Ref) -> list[ModelRef]:
    """Return a model and its adapters."""
    if isinstance(model, InMemory):
        raise Refused("The recipe names a model in memory, and there is none.")
    return model.parts


# --- what they are shown


def escape(text: object) -> str:
    """Make somebody's text harmless in HTML, attributes included."""
    return html.escape(_printable(str(text)), quote=True)


def escape_markdown(text: object) -> str:
    """Make somebody's text harmless in Markdown: one line, and no link, HTML, or heading in it."""
    line = " ".join(_printable(str(text)).split())
    told = re.sub(r"([\\`*_{}\[\]()#+\-.!|~>$:@/])", r"\\\1", line)
    return told.replace("&", "&amp;").replace("<", "&lt;")


def _printable(text: str) -> str:
    """Take out what is not seen: control characters, and those that turn the direction of text."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]", "", text)


def _shown(text: str) -> str:
    """Return somebody's text for an error: short, in quotes, and without secrets."""
    short = redact(_printable(text))
    return repr(short if len(short) <= 80 else f"{short[:80]}...")


# --- what is logged

_SECRETS = (
    (re.compile(r"\b(hf|api_org)_(oauth_|jwt_)?[A-Za-z0-9]{10,}[A-Za-z0-9._-]*"), "<token>"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 <token>"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9._-]+"), "<token>"),
    (
        re.compile(
            r"(?i)\b(x-amz-(?:signature|credential|security-token)|signature|key-pair-id|policy|(?:access_|oauth_|id_|"
            r"refresh_)?token|client_secret|secret|password|api_?key|code|state|sign)=[^&\s\"'<>]+"
        ),
        r"\1=<secret>",
    ),
    (
        re.compile(
            r"(?i)([\"']?(?:authorization|(?:set-)?cookie|x-xet-access-token|[a-z_]*token|client_secret)[\"']?\s*:\s*)"
            r"([\"'])[^\"']+\2"
        ),
        r"\1\2<secret>\2",
    ),
    (re.compile(r"(?i)((?:authorization|cookie)\s*:\s*)(?![\"'])(?!(?:bearer|basic) <)[^\r\n]+"), r"\1<secret>"),
    (re.compile(r"(https?://)[^/\s:@]+:[^/\s@]+@"), r"\1<secret>@"),
)


def redact(text: str) -> str:
    """Take tokens, signatures of addresses and cookies out of a text."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class Redacted(logging.Filter):
    """Redacts every record that passes: message, arguments and traceback.

    Put it on handlers; on a logger it does not see what comes from those below.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean a record in its place, and let it pass."""
        try:
            message = record.getMessage()
        except Exception:  # a message that does not fit its arguments would be printed with them
            message = f"{record.msg} (its arguments do not fit)"
        record.msg, record.args = redact(message), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


def redact_logs() -> None:
    """Let everything that this process logs pass a `Redacted`, for every handler that there is by now."""
    loggers = [logging.getLogger(), *(each for each in logging.root.manager.loggerDict.values())]
    for handler in (handler for each in loggers if isinstance(each, logging.Logger) for handler in each.handlers):
        if not any(isinstance(each, Redacted) for each in handler.filters):
            handler.addFilter(Redacted())
