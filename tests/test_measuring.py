"""Statistics: measured on models that run, used by methods, and refused where they are another model's."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import hf_merge
from hf_merge.errors import DataError, OutputError, OutputExistsError, ParameterError, PlanError, RecipeError
from tests.tiny_tokenizers import ENGLISH, word_piece

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STATISTICS = "hf_merge.statistics"


def told(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[STATISTICS])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# closed forms


def linear(out=3, into=5, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(into, out)


def test_gram_is_the_mean_of_outer_products_of_inputs(tmp_path):
    x = normal(20, 5)
    path = hf_merge.measure(linear(), [x[:12], x[12:]], "gram", output=tmp_path / "g.safetensors")
    torch.testing.assert_close(load_file(path)["weight"], x.T @ x / 20)
    assert told(path)["examples"] == 20


def test_regmean_of_linear_models_is_least_squares_on_the_pooled_data(tmp_path):
    models, inputs = [linear(seed=1), linear(seed=2)], [normal(40, 5, seed=3), normal(40, 5, seed=4)]
    grams = [load_file(hf_merge.measure(m, [x], "gram", output=tmp_path / f"{i}.safetensors"))
             for i, (m, x) in enumerate(zip(models, inputs, strict=True))]  # fmt: skip
    states = [{"weight": m.weight.detach()} for m in models]
    merged = hf_merge.merge_state_dicts(states, method="regmean", statistics=grams, scaling=1.0, ridge=1e-12)
    answers = torch.cat([x @ m.weight.detach().T for m, x in zip(models, inputs, strict=True)]).double()
    pooled = torch.linalg.lstsq(torch.cat(inputs).double(), answers).solution.T
    torch.testing.assert_close(merged["weight"].double(), pooled, rtol=1e-5, atol=1e-6)


def test_convolutions_are_merged_as_the_matrices_that_they_are(tmp_path):
    torch.manual_seed(0)
    models, images = [nn.Conv2d(2, 3, 3, stride=2, padding=1) for _ in range(2)], normal(9, 2, 8, 8)
    grams = [load_file(hf_merge.measure(m, [images], "gram", output=tmp_path / f"{i}.safetensors"))
             for i, m in enumerate(models)]  # fmt: skip
    assert grams[0]["weight"].shape == (18, 18)
    states = [{"weight": m.weight.detach()} for m in models]
    merged = hf_merge.merge_state_dicts(states, method="regmean", statistics=grams, scaling=1.0)
    torch.testing.assert_close(merged["weight"], (states[0]["weight"] + states[1]["weight"]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["data", "expected"])
def test_fisher_of_logistic_regression_is_its_formula(targets, tmp_path):
    model, x, y = linear(), normal(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    batches = [{"input": x, "labels": y}]
    found = load_file(hf_merge.measure(model, batches, "fisher", targets=targets, output=tmp_path / "f.safetensors"))
    p = model(x).softmax(1).detach()
    squares = (nn.functional.one_hot(y, 3) - p).square() if targets == "data" else p * (1 - p)
    torch.testing.assert_close(found["weight"], squares.T @ x.square() / 7)
    torch.testing.assert_close(found["bias"], squares.mean(0))


def test_labels_that_are_drawn_give_the_expectation_on_average_and_follow_the_seed(tmp_path):
    x = normal(1, 5).repeat(2000, 1)
    words = {"max_examples": None, "overwrite": True, "output": tmp_path / "f.safetensors"}
    expected = load_file(hf_merge.measure(linear(), [x[:1]], "fisher", targets="expected", **words))["weight"]
    first, again, other = (
        load_file(hf_merge.measure(linear(), [x], "fisher", seed=s, **words))["weight"] for s in (0, 0, 1)
    )
    torch.testing.assert_close(first, expected, rtol=0.15, atol=1e-3)
    assert first.equal(again) and not first.equal(other)


def test_equal_fisher_information_gives_the_average():
    states = [{"w": normal(4, 3, seed=i)} for i in range(3)]
    for fisher in (torch.full((4, 3), 0.3), torch.zeros(4, 3)):
        for words in ({}, {"normalize": False}, {"floor": 0.0}):
            merged = hf_merge.merge_state_dicts(states, method="fisher", statistics=[{"w": fisher}] * 3, **words)
            torch.testing.assert_close(merged["w"], sum(s["w"] for s in states) / 3)


def test_fisher_of_tiles_is_the_formula_on_whole_tensors():
    shape = (700, 1000)
    states = [{"w": normal(*shape, seed=i), "b": normal(9, seed=i)} for i in range(2)]
    fishers = [{"w": normal(*shape, seed=9 + i).square(), "b": normal(9, seed=i + 7).square()} for i in range(2)]
    merged = hf_merge.merge_state_dicts(states, method="fisher", statistics=fishers, weight=[1.0, 0.5])
    norms = [sum(f.double().square().sum() for f in each.values()).sqrt() for each in fishers]
    shares = [w / (n + 1e-6) * (each["w"].double() + 1e-6) for w, n, each in zip((1, 0.5), norms, fishers, strict=True)]
    expected = sum(c * s["w"] for c, s in zip(shares, states, strict=True)) / sum(shares)
    torch.testing.assert_close(merged["w"].double(), expected, rtol=1e-5, atol=1e-5)


def test_activations_are_means_and_root_mean_squares_of_outputs(tmp_path):
    x, model = normal(11, 5), linear()
    found = load_file(hf_merge.measure(model, [x], "activations", output=tmp_path / "a.safetensors"))["weight"]
    y = model(x).detach()
    torch.testing.assert_close(found, torch.stack([y.mean(0), y.square().mean(0).sqrt()]))


@pytest.mark.parametrize("grams", ["zero", "rank one"])
def test_singular_gram_matrices_give_a_finite_result_and_the_mean_where_there_are_no_inputs(grams):
    states = [{"w": normal(3, 4, seed=i)} for i in range(2)]
    x = normal(1, 4) if grams == "rank one" else torch.zeros(1, 4)
    merged = hf_merge.merge_state_dicts(states, method="regmean", statistics=[{"w": x.T @ x}] * 2, scaling=1.0)
    torch.testing.assert_close(merged["w"], (states[0]["w"] + states[1]["w"]) / 2, rtol=1e-4, atol=1e-5)


# models and files


def save_tokenizer(folder):
    tokenizer = word_piece(ENGLISH, 90)
    words = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **words).save_pretrained(folder)


def save_processor(folder):
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def make(kind, seed):
    torch.manual_seed(seed)
    labels = {"id2label": {0: "bad", 1: "good", 2: "mixed"}, "label2id": {"bad": 0, "good": 1, "mixed": 2}}
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SMALL, **labels))
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **SMALL))
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=90, max_position_embeddings=32, **SMALL, **labels))
    if kind == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=90, max_position_embeddings=32, **SMALL))
    return GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=16, n_layer=2, n_head=2))


KINDS = ("vit", "clip", "bert", "gpt2", "neox")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models of each kind, and local data."""
    root = tmp_path_factory.mktemp("measuring")
    for kind in KINDS:
        for seed, name in enumerate("ab"):
            folder = root / kind / name
            model = make(kind, 0)
            with torch.no_grad():
                for i, parameter in enumerate(model.parameters()):
                    parameter.add_(normal(*parameter.shape, seed=100 * seed + i), alpha=0.05)
            model.save_pretrained(folder)
            (save_processor if kind in ("vit", "clip") else save_tokenizer)(folder)
    write_data(root)
    return root


