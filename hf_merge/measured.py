"""Which statistics a plan reads, and where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hf_merge.method import MergeMethod, get_method
from hf_merge.outline import Participant, Target
from hf_merge.planning import TILE, Input, Problem, Step
from hf_merge.types import SourceLike, TensorSpec

_ANY = ""
"""How statistics are called that do not say what they are."""


class MeasuredInputs:
    """The statistics of a plan's models, and what is found on the way through its tensors.

    Args:
        sources: the plan's models, in its order.
    """

    def __init__(self, sources: Sequence[SourceLike]):
        self._sources = sources
        self._none: dict[tuple[int, str, str], None] = {}
        self._lacking: dict[tuple[int, str], list[str]] = {}
        self._misfits: dict[tuple[int, str], list[str]] = {}

    def of(
        self, method: MergeMethod, target: Target, models: Sequence[Participant]
    ) -> dict[str, tuple[Input, ...]] | None:
        """Find what a method needs of a tensor; None if no model has it, so that the tensor is averaged."""
        names = [target.name_in(one) for one in models]
        found: dict[str, tuple[Input, ...]] = {}
        for statistic, kind in method.statistics.items():
            having = [
                name in self._specs(one.place, statistic, method) for one, name in zip(models, names, strict=True)
            ]
            if not any(having):
                return None
            for one, name, has in zip(models, names, having, strict=True):
                spec = self._specs(one.place, statistic, method).get(name)
                if not has or spec is None:
                    self._lacking.setdefault((one.place, statistic), []).append(target.name)
                elif not kind.fits(target.spec.shape, spec.shape):
                    self._misfits.setdefault((one.place, statistic), []).append(target.name)
            found[statistic] = tuple(Input(one.place, name) for one, name in zip(models, names, strict=True))
        return found

    def _specs(self, place: int, statistic: str, method: MergeMethod) -> Mapping[str, TensorSpec]:
        """Return the shapes of a model's statistics of a kind."""
        said = self._sources[place].statistics_specs
        if statistic not in said and _ANY not in said:
            self._none[place, statistic, method.name] = None
            return {}
        return said[statistic if statistic in said else _ANY]

    def _spec(self, one: Input, statistic: str) -> TensorSpec | None:
        said = self._sources[one.model].statistics_specs
        return said.get(statistic, said.get(_ANY, {})).get(one.name)

    def bytes_of(self, step: Step) -> int:
        """Return how many bytes of statistics a step reads."""
        specs = [self._spec(one, what) for what, each in step.measured.items() for one in each]
        return sum(spec.nbytes for spec in specs if spec)

    def memory(self, step: Step) -> int:
        """Estimate what a step needs for statistics: tiles of them, or the matrices with their sum in float64."""
        if not step.measured:
            return 0
        tiled = get_method(str(step.method)).tiled(step.settings)
        specs = [self._spec(one, what) for what, each in step.measured.items() for one in each]
        sizes = [min(spec.numel, TILE) if tiled else spec.numel for spec in specs if spec]
        return sum(sizes) * (4 if tiled else 12) + (0 if tiled else 32 * max(sizes, default=0))

    def problems(self) -> Iterator[Problem]:
        """Yield all that was found."""
        for source in self._sources:
            yield from (Problem("error", doubt) for doubt in source.doubts)
        for place, statistic, method in self._none:
            found = ", ".join(self._sources[place].statistics_specs) or "none"
            yield Problem(
                "error",
                f"'{method}' needs the statistics '{statistic}' of '{self._sources[place].label}', which has {found}: "
                f"measure them (`hf-merge measure MODEL DATA OUTPUT --what {statistic}`) and name the file under "
                "statistics:.",
            )
        without = {(place, statistic) for place, statistic, _ in self._none}
        for (place, statistic), names in self._lacking.items():
            if (place, statistic) not in without:
                told = (
                    f"'{self._sources[place].label}' has no '{statistic}' for tensors for which other models have it: "
                )
                yield Problem("error", f"{told}measure all models in the same way.", tuple(names))
        for (place, statistic), names in self._misfits.items():
            told = f"The '{statistic}' of '{self._sources[place].label}' has shapes that do not fit its tensors: "
            yield Problem("error", f"{told}measure it on this model.", tuple(names))
