"""Run a model on data and leave a file of statistics, which methods such as fisher and regmean merge by."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import tqdm

import hf_merge
from hf_merge.data import Data, Preparation, read
from hf_merge.errors import OutputError, ParameterError, shown
from hf_merge.measuring.activations import activations, spec_of
from hf_merge.measuring.fisher import Targets, diagonal_fisher
from hf_merge.measuring.gram import Shared, bytes_in, gram_matrices, in_passes, sharing
from hf_merge.measuring.sequence import METHOD, merged_gram_matrices
from hf_merge.measuring.subject import Subject, has_accelerator, linear_layers, open_subject
from hf_merge.measuring.writing import StatisticsFile, refuse_existing_file
from hf_merge.method import get_method
from hf_merge.sources.statistics import sample
from hf_merge.types import TensorSpec

What = Literal["fisher", "gram", "activations", "merged_gram"]
WHAT = ("fisher", "gram", "activations", "merged_gram")
TARGETS = ("sampled", "data", "expected")


def measure(
    model: Any,
    data: Any,
    what: What = "gram",
    *,
    output: str | os.PathLike[str],
    targets: Targets = "sampled",
    columns: Mapping[str, str] | None = None,
    batch_size: int = 8,
    max_examples: int | None = 256,
    max_length: int = 512,
    seed: int = 0,
    device_map: Any = "auto",
    max_memory: int | str = "4GB",
    dtype: str | torch.dtype = "float32",
    scaling: float | None = None,
    ridge: float | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path | list[Path]:
    """Run a model on data and leave a file of statistics, keyed like the tensors of its checkpoint.

        hf_merge.measure("org/a", "a.jsonl", "gram", output="a.safetensors")
        hf_merge.merge(["org/a", "org/b"], "merged", method="regmean", statistics=["a.safetensors", "b.safetensors"])

        hf_merge.measure(["org/a", "org/b"], ["a.jsonl", "b.jsonl"], "merged_gram", output="grams")

    Args:
        model: a Hub id, a folder, an adapter (over its base), or a `PreTrainedModel`.
        data: a `datasets.Dataset`, a local file, a folder of images, or an iterable of rows or of batches; see
            `hf_merge.data.read`. The model's own tokenizer or image processor is used.
        what: `fisher`, the diagonal Fisher information: mean over examples of squared gradients of the
            log-likelihood. `gram`: X^T X / n of the inputs of every linear layer and convolution. `activations`: mean
            and root mean square of their outputs. `merged_gram`: for lists of models and of data, Gram matrices on
            inputs from the merged layers before, for RegMean++.
        output: the file to make, `NAME.safetensors`; of `merged_gram` the folder to make, with a file for each model.
        targets: of the Fisher information: labels `sampled` from what the model says (the default), those of the
            `data` (the empirical Fisher), or `expected`, all labels by what the model says of them, as in the paper on
            Fisher merging: a backward pass for each class.
        columns: what columns are called: `{"text": .., "text_pair": .., "image": .., "label": ..}`.
        batch_size: examples at a time; gradients are always of one.
        max_examples: at most so many, drawn by the seed; None for all.
        max_length: of texts, in tokens.
        seed: examples and labels are drawn by it.
        device_map: where the model runs, as in transformers; `auto` without an accelerator is the CPU.
        max_memory: what the Gram matrices of one pass over the data may take; there are as many passes as it needs.
        dtype: in which the model runs.
        scaling, ridge: of `merged_gram`: those that the merge will have.
        overwrite: replace what is there.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.

    Returns:
        The file, or for `merged_gram` the files in the order of the models.

    Raises:
        DataError: the data cannot be read, has no or wrong labels, or is not what the model takes.
        OutputError: the file exists, or cannot be written.
        MergeError: the model cannot be read or run.
    """
    _check(what, targets, batch_size, max_examples, max_length, seed)
    models, given = _pairs(model, data, together=what == "merged_gram")
    limit, words = bytes_in(max_memory), _words_of_merge(scaling, ridge)
    paths = _paths(output, len(models), together=what == "merged_gram", overwrite=overwrite)
    rows = [read(one) for one in given]
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    device_map = None if device_map == "auto" and not has_accelerator() else device_map
    subjects = [open_subject(one, device_map=device_map, dtype=dtype, hub=hub) for one in models]
    prepared = [
        Data(
            some, subject.module, Preparation(subject.module, subject.ref, max_length=max_length, **hub),
            columns=columns, batch_size=batch_size, max_examples=max_examples, seed=seed,
            labelled=what == "fisher" and targets == "data" and not subject.is_causal,
        )
        for subject, some in zip(subjects, rows, strict=True)
    ]  # fmt: skip
    told = [_told(what, *each, seed=seed) for each in zip(subjects, prepared, given, strict=True)]
    with ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(_steady(subject.module))
        if what == "merged_gram":
            _write_merged_gram(subjects, prepared, paths, [{**one, **words} for one in told], words)
            return paths
        if what == "fisher":
            _write_fisher(subjects[0], prepared[0], paths[0], {**told[0], "targets": targets}, targets, seed)
        elif what == "activations":
            _write_activations(subjects[0], prepared[0], paths[0], told[0])
        else:
            _write_gram(subjects[0], prepared[0], paths[0], told[0], limit)
    return paths[0]


def _check(what: Any, targets: Any, batch_size: Any, max_examples: Any, max_length: Any, seed: Any) -> None:
    """Check words and numbers before anything is opened."""
    for name, value, known in (("what", what, WHAT), ("targets", targets, TARGETS)):
        if value not in known:
            raise ParameterError(f"'{name}' should be one of {', '.join(known)}; found {shown(value)}.")
    numbers = {"batch_size": batch_size, "max_examples": 1 if max_examples is None else max_examples}
    for name, value, least in (
        *((n, v, 1) for n, v in numbers.items()),
        ("max_length", max_length, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ParameterError(f"'{name}' should be an integer of at least {least}; found {shown(value)}.")


def _pairs(model: Any, data: Any, *, together: bool) -> tuple[list[Any], list[Any]]:
    """Return models and the data of each: one of each, or lists of models that are measured together."""
    if not together:
        return [model], [data]
    if not isinstance(model, (list, tuple)) or not isinstance(data, (list, tuple)):
        raise ParameterError("'merged_gram' is measured of all models together: pass lists of models and of data.")
    if len(model) != len(data):
        raise ParameterError(f"There are {len(model)} models and {len(data)} data sets: each model has its own.")
    return list(model), list(data)


def _paths(output: str | os.PathLike[str], count: int, *, together: bool, overwrite: bool) -> list[Path]:
    """Name the files that are made; none of them may be there already."""
    target = Path(os.path.abspath(os.path.expanduser(output)))
    paths = [target / f"{place}.safetensors" for place in range(count)] if together else [target]
    for path in paths:
        refuse_existing_file(path, overwrite=overwrite)
    return paths


def _words_of_merge(scaling: float | None, ridge: float | None) -> dict[str, Any]:
    method = get_method(METHOD)
    given = {name: value for name, value in (("scaling", scaling), ("ridge", ridge)) if value is not None}
    return method.settings(1, given)


def _told(what: str, subject: Subject, data: Data, given: Any, *, seed: int) -> dict[str, Any]:
    """Say what a file holds, and where it comes from."""
    import transformers

    source = subject.source
    label = source.label if source.public_id else Path(source.label).name
    model = {"label": label, "public_id": source.public_id, "revision": source.revision, "sample": sample(source),
             "architecture": type(subject.module).__name__}  # fmt: skip
    versions = {"hf_merge": hf_merge.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    named = Path(given).name if isinstance(given, (str, os.PathLike)) else type(given).__name__
    return {"what": what, "model": model, "data": named, "examples": len(data), "seed": seed, "versions": versions}


@contextmanager
def _steady(module: torch.nn.Module) -> Iterator[None]:
    """Run a model without dropout, and put it back as it was."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, unit="example", desc=f"Measuring {what}", name="hf_merge.measure")


