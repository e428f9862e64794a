"""The bridge between a fleet and the broker of a house."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final, Self

from fleet.errors import FleetError, OfflineError, OversizedError
from fleet.protocol import topics
from fleet.protocol.desired_config import Settings, merge_scopes
from fleet.protocol.modes import Mode
from fleet.protocol.prompt import MAX_PROMPT_BYTES, Reply, parse_prompt
from fleet.protocol.report import DeviceStatus, decode_status
from fleet.protocol.triggers import MAX_EVENT_BYTES
from fleet.registry.results import StatsRow
from fleet.registry.store import Registry
from fleet.registry.targets import Scope, Target
from fleet.server.bridge import house_topics
from fleet.server.bridge.bridge_options import BridgeOptions
from fleet.server.bridge.discovery import OFFLINE, ONLINE, discovery_message
from fleet.server.bridge.house_link import HouseHandler, HouseLink
from fleet.server.bridge.house_messages import (
    encode_house_message,
    house_answer_of,
    house_state_of,
)
from fleet.server.bridge.prompt_relay import PromptRelay
from fleet.server.change_watcher import ChangeWatcher
from fleet.transport.base import Transport
from fleet.utils.rate_limited_log import RateLimitedLog

STATS_S: Final = 30.0  # between two readings of the statistics
WINDOW_S: Final = 3600.0  # the statistics cover the answers of this time
UNKNOWN: Final = DeviceStatus(online=False, epoch=0)

log = RateLimitedLog(logging.getLogger(__name__), 10.0)


class HouseBridge:
    """A context manager that shows devices to a house, and relays the house's prompts to them.

    To the fleet, the bridge is an app, under whose name `link` is connected. The house sees the
    devices that this app may prompt. `watcher` runs the tasks of the bridge.
    """

    def __init__(
        self,
        link: Transport,
        registry: Registry,
        watcher: ChangeWatcher,
        options: BridgeOptions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = options.app
        self._link = link
        self._registry = registry
        self._watcher = watcher
        self._clock = clock
        self._topic_map = options.topic_map
        self._statuses: dict[str, DeviceStatus] = {}  # of the app's devices
        self._modes: dict[str, Mode] = {}  # chosen in the house, not stored yet
        self._stats: dict[str, StatsRow] = {}
        self._next_stats_at = float("-inf")
        self._published: dict[str, bytes] = {}  # retained messages at the house's broker
        self._relay = PromptRelay(link, self._on_answer)
        self.house = HouseLink(
            options.house,
            self.app,
            self._handlers(),
            self._on_house_up,
            will_topic=house_topics.bridge_availability(self.app),
            will=OFFLINE,
        )

    def _handlers(self) -> dict[str, HouseHandler]:
        handlers: dict[str, HouseHandler] = {
            house_topics.house_prompt(self.app): self._on_prompt,
            house_topics.house_mode(self.app): self._on_mode,
            house_topics.house_discovery(self.app): self._on_discovery,
        }
        for topic_filter in self._topic_map.filters:
            handlers[topic_filter] = self._on_event
        return handlers

    @property
    def devices(self) -> list[str]:
        """The devices that the house sees."""
        return sorted(self._statuses)

    def __enter__(self) -> Self:
        """Start. Raises RegistryError."""
        with ExitStack() as stack:
            stack.enter_context(self._relay)
            self._follow_rights()
            stack.enter_context(self.house)
            self._watcher.add(self._follow_rights)
            self._watcher.add(self._store_modes, periodic=True)
            self._watcher.add(self._read_stats, periodic=True)
            self._watcher.add(self._show_states, periodic=True)
            stack.enter_context(self._watcher)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _follow_rights(self) -> None:
        """Show the devices that the app may prompt now, and remove the others."""
        grants = self._registry.identities.grants(self.app)
        devices = set(grants.targets) if grants else set()
        for device in self._statuses.keys() - devices:
            self._remove(device)
        for device in sorted(devices - self._statuses.keys()):
            self._statuses[device] = UNKNOWN
            self._show_device(device)
            handler = partial(self._on_status, device)
            self._link.subscribe(topics.device_status(device), handler, qos=1, retained=True)

    def _remove(self, device: str) -> None:
        del self._statuses[device]
        self._modes.pop(device, None)
        self._link.unsubscribe(topics.device_status(device))
        self._relay.fail(device, OfflineError(f"{self.app} may not prompt {device} any more"))
        self._clear(device)

    def _clear(self, device: str) -> None:
        """Clear the retained messages of a device at the house's broker."""
        for topic in (
            house_topics.house_discovery(self.app, device),
            house_topics.house_availability(self.app, device),
            house_topics.house_state(self.app, device),
        ):
            self._published.pop(topic, None)
            self.house.publish_state(topic, b"")

    def _show(self, topic: str, payload: bytes) -> None:
        """Publish a retained message if it has changed; if that fails, the next round does it."""
        if self._published.get(topic) != payload and self.house.publish_state(topic, payload):
            self._published[topic] = payload

    def _on_house_up(self) -> None:
        """Publish everything again: the broker may have lost it."""
        self._published = {}
        self._show_states()

    def _show_device(self, device: str) -> None:
        status = self._statuses.get(device)
        if status is None:
            return
        state = house_state_of(status.mode, self._stats.get(device))
        availability = ONLINE if status.online else OFFLINE
        description = discovery_message(self.app, device)
        self._show(house_topics.house_discovery(self.app, device), description)
        self._show(house_topics.house_state(self.app, device), encode_house_message(state))
        self._show(house_topics.house_availability(self.app, device), availability)

    def _read_stats(self) -> None:
        if self._clock() >= self._next_stats_at:
            self._next_stats_at = self._clock() + STATS_S
            rows = self._registry.stats.per_device(since=time.time() - WINDOW_S)
            self._stats = {row.device: row for row in rows}

    def _show_states(self) -> None:
        """Publish all retained messages that have changed."""
        for device in self.devices:
            self._show_device(device)
        self._show_bridge()

    def _show_bridge(self) -> None:
        """Show the bridge as offline while it has no link to the fleet."""
        availability = ONLINE if self._link.is_up else OFFLINE
        self._show(house_topics.bridge_availability(self.app), availability)

    def _on_status(self, device: str, _: str, payload: bytes) -> None:
        status = decode_status(payload, DeviceStatus)
        earlier = self._statuses.get(device)
        if earlier is None:
            return
        self._statuses[device] = status
        if earlier.online and earlier.epoch != (status.epoch if status.online else None):
            self._relay.fail(
                device, OfflineError(f"device {device} went offline or restarted; ask again")
            )
        self._show_device(device)

    def _on_prompt(self, topic: str, payload: bytes, is_retained: bool) -> None:
        device = self._device_of(topic, house_topics.house_prompt(self.app))
        if device is None or is_retained or not payload:
            return
        try:
            if len(payload) > MAX_PROMPT_BYTES:
                raise OversizedError(
                    f"expected a prompt of at most {MAX_PROMPT_BYTES} bytes, got {len(payload)}"
                )
            self._ask(device, payload)
        except FleetError as error:
            self._on_answer(device, None, error)

    def _ask(self, device: str, payload: bytes) -> None:
        prompt = parse_prompt(payload)
        if not self._link.is_up or not self._statuses[device].online:
            raise OfflineError(f"device {device} is offline; ask again later")
        self._relay.send(device, prompt)

    def _device_of(self, topic: str, topic_filter: str) -> str | None:
        """Return the device in a topic of the house; None if the bridge does not show it."""
        index = topic_filter.split("/").index(topics.ANY)
        device = topic.split("/")[index]
        if device in self._statuses:
            return device
        text = "message of the house on %r dropped: app %s may not prompt a device of this name"
        log.warning(text, topic[:200], self.app)
        return None

    def _on_answer(self, device: str, trigger: str | None, answer: Reply | FleetError) -> None:
        if device in self._statuses:
            message = encode_house_message(house_answer_of(trigger, answer))
            self.house.publish_once(house_topics.house_answer(self.app, device), message)

    def _on_mode(self, topic: str, payload: bytes, is_retained: bool) -> None:
        device = self._device_of(topic, house_topics.house_mode(self.app))
        name = payload[:80].decode(errors="replace")
        if device is None or is_retained:
            return
        if name not in set(Mode):
            log.warning("mode %r of the house dropped: expected one of %s", name, ", ".join(Mode))
            return
        self._modes[device] = Mode(name)

    def _store_modes(self) -> None:
        """Store the chosen modes in the registry as desired settings, which the server publishes.

        Each round stores at most one change per device, whatever the house sends.
        """
        for device, mode in list(self._modes.items()):
            target = Target(Scope.DEVICE, device)
            changes = Settings(mode=mode)
            if self._registry.desired_state.settings(target).mode is not mode:
                change = partial(_merged, changes)
                self._registry.desired_state.change_settings(target, change)
            if self._modes.get(device) is mode:
                del self._modes[device]

    def _on_discovery(self, topic: str, payload: bytes, is_retained: bool) -> None:
        """Clear the retained messages of a device that is not shown now.

        An earlier run has left them, or the device was removed while the house's broker was away.
        """
        device = topic.split("/")[-2]
        if payload and is_retained and device not in self._statuses:
            self._clear(device)

    def _on_event(self, topic: str, payload: bytes, is_retained: bool) -> None:
        """Publish a mapped message as an event. Retained ones are dropped, because they are old."""
        try:
            channel = self._topic_map.channel_of(topic)
            if channel is None or is_retained or not payload:
                return
            if len(payload) > MAX_EVENT_BYTES:
                raise OversizedError(
                    f"expected an event of at most {MAX_EVENT_BYTES} bytes, got {len(payload)}"
                )
            if self._link.is_up:  # an event that waits would be old
                self._link.publish(topics.app_event(self.app, channel), payload, qos=1)
        except FleetError as error:
            log.warning("message of the house on %r dropped: %s", topic[:200], error)


def _merged(changes: Settings, settings: Settings) -> Settings:
    return merge_scopes(settings, changes)
