"""A backbone with task experts, as it runs: each task's weights to the bit, batches of several, what is refused."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_merge
from hf_merge._compat import Conversion
from hf_merge.errors import MergeError, OutputExistsError, ParameterError, SourceError
from tests.experts import families
from tests.experts.families import METHODS, TASKS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Families by their makers' names."""
    found = {}

    def get(maker):
        if maker.__name__ not in found:
            found[maker.__name__] = maker(tmp_path_factory.mktemp(maker.__name__))
        return found[maker.__name__]

    return get


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    """The tiny ViTs by EMR, on disk."""
    return made(families.vit).merge(tmp_path_factory.mktemp("merged") / "m")


@pytest.fixture
def model(merged):
    return hf_merge.load_experts(merged)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- exactness


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("maker", families.FAMILIES, ids=lambda maker: maker.__name__)
def test_every_task_has_the_weights_of_the_formula_to_the_bit(made, maker, method, tmp_path):
    family = made(maker)
    memory = family.in_memory(method, **METHODS[method])
    model = hf_merge.load_experts(family.merge(tmp_path / "m", method, **METHODS[method]))
    own = bits(model.model)
    for place, task in [*enumerate(family.models), *enumerate(family.models)]:
        wanted = memory.reconstruct(place)
        live = Conversion(model.set_task(task).model).live(wanted)
        state = model.model.state_dict()
        assert len({*live.values()}) == len(wanted)
        for name, tensor in wanted.items():
            assert torch.equal(state[live[name]], tensor), name
            assert state[live[name]].dtype == tensor.dtype
        changed = [name for name in wanted if own[live[name]].shape != wanted[name].shape
                   or not torch.equal(own[live[name]], wanted[name])]  # fmt: skip
        assert changed
    assert same(bits(model.set_task(None).model), own)


def test_outputs_are_those_of_a_model_with_the_weights_of_the_task(made, merged, model):
    memory = made(families.vit).in_memory()
    kind = type(model.model)
    for place, task in enumerate(TASKS):
        alone = kind.from_pretrained(made(families.vit).models[task])
        live = Conversion(alone).live(memory.reconstruct(place))
        alone.load_state_dict({live[name]: tensor for name, tensor in memory.reconstruct(place).items()})
        inputs = families.images(4)
        assert torch.equal(model(**inputs, task=task).logits, alone.eval()(**inputs).logits)


def test_tied_embeddings_change_together(made, tmp_path):
    model = hf_merge.load_experts(made(families.tied_llama).merge(tmp_path / "m"))
    before = model.model.lm_head.weight.clone()
    model.set_task("cars")
    inner = model.model
    assert inner.lm_head.weight is inner.get_input_embeddings().weight and not torch.equal(before, inner.lm_head.weight)
    model.set_task("pets").set_task(None)
    assert torch.equal(inner.lm_head.weight, before)
    assert inner.lm_head.weight is inner.get_input_embeddings().weight


def test_generation_follows_the_task(made, tmp_path):
    family = made(families.tied_llama)
    memory, model = family.in_memory(), hf_merge.load_experts(family.merge(tmp_path / "m"))
    prompt = {name: tensor[:1] for name, tensor in families.tokens(2).items()}
    for task in ("pets", "cars"):
        alone = type(model.model)(model.config)
        alone.load_state_dict(memory.reconstruct([*family.models].index(task)), strict=False)
        alone.tie_weights()
        wanted = alone.eval().generate(**prompt, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.set_task(task).model.generate(**prompt, max_new_tokens=6, do_sample=False), wanted)


def test_classes_are_those_of_the_task(made, model, tmp_path):
    assert model.config.num_labels == 7
    for task, count in zip(TASKS, families.CLASSES, strict=True):
        model.set_task(task)
        assert model.config.id2label == {i: f"{task}_{i}" for i in range(count)}
        assert model.config.label2id[f"{task}_1"] == 1 and model.model.num_labels == count
    assert model.set_task(None).config.num_labels == 7
    texts = hf_merge.load_experts(made(families.bert).merge(tmp_path / "m"))
    assert [texts.set_task(task).config.num_labels for task in TASKS] == [3, 2, 1]
    assert texts.config.problem_type == "regression" and texts.set_task("cars").config.problem_type is None


