"""The admission of reports: the bounds of a plausible one, and the volume of each device."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from fleet.errors import ReportError
from fleet.protocol.modes import NO_EXITS, exit_source
from fleet.protocol.report import GenerationReport
from fleet.protocol.types import DAY_S

MAX_SWITCHES: Final = 16
MAX_SOURCES: Final = 19
"""The most sources of a report on a bundle whose exits are not known."""

MIN_COST: Final = 500
SWITCH_COST: Final = 1000
"""Bytes of the registry that a switch may take: its kind is counted in each span of time."""

BURST_BYTES: Final = 500_000
RATE_BYTES: Final = 32_000
"""The bytes of reports that one device may send: at once, and then per second."""


@dataclass(frozen=True, kw_only=True)
class ReportRules:
    """The bounds of a plausible report.

    `exits_of` returns the exits of a bundle, or None if they are not known.
    """

    max_age_s: float = math.inf
    exits_of: Callable[[str], Collection[int] | None] = lambda _: None

    def check(self, report: GenerationReport, now: float) -> None:
        """Raise ReportError unless a device can have made the report."""
        if problem := self._problem(report, now):
            raise ReportError(f"generation {report.generation} {problem}")

    def _problem(self, report: GenerationReport, now: float) -> str | None:
        if len(report.switches) > MAX_SWITCHES:
            return f"has {len(report.switches)} switches, expected at most {MAX_SWITCHES}"
        if report.started_at > now + DAY_S:
            return "started in the future; set the device's clock"
        if report.started_at < now - self.max_age_s:
            days = self.max_age_s / DAY_S
            return f"started more than {days:g} days ago, the time that reports are kept"
        exits = self.exits_of(report.bundle_id)
        if exits is None:
            too_many = len(report.sources) > MAX_SOURCES
            return f"has {len(report.sources)} sources" if too_many else None
        alien = report.sources.keys() - {*NO_EXITS, *map(exit_source, exits)}
        if alien:
            return f"has tokens from {min(alien)}, an exit that bundle {report.bundle_id} lacks"
        return None


def report_cost(payload: bytes, report: GenerationReport | None = None) -> int:
    """Return the bytes that a report counts for."""
    switches = len(report.switches) if report else 0
    return max(MIN_COST, len(payload)) + SWITCH_COST * switches


class DeviceVolumes:
    """The volume of reports that each device has left, a token bucket; for one thread."""

    def __init__(self) -> None:
        self._levels: dict[str, tuple[float, float]] = {}

    def has_left(self, device: str, now: float) -> bool:
        """Return whether the device may send a report; `now` is of the monotonic clock."""
        return self._level(device, now) > 0

    def charge(self, device: str, num_bytes: int, now: float) -> None:
        """Count a report of `num_bytes`."""
        self._levels[device] = (self._level(device, now) - num_bytes, now)

    def _level(self, device: str, now: float) -> float:
        level, at = self._levels.get(device, (BURST_BYTES, now))
        return min(BURST_BYTES, level + RATE_BYTES * (now - at))
