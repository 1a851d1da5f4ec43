"""LoRA files of kohya's, diffusers' and PEFT's styles: a module has one name, what is made is named as the first."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_merge.errors import SourceError
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.sources.lora import read_lora
from hf_merge.sources.lora_names import Style, style_of, taken_apart
from hf_merge.sources.lora_styled import metadata_of, to_style
from hf_merge.sources.lora_styles import unify
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.unet_names import dotted, to_diffusers, to_stability

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
FF = "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
CONV = "mid_block.resnets.1.conv2"
TEXT = "text_model.encoder.layers.3.self_attn.k_proj"
MLP = "text_model.encoder.layers.3.mlp.fc1"
UNET, CLIP = (Q, OUT, FF, CONV), (TEXT, MLP)
STABILITY = {
    Q: "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    OUT: "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0",
    FF: "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj",
    CONV: "middle_block_2_out_layers_3",
}
FIRST = {  # names of diffusers' first LoRAs, up to "down" and "up"
    Q: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
    OUT: "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora",
    FF: f"unet.{FF}.lora",
    CONV: f"unet.{CONV}.lora",
    TEXT: "text_encoder.text_model.encoder.layers.3.self_attn.to_k_lora",
    MLP: f"text_encoder.{MLP}.lora_linear_layer",
}
SPELLED = {
    "kohya": lambda m: (f"{'lora_te' if m in CLIP else 'lora_unet'}_{m.replace('.', '_')}", "lora_{}.weight", True),
    "kohya of SDXL": lambda m: (
        f"lora_te1_{m.replace('.', '_')}" if m in CLIP else f"lora_unet_{STABILITY[m]}", "lora_{}.weight", True,
    ),
    "diffusers": lambda m: (f"{'text_encoder' if m in CLIP else 'unet'}.{m}", "lora_{}.weight", False),
    "diffusers, no text_model": lambda m: (
        f"text_encoder.{m.removeprefix('text_model.')}" if m in CLIP else f"unet.{m}", "lora_{}.weight", False,
    ),
    "old diffusers": lambda m: (
        f"text_encoder.{m}" if m in CLIP else f"unet.{m}",
        "lora_linear_layer.{}.weight" if m in CLIP else "lora.{}.weight", False,
    ),
    "first diffusers": lambda m: (FIRST[m], "{}.weight", False),
    "original": lambda m: (f"{'text_encoder' if m in CLIP else 'diffusion_model'}.{m}", "lora_{}.weight", True),
}  # fmt: skip
AB = {"diffusers", "diffusers, no text_model", "original"}


def spelled(style, modules, scale=1.0):
    """Name factors as a style does; their scale is in alpha where it has one, and else in B."""
    tensors = {}
    for module, (a, b) in modules.items():
        stem, ending, alpha = SPELLED[style](module)
        down, up = ("A", "B") if style in AB else ("down", "up")
        tensors[f"{stem}.{ending.format(down)}"] = a
        tensors[f"{stem}.{ending.format(up)}"] = b if alpha else scale * b
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(scale * len(a))
    return tensors


def factors(modules=(*UNET, *CLIP), rank=4, seed=0):
    torch.manual_seed(seed)
    conv = {CONV: ((rank, 6, 3, 3), (5, rank, 1, 1))}
    shapes = {m: conv.get(m, ((rank, 6), (5, rank))) for m in modules}
    return {m: (torch.randn(a), torch.randn(b)) for m, (a, b) in shapes.items()}


def opened(*files):
    return [MappingSource(tensors, f"{number}.safetensors") for number, tensors in enumerate(files)]


def deltas(adapter, config):
    """Return the dense changes that an adapter makes, as lora.py reads it."""
    lora = read_lora(adapter, config)
    return {
        name: f.scale * adapter[f.left].flatten(1) @ adapter[f.right].flatten(1) for name, f in lora.factored.items()
    }


def close(one, other):
    return set(one) == set(other) and all(torch.allclose(one[n], other[n], atol=1e-5) for n in one)


# one module, one name


@pytest.mark.parametrize("first", SPELLED)
@pytest.mark.parametrize("second", SPELLED)
def test_the_same_lora_in_two_styles_is_the_same(first, second):
    modules = factors()
    one, other = unify(opened(spelled(first, modules, 0.5), spelled(second, modules, 0.5)))
    found = deltas(*one)
    assert close(found, deltas(*other)) and len(found) == len(modules)
    true = {m: 0.5 * b.flatten(1) @ a.flatten(1) for m, (a, b) in modules.items()}
    prefixes = ("unet.", "text_encoder.", "diffusion_model.", "text_model.")
    for name, delta in found.items():
        bare = name.split(".", 1)[1].removeprefix("text_model.") if name.startswith(prefixes) else name
        assert torch.allclose(delta, next(d for m, d in true.items() if m.removeprefix("text_model.") == bare))


@pytest.mark.parametrize("style", SPELLED)
def test_names_are_given_back(style):
    names = spelled(style, factors())
    (adapter, _), _ = unify(opened(names, spelled("kohya", factors())))
    written = to_style(names, dict(adapter))
    assert set(written) == set(names)
    assert all(torch.equal(written[n], t) for n, t in names.items() if not n.endswith(".alpha"))
    assert all(t.item() == 4 for n, t in written.items() if n.endswith(".alpha"))


@pytest.mark.parametrize("style", SPELLED)
@pytest.mark.parametrize("other", SPELLED)
def test_modules_that_the_first_lacks_are_named_as_its_own(style, other):
    """The first has one module of each part; the result has all."""
    few = spelled(style, factors((FF, Q, MLP, TEXT)))
    _, (adapter, _) = unify(opened(few, spelled(other, factors())))
    assert set(to_style(few, dict(adapter))) == set(spelled(style, factors()))


@pytest.mark.parametrize("style", SPELLED)
def test_parts_that_the_first_lacks_are_named_in_its_manner(style):
    few = spelled(style, factors((Q,)))
    _, (adapter, _) = unify(opened(few, spelled("diffusers", factors())))
    manner = {"diffusers, no text_model": "diffusers"}.get(style, style)
    assert set(to_style(few, dict(adapter))) == set(spelled(manner, factors()))


def test_dtypes_are_kept_and_nothing_but_alpha_is_read():
    class Watched(MappingSource):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    read = []
    tensors = {n: t.bfloat16() for n, t in spelled("kohya", factors()).items()}
    ((adapter, config),) = unify([Watched(tensors, "a")])
    assert read and all(name.endswith(".alpha") for name in read)
    read_lora(adapter, config)
    assert all(name.endswith(".alpha") for name in read)
    written = to_style(tensors, dict(adapter))
    assert all(t.dtype is torch.bfloat16 for n, t in written.items() if not n.endswith("alpha"))


def test_peft_files_without_a_config_have_a_scale_of_one_and_keep_their_names():
    names = {f"base_model.model.{m}.lora_{x}.weight": t for m, ab in factors((Q, FF)).items()
             for x, t in zip("AB", ab, strict=True)}  # fmt: skip
    names["base_model.model.conv_in.weight"] = torch.ones(2)
    ((adapter, config),) = unify(opened(names))
    assert set(adapter) == set(names) and all(f.scale == 1 for f in read_lora(adapter, config).factored.values())
    assert to_style(names, dict(adapter)).keys() == names.keys()


def test_adapters_with_a_config_stay_as_they_are():
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    a, b = factors((Q,))[Q]
    (source,) = opened({f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b})
    assert unify([source], [config]) == [(source, config)]
    _, (adapter, told) = unify([*opened(spelled("diffusers", factors((Q,)))), source], [None, config])
    assert math.isclose(read_lora(adapter, told).factored[f"unet.{Q}"].scale, 8 / 2)
    first, (other, _) = unify([source, *opened(spelled("kohya", factors((Q, FF))))], [config])
    assert first[0] is source
    assert f"base_model.model.{FF}.lora_A.weight" in to_style(source, dict(other))


def test_ranks_and_alphas_of_modules_differ():
    a, b = factors((Q,), rank=2), factors((FF, OUT), rank=4)
    tensors = {**spelled("kohya", a, 3.0), **spelled("kohya", b, 0.25)}
    ((adapter, config),) = unify(opened(tensors))
    assert config["r"] == 4 and config["lora_alpha"] == 1 and len(config["alpha_pattern"]) == 1
    scales = {name: f.scale for name, f in read_lora(adapter, config).factored.items()}
    assert scales == {f"unet.{Q}": 3, f"unet.{FF}": 0.25, f"unet.{OUT}": 0.25}


def test_one_alpha_is_written_for_modules_of_all_ranks():
    """Alphas of single modules are not applied to attention by diffusers."""
    names = spelled("kohya", {**factors((Q,), rank=2), **factors((FF, OUT), rank=4)})
    ((adapter, config),) = unify(opened(names))
    written = to_style(names, dict(adapter))
    assert {t.item() for n, t in written.items() if n.endswith(".alpha")} == {4}
    ((again, told),) = unify(opened(written))
    assert close(deltas(adapter, config), deltas(again, told))


def test_alpha_in_the_metadata_of_diffusers_is_read(tmp_path):
    told = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {".*attn1.to_q": 2}, "text_encoder.lora_alpha": 4,
            "text_encoder.use_rslora": True}  # fmt: skip
    names = spelled("diffusers", factors((Q, FF, TEXT)))
    save_file(names, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    ((adapter, config),) = unify([Checkpoint(Folder(tmp_path), "a", file="a.safetensors")])
    scales = {name: f.scale for name, f in read_lora(adapter, config).factored.items()}
    assert scales == {f"unet.{Q}": 0.5, f"unet.{FF}": 2, f"text_encoder.{TEXT}": 2}


def test_three_convolutions_are_made_two():
    torch.manual_seed(0)
    down, mid, up = torch.randn(4, 6, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(5, 4, 1, 1)
    stem = f"lora_unet_{CONV.replace('.', '_')}"
    tensors = {f"{stem}.lora_{n}.weight": t for n, t in (("down", down), ("mid", mid), ("up", up))}
    ((adapter, config),) = unify(opened(tensors))
    (factored,) = read_lora(adapter, config).factored.values()
    image, conv = torch.randn(1, 6, 8, 8), torch.nn.functional.conv2d
    true = conv(conv(conv(image, down), mid, padding=1), up)
    found = conv(conv(image, adapter[factored.right], padding=1), adapter[factored.left])
    assert torch.allclose(found, true, atol=1e-4) and not [
        n for n in to_style(tensors, dict(adapter)) if ".lora_mid" in n
    ]


@pytest.mark.parametrize("module", [Q, CONV])
def test_dora_s_norms_go_there_and_back(module):
    names = spelled("kohya", factors((module,)))
    stem = f"lora_unet_{module.replace('.', '_')}"
    norms = torch.rand(5, *[1] * (3 if module == CONV else 1))
    ((adapter, config),) = unify(opened({**names, f"{stem}.dora_scale": norms}))
    (factored,) = read_lora(adapter, config).factored.values()
    assert config["use_dora"] and adapter[factored.magnitude].shape == ((1, 5, 1, 1) if module == CONV else (5,))
    assert torch.equal(to_style(names, dict(adapter))[f"{stem}.dora_scale"], norms)


def test_kohya_files_of_an_unknown_model_merge_with_each_other():
    names = {f"lora_unet_odd_new_thing_{n}.lora_{x}.weight": t for n in range(2)
             for x, t in (("down", torch.ones(2, 3)), ("up", torch.ones(3, 2)))}  # fmt: skip
    one, other = unify(opened(names, names))
    assert list(one[0]) == list(other[0]) and "base_model.model.unet.odd_new_thing_0.lora_A.weight" in one[0]
    assert set(to_style(names, dict(one[0]))) == {*names, *(f"lora_unet_odd_new_thing_{n}.alpha" for n in range(2))}


def test_fused_projections_merge_with_the_same_names_with_dots():
    """Flux as Black Forest Labs names it, by kohya and by ComfyUI."""
    a, b = torch.randn(2, 3), torch.randn(9, 2)
    kohya = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": a,
             "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": b}  # fmt: skip
    comfy = {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": a,
             "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": b}  # fmt: skip
    one, other = unify(opened(kohya, comfy))
    assert list(one[0]) == list(other[0]) and close(deltas(*one), deltas(*other))


# what a file says beside its tensors


def test_metadata_of_kohya_and_of_diffusers():
    names = spelled("kohya", factors())
    assert metadata_of(names, names) == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4.0",
    }  # fmt: skip
    names = spelled("diffusers", {**factors((Q, MLP)), **factors((TEXT, FF), rank=2), **factors((OUT,))})
    assert metadata_of(names, spelled("diffusers", factors())) == {"format": "pt"}
    told = json.loads(metadata_of(names, names)["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == told["text_encoder.r"] == 4
    assert list(told["unet.rank_pattern"].values()) == [2] and told["unet.target_modules"] == sorted([Q, FF, OUT])
    assert list(told["text_encoder.rank_pattern"]) == [rf"(?:{re.escape(TEXT.removeprefix('text_model.'))})"]


# names


NAMES = {  # Stability's: diffusers', as the architecture of Stable Diffusion XL has them
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks_0_resnets_1_time_emb_proj",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_4_1_proj_in": "down_blocks_1_attentions_0_proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k": "down_blocks_1_attentions_1_transformer_blocks_1_attn2_to_k",
    "input_blocks_6_0_op": "down_blocks_1_downsamplers_0_conv",
    "input_blocks_7_1_transformer_blocks_9_ff_net_2": "down_blocks_2_attentions_0_transformer_blocks_9_ff_net_2",
    "input_blocks_8_0_out_layers_3": "down_blocks_2_resnets_1_conv2",
    "middle_block_0_in_layers_2": "mid_block_resnets_0_conv1",
    "middle_block_1_transformer_blocks_0_attn1_to_v": "mid_block_attentions_0_transformer_blocks_0_attn1_to_v",
    "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
    "output_blocks_0_1_proj_out": "up_blocks_0_attentions_0_proj_out",
    "output_blocks_2_1_transformer_blocks_0_attn1_to_v": "up_blocks_0_attentions_2_transformer_blocks_0_attn1_to_v",
    "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_6_0_skip_connection": "up_blocks_2_resnets_0_conv_shortcut",
    "output_blocks_8_0_out_layers_3": "up_blocks_2_resnets_2_conv2",
    "time_embed_0": "time_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}  # fmt: skip


@pytest.mark.parametrize(("stability", "diffusers"), NAMES.items())
def test_blocks_of_stability_are_those_of_diffusers(stability, diffusers):
    assert to_diffusers(stability) == diffusers and to_stability(diffusers) == stability
    assert to_diffusers(diffusers) == diffusers and to_stability(stability) == stability


def sdxl():
    """A Stable Diffusion XL's UNet without its width, but with all its modules."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2, cross_attention_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
        transformer_layers_per_block=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=2, projection_class_embeddings_input_dim=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def modules_of_sdxl():
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in sdxl().named_modules() if isinstance(m, kinds)}


