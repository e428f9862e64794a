"""Answers that are given while no collector runs are counted later."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.reporting.report_outbox import REPORTS_FILE
from fleet.bundles.manifest import Bundle
from fleet.protocol.modes import Mode
from tests.brokers import wait_until
from tests.system.judge import request
from tests.system.process_fleet import DEVICE, WAIT_S, process_fleet
from tests.system.report_flood import num_kept

pytestmark = pytest.mark.mosquitto

ALONE = request("Name a colour.", mode=Mode.STANDALONE, num_tokens=8)


def test_an_answer_given_while_the_collector_is_down_is_counted_when_it_is_back(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    with process_fleet("mosquitto", tmp_path, tiny_bundle) as fleet, fleet.device():
        fleet.ask(ALONE)
        fleet.check_counts()
        fleet.stop_collector()
        fleet.ask(ALONE)
        fleet.start_collector()
        fleet.check_counts()


def test_a_device_that_is_killed_and_started_again_delivers_what_it_had_kept(
    tmp_path: Path, tiny_bundle: Bundle
) -> None:
    with process_fleet("mosquitto", tmp_path, tiny_bundle) as fleet:
        fleet.device_process()
        fleet.stop_collector()
        for _ in range(3):
            fleet.ask(ALONE)
        wait_until(lambda: num_kept(tmp_path / DEVICE) == 3, "the reports are on disk", WAIT_S)
        fleet.kill(DEVICE)
        fleet.start_collector()
        fleet.device_process()
        fleet.check_counts()
        wait_until(
            lambda: num_kept(tmp_path / DEVICE) == 0, "the device has forgotten them", WAIT_S
        )
        assert (tmp_path / DEVICE / REPORTS_FILE).stat().st_mode & 0o777 == 0o600
