"""Rows against a reference that goes through them one by one, in double precision."""

import random

import pytest
import torch

from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.reindexed import Reindexed
from hf_merge.tokenization.options import ModelToken, TokenOptions, ZeroRow
from hf_merge.types import InMemory
from hf_merge.vocabulary.rows import Alignment, Table

NAME = "embed_tokens.weight"


def reference(target, vocabularies, tensors, base, tokens, count):
    """The rules of docs/tokenizers.md, read aloud: a list of rows for each model."""
    merged = []
    for me, mine in enumerate(vocabularies):
        by_id = {i: token for token, i in target.items()}
        real = [tensors[me][i] for i in mine.values() if i < len(tensors[me])]
        mean = torch.stack(real).mean(0) if real else torch.zeros_like(tensors[me][0])
        taken = set(mine.values())
        rows = []
        for i in range(count):
            if i not in by_id:
                rows.append(tensors[me][i] if i < len(tensors[me]) and i not in taken else mean)
                continue
            token = by_id[i]
            options = tokens.get(token, TokenOptions())
            has = [k for k, v in enumerate(vocabularies) if token in v and v[token] < len(tensors[k])]
            if me in has and not options.force:
                rows.append(tensors[me][mine[token]])
            elif options.source is not None:
                rows.append(asked_row(options.source, token, vocabularies, tensors))
            elif len(has) == 0:
                rows.append(torch.zeros_like(tensors[me][0]))
            elif base in has:
                rows.append(tensors[base][vocabularies[base][token]])
            else:
                rows.append(torch.stack([tensors[k][vocabularies[k][token]] for k in has]).mean(0))
        merged.append(torch.stack(rows))
    return merged


def asked_row(source, token, vocabularies, tensors):
    if isinstance(source, ZeroRow):
        return torch.zeros_like(tensors[0][0])
    if isinstance(source, ModelToken):
        place = source.model.value["place"]
        return tensors[place][source.token_id if source.token is None else vocabularies[place][source.token]]
    return tensors[source.value["place"]][vocabularies[source.value["place"]][token]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("base", [None, 0, 2])
def test_every_row_of_random_vocabularies(seed, base):
    chance = random.Random(seed)
    words = [f"t{i}" for i in range(60)]
    models = [InMemory({"place": place}, f"model {place}") for place in range(4)]
    vocabularies, tensors = [], []
    for place in range(4):
        mine = chance.sample(words, chance.randint(20, 50))
        vocabularies.append({token: i for i, token in enumerate(mine)})
        rows = len(mine) + chance.choice([-3, 0, 0, 8])  # too few, as many, padded
        tensors.append(torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(place + seed)))
    target = {token: i for i, token in enumerate(dict.fromkeys(token for v in vocabularies for token in v))}
    some = chance.sample(sorted(vocabularies[1].keys() & target.keys()), 6)
    known = [t for t, i in vocabularies[1].items() if i < len(tensors[1])]
    tokens = {
        some[0]: TokenOptions(source=ZeroRow()),
        some[1]: TokenOptions(source=ZeroRow(), force=True),
        some[2]: TokenOptions(source=ModelToken(models[3], token_id=2), force=True),
        some[3]: TokenOptions(source=ModelToken(models[1], token=known[4])),
        known[5]: TokenOptions(source=models[1], force=True),
        some[4]: TokenOptions(force=True),
    }
    sources = [MappingSource({NAME: tensor}, f"model {i}") for i, tensor in enumerate(tensors)]
    alignment = Alignment(
        target, vocabularies, models, base=base, reference=0, donor=0, tokens=tokens, multiple=None
    )  # fmt: skip
    layout = alignment.layout([Table(s, NAME, len(s[NAME])) for s in sources], range(4))
    assert not layout.absent and layout.count >= len(target) - 3
    wanted = reference(target, vocabularies, tensors, base, tokens, layout.count)
    for place, source in enumerate(sources):
        view = Reindexed(source, {NAME: layout.rows[place]})
        assert view.specs[NAME].shape == (layout.count, 5) == view[NAME].shape
        torch.testing.assert_close(view[NAME], wanted[place], atol=1e-7, rtol=1e-7)


def align(vocabularies, counts, target, **words):
    models = [InMemory({}, str(i)) for i in range(len(vocabularies))]
    settings = {"base": None, "reference": 0, "donor": 0, "tokens": {}, "multiple": None, **words}
    tensors = [torch.arange(count, dtype=torch.float64)[:, None] + 100 * i for i, count in enumerate(counts)]
    sources = [MappingSource({NAME: tensor}, str(i)) for i, tensor in enumerate(tensors)]
    alignment = Alignment(target, vocabularies, models, **settings)
    layout = alignment.layout([Table(s, NAME, c) for s, c in zip(sources, counts, strict=True)], range(len(counts)))
    rows = [Reindexed(s, {NAME: layout.rows[i]})[NAME].flatten().tolist() for i, s in enumerate(sources)]
    return layout, rows


def test_rows_by_hand():
    layout, rows = align([{"a": 0, "b": 1}, {"b": 0, "c": 1}], [2, 2], {"a": 0, "b": 1, "c": 2})
    assert rows == [[0, 1, 101], [0, 100, 101]] and layout.zeros == ()


def test_base_before_mean_and_mean_without_base():
    vocabularies, target = [{"a": 0, "b": 1}, {"a": 0, "b": 1}, {"a": 0}], {"a": 0, "b": 1}
    assert align(vocabularies, [2, 2, 1], target, base=0)[1][2] == [200, 1]
    assert align(vocabularies, [2, 2, 1], target)[1][2] == [200, (1 + 101) / 2]


def test_padding_of_its_own_else_the_mean_of_real_rows():
    _, rows = align([{"a": 0, "b": 1}, {"a": 0, "b": 1}], [4, 3], {"a": 0, "b": 1})
    assert rows == [[0, 1, 2, 3], [100, 101, 102, (100 + 101) / 2]]


@pytest.mark.parametrize(("multiple", "count"), [(1, 3), (2, 4), (64, 64)])
def test_multiple_counts_from_the_tokens(multiple, count):
    layout, _ = align([{"a": 0, "b": 1, "c": 2}], [10], {"a": 0, "b": 1, "c": 2}, multiple=multiple)
    assert layout.count == count


def test_token_without_a_row_anywhere_gets_none_at_the_end_and_zero_within():
    layout, rows = align([{"a": 0, "b": 1}], [1], {"a": 0, "b": 1})  # as Gemma 3 1B, whose image token has no row
    assert (layout.count, layout.zeros, rows) == (1, (), [[0]])
    layout, rows = align([{"a": 0, "b": 9}, {"c": 0}], [1, 1], {"a": 0, "b": 1, "c": 2})
    assert (layout.count, layout.zeros) == (3, ("b",)) and rows == [[0, 0, 100], [0, 0, 100]]


def test_model_that_stays_as_it_is_is_not_copied():
    source = MappingSource({NAME: torch.randn(3, 2), "other": torch.ones(2)}, "x")
    alignment = Alignment(
        {"a": 0, "b": 1, "c": 2}, [{"a": 0, "b": 1, "c": 2}], [InMemory({}, "x")],
        base=None, reference=0, donor=0, tokens={}, multiple=None,
    )  # fmt: skip
    view = Reindexed(source, {NAME: alignment.layout([Table(source, NAME, 3)], [0]).rows[0]})
    assert view[NAME] is source[NAME] and view["other"] is source["other"] and not view.bytes_held(NAME)
