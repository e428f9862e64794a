"""The tree of topic levels against `topics.matches`, and the work of a look-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_broker_worker.broker import topic_trie
from cloud_broker_worker.broker.topic_trie import TopicTrie
from fleet.protocol import topics
from fleet.protocol.topics import matches

NAME = st.sampled_from(["", "a", "b", "c"])
TOPIC = st.lists(NAME, min_size=1, max_size=5).map("/".join)
FILTER = st.tuples(
    st.lists(NAME | st.just("+"), max_size=4), st.sampled_from(["#", "+", "a", "b", ""])
).map(lambda parts: "/".join([*parts[0], parts[1]]))


@given(st.lists(FILTER, max_size=12), TOPIC)
def test_a_topic_finds_exactly_the_filters_that_match_it(filters: list[str], topic: str) -> None:
    trie: TopicTrie[str] = TopicTrie()
    for each in filters:
        trie.put(each, each)
    found = list(trie.values_for_topic(topic))
    assert sorted(found) == sorted(each for each in set(filters) if matches(each, topic))


@given(st.lists(TOPIC, max_size=12), FILTER)
def test_a_filter_finds_exactly_the_topics_that_it_matches(
    names: list[str], topic_filter: str
) -> None:
    trie: TopicTrie[str] = TopicTrie()
    for each in names:
        trie.put(each, each)
    found = list(trie.paths_in_filter(topic_filter))
    assert sorted(found) == sorted(each for each in set(names) if matches(topic_filter, each))


@given(st.lists(st.tuples(st.booleans(), FILTER), max_size=20))
def test_what_is_removed_is_gone_and_leaves_no_level(steps: list[tuple[bool, str]]) -> None:
    trie: TopicTrie[str] = TopicTrie()
    kept: dict[str, str] = {}
    for is_put, path in steps:
        if is_put:
            trie.put(path, path)
            kept[path] = path
        else:
            trie.remove(path)
            kept.pop(path, None)
    assert {path: trie.get(path) for _, path in steps} == {
        path: kept.get(path) for _, path in steps
    }
    for path in kept:
        trie.remove(path)
    assert trie._root.below == {}


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[object]:
    """Count the calls of a recursive function of the module."""
    calls: list[object] = []
    function: Callable[..., Any] = getattr(topic_trie, name)

    def counting(*arguments: object) -> object:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(topic_trie, name, counting)
    return calls


def test_a_new_topic_costs_the_same_whether_ten_devices_have_subscribed_or_ten_thousand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trie: TopicTrie[str] = TopicTrie()
    for i in range(10_000):
        trie.put(topics.prompts_to(f"d{i}"), "")
        trie.put(topics.sessions_of_device(f"d{i}"), "")
    trie.put(topics.app_event("a1", "+"), "the subscriber")
    calls = counted(monkeypatch, "_filters_below")
    assert list(trie.values_for_topic(topics.app_event("a1", "new"))) == ["the subscriber"]
    assert len(calls) <= 8


def test_the_retained_message_of_one_device_is_found_without_a_look_at_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trie: TopicTrie[str] = TopicTrie()
    for i in range(10_000):
        trie.put(topics.device_status(f"d{i}"), "")
    calls = counted(monkeypatch, "_topics_below")
    status = topics.device_status("d77")
    assert list(trie.paths_in_filter(status)) == [status]
    assert len(calls) <= 8
