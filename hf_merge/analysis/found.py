"""What an analysis found: tables of plain numbers, what they say, and pictures of them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_merge.analysis.naming import PARTS
from hf_merge.analysis.opening import Subject
from hf_merge.analysis.sums import Sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Place = tuple[str, str]
"""A layer and a kind of module."""


@dataclass(frozen=True)
class Matrix:
    """A number for each pair of models.

    Attributes:
        models: their labels.
        values: a row for each; None where a number is not defined, as for a model that changed nothing.
    """

    models: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"models": list(self.models), "values": [list(row) for row in self.values]}


@dataclass(frozen=True)
class Analysis:
    """What models changed, where, and how far they agree; and what a merge made of it.

    Write d_m = w_m - w_base for the change of model m, its task vector (https://arxiv.org/abs/2212.04089); without a
    base, w_base is the mean of the models. All sums go over the entries of the tensors that the models concerned have
    in the same shape. No number has a unit; lengths are in the unit of the weights.

    Attributes:
        models: labels of the parents, with the names of what they stand for.
        base: label of the base; None if there is none.
        merged: label of the result; None if there is none. It stands as one more model in `similarity`, `change`
            and `norms`, and not in `conflicts`.
        layers: in order: `0` to `11`, `encoder 0` where there are several stacks, `outside` of them.
        parts: kinds of modules that there are: attention, mlp, embeddings, norm, head, other.
        similarity: cosines, <d_a, d_b> / (|d_a| |d_b|), between -1 and 1. Without a base there are none.
        distances: without a base: |w_a - w_b| / sqrt((|w_a|^2 + |w_b|^2) / 2), 0 for the same weights, about 1.4 for
            unrelated ones of the same length. With a base there are none.
        change: for each model, layer and part `norm`, |d_m|, `base_norm`, |w_base|, and `relative`, their quotient.
        conflicts: for each layer and part `share`: of the pairs of parents that both change an entry, how many change
            it in opposite directions, over all entries. 0.5 is what chance gives, for any number of parents. Of two
            parents it is the share of entries on which they disagree. Without a base there are none.
        norms: for each layer and model `norm`, |w|, over all kinds of modules.
        left_out: for models that do not fit the others everywhere, which tensors were not compared.
        sample: how many entries of each tensor were read at most; None for all.
        totals: over the whole model: `relative` of each model, by its label, and the share of conflicts as `conflicts`.
    """

    models: Mapping[str, str]
    base: str | None
    merged: str | None
    layers: tuple[str, ...]
    parts: tuple[str, ...]
    similarity: Matrix | None
    distances: Matrix | None
    change: tuple[Row, ...]
    conflicts: tuple[Row, ...]
    norms: tuple[Row, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sample: int | None = None
    totals: Mapping[str, float] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, subject: Subject, places: Mapping[Place, Sums], sample: int | None) -> Analysis:
        """Make tables of sums."""
        labels = subject.labels[:-1]
        known = [part for part in PARTS if any(part == place[1] for place in places)]
        order = [(layer, part) for layer in subject.layers.order for part in known if (layer, part) in places]
        total = _total(places.values(), len(labels))
        has_base = subject.base is not None
        result = labels[subject.parents] if len(labels) > subject.parents else None
        relative = {label: _change(total, place)[1] for place, label in enumerate(labels)}
        return cls(
            models=dict(zip(labels[: subject.parents], subject.refs, strict=False)),
            base=subject.labels[-1] if has_base else None,
            merged=result,
            layers=tuple(layer for layer in subject.layers.order if any(layer == one for one, _ in order)),
            parts=tuple(known),
            similarity=_matrix(labels, total, _cosine) if has_base else None,
            distances=None if has_base else _matrix(labels, total, _distance),
            change=tuple(row for place in order for row in _changes(labels, place, places[place])),
            conflicts=tuple(_conflict(place, places[place]) for place in order) if has_base else (),
            norms=tuple(_norms(subject, order, places)),
            left_out={label: tuple(names) for label, names in subject.left_out()},
            sample=sample,
            totals={label: value for label, value in relative.items() if value is not None}
            | ({"conflicts": total.disagreeing / total.pairs} if total.pairs and has_base else {}),
        )

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        """The tables by name, those that there are: rows of plain data."""
        found = {
            "similarity": _wide(self.similarity), "distances": _wide(self.distances), "change": list(self.change),
            "conflicts": list(self.conflicts), "norms": list(self.norms),
        }  # fmt: skip
        return {name: rows for name, rows in found.items() if rows}

    @cached_property
    def readings(self) -> dict[str, str]:
        """How to read each table, and what its numbers say, by the table's name."""
        from hf_merge.analysis.readings import read

        return read(self)

    def figures(self) -> dict[str, Figure]:
        """Draw each table; see `hf_merge.analysis.figures`.

        Raises:
            MergeError: matplotlib is not installed.
        """
        from hf_merge.analysis.figures import draw

        return draw(self)

    def save(self, folder: str | os.PathLike[str], *, pictures: bool = True) -> Path:
        """Write `analysis.json`, each table as CSV, and each picture as PNG; return the folder.

        Args:
            folder: to make, or to write into.
            pictures: leave these out, for which matplotlib is needed.

        Raises:
            MergeError: matplotlib is not installed; nothing is written.
            OutputError: the folder cannot be written.
        """
        from hf_merge.errors import OutputError

        drawn = self.figures() if pictures else {}
        target = Path(folder).expanduser()
        try:
            target.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
            (target / "analysis.json").write_text(text + "\n", encoding="utf-8")
            for name, rows in self.tables.items():
                (target / f"{name}.csv").write_text(_comma_separated(rows), encoding="utf-8")
            for name, figure in drawn.items():
                figure.savefig(target / f"{name}.png")
        except OSError as error:
            raise OutputError(f"The analysis cannot be written to '{target}': {error.strerror or error}.") from None
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; docs/analysis.md says what is in it."""
        return {
            "models": dict(self.models),
            "base": self.base,
            "merged": self.merged,
            "layers": list(self.layers),
            "parts": list(self.parts),
            "similarity": self.similarity and self.similarity.to_dict(),
            "distances": self.distances and self.distances.to_dict(),
            "change": [dict(row) for row in self.change],
            "conflicts": [dict(row) for row in self.conflicts],
            "norms": [dict(row) for row in self.norms],
            "totals": dict(self.totals),
            "left_out": {label: list(names) for label, names in self.left_out.items()},
            "sample": self.sample,
            "readings": dict(self.readings),
        }

    def __str__(self) -> str:
        matrix = self.similarity or self.distances
        rows = [["", *matrix.models], *([name, *map(_short, row)] for name, row in
                                        zip(matrix.models, matrix.values, strict=True))] if matrix else []  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        told = [f"{name}: {text}" for name, text in self.readings.items()]
        return "\n".join([*table, "", *told])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"


def _total(places: Iterable[Sums], models: int) -> Sums:
    total = Sums.of(models)
    for sums in places:
        total.add(sums)
    return total


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def _matrix(labels: tuple[str, ...], sums: Sums, formula: Any) -> Matrix:
    everyone = range(len(labels))
    return Matrix(labels, tuple(tuple(formula(sums, a, b) for b in everyone) for a in everyone))


def _cosine(sums: Sums, a: int, b: int) -> float | None:
    """<d_a, d_b> / (|d_a| |d_b|) over the tensors that both have; None if one of them changed nothing."""
    if a == b:
        return 1.0 if sums.products[a, a] > 0 else None
    found = _ratio(sums.products[a, b], math.sqrt(sums.squares[a, b] * sums.squares[b, a]))
    return None if found is None else float(np.clip(found, -1.0, 1.0))


def _distance(sums: Sums, a: int, b: int) -> float | None:
    """|w_a - w_b| / sqrt((|w_a|^2 + |w_b|^2) / 2), the first over the tensors that both have."""
    apart = max(sums.squares[a, b] + sums.squares[b, a] - 2 * sums.products[a, b], 0.0)
    return 0.0 if a == b else _ratio(math.sqrt(apart), math.sqrt((sums.weights[a] + sums.weights[b]) / 2))


def _change(sums: Sums, model: int) -> tuple[float, float | None]:
    """|d_m| and |d_m| / |w_base|."""
    length = math.sqrt(sums.products[model, model])
    return length, _ratio(length, math.sqrt(sums.base[model]))


def _changes(labels: tuple[str, ...], place: Place, sums: Sums) -> Iterable[Row]:
    for model, label in enumerate(labels):
        length, relative = _change(sums, model)
        whole = math.sqrt(sums.base[model])
        yield {"model": label, "layer": place[0], "part": place[1], "norm": length, "relative": relative,
               "base_norm": whole}  # fmt: skip


def _conflict(place: Place, sums: Sums) -> Row:
    """Pairs that disagree / pairs that both change an entry; None where no two models change the same one."""
    return {"layer": place[0], "part": place[1], "share": _ratio(sums.disagreeing, sums.pairs)}


def _norms(subject: Subject, order: list[Place], places: Mapping[Place, Sums]) -> Iterable[Row]:
    """|w| of every model, and of the base, layer by layer."""
    shown = subject.labels if subject.base is not None else subject.labels[:-1]
    for layer in dict.fromkeys(layer for layer, _ in order):
        squares = sum(places[place].weights for place in order if place[0] == layer)
        for label, square in zip(shown, np.atleast_1d(squares), strict=False):
            yield {"layer": layer, "name": label, "norm": math.sqrt(square)}


def _wide(matrix: Matrix | None) -> list[Row]:
    """Write a matrix as rows: `{"model": "a", "a": 1.0, "b": 0.1}`."""
    if matrix is None:
        return []
    rows = zip(matrix.models, matrix.values, strict=True)
    return [{"model": name, **dict(zip(matrix.models, values, strict=True))} for name, values in rows]


def _comma_separated(rows: list[Row]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
