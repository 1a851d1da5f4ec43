"""Greedy soups: models are added to an average as long as it does not get worse (https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from hf_merge.api import load_recipe
from hf_merge.data import Data, Preparation, labelled_batches, read
from hf_merge.errors import ComputeError, DataError, ParameterError
from hf_merge.recipe import Recipe
from hf_merge.search.found import device_of, is_recipe, save_found
from hf_merge.types import Ref


@dataclass(frozen=True)
class Soup:
    """A greedy soup.

    Attributes:
        recipe: the average of the models that were taken.
        score: of the average.
        log: what was tried: `models`, `score`, and whether the last of them was `taken`.
    """

    recipe: Recipe
    score: float
    log: Sequence[Mapping[str, Any]] = field(repr=False)

    def save(self, output: str | os.PathLike[str]) -> Path:
        """Write the recipe to a YAML file, and the log beside it as `.jsonl`; return the path of the recipe."""
        return save_found(self.recipe, self.log, output)


def greedy_soup(
    models: Any,
    evaluate: Callable[[Any], float] | Any,
    *,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    output: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **changes: Any,
) -> Soup:
    """Average models of one task, best first, each only if the average does not get worse by it.

        soup = hf_merge.search.greedy_soup(["org/run-1", "org/run-2", "org/run-3"], "validation.csv")
        hf_merge.merge(soup.recipe, "merged")

    Args:
        models: fine-tunes of one base for one task, or a recipe that names them.
        evaluate: a function of a model that returns its score, more being better; or data with labels, on which the
            accuracy of a classifier is the score.
        batch_size: with data.
        device: where the models run; an accelerator if there is one.
        output: a file for the recipe, with the log beside it.
        token, cache_dir, local_files_only: for models on the Hub.
        **changes: of the recipe: `missing=`, `dtype=`, ...

    Raises:
        ParameterError: fewer than two models.
        DataError: data that cannot be used.
        ComputeError: a score that is no number.
        MergeError: as `merge`.
    """
    if is_recipe(models):
        models = list(Recipe.load(models).merged)
    if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence) or len(models) < 2:
        raise ParameterError("A soup is made of at least two models: give a list of them, or a recipe.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    where = device_of(device)
    data = None if callable(evaluate) else read(evaluate)
    if isinstance(data, Iterator):
        raise DataError("Data for a soup is gone through once for each model: give a list, a loader or files.")
    refs = list(Recipe.load(list(models), method="linear", **changes).merged)

    def scored(chosen: Sequence[Ref]) -> float:
        place = getattr(chosen[0], "path", None) or getattr(getattr(chosen[0], "value", None), "name_or_path", "")
        model = load_recipe(list(chosen), hub, name=place, method="linear", **changes).to(where).eval()
        if data is None:
            return _number(evaluate(model), chosen)
        prepare = Preparation(model, chosen[0], **hub)
        return _accuracy(model, labelled_batches(data, model, batch_size=batch_size, prepare=prepare))

    log: list[dict[str, Any]] = []
    alone = {}
    for ref in tqdm(refs, desc="Scoring models", name="hf_merge.search"):
        alone[ref] = scored([ref])
        log.append({"models": [str(ref)], "score": alone[ref], "taken": False})
    first, *others = sorted(refs, key=lambda ref: -alone[ref])  # stable: of equals, the first named
    taken, best = [first], alone[first]
    log[refs.index(first)]["taken"] = True
    for ref in tqdm(others, desc="Adding models", name="hf_merge.search"):
        score = scored([*taken, ref])
        log.append({"models": [*map(str, taken), str(ref)], "score": score, "taken": score >= best})
        if score >= best:
            taken, best = [*taken, ref], score
    soup = Soup(Recipe.load(taken, method="linear", **changes), best, log)
    if output is not None:
        soup.save(output)
    return soup


def _number(score: Any, chosen: Sequence[Ref]) -> float:
    try:
        found = float(score)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ComputeError(
            f"The score of {' + '.join(map(str, chosen))} is {score!r}: evaluate should return a number."
        )
    return found


def accuracy(model: Any, data: Any, *, batch_size: int = 16, classes: Sequence[int] | None = None) -> float:
    """Return the share of examples of which a classifier finds the label.

    Args:
        model: the classifier.
        data: with labels; see `hf_merge.data.labelled_batches`.
        batch_size: of examples.
        classes: of a head that several tasks share, those that may be guessed.

    Raises:
        DataError: data without labels, or with labels that the model does not have.
    """
    return _accuracy(model, labelled_batches(data, model, batch_size=batch_size), classes)


@torch.inference_mode()
def _accuracy(model: Any, data: Data, classes: Sequence[int] | None = None) -> float:
    right = seen = 0
    device = next(model.parameters()).device
    for batch in (one.to(device) for one in data):
        logits = model(**batch.inputs).logits
        if classes is not None:
            guesses = torch.tensor(list(classes), device=device)[logits[..., list(classes)].argmax(-1)]
        else:
            guesses = logits.argmax(-1)
        right, seen = right + int((guesses == batch.labels).sum()), seen + guesses.numel()
    return right / seen
