"""Models are tried as their own classes answer; what may not or cannot be run is told in words."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_merge
from hf_merge.trial import trying
from tests.conftest import make_tokenizer, save_vit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "."]
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save_bert(folder, kind, **more):
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(vocab_size=10, max_position_embeddings=16, **SMALL, **more))
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return model.eval()


def continued(folder, text, count):
    """What a Llama says next, token by token, the most likely each time."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    begin = len(ids)
    for _ in range(count):
        if len(ids) == begin or ids[-1] != model.config.eos_token_id:
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return AutoTokenizer.from_pretrained(folder).decode(ids[begin:], skip_special_tokens=True)


def test_text_is_continued_greedily_side_by_side(llamas, tmp_path):
    merged = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear")
    trials = hf_merge.try_out({"merged": merged, "a": llamas["a"]}, ["w5 w6 w7", "w1"], max_new_tokens=4)
    assert [one.label for one in trials] == ["merged", "a"] and {one.task for one in trials} == {"text-generation"}
    assert [one.error for one in trials] == [None, None]
    for one, folder in zip(trials, (tmp_path / "m", llamas["a"]), strict=True):
        assert [out["text"] for out in one.outputs] == [continued(folder, text, 4) for text in ("w5 w6 w7", "w1")]


def test_a_conversation_goes_through_the_chat_template(llamas):
    talk = [{"role": "user", "content": "w5 w6"}]
    (trial,) = hf_merge.try_out({"a": llamas["a"]}, talk, max_new_tokens=3)
    assert trial.outputs == ({"text": continued(llamas["a"], "w5 w6", 3)},)


def test_a_recipe_is_merged_when_it_is_tried(llamas, tmp_path):
    recipe = {"merge_method": "linear", "models": [str(llamas["a"]), str(llamas["b"])]}
    hf_merge.merge(recipe, tmp_path / "m")
    lazy, written = hf_merge.try_out({"recipe": recipe, "folder": tmp_path / "m"}, "w5 w6 w7", max_new_tokens=4)
    assert lazy.outputs == written.outputs and lazy.error is None


def test_an_adapter_is_tried_on_its_base(llamas, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(llamas["base"])
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "up_proj"],
                                             init_lora_weights=False, task_type="CAUSAL_LM"))  # fmt: skip
    tuned.save_pretrained(tmp_path / "lora")
    whole = tuned.merge_and_unload()
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    models = {"alone": tmp_path / "lora", "named": f"{llamas['base']}+{tmp_path / 'lora'}", "whole": tmp_path / "whole",
              "base": llamas["base"]}  # fmt: skip
    alone, named, merged, base = hf_merge.try_out(models, "w5 w6 w7", max_new_tokens=8)
    assert alone.outputs == named.outputs == merged.outputs != base.outputs


def test_texts_are_classified(tmp_path):
    labels = {0: "good", 1: "bad", 2: "odd"}
    model = save_bert(tmp_path, transformers.BertForSequenceClassification, id2label=labels, num_labels=3)
    (trial,) = hf_merge.try_out({"m": tmp_path}, "a cat sat .")
    with torch.no_grad():
        scores = model(**bert_tokenizer()("a cat sat .", return_tensors="pt")).logits[0].softmax(0)
    found = {row["label"]: row["score"] for row in trial.outputs[0]["labels"]}
    assert trial.task == "text-classification" and [*found] == sorted(found, key=lambda name: -found[name])
    assert found == pytest.approx({labels[i]: scores[i].item() for i in labels}, abs=1e-6)


def test_a_mask_is_filled(tmp_path):
    model = save_bert(tmp_path, transformers.BertForMaskedLM)
    (trial,) = hf_merge.try_out([tmp_path], "a [MASK] sat .")
    with torch.no_grad():
        scores = model(**bert_tokenizer()("a [MASK] sat .", return_tensors="pt")).logits[0, 1].softmax(0)
    rows = trial.outputs[0]["tokens"]
    assert trial.task == "fill-mask" and len(rows) == 5
    assert [row["score"] for row in rows] == pytest.approx(scores.topk(5).values.tolist(), abs=1e-6)


def test_pictures_are_classified(tmp_path):
    from PIL import Image

    model, processor = save_vit(tmp_path / "m")
    picture = Image.new("RGB", (20, 10), (200, 30, 90))
    picture.save(tmp_path / "p.png")
    (trial,) = hf_merge.try_out({"m": tmp_path / "m"}, [tmp_path / "p.png", picture])
    with torch.no_grad():
        scores = model(**processor(picture, return_tensors="pt")).logits[0].softmax(0)
    assert trial.task == "image-classification" and trial.outputs[0] == trial.outputs[1]
    found = {row["label"]: row["score"] for row in trial.outputs[0]["labels"]}
    assert found == pytest.approx({"cat": scores[0].item(), "dog": scores[1].item()}, abs=1e-5)


