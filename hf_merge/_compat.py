"""Every private import from the Hugging Face libraries, each guarded by a test in tests/test_compat.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def empty_model(config: Mapping[str, Any]) -> nn.Module | None:
    """Build the model of a config.json on the meta device; None if transformers cannot."""
    import torch
    import transformers

    model_class: Any = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    if getattr(model_class, "config_class", None) is None or config.get("auto_map"):
        return None
    with torch.device("meta"), quiet(), contextlib.suppress(Exception):  # transformers may raise anything here
        return model_class._from_config(model_class.config_class.from_dict(dict(config)))
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers log errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def live_names(module: nn.Module, saved: Iterable[str]) -> dict[str, str]:
    """Map names of a model's checkpoint to the names its parameters have in memory; several parts may share one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    prefix, state = getattr(module, "base_model_prefix", ""), module.state_dict()
    return {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in saved}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Map the checkpoint names of tied weights to those of the weights they share."""
    from transformers.core_model_loading import revert_weight_conversion

    state = module.state_dict()
    return {
        next(iter(revert_weight_conversion(module, {alias: state[alias]}))): next(  # type: ignore[arg-type]
            iter(revert_weight_conversion(module, {source: state[source]}))  # type: ignore[arg-type]
        )
        for alias, source in getattr(module, "all_tied_weights_keys", {}).items()
        if alias in state and source in state
    }


def vocabulary_tensors(module: Any) -> list[str]:
    """Name, as in memory, the input embeddings of a model and its output head with the head's bias."""
    found: list[str] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(Exception):  # models of images have none and say so each in its own way
            part = getattr(module, getter)()
            rows = part.weight.shape[0]
            ids = {id(p) for p in part.parameters() if p.shape[0] == rows}
            found += [name for name, p in module.named_parameters(remove_duplicate=False) if id(p) in ids]
    return list(dict.fromkeys(found))


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


def compile_chat_template(text: str) -> Any:
    """Compile a chat template as transformers does, with its tags.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(text)
