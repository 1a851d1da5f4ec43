"""Task experts as PEFT and transformers load them: to the bit what their formula gives."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_merge import packing
from hf_merge.errors import SourceError
from hf_merge.experts import stored
from tests.experts.made import MODELS, Suite, batch, entries, entry, load, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

KINDS = {"mask": ["mask"], "sparse": ["sparse"], "whole": ["whole"], "all": ["mask", "sparse", "whole"]}


@pytest.fixture(scope="module", params=MODELS)
def suite(request, tmp_path_factory):
    """A model with the experts `mask`, `sparse`, `whole` and `all`, each of which changes every parameter."""
    made = Suite(tmp_path_factory.mktemp(request.param), request.param)
    for seed, (task, kinds) in enumerate(KINDS.items()):
        made.add(task, kinds, 100 * (seed + 1))
    return made


def with_experts(suite, *tasks, **words):
    """Load experts with PEFT; the first one is active."""
    model = PeftModel.from_pretrained(load(suite), suite.experts / tasks[0], adapter_name=tasks[0], **words)
    for task in tasks[1:]:
        model.load_adapter(suite.experts / task, adapter_name=task, **words)
    return model


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_kind_is_its_formula_to_the_bit_and_experts_take_turns(suite, low_cpu_mem_usage):
    model = with_experts(suite, "shared", *KINDS, low_cpu_mem_usage=low_cpu_mem_usage)
    plain = run(load(suite), suite.kind)
    for task in ("shared", *KINDS, "mask"):
        model.set_adapter(task)
        out = run(model, suite.kind)
        assert same(out, suite.expected(task)) and not same(out, plain)
        with model.disable_adapter():
            assert same(run(model, suite.kind), plain)
    assert same(run(copy.deepcopy(model), suite.kind), out)


@pytest.mark.parametrize("task", ["shared", *KINDS])
def test_merging_gives_the_formulas_weights_and_unmerging_the_bases(suite, task):
    model = with_experts(suite, task, "shared") if task != "shared" else with_experts(suite, "shared")
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert same(run(model, suite.kind), suite.expected(task))
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(same(after[name], before[name]) for name in before)
    merged = model.merge_and_unload()
    assert type(merged) is type(suite.model) and same(run(merged, suite.kind), suite.expected(task))
    own, weights = dict(merged.named_parameters()), suite.weights(task)
    assert list(own) == list(suite.parameters) and all(same(own[name], weights[name]) for name in own)
    assert not any("expert" in name for name, _ in merged.named_modules())


def test_unloading_leaves_the_base_as_it_was(suite):
    model = with_experts(suite, "all", "shared")
    run(model, suite.kind)
    base = model.unload()
    own = dict(base.named_parameters())
    assert list(own) == list(suite.parameters)
    assert all(same(own[name], parameter) for name, parameter in suite.model.named_parameters())
    assert same(run(base, suite.kind), run(suite.model, suite.kind))


def test_transformers_loads_an_expert_by_itself(suite):
    model = type(suite.model).from_pretrained(suite.experts / "sparse").eval()
    assert same(run(model, suite.kind), suite.expected("sparse"))
    for task in ("shared", "all", "mask"):
        model.load_adapter(suite.experts / task, adapter_name=task)
    for task in ("mask", "all", "shared"):
        model.set_adapter(task)
        assert same(run(model, suite.kind), suite.expected(task))
    for module in model.modules():
        if hasattr(module, "merge"):
            module.merge()
    assert same(run(model, suite.kind), suite.expected("shared"))
    model.set_adapter("all")
    assert same(run(model, suite.kind), suite.expected("all"))
    model.disable_adapters()
    assert same(run(model, suite.kind), run(suite.model, suite.kind))
    model.enable_adapters()
    model.set_adapter("default")
    assert same(run(model, suite.kind), suite.expected("sparse"))


def test_saving_an_expert_writes_what_was_loaded(suite, tmp_path):
    with_experts(suite, "shared", "all").save_pretrained(tmp_path / "out")
    for task in ("shared", "all"):
        one, other = (load_file(f / task / "adapter_model.safetensors") for f in (suite.experts, tmp_path / "out"))
        assert one.keys() == other.keys() and all(same(other[key], tensor) for key, tensor in one.items())
        config = json.loads((tmp_path / "out" / task / "adapter_config.json").read_text())
        assert config["peft_type"] == "HF_MERGE" and config["parameters"] == suite.config[task]


SCRIPT = """
import sys, torch, transformers
if "{after}": import peft
import hf_merge
assert "{after}" or "peft" not in sys.modules
from transformers import {auto}
model = {auto}.from_pretrained("{experts}/all").eval()
model.load_adapter("{experts}/shared", adapter_name="shared")
model.set_adapter("default")
with torch.no_grad():
    torch.save(model(**torch.load("{data}"))[0], "{out}")
