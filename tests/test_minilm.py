"""The real embedding model and two fine-tunes of it, merged by every method."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import hf_merge

PARAMETERS = {
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5, "weight": 0.5},
    "dare_ties": {"density": [0.5, 0.7]},
    "task_arithmetic": {"weight": [0.6, 0.4]},
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.001},
    "linear": {"weight": [0.7, 0.3]},
    "wudi": {"iterations": 2},
}


def merge(minilm, method, output):
    described = hf_merge.get_method(method)
    models = [minilm["a"], minilm["b"]] if described.takes(2) else [minilm["a"]]
    base = None if described.base == "ignored" else minilm["base"]
    measured = {}
    if described.statistics:
        what = next(iter(described.statistics))
        texts = [[{"text": f"a cat sat on the mat of house {i}"} for i in range(3)]] * 2
        files = output.with_name("statistics") if what == "merged_gram" else None
        if files:
            measured = {"statistics": hf_merge.measure(models, texts, what, output=files)}
        elif what == "gram":
            named = zip(models, texts, "ab", strict=True)
            measured = {"statistics": [hf_merge.measure(m, t, what, output=output.with_name(f"{n}.safetensors"))
                                       for m, t, n in named]}  # fmt: skip
        else:  # the model has no head, and nothing that is likely
            measured = {"statistics": [{k: v.float().square() for k, v in load_file(m / "model.safetensors").items()
                                        if v.is_floating_point()} for m in models]}  # fmt: skip
    return hf_merge.merge(models, output, method=method, base_model=base, **measured, **PARAMETERS.get(method, {}))


OF_MODELS = [name for name in hf_merge.list_methods() if hf_merge.get_method(name).space != "factors"]


@pytest.mark.parametrize("method", OF_MODELS)
def test_every_method_gives_a_model_that_loads_and_embeds(minilm, method, tmp_path):
    merged = merge(minilm, method, tmp_path / "merged")
    model, info = AutoModel.from_pretrained(merged.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    batch = AutoTokenizer.from_pretrained(merged.path)(["a cat sat on the mat"], return_tensors="pt")
    with torch.no_grad():
        assert bool(model(**batch).last_hidden_state.isfinite().all())
    written, given = load_file(merged.path / "model.safetensors"), load_file(minilm["a"] / "model.safetensors")
    donor = minilm["a"] if hf_merge.get_method(method).base == "ignored" else minilm["base"]
    assert written.keys() == load_file(donor / "model.safetensors").keys()
    if method != "passthrough":
        assert any(not torch.equal(written[name], given[name]) for name in given)


def test_task_arithmetic_equals_the_formula_on_the_state_dicts(minilm, tmp_path):
    merged = load_file(merge(minilm, "task_arithmetic", tmp_path / "merged").path / "model.safetensors")
    base, a, b = (load_file(minilm[name] / "model.safetensors") for name in ("base", "a", "b"))
    for name, x in base.items():
        if not x.is_floating_point():
            assert torch.equal(merged[name], x)
            continue
        x, y, z = x.double(), a[name].double(), b[name].double()
        naive = x + 0.6 * (y - x) + 0.4 * (z - x)
        torch.testing.assert_close(merged[name].double(), naive, atol=5e-7, rtol=1e-6)


def test_result_is_still_a_sentence_transformer(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    merged = merge(minilm, "ties", tmp_path / "merged")
    model = sentence_transformers.SentenceTransformer(str(merged.path), device="cpu")
    embedding = model.encode(["a cat sat on the mat"])
    assert embedding.shape == (1, 384)
    assert abs(float((embedding**2).sum()) - 1) < 1e-4, "the Normalize module was lost"
    data = merged.card.data.to_dict()
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert json.loads((merged.path / "1_Pooling" / "config.json").read_text())


def test_stack_of_layers_still_understands(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    slices = [{"sources": [{"model": str(minilm["base"]), "layer_range": layers}]} for layers in ([0, 4], [2, 6])]
    merged = hf_merge.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "m")
    model = sentence_transformers.SentenceTransformer(str(merged.path), device="cpu")
    cat, kitten, stocks = model.encode(["a cat sat", "a kitten was sitting", "stock prices fell"])
    assert model[0].auto_model.config.num_hidden_layers == 8
    assert model.similarity(cat, kitten) > model.similarity(cat, stocks) + 0.3
