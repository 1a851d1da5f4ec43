"""Adapters merged with adapters give an adapter; the weights of their base are never read."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge.errors import MergeError, PlanError, SourceError
from hf_merge.method import get_method, list_methods
from tests.test_adapter import make

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # PEFT warns about fan_in_fan_out, saved embeddings and transformers' own deprecations


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Base models by architecture, made when they are asked for."""
    return _Bases(tmp_path_factory.mktemp("bases"))


class _Bases:
    def __init__(self, folder):
        self.folder, self.models = folder, {}

    def path(self, architecture):
        path = self.folder / architecture
        if not path.exists():
            self.model(architecture).save_pretrained(path)
        return path

    def model(self, architecture):
        if architecture == "mixtral":
            import transformers

            torch.manual_seed(0)
            config = transformers.MixtralConfig(
                vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                num_key_value_heads=1, num_local_experts=4,
            )  # fmt: skip
            return transformers.MixtralForCausalLM(config)
        return make(architecture)

    def adapter(self, folder, architecture="llama", *, seed=0, **settings):
        """Save a random adapter of a base."""
        from peft import LoraConfig, get_peft_model

        base = self.path(architecture)
        model = self.model(architecture)
        torch.manual_seed(seed + 1)
        words = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["q_proj"], **settings}
        peft = get_peft_model(model, LoraConfig(**words))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad and "lora_A" not in name and "embedding" not in name:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        peft.peft_config["default"].base_model_name_or_path = str(base)
        peft.save_pretrained(folder)
        return str(folder)

    def weights(self, adapter, architecture="llama"):
        """The base's weights with an adapter, by PEFT."""
        from peft import PeftModel

        model = type(self.model(architecture)).from_pretrained(self.path(architecture))
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()

    def change(self, adapter, architecture="llama"):
        """What an adapter adds to the base's weights, in float64."""
        base = type(self.model(architecture)).from_pretrained(self.path(architecture)).state_dict()
        found = self.weights(adapter, architecture)
        return {name: found[name].double() - base[name].double() for name in base}


def largest(one, other=None):
    return max(float((tensor - (other[name] if other else 0)).abs().max()) for name, tensor in one.items())