"""


@pytest.mark.parametrize(("suite", "after"), [("vit", ""), ("bert", "yes")], indirect=["suite"])
def test_a_new_process_that_imports_the_library_loads_an_expert(suite, tmp_path, after):
    auto = "AutoModelForMaskedLM" if after else "AutoModelForImageClassification"
    torch.save(batch(suite.kind), tmp_path / "data.pt")
    words = {"experts": suite.experts, "data": tmp_path / "data.pt", "out": tmp_path / "out.pt"}
    script = SCRIPT.format(after=after, auto=auto, **words)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "out.pt"), suite.expected("all"))


def test_importing_the_library_imports_none_of_the_others():
    script = "import sys, hf_merge; print(*sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("\n", "", 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_computed_wide_and_rounded_once(tmp_path, dtype):
    suite = Suite(tmp_path, "vit", dtype)
    suite.add("all", KINDS["all"])
    model = with_experts(suite, "all", "shared")
    assert same(run(model, "vit", dtype), suite.expected("all"))
    name = next(n for n, one in suite.config["all"].items() if one["kind"] == "mask")
    base, parts = dict(suite.model.named_parameters())[name].detach(), suite.stored["all"][name]
    mask = packing.unpack_mask(parts["mask"], base.numel()).view(base.shape)
    wide = base.double() + parts["scale"].double() * mask * suite.stored["shared"][name]["shared"].double()
    model.merge_adapter()
    assert torch.equal(dict(model.unload().named_parameters())[name], base)
    assert torch.equal(suite.weights("all")[name], wide.float().to(base.dtype))


def test_tied_weights_stay_tied(tmp_path):
    suite = Suite(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in suite.parameters
    suite.add("all", ["whole", "sparse"])
    model = with_experts(suite, "all", "shared")
    assert same(run(model, "llama"), suite.expected("all"))
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    assert same(run(merged, "llama"), suite.expected("all"))


def test_embeddings_and_head_of_an_expert_may_be_two(tmp_path):
    suite = Suite(tmp_path, "llama", tie_word_embeddings=True)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    suite.write("two", {name: entry("whole", (40, 16)) for name in names}, 5)
    untied = load(suite)
    untied.lm_head.weight = torch.nn.Parameter(suite.stored["two"]["lm_head.weight"]["whole"])
    untied.model.embed_tokens.weight.data = suite.stored["two"]["model.embed_tokens.weight"]["whole"]
    model = with_experts(suite, "two")
    assert same(run(model, "llama"), run(untied, "llama"))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert same(run(again, "llama"), run(untied, "llama")) and not again.config.tie_word_embeddings


def test_another_dtype_of_the_model_leaves_what_is_stored_as_it_is(tmp_path):
    suite = Suite(tmp_path, "vit")
    suite.add("all", KINDS["all"])
    model = with_experts(suite, "all", "shared").to(torch.bfloat16)
    suite.model.to(torch.bfloat16)
    merged = dict(model.merge_and_unload().named_parameters())
    weights = suite.weights("all")
    assert all(same(merged[name], weights[name]) and weights[name].dtype == torch.bfloat16 for name in weights)


def test_parameters_of_the_model_itself_and_weights_read_without_a_call(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
            self.again = self.attention.out_proj

        def forward(self, x):
            return self.again(self.attention(x, x, x)[0]) * self.scale

    torch.manual_seed(0)
    base, x = Model().eval(), torch.randn(2, 3, 8)
    weights = {name: torch.randn_like(p) for name, p in base.named_parameters()}
    parameters = {name: entry("whole", tuple(p.shape)) for name, p in base.named_parameters()}
    expected = copy.deepcopy(base)
    expected.load_state_dict(weights, strict=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored.adapter_config(parameters, "")))
    save_file({stored.key_of(name, "whole"): t for name, t in weights.items()}, tmp_path / "adapter_model.safetensors")
    with torch.no_grad():
        plain, wanted = base(x), expected(x)
        model = PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(model(x), wanted) and not torch.equal(plain, wanted)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        assert torch.equal(model.unload()(x), plain)


def test_a_head_with_other_labels_belongs_to_its_expert(tmp_path):
    suite = Suite(tmp_path, "vit")
    heads = {"classifier.weight": entry("whole", (5, 16)), "classifier.bias": entry("whole", (5,))}
    suite.write("five", heads, 3, id2label={i: f"kind {i}" for i in range(5)})
    model = with_experts(suite, "five")
    assert run(model, "vit").shape == (3, 5) and same(run(model, "vit"), suite.expected("five"))
    alone = type(suite.model).from_pretrained(suite.experts / "five").eval()
    assert same(run(alone, "vit"), suite.expected("five"))
    with model.disable_adapter():
        assert run(model, "vit").shape == (3, 3)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert again.config.id2label[4] == "kind 4" and again.classifier.out_features == 5
    assert same(run(again, "vit"), suite.expected("five"))


def test_experts_take_the_room_that_their_papers_say(suite):
    """A mask is 1/32 of float32 and a number for each parameter; sparse values are k numbers and k indices in a row."""
    for task, share in (("mask", 1 / 32), ("sparse", None)):
        parameters = suite.config[task]
        layout = stored.file_layout(parameters)
        found = sum(one.nbytes for one in layout.values())
        assert found == sum(t.nbytes for t in load_file(suite.experts / task / "adapter_model.safetensors").values())
        if share:
            assert 0 <= found - share * 4 * entries(parameters) < 5 * len(parameters)
        else:
            assert found == sum(one["rows"] * one["k"] * (4 + 2) for one in parameters.values())


def test_masks_are_packed_as_numpy_packs_them():
    numpy = pytest.importorskip("numpy")
    for count in (0, 1, 7, 8, 9, 100):
        mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
        packed = packing.pack_mask(mask)
        assert packed.tolist() == numpy.packbits(mask.numpy(), bitorder="little").tolist()
        assert torch.equal(packing.unpack_mask(packed, count), mask)


def test_a_mask_without_the_shared_vector_says_what_is_missing(suite):
    model = with_experts(suite, "mask")
    for act in (lambda: run(model, suite.kind), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SourceError, match=r"'mask' is a mask of the vector that all .* load_adapter\('.*shared'"):
            act()
    model.load_adapter(suite.experts / "shared", adapter_name="shared")
    assert same(run(model, suite.kind), suite.expected("mask"))
    model.delete_adapter("shared")
    with pytest.raises(SourceError, match="is a mask"):
        run(model, suite.kind)


def test_deleting_the_active_expert_leaves_the_others(suite):
    model = with_experts(suite, "whole", "sparse")
    model.delete_adapter("whole")
    assert same(run(model, suite.kind), suite.expected("sparse"))
    assert not any(name.endswith(".whole") for name in model.state_dict())
    status = model.get_model_status()
    assert status.available_adapters == status.active_adapters == ["sparse"] and status.trainable_params == 0


def test_a_run_that_fails_leaves_the_model_as_it_was(tmp_path):
    suite = Suite(tmp_path, "vit")
    suite.add("all", ["whole"])
    model = with_experts(suite, "all")
    token = model.base_model.model.vit.embeddings.cls_token
    with pytest.raises(ValueError, match="channel dimension"):
        model(pixel_values=torch.zeros(1, 5, 16, 16))
    assert model.base_model.model.vit.embeddings.cls_token is token
    assert same(run(model, "vit"), suite.expected("all"))


def refused(suite, parameters, text):
    with pytest.raises(SourceError, match=text):
        PeftModel.from_pretrained(load(suite), suite.write(f"bad{len(suite.config)}", parameters, 0))


def test_an_expert_of_another_model_is_refused_and_the_model_is_as_it_was(tmp_path):
    suite = Suite(tmp_path, "vit")
    suite.add("good", ["sparse"])
    other = Suite(tmp_path / "other", "bert")
    other.add("bert", ["whole"])
    model = with_experts(suite, "good")
    with pytest.raises(
        SourceError, match=r"Expert 'bert' .* changes \d+ parameters that ViTFor.* has not, such as 'bert"
    ):
        model.load_adapter(other.experts / "bert", adapter_name="bert")
    assert same(run(model, "vit"), suite.expected("good"))
    refused(suite, {"vit.embeddings.cls_token": entry("mask", (1, 1, 17))}, r"shape \[1, 1, 17\].*\[1, 1, 16\]")
    refused(suite, {"vit.embeddings.cls_tokens": entry("mask", (1, 1, 16))}, "Did you mean 'vit.embeddings.cls_token'")


@pytest.mark.parametrize(
    ("one", "text"),
    [
        ({"kind": "maks", "shape": [2]}, "should have a kind: .* Did you mean 'mask'"),
        ({"kind": "mask", "shape": [2.5]}, "should have the parameter's shape"),
        ({"kind": "mask"}, "should have the parameter's shape"),
        ({"kind": "whole", "shape": [2]}, "should have a dtype"),
        ({"kind": "sparse", "shape": [2, 4], "dtype": "float32"}, "should have rows and k"),
        ({"kind": "sparse", "shape": [2, 4], "dtype": "float32", "rows": 3, "k": 1}, "rows of equal length"),
        ({"kind": "sparse", "shape": [2, 4], "dtype": "float32", "rows": 2, "k": 5}, "rows of equal length"),
        ("mask", "should have a kind"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_by_name(one, text):
    with pytest.raises(SourceError, match=f"'a.weight' .* {text}"):
        PeftConfig.from_peft_type(peft_type="HF_MERGE", parameters={"a.weight": one})


def test_a_config_without_parameters_is_refused():
    with pytest.raises(SourceError, match="should have `parameters`"):
        PeftConfig.from_peft_type(peft_type="HF_MERGE")


def test_a_damaged_file_is_refused(tmp_path):
    suite = Suite(tmp_path, "vit")
    folder = suite.add("all", ["sparse"])
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "vit.layernorm.weight"
    key = stored.key_of(name, "indices")
    save_file({**tensors, key: torch.full_like(tensors[key], 16)}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=f"replaces entries 16 to 16 in rows of '{name}', which have 16"):
        run(with_experts(suite, "all"), "vit")
    save_file({k: t for k, t in tensors.items() if k != key}, folder / "adapter_model.safetensors")
    for model in (with_experts(suite, "all"), type(suite.model).from_pretrained(folder)):
        with pytest.raises(SourceError, match=f"has no values for '{name}'.*{key}"):
            run(model, "vit")


def test_one_expert_at_a_time(suite):
    model = with_experts(suite, "whole", "sparse")
    with pytest.raises(SourceError, match="group it by task"):
        model(**batch(suite.kind), adapter_names=["whole", "sparse", "whole"])
    assert same(run(model, suite.kind), suite.expected("whole"))
    model.base_model.set_adapter(["whole", "sparse"])
    with pytest.raises(SourceError, match="do not add up: whole, sparse"):
        run(model, suite.kind)


def test_an_expert_beside_another_adapter_on_the_same_module_is_refused(tmp_path):
    from peft import LoraConfig

    suite = Suite(tmp_path, "vit")
    suite.add("all", ["sparse"])
    names = [name for name, part in suite.model.named_modules() if isinstance(part, torch.nn.Linear)]
    lora = get_peft_model(load(suite), LoraConfig(r=2, target_modules=names))
    with pytest.raises(SourceError, match=r"so does another adapter: merge_and_unload\(\)"):
        PeftModel.from_pretrained(lora.base_model.model, suite.experts / "all")
