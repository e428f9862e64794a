"""Write the pictures of docs/console.md: pages of a running fleet in the distribution's Chromium.

Run ``python -m scripts.console_screenshots`` in a checkout, with its .venv. The fleet is that of
the tests, with the default model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

from playwright.sync_api import Browser, Page

from fleet.bundles.manifest import Bundle
from fleet.operator_api.operation import OperatorRole
from onnx_export.bundle import export_bundle
from onnx_export.config import ExportConfig
from onnx_export.default_bundle import default_bundle
from tests.console.browser import WAIT_MS, Scheme, Visitor, running_browser
from tests.console.running_fleet import KITCHEN, RunningFleet, running_fleet
from tests.tiny import make_tiny_checkpoint

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
QUALITY: Final = 80
PROMPT: Final = "Why is the sky blue? Answer in two sentences."


def main() -> None:
    """Start the fleet and a browser, and write each picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = Bundle.load(default_bundle(print))
        with (
            running_fleet(folder, bundle, small_bundle(folder)) as fleet,
            running_browser() as browser,
        ):
            fleet.registry.operators.add("ada", OperatorRole.ADMIN)
            write(browser, fleet, "/", "overview")
            write(browser, fleet, f"/devices/{KITCHEN}", "device", scheme="dark")
            write(browser, fleet, "/playground", "playground")
            write(browser, fleet, "/rollouts/1", "phone", scheme="dark", width=390)


def small_bundle(folder: Path) -> Bundle:
    """Return the bundle that is being rolled out, which no device installs."""
    checkpoint = make_tiny_checkpoint(folder / "small")
    out = folder / "bundle"
    export_bundle(ExportConfig(out=out, exits=(1, 2), model=str(checkpoint), exit_head="shared"))
    return Bundle.load(out)


def write(
    browser: Browser,
    fleet: RunningFleet,
    path: str,
    name: str,
    *,
    scheme: Scheme = "light",
    width: int = 1280,
) -> None:
    """Write the picture of a page."""
    visitor = Visitor(browser, fleet.url, scheme=scheme, width=width)
    for cookie, value in fleet.client_of("ada").cookies.items():
        visitor.context.add_cookies([{"name": cookie, "value": value, "url": fleet.url}])
    visitor.page.goto(path)
    if path == "/playground":
        answer(visitor.page)
    file = DOCS / f"console-{name}.jpg"
    visitor.page.screenshot(path=file, type="jpeg", quality=QUALITY)
    visitor.close()
    print(f"{file.name}: {file.stat().st_size:,} bytes")


def answer(page: Page) -> None:
    """Have a prompt answered, and move to a token."""
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Device").fill(KITCHEN)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The answer is complete").wait_for(timeout=WAIT_MS)
    page.locator(".glass-text").focus()
    page.keyboard.press("End")
    page.locator(".glass-answer").scroll_into_view_if_needed()


if __name__ == "__main__":
    main()
