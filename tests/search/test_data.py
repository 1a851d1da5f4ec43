"""What is data, and in which order it comes."""

from itertools import islice

import pytest
import torch

from hf_merge.errors import MergeError, ParameterError
from hf_merge.search.data import batches, endless
from tests.conftest import make_tokenizer


class Table:
    """Has the manners of a datasets.Dataset."""

    column_names = ("text",)

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"text": self.texts[i]}


@pytest.fixture(scope="module")
def folder(llamas):
    return llamas["base"]


WORDS = [f"w{i}" for i in range(10)]


def seen(found):
    return [row[0] for batch in found for row in batch["input_ids"].tolist()]


def test_files_tables_and_lists_are_the_same(folder, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(WORDS))
    (tmp_path / "a.csv").write_text("\n".join(["text", *WORDS]))
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{word}"}}' for word in WORDS))
    ways = [WORDS, [{"text": word} for word in WORDS], Table(WORDS), *(tmp_path / f"a.{end}" for end in
                                                                     ("txt", "csv", "jsonl"))]  # fmt: skip
    found = [seen(batches(folder, way, 4, 7)) for way in ways]
    assert all(one == found[0] for one in found)
    assert sorted(found[0]) == sorted(make_tokenizer()(WORDS)["input_ids"][i][0] for i in range(10))
    assert found[0] != seen(batches(folder, WORDS, 4, 8)) and sorted(found[0]) == seen(batches(folder, WORDS, 4, None))


def test_endless_data_comes_in_another_order_each_time(folder):
    found = seen(islice(endless(folder, WORDS, 5, 0), 4))
    assert sorted(found[:10]) == sorted(found[10:]) and found[:10] != found[10:]


def test_padding_is_masked_and_long_texts_are_cut(folder):
    (batch,) = batches(folder, ["w1", " ".join(["w2"] * 200)], 2, None)
    assert batch["attention_mask"].sum(1).tolist() == [1, 64]


def test_batches_pass_as_they_are(folder):
    given = [{"input_ids": torch.ones(2, 3)}, {"input_ids": torch.zeros(2, 3)}]
    assert [b["input_ids"].mean() for b in batches(folder, given, 9, 1)] == [1, 0]
    assert [b["input_ids"].mean() for b in batches(folder, iter(given), 9, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "is empty"),
        (iter([]), "is empty"),
        (3, "is a int"),
        ("missing.csv", "cannot read"),
        ("weights.bin", "should be a .json"),
        ([3], "as an example"),
        (iter(["x"]), "yields a str"),
        ([{"x": 1}], "call one of them 'text'"),
    ],
    ids=["no list", "no iterator", "a number", "no file", "another file", "numbers", "words", "no text"],
)
def test_what_is_no_data_is_refused(folder, data, told):
    with pytest.raises(ParameterError, match=told):
        list(batches(folder, data, 2, 0))


def test_folders_without_images_and_models_without_processors_are_told(folder, tmp_path):
    with pytest.raises(ParameterError, match="has no images"):
        list(batches(folder, tmp_path, 2, 0))
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(MergeError, match="no image processor"):
        list(batches(folder, tmp_path, 2, 0))
