"""hf_merge and a Hub that fails, breaks off or is not there: a sentence, no half model, and a run that goes on."""

import pytest

from tests.hub.conftest import REFUSED, Account, error_line
from tests.hub.server import Fault

pytestmark = pytest.mark.e2e


def test_a_hub_that_fails_is_told_from_one_that_refuses(account: Account, llamas, tmp_path):
    """What a broken download leaves is no model, and the next run fetches only what is missing."""
    org = account.name
    for name in ("down", "forbidden", "short", "broken", "cut"):
        account.put(name, llamas["a"])
    file = ".*model.safetensors"
    account.hub.faults += [
        Fault("error", f"{org}/down/revision"),
        Fault("error", f"{org}/forbidden/revision", status=403),
        Fault("short", f"cdn/{org}/short/{file}", method="GET", after=50),
        Fault("error", f"cdn/{org}/broken/{file}", method="GET", status=502),
        Fault("cut", f"cdn/{org}/cut/{file}", method="GET", after=0),
    ]
    later, retry = "run it again later; whole files are kept.", "run it again; whole files are kept."
    expected = {
        "down": (f"The Hub did not give '{org}/down' (500 Internal Server Error)", later),
        "forbidden": (f"The token that was sent may not read '{org}/forbidden': pass one", "`hf auth login`)."),
        "short": (f"The download of 'model.safetensors' of '{org}/short' broke off (Consistency check failed", retry),
        "broken": (f"The Hub did not give 'model.safetensors' of '{org}/broken' (502 Bad Gateway)", later),
        "cut": (f"The download of 'model.safetensors' of '{org}/cut' broke off (peer closed connection", retry),
    }
    got = account.python(
        REFUSED + "result = {name: told(base, f'{org}/{name}') for name in names}",
        names=list(expected),
        base=str(llamas["b"]),
        out=str(tmp_path / "deep" / "m"),
    )
    for name, (start, end) in expected.items():
        kind, said = got[name]
        assert kind == "SourceError" and said.startswith(start) and said.endswith(end) and "\n" not in said
    assert not [*tmp_path.glob("deep/*"), *tmp_path.glob("deep/.*")]
    offline = account.cli("plan", "--method", "linear", llamas["b"], f"{org}/cut", HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE forbids to ask the Hub" in error_line(offline.stderr)

    account.hub.faults.clear()
    account.hub.faults.append(Fault("cut", f"cdn/{org}/cut/{file}", method="GET", last=1, after=1000))
    done = account.cli("merge", "--method", "linear", llamas["b"], f"{org}/cut", tmp_path / "m")
    assert done.returncode == 0 and len(account.seen("GET", "cut/resolve/")) > 0, done.stderr
    assert len([each for each in account.seen("GET", "/cut/") if each.path.endswith("/config.json")]) == 1


def test_no_hub_at_all(account: Account, llamas, tmp_path):
    done = account.cli("plan", "--method", "linear", llamas["b"], "org/a", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1 and error_line(done.stderr).startswith(
        "Error: The Hub at http://127.0.0.1:9 cannot be reached for 'org/a'"
    )
