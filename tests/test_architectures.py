"""Every class of the table: merged exactly, no tensor lost, in the layout of `save_pretrained`, and it runs."""

import pytest

import hf_merge
from tests import architectures
from tests.architectures import DOCUMENT, NAMES, UNTESTED, check_mean, checked_row, save_tiny

TESTED = [name for name in NAMES if name not in UNTESTED]


DECODERS = [name for name in TESTED if name.endswith("ForCausalLM")]


def assert_row_is_current(row):
    assert row in DOCUMENT.read_text().splitlines(), "run `python -m tests.architectures`"


class TestDecoders:  # two classes, that two workers may share them
    @pytest.mark.parametrize("name", DECODERS)
    def test_merges_exactly_and_its_row_is_current(self, name, tmp_path):
        assert_row_is_current(checked_row(name, tmp_path))


class TestOthers:
    @pytest.mark.parametrize("name", [name for name in TESTED if name not in DECODERS])
    def test_merges_exactly_and_its_row_is_current(self, name, tmp_path):
        assert_row_is_current(checked_row(name, tmp_path))


def test_the_document_has_these_classes_and_no_others():
    text = DOCUMENT.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert text == architectures.document({name: rows.get(name, "") for name in TESTED})


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "ViTForImageClassification", "LlavaForConditionalGeneration"])
def test_the_layout_in_memory_stays_as_well(name, tmp_path):
    saved = save_tiny(name, tmp_path, original_format=False)
    merged = hf_merge.merge([saved.folders["a"], saved.folders["b"]], tmp_path / "m", method="linear")
    check_mean(saved, merged.path)


@pytest.mark.parametrize("part", ["experts.1.w2.weight", "q_proj.weight"])
def test_a_dropped_tensor_is_found(part, tmp_path, monkeypatch):
    saved = save_tiny("MixtralForCausalLM", tmp_path)
    opened = hf_merge.api.open_sources

    def without_one(*args, **hub):
        sources = opened(*args, **hub)
        donor = next(iter(sources.values()))
        donor.specs = {name: spec for name, spec in donor.specs.items() if not name.endswith(part)}
        return sources

    monkeypatch.setattr("hf_merge.api.open_sources", without_one)
    merged = hf_merge.merge([saved.folders["a"], saved.folders["b"]], tmp_path / "m", method="linear")
    with pytest.raises(AssertionError, match=part):
        check_mean(saved, merged.path)
