"""What visitors send is checked before anything is done; what is shown and logged has no secrets and no markup."""

import html
import io
import logging
import time
from types import SimpleNamespace

import pytest
import security
from security import Refused, escape, escape_markdown, guard, recipe_of, redact, repo_id

import hf_merge

RECIPE = "merge_method: linear\nmodels: [org/a, org/b]\n"


@pytest.fixture(autouse=True)
def nothing_here(tmp_path, monkeypatch):
    """No folder of this machine is called like a model."""
    monkeypatch.chdir(tmp_path)


def asked(**headers: str) -> SimpleNamespace:
    return SimpleNamespace(headers={key.replace("_", "-"): value for key, value in headers.items()})


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://me-merge.hf.space", "host": "me-merge.hf.space"},
        {"Origin": "https://ME-merge.hf.space:443", "Host": "me-merge.hf.space"},
        {"origin": "http://127.0.0.1:7860", "host": "127.0.0.1:7860"},
        {"origin": "http://[::1]:7860", "host": "[::1]:7860"},
        {"host": "me-merge.hf.space"},
        {"host": "me-merge.hf.space", "sec_fetch_site": "same-origin"},
        {},
    ],
    ids=str,
)
def test_calls_of_the_page_itself_and_of_programs_pass(headers):
    guard(asked(**headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example", "host": "me-merge.hf.space"},
        {"origin": "https://me-merge.hf.space.evil.example", "host": "me-merge.hf.space"},
        {"origin": "https://me-merge.hf.space@evil.example", "host": "me-merge.hf.space"},
        {"origin": "null", "host": "me-merge.hf.space"},
        {"origin": "", "host": ""},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:7861", "host": "127.0.0.1:7860"},
        {"origin": "http://127.0.0.1:bad", "host": "127.0.0.1:bad"},
        {"host": "me-merge.hf.space", "sec_fetch_site": "cross-site"},
        {"host": "me-merge.hf.space", "sec_fetch_site": "same-site"},
    ],
    ids=str,
)
def test_calls_of_other_sites_are_refused(headers):
    with pytest.raises(Refused, match="another site"):
        guard(asked(**headers))


def test_gradios_own_request_is_understood():
    gradio = pytest.importorskip("gradio")
    from starlette.requests import Request

    def request(origin: bytes):
        headers = [(b"host", b"me.hf.space"), (b"origin", origin)]
        return gradio.Request(Request({"type": "http", "headers": headers, "method": "POST", "path": "/"}))

    guard(request(b"https://me.hf.space"))
    with pytest.raises(Refused):
        guard(request(b"https://evil.example"))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (" org/name ", "org/name"),
        ("gpt2", "gpt2"),
        ("org/name@v1.0", "org/name@v1.0"),
        ("https://huggingface.co/org/name", "org/name"),
        ("https://hf.co/org/name/", "org/name"),
        ("hf.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/dev", "org/name@dev"),
        ("https://huggingface.co/org/name/blob/main/config.json?x=1#y", "org/name@main"),
        ("https://huggingface.co/org/name/tree/refs/pr/3", "org/name@refs/pr/3"),
        ("https://huggingface.co/org/Na.me_-1?library=x", "org/Na.me_-1"),
    ],
    ids=str,
)
def test_ids_and_addresses(text, meant):
    assert repo_id(text, local=False) == repo_id(text, local=True) == meant


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "a/b/c", "org/", "/name", "../../etc", "/etc/passwd", "~/models", "./x", "C:\\models", "..",
        "org/..", "org/na me", "org/name@", "org/name@../x", "org/name@a b", "org/--", "org/a..b", "org/<script>",
        "org/näme",
        "org\x00/name", "http://127.0.0.1/org/name", "https://evil.example/org/name", "file:///etc/passwd",
        "https://huggingface.co.evil.example/a/b", "https://huggingface.co@evil.example/a/b", "https://huggingface.co/",
        "https://u:p@huggingface.co/a/b", "https://huggingface.co/datasets/a/b", "https://huggingface.co/spaces/a/b",
        "https://huggingface.co/a/%2e%2e", "https://huggingface.co:99999/a/b", "https://[bad/a/b", "x" * 97, "a" * 5000,
        "javascript:alert(1)", "s3://bucket/key", "\\\\server\\share", "org/name\nother",
    ],
    ids=ascii,
)  # fmt: skip
def test_everything_else_is_refused_in_one_line(text):
    with pytest.raises(Refused) as caught:
        repo_id(text, local=False)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_folder_is_taken_at_home_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    for text in ("org/name", "./org/name", str(tmp_path / "org" / "name")):
        assert repo_id(text) == str(tmp_path / "org" / "name")
    monkeypatch.setenv("SPACE_ID", "me/merge")
    assert not security.allowed_local()
    for text in ("org/name", "./org/name", str(tmp_path / "org" / "name")):
        with pytest.raises(Refused, match="folder"):
            repo_id(text)


