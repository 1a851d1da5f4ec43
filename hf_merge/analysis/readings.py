"""Tables in words: how to read each, and what its numbers say of these models."""

from __future__ import annotations

from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_merge.analysis.found import Analysis, Row

ALIKE, RELATED, OPPOSED = 0.6, 0.2, -0.2
"""Cosines from which on models change the same, or something of the same; and below which they undo each other."""

UNEVEN, OUTWEIGHING = 1.5, 3.0
"""How many times as much one model changes as another where that is worth a word, and where little is left of that."""

AGREE, DISAGREE = 0.35, 0.55
"""Shares of conflicts below which models mostly agree, and above which they mostly do not; chance gives 0.5."""

GROWN, SHRUNK = 1.25, 0.8
"""How much longer or shorter than its parents a layer of a result may be before it is worth a look."""


def read(found: Analysis) -> dict[str, str]:
    """Put every table of an analysis into words.

    Args:
        found: the analysis.
    """
    words = {
        "similarity": _similarity(found), "distances": _distances(found), "change": _change(found),
        "conflicts": _conflicts(found), "norms": _norms(found),
    }  # fmt: skip
    note = f" Estimated from at most {found.sample:,} entries of each tensor." if found.sample is not None else ""
    return {name: f"{words[name]}{note}" for name in found.tables if words[name]}


def _pairs(found: Analysis) -> list[tuple[float, str, str]]:
    """List the pairs of parents by their number, the smallest first."""
    matrix = found.similarity or found.distances
    assert matrix is not None
    values = {(a, b): value for a, row in zip(matrix.models, matrix.values, strict=True)
              for b, value in zip(matrix.models, row, strict=True)}  # fmt: skip
    pairs = ((values[pair], *pair) for pair in combinations(found.models, 2))
    return sorted((value, a, b) for value, a, b in pairs if value is not None)


def _similarity(found: Analysis) -> str:
    how = "1 means the same change of the base, 0 unrelated ones, -1 opposite ones"
    still = [name for name, row in zip(found.models, found.similarity.values if found.similarity else (), strict=False)
             if all(value is None for value in row)]  # fmt: skip
    told = [f"{', '.join(still)} changed nothing"] if still else []
    pairs = _pairs(found)
    if pairs:
        told.append(_of_pairs(pairs))
    elif not still:
        told.append(f"{next(iter(found.models))} is alone, so there is nothing to compare it with")
    return f"{how}: {'; '.join(told)}.{_kept(found)}"


def _of_pairs(pairs: list[tuple[float, str, str]]) -> str:
    (low, a, b), (high, c, d) = pairs[0], pairs[-1]
    if len(pairs) == 1:
        return f"{a} and {b} {_overlap(low)}"
    if low > OPPOSED and high < RELATED:
        return (f"all {len(pairs)} pairs barely overlap (at most {_two(high)}, {c} and {d}), "
                "so adding their changes is safe")  # fmt: skip
    if low >= ALIKE:
        return f"all pairs change much the same (at least {_two(low)}, {a} and {b}): average them rather than add them"
    return f"closest are {c} and {d}: they {_overlap(high)}; furthest apart {a} and {b}: they {_overlap(low)}"


def _overlap(cosine: float) -> str:
    """Say what a cosine of two changes means for a merge."""
    if cosine >= ALIKE:
        return f"change much the same ({_two(cosine)}): average them, as adding both would count it twice"
    if cosine >= RELATED:
        return f"share a part of their changes ({_two(cosine)}): what they share is counted twice where both are added"
    if cosine > OPPOSED:
        return f"barely overlap ({_two(cosine)}): adding both is safe"
    return f"pull in opposite directions ({_two(cosine)}): adding both undoes a part of each"


def _kept(found: Analysis) -> str:
    """Say how near the result's change is to that of each parent."""
    matrix = found.similarity
    if matrix is None or found.merged is None:
        return ""
    values = dict(zip(matrix.models, matrix.values[matrix.models.index(found.merged)], strict=True))
    near = {name: value for name in found.models if (value := values[name]) is not None}
    if not near:
        return f" {found.merged} did not change the base in a direction that can be compared."
    first, last = max(near, key=lambda name: near[name]), min(near, key=lambda name: near[name])
    if first == last:
        return f" {found.merged} follows {first} ({_two(near[first])})."
    return f" {found.merged} follows {first} most ({_two(near[first])}) and {last} least ({_two(near[last])})."


def _distances(found: Analysis) -> str:
    how = ("No base was named, so that models are compared with each other: 0 means the same weights, 1.4 unrelated "
           "ones")  # fmt: skip
    pairs = _pairs(found) if found.distances else []
    if not pairs:
        return f"{how}."
    (low, a, b), (high, c, d) = pairs[0], pairs[-1]
    told = (f"{a} and {b} are {low:.3f} apart" if len(pairs) == 1 else
            f"nearest are {a} and {b} ({low:.3f}), furthest apart {c} and {d} ({high:.3f})")  # fmt: skip
    if high == 0:
        end = "they are the same"
    elif high < 0.5:
        end = "they come from one model, as averages need"
    else:
        end = "that is far for fine-tunes of one model, and an average of models that are not will be none of them"
    return f"{how}: {told}; {end}. Name the base to see what each of them changed."


