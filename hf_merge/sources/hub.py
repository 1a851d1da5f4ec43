"""Models of the Hub: headers and small files at once, weights when they are needed.

What the Hub refuses is told in one sentence with its fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import tqdm

from hf_merge.answers import PASS_A_TOKEN, endpoint, is_unreachable, reason
from hf_merge.errors import SourceError
from hf_merge.sources.folder import Folder
from hf_merge.sources.remote import RemoteFile, RemoteSafetensors
from hf_merge.sources.weights import PICKLES, WeightFile, open_weights
from hf_merge.types import ModelRef

_FIRST = [
    "config.json", "modules.json", "*router_config.json", "adapter_config.json", "*.safetensors.index.json",
    "*pytorch_model.bin.index.json", "README.md",
]  # fmt: skip
"""What is fetched of every model: what its files are to each other, and what its card says."""

_AT_A_TIME = 8


class HubFolder(Folder):
    """The files of a model on the Hub at one commit; those that are asked for come into the cache.

    Args:
        model: its id and the revision that was asked for.
        path: its folder in the cache, called by the commit.
        sizes: of every file, in bytes.
        ids: git's of every file.
        streamed: whether tensors will be read by range, so that no weights come into the cache.
        hub: token, cache_dir, local_files_only.
    """

    def __init__(
        self, model: ModelRef, path: Path, sizes: Mapping[str, int], ids: Mapping[str, str], hub: Mapping[str, Any],
        *, streamed: bool,
    ):  # fmt: skip
        super().__init__(path)
        self.model, self.sizes, self._ids, self._hub, self._streamed = model, sizes, ids, dict(hub), streamed

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    def names(self, below: str = "") -> list[str]:
        return [name for name in self.all_names() if name.rpartition("/")[0] == below]

    def all_names(self) -> list[str]:
        return sorted(self.sizes)

    def identity(self, name: str) -> str | None:
        return self._ids.get(name)

    def paths(self, names: Sequence[str]) -> list[Path]:
        lacking = [name for name in names if not (self.path / name).is_file()]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            list(pool.map(lambda name: self._remote(name).download(tqdm_class=Silent), lacking))
        return [self.path / name for name in names]

    def open_weights(self, names: Sequence[str]) -> list[WeightFile]:
        pickled = [name for name in names if name.endswith(PICKLES) and not (self.path / name).is_file()]
        if pickled and self._streamed:
            raise SourceError(
                f"'{self.model.path}' has its weights in {pickled[0]}, which cannot be streamed: "
                "leave out stream (--stream), or name a model with safetensors."
            )
        self.paths(pickled)
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return list(pool.map(self._opened, names))

    def _opened(self, name: str) -> WeightFile:
        here = self.path / name
        return open_weights(here) if here.is_file() else RemoteSafetensors(self._remote(name), streamed=self._streamed)

    def _remote(self, name: str) -> RemoteFile:
        return RemoteFile(self.model.path, name, self.path.name, self.sizes[name], self._hub, self._refused)

    def _refused(self, error: Exception, name: str) -> SourceError:
        return SourceError(_refusal(self.model, error, f"'{name}' of '{self.model.path}'", **self._hub))


def open_folder(model: ModelRef, *, stream: bool = False, **hub: Any) -> Folder:
    """Open a model of the Hub: its list of files, and the small ones that say what it is, come into the cache.

    Args:
        model: which one.
        stream: whether tensors will be read by range.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: no such model or revision, no access, or no network.
    """
    path = download(model, only=_FIRST, **hub)
    files = _listed(model, path, hub)
    if files is None:  # it came into the cache by other ways, and the Hub may not be asked
        return Folder(path)
    sizes, ids = {file.path: file.size for file in files}, {file.path: file.blob_id for file in files}
    folder = HubFolder(model, path, sizes, ids, hub, streamed=stream)
    folder.gated = not hub.get("local_files_only") and _is_gated(model, hub)
    return folder


def _is_gated(model: ModelRef, hub: Mapping[str, Any]) -> bool:
    """Ask whether a model's conditions must be accepted; one that cannot be asked is taken for free."""
    try:
        info = HfApi().model_info(model.path, expand=["gated"], token=hub.get("token"))
    except (httpx2.HTTPError, OSError, ValueError):
        return False
    return bool(info.gated)


