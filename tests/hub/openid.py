"""Sign in with Hugging Face: the OpenID provider of the Hub, for one app and as many users as the store is told of.

A page asks who is there, instead of for a password; all else is as in the standard (OpenID Connect Core 1.0, code
flow): the app, its secret, the address to return to, one use of each code, and a signed identity.
"""

from __future__ import annotations

import base64
import html
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from joserfc import jwt
from joserfc.jwk import KeySet, RSAKey
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from tests.hub.store import HubError, Token

if TYPE_CHECKING:
    from tests.hub.jobs import Endpoint
    from tests.hub.server import Hub

CLIENT, SECRET = "the-space", "the-secret-of-the-space"

# Those of the Hub that this one keeps to. The rest reaches further than an app that merges needs: it is refused.
SCOPES = ("openid", "profile", "read-repos", "gated-repos", "contribute-repos")

PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><circle cx="4" cy="4" r="4" fill="#888"/></svg>'


@dataclass(frozen=True)
class Grant:
    """What a code stands for, until the app asks for it."""

    user: str
    redirect_uri: str
    scopes: tuple[str, ...]
    nonce: str | None


@dataclass
class OpenID:
    """The provider.

    Attributes:
        users: who may sign in.
        lasts: seconds for which a token of access is good.
        grants: code -> what it stands for; each is used once.
    """

    hub: Hub
    users: list[str] = field(default_factory=list)
    lasts: int = 8 * 3600
    grants: dict[str, Grant] = field(default_factory=dict)

    @cached_property
    def _key(self) -> RSAKey:
        return RSAKey.generate_key(2048, {"use": "sig", "kid": "test"})

    def environment(self, scopes: str) -> dict[str, str]:
        """Return what the Hub tells a Space that wants its visitors to sign in."""
        app = {"OAUTH_CLIENT_ID": CLIENT, "OAUTH_CLIENT_SECRET": SECRET, "OAUTH_SCOPES": scopes}
        return {**app, "OPENID_PROVIDER_URL": self.hub.url}

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        return [
            ("GET", "/.well-known/openid-configuration", self.discovery),
            ("GET", "/oauth/jwks", self.jwks),
            ("GET", "/oauth/authorize", self.ask),
            ("POST", "/oauth/authorize", self.consent),
            ("POST", "/oauth/token", self.token),
            ("GET", "/avatars/{name}.svg", self.picture),
        ]

    async def discovery(self, _: Request) -> Response:
        url = self.hub.url
        return JSONResponse({
            "issuer": url, "authorization_endpoint": f"{url}/oauth/authorize", "token_endpoint": f"{url}/oauth/token",
            "jwks_uri": f"{url}/oauth/jwks", "scopes_supported": SCOPES, "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code"], "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
        })  # fmt: skip

    async def jwks(self, _: Request) -> Response:
        return JSONResponse(KeySet([self._key]).as_dict(private=False))

    async def picture(self, _: Request) -> Response:
        return Response(PICTURE, media_type="image/svg+xml")

    async def ask(self, request: Request) -> Response:
        """Show what the app wants, with a button for each user."""
        wanted = dict(request.query_params)
        _scopes(wanted)
        hidden = "".join(f'<input type="hidden" name="{_safe(k)}" value="{_safe(v)}">' for k, v in wanted.items())
        buttons = "".join(f'<button name="user" value="{_safe(u)}">Continue as {_safe(u)}</button>' for u in self.users)
        head = '<!doctype html><html lang="en"><title>Sign in</title><link rel="icon" href="data:,">'
        return HTMLResponse(f"{head}<p>{_safe(wanted['scope'])}</p><form method=post>{hidden}{buttons}")

    async def consent(self, request: Request) -> Response:
        """Send the user back to the app with a code."""
        said = {key: str(value) for key, value in (await request.form()).items()}
        if said.get("user") not in self.users:
            raise HubError(403, "", "no such user")
        code = uuid.uuid4().hex
        self.grants[code] = Grant(said["user"], said["redirect_uri"], _scopes(said), said.get("nonce"))
        joint = "&" if "?" in said["redirect_uri"] else "?"
        back = {"code": code, **({"state": said["state"]} if "state" in said else {})}
        return RedirectResponse(said["redirect_uri"] + joint + urlencode(back), 303)

    async def token(self, request: Request) -> Response:
        """Give the app what a code stands for: the right to act for a user, and who that is."""
        said = await request.form()
        if request.headers.get("authorization") != _basic(CLIENT, SECRET):
            return JSONResponse({"error": "invalid_client"}, 401)
        grant = self.grants.pop(str(said.get("code")), None)
        if grant is None or said.get("grant_type") != "authorization_code":
            return JSONResponse({"error": "invalid_grant"}, 400)
        if grant.redirect_uri != said.get("redirect_uri"):
            return JSONResponse({"error": "invalid_grant", "error_description": "another redirect_uri"}, 400)
        text = self.hand_out(grant.user, grant.scopes)
        return JSONResponse({
            "access_token": text, "token_type": "bearer", "expires_in": self.lasts, "scope": " ".join(grant.scopes),
            "id_token": jwt.encode({"alg": "RS256", "kid": "test"}, self._identity(grant), self._key),
        })  # fmt: skip

    def hand_out(self, user: str, scopes: tuple[str, ...]) -> str:
        """Return a new token that lets the app act for a user."""
        text = f"hf_oauth_{uuid.uuid4().hex}"
        self.hub.store.tokens[text] = Token(user, "contribute-repos" in scopes, CLIENT, frozenset(scopes))
        return text

    def _identity(self, grant: Grant) -> dict[str, Any]:
        now = int(time.time())
        nonce = {"nonce": grant.nonce} if grant.nonce else {}
        return {
            "iss": self.hub.url, "aud": CLIENT, "sub": grant.user, "iat": now, "exp": now + self.lasts, **nonce,
            "name": grant.user.capitalize(), "preferred_username": grant.user, "isPro": False, "orgs": [],
            "profile": f"{self.hub.url}/{grant.user}", "picture": f"{self.hub.url}/avatars/{grant.user}.svg",
        }  # fmt: skip


def _scopes(said: Mapping[str, str]) -> tuple[str, ...]:
    """Return the scopes that an app asks for, or refuse it."""
    if said.get("client_id") != CLIENT or said.get("response_type") != "code" or not said.get("redirect_uri"):
        raise HubError(400, "", "The app is not known, wants no code, or gives no address to return to.")
    scopes = tuple(said.get("scope", "").split())
    if "openid" not in scopes or not set(scopes) <= set(SCOPES):
        raise HubError(400, "", f"invalid_scope: {said.get('scope')}")
    return scopes


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _basic(name: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()
