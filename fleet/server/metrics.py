"""The fleet server's metrics: who is online and where tokens came from, read from the registry when they are asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from fleet.errors import RegistryError
from fleet.protocol.modes import offload_rate

if TYPE_CHECKING:
    from fleet.registry.store import Registry
    from fleet.server.collector import Collector
    from fleet.transport.base import Transport

Family = TypeVar("Family", CounterMetricFamily, GaugeMetricFamily)
Labels = TypeVar("Labels", bound=tuple[str, ...])
NO_GROUP = ""


class Broker(Protocol):
    """A broker in this process."""

    @property
    def is_serving(self) -> bool:
        """Whether its thread runs."""
        ...


class FleetMonitor:
    """What the endpoint tells of the server; its `broker` is None when that runs elsewhere."""

    def __init__(
        self, registry: Registry, collector: Collector, link: Transport, broker: Broker | None
    ) -> None:
        self._registry = registry
        self._collector = collector
        self._link = link
        self._broker = broker

    def why_unhealthy(self) -> str | None:
        return (
            "the broker's thread has ended"
            if self._broker and not self._broker.is_serving
            else None
        )

    def why_unready(self) -> str | None:
        if not self._link.is_up:
            return "the collector has no connection to the broker"
        try:
            self._registry.grants(self._link.name)
        except RegistryError as error:
            return str(error)
        return self.why_unhealthy()

    def collect(self) -> Iterable[Metric]:
        """Sums over the groups of devices; a device without one counts for the group "".

        Raises:
            RegistryError: the registry cannot answer; the scrape then fails, so that no zeros are taken for numbers.
        """
        group_of = {}
        present = Counter[tuple[str, str]]()
        for device in self._registry.devices():
            group_of[device.device] = group = device.group or NO_GROUP
            present[group, "online" if device.online else "offline"] += 1
        sources: dict[str, Counter[str]] = {group: Counter() for group in group_of.values()}
        generations = Counter[str]()
        num_bytes = Counter[tuple[str, str]]()
        for row in self._registry.stats():
            group = group_of.get(row.device, NO_GROUP)  # one that was enrolled a moment ago
            sources.setdefault(group, Counter()).update(row.sources)
            generations[group] += row.generations
            num_bytes[group, "up"] += row.bytes_up
            num_bytes[group, "down"] += row.bytes_down
        tokens = {
            (group, source): n for group, counts in sources.items() for source, n in counts.items()
        }
        rates = {(group,): offload_rate(counts) for group, counts in sources.items()}
        yield filled(
            GaugeMetricFamily("fleet_devices", "Enrolled devices.", labels=["group", "state"]),
            present,
        )
        yield filled(
            CounterMetricFamily("fleet_tokens", "Tokens by source.", labels=["group", "source"]),
            tokens,
        )
        yield filled(
            GaugeMetricFamily("fleet_offload_rate", "Share from the cloud.", labels=["group"]),
            rates,
        )
        yield filled(
            CounterMetricFamily("fleet_generations", "Answers.", labels=["group"]),
            {(group,): n for group, n in generations.items()},
        )
        yield filled(
            CounterMetricFamily(
                "fleet_session_bytes", "Between devices and workers.", labels=["group", "direction"]
            ),
            num_bytes,
        )
        yield filled(
            CounterMetricFamily(
                "fleet_reports", "Reports that came to this process.", labels=["outcome"]
            ),
            {(outcome,): n for outcome, n in dict(self._collector.reports).items()},
        )
        yield GaugeMetricFamily(
            "fleet_connected", "1 while the collector is connected.", int(self._link.is_up)
        )


def filled(family: Family, values: Mapping[Labels, float]) -> Family:
    """The family with a sample for each set of labels."""
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family
