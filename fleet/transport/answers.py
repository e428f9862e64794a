"""Answers in Python: streams of replies, which are cancelled when their reader leaves them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from typing import Self

from fleet.errors import FleetError, LinkError
from fleet.protocol.prompt import Choice, Reply, TokenLogprob, Usage


class Answer:
    """The answer to one prompt, an iterable of its replies.

    The request is sent when the first reply is read. The properties read the rest of the answer
    first. A loop over the answer that is left early cancels the request: the answer then ends where
    it was left.

    Each reply of a stream has the `text`, the `source` and the `confidence` of one token; see
    :class:`fleet.protocol.prompt.Reply`.

    Raises:
        FleetError: the request is refused or has failed; the loop and each property raise it.
    """

    def __init__(self, replies: Iterable[Reply] = ()) -> None:
        self._rest = iter(replies)
        self._replies: list[Reply] = []
        self._error: FleetError | None = None

    def __iter__(self) -> Iterator[Reply]:
        """Yield the replies in order: those that were read before, then the rest."""
        try:
            yield from list(self._replies)
            yield from self._read()
        finally:
            self.close()

    def _read(self) -> Iterator[Reply]:
        if self._error:
            raise self._error
        try:
            for reply in self._rest:
                self._replies.append(reply)
                yield reply
        except FleetError as error:
            self._error = error
            raise

    def close(self) -> None:
        """Cancel the request unless it is complete."""
        if isinstance(self._rest, Generator):
            self._rest.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def replies(self) -> list[Reply]:
        """All replies, in order."""
        for _ in self._read():
            pass
        return self._replies

    @property
    def last(self) -> Reply:
        """The last reply, which has the counts.

        Raises:
            LinkError: the answer was left before its first reply.
        """
        if not self.replies:
            raise LinkError("this answer was left before its first reply; send the prompt again")
        return self._replies[-1]

    @property
    def text(self) -> str:
        """The text; empty if there are several choices, which have the texts."""
        return "".join(reply.text for reply in self.replies)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The choices of a request with `n` above 1."""
        return self.last.choices or ()

    @property
    def token_ids(self) -> list[int]:
        """The ids of the tokens of a stream."""
        return [reply.token_id for reply in self.replies if reply.token_id is not None]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The log-probabilities of the tokens, if the request asks for them."""
        return [logprob for reply in self.replies for logprob in reply.logprobs or ()]

    @property
    def usage(self) -> Usage:
        """The counts and times of the answer.

        Raises:
            LinkError: the answer was left before its end.
        """
        if self.last.usage is None:
            raise LinkError("this answer was left before its end and has no counts")
        return self.last.usage

    @property
    def sources(self) -> dict[str, int]:
        """The number of tokens by source. Raises LinkError, as `usage` does."""
        return self.usage.sources


class AsyncAnswer:
    """The same on an event loop: iterate over its replies, or await the complete answer.

    A loop that is left early cancels the request.
    """

    def __init__(self, replies: AsyncGenerator[Reply, None]) -> None:
        self._replies = replies

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self._replies.__aiter__()

    async def complete(self) -> Answer:
        """Wait for the whole answer.

        Raises:
            FleetError: the request is refused or has failed.
        """
        return Answer([reply async for reply in self._replies])

    async def aclose(self) -> None:
        """Cancel the request unless it is complete."""
        await self._replies.aclose()
