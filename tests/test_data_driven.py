"""Merging by data, from local files to a merged model, by the command line and by Python, for every kind of model."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import hf_merge
from hf_merge import cli, search
from tests.conftest import make_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT = {"image_size": 16, "patch_size": 8}
WORDS = {"vocab_size": 64, "max_position_embeddings": 32}
HIERA = {
    "embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
    "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "query_stride": [2, 2], "masked_unit_size": [4, 4],
    "masked_unit_attention": [True, False],
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model class, its config, the data it takes, and what AdaMerging makes small."""

    model: str
    config: str
    sizes: dict
    data: str
    objective: str = "entropy"


KINDS = {
    "vit": Kind("ViTForImageClassification", "ViTConfig", {**SIZES, **SIGHT}, "images"),
    "clip": Kind("CLIPForImageClassification", "CLIPConfig", {"vision_config": {**SIZES, **SIGHT}}, "images"),
    "fused": Kind("HieraForImageClassification", "HieraConfig", HIERA, "images"),
    "tower": Kind("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**SIZES, **SIGHT}, "images", "features"),
    "fused tower": Kind("Blip2VisionModel", "Blip2VisionConfig", {**SIZES, **SIGHT}, "images", "features"),
    "bert": Kind("BertForSequenceClassification", "BertConfig", {**SIZES, **WORDS}, "texts.csv"),
    "causal": Kind("LlamaForCausalLM", "LlamaConfig", {**SIZES, **WORDS, "num_key_value_heads": 2}, "texts.jsonl",
                   "kl-to-experts"),
}  # fmt: skip
"""Towers with split and fused projections have no head, so that nothing has a likelihood."""
LABELS = {"a": ["cat", "dog", "cow"], "b": ["bad", "good", "mixed"]}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


def config_of(kind, labels):
    names = dict(enumerate(labels))
    config = getattr(transformers, kind.config)(**kind.sizes)
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    return config


@pytest.fixture(scope="module", params=KINDS)
def world(request, tmp_path_factory):
    """A kind, and a folder with a base, two fine-tunes of it with labels of their own, and data of each."""
    kind, root = KINDS[request.param], tmp_path_factory.mktemp("world")
    model_class = getattr(transformers, kind.model)
    torch.manual_seed(0)
    base = model_class(config_of(kind, LABELS["a"]))
    base.save_pretrained(root / "base")
    for seed, (task, labels) in enumerate(LABELS.items()):
        generator, tune = torch.Generator().manual_seed(seed), model_class(config_of(kind, labels))
        tune.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in tune.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        tune.save_pretrained(root / task)
        make_tokenizer().save_pretrained(root / task)
        (root / task / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        write_data(root / f"data_{task}", labels, generator)
    return kind, root


def write_data(folder, labels, generator):
    rows = []
    for i in range(6):
        label = labels[i % len(labels)]
        pixels = torch.randint(256, (16, 16, 3), generator=generator).byte()
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / "images" / label / f"{i}.png")
        numbers = torch.randint(60, (4 + i % 3,), generator=generator).tolist()
        rows.append({"text": " ".join(f"w{number}" for number in numbers), "label": label})
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.csv").write_text("\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]))


def run(monkeypatch, *words):
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["hf-merge", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def load(folder):
    return load_file(Path(folder) / "model.safetensors")


def loads(folder, kind):
    _, info = getattr(transformers, kind.model).from_pretrained(folder, output_loading_info=True)
    return not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])


def statistics(path):
    """Return statistics by name; what several tensors share, under all of their names."""
    found = load_file(path)
    with safe_open(path, "pt") as file:
        same = json.loads(file.metadata()["hf_merge.statistics"]).get("same_as", {})
    return {**found, **{name: found[other] for name, other in same.items()}}


SCALING, RIDGE = 0.8, 0.05
MEASURED = {"fisher": "fisher", "regmean": "gram", "regmean_plus_plus": "merged_gram"}


def by_regression(name, weights, grams):
    """(sum_t G_t)^-1 sum_t G_t W_t, each G_t with its off-diagonals scaled and a ridge on its diagonal."""
    mine = [one[name].double() for one in grams]
    ridge = RIDGE * sum(float(gram.diagonal().mean()) for gram in mine) / len(mine)
    scaled = [SCALING * g + (1 - SCALING) * g.diag().diag() + ridge * torch.eye(len(g)).double() for g in mine]
    columns = [one[name].double().flatten(1).T for one in weights]
    solved = torch.linalg.solve(sum(scaled), sum(g @ w for g, w in zip(scaled, columns, strict=True)))
    return solved.T.reshape(weights[0][name].shape)


def by_information(name, weights, fishers):
    """Sum_t c_t (F_t + floor) theta_t / sum_t c_t (F_t + floor)."""
    norms = [sum(one.double().square().sum() for one in fisher.values()).sqrt() for fisher in fishers]
    shares = [(fisher[name].double() + 1e-6) / (norm + 1e-6) for fisher, norm in zip(fishers, norms, strict=True)]
    return sum(share * one[name].double() for share, one in zip(shares, weights, strict=True)) / sum(shares)


