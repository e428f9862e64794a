"""A tree of topic levels that finds the filters of a topic, and the topics of a filter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from fleet.protocol.topics import ANY

REST: Final = "#"  # MQTT's wildcard for all levels that follow

V = TypeVar("V")


class _Level(Generic[V]):
    """One level: the levels below it, and the value of the path that ends here."""

    __slots__ = ("below", "value")

    def __init__(self) -> None:
        self.below: dict[str, _Level[V]] = {}
        self.value: V | None = None


class TopicTrie(Generic[V]):
    """Values by topic or filter, found by the rules of `fleet.protocol.topics.matches`.

    A look-up visits the levels that match, and never all paths. A path has no more levels than the
    rights table permits, so the recursion is shallow.
    """

    def __init__(self) -> None:
        self._root: _Level[V] = _Level()

    def get(self, path: str) -> V | None:
        """Return the value of exactly this path."""
        level = self._root
        for name in path.split("/"):
            if name not in level.below:
                return None
            level = level.below[name]
        return level.value

    def put(self, path: str, value: V) -> None:
        """Set the value of a path."""
        level = self._root
        for name in path.split("/"):
            level = level.below.setdefault(name, _Level())
        level.value = value

    def remove(self, path: str) -> None:
        """Remove a path, if it is there, with the levels that nothing else needs."""
        names = path.split("/")
        levels = [self._root]
        for name in names:
            if name not in levels[-1].below:
                return
            levels.append(levels[-1].below[name])
        levels[-1].value = None
        while names and levels[-1].value is None and not levels[-1].below:
            levels.pop()
            del levels[-1].below[names.pop()]

    def values_for_topic(self, topic: str) -> Iterator[V]:
        """Yield the value of each filter that covers `topic`."""
        return _filters_below(self._root, topic.split("/"), 0)

    def paths_in_filter(self, topic_filter: str) -> Iterator[str]:
        """Yield each topic that `topic_filter` covers."""
        return _topics_below(self._root, topic_filter.split("/"), [])


def _filters_below(level: _Level[V], topic: list[str], depth: int) -> Iterator[V]:
    for below in (level.below.get(REST), level if depth == len(topic) else None):
        if below is not None and below.value is not None:
            yield below.value
    if depth < len(topic):
        for name in {topic[depth], ANY} - {REST}:
            if name in level.below:
                yield from _filters_below(level.below[name], topic, depth + 1)


def _topics_below(level: _Level[V], topic_filter: list[str], path: list[str]) -> Iterator[str]:
    depth = len(path)
    expected = topic_filter[depth] if depth < len(topic_filter) else None
    if level.value is not None and expected in (None, REST):
        yield "/".join(path)
    if expected is None:
        return
    if expected == REST:
        for name in level.below:
            yield from _topics_below(level.below[name], [*path, name, REST], [*path, name])
        return
    for name in list(level.below) if expected == ANY else [expected]:
        if name in level.below:
            yield from _topics_below(level.below[name], topic_filter, [*path, name])
