"""`base+expert` as a model of an ordinary merge."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge import _compat
from hf_merge.errors import SourceError
from hf_merge.sources import open_source
from hf_merge.types import ModelRef
from tests.experts.made import MODELS, Suite, entry

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers for what it will lose


def opened(suite, task):
    return open_source(ModelRef.parse(f"{suite.base}+{suite.experts / task}"))


def saved(suite, task):
    """Return the files' names and tensors of a model that has a task's weights, tied ones once."""
    state = {**suite.model.state_dict(), **suite.weights(task)}
    return {name: tensor for name, (_, tensor) in _compat.on_disk_layout(suite.model, state).items()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("task", ["mask", "sparse", "whole"])
def test_a_base_with_an_expert_is_the_task_to_the_bit(kind, task, tmp_path):
    suite = Suite(tmp_path, kind, "float16" if task == "mask" else "float32")
    suite.add(task, [task])
    source, base = opened(suite, task), open_source(ModelRef.parse(str(suite.base)))
    expected = saved(suite, task)
    assert {name: source.specs[name] for name in base.specs} == dict(base.specs) and len(source) >= len(base)
    for name in base:
        assert torch.equal(source[name], expected[name]), name
        assert not torch.equal(source[name], base[name]), name


def test_an_expert_leaves_tied_weights_tied(tmp_path):
    suite = Suite(tmp_path, "llama", tie_word_embeddings=True)
    suite.add("all", ["whole"])
    source = opened(suite, "all")
    assert "lm_head.weight" not in source.specs and source.config["tie_word_embeddings"] is True
    assert torch.equal(source["model.embed_tokens.weight"], suite.weights("all")["model.embed_tokens.weight"])


def test_experts_are_models_of_a_merge(tmp_path):
    suite = Suite(tmp_path, "vit")
    suite.add("one", ["sparse", "whole"], 100)
    suite.add("two", ["mask"], 200)
    models = [f"{suite.base}+{suite.experts / task}" for task in ("one", "two")]
    hf_merge.merge(models, tmp_path / "out", method="linear")
    found = load_file(tmp_path / "out" / "model.safetensors")
    one, two = saved(suite, "one"), saved(suite, "two")
    assert found.keys() == one.keys()
    assert all((found[name] - (one[name] + two[name]) / 2).abs().max() < 1e-6 for name in found)


def test_a_mask_that_is_not_beside_its_shared_vector_is_refused(tmp_path):
    suite = Suite(tmp_path, "vit")
    folder = suite.add("cars", ["mask"])

    folder.rename(tmp_path / "cars")
    with pytest.raises(SourceError, match=r"cars' is a mask of a vector .* folder 'shared' beside"):
        open_source(ModelRef.parse(f"{suite.base}+{tmp_path / 'cars'}"))
    part = dict(list(suite.config["shared"].items())[:3])
    (suite.experts / "shared").rename(tmp_path / "shared_before")
    suite.write("shared", part, 0)
    (tmp_path / "cars").rename(folder)
    with pytest.raises(SourceError, match=r"is a mask of 'vit.* does not have: they are parts of two merges"):
        opened(suite, "cars")


def test_an_expert_with_a_head_of_its_own_size_is_refused(tmp_path):
    suite = Suite(tmp_path, "vit")
    suite.write("five", {"classifier.weight": entry("whole", (5, 16))}, 3)
    with pytest.raises(SourceError, match=r"'classifier.weight' .* shape \[5, 16\].*\[3, 16\].*merge_and_unload"):
        opened(suite, "five")


def test_an_expert_with_missing_tensors_is_refused(tmp_path):
    suite = Suite(tmp_path, "vit")
    folder = suite.add("cars", ["sparse"])
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(iter(tensors))
    save_file({k: t for k, t in tensors.items() if k != key}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=f"lacks '{key}'"):
        opened(suite, "cars")
