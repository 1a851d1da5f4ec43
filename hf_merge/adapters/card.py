"""The card of an adapter: of what base, how much of its change is kept, what is saved whole, what is left out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_merge import _compat
from hf_merge.adapters.parts import FACTORED
from hf_merge.adapters.planned import base_of
from hf_merge.adapters.writer import Kept
from hf_merge.card import hub_link, merged_card, template_folder
from hf_merge.planning import Plan
from hf_merge.sources import Source

_WORST = 5
_LISTED = 12


def adapter_card(
    plan: Plan,
    sources: Sequence[Source],
    name: str,
    *,
    kept: Sequence[Kept],
    config: Mapping[str, Any],
    template: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> ModelCard:
    """Render the card of an adapter.

    Args:
        plan: what was merged; the donor is the base.
        sources: its models, in its order.
        name: title of the card.
        kept: what became of each part, as `AdapterWriter.assemble` returns it.
        config: adapter_config.json.
        template: path of a Jinja template to use instead of adapter.md; it may extend or include ours by name.
        data: what the front matter says instead.
        **values: more for the template.
    """
    base = base_of(plan, sources)
    front = {
        "base_model": [base.public_id] if base.public_id else None,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "peft", "merge", "hf_merge"],
        **(data or {}),
    }
    told = {
        "how_to_load": how_to_load(plan, base, name, config), "adapter": facts(plan, kept, config, base),
        "notes": _notes(plan, base), **values,
    }  # fmt: skip
    template = template or template_folder() / "adapter.md"
    return merged_card(plan, sources, name, template=template, data=front, **told)


def facts(plan: Plan, kept: Sequence[Kept], config: Mapping[str, Any], base: Source) -> dict[str, Any]:
    """Return what the template says of the adapter in numbers."""
    factors = [one for one in kept if one.part.kind in FACTORED and one.finished.rank]
    known = [one for one in factors if one.finished.kept is not None]
    whole = [one for one in kept if one.part.kind in ("whole", "bias") and one.places and one.finished.energy != 0]
    left = sorted((one for one in kept if one.finished.left_out), key=lambda one: -one.finished.left_out)
    worst = sorted(known, key=lambda one: (one.finished.kept or 0.0, one.part.module))[:_WORST]
    return {
        "base": hub_link(base.public_id) if base.public_id else f"`{_last(base)}`",
        "is_extracted": plan.recipe.merge_method == "passthrough" and len(plan.recipe.merged) == 1,
        "modules": len(factors),
        "ranks": _ranks(one.finished.rank for one in factors),
        "written_rank": config.get("r"),
        "kept": _share(known),
        "rows": _rows(factors),
        "worst": [{"module": one.part.module, "rank": one.finished.rank, "kept": _percent(one.finished.kept)}
                  for one in worst if (one.finished.kept or 0.0) < 1 - 1e-6],
        "whole": _listed([one.part.module + (" (bias)" if one.part.kind == "bias" else "") for one in whole]),
        "left_out": [{"name": one.part.module + (" (bias)" if one.part.kind == "bias" else ""),
                      "change": f"{one.finished.left_out:.3g}"} for one in left[:_LISTED]],
        "more_left_out": max(0, len(left) - _LISTED),
        "is_tied": any(one.part.twins for one in factors),
        "changes_biases": config.get("bias") == "all",
        "vllm": plan.recipe.vllm,
    }  # fmt: skip


def _notes(plan: Plan, base: Source) -> list[str]:
    """Say how the factors came about."""
    how = "of whole matrices" if plan.recipe.exact_svd or not isinstance(plan.recipe.rank, int) else (
        "of whole matrices, or of what a random sketch of them spans where the rank is much smaller"
    )  # fmt: skip
    dtype = plan.recipe.out_dtype or plan.recipe.dtype
    return [
        f"The merge less `{_last(base)}`, in float32 or wider, and its singular value decomposition ({how}), as "
        f"U sqrt(S) and sqrt(S) V^T; rounded once to {dtype or 'the dtypes of the base'}.",
        *(f"Tensors matching `{rule.pattern}`: {rule.merge_method or plan.recipe.merge_method}."
          for rule in plan.recipe.rules),
    ]  # fmt: skip


def energies(kept: Sequence[Kept]) -> dict[str, float]:
    """Return for each module with factors the share of its change that they keep."""
    return {one.part.module: one.finished.kept for one in kept if one.finished.kept is not None}


def _rows(factors: Sequence[Kept]) -> list[dict[str, str]]:
    """Gather modules of the same name in all layers."""
    groups: dict[str, list[Kept]] = {}
    for one in factors:
        groups.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", one.part.module), []).append(one)
    return [
        {
            "modules": f"`{name}`", "count": str(len(group)), "ranks": _ranks(one.finished.rank for one in group),
            "kept": _share(group), "worst": _percent(min((one.finished.kept for one in group if one.finished.kept
                                                          is not None), default=None)),
            "error": _largest_error(group),
        }
        for name, group in groups.items()
    ]  # fmt: skip


def _largest_error(group: Sequence[Kept]) -> str:
    known = [one.finished.error for one in group if one.finished.error is not None]
    return f"{max(known):.2g}" if known else "-"


def _share(group: Sequence[Kept]) -> str:
    """Say which share of the squared norm of all changes is kept."""
    known = [one.finished for one in group if one.finished.kept is not None and one.finished.energy]
    total = math.fsum(one.energy or 0.0 for one in known)
    return _percent(math.fsum((one.kept or 0.0) * (one.energy or 0.0) for one in known) / total if total else None)


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{math.floor(share * 10_000) / 100:.2f} %" if share < 1 - 1e-6 else "100 %"


def _ranks(ranks: Any) -> str:
    found = sorted(set(ranks))
    return "-" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _listed(names: Sequence[str]) -> list[str]:
    groups: dict[str, int] = {}
    for name in names:
        stem = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
        groups[stem] = groups.get(stem, 0) + 1
    return [f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in groups.items()]


def _last(base: Source) -> str:
    return Path(base.label).name


def how_to_load(plan: Plan, base: Source, name: str, config: Mapping[str, Any]) -> str:
    """Write the code that loads the adapter over its base."""
    architecture = next(iter(base.config.get("architectures") or ()), "AutoModel")
    auto = _compat.auto_class_name(architecture)
    where = f'"{base.public_id}"' if base.public_id else json.dumps(_last(base), ensure_ascii=False)
    revision = f', revision="{base.revision}"' if base.revision else ""
    named = json.dumps(name, ensure_ascii=False)
    code = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({where}{revision})\nmodel = PeftModel.from_pretrained(base, {named})"
    )
    if not plan.recipe.vllm:
        return code
    rank = config.get("r")
    serve = (
        f"vllm serve {base.public_id or _last(base)} --enable-lora --max-lora-rank {rank} --lora-modules merged={name}"
    )
    return f"{code}\n\n# or in a shell:\n# {serve}"
