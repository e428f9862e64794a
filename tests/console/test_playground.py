"""An answer in the playground: seen as it comes, in each look, by keyboard, and compared."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, expect

from fleet.operator_api.operation import OperatorRole
from tests.console.browser import (
    LOOKS,
    WAIT_MS,
    Scheme,
    Visitor,
    is_wider_than_window,
    serious_flaws,
)
from tests.console.running_fleet import KITCHEN, RunningFleet

PROMPT = "How <b>warm</b> is it?"


@pytest.fixture
def visitor(browser: Browser, fleet: RunningFleet) -> Iterator[Visitor]:
    visitor = Visitor(browser, fleet.url)
    open_playground(visitor, fleet)
    yield visitor
    visitor.close()


def open_playground(visitor: Visitor, fleet: RunningFleet) -> None:
    for name, value in fleet.client_of(OperatorRole.OPERATOR).cookies.items():
        visitor.context.add_cookies([{"name": name, "value": value, "url": fleet.url}])
    visitor.page.goto("/playground")


def send(visitor: Visitor, num_tokens: int = 8, mode: str = "verified", other: str = "") -> None:
    page = visitor.page
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Device").fill(KITCHEN)
    page.get_by_label("Mode").select_option(mode)
    if other:
        page.get_by_label("Compare with").select_option(other)
    page.get_by_label("At most, tokens").fill(str(num_tokens))
    page.get_by_role("button", name="Send").click()


def answers(visitor: Visitor) -> Locator:
    return visitor.page.locator(".glass-answer")


def await_end(visitor: Visitor) -> None:
    status = visitor.page.locator("#glass-status")
    expect(status).to_contain_text("The answer is complete", timeout=WAIT_MS)


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_an_answer_is_sound_in_each_look(
    browser: Browser, fleet: RunningFleet, scheme: Scheme, width: int
) -> None:
    visitor = Visitor(browser, fleet.url, scheme=scheme, width=width)
    open_playground(visitor, fleet)
    send(visitor, other="collaborative")
    await_end(visitor)
    for summary in visitor.page.locator("summary").all():
        summary.click()
    assert serious_flaws(visitor.page) == []
    assert not is_wider_than_window(visitor.page)
    assert answers(visitor).count() == 2
    visitor.check()
    visitor.close()


def test_tokens_and_totals_equal_the_answer(visitor: Visitor) -> None:
    send(visitor)
    await_end(visitor)
    answer = answers(visitor).first
    tokens = answer.locator(".glass-text .glass-token")
    rows = answer.locator("details").nth(1).locator("tbody tr")
    totals = answer.locator(".glass-totals")
    expect(totals).to_contain_text(f"Tokens{tokens.count()}")
    assert rows.count() == tokens.count() > 0
    trips = answer.locator("details").first.locator("tbody tr").count()
    expect(totals).to_contain_text(f"Round trips{trips}")
    for token in tokens.all():
        assert re.search("is-(accepted|corrected)", token.get_attribute("class") or "")
    assert answer.locator("svg rect.step").count()
    assert answer.locator("svg rect.trip").count() == trips


def test_the_keyboard_shows_the_facts_of_a_token(visitor: Visitor) -> None:
    send(visitor)
    await_end(visitor)
    answer = answers(visitor).first
    answer.locator(".glass-text").focus()
    visitor.page.keyboard.press("End")
    expect(answer.locator(".glass-facts")).to_contain_text("log-probability")
    expect(answer.locator(".glass-facts")).to_contain_text("in round trip")
    assert answer.locator(".glass-token.is-chosen").count() == 1


def test_stop_ends_an_answer(visitor: Visitor) -> None:
    visitor.page.route("**/prompts", lambda _: None)  # no answer comes before the click
    send(visitor)
    stop = visitor.page.get_by_role("button", name="Stop")
    expect(stop).to_be_enabled()
    stop.click()
    expect(visitor.page.locator("#glass-status")).to_contain_text("Stopped")
    expect(visitor.page.get_by_role("button", name="Send")).to_be_enabled()


def test_a_problem_names_the_next_step(visitor: Visitor) -> None:
    visitor.page.get_by_label("Prompt").fill("hello")
    visitor.page.get_by_label("Device").fill("oven")
    visitor.page.get_by_role("button", name="Send").click()
    expect(visitor.page.locator("#glass-status")).to_contain_text("oven is offline or unknown")
    visitor.check(expected=["status of 503"])


def test_without_a_script_the_page_has_the_finished_answer(
    browser: Browser, fleet: RunningFleet
) -> None:
    visitor = Visitor(browser, fleet.url, scripts=False)
    open_playground(visitor, fleet)
    page = visitor.page
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Device").fill(KITCHEN)
    page.get_by_role("button", name="Send").click()
    assert page.locator(".glass-text .glass-token").count()
    assert page.get_by_label("Prompt").input_value() == PROMPT
    visitor.check()
    visitor.close()
