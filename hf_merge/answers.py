"""What went wrong between this machine and the Hub, in words that reading and publishing share."""

from __future__ import annotations

import httpx2

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
