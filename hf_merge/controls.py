"""What a method's parameters are to someone who sets them: a widget each, and one sentence about what the numbers do.

Everything is read from the method: types and ranges from the signature, words from the docstring. Nothing here knows a
user interface; `Control.to_dict` is plain data for any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from string import Formatter
from typing import Any, Literal

from hf_merge.method import MergeMethod, Parameter, get_method
from hf_merge.types import Each

Kind = Literal["slider", "number", "choice", "switch", "text"]
PARTS = {"attention": "in attention", "mlp": "in MLPs", "rest": "elsewhere"}
"""The parts of a layer that a setting may tell apart, and how a sentence names them."""

_STEPS = 100
_ONCE = re.compile(r"(?<![\w.-])1 times(?P<what> (?=the ))?")
"""Adding `1 times the` change is adding it; what is counted 1 times is counted once."""
_SENTENCE_END = re.compile(r"(?<=\.) ")
_SMALLEST_ON_SLIDER = 0.01
_NICE = (1.0, 2.0, 3.0, 5.0, 10.0)
_SHARING = ("normalize", "normalize_weights")
_ALWAYS_SHARES = ("fisher", "nuslerp")
"""Methods whose weights are shares without a switch that says so."""
_MERGED = "the merged change"
_ENDS: dict[tuple[str, str], tuple[str, str]] = {
    ("weight", "deltas"): ("nothing of {model}", "{high} times the change of {model}"),
    ("weight", "models"): ("nothing of {model}", "{high} shares of {model}"),
    ("weight", "factors"): ("nothing of {model}", "{high} times {model}"),
    ("lambda", "deltas"): ("{base} as it is", f"{{high}} times {_MERGED}"),
    ("lambda", "models"): ("{base} as it is", f"{{high}} times {_MERGED}"),
    ("density", "deltas"): ("drop all changes of {model}", "keep all changes of {model}"),
    ("density", "factors"): ("drop all of {model}", "keep all of {model}"),
    ("gamma", "deltas"): ("drop no large change", "drop all of them"),
    ("coefficient", "deltas"): ("nothing of {model}", "{high} times the change of {model}"),
    ("t", "models"): ("all {base}", "all {model}"),
    ("select_topk", "deltas"): ("keep nothing", "keep all changes"),
    ("scale", "models"): ("all zeros", "{high} times {model}"),
}
"""What the two ends of a slider mean, by the parameter's name and the method's space."""


@dataclass(frozen=True)
class Control:
    """How one parameter is set.

    Attributes:
        name: as recipes spell it.
        kind: `slider` (both ends are known, or usual), `number`, `choice`, `switch` or `text`.
        low, high: ends of the slider; of a number, its limits where it has some.
        least, most: what the parameter allows; None without a limit. A slider may end before.
        step: of a slider or a whole number; None for any.
        choices: of a choice.
        default: the value when a recipe says nothing.
        optional: whether it may be left empty (None).
        per_model: whether every model has its own value.
        curve: whether it may vary over the layers.
        help: its line in the docstring.
        shares: when only the ratio of the models' values counts, not their size: the name of the switch that makes it
            so, `always`, or empty for never.
        ends: what the low and the high end of a slider mean, with `{base}` and `{model}` for their names; numbers
            where there are no better words.
    """

    name: str
    kind: Kind
    low: float | None
    high: float | None
    least: float | None
    most: float | None
    step: float | None
    choices: tuple[str, ...]
    default: Any
    optional: bool
    per_model: bool
    curve: bool
    help: str
    ends: tuple[str, str]
    shares: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return asdict(self) | {"choices": list(self.choices), "ends": list(self.ends)}


def controls(method: MergeMethod | str) -> tuple[Control, ...]:
    """Return a control for each parameter of a method, in the order of its signature.

    Raises:
        UnknownMethodError: there is no such method.
    """
    chosen = _method(method)
    made = (_control(one, chosen.space) for one in chosen.parameters.values())
    return tuple(replace(one, shares=_shares(chosen)) if one.name == "weight" else one for one in made)


def needs(method: MergeMethod | str) -> list[str]:
    """Say what a method asks for, each in a few words: `a base model`, `exactly 2 models`, `LoRA adapters`.

    Raises:
        UnknownMethodError: there is no such method.
    """
    chosen = _method(method)
    found = ["a base model"] if chosen.base == "required" else []
    many = "adapters" if chosen.space == "factors" else "models"
    beside = " besides the base" if found else ""
    if chosen.count is not None:
        one = f"exactly {chosen.count} {many if chosen.count > 1 else many[:-1]}"
        found.append(one + beside)
    elif chosen.least > 1:
        found.append(f"at least {chosen.least} {many}{beside}")
    if chosen.space == "factors":
        found.append("LoRA adapters of one base")
    found += [f"{name} statistics, measured on data" for name in chosen.statistics]
    return found + (["models in a chosen order"] if chosen.ordered else [])


def in_words(
    method: MergeMethod | str, values: Mapping[str, Any], models: Sequence[str] = (), base: str | None = None
) -> str:
    """Return one live sentence about what a method does with these numbers.

    Args:
        method: a method or its name.
        values: settings by parameter: a plain value, `{"curve": [..]}` over depth, `{"parts": {"attention": ..,
            "mlp": .., "rest": ..}}`, or a list with one of these for each model. What is missing has its default.
        models: names of the models, base excluded.
        base: name of the base model.

    Returns:
        The method's own words (`In words:` of its docstring), once for all models where they share their numbers, else
        every sentence that names a model once for each; without such a sentence, its summary and the numbers.

    Raises:
        UnknownMethodError: there is no such method.
    """
    chosen = _method(method)
    settings = {name: values.get(name, _default(one)) for name, one in chosen.parameters.items()}
    if not chosen.in_words:
        return _plainly(chosen, settings, models)
    per_model = [name for name in _named(chosen.in_words) if _of_each(chosen, name)]
    each = [{name: _for_model(settings[name], i) for name in per_model} for i in range(len(models))]
    if "model" not in _named(chosen.in_words) and not per_model:
        return _filled(chosen, settings, models, base, model=_listed(models))
    if not each or all(one == each[0] for one in each):
        shared = settings | (each[0] if each else {name: _for_model(settings[name], 0) for name in per_model})
        return _filled(chosen, shared, models, base, model=_all_of(models))
    return _one_by_one(chosen, settings, each, models, base)


def _one_by_one(
    method: MergeMethod,
    settings: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]],
    models: Sequence[str],
    base: str | None,
) -> str:
    """Say for each model the sentences that name one, and all others once."""
    told: list[str] = []
    for sentence in _SENTENCE_END.split(method.in_words):
        part = replace(method, in_words=sentence)
        own = list(zip(models, each, strict=True)) if "model" in _named(sentence) else [("", each[0])]
        told += [_filled(part, {**settings, **one}, models, base, model=name) for name, one in own]
    return " ".join(told)


def _method(method: MergeMethod | str) -> MergeMethod:
    return get_method(method) if isinstance(method, str) else method


def _control(parameter: Parameter, space: str) -> Control:
    schema = parameter.schema
    parts = schema.get("anyOf", [schema])
    optional = any(part.get("type") == "null" for part in parts)
    own = next((part for part in parts if part.get("type") != "null"), {})
    words = {"name": parameter.name, "optional": optional, "per_model": parameter.per_model, "help": parameter.help}
    default = _default(parameter)
    if own.get("type") in ("number", "integer"):
        return _numeric(own, default, space, **words)
    kind: Kind = "choice" if "enum" in own else "switch" if own.get("type") == "boolean" else "text"
    return Control(
        kind=kind, low=None, high=None, least=None, most=None, step=None, choices=tuple(own.get("enum", ())),
        default=default, curve=False, ends=("", ""), **words,
    )  # fmt: skip


def _numeric(schema: Mapping[str, Any], default: Any, space: str, **words: Any) -> Control:
    """Return the control of a number: a slider where its ends are known or usual, else a field."""
    whole = schema["type"] == "integer"
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum")
    size = abs(default) if isinstance(default, (int, float)) else 0.0
    if whole or words["optional"] or (most is None and size < _SMALLEST_ON_SLIDER):
        step = 1 if whole else None
        return Control(
            kind="number", low=least, high=most, least=least, most=most, step=step, choices=(), default=default,
            curve=not whole and not words["optional"], ends=("", ""), **words,
        )  # fmt: skip
    high = most if most is not None else _usual_end(size)
    step = high / _STEPS if high <= 1 else 0.01 if high <= 10 else high / (10 * _STEPS)
    low = step if "exclusiveMinimum" in schema else 0.0
    ends = _ends(words["name"], space, low, high)
    return Control(
        kind="slider", low=low, high=high, least=low if "exclusiveMinimum" in schema else least, most=most,
        step=round(step, 6), choices=(), default=default, curve=True, ends=ends, **words,
    )  # fmt: skip


def _shares(method: MergeMethod) -> str:
    """Say when a method divides the weights by their sum."""
    if method.name in _ALWAYS_SHARES:
        return "always"
    return next((name for name in _SHARING if name in method.parameters), "")


def _usual_end(size: float) -> float:
    """Return where a slider for a number without a limit ends: a round number of at least twice its default."""
    if size <= 0.5:
        return 1.0
    scale = 10 ** math.floor(math.log10(2 * size))
    return next(nice * scale for nice in _NICE if nice * scale >= 2 * size - 1e-9)


def _ends(name: str, space: str, low: float, high: float) -> tuple[str, str]:
    first, last = _ENDS.get((name, space), (f"{low:g}", f"{high:g}"))
    return first, last.replace("{high}", f"{high:g}")


def _default(parameter: Parameter) -> Any:
    return parameter.default.value if isinstance(parameter.default, Each) else parameter.default


def _named(template: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(template) if name))


def _of_each(method: MergeMethod, name: str) -> bool:
    return name in method.parameters and method.parameters[name].per_model


def _for_model(setting: Any, place: int) -> Any:
    """Return the setting of one model; settings beyond those given are the last one."""
    if not isinstance(setting, (list, tuple)):
        return setting
    return setting[min(place, len(setting) - 1)] if setting else None


def _filled(
    method: MergeMethod, settings: Mapping[str, Any], models: Sequence[str], base: str | None, *, model: str
) -> str:
    """Put values and names into the method's sentence."""
    shown = {name: _Told(value) for name, value in settings.items()}
    names = {"model": model, "models": _listed(models), "base": base or "the base", "count": len(models)}
    try:
        text = method.in_words.format_map({**shown, **names})
    except (ValueError, KeyError, IndexError, TypeError):  # a value that the sentence has no words for
        return _plainly(method, settings, models)
    text = _ONCE.sub(lambda found: "" if found["what"] else "once", text)
    return text[:1].upper() + text[1:]


