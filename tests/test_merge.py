"""The main job, as a user runs it: models in, a folder out that from_pretrained loads."""

import copy
import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import hf_merge
from tests.conftest import small_config


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture
def merged(llamas, tmp_path):
    return hf_merge.merge(
        [llamas["a"], llamas["b"]], tmp_path / "merged", method="ties", base_model=llamas["base"], density=0.5
    )


def test_merged_model_loads_runs_and_generates(merged):
    model = merged.load()
    assert isinstance(model, LlamaForCausalLM)
    _, info = AutoModelForCausalLM.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = AutoTokenizer.from_pretrained(merged.path)("w3 w4 w5", return_tensors="pt").input_ids
    assert model.generate(tokens, do_sample=False, pad_token_id=0).shape[1] > tokens.shape[1]


def test_linear_is_the_mean_to_the_bit(llamas, tmp_path):
    out = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear").path
    a, b = weights(llamas["a"]), weights(llamas["b"])
    assert_same(weights(out), {name: (a[name] + b[name]) / 2 for name in a})


def test_folder_has_all_that_belongs_to_the_model_and_nothing_else(merged, llamas):
    names = {path.name for path in merged.path.iterdir()}
    given = {path.name for path in llamas["base"].iterdir()}
    assert names == given | {"hf_merge_recipe.yaml"}
    for name in given - {"README.md", "model.safetensors", "config.json"}:
        assert (merged.path / name).read_bytes() == (llamas["base"] / name).read_bytes()
    assert "the card of" not in (merged.path / "README.md").read_text()
    assert all(stat.S_IMODE(os.stat(path).st_mode) & 0o444 == 0o444 for path in merged.path.iterdir())


def test_card_says_what_was_merged_and_does_not_show_local_paths(merged, llamas, tmp_path):
    data = merged.card.data.to_dict()
    assert data["tags"] == ["merge", "hf_merge"] and data["base_model_relation"] == "merge"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    text = merged.card.text
    assert "A merge of 2 models by **ties**" in text
    assert "elect a sign" in text and "https://arxiv.org/abs/2306.01708" in text and "density: 0.5" in text
    assert str(tmp_path) not in str(merged.card) and str(llamas["a"].parent) not in str(merged.card)
    with safe_open(merged.path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert str(llamas["a"].parent) not in file.metadata()["hf_merge_recipe"]


def test_card_from_a_template_of_ones_own(llamas, tmp_path):
    (tmp_path / "card.md").write_text("---\n{{ card_data }}\n---\nmade of {{ models | length }} by {{ method.name }}")
    merged = hf_merge.merge([llamas["a"]], tmp_path / "m", method="linear", card_template=tmp_path / "card.md")
    assert merged.card.text.strip() == "made of 1 by linear"


@pytest.mark.parametrize("text", [None, "{{ unclosed", "{% for %}", "no front matter: {{ card_data.nothing.at.all }}"])
def test_template_that_fails_does_so_before_anything_is_written(llamas, tmp_path, text):
    template = tmp_path / "card.md"
    if text is not None:
        template.write_text(text)
    with pytest.raises(hf_merge.OutputError, match=r"card\.md"):
        hf_merge.merge([llamas["a"]], tmp_path / "m", method="linear", card_template=template)
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".*"))


def test_recipe_in_the_folder_repeats_the_merge(merged, tmp_path):
    again = hf_merge.merge(merged.path / "hf_merge_recipe.yaml", tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (merged.path / "model.safetensors").read_bytes()
    assert "seed: 0" in (merged.path / "hf_merge_recipe.yaml").read_text()


@pytest.mark.parametrize("word", ["dtype", "out_dtype"])
def test_dtype_is_rounded_once_and_told_in_the_config(llamas, tmp_path, word):
    models = [llamas["a"], llamas["b"]]
    exact = weights(hf_merge.merge(models, tmp_path / "f32", method="linear").path)
    out = hf_merge.merge(models, tmp_path / "bf16", method="linear", **{word: "bfloat16"}).path
    assert_same(weights(out), {name: tensor.bfloat16() for name, tensor in exact.items()})
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16


def test_mixed_dtypes_are_promoted_per_tensor(tmp_path):
    half, full = {"x": torch.ones(3, dtype=torch.bfloat16)}, {"x": torch.zeros(3)}
    assert hf_merge.merge_state_dicts([half, dict(half)], method="linear")["x"].dtype == torch.bfloat16
    assert hf_merge.merge_state_dicts([half, full], method="linear")["x"].dtype == torch.float32
    double = {"x": torch.full((3,), 1 + 2**-40, dtype=torch.float64)}
    assert torch.equal(hf_merge.merge_state_dicts([double, dict(double)], method="linear")["x"], double["x"])


def test_live_modules_and_mappings_give_the_same_as_folders(llamas, tmp_path):
    loaded = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in llamas.items()}
    from_folders = hf_merge.merge(
        [llamas["a"], llamas["b"]], tmp_path / "f", method="ties", base_model=llamas["base"], density=0.3
    )
    from_modules = hf_merge.merge(
        [loaded["a"], loaded["b"]], tmp_path / "m", method="ties", base_model=loaded["base"], density=0.3
    )
    states = {name: weights(folder) for name, folder in llamas.items()}
    in_memory = hf_merge.merge_state_dicts(
        [states["a"], states["b"]], method="ties", base_model=states["base"], density=0.3
    )
    assert_same(weights(from_modules.path), weights(from_folders.path))
    assert_same(in_memory, weights(from_folders.path))
    assert isinstance(from_modules.load(), LlamaForCausalLM)


