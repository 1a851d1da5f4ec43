"""A recipe: what the user said, checked. MergeKit's YAML, and a superset of it.

merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 1.0, density: 0.5}       # one value, a gradient over layers, or filters
  - model: org/b@revision
parameters: {normalize: true}
dtype: bfloat16
seed: 0                                           # ours: random methods draw from it
rules:                                            # ours: another method for some tensors, first match wins
  - {pattern: "*.lm_head.*", merge_method: passthrough, models: [org/a]}
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Lt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from hf_merge.errors import ParameterError, RecipeError, did_you_mean, shown
from hf_merge.method import MergeMethod, get_method
from hf_merge.schedule import UNSET, is_filter, leaves, resolve
from hf_merge.tokenization.options import ChatTemplate, TokenizerOptions, TokenizerSource, keys_at
from hf_merge.types import InMemory, Model, ModelRef
from hf_merge.yaml_lines import load_yaml

NOT_YET = ("slices", "modules")
KEYWORDS = {"method": "merge_method", "lambda_": "lambda"}
"""Python spellings of words of the recipe."""


Setting = Any
Lines = Mapping[tuple[Any, ...], int]
"""The line of every key of a recipe's file."""
DType = Annotated[
    Literal["float16", "bfloat16", "float32", "float64"],
    BeforeValidator(lambda value: str(value).removeprefix("torch.")),
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ModelEntry(_Part):
    """A model and what is said of it alone."""

    model: Model
    parameters: dict[str, Setting] = {}


class Rule(_Part):
    """Another method for the tensors whose name matches.

    Attributes:
        pattern: a shell pattern for the whole name if it has `*`, `?` or `[`; otherwise a part of the name.
        merge_method: the recipe's own if not given.
        parameters: for these tensors; they win over those of the recipe and of its models.
        models: only these of the recipe's models (the base may be named too).
    """

    pattern: str
    merge_method: str | None = None
    parameters: dict[str, Setting] = {}
    models: tuple[Model, ...] = ()

    def matches(self, name: str) -> bool:
        """Tell whether the rule is meant for the tensor of that name."""
        return fnmatch.fnmatchcase(name, self.pattern) if set("*?[") & set(self.pattern) else self.pattern in name


class Recipe(_Part):
    """What is merged, and how. Frozen; read one with `load` or `from_yaml`.

    Attributes:
        merge_method: name of the method.
        models: the models, in order.
        base_model: the model the others were fine-tuned from; it also gives config and tokenizer.
        parameters: of the method; those under a model win.
        dtype: of the written weights (arithmetic is float32); the models' own if not given.
        out_dtype: wins over dtype, as in MergeKit.
        seed: random methods draw from it.
        rules: other methods for some tensors, first match wins.
        missing: what happens to a tensor that some model lacks: error, keep the base's, or merge without
            that model.
        allow_nonfinite: let NaN and Inf pass.
        tokenizer: of the result, and the rows of its tokens; the base's files as they are if not given.
        tokenizer_source: short for `tokenizer: {source: ..}`.
        chat_template: `auto`, a built-in name, or Jinja (the text of a file, once it is read).
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: Model | None = None
    parameters: dict[str, Setting] = {}
    dtype: DType | None = None
    out_dtype: DType | None = None
    seed: Annotated[int, Ge(0), Lt(1 << 63)] = 0
    rules: tuple[Rule, ...] = ()
    missing: Literal["error", "base", "skip-model"] = "error"
    allow_nonfinite: bool = False
    tokenizer: TokenizerOptions | None = None
    tokenizer_source: TokenizerSource | None = None
    chat_template: ChatTemplate | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        """Let a bare model stand for `{model: ...}`."""
        if not isinstance(value, (list, tuple)) or not value:
            raise ValueError("should be a list of at least one model")
        bare = [isinstance(e, (str, ModelRef, InMemory)) or (isinstance(e, Mapping) and "path" in e) for e in value]
        return [{"model": entry} if plain else entry for entry, plain in zip(value, bare, strict=True)]

    @field_validator("models")
    @classmethod
    def _each_once(cls, value: tuple[ModelEntry, ...]) -> tuple[ModelEntry, ...]:
        twice = [entry.model for i, entry in enumerate(value) if entry.model in [e.model for e in value[:i]]]
        if twice:
            raise ValueError(f"lists '{twice[0]}' twice; give it a larger weight instead")
        return value

    @field_validator("tokenizer_source")
    @classmethod
    def _one_tokenizer(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("tokenizer") is not None:
            raise ValueError("says again what 'tokenizer' says; write one of both")
        return value

    @classmethod
    def load(cls, source: Any, **changes: Any) -> Recipe:
        """Read a recipe and change it.

        Args:
            source: path of a YAML or JSON file, a mapping, a Recipe, or a list (or mapping of labels) of models.
            **changes: fields of the recipe (`method=`, `base_model=`, `dtype=`, ...) or parameters of the method.
                A list for a per-model parameter has one value for each model. What is said here wins.

        Raises:
            RecipeError: with the line of the file where something is wrong.
        """
        data, lines = _read(source)
        return _build(data, changes, lines)

    @classmethod
    def from_yaml(cls, text: str, **changes: Any) -> Recipe:
        """Read a recipe from YAML text; see `load`."""
        data, lines = load_yaml(text)
        return _build(data, changes, lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, the seed always included."""
        return {**self.model_dump(exclude_defaults=True), "seed": self.seed}

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `from_yaml` reads back."""
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False, allow_unicode=True)

    @property
    def references(self) -> list[ModelRef | InMemory]:
        """Every model of the recipe once: those merged, in order, then the base if it is not among them."""
        found = [entry.model for entry in self.models]
        return found if self.base_model is None or self.base_model in found else [*found, self.base_model]

    @property
    def vocabulary(self) -> TokenizerOptions | None:
        """What is said of the tokenizer, in either way."""
        short = self.tokenizer_source
        return TokenizerOptions(source=short) if self.tokenizer is None and short is not None else self.tokenizer

    def renamed(self, names: Mapping[ModelRef | InMemory, ModelRef]) -> Recipe:
        """Return the recipe with other names for some of its models."""
        models = tuple(e.model_copy(update={"model": names.get(e.model, e.model)}) for e in self.models)
        rules = tuple(
            rule.model_copy(update={"models": tuple(names.get(m, m) for m in rule.models)}) for rule in self.rules
        )
        base = None if self.base_model is None else names.get(self.base_model, self.base_model)
        tokenizer = None if self.tokenizer is None else self.tokenizer.renamed(names)
        short: Any = self.tokenizer_source  # a word, unless it is a model
        changed = {"models": models, "rules": rules, "base_model": base,
                   "tokenizer": tokenizer, "tokenizer_source": names.get(short, short)}  # fmt: skip
        return self.model_copy(update={key: value for key, value in changed.items() if value})

    def rule_for(self, name: str) -> Rule | None:
        """Return the first rule that matches a tensor."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def setting(self, parameter: str, name: str, depth: float, own: Mapping[str, Setting], rule: Rule | None) -> Any:
        """Resolve a parameter for one tensor: the rule's value, that of a model's `own`, the recipe's, or UNSET."""
        for scope in (rule.parameters if rule else {}, own, self.parameters):
            value = resolve(scope[parameter], name, depth) if parameter in scope else UNSET
            if value is not UNSET:
                return value
        return UNSET


def _read(source: Any) -> tuple[dict[str, Any], Lines]:
    if isinstance(source, Recipe):
        return {name: getattr(source, name) for name in source.model_fields_set}, {}
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, Mapping) and ("merge_method" in source or isinstance(source.get("models"), list)):
        return dict(source), {}
    if isinstance(source, Mapping):
        source = [in_memory(model, label) for label, model in source.items()]
    if not isinstance(source, Iterable):
        raise RecipeError(f"A recipe is a file, a mapping or a list of models; found {type(source).__name__}.")
    return {"models": [in_memory(model, f"model {i}") for i, model in enumerate(source)]}, {}


