"""The commands `hf-merge search adamerging` and `hf-merge search soup`."""

from typing import Annotated, Any, Literal

import click
from huggingface_hub import typer_factory

from hf_merge import _compat
from hf_merge.flags import CacheDir, LocalOnly, Token, shared

Argument, Option, out = _compat.cli_words()

app = typer_factory(help="Find coefficients by running models on data, and leave a recipe.")

SourcesAndOutput = Annotated[
    list[str],
    Argument(help="MODEL... OUTPUT.yaml (folders or Hub ids), or RECIPE OUTPUT.yaml with a recipe that names them."),
]


def _flags(
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Examples of a task at a time.")] = 16,
    device: Annotated[
        str | None, Option("--device", help="Where the models run. Default: an accelerator, if any.")
    ] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """The flags of all searches."""


@app.command(
    "adamerging",
    epilog="Examples\n  $ hf-merge search adamerging org/pets org/cars --base org/base --data pets=images/pets "
    "--data cars=images/cars found.yaml\n  $ hf-merge merge found.yaml merged",
)
@shared(_flags)
def adamerging(
    models_and_output: SourcesAndOutput,
    data: Annotated[
        list[str],
        Option("--data", help="TASK=FILE or TASK=FOLDER without labels; a task is called as its model. Repeatable."),
    ],
    base: Annotated[str | None, Option("--base", "-b", help="The model that the others were fine-tuned from.")] = None,
    level: Annotated[
        Literal["layer", "task"], Option("--level", help="A coefficient for each tensor, or for each task.")
    ] = "layer",
    objective: Annotated[
        Literal["entropy", "kl-to-experts", "features"],
        Option("--objective", help="What is made small: entropy of predictions, or the distance to each task's model."),
    ] = "entropy",
    filtered: Annotated[bool, Option("--filtered", help="AdaMerging++: of each task vector what TIES keeps.")] = False,
    density: Annotated[float, Option("--density", help="With --filtered, how much of it.")] = 0.2,
    initial: Annotated[float, Option("--initial", help="All coefficients, at first.")] = 0.3,
    steps: Annotated[int, Option("--steps", min=1, help="Of Adam; each takes a batch of every task.")] = 500,
    learning_rate: Annotated[float, Option("--learning-rate", help="Of Adam.")] = 1e-3,
    seed: Annotated[int, Option("--seed", min=0, help="Of the order of the data.")] = 0,
    heads: Annotated[
        list[str] | None, Option("--heads", help="Tensors that are not merged, by parts of names. Repeatable.")
    ] = None,
    merge_heads: Annotated[bool, Option("--merge-heads", help="Merge heads of one shape as all else.")] = False,
    classes: Annotated[
        list[str] | None, Option("--classes", help="TASK=FIRST-LAST of a head that all tasks share. Repeatable.")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], Option("--dtype", help="Of the task vectors held.")] = "float32",
    **words: Any,
) -> None:
    """Learn coefficients of task vectors on data without labels (AdaMerging)."""
    from hf_merge.search.learning import adamerging as learn

    models, output = _models_and_output(models_and_output)
    if heads and merge_heads:
        raise click.UsageError("--heads names tensors that are not merged, and --merge-heads says to merge them.")
    learnt = learn(
        models, base, dict(_pair(text, "--data TASK=PATH") for text in data), level=level, objective=objective,
        filtered=filtered, density=density, initial=initial, steps=steps, learning_rate=learning_rate, seed=seed,
        heads=[] if merge_heads else heads, classes=dict(_span(text) for text in classes or ()), dtype=dtype,
        output=output, **words,
    )  # fmt: skip
    first, last = (f"{learnt.log[i]['loss']:.4f}" for i in (0, -1))
    means = {f"mean_{task}": f"{_mean(found):.4f}" for task, found in learnt.coefficients.items()}
    out.result("Learnt", path=output, first_loss=first, last_loss=last, heads=len(learnt.heads), **means)


@app.command(
    "soup",
    epilog="Examples\n  $ hf-merge search soup org/run-1 org/run-2 org/run-3 --data validation.csv found.yaml\n"
    "  $ hf-merge merge found.yaml merged",
)
@shared(_flags)
def soup(
    models_and_output: SourcesAndOutput,
    data: Annotated[str, Option("--data", help="A file with a column of labels, or a folder of images by label.")],
    **words: Any,
) -> None:
    """Average models of one task, best first, as long as their accuracy does not fall (a greedy soup)."""
    from hf_merge.search.soups import greedy_soup

    models, output = _models_and_output(models_and_output)
    made = greedy_soup(models, data, output=output, **words)
    taken = ", ".join(map(str, made.recipe.merged))
    out.result("Found", path=output, accuracy=f"{made.score:.4f}", taken=taken, tried=len(made.log))


def _models_and_output(words: list[str]) -> tuple[Any, str]:
    """Tell the file that is written, the last, from the models or the recipe."""
    *models, output = words
    if not models or not output.endswith((".yaml", ".yml")):
        raise click.UsageError(
            f"Give models, or a recipe that names them, and then OUTPUT.yaml; the last is '{output}'."
        )
    return (models[0] if len(models) == 1 and models[0].endswith((".yaml", ".yml", ".json")) else models), output


def _pair(text: str, form: str) -> tuple[str, str]:
    task, equals, value = text.partition("=")
    if not task or not equals or not value:
        raise click.UsageError(f"{form}; found '{text}'.")
    return task, value


def _span(text: str) -> tuple[str, list[int]]:
    task, value = _pair(text, "--classes TASK=FIRST-LAST")
    first, _, last = value.partition("-")
    if not first.isdigit() or not last.isdigit():
        raise click.UsageError(f"--classes TASK=FIRST-LAST, as cars=0-9; found '{text}'.")
    return task, list(range(int(first), int(last) + 1))


def _mean(found: Any) -> float:
    values = list(found.values()) if isinstance(found, dict) else [found]
    return sum(values) / len(values)
