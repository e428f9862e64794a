"""The fleet's answers for its HTTP API: a device for each prompt, and another if it is lost."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

from fleet.errors import (
    BusyError,
    CredentialsError,
    FleetError,
    LinkError,
    OfflineError,
    RefusedPromptError,
    RegistryError,
)
from fleet.http_api.backend import ApiBackend, ApiCaller, ApiModel
from fleet.protocol.api_key import ApiKey
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.protocol.types import MAX_DEADLINE_MS
from fleet.server.gateway.app_clients import AppClients
from fleet.server.gateway.device_directory import DeviceDirectory
from fleet.server.gateway.device_router import choose_device
from fleet.server.gateway.key_access import KeyAccess
from fleet.transport.async_prompt_client import AsyncReplyStream
from fleet.transport.base import Transport

LATE_S: Final = 5.0
"""Time for the reply of a device whose prompt has reached its deadline."""

NO_KEY: Final = (
    "expected a key in the header 'Authorization: Bearer KEY'; 'fleet key create APP' makes one"
)


@dataclass(frozen=True)
class ApiLimits:
    """The largest numbers of answers in progress, for a key and for all."""

    max_per_key: int = 64
    max_active: int = 512


LIMITS: Final = ApiLimits()


class FleetBackend(ApiBackend):
    """The backend of a fleet, as a context manager around all its answers.

    It prompts devices as the app that a key belongs to, over a transport with the rights of a
    gateway, and checks the app's rights itself. `end_invalid` has to be called periodically.
    """

    def __init__(self, transport: Transport, access: KeyAccess, limits: ApiLimits = LIMITS) -> None:
        self._transport = transport
        self._access = access
        self._limits = limits
        self._clients = AppClients(transport)
        self.directory = DeviceDirectory(transport, self._lose)
        self._num_by_key: Counter[str] = Counter()
        self._open: dict[AsyncReplyStream, ApiCaller] = {}

    def __enter__(self) -> Self:
        self.directory.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.directory.__exit__()
        self._clients.close()

    @property
    def num_active(self) -> int:
        """The number of requests that wait for a reply or are being answered."""
        return self._num_by_key.total()

    async def authenticate(self, key: str | None) -> ApiCaller:
        if key is None:
            raise CredentialsError(NO_KEY)
        parsed = ApiKey.parse(key)
        caller = self._access.caller(parsed)
        if caller is None:  # it may have been created a moment ago
            await self._follow()
            caller = self._access.caller(parsed)
        if caller is None:
            raise CredentialsError(
                "this key is unknown, revoked or expired; use another one, "
                "or make one with 'fleet key create APP'"
            )
        return caller

    async def _follow(self) -> None:
        try:
            await asyncio.to_thread(self._access.follow)
        except RegistryError:
            raise OfflineError("the fleet's registry is away now; try again later") from None

    async def models(self, caller: ApiCaller) -> Sequence[ApiModel]:
        return [ApiModel(name=name) for name in self._access.names(caller)]

    async def model(self, caller: ApiCaller, name: str) -> ApiModel:
        self._access.devices(caller, name)
        return ApiModel(name=name)

    async def answer(
        self, caller: ApiCaller, model: str, prompt: PromptRequest
    ) -> AsyncGenerator[Reply, None]:
        tried: dict[str, FleetError] = {}
        end_at = time.monotonic() + _longest_wait_s(prompt)
        with self._admitted(caller):
            while True:
                device = self._choose(caller, model, tried)
                client = await self._clients.client_of(caller.app)
                with (
                    self.directory.asking(device),
                    client.ask(device, prompt) as stream,
                    self._watched(stream, caller),
                ):
                    try:
                        reply = await stream.next(end_at - time.monotonic())
                    except (LinkError, RefusedPromptError) as error:
                        tried[device] = _checked_transient(error)
                        continue
                    yield reply
                    while not reply.done:
                        reply = await stream.next()
                        yield reply
                    return

    def _choose(self, caller: ApiCaller, model: str, tried: dict[str, FleetError]) -> str:
        devices = self._access.devices(caller, model)
        if not self._transport.is_up:
            raise OfflineError("the server has no connection to the broker now; try again later")
        return choose_device(devices, self.directory.states(devices), tried)

    @contextmanager
    def _admitted(self, caller: ApiCaller) -> Iterator[None]:
        """Count a request until the block ends. Raises BusyError when there are too many."""
        if self._num_by_key[caller.key] >= self._limits.max_per_key:
            raise BusyError(
                f"this key has {self._limits.max_per_key} answers in progress, which is the most; "
                "try again when one has ended"
            )
        if self.num_active >= self._limits.max_active:
            raise BusyError(
                f"the server has {self._limits.max_active} answers in progress; try later"
            )
        self._num_by_key[caller.key] += 1
        try:
            yield
        finally:
            self._num_by_key[caller.key] -= 1
            if not self._num_by_key[caller.key]:
                del self._num_by_key[caller.key]

    @contextmanager
    def _watched(self, stream: AsyncReplyStream, caller: ApiCaller) -> Iterator[None]:
        """End the stream when the rights to it end, until the block ends."""
        self._open[stream] = caller
        try:
            self._end_if_invalid(stream, caller)  # the rights may have changed before
            yield
        finally:
            del self._open[stream]

    def end_invalid(self) -> None:
        """End the answers whose key or rights have ended. Any thread may call."""
        for stream, caller in list(self._open.items()):
            self._end_if_invalid(stream, caller)

    def _end_if_invalid(self, stream: AsyncReplyStream, caller: ApiCaller) -> None:
        try:
            self._access.check(caller, stream.device)
        except FleetError as error:
            stream.fail(error)

    def _lose(self, device: str) -> None:
        """Let requests without a reply at a device that went offline try another device."""
        for stream in list(self._open):
            if stream.device == device and not stream.has_begun:
                stream.fail(OfflineError(f"device {device} went offline; send the prompt again"))


def _longest_wait_s(prompt: PromptRequest) -> float:
    """Return the time within which the first reply has to come, from any device."""
    return (prompt.deadline_ms or MAX_DEADLINE_MS) / 1000 + LATE_S


def _checked_transient(error: FleetError) -> FleetError:
    """Return an error after which another device may answer; raise any other."""
    if isinstance(error, RefusedPromptError) and error.code != BusyError.code:
        raise error
    return error
