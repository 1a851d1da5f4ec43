"""Plan -> writer: the part of this process, with what is fetched and a progress bar for all."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Lock
from time import monotonic

from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_merge import progress
from hf_merge.adapters.writer import AdapterWriter
from hf_merge.execute import execute
from hf_merge.experts.files import ExpertsWriter
from hf_merge.fetch import check_assumed, fetching, remote_reads
from hf_merge.planning import Plan
from hf_merge.progress import Progress
from hf_merge.ranks import Team
from hf_merge.sources import Source
from hf_merge.writer import Writer

_SHOWN_EVERY = 0.1
"""Seconds after which the bar is drawn again; a listener hears of every piece."""


def run(made: Plan, sources: Sequence[Source], writer: Writer | AdapterWriter | ExpertsWriter, team: Team) -> None:
    """Execute this process's part of the plan into the writer, with a progress bar for all.

    The leader tells `progress.current()` how far all are; what that raises ends the merge as Ctrl-C does.
    """
    bar = tqdm(total=made.bytes_written, unit="B", unit_scale=True, desc="Merging", name="hf_merge.merge")
    finished = writer.sizes_before()
    before, one_at_a_time, stop = (sum(finished), len(finished)), Lock(), Event()
    report = progress.current() if team.leads else progress.SILENT
    last, next_show = "", 0.0

    def write(name: str, start: int, values: Tensor) -> None:
        team.check()
        writer.write(name, start, values)
        with one_at_a_time:
            team.advance(values.nbytes, start + values.numel() == made.specs[name].numel)
            if report.listener is not None or monotonic() >= next_show:
                show(name)

    def show(name: str = "") -> None:
        nonlocal last, next_show
        last, next_show = name or last, monotonic() + _SHOWN_EVERY
        size, tensors = (sum(pair) for pair in zip(team.progress(), before, strict=True))
        size = min(size, made.bytes_written)
        bar.set_postfix_str(f"{tensors}/{len(made.specs)} tensors", refresh=False)
        bar.update(max(size - bar.n, 0))
        report.tell(Progress("merging", last, tensors, len(made.specs), size, made.bytes_written))

    def look() -> None:
        with one_at_a_time:
            show()

    def give_up() -> None:
        stop.set()
        writer.stop()

    team.on_failure(give_up)
    reads = remote_reads(made, sources, writer.is_finished, assumed=team.leads)
    one_by_one = bool(reads) or writer.carrier is not None or isinstance(writer, AdapterWriter)
    with bar, fetching(reads, stop):
        look()
        execute(made, sources, write, skip=writer.is_finished, stopped=give_up, meanwhile=look, in_order=one_by_one)
        if team.leads:
            check_assumed(sources)
        team.barrier("written", meanwhile=look)
        bar.set_postfix_str(f"{len(made.specs)}/{len(made.specs)} tensors", refresh=False)
        bar.update(made.bytes_written - bar.n)
        report.tell(Progress("merging", last, len(made.specs), len(made.specs), made.bytes_written, made.bytes_written))
