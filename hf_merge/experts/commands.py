"""The command `hf-merge train-router`."""

from typing import Annotated, Literal

import click

from hf_merge import _compat
from hf_merge.flags import CacheDir, LocalOnly, Token

Argument, Option, out = _compat.cli_words()

EPILOG = (
    "Examples\n  $ hf-merge train-router merged --data cars=images/cars --data pets=images/pets\n"
    "  $ hf-merge train-router merged --data cars=images/cars --data pets=images/pets --kind prototypes"
)


def train_router(
    folder: Annotated[str, Argument(help="A backbone with task experts, as `hf-merge merge` wrote it.")],
    data: Annotated[
        list[str], Option("--data", help="TASK=FILE or TASK=FOLDER; no labels are needed. Once for each task.")
    ],
    kind: Annotated[
        Literal["trained", "prototypes"], Option("--kind", help="An MLP, or distances, which need no training.")
    ] = "trained",
    architecture: Annotated[
        Literal["twin", "free"] | None, Option("--architecture", help="Of the MLP. Default: that of the method.")
    ] = None,
    encoder: Annotated[
        str | None, Option("--encoder", help="A model whose features are read. Default: the backbone.")
    ] = None,
    epochs: Annotated[int, Option("--epochs", help="Of the training.")] = 50,
    lr: Annotated[float, Option("--lr", help="Of AdamW; it falls linearly to 0.")] = 5e-4,
    batch_size: Annotated[int, Option("--batch-size", help="Examples at a time.")] = 64,
    max_examples: Annotated[
        int, Option("--max-examples", help="Of each task at most so many, drawn by the seed.")
    ] = 5500,
    held_out: Annotated[float, Option("--held-out", help="Share of the examples that the accuracy is of.")] = 0.2,
    seed: Annotated[int, Option("--seed", help="Split, order and weights are drawn by it.")] = 0,
    soft: Annotated[
        bool | None, Option("--soft/--hard", help="Mix the experts, or run the likeliest. Default: as the method.")
    ] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Let a model with task experts tell by itself of which task an input is."""
    from hf_merge.experts.training import train_router as train

    router = train(
        folder, _by_task(data), kind=kind, architecture=architecture, encoder=encoder, epochs=epochs, lr=lr,
        batch_size=batch_size, max_examples=max_examples, held_out=held_out, seed=seed, soft=soft, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    told = {f"accuracy_{task}": f"{value:.4f}" for task, value in router.config.accuracies.items()}
    out.result("Trained", path=f"{folder}/router", kind=kind, accuracy=f"{router.config.accuracy:.4f}", **told)


def _by_task(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in pairs:
        task, equals, place = text.partition("=")
        if not task or not equals or not place or task in found:
            raise click.UsageError(f"--data takes TASK=PATH, once for each task; found '{text}'.")
        found[task] = place
    return found
