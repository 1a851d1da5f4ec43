"""Quantised checkpoints are merged as what they stand for; what cannot be dequantised is refused by name."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_merge
from hf_merge.errors import SourceError
from hf_merge.sources import open_source
from hf_merge.sources.base import Source
from hf_merge.sources.quantized import dequantized
from hf_merge.types import InMemory, ModelRef, TensorSpec
from tests.conftest import small_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
BITS = importlib.util.find_spec("bitsandbytes") is not None


class Quantised(Source):
    """Tensors with a config, as a checkpoint has them; counts what is read."""

    def __init__(self, tensors, quantization, **config):
        self.label, self.tensors, self.read = "m", tensors, []
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.config = {"dtype": "float32", "quantization_config": quantization, **config}

    def __getitem__(self, name):
        self.read.append(name)
        return self.tensors[name]


def fp8_blocks(weight, size, largest=448.0):
    """Quantise as DeepSeek does: a scale for each block, the last ones smaller."""
    rows, columns = (-(-n // size) for n in weight.shape)
    quantised, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[place].abs().max() / largest
            quantised[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantised, scales


def by_hand(quantised, scales, size):
    full = scales.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return quantised.float() * full[: quantised.shape[0], : quantised.shape[1]]


def quantise_folder(folder, target, size=16, dtype="float32"):
    """Write an fp8 checkpoint as transformers does: projections quantised, embeddings, norms and head not."""
    shutil.copytree(folder, target)
    state, true = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            state[name], state[f"{name}_scale_inv"] = fp8_blocks(weight, size)
            true[name] = by_hand(state[name], state[f"{name}_scale_inv"], size)
        else:
            state[name] = true[name] = weight.clone()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config |= {"dtype": dtype, "quantization_config": {**FP8, "weight_block_size": [size, size]}}
    (target / "config.json").write_text(json.dumps(config))
    return true


def test_fp8_model_merges_into_a_model_of_true_weights(llamas, tmp_path):
    true = quantise_folder(llamas["a"], tmp_path / "fp8")
    merged = hf_merge.merge([tmp_path / "fp8", llamas["b"]], tmp_path / "m", method="linear", weight=[1.0, 0.0])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert set(found) == set(true)
    for name, weight in true.items():
        assert torch.equal(found[name], weight), name
        assert found[name].abs().max() < 2
    model = merged.load()
    assert isinstance(model, LlamaForCausalLM) and model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_fp8_view_is_what_transformers_dequantises(llamas, tmp_path):
    quantise_folder(llamas["a"], tmp_path / "fp8", dtype="bfloat16")
    source = open_source(ModelRef(path=str(tmp_path / "fp8")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype="bfloat16").state_dict()
    assert source.config["dtype"] == "bfloat16"
    for name in (name for name in source if name.endswith("_proj.weight")):
        assert source.specs[name].dtype == source[name].dtype == torch.bfloat16
        assert torch.equal(source[name], theirs[name]), name


@pytest.mark.parametrize("shape", [(48, 32), (40, 24), (16, 5), (1, 33), (300, 17)])
def test_fp8_blocks_at_the_edges_are_smaller(shape):
    weight = torch.randn(shape)
    quantised, scales = fp8_blocks(weight, 16)
    source = dequantized(Quantised({"x.weight": quantised, "x.weight_scale_inv": scales}, FP8))
    assert list(source) == ["x.weight"]
    assert torch.equal(source["x.weight"], by_hand(quantised, scales, 16))
    assert (source["x.weight"] - weight).abs().max() <= weight.abs().max() / 16


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        (torch.tensor(0.5), "x.weight_scale_inv"),
        (torch.tensor([0.5]), "x.weight_scale"),
        (torch.rand(6), "x.weight_scale"),
        (torch.rand(6, 1), "x.weight_scale"),
        (torch.rand(3, 2), "x.scale"),
        (torch.rand(3, 2), "x.qscale_weight"),
        (torch.tensor([[0.5, 2.0]] * 3).to(torch.float8_e8m0fnu), "x.weight_scale_inv"),
    ],
)
def test_fp8_scales_of_tensors_rows_and_unstated_blocks(scale, name):
    quantised = torch.randn(6, 8).to(torch.float8_e4m3fn)
    extra = {"x.activation_scale": torch.ones(()), "x.bias": torch.ones(6)}
    source = dequantized(Quantised({"x.weight": quantised, name: scale, **extra}, {"quant_method": "fp8"}))
    factors = scale.float().reshape(-1, 1) if scale.ndim < 2 else scale.float().repeat_interleave(6 // len(scale), 0)
    factors = factors.repeat_interleave(8 // factors.shape[1], 1)
    assert list(source) == ["x.weight", "x.bias"] and torch.equal(source["x.bias"], torch.ones(6))
    assert torch.equal(source["x.weight"], quantised.float() * factors)


def test_fp8_experts_in_one_tensor_and_exponents_as_bytes():
    quantised = torch.randn(3, 4, 8).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (3, 2, 2), dtype=torch.uint8)
    tensors = {"e.gate_up_proj": quantised, "e.gate_up_proj_scale_inv": exponents}
    source = dequantized(Quantised(tensors, {"quant_method": "fp8"}))
    factors = (exponents.float() - 127).exp2().repeat_interleave(2, 1).repeat_interleave(4, 2)
    assert torch.equal(source["e.gate_up_proj"], quantised.float() * factors)
    tensors["e.gate_up_proj_scale_inv"] = torch.tensor([1.0, 2.0, 3.0])
    whole = dequantized(Quantised(tensors, {"quant_method": "fp8"}))
    assert torch.equal(whole["e.gate_up_proj"], quantised.float() * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))


def test_values_are_read_when_asked_for():
    quantised, scales = fp8_blocks(torch.randn(32, 32), 16)
    plain = Quantised({"x.weight": quantised, "x.weight_scale_inv": scales, "y": torch.ones(2)}, FP8)
    source = dequantized(plain)
    assert plain.read == [] and len(source) == 2
    source["y"]
    assert plain.read == ["y"]
    with pytest.raises(KeyError):
        source["x.weight_scale_inv"]


def test_config_may_be_nested_and_say_no_dtype():
    quantised = {"x.weight": torch.ones(2, 2).to(torch.float8_e5m2), "x.weight_scale_inv": torch.tensor(3.0)}
    config = {"dtype": None, "text_config": {"quantization_config": FP8, "vocab_size": 3}}
    source = dequantized(Quantised(quantised, None, **config))
    assert source.specs["x.weight"].dtype == torch.bfloat16 and source["x.weight"].tolist() == [[3, 3], [3, 3]]
    assert source.config["text_config"] == {"vocab_size": 3} and "quantization_config" not in source.config


def mxfp4(experts=3, rows=6, groups=2):
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (experts, rows, groups), dtype=torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    true = (values * (scales.float() - 127).exp2()[..., None]).flatten(-2).transpose(1, 2)
    return {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}, true


def test_mxfp4_is_in_by_rows_as_in_transformers():
    tensors, true = mxfp4()
    tensors["mlp.experts.down_proj_bias"] = torch.ones(3, 6)
    source = dequantized(Quantised(tensors, {"quant_method": "mxfp4"}, dtype="bfloat16"))
    assert set(source) == {"mlp.experts.down_proj", "mlp.experts.down_proj_bias"}
    assert source.specs["mlp.experts.down_proj"] == TensorSpec((3, 64, 6), torch.bfloat16)
    assert torch.equal(source["mlp.experts.down_proj"].float(), true)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_gpt_oss_in_mxfp4_is_what_transformers_dequantises(tmp_path):
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    model = GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_experts_per_tok=1, pad_token_id=0)).bfloat16()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for proj, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        stem = f"model.layers.0.mlp.experts.{proj}"
        packed, _ = mxfp4(2, rows, 1)
        state |= {f"{stem}_{part}": packed[f"mlp.experts.down_proj_{part}"] for part in ("blocks", "scales")}
        del state[stem]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    theirs = GptOssForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").state_dict()
    merged = hf_merge.merge([tmp_path], tmp_path / "m", method="passthrough")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert set(found) == set(theirs)
    assert all(torch.equal(found[name], weight) for name, weight in theirs.items())
    assert isinstance(merged.load(), GptOssForCausalLM)


def test_int8_of_bitsandbytes_is_a_scale_for_each_row():
    values, scales = torch.randint(-127, 128, (5, 7), dtype=torch.int8), torch.rand(5)
    tensors = {"x.weight": values, "x.SCB": scales, "x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    source = dequantized(Quantised({**tensors, "x.bias": torch.ones(5)}, {"load_in_8bit": True}))
    assert set(source) == {"x.weight", "x.bias"}
    assert torch.allclose(source["x.weight"], values.float() * scales[:, None] / 127)
    tensors["x.weight_format"] += 1
    with pytest.raises(SourceError, match="shuffled"):
        dequantized(Quantised(tensors, {"load_in_8bit": True}))["x.weight"]


def four_bits(size_of, size=64, *, nested=False, **changes):
    """A 4-bit weight by its format, and what it stands for."""
    numel = torch.Size(size_of).numel()
    codes, table = torch.randint(0, 16, (numel + numel % 2,)), torch.randn(16)
    blocks = -(-numel // size)
    words = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": list(size_of)}
    tensors = {"x.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "x.weight.quant_map": table}
    absmax = tensors["x.weight.absmax"] = torch.rand(blocks)
    if nested:
        index, second, largest = torch.randint(0, 256, (blocks,)), torch.randn(256), torch.rand(-(-blocks // 256))
        tensors |= {"x.weight.absmax": index.to(torch.uint8), "x.weight.nested_quant_map": second}
        tensors["x.weight.nested_absmax"] = largest
        words |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = second[index] * largest.repeat_interleave(256)[:blocks] + 0.25
    packed = json.dumps(words | changes).encode()
    tensors["x.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(packed), dtype=torch.uint8)
    true = table[codes[:numel]] * absmax.repeat_interleave(size)[:numel]
    return tensors, true.reshape(size_of)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 32), (7, 9), (1, 1), (1025, 1031)])
def test_four_bits_of_bitsandbytes_by_their_format(shape, nested):
    tensors, true = four_bits(shape, nested=nested)
    source = dequantized(Quantised(tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    assert list(source) == ["x.weight"] and source.specs["x.weight"].shape == shape
    assert torch.equal(source["x.weight"], true)


@pytest.mark.skipif(not BITS, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    ],
)
def test_bitsandbytes_itself_dequantises_to_the_same(settings, tmp_path):
    """Rows are of whole blocks: bitsandbytes 0.50 misreads others on the CPU."""
    from transformers import BitsAndBytesConfig

    LlamaForCausalLM(small_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path / "a")
    config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", quantization_config=config, dtype=torch.float32)
    live = open_source(InMemory(model, "live"))
    model.save_pretrained(tmp_path / "q")
    live = {name: live[name] for name in live}
    theirs = model.dequantize(dtype=torch.float32).state_dict()
    source = open_source(ModelRef(path=str(tmp_path / "q")))
    assert "quantization_config" not in source.config and set(source) == set(theirs) == set(live)
    for name, weight in theirs.items():
        assert (source[name].float() - weight.float()).abs().max() <= 1e-6 * weight.abs().max(), name
        assert torch.equal(live[name], source[name])
    hf_merge.merge([tmp_path / "q", tmp_path / "a"], tmp_path / "m", method="linear").load()


OTHERS = ["gptq", "awq", "compressed-tensors", "torchao", "hqq", "quanto", "fbgemm_fp8", "bitnet", "modelopt"]


@pytest.mark.parametrize("method", [*OTHERS, None, 3, ["fp8"], {}])
def test_what_cannot_be_undone_is_refused_by_name(method):
    source = Quantised({"x": torch.ones(2)}, {"quant_method": method, "bits": 4})
    with pytest.raises(SourceError, match=r"is quantised by .*cannot undo: name the unquantised model, or load it"):
        dequantized(source)


def test_refusal_reaches_the_user_of_plan(llamas, tmp_path):
    shutil.copytree(llamas["a"], tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(SourceError, match="'awq'"):
        hf_merge.plan([llamas["b"], tmp_path / "q"], method="linear")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"x": torch.zeros(3, dtype=torch.float8_e4m3fn)}, "fp8 without scales gives garbage"),
        ({"x.weight": torch.zeros(2, 2), "x.weight_scale_inv": torch.ones(1, 1)}, "no quantization_config says how"),
        ({"x.qweight": torch.zeros(3, dtype=torch.int32)}, "no quantization_config says how"),
    ],
)
def test_quantised_tensors_that_no_config_explains_are_refused(tensors, match):
    with pytest.raises(SourceError, match=match):
        open_source(InMemory(tensors, "m"))


def _without(part):
    tensors, _ = four_bits((8, 16))
    return {name: t for name, t in tensors.items() if not name.endswith(part)}


BITS_AND_BYTES, MXFP4 = {"quant_method": "bitsandbytes"}, {"quant_method": "mxfp4"}
F8 = torch.zeros(6, 8).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "quantization", "match"),
    [
        ({"x.weight": F8, "y.weight": F8, "y.weight_scale_inv": torch.ones(())}, FP8, "without scales .'x.weight'"),
        ({"x.weight": F8, "x.weight_scale_inv": torch.ones(5, 3)}, FP8, r"\[5, 3\] do not fit its shape \[6, 8\]"),
        ({"x.weight": F8.to(torch.int8), "x.weight_scale_inv": torch.ones(6, 1)}, FP8, "packed fp4"),
        ({"x_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8)}, MXFP4, "'x_scales' of shape"),
        ({"x.weight": torch.zeros(2, 3), "x.SCB": torch.ones(2)}, BITS_AND_BYTES, "should be int8"),
        ({"x.weight": torch.zeros(2, 3, dtype=torch.int8), "x.SCB": torch.ones(5)}, BITS_AND_BYTES, "should be int8"),
        (four_bits((8, 16), shape=[1 << 40, 3])[0], BITS_AND_BYTES, r"'x.weight' should have \d+ values and has 64"),
        (four_bits((8, 16), shape=[-8, 16])[0], BITS_AND_BYTES, "positive integers"),
        (four_bits((8, 16), blocksize=0)[0], BITS_AND_BYTES, "positive integers"),
        (four_bits((8, 16), shape="ab")[0], BITS_AND_BYTES, "positive integers"),
        (four_bits((8, 16), shape=None)[0], BITS_AND_BYTES, "does not say its shape"),
        (_without(".absmax"), BITS_AND_BYTES, "'x.weight.absmax' should have 2 values and has 0"),
        (_without(".quant_map"), BITS_AND_BYTES, "'x.weight.quant_map' should have 16"),
    ],
)
def test_quantised_tensors_that_do_not_fit_are_refused_when_they_are_opened(tensors, quantization, match):
    with pytest.raises(SourceError, match=match):
        dequantized(Quantised(tensors, quantization))


def test_bitsandbytes_with_transposed_layers_is_refused():
    with pytest.raises(SourceError, match="transposes"):
        dequantized(Quantised(four_bits((8, 16))[0], BITS_AND_BYTES, model_type="gpt2"))


def test_view_is_the_model_it_shows(llamas, tmp_path):
    quantise_folder(llamas["a"], tmp_path / "fp8")
    source = open_source(ModelRef(path=str(tmp_path / "fp8")))
    assert source.label == str(tmp_path / "fp8") and source.fingerprint() == source.parts[0].fingerprint()
    source.write_companions(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    with pytest.raises(hf_merge.errors.OutputError, match="is or holds the input"):
        hf_merge.merge([tmp_path / "fp8"], tmp_path / "fp8", method="passthrough", overwrite=True)
