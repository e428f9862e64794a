"""The topics of a house that become events of the fleet, as the operator maps them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fleet.errors import ConfigError
from fleet.protocol.topics import NAME, check_name, matches
from fleet.server.bridge.house_topics import NEVER_EVENTS

MAX_MAPPINGS: Final = 64
MAX_FILTER: Final = 1000  # characters
MAX_CHANNEL: Final = 63  # characters of a name
FILTER: Final = re.compile(r"(?:\+|[^+#/\0]*)(?:/(?:\+|[^+#/\0]*))*(?:/#)?|#")
OTHER_CHARACTERS: Final = re.compile(r"[^a-z0-9_]+")


@dataclass(frozen=True)
class MappedTopic:
    """A filter of the house's topics, and the channel of their events.

    Without a channel, it follows from each topic: ``zigbee2mqtt/Living room`` becomes
    ``zigbee2mqtt-living-room``.
    """

    topic_filter: str
    channel: str | None = None

    @classmethod
    def parse(cls, text: str) -> MappedTopic:
        """Return the mapping ``FILTER`` or ``FILTER=CHANNEL``. Raises ConfigError."""
        topic_filter, equals, channel = text.rpartition("=")
        mapping = cls(topic_filter, channel) if equals else cls(text)
        mapping._check(text)
        return mapping

    def _check(self, text: str) -> None:
        is_filter = 0 < len(self.topic_filter) <= MAX_FILTER and FILTER.fullmatch(self.topic_filter)
        is_channel = self.channel is None or NAME.fullmatch(self.channel)
        if not is_filter or not is_channel:
            raise ConfigError(
                f"--map {text[:80]!r}: expected a filter of topics and perhaps a channel, such as "
                "zigbee2mqtt/hall=hall or 'zigbee2mqtt/+'"
            )
        if self.topic_filter.startswith(NEVER_EVENTS):
            raise ConfigError(
                f"--map {text[:80]!r}: topics of bridges, of Home Assistant's discovery, of the "
                "fleet and of the broker are not mapped; map those of sensors"
            )

    def __str__(self) -> str:
        return self.topic_filter if self.channel is None else f"{self.topic_filter}={self.channel}"


class TopicMap:
    """All mappings of a bridge; the first one that matches a topic decides."""

    def __init__(self, mappings: Iterable[MappedTopic] = ()) -> None:
        self.mappings = tuple(mappings)
        if len(self.mappings) > MAX_MAPPINGS:
            raise ConfigError(
                f"expected at most {MAX_MAPPINGS} times --map, got {len(self.mappings)}; "
                "use filters with + or #"
            )

    @classmethod
    def parse(cls, texts: Iterable[str]) -> TopicMap:
        """Return the map of all options ``--map``. Raises ConfigError."""
        return cls(map(MappedTopic.parse, texts))

    @property
    def filters(self) -> list[str]:
        """The filters to subscribe to, each once."""
        return list(dict.fromkeys(each.topic_filter for each in self.mappings))

    def channel_of(self, topic: str) -> str | None:
        """Return the channel of a topic; None if it is not mapped, or never becomes an event.

        Raises:
            TopicError: no channel can be made of the topic.
        """
        if topic.startswith(NEVER_EVENTS):
            return None
        for each in self.mappings:
            if matches(each.topic_filter, topic):
                return each.channel or _channel_name(topic)
        return None


def _channel_name(topic: str) -> str:
    name = OTHER_CHARACTERS.sub("-", topic.lower()).strip("-_")
    return check_name(name[:MAX_CHANNEL], "channel")
