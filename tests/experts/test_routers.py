"""Routers: made, saved, read, refused; and models that go by them."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import softmax
from transformers import ViTConfig, ViTModel

import hf_merge
from hf_merge.errors import DataError, MergeError, ParameterError, SourceError
from hf_merge.experts import routers
from hf_merge.experts.prototypes import fit_prototypes
from hf_merge.experts.routers import Router, RouterConfig, mlp, read_router, save_router
from tests.experts import families

TASKS = families.TASKS
CENTRES = {"pets": -1.0, "cars": 0.0, "dtd": 1.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return families.vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def folder(family, tmp_path):
    return family.merge(tmp_path / "merged")


def images(task, count, seed=0):
    """Images whose brightness tells the task."""
    noise = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed + len(task)))
    return 0.4 * noise + CENTRES[task]


def data(count=60, seed=0):
    return {task: [{"pixel_values": one} for one in images(task, count, seed).split(20)] for task in TASKS}


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- made


def test_the_networks_are_those_of_the_papers():
    twin, free = mlp("twin", 12, 4).layers, mlp("free", 12, 4).layers
    shapes = [tuple(one.weight.shape) for one in twin if isinstance(one, torch.nn.Linear)]
    assert shapes == [(24, 12), (24, 24), (4, 24)]
    names = [type(one).__name__ for one in twin]
    assert names == [*["Linear", "BatchNorm1d", "LeakyReLU", "Dropout"] * 2, "Linear"] and twin[3].p == 0.5
    assert [type(one).__name__ for one in free] == ["Linear", "ReLU", "Linear"]
    assert [tuple(one.weight.shape) for one in (free[0], free[2])] == [(256, 12), (4, 256)]


def test_one_prototype_for_each_task_is_linear_discriminant_analysis():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator)
    train = [torch.randn(24, 4, generator=generator) @ mix + shift for shift in (0.0, 0.5, 2.0)]
    head, config = fit_prototypes(RouterConfig("prototypes", TASKS, 4), train)
    assert config.prototypes == (1, 1, 1)
    rest = torch.cat([one - one.mean(0) for one in train]).double()
    n, p = rest.shape
    found = rest.T @ rest / n
    trace, squares = found.trace(), (found @ found).trace()
    share = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
    assert 0 < share < 1
    precision = torch.linalg.inv((1 - share) * found + share * trace / p * torch.eye(4).double())
    points = torch.randn(9, 4, generator=generator).double()
    distance = torch.stack([((points - one.double().mean(0)) @ precision * (points - one.double().mean(0))).sum(1)
                            for one in train], 1)  # fmt: skip
    assert torch.allclose(head(points.float()).softmax(1).double(), softmax(-distance / 2, 1), atol=1e-4)


def test_a_task_of_several_clusters_gets_several_prototypes():
    """Tasks with one mean, of which one lies on both sides of the other: no single prototype tells them apart."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.tensor([-6.0, 6.0]).repeat_interleave(100)[:, None] * torch.tensor([1.0, 0.0, 0.0])
    train = [torch.randn(200, 3, generator=generator), torch.randn(200, 3, generator=generator) + sides]
    head, config = fit_prototypes(RouterConfig("prototypes", ("in", "out"), 3), train)
    assert config.prototypes == (8, 8)
    known = [(head(each).argmax(1) == place).float().mean() for place, each in enumerate(train)]
    assert min(known) > 0.97


