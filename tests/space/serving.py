"""The Space as a process of its own, started as its owner starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.hub.conftest import ROOT, clean_environment
from tests.hub.server import Hub

PATIENCE = 120  # seconds that an app may take to answer on a machine with much to do

FRONT = yaml.safe_load((ROOT / "space" / "README.md").read_text().split("---\n")[1])
SCOPES = " ".join(["openid", "profile", *FRONT["hf_oauth_scopes"]])  # the first two the Hub always grants
OWNER = "hf_of_the_owner"


@dataclass
class App:
    """A running app.

    Attributes:
        command: what was started.
        work: its folder: of jobs, of uploads, its HF_HOME; it survives a restart.
        environment: of the process.
    """

    command: Sequence[str]
    work: Path
    environment: dict[str, str]
    port: int = field(default_factory=lambda: _free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def jobs(self) -> Path:
        """The folder that its jobs are in."""
        return self.work / "jobs"

    @property
    def output(self) -> str:
        """What it has said so far."""
        return (self.work / "output.txt").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None, "the app is not running"
        return self.process.pid

    def start(self) -> App:
        """Start it, and wait until it answers."""
        own = {"GRADIO_SERVER_PORT": str(self.port), "GRADIO_SERVER_NAME": "127.0.0.1"}
        with open(self.work / "output.txt", "ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=self.work, env={**self.environment, **own}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while not _answers(f"{self.url}/config"):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(f"the app does not answer at {self.url}:\n{self.output[-6000:]}")
            time.sleep(0.1)
        return self

    def stop(self, sent: int = signal.SIGTERM) -> None:
        """End it and what it has started; SIGKILL is how a machine that fails ends it."""
        if self.process is None:
            return
        for each in (sent, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, each)
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                self.process.wait()
            break
        self.process = None

    def restart(self, sent: int = signal.SIGTERM) -> None:
        """End it, and start it again at the same address over the same folder."""
        self.stop(sent)
        self.start()


def app_of(hub: Hub | None, work: Path, command: Sequence[str] = (), **more: str) -> App:
    """Return an app that is not yet started.

    With a Hub it takes itself for a Space whose visitors sign in there, and whose owner has left it a token. Without
    one it is on the machine of a user without a network.
    """
    (work / "jobs").mkdir(parents=True, exist_ok=True)
    command = command or (sys.executable, str(ROOT / "space" / "app.py"))
    gradio = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False", "GRADIO_TEMP_DIR": str(work / "gradio")}
    own = {"HF_HOME": str(work / "home"), "HF_MERGE_SPACE_FOLDER": str(work / "jobs"), "PYTHONUNBUFFERED": "1"}
    there = {"HF_HUB_OFFLINE": "1"} if hub is None else _space(hub)
    return App(command, work, {**clean_environment(), **gradio, **own, **there, **more})


def _space(hub: Hub) -> dict[str, str]:
    """Return what the Hub sets in a Space; with SPACE_HOST, the way back from signing in would be https."""
    space = {"SYSTEM": "spaces", "SPACE_ID": "owner/space", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    return {**space, **hub.openid.environment(SCOPES), "HF_TOKEN": OWNER}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
