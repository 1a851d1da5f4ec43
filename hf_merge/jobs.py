"""A merge on Hugging Face Jobs: the request that starts it, from a recipe whose models are on the Hub.

The job gets the recipe with the commit of every model, and these commits mounted, read-only, where its cache would have
them: nothing is downloaded, and recipe and card name ids and commits as everywhere else. It pushes the result itself,
with a token that is sent as a secret.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import HfApi, JobInfo, Volume, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_merge import _compat
from hf_merge.errors import MergeError, RecipeError, did_you_mean
from hf_merge.recipe import Recipe
from hf_merge.sources import download, with_bases
from hf_merge.types import InMemory, ModelRef, Ref

MODELS = "/models"
"""The job's HF_HUB_CACHE, in which the models are mounted."""

MAX_RECIPE = 100_000
"""Bytes; the recipe travels as an environment variable, and Linux takes 128 kB in one."""

SECRET = "<token>"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Request:
    """A request to the Hub, word for word, but for secrets.

    Attributes:
        url: where it is posted.
        payload: its JSON; secrets read `<token>`.
    """

    url: str
    payload: Mapping[str, Any]

    def __str__(self) -> str:
        return f"POST {self.url}\n{json.dumps(self.payload, indent=2, ensure_ascii=False)}"


@dataclass(frozen=True)
class MergeJob:
    """A merge that a job does, asked for or only described.

    Attributes:
        request: what starts the job.
        recipe: what it merges, with the commit of every model.
        price: US dollars an hour; None if the Hub could not be asked.
        seconds: after which the job is stopped, finished or not.
        info: the job; None if none was started.
    """

    request: Request
    recipe: Recipe
    price: float | None
    seconds: float
    info: JobInfo | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        started = {"job": self.info.id, "page": self.info.url} if self.info else {"job": None}
        return {"url": self.request.url, "payload": self.request.payload, "usd_per_hour": self.price, **started}

    def __str__(self) -> str:
        flavor = self.request.payload["flavor"]
        limit = "" if self.price is None else f"; at most {self.price * self.seconds / 3600:.2f}, when it is stopped"
        price = f"{in_dollars(self.price)} on {flavor}{limit}"
        return f"{self.request}\nPrice: {price}\n" + (
            f"Started: {self.info.url}" if self.info else "Nothing was started."
        )


def run_merge_job(
    recipe: Any,
    push_to_hub: str,
    *,
    flavor: str = "cpu-upgrade",
    dry_run: bool = False,
    timeout: str | int = "2h",
    namespace: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    exist_ok: bool = False,
    max_shard_size: int | str | None = None,
    package: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **changes: Any,
) -> MergeJob:
    """Merge models of the Hub on Hugging Face Jobs, and push the result from there.

        run_merge_job("recipe.yaml", "me/merged", flavor="cpu-upgrade", dry_run=True)

    Args:
        recipe: as for `merge`; every model in it is on the Hub.
        push_to_hub: id of the repository that the job pushes to.
        flavor: of the hardware, as `hf jobs hardware` lists them.
        dry_run: say what would be sent and what it costs, and start nothing.
        timeout: after which the job is stopped: seconds, or `90m`, `2h`, `1d`.
        namespace: the account that runs and pays the job; that of the token if not given.
        private, create_pr, exist_ok: of the push.
        max_shard_size: of the result's files.
        package: what the job installs, as pip names it; this version of hf_merge from PyPI if not given.
        token: it reads the models, starts the job, and pushes; that of `hf auth login` if not given.
        cache_dir: where the configs of the models are kept, from which commits are known.
        **changes: fields of the recipe or parameters of the method.

    Raises:
        RecipeError: the recipe cannot be meant, or names models that are not on the Hub.
        SourceError: a model on the Hub cannot be read.
        MergeError: there is no token, no such flavor, or the Hub does not take the job.
    """
    seconds = _seconds(timeout)
    token = token or get_token()
    if token is None and not dry_run:
        raise MergeError("A job needs a token to push with: pass token= (--token), HF_TOKEN, or run `hf auth login`.")
    loaded = Recipe.load(recipe, **changes)
    if loaded.measured:
        raise RecipeError(f"A job reads no statistics, and the recipe names '{loaded.measured[0]}': merge here.")
    pinned = pin(loaded, token=token, cache_dir=cache_dir)
    options = {"private": private, "create-pr": create_pr, "exist-ok": exist_ok, "max-shard-size": max_shard_size}
    wanted = {
        "image": _compat.uv_image(),
        "command": _command(push_to_hub, package or f"hf-merge=={importlib.metadata.version('hf_merge')}", options),
        "env": _environment(pinned),
        "secrets": {"HF_TOKEN": SECRET},
        "flavor": flavor,
        "timeout": str(timeout),
        "name": "hf-merge",
        "volumes": volumes(pinned),
    }
    request = Request(jobs_url(namespace, token), _compat.job_payload(**wanted))
    found = MergeJob(request, pinned, job_price(flavor, token), seconds)
    if dry_run:
        return found
    info = start_job(namespace=namespace, token=token, **{**wanted, "secrets": {"HF_TOKEN": token}})
    return MergeJob(request, pinned, found.price, seconds, info)


