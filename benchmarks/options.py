"""What the benchmark is asked to do: which groups, at which size, how often, beside which peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.checkpoints import SIZES, checkpoints, llama_config, llama_shapes

SIZE = "1.1B"
"""The size of the checkpoint that the goals are for."""


@dataclass(frozen=True)
class Sizes:
    """How large the synthetic checkpoints are.

    Attributes:
        llama: hidden width and layers of the large checkpoint.
        tiny: tensors of the checkpoint of tiny ones, at most.
        experts: layers of the mixture of tiny experts, and experts in each.
        vit: hidden width and layers of the many small models.
        many: how many of these are merged, rising.
        many_methods: by which methods; None: all that the group has.
        rows: of an embedding in another vocabulary.
        rank: of an adapter that is extracted.
        widths: of the modules whose adapters are merged.
        processes: that share a merge.
    """

    llama: tuple[int, int]
    tiny: int = 5000
    experts: tuple[int, int] = (48, 128)
    vit: tuple[int, int] = (768, 12)
    many: tuple[int, ...] = (8, 30)
    many_methods: tuple[str, ...] | None = None
    rows: int = 151_000
    rank: int = 32
    widths: tuple[int, ...] = (2048, 4096)
    processes: int = 2


QUICK = Sizes(
    llama=(64, 1), tiny=48, experts=(4, 2), vit=(64, 1), many=(2,), many_methods=("fr",), rows=500, rank=4,
    widths=(128,),
)  # fmt: skip
"""So small that only starting takes time."""


def sizes_of(name: str) -> Sizes:
    """Return the sizes that go with a name of `checkpoints.SIZES`."""
    return Sizes(llama=SIZES[name])


@dataclass(frozen=True)
class Options:
    """What the benchmark is asked to do.

    Attributes:
        folder: for checkpoints, which later calls use again, and for outputs.
        sizes: of the synthetic checkpoints.
        groups: names of groups, in the order of the report.
        methods: those of the group `large`; empty: all.
        runs: of every case.
        peer_runs: of the peers that take long.
        mergekit: the folder of MergeKit's virtual environment; None: without MergeKit.
        cold: drop the inputs from the page cache before every run.
    """

    folder: Path
    sizes: Sizes = field(default_factory=lambda: sizes_of(SIZE))
    groups: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    runs: int = 3
    peer_runs: int = 1
    mergekit: Path | None = None
    cold: bool = False

    def llamas(self) -> list[Path]:
        """Return the folders of the large base and of two fine-tunes of it, made if they are not there."""
        hidden, layers = self.sizes.llama
        return llama_folders(self.folder, hidden, layers)


def llama_folders(folder: Path, hidden: int, layers: int, models: int = 2) -> list[Path]:
    """Return the folders of a Llama and of fine-tunes of it, which are made if they are not there."""
    shapes, config = llama_shapes(hidden, layers), llama_config(hidden, layers)
    return checkpoints(folder / f"llama-{hidden}x{layers}", shapes, models, config)
