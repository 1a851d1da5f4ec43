"""What visitors, strangers, other sites and the texts of repositories cannot do to the Space, nor to one another."""

import json
import re
import uuid
from pathlib import Path

import psutil
import pytest

from tests.conftest import save_llamas
from tests.hub.conftest import one_test
from tests.hub.openid import CLIENT
from tests.space import steps

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.space.attack import SITE, Taped, ask, call, config, event
from tests.space.browsing import Visitors
from tests.space.serving import OWNER

pytestmark = pytest.mark.e2e
MARK = "<img src=x onerror=window.__pwned=1>"
USING_TOKENS = ("judge", "begin", "attempt", "look", "begin_1")
"""Functions of the page's events that show the Hub who asks."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny `base` and fine-tunes of it."""
    return save_llamas(tmp_path_factory.mktemp("m"), ("a", "b"))


def jobs_of(app):
    """Where the folders of merges are."""
    return app.jobs / "jobs"


class Visit:
    """What alice did, and what was left of it.

    Attributes:
        taped: her page's events and her cookie.
        html: what her page showed at the end of each step.
        addresses: which machines the app was connected to.
        job: the id of her merge.
    """

    def __init__(self, app):
        self.app, self.taped = app, Taped(app)
        self.html, self.addresses, self.job = [], set(), ""

    def look(self, page):
        """Keep what there is to see now."""
        self.html.append(page.content() + page.evaluate("JSON.stringify(localStorage)"))
        process = psutil.Process(self.app.pid)
        for each in (process, *process.children(recursive=True)):
            self.addresses |= {one.raddr.ip for one in each.net_connections() if one.raddr}


@pytest.fixture(scope="module")
def alice(app, space_hub, browser, folders):
    """Alice signs in, merges a model that is hers alone, tries it and publishes what came out."""
    visitors, visit, before = Visitors(browser), Visit(app), dict(space_hub.store.repos)
    jobs = {folder.name for folder in jobs_of(app).iterdir()}
    with one_test(space_hub):
        for name in ("base", "a", "b"):
            steps.put(space_hub, f"org/{name}", folders[name])
        steps.put(space_hub, "alice/private", folders["b"], private=True, app=CLIENT)
        steps.put(space_hub, "alice/taken", folders["b"])
        page = visitors()
        visit.taped.watch(page)
        steps.open_page(page, app.url)
        page.get_by_role("button", name="Sign in with Hugging Face").first.click()
        page.get_by_role("button", name="Continue as alice").click()
        steps.signed_in(page, "alice")
        steps.write(page, steps.recipe_of(["org/a", "alice/private"], "org/base", merge_method="ties"))
        expect(steps.report(page)).to_contain_text("private")
        steps.says(page, "These models fit")
        visit.look(page)
        steps.merge(page)
        page.get_by_role("textbox", name="Text").fill("the")
        page.get_by_role("button", name="Try", exact=True).click()
        expect(page.get_by_role("article")).to_have_count(3)
        name = page.get_by_role("textbox", name=re.compile("^Repository"))
        name.fill("alice/taken")
        name.press("Tab")
        expect(page.get_by_text("alice/taken is taken: choose another name.")).to_be_visible()
        name.fill("alice/mine")
        page.get_by_role("button", name="Push to the Hub").click()
        expect(page.get_by_role("heading", name="Published: alice/mine")).to_be_visible()
        visit.look(page)
        visit.taped.steal(page.context)
        page.close()
        done = [folder.name for folder in jobs_of(app).iterdir() if folder.name not in jobs and folder.is_dir()]
        visit.job = next(name for name in done if (jobs_of(app) / name / "work" / "merged").is_dir())
        assert not visitors.complaints
        visitors.close(keep=None)
    yield visit
    space_hub.store.repos = before


def state(app, hub):
    """Return what a state-changing call would change."""
    jobs = {path.name for path in jobs_of(app).iterdir()}
    return jobs, set(hub.store.repos), [repo.refs["refs/heads/main"] for repo in hub.store.repos.values()]


