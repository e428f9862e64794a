"""The lines about a link: few, and at the level that commands show."""

from __future__ import annotations

import logging

import pytest

from fleet.transport.link_log import MANY_LOSSES, MIN_INTERVAL_S, LinkLog

LOGGER = logging.getLogger("link")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> LinkLog:
    return LinkLog(LOGGER, "kitchen", "broker:8883", clock)


@pytest.fixture(autouse=True)
def at_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def test_a_loss_and_a_return_are_one_line_each(
    log: LinkLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.connected()
    log.lost("Keep alive timeout")
    for _ in range(3):
        log.failed("it did not respond in time", needs_help=False)
    log.connected()
    assert caplog.messages == [
        "kitchen lost its link to the broker at broker:8883 (Keep alive timeout); connecting again",
        "kitchen is connected to the broker at broker:8883",
    ]


def test_a_start_without_a_broker_is_one_line_for_each_reason(
    log: LinkLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.is_unattended = True
    for failure in ("no such host", "no such host", "refused", "no such host", "refused"):
        log.failed(failure, needs_help=False)
    log.connected()
    assert caplog.messages == [
        "no connection of kitchen to the broker at broker:8883: no such host; trying again",
        "no connection of kitchen to the broker at broker:8883: refused; trying again",
        "kitchen is connected to the broker at broker:8883",
    ]


def test_a_caller_that_waits_gets_the_reason_as_an_error_alone(
    log: LinkLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.failed("no such host", needs_help=False)
    assert caplog.messages == []


def test_a_failure_that_lasts_after_a_loss_is_logged_when_it_is_repeated(
    log: LinkLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.connected()
    log.lost("closed")
    log.failed("the certificate was revoked", needs_help=True)
    assert len(caplog.messages) == 1
    log.failed("the certificate was revoked", needs_help=True)
    log.failed("the certificate was revoked", needs_help=True)
    assert caplog.messages[1:] == [
        "no connection of kitchen to the broker at broker:8883: "
        "the certificate was revoked; trying again"
    ]


def test_many_losses_are_one_line_a_minute_with_the_likely_cause(
    log: LinkLog, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    log.connected()
    for _ in range(MANY_LOSSES + 1):
        log.lost("closed")
        log.connected()
        clock.now += 1
    assert len(caplog.messages) == 2
    clock.now += MIN_INTERVAL_S
    log.lost("closed")
    assert "two processes may use its name" in caplog.messages[-1]
