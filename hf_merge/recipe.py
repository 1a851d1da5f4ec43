"""A recipe: what the user said, checked. MergeKit's YAML, and a superset of it.

merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 1.0, density: 0.5}       # one value, a gradient over layers, or filters
  - model: org/b@revision
  - model: org/base+org/lora                      # a PEFT adapter, added to its base; org/lora alone finds it
parameters: {normalize: true}
dtype: bfloat16
seed: 0                                           # ours: random methods draw from it
rules:                                            # ours: another method for some tensors, first match wins
  - {pattern: "*.lm_head.*", merge_method: passthrough, models: [org/a]}

Instead of `models`, `slices` stack layers and `modules` merge the towers of a model apart:

slices:
  - sources: [{model: org/a, layer_range: [0, 16]}]
  - sources: [{model: org/b, layer_range: [8, 24]}]
modules:
  text_decoder: {models: [..]}
  vision_tower: {merge_method: passthrough, models: [org/a]}
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Lt
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from hf_merge.checking import check, line_of
from hf_merge.errors import ParameterError, RecipeError, did_you_mean, shown
from hf_merge.method import MergeMethod, get_method
from hf_merge.schedule import is_filter
from hf_merge.schema import (
    DType,
    LayerScaling,
    ModelEntry,
    Models,
    Module,
    Names,
    Part,
    Pattern,
    RankOrSum,
    Rule,
    Setting,
    Slice,
    Targets,
    one_of,
)
from hf_merge.tokenization.options import ChatTemplate, TokenizerOptions, TokenizerSource, keys_at
from hf_merge.types import InMemory, Model, ModelRef, Ref
from hf_merge.yaml_lines import MAX_BYTES, Document, Lines, load_documents

ADAPTER_FIELDS = ("rank", "targets", "exact_svd", "keep_rest", "vllm", "space")
"""What is said of an adapter, and of nothing else."""

STATISTICS = "statistics"
"""The keyword with one file of statistics for each model."""

KEYWORDS = {"method": "merge_method", "lambda_": "lambda"}
"""Python spellings of words of the recipe."""


class Recipe(Part):
    """What is merged, and how. Frozen; read one with `load` or `from_yaml`.

    Attributes:
        merge_method: name of the method.
        models: the models, in order; or
        slices: which layers of which models, one after the other; or
        modules: parts of the model by name, each with its own models or slices.
        base_model: the model the others were fine-tuned from; it also gives config and tokenizer.
        parameters: of the method; those under a model win.
        dtype: of the written weights (arithmetic is float32); the models' own if not given.
        out_dtype: wins over dtype, as in MergeKit.
        seed: random methods draw from it.
        rules: other methods for some tensors, first match wins.
        lines: scale task vectors by the depth of their layer, whatever the method: lambda times alpha + beta * depth.
        missing: what happens to a tensor that some model lacks: error, keep the base's, or merge without
            that model.
        keys: which tensors the output has: those of the base (or of the first model); the same, and nothing
            else may be in any model (strict); those that all have (intersection); or those that any has (union).
        remap: regular expressions and what to put in their place in the names of every model's tensors.
        allow_nonfinite: let NaN and Inf pass.
        tokenizer: of the result, and the rows of its tokens; the base's files as they are if not given.
        tokenizer_source: short for `tokenizer: {source: ..}`.
        chat_template: `auto`, a built-in name, or Jinja (the text of a file, once it is read).
        output_format: a `model`, or the change of the base as a PEFT `adapter`. Of an adapter only:
        rank: at most so many dimensions for each module (an integer), or as few as keep that share of its change's
            squared norm (a number in (0, 1]); `sum`, for adapters alone, keeps all of them. All that changes if not
            given.
        targets: which modules get factors: names, ends of names such as `q_proj`, patterns, or `all-linear`; all
            that change if not given.
        exact_svd: decompose whole matrices, also where a random sketch of them would do.
        keep_rest: whether changed norms, biases and other tensors that are no matrices are saved as they are, or left
            out and told; saved if not given, but for vLLM.
        vllm: write it as vLLM loads it, or refuse to.
        space: where adapters are merged with each other: in the joint spaces of their factors (core, the default), as
            full matrices, or A and B apart (factors), which is what PEFT's `linear` does and is wrong but for
            adapters that share one of them.
        tasks: what the tasks are called, of a method with task experts; the models' names if not given.
        heads: patterns of names of tensors that belong to one task each and are not merged, of such a method; if not
            given, what transformers' class has on top of its backbone, and what not all models have in one shape.
        name: by which other documents of the same file refer to the result.
        stages: the other documents: named merges whose results this one merges.
    """

    merge_method: str
    models: Models = ()
    slices: tuple[Slice, ...] = ()
    modules: dict[str, Module] = Field(default_factory=dict)
    base_model: Model | None = None
    parameters: dict[str, Setting] = Field(default_factory=dict)
    dtype: DType | None = None
    out_dtype: DType | None = None
    seed: Annotated[int, Ge(0), Lt(1 << 63)] = 0
    rules: tuple[Rule, ...] = ()
    lines: LayerScaling | None = None
    missing: Literal["error", "base", "skip-model"] = "error"
    keys: Literal["base", "strict", "intersection", "union"] = "base"
    remap: dict[Pattern, str] = Field(default_factory=dict)
    allow_nonfinite: bool = False
    tokenizer: TokenizerOptions | None = None
    tokenizer_source: TokenizerSource | None = None
    chat_template: ChatTemplate | None = None
    output_format: Literal["model", "adapter"] | None = None
    rank: RankOrSum | None = None
    targets: Targets | None = None
    exact_svd: bool = False
    keep_rest: bool | None = None
    vllm: bool = False
    space: Literal["core", "full", "factors"] | None = None
    tasks: Names | None = None
    heads: Names | None = None
    name: str | None = None
    stages: tuple[Recipe, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Recipe:
        one_of(self, ("models", "slices", "modules"))
        return self

    @model_validator(mode="after")
    def _adapter_only(self) -> Recipe:
        said = [name for name in ADAPTER_FIELDS if getattr(self, name) != type(self).model_fields[name].default]
        if said and self.output_format == "model":
            raise ValueError(f"says '{said[0]}', which is of an adapter: write output_format: adapter, or leave it out")
        return self

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
            source: path of a YAML or JSON file, a mapping, a Recipe, or a list (or mapping of labels) of models. Of
                several documents in a file the named ones are stages, which the others may name as models.
            **changes: fields of the recipe (`method=`, `base_model=`, `dtype=`, ...) or parameters of the method.
                A list for a per-model parameter has one value for each model. What is said here wins.

        Raises:
            RecipeError: with the line of the file where something is wrong.
        """
        return _build(_read(source), changes)

    @classmethod
    def from_yaml(cls, text: str, **changes: Any) -> Recipe:
        """Read a recipe from YAML text; see `load`."""
        return _build(load_documents(text), changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, the seed always included."""
        return {**self.model_dump(exclude_defaults=True), "seed": self.seed}

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `from_yaml` reads back; its stages are the first documents."""
        documents = [_plain(stage.to_dict()) for stage in self.stages]
        last = {key: value for key, value in _plain(self.to_dict()).items() if key != "stages"}
        return yaml.safe_dump_all([*documents, last], sort_keys=False, allow_unicode=True, default_flow_style=None)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Path:
        """Write a recipe repo: no weights, but all that the Auto classes need to merge the model when they load it.

        After `import hf_merge`, `AutoModelForCausalLM.from_pretrained(folder)`, AutoTokenizer and `pipeline` take the
        folder for a model. The commits of all models on the Hub are pinned. Of weights, headers are read.

        Args:
            folder: to make; an earlier recipe repo in it is replaced.
            token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.

        Returns:
            The folder.

        Raises:
            SourceError, PlanError, RecipeError: the recipe cannot be merged, or a model is an object in memory.
            OutputError: there is something else in the folder.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return _repo().save_recipe(self, folder, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Any:
        """Push a recipe repo to the Hub; see `save_pretrained`.

        Args:
            repo_id: `org/name`.
            token: to read the models and to write the repo.
            cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
            **options: of `hf_merge.push_to_hub`: private, create_pr, revision, commit_message, exist_ok.

        Raises:
            RecipeError: it names models that only this machine has.
        """
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        return _repo().push_recipe(self, repo_id, hub=hub, token=token, **options)

    @property
    def parts(self) -> dict[str, Module]:
        """The recipe's modules; one without a name if it has none."""
        return self.modules or {"": Module(slices=self.slices) if self.slices else Module(models=self.models)}

    @property
    def merged(self) -> list[Ref]:
        """Every model that is merged, once, in order."""
        slices = [piece for part in self.parts.values() for piece in part.outline]
        return list(dict.fromkeys(entry.model for piece in slices for entry in piece.sources))

    @property
    def statistics(self) -> dict[Ref, tuple[Ref, ...]]:
        """What was measured of each model, for those that have it."""
        slices = [piece for part in self.parts.values() for piece in part.outline]
        return {entry.model: entry.statistics for piece in slices for entry in piece.sources if entry.statistics}

    @property
    def measured(self) -> list[Ref]:
        """Every file of statistics that the recipe or one of its stages names."""
        each = [files for recipe in (self, *self.stages) for files in recipe.statistics.values()]
        return list(dict.fromkeys(file for files in each for file in files))

    @property
    def donor(self) -> Ref:
        """The model that gives config, tokenizer and the set of tensors: the base, or else the first."""
        return self.base_model or self.merged[0]

    @property
    def references(self) -> list[Ref]:
        """Every model of the recipe once: those merged, in order, then bases that are not among them."""
        slices = [piece for part in self.parts.values() for piece in part.outline]
        bases = [self.base_model, *(piece.base_model for piece in slices)]
        return list(dict.fromkeys([*self.merged, *(base for base in bases if base is not None)]))

    @property
    def vocabulary(self) -> TokenizerOptions | None:
        """What is said of the tokenizer, in either way."""
        short = self.tokenizer_source
        return TokenizerOptions(source=short) if self.tokenizer is None and short is not None else self.tokenizer

    def renamed(self, names: Mapping[Ref, ModelRef]) -> Recipe:
        """Return the recipe with other names for some of its models, in its stages too."""
        return _renamed(self, names)

    def rule_for(self, name: str) -> Rule | None:
        """Return the first rule that matches a tensor."""
        return next((rule for rule in self.rules if rule.matches(name)), None)


def _repo() -> Any:
    """Return the module that writes recipe repos; it stands above this one, which only opens the door to it."""
    return importlib.import_module("hf_merge.recipe_repo")


def _renamed(value: Any, names: Mapping[Ref, ModelRef]) -> Any:
    """Put other models in the place of some, wherever they stand."""
    if isinstance(value, (ModelRef, InMemory)):
        return names.get(value, value)
    if isinstance(value, tuple):
        return tuple(_renamed(part, names) for part in value)
    if isinstance(value, TokenizerOptions):
        return value.renamed(names)
    if isinstance(value, BaseModel):
        changed = {key: _renamed(getattr(value, key), names) for key in value.model_fields_set}
        return value.model_copy(update=changed)
    if isinstance(value, dict) and any(isinstance(part, BaseModel) for part in value.values()):
        return {key: _renamed(part, names) for key, part in value.items()}
    return value


def _read(source: Any) -> list[Document]:
    if isinstance(source, Recipe):
        return [({name: getattr(source, name) for name in source.model_fields_set}, {})]
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source))
    if isinstance(source, Mapping) and ("merge_method" in source or isinstance(source.get("models"), list)):
        return [(dict(source), {})]
    if isinstance(source, Mapping):
        source = [in_memory(model, label) for label, model in source.items()]
    if not isinstance(source, Iterable):
        raise RecipeError(f"A recipe is a file, a mapping or a list of models; found {type(source).__name__}.")
    return [({"models": [in_memory(model, f"model {i}") for i, model in enumerate(source)]}, {})]


