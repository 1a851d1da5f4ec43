"""Plan -> PreTrainedModel: transformers' own loader takes tensors that are merged where it wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from huggingface_hub.utils import logging

from hf_merge import _compat
from hf_merge.errors import MergeError, OutputError, ParameterError, RecipeError, did_you_mean
from hf_merge.execute import compiled
from hf_merge.fetch import check_assumed, check_downloads, fetching, remote_reads
from hf_merge.lazy import MergedSlice, Mergers
from hf_merge.method import get_method, list_methods
from hf_merge.planning import Plan
from hf_merge.recipe import KEYWORDS, STATISTICS, Recipe
from hf_merge.sources import Source

logger = logging.get_logger(__name__)

_SMALL = (".json", ".py", ".jinja")
"""Ends of the names of files that say what a model is; its tokenizer is not loaded with it."""


def recipe_words() -> set[str]:
    """Name every keyword that changes a recipe: its fields, and the parameters of all methods."""
    methods = [get_method(name) for name in list_methods()]
    return {
        *KEYWORDS,
        STATISTICS,
        *Recipe.model_fields,
        *(name for m in methods for name in (*m.parameters, *m.ignored)),
    }


def load(plan: Plan, sources: Sequence[Source], *, name: str, auto_class: Any = None, **options: Any) -> Any:
    """Merge a plan into a model, each tensor on the device that will hold it.

    Args:
        plan: what is merged.
        sources: the plan's models, in its order.
        name: the model's `name_or_path`.
        auto_class: the Auto class that chooses the model's class, if it is not the one that config.json names.
        **options: of `from_pretrained`, and attributes of the config.

    Returns:
        The model, or with `output_loading_info=True` the model and what `from_pretrained` says of it.

    Raises:
        MergeError: there is no class for it, or the merge lacks a tensor of the class.
    """
    with TemporaryDirectory() as folder:
        model_class, config, words = _described(plan, sources, Path(folder), auto_class, options)
    named = _of_the_model(plan, sources[plan.donor])
    model, info = _loaded(model_class, plan, sources, named, {**words, "config": config})
    _check(info, plan, model, strict=auto_class is None or type(model).__name__ in plan.config.get("architectures", ()))
    model.name_or_path = model.config.name_or_path = name
    return (model, info) if options.get("output_loading_info") else model


def _described(
    plan: Plan, sources: Sequence[Source], folder: Path, auto_class: Any, options: Mapping[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Find a model's class and config, and how it generates; what remains of the options is the loader's."""
    donor, trusted = sources[plan.donor], options.get("trust_remote_code")
    if not plan.config:
        raise MergeError(
            f"'{donor.label}' has no config.json, so that no class is known for it: merge its tensors by "
            "merge_state_dicts, or into a folder by merge."
        )
    donor.write_companions(folder, lambda name: name.endswith(_SMALL))
    (folder / "config.json").write_text(json.dumps(plan.config), encoding="utf-8")
    model_class = auto_class or _compat.class_to_load(plan.config, folder, trust_remote_code=trusted)
    if model_class is None:
        told = "its config.json names code of its own: read it, and pass trust_remote_code=True"
        told = told if plan.config.get("auto_map") else "transformers has no such class: merge it into a folder"
        raise MergeError(f"'{donor.label}' is a {plan.config['architectures'][0]}; {told}.")
    words = {key: value for key, value in options.items() if key in _compat.LOADING_WORDS}
    changes = {key: value for key, value in options.items() if key not in words}
    config, unknown = _compat.config_to_load(model_class, folder, changes, trust_remote_code=trusted)
    _refuse_unknown(unknown, config)
    words.setdefault("generation_config", _compat.generation_config(folder))
    if not hasattr(model_class, "config_class"):
        auto_class, (model_class, config) = model_class, _compat.class_of_auto(model_class, config)
        if model_class is None:
            named = "".join(f", and names {one}" for one in plan.config.get("architectures") or ())
            raise RecipeError(
                f"{auto_class.__name__} has no class for {type(config).__name__}, which the merge has{named}."
            )
    return model_class, config, words


def _refuse_unknown(words: set[str], config: Any) -> None:
    """Raise if a keyword is nobody's."""
    if words:
        word = min(words)
        known = [*recipe_words(), *_compat.LOADING_WORDS, *config.to_dict()]
        raise ParameterError(
            f"'{word}' is no field of a recipe, no parameter of a method, no keyword of from_pretrained and no "
            f"attribute of {type(config).__name__}.{did_you_mean(word, known)} What concerns a model's files, such as "
            "its revision, is said of the model: org/name@revision."
        )


def _of_the_model(plan: Plan, donor: Source) -> list[str]:
    """Name the tensors of the model proper, in the order in which they will be asked for."""
    beside = [step.name for step in plan.steps if step.name.startswith(tuple(f"{f}/" for f in donor.folders))]
    if beside:
        folders = ", ".join(sorted({name.rpartition("/")[0] for name in beside}))
        logger.warning(
            "The modules %s of '%s' are left out, as a transformers model has none: merge into a folder to keep them.",
            folders, donor.label,
        )  # fmt: skip
    return _compat.loading_order(plan.specs.keys() - set(beside))


def _loaded(
    model_class: Any, plan: Plan, sources: Sequence[Source], names: list[str], words: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Let transformers load the tensors while they are merged."""
    steps = {step.name: step for step in plan.steps}
    wanted = replace(plan, steps=tuple(steps[name] for name in names))
    reads, stop = remote_reads(wanted, sources), Event()
    check_downloads(reads)
    with compiled(wanted), fetching(reads, stop), Mergers(wanted, sources, stop) as mergers:
        found = _from_pretrained(model_class, mergers.slices(names), words)
        check_assumed(sources)
    return found


def _from_pretrained(model_class: Any, slices: Mapping[str, MergedSlice], words: dict[str, Any]) -> Any:
    """Hand slices to the loader, or whole tensors if it cannot use slices."""
    words = {**words, "output_loading_info": True, "dtype": "auto"}  # the config says the dtype that is written
    try:
        return model_class.from_pretrained(None, state_dict=dict(slices), **words)
    except (TypeError, AttributeError) as error:
        if MergedSlice.__name__ not in str(error):
            raise
        logger.warning(
            "transformers' loader cannot use tensors that are merged when they are read (%s): all are merged first, "
            "which takes the memory of the model once more.", error,
        )  # fmt: skip
    except ValueError as error:
        if "offload_folder" in str(error) and not words.get("offload_folder"):
            raise OutputError(
                "Parts of the model are to be on disk: say in which folder by offload_folder=."
            ) from error
        raise
    whole = {name: one.to("cpu") for name, one in slices.items()}
    return model_class.from_pretrained(None, state_dict=whole, **words)


def _check(info: Mapping[str, Any], plan: Plan, model: Any, *, strict: bool) -> None:
    """Say what does not fit the model's class; transformers would fill what is missing with random numbers."""
    if not strict:
        return
    wrong = {"lacks": info["missing_keys"], "has in another shape": [key[0] for key in info["mismatched_keys"]]}
    for what, keys in wrong.items():
        if keys:
            raise MergeError(
                f"The merge {what} {len(keys)} tensors of {type(model).__name__}, such as '{min(keys)}': "
                f"choose another base_model than '{plan.models[plan.donor]}', or merge into a folder and look there."
            )
