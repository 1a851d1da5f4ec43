"""Which tensors are heads: they belong to one task each and are not merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from hf_merge.architecture import backbone_of
from hf_merge.errors import ParameterError
from hf_merge.search.backbone import place
from hf_merge.sources import Source
from hf_merge.sources.module import config_of


def find_heads(
    names: Sequence[str],
    experts: Sequence[Source],
    base: Source,
    wanted: Sequence[str] | None,
    *,
    module: Any = None,
) -> list[str]:
    """Name the tensors of the base that are heads.

    Args:
        names: of the tensors of floats that a merge has.
        experts: each task's weights, under the base's names.
        base: the base's weights.
        wanted: patterns, or parts of names; if None, tensors of several shapes are heads, and then those that
            transformers' class has on top of its backbone, if the models' labels say that they are of several tasks.
        module: the first task's model; None if the second of these is not asked, as the objective needs no heads.

    Raises:
        ParameterError: patterns that match nothing, or heads that cannot be told apart.
    """
    sources = [base, *experts]
    several = [name for name in names if len({one.specs[name].shape for one in sources if name in one.specs}) > 1]
    if wanted is not None:
        return [*dict.fromkeys([*several, *_matched(names, wanted)])]
    return several if several or module is None else _on_top(names, experts, module)


def _matched(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    found: list[str] = []
    for pattern in wanted:
        whole = bool(set("*?[") & set(pattern))
        matches = [name for name in names if (fnmatchcase(name, pattern) if whole else pattern in name)]
        if not matches:
            last = ", ".join(list(names)[-4:])
            raise ParameterError(f"heads= names '{pattern}', and no tensor is called so (the last ones are {last}).")
        found += matches
    return found


def _on_top(names: Sequence[str], sources: Sequence[Source], module: Any) -> list[str]:
    """Name heads of one shape: those on top of the backbone that differ, if the labels say that the tasks do."""
    inside = backbone_of(module, config_of(module))
    placed = place(module, names, {name: sources[0].specs[name].shape for name in names if name in sources[0].specs})
    tops = [name for name, (live, _) in placed.items() if not inside(live)]
    differing = [name for name in tops
                 if any(not torch.equal(sources[0][name], other[name]) for other in sources[1:])]  # fmt: skip
    if not differing:
        return tops  # one head for all, as the texts of CLIP are: it is kept as it is
    labels = [json.dumps(source.config.get("id2label"), sort_keys=True) for source in sources]
    if len(set(labels)) == len(labels):
        return tops
    raise ParameterError(
        f"The models' heads cannot be told apart: {', '.join(differing[:3])} differ and have one shape, and so do not "
        f"the labels in config.json. Say heads=['{differing[0]}'] if each is of a task of its own, or heads=[] "
        "(--merge-heads) to merge them."
    )