# ---- mixtures


@pytest.mark.parametrize("method", ["twin", "emr"])
def test_a_mixture_is_the_backbone_and_the_shares_of_the_changes_under_the_head_of_the_largest(made, method, tmp_path):
    family = made(families.headless_vit)
    memory = family.in_memory(method, **METHODS[method])
    model = hf_merge.load_experts(family.merge(tmp_path / "m", method, **METHODS[method]))
    tasks = [memory.reconstruct(place) for place in range(3)]
    model.set_task({"pets": 0.2, "cars": 0.7, "dtd": 0.1})
    state = model.model.state_dict()
    for name, backbone in memory.backbone.items():
        live = Conversion(model.model).live([name])[name]
        found = state[live]
        wanted = backbone + sum(share * (task[f"vit.{name}" if f"vit.{name}" in task else name] - backbone)
                                for share, task in zip((0.2, 0.7, 0.1), tasks, strict=True))  # fmt: skip
        assert float((found - wanted).abs().max()) < 1e-6, name
    head = load_file(family.models["cars"] / "model.safetensors")["classifier.weight"]
    assert torch.equal(state["classifier.weight"], head)
    assert model.config.id2label[0] == "cars_0"
    alone = bits(model.set_task("pets").model)
    assert same(alone, bits(model.set_task({"pets": 1.0, "cars": 0.0}).model))


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"pets": -0.5, "cars": 1.5}, "'pets' should be a number, 0 or more; found -0.5"),
        ({"pets": float("nan")}, "found nan"),
        ({"pets": 0, "cars": 0}, "All shares are 0"),
        ({}, "A task is a name, or a mapping"),
        (3, "A task is a name, or a mapping"),
    ],
    ids=["negative", "nan", "nothing", "empty", "number"],
)
def test_shares_that_cannot_be_meant_are_refused(model, shares, told):
    before = bits(model.set_task("cars").model)
    with pytest.raises(ParameterError, match=re.escape(told)):
        model.set_task(shares)
    assert model.task == "cars" and same(bits(model.model), before)


# ---- batches of several tasks


def test_a_mixed_batch_comes_back_in_its_order_with_heads_of_other_sizes(model):
    tasks, inputs = ["pets", "cars", "dtd", "pets", "dtd", "cars"], families.images(6)
    out = model(**inputs, task=tasks)
    assert out.tasks == tasks and [len(row) for row in out.logits] == [3, 5, 5, 3, 5, 5] and model.task is None
    for place, task in enumerate(tasks):
        alone = model(pixel_values=inputs["pixel_values"][place : place + 1], task=task).logits[0]
        assert torch.allclose(out.logits[place], alone, atol=1e-6), place
    model.set_task("cars")
    assert model(inputs["pixel_values"], task=["cars", "dtd"] * 3).logits.shape == (6, 5) and model.task == "cars"
    with pytest.raises(AttributeError, match="no 'speed'"):
        _ = out.speed


def test_inputs_by_example_go_with_it_and_others_to_all(made, tmp_path):
    class Seen(nn.Module):
        main_input_name = "input_ids"

        def __init__(self, inner):
            super().__init__()
            self.inner, self.config, self.seen = inner, inner.config, []

        def forward(self, input_ids, attention_mask=None, **more):
            self.seen.append(more)
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model = hf_merge.load_experts(made(families.bert).merge(tmp_path / "m"))
    seen = Seen(model.model)
    model.set_task("pets").set_task(None)
    model._modules["model"] = seen
    model._weights.model = seen.inner
    inputs = families.tokens(3)
    model(**inputs, task=["pets", "cars", "pets"], names=["a", "b", "c"], head_mask=torch.zeros(3), sizes=(1, 2, 3),
          ages=torch.tensor([1, 2, 3]).numpy())  # fmt: skip
    assert [one["names"] for one in seen.seen] == [["a", "c"], ["b"]]
    assert [one["ages"].tolist() for one in seen.seen] == [[1, 3], [2]]
    assert all(len(one["head_mask"]) == 3 and one["sizes"] == (1, 2, 3) for one in seen.seen)


