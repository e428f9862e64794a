"""The interface between the HTTP API and the program that answers: a device or a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Final, Protocol

from msgspec import Struct

from fleet.protocol.prompt import PromptRequest, Reply

LATEST: Final = ":latest"  # the tag that Ollama's clients add to a name


class ApiModel(Struct, frozen=True, kw_only=True):
    """A name that clients may send as `model`, and the facts about it that both APIs show.

    A name that stands for several devices has only `name`.
    """

    name: str
    created_at: float = 0.0
    bundle_id: str = ""
    architecture: str = ""
    quantization: str = ""
    num_bytes: int = 0
    max_positions: int = 0
    has_chat_template: bool = True


class ApiCaller(Struct, frozen=True):
    """The app of a request, and the id of its key, "" where keys have no ids."""

    app: str
    key: str = ""


class ApiBackend(Protocol):
    """The source of answers of one process. All methods run on the event loop; none may block."""

    async def authenticate(self, key: str | None) -> ApiCaller:
        """Return the caller that a key belongs to; None if the client sent no key.

        Raises:
            CredentialsError: the key is missing, unknown, expired or revoked.
        """
        ...

    async def models(self, caller: ApiCaller) -> Sequence[ApiModel]:
        """Return the names that a caller may use, in the order in which clients show them."""
        ...

    async def model(self, caller: ApiCaller, name: str) -> ApiModel:
        """Return one model, also by a name that `models` does not list.

        Raises:
            UnknownModelError: the caller may use no model of this name.
        """
        ...

    def answer(
        self, caller: ApiCaller, model: str, prompt: PromptRequest
    ) -> AsyncGenerator[Reply, None]:
        """Yield the replies of one answer in order; the last one has `done`.

        Closing the generator, or cancelling its task, cancels the answer on the device.

        Raises:
            UnknownModelError: the caller may use no model of this name.
            FleetError: the prompt is refused, or the answer fails. A reply with `error` has the
                same effect.
        """
        ...