def test_embeddings_of_the_real_model_are_those_of_sentence_transformers(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    merged = hf_merge.merge([minilm["a"], minilm["b"]], tmp_path / "m", method="linear")
    texts = ["a cat sat", "a kitten was sitting on the mat", "stock prices fell"]
    (trial,) = hf_merge.try_out({"merged": merged}, texts)
    model = sentence_transformers.SentenceTransformer(str(merged.path), device="cpu")
    embeddings = model.encode(texts)
    expected = model.similarity(embeddings, embeddings)
    assert trial.task == "sentence-similarity"
    torch.testing.assert_close(torch.tensor([out["similarity"] for out in trial.outputs]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken"])
def test_embeddings_are_pooled_as_the_model_says(tmp_path, pooling):
    model = save_bert(tmp_path, transformers.BertModel)
    kinds = [("0", "Transformer", ""), ("1", "Pooling", "1_Pooling")]
    told = [
        {"idx": i, "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, kind, path in kinds
    ]
    (tmp_path / "modules.json").write_text(json.dumps(told))
    (tmp_path / "1_Pooling").mkdir()
    word = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}[pooling]
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{word}": True}))
    (trial,) = hf_merge.try_out({"m": tmp_path}, ["a cat sat .", "dog"])
    with torch.no_grad():
        one, other = (model(**bert_tokenizer()(text, return_tensors="pt")).last_hidden_state[0] for text in
                      ("a cat sat .", "dog"))  # fmt: skip
    pool = {
        "cls": lambda x: x[0],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.amax(0),
        "lasttoken": lambda x: x[-1],
    }
    expected = torch.nn.functional.cosine_similarity(pool[pooling](one), pool[pooling](other), dim=0).item()
    assert trial.outputs[0]["similarity"] == pytest.approx([1.0, expected], abs=1e-5)


def with_changes(folder, target, **changes):
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_code_of_a_models_own_is_never_run(llamas, tmp_path):
    ran = tmp_path / "it_ran"
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = with_changes(llamas["a"], tmp_path / "m", auto_map=code, architectures=["OwnModel"], model_type="own")
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    own, good = hf_merge.try_out({"own": folder, "a": llamas["a"]}, "w5", task="text-generation", max_new_tokens=2)
    assert "needs code of its own to run" in own.error and own.outputs == () and good.error is None
    assert not ran.exists()


def test_weights_that_are_no_safetensors_are_not_loaded(llamas, tmp_path):
    folder = with_changes(llamas["a"], tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (trial,) = hf_merge.try_out({"m": folder}, "w5", task="text-generation")
    assert "has no weights in safetensors" in trial.error


def test_task_experts_are_sent_where_they_run(llamas, tmp_path):
    merged = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="emr", base_model=llamas["base"])
    (trial,) = hf_merge.try_out({"m": merged}, "w5", task="text-generation")
    assert "load_experts" in trial.error


def test_a_head_that_the_model_lacks_is_told(llamas):
    (trial,) = hf_merge.try_out({"a": llamas["a"]}, "w5", task="text-classification")
    assert "has no weights for 'score.weight'" in trial.error


def test_what_is_not_there_is_told_and_the_others_go_on(llamas, tmp_path):
    gone, a = hf_merge.try_out({"gone": tmp_path / "gone", "a": llamas["a"]}, "w5", max_new_tokens=2)
    assert gone.error == f"There is no model at '{tmp_path / 'gone'}'." and a.outputs
    assert str(gone) == f"gone:\n  error: {gone.error}"


def test_one_model_is_in_memory_at_a_time(llamas, monkeypatch):
    import gc

    live = []
    answers = trying.answers

    def counted(*args, **words):
        live.append(sum(isinstance(one, transformers.LlamaForCausalLM) for one in gc.get_objects()))
        return answers(*args, **words)

    monkeypatch.setattr(trying, "answers", counted)
    gc.collect()
    hf_merge.try_out([llamas[name] for name in ("base", "a", "b")], "w5", max_new_tokens=2)
    assert live == [live[0]] * 3


@pytest.mark.parametrize(
    ("inputs", "task", "told"),
    [
        ([], "text-generation", "nothing to try"),
        ("  ", "text-generation", "not empty"),
        ([3], "text-classification", "found 3"),
        ([[{"role": "user"}]], "text-generation", "not empty"),
        ("one", "sentence-similarity", "two texts or more"),
        ("https://example.org/a.png", "image-classification", "cannot be read as a picture"),
        (3, "image-classification", "found 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(llamas, inputs, task, told):
    with pytest.raises(hf_merge.errors.DataError, match=told):
        hf_merge.try_out({"a": llamas["a"]}, inputs, task=task)


@pytest.mark.parametrize(
    ("words", "told"),
    [({"task": "text-generatoin"}, "Did you mean 'text-generation'"), ({"max_new_tokens": 0}, "1 or more")],
    ids=["task", "max_new_tokens"],
)
def test_words_that_cannot_be_meant_are_refused(llamas, words, told):
    with pytest.raises(hf_merge.ParameterError, match=told):
        hf_merge.try_out({"a": llamas["a"]}, "w5", **words)
    with pytest.raises(hf_merge.ParameterError, match="no model to try"):
        hf_merge.try_out({}, "w5")


def test_the_command_shows_them_side_by_side(llamas):
    words = [f"merged={llamas['a']}", str(llamas["b"]), "--input", "w5 w6", "--max-new-tokens", "3"]
    command = [sys.executable, "-m", "hf_merge.cli", "try", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    one, other = json.loads(done.stdout)["trials"]
    assert (one["label"], other["label"]) == ("merged", str(llamas["b"]))
    assert one["outputs"] == [{"text": continued(llamas["a"], "w5 w6", 3)}] and one["error"] is None