def _write_fisher(
    subject: Subject, data: Data, path: Path, told: Mapping[str, Any], targets: Targets, seed: int
) -> None:
    with _bar(len(data), "fisher") as bar:
        found = subject.saved(diagonal_fisher(subject, data, targets, seed, bar.update))
    specs = {name: TensorSpec(tuple(one.shape), torch.float32) for name, one in found.items()}
    with StatisticsFile(path, specs, told) as file:
        for name, one in found.items():
            file.write(name, one)


def _write_activations(subject: Subject, data: Data, path: Path, told: Mapping[str, Any]) -> None:
    layers = [layer for layer in linear_layers(subject) if len(layer.saved) == 1]
    with _bar(len(data), "activations") as bar:
        found = activations(subject, layers, data, bar.update)
    with StatisticsFile(path, {layer.saved[0]: spec_of(layer) for layer in layers}, told) as file:
        for layer, one in zip(layers, found, strict=True):
            file.write(layer.saved[0], one)


def _write_gram(subject: Subject, data: Data, path: Path, told: Mapping[str, Any], limit: int) -> None:
    groups = sharing(subject, linear_layers(subject), next(iter(data)))
    total = len(in_passes(groups, limit)) * len(data)
    with _bar(total, "gram") as bar, _gram_file(path, groups, told) as file:
        for group, gram in gram_matrices(subject, groups, data, limit, bar.update):
            file.write(group.names[0], gram)


def _gram_file(path: Path, groups: Sequence[Shared], told: Mapping[str, Any]) -> StatisticsFile:
    """Lay out a file in which matrices that several tensors share are stored once."""
    same = {name: group.names[0] for group in groups for name in group.names[1:]}
    return StatisticsFile(path, {group.names[0]: group.spec for group in groups}, {**told, "same_as": same})


def _write_merged_gram(
    subjects: Sequence[Subject],
    data: Sequence[Data],
    paths: Sequence[Path],
    told: Sequence[Mapping[str, Any]],
    words: Mapping[str, Any],
) -> None:
    files: list[StatisticsFile] = []
    layers = linear_layers(subjects[0])
    if not layers:
        raise OutputError("The models have no linear layers: there is nothing to measure.")
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(0, "merged_gram"))

        def begin(groups: list[Shared], units: int) -> None:
            bar.reset(units * sum(map(len, data)))
            files.extend(
                stack.enter_context(_gram_file(path, groups, one)) for path, one in zip(paths, told, strict=True)
            )

        found = merged_gram_matrices(subjects, data, layers, begin=begin, done=bar.update, **words)
        for place, group, gram in found:
            files[place].write(group.names[0], gram)
