"""What a device does while it waits for the cloud's token: it goes on from its own guess."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Final

from edge_agent.acceptance import Acceptance
from edge_agent.decoder import Choice, Decoder
from edge_agent.drafting import worth_guessing
from edge_agent.measurements import Measurements

MIN_CHANCE: Final = 0.1  # a guess is followed when it is right with at least this probability


class Lookahead:
    """The steps of one sequence behind guesses.

    Where the cloud says what the device's deepest exit guessed, the next token has been computed by the time that its
    word arrives; where not, only waiting time was spent (ADR 0027). The text is the same in both cases.
    """

    def __init__(
        self, decoder: Decoder, acceptance: Acceptance, measurements: Measurements, eos_token_ids: Collection[int]
    ) -> None:
        self._decoder = decoder
        self._acceptance = acceptance
        self._measurements = measurements
        self._eos_token_ids = eos_token_ids

    def steps(self, choice: Choice, max_tokens: int) -> Iterator[None]:
        """Takes a step each time that it is advanced, on from `choice`, which the cloud was just asked about.

        Ends before a token that needs a question of its own, and where another step is not worth its time.
        `max_tokens` are the text's next ones, the one of `choice` included.
        """
        chance, started = 1.0, time.monotonic()
        for _ in range(max_tokens - 1):
            chance *= self._acceptance.probability(choice.confidence)
            if choice.token_id in self._eos_token_ids or not self._is_worth(chance, time.monotonic() - started):
                return
            choice = self._decoder.guess(choice.token_id)
            yield
            if not choice.is_sure:
                return

    def judge(self, choice: Choice, token_id: int) -> None:
        """Learns from the cloud's token."""
        is_right = choice.token_id == token_id
        self._acceptance.update(choice.confidence, accepted=is_right)
        self._measurements.guessed(is_right=is_right)

    def _is_worth(self, chance: float, elapsed_s: float) -> bool:
        if chance < MIN_CHANCE or not self._decoder.can_guess:
            return False
        measured = self._measurements.snapshot()
        return worth_guessing(chance, measured.step_s, max(0.0, measured.round_trip_s - elapsed_s))
