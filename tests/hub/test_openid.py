"""Signing in to an app by the Hub, and what the app may then do for its user."""

from urllib.parse import parse_qs, urlparse

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from tests.hub.conftest import Account
from tests.hub.openid import CLIENT, SECRET
from tests.hub.server import Hub

BACK = "http://127.0.0.1:1/login/callback?_target_url=/"
WANTED = {"client_id": CLIENT, "response_type": "code", "redirect_uri": BACK, "state": "s", "nonce": "n"}
SCOPES = "openid profile contribute-repos gated-repos"


@pytest.fixture
def client(hub: Hub):
    with httpx2.Client(base_url=hub.url, trust_env=False) as client:
        yield client


def code_of(client: httpx2.Client, user: str) -> str:
    """Sign in, and return the code that the app is sent."""
    page = client.get("/oauth/authorize", params={**WANTED, "scope": SCOPES}).text
    assert f'value="{user}"' in page
    answer = client.post("/oauth/authorize", data={**WANTED, "scope": SCOPES, "user": user})
    back = urlparse(answer.headers["location"])
    said = parse_qs(back.query)
    assert answer.status_code == 303 and said["state"] == ["s"] and said["_target_url"] == ["/"]
    return said["code"][0]


def exchange(client: httpx2.Client, code: str, secret: str = SECRET, back: str = BACK) -> httpx2.Response:
    data = {"grant_type": "authorization_code", "code": code, "redirect_uri": back}
    return client.post("/oauth/token", data=data, auth=(CLIENT, secret))


def test_each_user_gets_a_token_and_a_signed_identity(account: Account, client: httpx2.Client):
    users = [f"{account.name}-alice", f"{account.name}-bob"]
    account.hub.openid.users += users
    found = client.get("/.well-known/openid-configuration").json()
    keys = KeySet.import_key_set(client.get(found["jwks_uri"]).json())
    for user in users:
        told = exchange(client, code_of(client, user)).json()
        claims = jwt.decode(told["id_token"], keys).claims
        assert (claims["preferred_username"], claims["nonce"], claims["aud"]) == (user, "n", CLIENT)
        assert claims["iss"] == found["issuer"] == account.hub.url
        headers = {"Authorization": f"Bearer {told['access_token']}"}
        assert client.get("/api/whoami-v2", headers=headers).json()["name"] == user


def test_a_code_is_good_once_for_who_asked_for_it(account: Account, client: httpx2.Client):
    account.hub.openid.users.append(account.name)
    assert exchange(client, code_of(client, account.name), back="http://127.0.0.1:2/").status_code == 400
    code = code_of(client, account.name)
    assert exchange(client, code, secret="guessed").status_code == 401
    assert exchange(client, code).status_code == 200
    assert exchange(client, code).status_code == 400


@pytest.mark.parametrize(
    "said", [{"scope": "openid manage-repos"}, {"scope": "profile"}, {"client_id": "x"}, {"redirect_uri": ""}],
    ids=["reaches-too-far", "no-openid", "unknown-app", "nowhere-to-return"],
)  # fmt: skip
def test_an_app_that_asks_for_too_much_is_refused(client: httpx2.Client, said):
    assert client.get("/oauth/authorize", params={**WANTED, "scope": SCOPES, **said}).status_code == 400


def test_an_app_reaches_what_it_made_and_nothing_else(account: Account, llamas):
    """The rights of the scope contribute-repos."""
    account.put("public", llamas["a"])
    account.put("secret", llamas["a"], private=True)
    account.put("gated", llamas["a"], gated=True)
    account.hub.openid.users.append(account.name)
    got = account.python(
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
        api = HfApi()
        api.create_repo(f"{org}/made", private=True)
        api.upload_file(repo_id=f"{org}/made", path_or_fileobj=b"x", path_in_repo="x.safetensors")
        def status(function, *words, **more):
            try:
                return function(*words, **more) and 200
            except HfHubHTTPError as error:
                return error.response.status_code
        result = {
            "made": sorted(api.list_repo_files(f"{org}/made")),
            "change": status(api.upload_file, repo_id=f"{org}/public", path_or_fileobj=b"x", path_in_repo="x"),
            "pull": status(
                api.upload_file, repo_id=f"{org}/public", path_or_fileobj=b"x", path_in_repo="x", create_pr=True
            ),
            "delete": status(api.delete_repo, f"{org}/public"),
            "secret": status(api.model_info, f"{org}/secret"),
            "gated": status(api.hf_hub_download, f"{org}/gated", "config.json"),
            "job": status(api.run_job, image="python", command=["true"], namespace=org),
        }
        """,
        token=account.hub.openid.hand_out(account.name, ("openid", "contribute-repos")),
    )
    assert got.pop("made") == [".gitattributes", "x.safetensors"]
    assert got == {"change": 403, "pull": 403, "delete": 403, "secret": 404, "gated": 403, "job": 403}


def test_models_are_found_by_words_author_and_tags(account: Account, llamas, tmp_path):
    account.put("tiny-code", llamas["a"], downloads=5)
    account.put("tiny-math", llamas["b"], downloads=7)
    account.put("hidden-code", llamas["b"], private=True)
    (tmp_path / "README.md").write_text("---\ntags: [merge]\npipeline_tag: text-generation\n---\n")
    account.put("tiny-code", tmp_path)
    find = """
        from huggingface_hub import HfApi
        def found(**query):
            return [each.id.partition("/")[2] for each in HfApi().list_models(author=org, **query)]
        result = {
            "all": found(), "one": found(limit=1), "words": found(search="CODE tiny"), "none": found(search="nothing"),
            "tag": found(filter="merge"), "task": found(pipeline_tag="text-generation"),
            "more": [each.sha is None for each in HfApi().list_models(author=org, full=True, limit=1)],
        }
        """
    got = account.python(find, token=account.write)
    assert got["all"] == ["tiny-math", "tiny-code", "hidden-code"] and got["one"] == ["tiny-math"]
    assert got["words"] == got["tag"] == got["task"] == ["tiny-code"] and got["none"] == [] and got["more"] == [False]
    assert "hidden-code" not in account.python(find)["all"]
