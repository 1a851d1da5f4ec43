"""Serving a merge: what is said to fit it, and that the real client sends what was shown."""

import ast
import json
import shlex

import pytest
import yaml

import hf_merge
from hf_merge.deployment import Served, commands, endpoint_payload, space_files
from hf_merge.errors import MergeError
from tests.hub.capture import Capture
from tests.hub.conftest import Account, error_line
from tests.hub.test_download import holds
from tests.hub.test_jobs import HARDWARE

pytestmark = pytest.mark.e2e

SHA = "5" * 40
DATE = "2026-01-01T00:00:00.000Z"
GPU = {
    "name": "a10g-small", "prettyName": "A10G", "cpu": "4 vCPU", "ram": "15 GB", "unitCostMicroUSD": 16667,
    "unitCostUSD": 0.016667, "unitLabel": "minute",
    "accelerator": {"type": "gpu", "model": "A10G", "quantity": "1", "vram": "24 GB", "manufacturer": "Nvidia"},
}  # fmt: skip


def compute(kind, instance, size, memory, price, status="available"):
    count = int(size.removeprefix("x"))
    return {"id": f"aws-us-east-1-{instance}-{size}", "accelerator": kind, "instanceType": instance,
            "instanceSize": size, "architecture": instance, "numAccelerators": count, "numCpus": 4, "memoryGb": memory,
            "gpuMemoryGb": memory if kind == "gpu" else None, "pricePerHour": price, "status": status,
            "quota": {"maxAccelerators": 4, "usedAccelerators": 0}}  # fmt: skip


COMPUTES = [
    compute("cpu", "intel-spr", "x2", 4, 0.07), compute("gpu", "nvidia-t4", "x1", 14, 0.5, "not_available"),
    compute("gpu", "nvidia-a100", "x1", 80, 2.5), compute("gpu", "nvidia-l4", "x1", 24, 0.8),
    compute("gpu", "nvidia-l4", "x4", 96, 3.8),
]  # fmt: skip


@pytest.fixture
def services():
    """A Hub with models, Jobs, Spaces and Inference Endpoints, and nothing behind it."""
    with Capture() as capture:
        models = {
            "llm": {"pipeline_tag": "text-generation", "library_name": "transformers", "private": True,
                    "safetensors": {"parameters": {"BF16": 8_000_000_000}, "total": 8_000_000_000}},
            "large": {"pipeline_tag": "text-generation",
                      "safetensors": {"parameters": {"BF16": 34_000_000_000}, "total": 34_000_000_000}},
            "minilm": {"pipeline_tag": "sentence-similarity", "library_name": "sentence-transformers"},
            "vit": {"config": {"architectures": ["ViTForImageClassification"]}},
            "own": {"pipeline_tag": "text-generation", "config": {"auto_map": {"AutoModel": "x.Y"}}},
            "tensors": {},
        }  # fmt: skip
        for name, info in models.items():
            capture.answers["GET", f"/api/models/me/{name}"] = {"id": f"me/{name}", "sha": SHA, **info}
        started = {"id": "j1", "owner": {"id": "o", "name": "me", "type": "user"}, "status": {"stage": "SCHEDULING"}}
        space = {
            "commitUrl": f"{capture.url}/spaces/me/llm-demo/commit/{SHA}",
            "commitOid": SHA,
            "pullRequestUrl": None,
        }
        regular = [{"path": path, "uploadMode": "regular", "shouldIgnore": False}
                   for path in ("README.md", "requirements.txt", "app.py")]  # fmt: skip
        capture.answers |= {
            ("GET", "/api/whoami-v2"): {"type": "user", "name": "me"},
            ("GET", "/api/jobs/hardware"): [*HARDWARE, GPU],
            ("POST", "/api/jobs/me"): started,
            ("GET", "/ie/provider/me"): {
                "vendors": [{"name": "aws", "regions": [{"name": "us-east-1", "computes": COMPUTES}]}]
            },
            ("POST", "/api/repos/create"): {"url": f"{capture.url}/spaces/me/llm-demo"},
            ("POST", "/api/validate-yaml"): {"errors": [], "warnings": []},
            ("POST", "/api/spaces/me/llm-demo/preupload/main"): {"files": regular},
            ("POST", "/api/spaces/me/llm-demo/commit/main"): space,
        }
        yield capture


