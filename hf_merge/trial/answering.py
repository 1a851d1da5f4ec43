"""What a model says to some inputs, task by task, as plain data: through transformers' classes and processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_merge.errors import MergeError, SourceError
from hf_merge.sources.folder import module_folders, read_json, read_object
from hf_merge.trial.finding import Found

SHOWN = 5
"""Labels, or words for a mask, that are told; the most likely first."""

_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "fill-mask": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
    "sentence-similarity": "AutoModel",
}
_POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
             "pooling_mode_lasttoken": "lasttoken"}  # fmt: skip
_PLAIN_MODULES = ("Transformer", "Pooling", "Normalize")

Options = Mapping[str, Any]
"""Keywords of every `from_pretrained`."""


def answers(found: Found, task: str, inputs: Sequence[Any], *, new: int, loading: Options, hub: Options) -> list[Any]:
    """Load a model and give it all inputs; it is in memory until this returns.

    Args:
        found: the model.
        task: one of `TASKS`.
        inputs: texts, conversations or pictures.
        new: tokens that are generated at most.
        loading: of the model: device_map, dtype.
        hub: token, cache_dir, local_files_only.

    Returns:
        For each input: `{"text": ..}` of text generation; `{"labels": [{"label", "score"}]}` of classifiers;
        `{"tokens": [{"token", "score", "text"}]}` of a mask; `{"similarity": [..]}`, the cosine with every input, of
        embeddings.
    """
    model = _loaded(found, _CLASSES[task], loading, hub)
    if task == "image-classification":
        return _in_pipeline(model, task, inputs, image_processor=_processor(found, "AutoImageProcessor", hub))
    tokenizer = _processor(found, "AutoTokenizer", hub)
    if task in ("feature-extraction", "sentence-similarity"):
        return _similar(model, tokenizer, _pooling(found), inputs)
    if task == "text-generation":
        return _generated(model, tokenizer, inputs, new)
    return _in_pipeline(model, task, inputs, tokenizer=tokenizer)


def _loaded(found: Found, kind: str, loading: Options, hub: Options) -> Any:
    """Load a model from safetensors, its adapters merged into it; code of its own is never run."""
    import transformers
    from peft import PeftModel

    name, revision = found.name
    safe = {"use_safetensors": True, "trust_remote_code": False}
    model, told = getattr(transformers, kind).from_pretrained(
        name, revision=revision or "main", output_loading_info=True, **safe, **loading, **hub
    )
    new = [one for one in told["missing_keys"] if not found.adapters and not one.startswith("pooler.")]
    if new:
        raise MergeError(
            f"It has no weights for '{sorted(new)[0]}', which {type(model).__name__} needs: name its task."
        )
    for adapter, commit in found.adapters:
        model = PeftModel.from_pretrained(model, adapter, revision=commit, **hub).merge_and_unload()
    return model.eval()


def _processor(found: Found, kind: str, hub: Options) -> Any:
    """Load the tokenizer or image processor: that of the adapter which has one, or else of the model."""
    import transformers

    auto, failed = getattr(transformers, kind), None
    for name, revision in (*reversed(found.adapters), found.name):
        try:
            return auto.from_pretrained(name, revision=revision or "main", trust_remote_code=False, **hub)
        except (OSError, ValueError, KeyError) as error:
            failed = error
    assert failed is not None
    raise failed


def _generated(model: Any, tokenizer: Any, inputs: Sequence[Any], new: int) -> list[Any]:
    """Continue each input greedily, one after the other; a conversation is put into words by the chat template."""
    from transformers import GenerationConfig

    own = model.generation_config
    told = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if told["pad_token_id"] is None:
        ends = told["eos_token_id"] if told["eos_token_id"] is not None else tokenizer.eos_token_id
        told["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, **told)
    found = []
    for one in inputs:
        chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        batch = (
            tokenizer(one, return_tensors="pt") if isinstance(one, str) else tokenizer.apply_chat_template(one, **chat)
        )
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = model.generate(**batch)[0, batch["input_ids"].shape[1] :]
        found.append({"text": tokenizer.decode(ids, skip_special_tokens=True)})
    return found


def _in_pipeline(model: Any, task: str, inputs: Sequence[Any], **processors: Any) -> list[Any]:
    """Classify, or fill a mask, as transformers' pipelines do."""
    from transformers import pipeline

    make: Any = pipeline
    run = make(task, model=model, **processors)
    found = []
    for one in inputs:
        rows: Any = run(one, top_k=SHOWN)
        if task == "fill-mask":
            several = rows if isinstance(rows[0], list) else [rows]
            told = [{"token": row["token_str"], "score": row["score"], "text": row["sequence"]}
                    for each in several for row in each]  # fmt: skip
            found.append({"tokens": told})
        else:
            found.append({"labels": [{"label": row["label"], "score": row["score"]} for row in rows]})
    return found


def _similar(model: Any, tokenizer: Any, pooling: str, inputs: Sequence[str]) -> list[Any]:
    """Return for each text the cosines of its embedding with those of all texts."""
    batch = tokenizer(list(inputs), padding=True, truncation=True, return_tensors="pt").to(model.device)
    if tokenizer.model_max_length > 1 << 20:  # the tokenizer does not know it
        longest = getattr(model.config, "max_position_embeddings", None) or 512
        batch = {name: tensor[:, :longest] for name, tensor in batch.items()}
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    pooled = torch.nn.functional.normalize(_pooled(states.double(), batch["attention_mask"], pooling), dim=1)
    return [{"similarity": row.tolist()} for row in (pooled @ pooled.T).clamp(-1, 1).cpu()]


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Make one vector of the states of a text's tokens: (texts, tokens, size) to (texts, size)."""
    real = mask.to(states.device).unsqueeze(-1).bool()
    places = torch.arange(mask.shape[1], device=states.device) * mask.to(states.device)
    texts = torch.arange(len(states), device=states.device)
    if pooling == "cls":
        return states[texts, mask.to(states.device).argmax(1)]
    if pooling == "lasttoken":
        return states[texts, places.argmax(1)]
    if pooling == "max":
        return states.masked_fill(~real, -torch.inf).amax(1)
    return (states * real).sum(1) / real.sum(1)


def _pooling(found: Found) -> str:
    """Say how a model makes one vector of a text: as its sentence-transformers modules say, or by the mean.

    Raises:
        MergeError: it has modules that are not run here.
    """
    if found.modules is None:
        return "mean"
    modules = read_json(found.modules.paths(["modules.json"])[0])
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules] if isinstance(modules, list) else []
    if other := [kind for kind in kinds if kind not in _PLAIN_MODULES]:
        raise MergeError(f"It has a module of the kind {other[0]}, which is not run here: use SentenceTransformer.")
    files = [f"{name}/config.json" for name in module_folders(found.modules)]
    configs = [read_object(path) for path in found.modules.paths([name for name in files if name in found.modules])]
    config = next((one for one in configs if any(key.startswith("pooling_mode") for key in one)), {})
    named = config.get("pooling_mode", "mean" if not config else None)
    modes = [named] if named else [word for key, word in _POOLINGS.items() if config.get(key)]
    if len(modes) != 1 or modes[0] not in _POOLINGS.values():
        told = ", ".join(map(str, modes)) or "nothing"
        raise SourceError(f"It pools by {told}: mean, max, cls and lasttoken are run here, one alone.")
    return modes[0]
