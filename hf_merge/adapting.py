"""A merge as an adapter: plan -> execute -> AdapterWriter -> card; of models over their base, or of adapters alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import logging

from hf_merge.adapters.card import adapter_card, energies
from hf_merge.adapters.merging import AdapterMerge
from hf_merge.adapters.modules import auto_mapping, task_type
from hf_merge.adapters.planned import base_of, slots_of
from hf_merge.adapters.spelled import file_name, spell
from hf_merge.adapters.writer import AdapterWriter, Kept
from hf_merge.card import pinned_recipe, public_recipe
from hf_merge.errors import OutputError
from hf_merge.fetch import check_downloads, remote_reads
from hf_merge.goal import Goal, hidden
from hf_merge.placement import check_devices
from hf_merge.planning import Plan
from hf_merge.ranks import Team, current
from hf_merge.results import MergedAdapter
from hf_merge.running import run
from hf_merge.sources import Source
from hf_merge.sources.core import AdapterSource
from hf_merge.types import ModelRef
from hf_merge.writer import RECIPE_FILE, RECIPE_KEY, WEIGHTS, appear, refuse_existing

logger = logging.get_logger(__name__)


def merge_adapter(
    goal: Goal,
    prepared: Callable[[], AdapterMerge],
    *,
    resume: bool,
    overwrite: bool,
    card_template: str | Path | None,
) -> MergedAdapter:
    """Merge into an adapter; see `api.merge`.

    Args:
        goal: where it goes.
        prepared: plans the merge, once it is clear that it may go there.
        resume, overwrite, card_template: as of `merge`.
    """
    if (team := current()).world > 1:
        raise OutputError(f"An adapter is written by one process, and {team.world} were started: start one.")
    if resume:
        raise OutputError("An adapter is small and is written at once: leave resume out, and it is made anew.")
    target = goal.workplace()
    refuse_existing(target, overwrite=overwrite)
    destination = goal.ask()
    made = prepared()
    made.plan.check()
    check_devices(step.device for step in made.plan.steps)
    check_downloads(remote_reads(made.plan, made.sources))
    goal.refuse_own_input(made.sources)
    if goal.is_file and not made.spelling:
        raise OutputError(f"'{target.name}' is a single file, and a PEFT adapter is a folder: name a folder.")
    name = goal.target.name if destination is None else destination.repo_id
    card = _adapter_card(made, name, card_template, [], {})
    if destination is not None:
        destination.check_card(str(card))
    try:
        kept = _write_adapter(made, target, name, overwrite=overwrite, card_template=card_template)
        published = goal.deliver(target, destination)
    finally:
        if goal.is_away:
            shutil.rmtree(target, ignore_errors=True)
    left = {one.part.module: one.finished.left_out for one in kept if one.finished.left_out}
    return MergedAdapter(
        None if goal.is_away else target, made.plan, *published,
        base=made.base_model, base_revision=made.revision, kept=energies(kept), left_out=left,
    )  # fmt: skip


def over_base(made: Plan, sources: list[Source]) -> AdapterMerge:
    """Make an adapter of a merge of models and their base.

    Args:
        made: the merge, planned as an adapter.
        sources: its models, in its order.

    Raises:
        PlanError: it cannot be merged so.
    """
    made.check()
    base, revision = _name_of_base(made, sources)
    task = task_type(made.config)
    extra = {} if task else {"auto_mapping": auto_mapping(made.config)}
    return AdapterMerge(made, sources, slots_of(made, sources), base, revision, task, extra_config=extra)


def _write_adapter(
    made: AdapterMerge, target: Path, name: str, *, overwrite: bool, card_template: str | Path | None
) -> Sequence[Kept]:
    """Execute a plan into the folder of an adapter, or into a LoRA file in the style of the first."""
    if not made.spelling:
        return _write_peft(made, target, name, overwrite=overwrite, card_template=card_template)
    work = hidden(target)
    try:
        kept = _write_peft(made, work, name, overwrite=False, card_template=card_template)
        file = spell(work, made.spelling, file_name(made.spelling, target))
        if target.suffix == WEIGHTS:
            file.replace(target)
        else:
            appear(work, target, overwrite=overwrite)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return kept


def _write_peft(
    made: AdapterMerge, target: Path, name: str, *, overwrite: bool, card_template: str | Path | None
) -> Sequence[Kept]:
    """Execute a plan into the folder of a PEFT adapter."""
    plan, by_model = made.plan, dict(zip(made.plan.models, made.sources, strict=True))
    writer = AdapterWriter(
        target, plan, made.slots, base_model=made.base_model, revision=made.revision, task_type=made.task_type,
        dtype=made.dtype, metadata={RECIPE_KEY: public_recipe(plan.recipe, by_model).to_yaml()}, overwrite=overwrite,
        extra_config=made.extra_config, vllm=plan.recipe.vllm,
    )  # fmt: skip
    with writer:
        run(plan, made.sources, writer, Team())
        kept = writer.assemble()
        if isinstance(made.sources[0], AdapterSource):
            made.sources[0].write_companions(writer.folder)
        (writer.folder / RECIPE_FILE).write_text(pinned_recipe(plan.recipe, by_model).to_yaml(), encoding="utf-8")
        _adapter_card(made, name, card_template, kept, writer.config).save(writer.folder / "README.md")
    _tell_what_is_left_out(kept)
    return kept


def _adapter_card(
    made: AdapterMerge, name: str, template: str | Path | None, kept: Sequence[Kept], config: Mapping[str, Any]
) -> ModelCard:
    """Render the card; once before anything is computed, as a template that fails should not fail at the end."""
    words: dict[str, Any] = {} if made.notes is None else {"notes": made.notes}
    if made.spelling:
        words["data"] = {"library_name": "diffusers", "tags": ["lora", "diffusers", "merge", "hf_merge"]}
        words["how_to_load"] = f'pipe.load_lora_weights("{name}")  # a diffusers pipeline of the base model'
    try:
        return adapter_card(made.plan, made.sources, name, kept=kept, config=config, template=template, **words)
    except Exception as error:  # a template may do anything
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OutputError(f"The card cannot be written from '{template or 'adapter.md'}': {told}.") from error


def _tell_what_is_left_out(kept: Sequence[Kept]) -> None:
    left = [one for one in kept if one.finished.left_out]
    if left:
        most = max(left, key=lambda one: one.finished.left_out)
        logger.warning(
            "%d tensors change in the merge and not in the adapter, '%s' most (by up to %.3g): its card names them.",
            len(left), most.part.module, most.finished.left_out,
        )  # fmt: skip


def _name_of_base(made: Plan, sources: Sequence[Source]) -> tuple[str | None, str | None]:
    """Return how PEFT finds the base again, and its commit."""
    base, named = base_of(made, sources), made.models[made.donor]
    if base.public_id:
        return base.public_id, base.revision
    return (os.path.abspath(os.path.expanduser(named.path)) if isinstance(named, ModelRef) else None), None
