"""Which row of which model stands for which token: index arrays, no values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_merge.sources import Source
from hf_merge.sources.reindexed import Borrowed, Rows
from hf_merge.tokenization.options import ModelToken, TokenOptions, ZeroRow
from hf_merge.types import Ref

_ZERO, _MEAN = -1, -2


@dataclass(frozen=True)
class Table:
    """A tensor with a row for each token, as one model has it.

    Attributes:
        source: the model.
        name: of the tensor there.
        count: its rows.
    """

    source: Source
    name: str
    count: int


@dataclass(frozen=True)
class Layout:
    """Where the rows of one tensor come from, in every model.

    Attributes:
        rows: for each model that has the tensor, by place.
        count: rows of the result.
        zeros: tokens that no model has a row for.
        absent: tokens whose row was asked for from a model that lacks it, with that model's place.
    """

    rows: Mapping[int, Rows]
    count: int
    zeros: tuple[str, ...]
    absent: tuple[tuple[str, int], ...]


class Alignment:
    """The vocabularies of all models beside that of the result.

    Args:
        target: tokens of the result with their ids.
        vocabularies: tokens of every model with their ids.
        models: the models, in the same order.
        base: place of the base model, if there is one.
        reference: place of the model that the tokenizer comes from, if it is one of them.
        donor: place of the model that the config comes from.
        tokens: what is said of single tokens.
        multiple: round the number of rows up to a multiple of this; None keeps the padding that there is.
    """

    def __init__(
        self, target: Mapping[str, int], vocabularies: Sequence[Mapping[str, int]], models: Sequence[Ref], *,
        base: int | None, reference: int | None, donor: int, tokens: Mapping[str, TokenOptions], multiple: int | None,
    ):  # fmt: skip
        self.target, self.vocabularies, self.models = target, vocabularies, list(models)
        self.base, self.reference, self.donor, self.multiple = base, reference, donor, multiple
        self.asked = {target[token]: (token, options) for token, options in tokens.items() if token in target}
        new = torch.tensor(list(target.values()), dtype=torch.int64)
        size = max(target.values(), default=-1) + 1
        self.is_token = torch.zeros(size, dtype=torch.bool)
        self.is_token[new] = True
        self.own = torch.full((len(vocabularies), size), -1)
        for own, vocabulary in zip(self.own, vocabularies, strict=True):
            own[new] = torch.tensor([vocabulary.get(token, -1) for token in target], dtype=torch.int64)

    def layout(self, tables: Sequence[Table | None], holders: Sequence[int]) -> Layout:
        """Decide the rows of one tensor.

        Args:
            tables: the tensor in every model; None where a model has none, not even one tied to it.
            holders: places of the models that get a tensor of this name.
        """
        counts = torch.tensor([table.count if table else 0 for table in tables])
        has = (self.own >= 0) & (self.own < counts[:, None])
        origin, row = self._defaults(has)
        absent = self._ask(origin, row, [table.count if table else 0 for table in tables])
        wanted = has.any(0)
        wanted[list(self.asked)] = True
        count = self._count(wanted, tables)
        forced = torch.zeros(self.own.shape[1], dtype=torch.bool)
        forced[[i for i, (_, options) in self.asked.items() if options.force]] = True
        rows = {place: self._rows(place, tables, has, forced, origin, row, count) for place in holders}
        told = {i for i, (_, options) in self.asked.items() if options.source is not None}
        nobody = set((~has.any(0)).nonzero().flatten().tolist()) - told
        zeros = tuple(token for token, i in self.target.items() if i in nobody and i < count) if nobody else ()
        return Layout(rows, count, zeros, absent)

    def _defaults(self, has: Tensor) -> tuple[Tensor, Tensor]:
        """For every id the place of the model whose row a model gets that lacks the token, and the row there."""
        holders = has.sum(0)
        origin = torch.where(holders == 0, _ZERO, torch.where(holders == 1, has.int().argmax(0), _MEAN))
        if self.base is not None:
            origin[has[self.base]] = self.base
        return origin, self.own.gather(0, origin.clamp(min=0)[None])[0]

    def _ask(self, origin: Tensor, row: Tensor, counts: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Let what the recipe says of single tokens take the place of the defaults."""
        absent = []
        for i, (token, options) in self.asked.items():
            source = options.source
            if source is None:
                continue
            if isinstance(source, ZeroRow):
                origin[i] = _ZERO
                continue
            place, found = self._row_of(token, source)
            origin[i], row[i] = place, found
            if not 0 <= found < counts[place]:
                origin[i] = _ZERO
                absent.append((token, place))
        return tuple(absent)

    def _row_of(self, token: str, source: Ref | ModelToken) -> tuple[int, int]:
        model = source.model if isinstance(source, ModelToken) else source
        place = self.models.index(model)
        if isinstance(source, ModelToken) and source.token_id is not None:
            return place, source.token_id
        text = source.token if isinstance(source, ModelToken) and source.token is not None else token
        return place, self.vocabularies[place].get(text, -1)

    def _count(self, wanted: Tensor, tables: Sequence[Table | None]) -> int:
        """Return the rows of the result: those of all tokens, and the padding of reference and donor."""
        known = wanted.nonzero()
        needed = int(known.max()) + 1 if len(known) else 0
        if self.multiple is not None:
            return -(-needed // self.multiple) * self.multiple
        counts = [table.count if table else 0 for table in tables]
        padded = counts[self.donor] > max(self.vocabularies[self.donor].values(), default=-1) + 1
        kept = [] if self.reference is None else [counts[self.reference]]
        return max(needed, *kept, counts[self.donor] if padded else 0)

    def _rows(
        self, place: int, tables: Sequence[Table | None], has: Tensor, forced: Tensor, origin: Tensor, row: Tensor,
        count: int,
    ) -> Rows:  # fmt: skip
        """Say for one model where every row of its tensor comes from."""
        table = tables[place]
        size = min(count, self.own.shape[1])
        kept = (has[place] & ~forced)[:size]
        lacking = self.is_token[:size] & ~kept
        from_self = lacking & (origin[:size] == place)
        own = torch.full((count,), -1)
        own[:size] = torch.where(kept, self.own[place][:size], torch.where(from_self, row[:size], -1))
        borrowed, shared = [], []
        for other, theirs in enumerate(tables):
            if theirs is None:
                continue
            if other != place and len(to := (lacking & (origin[:size] == other)).nonzero().flatten()):
                borrowed.append(Borrowed(theirs.source, theirs.name, to, row[to]))
            mean = lacking & (origin[:size] == _MEAN) & has[other][:size]
            if len(to := mean.nonzero().flatten()):
                shared.append(Borrowed(theirs.source, theirs.name, to, self.own[other][to]))
        padding, real = self._padding(place, own, table.count if table else 0)
        return Rows(own, tuple(borrowed), tuple(shared), padding, real)

    def _padding(self, place: int, own: Tensor, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Keep a model's own padding rows where the result has padding; the others are to be the mean of its rows."""
        free = torch.ones(len(own), dtype=torch.bool)
        free[: len(self.is_token)] = ~self.is_token[: len(own)]
        if not free.any():
            return None, None
        used = torch.tensor(list(self.vocabularies[place].values()), dtype=torch.int64)
        used = used[used < count]
        stays = free.clone()
        stays[used[used < len(own)]] = False
        stays[count:] = False
        own[stays] = torch.arange(len(own))[stays]
        return (free & ~stays).nonzero().flatten(), used
