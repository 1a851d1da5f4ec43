"""Models -> sums over their tensors -> what they say: `hf_merge.analyze`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from hf_merge.analysis.found import Analysis
from hf_merge.analysis.naming import part_of
from hf_merge.analysis.opening import Subject, open_subject
from hf_merge.analysis.sums import Sums, sample_runs, tensor_sums
from hf_merge.errors import ComputeError, ParameterError
from hf_merge.execute import kept_threads
from hf_merge.fetch import Read, check_downloads, fetching, remote_place
from hf_merge.planning import default_workers
from hf_merge.progress import OnProgress, Progress, Report, current, reported

__all__ = ["Analysis", "analyze"]


@reported
def analyze(
    recipe_or_models: Any,
    *,
    base_model: Any = None,
    merged: Any = None,
    sample: int | None = None,
    on_progress: OnProgress | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    stream: bool = False,
    **changes: Any,
) -> Analysis:
    """Measure what models changed of their base, where, and how far they agree; and what a merge made of them.

        found = hf_merge.analyze("recipe.yaml", merged="merged")
        found = hf_merge.analyze(["org/code", "org/math"], base_model="org/base", sample=65536)
        print(found.readings["similarity"])
        found.save("analysis")

    Weights are read tensor by tensor through the sources that a merge has (adapters on their bases, one layout, one
    vocabulary), in tiles of `sums.TILE` entries, and summed in float64; the numbers are the same for any number of
    threads. Weights that are stored twice count once; integers do not count. Without a base, the mean of the models
    stands for it, and distances between the models take the place of similarities of their changes.

    Args:
        recipe_or_models: a YAML file, a mapping, a Recipe; or the models, as a list or as a mapping of labels to them
            (Hub ids, folders, adapters, modules, state dicts). How the recipe merges does not matter.
        base_model: what they were fine-tuned from; the recipe's if not given, or that which all adapters name.
        merged: the result: a folder, an id, what `merge` returned, a module or a state dict.
        sample: entries that are read of each tensor, in evenly spaced runs, of the Hub by range; all if not given.
            What is left out is taken for like what was read, so that all numbers but shares are estimates.
        on_progress: is called with a `Progress` for each tensor; what it raises ends the analysis.
        token, cache_dir, local_files_only: for models on the Hub, as everywhere in huggingface_hub.
        stream: read tensors by range, and keep no weights in the cache; so it is where there is a `sample`.
        **changes: fields of the recipe, as in `merge`.

    Returns:
        The numbers, with what they say.

    Raises:
        ParameterError: `sample` is no positive integer.
        RecipeError, SourceError: a model cannot be read.
        ComputeError: a model has NaN or Inf somewhere.
    """
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise ParameterError(f"sample= is how many entries of each tensor are read: 1 or more; found {sample!r}.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
           "stream": stream or sample is not None}  # fmt: skip
    subject = open_subject(recipe_or_models, base_model, merged, hub, **changes)
    places: dict[tuple[str, str], Sums] = {}
    for name, sums in _measured(subject, sample, current()):
        place = (subject.layers.of(name), part_of(name))
        places.setdefault(place, Sums.of(len(subject.models))).add(sums)
    return Analysis.of(subject, places, sample)


def _measured(subject: Subject, sample: int | None, report: Report) -> Iterator[tuple[str, Sums]]:
    """Yield the sums over every tensor, in order; several tensors are worked on at a time."""
    reads, stop = _remote_reads(subject, sample), Event()
    check_downloads(reads)
    sizes = {name: _bytes(subject, name, sample) for name in subject.names}
    done, size, total = 0, 0, sum(sizes.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="Analyzing", name="hf_merge.analyze")
    with kept_threads(), bar, fetching(reads, stop) if reads else nullcontext():
        for name, coming in _at_work(partial(_of_tensor, subject, sample), subject.names):
            report.tell(Progress("analyzing", name, done, len(subject.names), size, total))
            yield name, coming.result()
            done, size = done + 1, size + sizes[name]
            bar.update(sizes[name])
    report.tell(Progress("analyzing", "", done, len(subject.names), size, total))


def _at_work(work: Callable[[str], Sums], names: Sequence[str]) -> Iterator[tuple[str, Future[Sums]]]:
    """Give each name to a thread, and yield what comes of it in order; nothing is begun once nobody listens."""
    pool = ThreadPoolExecutor(default_workers(), initializer=lambda: torch.set_num_threads(1))
    try:
        yield from [(name, pool.submit(work, name)) for name in names]
    finally:
        pool.shutdown(cancel_futures=True)


def _of_tensor(subject: Subject, sample: int | None, name: str) -> Sums:
    """Sum over a tensor of all models; a tensor that the base lacks has a norm, and no change."""
    holders = subject.holders(name)
    lead = next(source for source in holders if source is not None)
    numel = lead.specs[name].numel
    runs = sample_runs(numel, sample)
    *models, base = [None if one is None else one.pieces(name, runs) for one in holders]
    try:
        found = tensor_sums(models, base, subject.parents, subject.labels)
    except ComputeError as error:
        raise ComputeError(f"{error} in '{name}': it cannot be compared, and answers with nothing of use.") from None
    sums = Sums.of(len(models))
    if subject.base is not None and base is None:
        found = Sums(sums.products.copy(), sums.squares.copy(), found.weights, sums.base.copy())
        found.weights[-1] = 0
    sums.add(found, numel / sum(end - begin for begin, end in runs))
    return sums


def _bytes(subject: Subject, name: str, sample: int | None) -> int:
    """Say how much of a tensor is read, in all models together."""
    sources = [source for source in subject.holders(name) if source is not None]
    numel = sources[0].specs[name].numel
    share = sum(end - begin for begin, end in sample_runs(numel, sample)) / numel
    return round(share * sum(source.bytes_read(name) for source in sources))


def _remote_reads(subject: Subject, sample: int | None) -> list[Read]:
    """List what comes from the Hub, in order; of a sample, whole tensors that are small enough."""
    named = [(name, source) for name in subject.names for source in subject.holders(name) if source is not None]
    whole = [(name, source) for name, source in named if sample is None or source.specs[name].numel <= sample]
    stored = (origin for name, source in whole for origin in source.origins(name))
    return [place for part, inner in stored for place in remote_place(part, inner)]
