"""What a check found: a verdict, a sentence, a row for each model, and what would help."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_merge.planning import Plan, Problem, format_bytes
from hf_merge.recipe import Recipe
from hf_merge.schema import ModelEntry

Verdict = Literal["fits", "warns", "does not fit"]


@dataclass(frozen=True)
class ModelRow:
    """One model beside the one that all are compared with: the base, or else the first that can be read.

    Attributes:
        name: how messages call it.
        role: `base`, `model` or `adapter`; a base that is merged too is `base`.
        error: why it cannot be read, in words; then nothing else is known of it.
        architecture: its class in transformers; of an adapter alone its kind and rank.
        tensors: how many it has; of adapters alone, modules that it changes.
        matching: how many of them have the name and shape of the other model's.
        missing: how many of the other model's it lacks.
        extra: how many it has beyond those of the other model.
        differing: how many have the other's name and another shape.
        example: the first difference in words; nothing if there is none.
        dtype: that most of its bytes have.
        size: of its weights in bytes, as they are stored.
        vocabulary: how many tokens config.json says that it has.
        tokenizer: its tokens beside the other model's, in words.
        chat_template: likewise.
        quantised: by what.
        gated: whether the Hub asks for consent first.
        custom_code: whether its config names code of its own, which is copied and not run.
        licence: as its card says.
        revision: the commit on the Hub.
    """

    name: str
    role: Literal["base", "model", "adapter"]
    error: str | None = None
    architecture: str | None = None
    tensors: int = 0
    matching: int = 0
    missing: int = 0
    extra: int = 0
    differing: int = 0
    example: str = ""
    dtype: str | None = None
    size: int = 0
    vocabulary: int | None = None
    tokenizer: str = "not known"
    chat_template: str = "not known"
    quantised: str | None = None
    gated: bool = False
    custom_code: bool = False
    licence: str = "unknown"
    revision: str | None = None


@dataclass(frozen=True)
class Advice:
    """A proposal.

    Attributes:
        name: of a model or of a method.
        why: in half a sentence.
    """

    name: str
    why: str


@dataclass(frozen=True)
class Fix:
    """A change of the recipe after which the models fit; it was planned, from headers.

    Attributes:
        label: what it does, for a button.
        why: what it means for the result.
        changes: fields of the recipe with what they should say; None leaves a field out.
    """

    label: str
    why: str
    changes: Mapping[str, Any]

    @property
    def plain(self) -> dict[str, Any]:
        """The changes as plain data for JSON; models in memory by their labels."""
        return json.loads(json.dumps(dict(self.changes), default=_plain))

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these changes.

        Raises:
            RecipeError: it cannot be meant.
        """
        kept = recipe.model_fields_set - self.changes.keys()
        return Recipe.load({**{name: getattr(recipe, name) for name in kept}, **_said(self.changes)})


