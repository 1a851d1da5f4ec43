"""The story in a few lines: Recipe -> Sources -> Plan -> execute -> Writer -> Card."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_merge.adapters.merging import AdapterMerge, adapters_of, join
from hf_merge.adapters.planned import planned
from hf_merge.adapting import merge_adapter, over_base
from hf_merge.card import merged_card, pinned_recipe, public_recipe
from hf_merge.errors import OutputError, ParameterError, RecipeError
from hf_merge.execute import execute
from hf_merge.experts.files import with_problems
from hf_merge.experts.merged import from_tensors
from hf_merge.experts.tasks import has_experts, head_problems, own_steps, tasks_of, without
from hf_merge.fetch import check_assumed, check_downloads, fetching, remote_reads
from hf_merge.goal import Goal, push
from hf_merge.lazy import LazyMerge
from hf_merge.lineage import licence_problems, parts_of
from hf_merge.loading import load, recipe_words
from hf_merge.placement import DeviceMap, MaxMemory, check_devices, place
from hf_merge.planner import make_plan
from hf_merge.planning import MAX_SHARD_SIZE, Plan, Problem
from hf_merge.progress import OnProgress, reported
from hf_merge.ranks import current, together
from hf_merge.recipe import ADAPTER_FIELDS, Recipe
from hf_merge.results import MergedAdapter, MergedModel
from hf_merge.running import run
from hf_merge.sources import Located, Source, open_sources, with_bases
from hf_merge.sources.layout import align_layouts
from hf_merge.sources.lora import Lora
from hf_merge.sources.renamed import remapped
from hf_merge.sources.statistics import MeasuredModel, open_statistics
from hf_merge.specialising import merge_experts
from hf_merge.survey import surveyed
from hf_merge.types import ModelRef, Ref
from hf_merge.uploads import Uploads
from hf_merge.vocabulary import align_vocabularies
from hf_merge.writer import RECIPE_FILE, RECIPE_KEY, Writer, partial_folder, refuse_existing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(
    recipe: Any,
    *,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    **changes: Any,
) -> Plan:
    """Say what a merge would do; of weights, only headers are read, on the Hub too.

    Args:
        recipe: a YAML file, a mapping, a Recipe, or a list of models (Hub ids, folders, modules, state dicts).
        device_map, max_memory: as in `merge`; with `max_memory`, of devices that need not be here.
        max_shard_size: of the output's files, in bytes or as `"5GB"`.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
        stream: as in `merge`.
        **changes: fields of the recipe (`method=`, `base_model=`, `dtype=`, ...) or parameters of the method.

    Returns:
        The plan. Its `problems` are reported, not raised; `plan.check()` raises.

    Raises:
        RecipeError: the recipe cannot be meant.
        SourceError: a model cannot be read.
    """
    read = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "stream": stream}
    return surveyed(*open_plan(Recipe.load(recipe, **changes), read, (device_map, max_memory), max_shard_size))


def open_plan(
    recipe: Recipe,
    hub: Mapping[str, Any],
    where: tuple[DeviceMap, MaxMemory | None] = ("auto", None),
    max_shard_size: int | str = MAX_SHARD_SIZE,
    *,
    found: dict[ModelRef, Located] | None = None,
    opened: Mapping[Ref, Source] | None = None,
) -> tuple[Plan, list[Source]]:
    """Plan a merge of models, or of adapters alone; return the plan and its models, in its order.

    Args:
        recipe: what is merged.
        hub: token, cache_dir, local_files_only, stream.
        where, max_shard_size: as in `plan`: device_map and max_memory.
        found: folders that were looked for before; those that are looked for are added.
        opened: models that were opened before.
    """
    found = {} if found is None else found
    if adapters := adapters_of(recipe, found, **hub):
        joined = join(recipe, adapters, **hub)
        return place(joined.plan, *where), joined.sources
    _refuse_words_of_adapters(recipe)
    made, sources = _prepare(recipe, {}, where, max_shard_size, hub, found, opened)
    return made if made.tasks is None else with_problems(made), sources


@together
@reported
def merge(
    recipe: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    push_to_hub: str | None = None,
    keep_local: bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    exist_ok: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    card_template: str | Path | None = None,
    on_progress: OnProgress | None = None,
    **changes: Any,
) -> MergedModel:
    """Merge models into a folder that `from_pretrained` loads, or straight into the Hub.

        hf_merge.merge("recipe.yaml", "merged")
        hf_merge.merge(["org/a", "org/b"], "merged", method="ties", base_model="org/base", density=[0.5, 0.3])
        hf_merge.merge("recipe.yaml", push_to_hub="me/merged")
        hf_merge.merge("recipe.yaml", "adapter", output_format="adapter", rank=32)

    With `output_format="adapter"` what the merge changes in its base is written as a PEFT adapter; see docs/recipes.md.

    Without `output`, files of weights are uploaded and deleted while the next are merged: at most two lie on the disk,
    in a hidden folder of the current one.

    Under torchrun, accelerate launch or srun all processes call this, with the same models and an `output` that all of
    them see. Each merges a part, the first one publishes, and all return the same; what fails on one fails on all.

    Args:
        recipe: a YAML file, a mapping, a Recipe, or a list of models (Hub ids, folders, modules, state dicts).
        output: the folder to make, or a file `NAME.safetensors`. It appears when it is whole.
        push_to_hub: the repository to publish the model in, as one commit; see `hf_merge.push_to_hub`. It is checked
            before anything is merged.
        keep_local: leave the model at `output` too. Default: if there is an `output`.
        private, create_pr, commit_message, exist_ok: of the push.
        overwrite: replace the model that is there, once the new one is whole.
        resume: take over the finished shards of an interrupted run of the same merge.
        device_map: where tensors are computed, in accelerate's words: `auto`, `balanced`, `balanced_low_0`,
            `sequential`, a device, or prefixes of names of modules or tensors with devices; see docs/devices.md.
        max_memory: what may be used of each device: `{0: "10GB", "cpu": "30GB"}`.
        max_shard_size: of the output's files, in bytes or as `"5GB"`.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
        stream: read tensors of models on the Hub by range, and keep no weights in the cache; without it the files
            that hold what the recipe needs come into the cache while the merge already runs.
        card_template: a Jinja template for the model card instead of the built-in one.
        on_progress: is given a `Progress` for every piece that is written, and a few times a second while the merge
            waits; from any thread, but from one at a time. What it raises (`Cancelled`, say) ends the merge: nothing
            is left of it but what `resume=True` keeps. Of several processes the first one calls it, for all.
        **changes: fields of the recipe (`method=`, `base_model=`, `dtype=`, `seed=`, ...) or parameters of the
            method; a list for a per-model parameter has one value for each model.

    Returns:
        Where it is and how it was made; for an adapter a `MergedAdapter`, with task experts (methods such as `emr`) a
        `MergedModelWithExperts`.

    Raises:
        RecipeError, SourceError, PlanError: before anything is written.
        ComputeError, OutputError: nothing appears at `output`.
        PublishError: before anything is merged, or when the Hub fails; its repository is as it was.
        What `on_progress` raises: as it is.
    """
    team = current()
    read = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "stream": stream}
    where = (device_map, max_memory)
    wishes = {"private": private, "create_pr": create_pr, "commit_message": commit_message, "exist_ok": exist_ok}
    goal = Goal.of(output, push_to_hub, keep_local, token, **wishes)
    loaded = Recipe.load(recipe, **changes)
    found: dict[ModelRef, Located] = {}
    with team.node_first() if _is_far(loaded) else nullcontext():
        adapters = adapters_of(loaded, found, **read)
    if adapters or loaded.output_format == "adapter":
        return merge_adapter(
            goal, lambda: _adapter(loaded, adapters, where, read), resume=resume, overwrite=overwrite,
            card_template=card_template,
        )  # fmt: skip
    _refuse_words_of_adapters(loaded)
    target, away = goal.target, goal.is_away
    if away and team.world > 1:
        raise OutputError(
            f"{team.world} processes merge into a folder that all of them see: name an output too, and push from there."
        )
    if not away and team.leads:
        refuse_existing(target, overwrite=overwrite)
    destination = goal.ask(partial_folder(target) if away and resume else None) if team.leads else None
    with team.node_first() if _is_far(loaded) else nullcontext():
        made, sources = _prepare(loaded, {}, where, sys.maxsize if goal.is_file else max_shard_size, read, found)
    if made.tasks is not None:
        return merge_experts(
            goal, destination, made, sources, overwrite=overwrite, resume=resume, card_template=card_template
        )  # fmt: skip
    made.check()
    check_devices(step.device for step in made.steps)
    check_downloads(remote_reads(made, sources))
    goal.refuse_own_input(sources)
    name = goal.target.name if destination is None else destination.repo_id
    card = _try_card(made, sources, name, card_template) if team.leads else ""
    shown = public_recipe(made.recipe, dict(zip(made.models, sources, strict=True))).to_yaml()
    fingerprint = _fingerprint(made, sources, resume=resume)
    team.agree("plan", f"{fingerprint} {shown}", "would merge something else than rank 0: give all processes the same "
               "recipe, options and files of models (sizes and times are compared).")  # fmt: skip
    if destination is not None:
        destination.check_card(card)
        destination = destination.prepare()
    uploads = Uploads(destination, recipe=shown) if destination is not None and away else None
    writer = Writer(
        target, made, fingerprint=fingerprint, overwrite=overwrite, resume=resume, metadata={RECIPE_KEY: shown},
        carrier=uploads, team=team,
    )  # fmt: skip
    with writer:
        if not goal.is_file and team.leads:
            sources[made.donor].write_companions(writer.folder)
        run(team.with_own_device(made) if device_map == "auto" else made, sources, writer, team)
        if not goal.is_file and team.leads:
            _describe(made, sources, writer.folder, name=name, card_template=card_template)
    published: list[str | None] = []
    if destination is not None:
        info = push(target, destination) if uploads is None else uploads.info
        published = [destination.repo_id, info.oid, info.pr_url or info.commit_url]
    return MergedModel(None if away else target, made, *team.share("published", published))


def _adapter(
    recipe: Recipe, adapters: Mapping[Ref, Lora], where: tuple[DeviceMap, MaxMemory | None], read: Mapping[str, Any]
) -> AdapterMerge:
    """Plan a merge into an adapter: of adapters alone, or of models over their base."""
    if not adapters:
        return over_base(*_prepare(recipe, {}, where, MAX_SHARD_SIZE, read))
    made = join(recipe, adapters, **read)
    return replace(made, plan=place(made.plan, *where))


def _refuse_words_of_adapters(recipe: Recipe) -> None:
    """Raise if a recipe for a model says what can only be said of an adapter."""
    said = [name for name in ADAPTER_FIELDS if getattr(recipe, name) != Recipe.model_fields[name].default]
    if said and recipe.output_format != "adapter":
        raise RecipeError(
            f"The recipe says '{said[0]}', which is of an adapter, and its models are none: "
            "write output_format: adapter too, or leave it out."
        )


def extract_adapter(
    finetuned: Any,
    base: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] | None = None,
    exact: bool = False,
    keep_rest: bool | None = None,
    vllm: bool = False,
    **options: Any,
) -> MergedAdapter:
    """Extract a LoRA adapter from a fine-tuned model: the change of its base, in factors of low rank.

        hf_merge.extract_adapter("org/finetuned", "org/base", "adapter", rank=32)
        hf_merge.extract_adapter("org/finetuned", "org/base", "adapter", energy=0.9, targets=["q_proj", "v_proj"])

    Args:
        finetuned: the model (a Hub id, folder, module or state dict).
        base: the model that it was fine-tuned from.
        output: the folder to make.
        rank: at most so many dimensions for each module; or
        energy: as few as keep this share of the squared norm of each module's change.
        targets: which modules get factors: names, ends of names, patterns, or `all-linear`; all that change by default.
        exact: decompose whole matrices, also where a random sketch of them would do.
        keep_rest: whether changed norms and biases are saved as they are; by default they are, but for vLLM.
        vllm: write it as vLLM loads it, or refuse to.
        **options: of `merge`: push_to_hub, overwrite, device_map, token, dtype, ...

    Raises:
        ParameterError: not exactly one of rank and energy, or out of range.
        RecipeError, SourceError, PlanError: before anything is written.
        ComputeError, OutputError: nothing appears at `output`.
    """
    if (rank is None) == (energy is None):
        found = "neither" if rank is None else "both"
        raise ParameterError(f"Say by rank= or by energy= how large the adapter may be; found {found}.")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise ParameterError(f"energy= should be in (0, 1]; found {energy!r}.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ParameterError(f"rank= should be a positive integer; found {rank!r}.")
    if base is None:
        raise ParameterError("An adapter is extracted over a base: name the model that was fine-tuned.")
    words = {"targets": targets, "exact_svd": exact or None, "keep_rest": keep_rest, "vllm": vllm or None}
    made = merge(
        [finetuned], output, method="passthrough", base_model=base, output_format="adapter",
        rank=rank if energy is None else float(energy), **words, **options,
    )  # fmt: skip
    assert isinstance(made, MergedAdapter)
    return made


def from_pretrained(
    recipe: Any,
    *,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    dtype: Any = None,
    quantization_config: Any = None,
    offload_folder: str | os.PathLike[str] | None = None,
    distributed_config: Any = None,
    attn_implementation: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Merge models into a `PreTrainedModel`, each tensor on the device that will hold it; nothing is written.

        model = hf_merge.from_pretrained("recipe.yaml", device_map="auto")
        model = hf_merge.from_pretrained(["org/a", "org/b"], method="slerp", base_model="org/a", t=0.4)

    It is the model that `merge(...).load()` gives, without the folder.

    Args:
        recipe: a YAML file, a mapping, a Recipe, or a list of models (Hub ids, folders, modules, state dicts).
        device_map, max_memory: where the model goes, as in transformers: `auto`, `balanced`, `sequential`, a device,
            or names of modules with devices, `cpu` and `disk` among them.
        dtype: of the model; tensors are rounded to it once. The recipe's if not given, or else the models' own.
        quantization_config: quantise each tensor as soon as it is merged (torchao, bitsandbytes, ...).
        offload_folder: where modules are written that are mapped to `disk`.
        distributed_config: tensor parallelism under torchrun, as in transformers.
        attn_implementation: as in transformers.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
        stream: as in `merge`.
        **kwargs: fields of the recipe or parameters of the method, as in `merge`; what is neither is a keyword of
            transformers' `from_pretrained` or an attribute of the model's config.

    Returns:
        The model, of the class that the base's config.json names. With `output_loading_info=True` also what
        transformers says of the loading.

    Raises:
        RecipeError, SourceError, PlanError: before anything is read.
        MergeError: there is no class for the model, or tensors do not fit it.
    """
    words = {
        "device_map": device_map, "max_memory": max_memory, "quantization_config": quantization_config,
        "offload_folder": offload_folder, "distributed_config": distributed_config,
        "attn_implementation": attn_implementation,
    }  # fmt: skip
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only, "stream": stream}
    given = {key: value for key, value in words.items() if value is not None}
    return load_recipe(recipe, hub, dtype=dtype, **given, **kwargs)


