"""What comes from the Hub, and when: headers to plan, files or tensors to merge, and nothing that is not needed."""

import hashlib
import json
import mmap
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_merge
from tests.hub.conftest import IMPATIENT, Account, both_ways
from tests.hub.server import Fault
from tests.hub.store import Blob
from tests.hub.test_download import weights

pytestmark = pytest.mark.e2e

# Code that merges and says how it went, in a process of its own.
MERGE = (
    IMPATIENT
    + """
import hf_merge
def merged(models, out, **more):
    try:
        hf_merge.merge(models, out, **{"method": "linear", **more})
    except hf_merge.MergeError as error:
        return f"{type(error).__name__}: {error}"
"""
)


class SparseBlob(Blob):
    """A file that is too large to be in memory, and that nobody is meant to read as a whole."""

    @property
    def sha256(self) -> str:  # type: ignore[override]
        return hashlib.sha256(self.content[:100_000]).hexdigest()


@pytest.fixture(scope="session")
def sharded(llamas, tmp_path_factory) -> dict[str, Path]:
    """The tiny Llamas in five shards or so."""
    folders = {}
    for name, folder in llamas.items():
        folders[name] = tmp_path_factory.mktemp("sharded") / name
        shutil.copytree(folder, folders[name])
        (folders[name] / "model.safetensors").unlink()
        save_torch_state_dict(load_file(folder / "model.safetensors"), folders[name], max_shard_size="20KB")
    assert len([*folders["a"].glob("*.safetensors")]) > 3
    return folders


def digests(folder: Path) -> dict[str, str]:
    """Return a digest of every file of weights, without the header's metadata."""
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return {name: hashlib.sha256(c[8 + int.from_bytes(c[:8], "little") :]).hexdigest() for name, c in files.items()}


def cached_weights(account: Account) -> set[str]:
    return {path.name for path in account.home.rglob("*.safetensors")}


