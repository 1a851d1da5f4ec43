"""The command `hf-merge space`: the page that people merge models on, served from this machine."""

import importlib.util
import os
import runpy
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path
from typing import Annotated

import click

from hf_merge import _compat
from hf_merge.errors import MergeError

Argument, Option, _ = _compat.cli_words()

EPILOG = "Examples\n  $ hf-merge space\n  $ hf-merge space --port 8000 --folder my_merges --open"
PORTS = range(7860, 7960)
EXTRA = ("gradio", "authlib", "mcp", "pandas", "psutil")


def space(
    host: Annotated[
        str, Option("--host", help="Who may come: 127.0.0.1 is this machine, 0.0.0.0 everybody who can reach it.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        Option("--port", click_type=click.IntRange(1, 65535), help="Default: the first that is free from 7860 on."),
    ] = None,
    folder: Annotated[str, Option("--folder", help="Where merges are kept while the page works.")] = "hf_merge_space",
    share: Annotated[
        bool, Option("--share", help="Ask Gradio for a public address; everybody may then merge.")
    ] = False,
    open_page: Annotated[bool, Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Merge models on a page in the browser, without writing code."""
    if missing := [name for name in EXTRA if not _is_there(name)]:
        raise MergeError(f'The page needs {", ".join(missing)}: pip install "hf-merge[space]".')
    said = os.environ.get("GRADIO_SERVER_PORT", "")
    port = _free_port(host, port or (int(said) if said.isdigit() else None))
    os.environ |= {
        "GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_MERGE_SPACE_FOLDER": str(Path(folder).expanduser().absolute()),
    }  # fmt: skip
    os.environ.pop("GRADIO_SHARE", None)
    if share:
        os.environ["GRADIO_SHARE"] = "True"
    if open_page:
        shown = "127.0.0.1" if host == "0.0.0.0" else host
        threading.Thread(target=_open_when_ready, args=(f"http://{shown}:{port}",), daemon=True).start()
    app = space_folder() / "app.py"
    sys.path.insert(0, str(app.parent))  # as the Hub starts it
    runpy.run_path(str(app), run_name="__main__")


def space_folder() -> Path:
    """Where the page is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "space"
    return inside if inside.is_dir() else package.parent / "space"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # its import was forbidden
        return False


def _free_port(host: str, wanted: int | None) -> int:
    """Return the port that is wanted, or the first that is free."""
    for port in (wanted,) if wanted else PORTS:
        try:
            with socket.create_server((host, port)):
                return port
        except OSError as error:  # taken, or no address of this machine
            if not wanted and port != PORTS[-1]:
                continue
            found = f"{host}:{port} cannot be listened at ({error.strerror or error})"
            raise MergeError(f"{found}: choose another with --port, or --host 127.0.0.1.") from None
    raise AssertionError("there are ports")


def _open_when_ready(url: str) -> None:
    """Wait until the page answers, a minute at most, and show it."""
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
        else:
            webbrowser.open(url)
            return
