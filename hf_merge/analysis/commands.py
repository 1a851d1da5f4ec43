"""The command `hf-merge analyze`."""

from typing import Annotated

import hf_merge
from hf_merge import _compat
from hf_merge.flags import CacheDir, LocalOnly, Token

Argument, Option, out = _compat.cli_words()

EPILOG = (
    "Examples\n  $ hf-merge analyze recipe.yaml --merged merged --output analysis\n"
    "  $ hf-merge analyze org/code org/math --base org/base --sample 65536"
)


def analyze(
    sources: Annotated[list[str], Argument(help="RECIPE, or the models: folders or Hub ids.")],
    base: Annotated[str | None, Option("--base", "-b", help="The model that the others were fine-tuned from.")] = None,
    merged: Annotated[str | None, Option("--merged", help="What came out of the merge: a folder or a Hub id.")] = None,
    output: Annotated[
        str | None, Option("--output", "-o", help="A folder for analysis.json, tables (CSV) and pictures (PNG).")
    ] = None,
    pictures: Annotated[
        bool, Option("--pictures/--no-pictures", help="Draw them; needs pip install 'hf-merge[picture]'.")
    ] = True,
    sample: Annotated[
        int | None, Option("--sample", min=1, help="Read so many entries of each tensor, and estimate. Default: all.")
    ] = None,
    stream: Annotated[
        bool, Option("--stream", help="Read tensors on the Hub by range, and keep no weights in the cache.")
    ] = False,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Say what models changed, where, how far they agree, and what a merge made of it."""
    is_recipe = len(sources) == 1 and sources[0].endswith((".yaml", ".yml", ".json"))
    found = hf_merge.analyze(
        sources[0] if is_recipe else sources, base_model=base, merged=merged, sample=sample, stream=stream, token=token,
        cache_dir=cache_dir, local_files_only=local_files_only,
    )  # fmt: skip
    if output is not None:
        found.save(output, pictures=pictures)
    if out.mode.value == "json":
        out.dict(found.to_dict())
    else:
        out.text(str(found))
