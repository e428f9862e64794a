"""The console behind a proxy that cuts its connections in the midst of an answer."""

from __future__ import annotations

from playwright.sync_api import Browser, expect

from benchmarks.proxy import Proxy, Shape
from fleet.operator_api.operation import OperatorRole
from tests.console.browser import WAIT_MS, Visitor
from tests.console.running_fleet import KITCHEN, RunningFleet

SLOW = Shape(bytes_per_s=2_000, piece_bytes=256)
"""Slower than an answer, so that the connection is cut before its end."""


def test_an_answer_whose_stream_is_cut_says_so_and_the_next_one_is_whole(
    browser: Browser, fleet: RunningFleet
) -> None:
    with Proxy(fleet.port) as proxy:
        visitor = Visitor(browser, f"http://127.0.0.1:{proxy.port}")
        for name, value in fleet.client_of(OperatorRole.OPERATOR).cookies.items():
            cookie = {"name": name, "value": value, "url": visitor.origin}
            visitor.context.add_cookies([cookie])  # type: ignore[list-item]
        page = visitor.page
        page.goto("/playground")
        page.get_by_label("Prompt").fill("How warm is it?")
        page.get_by_label("Device").fill(KITCHEN)
        status = page.get_by_role("status").first
        proxy.shape(Shape(), SLOW)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".glass-text .glass-token").nth(1)).to_be_attached(timeout=WAIT_MS)
        proxy.reset()
        expect(page.get_by_role("button", name="Send")).to_be_enabled(timeout=WAIT_MS)
        assert "complete" not in status.inner_text()
        assert status.inner_text()
        proxy.heal()
        proxy.shape(Shape())
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_text("The answer is complete")).to_be_visible(timeout=WAIT_MS)
        visitor.check(expected=["ERR_"])
        visitor.close()