def in_memory(model: Any, label: str) -> Any:
    """Label a model that was handed over as an object; leave references and entries alone."""
    refers = isinstance(model, (str, os.PathLike, ModelRef, InMemory, ModelEntry))
    if isinstance(model, Mapping):
        named = model.get("model", model.get("path"))
        refers = isinstance(named, (str, os.PathLike, ModelRef, InMemory)) or (
            isinstance(named, Mapping) and (isinstance(named.get("path"), str) or set(named) == {"model", "lora"})
        )
    if refers or model is None:
        return os.fspath(model) if isinstance(model, os.PathLike) else model
    return InMemory(model, label)


def _read_file(path: Path) -> list[Document]:
    if path.is_dir():
        raise RecipeError(f"'{path}' is a folder, not a recipe: to merge models, pass them as a list with method=.")
    try:
        with path.open(encoding="utf-8") as file:
            return load_documents(file.read(MAX_BYTES + 1), name=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read the recipe '{path}': {getattr(error, 'strerror', None) or error}.") from None


def _build(documents: list[Document], changes: Mapping[str, Any]) -> Recipe:
    """Make the recipe of one document, or of the last in the line of stages that several documents are."""
    words = {KEYWORDS.get(key, key): value for key, value in changes.items() if value is not None}
    last = documents[0] if len(documents) == 1 else _last(documents)
    recipe = _change(*last, words)
    stages = [_change(*document, {}) for document in documents if document is not last] or recipe.stages
    if "seed" in words:
        stages = [stage.model_copy(update={"seed": recipe.seed}) for stage in stages]
    return recipe.model_copy(update={"stages": in_order(recipe, stages)}) if stages else recipe


def _last(documents: list[Document]) -> Document:
    """Find the document whose result is the output: the one without a name, or that no other names as a model."""
    unnamed = [document for document in documents if not document[0].get("name")]
    if not unnamed:
        text = [json.dumps({**data, "name": None}, default=str) for data, _ in documents]
        unnamed = [
            document for document in documents if not any(json.dumps(document[0]["name"]) in other for other in text)
        ]
    if len(unnamed) != 1:
        raise RecipeError(
            f"Of {len(documents)} documents {len(unnamed)} give the output: give every other one a `name:`, "
            "by which the others may refer to it."
        )
    return unnamed[0]


def in_order(recipe: Recipe, stages: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Sort stages so that each comes after those it names.

    Raises:
        RecipeError: two have one name, one is not used, or they need each other.
    """
    named = {stage.name: stage for stage in stages}
    if len(named) < len(stages):
        raise RecipeError("Two documents have the same `name:`.")
    needs = {name: {str(m) for m in stage.references} & named.keys() for name, stage in named.items()}
    try:
        order = [*TopologicalSorter(needs).static_order()]
    except CycleError as error:
        raise RecipeError(f"Documents need each other in a circle: {' -> '.join(map(str, error.args[1]))}.") from None
    used = {str(model) for each in (recipe, *stages) for model in each.references}
    if unused := [name for name in order if name not in used]:
        raise RecipeError(f"No document merges '{unused[0]}': name it as a model, or take it out.")
    return tuple(named[name] for name in order)


def _change(data: dict[str, Any], lines: Lines, words: Mapping[str, Any]) -> Recipe:
    """Apply keyword arguments to a recipe's data, fields first, then parameters of the method; check it all."""
    words = {key: in_memory(value, "base model") if key == "base_model" else value for key, value in words.items()}
    data = {**data, **{key: value for key, value in words.items() if key in Recipe.model_fields}}
    if data.keys() == {"models"}:
        raise RecipeError("Which method? Pass method=, for example method='linear'; list_methods() names them all.")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, lines) for e in error.errors())) from None
    check(recipe, lines)
    given = {key: value for key, value in words.items() if key not in Recipe.model_fields}
    if STATISTICS in given:
        recipe = _with_statistics(recipe, given.pop(STATISTICS))
    if not given:
        return recipe
    changed = _with_parameters(recipe, given)
    check(changed, {})
    return changed


