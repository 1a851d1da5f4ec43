"""Merged on load: the model that `merge` writes and `from_pretrained` loads, without the folder."""

import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import hf_merge
from hf_merge import lazy, loading
from hf_merge.lazy import MergedSlice
from hf_merge.staging import Lane
from hf_merge.types import TensorSpec
from tests.architectures import save_tiny
from tests.conftest import save_llamas

ROOT = Path(__file__).parent.parent
CLASSES = (
    "LlamaForCausalLM", "MixtralForCausalLM", "ViTForImageClassification", "CLIPModel", "BertForMaskedLM",
    "T5ForConditionalGeneration", "LlavaForConditionalGeneration",
)  # fmt: skip
METHODS = {
    "linear": {"weight": [0.3, 0.7]},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "slerp": {"t": 0.3},
}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tell whether two state dicts are one, to the bit."""
    alike = one.keys() == other.keys() and all(tensor.dtype == other[name].dtype for name, tensor in one.items())
    return alike and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def linear(llamas: dict[str, Path], **words):
    return hf_merge.from_pretrained([llamas["a"], llamas["b"]], method="linear", **words)


@pytest.fixture(scope="module")
def linear_on_disk(llamas, tmp_path_factory) -> hf_merge.MergedModel:
    return hf_merge.merge([llamas["a"], llamas["b"]], tmp_path_factory.mktemp("disk") / "m", method="linear")


@pytest.fixture(scope="module", params=CLASSES)
def folders(request, tmp_path_factory) -> dict[str, Path]:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param)).folders


@pytest.fixture(scope="module")
def recipes(llamas, tmp_path_factory) -> dict[str, str]:
    a, b, base = (llamas[name] for name in ("a", "b", "base"))
    adapter = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by a name that goes away
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(base), lora).save_pretrained(adapter)
    return {
        "stages": f"merge_method: linear\nname: half\nmodels: [{a}, {b}]\n---\n"
        f"merge_method: slerp\nbase_model: {base}\nmodels: [half]\nparameters: {{t: 0.4}}\n",
        "slices": f"merge_method: passthrough\nslices:\n- sources: [{{model: {a}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {b}, layer_range: [1, 3]}}]\ndtype: bfloat16\n",
        "adapter": f"merge_method: linear\nmodels: [{a}, {base}+{adapter}]\n",
        "tokenizer": f"merge_method: linear\nmodels: [{a}, {b}]\n"
        "tokenizer: {source: union, pad_to_multiple_of: 8}\nchat_template: chatml\n",
        "rules": f"merge_method: della\nbase_model: {base}\nmodels: [{a}, {b}]\nparameters: {{density: 0.6}}\n"
        f"rules: [{{pattern: norm, merge_method: passthrough, models: [{a}]}}]\nout_dtype: float16\n",
    }


class TestSameAsOnDisk:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.filterwarnings("ignore")  # what transformers says of the default settings of generation
    def test_tensors_names_and_configs(self, folders, method, tmp_path):
        words = {**METHODS[method], "base_model": folders["base"]} if method != "linear" else METHODS[method]
        models = [folders["a"]] if method == "slerp" else [folders["a"], folders["b"]]
        merged = hf_merge.merge(models, tmp_path / "disk", method=method, **words)
        model, info = hf_merge.from_pretrained(models, method=method, output_loading_info=True, **words)
        loaded = merged.load()
        assert not any(info.values()), info
        assert type(model) is type(loaded) and not model.training
        assert same(model.state_dict(), loaded.state_dict())
        model.save_pretrained(tmp_path / "saved")
        assert same(written(tmp_path / "saved"), written(merged.path))
        for name in ("config.json", "generation_config.json"):
            files = [folder / name for folder in (tmp_path / "saved", merged.path)]
            assert files[0].is_file() >= files[1].is_file()
        ours, theirs = model.config.to_dict(), loaded.config.to_dict()
        assert {**ours, "_name_or_path": ""} == {**theirs, "_name_or_path": ""}
        if loaded.can_generate():
            assert model.generation_config.to_dict() == loaded.generation_config.to_dict()


class TestRecipes:
    @pytest.mark.parametrize("kind", ["stages", "slices", "adapter", "tokenizer", "rules"])
    def test_every_kind_is_what_the_disk_gives(self, recipes, kind, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipes[kind])
        loaded, model = hf_merge.merge(path, tmp_path / "m").load(), hf_merge.from_pretrained(path)
        assert same(model.state_dict(), loaded.state_dict()) and model.dtype == loaded.dtype
        assert model.name_or_path == model.config.name_or_path == str(path)
        assert model.generation_config.to_dict() == loaded.generation_config.to_dict()

    def test_what_is_asked_here_wins_and_is_rounded_once(self, recipes, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipes["rules"])
        once = hf_merge.merge(path, tmp_path / "m", out_dtype="bfloat16").load()
        for word in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
            assert same(hf_merge.from_pretrained(path, **word).state_dict(), once.state_dict())
        assert hf_merge.from_pretrained(path, dtype="auto").dtype == torch.float16


class TestWords:
    def test_parameters_go_to_the_recipe_and_the_rest_to_transformers(self, llamas, tmp_path):
        model = linear(llamas, weight=[1, 3], attn_implementation="eager", use_cache=False)
        loaded = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear", weight=[1, 3]).load()
        assert same(model.state_dict(), loaded.state_dict())
        assert model.config._attn_implementation == "eager" and model.config.use_cache is False
        assert model.generation_config.max_new_tokens == 5
        assert model.name_or_path.startswith("linear of ")

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ({"wieght": [1, 2]}, "'wieght' is no field .* Did you mean 'weight'?"),
            ({"revision": "main"}, "'revision' is no field .* org/name@revision"),
            ({"density": 0.5}, "'linear' has no parameter 'density'"),
            ({"dtype": "int8"}, "out_dtype"),
        ],
    )
    def test_words_of_nobody_are_told(self, llamas, words, told):
        with pytest.raises(hf_merge.RecipeError, match=told):
            linear(llamas, **words)

    def test_it_generates(self, llamas):
        assert linear(llamas).generate(torch.tensor([[1, 5]]), do_sample=False).shape == (1, 7)


PARTS = ("embed_tokens", *(f"layers.{i}" for i in range(3)), "norm", "rotary_emb")
ON_CPU = {**{f"model.{part}": "cpu" for part in PARTS}, "lm_head": "cpu"}


class TestPlaces:
    @pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", "sequential", ON_CPU, torch.device("cpu")])
    def test_maps_of_one_device(self, llamas, linear_on_disk, device_map):
        model, loaded = linear(llamas, device_map=device_map), linear_on_disk.load(device_map=device_map)
        assert same(model.state_dict(), loaded.state_dict())
        assert getattr(model, "hf_device_map", None) == getattr(loaded, "hf_device_map", None)

    def test_only_what_is_mapped_to_disk_is_written(self, llamas, linear_on_disk, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        words = {"device_map": {**ON_CPU, "model.layers.1": "disk"}}
        model = linear(llamas, **words, offload_folder=tmp_path / "offload")
        assert [path.name for path in tmp_path.iterdir()] == ["offload"]
        assert all(path.name.startswith("model.layers.1.") for path in (tmp_path / "offload").iterdir())
        assert model.model.layers[1].mlp.up_proj.weight.is_meta and not model.model.layers[0].mlp.up_proj.weight.is_meta
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, linear_on_disk.load()(ids).logits)

    def test_what_does_not_fit_goes_to_the_disk_that_transformers_chooses(self, llamas, linear_on_disk, tmp_path):
        words = {"device_map": "auto", "max_memory": {"cpu": "100KB"}}
        model = linear(llamas, **words, offload_folder=tmp_path / "ours")
        loaded = linear_on_disk.load(**words, offload_folder=tmp_path / "theirs")
        assert model.hf_device_map == loaded.hf_device_map and {*model.hf_device_map.values()} == {"cpu", "disk"}
        with pytest.raises(hf_merge.OutputError, match="offload_folder="):
            linear(llamas, **words)

    def test_a_tensor_is_merged_on_the_device_that_asks_for_it(self, llamas, monkeypatch):
        devices = set()
        compute = lazy.compute
        monkeypatch.setattr(
            lazy, "compute", lambda plan, step, *a, **k: devices.add(step.device) or compute(plan, step, *a, **k)
        )
        linear(llamas, device_map="cpu")
        assert devices == {"cpu"}
        monkeypatch.setattr(lazy, "open_lane", lambda device, own_stream: Lane(device))  # no bus leads to meta
        made, sources = hf_merge.api.open_recipe([llamas["a"], llamas["b"]], {}, method="linear", allow_nonfinite=True)
        with lazy.Mergers(made, sources, threading.Event()) as mergers:
            found = mergers.slices(["model.norm.weight"])["model.norm.weight"][...].to(device="meta")
        assert found.device.type == "meta" and devices == {"cpu", "meta"}

    @pytest.mark.parametrize("workers", [1, 2])
    def test_so_many_at_a_time_as_we_say(self, llamas, monkeypatch, workers):
        now, most, guard, compute = [0], [0], threading.Lock(), lazy.compute

        def counted(*args, **words):
            with guard:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            try:
                return compute(*args, **words)
            finally:
                with guard:
                    now[0] -= 1

        monkeypatch.setattr(lazy, "compute", counted)
        monkeypatch.setattr(lazy, "default_workers", lambda: workers)
        linear(llamas)
        assert most[0] == workers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_it_is_merged_there(llamas, method, monkeypatch):
    words = {**METHODS[method], "base_model": llamas["base"]} if method != "linear" else METHODS[method]
    models = [llamas["a"]] if method == "slerp" else [llamas["a"], llamas["b"]]
    model = hf_merge.from_pretrained(models, method=method, device_map="cuda:0", **words)
    there = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    here = hf_merge.from_pretrained(models, method=method, **words).state_dict()
    assert model.device.type == "cuda" and there.keys() == here.keys()
    for name, tensor in there.items():  # slerp has norms and dot products, which sum in another order there
        torch.testing.assert_close(tensor, here[name], rtol=0, atol=1e-6 if method == "slerp" else 0)


class TestWhatDoesNotFit:
    def test_tensors_without_a_config_name_what_merges_them(self):
        with pytest.raises(hf_merge.MergeError, match=r"no config\.json.*merge_state_dicts"):
            hf_merge.from_pretrained([{"x": torch.ones(2)}, {"x": torch.zeros(2)}], method="linear")

    def test_a_module_of_torch_has_none_either(self):
        with pytest.raises(hf_merge.MergeError, match="merge_state_dicts"):
            hf_merge.from_pretrained([nn.Linear(2, 2), nn.Linear(2, 2)], method="linear")

    def test_models_in_memory_with_a_config_merge(self, llamas, linear_on_disk):
        models = [LlamaForCausalLM.from_pretrained(llamas[name]) for name in ("a", "b")]
        model = hf_merge.from_pretrained(models, method="linear")
        assert same(model.state_dict(), linear_on_disk.load().state_dict())

    def test_a_missing_tensor_is_told_and_not_drawn_at_random(self, tmp_path):
        folders = save_llamas(tmp_path, ("a",))
        for folder in folders.values():
            tensors = load_file(folder / "model.safetensors")
            del tensors["model.norm.weight"]
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            hf_merge.MergeError, match=r"lacks 1 tensors of LlamaForCausalLM, such as 'model.norm.weight'"
        ):
            hf_merge.from_pretrained([*folders.values()], method="linear")

    def test_a_tensor_without_a_place_is_reported_as_by_transformers(self, llamas, tmp_path):
        folders = save_llamas(tmp_path, ("a",))
        for folder in folders.values():
            tensors = {**load_file(folder / "model.safetensors"), "model.extra.weight": torch.ones(2)}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model, info = hf_merge.from_pretrained([*folders.values()], method="linear", output_loading_info=True)
        assert info["unexpected_keys"] == {"model.extra.weight"} and not info["missing_keys"]
        assert "model.extra.weight" not in model.state_dict()

    @pytest.mark.parametrize("words", [{}, {"device_map": {**ON_CPU, "lm_head": "disk"}}])
    def test_an_error_in_the_arithmetic_comes_out_as_it_is(self, llamas, tmp_path, words):
        broken = LlamaForCausalLM.from_pretrained(llamas["a"])
        broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(hf_merge.ComputeError, match=r"layers\.1\.mlp\.up_proj\.weight' by 'linear'"):
            hf_merge.from_pretrained(
                [broken, llamas["b"]], method="linear", base_model=llamas["b"], weight=[1, 1],
                offload_folder=tmp_path, **words,
            )  # fmt: skip

    def test_a_loader_that_refuses_slices_gets_tensors(self, llamas, linear_on_disk, monkeypatch, caplog):
        def refuse(self, index):
            raise TypeError(f"expected Tensor, got {type(self).__name__}")

        monkeypatch.setattr(MergedSlice, "__getitem__", refuse)
        logging.getLogger("hf_merge").propagate = True
        with caplog.at_level("WARNING"):
            model = linear(llamas)
        assert same(model.state_dict(), linear_on_disk.load().state_dict())

    def test_other_errors_of_the_loader_are_not_taken_for_a_refusal(self, llamas, monkeypatch):
        monkeypatch.setattr(loading.MergedSlice, "__getitem__", lambda self, index: 1 / "x")
        with pytest.raises(TypeError, match="unsupported operand"):
            linear(llamas)

    def test_code_of_the_model_runs_if_it_is_trusted(self, llamas, tmp_path):
        folders = [tmp_path / name for name in ("a", "b")]
        for folder in folders:
            model = LlamaForCausalLM.from_pretrained(llamas[folder.name])
            model.config.architectures = ["OwnLlama"]
            model.save_pretrained(folder)
            code = "from transformers import LlamaForCausalLM\n\n\nclass OwnLlama(LlamaForCausalLM):\n    own = True\n"
            (folder / "modeling_own.py").write_text(code)
            config = (folder / "config.json").read_text().replace('"LlamaForCausalLM"', '"OwnLlama"')
            own = '{\n  "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnLlama"},'
            (folder / "config.json").write_text(config.replace("{", own, 1))
        with pytest.raises(hf_merge.MergeError, match=r"is a OwnLlama; .* trust_remote_code=True"):
            hf_merge.from_pretrained(folders, method="linear")
        model = hf_merge.from_pretrained(folders, method="linear", trust_remote_code=True)
        assert type(model).__name__ == "OwnLlama" and model.own


class TestSlices:
    def test_a_slice_is_computed_from_slices_where_entries_stand_alone(self, llamas, monkeypatch):
        a, b = [llamas["a"], llamas["b"]], "model.layers.0.mlp.up_proj.weight"
        index, computed = (slice(3, 9), slice(0, 32)), []
        pieces = hf_merge.execute._pieces
        monkeypatch.setattr(
            hf_merge.execute,
            "_pieces",
            lambda plan, step, *a, **k: computed.append(step.spec.shape) or pieces(plan, step, *a, **k),
        )
        for method, words in {**METHODS, "task_arithmetic": {}, "della": {"density": 0.5}}.items():
            base = {} if method == "linear" else {"base_model": llamas["base"]}
            made, sources = hf_merge.api.open_recipe(a[: 1 + (method != "slerp")], {}, method=method, **words, **base)
            with lazy.Mergers(made, sources, threading.Event()) as mergers:
                one = mergers.slices([b])[b]
                assert one[index].get_shape() == [6, 32] and not computed
                part, whole = one[index].to("cpu"), one[...].to("cpu")
            assert torch.equal(part, whole[3:9])
            assert (computed[0] == (6, 32)) == (method in ("linear", "task_arithmetic"))
            computed.clear()

    def test_it_has_the_manners_of_a_slice_of_safetensors(self, linear_on_disk):
        from safetensors import safe_open

        with safe_open(linear_on_disk.path / "model.safetensors", "pt") as file:
            theirs = file.get_slice("lm_head.weight")
        values = torch.rand(64, 32)
        ours = MergedSlice("x", TensorSpec((64, 32), torch.float32), lambda name, index, device: values[index])
        assert {name for name in dir(theirs) if not name.startswith("__")} <= {*dir(ours)}
        assert ours.get_shape() == theirs.get_shape() == [64, 32] and ours.get_dtype() == theirs.get_dtype() == "F32"
        assert ours.shape == (64, 32) and ours.ndim == 2 and ours.numel() == 2048 and ours.is_floating_point()
        assert ours[2:4].shape == (2, 32) and torch.equal(ours[2:4][1].to(), values[3])
        assert torch.equal(torch.cat([ours[:1], ours[4:]]), torch.cat([values[:1], values[4:]]))
        assert ours.to("cpu", torch.float16).dtype == torch.float16


TENSOR_PARALLEL = """
import sys, torch, hf_merge
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from hf_merge import lazy
dist.init_process_group("gloo")
base, *models = sys.argv[1:]
asked, compute = {}, lazy.compute
def noted(plan, step, sources, *, index=..., lane=None):
    asked[step.name] = index
    return compute(plan, step, sources, index=index, lane=lane)