@dataclass(frozen=True)
class Report:
    """Whether models can be merged, from their headers, configs and cards.

    `to_dict()` is plain data for JSON with the same names.

    Attributes:
        verdict: `fits`; `warns`: they can be merged, and there is something to know first; or `does not fit`.
        sentence: the verdict in one sentence, with its reason.
        rows: one for each model, in the recipe's order, a base that is not merged last.
        compared_with: name of the model that the others are compared with; None if none can be read.
        proposed_base: the base that cards and configs name, where the recipe has none or names another one.
        licence: which licence the result may carry, as a sentence.
        method: which method to take, by headers alone.
        problems: what the plan found, errors first, each with its fix in words.
        fixes: changes of the recipe after which nothing is in the way, or of which a warning is gone; best first.
        layers: number of layers of the longest stack, for values that vary over the depth; 0 if there is none.
        recipe: what was checked; with the recommended method if none was named.
        plan: what a merge would do; None if there can be no plan. In `to_dict()` its sizes only.
    """

    verdict: Verdict
    sentence: str
    rows: tuple[ModelRow, ...]
    compared_with: str | None
    proposed_base: Advice | None
    licence: str
    method: Advice
    problems: tuple[Problem, ...]
    fixes: tuple[Fix, ...]
    layers: int
    recipe: Recipe
    plan: Plan | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON.

        `rows`, `problems` (severity, message, tensors), `fixes` (label, why, changes), `method` and `proposed_base`
        (name, why; or null) are objects of the attributes above; `recipe` is one that `Recipe.load` reads. `plan` is
        null or has tensors, bytes_read, bytes_written, bytes_downloaded, peak_memory, all bytes but the first, and
        seconds.
        """
        plain = {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "rows": [vars(row) for row in self.rows],
            "compared_with": self.compared_with,
            "proposed_base": self.proposed_base and vars(self.proposed_base),
            "licence": self.licence,
            "method": vars(self.method),
            "problems": [vars(problem) for problem in self.problems],
            "fixes": [{"label": fix.label, "why": fix.why, "changes": fix.plain} for fix in self.fixes],
            "layers": self.layers,
            "recipe": self.recipe.to_dict(),
            "plan": self.plan and _sizes(self.plan),
        }
        return json.loads(json.dumps(plain, default=_plain))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def listed(names: Sequence[object]) -> str:
    """Write names as a sentence has them: `'a', 'b' and 'c'`."""
    quoted = [f"'{name}'" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _said(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _plain(value: Any) -> Any:
    return plain_entry(value) if isinstance(value, ModelEntry) else str(value)


def plain_entry(entry: ModelEntry) -> Any:
    """Return a model of a recipe as YAML has it: its name, or a mapping where more is said of it."""
    said = entry.model_dump(exclude_defaults=True)
    return said["model"] if set(said) == {"model"} else said


def _sizes(plan: Plan) -> dict[str, Any]:
    names = ("bytes_read", "bytes_written", "bytes_downloaded", "peak_memory")
    return {"tensors": len(plan.steps), **{name: getattr(plan, name) for name in names}, "seconds": dict(plan.seconds)}


def _lines(report: Report) -> Iterator[str]:
    """Yield the report for people: the sentence, the table, what it leaves out, problems and fixes."""
    yield report.sentence
    yield ""
    yield from _table(report.rows)
    yield ""
    yield from (f"{row.name}: {'; '.join(told)}" for row in report.rows if (told := list(_remarks(row))))
    yield f"Licence: {report.licence}"
    yield f"Method: {report.method.name}, {report.method.why}."
    if report.proposed_base:
        yield f"Base: {report.proposed_base.name}, {report.proposed_base.why}."
    if report.plan and not report.plan.errors:
        yield (
            f"A merge reads {format_bytes(report.plan.bytes_read)} and writes "
            f"{format_bytes(report.plan.bytes_written)} in {len(report.plan.specs)} tensors."
        )
    yield from (str(problem) for problem in report.problems)
    for fix in report.fixes:
        said = ", ".join(f"{name}: {_short(value)}" for name, value in fix.plain.items())
        yield f"fix: {fix.label} ({said}). {fix.why}"


def _short(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_short(one) for one in value)}]"
    if isinstance(value, Mapping) and "model" in value:
        return str(value["model"])
    return str(value)


def _remarks(row: ModelRow) -> Iterator[str]:
    """Yield what a row says in words."""
    if row.error:
        yield row.error
        return
    if row.example:
        yield row.example
    yield f"tokenizer {row.tokenizer}"
    yield f"chat template {row.chat_template}"
    if row.quantised:
        yield f"quantised by {row.quantised}, merged as what it stands for"
    if row.gated:
        yield "gated: the Hub asks for consent before it gives it away"
    if row.custom_code:
        yield "code of its own, which is copied and never run"


_COLUMNS = ("model", "role", "architecture", "tensors", "matching", "missing", "extra", "other shape", "dtype", "size",
            "tokens", "licence")  # fmt: skip


def _table(rows: Sequence[ModelRow]) -> Iterator[str]:
    cells = [_COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cells(row: ModelRow) -> tuple[str, ...]:
    if row.error:
        return (row.name, row.role, "cannot be read", *[""] * (len(_COLUMNS) - 3))
    counts = (row.tensors, row.matching, row.missing, row.extra, row.differing)
    tokens = "" if row.vocabulary is None else f"{row.vocabulary:,}"
    return (
        row.name, row.role, row.architecture or "not known", *(f"{count:,}" for count in counts), row.dtype or "",
        format_bytes(row.size), tokens, row.licence,
    )  # fmt: skip
