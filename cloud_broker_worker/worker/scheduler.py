"""The choice of the positions that run next: a plain function, no tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Final, NamedTuple, TypeVar

from cloud_broker_worker.worker.session import SessionKey

K = TypeVar("K", bound=Hashable)

CONTEXT_COST: Final = 1024
"""The number of earlier positions whose attention costs one unit. A position itself also costs one
unit."""


SHORT_UNITS: Final = 8
"""A device that waits for at most this many units is served in a short step."""


class Pending(NamedTuple):
    """A session's positions to run, each of which costs `cost` units."""

    num_positions: int
    cost: int = 1

    @property
    def units(self) -> int:
        return self.num_positions * self.cost


def position_cost(start: int) -> int:
    """Return the cost, in units, of a position after `start` earlier ones."""
    return 1 + start // CONTEXT_COST


def fair_shares(wanted: Mapping[K, int], room: int) -> dict[K, int]:
    """Divide `room` into equal shares, and return the share of each key.

    A key gets no more than it wants, and the others get the rest of its share. `wanted` is in order
    of arrival: if `room` is smaller than the number of keys, the first ones get one each.
    """
    waiting = [(key, count) for key, count in wanted.items() if count > 0][:room]
    shares: dict[K, int] = {}
    for i, (key, count) in enumerate(sorted(waiting, key=lambda item: item[1])):
        shares[key] = min(count, room // (len(waiting) - i))
        room -= shares[key]
    return shares


def units_by_device(pending: Mapping[SessionKey, Pending]) -> dict[str, int]:
    """Return the units that each device waits for, in order of arrival."""
    units: dict[str, int] = {}
    for key, each in pending.items():
        if each.num_positions > 0:
            units[key.device] = units.get(key.device, 0) + each.units
    return units


def shared_units(pending: Mapping[SessionKey, Pending], max_long: int) -> int:
    """Return the units of one step while several devices are served.

    While any device waits for at most `SHORT_UNITS` units, no device gets more than `SHORT_UNITS`.
    Otherwise the step has at least `max_long` units.
    """
    units = units_by_device(pending).values()
    few = sum(min(each, SHORT_UNITS) for each in units)
    has_short = any(each <= SHORT_UNITS for each in units)
    return few if has_short else max(few, max_long)


def schedule(pending: Mapping[SessionKey, Pending], max_units: int) -> dict[SessionKey, int]:
    """Return how many positions of each session run in one batch of about `max_units`.

    `pending` is in order of arrival, and no session waits forever. Devices get equal shares, and so
    do the sessions of one device. So a long prefill never delays short requests, and a device with
    many sessions gets no more than a device with one.
    """
    devices: dict[str, dict[SessionKey, Pending]] = defaultdict(dict)
    for key, each in pending.items():
        if each.num_positions > 0:
            devices[key.device][key] = each
    batch: dict[SessionKey, int] = {}
    for device, room in fair_shares(units_by_device(pending), max_units).items():
        batch |= _within_device(devices[device], room)
    return batch


def _within_device(own: Mapping[SessionKey, Pending], room: int) -> dict[SessionKey, int]:
    """Share `room` among a device's sessions. If no session gets a position, the first gets one."""
    batch: dict[SessionKey, int] = {}
    for key, units in fair_shares({key: each.units for key, each in own.items()}, room).items():
        if count := units // own[key].cost:
            batch[key] = count
            room -= count * own[key].cost
    first, pending = next(iter(own.items()))
    spare = min(pending.num_positions - batch.get(first, 0), room // pending.cost)
    if spare or not batch:
        batch[first] = batch.get(first, 0) + max(1, spare)
    return batch
