"""What a merge inherits from the cards of its models, and that nothing else gets through them."""

import itertools
import re
import shutil
import time

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

import hf_merge
from hf_merge.sources import open_source
from hf_merge.sources.cards import read_card
from hf_merge.sources.view import View
from hf_merge.types import ModelRef
from tests.test_adapter import adapted
from tests.test_adapter import make as make_model

KEYS = {"license", "license_name", "license_link", "language", "datasets", "base_model", "base_model_relation",
        "library_name", "pipeline_tag", "tags"}  # fmt: skip


@pytest.fixture
def models(llamas, tmp_path):
    """Return what copies `base`, `a` and `b` with these cards (None: no card)."""

    def make(**cards):
        for name, card in {"base": None, "a": None, "b": None, **cards}.items():
            shutil.copytree(llamas[name], tmp_path / "in" / name, dirs_exist_ok=True)
            path = tmp_path / "in" / name / "README.md"
            path.unlink(missing_ok=True)
            if card is not None:
                path.write_bytes(card if isinstance(card, bytes) else card.encode())
        return {name: tmp_path / "in" / name for name in ("base", "a", "b")}

    return make


@pytest.fixture
def hub(tmp_path):
    """Return what shows folders as models of the Hub, as `org/NAME` in a cache."""

    def publish(folders):
        for i, (name, folder) in enumerate(folders.items()):
            cached = tmp_path / "hub" / f"models--org--{name}"
            (cached / "refs").mkdir(parents=True)
            (cached / "snapshots").mkdir()
            (cached / "refs" / "main").write_text(f"{i:040x}")
            (cached / "snapshots" / f"{i:040x}").symlink_to(folder)
        return {"cache_dir": tmp_path / "hub", "local_files_only": True}

    return publish


def front(**words):
    return f"---\n{ModelCardData(**words)}\n---\n# A model\n"


def merged(folders, tmp_path, **changes):
    kept = [folder for name, folder in folders.items() if name != "base"]
    out = hf_merge.merge(kept, tmp_path / "m", method="linear", **changes)
    content = (out.path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(content).data.to_dict()
    assert ModelCardData(**data).to_dict() == data and data.keys() <= KEYS, "the front matter is read as it was meant"
    assert str(tmp_path) not in content
    rows = [line for line in content.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 5 for line in rows)
    return data, content


def licence_warnings(models, **hub):
    made = hf_merge.plan(models, method="linear", **hub)
    assert not made.errors
    return [problem.text for problem in made.problems if "licence" in problem.text]


def test_licence_languages_and_datasets_are_those_of_the_models(models, tmp_path):
    a = front(license="llama3.1", language=["en", "no"], datasets=["org/data"])
    b = front(license="apache-2.0", language="de", datasets=["org/data", "squad"])
    data, content = merged(models(a=a, b=b), tmp_path)
    assert data["license"] == "llama3.1" and "license_name" not in data
    assert data["language"] == ["en", "no", "de"] and data["datasets"] == ["org/data", "squad"]
    assert "| `a` | merged | `llama3.1` | - |" in content and "'Built with Llama' is shown" in content
    assert "So this merge carries `llama3.1`" in content and "## Limits" in content


def test_norwegian_without_quotes_is_a_language(models, tmp_path):
    data, _ = merged(models(a="---\nlicense: mit\nlanguage: [no, en]\n---\n", b=front(license="mit")), tmp_path)
    assert data["language"] == ["no", "en"] and data["license"] == "mit"


def test_words_that_are_empty_say_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: ['', ~, true]\nlicense_link: ''\n---\n")
    assert read_card(tmp_path, "org/a").to_dict() == {"license": ["mit"]}


def test_named_licence_keeps_its_name_and_link(models, tmp_path):
    link = "https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE"
    a = front(license="other", license_name="qwen", license_link=link)
    data, content = merged(models(a=a, b=front(license="mit")), tmp_path)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "qwen", link)
    assert f"| [qwen]({link}) |" in content and "So this merge carries `qwen`" in content


def test_conflicting_licences_are_told_and_none_is_claimed(models, tmp_path):
    folders = models(a=front(license="llama2"), b=front(license="llama3"))
    data, content = merged(folders, tmp_path)
    assert data["license"] == "other" and "license_name" not in data
    assert "In conflict: no licence here stands for both llama2 and llama3." in content
    (told,) = licence_warnings([folders["a"], folders["b"]])
    assert "llama2 and llama3" in told


