"""Private parts of the Hugging Face libraries that we use: an upgrade that changes one fails here, by name."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_merge import _compat
from tests.conftest import small_config


def small_mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )


def test_revert_weight_conversion_still_gives_the_layout_on_disk():
    layout = _compat.on_disk_layout(MixtralForCausalLM(small_mixtral()))
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert expert in layout and layout[expert][0] is None
    assert layout["model.norm.weight"][0] == "model.norm.weight"


def test_tied_weights_are_still_listed():
    layout = _compat.on_disk_layout(LlamaForCausalLM(small_config(tie_word_embeddings=True)))
    assert "model.embed_tokens.weight" in layout and "lm_head.weight" not in layout


@pytest.mark.parametrize(
    ("kinds", "architecture", "tied"),
    [
        (["llama"], "LlamaForCausalLM", {"lm_head.weight", "model.embed_tokens.weight"}),
        (["vit"], "ViTForImageClassification", set()),
        (["gemma3", "gemma3_text", "siglip_vision_model"], "Gemma3ForConditionalGeneration", {"lm_head.weight"}),
        (["llama"], "MistralForCausalLM", None),  # is not in that file
        (["no_such_thing"], "LlamaForCausalLM", None),
        (["llama_of_another_kind"], "LlamaForCausalLM", None),  # begins like one that is there
        (["bark"], "BarkFineModel", None),  # makes names when it runs
        (["../llama"], "LlamaForCausalLM", None),
        (["llama" + 9999 * "x"], "LlamaForCausalLM", None),
    ],
)
def test_declared_ties_are_still_read_from_the_files_of_a_class(kinds, architecture, tied):
    found = _compat.declared_ties(kinds, architecture)
    assert found == tied if tied is None or not tied else found is not None and tied <= found


def test_plain_module_keeps_its_names():
    module = torch.nn.Linear(2, 2)
    assert {name: live for name, (live, _) in _compat.on_disk_layout(module).items()} == {
        "weight": "weight",
        "bias": "bias",
    }


def test_mxfp4_is_still_unpacked_by_transformers_low_half_first_and_transposed():
    blocks, scales = torch.zeros(1, 2, 1, 16, dtype=torch.uint8), torch.full((1, 2, 1), 128, dtype=torch.uint8)
    blocks[0, 1, 0, 0] = 0xA7  # 7 is 6.0, 10 is -1.0; the exponent is 1
    made = _compat.mxfp4_dequantizer()(blocks, scales, dtype=torch.float32)
    assert made.shape == (1, 32, 2) and made[0, :2, 1].tolist() == [12.0, -2.0] and made.abs().sum() == 14


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("Nonsense", None),
    ],
)
def test_task_mapping_is_still_there(architecture, tag):
    assert _compat.pipeline_tag(architecture) == tag


def test_cli_words_are_still_there():
    argument, option, out = _compat.cli_words()
    assert callable(argument) and callable(option)
    assert {"text", "table", "dict", "result", "warning", "error", "mode", "set_no_truncate"} <= set(dir(out))


def test_table_of_tasks_is_still_that_of_transformers():
    from transformers.modelcard import TASK_MAPPING

    for tag, mapping in TASK_MAPPING.items():
        for name in _compat._flat(mapping.values()):
            found = _compat.pipeline_tag(name)
            assert found is not None and name in _compat._flat(TASK_MAPPING[found].values()), (tag, name)
    assert list(TASK_MAPPING) == list(_compat._TASKS)


def test_tables_of_classes_are_still_read_from_the_file_as_they_are_when_it_is_imported():
    from transformers.models.auto import modeling_auto

    read = _compat.classes_of_tasks()
    for word in {word for words in _compat._TASKS.values() for word in words}:
        imported = set(_compat._flat(getattr(modeling_auto, f"MODEL_FOR_{word}_MAPPING_NAMES").values()))
        assert imported <= read[word], word
        assert not any("For" in name for name in read[word] - imported), word  # the rest are model types


def mixtral_tables():
    with torch.device("meta"):
        empty = MixtralForCausalLM(small_mixtral())
    return MixtralForCausalLM(small_mixtral()), _compat.Conversion(empty)


def test_conversion_tables_still_say_where_a_tensor_goes():
    _, tables = mixtral_tables()
    names = ["model.layers.0.block_sparse_moe.experts.1.w1.weight", "model.norm.weight", "norm.weight", "no.such"]
    places = tables.places(names)
    assert places[names[0]].live == ("model.layers.0.mlp.experts.gate_up_proj",) and places[names[0]].pattern
    assert places["model.norm.weight"] == places["norm.weight"] == _compat.Place(("model.norm.weight",), None)
    assert "no.such" not in places


def test_conversion_tables_still_go_both_ways_and_cut_without_copies():
    model, tables = mixtral_tables()
    live = "model.layers.0.mlp.experts.gate_up_proj"
    fused = model.state_dict()[live]
    parts = tables.to_disk({live: fused})
    assert set(parts) == {
        f"model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight" for expert in (0, 1) for w in ("w1", "w3")
    }
    assert all(type(part) is torch.Tensor for part in parts.values())
    assert {part.untyped_storage().data_ptr() for part in parts.values()} == {fused.untyped_storage().data_ptr()}
    assert torch.equal(tables.to_memory(parts)[live], fused)


def test_device_maps_are_still_inferred_for_devices_that_are_not_here(caplog):
    config = {**small_config(tie_word_embeddings=True).to_dict(), "architectures": ["LlamaForCausalLM"]}
    module = _compat.empty_model(config)
    assert module is not None
    found = _compat.module_devices(module, "auto", {0: 60_000, 1: 60_000, "cpu": 10**6})
    assert found["model.embed_tokens"] == found["lm_head"] == 0 and found["model.layers.0"] == 1
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert _compat.expanded(found, names) == dict(zip(names, [1, "cpu"], strict=True))
    assert not caplog.records


def test_infinite_numbers_of_a_config_are_still_decoded():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        num_heads=4, head_dim=8, hidden_size=16, num_hidden_layers=1, vocab_size=8, n_groups=1, state_size=4
    )
    written = {**json.loads(config.to_json_string()), "architectures": ["Mamba2ForCausalLM"]}
    assert written["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert isinstance(_compat.empty_model(written), Mamba2ForCausalLM)


def test_chat_templates_are_still_compiled_with_transformers_own_tags():
    import jinja2

    made = _compat.compile_chat_template(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    )
    assert made.render(messages=["a", "b"]) == "ab"
    with pytest.raises(jinja2.TemplateSyntaxError):
        _compat.compile_chat_template("{{")


def test_quiet_lets_only_errors_through_and_puts_the_level_back():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with _compat.quiet():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before


def test_a_file_that_another_process_uploaded_is_still_committed_by_its_digest():
    from huggingface_hub import _commit_api

    made = _compat.uploaded_file("model.safetensors", sha256="ab" * 32, size=7)
    assert made._is_uploaded and made._local_oid == "ab" * 32 and made._remote_oid is None
    assert _compat.uploaded_file("m", sha256="ab" * 32, size=7, is_committed=True)._remote_oid == made._local_oid
    _, line = _commit_api._prepare_commit_payload([made], {}, "message")
    about = {"path": "model.safetensors", "algo": "sha256", "oid": "ab" * 32, "size": 7}
    assert line == {"key": "lfsFile", "value": about}


def test_extensions_of_hf_are_still_found_in_the_same_place_and_written_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = _compat.extension_folder("merge")
    assert folder == tmp_path / ".local" / "share" / "hf" / "extensions" / "hf-merge"
    assert _compat.extension_owner(folder) == (None, None)
    _compat.extension_manifest(
        "me.here", "hf-merge", "merge", executable=tmp_path / "x", version="1", description="y"
    ).save(folder)
    written = json.loads((folder / _compat.extension_file()).read_text())
    assert written.keys() == {"owner", "repo", "repo_id", "short_name", "executable_path", "type", "installed_at",
                              "description", "commit_sha"}  # fmt: skip
    assert written["executable_path"] == str(tmp_path / "x")
    assert _compat.extension_owner(folder) == ("me.here", "me.here/hf-merge")


def test_jobs_are_still_asked_for_by_the_same_json_and_mounted_where_the_cache_looks(tmp_path):
    from huggingface_hub import Volume, try_to_load_from_cache

    volume = Volume(type="model", source="org/a", mount_path="/models/a", revision="0" * 40, read_only=True)
    payload = _compat.job_payload(
        image=_compat.uv_image(), command=["sh"], env={"A": "b"}, secrets={"HF_TOKEN": "x"}, flavor="cpu-basic",
        timeout="2h", name="n", volumes=[volume],
    )  # fmt: skip
    assert payload == {
        "command": ["sh"], "arguments": [], "environment": {"A": "b"}, "flavor": "cpu-basic",
        "secrets": {"HF_TOKEN": "x"}, "timeoutSeconds": 7200, "labels": {"name": "n"},
        "dockerImage": _compat.uv_image(),
        "volumes": [
            {"type": "model", "source": "org/a", "mountPath": "/models/a", "revision": "0" * 40, "readOnly": True}
        ],
    }  # fmt: skip
    assert "uv" in _compat.uv_image()
    folder = tmp_path / _compat.cache_folder("org/a") / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    found = try_to_load_from_cache("org/a", "config.json", cache_dir=tmp_path, revision="0" * 40)
    assert found == str(folder / "config.json")


def test_every_word_of_loading_is_still_read_by_from_pretrained():
    import inspect

    from transformers import PreTrainedModel

    source = inspect.getsource(PreTrainedModel.from_pretrained)
    assert not [word for word in _compat.LOADING_WORDS if f'"{word}"' not in source and f"{word}=" not in source]


def test_classes_are_still_found_by_name_and_by_auto_class(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, LlamaModel

    assert _compat.class_to_load({"architectures": ["LlamaForCausalLM"]}, tmp_path) is LlamaForCausalLM
    assert _compat.class_to_load({}, tmp_path) is AutoModel
    assert _compat.class_to_load({"architectures": ["NoSuch"]}, tmp_path) is None
    config = small_config()
    assert _compat.class_of_auto(AutoModelForCausalLM, config) == (LlamaForCausalLM, config)
    assert _compat.class_of_auto(AutoModel, config) == (LlamaModel, config)
    assert _compat.class_of_auto(AutoModelForImageClassification, config) == (None, config)


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("BertModel", "AutoModel"),
        ("NoSuch", "AutoModel"),
    ],
)
def test_auto_classes_are_still_named(architecture, auto):
    assert _compat.auto_class_name(architecture) == auto


def test_configs_are_still_changed_by_attributes_and_say_what_is_none(tmp_path):
    small_config().save_pretrained(tmp_path)
    changes = {"use_cache": False, "nonsense": 1, "revision": "main"}
    config, unknown = _compat.config_to_load(LlamaForCausalLM, tmp_path, changes)
    assert config.use_cache is False and unknown == {"nonsense", "revision"}


def test_generation_settings_are_still_read_from_old_configs(tmp_path):
    config = json.loads(small_config().to_json_string())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_beams": 3}))
    assert _compat.generation_config(tmp_path).num_beams == 3
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert _compat.generation_config(tmp_path).max_new_tokens == 7


def test_tensors_are_still_asked_for_in_the_order_of_numbers():
    assert _compat.loading_order(["layers.10.x", "layers.9.x"]) == ["layers.9.x", "layers.10.x"]


def test_tokenizers_without_a_class_still_have_that_of_their_model_type(tmp_path):
    assert _compat.tokenizer_class({"model_type": "bert"}, tmp_path) == "BertTokenizer"
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Own"}')
    assert _compat.tokenizer_class({"model_type": "bert"}, tmp_path) is None


def test_the_loader_still_asks_of_a_slice_no_more_than_ours_has(tmp_path, monkeypatch):
    """The duck type of safetensors' slices that `MergedSlice` is; with tensor parallelism see test_on_load."""
    asked = set()

    class Slice:
        """A slice of a safetensors file, and nothing else."""

        def __init__(self, values):
            self.values = values

        def __getattribute__(self, name):
            asked.add(name)
            return object.__getattribute__(self, name)

        def __getitem__(self, index):
            return object.__getattribute__(self, "values")[index]

    for model in (MixtralForCausalLM(small_mixtral()), LlamaForCausalLM(small_config())):
        state = {name: Slice(tensor) for name, (_, tensor) in _compat.on_disk_layout(model).items()}
        config = model.config
        for device_map in (None, "cpu"):
            words = {"config": config, "device_map": device_map, "dtype": torch.float32}
            loaded = type(model).from_pretrained(None, state_dict=state, **words)
            assert all(
                torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True)
            )
    assert asked <= {"get_shape", "__class__"}, asked