@pytest.fixture
def deployed(account: Account, services):
    """Call deploy in a process of its own, as `me`."""

    def call(*words, **more):
        code = """
import huggingface_hub.constants as constants
constants.INFERENCE_ENDPOINTS_ENDPOINT = constants.ENDPOINT + '/ie'
import hf_merge
try:
    made = hf_merge.deploy(*words, **more)
    result = {**made.to_dict(), 'text': str(made)}
except hf_merge.MergeError as error:
    result = str(error)
"""
        done = account.python(
            code, token="hf_secret", environment={"HF_ENDPOINT": services.url}, words=words, more=more
        )
        assert "hf_secret" not in json.dumps(done) and not holds(account.home, "hf_secret")
        return done

    return call


def test_commands_are_those_that_fit_and_pin_the_commit(deployed, services):
    told = deployed("me/llm")
    assert told["commands"]["vLLM"] == f"vllm serve me/llm --revision {SHA}"
    assert told["commands"]["SGLang"] == f"python -m sglang.launch_server --model-path me/llm --revision {SHA}"
    assert told["commands"]["transformers (pip install 'transformers[serving]')"] == f"transformers serve me/llm@{SHA}"
    gguf = next(text for name, text in told["commands"].items() if name.startswith("llama.cpp")).splitlines()
    assert gguf == [
        f"hf download me/llm --revision {SHA} --local-dir llm",
        "python llama.cpp/convert_hf_to_gguf.py llm --outtype q8_0 --outfile llm-Q8_0.gguf",
        "llama-server -m llm-Q8_0.gguf",
    ]
    assert told["commands"]["Ollama (after that)"].splitlines() == [
        "hf upload me/llm-GGUF llm-Q8_0.gguf", "ollama run hf.co/me/llm-GGUF:Q8_0",
    ]  # fmt: skip
    assert "a fresh merge is not among them" in told["text"] and "private or gated" in told["text"]
    assert deployed("me/minilm")["commands"].keys() == {"Text Embeddings Inference", "vLLM", "transformers"}
    seen = deployed("me/vit")["commands"]
    assert seen.keys() == {"transformers"} and "pipeline('image-classification', 'me/vit'" in seen[
        "transformers"
    ].replace("'\"'\"'", "'")
    assert not services.posted()


def test_a_job_that_serves_is_sent_as_it_was_shown(deployed, services):
    shown = deployed("me/llm", "job")
    assert shown["url"] is None and shown["request"]["url"] == f"{services.url}/api/jobs/me" and not services.posted()
    assert shown["usd_per_hour"] == pytest.approx(1.0, abs=0.01) and shown["hardware"] == "a10g-small"
    done = deployed("me/llm", "job", dry_run=False)
    (sent,) = services.posted()
    assert sent.pop("secrets") == {"HF_TOKEN": "hf_secret"}
    assert shown["request"]["payload"].pop("secrets") == {"HF_TOKEN": "<token>"}
    assert sent == shown["request"]["payload"] and done["url"] == f"{services.url}/jobs/me/j1"
    assert sent["command"] == ["vllm", "serve", "me/llm", "--revision", SHA, "--host", "0.0.0.0", "--port", "8000"]
    assert sent["expose"] == {"ports": [8000], "portsPublic": []} and sent["timeoutSeconds"] == 3600
    assert deployed("me/minilm", "job")["request"]["payload"]["command"][0] == "text-embeddings-router"
    assert "take an endpoint or a space" in deployed("me/vit", "job")
    assert "have no hardware 'a10g-smal'. Did you mean 'a10g-small'?" in deployed("me/llm", "job", hardware="a10g-smal")


