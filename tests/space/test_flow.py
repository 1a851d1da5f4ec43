"""The page from models to a published merge, as visitors use it."""

import re

import pytest
from PIL import Image

from tests.conftest import save_llamas, save_vit
from tests.space import steps

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny `base` and fine-tunes `a` and `b` of it; `wide` has a larger vocabulary."""
    root = tmp_path_factory.mktemp("m")
    made = save_llamas(root, ("a", "b"))
    wide = save_llamas(root / "wider", ("wide",), vocab_size=68)
    return {**made, "wide": wide["wide"]}


@pytest.fixture
def models(hub, folders):
    """The same on the Hub, by their names; fine-tunes name their base."""
    for name, folder in folders.items():
        steps.put(hub, f"org/{name}", folder, downloads={"base": 30, "a": 20}.get(name, 10))
        lineage = "" if name == "base" else "base_model: org/base\n"
        steps.put_file(hub, f"org/{name}", "README.md", f"---\nlicense: mit\n{lineage}---\n".encode())
    return {name: f"org/{name}" for name in folders}


@pytest.fixture
def ours(local_app, page, folders):
    """The local page with our tiny models in it."""
    steps.open_page(page, local_app.url)
    steps.write(page, steps.recipe_of([folders["a"], folders["b"]], folders["base"], merge_method="ties"))
    expect(steps.listed(page)).to_contain_text([r"a", r"b"])
    steps.reads(page, "merge_method: ties")
    expect(steps.report(page).get_by_role("row")).to_have_count(4)
    expect(steps.report(page)).to_contain_text("30 match")
    return page


def test_the_worked_example_is_merged_and_tried_without_account_and_network(local_app, page):
    steps.open_page(page, local_app.url)
    steps.says(page, "These models fit")
    assert steps.report(page).get_by_role("row").count() == 4
    expect(page.get_by_text("Repository")).to_have_count(0)
    steps.merge(page)
    expect(page.get_by_role("table", name="How alike the changes are").get_by_role("row")).to_have_count(4)
    expect(page.get_by_role("table", name="Where signs disagree")).to_be_visible()
    expect(page.get_by_text("1 means the same change of the base").last).to_be_visible()
    for title in ("Change by layer", "Norms by layer"):
        expect(page.get_by_role("img").filter(has_text=title)).to_be_visible()
    expect(page.get_by_text("How far each model went")).to_be_visible()
    expect(page.get_by_text("The length of all weights of a layer")).to_be_visible()
    page.get_by_role("textbox", name="Text").fill("sort tulip=")
    page.get_by_role("button", name="Try", exact=True).click()
    answers = page.get_by_role("article")
    expect(answers.get_by_role("heading")).to_have_text(["merged", "sort", "flip"])
    assert "ilptu" in answers.first.inner_text()
    assert answers.nth(0).bounding_box()["y"] == answers.nth(1).bounding_box()["y"], "they are not side by side"


def test_a_merge_of_classifiers_is_tried_on_a_picture(local_app, page, tmp_path):
    for seed, name in enumerate("ab"):
        save_vit(tmp_path / name, seed)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 10), (200, 30, 90)).save(picture)
    steps.open_page(page, local_app.url)
    steps.write(page, steps.recipe_of([tmp_path / "a", tmp_path / "b"]))
    expect(steps.listed(page)).to_contain_text(["a", "b"])
    steps.says(page, "These models fit")
    steps.merge(page)
    expect(page.get_by_role("textbox", name="Text")).to_be_hidden()
    go = page.get_by_role("button", name="Try", exact=True)
    go.click()
    expect(page.get_by_text("Give the models something to answer to.")).to_be_visible()
    page.locator("#try-image input[type=file]").set_input_files(picture)
    expect(page.locator("#try-image").get_by_role("button", name="Remove")).to_be_visible()
    go.click()
    answers = page.get_by_role("article")
    expect(answers.get_by_role("heading")).to_have_text(["merged", "a", "b"])
    for one in answers.all():
        expect(one.get_by_role("listitem")).to_have_count(2)
        expect(one).to_contain_text(re.compile(r"(cat|dog)\s*\d+\.\d %"))


def test_models_come_by_search_by_id_and_by_address(app, hub, page, models):
    steps.open_page(page, app.url)
    steps.empty(page)
    steps.search(page).press_sequentially("org/")
    expect(page.get_by_role("option")).to_contain_text(["org/base", "org/a", "org/b", "org/wide"])
    page.get_by_role("option", name="org/a", exact=True).click()
    expect(steps.listed(page)).to_contain_text(["org/a"])
    steps.add(page, "https://huggingface.co/org/b")
    expect(steps.listed(page)).to_contain_text(["org/a", "org/b"])
    steps.says(page, "These models fit")
    no_id, no_address = "is not the id of a model", "is not the address of a model"
    for wrong, told in (("a model", no_id), ("https://example.org/a/b", no_address)):
        steps.search(page).fill(wrong)
        steps.search(page).press("Enter")
        expect(page.locator("#models-problem")).to_contain_text(told)
        expect(steps.listed(page)).to_have_count(2)
    steps.add(page, "org/gone")
    expect(steps.listed(page).last).to_contain_text("org/gone")
    expect(steps.listed(page).last.get_by_role("img", name="Problem")).to_be_visible()
    steps.says(page, "They do not fit")
    page.get_by_role("button", name="Remove gone").click()
    steps.says(page, "These models fit")


def test_a_fix_mends_what_does_not_fit(app, hub, page, models):
    steps.open_page(page, app.url)
    steps.empty(page)
    steps.add(page, models["a"], models["wide"])
    steps.says(page, "They do not fit")
    expect(steps.start(page)).to_be_disabled()
    page.locator(".fixes").get_by_role("button").first.click()
    steps.says(page, re.compile("^(These models fit|They fit, with warnings)$"))
    expect(steps.start(page)).to_be_enabled()


def test_a_card_a_slider_and_a_curve_change_the_recipe_by_keyboard(ours):
    page = ours
    steps.method(page, "ties").focus()
    page.keyboard.press("ArrowRight")
    chosen = page.get_by_role("radio", checked=True).get_attribute("value")
    steps.reads(page, f"merge_method: {chosen}")
    page.get_by_role("searchbox", name="Find a method").fill("ties")
    steps.method(page, "ties").check(force=True)  # the whole card is its label
    steps.reads(page, "merge_method: ties")
    slider = page.get_by_role("slider", name="density, a", exact=True)
    slider.focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    steps.reads(page, r"density: 0\.9[0-9]*\b", r"density: 1(\.0)?\}")
    expect(slider).to_be_focused()
    expect(page.get_by_text("Keeps the 9")).to_be_visible()
    page.get_by_role("combobox", name="density, b: how it varies").select_option("curve over depth")
    first = page.get_by_role("slider", name="density, b, first layer")
    first.focus()
    page.keyboard.press("Home")
    steps.reads(page, r"density: \[0, 1, 1\]")
    expect(first).to_be_focused()
    page.get_by_role("button", name="One point less on the curve of density, b").click()
    steps.reads(page, r"density: \[0, 1\]")
    page.get_by_role("combobox", name="weight, a: how it varies").select_option("attention, MLP, rest apart")
    page.get_by_role("spinbutton", name="weight, a, Attention, exact number").fill("0.25")
    page.keyboard.press("Tab")
    steps.reads(page, r"filter: self_attn, value: 0\.25", "filter: mlp, value: 1")


def test_text_and_form_follow_each_other_and_bad_text_harms_nothing(ours, folders):
    page = ours
    typed = steps.recipe_of(
        [folders["b"], folders["a"]], folders["base"], merge_method="slerp  # as I like it", parameters="{t: 0.25}"
    )
    steps.write(page, typed)
    expect(page.get_by_role("slider", name="t", exact=True)).to_have_value("0.25")
    expect(steps.listed(page)).to_contain_text(["b", "a"])
    expect(steps.method(page, "slerp")).to_be_checked()
    assert "slerp  # as I like it" in steps.recipe(page).inner_text()
    steps.write(page, typed.replace("slerp", "sleep"))
    expect(page.locator("#yaml-problem")).to_contain_text(re.compile(r"Not read\..*sleep"))
    steps.write(page, typed.replace("t: 0.25", "t: 0.25]"))
    expect(page.locator("#yaml-problem")).to_contain_text(re.compile(r"Not read\..*line \d"))
    expect(page.get_by_role("slider", name="t", exact=True)).to_have_value("0.25")
    expect(steps.listed(page)).to_contain_text(["b", "a"])
    steps.write(page, typed.replace("0.25", "0.75"))
    expect(page.get_by_role("slider", name="t", exact=True)).to_have_value("0.75")
    expect(page.locator("#yaml-problem")).to_be_hidden()


def test_options_are_in_the_recipe_and_it_leaves_as_python_command_and_link(ours, visitors, folders):
    page = ours
    page.get_by_role("button", name=re.compile("^More: dtype")).click()
    for field, option, line in (
        ("Written as", "bfloat16", "dtype: bfloat16"),
        ("Tokenizer", "United: all tokens of all models", "tokenizer_source: union"),
        ("Result", "A LoRA adapter of the base", "output_format: adapter"),
    ):
        page.get_by_role("combobox", name=field, exact=True).click()
        page.get_by_role("option", name=option).click()
        steps.reads(page, line)
    page.get_by_role("spinbutton", name="Seed").fill("7")
    steps.reads(page, "seed: 7")
    page.get_by_role("tab", name="Python").click()
    expect(page.locator("#as-python .cm-content")).to_contain_text("hf_merge.merge(")
    expect(page.locator("#as-python .cm-content")).to_contain_text("seed=7")
    page.get_by_role("tab", name="Command").click()
    expect(page.locator("#as-command .cm-content")).to_contain_text("hf-merge merge --method ties")
    page.get_by_role("tab", name="Link").click()
    link = page.locator("#as-link .cm-content")
    expect(link).to_contain_text("?recipe=")
    other = visitors()
    other.goto(link.inner_text())
    steps.reads(other, "merge_method: ties", "output_format: adapter", "seed: 7")
    expect(steps.listed(other)).to_contain_text([str(folders["a"]), str(folders["b"])])


def test_the_recipe_of_a_merge_on_the_hub_is_opened_by_its_name(app, hub, page, models, tmp_path):
    (tmp_path / "mergekit_config.yml").write_text(
        steps.recipe_of([models["a"], models["b"]], models["base"], merge_method="task_arithmetic")
    )
    steps.put(hub, "org/merge", tmp_path)
    page.goto(f"{app.url}/?from=org/merge")
    steps.reads(page, "merge_method: task_arithmetic")
    expect(steps.listed(page)).to_contain_text(["org/a", "org/b"])
    page.goto(f"{app.url}/?from=org/a")
    expect(page.get_by_test_id("toast-body")).to_contain_text("it was not merged by hf_merge or MergeKit")
    expect(steps.listed(page)).to_contain_text(["org/a", "org/b"])  # as it was


def test_a_merge_is_published_as_weights_and_as_a_recipe(app, hub, page, login, models, folders):
    steps.open_page(page, app.url)
    login(page, "alice")
    steps.signed_in(page, "alice")
    steps.write(page, steps.recipe_of([models["a"], models["b"]], models["base"], merge_method="ties"))
    expect(steps.report(page).get_by_role("row")).to_have_count(4)
    expect(steps.report(page)).to_contain_text("all 30 match")
    steps.says(page, "These models fit")
    steps.merge(page)
    expect(page.get_by_role("heading", name="How it was merged")).to_be_visible()
    page.get_by_role("tab", name="Metadata").click()
    expect(page.locator("#metadata .cm-content")).to_contain_text("base_model_relation: merge")
    name = page.get_by_role("textbox", name=re.compile("^Repository"))
    expect(name).to_have_value("alice/a-b-ties")
    steps.put(hub, "alice/taken", folders["a"])
    name.fill("alice/taken")
    name.press("Tab")
    expect(page.get_by_text("alice/taken is taken: choose another name.")).to_be_visible()
    push = page.get_by_role("button", name="Push to the Hub")
    push.click()
    expect(page.locator("#push-problem")).to_contain_text("nothing on the Hub is replaced")
    name.fill("alice/mine")
    name.press("Tab")
    expect(page.get_by_text("alice/mine is free.")).to_be_visible()
    push.click()
    published = page.get_by_role("heading", name="Published: alice/mine")
    expect(published.get_by_role("link")).to_have_attribute("href", f"{hub.url}/alice/mine")
    assert hub.store.repos["alice/mine"].private
    assert "model.safetensors" in hub.store.repos["alice/mine"].commit("main").files
    page.get_by_role("radio", name="The recipe alone").check()
    page.get_by_role("checkbox", name="Private").uncheck()
    name.fill("alice/recipe")
    push.click()
    expect(page.get_by_role("heading", name="Published: alice/recipe")).to_be_visible()
    assert not hub.store.repos["alice/recipe"].private
    assert not [file for file in hub.store.repos["alice/recipe"].commit("main").files if file.endswith(".safetensors")]
    assert {seen.user for seen in hub.log if seen.method == "POST" and "/alice/" in seen.path} == {"alice"}


def test_an_adapter_and_a_merge_straight_to_the_hub(app, hub, page, login, models):
    steps.open_page(page, app.url)
    direct = page.get_by_role("checkbox", name="Straight to the Hub")
    direct.check()
    page.get_by_role("textbox", name="Into repository").fill("alice/direct")
    steps.start(page).click()
    expect(page.locator("#run-problem")).to_contain_text("Sign in first: a push needs your account.")
    login(page, "alice")
    more = {"merge_method": "task_arithmetic", "output_format": "adapter"}
    steps.write(page, steps.recipe_of([models["a"], models["b"]], models["base"], **more))
    expect(steps.report(page).get_by_role("row")).to_have_count(4)
    expect(steps.report(page)).to_contain_text("all 30 match")
    steps.merge(page)
    page.get_by_role("textbox", name=re.compile("^Repository")).fill("alice/adapter")
    page.get_by_role("button", name="Push to the Hub").click()
    expect(page.get_by_role("heading", name="Published: alice/adapter")).to_be_visible()
    assert "adapter_model.safetensors" in hub.store.repos["alice/adapter"].commit("main").files
    steps.write(page, steps.recipe_of([models["a"], models["b"]], models["base"], merge_method="task_arithmetic"))
    expect(steps.report(page)).to_contain_text("all 30 match")
    direct.check()
    page.get_by_role("textbox", name="Into repository").fill("alice/direct")
    steps.start(page).click()
    expect(page.get_by_text("Merged straight into alice/direct.")).to_be_visible()
    assert hub.store.repos["alice/direct"].private
    assert "model.safetensors" in hub.store.repos["alice/direct"].commit("main").files


def test_the_whole_way_goes_by_keyboard_alone(app, hub, page, models):
    steps.open_page(page, app.url)
    steps.press(page, "Sign in with Hugging Face")
    steps.press(page, "Continue as alice")
    steps.signed_in(page, "alice")
    steps.press(page, "Start empty")
    for number, name in enumerate("ab", 1):
        steps.focused(page, steps.search(page))
        page.keyboard.type(models[name])
        page.keyboard.press("Enter")
        expect(steps.listed(page)).to_have_count(number)
    steps.press(page, "Use it as the base")
    steps.reads(page, f"base_model: {models['base']}")
    steps.focused(page, page.get_by_role("searchbox", name="Find a method"))
    page.keyboard.type("task_arithmetic")
    steps.focused(page, steps.method(page, "task_arithmetic"))
    page.keyboard.press("Space")
    steps.reads(page, "merge_method: task_arithmetic")
    steps.press(page, "Merge")
    expect(steps.run(page).get_by_text(re.compile("^Done in")).first).to_be_visible()
    steps.focused(page, page.get_by_role("textbox", name="Text"))
    page.keyboard.type("once")
    steps.press(page, "Try")
    expect(page.get_by_role("article")).to_have_count(3)
    steps.press(page, "Push to the Hub")
    expect(page.get_by_role("heading", name="Published: alice/a-b-task_arithmetic")).to_be_visible()


def test_signing_in_and_opening_the_page_again_lose_no_recipe(app, hub, page, login, models):
    steps.open_page(page, app.url)
    steps.write(page, steps.recipe_of([models["a"], models["b"]], models["base"], merge_method="ties", seed=12))
    steps.reads(page, "seed: 12")
    expect(steps.listed(page)).to_contain_text([models["a"], models["b"]])
    login(page, "alice")
    steps.signed_in(page, "alice")
    steps.reads(page, "merge_method: ties", "seed: 12")
    page.goto(f"{app.url}/?recipe=broken")
    expect(page.get_by_test_id("toast-body")).to_contain_text("The link's recipe is damaged")
    steps.reads(page, "merge_method: ties", "seed: 12")


def test_a_merge_is_adjusted_merged_again_and_looked_at_beside_the_earlier_one(local_app, page):
    steps.open_page(page, local_app.url)
    steps.says(page, "These models fit")
    base = page.get_by_role("button", name="Do without the base base")
    expect(base).to_be_visible()
    steps.merge(page)
    page.get_by_role("searchbox", name="Find a method").fill("linear")
    steps.method(page, "linear").check(force=True)
    steps.reads(page, "merge_method: linear")
    expect(base).to_have_count(0)  # it would be one more model
    steps.says(page, "These models fit")
    steps.merge(page)
    earlier = page.get_by_role("combobox", name="Your merges here")
    expect(earlier).to_have_value(re.compile("^linear of sort, flip"))
    page.get_by_role("searchbox", name="Find a method").fill("ties")
    steps.method(page, "ties").check(force=True)
    expect(base).to_be_visible()  # it came back
    earlier.click()
    page.get_by_role("option", name=re.compile("^ties of sort, flip")).click()
    steps.reads(page, "merge_method: ties")
    expect(earlier).to_have_value(re.compile("^ties of sort, flip"))
    steps.write(page, "merge_method: linear\nmodels:\n- gone\n- lost\n")
    steps.says(page, "They do not fit")
    expect(steps.start(page)).to_be_disabled()