VARIANTS = {
    "linear": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 5},
                           "alpha_pattern": {"layers.1.self_attn.q_proj": 9, "q_proj": 2}}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "lora bias": ("bert", {"target_modules": ["query", "classifier"], "lora_bias": True}),
    "trained biases": ("bert", {"target_modules": ["value"], "bias": "all"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv2d": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters":
                            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}  # fmt: skip
WAYS = {
    "core": {"method": "linear"},
    "core of task vectors": {"method": "task_arithmetic"},
    "full": {"method": "linear", "space": "full"},
    "factors": {"method": "linear", "space": "factors"},
    "cat": {"method": "cat"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_adapter_at_weight_1_gives_itself(variant, way, bases, tmp_path):
    architecture, settings = VARIANTS[variant]
    one = bases.adapter(tmp_path / "one", architecture, **settings)
    if variant == "experts" and way == "cat":
        with pytest.raises(SourceError, match=r"no experts in one parameter.*linear with normalize: false"):
            hf_merge.merge([one], tmp_path / "merged", **WAYS[way])
        return
    hf_merge.merge([one], tmp_path / "merged", **WAYS[way])
    expected, found = bases.weights(one, architecture), bases.weights(tmp_path / "merged", architecture)
    assert largest(found, expected) <= 1e-6 * max(1.0, largest(expected))
    assert largest(bases.change(one, architecture)) > 0.01


def test_cat_leaves_the_factors_of_one_adapter_as_they_are_to_the_bit(bases, tmp_path):
    one = bases.adapter(tmp_path / "one", r=4, lora_alpha=4)
    hf_merge.merge([one], tmp_path / "merged", method="cat")
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in (one, tmp_path / "merged"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


@pytest.fixture(scope="module")
def different(bases, tmp_path_factory):
    """Three adapters of other ranks, scales and targets."""
    folder = tmp_path_factory.mktemp("different")
    return [
        bases.adapter(folder / "a", seed=1, r=2, target_modules=["q_proj", "v_proj"]),
        bases.adapter(folder / "b", seed=2, r=5, use_rslora=True, target_modules=["q_proj", "down_proj"]),
        bases.adapter(
            folder / "c", seed=3, r=4, alpha_pattern={"q_proj": 12}, rank_pattern={"layers.0.self_attn.q_proj": 1}
        ),
    ]


@pytest.mark.parametrize("words", [
    {"method": "linear", "normalize": False}, {"method": "task_arithmetic"}, {"method": "cat"},
    {"method": "linear", "normalize": False, "space": "full"}, {"method": "svd", "units": 11},
    {"method": "cat", "rank": "sum"},
], ids=str)  # fmt: skip
def test_sums_equal_the_dense_formula_whatever_ranks_scales_and_targets(words, different, bases, tmp_path):
    weights = [0.7, -0.4, 1.5]
    hf_merge.merge(different, tmp_path / "merged", weight=weights, **words)
    found, each = bases.change(tmp_path / "merged"), [bases.change(one) for one in different]
    expected = {n: sum(w * change[n] for w, change in zip(weights, each, strict=True)) for n in found}
    assert largest(found, expected) <= 1e-5 * largest(expected)


@pytest.mark.parametrize(
    "words", [{"method": "ties", "density": 0.6}, {"method": "dare_ties", "density": 0.5, "seed": 3}]
)
def test_space_full_equals_the_method_on_the_changes_themselves(words, bases, tmp_path):
    """With changes of full rank nothing is lost by the factors."""
    two = [bases.adapter(tmp_path / str(i), seed=i, r=16) for i in range(2)]
    hf_merge.merge(two, tmp_path / "merged", space="full", **words)
    changes = [{n: c.float() for n, c in bases.change(one).items() if "q_proj" in n} for one in two]
    zeros = {n: torch.zeros_like(c) for n, c in changes[0].items()}
    expected = hf_merge.merge_state_dicts(changes, base_model=zeros, **words)
    found = {n: c for n, c in bases.change(tmp_path / "merged").items() if n in zeros}
    assert largest(found, expected) < 2e-6


OF_ADAPTERS = [name for name in list_methods() if not (get_method(name).statistics or get_method(name).experts)]


@pytest.mark.parametrize("method", OF_ADAPTERS)
def test_every_method_merges_adapters(method, different, bases, tmp_path):
    """In core space; an interpolation has one of them as its base."""
    found = get_method(method)
    models = different[: found.count or 2]
    base = {} if found.base == "ignored" or found.space == "deltas" else {"base_model": different[2]}
    hf_merge.merge(models, tmp_path / "merged", method=method, **base)
    assert largest(bases.change(tmp_path / "merged")) > 0


def test_methods_that_merge_by_statistics_of_models_are_refused(different, tmp_path):
    with pytest.raises(hf_merge.RecipeError, match="'regmean' merges by statistics of whole models"):
        hf_merge.merge(different[:2], tmp_path / "merged", method="regmean")


def test_slerp_and_its_ends(different, bases, tmp_path):
    one, other = different[:2]
    for t, expected in ((0.0, one), (1.0, other)):
        hf_merge.merge([other], tmp_path / str(t), method="slerp", base_model=one, t=t)
        assert largest(bases.weights(tmp_path / str(t)), bases.weights(expected)) < 1e-6


def test_a_rank_keeps_the_largest_singular_values_and_says_how_much(different, bases, tmp_path):
    for name, rank in (("all", "sum"), ("three", 3), ("most", 0.9)):
        hf_merge.merge(different, tmp_path / name, method="cat", rank=rank)
    everything = bases.change(tmp_path / "all")
    module = "model.layers.0.self_attn.q_proj"
    u, s, vh = torch.linalg.svd(everything[f"{module}.weight"])
    best = u[:, :3] * s[:3] @ vh[:3]
    assert (bases.change(tmp_path / "three")[f"{module}.weight"] - best).abs().max() < 1e-6
    count = int(((s**2).cumsum(0) / (s**2).sum() < 0.9).sum()) + 1
    stored = load_file(tmp_path / "most" / "adapter_model.safetensors")
    assert stored[f"base_model.model.{module}.lora_A.weight"].shape[0] == count
    merged = hf_merge.merge(different, tmp_path / "again", method="cat", rank=3)
    assert merged.kept[module] == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), abs=1e-6)
    least = f"Least is kept of `{min(merged.kept, key=merged.kept.__getitem__)}`"
    assert least in merged.card.content, merged.card.content


def test_parameters_over_layers_and_rules_hold_for_modules(bases, tmp_path):
    one = bases.adapter(tmp_path / "one", target_modules=["q_proj", "v_proj"])
    recipe = {
        "merge_method": "linear", "parameters": {"normalize": False},
        "models": [{"model": one, "parameters": {"weight": [0.0, 2.0]}}],
        "rules": [{"pattern": "v_proj", "merge_method": "task_arithmetic", "parameters": {"weight": 3.0}}],
    }  # fmt: skip
    hf_merge.merge(recipe, tmp_path / "merged")
    found, expected = bases.change(tmp_path / "merged"), bases.change(one)
    for layer, factor in ((0, 0.0), (1, 2.0)):
        for name, times in (("q_proj", factor), ("v_proj", 3.0)):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            torch.testing.assert_close(found[key], times * expected[key], rtol=1e-5, atol=1e-7)


def test_saved_modules_are_merged_as_they_are(bases, tmp_path):
    two = [bases.adapter(tmp_path / str(i), seed=i, modules_to_save=["lm_head"]) for i in range(2)]
    merged = hf_merge.merge(two, tmp_path / "merged", method="linear", weight=[3.0, 1.0])
    one, other = (bases.weights(adapter)["lm_head.weight"] for adapter in two)
    torch.testing.assert_close(bases.weights(tmp_path / "merged")["lm_head.weight"], 0.75 * one + 0.25 * other)
    assert not [problem for problem in merged.plan.problems if "lack" in problem.message]


def test_it_loads_in_every_way_that_peft_and_transformers_have(different, bases, tmp_path):
    import transformers
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel

    merged = hf_merge.merge(different, tmp_path / "merged", method="ties", density=0.8)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(bases.path("llama"))
    assert PeftConfig.from_pretrained(tmp_path / "merged").r == config["lora_alpha"]
    ids = torch.arange(8)[None]
    base = transformers.LlamaForCausalLM.from_pretrained(bases.path("llama"))
    by_peft = PeftModel.from_pretrained(base, tmp_path / "merged")
    expected = by_peft(ids).logits
    ways = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), merged.load()]
    ways += [AutoPeftModelForCausalLM.from_pretrained(tmp_path / "merged")]
    for loaded in ways:
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with by_peft.disable_adapter():
        assert (by_peft(ids).logits - expected).abs().max() > 1e-3


