"""Hostile clients of the embedded broker delay no neighbour by much; the bounds are generous."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.broker_process import BrokerProcess, broker_process
from tests.system.hostile_clients import (
    EVENTS_PER_S,
    NUM_REPEATED,
    admitted_next_to_silent,
    attack,
    connected_devices,
    flood_events,
    lost_while_registry_away,
    repeat_filters,
)

NUM_DEVICES = 40
ATTACK_S = 2.0
CPU_SHARE = 0.9
"""An attack without limits takes all of a core; the machine may be busy with other tests."""


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with broker_process(tmp_path_factory.mktemp("hostile"), NUM_DEVICES) as running:
        yield running


@pytest.mark.parametrize("num_filters", [1_000, NUM_REPEATED])
def test_a_packet_of_repeated_filters_delays_no_neighbour_for_long(
    broker: BrokerProcess, num_filters: int
) -> None:
    delays, cpu_s = attack(broker, repeat_filters, num_filters, ATTACK_S)
    assert cpu_s < CPU_SHARE * ATTACK_S
    assert delays.longest < 1_000.0
    assert delays.number > 20


def test_an_app_that_floods_new_topics_delays_no_neighbour_for_long(broker: BrokerProcess) -> None:
    with connected_devices(broker):
        delays, cpu_s = attack(broker, flood_events, ATTACK_S, EVENTS_PER_S)
    assert cpu_s < CPU_SHARE * ATTACK_S
    assert delays.p95 < 200.0


def test_silent_connections_keep_no_client_out(broker: BrokerProcess) -> None:
    assert admitted_next_to_silent(broker, 300, 20) == 20


def test_no_client_is_lost_while_the_registry_is_away(broker: BrokerProcess) -> None:
    assert lost_while_registry_away(broker, 20, 4.0) == 0