def test_every_module_of_sdxl_has_both_names_and_its_dots(modules_of_sdxl):
    flat = {name: name.replace(".", "_") for name in modules_of_sdxl}
    assert all(to_diffusers(to_stability(name)) == name != to_stability(name) for name in flat.values())
    assert {name: dotted(f) for name, f in flat.items()} == {name: name for name in flat}
    assert len({to_stability(name) for name in flat.values()}) == len(flat)


@pytest.mark.parametrize("model", ["Flux", "SD3", "QwenImage", "HunyuanVideo", "Wan", "LTXVideo", "Lumina2", "Sana"])
def test_words_of_transformers_are_known(model):
    diffusers = pytest.importorskip("diffusers")
    name = f"{model}Transformer{'3' if model in ('HunyuanVideo', 'Wan', 'LTXVideo') else '2'}DModel"
    with torch.device("meta"):
        built = getattr(diffusers, name)()
    names = [n for n, m in built.named_modules() if isinstance(m, torch.nn.Linear)]
    assert {n: dotted(to_diffusers(n.replace(".", "_"))) for n in names} == {n: n for n in names}


@pytest.mark.parametrize("kind", ["CLIPTextModelWithProjection", "T5EncoderModel"])
def test_words_of_text_encoders_are_known(kind):
    import transformers

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "projection_dim": 4}
    t5 = {"vocab_size": 8, "d_model": 8, "d_ff": 8, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    configs = {"CLIP": transformers.CLIPTextConfig(**sizes, **ids), "T5En": transformers.T5Config(**t5)}
    model = getattr(transformers, kind)(configs[kind[:4]])
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names and {n: dotted(n.replace(".", "_")) for n in names} == {n: n for n in names}


def test_diffusers_own_converter_agrees(modules_of_sdxl):
    from diffusers.loaders import lora_conversion_utils as theirs
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    names = [f"lora_unet_{to_stability(name.replace('.', '_'))}.lora_down.weight" for name in modules_of_sdxl]
    state = {n: torch.tensor(i) for i, name in enumerate(names) for n in (name, name.replace("_down.", "_up."))}
    config = type("Config", (), {"layers_per_block": 2})
    blocks = theirs._maybe_map_sgm_blocks_to_diffusers(state, config)
    found, _ = theirs._convert_non_diffusers_lora_to_diffusers(blocks)
    converted = convert_unet_state_dict_to_peft({n.removeprefix("unet."): t for n, t in found.items()})
    found = {n.removesuffix(".lora_A.weight"): i.item() for n, i in converted.items() if "lora_A" in n}
    assert found == {name: i for i, name in enumerate(modules_of_sdxl)}


# what is refused


A, B = torch.ones(2, 3), torch.ones(3, 2)
STEM = "lora_unet_mid_block_attentions_0_proj_in"
PAIR = {f"{STEM}.lora_down.weight": A, f"{STEM}.lora_up.weight": B}
FLUX = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": A,
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": B}  # fmt: skip
REFUSED = {
    "LoHa": ([{f"{STEM}.hada_w1_a": A}], rf"'{STEM}\.hada_w1_a' of '0.safetensors' is of a LoHa, .* merge the models"),
    "LoKr": ([{**PAIR, f"{STEM}.lokr_w1": A}], "is of a LoKr"),
    "diff": ([{**PAIR, "lora_unet_conv_in.diff": A}], "'lora_unet_conv_in.diff' of .* is of a full difference"),
    "diff_b": ([{**PAIR, "lora_unet_conv_in.diff_b": A}], "full difference"),
    "OFT": ([{**PAIR, "lora_unet_conv_in.oft_blocks": A}], "is of a OFT"),
    "other": ([{**PAIR, "emb_params": A}], "'emb_params' of '0.safetensors' is no tensor of a LoRA"),
    "model": ([{"model.layers.0.q_proj.weight": A}], "holds no LoRA that hf_merge knows: .* found 'model.layers"),
    "nothing": ([{}], "holds no LoRA"),
    "half": ([{f"{STEM}.lora_down.weight": A}], rf"has {STEM}\.lora_down\.weight, not a pair"),
    "alpha alone": ([{**PAIR, "lora_unet_conv_in.alpha": A}], "has lora_unet_conv_in.alpha, not a pair"),
    "alphas": ([{**PAIR, f"{STEM}.alpha": torch.ones(2)}], r"should be one number; found \[2\]"),
    "nan": ([{**PAIR, f"{STEM}.alpha": torch.tensor(math.nan)}], "is nan, no alpha"),
    "no rank": ([{f"{STEM}.lora_down.weight": torch.ones(0, 3), f"{STEM}.lora_up.weight": B}], r"the shape \[0, 3\]"),
    "twice": (
        [{**PAIR, "lora_unet_middle_block_1_proj_in.lora_down.weight": A}],
        "'lora_unet_middle_block_1_proj_in.lora_down.weight' of '0.safetensors' are of one module",
    ),
    "norms over inputs": ([{**PAIR, f"{STEM}.dora_scale": torch.ones(1, 2)}], "norms over inputs are not read"),
    "mid": ([{**PAIR, f"{STEM}.lora_mid.weight": A}], "do not fit"),
    "fused and split": (
        [{"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A,
          "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": B}, FLUX],
        r"'0.safetensors' \(kohya\) and '1.safetensors' \(diffusers\) name the modules of their denoiser differently "
        r"\('lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight', 'transformer.transf.*convert one to the other's",
    ),
    "fused and split in one style": (
        [{f"lora_unet_{name}.lora_{x}.weight": t for x, t in (("down", A), ("up", B))}
         for name in ("transformer_blocks_0_attn_to_q", "single_blocks_0_linear1")],
        r"name the modules of their denoiser differently",
    ),
    "other names, one in common": (
        [{f"diffusion_model.{name}.lora_{x}.weight": A for name in ("blocks.0.self_attn.q", "blocks.0.self_attn.k",
          "blocks.0.self_attn.v", "proj_out") for x in "AB"},
         {f"transformer.{name}.lora_{x}.weight": A for name in ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k",
          "blocks.0.attn1.to_v", "proj_out") for x in "AB"}],
        r"'0.safetensors' \(original\) and '1.safetensors' \(diffusers\) name",
    ),
    "unknown words": (
        [FLUX, {"lora_unet_odd_new_thing.lora_down.weight": A, "lora_unet_odd_new_thing.lora_up.weight": B}],
        "Which module of the other files 'lora_unet_odd_new_thing.lora_down.weight' of '1.safetensors' is cannot be",
    ),
    "text encoder into a PEFT adapter": (
        [{"base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": A,
          "base_model.model.mid_block.attentions.0.proj_in.lora_B.weight": B},
         {**PAIR, "lora_te1_text_projection.lora_down.weight": A, "lora_te1_text_projection.lora_up.weight": B}],
        "'1.safetensors' has a text_encoder, for which there is no place in '0.safetensors', a PEFT adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(case):
    files, match = REFUSED[case]
    with pytest.raises(SourceError, match=match):
        unify(opened(*files))


@pytest.mark.parametrize("told", ["{", "[1]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}'])
def test_metadata_that_is_none_is_refused(told):
    (source,) = opened(spelled("diffusers", factors((Q,))))
    source.metadata = {"lora_adapter_metadata": told}
    with pytest.raises(SourceError, match="should have"):
        unify([source])


def test_what_has_no_name_in_the_first_s_style_is_refused():
    with pytest.raises(SourceError, match="bias of 'mid_block_attentions_0_proj_in' has no name in the style of the"):
        to_style(PAIR, {"base_model.model.unet.mid_block.attentions.0.proj_in.lora_B.bias": A})
    with pytest.raises(SourceError, match="'x' is no tensor of a LoRA"):
        to_style(PAIR, {"x": A})


def test_styles_are_told():
    styles = {
        "kohya": Style.KOHYA, "kohya of SDXL": Style.KOHYA, "diffusers": Style.DIFFUSERS, "original": Style.ORIGINAL,
        "old diffusers": Style.DIFFUSERS_OLD, "first diffusers": Style.DIFFUSERS_OLD,
    }  # fmt: skip
    assert {name: style_of(spelled(name, factors())) for name in styles} == styles
    assert style_of(["base_model.model.x.lora_A.weight"]) is style_of(["x.y.lora_A.weight"]) is Style.PEFT
    assert style_of(["model.embed_tokens.weight", "x.alpha"]) is None
    assert style_of(["lora_unet_conv_in.hada_w1_a"]) is Style.KOHYA


WORDS = ["lora_unet_", "lora_te1_", "unet.", "base_model.model.", "text_model.", "input_blocks_4_1", "middle_block_9_",
         "output_blocks_", "down_blocks_1_resnets_0_", "attn1.processor.to_q", "0", "_", ".", "é", "\n", "²",
         ".lora_down.weight", ".lora_up.weight", ".alpha", "_lora.down.weight", ".lora_A.weight", ".lora_B.weight",
         ".dora_scale", ".lora_mid.weight", ".lora_linear_layer.up.weight"]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=6).map("".join), max_size=4),
    st.lists(st.sampled_from([0, 1, 2]), max_size=4),
)
def test_no_name_and_no_shape_raises_anything_but_a_source_error(names, shape):
    for name in names:
        taken_apart(name)
    try:
        found = unify(opened({name: torch.ones(shape) for name in names}, PAIR))
        to_style(names, dict(found[0][0]))
        metadata_of(names, to_style(names, dict(found[1][0])))
    except SourceError:
        pass


@settings(deadline=None)
@given(st.sampled_from(["lora_unet_", "unet.", "diffusion_model.", "lora_te_", "text_encoder_2.", ""]),
       st.text("abc_.019", min_size=1))  # fmt: skip
def test_any_module_s_name_comes_back(prefix, module):
    flat = prefix.startswith("lora_")
    stem = prefix + (module.replace(".", "_") if flat else module)
    names = [f"{stem}.lora_{x}.weight" for x in (("down", "up") if flat else "AB")]
    try:
        ((adapter, _),) = unify(opened(dict.fromkeys(names, torch.ones(2, 2))))
    except SourceError:
        return
    assert {n for n in to_style(names, dict(adapter)) if not n.endswith("alpha")} == set(names)
