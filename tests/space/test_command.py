"""`hf-merge space`, as it is called."""

import socket
import subprocess
import sys

import pytest

from tests.hub.conftest import clean_environment, error_line

FORBIDDEN = "import sys; sys.modules['gradio'] = None; from hf_merge.cli import main; main()"


def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
    call, environment = [sys.executable, *map(str, words)], {**clean_environment(), **more}
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment, check=False)


def test_without_gradio_it_says_what_to_install():
    done = run("-c", FORBIDDEN, "space")
    assert done.returncode == 1
    assert error_line(done.stderr) == 'Error: The page needs gradio: pip install "hf-merge[space]".'


def test_a_port_that_is_taken_is_told_before_anything_starts():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("-m", "hf_merge.cli", "space", "--port", port)
    assert done.returncode == 1 and f"127.0.0.1:{port} cannot be listened at" in error_line(done.stderr)
    assert "--port" in done.stderr


def test_a_size_that_is_none_is_told(tmp_path):
    done = run("-m", "hf_merge.cli", "space", "--folder", tmp_path / "jobs", HF_MERGE_SPACE_DISK="plenty")
    assert done.returncode == 1
    assert error_line(done.stderr) == "Error: HF_MERGE_SPACE_DISK should be a size such as 20GB; found 'plenty'."


@pytest.mark.e2e
def test_it_serves_the_page_without_a_network(local_app, page):
    """`local_app` is `hf-merge space --folder ..`."""
    page.goto(local_app.url)
    page.get_by_role("heading", level=1).first.wait_for()
    assert local_app.jobs.is_dir() and "Traceback" not in local_app.output