def test_labels_count_by_the_task_of_their_example(made, tmp_path):
    model = hf_merge.load_experts(made(families.bert).merge(tmp_path / "m"))
    inputs, labels = families.tokens(3), torch.tensor([2, 1, 0])
    out = model(**inputs, labels=labels, task=["pets", "cars", "pets"])
    rows = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(3)]
    alone = [model(**row, labels=labels[i : i + 1], task=task).loss
             for i, (row, task) in enumerate(zip(rows, ["pets", "cars", "pets"], strict=True))]  # fmt: skip
    assert float((out.loss - sum(alone).detach() / 3).abs()) < 1e-5
    assert not out.loss.requires_grad


def test_towers_without_heads_give_their_features(made, tmp_path):
    model = hf_merge.load_experts(made(families.clip_tower).merge(tmp_path / "m"))
    out = model(**families.images(3), task=["pets", "cars", "pets"])
    assert out.pooler_output.shape == (3, 32) and out.last_hidden_state.shape == (3, 5, 32)
    assert not hasattr(out, "logits")


def test_a_cache_is_of_one_task(made, tmp_path):
    model = hf_merge.load_experts(made(families.tied_llama).merge(tmp_path / "m"))
    ids = families.tokens(2)["input_ids"]
    first = model(input_ids=ids, task="pets", use_cache=True)
    more = model(input_ids=ids[:, :1], task="pets", past_key_values=first.past_key_values)
    assert more.logits.shape == (2, 1, 64)
    with pytest.raises(ParameterError, match="'past_key_values' holds what the weights of one task made"):
        model(input_ids=ids[:, :1], task=["pets", "cars"], past_key_values=first.past_key_values)


@pytest.mark.parametrize(
    ("task", "error", "told"),
    [
        ("car", SourceError, "There is no task 'car'. Did you mean 'cars'? Tasks: pets, cars, dtd."),
        (["pets", "boats"], SourceError, "There is no task 'boats'"),
        (["pets"], ParameterError, "task= has 1 entries for 2 examples"),
    ],
    ids=["misspelt", "one of several", "too few"],
)
def test_a_task_that_cannot_be_meant_is_refused_and_nothing_changes(model, task, error, told):
    before = bits(model.set_task("dtd").model)
    with pytest.raises(error, match=re.escape(told)):
        model(**families.images(2), task=task)
    assert model.task == "dtd" and same(bits(model.model), before)


def test_a_backbone_without_a_head_does_not_run_by_itself(made, tmp_path):
    model = hf_merge.load_experts(made(families.headless_vit).merge(tmp_path / "m"))
    with pytest.raises(ParameterError, match=re.escape("no 'classifier.bias' of its own: say task= (pets, cars, dtd)")):
        model(**families.images(1))
    with pytest.raises(MergeError, match="no router"):
        model.route(**families.images(1))
    assert model.features(**families.images(2)).shape == (2, 32)
    assert model(**families.images(1), task="pets").logits.shape == (1, 4)


# ---- robustness


def test_an_error_while_weights_are_made_leaves_the_backbone(model, monkeypatch):
    own = bits(model.model)
    cars = bits(model.set_task("cars").model)
    made = []

    def breaks(self, *words):
        made.append(1)
        if len(made) > 5:
            raise MemoryError("no room")
        return type(self).real(self, *words)

    kind = type(next(iter(model._experts["cars"].values())))
    monkeypatch.setattr(kind, "real", kind.rebuild, raising=False)
    monkeypatch.setattr(kind, "rebuild", breaks)
    with pytest.raises(MemoryError):
        model.set_task("pets")
    assert model.task is None and same(bits(model.model), own) and model.config.num_labels == 7
    monkeypatch.undo()
    assert same(bits(model.set_task("cars").model), cars)


def test_it_moves_and_casts_with_its_experts(made, merged):
    model = hf_merge.load_experts(merged).set_task("cars")
    model.to(torch.bfloat16)
    assert {one.dtype for one in model.model.parameters()} == {torch.bfloat16} and model.task == "cars"
    wanted = hf_merge.load_experts(merged, dtype=torch.bfloat16)
    for task in (None, "pets", "cars"):
        assert same(bits(model.set_task(task).model), bits(wanted.set_task(task).model))


