"""The triggers of a device: events of apps and sensors become prompts."""

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
from fleet.protocol.report import ConfigProblem
from fleet.protocol.triggers import (
    Fields,
    Trigger,
    event_filters,
    make_prompt,
    read_event,
    request_name,
)
from fleet.protocol.types import MAX_LABEL_LENGTH
from fleet.transport.base import Handler, Transport
from fleet.utils.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)

LOG_S: Final = 10.0
PROBLEM_S: Final = 60.0

RequestKey: TypeAlias = tuple[str, str]  # app, request


@dataclass
class _TriggerState:
    trigger: Trigger
    fired_at: float = float("-inf")
    in_flight: list[RequestKey] = field(default_factory=list)


class EventTriggers:
    """The triggers that a device has now, and the rate of each.

    When an event fires a trigger, `on_prompt` receives the message that the app would have sent;
    `is_active` returns whether a request (app, request) is still being answered. A bad event costs
    one line in the log, at most one in `LOG_S` seconds, and `on_problem` receives at most one of
    these problems in `PROBLEM_S` seconds.
    """

    def __init__(
        self,
        transport: Transport,
        epoch: int,
        on_prompt: Handler,
        is_active: Callable[[str, str], bool],
        clock: Callable[[], float] = time.monotonic,
        on_problem: Callable[[ConfigProblem], None] = lambda _: None,
    ) -> None:
        """`epoch` differs after every start of the device."""
        self._transport = transport
        self._epoch = epoch
        self._on_prompt = on_prompt
        self._is_active = is_active
        self._clock = clock
        self._on_problem = on_problem
        self._problem_at = float("-inf")
        self._numbers = itertools.count(1)
        self._states: dict[str, _TriggerState] = {}
        self._filters: set[str] = set()
        self._log = RateLimitedLog(log, LOG_S)

    def set(self, triggers: Iterable[Trigger]) -> None:
        """Replace all triggers. A trigger that keeps its name keeps its rate.

        Only one thread may call at a time.
        """
        previous = self._states
        states = {trigger.name: _TriggerState(trigger) for trigger in triggers}
        for name in states.keys() & previous.keys():
            states[name].fired_at = previous[name].fired_at
            states[name].in_flight = previous[name].in_flight
        self._states = states
        filters = event_filters([state.trigger for state in states.values()])
        for topic_filter in self._filters - filters:
            self._transport.unsubscribe(topic_filter)
        for topic_filter in sorted(filters - self._filters):
            self._transport.subscribe(topic_filter, self._on_event, qos=1, live_only=True)
        self._filters = filters

    def _on_event(self, topic: str, payload: bytes) -> None:
        if not payload:  # as when a client clears a retained message
            return
        try:
            app, channel = topics.parse_topic(topic, topics.EVENT_FILTER)
            event = read_event(channel, payload)
        except FleetError as error:
            self._log.warning("event on %r dropped: %s", topic[:200], error)
            self._report(f"event on {topic[:80]!r} dropped", error)
            return
        for state in self._states.values():
            if state.trigger.listens_to(app, channel):
                try:
                    self._fire(state, app, event)
                except FleetError as error:
                    name = state.trigger.name
                    self._log.warning("trigger %s drops event on %s: %s", name, topic, error)
                    self._report(f"trigger {name} drops {app}/{channel}", error)

    def _report(self, event: str, error: FleetError) -> None:
        """Pass on why an event was dropped, unless another one was reported in this minute."""
        if self._clock() - self._problem_at >= PROBLEM_S:
            self._problem_at = self._clock()
            message = f"{event}: {error}"[:MAX_LABEL_LENGTH]
            self._on_problem(ConfigProblem(error.code, message, is_final=False))

    def _fire(self, state: _TriggerState, app: str, event: Fields) -> None:
        """Turn an event into a prompt, if the trigger's condition and limits allow it."""
        trigger = state.trigger
        now = self._clock()
        prompt = make_prompt(trigger, event)
        if prompt is None or not trigger.is_due(state.fired_at, now):
            return
        state.in_flight = [key for key in state.in_flight if self._is_active(*key)]
        num_in_flight = len(state.in_flight)
        if num_in_flight >= trigger.max_in_flight:
            self._log.warning(
                "trigger %s drops an event: %d are in flight", trigger.name, num_in_flight
            )
            return
        reply_to = trigger.reply_to or app
        request = request_name(trigger, self._epoch, next(self._numbers))
        state.fired_at = now
        state.in_flight.append((reply_to, request))
        topic = topics.device_prompt(self._transport.name, reply_to, request)
        self._on_prompt(topic, msgspec.json.encode(prompt))
