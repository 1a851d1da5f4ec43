"""What a merge inherits from its models beside weights: licence, languages, datasets, and what they were made from.

All of it is what the models' cards say. A part is a model or an adapter, with the name that it goes by in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from hf_merge.licences import OTHER, Claim, Licence, Verdict, known, strictest
from hf_merge.planning import Problem
from hf_merge.sources import Source

Part: TypeAlias = tuple[str, Source]
_MERGES = {"merge", "mergekit", "hf_merge"}


def parts_of(sources: Sequence[Source]) -> list[Part]:
    """List the models and adapters that sources are made of, each once, by their labels."""
    parts = {id(part): part for source in sources for part in source.parts}
    return [(f"'{part.label}'", part) for part in parts.values()]


def claims(part: Source) -> list[Claim]:
    """Return what a model's card says of its licence; several licences all count."""
    card = part.card_data
    if card is None or not card.license:
        return [Claim()]
    return [Claim(one, card.license_name, card.license_link) if one == OTHER else Claim(one) for one in card.license]


def licence_of(parts: Sequence[Part]) -> Verdict:
    """Return the licence that a merge of these parts may carry."""
    return strictest(claim for _, part in parts for claim in claims(part))


def inherited(parts: Sequence[Part], key: str) -> list[str] | None:
    """Return the union of a list that the cards have, such as `language` or `datasets`."""
    cards = [part.card_data for _, part in parts]
    return list(dict.fromkeys(one for card in cards if card for one in card.get(key) or ())) or None


def made_from(part: Source) -> list[str]:
    """Return the ids of the models that a merge was made from, by its card; nothing if it is no merge."""
    card = part.card_data
    if card is None or not card.base_model:
        return []
    is_merge = card.get("base_model_relation") == "merge" or not _MERGES.isdisjoint(card.tags or ())
    return [one for one in card.base_model if one != part.public_id] if is_merge else []


def base_models(parts: Sequence[Part]) -> list[str] | None:
    """Return the ids of the models on the Hub; a merge that is not there stands for those it was made from."""
    ids = [[part.public_id] if part.public_id else made_from(part) for _, part in parts]
    return list(dict.fromkeys(one for each in ids for one in each)) or None


def licence_column(part: Source) -> str:
    """Return what a table says of a model's licence."""
    said = []
    for claim in claims(part):
        if claim.id is None:
            said.append("unknown")
        elif known(claim) is None:
            said.append(f"unknown (`{claim.id}`)")
        elif claim.id == OTHER:
            said.append(f"[{claim.name}]({claim.link})" if claim.link else f"`{claim.name}`")
        else:
            said.append(f"`{claim.id}`")
    return ", ".join(said)


def licence_in_words(parts: Sequence[Part], verdict: Verdict) -> list[str]:
    """Say what the licences of the parts are, and what follows."""
    told = [_terms(licence, _holders(parts, licence)) for licence in verdict.known]
    unknown: dict[str, list[str]] = {}
    for name, _, reason in _unknown(parts):
        unknown.setdefault(reason, []).append(name)
    told += [f"Unknown licence of {', '.join(names)}: {reason}." for reason, names in unknown.items()]
    told += [f"In conflict: {conflict}." for conflict in verdict.conflicts]
    if verdict.licence is None:
        told.append("So the licence of this merge is unknown, and this card names none: ask before you pass it on.")
    elif verdict.conflicts:
        told.append("So this card says `other`. Whether and how the merge may be passed on, their owners say.")
    else:
        carried = f"`{verdict.licence}`" if verdict.licence != OTHER else f"`{verdict.name}`"
        told.append(f"So this merge carries {carried}, and the conditions of all of them go with it.")
    return told


def licence_in_a_sentence(parts: Sequence[Part]) -> str:
    """Say which licence a merge of these parts may carry, or why that is not known."""
    verdict = licence_of(parts)
    if verdict.conflicts:
        return f"The licences do not go together: {'; '.join(verdict.conflicts)}."
    if verdict.licence is None:
        reasons: dict[str, list[str]] = {}
        for name, _, reason in _unknown(parts):
            reasons.setdefault(reason, []).append(name)
        told = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
        return f"The licence of the result is not known. {'; '.join(told)}".rstrip() + "." * bool(told)
    shown = verdict.licence if verdict.licence != OTHER else verdict.name
    laxer = [one.word for one in verdict.known if one.word != shown]
    beside = f", the strictest: others carry {', '.join(laxer)}" if laxer else ", as all of its models do"
    return f"The result carries {shown}{beside}."


def licence_problems(parts: Sequence[Part]) -> Iterator[Problem]:
    """Warn of licences in conflict, and of unknown ones of models that are public or whose card names one.

    One's own folders without a card are nobody else's business, and where no model has a card none can be read.
    """
    if all(part.card_data is None for _, part in parts):
        return
    for conflict in licence_of(parts).conflicts:
        yield Problem(
            "warning",
            f"The licences of the models do not go together: {conflict}. "
            "The merge's card will say so: read them before you publish it.",
        )
    for name, part, reason in _unknown(parts):
        if part.public_id or claims(part) != [Claim()]:
            yield Problem(
                "warning",
                f"The licence of {name} is unknown: {reason}. The merge's card will name none: "
                "find it out before you publish it.",
            )


def _terms(licence: Licence, holders: str) -> str:
    if licence.place < 0:
        return f"{holders}: `{licence.name}`, a licence of its own. Its terms are not known here: read them."
    asks = f" {licence.asks}" if licence.asks else ""
    return f"{holders}: `{licence.id}`, {licence.name} ({licence.in_words}).{asks}"


def _holders(parts: Sequence[Part], licence: Licence) -> str:
    names = [name for name, part in parts if any(known(claim) == licence for claim in claims(part))]
    return ", ".join(dict.fromkeys(names))


def _unknown(parts: Sequence[Part]) -> Iterator[tuple[str, Source, str]]:
    """Yield the parts whose licence is not known, and why."""
    for name, part in parts:
        for claim in claims(part):
            if known(claim) is None:
                yield name, part, _reason(part, claim)


def _reason(part: Source, claim: Claim) -> str:
    if part.card_data is None:
        return "no card says anything of it"
    if claim.id is None:
        return "the card names none"
    if claim.id == OTHER:
        return "the card says `other`, and no name that tells which"
    return f"the card says `{claim.id}`, which stands for no licence"
