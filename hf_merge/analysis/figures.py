"""Tables of an analysis as pictures: heat maps with their numbers in the cells, and lines over the layers.

Colours are those that people with any kind of colour vision tell apart (cividis, purple to orange), and never say
alone what a number or a mark does not say too.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_merge.errors import MergeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_merge.analysis.found import Analysis

Grid = Sequence[Sequence[float | None]]

CELL = (0.52, 0.26)
"""Width and height of a cell, in inches."""
WIDTH = 6.4
"""No picture is narrower, in inches: what it says stands below it."""
DPI = 120
PANELS = 4
"""Up to so many models have a panel each, with layers and kinds of modules; more share one."""
LINES = 6
"""Up to so many parents have a line each; of more, a band is shown."""
LONGEST = 28
"""Letters of a label."""

_INK, _MISSING = "#1a1a1a", "#e6e6e6"
_RESULT, _BASE = "#d55e00", "#000000"
_PARENTS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a7a7a")
_MARKS = "osv^DP"


def draw(found: Analysis) -> dict[str, Figure]:
    """Draw every table of an analysis, with what it says below it.

    Args:
        found: the analysis.

    Returns:
        Figures by the names of the tables.

    Raises:
        MergeError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MergeError("The pictures need another package: pip install 'hf-merge[picture]'.")
    drawers: dict[str, Callable[[Analysis], Figure]] = {
        "similarity": _similarity, "distances": _distances, "change": _change, "conflicts": _conflicts,
        "norms": _norms,
    }  # fmt: skip
    return {name: _explained(drawers[name](found), found.readings[name]) for name in found.tables}


def _similarity(found: Analysis) -> Figure:
    assert found.similarity is not None
    models, values = found.similarity.models, found.similarity.values
    figure = _figure("Cosine similarity of what the models changed", *_size(len(models), len(models)))
    _heat(figure.subplots(), values, models, models, _two_sided(-1, 0, 1), "{:.2f}")
    return figure


def _distances(found: Analysis) -> Figure:
    assert found.distances is not None
    models, values = found.distances.models, found.distances.values
    figure = _figure("Relative distance between the models", *_size(len(models), len(models)))
    _heat(figure.subplots(), values, models, models, _one_sided(values), "{:.2g}")
    return figure


def _change(found: Analysis) -> Figure:
    """Draw a panel of layers and parts for each of a few models; of many, layers and parts apart."""
    models = list(dict.fromkeys(row["model"] for row in found.change))
    title = "What the models changed, in % of the base" if found.base else "Distance from the mean, in % of it"
    if len(models) <= PANELS:
        return _change_of_few(found, models, title)
    by_layer, by_part = _shares(found, models, "layer"), _shares(found, models, "part")
    width, height = _size(len(models), len(found.layers) + len(found.parts) + 1)
    figure = _figure(title, width, height + 0.4)
    above, below = figure.subplots(2, 1, height_ratios=(len(found.layers), len(found.parts)), sharex=True)
    scale = _one_sided([*by_layer, *by_part])
    _heat(above, by_layer, found.layers, models, scale, "{:.2g}", over="layer")
    _heat(below, by_part, found.parts, models, scale, "{:.2g}", over="module")
    above.tick_params(labelbottom=False)
    return figure


def _change_of_few(found: Analysis, models: Sequence[str], title: str) -> Figure:
    shares = {(row["model"], row["layer"], row["part"]): _percent(row["relative"]) for row in found.change}
    grids = [[[shares.get((model, layer, part)) for part in found.parts] for layer in found.layers] for model in models]
    width, height = _size(len(models) * len(found.parts), len(found.layers))
    figure = _figure(title, width + 0.3 * len(models), height)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    scale = _one_sided([row for grid in grids for row in grid])
    for place, (axis, model, grid) in enumerate(zip(axes, models, grids, strict=True)):
        _heat(axis, grid, found.layers, found.parts, scale, "{:.2g}", over="" if place else "layer")
        axis.set_title(_cut(model), fontsize=9)
    return figure


def _shares(found: Analysis, models: Sequence[str], by: str) -> Grid:
    """Sum the changes up over all but the layer, or all but the part: a row for each."""
    squares: dict[tuple[str, str], np.ndarray] = {}
    for row in found.change:
        both = np.array([row["norm"] ** 2, row["base_norm"] ** 2])
        squares[row[by], row["model"]] = squares.get((row[by], row["model"]), np.zeros(2)) + both
    order = found.layers if by == "layer" else found.parts
    pairs = [[squares.get((one, model), np.zeros(2)) for model in models] for one in order]
    return [[_percent(math.sqrt(a / b)) if b else None for a, b in row] for row in pairs]


def _conflicts(found: Analysis) -> Figure:
    shares = {(row["layer"], row["part"]): row["share"] for row in found.conflicts}
    grid = [[shares.get((layer, part)) for part in found.parts] for layer in found.layers]
    figure = _figure("Share of changes that pull apart", *_size(len(found.parts), len(found.layers)))
    _heat(figure.subplots(), grid, found.layers, found.parts, _two_sided(0, 0.5, 1), "{:.2f}", over="layer")
    return figure