def _listed(model: ModelRef, path: Path, hub: Mapping[str, Any]) -> Any:
    """Return what the Hub lists of a commit, as huggingface_hub keeps it."""
    try:
        return get_cached_repo_tree(model.path, revision=path.name, cache_dir=hub.get("cache_dir"))
    except CachedRepoTreeNotFoundError:
        return None


def download(model: ModelRef, *, only: Sequence[str], **hub: Any) -> Path:
    """Fetch some files of a model of the Hub into its cache.

    Args:
        model: which one.
        only: patterns of the files that are wanted; nothing else is fetched.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: no such model or revision, no access, or no network.
    """
    told = {"allow_patterns": list(only), "tqdm_class": Silent}
    hub.pop("stream", None)
    try:
        return Path(snapshot_download(model.path, revision=model.revision, **told, **hub))
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        raise SourceError(_refusal(model, error, **hub)) from error


class Silent(tqdm):
    """A progress bar that is not shown: small files are there at once."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{**options, "disable": True})


def _refusal(model: ModelRef, error: Exception, what: str = "", **hub: Any) -> str:
    """Return what went wrong with a model, or with `what` of it, and what to do about it."""
    what = what or f"'{model.path}'"
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    cause = error
    if isinstance(error, LocalEntryNotFoundError):  # nothing in the cache, and this is why the Hub gave nothing
        cause = error.__cause__ or error
        if hub.get("local_files_only") or isinstance(cause, OfflineModeIsEnabled):
            return _not_cached(model, what, "HF_HUB_OFFLINE" if cause is not error else "local_files_only")
    if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
        return _answered(model, cause, what)
    if is_unreachable(cause):
        return (
            f"The Hub at {endpoint()} cannot be reached for {what} ({reason(cause)}): "
            "check the network and HF_ENDPOINT, and run it again."
        )
    if isinstance(cause, HFValidationError):
        return f"There is no folder '{model.path}', and it cannot be the id of a model on the Hub: check the path."
    if isinstance(cause, OSError) and cause.errno is not None:
        return (
            f"{what} cannot be kept in the cache ({cause.strerror or reason(cause)}): "
            "make room there, or name another folder with cache_dir (--cache-dir)."
        )
    return f"The download of {what} broke off ({reason(cause)}): run it again; whole files are kept."


def _answered(model: ModelRef, error: Any, what: str) -> str:
    """Say what the Hub's answer means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{endpoint()}/{model.path}", error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"'{model.path}' is gated: accept its conditions at {page}, "
            f"and pass a token of the account that did {PASS_A_TOKEN}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"There is no folder '{model.path}', and on the Hub no such model that you may see: "
            f"check the name, or if it is private pass a token that may read it {PASS_A_TOKEN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"'{model.path}' has no revision '{model.revision}' on the Hub: "
            f"name a branch, a tag or a commit that {page}/commits lists."
        )
    if status == 401:
        return f"The Hub does not accept the token that was sent for '{model.path}': pass a valid one {PASS_A_TOKEN}."
    if status == 403:
        return f"The token that was sent may not read '{model.path}': pass one that may {PASS_A_TOKEN}."
    return (
        f"The Hub did not give {what} ({status} {error.response.reason_phrase}): "
        "run it again later; whole files are kept."
    )


def _not_cached(model: ModelRef, what: str, because: str) -> str:
    """Say that the cache lacks a model or a file of it, and how to fetch it."""
    revision = f" --revision {model.revision}" if model.revision else ""
    whole = f"There is no folder '{model.path}', and no whole model of that name in the cache"
    lacking = whole if what == f"'{model.path}'" else f"{what} is not in the cache"
    return f"{lacking}, and {because} forbids to ask the Hub: run `hf download {model.path}{revision}` or allow it."
