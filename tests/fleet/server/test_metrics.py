"""The metrics of the fleet server, its liveness and its readiness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleet.monitoring.http_endpoint import HttpEndpoint
from fleet.protocol import topics
from fleet.protocol.report import DeviceStatus, encode_report
from fleet.registry.alarms.alarm_kinds import AlarmKind
from fleet.registry.alarms.transitions import AlarmCondition, AlarmEvaluation
from fleet.registry.store import Registry
from fleet.server.collector import Collector
from fleet.server.metrics import FleetMonitor
from fleet.transport.in_memory import InMemoryBroker, InMemoryTransport
from tests.brokers import HOST, wait_until
from tests.fleet.conftest import add, report
from tests.scrape import get, scrape


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry.sqlite") as opened:
        yield opened


class Server:
    """A collector on an in-memory broker, which counts as its own, and its endpoint."""

    def __init__(
        self,
        registry: Registry,
        collector: Collector,
        link: InMemoryTransport,
        endpoint: HttpEndpoint,
    ) -> None:
        self.link = link
        self.url = endpoint.url
        self.is_serving = True
        endpoint.show(FleetMonitor(registry, collector, link, self))


@contextmanager
def server(registry: Registry) -> Iterator[tuple[Server, InMemoryTransport]]:
    broker = InMemoryBroker()
    with (
        broker.connect("collector") as link,
        broker.connect("edge-1") as device,
        Collector(link, registry) as collector,
        HttpEndpoint(HOST, 0) as endpoint,
    ):
        yield Server(registry, collector, link, endpoint), device


def test_devices_tokens_and_offload_are_summed_by_group(registry: Registry) -> None:
    for name, group in (("a1", "lab"), ("a2", "lab"), ("b1", None)):
        add(registry, name, group=group)
        registry.stats.record_report(name, report())
    with server(registry) as (running, _):
        registry.stats.record_status(
            "a1",
            DeviceStatus(online=True, epoch=1, bundle_id="b", version="0.1.0", mode="standalone"),
            1000.0,
        )
        samples = scrape(running.url)
    assert samples['fleet_devices{group="lab",state="online"}'] == 1
    assert samples['fleet_devices{group="lab",state="offline"}'] == 1
    assert samples['fleet_devices{group="",state="offline"}'] == 1
    assert samples['fleet_tokens_total{group="lab",source="exit:8"}'] == 10
    assert samples['fleet_tokens_total{group="",source="cloud"}'] == 2
    assert samples['fleet_offload_rate{group="lab"}'] == pytest.approx(0.2)
    assert samples['fleet_generations_total{group="lab"}'] == 2
    assert samples['fleet_session_bytes_total{direction="up",group="lab"}'] == 4000


def test_open_alarms_are_counted_by_kind(registry: Registry) -> None:
    condition = AlarmCondition(kind=AlarmKind.OFFLINE, subject="a1", summary="a1 is offline")
    registry.alarms.apply(AlarmEvaluation({condition.key: condition}, [condition.key]))
    with server(registry) as (running, _):
        samples = scrape(running.url)
    assert samples['fleet_alarms{kind="offline"}'] == 1
    assert samples['fleet_alarms{kind="errors"}'] == 0


def test_reports_are_counted_by_outcome(registry: Registry) -> None:
    add(registry, "edge-1")
    with server(registry) as (running, device):
        for payload in (encode_report(report("g1")), encode_report(report("g1")), b"garbage"):
            device.publish(topics.device_stats("edge-1"), payload, qos=1)

        def outcomes() -> list[float]:
            samples = scrape(running.url)
            return [
                samples[f'fleet_reports_total{{outcome="{name}"}}']
                for name in ("stored", "repeated", "refused")
            ]

        wait_until(lambda: sum(outcomes()) >= 2, "the reports are counted")
        stored, _, refused = outcomes()
    assert (stored, refused) == (1, 1)


def test_a_server_without_a_link_is_alive_and_not_ready(registry: Registry) -> None:
    with server(registry) as (running, _):
        assert get(f"{running.url}/readyz") == (200, "ok\n")
        running.link.drop()
        assert get(f"{running.url}/readyz") == (
            503,
            "the collector has no connection to the broker\n",
        )
        assert get(f"{running.url}/healthz") == (200, "ok\n")


def test_a_server_whose_broker_has_ended_is_unhealthy(registry: Registry) -> None:
    with server(registry) as (running, _):
        running.is_serving = False
        assert get(f"{running.url}/healthz") == (503, "the broker's thread has ended\n")


def test_a_registry_that_cannot_answer_fails_the_scrape_and_not_the_process(
    registry: Registry, tmp_path: Path
) -> None:
    with server(registry) as (running, _):
        registry.close()
        (tmp_path / "registry.sqlite").unlink()
        (tmp_path / "registry.sqlite").mkdir()
        status, reason = get(f"{running.url}/readyz")
        assert status == 503
        assert "the registry" in reason
        assert get(f"{running.url}/metrics") == (503, reason)
        assert get(f"{running.url}/healthz") == (200, "ok\n")


def test_times_of_answers_have_the_names_and_labels_of_opentelemetry(registry: Registry) -> None:
    add(registry, "edge-1")
    labels = 'gen_ai_operation_name="chat",gen_ai_provider_name="cecollm_fleet"'
    with server(registry) as (running, device):
        failed = report("g2", finish_reason="error", ttft_ms=3000.0)
        for each in (report("g1"), report("g1"), failed):
            device.publish(topics.device_stats("edge-1"), encode_report(each), qos=1)

        def counts() -> list[float]:
            samples = scrape(running.url)
            return [
                samples.get(
                    f'gen_ai_server_{name}_seconds_count{{{labels},gen_ai_response_model="b1"}}', 0
                )
                for name in ("request_duration", "time_to_first_token", "time_per_output_token")
            ]

        wait_until(lambda: counts()[0] == 2, "both answers are counted, each once")
        assert counts() == [2, 1, 1]
