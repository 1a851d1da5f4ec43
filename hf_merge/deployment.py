"""Serving a merged model: what fits it, as exact commands and requests; asked for in earnest, one of them is sent."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_merge import _compat
from hf_merge.errors import MergeError, did_you_mean
from hf_merge.jobs import SECRET, Request, in_dollars, job_price, jobs_url, refusal, start_job
from hf_merge.sources.cards import CARD
from hf_merge.sources.checkpoint import read_json

Target = Literal["commands", "job", "endpoint", "space"]
VLLM = "vllm/vllm-openai:v0.23.0"
TEI = "ghcr.io/huggingface/text-embeddings-inference:cpu-1.8"
PORT = 8000
_EMBEDDING_TASKS = {"sentence-similarity", "feature-extraction"}
_GENERATING_TASKS = {"text-generation", "image-text-to-text"}
_EXAMPLE = {"image": "image.png", "audio": "audio.wav", "automatic-speech-recognition": "audio.wav"}
_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Served:
    """What of a model decides how it is served.

    Attributes:
        name: its id on the Hub, or a folder.
        kind: a language model, embeddings, a classifier of texts, or another of transformers' pipelines.
        task: the Hub's word for what it does.
        revision: its commit on the Hub.
        size: bytes of its weights; None if that is not known.
        custom_code: whether it needs code of its own.
        restricted: whether a token is needed to read it.
    """

    name: str
    kind: Literal["language", "embedding", "text classifier", "pipeline"]
    task: str
    revision: str | None = None
    size: int | None = None
    custom_code: bool = False
    restricted: bool = False


@dataclass(frozen=True)
class Deployment:
    """How a model is served.

    Attributes:
        model: what is served.
        to: where.
        commands: by the name of the server, what to type.
        request: what starts it on the Hub.
        files: of the Space.
        price: US dollars an hour while it runs; None if there is none or it is not known.
        hardware: what it runs on.
        notes: what else to know, and what is not possible.
        url: of what was started; None if nothing was.
    """

    model: Served
    to: Target
    commands: Mapping[str, str] = field(default_factory=dict)
    request: Request | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    price: float | None = None
    hardware: str | None = None
    notes: Sequence[str] = ()
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        request = {"url": self.request.url, "payload": self.request.payload} if self.request else None
        return {
            "model": vars(self.model), "to": self.to, "commands": dict(self.commands), "request": request,
            "files": dict(self.files), "hardware": self.hardware, "usd_per_hour": self.price,
            "notes": list(self.notes), "url": self.url,
        }  # fmt: skip

    def __str__(self) -> str:
        parts = [f"# {name}\n{command}" for name, command in self.commands.items()]
        parts += [str(self.request)] if self.request else []
        parts += [f"# {name}\n{text.rstrip()}" for name, text in self.files.items()]
        parts += [f"Price: {in_dollars(self.price)} on {self.hardware}"] if self.hardware else []
        parts += [f"Note: {note}" for note in self.notes]
        if self.to != "commands":
            parts.append(f"Started: {self.url}" if self.url else "Nothing was started.")
        return "\n\n".join(parts)


def deploy(
    repo_id: str,
    to: Target = "commands",
    *,
    dry_run: bool = True,
    hardware: str | None = None,
    name: str | None = None,
    namespace: str | None = None,
    timeout: str | int = "1h",
    private: bool = True,
    trust_remote_code: bool = False,
    token: str | None = None,
) -> Deployment:
    """Serve a merged model: say how, and if asked in earnest, start it.

        print(hf_merge.deploy("me/merged"))                                       # commands for one's own machine
        hf_merge.deploy("me/merged", to="job", hardware="a10g-small", dry_run=False)

    Args:
        repo_id: the model on the Hub; for commands also a folder.
        to: `commands` for vLLM, SGLang, transformers, llama.cpp and Ollama, or what else fits the model; a `job` that
            serves for a while; an inference `endpoint`; a `space` with a demo.
        dry_run: start nothing.
        hardware: a flavor of Jobs (`a10g-small`), or an id that `hf endpoints hardware` lists; what fits if not given.
        name: of the endpoint or Space.
        namespace: the account that owns and pays it; that of the token if not given.
        timeout: after which a job is stopped.
        private: of a Space.
        trust_remote_code: run code that came with the model, for models that need it.
        token: that of `hf auth login` if not given.

    Raises:
        MergeError: nothing serves the model there, or the Hub refuses.
    """
    if to not in get_args(Target):
        raise MergeError(f"There is no '{to}' to deploy to.{did_you_mean(to, get_args(Target))} There is: "
                         f"{', '.join(get_args(Target))}.")  # fmt: skip
    token = token or get_token()
    model = look_at(repo_id, token)
    if model.custom_code and not trust_remote_code:
        raise MergeError(
            f"'{repo_id}' runs code of its own: read it, then pass trust_remote_code=True (--trust-remote-code)."
        )
    if to == "commands":
        return Deployment(model, to, commands(model), notes=_notes(model))
    if model.revision is None:
        raise MergeError(f"'{repo_id}' is a folder here: push it first, then deploy it by its id.")
    if token is None and not dry_run:
        raise MergeError("Starting something needs a token: pass token= (--token), HF_TOKEN, or run `hf auth login`.")
    if to == "job":
        return _job(model, dry_run=dry_run, flavor=hardware, namespace=namespace, timeout=timeout, token=token)
    if to == "endpoint":
        return _endpoint(model, dry_run=dry_run, hardware=hardware, name=name, namespace=namespace, token=token)
    return _space(model, dry_run=dry_run, name=name, namespace=namespace, private=private, token=token)


def look_at(repo_id: str, token: str | None = None) -> Served:
    """Find out what kind of model this is: from its config and card, not from its weights.

    Raises:
        MergeError: it cannot be seen, or nothing is known that would serve it.
    """
    folder = Path(repo_id).expanduser()
    found = _in_folder(repo_id, folder) if folder.is_dir() else _on_hub(repo_id, token)
    kind = _kind(found["task"], found["library"])
    if kind is None:
        raise MergeError(
            f"Nothing is known that serves '{repo_id}': its card names no pipeline_tag, and its config no class that "
            "has one. Load it with transformers or safetensors."
        )
    told = {key: value for key, value in found.items() if key != "library"}
    return Served(repo_id, kind, **{**told, "task": found["task"] or "sentence-similarity"})


def commands(model: Served) -> dict[str, str]:
    """Write what to type to serve a model on one's own machine, by the name of the server."""
    name = model.name
    pinned = ["--revision", model.revision] if model.revision else []
    code = ["--trust-remote-code"] if model.custom_code else []
    if model.kind == "language":
        found = {
            "vLLM": shlex.join(["vllm", "serve", name, *pinned, *code]),
            "SGLang": shlex.join(["python", "-m", "sglang.launch_server", "--model-path", name, *pinned, *code]),
            "transformers (pip install 'transformers[serving]')": shlex.join(
                ["transformers", "serve", f"{name}@{model.revision}" if pinned else name, *code]
            ),
        }
        return found | (_gguf(model) if model.task == "text-generation" else {})
    found = {"transformers": _pipeline_line(model)}
    if model.kind in ("embedding", "text classifier"):
        secret = ["-e", "HF_TOKEN"] if model.restricted else []
        where = ["-v", f"{Path(name).resolve()}:/model"] if model.revision is None else []
        wanted = ["--model-id", "/model" if where else name, *pinned]
        docker = shlex.join(["docker", "run", "-p", "8080:80", *secret, *where, TEI, *wanted])
        vllm = shlex.join(["vllm", "serve", name, "--runner", "pooling", *pinned, *code])
        found = {"Text Embeddings Inference": docker, "vLLM": vllm, **found}
    return found


