"""Greedy soups: what is taken, from a function or from labels in files, and what is refused."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

import hf_merge
from hf_merge import search
from hf_merge.errors import ComputeError, DataError, ParameterError


def norm_weight(model):
    return float(model.model.norm.weight.detach().mean())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three classifiers of one task with a vocabulary, and texts that are labelled as the first two would."""
    root = tmp_path_factory.mktemp("runs")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "good"]))
    sizes = {"vocab_size": 7, "hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 16}
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = BertConfig(**sizes, **labels, num_hidden_layers=1, num_attention_heads=1)
    for i, name in enumerate("abc"):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([0.0, 9.0 if i < 2 else -30.0]))
            model.classifier.weight.mul_(1 + i)
        model.save_pretrained(root / name)
        BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / name)
    (root / "labelled.csv").write_text("text,label\ngood,yes\nbad,yes\ngood bad,1\nbad good,0\n")
    return root


def test_models_are_taken_best_first_as_long_as_nothing_is_lost(llamas):
    models = [llamas["base"], llamas["a"], llamas["b"]]
    soup = search.greedy_soup(models, norm_weight, device="cpu")
    alone = {str(m): norm_weight(hf_merge.from_pretrained([m], method="linear")) for m in models}
    best = max(alone, key=alone.__getitem__)
    assert [str(one) for one in soup.recipe.merged] == [best]  # an average of a linear score is below its best
    assert soup.score == alone[best] and len(soup.log) == 5
    everything = search.greedy_soup(models, lambda model: 1.0, device="cpu")
    assert [*map(str, everything.recipe.merged)] == [*map(str, models)]  # ties are taken, in the order that was given


def test_labels_in_a_file_through_the_command_line(runs, tmp_path):
    output = tmp_path / "soup.yaml"
    call = ["search", "soup", runs / "c", runs / "a", runs / "b", output, "--data", runs / "labelled.csv"]
    done = subprocess.run([sys.executable, "-W", "error", "-m", "hf_merge.cli", *map(str, call), "--device", "cpu"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["score"] for line in log] == [0.25, 0.75, 0.75, 0.75, log[4]["score"]]
    merged = hf_merge.merge(output, tmp_path / "merged")
    one, two = (load_file(runs / name / "model.safetensors") for name in "ab")
    found = load_file(merged.path / "model.safetensors")
    assert torch.allclose(found["classifier.weight"], (one["classifier.weight"] + two["classifier.weight"]) / 2)
    assert search.accuracy(merged.load(), runs / "labelled.csv") == 0.75


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text,label\ngood,2\n", "has the label 2, and the model has the classes 0 to 1"),
        ("text,label\ngood,maybe\n", "has the label 'maybe'"),
        ("text\ngood\n", "has no labels"),
        ("text,label\n", "is empty"),
        ("one,two\nx,y\n", "call the input 'text'"),
    ],
)
def test_labels_that_are_no_labels_are_refused(runs, tmp_path, text, told):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        search.greedy_soup([runs / "a", runs / "b"], tmp_path / "data.csv", device="cpu")


def test_batches_with_labels_out_of_range_are_refused(runs):
    model = BertForSequenceClassification.from_pretrained(runs / "a")
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "labels": torch.tensor([4])}
    with pytest.raises(DataError, match="the label 4, and the model has the classes 0 to 1"):
        search.accuracy(model, [batch])


def test_scores_that_are_no_numbers_and_single_models_are_refused(runs):
    for score in (math.nan, None, "good"):
        with pytest.raises(ComputeError, match="should return a number"):
            search.greedy_soup([runs / "a", runs / "b"], lambda model, score=score: score, device="cpu")
    with pytest.raises(ParameterError, match="at least two"):
        search.greedy_soup([runs / "a"], lambda model: 1.0)
