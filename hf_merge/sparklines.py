"""How parameters vary over the layers and parts of a model, as lines of text that every renderer shows."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

from hf_merge.method import get_method
from hf_merge.planning import Plan, Step
from hf_merge.schedule import layer_of

BLOCKS = "▁▂▃▄▅▆▇█"
ABSENT = "·"
MAX_WIDTH = 64
MAX_LINES = 16

Series: TypeAlias = tuple[float | None, ...]
"""One value for each layer; None where the model or the parameter has no part in it."""
Key: TypeAlias = tuple[str, str, int | None]
"""A stack of layers, a parameter, and a model if it has one value for each."""


@dataclass(frozen=True)
class _Line:
    parameter: str
    models: str
    parts: str
    series: Series


def pictures(plan: Plan, names: Sequence[str]) -> str:
    """Draw the parameters that are not the same everywhere; nothing if all are.

    Args:
        plan: its steps say what each tensor gets.
        names: what to call the plan's models.

    Returns:
        For each stack of layers a headline, and a line for each parameter, model and part of a layer; the lowest and
        the highest block are the least and the largest value of the parameter.
    """
    found = _values(plan.steps)
    told: list[str] = []
    for stack, keys in groupby(sorted(found, key=lambda key: key[0]), key=lambda key: key[0]):
        lines = list(_lines({key: found[key] for key in keys}, names))
        if lines:
            last = len(lines[0].series) - 1
            told += [f"{stack.rstrip('.') or 'layers'} 0-{last}", *_drawn(lines)]
    return "\n".join(told)


def _values(steps: Iterable[Step]) -> dict[Key, dict[str, Series]]:
    """Gather each parameter's values over the layers, for each name that a tensor has within its layer.

    Parameters that all tensors have in common are left out, as there is nothing to draw.
    """
    varying = _varying(steps)
    found: dict[Key, dict[str, dict[int, float]]] = {}
    depth: dict[str, int] = {}
    for step in steps if varying else ():
        stack, layer, rest = layer_of(step.name)
        if layer is None or step.method is None:
            continue
        depth[stack] = max(depth.get(stack, 0), layer + 1)
        for parameter, model, value in _settings(step, varying):
            found.setdefault((stack, parameter, model), {}).setdefault(rest.lstrip("."), {})[layer] = value
    return {
        key: {rest: tuple(values.get(layer) for layer in range(depth[key[0]])) for rest, values in by_rest.items()}
        for key, by_rest in found.items()
    }


def _varying(steps: Iterable[Step]) -> set[str]:
    """Name the settings that are not the same in all steps."""
    first: dict[str, Any] = {}
    return {name for step in steps for name, value in step.settings.items() if first.setdefault(name, value) != value}


def _settings(step: Step, names: Container[str]) -> Iterator[tuple[str, int | None, float]]:
    """Yield the numbers among some of a step's settings, with the model that each is of."""
    method = get_method(str(step.method))
    for name, value in step.settings.items():
        if name not in names or name not in method.parameters:
            continue  # seeds differ everywhere
        per_model = method.parameters[name].per_model
        models = [each.model for each in step.inputs] if per_model else [None]
        values = value if per_model else [value]
        yield from ((name, model, float(one)) for model, one in zip(models, values, strict=True) if _is_number(one))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lines(found: Mapping[Key, Mapping[str, Series]], names: Sequence[str]) -> Iterator[_Line]:
    """Make a line for each series that differs, with all models that have it in the same parts."""
    same: dict[tuple[str, str, Series], list[str]] = {}
    for (_, parameter, model), by_rest in found.items():
        if len({value for series in by_rest.values() for value in series if value is not None}) < 2:
            continue
        by_series: dict[Series, list[str]] = {}
        for rest, series in by_rest.items():
            by_series.setdefault(series, []).append(rest)
        for series, rests in by_series.items():
            parts = "" if len(by_series) == 1 else _called(rests, [rest for rest in by_rest if rest not in rests])
            same.setdefault((parameter, parts, series), []).append("" if model is None else names[model])
    for (parameter, parts, series), models in same.items():
        yield _Line(parameter, ", ".join(models), parts, series)


def _called(rests: Sequence[str], others: Sequence[str]) -> str:
    """Name some tensors of a layer by as little of their names as tells them from the others."""
    words = dict.fromkeys(_short(rest, others) for rest in rests)
    shown = list(words)[:3]
    return ", ".join(shown) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def _short(rest: str, others: Sequence[str]) -> str:
    pieces = rest.removesuffix(".weight").split(".")
    for count in range(1, len(pieces)):
        start = ".".join(pieces[:count])
        if not any(other.startswith(f"{start}.") for other in others):
            return start
    return ".".join(pieces)


def _drawn(lines: Sequence[_Line]) -> Iterator[str]:
    """Draw lines in columns, each parameter on a scale of its own."""
    shown = lines[:MAX_LINES]
    widths = [max(len(getattr(line, column)) for line in shown) for column in ("parameter", "models", "parts")]
    for line in shown:
        texts = (line.parameter, line.models, line.parts)
        columns = [text.ljust(width) for text, width in zip(texts, widths, strict=True) if width]
        all_values = [v for other in lines if other.parameter == line.parameter for v in other.series if v is not None]
        yield "  ".join(["", *columns, _sparkline(line.series, min(all_values), max(all_values)), _range(line.series)])
    if len(lines) > MAX_LINES:
        yield f"  and {len(lines) - MAX_LINES} more, as the recipe says"


def _sparkline(series: Series, low: float, high: float) -> str:
    """Draw a series in blocks; a long one is thinned out."""
    width = min(len(series), MAX_WIDTH)
    picked = [series[round(i * (len(series) - 1) / max(width - 1, 1))] for i in range(width)]
    step = (high - low) / (len(BLOCKS) - 1) or 1
    return "".join(ABSENT if value is None else BLOCKS[round((value - low) / step)] for value in picked)


def _range(series: Series) -> str:
    values = [value for value in series if value is not None]
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