def write_data(root):
    Image = pytest.importorskip("PIL.Image")
    for place, name in enumerate(("bad", "good", "mixed")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(10 * place + i))
            Image.fromarray(pixels.byte().numpy()).save(root / "images" / name / f"{i}.png")
    rows = [{"text": text[: 10 + 3 * i], "label": ("bad", "good", "mixed")[i % 3]} for i, text in enumerate(ENGLISH)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "rows.csv").write_text("text,label\n" + "\n".join(f"{r['text']},{i % 3}" for i, r in enumerate(rows)))


def data_of(kind, root):
    return {"vit": root / "images", "clip": root / "images", "bert": root / "rows.csv"}.get(kind, root / "rows.jsonl")


def measured(world, kind, what, tmp_path, **words):
    data = data_of(kind, world)
    return [hf_merge.measure(world / kind / n, data, what, output=tmp_path / f"{n}.safetensors", **words) for n in "ab"]


def models(world, kind):
    return [world / kind / name for name in "ab"]


AUTO = {"vit": AutoModelForImageClassification, "bert": AutoModelForSequenceClassification, "clip": CLIPVisionModel}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus", "fisher"])
def test_models_of_every_kind_are_measured_and_merged(world, kind, method, tmp_path):
    if (kind, method) == ("clip", "fisher"):
        with pytest.raises(DataError, match="CLIPVisionModel gives no logits"):
            measured(world, kind, "fisher", tmp_path)
        return
    if method == "regmean_plus_plus":
        data = [data_of(kind, world)] * 2
        files = hf_merge.measure(models(world, kind), data, "merged_gram", output=tmp_path / "grams")
    else:
        files = measured(world, kind, {"regmean": "gram"}.get(method, method), tmp_path)
    merged = hf_merge.merge(models(world, kind), tmp_path / "merged", method=method, statistics=files)
    assert merged.plan.bytes_read > merged.plan.bytes_written * 2
    _, info = AUTO.get(kind, AutoModelForCausalLM).from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = load_file(merged.path / "model.safetensors")
    a, b = (load_file(folder / "model.safetensors") for folder in models(world, kind))
    mean = {name: (a[name] + b[name]) / 2 for name in a}
    statistics = {*load_file(files[0]), *told(files[0]).get("same_as", {})}
    for name, weight in weights.items():
        assert weight.isfinite().all()
        if name not in statistics:
            torch.testing.assert_close(weight, mean[name])
    assert any(not torch.allclose(weights[name], mean[name], atol=1e-4) for name in statistics)
    assert sum("regmean" in str(s.method) or s.method == "fisher" for s in merged.plan.steps) == len(statistics)


