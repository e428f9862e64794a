"""The access table for device `a`, app `app`, worker `w` and server `hub`."""

import pytest

from fleet.protocol import topics
from fleet.protocol.access import RULES, Action, Grants, Role, permitted_filters

PUBLISH = Action.PUBLISH
SUBSCRIBE = Action.SUBSCRIBE
NAMES = {
    Role.DEVICE: "a",
    Role.APP: "app",
    Role.WORKER: "w",
    Role.SERVER: "hub",
    Role.GATEWAY: "http-api",
}
TARGETS = ("a", "b")

ALLOWED = [
    (Role.DEVICE, PUBLISH, "d/a/status"),
    (Role.DEVICE, PUBLISH, "d/a/stats"),
    (Role.DEVICE, PUBLISH, "d/a/load"),
    (Role.DEVICE, PUBLISH, "d/a/reply/app/r1"),
    (Role.DEVICE, PUBLISH, "open/a"),
    (Role.DEVICE, PUBLISH, "w/w/a/s1"),
    (Role.DEVICE, SUBSCRIBE, "d/a/config"),
    (Role.DEVICE, SUBSCRIBE, "d/a/reported"),
    (Role.DEVICE, SUBSCRIBE, "e/a/+"),
    (Role.DEVICE, SUBSCRIBE, "e/b/warmth"),
    (Role.DEVICE, SUBSCRIBE, "d/a/prompt/+/+"),
    (Role.DEVICE, SUBSCRIBE, "d/a/cancel/+/+"),
    (Role.DEVICE, SUBSCRIBE, "d/a/s/+"),
    (Role.DEVICE, SUBSCRIBE, "d/a/s/s1"),
    (Role.DEVICE, SUBSCRIBE, "w/+/status"),
    (Role.APP, PUBLISH, "d/a/prompt/app/r1"),
    (Role.APP, PUBLISH, "d/b/prompt/app/r1"),
    (Role.APP, PUBLISH, "d/a/cancel/app/r1"),
    (Role.APP, PUBLISH, "e/app/warmth"),
    (Role.APP, SUBSCRIBE, "d/+/reply/app/+"),
    (Role.APP, SUBSCRIBE, "d/a/reply/app/r1"),
    (Role.APP, SUBSCRIBE, "d/a/status"),
    (Role.WORKER, PUBLISH, "d/a/s/s1"),
    (Role.WORKER, PUBLISH, "w/w/status"),
    (Role.WORKER, SUBSCRIBE, "open/+"),
    (Role.WORKER, SUBSCRIBE, "$share/workers/ce/v1/open/+"),
    (Role.WORKER, SUBSCRIBE, "w/w/+/+"),
    (Role.WORKER, SUBSCRIBE, "d/+/status"),
    (Role.SERVER, PUBLISH, "d/a/config"),
    (Role.SERVER, PUBLISH, "d/a/reported"),
    (Role.SERVER, PUBLISH, "d/a/status"),
    (Role.SERVER, PUBLISH, "w/w/status"),
    (Role.SERVER, PUBLISH, "d/a/prompt/hub/r1"),
    (Role.SERVER, SUBSCRIBE, "d/+/status"),
    (Role.SERVER, SUBSCRIBE, "d/+/stats"),
    (Role.SERVER, SUBSCRIBE, "d/a/reply/hub/r1"),
    (Role.SERVER, SUBSCRIBE, "w/+/status"),
    (Role.SERVER, SUBSCRIBE, "fleet/revoked"),
    (Role.GATEWAY, PUBLISH, "d/a/prompt/app/r1"),
    (Role.GATEWAY, PUBLISH, "d/a/cancel/app/r1"),
    (Role.GATEWAY, SUBSCRIBE, "d/+/reply/app/+"),
    (Role.GATEWAY, SUBSCRIBE, "d/+/status"),
    (Role.GATEWAY, SUBSCRIBE, "d/+/load"),
]

