"""Jobs belong to the server: they queue, end, are found again, and leave nothing behind."""

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
from jobs import UNFINISHED, Job, JobRefused, Jobs
from safetensors.torch import load_file

import hf_merge
from tests.space.interrupted import OWNER, TOKEN

ANN, BOB = "ann's browser has this secret", "bob's browser has this secret"
RUN_AGAIN = Path(__file__).with_name("interrupted.py")


@pytest.fixture
def made(tmp_path):
    """Makes servers, and stops them."""
    servers = []

    def make(**options) -> Jobs:
        servers.append(Jobs(tmp_path / "jobs", **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


class Gate:
    """Work that waits until it may go on, and asks meanwhile whether it should."""

    def __init__(self):
        self.open, self.began = threading.Event(), threading.Event()

    def __call__(self, job):
        self.began.set()
        (job.work / "half").write_bytes(b"half")
        while not self.open.wait(0.01):
            job.enter("waiting")
        return {}


def left(server: Jobs) -> set[str]:
    return {path.name for path in server.folder.iterdir() if path.is_dir() and (path / "work").exists()}


def until(condition, seconds=30.0):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds
        time.sleep(0.01)


def ended(job: Job, seconds=30.0) -> str:
    until(lambda: job.state not in UNFINISHED, seconds)
    return job.state


def test_a_real_merge_is_done_and_its_owner_finds_it(made, llamas):
    server, seen = made(), []

    def work(job):
        def tell(progress):
            job.report(progress)
            seen.append(job.to_dict())

        models = [llamas["a"], llamas["b"]]
        merged = hf_merge.merge(models, job.work / "m", method="linear", cache_dir=job.cache, on_progress=tell)
        job.enter("analysing")
        seen.append(job.to_dict())
        return {"folder": str(merged.path)}

    job = server.submit(ANN, {"merge_method": "linear"}, 1000, work, layers=2)
    assert ended(job, 60) == "done" and load_file(Path(job.result["folder"]) / "model.safetensors")
    merging = [view for view in seen if view["stage"] == "merging"]
    assert merging[0]["bytes"] == 0 and merging[-1]["bytes"] == merging[-1]["all_bytes"] > 0
    assert merging[-1]["tensors"] == merging[-1]["all_tensors"] and merging[-1]["tensor"]
    assert {view["state"] for view in seen} == {"running"} and seen[-1]["stage"] == "analysing"
    json.dumps(seen)


def test_twenty_wait_in_their_order_and_nobody_sees_those_of_others(made):
    server, order, gate = made(per_owner=11), [], Gate()
    first = server.submit(ANN, {}, 0, gate)
    assert gate.began.wait(10)
    waiting = [
        server.submit([ANN, BOB][i % 2], {"n": i}, 0, lambda job: order.append(job.recipe["n"])) for i in range(20)
    ]
    assert [job.place for job in waiting] == [*range(1, 21)] and {job.state for job in waiting} == {"queued"}
    for i, job in enumerate(waiting):
        other = [ANN, BOB][1 - i % 2]
        assert server.get(other, job.id) is None and not server.cancel(other, job.id)
    assert {job.id for job in server.of(BOB)} == {job.id for job in waiting[1::2]}
    assert not server.of("nobody's secret at all") and server.get(ANN, "../../etc") is None
    assert server.cancel(BOB, waiting[3].id) and waiting[4].place == 4
    gate.open.set()
    for job in (first, *waiting):
        ended(job)
    assert order == [i for i in range(20) if i != 3] and waiting[3].state == "cancelled"


def test_too_many_are_refused(made):
    server, gate = made(per_owner=2, max_queued=4), Gate()
    server.submit(ANN, {}, 0, gate)
    server.submit(ANN, {}, 0, gate)
    with pytest.raises(JobRefused, match="2 merges"):
        server.submit(ANN, {}, 0, gate)
    server.submit(BOB, {}, 0, gate)
    server.submit("a third browser, with a secret", {}, 0, gate)
    with pytest.raises(JobRefused, match="4 merges are waiting"):
        server.submit("a fourth browser, with a secret", {}, 0, gate)
    gate.open.set()


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_merge_that_is_cancelled_ends_soon_and_leaves_nothing(made, llamas, kind):
    server, first = made(), threading.Event()
    said = {"model": {}, "adapter": {"base_model": llamas["base"], "output_format": "adapter", "rank": 2}}[kind]

    def work(job):
        def tell(progress):
            job.report(progress)
            if progress.tensors >= 3:
                first.set()
                until(lambda: job.stopping)

        method = "linear" if kind == "model" else "ties"
        hf_merge.merge([llamas["a"], llamas["b"]], job.work / "m", method=method, on_progress=tell, **said)

    job = server.submit(ANN, {}, 0, work)
    assert first.wait(60) and server.cancel(ANN, job.id) and ended(job) == "cancelled"
    assert left(server) == set() and not server.cancel(ANN, job.id)


@pytest.mark.parametrize(
    "error", [hf_merge.PlanError(f"They do not fit {TOKEN}."), RuntimeError(TOKEN), SystemExit(3)],
    ids=["ours", "other", "exit"],
)  # fmt: skip
def test_a_failure_is_told_without_secrets_and_the_next_one_runs(made, error, caplog):
    server = made()

    def fail(job):
        (job.work / "half").touch()
        raise error

    with caplog.at_level(logging.INFO):
        job = server.submit(ANN, {}, 0, fail)
        after = server.submit(ANN, {}, 0, lambda job: {})
        assert ended(job) == "failed" and ended(after) == "done"
    assert job.id not in left(server)
    assert ("do not fit <token>" if isinstance(error, hf_merge.MergeError) else "unforeseen") in job.message
    everything = json.dumps(job.to_dict()) + (job.folder / "job.json").read_text()
    assert TOKEN not in everything and ANN not in everything


def test_the_token_is_let_go_when_the_job_ends(made):
    server, gate = made(per_owner=3), Gate()

    class Secret(str):
        pass

    def submit(work_ends):
        token = Secret(TOKEN)

        def work(job):
            work_ends(job)
            assert token

        return server.submit(ANN, {}, 0, work), weakref.ref(token)

    def fail(job):
        raise RuntimeError("no")

    first, one = submit(gate)
    second, two = submit(fail)
    third, three = submit(gate)
    assert gate.began.wait(10) and one() is not None and two() is not None and three() is not None
    server.cancel(ANN, third.id)
    server.cancel(ANN, first.id)
    assert {ended(first), ended(second), ended(third)} == {"cancelled", "failed"}
    until(lambda: (gc.collect(), one() is two() is three() is None)[1])


Usage = namedtuple("Usage", "total used free")


def test_what_does_not_fit_is_refused_with_both_numbers_and_caches_of_what_is_done_make_room(made, monkeypatch):
    free = [10_000_000_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 50, 0, free[0]))
    server, gate = made(slots=2, per_owner=5), Gate()
    with pytest.raises(JobRefused, match=r"takes 20\.0 GB of disk, and 10\.0 GB are free"):
        server.submit(ANN, {}, 20_000_000_000, gate)

    def cached(job):
        job.cache.mkdir()

    done = server.submit(ANN, {}, 0, cached)
    assert ended(done) == "done" and done.cache.exists()
    first = server.submit(ANN, {}, 6_000_000_000, gate)
    assert gate.began.wait(10) and server.free() == 4_000_000_000
    second = server.submit(ANN, {}, 5_000_000_000, lambda job: {})
    assert ended(second) == "failed" and "5.0 GB of disk, and 4.0 GB are free" in second.message
    assert not done.cache.exists() and done.work.exists()
    gate.open.set()
    assert ended(first) == "done" and server.free() == free[0]


def test_results_are_swept_when_they_are_old_and_orphans_at_once(made):
    server = made(keep=3600)
    job = server.submit(ANN, {}, 0, lambda job: {})
    assert ended(job) == "done"
    (server.folder / "orphan" / "work").mkdir(parents=True)
    server.sweep()
    assert left(server) == {job.id} and server.get(ANN, job.id) is job
    server.keep = -1
    server.sweep()
    assert left(server) == set() and server.get(ANN, job.id) is None


@pytest.mark.e2e
def test_after_a_crash_results_are_there_and_what_ran_is_lost(tmp_path):
    folder = tmp_path / "jobs"
    path = os.pathsep.join([str(RUN_AGAIN.parents[2] / "space"), str(RUN_AGAIN.parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, str(RUN_AGAIN), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    done, running, queued = process.stdout.readline().split()
    with pytest.raises(JobRefused, match="Another server"):
        Jobs(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (folder / running / "cache" / "private").exists()
    text = "".join(file.read_text() for file in folder.glob("*/job.json"))
    assert text and TOKEN not in text and OWNER not in text
    server = Jobs(folder)
    try:
        found = {name: server.get(OWNER, name) for name in (done, running, queued)}
        assert [found[name].state for name in (done, running, queued)] == ["done", "lost", "lost"]
        assert "restarted" in found[running].message and not found[running].cache.exists()
        assert left(server) == {done} and (found[done].work / "model.safetensors").read_bytes() == b"weights"
        assert server.get(ANN, done) is None
        assert ended(server.submit(OWNER, {}, 0, lambda job: {})) == "done"
    finally:
        server.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "../../x"}', "3"])
def test_a_record_that_cannot_be_read_stops_no_server(tmp_path, text):
    (tmp_path / "jobs" / "x").mkdir(parents=True)
    (tmp_path / "jobs" / "x" / "job.json").write_text(text)
    server = Jobs(tmp_path / "jobs")
    assert ended(server.submit(ANN, {}, 0, lambda job: {})) == "done" and not (tmp_path / "jobs" / "x").exists()
    server.close()


def test_many_threads_at_once(made):
    """Visitors submit, look and cancel while jobs run; every job ends, and nothing is left of those that were ended."""
    server, failures = made(slots=3, per_owner=100, max_queued=200), []

    def visit(owner):
        try:
            for i in range(10):
                job = server.submit(owner, {}, 1000, lambda job: (job.enter("a"), time.sleep(0.002), job.enter("b")))
                if i % 3 == 0:
                    server.cancel(owner, job.id)
                server.of(owner)
                server.sweep()
        except BaseException as error:
            failures.append(error)

    owners = [f"browser {i} with a secret" for i in range(6)]
    threads = [threading.Thread(target=visit, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    everything = [job for owner in owners for job in server.of(owner)]
    assert not failures and len(everything) == 60
    assert {ended(job) for job in everything} <= {"done", "cancelled"}
    assert left(server) == {job.id for job in everything if job.state == "done"}
