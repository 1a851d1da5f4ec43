"""A merge as a backbone with task experts: plan -> execute -> files of the backbone and of each task -> card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from hf_merge import hub
from hf_merge.card import pinned_recipe, public_recipe
from hf_merge.errors import OutputError
from hf_merge.experts.card import experts_card
from hf_merge.experts.files import CONFIG_FILE, FOLDER, INDEX_FILE, ExpertFiles, ExpertsWriter, index_of
from hf_merge.fetch import check_downloads, remote_reads
from hf_merge.goal import Goal
from hf_merge.placement import check_devices
from hf_merge.planning import SHARED, Plan
from hf_merge.ranks import Team, current
from hf_merge.results import MergedModelWithExperts
from hf_merge.running import run
from hf_merge.sources import Source
from hf_merge.writer import RECIPE_FILE, RECIPE_KEY, Writer


def merge_experts(
    goal: Goal,
    destination: hub.Destination | None,
    made: Plan,
    sources: list[Source],
    *,
    overwrite: bool,
    resume: bool,
    card_template: str | Path | None,
) -> MergedModelWithExperts:
    """Merge into a backbone with task experts; see `api.merge`.

    Args:
        goal: where it goes.
        destination: the repository, if it is pushed; it was asked already.
        made: the plan.
        sources: its models, in its order.
        overwrite, resume, card_template: as of `merge`.
    """
    if (team := current()).world > 1:
        raise OutputError(f"Task experts are written by one process, and {team.world} were started: start one.")
    if resume:
        raise OutputError("A merge with task experts is not resumed: leave resume out, and it is made anew.")
    if goal.is_file:
        raise OutputError(f"'{goal.target.name}' is a single file, and task experts are folders: name a folder.")
    target = goal.workplace()
    made.check()
    files = ExpertFiles(made)
    check_devices(step.device for step in made.steps)
    check_downloads(remote_reads(made, sources))
    goal.refuse_own_input(sources)
    name = goal.target.name if destination is None else destination.repo_id
    card = _card(made, sources, name, files, card_template)
    if destination is not None:
        destination.check_card(str(card))
    try:
        _write(made, sources, files, target, card, overwrite=overwrite)
        published = goal.deliver(target, destination)
    finally:
        if goal.is_away:
            shutil.rmtree(target, ignore_errors=True)
    assert made.tasks is not None
    return MergedModelWithExperts(None if goal.is_away else target, made, *published, tasks=made.tasks.names)


def _write(
    made: Plan, sources: Sequence[Source], files: ExpertFiles, target: Path, card: ModelCard, *, overwrite: bool
) -> None:
    """Execute a plan into the files of backbone and experts."""
    by_model = dict(zip(made.models, sources, strict=True))
    shown = public_recipe(made.recipe, by_model).to_yaml()
    writer = Writer(target, files.filed, fingerprint="", metadata={RECIPE_KEY: shown}, overwrite=overwrite)
    with writer:
        sources[made.donor].write_companions(writer.folder)
        run(made, sources, ExpertsWriter(files, writer), Team())
        for task in (SHARED, *files.tasks):
            _describe_expert(files, task, writer.folder / FOLDER / task, os.path.abspath(target))
        assert made.tasks is not None
        configs = {task: by_model[model].config for task, model in zip(files.tasks, made.tasks.models, strict=True)}
        (writer.folder / INDEX_FILE).write_text(index_of(made, files, configs), encoding="utf-8")
        (writer.folder / RECIPE_FILE).write_text(pinned_recipe(made.recipe, by_model).to_yaml(), encoding="utf-8")
        card.save(writer.folder / "README.md")
        config = json.dumps(made.config, indent=2, ensure_ascii=False)
        (writer.folder / "config.json").write_text(config + "\n", encoding="utf-8")


def _describe_expert(files: ExpertFiles, task: str, folder: Path, base: str) -> None:
    config = files.config_of(task, base)
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def _card(
    made: Plan, sources: Sequence[Source], name: str, files: ExpertFiles, template: str | Path | None
) -> ModelCard:
    """Render the card, before anything is computed: a template that fails should not fail at the end."""
    try:
        return experts_card(made, sources, name, files=files, template=template)
    except Exception as error:  # a template may do anything
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OutputError(f"The card cannot be written from '{template or 'experts.md'}': {told}.") from error
