"""What programs get from the Space: the same five functions by REST, by gradio_client and by MCP, and nothing else."""

import ast
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import save_llamas
from tests.space import steps

gradio_client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
anyio = pytest.importorskip("anyio", reason="anyio is not installed")
pytest.importorskip("mcp", reason="mcp is not installed")

pytestmark = pytest.mark.e2e
FUNCTIONS = {"search_models", "check", "validate_recipe", "estimate", "merge_and_push"}
LOGIN = {"_check_login_status"}  # of Gradio's own button


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("m")
    wide = save_llamas(root / "wider", ("wide",), vocab_size=68)
    return {**save_llamas(root, ("a", "b")), "wide": wide["wide"]}


@pytest.fixture
def models(hub, folders):
    """A tiny base, two fine-tunes, and one with a larger vocabulary, on the Hub."""
    for name, folder in folders.items():
        steps.put(hub, f"org/{name}", folder, downloads={"base": 30, "a": 20}.get(name, 10))
    return steps.recipe_of(["org/a", "org/b"], "org/base", merge_method="ties")


@pytest.fixture(scope="module")
def client(app):
    """A program of nobody's."""
    return gradio_client.Client(app.url, verbose=False)


def tools(app, run, token=None):
    """Run `await run(session)` with an MCP client, in a thread: Playwright may have a loop in this one."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client
    from mcp.shared._httpx_utils import create_mcp_http_client

    async def go():
        headers = {"Authorization": f"Bearer {token}"} if token else None
        async with (
            create_mcp_http_client(headers=headers) as http,
            streamable_http_client(f"{app.url}/gradio_api/mcp/", http_client=http) as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            return await run(session)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(anyio.run, go).result(timeout=120)


def answer(result):
    """Return the plain data that a tool answered with, which Gradio writes as Python does."""
    assert not result.isError, result.content
    return ast.literal_eval(result.content[0].text)


def test_programs_see_five_functions_and_no_event_of_the_page(client):
    listed = client.view_api(return_format="dict")
    assert {name.strip("/") for name in listed["named_endpoints"]} - LOGIN == FUNCTIONS
    assert not listed["unnamed_endpoints"]
    parameters = {
        name: [one["parameter_name"] for one in listed["named_endpoints"][f"/{name}"]["parameters"]]
        for name in FUNCTIONS
    }
    assert parameters == {
        "search_models": ["query", "limit"],
        "check": ["recipe"],
        "validate_recipe": ["recipe"],
        "estimate": ["recipe"],
        "merge_and_push": ["recipe", "repo_id", "private"],
    }


def test_search_finds_public_models_the_most_downloaded_first(client, hub, models):
    hub.store.repos["org/b"].private = True
    assert client.predict("org/", 2, api_name="/search_models") == ["org/base", "org/a"]
    assert "org/b" not in client.predict("org/", 50, api_name="/search_models")
    assert client.predict("  ", 5, api_name="/search_models") == []


def test_check_answers_from_headers(client, hub, models):
    begun = len(hub.log)
    report = client.predict(models, api_name="/check")
    assert report["verdict"] == "fits" and {row["name"] for row in report["rows"]} == {"org/base", "org/a", "org/b"}
    read = [each for each in hub.log[begun:] if each.path.endswith(".safetensors") and each.status in (200, 206)]
    assert all(each.method == "HEAD" or each.range for each in read), read
    wide = client.predict(steps.recipe_of(["org/a", "org/wide"]), api_name="/check")
    assert wide["verdict"] == "does not fit" and wide["fixes"]


def test_validate_recipe_names_the_line(client, models):
    assert client.predict(models, api_name="/validate_recipe") == {"valid": True, "error": ""}
    for bad, told in (
        (models.replace("ties", "tie"), "tie"),
        (models + "densty: 1\n", "line 6"),
        (models + "parameters: {density: 2}\n", "density"),
        ("models: [", "line 1"),
    ):
        found = client.predict(bad, api_name="/validate_recipe")
        assert not found["valid"] and told in found["error"], found


def test_estimate_is_what_the_merge_reads_and_writes(client, folders, models):
    costs = client.predict(models, api_name="/estimate")
    sizes = [(folders[name] / "model.safetensors").stat().st_size for name in ("base", "a", "b")]
    assert 0.9 * sum(sizes) <= costs["download"] <= 1.5 * sum(sizes)  # tensors are read by range, without headers
    assert 0.9 * sizes[0] <= costs["write"] <= 2 * sizes[0]
    told = client.predict(steps.recipe_of(["org/a", "org/wide"]), api_name="/estimate")
    assert told["error"].startswith("The models do not fit: ")


def test_merge_and_push_acts_as_the_account_whose_token_comes(app, hub, folders, models):
    private = steps.put(hub, "alice/private", folders["b"], private=True)
    recipe = steps.recipe_of(["org/a", private], "org/base", merge_method="task_arithmetic")
    alice, bob = (gradio_client.Client(app.url, oauth_token=f"hf_{user}", verbose=False) for user in ("alice", "bob"))
    made = alice.predict(recipe, "alice/api", True, api_name="/merge_and_push")
    assert made["repo_id"] == "alice/api" and made["url"].startswith(f"{hub.url}/alice/api"), made
    repo = hub.store.repos["alice/api"]
    assert repo.private and {"model.safetensors", "README.md", "hf_merge_recipe.yaml"} <= set(repo.commit("main").files)
    head = repo.refs["refs/heads/main"]
    again = alice.predict(models, "alice/api", True, api_name="/merge_and_push")
    assert "alice/api" in again["error"] and repo.refs["refs/heads/main"] == head
    refused = bob.predict(recipe, "bob/api", True, api_name="/merge_and_push")
    assert "alice/private" in refused["error"] and "bob/api" not in hub.store.repos


def test_merge_and_push_without_a_token_that_is_known_merges_nothing(client, app, hub, models):
    told = client.predict(models, "alice/none", api_name="/merge_and_push")
    assert told == {"error": "Send a token that may write: as the header Authorization, or sign in."}
    told = gradio_client.Client(app.url, oauth_token="hf_nobody", verbose=False).predict(
        models, "alice/none", api_name="/merge_and_push"
    )
    assert told == {"error": "The Hub does not know this token."}
    assert not [each for each in hub.log if each.path.endswith("repos/create") and each.user not in ("alice", "bob")]


def test_rest_takes_arguments_by_name(app, models):
    call = f"{app.url}/gradio_api/call/v2/validate_recipe"
    posted = urllib.request.Request(call, json.dumps({"recipe": models}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(posted, timeout=30) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=30) as stream:
        text = stream.read().decode()
    assert "event: complete" in text and '"valid": true' in text


def test_mcp_offers_the_same_functions_with_their_descriptions(app):
    async def listed(session):
        return (await session.list_tools()).tools

    found = {tool.name.split("space_", 1)[-1]: tool for tool in tools(app, listed)}
    assert set(found) - LOGIN == FUNCTIONS
    for name in FUNCTIONS:
        assert len(found[name].description) > 40
    said = found["merge_and_push"].inputSchema["properties"]
    assert set(said) == {"recipe", "repo_id", "private"}
    assert "NAMESPACE/NAME" in said["repo_id"]["description"]


def test_an_assistant_finds_checks_and_merges_by_mcp(app, hub, models):
    async def work(session):
        names = {tool.name.split("space_", 1)[-1]: tool.name for tool in (await session.list_tools()).tools}
        found = await session.call_tool(names["search_models"], {"query": "org/", "limit": 3})
        report = await session.call_tool(names["check"], {"recipe": models})
        made = await session.call_tool(names["merge_and_push"], {"recipe": models, "repo_id": "bob/mcp"})
        return found, report, made

    found, report, made = tools(app, work, token="hf_bob")
    assert "org/base" in found.content[0].text
    assert answer(report)["verdict"] == "fits"
    assert answer(made)["repo_id"] == "bob/mcp" and hub.store.repos["bob/mcp"].private
    assert {each.user for each in hub.log if "/bob/mcp/commit" in each.path} == {"bob"}


def test_errors_are_answers_in_words_for_programs_too(client):
    told = client.predict("merge_method: linear\nmodels: [org/gone, org/lost]\n", api_name="/check")
    assert told["verdict"] == "does not fit" and all(row["error"] for row in told["rows"])
    told = client.predict("a: &a [1]\nb: *a\n", api_name="/check")
    assert re.search(r"(?i)line 1: anchors", told["error"])


def test_the_documentation_of_the_functions_is_there(app):
    with urllib.request.urlopen(f"{app.url}/gradio_api/info", timeout=30) as response:
        info = json.load(response)
    assert {name.strip("/") for name in info["named_endpoints"]} - LOGIN == FUNCTIONS
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{app.url}/monitoring", timeout=30)
