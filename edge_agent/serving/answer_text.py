"""The text of a response, cut before its first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.engine.tokenizer import TextStream


class AnswerText:
    """The text of a response, which ends before the first of the texts `stops`.

    Text that may be the beginning of a stop text is held back until later tokens decide. Of several
    stop texts the one that is complete first counts, and of those that end together the longest. So
    the cut does not depend on the borders of the tokens. `text` is the text without what is held
    back.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.is_stopped = False
        self._stream = stream
        self._stops = stops
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the new text after one more token, and set `is_stopped` at a stop text."""
        return self._release(self._stream.push(token_id))

    def flush(self) -> str:
        """Return the text that is held back at the end; none after a stop text."""
        if self.is_stopped:
            return ""
        piece = self._release(self._stream.flush()) + self._held
        self.text += self._held
        self._held = ""
        return piece

    def _release(self, piece: str) -> str:
        """Return the part of the held text and of `piece` that belongs to the response."""
        undecided = self._held + piece
        end = first_stop(undecided, self._stops)
        self.is_stopped = end is not None
        if end is None:
            end = len(undecided) - longest_beginning(undecided, self._stops)
        self._held = "" if self.is_stopped else undecided[end:]
        self.text += undecided[:end]
        return undecided[:end]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop text begins that is complete first in `text`; None if there is none."""
    begins = [(begin + len(stop), begin) for stop in stops if (begin := text.find(stop)) >= 0]
    return min(begins)[1] if begins else None


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Return the number of last characters of `text` that may be the beginning of a stop text."""
    lengths = [
        length
        for stop in stops
        for length in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:length])
    ]
    return max(lengths, default=0)
