"""Take the pictures of the page for the documentation: `python -m tests.space.pictures [FOLDER [APP]]`.

Every step, on a desktop and on a phone, light and dark, with the worked example merged and tried. APP is the app.py
that is started: names of folders are in the pictures.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.space.browsing import FLAGS, executable
from tests.space.serving import ROOT, app_of

FOLDER = ROOT / "docs" / "pictures" / "space"
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
SCHEMES = ("light", "dark")
STEPS = ("models", "fit", "how", "recipe", "merge", "result", "publish")
COLOURS = 128


def take(folder: Path, command: tuple[str, ...]) -> Iterator[Path]:
    """Take the pictures, and yield each when it is there."""
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        app = app_of(None, Path(work), command).start()
        chromium = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        try:
            for device, size in SIZES.items():
                for scheme in SCHEMES:
                    context = chromium.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
                    page = context.new_page()
                    page.goto(app.url)
                    yield from (_saved(shot, folder / f"{step}-{device}-{scheme}.png") for step, shot in _steps(page))
                    context.close()
        finally:
            chromium.close()
            app.stop()


def _steps(page: Any) -> Iterator[tuple[str, bytes]]:
    """Go through the page; yield each step with its picture."""
    from playwright.sync_api import expect

    expect(page.locator("#verdict")).to_contain_text("fit", timeout=60_000)
    yield "page", page.screenshot()
    page.locator("#merge").click()
    expect(page.locator("#result")).to_be_visible(timeout=60_000)
    page.locator("#try").click()
    expect(page.locator("#answers article")).to_have_count(3, timeout=120_000)
    page.wait_for_timeout(1000)  # plots are drawn
    for step in STEPS:
        yield step, page.locator(f"#step-{step}").first.screenshot()


def _saved(shot: bytes, file: Path) -> Path:
    """Write a picture in few colours, which are enough for text and plain areas."""
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLOURS).save(file, optimize=True)
    return file


if __name__ == "__main__":
    words = sys.argv[1:]
    for written in take(Path(words[0]) if words else FOLDER, (sys.executable, words[1]) if words[1:] else ()):
        print(written)
