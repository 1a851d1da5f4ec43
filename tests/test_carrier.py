"""The writer's carrier: whatever the files and however many the workers, two files at most, no deadlock, no hang."""

import random
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hf_merge
from hf_merge import uploads
from hf_merge.execute import execute
from hf_merge.writer import CARRIED, Writer, partial_folder


class Destination:
    """A repository that takes its time, and counts the files beside it whenever one is sent."""

    repo_id, files = "me/m", {}

    def __init__(self, folder, send=None):
        self.folder, self.most, self.sent, self.committed = folder, 0, [], None
        self._send = send or (lambda name: time.sleep(random.random() / 200))

    def in_words(self):
        return nullcontext()

    def send(self, additions, forget=False):
        (addition,) = additions
        self._send(addition.path_in_repo)
        found = [path for path in self.folder.rglob("*.safetensors*") if path.suffix != ".json"]
        self.most = max(self.most, len(found))
        self.sent.append(addition.path_in_repo)
        assert addition.upload_info.sha256
        addition.path_or_fileobj = b""

    def commit(self, additions, carried, card, recipe):
        self.committed = {*additions, *carried}
        return SimpleNamespace(oid="1" * 40)


def plan_of(seed: int):
    """Return a plan of tensors that lie in files as it comes, some in folders, and its models."""
    pick = random.Random(seed)
    states = [{f"t{i}": torch.randn(pick.choice([1, 7, 50])) for i in range(40)} for _ in range(1)]
    states.append({name: tensor + 1 for name, tensor in states[0].items()})
    plan = hf_merge.plan(states, method="linear")
    names = list(plan.specs)
    pick.shuffle(names)
    count = pick.choice([1, 3, 12, 40])
    files = {f"{'2_Dense/' if i % 3 else ''}model-{i}.safetensors": tuple(names[i::count]) for i in range(count)}
    return replace(plan, shards=files), states


def run(tmp_path, plan, states, destination, *, workers=1, write=None, resume=False):
    carrier = uploads.Uploads(destination, recipe="")
    with Writer(tmp_path / "m", plan, fingerprint="f", metadata={}, carrier=carrier, resume=resume) as writer:
        write = write or (lambda name, start, values: writer.write(name, start, values))
        execute(plan, states, write, workers=workers, skip=writer.is_finished, stopped=writer.stop)
        (writer.folder / "README.md").write_text("a card")
    return carrier


@pytest.mark.parametrize("seed", range(12))
def test_any_layout_is_carried_with_two_files_at_a_time(tmp_path, seed):
    plan, states = plan_of(seed)
    destination = Destination(partial_folder(tmp_path / "m"))
    done = threading.Thread(
        target=run, args=(tmp_path, plan, states, destination), kwargs={"workers": 1 + seed % 8}, daemon=True
    )
    done.start()
    done.join(timeout=60)
    assert not done.is_alive(), "the workers wait for one another"
    assert destination.most <= uploads.AT_ONCE and sorted(destination.sent) == sorted(plan.shards)
    index = {"model.safetensors.index.json"} if sum("/" not in file for file in plan.shards) > 1 else set()
    assert destination.committed == {*plan.shards, uploads.RECIPE_FILE} | index and not list(tmp_path.iterdir())


def test_an_error_ends_the_wait_for_an_upload_that_does_not_end(tmp_path):
    plan, states = plan_of(2)
    assert len(plan.shards) > 4
    never = threading.Event()
    destination = Destination(partial_folder(tmp_path / "m"), send=lambda name: never.wait(20))
    bad = {name: tensor.clone() for name, tensor in states[1].items()}
    bad[list(plan.shards.values())[1][0]][0] = float("nan")
    start = time.perf_counter()
    with pytest.raises(hf_merge.ComputeError):
        run(tmp_path, plan, [states[0], bad], destination, workers=4)
    assert time.perf_counter() - start < 10 and destination.committed is None
    never.set()


def test_an_upload_that_fails_ends_the_merge_and_the_next_run_takes_over_what_was_sent(tmp_path):
    plan, states = plan_of(3)
    fails = list(plan.shards)[5]

    def send(name):
        if name == fails:
            raise hf_merge.PublishError("no")

    folder = partial_folder(tmp_path / "m")
    first = Destination(folder, send)
    with pytest.raises(hf_merge.PublishError, match="no"):
        run(tmp_path, plan, states, first, workers=3)
    assert first.sent and uploads.noted(folder, "me/m").keys() == {*first.sent} and (folder / CARRIED).is_file()
    assert not uploads.noted(folder, "me/other")
    second = Destination(folder)
    carrier = run(tmp_path, plan, states, second, workers=3, resume=True)
    assert sorted([*first.sent, *second.sent]) == sorted(plan.shards) and carrier.info.oid
    assert {*plan.shards} <= second.committed and second.most <= 2 and not list(tmp_path.iterdir())


def test_files_run_in_order_so_that_few_are_begun(tmp_path):
    plan, _ = plan_of(2)
    places = [file for step in plan.by_file for file, names in plan.shards.items() if step.name in names]
    assert places == sorted(places, key=list(plan.shards).index) and len(places) == len(plan.steps)
