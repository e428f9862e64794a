"""An answer with its trace, as the finished page of the playground shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from msgspec import Struct

from fleet.protocol.answer_trace import RoundTrip, round_trips_of
from fleet.protocol.prompt import ErrorInfo, Reply, Usage
from fleet.server.console.formatting import SOURCE_CLASSES, exits_in_order, source_class


class TokenPicture(Struct, frozen=True, kw_only=True):
    """A token: its text, its classes of style, and what its tooltip says."""

    text: str
    classes: str
    facts: str


class AnswerPicture(Struct, frozen=True, kw_only=True):
    """A whole answer. `sources` are the colours by source, for the legend."""

    tokens: list[TokenPicture]
    trips: list[RoundTrip]
    sources: dict[str, str]
    usage: Usage | None
    error: ErrorInfo | None
    note: str | None

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> Self:
        """Return the picture of an answer's replies."""
        names = {reply.source for reply in replies if reply.source}
        colours = colours_of(names)
        events = [event for reply in replies if reply.trace for event in reply.trace.events]
        return cls(
            tokens=[_token(reply, colours) for reply in replies if reply.text],
            trips=round_trips_of(events),
            sources=colours,
            usage=replies[-1].usage,
            error=replies[-1].error,
            note=replies[-1].note,
        )


def colours_of(sources: set[str]) -> dict[str, str]:
    """Return the class of each source; exits have theirs by depth."""
    exits = exits_in_order(sources)
    known = [*exits, *(name for name in SOURCE_CLASSES if name in sources)]
    return {name: f"source-{source_class(name, exits)}" for name in known}


def _token(reply: Reply, colours: dict[str, str]) -> TokenPicture:
    facts = [reply.source or "end of the text"]
    if reply.confidence is not None:
        facts.append(f"confidence {reply.confidence:.0%}")
    trace = reply.trace
    if trace and trace.logprob is not None:
        facts.append(f"log-probability {trace.logprob:.3f}")
    if trace and trace.is_proposed:
        facts.append("copied from an earlier text")
    if trace and trace.verdict:
        facts.append(f"{trace.verdict} by the cloud in round trip {(trace.request or 0) + 1}")
    classes = [colours.get(reply.source or "", "source-none")]
    if trace and trace.is_proposed:
        classes.append("is-proposed")
    if trace and trace.verdict:
        classes.append(f"is-{trace.verdict}")
    return TokenPicture(text=reply.text, classes=" ".join(classes), facts=", ".join(facts))
