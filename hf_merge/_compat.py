"""Every private import from the Hugging Face libraries, each guarded by a test in tests/test_compat.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


def on_disk_layout(module: nn.Module) -> dict[str, tuple[str | None, Tensor]]:
    """Map the names a module's checkpoint has to (live name, live tensor).

    A PreTrainedModel may be saved under other names, or its fused weights in parts; the live name is then that
    of the tensor, or None where it is part of another. Tied weights appear once.
    """
    state = module.state_dict()
    if not hasattr(module, "save_pretrained") or not hasattr(module, "config"):
        return {name: (name, tensor) for name, tensor in state.items()}
    from transformers.core_model_loading import revert_weight_conversion

    for alias in getattr(module, "all_tied_weights_keys", {}):
        state.pop(alias, None)
    live = {id(tensor): name for name, tensor in state.items()}
    saved: dict[str, Tensor] = revert_weight_conversion(module, state)  # type: ignore[arg-type]
    return {name: (live.get(id(tensor)), tensor) for name, tensor in saved.items()}


def disk_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Map the names of a model in memory to those of its checkpoint, by its config; nothing if it cannot be built.

    Fused tensors, which are several in the checkpoint, are left out. The model is built without memory.
    """
    import torch
    import transformers

    architecture = next(iter(config.get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        return {}
    try:
        with torch.device("meta"):
            layout = on_disk_layout(model_class(model_class.config_class.from_dict(dict(config))))  # type: ignore[union-attr]
    except Exception:  # whatever a model's own code raises on a config that is not its own
        return {}
    return {live: name for name, (live, _) in layout.items() if live is not None}


def mxfp4_dequantizer() -> Any:
    """Return `f(blocks, scales, *, dtype)`: packed experts [E, rows, groups, 16] to [E, 32 * groups, rows]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors


def pipeline_tag(architecture: str) -> str | None:
    """Return the Hub's task of a model class: `text-generation` for LlamaForCausalLM."""
    from transformers.models.auto import modeling_auto  # transformers.modelcard has the table, and imports the trainer

    for tag, words in _TASKS.items():
        tables = [getattr(modeling_auto, f"MODEL_FOR_{word}_MAPPING_NAMES") for word in words]
        if any(architecture in _flat(table.values()) for table in tables):
            return tag
    return None


_TASKS = {
    "text-generation": ["CAUSAL_LM"],
    "image-classification": ["IMAGE_CLASSIFICATION"],
    "image-segmentation": ["IMAGE_SEGMENTATION"],
    "fill-mask": ["MASKED_LM"],
    "object-detection": ["OBJECT_DETECTION"],
    "question-answering": ["QUESTION_ANSWERING"],
    "text2text-generation": ["SEQ_TO_SEQ_CAUSAL_LM"],
    "text-classification": ["SEQUENCE_CLASSIFICATION"],
    "table-question-answering": ["TABLE_QUESTION_ANSWERING"],
    "token-classification": ["TOKEN_CLASSIFICATION"],
    "audio-classification": ["AUDIO_CLASSIFICATION"],
    "automatic-speech-recognition": ["CTC", "SPEECH_SEQ_2_SEQ"],
    "zero-shot-image-classification": ["ZERO_SHOT_IMAGE_CLASSIFICATION"],
    "image-text-to-text": ["IMAGE_TEXT_TO_TEXT"],
}
"""transformers.modelcard.TASK_MAPPING: tags, and the words of modeling_auto's tables that hold their classes."""


def _flat(values: Any) -> list[str]:
    return [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value])]


def cli_words() -> tuple[Any, Any, Any]:
    """Return (Argument, Option, out): the annotations and the output channel of huggingface_hub's CLI framework."""
    from huggingface_hub.cli._framework import Argument, Option
    from huggingface_hub.cli._output import out

    return Argument, Option, out