def acted(hub, begun):
    """Return who asked the Hub since then."""
    return {each.user for each in hub.log[begun:] if each.user}


# --- other sites


def test_another_site_cannot_act_for_who_has_signed_in(app, hub, alice):
    assert set(USING_TOKENS) <= set(alice.taped.events), alice.taped.events.keys()
    before, begun = state(app, hub), len(hub.log)
    for name in alice.taped.events:
        told = alice.taped.send(name, site=SITE)
        assert "Signed in as" not in told and "is taken" not in told, (name, told)
    assert state(app, hub) == before and not acted(hub, begun)
    assert "is taken" in alice.taped.send("look"), "what was sent does nothing from the Space itself either"
    assert acted(hub, begun) == {"alice"}


def test_another_site_is_not_told_who_has_signed_in(app, hub, alice):
    headers = {"Cookie": alice.taped.cookie, "Content-Type": "application/json"}
    listed = config(app)["dependencies"]
    loads = [one for one in listed if any(target[1] == "load" for target in one["targets"])]
    assert len(loads) > 1, "the page's own and that of the button"
    known = {}
    for site in (SITE, "null", app.url):
        bodies = [{"fn_index": one["id"], "data": [None] * len(one["inputs"])} for one in loads]
        told = [event(app, {**body, "session_hash": uuid.uuid4().hex}, {**headers, "Origin": site}) for body in bodies]
        known[site] = "alice" in "".join(told)
    assert known == {SITE: False, "null": False, app.url: True}


def test_another_site_cannot_push_by_the_function_for_programs(app, hub, alice):
    recipe = steps.recipe_of(["org/a", "org/b"], "org/base", merge_method="ties")
    before, begun = state(app, hub), len(hub.log)
    for header in ({}, {"Authorization": "Bearer hf_bob"}):
        told = call(
            app, "merge_and_push", {"recipe": recipe, "repo_id": "alice/stolen"}, Origin=SITE,
            Cookie=alice.taped.cookie, **header,
        )  # fmt: skip
        assert "another site" in told
    assert state(app, hub) == before and not acted(hub, begun)
    told = call(app, "merge_and_push", {"recipe": recipe, "repo_id": "alice/mine"}, Cookie=alice.taped.cookie)
    assert "alice/mine" in told and acted(hub, begun) == {"alice"}


def test_a_page_of_this_machine_answers_neither_other_sites_nor_other_names(local_app, folders):
    recipe = {"recipe": steps.recipe_of([folders["a"], folders["b"]])}
    assert "'a'" not in call(local_app, "check", recipe, Origin=SITE)
    assert ask(local_app, "/gradio_api/call/v2/check", b"{}", Origin=SITE)[0] == 403
    assert ask(local_app, "/config", Host="evil.example")[0] == 403
    assert ask(local_app, "/config", Host=f"localhost:{local_app.port}")[0] == 200
    assert '"fits"' in call(local_app, "check", recipe)


# --- tokens, and what they open


def test_the_owners_token_is_never_shown_to_the_hub(app, hub, page, alice, folders):
    steps.put(hub, "owner/private", folders["a"], private=True)
    steps.open_page(page, app.url)
    steps.empty(page)
    steps.search(page).press_sequentially("private")
    steps.add(page, "owner/private", "org/a")
    expect(steps.listed(page).first.get_by_role("img", name="Problem")).to_be_visible()
    steps.says(page, "They do not fit")
    for name in ("check", "estimate"):
        told = call(app, name, {"recipe": steps.recipe_of(["owner/private", "org/a"])})
        assert "no such model" in told, told
    page.goto(f"{app.url}/?from=owner/private")
    expect(page.get_by_test_id("toast-body")).to_contain_text("owner/private")
    assert [each for each in hub.log if "owner/private" in each.path]
    assert not [each for each in hub.log if each.user == "owner"]


