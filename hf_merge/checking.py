"""Whether what a recipe says can be meant: models that rules name, names and values of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Protocol

from hf_merge.errors import ParameterError, RecipeError, shown
from hf_merge.method import MergeMethod, get_method, list_methods
from hf_merge.schedule import is_filter, leaves
from hf_merge.schema import Module, Rule, Setting
from hf_merge.tokenization.options import TokenizerOptions
from hf_merge.types import Ref
from hf_merge.yaml_lines import Lines


class Said(Protocol):
    """What is asked of a recipe here."""

    @property
    def merge_method(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Setting]: ...
    @property
    def modules(self) -> Mapping[str, Module]: ...
    @property
    def parts(self) -> Mapping[str, Module]: ...
    @property
    def rules(self) -> Sequence[Rule]: ...
    @property
    def references(self) -> Sequence[Ref]: ...
    @property
    def tokenizer(self) -> TokenizerOptions | None: ...


Scope = tuple[tuple[Any, ...], Mapping[str, Setting], Sequence[MergeMethod]]


def check(recipe: Said, lines: Lines) -> None:
    """Check all that the types of a recipe's parts cannot.

    Args:
        recipe: as it was read.
        lines: the line of every key.

    Raises:
        RecipeError: with the line.
    """
    _check_rules(recipe, lines)
    _check_tokens(recipe, lines)
    _check_parameters(recipe, lines)


def line_of(place: Sequence[Any], lines: Lines) -> str:
    """Return `line N: ` for the innermost key of `place` that has one."""
    for end in range(len(place), 0, -1):
        if tuple(place[:end]) in lines:
            return f"line {lines[tuple(place[:end])]}: "
    return ""


def _check_rules(recipe: Said, lines: Lines) -> None:
    """Check that rules name models of the recipe only."""
    known = set(recipe.references)
    for i, rule in enumerate(recipe.rules):
        for j, model in enumerate(rule.models):
            if model not in known:
                place = line_of(("rules", i, "models", j), lines)
                raise RecipeError(f"{place}a rule names '{model}', which is not among the models.")


def _check_tokens(recipe: Said, lines: Lines) -> None:
    """Check that the rows of tokens come from models of the recipe."""
    for token, model in recipe.tokenizer.strangers(recipe.references) if recipe.tokenizer else ():
        place = line_of(("tokenizer", "tokens", token), lines)
        raise RecipeError(f"{place}the row of '{token}' comes from '{model}', which is not among the models.")


def _check_parameters(recipe: Said, lines: Lines) -> None:
    """Check every name and value of every parameter that the recipe sets."""
    for place, parameters, methods in _all_scopes(recipe, lines):
        for name, setting in parameters.items():
            try:
                _check_setting(name, setting, methods, in_model=place[-3:-2] in (("models",), ("sources",)))
            except ParameterError as error:
                raise ParameterError(f"{line_of((*place, name), lines)}{error}") from None


def idle_parameters(recipe: Said) -> list[tuple[str, str]]:
    """Return the parameters that have no effect, each with the method that lacks it.

    They belong to other methods. MergeKit ignores them, so that its recipes often have some left over.
    """
    scopes = _all_scopes(recipe, {})
    idle = [(name, methods) for _, said, methods in scopes for name in said if not _knowing(name, methods)]
    return list(dict.fromkeys((name, methods[0].name) for name, methods in idle))


def _all_scopes(recipe: Said, lines: Lines) -> list[Scope]:
    """List every place of a recipe where parameters stand, what is said there, and the methods it is said to."""
    main = _method_at(("merge_method",), recipe.merge_method, lines)
    parts = {
        name: _method_at(("modules", name, "merge_method"), part.merge_method or main.name, lines)
        for name, part in recipe.parts.items()
    }
    rules = [_method_at(("rules", i, "merge_method"), r.merge_method or main.name, lines)
             for i, r in enumerate(recipe.rules)]  # fmt: skip
    scopes: list[Scope] = [(("parameters",), recipe.parameters, [main, *parts.values(), *rules])]
    for name, part in recipe.parts.items():
        prefix = ("modules", name) if recipe.modules else ()
        scopes += [(place, said, [parts[name], *rules]) for place, said in _scopes(prefix, part)]
    scopes += [(("rules", i, "parameters"), r.parameters, [rules[i]]) for i, r in enumerate(recipe.rules)]
    return scopes


def _scopes(prefix: tuple[Any, ...], part: Module) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Setting]]]:
    """Yield every place of a module where parameters stand, and what is said there."""
    yield (*prefix, "parameters"), part.parameters
    for i, entry in enumerate(part.models):
        yield (*prefix, "models", i, "parameters"), entry.parameters
    for i, piece in enumerate(part.slices):
        yield (*prefix, "slices", i, "parameters"), piece.parameters
        for j, entry in enumerate(piece.sources):
            yield (*prefix, "slices", i, "sources", j, "parameters"), entry.parameters


def _method_at(place: tuple[Any, ...], name: str, lines: Lines) -> MergeMethod:
    try:
        return get_method(name)
    except RecipeError as error:
        raise type(error)(f"{line_of(place, lines)}{error}") from None


def _check_setting(name: str, setting: Any, methods: Sequence[MergeMethod], *, in_model: bool) -> None:
    """Check a setting against the first method that knows the parameter; other methods' parameters are idle."""
    knowing = _knowing(name, methods)
    if not knowing and _knowing(name, [get_method(known) for known in list_methods()]):
        return
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


def _knowing(name: str, methods: Sequence[MergeMethod]) -> list[MergeMethod]:
    return [method for method in methods if name in method.parameters or name in method.ignored]


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