def test_the_default_group_still_has_a_store(tmp_path):
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        store = dist.PrefixStore("hf_merge", _compat.default_store())
        store.set("key", "value")
        assert store.check(["key"]) and not store.check(["other"]) and store.multi_get(["key"]) == [b"value"]
        assert store.compare_set("first", "", "one") == b"one" == store.compare_set("first", "", "two")
        assert store.add("count", 1) == 1
    finally:
        dist.destroy_process_group()


def test_parts_of_fused_parameters_are_still_views_of_them():
    parts = _compat.parts_on_disk(
        json.loads(MixtralForCausalLM(small_mixtral()).config.to_json_string()) | ARCHITECTURE
    )
    live, view = parts["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert live == "model.layers.0.mlp.experts.gate_up_proj"
    assert view.shape == (16, 16) and view.stride() == (16, 1) and view.storage_offset() == (2 * 16 + 16) * 16
    assert parts["model.norm.weight"][0] == "model.norm.weight"


ARCHITECTURE = {"architectures": ["MixtralForCausalLM"]}


def test_experts_still_say_whether_they_are_transposed():
    from transformers import GptOssConfig

    words = json.loads(GptOssConfig(num_hidden_layers=1).to_json_string()) | {"architectures": ["GptOssForCausalLM"]}
    assert _compat.is_transposed(words, "model.layers.0.mlp.experts")
    config = json.loads(small_mixtral().to_json_string()) | ARCHITECTURE
    assert not _compat.is_transposed(config, "model.layers.0.mlp.experts")
    assert not _compat.is_transposed(config, "absent")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("rest", ["meta", "cpu"])
def test_peft_still_merges_one_module_of_a_model_without_values(rest):
    config = json.loads(small_config().to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    adapter = {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]}
    name, state = "model.layers.0.self_attn.q_proj", torch.get_rng_state()
    model = _compat.peft_model(config, adapter, {f"{name}.weight": torch.zeros(32, 32)}, rest=rest)
    assert torch.equal(torch.get_rng_state(), state)
    assert _compat.peft_targets(model)[0] == name and len(_compat.peft_targets(model)) == 6
    expected = _compat.peft_tensors(model)
    assert not any("norm" in key for key in expected)
    tensors = {key: torch.ones(t.shape) for key, t in expected.items() if name in key}
    merged = _compat.peft_merge(model, tensors, [name])
    assert torch.equal(merged[f"{name}.weight"], torch.full((32, 32), 16.0))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_live_adapters_are_still_told_from_their_base():
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM(small_config())
    names = set(model.state_dict())
    assert _compat.peft_live(model) == {}
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    ((config, tensors),) = _compat.peft_live(model).values()
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["q_proj"]
    assert "base_model.model.model.norm.weight" in tensors and len(tensors) == 13
    assert set(_compat.peft_base(model)[1]) == names
    model.merge_adapter()
    with pytest.raises(ValueError, match="has merged"):
        _compat.peft_live(model)


def test_a_type_can_still_be_added_to_pefts_enum():
    """The day that PEFT takes types of others by itself, `register_peft_method` alone should do."""
    import copy
    import pickle

    from peft import PeftType
    from peft.utils.peft_types import register_peft_method

    with pytest.raises(ValueError, match="Unknown PEFT type HF_MERGE_TEST"):
        register_peft_method(name="hf_merge_test", config_cls=None, model_cls=None)
    before = len(PeftType)
    kind = _compat.peft_type("HF_MERGE")
    assert kind is PeftType.HF_MERGE is PeftType("HF_MERGE") is _compat.peft_type("HF_MERGE")
    assert kind == "HF_MERGE" and f"{kind.value}" == "HF_MERGE" and {kind: 1}[PeftType["HF_MERGE"]] == 1
    assert copy.deepcopy(kind) is kind is pickle.loads(pickle.dumps(kind)) and json.dumps(kind) == '"HF_MERGE"'
    assert len(PeftType) == before and kind in list(PeftType) and _compat.peft_knows("HF_MERGE")
    assert _compat.peft_type("LORA") is PeftType.LORA and not _compat.peft_knows("HF_MERGE_TEST")


def test_what_experts_override_in_peft_is_still_called():
    import inspect

    from peft import peft_model
    from peft.tuners import tuners_utils
    from peft.utils import save_and_load

    from hf_merge.experts.layers import ExpertLayer
    from hf_merge.experts.peft_method import ExpertModel

    asked = "".join(inspect.getsource(part) for part in (peft_model, tuners_utils, save_and_load))
    names = {
        "inject_adapter", "_create_and_replace", "_cast_adapter_dtype", "_enable_peft_forward_hooks", "delete_adapter",
        "_unload_and_optionally_merge", "_all_available_adapter_names", "enable_adapters",
        "_get_available_adapters", "_move_adapter_to_device_of_base_layer",
    }  # fmt: skip
    assert not [name for name in names if f".{name}(" not in asked and f'"{name}"' not in asked]
    for ours, theirs in ((ExpertModel, tuners_utils.BaseTuner), (ExpertLayer, tuners_utils.BaseTunerLayer)):
        for name in names & vars(ours).keys() & vars(theirs).keys():
            one, other = (inspect.signature(getattr(part, name)).parameters for part in (ours, theirs))
            assert [*one] == [*other], name