def test_the_line_for_hf_is_one_that_hf_reads(account: Account, deployed):
    told = deployed("me/llm", "job", timeout="90m")
    hf, *words = shlex.split(told["commands"]["or"])
    assert hf == "hf" and words[:2] == ["jobs", "run"]
    words.insert(2, "--dry-run")
    done = account.run("-m", "huggingface_hub.cli.hf", *words, "--format", "human", token="hf_secret")
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    payload = told["request"]["payload"]
    assert shown["command"] == " ".join(payload["command"]) and shown["image"] == payload["dockerImage"]
    assert (shown["flavor"], shown["timeout"], shown["expose"]) == ("a10g-small", "90m", "8000")


def test_an_endpoint_is_sent_as_it_was_shown(deployed, services):
    endpoint = {"name": "llm", "type": "authenticated", "provider": {}, "compute": {}, "healthRoute": "/health"}
    services.answers["POST", "/ie/endpoint/me"] = {
        **endpoint, "model": {"repository": "me/llm", "framework": "custom", "revision": SHA, "task": "t"},
        "status": {"state": "pending", "createdAt": DATE, "updatedAt": DATE},
    }  # fmt: skip
    shown = deployed("me/llm", "endpoint")
    assert shown["hardware"] == "aws-us-east-1-nvidia-l4-x1" and shown["usd_per_hour"] == 0.8, "the cheapest that fits"
    done = deployed("me/llm", "endpoint", dry_run=False)
    (sent,) = services.posted()
    assert sent == shown["request"]["payload"] and shown["request"]["url"] == f"{services.url}/ie/endpoint/me", done
    assert done["url"].endswith("/me/endpoints/merge-llm")
    assert sent["model"]["image"]["vLLM"]["port"] == 8000 and sent["compute"]["scaling"]["minReplica"] == 0
    large = deployed("me/large", "endpoint")
    assert large["hardware"] == "aws-us-east-1-nvidia-l4-x4"
    assert large["request"]["payload"]["model"]["image"]["vLLM"]["tensorParallelSize"] == 4
    assert "tei" in deployed("me/minilm", "endpoint")["request"]["payload"]["model"]["image"]
    seen = deployed("me/vit", "endpoint")["request"]["payload"]
    assert seen["model"]["image"] == {"huggingface": {}} and seen["compute"]["accelerator"] == "cpu"
    assert "no hardware 'aws'" in deployed("me/llm", "endpoint", hardware="aws")


def test_an_endpoint_whose_price_cannot_be_asked_says_so(deployed, services):
    del services.answers["GET", "/ie/provider/me"]
    told = deployed("me/llm", "endpoint", hardware="gcp-us-east4-nvidia-h100-x2")
    assert told["usd_per_hour"] is None and "Price: unknown on gcp-us-east4-nvidia-h100-x2" in told["text"]
    payload = told["request"]["payload"]
    assert payload["provider"] == {"vendor": "gcp", "region": "us-east4"} and payload["compute"]["instanceSize"] == "x2"
    assert payload["model"]["image"]["vLLM"]["tensorParallelSize"] == 2 and "about 20 GB of memory" in told["text"]
    assert deployed("me/llm", "endpoint")["hardware"] == "aws-us-east-1-nvidia-l4-x1"


def test_a_space_is_made_as_it_was_shown(deployed, services):
    shown = deployed("me/llm", "space")
    assert not services.posted() and shown["files"].keys() == {"README.md", "requirements.txt", "app.py"}
    assert "secret HF_TOKEN" in shown["text"]
    done = deployed("me/llm", "space", dry_run=False)
    assert isinstance(done, dict), done
    created, *_ = services.posted("/api/repos/create")
    assert created == shown["request"]["payload"] and created["visibility"] == "private"
    (commit,) = services.posted("/commit/main")
    assert commit[0]["value"]["summary"] == "A demo of me/llm"
    assert {line["value"]["path"] for line in commit[1:]} == shown["files"].keys()
    assert done["url"] == f"{services.url}/spaces/me/llm-demo"


