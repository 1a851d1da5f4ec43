"""What went wrong between this machine and the Hub, in one sentence with its fix; reading adds its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from hf_merge.errors import MergeError, PublishError, shown

FAILURES = (httpx2.HTTPError, OSError, ValueError, RuntimeError, FileDuplicationError, EntryNotFoundError)
"""What the Hub's client raises: its own errors, the network's, the disk's, and those of Xet."""

_NOT_SENT_AGAIN = "what was uploaded is not sent again"
PASS_A_TOKEN = "(--token, token=, HF_TOKEN or `hf auth login`)"


def endpoint() -> str:
    """The address of the Hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def is_unreachable(error: BaseException) -> bool:
    """Tell whether there was no answer because there was no connection."""
    return isinstance(error, (httpx2.ConnectError, httpx2.TimeoutException, httpx2.ProxyError))


def no_token() -> str:
    return (
        "To push to the Hub takes a token that may write, and there is none: "
        f"make one at {endpoint()}/settings/tokens, and pass it {PASS_A_TOKEN}."
    )


@contextmanager
def in_words(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Turn what goes wrong with the Hub into one sentence, in which no token stands."""
    try:
        yield
    except MergeError:
        raise
    except FAILURES as error:
        said = _refusal(repo_id, error)
        raise PublishError(said.replace(token, "<token>") if isinstance(token, str) else said) from error


def _refusal(repo_id: str, error: BaseException) -> str:
    """Return what went wrong and what to do about it."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    if isinstance(cause, LocalTokenNotFoundError):
        return no_token()
    if isinstance(cause, HFValidationError):
        return (
            f"'{repo_id}' cannot be the id of a repository: it is NAMESPACE/NAME, of letters, digits, '-', '_' and "
            "'.', at most 96, with no '--' or '..' in it."
        )
    if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
        return _answered(repo_id, cause)
    if isinstance(cause, json.JSONDecodeError):
        return f"The Hub did not take '{repo_id}' (its answer is no JSON): run it again later; {_NOT_SENT_AGAIN}."
    if is_unreachable(cause):
        return (
            f"The Hub at {endpoint()} cannot be reached for '{repo_id}' ({reason(cause)}): "
            f"check the network and HF_ENDPOINT, and run it again; {_NOT_SENT_AGAIN}."
        )
    if isinstance(cause, OSError) and cause.errno is not None and cause.filename:
        return f"'{cause.filename}' cannot be read or written ({cause.strerror}): mend that, and run it again."
    return f"The push to '{repo_id}' broke off ({reason(cause)}): run it again; {_NOT_SENT_AGAIN}."


def _answered(repo_id: str, error: HfHubHTTPError) -> str:
    """Say what the Hub's answer means."""
    status, page = error.response.status_code, f"{endpoint()}/{repo_id}"
    if isinstance(error, GatedRepoError):
        return (
            f"'{repo_id}' is gated: accept its conditions at {page}, "
            f"and pass a token of the account that did {PASS_A_TOKEN}."
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"The Hub does not accept the token that was sent for '{repo_id}': pass a valid one {PASS_A_TOKEN}."
    if status == 403:
        return (
            f"The token that was sent may not write to '{repo_id}': choose a namespace of its account, "
            f"open a pull request with create_pr=True (--create-pr), or pass a token that may {PASS_A_TOKEN}."
        )
    if status in (401, 404):
        return (
            f"There is no '{repo_id}' on the Hub that this token may write to: check namespace, name and branch, "
            f"or pass a token that may {PASS_A_TOKEN}."
        )
    if status == 409:
        return f"'{repo_id}' exists, and the token that was sent may not see it: choose another name, or another token."
    if status == 412:
        return (
            f"Somebody else changed '{repo_id}' meanwhile, and nothing was put over it: look at {page}/commits, "
            f"and run it again; {_NOT_SENT_AGAIN}."
        )
    if status == 429:
        return f"The Hub takes no more requests for now: wait some minutes, and run it again; {_NOT_SENT_AGAIN}."
    said = error.server_message or error.response.reason_phrase
    if status < 500:
        return f"The Hub refuses the push to '{repo_id}' ({status}: {shown(said, 300)}): nothing was changed there."
    return f"The Hub did not take '{repo_id}' ({status} {said}): run it again later; {_NOT_SENT_AGAIN}."
