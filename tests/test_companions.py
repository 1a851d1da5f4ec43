"""What belongs to a model that sees comes along: processor, image processor, chat template, generation settings."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

import hf_merge
from tests.architectures import save_tiny
from tests.conftest import make_tokenizer


@pytest.fixture
def llavas(tmp_path):
    """Two tiny Llavas with all that their makers would upload; only the first has a chat template."""
    image_processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    pictures = image_processors.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    saved = save_tiny("LlavaForConditionalGeneration", tmp_path)
    for name, model in saved.models.items():
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        template = f"{name}: {{{{ messages[0].content }}}}"
        LlavaProcessor(
            pictures, tokenizer, patch_size=8, image_token="<image>", chat_template=template,
            num_additional_image_tokens=1, vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        ).save_pretrained(saved.folders[name])  # fmt: skip
        pictures.save_pretrained(saved.folders[name])
        (saved.folders[name] / "video_preprocessor_config.json").write_text("{}")
        GenerationConfig(max_new_tokens=len(name)).save_pretrained(saved.folders[name])
    return saved


def test_all_that_belongs_to_a_model_that_sees_comes_from_the_donor(llavas, tmp_path):
    pair, base = [llavas.folders["a"], llavas.folders["b"]], llavas.folders["base"]
    for donor, options in ((pair[0], {}), (base, {"base_model": base})):
        method = "ties" if options else "linear"
        out = hf_merge.merge(pair, tmp_path / method, method=method, **options)
        given = {path.name for path in donor.iterdir()}
        assert {path.name for path in out.path.iterdir()} == given | {"README.md", "hf_merge_recipe.yaml"}
        assert {"processor_config.json", "preprocessor_config.json", "chat_template.jinja"} < given
        for name in given - {"model.safetensors", "config.json"}:
            assert (out.path / name).read_bytes() == (donor / name).read_bytes(), name


def test_the_processor_of_a_merge_feeds_the_model(llavas, tmp_path):
    out = hf_merge.merge([llavas.folders["a"], llavas.folders["b"]], tmp_path / "m", method="linear")
    processor = AutoProcessor.from_pretrained(out.path)
    assert isinstance(processor, LlavaProcessor)
    assert processor.apply_chat_template([{"role": "user", "content": "w3"}]) == "a: w3"
    model = LlavaForConditionalGeneration.from_pretrained(out.path)
    assert model.generation_config.max_new_tokens == 1
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    inputs = processor(images=picture, text="w3 <image> w4", return_tensors="pt")
    model.config.image_token_id = inputs.input_ids.max().item()
    with torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())


def test_a_tokenizer_with_its_own_files_comes_along(tmp_path):
    saved = save_tiny("LlamaForCausalLM", tmp_path)
    folder = saved.folders["a"]
    make_tokenizer().save_pretrained(folder)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    out = hf_merge.merge([folder, saved.folders["b"]], tmp_path / "m", method="linear")
    assert (out.path / "merges.txt").read_text() == "#version"
    assert "tools" in AutoTokenizer.from_pretrained(out.path).chat_template
    assert json.loads((out.path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert load_file(out.path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