def load_recipe(recipe: Any, hub: Mapping[str, Any], *, name: str = "", auto_class: Any = None, **kwargs: Any) -> Any:
    """Merge models into a `PreTrainedModel`; see `from_pretrained`.

    Args:
        recipe: what is merged.
        hub: token, cache_dir, local_files_only, stream.
        name: the model's `name_or_path`; that of the recipe if not given.
        auto_class: the Auto class that chooses the model's class, if it is not the one that config.json names.
        **kwargs: all other keywords of `from_pretrained`.
    """
    dtype = next((value for key in ("dtype", "torch_dtype") if (value := kwargs.pop(key, None)) is not None), "auto")
    words = recipe_words()
    changes = {key: kwargs.pop(key) for key in [*kwargs] if key in words}
    if dtype != "auto":
        changes["out_dtype"] = dtype  # which wins over all that a recipe says
    made, sources = open_recipe(recipe, hub, **changes)
    made.check()
    return load(made, sources, name=name or _name_of(recipe, made), auto_class=auto_class, **kwargs)


def open_recipe(recipe: Any, hub: Mapping[str, Any], **changes: Any) -> tuple[Plan, list[Source]]:
    """Plan a recipe from headers; return the plan and its models, in its order.

    Raises:
        RecipeError: it makes an adapter.
    """
    recipe = _without_experts(_of_a_model(Recipe.load(recipe, **changes)))
    return _prepare(recipe, {}, ("cpu", None), MAX_SHARD_SIZE, hub)


