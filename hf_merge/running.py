"""Plan -> writer: the part of this process, with what is fetched and a progress bar for all."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Event, Lock

from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_merge.adapters.writer import AdapterWriter
from hf_merge.execute import execute
from hf_merge.fetch import check_assumed, fetching, remote_reads
from hf_merge.planning import Plan
from hf_merge.ranks import Team
from hf_merge.sources import Source
from hf_merge.writer import Writer


def run(made: Plan, sources: Sequence[Source], writer: Writer | AdapterWriter, team: Team) -> None:
    """Execute this process's part of the plan into the writer, with a progress bar for all."""
    bar = tqdm(total=made.bytes_written, unit="B", unit_scale=True, desc="Merging", name="hf_merge.merge")
    finished, one_at_a_time, stop = writer.sizes_before(), Lock(), Event()

    def write(name: str, start: int, values: Tensor) -> None:
        team.check()
        writer.write(name, start, values)
        with one_at_a_time:
            team.advance(values.nbytes, start + values.numel() == made.specs[name].numel)
            show()

    def show() -> None:
        size, tensors = team.progress()
        bar.set_postfix_str(f"{len(finished) + tensors}/{len(made.steps)} tensors", refresh=False)
        bar.update(max(sum(finished) + size - bar.n, 0))

    def give_up() -> None:
        stop.set()
        writer.stop()

    team.on_failure(give_up)
    reads = remote_reads(made, sources, writer.is_finished, assumed=team.leads)
    one_by_one = bool(reads) or writer.carrier is not None or isinstance(writer, AdapterWriter)
    with bar, fetching(reads, stop):
        show()
        execute(made, sources, write, skip=writer.is_finished, stopped=give_up, in_order=one_by_one)
        if team.leads:
            check_assumed(sources)
        team.barrier("written", meanwhile=show)
        bar.set_postfix_str(f"{len(made.steps)}/{len(made.steps)} tensors", refresh=False)
        bar.update(made.bytes_written - bar.n)