def measure(monkeypatch, method, root, data, output):
    """Measure both models through the command line and in Python; return both lists of files."""
    what, given = MEASURED[method], [(root / task, root / f"data_{task}" / data) for task in "ab"]
    if what == "merged_gram":
        words = ["--what", what, "--scaling", SCALING, "--ridge", RIDGE]
        assert run(monkeypatch, "measure", *given[0], *given[1], output / "cli", *words) == 0
        models, sets = zip(*given, strict=True)
        python = hf_merge.measure(models, sets, what, output=output / "python", scaling=SCALING, ridge=RIDGE)
        return [output / "cli" / f"{i}.safetensors" for i in range(2)], python
    targets = {"targets": "data"} if what == "fisher" else {}
    files = [[output / f"{way}{i}.safetensors" for i in range(2)] for way in ("cli", "python")]
    for i, (model, one) in enumerate(given):
        flags = [word for key, value in targets.items() for word in (f"--{key}", value)]
        assert run(monkeypatch, "measure", model, one, files[0][i], "--what", what, *flags) == 0
        hf_merge.measure(model, one, what, output=files[1][i], **targets)
    return files


@pytest.mark.parametrize("method", MEASURED)
def test_measured_and_merged_by_the_command_line_and_python_is_the_formula(
    world, method, monkeypatch, tmp_path, capsys
):
    kind, root = world
    data = root / "data_a" / kind.data
    if method == "fisher" and kind.objective == "features":
        assert run(monkeypatch, "measure", root / "a", data, tmp_path / "f.safetensors", "--what", "fisher") == 1
        assert f"{kind.model} gives no logits" in capsys.readouterr().err and not list(tmp_path.iterdir())
        return
    files, again = measure(monkeypatch, method, root, kind.data, tmp_path)
    assert [one.read_bytes() for one in files] == [one.read_bytes() for one in again]
    models, given = [root / "a", root / "b"], [word for file in files for word in ("--statistics", file)]
    parameters = {} if method == "fisher" else {"scaling": SCALING, "ridge": RIDGE}
    flags = [word for key, value in parameters.items() for word in ("-p", f"{key}={value}")]
    assert run(monkeypatch, "merge", "--method", method, *models, *given, *flags, tmp_path / "one") == 0
    hf_merge.merge(models, tmp_path / "two", method=method, statistics=files, **parameters)
    merged, weights, known = load(tmp_path / "one"), [*map(load, models)], [*map(statistics, files)]
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load(tmp_path / "two").items())
    assert loads(tmp_path / "one", kind)
    formula, moved = by_information if method == "fisher" else by_regression, 0
    for name, tensor in merged.items():
        mean = (weights[0][name] + weights[1][name]) / 2
        wanted = formula(name, weights, known) if name in known[0] else mean.double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)
        moved += name in known[0] and not torch.allclose(tensor, mean, atol=1e-3)
    assert moved > 5


def test_coefficients_learnt_by_the_command_line_and_python_are_the_same_and_the_merge_is_the_formula(
    world, monkeypatch, tmp_path
):
    kind, root = world
    data = {task: root / f"data_{task}" / kind.data for task in "ab"}
    words = ["--base", root / "base", "--steps", 4, "--learning-rate", 0.02, "--batch-size", 6, "--device", "cpu",
             "--objective", kind.objective]  # fmt: skip
    pairs = [word for task in "ab" for word in ("--data", f"{task}={data[task]}")]
    assert run(monkeypatch, "search", "adamerging", root / "a", root / "b", tmp_path / "f.yaml", *pairs, *words) == 0
    learnt = search.adamerging(
        [root / "a", root / "b"], root / "base", data, steps=4, learning_rate=0.02, batch_size=6, device="cpu",
        objective=kind.objective, output=tmp_path / "g.yaml",
    )  # fmt: skip
    assert (tmp_path / "f.yaml").read_bytes() == (tmp_path / "g.yaml").read_bytes()
    assert learnt.log[-1]["loss"] < learnt.log[0]["loss"]
    assert len(learnt.heads) == (2 if kind.objective == "entropy" else 0)
    assert run(monkeypatch, "merge", tmp_path / "f.yaml", tmp_path / "merged") == 0
    assert loads(tmp_path / "merged", kind)
    merged, base, *tunes = (load(folder) for folder in (tmp_path / "merged", root / "base", root / "a", root / "b"))
    found, learnt_of = learnt.coefficients, 0
    for name, tensor in merged.items():
        taus = [] if name in learnt.heads else [(found[task][name], tune[name] - base[name])
                                                for task, tune in zip("ab", tunes, strict=True)]  # fmt: skip
        wanted = base[name] + sum(coefficient * tau for coefficient, tau in taus)
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6, msg=name)
        learnt_of += any(abs(coefficient - 0.3) > 1e-3 for coefficient, _ in taus)
    assert learnt_of > len(merged) / 2
