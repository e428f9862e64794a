"""Prompts to devices through the API of the fleet's server."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, Final
from urllib.parse import quote

import msgspec

from fleet.errors import FleetError, LinkError, OversizedError, PromptError, RefusedPromptError
from fleet.operator_api.operation import PREFIX
from fleet.operator_api.prompt_operation import PROBLEM, PROMPT_DEVICE, REPLY
from fleet.operator_api.remote_access import RemoteAccess, RemoteProblem, problem_error
from fleet.protocol.prompt import PromptRequest, Reply
from fleet.transport.prompt_client import AnswerTime

FIRST_S: Final = 60.0
"""Seconds until the stream begins; the server begins it after 15 without a reply."""

MAX_EVENT_BYTES: Final = 16 << 20
TOO_LONG: Final = (PromptError.code, OversizedError.code)


class RemotePrompts:
    """A client that sends prompts as the operator of a key."""

    def __init__(self, access: RemoteAccess) -> None:
        self._access = access

    def ask(self, device: str, prompt: PromptRequest) -> Generator[Reply, None, None]:
        """Yield each reply of one request, in order. The field `done` is set in the last one.

        When the caller stops iterating, the request is cancelled at the device.

        Raises:
            LinkError: the server cannot be reached, or the device is lost or does not end its
                answer.
            RefusedPromptError: the device or the server refuses the prompt.
            FleetError: as the server's API.
        """
        time_left = AnswerTime(device, prompt)
        path = PREFIX + PROMPT_DEVICE.path.replace("{device}", quote(device, safe=""))
        body = msgspec.json.encode(msgspec.to_builtins(prompt) | {"trace": prompt.trace})
        try:
            with self._access.stream(PROMPT_DEVICE.method, path, body, FIRST_S) as pieces:
                for name, data in events_in(checked(pieces, time_left)):
                    reply = self._reply(name, data)
                    if reply is None:
                        continue
                    yield reply
                    if reply.done:
                        return
        except (PromptError, OversizedError) as error:
            raise refused(error) from None
        raise self._access.cut_off()

    def _reply(self, name: str, data: bytes) -> Reply | None:
        """Return the reply of an event; None for an event of a later version. Raises FleetError."""
        if name == PROBLEM:
            raise problem_error(self._access.decode(data, RemoteProblem))
        return self._access.decode(data, Reply) if name == REPLY else None


def refused(error: FleetError) -> RefusedPromptError:
    """Return the error of a prompt that was refused, as a device's own refusal is raised."""
    code = PromptError.code if error.code in TOO_LONG else error.code
    return RefusedPromptError(str(error), code)


def checked(pieces: Iterable[bytes], time_left: AnswerTime) -> Iterator[bytes]:
    """Yield the pieces of a stream until the time of its answer is over. Raises LinkError."""
    for piece in pieces:
        time_left.check()
        yield piece


def events_in(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the data of each event of a stream; comments are left out.

    Raises:
        LinkError: an event is too long.
    """
    rest = b""
    for piece in pieces:
        *blocks, rest = (rest + piece).split(b"\n\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise LinkError(f"expected events of at most {MAX_EVENT_BYTES} bytes, got more")
        for block in blocks:
            fields: dict[bytes, Any] = dict(
                line.split(b": ", 1) for line in block.split(b"\n") if b": " in line
            )
            if b"event" in fields:
                yield fields[b"event"].decode("utf-8", "replace"), fields.get(b"data", b"")
