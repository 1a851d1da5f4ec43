"""The command `hf-merge try`."""

from pathlib import Path
from typing import Annotated

import click

import hf_merge
from hf_merge import _compat
from hf_merge.flags import CacheDir, LocalOnly, Token

Argument, Option, out = _compat.cli_words()

EPILOG = (
    'Examples\n  $ hf-merge try merged org/code org/math --input "The sum of 2 and 3 is"\n'
    '  $ hf-merge try merged=out parent=org/a --input "a cat" --input "a kitten" --task sentence-similarity'
)


def try_out(
    models: Annotated[
        list[str], Argument(help="Folders, Hub ids, adapters or recipes; LABEL=MODEL gives one a name of its own.")
    ],
    given: Annotated[list[str], Option("--input", "-i", help="A text, or the path of a picture. Repeatable.")],
    task: Annotated[
        str | None, Option("--task", help="As the Hub calls it. Default: what the first model's card or class says.")
    ] = None,
    max_new_tokens: Annotated[int, Option("--max-new-tokens", min=1, help="Of text generation.")] = 64,
    device_map: Annotated[str, Option("--device-map", help="Where models run, as in transformers.")] = "auto",
    dtype: Annotated[str, Option("--dtype", help="In which models run. Default: their own.")] = "auto",
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Give the same inputs to a merged model and its parents, one after the other."""
    found = hf_merge.try_out(
        dict(map(_labelled, models)), given, task=task, max_new_tokens=max_new_tokens, device_map=device_map,
        dtype=dtype, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    if out.mode.value == "json":
        out.dict({"trials": [one.to_dict() for one in found]})
    else:
        out.text("\n\n".join(map(str, found)))
    if any(one.error for one in found):
        raise click.exceptions.Exit(1)


def _labelled(text: str) -> tuple[str, str]:
    """Read `label=model`, or a model that is its own label."""
    label, equals, model = text.partition("=")
    return (label, model) if equals and not Path(text).exists() else (text, text)
