"""Outputs of MergeKit 0.1.5 and of papers' released code, read from beside the checkout where they are at hand."""

import json

import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from hf_merge.packing import unpack_mask
from tests.conftest import GOLDEN

MERGEKIT = GOLDEN / "mergekit"
CASES = sorted(path.name for path in (MERGEKIT / "cases").glob("*")) if MERGEKIT.is_dir() else []


def test_golden_data_is_at_hand_or_said_to_be_absent():
    if not CASES:
        pytest.skip("no golden data beside the checkout")
    assert len(CASES) >= 17


@pytest.mark.parametrize("name", CASES)
def test_recipe_gives_mergekits_result(name, tmp_path, monkeypatch):
    monkeypatch.chdir(MERGEKIT / "models")
    recipe = MERGEKIT / "cases" / name / "config.yml"
    merged = load_file(hf_merge.merge(recipe, tmp_path / "out").path / "model.safetensors")
    expected = load_file(recipe.with_name("output.safetensors"))
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype
        distance = (merged[key].float() - tensor.float()).abs()
        assert bool((distance <= (one_bfloat16_step(key) if tensor.dtype == torch.bfloat16 else 1e-6)).all()), key


def one_bfloat16_step(key):
    """MergeKit rounds the inputs to bfloat16 first, so it is off by a step of the largest input."""
    inputs = [load_file(MERGEKIT / "models" / name / "model.safetensors")[key].abs() for name in ("a", "b")]
    return 2.0**-7 * torch.maximum(*inputs)


# papers

PAPERS = GOLDEN / "papers"
KEPT = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.0}}
SUMMED = {"merge_method": "task_arithmetic"}
TIES = {"method": "ties", "scope": "global"}

PUBLISHED = {
    ("magmax", "merged_tv"): {"method": "magmax"},
    ("tsv_iso_hfvit5", "tsv_m"): {"method": "tsv_m"},
    ("tsv_iso_hfvit5", "iso_c"): {"method": "iso_c"},
    ("tsv_iso_hfvit5", "iso_cts"): {"method": "iso_cts", "common_space_fraction": 0.8},
    ("ties_hfvit5", "dis-mean"): {**TIES, "density": 0.2, "consensus": "mean", "lambda_": 1.0},
    ("ties_hfvit5", "dis-sum"): {**TIES, "density": 0.2, "consensus": "sum", "lambda_": 0.3},
    ("ties_hfvit5", "dis-max"): {**TIES, "density": 0.2, "consensus": "max", "lambda_": 0.3},
    # keeps int(0.8 d) entries of d = 60416 out, one fewer than d - int(0.2 d); classifiers do not count
    ("ties_mergelm_roberta3", ""): {
        **TIES, "density": 12084 / 60416, "lambda_": 0.9, "rules": [{"pattern": "classifier", **KEPT}],
    },
    ("weight_average", ""): {"method": "linear", "base_model": None},
    ("fr_roberta", ""): {"method": "fr", "variant": "reference", "filter_ratio": 0.7, "lambda_": 0.5},
    ("fr_vit30", "merged_0.15"): {  # biases of attention and MLPs are added up, all other vectors stay
        "method": "fr", "variant": "reference", "filter_ratio": 0.7, "with_align": False, "lambda_": 0.15,
        "rules": [{"pattern": "*dense.bias", **SUMMED}, {"pattern": "*.attention.attention.*.bias", **SUMMED}],
    },
}  # fmt: skip
"""By file and prefix of the keys there: how the same is asked of this library."""

VECTORS = {"merged_tv", "tsv_m", "iso_c", "iso_cts"}
"""Prefixes under which there are merged task vectors, not weights."""


def inputs(name):
    """Return the base and the fine-tunes of a file of inputs."""
    states = {}
    for key, tensor in load_file(PAPERS / f"{name}.safetensors").items():
        model, _, key = key.partition("/")
        states.setdefault(model, {})[key] = tensor
    base = states.pop("base")
    return base, [states[model] for model in sorted(states)]


@pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize(("name", "prefix"), PUBLISHED, ids=lambda part: part or "all")
def test_methods_give_what_the_papers_code_gives(name, prefix):
    base, models = inputs(json.loads((PAPERS / f"{name}.json").read_text())["inputs"][0])
    merged = hf_merge.merge_state_dicts(models, **{"base_model": base, **PUBLISHED[name, prefix]})
    tolerance = 5e-6 if name.startswith("tsv") else 5e-7
    published = load_file(PAPERS / f"{name}.safetensors")
    keys = [key for key in published if key.startswith(prefix and f"{prefix}/") and "__" not in key]
    assert keys
    for key in keys:
        tensor, found = published[key].double(), merged[key.removeprefix(f"{prefix}/")].double()
        expected = base[key.removeprefix(f"{prefix}/")].double() + tensor if prefix in VECTORS else tensor
        assert found.shape == expected.shape, key
        assert float((found - expected).abs().max()) <= tolerance, key


MEASURED = {
    ("fisher", "normalized"): {"method": "fisher"},
    ("fisher", "unnormalized"): {"method": "fisher", "normalize": False},
    ("fisher", "coef_0.5_0.3_0.2"): {"method": "fisher", "weight": [0.5, 0.3, 0.2]},
    ("regmean", "a1.0"): {"method": "regmean", "scaling": 1.0, "ridge": 1e-12},
    ("regmean", "a0.9"): {"method": "regmean", "scaling": 0.9},
    ("regmean", "a0.1"): {"method": "regmean", "scaling": 0.1},
}
"""The same for methods with statistics; their classifiers are not merged."""


def measured(what):
    """Return the statistics of every fine-tune, keyed like its weights."""
    found: dict = {}
    for key, tensor in load_file(PAPERS / "inputs_roberta3_stats.safetensors").items():
        kind, _, name = key.partition("/")
        if kind.startswith(what) and "classifier" not in name:
            found.setdefault(kind, {})[name if what == "fisher" else f"{name}.weight"] = tensor
    return [found[kind] for kind in sorted(found)]


@pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize(("name", "prefix"), MEASURED, ids=lambda part: part)
def test_methods_with_statistics_give_what_the_papers_code_gives(name, prefix):
    _, models = inputs("inputs_roberta3")
    models = [{key: one for key, one in model.items() if "classifier" not in key} for model in models]
    statistics = measured("fisher" if name == "fisher" else "gram")
    merged = hf_merge.merge_state_dicts(models, statistics=statistics, **MEASURED[name, prefix])
    published = load_file(PAPERS / f"{name}.safetensors")
    keys = [key for key in published if key.startswith(f"{prefix}/")]
    assert {key.removeprefix(f"{prefix}/") for key in keys} == merged.keys()
    for key in keys:
        distance = (published[key].double() - merged[key.removeprefix(f"{prefix}/")].double()).abs().max()
        assert float(distance) <= (5e-7 if name == "fisher" else 5e-6), key


@pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")
@pytest.mark.parametrize("model", range(2))
def test_the_released_filter_gives_the_released_vectors(model):
    base, models = inputs("inputs_hfvit5")
    filtered = {key: one for key, one in load_file(PAPERS / "fr_vit30.safetensors").items()
                if key.startswith(f"filtered{model}/")}  # fmt: skip
    assert len(filtered) == 12
    for key, expected in filtered.items():
        name = key.partition("/")[2]
        found = hf_merge.get_method("fr")([models[model][name] - base[name]], variant="reference")
        assert float((found - expected).abs().max()) <= 5e-7, key


# task experts

SPARSE = {"variant": "reference", "filter_ratio": 0.7, "shared_weight": 0.1, "expert_weight": 7.0}
VIT30 = {**SPARSE, "rules": [{"pattern": "embeddings.*", **KEPT}, {"pattern": "*layernorm*", **KEPT}]}
ROBERTA = {**SPARSE, "shared_weight": 0.2, "expert_weight": 10.0, "overlap": "add", "heads": ["*classifier*"]}
ALONE = {"shared_weight": 0.0, "expert_weight": 1.0}
"""With these a task's weights are the base and the expert."""
FREE = {
    ("free_vit30", "k0.02"): {**VIT30, "density": 0.02},
    ("free_vit30", "k0.05"): {**VIT30, "density": 0.05},
    ("free_roberta", "keep0.1_remove0.02"): {**ROBERTA, "density": 0.1, "remove": 0.02},
    ("free_roberta", "keep0.02_remove0.0"): {**ROBERTA, "density": 0.02, "remove": 0.0},
}
"""By file and prefix of the keys there: the constants of the released scripts."""

