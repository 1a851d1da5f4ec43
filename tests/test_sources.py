"""Where weights come from, and what is wrong with those that cannot be read."""

import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge.errors import SourceError
from hf_merge.sources import open_source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.types import InMemory, ModelRef

STATE = {"b.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.arange(3, dtype=torch.int64)}


def opened(path):
    return open_source(ModelRef.parse(str(path)))


def assert_holds(source, state=STATE):
    assert set(source) == set(state) and len(source) == len(state)
    for name, tensor in state.items():
        assert source.specs[name].shape == tuple(tensor.shape) and source.specs[name].dtype == tensor.dtype
        assert torch.equal(source[name], tensor)


def write_shards(folder, prefix="model", suffix="safetensors", save=save_file):
    names = list(STATE)
    files = [f"{prefix}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    for name, file in zip(names, files, strict=True):
        save({name: STATE[name]}, folder / file)
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (folder / f"{prefix}.{suffix}.index.json").write_text(json.dumps(index))
    return files


def save_pickle(state, path):
    torch.save(state, path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "other.safetensors", "pytorch_model.bin", "net.pth", "net.pt", "net.ckpt"]
)
def test_single_file_in_a_folder_or_named_itself(tmp_path, name):
    (save_file if name.endswith("safetensors") else save_pickle)(STATE, tmp_path / name)
    assert_holds(opened(tmp_path))
    assert_holds(opened(tmp_path / name))


def test_shards_with_an_index_and_without(tmp_path):
    write_shards(tmp_path)
    assert_holds(opened(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_holds(opened(tmp_path))


def test_shards_of_pytorch_files(tmp_path):
    write_shards(tmp_path, "pytorch_model", "bin", save_pickle)
    assert_holds(opened(tmp_path))


def test_single_file_wins_over_a_stale_index(tmp_path):
    write_shards(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert_holds(opened(tmp_path))


def test_safetensors_win_over_pickles(tmp_path):
    save_pickle({"x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    save_file(STATE, tmp_path / "model.safetensors")
    assert_holds(opened(tmp_path))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_checkpoints_that_wrap_their_state_dict(tmp_path, wrapper):
    torch.save({"epoch": 3, wrapper: {**STATE, "version": 1}}, tmp_path / "beit3.pth")
    assert_holds(opened(tmp_path / "beit3.pth"))


def test_file_of_pytorch_before_1_6(tmp_path):
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_holds(opened(tmp_path / "old.pth"))


class Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, new_format):
    target = tmp_path / "ran"
    torch.save(
        {"x": torch.ones(1), "evil": Exploit(str(target))},
        tmp_path / "m.bin",
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(SourceError, match="code"):
        opened(tmp_path / "m.bin")
    assert not target.exists()


def test_raw_pickle_is_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"x": Exploit(str(tmp_path / "ran"))}))
    with pytest.raises(SourceError, match=r"m\.bin"):
        opened(tmp_path / "m.bin")
    assert not (tmp_path / "ran").exists()


def corrupt(path, change):
    """Rewrite the header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


LIES = {
    "beyond the end": lambda h: h["b.weight"].update(data_offsets=[0, 10_000]),
    "overlap": lambda h: h["b.weight"].update(data_offsets=[8, 32]),
    "negative": lambda h: h["b.weight"].update(data_offsets=[-8, 16]),
    "wrong shape": lambda h: h["b.weight"].update(shape=[200, 3]),
    "unknown dtype": lambda h: h["b.weight"].update(dtype="Q4"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused(tmp_path, lie):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    corrupt(path, LIES[lie])
    with pytest.raises(SourceError, match=r"model\.safetensors' is not a whole safetensors file"):
        opened(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="download or write it again"):
        opened(tmp_path)


def test_truncated_pytorch_file_is_refused(tmp_path):
    torch.save({"x": torch.ones(1000)}, tmp_path / "m.bin")
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:500])
    with pytest.raises(SourceError, match=r"m\.bin"):
        opened(tmp_path / "m.bin")


def test_missing_shard_is_named(tmp_path):
    files = write_shards(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(SourceError, match=f"lacks {files[1]}, which its index names"):
        opened(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match="no index that says which belong together"):
        opened(tmp_path)


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path):
    files = write_shards(tmp_path)
    index = {"weight_map": {"b.weight": files[0], "a.bias": files[1], "c.weight": files[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"c\.weight"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"x": "../../outside.safetensors"}}']
)
def test_broken_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match=r"index\.json"):
        opened(tmp_path)


def test_folder_without_weights_and_adapter_and_unknown_file_are_named(tmp_path):
    with pytest.raises(SourceError, match="holds no weights"):
        opened(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"is an adapter, and its adapter_config\.json does not name its base"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match="is no file of weights"):
        opened(tmp_path / "notes.txt")


def test_model_that_is_nowhere_is_an_error_that_says_where_was_looked(tmp_path):
    with pytest.raises(SourceError, match="There is no model at"):
        opened(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"no folder 'org/absent', and no whole model of that name in the cache"):
        opened("org/absent")


def test_mapping_may_hold_arrays_but_nothing_else():
    source = open_source(InMemory({"x": np.ones((2, 2), dtype=np.float32)}, "m"))
    assert source.specs["x"].dtype == torch.float32
    with pytest.raises(SourceError, match="'config' of m is a dict, not a tensor"):
        open_source(InMemory({"x": torch.ones(1), "config": {}}, "m"))
    with pytest.raises(SourceError, match="a model is a Hub id, a folder, a module or a mapping"):
        open_source(InMemory(3, "m"))


def test_module_on_the_meta_device_has_no_values():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    source = open_source(InMemory(module, "m"))
    assert source.specs["weight"].shape == (2, 2)
    with pytest.raises(SourceError, match="on the meta device"):
        source["weight"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_module_whose_live_adapter_is_merged_is_refused(llamas):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llamas["a"]), LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(SourceError, match="has merged its adapter into its weights: call unmerge_adapter"):
        open_source(InMemory(model, "m"))


@pytest.mark.parametrize("architecture", ["vit", "mixtral"])
def test_live_model_shows_the_names_that_save_pretrained_writes(architecture, tmp_path):
    import transformers

    if architecture == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
        )
        model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert_holds(open_source(InMemory(model, "m")), load_file(tmp_path / "model.safetensors"))


def test_values_are_read_when_asked_for(tmp_path):
    """A sparse file of 64 GB opens at once; only the tensor that is read costs anything."""
    header = {"big": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 1 << 36]}}
    header["small"] = {"dtype": "F32", "shape": [2], "data_offsets": [1 << 36, (1 << 36) + 8]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (1 << 36) + 8)
    source = opened(tmp_path)
    assert source.specs["big"].nbytes == 1 << 36
    assert source["small"].tolist() == [0.0, 0.0]


def test_companions_are_all_but_weights_and_card(tmp_path):
    keep = [
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "modules.json",
        "modeling_x.py",
    ]
    drop = [
        "config.json",
        "README.md",
        "pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "onnx/model.onnx",
        ".git/config",
        "checkpoint-5/config.json",
        "tf_model.h5",
        "hf_merge_recipe.yaml",
        "2_Dense/model.safetensors",
        "3_Other/model.safetensors",
    ]
    for name in keep + drop:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    assert set(Folder(tmp_path).companions()) == set(keep)


def test_hub_model_in_the_cache_is_read_and_pinned_to_its_commit(llamas, tmp_path):
    commit = "a" * 40
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.parent.mkdir()
    snapshot.symlink_to(llamas["a"])
    source = open_source(ModelRef.parse("org/name"), cache_dir=tmp_path / "hub", local_files_only=True)
    assert isinstance(source, Checkpoint) and source.public_id == "org/name" and source.revision == commit
    merged = hf_merge.merge(
        ["org/name"], tmp_path / "m", method="linear", cache_dir=tmp_path / "hub", local_files_only=True
    )
    assert merged.card.data.to_dict()["base_model"] == ["org/name"]
    assert f"org/name@{commit}" in merged.card.text or commit in merged.card.text


def test_opening_reads_no_more_than_headers(tmp_path):
    """Count what the process reads from the disk's files, by the kernel's word."""
    save_file({"x": torch.zeros(1 << 22)}, tmp_path / "model.safetensors")
    code = (
        "import sys, hf_merge, hf_merge.api\n"
        "def read(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssFile'))\n"
        "hf_merge.merge_state_dicts([{'x': __import__('torch').ones(1)}], method='linear')\n"
        "before = read(); p = hf_merge.plan([sys.argv[1]], method='linear'); print(read() - before)"
    )
    call = [sys.executable, "-c", code, str(tmp_path)]
    grown = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    assert grown < 4096, f"planning mapped in {grown} kB of a file of 16 MB"
