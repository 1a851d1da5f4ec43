"""Models saved in different layouts are merged under the donor's names, exactly."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel, Qwen2ForCausalLM

import hf_merge
from hf_merge import _compat
from hf_merge.errors import PlanError
from hf_merge.sources import layout, open_source
from hf_merge.types import ModelRef
from tests.architectures import reload, save_tiny, tiny_config, tiny_model


def weights(folder):
    return load_file(folder / "model.safetensors")


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def loaded(folder, model_class=None):
    """Load a merge; nothing may be missing, unexpected or of another shape."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = (model_class or getattr(transformers, name)).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_mean(merged, a, b):
    """Require that a loaded model is the mean of two, by the names in memory."""
    mine, left, right = merged.state_dict(), a.state_dict(), b.state_dict()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, (left[name] + right[name]) / 2, atol=1e-8, rtol=1e-6)


MOES = ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"]


@pytest.mark.parametrize("name", MOES)
@pytest.mark.parametrize("donor_is_fused", [True, False])
def test_fused_and_single_experts_are_merged_in_the_donors_layout(name, donor_is_fused, tmp_path):
    a, b = tiny_model(name, 1), tiny_model(name, 2)
    folders = [save(a, tmp_path / "a", save_original_format=not donor_is_fused)]
    folders.append(save(b, tmp_path / "b", save_original_format=donor_is_fused))
    assert weights(folders[0]).keys() != weights(folders[1]).keys()
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert not out.plan.problems
    assert weights(out.path).keys() == weights(folders[0]).keys()
    assert_mean(loaded(out.path), a, b)


def test_ties_is_the_same_in_any_mix_of_layouts(tmp_path):
    mixed, same = save_tiny("MixtralForCausalLM", tmp_path / "x"), save_tiny("MixtralForCausalLM", tmp_path / "y")
    save(mixed.models["b"], tmp_path / "fused", save_original_format=False)
    options = {"method": "ties", "density": 0.5, "base_model": same.folders["base"]}
    one = hf_merge.merge([mixed.folders["a"], tmp_path / "fused"], tmp_path / "m", **options)
    two = hf_merge.merge([same.folders["a"], same.folders["b"]], tmp_path / "n", **options)
    found, wanted = weights(one.path), weights(two.path)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_single_experts_of_a_fused_file_are_views_of_it(tmp_path):
    save(tiny_model("MixtralForCausalLM", 1), tmp_path / "fused", save_original_format=False)
    save(tiny_model("MixtralForCausalLM", 2), tmp_path / "single")
    refs = [ModelRef(path=str(tmp_path / name)) for name in ("single", "fused")]
    fused = open_source(refs[1])
    view = layout.align_layouts({refs[0]: open_source(refs[0]), refs[1]: fused}, refs[0])[refs[1]]
    whole = fused["model.layers.0.mlp.experts.gate_up_proj"].untyped_storage().data_ptr()
    for expert in range(4):
        for part in ("w1", "w3"):
            tensor = view[f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"]
            assert type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() == whole


def test_an_expert_too_few_is_said(tmp_path):
    save(tiny_model("MixtralForCausalLM", 1), tmp_path / "fused", save_original_format=False)
    save(tiny_model("MixtralForCausalLM", 2), tmp_path / "single")
    tensors = {
        name: t for name, t in weights(tmp_path / "single").items() if "0.block_sparse_moe.experts.3" not in name
    }
    save_file(tensors, tmp_path / "single" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match=r"experts.gate_up_proj \[3, 96, 32\] instead of \[4, 96, 32\]"):
        hf_merge.merge([tmp_path / "fused", tmp_path / "single"], tmp_path / "m", method="linear")


@pytest.mark.parametrize("name", ["ViTForImageClassification", "GPTNeoXForCausalLM", "LlavaForConditionalGeneration"])
@pytest.mark.parametrize("donor_is_original", [True, False])
def test_names_on_disk_and_in_memory_are_brought_together(name, donor_is_original, tmp_path):
    a, b = tiny_model(name, 1), tiny_model(name, 2)
    folders = [save(a, tmp_path / "a", save_original_format=donor_is_original)]
    folders.append(save(b, tmp_path / "b", save_original_format=not donor_is_original))
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert not out.plan.problems
    assert weights(out.path).keys() == weights(folders[0]).keys()
    assert_mean(loaded(out.path), a, b)


def test_a_state_dict_in_memory_names_joins_a_checkpoint(tmp_path):
    a, b = tiny_model("MixtralForCausalLM", 1), tiny_model("MixtralForCausalLM", 2)
    out = hf_merge.merge([save(a, tmp_path / "a"), b.state_dict()], tmp_path / "m", method="linear")
    assert not out.plan.problems
    assert_mean(loaded(out.path), a, b)


def test_a_prefix_more_or_less_is_no_other_model(tmp_path):
    a, b = tiny_model("BertForMaskedLM", 1), tiny_model("BertForMaskedLM", 2)
    save(a, tmp_path / "head")
    save(b.bert, tmp_path / "body")
    to_body = hf_merge.merge([tmp_path / "body", tmp_path / "head"], tmp_path / "m", method="linear")
    extra = [problem for problem in to_body.plan.problems if "left out" in problem.message]
    assert set(extra[0].tensors) == {name for name in weights(tmp_path / "head") if name.startswith("cls.")}
    model = BertModel.from_pretrained(to_body.path, add_pooling_layer=False)
    assert_mean(model, a.bert, b.bert)
    with pytest.raises(PlanError, match=r"lacks tensors of .*missing: base.*cls.predictions"):
        hf_merge.merge([tmp_path / "head", tmp_path / "body"], tmp_path / "n", method="linear")
    to_head = hf_merge.merge([tmp_path / "head", tmp_path / "body"], tmp_path / "o", method="linear", missing="base")
    model = loaded(to_head.path, BertForMaskedLM)
    assert_mean(model.bert, a.bert, b.bert)
    assert torch.equal(model.cls.predictions.transform.dense.weight, a.cls.predictions.transform.dense.weight)


def test_the_names_of_old_checkpoints_are_understood(tmp_path):
    a, b = tiny_model("BertForMaskedLM", 1), tiny_model("BertForMaskedLM", 2)
    folders = [save(a, tmp_path / "new"), save(b, tmp_path / "old")]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights(folders[1]).items()
    }
    save_file(old, folders[1] / "model.safetensors", {"format": "pt"})
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert not out.plan.problems
    assert_mean(loaded(out.path), a, b)
    assert hf_merge.plan(folders[::-1], method="linear").specs.keys() == old.keys()


