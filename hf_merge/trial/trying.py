"""Models and inputs -> what each model says: `hf_merge.try_out`."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_merge import _compat
from hf_merge.errors import DataError, MergeError, ParameterError, did_you_mean, shown
from hf_merge.trial.answering import answers
from hf_merge.trial.finding import TASKS, found

_EMBEDDINGS = ("feature-extraction", "sentence-similarity")


@dataclass(frozen=True)
class Trial:
    """What a model said.

    Attributes:
        label: the model's.
        task: what it was tried on; None if that could not be told.
        outputs: for each input, plain data: `{"text": ..}` (text-generation), `{"labels": [{"label", "score"}]}`
            (classifiers), `{"tokens": [{"token", "score", "text"}]}` (fill-mask), or `{"similarity": [..]}`, cosines
            with every input (feature-extraction, sentence-similarity). Scores are between 0 and 1.
        seconds: that loading and running took.
        error: why it said nothing, in words; None if it did.
    """

    label: str
    task: str | None
    outputs: tuple[Mapping[str, Any], ...] = field(default=())
    seconds: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"label": self.label, "task": self.task, "outputs": [dict(one) for one in self.outputs],
                "seconds": round(self.seconds, 3), "error": self.error}  # fmt: skip

    def __str__(self) -> str:
        lines = [f"error: {self.error}"] if self.error else [_in_words(one) for one in self.outputs]
        return "\n".join([f"{self.label}:", *(f"  {line}" for line in lines)])


def try_out(
    models: Mapping[str, Any] | Sequence[Any],
    inputs: Any,
    *,
    task: str | None = None,
    max_new_tokens: int = 64,
    device_map: Any = "auto",
    dtype: Any = "auto",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[Trial]:
    """Give the same inputs to several models, one after the other, and return what each says.

        hf_merge.try_out({"merged": merged, "code": "org/code", "math": "org/math"}, "The sum of 2 and 3 is")
        hf_merge.try_out({"merged": "merged"}, ["a cat", "a kitten", "a bank"], task="sentence-similarity")

    One model is in memory at a time. Weights come from safetensors, and code of a model's own is never run. Text is
    generated greedily, so that what models say differs by their weights alone.

    Args:
        models: labels and models: folders, Hub ids, `base+adapter`, PEFT adapters, what `merge` returned, or recipes,
            which are merged when they are loaded. Models with task experts are not run; see `load_experts`.
        inputs: one or several: texts; for text generation also conversations (lists of `{"role", "content"}`), for
            images paths or PIL images, with `[MASK]` or what the tokenizer has for it for fill-mask, and two texts or
            more for embeddings.
        task: text-generation, text-classification, image-classification, fill-mask, feature-extraction or
            sentence-similarity. If not given, what the card of the first model says that has one, or its class.
        max_new_tokens: of text generation.
        device_map, dtype: of the models, as in transformers.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.

    Returns:
        A trial for each model, in order. A model that cannot be run has its `error` in words, and the others go on.

    Raises:
        ParameterError: no models, or no such task.
        DataError: inputs that do not fit the task.
    """
    named = _named(models)
    if task is not None and task not in TASKS:
        raise ParameterError(
            f"Models cannot be tried on '{task}'.{did_you_mean(task, TASKS)} Tasks: {', '.join(TASKS)}."
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens should be 1 or more; found {max_new_tokens!r}.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    loading = {"device_map": device_map, "dtype": dtype}
    wanted = task or _task_of(named.values(), hub)
    given = _checked(inputs, wanted)
    return [_tried(label, model, wanted, given, max_new_tokens, loading, hub) for label, model in named.items()]


def _named(models: Any) -> dict[str, Any]:
    if isinstance(models, (str, os.PathLike)):
        models = [models]
    named = dict(models) if isinstance(models, Mapping) else {str(model): model for model in models}
    if not named:
        raise ParameterError("There is no model to try: name one or more.")
    return {str(label): model for label, model in named.items()}


def _task_of(models: Any, hub: Mapping[str, Any]) -> str | None:
    """Return what the first model is for of which that is known; what cannot be read is told in its trial."""
    for model in models:
        try:
            with found(model, **hub) as one:
                if one.task is not None:
                    return one.task
        except MergeError:
            continue
    return None


def _checked(inputs: Any, task: str | None) -> list[Any]:
    """Return a list of inputs that fit a task.

    Raises:
        DataError: they do not.
    """
    if task == "image-classification":
        listed = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        return [_picture(one) for one in _some(listed)]
    is_one = isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and bool(inputs) and _is_turn(inputs[0]))
    listed = [inputs] if is_one or not isinstance(inputs, (list, tuple)) else list(inputs)
    for one in _some(listed):
        talks = task == "text-generation" and isinstance(one, (list, tuple)) and one and all(map(_is_turn, one))
        if not talks and not (isinstance(one, str) and one.strip()):
            raise DataError(f"Inputs of {task or 'a model'} are texts that are not empty; found {shown(one)}.")
    if task in _EMBEDDINGS and len(listed) < 2:
        raise DataError("Embeddings are compared with each other: give two texts or more.")
    return listed


def _some(inputs: list[Any]) -> list[Any]:
    if not inputs:
        raise DataError("There is nothing to try the models on: give an input.")
    return inputs


def _is_turn(one: Any) -> bool:
    return isinstance(one, Mapping) and {"role", "content"} <= one.keys()


def _picture(one: Any) -> Any:
    """Open a picture of this machine; nothing is fetched."""
    if hasattr(one, "convert"):
        return one.convert("RGB")
    if not isinstance(one, (str, os.PathLike)):
        raise DataError(f"Inputs of image-classification are paths or PIL images; found {shown(one)}.")
    from PIL import Image

    try:
        with Image.open(one) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"'{one}' cannot be read as a picture: {error}.") from None


def _tried(
    label: str, model: Any, task: str | None, inputs: list[Any], new: int, loading: Mapping[str, Any],
    hub: Mapping[str, Any],
) -> Trial:  # fmt: skip
    """Load a model, give it the inputs, and let it go."""
    begin = time.perf_counter()
    try:
        with _compat.quiet(), found(model, **hub) as one:
            if task is None:
                raise MergeError(f"Neither card nor config.json says what '{label}' is for: pass task=.")
            told = answers(one, task, inputs, new=new, loading=loading, hub=hub)
        return Trial(label, task, tuple(told), time.perf_counter() - begin)
    except Exception as error:  # whatever a model of anybody's does, the others are tried
        return Trial(label, task, seconds=time.perf_counter() - begin, error=_reason(error))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    """Say in one line what went wrong."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MergeError) else f"{type(error).__name__}: {shown(text, 300).strip(chr(39))}"


def _in_words(output: Mapping[str, Any]) -> str:
    """Write an output for people."""
    if "text" in output:
        return output["text"].strip() or "(nothing)"
    if "similarity" in output:
        return "  ".join(f"{value:.3f}" for value in output["similarity"])
    return ", ".join(_pairs(output))


def _pairs(output: Mapping[str, Any]) -> Iterator[str]:
    for row in output.get("labels") or output.get("tokens") or ():
        yield f"{row.get('label', row.get('token'))} {row['score']:.3f}"
