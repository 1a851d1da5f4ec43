"""Jobs of a Hub that runs none: what was asked for is kept, and the answers are those of jobs that go well.

A script from this machine reaches a job through a bucket, and a bucket keeps its files in Xet storage.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub.store import DATE, HubError, Job, require_write

if TYPE_CHECKING:
    from tests.hub.server import Hub

Endpoint = Callable[[Request], Awaitable[Response]]

# Name, CPU, memory, accelerator, its memory, millionths of a dollar for a minute; prices as of no certain day.
MACHINES = [
    ("cpu-basic", "2 vCPU", "16 GB", None, "", 167),
    ("cpu-upgrade", "8 vCPU", "32 GB", None, "", 500),
    ("t4-small", "4 vCPU", "15 GB", "T4", "16 GB", 6667),
    ("l4x1", "8 vCPU", "30 GB", "L4", "24 GB", 13333),
    ("a10g-large", "12 vCPU", "46 GB", "A10G", "24 GB", 25000),
    ("a100-large", "12 vCPU", "142 GB", "A100", "80 GB", 41667),
    ("h200", "23 vCPU", "256 GB", "H200", "141 GB", 83333),
]


@dataclass(frozen=True)
class Jobs:
    """The endpoints of jobs, and those of buckets that jobs need."""

    hub: Hub

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        bucket = "/api/buckets/{ns}/{name}"
        return [
            ("GET", "/api/jobs/hardware", self.hardware),
            ("GET", "/api/jobs/{ns}", self.all),
            ("POST", "/api/jobs/{ns}", self.run),
            ("GET", "/api/jobs/{ns}/{job}", self.inspect),
            ("GET", "/api/jobs/{ns}/{job}/logs", self.logs),
            ("POST", "/api/jobs/{ns}/{job}/cancel", self.cancel),
            ("POST", bucket, self.create_bucket),
            ("GET", f"{bucket}/xet-write-token", self.bucket_token),
            ("POST", f"{bucket}/batch", self.change_bucket),
        ]

    async def hardware(self, _: Request) -> Response:
        return JSONResponse([_machine(*machine) for machine in MACHINES])

    async def all(self, request: Request) -> Response:
        namespace = self._namespace(request)
        jobs = [_told(job) for job in self.hub.store.jobs.values() if job.namespace == namespace]
        return self.hub.page(request, jobs)

    async def run(self, request: Request) -> Response:
        namespace, spec, switches = self._namespace(request), await request.json(), self.hub.switches
        if spec["flavor"] not in [name for name, *_ in MACHINES]:
            raise HubError(400, "", f"Invalid flavor: {spec['flavor']}")
        made = Job(f"{len(self.hub.store.jobs):024x}", namespace, spec, [*switches.job_stages], [*switches.job_logs])
        self.hub.store.jobs[made.id] = made
        return JSONResponse(_told(made))

    async def inspect(self, request: Request) -> Response:
        job = self._job(request)
        told = _told(job)
        if len(job.stages) > 1:
            job.stages.pop(0)
        return JSONResponse(told)

    async def logs(self, request: Request) -> Response:
        """Send the lines as events; the last `tail` of them if so asked."""
        lines = self._job(request).logs
        tail = lines[-int(request.query_params.get("tail", len(lines))) :]
        events = [{"data": line, "timestamp": DATE} for line in ("===== Job started =====", *tail)]
        return Response("".join(f"data: {json.dumps(event)}\n\n" for event in events), 200, None, "text/event-stream")

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        job.stages = ["CANCELED"]
        return JSONResponse(_told(job))

    async def create_bucket(self, request: Request) -> Response:
        bucket = f"{self._namespace(request)}/{request.path_params['name']}"
        status = 409 if bucket in self.hub.store.buckets else 200
        self.hub.store.buckets.setdefault(bucket, {})
        return JSONResponse({"url": f"{self.hub.url}/buckets/{bucket}"}, status)

    async def bucket_token(self, request: Request) -> Response:
        self._bucket(request)
        return self.hub.xet_token(self.hub.xet.writable())

    async def change_bucket(self, request: Request) -> Response:
        files = self._bucket(request)
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        sent = self.hub.xet.sent(line["xetHash"] for line in lines if line["type"] == "addFile")
        for line in lines:
            if line["type"] == "deleteFile":
                files.pop(line["path"], None)
            elif line["xetHash"] not in sent:
                raise HubError(400, "", f"no such object: {line['path']}")
            else:
                files[line["path"]] = sent[line["xetHash"]]
        return JSONResponse({"failed": []})

    def _namespace(self, request: Request) -> str:
        """Return the namespace of a path; only who may write there may ask."""
        namespace = request.path_params["ns"]
        if require_write(namespace, self.hub.token(request)).app is not None:
            raise HubError(403, "", "The app may not run jobs for its user")
        return namespace

    def _job(self, request: Request) -> Job:
        namespace, found = self._namespace(request), self.hub.store.jobs.get(request.path_params["job"])
        if found is None or found.namespace != namespace:
            raise HubError(404, "", "Job not found")
        return found

    def _bucket(self, request: Request) -> dict[str, bytes]:
        bucket = f"{self._namespace(request)}/{request.path_params['name']}"
        if bucket not in self.hub.store.buckets:
            raise HubError(404, "RepoNotFound", "Bucket not found")
        return self.hub.store.buckets[bucket]


def _machine(name: str, cpu: str, ram: str, gpu: str | None, vram: str, price: int) -> dict[str, Any]:
    """Say what a machine is and costs."""
    chip = {"type": "gpu", "model": gpu, "quantity": "1", "vram": vram, "manufacturer": "Nvidia"}
    return {
        "name": name, "prettyName": name, "cpu": cpu, "ram": ram, "ephemeralStorage": "50 GB",
        "accelerator": chip if gpu else None,
        "unitCostMicroUSD": price, "unitCostUSD": price / 1e6, "unitLabel": "minute",
    }  # fmt: skip


def _told(job: Job) -> dict[str, Any]:
    """Say what a job is; of its secrets only the names."""
    kept = ("command", "arguments", "environment", "flavor", "labels", "volumes", "dockerImage", "spaceId")
    owner = {"id": job.namespace, "name": job.namespace, "type": "user"}
    return {
        "id": job.id, "createdAt": DATE, "owner": owner, "initiator": owner,
        "secrets": dict.fromkeys(job.spec.get("secrets", {}), ""), "status": {"stage": job.stages[0], "message": None},
        **{key: job.spec[key] for key in kept if key in job.spec},
    }  # fmt: skip