def test_split_projections_share_one_gram_matrix_and_fused_ones_have_one(world, tmp_path):
    clip = measured(world, "clip", "gram", tmp_path)[0]
    same, stem = told(clip)["same_as"], "encoder.layers.0.self_attn"
    key = next(name for name in [*load_file(clip), *same] if name.endswith(f"{stem}.k_proj.weight"))
    trio = {key, key.replace("k_proj", "q_proj"), key.replace("k_proj", "v_proj")}
    assert len(trio & same.keys()) == 2 and len(trio & load_file(clip).keys()) == 1
    neox = load_file(hf_merge.measure(world / "neox/a", world / "rows.json", "gram", output=tmp_path / "n.safetensors"))
    assert neox["gpt_neox.layers.0.attention.query_key_value.weight"].shape == (16, 16)
    gpt2 = load_file(hf_merge.measure(world / "gpt2/a", world / "rows.json", "gram", output=tmp_path / "g.safetensors"))
    assert gpt2["transformer.h.0.attn.c_attn.weight"].shape == (16, 1, 16)


def test_square_weights_with_inputs_first_are_merged_along_their_inputs(tmp_path):
    states, x = [{"w": normal(4, 4, seed=i)} for i in range(2)], [normal(9, 4, seed=5 + i) for i in range(2)]
    grams = [{"w": one.T @ one} for one in x]
    plain = hf_merge.merge_state_dicts(states, method="regmean", statistics=grams)["w"]
    turned = hf_merge.merge_state_dicts(
        [{"w": s["w"].T.contiguous()} for s in states], method="regmean",
        statistics=[{"w": g["w"][:, None]} for g in grams],
    )["w"]  # fmt: skip
    torch.testing.assert_close(plain.T, turned)


def test_passes_that_keep_to_a_bound_on_memory_give_the_same(world, tmp_path):
    words = {"data": world / "images", "what": "gram"}
    one = hf_merge.measure(world / "vit/a", **words, output=tmp_path / "1.safetensors")
    many = hf_merge.measure(world / "vit/a", **words, output=tmp_path / "2.safetensors", max_memory=6000)
    assert all(tensor.equal(load_file(many)[name]) for name, tensor in load_file(one).items())
    with pytest.raises(ParameterError, match="max_memory="):
        hf_merge.measure(world / "vit/a", **words, output=tmp_path / "3.safetensors", max_memory="many")


