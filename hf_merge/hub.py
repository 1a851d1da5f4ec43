"""Publishing: a folder, or a model that is still being merged -> one commit on the Hub, whole or not at all.

First the Hub is asked and nothing changes (`ask`), then repository and branch are made if they are missing
(`Destination.prepare`), then files go out that nobody sees, and one commit shows them all (`Destination.commit`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoSibling
from huggingface_hub.utils import logging, validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_merge import progress
from hf_merge.answers import FAILURES, PASS_A_TOKEN, endpoint, in_words, no_token, reason
from hf_merge.card import with_checksums, with_name, without_paths
from hf_merge.errors import MergeError, OutputExistsError, PublishError, shown
from hf_merge.progress import OnProgress, reported
from hf_merge.recipe import Recipe
from hf_merge.sending import Addition, send_telling
from hf_merge.sources.weights import PICKLES
from hf_merge.types import ModelRef
from hf_merge.writer import CARRIED, RECIPE_FILE, RECIPE_KEY, WEIGHTS

logger = logging.get_logger(__name__)

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
_IGNORE_NOTHING = "# every file counts\n"
_COMMIT = re.compile("[0-9a-f]{40}")


@reported
def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    exist_ok: bool = False,
    token: str | bool | None = None,
    on_progress: OnProgress | None = None,
) -> CommitInfo:
    """Publish a folder on the Hub, as one commit: a model, an adapter, a recipe.

        hf_merge.push_to_hub("merged", "org/merged", private=True)

    What the repository held before is replaced, but for hidden files; its history keeps it. Hidden files of the folder
    stay at home, and of the recipe goes out what others may see. The card gets the checksums of the weights, and the
    id of the repository where it is one of ours and has the name of a folder.

    Args:
        folder: what to publish.
        repo_id: `namespace/name`, or a name in the namespace of the token. It is made if it does not exist.
        private: who may see a repository that is made; one that exists has to be what this says.
        create_pr: open a pull request instead of changing the branch.
        revision: the branch; made from `main` if it does not exist.
        commit_message: the first line of the commit.
        exist_ok: replace the model that is there.
        token: one that may write, as everywhere in huggingface_hub.
        on_progress: is given a `Progress` a few times a second, until the commit is made. What it raises (`Cancelled`,
            say) ends the push.

    Raises:
        OutputExistsError: there is a model already.
        PublishError: the Hub does not take it. What it held is as it was; the same call goes on.
        What `on_progress` raises: as it is; the Hub holds what it held.
    """
    place = Path(folder).expanduser()
    with in_words(repo_id, token):
        additions = folder_contents(place)
    destination = ask(
        repo_id, private=private, create_pr=create_pr, revision=revision, commit_message=commit_message,
        exist_ok=exist_ok, token=token,
    )  # fmt: skip
    return push_folder(place, destination, additions)


def push_folder(
    folder: Path, destination: Destination, additions: dict[str, CommitOperationAdd] | None = None
) -> CommitInfo:
    """Publish a folder where the Hub was asked already."""
    with destination.in_words():
        additions = folder_contents(folder) if additions is None else additions
        card = additions.pop(CARD, None) and (folder / CARD).read_text(encoding="utf-8")
        recipe = shared_recipe(folder)
    card = card and with_name(card, destination.repo_id)
    if recipe is not None:
        additions[RECIPE_FILE] = CommitOperationAdd(RECIPE_FILE, recipe.encode())
    if ADAPTER_CONFIG in additions:
        additions[ADAPTER_CONFIG] = CommitOperationAdd(ADAPTER_CONFIG, _without_path(folder / ADAPTER_CONFIG))
    for name in (name for name in additions if name.startswith("experts/") and name.endswith(f"/{ADAPTER_CONFIG}")):
        additions[name] = CommitOperationAdd(name, _over_base(folder / name, destination.repo_id))
    destination.refuse_occupied(lambda: destination.holds(additions, card))
    if card:
        destination.check_card(card)
    return destination.prepare().commit(additions, card=card, recipe=recipe)


def ask(
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    exist_ok: bool = False,
    token: str | bool | None = None,
) -> Destination:
    """Ask the Hub whether and onto what something may be pushed; nothing changes there.

    Raises:
        PublishError: offline, no token or one that may not write, an id or a branch that cannot be.
    """
    if constants.is_offline_mode():
        raise PublishError(f"HF_HUB_OFFLINE forbids to push to '{repo_id}': unset it, or write to a folder.")
    _refuse_odd_token(token)
    api = HfApi(token=token, library_name="hf_merge")
    with in_words(repo_id, token):
        validate_repo_id(repo_id)
        user = api.whoami()
        _refuse_reader(user)
        full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    wishes: dict[str, Any] = {
        "private": private, "create_pr": create_pr, "revision": revision, "exist_ok": exist_ok,
        "message": commit_message or "Upload with hf_merge", "token": token,
    }  # fmt: skip
    with in_words(full_id, token):
        return Destination(full_id, str(user["name"]), api, **wishes).found()


@dataclass(frozen=True)
class Destination:
    """Where something is pushed to, as the Hub was found.

    Attributes:
        repo_id: `namespace/name`.
        user: whose token it is.
        message: the first line of the commit.
        head: the commit that the new one follows; None if there is no repository yet.
        files: what lies there.
        has_branch: whether the branch exists.
        is_fresh: nothing but what `main` holds as well was ever put on the branch.
    """

    repo_id: str
    user: str
    api: HfApi = field(repr=False)
    private: bool | None
    create_pr: bool
    revision: str | None
    exist_ok: bool
    message: str
    token: str | bool | None = field(repr=False)
    head: str | None = None
    files: Mapping[str, RepoSibling] = field(default_factory=dict, repr=False)
    has_branch: bool = False
    is_fresh: bool = False

    @property
    def url(self) -> str:
        """Its page."""
        return f"{endpoint()}/{self.repo_id}"

    def in_words(self) -> Any:
        """Turn what goes wrong inside into a `PublishError` of one sentence."""
        return in_words(self.repo_id, self.token)

    def found(self) -> Destination:
        """Look what is there."""
        try:
            main = self.api.model_info(self.repo_id, files_metadata=True)
        except RepositoryNotFoundError:
            return replace(self, has_branch=self.revision in (None, "main"))
        self._refuse_visibility(main)
        if self.revision in (None, "main"):
            return replace(self._at(main), has_branch=True)
        if not self._is_branch(self.revision):
            return replace(self._at(main), is_fresh=True)
        branch = self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True)
        return replace(self._at(branch), has_branch=True, is_fresh=branch.sha == main.sha)

    def _at(self, info: Any) -> Destination:
        """Note the head of the branch, what is there, and how the Hub calls the repository: names may have moved."""
        return replace(
            self, repo_id=info.id, head=info.sha, files={each.rfilename: each for each in info.siblings or ()}
        )

    def _is_branch(self, revision: str) -> bool:
        """Tell whether a branch exists; refuse what can be none."""
        if revision.startswith("refs/pr/"):
            return True
        refs = self.api.list_repo_refs(self.repo_id)
        exists = revision in {each.name for each in refs.branches}
        is_tag = revision in {each.name for each in refs.tags} or _COMMIT.fullmatch(revision)
        if not exists and (is_tag or self.create_pr):
            raise PublishError(f"'{self.repo_id}' has no branch '{revision}': name one that {self.url}/branches lists.")
        return exists

    def _refuse_visibility(self, info: Any) -> None:
        if self.private is None or bool(info.private) == self.private:
            return
        found, wanted = ("public", "private") if self.private else ("private", "public")
        raise PublishError(
            f"'{self.repo_id}' exists and is {found}, and was to be {wanted}: change it at {self.url}/settings, "
            "choose another name, or leave private= (--private) out."
        )

    def refuse_occupied(self, is_ours: Callable[[], bool] = lambda: False) -> None:
        """Raise if a model would be replaced that nobody said may be.

        Args:
            is_ours: tells whether what lies there is what the push would put there; asked only if it matters.

        Raises:
            OutputExistsError: it says what lies there.
        """
        held = [path for path in self.files if path != CARD and not _is_hidden(path)]
        if not held or self.exist_ok or self.create_pr or self.is_fresh:
            return
        with self.in_words():
            if is_ours():
                return
        seen = next(filter(_is_weights, held), held[0])
        more = f" and {len(held) - 1} more file{'s' * (len(held) > 2)}" if len(held) > 1 else ""
        raise OutputExistsError(
            f"'{self.repo_id}' exists and is not empty ('{seen}'{more}): choose another name, replace its content "
            "with exist_ok=True (--exist-ok), or open a pull request with create_pr=True (--create-pr)."
        )

    def holds(self, additions: Mapping[str, CommitOperationAdd], card: str | None) -> bool:
        """Tell whether this is what lies there already: a push that was done, and whose answer was lost."""
        wanted = {path for path in (*additions, *([CARD] if card else [])) if not _is_hidden(path)}
        if wanted != {path for path in self.files if not _is_hidden(path)}:
            return False
        if any(self.files[path].size != each.upload_info.size for path, each in additions.items() if path in wanted):
            return False
        sent = [*additions.values(), *([_card_addition(card, additions)] if card else [])]
        return all(_is_same(each, self.files[each.path_in_repo]) for each in sent if each.path_in_repo in wanted)

    def refuse_occupied_by_others(self, folder: Path | None) -> None:
        """As `refuse_occupied`, but for what an interrupted merge put there, as noted in its working folder."""
        there = {path: each.lfs.sha256 for path, each in self.files.items() if _is_weights(path) and each.lfs}
        sums = {file: about["sha256"] for file, about in (noted(folder, self.repo_id) if folder else {}).items()}
        self.refuse_occupied(lambda: bool(sums) and there == sums)

    def check_card(self, text: str) -> None:
        """Let the Hub look at a card's metadata before anything large is sent.

        Raises:
            PublishError: it says what is wrong with it.
        """
        with self.in_words():
            try:
                ModelCard(text).validate()
            except (HfHubHTTPError, httpx2.HTTPError):
                raise
            except (ValueError, yaml.YAMLError) as error:
                raise PublishError(
                    f"The Hub does not take the metadata of the card ({shown(' '.join(str(error).split()), 300)}): "
                    "correct the front matter of README.md, or of the template."
                ) from error

    def prepare(self) -> Destination:
        """Make repository and branch if they are missing, and try whether a commit would be let in."""
        with self.in_words():
            made = self.head is None or not self.has_branch
            if self.head is None:
                self.api.create_repo(self.repo_id, private=self.private)
            if not self.has_branch:
                self.api.create_branch(self.repo_id, branch=str(self.revision), exist_ok=True)
            self.send([CommitOperationAdd(CARD, b"may I?")])
            if not made:
                return self
            return self._at(self.api.model_info(self.repo_id, revision=self.revision, files_metadata=True))

    def send(self, additions: Sequence[CommitOperationAdd], *, forget: bool = False) -> None:
        """Upload what is large; nobody sees it before the commit.

        Args:
            additions: what to upload; what is there already is not sent.
            forget: let go of the content, so that the files may be deleted.
        """
        self.api.preupload_lfs_files(
            self.repo_id, additions, revision=self.revision, create_pr=self.create_pr, free_memory=forget,
            gitignore_content=_IGNORE_NOTHING,
        )  # fmt: skip

    def _send_telling(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Upload what is large, and let whoever listens know how far that is."""
        report = progress.current()
        if report.listener is None:
            self.send(additions)
        elif additions:
            send_telling(additions, self.send, report)

    def commit(
        self,
        additions: Mapping[str, CommitOperationAdd],
        *,
        carried: Mapping[str, CommitOperationAdd] | None = None,
        card: str | None = None,
        recipe: str | None = None,
    ) -> CommitInfo:
        """Show everything at once: files that are new, and none that the new model lacks.

        Args:
            additions: what is to be there, by path.
            carried: what was uploaded before.
            card: the text of README.md.
            recipe: names the models on the Hub, from which files may be copied.
        """
        carried = carried or {}
        with self.in_words():
            copies = self._copies(additions, recipe) if recipe else {}
            send = self.send if carried else self._send_telling  # what was carried is told already, the rest is small
            send([each for path, each in additions.items() if path not in copies])
            everything = {**additions, **carried}
            if card:
                everything[CARD] = _card_addition(card, everything)
                self.send([everything[CARD]])
            progress.current().again()  # the last time that a listener can end it
            try:
                return self._commit({**everything, **copies})
            except FAILURES as error:
                if not copies or not _is_about_copies(error, copies.values()):
                    raise
                logger.info("Files cannot be copied on the Hub and are uploaded: %s", reason(error))
                self.send([additions[path] for path in copies])
                return self._commit(everything)

    def _commit(self, wanted: Mapping[str, CommitOperationAdd | CommitOperationCopy]) -> CommitInfo:
        stale = [path for path in self.files if path not in wanted and not _is_hidden(path)]
        return self.api.create_commit(
            self.repo_id, [*(CommitOperationDelete(path) for path in stale), *wanted.values()],
            commit_message=self.message, revision=self.revision, create_pr=self.create_pr, parent_commit=self.head,
        )  # fmt: skip

    def _copies(self, additions: Mapping[str, CommitOperationAdd], recipe: str) -> dict[str, CommitOperationCopy]:
        """Find files that a parent has on the Hub, bit for bit: they are copied there, and not sent."""
        copies: dict[str, CommitOperationCopy] = {}
        for parent, revision in _pinned_models(recipe):
            there = self._large_files(parent, revision)
            for path, addition in additions.items():
                same = [file for file in there if file.size == addition.upload_info.size]
                if path in copies or not same or _is_same(addition, self.files.get(path)):
                    continue
                digest = addition.upload_info.sha256.hex()
                if source := next((file for file in same if file.lfs and file.lfs.sha256 == digest), None):
                    copies[path] = CommitOperationCopy(source.path, path, revision, parent, "model")
        return copies

    def _large_files(self, parent: str, revision: str) -> list[RepoFile]:
        """List the files of a parent that can be copied; none if it cannot be seen."""
        try:
            tree = list(self.api.list_repo_tree(parent, recursive=True, revision=revision))
        except (httpx2.HTTPError, HFValidationError) as error:
            logger.info("'%s' cannot be seen, and no file is copied from it: %s", parent, reason(error))
            return []
        return [each for each in tree if isinstance(each, RepoFile) and each.lfs and each.xet_hash]