def _gguf(model: Served) -> dict[str, str]:
    """Convert with llama.cpp; Ollama then runs what is on the Hub."""
    short = model.name.rstrip("/").split("/")[-1]
    on_hub = model.revision is not None
    fetch = [shlex.join(["hf", "download", model.name, "--revision", str(model.revision), "--local-dir", short])]
    source, file = short if on_hub else model.name, f"{short}-Q8_0.gguf"
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", source, "--outtype", "q8_0", "--outfile", file]
    lines = [*(fetch if on_hub else []), shlex.join(convert), shlex.join(["llama-server", "-m", file])]
    found = {"llama.cpp (in a folder with a checkout of it)": "\n".join(lines)}
    if on_hub:
        upload = shlex.join(["hf", "upload", f"{model.name}-GGUF", file])
        found["Ollama (after that)"] = f"{upload}\n" + shlex.join(["ollama", "run", f"hf.co/{model.name}-GGUF:Q8_0"])
    return found


def _pipeline_line(model: Served) -> str:
    code = ", trust_remote_code=True" if model.custom_code else ""
    pinned = f", revision={model.revision!r}" if model.revision else ""
    if model.kind == "embedding":
        made = f"from sentence_transformers import SentenceTransformer as S; print(S({model.name!r}{pinned}{code})"
        return shlex.join(["python", "-c", f"{made}.encode('a text'))"])
    example = next((file for word, file in _EXAMPLE.items() if model.task.startswith(word)), "a text")
    made = f"from transformers import pipeline; print(pipeline({model.task!r}, {model.name!r}{pinned}{code})"
    return shlex.join(["python", "-c", f"{made}({example!r}))"])


