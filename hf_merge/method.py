"""The grammar of a merge method: one pure function whose signature says everything else.

    @merge_method(paper="https://arxiv.org/abs/2306.01708", elementwise=True)
    def ties(deltas: Deltas, *, density: PerModel[Fraction] = each(1.0), ...) -> Merged:
        '''One sentence in the imperative; the formula; Args; Notes; Good for; In words.'''

Positional arguments are tensors, keyword-only arguments are parameters:

    models | deltas     first: the space it works in, weights or task vectors; or
    factors             the factors of LoRA adapters (hf_merge.ops.factors)
    base                the base model's weight (`Tensor`: required; `Tensor | None`: optional)
    name: Annotated[.., Reduced(f)]   a number about the whole tensor, computed by f(tiles, *, ...) beforehand;
                        with over="model" about the whole model, computed in a first pass
    name: Fisher | Gram   statistics of every model, measured beforehand (hf_merge.measure); keyed like the model
    *, parameter        annotation = type and range; `PerModel[..]` = one value for each model; `Seed` = randomness
    -> Merged           the result; or `Experts`: a backbone, and for each model what makes its own weight of that

What a signature cannot say, the decorator does: how many models (`models=`, `min_models=`), whether tiles will do
(`elementwise=` for any, `rowwise=` for whole rows; both may depend on parameters), which values do not go together
(`check=`) and, of one with task experts, in which form these are kept (`experts=`).

Two sections of the docstring are for people who choose a method and its numbers, and may be left out: `Good for:` is
a plain sentence about when to take it, and `In words:` one about what it does with the numbers given. The latter is a
`str.format` template over the parameters, `{model}`, `{models}`, `{base}` and `{count}`, read by
`hf_merge.controls.in_words`: "Keeps the {density:.0%} largest changes of {model}." After the colon of a switch stand
the words for on and off, `{normalize:divided by their sum|as they are}`, and after that of a choice those for each
value, `{consensus:mean=averages|sum=adds up|max=takes the largest of}`.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from string import Formatter
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from hf_merge.aliases import told_alias
from hf_merge.errors import ParameterError, UnknownMethodError, did_you_mean, shown
from hf_merge.forms import Experts, Form
from hf_merge.types import Each, Measured, Number, PerModelMark, Reduced, SeedMark, Stack

BUILT_IN = "hf_merge.methods"
ENTRY_POINTS = "hf_merge.methods"
SUMMARY_LENGTH = 100

_LAMBDA_IN_PYTHON = "lambda_"

_registry: dict[str, MergeMethod] = {}


@dataclass(frozen=True)
class Parameter:
    """One keyword-only argument of a method.

    Attributes:
        name: as recipes spell it.
        annotation: type and range of one value.
        default: the value when a recipe says nothing.
        per_model: whether every model has its own value.
        help: its line in the docstring.
    """

    name: str
    annotation: Any
    default: Any
    per_model: bool
    help: str

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation)

    @cached_property
    def schema(self) -> dict[str, Any]:
        """Type and range of one value as a JSON schema."""
        return self._adapter.json_schema()

    def check(self, value: Any, method: str) -> Any:
        """Return `value` in the parameter's type, or say what is wrong with it."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            found = error.errors()[0]["msg"].removeprefix("Input ").removeprefix("should ")
            raise ParameterError(f"'{self.name}' of '{method}' should {found}; found {shown(value)}.") from None

    @property
    def words(self) -> str:
        """The type and range in words, for tables: `number in [0, 1]`, `l1 | density | none`."""
        schema = self.schema
        if "enum" in schema:
            return " | ".join(schema["enum"])
        if {"minimum", "maximum"} <= schema.keys():
            return f"number in [{schema['minimum']:g}, {schema['maximum']:g}]"
        if "exclusiveMinimum" in schema:
            return f"number > {schema['exclusiveMinimum']:g}"
        if schema.get("type") == "number" and "minimum" in schema:
            return f"number >= {schema['minimum']:g}"
        kinds = [str(part.get("type", "any")) for part in schema.get("anyOf", [schema])]
        return " | ".join({"boolean": "true | false", "null": "none"}.get(kind) or kind for kind in kinds)


