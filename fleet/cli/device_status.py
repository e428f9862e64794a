"""The status of one device, as the broker retains it."""

from __future__ import annotations

import queue
import time
from typing import Final

from fleet.errors import LinkError, UnknownDeviceError
from fleet.protocol import topics
from fleet.protocol.denylist import decode_denylist
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.transport.base import Transport

OFFLINE_WAIT_S: Final = 5.0
"""How long a device whose retained status is offline may need to come online."""

UNKNOWN_WAIT_S: Final = 15.0
"""The same without any status: the broker may not know the rights of a new identity yet."""


def await_online(
    link: Transport,
    device: str,
    *,
    offline_wait_s: float = OFFLINE_WAIT_S,
    unknown_wait_s: float = UNKNOWN_WAIT_S,
) -> DeviceStatus:
    """Wait until a device is online; its status.

    A denied device cannot publish its last will, so its name in the denylist counts as offline.

    Raises:
        UnknownDeviceError: the broker has no status of it.
        LinkError: it is offline.
    """
    received: queue.Queue[tuple[str, bytes]] = queue.Queue()
    filters = (topics.REVOKED, topics.device_status(device))
    for topic_filter in filters:
        link.subscribe(topic_filter, lambda *message: received.put(message), qos=1, retained=True)
    try:
        status = _await_status(received, device, offline_wait_s, unknown_wait_s)
    finally:
        for topic_filter in filters:
            link.unsubscribe(topic_filter)
    return _check_online(device, status)


def _check_online(device: str, status: DeviceStatus | None) -> DeviceStatus:
    if status is None:
        raise UnknownDeviceError(
            f"unknown device {device!r}: the broker has no status of it; "
            f"enrol it with 'fleet enroll {device}', and start it with 'edge-agent run DIR'"
        )
    if not status.online:
        raise offline_error(device)
    return status


def offline_error(device: str) -> LinkError:
    """Return the error of a device that is offline."""
    return LinkError(f"device {device} is offline; start it with 'edge-agent run DIR'")


def _await_status(
    received: queue.Queue[tuple[str, bytes]],
    device: str,
    offline_wait_s: float,
    unknown_wait_s: float,
) -> DeviceStatus | None:
    """The first online status with a denylist, else the newest status before the deadline."""
    began = time.monotonic()
    status = None
    has_denylist = False
    while status is None or not status.online or not has_denylist:
        wait_s = unknown_wait_s if status is None else offline_wait_s
        try:
            topic, payload = received.get(timeout=max(0.0, began + wait_s - time.monotonic()))
        except queue.Empty:
            break
        if topic == topics.REVOKED:
            has_denylist = True
            _check_not_denied(device, payload)
        else:
            status = decode_status(payload, DeviceStatus)
    return status


def _check_not_denied(device: str, payload: bytes) -> None:
    if device in decode_denylist(payload):
        raise LinkError(
            f"device {device} is offline: it is suspended, revoked or expired; see 'fleet devices'"
        )
