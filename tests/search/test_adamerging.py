"""Learning coefficients: the authors' numbers, gradients by hand, whole models from files, and what is refused."""

import json
import math
import os
import subprocess
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import hf_merge
from hf_merge import recipe as recipes
from hf_merge import search
from hf_merge.errors import ComputeError, DataError, MergeError, OutputError, ParameterError
from hf_merge.search.backbone import Backbone, Piece
from hf_merge.search.written import with_weights
from tests.conftest import GOLDEN, make_tokenizer

PAPERS = GOLDEN / "papers"


# ---- the authors' numbers


class Toy(nn.Module):
    """The network of the golden case: a head of unit features, one for each task."""

    def __init__(self, state, head=None):
        super().__init__()
        self.fc1, self.ln, self.fc2 = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 8, bias=False)
        self.load_state_dict(state)
        if head is not None:
            self.head = nn.Parameter(head.clone())

    def forward(self, x):
        return F.normalize(self.fc2(torch.tanh(self.ln(self.fc1(x)))), dim=-1) @ self.head.T


@pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize("level", ["layer", "task"])
@pytest.mark.parametrize("steps", [1, 10])
def test_the_released_code_learns_the_same(level, steps):
    given, golden = (load_file(PAPERS / f"{name}.safetensors") for name in ("inputs_ada_toy", "adamerging_toy"))
    base = {name[5:]: tensor for name, tensor in given.items() if name.startswith("base/")}
    states = [{name: tensor + given[f"tau{i}/{name}"] for name, tensor in base.items()} for i in range(3)]
    models = {task: Toy(state, given[f"head_weight/{task}"]) for task, state in zip("ABC", states, strict=True)}
    data = {task: list(given[f"data/{task}"].flatten(0, 1)) for task in "ABC"}
    learnt = search.adamerging(models, Toy(base), data, level=level, steps=steps, batches_per_step=2, device="cpu")
    losses = torch.tensor([line["loss"] for line in learnt.log])
    assert float((losses - golden[f"{level}_wise/losses"][:steps]).abs().max()) < 2e-6
    expected = golden[f"{level}_wise/lambdas_trajectory"][steps, :, 1:]
    for i, task in enumerate("ABC"):
        found = learnt.coefficients[task]
        rows = [found] if level == "task" else [found[f"{n}"] for n in
                ("fc1.weight", "fc1.bias", "ln.weight", "ln.bias", "fc2.weight")]  # fmt: skip
        assert float((torch.tensor(rows) - expected[:, i]).abs().max()) < 2e-6


@pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")
def test_filtered_vectors_are_those_of_the_released_code():
    split = load_file(PAPERS / "ties_hfvit5.safetensors")
    given = load_file(PAPERS / "inputs_hfvit5.safetensors")
    base = {name[5:]: tensor for name, tensor in given.items() if name.startswith("base/")}
    models = [{n: given[f"ft{i}/{n}"] for n in base} for i in range(5)]
    prefixes = sorted({name.partition("/")[0] for name in split if name.startswith("split")})
    assert len(prefixes) == 5
    for i, prefix in enumerate(prefixes):
        weight = [float(k == i) for k in range(5)]
        merged = hf_merge.merge_state_dicts(models, method="adamerging_pp", base_model=base, weight=weight)
        for name in (key.partition("/")[2] for key in split if key.startswith(f"{prefix}/")):
            found = merged[name].double() - base[name].double()
            assert float((found - split[f"{prefix}/{name}"].double()).abs().max()) < 5e-7, name


def test_filtered_with_one_weight_is_ties():
    torch.manual_seed(0)
    base, *models = ({"a": torch.randn(40), "b": torch.randn(5, 9)} for _ in range(4))
    one = hf_merge.merge_state_dicts(models, method="adamerging_pp", base_model=base, weight=0.3)
    two = hf_merge.merge_state_dicts(
        models, method="ties", base_model=base, scope="global", consensus="sum", density=0.2, lambda_=0.3
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-6, rtol=0) for name in base)


# ---- gradients by hand


