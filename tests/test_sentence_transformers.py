"""Models of sentence-transformers: all modules are merged, not only the first."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge import api
from hf_merge.writer import Writer, partial_folder

sentence_transformers = pytest.importorskip("sentence_transformers")
DENSE = "2_Dense"


@pytest.fixture(scope="module")
def dense(minilm, tmp_path_factory):
    """MiniLM with a Dense layer on top, two variants."""
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    root = tmp_path_factory.mktemp("dense")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        body = parts.Transformer(str(minilm[name]))
        pooling = parts.Pooling(384)
        modules = [body, pooling, parts.Dense(384, 16)]
        sentence_transformers.SentenceTransformer(modules=modules, device="cpu").save(str(root / name))
    return {name: root / name for name in ("a", "b")}


def encode(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(["a cat sat on the mat"])


def assert_mean(merged, a, b):
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, (a[name] + b[name]) / 2 if tensor.is_floating_point() else a[name]), name


def test_dense_layers_are_merged_as_well(dense, tmp_path):
    out = hf_merge.merge([dense["a"], dense["b"]], tmp_path / "m", method="linear")
    for file in ("model.safetensors", f"{DENSE}/model.safetensors"):
        assert_mean(*(load_file(folder / file) for folder in (out.path, dense["a"], dense["b"])))
    assert list(load_file(out.path / DENSE / "model.safetensors")) == ["linear.bias", "linear.weight"]
    assert encode(out.path).shape == (1, 16)
    files = {str(path.relative_to(out.path)) for path in out.path.rglob("*") if path.is_file()}
    given = {str(path.relative_to(dense["a"])) for path in dense["a"].rglob("*") if path.is_file()}
    assert files == given | {"hf_merge_recipe.yaml"}
    assert f"{DENSE}/linear.weight" in out.plan.specs


def test_the_index_names_the_tensors_of_the_root_only(dense, tmp_path):
    out = hf_merge.merge([dense["a"], dense["b"]], tmp_path / "m", method="linear", max_shard_size="20MB")
    index = json.loads((out.path / "model.safetensors.index.json").read_text())
    assert not any("/" in part for item in index["weight_map"].items() for part in item)
    assert encode(out.path).shape == (1, 16)


def test_a_rule_reaches_a_module(dense, tmp_path):
    rules = [{"pattern": f"{DENSE}/*", "merge_method": "passthrough", "models": [str(dense["b"])]}]
    out = hf_merge.merge([dense["a"], dense["b"]], tmp_path / "m", method="linear", rules=rules)
    merged, b = (load_file(folder / DENSE / "model.safetensors") for folder in (out.path, dense["b"]))
    assert all(torch.equal(merged[name], b[name]) for name in b)


def test_an_interrupted_merge_takes_over_a_finished_module(dense, tmp_path, monkeypatch):
    pair = [dense["a"], dense["b"]]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="pulled out"):
        patch.setattr(api, "_describe", Mock(side_effect=RuntimeError("pulled out")))
        hf_merge.merge(pair, tmp_path / "m", method="linear")
    assert (partial_folder(tmp_path / "m") / DENSE / "model.safetensors").is_file()
    monkeypatch.setattr(Writer, "write", Mock(side_effect=AssertionError("written again")))
    out = hf_merge.merge(pair, tmp_path / "m", method="linear", resume=True)
    assert_mean(*(load_file(folder / DENSE / "model.safetensors") for folder in (out.path, *pair)))


@pytest.mark.parametrize("kind", ["pickle", "no root"])
def test_older_folders_are_read_as_well(kind, dense, tmp_path):
    folders = []
    for name in ("a", "b"):
        folders.append(shutil.copytree(dense[name], tmp_path / name))
        if kind == "pickle":
            file = folders[-1] / DENSE / "model.safetensors"
            torch.save(load_file(file), file.with_name("pytorch_model.bin"))
            file.unlink()
            continue
        inner = folders[-1] / "0_Transformer"
        inner.mkdir()
        for path in [path for path in folders[-1].iterdir() if path.is_file()]:
            if path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
                path.rename(inner / path.name)
        listing = folders[-1] / "modules.json"
        listing.write_text(listing.read_text().replace('"path": ""', '"path": "0_Transformer"'))
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    weights = [load_file(folder / DENSE / "model.safetensors") for folder in (out.path, dense["a"], dense["b"])]
    assert_mean(*weights)
    assert not list(out.path.rglob("*.bin"))
    wanted = hf_merge.merge([dense["a"], dense["b"]], tmp_path / "n", method="linear")
    assert (encode(out.path) == encode(wanted.path)).all()


def test_a_model_without_the_module_lacks_it(dense, minilm, tmp_path):
    found = hf_merge.plan([dense["a"], minilm["b"]], method="linear")
    assert any(f"{DENSE}/linear.weight" in problem.tensors for problem in found.errors)
    other = hf_merge.plan([minilm["b"], dense["a"]], method="linear")
    assert not other.errors and any(f"{DENSE}/linear.weight" in problem.tensors for problem in other.problems)


def test_cross_encoders_are_merged(minilm, tmp_path):
    folders = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = sentence_transformers.CrossEncoder(str(minilm[name]), num_labels=1, device="cpu")
        model.save_pretrained(str(tmp_path / name))
        folders.append(tmp_path / name)
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert_mean(*(load_file(folder / "model.safetensors") for folder in (out.path, *folders)))
    scores = sentence_transformers.CrossEncoder(str(out.path), device="cpu").predict([("a cat", "a dog")])
    assert scores.shape == (1,)


def test_a_slash_in_a_name_is_no_folder(tmp_path):
    for name, value in {"a": 1.0, "b": 3.0}.items():
        save_file({"encoder/kernel": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    out = hf_merge.merge(files, tmp_path / "m", method="linear")
    assert torch.equal(load_file(out.path / "model.safetensors")["encoder/kernel"], torch.full((2,), 2.0))


def test_on_load_gives_the_transformer_and_says_what_it_leaves_out(dense, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("hf_merge.loading.logger.warning", lambda text, *words: told.append(text % words))
    model = hf_merge.from_pretrained([dense["a"], dense["b"]], method="linear")
    assert type(model).__name__ == "BertModel" and len(told) == 1 and "modules 2_Dense of" in told[0]