def _notes(model: Served) -> list[str]:
    told = ["Inference Providers serve models that the providers chose; a fresh merge is not among them."]
    if model.restricted:
        told.append("The model is private or gated: each of these needs a token that may read it, as HF_TOKEN.")
    if model.custom_code:
        told.append("The model runs code of its own: read it first.")
    return told


def _job(
    model: Served, *, dry_run: bool, flavor: str | None, namespace: str | None, timeout: str | int, token: Any
) -> Deployment:
    """Serve for a while, at an address that only those see who may see the job."""
    pinned = ["--revision", str(model.revision)]
    code = ["--trust-remote-code"] if model.custom_code else []
    if model.kind == "language":
        image, command = VLLM, ["vllm", "serve", model.name, *pinned, "--host", "0.0.0.0", "--port", str(PORT), *code]
    elif model.kind in ("embedding", "text classifier"):
        image, command = TEI, ["text-embeddings-router", "--model-id", model.name, *pinned, "--port", str(PORT)]
    else:
        raise MergeError(f"A job serves language models and encoders; for {model.task} take an endpoint or a space.")
    flavor = flavor or ("a10g-small" if model.kind == "language" else "cpu-upgrade")
    wanted = {"image": image, "command": command, "env": {}, "secrets": {"HF_TOKEN": SECRET}, "flavor": flavor,
              "timeout": str(timeout), "name": "hf-merge-serve", "expose": [PORT]}  # fmt: skip
    typed = ["hf", "jobs", "run", "--detach", "--expose", str(PORT), "--flavor", flavor, "--timeout", str(timeout),
             "-s", "HF_TOKEN", image, *command]  # fmt: skip
    told = [f"It answers at https://<job>--{PORT}.hf.jobs to who sends a token that may see the job, and ends after "
            f"{timeout} or with `hf jobs cancel <job>`.", *_fits(model, flavor)]  # fmt: skip
    found = Deployment(
        model, "job", {"or": shlex.join(typed)}, Request(jobs_url(namespace, token), _compat.job_payload(**wanted)),
        price=job_price(flavor, token), hardware=flavor, notes=told,
    )  # fmt: skip
    if dry_run:
        return found
    info = start_job(namespace=namespace, token=token, **{**wanted, "secrets": {"HF_TOKEN": token}})
    return replace(found, url=info.url)