@pytest.mark.parametrize("level", ["layer", "task"])
def test_gradient_is_that_of_autograd_through_the_merge(level):
    torch.manual_seed(0)
    x, shapes = torch.randn(7, 5), {"weight": (3, 5), "bias": (3,)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    taus = [{name: 0.3 * torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
    raw = torch.rand(2 if level == "layer" else 1, 2, requires_grad=True)

    def entropy(logits):
        logs = logits.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1).mean()

    row = {name: i if level == "layer" else 0 for i, name in enumerate(shapes)}
    merged = {n: base[n] + sum(raw[row[n], k] * tau[n] for k, tau in enumerate(taus)) for n in shapes}
    entropy(F.linear(x, weight=merged["weight"], bias=merged["bias"])).backward()

    module = nn.Linear(5, 3)
    pieces = [Piece(n, base[n].flatten(), [tau[n].flatten() for tau in taus], torch.float32) for n in shapes]
    backbone = Backbone(pieces, shapes, level)
    backbone.add(module, {})
    backbone.write(raw.detach())
    entropy(module(x)).backward()
    assert float((backbone.take_gradient() - raw.grad).abs().max()) < 1e-6
    assert all(parameter.grad is None for parameter in module.parameters())


# ---- whole models from files


def changed(model, seed, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def save(model, folder, like=None, seed=0):
    """Save a model; its backbone is that of another one, and changed."""
    if like is not None:
        state = like.state_dict()
        own = model.state_dict()
        model.load_state_dict({n: state[n] if n in state and state[n].shape == t.shape else t for n, t in own.items()})
        changed(model, seed)
    model.save_pretrained(folder)
    return folder


IMAGE = {
    "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def draw(folder, count, seed, labels=("",)):
    generator = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        place = folder / labels[i % len(labels)]
        place.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (16, 16), pixels.numpy().tobytes()).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """A tiny ViT without a head, fine-tunes with heads of 3 and 5 classes, and images for both."""
    root = tmp_path_factory.mktemp("vits")
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    head = ViTForImageClassification(ViTConfig(**sizes, num_labels=2))
    save(head, root / "base")
    save(ViTModel(ViTConfig(**sizes)), root / "headless")
    for i, (task, count) in enumerate({"a": 3, "b": 5}.items()):
        save(ViTForImageClassification(ViTConfig(**sizes, num_labels=count)), root / task, head, i + 1)
        (root / task / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor",
                                                                          **IMAGE}))  # fmt: skip
        draw(root / f"images_{task}", 12, i)
    return root


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    config = CLIPVisionConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                              num_attention_heads=2)  # fmt: skip
    torch.manual_seed(0)
    tower = CLIPVisionModel(config)
    save(tower, root / "base")
    for i, (task, count) in enumerate({"a": 3, "b": 4}.items()):
        full = CLIPConfig(vision_config=config.to_dict(), num_labels=count)
        model = CLIPForImageClassification(full)
        state = {n if n in model.state_dict() else f"vision_model.{n}": t for n, t in tower.state_dict().items()}
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        changed(model, i + 1).save_pretrained(root / task)
        (root / task / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor",
                                                                          **IMAGE}))  # fmt: skip
        draw(root / f"images_{task}", 8, i)
    return root


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    root = tmp_path_factory.mktemp("berts")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (root / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**sizes, num_labels=2))
    save(base, root / "base")
    for i, (task, labels) in enumerate({"a": ["bad", "good"], "b": ["no", "yes"]}.items()):
        names = dict(enumerate(labels))
        config = BertConfig(**sizes, id2label=names, label2id={one: i for i, one in names.items()})
        save(BertForSequenceClassification(config), root / task, base, i + 1)
        BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / task)
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(0, 59, (3 + n % 4,), generator=generator)) for n in range(12)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": "good"}) + "\n" for t in texts))
    (root / "b.csv").write_text("text,label\n" + "".join(f"{t},1\n" for t in texts[::-1]))
    return root


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for i, task in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(i)
        lines = [" ".join(f"w{i}" for i in torch.randint(0, 59, (4 + n % 5,), generator=generator)) for n in range(8)]
        (root / f"{task}.json").write_text(json.dumps([{"text": line} for line in lines]))
    return root