def test_tokens_are_in_no_file_no_page_and_no_log(app, hub, alice):
    tokens = [*hub.store.tokens, OWNER]
    assert len([token for token in tokens if hub.store.tokens[token].app == CLIENT]) > 0, "nobody has signed in"
    written = [path for path in app.work.rglob("*") if path.is_file()]
    assert jobs_of(app) / alice.job / "job.json" in written
    for path in written:
        content = path.read_bytes()
        assert not [token for token in tokens if token.encode() in content], path
    assert not [token for token in tokens for text in (*alice.html, app.output) if token in text]


def test_what_a_token_has_opened_is_in_nobody_elses_cache(app, hub, alice):
    places = {
        path.relative_to(app.work).parts[:2] for path in app.work.rglob("*") if path.name == "models--alice--private"
    }
    assert places, "it was read"
    assert places >= {("jobs", "jobs"), ("jobs", "reading")}
    shared = [path for path in (app.work / "home").rglob("*") if "private" in str(path) and path.is_file()]
    assert not [path for path in shared if path.stat().st_size], "more than that transformers missed a file there"


def test_nothing_but_this_machine_was_asked_by_the_app(alice):
    assert alice.addresses and all(
        address.startswith(("127.", "::ffff:127.")) or address == "::1" for address in alice.addresses
    )


def test_a_merge_is_of_who_made_it(app, hub, visitors, alice):
    page, bob = visitors(), Taped(app)
    bob.watch(page)
    steps.open_page(page, app.url)
    expect(steps.run(page)).not_to_contain_text("Done")
    session = bob.events["arrive"]["session_hash"]
    ids = {one["api_name"]: one["id"] for one in config(app)["dependencies"]}
    secret = bob.events["arrive"]["data"][0] or ""
    for name, data in (
        ("choose_1", [alice.job, secret, None]),
        ("poll", [{"job": alice.job, "shown": alice.job}, secret]),
        ("stop", [secret, {"job": alice.job, "shown": alice.job}]),
        ("attempt", ["the", None, secret, {"job": alice.job, "shown": alice.job}]),
        ("begin_1", ["bob/stolen", "The weights", False, secret, {"job": alice.job, "shown": alice.job}]),
    ):
        body = {"fn_index": ids[name], "session_hash": uuid.uuid4().hex, "data": data}
        told = event(app, body, {"Content-Type": "application/json", "Origin": app.url})
        assert "private" not in told and "How it was merged" not in told, (name, told)
        body["session_hash"] = session
        told = event(app, body, {"Content-Type": "application/json", "Origin": app.url})
        assert "private" not in told and "How it was merged" not in told, (name, told)
    assert "bob/stolen" not in hub.store.repos


# --- files and addresses


def test_no_file_of_the_server_is_given_away(app, alice):
    work = jobs_of(app) / alice.job
    secrets = [Path("/etc/passwd"), work / "job.json", work / "work" / "merged" / "README.md", app.jobs / "browser.key"]
    secrets += [Path(app.command[-1]), Path(app.command[-1]).with_name("security.py")]
    assert sum(path.is_file() for path in secrets) == len(secrets), secrets
    for path in secrets:
        for form in (f"{path}", f"/{path}", f"file://{path}", f"..{path}", str(path).replace("/", "%2F")):
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/", "/static/../../..", "/assets/../../.."):
                status, text = ask(app, f"{route}{form}")
                assert status != 200 or text.lstrip().startswith("<!doctype html"), f"{route}{form}"