@pytest.mark.parametrize(
    "options",
    [{}, {"architecture": "twin"}, {"kind": "prototypes"}],
    ids=["free", "twin", "prototypes"],
)
def test_it_learns_the_tasks_the_same_by_the_same_seed_and_is_found_by_load_experts(folder, options):
    state = torch.get_rng_state()
    router = hf_merge.train_router(folder, data(), seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert router.config.accuracy > 0.9 and router.config.held_out == dict.fromkeys(TASKS, 12)
    assert abs(sum(router.config.accuracies.values()) / 3 - router.config.accuracy) < 1e-5
    assert same(router, hf_merge.train_router(folder, data(), seed=3, save=False, **options))
    if options.get("kind") != "prototypes":
        assert not same(router, hf_merge.train_router(folder, data(), seed=4, save=False, **options))
    model = hf_merge.load_experts(folder)
    assert same(model.router, router) and model.router.config == router.config
    told = json.loads((folder / "router" / "router.json").read_text())
    assert told["tasks"] == [*TASKS] and told["width"] == 32 and told["accuracy"] == router.config.accuracy
    assert told["architecture"] == {"prototypes": None}.get(router.config.kind, options.get("architecture", "free"))
    assert sorted(path.name for path in (folder / "router").iterdir()) == ["router.json", "router.safetensors"]
    known = [sum(one == task for one in model.route(images(task, 20, 9))) for task in TASKS]
    assert sum(known) > 54
    batch = torch.cat([images(task, 4, 9) for task in TASKS])
    tasks, out = model.route(batch), model(batch)
    assert out.tasks == tasks and model.task is None and {*tasks} == {*TASKS}
    for place, task in enumerate(tasks):
        assert torch.allclose(out.logits[place], model(batch[place : place + 1], task=task).logits[0], atol=1e-6)
    model.set_task("dtd")
    assert model(batch).logits.shape == (12, 5)  # a task that was set goes before the router
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_twin_mixes_softly_by_default_and_hard_if_told(family, tmp_path):
    folder = family.merge(tmp_path / "merged", "twin", mask_rate=0.5)
    hf_merge.train_router(folder, data())
    model = hf_merge.load_experts(folder)
    assert model.soft and model.router.config.architecture == "twin"
    batch = torch.cat([images(task, 1, 7) for task in TASKS])
    shares, mixtures = model.probabilities(batch), model.route(batch)
    assert torch.allclose(shares.sum(1), torch.ones(3)) and [*mixtures[0]] == [*TASKS]
    assert torch.equal(torch.tensor([[*one.values()] for one in mixtures]), shares)
    out = model(batch)
    for place, mixture in enumerate(mixtures):
        alone = model.set_task(mixture)(batch[place : place + 1]).logits[0]
        assert torch.allclose(out.logits[place], alone, atol=1e-6)
        assert out.tasks[place] == TASKS[int(shares[place].argmax())]
    model.set_task(None)
    assert hf_merge.train_router(folder, data(), soft=False).config.soft is False
    assert {*hf_merge.load_experts(folder).route(batch)} <= {*TASKS}


def test_features_of_the_backbone_whatever_task_is_set(folder, family):
    model = hf_merge.load_experts(folder)
    batch = images("cars", 4)
    features = model.features(batch)
    inner = model.model.vit(batch).last_hidden_state.mean(1)
    assert torch.equal(features, inner.detach())
    assert torch.equal(model.set_task("cars").features(pixel_values=batch), features) and model.task == "cars"


@pytest.mark.parametrize("kind", ["trained", "prototypes"])
def test_a_model_that_is_cast_goes_by_the_same_router(folder, kind):
    router = hf_merge.train_router(folder, data(), kind=kind)
    model = hf_merge.load_experts(folder).to(torch.bfloat16)
    assert same(model.router, router)
    batch = torch.cat([images(task, 8, 9) for task in TASKS])
    assert model(batch.bfloat16()).tasks.count("dtd") in range(6, 11)


def test_a_backbone_in_bfloat16_gets_a_router_from_images_in_float32(tmp_path):
    folder = families.vit_bf16(tmp_path / "vit").merge(tmp_path / "m")
    assert hf_merge.train_router(folder, data()).config.accuracy > 0.8
    batch = torch.cat([images(task, 2, 9) for task in TASKS]).bfloat16()
    assert len(hf_merge.load_experts(folder)(batch).tasks) == 6


def test_padding_does_not_count(tmp_path):
    model = hf_merge.load_experts(families.bert(tmp_path / "bert").merge(tmp_path / "m"))
    inputs = families.tokens(2)
    short = {name: tensor[1:, :5] for name, tensor in inputs.items()}
    assert torch.allclose(model.features(**inputs)[1], model.features(**short)[0], atol=1e-5)


# ---- an encoder of its own


def test_a_local_encoder_goes_with_the_router(folder, tmp_path):
    torch.manual_seed(1)
    small = {**families.VIT, "hidden_size": 16, "num_hidden_layers": 1, "image_size": 8}
    ViTModel(ViTConfig(**small), add_pooling_layer=False).save_pretrained(tmp_path / "small")
    half = {
        task: [{"pixel_values": one["pixel_values"][..., ::2, ::2]} for one in held] for task, held in data().items()
    }
    router = hf_merge.train_router(folder, half, encoder=tmp_path / "small")
    assert router.config.width == 16 and router.config.encoder == {"folder": "encoder"} and router.config.accuracy > 0.8
    (tmp_path / "small").rename(tmp_path / "gone")
    model, batch = hf_merge.load_experts(folder), images("pets", 3, 5)
    assert same(model.router, router)
    out = model(batch, router_inputs={"pixel_values": batch[..., ::2, ::2]})
    assert torch.equal(out.logits, model.set_task("pets")(batch).logits)
    with pytest.raises(ParameterError, match="The router's encoder, a ViTModel, does not take these inputs"):
        model.set_task(None)(batch)
    assert "the encoder beside it" in (folder / "README.md").read_text()


def test_an_encoder_that_is_none_is_refused(folder, tmp_path):
    with pytest.raises(SourceError, match=r"encoder '.*' cannot be loaded"):
        hf_merge.train_router(folder, data(), encoder=tmp_path)
    hf_merge.train_router(folder, data())
    model = hf_merge.load_experts(folder)
    with pytest.raises(ParameterError, match="router_inputs= are for a router with an encoder"):
        model(images("pets", 1), router_inputs={})


# ---- files


def test_an_interrupted_write_leaves_the_old_router(folder, monkeypatch):
    old = hf_merge.train_router(folder, data())
    new = hf_merge.train_router(folder, data(), kind="prototypes", save=False)
    for step in ("save_file", "asdict"):
        with monkeypatch.context() as patch:

            def breaks(*words, **more):
                raise KeyboardInterrupt

            patch.setattr(routers, step, breaks)
            with pytest.raises(KeyboardInterrupt):
                save_router(new, folder)
        assert same(read_router(folder, TASKS), old)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def _config(folder, **changes):
    path = folder / "router" / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cut(folder, name):
    path = folder / "router" / name
    path.write_bytes(path.read_bytes()[:100])


def _narrow(folder):
    path = folder / "router" / "router.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "mean": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: _config(folder, tasks=["pets", "boats", "dtd"]), "on the tasks pets, boats, dtd, and"),
        (lambda folder: _config(folder, tasks=["cars", "pets", "dtd"]), "on the tasks cars, pets, dtd, and"),
        (lambda folder: _config(folder, kind="oracle"), "is of the kind 'oracle'"),
        (lambda folder: _config(folder, format=9), "format 9"),
        (lambda folder: _config(folder, architecture="mlp"), "is damaged"),
        (lambda folder: _config(folder, tasks=3), "is damaged"),
        (lambda folder: _cut(folder, "router.json"), "is damaged"),
        (lambda folder: _cut(folder, "router.safetensors"), "is damaged"),
        (lambda folder: (folder / "router" / "router.safetensors").unlink(), "is damaged"),
        (_narrow, "is damaged, or not what its router.json says"),
    ],
    ids=["other tasks", "other order", "kind", "format", "architecture", "no list", "cut config", "cut weights",
         "no weights", "other shapes"],
)  # fmt: skip
def test_a_router_that_does_not_fit_is_named_with_the_way_out(folder, harm, told):
    hf_merge.train_router(folder, data(10), epochs=1)
    harm(folder)
    with pytest.raises(SourceError, match=re.escape(told)) as error:
        hf_merge.load_experts(folder)
    assert "train one with hf_merge.train_router, or load the model with router=None" in str(error.value)
    assert hf_merge.load_experts(folder, router=None).router is None


