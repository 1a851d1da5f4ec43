"""The command `hf-merge study`."""

from pathlib import Path
from typing import Annotated

import click

from hf_merge import _compat
from hf_merge.flags import CacheDir, LocalOnly, Token

Argument, Option, out = _compat.cli_words()

OWN = ("vision8", "vision30")


def study(
    given: Annotated[
        str,
        Argument(help="vision8 or vision30, which need no network, or a file as examples/vision8.yaml."),
    ],
    output: Annotated[
        str | None, Argument(help="The folder for tables and picture. Default: the study's name, with -study after it.")
    ] = None,
    tasks: Annotated[int | None, Option("--tasks", min=2, help="Only so many of the tasks.")] = None,
    quick: Annotated[
        bool, Option("--quick", help="Of vision8 and vision30: smaller models, trained in minutes.")
    ] = False,
    seed: Annotated[int | None, Option("--seed", min=0, help="Of vision8 and vision30. Default: 0.")] = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Compare merge methods on many tasks: accuracy of each, storage per task and time, as tables and a picture."""
    from hf_merge.study.story import run_study

    if given not in OWN and (quick or seed is not None):
        raise click.UsageError(f"--quick and --seed go with {' and '.join(OWN)}; a file says its models and its seed.")
    done = run_study(
        given, output or f"{Path(given).stem}-study", tasks=tasks, quick=quick, seed=seed or 0, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    out.text(done.table())
    drawn = {"picture": str(done.picture)} if done.picture else {}
    out.result("Study", path=str(done.folder), seconds=round(done.seconds), **drawn)
