"""What a recipe says of tokenizer and chat template, in MergeKit's words."""

import pytest

from hf_merge.errors import RecipeError
from hf_merge.recipe import Recipe
from hf_merge.tokenization.chat_templates import BUILT_IN
from hf_merge.tokenization.options import ModelToken, TokenizerOptions, ZeroRow
from hf_merge.types import ModelRef

HEAD = "merge_method: linear\nmodels: [org/a, org/b]\n"
FULL = (
    HEAD
    + """tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: org/b}
    <|im_end|>: {source: {kind: model_token, model: org/a, token: </s>}, force: true}
    <pad>: {source: {kind: zero}}
    <cls>: {source: zero}
    <sep>: {source: {kind: model_token, model: {path: org/a}, token_id: 3}}
  pad_to_multiple_of: 64
chat_template: chatml
"""
)


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    return str(caught.value)


def test_all_of_mergekits_words_are_read_and_written_again():
    recipe = Recipe.from_yaml(FULL)
    options = recipe.vocabulary
    a, b = ModelRef(path="org/a"), ModelRef(path="org/b")
    assert options is not None and (options.source, options.pad_to_multiple_of) == ("union", 64)
    assert [entry.source for entry in options.tokens.values()] == [
        b,
        ModelToken(a, token="</s>"),
        ZeroRow(),
        ZeroRow(),
        ModelToken(a, token_id=3),
    ]
    assert [token for token, entry in options.tokens.items() if entry.force] == ["<|im_end|>"]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("tokenizer: {}", "union"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer_source: union", "union"),
        ("tokenizer_source: org/a@v1", ModelRef(path="org/a", revision="v1")),
        ("tokenizer_source: {path: org/a, revision: v1}", ModelRef(path="org/a", revision="v1")),
    ],
)
def test_source_is_a_word_or_a_model(text, source):
    recipe = Recipe.from_yaml(HEAD + text)
    assert recipe.vocabulary is not None and recipe.vocabulary.source == source
    assert Recipe.from_yaml(recipe.to_yaml()).vocabulary == recipe.vocabulary


def test_nothing_said_is_nothing_asked():
    recipe = Recipe.from_yaml(HEAD)
    assert recipe.vocabulary is None and recipe.chat_template is None and "tokenizer" not in recipe.to_yaml()
    assert Recipe.from_yaml(HEAD + "tokenizer:\ntokenizer_source:\nchat_template:\n").vocabulary is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokenizer: {sorce: union}", "line 3: Unknown key 'sorce'. Did you mean 'source'?"),
        ("tokenizer:\n  tokens:\n    x: {forse: true}", "line 5: Unknown key 'forse'. Did you mean 'force'?"),
        ("tokenizer_sorce: union", "line 3: Unknown key 'tokenizer_sorce'. Did you mean 'tokenizer_source'?"),
        ("tokenizer: union", "line 3: 'tokenizer' should be a mapping with some of the keys source, tokens"),
        ("tokenizer: {source: 7}", "line 3: 'tokenizer.source' should be a folder, a Hub id"),
        ("tokenizer: {pad_to_multiple_of: 0}", "'tokenizer.pad_to_multiple_of' should be greater than or equal to 1"),
        ("tokenizer: {}\ntokenizer_source: base", "line 4: 'tokenizer_source' says again what 'tokenizer' says"),
        ("tokenizer: {tokens: {x: {source: {kind: zeros}}}}", "the kinds are zero, model_token"),
        ("tokenizer: {tokens: {x: {source: {kind: zero, tokn: y}}}}", "has an unknown key 'tokn' (known: kind)"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: org/a}}}}", "one of token and token_id"),
        (
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: org/a, token: y, token_id: 1}}}}",
            "one of token and token_id",
        ),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, token: y}}}}", "needs a model"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: org/a, token_id: -1}}}}", "ids begin at 0"),
        ("tokenizer: {tokens: {x: {source: {kind: model_token, model: org/a, token_id: a}}}}", "a number as token_id"),
        ("tokenizer:\n  tokens:\n    x: {source: org/c}", "line 5: the row of 'x' comes from 'org/c', which is not"),
        ("chat_template: chatmll", "is neither a built-in template (auto, alpaca, chatml"),
        ("chat_template: chatmll", "Did you mean 'chatml'?"),
        ("chat_template: ''", "should be auto, the name of a built-in template"),
        ("chat_template: '{{ messages'", "line 3: 'chat_template' is no Jinja template: line 1: "),
        ('chat_template: "fine\\n{% if %}"', "is no Jinja template: line 2: "),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text, said):
    assert said in refused(f"{HEAD}{text}\n")


def test_template_may_be_a_word_a_text_or_a_file_whose_text_the_recipe_keeps(tmp_path):
    (tmp_path / "t.jinja").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    for said, kept in [
        ("auto", "auto"),
        *((name, name) for name in BUILT_IN),
        ("{{ messages }}", "{{ messages }}"),
        (str(tmp_path / "t.jinja"), "{% generation %}{{ messages }}{% endgeneration %}"),
        (tmp_path / "t.jinja", "{% generation %}{{ messages }}{% endgeneration %}"),
    ]:
        assert Recipe.load({"merge_method": "linear", "models": ["org/a"], "chat_template": said}).chat_template == kept
    (tmp_path / "bad.jinja").write_text("{{ bad")
    assert "is no Jinja template" in refused(f"{HEAD}chat_template: {tmp_path / 'bad.jinja'}\n")


def test_renamed_models_are_renamed_in_the_tokenizers_words_too():
    a, b, c = (ModelRef(path=f"org/{name}") for name in "abc")
    recipe = Recipe.from_yaml(FULL.replace("source: union", "source: org/a")).renamed({a: c})
    assert recipe.tokenizer is not None and recipe.tokenizer.source == c
    assert [entry.models for entry in recipe.tokenizer.tokens.values()] == [(b,), (c,), (), (), (c,)]
    short = Recipe.from_yaml(HEAD + "tokenizer_source: org/a")
    assert short.renamed({a: c}).tokenizer_source == c and short.renamed({b: c}).tokenizer_source == a
    assert Recipe.from_yaml(HEAD + "tokenizer_source: base").renamed({a: c}).tokenizer_source == "base"
    assert TokenizerOptions().renamed({a: c}) == TokenizerOptions()