def test_the_app_fetches_no_address_for_a_visitor(app, hub, alice):
    ids = {one["api_name"]: one["id"] for one in config(app)["dependencies"]}
    begun = len(hub.log)
    for address in (f"{hub.url}/api/models", "/etc/passwd", "file:///etc/passwd"):
        picture = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        body = {"fn_index": ids["attempt"], "session_hash": uuid.uuid4().hex, "data": ["the", picture, "", None]}
        told = event(app, body, {"Content-Type": "application/json", "Origin": app.url})
        assert "root:" not in told
    assert ask(app, f"/gradio_api/proxy={hub.url}/api/models")[0] in (400, 403, 404)
    for name in (f"{hub.url}/api/models", "http://127.0.0.1/org/a", "https://example.org/a/b"):
        told = call(app, "validate_recipe", {"recipe": steps.recipe_of([name, "org/a"])})
        assert '"valid": false' in told, told
    assert not [each for each in hub.log[begun:] if each.path == "/api/models"]


FILES = {
    "a folder": "merge_method: linear\nmodels: [{folder}, org/a]\n",
    "a folder as base": "merge_method: ties\nbase_model: {folder}\nmodels: [org/a, org/b]\n",
    "a file": "merge_method: linear\nmodels: [/etc/passwd, org/a]\n",
    "a folder, relatively": "merge_method: linear\nmodels: [../../../etc, org/a]\n",
    "an adapter": "merge_method: linear\nmodels: [org/b+{folder}, org/a]\n",
    "another stage": "name: x\nmerge_method: linear\nmodels: [{folder}]\n---\nmerge_method: linear\nmodels: [x]\n",
    "a chat template": "merge_method: linear\nmodels: [org/b, org/a]\nchat_template: /etc/passwd\n",
    "a tokenizer": "merge_method: linear\nmodels: [org/b, org/a]\ntokenizer_source: {folder}\n",
    "statistics": "merge_method: fisher\nmodels: [org/b, org/a]\nstatistics: {{org/a: /etc/passwd}}\n",
    "a slice": "merge_method: passthrough\nslices: [{{sources: [{{model: {folder}, layer_range: [0, 1]}}]}}]\n",
}


def test_recipes_that_name_files_of_the_server_are_refused(app, hub, folders, alice):
    for what, recipe in FILES.items():
        text = recipe.format(folder=folders["a"])
        for name in ("validate_recipe", "check", "estimate"):
            told = call(app, name, {"recipe": text})
            assert re.search(r'"error": "[^"]{20,}', told) and "root:" not in told, (what, told)


def test_what_a_repository_names_is_no_file_of_the_server(app, hub, folders, tmp_path, alice):
    tmp_path.joinpath("README.md").write_text(f"---\nbase_model: {folders['b']}\n---\n")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["a"] / name).read_bytes())
    steps.put(hub, "evil/child", tmp_path)
    steps.put(hub, "evil/other", tmp_path)
    told = call(app, "check", {"recipe": steps.recipe_of(["evil/child", "evil/other"])})
    assert str(folders["b"]) not in told and '"proposed_base": null' in told
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(folders["b"])})
    )
    (adapter / "adapter_model.safetensors").write_bytes((folders["a"] / "model.safetensors").read_bytes())
    steps.put(hub, "evil/adapter", adapter)
    told = call(app, "check", {"recipe": steps.recipe_of(["evil/adapter", "org/a"])})
    assert "no id there but a folder" in told and '"fits"' not in told


def test_the_list_of_models_cannot_bring_in_a_folder(app, hub, visitors, folders, alice):
    page, taped = visitors(), Taped(app)
    taped.watch(page)
    steps.open_page(page, app.url)
    session = taped.events["arrive"]["session_hash"]
    arrange = next(one["id"] for one in config(app)["dependencies"] if one["api_name"] == "arrange")
    folder = str(folders["a"])
    value = {"models": [{"id": folder}, {"id": "org/a"}], "base": folder, "proposed_base": folder, "seq": 9}
    told = event(
        app,
        {"fn_index": arrange, "session_hash": session, "data": [value, None, None]},
        {"Content-Type": "application/json", "Origin": app.url},
    )
    assert folder not in told
    page.get_by_role("searchbox", name="Find a method").fill("linear")
    steps.method(page, "linear").check(force=True)
    steps.reads(page, "merge_method: linear")
    assert folder not in steps.recipe(page).inner_text()