def _of_a_model(recipe: Recipe) -> Recipe:
    """Return a recipe that makes a model.

    Raises:
        RecipeError: it makes an adapter.
    """
    if recipe.output_format == "adapter" and not has_experts(recipe):
        raise RecipeError(
            "The recipe makes an adapter (output_format: adapter), which is a folder: write it with merge, and load it "
            "with .load(); or say output_format='model', without rank and the like."
        )
    return recipe


def _name_of(recipe: Any, made: Plan) -> str:
    """Return the path of a recipe, or else words that no one takes for a model's name."""
    if isinstance(recipe, (str, os.PathLike)):
        return os.fspath(recipe)
    return f"{made.recipe.merge_method} of {', '.join(map(str, made.recipe.merged))}"


def merge_state_dicts(
    models: Any, *, method: str, base_model: Mapping[str, Any] | None = None, **parameters: Any
) -> Any:
    """Merge mappings of names to tensors in memory: a CNN, an RNN, a BEiT-3 checkpoint.

    Args:
        models: a list of state dicts, or a mapping of labels to state dicts.
        method: name of the method.
        base_model: the state dict they were fine-tuned from; its names are those of the result.
        **parameters: of the method, and fields of the recipe such as `seed=`, `dtype=`, `missing=`.

    Returns:
        The merged state dict, on the CPU, in the inputs' dtypes if `dtype=` is not given; of a method with task experts
        a `MergedExperts`: `.backbone`, `.experts` and `.reconstruct(i)`, the state dict for model i.

    Raises:
        MergeError: as `merge`.
    """
    changes = {"method": method, "base_model": base_model, **parameters}
    made, sources = _prepare(_of_a_model(Recipe.load(models, **changes)), {}, ("cpu", None), MAX_SHARD_SIZE, {})
    made.check()
    merged = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in made.specs.items()}

    def write(name: str, start: int, values: Tensor) -> None:
        merged[name].view(-1)[start : start + values.numel()] = values.view(-1)

    reads, stop = remote_reads(made, sources), Event()
    check_downloads(reads)
    with fetching(reads, stop):
        execute(made, sources, write, stopped=stop.set)
        check_assumed(sources)
    if made.tasks is None:
        return merged
    by_model = dict(zip(made.models, sources, strict=True))
    return from_tensors(made, merged, tuple(frozenset(by_model[model].specs) for model in made.tasks.models))