@pytest.mark.parametrize(
    ("kind", "task"),
    [("language", "text-generation"), ("embedding", "sentence-similarity"), ("pipeline", "image-classification")],
)
def test_the_app_of_a_space_is_python_with_a_card_in_front(kind, task):
    files = space_files(Served("me/m", kind, task, revision=SHA))
    ast.parse(files["app.py"])
    assert SHA in files["app.py"] and len(files["app.py"].splitlines()) < 20
    front = yaml.safe_load(files["README.md"].split("---")[1])
    assert front == {"title": "m", "sdk": "gradio", "app_file": "app.py", "models": ["me/m"]}


def test_refusals_say_what_to_do(deployed, services):
    assert "Nothing is known that serves 'me/tensors'" in deployed("me/tensors")
    assert "read it, then pass trust_remote_code=True" in deployed("me/own")
    assert "--trust-remote-code" in deployed("me/own", trust_remote_code=True)["commands"]["vLLM"]
    assert "There is no 'endpont' to deploy to. Did you mean 'endpoint'?" in deployed("me/llm", "endpont")
    services.answers["GET", "/api/models/me/none"] = (401, {"code": "RepoNotFound"})
    assert "There is no 'me/none' on the Hub that you may see" in deployed("me/none")
    services.answers["POST", "/api/repos/create"] = (409, {"error": "it exists"})
    assert "(409: it exists)" in deployed("me/llm", "space", dry_run=False)


def test_the_command_line_prints_and_starts_only_when_told(account: Account, services):
    known = {"token": "hf_secret", "HF_ENDPOINT": services.url}
    done = account.cli("deploy", "me/llm", "--format", "human", **known)
    assert done.returncode == 0 and "vllm serve me/llm" in done.stdout, done.stderr
    done = account.cli("deploy", "me/llm", "--to", "job", "--json", **known)
    assert json.loads(done.stdout)["url"] is None and not services.posted()
    assert json.loads(account.cli("deploy", "me/llm", "--to", "job", "--start", "--json", **known).stdout)["url"]
    assert len(services.posted()) == 1
    refused = account.cli("deploy", "me/vit", "--to", "job", **known)
    assert refused.returncode == 1 and "take an endpoint or a space" in error_line(refused.stderr)
    alone = account.cli("deploy", "me/llm", "--to", "job", "--start", HF_ENDPOINT=services.url)
    assert alone.returncode == 1 and "needs a token" in error_line(alone.stderr)


def test_a_folder_has_commands_and_nothing_else(llamas, tmp_path):
    told = hf_merge.deploy(str(llamas["a"]))
    assert told.commands["vLLM"] == f"vllm serve {llamas['a']}" and "Ollama (after that)" not in told.commands
    assert told.model.task == "text-generation" and told.model.size
    with pytest.raises(MergeError, match="is a folder here: push it first"):
        hf_merge.deploy(str(llamas["a"]), "job")
    odd = tmp_path / "a b; rm"
    odd.mkdir()
    assert commands(Served(str(odd), "language", "text-generation"))["vLLM"] == f"vllm serve '{odd}'"


def test_transformers_still_serves_a_model_by_its_name_and_revision():
    words = pytest.importorskip("transformers.cli.serve").Serve.__init__.__annotations__
    assert "force_model" in words and "trust_remote_code" in words


def test_the_request_for_an_endpoint_needs_nothing_private():
    payload = endpoint_payload(
        name="n", repository="me/m", revision=SHA, framework="pytorch", task="t", vendor="aws", region="r",
        accelerator="cpu", instance_type="i", instance_size="x2", min_replica=0, scale_to_zero_timeout=15,
        type="public",
    )  # fmt: skip
    assert payload["model"]["image"] == {"huggingface": {}} and payload["provider"] == {"region": "r", "vendor": "aws"}
