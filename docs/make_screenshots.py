"""Takes the pictures of docs/trace.md from the pages as a browser shows them: ``python docs/make_screenshots.py``."""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "docs" / "images"
PICTURES = (("desktop", "light", "replay"), ("phone", "dark", "replay"), ("desktop", "light", "running"),
            ("desktop", "dark", "finished"), ("phone", "light", "running"))
SIZES = {"desktop": {"width": 900, "height": 780}, "phone": {"width": 390, "height": 780}}
PROMPT = "Tell me a story about Leo the owl and a map."


def main() -> None:
    from mlx_diffgemma.cli import app
    from tests.browser import Stub, opened, recorded

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page, lines = Path(folder, "trace.html"), Path(folder, "trace.jsonl")
        for path in (page, lines):
            app(["generate", "-p", PROMPT, "--seed", "7", "--trace", str(path)], standalone_mode=False)
        recording = lines.read_text(encoding="utf-8")
        stub = Stub()
        for size, scheme, what in PICTURES:
            with opened(playwright, Path(folder, f"{what}-{size}-{scheme}"), viewport=SIZES[size], color_scheme=scheme,
                        reduced_motion="reduce") as context:
                tab = context.new_page()
                if what == "replay":
                    tab.goto(page.as_uri())
                    for _ in range(7):
                        tab.keyboard.press("ArrowRight")
                else:
                    tab.goto(stub.url)
                    tab.wait_for_selector("#model:not([hidden])")
                    stub.pause, stub.answers = 0.01, [_held(recorded(recording), 11 if what == "running" else None)]
                    tab.fill("#message", PROMPT)
                    tab.keyboard.press("Enter")
                    tab.wait_for_selector(".live .positions .token" if what == "running" else ".foot")
                    tab.wait_for_timeout(600)
                tab.screenshot(path=FOLDER / f"{what}-{size}-{scheme}.png")
        stub.close()


def _held(events: list[str], cut: int | None) -> Iterator[str]:
    """The events up to ``cut``, and the rest when the picture is taken."""
    yield from events[:cut]
    if cut is not None:
        time.sleep(3)


if __name__ == "__main__":
    main()
