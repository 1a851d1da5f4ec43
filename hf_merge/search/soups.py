"""Greedy soups: models are added to an average as long as it does not get worse (https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_merge.api import load_recipe
from hf_merge.errors import ComputeError, OutputError, ParameterError
from hf_merge.recipe import Recipe
from hf_merge.search.data import batches
from hf_merge.types import InMemory, Ref


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
        if any(isinstance(model, InMemory) for model in self.recipe.references):
            raise OutputError(
                "The recipe names models in memory, which no file can: save them, and name their folders."
            )
        path = Path(output).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.recipe.to_yaml(), encoding="utf-8")
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        path.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
        return path


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
        ParameterError: fewer than two models, or data that cannot be used.
        ComputeError: a score that is no number.
        MergeError: as `merge`.
    """
    if isinstance(models, Recipe) or (
        isinstance(models, (str, os.PathLike)) and str(models).endswith((".yaml", ".yml", ".json"))
    ):
        models = list(Recipe.load(models).merged)
    if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence) or len(models) < 2:
        raise ParameterError("A soup is made of at least two models: give a list of them, or a recipe.")
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    refs = list(Recipe.load(list(models), method="linear", **changes).merged)

    def scored(chosen: Sequence[Ref]) -> float:
        model = load_recipe(list(chosen), hub, method="linear", **changes).to(where).eval()
        first = chosen[0]
        model.name_or_path = getattr(first, "path", None) or getattr(getattr(first, "value", None), "name_or_path", "")
        score = evaluate(model) if callable(evaluate) else accuracy(model, evaluate, batch_size=batch_size)
        return _number(score, chosen)

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


@torch.inference_mode()
def accuracy(model: Any, data: Any, *, batch_size: int = 16, classes: Sequence[int] | None = None) -> float:
    """Return the share of examples of which a classifier finds the label.

    Args:
        model: the classifier.
        data: with labels; see `hf_merge.search.data.batches`.
        batch_size: of examples.
        classes: of a head that several tasks share, those that may be guessed.

    Raises:
        ParameterError: data without labels, or with labels that the model does not have.
    """
    right = seen = 0
    device = next(model.parameters()).device
    for batch in batches(model, data, batch_size, None, labels=True):
        ready: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
        labels: Any = ready.pop("labels", ready.pop("label", None))
        if not isinstance(labels, Tensor):
            raise ParameterError("The data has no labels: batches need 'labels'.")
        logits = model(**ready).logits
        if bool((labels < 0).any()) or bool((labels >= logits.shape[-1]).any()):
            raise ParameterError(
                f"The data has labels from {int(labels.min())} to {int(labels.max())}, and the model has "
                f"{logits.shape[-1]} classes, 0 to {logits.shape[-1] - 1}."
            )
        if classes is not None:
            guesses = torch.tensor(list(classes), device=device)[logits[..., list(classes)].argmax(-1)]
        else:
            guesses = logits.argmax(-1)
        right, seen = right + int((guesses == labels).sum()), seen + labels.numel()
    return right / seen
