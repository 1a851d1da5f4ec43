"""Whether models go together: the verdict, the rows, and fixes that hold when they are taken."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

import hf_merge
from tests.conftest import make_tokenizer, save_llamas, small_config

STATE = {"layers.0.w": torch.zeros(4, 3), "layers.1.w": torch.zeros(4, 3), "head": torch.zeros(5)}


def row(report, name):
    return next(one for one in report.rows if one.name == str(name))


def taken(report):
    """Take every fix, and check again; return the verdicts by label."""
    reports = {fix.label: hf_merge.check(fix.apply(report.recipe)) for fix in report.fixes}
    return {label: again.verdict for label, again in reports.items()}


def changes(report):
    return [fix.plain for fix in report.fixes]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny Llama with one more token than the others, and a row for it."""
    folder = save_llamas(tmp_path_factory.mktemp("wide"), ("a",), vocab_size=65)["a"]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(llamas, tmp_path_factory):
    """Two LoRAs of the tiny Llama, one of which changes more modules."""
    root = tmp_path_factory.mktemp("adapters")
    for name, targets in (("x", {"q_proj": 32}), ("y", {"q_proj": 32, "v_proj": 16})):
        tensors = {}
        for layer, (module, size) in ((layer, one) for layer in range(3) for one in targets.items()):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors |= {f"{prefix}.lora_A.weight": torch.ones(4, 32), f"{prefix}.lora_B.weight": torch.ones(size, 4)}
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(llamas["base"])}
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        (root / name / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [*targets]}))
    return root


def test_models_that_fit_have_rows_and_a_plan(llamas):
    report = hf_merge.check([llamas["a"], llamas["b"]], base_model=llamas["base"], method="ties")
    assert report.verdict == "fits" and "the same 30 tensors" in report.sentence and not report.fixes
    assert [one.role for one in report.rows] == ["model", "model", "base"] and report.layers == 3
    found = row(report, llamas["a"])
    assert (found.tensors, found.matching, found.missing, found.extra, found.differing) == (30, 30, 0, 0, 0)
    assert found.architecture == "LlamaForCausalLM" and found.dtype == "float32" and found.vocabulary == 64
    assert found.tokenizer == "with the tokens of the base" and found.chat_template == "that of the base"
    assert report.plan is not None and report.plan.recipe.merge_method == "ties" and report.proposed_base is None
    said = json.loads(json.dumps(report.to_dict()))
    assert said["plan"]["tensors"] == 30 and said["rows"][0]["name"] == str(llamas["a"])
    assert hf_merge.check(said["recipe"]).sentence == report.sentence


@pytest.mark.parametrize(
    ("names", "base", "method"),
    [
        ("ab", None, "nuslerp"),
        ("abc", None, "linear"),
        ("ab", "base", "tsv_m"),
        ("a", "base", "task_arithmetic"),
        ("a", None, "linear"),
    ],
)
def test_a_list_of_models_gets_a_method_that_works(llamas, tmp_path, names, base, method):
    shutil.copytree(llamas["b"], tmp_path / "c")
    folders = {**llamas, "c": tmp_path / "c"}
    report = hf_merge.check([folders[name] for name in names], base_model=folders[base] if base else None)
    assert report.method.name == report.recipe.merge_method == method and report.verdict == "fits"


def test_another_vocabulary_is_said_in_words_and_mended(llamas, wide, tmp_path):
    report = hf_merge.check([llamas["a"], wide], base_model=llamas["base"], method="ties")
    found = row(report, wide)
    assert report.verdict == "does not fit" and found.differing == 2 and found.vocabulary == 65
    assert found.example == "embed_tokens has 65 rows, that of the base 64: the tokenizers differ"
    assert found.example in report.sentence
    assert found.tokenizer == "with 1 tokens that the base lacks, such as '<call>'"
    assert changes(report)[:2] == [{"tokenizer_source": "base"}, {"tokenizer_source": "union"}]
    assert "does not fit" not in taken(report).values()
    merged = hf_merge.merge(report.fixes[1].apply(report.recipe), tmp_path / "out")
    assert merged.load().get_input_embeddings().weight.shape[0] == len(AutoTokenizer.from_pretrained(merged.path)) == 65


def test_padding_is_told_from_other_tokens(llamas, tmp_path):
    padded = save_llamas(tmp_path, ("a",), vocab_size=72)["a"]
    report = hf_merge.check([llamas["a"], padded])
    assert row(report, padded).example.endswith("the same tokens, so that one of them is padded")
    assert "does not fit" not in taken(report).values() and report.fixes


