"""The choice of a device for a prompt, as plain functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from fleet.errors import BusyError, OfflineError, UnknownModelError
from fleet.http_api.backend import LATEST
from fleet.protocol.access import ANY_DEVICE
from fleet.registry.results import DeviceLabels

GROUP: Final = "group:"
TAG: Final = "tag:"


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """A device as the gateway knows it.

    `num_asked` counts the gateway's own requests there, which may be more than the device has
    reported. `last_used` grows with each prompt of the gateway.
    """

    online: bool = False
    num_running: int = 0
    num_waiting: int = 0
    num_asked: int = 0
    last_used: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """The order of devices; the first one has the least work."""
        num_requests = max(self.num_running + self.num_waiting, self.num_asked)
        return self.num_waiting, num_requests, self.last_used


OFFLINE: Final = DeviceState()


def names_of(allowed: Collection[str], devices: Mapping[str, DeviceLabels]) -> list[str]:
    """Return the names that stand for devices of `allowed`: devices, groups, tags and `fleet`."""
    labels = [devices[device] for device in allowed]
    groups = {f"{GROUP}{each.group}" for each in labels if each.group}
    tags = {f"{TAG}{tag}" for each in labels for tag in each.tags}
    several = [ANY_DEVICE] if allowed else []
    return [*several, *sorted(allowed), *sorted(groups), *sorted(tags)]


def devices_named(
    model: str, allowed: Collection[str], devices: Mapping[str, DeviceLabels]
) -> list[str]:
    """Return the devices of `allowed` that a name stands for.

    Raises:
        UnknownModelError: there are none.
    """
    for name in (model, model.removesuffix(LATEST)):
        named = sorted(device for device in allowed if _is_named(name, device, devices[device]))
        if named:
            return named
    raise UnknownModelError(
        f"model {model[:200]!r} is no device that this key may prompt; expected the name of a "
        f"device, {GROUP}NAME, {TAG}KEY=VALUE or {ANY_DEVICE}; GET /v1/models lists them"
    )


def _is_named(name: str, device: str, labels: DeviceLabels) -> bool:
    if name.startswith(GROUP):
        return labels.group == name.removeprefix(GROUP)
    if name.startswith(TAG):
        return name.removeprefix(TAG) in labels.tags
    return name in (ANY_DEVICE, device)


def choose_device(
    named: Iterable[str], states: Mapping[str, DeviceState], tried: Mapping[str, Exception]
) -> str:
    """Return the device with the least work among those that are online and were not tried yet.

    Raises:
        BusyError, OfflineError: there is none; the error of a device that was tried counts.
    """
    names = list(named)
    online = [name for name in names if states.get(name, OFFLINE).online and name not in tried]
    if online:
        return min(online, key=lambda name: (states[name].rank, name))
    busy = [error for error in tried.values() if getattr(error, "code", "") == BusyError.code]
    if busy:
        raise BusyError(str(busy[-1]))
    if tried:
        raise OfflineError(str(list(tried.values())[-1]))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise OfflineError(f"offline now: {shown}; send the prompt again later")
