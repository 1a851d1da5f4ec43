"""A base with a PEFT adapter is a model: what PEFT itself would merge, tensor by tensor."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge.errors import OutputError, SourceError
from hf_merge.sources import open_source
from hf_merge.sources.lora import HARMLESS_FIELDS, READ_FIELDS, check_config
from hf_merge.types import ModelRef
from tests.conftest import imported_by

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # PEFT warns about fan_in_fan_out, saved embeddings and transformers' own deprecations


def make(architecture, **changes):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, **changes)
        return transformers.GPT2LMHeadModel(config)
    if architecture == "vit":
        config = transformers.ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4)
        return transformers.ViTForImageClassification(config)
    if architecture == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16, **changes)
        return transformers.BertForSequenceClassification(config)
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=False, **changes
    )
    return transformers.LlamaForCausalLM(config)


def adapted(model, folder, *, save=None, **settings):
    """Give a model a random adapter, save both, and return what PEFT merges them to."""
    from peft import LoraConfig, get_peft_model

    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "modules_to_save" in name or "lora_B.default.bias" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    peft.save_pretrained(folder / "adapter", **(save or {}))
    peft.merge_and_unload().save_pretrained(folder / "merged")
    return load_file(folder / "merged" / "model.safetensors")


def with_adapter(folder):
    return open_source(ModelRef.parse(f"{folder / 'base'}+{folder / 'adapter'}"))


PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "q_proj": 2}}
CASES = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "k_proj"], **PATTERNS}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "lora bias": ("bert", {"target_modules": ["query", "classifier"], "lora_bias": True}),
    "trained biases": ("bert", {"target_modules": ["value"], "bias": "all"}),
    "own biases": ("bert", {"target_modules": ["value"], "bias": "lora_only"}),
    "bert": ("bert", {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["classifier"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, square only": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    "conv1d, not said": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "conv2d": ("vit", {"target_modules": ["projection"]}),
    "names in memory": ("vit", {"target_modules": ["q_proj", "projection", "classifier"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_base_with_adapter_is_what_peft_merges(case, tmp_path):
    architecture, settings = CASES[case]
    merged = adapted(make(architecture), tmp_path, **settings)
    source, base = with_adapter(tmp_path), load_file(tmp_path / "base" / "model.safetensors")
    assert dict(source.specs) == dict(open_source(ModelRef(path=str(tmp_path / "base"))).specs)
    changed = 0
    for name in source:
        assert (source[name] - merged[name]).abs().max() < 1e-6, name
        changed += not torch.equal(source[name], base[name])
    assert changed >= (1 if case == "conv2d" else 2)


def test_an_adapter_of_layers_needs_no_class_of_transformers(tmp_path):
    expected = adapted(make("llama"), tmp_path, target_modules=["q_proj", "down_proj"])
    reference, out = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "out"
    code = f"import hf_merge; hf_merge.merge([{reference!r}], {str(out)!r}, method='passthrough')"
    assert imported_by(code, {"transformers", "peft"}) == "[]"
    merged = load_file(out / "model.safetensors")
    assert all((merged[name] - values).abs().max() < 1e-6 for name, values in expected.items())


def test_adapter_in_a_pytorch_file_and_with_embeddings_saved_beside(tmp_path):
    merged = adapted(make("llama"), tmp_path, target_modules=["embed_tokens"], save={"save_embedding_layers": True})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    keys = load_file(file)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in keys
    torch.save(keys, tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    source = with_adapter(tmp_path)
    assert all((source[name] - merged[name]).abs().max() < 1e-6 for name in source)


def test_half_precision_base_keeps_its_dtype_and_is_rounded_once(tmp_path):
    adapted(make("llama"), tmp_path, target_modules=["q_proj"])
    base = {n: t.bfloat16() for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    exact = adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double() * 5 / 3
    name = "model.layers.1.self_attn.q_proj.weight"
    found = with_adapter(tmp_path)[name]
    assert found.dtype == torch.bfloat16
    assert (found.double() - base[name].double() - exact).abs().max() <= 2**-8 * found.abs().max()


def test_merge_of_base_and_adapter_writes_peft_s_model_and_names_both(tmp_path):
    merged = adapted(make("llama"), tmp_path, target_modules=["q_proj", "embed_tokens"])
    name = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    recipe = {"merge_method": "task_arithmetic", "models": [{"model": name}], "base_model": str(tmp_path / "base")}
    done = hf_merge.merge(recipe, tmp_path / "m")
    state = done.load().state_dict()
    assert all((state[n] - t).abs().max() < 1e-6 for n, t in merged.items())
    assert "`base` + `adapter`" in done.card.text and "base+adapter" in done.card.text
    assert str(tmp_path) not in done.card.content
    recipe = (tmp_path / "m" / "hf_merge_recipe.yaml").read_text()
    again = hf_merge.merge(tmp_path / "m" / "hf_merge_recipe.yaml", tmp_path / "m2")
    assert name in recipe and torch.equal(again.load().lm_head.weight, done.load().lm_head.weight)


def test_base_and_adapter_of_the_hub_are_both_pinned_and_listed(tmp_path):
    adapted(make("llama"), tmp_path, target_modules=["q_proj"])
    for name, commit in (("base", "a" * 40), ("adapter", "b" * 40)):
        cached = tmp_path / "hub" / f"models--org--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "snapshots").mkdir()
        (cached / "refs" / "v1").write_text(commit)
        (cached / "snapshots" / commit).symlink_to(tmp_path / name)
    hub = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    done = hf_merge.merge(["org/base@v1+org/adapter@v1"], tmp_path / "m", method="passthrough", **hub)
    assert done.card.data.to_dict()["base_model"] == ["org/base", "org/adapter"]
    pinned = f"org/base@{'a' * 40}+org/adapter@{'b' * 40}"
    assert pinned in done.card.text and pinned in (tmp_path / "m" / "hf_merge_recipe.yaml").read_text()
    mixed = hf_merge.merge([f"org/base@v1+{tmp_path / 'adapter'}"], tmp_path / "m2", method="passthrough", **hub)
    assert f"org/base@{'a' * 40}+adapter" in mixed.card.text and str(tmp_path) not in mixed.card.content


def test_fingerprint_knows_both(tmp_path):
    adapted(make("llama"), tmp_path, target_modules=["q_proj"])
    before = with_adapter(tmp_path).fingerprint()
    assert before == with_adapter(tmp_path).fingerprint()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(path).items()} | {}, path)
    path.touch()
    assert with_adapter(tmp_path).fingerprint() != before


def test_adapter_is_not_overwritten_by_the_output(tmp_path):
    adapted(make("llama"), tmp_path, target_modules=["q_proj"])
    (tmp_path / "adapter" / "config.json").write_text("{}")
    name = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    with pytest.raises(OutputError, match="is or holds the input"):
        hf_merge.merge([name], tmp_path / "adapter", method="passthrough", overwrite=True)


@pytest.mark.parametrize("direction", ["added", "removed", "longer"])
def test_prefix_of_the_base_may_differ(direction, tmp_path):
    """An adapter of a headless model fits one with a head, and the reverse."""
    merged = adapted(make("bert"), tmp_path, target_modules=["query", "word_embeddings"])
    path = tmp_path / "base" / "model.safetensors"
    state = load_file(path)
    old, new = {"added": ("bert.", "a.bert."), "removed": ("bert.", ""), "longer": ("bert.", "a.b.bert.")}[direction]
    renamed = {name: new + name.removeprefix(old) if name.startswith(old) else name for name in state}
    save_file({renamed[name]: t for name, t in state.items()}, path, metadata={"format": "pt"})
    source = with_adapter(tmp_path)
    assert all((source[renamed[name]] - merged[name]).abs().max() < 1e-6 for name in state)


def test_adapter_over_a_quantised_base(llamas, tmp_path):
    from tests.test_quantized import quantise_folder

    true = quantise_folder(llamas["a"], tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj"
    factors = {"lora_A.weight": torch.randn(2, 32), "lora_B.weight": torch.randn(32, 2)}
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.{name}.{part}": t for part, t in factors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    write_config(tmp_path, peft_type="LORA", r=2, lora_alpha=4)
    source = with_adapter(tmp_path)
    expected = true[f"{name}.weight"] + 2 * factors["lora_B.weight"] @ factors["lora_A.weight"]
    assert torch.allclose(source[f"{name}.weight"], expected) and "quantization_config" not in source.config


# what is refused


def write_config(folder, **config):
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    adapted(make("llama"), folder, target_modules=["q_proj"])
    return folder


@pytest.fixture
def saved(plain, tmp_path):
    """A base and an adapter that a test may break."""
    for name in ("base", "adapter"):
        shutil.copytree(plain / name, tmp_path / name)
    return tmp_path


def edit(folder, change):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
Q = f"{STEM}.lora_A.weight"
BREAKS = {
    "no such tensor": (
        lambda t: t.update({k.replace("layers.0", "layers.7"): t.pop(k) for k in [Q, Q.replace("_A", "_B")]}),
        r"layers\.7\.self_attn\.q_proj\.lora_B\.weight' of .* has no place in .* lacks 'model\.layers\.7",
    ),
    "no such saved module": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(2)}),
        r"lacks 'score\.weight'",
    ),
    "saved module of another shape": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(41, 16)}),
        r"has the shape \[41, 16\], and the base's tensor \[40, 16\]",
    ),
    "half a pair": (lambda t: t.pop(Q), "not a pair of factors"),
    "dora": (
        lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.ones(16)}),
        "does not say use_dora, and has lora_magnitude_vector of",
    ),
    "no prefix": (lambda t: t.update({"lm_head.weight": torch.ones(40, 16)}), "'lm_head.weight' of .* is no tensor of"),
    "other width": (lambda t: t.update({Q: torch.ones(3, 17)}), r"\[16, 3\] and .* \[3, 17\] .* do not fit"),
    "other rank": (lambda t: t.update({Q: torch.ones(4, 16)}), "do not fit"),
    "no rank": (lambda t: t.update({Q: torch.ones(0, 16), f"{STEM}.lora_B.weight": torch.ones(16, 0)}), "do not fit"),
    "vector": (lambda t: t.update({Q: torch.ones(16)}), "do not fit"),
    "scalar": (lambda t: t.update({Q: torch.tensor(1.0)}), "do not fit"),
    "bias without place": (lambda t: t.update({f"{STEM}.lora_B.bias": torch.ones(16)}), r"lacks '.*q_proj\.bias'"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_adapter_that_does_not_fit_is_refused_by_the_name_of_its_tensor(case, saved):
    change, match = BREAKS[case]
    edit(saved, change)
    with pytest.raises(SourceError, match=match):
        with_adapter(saved)


CONFIGS = [
    ({"peft_type": "LOHA"}, "lacks '.*hada_w1_a', which its config asks for: merge it with PEFT"),
    ({"peft_type": None}, "should name its peft_type; found None"),
    ({"peft_type": "NEW"}, r"PEFT cannot apply '.*' \(NEW, trained on"),
    ({"peft_type": "PREFIX_TUNING"}, "of type PREFIX_TUNING, which cannot be merged: it adds tokens or states"),
    ({"peft_type": "XLORA"}, "of type XLORA, which cannot be merged: it mixes its adapters anew"),
    ({"use_dora": True}, r"says use_dora, and has no lora_magnitude_vector of 'model\.layers\.0"),
    (
        {"use_qalora": True, "layer_replication": [[0, 1]]},
        "uses use_qalora, and cannot be merged: QALoRA is a part of a GPTQ",
    ),
    ({"r": 4}, "have rank 3, and its config says 4"),
    ({"something_new": {"x": 1}}, "something_new"),
    ({"init_lora_weights": "pissa"}, "made by 'pissa', which changes the base too"),
    ({"init_lora_weights": ["x"]}, r"made by \['x'\]"),
    ({"lora_alpha": "8"}, "numbers for r and alpha"),
    ({"lora_alpha": float("nan")}, "numbers for r and alpha"),
    ({"alpha_pattern": {"q_proj": []}}, "numbers for r and alpha"),
    ({"alpha_pattern": [1]}, "should map names to numbers"),
    ({"alpha_pattern": {"(": 2}}, "is no regular expression"),
]


@pytest.mark.parametrize(("change", "match"), CONFIGS)
def test_what_is_no_plain_lora_is_refused_by_name(change, match, saved):
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    write_config(saved, **(config | change))
    with pytest.raises(SourceError, match=match):
        with_adapter(saved)


def test_every_field_of_peft_s_config_is_read_harmless_or_refused():
    """A field that PEFT adds fails here, until it is known what it changes."""
    from peft import LoraConfig

    refused = {
        "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config",
        "velora_config", "monteclora_config", "kasa_config",
        "megatron_config",
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(LoraConfig)} == READ_FIELDS | HARMLESS_FIELDS | refused
    for field in refused:
        with pytest.raises(SourceError, match=field):
            check_config({"peft_type": "LORA", field: True}, "a")


def test_folder_that_holds_no_adapter_is_told(saved):
    (saved / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"is no PEFT adapter: it lacks adapter_config\.json or"):
        with_adapter(saved)
    with pytest.raises(SourceError, match="There is no model at"):
        open_source(ModelRef.parse(f"{saved / 'base'}+{saved / 'absent'}"))