def test_padding_does_not_count(world, tmp_path):
    alone, batched = (
        load_file(hf_merge.measure(world / "bert/a", world / "rows.json", "gram", output=tmp_path / f"{n}.safetensors",
                                   batch_size=n)) for n in (1, 8)
    )  # fmt: skip
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, batched[name], rtol=1e-4, atol=1e-5)


def test_merged_gram_of_equal_models_is_their_gram_and_the_first_layer_sees_what_it_saw(world, tmp_path):
    plain = load_file(hf_merge.measure(world / "vit/a", world / "images", "gram", output=tmp_path / "g.safetensors"))
    words = {"data": [world / "images"] * 2, "what": "merged_gram"}
    pair = hf_merge.measure([world / "vit/a", world / "vit/a"], **words, output=tmp_path / "same")
    for name, tensor in load_file(pair[1]).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5)


def test_the_merge_is_the_model_whose_activations_were_measured(world, tmp_path):
    """The classifier comes last: its inputs are those that it has in the finished merge."""
    data = [[{"pixel_values": normal(6, 3, 8, 8, seed=i)}] for i in range(2)]
    files = hf_merge.measure(models(world, "vit"), data, "merged_gram", output=tmp_path / "g")
    words = {"method": "regmean_plus_plus", "statistics": files}
    merged = hf_merge.merge(models(world, "vit"), tmp_path / "merged", **words).load()
    for batches, file in zip(data, files, strict=True):
        again = load_file(hf_merge.measure(merged, batches, "gram", output=tmp_path / "m.safetensors", overwrite=True))
        torch.testing.assert_close(
            again["classifier.weight"], load_file(file)["classifier.weight"], rtol=1e-4, atol=1e-5
        )


def test_data_from_files_rows_and_datasets_gives_the_same(world, tmp_path):
    rows = json.loads((world / "rows.json").read_text())
    given = [world / "rows.json", world / "rows.jsonl", world / "rows.csv", rows, iter(rows)]
    found = [load_file(hf_merge.measure(world / "bert/a", data, "fisher", targets="data", overwrite=True,
                                        output=tmp_path / "f.safetensors")) for data in given]  # fmt: skip
    assert all(other[name].equal(tensor) for other in found[1:] for name, tensor in found[0].items())