def test_a_task_set_in_inference_mode_can_be_differentiated_later(model):
    with torch.inference_mode():
        model(**families.images(2), task="cars")
    model(**families.images(2)).logits.sum().backward()
    assert model.model.classifier.weight.grad.shape == (5, 32)


def test_device_maps_of_one_device_are_taken_and_offload_is_refused(merged, tmp_path):
    model = hf_merge.load_experts(merged, device_map={"": "cpu"})
    assert same(bits(model.set_task("cars").model), bits(hf_merge.load_experts(merged).set_task("cars").model))
    with pytest.raises(SourceError, match=r"offloaded \(cpu, disk\)"):
        hf_merge.load_experts(merged, device_map={"vit": "disk", "classifier": "cpu"}, offload_folder=tmp_path)


# ---- what is refused


def _index(folder, change):
    told = json.loads((folder / "experts.json").read_text())
    change(told)
    (folder / "experts.json").write_text(json.dumps(told))


def _without_head(folder):
    (folder / "experts" / "cars" / "own.safetensors").unlink()


def _another_backbone(folder):
    path = folder / "experts" / "cars"
    config = json.loads((path / "adapter_config.json").read_text())
    name = next(name for name, one in config["parameters"].items() if one["kind"] == "mask")
    config["parameters"]["vit.other.weight"] = config["parameters"][name]
    tensors = load_file(path / "adapter_model.safetensors")
    tensors |= {"base_model.model.vit.other.merged_expert.hf_merge_mask_weight": torch.zeros(4, dtype=torch.uint8),
                "base_model.model.vit.other.merged_expert.hf_merge_scale_weight": torch.ones(1)}  # fmt: skip
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))


def _wider_backbone(folder):
    path = folder / "experts" / "cars" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("hf_merge_mask_weight"))
    save_file({**tensors, name: torch.zeros(3, dtype=torch.uint8)}, path)


def _damaged(folder):
    path = folder / "experts" / "cars" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("maker", "harm", "told"),
    [
        (
            families.headless_vit,
            _without_head,
            "The task 'cars' has no 'classifier.bias', and neither has the backbone",
        ),
        (families.vit, _another_backbone, "The expert 'cars' changes"),
        (families.vit, _wider_backbone, "takes"),
        (families.vit, _damaged, "cannot be read"),
    ],
    ids=["no head", "another backbone", "another width", "damaged"],
)
def test_an_expert_that_does_not_belong_is_named_when_it_is_asked_for(made, maker, harm, told, tmp_path):
    folder = made(maker).merge(tmp_path / "m")
    harm(folder)
    model = hf_merge.load_experts(folder)
    pets = bits(model.set_task("pets").model)
    with pytest.raises(SourceError, match=re.escape(told)):
        model.set_task("cars")
    assert model.task == "pets" and same(bits(model.model), pets)


def test_what_is_no_backbone_with_experts_is_refused(made, merged, tmp_path):
    with pytest.raises(SourceError, match=r"no experts\.json, so it is no backbone with task experts"):
        hf_merge.load_experts(made(families.vit).base)
    with pytest.raises(SourceError, match="of several classes of models"):
        shutil.copytree(merged, tmp_path / "m")
        _index(tmp_path / "m", lambda told: told["tasks"][0].update(architectures=["BertModel"]))
        hf_merge.load_experts(tmp_path / "m")
    with pytest.raises(ParameterError, match="'router' should be 'auto' or None"):
        hf_merge.load_experts(merged, router="twin")


# ---- saving


def test_saved_it_is_the_same_in_another_process(model, merged, tmp_path):
    saved = model.set_task("cars").save_pretrained(tmp_path / "copy")
    wanted = model(**families.images(2), task="dtd").logits
    code = (
        "import torch, hf_merge, sys\nfrom tests.experts import families\n"
        "torch.set_num_threads(1)\nmodel = hf_merge.load_experts(sys.argv[1])\n"
        "print(model(**families.images(2), task='dtd').logits.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True)
    assert torch.equal(torch.tensor(json.loads(done.stdout)), wanted)
    named = json.loads((saved / "experts" / "cars" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(saved)
    with pytest.raises(OutputExistsError):
        model.save_pretrained(saved)
    before = {path.name for path in tmp_path.iterdir()}
    model.save_pretrained(saved, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == before
