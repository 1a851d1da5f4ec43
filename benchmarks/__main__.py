"""The one command of the project's speed: `python -m benchmarks --help`. What it prints is in docs/performance.md."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import parse
from benchmarks.groups import GROUPS
from benchmarks.peers import prepare_mergekit
from benchmarks.report import caption, data, insert, markdown, versions


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the benchmark group by group; return the Markdown that was printed."""
    options, file, page = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.mergekit:
        try:
            prepare_mergekit(options.mergekit)
        except RuntimeError as error:
            sys.exit(str(error))
    about = versions(options)
    parts, sections = [caption(options, about)], []
    print(parts[0], flush=True)
    for name in options.groups:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            done = GROUPS[name](options, Path(scratch))
        sections += done
        parts += map(markdown, done)
        print("", *parts[-len(done) :], sep="\n", flush=True)
        if file:  # what is done is done, should the rest fail
            file.write_text(data(sections, options, about), encoding="utf-8")
    text = "\n\n".join(parts)
    if page:
        insert(page, text)
    return text


if __name__ == "__main__":
    main()
