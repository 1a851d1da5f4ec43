"""Two names of one module: of Stability's UNets and of diffusers', with underscores and with dots.

Stability's UNet numbers its blocks through (`input_blocks_4_1`, `middle_block_1`, `output_blocks_5_2`), diffusers'
nests them (`down_blocks_1_attentions_0`). Stable Diffusion 1, 2 and XL all have two layers a block on the way down and
three on the way up, and after each block but the last something that halves or doubles the image, so that both ways
every third number begins or ends a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_PERIOD = 3
_TOP = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}
_STABILITY_BLOCK = re.compile(r"(input|middle|output)_blocks?_(\d{1,3})_(.+)", re.ASCII)
_DIFFUSERS_BLOCK = re.compile(
    r"(?:(down|up)_blocks_(\d{1,3})|(mid)_block)_(resnets|attentions|downsamplers|upsamplers)_(\d{1,3})_(.+)", re.ASCII
)


def to_diffusers(flat: str) -> str:
    """Return diffusers' name of a module of Stability's UNet; any other name as it is. Underscores for dots."""
    if flat in _TOP:
        return _TOP[flat]
    found = _STABILITY_BLOCK.fullmatch(flat)
    return (found and _from_block(found[1], int(found[2]), found[3])) or flat


def _from_block(side: str, number: int, rest: str) -> str | None:
    if side == "middle":
        return _middle(str(number), rest)
    layer, _, inner = rest.partition("_")
    block, place = divmod(number - (side == "input"), _PERIOD)
    way = "down" if side == "input" else "up"
    if side == "input" and (layer, inner) == ("0", "op"):
        return f"down_blocks_{block}_downsamplers_0_conv"
    if side == "output" and layer in "12" and inner == "conv":  # 1 where the block has no attention
        return f"up_blocks_{block}_upsamplers_0_conv"
    if block < 0 or layer not in ("0", "1") or not inner:
        return None
    kind = "attentions" if layer == "1" else "resnets"
    return f"{way}_blocks_{block}_{kind}_{place}_{inner if layer == '1' else _RESNET.get(inner, inner)}"


def _middle(number: str, rest: str) -> str | None:
    if number not in _MIDDLE:
        return None
    return f"mid_block_{_MIDDLE[number]}_{rest if number == '1' else _RESNET.get(rest, rest)}"


def to_stability(flat: str) -> str:
    """Return the name in Stability's UNet of a module of diffusers'; any other name as it is. Underscores for dots.

    A block that doubles the image is taken to have attention, as all such blocks of Stable Diffusion XL do.
    """
    reverse = {new: old for old, new in _TOP.items()}
    if flat in reverse:
        return reverse[flat]
    found = _DIFFUSERS_BLOCK.fullmatch(flat)
    if found is None:
        return flat
    way, block, middle, kind, layer, inner = found.groups()
    if kind == "resnets":
        inner = next((old for old, new in _RESNET.items() if new == inner), inner)
    if middle:
        number = next((n for n, name in _MIDDLE.items() if name == f"{kind}_{layer}"), None)
        return flat if number is None else f"middle_block_{number}_{inner}"
    first = int(block) * _PERIOD
    if kind == "downsamplers":
        return f"input_blocks_{first + _PERIOD}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{first + _PERIOD - 1}_2_conv"
    side, number = ("input", first + int(layer) + 1) if way == "down" else ("output", first + int(layer))
    return f"{side}_blocks_{number}_{int(kind == 'attentions')}_{inner}"


_WORDS = frozenset({
    "down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers", "upsamplers",
    "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
    "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding",
    "add_embedding", "linear_1", "linear_2", "input_blocks", "middle_block", "output_blocks", "in_layers",
    "emb_layers", "out_layers", "skip_connection", "op", "time_embed", "label_emb", "out", "text_model", "encoder",
    "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "mlp", "fc1", "fc2", "text_projection",
    "embeddings", "token_embedding", "position_embedding", "block", "layer", "SelfAttention", "DenseReluDense", "q",
    "k", "v", "o", "wi", "wo", "wi_0", "wi_1", "single_transformer_blocks", "attn", "add_q_proj", "add_k_proj",
    "add_v_proj", "to_add_out", "ff_context", "norm", "norm1", "norm1_context", "linear", "proj_mlp", "norm_out",
    "x_embedder", "context_embedder", "time_text_embed", "timestep_embedder", "guidance_embedder", "text_embedder",
    "img_mlp", "txt_mlp", "img_mod", "txt_mod", "double_blocks", "single_blocks", "img_attn", "txt_attn", "qkv",
    "lin", "modulation", "linear1", "linear2", "img_in", "txt_in", "time_in", "vector_in", "guidance_in", "in_layer",
    "out_layer", "final_layer", "adaLN_modulation", "blocks", "cross_attn", "k_img", "v_img", "ffn", "linear_out",
    "linear_in", "linear_fc1", "linear_fc2", "linear_3", "encoder_proj", "ff_in", "ff_out", "q_linear", "kv_linear",
    "context_embedder_2", "proj_out_1", "proj_out_2", "pos_embed", "patch_embed", "patch_embedding", "text_proj",
    "condition_embedder", "time_embedder", "time_proj", "adaln_single", "emb", "caption_projection", "image_embedder",
    "norm2", "norm3", "norm_out_context", "token_refiner", "refiner_blocks", "noise_refiner", "context_refiner",
    "attention", "feed_forward", "gate_proj", "up_proj", "down_proj", "to_kv", "text_embedding", "w1", "w2", "w3",
    "time_guidance_embed", "time_caption_embed", "caption_embedder", "to_qkv_mlp_proj",
    "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
    "time_condition_embed", "conv_inverted", "conv_depth", "conv_point", "time_projection", "image_projector",
    "proj_act",
})  # fmt: skip
_LONGEST = max(word.count("_") + 1 for word in _WORDS)


def dotted(flat: str) -> str | None:
    """Return a module's name with the dots that underscores stand for; None if a word of it is not known."""
    words = list(_split(flat.split("_"), lambda word: word in _WORDS or (word.isascii() and word.isdigit())))
    return None if not words or None in words else ".".join(word for word in words if word)


def _split(pieces: list[str], known: Callable[[str], bool]) -> Iterator[str | None]:
    """Yield known words, each as long as can be, and None where there is none."""
    at = 0
    while at < len(pieces):
        ends = range(min(len(pieces), at + _LONGEST), at, -1)
        end = next((end for end in ends if known("_".join(pieces[at:end]))), None)
        yield None if end is None else "_".join(pieces[at:end])
        at = len(pieces) if end is None else end