def test_datasets_and_parquet(world, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = json.loads((world / "rows.json").read_text())
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    given = [rows, made, tmp_path / "rows.parquet", tmp_path / "saved", made.to_iterable_dataset()]
    found = [load_file(hf_merge.measure(world / "bert/a", data, "gram", overwrite=True,
                                        output=tmp_path / "f.safetensors")) for data in given]  # fmt: skip
    assert all(other[name].equal(tensor) for other in found[1:] for name, tensor in found[0].items())


def test_without_datasets_parquet_names_the_extra(world, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(DataError, match=r"hf-merge\[data\]"):
        hf_merge.measure(linear(), tmp_path / "x.parquet", "gram", output=tmp_path / "g.safetensors")


def test_examples_are_drawn_by_the_seed_and_the_file_says_so(world, tmp_path):
    words = {"max_examples": 3, "what": "gram", "overwrite": True, "output": tmp_path / "g.safetensors"}
    first, again, other = (load_file(hf_merge.measure(world / "bert/a", world / "rows.json", seed=s, **words))
                           for s in (0, 0, 1))  # fmt: skip
    name = next(iter(first))
    assert first[name].equal(again[name]) and not first[name].equal(other[name])
    said = told(tmp_path / "g.safetensors")
    assert (said["examples"], said["seed"], said["what"], said["data"]) == (3, 1, "gram", "rows.json")
    assert said["model"]["label"] == "a" and said["versions"]["hf_merge"] == hf_merge.__version__
    assert str(world) not in json.dumps(said)


def test_the_model_is_left_as_it_was(tmp_path):
    model = make("vit", 0).train()
    model.classifier.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    hf_merge.measure(model, [normal(2, 3, 8, 8)], "fisher", output=tmp_path / "f.safetensors")
    assert model.training and not model.classifier.weight.requires_grad
    assert all(p.equal(before[name]) and p.grad is None for name, p in model.named_parameters())


# recipes and the command line


def run(*words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    call = [sys.executable, "-m", "hf_merge.cli", *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.e2e
def test_the_command_line_measures_and_merges(world, tmp_path):
    for name in "ab":
        done = run(
            "measure", world / "vit" / name, world / "images", tmp_path / f"{name}.safetensors", "--what", "gram"
        )
        assert done.returncode == 0, done.stderr
    flags = [word for name in "ab" for word in ("--statistics", tmp_path / f"{name}.safetensors")]
    done = run("merge", "--method", "regmean", *models(world, "vit"), *flags, "-p", "scaling=0.8", tmp_path / "cli")
    assert done.returncode == 0, done.stderr
    words = {"statistics": [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "scaling": 0.8}
    python = hf_merge.merge(models(world, "vit"), tmp_path / "python", method="regmean", **words)
    both = [load_file(path / "model.safetensors") for path in (tmp_path / "cli", python.path)]
    assert all(both[0][name].equal(tensor) for name, tensor in both[1].items())
    pairs = [word for name in "ab" for word in (world / "gpt2" / name, world / "rows.jsonl")]
    done = run("measure", *pairs, tmp_path / "grams", "--what", "merged_gram")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "grams").iterdir()) == ["0.safetensors", "1.safetensors"]
    done = run("measure", world / "vit/a", tmp_path / "none.csv", tmp_path / "x.safetensors")
    assert done.returncode == 1 and "there is nothing at" in done.stderr
    assert run("measure", world / "vit/a", tmp_path / "x.safetensors").returncode == 2


def test_a_recipe_names_the_statistics_under_each_model_and_its_card_hides_where_they_lie(world, tmp_path):
    files = measured(world, "gpt2", "gram", tmp_path)
    entries = [{"model": str(m), "statistics": str(f)} for m, f in zip(models(world, "gpt2"), files, strict=True)]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"merge_method": "regmean", "models": entries}))
    merged = hf_merge.merge(tmp_path / "recipe.yaml", tmp_path / "out")
    card = (merged.path / "README.md").read_text()
    assert str(tmp_path) not in card and "a.safetensors" in card
    again = hf_merge.merge(merged.path / "hf_merge_recipe.yaml", tmp_path / "again") if (
        merged.path / "hf_merge_recipe.yaml").is_file() else merged  # fmt: skip
    assert load_file(again.path / "model.safetensors").keys() == load_file(merged.path / "model.safetensors").keys()
    model = hf_merge.from_pretrained(models(world, "gpt2"), method="regmean", statistics=files)
    weights = load_file(merged.path / "model.safetensors")
    assert model.state_dict()["transformer.h.0.attn.c_attn.weight"].equal(weights["transformer.h.0.attn.c_attn.weight"])


def test_a_base_gives_config_and_names_and_is_not_merged(world, tmp_path):
    files = measured(world, "bert", "gram", tmp_path)
    words = {"method": "regmean", "statistics": files}
    alone = hf_merge.merge(models(world, "bert"), tmp_path / "1", **words)
    based = hf_merge.merge(models(world, "bert"), tmp_path / "2", base_model=world / "bert/a", **words)
    for name, tensor in load_file(alone.path / "model.safetensors").items():
        assert tensor.equal(load_file(based.path / "model.safetensors")[name])


# what does not go


def refused(world, kind, **words):
    with pytest.raises(hf_merge.MergeError) as caught:
        hf_merge.merge(models(world, kind), world / "never", **words)
    assert not (world / "never").exists()
    return str(caught.value)


def test_statistics_of_another_model_are_refused(world, tmp_path):
    files = measured(world, "vit", "gram", tmp_path)
    assert "measured on another model ('b')" in refused(world, "vit", method="regmean", statistics=files[::-1])
    assert "they are of another model ('a')" in refused(world, "bert", method="regmean", statistics=files)


def test_statistics_that_lack_or_are_of_another_kind_are_refused(world, tmp_path):
    files = measured(world, "vit", "gram", tmp_path)
    assert "'regmean' needs the statistics 'gram'" in refused(world, "vit", method="regmean")
    assert "which has gram: measure" in refused(world, "vit", method="fisher", statistics=files)
    assert "which has gram: measure" in refused(world, "vit", method="regmean_plus_plus", statistics=files)
    assert "of '" + str(world / "vit/b") in refused(world, "vit", method="regmean", statistics=[files[0], None])
    assert "one for each" in refused(world, "vit", method="regmean", statistics=files[:1])
    assert "There are no statistics at" in refused(world, "vit", method="regmean", statistics=["no", "no"])
    weights = world / "vit/a/model.safetensors"
    assert "does not say what it holds" in refused(world, "vit", method="regmean", statistics=[weights, weights])