def _prepare(
    recipe: Any,
    changes: Mapping[str, Any],
    where: tuple[DeviceMap, MaxMemory | None],
    max_shard_size: int | str,
    hub: Mapping[str, Any],
    found_at: dict[ModelRef, Located] | None = None,
    known: Mapping[Ref, Source] | None = None,
) -> tuple[Plan, list[Source]]:
    """Recipe -> Sources -> Plan; models that are known are not opened again."""
    found_at = {} if found_at is None else found_at
    loaded = _with_bases(Recipe.load(recipe, **changes), found_at, hub)
    named = [model for each in (*loaded.stages, loaded) for model in each.references]
    opened: dict[Ref, Source] = {model: source for model, source in (known or {}).items() if model in named}
    problems: list[Problem] = []
    for stage in loaded.stages:
        _without_experts(_of_a_model(stage))
        sources, found = _open(stage, opened, found_at, hub)
        made = make_plan(stage, sources, problems=found)
        problems += [replace(problem, message=f"In '{stage.name}': {problem.message}") for problem in made.problems]
        opened[ModelRef(path=str(stage.name))] = LazyMerge(made, list(sources.values()), str(stage.name))
    sources, found = _open(loaded, opened, found_at, hub)
    problems += [*found, *licence_problems(parts_of([*sources.values()]))]
    remarks = dict.fromkeys(remark for source in opened.values() for remark in source.remarks)
    problems += [Problem("warning", remark) for remark in remarks]
    if has_experts(loaded):
        return place(_with_experts(loaded, sources, problems, max_shard_size), *where), list(sources.values())
    made = make_plan(loaded, sources, max_shard_size=max_shard_size, problems=problems)
    if loaded.output_format == "adapter":
        made = planned(made, [*sources.values()])
    return place(made, *where), list(sources.values())


