"""What is data, in which order it comes, and what is made of it."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, ViTImageProcessorPil

from hf_merge.data import Batch, Data, Preparation, endless, labelled_batches
from hf_merge.errors import DataError
from hf_merge.types import ModelRef
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


class Loader:
    """May be gone through again, and counts how often."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.fixture(scope="module")
def model(llamas):
    return AutoModelForCausalLM.from_pretrained(llamas["base"])


WORDS = [f"w{i}" for i in range(10)]


def seen(found):
    return [row[0] for batch in found for row in batch.inputs["input_ids"].tolist()]


def test_files_tables_and_lists_are_the_same(model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(WORDS))
    (tmp_path / "a.csv").write_text("\n".join(["text", *WORDS]))
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "{word}"}}' for word in WORDS))
    ways = [WORDS, [{"text": word} for word in WORDS], Table(WORDS), *(tmp_path / f"a.{end}" for end in
                                                                     ("txt", "csv", "jsonl"))]  # fmt: skip
    found = [seen(Data(way, model, batch_size=4).shuffled(7)) for way in ways]
    assert all(one == found[0] for one in found)
    data = Data(WORDS, model, batch_size=4)
    assert seen(data) == [ids[0] for ids in make_tokenizer()(WORDS)["input_ids"]]
    assert found[0] != seen(data.shuffled(8)) and sorted(found[0]) == sorted(seen(data))


def test_endless_data_comes_in_another_order_each_time(model):
    found = seen(islice(endless(WORDS, model, batch_size=5, seed=0), 4))
    assert sorted(found[:10]) == sorted(found[10:]) and found[:10] != found[10:]


def test_padding_is_masked_and_long_texts_are_cut(model):
    (batch,) = Data(["w1", " ".join(["w2"] * 200)], model)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [1, 64]
    (batch,) = Data(["w1", " ".join(["w2"] * 200)], model, Preparation(model, max_length=7))
    assert batch.inputs["attention_mask"].sum(1).tolist() == [1, 7]


@pytest.mark.parametrize("wrap", [list, iter, Loader], ids=["list", "iterator", "loader"])
def test_batches_pass_as_they_are(model, wrap):
    given = [
        {"input_ids": torch.ones(2, 3), "labels": torch.zeros(2)},
        (torch.zeros(2, 3), torch.ones(2)),
        torch.ones(1, 3),
    ]
    found = [*islice(endless(wrap(given), model, batch_size=9, seed=1), 3)]
    assert [b.inputs["input_ids"].mean() for b in found] == [1, 0, 1]
    assert [None if b.labels is None else b.labels.tolist() for b in found] == [[0, 0], [1, 1], None]
    assert [b.size for b in Data(wrap(given), model, max_examples=3)] == [2, 1]


def test_a_loader_is_gone_through_again_and_rows_of_an_iterator_are_batched(model):
    loader = Loader([{"input_ids": torch.ones(2, 3)}])
    assert len([*islice(endless(loader, model, batch_size=1, seed=0), 3)]) == 3 and loader.passes == 3
    found = [*islice(endless(iter(WORDS), model, batch_size=4, seed=0), 3)]
    assert [b.size for b in found] == [4, 4, 2] and seen(found) == seen(Data(WORDS, model))


def test_the_argument_of_a_plain_module_is_found():
    (batch,) = Data([torch.ones(2, 5)], torch.nn.Linear(5, 1))
    assert batch.inputs.keys() == {"input"}


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"question": "w1", "sentence": "w2", "label": 0}, [["w1", "w2"]]),
        ({"sentence1": "w1", "sentence2": "w2"}, [["w1", "w2"]]),
        ({"sentence": "w1", "idx": 3}, ["w1"]),
        ({"review": "w1", "stars": 3}, ["w1"]),
    ],
    ids=["question", "pair", "sentence", "the only text"],
)
def test_columns_are_found_by_what_they_are_called(model, row, ids):
    (batch,) = Data([row], model)
    assert batch.inputs["input_ids"].tolist() == make_tokenizer()(ids)["input_ids"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images in folders by label, and a processor."""
    root = tmp_path_factory.mktemp("pictures")
    for place, name in enumerate(("cat", "dog", "dog/young")):
        (root / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (90 * place, 0, 0)).save(root / "images" / name / f"{place}.png")
    ViTImageProcessorPil(do_resize=False).save_pretrained(root)
    config = SimpleNamespace(label2id={"cat": 0, "dog": 1}, num_labels=2)
    return root, SimpleNamespace(name_or_path=str(root), config=config)


def test_images_come_with_the_label_of_their_folder_or_file_and_are_named_beside_it(pictures):
    root, model = pictures
    (root / "list.csv").write_text(
        "file_name,label\nimages/cat/0.png,0\nimages/dog/1.png,dog\nimages/dog/young/2.png, 1\n"
    )
    for given in (root / "images", root / "list.csv"):
        batches = labelled_batches(given, model, batch_size=2)
        assert [b.inputs["pixel_values"].shape for b in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
        assert [b.labels.tolist() for b in batches] == [[0, 1], [1]]
    rows = [{"image": Image.new("L", (8, 8)), "label": "cat"}, {"image": Image.new("RGB", (8, 8)), "label": "cow"}]
    with pytest.raises(DataError, match="label 'cow', which is none of the model's: cat, dog"):
        [*labelled_batches(rows, model)]
    assert [b.size for b in Data([rows[0]["image"]], model)] == [1]


def test_processors_are_of_the_models_revision_and_token(monkeypatch):
    import transformers

    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **words: asked.append((*a, words)) or make_tokenizer()
    )
    live = SimpleNamespace(name_or_path="elsewhere", config=None)
    prepare = Preparation(live, ModelRef(path="org/a", revision="v2"), token="secret", local_files_only=True)
    [*Data(["w1"], live, prepare)]
    assert asked == [("org/a", {"token": "secret", "local_files_only": True, "revision": "v2"})]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([], "is empty"),
        (iter([]), "is empty"),
        (3, "is a int"),
        ({"text": ["w1"]}, "is a dict"),
        ("missing.csv", "there is nothing at"),
        (__file__, "should be a .csv"),
        ([3], "as an example"),
        (iter([3]), "as an example"),
        ([{"x": 1}], "call the input 'text'"),
        ([{"text": "w1"}, {"text": None}], "has examples without 'text'"),
        ([({"input_ids": [1]}, None)], "has a batch that is no tensor"),
    ],
    ids=["no list", "no iterator", "a number", "columns", "no file", "another file", "numbers", "more numbers",
         "no text", "a hole", "no tensors"],
)  # fmt: skip
def test_what_is_no_data_is_refused(model, data, told):
    with pytest.raises(DataError, match=f"The data of 'a'.*{told}"):
        next(endless(data, model, batch_size=2, seed=0, name="The data of 'a'"))


def test_folders_without_images_and_models_without_processors_are_told(model, tmp_path):
    with pytest.raises(DataError, match="has no images"):
        Data(tmp_path, model)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="no AutoImageProcessor"):
        [*Data(tmp_path, model)]
    with pytest.raises(DataError, match="A model in memory has no processor"):
        [*Data(["w1"], torch.nn.Linear(1, 1))]


def test_examples_of_a_batch_are_it():
    batch = Batch({"x": torch.arange(6).view(3, 2)}, torch.arange(3))
    assert torch.equal(torch.cat([one.inputs["x"] for one in batch.examples()]), batch.inputs["x"])
    assert [one.labels.tolist() for one in batch.examples()] == [[0], [1], [2]]