def test_a_gram_matrix_that_some_models_lack_is_refused_and_named(tmp_path):
    states = [{"w": normal(3, 3, seed=i), "v": normal(3, 3, seed=i)} for i in range(2)]
    grams = [{"w": torch.eye(3), "v": torch.eye(3)}, {"w": torch.eye(3)}]
    with pytest.raises(PlanError, match=r"has no 'gram' for tensors.*Tensors: v"):
        hf_merge.merge_state_dicts(states, method="regmean", statistics=grams)
    with pytest.raises(PlanError, match="shapes that do not fit"):
        hf_merge.merge_state_dicts(states, method="regmean", statistics=[{"w": torch.eye(4)}] * 2)
    with pytest.raises(hf_merge.ComputeError, match="has NaN or Inf"):
        hf_merge.merge_state_dicts(states, method="regmean", statistics=[{"w": torch.full((3, 3), float("nan"))}] * 2)
    with pytest.raises(ParameterError, match="needs gram="):
        hf_merge.get_method("regmean")([torch.eye(3)] * 2)


def test_labels_out_of_range_or_unknown_are_refused(world, tmp_path):
    words = {"what": "fisher", "targets": "data", "output": tmp_path / "f.safetensors"}
    for label, said in ((3, "the label 3, and the model has the classes 0 to 2"), (-1, "label -1"), ("ugly", "'ugly'")):
        with pytest.raises(DataError, match=said):
            hf_merge.measure(world / "bert/a", [{"text": "a cat", "label": label}], **words)
    with pytest.raises(DataError, match="has no labels"):
        hf_merge.measure(world / "bert/a", [{"text": "a cat"}], **words)
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_read_is_refused(world, tmp_path):
    words = {"what": "gram", "output": tmp_path / "g.safetensors"}
    (tmp_path / "broken.json").write_text("[{")
    for data, said in (
        ([], "is empty"), ([{"colour": 3}], "call the input 'text'"), (tmp_path / "broken.json", "be read"),
        (tmp_path, "has no images"), (17, "is a int"), ([3], "has a int as an example"),
        (tmp_path / "x.txt", "there is nothing at"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=said):
            hf_merge.measure(world / "bert/a", data, **words)
    with pytest.raises(DataError, match="has no column 'review'"):
        hf_merge.measure(world / "bert/a", world / "rows.json", columns={"text": "review"}, **words)
    with pytest.raises(DataError, match="no AutoImageProcessor"):
        hf_merge.measure(world / "bert/a", world / "images", **words)


def test_words_are_checked_before_anything_is_opened(tmp_path):
    for words, said in (
        ({"what": "gramm"}, "'what' should be one of"), ({"targets": "all"}, "'targets'"),
        ({"batch_size": 0}, "'batch_size'"),
        ({"max_examples": -1}, "'max_examples'"), ({"what": "merged_gram"}, "lists of models"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=said):
            hf_merge.measure("nowhere", [], **{"what": "gram", "output": tmp_path / "g.safetensors", **words})
    with pytest.raises(OutputError, match=r"call it 'g\.safetensors'"):
        hf_merge.measure("nowhere", [], "gram", output=tmp_path / "g")
    save_file({"x": torch.ones(1)}, tmp_path / "there.safetensors")
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        hf_merge.measure("nowhere", [], "gram", output=tmp_path / "there.safetensors")


def test_a_job_and_adapters_take_no_statistics(world, tmp_path):
    from hf_merge.jobs import run_merge_job

    entries = [{"model": name, "statistics": "a.safetensors"} for name in ("org/a", "org/b")]
    with pytest.raises(RecipeError, match="A job reads no statistics"):
        run_merge_job({"merge_method": "regmean", "models": entries}, "me/merged", flavor="cpu-basic", dry_run=True)