class _Told:
    """A setting as `str.format` writes it: plain, as a curve in words, or by parts of a layer."""

    def __init__(self, setting: Any):
        self.setting = setting

    def __format__(self, spec: str) -> str:
        return _told(self.setting, spec)


def _told(setting: Any, spec: str) -> str:
    if isinstance(setting, Mapping) and "curve" in setting:
        return _curve_in_words([_told(one, spec) for one in setting["curve"]])
    if isinstance(setting, Mapping) and "parts" in setting:
        told = [f"{_told(setting['parts'][part], spec)} {words}" for part, words in PARTS.items()]
        return ", ".join(told[:-1]) + " and " + told[-1]
    if isinstance(setting, bool):
        on, _, off = spec.partition("|") if spec else ("on", "", "off")
        return on if setting else off
    if isinstance(setting, str):
        return dict(part.split("=", 1) for part in spec.split("|")).get(setting, setting) if spec else setting
    if setting is None:
        return "as the method chooses"
    return f"{setting:{spec or 'g'}}"


def _curve_in_words(points: Sequence[str]) -> str:
    """Say how a curve goes: from the first layer by way of its anchors to the last."""
    if all(point == points[0] for point in points):
        return points[0]
    between = f", by way of {' and '.join(points[1:-1])}," if len(points) > 2 else ""
    return f"from {points[0]} in the first layer{between} to {points[-1]} in the last"


def _plainly(method: MergeMethod, settings: Mapping[str, Any], models: Sequence[str]) -> str:
    """Return the summary and the numbers, for a method without a sentence of its own."""
    told = [f"{name} {_each_told(settings[name], models)}" for name in method.parameters]
    summary = method.summary if method.summary.endswith((".", "!", "?")) else f"{method.summary}."
    return f"{summary} Set: {'; '.join(told)}." if told else summary


def _each_told(setting: Any, models: Sequence[str]) -> str:
    if not isinstance(setting, (list, tuple)):
        return _told(setting, "")
    told = [_told(one, "") for one in setting]
    if len(set(told)) == 1 or len(told) != len(models):
        return ", ".join(dict.fromkeys(told)) if told else "as the method chooses"
    return ", ".join(f"{one} for {name}" for one, name in zip(told, models, strict=True))


def _listed(names: Sequence[str]) -> str:
    """Join names as a sentence does."""
    if not names:
        return "the models"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _all_of(models: Sequence[str]) -> str:
    """Name all models where one is meant: the only one, or each of them."""
    return models[0] if len(models) == 1 else "each model"