def large_llama(folder: Path) -> Path:
    """Write a Llama of 1.1 billion parameters in three shards that take no room."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=32000, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        specs = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names, weight_map = list(specs), {}
    for number in range(3):
        file, end, header = f"model-{number + 1:05}-of-00003.safetensors", 0, {}
        for name in names[number * 67 : (number + 1) * 67]:
            begin, end = end, end + 2 * torch.Size(specs[name]).numel()
            header[name] = {"dtype": "BF16", "shape": specs[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def put_large(account: Account, name: str, folder: Path) -> None:
    """Put a model on the Hub whose weights stay on the disk."""
    small = folder.parent / f"{name}-small"
    shutil.copytree(folder, small, ignore=shutil.ignore_patterns("*.safetensors"))
    repo = account.put(name, small)
    files = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        files[path.name] = SparseBlob(content, large=True)  # type: ignore[arg-type]
    repo.add("main", {**repo.commit("main").files, **files}, "weights", account.name)


def test_a_plan_of_three_models_of_a_billion_parameters_takes_less_than_a_megabyte_each(account, tmp_path):
    folder = large_llama(tmp_path / "large")
    for name in "abc":
        put_large(account, name, folder)
    models = [f"{account.name}/{name}" for name in "abc"]
    done = account.cli("plan", "--method", "linear", *models, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plan["bytes_downloaded"] == 3 * size and size > 2.2e9
    assert plan["seconds"]["network"] == pytest.approx(3 * size / 100e6, rel=0.01)
    for model in models:
        seen = [each for each in account.hub.log if f"/{model}/" in each.path]
        ranged = [each for each in seen if each.range]
        assert sum(each.sent for each in seen) < 1_000_000
        assert len({each.path for each in ranged}) == 2 * len([e for e in ranged if "/cdn/" in e.path]) == 6
        assert all(each.range for each in seen if each.path.endswith(".safetensors") and each.method == "GET")
    fact = plan["facts"][0]
    assert fact["architecture"] == "LlamaForCausalLM" and fact["tensors"] == 201 and fact["vocabulary"] == 32000
    assert fact["tied"] is False and fact["gated"] is False and fact["download"] == size and len(fact["revision"]) == 40


def test_a_plan_says_what_is_known_of_its_models_and_asks_only_once(account, sharded, tmp_path):
    card = tmp_path / "card"
    card.mkdir()
    (card / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    account.put("a", sharded["a"])
    account.put("a", card, gated=True)
    account.put("b", sharded["b"])
    models = [f"{account.name}/a", f"{account.name}/b"]
    call = ("plan", "--method", "linear", *models)
    first = account.cli(*call, token=account.read)
    assert first.returncode == 0, first.stderr
    assert "licence apache-2.0, gated, commit " in first.stdout and "download:" in first.stdout
    assert "LlamaForCausalLM, 30 tensors, float32" in first.stdout and "64 tokens, untied" in first.stdout
    assert "time:" in first.stdout and not cached_weights(account)
    ranged = len([each for each in account.seen("GET") if each.range])
    again = account.cli(*call, token=account.read)
    assert again.returncode == 0 and len([each for each in account.seen("GET") if each.range]) == ranged > 6
    asked = len(account.hub.log)
    offline = account.cli(*call, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert "gated" not in offline.stdout and len(account.hub.log) == asked
    merged = account.cli("merge", "--method", "linear", *models, tmp_path / "m", HF_HUB_OFFLINE="1")
    assert merged.returncode == 1 and "model-00001-of-" in merged.stderr and "HF_HUB_OFFLINE" in merged.stderr
    assert not (tmp_path / "m").exists()


@both_ways
def test_by_stream_by_download_and_from_disk_the_bytes_are_the_same(account, sharded, tmp_path):
    for name in ("a", "b", "base"):
        account.put(name, sharded[name])
    models, options = [f"{account.name}/{name}" for name in "ab"], {"method": "ties", "max_shard_size": "30KB"}
    code = MERGE + "result = [merged(models, f'{out}/{stream}', stream=stream, **more) for stream in (True, False)]"
    more = {**options, "base_model": f"{account.name}/base", "density": 0.5}
    result = account.python(code, models=models, out=str(tmp_path), more=more)
    assert result == [None, None]
    local = {**options, "base_model": sharded["base"], "density": 0.5}
    hf_merge.merge([sharded["a"], sharded["b"]], tmp_path / "disk", **local)
    disk = digests(tmp_path / "disk")
    assert len(disk) > 2 and digests(tmp_path / "True") == disk and digests(tmp_path / "False") == disk
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "True").config.vocab_size == 64
    cards = [(tmp_path / kind / "README.md").read_text().replace(f"# {kind}", "#") for kind in ("True", "False")]
    assert cards[0].replace('"True"', '"False"') == cards[1]


def test_a_streamed_merge_leaves_no_weights_anywhere(account, sharded, tmp_path):
    account.put("a", sharded["a"])
    account.put("b", sharded["b"])
    call = ("merge", "--method", "linear", f"{account.name}/a", f"{account.name}/b", tmp_path / "m", "--stream")
    done = account.cli(*call)
    assert done.returncode == 0, done.stderr
    assert not cached_weights(account)
    kept = [path for path in account.home.rglob("*") if path.is_file() and not path.name.endswith(".header")]
    assert sum(path.stat().st_size for path in kept) < 200_000
    assert all(each.range for each in account.seen("GET") if each.path.endswith(".safetensors"))


def test_only_the_shards_that_are_needed_are_fetched_and_offline_they_are_enough(account, sharded, tmp_path):
    account.put("a", sharded["a"])
    index = json.loads((sharded["a"] / "model.safetensors.index.json").read_text())["weight_map"]
    recipe = tmp_path / "recipe.yaml"
    slices = [{"sources": [{"model": f"{account.name}/a", "layer_range": [0, 1]}]}]
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    done = account.cli("merge", recipe, tmp_path / "m")
    assert done.returncode == 0, done.stderr
    needed = {file for name, file in index.items() if ".layers." not in name or ".layers.0." in name}
    assert cached_weights(account) == needed and needed < set(index.values())
    again = account.cli("merge", recipe, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and weights(tmp_path / "again") == weights(tmp_path / "m"), again.stderr


@pytest.mark.parametrize("kind", ["cut", "short", "error"])
def test_a_stream_goes_on_where_it_broke_off(account, sharded, tmp_path, kind):
    account.put("a", sharded["a"])
    account.put("b", sharded["b"])
    fault = Fault(kind, rf"cdn/{account.name}/a/.*safetensors$", "GET", first=7, last=9, after=100, status=503)
    account.hub.faults.append(fault)
    models = [f"{account.name}/a", f"{account.name}/b"]
    code = MERGE + "result = merged(models, out, stream=True)"
    assert account.python(code, models=models, out=str(tmp_path / "m")) is None
    assert fault.matched > 9
    hf_merge.merge([sharded["a"], sharded["b"]], tmp_path / "disk", method="linear")
    assert digests(tmp_path / "m") == digests(tmp_path / "disk")


def test_links_that_expire_while_a_merge_is_streamed_are_asked_for_anew(account, sharded, tmp_path):
    """Half of the tensors are read, then all links expire."""
    account.put("a", sharded["a"])
    code = (
        "import time, pathlib\nfrom hf_merge.sources import open_source\nfrom hf_merge.types import ModelRef\n"
        "source = open_source(ModelRef.parse(model), stream=True)\n"
        "values = [source[name].double().sum().item() for name in source]\n"
        "pathlib.Path(out, 'read').touch()\n"
        "while not pathlib.Path(out, 'expired').exists(): time.sleep(0.05)\n"
        "result = [values, [source[name].double().sum().item() for name in source]]"
    )
    with ThreadPoolExecutor() as pool:
        told = pool.submit(account.python, code, model=f"{account.name}/a", out=str(tmp_path))
        while not (tmp_path / "read").exists() and not told.done():
            time.sleep(0.05)
        asked = len(account.seen("GET", "/a/resolve/"))
        account.hub.expire_links()
        (tmp_path / "expired").touch()
        before, after = told.result()
    assert before == after and len(set(before)) > 20
    refused = [each for each in account.hub.log if f"cdn/{account.name}/" in each.path and each.status == 403]
    files = len([*sharded["a"].glob("*.safetensors")])
    assert len(refused) == files and len(account.seen("GET", "/a/resolve/")) == asked + files


@pytest.mark.parametrize("stream", [True, False])
def test_what_cannot_be_had_ends_the_merge_with_the_name_of_its_file(account, sharded, tmp_path, stream):
    account.put("a", sharded["a"])
    account.put("b", sharded["b"])
    last = sorted(path.name for path in sharded["b"].glob("*.safetensors"))[-1]
    models = [f"{account.name}/a", f"{account.name}/b"]
    code = MERGE + "result = merged(models, out, stream=stream)"
    account.hub.faults.append(Fault("error", rf"cdn/{account.name}/b/.*{last}$", first=2, status=500))
    told = account.python(code, models=models, out=str(tmp_path / "m"), stream=stream)
    assert told is not None and told.startswith("SourceError") and f"'{last}' of '{account.name}/b'" in told, told
    assert not (tmp_path / "m").exists()


def test_a_file_of_another_length_than_the_hub_lists_is_refused(account, sharded, tmp_path):
    repo = account.put("a", sharded["a"])
    files = repo.commit("main").files
    name = next(name for name in files if name.endswith(".safetensors"))
    code = MERGE + "result = merged(models, out, stream=True)"
    blob = Blob(files[name].content + b"more", large=True)
    listed = type("Listed", (Blob,), {"size": property(lambda self: len(self.content) - 4)})
    repo.add("main", {**files, name: listed(blob.content, large=True)}, "longer", account.name)
    told = account.python(code, models=[f"{account.name}/a"], out=str(tmp_path / "m"))
    assert told is not None and f"'{name}' of '{account.name}/a'" in told and "the Hub lists" in told
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_a_layer_that_is_used_twice_and_one_that_lies_elsewhere_are_read_as_they_are(
    account, sharded, tmp_path, stream
):
    account.put("a", sharded["a"])
    slices = [{"sources": [{"model": "{}", "layer_range": [first, last]}]} for first, last in ((1, 3), (0, 2), (1, 2))]
    said = json.dumps({"merge_method": "passthrough", "slices": slices})
    (tmp_path / "hub.yaml").write_text(said.replace("{}", f"{account.name}/a"))
    (tmp_path / "disk.yaml").write_text(said.replace("{}", str(sharded["a"])))
    call = ("merge", tmp_path / "hub.yaml", tmp_path / "m", *(["--stream"] if stream else []))
    assert account.cli(*call).returncode == 0
    hf_merge.merge(tmp_path / "disk.yaml", tmp_path / "disk")
    assert digests(tmp_path / "m") == digests(tmp_path / "disk")


def tied(folder: Path, made: Path, change: float) -> Path:
    """Write a Llama whose config ties the head and whose file has it twice, with another number in the middle."""
    shutil.copytree(folder, made)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(made / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].repeat(64, 1)
    tensors["model.embed_tokens.weight"], head = head, head.clone()
    head[200, 3] += change
    (made / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True, "vocab_size": len(head)}))
    save_file({**tensors, "lm_head.weight": head}, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize(("stream", "change"), [(True, 0.0), (False, 0.0), (True, 1.0), (False, 1.0)])
def test_a_head_that_is_there_twice_is_looked_at_again_when_it_is_here(account, llamas, tmp_path, stream, change):
    account.put("a", tied(llamas["a"], tmp_path / "a", change))
    code = MERGE + "result = merged([model], out, stream=stream)"
    told = account.python(code, model=f"{account.name}/a", out=str(tmp_path / "m"), stream=stream)
    assert (told is None) == (not change), told
    assert not change or "'lm_head.weight' of" in told
    assert (tmp_path / "m").exists() == (not change)


def test_pickles_are_fetched_only_where_there_are_no_safetensors_and_cannot_be_streamed(account, llamas, tmp_path):
    for name, keep in (("both", True), ("pickle", False)):
        shutil.copytree(llamas["a"], tmp_path / name)
        torch.save(load_file(llamas["a"] / "model.safetensors"), tmp_path / name / "pytorch_model.bin")
        if not keep:
            (tmp_path / name / "model.safetensors").unlink()
        account.put(name, tmp_path / name)
    code = MERGE + (
        "result = [merged([f'{org}/pickle'], out + '1', stream=True), merged([f'{org}/both'], out + '2'),"
        " merged([f'{org}/pickle'], out + '3')]"
    )
    streamed, *others = account.python(code, out=str(tmp_path / "m"))
    assert others == [None, None] and "pytorch_model.bin, which cannot be streamed" in streamed
    assert weights(tmp_path / "m2") == weights(tmp_path / "m3")
    assert len([*account.home.rglob("pytorch_model.bin")]) == 1


def test_models_that_do_not_fit_on_the_disk_are_refused_before_they_are_fetched(account, sharded, tmp_path):
    account.put("a", sharded["a"])
    code = MERGE + (
        "import shutil, collections\nhf_merge.plan([model], method='linear')\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('Usage', 'total used free')(10, 9, 1)\n"
        "result = merged([model], out)"
    )
    told = account.python(code, model=f"{account.name}/a", out=str(tmp_path / "m"))
    assert told is not None and "where 1 B are free" in told and "--stream" in told
    assert not cached_weights(account) and not (tmp_path / "m").exists()


@pytest.mark.parametrize("stream", [True, False])
def test_ctrl_c_ends_a_merge_although_the_hub_does_not_answer(account, llamas, tmp_path, stream):
    account.put("a", llamas["a"])
    account.hub.faults.append(fault := Fault("hang", rf"cdn/{account.name}/a/", first=2, seconds=60))
    words = ["merge", "--method", "linear", f"{account.name}/a", str(tmp_path / "m"), *(["--stream"] if stream else [])]
    call = [sys.executable, "-m", "hf_merge.cli", *words]
    process = subprocess.Popen(call, env=account.environment(None), stderr=subprocess.PIPE, text=True)
    while fault.matched < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=25)
    assert process.returncode == 130 and "Traceback" not in told and not (tmp_path / "m").exists()
