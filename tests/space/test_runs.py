"""Merges that go on without their page, end when they are told to, and leave nothing behind."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import save_llamas
from tests.hub.store import Token
from tests.space import steps

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny `base` and fine-tunes of it."""
    return save_llamas(tmp_path_factory.mktemp("m"), ("a", "b", "c"))


@pytest.fixture
def models(hub, folders):
    """The same on the Hub, by their names."""
    return {name: steps.put(hub, f"org/{name}", folder) for name, folder in folders.items()}


def prepare(page, url, *models, **more):
    """Open the page with a recipe that is ready to start."""
    steps.open_page(page, url)
    steps.write(page, steps.recipe_of(models, **more))
    expect(steps.report(page).get_by_role("row")).to_have_count(1 + len(models) + ("base" in more))
    expect(steps.report(page)).to_contain_text("all 30 match")
    expect(steps.start(page)).to_be_enabled()


def until(condition, seconds=20.0):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.1)


def left(app):
    """The folders of jobs that have more than the note of what became of it."""
    return {path.parent for path in app.jobs.glob("jobs/*/*") if path.name != "job.json"}


def test_a_merge_goes_on_while_its_page_is_reloaded_and_closed(app, hub, page, models):
    prepare(page, app.url, models["a"], models["b"], base=models["base"], merge_method="ties")
    with steps.held(hub, models["b"]) as over:
        steps.start(page).click()
        expect(page.get_by_role("progressbar", name="Progress of the merge")).to_be_visible()
        expect(page.get_by_role("button", name="Merging…")).to_be_disabled()
        page.reload()
        expect(page.get_by_role("progressbar", name="Progress of the merge")).to_be_visible()
        expect(page.get_by_text("It goes on if you close this page.")).to_be_visible()
        again = page.context.new_page()
        page.close()
        over.set()
        again.goto(app.url)
        expect(steps.run(again).get_by_text(re.compile("^Done in")).first).to_be_visible()
    expect(again.get_by_role("table", name="How alike the changes are")).to_contain_text("merged")
    steps.reads(again, "org/a, org/b")


def test_what_is_cancelled_in_the_queue_and_at_work_leaves_nothing(app, hub, visitors, models):
    before = left(app)
    first, second = visitors(), visitors()
    for page, names in ((first, ("a", "b")), (second, ("a", "c"))):
        prepare(page, app.url, *(models[name] for name in names))
    with steps.held(hub, models["b"]) as over:
        steps.start(first).click()
        expect(first.get_by_role("progressbar")).to_be_visible()
        steps.start(second).click()
        expect(steps.run(second).get_by_text("Waiting: place 1 in the queue").first).to_be_visible()
        second.get_by_role("button", name="Cancel").click()
        expect(steps.run(second).get_by_text("Stopped").first).to_be_visible()
        expect(second.get_by_role("button", name="Cancel")).to_be_hidden()
        assert len(left(app) - before) == 1, "what was cancelled in the queue is still there"
        first.get_by_role("button", name="Cancel").click()
        expect(steps.run(first).get_by_text("Stopping").first).to_be_visible()
        over.set()
        expect(steps.run(first).get_by_text("Stopped").first).to_be_visible()
    expect(steps.start(first)).to_be_enabled()
    until(lambda: left(app) == before)  # what a download still wrote is cleared a little later


def test_two_users_at_once_see_nothing_of_each_other(app, hub, visitors, login, models, folders):
    secret = steps.put(hub, "org/secret", folders["b"], gated=True, granted={"alice"})
    pages = {user: visitors() for user in ("alice", "bob")}
    for user, page in pages.items():
        steps.open_page(page, app.url)
        login(page, user)
    seen = len(hub.log)
    alice, bob = pages["alice"], pages["bob"]
    prepare(alice, app.url, models["a"], secret)
    steps.start(alice).click()
    steps.write(bob, steps.recipe_of([models["a"], secret]))
    expect(steps.listed(bob).last.get_by_role("img", name="Problem")).to_be_visible()
    expect(steps.start(bob)).to_be_disabled()
    steps.write(bob, steps.recipe_of([models["a"], models["c"]]))
    expect(steps.start(bob)).to_be_enabled()
    steps.merge(bob)
    expect(steps.run(alice).get_by_text(re.compile("^Done in")).first).to_be_visible()
    bob.reload()
    steps.reads(bob, "org/c")
    expect(steps.run(bob).get_by_text(re.compile("^Done in")).first).to_be_visible()
    expect(bob.get_by_role("combobox", name="Your merges here")).to_be_hidden()
    assert "secret" not in bob.locator("body").inner_text()
    weights = [each for each in hub.log[seen:] if "/org/secret/resolve" in each.path and each.status < 400]
    assert {each.user for each in weights} == {"alice"}


