"""Search over the models of a Hub, as `HfApi.list_models` asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.datastructures import QueryParams

from tests.hub.store import HubError, Repo, Store, Token

# What a listing tells of a model unless it is asked for more.
BRIEF = ("id", "modelId", "author", "private", "gated", "downloads", "likes", "createdAt", "tags", "pipeline_tag")
BRIEF += ("library_name",)
KNOWN = {"search", "author", "filter", "pipeline_tag", "gated", "sort", "limit", "cursor", "expand"}
KNOWN |= {"full", "config", "cardData"}


def visible_models(store: Store, token: Token | None) -> list[Repo]:
    """Return the models that a token may see, by name."""
    models = [repo for _, repo in sorted(store.repos.items()) if repo.kind == "models"]
    return [repo for repo in models if store.sees(repo, token)]


def matching(told: Iterable[dict[str, Any]], query: QueryParams) -> list[dict[str, Any]]:
    """Return those that a query asks for, in its order: most downloads first, unless it says `likes`."""
    if unknown := set(query) - KNOWN:
        raise HubError(400, "", f"this Hub cannot filter models by {', '.join(sorted(unknown))}")
    found = [each for each in told if _fits(each, query)]
    order = query.get("sort", "downloads")
    newest = order in ("lastModified", "createdAt")
    if not newest and order not in ("downloads", "likes", "trendingScore"):
        raise HubError(400, "", f"sort: {order}")
    return found if newest else sorted(found, key=lambda each: -each.get(order, 0))


def brief(told: dict[str, Any], query: QueryParams) -> dict[str, Any]:
    """Leave out what a listing does not tell, and was not asked for."""
    more = {"full": ("sha", "lastModified", "siblings"), "config": ("config",), "cardData": ("cardData",)}
    asked = [key for flag, keys in more.items() if query.get(flag, "").lower() == "true" for key in keys]
    expand = query.getlist("expand")
    kept = ("id", *expand) if expand else (*BRIEF, *asked)
    return {key: told[key] for key in kept if key in told}


def _fits(told: dict[str, Any], query: QueryParams) -> bool:
    tags = {*told["tags"], told["pipeline_tag"], told["library_name"]}
    return (
        all(word in told["id"].lower() for word in query.get("search", "").lower().split())
        and query.get("author", told["author"]) == told["author"]
        and query.get("pipeline_tag", told["pipeline_tag"]) == told["pipeline_tag"]
        and set(query.getlist("filter")) <= tags
        and query.get("gated", "").lower() in ("", str(bool(told["gated"])).lower())
    )