LAMBDA = Parameter(
    "lambda", Number, 1.0, per_model=False, help="Scale of the merged task vector before it is added to the base."
)


@dataclass(frozen=True, eq=False)
class MergeMethod:
    """A registered merge method; call it on tensors, or name it in a recipe.

    Attributes:
        name: as recipes spell it.
        fn: the pure function.
        space: what it merges: `models` (weights), `deltas` (task vectors) or `factors` (of LoRA adapters).
        base: whether the base model's weight is `required`, `optional` or `ignored`.
        count: exactly how many models it merges (base excluded), or None for any number from `least` on.
        least: how many models it merges at least.
        parameters: its parameters by name.
        statistics: what is measured on data beforehand, by name; a tensor without it is averaged.
        reductions: numbers about the whole tensor or the whole model that it needs, in order.
        seeded: name of the parameter that gets the seeds, if the method is random.
        elementwise: whether each output entry depends on the same entry of the inputs only, so that it
            may run on tiles; a function if that depends on parameters, see `tiled`.
        rowwise: the same of whole rows, which it sees in their shape; see `by_rows`.
        ordered: whether the order of the models matters, as it does where a later one wins.
        wide: whether it computes in float64, whatever the dtype of the weights; it takes more memory then.
        check: complains about values that do not go together.
        experts: of a method with task experts, the form in which each is kept; see `form`.
        ignored: names that MergeKit's recipes may give and that have no effect.
        paper: where it comes from.
        summary, formula, notes: from the docstring.
        good_for: from the docstring, a sentence on when to choose it; empty if it does not say.
        in_words: from the docstring, a template of a sentence about the parameters' values; empty if there is none.
    """

    name: str
    fn: Callable[..., Tensor | Experts]
    space: Literal["models", "deltas", "factors"]
    base: Literal["required", "optional", "ignored"]
    count: int | None
    least: int
    parameters: Mapping[str, Parameter]
    statistics: Mapping[str, Measured]
    reductions: Mapping[str, Reduced]
    seeded: str | None
    elementwise: bool | Callable[..., bool]
    rowwise: bool | Callable[..., bool]
    ordered: bool
    wide: bool
    check: Callable[..., None] | None
    experts: Callable[..., Form] | None
    ignored: tuple[str, ...]
    paper: str
    summary: str
    formula: str
    notes: str
    good_for: str = ""
    in_words: str = ""

    def __call__(self, models: Sequence[Tensor], base: Tensor | None = None, **parameters: Any) -> Any:
        """Merge whole tensors: weights or, for a method on task vectors, task vectors.

        Args:
            models: one tensor of the same shape for each model; of factors, as `ops.factors.packed` makes them.
            base: the base model's tensor, for methods on weights that use one.
            parameters: as in a recipe; a scalar holds for every model. Statistics are lists of a tensor for each
                model: `fisher=[..]`. `lambda` belongs to the addition to the
                base, which is not done here.

        Returns:
            A tensor of their shape and dtype; 16-bit floats are computed in float32. Numbers over a whole model are
            those of these tensors alone. A method with task experts gives `forms.Experts`.

        Raises:
            ParameterError: a parameter, the number of models, their shapes or a missing base.
        """
        self._check_call(models, base)
        measured = self._measured(models, parameters)
        parameters = {name: value for name, value in parameters.items() if name not in self.statistics}
        settings = self.settings(len(models), parameters)
        shape, dtype = models[0].shape, models[0].dtype
        wide, tiled = torch.promote_types(dtype, torch.float32), self.tiled(settings)
        tensors = [t.to(wide).flatten() if tiled else t.to(wide) for t in (*models, *_listed(base))]
        cast = {
            name: Stack(
                t.to(wide).flatten() if tiled and self.statistics[name].of == "entries" else t.to(wide) for t in each
            )
            for name, each in measured.items()
        }
        stack = Stack(tensors[: len(models)], base=None if base is None else tensors[-1], measured=cast)
        merged = self.run(stack, self.reduce([_stand_in(stack)], settings), settings)
        if isinstance(merged, Experts):
            return merged.mapped(lambda tensor: tensor.reshape(shape))
        return merged.reshape(shape).to(dtype)

    def _check_call(self, models: Sequence[Tensor], base: Tensor | None) -> None:
        if not self.takes(len(models)):
            raise ParameterError(f"'{self.name}' takes {self.number_of_models}; found {len(models)}.")
        if self.base == "required" and self.space == "models" and base is None:
            raise ParameterError(f"'{self.name}' merges into a base: pass it after the models.")
        if len({tuple(t.shape) for t in (*models, *_listed(base))}) > 1:
            raise ParameterError(f"'{self.name}' merges tensors of one shape; found {[list(t.shape) for t in models]}.")

    def _measured(self, models: Sequence[Tensor], given: Mapping[str, Any]) -> dict[str, Sequence[Tensor]]:
        """Check the statistics of a call."""
        for name, kind in self.statistics.items():
            found = given.get(name)
            if not isinstance(found, (list, tuple)) or len(found) != len(models):
                raise ParameterError(f"'{self.name}' needs {name}=[..], a tensor for each of the {len(models)} models.")
            for model, one in zip(models, found, strict=True):
                if not kind.fits(tuple(model.shape), tuple(one.shape)):
                    raise ParameterError(
                        f"'{name}' of '{self.name}' has the shape {list(one.shape)}, which does not fit a weight of "
                        f"the shape {list(model.shape)}."
                    )
        return {name: given[name] for name in self.statistics}

    def takes(self, count: int) -> bool:
        """Whether it can merge so many models, base excluded."""
        return count >= self.least and self.count in (None, count)

    @property
    def number_of_models(self) -> str:
        """How many models it merges, in words: `2 models`, `at least 1 model`."""
        return f"{'at least ' if self.count is None else ''}{self.least} model{'s' * (self.least != 1)}"

    def tiled(self, settings: Mapping[str, Any]) -> bool:
        """Whether it runs on tiles with these parameters; else it sees whole tensors in their shape."""
        return _by_name(self.elementwise, settings) if callable(self.elementwise) else self.elementwise

    def by_rows(self, settings: Mapping[str, Any]) -> bool:
        """Whether it runs on some rows at a time with these parameters, in their shape."""
        return _by_name(self.rowwise, settings) if callable(self.rowwise) else self.rowwise

    def form(self, shape: Sequence[int], count: int, settings: Mapping[str, Any]) -> Form | None:
        """Say in which form each of so many experts is kept of a tensor; None for a method without experts."""
        return _by_name(self.experts, settings, tuple(shape), count) if self.experts else None

    def settings(self, count: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check parameters and complete them with defaults: a list of `count` values where they are per model."""
        for name in given.keys() - {self.seeded}:
            self.parameter(name)
        done: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if not parameter.per_model:
                done[name] = parameter.check(value, self.name)
                continue
            values = list(value) if isinstance(value, (list, tuple)) else [value] * count
            if len(values) != count:
                raise ParameterError(f"'{name}' of '{self.name}' has {len(values)} values for {count} models.")
            done[name] = [parameter.check(v, self.name) for v in values]
        if self.seeded:
            done[self.seeded] = self._seeds(given.get(self.seeded, 0), count)
        return self.checked(done)

    def checked(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return complete settings, if the method's own `check` has nothing against them."""
        try:
            if self.check:
                _by_name(self.check, settings)
        except ValueError as error:
            raise ParameterError(f"'{self.name}': {error}.") from None
        return settings

    def _seeds(self, seed: Any, count: int) -> list[int]:
        """One seed for each model; a single one is spread so that no two models share a mask."""
        seeds = (
            seed
            if isinstance(seed, (list, tuple))
            else [seed + (i << 32) if type(seed) is int else seed for i in range(count)]
        )
        if any(type(one) is not int for one in seeds):
            raise ParameterError(f"'{self.seeded}' of '{self.name}' should be an integer; found {shown(seed)}.")
        if len(seeds) != count:
            raise ParameterError(f"'{self.seeded}' of '{self.name}' has {len(seeds)} values for {count} models.")
        return list(seeds)

    def parameter(self, name: str) -> Parameter | None:
        """Look a parameter up; None for one that MergeKit knows and that has no effect here."""
        if name in self.parameters or name in self.ignored:
            return self.parameters.get(name)
        if name == self.seeded:
            raise ParameterError(f"'{name}' is no parameter of '{self.name}' but of the whole recipe: write it there.")
        known = ", ".join(self.parameters) or "none"
        hint = told_alias(name, self.parameters) or did_you_mean(name, [*self.parameters, self.seeded or ""])
        raise ParameterError(f"'{self.name}' has no parameter '{name}' (it has: {known}).{hint}")

    def reduce(
        self, tiles: Iterable[Stack], settings: Mapping[str, Any], known: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Compute the method's reductions over all tiles of one tensor, but for those that are known."""
        found: dict[str, Any] = {}
        for name, reduction in self.reductions.items():
            already = known or {}
            found[name] = already[name] if name in already else _by_name(reduction.by, {**settings, **found}, tiles)
        return found

    def over_model(self, settings: Mapping[str, Any]) -> list[str]:
        """Name the reductions that go over the whole model with these parameters.

        None of these may ask for one over a tensor: all of them are computed in one go before.
        """
        return [name for name, one in self.reductions.items() if _over(one, settings) == "model"]

    def asked_over_model(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters that the reductions over the whole model depend on."""
        asked = {_spelled(one) for name in self.over_model(settings) for one in _keywords(self.reductions[name].by)}
        return {name: settings[name] for name in sorted(asked & settings.keys())}

    def before(self, tiles: Iterable[Stack], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the reductions over the whole model, of which these are all tiles."""
        found: dict[str, Any] = {}
        for name in self.over_model(settings):
            found[name] = _by_name(self.reductions[name].by, {**settings, **found}, tiles)
        return found

    def run(self, stack: Stack, reduced: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
        """Apply the function to a tensor or a tile of it."""
        base = () if self.base == "ignored" or self.space == "deltas" else (stack.base,)
        arguments = {k: v for k, v in settings.items() if k != LAMBDA.name}
        if self.space != "deltas" and LAMBDA.name in settings:
            arguments[_LAMBDA_IN_PYTHON] = settings[LAMBDA.name]
        measured = {name: stack.measured[name] for name in self.statistics}
        return self.fn(stack, *base, **measured, **reduced, **arguments)


def merge_method(
    *,
    paper: str,
    elementwise: bool | Callable[..., bool] = False,
    rowwise: bool | Callable[..., bool] = False,
    models: int | None = None,
    min_models: int = 1,
    ordered: bool = False,
    wide: bool = False,
    check: Callable[..., None] | None = None,
    experts: Callable[..., Form] | None = None,
    ignored: Sequence[str] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Tensor | Experts]], MergeMethod]:
    """Register a merge method; everything but these words is read from the function.

    Args:
        paper: address of the paper or project that describes it.
        elementwise: each output entry depends on the same entry of the inputs (and on reductions) only; where that
            depends on parameters, a function of them.
        rowwise: each row of the output, which is all that has one index along the first of two or more dims, depends
            on the same row of the inputs (and on reductions) only; or a function of parameters. Less is one row.
        models: exactly how many models it merges, base excluded; any number if not given.
        min_models: how many at least.
        ordered: the order of the models matters.
        wide: it computes in float64.
        check: gets the parameters it names and raises ValueError where they do not go together.
        experts: of a method that returns `Experts`: from a shape, the number of models and the parameters that it
            names to the form in which each expert is kept.
        ignored: parameters that MergeKit's recipes may give it and that have no effect.
        name: if not the function's.

    Raises:
        TypeError: the function does not follow the grammar of `hf_merge.method`.
    """

    def register(fn: Callable[..., Tensor | Experts]) -> MergeMethod:
        words: dict[str, Any] = {"paper": paper, "elementwise": elementwise, "rowwise": rowwise, "check": check}
        counts = {"count": models, "least": models or min_models}
        words |= {"ordered": ordered, "wide": wide, "ignored": tuple(ignored), "experts": experts}
        return _registered(_read_signature(fn, name=name or fn.__name__, **words, **counts))

    return register


def _registered(method: MergeMethod) -> MergeMethod:
    known = _registry.get(method.name)
    if known and (known.fn.__module__, known.fn.__qualname__) != (method.fn.__module__, method.fn.__qualname__):
        raise TypeError(f"There is a merge method '{method.name}' already: give this one another name.")
    _registry[method.name] = method
    return method


def get_method(name: str) -> MergeMethod:
    """Return the method of that name.

    Raises:
        UnknownMethodError: with the nearest name.
    """
    _load_methods()
    if name not in _registry:
        raise UnknownMethodError(
            f"There is no merge method '{name}'.{did_you_mean(name, _registry)} Known: {', '.join(sorted(_registry))}."
        )
    return _registry[name]


def list_methods(pattern: str = "*") -> list[str]:
    """Return the names of the methods that match a shell pattern, sorted: `list_methods("*ties*")`."""
    _load_methods()
    return sorted(fnmatch.filter(_registry, pattern))


@cache
def _load_methods() -> None:
    """Import the methods of this package, then those of installed plug-ins."""
    importlib.import_module(BUILT_IN)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def _read_signature(fn: Callable[..., Tensor | Experts], *, name: str, **words: Any) -> MergeMethod:
    hints = get_type_hints(fn, include_extras=True)
    doc = _read_docstring(fn)
    arguments = list(inspect.signature(fn).parameters.values())
    if untyped := [a.name for a in arguments if a.name not in hints]:
        raise TypeError(f"'{untyped[0]}' of '{name}' needs an annotation: it says type and range.")
    space, *others = [a.name for a in arguments if a.kind is not a.KEYWORD_ONLY] or [""]
    if space not in ("models", "deltas", "factors"):
        raise TypeError(f"The first argument of '{name}' must be called models, deltas or factors, not '{space}'.")
    reductions = {other: mark for other in others if (mark := _mark(hints[other], Reduced))}
    statistics = {other: mark for other in others if (mark := _mark(hints[other], Measured))}
    if unknown := [other for other in others if other not in {"base", *reductions, *statistics}]:
        raise TypeError(f"'{name}' takes tensors it does not explain: {', '.join(unknown)}.")
    if not 0 < len(doc["summary"]) <= SUMMARY_LENGTH:
        raise TypeError(
            f"The docstring of '{name}' should begin with a sentence of at most {SUMMARY_LENGTH} characters."
        )
    keywords = [a for a in arguments if a.kind is a.KEYWORD_ONLY]
    seeded = next((a.name for a in keywords if _mark(hints[a.name], SeedMark)), None)
    parameters = {_spelled(a.name): _parameter(a, hints[a.name], doc) for a in keywords if a.name != seeded}
    _refuse_strangers(
        name, parameters, **{word: words[word] for word in ("elementwise", "rowwise", "check", "experts")}
    )
    _refuse_strange_words(name, doc["in_words"], parameters)
    optional = NoneType in get_args(hints.get("base"))
    needed = "optional" if optional else "required" if space == "deltas" or "base" in others else "ignored"
    return MergeMethod(
        name=name,
        fn=fn,
        space=space,
        base=needed,
        parameters={**parameters, **({LAMBDA.name: LAMBDA} if space == "deltas" else {})},
        statistics=statistics,
        reductions=reductions,
        seeded=seeded,
        summary=doc["summary"],
        formula=doc["formula"],
        notes=doc["notes"],
        good_for=doc["good_for"],
        in_words=doc["in_words"],
        **words,
    )


def _over(reduction: Reduced, settings: Mapping[str, Any]) -> Any:
    return _by_name(reduction.over, settings) if callable(reduction.over) else reduction.over


def _parameter(argument: inspect.Parameter, hint: Any, doc: Mapping[str, Any]) -> Parameter:
    if argument.default is argument.empty:
        raise TypeError(f"Parameter '{argument.name}' needs a default.")
    per_model = _mark(hint, PerModelMark) is not None
    annotation = get_args(get_args(hint)[0])[0] if per_model else hint
    default = argument.default.value if isinstance(argument.default, Each) else argument.default
    return Parameter(_spelled(argument.name), annotation, default, per_model, doc["args"].get(argument.name, ""))


def _spelled(name: str) -> str:
    """Return the word of recipes for an argument; `lambda` is none that Python takes."""
    return LAMBDA.name if name == _LAMBDA_IN_PYTHON else name


def _refuse_strangers(name: str, parameters: Mapping[str, Parameter], **conditions: Any) -> None:
    """The decorator's functions of parameters may ask for parameters only."""
    for word, condition in conditions.items():
        if callable(condition) and (unknown := {*map(_spelled, _keywords(condition))} - parameters.keys()):
            raise TypeError(f"The {word} of '{name}' asks for what is no parameter: {', '.join(sorted(unknown))}.")


def _refuse_strange_words(name: str, template: str, parameters: Mapping[str, Parameter]) -> None:
    """The sentence about a method's numbers may name parameters and models only."""
    known = {*parameters, LAMBDA.name, "model", "models", "base", "count"}
    try:
        found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise TypeError(f"'In words' of '{name}' is no template: {error}.") from None
    if unknown := found - known:
        raise TypeError(f"'In words' of '{name}' names what is no parameter: {', '.join(sorted(unknown))}.")


def _mark(hint: Any, kind: type) -> Any:
    """Return the mark of that kind in an `Annotated` hint, if it has one."""
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def _read_docstring(fn: Callable[..., Any]) -> dict[str, Any]:
    """Split a Google-style docstring into summary, formula, args, notes and the sentences for those who choose."""
    parts: dict[str, list[str]] = {"": [], "Args": [], "Notes": [], "Good for": [], "In words": []}
    section = ""
    for line in inspect.cleandoc(fn.__doc__ or "").splitlines():
        if line.rstrip(":") in parts and line.endswith(":"):
            section = line.rstrip(":")
        else:
            parts[section].append(line)
    summary, _, formula = "\n".join(parts[""]).partition("\n\n")
    args: dict[str, str] = {}
    for line in inspect.cleandoc("\n".join(["", *parts["Args"]])).splitlines():
        key, colon, text = line.partition(": ")
        if colon and not line.startswith(" "):
            args[key] = text
        elif args and line.strip():
            args[next(reversed(args))] += " " + line.strip()
    prose = {key: " ".join("\n".join(parts[key]).split()) for key in ("Notes", "Good for", "In words")}
    return {
        "summary": summary,
        "formula": inspect.cleandoc("\n" + formula).strip("\n"),
        "args": args,
        "notes": prose["Notes"],
        "good_for": prose["Good for"],
        "in_words": prose["In words"],
    }


@cache
def _keywords(by: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a reduction's keyword-only arguments."""
    return tuple(a.name for a in inspect.signature(by).parameters.values() if a.kind is a.KEYWORD_ONLY)


def _by_name(fn: Callable[..., Any], known: Mapping[str, Any], *positional: Any) -> Any:
    """Call a function with the values of its keyword-only arguments."""
    return fn(*positional, **{name: known[_spelled(name)] for name in _keywords(fn)})


def _listed(base: Tensor | None) -> list[Tensor]:
    return [] if base is None else [base]


def _stand_in(stack: Stack) -> Stack:
    """On the meta device there are no values to reduce: measure a single zero instead."""
    if stack[0].device.type != "meta":
        return stack
    zero = torch.zeros(1)
    measured = {name: Stack([zero] * len(each)) for name, each in stack.measured.items()}
    return Stack([zero] * len(stack), base=None if stack.base is None else zero, measured=measured)