def test_folders_without_cards_are_quiet_in_the_plan_and_unknown_on_the_card(models, tmp_path):
    folders = models()
    data, content = merged(folders, tmp_path)
    assert "license" not in data and "Unknown licence of `a`" in content
    assert "| `a` | merged | unknown | - |" in content
    assert not licence_warnings([folders["a"], folders["b"]])


def test_ones_own_folder_beside_a_model_with_a_licence_is_quiet_too(models, tmp_path):
    folders = models(a=front(license="gemma"))
    assert not licence_warnings([folders["a"], folders["b"]])
    data, content = merged(folders, tmp_path)
    assert "license" not in data and "Unknown licence of `b`" in content and "`gemma`" in content


def test_public_model_without_a_licence_is_a_warning_if_any_has_a_card(models, hub):
    folders = models(a=front(license="mit"), b=front(language="en"))
    cache = hub(folders)
    (told,) = licence_warnings(["org/a", "org/b"], **cache)
    assert "'org/b' is unknown: the card names none" in told
    (told,) = licence_warnings(["org/a", "org/base"], **cache)
    assert "'org/base' is unknown: no card" in told
    assert not licence_warnings(["org/a"], **cache) and not licence_warnings(["org/base"], **cache)


def test_licence_that_nobody_knows_is_a_warning_and_stays_unknown(models, tmp_path):
    folders = models(a=front(license="free-as-in-beer"), b=front(license="mit"))
    (told,) = licence_warnings([folders["a"], folders["b"]])
    assert "free-as-in-beer" in told
    data, content = merged(folders, tmp_path)
    assert "license" not in data and "| unknown (`free-as-in-beer`) |" in content


def test_merge_of_merges_names_what_they_were_made_from(models, hub, tmp_path):
    a = front(license="mit", base_model=["org/x", "org/y"], base_model_relation="merge")
    b = front(license="mit", base_model="org/z", tags=["mergekit"])
    tuned = front(license="mit", base_model="org/origin")
    folders = models(a=a, b=b, base=tuned)
    cache = hub({"b": folders["b"]})
    out = hf_merge.merge([folders["a"], "org/b", folders["base"]], tmp_path / "m", method="linear", **cache)
    assert out.card.data.to_dict()["base_model"] == ["org/x", "org/y", "org/b"]
    text = out.card.text
    assert "`a` is itself a merge, by its card made from [org/x](https://huggingface.co/org/x), [org/y]" in text
    assert "[org/b](https://huggingface.co/org/b) is itself a merge, by its card made from [org/z]" in text
    assert "org/origin" not in text, "a fine-tune is no merge"


def test_card_of_a_merge_is_read_by_the_next_one(models, tmp_path):
    folders = models(a=front(license="cc-by-nc-4.0", language="en"), b=front(license="mit", language="de"))
    merged(folders, tmp_path)
    again = hf_merge.merge([tmp_path / "m", folders["b"]], tmp_path / "m2", method="linear")
    assert again.card.data.license == "cc-by-nc-4.0" and again.card.data.language == ["en", "de"]


def test_models_of_stages_count(models, tmp_path):
    folders = models(a=front(license="gpl-3.0"), b=front(license="mit"), base=front(license="agpl-3.0"))
    stage = {"name": "mean", "merge_method": "linear", "models": [str(folders["a"]), str(folders["b"])]}
    last = {"merge_method": "linear", "models": ["mean", str(folders["base"])]}
    path = tmp_path / "recipe.yaml"
    path.write_text("\n---\n".join(str(part) for part in (stage, last)))
    out = hf_merge.merge(path, tmp_path / "m")
    assert out.card.data.license == "agpl-3.0"
    assert "| &nbsp;&nbsp;`a` | in `mean` | `gpl-3.0` | - |" in out.card.content


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")  # of PEFT
def test_adapter_counts_beside_its_base(tmp_path):
    adapted(make_model("llama"), tmp_path, target_modules=["q_proj"])
    (tmp_path / "base" / "README.md").write_text(front(license="mit"))
    (tmp_path / "adapter" / "README.md").write_text(front(license="cc-by-nc-4.0", base_model=str(tmp_path / "base")))
    out = hf_merge.merge([f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], tmp_path / "m", method="passthrough")
    assert out.card.data.license == "cc-by-nc-4.0" and str(tmp_path) not in out.card.content
    assert "| `base` + `adapter` | merged | `mit` + `cc-by-nc-4.0` | - |" in out.card.content


