"""Safetensors files of the Hub: their headers are read at once, their tensors when they are needed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import cached_assets_path, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.weights import Safetensors, check_header_size, checked_places, not_whole
from hf_merge.types import TensorSpec

_FIRST = 1 << 15
"""Bytes that are asked for first: the header of a shard of a hundred tensors has 12 kB."""

_PIECE = 1 << 25
"""Bytes that are asked for at once: what is repeated if the connection breaks."""

_SAMPLES, _SAMPLE = 16, 1 << 12


@dataclass
class RemoteFile:
    """A file of a model on the Hub.

    Attributes:
        repo: the model's id.
        name: of the file there.
        commit: which state of it.
        size: in bytes, as the Hub lists it.
        hub: token, cache_dir and local_files_only.
        refused: makes of an error what is told.
    """

    repo: str
    name: str
    commit: str
    size: int
    hub: dict[str, Any]
    refused: Callable[[Exception, str], SourceError]
    _direct: str | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        return f"{self.repo}/{self.name}"

    def check_allowed(self) -> None:
        """Raise if the Hub may not be asked.

        Raises:
            SourceError: only what is in the cache may be read.
        """
        error = LocalEntryNotFoundError("only what is in the cache may be read")
        if constants.HF_HUB_OFFLINE:
            error.__cause__ = OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        if constants.HF_HUB_OFFLINE or self.hub.get("local_files_only"):
            raise self.refused(error, self.name)

    def download(self, **options: Any) -> Path:
        """Fetch it into the cache; a part that is there is completed.

        Args:
            **options: `tqdm_class` of huggingface_hub.

        Raises:
            SourceError: it cannot be had.
        """
        try:
            return Path(hf_hub_download(self.repo, self.name, revision=self.commit, **self.hub, **options))
        except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
            raise self.refused(error, self.name) from error

    def read(self, begin: int, end: int) -> bytearray:
        """Read the bytes from `begin` to before `end`, piece by piece; huggingface_hub repeats what breaks off.

        Raises:
            SourceError: they cannot be had.
        """
        self.check_allowed()
        values, done, failures = bytearray(end - begin), 0, 0
        while done < len(values):
            try:
                piece = self._piece(begin + done, min(end, begin + done + _PIECE))
            except (httpx2.HTTPError, OSError, ValueError) as error:
                raise self.refused(error, self.name) from error
            values[done : done + len(piece)] = piece
            done, failures = done + len(piece), 0 if piece else failures + 1
            if failures > 1:  # one expired link is no failure yet
                error = httpx2.RemoteProtocolError(f"it ended after {done} of {len(values)} bytes")
                raise self.refused(error, self.name)
        return values

    def _piece(self, begin: int, end: int) -> bytes:
        """Ask for a range; the answer may be shorter, and is empty if the link that was used has expired."""
        asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        direct = self._direct
        url = direct or hf_hub_url(self.repo, self.name, revision=self.commit)
        headers = asked if direct else {**build_hf_headers(token=self.hub.get("token")), **asked}
        response = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        if direct and response.is_client_error:
            self._direct = None
            return b""
        hf_raise_for_status(response)
        self._check_range(response, begin)
        if response.url.host != httpx2.URL(constants.ENDPOINT).host:
            self._direct = str(response.url)
        return response.content[: end - begin]

    def _check_range(self, response: httpx2.Response, begin: int) -> None:
        """Refuse an answer that is not of the range that was asked for, or is of a file of another length."""
        told = response.headers.get("Content-Range", "")
        first, total = told.removeprefix("bytes ").partition("-")[0], told.rpartition("/")[2]
        if response.status_code != 206 or first != str(begin):
            raise ValueError(f"its server does not read parts of files: it answered {response.status_code} {told}")
        if total != str(self.size):
            raise ValueError(f"it has {total} bytes, and the Hub lists {self.size}")

    def header(self) -> bytes:
        """Read the file's beginning, up to its first tensor; it is kept, as a commit never changes.

        Raises:
            SourceError: it cannot be had, or is none.
        """
        kept = self._kept()
        if kept is not None and kept.is_file():
            return kept.read_bytes()
        begin = self.read(0, min(self.size, _FIRST))
        length = int.from_bytes(begin[:8], "little")
        try:
            check_header_size(length, self.size)
        except ValueError as error:
            raise not_whole(self.label, error) from None
        whole = length + 8
        content = bytes(begin[:whole] if whole <= len(begin) else begin + self.read(len(begin), whole))
        if kept is not None:
            _keep(kept, content)
        return content

    def _kept(self) -> Path | None:
        """Say where the header is kept, in the cache that was asked for; nowhere if there is no such place."""
        cache = self.hub.get("cache_dir")
        place = Path(cache) / "assets" if cache else None
        try:
            folder = cached_assets_path("hf_merge", namespace="headers", subfolder=self.repo, assets_dir=place)
        except OSError:
            return None
        return folder / self.commit / f"{self.name.replace('/', '--')}.header"


def _keep(path: Path, content: bytes) -> None:
    """Write a file at once or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return


class RemoteSafetensors:
    """A safetensors file of the Hub as a file of weights.

    Args:
        remote: the file.
        streamed: whether its tensors will be read by range, and not from the cache.

    Attributes:
        read: how a tensor is had: by range, until something better is put in its place.
    """

    shared: Mapping[str, str] = {}

    def __init__(self, remote: RemoteFile, *, streamed: bool):
        self.remote, self.streamed = remote, streamed
        header = remote.header()
        self.begin = len(header)
        self.places = checked_places(header, remote.size, remote.label)
        self.metadata: Mapping[str, str] = json.loads(header[8:]).get("__metadata__") or {}
        self.read: Callable[[str], Tensor] = self.read_range

    def specs(self) -> dict[str, TensorSpec]:
        return {name: place.spec for name, place in self.places.items()}

    def tensor(self, name: str) -> Tensor:
        return self.read(name)

    def read_range(self, name: str) -> Tensor:
        """Read one tensor by range."""
        place = self.places[name]
        return place.view(self.read_bytes(place.begin, place.end))

    def read_run(self, name: str, begin: int, end: int) -> Tensor:
        """Read the elements of a tensor from `begin` to before `end`, in row-major order."""
        place, size = self.places[name], self.places[name].spec.dtype.itemsize
        values = self.read_bytes(place.begin + begin * size, place.begin + end * size)
        return values.view(place.spec.dtype)

    def read_bytes(self, begin: int, end: int) -> Tensor:
        """Read bytes, counted from the end of the header."""
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self.remote.read(self.begin + begin, self.begin + end), dtype=torch.uint8)

    def fetch(self, **options: Any) -> Safetensors:
        """Bring the whole file into the cache, and read from there from now on."""
        here = Safetensors(self.remote.download(**options))
        self.read = here.tensor
        return here

    def samples(self, name: str) -> list[bytes]:
        """Read some bytes of a tensor, evenly spread."""
        place = self.places[name]
        last = max(place.end - place.begin - _SAMPLE, 0)
        starts = sorted({place.begin + last * n // (_SAMPLES - 1) for n in range(_SAMPLES)})
        return [bytes(self.remote.read(self.begin + at, self.begin + min(at + _SAMPLE, place.end))) for at in starts]