lazy.compute = noted
for method, words in {"linear": {}, "ties": {"density": 0.5, "base_model": base}}.items():
    model = hf_merge.from_pretrained(models, method=method, distributed_config=DistributedConfig(tp_size=2), **words)
    rows = 24 * dist.get_rank()
    assert asked["model.layers.0.mlp.up_proj.weight"] == (slice(rows, rows + 24), slice(0, 32)), asked
    whole = hf_merge.from_pretrained(models, method=method, **words)
    sharded = 0
    for (name, part), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        sharded += hasattr(part, "full_tensor")
        assert torch.equal(part.full_tensor() if hasattr(part, "full_tensor") else part, other), name
    assert sharded > 10
    ids = torch.arange(8)[None]
    assert torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.e2e
def test_two_ranks_merge_their_own_slices(llamas, tmp_path):
    script = tmp_path / "parallel.py"
    script.write_text(TENSOR_PARALLEL)
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    call += ["--rdzv_endpoint", "127.0.0.1:0", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    folders = [llamas[name] for name in ("base", "a", "b")]
    done = subprocess.run([*call, *folders], capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


class TestQuantised:
    def check(self, llamas, linear_on_disk, make):
        model = linear(llamas, quantization_config=make(), device_map="cpu")
        loaded = linear_on_disk.load(quantization_config=make(), device_map="cpu")
        ids = torch.arange(8)[None]
        assert torch.equal(model(ids).logits, loaded(ids).logits)
        return type(model.model.layers[0].mlp.up_proj.weight).__name__

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
    def test_torchao_quantises_each_tensor_as_it_is_merged(self, llamas, linear_on_disk, kind):
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        assert "Tensor" in self.check(llamas, linear_on_disk, lambda: TorchAoConfig(getattr(quantization, kind)()))

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("words", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
    def test_bitsandbytes_too(self, llamas, linear_on_disk, words):
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        assert "Params" in self.check(llamas, linear_on_disk, lambda: BitsAndBytesConfig(**words))


def test_sentence_transformers_give_their_transformer(minilm, caplog):
    merged = hf_merge.from_pretrained([minilm["a"], minilm["b"]], method="linear")
    one, two = (load_file(minilm[name] / "model.safetensors") for name in ("a", "b"))
    name = "embeddings.word_embeddings.weight"
    assert type(merged).__name__ == "BertModel" and torch.allclose(
        merged.state_dict()[name], (one[name] + two[name]) / 2
    )


def test_it_is_not_imported_with_the_package():
    code = """
    import sys, hf_merge
    assert not {"torch", "transformers", "peft", "gradio"} & {*sys.modules}
    assert callable(hf_merge.from_pretrained)
    assert not {"peft", "gradio"} & {*sys.modules}
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)