def test_models_in_memory_have_no_card(tmp_path):
    out = hf_merge.merge([{"x": torch.ones(2)}, {"x": torch.zeros(2)}], tmp_path / "m", method="linear")
    assert out.card.data.license is None and "is unknown" in out.card.text


def test_views_show_the_card_and_single_files_have_one_only_under_the_usual_names(models, hub):
    folders = models(a=front(license="mit"))
    assert View(open_source(ModelRef(path=str(folders["a"]))), {}).card_data.license == ["mit"]
    usual = folders["a"] / "model.safetensors"
    assert open_source(ModelRef(path=str(usual))).card_data.license == ["mit"]
    usual.rename(folders["a"] / "mine.safetensors")
    assert open_source(ModelRef(path=str(folders["a"] / "mine.safetensors"))).card_data is None


BOMB = "---\nlicense: mit\nlanguage: &a [en]\ntags:\n- " + "[" * 5000 + "\n---\n"
_ALIASES = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefghij")]
LAUGHS = "\n".join(["a: &a [x, x]", *_ALIASES, ""])
UNREADABLE = {
    "not yaml": "---\nlicense: [mit\n---\n",
    "twice": "---\nlicense: mit\nlicense: gpl-3.0\n---\n",
    "deep": BOMB,
    "laughs": f"---\n{LAUGHS}license: *j\n---\n",
    "laughs in what is read": f"---\n{{x: 1}}\n{LAUGHS}---\n",
    "code": "---\nlicense: !!python/object/apply:os.system [exit]\n---\n",
    "a mapping": "---\nlicense: {mit: apache-2.0}\n---\n",
    "a number": "---\nlicense: 3.1\n---\n",
    "a date": "---\nlicense: 2024-01-01\n---\n",
    "a list in a list": "---\nlicense: [[mit]]\n---\n",
    "very many": f"---\nlicense: [{'mit, ' * 5000}]\n---\n",
    "a long word": f"---\nlicense: {'a' * 100_000}\n---\n",
    "bytes": b"---\nlicense: \xff\xfe\x00\n---\n",
    "controls": "---\nlicense: mit\x07\n---\n",
}
NOTHING = {
    "a list": "---\n- license: mit\n---\n",
    "empty": "",
    "no front matter": "# A model\nlicense: mit\n",
    "not closed": "---\nlicense: mit\n",
    "later": "# A model\n---\nlicense: mit\n---\n",
    "huge": "x" * 8_000_000,
    "huge and not closed": "---\n" + "- x\n" * 2_000_000,
    "empty front matter": "---\n\n---\n",
    "null": "---\nlicense:\n---\n",
    "beside": "---\ncard: {license: mit}\n---\n",
}


@pytest.mark.parametrize("card", [*UNREADABLE.values(), *NOTHING.values()], ids=[*UNREADABLE, *NOTHING])
def test_odd_cards_end_in_an_unknown_licence_and_quickly(models, tmp_path, card):
    folders = models(a=card, b=front(license="mit", language="en"))
    started = time.monotonic()
    read_card(folders["a"])
    assert time.monotonic() - started < 2
    data, _ = merged(folders, tmp_path)
    assert "license" not in data and data["language"] == ["en"]