def test_a_router_of_another_width_or_other_tasks_is_refused_when_it_is_used(folder):
    wide = Router(RouterConfig("trained", TASKS, 48, architecture="free"), mlp("free", 48, 3))
    save_router(wide, folder)
    model = hf_merge.load_experts(folder)
    with pytest.raises(SourceError, match="features of the width 48, and the model's have 32"):
        model(images("pets", 2))
    other = Router(RouterConfig("trained", ("a", "b"), 32, architecture="free"), mlp("free", 32, 2))
    with pytest.raises(SourceError, match="The router knows the tasks a, b, and the model has pets, cars, dtd"):
        model.use_router(other)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "options", "error", "told"),
    [
        ({"boat": []}, {}, ParameterError, "the task 'boat', which the model has not"),
        ({"pets": None}, {}, ParameterError, "no examples of pets: a router needs some of every task"),
        ({"pets": [torch.zeros(3, 3, 16, 16)]}, {}, DataError, "'pets' has 3 examples: a router needs 5 or more"),
        ({"pets": "nowhere.csv"}, {}, DataError, "The data of 'pets': there is nothing at 'nowhere.csv'"),
        ({"pets": [torch.full((9, 3, 16, 16), math.nan)]}, {}, DataError, "features of 'pets' have NaN or Inf"),
        ({}, {"kind": "oracle"}, ParameterError, "'kind' should be trained or prototypes"),
        ({}, {"architecture": "twins"}, ParameterError, "Did you mean 'twin'?"),
        ({}, {"kind": "prototypes", "architecture": "twin"}, ParameterError, "prototypes have none"),
        ({}, {"held_out": 1.0}, ParameterError, "'held_out' should be between 0 and 1; found 1.0"),
        ({}, {"lr": 0.0}, ParameterError, "'lr' should be greater than 0"),
        ({}, {"batch_size": 1}, ParameterError, "'batch_size' should be 2 or more"),
    ],
    ids=["unknown task", "missing task", "few", "no file", "nan", "kind", "architecture", "both", "held out", "rate",
         "batch"],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_nothing_is_written(folder, change, options, error, told):
    given = {task: held for task, held in {**data(10), **change}.items() if held is not None}
    before = (folder / "README.md").read_text()
    with pytest.raises(error, match=re.escape(told)):
        hf_merge.train_router(folder, given, **options)
    assert not (folder / "router").exists() and (folder / "README.md").read_text() == before