def _endpoint(
    model: Served, *, dry_run: bool, hardware: str | None, name: str | None, namespace: str | None, token: Any
) -> Deployment:
    """Serve until it is taken away; it sleeps after a quarter of an hour without a request."""
    found, price = _hardware(model, hardware, namespace, token)
    wanted: dict[str, Any] = {
        "name": name or _endpoint_name(model.name), "repository": model.name, "revision": model.revision,
        "framework": "pytorch", "task": model.task, **{key: found[key] for key in _HARDWARE_KEYS},
        "min_replica": 0, "scale_to_zero_timeout": 15, "type": "authenticated",
    }  # fmt: skip
    if model.kind == "language":
        settings = {"tensorParallelSize": found["num_accelerators"]} if found["num_accelerators"] > 1 else {}
        wanted["framework"] = "custom"
        wanted["custom_image"] = {"vLLM": {"url": VLLM, "healthRoute": "/health", "port": 8000, **settings}}
        wanted |= {"container_args": ["--trust-remote-code"]} if model.custom_code else {}
    elif model.kind in ("embedding", "text classifier"):
        wanted["framework"] = "custom"
        wanted["custom_image"] = {"tei": {"url": TEI, "healthRoute": "/health", "port": 80}}
    url = f"{constants.INFERENCE_ENDPOINTS_ENDPOINT}/endpoint/{jobs_url(namespace, token).rpartition('/')[2]}"
    told = ["It costs while it is awake, and sleeps after 15 minutes without a request."]
    told += _fits(model, found["id"]) if price is None else []
    made = Deployment(
        model, "endpoint", request=Request(url, endpoint_payload(**wanted)), price=price, hardware=found["id"],
        notes=told,
    )  # fmt: skip
    if dry_run:
        return made
    try:
        HfApi(token=token).create_inference_endpoint(**wanted, namespace=namespace)
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise MergeError(refusal("the endpoint", error)) from error
    return replace(made, url=f"https://endpoints.huggingface.co/{url.rpartition('/')[2]}/endpoints/{wanted['name']}")


def endpoint_payload(**wanted: Any) -> dict[str, Any]:
    """Return the JSON that `HfApi.create_inference_endpoint` posts for the arguments used here."""
    scaling = {"maxReplica": 1, "minReplica": wanted["min_replica"],
               "scaleToZeroTimeout": wanted["scale_to_zero_timeout"]}  # fmt: skip
    size = {"instanceSize": wanted["instance_size"], "instanceType": wanted["instance_type"]}
    model = {"framework": wanted["framework"], "repository": wanted["repository"], "revision": wanted["revision"],
             "image": wanted.get("custom_image", {"huggingface": {}}), "task": wanted["task"]}  # fmt: skip
    return {
        "compute": {"accelerator": wanted["accelerator"], **size, "scaling": scaling},
        "model": model | ({"args": wanted["container_args"]} if "container_args" in wanted else {}),
        "name": wanted["name"],
        "provider": {"region": wanted["region"], "vendor": wanted["vendor"]},
        "type": wanted["type"],
    }


_HARDWARE_KEYS = ("vendor", "region", "accelerator", "instance_type", "instance_size")
_USUAL = {
    "gpu": ("aws", "us-east-1", "gpu", "nvidia-l4", "x1"),
    "cpu": ("aws", "us-east-1", "cpu", "intel-icl", "x2"),
}
"""What huggingface_hub's documentation shows; taken where the list of hardware cannot be had."""


