"""What a rank of tests/test_ranks.py does: merges, one after the other, and notes what came of each.

python rank_script.py CASES FOLDER     in the folder that the models a, b and broken lie in
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

import hf_merge
from hf_merge import ranks
from hf_merge.writer import Writer

RANK = ranks.environment().rank
ranks.PATIENCE = 5.0
TIES = {"method": "dare_ties", "base_model": "base", "density": 0.5}


def several(folder):
    return hf_merge.merge(["a", "b"], folder / "several", max_shard_size="20KB", **TIES)


def single(folder):
    return hf_merge.merge(["b"], folder / "single", method="slerp", base_model="a", t=0.3)


def file(folder):
    return hf_merge.merge(["a", "b"], folder / "merged.safetensors", method="linear")


def modules(folder):
    return hf_merge.merge(["dense_a", "dense_b"], folder / "modules", method="linear")


def in_memory(folder):
    states = [load_file(f"{name}/model.safetensors") for name in "ab"]
    return hf_merge.merge(states, folder / "in_memory", method="linear", max_shard_size="50KB")


def empty(folder):
    """Fewer tensors than ranks, and one of no elements."""
    return hf_merge.merge(["few.safetensors"], folder / "empty", method="linear")


def first_pass(folder):
    """Numbers over the whole model, which every rank needs and each computes for itself."""
    words = {"method": "ties", "base_model": "base", "density": 0.3, "scope": "global", "consensus": "sum"}
    return hf_merge.merge(["a", "b"], folder / "first_pass", max_shard_size="20KB", **words)


def resumed(folder):
    return hf_merge.merge(["a", "b"], folder / "killed", method="linear", max_shard_size="20KB", resume=True)


def differing(folder):
    return hf_merge.merge(["a", "b"], folder / "differing", method="linear", seed=RANK)


def broken(folder):
    """The last tensor has a NaN, so that the last rank finds it."""
    slowly()
    return hf_merge.merge(["a", "broken"], folder / "broken", method="linear", max_shard_size="20KB")


def killed(folder):
    slowly(then=lambda: RANK == 1 and os.kill(os.getpid(), signal.SIGKILL))
    return hf_merge.merge(["a", "b"], folder / "killed", method="linear", max_shard_size="20KB")


def full(folder):
    slowly(then=lambda: RANK == 1 and os.truncate("/nowhere/full", 0))
    return hf_merge.merge(["a", "b"], folder / "full", method="linear", max_shard_size="20KB")


def slowly(then=lambda: None):
    """Let every write take a while, and something happen at the fifth."""
    write, written = Writer.write, []

    def slow(self, *words):
        written.append(words)
        if len(written) == 5:
            then()
        time.sleep(0.1)
        write(self, *words)

    Writer.write = slow


def main(names, folder):
    for name in names.split(","):
        write, begin = Writer.write, time.monotonic()
        try:
            came = {"path": str(globals()[name](Path(folder)).path)}
        except Exception as error:
            came = {"error": type(error).__name__, "text": str(error)}
        Writer.write = write
        came["seconds"] = time.monotonic() - begin
        Path(folder, f"{name}-{RANK}.json").write_text(json.dumps(came))
    sys.exit("error" in came)


if __name__ == "__main__":
    main(*sys.argv[1:])