def same_as_merged(learnt, tmp_path, task):
    """The recipe, through a file and `merge`, gives bit for bit the weights that were run last."""
    path = learnt.save(tmp_path / "found.yaml")
    merged = load_file(hf_merge.merge(path, tmp_path / "merged").path / "model.safetensors")
    live = load_file_of(learnt.models[task], tmp_path / "live")
    compared = 0
    for name, tensor in merged.items():
        own = next((key for key in (name, f"vit.{name}", f"vision_model.{name}") if key in live), None)
        if name in learnt.heads or own is None:
            continue
        assert torch.equal(live[own].to(tensor.dtype), tensor), name
        compared += 1
    return compared


def load_file_of(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def mean_loss(learnt, count=4):
    losses = [line["loss"] for line in learnt.log]
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


@pytest.mark.parametrize("base", ["base", "headless"])
@pytest.mark.parametrize("level", ["layer", "task"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_vision_transformer_from_folders_of_images(vits, tmp_path, base, level, filtered):
    learnt = search.adamerging(
        [vits / "a", vits / "b"], vits / base, {task: vits / f"images_{task}" for task in "ab"},
        level=level, filtered=filtered, steps=12, learning_rate=0.02, batch_size=12, device="cpu",
    )  # fmt: skip
    first, last = mean_loss(learnt, 2)
    assert last < first
    assert set(learnt.heads) == ({"classifier.weight", "classifier.bias"} if base == "base" else set())
    assert same_as_merged(learnt, tmp_path, "b") > 30
    assert [m.classifier.out_features for m in learnt.models.values()] == [3, 5]
    own = ViTForImageClassification.from_pretrained(vits / "a").classifier.weight
    assert torch.equal(learnt.models["a"].classifier.weight, own)


def test_twice_is_the_same(vits):
    words = {"steps": 4, "batch_size": 4, "learning_rate": 0.02, "seed": 3, "device": "cpu"}
    data = {task: vits / f"images_{task}" for task in "ab"}
    one, two, other = (
        search.adamerging([vits / "a", vits / "b"], vits / "base", data, **{**words, "seed": seed})
        for seed in (3, 3, 4)
    )
    assert one.recipe == two.recipe and one.log == two.log
    assert one.log != other.log


def test_a_recipe_may_name_the_models(vits, tmp_path):
    written = {"merge_method": "ties", "base_model": str(vits / "base"), "models": [str(vits / "a"), str(vits / "b")]}
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    data = {str(vits / "a"): vits / "images_a", "b": vits / "images_b"}  # by the model, or the last part of its path
    words = {"steps": 2, "batch_size": 4, "level": "task", "device": "cpu"}
    learnt = hf_merge.search.adamerging(
        tmp_path / "recipe.json", data=data, output=tmp_path / "new" / "found.yaml", **words
    )
    again = search.adamerging([vits / "a", vits / "b"], vits / "base", {t: vits / f"images_{t}" for t in "ab"}, **words)
    assert learnt.coefficients == again.coefficients and learnt.recipe.merge_method == "task_arithmetic"
    assert hf_merge.Recipe.load(tmp_path / "new" / "found.yaml") == again.recipe


def test_a_clip_tower_under_heads(clips, tmp_path):
    learnt = search.adamerging(
        {"a": clips / "a", "b": clips / "b"}, clips / "base", {task: clips / f"images_{task}" for task in "ab"},
        steps=10, learning_rate=0.02, batch_size=8, device="cpu",
    )  # fmt: skip
    first, last = mean_loss(learnt, 2)
    assert last < first
    assert same_as_merged(learnt, tmp_path, "a") > 30
    assert any(value != 0.3 for value in learnt.coefficients["a"].values())


def test_a_bert_through_the_command_line(berts, tmp_path):
    output = tmp_path / "found.yaml"
    call = ["search", "adamerging", berts / "a", berts / "b", output, "--base", berts / "base", "--data",
            f"a={berts / 'a.jsonl'}", "--data", f"b={berts / 'b.csv'}", "--steps", "10", "--learning-rate", "0.02",
            "--batch-size", "12", "--device", "cpu"]  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "error", "-m", "hf_merge.cli", *map(str, call)], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert len(log) == 10 and log[-1]["loss"] < log[0]["loss"] and set(log[0]["tasks"]) == {"a", "b"}
    merged = hf_merge.merge(output, tmp_path / "merged")
    learnt = search.adamerging(
        [berts / "a", berts / "b"], berts / "base", {"a": berts / "a.jsonl", "b": berts / "b.csv"},
        steps=10, learning_rate=0.02, batch_size=12, device="cpu",
    )  # fmt: skip
    assert set(learnt.heads) == {"classifier.weight", "classifier.bias"}  # by the labels
    written = load_file(merged.path / "model.safetensors")
    live = load_file_of(learnt.models["a"], tmp_path / "live")
    assert all(torch.equal(written[n], live[n]) for n in written if n not in learnt.heads)


@pytest.mark.parametrize("objective", ["kl-to-experts", "features"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_causal_language_model(llamas, texts, tmp_path, objective, filtered):
    learnt = search.adamerging(
        [llamas["a"], llamas["b"]], llamas["base"], {task: texts / f"{task}.json" for task in "ab"},
        objective=objective, filtered=filtered, density=0.6, steps=10, learning_rate=0.02, batch_size=8, device="cpu",
    )  # fmt: skip
    first, last = mean_loss(learnt, 2)
    assert last < first
    assert learnt.heads == () and same_as_merged(learnt, tmp_path, "a") == 30
    assert learnt.models["a"].model is not None


def test_weights_of_one_model_go_back_to_it(llamas, texts):
    """With one task the distance to its own model is least at coefficient 1."""
    learnt = search.adamerging(
        {"a": llamas["a"]}, llamas["base"], {"a": texts / "a.json"}, objective="kl-to-experts", level="task",
        initial=0.5, steps=60, learning_rate=0.02, batch_size=8, device="cpu",
    )  # fmt: skip
    assert learnt.coefficients["a"] > 0.95 and learnt.log[-1]["loss"] < learnt.log[0]["loss"] / 50


def test_models_in_bfloat16_and_task_vectors_in_bfloat16(llamas, texts, tmp_path):
    for name in ("base", "a", "b"):
        AutoModelForCausalLM.from_pretrained(llamas[name], dtype="bfloat16").save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    words = {"objective": "kl-to-experts", "steps": 3, "learning_rate": 0.02, "batch_size": 8, "device": "cpu"}
    data = {task: texts / f"{task}.json" for task in "ab"}
    models = [tmp_path / "a", tmp_path / "b"]
    exact = search.adamerging(models, tmp_path / "base", data, **words)
    assert same_as_merged(exact, tmp_path, "a") == 30
    short = search.adamerging(models, tmp_path / "base", data, dtype="bfloat16", **words)
    assert short.log[-1]["loss"] == pytest.approx(exact.log[-1]["loss"], rel=0.02)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_adapters_on_their_base_are_models_too(llamas, texts, tmp_path):
    for i, task in enumerate("ab"):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(i)
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llamas["base"]), config)
        adapted.save_pretrained(tmp_path / task)
    models = {task: f"{llamas['base']}+{tmp_path / task}" for task in "ab"}
    learnt = search.adamerging(
        models, llamas["base"], {task: texts / f"{task}.json" for task in "ab"},
        objective="kl-to-experts", steps=6, learning_rate=0.02, batch_size=8, device="cpu",
    )  # fmt: skip
    assert learnt.log[-1]["loss"] < learnt.log[0]["loss"]
    assert same_as_merged(learnt, tmp_path, "a") == 30


def test_recipes_name_tensors_whose_names_hold_one_another():
    recipe = hf_merge.Recipe.load(["x", "y"], method="task_arithmetic", base_model="b")
    weights = {"head.weight": 0.1, "lm_head.weight": 0.2, "weight": 0.3}
    made = with_weights(recipe, [weights, 0.5])
    base, model = ({name: torch.full((1,), value) for name in weights} for value in (0.0, 1.0))
    entries = [{"model": recipes.in_memory(one, label), "parameters": entry.parameters}
               for label, one, entry in zip("xy", (model, {**base}), made.models, strict=True)]  # fmt: skip
    merged = hf_merge.merge_state_dicts({"models": entries}, method="task_arithmetic", base_model=base)
    assert {name: round(float(tensor), 6) for name, tensor in merged.items()} == weights


# ---- what is refused


def ask(vits, **changes):
    words = {
        "models": [vits / "a", vits / "b"], "base_model": vits / "base", "steps": 2, "batch_size": 4, "device": "cpu",
        "data": {task: vits / f"images_{task}" for task in "ab"}, **changes,
    }  # fmt: skip
    return search.adamerging(words.pop("models"), words.pop("base_model"), words.pop("data"), **words)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model": None}, "base_model="),
        ({"data": None}, "the tasks are a, b"),
        ({"data": {"a": []}}, "no data of 'b'"),
        ({"data": {"a": [], "bb": []}}, "Did you mean 'b'"),
        ({"steps": 0}, "'steps' should be at least 1"),
        ({"initial": 1.5}, "'initial' should be in"),
        ({"learning_rate": math.nan}, "'learning_rate'"),
        ({"level": "layers"}, "Did you mean 'layer'"),
        ({"objective": "kl"}, "'objective' should be"),
        ({"heads": ["score"]}, "no tensor is called so"),
        ({"classes": {"a": [0, 7]}}, "the head has 3: 0 to 2"),
        ({"classes": {"c": [0]}}, "names 'c'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(vits, changes, told):
    with pytest.raises(ParameterError, match=told):
        ask(vits, **changes)


def test_a_model_that_equals_the_base_has_no_task_vector(llamas, texts):
    data = {"base": texts / "a.json", "b": texts / "b.json"}
    live = AutoModelForCausalLM.from_pretrained(llamas["base"])
    with pytest.raises(ParameterError, match="no task vector"):
        search.adamerging({"base": live, "b": llamas["b"]}, llamas["base"], data, objective="kl-to-experts", steps=1,
                          device="cpu")  # fmt: skip


def test_heads_that_cannot_be_told_apart_are_asked_for(berts, tmp_path):
    for task in "ab":
        model = AutoModelForSequenceClassification.from_pretrained(berts / task)
        model.config.id2label, model.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
        model.save_pretrained(tmp_path / task)
        BertTokenizer(str(berts / "vocab.txt")).save_pretrained(tmp_path / task)
    words = {"steps": 1, "batch_size": 4, "device": "cpu"}
    models, data = [tmp_path / "a", tmp_path / "b"], {"a": berts / "a.jsonl", "b": berts / "b.csv"}
    with pytest.raises(ParameterError, match=r"cannot be told apart.*heads=\["):
        search.adamerging(models, berts / "base", data, **words)
    kept = search.adamerging(models, berts / "base", data, heads=["classifier"], **words)
    assert len(kept.heads) == 2
    assert search.adamerging(models, berts / "base", data, heads=[], **words).heads == ()


def test_infinite_losses_and_nan_are_errors(vits, tmp_path):
    images = {task: [{"pixel_values": torch.full((2, 3, 16, 16), math.nan)}] for task in "ab"}
    with pytest.raises(ComputeError, match="loss of 'a' is nan"):
        ask(vits, data=images)
    live = ViTForImageClassification.from_pretrained(vits / "a")
    with torch.no_grad():
        live.vit.layernorm.weight[0] = math.inf
    with pytest.raises(MergeError, match="NaN or Inf"):
        ask(vits, models={"a": live, "b": vits / "b"})


def test_models_without_classes_are_told_of_the_other_objectives(vits, tmp_path):
    with pytest.raises(ComputeError, match="has no logits: choose objective="):
        search.adamerging({"a": changed(ViTModel.from_pretrained(vits / "headless"), 1)}, vits / "headless",
                          {"a": [{"pixel_values": torch.zeros(2, 3, 16, 16)}]}, steps=1, device="cpu")  # fmt: skip


def test_batches_that_the_model_does_not_take_are_told(vits):
    wrong = {task: [{"pixel_values": torch.zeros(2, 3, 99, 16)}] for task in "ab"}
    with pytest.raises(ComputeError, match="'a': the model does not run on a batch of pixel_values"):
        ask(vits, data=wrong)


BATCH = {"input_ids": torch.arange(24).view(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
KINDS = {
    "experts": (MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=4), "kl-to-experts", BATCH),
    "tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True), "kl-to-experts", BATCH),
    "decoder": (T5ForConditionalGeneration, T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8,
                vocab_size=64, decoder_start_token_id=0), "features", BATCH),
    "buffers": (ResNetModel, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), "features",
                {"pixel_values": torch.linspace(-1, 1, 6144).view(2, 3, 32, 32)}),
}  # fmt: skip
"""Models whose tensors lie otherwise in memory than in the file, or are no weights, or have a decoder."""


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_found_wherever_they_lie_in_the_model(kind, tmp_path):
    model_class, config, objective, batch = KINDS[kind]
    torch.manual_seed(0)
    base = model_class(config)
    base.save_pretrained(tmp_path / "base")
    for i, task in enumerate("ab"):
        model = model_class(config)
        model.load_state_dict(base.state_dict())
        changed(model, i + 1).save_pretrained(tmp_path / task)
    learnt = search.adamerging([tmp_path / "a", tmp_path / "b"], tmp_path / "base", {"a": [batch], "b": [batch]},
                               objective=objective, steps=6, learning_rate=0.02, device="cpu")  # fmt: skip
    assert learnt.log[-1]["loss"] < learnt.log[0]["loss"]
    merged = hf_merge.from_pretrained(learnt.recipe).state_dict()
    live = learnt.models["b"].state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in merged.items())
    unlearnt = {name for name, value in learnt.coefficients["a"].items() if value == 0.3}
    assert all("running" in name for name in unlearnt) and bool(unlearnt) == (kind == "buffers")


def test_data_that_is_empty_or_not_there_is_told(vits):
    with pytest.raises(DataError, match="The data of 'a' is empty"):
        ask(vits, data={"a": [], "b": []})
    with pytest.raises(DataError, match=r"The data of 'b': there is nothing at .*none\.csv"):
        ask(vits, models=["no model", "b"], data={"no model": [], "b": vits / "none.csv"})  # before models are opened


def test_an_iterator_that_ends_is_told(vits):
    images = {task: iter([{"pixel_values": torch.zeros(2, 3, 16, 16)}]) for task in "ab"}
    with pytest.raises(DataError, match="ended before the last step"):
        ask(vits, data=images)


def test_models_in_memory_are_no_recipe_on_disk(vits, tmp_path):
    live = ViTForImageClassification.from_pretrained(vits / "a")
    images = {task: [{"pixel_values": torch.randn(2, 3, 16, 16)}] for task in "ab"}
    learnt = ask(vits, models={"a": live, "b": vits / "b"}, data=images)
    before = ViTForImageClassification.from_pretrained(vits / "a").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in live.state_dict().items())  # left as it was
    with pytest.raises(OutputError, match="models in memory"):
        learnt.save(tmp_path / "found.yaml")


@pytest.mark.slow
def test_on_the_demos_models_it_beats_the_average_and_task_arithmetic(demo_run):
    from hf_merge import demo

    folder, tasks = demo_run / "models", list(demo.TASKS)
    images = {task: demo._images(task, 512, torch.Generator().manual_seed(77 + i))[0] for i, task in enumerate(tasks)}
    learnt = search.adamerging(
        [folder / task for task in tasks], folder / "base",
        {task: [{"pixel_values": some} for some in images[task].split(16)] for task in tasks},
        objective="kl-to-experts", steps=150, learning_rate=0.01, device="cpu",
        classes={task: list(range(len(demo.LABELS)))[demo._span(task)] for task in tasks},
    )  # fmt: skip
    tests = {task: demo._images(task, 400, demo._generator(0, "test")) for task in tasks}
    found = demo._row("found", hf_merge.from_pretrained(learnt.recipe), tests).average
    others = [demo._row(m, demo._load(demo_run / "merges" / m), tests).average for m in ("linear", "task_arithmetic")]
    assert found > max(others) + 0.02