def test_the_base_is_not_needed(different, bases, tmp_path):
    """Not even to be there."""
    moved = []
    for i, adapter in enumerate(different):
        shutil.copytree(adapter, tmp_path / str(i))
        config = tmp_path / str(i) / "adapter_config.json"
        config.write_text(config.read_text().replace(str(bases.path("llama")), "nobody/has-this"))
        moved.append(str(tmp_path / str(i)))
    hf_merge.merge(moved, tmp_path / "merged", method="ties")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nobody/has-this"
    assert "nobody/has-this" in (tmp_path / "merged" / "README.md").read_text()


def test_the_recipe_in_the_folder_gives_the_same_bytes(different, tmp_path):
    hf_merge.merge(different, tmp_path / "merged", method="dare_ties", density=0.5, rank=4)
    hf_merge.merge(tmp_path / "merged" / "hf_merge_recipe.yaml", tmp_path / "again")
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("merged", "again"))
    assert one == other
    with safe_open(tmp_path / "merged" / "adapter_model.safetensors", "pt") as file:
        assert "merge_method: dare_ties" in file.metadata()["hf_merge_recipe"]


def test_the_command_says_what_it_does(different, tmp_path):
    command = [sys.executable, "-m", "hf_merge.cli"]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"merge_method": "ties", "models": different, "rank": 6}))
    plan = subprocess.run([*command, "plan", tmp_path / "recipe.yaml"], capture_output=True, text=True, check=True)
    assert "adapter" in plan.stdout
    merge = [*command, "merge", tmp_path / "recipe.yaml", tmp_path / "merged"]
    done = subprocess.run(merge, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()


# what does not go together


def edited(adapter, folder, change):
    """Copy an adapter and change its config or its tensors."""
    shutil.copytree(adapter, folder)
    config, file = json.loads((folder / "adapter_config.json").read_text()), folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    return str(folder)


def test_adapters_of_different_bases_are_refused_by_name(different, tmp_path):
    other = edited(
        different[1], tmp_path / "other", lambda config, _: config.update(base_model_name_or_path="org/other")
    )
    with pytest.raises(SourceError, match=r"belongs to .*llama.* to 'org/other': merge adapters of one base"):
        hf_merge.merge([different[0], other], tmp_path / "merged", method="linear")
    assert not (tmp_path / "merged").exists()
    words = {"base_model": "org/right", "output_format": "adapter"}
    merged = hf_merge.merge([different[0], other], tmp_path / "merged", method="ties", **words)
    assert "org/right" in "".join(str(problem) for problem in merged.plan.problems)
    assert (
        json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/right"
    )


def test_adapters_of_other_architectures_are_refused_with_both_shapes(different, tmp_path):
    def widen(_, tensors):
        for key in [*tensors]:
            if "lora_A" in key:
                tensors[key] = torch.ones(tensors[key].shape[0], 20)

    other = edited(different[0], tmp_path / "other", widen)
    with pytest.raises(SourceError, match=r"'model.layers.0.self_attn.q_proj' as linear \[16, 16\].*linear \[16, 20\]"):
        hf_merge.merge([different[1], other], tmp_path / "merged", method="linear")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_with_nan_are_found_and_named(value, different, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    broken = edited(different[0], tmp_path / "broken", lambda _, tensors: tensors[key][0].fill_(value))
    with pytest.raises(MergeError, match=rf"'{key}' of '.*broken' has NaN or Inf"):
        hf_merge.merge([broken, different[1]], tmp_path / "merged", method="linear")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("words", "told"), [
    ({"method": "linear", "rank": 0}, "rank"), ({"method": "linear", "rank": 1.5}, "rank"),
    ({"method": "linear", "rank": "most"}, "rank"), ({"method": "linear", "space": "latent"}, "space"),
])  # fmt: skip
def test_ranks_and_spaces_that_do_not_exist_are_refused(words, told, different, tmp_path):
    with pytest.raises(MergeError, match=f"'{told}'"):
        hf_merge.merge(different, tmp_path / "merged", **words)


def test_factors_of_other_ranks_are_not_averaged(different, tmp_path):
    with pytest.raises(SourceError, match=r"averages factors of one rank; those of .* have 1, 2, 5"):
        hf_merge.merge(different, tmp_path / "merged", method="linear", space="factors")


def test_space_factors_warns_of_cross_terms_and_averages_as_peft_does(bases, tmp_path):
    from peft import PeftModel

    two = [bases.adapter(tmp_path / str(i), seed=i, lora_alpha=3) for i in range(2)]
    weights = [0.25, 0.64]
    roots = [weight**0.5 for weight in weights]  # PEFT gives each factor the root of the weight
    merged = hf_merge.merge(two, tmp_path / "merged", method="linear", space="factors", weight=roots, normalize=False)
    assert any("the product of two averages" in problem.message for problem in merged.plan.problems)
    model = PeftModel.from_pretrained(bases.model("llama"), two[0], adapter_name="a")
    model.load_adapter(two[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], weights, "both", combination_type="linear")
    model.set_adapter("both")
    assert (
        largest(model.merge_and_unload(adapter_names=["both"]).state_dict(), bases.weights(tmp_path / "merged")) < 1e-6
    )


def test_methods_on_factors_are_refused_for_models(bases, tmp_path):
    base = str(bases.path("llama"))
    with pytest.raises(PlanError, match="'cat' merges LoRA adapters"):
        hf_merge.merge([base], tmp_path / "merged", method="cat")
    with pytest.raises(MergeError, match="'knots' merges LoRA adapters"):
        hf_merge.merge_state_dicts([{"w": torch.ones(2, 2)}], method="knots")


def test_methods_on_factors_and_on_matrices_are_not_mixed(different, tmp_path):
    rules = [{"pattern": "q_proj", "merge_method": "knots"}]
    with pytest.raises(hf_merge.RecipeError, match="'knots' merges factors and 'linear' matrices"):
        hf_merge.merge({"merge_method": "linear", "models": different, "rules": rules}, tmp_path / "merged")


def test_dora_and_plain_adapters_are_not_mixed(bases, tmp_path):
    plain, dora = bases.adapter(tmp_path / "plain"), bases.adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(SourceError, match=r"DoRA adapters merge with DoRA adapters.*'.*plain' is none.*output_format"):
        hf_merge.merge([plain, dora], tmp_path / "merged", method="linear")


def test_adapters_that_train_other_tokens_are_not_mixed(bases, tmp_path):
    two = [bases.adapter(tmp_path / str(i), trainable_token_indices=[i, 7]) for i in (1, 2)]
    with pytest.raises(SourceError, match="train different tokens"):
        hf_merge.merge(two, tmp_path / "merged", method="linear")


def test_prompts_are_refused_by_name(different, tmp_path):
    prompt = edited(different[0], tmp_path / "prompt", lambda config, _: config.update(peft_type="PROMPT_TUNING"))
    with pytest.raises(SourceError, match="PROMPT_TUNING"):
        hf_merge.merge([different[1], prompt], tmp_path / "merged", method="linear")


@pytest.mark.parametrize(
    "words", [{"targets": ["q_proj"]}, {"keep_rest": False}, {"tokenizer_source": "union"}], ids=str
)
def test_what_means_nothing_for_adapters_alone_is_refused(words, different, tmp_path):
    with pytest.raises(hf_merge.RecipeError, match=f"'{next(iter(words))}' says nothing about adapters"):
        hf_merge.merge(different, tmp_path / "merged", method="linear", **words)


def test_for_vllm_all_ranks_are_one_of_its_own(bases, different, tmp_path):
    hf_merge.merge(different, tmp_path / "merged", method="cat", vllm=True)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (16, 16, {})
    stored = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in stored.items() if "lora_A" in name} == {16}
    saved = bases.adapter(tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(MergeError, match=r"vLLM loads no adapter with whole modules .*'lm_head'"):
        hf_merge.merge([saved], tmp_path / "no", method="cat", vllm=True)
    assert not (tmp_path / "no").exists()


# files of diffusers and kohya


MODULES = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj": (12, 8),
}