def _hardware(
    model: Served, wanted: str | None, namespace: str | None, token: Any
) -> tuple[dict[str, Any], float | None]:
    """Choose the cheapest hardware that the model fits on, or what was asked for; with its price if that is known."""
    kind = "gpu" if model.kind == "language" else "cpu"
    try:
        listed = {one.id: one for one in HfApi(token=token).list_inference_endpoints_hardware(namespace=namespace)}
    except (httpx2.HTTPError, OSError, ValueError, KeyError):
        words = dict(zip(_HARDWARE_KEYS, _named(wanted) or _USUAL[kind], strict=True))
        count = words["instance_size"].removeprefix("x") if words["accelerator"] == "gpu" else "1"
        return {
            **words,
            "id": "-".join(v for k, v in words.items() if k != "accelerator"),
            "num_accelerators": int(count),
        }, None
    if wanted is not None and wanted not in listed:
        raise MergeError(f"Inference Endpoints have no hardware '{wanted}'.{did_you_mean(wanted, listed)} "
                         "`hf endpoints hardware` lists it.")  # fmt: skip
    need = _memory(model) / 1e9
    fitting = [one for one in listed.values() if one.accelerator == kind and one.status == "available"
               and ((one.gpu_memory_gb if kind == "gpu" else one.memory_gb) or 0) >= need]  # fmt: skip
    if wanted is None and not fitting:
        raise MergeError(f"No hardware of Inference Endpoints has {need:.0f} GB for '{model.name}' and is free: "
                         "name some with hardware= (--hardware).")  # fmt: skip
    chosen = listed[wanted] if wanted else min(fitting, key=lambda one: (one.price_per_hour, one.id))
    return {**vars(chosen)}, chosen.price_per_hour


def _named(wanted: str | None) -> tuple[str, ...] | None:
    """Read `aws-us-east-1-nvidia-l4-x1` without the list that it is from."""
    found = re.fullmatch(r"([a-z]+)-([a-z]+(?:-[a-z]+)?-?\d+)-(.+)-(x\d+)", wanted or "")
    if wanted and found is None:
        raise MergeError(f"'{wanted}' names no hardware of Inference Endpoints: `hf endpoints hardware` lists it.")
    if found is None:
        return None
    accelerator = "gpu" if found[3].startswith(("nvidia", "amd-mi")) else "cpu"
    return found[1], found[2], accelerator, found[3], found[4]


def _memory(model: Served) -> float:
    """Estimate the bytes that serving takes: the weights, a fifth more, and room to work in."""
    return 1.2 * (model.size or 0) + 1e9


def _fits(model: Served, hardware: str) -> list[str]:
    if model.size is None:
        return [f"The size of the weights is not known here: see that they fit on {hardware}."]
    return [f"It takes about {_memory(model) / 1e9:.0f} GB of memory, and whether {hardware} has that was not checked."]


def _endpoint_name(repo_id: str) -> str:
    """Make a name that Inference Endpoints take: 4 to 32 small letters, digits and hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", repo_id.split("/")[-1].lower()).strip("-")[:28].strip("-") or "merge"
    return name if len(name) >= 4 else f"merge-{name}"


def _space(
    model: Served, *, dry_run: bool, name: str | None, namespace: str | None, private: bool, token: Any
) -> Deployment:
    """Show the model in a Space of ten lines."""
    short = name or f"{model.name.split('/')[-1]}-demo"
    owner = namespace or jobs_url(None, token).rpartition("/")[2]
    repo_id = short if "/" in short else f"{owner}/{short}"
    files = space_files(model)
    payload = {"name": repo_id.split("/")[1], "organization": repo_id.split("/")[0],
               "visibility": "private" if private else "public", "type": "space", "sdk": "gradio"}  # fmt: skip
    told = ["A Space runs on the hardware that its account has for nothing, unless its settings say otherwise."]
    if model.restricted:
        told.append("The model is private or gated: give the Space a token that may read it, as its secret HF_TOKEN.")
    made = Deployment(
        model, "space", request=Request(f"{constants.ENDPOINT}/api/repos/create", payload), files=files, notes=told
    )
    if dry_run:
        return made
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private)
        api.create_commit(repo_id, operations, repo_type="space", commit_message=f"A demo of {model.name}")
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise MergeError(refusal(f"the Space '{repo_id}'", error)) from error
    return replace(made, url=str(url))


def space_files(model: Served) -> dict[str, str]:
    """Write the files of a Space that shows a model."""
    code = ", trust_remote_code=True" if model.custom_code else ""
    named = f"{model.name!r}, revision={model.revision!r}{code}"
    front = {"title": model.name.split("/")[-1], "sdk": "gradio", "app_file": "app.py", "models": [model.name]}
    if model.kind == "embedding":
        app, needs = _SIMILARITY.format(named=named, title=model.name), ["sentence-transformers"]
    elif model.task == "text-generation":
        app, needs = _CHAT.format(named=named, title=model.name), ["accelerate", "torch", "transformers"]
    else:
        app = _PIPELINE.format(task=model.task, named=named, title=model.name)
        needs = ["accelerate", "pillow", "torch", "torchvision", "transformers"]
    return {
        CARD: f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\nA demo of [{model.name}]"
              f"(https://huggingface.co/{model.name}).\n",
        "requirements.txt": "".join(f"{need}\n" for need in needs),
        "app.py": app,
    }  # fmt: skip


_CHAT = """import gradio as gr
from transformers import pipeline