def in_memory(model: Any, label: str) -> Any:
    """Label a model that was handed over as an object; leave references and entries alone."""
    refers = isinstance(model, (str, os.PathLike, ModelRef, InMemory, ModelEntry))
    if isinstance(model, Mapping):
        named = model.get("model", model.get("path"))
        refers = isinstance(named, (str, os.PathLike, ModelRef, InMemory)) or (
            isinstance(named, Mapping) and isinstance(named.get("path"), str)
        )
    if refers or model is None:
        return os.fspath(model) if isinstance(model, os.PathLike) else model
    return InMemory(model, label)


def _read_file(path: Path) -> tuple[dict[str, Any], Lines]:
    if path.is_dir():
        raise RecipeError(f"'{path}' is a folder, not a recipe: to merge models, pass them as a list with method=.")
    try:
        return load_yaml(path.read_text(encoding="utf-8"), name=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read the recipe '{path}': {getattr(error, 'strerror', None) or error}.") from None


def _build(data: dict[str, Any], changes: Mapping[str, Any], lines: Lines) -> Recipe:
    """Apply keyword arguments to a recipe's data, fields first, then parameters of the method; check it all."""
    words = {KEYWORDS.get(key, key): value for key, value in changes.items() if value is not None}
    words = {key: in_memory(value, "base model") if key == "base_model" else value for key, value in words.items()}
    data = {**data, **{key: value for key, value in words.items() if key in Recipe.model_fields}}
    if data.keys() == {"models"}:
        raise RecipeError("Which method? Pass method=, for example method='linear'; list_methods() names them all.")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, lines) for e in error.errors())) from None
    _check_rules(recipe, lines)
    _check_tokens(recipe, lines)
    _check_parameters(recipe, lines)
    given = {key: value for key, value in words.items() if key not in Recipe.model_fields}
    if not given:
        return recipe
    changed = _with_parameters(recipe, given)
    _check_parameters(changed, {})
    return changed