DENIED = [
    # Another's topics.
    (Role.DEVICE, PUBLISH, "d/b/status"),
    (Role.DEVICE, PUBLISH, "d/b/reply/app/r1"),
    (Role.DEVICE, PUBLISH, "open/b"),
    (Role.DEVICE, PUBLISH, "w/w/b/s1"),
    (Role.DEVICE, SUBSCRIBE, "d/b/s/s1"),
    (Role.DEVICE, SUBSCRIBE, "d/b/reported"),
    (Role.DEVICE, SUBSCRIBE, "e/c/+"),
    (Role.DEVICE, SUBSCRIBE, "e/+/+"),
    (Role.DEVICE, PUBLISH, "e/a/warmth"),
    (Role.DEVICE, SUBSCRIBE, "d/b/prompt/+/+"),
    (Role.APP, PUBLISH, "d/c/prompt/app/r1"),
    (Role.APP, PUBLISH, "d/a/prompt/other/r1"),
    (Role.APP, PUBLISH, "e/other/warmth"),
    (Role.APP, SUBSCRIBE, "e/a/+"),
    (Role.APP, SUBSCRIBE, "d/a/reply/other/r1"),
    (Role.APP, SUBSCRIBE, "d/c/status"),
    (Role.WORKER, PUBLISH, "w/other/status"),
    (Role.WORKER, SUBSCRIBE, "w/other/+/+"),
    (Role.DEVICE, PUBLISH, "d/b/load"),
    (Role.SERVER, PUBLISH, "d/a/prompt/app/r1"),
    # The other side of one's own topics.
    (Role.DEVICE, PUBLISH, "d/a/s/s1"),
    (Role.DEVICE, PUBLISH, "d/a/config"),
    (Role.DEVICE, PUBLISH, "d/a/reported"),
    (Role.DEVICE, PUBLISH, "d/a/prompt/app/r1"),
    (Role.DEVICE, PUBLISH, "w/w/status"),
    (Role.DEVICE, SUBSCRIBE, "d/a/reply/app/r1"),
    (Role.DEVICE, SUBSCRIBE, "w/w/a/s1"),
    (Role.APP, PUBLISH, "d/a/reply/app/r1"),
    (Role.APP, PUBLISH, "d/a/config"),
    (Role.APP, PUBLISH, "d/a/reported"),
    (Role.APP, SUBSCRIBE, "d/a/prompt/app/r1"),
    (Role.WORKER, PUBLISH, "d/a/reply/app/r1"),
    (Role.WORKER, PUBLISH, "d/a/status"),
    (Role.WORKER, PUBLISH, "d/a/reported"),
    (Role.WORKER, SUBSCRIBE, "d/+/prompt/+/+"),
    (Role.WORKER, SUBSCRIBE, "d/+/s/+"),
    (Role.SERVER, PUBLISH, "d/a/stats"),
    (Role.SERVER, PUBLISH, "d/a/s/s1"),
    (Role.SERVER, SUBSCRIBE, "d/+/s/+"),
    (Role.APP, SUBSCRIBE, "d/a/load"),
    (Role.GATEWAY, PUBLISH, "d/a/reply/app/r1"),
    (Role.GATEWAY, PUBLISH, "d/a/status"),
    (Role.GATEWAY, PUBLISH, "d/a/config"),
    (Role.GATEWAY, PUBLISH, "e/app/warmth"),
    (Role.GATEWAY, SUBSCRIBE, "d/a/prompt/+/+"),
    (Role.GATEWAY, SUBSCRIBE, "d/+/stats"),
    (Role.GATEWAY, SUBSCRIBE, "d/+/s/+"),
    # Wildcards wider than the grant.
    (Role.DEVICE, SUBSCRIBE, "d/+/s/+"),
    (Role.DEVICE, SUBSCRIBE, "d/+/config"),
    (Role.DEVICE, SUBSCRIBE, "d/a/+/+"),
    (Role.DEVICE, SUBSCRIBE, "d/a/#"),
    (Role.DEVICE, SUBSCRIBE, "d/a/s/#"),
    (Role.DEVICE, SUBSCRIBE, "d/a/prompt/#"),
    (Role.DEVICE, SUBSCRIBE, "w/+/+"),
    (Role.DEVICE, SUBSCRIBE, "#"),
    (Role.APP, SUBSCRIBE, "d/+/reply/+/+"),
    (Role.APP, SUBSCRIBE, "d/+/status"),
    (Role.APP, SUBSCRIBE, "d/+/reply/app/#"),
    (Role.WORKER, SUBSCRIBE, "w/+/+/+"),
    (Role.WORKER, SUBSCRIBE, "open/#"),
    (Role.SERVER, SUBSCRIBE, "d/+/reply/+/+"),
    # A shared subscription is no way around.
    (Role.DEVICE, SUBSCRIBE, "$share/workers/ce/v1/open/+"),
    (Role.DEVICE, SUBSCRIBE, "$share/g/ce/v1/d/+/s/+"),
    (Role.DEVICE, SUBSCRIBE, "$share/g/$share/g/ce/v1/d/a/s/+"),
    (Role.DEVICE, SUBSCRIBE, "$share/g"),
    (Role.DEVICE, SUBSCRIBE, "$share/g/#"),
    # Prefixes, empty levels, other trees.
    (Role.DEVICE, PUBLISH, "d/aa/status"),
    (Role.DEVICE, PUBLISH, "d/a/statusx"),
    (Role.DEVICE, PUBLISH, "d/a/status/"),
    (Role.DEVICE, PUBLISH, "d/a//status"),
    (Role.DEVICE, PUBLISH, "d//status"),
    (Role.DEVICE, PUBLISH, "d/a"),
    (Role.DEVICE, PUBLISH, "open/"),
    (Role.DEVICE, PUBLISH, "D/a/status"),
    (Role.DEVICE, PUBLISH, "/d/a/status"),
    (Role.DEVICE, SUBSCRIBE, "$SYS/#"),
    (Role.DEVICE, SUBSCRIBE, ""),
]