def _change(found: Analysis) -> str:
    how = ("How far each model went, in per cent of the length of the base's weights" if found.base
           else "How far each model is from the mean of all, in per cent of the length of that")  # fmt: skip
    totals = {name: found.totals[name] for name in found.models if name in found.totals}
    if not totals:
        return f"{how}."
    least, *_, most = [*sorted(totals, key=lambda name: totals[name]), *([] if len(totals) > 1 else totals)]
    told = f"{most} changed {_percent(totals[most])}"
    peak = max((row for row in found.change if row["model"] == most and row["relative"] is not None),
               key=lambda row: row["relative"], default=None)  # fmt: skip
    if peak and totals[most]:
        told += f", most of all in {_where(peak)} ({_percent(peak['relative'])})"
    if len(totals) > 1:
        told += f", and {least} {_percent(totals[least])}"
    if len(totals) > 1 and found.base:
        told += f": {_balance(most, totals[most], least, totals[least])}"
    own = found.totals.get(found.merged or "")
    told += "" if own is None else f"; {found.merged} changed {_percent(own)}"
    return f"{how}: {told}."


def _balance(most: str, high: float, least: str, low: float) -> str:
    """Say what changes of different size mean for the weights of a merge."""
    if not low:
        return f"{least} adds nothing"
    if high >= OUTWEIGHING * low:
        return f"with equal weights little is left of {least}"
    if high >= UNEVEN * low:
        return f"with equal weights {most} counts {high / low:.1f} times as much"
    return "they are of like size, so that equal weights are a fair start"


def _conflicts(found: Analysis) -> str:
    how = "Of the pairs of models that both change a weight, the share that pull it apart; chance gives 0.5"
    share = found.totals.get("conflicts")
    if share is None:
        return f"{how}: no two models change the same weight."
    peak = max((row for row in found.conflicts if row["share"] is not None), key=lambda row: row["share"])
    if share < AGREE:
        end = "the models mostly agree, and what they add up to is what they mean"
    elif share <= DISAGREE:
        end = (
            "as unrelated models do; where that hurts, methods that elect a sign (ties, dare_ties, della) keep one side"
        )
    else:
        end = "more than chance: the models undo each other, so elect a sign (ties), or leave one of them out"
    return f"{how}: {share:.2f} over the whole model, at most {peak['share']:.2f} in {_where(peak)}: {end}."


def _norms(found: Analysis) -> str:
    how = "The length of all weights of a layer: a result should be about as long as its parents"
    if found.merged is None:
        return f"{how}; there is no result here to compare with them."
    ratios = {layer: value for layer, value in norm_ratios(found).items() if value is not None}
    if not ratios:
        return f"{how}; {found.merged} has no layer in common with them."
    low, high = min(ratios, key=lambda layer: ratios[layer]), max(ratios, key=lambda layer: ratios[layer])
    between = f"{found.merged} has {_span(ratios[low], ratios[high])} times their median length"
    if ratios[high] > GROWN:
        end = f"it blew up in {_layer(high)} ({ratios[high]:.2f} times): lower the weights, or lambda"
    elif ratios[low] < SHRUNK:
        end = f"it shrank in {_layer(low)} ({ratios[low]:.2f} times): models may have cancelled each other there"
    else:
        end = "nothing blew up, and nothing shrank"
    return f"{how}: {between} in its layers; {end}."


def norm_ratios(found: Analysis) -> dict[str, float | None]:
    """Return for each layer the result's norm / the median of its parents' norms."""
    by_layer: dict[str, dict[str, float]] = {}
    for row in found.norms:
        by_layer.setdefault(row["layer"], {})[row["name"]] = row["norm"]
    ratios: dict[str, float | None] = {}
    for layer, norms in by_layer.items():
        middle = median(norms[name] for name in found.models)
        own = norms.get(found.merged or "")
        ratios[layer] = own / middle if own and middle else None
    return ratios


def _two(value: float) -> str:
    """Write two digits; what rounds to nothing has no sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def _span(low: float, high: float) -> str:
    first, last = f"{low:.2f}", f"{high:.2f}"
    return first if first == last else f"{first} to {last}"


def _where(row: Row) -> str:
    """Say where a row is of: `the mlp of layer 3`, `the embeddings`."""
    part = {"mlp": "MLP", "norm": "norms", "other": "other weights"}.get(row["part"], row["part"])
    return f"the {part}" if row["layer"] == "outside" else f"the {part} of {_layer(row['layer'])}"


def _layer(layer: str) -> str:
    return "what is outside of layers" if layer == "outside" else f"layer {layer}"


def _percent(share: float) -> str:
    """Write a share with three digits: `0.012 %`, `2.13 %`."""
    return f"{100 * share:.3g} %"