def lora_file(path, style, *, seed, rank=2, alpha=None):
    """Write a LoRA of a UNet; return its changes by module."""
    torch.manual_seed(seed)
    tensors, changes = {}, {}
    for module, (out, columns) in MODULES.items():
        left, right = torch.randn(out, rank), torch.randn(rank, columns)
        changes[module] = (left @ right * (alpha or rank) / rank).double()
        if style == "kohya":
            stem = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{stem}.lora_up.weight": left, f"{stem}.lora_down.weight": right}
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha or rank))
        else:
            tensors |= {f"unet.{module}.lora_B.weight": left, f"unet.{module}.lora_A.weight": right}
    save_file(tensors, path)
    return changes


def changes_of(path, style):
    tensors, found = load_file(path), {}
    for module in MODULES:
        stem = f"lora_unet_{module.replace('.', '_')}" if style == "kohya" else f"unet.{module}"
        left, right = ("lora_up", "lora_down") if style == "kohya" else ("lora_B", "lora_A")
        up, down = tensors[f"{stem}.{left}.weight"].double(), tensors[f"{stem}.{right}.weight"].double()
        found[module] = up @ down * (tensors[f"{stem}.alpha"].item() / down.shape[0] if style == "kohya" else 1)
    return found


@pytest.mark.parametrize("first", ["kohya", "diffusers"])
def test_lora_files_of_other_styles_merge_into_one_of_the_first_one_s(first, tmp_path):
    second = "diffusers" if first == "kohya" else "kohya"
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    one = lora_file(files[0], first, seed=1, rank=2, alpha=None if first == "diffusers" else 4)
    other = lora_file(files[1], second, seed=2, rank=3, alpha=None if second == "diffusers" else 1)
    blocks = [{"filter": "down_blocks", "value": 0.5}, {"value": 2.0}]
    models = [{"model": str(files[0]), "parameters": {"weight": blocks}}, {"model": str(files[1])}]
    recipe = {"merge_method": "cat", "models": models}
    merged = hf_merge.merge(recipe, tmp_path / "merged.safetensors")
    found = changes_of(merged.path, first)
    for module, weight in zip(MODULES, (0.5, 2.0), strict=True):
        torch.testing.assert_close(found[module], weight * one[module] + other[module], rtol=1e-5, atol=1e-5)
    folder = hf_merge.merge(recipe, tmp_path / "folder")
    names = sorted(path.name for path in folder.path.iterdir())
    file = "folder.safetensors" if first == "kohya" else "pytorch_lora_weights.safetensors"
    assert names == sorted(["README.md", "hf_merge_recipe.yaml", file])
    assert (folder.path / file).read_bytes() == merged.path.read_bytes()
    assert "load_lora_weights" in folder.card.content
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_lora_files_become_a_file_of_a_lower_rank_by_any_method(tmp_path):
    for seed in (1, 2):
        lora_file(tmp_path / f"{seed}.safetensors", "kohya", seed=seed, rank=4)
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    merged = hf_merge.merge(files, tmp_path / "merged.safetensors", method="ties", density=0.5, rank=3)
    downs = [t for name, t in load_file(merged.path).items() if "down" in name.split(".")[1]]
    assert [len(down) for down in downs] == [3, 3]
    assert min(merged.kept.values()) < 1


def test_a_peft_adapter_is_no_single_file(different, tmp_path):
    with pytest.raises(MergeError, match="a PEFT adapter is a folder"):
        hf_merge.merge(different, tmp_path / "merged.safetensors", method="linear")