def call(app, token, *data):
    """Call `merge_and_push` as a program does; return its answer."""
    with httpx.Client(
        base_url=app.url, headers={"Authorization": f"Bearer {token}"}, timeout=180, trust_env=False
    ) as client:
        event = client.post("/gradio_api/call/merge_and_push", json={"data": [*data, True]}).json()["event_id"]
        told = client.get(f"/gradio_api/call/merge_and_push/{event}").text
    assert "event: complete" in told, app.output[-2000:]
    return json.loads(told.rsplit("data: ", 1)[1])[0]


def queued(app):
    """How many merges wait."""
    return sum(json.loads(path.read_text())["state"] == "queued" for path in app.jobs.glob("jobs/*/job.json"))


def test_twenty_merges_wait_for_each_other_and_limits_are_told(app, hub, visitors, models):
    users = [f"user{i}" for i in range(9)]
    hub.store.tokens |= {f"hf_{user}": Token(user, write=True) for user in users}
    pages = [visitors(), visitors()]
    for page in pages:
        prepare(page, app.url, models["a"], models["b"])
    quick = steps.recipe_of([models["a"], models["c"]])
    with steps.held(hub, models["b"]) as over, ThreadPoolExecutor(20) as pool:
        for page in pages:
            steps.start(page).click()
        expect(steps.run(pages[1]).get_by_text("Waiting: place 1 in the queue").first).to_be_visible()
        goals = [(user, f"{user}/merge{i}") for user in users for i in (1, 2)]
        answers = [pool.submit(call, app, f"hf_{user}", quick, goal) for user, goal in goals]
        while queued(app) < 19:
            assert not [each.result() for each in answers if each.done()]
            pages[0].wait_for_timeout(50)
        told = call(app, "hf_user0", quick, "user0/merge3")
        assert told == {"error": "You have 2 merges here already: wait for one, or cancel it."}
        over.set()
        for (_, goal), answer in zip(goals, answers, strict=True):
            assert answer.result()["repo_id"] == goal
            assert answer.result()["url"].startswith(f"{hub.url}/{goal}")
    assert all("model.safetensors" in hub.store.repos[goal].commit("main").files for _, goal in goals)
    assert "user0/merge3" not in hub.store.repos
    for page in pages:
        expect(steps.run(page).get_by_text(re.compile("^Done in")).first).to_be_visible()


def test_a_server_that_is_killed_tells_what_is_lost_and_a_small_disk_is_told(start, hub, visitors, models):
    app, page = start(hub), visitors()
    prepare(page, app.url, models["a"], models["b"])
    with steps.held(hub, models["b"]):
        steps.start(page).click()
        expect(page.get_by_role("progressbar")).to_be_visible()
        assert left(app)
        visitors.excuse("Connection|connection|Failed to|ERR_|fetch")
        app.stop(signal.SIGKILL)
    app.environment["HF_MERGE_SPACE_DISK"] = "100MB"
    app.start()
    page.goto(app.url)
    expect(steps.run(page).get_by_text("It was lost").first).to_be_visible()
    expect(page.get_by_text("The server was restarted while this merge was running: start it again.")).to_be_visible()
    assert not left(app)
    expect(page.get_by_text("It does not fit here.")).to_be_visible()
    command = page.get_by_text("hf-merge merge --method linear org/a org/b --push-to-hub me/merged --job cpu-upgrade")
    expect(command).to_be_visible()
    steps.start(page).click()
    expect(page.locator("#run-problem")).to_contain_text("The merge takes 0.3 GB of disk, and 0.1 GB are free here")
    assert not left(app)
