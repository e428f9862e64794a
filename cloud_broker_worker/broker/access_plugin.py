"""amqtt's questions (may it connect, publish, subscribe, receive?) answered from the fleet's table of rights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from amqtt.contexts import Action as MqttAction
from amqtt.contexts import BaseContext
from amqtt.plugins.base import BaseAuthPlugin, BaseTopicPlugin
from amqtt.session import Session

from fleet.access import Action, Grants

Lookup = Callable[[str], Grants | None]

CACHE_S: Final = 2.0


class CachedLookup:
    """Asks `lookup` at most once in `CACHE_S` seconds for a name, so that a message costs no database query."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._known: dict[str, tuple[float, Grants | None]] = {}

    def __call__(self, name: str) -> Grants | None:
        asked_at, grants = self._known.get(name, (float("-inf"), None))
        if time.monotonic() - asked_at > CACHE_S:
            grants = self.fresh(name)
        return grants

    def fresh(self, name: str) -> Grants | None:
        """Asks anew."""
        grants = self._lookup(name)
        self._known[name] = time.monotonic(), grants
        return grants


class FleetAccess(BaseAuthPlugin, BaseTopicPlugin):  # type: ignore[misc]
    """Rights of a session by its client id, which the broker has checked against the certificate."""

    @dataclass
    class Config:
        """`lookup` is a CachedLookup."""

        lookup: Any

    def __init__(self, context: BaseContext) -> None:
        super().__init__(context)
        self._lookup: CachedLookup = context.config.lookup

    async def authenticate(self, *, session: Session) -> bool | None:
        return self._lookup(session.client_id) is not None

    async def topic_filtering(
        self, *, session: Session | None = None, topic: str | None = None, action: MqttAction | None = None
    ) -> bool | None:
        grants = self._lookup(session.client_id) if session else None
        wanted = Action.PUBLISH if action is MqttAction.PUBLISH else Action.SUBSCRIBE
        return bool(grants and topic and grants.may(wanted, topic))
