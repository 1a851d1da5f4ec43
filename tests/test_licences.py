"""What a merge may say of its licence, from what its parents say of theirs."""

import itertools

import pytest

from hf_merge.licences import Claim, _table, strictest

QWEN = Claim("other", "qwen", "https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE")
NOTHING = [None, "", "unknown", "other", "cc", "mit or apache", Claim("other", " "), Claim("other", "Custom")]


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["apache-2.0", "llama3.1"], "llama3.1"),
        (["cc-by-nc-4.0", "mit"], "cc-by-nc-4.0"),
        (["apache-2.0", "mit"], "apache-2.0"),
        (["mit", "cc0-1.0"], "mit"),
        (["mit"], "mit"),
        (["Apache-2.0 ", "apache-2.0"], "apache-2.0"),
        (["openrail", "apache-2.0"], "openrail"),
        (["creativeml-openrail-m", "mit"], "creativeml-openrail-m"),
        (["gpl-3.0", "apache-2.0"], "gpl-3.0"),
        (["GPL-3.0-only", "mit"], "gpl-3.0"),
        (["agpl-3.0", "apache-2.0", "gpl-3.0"], "agpl-3.0"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "apache-2.0"], "cc-by-nc-sa-4.0"),
        (["cc-by-sa-3.0", "cc-by-sa-4.0"], "cc-by-sa-4.0"),
        (["gemma", "mit"], "gemma"),
        ([Claim("other", "llama3"), "mit"], "llama3"),
    ],
)
def test_the_licence_of_a_merge_is_that_of_the_parent_that_all_others_permit(licences, expected):
    for order in itertools.permutations(licences):
        verdict = strictest(order)
        assert verdict.licence == expected and not verdict.conflicts and not verdict.unknown


@pytest.mark.parametrize(
    "licences",
    [
        ["cc-by-sa-4.0", "cc-by-nc-4.0"],
        ["llama2", "llama3"],
        ["llama3.1", "gemma"],
        ["llama3.1", "cc-by-nc-4.0"],
        ["gpl-2.0", "apache-2.0"],
        ["gpl-3.0", "openrail"],
        ["agpl-3.0", "cc-by-nc-4.0", "mit"],
        [QWEN, "llama3.1"],
        [QWEN, Claim("other", "yi-license")],
        ["cc-by-nd-4.0"],
        ["cc-by-nc-nd-4.0", "mit"],
    ],
)
def test_licences_in_conflict_are_other_and_named(licences):
    for order in itertools.permutations(licences):
        verdict = strictest(order)
        assert verdict.licence == "other" and verdict.name is verdict.link is None and not verdict.unknown
        bound = [one.word for one in verdict.known if one.binds]
        assert all(any(word in told for told in verdict.conflicts) for word in bound)


@pytest.mark.parametrize(
    "nothing",
    [None, "", "unknown", "other", "cc", "free", "mit or apache", Claim("other", " "), Claim("other", "Custom")],
)
@pytest.mark.parametrize("beside", [[], ["mit"], ["gemma"], ["apache-2.0", "llama3.1"]])
def test_what_is_unknown_stays_unknown_whatever_it_is_beside(nothing, beside):
    verdict = strictest([*beside, nothing])
    assert verdict.licence is None and len(verdict.unknown) == 1
    assert [one.id for one in verdict.known] == beside


def test_no_parents_is_unknown():
    assert strictest([]).licence is None


def test_conflict_of_two_that_a_third_resolves_is_none():
    for more in ([], [None]):
        assert not strictest(["cc-by-nc-3.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-4.0", *more]).conflicts
    assert strictest(["cc-by-nc-3.0", "cc-by-nc-sa-2.0"]).conflicts


def test_conflicts_are_told_beside_what_is_unknown():
    verdict = strictest(["llama2", "llama3", None])
    assert verdict.licence is None and verdict.conflicts and verdict.unknown


def test_a_named_licence_keeps_its_name_and_link_among_permissive_ones():
    verdict = strictest(["apache-2.0", QWEN, "mit"])
    assert (verdict.licence, verdict.name, verdict.link) == ("other", "qwen", QWEN.link)
    elsewhere = strictest([QWEN, Claim("other", "Qwen", "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE")])
    assert (elsewhere.licence, elsewhere.name.lower(), elsewhere.link) == ("other", "qwen", None)


def test_a_permissive_name_beside_other_is_not_believed():
    verdict = strictest([Claim("other", "mit"), "apache-2.0"])
    assert (verdict.licence, verdict.name) == ("other", "mit")


def test_table_refers_to_itself_only():
    table = _table()
    ids = set(table.licences)
    for licence in table.licences.values():
        assert set(licence.terms) <= set(table.words) and licence.in_words
        assert set(licence.becomes) | set(licence.refuses) <= ids
        assert licence.id == licence.id.lower() and not (licence.becomes and not licence.binds)
    assert set(table.spellings.values()) <= ids and table.binding <= set(table.words)
    assert not {"unknown", "other", "cc"} & ids, "these say nothing"


def test_no_pair_of_licences_becomes_laxer():
    """Terms that bind a parent bind the merge, but for the ways that a licence itself opens."""
    table = _table()
    for a, b in itertools.combinations(table.licences.values(), 2):
        verdict = strictest([a.id, b.id])
        if verdict.licence in table.licences:
            merged = table.licences[verdict.licence]
            for parent in (a, b):
                assert merged.id in (parent.id, *parent.becomes) or not parent.binds
            assert {"non-commercial", "use-restricted"}.isdisjoint({*a.terms, *b.terms} - {*merged.terms})
