"""A server that is killed in the middle: run as `python interrupted.py FOLDER` with the Space on the path.

It finishes one job, begins another, queues a third, says so and waits.
"""

import sys
import time
from pathlib import Path

from jobs import Jobs

OWNER = "the secret of a browser"
TOKEN = "hf_abcdefghijklmnop1234"


def quick(job):
    (job.work / "model.safetensors").write_bytes(b"weights")
    return {"folder": str(job.work)}


def endless(job, token=TOKEN):
    job.cache.mkdir()
    (job.cache / "private").write_bytes(b"private")
    while token:
        time.sleep(0.05)


if __name__ == "__main__":
    jobs = Jobs(Path(sys.argv[1]), per_owner=5)
    done = jobs.submit(OWNER, {"n": 0}, 0, quick)
    while done.state != "done":
        time.sleep(0.01)
    running = jobs.submit(OWNER, {"n": 1}, 0, endless)
    queued = jobs.submit(OWNER, {"n": 2}, 0, quick)
    while not (running.cache / "private").exists():
        time.sleep(0.01)
    print(done.id, running.id, queued.id, flush=True)
    time.sleep(600)