def pin(recipe: Recipe, **hub: Any) -> Recipe:
    """Return a recipe with the commit of every model, all of which have to be on the Hub.

    Args:
        recipe: whose models are ids of the Hub.
        **hub: token and cache_dir; configs are fetched, so that access is known too.
    """
    models = _on_hub_only(_models(recipe))
    commits = {part: _pinned(part, **hub) for model in models for part in _refs(model)}
    alone = [model for model in models if _refs(model) == [model] and _is_adapter(commits[model], **hub)]
    if alone:
        return pin(recipe.renamed(with_bases(alone, {}, **hub)), **hub)
    return recipe.renamed({model: _joined([commits[part] for part in _refs(model)]) for model in models})


def _on_hub_only(models: list[Ref]) -> list[Ref]:
    if elsewhere := [str(model) for model in models if not all(_on_hub(part) for part in _refs(model))]:
        raise RecipeError(
            f"A job sees models on the Hub only, and these are not there: {', '.join(elsewhere)}. "
            "Push them first (`hf upload`), and name them by their ids."
        )
    return models


def volumes(recipe: Recipe) -> list[Volume]:
    """Mount every model of a pinned recipe where a cache at MODELS would have it."""
    parts = dict.fromkeys(part for model in _models(recipe) for part in _refs(model))
    return [
        Volume(
            type="model", source=part.path, revision=part.revision, read_only=True,
            mount_path=f"{MODELS}/{_compat.cache_folder(part.path)}/snapshots/{part.revision}",
        )
        for part in parts
    ]  # fmt: skip


def jobs_url(namespace: str | None, token: str | None) -> str:
    """Return where a job of an account is posted."""
    if namespace is None:
        try:
            namespace = HfApi(token=token).whoami()["name"]
        except (httpx2.HTTPError, OSError, ValueError):
            namespace = "<namespace>"
    return f"{constants.ENDPOINT}/api/jobs/{namespace}"


def job_price(flavor: str, token: str | None) -> float | None:
    """Return what an hour of some hardware costs in US dollars; None if the Hub cannot be asked.

    Raises:
        MergeError: the Hub has no such hardware.
    """
    try:
        hardware = {one.name: one for one in HfApi(token=token).list_jobs_hardware()}
    except (httpx2.HTTPError, OSError, ValueError, KeyError):
        return None
    if flavor not in hardware:
        raise MergeError(
            f"Hugging Face Jobs have no hardware '{flavor}'.{did_you_mean(flavor, hardware)} There is: "
            f"{', '.join(hardware)}."
        )
    hours = {"second": 3600, "minute": 60, "hour": 1}.get(hardware[flavor].unit_label)
    return None if hours is None else hardware[flavor].unit_cost_usd * hours


def start_job(*, token: str | None, **wanted: Any) -> JobInfo:
    """Start a job.

    Raises:
        MergeError: the Hub does not take it, and why.
    """
    try:
        return HfApi(token=token).run_job(**wanted)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise MergeError(refusal("the job", error)) from error


