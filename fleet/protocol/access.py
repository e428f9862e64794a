"""Who may publish and subscribe where: one table, from which every broker's rules are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from fleet.protocol import topics


class Role(StrEnum):
    """What an identity is for. Its name is its certificate's CN, MQTT user name and client id."""

    DEVICE = "device"
    APP = "app"
    WORKER = "worker"
    SERVER = "server"


class Action(StrEnum):
    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


# `{name}` is the identity's own name; `{target}` each device that an app was allowed, and for a device each such app.
RULES: Final[dict[Role, dict[Action, tuple[str, ...]]]] = {
    Role.DEVICE: {
        Action.PUBLISH: (
            "d/{name}/status",
            "d/{name}/reply/+/+",
            "d/{name}/stats",
            "open/{name}",
            "w/+/{name}/+",
        ),
        Action.SUBSCRIBE: (
            "d/{name}/config",
            "d/{name}/prompt/+/+",
            "d/{name}/cancel/+/+",
            "d/{name}/s/+",
            "d/{name}/reported",
            "e/{target}/+",
            "w/+/status",
        ),
    },
    Role.APP: {
        Action.PUBLISH: ("d/{target}/prompt/{name}/+", "d/{target}/cancel/{name}/+", "e/{name}/+"),
        Action.SUBSCRIBE: ("d/+/reply/{name}/+", "d/{target}/status"),
    },
    Role.WORKER: {
        Action.PUBLISH: ("d/+/s/+", "w/{name}/status"),
        Action.SUBSCRIBE: ("open/+", "w/{name}/+/+", "fleet/revoked"),
    },
    Role.SERVER: {
        Action.PUBLISH: (
            "d/+/config",
            "d/+/reported",
            "d/+/prompt/{name}/+",
            "d/+/cancel/{name}/+",
            "fleet/revoked",
        ),
        Action.SUBSCRIBE: ("d/+/status", "d/+/stats", "d/+/reply/{name}/+", "w/+/status"),
    },
}


def granted(role: Role, name: str, action: Action, targets: Iterable[str] = ()) -> list[str]:
    """The topic filters that an identity may use for `action`; for `targets` see `Grants`."""
    filters = []
    for rule in RULES[role][action]:
        for target in targets if "{target}" in rule else ("",):
            filters.append(f"{topics.PREFIX}/{rule.format(name=name, target=target)}")
    return filters


def allows(grants: Iterable[str], requested: str) -> bool:
    """Whether a topic, or a subscription filter, lies wholly inside one of the granted filters.

    A wildcard is inside only where the grant has one too, so ``d/+/status`` is never a way around ``d/a/status``.
    """
    levels = requested.split("/")
    for grant in grants:
        wanted = grant.split("/")
        if len(wanted) == len(levels) and all(
            want in ("+", level) and level != "#"
            for want, level in zip(wanted, levels, strict=True)
        ):
            return True
    return False


@dataclass(frozen=True)
class Grants:
    """What one enrolled identity may do.

    `targets` are the devices that an app was allowed, groups and tags resolved; of a device, the apps that were so.
    """

    role: Role
    name: str
    targets: tuple[str, ...] = ()

    @cached_property
    def filters(self) -> dict[Action, list[str]]:
        """The topic filters granted for each action."""
        return {action: granted(self.role, self.name, action, self.targets) for action in Action}

    def may(self, action: Action, topic: str) -> bool:
        """Whether `action` is granted on a topic or, to subscribe, on a filter.

        A shared subscription (``$share/<group>/<filter>``, MQTT 5 section 4.8.2) asks for its filter.
        """
        return allows(
            self.filters[action], topics.filter_of(topic) if action is Action.SUBSCRIBE else topic
        )