def test_a_recipe_is_read():
    recipe = recipe_of(RECIPE + "parameters: {weight: [1, 0.5]}\nchat_template: chatml\n", local=False)
    assert [str(model) for model in recipe.merged] == ["org/a", "org/b"]
    staged = "name: first\n" + RECIPE + "---\nmerge_method: linear\nmodels: [first, org/c@main+org/lora]\n"
    assert len(recipe_of(staged, local=False).stages) == 1


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 1: Anchors"),
        (RECIPE + "x: *nothing\n", "line 3: Anchors"),
        (RECIPE + "dtype: !!python/object/apply:os.system [ls]\n", "line 3: Tags"),
        (RECIPE + "dtype: !!str float16\n", "line 3: Tags"),
        ("[" * 30_000, "nested deeper"),
        ("{a: " * 10_000, "nested deeper"),
        ("- " * 20_000, "nested deeper"),
        ("? " * 20_000, "nested deeper"),
        ("x" * 64_001, "64 kB"),
        ("ä" * 33_000, "64 kB"),
        ("merge_method: linear\nmodels: [org/a\n", "line 3: This is not YAML"),
        ("a: \t- b\n\x00", "This is not YAML"),
        ("", "not a recipe"),
        ("[1, 2]", "not a recipe"),
        ("42", "not a recipe"),
        ("merge_method: linear\nmodels: [org/a]\nmodels: [org/b]\n", "line 3: 'models' is given twice"),
        (RECIPE + "densty: 1\n", "line 3: Unknown key"),
        (RECIPE + "trust_remote_code: true\n", "line 3: Unknown key"),
        ("merge_method: no_such\nmodels: [org/a]\n", "no merge method"),
        ("2020-13-45: 1\n" + RECIPE, "."),
        ("merge_method: linear\nmodels: [" + ", ".join(f"org/m{i}" for i in range(17)) + "]\n", "17 models"),
    ],
    ids=lambda value: ascii(value[:24]),
)
def test_hostile_yaml_is_refused_at_once(text, said):
    begin = time.process_time()
    with pytest.raises((Refused, hf_merge.RecipeError)) as caught:
        recipe_of(text, local=False)
    assert said in str(caught.value) and time.process_time() - begin < 2


FILES = {
    "folder": "merge_method: linear\nmodels: [org/a, /etc]\n",
    "upwards": "merge_method: linear\nmodels: [org/a, ../secrets]\n",
    "home": "merge_method: linear\nmodels: [org/a, ~/model]\n",
    "here": "merge_method: linear\nmodels: [org/a, secret/model]\n",
    "as path": "merge_method: linear\nmodels: [{model: {path: secret/model}}, org/a]\n",
    "one file": "merge_method: linear\nmodels: [org/a, weights.safetensors]\n",
    "address": "merge_method: linear\nmodels: [org/a, 'http://127.0.0.1:80/x']\n",
    "adapter": "merge_method: linear\nmodels: [org/a, org/b+secret/model]\n",
    "lora": "merge_method: linear\nmodels: [{model: {model: org/b, lora: secret/model}}, org/a]\n",
    "base": "merge_method: ties\nbase_model: secret/model\nmodels: [org/a, org/b]\n",
    "slice": "merge_method: passthrough\nslices:\n- sources: [{model: secret/model, layer_range: [0, 1]}]\n",
    "module": "merge_method: linear\nmodules:\n  text_decoder: {models: [org/a, secret/model]}\n",
    "rule": RECIPE + "rules: [{pattern: x, merge_method: passthrough, models: [secret/model]}]\n",
    "tokenizer": RECIPE + "tokenizer: {source: secret/model}\n",
    "tokenizer_source": RECIPE + "tokenizer_source: secret/model\n",
    "token": RECIPE + "tokenizer: {tokens: {x: {source: secret/model}}}\n",
    "row": RECIPE + "tokenizer: {tokens: {x: {source: {kind: model_token, model: secret/model, token: y}}}}\n",
    "statistics": "merge_method: fisher\nmodels: [{model: org/a, statistics: s.safetensors}, org/b]\n",
    "chat_template": RECIPE + "chat_template: notes.txt\n",
    "jinja": RECIPE + "chat_template: '{% for i in range(10**9) %}x{% endfor %}'\n",
    "remap": RECIPE + "remap: {'(a+)+$': b}\n",
    "revision": "merge_method: linear\nmodels: [org/a, org/b@../../x]\n",
    "stage": "name: s\nmerge_method: linear\nmodels: [/etc, org/a]\n---\nmerge_method: linear\nmodels: [s, org/b]\n",
    "stage that is a folder": f"name: secret/model\n{RECIPE}---\nmerge_method: linear\nmodels: [secret/model, org/c]\n",
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_recipe_from_afar_names_no_file_of_the_server(tmp_path, what):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    (tmp_path / "weights.safetensors").touch()
    (tmp_path / "notes.txt").write_text("a secret of the server")
    kind = hf_merge.RecipeError if what in ("rule", "token", "row") else Refused  # no models of such a recipe anyway
    with pytest.raises(kind) as caught:
        recipe_of(FILES[what], local=False)
    assert "secret of the server" not in str(caught.value)


def test_the_worked_example_may_be_named_and_at_home_all_may(tmp_path, monkeypatch):
    (tmp_path / "example").mkdir()
    text = f"merge_method: linear\nmodels: [org/a, {tmp_path}/example]\n"
    assert recipe_of(text, local=False, known=[f"{tmp_path}/example"])
    assert recipe_of(text + "remap: {a: b}\n") and recipe_of(text, local=True)
    monkeypatch.setenv("SPACE_ID", "me/merge")
    with pytest.raises(Refused):
        recipe_of(text)


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "\"' onmouseover='x", "a & b", "</script>"])
def test_text_of_others_is_no_html(text):
    shown = escape(text)
    assert not set("<>\"'") & set(shown)
    assert html.unescape(shown) == text
    assert escape("a\u202eb\x00c\x1bd\u200be") == "abcde"


