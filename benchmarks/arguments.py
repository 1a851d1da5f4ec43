"""The words of the command line."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks.caches import can_drop
from benchmarks.checkpoints import SIZES
from benchmarks.groups import GROUPS
from benchmarks.large import MERGES
from benchmarks.options import QUICK, SIZE, Options, sizes_of
from benchmarks.report import check_markers

_DESCRIPTION = """\
Measure hf_merge beside its peers: whole fresh processes that take turns. Medians are shown, and ratios of runs that
followed each other. Compare ratios, and only those of one call: seconds depend on the machine and on what else it does.
"""


def parse(arguments: Sequence[str] | None) -> tuple[Options, Path | None, Path | None]:
    """Return what to do, the file for every single run, and the file to write the report into."""
    parser = _parser()
    words = parser.parse_args(arguments)
    sizes = QUICK if words.quick else sizes_of(words.size)
    runs = words.runs or (1 if words.quick else 3)
    mergekit = words.folder / "mergekit" if words.mergekit == "" else words.mergekit and Path(words.mergekit)
    if words.cold and not can_drop():
        parser.error("this system cannot drop files from its page cache: leave --cold out")
    if words.write:
        try:
            check_markers(words.write)
        except ValueError as error:
            parser.error(str(error))
    options = Options(
        words.folder,
        sizes,
        tuple(words.only),
        tuple(words.methods),
        runs,
        words.peer_runs,
        mergekit or None,
        words.cold,
    )
    return options, words.json, words.write


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"  {name:10}{(group.__doc__ or '').splitlines()[0]}" for name, group in GROUPS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=_DESCRIPTION, epilog=f"groups:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    methods = dict.fromkeys(merge.method for merge in MERGES)
    what = parser.add_argument_group("what")
    what.add_argument("--only", type=_some_of("group", GROUPS), default=list(GROUPS), metavar="A,B",
                      help="these groups (default: all; below)")  # fmt: skip
    what.add_argument("--methods", type=_some_of("method", methods), default=[], metavar="A,B",
                      help="these methods of the group large (default: all)")  # fmt: skip
    what.add_argument("--size", choices=SIZES, default=SIZE, help=f"of the large models (default: {SIZE})")
    what.add_argument("--quick", action="store_true", help="tiny models, one run: to see that everything works")
    what.add_argument("--mergekit", nargs="?", const="", metavar="FOLDER",
                      help="also run MergeKit, from a virtual environment that is made if need be")  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--runs", type=_count, metavar="N", help="of everything (default: 3)")
    how.add_argument("--peer-runs", type=_count, default=1, metavar="N", help="of peers that take long (default: 1)")
    how.add_argument("--cold", action="store_true", help="drop inputs from the page cache before each run")
    where = parser.add_argument_group("where")
    where.add_argument("--json", type=Path, metavar="FILE", help="write every single run")
    where.add_argument("--write", type=Path, metavar="FILE", help="write the report between its markers in this file")
    where.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "hf_merge_benchmarks"),
                       help="for models, which are used again, and for outputs (default: a temporary one)")  # fmt: skip
    return parser


def _some_of(kind: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a reader of names separated by commas, in the order in which they are known."""

    def read(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"there is no {kind} '{unknown[0]}': choose from {', '.join(known)}")
        return [name for name in known if name in words]

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of runs: 1 or more")
    return int(text)
