"""The licence that a merge may carry, from those of its parents; the facts about licences are in licences.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path

OTHER = "other"


@dataclass(frozen=True)
class Licence:
    """What a licence says that matters to a merge.

    Attributes:
        id: the Hub's.
        name: in full.
        terms: what it asks, as words of licences.toml.
        becomes: other licences that a changed version may carry.
        refuses: licences that a changed version cannot carry.
        asks: what it asks beside its terms, as a sentence.
        place: in the table, laxest first.
    """

    id: str
    name: str = field(compare=False)
    terms: tuple[str, ...] = ("agreement",)
    becomes: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    asks: str = ""
    place: int = -1

    @property
    def word(self) -> str:
        """How sentences call it."""
        return self.id if self.place >= 0 else self.name

    @property
    def binds(self) -> bool:
        """Whether a changed version is bound to it."""
        return not _table().binding.isdisjoint(self.terms)

    @property
    def in_words(self) -> str:
        """Its terms as half a sentence."""
        return "; ".join(_table().words[term] for term in self.terms) or "no conditions"

    def permits(self, other: Licence) -> bool:
        """Tell whether a changed version of what carries this licence may carry another one."""
        if "no-derivatives" in self.terms:
            return False
        if self.id == other.id or other.id in self.becomes:
            return True
        if self.binds or other.id in self.refuses:
            return False
        return other.binds or set(self.terms) <= set(other.terms)


@dataclass(frozen=True)
class Claim:
    """What a card says of its model's licence.

    Attributes:
        id: an id of the Hub or of SPDX, as it stands there.
        name: of a licence that the Hub has no id for (`license: other`).
        link: to its text.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What follows from the licences of the parents.

    Attributes:
        licence: the id for the front matter; `other` if no single id fits, None if that cannot be known.
        name: of the licence, with `other`, if there is one.
        link: to its text, if it is known.
        known: the parents' licences, each once, laxest first.
        unknown: what the parents say that says nothing, each once.
        conflicts: which licences do not go together, as sentences.
    """

    licence: str | None
    name: str | None = None
    link: str | None = None
    known: tuple[Licence, ...] = ()
    unknown: tuple[Claim, ...] = ()
    conflicts: tuple[str, ...] = ()


def strictest(licences: Iterable[Claim | str | None]) -> Verdict:
    """Find the licence that a merge of models with these licences may carry.

    A licence that is missing, unknown or in conflict is never replaced by a guess.

    Args:
        licences: of the parents; None for one that says nothing.
    """
    claims = list(dict.fromkeys(one if isinstance(one, Claim) else Claim(one) for one in licences))
    found = {claim: known(claim) for claim in claims}
    unknown = tuple(claim for claim, licence in found.items() if licence is None)
    parents = sorted({one for one in found.values() if one}, key=lambda one: (one.place, one.id))
    fitting = [one for one in parents if all(parent.permits(one) for parent in parents)]
    conflicts = () if fitting else tuple(_conflicts(parents))
    if unknown or not claims:
        return Verdict(None, known=tuple(parents), unknown=unknown, conflicts=conflicts)
    if not fitting:
        return Verdict(OTHER, known=tuple(parents), conflicts=conflicts)
    chosen = fitting[-1]
    if chosen.place >= 0:
        return Verdict(chosen.id, known=tuple(parents))
    links = {claim.link for claim, licence in found.items() if licence == chosen and claim.link}
    return Verdict(OTHER, chosen.name, links.pop() if len(links) == 1 else None, known=tuple(parents))


def known(claim: Claim) -> Licence | None:
    """Return the licence that a card means; None if it means nothing that can be known.

    A name beside `other` is believed where the licence of that name binds: a permissive one would have its id.
    """
    table = _table()
    word, name = (claim.id or "").strip().lower(), (claim.name or "").strip()
    if word != OTHER:
        return table.licences.get(table.spellings.get(word, word))
    if not name or name.lower() in table.nameless:
        return None
    named = table.licences.get(name.lower())
    return named if named and named.binds else Licence(f"{OTHER}: {name.lower()}", name)


def _conflicts(parents: Sequence[Licence]) -> list[str]:
    """Say which licences allow no merge, and which pairs no licence stands for, of parents that none stands for."""
    closed = [one for one in parents if "no-derivatives" in one.terms]
    told = [f"{one.word} allows no changed version to be passed on, and a merge is one" for one in closed]
    pairs = combinations([one for one in parents if one not in closed], 2)
    apart = [(a, b) for a, b in pairs if not (a.permits(b) or b.permits(a))]
    told += [f"no licence here stands for both {a.word} and {b.word}" for a, b in apart]
    together = f"no licence here stands for all of {', '.join(one.word for one in parents)}"
    return told or ([together] if parents else [])


@dataclass(frozen=True)
class _Table:
    """What licences.toml says."""

    licences: dict[str, Licence]
    spellings: dict[str, str]
    nameless: frozenset[str]
    words: dict[str, str]
    binding: frozenset[str]


@cache
def _table() -> _Table:
    data = tomllib.loads(Path(__file__).with_name("licences.toml").read_text(encoding="utf-8"))
    licences = {
        key: Licence(
            key, facts["name"], tuple(facts["terms"]), tuple(facts.get("becomes", ())),
            tuple(facts.get("refuses", ())), facts.get("asks", ""), place,
        )
        for place, (key, facts) in enumerate(data["licences"].items())
    }  # fmt: skip
    return _Table(
        licences, data["spellings"], frozenset(data["nameless"]), data["terms"], frozenset(data["binding"])
    )  # fmt: skip