def noted(folder: Path, repo_id: str) -> dict[str, dict[str, Any]]:
    """Read which files an interrupted merge has uploaded to a repository: SHA-256 and size of each."""
    try:
        found = json.loads((folder / CARRIED).read_text(encoding="utf-8"))
        files = found["files"] if found["repo_id"] == repo_id else {}
        return {file: {"sha256": str(about["sha256"]), "size": int(about["size"])} for file, about in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def folder_contents(folder: Path) -> dict[str, CommitOperationAdd]:
    """List the files of a folder that are published: all but hidden ones, and `.eval_results/` of these.

    Raises:
        PublishError: it is no folder, or has none.
    """
    if folder.is_file():
        raise PublishError(f"'{folder}' is a file: what is published is a folder, with the model's config and card.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {name: path for name, path in paths.items() if not _is_hidden(name) or name.startswith(".eval_results/")}
    if not shown:
        raise PublishError(f"There is nothing to publish at '{folder}': name a folder with a model in it.")
    return {name: Addition(name, path) for name, path in shown.items()}


def shared_recipe(folder: Path) -> str | None:
    """Return what others may see of a folder's recipe: that in the weights' headers, or else without local paths."""
    if not (folder / RECIPE_FILE).is_file():
        return None
    told = (_recipe_in(path) for path in sorted(folder.rglob(f"*{WEIGHTS}")))
    return next(filter(None, told), None) or without_paths(Recipe.load(folder / RECIPE_FILE)).to_yaml()


def _without_path(config: Path) -> bytes:
    """Return an adapter's config with only the last part of the base's path: the rest is of this machine."""
    text = config.read_bytes()
    with contextlib.suppress(ValueError, AttributeError):
        told = json.loads(text)
        named = told.get("base_model_name_or_path")
        if isinstance(named, str) and (os.path.isabs(named) or os.path.isdir(named)):
            told["base_model_name_or_path"] = Path(named).name
            return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
    return text


def _over_base(config: Path, base: str) -> bytes:
    """Return an adapter's config with another name for its base."""
    told = {**json.loads(config.read_bytes()), "base_model_name_or_path": base}
    return (json.dumps(told, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _recipe_in(weights: Path) -> str | None:
    """Return the recipe in the header of a file of weights."""
    try:
        with safe_open(weights, framework="np") as file:
            return (file.metadata() or {}).get(RECIPE_KEY)
    except SafetensorError as error:
        raise PublishError(f"'{weights}' is not a whole safetensors file ({error}): write it again.") from None


def _pinned_models(recipe: str) -> list[tuple[str, str]]:
    """List the models and adapters of a recipe that are on the Hub, with their commits."""
    try:
        loaded = Recipe.from_yaml(recipe)
    except MergeError:
        return []
    models = [model for each in (loaded, *loaded.stages) for model in each.references if isinstance(model, ModelRef)]
    parts = [part for model in models for part in model.parts]
    return list(dict.fromkeys((part.path, part.revision) for part in parts if _COMMIT.fullmatch(part.revision or "")))  # type: ignore[misc]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _is_weights(path: str) -> bool:
    return path.endswith((WEIGHTS, *PICKLES))


def _card_addition(card: str, additions: Mapping[str, CommitOperationAdd]) -> CommitOperationAdd:
    """Write the card with the checksums of the weights, which are known once these were uploaded."""
    sums = {path: each.upload_info.sha256.hex() for path, each in additions.items() if _is_weights(path)}
    return CommitOperationAdd(CARD, (with_checksums(card, sums) if sums else card).encode())


def _is_same(addition: CommitOperationAdd, there: RepoSibling | None) -> bool:
    """Tell whether a file lies on the Hub already."""
    if there is None or there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        content = file.read()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_about_copies(error: BaseException, copies: Iterable[CommitOperationCopy]) -> bool:
    """Tell whether it is copying that failed."""
    if isinstance(error, (FileDuplicationError, EntryNotFoundError)):
        return True
    url = str(error.response.url) if isinstance(error, HfHubHTTPError) else ""
    return any(f"/{copy.src_repo_id}/" in url for copy in copies)


def _refuse_odd_token(token: str | bool | None) -> None:
    """Raise for a token that cannot be sent; the client's own error would show it."""
    if token is False:
        raise PublishError(no_token())
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise PublishError(f"The token has spaces or other characters that no token has: copy it again {PASS_A_TOKEN}.")


def _refuse_reader(user: Mapping[str, Any]) -> None:
    access = (user.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise PublishError(
            f"The token of '{user['name']}' may only read: make one that may write at {endpoint()}/settings/tokens, "
            f"and pass it {PASS_A_TOKEN}."
        )