def full(topic: str) -> str:
    return topic if topic.startswith("$") or topic == "#" else f"ce/v1/{topic}"


def permits(role: Role, action: Action, topic: str) -> bool:
    return Grants(role, NAMES[role], TARGETS).permits(action, full(topic))


@pytest.mark.parametrize(("role", "action", "topic"), ALLOWED)
def test_a_role_may_use_the_topics_of_its_work(role: Role, action: Action, topic: str) -> None:
    assert permits(role, action, topic)


@pytest.mark.parametrize(("role", "action", "topic"), DENIED)
def test_a_role_may_use_nothing_else(role: Role, action: Action, topic: str) -> None:
    assert not permits(role, action, topic)


@pytest.mark.parametrize("action", Action)
def test_an_app_without_targets_may_touch_no_device(action: Action) -> None:
    grants = permitted_filters(Role.APP, "app", action)
    assert all("/prompt/" not in grant and "/status" not in grant for grant in grants)


@pytest.mark.parametrize("role", Role)
def test_no_rule_ends_in_a_multi_level_wildcard(role: Role) -> None:
    assert all("#" not in rule for rules in RULES[role].values() for rule in rules)


def test_each_topic_that_one_role_may_read_another_may_publish() -> None:
    published = {topic for role in Role for topic in permitted_filters(role, "x", PUBLISH, ("x",))}
    for role in Role:
        for topic_filter in permitted_filters(role, "x", SUBSCRIBE, ("x",)):
            assert any(_may_meet(topic_filter, topic) for topic in published), topic_filter


def _may_meet(one: str, other: str) -> bool:
    levels = list(zip(one.split("/"), other.split("/"), strict=False))
    return one.count("/") == other.count("/") and all(a == b or "+" in (a, b) for a, b in levels)


def test_a_shared_subscription_is_one_to_subscribe_and_nothing_to_publish_on() -> None:
    grants = Grants(Role.WORKER, "w1")
    assert grants.permits(Action.SUBSCRIBE, f"$share/b1/{topics.OPEN_FILTER}")
    assert grants.permits(Action.PUBLISH, topics.worker_status("w1"))
    assert not grants.permits(Action.PUBLISH, f"$share/b1/{topics.worker_status('w1')}")