def test_other_tokens_at_the_same_ids_are_a_warning_that_a_fix_removes(llamas, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llamas["b"], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w7"', '"x7"'))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    report = hf_merge.check([llamas["a"], other], method="linear")
    assert report.verdict == "warns" and "something to know first" in report.sentence
    assert "'x7' instead of 'w7' at 10" in row(report, other).tokenizer
    assert row(report, other).chat_template.startswith("another than that of")
    assert {"tokenizer_source": "base"} in changes(report)
    again = hf_merge.check(report.fixes[0].apply(report.recipe))
    assert not [problem for problem in again.problems if "x7' instead of" in problem.message]


def test_a_head_of_another_size_is_kept_of_one_model(tmp_path):
    for seed, labels in enumerate((3, 5)):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(small_config(num_labels=labels)).save_pretrained(tmp_path / str(labels))
    report = hf_merge.check([tmp_path / "3", tmp_path / "5"])
    assert row(report, tmp_path / "5").example == f"score is 5 x 32, that of '{tmp_path / '3'}' 3 x 32"
    assert [list(one) for one in changes(report)] == [["rules"]] and set(taken(report).values()) == {"fits"}
    merged = hf_merge.merge(report.fixes[0].apply(report.recipe), tmp_path / "out")
    first, out = (load_file(folder / "model.safetensors") for folder in (tmp_path / "3", merged.path))
    assert torch.equal(out["score.weight"], first["score.weight"])
    assert not torch.equal(out["model.norm.weight"], first["model.embed_tokens.weight"])


def test_tensors_that_are_missing_or_extra_can_be_kept_skipped_or_left_out():
    short = {name: tensor for name, tensor in STATE.items() if name != "head"}
    report = hf_merge.check([STATE, short, {**STATE, "more": torch.zeros(2)}])
    assert (
        row(report, "model 1").example == "it lacks head, which 'model 0' has" and row(report, "model 1").missing == 1
    )
    assert row(report, "model 2").example == "it has more, which 'model 0' lacks" and row(report, "model 2").extra == 1
    assert changes(report)[:3] == [{"missing": "base"}, {"missing": "skip-model"}, {"keys": "intersection"}]
    assert changes(report)[3]["models"] == ["<model 0>", "<model 2>"]
    assert "does not fit" not in taken(report).values()
    assert json.dumps(report.to_dict())


def test_models_under_other_names_match(llamas, tmp_path):
    LlamaModel.from_pretrained(llamas["b"]).save_pretrained(tmp_path / "bare")
    assert "norm.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    report = hf_merge.check([llamas["a"], tmp_path / "bare"], method="linear")
    found = row(report, tmp_path / "bare")
    assert (found.matching, found.missing, found.extra) == (29, 1, 0) and "lm_head" in found.example
    assert {"missing": "base"} in changes(report)


def test_nothing_is_offered_for_models_of_another_kind_or_depth(llamas, tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=1)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    deep = save_llamas(tmp_path, ("a",), num_hidden_layers=4)["a"]
    bert = hf_merge.check([llamas["a"], tmp_path / "bert"])
    assert "no tensor in common" in bert.sentence and "a 'bert' model" in bert.sentence and not bert.fixes
    report = hf_merge.check([llamas["a"], deep])
    assert row(report, deep).example == f"it has 4 layers, '{llamas['a']}' 3" and not report.fixes
    three = hf_merge.check([llamas["a"], llamas["b"], deep])
    assert changes(three) == [{"models": [str(llamas["a"]), str(llamas["b"])]}]
    assert set(taken(three).values()) == {"fits"}


def test_a_method_without_its_base_is_told_from_models_that_do_not_fit(llamas):
    report = hf_merge.check([llamas["a"], llamas["b"]], method="ties", density=0.5)
    assert report.sentence.startswith("The models fit each other, but not this merge: 'ties' merges task vectors")
    assert changes(report) == [{"merge_method": "nuslerp"}] and "needs no base" in report.fixes[0].label
    assert "does not fit" not in taken(report).values()


def test_two_things_that_are_wrong_are_mended_together(llamas, wide):
    report = hf_merge.check([llamas["a"], wide], method="ties")
    assert changes(report)[0] == {"tokenizer_source": "base", "merge_method": "nuslerp"}
    assert "does not fit" not in taken(report).values()


@pytest.mark.parametrize("kind", ["missing", "empty", "pickle", "half"])
def test_a_model_that_cannot_be_read_is_a_row_and_the_others_are_looked_at(llamas, tmp_path, kind):
    lost = tmp_path / kind
    if kind != "missing":
        lost.mkdir()
    if kind == "pickle":
        torch.save({"a": torch.zeros(2), "b": subprocess.Popen}, lost / "pytorch_model.bin")
    if kind == "half":
        (lost / "model.safetensors").write_bytes((llamas["a"] / "model.safetensors").read_bytes()[:5000])
    report = hf_merge.check([llamas["a"], lost, llamas["b"]], base_model=llamas["base"], method="ties")
    found = row(report, lost)
    assert report.verdict == "does not fit" and report.plan is None
    assert found.error and str(lost) in found.error and found.error in report.sentence
    assert row(report, llamas["b"]).matching == 30 and row(report, llamas["a"]).error is None
    assert changes(report) == [{"models": [str(llamas["a"]), str(llamas["b"])]}]
    assert set(taken(report).values()) == {"fits"}


def test_a_base_that_cannot_be_read_can_be_done_without(llamas, tmp_path):
    report = hf_merge.check([llamas["a"], llamas["b"]], base_model=tmp_path / "nowhere", method="ties")
    assert row(report, tmp_path / "nowhere").role == "base" and not report.problems
    assert changes(report) == [{"base_model": None, "merge_method": "nuslerp"}]
    assert set(taken(report).values()) == {"fits"}


def test_where_nothing_can_be_read_the_sentence_says_why(tmp_path):
    report = hf_merge.check([tmp_path / "x", tmp_path / "y"])
    assert report.sentence == f"None of the models can be read: There is no model at '{tmp_path / 'x'}'."
    assert report.compared_with is None and not report.fixes and report.layers == 0
    assert json.dumps(report.to_dict()) and "cannot be read" in str(report)


def test_adapters_alone_are_compared_by_modules(adapters):
    report = hf_merge.check([adapters / "x", adapters / "y"])
    assert report.verdict == "fits" and report.method.name == "tsv_m"
    assert [one.role for one in report.rows] == ["adapter", "adapter"]
    found = row(report, adapters / "y")
    assert (found.tensors, found.matching, found.extra, found.architecture) == (6, 3, 3, "LORA of rank 4")
    assert report.plan is not None and report.plan.recipe.output_format == "adapter"


def test_an_adapter_beside_a_model_brings_its_base(llamas, adapters):
    report = hf_merge.check([llamas["a"], adapters / "x"], method="task_arithmetic")
    assert row(report, adapters / "x").role == "adapter" and row(report, adapters / "x").matching == 30
    assert report.proposed_base is not None and report.proposed_base.name == str(llamas["base"])
    assert "of" in report.proposed_base.why and str(llamas["a"]) in report.proposed_base.why
    assert changes(report)[0] == {"base_model": str(llamas["base"])}
    assert set(taken(report).values()) == {"fits"}


def test_a_quantised_model_is_what_it_stands_for(llamas, tmp_path):
    folder = tmp_path / "fp8"
    shutil.copytree(llamas["a"], folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    report = hf_merge.check([llamas["b"], folder], method="linear")
    assert row(report, folder).quantised == "fp8" and row(report, folder).matching == 30
    assert row(report, folder).size < row(report, llamas["b"]).size and report.verdict == "fits"


def test_code_of_its_own_and_licences_are_told(llamas, tmp_path):
    for name, licence in (("a", "apache-2.0"), ("b", "llama3.1")):
        shutil.copytree(llamas[name], tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    report = hf_merge.check([tmp_path / "a", tmp_path / "b"])
    assert [one.custom_code for one in report.rows] == [True, False]
    assert [one.licence for one in report.rows] == ["apache-2.0", "llama3.1"]
    assert report.licence == "The result carries llama3.1, the strictest: others carry apache-2.0."


def test_models_in_memory_and_recipes_of_stages_and_slices(llamas):
    module = LlamaForCausalLM.from_pretrained(llamas["a"])
    report = hf_merge.check([module, llamas["b"]])
    assert report.verdict == "fits" and report.rows[0].name == "model 0" and report.rows[0].tokenizer == "not known"
    stages = f"""
name: half
merge_method: linear
models: [{llamas["a"]}, {llamas["b"]}]
---
merge_method: task_arithmetic
base_model: {llamas["base"]}
models: [half, {llamas["a"]}]
"""
    report = hf_merge.check(hf_merge.Recipe.from_yaml(stages))
    assert report.verdict == "fits" and len(report.rows) == 3
    pieces = [{"sources": [{"model": str(llamas[name]), "layer_range": [0, 2]}]} for name in "ab"]
    report = hf_merge.check({"merge_method": "passthrough", "slices": pieces})
    assert report.verdict == "fits" and report.layers == 4


def test_a_recipe_that_cannot_be_meant_is_an_error():
    with pytest.raises(hf_merge.RecipeError, match="density"):
        hf_merge.check([STATE, dict(STATE)], method="ties", density="much")


def test_the_command_line_prints_sentence_table_and_fixes(llamas, wide):
    call = [sys.executable, "-m", "hf_merge.cli", "check", str(llamas["a"]), str(wide), "--base", str(llamas["base"])]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith(f"'{wide}' does not fit: embed_tokens has 65 rows")
    assert re.search(r"fix: Use the tokenizer of '.*' \(tokenizer_source: base\)", done.stdout)
    done = subprocess.run([*call, "--tokenizer-source", "base", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["recipe"]["tokenizer_source"] == "base"