def refusal(what: str, error: Exception) -> str:
    """Say why the Hub did not do something."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"The Hub was not asked for {what}: HF_HUB_OFFLINE forbids it."
    response = getattr(error, "response", None)
    if response is None:
        return (
            f"The Hub at {constants.ENDPOINT} cannot be reached for {what} ({_first_line(error)}): check the network."
        )
    said = getattr(error, "server_message", None) or response.reason_phrase
    advice = {
        401: "pass a token that is valid (--token, token=, HF_TOKEN or `hf auth login`)",
        402: "add credit to the account that pays, or name another one",
        403: "pass a token that may do that",
    }.get(response.status_code, "run it again later, or change what is asked for")
    return f"The Hub did not take {what} ({response.status_code}: {said.strip().rstrip('.')}): {advice}."


def in_dollars(price: float | None) -> str:
    """Write a price for people."""
    return "unknown" if price is None else f"{price:.2f} USD an hour"


def _command(repo_id: str, package: str, options: Mapping[str, Any]) -> list[str]:
    """Write the recipe into a file, and merge it as anybody would; its models are read from the mounts only."""
    flags = [
        word
        for name, value in options.items()
        if value
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    merge = ["hf-merge", "merge", "recipe.yaml", "--push-to-hub", repo_id, "--local-files-only", *flags]
    run = shlex.join(["uv", "run", "--with", package, *merge])
    return ["sh", "-c", f'printf %s "$HF_MERGE_RECIPE" > recipe.yaml && exec {run}']


def _environment(recipe: Recipe) -> dict[str, str]:
    text = recipe.to_yaml()
    if len(text.encode()) > MAX_RECIPE:
        raise RecipeError(f"A job takes a recipe of at most {MAX_RECIPE} bytes, and this one has {len(text.encode())}.")
    # Many page faults at a time on a mounted repository have made processes hang: one thread reads at a time.
    return {"HF_MERGE_RECIPE": text, "HF_HUB_CACHE": MODELS, "OMP_NUM_THREADS": "1"}


def _models(recipe: Recipe) -> list[Ref]:
    """List every model that a recipe and its stages name, once; stages are none."""
    stages = {str(stage.name) for stage in recipe.stages}
    return list(
        dict.fromkeys(model for part in (recipe, *recipe.stages) for model in _named(part) if str(model) not in stages)
    )


def _named(recipe: Recipe) -> Iterator[Ref]:
    yield from recipe.references
    if recipe.vocabulary is not None and not isinstance(recipe.vocabulary.source, str):
        yield recipe.vocabulary.source


def _refs(model: Ref) -> list[Any]:
    """A model without its adapters, and the adapters."""
    if isinstance(model, InMemory):
        return [model]
    return model.parts


def _joined(parts: list[ModelRef]) -> ModelRef:
    return parts[0].with_lora(*parts[1:])


def _on_hub(part: Any) -> bool:
    """Tell whether a model can only be meant as an id of the Hub."""
    if isinstance(part, InMemory) or os.path.exists(os.path.expanduser(part.path)):
        return False
    try:
        validate_repo_id(part.path)
    except HFValidationError:
        return False
    return True


def _pinned(part: ModelRef, **hub: Any) -> ModelRef:
    """Find the commit of a model, and whether it may be read."""
    folder = download(part, only=["config.json", "adapter_config.json"], **hub)
    return ModelRef(path=part.path, revision=folder.name, weight=part.weight)


def _is_adapter(part: ModelRef, **hub: Any) -> bool:
    return (download(part, only=["adapter_config.json"], **hub) / "adapter_config.json").is_file()


def _seconds(timeout: str | int) -> float:
    found = _DURATION.fullmatch(str(timeout))
    if found is None or not float(found[1]):
        raise MergeError(f"A job's timeout is a number of seconds, or like 90m, 2h or 1d; found '{timeout}'.")
    return float(found[1]) * _SECONDS[found[2]]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