def test_a_cache_is_not_routed(tmp_path):
    family = families.tied_llama(tmp_path / "llama")
    folder = family.merge(tmp_path / "m")
    texts = {task: [{"input_ids": torch.randint(low, low + 20, (12, 6))}] for task, low in (("pets", 3), ("cars", 40))}
    assert hf_merge.train_router(folder, texts).config.accuracy > 0.5
    model = hf_merge.load_experts(folder)
    ids = texts["pets"][0]["input_ids"][:1]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ParameterError, match="'past_key_values' holds"):
        model(input_ids=ids[:, :1], past_key_values=cache)


# ---- the command, the card, a copy


def test_the_command_reads_folders_of_images_and_writes_the_router(family, folder, tmp_path):
    from PIL import Image

    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}})
    )
    words = []
    for task in TASKS:
        (tmp_path / task).mkdir()
        pixels = ((images(task, 10) / 6 + 0.5).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
        for number, one in enumerate(pixels):
            Image.fromarray(one).save(tmp_path / task / f"{number}.png")
        words += ["--data", f"{task}={tmp_path / task}"]
    call = [sys.executable, "-m", "hf_merge.cli", "train-router", str(folder), *words, "--kind", "prototypes", "--json"]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kind"] == "prototypes" and float(told["accuracy"]) > 0.8
    assert hf_merge.load_experts(folder).router.config.prototypes == (1, 1, 1)
    bad = subprocess.run([*call[:5], "--data", "pets"], capture_output=True, text=True)
    assert bad.returncode == 2 and "--data takes TASK=PATH" in bad.stderr


def test_the_card_says_what_the_router_is_and_forgets_it_with_it(folder, tmp_path):
    before = (folder / "README.md").read_text()
    hf_merge.train_router(folder, data(), architecture="twin")
    router = hf_merge.train_router(folder, data())
    card = (folder / "README.md").read_text()
    assert card.count("## Router") == 1 and "as FREE-Merging has it" in card and "as Twin-Merging has it" not in card
    assert f"It knew the task of {100 * router.config.accuracy:.1f} %" in card
    model = hf_merge.load_experts(folder)
    assert same(hf_merge.load_experts(model.save_pretrained(tmp_path / "with")).router, router)
    bare = hf_merge.load_experts(folder, router=None).save_pretrained(tmp_path / "without")
    assert not (bare / "router").exists() and (bare / "README.md").read_text().strip() == before.strip()


def test_without_a_router_it_says_how_to_get_one(folder):
    with pytest.raises(MergeError, match=r"no router: say task=, or train one with hf_merge\.train_router"):
        hf_merge.load_experts(folder).route(images("pets", 1))
