"""The clients through which the gateway sends the prompts of apps, one for each app."""

from __future__ import annotations

import asyncio
from typing import Final

from fleet.errors import BusyError
from fleet.transport.async_prompt_client import AsyncPromptClient
from fleet.transport.base import Transport

MAX_APPS: Final = 64
"""Subscriptions for replies; the embedded broker accepts 100 of one connection."""


class AppClients:
    """Clients by their apps. A client stays open, because its subscription costs a round trip."""

    def __init__(self, transport: Transport, max_apps: int = MAX_APPS) -> None:
        self._transport = transport
        self._max_apps = max_apps
        self._clients: dict[str, AsyncPromptClient] = {}
        self._opening = asyncio.Lock()

    async def client_of(self, app: str) -> AsyncPromptClient:
        """Return the client of an app; use it before the next `await`.

        Raises:
            BusyError: other apps have too many clients, all with open requests.
        """
        if app not in self._clients:
            async with self._opening:
                if app not in self._clients:
                    await self._open(app)
        self._clients[app] = self._clients.pop(app)  # the one that was used last is the last one
        return self._clients[app]

    async def _open(self, app: str) -> None:
        client = AsyncPromptClient(self._transport, app)
        await asyncio.to_thread(client.open)
        if len(self._clients) >= self._max_apps:
            idle = [name for name, other in self._clients.items() if other.is_idle]
            if not idle:
                client.close()
                raise BusyError(
                    f"{self._max_apps} apps have answers in progress, which is the most; try later"
                )
            self._clients.pop(idle[0]).close()
        self._clients[app] = client

    def close(self) -> None:
        """Close all clients."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