def _norms(found: Analysis) -> Figure:
    """Draw norms over the median of the parents', so that layers of any length are seen on one scale."""
    norms = {(row["name"], row["layer"]): row["norm"] for row in found.norms}
    middle = {layer: median(norms[model, layer] for model in found.models) for layer in found.layers}
    lines = {name: [norms[name, layer] / middle[layer] if middle[layer] else math.nan for layer in found.layers]
             for name in dict.fromkeys(name for name, _ in norms)}  # fmt: skip
    figure = _figure("Length of the weights, over the median of the parents", max(WIDTH, 3 + 0.16 * len(middle)), 3.4)
    axis = figure.subplots()
    places = range(len(found.layers))
    _parents(axis, places, [(name, lines[name]) for name in found.models])
    if found.base:
        axis.plot(places, lines[found.base], "--", color=_BASE, lw=1.2, label=f"base: {_cut(found.base)}")
    if found.merged:
        axis.plot(places, lines[found.merged], "-o", color=_RESULT, lw=2.2, ms=4, label=f"result: {_cut(found.merged)}")
    shown = [value for line in lines.values() for value in line if math.isfinite(value)]
    axis.set_ylim(min(0.9, *(0.98 * value for value in shown), 1.0), max(1.1, *(1.02 * value for value in shown), 1.0))
    _ticks(axis, found.layers)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlabel("layer", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _parents(axis: Axes, places: Sequence[int], lines: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Draw a line for each of a few parents, or the band in which many of them lie."""
    if len(lines) > LINES:
        values = np.array([line for _, line in lines])
        told = f"{len(lines)} parents, all within"
        axis.fill_between(places, values.min(0), values.max(0), color=_PARENTS[0], alpha=0.3, lw=0, label=told)
        return
    for (name, line), colour, mark in zip(lines, _PARENTS, _MARKS, strict=False):
        axis.plot(places, line, f"-{mark}", color=colour, lw=1.2, ms=4, label=_cut(name))


def _ticks(axis: Axes, layers: Sequence[str]) -> None:
    """Label as many layers as there is room for; the last are what is outside of them."""
    step = math.ceil(len(layers) / 30)
    shown = [place for place in range(len(layers)) if place % step == 0 or layers[place] == "outside"]
    upright = any(len(layer) > 3 for layer in layers)
    axis.set_xticks(shown, [layers[place] for place in shown], fontsize=8, rotation=90 if upright else 0)


def _heat(
    axis: Axes, values: Grid, rows: Sequence[str], columns: Sequence[str], scale: tuple[Any, Any], form: str,
    over: str = "",
) -> None:  # fmt: skip
    """Draw a heat map with its numbers; what is not there is grey."""
    colours, norm = scale
    grid = np.array([[math.nan if value is None else value for value in row] for row in values], dtype=float)
    axis.imshow(np.ma.masked_invalid(grid), cmap=colours, norm=norm, aspect="auto")
    axis.set_facecolor(_MISSING)
    for row, column in np.ndindex(grid.shape):
        value = grid[row, column]
        told = "-" if math.isnan(value) else form.format(value).replace("-0.00", "0.00")
        dark = not math.isnan(value) and _luminance(colours(norm(value))) < 0.45
        axis.text(column, row, told, ha="center", va="center", fontsize=7.5, color="white" if dark else _INK)
    axis.set_yticks(range(len(rows)), [_cut(one) for one in rows], fontsize=8)
    long = any(len(one) > 5 for one in columns)
    axis.set_xticks(range(len(columns)), [_cut(one) for one in columns], fontsize=8, rotation=45 if long else 0,
                    ha="right" if long else "center", rotation_mode="anchor" if long else "default")  # fmt: skip
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1)
    axis.tick_params(which="minor", length=0)
    axis.set_ylabel(over, fontsize=9)


def _one_sided(values: Grid) -> tuple[Any, Any]:
    """Colour numbers from 0 up: the larger, the darker."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    top = max((value for row in values for value in row if value is not None), default=0.0)
    return colormaps["cividis_r"], Normalize(0, top or 1.0)


def _two_sided(low: float, middle: float, high: float) -> tuple[Any, Any]:
    """Colour numbers by how far they are from the middle, which is white."""
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    return colormaps["PuOr_r"], TwoSlopeNorm(middle, low, high)


def _luminance(colour: tuple[float, ...]) -> float:
    """Return how light a colour is, 0 to 1, by the weights of Rec. 709."""
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Return the width and height of a heat map with its labels, in inches."""
    return max(WIDTH, 1.8 + CELL[0] * columns), 1.2 + CELL[1] * rows


def _figure(title: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure


def _explained(figure: Figure, reading: str) -> Figure:
    """Put what a picture says below it, and make room for that."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(reading, int(width * 14.5))
    figure.set_size_inches(width, height + 0.17 * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8.5, color=_INK)
    return figure


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _cut(label: str) -> str:
    """Shorten a label in its middle."""
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[: half - 1]}…{label[-half:]}"