generate = pipeline("text-generation", {named}, device_map="auto")


def answer(message, history):
    said = [*history, {{"role": "user", "content": message}}]
    said = [{{"role": one["role"], "content": words(one["content"])}} for one in said]
    given = said if generate.tokenizer.chat_template else message
    return generate(given, max_new_tokens=512, return_full_text=False)[0]["generated_text"]


def words(content):
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


gr.ChatInterface(answer, title="{title}").launch()
"""
_SIMILARITY = """import gradio as gr
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({named})


def similarity(one, other):
    return float(model.similarity(*model.encode([one, other])))


gr.Interface(similarity, ["text", "text"], "number", title="{title}").launch()
"""
_PIPELINE = """import gradio as gr
from transformers import pipeline

gr.Interface.from_pipeline(pipeline("{task}", {named}), title="{title}").launch()
"""


def _on_hub(repo_id: str, token: str | None) -> dict[str, Any]:
    try:
        validate_repo_id(repo_id)
        info = HfApi(token=token).model_info(repo_id)
    except HFValidationError:
        raise MergeError(f"'{repo_id}' is no folder, and it cannot be the id of a model on the Hub.") from None
    except RepositoryNotFoundError as error:
        raise MergeError(
            f"There is no '{repo_id}' on the Hub that you may see: push it first, or pass a token."
        ) from error
    except (httpx2.HTTPError, OSError, ValueError) as error:
        raise MergeError(refusal(f"a look at '{repo_id}'", error)) from error
    config = info.config or {}
    counts = info.safetensors.parameters if info.safetensors else {}
    return {
        "task": info.pipeline_tag or _task(config), "library": info.library_name, "revision": info.sha,
        "size": sum(_BYTES.get(dtype, 2) * count for dtype, count in counts.items()) or None,
        "custom_code": bool(config.get("auto_map")), "restricted": bool(info.private or info.gated),
    }  # fmt: skip


def _in_folder(repo_id: str, folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    library = "sentence-transformers" if (folder / "modules.json").is_file() else None
    return {"task": _task(config), "library": library, "size": weights or None, "custom_code": "auto_map" in config}


def _task(config: Mapping[str, Any]) -> str | None:
    architecture = next(iter(config.get("architectures") or ()), None)
    return _compat.pipeline_tag(architecture) if architecture else None


def _kind(task: str | None, library: str | None) -> Any:
    if library == "sentence-transformers" or task in _EMBEDDING_TASKS:
        return "embedding"
    if task in _GENERATING_TASKS:
        return "language"
    return "text classifier" if task == "text-classification" else "pipeline" if task else None
