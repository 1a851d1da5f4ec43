"""What `analyze` measures, against the formulas written with numpy; every way to name models; and what it says."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from hf_merge.analysis.naming import LayerNames, part_of
from hf_merge.analysis.sums import sample_runs

NAMES = (
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight",
)  # fmt: skip


def state(seed, base=None, scale=0.1, dtype=torch.float32):
    """A base, or a fine-tune of one."""
    numbers = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(5, 7, generator=numbers).to(dtype) for name in NAMES}
    return made if base is None else {name: base[name] + scale * made[name] for name in NAMES}


@pytest.fixture(scope="module")
def states():
    base = state(0)
    models = {"code": state(1, base), "math": state(2, base, 0.3), "chat": state(3, base)}
    mean = {name: sum(model[name] for model in models.values()) / 3 for name in NAMES}
    return {"base": base, **models, "merged": mean}


@pytest.fixture(scope="module")
def found(states):
    models = {name: states[name] for name in ("code", "math", "chat")}
    return hf_merge.analyze(models, base_model=states["base"], merged=states["merged"])


def vectors(states, names=NAMES):
    """Every model as one long vector in double precision."""
    return {label: np.concatenate([model[name].double().numpy().ravel() for name in names])
            for label, model in states.items()}  # fmt: skip


def row_of(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_similarity_is_the_cosine_of_the_changes(found, states):
    flat = vectors(states)
    assert found.similarity.models == ("code", "math", "chat", "merged")
    for a, row in zip(found.similarity.models, found.similarity.values, strict=True):
        for b, value in zip(found.similarity.models, row, strict=True):
            one, other = flat[a] - flat["base"], flat[b] - flat["base"]
            assert value == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)


def test_change_is_the_length_of_each_change_over_that_of_the_base(found, states):
    assert found.layers == ("0", "1", "outside")
    assert found.parts == ("embeddings", "attention", "mlp", "norm", "head")
    for model in ("code", "math", "chat", "merged"):
        row = row_of(found.change, model=model, layer="1", part="attention")
        flat = vectors(states, ["model.layers.1.self_attn.q_proj.weight"])
        assert row["norm"] == pytest.approx(np.linalg.norm(flat[model] - flat["base"]), rel=1e-12)
        assert row["relative"] == pytest.approx(row["norm"] / np.linalg.norm(flat["base"]), rel=1e-12)
    assert len(found.change) == 4 * 6


def test_conflicts_are_the_share_of_pairs_that_pull_an_entry_apart(found, states):
    flat = vectors(states, ["model.layers.0.mlp.up_proj.weight"])
    signs = np.sign([flat[name] - flat["base"] for name in ("code", "math", "chat")])
    apart = sum((signs[a] * signs[b] < 0).sum() for a in range(3) for b in range(a))
    assert row_of(found.conflicts, layer="0", part="mlp")["share"] == apart / (3 * 35)


def test_entries_that_only_one_model_changes_are_no_conflict():
    base = {"w": torch.zeros(4)}
    a, b = {"w": torch.tensor([1.0, 1.0, 1.0, 0.0])}, {"w": torch.tensor([-1.0, 1.0, 0.0, 0.0])}
    found = hf_merge.analyze([a, b], base_model=base)
    assert found.conflicts == ({"layer": "outside", "part": "other", "share": 0.5},)
    assert "0.50 over the whole model" in found.readings["conflicts"]


def test_norms_are_those_of_a_layer_with_all_its_parts(found, states):
    flat = vectors(states, [name for name in NAMES if ".layers.0." in name])
    for name in ("code", "math", "chat", "merged", "base"):
        label = "base model" if name == "base" else name
        assert row_of(found.norms, layer="0", name=label)["norm"] == pytest.approx(
            np.linalg.norm(flat[name]), rel=1e-12
        )


def test_readings_say_what_the_numbers_say(found):
    assert found.readings.keys() == found.tables.keys() == {"similarity", "change", "conflicts", "norms"}
    assert "all 3 pairs barely overlap" in found.readings["similarity"]
    assert "with equal weights math counts" in found.readings["change"] or "little is left" in found.readings["change"]
    assert "nothing blew up" in found.readings["norms"]


@pytest.mark.parametrize(
    ("change", "table", "told"),
    [
        (lambda base, a: a, "similarity", "change much the same (1.00): average them"),
        (lambda base, a: {k: 2 * base[k] - a[k] for k in a}, "similarity", "pull in opposite directions (-1.00)"),
        (lambda base, a: {k: 2 * base[k] - a[k] for k in a}, "conflicts", "1.00 over the whole model"),
        (lambda base, a: base, "similarity", "b changed nothing"),
        (lambda base, a: base, "change", "b adds nothing"),
    ],
    ids=["same", "opposite", "opposite-signs", "unchanged", "unchanged-size"],
)
def test_readings_of_plain_cases(states, change, table, told):
    base, a = states["base"], states["code"]
    b = {name: tensor.clone() for name, tensor in change(base, a).items()}
    assert told in hf_merge.analyze({"a": a, "b": b}, base_model=base).readings[table]


def test_a_result_that_blew_up_in_one_layer_is_told(states):
    big = {name: tensor * (3 if ".1." in name else 1) for name, tensor in states["merged"].items()}
    found = hf_merge.analyze([states["code"], states["math"]], base_model=states["base"], merged=big)
    assert "it blew up in layer 1 (" in found.readings["norms"]


def test_without_a_base_models_are_compared_with_each_other(states):
    found = hf_merge.analyze({name: states[name] for name in ("code", "math", "chat")})
    flat = vectors(states)
    assert found.similarity is None and found.base is None and found.conflicts == ()
    one, other = flat["code"], flat["math"]
    expected = np.linalg.norm(one - other) / np.sqrt((one @ one + other @ other) / 2)
    assert found.distances.values[0][1] == pytest.approx(expected, rel=1e-12)
    assert found.distances.values[1][1] == 0
    mean = (flat["code"] + flat["math"] + flat["chat"]) / 3
    assert found.totals["code"] == pytest.approx(np.linalg.norm(one - mean) / np.linalg.norm(mean), rel=1e-12)
    assert found.readings["distances"].startswith("No base was named")


def test_a_model_that_lacks_a_tensor_is_compared_by_the_others(states):
    less = {name: tensor for name, tensor in states["math"].items() if name != "lm_head.weight"}
    found = hf_merge.analyze({"code": states["code"], "math": less}, base_model=states["base"])
    flat = vectors(states, [name for name in NAMES if name != "lm_head.weight"])
    one, other = flat["code"] - flat["base"], flat["math"] - flat["base"]
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert found.similarity.values[0][1] == pytest.approx(cosine, rel=1e-12)
    assert found.left_out == {"math": ("lm_head.weight",)}


def test_numbers_do_not_depend_on_the_number_of_threads(states):
    models = [states["code"], states["math"]]
    before = torch.get_num_threads()
    try:
        told = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            told.append(hf_merge.analyze(models, base_model=states["base"]).to_dict())
    finally:
        torch.set_num_threads(before)
    assert told[0] == told[1]


def test_many_tiles_give_the_sum_of_all(states):
    numbers = torch.Generator().manual_seed(0)
    base, a, b = ({"w": torch.randn(700_001, generator=numbers).bfloat16()} for _ in range(3))
    found = hf_merge.analyze([a, b], base_model=base)
    one, other = (m["w"].double().numpy() - base["w"].double().numpy() for m in (a, b))
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert found.similarity.values[0][1] == pytest.approx(expected, rel=1e-12)


def test_a_sample_reads_evenly_spaced_runs_and_stands_for_the_whole():
    assert sample_runs(100, None) == sample_runs(100, 100) == [(0, 100)]
    runs = sample_runs(10_000, 800)
    assert len(runs) == 8 and runs[0] == (0, 100) and runs[-1] == (9_900, 10_000)
    assert {end - begin for begin, end in runs} == {100}
    assert sample_runs(10, 3) == [(0, 1), (4, 5), (9, 10)] and sample_runs(10, 1) == [(0, 1)]
    numbers = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, 300, generator=numbers)}
    model = {"w": base["w"] + 0.1 * torch.randn(200, 300, generator=numbers)}
    found = hf_merge.analyze([model], base_model=base, sample=4096)
    expected = np.linalg.norm((model["w"] - base["w"]).double())
    assert found.change[0]["norm"] == pytest.approx(expected, rel=0.05) and found.change[0]["norm"] != expected
    assert "Estimated from at most 4,096 entries" in found.readings["change"]


def test_progress_goes_to_the_end_and_what_it_raises_ends_the_analysis(states):
    seen = []
    hf_merge.analyze([states["code"]], base_model=states["base"], on_progress=seen.append)
    assert [one.tensors for one in seen] == [0, 1, 2, 3, 4, 5, 6] and seen[0].stage == "analyzing"
    assert seen[-1].bytes == seen[-1].all_bytes == 2 * 6 * 35 * 4 and seen[0].bytes == 0

    def enough(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_merge.analyze([states["code"]], base_model=states["base"], on_progress=enough)


def test_nan_is_told_with_its_place(states):
    broken = {**states["code"], "lm_head.weight": torch.full((5, 7), torch.nan)}
    with pytest.raises(hf_merge.ComputeError, match=r"'merged' has NaN or Inf in 'lm_head\.weight'"):
        hf_merge.analyze([states["code"]], base_model=states["base"], merged=broken)


@pytest.mark.parametrize("sample", [0, -1, True, 2.5, "many"])
def test_a_sample_that_is_no_number_of_entries_is_refused(states, sample):
    with pytest.raises(hf_merge.ParameterError, match="1 or more"):
        hf_merge.analyze([states["code"]], base_model=states["base"], sample=sample)


def test_the_base_alone_is_refused(states):
    with pytest.raises(hf_merge.RecipeError, match="no model to analyse but the base"):
        hf_merge.analyze([states["base"]], base_model=states["base"])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_one_base_are_compared_over_it(llamas, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for seed in (1, 2):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(llamas["base"]),
                               LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))  # fmt: skip
        model.save_pretrained(tmp_path / f"lora{seed}")
    found = hf_merge.analyze([tmp_path / "lora1", tmp_path / "lora2"])
    assert [*found.models] == ["lora1", "lora2"] and found.base == "base"
    changed = {(row["layer"], row["part"]) for row in found.change if row["norm"]}
    assert changed == {(layer, "attention") for layer in "012"}


def test_a_recipe_file_and_its_result_through_the_command_line(llamas, tmp_path):
    pytest.importorskip("matplotlib")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: ties\nbase_model: {llamas['base']}\nmodels: [{llamas['a']}, {llamas['b']}]\n"
                      "parameters: {density: 0.5}\n")  # fmt: skip
    hf_merge.merge(recipe, tmp_path / "merged")
    command = [sys.executable, "-m", "hf_merge.cli", "analyze", recipe, "--merged", tmp_path / "merged", "--output",
               tmp_path / "out", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert json.loads(done.stdout)["similarity"] == told["similarity"]
    one, base = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", llamas["base"]))
    mlp = [(one[name].double() - base[name].double()).flatten() for name in base if ".1.mlp." in name]
    assert told["merged"] == "merged" and told["base"] == "base" and [*told["models"]] == ["a", "b"]
    row = row_of(told["change"], model="merged", layer="1", part="mlp")
    assert row["norm"] == pytest.approx(torch.cat(mlp).norm().item(), rel=1e-12)
    pictures = {"similarity.png", "change.png", "conflicts.png", "norms.png"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == pictures | {"analysis.json"} | {name.replace("png", "csv") for name in pictures}


def test_the_real_model_and_two_fine_tunes(minilm):
    found = hf_merge.analyze([minilm["a"], minilm["b"]], base_model=minilm["base"])
    base, a, b = (load_file(minilm[name] / "model.safetensors") for name in ("base", "a", "b"))
    floats = [name for name in base if base[name].is_floating_point()]
    one, other = (torch.cat([(m[n].double() - base[n].double()).flatten() for n in floats]) for m in (a, b))
    cosine = (one @ other / one.norm() / other.norm()).item()
    assert found.similarity.values[0][1] == pytest.approx(cosine, rel=1e-9)
    assert found.layers == ("0", "1", "2", "3", "4", "5", "outside")
    assert found.totals["conflicts"] == pytest.approx(
        (one * other < 0).sum().item() / ((one != 0) & (other != 0)).sum().item(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.layers.3.block_sparse_moe.experts.2.w1.weight", "mlp"),
        ("encoder.layer.0.attention.output.dense.weight", "attention"),
        ("encoder.layer.0.attention.output.LayerNorm.bias", "norm"),
        ("encoder.layer.0.output.dense.bias", "mlp"),
        ("embeddings.position_embeddings.weight", "embeddings"),
        ("transformer.h.0.attn.c_proj.weight", "attention"),
        ("transformer.h.0.mlp.c_proj.weight", "mlp"),
        ("transformer.ln_f.weight", "norm"),
        ("transformer.wte.weight", "embeddings"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "mlp"),
        ("shared.weight", "embeddings"),
        ("vision_model.pre_layrnorm.weight", "norm"),
        ("vit.embeddings.cls_token", "embeddings"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("classifier.out_proj.weight", "head"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", "mlp"),
        ("backbone.layers.4.mixer.in_proj.weight", "other"),
        ("layer1.0.bn1.weight", "norm"),
        ("logit_scale", "other"),
    ],
)
def test_kinds_of_modules_follow_from_names(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("stacks", "labels"),
    [
        (["model.layers."], ["0", "1"]),
        (["encoder.block.", "decoder.block."], ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]),
        (["t.enc.layers.", "v.enc.layers."], ["t 0", "t 1", "v 0", "v 1"]),
        (["a.layers.", "a.b.layers."], ["layers 0", "layers 1", "b.layers 0", "b.layers 1"]),
    ],
    ids=["one", "two", "towers", "nested"],
)
def test_layers_are_named_by_what_tells_their_stacks_apart(stacks, labels):
    names = [f"{stack}{layer}.w" for stack in stacks for layer in (1, 0)]
    assert LayerNames([*names, "norm.weight"]).order == (*labels, "outside")
