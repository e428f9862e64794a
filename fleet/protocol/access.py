"""The access rights of each role in one table, from which the rules of every broker are made."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from fleet.protocol import topics
from fleet.protocol.topics import ANY

ANY_DEVICE: Final = "fleet"  # as `model` of the HTTP API; no device has this name


class Role(StrEnum):
    """The purpose of an identity.

    Its name is its certificate's CN, MQTT user name and client id. A gateway sends the prompts of
    apps that have no connection of their own; it checks the rights of each app by itself.
    """

    DEVICE = "device"
    APP = "app"
    WORKER = "worker"
    SERVER = "server"
    GATEWAY = "gateway"

    @property
    def with_article(self) -> str:
        """The role with "a" or "an", for messages."""
        return f"an {self}" if self is Role.APP else f"a {self}"


def is_operator(name: str) -> bool:
    """Return whether a name is an operator's; no other identity can have such a name."""
    return re.fullmatch(r"operator-\d+", name) is not None


class Action(StrEnum):
    """A kind of access to topics."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


OWN_NAME: Final = "{name}"
TARGET: Final = "{target}"  # each device that an app may use; for a device each such app

RULES: Final[dict[Role, dict[Action, tuple[str, ...]]]] = {
    Role.DEVICE: {
        Action.PUBLISH: (
            topics.device_status(OWN_NAME),
            topics.device_reply(OWN_NAME, ANY, ANY),
            topics.device_stats(OWN_NAME),
            topics.device_load(OWN_NAME),
            topics.open_session(OWN_NAME),
            topics.to_worker(ANY, OWN_NAME, ANY),
        ),
        Action.SUBSCRIBE: (
            topics.device_config(OWN_NAME),
            topics.device_prompt(OWN_NAME, ANY, ANY),
            topics.device_cancel(OWN_NAME, ANY, ANY),
            topics.to_device(OWN_NAME, ANY),
            topics.device_reported(OWN_NAME),
            topics.app_event(TARGET, ANY),
            topics.WORKER_STATUS_FILTER,
        ),
    },
    Role.APP: {
        Action.PUBLISH: (
            topics.device_prompt(TARGET, OWN_NAME, ANY),
            topics.device_cancel(TARGET, OWN_NAME, ANY),
            topics.app_event(OWN_NAME, ANY),
        ),
        Action.SUBSCRIBE: (
            topics.device_reply(ANY, OWN_NAME, ANY),
            topics.device_status(TARGET),
        ),
    },
    Role.WORKER: {
        Action.PUBLISH: (topics.TO_DEVICE_FILTER, topics.worker_status(OWN_NAME)),
        Action.SUBSCRIBE: (
            topics.OPEN_FILTER,
            topics.to_worker(OWN_NAME, ANY, ANY),
            topics.DEVICE_STATUS_FILTER,
            topics.REVOKED,
        ),
    },
    Role.SERVER: {
        Action.PUBLISH: (
            topics.DEVICE_STATUS_FILTER,  # to clear those of deleted identities
            topics.WORKER_STATUS_FILTER,
            topics.DEVICE_CONFIG_FILTER,
            topics.DEVICE_REPORTED_FILTER,
            topics.device_prompt(ANY, OWN_NAME, ANY),
            topics.device_cancel(ANY, OWN_NAME, ANY),
            topics.REVOKED,
        ),
        Action.SUBSCRIBE: (
            topics.DEVICE_STATUS_FILTER,
            topics.DEVICE_STATS_FILTER,
            topics.device_reply(ANY, OWN_NAME, ANY),
            topics.WORKER_STATUS_FILTER,
            topics.REVOKED,
        ),
    },
    Role.GATEWAY: {
        Action.PUBLISH: (topics.PROMPT_FILTER, topics.CANCEL_FILTER),
        Action.SUBSCRIBE: (
            topics.DEVICE_STATUS_FILTER,
            topics.DEVICE_LOAD_FILTER,
            topics.REPLY_FILTER,
        ),
    },
}


def permitted_filters(
    role: Role, name: str, action: Action, targets: Iterable[str] = ()
) -> list[str]:
    """Return the topic filters that an identity may use; for `targets` see `Grants`."""
    filters = []
    for rule in RULES[role][action]:
        for target in targets if TARGET in rule else ("",):
            filters.append(rule.format(name=name, target=target))
    return filters


RULE_LEVELS: Final = {
    role: {action: [rule.split("/") for rule in rules] for action, rules in table.items()}
    for role, table in RULES.items()
}


@dataclass(frozen=True)
class Grants:
    """The rights of one enrolled identity.

    `targets` are an app's permitted devices, groups and tags resolved; for a device, the apps that
    may use it.
    """

    role: Role
    name: str
    targets: tuple[str, ...] = ()

    @cached_property
    def filters(self) -> dict[Action, list[str]]:
        """The permitted topic filters for each action."""
        return {
            action: permitted_filters(self.role, self.name, action, self.targets)
            for action in Action
        }

    def permits(self, action: Action, topic: str) -> bool:
        """Whether `action` is permitted on a topic or, to subscribe, on a filter.

        A shared subscription (``$share/<group>/<filter>``, MQTT 5 section 4.8.2) needs the right to
        its filter.
        """
        is_subscription = action is Action.SUBSCRIBE
        requested = topics.subscribed_filter(topic) if is_subscription else topic
        levels = requested.split("/")
        return any(self._covers(rule, levels) for rule in RULE_LEVELS[self.role][action])

    def _covers(self, rule: list[str], levels: list[str]) -> bool:
        """Whether a topic or filter lies wholly inside a rule.

        A wildcard is inside only where the rule has one too, so ``d/+/status`` is never a way
        around ``d/a/status``.
        """
        if len(rule) != len(levels):
            return False
        return all(map(self._covers_level, rule, levels))

    def _covers_level(self, rule: str, level: str) -> bool:
        if rule == TARGET:
            return level in self._target_names
        return level == (self.name if rule == OWN_NAME else rule) or (rule == ANY and level != "#")

    @cached_property
    def _target_names(self) -> frozenset[str]:
        return frozenset(self.targets)
