"""A backbone with task experts as it runs -> a folder, or a repository on the Hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from hf_merge import hub
from hf_merge.experts.card import note_router
from hf_merge.experts.files import CONFIG_FILE, FOLDER
from hf_merge.experts.routers import FOLDER as ROUTER
from hf_merge.experts.routers import save_router
from hf_merge.writer import refuse_existing


def save(routed: Any, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a `RoutedModel`; the folder appears when it is whole.

    Args:
        routed: the model.
        folder: to make; that which the model was loaded from gets its router only.
        overwrite: replace what is there.

    Raises:
        OutputExistsError: there is something already.
    """
    source = routed.index.folder.resolve()
    target = Path(os.path.abspath(folder.expanduser()))
    if target.resolve() == source:
        _with_router(routed, target)
        return target
    refuse_existing(target, overwrite=overwrite)
    partial, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        shutil.copytree(source, partial, ignore=lambda place, names: _left_out(place, names, source))
        for config in sorted((partial / FOLDER).glob(f"*/{CONFIG_FILE}")):
            _name_base(config, target)
        _with_router(routed, partial)
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    finally:
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def publish(routed: Any, repo_id: str, **options: Any) -> Any:
    """Push a `RoutedModel`: its folder, or where its router is not the one that lies there a copy with it."""
    lies_there = (routed.index.folder / ROUTER).is_dir()
    if routed.router is routed.saved_router and lies_there == (routed.router is not None):
        return hub.push_to_hub(routed.index.folder, repo_id, **options)
    with tempfile.TemporaryDirectory() as place:
        return hub.push_to_hub(save(routed, Path(place) / repo_id.rpartition("/")[2]), repo_id, **options)


def _left_out(place: Any, names: list[str], source: Path) -> list[str]:
    """Name what is not copied: hidden files, and the router, which is written anew."""
    is_top = Path(place).resolve() == source
    return [name for name in names if name.startswith(".") or (is_top and name == ROUTER)]


def _name_base(config: Path, target: Path) -> None:
    """Let an adapter's config name the new folder as its base, where it named a folder."""
    told = json.loads(config.read_text(encoding="utf-8"))
    if os.path.isabs(told.get("base_model_name_or_path") or ""):
        told["base_model_name_or_path"] = str(target)
        text = json.dumps(told, indent=2, ensure_ascii=False, sort_keys=True)
        config.write_text(text + "\n", encoding="utf-8")


def _with_router(routed: Any, folder: Path) -> None:
    if routed.router is None:
        shutil.rmtree(folder / ROUTER, ignore_errors=True)
    else:
        save_router(routed.router, folder)
    note_router(folder, routed.router and routed.router.config)