def _with_experts(
    recipe: Recipe, sources: Mapping[Ref, Source], problems: Sequence[Problem], max_shard_size: int | str
) -> Plan:
    """Plan a merge with task experts: what all models have is merged, the rest is each task's own."""
    tasks = tasks_of(recipe, sources)
    shown = {m: without(source, tasks.apart) if m in tasks.models else source for m, source in sources.items()}
    found = [*problems, *head_problems(tasks, sources)]
    made = make_plan(recipe, shown, max_shard_size=max_shard_size, problems=found, tasks=tasks)
    return replace(made, steps=(*made.steps, *own_steps(recipe, tasks, sources)))


def _without_experts(recipe: Recipe) -> Recipe:
    """Return a recipe of one model.

    Raises:
        RecipeError: it makes task experts.
    """
    if has_experts(recipe):
        raise RecipeError(
            f"'{recipe.merge_method}' makes a backbone with task experts, a folder and no stage of another merge: "
            "write it with merge, and load it with hf_merge.load_experts."
        )
    return recipe


def _with_bases(recipe: Recipe, found: dict[ModelRef, Located], hub: Mapping[str, Any]) -> Recipe:
    """Name the base of every adapter that a recipe names alone; where models are is added to what is found."""
    stages = {str(stage.name) for stage in recipe.stages}
    models = [m for each in (*recipe.stages, recipe) for m in each.references if str(m) not in stages]
    names = with_bases(models, found, **hub)
    return recipe.renamed(names) if names else recipe