needs_papers = pytest.mark.skipif(not PAPERS.is_dir(), reason="no golden data beside the checkout")


def published(name, prefix):
    """Return the tensors of a case under a prefix, by the name of the weight; and what is said of the case."""
    told = json.loads((PAPERS / f"{name}.json").read_text())
    tensors = load_file(PAPERS / f"{name}.safetensors")
    found = {key.removeprefix(f"{prefix}/"): one for key, one in tensors.items() if key.startswith(f"{prefix}/")}
    assert found, prefix
    return found, told


def distance(one, other):
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def with_experts(name, method, **parameters):
    base, models = inputs(json.loads((PAPERS / f"{name}.json").read_text())["inputs"][0])
    return base, hf_merge.merge_state_dicts(models, method=method, base_model=base, **parameters)


@needs_papers
@pytest.mark.parametrize(("variant", "key"), [("reference", "rescalers"), ("paper", "rescalers_flat30")])
def test_emr_rescales_as_either_script_does(variant, key):
    _, merged = with_experts("emr_hfvit5", "emr", variant=variant)
    expected = load_file(PAPERS / "emr_hfvit5.safetensors")[key]
    for expert, scale in zip(merged.experts, expected, strict=True):
        assert all(distance(fields["scale"], scale) <= 5e-7 for fields in expert.fields.values())


@needs_papers
def test_emr_gives_the_released_vector_masks_and_weights():
    base, merged = with_experts("emr_hfvit5", "emr", variant="reference")
    unified, _ = published("emr_hfvit5", "unified")
    assert unified.keys() == merged.shared.keys()
    for name, vector in unified.items():
        assert distance(merged.shared[name], vector) <= 5e-7, name
        assert merged.backbone[name].equal(base[name])
    for i, expert in enumerate(merged.experts):
        masks, _ = published("emr_hfvit5", f"mask{i}")
        for name, mask in masks.items():
            assert unpack_mask(expert.fields[name]["mask"], mask.numel()).equal(mask.bool().flatten()), name
        expected, _ = published("emr_hfvit5", f"recon{i}")
        found = merged.reconstruct(i)
        assert found.keys() == base.keys()
        for name, weight in expected.items():
            assert distance(found[name], weight) <= 5e-7, name


@needs_papers
@pytest.mark.parametrize(("name", "prefix"), FREE, ids=lambda part: part)
def test_free_gives_the_released_experts_and_weights(name, prefix):
    base, merged = with_experts(name, "free", **FREE[name, prefix])
    _, alone = with_experts(name, "free", **{**FREE[name, prefix], **ALONE})
    for i in range(len(merged.experts)):
        (weights, told), (experts, _) = published(name, f"{prefix}/merged{i}"), published(name, f"{prefix}/expert{i}")
        whole, own = merged.reconstruct(i), alone.reconstruct(i)
        assert len(merged.experts[i].fields) >= 21
        for key in weights:
            assert distance(whole[key], weights[key]) <= 5e-7 or key in told["topk_tie_keys"], key
        for key in merged.experts[i].fields.keys() & weights.keys():
            expert = own[key] - base[key]
            if key in told["topk_tie_keys"]:  # equal magnitudes: any of them may be kept
                assert distance(*(one.abs().flatten().sort().values for one in (expert, experts[key]))) <= 5e-7, key
                continue
            assert distance(expert, experts[key]) <= 5e-7, key


@needs_papers
@pytest.mark.parametrize("rate", [0.9, 0.8])
def test_twin_gives_the_released_model_and_experts(rate):
    heads = ["*classifier*", "*bias*"]
    _, merged = with_experts("twin_svd", "twin", mask_rate=rate, lambda_=0.29, heads=heads)
    shared, _ = published("twin_svd", "shared")
    for name, weight in shared.items():
        assert distance(merged.backbone[name], weight) <= 5e-7, name
    for i in range(len(merged.experts)):
        experts, _ = published("twin_svd", f"rate{rate}/expert{i}")
        assert experts.keys() == shared.keys()
        found = merged.reconstruct(i)
        for name, expert in experts.items():
            assert distance(found[name] - merged.backbone[name], expert) <= 5e-6, name
