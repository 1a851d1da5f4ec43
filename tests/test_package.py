"""What is shipped: templates in the wheel, true documents, examples that run."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import hf_merge
from hf_merge import derive
from hf_merge.card import template_folder
from hf_merge.method import _registry, get_method

ROOT = Path(__file__).parent.parent


def files_of_the_page() -> list[str]:
    """Return the files of the Space; what Python leaves beside them is not shipped."""
    paths = [path for path in (ROOT / "space").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path.relative_to(ROOT / "space").as_posix() for path in paths]


def built(kind: str, folder: Path) -> Path:
    pytest.importorskip("hatchling")
    call = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder]
    subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


def test_wheel_holds_templates_page_types_and_licence(tmp_path):
    names = zipfile.ZipFile(built("wheel", tmp_path)).namelist()
    assert {f"hf_merge/{name}" for name in ("model_card_templates/merged.md", "licences.toml", "py.typed")} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests")]
    page = {f"hf_merge/space/{name}" for name in files_of_the_page()}
    assert {name for name in names if name.startswith("hf_merge/space/")} == page


def test_source_distribution_holds_the_page(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"space/{name}" for name in files_of_the_page()} <= names


def test_templates_are_found_in_a_checkout():
    assert all((template_folder() / name).is_file() for name in ("merged.md", "adapter.md"))


def test_public_names_are_sorted_documented_and_there():
    assert hf_merge.__all__ == sorted(hf_merge.__all__)
    assert all(getattr(hf_merge, name).__doc__ for name in hf_merge.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        hf_merge.nonsense  # noqa: B018


def test_derived_documents_are_true():
    stale = [
        path.name for path, text in derive.derived_files(ROOT).items() if not path.is_file() or path.read_text() != text
    ]
    assert not stale, "run `make derive`"


def test_derive_notices_a_stale_document(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# x\n<!-- derived: methods -->\nold\n<!-- /derived -->\nend\n")
    text = derive.derived_files(tmp_path)[tmp_path / "README.md"]
    assert "old" not in text and "| [ties]" in text and text.startswith("# x\n") and text.endswith("end\n")


def test_example_of_contributing_is_a_method_that_works():
    code = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]
    hf_merge.list_methods()  # loads those that there are
    before = dict(_registry)
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "largest"})
        (name,) = set(_registry) - set(before)
        base, a, b = ({"x": torch.tensor(values)} for values in ([1.0, 1.0], [3.0, 0.0], [0.0, 2.0]))
        merged = hf_merge.merge_state_dicts([a, b], method=name, base_model=base, weight=[1.0, 3.0])
        assert merged["x"].tolist() == [1 - 3.0, 1 + 3.0]
        assert get_method(name).summary == "Keep, for each entry, the task vector of largest magnitude."
    finally:
        _registry.clear()
        _registry.update(before)


STUDIES = {"vision8.yaml", "vision30.yaml"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("example", sorted({path.name for path in (ROOT / "examples").glob("*.yaml")} - STUDIES))
def test_example_recipe_runs(example, llamas, tmp_path):
    """The recipe as it is, but for the names of its models."""
    text = (ROOT / "examples" / example).read_text()
    for name, folder in {"base": "base", "fine-tune-a": "a", "fine-tune-b": "b"}.items():
        text = re.sub(rf"\borg/{name}\b", str(llamas[folder]), text)
    for name in sorted(set(re.findall(r"org/(lora-[ab])", text))):
        adapter = hf_merge.extract_adapter(llamas[name[-1]], llamas["base"], tmp_path / name, rank=2)
        text = text.replace(f"org/{name}", str(adapter.path))
    recipe = tmp_path / example
    recipe.write_text(text)
    assert hf_merge.merge(recipe, tmp_path / "m").load() is not None