def test_single_experts_under_another_prefix_are_only_renamed(tmp_path):
    a, b = tiny_model("Qwen3MoeForCausalLM", 1), tiny_model("Qwen3MoeForCausalLM", 2)
    refs = [ModelRef(path=str(save(a, tmp_path / "head"))), ModelRef(path=str(save(b.model, tmp_path / "body")))]
    body = open_source(refs[1])
    view = layout.align_layouts({refs[0]: open_source(refs[0]), refs[1]: body}, refs[0])[refs[1]]
    name = "layers.1.mlp.experts.2.up_proj.weight"
    assert view[f"model.{name}"].data_ptr() == body[name].data_ptr()
    out = hf_merge.merge([tmp_path / "head", tmp_path / "body"], tmp_path / "m", method="linear", missing="base")
    assert_mean(loaded(out.path).model, a.model, b.model)


def test_two_towers_of_one_shape_are_not_taken_for_each_other():
    layers = {f"encoder.layers.{i}.{part}.weight": torch.ones(2, 2) for i in range(2) for part in "qkv"}
    text, vision = ({f"{tower}_model.{name}": t for name, t in layers.items()} for tower in ("text", "vision"))
    with pytest.raises(PlanError, match="lacks tensors"):
        hf_merge.merge_state_dicts([text, vision], method="linear")
    with pytest.raises(PlanError, match="lacks tensors"):
        hf_merge.merge_state_dicts([{**text, **vision}, layers], method="linear")


def test_a_prefix_of_a_plain_state_dict_is_seen_through():
    plain = {f"layers.{i}.weight": torch.full((2, 2), float(i)) for i in range(2)} | {"head.weight": torch.ones(2)}
    wrapped = {f"module.{name}": tensor + 2 for name, tensor in plain.items()}
    merged = hf_merge.merge_state_dicts([plain, wrapped], method="linear")
    assert all(torch.equal(merged[name], tensor + 1) for name, tensor in plain.items())


