"""The base that models have in common, by what their cards and configs say they were made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hf_merge.compatibility.report import Advice, listed
from hf_merge.errors import MergeError, SourceError
from hf_merge.sources import Source, locate
from hf_merge.sources.adapter import WithAdapter
from hf_merge.sources.cards import is_repo, read_card
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.lora import Lora
from hf_merge.types import ModelRef

_GENERATIONS = 4
_AT_A_TIME = 8
Parents = list[str]


class Family:
    """Models with all that they are known to come from, a generation at a time.

    Args:
        models: by name.
        hub: token, cache_dir, local_files_only; None to ask the Hub nothing.
    """

    def __init__(self, models: Mapping[str, Source | Lora], hub: Mapping[str, Any] | None):
        self._hub, self._known = hub, dict[str, Parents]()
        self.depths: dict[str, dict[str, int]] = {}
        for name, model in models.items():
            parents = parents_of(model)
            source = model.source if isinstance(model, Lora) else model
            own = {source.public_id: 0} if source.public_id else {}
            self.depths[name] = {**dict.fromkeys(parents, 1), **own}
        self.speaking = [name for name, depths in self.depths.items() if any(depths.values())]

    def base(self) -> Advice | None:
        """Return the nearest model that all come from, or that all come from whose cards say anything."""
        for generation in range(1, _GENERATIONS + 1):
            for names in ([*self.depths], self.speaking):
                if self.speaking and (found := self._nearest(names)):
                    return Advice(found, self._why(found, names))
            if self._hub is None or not self._older(generation):
                return None
        return None

    def _nearest(self, names: Iterable[str]) -> str | None:
        each = [self.depths[name] for name in names]
        far = {one: sum(depths[one] for depths in each) for one in each[0] if all(one in depths for depths in each)}
        nearest = [one for one, depth in far.items() if depth == min(far.values())]
        return nearest[0] if len(nearest) == 1 else None

    def _older(self, generation: int) -> bool:
        """Look up what the oldest known models come from; tell whether anything new was found."""
        asked = {one for depths in self.depths.values() for one, depth in depths.items() if depth == generation}
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            self._known |= zip(asked, pool.map(self._look_up, asked), strict=True)
        new = False
        for depths in self.depths.values():
            youngest = [one for one, depth in depths.items() if depth == generation]
            found = [parent for one in youngest for parent in self._known[one] if parent not in depths]
            depths |= dict.fromkeys(found, generation + 1)
            new = new or bool(found)
        return new

    def _look_up(self, name: str) -> Parents:
        """Read card and config of a model on the Hub; nothing if it cannot be read."""
        try:
            ref = ModelRef.parse_one(name)
            folder = locate([ref], **(self._hub or {}))[ref].folder
            card = read_card(folder.path, name)
            return _from(name, _named(card), _config_in(folder))
        except (MergeError, ValueError, OSError):
            return []

    def _why(self, found: str, names: list[str]) -> str:
        silent = [name for name in self.depths if name not in names and found != name]
        told = [name for name in names if self.depths[name][found]]
        why = f"from which {listed(told)} {'comes' if len(told) == 1 else 'come'}, as card or config says"
        return f"{why}; of {listed(silent)} nothing is said" if silent else why


def parents_of(model: Source | Lora) -> Parents:
    """Return what a model says that it was made from: its adapters' base, what its card names, or its config."""
    if isinstance(model, Lora):
        named = model.config.get("base_model_name_or_path")
        own = model.source.public_id
        return _from(own, [named] if isinstance(named, str) and named else _named(model.source.card_data), {})
    if isinstance(model, WithAdapter):
        base = model.source
        return [base.public_id or base.label]
    return _from(model.public_id, _named(model.card_data), model.config)


def _named(card: Any) -> Parents:
    return list((card and card.base_model) or ())


def _from(own: str | None, said: Iterable[str] | None, config: Mapping[str, Any]) -> Parents:
    """Return what a card names, or else the model that a config says it was loaded from.

    What is on the Hub (under its own id) can name only what is there: a folder was another machine's.
    """
    found = [one for one in said or () if one != own and (own is None or is_repo(one))]
    loaded = config.get("_name_or_path")
    if not found and isinstance(loaded, str) and "/" in loaded and is_repo(loaded) and loaded != own:
        return [loaded]
    return found


def _config_in(folder: Folder) -> Mapping[str, Any]:
    try:
        return read_object(folder.paths(["config.json"])[0]) if "config.json" in folder else {}
    except SourceError:
        return {}
