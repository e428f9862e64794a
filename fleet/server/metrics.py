"""The fleet server's metrics, read from the registry at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from fleet.errors import RegistryError
from fleet.protocol.modes import offload_rate
from fleet.registry.alarms.alarm_kinds import AlarmKind

if TYPE_CHECKING:
    from fleet.registry.store import Registry
    from fleet.server.answer_durations import AnswerDurations
    from fleet.server.collector import Collector
    from fleet.transport.base import Transport

Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)
Labels = TypeVar("Labels", bound=tuple[str, ...])
NO_GROUP = ""
GEN_AI_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_response_model")
OPERATION = "chat"
PROVIDER = "cecollm_fleet"


class Broker(Protocol):
    """A broker in this process."""

    @property
    def is_serving(self) -> bool:
        """Whether its thread runs."""
        ...


@dataclass
class GroupCounts:
    """Sums over the devices of each group; a device without a group counts for the group ""."""

    devices: Counter[tuple[str, str]] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=dict)
    generations: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)


class FleetMonitor:
    """The state of the server for its HTTP endpoint; `broker` is None when it runs elsewhere."""

    def __init__(
        self, registry: Registry, collector: Collector, link: Transport, broker: Broker | None
    ) -> None:
        self._registry = registry
        self._collector = collector
        self._link = link
        self._broker = broker

    def why_unhealthy(self) -> str | None:
        if self._broker and not self._broker.is_serving:
            return "the broker's thread has ended"
        return None

    def why_unready(self) -> str | None:
        if not self._link.is_up:
            return "the collector has no connection to the broker"
        try:
            self._registry.identities.grants(self._link.name)
        except RegistryError as error:
            return str(error)
        return self.why_unhealthy()

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics.

        Raises:
            RegistryError: the registry is not available. The scrape then fails, so that zeros are
                not read as counts.
        """
        yield from _group_metrics(self._count())
        reports = CounterMetricFamily(
            "fleet_reports", "Reports that this process received.", labels=["outcome"]
        )
        outcomes = dict(self._collector.reports)
        yield add_samples(reports, {(outcome,): n for outcome, n in outcomes.items()})
        yield from _duration_metrics(self._collector.durations)
        alarms = GaugeMetricFamily("fleet_alarms", "Open alarms.", labels=["kind"])
        by_kind = dict.fromkeys(AlarmKind, 0) | self._registry.alarms.totals().by_kind
        yield add_samples(alarms, {(kind,): number for kind, number in by_kind.items()})
        yield GaugeMetricFamily(
            "fleet_connected", "1 while the collector is connected.", int(self._link.is_up)
        )

    def _count(self) -> GroupCounts:
        counts = GroupCounts()
        group_of = {}
        for device in self._registry.stats.devices():
            group = group_of[device.device] = device.group or NO_GROUP
            counts.devices[group, "online" if device.online else "offline"] += 1
            counts.sources.setdefault(group, Counter())
        for row in self._registry.stats.per_device():
            group = group_of.get(row.device, NO_GROUP)  # a device enrolled between the two queries
            counts.sources.setdefault(group, Counter()).update(row.sources)
            counts.generations[group] += row.generations
            counts.num_bytes[group, "up"] += row.bytes_up
            counts.num_bytes[group, "down"] += row.bytes_down
        return counts


def _group_metrics(counts: GroupCounts) -> Iterable[Metric]:
    devices = GaugeMetricFamily("fleet_devices", "Enrolled devices.", labels=["group", "state"])
    yield add_samples(devices, counts.devices)
    by_source = CounterMetricFamily("fleet_tokens", "Tokens by source.", labels=["group", "source"])
    tokens = {
        (group, source): n
        for group, sources in counts.sources.items()
        for source, n in sources.items()
    }
    yield add_samples(by_source, tokens)
    rate = GaugeMetricFamily("fleet_offload_rate", "Share from the cloud.", labels=["group"])
    rates = {(group,): offload_rate(sources) for group, sources in counts.sources.items()}
    yield add_samples(rate, rates)
    generations = CounterMetricFamily("fleet_generations", "Answers.", labels=["group"])
    yield add_samples(generations, {(group,): n for group, n in counts.generations.items()})
    session_bytes = CounterMetricFamily(
        "fleet_session_bytes", "Between devices and workers.", labels=["group", "direction"]
    )
    yield add_samples(session_bytes, counts.num_bytes)


def _duration_metrics(durations: AnswerDurations) -> Iterable[Metric]:
    """Yield the histograms of OpenTelemetry, with the names of its attributes as labels."""
    for metric, by_bundle in durations.read().items():
        family = HistogramMetricFamily(metric.name, metric.text, labels=GEN_AI_LABELS)
        for bundle_id, (buckets, sum_s) in by_bundle.items():
            family.add_metric([OPERATION, PROVIDER, bundle_id], buckets, sum_s)
        yield family


def add_samples(family: Family, values: Mapping[Labels, float]) -> Family:
    """The family with a sample for each set of labels."""
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