def test_a_state_dict_that_holds_a_tensor_twice_gets_one_mask_for_both():
    tensors = [torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    base, *models = ({"in.weight": tensor, "out.weight": tensor} for tensor in tensors)
    merged = hf_merge.merge_state_dicts(models, method="dare_linear", base_model=base, density=0.5)
    assert torch.equal(merged["in.weight"], merged["out.weight"])
    models[1] = {"in.weight": tensors[2], "out.weight": tensors[2].clone()}
    merged = hf_merge.merge_state_dicts(models, method="dare_linear", base_model=base, density=0.5)
    assert not torch.equal(merged["in.weight"], merged["out.weight"])


def qwen(seed, **changes):
    config = tiny_config("Qwen2ForCausalLM")
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config).eval()


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("donor_is_tied", [True, False])
def test_a_tied_and_an_untied_head_give_an_untied_model(donor_is_tied, tmp_path):
    tied, untied = qwen(1, tie_word_embeddings=True), qwen(2, tie_word_embeddings=False)
    models = [tied, untied] if donor_is_tied else [untied, tied]
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert not out.plan.problems
    assert json.loads((out.path / "config.json").read_text())["tie_word_embeddings"] is False
    model = loaded(out.path)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_mean(model, tied, untied)


def test_a_tied_base_under_untied_models_is_untied_as_well(tmp_path):
    base, a = qwen(0, tie_word_embeddings=True), qwen(1, tie_word_embeddings=False)
    folders = [save(base, tmp_path / "base"), save(a, tmp_path / "a")]
    out = hf_merge.merge(folders[1:], tmp_path / "m", method="task_arithmetic", base_model=folders[0])
    model = loaded(out.path)
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_heads_that_are_all_tied_are_merged_once(tmp_path):
    folders = [save(qwen(seed, tie_word_embeddings=True), tmp_path / str(seed)) for seed in (1, 2)]
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert HEAD not in out.plan.specs
    assert json.loads((out.path / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_a_tied_pair_stored_twice_stays_one(kind, tmp_path):
    folders = []
    for seed in (0, 1, 2):
        model = qwen(seed, tie_word_embeddings=True)
        folders.append(save(model, tmp_path / str(seed)))
        (folders[-1] / "model.safetensors").unlink()
        if kind.endswith(".bin"):
            torch.save(model.state_dict(), folders[-1] / kind)
        else:
            save_file({name: t.clone() for name, t in model.state_dict().items()}, folders[-1] / kind, {"format": "pt"})
    out = hf_merge.merge(folders[1:], tmp_path / "m", method="dare_ties", base_model=folders[0], density=0.5)
    tensors = weights(out.path)
    assert torch.equal(tensors[HEAD], tensors[EMBEDDINGS])
    model = loaded(out.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_pair_stored_twice_with_other_values_is_untied(tmp_path):
    folders = [save(qwen(seed, tie_word_embeddings=True), tmp_path / str(seed)) for seed in (1, 2)]
    tensors = weights(folders[1])
    save_file({**tensors, HEAD: tensors[EMBEDDINGS] * 3}, folders[1] / "model.safetensors", {"format": "pt"})
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    merged, first = weights(out.path), weights(folders[0])
    assert torch.equal(merged[HEAD], (first[EMBEDDINGS] + tensors[EMBEDDINGS] * 3) / 2)
    assert json.loads((out.path / "config.json").read_text())["tie_word_embeddings"] is False


def text_part(name, vlm, seed, **changes):
    """Make a text model of the same sizes as the decoder of one that also sees, with its head tied or not alike."""
    config = vlm.config.get_text_config()
    torch.manual_seed(seed)
    text_class = getattr(transformers, name)
    values = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    values |= {"tie_word_embeddings": vlm.config.tie_word_embeddings, **changes}
    return text_class(text_class.config_class(**values)).eval()


PAIRS = [
    ("LlamaForCausalLM", "LlavaForConditionalGeneration"),
    ("Qwen2ForCausalLM", "Qwen2VLForConditionalGeneration"),
    ("MistralForCausalLM", "Mistral3ForConditionalGeneration"),
    ("GemmaForCausalLM", "PaliGemmaForConditionalGeneration"),
]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_a_text_model_is_merged_into_the_decoder_of_one_that_sees(text, vision, original, tmp_path):
    vlm = tiny_model(vision, 1)
    llm = text_part(text, vlm, 2)
    folders = [save(vlm, tmp_path / "vlm", save_original_format=original), save(llm, tmp_path / "llm")]
    with pytest.raises(PlanError, match="missing: base"):
        hf_merge.merge(folders, tmp_path / "m", method="linear")
    out = hf_merge.merge(folders, tmp_path / "m", method="linear", missing="base")
    assert weights(out.path).keys() == weights(folders[0]).keys()
    merged = loaded(out.path)
    assert_mean(merged.get_decoder(), vlm.get_decoder(), llm.get_decoder())
    assert_mean(merged.lm_head, vlm.lm_head, llm.lm_head)
    for name, tensor in merged.state_dict().items():
        if "vis" in name:
            assert torch.equal(tensor, vlm.state_dict()[name]), name


@pytest.mark.parametrize("vision_is_fused", [True, False])
def test_experts_of_a_text_model_find_those_of_one_that_sees_in_another_layout(vision_is_fused, tmp_path):
    vlm = tiny_model("Qwen3_5MoeForConditionalGeneration", 1)
    llm = text_part("Qwen3_5MoeForCausalLM", vlm, 2)
    folders = [save(vlm, tmp_path / "vlm", save_original_format=not vision_is_fused)]
    folders.append(save(llm, tmp_path / "llm", save_original_format=vision_is_fused))
    out = hf_merge.merge(folders, tmp_path / "m", method="linear", missing="base")
    assert weights(out.path).keys() == weights(folders[0]).keys()
    merged = loaded(out.path)
    assert_mean(merged.get_decoder(), vlm.get_decoder(), llm.get_decoder())
    assert_mean(merged.lm_head, vlm.lm_head, llm.lm_head)


def test_a_decoder_that_is_tied_is_untied_by_a_text_model_that_is_not(tmp_path):
    vlm = tiny_model("Mistral3ForConditionalGeneration", 1)
    llm = text_part("MistralForCausalLM", vlm, 2, tie_word_embeddings=False)
    folders = [save(vlm, tmp_path / "vlm"), save(llm, tmp_path / "llm")]
    out = hf_merge.merge(folders, tmp_path / "m", method="linear", missing="base")
    merged = loaded(out.path)
    assert_mean(merged.get_decoder(), vlm.get_decoder(), llm.get_decoder())
    assert_mean(merged.lm_head, vlm.lm_head, llm.lm_head)


@pytest.mark.parametrize(("text", "vision"), PAIRS[:1])
def test_the_decoder_of_one_that_sees_is_merged_into_a_text_model(text, vision, tmp_path):
    vlm = tiny_model(vision, 1)
    llm = text_part(text, vlm, 2)
    folders = [save(llm, tmp_path / "llm"), save(vlm, tmp_path / "vlm")]
    out = hf_merge.merge(folders, tmp_path / "m", method="linear")
    assert any("left out" in problem.message for problem in out.plan.problems)
    assert_mean(loaded(out.path).model, vlm.get_decoder(), llm.get_decoder())


def test_a_text_model_of_another_depth_is_refused_by_the_plan(tmp_path):
    vlm = tiny_model(PAIRS[0][1], 1)
    llm = text_part(PAIRS[0][0], vlm, 2)
    llm.model.layers = llm.model.layers[:1]
    llm.config.num_hidden_layers = 1
    plan = hf_merge.plan([save(vlm, tmp_path / "vlm"), save(llm, tmp_path / "llm")], method="linear")
    assert any("lacks tensors" in problem.message for problem in plan.errors)


def test_the_same_names_cost_nothing(llamas, monkeypatch):
    refs = [ModelRef(path=str(llamas[name])) for name in ("base", "a", "b")]
    sources = {ref: open_source(ref) for ref in refs}
    monkeypatch.setattr(_compat, "empty_model", lambda config: pytest.fail("a model was built"))
    aligned = layout.align_layouts(sources, refs[0])
    assert all(aligned[ref] is sources[ref] for ref in refs)


def test_a_reloaded_mix_runs(tmp_path):
    saved = save_tiny("Qwen3MoeForCausalLM", tmp_path)
    fused = save(saved.models["b"], tmp_path / "fused", save_original_format=False)
    out = hf_merge.merge([saved.folders["a"], fused], tmp_path / "m", method="linear")
    model = reload(saved, out.path)
    assert bool(model(input_ids=torch.tensor([[1, 5, 6]])).logits.isfinite().all())
