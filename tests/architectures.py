"""Tiny random models of many architectures, made by one rule; `python -m tests.architectures` writes the table."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

import hf_merge
from hf_merge import get_method
from hf_merge.architecture import may_be_tied, skeleton

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"

_LISTED = """
LlamaForCausalLM Llama4ForCausalLM MistralForCausalLM MixtralForCausalLM MinistralForCausalLM Qwen2ForCausalLM
Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration GemmaForCausalLM
Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration PhiForCausalLM Phi3ForCausalLM
FalconForCausalLM GPT2LMHeadModel GPTNeoForCausalLM GPTNeoXForCausalLM GPTJForCausalLM OPTForCausalLM BloomForCausalLM
Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM CohereForCausalLM Cohere2ForCausalLM GraniteForCausalLM
GraniteMoeForCausalLM GraniteMoeHybridForCausalLM DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4ForCausalLM
Glm4MoeForCausalLM GptOssForCausalLM MambaForCausalLM Mamba2ForCausalLM JambaForCausalLM SmolLM3ForCausalLM
Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM Lfm2ForCausalLM Starcoder2ForCausalLM StableLmForCausalLM
Exaone4ForCausalLM MiniMaxForCausalLM BertModel BertForMaskedLM BertForSequenceClassification RobertaForMaskedLM
XLMRobertaForMaskedLM ModernBertForMaskedLM DistilBertForMaskedLM ElectraForPreTraining MPNetForMaskedLM
DebertaV2ForMaskedLM T5ForConditionalGeneration T5ForConditionalGeneration-gated BartForConditionalGeneration
WhisperForConditionalGeneration Wav2Vec2ForCTC ViTForImageClassification Dinov2ForImageClassification
SwinForImageClassification ConvNextForImageClassification ResNetForImageClassification BeitForImageClassification
CLIPModel SiglipModel LlavaForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration
Qwen3VLForConditionalGeneration Idefics3ForConditionalGeneration SmolVLMForConditionalGeneration
PaliGemmaForConditionalGeneration Mistral3ForConditionalGeneration InternVLForConditionalGeneration
"""
NAMES = tuple(_LISTED.split())
"""Model classes of transformers; what follows a hyphen is a variant in OVERRIDES."""
UNTESTED = {"Gemma3nForConditionalGeneration": "its vision tower is one of timm's, which is no dependency"}
"""Classes that cannot be made here, each with its reason."""

_SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim out_hidden_size "
        "projection_dim output_hidden_size pooler_hidden_size pooler_output_size projection_size "
        "max_source_positions image_size max_target_positions hidden_size_per_layer_input",
    48: "intermediate_size ffn_dim ffn_hidden_size d_ff hidden_dim decoder_ffn_dim encoder_ffn_dim "
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp",
    2: "num_hidden_layers num_layers n_layer n_layers depth decoder_layers encoder_layers num_decoder_layers "
        "conf_num_hidden_layers num_key_value_heads linear_num_key_heads num_experts_per_tok moe_k topk_group "
        "n_group n_groups attn_layer_period num_codevector_groups num_conv_pos_embedding_groups",
    4: "num_attention_heads num_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads num_kv_heads "
        "conf_num_attention_heads num_position_embeddings time_step_rank rotary_dim mamba_dt_rank",
    8: "head_dim d_kv linear_key_head_dim linear_value_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim "
        "qk_rope_head_dim v_head_dim mamba_d_state state_size laurel_rank mamba_d_head mamba_n_heads "
        "patch_size num_mel_bins codevector_dim classifier_proj_size chunk_size mamba_chunk_size block_size "
        "query_pre_attn_scalar global_head_dim",
    64: "max_position_embeddings n_positions block_multiple_of attention_chunk_size",
    96: "vocab_size vocab_size_per_layer_input",
    1: "attn_layer_offset first_k_dense_replace full_attention_interval",
}  # fmt: skip
"""Small numbers, each with the names that configs use for what becomes so small."""
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_SPECIAL = ("image_token", "video_token", "audio_token", "vision_start_token", "vision_end_token", "boi_token",
            "eoi_token", "boa_token", "eoa_token", "cls_token", "sep_token")  # fmt: skip
"""Words of tokens that stand for pictures and sounds: they get the last rows of the vocabulary."""

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "MinistralForCausalLM": {"head_dim": 8},
    "Gemma3nForCausalLM": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": None,
    },
    "Gemma4ForConditionalGeneration": {
        "vision_config": {"position_embedding_size": 64, "num_key_value_heads": 4},
        "audio_config": {"num_hidden_layers": 1, "subsampling_conv_channels": [4, 4]},
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "DeepseekV2ForCausalLM": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": {"num_key_value_heads": 4},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "T5ForConditionalGeneration-gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "Wav2Vec2ForCTC": {"conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)},
    "SwinForImageClassification": {"depths": [1, 1], "num_heads": [2, 4], "patch_size": 4, "window_size": 4},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    "ResNetForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1]},
    "Qwen2VLForConditionalGeneration": {"text_config": _MROPE},
    "Qwen2_5_VLForConditionalGeneration": {"text_config": _MROPE},
}
"""What the rule cannot know: sizes that a class wants to fit each other."""


def tiny_config(name: str) -> PretrainedConfig:
    """Make a small config of a model class by the names of its sizes."""
    model_class = getattr(transformers, name.partition("-")[0])
    return _shrunk(model_class.config_class, OVERRIDES.get(name, {}))


def tiny_model(name: str, seed: int) -> PreTrainedModel:
    """Make a small model with random weights, random buffers too where they are saved."""
    model_class = getattr(transformers, name.partition("-")[0])
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(tiny_config(name)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator).mul_(0.1).add_(0.02))
    return model


def _shrunk(config_class: Any, changes: dict[str, Any]) -> PretrainedConfig:
    """Make a config with small numbers in it and in the configs within it; per-layer lists follow their depth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = config_class()
    made: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        if isinstance(value, dict) and isinstance(part := getattr(default, key, None), PretrainedConfig):
            made[key] = _shrunk(type(part), changes.get(key, {}))
        elif isinstance(value, (int, list)) or value is None:
            made |= _small_value(key, value)
    for key, value in changes.items():
        part = config_class.sub_configs.get(key)
        part = getattr(part, "config_class", part)
        if key not in made or not isinstance(made[key], PretrainedConfig):
            made[key] = _shrunk(part, value) if part else value
    return config_class(**made)