# --- what repositories hold


@pytest.fixture
def hostile(hub, folders, tmp_path):
    """A model whose card, config and tokenizer are an attacker's, with code of its own."""
    proof = tmp_path / "executed"
    folder = tmp_path / "hostile"
    folder.mkdir()
    for file in folders["b"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config_of = json.loads((folder / "config.json").read_text())
    config_of |= {"auto_map": {"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"}}
    config_of |= {"_name_or_path": MARK, "note": MARK}
    (folder / "config.json").write_text(json.dumps(config_of))
    (folder / "modeling.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: pass\n")
    (folder / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: '{MARK}'\nlicense_link: 'javascript:window.__pwned=1'\n"
        f"tags: ['{MARK}']\nwidget: [{{text: '{MARK}'}}]\nlanguage: ['{MARK}']\ndatasets: ['{MARK}']\n---\n"
        f"# {MARK}\n<script>window.__pwned=1</script>\n"
    )
    steps.put(hub, "evil/card", folder)
    return proof


def test_texts_of_repositories_are_shown_and_nothing_in_them_runs(app, hub, page, hostile, alice):
    steps.open_page(page, app.url)
    steps.write(page, steps.recipe_of(["org/a", "evil/card"], "org/base", merge_method="ties"))
    expect(steps.report(page)).to_contain_text("card")
    steps.says(page, re.compile("^(These models fit|They fit, with warnings)$"))
    steps.merge(page)
    expect(page.get_by_role("heading", name="How it was merged")).to_be_visible()
    page.get_by_role("tab", name="Metadata").click()
    expect(page.locator("#metadata .cm-content")).to_contain_text("base_model_relation: merge")
    expect(page.get_by_role("textbox", name="Text")).to_have_value(MARK)
    page.get_by_role("button", name="Try", exact=True).click()
    answers = page.get_by_role("article")
    expect(answers).to_have_count(3)
    for bad in (MARK, f"org/{MARK}", f"org/a@{MARK}"):
        steps.write(page, f"merge_method: linear\nmodels: ['{bad}', org/a]\n")
        expect(page.locator("#yaml-problem")).to_contain_text("onerror")
        steps.search(page).fill(bad)
        steps.search(page).press("Enter")
        expect(page.locator("#models-problem")).to_contain_text("onerror")
    page.goto(f"{app.url}/?from={MARK}")
    expect(page.get_by_test_id("toast-body")).to_contain_text("onerror")
    assert page.evaluate("window.__pwned") is None
    assert page.locator("img[src=x], script:text('__pwned'), a[href^='javascript:']").count() == 0
    assert not hostile.exists()


def test_pickles_are_not_read(app, hub, folders, tmp_path, alice):
    (tmp_path / "config.json").write_bytes((folders["a"] / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    steps.put(hub, "evil/pickle", tmp_path)
    told = call(app, "check", {"recipe": steps.recipe_of(["org/a", "evil/pickle"])})
    assert "name a model with safetensors" in told and '"verdict": "does not fit"' in told
    assert not [each for each in hub.log if each.path.endswith(".bin") and each.method == "GET"]


# --- how much


def test_what_is_too_large_is_refused(app, alice):
    def valid(text):
        return call(app, "validate_recipe", {"recipe": text})

    assert "kB" in valid("#" * 70_000)
    assert "16" in valid(steps.recipe_of([f"org/m{i}" for i in range(17)]))
    assert '"valid": false' in valid("[" * 30_000)
    assert '"valid": false' in valid("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    name = uuid.uuid4().hex
    body = (
        f'--{name}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
        + b"0" * 11_000_000
        + f"\r\n--{name}--\r\n".encode()
    )
    status, _ = ask(app, "/gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={name}"})
    assert status == 413