def test_offloaded_module_is_read_where_it_lies(llamas, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        llamas["a"],
        device_map={
            "model.embed_tokens": "cpu",
            "model.layers": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "disk",
        },
        offload_folder=tmp_path / "offload",
    )
    assert any(p.device.type == "meta" for p in model.parameters())
    out = hf_merge.merge([model, llamas["b"]], tmp_path / "m", method="linear").path
    assert_same(weights(out), weights(hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "f", method="linear").path))


def test_plain_networks_merge_without_transformers_config(tmp_path):
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 5)) for _ in range(2)
    ]
    merged = hf_merge.merge_state_dicts([net.state_dict() for net in nets], method="linear")
    assert merged["1.num_batches_tracked"].dtype == torch.int64
    copy.deepcopy(nets[0]).load_state_dict(merged)
    out = hf_merge.merge(nets, tmp_path / "net", method="linear")
    assert_same(weights(out.path), merged)
    with pytest.raises(hf_merge.MergeError, match=r"no config\.json"):
        out.load()


def test_tied_weights_stay_tied(tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(small_config(tie_word_embeddings=True)).save_pretrained(tmp_path / name)
    live = [LlamaForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
    for models in ([tmp_path / "a", tmp_path / "b"], live):
        merged = hf_merge.merge(models, tmp_path / "m", method="linear", overwrite=True)
        assert "lm_head.weight" not in weights(merged.path)
        model = merged.load()
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_base_gives_config_tokenizer_and_names_else_the_first_model(llamas, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llamas["b"], other)
    config = json.loads((other / "config.json").read_text()) | {"rope_theta": 123.0}
    (other / "config.json").write_text(json.dumps(config))
    first = hf_merge.merge([llamas["a"], other], tmp_path / "1", method="linear").path
    based = hf_merge.merge([llamas["a"]], tmp_path / "2", method="slerp", base_model=other).path
    assert "rope_theta" not in json.loads((first / "config.json").read_text())
    assert json.loads((based / "config.json").read_text())["rope_theta"] == 123.0


def test_lambda_zero_is_the_base_and_one_model_at_weight_one_is_the_model(llamas, tmp_path):
    base = hf_merge.merge(
        [llamas["a"]], tmp_path / "0", method="task_arithmetic", base_model=llamas["base"], lambda_=0.0
    )
    assert_same(weights(base.path), weights(llamas["base"]))
    whole = hf_merge.merge([llamas["a"]], tmp_path / "1", method="task_arithmetic", base_model=llamas["base"])
    for name, tensor in weights(llamas["a"]).items():
        torch.testing.assert_close(weights(whole.path)[name], tensor, atol=1e-7, rtol=1e-6)


def test_rules_choose_another_method_first_match_wins(llamas, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [str(llamas["a"]), str(llamas["b"])],
        "rules": [
            {"pattern": "lm_head.weight", "merge_method": "passthrough", "models": [str(llamas["b"])]},
            {"pattern": "*.layers.1.*", "parameters": {"weight": [1.0, 1.0]}},
            {"pattern": "*", "merge_method": "passthrough", "models": [str(llamas["a"])]},
        ],
    }
    out, a, b = weights(hf_merge.merge(recipe, tmp_path / "m").path), weights(llamas["a"]), weights(llamas["b"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(out["model.norm.weight"], a["model.norm.weight"])
    layer = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(out[layer], (a[layer] + b[layer]) / 2)


def test_method_registered_by_a_plug_in_needs_no_other_edit(llamas, tmp_path):
    from hf_merge.method import _registry
    from hf_merge.types import Merged, Models

    @hf_merge.merge_method(paper="https://example.org", elementwise=True)
    def largest(models: Models) -> Merged:
        """Keep the largest entry."""
        return torch.stack(tuple(models)).amax(0)

    try:
        out = weights(hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="largest").path)
        a, b = weights(llamas["a"]), weights(llamas["b"])
        assert_same(out, {name: torch.maximum(a[name], b[name]) for name in a})
    finally:
        del _registry["largest"]
