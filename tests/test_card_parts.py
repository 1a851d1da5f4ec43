"""What a card says beside licences: results, schedules, gated models, code; templates; and names that are no markup."""

import shutil

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

import hf_merge
from hf_merge.card import merged_card
from hf_merge.errors import MergeError, OutputError
from hf_merge.evaluation import EVALUATED, NOT_EVALUATED, evaluation_table
from hf_merge.sources import open_source
from hf_merge.types import ModelRef


def result(value=0.5, metric="accuracy", dataset="beans", **more):
    named = {"task_type": "text-generation", "dataset_type": f"org/{dataset}", "dataset_name": dataset}
    return EvalResult(**{**named, "metric_type": metric, "metric_value": value, **more})


@pytest.fixture
def merged(llamas, tmp_path):
    return hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear")


def front_matter(path):
    return yaml.safe_load((path / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_results_are_read_from_the_front_matter_as_the_hub_reads_them(llamas, tmp_path):
    plan = hf_merge.plan([llamas["a"]], method="linear")
    sources = [open_source(ModelRef(path=str(llamas["a"])))]
    given = [result(0.123456), result("20.0 ± 1.2", "wer", dataset_config="fr", dataset_split="test")]
    card = merged_card(plan, sources, "m", eval_results=given, compared={"org/a": [result(0.25)]})
    card.save(tmp_path / "README.md")
    name, read = model_index_to_eval_results(front_matter(tmp_path)["model-index"])
    assert name == "m" and read == given
    text = card.text
    assert "| beans | accuracy | 0.1235 | 0.25 |" in text and "| beans (fr, test) | wer | 20.0 ± 1.2 | - |" in text
    assert EVALUATED in text and NOT_EVALUATED not in text
    assert text.index("## How to repeat it") < text.index("## Evaluation") < text.index("## Licence")
    assert "## Evaluation" not in merged_card(plan, sources, "m").text


def test_results_are_added_to_what_people_made_of_the_card(merged):
    path = merged.path / "README.md"
    edited = path.read_text().replace("# m\n", "# My model\n\nIt is good.\n", 1).replace("tags:", "mine: 1\ntags:", 1)
    path.write_text(edited + "\n## Thanks\n\nto all.\n")
    merged.add_results([result(0.5)])
    merged.add_results([result(0.75, "f1")], compared={"base": [result(0.4), result(0.6, "f1")]})
    once = path.read_text()
    assert rows(once)[-2:] == ["| beans | accuracy | 0.5 | 0.4 |", "| beans | f1 | 0.75 | 0.6 |"]
    merged.add_results([result(0.75, "f1")], compared={"base": [result(0.4), result(0.6, "f1")]})
    assert path.read_text() == once, "again is the same"
    merged.add_results([result(0.9)])
    text = path.read_text()
    assert "| beans | accuracy | 0.9 |" in text and text.count("## Evaluation") == 1 and "0.5 |" not in text
    assert "It is good." in text and "# My model" in text and text.endswith("## Thanks\n\nto all.\n")
    data = front_matter(merged.path)
    assert data["mine"] == 1 and data["base_model_relation"] == "merge" and NOT_EVALUATED not in text
    name, read = model_index_to_eval_results(data["model-index"])
    assert name == "m" and read == [result(0.9), result(0.75, "f1")]
    assert [*data][:2] == [*yaml.safe_load(edited.split("---\n")[1])][:2], "the order of the front matter stays"


def test_a_table_that_was_moved_is_replaced_where_it_is_and_without_a_place_it_comes_last(merged):
    path = merged.path / "README.md"
    merged.add_results([result(0.5)])
    content = path.read_text()
    begin, end = content.index("<!-- hf_merge"), content.index("<!-- /hf_merge: evaluation -->") + 30
    table = content[begin:end]
    path.write_text(content.replace(table, "").replace("## Recipe", f"{table}\n\nMy words.\n\n## Recipe"))
    merged.add_results([result(0.75)])
    text = path.read_text()
    assert text.index("0.75") < text.index("My words.") < text.index("## Recipe") and "| 0.5 |" not in text
    path.write_text("---\nlicense: mit\n---\n# Another card\n")
    merged.add_results([result(0.25)])
    assert path.read_text().rstrip().endswith("<!-- /hf_merge: evaluation -->") and "# Another card" in path.read_text()


def test_line_ends_and_results_of_others_stay(merged):
    path = merged.path / "README.md"
    card = merged.card
    card.data.model_name, card.data.eval_results = "theirs", [result(0.1, dataset="squad")]
    path.write_bytes(str(card).replace("\n", "\r\n").encode())
    merged.add_results([result(0.5)])
    assert model_index_to_eval_results(front_matter_of(path))[1] == [result(0.1, dataset="squad"), result(0.5)]
    assert model_index_to_eval_results(front_matter_of(path))[0] == "theirs"


def front_matter_of(path):
    return ModelCard.load(path).data.to_dict()["model-index"]


def test_no_results_change_nothing_and_others_are_refused(merged):
    before = (merged.path / "README.md").read_text()
    merged.add_results([])
    assert (merged.path / "README.md").read_text() == before
    with pytest.raises(MergeError, match=r"huggingface_hub\.EvalResult; found dict"):
        merged.add_results([{"accuracy": 1}])


def test_results_are_text_in_a_table_whatever_they_say():
    evil = "a | b\n# Owned <script>alert(1)</script> `x` [l](https://evil.example) <!-- /hf_merge: evaluation -->"
    table = evaluation_table(
        [result(evil, evil, dataset_config=evil, source_url="javascript:alert(1)", source_name="x"),
         result(1, source_url="https://example.org/a b)")], {evil: [result(evil)]},
    )  # fmt: skip
    assert "<script" not in table and "\n# Owned" not in table and "](javascript" not in table and "a b)" not in table
    assert table.count("<!--") == 2 and "[l](" not in table
    unescaped = [line.replace(r"\|", "") for line in rows(table)]
    assert {line.count("|") for line in unescaped} == {5} and len(unescaped) == 4
    assert "([source](https://example.org/x))" in evaluation_table([result(source_url="https://example.org/x")])


def test_what_varies_over_the_layers_is_on_the_card(llamas, tmp_path):
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(llamas["a"]), "parameters": {"weight": [0, 1]}}, {"model": str(llamas["b"])}],
    }
    text = hf_merge.merge(recipe, tmp_path / "m").card.text
    assert "```text\nmodel.layers 0-2\n  weight  a  ▁▅█  0 to 1\n```\n\n## Recipe" in text
    assert "Over the layers" not in hf_merge.merge([llamas["a"]], tmp_path / "n", method="linear").card.text