@pytest.mark.parametrize("card", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_licence_is_a_warning(models, card):
    folders = models(a=card, b=front(license="mit"))
    (told,) = licence_warnings([folders["a"], folders["b"]])
    assert "unreadable" in told


def test_readme_that_is_a_folder_is_no_card(models):
    folders = models()
    (folders["a"] / "README.md").mkdir()
    assert read_card(folders["a"]) is None


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff---\r\nlicense: MIT\r\n---\r\nhello",
        "---\nlicense: 'mit'\nmodel-index:\n- name: x\n  results: [{[\n---\n",
        "---\n# said below\nlicense:\n- mit\nwidget:\n- text: |\n    license: gpl-3.0\n---\n",
        '---\n"license": mit\n---\n',
        "---\n{license: mit, tags: [x]}\n---\n",
        "---\ndatasets: [\nx/y\n]\nlicense: mit\n---\n",
        "---\nlicense: mit # as before\n---\n---\nlicense: gpl-3.0\n---\n",
    ],
)
def test_cards_as_people_write_them_are_read(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_card(tmp_path).license == ["mit"]


def test_long_results_cost_nothing(tmp_path):
    results = "".join(f"  - task: {{type: x}}\n    metrics: [{{type: f1, value: {i}}}]\n" for i in range(20_000))
    (tmp_path / "README.md").write_text(f"---\nmodel-index:\n- name: x\n  results:\n{results}license: mit\n---\n")
    started = time.monotonic()
    assert read_card(tmp_path).license == ["mit"] and time.monotonic() - started < 0.5


EVIL = [
    "x | y | z",
    "<script>alert(1)</script>",
    "a\n---\n# Owned\n",
    "`code` [link](https://evil.example) ![](https://evil.example/x.png)",
    "{{ versions }}{% for x in models %}",
    "\u202egnp.exe",
    "x" * 3000,
    "../../etc/passwd",
    "/home/someone/models/x",
    "C:\\Users\\someone",
    "javascript:alert(1)",
    "https://evil.example/a b)",
    "file:///home/someone/LICENSE",
]


@pytest.mark.parametrize("evil", EVIL)
def test_text_of_cards_cannot_be_more_than_data(models, tmp_path, evil):
    lists = {key: [evil, f"org/{evil}"] for key in ("language", "datasets", "base_model", "tags")}
    a = front(license="other", license_name=evil, license_link=evil, base_model_relation="merge", **lists)
    b = front(license=evil, license_name=evil, license_link=evil, base_model_relation="merge", **lists)
    data, content = merged(models(a=a, b=b), tmp_path)
    assert evil not in content and "evil.example" not in content and "someone" not in content
    assert "Owned" not in content and "<script" not in content and not re.search(r"[\u202a-\u202e]|x{100}", content)
    assert not {"license", "language", "datasets", "base_model"} & data.keys()


def test_folders_of_this_machine_are_not_taken_for_ids(models, tmp_path, monkeypatch):
    folders = models(a=front(license="mit", base_model=["in/b", "org/x"], base_model_relation="merge"))
    monkeypatch.chdir(tmp_path)
    data, content = merged(folders, tmp_path)
    assert data["base_model"] == ["org/x"] and "in/b" not in content


def test_link_to_a_file_is_one_into_its_repository_or_none(models, hub, tmp_path):
    named = front(license="other", license_name="qwen", license_link="LICENSE")
    folders = models(a=named)
    cache = hub({"a": folders["a"]})
    out = hf_merge.merge(["org/a"], tmp_path / "m", method="linear", **cache)
    assert out.card.data.license_link == "https://huggingface.co/org/a/blob/main/LICENSE"
    out = hf_merge.merge([folders["a"]], tmp_path / "m2", method="linear")
    assert out.card.data.license_name == "qwen" and out.card.data.license_link is None


PAIRS = {
    "permissive and a community licence": ("apache-2.0", "llama3.1", "llama3.1", ()),
    "non-commercial and permissive": ("cc-by-nc-4.0", "mit", "cc-by-nc-4.0", ()),
    "terms of use and nobody knows": ("gemma", "unknown", None, ("`unknown`, which stands for no licence",)),
    "terms of use and nothing said": ("gemma", None, None, ("the card names none",)),
    "none at all": (None, None, None, ("is unknown: the card names none", "is unknown: the card names none")),
}


@pytest.mark.parametrize(("one", "other", "expected", "told"), PAIRS.values(), ids=PAIRS)
def test_licences_of_two_public_models_on_card_and_plan(models, hub, tmp_path, one, other, expected, told):
    folders = models(a=front(license=one, language="en"), b=front(license=other, language="en"))
    cache = hub({name: folders[name] for name in "ab"})
    for order in (["org/a", "org/b"], ["org/b", "org/a"]):
        out = hf_merge.merge(order, tmp_path / "m", method="linear", overwrite=True, **cache)
        assert out.card.data.license == expected and ("license" in out.card.data.to_dict()) == (expected is not None)
        warned = licence_warnings(order, **cache)
        assert len(warned) == len(told) and all(any(said in one for one in warned) for said in told)
        words = f"So this merge carries `{expected}`" if expected else "So the licence of this merge is unknown"
        assert words in out.card.text
