"""Where a merge goes: a folder, one file, the Hub, or a folder and the Hub."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from hf_merge import hub
from hf_merge.errors import OutputError, PublishError
from hf_merge.sources import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.weights import PICKLES
from hf_merge.writer import WEIGHTS


@dataclass(frozen=True)
class Goal:
    """Where a merge goes.

    Attributes:
        target: the folder or the file; of what goes to the Hub only, the place whose hidden sibling is worked in.
        repo_id: the repository, if it is pushed.
        is_away: whether nothing stays at the target.
        wishes: of the push: private, create_pr, commit_message, exist_ok.
        token: for the Hub.
    """

    target: Path
    repo_id: str | None = None
    is_away: bool = False
    wishes: Mapping[str, Any] = field(default_factory=dict)
    token: str | bool | None = None

    @classmethod
    def of(
        cls,
        output: str | os.PathLike[str] | None,
        repo_id: str | None,
        keep_local: bool | None,
        token: str | bool | None,
        **wishes: Any,
    ) -> Goal:
        """Read what `merge` was told.

        Raises:
            OutputError: that is nothing, or does not go together.
        """
        if output is None and (repo_id is None or keep_local):
            raise OutputError("Where to? Name an output folder; one that goes to the Hub only needs push_to_hub alone.")
        if keep_local is not None and repo_id is None:
            raise OutputError(
                "keep_local= says what stays here of a model that is pushed: name push_to_hub= (--push-to-hub) too."
            )
        named = str(repo_id).replace("/", "--") if output is None else output
        target = Path(os.path.abspath(os.path.expanduser(named)))
        if output is not None and target.suffix in PICKLES:
            raise OutputError(
                f"'{target.name}': weights are written as safetensors; call it '{target.stem}.safetensors'."
            )
        if output is not None and target.suffix == WEIGHTS and repo_id is not None:
            raise OutputError(f"'{target.name}' is a single file, and what is pushed is a folder: name a folder.")
        stays = output is not None if keep_local is None else keep_local
        return cls(target, repo_id, repo_id is not None and not stays, wishes, token)

    @property
    def is_file(self) -> bool:
        """Whether it is one file, and no folder."""
        return self.target.suffix == WEIGHTS and not self.is_away

    def ask(self, resumed: Path | None = None) -> hub.Destination | None:
        """Ask the Hub whether the model may be pushed, before anything is merged; None if it is not to be pushed.

        Args:
            resumed: the folder of an earlier run that may have uploaded some of it.

        Raises:
            OutputError: it is said how to push a model that is not to be pushed.
            PublishError: it may not.
        """
        if self.repo_id is not None:
            found = hub.ask(self.repo_id, token=self.token, **self.wishes)
            found.refuse_occupied_by_others(resumed)
            return found
        if said := [f"{name}=" for name, value in self.wishes.items() if value]:
            raise OutputError(f"{', '.join(said)} says how to push the model: name push_to_hub= (--push-to-hub) too.")
        return None

    def workplace(self) -> Path:
        """Name the folder that is made: the target, or a hidden one beside it that nobody else has."""
        return hidden(self.target) if self.is_away else self.target

    def deliver(self, folder: Path, destination: hub.Destination | None) -> list[str]:
        """Publish what was made, if it is to be: return repository, commit and address, or nothing."""
        if destination is None:
            return []
        info = (hub.push_folder if self.is_away else push)(folder, destination)  # push says that the folder is whole
        return [destination.repo_id, info.oid, info.pr_url or info.commit_url]

    def refuse_own_input(self, sources: Sequence[Source]) -> None:
        """Raise if the output would take the place of an input."""
        for part in (part for source in sources for part in source.parts):
            if isinstance(part, Checkpoint) and part.path.resolve().is_relative_to(self.target.resolve()):
                raise OutputError(f"'{self.target}' is or holds the input '{part.label}': choose another name.")


def hidden(target: Path) -> Path:
    """Name a folder beside the target that nobody else has."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def push(folder: Path, destination: hub.Destination) -> CommitInfo:
    """Publish what was merged; if that fails, say that the merge need not be repeated."""
    try:
        return hub.push_folder(folder, destination)
    except PublishError as error:
        raise PublishError(
            f"{error} The merged model is whole in '{folder}': "
            f"push it with `hf-merge push {folder} {destination.repo_id}`."
        ) from error
