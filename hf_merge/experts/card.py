"""The card of a backbone with task experts: which tasks, what each takes, how to load and to route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_merge.card import NO_MARKUP, hub_link, merged_card, template_folder, with_section
from hf_merge.experts.files import ExpertFiles
from hf_merge.experts.routers import RouterConfig
from hf_merge.planning import SHARED, Plan, format_bytes
from hf_merge.sources import Source
from hf_merge.types import ModelRef

_SHOWN_CLASSES = 6


def experts_card(
    plan: Plan,
    sources: Sequence[Source],
    name: str,
    *,
    files: ExpertFiles,
    template: str | Path | None = None,
    **values: Any,
) -> ModelCard:
    """Render the card of a backbone with task experts.

    Args:
        plan: what was merged.
        sources: its models, in its order.
        name: title of the card.
        files: where all lies, and how large it is.
        template: path of a Jinja template to use instead of experts.md; it may extend or include ours by name.
        **values: more for the template.
    """
    front = {"tags": ["merge", "hf_merge", "task-experts", *(["lora", "peft"] if files.is_lora else ["peft"])]}
    template = template or template_folder() / "experts.md"
    told = {
        "experts": facts(plan, sources, files),
        "how_to_load": how_to_load(name, files.tasks[0], files.tasks[-1]),
        **values,
    }
    return merged_card(plan, sources, name, template=template, data=front, **told)


def facts(plan: Plan, sources: Sequence[Source], files: ExpertFiles) -> dict[str, Any]:
    """Return what the template says of the experts in numbers."""
    assert plan.tasks is not None
    backbone = sum(spec.nbytes for name, spec in plan.model_specs.items() if not name.startswith("experts/"))
    by_model: Mapping[Any, Source] = dict(zip(plan.models, sources, strict=True))
    own = {task: files.bytes_of(task) for task in plan.tasks.names}
    rows = [
        {"task": task, "model": _called(model, by_model[model]), "size": format_bytes(own[task]),
         "share": _share(own[task], backbone), "classes": _classes(by_model[model].config)}
        for task, model in zip(plan.tasks.names, plan.tasks.models, strict=True)
    ]  # fmt: skip
    shared = files.bytes_of(SHARED)
    return {
        "rows": rows,
        "count": len(rows),
        "is_lora": files.is_lora,
        "backbone": format_bytes(backbone),
        "shared": format_bytes(shared) if shared else "",
        "total": format_bytes(backbone + shared + sum(own.values())),
        "separate": format_bytes(len(rows) * backbone),
        "first": plan.tasks.names[0],
    }


def how_to_load(name: str, first: str, last: str) -> str:
    """Return code that loads the model and runs two of its tasks."""
    return (
        f'import hf_merge\n\nmodel = hf_merge.load_experts("{name}")\nmodel.set_task("{first}")\n'
        "outputs = model(**inputs)  # with the weights and the head of that task\n"
        f'outputs = model(**inputs, task=["{first}", "{last}"])  # of two examples, each with its own'
    )


def _called(model: Any, source: Source) -> str:
    if source.public_id:
        return hub_link(source.public_id)
    return f"`{(model.path if isinstance(model, ModelRef) else source.label).rstrip('/').rpartition('/')[2]}`"


def _classes(config: Mapping[str, Any]) -> str:
    """Name the classes of a task, the first few of many."""
    names = [str(one).translate(NO_MARKUP) for one in (config.get("id2label") or {}).values()]
    told = ", ".join(names[:_SHOWN_CLASSES])
    return f"{told}, ... ({len(names)})" if len(names) > _SHOWN_CLASSES else told or "-"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2g} %" if whole else "-"


# ---- the router, which comes later


def note_router(folder: Path, config: RouterConfig | None) -> None:
    """Say on the card of a folder what router lies beside it, or no longer; a folder without a card stays so."""
    path = folder / "README.md"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(
            with_section(text, "Router", "" if config is None else router_in_words(config)), encoding="utf-8"
        )


def router_in_words(config: RouterConfig) -> str:
    """Say what a router is, how good it was found, and how it is used."""
    made = {
        "twin": "an MLP of three layers, as Twin-Merging has it, trained",
        "free": "an MLP of two layers, as FREE-Merging has it, trained",
        None: f"distances to {sum(config.prototypes)} prototypes in feature space, made",
    }[config.architecture]
    encoder = config.encoder or {}
    reads = (
        "the backbone" if not encoder else hub_link(encoder["model"]) if "model" in encoder else "the encoder beside it"
    )
    shares = "its shares mix the experts" if config.soft else "the most likely task's expert runs"
    told = (
        f"`router/` says of which task an input is: {made} on examples of each task without their labels. It reads the "
        f"mean of the last hidden states of {reads}; {shares}."
    )
    if config.accuracy is None:
        return told
    rows = "\n".join(
        f"| `{task}` | {100 * config.accuracies[task]:.1f} % | {config.held_out[task]} |" for task in config.tasks
    )
    return (
        f"{told}\n\nIt knew the task of {100 * config.accuracy:.1f} % of the examples that were held out of its "
        f"training (the mean over tasks):\n\n| task | known | held out |\n|---|---|---|\n{rows}"
    )