def _with_parameters(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Say parameters instead of whatever was said of them before."""
    method = get_method(recipe.merge_method)
    entries = [dict(entry.parameters) for entry in recipe.models]
    shared = dict(recipe.parameters)
    for name, value in given.items():
        _set_parameter(method, name, value, entries, shared)
    models = [e.model_copy(update={"parameters": own}) for e, own in zip(recipe.models, entries, strict=True)]
    return recipe.model_copy(update={"models": tuple(models), "parameters": shared})


def _set_parameter(
    method: MergeMethod, name: str, value: Any, entries: list[dict[str, Any]], shared: dict[str, Any]
) -> None:
    """Say a parameter for all models, or with a list for each of them."""
    parameter = method.parameter(name)
    for scope in (*entries, shared):
        scope.pop(name, None)
    plain_list = isinstance(value, (list, tuple)) and not any(is_filter(part) for part in value)
    if not (plain_list and parameter is not None and parameter.per_model):
        shared[name] = value
        return
    if len(value) != len(entries):
        raise ParameterError(
            f"'{name}' has {len(value)} values for {len(entries)} models; give one value for each model "
            "(a gradient over layers is written in a recipe)."
        )
    for entry, own in zip(entries, value, strict=True):
        entry[name] = own


def _explain(error: Any, lines: Lines) -> str:
    """Put one of pydantic's findings into words, with its line."""
    place = tuple(part for part in error["loc"] if part not in ("function-before[as_model()]", "ModelRef", "InMemory"))
    key = place[-1] if place else "the recipe"
    if error["type"] == "extra_forbidden":
        if key in NOT_YET and len(place) == 1:
            return f"{_line(place, lines)}'{key}' is not supported yet; this version merges whole models (`models:`)."
        owner = {"models": ModelEntry, "rules": Rule}.get(str(place[0])) if len(place) > 1 else Recipe
        known = keys_at(place) or (owner.model_fields if owner else ())
        return f"{_line(place, lines)}Unknown key '{key}'.{did_you_mean(str(key), known)}"
    if error["type"] == "missing":
        return f"{_line(place, lines)}The recipe lacks '{key}'."
    found = "" if place == () or isinstance(error["input"], (Mapping, list)) else f"; found {shown(error['input'])}"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{_line(place, lines)}'{'.'.join(map(str, place))}' {said}{found}."


def _line(place: Sequence[Any], lines: Lines) -> str:
    """Return `line N: ` for the innermost key of `place` that has one."""
    for end in range(len(place), 0, -1):
        if tuple(place[:end]) in lines:
            return f"line {lines[tuple(place[:end])]}: "
    return ""


def _check_rules(recipe: Recipe, lines: Lines) -> None:
    """Check that rules name models of the recipe only."""
    for i, rule in enumerate(recipe.rules):
        for j, model in enumerate(rule.models):
            if model not in recipe.references:
                place = _line(("rules", i, "models", j), lines)
                raise RecipeError(f"{place}a rule names '{model}', which is not among the models.")


def _check_tokens(recipe: Recipe, lines: Lines) -> None:
    """Check that the rows of tokens come from models of the recipe."""
    for token, model in recipe.tokenizer.strangers(recipe.references) if recipe.tokenizer else ():
        place = _line(("tokenizer", "tokens", token), lines)
        raise RecipeError(f"{place}the row of '{token}' comes from '{model}', which is not among the models.")


def _check_parameters(recipe: Recipe, lines: Lines) -> None:
    """Check every name and value of every parameter that the recipe sets."""
    method = _method_at(("merge_method",), recipe.merge_method, lines)
    rules = [_method_at(("rules", i, "merge_method"), r.merge_method or recipe.merge_method, lines)
             for i, r in enumerate(recipe.rules)]  # fmt: skip
    scopes = [(("parameters",), recipe.parameters, [method, *rules])]
    scopes += [(("models", i, "parameters"), e.parameters, [method, *rules]) for i, e in enumerate(recipe.models)]
    scopes += [(("rules", i, "parameters"), r.parameters, [rules[i]]) for i, r in enumerate(recipe.rules)]
    for place, parameters, methods in scopes:
        for name, setting in parameters.items():
            try:
                _check_setting(name, setting, methods, in_model=place[0] == "models")
            except ParameterError as error:
                raise ParameterError(f"{_line((*place, name), lines)}{error}") from None


def _method_at(place: tuple[Any, ...], name: str, lines: Lines) -> MergeMethod:
    try:
        return get_method(name)
    except RecipeError as error:
        raise type(error)(f"{_line(place, lines)}{error}") from None


def _check_setting(name: str, setting: Any, methods: Sequence[MergeMethod], *, in_model: bool) -> None:
    """Check a setting against the first method that knows the parameter."""
    knowing = [m for m in methods if name in m.parameters or name in m.ignored]
    parameter = (knowing or methods)[0].parameter(name)
    if parameter is None:
        return
    if in_model and not parameter.per_model:
        raise ParameterError(
            f"'{name}' of '{knowing[0].name}' is one value for all models: write it under `parameters:`."
        )
    if not _is_setting(setting):
        raise ParameterError(
            f"'{name}' should be a value, a list of values, {{filter: .., value: ..}} or a list of these; "
            f"found {shown(setting)}."
        )
    for value in leaves(setting):
        parameter.check(value, knowing[0].name)


def _is_setting(setting: Any) -> bool:
    """Tell whether a setting has one of the forms that `schedule.resolve` reads."""
    filters = setting if isinstance(setting, (list, tuple)) and any(isinstance(s, Mapping) for s in setting) else None
    if isinstance(setting, Mapping):
        filters = [setting]
    if filters is None:
        return _is_plain(setting)
    return all(
        is_filter(part)
        and set(part) <= {"filter", "value"}
        and isinstance(part.get("filter"), (str, NoneType))
        and _is_plain(part["value"])
        for part in filters
    )


def _is_plain(value: Any) -> bool:
    """Tell whether a value is one, or a gradient: a list of numbers, of words or of booleans."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, (bool, int, float, str, NoneType)) for v in values)


def _plain(value: Any) -> Any:
    """Turn tuples into lists, so that YAML can be written safely."""
    return json.loads(json.dumps(value, default=str))
