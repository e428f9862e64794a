"""Events of apps and sensors that become prompts of a device."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec

from fleet.errors import FleetError
from fleet.protocol import topics
from fleet.protocol.triggers import (
    Fields,
    Trigger,
    event_filters,
    make_prompt,
    read_event,
    request_name,
)
from fleet.transport.base import Handler, Transport
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

LOG_S: Final = 10.0

Asked: TypeAlias = tuple[str, str]  # app, request


@dataclass
class _Armed:
    trigger: Trigger
    answered_at: float = float("-inf")
    under_way: list[Asked] = field(default_factory=list)


class EventTriggers:
    """The triggers that a device has now, and how often each was pulled.

    An event that pulls one is handed to `on_prompt` as the message that the app would have sent; `is_active` says
    whether the answer to such a request is still under way. An event that is no good costs one line in the log, and of
    many such lines one in `LOG_S` seconds.
    """

    def __init__(
        self,
        transport: Transport,
        epoch: int,
        on_prompt: Handler,
        is_active: Callable[[str, str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`epoch` is another one after every start of the device."""
        self._transport = transport
        self._epoch = epoch
        self._on_prompt = on_prompt
        self._is_active = is_active
        self._clock = clock
        self._numbers = itertools.count(1)
        self._armed: dict[str, _Armed] = {}
        self._filters: set[str] = set()
        self._log = RateLimitedLog(log, LOG_S)

    def set(self, triggers: Iterable[Trigger]) -> None:
        """Puts `triggers` in the place of those until now; one that keeps its name keeps its rate.

        From one thread at a time, the transport's or another.
        """
        before = self._armed
        new = tuple(triggers)
        armed = {trigger.name: _Armed(trigger) for trigger in new}
        for name in armed.keys() & before.keys():
            armed[name].answered_at = before[name].answered_at
            armed[name].under_way = before[name].under_way
        self._armed = armed
        filters = event_filters(new)
        for topic_filter in self._filters - filters:
            self._transport.unsubscribe(topic_filter)
        for topic_filter in sorted(filters - self._filters):
            self._transport.subscribe(topic_filter, self._on_event, qos=1)
        self._filters = filters

    def _on_event(self, topic: str, payload: bytes) -> None:
        try:
            app, channel = topics.parse(topic, "e", "+", "+")
            event = read_event(channel, payload)
        except FleetError as error:
            self._log.warning("event on %s dropped: %s", topic[:200], error)
            return
        for armed in self._armed.values():
            if armed.trigger.takes(app, channel):
                try:
                    self._pull(armed, app, event)
                except FleetError as error:
                    self._log.warning(
                        "event on %s drops out of trigger %s: %s", topic, armed.trigger.name, error
                    )

    def _pull(self, armed: _Armed, app: str, event: Fields) -> None:
        trigger = armed.trigger
        now = self._clock()
        prompt = make_prompt(trigger, event)
        if prompt is None or not trigger.is_due(armed.answered_at, now):
            return
        armed.under_way = [asked for asked in armed.under_way if self._is_active(*asked)]
        if len(armed.under_way) >= trigger.max_in_flight:
            self._log.warning(
                "trigger %s drops an event: %d are being answered",
                trigger.name,
                len(armed.under_way),
            )
            return
        asker = trigger.reply_to or app
        request = request_name(trigger, self._epoch, next(self._numbers))
        armed.answered_at = now
        armed.under_way.append((asker, request))
        self._on_prompt(
            topics.prompt(self._transport.name, asker, request), msgspec.json.encode(prompt)
        )
