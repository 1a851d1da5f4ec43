"""`on_progress` while something comes from the Hub or goes there: it hears bytes, and what it raises ends that soon."""

import itertools
import threading
import time

import pytest

from tests.hub.conftest import IMPATIENT, Account
from tests.hub.server import Fault
from tests.hub.test_push import pushed, shown, uploads

pytestmark = pytest.mark.e2e

# Code that notes what is heard, and ends the work once `over` says so.
LISTENING = (
    IMPATIENT
    + """
import os, threading, time, hf_merge
os.chdir(work)
class Stop(Exception): pass
heard = []
def listener(over=lambda progress: False):
    def hear(progress):
        heard.append([progress.stage, progress.tensor, progress.tensors, progress.all_tensors, progress.bytes,
                      progress.all_bytes])
        if over(progress):
            raise stop
    return hear
stop = Stop("enough")
def ended(call):
    begin = time.monotonic()
    try:
        call()
    except Stop as error:
        return [error is stop, time.monotonic() - begin]
"""
)


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("stream", [False, True], ids=["files", "stream"])
def test_a_merge_ends_although_the_hub_does_not_answer(account: Account, llamas, work, stream):
    account.put("a", llamas["a"])
    account.hub.faults.append(Fault("hang", rf"cdn/{account.name}/a/", first=2, seconds=60))
    code = LISTENING + (
        "begin = time.monotonic()\n"
        "call = lambda: hf_merge.merge([f'{org}/a'], 'm', method='linear', stream=stream,\n"
        "    on_progress=listener(lambda progress: len(heard) > 3))\n"
        "result = [*ended(call), len(heard), os.listdir('.')]"
    )
    is_same, seconds, calls, left = account.python(code, work=str(work), stream=stream)
    assert is_same and seconds < 30 and calls == 4 and left == []


@pytest.mark.parametrize(
    ("how", "xet"),
    [("folder", False), ("folder", True), ("merge", False), ("streamed", True), ("adapter", False), ("experts", False)],
    ids=lambda value: {False: "lfs", True: "xet"}.get(value, value),
)
def test_every_push_tells_of_its_bytes(account: Account, llamas, work, how):
    code = LISTENING + PUSH + "push(how, listener())\nresult = heard"
    heard = account.python(code, token=account.write, work=str(work), how=how, **named(llamas))
    stages = [stage for stage, *_ in heard]
    assert "uploading" in stages and stages == sorted(stages)  # merging comes before uploading
    rows = [row for stage, *row in heard if stage == "uploading"]
    assert rows[-1][1:3] == [rows[-1][2]] * 2 and rows[-1][3] == rows[-1][4] > 10_000
    assert all(before[3] <= after[3] for before, after in itertools.pairwise(rows))
    assert shown(pushed(account, "m"))


PUSH = """
def push(how, hear):
    merge = {"method": "linear", "max_shard_size": "20KB"}
    if how == "folder":
        return hf_merge.merge([a, b], "folder", **merge).push_to_hub(f"{org}/m", on_progress=hear)
    if how == "adapter":
        merge = {"method": "ties", "base_model": base, "output_format": "adapter", "rank": 4}
    if how == "experts":
        merge = {"method": "emr", "base_model": base}
    output = "m" if how == "merge" else None
    return hf_merge.merge([a, b], output, push_to_hub=f"{org}/m", on_progress=hear, **merge)
"""


def named(llamas) -> dict[str, str]:
    return {name: str(llamas[name]) for name in ("a", "b", "base")}


@pytest.mark.parametrize("how", ["folder", "merge", "streamed", "adapter"])
def test_a_push_that_is_ended_changes_nothing_and_ends_at_once(account: Account, llamas, work, how):
    """The Hub takes minutes for each file of weights, and the listener has had enough as soon as they go out."""
    code = LISTENING + PUSH + (
        "call = lambda: push(how, listener(lambda progress: progress.stage == 'uploading'))\n"
        "result = [*ended(call), sorted(os.listdir('.'))]"
    )  # fmt: skip
    fault = Fault("hang", "^/lfs/[0-9a-f]+$", method="PUT", first=2, seconds=300, over=threading.Event())
    account.hub.faults.append(fault)
    begin = time.monotonic()
    is_same, seconds, left = account.python(code, token=account.write, work=str(work), how=how, **named(llamas))
    fault.over.set()
    assert is_same and seconds < 120 and time.monotonic() - begin < 200
    assert left == {"folder": ["folder"], "merge": ["m"]}.get(how, [])
    assert not shown(pushed(account, "m")) if f"{account.name}/m" in account.hub.store.repos else how != "merge"


def test_an_upload_that_is_ended_reads_no_further(account: Account, llamas, work):
    """Shards that were not begun are not sent, although the process goes on."""
    code = LISTENING + (
        "made = hf_merge.merge([a, b], 'm', method='linear', max_shard_size='20KB')\n"
        "end = listener(lambda progress: progress.tensor.endswith('.safetensors'))\n"
        "result = ended(lambda: hf_merge.push_to_hub('m', f'{org}/m', on_progress=end))\ntime.sleep(2)"
    )  # fmt: skip
    account.hub.faults.append(Fault("hang", "^/lfs/[0-9a-f]+$", method="PUT", seconds=0.4))
    before = len(account.hub.log)
    is_same, _ = account.python(code, token=account.write, work=str(work), **named(llamas))
    assert is_same and len(uploads(account, before)) < 3 and not shown(pushed(account, "m"))