@pytest.mark.parametrize(
    "text",
    ["[x](javascript:alert(1))", "![x](http://e.example/i.png)", "<b>x</b>", "# a", "- a", "1. a", "a\n\n# b", "`x`",
     "**x**", "| a | b |\n|---|---|", "https://e.example", "me@e.example", "$x$", "~~x~~", "&lt;b&gt;", "a\\"],
    ids=ascii,
)  # fmt: skip
def test_text_of_others_is_plain_in_markdown(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"html": True, "linkify": False})
    (opened, inline, closed) = markdown.parse(escape_markdown(text))
    assert (opened.type, closed.type) == ("paragraph_open", "paragraph_close")
    assert {each.type for each in inline.children} <= {"text", "text_special"}
    assert "".join(each.content for each in inline.children) == " ".join(text.split())


SECRETS = {
    "hf": "hf_abcdefghijklmnop1234",
    "bearer": "Bearer abc.def-ghi_123",
    "authorization": "{'authorization': 'xyzzyxyzzy'}",
    "header": "Authorization: xyzzyxyzzy",
    "cookie": "cookie: session=xyzzyxyzzy; a=b",
    "signature": "https://cdn.example/x?X-Amz-Signature=xyzzyxyzzy&X-Amz-Credential=xyzzyxyzzy",
    "cloudfront": "https://cdn.example/x?Policy=xyzzyxyzzy&Key-Pair-Id=xyzzyxyzzy&Signature=xyzzyxyzzy",
    "query": "/login?code=xyzzyxyzzy&state=xyzzyxyzzy&access_token=xyzzyxyzzy",
    "user": "https://user:xyzzyxyzzy@huggingface.co/a/b",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.xyzzyxyzzy.xyzzyxyzzy",
    "json": '{"access_token": "xyzzyxyzzy", "client_secret": "xyzzyxyzzy"}',
}


@pytest.mark.parametrize("what", SECRETS)
def test_secrets_are_taken_out(what):
    told = redact(f"GET {SECRETS[what]} failed")
    assert (told.startswith("GET ") and "failed" in told) or what in ("header", "cookie")
    assert not [part for part in ("xyzzy", "abcdefghijklmnop", "abc.def") if part in told], told
    assert redact(told) == told


def test_plain_words_stay():
    text = "Job 12 is done: org/model_hf_merge, hf_merge.merge, 3 tokens: a, b; https://huggingface.co/org/name?x=1"
    assert redact(text) == text


def test_what_is_logged_has_no_token(caplog):
    stream, logger = io.StringIO(), logging.getLogger("space.test")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        security.redact_logs()
        security.redact_logs()
        assert len(handler.filters) == 1
        secret = "hf_abcdefghijklmnop1234"
        logger.warning("with %s", secret)
        logger.warning("does not fit %d %s", secret)
        try:
            raise ValueError(f"inside {secret}")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    told = stream.getvalue()
    assert "with <token>" in told and "inside <token>" in told and secret not in told
