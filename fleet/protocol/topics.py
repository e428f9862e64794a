"""The names and filters of all topics; docs/protocol.md lists the rights to them.

No other module builds or parses a topic.
"""

from __future__ import annotations

import re
from typing import Final

from fleet.errors import TopicError

PREFIX: Final = "ce/v1"
ANY: Final = "+"  # MQTT's wildcard for one level
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_UNCHECKED: Final = 128  # characters of a request that is refused because of its name


def check_name(name: str, kind: str = "name") -> str:
    """Return `name` if it may stand in a topic.

    A name has 1 to 63 characters of ``a-z 0-9 _ -`` and does not start with ``_`` or ``-``.

    Raises:
        TopicError: it may not.
    """
    if not NAME.fullmatch(name):
        raise TopicError(
            f"{kind} {name[:80]!r}: expected 1 to 63 characters of a-z, 0-9, '-' and '_'; "
            "choose such a name"
        )
    return name


def device_status(device: str) -> str:
    """The topic of a device's retained status, which is also its last will."""
    return f"{PREFIX}/d/{device}/status"


def device_stats(device: str) -> str:
    """The topic of a device's reports."""
    return f"{PREFIX}/d/{device}/stats"


def device_load(device: str) -> str:
    """The topic of the requests that a device has."""
    return f"{PREFIX}/d/{device}/load"


def device_config(device: str) -> str:
    """The topic of a device's retained desired configuration."""
    return f"{PREFIX}/d/{device}/config"


def device_reported(device: str) -> str:
    """The topic on which the collector acknowledges a device's reports."""
    return f"{PREFIX}/d/{device}/reported"


def device_prompt(device: str, app: str, request: str) -> str:
    """The topic of an app's prompt to a device."""
    return f"{PREFIX}/d/{device}/prompt/{app}/{request}"


def device_reply(device: str, app: str, request: str) -> str:
    """The topic of a device's replies to one prompt."""
    return f"{PREFIX}/d/{device}/reply/{app}/{request}"


def device_cancel(device: str, app: str, request: str) -> str:
    """The topic on which an app cancels its prompt."""
    return f"{PREFIX}/d/{device}/cancel/{app}/{request}"


def app_event(app: str, channel: str) -> str:
    """The topic of an app's or a sensor's events, on which devices may act."""
    return f"{PREFIX}/e/{app}/{channel}"


def to_device(device: str, session: str) -> str:
    """The topic of a worker's messages to a device's session."""
    return f"{PREFIX}/d/{device}/s/{session}"


def to_worker(worker: str, device: str, session: str) -> str:
    """The topic of a device's messages to the session that a worker holds."""
    return f"{PREFIX}/w/{worker}/{device}/{session}"


def open_session(device: str) -> str:
    """The topic on which a device opens sessions."""
    return f"{PREFIX}/open/{device}"


def worker_status(worker: str) -> str:
    """The topic of a worker's retained status, which is also its last will."""
    return f"{PREFIX}/w/{worker}/status"


REVOKED: Final = f"{PREFIX}/fleet/revoked"

DEVICE_STATUS_FILTER: Final = device_status(ANY)
DEVICE_STATS_FILTER: Final = device_stats(ANY)
DEVICE_LOAD_FILTER: Final = device_load(ANY)
DEVICE_CONFIG_FILTER: Final = device_config(ANY)
DEVICE_REPORTED_FILTER: Final = device_reported(ANY)
PROMPT_FILTER: Final = device_prompt(ANY, ANY, ANY)
REPLY_FILTER: Final = device_reply(ANY, ANY, ANY)
CANCEL_FILTER: Final = device_cancel(ANY, ANY, ANY)
EVENT_FILTER: Final = app_event(ANY, ANY)
TO_DEVICE_FILTER: Final = to_device(ANY, ANY)
TO_WORKER_FILTER: Final = to_worker(ANY, ANY, ANY)
OPEN_FILTER: Final = open_session(ANY)
WORKER_STATUS_FILTER: Final = worker_status(ANY)


def prompts_to(device: str) -> str:
    """The filter of all prompts to a device."""
    return device_prompt(device, ANY, ANY)


def cancels_to(device: str) -> str:
    """The filter of all cancellations at a device."""
    return device_cancel(device, ANY, ANY)


def replies_to(app: str) -> str:
    """The filter of all replies to an app."""
    return device_reply(ANY, app, ANY)


def sessions_of_device(device: str) -> str:
    """The filter of all messages to a device's sessions."""
    return to_device(device, ANY)


def sessions_of_worker(worker: str) -> str:
    """The filter of all messages to the sessions that a worker holds."""
    return to_worker(worker, ANY, ANY)


def shared_open_filter(bundle_id: str) -> str:
    """The shared subscription by which one worker of each bundle receives a request for a session.

    The workers of other bundles receive it as well, each group once.
    """
    return f"$share/{bundle_id}/{OPEN_FILTER}"


def parse_topic(topic: str, topic_filter: str) -> tuple[str, ...]:
    """Return the names at the ``+`` levels of a filter, e.g. of `DEVICE_STATUS_FILTER`.

    Raises:
        TopicError: the topic has another shape, or a name in it is not legal.
    """
    expected = topic_filter.split("/")
    levels = topic.split("/")
    if len(levels) != len(expected) or not matches(topic_filter, topic):
        raise TopicError(f"expected a topic like {topic_filter}, got {topic[:200]!r}")
    pairs = zip(levels, expected, strict=True)
    return tuple(check_name(level) for level, wildcard in pairs if wildcard == ANY)


def unchecked_request(topic: str) -> tuple[str, str] | None:
    """Return the app and the request of a prompt's topic whose request is not a legal name.

    A device may refuse such a prompt on the topic of its replies. None if that cannot be a topic.
    """
    app, request = topic.split("/")[-2:]
    is_printable = request.isprintable() and 0 < len(request) <= MAX_UNCHECKED
    return (app, request) if NAME.fullmatch(app) and is_printable else None


def subscribed_filter(subscription: str) -> str:
    """Return the topic filter of a subscription, shared (``$share/<group>/<filter>``) or not."""
    return subscription.split("/", 2)[-1] if subscription.startswith("$share/") else subscription


def matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT filter covers a topic; MQTT 3.1.1 section 4.7.

    ``+`` stands for one level and ``#`` for all that follow.

    A shared subscription (``$share/<group>/<filter>``, MQTT 5 section 4.8.2) covers what its filter
    does.
    """
    expected = subscribed_filter(topic_filter).split("/")
    levels = topic.split("/")
    for i, level in enumerate(expected):
        if level == "#":
            return True
        if i >= len(levels) or level not in (ANY, levels[i]):
            return False
    return len(expected) == len(levels)