def test_gated_models_and_code_are_among_the_limits(llamas):
    plan = hf_merge.plan([llamas["a"], llamas["b"]], method="linear")
    sources = [open_source(ModelRef(path=str(llamas[name]))) for name in "ab"]
    assert (
        "Gated" not in merged_card(plan, sources, "m").text
        and "code of its own" not in merged_card(plan, sources, "m").text
    )
    sources[1].gated = True
    plan.config["auto_map"] = {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
    text = merged_card(plan, sources, "m").text
    assert "Gated on the Hub: `b`." in text and "copied from `a`" in text
    assert 'AutoModelForCausalLM.from_pretrained("m", trust_remote_code=True)' in text


def test_names_of_folders_are_text_whatever_they_are(llamas, tmp_path):
    odd = tmp_path / "in" / "a`b|c [x](evil.example) <script>"
    shutil.copytree(llamas["a"], odd)
    out = hf_merge.merge([odd, llamas["b"]], tmp_path / 'm"; x', method="linear", tokenizer_source=str(odd))
    text = out.card.text
    assert "`a'b/c [x](evil.example) <script>`" in text and "`a'b|c [x](evil.example) <script>`" in text, (
        "as code, and the code does not end early"
    )
    outside = text.split("## Recipe")[0]
    assert "a`b" not in outside
    assert all(line.count("|") == 5 for line in rows(outside))
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_a_recipe_with_fences_stays_in_its_own(llamas, tmp_path):
    template = "{% for m in messages %}```\n# Owned\n````{{ m.content }}{% endfor %}"
    out = hf_merge.merge([llamas["a"]], tmp_path / "m", method="linear", chat_template=template)
    assert "\n`````yaml\n" in out.card.text
    recipe = out.card.text.split("`````yaml\n")[1].split("`````")[0]
    assert yaml.safe_load(recipe)["chat_template"] == template


def test_a_template_may_extend_ours_and_include_its_neighbours(llamas, tmp_path):
    mine = tmp_path / "mine.md"
    (tmp_path / "words.md").write_text("Words of {{ name }}.")
    mine.write_text(
        '{% extends "merged.md" %}{% block how_to_load %}{% include "words.md" %}{% endblock %}'
        "{% block summary %}{{ super() }} By us, {{ license }}.{% endblock %}"
    )
    out = hf_merge.merge([llamas["a"]], tmp_path / "m", method="linear", card_template=mine)
    assert "## How to load it\n\nWords of m.\n" in out.card.text and "made with hf_merge. By us, " in out.card.text
    assert "## Licence" in out.card.text and out.card.data.base_model_relation == "merge"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ name", "unexpected end of template"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% include 'absent.md' %}", "absent.md"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ name + 1 }}", "concatenate"),
        ("---\n- a list\n---\n", "should be a dict"),
    ],
)
def test_a_template_that_fails_says_how_before_anything_is_merged(llamas, tmp_path, text, said):
    mine = tmp_path / "mine.md"
    mine.write_text(text)
    with pytest.raises(OutputError, match=said) as told:
        hf_merge.merge([llamas["a"]], tmp_path / "m", method="linear", card_template=mine)
    assert "The card cannot be written from" in str(told.value) and not (tmp_path / "m").exists()