def _small_value(key: str, value: Any) -> dict[str, Any]:
    """Return a smaller value for one key of a config, or nothing."""
    special = [i for i, word in enumerate(_SPECIAL) if key.startswith(word)]
    if key == "layer_types" and value:
        return {key: (list(dict.fromkeys(value)) * 2)[:2]}
    if not isinstance(value, int):
        return {key: _IDS[key]} if key == "eos_token_id" and value else {}
    if key in _IDS:
        return {key: _IDS[key]}
    if special:
        return {key: _SMALL["vocab_size"] - 1 - special[0]}
    return {key: _SMALL[key]} if key in _SMALL and not isinstance(value, bool) else {}


def tiny_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Make small inputs by the name of a model's main input."""
    config, kind = model.config, model.main_input_name
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    vision = getattr(config, "vision_config", config)
    if type(model).__name__ in ("CLIPModel", "SiglipModel"):
        return {"input_ids": ids, "pixel_values": _image(vision)}
    if kind == "pixel_values":
        return {"pixel_values": _image(vision)}
    if kind == "input_features":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.rand(1, config.num_mel_bins, frames), "decoder_input_ids": ids}
    if kind == "input_values":
        return {"input_values": torch.rand(1, 800)}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}


def _image(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", 32)
    return torch.rand(1, config.num_channels, size, size)


@dataclass(frozen=True)
class Saved:
    """Fine-tunes of one tiny model, as live models and as `save_pretrained` wrote them."""

    name: str
    models: dict[str, PreTrainedModel]
    folders: dict[str, Path]

    def weights(self, who: str) -> dict[str, torch.Tensor]:
        return load_file(self.folders[who] / "model.safetensors")


def save_tiny(name: str, root: Path, *, original_format: bool = True) -> Saved:
    """Make and save a base model and two fine-tunes of a class, all weights random."""
    models = {who: tiny_model(name, seed) for seed, who in enumerate(("base", "a", "b"))}
    for who, model in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns of generation settings and the like of its defaults
            model.save_pretrained(root / who, save_original_format=original_format)
    return Saved(name, models, {who: root / who for who in models})


def reload(saved: Saved, folder: Path) -> PreTrainedModel:
    """Load a merged model as its class; nothing may be missing, unexpected or of another shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = type(saved.models["a"]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), {kind: sorted(found)[:4] for kind, found in info.items() if found}
    return model.eval()


def check_mean(saved: Saved, folder: Path) -> None:
    """Require that a merge is the mean of `a` and `b`: in the file, in their layout, and in the loaded model."""
    a, b, merged = saved.weights("a"), saved.weights("b"), load_file(folder / "model.safetensors")
    _same_layout(merged, a)
    for tensors, left, right in ((merged, a, b), _loaded(saved, folder)):
        for name, found in tensors.items():
            _close(name, found, (left[name] + right[name]) / 2 if found.is_floating_point() else left[name])


def check_ties(saved: Saved, folder: Path, **parameters: Any) -> None:
    """Require that a merge by TIES is what the method gives on the tensors of the files."""
    ties, base, merged = get_method("ties"), saved.weights("base"), load_file(folder / "model.safetensors")
    a, b = saved.weights("a"), saved.weights("b")
    _same_layout(merged, base)
    for name, x in base.items():
        if x.is_floating_point():
            _close(name, merged[name], x + ties([a[name] - x, b[name] - x], **parameters))
    reload(saved, folder)


def _same_layout(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name


def _loaded(saved: Saved, folder: Path) -> tuple[dict[str, torch.Tensor], ...]:
    """Load the merge and run it; return its state with those of `a` and `b`."""
    model = reload(saved, folder)
    with torch.no_grad():
        given = model(**tiny_inputs(model))
    assert all(v.isfinite().all() for v in given.values() if isinstance(v, torch.Tensor)), "NaN in the forward pass"
    return model.state_dict(), saved.models["a"].state_dict(), saved.models["b"].state_dict()


def _close(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Require equality up to one unit in the last place."""
    ulp = torch.nextafter(wanted.abs(), torch.tensor(torch.inf)) - wanted.abs() if wanted.is_floating_point() else 0
    assert bool(((found - wanted).abs() <= ulp).all()), name


def table_row(saved: Saved, folder: Path) -> str:
    """Describe one checked class in a row of docs/architectures.md."""
    names = list(load_file(folder / "model.safetensors"))
    live = skeleton(json.loads((folder / "config.json").read_text())).live
    layout = "as in memory" if all(name == live[name] for name in names) else "other names than in memory"
    if len(set(live.values())) < len(names):
        layout = "per expert, fused in memory"
    return f"| {saved.name} | {len(names)} | {layout} | yes |"


_HEAD = """# Architectures

hf_merge has no list of architectures: it merges the names of checkpoints. These classes are tested: tiny random models
with `save_pretrained`'s names, merged by `linear` and `ties`, exact to the last bit but one, loaded without missing or
unexpected weights, and run. Merged on load they are the same to the bit. Where the layout on disk is not the one in
memory, models saved in one and the other are merged as well. Written by `python -m tests.architectures`; the tests
check that it is current.

| class | tensors | layout on disk | merges exactly |
|---|---|---|---|
"""


def check_skeleton(saved: Saved) -> None:
    """Require that config.json says of a class what `save_pretrained` writes, and that its ties are foreseen."""
    config = json.loads((saved.folders["a"] / "config.json").read_text())
    found, wanted = skeleton(config), saved.weights("a")
    assert found is not None and sorted(found.order) == sorted(wanted)
    assert {name: spec.shape for name, spec in found.specs.items()} == {n: tuple(t.shape) for n, t in wanted.items()}
    assert not [name for pair in found.tied.items() for name in pair if not may_be_tied(config, [name])]


def check_other_layout(saved: Saved, root: Path) -> None:
    """Require the mean of `a` as it is and `b` in the layout of memory, if that is another one."""
    saved.models["b"].save_pretrained(root / "memory", save_original_format=False)
    if load_file(root / "memory" / "model.safetensors").keys() != saved.weights("b").keys():
        merged = hf_merge.merge([saved.folders["a"], root / "memory"], root / "mixed", method="linear")
        assert not merged.plan.problems
        check_mean(saved, merged.path)


def check_on_load(saved: Saved, merged: hf_merge.MergedModel) -> None:
    """Require that a merge on load is the one on disk, to the bit, and is saved as that is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = hf_merge.from_pretrained(merged.plan.recipe, output_loading_info=True)
        model.save_pretrained(merged.path / "again")
    assert not any(info.values()), {kind: sorted(found)[:4] for kind, found in info.items() if found}
    pairs = [(model.state_dict(), reload(saved, merged.path).state_dict())]
    pairs += [(load_file(merged.path / "again" / "model.safetensors"), load_file(merged.path / "model.safetensors"))]
    for found, wanted in pairs:
        _same_layout(found, wanted)
        assert not [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


def document(rows: Mapping[str, str]) -> str:
    """Return docs/architectures.md."""
    listed = [rows.get(name) or f"| {name} | | | not tested: {UNTESTED[name]} |" for name in NAMES]
    return _HEAD + "\n".join(listed) + "\n"


def checked_row(name: str, root: Path) -> str:
    """Merge a class by both methods and from both layouts, check the results, and return its row."""
    saved = save_tiny(name, root)
    check_skeleton(saved)
    check_other_layout(saved, root)
    pair, density = [saved.folders["a"], saved.folders["b"]], 0.5
    merged = hf_merge.merge(pair, root / "linear", method="linear")
    check_mean(saved, merged.path)
    ties = hf_merge.merge(pair, root / "ties", method="ties", base_model=saved.folders["base"], density=density)
    check_ties(saved, ties.path, density=density)
    check_on_load(saved, ties)
    return table_row(saved, merged.path)


def main() -> None:
    """Check every class and write the document."""
    rows = {}
    for name in NAMES:
        if name not in UNTESTED:
            with tempfile.TemporaryDirectory() as root:
                rows[name] = checked_row(name, Path(root))
    DOCUMENT.write_text(document(rows))


if __name__ == "__main__":
    main()
