"""Clients of a fleet for Python programs, sync and async: a connection of an app, over MQTT."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Final, Self

from fleet.errors import ConfigError, LinkError
from fleet.identity.identity import Identity
from fleet.protocol.access import Role
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.topics import check_name
from fleet.transport.async_prompt_client import AsyncPromptClient
from fleet.transport.mqtt import MqttTransport
from fleet.transport.prompt_client import PromptClient, reply_timeout_s
from fleet.transport.responder import AsyncResponder, Responder

CONNECT_TIMEOUT_S: Final = 10.0
MAY_PROMPT: Final = (Role.APP, Role.SERVER)


class FleetClient:
    """A connection to a fleet's broker, on which devices are prompted; close it, or use `with`.

    `identity` is one of an app, or the folder that has it. The client does not renew the
    certificate; ``edge-agent renew`` does.
    """

    def __init__(
        self, identity: Identity | Path | str, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        """Connect.

        Raises:
            IdentityError: the folder has no usable identity.
            ConfigError: the identity is that of a device or a worker.
            LinkError: the broker cannot be reached within `timeout_s`, or refuses the identity.
        """
        self._transport = MqttTransport.connect(_app_identity(identity), timeout_s=timeout_s)
        self._client = PromptClient(self._transport)

    def device(self, name: str) -> DeviceClient:
        """Return the device of this name, which the app may prompt.

        Raises:
            TopicError: it cannot be a name.
        """
        self._client.watch(name)
        return DeviceClient(self._client, name)

    def close(self) -> None:
        """Disconnect."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceClient(Responder):
    """A device, prompted over a connection.

    An answer raises LinkError if the device goes offline or does not respond, and
    RefusedPromptError if it refuses the request.
    """

    def __init__(self, client: PromptClient, name: str) -> None:
        self.name = name
        self._client = client

    def respond(self, request: PromptRequest) -> Generator[Reply, None, None]:
        """Yield the replies of the device; see `PromptClient.ask`."""
        return self._client.ask(self.name, request)


class AsyncFleetClient:
    """A connection as that of `FleetClient`, for ``async with`` on an event loop."""

    def __init__(
        self, identity: Identity | Path | str, *, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> None:
        """Store the identity. `async with` connects.

        Raises:
            IdentityError: the folder has no usable identity.
            ConfigError: the identity is that of a device or a worker.
        """
        self._identity = _app_identity(identity)
        self._timeout_s = timeout_s
        self._transport: MqttTransport | None = None
        self._client: AsyncPromptClient | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            LinkError: the broker cannot be reached in time, or refuses the identity.
            IdentityError: the certificate does not load.
        """
        await asyncio.to_thread(self._connect)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._transport:
            await asyncio.to_thread(self._transport.close)

    def _connect(self) -> None:
        self._transport = MqttTransport.connect(self._identity, timeout_s=self._timeout_s)
        self._client = AsyncPromptClient(self._transport, self._identity.name)
        self._client.open()

    def device(self, name: str) -> AsyncDeviceClient:
        """Return the device of this name, which the app may prompt.

        Raises:
            TopicError: it cannot be a name.
            LinkError: the client is not connected.
        """
        if self._client is None:
            raise LinkError("this client is not connected; use it in 'async with'")
        return AsyncDeviceClient(self._client, check_name(name))


class AsyncDeviceClient(AsyncResponder):
    """A device as `DeviceClient`, on an event loop."""

    def __init__(self, client: AsyncPromptClient, name: str) -> None:
        self.name = name
        self._client = client

    async def respond(self, request: PromptRequest) -> AsyncGenerator[Reply, None]:
        """Yield the replies of the device."""
        await asyncio.to_thread(self._client.watch, self.name)
        timeout_s = reply_timeout_s(request)
        with self._client.ask(self.name, request) as stream:
            while not stream.is_done:
                yield await stream.next(timeout_s)


def _app_identity(identity: Identity | Path | str) -> Identity:
    found = identity if isinstance(identity, Identity) else Identity.load(Path(identity))
    if found.config.role not in MAY_PROMPT:
        raise ConfigError(
            f"{found.folder} is the identity of {found.config.role.with_article}, which may not "
            "prompt devices; make one with 'fleet enroll NAME --role app --allow DEVICE --out DIR'"
        )
    return found
