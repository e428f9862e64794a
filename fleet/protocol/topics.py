"""Topic names: built here, parsed here, nowhere else. See docs/protocol.md for who may use which."""

from __future__ import annotations

import re
from typing import Final

from fleet.errors import TopicError

PREFIX: Final = "ce/v1"
NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
OPEN_FILTER: Final = f"{PREFIX}/open/+"
WORKER_STATUS_FILTER: Final = f"{PREFIX}/w/+/status"
DEVICE_STATUS_FILTER: Final = f"{PREFIX}/d/+/status"
DEVICE_CONFIG_FILTER: Final = f"{PREFIX}/d/+/config"
DEVICE_STATS_FILTER: Final = f"{PREFIX}/d/+/stats"
REVOKED: Final = f"{PREFIX}/fleet/revoked"


def check_name(name: str, what: str = "name") -> str:
    """`name` itself when it may stand in a topic: 1 to 63 of ``a-z 0-9 _ -``, not starting with ``_`` or ``-``.

    Raises:
        TopicError: it may not.
    """
    if not NAME.fullmatch(name):
        raise TopicError(
            f"{what} {name[:80]!r}: expected 1 to 63 characters of a-z, 0-9, '-' and '_'; choose such a name"
        )
    return name


def device_status(device: str) -> str:
    return f"{PREFIX}/d/{device}/status"


def device_stats(device: str) -> str:
    return f"{PREFIX}/d/{device}/stats"


def device_config(device: str) -> str:
    """Where the fleet tells a device what it wants of it."""
    return f"{PREFIX}/d/{device}/config"


def device_reported(device: str) -> str:
    """Where the collector acknowledges what came on `device_stats`."""
    return f"{PREFIX}/d/{device}/reported"


def prompt(device: str, app: str, request: str) -> str:
    return f"{PREFIX}/d/{device}/prompt/{app}/{request}"


def reply(device: str, app: str, request: str) -> str:
    return f"{PREFIX}/d/{device}/reply/{app}/{request}"


def cancel(device: str, app: str, request: str) -> str:
    return f"{PREFIX}/d/{device}/cancel/{app}/{request}"


def event(app: str, channel: str) -> str:
    """Where an app or a sensor says something that devices may act on."""
    return f"{PREFIX}/e/{app}/{channel}"


def to_device(device: str, session: str) -> str:
    """Where a worker answers a session of `device`."""
    return f"{PREFIX}/d/{device}/s/{session}"


def to_worker(worker: str, device: str, session: str) -> str:
    """Where `device` sends what belongs to a session that `worker` holds."""
    return f"{PREFIX}/w/{worker}/{device}/{session}"


def open_session(device: str) -> str:
    return f"{PREFIX}/open/{device}"


def shared_open_filter(bundle_id: str) -> str:
    """Where one of the workers that serve a bundle takes each session; those of other bundles get it as well."""
    return f"$share/{bundle_id}/{OPEN_FILTER}"


def worker_status(worker: str) -> str:
    return f"{PREFIX}/w/{worker}/status"


def parse(topic: str, *shape: str) -> tuple[str, ...]:
    """The names that stand at the ``+`` places of `shape`, e.g. ``parse(topic, "d", "+", "status")``.

    Raises:
        TopicError: the topic has another shape, or a name in it is not legal.
    """
    parts = topic.split("/")
    if len(parts) != len(shape) + 2 or "/".join(parts[:2]) != PREFIX:
        raise TopicError(f"expected a topic like {PREFIX}/{'/'.join(shape)}, got {topic[:200]!r}")
    names = []
    for part, wanted in zip(parts[2:], shape, strict=True):
        if wanted == "+":
            names.append(check_name(part))
        elif part != wanted:
            raise TopicError(
                f"expected a topic like {PREFIX}/{'/'.join(shape)}, got {topic[:200]!r}"
            )
    return tuple(names)


def filter_of(subscription: str) -> str:
    """The topic filter of a subscription, shared or not."""
    return subscription.split("/", 2)[-1] if subscription.startswith("$share/") else subscription


def matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT filter (``+`` one level, ``#`` the rest) takes a topic; MQTT 3.1.1 section 4.7.

    A shared subscription (``$share/<group>/<filter>``, MQTT 5 section 4.8.2) takes what its filter takes.
    """
    wanted = filter_of(topic_filter).split("/")
    got = topic.split("/")
    for i, level in enumerate(wanted):
        if level == "#":
            return True
        if i >= len(got) or level not in ("+", got[i]):
            return False
    return len(wanted) == len(got)