def _with_statistics(recipe: Recipe, given: Any) -> Recipe:
    """Say for every model what was measured of it."""
    listed = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(listed) != len(recipe.models):
        raise RecipeError(f"'{STATISTICS}' has {len(listed)} entries for {len(recipe.models)} models: one for each.")
    several = [each if isinstance(each, (list, tuple)) else () if each is None else (each,) for each in listed]
    named = [[in_memory(one, f"statistics {i}") for one in each] for i, each in enumerate(several)]
    try:
        entries = tuple(
            ModelEntry(**{**{name: getattr(entry, name) for name in entry.model_fields_set}, STATISTICS: own})
            for entry, own in zip(recipe.models, named, strict=True)
        )
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, {}) for e in error.errors())) from None
    return recipe.model_copy(update={"models": entries})


def _with_parameters(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Say parameters instead of whatever was said of them before."""
    method = get_method(recipe.merge_method)
    recipe = _without(recipe, set(given))
    entries = [dict(entry.parameters) for entry in recipe.models]
    shared = dict(recipe.parameters)
    for name, value in given.items():
        _set_parameter(method, name, value, entries, shared)
    models = [e.model_copy(update={"parameters": own}) for e, own in zip(recipe.models, entries, strict=True)]
    return recipe.model_copy(update={"models": tuple(models), "parameters": shared})


def _without(part: Any, names: set[str]) -> Any:
    """Take parameters out wherever they are said, but for rules: these are about some tensors only."""
    if isinstance(part, tuple):
        return tuple(_without(one, names) for one in part)
    if not isinstance(part, Part) or isinstance(part, Rule):
        return part
    changed: dict[str, Any] = {key: _without(getattr(part, key), names) for key in part.model_fields_set}
    if modules := changed.get("modules"):
        changed["modules"] = {name: _without(module, names) for name, module in modules.items()}
    if own := changed.get("parameters"):
        changed["parameters"] = {name: value for name, value in own.items() if name not in names}
    return part.model_copy(update=changed)


def _set_parameter(
    method: MergeMethod, name: str, value: Any, entries: list[dict[str, Any]], shared: dict[str, Any]
) -> None:
    """Say a parameter for all models, or with a list for each of them."""
    parameter = method.parameter(name)
    plain_list = isinstance(value, (list, tuple)) and not any(is_filter(part) for part in value)
    if not (plain_list and parameter is not None and parameter.per_model):
        shared[name] = value
        return
    if not entries:
        raise ParameterError(f"'{name}' has a list of values; in a recipe of slices or modules, write them there.")
    if len(value) != len(entries):
        raise ParameterError(
            f"'{name}' has {len(value)} values for {len(entries)} models; give one value for each model "
            "(a gradient over layers is written in a recipe)."
        )
    for entry, own in zip(entries, value, strict=True):
        entry[name] = own


def _explain(error: Any, lines: Lines) -> str:
    """Put one of pydantic's findings into words, with its line."""
    inner = ("function-", "ModelRef", "InMemory")
    place = tuple(part for part in error["loc"] if not (isinstance(part, str) and part.startswith(inner)))
    key = place[-1] if place else "the recipe"
    if error["type"] == "extra_forbidden":
        owner = next((_OWNERS[part] for part in reversed(place[:-1]) if part in _OWNERS), Recipe)
        known = keys_at(place) or owner.model_fields
        return f"{line_of(place, lines)}Unknown key '{key}'.{did_you_mean(str(key), known)}"
    if error["type"] == "missing":
        return f"{line_of(place, lines)}The recipe lacks '{key}'."
    found = "" if place == () or isinstance(error["input"], (Mapping, list)) else f"; found {shown(error['input'])}"
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    what = f"'{'.'.join(map(str, place))}'" if place else "The recipe"
    return f"{line_of(place, lines)}{what} {said}{found}."


_OWNERS: dict[Any, type[Part]] = {
    "models": ModelEntry,
    "sources": ModelEntry,
    "slices": Slice,
    "modules": Module,
    "rules": Rule,
    "lines": LayerScaling,
}


def _plain(value: Any) -> Any:
    """Turn tuples into lists, so that YAML can be written safely."""
    return json.loads(json.dumps(value, default=str))
