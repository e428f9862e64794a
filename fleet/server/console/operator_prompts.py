"""Prompts of operators to devices, each answered with its trace."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Self

from fleet.errors import BusyError, OfflineError
from fleet.protocol import topics
from fleet.protocol.prompt import PromptRequest
from fleet.server.gateway.app_clients import AppClients
from fleet.server.gateway.device_directory import DeviceDirectory
from fleet.transport.async_prompt_client import AsyncReplyStream
from fleet.transport.base import Transport

FIRST_NUMBER: Final = 1_000_000
"""Smaller numbers are those of operators' own connections."""


@dataclass(frozen=True)
class OperatorPromptLimits:
    """The largest numbers of answers in progress, for an operator and for all."""

    max_per_operator: int = 4
    max_active: int = 64


PROMPT_LIMITS: Final = OperatorPromptLimits()


def app_of(operator: str) -> str:
    """Return the app under whose name an operator prompts devices.

    Devices keep the texts of each app apart. No identity of an app can have such a name.
    """
    digest = hashlib.sha256(operator.encode()).digest()
    return f"operator-{FIRST_NUMBER + int.from_bytes(digest[:7])}"


class OperatorPrompts:
    """The prompts of all operators, over a transport with the rights of a gateway.

    A context manager around all answers. Neither prompts nor answers are stored.
    """

    def __init__(self, transport: Transport, limits: OperatorPromptLimits = PROMPT_LIMITS) -> None:
        self._transport = transport
        self._limits = limits
        self._clients = AppClients(transport)
        self._directory = DeviceDirectory(transport, self._lose)
        self._num_by_operator: Counter[str] = Counter()
        self._open: set[AsyncReplyStream] = set()

    def __enter__(self) -> Self:
        self._directory.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.__exit__()
        self._clients.close()

    @property
    def num_active(self) -> int:
        """The number of answers in progress."""
        return self._num_by_operator.total()

    def is_online(self, device: str) -> bool:
        """Return whether the broker shows a device as online."""
        return self._directory.states([device])[device].online

    @asynccontextmanager
    async def asked(
        self, operator: str, device: str, prompt: PromptRequest
    ) -> AsyncIterator[AsyncReplyStream]:
        """Send a prompt, whose replies the stream has. Its end cancels the answer at the device.

        Raises:
            TopicError: `device` cannot be a name.
            OfflineError: the device or the broker is offline.
            BusyError: too many answers are in progress.
            LinkError: the queue of the link is full.
        """
        topics.check_name(device)
        if not self._transport.is_up:
            raise OfflineError("the server has no connection to the broker now; try again later")
        if not self.is_online(device):
            raise OfflineError(
                f"device {device} is offline or unknown; choose one that the list of devices shows "
                "as online"
            )
        with self._admitted(operator):
            client = await self._clients.client_of(app_of(operator))
            with client.ask(device, prompt) as stream, self._watched(stream):
                yield stream

    @contextmanager
    def _admitted(self, operator: str) -> Iterator[None]:
        if self._num_by_operator[operator] >= self._limits.max_per_operator:
            raise BusyError(
                f"you have {self._limits.max_per_operator} answers in progress, which is the most; "
                "stop one, or wait for its end"
            )
        if self.num_active >= self._limits.max_active:
            raise BusyError(
                f"operators have {self._limits.max_active} answers in progress, which is the most; "
                "try again later"
            )
        self._num_by_operator[operator] += 1
        try:
            yield
        finally:
            self._num_by_operator[operator] -= 1
            if not self._num_by_operator[operator]:
                del self._num_by_operator[operator]

    @contextmanager
    def _watched(self, stream: AsyncReplyStream) -> Iterator[None]:
        self._open.add(stream)
        try:
            yield
        finally:
            self._open.discard(stream)

    def _lose(self, device: str) -> None:
        """End the answers of a device that went offline or started again."""
        for stream in list(self._open):
            if stream.device == device:
                stream.fail(
                    OfflineError(
                        f"device {device} went offline in the midst; send the prompt again"
                    )
                )
