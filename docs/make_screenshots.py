"""Takes the pictures of docs/trace.md from the pages as a browser shows them: ``python
docs/make_screenshots.py``.

The chat page is that of a server which really runs, asked in a tab.
"""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "docs" / "images"
PICTURES = (
    ("desktop", "light", "replay"),
    ("phone", "dark", "replay"),
    ("desktop", "light", "running"),
    ("desktop", "dark", "finished"),
    ("phone", "light", "running"),
)
SIZES = {"desktop": {"width": 900, "height": 780}, "phone": {"width": 390, "height": 780}}
PROMPT, SEED, STEP = "Tell me a story about Leo the owl and a map.", "7", 8


def main() -> None:
    from mlx_diffgemma.cli.app import app
    from tests.browser import opened
    from tests.serving.process import serving

    FOLDER.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        serving() as (url, _),
    ):
        page = Path(folder, "trace.html")
        app(["generate", "-p", PROMPT, "--seed", SEED, "--trace", str(page)], standalone_mode=False)
        for size, scheme, what in PICTURES:
            with opened(
                playwright,
                Path(folder, f"{what}-{size}-{scheme}"),
                viewport=SIZES[size],
                color_scheme=scheme,
                reduced_motion="reduce",
            ) as context:
                tab = context.new_page()
                if what == "replay":
                    tab.goto(page.as_uri())
                    for _ in range(STEP - 1):
                        tab.keyboard.press("ArrowRight")
                else:
                    tab.goto(url)
                    tab.wait_for_selector("#model:not([hidden])")
                    tab.get_by_role("button", name="Settings").click()
                    tab.get_by_label("Seed").fill(SEED)
                    tab.get_by_role("button", name="Done").click()
                    tab.fill("#message", PROMPT)
                    tab.keyboard.press("Enter")
                    if what == "running":
                        tab.locator(".live").get_by_text(f"{STEP} of").wait_for()
                    else:
                        tab.locator(".foot").wait_for()
                tab.screenshot(path=FOLDER / f"{what}-{size}-{scheme}.png")


if __name__ == "__main__":
    main()