def _open(
    recipe: Recipe, opened: dict[Ref, Source], found_at: Mapping[ModelRef, Located], hub: Mapping[str, Any]
) -> tuple[dict[Ref, Source], tuple[Problem, ...]]:
    """Open the models of a recipe that are not open yet; show all under one layout and with one vocabulary."""
    opened |= open_sources([model for model in recipe.references if model not in opened], found_at, **hub)
    sources = {model: remapped(opened[model], recipe.remap) for model in recipe.references}
    aligned = align_vocabularies(recipe, align_layouts(sources, recipe.donor), **hub)
    measured = {model: open_statistics(files) for model, files in recipe.statistics.items()}
    shown = {m: MeasuredModel(s, measured[m]) if m in measured else s for m, s in aligned.sources.items()}
    return shown, aligned.problems


def _is_far(recipe: Recipe) -> bool:
    """Tell whether a model may have to come from the Hub."""
    models = [model for each in (recipe, *recipe.stages) for model in each.references]
    return any(isinstance(model, ModelRef) and not os.path.exists(model.path) for model in models)


def _try_card(made: Plan, sources: list[Source], name: str, template: str | Path | None) -> str:
    """Render the card once before anything is computed: a template that fails should not fail at the end."""
    try:
        return str(merged_card(made, sources, name, template=template))
    except Exception as error:  # a template may do anything
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OutputError(f"The card cannot be written from '{template or 'merged.md'}': {told}.") from error


def _describe(made: Plan, sources: list[Source], folder: Path, *, name: str, card_template: str | Path | None) -> None:
    """Write what says how the model was made and what it is: recipe and card, and config.json last."""
    by_model = dict(zip(made.models, sources, strict=True))
    (folder / RECIPE_FILE).write_text(pinned_recipe(made.recipe, by_model).to_yaml(), encoding="utf-8")
    files = [path.name for path in folder.iterdir()]
    merged_card(made, sources, name, files=files, template=card_template).save(folder / "README.md")
    if made.config:
        config = json.dumps(made.config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(config + "\n", encoding="utf-8")


def _fingerprint(made: Plan, sources: list[Source], *, resume: bool) -> str:
    """Identify plan and inputs, so that nothing else is resumed."""
    contents = [source.fingerprint() for source in sources]
    if resume and None in contents:
        raise OutputError("A merge of models in memory cannot be resumed: save them to folders first.")
    return hashlib.sha256(json.dumps([made.fingerprint(), contents]).encode()).hexdigest()
